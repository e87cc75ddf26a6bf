"""CVAT's webhooks at the HTTP service: who is let in, what is refused, and that ten messages are one pull."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

PROJECT = Path(__file__).resolve().parents[3]
for folder in (PROJECT, PROJECT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from doubles.cvat import READ_ONLY, CvatDouble, cvat  # noqa: E402
from doubles.cvat_hooks import Message  # noqa: E402
from doubles.cvat_work import accept, workbench_on  # noqa: E402
from workbench.adapters.cvat import Connection  # noqa: E402
from workbench.adapters.cvat.hooks import HooksInCvat  # noqa: E402
from workbench.errors import Invalid  # noqa: E402
from workbench.hooks import SIGNATURE, WINDOW_S, Hooks, is_signed, sign  # noqa: E402
from workbench.ports import Quiet  # noqa: E402
from workbench.service.app import create  # noqa: E402
from workbench.service.cvat_hooks import MOST_BYTES, CvatHooks  # noqa: E402
from workbench.steps.cvat_pull import connect, disconnect, look, pull  # noqa: E402
from workbench.wiring import Workbench  # noqa: E402

ADDRESS = "http://workbench.example:8600"


@pytest.fixture
def double() -> Iterator[CvatDouble]:
    with cvat() as served:
        yield served


@pytest.fixture
def workbench(double: CvatDouble, tmp_path: Path) -> Workbench:
    return workbench_on(double, tmp_path / "home")


@pytest.fixture
def client(workbench: Workbench) -> Iterator[TestClient]:
    from workbench.service.app import _refuse
    from workbench.errors import WorkbenchError
    app = FastAPI()
    app.include_router(CvatHooks(workbench).router())
    app.add_exception_handler(WorkbenchError, _refuse)
    with TestClient(app, base_url=ADDRESS) as client:
        yield client


def connected(workbench: Workbench) -> None:
    connect("cells", ADDRESS, in_cvat=workbench.cvat.hooks("cells"), hooks=workbench.hooks)


def deliver(client: TestClient, message: Message) -> int:
    return client.post(message.target.removeprefix(ADDRESS), content=message.body,
                       headers={SIGNATURE: message.signature, "Content-Type": "application/json"}).status_code


def pulls(workbench: Workbench) -> list[str]:
    return [job.id for job in workbench.jobs.list(kind="pull")]


def submit(workbench: Workbench):
    return CvatHooks(workbench).submit


def test_the_recorded_messages_carry_the_signature_we_compute(shared: Path) -> None:
    folder = shared / "cvat-recordings" / "vectors"
    for name in ("webhook_create_task", "webhook_update_job"):
        body, given = (folder / f"{name}.raw.json").read_bytes(), (folder / f"{name}.signature.txt").read_text().strip()
        given = given.partition(": ")[2] or given
        assert is_signed("example-webhook-secret", body, given)
        assert not is_signed("example-webhook-secret", body + b" ", given)
        assert not is_signed("another", body, given) and not is_signed(None, body, given)


def test_a_connected_hook_announces_one_pull_for_all_messages_of_a_job(
        workbench: Workbench, double: CvatDouble, client: TestClient) -> None:
    double.state.post = lambda message: deliver(client, message)
    connected(workbench)
    hook = workbench.cvat.hooks("cells").find()
    assert (hook.last.event, hook.last.status) == ("ping", 200)
    assert hook.address == f"{ADDRESS}/v1/cvat/webhooks/cells"
    job = workbench.cvat.people("cells").jobs()[0]
    workbench.cvat.people("cells").set_job(job.id, state="in progress")
    assert pulls(workbench) == []  # nothing is accepted yet
    for _ in range(5):
        accept(workbench, job.id)
    assert [one["status_code"] for one in double.state.deliveries[hook.id]] == [200] * 7
    assert len(pulls(workbench)) == 1
    done = pull("cells", server=workbench.cvat, store=workbench.datasets, records=workbench.records,
                hooks=workbench.hooks, job=Quiet(), person="ada", gather_s=0)
    assert (done.jobs, done.frames, done.decisions, done.next) == ((job.id,), 2, 2, "0.2.0")
    workbench.cvat.people("cells").set_job(job.id, state="in progress")  # reopened: what is offered is over
    assert len(pulls(workbench)) == 2


def test_a_message_is_answered_within_a_moment_and_needs_no_token(double: CvatDouble, tmp_path: Path) -> None:
    workbench = workbench_on(double, tmp_path / "home", service_token="s3cret")
    connected(workbench)
    accept(workbench, workbench.cvat.people("cells").jobs()[0].id)
    message = double.state.outbox[-1]
    with TestClient(create(replace(workbench.config, cvat_look_s=0)), base_url="http://127.0.0.1") as client:
        start = time.monotonic()
        answer = client.post("/v1/cvat/webhooks/cells", content=message.body, headers={SIGNATURE: message.signature})
        assert answer.status_code == 200 and answer.json()["taken"], answer.text
        assert time.monotonic() - start < 10
        assert client.get("/v1/jobs").status_code == 401


@pytest.mark.parametrize("signature", ["", "sha256=", "sha256=" + "0" * 64, "sha1=abc", "\xff"])
def test_a_wrong_signature_is_refused_and_does_nothing(
        workbench: Workbench, double: CvatDouble, client: TestClient, signature: str) -> None:
    connected(workbench)
    accept(workbench, workbench.cvat.people("cells").jobs()[0].id)
    body = double.state.outbox[-1].body
    answer = client.post("/v1/cvat/webhooks/cells", content=body, headers={SIGNATURE: signature.encode("latin-1")})
    assert answer.status_code == 401 and "Connect the data set again" in answer.json()["error"]
    assert pulls(workbench) == []
    # A data set without a hook, or that does not exist, answers the same.
    for path in ("nothing", "..%2f..%2fetc"):
        assert client.post(f"/v1/cvat/webhooks/{path}", content=body, headers={SIGNATURE: sign("", body)}).status_code in (401, 404)


def test_a_message_for_one_data_set_is_none_for_another(workbench: Workbench, double: CvatDouble, client: TestClient) -> None:
    connected(workbench)
    workbench.hooks.new_secret("others")
    accept(workbench, workbench.cvat.people("cells").jobs()[0].id)
    message = double.state.outbox[-1]
    headers = {SIGNATURE: message.signature}
    assert client.post("/v1/cvat/webhooks/others", content=message.body, headers=headers).status_code == 401


def test_the_same_message_again_is_refused_also_with_its_keys_in_another_order(
        workbench: Workbench, double: CvatDouble, client: TestClient) -> None:
    connected(workbench)
    accept(workbench, workbench.cvat.people("cells").jobs()[0].id)
    message = double.state.outbox[-1]
    assert deliver(client, message) == 200
    assert deliver(client, message) == 409
    turned = json.dumps(dict(reversed(json.loads(message.body).items()))).encode()
    assert turned != message.body
    secret = workbench.hooks.secret("cells")
    assert deliver(client, replace(message, body=turned, signature=sign(secret, turned))) == 409
    assert len(pulls(workbench)) == 1


def test_an_old_message_is_refused_and_one_from_the_future_too(
        workbench: Workbench, double: CvatDouble, client: TestClient) -> None:
    connected(workbench)
    accept(workbench, workbench.cvat.people("cells").jobs()[0].id)
    message, clock = double.state.outbox[-1], workbench.hooks.clock
    for shift in (WINDOW_S + 60, -WINDOW_S):
        workbench.hooks.clock = lambda: clock() + shift
        assert deliver(client, message) == 409
    workbench.hooks.clock = clock
    assert deliver(client, message) == 200


def test_a_message_whose_work_could_not_be_queued_may_come_again(
        workbench: Workbench, double: CvatDouble) -> None:
    from workbench.steps.cvat_pull import receive
    connected(workbench)
    accept(workbench, workbench.cvat.people("cells").jobs()[0].id)
    message = double.state.outbox[-1]

    def broken(dataset: str, token: str) -> str:
        raise OSError("the database is away")

    with pytest.raises(OSError):
        receive("cells", message.body, message.signature, hooks=workbench.hooks, submit=broken)
    assert receive("cells", message.body, message.signature, hooks=workbench.hooks, submit=submit(workbench))["taken"]


@pytest.mark.parametrize("body, code", [
    (b"", 422), (b"[]", 422), (b"{", 422), (b"\xff\xfe", 422), (b'{"event": 1}', 200), (b'{"event": "update:job"}', 422),
    (b'{"event": "update:job", "job": {"updated_date": "yesterday"}}', 422),
    (b'{"event": "update:job", "job": null}', 422), (b'{"event": "delete:task"}', 200), (b"[" * 5000, 422),
    (b"x" * (MOST_BYTES + 1), 413)])
def test_what_is_no_message_is_refused_with_a_sentence(workbench: Workbench, client: TestClient, body: bytes, code: int) -> None:
    workbench.hooks.new_secret("cells")
    answer = client.post("/v1/cvat/webhooks/cells", content=body,
                         headers={SIGNATURE: sign(workbench.hooks.secret("cells"), body)})
    assert answer.status_code == code, answer.text
    assert pulls(workbench) == []


def test_the_secret_is_the_owner_s_alone_and_a_new_one_ends_the_old(workbench: Workbench, double: CvatDouble) -> None:
    connected(workbench)
    first, file = workbench.hooks.secret("cells"), workbench.config.home / "hooks" / "cells.secret"
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600 and len(first) == 64
    connected(workbench)
    assert workbench.hooks.secret("cells") != first
    assert list(double.state.secrets.values()) == [workbench.hooks.secret("cells")]  # one hook, with the new secret
    assert first not in json.dumps(list(double.state.webhooks.values()))
    disconnect("cells", in_cvat=workbench.cvat.hooks("cells"), hooks=workbench.hooks)
    assert double.state.webhooks == {} and workbench.hooks.secret("cells") is None and list(file.parent.iterdir()) == []
    disconnect("cells", in_cvat=workbench.cvat.hooks("cells"), hooks=workbench.hooks)


def test_without_the_right_to_make_hooks_nothing_stays_behind(workbench: Workbench, double: CvatDouble) -> None:
    in_cvat = HooksInCvat(Connection(double.url, READ_ONLY), workbench.cvat.project("cells"))
    with pytest.raises(Invalid, match="may only read.*read and write"):
        connect("cells", ADDRESS, in_cvat=in_cvat, hooks=workbench.hooks)
    assert workbench.hooks.secret("cells") is None and workbench.hooks.followed("cells").hook_id is None


def test_a_look_finds_what_a_lost_message_missed_and_costs_one_request_otherwise(
        workbench: Workbench, double: CvatDouble) -> None:
    def looked() -> str | None:
        return look("cells", server=workbench.cvat, hooks=workbench.hooks, submit=submit(workbench))

    assert looked() is None
    accept(workbench, workbench.cvat.people("cells").jobs()[0].id)
    double.state.outbox.clear()  # lost
    announced = looked()
    assert announced is not None and looked() == announced and pulls(workbench) == [announced]
    pull("cells", server=workbench.cvat, store=workbench.datasets, records=workbench.records, hooks=workbench.hooks,
         job=Quiet(), person="ada", gather_s=0)
    assert looked() is None
    double.journal.clear()
    assert looked() is None and len(double.journal) == 1
    # Somebody draws in a job that is not accepted: a look at all jobs, and no pull.
    workbench.cvat.people("cells").set_job(workbench.cvat.people("cells").jobs()[2].id, state="in progress")
    assert looked() is None and len(pulls(workbench)) == 1


def test_one_process_looks_at_a_time(workbench: Workbench) -> None:
    one, other = workbench.hooks, Hooks(workbench.records.engine, workbench.config.home / "hooks")
    assert one.looks("cells", 60) and not other.looks("cells", 60) and not one.looks("cells", 60)
    other.clock = lambda: time.time() + 61
    assert other.looks("cells", 60)


def test_a_look_that_fails_leaves_the_other_data_sets_alone(workbench: Workbench, double: CvatDouble,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    service = CvatHooks(workbench)
    double.fail("GET", "/api/jobs", "html", times=20)
    service.look_once()
    assert "The look at cells in CVAT failed" in caplog.text and "cvat_url" in caplog.text
    double.faults.clear()
    accept(workbench, workbench.cvat.people("cells").jobs()[0].id)
    workbench.hooks.note("cells", looked_at=0.0)
    service.look_once()
    assert len(pulls(workbench)) == 1
