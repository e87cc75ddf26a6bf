"""INT8 versions, mask and tag models on the models and annotate pages: certificates, permission, registration."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doubles import graphs
from PIL import Image
from streamlit.testing.v1 import AppTest
from test_pages_empty import texts
from test_pages_filled import button, jobs_of, tables

import filled
from app.certificate import LABELS_SHOWN, bars
from workbench.inference.graph import file_record
from workbench.taxonomy import Taxonomy
from workbench.wiring import Workbench

DIGEST = "c" * 64


def int8(workbench: Workbench, folder: Path, name: str) -> str:
    """The tiny detector under another name, whose card says it was quantised; its reference."""
    file = filled.tiny_detector(folder / name)
    about = {
        "from": "shapes-detector@1",
        "from_sha256": "a" * 64,
        "calibration_digest": DIGEST,
        "ranges": "minmax",
        "float_layers": [],
        "frames": 32,
    }
    card = replace(
        workbench.models.card("shapes-detector@1"),
        name=name,
        version="1-int8",
        quantization=about,
        metrics={},
        files={file.name: file_record(file)},
    )
    return workbench.models.register(card, file.parent).ref


def facts(workbench: Workbench, ref: str, **more: Any) -> dict[str, Any]:
    """What a measurement on this machine said of it while certificates were about boxes alone."""
    card = workbench.models.card(ref)
    with workbench.open_backend(workbench.models.folder(ref) / card.onnx) as backend:
        report = backend.report
    labels = {label: {"fp32": 0.5, "int8": 0.49, "interval": [-0.01, 0.02], "boxes": 9} for label in card.labels.labels}
    return {
        "model": ref,
        "file_sha256": card.files[card.onnx]["sha256"],
        "backend": report.backend,
        "device": report.device,
        "precision": "int8",
        "library": report.library,
        "calibration_digest": DIGEST,
        "against": {"model": "shapes-detector@1", "file_sha256": "a" * 64},
        "on": "shapes@0.2.0/test",
        "frames": 30,
        "boxes": 27,
        "fp32": {"map_50_95": 0.5, "map_50": 0.8, "images_per_s": 40.0},
        "int8": {"map_50_95": 0.498, "map_50": 0.8, "images_per_s": 96.0},
        "map_loss": 0.002,
        "map_loss_interval": [-0.004, 0.006],
        "per_class": labels,
        "box_shift_px": {"median": 0.7, "p95": 2.4},
        "speedup": 2.4,
        "limits": {"map_loss": 0.005, "class_loss": 0.03, "speedup": 1.0, "frames": 10},
        "created_at": "2026-11-21T10:00:00+00:00",
        "passed": True,
        "reasons": [],
        **more,
    }


def facts_of(metric: str, workbench: Workbench, ref: str, **more: Any) -> dict[str, Any]:
    """What a measurement on this machine says of it today, by the metric of its task."""
    old = facts(workbench, ref)
    gone = ("boxes", "map_loss", "map_loss_interval", "box_shift_px")
    labels = {label: {"fp32": 0.9, "int8": 0.88, "interval": [-0.01, 0.04], "truth": 9} for label in old["per_class"]}
    return {
        **{name: value for name, value in old.items() if name not in gone},
        "metric": metric,
        "labelled": 30,
        "truth": 27,
        "fp32": {metric: 0.9, "images_per_s": 40.0},
        "int8": {metric: 0.896, "images_per_s": 96.0},
        "loss": 0.004,
        "loss_interval": [-0.002, 0.009],
        "per_class": labels,
        "limits": {"loss": 0.005, "class_loss": 0.03, "speedup": 1.0, "frames": 10},
        **more,
    }


def metrics(at: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in at.metric}


def said(at: AppTest, kind: str) -> str:
    return " ".join(one.value.replace("\\", "") for one in getattr(at, kind))


@pytest.fixture(scope="session")
def refs(filled_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """INT8 versions: one that passed, one that failed, one that nobody certified, one measured on another machine."""
    from workbench.config import Config

    workbench, folder = Workbench(Config.read(filled_home, environ={})), tmp_path_factory.mktemp("int8")
    names = ("passed", "failed", "bare", "elsewhere", "tagged", "outlined")
    found = {name: int8(workbench, folder, name) for name in names}
    add = workbench.certificates.add
    add(facts(workbench, found["passed"]), "anna")
    reasons = ["mAP falls by 0.0210, 0.005 is allowed."]
    add(facts(workbench, found["failed"], map_loss=0.021, passed=False, reasons=reasons), "anna")
    add(facts(workbench, found["elsewhere"], device="another processor"), "anna")
    add(facts_of("accuracy", workbench, found["tagged"], same_tags=0.9667), "anna")
    add(facts_of("miou", workbench, found["outlined"], same_pixels=None), "anna")
    for make in (graphs.red_masks, graphs.red_tags):
        card = make(folder / make.__name__)
        count = len(card.labels)
        workbench.models.register(replace(card, labels=Taxonomy(filled.LABELS[:count])), folder / make.__name__)
    return found


def test_a_passed_certificate_is_shown_as_a_picture(workbench: Workbench, refs: dict[str, str], visit) -> None:
    at = visit("models", dataset="shapes", model=refs["passed"])
    assert "passed its certificate on this machine" in said(at, "success")
    assert metrics(at) == {"FP32 mAP": "0.500", "INT8 mAP": "0.498", "Speed-up": "2.40 ×", "Boxes move by": "0.7 px"}
    assert "30 frames with 27 boxes of shapes@0.2.0/test" in texts(at).replace("\\", "") and at.get("vega_lite_chart")
    assert "INT8" in tables(at)


@pytest.mark.parametrize(
    ("name", "metric", "counted", "tile"),
    [("tagged", "accuracy", "27 tags", ("Same tags", "96.7%")), ("outlined", "mIoU", "27 regions", ("Same label", "–"))],
)
def test_a_certificate_of_tags_or_regions_says_what_it_is_about(
    workbench: Workbench, refs: dict[str, str], visit, name: str, metric: str, counted: str, tile: tuple[str, str]
) -> None:
    at = visit("models", dataset="shapes", model=refs[name])
    assert "passed its certificate on this machine" in said(at, "success")
    shown = {f"FP32 {metric}": "0.900", f"INT8 {metric}": "0.896", "Speed-up": "2.40 ×", tile[0]: tile[1]}
    assert metrics(at) == shown
    assert f"30 frames with {counted} of shapes@0.2.0/test" in texts(at).replace("\\", "")
    at = visit("annotate", dataset="shapes", model=refs[name])
    assert f"{metric} -0.0040" in texts(at)


def test_a_failed_certificate_says_why_and_the_model_cannot_be_deployed(
    workbench: Workbench, refs: dict[str, str], visit
) -> None:
    at = visit("models", dataset="shapes", model=refs["failed"])
    assert "may not annotate. The FP32 version still may" in said(at, "error")
    assert "mAP falls by 0.0210, 0.005 is allowed." in texts(at).replace("\\", "")
    assert button(at, "Deploy for shapes").disabled


@pytest.mark.parametrize(("name", "why"), [("bare", "without a certificate"), ("elsewhere", "another processor")])
def test_a_model_that_is_not_certified_here_says_so_on_both_pages(
    workbench: Workbench, refs: dict[str, str], visit, name: str, why: str
) -> None:
    assert why in said(visit("models", dataset="shapes", model=refs[name]), "warning")
    at = visit("annotate", dataset="shapes", model=refs[name])
    assert why in said(at, "warning")
    assert button(at, "Preview on 3 frames").disabled
    assert all(one.disabled for one in at.button if one.label.startswith("Annotate "))


def test_an_int8_version_with_its_certificate_is_offered(workbench: Workbench, refs: dict[str, str], visit) -> None:
    at = visit("annotate", dataset="shapes", model=refs["passed"])
    assert "certified here" in texts(at) and "2.4 × as fast" in texts(at)
    assert not button(at, "Preview on 3 frames").disabled
    button(at, "Preview on 3 frames").click().run()
    assert not at.exception and not at.error and at.get("image")


def test_certify_and_make_an_int8_version_are_one_job_each(workbench: Workbench, refs: dict[str, str], visit) -> None:
    for kind, label, model in (
        ("certify", "Certify on this machine", refs["bare"]),
        ("quantize", "Make an INT8 version", "shapes-detector@2"),
    ):
        before = jobs_of(workbench, kind)
        at = visit("models", dataset="shapes", model=model)
        button(at, label).click().run()
        button(at, label).click().run()
        (job_id,) = jobs_of(workbench, kind) - before
        assert workbench.jobs.get(job_id).args == {
            "dataset": "shapes",
            "model": model,
            "version": "shapes@0.2.0",
            "split": "test",
            "person": "me",
        }
        assert any(one.label == "Cancel" for one in at.button), "the job is shown while it runs"
        workbench.jobs.cancel(job_id)


def test_a_mask_model_and_a_tag_model_say_what_they_draw(workbench: Workbench, refs: dict[str, str], visit) -> None:
    assert "draws polygons" in texts(visit("annotate", dataset="shapes", model="masks@1"))
    at = visit("annotate", dataset="shapes", model="tags@1")
    assert "sets tags on whole frames" in texts(at) and not at.get("button_group")
    button(at, "Preview on 3 frames").click().run()
    assert not at.exception and "1 tag" in texts(at)
    for model in ("masks@1", "tags@1"):
        assert button(visit("models", dataset="shapes", model=model), "Make an INT8 version")


def test_pieces_for_small_objects_tell_their_cost_and_reach_the_job(
    workbench: Workbench, refs: dict[str, str], visit, no_running_job: None
) -> None:
    before = jobs_of(workbench, "annotate")
    at = visit("annotate", dataset="shapes", model="shapes-detector@2")
    at.get("button_group")[0].set_value("in small pieces").run()
    # Pieces of 64 px 51 px apart: 7 across 320 px, 3 down 160 px.
    assert "A frame of 320 × 160 px is looked at whole and in 21 pieces of 64 px: about 22 times the work." in texts(at)
    next(one for one in at.button if one.label.startswith("Annotate ")).click().run()
    (job_id,) = jobs_of(workbench, "annotate") - before
    assert workbench.jobs.get(job_id).args["tiling"] == {"size": 64, "overlap": 0.2}
    workbench.jobs.cancel(job_id)


@pytest.fixture
def no_running_job(workbench: Workbench):
    """The annotate job that the filled workbench shows as running is over for a moment."""
    jobs = filled.jobs_module.jobs

    def become(state: str) -> None:
        with workbench.records.engine.begin() as connection:
            connection.execute(jobs.update().where(jobs.c.id == "an1").values(state=state))

    become("cancelled")
    yield
    become("running")


def picture(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(out, "PNG")
    return out.getvalue()


def test_a_model_is_registered_only_when_it_finds_what_is_on_its_picture(
    empty: Workbench, visit, tmp_path: Path
) -> None:
    """A classifier of red, blue and dark, with a blue picture that must be red, then blue."""
    file = graphs.chw_tags(tmp_path)
    at = visit("models")
    at.selectbox(key="register_family").set_value("classification").run()
    assert "sets one tag a frame" in texts(at)
    for seen, outcome in (("red", "error"), ("blue", "success")):
        at.file_uploader(key="register_files").set_value(
            [("model.onnx", file.read_bytes(), "application/octet-stream")]
        )
        at.file_uploader(key="register_sample").set_value(("blue.png", picture("blue"), "image/png"))
        at.run()
        at.text_input(key="register_name").set_value("colours")
        at.text_area(key="register_labels").set_value("red\nblue\ndark")
        at.text_input(key="register_seen").set_value(seen)
        button(at, "Check and register").click().run()
        assert not at.exception
        if outcome == "error":
            assert "does not find red on sample.png; it finds blue" in said(at, "error") and empty.models.refs() == []
    assert "colours@1 is registered" in said(at, "success")
    assert empty.models.card("colours@1").sample["expect"] == [{"label": "blue"}]


def test_of_many_labels_the_chart_shows_all_together_and_those_that_lose_most() -> None:
    rows = {
        f"label {number}": {"fp32": 0.5, "int8": 0.5 - number / 100, "interval": [0, 0.1], "truth": 3}
        for number in range(30)
    }
    chart = bars(
        {
            "metric": "map_50_95",
            "fp32": {"map_50_95": 0.5},
            "int8": {"map_50_95": 0.4},
            "loss_interval": [0.05, 0.15],
            "truth": 90,
            "per_class": rows,
        }
    )
    table = chart.data
    shown = list(dict.fromkeys(table["label"]))
    assert shown[:3] == ["all labels", "label 29", "label 28"] and len(shown) == 1 + LABELS_SHOWN
    whole = table[(table["label"] == "all labels") & (table["model"] == "INT8")].iloc[0]
    # FP32 0.5 less a loss of 0.05 to 0.15.
    assert (whole["least"], whole["most"]) == (pytest.approx(0.35), pytest.approx(0.45))
