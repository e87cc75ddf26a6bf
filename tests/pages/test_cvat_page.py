"""The CVAT page and `workbench doctor cvat`: from a model to CVAT's AI tools, and what is named when a step fails."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner
from conftest import settings
from doubles import graphs
from doubles.cvat import READ_ONLY, READ_WRITE, CvatDouble, cvat
from parts_mongo import free_port
from PIL import Image
from streamlit.testing.v1 import AppTest
from test_pages_empty import texts
from test_pages_filled import button

import filled
from workbench import doctor
from workbench.cli import cli
from workbench.config import Config
from workbench.formats.nuclio import Function
from workbench.inference.probe import plan_for
from workbench.service.app import create
from workbench.steps.cvat_gateway import deploy_to_cvat, served
from workbench.wiring import Workbench

FINDER = Function("finder@1").name


@dataclass
class Joined:
    workbench: Workbench
    cvat: CvatDouble
    home: Path


@contextmanager
def gateway(config: Config) -> Iterator[None]:
    server = uvicorn.Server(
        uvicorn.Config(
            create(config),
            host="127.0.0.1",
            port=config.service_port,
            log_level="error",
            http="workbench.service.sentences:Speaking",
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.02)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(30)


def red_square() -> bytes:
    image = Image.new("RGB", (64, 64), (30, 30, 30))
    image.paste((255, 0, 0), (16, 16, 24, 24))
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


@pytest.fixture()
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Joined]:
    """A workbench with a model, a CVAT with a project and a task, and each knows where the other is; no gateway yet."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    with cvat() as double:
        port = free_port()
        config = settings(
            tmp_path / "home",
            cvat_url=double.url,
            cvat_token=READ_WRITE,
            service_port=str(port),
            backend="onnxruntime",
            threads="1",
        )
        double.state.nuclio = f"127.0.0.1:{port}"
        project = double.state.make_project({"name": "cells", "labels": [{"name": "red"}, {"name": "azure"}]})
        task = double.state.make_task({"name": "first", "project_id": project["id"]})["id"]
        double.state.receive(task, {"a.png": red_square()})
        double.state.finish_upload(task, {"image_quality": 70})
        workbench = Workbench(config)
        card = graphs.red_finder(tmp_path / "finder")
        workbench.models.register(card, tmp_path / "finder")
        plan_for(card, tmp_path / "finder", workbench.open_backend, config.home / "plans.json", seconds=0.05, cores=1)
        yield Joined(workbench, double, config.home)


def deployed(workbench: Workbench, **how: str) -> None:
    deploy_to_cvat(
        "finder@1",
        models=workbench.models,
        records=workbench.records,
        certificates=workbench.certificates,
        open_backend=workbench.open_backend,
        person="me",
        **how,
    )


def said(joined: Joined) -> dict[str, doctor.Check]:
    return {one.name: one for one in doctor.examine_cvat(Workbench(joined.workbench.config))}


def fresh(visit) -> AppTest:
    import streamlit as st

    st.cache_data.clear()
    return visit("cvat")


def test_a_model_is_deployed_listed_by_cvat_tried_and_withdrawn(joined: Joined, visit) -> None:
    with gateway(joined.workbench.config):
        at = fresh(visit)
        assert "CVAT 2.73.0 answers and takes the token" in texts(at) and "None yet." in texts(at)
        at.selectbox(key="cvat_project").select(1).run()
        assert "1 of 2 labels of the model are in the project; CVAT drops blue" in texts(at)
        at.selectbox(key="cvat_rename_azure").select("blue").run()
        assert "2 of 2 labels of the model are in the project." in texts(at)
        button(at, "Deploy to CVAT").click().run()
        assert not at.exception, at.exception[0].message
        assert "CVAT lists all 1 functions that are deployed" in texts(at) and "deployed just now" in texts(at)
        assert "blue → azure" in texts(at)
        (one,) = served(
            models=joined.workbench.models, records=joined.workbench.records, certificates=joined.workbench.certificates
        )
        assert one.function == Function("finder@1", draws="rectangle", renames={"blue": "azure"})
        button(at, "Try it").click().run()
        assert not at.exception and "1 shape in" in texts(at) and "through CVAT; nothing was stored" in texts(at)
        assert joined.cvat.calls("POST", f"/api/lambda/functions/{FINDER}")
        button(at, "Withdraw").click().run()
        assert "None yet." in texts(at) and "Deploy a detector first" in texts(at)


def test_without_a_task_the_gateway_itself_is_tried_on_a_frame_of_the_data_set(joined: Joined, visit) -> None:
    deployed(joined.workbench)
    filled.dataset(joined.workbench)
    joined.cvat.state.delete_task(1)
    with gateway(joined.workbench.config):
        at = fresh(visit)
        button(at, "Try it").click().run()
    assert not at.exception and "from the gateway itself" in texts(at)


