"""Review tasks: frames that somebody shall look at, in jobs of a chosen size, apart from the rest of their upload.

An open CVAT cuts a task into jobs once, when it is made, and gives no way to put a frame into another job. So the chosen
frames' pixels are sent a second time, as a task of exactly these; their drawings go along (CvatServer.move), and in the
task they came from they are hidden, so that nobody labels a frame twice. What the copies cost is their pixels, nothing
else. A ground truth pool (honeypots) is possible only for a task that CVAT shuffles (recorded: i_honeypots 35).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.adapters.cvat import shapes
from workbench.adapters.cvat.connection import Connection, Gone
from workbench.adapters.cvat.state import Row, State
from workbench.adapters.cvat.uploads import TASK_FRAMES, Uploads
from workbench.annotation import Annotation
from workbench.errors import Invalid

if TYPE_CHECKING:
    from workbench.adapters.cvat.server import CvatServer

# What a frame may hold and we cannot carry along.
LEFT_BEHIND = ("points", "polyline", "cuboid", "skeleton")


def is_untouched(job: dict[str, Any]) -> bool:
    """Whether nobody works there, nor was asked to."""
    return (job["stage"], job["state"], job.get("assignee")) == ("annotation", "new", None)


def why_not(job: dict[str, Any]) -> str:
    who = (job.get("assignee") or {}).get("username") or "somebody"
    if (job["stage"], job["state"]) == ("annotation", "new"):
        return f"its job {job['id']} is assigned to {who}"
    return f"its job {job['id']} is {job['state']} in stage {job['stage']} ({who})"


class ReviewTasks:
    """One data set's. server: brings frames and their drawings from task to task."""

    def __init__(self, dataset: str, project: int, connection: Connection, state: State, uploads: Uploads,
                 server: CvatServer) -> None:
        self._dataset, self._project, self._connection = dataset, project, connection
        self._state, self._uploads, self._server = state, uploads, server

    def blocked(self, names: Sequence[str]) -> dict[str, str]:
        """{name: why} of frames that must stay where they are: somebody works there, or has drawn what we cannot move."""
        where, found = self._server.jobs_of(self._dataset), {}
        jobs = {one["id"]: one for one in self._connection.pages("/api/jobs", project_id=self._project)}
        rows = self._state.rows(self._dataset, names)
        held: dict[int, set[int] | None] = {}
        for name in names:
            job = where.get(name)
            if job is None:
                found[name] = "its task was deleted in CVAT"
            elif not is_untouched(jobs[job]):
                found[name] = why_not(jobs[job])
            elif (jobs[job].get("task_name") or "").startswith(f"{self._dataset} review "):
                found[name] = f"it was sent already, in job {job}"
            else:
                if job not in held:
                    held[job] = self._left_behind(job)
                if held[job] is None or rows[name].number in held[job]:
                    found[name] = f"job {job} holds points, lines, cuboids, skeletons or tracks, which cannot be moved"
        return found

    def places(self, names: Sequence[str]) -> dict[str, list[int]]:
        """{name: [task, number in it]}"""
        return {name: [row.task_id, row.number] for name, row in self._state.rows(self._dataset, names).items()
                if row.task_id is not None}

    def make(self, key: str, names: Sequence[str], pixels: Mapping[str, Path], *, job_size: int,
             check: Callable[[], None], honeypots: Sequence[str] = (), per_job: int = 0) -> int:
        """The task of that key: made now, or the one there is.

        honeypots  frames whose truth is known, of which `per_job` are mixed into every job unmarked

        Raises Invalid for more than TASK_FRAMES frames.
        """
        if not 0 < len(names) <= TASK_FRAMES:
            raise Invalid(f"A review task takes 1 to {TASK_FRAMES} frames, got {len(names)}. Send them in parts.")
        name = f"{self._dataset} review {key}"
        for task in list(self._connection.pages("/api/tasks", project_id=self._project, name=name)):
            if task["name"] == name and task.get("project_id") == self._project:
                if task.get("size"):
                    return task["id"]
                self._connection.delete(f"/api/tasks/{task['id']}")
        rows = self._state.rows(self._dataset, [*names, *honeypots])
        frames = [(rows[one], Path(pixels[one])) for one in [*names, *honeypots]]
        order: dict[str, Any] = {"sorting_method": "predefined", "upload_file_order": [row.file for row, _ in frames]}
        if honeypots:
            order = {"sorting_method": "random", "validation_params": {
                "mode": "gt_pool", "frame_selection_method": "manual", "frames": [rows[one].file for one in honeypots],
                "frames_per_job_count": per_job}}
        return self._uploads.make(name, self._project, frames, job_size, order, check)

    def fill(self, task: int, truth: Mapping[str, tuple[Sequence[Annotation], Sequence[Annotation]]]) -> None:
        """Draws the truth of the honeypots' pool, and on the honeypots themselves what a machine had proposed there, so
        that they look like their neighbours. truth: frame name -> (truth, proposals). Can be repeated."""
        layout = self._connection.get(f"/api/tasks/{task}/validation_layout")
        shown = [one["name"] for one in self._connection.get(f"/api/tasks/{task}/data/meta")["frames"]]
        rows = {row.file: row for row in self._state.rows(self._dataset, list(truth)).values()}
        labels = self._server.labels(self._dataset)

        def records(number: int, part: int) -> list[dict[str, Any]]:
            row = rows[shown[number]]
            return [shapes.to_record(one, row.frame, number, labels) for one in truth[row.frame.name][part]
                    if one.label in labels.ids]

        pool = next(job for job in self._connection.pages("/api/jobs", task_id=task) if job["type"] == "ground_truth")
        drawn = [one for number in layout["validation_frames"] for one in records(number, 0)]
        self._connection.call("PUT", f"/api/jobs/{pool['id']}/annotations", _by_kind(drawn))
        stored = self._connection.get(f"/api/tasks/{task}/annotations")
        has = {record["frame"] for kind in ("shapes", "tags") for record in stored.get(kind) or ()}
        proposed = [one for number in layout["honeypot_frames"] if number not in has for one in records(number, 1)]
        if proposed:
            self._connection.call("PATCH", f"/api/tasks/{task}/annotations", _by_kind(proposed), {"action": "create"})
        self._connection.call("PATCH", f"/api/jobs/{pool['id']}", {"stage": "acceptance", "state": "completed"},
                              is_repeatable=True)

    def take_over(self, task: int, names: Sequence[str]) -> dict[str, str]:
        """Lets the frames lie in the review task from now on; {name: why not}."""
        pool = {frame for job in self._connection.pages("/api/jobs", task_id=task) if job["type"] == "annotation"
                for frame in range(job["start_frame"], job["stop_frame"] + 1)}
        shown = self._connection.get(f"/api/tasks/{task}/data/meta")["frames"]
        at = {one["name"]: number for number, one in enumerate(shown) if number in pool}
        rows = self._state.rows(self._dataset, names)
        return self._server.move(self._dataset, task, {name: at[row.file] for name, row in rows.items()})

    def leave(self, places: Mapping[str, Sequence[int]]) -> list[str]:
        """Hides frames where they lay before and deletes there what went along. Can be repeated.

        Returns those on which somebody drew while they were moved: that drawing is left there.
        """
        rows, left = self._state.rows(self._dataset, list(places)), []
        by_task: dict[int, dict[int, Row]] = {}
        for name, (task, number) in places.items():
            if name in rows and rows[name].task_id != task:
                by_task.setdefault(task, {})[number] = rows[name]
        for task, lay in by_task.items():
            with suppress(Gone):  # deleted in CVAT since: nothing to hide
                meta = self._connection.get(f"/api/tasks/{task}/data/meta")
                hidden = sorted({*meta["deleted_frames"], *lay})
                if hidden != meta["deleted_frames"]:
                    self._connection.call("PATCH", f"/api/tasks/{task}/data/meta", {"deleted_frames": hidden},
                                          is_repeatable=True)
                for job in list(self._connection.pages("/api/jobs", task_id=task)):
                    here = {number: row for number, row in lay.items()
                            if job["type"] == "annotation" and job["start_frame"] <= number <= job["stop_frame"]}
                    left += self._clear(task, job["id"], here) if here else []
        return left

    def _clear(self, task: int, job: int, here: dict[int, Row]) -> list[str]:
        gone: list[dict[str, Any]] = []
        left = []
        for number, drawn in self._server.drawn_at(self._dataset, here, job).items():
            gone += [record for key, record in drawn.records.items() if key in here[number].ids]
            gone += drawn.copies
            if drawn.records.keys() - set(here[number].ids):
                left.append(here[number].frame.name)
        if gone:
            self._connection.call("PATCH", f"/api/tasks/{task}/annotations", _by_kind(gone), {"action": "delete"},
                                  is_repeatable=True)
        return left

    def _left_behind(self, job: int) -> set[int] | None:
        """Numbers of the frames with drawings that cannot be moved; None: tracks go through the whole job."""
        stored = self._connection.get(f"/api/jobs/{job}/annotations")
        if stored.get("tracks"):
            return None
        return {one["frame"] for one in stored.get("shapes") or () if one["type"] in LEFT_BEHIND}


def _by_kind(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    plain = [{name: value for name, value in one.items() if name != "kind"} for one in records]
    return {"shapes": [one for one in plain if "type" in one], "tags": [one for one in plain if "type" not in one]}
