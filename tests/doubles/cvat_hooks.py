"""The webhooks of the CVAT double: what it would send is put into an outbox, and a test decides what becomes of it.

Numbers in brackets name the recorded exchange; whoever makes deliveries late, twice or never is the test.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

PROJECT_EVENTS = {f"{verb}:{what}" for verb in ("create", "update", "delete") for what in ("task", "job", "issue", "comment")} | {
    "update:project", "delete:project"}


@dataclass(frozen=True)
class Message:
    """A delivery: where to, the raw body, and its X-Signature-256 ("" of a hook without a secret)."""

    hook: int
    target: str
    body: bytes
    signature: str


class HookState:
    """post: sends a message at once and returns the status; None: messages wait in `outbox`."""

    def __init__(self) -> None:
        self.webhooks: dict[int, dict[str, Any]] = {}
        self.secrets: dict[int, str] = {}
        self.deliveries: dict[int, list[dict[str, Any]]] = {}
        self.outbox: list[Message] = []
        self.post: Callable[[Message], int] | None = None

    def make_webhook(self, body: dict[str, Any]) -> dict[str, Any]:
        from doubles.cvat_state import Refusal, now
        if "type" not in body:
            raise Refusal(400, {"type": ["This field is required."]})  # h_webhooks 12
        if "project_id" not in body:
            raise Refusal(500, "<h1>Server Error (500)</h1>")  # h_webhooks 11
        if body["project_id"] not in self.projects:
            raise Refusal(400, ["Project matching query does not exist."])  # h_webhooks 13
        self._check_webhook(body)
        number = self.number("webhook")
        self.webhooks[number] = {
            "id": number, "target_url": body["target_url"], "description": body.get("description", ""), "type": body["type"],
            "content_type": "application/json", "is_active": body.get("is_active", True),
            "enable_ssl": body.get("enable_ssl", True), "created_date": now(), "updated_date": now(),
            "project_id": body["project_id"], "events": sorted(body["events"])}
        self.secrets[number], self.deliveries[number] = body.get("secret", ""), []
        return self.webhook(number)

    def webhook(self, number: int) -> dict[str, Any]:
        from doubles.cvat_state import missing
        if number not in self.webhooks:
            raise missing("Webhook")
        answer = {**self.webhooks[number], "url": f"{self.url}/api/webhooks/{number}", "owner": self.user(1), "organization": None}
        if self.deliveries[number]:
            last = self.deliveries[number][-1]
            answer |= {"last_status": last["status_code"], "last_delivery_date": last["created_date"]}
        return answer

    def change_webhook(self, number: int, body: dict[str, Any]) -> dict[str, Any]:
        from doubles.cvat_state import now
        self.webhook(number)
        self._check_webhook({**self.webhooks[number], **body})
        kept = ("target_url", "description", "is_active", "enable_ssl", "events")
        self.webhooks[number].update({name: body[name] for name in kept if name in body}, updated_date=now())
        self.secrets[number] = body.get("secret", self.secrets[number])
        return self.webhook(number)

    def delete_webhook(self, number: int) -> None:
        self.webhook(number)
        del self.webhooks[number]

    def ping(self, number: int) -> dict[str, Any]:
        self._send(number, {"event": "ping", "webhook": self.webhook(number), "sender": self.user(1)})
        return self.deliveries[number][-1]

    def deliveries_of(self, number: int) -> list[dict[str, Any]]:
        self.webhook(number)
        return self.deliveries[number][::-1]

    def job_changed(self, number: int, before: dict[str, Any]) -> None:
        """update:job, with what changed; a change of nothing but the date is one too (h_webhook_deliveries 16, 29)."""
        self.jobs[number]["updated_date"] = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        after = self.job(number)
        changes = {name: {"from": before[name], "to": after[name]} for name in before if before[name] != after[name]}
        for key, hook in list(self.webhooks.items()):
            if hook["is_active"] and hook["project_id"] == after["project_id"] and "update:job" in hook["events"]:
                self._send(key, {"event": "update:job", "webhook_id": key, "job": after, "sender": self.user(1),
                                 "before_update": {name: one["from"] for name, one in changes.items()}, "changes": changes})

    def _check_webhook(self, body: dict[str, Any]) -> None:
        from doubles.cvat_state import Refusal
        if not str(body["target_url"]).startswith(("http://", "https://")):
            raise Refusal(400, {"target_url": ["Enter a valid URL."]})  # h_webhooks 10
        if not body.get("events") or not set(body["events"]) <= PROJECT_EVENTS:
            raise Refusal(400, {"non_field_errors": ["Invalid events list for project webhook"]})  # h_webhooks 7, 9

    def _send(self, key: int, content: dict[str, Any]) -> None:
        from doubles.cvat_state import now
        body, secret = json.dumps(content).encode(), self.secrets[key]
        signature = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest() if secret else ""
        message = Message(key, self.webhooks[key]["target_url"], body, signature)
        self.outbox.append(message)
        status = self.post(message) if self.post else 502
        self.deliveries[key].append({
            "id": self.number("delivery"), "webhook_id": key, "event": content["event"], "status_code": status,
            "redelivery": False, "attempt": 1, "request_duration": 1, "created_date": now(), "updated_date": now(),
            "changed_fields": ",".join(content.get("changes", ())), "request": content, "response": "ok"})
