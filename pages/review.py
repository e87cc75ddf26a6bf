"""People decide: each frame is corrected in FiftyOne's annotation, or just looked at, then accepted or rejected."""

from __future__ import annotations

import time

import streamlit as st

from app import review as pieces
from app import session
from workbench.errors import WorkbenchError
from workbench.run import WorkingFrame
from workbench.steps import review

DRAW, LOOK = "Draw", "Look"
ORDERS = {"name": "by name", "confidence": "least confident first"}
APP_HEIGHT = 700
RENEW_S = 30  # a third of the lease: two renewals may be lost
LIVE_S = 4


def parts() -> dict:
    workbench = session.workbench()
    return {"server": workbench.server, "records": workbench.records}


def leave() -> None:
    """Gives back the frame that is open, if one is."""
    opened = st.session_state.pop("review_open", None)
    if opened:
        dataset, frame, person, _ = opened
        review.close_frame(dataset, frame, person, **parts())


def go_to(dataset: str, frame: str | None) -> None:
    leave()
    st.session_state["review_frame"] = (dataset, frame)
    st.query_params.pop("frame", None)
    st.rerun()


def current(dataset: str, person: str, order: str) -> str | None:
    """The frame to show: the one chosen, the one in the address, or the next that waits."""
    chosen = st.session_state.get("review_frame")
    if chosen and chosen[0] == dataset and chosen[1]:
        return chosen[1]
    return st.query_params.get("frame") or review.next_frame(dataset, None, person, order=order, **parts())


def take(dataset: str, frame: str, person: str) -> WorkingFrame:
    """Leases the frame; the one that was open before is given back."""
    opened = st.session_state.get("review_open")
    if opened and opened[:3] != (dataset, frame, person):
        leave()
    working = review.open_frame(dataset, frame, person, **parts())
    if "review_open" not in st.session_state:
        st.session_state["review_open"] = (dataset, frame, person, time.monotonic())
    st.session_state["review_frame"] = (dataset, frame)
    if st.query_params.get("frame") != frame:
        st.query_params["frame"] = frame
    return working


def controls(frame: str | None, working: WorkingFrame | None) -> str | None:
    """The row of buttons for the frame shown; returns what was pressed. `working` is None when it was not taken."""
    pressed = None
    last = st.session_state.get("review_last")
    with st.container(horizontal=True, vertical_alignment="center"):
        if working is not None and working.is_reviewed:
            if st.button("Reopen", icon=":material/undo:", shortcut="O", help="Takes the decision on this frame back."):
                pressed = "reopen"
        elif working is not None:
            if st.button("Accept", type="primary", icon=":material/check:", shortcut="A"):
                pressed = "accepted"
            if st.button("Reject", icon=":material/close:", shortcut="X",
                         help="Leaves the frame out of the next version."):
                pressed = "rejected"
        if frame is not None and st.button("Skip", icon=":material/skip_next:", shortcut="S",
                                           help="The next frame; this one stays undecided."):
            pressed = "skip"
        if last and (working is None or last[1] != working.frame.name) \
                and st.button("Undo", icon=":material/undo:", shortcut="U",
                              help=session.literal(f"Reopens {last[1]}, which was {last[2]}.")):
            pressed = "undo"
        st.space("stretch")
        if not session.workbench().config.cvat_url:
            st.segmented_control("How", [DRAW, LOOK], default=DRAW, key="review_how", required=True,
                                 label_visibility="collapsed")
        st.selectbox("Order", list(ORDERS), format_func=ORDERS.get, key="review_order", label_visibility="collapsed",
                     width=210)
    return pressed


def surface(working: WorkingFrame, dataset: str, labels: tuple[str, ...], person: str, in_app: bool) -> None:
    """Where the person works: FiftyOne's annotation, or the picture beside the table of its boxes."""
    workbench = session.workbench()
    if in_app:
        st.iframe(workbench.server.review_url(dataset, working.frame.name), height=APP_HEIGHT, alt="FiftyOne")
        st.caption("Click **Annotate** at the top right of the picture (once), then draw, move, relabel or delete. The "
                   "app saves by itself 1 to 3 s later. Keys typed inside it stay inside it: click beside it before "
                   "you press A, X or S. Esc closes the picture; reload the page to open it again.")

        @st.fragment(run_every=LIVE_S)
        def live() -> None:
            with session.explained():
                now = workbench.server.read(dataset, [working.frame.name])
                pieces.provenance_table(now.get(working.frame.name, working))

        live()
        return
    left, right = st.columns([3, 2], gap="medium")
    with left:
        pieces.picture(working, labels, person)
    with right:
        pieces.provenance_table(working)


