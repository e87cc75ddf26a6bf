"""The queue in front of a model: bounded, fair, gathered, and never with an image of somebody who has gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from workbench.boxes import Detections
from workbench.config import Config
from workbench.errors import Invalid, NotFound, Unavailable
from workbench.service.batching import Batcher
from workbench.service.metrics import Metrics
from workbench.service.refusals import Busy

WAIT_S = 20


class Counting:
    """A detector that finds in an image one box as wide as the image's value says, and notes its batches.

    It holds every run until `go` is set, and fails a batch with an image of value 0 in it.
    """

    def __init__(self, ref: str = "counting@1", streams: int = 1, is_dynamic: bool = True) -> None:
        self.card, self.report = SimpleNamespace(ref=ref), SimpleNamespace(backend="none")
        self.streams, self.batch_is_dynamic = streams, is_dynamic
        self.go, self.running, self.is_closed = threading.Event(), threading.Semaphore(0), False
        self.batches: list[list[int]] = []
        self.confidences: list[float | None] = []
        self.confidence: float | None = None

    def at(self, confidence: float) -> Counting:
        view = object.__new__(Counting)
        view.__dict__ = {**self.__dict__, "confidence": confidence}
        return view

    def detect_prepared(self, prepared: list[SimpleNamespace]) -> list[Detections]:
        values = [one.tensor for one in prepared]
        self.batches.append(values)
        self.confidences.append(self.confidence)
        self.running.release()
        assert self.go.wait(WAIT_S)
        if 0 in values:
            raise Invalid("A black image.")
        return [Detections([[0, 0, value, 1]], [0], [0.5]) for value in values]


def image(value: int) -> SimpleNamespace:
    return SimpleNamespace(tensor=value, letterbox=SimpleNamespace(image_size=(3, 2)))


@contextmanager
def batcher_of(tmp_path: Path, *detectors: Counting, **settings: object) -> Iterator[Batcher]:
    by_ref = {detector.card.ref: detector for detector in detectors}

    @contextmanager
    def open_model(ref: str) -> Iterator[tuple[Counting, int]]:
        if ref not in by_ref:
            raise NotFound(f"No {ref}.")
        yield by_ref[ref], 16
        by_ref[ref].is_closed = True

    how = {"queue": 8, "models": 2, "decoders": 2, "gather_s": 0.05, **settings}
    batcher = Batcher(open_model, Metrics(Config(home=tmp_path)), **how)
    try:
        yield batcher
    finally:
        for detector in detectors:
            detector.go.set()
        batcher.close(WAIT_S)


def submit(batcher: Batcher, values: list[int], **more: object) -> object:
    return batcher.submit(
        more.pop("ref", "counting@1"), len(values), lambda detector, index: image(values[index]), **more
    )


def widths(call: object) -> list[int]:
    return [int(one.found.xyxy[0, 2]) for one in call.future.result(WAIT_S)]


def until(is_so: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S / 0.01)):
        if is_so():
            return
        threading.Event().wait(0.01)
    raise AssertionError("It never came about.")


def test_images_of_several_callers_share_a_batch_and_each_gets_its_own(tmp_path: Path) -> None:
    detector = Counting()
    with batcher_of(tmp_path, detector) as batcher:
        first = submit(batcher, [1])
        assert detector.running.acquire(timeout=WAIT_S)  # the model is busy with the first
        others = [submit(batcher, values) for values in ([2, 3, 4], [5], [6, 7])]
        until(lambda: len(batcher._lanes["counting@1"].ready) == 6)
        detector.go.set()
        assert [widths(call) for call in (first, *others)] == [[1], [2, 3, 4], [5], [6, 7]]
        assert first.future.result()[0].size == (3, 2)
        # One of each caller in turn; who decodes first comes first.
        assert detector.batches[0] == [1] and sorted(detector.batches[1]) == [2, 3, 4, 5, 6, 7]
        assert 5 in detector.batches[1][:3]


def test_a_graph_of_a_fixed_batch_runs_one_by_one(tmp_path: Path) -> None:
    detector = Counting(is_dynamic=False)
    detector.go.set()
    with batcher_of(tmp_path, detector) as batcher:
        assert widths(submit(batcher, [1, 2, 3])) == [1, 2, 3]
        assert sorted(detector.batches) == [[1], [2], [3]]


def test_every_stream_of_the_backend_gets_its_share(tmp_path: Path) -> None:
    detector = Counting(streams=2)
    with batcher_of(tmp_path, detector) as batcher:
        call = submit(batcher, [1, 2, 3, 4])
        assert detector.running.acquire(timeout=WAIT_S) and detector.running.acquire(timeout=WAIT_S)
        detector.go.set()
        assert widths(call) == [1, 2, 3, 4]


def test_a_full_queue_refuses_whole_calls_and_says_when_to_come_back(tmp_path: Path) -> None:
    detector = Counting()
    with batcher_of(tmp_path, detector, queue=4) as batcher:
        first = submit(batcher, [1, 2, 3])
        with pytest.raises(Busy, match="3 of 4 places for images are taken and this request needs 2") as refused:
            submit(batcher, [4, 5])
        assert refused.value.code == 429 and int(refused.value.headers["Retry-After"]) >= 1
        second = submit(batcher, [6])
        detector.go.set()
        assert widths(first) == [1, 2, 3] and widths(second) == [6]
        until(lambda: batcher._free == 4)
        assert widths(submit(batcher, [1, 2, 3, 4])) == [1, 2, 3, 4]


def test_the_time_to_come_back_follows_the_measured_rate(tmp_path: Path) -> None:
    detector = Counting()
    with batcher_of(tmp_path, detector) as batcher:
        call = submit(batcher, [1, 2, 3, 4])
        assert batcher.retry_after_s() == 1  # nothing was measured yet
        batcher._measure("infer", 2.0)
        assert batcher.retry_after_s() >= 8
        batcher._measure("infer", 1000.0)
        assert batcher.retry_after_s() == 120
        detector.go.set()
        widths(call)


def test_an_image_that_brings_its_batch_down_takes_no_other_with_it(tmp_path: Path) -> None:
    detector = Counting()
    with batcher_of(tmp_path, detector) as batcher:
        submit(batcher, [9])
        assert detector.running.acquire(timeout=WAIT_S)
        calls = [submit(batcher, [1]), submit(batcher, [0, 2])]
        until(lambda: len(batcher._lanes["counting@1"].ready) == 3)
        detector.go.set()
        assert widths(calls[0]) == [1]
        bad, good = calls[1].future.result(WAIT_S)
        assert bad.found is None and "black image" in str(bad.error) and good.found.xyxy[0, 2] == 2


def test_an_image_that_cannot_be_decoded_is_that_image_s_error(tmp_path: Path) -> None:
    detector = Counting()
    detector.go.set()

    def prepare(detector: Counting, index: int) -> SimpleNamespace:
        if index == 1:
            raise Invalid("Image 1 is no image.")
        if index == 2:
            raise ZeroDivisionError
        return image(7)

    with batcher_of(tmp_path, detector) as batcher:
        seen = batcher.submit("counting@1", 3, prepare).future.result(WAIT_S)
        assert [type(one.error) for one in seen] == [type(None), Invalid, ZeroDivisionError] and seen[1].size is None
        assert widths(submit(batcher, [3])) == [3]  # its threads live


def test_a_caller_who_went_gives_its_places_back(tmp_path: Path) -> None:
    detector = Counting()
    with batcher_of(tmp_path, detector, queue=4) as batcher:
        running = submit(batcher, [1])
        assert detector.running.acquire(timeout=WAIT_S)
        gone = submit(batcher, [2, 3, 4])
        batcher.drop(gone)
        batcher.drop(gone)
        until(lambda: batcher._free == 3)
        detector.go.set()
        assert widths(running) == [1] and widths(submit(batcher, [5, 6, 7, 8])) == [5, 6, 7, 8]
        assert not {2, 3, 4} & {value for batch in detector.batches for value in batch}
        batcher.drop(running)
        until(lambda: batcher._free == 4)


def test_callers_with_another_confidence_do_not_share_a_batch(tmp_path: Path) -> None:
    detector = Counting()
    with batcher_of(tmp_path, detector) as batcher:
        submit(batcher, [9])
        assert detector.running.acquire(timeout=WAIT_S)
        calls = [submit(batcher, [1, 2]), submit(batcher, [3], confidence=0.7), submit(batcher, [4])]
        until(lambda: len(batcher._lanes["counting@1"].ready) == 4)
        detector.go.set()
        assert [widths(call) for call in calls] == [[1, 2], [3], [4]]
        asked = {
            value: confidence for batch, confidence in zip(detector.batches, detector.confidences) for value in batch
        }
        assert asked == {9: None, 1: None, 2: None, 3: 0.7, 4: None}


def test_the_model_not_used_for_longest_is_closed_for_the_next(tmp_path: Path) -> None:
    detectors = [Counting(f"counting@{number}") for number in (1, 2, 3)]
    for detector in detectors:
        detector.go.set()
    with batcher_of(tmp_path, *detectors) as batcher:
        for ref in ("counting@1", "counting@2", "counting@1", "counting@3"):
            assert widths(submit(batcher, [1], ref=ref)) == [1]
        until(lambda: detectors[1].is_closed)
        assert not detectors[0].is_closed and not detectors[2].is_closed


def test_a_model_more_than_may_be_open_waits_outside_while_the_others_work(tmp_path: Path) -> None:
    detectors = [Counting(f"counting@{number}") for number in (1, 2, 3)]
    with batcher_of(tmp_path, *detectors) as batcher:
        calls = [submit(batcher, [number], ref=f"counting@{number}") for number in (1, 2)]
        for detector in detectors[:2]:
            assert detector.running.acquire(timeout=WAIT_S)
        third = submit(batcher, [3], ref="counting@3")
        with pytest.raises(Busy, match="All 2 models that may be open are in use") as refused:
            third.future.result(WAIT_S)
        assert refused.value.code == 503 and detectors[2].is_closed
        for detector in detectors:
            detector.go.set()
        assert [widths(call) for call in calls] == [[1], [2]]
        assert widths(submit(batcher, [3], ref="counting@3")) == [3]


def test_a_model_that_cannot_be_opened_tells_all_who_wait_and_keeps_no_place(tmp_path: Path) -> None:
    with batcher_of(tmp_path) as batcher:
        for call in [submit(batcher, [1, 2], ref="absent@1"), submit(batcher, [3], ref="absent@1")]:
            with pytest.raises(NotFound, match="No absent@1"):
                call.future.result(WAIT_S)
        until(lambda: batcher._free == 8)


def test_closing_finishes_what_was_taken_and_takes_no_more(tmp_path: Path) -> None:
    detector = Counting()
    with batcher_of(tmp_path, detector) as batcher:
        call = submit(batcher, [1, 2])
        assert detector.running.acquire(timeout=WAIT_S)
        closing = threading.Thread(target=batcher.close, args=(WAIT_S,))
        closing.start()
        until(lambda: batcher._is_closed)
        with pytest.raises(Unavailable, match="is ending"):
            submit(batcher, [3])
        detector.go.set()
        closing.join(WAIT_S)
        assert not closing.is_alive() and widths(call) == [1, 2] and detector.is_closed
