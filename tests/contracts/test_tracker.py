"""What ports.Tracker promises, on a real MLflow server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from parts import mlflow_server
from workbench.adapters.mlflow import MlflowTracker
from workbench.errors import Invalid, NotFound, Unavailable
from workbench.ports import Tracker


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracker]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield MlflowTracker(url)


@pytest.fixture
def run_id(tracker: Tracker, request: pytest.FixtureRequest) -> str:
    return tracker.start_run("contract", request.node.name, {})


@pytest.fixture
def trained(tracker: Tracker, run_id: str, tmp_path: Path) -> str:
    """A run that stored two files under model/."""
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "model.onnx").write_bytes(b"onnx\0bytes")
    (tmp_path / "stored" / "card.json").write_text("{}")
    tracker.log_files(run_id, tmp_path / "stored", "model")
    return run_id


def test_a_run_is_created_once_for_a_job(tracker: Tracker) -> None:
    first = tracker.start_run("once", "student", {"job": "retrain-'7", "dataset": "cells@0.1.0"})
    again = tracker.start_run("once", "another name", {"job": "retrain-'7"})
    other = tracker.start_run("once", "student", {"job": "retrain-8"})

    assert again == first
    assert other != first
    assert len(tracker.runs("once")) == 2


def test_a_run_that_is_said_to_be_the_first_of_its_job_is_found_by_whoever_asks_again(tracker: Tracker) -> None:
    first = tracker.start_run("said", "trial 0", {"job": "s/0"}, is_first=True)
    other = tracker.start_run("said", "trial 1", {"job": "s/1"}, is_first=True)
    assert tracker.start_run("said", "trial 0", {"job": "s/0"}) == first != other
    assert len(tracker.runs("said")) == 2


def test_a_run_without_a_job_is_a_new_one_every_time(tracker: Tracker) -> None:
    assert tracker.start_run("plain", "a", {}) != tracker.start_run("plain", "a", {})


def test_a_run_may_be_part_of_another_and_is_read_by_its_id(tracker: Tracker) -> None:
    from mlflow import MlflowClient
    whole = tracker.start_run("nested", "sweep", {"job": "n1"})
    part = tracker.start_run("nested", "trial 0", {"job": "n1/0"}, parent=whole)
    assert tracker.start_run("nested", "trial 0", {"job": "n1/0"}, parent=whole) == part != whole
    assert MlflowClient(tracker.url).get_run(part).data.tags["mlflow.parentRunId"] == whole
    assert tracker.run(part) == next(one for one in tracker.runs("nested") if one["name"] == "trial 0")
    with pytest.raises(NotFound):
        tracker.run("0" * 32)


def test_many_steps_are_logged_at_once(tracker: Tracker, run_id: str) -> None:
    tracker.log_steps(run_id, {step: {"loss": 1 / step, "map_50": step / 1000} for step in range(1, 701)})  # 1400 numbers
    assert tracker.history(run_id, "loss") == [(step, 1 / step) for step in range(1, 701)]
    assert tracker.history(run_id, "map_50")[-1] == (700, 0.7)


def test_files_of_a_run_can_be_removed_and_others_stay(tracker: Tracker, trained: str, tmp_path: Path) -> None:
    (tmp_path / "plot.png").write_bytes(b"png")
    tracker.log_files(trained, tmp_path / "plot.png", "plots")
    for _ in range(2):  # nothing there is nothing to remove
        tracker.delete_files(trained, "model")
    with pytest.raises(NotFound):
        tracker.artifacts(trained, "model", tmp_path / "got")
    assert (tracker.artifacts(trained, "plots", tmp_path / "got2") / "plot.png").read_bytes() == b"png"


def test_params_metrics_and_tags_come_back_with_the_run(tracker: Tracker) -> None:
    run_id = tracker.start_run("logged", "student", {"job": "j1"})
    tracker.log(run_id, params={"epochs": 3, "lr": 0.001}, tags={"digest": "abc"})
    tracker.log(run_id, metrics={"map_50": 0.25}, step=1)
    tracker.log(run_id, metrics={"map_50": 0.5}, step=2)

    [run] = tracker.runs("logged")
    assert tracker.run(run_id) == run
    with pytest.raises(NotFound):
        tracker.run("0" * 32)

    assert run["run_id"] == run_id and run["name"] == "student" and run["status"] == "RUNNING"
    assert run["params"] == {"epochs": "3", "lr": "0.001"}
    assert run["metrics"] == {"map_50": 0.5}
    assert run["tags"] == {"job": "j1", "digest": "abc"}
    assert run["started_at"].endswith("+00:00") and run["finished_at"] == ""


def test_more_params_than_one_request_takes_are_all_stored(tracker: Tracker) -> None:
    run_id = tracker.start_run("many", "student", {})

    tracker.log(run_id, params={f"p{number}": number for number in range(230)})

    assert len(tracker.runs("many")[0]["params"]) == 230


def test_more_of_everything_than_one_request_takes_is_all_stored(tracker: Tracker, run_id: str) -> None:
    params, tags = {f"p{n}": str(n) for n in range(101)}, {f"t{n}": str(n) for n in range(201)}
    metrics = {f"m{n}": float(n) for n in range(1700)}
    tracker.log(run_id, params, metrics, tags)
    run = tracker.run(run_id)
    assert (run["params"], run["metrics"], run["tags"]) == (params, metrics, tags)


def test_history_tells_the_steps_of_a_metric_in_order(tracker: Tracker, run_id: str) -> None:
    for step, value in ((2, 0.5), (0, 1.0), (1, 0.75)):
        tracker.log(run_id, metrics={"loss": value}, step=step)

    assert tracker.history(run_id, "loss") == [(0, 1.0), (1, 0.75), (2, 0.5)]
    assert tracker.history(run_id, "never logged") == []


def test_runs_come_newest_first_and_no_more_than_asked_for(tracker: Tracker) -> None:
    made = []
    for name in ("first", "second", "third"):
        made.append(tracker.start_run("ordered", name, {}))
        time.sleep(0.01)  # MLflow orders by the millisecond a run started in

    assert [run["run_id"] for run in tracker.runs("ordered")] == made[::-1]
    assert [run["run_id"] for run in tracker.runs("ordered", limit=2)] == made[:0:-1]


def test_an_experiment_nobody_started_has_no_runs(tracker: Tracker) -> None:
    assert tracker.runs("never started") == []


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_finished_run_tells_how_and_when_it_ended(tracker: Tracker, status: str) -> None:
    run_id = tracker.start_run(f"ended-{status}", "student", {})

    tracker.finish_run(run_id, status)

    [run] = tracker.runs(f"ended-{status}")
    assert run["status"] == status
    assert run["finished_at"] >= run["started_at"]


def test_a_status_mlflow_does_not_know_is_invalid(tracker: Tracker, run_id: str) -> None:
    with pytest.raises(Invalid, match="FINISHED"):
        tracker.finish_run(run_id, "DONE")


def test_a_folder_of_files_comes_back_byte_for_byte(tracker: Tracker, trained: str, tmp_path: Path) -> None:
    folder = tracker.artifacts(trained, "model", tmp_path / "fetched")

    assert (folder / "model.onnx").read_bytes() == b"onnx\0bytes"
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "model.onnx"]
    assert folder.is_relative_to(tmp_path / "fetched")


def test_a_single_file_is_stored_under_the_folder(tracker: Tracker, run_id: str, tmp_path: Path) -> None:
    (tmp_path / "curve.png").write_bytes(b"png")

    tracker.log_files(run_id, tmp_path / "curve.png", "plots")

    assert (tracker.artifacts(run_id, "plots", tmp_path / "fetched") / "curve.png").read_bytes() == b"png"


def test_files_that_are_not_there_are_told(tracker: Tracker, run_id: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="gone.onnx"):
        tracker.log_files(run_id, tmp_path / "gone.onnx", "model")
    with pytest.raises(NotFound, match="nothing here"):
        tracker.artifacts(run_id, "nothing here", tmp_path)


def test_registering_makes_version_after_version(tracker: Tracker, trained: str) -> None:
    other = tracker.start_run("contract", "other", {})

    first = tracker.register("numbered", trained, "model", {"dataset": "cells@0.1.0"})
    second = tracker.register("numbered", other, "model", {})

    assert (first.version, first.run_id, first.tags) == ("1", trained, {"dataset": "cells@0.1.0"})
    assert second.version == "2"
    assert [version.version for version in tracker.versions("numbered")] == ["2", "1"]
    assert tracker.versions("numbered")[1].created_at.endswith("+00:00")


def test_registering_a_run_again_returns_the_version_there_is(tracker: Tracker, trained: str) -> None:
    first = tracker.register("again", trained, "model", {})

    assert tracker.register("again", trained, "model", {}) == first
    assert len(tracker.versions("again")) == 1


def test_a_model_nobody_registered_has_no_versions_and_no_champion(tracker: Tracker) -> None:
    assert tracker.versions("nobody registered this") == []
    assert tracker.by_alias("nobody registered this", "champion") is None


def test_an_alias_moves_from_one_version_to_another(tracker: Tracker, trained: str) -> None:
    other = tracker.start_run("contract", "other", {})
    tracker.register("moving", trained, "model", {})
    tracker.register("moving", other, "model", {})
    assert tracker.by_alias("moving", "champion") is None

    tracker.set_alias("moving", "champion", "1")
    tracker.set_alias("moving", "previous", "1")
    assert tracker.by_alias("moving", "champion").aliases == ("champion", "previous")

    tracker.set_alias("moving", "champion", "2")
    assert tracker.by_alias("moving", "champion").version == "2"
    assert {version.version: version.aliases for version in tracker.versions("moving")} == {
        "2": ("champion",),
        "1": ("previous",),
    }


def test_an_alias_for_a_version_that_does_not_exist_is_not_found(tracker: Tracker, trained: str) -> None:
    tracker.register("short", trained, "model", {})

    with pytest.raises(NotFound):
        tracker.set_alias("short", "champion", "9")


def test_a_run_that_does_not_exist_is_not_found(tracker: Tracker, tmp_path: Path) -> None:
    missing = "0" * 32

    for ask in (
        lambda: tracker.log(missing, metrics={"loss": 1.0}),
        lambda: tracker.history(missing, "loss"),
        lambda: tracker.finish_run(missing, "FINISHED"),
        lambda: tracker.run_url(missing),
        lambda: tracker.artifacts(missing, "model", tmp_path),
        lambda: tracker.register("m", missing, "model", {}),
    ):
        with pytest.raises(NotFound):
            ask()


def test_a_parameter_that_changes_its_value_is_refused(tracker: Tracker, run_id: str) -> None:
    tracker.log(run_id, params={"epochs": 3})
    tracker.log(run_id, params={"epochs": 3})

    with pytest.raises(Invalid, match="epochs"):
        tracker.log(run_id, params={"epochs": 4})


def test_the_address_of_a_run_names_its_experiment_and_itself(tracker: Tracker, run_id: str) -> None:
    address = tracker.run_url(run_id)

    assert address.startswith(f"{tracker.url}/#/experiments/")
    assert address.endswith(f"/runs/{run_id}")


def test_an_absent_server_is_unavailable_within_seconds_and_no_password_shows() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    MlflowTracker("http://127.0.0.1:1")  # nothing happens before the first question
    before = time.monotonic()

    with pytest.raises(Unavailable, match="workbench up") as caught:
        MlflowTracker(f"http://127.0.0.1:{port}").runs("any")

    assert time.monotonic() - before < 30  # measured 1 to 6 s, most of it the import of mlflow
    assert str(port) in str(caught.value)


def test_credentials_leave_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    tracker = MlflowTracker("http://ann:s3cret@127.0.0.1:1")

    with pytest.raises(Unavailable) as caught:
        tracker.runs("any")

    assert tracker.url == "http://127.0.0.1:1"
    assert "s3cret" not in str(caught.value) and "s3cret" not in str(caught.value.__cause__)


def test_a_server_that_is_no_mlflow_is_told_apart(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Broken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(500)
            self.end_headers()
            self.wfile.write(b"<html>no json</html>")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Keeps the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(Unavailable):
            MlflowTracker(f"http://127.0.0.1:{server.server_port}").versions("any")
    finally:
        server.shutdown()
        server.server_close()
