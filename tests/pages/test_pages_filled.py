"""Every page on a workbench with something in it: what stands there, and what its buttons do."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from streamlit.testing.v1 import AppTest
from test_pages_empty import PAGES, texts

import filled
from app import session
from workbench.steps import version
from workbench.wiring import Workbench


def button(at: AppTest, label: str):
    return next(one for one in at.button if one.label == label)


def jobs_of(workbench: Workbench, kind: str) -> set[str]:
    return {job.id for job in workbench.jobs.list(limit=500, kind=kind)}


def finish(workbench: Workbench, job_id: str) -> None:
    with workbench.records.engine.begin() as connection:
        connection.execute(
            filled.jobs_module.jobs.update()
            .where(filled.jobs_module.jobs.c.id == job_id)
            .values(state="done", finished_at=filled.now(), result=json.dumps({"version": "shapes@0.2.0"}))
        )


def tables(at: AppTest) -> str:
    return "\n".join(frame.value.to_string() for frame in at.dataframe)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_without_a_complaint(workbench: Workbench, visit, page: str) -> None:
    at = visit(page, dataset="shapes")
    # The review page looks for FiftyOne's app, which is no part of this workbench.
    assert not at.error and (not at.warning or page == "review")


def test_the_overview_counts_frames_and_names_the_champion(workbench: Workbench, visit) -> None:
    at = visit("overview", dataset="shapes")
    html = "".join(element.proto.body for element in at.get("html"))
    assert "9" in html and "2 waiting" in html and "shapes-detector@1" in html and "2 published" in html
    assert "shapes-detector@1 became champion" in tables(at)


def test_the_data_set_chosen_on_one_page_is_chosen_on_the_next(workbench: Workbench, visit) -> None:
    filled.dataset(workbench, "another") if "another" not in workbench.datasets.names() else None
    at = visit("versions", dataset="shapes")
    at.switch_page("../pages/evaluate.py").run()
    assert next(box for box in at.selectbox if box.label == "Data set").value == "shapes"


def test_annotate_shows_what_does_not_match_before_it_runs(workbench: Workbench, visit) -> None:
    at = visit("annotate", dataset="shapes", model="street-yolox@1")
    assert "2 of the model's labels are not in the data set" in texts(at)
    assert "nothing draws ring, bar" in texts(at)


def test_the_deployed_model_is_offered_first(workbench: Workbench, visit) -> None:
    box = next(box for box in visit("annotate", dataset="shapes").selectbox if box.label == "Model")
    assert box.options[0].startswith("shapes-detector@1 · deployed · champion")
    assert box.value == "shapes-detector@1"


def test_the_preview_draws_without_writing(workbench: Workbench, visit) -> None:
    before = workbench.server.task("shapes").by_status
    at = visit("annotate", dataset="shapes")
    button(at, "Preview on 3 frames").click().run()
    assert not at.exception and at.get("image")
    assert workbench.server.task("shapes").by_status == before


def test_undo_of_a_run_is_a_job_and_two_clicks_are_one(workbench: Workbench, visit) -> None:
    before = jobs_of(workbench, "undo")
    at = visit("annotate", dataset="shapes")
    button(at, "Undo").click().run()
    button(at, "Undo").click().run()
    (job_id,) = jobs_of(workbench, "undo") - before
    assert workbench.jobs.get(job_id).args == {"dataset": "shapes", "run_id": "run-1", "person": "me"}
    workbench.jobs.cancel(job_id)


def test_a_job_goes_on_being_shown_when_the_page_is_opened_anew(workbench: Workbench, visit) -> None:
    assert "annotate" in texts(visit("annotate", dataset="shapes"))
    fresh = visit("annotate", dataset="shapes")
    assert any(one.label == "Cancel" for one in fresh.button)


def test_a_visitor_who_found_a_running_job_sees_its_result(workbench: Workbench, visit) -> None:
    filled.job(workbench, "ve1", "version", "running", {"dataset": "shapes", "message": "m"})
    at = visit("versions", dataset="shapes")
    finish(workbench, "ve1")
    at.run()
    assert any("shapes@0.2.0 is published" in success.value for success in at.success)


def test_a_job_that_ends_while_the_page_is_drawn_shows_its_result(workbench: Workbench, visit, monkeypatch) -> None:
    filled.job(workbench, "ve2", "version", "running", {"dataset": "shapes", "message": "m"})

    def ends_meanwhile(*args, **options):
        finish(workbench, "ve2")
        return found(*args, **options)

    found = version.pending
    monkeypatch.setattr(version, "pending", ends_meanwhile)
    at = visit("versions", dataset="shapes")
    assert any("shapes@0.2.0 is published" in success.value for success in at.success)


def test_a_job_that_ends_below_what_was_drawn_of_it_draws_the_page_anew(
    workbench: Workbench, visit, monkeypatch, tmp_path
) -> None:
    filled.model(workbench, tmp_path, "successor")
    filled.job(workbench, "de1", "deploy", "running", {"dataset": "shapes", "model": "successor@1"})

    def ends_before(kind, dataset=None):
        if workbench.records.deployed("shapes") != "successor@1":
            workbench.records.add("deployments", "shapes", "successor@1", "anna", {"previous": "shapes-detector@1"})
            finish(workbench, "de1")
        return watched(kind, dataset)

    watched = session.watched
    monkeypatch.setattr(session, "watched", ends_before)
    at = visit("models", dataset="shapes", model="successor@1", job="de1")
    assert not [one for one in at.button if one.key == "deploy_model"]
    workbench.records.add("deployments", "shapes", "shapes-detector@1", "anna", {"previous": "successor@1"})


def test_publishing_asks_for_a_message_and_then_makes_one_job(workbench: Workbench, visit) -> None:
    before = jobs_of(workbench, "version")
    at = visit("versions", dataset="shapes")
    button(at, "Publish").click().run()
    assert jobs_of(workbench, "version") == before
    assert any("one sentence" in warning.value for warning in at.warning)
    next(field for field in at.text_input if field.label == "Message").set_value("Three more frames")
    button(at, "Publish").click().run()
    (job_id,) = jobs_of(workbench, "version") - before
    assert workbench.jobs.get(job_id).args["message"] == "Three more frames"
    workbench.jobs.cancel(job_id)


def test_the_versions_page_compares_the_last_two_and_tells_how_to_fetch(workbench: Workbench, visit) -> None:
    at = visit("versions", dataset="shapes")
    metrics = {metric.label: metric.value for metric in at.metric}
    assert metrics["frames changed"] == "3" and metrics["boxes added"] == "6" and metrics["boxes changed"] == "1"
    assert any("git clone" in code.value and "dvc pull" in code.value for code in at.code)


def test_an_evaluation_is_shown_with_its_numbers_and_worst_frames(workbench: Workbench, visit) -> None:
    at = visit("evaluate", dataset="shapes")
    assert {"mAP@[.5:.95]", "mAP50"} <= {metric.label for metric in at.metric}
    assert "frames are without a mistake" in texts(at)
    assert "shapes-detector@1" in tables(at)


def test_an_evaluation_is_handed_to_fiftyone_when_asked(workbench: Workbench, visit) -> None:
    at = visit("evaluate", dataset="shapes")
    button(at, "Show in FiftyOne").click().run()
    assert not at.exception and not at.warning
    assert [link.proto.url for link in at.get("link_button")] == [
        f"{workbench.config.fiftyone}/datasets/shapes-evaluation"
    ]


def test_evaluate_starts_one_job_with_what_was_chosen(workbench: Workbench, visit) -> None:
    before = jobs_of(workbench, "evaluate")
    at = visit("evaluate", dataset="shapes", model="shapes-detector@2", version="shapes@0.2.0")
    button(at, "Evaluate").click().run()
    (job_id,) = jobs_of(workbench, "evaluate") - before
    assert workbench.jobs.get(job_id).args == {
        "dataset": "shapes",
        "model": "shapes-detector@2",
        "version": "shapes@0.2.0",
        "split": "test",
        "person": "me",
    }
    workbench.jobs.cancel(job_id)


def test_the_models_page_marks_champion_and_deployed_and_deploys_another(workbench: Workbench, visit) -> None:
    before = jobs_of(workbench, "deploy")
    at = visit("models", dataset="shapes")
    assert ["champion", "deployed"] in [list(value) for value in at.dataframe[0].value["is"]]
    assert not any(one.label == "Deploy for shapes" for one in at.button), "what is deployed has no deploy button"
    next(box for box in at.selectbox if box.label == "Card of").set_value("shapes-detector@2").run()
    button(at, "Deploy for shapes").click().run()
    (job_id,) = jobs_of(workbench, "deploy") - before
    assert workbench.jobs.get(job_id).args == {"dataset": "shapes", "model": "shapes-detector@2", "person": "me"}
    workbench.jobs.cancel(job_id)


def test_retrain_shows_the_decision_and_the_trainings(workbench: Workbench, visit) -> None:
    at = visit("retrain", dataset="shapes")
    assert "is champion and annotates the next upload" in texts(at)
    assert "efficientnet_lite0_fcos on shapes@0.1.0" in tables(at)
    assert "first champion" in tables(at)


def test_a_challenger_is_sent_to_promotion(workbench: Workbench, visit) -> None:
    before = jobs_of(workbench, "promote")
    at = visit("retrain", dataset="shapes")
    button(at, "Promote if better").click().run()
    (job_id,) = jobs_of(workbench, "promote") - before
    assert workbench.jobs.get(job_id).args["candidate"] == "shapes-detector@2"
    workbench.jobs.cancel(job_id)


def test_a_job_of_the_list_is_shown_whole(workbench: Workbench, visit) -> None:
    at = visit("jobs")
    assert {"queued", "running", "done", "failed", "cancelled"} >= set(at.dataframe[0].value["state"])
    at = visit("jobs")
    at.query_params["job"] = "up1"
    at.run()
    assert "shelf/<b>broken</b>.jpg" in tables(at), "a file's name is shown as it is"
    assert any("12 frames arrived" in code.value for code in at.code)
    at.query_params["job"] = "re1"
    at.run()
    assert any("exit code 1" in error.value.replace("\\", "") for error in at.error)


def test_cancel_asks_the_job_to_stop(workbench: Workbench, visit) -> None:
    filled.job(workbench, "canc", "annotate", "running", {"dataset": "elsewhere", "model": "m@1"})
    at = visit("jobs")
    at.query_params["job"] = "canc"
    at.run()
    button(at, "Cancel").click().run()
    status = workbench.jobs.get("canc")
    assert status.is_cancelling or status.state == "cancelled"


def test_the_upload_result_lists_refused_files_and_shows_new_frames(workbench: Workbench, visit) -> None:
    filled.job(
        workbench,
        "up2",
        "upload",
        "done",
        {"dataset": "shapes", "source": "/x", "split": None},
        result=json.dumps(
            {
                "version": "shapes@0.2.0",
                "added": 12,
                "boxes": 24,
                "labels": ["disc"],
                "refused": {"=cmd()": "is not an image"},
                "refused_count": 1,
                "duplicates_count": 0,
            }
        ),
    )
    at = visit("upload")
    at.query_params["job"] = "up2"
    at.run()
    assert not at.exception
    assert "1 file was refused" in texts(at)
    assert {metric.label: metric.value for metric in at.metric}["new frames"] == "12"


def test_upload_refuses_a_path_that_is_not_there_and_takes_one_that_is(workbench: Workbench, visit, tmp_path) -> None:
    before = jobs_of(workbench, "upload")
    at = visit("upload")
    at.session_state["upload_from"] = "A folder on the server"
    at.run()
    at.text_input(key="upload_path").set_value("/nowhere/at/all")
    button(at, "Start the upload").click().run()
    assert any("is not on the server" in error.value.replace("\\", "") for error in at.error)
    assert jobs_of(workbench, "upload") == before
    at.text_input(key="upload_path").set_value(str(tmp_path))
    button(at, "Start the upload").click().run()
    (job_id,) = jobs_of(workbench, "upload") - before
    assert workbench.jobs.get(job_id).args == {
        "dataset": at.selectbox(key="upload_name").value,
        "source": str(tmp_path),
        "split": None,
        "person": "me",
    }
    workbench.jobs.cancel(job_id)


def test_upload_without_a_data_set_name_says_what_a_name_looks_like(empty: Workbench, visit) -> None:
    at = visit("upload")
    button(at, "Start the upload").click().run()
    assert any("lower-case" in error.value.replace("\\", "") for error in at.error)
    assert empty.jobs.list() == []


def test_the_person_of_the_sidebar_submits_the_job(workbench: Workbench, visit) -> None:
    before = jobs_of(workbench, "evaluate")
    at = visit("evaluate", dataset="shapes", model="shapes-detector@2")
    at.text_input(key="acting_person_typed").set_value("zoe").run()
    button(at, "Evaluate").click().run()
    (job_id,) = jobs_of(workbench, "evaluate") - before
    assert workbench.jobs.get(job_id).person == "zoe"
    workbench.jobs.cancel(job_id)


@pytest.fixture
def cvat_about():
    """A server that answers GET /api/server/about with what the test puts into `answer`."""

    class About(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(server.answer if self.path == "/api/server/about" else {}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)
            server.headers_seen.append(dict(self.headers))

        def log_message(self, *_: object) -> None:
            return None

    server = HTTPServer(("127.0.0.1", 0), About)
    server.answer, server.headers_seen = {"name": "Computer Vision Annotation Tool", "version": "2.73.0"}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ({"version": "2.73.0"}, "success", "CVAT 2.73.0 answers"),
        ({"hello": 1}, "warning", "not as CVAT does"),
        (["x"], "warning", "not as CVAT does"),
    ],
)
def test_the_cvat_page_tells_who_answers(
    empty: Workbench, visit, cvat_about, answer: object, kind: str, said: str, monkeypatch
) -> None:
    monkeypatch.setenv("WORKBENCH_CVAT_TOKEN", "s3cret-token")
    cvat_about.answer = answer
    at = visit("cvat")
    at.text_input[0].set_value(f"http://127.0.0.1:{cvat_about.server_port}/")
    button(at, "Check the connection").click().run()
    assert any(said in element.value.replace("\\", "") for element in getattr(at, kind))
    assert "s3cret" not in str(cvat_about.headers_seen)


@pytest.mark.parametrize(
    ("address", "said"),
    [("ftp://x", "not a web address"), ("cvat:8080", "not a web address"), ("http://127.0.0.1:9", "Nothing answers")],
)
def test_the_cvat_page_explains_an_address_that_does_not_work(empty: Workbench, visit, address: str, said: str) -> None:
    at = visit("cvat")
    at.text_input[0].set_value(address)
    button(at, "Check the connection").click().run()
    assert any(said in element.value.replace("\\", "") for element in [*at.error, *at.warning])
