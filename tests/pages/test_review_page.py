"""The review page as a visitor meets it: a real annotation database, FiftyOne's app not running."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

PROJECT = Path(__file__).resolve().parent.parent.parent
for folder in (PROJECT / "tests", PROJECT / "tests" / "pages"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import filled  # noqa: E402
from parts_mongo import free_port, mongod  # noqa: E402
from workbench.annotation import Annotation  # noqa: E402
from workbench.config import Config  # noqa: E402
from workbench.run import WorkingFrame, propose  # noqa: E402
from workbench.wiring import Workbench  # noqa: E402

Open = Callable[..., AppTest]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mongod(tmp_path_factory.mktemp("review-mongo")) as url:
        yield url


@pytest.fixture
def reviewing(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    """Twelve frames: nine accepted, two annotated by a machine (shelf/009, shelf/010), one new (shelf/011)."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "settings.toml").write_text(f'mongo_url = "{database}"\nperson = "ann"\nfiftyone_port = {free_port()}\n')
    monkeypatch.setenv("WORKBENCH_HOME", str(home))
    workbench = Workbench(Config.read(home, environ={}))
    filled.dataset(workbench)
    filled.working_copy(workbench)
    yield workbench
    workbench.server.delete_task("shapes")


def frame(workbench: Workbench, name: str) -> WorkingFrame:
    return workbench.server.read("shapes", [name])[name]


def button(at: AppTest, label: str):
    return next(each for each in at.button if each.label == label)


def headings(at: AppTest) -> str:
    return " ".join(each.value for each in at.markdown)


def test_the_page_shows_progress_the_next_frame_and_where_its_boxes_come_from(
        reviewing: Workbench, visit: Open) -> None:
    at = visit("review", dataset="shapes")
    assert "shelf/009\\.jpg" in headings(at)
    assert any("does not answer" in warning.value for warning in at.warning)
    table = at.dataframe[0].value
    assert list(table["source"]) == ["model:shapes-detector@1"] * 3
    assert list(table["confidence"]) == pytest.approx([0.61, 0.71, 0.81]) and set(table["touched by"]) == {""}
    assert reviewing.records.leased("shapes") == {"shelf/009.jpg": "ann"}


def test_accept_moves_on_and_undo_comes_back(reviewing: Workbench, visit: Open) -> None:
    at = visit("review", dataset="shapes")
    button(at, "Accept").click().run()
    assert not at.exception
    done = frame(reviewing, "shelf/009.jpg")
    assert (done.status, done.reviewed_by) == ("accepted", "ann")
    assert "shelf/010\\.jpg" in headings(at)
    assert reviewing.records.leased("shapes") == {"shelf/010.jpg": "ann"}
    button(at, "Undo").click().run()
    assert frame(reviewing, "shelf/009.jpg").status == "annotated" and "shelf/009\\.jpg" in headings(at)
    entries = reviewing.records.entries("reviews", "shapes", "shelf/009.jpg")
    assert [entry.facts["decision"] for entry in entries] == ["reopen", "accepted"]


def test_reject_and_skip_move_on_until_nothing_is_left(reviewing: Workbench, visit: Open) -> None:
    at = visit("review", dataset="shapes")
    button(at, "Skip").click().run()
    assert "shelf/010\\.jpg" in headings(at) and frame(reviewing, "shelf/009.jpg").status == "annotated"
    for _ in range(3):
        button(at, "Reject").click().run()
        assert not at.exception
    assert reviewing.server.task("shapes").by_status["rejected"] == 3
    assert "Every frame is reviewed." in headings(at)
    assert not {"Accept", "Reject", "Skip"} & {each.label for each in at.button}


def test_a_person_s_unsigned_work_is_shown_and_signed(reviewing: Workbench, visit: Open) -> None:
    working = frame(reviewing, "shelf/009.jpg")
    first = working.annotations[0]
    x1, y1, x2, y2 = first.xyxy
    moved = Annotation(first.label, (x1 + 5, y1, x2 + 5, y2), source=first.source, confidence=first.confidence,
                       id=first.id)
    edited = (moved, *working.annotations[2:], Annotation("disc", (5, 5, 30, 30), id="f" * 32))
    assert reviewing.server.write("shapes", [replace(working, annotations=edited)]) == []
    at = visit("review", dataset="shapes")
    table = at.dataframe[0].value
    assert list(table["touched by"]) == ["changed, signed when you decide", "", ""]
    assert list(table["source"])[2] == "drawn, signed when you decide"
    assert any("Deleted by a person" in caption.value for caption in at.caption)
    button(at, "Accept").click().run()
    signed = {a.id: a for a in frame(reviewing, "shelf/009.jpg").annotations}
    assert signed[first.id].attributes == {"touched_by": "human:ann"} and signed["f" * 32].source == "human:ann"


def test_a_frame_that_somebody_else_has_open_is_told_and_can_be_skipped(reviewing: Workbench, visit: Open) -> None:
    reviewing.records.lease("shapes", "shelf/009.jpg", "bob")
    at = visit("review", dataset="shapes")
    assert "shelf/010\\.jpg" in headings(at)
    at = visit("review", dataset="shapes", frame="shelf/009.jpg")
    assert any("worked on by bob" in error.value for error in at.error)
    assert "Accept" not in [each.label for each in at.button]
    button(at, "Skip").click().run()
    assert "shelf/010\\.jpg" in headings(at)


def test_a_reviewed_frame_can_be_reopened(reviewing: Workbench, visit: Open) -> None:
    at = visit("review", dataset="shapes", frame="shelf/008.jpg")
    assert "Accept" not in [each.label for each in at.button]
    button(at, "Reopen").click().run()
    assert frame(reviewing, "shelf/008.jpg").status == "annotated"
    assert "Accept" in [each.label for each in at.button]


def test_a_box_without_a_label_of_the_data_set_is_told_and_nothing_moves(reviewing: Workbench, visit: Open) -> None:
    working = frame(reviewing, "shelf/011.jpg")
    wrong = (Annotation("lorry", (5, 5, 30, 30), source="model:m@1", confidence=0.5, id="e" * 32),)
    assert reviewing.server.write("shapes", [propose(working, "r9", "model:m@1", wrong)]) == []
    at = visit("review", dataset="shapes", frame="shelf/011.jpg")
    button(at, "Accept").click().run()
    assert any("lorry" in error.value for error in at.error)
    assert frame(reviewing, "shelf/011.jpg").status == "annotated"


def test_a_frame_that_does_not_exist_is_told(reviewing: Workbench, visit: Open) -> None:
    at = visit("review", dataset="shapes", frame="nowhere.jpg")
    assert any("nowhere" in error.value for error in at.error)
    button(at, "Skip").click().run()
    assert "shelf/009\\.jpg" in headings(at)


def test_the_page_says_what_to_do_while_the_annotation_database_is_down(partless: Workbench, visit: Open) -> None:
    at = visit("review", dataset="shapes")
    assert any("workbench up" in warning.value for warning in at.warning)


def test_without_a_data_set_the_page_leads_to_upload(empty: Workbench, visit: Open) -> None:
    assert "There is no data set yet." in headings(visit("review"))
