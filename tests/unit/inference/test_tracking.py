import numpy as np
import pytest

from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.inference.tracking import Tracker

SIDE = 40.0


def boxes(*rows: tuple) -> Detections:
    """(cx, cy, score, class_id) each, of SIDE x SIDE px."""
    if not rows:
        return Detections.empty()
    at = np.array([row[:2] for row in rows], float)
    return Detections(np.concatenate([at - SIDE / 2, at + SIDE / 2], axis=1), [row[3] if len(row) > 3 else 0 for row in rows],
                      [row[2] if len(row) > 2 else 0.9 for row in rows])


def ids(tracker: Tracker, found: Detections, time: float) -> list[int]:
    """Track ids in the order of the boxes they were matched with; 0 where a box has no track."""
    tracks = tracker.update(found, time)
    centre = {tuple(np.round(xyxy, 2)): int(one) for one, xyxy in zip(tracks.id, tracks.xyxy)}
    return [centre.get(tuple(np.round(xyxy.astype(float), 2)), 0) for xyxy in found.xyxy]


def test_one_object_keeps_its_id_and_its_age() -> None:
    tracker = Tracker(0.5)
    for step in range(30):
        assert ids(tracker, boxes((100 + 4 * step, 100)), step / 25) == [1]
    tracks = tracker.update(boxes((220, 100)), 30 / 25)
    assert tracks.hits.tolist() == [31] and tracks.since.tolist() == [0.0]


def test_two_that_cross_keep_their_ids() -> None:
    tracker = Tracker(0.5)
    for step in range(41):
        # They meet at x = 300 in step 20, 12 px apart in y, each going on its own way.
        found = ids(tracker, boxes((200 + 5 * step, 200), (400 - 5 * step, 212)), step / 25)
        assert found == [1, 2]


def test_two_that_meet_and_hide_each_other_for_a_while_keep_their_ids() -> None:
    tracker = Tracker(0.5)
    for step in range(61):
        one, other = (100 + 5 * step, 200), (400 - 5 * step, 206)
        hidden = abs(one[0] - other[0]) < 30
        found = ids(tracker, boxes(one) if hidden else boxes(one, other), step / 25)
        assert found == ([1] if hidden else [1, 2]), step


def test_an_object_behind_a_pillar_comes_back_under_its_id() -> None:
    tracker = Tracker(0.5)
    for step in range(60):
        is_hidden = 25 <= step < 40
        found = ids(tracker, boxes() if is_hidden else boxes((50 + 6 * step, 100)), step / 25)
        assert found == ([] if is_hidden else [1])


def test_one_that_is_gone_for_longer_than_the_buffer_is_new() -> None:
    tracker = Tracker(0.5, lost_s=1.0)
    tracker.update(boxes((100, 100)), 0.0)
    tracker.update(boxes((100, 100)), 0.1)
    tracker.update(boxes(), 0.2)
    assert ids(tracker, boxes((100, 100)), 1.3) == [0]
    assert len(tracker.alive()) == 1
    assert ids(tracker, boxes((100, 100)), 1.4) == [2]


def test_a_low_score_keeps_a_track_but_never_begins_one() -> None:
    tracker = Tracker(0.5)
    assert ids(tracker, boxes((100, 100, 0.9), (300, 100, 0.3)), 0.0) == [1, 0]
    for step in range(1, 20):
        assert ids(tracker, boxes((100 + 3 * step, 100, 0.2), (300, 100, 0.3)), step / 25) == [1, 0]


def test_a_track_that_is_lost_is_not_brought_back_by_a_low_score() -> None:
    tracker = Tracker(0.5)
    tracker.update(boxes((100, 100)), 0.0)
    tracker.update(boxes(), 0.04)
    assert ids(tracker, boxes((100, 100, 0.2)), 0.08) == [0]
    assert ids(tracker, boxes((100, 100, 0.8)), 0.12) == [1]


