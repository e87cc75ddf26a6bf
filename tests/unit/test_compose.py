"""docker-compose.yml is a Compose file, and starts the parts that `workbench up` starts."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from workbench.config import Config
from workbench.supervise import parts

PROJECT = Path(__file__).resolve().parents[2]
LOOPBACK = re.compile(r"127\.0\.0\.1:(\d+):(\d+)")


@pytest.fixture()
def compose() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "docker-compose.yml").read_text())


def problems(document: dict[str, Any]) -> list[str]:
    """What the published schema of the Compose specification has against it."""
    schema = get_builtin_schema("vendor.compose-spec")
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(document)]


def test_the_compose_file_keeps_to_the_compose_specification(compose: dict[str, Any]) -> None:
    assert problems(compose) == []


@pytest.mark.parametrize("service, value", [
    ("ui", {"healthcheck": {"test": ["CMD", "true"], "pause": "3s"}}), ("worker", {"restrt": "always"}),
    ("mongod", {"ports": [{"published": {}}]}), ("service", {"depends_on": {"mongod": {"condition": "is_up"}}})])
def test_the_specification_refuses_what_is_wrong(compose: dict[str, Any], service: str, value: dict[str, Any]) -> None:
    broken = copy.deepcopy(compose)
    broken["services"][service].update(value)
    assert problems(broken)


def test_there_is_a_container_for_every_part_and_no_other(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {part.name for part in parts.ALL}
    for name, service in compose["services"].items():
        assert service["command"] == ["part", name]
        assert service["healthcheck"]["test"] == ["CMD", "workbench", "part", name, "--check"]


def test_ports_are_published_on_loopback_only_and_are_the_default_ones(compose: dict[str, Any]) -> None:
    published = {name: service.get("ports", []) for name, service in compose["services"].items()}
    matches = [LOOPBACK.fullmatch(port) for port in published.pop("mongod")]
    assert all(matches) and not any(published.values())
    defaults = Config(home=Path("/nowhere"))
    wanted = {getattr(defaults, part.port) for part in parts.ALL if part.port and part.name != "mongod"}
    assert {int(match[1]) for match in matches} == {int(match[2]) for match in matches} == wanted


def test_the_database_listens_on_loopback_only(compose: dict[str, Any]) -> None:
    assert compose["services"]["mongod"]["environment"]["WORKBENCH_HOST"] == "127.0.0.1"


def test_the_settings_of_every_container_are_settings(compose: dict[str, Any], tmp_path: Path) -> None:
    for name, service in compose["services"].items():
        config = Config.read(environ={**service["environment"], "WORKBENCH_HOME": str(tmp_path)})
        assert service["environment"]["WORKBENCH_HOME"] == "/data" and service["volumes"] == ["home:/data"], name
        # Clients of the pod use its loopback, wherever a part listens.
        assert config == replace(Config(home=tmp_path.resolve()), host=config.host) and config.mongo == "mongodb://127.0.0.1:8652"


def test_beside_cvat_the_parts_join_its_network_and_find_it_by_name(tmp_path: Path) -> None:
    beside = yaml.safe_load((PROJECT / "docker-compose.cvat.yml").read_text())
    assert problems(beside) == []
    assert beside["networks"]["cvat"]["external"] and "workbench" in beside["services"]["mongod"]["networks"]["cvat"]["aliases"]
    for name in ("ui", "worker", "service"):
        config = Config.read(environ={**beside["services"][name]["environment"], "WORKBENCH_HOME": str(tmp_path)})
        assert config.cvat_url == "http://cvat_server:8080" and config.cvat_token
        assert config.gateway_url == f"http://workbench:{config.gateway_port}", "as CVAT_NUCLIO_HOST and _PORT say"
        networks = [ip_network(one.strip()) for one in config.gateway_allow.split(",")]
        assert any(ip_address("172.18.0.5") in one for one in networks)
        assert not any(ip_address("8.8.8.8") in one for one in networks)


def test_the_image_runs_workbench_as_another_user_than_root() -> None:
    lines = (PROJECT / "Dockerfile").read_text().splitlines()
    assert 'ENTRYPOINT ["workbench"]' in lines and "USER workbench" in lines
    assert not any(re.search(r"https?://", line) for line in lines)
