"""The lower part of the CVAT page, on the double: progress, people, sending, quality and the webhook."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

PROJECT = Path(__file__).resolve().parent.parent.parent
for folder in (PROJECT, PROJECT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from conftest import RUN_S  # noqa: E402
from doubles.cvat import READ_ONLY, READ_WRITE, CvatDouble, cvat  # noqa: E402
from doubles.cvat_work import accept, run, workbench_on  # noqa: E402
from app import cvat_work  # noqa: E402
from workbench.adapters.cvat.people import CvatJob  # noqa: E402
from workbench.ports import Quiet  # noqa: E402
from workbench.steps.cvat_pull import pull  # noqa: E402
from workbench.wiring import Workbench  # noqa: E402

NAMES = [f"{number:03}.jpg" for number in range(6)]


@pytest.fixture
def double() -> Iterator[CvatDouble]:
    with cvat() as served:
        yield served


@pytest.fixture
def at_work(double: CvatDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    home = tmp_path / "home"
    made = workbench_on(double, home)
    run(made, "r1", "student@1", {name: [(10.0, 0.9 - number / 10)] for number, name in enumerate(NAMES)})
    (home / "settings.toml").write_text(f'cvat_url = "{double.url}"\ncvat_token = "{READ_WRITE}"\nperson = "ada"\n')
    monkeypatch.setenv("WORKBENCH_HOME", str(home))
    return made


def section() -> AppTest:
    """The whole page, for its links need the others; what fails above the section is not looked at here."""
    at = AppTest.from_file(str(PROJECT / "app" / "main.py"), default_timeout=RUN_S).run()
    at.switch_page("../pages/cvat.py").run()
    assert not at.exception, at.exception[0].message
    return at


def said(at: AppTest) -> str:
    parts = [*at.markdown, *at.caption, *at.error, *at.warning, *at.success, *at.info]
    return re.sub(r"\\", "", "\n".join(str(one.value) for one in parts))


def button(at: AppTest, label: str):
    found = [one for one in at.button if label in one.label]
    assert found, [one.label for one in at.button]
    return found[0]


def test_accepted_work_is_offered_and_published_by_one_click(at_work: Workbench) -> None:
    assert "accepted in CVAT" not in said(section())
    accept(at_work, at_work.cvat.people("cells").jobs()[0].id)
    pull("cells", server=at_work.cvat, store=at_work.datasets, records=at_work.records, hooks=at_work.hooks,
         job=Quiet(), person="ada", gather_s=0)
    at = section()
    assert "2 frames" in said(at)
    button(at, "Publish 0.2.0").click().run()
    job, = at_work.jobs.list(kind="version")
    assert job.args["dataset"] == "cells" and job.person == "ada"


def test_a_job_is_moved_on_and_an_unknown_user_is_said(at_work: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = at_work.cvat.people("cells").jobs()[0]
    at = section()
    table = next(one.value for one in at.dataframe if "assignee" in one.value)
    assert list(table["stage"]) == ["annotation"] * 3 and list(table["assignee"]) == ["–"] * 3
    # AppTest cannot choose a row of a table.
    chosen = type("Chosen", (), {"selection": type("Rows", (), {"rows": [0]})})
    import streamlit as st
    shown = st.dataframe
    monkeypatch.setattr(st, "dataframe", lambda *a, **k: chosen if k.get("key") == "cvat_jobs" else shown(*a, **k))
    at = section()
    next(one for one in at.selectbox if one.label == "Stage").set_value("validation")
    next(one for one in at.text_input if one.label == "Assignee").set_value("worker1")
    button(at, "Move job").click().run()
    moved = at_work.cvat.people("cells").jobs()[0]
    assert (moved.id, moved.stage, moved.state, moved.assignee) == (job.id, "validation", "new", "worker1")
    at = section()
    next(one for one in at.text_input if one.label == "Assignee").set_value("nobody")
    button(at, "Move job").click().run()
    assert "shows no user 'nobody'" in said(at) and not at.exception


def test_every_frame_counts_once_also_when_it_was_sent_to_people(at_work: Workbench) -> None:
    from workbench.steps.cvat_review import send
    send("cells", low_confidence=4, job_size=2, server=at_work.cvat, models=at_work.models, blobs=at_work.blobs,
         records=at_work.records, open_backend=at_work.open_backend, certificates=at_work.certificates, job=Quiet("s"),
         person="ada")
    at = section()
    table = next(one.value for one in at.dataframe if "assignee" in one.value)
    assert list(table["frames"]) == [2, 2, 2]  # two jobs of the upload are empty now
    html = next(one.proto.body for one in at.get("html") if "cvat-bars" in one.proto.body)
    assert "0 of 2 accepted" in html and "0 of 4 accepted" in html


def test_sending_asks_for_the_job_that_was_filled_in(at_work: Workbench) -> None:
    at = section()
    next(one for one in at.number_input if one.label == "With the least confidence").set_value(3)
    next(one for one in at.text_input if one.label == "People").set_value(" worker1, admin,")
    button(at, "Send to people").click().run()
    job, = at_work.jobs.list(kind="send")
    assert {name: job.args[name] for name in ("dataset", "low_confidence", "disagreement", "people", "truth")} == {
        "dataset": "cells", "low_confidence": 3, "disagreement": 0, "people": ["worker1", "admin"], "truth": "none"}
    assert not at.exception


def test_quality_stands_beside_cvat_s_report(at_work: Workbench, double: CvatDouble) -> None:
    people = at_work.cvat.people("cells")
    truth = people.make_ground_truth(people.jobs()[0].task_id, [0, 1])
    at = section()
    assert button(at, "Measure task").disabled
    people.set_job(truth.id, "acceptance", "completed")
    accept(at_work, people.jobs()[0].id)
    at = section()
    button(at, "Measure task").click().run()
    button(at, "Compare models with reviewers").click().run()
    table = next(one.value for one in at.dataframe if "accuracy" in one.value)
    assert list(table["by"]) == ["CVAT", "workbench"] and list(table["frames"]) == [2, 2]
    assert table["accuracy"].iloc[1] == 1.0


def test_the_webhook_is_connected_shown_and_removed(at_work: Workbench, double: CvatDouble) -> None:
    double.state.post = lambda message: 200
    at = section()
    assert "it is asked instead" in said(at)
    next(one for one in at.text_input if "HTTP service" in one.label).set_value("http://workbench.example:8600")
    button(at, "Connect").click().run()
    assert "test message arrived" in said(at)
    hook, = double.state.webhooks.values()
    assert hook["target_url"] == "http://workbench.example:8600/v1/cvat/webhooks/cells"
    assert at_work.hooks.secret("cells") not in str(at.main) + said(at)
    double.state.post = lambda message: 502
    button(section(), "Connect again").click().run()
    assert "gateway_url" in said(section())
    button(section(), "Remove the webhook").click().run()
    assert double.state.webhooks == {} and at_work.hooks.secret("cells") is None


def test_pre_annotate_and_pull_start_their_jobs(at_work: Workbench) -> None:
    at = section()
    assert button(at, "Pre-annotate").disabled  # nothing is new, and there is no model
    button(at, "Pull accepted work").click().run()
    assert [job.args["dataset"] for job in at_work.jobs.list(kind="pull")] == ["cells"]


@pytest.mark.parametrize("break_it, says", [
    (lambda double: double.fail("GET", "/api/jobs", "html", times=40), "cvat_url"),
    (lambda double: double.fail("GET", "/api/jobs", 500, times=40), "Look into its log"),
    (lambda double: [double.state.delete_project(key) for key in list(double.state.projects)],
     "Upload the data set again")])
def test_a_server_in_trouble_leaves_a_sentence_and_a_page(at_work: Workbench, double: CvatDouble, break_it, says: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.adapters.cvat import connection
    monkeypatch.setattr(connection, "ATTEMPTS", 1)
    break_it(double)
    assert says in said(section())


def test_a_token_that_may_only_read_shows_the_work_and_says_what_it_may_not(
        at_work: Workbench, double: CvatDouble) -> None:
    settings = at_work.config.home / "settings.toml"
    settings.write_text(settings.read_text().replace(READ_WRITE, READ_ONLY))
    at = section()
    next(one for one in at.text_input if "HTTP service" in one.label).set_value("http://workbench.example:8600")
    button(at, "Connect").click().run()
    assert "may only read" in said(at) and not at.exception
    assert at_work.hooks.secret("cells") is None


def test_an_empty_cvat_says_where_to_begin(double: CvatDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "settings.toml").write_text(f'cvat_url = "{double.url}"\ncvat_token = "{READ_WRITE}"\n')
    monkeypatch.setenv("WORKBENCH_HOME", str(home))
    assert "No data set lies in this CVAT yet" in said(section())


@pytest.mark.parametrize("stage, state, step", [
    ("annotation", "new", "to annotate"), ("annotation", "in progress", "being annotated"),
    ("annotation", "completed", "to validate"), ("validation", "in progress", "to validate"),
    ("validation", "completed", "to accept"), ("acceptance", "new", "to accept"),
    ("acceptance", "completed", "accepted"), ("validation", "rejected", "rejected")])
def test_each_stage_and_state_is_one_step(stage: str, state: str, step: str) -> None:
    job = CvatJob(1, 7, "annotation", stage, state, "", 0, 9, 10, "http://cvat.example/tasks/7/jobs/1")
    assert cvat_work.step_of(job) == step
    html = cvat_work.bars([job, CvatJob(2, 7, "ground_truth", stage, state, "", 0, 9, 10, job.url)])
    assert f"10 {step}" in html and "of 10 accepted" in html and "http://cvat.example/tasks/7'" in html
