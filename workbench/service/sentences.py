"""Our sentence in the status line of an answer: CVAT shows people that line and nothing else of a refusal."""

from __future__ import annotations

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Header of an answer that carries the sentence as far as here.
SENTENCE = "x-workbench-sentence"


class Sentences(h11.Connection):
    """Writes the header SENTENCE of a response into its status line (the reason phrase of RFC 9112, section 4)."""

    def send(self, event: Any) -> bytes | None:
        if isinstance(event, h11.Response):
            headers = list(event.headers)
            said = dict(headers).get(SENTENCE.encode())
            if said:
                event = h11.Response(
                    status_code=event.status_code,
                    reason=said,
                    headers=[pair for pair in headers if pair[0] != SENTENCE.encode()],
                )
        return super().send(event)


class Speaking(H11Protocol):
    """uvicorn's protocol with Sentences."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.conn = Sentences(h11.SERVER, self.config.h11_max_incomplete_event_size or 64 * 1024)