def act(pressed: str, dataset: str, frame: str | None, person: str, order: str, in_app: bool) -> None:
    """Does what was pressed and moves on."""
    if pressed == "undo":
        _, frame, _ = st.session_state.pop("review_last")
        review.decide(dataset, frame, "reopen", person=person, **parts())
        go_to(dataset, frame)
    if in_app and pressed != "reopen":
        # The app stays open meanwhile and saves what was drawn last.
        with st.spinner("Waiting until the annotation app has saved …"):
            time.sleep(review.APP_SAVE_S)
    if pressed == "skip":
        go_to(dataset, review.next_frame(dataset, frame, person, order=order, **parts()))
    seconds = time.monotonic() - st.session_state["review_open"][3]
    review.decide(dataset, frame, pressed, person=person, seconds=seconds, **parts())
    if pressed == "reopen":
        st.session_state.pop("review_last", None)
        st.rerun()
    st.session_state["review_last"] = (dataset, frame, pressed)
    go_to(dataset, review.next_frame(dataset, frame, person, order=order, **parts()))


def hold(dataset: str, frame: str, person: str) -> None:
    """Keeps the lease while the page is open, and says so when somebody else got the frame."""

    @st.fragment(run_every=RENEW_S)
    def renew() -> None:
        with session.explained():
            session.workbench().records.lease(dataset, frame, person)

    renew()


def work(dataset: str) -> None:
    workbench, person = session.workbench(), session.person()
    task = workbench.server.task(dataset)
    pieces.progress(task)
    last = st.session_state.get("review_last")
    if last and last[0] != dataset:
        st.session_state.pop("review_last")
    order = st.session_state.get("review_order", "name")
    frame = current(dataset, person, order)
    working, refused = None, None
    if frame is not None:
        try:
            working = take(dataset, frame, person)
        except WorkbenchError as failure:
            refused = failure
    pressed = controls(frame, working)
    in_cvat = bool(workbench.config.cvat_url)
    is_app_up = not in_cvat and pieces.app_answers(workbench.config.fiftyone)
    in_app = st.session_state.get("review_how", DRAW) == DRAW and is_app_up
    if refused is not None:
        session.error(refused)
    elif working is None:
        left = task.by_status["new"] + task.by_status["annotated"]
        if left:
            session.empty(f"Others are working on the {left} frames that are left. Come back in a minute or two.")
        elif task.frames:
            session.empty("Every frame is reviewed.", "versions", "Publish a version", "commit")
        else:
            session.empty("This data set has no frames yet.", "upload", "Upload frames", "upload")
    else:
        pieces.heading(working)
        if in_cvat:
            # CVAT refuses to be framed.
            with st.container(horizontal=True, vertical_alignment="center"):
                st.link_button("Correct it in CVAT", workbench.server.review_url(dataset, frame),
                               icon=":material/open_in_new:")
                st.caption("Save there, then accept or reject here; or complete the job in CVAT, which accepts its "
                           "frames.")
        elif not is_app_up and st.session_state.get("review_how", DRAW) == DRAW:
            st.warning(f"FiftyOne's app does not answer at {workbench.config.fiftyone}, so boxes cannot be changed "
                       "here. Start it with `workbench up`, or see `workbench doctor`. You can still accept and reject "
                       "by looking.", icon=":material/power_off:")
        surface(working, dataset, task.labels, person, in_app)
        hold(dataset, frame, person)
    with st.expander("Decisions", icon=":material/history:"):
        chosen = pieces.decisions(review.history(dataset, records=workbench.records))
    if pressed:
        act(pressed, dataset, frame, person, order, in_app and working is not None)
    elif chosen and chosen != frame and chosen != st.session_state.get("review_chosen"):
        st.session_state["review_chosen"] = chosen
        go_to(dataset, chosen)


dataset = session.header("Review",
                         "Correct what the machine drew, then accept or reject; every box remembers who touched it.")
with session.explained():
    if dataset is None:
        session.empty("There is no data set yet.", "upload", "Upload frames", "upload")
    else:
        work(dataset)
