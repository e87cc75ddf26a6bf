"""What a page knows of its visitor: the open workbench, who acts, what is chosen, which job is watched."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import streamlit as st

from app import times
from workbench import wiring
from workbench.config import Config
from workbench.errors import Unavailable, WorkbenchError
from workbench.jobs import JobStatus, QueueFull

PAGES = Path(__file__).resolve().parent.parent / "pages"
STATE_COLOUR = {"queued": "gray", "running": "blue", "done": "green", "failed": "red", "cancelled": "orange"}
LOG_LINES = 200
PERSON_LETTERS = 100


def workbench() -> wiring.Workbench:
    """The one workbench of this server, for the settings as they are now."""
    return _open(Config.read())


@st.cache_resource(show_spinner=False, hash_funcs={Config: astuple})
def _open(config: Config) -> wiring.Workbench:
    return wiring.Workbench(config)


def person() -> str:
    """Who acts: the name typed in the sidebar, else the one in the address, else the setting `person`."""
    said = st.session_state.get("acting_person") or st.query_params.get("person") or ""
    said = "".join(letter for letter in said if letter.isprintable()).strip()[:PERSON_LETTERS]
    return said or workbench().config.person


def frame() -> None:
    """What surrounds every page: a little style, and who acts."""
    st.html(
        "<style>.block-container{padding:2.2rem 2.6rem 4rem;max-width:1500px}"
        "[data-testid=stMetricValue]{font-size:1.5rem}</style>"
    )
    with st.sidebar:
        # Kept apart from the widget: Streamlit forgets a widget's value when a page is left.
        st.text_input(
            "Who acts",
            value=person(),
            key="acting_person_typed",
            max_chars=PERSON_LETTERS,
            icon=":material/person:",
            on_change=_take_person,
            help="Reviews, runs, versions and promotions are recorded under this name.",
        )


def _take_person() -> None:
    st.session_state["acting_person"] = st.session_state["acting_person_typed"]


def header(title: str, about: str, with_dataset: bool = True) -> str | None:
    """Title and one sentence on the left; on the right the data set, which is returned (None: there is none yet)."""
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    with left:
        st.title(title, anchor=False)
        st.caption(about)
    if not with_dataset:
        return None
    with right:
        return dataset_picker()


def error(failure: WorkbenchError) -> None:
    """A failure's sentence, which ends with the next step; a part that is down looks less like a mistake."""
    # Markdown in the sentence (a file's name, say) must show as typed.
    if isinstance(failure, QueueFull):
        st.warning(literal(str(failure)), icon=":material/hourglass_top:")
    elif isinstance(failure, Unavailable):
        st.warning(literal(str(failure)), icon=":material/power_off:")
    else:
        st.error(literal(str(failure)), icon=":material/error:")


@contextmanager
def explained() -> Iterator[None]:
    """What fails inside is told in one sentence, and the rest of the page goes on."""
    try:
        yield
    except WorkbenchError as failure:
        error(failure)


def literal(text: str) -> str:
    """Text as Markdown that shows exactly that text: file names and messages come from outside."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()<>#+-.!|~$:^=&" else letter for letter in text)


def empty(sentence: str, page: str | None = None, label: str = "", icon: str = "") -> None:
    """An empty state: what is missing, and the page where it is made."""
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        st.markdown(sentence)
        if page:
            link(page, label, icon)


def link(page: str, label: str, icon: str = "arrow_forward") -> None:
    """A link to another page that keeps what is chosen."""
    st.page_link(PAGES / f"{page}.py", label=label, icon=f":material/{icon or 'arrow_forward'}:", query_params=chosen())


def go(page: str, **choices: str) -> None:
    """Leaves for another page, with choices made there (dataset="...", job="...")."""
    for name, value in choices.items():
        st.session_state[f"chosen_{name}"] = value
    st.switch_page(PAGES / f"{page}.py", query_params={**chosen(), **choices})


def dataset_picker(label: str = "Data set") -> str | None:
    """The data set at work, kept across pages and in the address; None (and nothing drawn) when there is none."""
    with explained():
        return pick("dataset", label, workbench().datasets.names(), keeps_default=True)
    return None


def version_picker(dataset: str, label: str = "Version", name: str = "version") -> str | None:
    """A version of the data set as a reference, newest first; None when none is published."""
    with explained():
        versions = workbench().datasets.versions(dataset)
        about = {one.ref: f"{one.version} · {one.labeled} of {one.frames} frames labelled" for one in versions}
        return pick(name, label, [one.ref for one in versions], about.get)
    return None


def model_picker(
    refs: Sequence[str], label: str = "Model", about: dict[str, str] | None = None, name: str = "model"
) -> str | None:
    """One of the model references, best first as the caller ordered them; None when there are none."""
    return pick(name, label, list(refs), lambda ref: (about or {}).get(ref, ref))


def pick(
    name: str, label: str, options: Sequence[str], format_func: Any = str, keeps_default: bool = False
) -> str | None:
    """A select box whose choice survives a change of page (session) and a reload (address).

    What a person chose is kept. What stood there by default is kept only with `keeps_default`: otherwise the first
    option is chosen anew each time, so that the version just published, or the model just deployed, is the next one
    used.
    """
    if not options:
        return None
    kept, key = f"chosen_{name}", f"pick_{name}"
    wanted = st.session_state.get(kept) or st.query_params.get(name)
    value = wanted if wanted in options else options[0]
    # Set on every run: a widget of the same key on another page is another widget and would begin with its default.
    st.session_state[key] = value
    st.selectbox(label, options, format_func=format_func, key=key, on_change=_keep, args=(name,))
    if value == wanted or keeps_default:
        st.session_state[kept] = value
        if st.query_params.get(name) != value:
            st.query_params[name] = value
    return value


def _keep(name: str) -> None:
    st.session_state[f"chosen_{name}"] = st.session_state[f"pick_{name}"]


def chosen() -> dict[str, str]:
    """What an address must carry to open another page with the same data set and person."""
    said = {
        "dataset": st.session_state.get("chosen_dataset"),
        "person": person() if person() != workbench().config.person else None,
    }
    return {name: value for name, value in said.items() if value}


def submit(kind: str, arguments: dict[str, Any]) -> str | None:
    """Starts a job and watches it on this page; the same click twice is one job. None when it could not be started.

    The idempotency key is the form's token and the arguments. The token is made with the form and renewed only after
    its job has ended, so that a second click, however late it arrives, names the same job.
    """
    token = st.session_state.setdefault(f"form_{kind}", uuid.uuid4().hex)
    arguments = {**arguments, "person": person()}
    said = json.dumps([token, kind, arguments], sort_keys=True)
    with explained():
        job_id = workbench().jobs.ask(
            kind, arguments, person=person(), key=hashlib.sha256(said.encode()).hexdigest()[:32]
        )
        st.session_state[f"job_{kind}"] = job_id
        st.query_params["job"] = job_id
        return job_id
    return None


def watched(kind: str, dataset: str | None = None) -> JobStatus | None:
    """The job of this kind to show here: this visitor's, else one that still runs on the data set, else None."""
    jobs = workbench().jobs
    asked = st.session_state.get(f"job_{kind}") or st.query_params.get("job")
    if asked:
        try:
            status = jobs.get(asked)
        except WorkbenchError:
            # An old address: the job it names is gone.
            st.session_state.pop(f"job_{kind}", None)
        else:
            if status.kind == kind and (dataset is None or dataset_of(status) == dataset):
                st.session_state[f"job_{kind}"] = status.id
                if status.is_over:
                    st.session_state[f"form_{kind}"] = f"after {status.id}"
                    if _is_news(status.id):
                        # What stands above on the page may have been read before the job ended.
                        st.rerun()
                return status
    for job in active_jobs(kind):
        if dataset is None or dataset_of(job) == dataset:
            # From now on it is this visitor's too: its result is shown here when it is over.
            st.session_state[f"job_{kind}"] = job.id
            return job
    return None


