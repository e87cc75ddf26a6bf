"""The CVAT double answers as the recorded server did: held against the recordings and CVAT's own OpenAPI file."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
import yaml
from PIL import Image

PROJECT = Path(__file__).resolve().parents[3]
for folder in (PROJECT, PROJECT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from doubles.cvat import EXPIRED, LOGIN, READ_ONLY, READ_WRITE, CvatDouble, cvat  # noqa: E402
from workbench.adapters.cvat import Connection, CvatServer  # noqa: E402
from workbench.annotation import Annotation  # noqa: E402
from workbench.dataset import Frame, LabeledFrame  # noqa: E402
from workbench.hooks import sign  # noqa: E402
from workbench.records import Records  # noqa: E402
from workbench.taxonomy import Taxonomy  # noqa: E402

HEADERS = {"Accept": "application/vnd.cvat+json", "Authorization": f"Token {LOGIN}"}


def picture(shade: int = 0) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (96, 64), (shade, shade, shade)).save(held, "JPEG")
    return held.getvalue()


@pytest.fixture
def double() -> Iterator[CvatDouble]:
    with cvat() as served:
        yield served


@pytest.fixture(scope="session")
def recorded(request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    """File -> its exchanges."""
    folder = request.getfixturevalue("shared") / "cvat-recordings"
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("*.jsonl"))}


@pytest.fixture(scope="session")
def openapi(request: pytest.FixtureRequest) -> dict[str, Any]:
    path = request.getfixturevalue("shared") / "cvat-recordings" / "cvat-2.73.0-openapi.yml.gz"
    return yaml.load(gzip.decompress(path.read_bytes()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def send(double: CvatDouble, method: str, path: str, body: Any = None, query: Any = None) -> requests.Response:
    return requests.request(method, double.url + path, headers=HEADERS, params=query, json=body, timeout=30)


def task_of_five(double: CvatDouble, project: int) -> int:
    task = send(double, "POST", "/api/tasks", {"name": "Task 1", "project_id": project, "segment_size": 3}).json()["id"]
    files = {f"client_files[{n}]": (f"img_{n:03}.jpg", picture(n), "image/jpeg") for n in range(5)}
    assert requests.post(f"{double.url}/api/tasks/{task}/data", data={"image_quality": "70"}, files=files, headers=HEADERS,
                         timeout=30).status_code == 202
    return task


def without_ids(body: Any) -> Any:
    """An answer without the numbers the server gave, and without tracks, which the double does not keep."""
    if not isinstance(body, dict) or "shapes" not in body:
        return body
    plain = {kind: [{name: value for name, value in one.items() if name != "id"} for one in body[kind]]
             for kind in ("shapes", "tags")}
    return {kind: sorted(records, key=lambda one: json.dumps(one, sort_keys=True)) for kind, records in plain.items()}


def test_recorded_annotation_requests_are_answered_as_recorded(double: CvatDouble, recorded: dict) -> None:
    project = send(double, "POST", "/api/projects", {"name": "Streets 2"}).json()["id"]
    for label in recorded["d_annotations"][2]["response_body"]["results"]:
        double.state.labels[label["id"]] = {**label, "project_id": project}
    task_of_five(double, project)
    compared = {"status": 0, "whole": 0, "refused": 0}
    ours: dict[int, int] = {}  # the recorded server's number of a shape -> the double's
    for name in ("d_annotations", "d_annotations_update"):
        for exchange in recorded[name]:
            asked = exchange["request_body"]
            if "/annotations" not in exchange["path"] or (exchange["query"] or {}).get("action") == "export":
                continue
            if isinstance(asked, dict) and asked.get("tracks"):
                continue  # tracks are not kept
            if isinstance(asked, dict) and isinstance(asked.get("text"), str):  # NaN: no JSON
                answer = requests.request(exchange["method"], double.url + exchange["path"], params=exchange["query"],
                                          data=asked["text"], headers={**HEADERS, "Content-Type": "application/json"}, timeout=30)
            else:
                for one in (asked or {}).get("shapes") or ():
                    one.update({"id": ours.get(one["id"], one["id"])} if "id" in one else {})
                answer = send(double, exchange["method"], exchange["path"], asked, exchange["query"])
            where = f"{name}:{exchange['n']} {exchange['step']}: {answer.text[:300]}"
            assert answer.status_code == exchange["status"], where
            compared["status"] += 1
            if exchange["status"] == 200:
                assert without_ids(answer.json()) == without_ids(exchange["response_body"]), where
                compared["whole"] += 1
                if asked is not None:
                    theirs = exchange["response_body"]["shapes"]
                    ours |= {one["id"]: mine["id"] for one, mine in zip(theirs, answer.json()["shapes"])}
            elif exchange["status"] == 400:
                assert answer.json() == exchange["response_body"], where
                compared["refused"] += 1
    assert compared["whole"] > 50 and compared["refused"] > 20, compared


def test_recorded_requests_to_projects_are_answered_as_recorded(double: CvatDouble, recorded: dict) -> None:
    send(double, "POST", "/api/projects", {"name": "csrf ok"})
    send(double, "POST", "/api/projects", {"name": "csrf ok"})
    compared = 0
    for exchange in recorded["b_projects"]:
        step, status = exchange["step"], exchange["status"]
        is_ours = exchange["method"] in ("GET", "POST", "PATCH") and re.search(r"/api/(projects|labels)", exchange["path"])
        # What the workbench does not use: previews, owners, assignees, limits it checks itself, labels it never makes.
        if not is_ours or re.search(r"preview|owner|assignee|300 char|unknown type|incomplete|not allowed|colour|attribute$"
                                    r"|change type|rename|after type|re-add|after delete|delete by id", step):
            continue
        answer = send(double, exchange["method"], exchange["path"], exchange["request_body"], exchange["query"])
        assert answer.status_code == status, f"{exchange['n']} {step}: {answer.text[:300]}"
        if status == 400:
            assert answer.json() == exchange["response_body"], step
        compared += 1
    assert compared >= 12


class Seen:
    """What recorded answers of one kind look like: types, and of objects the keys that are always and ever there."""

    def __init__(self) -> None:
        self.types: set[str] = set()
        self.keys: dict[str, Seen] = {}
        self.always: set[str] | None = None
        self.items: Seen | None = None

    def learn(self, value: Any) -> None:
        self.types.add(kind_of(value))
        if isinstance(value, dict):
            self.always = set(value) if self.always is None else self.always & set(value)
            for name, one in value.items():
                self.keys.setdefault(name, Seen()).learn(one)
        elif isinstance(value, list):
            for one in value:
                self.items = self.items or Seen()
                self.items.learn(one)

    def differences(self, value: Any, where: str) -> Iterator[str]:
        if kind_of(value) not in self.types:
            yield f"{where} is {kind_of(value)}, recorded: {sorted(self.types)}"
        elif isinstance(value, dict) and self.keys:
            for name in sorted((self.always or set()) - set(value)):
                yield f"{where}.{name} is missing"
            for name, one in value.items():
                if name not in self.keys:
                    yield f"{where}.{name} was never recorded"
                else:
                    yield from self.keys[name].differences(one, f"{where}.{name}")
        elif isinstance(value, list) and self.items is not None:
            for one in value:
                yield from self.items.differences(one, f"{where}[]")


def kind_of(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(type(value).__name__)
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def records_of(path: str, answer: Any) -> tuple[str, list[Any]]:
    """(the resource, its records) of a successful answer: one by its number, a new one and those of a list look alike."""
    resource = re.sub(r"/\{id\}$", "", template(path).rstrip("/"))
    if isinstance(answer, dict) and isinstance(answer.get("results"), list):
        return resource, answer["results"]
    return resource, [answer]


def template(path: str) -> str:
    path = re.sub(r"/api/requests/.+", "/api/requests/{id}", path)
    return re.sub(r"/\d+", "/{id}", path)


def exercise(double: CvatDouble, tmp_path: Path) -> None:
    """Every call the adapter makes, and cvat-sdk's own calls of the same routes."""
    path = tmp_path / "blob"
    path.write_bytes(picture())
    server = CvatServer(Connection(double.url, READ_WRITE), Records(f"sqlite:///{tmp_path}/records.sqlite").engine, job_size=2)
    server.open_task("cells", Taxonomy(("RBC", "WBC")))
    server.open_task("cells", Taxonomy(("RBC", "Platelets")))
    drawn = (Annotation("RBC", xyxy=(1, 2, 30, 40), source="model:m@1", confidence=0.5), Annotation("WBC"))
    server.add_frames("cells", [(LabeledFrame(Frame(f"{n}.jpg", 96, 64, "0" * 32), drawn if not n else None), path)
                                for n in range(3)])
    working = server.read("cells", server.frame_names("cells"))["0.jpg"]
    server.write("cells", [type(working)(**{**vars(working), "annotations": (drawn[0],)})])
    people = server.people("cells")
    job = people.jobs()[0]
    people.set_job(job.id, stage="validation", assignee="worker1")
    people.resolve_issue(people.add_issue(job.id, 0, (1, 1, 5, 5), "loose"))
    truth = people.make_ground_truth(job.task_id, [0])
    people.set_job(truth.id, "acceptance", "completed")
    people.measure_quality(job.task_id)
    people.issues()
    people.quality(job.task_id)
    for asked in ("users/self", "labels/1", f"tasks/{job.task_id}", f"jobs/{job.id}/data/meta", "quality/reports"):
        assert send(double, "GET", f"/api/{asked}").status_code == 200
    double.state.polls_until_done = 0
    send(double, "GET", "/api/requests", query={"task_id": job.task_id})
    hooks = server.hooks("cells")
    hooks.ping(hooks.connect("http://receiver.example:8080/hook", "s"))
    hooks.connect("http://receiver.example:8080/other", "t")
    hooks.find()
    people.changed()
    reviews, names = server.reviews("cells"), server.frame_names("cells")
    reviews.blocked(names)
    task = reviews.make("k", ["2.jpg"], {name: path for name in names}, job_size=2, check=lambda: None, honeypots=["0.jpg"], per_job=1)
    reviews.fill(task, {"0.jpg": (drawn[:1], drawn[:1])})
    lay = reviews.places(["2.jpg"])
    reviews.take_over(task, ["2.jpg"])
    reviews.leave(lay)
    hooks.remove()
    server.delete_task("cells")


