"""From stored image files to detections: decoding in threads, bounded memory, results in the order of the frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import cv2
import numpy as np

from workbench.boxes import Detections
from workbench.dataset import Frame
from workbench.errors import Invalid, WorkbenchError
from workbench.inference.detector import Detector, Prepared

T = TypeVar("T")


def decode_image(data: bytes, name: str) -> np.ndarray:
    """An image file's bytes -> (H, W, 3) uint8 RGB, upright (its EXIF orientation applied). Raises Invalid."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error as error:
        raise Invalid(f"{name} cannot be decoded as an image: {error.err}. Upload the file again.") from error
    if pixels is None:
        raise Invalid(f"{name} cannot be decoded as an image. Upload the file again.")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def detect_frames(
    detector: Detector,
    frames: Iterable[tuple[T, Frame]],
    read: Callable[[Frame], bytes],
    *,
    batch: int = 1,
    threads: int = 2,
    ahead: int = 8,
) -> Iterator[tuple[T, Detections | WorkbenchError]]:
    """Yields (what came with the frame, its detections) in the order of `frames`.

    read     gives a frame's image file, in a thread
    batch    images a run of the graph; with 1 a frame's result never depends on its neighbours (float sums differ in
             their last bits between batch sizes), so a repeated job writes the very same boxes
    ahead    how many images may be decoded or waiting beyond the batch: memory stays at about ahead + batch images

    A frame that cannot be read or decoded, or whose size is not the recorded one, yields its error instead.
    """
    def prepare(frame: Frame) -> Prepared:
        image = decode_image(read(frame), frame.name)
        if (image.shape[1], image.shape[0]) != (frame.width, frame.height):
            raise Invalid(f"{frame.name} is {image.shape[1]} x {image.shape[0]} px, its record says {frame.width} x "
                          f"{frame.height}. Upload the frame again.")
        return detector.prepare(image)

    def results(waiting: list[tuple[T, Future]]) -> Iterator[tuple[T, Detections | WorkbenchError]]:
        ready: list[tuple[T, Prepared | WorkbenchError]] = []
        for key, future in waiting:
            error = future.exception()
            if error is not None and not isinstance(error, WorkbenchError):
                raise error
            ready.append((key, future.result() if error is None else error))
        found = iter(detector.detect_prepared([one for _, one in ready if isinstance(one, Prepared)]))
        for key, one in ready:
            yield key, next(found) if isinstance(one, Prepared) else one

    source, queue = iter(frames), deque()
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode") as pool:
        try:
            while True:
                while len(queue) < ahead + batch and (item := next(source, None)) is not None:
                    queue.append((item[0], pool.submit(prepare, item[1])))
                if not queue:
                    return
                yield from results([queue.popleft() for _ in range(min(batch, len(queue)))])
        finally:
            for _, future in queue:
                future.cancel()
