"""What starts a training by itself, as cards: a schedule, work accepted in CVAT, drift of the deployed model."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import streamlit as st

from app import session, times
from app.training_form import Asked, summary
from workbench.steps.drift import LEAST_FRAMES, THRESHOLD, WINDOW, standing_alarm
from workbench.steps.rules import Rule, events, next_slot, rules, set_rule, switch_off

CARDS = {
    "schedule": (":material/schedule:", "On a schedule"),
    "accepted": (":material/fact_check:", "Accepted in CVAT"),
    "drift": (":material/trending_down:", "On drift"),
}
EVERY, CRON = "Every so often", "Cron expression"
SHOWN = 8


def cards(dataset: str, asked: Asked | None) -> None:
    """The three rules of a data set, each with what it does now and how to change it, and what they decided lately."""
    records = session.workbench().records
    known = rules(dataset, records=records)
    for column, (kind, (icon, title)) in zip(st.columns(3), CARDS.items(), strict=True):
        with column, st.container(border=True, height="stretch"):
            rule = known.get(kind)
            with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
                st.markdown(f"{icon} **{title}**", width="content")
                is_on = rule is not None and rule.is_on
                st.badge("on" if is_on else "off", color="green" if is_on else "gray")
            st.caption(_about(dataset, kind, rule if is_on else None))
            with st.container(horizontal=True):
                with st.popover("Change" if is_on else "Set up", icon=":material/tune:"):
                    _settings(dataset, kind, rule, asked)
                if is_on and st.button("Switch off", key=f"off_{kind}", type="tertiary"):
                    with session.explained():
                        switch_off(dataset, kind, records=records, person=session.person())
                        st.rerun()
    decided = events(dataset, records=records, limit=SHOWN)
    if decided:
        with st.expander(f"What they decided lately ({len(decided)})", icon=":material/history:"):
            st.dataframe(
                [
                    {
                        "when": times.clock(one.at),
                        "rule": CARDS[one.subject][1],
                        "decision": "training" if one.facts["args"] else "nothing to do",
                        "why": one.facts["told"],
                    }
                    for one in decided
                ],
                hide_index=True,
                column_config={"why": st.column_config.TextColumn(width="large")},
            )


def alarm(dataset: str) -> None:
    """The drift alarm that stands, where one does."""
    found = standing_alarm(dataset, session.workbench().records)
    if found:
        st.warning(f"**Drift alarm** · {session.literal(found.reason)}", icon=":material/trending_down:")


def _about(dataset: str, kind: str, rule: Rule | None) -> str:
    if rule is None:
        return {
            "schedule": "Trains on the latest version every few hours or days, when there is something new in it.",
            "accepted": "Trains when work that reviewers accepted in CVAT is published as a version.",
            "drift": "Tells when the deployed model sees something else than the version it learned from, and trains "
            "as soon as new labels are published.",
        }[kind]
    trains = f"Trains {summary(rule.training)}."
    if kind == "schedule":
        due = next_slot(rule, datetime.now(timezone.utc))
        said = rule.in_words()
        told = f"{said[:1].upper()}{said[1:]}; next {times.clock(due)}. {trains}"
    elif kind == "accepted":
        told = trains
    else:
        told = (
            f"Alarm above index {rule.threshold:g}, from {rule.least_frames} frames on. "
            f"{trains if rule.retrain else 'It only tells.'}{_last_look(dataset)}"
        )
    return session.literal(f"{told} Set by {rule.person}, {times.clock(rule.at)}.")


def _last_look(dataset: str) -> str:
    entries = session.workbench().records.entries("drift", dataset, limit=1)
    if not entries:
        return " Nothing was looked at yet."
    facts = entries[0].facts
    found = "alarm" if facts["alarm"] else "no drift" if facts["is_enough"] else facts["reason"].rstrip(".")
    return f" Last look {times.clock(entries[0].at)}: {found}."


def _settings(dataset: str, kind: str, rule: Rule | None, asked: Asked | None) -> None:
    given: dict[str, Any] = {}
    if kind == "schedule":
        how = st.segmented_control(
            "When", [EVERY, CRON], default=CRON if rule and rule.cron else EVERY, required=True, key="rule_how"
        )
        if how == EVERY:
            hours = (rule.every_h if rule else None) or 24.0
            one, two = st.columns(2)
            unit = two.selectbox("Unit", ["hours", "days"], index=int(hours % 24 == 0), key="rule_unit")
            share = 24 if unit == "days" else 1
            number = one.number_input("Every", 0.1, 366.0 * 24, hours / share, format="%g", key=f"rule_every_{unit}")
            given["every_h"] = number * share
        else:
            given["cron"] = st.text_input(
                "Minute, hour, day, month, weekday (UTC)",
                value=(rule.cron if rule else None) or "0 3 * * *",
                key="rule_cron",
            ).strip()
    if kind == "drift":
        one, two = st.columns(2)
        given["threshold"] = one.number_input(
            "Alarm above",
            0.01,
            10.0,
            rule.threshold if rule else THRESHOLD,
            format="%g",
            key="rule_threshold",
            help="Population stability index of confidences, labels or empty frames: 0.1 is some change, 0.25 a lot.",
        )
        given["least_frames"] = int(
            two.number_input(
                "Frames at least",
                10,
                WINDOW,
                rule.least_frames if rule else LEAST_FRAMES,
                key="rule_least",
                help="Fewer tell nothing.",
            )
        )
        given["retrain"] = st.toggle("An alarm starts a training", rule.retrain if rule else True, key="rule_retrain")
    st.caption(
        f"Trains what is filled in above ({session.literal(asked.about)}), on the latest version at that time."
        if asked
        else "Publish a version first: there is nothing to train on."
    )
    if st.button("Save", type="primary", key=f"save_{kind}", disabled=asked is None):
        with session.explained():
            training = {name: value for name, value in asked.arguments().items() if name != "version"}
            set_rule(
                Rule(dataset, kind, training=training, **given),
                records=session.workbench().records,
                person=session.person(),
            )
            st.rerun()
