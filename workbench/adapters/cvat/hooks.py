"""Our hook in CVAT: what tells the workbench at once that people worked on a project's jobs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from workbench.adapters.cvat.connection import Connection, Gone

# Saved drawings, stages, states and assignees all show as this one (recorded: h_webhook_deliveries 12 to 29).
EVENTS = ("update:job",)
DESCRIPTION = "workbench"


@dataclass(frozen=True)
class Delivery:
    """A message as CVAT keeps it. status: what we answered; 502 where nobody did."""

    event: str
    status: int | None
    at: str


@dataclass(frozen=True)
class CvatHook:
    """last: the newest delivery, None when there was none yet."""

    id: int
    address: str
    is_active: bool
    last: Delivery | None


class HooksInCvat:
    """One project's."""

    def __init__(self, connection: Connection, project: int) -> None:
        self._connection, self._project = connection, project

    def find(self) -> CvatHook | None:
        """Ours, told by its description; the newest when somebody made two."""
        ours = [one for one in self._connection.pages("/api/webhooks", project_id=self._project)
                if one.get("project_id") == self._project and one.get("description") == DESCRIPTION]
        if not ours:
            return None
        hook = max(ours, key=lambda one: one["id"])
        newest = self._connection.get(f"/api/webhooks/{hook['id']}/deliveries", page_size=1)["results"]
        last = Delivery(newest[0]["event"], newest[0]["status_code"], newest[0]["created_date"]) if newest else None
        return CvatHook(hook["id"], hook["target_url"], bool(hook["is_active"]), last)

    def connect(self, address: str, secret: str) -> int:
        """Makes the hook, or gives the one there is this address and secret; its number. Can be repeated."""
        body: dict[str, Any] = {"target_url": address, "secret": secret, "events": list(EVENTS), "is_active": True,
                                "content_type": "application/json", "enable_ssl": address.startswith("https:"),
                                "description": DESCRIPTION}
        there = self.find()
        if there is not None:
            # Removed in CVAT in between: made anew below.
            with suppress(Gone):
                self._connection.call("PATCH", f"/api/webhooks/{there.id}", body, is_repeatable=True)
                return there.id
        made = self._connection.call("POST", "/api/webhooks", {**body, "type": "project", "project_id": self._project})
        return made["id"]

    def ping(self, hook_id: int) -> int | None:
        """Has CVAT send a message now; the status it got, 502 where nobody answered."""
        return self._connection.call("POST", f"/api/webhooks/{hook_id}/ping", is_repeatable=True)["status_code"]

    def remove(self) -> None:
        """All of ours."""
        while (there := self.find()) is not None:
            self._connection.delete(f"/api/webhooks/{there.id}")