def _is_news(job_id: str) -> bool:
    """Whether this visitor's pages were not yet drawn anew since the job ended; True once for each job."""
    over: set[str] = st.session_state.setdefault("jobs_over", set())
    if job_id in over:
        return False
    over.add(job_id)
    return True


def active_jobs(kind: str | None = None) -> list[JobStatus]:
    """The jobs that run, then those that wait, each newest first."""
    return [job for state in ("running", "queued") for job in workbench().jobs.list(limit=50, kind=kind, state=state)]


def dataset_of(status: JobStatus) -> str:
    """The data set a job works on, by its arguments."""
    return str(status.args.get("dataset") or str(status.args.get("version", "")).partition("@")[0])


def job_panel(job: JobStatus, open_log: bool = False) -> None:
    """A job as it goes: state, progress, failed items, cancel, log; drawn again every second while it runs.

    `job` is what the page around it was drawn from: when the job is over by now, the page is drawn anew.
    """
    job_id, is_active = job.id, not job.is_over

    @st.fragment(run_every=1 if is_active else None)
    def panel() -> None:
        with explained():
            now = workbench().jobs.get(job_id)
            if is_active and now.is_over:
                # The page around it shows the result.
                _is_news(job_id)
                st.rerun(scope="app")
            _draw_job(now, open_log)

    panel()


def _draw_job(status: JobStatus, open_log: bool) -> None:
    jobs = workbench().jobs
    with st.container(border=True):
        left, right = st.columns([5, 1], vertical_alignment="center")
        with left, st.container(horizontal=True, vertical_alignment="center"):
            st.badge(status.state, color=STATE_COLOUR.get(status.state, "gray"))
            st.markdown(f"**{literal(status.kind)}** {literal(dataset_of(status))}", width="content")
            st.caption(
                f"{times.duration(status.started_at, status.finished_at)} · by {literal(status.person)} · "
                f"job `{status.id[:12]}`",
                width="content",
            )
        with right, st.container(horizontal=True, horizontal_alignment="right"):
            if status.is_cancelling:
                st.caption("stopping …")
            elif not status.is_over and st.button("Cancel", key=f"cancel_{status.id}", icon=":material/stop_circle:"):
                jobs.cancel(status.id)
                st.toast("Cancelling: the job stops after the item it is at.")
        if not status.is_over:
            share = min(1.0, status.done / status.total) if status.total else 0.0
            counted = f"{status.done} of {status.total}" if status.total else "starting"
            if status.state == "queued":
                lane = jobs.unserved_lane(status.kind, status.args)
                counted = f"waiting: no worker serves the lane {lane} now" if lane else "waiting for a worker"
            st.progress(share, text=literal(f"{counted}{' · ' + status.note if status.note else ''}"))
        if status.state == "failed" and status.error:
            said, _, more = status.error.partition("\n")
            st.error(literal(said), icon=":material/error:")
            if more:
                st.code(more, language=None)
        failed = jobs.failed_items(status.id) if status.failed_items else {}
        if failed:
            with st.expander(f"{len(failed)} failed items", icon=":material/warning:"):
                st.dataframe([{"item": item, "reason": reason} for item, reason in failed.items()], hide_index=True)
        with st.expander("Log", expanded=open_log, icon=":material/notes:"):
            lines = jobs.log_lines(status.id)
            st.code("\n".join(lines[-LOG_LINES:]) or "Nothing was logged yet.", language=None)
