"""The gateway in a process of its own: what CVAT shows of a refusal, and our handler as a real Nuclio would run it."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from doubles import graphs

from workbench.config import Config
from workbench.errors import Invalid
from workbench.formats.nuclio import Function
from workbench.formats.nuclio_bundle import bundle, nuclio_function
from workbench.inference.probe import plan_for
from workbench.steps.cvat_gateway import deploy_to_cvat
from workbench.supervise import parts
from workbench.wiring import Workbench

START_S = 90
TOKEN = "a-token"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """A service with a token and two processes, its gateway on a port of its own."""
    home = tmp_path_factory.mktemp("served")
    config = Config(
        home=home,
        backend="onnxruntime",
        threads=2,
        service_port=free_port(),
        gateway_port=free_port(),
        service_token=TOKEN,
        service_workers=2,
    )
    workbench = Workbench(config)
    for name, make in (("finder", graphs.red_finder), ("masks", graphs.red_masks), ("tags", graphs.red_tags)):
        card = make(home / name)
        workbench.models.register(card, home / name)
        plan_for(card, home / name, workbench.open_backend, home / "plans.json", seconds=0.05, cores=1)
    deploy_to_cvat(
        "finder@1",
        models=workbench.models,
        records=workbench.records,
        certificates=workbench.certificates,
        open_backend=workbench.open_backend,
        person="me",
    )
    part = parts.part("service")
    process = subprocess.Popen(part.argv(config), cwd=home, env=parts.environment(config) | part.env)
    try:
        end = time.monotonic() + START_S
        while True:
            try:
                call(config.service_port, "GET", "/alive")
                break
            except OSError:
                assert time.monotonic() < end and process.poll() is None, "The service did not start."
                time.sleep(0.1)
        yield config
    finally:
        process.terminate()
        process.wait(START_S)


def call(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, Any]:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    try:
        line.request(
            method,
            path,
            None if body is None else json.dumps(body),
            {name.replace("_", "-"): value for name, value in headers.items()},
        )
        answer = line.getresponse()
        return answer.status, answer.reason, json.loads(answer.read())
    finally:
        line.close()


def picture(side: int = 64) -> str:
    image = np.full((side, side, 3), 30, np.uint8)
    image[: side // 2, : side // 2] = (0, 0, 255)
    return base64.b64encode(cv2.imencode(".png", image)[1].tobytes()).decode()


def test_cvat_gets_its_answers_on_the_gateway_s_port_and_nothing_else_is_there(served: Config) -> None:
    name = Function("finder@1").name
    for port in (served.gateway_port, served.service_port):
        assert list(call(port, "GET", "/api/functions")[2]) == [name]
        code, _, found = call(
            port, "POST", "/api/function_invocations", {"image": picture()}, x_nuclio_function_name=name
        )
        assert code == 200 and {one["label"] for one in found} == {"red"}
    assert call(served.gateway_port, "GET", "/v1/models", Authorization=f"Bearer {TOKEN}")[0] == 404
    assert call(served.service_port, "GET", "/v1/models")[0] == 401


def test_a_refusal_stands_in_the_status_line_which_is_all_that_cvat_shows(served: Config) -> None:
    code, reason, body = call(
        served.gateway_port,
        "POST",
        "/api/function_invocations",
        {"image": "%"},
        x_nuclio_function_name=Function("finder@1").name,
    )
    assert code == 422 and reason == body["error"] and "not base64" in reason
    code, reason, _ = call(served.gateway_port, "GET", "/api/functions/n%C3%B6such%0d%0aX-Evil:%20yes")
    assert code == 404 and reason.startswith("No function 'n") and "\r" not in reason
    # Other answers keep the phrase that everybody knows.
    assert call(served.service_port, "GET", "/v1/models")[1] == "Unauthorized"


def test_a_port_that_is_taken_is_named_with_its_setting(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = Config(home=tmp_path, service_port=free_port(), gateway_port=taken.getsockname()[1])
        part = parts.part("service")
        ended = subprocess.run(
            part.argv(config),
            cwd=tmp_path,
            env=parts.environment(config),
            capture_output=True,
            text=True,
            timeout=START_S,
        )
    assert ended.returncode == 1 and "gateway_port" in ended.stderr and "Traceback" not in ended.stderr


def handler_of(function: dict[str, Any], source: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> ModuleType:
    """The program as Nuclio opens it: main.py with the function's environment."""
    for variable in function["spec"]["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    (folder / "main.py").write_text(source)
    spec = importlib.util.spec_from_file_location("main", folder / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, body: Any) -> tuple[int, Any]:
    context = SimpleNamespace(Response=lambda **given: given)
    answer = module.handler(context, SimpleNamespace(body=body))
    return answer["status_code"], json.loads(answer["body"])


@pytest.mark.parametrize(
    ("model", "draws", "label"),
    [("finder@1", "rectangle", "car"), ("masks@1", "polygon", "car"), ("tags@1", "tag", "car")],
)
def test_the_handler_in_a_nuclio_answers_as_cvat_takes_it(
    served: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, draws: str, label: str
) -> None:
    card, url = Workbench(served).models.card(model), f"http://127.0.0.1:{served.service_port}/"
    function = nuclio_function(Function(model, draws=draws, renames={"red": "car"}), card, url, TOKEN)
    source = base64.b64decode(function["spec"]["build"]["functionSourceCode"]).decode()
    module = handler_of(function, source, monkeypatch, tmp_path)
    body = {"image": picture(256), "threshold": 0.4}
    code, found = run(module, body)
    assert code == 200 and {(one["label"], one["type"]) for one in found} == {(label, draws)}
    for one in found:
        points = one.get("points", [])
        assert (
            len(points) == 4 * (draws == "rectangle")
            or draws == "polygon"
            and len(points) >= 6
            and len(points) % 2 == 0
        )
        assert all(0 <= value <= 256 for value in points) and 0.4 <= one["confidence"] <= 1
    assert run(module, json.dumps(body).encode()) == (code, found)
    assert run(module, {"image": "%%%"})[0] == 422
    monkeypatch.setenv("WORKBENCH_TOKEN", "another")
    assert run(module, body)[0] == 401
    monkeypatch.setenv("WORKBENCH_URL", f"http://127.0.0.1:{free_port()}")
    code, said = run(module, body)
    assert code == 503 and "Is the workbench up?" in said["error"]


def test_the_bundle_is_what_nuctl_takes_and_holds_no_secret(served: Config) -> None:
    card, function = Workbench(served).models.card("finder@1"), Function("finder@1", draws="rectangle")
    packed = bundle(function, card, "http://workbench:8600")
    assert packed == bundle(function, card, "http://workbench:8600") and TOKEN.encode() not in packed
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        files = {name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist()}
        assert all(name.startswith(function.name + "/") for name in archive.namelist())
    assert set(files) == {"function.yaml", "main.py", "README.md"} and "http://workbench:8600" in files["README.md"]
    made = yaml.safe_load(files["function.yaml"])
    assert made["metadata"]["annotations"]["type"] == "detector"
    assert json.loads(made["metadata"]["annotations"]["spec"])[0]["name"] == "red"
    assert made["spec"]["handler"] == "main:handler" and "build" not in made["spec"]
    assert {one["name"]: one["value"] for one in made["spec"]["env"]} == {
        "WORKBENCH_URL": "http://workbench:8600",
        "WORKBENCH_MODEL": "finder@1",
        "WORKBENCH_RENAMES": "{}",
        "WORKBENCH_TOKEN": "",
    }
    compile(files["main.py"], "main.py", "exec")


@pytest.mark.parametrize("function", [Function("finder@1", "tracker"), Function("masks@1", draws="mask")])
def test_what_the_handler_cannot_draw_is_refused_with_the_next_step(served: Config, function: Function) -> None:
    with pytest.raises(Invalid, match="deploy to CVAT without Nuclio"):
        bundle(function, Workbench(served).models.card(function.model), "http://workbench:8600")


def test_the_handler_needs_nothing_but_python() -> None:
    source = (Path(parts.PROJECT) / "workbench" / "formats" / "nuclio_handler.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"json", "os", "urllib"}
