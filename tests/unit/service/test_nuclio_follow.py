"""CVAT's tracker calls on our tracker: what is followed, what is lost, what two things do to one another."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from doubles import graphs

from workbench.boxes import Detections
from workbench.model import ModelCard
from workbench.service import follow

HIGH, SIZE = np.array([0.5, 0.5]), (640, 480)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return graphs.red_finder(tmp_path_factory.mktemp("card"))


def seen(*boxes: tuple[float, float, float, float], labels: list[int] | None = None, score: float = 0.9) -> Detections:
    return Detections(np.array(boxes).reshape(-1, 4), labels or [0] * len(boxes), [score] * len(boxes))


def step(card: ModelCard, found: Detections, shapes: Any = None, states: Any = None) -> tuple[list[list[float]], Any]:
    """A call and its answer, its states through JSON as CVAT signs them."""
    answer = follow.follow(follow.read(shapes, states, card), found, HIGH, SIZE)
    return [one["points"] for one in answer["shapes"]], json.loads(json.dumps(answer["states"], allow_nan=False))


def rectangle(*box: float) -> dict[str, Any]:
    return {"type": "rectangle", "points": list(box)}


def test_what_was_drawn_stays_as_it_was_drawn(card: ModelCard) -> None:
    (box,), _ = step(card, seen((98, 101, 152, 149)), [rectangle(100, 100, 150, 150)])
    assert box == [100, 100, 150, 150]


def test_a_thing_is_followed_to_where_the_model_sees_it(card: ModelCard) -> None:
    _, states = step(card, seen((100, 100, 150, 150)), [rectangle(100, 100, 150, 150)])
    for at in range(1, 20):
        there = (100 + 8 * at, 100 + 3 * at, 150 + 8 * at, 150 + 3 * at)
        (box,), states = step(card, seen(there, (400, 300, 450, 350)), [None], states)
        assert box == list(there)


def test_two_things_that_meet_keep_their_ways(card: ModelCard) -> None:
    one, other = (100.0, 100.0, 150.0, 150.0), (300.0, 110.0, 350.0, 160.0)
    _, states = step(card, seen(one, other), [rectangle(*one), rectangle(*other)])
    for at in range(1, 21):
        left, right = (
            [v + 10 * at * (i % 2 == 0) for i, v in enumerate(one)],
            [v - 10 * at * (i % 2 == 0) for i, v in enumerate(other)],
        )
        boxes, states = step(card, seen(tuple(right), tuple(left)), [None, None], states)
    assert boxes == [left, right] and left[0] > right[0]


def test_a_thing_of_another_label_is_no_match_unless_nobody_knows_the_label(card: ModelCard) -> None:
    drawn, near = rectangle(100, 100, 150, 150), (104, 104, 154, 154)
    _, known = step(card, seen((100, 100, 150, 150)), [drawn])
    (box,), _ = step(card, seen(near, labels=[1]), [None], known)
    assert box == [100, 100, 150, 150]
    _, unknown = step(card, seen(), [drawn])
    assert unknown[0]["class"] == follow.ANY
    (box,), _ = step(card, seen(near, labels=[1]), [None], unknown)
    assert box == list(near)


def test_a_thing_that_is_hidden_for_a_moment_is_found_again(card: ModelCard) -> None:
    _, states = step(card, seen((100, 100, 150, 150)), [rectangle(100, 100, 150, 150)])
    for at in range(1, 6):
        _, states = step(card, seen((100 + 10 * at, 100, 150 + 10 * at, 150)), [None], states)
    for _ in range(3):
        (guess,), states = step(card, seen(), [None], states)
    assert guess[0] > 165  # it goes on where it went, 10 px a frame
    (box,), _ = step(card, seen((190, 100, 240, 150)), [None], states)
    assert box == [190, 100, 240, 150]


def test_a_thing_that_does_not_come_back_stays_where_it_was_and_is_never_null(card: ModelCard) -> None:
    _, states = step(card, seen((100, 100, 150, 150)), [rectangle(100, 100, 150, 150)])
    for _ in range(40):
        (box,), states = step(card, seen(), [None], states)
    assert box == [100, 100, 150, 150] and states[0]["state"] == follow.ENDED
    (box,), _ = step(card, seen((100, 100, 150, 150)), [None], states)
    assert box == [100, 100, 150, 150]


def test_a_thing_that_leaves_the_frame_keeps_an_area(card: ModelCard) -> None:
    _, states = step(card, seen((560, 100, 610, 150)), [rectangle(560, 100, 610, 150)])
    for at in (1, 2):
        _, states = step(card, seen((560 + 25 * at, 100, 610 + 25 * at, 150)), [None], states)
    for _ in range(6):
        (box,), states = step(card, seen(), [None], states)
        assert box[2] - box[0] >= 1 and box[3] - box[1] >= 1 and box[2] <= 640


def test_low_scores_keep_a_track_alive(card: ModelCard) -> None:
    _, states = step(card, seen((100, 100, 150, 150)), [rectangle(100, 100, 150, 150)])
    (box,), _ = step(card, seen((103, 100, 153, 150), score=0.2), [None], states)
    assert box == [103, 100, 153, 150]


def test_a_new_shape_and_an_old_state_go_in_one_call(card: ModelCard) -> None:
    _, states = step(card, seen((100, 100, 150, 150)), [rectangle(100, 100, 150, 150)])
    boxes, states = step(card, seen((105, 100, 155, 150)), [None, rectangle(300, 300, 400, 400)], [states[0], None])
    assert boxes == [[105, 100, 155, 150], [300, 300, 400, 400]] and len(states) == 2


def test_states_of_hostile_size_give_finite_boxes_or_a_refusal(card: ModelCard) -> None:
    from workbench.errors import Invalid

    _, (good,) = step(card, seen((100, 100, 150, 150)), [rectangle(100, 100, 150, 150)])
    numbers = np.random.default_rng(7)
    for _ in range(300):
        bad = json.loads(json.dumps(good))
        for name in numbers.choice(list(follow.NUMBERS), 3):
            bad[name] = numbers.choice(
                [0, -1, 1e-12, 1e9, -1e9, 1e12, float("inf"), None, "x"], follow.NUMBERS[name]
            ).tolist()
            bad[name] = bad[name][0] if follow.NUMBERS[name] == 1 else bad[name]
        try:
            (box,), states = step(card, seen((100, 100, 150, 150)), [None], [bad])
        except Invalid:
            continue
        assert np.isfinite(box).all() and json.dumps(states, allow_nan=False)