def test_one_frame_alone_is_no_track() -> None:
    tracker = Tracker(0.5)
    tracker.update(boxes(), 0.0)
    assert ids(tracker, boxes((100, 100)), 0.1) == [0]
    assert ids(tracker, boxes(), 0.2) == [] and len(tracker.alive()) == 0
    assert ids(tracker, boxes((100, 100)), 0.3) == [0]
    assert ids(tracker, boxes((101, 100)), 0.4) == [2]


def test_a_box_of_another_class_is_another_object() -> None:
    tracker = Tracker(np.array([0.5, 0.5]))
    tracker.update(boxes((100, 100, 0.9, 0)), 0.0)
    assert ids(tracker, boxes((100, 100, 0.9, 1)), 0.1) == [0]
    assert ids(tracker, boxes((100, 100, 0.9, 1), (102, 100, 0.9, 0)), 0.2) == [2, 1]


def test_each_class_has_its_own_score() -> None:
    tracker = Tracker(np.array([0.8, 0.2]))
    assert ids(tracker, boxes((100, 100, 0.5, 0), (300, 100, 0.5, 1)), 0.0) == [0, 1]


@pytest.mark.parametrize("steps", [[0.04] * 40, [0.2] * 40, [0.02, 0.3, 0.05, 0.4, 0.1] * 8])
def test_a_steady_object_keeps_its_id_at_any_frame_rate(steps: list[float]) -> None:
    tracker, time = Tracker(0.5), 0.0
    for step in steps:
        # 120 px a second: at 0.4 s a frame it jumps by more than its own 40 px.
        assert ids(tracker, boxes((50 + 120 * time, 100)), time) == [1]
        time += step


def test_the_prediction_goes_by_seconds_not_by_frames() -> None:
    tracker = Tracker(0.5)
    for step in range(20):
        tracker.update(boxes((100 + 100 * step / 10, 100)), step / 10)
    # At x = 290 with 100 px/s, 0.8 s later: 370, two widths away; only the velocity leads there.
    assert ids(tracker, boxes((370, 100)), 1.9 + 0.8) == [1]


def test_a_camera_that_shows_another_scene_starts_anew() -> None:
    tracker = Tracker(0.5)
    tracker.update(boxes((100, 100)), 0.0)
    tracker.forget()
    assert len(tracker.alive()) == 0
    assert ids(tracker, boxes((100, 100)), 0.1) == [2]


def test_a_clock_that_jumps_back_loses_no_track_and_forward_ends_them() -> None:
    tracker = Tracker(0.5)
    for step in range(5):
        tracker.update(boxes((100, 100)), 1000 + step / 10)
    assert ids(tracker, boxes((100, 100)), 10.0) == [1]
    tracks = tracker.update(boxes((100, 100)), 10.1)
    assert tracks.id.tolist() == [1] and tracks.since[0] == pytest.approx(9.6)
    assert ids(tracker, boxes(), 5000.0) == []
    assert len(tracker.alive()) == 0


@pytest.mark.parametrize("time", [float("nan"), float("inf")])
def test_a_time_that_is_no_number_is_refused(time: float) -> None:
    with pytest.raises(Invalid, match="seconds"):
        Tracker(0.5).update(boxes(), time)


def test_a_crowd_keeps_its_ids_through_noise() -> None:
    rng, tracker = np.random.default_rng(0), Tracker(0.5)
    start = np.stack(np.meshgrid(np.arange(6) * 90 + 60, np.arange(5) * 80 + 60), axis=-1).reshape(-1, 2)
    way = rng.uniform(-25, 25, start.shape)
    expected = list(range(1, 31))
    for step in range(50):
        at = start + way * step / 25 + rng.normal(0, 1.5, start.shape)
        found = ids(tracker, boxes(*((x, y, rng.uniform(0.55, 0.95)) for x, y in at)), step / 25)
        assert found == expected
