"""Retrain and promote: training from a git repository, what trains by itself, and what follows a promotion."""

from __future__ import annotations

from pathlib import Path

import filled
import pytest
from streamlit.testing.v1 import AppTest
from test_pages_empty import texts

from app.training_form import _step
from workbench.steps.rules import rules
from workbench.wiring import PROJECT, Workbench

SHA = "0123456789abcdef0123456789abcdef01234567"


def widget(found, **about: str):
    (name, value), = about.items()
    return next(one for one in found if getattr(one, name) == value)


def from_git(at: AppTest, **fields: str) -> AppTest:
    widget(at.button_group, key="retrain_source").set_value("From a git repository").run()
    for key, value in {"git_uri": str(PROJECT), "git_location": "models/tiny", "git_commit": SHA, **fields}.items():
        widget([*at.text_input, *at.text_area], key=key).set_value(value)
    return at.run()


def errors(at: AppTest) -> str:
    return " ".join(one.value.replace("\\", "") for one in at.error)


def test_a_training_from_a_git_repository_is_the_job_that_post_retrain_makes(partless: Workbench, visit) -> None:
    at = from_git(visit("retrain", dataset="shapes"), git_params="epochs=3\nsize=small\n\nrate = 0.5",
                  git_metric="map_50", git_model_name="shapes-night", git_experiment="by night")
    widget(at.button, key="retrain_go").click().run()
    (job,) = partless.jobs.list(kind="retrain")
    assert job.args == {
        "dataset": "shapes", "version": "shapes@0.2.0", "repository": str(PROJECT), "commit": SHA,
        "location": "models/tiny", "experiment": "by night", "register_as": "shapes-night", "primary": "map_50",
        "person": "me", "params": {"epochs": 3, "size": "small", "rate": 0.5}}
    assert not at.exception


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({"git_uri": "https://ann:s3cret@host/x"}, "git_uri carries credentials"),
    ({"git_uri": "https://example.org/x"}, "not among the repositories that may be trained from"),
    ({"git_uri": ""}, "git_uri must be one line"), ({"git_commit": "main"}, "must be a full commit hash"),
    ({"git_location": "../x"}, "MLproject_location must be a folder"),
    ({"git_params": "epochs 3"}, "must read NAME=VALUE"),
    ({"git_params": "epochs=$(id)"}, "epochs"), ({"git_model_name": "Not A Name"}, "model_name must be")])
def test_what_the_service_would_refuse_the_page_refuses_in_the_same_words(
        partless: Workbench, visit, wrong: dict[str, str], sentence: str) -> None:
    at = from_git(visit("retrain", dataset="shapes"), **wrong)
    widget(at.button, key="retrain_go").click().run()
    assert sentence in errors(at) and "s3cret" not in errors(at) and partless.jobs.list(kind="retrain") == []


def test_a_schedule_of_what_is_filled_in_is_set_shown_and_switched_off(partless: Workbench, visit) -> None:
    at = visit("retrain", dataset="shapes")
    widget(at.number_input, key="rule_every_days").set_value(2.0).run()
    widget(at.button, key="save_schedule").click().run()
    rule = rules("shapes", records=partless.records)["schedule"]
    assert (rule.every_h, rule.cron, rule.person, rule.is_on) == (48.0, None, "me", True)
    assert rule.training == {"dataset": "shapes", "recipe": rule.training["recipe"]}
    assert "Every 2 days; next" in texts(at).replace("\\", "") and partless.jobs.list(kind="retrain") == []
    widget(at.button, key="off_schedule").click().run()
    assert not rules("shapes", records=partless.records)["schedule"].is_on and not at.exception


def test_a_cron_expression_that_is_none_is_refused_and_nothing_is_set(partless: Workbench, visit) -> None:
    at = visit("retrain", dataset="shapes")
    widget(at.button_group, key="rule_how").set_value("Cron expression").run()
    widget(at.text_input, key="rule_cron").set_value("every night").run()
    widget(at.button, key="save_schedule").click().run()
    assert "is no cron expression. Five fields" in errors(at) and rules("shapes", records=partless.records) == {}
    widget(at.text_input, key="rule_cron").set_value("0 3 * * 1").run()
    widget(at.button, key="save_schedule").click().run()
    assert "At 0 3 * * 1 (UTC); next" in texts(at).replace("\\", "")


def test_a_drift_alarm_stands_on_both_pages_and_what_rules_decided_is_listed(partless: Workbench, visit) -> None:
    facts = {"dataset": "shapes", "model": "shapes-detector@1", "on": "shapes@0.1.0", "runs": ["r"], "frames": [60, 60],
             "is_enough": True, "alarm": True, "is_new": True, "reason": "It sees <b>lorries</b> now.", "since": "s",
             "key": "k"}
    partless.records.add("drift", "shapes", "shapes-detector@1", "lea", facts)
    for mark, args in (("1", None), ("2", {"version": "shapes@0.2.0"})):
        partless.records.add("retrain_events", "shapes", "schedule", "lea",
                             {"key": mark, "args": args, "told": f"Scheduled {mark}: as told."})
    overview = visit("overview", dataset="shapes")
    assert any("It sees <b>lorries</b> now." in one.value.replace("\\", "") for one in overview.warning)
    table = next(one.value for one in overview.dataframe if "what" in one.value)
    assert "drift alarm of shapes-detector@1" in list(table["what"]) and "Scheduled 2: as told." in list(table["what"])
    assert "Scheduled 1: as told." not in list(table["what"]), "that nothing happened is no news"
    at = visit("retrain", dataset="shapes")
    assert any("Drift alarm" in one.value for one in at.warning)
    table = next(one.value for one in at.dataframe if "rule" in one.value)
    assert list(table["decision"]) == ["training", "nothing to do"]


