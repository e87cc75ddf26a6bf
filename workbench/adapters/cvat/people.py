"""Who works on what in CVAT: jobs with stage, state and assignee, issues, ground truth, CVAT's quality report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.adapters.cvat.connection import Connection, Refused
from workbench.errors import Conflict, Invalid, NotFound

STAGES = ("annotation", "validation", "acceptance")
STATES = ("new", "in progress", "completed", "rejected")


@dataclass(frozen=True)
class CvatJob:
    """A part of a task that one person works on. frames: how many; first, last: their numbers in the task.

    type  "annotation" or "ground_truth"
    """

    id: int
    task_id: int
    type: str
    stage: str
    state: str
    assignee: str
    first: int
    last: int
    frames: int
    url: str
    updated_at: str = ""

    @property
    def is_accepted(self) -> bool:
        return (self.stage, self.state) == ("acceptance", "completed")


@dataclass(frozen=True)
class Issue:
    """What a reviewer wrote about a place of a frame. position: x, y, x, y ... in pixels."""

    id: int
    job_id: int
    frame: int
    position: tuple[float, ...]
    message: str
    owner: str
    assignee: str
    is_resolved: bool


@dataclass(frozen=True)
class Quality:
    """CVAT's comparison of a task with its ground truth job."""

    report_id: int
    task_id: int
    created_at: str
    accuracy: float
    precision: float
    recall: float
    conflicts: dict[str, int]
    frames: int