def exchanges(double: CvatDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, Any, Any]]:
    """(method, path, status, request body, answer) of all that `exercise` did."""
    import doubles.cvat as module
    seen, answer = [], module._answer

    def remember(state: Any, asked: Any) -> Any:
        found = answer(state, asked)
        seen.append((asked.method, asked.path, found[0], None if asked.files else asked.body, json.loads(json.dumps(found[1]))))
        return found

    monkeypatch.setattr(module, "_answer", remember)
    exercise(double, tmp_path)
    return seen


def test_every_answer_has_the_recorded_form(double: CvatDouble, recorded: dict, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Seen] = {}
    pages = Seen()
    kinds = set()
    for one in [one for lines in recorded.values() for one in lines if isinstance(one["path"], str) and one["status"] < 300]:
        resource, found = records_of(one["path"], one["response_body"])
        kinds.add((one["method"], template(one["path"]).rstrip("/"), one["status"]))
        if found != [one["response_body"]]:
            pages.learn({**one["response_body"], "results": []})
        for record in found:
            known.setdefault(resource, Seen()).learn(record)
    differences, compared = set(), set()
    for method, path, status, _, answer in exchanges(double, tmp_path, monkeypatch):
        kind = (method, template(path).rstrip("/"), status)
        assert kind in kinds, f"no recorded answer of {kind}"
        compared.add(kind)
        resource, found = records_of(path, answer)
        if found != [answer]:
            differences |= set(pages.differences({**answer, "results": []}, f"page of {resource}"))
        for record in found:
            differences |= set(known[resource].differences(record, resource))
    # A map from whatever kinds of conflict there were.
    differences = {one for one in differences if ".conflicts_by_type." not in one}
    # A delivery holds what was sent, whatever its event; the test below looks at that.
    differences = {one for one in differences if "/deliveries.request" not in one}
    assert not differences, "\n".join(sorted(differences))
    assert len(compared) >= 28, sorted(compared)


