"""What several commands have: an order, options, and values that read NAME=VALUE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from workbench.config import Config
from workbench.errors import Invalid

if TYPE_CHECKING:
    from workbench.wiring import Workbench

LISTED = 20


class InOrder(click.Group):
    """Lists commands as they are written here: in the order of the loop."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def step(command: Any) -> Any:
    """Options that all steps have."""
    command = click.option("--detach", is_flag=True, help="Print the job's id and do not wait for it.")(command)
    command = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON line.")(command)
    return click.pass_obj(command)


def opened(config: Config) -> Workbench:
    """The workbench of these settings; its parts are imported here, so that `--help` waits for none of them."""
    from workbench.wiring import Workbench
    return Workbench(config)


def pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    """Name -> value of an option that reads NAME=VALUE and may be repeated. Raises Invalid for another form."""
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name or not value:
            raise Invalid(f"{option} {one!r} must read NAME=VALUE.")
        found[name] = value
    return found


def limits_of(given: tuple[str, ...]) -> dict[str, Any]:
    """The values of --limit; what is no number stays text, for the step to refuse by its name."""
    return {name: _number(value) for name, value in pairs("--limit", given).items()}


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
