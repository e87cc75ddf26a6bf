"""The gateway that CVAT takes for its Nuclio, asked with CVAT's recorded calls."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from doubles import graphs
from onnx import numpy_helper
from starlette.testclient import TestClient

from workbench.boxes import Detections
from workbench.config import Config
from workbench.errors import Invalid, NotFound
from workbench.formats.nuclio import Function, answer
from workbench.inference.graph import file_record
from workbench.inference.probe import plan_for
from workbench.model import ModelCard
from workbench.service.app import create
from workbench.service.nuclio import Gateway, networks, refused_callers
from workbench.steps.cvat_gateway import deploy_to_cvat, withdraw_from_cvat
from workbench.wiring import Workbench

RED, BLUE = (255, 0, 0), (0, 0, 255)
MAKERS = {"finder": graphs.red_finder, "masks": graphs.red_masks, "tags": graphs.red_tags}
# What CVAT sends with every call (recorded: g_nuclio_side 3).
HEADERS = {
    "x-nuclio-project-name": "cvat",
    "x-nuclio-function-namespace": "nuclio",
    "x-nuclio-invoke-via": "domain-name",
    "X-Nuclio-Invoke-Timeout": "120s",
    "x-nuclio-path": "/",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with measured plans, so that not every test waits for the measurement."""
    folder = tmp_path_factory.mktemp("gateway")
    workbench = Workbench(Config(home=folder, backend="onnxruntime", threads=1))
    for name, make in MAKERS.items():
        card = make(folder / "graphs" / name)
        workbench.models.register(card, folder / "graphs" / name)
        plan_for(
            card,
            workbench.models.folder(card.ref),
            workbench.open_backend,
            folder / "plans.json",
            seconds=0.05,
            cores=1,
        )
    return folder


@pytest.fixture()
def workbench(home: Path, tmp_path: Path) -> Workbench:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    return Workbench(Config(home=tmp_path, backend="onnxruntime", threads=1, gateway_body_mb=1))


@pytest.fixture()
def client(workbench: Workbench) -> Iterator[TestClient]:
    with TestClient(create(workbench.config), base_url="http://127.0.0.1", client=("127.0.0.1", 5)) as client:
        yield client


def deployed(workbench: Workbench, model: str = "finder@1", **how: Any) -> str:
    return deploy_to_cvat(
        model,
        models=workbench.models,
        records=workbench.records,
        person="me",
        certificates=workbench.certificates,
        open_backend=workbench.open_backend,
        **how,
    ).name


