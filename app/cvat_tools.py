"""Models in CVAT's AI tools: what is in the way, deploying one, those that are deployed, and a try on one frame."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from dataclasses import astuple
from typing import Any

import streamlit as st
from PIL import Image, ImageOps

from app import certificate, session
from app.draw import draw
from workbench import doctor
from workbench.annotation import Annotation
from workbench.config import Config
from workbench.errors import Unavailable
from workbench.formats.nuclio import DETECTOR, DRAWS, TRACKER, Function
from workbench.formats.nuclio_bundle import bundle, nuclio_function
from workbench.model import ModelCard
from workbench.steps.cvat_gateway import Served, deploy_to_cvat, served, withdraw_from_cvat
from workbench.taxonomy import Taxonomy

ICON = {
    "ok": (":material/check_circle:", "green"),
    "note": (":material/info:", "orange"),
    "WRONG": (":material/error:", "red"),
}
AS = {DETECTOR: "Detector", TRACKER: "Tracker"}
NO_PROJECT, OWN = "any project, by equal names", "a frame of the data set, without CVAT"
# More labels than this are a wall of choices; a project with more is mapped in CVAT's own dialog.
MOST_RENAMES = 20
TRY_S, WIDTH = 120, 900


@st.cache_data(ttl=20, show_spinner="Asking CVAT and the gateway …")
def _examined(settings: tuple) -> list[dict[str, Any]]:
    return [check.to_json() for check in doctor.examine_cvat(session.workbench())]


def standing() -> dict[str, dict[str, Any]]:
    """Draws what `workbench doctor cvat` says, and returns the last finding of each name."""
    config = session.workbench().config
    found = _examined(astuple(config))
    with st.container(border=True):
        for one in found:
            if one["name"] == "functions" and one["mark"] != "WRONG":
                continue
            icon, colour = ICON[one["mark"]]
            st.markdown(f":{colour}[{icon}] **{one['name']}** · {session.literal(one['says'])}")
        with st.container(horizontal=True, vertical_alignment="center"):
            if st.button("Look again", icon=":material/refresh:"):
                refresh()
            st.caption("`workbench doctor cvat` says the same.")
    is_listed = any(one["name"] == "AI tools" and one["mark"] == "ok" for one in found)
    with st.expander("What CVAT needs", icon=":material/settings:", expanded=not is_listed):
        st.write("In a file `docker-compose.override.yml` beside CVAT's own, then `docker compose up -d`:")
        st.code(compose(config), language="yaml")
        st.caption(
            session.literal(
                f"The gateway listens at {config.gateway} and is let in from {config.gateway_allow or 'nowhere'} "
                "(gateway_allow). For a CVAT in containers set gateway_port, gateway_host, gateway_allow and "
                "gateway_url: docs/cvat-gateway.md has an example."
            )
        )
    return {one["name"]: one for one in found}


def refresh() -> None:
    _examined.clear()
    st.rerun()


def compose(config: Config) -> str:
    lines = [f'      {name}: "{value}"' for name, value in doctor.cvat_settings(config).items()]
    return "\n".join(
        [
            "services:",
            *(
                line
                for part in ("cvat_server", "cvat_worker_annotation")
                for line in (f"  {part}:", "    environment:", *lines)
            ),
        ]
    )


def deploy() -> None:
    """Model version, kind and labels -> checked -> deployed."""
    wb, cards = session.workbench(), {}
    for ref in wb.models.refs():
        with session.explained():
            cards[ref] = wb.models.card(ref)
    if not cards:
        session.empty("No model is registered yet.", "models", "Register one", "deployed_code")
        return
    left, right = st.columns(2)
    with left:
        card = cards[session.model_picker(list(cards), "Model version")]
        kinds = [DETECTOR] if card.task == "tags" else [DETECTOR, TRACKER]
        kind = st.segmented_control(
            "In CVAT it is a", kinds, format_func=AS.get, default=DETECTOR, required=True, key=f"cvat_kind_{len(kinds)}"
        )
        draws = ""
        if kind == DETECTOR and len(DRAWS[card.task]) > 1:
            draws = st.selectbox("It draws", DRAWS[card.task], key="cvat_draws")
    with right:
        renames = _labels(card) if kind == DETECTOR else {}
        if kind == TRACKER:
            st.info(
                "A tracker follows the boxes that people draw, whatever their labels are called.",
                icon=":material/info:",
            )
        stands = certificate.standing(card)
        if stands.is_int8:
            (st.warning if stands.why_not else st.success)(
                session.literal(stands.why_not or "Its certificate holds on this machine."), icon=":material/verified:"
            )
    if st.button("Deploy to CVAT", type="primary", icon=":material/rocket_launch:", disabled=bool(stands.why_not)):
        with session.explained(), st.spinner("Opening the model …"):
            made = deploy_to_cvat(
                card.ref,
                kind=kind,
                draws=draws,
                renames=renames,
                models=wb.models,
                records=wb.records,
                certificates=wb.certificates,
                open_backend=wb.open_backend,
                person=session.person(),
            )
            st.session_state["cvat_deployed"] = made.name
            refresh()


def _labels(card: ModelCard) -> dict[str, str]:
    """How the labels of the model and of a CVAT project meet; what a person renames."""
    wb, names = session.workbench(), {}
    with session.explained():
        names = wb.cvat_tools.projects()
    project = st.selectbox(
        "CVAT project", [0, *names], format_func=lambda one: names.get(one, NO_PROJECT), key="cvat_project"
    )
    if not project:
        st.caption("CVAT maps labels by equal names; people can change that in its own dialog.")
        return {}
    with session.explained():
        theirs = Taxonomy(tuple(dict.fromkeys(wb.cvat_tools.labels(project=project).values())))
        mapped = card.labels.map_to(theirs)
        renames = {}
        for label in mapped.unreached[:MOST_RENAMES] if mapped.unmatched else ():
            ours = st.selectbox(
                f"{session.literal(label)} in CVAT is",
                ["", *mapped.unmatched],
                format_func=lambda one: one or "not drawn by this model",
                key=f"cvat_rename_{label}",
            )
            if ours:
                renames[ours] = label
        pairs = card.labels.map_to(theirs, renames).pairs
        said = f"{len(pairs)} of {len(card.labels)} labels of the model are in the project"
        lost = [label for label in card.labels.labels if label not in pairs]
        if not pairs:
            st.error(
                f"{said}: CVAT would draw nothing. Add its labels to the project, or say above which are the same.",
                icon=":material/error:",
            )
        elif lost:
            st.warning(
                session.literal(f"{said}; CVAT drops {', '.join(lost[:10])}{' …' if len(lost) > 10 else ''}."),
                icon=":material/label_off:",
            )
        else:
            st.success(f"{said}.", icon=":material/check_circle:")
        return renames
    return {}


def deployed(checks: dict[str, dict[str, Any]]) -> list[Served]:
    """The functions with their state in CVAT; a person withdraws them or takes them elsewhere."""
    wb, new = session.workbench(), st.session_state.pop("cvat_deployed", None)
    found = served(models=wb.models, records=wb.records, certificates=wb.certificates)
    if not found:
        st.caption("None yet.")
        return []
    listed = checks.get("AI tools", {}).get("mark") == "ok"
    for one in found:
        function = one.function
        with st.container(border=True):
            left, right = st.columns([5, 3], vertical_alignment="center")
            with left.container(horizontal=True, vertical_alignment="center"):
                st.markdown(
                    f"**{session.literal(function.model)}** · {AS[function.kind].lower()}"
                    + (f" · draws {function.draws}" if function.draws else "")
                )
                if one.why_not:
                    st.badge("left out", icon=":material/block:", color="red")
                elif listed:
                    st.badge("CVAT lists it", icon=":material/check:", color="green")
                else:
                    st.badge("CVAT does not list it yet", icon=":material/hourglass_empty:", color="orange")
                if function.name == new:
                    st.badge("deployed just now", color="blue")
            with right.container(horizontal=True, horizontal_alignment="right"):
                if function.kind == DETECTOR and function.draws != "mask" and one.card is not None:
                    _elsewhere(function, one.card)
                if st.button("Withdraw", key=f"withdraw_{function.name}", icon=":material/delete:"):
                    with session.explained():
                        withdraw_from_cvat(function.name, records=wb.records, person=session.person())
                        refresh()
            left.caption(
                f"`{function.name}` · by {session.literal(one.person)}, {one.at[:16].replace('T', ' ')} UTC"
                + "".join(
                    f" · {session.literal(ours)} → {session.literal(theirs)}"
                    for ours, theirs in list(function.renames.items())[:5]
                )
            )
            if one.why_not:
                st.warning(session.literal(one.why_not), icon=":material/lock:")
    return found


def _elsewhere(function: Function, card: ModelCard) -> None:
    """The same deployment for a real Nuclio."""
    config = session.workbench().config
    with st.popover("For a real Nuclio", icon=":material/cloud_upload:"):
        url = st.text_input(
            "Where Nuclio's functions reach this service",
            value=config.service,
            max_chars=300,
            key=f"nuclio_{function.name}",
            help="Its host must be in the setting allowed_hosts.",
        )
        st.download_button(
            "function.yaml bundle",
            lambda: bundle(function, card, url),
            f"{function.name}.zip",
            "application/zip",
            icon=":material/download:",
            key=f"bundle_{function.name}",
            on_click="ignore",
        )
        if not config.nuclio_url:
            st.caption("Set `nuclio_url` to the address of its dashboard to deploy from here.")
        elif st.button("Deploy there", key=f"there_{function.name}", icon=":material/rocket_launch:"):
            with session.explained(), st.spinner("Nuclio builds the function: this takes a minute or two …"):
                session.workbench().nuclio.deploy(nuclio_function(function, card, url, config.service_token))
                st.success("Nuclio says it is ready.", icon=":material/check_circle:")


def try_one(found: list[Served]) -> None:
    """A detector on one frame, as CVAT's people would call it, drawn."""
    wb = session.workbench()
    detectors = {one.function.name: one for one in found if one.function.kind == DETECTOR and not one.why_not}
    if not detectors:
        st.caption("Deploy a detector first. Trackers are tried in CVAT: draw a box with *AI tools → Trackers*.")
        return
    tasks = []
    with session.explained():
        tasks = wb.cvat_tools.tasks()
    by_id = {task.id: task for task in tasks}
    left, middle, right = st.columns([3, 3, 1], vertical_alignment="bottom")
    name = left.selectbox(
        "Function", list(detectors), format_func=lambda one: detectors[one].function.model, key="try_function"
    )
    task = middle.selectbox(
        "On",
        [*by_id, 0],
        key="try_task",
        format_func=lambda one: OWN if not one else f"task {one}: {by_id[one].name} ({by_id[one].frames} frames)",
    )
    frame = right.number_input("Frame", 0, max(by_id[task].frames - 1, 0) if task else None, 0, key="try_frame")
    if not st.button("Try it", icon=":material/play_arrow:"):
        return
    with session.explained(), st.spinner("Looking …"):
        began = time.monotonic()
        if task:
            drawn, data = _through_cvat(name, task, int(frame))
        else:
            drawn, data = _through_gateway(name, int(frame))
        seconds = time.monotonic() - began
        try:
            with Image.open(io.BytesIO(data)) as opened:
                st.image(draw(ImageOps.exif_transpose(opened), drawn, width=WIDTH))
        except (OSError, Image.DecompressionBombError) as error:
            raise Unavailable(f"The frame itself cannot be shown ({error}). Try another one.") from error
        st.success(
            f"{len(drawn)} {'shape' if len(drawn) == 1 else 'shapes'} in {seconds:.1f} s, "
            f"{'through CVAT; nothing was stored' if task else 'from the gateway itself'}.",
            icon=":material/check_circle:",
        )


