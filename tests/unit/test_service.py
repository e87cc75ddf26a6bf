"""The HTTP service over real stores: what it answers, what it refuses, and with which sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from socket import socket

import pytest
from starlette.testclient import TestClient

from workbench.blobs import digests
from workbench.config import Config
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.service.app import create
from workbench.taxonomy import Taxonomy
from workbench.wiring import Workbench


@pytest.fixture()
def config(tmp_path: Path) -> Config:
    with socket() as one, socket() as two, socket() as three, socket() as four:
        ports = []
        for listener in (one, two, three, four):
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
    return Config(home=tmp_path, ui_port=ports[0], mlflow_port=ports[1], fiftyone_port=ports[2], mongo_port=ports[3], person="ada")


@pytest.fixture()
def client(config: Config) -> Iterator[TestClient]:
    with TestClient(create(config), base_url="http://127.0.0.1") as client:
        yield client


def test_a_job_is_submitted_listed_shown_and_cancelled(client: TestClient) -> None:
    asked = {"kind": "deploy", "args": {"dataset": "cells", "model": "student@1"}, "key": "once"}
    made = client.post("/v1/jobs", json=asked)
    assert made.status_code == 202
    job = made.json()
    assert (job["kind"], job["state"], job["person"], job["args"]) == ("deploy", "queued", "ada", asked["args"])
    assert client.post("/v1/jobs", json=asked).json()["id"] == job["id"]
    assert [one["id"] for one in client.get("/v1/jobs").json()] == [job["id"]]
    assert client.get("/v1/jobs", params={"state": "done"}).json() == []
    shown = client.get(f"/v1/jobs/{job['id']}").json()
    assert shown["failed"] == {} and shown["log"] == [] and not shown["is_over"]
    assert client.delete(f"/v1/jobs/{job['id']}").json()["state"] == "cancelled"
    assert client.post("/v1/jobs", json={**asked, "person": "eve", "key": "twice"}).json()["person"] == "eve"


@pytest.mark.parametrize("method, path, body, code, says", [
    ("GET", "/v1/jobs/nothing", None, 404, "Job 'nothing' does not exist"),
    ("DELETE", "/v1/jobs/nothing", None, 404, "does not exist"),
    ("GET", "/v1/jobs?state=asleep", None, 422, "must be one of queued"),
    ("GET", "/v1/jobs?limit=many", None, 422, "limit: "),
    ("POST", "/v1/jobs", {"kind": "paint", "args": {}}, 422, "no jobs of kind 'paint'; there are upload, annotate"),
    ("POST", "/v1/jobs", {"kind": "deploy", "args": {"dataset": "a"}}, 422, "model is missing"),
    ("POST", "/v1/jobs", {"kind": "undo", "args": {"dataset": "a", "run_id": "b", "x": 1}}, 422, "x is none of them"),
    ("POST", "/v1/jobs", {"kind": "undo"}, 422, "args: Field required"),
    ("POST", "/v1/jobs", {"kind": "undo", "args": {}, "keys": ""}, 422, "keys: Extra inputs"),
    ("POST", "/v1/jobs", [1], 422, "not as it should be")])
def test_what_is_wrong_is_one_sentence(client: TestClient, method: str, path: str, body: object, code: int, says: str) -> None:
    answer = client.request(method, path, json=body)
    assert answer.status_code == code and says in answer.json()["error"]
    assert client.get("/v1/jobs").json() == []


def test_a_key_used_for_something_else_is_a_conflict(client: TestClient) -> None:
    asked = {"kind": "deploy", "args": {"dataset": "cells", "model": "student@1"}, "key": "once"}
    client.post("/v1/jobs", json=asked)
    answer = client.post("/v1/jobs", json={**asked, "args": {"dataset": "cells", "model": "student@2"}})
    assert answer.status_code == 409 and "other arguments" in answer.json()["error"]


def test_health_says_what_is_wrong_with_each_part(client: TestClient) -> None:
    answer = client.get("/health")
    assert answer.status_code == 503 and not answer.json()["ok"]
    parts = answer.json()["parts"]
    assert set(parts) == {"mongod", "ui", "worker", "service", "mlflow", "fiftyone"}
    assert "No worker runs" in parts["worker"] and "does not answer" in parts["mlflow"]
    assert client.get("/alive").status_code == 200


def test_datasets_models_and_metrics_tell_what_is_there(client: TestClient, config: Config) -> None:
    assert client.get("/v1/datasets").json() == [] and client.get("/v1/models").json() == []
    workbench = Workbench(config)
    made = workbench.blobs.put(PIXEL)
    frame = Frame("a.png", 1, 1, made.md5, made.sha256, made.size_bytes)
    workbench.datasets.publish("cells", Manifest(Taxonomy(("cell",)), (LabeledFrame(frame, (), "train"),)), "first", "ada")
    (one,) = client.get("/v1/datasets").json()
    assert one["name"] == "cells" and one["versions"][0]["ref"] == "cells@0.1.0" and one["versions"][0]["labels"] == ["cell"]
    client.post("/v1/jobs", json={"kind": "deploy", "args": {"dataset": "cells", "model": "student@1"}})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    for line in ('workbench_jobs{kind="deploy",state="queued"} 1.0', 'workbench_jobs{kind="annotate",state="failed"} 0.0',
                 "workbench_workers 0.0", 'workbench_dataset_versions{dataset="cells"} 1.0', "workbench_models 0.0"):
        assert line in lines
    assert all(line.startswith("#") or len(line.rsplit(" ", 1)) == 2 and float(line.rsplit(" ", 1)[1]) >= 0 for line in lines)


def test_a_page_of_another_name_that_resolves_to_us_is_refused(config: Config) -> None:
    for settings, host, code in ((config, "evil.example", 400), (config, "127.0.0.1:8600", 200), (config, "localhost", 200),
                                 (replace(config, allowed_hosts="bench.example, other"), "bench.example", 200)):
        with TestClient(create(settings), base_url=f"http://{host}") as client:
            assert client.get("/alive").status_code == code, host


def test_no_other_site_may_read_answers(client: TestClient) -> None:
    answer = client.get("/v1/jobs", headers={"Origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_with_a_token_set_only_its_bearer_gets_in(config: Config) -> None:
    with TestClient(create(replace(config, service_token="välid-token")), base_url="http://127.0.0.1") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic välid-token".encode()},
                        {"Authorization": "Bearer "}):
            for method, path in (("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/health"), ("GET", "/metrics"),
                                 ("GET", "/v1/datasets"), ("GET", "/v1/models"), ("DELETE", "/v1/jobs/a")):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path)
                assert "Authorization: Bearer" in answer.json()["error"] and "lid-token" not in answer.text
        # A header is bytes; Starlette reads them as Latin-1.
        good = {"Authorization": "Bearer välid-token".encode()}
        assert client.get("/v1/jobs", headers=good).json() == []
        assert client.get("/alive").status_code == 200


def test_the_token_shows_nowhere(config: Config) -> None:
    assert "s3cret" not in repr(replace(config, service_token="s3cret"))


# One black pixel.
PIXEL = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63600000000200"
                      "01e221bc330000000049454e44ae426082")
assert digests(PIXEL).size_bytes == len(PIXEL)