def test_a_message_to_a_webhook_has_the_recorded_form_and_signature(double: CvatDouble, recorded: dict) -> None:
    """h_webhook_deliveries 24, 27: a job's state, and its stage"""
    project = send(double, "POST", "/api/projects", {"name": "p", "labels": []}).json()["id"]
    task_of_five(double, project)
    hook = {"target_url": "http://receiver.example:8080/hook", "type": "project", "project_id": project,
            "events": ["update:job"], "secret": "example-webhook-secret"}
    assert send(double, "POST", "/api/webhooks", hook).status_code == 201
    job = next(iter(double.state.jobs))
    send(double, "PATCH", f"/api/jobs/{job}", {"state": "completed"})
    send(double, "PATCH", f"/api/jobs/{job}", {"stage": "acceptance", "state": "completed"})
    lines = recorded["h_webhook_deliveries"]
    for message, line in zip(double.state.outbox, (lines[23], lines[26]), strict=True):
        ours, theirs = json.loads(message.body), line["request_body"]
        assert list(ours) == list(theirs) and set(ours["job"]) == set(theirs["job"])
        assert set(ours["changes"]) == set(theirs["changes"]) and set(ours["before_update"]) == set(theirs["before_update"])
        assert message.signature == sign("example-webhook-secret", message.body)