def _through_cvat(name: str, task: int, frame: int) -> tuple[list[Annotation], bytes]:
    tools = session.workbench().cvat_tools
    data, labels = tools.picture(task, frame), tools.labels(task=task)
    if not labels:  # of a task in a project they are the project's
        labels = tools.labels(project=next(one.project for one in tools.tasks() if one.id == task))
    answer = tools.call(name, task, frame)
    return [
        _annotation(labels.get(one["label_id"], "?"), one.get("type", "tag"), one.get("points") or (), None)
        for one in [*answer.get("shapes", ()), *answer.get("tags", ())]
    ], data


def _through_gateway(name: str, number: int) -> tuple[list[Annotation], bytes]:
    """Calls the gateway as CVAT does, with a frame of the newest version of the data set at work."""
    wb = session.workbench()
    dataset = st.session_state.get("chosen_dataset") or next(iter(wb.datasets.names()), None)
    versions = wb.datasets.versions(dataset) if dataset else []
    frames = wb.datasets.manifest(versions[0].ref).frames if versions else ()
    if not frames:
        raise Unavailable("There is neither a task in CVAT nor a data set here. Upload pictures first.")
    data = wb.blobs.get(frames[number % len(frames)].frame.blob)
    request = urllib.request.Request(
        f"{wb.config.gateway}/api/function_invocations",
        json.dumps({"image": base64.b64encode(data).decode()}).encode(),
        {"Content-Type": "application/json", "x-nuclio-function-name": name},
    )
    try:
        with urllib.request.urlopen(request, timeout=TRY_S) as answer:
            items = json.load(answer)
    except urllib.error.HTTPError as error:
        raise Unavailable(f"The gateway answers {error.code}: {error.reason}") from error
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"The gateway does not answer at {wb.config.gateway} ({error}). `workbench up` starts it."
        ) from error
    return [_annotation(one["label"], one["type"], one.get("points") or (), one["confidence"]) for one in items], data


def _annotation(label: str, kind: str, points: list[float], confidence: float | None) -> Annotation:
    """A shape of CVAT; a stored mask as the box around it."""
    given: dict[str, Any] = {}
    if kind == "rectangle":
        given["xyxy"] = tuple(points)
    elif kind == "mask" and len(points) > 4 and confidence is None:
        left, top, right, bottom = points[-4:]
        given["xyxy"] = (left, top, right + 1, bottom + 1)
    elif points:
        given["polygon"] = tuple(zip(points[::2], points[1::2]))
    return Annotation(label, source="model:cvat@1", confidence=confidence, **given)
