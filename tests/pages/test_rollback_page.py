"""Retrain and promote: the champion before leads again by two clicks, and the page says who led when."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import filled
import pytest
from test_pages_empty import texts
from workbench.wiring import Workbench


@pytest.fixture
def twice(partless: Workbench, tmp_path: Path) -> Workbench:
    """shapes-detector@2 took over from @1."""
    filled.model(partless, tmp_path / "more", "shapes-detector", "1")
    facts = {"promoted": True, "reason": "Better.", "interval": [0.01, 0.06], "challenger": {"map_50_95": 0.45}}
    partless.records.add("promotions", "shapes", "shapes-detector@2", "anna", facts)
    return partless


def test_two_clicks_ask_for_the_champion_before(twice: Workbench, visit) -> None:
    at = visit("retrain", dataset="shapes")
    assert "shapes-detector@1** was champion before **shapes-detector@2" in texts(at)
    next(one for one in at.button if one.label == "Yes, make it champion again").click().run()
    (job,) = twice.jobs.list(kind="rollback")
    assert job.args == {"dataset": "shapes", "to": "shapes-detector@1", "person": "me"} and not at.exception


def test_without_a_champion_before_there_is_no_button(partless: Workbench, tmp_path: Path, visit) -> None:
    filled.model(partless, tmp_path / "more", "shapes-detector", "1")
    at = visit("retrain", dataset="shapes")
    assert "is champion" in texts(at) and not any("champion again" in one.label for one in at.button)


def test_a_rollback_and_intervals_stand_among_the_decisions_and_a_date_says_who_led(twice: Workbench, visit) -> None:
    reason = ("shapes-detector@1 is champion again in place of shapes-detector@2, rolled back by anna; nothing was "
              "measured.")
    facts = {"promoted": True, "rollback": True, "reason": reason, "challenger": {"model": "shapes-detector@1"}}
    twice.records.add("promotions", "shapes", "shapes-detector@1", "anna", facts)
    at = visit("retrain", dataset="shapes")
    table = next(one.value for one in at.dataframe if "decision" in one.value)
    assert list(table["decision"]) == ["champion again", "champion", "champion"]
    assert table["difference, 95 %"][1] == "+0.010 to +0.060"
    assert f"The last: {reason}" in texts(at).replace("\\", "")
    assert "shapes-detector@2** was champion before **shapes-detector@1" in texts(at)
    picker = next(one for one in at.date_input if one.label == "Who was champion on")
    picker.set_value(date(2020, 1, 1)).run()
    assert "There was no champion at the end of 2020-01-01" in texts(at)
    next(one for one in at.date_input if one.label == "Who was champion on").set_value(date.today()).run()
    assert "shapes-detector@1** was champion at the end of" in texts(at)
