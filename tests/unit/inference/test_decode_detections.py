"""The decoder "detections": boxes that a graph decoded itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from workbench.errors import Invalid
from workbench.inference.decode import decode
from workbench.model import InputSpec, ModelCard
from workbench.taxonomy import Taxonomy

LEAST = np.full(2, 0.25, np.float32)


def card(**decoder: Any) -> ModelCard:
    return ModelCard("m", "1", InputSpec((96, 64)), {"name": "detections", **decoder}, Taxonomy(("cat", "dog")),
                     {"m.onnx": {"sha256": "0"}})


def outputs(labels: list[float], scores: list[float], kind: Any = np.float32) -> dict[str, np.ndarray]:
    """Boxes whose left side is their number."""
    count = len(labels)
    boxes = np.array([[at, 2, at + 20, 30] for at in range(count)], np.float32).reshape(1, count, 4)
    return {"boxes": boxes, "scores": np.array([scores], np.float32).reshape(1, count),
            "labels": np.array([labels], kind).reshape(1, count)}


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_boxes_above_the_confidence_come_out_with_their_labels_best_first(kind):
    (found,) = decode(card(), outputs([1, 0, 1, 0], [0.3, 0.9, 0.2, 0.5], kind), LEAST)
    assert found.xyxy[:, 0].tolist() == [1, 3, 0] and found.class_id.tolist() == [0, 0, 1]
    np.testing.assert_allclose(found.confidence, [0.9, 0.5, 0.3])


def test_each_label_has_its_own_least_confidence():
    (found,) = decode(card(), outputs([0, 1], [0.5, 0.5]), np.array([0.6, 0.4], np.float32))
    assert found.class_id.tolist() == [1]


def test_rows_of_padding_with_a_score_of_zero_may_hold_any_label():
    (found,) = decode(card(), outputs([0, -1, 77], [0.8, 0, 0]), np.zeros(2, np.float32))
    assert found.class_id.tolist() == [0]
    (nothing,) = decode(card(), outputs([-1, -1], [0, 0]), LEAST)
    assert len(nothing.class_id) == 0
    (none_at_all,) = decode(card(), outputs([], []), LEAST)
    assert len(none_at_all.class_id) == 0


@pytest.mark.parametrize(("labels", "scores", "said"), [
    ([2], [0.8], "its labels reach from 2 to 2, the card has 2 labels"), ([0.5], [0.8], "expects whole numbers from 0"),
    ([-1], [0.8], "labels reach from -1")])
def test_labels_that_the_card_does_not_have_are_refused(labels, scores, said):
    with pytest.raises(Invalid, match=said):
        decode(card(), outputs(labels, scores), LEAST)


def test_outputs_of_another_shape_or_name_are_refused():
    good = outputs([0, 1], [0.5, 0.5])
    for wrong in ({**good, "scores": good["scores"][0]}, {**good, "boxes": good["boxes"][..., :3]},
                  {**good, "labels": good["labels"][:, :1]}, {"boxes": good["boxes"], "scores": good["scores"]}):
        with pytest.raises(Invalid, match="m.onnx of m@1"):
            decode(card(), wrong, LEAST)


def test_the_card_names_the_outputs():
    good = outputs([1], [0.5])
    named = {"b": good["boxes"], "s": good["scores"], "l": good["labels"]}
    (found,) = decode(card(outputs={"box": "b", "score": "s", "label": "l"}), named, LEAST)
    assert found.class_id.tolist() == [1]
