"""Pages for models that set tags or draw polygons: what is scored, and how good each is, in the words of the task."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from doubles import graphs
from PIL import Image, ImageDraw

from parts import mlflow_server
from parts_mongo import free_port
from app import draw, scores
from app.loop import figures, gather
from workbench.annotation import Annotation
from workbench.config import Config
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.ports import Quiet
from workbench.steps.evaluate import evaluate
from workbench.taxonomy import Taxonomy
from workbench.wiring import Workbench

LABELS = ("red", "blue", "dark")
# Of the models' cards. Every frame of "lights" has one tag, so accuracy decides there.
METRICS = {"lights": {"macro_f1": 0.81, "map": 0.82, "accuracy": 0.83},
           "spots": {"map_50_95": 0.41, "map_50": 0.42, "miou": 0.43}}


def fill(config: Config, folder: Path) -> None:
    """Data sets "lights" (tags) and "spots" (polygons) of twelve frames, and an evaluation of a model on each."""
    workbench, frames = Workbench(config), {"lights": [], "spots": []}
    for number in range(12):
        image = Image.new("RGB", (256, 160), (number, number, number))
        label, box = LABELS[number % 3], (40, 24, 200, 136)
        if label != "dark":
            ImageDraw.Draw(image).ellipse(box, fill=label)
        out = io.BytesIO()
        image.save(out, "PNG")
        made = workbench.blobs.put(out.getvalue())
        frame = Frame(f"{number:02d}.png", 256, 160, made.md5, made.sha256, made.size_bytes)
        tag = Annotation(label if number != 3 else "dark", source="human:anna", id=f"t{number}")
        frames["lights"].append(LabeledFrame(frame, (tag,), "test"))
        ring = ((120, 24), (200, 80), (120, 136), (40, 80))  # a person drew a rhomb around the disc
        region = Annotation(label, (40, 24, 200, 136), ring, source="human:anna", id=f"p{number}")
        frames["spots"].append(LabeledFrame(frame, (region,) if label != "dark" else (), "test"))
    for dataset, make in (("lights", graphs.red_tags), ("spots", graphs.red_masks)):
        card = make(folder / dataset)
        workbench.models.register(replace(
            card, name=f"{dataset}-detector", trained_on={"ref": f"{dataset}@0.1.0"},
            metrics=METRICS[dataset] | {"on": f"{dataset}@0.1.0/val"}), folder / dataset)
        taxonomy = Taxonomy(LABELS if dataset == "lights" else LABELS[:2])
        version = workbench.datasets.publish(dataset, Manifest(taxonomy, tuple(frames[dataset])), "first", "anna")
        evaluate(f"{dataset}-detector@1", version.ref, "test", models=workbench.models, store=workbench.datasets,
                 blobs=workbench.blobs, open_backend=workbench.open_backend, tracker=workbench.tracker,
                 job=Quiet(id=dataset))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("scored")
    with mlflow_server(folder / "mlflow") as url:
        (folder / "home").mkdir()
        (folder / "home" / "settings.toml").write_text(
            f'mlflow_url = "{url}"\nmongo_port = {free_port()}\nfiftyone_port = {free_port()}\n')
        fill(Config.read(folder / "home", environ={}), folder / "made")
        yield folder / "home"


@pytest.fixture
def scored(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_HOME", str(home))
    return home


def texts(at) -> str:
    return "\n".join(one.value for one in [*at.caption, *at.markdown, *at.warning, *at.error]).replace("\\", "")


def test_tags_are_shown_with_accuracy_and_f1(scored: Path, visit) -> None:
    at = visit("evaluate", dataset="lights")
    assert [one.label for one in at.metric] == ["accuracy", "macro F1", "mAP"]
    assert [one.value for one in at.metric][:2] == ["0.917", "0.915"]
    runs, labels = at.dataframe[0].value, at.dataframe[1].value
    assert list(runs["accuracy"]) == pytest.approx([11 / 12]) and "mAP@[.5:.95]" not in runs
    assert list(labels.columns) == ["label", "F1", "precision", "recall", "AP", "top-1", "truth", "set"]
    said = texts(at)
    assert "12 tags in the truth, 12 set (the surest label of each frame)" in said
    assert "11 of 12 frames are without a mistake" in said and "1 wrong label" in said and "03.png · dark" in said
    assert not [one for one in at.button if "FiftyOne" in one.label]


def test_polygons_are_shown_with_the_iou_of_their_pixels(scored: Path, visit) -> None:
    at = visit("evaluate", dataset="spots")
    numbers = {one.label: one.value for one in at.metric}
    # The rhomb in the ellipse covers 2 / pi of it.
    assert float(numbers["mIoU"]) == pytest.approx(0.637, abs=0.06) and "mask mAP50" not in numbers
    labels = at.dataframe[1].value
    assert list(labels.columns) == ["label", "IoU", "box AP", "box AP50", "truth", "drawn"] and len(labels) == 2
    said = texts(at)
    assert "8 regions in the truth, 8 drawn" in said and "Pixels of all frames" in said
    assert "4 of 12 frames" in said and "IoU 0.6" in said and "00.png · 1 polygon" in said


@pytest.mark.parametrize(("dataset", "metric", "score", "drawn"), [
    ("lights", "accuracy", 0.83, "tags"), ("spots", "mIoU", 0.43, "polygons")])
def test_the_models_page_shows_the_metric_that_the_task_has(
        scored: Path, visit, dataset: str, metric: str, score: float, drawn: str) -> None:
    at = visit("models", dataset=dataset, model=f"{dataset}-detector@1")
    rows = at.dataframe[0].value.set_index("model")
    assert rows.loc[f"{dataset}-detector@1", ["draws", "metric", "score", "measured on"]].tolist() == [
        drawn, metric, score, f"{dataset}@0.1.0/val"]
    card = dict(zip(*(at.dataframe[1].value[column] for column in at.dataframe[1].value)))
    assert f"{metric} {score:.3f}" in card["scores"] and card["scores"].count(",") == 2


@pytest.mark.parametrize(("dataset", "metric", "drawn"), [
    ("lights", "accuracy", "tags"), ("spots", "mIoU", "polygons")])
def test_the_loop_shows_evaluations_and_champion_by_that_metric(
        scored: Path, visit, dataset: str, metric: str, drawn: str) -> None:
    workbench = Workbench(Config.read(scored, environ={}))
    best = max(run["metrics"]["accuracy" if drawn == "tags" else "miou"]
               for run in workbench.tracker.runs(f"{dataset}/evaluations"))
    loop, _ = gather(workbench, dataset, {})
    stations = figures(loop)
    assert stations["evaluate"] == (f"{best:.3f}", f"best {metric} · {dataset}-detector@1")
    assert stations["version"][1] == f"1 published · {loop.latest.boxes} {drawn}"
    assert stations["promote"] == ("–", "no champion yet")
    for number, (facts, shown) in enumerate((
            ({"primary": "macro_f1", "challenger": {"macro_f1": 0.7, "accuracy": 0.9}}, ("0.700", "macro F1 · m@1")),
            # Decisions of before do not name a metric, a refusal has no score.
            ({"challenger": {"map_50_95": 0.4}}, ("0.400", "mAP@[.5:.95] · m@1")),
            ({"primary": "miou", "challenger": {"map_50_95": 0.4}}, ("–", "m@1")))):
        workbench.records.add("promotions", f"{dataset}-{number}", "m@1", "anna", {"promoted": True, **facts})
        assert figures(gather(workbench, f"{dataset}-{number}", {}, is_partial=True)[0])["promote"] == shown


def test_a_model_without_the_usual_metric_shows_the_first_it_has(scored: Path, monkeypatch) -> None:
    card = Workbench(Config.read(scored, environ={})).models.card("lights-detector@1")
    told = [({"map": 0.5, "macro_f1": 0.6}, "map"), ({"macro_f1": 0.6}, "macro_f1"), ({"map_50_95": 0.5}, None),
            ({"accuracy": "good", "map": 0.5}, "map"), ({}, None)]
    for metrics, metric in told:
        assert scores.primary(replace(card, metrics=metrics)) == metric
        for ref in ("lights@9.9.9", "gone@1.0.0", "nonsense"):  # trained elsewhere: the card's numbers still stand
            assert scores.primary(replace(card, metrics=metrics, trained_on={"ref": ref})) == metric


def test_captions_count_what_is_drawn() -> None:
    tag, box = Annotation("red"), Annotation("red", (1, 1, 5, 5))
    region = Annotation("red", (1, 1, 5, 5), ((1, 1), (5, 1), (5, 5)))
    mask = Annotation("red", mask={"size": [8, 8], "counts": [8, 8, 48]})
    assert [draw.counted(drawn) for drawn in ((), (box,), (box, box, tag), (region, mask, mask), (tag,))] == [
        "nothing on it", "1 box", "2 boxes, 1 tag", "1 polygon, 2 masks", "1 tag"]
