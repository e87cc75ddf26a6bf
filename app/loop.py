"""The loop as it stands for one data set: what each of the eight stations holds, and the next thing to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import urlencode

from app.scores import NAMES, first
from workbench.dataset import DatasetVersion
from workbench.errors import NotFound, WorkbenchError
from workbench.evaluation.primary import default_metric, task_of
from workbench.steps.deploy import champions, is_served_by
from workbench.steps.version import pending
from workbench.wiring import Workbench

# station -> (page, what it does in three words)
STATIONS = {
    "upload": ("upload", "frames come in"),
    "annotate": ("annotate", "a model draws"),
    "review": ("review", "a person decides"),
    "evaluate": ("evaluate", "scores on a split"),
    "version": ("versions", "labels are published"),
    "retrain": ("retrain", "a student learns"),
    "promote": ("retrain", "challenger or champion"),
    "deploy": ("models", "the next annotator"),
}
# Decisions of before there were several metrics do not say by which they were made.
BEFORE = "map_50_95"
JOB_STATION = {
    "upload": "upload",
    "annotate": "annotate",
    "undo": "annotate",
    "correct": "review",
    "evaluate": "evaluate",
    "version": "version",
    "retrain": "retrain",
    "promote": "promote",
    "rollback": "promote",
    "deploy": "deploy",
    "redeploy": "deploy",
}


@dataclass(frozen=True)
class Loop:
    """by_status, evaluations, runs and pending are None when the part that knows them does not answer, or was not asked
    yet (is_partial).

    drawn           what people draw on the data set: "boxes", "polygons" or "tags"
    best            (model, metric, score) of the best evaluation, by the metric that models are compared by here
    champion_score  (metric, score) that the champion was promoted by
    no_status       why by_status is None, in a few words
    """

    dataset: str
    by_status: Mapping[str, int] | None = None
    versions: tuple[DatasetVersion, ...] = ()
    pending: int | None = None
    models: tuple[str, ...] = ()
    evaluations: int | None = None
    drawn: str = "boxes"
    best: tuple[str, str, float] | None = None
    runs: int | None = None
    champion: str | None = None
    champion_score: tuple[str, float] | None = None
    champion_trained_on: str = ""
    deployed: str | None = None
    active: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    is_partial: bool = False
    no_status: str = "mongod does not answer"

    @property
    def latest(self) -> DatasetVersion | None:
        return self.versions[0] if self.versions else None


@dataclass(frozen=True)
class NextStep:
    """One sentence, the page to go to, what the button says, and which station it is."""

    sentence: str
    page: str
    button: str
    station: str


def gather(
    workbench: Workbench, dataset: str, active: Mapping[str, tuple[int, int]], is_partial: bool = False
) -> tuple[Loop, list[WorkbenchError]]:
    """The loop of a data set, and why some of it is not known: a part that is down leaves its station empty.

    active      station -> (done, total) of the jobs that run
    is_partial  ask neither mongod nor MLflow: their libraries take seconds to open the first time
    """
    failures: list[WorkbenchError] = []

    def ask(call: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return call()
        except WorkbenchError as failure:
            failures.append(failure)
            return otherwise

    versions = ask(lambda: tuple(workbench.datasets.versions(dataset)), ())
    task = None if is_partial else ask(lambda: workbench.server.task(dataset), None)
    is_down = bool(failures)
    server = "CVAT" if workbench.config.cvat_url else "mongod"
    has_none = is_down and isinstance(failures[-1], NotFound)
    waiting = (
        None
        if task is None or is_down
        else ask(lambda: len(pending(dataset, server=workbench.server, store=workbench.datasets).frames), None)
    )
    evaluations = None if is_partial else ask(lambda: workbench.tracker.runs(f"{dataset}/evaluations"), None)
    # One sentence about a tracker that is down is enough.
    runs = None if evaluations is None else ask(lambda: workbench.tracker.runs(dataset), None)
    promoted = champions(dataset, workbench.records)
    champion = promoted[0] if promoted else None
    frames = ask(lambda: workbench.datasets.manifest(versions[0].ref).frames, ()) if versions else ()
    drawn, decided = task_of(frames), champion.facts.get("primary") or BEFORE if champion else None
    return Loop(
        dataset=dataset,
        by_status=None if task is None else task.by_status,
        no_status="there is no working copy" if has_none else f"{server} does not answer",
        versions=versions,
        pending=waiting,
        models=tuple(ask(workbench.models.refs, ())),
        evaluations=None if evaluations is None else len(evaluations),
        drawn=drawn,
        best=_best(evaluations or (), drawn, decided or default_metric(drawn, frames)),
        runs=None if runs is None else len(runs),
        champion=champion.subject if champion else None,
        champion_score=_score(champion.facts.get("challenger") or {}, decided) if champion else None,
        champion_trained_on=_trained_on(workbench, champion.subject) if champion else "",
        deployed=workbench.records.deployed(dataset),
        active=active,
        is_partial=is_partial,
    ), failures


def _best(evaluations: Sequence[Mapping[str, Any]], drawn: str, usual: str) -> tuple[str, str, float] | None:
    """(model, metric, score) of the best of them by one metric: `usual`, else the first of the task that one has."""
    has = {name: value for run in evaluations for name, value in run["metrics"].items()}
    metric = first(drawn, has, usual)
    scored = [
        (str(run["tags"].get("model") or run["params"].get("model") or run["name"]), metric, run["metrics"][metric])
        for run in evaluations
        if metric in run["metrics"]
    ]
    return max(scored, key=lambda one: one[2], default=None)


def _score(side: Mapping[str, Any], metric: str) -> tuple[str, float] | None:
    return (metric, side[metric]) if isinstance(side.get(metric), (int, float)) else None


def _trained_on(workbench: Workbench, model: str) -> str:
    try:
        return workbench.models.card(model).trained_on.get("ref", "")
    except WorkbenchError:
        # A champion whose files are gone: the models page says so; here it only means "unknown".
        return ""


def next_step(loop: Loop) -> NextStep:
    """The one thing that moves this data set on, the earliest station that has work first."""
    count = loop.by_status or {}
    new, annotated = count.get("new", 0), count.get("annotated", 0)
    labelled = loop.latest.labeled if loop.latest else 0
    if loop.active:
        station = next(iter(loop.active))
        return NextStep(
            f"The {station} job is running; it goes on when this page is closed.", "jobs", "Watch the job", station
        )
    if annotated:
        return NextStep(
            f"{_frames(annotated)} wait{'s' if annotated == 1 else ''} for a person to accept or reject what is drawn.",
            "review",
            "Review the next frame",
            "review",
        )
    if loop.pending:
        return NextStep(
            f"{_frames(loop.pending)} changed since the last version: publish them.",
            "versions",
            "Publish the next version",
            "version",
        )
    if loop.champion and not is_served_by(loop.champion, loop.deployed):
        return NextStep(
            f"{loop.champion} is champion but does not annotate yet: deploy it.",
            "retrain",
            "Deploy the champion",
            "deploy",
        )
    if new and loop.models:
        return NextStep(
            f"{_frames(new)} {'is' if new == 1 else 'are'} new: let a model draw the first {loop.drawn}.",
            "annotate",
            "Annotate new frames",
            "annotate",
        )
    if labelled and not loop.champion:
        return NextStep(
            f"{_frames(labelled)} {'is' if labelled == 1 else 'are'} labelled and no model has learned from "
            "them yet: train the first student.",
            "retrain",
            "Train a student",
            "retrain",
        )
    if labelled and loop.latest and loop.champion_trained_on not in ("", loop.latest.ref):
        return NextStep(
            f"The champion learned from {loop.champion_trained_on}; {loop.latest.ref} has newer labels: train a "
            "challenger.",
            "retrain",
            "Train a challenger",
            "retrain",
        )
    if new:
        return NextStep(
            f"{_frames(new)} {'is' if new == 1 else 'are'} new and there is no model to draw on them: label the "
            "first by hand.",
            "review",
            "Label the first frames",
            "review",
        )
    return NextStep(
        "Everything is reviewed, published and trained on: bring in new frames.", "upload", "Upload frames", "upload"
    )


def _frames(number: int) -> str:
    return f"{number} frame{'' if number == 1 else 's'}"


def figures(loop: Loop) -> dict[str, tuple[str, str]]:
    """station -> (the figure that counts there, a few words below it)."""
    count = loop.by_status
    total = sum(count.values()) if count is not None else loop.latest.frames if loop.latest else 0
    latest, (metric, score) = loop.latest, loop.champion_score or ("", None)
    no_mongod, no_mlflow = (
        (("…", "asking"),) * 2
        if loop.is_partial
        else (("–", loop.no_status), ("–", "MLflow does not answer"))
    )
    return {
        "upload": (str(total), "frames" if total != 1 else "frame"),
        "annotate": (str(count.get("new", 0)), "new, nobody looked") if count is not None else no_mongod,
        "review": (
            f"{count.get('accepted', 0)}",
            f"accepted · {count.get('annotated', 0)} waiting · {count.get('rejected', 0)} rejected",
        )
        if count is not None
        else no_mongod,
        "evaluate": (f"{loop.best[2]:.3f}", f"best {NAMES.get(loop.best[1], loop.best[1])} · {loop.best[0]}")
        if loop.best
        else no_mlflow
        if loop.evaluations is None
        else (str(loop.evaluations), "evaluations" if loop.evaluations != 1 else "evaluation"),
        "version": (
            latest.version if latest else "–",
            f"{len(loop.versions)} published · {latest.boxes} {loop.drawn}" if latest else "none published",
        ),
        "retrain": no_mlflow
        if loop.runs is None
        else (str(loop.runs), "training runs" if loop.runs != 1 else "training run"),
        "promote": (
            f"{score:.3f}" if score is not None else "–",
            f"{NAMES.get(metric, metric)} · {loop.champion}".removeprefix(" · ")
            if loop.champion
            else "no champion yet",
        ),
        "deploy": ("on" if loop.deployed else "–", loop.deployed or "no annotator yet"),
    }


def picture(loop: Loop, todo: str = "", query: Mapping[str, str] | None = None) -> str:
    """The loop as HTML, four stations to the right and four back; each links to its page with `query`. All text is
    escaped.

    HTML and not SVG: Streamlit's sanitiser lets no inline SVG through.
    """
    said, stations, query = figures(loop), list(STATIONS), urlencode(query or {})
    upper, lower = stations[:4], stations[:3:-1]
    cells = _row([_card(loop, station, stations, said, todo, query) for station in upper], "→")
    cells += ["<b class='up'>↑</b><i>the deployed model annotates the next upload</i><b class='down'>↓</b>"]
    cells += _row([_card(loop, station, stations, said, todo, query) for station in lower], "←")
    return f"<style>{_STYLE}</style><nav class='loop' aria-label='The loop'>{''.join(cells)}</nav>"


def _row(cards: list[str], arrow: str) -> list[str]:
    return [piece for card in cards for piece in (f"<b>{arrow}</b>", card)][1:]


def _card(
    loop: Loop, station: str, stations: list[str], said: Mapping[str, tuple[str, str]], todo: str, query: str
) -> str:
    page, about = STATIONS[station]
    value, below = said[station]
    classes = "station" + (" todo" if station == todo else "") + (" running" if station in loop.active else "")
    if station in loop.active:
        done, total = loop.active[station]
        value, below = (f"{done}/{total}" if total else "…"), "a job is running"
    href = f"{page}?{query}" if query else page
    return (
        f"<a href='{escape(href)}' class='{classes}'><span class='name'>"
        f"<span class='number'>{stations.index(station) + 1}</span>"
        f"{station}<span class='about'>{escape(about)}</span></span>"
        f"<span class='value'>{escape(value)}</span>"
        f"<span class='below' title='{escape(below)}'>{escape(below)}</span></a>"
    )


_STYLE = """
.loop{display:grid;grid-template-columns:1fr 22px 1fr 22px 1fr 22px 1fr;align-items:stretch}
.loop>b{align-self:center;text-align:center;font-weight:400;font-size:1.15rem;opacity:.5}
.loop>.up{grid-column:1;padding:.25rem 0}.loop>.down{grid-column:7;padding:.25rem 0}
.loop>i{grid-column:2/7;align-self:center;font-size:.8rem;opacity:.6}
.loop .station{display:flex;flex-direction:column;min-width:0;padding:.7rem .9rem .75rem;border-radius:.75rem;
 border:1.5px solid rgba(110,130,130,.28);background:rgba(15,118,110,.045);color:inherit;text-decoration:none}
.loop .station:hover{border-color:#0f766e;background:rgba(15,118,110,.1)}
.loop .name{display:flex;align-items:center;gap:.45rem;font-weight:650;font-size:.98rem}
.loop .number{flex:none;width:1.4rem;height:1.4rem;border-radius:50%;background:rgba(15,118,110,.16);color:#0f766e;
 font-size:.76rem; font-weight:700;display:flex;align-items:center;justify-content:center}
.loop .about{margin-left:auto;font-weight:400;font-size:.72rem;opacity:.55;white-space:nowrap}
.loop .value{font-size:1.65rem;font-weight:700;line-height:1.25;margin-top:.4rem}
.loop .below{font-size:.78rem;opacity:.72;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.loop .todo{border-color:#0f766e;background:rgba(15,118,110,.13)}.loop .todo .number{background:#0f766e;color:#fff}
.loop .running{border:1.5px dashed #2563eb;animation:loop-run 1.6s ease-in-out infinite}
@keyframes loop-run{50%{background:rgba(37,99,235,.12)}}
"""