class People:
    """One data set's project. Every job and task number is checked to belong to it: CVAT would act on any."""

    def __init__(self, connection: Connection, project: int) -> None:
        self._connection, self._project = connection, project

    def jobs(self) -> list[CvatJob]:
        found = (job for job in self._connection.pages("/api/jobs", project_id=self._project)
                 if job.get("project_id") == self._project and not job.get("parent_job_id"))
        return sorted((self._job(job) for job in found), key=lambda job: job.id)

    def changed(self) -> str:
        """Another text whenever a job was made, changed, removed or drawn in; one small request."""
        page = self._connection.get("/api/jobs", project_id=self._project, sort="-updated_date", page_size=1)
        newest = page["results"][0] if page["results"] else {}
        return f"{page['count']} jobs, {newest.get('id')} at {newest.get('updated_date')}"

    def check_people(self, names: Sequence[str]) -> None:
        """Raises Invalid for a user that CVAT does not show."""
        for name in names:
            self._user(name)

    def set_job(self, job_id: int, stage: str | None = None, state: str | None = None,
                assignee: str | None = None) -> CvatJob:
        """Moves a job on. assignee: a user name, "" for nobody. CVAT resets the state when only the stage is given, so
        the state it has is sent along.

        Raises Invalid for a stage, state or user that does not exist, NotFound for a job of another project.
        """
        if stage is not None and stage not in STAGES:
            raise Invalid(f"Stage {stage!r} must be one of {', '.join(STAGES)}.")
        if state is not None and state not in STATES:
            raise Invalid(f"State {state!r} must be one of {', '.join(STATES)}.")
        was = self._checked_job(job_id)
        body: dict[str, Any] = {}
        if stage is not None:
            body.update(stage=stage, state=state or was["state"])
        elif state is not None:
            body["state"] = state
        if assignee is not None:
            # CVAT answers an unknown number with 500 (recorded: e_jobs_issues 45), so the name is looked up.
            body["assignee"] = self._user(assignee) if assignee else None
        if not body:
            return self._job(was)
        return self._job(self._connection.call("PATCH", f"/api/jobs/{job_id}", body, is_repeatable=True))

    def issues(self, is_resolved: bool | None = None) -> list[Issue]:
        """Oldest first, of all tasks."""
        found = []
        for task in sorted({job.task_id for job in self.jobs()}):
            for one in self._connection.pages("/api/issues", task_id=task):
                comments = list(self._connection.pages("/api/comments", issue_id=one["id"]))
                first = min(comments, key=lambda each: each["id"], default={"message": ""})
                found.append(Issue(one["id"], one["job"], one["frame"], tuple(one["position"]), first["message"],
                                   _name(one["owner"]), _name(one["assignee"]), one["resolved"]))
        return sorted((one for one in found if is_resolved in (None, one.is_resolved)), key=lambda one: one.id)

    def add_issue(self, job_id: int, frame: int, position: Sequence[float], message: str) -> int:
        """Writes an issue to a frame of a job; its number. Raises Invalid for a frame outside it, which CVAT takes."""
        job = self._job(self._checked_job(job_id))
        if not job.first <= frame <= job.last or len(position) < 4 or len(position) % 2 or not message.strip():
            raise Invalid(f"An issue of job {job_id} needs a message, a position x, y, x, y and a frame of {job.first} "
                          f"to {job.last}; got {message!r}, {list(position)}, {frame}.")
        return self._connection.call("POST", "/api/issues", {
            "job": job_id, "frame": frame, "position": [float(value) for value in position], "message": message})["id"]

    def resolve_issue(self, issue_id: int, is_resolved: bool = True) -> None:
        self._checked_job(self._connection.get(f"/api/issues/{issue_id}")["job"])
        self._connection.call("PATCH", f"/api/issues/{issue_id}", {"resolved": is_resolved}, is_repeatable=True)

    def make_ground_truth(self, task_id: int, frames: Sequence[int]) -> CvatJob:
        """A job whose annotations CVAT measures the others against; the one there is when the task has it already."""
        self._check_task(task_id)
        there = [job for job in self.jobs() if job.task_id == task_id and job.type == "ground_truth"]
        if there:
            return there[0]
        return self._job(self._connection.call("POST", "/api/jobs", {
            "type": "ground_truth", "task_id": task_id, "frame_selection_method": "manual",
            "frames": sorted(set(frames))}))

    def measure_quality(self, task_id: int) -> Quality:
        """Has CVAT compare the task with its ground truth and returns the report.

        Raises Conflict while the ground truth job is not completed in the acceptance stage.
        """
        self._check_task(task_id)
        try:
            request = self._connection.call("POST", "/api/quality/reports", {"task_id": task_id}, is_repeatable=True)
        except Refused as error:
            if "Ground Truth" not in str(error):
                raise
            raise Conflict(f"Task {task_id} cannot be measured: {error} Make a ground truth job, annotate it, and "
                           "complete it in the acceptance stage.") from error
        done = self._connection.wait(request["rq_id"])
        if done["status"] != "finished":
            raise Invalid(f"CVAT could not measure task {task_id}: {done.get('message', '')}")
        return self._quality(self._connection.get(f"/api/quality/reports/{done['result_id']}"))

    def quality(self, task_id: int) -> list[Quality]:
        """The reports there are, newest first."""
        self._check_task(task_id)
        found = self._connection.pages("/api/quality/reports", task_id=task_id, target="task")
        return sorted((self._quality(one) for one in found if one["target"] == "task"), key=lambda one: -one.report_id)

    def _quality(self, one: dict[str, Any]) -> Quality:
        summary = one["summary"]
        return Quality(one["id"], one["task_id"], one["created_date"], summary["accuracy"], summary["precision"],
                       summary["recall"], dict(summary.get("conflicts_by_type") or {}), summary["validation_frames"])

    def _checked_job(self, job_id: int) -> dict[str, Any]:
        job = self._connection.get(f"/api/jobs/{job_id}")
        if job.get("project_id") != self._project:
            raise NotFound(f"Job {job_id} belongs to another project of CVAT. The jobs of this data set are on the "
                           "CVAT page.")
        return job

    def _check_task(self, task_id: int) -> None:
        if self._connection.get(f"/api/tasks/{task_id}").get("project_id") != self._project:
            raise NotFound(f"Task {task_id} belongs to another project of CVAT. The tasks of this data set are on the "
                           "CVAT page.")

    def _user(self, name: str) -> int:
        for user in self._connection.pages("/api/users", search=name):
            if user["username"] == name:
                return user["id"]
        raise Invalid(f"CVAT at {self._connection.url} shows no user {name!r}. Check the name, or let them sign in "
                      "once.")

    def _job(self, job: dict[str, Any]) -> CvatJob:
        return CvatJob(job["id"], job["task_id"], job.get("type", "annotation"), job["stage"], job["state"],
                       _name(job.get("assignee")), job["start_frame"], job["stop_frame"],
                       job.get("frame_count", job["stop_frame"] - job["start_frame"] + 1),
                       f"{self._connection.url}/tasks/{job['task_id']}/jobs/{job['id']}", job.get("updated_date") or "")


def _name(user: dict[str, Any] | None) -> str:
    return (user or {}).get("username") or ""