def test_what_follows_a_promotion_and_a_rollback_is_asked_for_with_them(
        partless: Workbench, tmp_path: Path, visit) -> None:
    filled.model(partless, tmp_path / "more", "shapes-detector", "2")
    filled.model(partless, tmp_path / "more", "shapes-night", "1", run_id="r", trained_on={"ref": "shapes@0.1.0"})
    partless.records.add("promotions", "shapes", "shapes-detector@2", "anna", {"promoted": True})
    at = visit("retrain", dataset="shapes")
    picked = widget(at.selectbox, key="pick_candidate")
    assert picked.options == ["shapes-detector@2 · champion", "shapes-detector@1", "shapes-night@1"]
    widget(at.button_group, key="promote_then").set_value(["int8", "cvat"]).run()
    widget(at.button, key="promote_go").click().run()
    (job,) = partless.jobs.list(kind="promote")
    assert job.args == {"dataset": "shapes", "candidate": "shapes-detector@2", "version": "shapes@0.2.0",
                        "then": ["int8", "cvat"], "person": "me"}
    widget(at.checkbox, key="rollback_back").check().run()
    widget(at.button, key="rollback_go").click().run()
    (job,) = partless.jobs.list(kind="rollback")
    assert job.args == {"dataset": "shapes", "to": "shapes-detector@1", "bring_back": True, "person": "me"}
    assert not at.exception


def test_a_champion_deployed_in_int8_is_deployed_and_a_rollback_is_told_from_a_promotion(
        partless: Workbench, visit) -> None:
    partless.records.add("deployments", "shapes", "shapes-detector@1-int8", "anna", {})
    facts = {"promoted": True, "rollback": True, "champion": {"model": "shapes-detector@2"}}
    partless.records.add("promotions", "shapes", "shapes-detector@1", "anna", facts)
    at = visit("retrain", dataset="shapes")
    assert "annotates the next upload as shapes-detector@1-int8" in texts(at).replace("\\", "")
    assert not any(one.key == "deploy_go" for one in at.button)
    overview = visit("overview", dataset="shapes")
    table = next(one.value for one in overview.dataframe if "what" in one.value)
    assert "shapes-detector@1 is champion again: shapes-detector@2 was rolled back" in list(table["what"])
    assert "shapes-detector@1 became champion" in list(table["what"])


@pytest.mark.parametrize("source", ["A recipe of the workbench", "From a git repository"])
def test_a_training_may_wait_for_a_gpu_and_the_page_says_when_nobody_has_one(
        partless: Workbench, visit, source: str) -> None:
    at = visit("retrain", dataset="shapes")
    assert not any("lane gpu" in one.value for one in at.warning)
    if source == "From a git repository":
        from_git(at)
    widget(at.toggle, key="retrain_gpu").set_value(True).run()
    assert any("No worker serves the lane gpu now, so what is started here waits" in one.value for one in at.warning)
    widget(at.button, key="retrain_go").click().run()
    (job,) = partless.jobs.list(kind="retrain")
    assert job.args["gpu"] is True and job.args["version"] == "shapes@0.2.0"
    assert [one.proto.text.replace("\\", "") for one in at.get("progress")] == [
        "waiting: no worker serves the lane gpu now"]
    widget(at.button, key="save_accepted").click().run()
    rule = rules("shapes", records=partless.records)["accepted"]
    assert rule.training["gpu"] is True and "on a GPU" in texts(at) and not at.exception


def test_no_more_trainings_wait_than_the_setting_says(partless: Workbench, visit) -> None:
    settings = partless.config.home / "settings.toml"
    settings.write_text(settings.read_text() + "\nretrain_queue = 1\n")
    filled.job(partless, "re9", "retrain", "queued", {"dataset": "others", "version": "others@0.1.0"})
    at = visit("retrain", dataset="shapes")
    widget(at.button, key="retrain_go").click().run()
    assert any("1 retrain jobs wait already" in one.value and "retrain\\_queue" in one.value for one in at.warning)
    assert [job.id for job in partless.jobs.list(kind="retrain")] == ["re9"] and not at.exception


def test_a_click_beside_a_number_changes_it_by_a_fitting_step() -> None:
    assert [_step(default) for default in (20.0, 0.0, 0.0015, 0.5, -0.25, 1.5)] == [
        1, 1, pytest.approx(1e-4), pytest.approx(0.01), pytest.approx(0.01), pytest.approx(0.1)]