def picture(column: int, row: int = 0, colour: tuple[int, int, int] = RED, side: int = 64) -> str:
    """64 x 64 in base64, with one square of 8 pixels; the finder sees a box of 16 around the square's middle."""
    image = np.full((side, side, 3), 30, np.uint8)
    image[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = colour
    return encoded(image)


def encoded(image: np.ndarray) -> str:
    return base64.b64encode(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()).decode()


def invoke(client: TestClient, name: str, body: dict[str, Any] | bytes, **headers: str) -> Any:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(
        "/api/function_invocations",
        content=sent,
        headers={**HEADERS, "x-nuclio-function-name": name, "Content-Type": "application/json", **headers},
    )


def recorded(shared: Path, file: str = "g_nuclio_side.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared / "cvat-recordings" / file).read_text().splitlines()]


def as_cvat_reads(function: dict[str, Any]) -> tuple[str, str, list[dict[str, Any]]]:
    """(id, kind, labels), with each key that CVAT 2.73 needs: a missing one is a 500 for everybody's list."""
    said = function["metadata"]["annotations"]
    labels = json.loads(said.get("spec") or "[]")
    for label in labels:
        assert (
            label["name"]
            and label["type"]
            and all({"name", "input_type", "values"} <= attribute.keys() for attribute in label["attributes"])
        )
    assert len({label["name"] for label in labels}) == len(labels)
    assert isinstance(function["spec"]["description"], str) and isinstance(function["status"]["httpPort"], int)
    assert int(said["version"]) == 1 and said["name"]
    return function["metadata"]["name"], said["type"], labels


def test_every_deployed_model_is_listed_with_all_that_cvat_reads(workbench: Workbench, client: TestClient) -> None:
    assert client.get("/api/functions", headers=HEADERS).json() == {}
    names = {
        deployed(workbench),
        deployed(workbench, kind="tracker"),
        deployed(workbench, "masks@1", draws="mask"),
        deployed(workbench, "tags@1"),
    }
    listed = client.get("/api/functions", headers=HEADERS).json()
    assert set(listed) == names
    kinds = {}
    for name, function in listed.items():
        found, kind, labels = as_cvat_reads(function)
        assert found == name and re.fullmatch("[a-z0-9][a-z0-9-]{0,61}[a-z0-9]", name)
        assert function == client.get(f"/api/functions/{name}", headers=HEADERS).json()
        kinds[function["metadata"]["annotations"]["name"]] = (kind, [(one["name"], one["type"]) for one in labels])
    assert kinds == {
        "finder@1": ("detector", [("red", "rectangle"), ("blue", "rectangle")]),
        "finder@1 (tracker)": ("tracker", []),
        "masks@1": ("detector", [("red", "mask"), ("blue", "mask")]),
        "tags@1": ("detector", [("red", "tag"), ("blue", "tag"), ("dark", "tag")]),
    }
    tracker = listed[Function("finder@1", "tracker").name]["metadata"]["annotations"]
    assert tracker["supported_shape_types"] == "rectangle"


def test_a_function_object_has_every_key_of_the_recorded_ones(
    workbench: Workbench, client: TestClient, shared: Path
) -> None:
    one = client.get(f"/api/functions/{deployed(workbench)}").json()
    tracker = client.get(f"/api/functions/{deployed(workbench, kind='tracker')}").json()
    compared = 0
    for line in recorded(shared):
        theirs = line["response_body"]
        if line["path"].startswith("/api/functions/det-rect") or line["path"] == "/api/functions/trk":
            ours = tracker if line["path"].endswith("trk") else one
            compared += 1
            assert ours.keys() == theirs.keys()
            for part in ("metadata", "spec", "status"):
                assert theirs[part].keys() <= ours[part].keys()
            assert theirs["metadata"]["annotations"].keys() <= ours["metadata"]["annotations"].keys()
    assert compared > 5


def test_recorded_detector_calls_are_answered_in_the_recorded_form(
    workbench: Workbench, client: TestClient, shared: Path
) -> None:
    name, replayed = deployed(workbench), 0
    for line in recorded(shared):
        if line["method"] != "POST" or line["function"] not in ("det-all", "det-rectangle", "det-conf-number"):
            continue
        headers = {
            key: value
            for key, value in line["request_headers"].items()
            if key.lower() not in ("host", "content-length", "x-nuclio-function-name")
        }
        body = {**line["request_body"], "image": picture(3, 2)}
        answer = client.post(
            "/api/function_invocations", content=json.dumps(body), headers={**headers, "x-nuclio-function-name": name}
        )
        if body.get("threshold", 0) > 1:  # CVAT hands on any number; the recorded function did not look at it
            assert answer.status_code == 422 and "threshold" in answer.json()["error"]
            continue
        assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
        (ours,), theirs = answer.json(), line["response_body"][0]
        assert theirs.keys() <= ours.keys() and ours["type"] == theirs["type"] == "rectangle"
        assert ours["points"] == [20, 12, 36, 28]  # the square's middle is (28, 20)
        assert all(attribute.keys() == {"name", "value"} for attribute in ours["attributes"])
        assert float(ours["confidence"]) > 0.99
        replayed += 1
    assert replayed > 10


def test_recorded_tracker_calls_follow_a_square_typed_and_bare(
    workbench: Workbench, client: TestClient, shared: Path
) -> None:
    name, replayed = deployed(workbench, kind="tracker"), set()
    box = [12.0, 0.0, 28.0, 12.0]
    states: dict[str, Any] = {}
    for line in recorded(shared):
        if line["method"] != "POST" or line["function"] not in ("trk", "trk-legacy"):
            continue
        body, theirs, kind = dict(line["request_body"]), line["response_body"], line["function"]
        if body["states"]:
            body |= {"image": picture(3), "states": states[kind]}  # one cell to the right
            expected = [20.0, 0.0, 36.0, 12.0]
        else:
            shapes = [{"type": "rectangle", "points": box}] if kind == "trk" else [box]
            body |= {"image": picture(2), "shapes": shapes}
            expected = box
        answer = invoke(client, name, body).json()
        assert answer.keys() == theirs.keys() and len(answer["states"]) == len(answer["shapes"]) == 1
        shape = answer["shapes"][0]
        assert type(shape) is type(theirs["shapes"][0])
        assert (shape if kind == "trk-legacy" else shape["points"]) == expected
        assert kind == "trk-legacy" or shape.keys() == theirs["shapes"][0].keys()
        states[kind] = json.loads(json.dumps(answer["states"], allow_nan=False))
        replayed.add((kind, bool(body["states"])))
    assert len(replayed) == 4


def test_a_threshold_is_obeyed_and_none_means_the_card_s(workbench: Workbench, client: TestClient) -> None:
    name = deployed(workbench)
    # Mean colour (107.8, 30, 30): logit (107.8 - 30) / 8 - 4 = 5.7 with 8 of 8 rows red, less with fewer.
    image = np.full((64, 64, 3), 30, np.uint8)
    image[0:2, 0:8] = RED  # a quarter: mean (86.25, 22.5, 22.5), logit 63.75 / 8 - 4 = 3.97, sigmoid 0.981
    sent = encoded(image)
    assert len(invoke(client, name, {"image": sent}).json()) == 1
    assert len(invoke(client, name, {"image": sent, "threshold": 0.9}).json()) == 1
    assert invoke(client, name, {"image": sent, "threshold": 0.999}).json() == []


def test_masks_come_as_a_crop_of_zeros_and_ones_with_their_outline(workbench: Workbench, client: TestClient) -> None:
    image = np.full((256, 256, 3), 30, np.uint8)
    image[64:128, 32:160] = RED
    polygon, mask = deployed(workbench, "masks@1"), None
    (drawn,) = invoke(client, polygon, {"image": encoded(image)}).json()
    assert drawn["type"] == "polygon" and "mask" not in drawn and len(drawn["points"]) >= 6
    mask = deployed(workbench, "masks@1", draws="mask")
    assert mask == polygon  # deployed again it is drawn otherwise, under the name CVAT knows
    (drawn,) = invoke(client, mask, {"image": encoded(image)}).json()
    *inside, left, top, right, bottom = drawn["mask"]
    assert drawn["type"] == "mask" and len(inside) == (right - left + 1) * (bottom - top + 1)
    assert set(inside) == {0, 1} and len(drawn["points"]) >= 6  # CVAT's "convert masks to polygons" takes these
    # The model sees cells of 8 pixels, so its outline may lie within a cell of the square's.
    assert abs(sum(inside) - 64 * 128) < 2 * (64 + 128) * 8 and 24 <= left <= 40 and 152 <= right <= 168
    square = np.array(inside).reshape(bottom - top + 1, -1)
    assert square.any(axis=0).all() and square.any(axis=1).all()  # nothing around it


def test_tags_have_no_points(workbench: Workbench, client: TestClient) -> None:
    image = np.full((40, 50, 3), 0, np.uint8)
    image[:] = BLUE
    (tag,) = invoke(client, deployed(workbench, "tags@1"), {"image": encoded(image)}).json()
    assert (tag["label"], tag["type"], "points" in tag) == ("blue", "tag", False)


def test_labels_are_called_as_in_cvat(workbench: Workbench, client: TestClient) -> None:
    name = deployed(workbench, renames={"red": "car", "blue": "car"})
    labels = as_cvat_reads(client.get(f"/api/functions/{name}").json())[2]
    assert [one["name"] for one in labels] == ["car"]
    assert {
        one["label"] for colour in (RED, BLUE) for one in invoke(client, name, {"image": picture(1, 1, colour)}).json()
    } == {"car"}


def test_who_drew_a_box_and_how_sure_it_was_go_along_as_attributes(workbench: Workbench, client: TestClient) -> None:
    (box,) = invoke(client, deployed(workbench), {"image": picture(4, 4)}).json()
    assert {one["name"]: one["value"] for one in box["attributes"]} == {
        "wb_source": "model:finder@1",
        "wb_score": f"{box['confidence']:g}",
    }


def test_a_box_at_the_edge_stays_inside_the_image(workbench: Workbench, client: TestClient) -> None:
    (box,) = invoke(client, deployed(workbench), {"image": picture(7, 7)}).json()
    assert box["points"] == [52, 52, 64, 64]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (b"{", 422, "not JSON"),
        (b"[" * 90_000, 422, "not JSON"),
        (b"[" * 200_000, 422, "far more than one image"),
        (b"[]", 422, "JSON object"),
        ({}, 422, "no 'image'"),
        ({"image": None}, 422, "no 'image'"),
        ({"image": 7}, 422, "no 'image'"),
        ({"image": "%%%"}, 422, "not base64"),
        ({"image": "http://10.0.0.1/a.jpg"}, 422, "fetches nothing"),
        ({"image": base64.b64encode(b"no picture").decode()}, 422, "no image"),
        ({"image": base64.b64encode(b"\xff\xd8\xff\xe0" + b"x" * 40).decode()}, 422, "of CVAT"),
        ({"image": "GOOD", "threshold": "high"}, 422, "number of 0 to 1"),
        ({"image": "GOOD", "threshold": float("nan")}, 422, "number of 0 to 1"),
        ({"image": "GOOD", "threshold": True}, 422, "number of 0 to 1"),
        ({"image": "GOOD", "threshold": -1}, 422, "number of 0 to 1"),
        ({"image": "A" * (1 << 20)}, 413, "gateway_body_mb"),
    ],
)
def test_a_bad_call_is_one_sentence_and_the_next_call_is_answered(
    workbench: Workbench, client: TestClient, body: Any, code: int, said: str
) -> None:
    name = deployed(workbench)
    if isinstance(body, dict) and body.get("image") == "GOOD":
        body = {**body, "image": picture(1)}
    answer = invoke(client, name, body)
    assert answer.status_code == code and said in answer.json()["error"], answer.text
    assert answer.headers["x-workbench-sentence"] == answer.json()["error"][:400]
    assert len(invoke(client, name, {"image": picture(1)}).json()) == 1