def resolved(schema: Any) -> Any:
    """An OpenAPI 3.0 schema as JSON Schema: `nullable` becomes a type, references to components stay."""
    if isinstance(schema, list):
        return [resolved(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {name: resolved(value) for name, value in schema.items() if name not in ("nullable", "discriminator", "default")}
    if "oneOf" in plain:
        plain["anyOf"] = plain.pop("oneOf")
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") is True else plain


def test_every_request_and_answer_fits_cvat_s_openapi_file(double: CvatDouble, openapi: dict, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    components = {"components": resolved(openapi["components"])}
    paths = {re.sub(r"\{[^}]+\}", "{id}", path).rstrip("/"): operations for path, operations in openapi["paths"].items()}
    answers = bodies = 0
    for method, path, status, body, answer in exchanges(double, tmp_path, monkeypatch):
        operation = paths[template(path).rstrip("/")][method.lower()]
        described = operation["responses"].get(str(status), {}).get("content", {})
        assert str(status) in operation["responses"] or status == 200, (method, path, status)
        # Upload-Start and Upload-Multiple are answered with nothing (recorded: c_task_data 5, 6), which the file leaves out.
        for schema in [one["schema"] for kind, one in described.items()
                       if "json" in kind and "schema" in one and answer is not None]:
            jsonschema.validate(answer, {**resolved(schema), **components})
            answers += 1
        asked = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        if asked and body and method in ("POST", "PATCH", "PUT"):
            jsonschema.validate(body, {**resolved(asked), **components})
            bodies += 1
    assert answers > 40 and bodies > 12, (answers, bodies)


def test_an_answer_of_another_form_is_noticed(recorded: dict, openapi: dict) -> None:
    """The two checks above can fail."""
    good = recorded["b_projects"][2]["response_body"]
    known = Seen()
    known.learn(good)
    assert list(known.differences(good, "answer")) == []
    assert list(known.differences({**good, "id": "3"}, "answer")) == ["answer.id is str, recorded: ['number']"]
    assert list(known.differences({name: good[name] for name in good if name != "tasks"}, "answer")) == ["answer.tasks is missing"]
    schema = {**resolved(openapi["components"]["schemas"]["ProjectRead"]), "components": resolved(openapi["components"])}
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**good, "id": "three"}, schema)


def test_cvat_sdk_drives_the_double_unmodified(double: CvatDouble, tmp_path: Path) -> None:
    from cvat_sdk import make_client, models
    from cvat_sdk.core.proxies.annotations import AnnotationUpdateAction
    from cvat_sdk.core.proxies.tasks import ResourceType
    paths = []
    for n in range(3):
        paths.append(tmp_path / f"img_{n}.jpg")
        paths[-1].write_bytes(picture(n))
    with make_client(double.url, credentials=("admin", "secret")) as client:
        client.config.status_check_period = 0.01
        project = client.projects.create({"name": "Streets", "labels": [{"name": "car", "type": "rectangle"}]})
        label = project.get_labels()[0]
        task = client.tasks.create_from_data({"name": "t", "project_id": project.id, "segment_size": 2}, paths,
                                             resource_type=ResourceType.LOCAL)
        assert task.size == 3 and [one.name for one in task.get_frames_info()] == [path.name for path in paths]
        assert task.get_frame(1).read() == paths[1].read_bytes()
        made = models.PatchedLabeledDataRequest(shapes=[models.LabeledShapeRequest(
            type="rectangle", label_id=label.id, frame=2, points=[1.0, 2.0, 3.0, 4.0], source="auto", score=0.5)])
        task.update_annotations(made, action=AnnotationUpdateAction.CREATE)
        shape, = task.get_annotations().shapes
        assert (shape.frame, shape.points, shape.score, str(shape.source)) == (2, [1.0, 2.0, 3.0, 4.0], 0.5, "auto")
        jobs = sorted(task.get_jobs(), key=lambda job: job.id)
        assert [(job.start_frame, job.stop_frame) for job in jobs] == [(0, 1), (2, 2)]
        jobs[0].update({"assignee": 2, "state": "in progress"})
        task.remove()
        assert [one.id for one in client.projects.list()] == [project.id] and client.tasks.list() == []
    with make_client(double.url, access_token=READ_WRITE) as client:
        assert client.users.retrieve_current_user().username == "admin"


@pytest.mark.parametrize("headers,status", [
    ({}, 401), ({"Authorization": f"Bearer {EXPIRED}"}, 401), ({"Authorization": f"Token {READ_WRITE}"}, 401),
    ({"Authorization": f"Bearer {READ_ONLY}"}, 403), ({"Authorization": f"Bearer {READ_WRITE}"}, 201),
    ({"Authorization": f"Token {LOGIN}"}, 201), ({"Authorization": f"Token {LOGIN}", "Accept": "application/json"}, 406)])
def test_tokens_count_as_on_the_recorded_server(double: CvatDouble, headers: dict[str, str], status: int) -> None:
    """a_auth: 16, 45, 43, 41, 39, 30, 56"""
    assert requests.post(f"{double.url}/api/projects", json={"name": "x"}, headers={"Accept": "*/*", **headers},
                         timeout=30).status_code == status
