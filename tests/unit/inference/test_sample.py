"""A card's own sample: registered only when the model finds on it what its card says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from doubles import graphs

from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.errors import Invalid, NotFound
from workbench.inference.detector import check_card
from workbench.inference.graph import file_record
from workbench.model import ModelCard


def check(card: ModelCard, folder: Path) -> dict[str, Any]:
    return check_card(card, folder, lambda path: OnnxRuntime(path, threads=1))


def with_sample(card: ModelCard, folder: Path, expect: list[dict[str, Any]]) -> ModelCard:
    """A 128 x 64 picture with a red square at (16, 16, 32, 32)."""
    image = np.zeros((64, 128, 3), np.uint8)
    image[16:32, 16:32] = (255, 0, 0)
    cv2.imwrite(str(folder / "sample.png"), image[:, :, ::-1])
    return replace(
        card,
        files={**card.files, "sample.png": file_record(folder / "sample.png")},
        sample={"file": "sample.png", "expect": expect},
    )


def test_a_model_that_finds_its_sample_passes(tmp_path: Path) -> None:
    # The canvas halves the picture; the finder draws two cells (16 px there) around a cell's middle at (12, 12).
    card = with_sample(
        graphs.red_finder(tmp_path), tmp_path, [{"label": "red", "xyxy": [8, 8, 40, 40]}, {"label": "red"}]
    )
    assert check(card, tmp_path)["precision"] == "f32"
    assert ModelCard.from_json(card.to_json()) == card


@pytest.mark.parametrize(
    "expect", [{"label": "blue"}, {"label": "red", "xyxy": [60, 10, 90, 40]}, {"label": "blue", "xyxy": [8, 8, 40, 40]}]
)
def test_a_model_that_does_not_is_told_what_was_found(tmp_path: Path, expect: dict[str, Any]) -> None:
    card = with_sample(graphs.red_finder(tmp_path), tmp_path, [expect])
    with pytest.raises(
        Invalid, match=rf"does not find {expect['label']}.*sample.png; it finds red 1.00 at \[8, 8, 40, 40\]"
    ):
        check(card, tmp_path)


def test_labels_in_the_wrong_order_and_colours_the_wrong_way_round_show_on_the_sample(tmp_path: Path) -> None:
    card = graphs.red_finder(tmp_path)
    turned = replace(card, input=replace(card.input, colour="BGR"))
    for wrong in (graphs.red_finder(tmp_path, labels=("blue", "red")), turned):
        with pytest.raises(Invalid, match="does not find red"):
            check(with_sample(wrong, tmp_path, [{"label": "red"}]), tmp_path)


def test_polygons_and_tags_are_checked_too(tmp_path: Path) -> None:
    masks, tags = tmp_path / "masks", tmp_path / "tags"
    assert check(with_sample(graphs.red_masks(masks), masks, [{"label": "red", "xyxy": [16, 16, 32, 32]}]), masks)
    # Of a tag only the label counts.
    assert check(with_sample(graphs.red_tags(tags), tags, [{"label": "red", "xyxy": [0, 0, 1, 1]}]), tags)
    with pytest.raises(Invalid, match="does not find blue"):
        check(with_sample(graphs.red_tags(tags), tags, [{"label": "blue"}]), tags)


def test_a_sample_that_is_no_picture_or_was_changed_is_told(tmp_path: Path) -> None:
    card = with_sample(graphs.red_finder(tmp_path), tmp_path, [{"label": "red"}])
    (tmp_path / "sample.png").write_bytes(b"hello")
    with pytest.raises(Invalid, match="sample.png of finder@1 .* sha256"):
        check(card, tmp_path)
    text = replace(card, files={**card.files, "sample.png": file_record(tmp_path / "sample.png")})
    with pytest.raises(Invalid, match="sample.png cannot be decoded"):
        check(text, tmp_path)
    (tmp_path / "sample.png").unlink()
    with pytest.raises(NotFound, match="sample.png"):
        check(card, tmp_path)


@pytest.mark.parametrize(
    "sample",
    [
        {"file": "absent.png", "expect": [{"label": "red"}]},
        {"file": "model.onnx", "expect": [{"label": "red"}]},
        {"file": "sample.png"},
        {"file": "sample.png", "expect": []},
        {"file": "sample.png", "expect": "red"},
        {"file": "sample.png", "expect": [{"label": "cow"}]},
        {"file": "sample.png", "expect": ["red"]},
        {"file": "sample.png", "expect": [{"label": "red", "xyxy": [5, 5, 5, 9]}]},
        {"file": "sample.png", "expect": [{"label": "red", "xyxy": [1, 2, 3]}]},
        {"file": "sample.png", "expect": [{"label": "red", "xyxy": [0, 0, float("nan"), 3]}]},
    ],
)
def test_a_sample_that_makes_no_sense_is_refused_with_its_card(tmp_path: Path, sample: dict[str, Any]) -> None:
    card = with_sample(graphs.red_finder(tmp_path), tmp_path, [{"label": "red"}])
    with pytest.raises(Invalid, match="Model finder@1: its sample"):
        replace(card, sample=sample)