def test_a_body_without_a_length_is_cut_off_too(workbench: Workbench, client: TestClient) -> None:
    answer = client.post(
        "/api/function_invocations",
        content=(bytes(1 << 16) for _ in range(40)),
        headers={"x-nuclio-function-name": deployed(workbench)},
    )
    assert answer.status_code == 413


@pytest.mark.parametrize("name", ["nosuch", "", "..%2f..%2fetc", "a" * 5000])
def test_an_unknown_function_is_not_found_with_the_next_step(client: TestClient, name: str) -> None:
    assert invoke(client, name, {"image": picture(1)}).status_code == 404
    assert "CVAT page" in invoke(client, name, {"image": picture(1)}).json()["error"]


@pytest.mark.parametrize(
    "state", ["forged:state", 7, [], {}, {"class": 0}, {"class": 99}, {"class": True}, {"class": 0, "box": [1, 2, 3]}]
)
def test_a_foreign_tracker_state_is_refused(workbench: Workbench, client: TestClient, state: Any) -> None:
    answer = invoke(
        client, deployed(workbench, kind="tracker"), {"image": picture(1), "shapes": [None], "states": [state]}
    )
    assert answer.status_code == 422 and "Begin the track anew" in answer.json()["error"]


@pytest.mark.parametrize(
    "shapes",
    [
        [],
        None,
        {},
        [None],
        [[1, 2, 3]],
        [{"type": "mask", "points": [0, 3, 1, 1, 2, 2]}],
        [[1, 2, 1, 2]],
        [[1, 2, 1e300, 9]],
        [{"type": "rectangle", "points": ["a", 1, 2, 3]}],
        [[0, 0, 9, 9]] * 1001,
    ],
)
def test_shapes_that_no_tracker_can_follow_are_refused(workbench: Workbench, client: TestClient, shapes: Any) -> None:
    answer = invoke(client, deployed(workbench, kind="tracker"), {"image": picture(1), "shapes": shapes, "states": []})
    assert answer.status_code == 422, answer.text


