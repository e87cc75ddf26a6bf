"""How an error becomes an HTTP status; refusals that only a caller over HTTP meets."""

from __future__ import annotations

from workbench.errors import Cancelled, Conflict, Invalid, NotFound, Unavailable, WorkbenchError

CODES = {NotFound: 404, Conflict: 409, Cancelled: 409, Unavailable: 503, Invalid: 422}


class Refusal(WorkbenchError):
    """A request that is answered with `code` and `headers` instead of a result."""

    def __init__(self, code: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.code, self.headers = code, headers or {}


class Busy(Refusal):
    """No room now. retry_after_s: when there will be, at the rate measured; full: "queue", "memory" or "models"."""

    def __init__(self, sentence: str, retry_after_s: int, *, full: str, code: int = 429) -> None:
        super().__init__(code, f"{sentence} Ask again in {retry_after_s} s.", {"Retry-After": str(retry_after_s)})
        self.full = full


def status_of(error: BaseException) -> int:
    """500 for what is no failure that the workbench explains."""
    if isinstance(error, Refusal):
        return error.code
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), 500)
