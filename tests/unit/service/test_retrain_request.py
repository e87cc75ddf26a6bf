"""POST /retrain: answered before anything is fetched, the same key once, and what is refused at the door."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate
from starlette.testclient import TestClient

from workbench.blobs import digests
from workbench.config import Config
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Invalid
from workbench.service.app import create
from workbench.taxonomy import Taxonomy
from workbench.wiring import PROJECT, Workbench

SHA = "0123456789abcdef0123456789abcdef01234567"
# Nothing answers there: a request that fetched would be told so.
LISTED = "https://127.0.0.1:9/acme"
# One black pixel.
PIXEL = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63600000000200"
                      "01e221bc330000000049454e44ae426082")


@pytest.fixture()
def config(tmp_path: Path) -> Config:
    return Config(home=tmp_path / "home", person="ada", retrain_repositories=f"{LISTED}, {tmp_path / 'recipes'}", retrain_queue=3)


@pytest.fixture()
def workbench(config: Config) -> Workbench:
    workbench = Workbench(config)
    publish(workbench, 1)
    return workbench


@pytest.fixture()
def client(workbench: Workbench) -> Iterator[TestClient]:
    with TestClient(create(workbench.config), base_url="http://127.0.0.1") as client:
        yield client


def publish(workbench: Workbench, frames: int) -> str:
    made = workbench.blobs.put(PIXEL)
    assert made.md5 == digests(PIXEL).md5
    labeled = tuple(LabeledFrame(Frame(f"{number}.png", 1, 1, made.md5, made.sha256, made.size_bytes), (), "train")
                    for number in range(frames))
    return workbench.datasets.publish("cells", Manifest(Taxonomy(("cell",)), labeled), "m", "ada <ada@example.org>").ref


def body(**changed: Any) -> dict[str, Any]:
    return {"experiment_name": "cells nightly", "git_uri": f"{LISTED}/student.git", "MLproject_location": "models/tiny",
            "commit_hash": SHA, "dataset_repo": "cells", **changed}


@pytest.mark.parametrize("path", ["/retrain", "/v1/retrain"])
def test_a_request_is_answered_at_once_and_is_a_job_with_status_log_and_cancel(client: TestClient, path: str) -> None:
    client.get("/v1/jobs")
    start = time.monotonic()
    answer = client.post(path, json=body(parameters={"epochs": 3, "rate": 0.1, "size": "small", "shift": "-2"}, version="0.1.0",
                                         primary_metric="loss", lower_is_better=True, model_name="cells-nightly",
                                         environment="locked", limits={"wall_s": 60}))
    assert answer.status_code == 202 and time.monotonic() - start < 10  # a second in peace; other tests share the cores
    told = answer.json()
    assert told["state"] == "queued" and answer.headers["location"] == told["status"] == f"{path}/{told['job_id']}"
    status = client.get(told["status"]).json()
    assert (status["kind"], status["state"], status["person"], status["is_over"]) == ("retrain", "queued", "ada", False)
    assert {key: value for key, value in status["args"].items() if key != "request"} == {
        "repository": f"{LISTED}/student.git", "commit": SHA, "location": "models/tiny", "experiment": "cells nightly",
        "version": "cells@0.1.0", "register_as": "cells-nightly", "primary": "loss", "lower_is_better": True,
        "params": {"epochs": 3, "rate": 0.1, "size": "small", "shift": "-2"}, "environment": "locked",
        "limits": {"wall_s": 60}}
    log = client.get(told["log"])
    assert log.status_code == 200 and log.headers["content-type"].startswith("text/plain")
    assert client.delete(told["status"]).json()["state"] == "cancelled"
    assert client.get(f"/v1/jobs/{told['job_id']}").json()["state"] == "cancelled"


def test_the_log_ends_with_what_the_training_printed_without_passwords(client: TestClient, config: Config) -> None:
    job = client.post("/retrain", json=body()).json()["job_id"]
    (config.home / "trainings" / job).mkdir(parents=True)
    (config.home / "trainings" / job / "log.txt").write_text("epoch 1\nfrom https://ann:s3cret@host/x\n")
    text = client.get(f"/retrain/{job}/log").text
    assert "epoch 1" in text and "s3cret" not in text


def test_the_same_key_is_the_same_job_also_after_a_new_version_and_another_body_is_a_conflict(
        client: TestClient, workbench: Workbench) -> None:
    key = {"Idempotency-Key": "night 7"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/retrain", json=body(), headers=key), range(20)))
    assert {answer.status_code for answer in answers} == {202}
    (job,) = {answer.json()["job_id"] for answer in answers}
    assert publish(workbench, 2) == "cells@0.1.1"
    assert client.post("/v1/retrain", json=body(), headers=key).json()["job_id"] == job
    assert client.get(f"/retrain/{job}").json()["args"]["version"] == "cells@0.1.0"
    answer = client.post("/retrain", json=body(parameters={"epochs": 9}), headers=key)
    assert answer.status_code == 409 and "another request" in answer.json()["error"]
    other = client.post("/retrain", json=body()).json()["job_id"]
    assert other != job and client.get(f"/retrain/{other}").json()["args"]["version"] == "cells@0.1.1"
    assert len(client.get("/v1/jobs").json()) == 2


def test_a_full_queue_is_429_with_when_to_ask_again_and_a_known_key_still_gets_its_job(client: TestClient) -> None:
    first = client.post("/retrain", json=body(), headers={"Idempotency-Key": "a"}).json()["job_id"]
    with ThreadPoolExecutor(8) as pool:
        codes = [answer.status_code for answer in pool.map(lambda _: client.post("/retrain", json=body()), range(10))]
    assert sorted(codes) == [202] * 2 + [429] * 8
    full = client.post("/retrain", json=body())
    assert full.status_code == 429 and int(full.headers["retry-after"]) > 0 and "retrain_queue" in full.json()["error"]
    assert client.post("/retrain", json=body(), headers={"Idempotency-Key": "a"}).json()["job_id"] == first
    client.delete(f"/retrain/{first}")
    assert client.post("/retrain", json=body()).status_code == 202


def test_a_data_set_may_be_named_by_its_repository_and_the_project_is_always_allowed(client: TestClient, workbench: Workbench) -> None:
    url = workbench.datasets.checkout_url("cells")
    for named in ("cells", url, f"file://{url}", f"{url}/"):
        answer = client.post("/retrain", json=body(dataset_repo=named, git_uri=str(PROJECT)))
        job = answer.json()["job_id"]
        assert client.get(f"/retrain/{job}").json()["args"]["version"] == "cells@0.1.0"
        client.delete(f"/retrain/{job}")


@pytest.mark.parametrize(("changed", "says"), [
    ({"git_uri": "https://ann:s3cret@127.0.0.1:9/acme/x"}, "carries credentials"),
    ({"git_uri": "https://s3cret@127.0.0.1:9/acme/x"}, "carries credentials"),
    ({"git_uri": "ssh://git:s3cret@host/acme/x"}, "carries credentials"),
    ({"git_uri": f"{LISTED}/x?token=s3cret"}, "? or #"),
    ({"git_uri": "ext::sh -c touch% s3cret"}, "other transports"),
    ({"git_uri": "--upload-pack=touch s3cret"}, "other transports"),
    ({"git_uri": "-oProxyCommand=s3cret"}, "other transports"),
    ({"git_uri": "ssh://-oProxyCommand=s3cret/x"}, "could read as something else"),
    ({"git_uri": "git@host:s3cret"}, "other transports"),
    ({"git_uri": "http://127.0.0.1:9/acme/x"}, "other transports"),
    ({"git_uri": f"{LISTED}/x\n--upload-pack=s3cret"}, "one line"),
    ({"git_uri": f"{LISTED}/../s3cret"}, "could read as something else"),
    ({"git_uri": "https://a[::1]/s3cret"}, "could read as something else"),
    ({"git_uri": "https://[v1.s3cret]/x"}, "could read as something else"),
    ({"git_uri": "https://[fe80::1%25s3cret]/x"}, "could read as something else"),
    ({"git_uri": "https://[::1]/x"}, "setting retrain_repositories"),
    ({"git_uri": f"{LISTED}/%2e%2e/s3cret"}, "could read as something else"),
    ({"git_uri": "https://127.0.0.1:9/acme-of-another/x"}, "setting retrain_repositories"),
    ({"git_uri": "https://127.0.0.1/acme/x"}, "setting retrain_repositories"),
    ({"git_uri": "file:///etc"}, "setting retrain_repositories"),
    ({"git_uri": "file://server/etc"}, "without host"),
    ({"git_uri": "/etc"}, "setting retrain_repositories"),
    ({"git_uri": f"{PROJECT}/../elsewhere"}, "without '..'"),
    ({"git_uri": ""}, "one line"),
    ({"commit_hash": "-h"}, "40 lower-case hexadecimal"),
    ({"commit_hash": SHA[:12]}, "40 lower-case hexadecimal"),
    ({"commit_hash": ""}, "40 lower-case hexadecimal"),
    ({"commit_hash": "main"}, "40 lower-case hexadecimal"),
    ({"commit_hash": SHA + "\n"}, "40 lower-case hexadecimal"),
    ({"MLproject_location": "models/../../x"}, "inside the repository"),
    ({"MLproject_location": "/models"}, "inside the repository"),
    ({"MLproject_location": "-h"}, "inside the repository"),
    ({"MLproject_location": ".git/x"}, "inside the repository"),
    ({"MLproject_location": "a#b"}, "inside the repository"),
    ({"parameters": {"mood": "good; touch x"}}, "must be a plain word"),
    ({"parameters": {"mood": "$(touch x)"}}, "must be a plain word"),
    ({"parameters": {"mood": "--help"}}, "must be a plain word"),
    ({"parameters": {"a b;": 1}}, "Names in parameters"),
    ({"parameters": {"mood": ["x"]}}, "parameters.mood"),
    ({"dataset_repo": "cats"}, "dataset_repo is no data set of this workbench"),
    ({"dataset_repo": "https://host/cells.git"}, "dataset_repo is no data set of this workbench"),
    ({"dataset_repo": "/\ud800"}, "dataset_repo: "),
    ({"version": "9.9.9"}, "has no version 9.9.9"),
    ({"version": "main"}, "MAJOR.MINOR.PATCH"),
    ({"base_model": "nobody@1"}, "nobody@1"),
    ({"base_model": "../x"}, "must read name@version"),
    ({"model_name": "../x"}, "model_name must be"),
    ({"experiment_name": "--help"}, "experiment_name must"),
    ({"experiment_name": "a\nb"}, "experiment_name must"),
    ({"primary_metric": "$(x)"}, "primary_metric must"),
    ({"branch": "main"}, "branch: Extra inputs"),
    ({"environment": "docker"}, "An environment is current"),
    ({"limits": {"gpus": 1}}, "There is no limit gpus to ask for; there are wall_s"),
    ({"limits": {"wall_s": -1}}, "Limit wall_s must be a whole number"),
    ({"limits": {"wall_s": True}}, "limits.wall_s: Input should be a valid integer"),
    ({"parameters": {"epochs": 10**400}}, "Parameter epochs of recipe models/tiny must be a number"),
    ({"MLproject_location": ".", "parameters": {"epochs": float("inf")}}, "Parameter epochs of recipe student must be"),
])
def test_what_cannot_be_trained_is_one_sentence_and_no_job(client: TestClient, changed: dict[str, Any], says: str) -> None:
    answer = client.post("/retrain", content=json.dumps(body(**changed)), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and says in answer.json()["error"], answer.text
    assert "s3cret" not in answer.text and client.get("/v1/jobs").json() == []


@pytest.mark.parametrize(("sent", "kind", "says"), [
    (b"{", "application/json", "the body is no JSON (Expecting property name"),
    (b"[1]", "application/json", "the body is no JSON object"),
    (b"experiment_name=x", "application/x-www-form-urlencoded", "without the header 'Content-Type: application/json'"),
    (json.dumps(body()).encode(), "", "without the header 'Content-Type: application/json'"),
])
def test_a_body_that_is_no_json_object_is_told_so(client: TestClient, sent: bytes, kind: str, says: str) -> None:
    answer = client.post("/retrain", content=sent, headers={"Content-Type": kind})
    assert answer.status_code == 422 and says in answer.json()["error"], answer.text


@pytest.mark.parametrize("path", ["/retrain", "/v1/retrain", "/v1/jobs"])
def test_a_body_beyond_a_mebibyte_is_not_read_into_memory_whoever_sends_it(workbench: Workbench, path: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield from [b" " * 2**16] * 32

    with TestClient(create(replace(workbench.config, service_token="t0ken")), base_url="http://127.0.0.1") as client:
        answer = client.post(path, content=pieces(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and "more than 1024 KiB" in answer.json()["error"], answer.text
        assert client.post("/retrain", json=body(), headers={"Authorization": "Bearer t0ken"}).status_code == 202


def test_a_link_below_a_listed_folder_does_not_lead_out_of_it(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "recipes" / "link").symlink_to(tmp_path / "elsewhere")
    assert client.post("/retrain", json=body(git_uri=str(tmp_path / "recipes" / "link"))).status_code == 422
    assert client.post("/retrain", json=body(git_uri=f"file://{tmp_path}/recipes/own")).status_code == 202


def test_the_name_of_another_data_set_s_models_is_refused(client: TestClient, workbench: Workbench) -> None:
    made = workbench.blobs.put(PIXEL)
    frame = LabeledFrame(Frame("a.png", 1, 1, made.md5, made.sha256, made.size_bytes), (), "train")
    workbench.datasets.publish("cats", Manifest(Taxonomy(("cat",)), (frame,)), "m", "ada <ada@example.org>")
    answer = client.post("/retrain", json=body(model_name="cats-detector"))
    assert answer.status_code == 422 and "belongs to data set cats" in answer.json()["error"]
    assert client.post("/retrain", json=body(model_name="cells-detector")).status_code == 202


def test_an_address_with_a_password_is_not_stored_by_the_general_door_either(client: TestClient) -> None:
    args = {"version": "cells@0.1.0", "repository": f"https://ann:s3cret@{LISTED[8:]}/x", "commit": SHA, "location": "."}
    answer = client.post("/v1/jobs", json={"kind": "retrain", "args": args})
    assert answer.status_code == 422 and "carries credentials" in answer.text and "s3cret" not in answer.text
    assert client.get("/v1/jobs").json() == []


def test_other_jobs_are_no_retrainings(client: TestClient) -> None:
    job = client.post("/v1/jobs", json={"kind": "deploy", "args": {"dataset": "cells", "model": "student@1"}}).json()["id"]
    for method, path in (("GET", job), ("GET", f"{job}/log"), ("DELETE", job), ("GET", "nothing")):
        assert client.request(method, f"/retrain/{path}").status_code == 404
    assert client.get(f"/v1/jobs/{job}").json()["state"] == "queued"


def test_without_the_token_nobody_retrains_looks_or_cancels(workbench: Workbench) -> None:
    with TestClient(create(replace(workbench.config, service_token="t0ken")), base_url="http://127.0.0.1") as client:
        for method, path in (("POST", ""), ("GET", "/a"), ("GET", "/a/log"), ("DELETE", "/a")):
            for prefix in ("/retrain", "/v1/retrain"):
                assert client.request(method, prefix + path, json=body() if method == "POST" else None).status_code == 401
        answer = client.post("/retrain", json=body(), headers={"Authorization": "Bearer t0ken"})
        assert answer.status_code == 202


def test_a_setting_that_lists_no_address_is_told_when_the_service_starts(config: Config) -> None:
    with pytest.raises(Invalid, match="retrain_repositories, entry 2") as told:
        create(replace(config, retrain_repositories="https://host, https://ann:s3cret@host/x"))
    assert "s3cret" not in str(told.value)
    with pytest.raises(Invalid, match="retrain_queue must be at least 1"):
        create(replace(config, retrain_queue=0))


def test_the_service_describes_retrain_as_openapi(client: TestClient) -> None:
    told = client.get("/openapi.json").json()
    validate(told)
    post = told["paths"]["/retrain"]["post"]
    assert {"202", "401", "409", "422", "429"} <= set(post["responses"]) and post["security"] == [{"HTTPBearer": []}]
    assert "Retry-After" in post["responses"]["429"]["headers"]
    required = told["components"]["schemas"]["RetrainRequest"]["required"]
    assert set(required) == {"experiment_name", "git_uri", "MLproject_location", "commit_hash", "dataset_repo"}