def test_a_model_whose_outputs_are_no_numbers_fails_alone_and_no_nan_leaves(
    workbench: Workbench, client: TestClient, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    card = graphs.red_finder(folder)
    model = onnx.load(folder / "model.onnx")
    (ones,) = (one for one in model.graph.initializer if one.name == "ones")
    ones.CopyFrom(numpy_helper.from_array(np.full((1, 1, 4), np.nan, np.float32), "ones"))
    onnx.save(model, folder / "model.onnx")
    workbench.models.register(
        replace(card, name="broken", files={"model.onnx": file_record(folder / "model.onnx")}), folder
    )
    broken, fine = deployed(workbench, "broken@1"), deployed(workbench)
    answer = invoke(client, broken, {"image": picture(1)})
    assert answer.status_code == 422 and "holds a NaN" in answer.json()["error"]
    assert len(invoke(client, fine, {"image": picture(1)}).json()) == 1


@pytest.mark.parametrize("card", ["{", "[]", "null", '{"name": "sick"}', "GOOD"])
def test_a_damaged_model_is_left_out_of_the_list_and_spoils_no_other(
    workbench: Workbench, client: TestClient, card: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = workbench.config.home / "graphs" / "finder"
    workbench.models.register(replace(graphs.red_finder(folder), name="sick"), folder)
    sick, fine = deployed(workbench, "sick@1"), deployed(workbench)
    file = workbench.config.home / "models" / "sick" / "1" / "card.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, "labels": ["only one"]}) if card == "GOOD" else card)
    listed = client.get("/api/functions").json()
    if card != "GOOD":  # a card that says other things well is described as it says
        assert set(listed) == {fine} and sick in caplog.text
        assert client.get(f"/api/functions/{sick}").status_code in (404, 422)
    for function in listed.values():
        as_cvat_reads(function)
    assert len(invoke(client, fine, {"image": picture(1)}).json()) == 1


def test_an_int8_model_without_a_certificate_cannot_be_deployed_nor_listed(
    workbench: Workbench, client: TestClient
) -> None:
    card = workbench.models.card("finder@1")
    workbench.models.register(
        replace(card, version="1-int8", quantization={"from": "finder@1"}), workbench.models.folder("finder@1")
    )
    with pytest.raises(Invalid, match="certif"):
        deployed(workbench, "finder@1-int8")
    # Deployed while it had one, which does not count any more.
    function = Function("finder@1-int8", draws="rectangle")
    workbench.records.add(
        "cvat_deployments",
        function.name,
        "finder@1-int8",
        "me",
        {"deployed": True, "kind": "detector", "draws": "rectangle", "renames": {}, "int8": True},
    )
    fine = deployed(workbench)
    assert set(client.get("/api/functions").json()) == {fine}
    answer = invoke(client, function.name, {"image": picture(1)})
    assert answer.status_code == 422 and "workbench certify finder@1-int8" in answer.json()["error"]


def test_a_withdrawn_function_is_gone_and_comes_back(workbench: Workbench, client: TestClient) -> None:
    name = deployed(workbench)
    for _ in range(2):
        withdraw_from_cvat(name, records=workbench.records, person="me")
    assert client.get("/api/functions").json() == {}
    assert invoke(client, name, {"image": picture(1)}).status_code == 404
    assert deployed(workbench) == name and list(client.get("/api/functions").json()) == [name]
    with pytest.raises(NotFound, match="never deployed"):
        withdraw_from_cvat("nosuch", records=workbench.records, person="me")


def test_what_a_model_cannot_be_is_refused_when_it_is_deployed(workbench: Workbench) -> None:
    for how, said in (
        ({"model": "tags@1", "kind": "tracker"}, "follows nothing"),
        ({"draws": "mask"}, "draws rectangle"),
        ({"renames": {"green": "x"}}, "no label 'green'"),
        ({"kind": "interactor"}, "detector or tracker"),
    ):
        with pytest.raises(Invalid, match=said):
            deployed(workbench, **{"model": "finder@1", **how})
    with pytest.raises(NotFound):
        deployed(workbench, "nosuch@1")


@pytest.mark.parametrize(
    ("caller", "code"),
    [
        ("127.0.0.1", 200),
        ("127.8.9.1", 200),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),
        ("172.18.0.5", 403),
        ("10.0.0.1", 403),
        ("::ffff:10.0.0.1", 403),
        ("2001:db8::1", 403),
        ("testclient", 403),
    ],
)
def test_only_allowed_addresses_are_answered_and_the_others_are_remembered(
    workbench: Workbench, caller: str, code: int
) -> None:
    name = deployed(workbench)
    with TestClient(create(workbench.config), base_url="http://127.0.0.1", client=(caller, 5)) as client:
        for _ in range(2):
            assert client.get("/api/functions").status_code == code
        assert invoke(client, name, {"image": picture(1)}).status_code == code
        if code == 403:
            assert "gateway_allow" in client.get(f"/api/functions/{name}").json()["error"]
    assert len(refused_callers(workbench.config)) == (code == 403)


def test_a_network_in_the_setting_is_let_in(workbench: Workbench) -> None:
    config = replace(workbench.config, gateway_allow="172.16.0.0/12, 10.0.0.7")
    for caller, code in (("172.18.0.5", 200), ("10.0.0.7", 200), ("10.0.0.8", 403), ("127.0.0.1", 403)):
        with TestClient(create(config), base_url="http://127.0.0.1", client=(caller, 5)) as client:
            assert client.get("/api/functions").status_code == code
    with pytest.raises(Invalid, match="gateway_allow holds 'everybody'"):
        networks(replace(config, gateway_allow="everybody"))


def test_the_list_of_refused_callers_stays_small_and_survives_a_damaged_file(workbench: Workbench) -> None:
    gateway = Gateway(workbench, None)
    for number in range(50):
        gateway._remember_refused(f"10.0.0.{number}")
    assert list(refused_callers(workbench.config))[-1] == "10.0.0.49" and len(refused_callers(workbench.config)) == 20
    (workbench.config.home / "gateway-refused.json").write_text("[1")
    assert refused_callers(workbench.config) == {}


def test_nothing_else_is_answered_under_api_and_nothing_redirects(workbench: Workbench, client: TestClient) -> None:
    for method, path in (
        ("GET", "/api/functions/"),
        ("POST", "/api/functions"),
        ("DELETE", "/api/functions"),
        ("GET", "/api/projects"),
        ("GET", "/api/function_invocations"),
    ):
        answer = client.request(method, path, follow_redirects=False)
        assert answer.status_code in (404, 405), (method, path)
    answer = client.post("/", json={"image": picture(1)})
    assert answer.status_code == 422 and "CVAT_NUCLIO_INVOKE_METHOD=dashboard" in answer.json()["error"]


def test_a_token_of_the_service_is_not_asked_of_cvat_but_of_everybody_else(workbench: Workbench) -> None:
    with TestClient(
        create(replace(workbench.config, service_token="s")), base_url="http://127.0.0.1", client=("127.0.0.1", 5)
    ) as client:
        assert client.get("/api/functions").status_code == 200
        assert client.get("/v1/models").status_code == 401


def test_its_own_port_shows_nothing_but_the_gateway(workbench: Workbench) -> None:
    app = create(replace(workbench.config, gateway_port=8599))
    with TestClient(app, base_url="http://127.0.0.1:8599", client=("127.0.0.1", 5)) as client:
        assert client.get("/api/functions").status_code == 200
        assert {client.get(path).status_code for path in ("/v1/models", "/v1/jobs", "/alive", "/metrics")} == {404}
    with TestClient(app, base_url="http://127.0.0.1:8600", client=("127.0.0.1", 5)) as client:
        assert client.get("/v1/models").status_code == 200


def test_a_full_queue_is_waited_for_since_cvat_does_not_ask_again(
    workbench: Workbench, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.service.predict import Predict
    from workbench.service.refusals import Busy

    look, calls = Predict.look, []

    async def busy_at_first(self: Predict, *given: Any) -> Any:
        calls.append(given)
        if len(calls) < 3:
            raise Busy("All places are taken.", 1, full="queue")
        return await look(self, *given)

    monkeypatch.setattr(Predict, "look", busy_at_first)
    assert len(invoke(client, deployed(workbench), {"image": picture(1)}).json()) == 1 and len(calls) == 3


def test_an_outline_that_is_no_number_never_leaves(workbench: Workbench) -> None:
    card, triangle = workbench.models.card("masks@1"), np.array([[0, 0], [9, 0], [9, np.nan]])
    found = Detections([[0, 0, 9, 9]], [0], [0.5], polygons=(triangle,))
    for draws in ("polygon", "mask"):
        with pytest.raises(Invalid, match="output is broken"):
            answer(Function("masks@1", draws=draws), card, found, (10, 10))


def test_a_mask_s_pixels_are_those_whose_middle_lies_inside(workbench: Workbench) -> None:
    card = workbench.models.card("masks@1")
    corners = np.array([[2, 1], [5, 1], [5, 3], [2, 3]])  # pixels 2..4 of rows 1..2
    outside = np.array([[-5, -5], [1, -5], [1, 1], [-5, 1]])  # its part inside is pixel 0 of row 0
    thin = np.array([[3, 3], [3, 9], [3, 5]])  # no area
    found = Detections(
        [[2, 1, 5, 3], [0, 0, 1, 1], [3, 3, 4, 9]], [0, 1, 1], [0.9, 0.8, 0.7], polygons=(corners, outside, thin)
    )
    first, second = answer(Function("masks@1", draws="mask"), card, found, (6, 4))
    assert first["mask"] == [1] * 6 + [2, 1, 4, 2] and first["points"] == [2, 1, 5, 1, 5, 3, 2, 3]
    assert second["mask"] == [1, 0, 0, 0, 0] and second["points"] == [0, 0, 1, 0, 1, 1, 0, 1]


def test_masks_larger_than_cvat_takes_in_are_refused_with_the_next_step(workbench: Workbench) -> None:
    card, whole = workbench.models.card("masks@1"), np.array([[0, 0], [5000, 0], [5000, 5001], [0, 5001]])
    found = Detections(np.tile([0, 0, 5000, 5001], (2, 1)), [0, 0], [0.9, 0.8], polygons=(whole, whole))
    with pytest.raises(Invalid, match="Deploy it with polygons"):
        answer(Function("masks@1", draws="mask"), card, found, (5000, 5001))


def test_names_differ_where_references_only_look_alike() -> None:
    names = {
        Function(ref, kind).name
        for ref in ("a.b@1", "a-b@1", "a@b-1", "a_b@1", "x" * 63 + "@" + "y" * 63)
        for kind in ("detector", "tracker")
    }
    assert len(names) == 10 and all(re.fullmatch("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name) for name in names)
    assert Function("student@1").name == Function("student@1", draws="rectangle", renames={"a": "b"}).name


def test_a_card_of_any_task_has_a_default_way_to_draw(workbench: Workbench) -> None:
    cards: dict[str, ModelCard] = {ref: workbench.models.card(ref) for ref in workbench.models.refs()}
    assert {card.task for card in cards.values()} == {"boxes", "polygons", "tags"}
    for ref in cards:
        deployed(workbench, ref)
