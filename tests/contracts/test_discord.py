"""The Discord channel against a server that is held to Discord's OpenAPI file."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from doubles.discord import ID, TOKEN, Answer, DiscordDouble, discord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.adapters.discord import Discord, neutral, payload
from workbench.errors import Invalid, NotFound, Unavailable
from workbench.notifications import Message

CONTRACT = Path(__file__).resolve().parents[3] / "shared/contracts/discord-openapi.json"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


class Time:
    """A clock that a pause moves."""

    def __init__(self) -> None:
        self.now, self.pauses = 1000.0, []

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


@pytest.fixture
def double() -> Iterator[DiscordDouble]:
    if not CONTRACT.exists() and os.environ.get("WORKBENCH_REQUIRE_SHARED"):
        pytest.fail(f"{CONTRACT} is not there")
    with discord(CONTRACT if CONTRACT.exists() else None) as running:
        yield running


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def channel(double: DiscordDouble, time: Time) -> Discord:
    return Discord(double.url, pause=time.pause, clock=time.clock)


def test_a_message_arrives_with_its_fields_link_and_plot(double: DiscordDouble, channel: Discord) -> None:
    channel.send(Message("Retraining finished: cells", "Well.", (("Commit", "a" * 40),), "https://ml.example.com/#/1",
                         PNG, "success"))
    assert double.refused == [] and double.queries == [{"wait": "true"}]
    embed = double.kept[0]["embeds"][0]
    assert embed["title"] == "Retraining finished\\: cells" and embed["url"] == "https://ml.example.com/#/1"
    assert embed["fields"] == [{"name": "Commit", "value": "a" * 40, "inline": True}]
    assert embed["description"] == "Well."
    assert embed["thumbnail"] == {"url": "attachment://plot.png"} and double.files == [{"plot.png": PNG}]
    assert double.kept[0]["allowed_mentions"] == {"parse": []}


def test_a_message_without_a_plot_is_plain_json(double: DiscordDouble, channel: Discord) -> None:
    channel.send(Message("Title"))
    assert double.refused == [] and double.files == [{}]
    assert double.kept[0]["embeds"][0]["title"] == "Title"


def test_an_address_only_this_machine_reaches_is_shown_as_text(double: DiscordDouble, channel: Discord) -> None:
    for link in ("http://localhost:8650/#/1", "http://127.0.0.1:8650/#/1", "http://mlflow/#/1"):
        channel.send(Message("T", link=link))
    assert double.refused == []
    embeds = [kept["embeds"][0] for kept in double.kept]
    assert len(embeds) == 3 and all("url" not in one and one["fields"][0]["name"] == "Run" for one in embeds)


def test_a_thread_is_kept_and_other_parameters_are_not(double: DiscordDouble) -> None:
    Discord(double.url + "?thread_id=42&evil=1").send(Message("T"))
    assert double.queries == [{"wait": "true", "thread_id": "42"}]


def test_the_double_refuses_what_the_openapi_file_forbids(shared: Path) -> None:
    with discord(shared / "contracts/discord-openapi.json") as double:
        for wrong in ({"embeds": [{"title": "a" * 257}]}, {"embeds": [{"fields": [{"name": "n"}]}]},
                      {"content": "c", "allowed_mentions": {"parse": ["all"]}}, {"embeds": [{"titel": "t"}]},
                      {"embeds": [{"description": "a" * 4096}, {"description": "a" * 4096}]}, {},
                      {"embeds": [{"thumbnail": {"url": "attachment://plot.png"}}]}):
            assert requests.post(double.url, json=wrong, timeout=10).status_code == 400, wrong
        assert len(double.refused) == 7 and double.kept == []
        assert requests.post(double.url, params={"wate": "1"}, json={"content": "c"}, timeout=10).status_code == 400
        assert requests.post(double.url, json={"content": "c"}, timeout=10).status_code == 204


@pytest.mark.parametrize("text", [
    "@everyone", "@here", "<@123>", "<@!123>", "<@&123>", "<#123>", "<:smile:123>", "<t:1618953630:R>", "</cmd:1>",
    "[free](https://evil.example)", "https://evil.example", "**bold** __u__ ~~s~~ ||spoiler|| `code` ```block```",
    "# heading\n- list\n> quote\n-# small", "\\", "\\@everyone", "@ｅveryone"])
def test_markup_and_mentions_from_outside_are_shown_literally(double: DiscordDouble, channel: Discord,
                                                                  text: str) -> None:
    channel.send(Message(text, text, ((text, text),)))
    assert double.refused == []
    sent = json.dumps(double.kept[0]["embeds"], ensure_ascii=False)
    embed = double.kept[0]["embeds"][0]
    for shown in (embed["title"], embed["description"], embed["fields"][0]["name"], embed["fields"][0]["value"]):
        # Every character that means something stands behind a backslash of ours, or is parted by a zero-width space.
        rest = "".join(pair for pair in shown.split("\\\\"))
        assert not [at for at, char in enumerate(rest) if char in "*_~`|<>[]()#:" and rest[at - 1:at] != "\\"], shown
        assert all(rest[at + 1:at + 2] == "\u200b" for at, char in enumerate(rest) if char == "@"), shown
    assert not re.search(r"@everyone|@here|<@[!&]?\d|<#\d|<a?:\w+:\d|(?<!\\)<[t/]|\]\(|https?://", sent)


def test_a_reference_to_a_version_can_be_copied() -> None:
    assert neutral("cells@1.0.0", 100) == "cells@1.0.0"
    assert neutral("<@1", 100) == "\\<@\u200b1"


def test_a_text_is_cut_within_its_limit_and_never_within_an_escape() -> None:
    assert neutral("****", 8) == "\\*" * 4
    assert neutral("*****", 8) == "\\*" * 3 + "…"
    assert neutral("😀😀😀", 5) == "😀😀…"  # two UTF-16 units each
    assert neutral("abc", 2) == "a…" and neutral("", 5) == ""


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(title=st.text(max_size=600), text=st.text(max_size=3000), repeat=st.integers(1, 10),
       lines=st.lists(st.tuples(st.text(max_size=400), st.text(max_size=2500)), max_size=30))
def test_no_text_makes_a_message_that_discord_refuses(double: DiscordDouble, title: str, text: str, repeat: int,
                                                      lines: list[tuple[str, str]]) -> None:
    made = json.loads(json.dumps(payload(Message(title, text * repeat, tuple(lines)))))
    double.check("application/json", made, {}, {})


@pytest.mark.parametrize("size", [1, 25, 26, 40])
def test_the_longest_message_keeps_discord_s_limits(double: DiscordDouble, channel: Discord, size: int) -> None:
    channel.send(Message("*" * 5000, "_" * 50_000, (("n" * 3000, "v" * 9000),) * size, "http://a/" + "x" * 4000))
    assert double.refused == [] and len(double.kept) == 1


def test_a_plot_too_large_for_discord_is_left_out(double: DiscordDouble, channel: Discord) -> None:
    channel.send(Message("T", image=bytes(9 * 1024**2)))
    assert double.refused == [] and double.files == [{}] and "thumbnail" not in double.kept[0]["embeds"][0]


def test_a_rate_limit_is_waited_for(double: DiscordDouble, channel: Discord, time: Time) -> None:
    double.then(double.limit(1.5), double.limit(3, True, **{"Retry-After": "4", "X-RateLimit-Scope": "global"}))
    channel.send(Message("T"))
    assert time.pauses == pytest.approx([1.5, 4.0]) and len(double.kept) == 1


def test_a_bucket_used_up_delays_the_next_message(double: DiscordDouble, channel: Discord, time: Time) -> None:
    double.then(Answer(204, None, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset-After": "2.25"}))
    channel.send(Message("one"))
    assert time.pauses == []
    channel.send(Message("two"))
    assert time.pauses == pytest.approx([2.25])


def test_a_long_rate_limit_is_told_and_later_messages_do_not_ask(double: DiscordDouble, channel: Discord,
                                                                     time: Time) -> None:
    double.then(double.limit(3600, True))
    with pytest.raises(Unavailable, match="3600 s"):
        channel.send(Message("T"))
    with pytest.raises(Unavailable, match="longer than one waits"):
        channel.send(Message("T"))
    assert double.posts == 1 and time.pauses == []
    time.now += 3601
    channel.send(Message("T"))
    assert len(double.kept) == 1


@pytest.mark.parametrize("body", [b"<html>", b"", b"[]", b'{"retry_after": "soon"}', b'{"retry_after": -5}',
                                  b'{"retry_after": NaN}', b'{"retry_after": Infinity}', b'{"retry_after": null}'])
def test_a_rate_limit_that_names_no_time_is_waited_for_5_seconds(time: Time, body: bytes) -> None:
    with discord(None) as double:
        double.then(Answer(429, body, {"Retry-After": "tomorrow"}))
        Discord(double.url, pause=time.pause, clock=time.clock).send(Message("T"))
        assert time.pauses == pytest.approx([5.0]) and len(double.kept) == 1


def test_a_rate_limit_without_end_ends(double: DiscordDouble, channel: Discord, time: Time) -> None:
    double.then(*[double.limit(0.001)] * 50)
    with pytest.raises(Unavailable, match="4 attempts"):
        channel.send(Message("T"))
    assert double.posts == 4


def test_a_fault_of_discord_is_tried_again_a_few_times(double: DiscordDouble, channel: Discord, time: Time) -> None:
    double.then(Answer(500), Answer(502, b"<html>"))
    channel.send(Message("T"))
    assert time.pauses == pytest.approx([1.0, 2.0]) and len(double.kept) == 1
    double.then(*[Answer(503)] * 9)
    with pytest.raises(Unavailable, match="answers 503"):
        channel.send(Message("T"))
    assert double.posts == 3 + 4


def test_a_slow_answer_is_given_up_and_not_sent_twice(double: DiscordDouble) -> None:
    double.then(Answer(200, None, after_s=2.0))
    with pytest.raises(Unavailable, match="may have arrived"):
        Discord(double.url, timeout_s=(5, 0.3)).send(Message("T"))
    assert double.posts == 1


def test_a_deleted_webhook_is_asked_once(double: DiscordDouble, channel: Discord) -> None:
    double.then(Answer(404, {"message": "Unknown Webhook", "code": 10015}))
    for _ in range(3):
        with pytest.raises(NotFound, match="set discord_webhook"):
            channel.send(Message("T"))
    assert double.posts == 1


def test_a_refused_message_is_not_repeated_and_a_redirect_not_followed(double: DiscordDouble, channel: Discord) -> None:
    double.then(Answer(400, {"message": "Invalid Form Body", "code": 50035}))
    with pytest.raises(Invalid, match="50035"):
        channel.send(Message("T"))
    with discord(None) as thief:
        double.then(Answer(307, None, {"Location": thief.url}))
        with pytest.raises(Invalid, match="307"):
            channel.send(Message("T"))
        assert double.posts == 2 and thief.posts == 0


def test_the_webhook_is_in_no_error_and_no_log_line(double: DiscordDouble, time: Time,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    # Other libraries of the same process may have made urllib3 quieter.
    caplog.set_level(logging.DEBUG, logger="urllib3.connectionpool")
    closed = Discord(f"http://127.0.0.1:1/api/webhooks/{ID}/{TOKEN}", pause=time.pause, clock=time.clock)
    with pytest.raises(Unavailable) as unreached:
        closed.send(Message("T"))
    channel = Discord(double.url, pause=time.pause, clock=time.clock)
    channel.send(Message("T"))
    double.then(Answer(404, {"message": TOKEN, "code": 10015}))
    with pytest.raises(NotFound) as gone:
        channel.send(Message("T"))
    for raised in (unreached, gone):
        assert TOKEN not in str(raised.getrepr(chain=True, style="long")).replace(f"{ID}/{TOKEN}\",", "")
        assert TOKEN not in str(raised.value)
    assert TOKEN not in repr(channel) and TOKEN not in caplog.text
    assert "a request to a Discord webhook" in caplog.text  # else nothing was logged that could have shown it


@pytest.mark.parametrize("wrong", [
    "", "nonsense", f"http://discord.com/api/webhooks/{ID}/{TOKEN}",
    f"https://discord.com.evil.example/api/webhooks/{ID}/{TOKEN}",
    f"https://evil.example/api/webhooks/{ID}/{TOKEN}", f"https://u:p@discord.com/api/webhooks/{ID}/{TOKEN}",
    f"https://discord.com@evil.example/api/webhooks/{ID}/{TOKEN}",
    f"https://discord.com:8443/api/webhooks/{ID}/{TOKEN}",
    f"https://discord.com/api/webhooks/{ID}", f"https://discord.com/api/webhooks/{ID}/{TOKEN}/slack",
    f"https://discord.com/api/webhooks/{ID}/../{TOKEN}", f"https://discord.com/api/webhooks/x/{TOKEN}",
    f"https://discord.com/api/webhooks/{ID}/{TOKEN}?thread_id=a", f"https://discord.com:port/api/webhooks/{ID}/{TOKEN}",
    f"file:///api/webhooks/{ID}/{TOKEN}", f"https://[::1/api/webhooks/{ID}/{TOKEN}",
    f"http://169.254.169.254/api/webhooks/{ID}/{TOKEN}", f"http://10.0.0.1/api/webhooks/{ID}/{TOKEN}"])
def test_an_address_that_is_no_webhook_is_refused_without_repeating_it(wrong: str) -> None:
    with pytest.raises(Invalid) as refused:
        Discord(wrong)
    assert TOKEN not in str(refused.value) and "discord_webhook" in str(refused.value)


@pytest.mark.parametrize("host", ["discord.com", "discordapp.com", "ptb.discord.com", "canary.discord.com:443"])
def test_discord_s_own_addresses_are_taken(host: str) -> None:
    assert "hidden" in repr(Discord(f" https://{host}/api/v10/webhooks/{ID}/{TOKEN}/\n"))
