"""From stored image files to detections: one frame per core from its bytes to its boxes, bounded memory, order kept."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import cv2
import numpy as np

from workbench.boxes import Detections
from workbench.dataset import Frame
from workbench.errors import WorkbenchError
from workbench.inference.detector import Detector, Prepared
from workbench.inference.pixels import decode_frame, decode_image
from workbench.inference.tiling import Tiling, detect_tiles

__all__ = ["decode_image", "detect_frames"]

T = TypeVar("T")
# Enough results to work on while whoever takes them is busy for half a second, with a model of 100 images a second.
AHEAD = 64


def detect_frames(
    detector: Detector,
    frames: Iterable[tuple[T, Frame]],
    read: Callable[[Frame], bytes],
    *,
    batch: int = 1,
    threads: int = 0,
    ahead: int = AHEAD,
    tiling: Tiling | None = None,
) -> Iterator[tuple[T, Detections | WorkbenchError]]:
    """Yields (what came with the frame, its detections) in the order of `frames`.

    read     gives a frame's image file, in a thread
    batch    images a run of the graph; each run has exactly so many (the last is filled up), so that what a frame gets
             does not depend on how many there are. With 1 it never depends on its neighbours either (float sums differ
             in their last bits between batch sizes), so a repeated job writes the very same boxes.
    threads  each takes its frames through all stages, from the file to the boxes, so no image waits between stages or
             moves to another core; 0: one per core, or per stream of the detector where it has more
    ahead    how many results may be under way or waiting beyond the batch; pixels are only held by threads, for the
             frames they are at: memory does not grow with the number of frames
    tiling   also looks at each frame piece by piece, for small objects in large frames

    A JPEG much larger than the model's input is decoded at 1/2, 1/4 or 1/8, but never below its size on the canvas.
    A frame that cannot be read or decoded, or whose size is not the recorded one, yields its error instead.
    """
    # Its threads would only take cores from the ones here.
    cv2.setNumThreads(1)

    def prepare(frame: Frame) -> Prepared:
        size = (frame.width, frame.height)
        image = decode_frame(read(frame), frame.name, size, detector.least_size(size))
        return detector.prepare(image, size)

    def attempt(work: Callable[[Frame], object], frame: Frame) -> object:
        try:
            return work(frame)
        except WorkbenchError as error:
            return error

    def detected(group: Sequence[Frame]) -> list[Detections | WorkbenchError]:
        ready = [attempt(prepare, frame) for frame in group]
        whole = [one for one in ready if isinstance(one, Prepared)]
        if whole and batch > 1 and detector.batch_is_dynamic:
            whole += [whole[-1]] * (batch - len(whole))
        found = iter(detector.detect_prepared(whole))
        return [next(found) if isinstance(one, Prepared) else one for one in ready]

    def detected_in_tiles(group: Sequence[Frame]) -> list[Detections | WorkbenchError]:
        images = [attempt(lambda one: decode_frame(read(one), one.name, (one.width, one.height)), one) for one in group]
        return [detect_tiles(detector, image, tiling, batch) if isinstance(image, np.ndarray) else image
                for image in images]

    work = detected if tiling is None else detected_in_tiles
    source = iter(frames)
    queue: deque[tuple[list[T], Future]] = deque()
    threads = threads or max(detector.streams, os.cpu_count() or 1)
    own: set[int] = set()
    pool = ThreadPoolExecutor(threads, "detect", initializer=lambda: own.add(threading.get_ident()))
    under_way = 0
    try:
        while True:
            while under_way < ahead + batch and (group := list(islice(source, batch))):
                queue.append(([key for key, _ in group], pool.submit(work, [frame for _, frame in group])))
                under_way += len(group)
            if not queue:
                return
            keys, future = queue.popleft()
            for key, found in zip(keys, future.result(), strict=True):
                under_way -= 1
                yield key, found
    finally:
        # Whoever forgets to close this may have it collected in one of its own threads, which cannot wait for itself.
        pool.shutdown(wait=threading.get_ident() not in own, cancel_futures=True)
