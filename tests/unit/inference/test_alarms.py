from collections.abc import Callable

import numpy as np
import pytest

from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.inference.alarms import Event, Scene
from workbench.inference.cameras import Camera
from workbench.inference.motion import Motion
from workbench.inference.zones import Zone
from workbench.taxonomy import Taxonomy

LABELS = Taxonomy(("person", "car"))
WIDTH, HEIGHT = 640, 360
RNG = np.random.default_rng(0)
# Blobs of 40 px, so that a shift shows everywhere.
BACKGROUND = np.kron(RNG.integers(60, 180, (HEIGHT // 40 + 1, WIDTH // 40 + 1, 1)), np.ones((40, 40, 3))).astype(np.uint8)
Box = tuple[float, float, float, float]


def picture(*drawn: Box, shift: tuple[int, int] = (0, 0), light: int = 0) -> np.ndarray:
    """The background with dark bodies at the given boxes, moved and lit."""
    image = BACKGROUND[:HEIGHT, :WIDTH].astype(int)
    for x1, y1, x2, y2 in drawn:
        image[max(0, int(y1)):max(0, int(y2)), max(0, int(x1)):max(0, int(x2))] = 15
    image = np.roll(image, shift[::-1], axis=(0, 1)) + light + RNG.integers(0, 6, (HEIGHT, WIDTH, 1))
    return np.clip(image, 0, 255).astype(np.uint8)


def found(*rows: Box, score: float = 0.9, class_id: int = 0) -> Detections:
    count = len(rows)
    return Detections(np.array(rows, float).reshape(-1, 4), [class_id] * count, [score] * count)


def walker(t: float, speed: float = 60, x: float = 50, y: float = 100) -> Box:
    return x + speed * t, y, x + speed * t + 40, y + 100


POSTER: Box = (400.0, 150.0, 440.0, 250.0)


def run(scene: Scene, frame: Callable[[float], tuple[np.ndarray, Detections]], seconds: float = 6, fps: float = 5,
        begin: float = 0.0) -> list[Event]:
    events = []
    for step in range(int(seconds * fps)):
        t = begin + step / fps
        events += scene.update(*frame(t), t, t)
    return events


def scene(**camera: object) -> Scene:
    return Scene(Camera("gate", "gate.mp4", **camera), LABELS, 0.5)


def test_a_walker_is_told_once_and_a_poster_never() -> None:
    one = scene()
    events = run(one, lambda t: (picture(POSTER, walker(t)), found(POSTER, walker(t))))
    assert [(event.kind, event.label) for event in events] == [("object", "person")]
    assert events[0].xyxy == pytest.approx(walker(events[0].time), abs=1e-3)
    assert 1.0 <= events[0].time <= 1.5


def test_without_the_filter_both_are_told() -> None:
    plain = Scene(Camera("gate", "gate.mp4"), LABELS, 0.5, filters=False)
    assert len(run(plain, lambda t: (picture(POSTER, walker(t)), found(POSTER, walker(t))))) == 2


def test_a_poster_is_told_when_still_objects_are_wanted() -> None:
    events = run(scene(keep_still=True), lambda t: (picture(POSTER), found(POSTER)))
    assert len(events) == 1


def test_a_poster_stays_silent_while_somebody_walks_past_it() -> None:
    def frame(t: float) -> tuple[np.ndarray, Detections]:
        person = walker(t, x=100, y=160)
        return picture(POSTER, person), found(POSTER, person)
    events = run(scene(), frame, seconds=8)
    assert [event.track for event in events] == [2], "the walker is the second box of the first frame"


def test_a_poster_stays_silent_on_a_shaking_camera_and_the_walker_is_still_told() -> None:
    def frame(t: float) -> tuple[np.ndarray, Detections]:
        dx, dy = round(6 * np.sin(9 * t)), round(4 * np.sin(7 * t + 1))
        at = [tuple(np.add(box, (dx, dy, dx, dy))) for box in (POSTER, walker(t))]
        return picture(POSTER, walker(t), shift=(dx, dy)), found(*at)
    events = run(scene(), frame, seconds=8)
    assert [event.track for event in events] == [2]


def test_a_poster_stays_silent_when_the_light_changes() -> None:
    events = run(scene(), lambda t: (picture(POSTER, light=int(25 * np.sin(t))), found(POSTER)), seconds=10)
    assert events == []


def test_one_who_stops_after_walking_in_was_told() -> None:
    events = run(scene(), lambda t: (picture(walker(min(t, 2))), found(walker(min(t, 2)))))
    assert len(events) == 1


def test_a_ghost_of_half_a_second_is_not_told() -> None:
    ghost = (200.0, 100.0, 240.0, 200.0)

    def frame(t: float) -> tuple[np.ndarray, Detections]:
        is_there = 2.0 <= t < 2.7
        return picture(*([ghost] if is_there else [])), found(*([ghost] if is_there else []))
    one = scene()
    assert run(one, frame, seconds=12) == []
    assert one.refused == {"still": 1} or one.refused == {"short": 1}


def test_the_least_time_of_a_track_is_the_camera_s() -> None:
    events = run(scene(min_persistence_s=3.0), lambda t: (picture(walker(t)), found(walker(t))))
    assert len(events) == 1 and 3.0 <= events[0].time <= 3.4


@pytest.mark.parametrize("size", [(0.1, 1.0), (0.0, 0.005)])
def test_a_box_of_an_implausible_area_is_not_told(size: tuple[float, float]) -> None:
    # 40 x 100 px of 640 x 360 are 0.0174 of the frame.
    assert run(scene(size=size), lambda t: (picture(walker(t)), found(walker(t)))) == []
    assert len(run(scene(size=(0.01, 0.02)), lambda t: (picture(walker(t)), found(walker(t))))) == 1


def test_a_plausible_height_goes_by_the_row_of_the_foot() -> None:
    # The foot is at row 200 / 360 = 0.556, the height is 100 / 360 = 0.278; limits there: 0.111 to 0.333 below, 0.0556 to
    # 0.1667 in the second.
    near, far = ((0.0, 0.0, 0.1), (1.0, 0.2, 0.52)), ((0.0, 0.0, 0.1), (1.0, 0.1, 0.22))
    assert len(run(scene(rows=near), lambda t: (picture(walker(t)), found(walker(t))))) == 1
    assert run(scene(rows=far), lambda t: (picture(walker(t)), found(walker(t)))) == []


def test_labels_that_nobody_watches_for_are_silent() -> None:
    frame = lambda t: (picture(walker(t)), found(walker(t), class_id=1))  # noqa: E731
    assert run(scene(labels=("person",)), frame) == []
    assert len(run(scene(labels=("car",)), frame)) == 1
    with pytest.raises(Invalid, match="lorry"):
        scene(labels=("lorry",))


LEFT, RIGHT = ((0, 0), (0.5, 0), (0.5, 1), (0, 1)), ((0.5, 0), (1, 0), (1, 1), (0.5, 1))


def test_include_and_ignore_zones_go_by_the_foot_point() -> None:
    frame = lambda t: (picture(walker(t)), found(walker(t)))  # noqa: E731
    # The foot is at x = 70 + 60 t: it crosses the middle (320) at 4.17 s.
    for zones in ((Zone("right", RIGHT, "include"),), (Zone("left", LEFT, "ignore"),)):
        events = run(scene(zones=zones), frame, seconds=6)
        assert len(events) == 1 and 4.1 < events[0].time < 4.5
    assert run(scene(zones=(Zone("left", LEFT, "ignore"), Zone("right", RIGHT, "ignore"))), frame) == []
    assert len(run(scene(zones=(Zone("left", LEFT, "ignore", labels=("car",)),)), frame)) == 1


def test_an_intrusion_is_told_once_a_zone_after_its_dwell_time() -> None:
    zones = (Zone("yard", RIGHT, dwell_s=0.0), Zone("door", RIGHT, dwell_s=1.0), Zone("never", RIGHT, dwell_s=60))
    events = run(scene(zones=zones), lambda t: (picture(walker(t)), found(walker(t))), seconds=8)
    told = {event.zone: event.time for event in events if event.kind == "intrusion"}
    assert sorted(told) == ["door", "yard"] and len(events) == 3
    assert 4.1 < told["yard"] < 4.5 and told["door"] == pytest.approx(told["yard"] + 1.0, abs=0.01)


def test_one_who_trembles_on_the_border_intrudes_once_and_the_dwell_time_goes_on() -> None:
    # From 3 s on it stands with its foot at x = 320 +- 2 px: 0.003 of the frame, within the margin of 0.01.
    def frame(t: float) -> tuple[np.ndarray, Detections]:
        x = min(50 + 90 * t, 310) + (2 if t > 3 and int(t * 5) % 2 else -2 if t > 3 else 0)
        box = (x, 100.0, x + 40, 200.0)
        return picture(box), found(box)
    events = run(scene(zones=(Zone("yard", RIGHT, dwell_s=1.0, margin=0.01),)), frame, seconds=10)
    told = [event for event in events if event.kind == "intrusion"]
    assert len(told) == 1 and told[0].time == pytest.approx(2.8 + 1.0, abs=0.5)


def test_one_who_only_touches_the_border_does_not_intrude() -> None:
    def frame(t: float) -> tuple[np.ndarray, Detections]:
        x = min(50 + 90 * t, 301)
        return picture((x, 100, x + 40, 200)), found((x, 100, x + 40, 200))  # the foot ends at x = 321, 0.0016 inside
    events = run(scene(zones=(Zone("yard", RIGHT, margin=0.01),)), frame, seconds=8)
    assert [event.kind for event in events] == ["object"]


def test_a_switch_to_another_scene_ends_all_tracks() -> None:
    def frame(t: float) -> tuple[np.ndarray, Detections]:
        image, (x1, y1, x2, y2) = picture(walker(t)), map(int, walker(t))
        if t >= 3:
            image = 255 - picture()[:, ::-1]
            image[y1:y2, x1:x2] = 15
        return image, found(walker(t))
    one = scene()
    events = run(one, frame)
    assert len(events) == 2 and events[0].time < 3 < events[1].time
    assert events[0].track != events[1].track


def test_a_camera_that_changes_its_resolution_goes_on_with_new_tracks() -> None:
    def frame(t: float) -> tuple[np.ndarray, Detections]:
        if t < 3:
            return picture(walker(t)), found(walker(t))
        return picture(walker(t))[::2, ::2], found(tuple(value / 2 for value in walker(t)))
    events = run(scene(zones=(Zone("yard", RIGHT),)), frame)
    assert [event.size for event in events if event.kind == "object"] == [(640, 360), (320, 180)]
    assert [event.size for event in events if event.kind == "intrusion"] == [(320, 180)]


@pytest.mark.parametrize("time", [float("nan"), float("inf")])
def test_a_frame_without_a_time_is_refused(time: float) -> None:
    for times in ((time, 1.0), (1.0, time)):
        with pytest.raises(Invalid, match="seconds"):
            scene().update(picture(), found(), *times)


def test_a_jump_of_the_wall_clock_changes_nothing_but_the_time_told() -> None:
    one, events = scene(), []
    for step in range(20):
        t = step / 5
        wall = 1e9 + t - (500_000 if t > 0.6 else 0)
        events += one.update(picture(walker(t)), found(walker(t)), wall, t)
    assert len(events) == 1 and events[0].time < 1e9 - 400_000


def test_an_event_is_json_with_all_a_reader_needs() -> None:
    event = Event("intrusion", "gate", 12.3456, 7, "person", (1.234, 2, 3, 4), 0.87654, (640, 360), "yard")
    assert event.to_json() == {
        "kind": "intrusion", "camera": "gate", "time_ms": 12346, "track": 7, "label": "person", "confidence": 0.8765,
        "xyxy": [1.23, 2, 3, 4], "zone": "yard", "width": 640, "height": 360}


def test_motion_finds_what_moved_and_by_how_much_the_camera_shook() -> None:
    motion = Motion()
    for step in range(10):
        motion.update(picture(), step / 5)
    motion.update(picture((100, 100, 200, 200), shift=(8, 4)), 2.0)
    # 8 px and 4 px of the frame; a cell is 5.7 px wide, and a third of one is what can be told.
    assert motion.shift_px == pytest.approx([8, 4], abs=1.9)
    share = motion.share([(108, 104, 208, 204), (400, 100, 500, 200)])
    assert share[0] > 0.9 and share[1] < 0.05


def test_motion_that_others_explain_does_not_count() -> None:
    motion = Motion()
    for step in range(5):
        motion.update(picture(), step / 5)
    motion.update(picture((100, 100, 140, 200)), 1.0)
    box, other = [(100, 100, 180, 200)], [(100, 100, 140, 200)]
    # Half of the box moved, and all of that half is the other's.
    assert motion.share(box)[0] == pytest.approx(0.5, abs=0.1)
    assert motion.share(box, other)[0] < 0.05


def test_motion_learns_a_flickering_lamp() -> None:
    motion, lamp = Motion(), [(200, 100, 260, 160)]
    shares = []
    for step in range(60):
        image = picture()
        image[100:160, 200:260] = np.clip(image[100:160, 200:260].astype(int) + 60 * (step % 2), 0, 255)
        motion.update(image, step / 5)
        shares.append(float(motion.share(lamp)[0]))
    assert max(shares[1:3]) > 0.5 and max(shares[10:]) < 0.08


def test_motion_takes_frames_of_any_shape() -> None:
    for shape in ((1, 1, 3), (3, 2000, 3), (700, 20, 3)):
        motion = Motion()
        for step in range(3):
            motion.update(np.zeros(shape, np.uint8), step)
        assert motion.share([(0, 0, shape[1], shape[0]), (-5, -5, -1, -1)]) == [0, 0]
