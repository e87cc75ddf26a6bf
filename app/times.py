"""Moments and durations as people read them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any


def moment(value: Any) -> datetime | None:
    """ISO text, seconds or milliseconds since the epoch, or a datetime, as an aware datetime; None for nothing."""
    if not value:
        return None
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=timezone.utc)
    if isinstance(value, (int, float)):
        # MLflow counts milliseconds; no time in seconds reaches 1e11 before the year 5138.
        return datetime.fromtimestamp(value / 1000 if value > 1e11 else value, timezone.utc)
    parsed = datetime.fromisoformat(str(value))
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)


def clock(value: Any) -> str:
    """`21 Nov 06:28` in the server's time zone, or a dash."""
    at = moment(value)
    return at.astimezone().strftime("%d %b %H:%M") if at else "–"


def duration(started: Any, finished: Any) -> str:
    """`3 min 20 s` from start to finish, or until now while it runs."""
    start = moment(started)
    if start is None:
        return "not started"
    seconds = int(((moment(finished) or datetime.now(timezone.utc)) - start).total_seconds())
    if seconds < 60:
        return f"{max(seconds, 0)} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