def test_a_cvat_that_looks_elsewhere_is_told_the_settings(joined: Joined, visit) -> None:
    deployed(joined.workbench)
    elsewhere = joined.cvat.state.nuclio = f"127.0.0.1:{free_port()}"
    port = joined.workbench.config.service_port
    with gateway(joined.workbench.config):
        check = said(joined)["AI tools"]
        assert check.mark == "WRONG" and f"looks for its functions at {elsewhere}" in check.says
        for setting in (
            "CVAT_SERVERLESS=1",
            "CVAT_NUCLIO_HOST=127.0.0.1",
            f"CVAT_NUCLIO_PORT={port}",
            "CVAT_NUCLIO_INVOKE_METHOD=dashboard",
            "cvat_server",
            "cvat_worker_annotation",
        ):
            assert setting in check.says
        at = fresh(visit)
    assert f"looks for its functions at {elsewhere}" in texts(at) and "CVAT does not list it yet" in texts(at)
    assert f'CVAT_NUCLIO_PORT: "{port}"' in at.code[0].value and "cvat_worker_annotation" in at.code[0].value


def test_a_gateway_that_is_down_and_one_that_does_not_let_cvat_in(joined: Joined) -> None:
    deployed(joined.workbench)
    assert "`workbench up` starts it" in said(joined)["gateway"].says and "AI tools" not in said(joined)
    with gateway(replace(joined.workbench.config, gateway_allow="10.9.9.9")):
        found = said(joined)
    assert found["gateway"].mark == "note" and "gateway_allow" in found["gateway"].says
    assert "gateway_allow" in found["AI tools"].says and found["AI tools"].mark == "WRONG"


def test_a_caller_that_was_turned_away_is_named(joined: Joined) -> None:
    (joined.home / "gateway-refused.json").write_text(
        '{"172.18.0.5": "2026-11-21T10:00:00", "127.0.0.1": "2026-11-21"}'
    )
    with gateway(joined.workbench.config):
        check = said(joined)["callers"]
    assert check.mark == "note" and check.says.startswith("172.18.0.5 called") and "gateway_allow" in check.says


def test_another_server_behind_cvat_s_address_is_noticed(joined: Joined, tmp_path: Path) -> None:
    deployed(joined.workbench)
    other = Config(home=tmp_path / "other", service_port=free_port(), threads=1)
    joined.cvat.state.nuclio = f"127.0.0.1:{other.service_port}"
    with gateway(joined.workbench.config), gateway(other):
        check = said(joined)["AI tools"]
    assert check.mark == "WRONG" and f"but not {FINDER}" in check.says and "another server" in check.says


@pytest.mark.parametrize(("token", "words"), [("wrong", "cvat_token"), ("", "cvat_token not set")])
def test_a_wrong_and_a_missing_token_are_one_sentence(joined: Joined, token: str, words: str) -> None:
    found = doctor.examine_cvat(Workbench(replace(joined.workbench.config, cvat_token=token)))
    assert found[-1].mark == "WRONG" and words in found[-1].says and len(found) == 1


def test_a_token_that_may_only_read_still_sees_what_is_wrong(joined: Joined) -> None:
    with gateway(joined.workbench.config):
        found = doctor.examine_cvat(Workbench(replace(joined.workbench.config, cvat_token=READ_ONLY)))
    assert [one.mark for one in found if one.name in ("cvat", "gateway", "AI tools")] == ["ok", "ok", "ok"]


def test_an_int8_model_without_a_certificate_cannot_be_deployed_and_says_why(joined: Joined, visit) -> None:
    card, folder = joined.workbench.models.card("finder@1"), joined.workbench.models.folder("finder@1")
    joined.workbench.models.register(replace(card, version="1-int8", quantization={"from": "finder@1"}), folder)
    with gateway(joined.workbench.config):
        at = fresh(visit)
        at.selectbox(key="pick_model").select("finder@1-int8").run()
        assert button(at, "Deploy to CVAT").disabled and "workbench certify finder@1-int8" in texts(at)


def test_a_deployed_model_that_was_damaged_is_shown_as_left_out(joined: Joined, visit) -> None:
    deployed(joined.workbench)
    (joined.home / "models" / "finder" / "1" / "card.json").write_text("{")
    with gateway(joined.workbench.config):
        at = fresh(visit)
        assert "left out" in texts(at) and not at.exception
        assert said(joined)["functions"].mark == "WRONG" and said(joined)["AI tools"].mark == "ok"


def test_a_project_without_any_of_the_labels_is_an_error_before_deploying(joined: Joined, visit) -> None:
    joined.cvat.state.make_project({"name": "birds", "labels": [{"name": "duck"}]})
    with gateway(joined.workbench.config):
        at = fresh(visit)
        at.selectbox(key="cvat_project").select(2).run()
    assert "CVAT would draw nothing" in texts(at)


def test_a_tracker_is_deployed_from_the_page(joined: Joined, visit) -> None:
    with gateway(joined.workbench.config):
        at = fresh(visit)
        at.segmented_control(key="cvat_kind_2").set_value("tracker").run()
        button(at, "Deploy to CVAT").click().run()
        assert not at.exception and "CVAT lists it" in texts(at)
    (one,) = served(
        models=joined.workbench.models, records=joined.workbench.records, certificates=joined.workbench.certificates
    )
    assert one.function == Function("finder@1", "tracker")


def test_workbench_doctor_cvat_prints_the_same(joined: Joined) -> None:
    deployed(joined.workbench)
    with gateway(joined.workbench.config):
        run = CliRunner().invoke(cli, ["doctor", "cvat"], standalone_mode=False)
    assert run.return_value == 0 and "CVAT lists all 1 functions" in run.output, run.output
    run = CliRunner().invoke(cli, ["doctor", "cvat", "--json"], standalone_mode=False)
    assert run.return_value == 1 and '"ok": false' in run.output
