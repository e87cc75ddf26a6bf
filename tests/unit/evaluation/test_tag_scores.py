"""Scores of tags: held to scikit-learn's, and to what is counted by hand."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from workbench.annotation import Annotation
from workbench.boxes import Detections
from workbench.errors import Invalid
from workbench.evaluation.primary import scored_from
from workbench.evaluation.tags import least_touched, score_tags, table
from workbench.taxonomy import Taxonomy

LABELS = Taxonomy(("cat", "dog", "cow"))


def tags(*labels: str) -> tuple[Annotation, ...]:
    return tuple(Annotation(label) for label in labels)


def scores(*values: float) -> Detections:
    """The confidence of every label."""
    return Detections(np.tile([0, 0, 8, 8], (len(values), 1)), np.arange(len(values)), np.array(values))


def random_frames(seed: int, is_exclusive: bool) -> tuple[dict, dict, np.ndarray, np.ndarray]:
    """(truth, found, (n, 3) wanted, (n, 3) confidences rounded so that some are equal)."""
    dice = np.random.default_rng(seed)
    count = int(dice.integers(2, 40))
    wanted = np.eye(3, dtype=bool)[dice.integers(0, 3, count)] if is_exclusive else dice.random((count, 3)) < 0.4
    values = np.clip(dice.random((count, 3)).round(1) * 0.8 + 0.2 * wanted, 0.01, 1).astype(np.float32)
    names = [f"{index:03d}" for index in range(count)]
    truth = {name: tags(*(label for label, there in zip(LABELS.labels, row) if there)) for name, row in zip(names, wanted)}
    return truth, {name: scores(*row) for name, row in zip(names, values)}, wanted, values


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 100_000), st.booleans())
def test_scores_are_those_of_scikit_learn(seed: int, is_exclusive: bool) -> None:
    truth, found, wanted, values = random_frames(seed, is_exclusive)
    if not wanted.any():
        with pytest.raises(Invalid, match="None of the .* frames has a tag"):
            score_tags(truth, found, LABELS, 0.5, is_exclusive)
        return
    made = score_tags(truth, found, LABELS, 0.5, is_exclusive)
    there = [index for index in range(3) if wanted[:, index].any()]
    given_tags = np.eye(3, dtype=bool)[values.argmax(axis=1)] if is_exclusive else values >= np.float32(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels that nothing predicts: 0, as ours
        f1 = sklearn.f1_score(wanted, given_tags, average=None, zero_division=0)
        ap = [sklearn.average_precision_score(wanted[:, index], values[:, index]) for index in there]
        precision = sklearn.precision_score(wanted, given_tags, average=None, zero_division=0)
        recall = sklearn.recall_score(wanted, given_tags, average=None, zero_division=0)
    assert made.macro_f1 == pytest.approx(f1[there].mean())
    assert made.map == pytest.approx(np.mean(ap))
    for index in there:
        row = made.per_class[LABELS.labels[index]]
        assert (row["f1"], row["precision"], row["recall"]) == pytest.approx((f1[index], precision[index], recall[index]))
    if is_exclusive:
        chosen = values.argmax(axis=1)
        assert made.accuracy == pytest.approx(sklearn.accuracy_score(wanted.argmax(axis=1), chosen))
        expected = sklearn.confusion_matrix(wanted.argmax(axis=1), chosen, labels=[0, 1, 2])
        assert (np.array(made.confusion)[:3, :3] == expected).all() and np.array(made.confusion)[3].sum() == 0
    else:
        # One table of two by two a label, whatever was confused with what.
        expected = sklearn.multilabel_confusion_matrix(wanted, given_tags)
        whole = np.array(made.confusion)
        assert (np.diag(whole)[:3] == expected[:, 1, 1]).all()
        assert (whole[:3].sum(axis=1) == wanted.sum(axis=0)).all() and (whole[:, :3].sum(axis=0) == given_tags.sum(axis=0)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.booleans())
def test_a_frame_that_is_there_twice_counts_as_two_frames(seed: int, is_exclusive: bool) -> None:
    truth, found, wanted, values = random_frames(seed, is_exclusive)
    weights = np.random.default_rng(seed).integers(0, 3, len(truth))
    one = table(truth, found, LABELS, 0.5, is_exclusive)
    names = sorted(truth)
    many_truth, many_found = {}, {}
    for name, count in zip(names, weights):
        for copy in range(count):
            many_truth[f"{name}-{copy}"], many_found[f"{name}-{copy}"] = truth[name], found[name]
    other, every = table(many_truth, many_found, LABELS, 0.5, is_exclusive), np.ones(len(many_truth))
    for figure in ("accuracies", "f1", "average_precision"):
        if many_truth:
            np.testing.assert_allclose(getattr(one, figure)(weights), getattr(other, figure)(every), atol=1e-9)
    if wanted[weights > 0].any():
        assert one.accuracy(weights) == pytest.approx(other.accuracy(every))


def test_the_surest_label_decides_and_a_frame_without_tags_has_none_to_hit() -> None:
    truth = {"a": tags("cat"), "b": tags("dog", "cow"), "c": ()}
    found = {"a": scores(0.2, 0.1, 0.15), "b": scores(0.5, 0.1, 0.4)}
    made = score_tags(truth, found, LABELS, 0.3, True)
    # a is right although no confidence reaches 0.3; of b the surest is cat; c has nothing to be right about.
    assert made.accuracy == 0.5 and (made.truth, made.detections, made.frames) == (3, 2, 3)
    several = score_tags(truth, found, LABELS, 0.3, False)
    assert several.detections == 2 and several.per_class["cow"]["recall"] == 1 and several.per_class["cat"]["recall"] == 0
    # a: cat missed. b: cow set, dog missed, cat spurious: one confusion.
    assert several.confusion == ((0, 0, 0, 1), (1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 0))


def test_boxes_are_no_tags_and_labels_outside_the_truth_have_no_row() -> None:
    truth = {"a": (*tags("cat"), Annotation("dog", (1, 1, 5, 5)))}
    made = score_tags(truth, {"a": scores(0.9, 0.05, 0.05)}, LABELS)
    assert set(made.per_class) == {"cat"} and made.macro_f1 == made.map == made.accuracy == 1
    with pytest.raises(Invalid, match="None of the 1 frames has a tag"):
        score_tags({"a": (Annotation("dog", (1, 1, 5, 5)),)}, {}, LABELS)


def test_scores_are_json_and_come_back() -> None:
    made = score_tags({"a": tags("cat"), "b": tags("dog")}, {"a": scores(0.9, 0, 0), "b": scores(0.5, 0.4, 0)}, LABELS)
    again = scored_from(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert again == made and again.by_label("accuracy") == {"cat": 1, "dog": 0}
    assert set(made.values) == {"accuracy", "macro_f1", "map"}
    curve = made.curves["dog"]["precision"]
    assert len(curve) == 101 and set(curve) == {1.0}


def test_the_confidence_to_propose_from_is_the_one_that_leaves_the_fewest_touches() -> None:
    truth = {f"{index}": tags("cat") for index in range(8)} | {f"x{index}": () for index in range(8)}
    found = {f"{index}": scores(0.8, 0, 0) for index in range(8)} | {f"x{index}": scores(0.42, 0, 0) for index in range(8)}
    confidence, touched = least_touched(table(truth, found, LABELS, 0.0, False))
    # Above 0.42 nothing spurious is left and up to 0.8 nothing is missed.
    assert 0.42 < confidence <= 0.8 and touched == 0
    wrong = {name: scores(0, 0.9, 0) for name in truth}
    confidence, touched = least_touched(table(truth, wrong, LABELS, 0.0, False))
    # Below 0.9 the eight tagged frames are one change each and the eight others one removal; above, eight are set anew.
    assert confidence > 0.9 and touched == 8
