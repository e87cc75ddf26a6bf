"""Bodies are read within a time and within the memory that all callers share."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from starlette.requests import Request

from workbench.service.reading import BODIES, Reader, Settings
from workbench.service.refusals import Busy, Refusal

MIB = 1 << 20


def request(*chunks: bytes, pause_s: float = 0.0) -> Request:
    left = list(chunks)

    async def receive() -> dict[str, object]:
        await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    return Request({"type": "http", "method": "POST", "headers": [(b"content-type", b"image/png")]}, receive)


def test_a_body_that_trickles_in_is_given_up() -> None:
    async def read() -> None:
        reader = Reader(MIB, 8, read_s=0.2)
        with pytest.raises(Refusal, match="did not arrive within 0.2 s") as refused:
            async with reader.read(request(*[b"x"] * 100, pause_s=0.05), Settings(), lambda: 1):
                raise AssertionError("It was read.")
        assert refused.value.code == 408 and reader._held_bytes == 0

    asyncio.run(read())


def test_bodies_of_all_callers_share_one_memory_and_give_it_back() -> None:
    async def read() -> None:
        reader = Reader(MIB, 8)
        async with AsyncExitStack() as stack:
            for _ in range(BODIES):
                sent = await stack.enter_async_context(reader.read(request(bytes(MIB)), Settings(), lambda: 3))
                assert len(sent.images[0][1]) == MIB
            with pytest.raises(Busy, match="Ask again in 3 s") as refused:
                await stack.enter_async_context(reader.read(request(b"x"), Settings(), lambda: 3))
            assert refused.value.code == 429 and refused.value.full == "memory"
        async with reader.read(request(b"x"), Settings(), lambda: 3) as sent:
            assert sent.images == [(None, b"x")]
        assert reader._held_bytes == 0

    asyncio.run(read())
