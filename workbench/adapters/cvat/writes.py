"""Brings frames in CVAT from what stood there to what shall stand there, with the fewest requests; can be repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from workbench.adapters.cvat import shapes
from workbench.adapters.cvat.connection import Connection
from workbench.adapters.cvat.state import Row
from workbench.errors import Invalid, Unavailable

REQUEST_SHAPES = 2000  # about a second's work for CVAT, and 1 MB
ATTEMPTS = 3
PAUSE_S = 0.5  # a server that was too slow to answer may still be at it
KINDS = ("shapes", "tags")
# Created first: a frame that is cut short then shows a box twice rather than not at all.
ACTIONS = ("create", "update", "delete")


@dataclass
class Plan:
    """(action, task) -> [(kind, CVAT's record)]"""

    steps: dict[tuple[str, int], list[tuple[str, dict[str, Any]]]] = field(default_factory=dict)

    def add(self, action: str, task: int, record: dict[str, Any]) -> None:
        kind = record.get("kind") or ("shapes" if "type" in record else "tags")
        plain = {name: value for name, value in record.items() if name != "kind"}
        self.steps.setdefault((action, task), []).append((kind, plain))

    def requests(self) -> Iterator[tuple[str, int, dict[str, list[dict[str, Any]]]]]:
        for action in ACTIONS:
            for (each, task), records in self.steps.items():
                for start in range(0, len(records) if each == action else 0, REQUEST_SHAPES):
                    some = records[start:start + REQUEST_SHAPES]
                    yield action, task, {kind: [one for of, one in some if of == kind] for kind in KINDS}


def carry_out(connection: Connection, rows: Sequence[Row], now: dict[str, shapes.Drawn], labels: shapes.Labels,
              renew: Callable[[], None], again: Callable[[Sequence[str]], dict[str, shapes.Drawn]],
              is_late: bool) -> None:
    """Carries out the pending writes of `rows`; can be repeated after any interruption.

    now      what is drawn on each frame
    again    reads that anew: after a request whose outcome nobody knows
    is_late  the write began in another process: what can no longer be drawn (its label was deleted) is left out

    Raises Unavailable when the server does not answer ATTEMPTS times, Invalid when it refuses, Gone without the task.
    """
    for attempt in range(ATTEMPTS):
        plan = Plan()
        for row in rows:
            if row.frame.name in now:
                _plan(row, now[row.frame.name], labels, plan, is_late)
        try:
            for action, task, body in plan.requests():
                renew()
                _send(connection, action, task, body)
            return
        except Unavailable:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE_S)
            now = again([row.frame.name for row in rows])


def _send(connection: Connection, action: str, task: int, body: dict[str, list[dict[str, Any]]]) -> None:
    # Created twice would stand there twice; an update replaces and a delete of what is gone is taken (recorded:
    # d_annotations_update 3 to 10).
    answer = connection.call("PATCH", f"/api/tasks/{task}/annotations", body, {"action": action},
                             is_repeatable=action != "create")
    kept = sum(len((answer or {}).get(kind) or ()) for kind in KINDS)
    sent = sum(map(len, body.values()))
    if action != "delete" and kept != sent:
        # CVAT drops without a word what lies on a frame that the task does not have (recorded: d_annotations 43).
        raise Unavailable(f"CVAT at {connection.url} kept {kept} of {sent} drawings of task {task}. Try again; if it "
                          "stays so, the task's frames were changed in CVAT.")


def _plan(row: Row, now: shapes.Drawn, labels: shapes.Labels, plan: Plan, is_late: bool) -> None:
    """What is left to do on one frame: a three-way merge in which a person's change since `before` wins."""
    before, after = ({one.id: one for one in part} for part in row.pending)
    for key, wanted in after.items():
        there, was = now.annotations.get(key), before.get(key)
        is_untouched = there is not None and was is not None and there.to_json() == was.to_json()
        if there is not None and (there.to_json() == wanted.to_json() or not is_untouched):
            continue
        if there is None and was is not None:
            continue  # deleted by a person since
        try:
            record = shapes.to_record(wanted, row.frame, row.number, labels)
        except Invalid:
            if is_late:
                continue
            raise
        if there is None:
            plan.add("create", row.task_id, record)
            continue
        old = now.records[key]
        if (old["kind"] == "tags") != ("type" not in record):
            plan.add("create", row.task_id, record)
            plan.add("delete", row.task_id, old)
        else:
            plan.add("update", row.task_id, _over(old, record, labels))
    for key, was in before.items():
        there = now.annotations.get(key)
        if key not in after and there is not None and there.to_json() == was.to_json():
            plan.add("delete", row.task_id, now.records[key])
    for copy in now.copies:
        plan.add("delete", row.task_id, copy)


def _over(old: dict[str, Any], record: dict[str, Any], labels: shapes.Labels) -> dict[str, Any]:
    """An update replaces the whole record, so what people set there and we do not know is sent along."""
    specs = labels.specs[record["label_id"]]
    of_people = {number for name, number in specs.items() if name not in shapes.ATTRIBUTES}
    theirs = [each for each in old.get("attributes") or () if each["spec_id"] in of_people]
    kept = {name: old[name] for name in ("group", "occluded", "z_order") if name in old and name in record}
    return {**record, **kept, "id": old["id"], "attributes": [*record["attributes"], *theirs]}
