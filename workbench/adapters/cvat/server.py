"""AnnotationServer on a CVAT server.

A data set is a CVAT project, each upload a task in it, and CVAT splits a task into jobs for people. Drawings live in
CVAT; what it has no place for lies beside it (state.py).

Status of a frame. A CVAT job decides for all its frames: they are accepted when it is completed in the acceptance
stage, because that is the one state which CVAT itself counts as done (its `jobs.completed`; "completed" in an earlier
stage only hands the job on), and rejected while its state is "rejected". A status written here holds for its frame
until a job decides after it; when the job is reopened, it holds again. Nothing is written to a job by itself.

Writing. CVAT has no conditional write and takes several requests for one frame. Writers of this workbench exclude one
another by a lock in our database. Before a write the frame is read again and compared, then only what differs is
created, updated and deleted, by id. What a person saves in CVAT between that reading and our last request (some tens of
milliseconds) is not seen: a box they moved is overwritten if the same write changes or deletes that very box, and stays
as they left it otherwise. Frames that people and runs share should therefore be leased (workbench.records), and a job
that is being worked on in CVAT be left alone by runs.

A kill. What shall stand on a frame is written down before the first request. Whoever reads the frame next carries it
through: what is there already is left, what a person changed since stays as they left it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from workbench.adapters.cvat import people, shapes
from workbench.adapters.cvat.connection import Connection, Gone
from workbench.adapters.cvat.frames import begun, check, job_of, new_row, revision, status_of, working_frame
from workbench.adapters.cvat.hooks import HooksInCvat
from workbench.adapters.cvat.review import ReviewTasks, is_untouched, why_not
from workbench.adapters.cvat.state import Row, State, with_write
from workbench.adapters.cvat.uploads import TASK_FRAMES, Uploads
from workbench.adapters.cvat.writes import carry_out
from workbench.annotation import Annotation
from workbench.dataset import LabeledFrame, check_dataset_name
from workbench.errors import Conflict, Invalid, NotFound, Unavailable
from workbench.ports import TaskSummary
from workbench.run import STATUSES, WorkingFrame
from workbench.taxonomy import Taxonomy

JOB_SIZE = 100
READS = 20  # how often a frame that is being written is read again before giving up


class CvatServer:
    """connection: to CVAT. engine: the database of workbench.records. job_size: frames of one CVAT job."""

    # Two jobs of the default size: at seven boxes a frame CVAT needs about a second to store them.
    write_batch = 2 * JOB_SIZE

    def __init__(self, connection: Connection, engine: sa.Engine, job_size: int = JOB_SIZE) -> None:
        self.connection = connection
        self._state = State(engine)
        self._uploads = Uploads(connection, self._state, job_size)

    def open_task(self, dataset: str, taxonomy: Taxonomy) -> None:
        check_dataset_name(dataset)
        specs = {label: shapes.label_spec(label) for label in taxonomy.labels}
        with self._state.lock(f"open:{dataset}"):
            project = self._recorded(dataset)
            if project is not None and not self._is_there(project):
                self._state.forget(dataset)  # deleted in CVAT with all that was drawn: begin anew
                project = None
            if project is None:
                project = self._made(dataset)
            labels = self._labels(project)
            new = [spec for label, spec in specs.items() if label not in labels.ids]
            if new:
                self.connection.call("PATCH", f"/api/projects/{project}", {"labels": new})

    def tasks(self) -> list[TaskSummary]:
        there = {dataset: project for dataset, project in self._state.projects(self.connection.url).items()
                 if self._is_there(project)}
        return [self._summary(dataset, project) for dataset, project in there.items()]

    def task(self, dataset: str) -> TaskSummary:
        return self._summary(dataset, self.project(dataset))

    def delete_task(self, dataset: str) -> None:
        project = self._recorded(dataset)
        if project is None:
            raise self._unknown(dataset)
        with self._state.lock(f"upload:{dataset}"), self._state.lock(f"write:{dataset}"):
            self.connection.delete(f"/api/projects/{project}")
            self._state.forget(dataset)

    def add_frames(self, dataset: str, frames: Iterable[tuple[LabeledFrame, Path]]) -> int:
        """As the port says. Raises Invalid after everything else was added when CVAT refused pictures, naming them."""
        project, pending, added = self.project(dataset), iter(frames), 0
        refused: dict[str, str] = {}
        while batch := list(islice(pending, TASK_FRAMES)):
            labels = self._complete_labels(project, [one.annotations or () for one, _ in batch])
            with self._state.lock(f"upload:{dataset}") as renew:
                known = {place.name for place in self._state.places(dataset)
                         if place.task_id is not None}
                there = set(self.frame_names(dataset)) if known else set()
                new = {one.frame.name: (new_row(one, path, labels), path) for one, path in batch
                       if one.frame.name not in there}
                self._state.put(dataset, [row for row, _ in new.values()])
                self._uploads.recover(dataset, project, renew)
                rows = self._state.rows(dataset, list(new))
                refused |= self._uploads.send(
                    dataset, project, [one for name, one in new.items() if rows[name].task_id is None], renew)
                added += len(new.keys() - refused.keys())
            self.read(dataset, [name for name, (row, _) in new.items() if row.pending and name not in refused])
        if refused:
            first, why = next(iter(refused.items()))
            raise Invalid(f"CVAT refused {len(refused)} of the pictures, first {first!r}: {why[:200]} The others are "
                          "in. Mend or remove these, then upload again.")
        return added

    def frame_names(self, dataset: str, status: str | None = None, order: str = "name") -> list[str]:
        if status is not None and status not in STATUSES:
            raise Invalid(f"Status {status!r} must be one of {', '.join(STATUSES)}.")
        if order not in ("name", "confidence"):
            raise Invalid(f"Order {order!r} must be 'name' or 'confidence'.")
        found = [place for place, now in self._places(self.project(dataset), dataset) if status in (None, now)]
        if order == "confidence":
            found.sort(key=lambda place: (place.least_confidence, place.name))
        return [place.name for place in found]

    def read(self, dataset: str, names: Sequence[str]) -> dict[str, WorkingFrame]:
        project, wanted = self.project(dataset), list(dict.fromkeys(names))
        labels = self._labels(project) if wanted else None
        for _ in range(READS if wanted else 0):
            before = self._state.write_ids(dataset, wanted)
            rows, jobs, now = self._stand(dataset, project, wanted, labels)
            if any(row.pending for row in rows.values()):
                with self._state.lock(f"write:{dataset}") as renew:
                    self._recover(dataset, project, wanted, labels, renew)
            elif self._state.write_ids(dataset, wanted) == before:
                return {name: working_frame(rows[name], jobs[name], now[name]) for name in wanted if name in rows}
        if wanted:
            raise Unavailable(f"The frames of {dataset} are being written again and again. Wait a moment, then try "
                              "again.")
        return {}

    def write(self, dataset: str, frames: Sequence[WorkingFrame]) -> list[str]:
        project = self.project(dataset)
        if not frames:
            return []
        labels = self._complete_labels(project, [working.annotations or () for working in frames])
        for working in frames:
            check(working, labels)
        names = list(dict.fromkeys(working.frame.name for working in frames))
        with self._state.lock(f"write:{dataset}") as renew:
            self._recover(dataset, project, names, labels, renew)
            rows, jobs, now = self._stand(dataset, project, names, labels)
            writing, stale = {}, []
            for working in frames:
                name = working.frame.name
                if name not in rows:
                    self._check_task(dataset, name)
                is_read = name in rows and name not in writing
                if not is_read or working.revision != revision(rows[name], jobs[name], now[name]):
                    stale.append(name)
                    continue
                writing[name] = begun(rows[name], working, jobs[name], now[name])
            self._state.put(dataset, list(writing.values()))
            try:
                self._carry_out(dataset, project, list(writing.values()), now, labels, renew)
            except Invalid:
                # Refused, perhaps half-way: the frames go back to what they were, by the same way.
                self._state.put(dataset, [with_write(rows[name], pending=row.pending and row.pending[::-1])
                                          for name, row in writing.items()])
                self._recover(dataset, project, list(writing), labels, renew)
                raise
        return stale

    def review_url(self, dataset: str, name: str) -> str:
        project = self.project(dataset)
        rows, jobs, _ = self._stand(dataset, project, [name], None)
        if name not in rows:
            self._check_task(dataset, name)
            raise NotFound(f"Data set {dataset} has no frame {name!r}.")
        return (f"{self.connection.url}/tasks/{rows[name].task_id}/jobs/{jobs[name]['id']}"
                f"?frame={quote(str(rows[name].number))}")

    def project(self, dataset: str) -> int:
        """CVAT's number of the data set's project. Raises NotFound without one, Conflict for one on another server."""
        project = self._recorded(dataset)
        if project is None:
            raise self._unknown(dataset)
        return project

    def people(self, dataset: str) -> people.People:
        """Jobs, issues and quality of the data set's project."""
        return people.People(self.connection, self.project(dataset))

    def datasets(self) -> list[str]:
        """The data sets that are worked on in this CVAT; nothing is asked of it."""
        return sorted(self._state.projects(self.connection.url))

    def hooks(self, dataset: str) -> HooksInCvat:
        """What CVAT tells us when people work in the data set's project."""
        return HooksInCvat(self.connection, self.project(dataset))

    def jobs_of(self, dataset: str) -> dict[str, int]:
        """Frame name -> number of the CVAT job it lies in."""
        jobs = self._jobs(self.project(dataset))
        found = {place.name: job_of(jobs, place.task_id, place.number) for place in self._state.places(dataset)}
        return {name: job["id"] for name, job in found.items() if job is not None}

    def reviews(self, dataset: str) -> ReviewTasks:
        """Tasks of exactly the frames that somebody shall look at."""
        return ReviewTasks(dataset, self.project(dataset), self.connection, self._state, self._uploads, self)

    def move(self, dataset: str, task: int, numbers: Mapping[str, int]) -> dict[str, str]:
        """Lets frames lie in another task from now on, drawings and all; {name: why not} of those that stay.

        numbers  frame name -> its number in that task, whose frames show the same pixels

        A frame whose job somebody has begun stays. Killed at any point, the frame is in one place, and whoever reads it
        next brings its drawings there.
        """
        project, labels = self.project(dataset), self._labels(self.project(dataset))
        with self._state.lock(f"write:{dataset}") as renew:
            self._recover(dataset, project, list(numbers), labels, renew)
            rows, jobs, now = self._stand(dataset, project, list(numbers), labels)
            stay = {name: "its task was deleted in CVAT" for name in numbers if name not in rows}
            moved = []
            for name, row in rows.items():
                if row.task_id == task:
                    continue
                if not is_untouched(jobs[name]):
                    stay[name] = why_not(jobs[name])
                    continue
                drawn = tuple(now[name].annotations.values())
                moved.append(with_write(row, task_id=task, number=numbers[name], decided_in="",
                                        ids=tuple(a.id for a in drawn), pending=((), drawn) if drawn else None))
            self._state.put(dataset, moved)
            nothing = {row.frame.name: shapes.Drawn({}, {}) for row in moved}
            self._carry_out(dataset, project, moved, nothing, labels, renew)
        return stay

    def drawn_at(self, dataset: str, rows: Mapping[int, Row], job: int) -> dict[int, shapes.Drawn]:
        """What is drawn on frames of a job, by number, read as if the rows lay there."""
        labels, stored = self._labels(self.project(dataset)), self.connection.get(f"/api/jobs/{job}/annotations")
        records: dict[int, list[tuple[str, dict[str, Any]]]] = {number: [] for number in rows}
        for kind in ("shapes", "tags"):
            for record in stored.get(kind) or ():
                if record["frame"] in records:
                    records[record["frame"]].append((kind, record))
        return {number: shapes.drawn(records[number], row.frame, labels, row.known_ids) for number, row in rows.items()}

    def labels(self, dataset: str) -> shapes.Labels:
        return self._labels(self.project(dataset))

    def _recorded(self, dataset: str) -> int | None:
        found = self._state.project(dataset)
        if found is None:
            return None
        url, project = found
        if url != self.connection.url:
            raise Conflict(f"The working copy of {dataset} is in CVAT at {url}, the setting 'cvat_url' says "
                           f"{self.connection.url}. Set it back, or publish and delete that working copy first.")
        return project

    def _unknown(self, dataset: str) -> NotFound:
        return NotFound(f"There is no data set {dataset!r} to annotate in CVAT at {self.connection.url}. Upload it "
                        "first.")

    def _is_there(self, project: int) -> bool:
        try:
            self.connection.get(f"/api/projects/{project}")
        except Gone:
            return False
        return True

    def _made(self, dataset: str) -> int:
        """Creates the project; an empty one of that name is what a killed attempt left, or nobody's loss."""
        named = [one for one in self.connection.pages("/api/projects", name=dataset) if one["name"] == dataset]
        empty = (one["id"] for one in named if not one["tasks"]["count"])
        project = next((number for number in empty if self._is_like_ours(number)), None)
        if project is None and named:
            raise Conflict(f"CVAT at {self.connection.url} has a project {dataset!r} (number {named[0]['id']}) that "
                           "this workbench did not make. Choose another name, or rename the one in CVAT.")
        if project is None:
            project = self.connection.call("POST", "/api/projects", {"name": dataset})["id"]
        self._state.add_project(dataset, self.connection.url, project)
        return project

    def _is_like_ours(self, project: int) -> bool:
        return all("wb_id" in specs for specs in self._labels(project).specs.values())

    def _labels(self, project: int) -> shapes.Labels:
        found = self.connection.pages("/api/labels", project_id=project)
        return shapes.Labels.read(one for one in found if one.get("project_id") == project)

    def _complete_labels(self, project: int, drawn: Iterable[Iterable[Annotation]]) -> shapes.Labels:
        """The project's labels; one that a person added in CVAT gets our attributes when it is first written with."""
        labels, used = self._labels(project), {one.label for each in drawn for one in each}
        bare = [labels.ids[name] for name in sorted(used & labels.ids.keys())
                if not set(shapes.ATTRIBUTES) <= labels.specs[labels.ids[name]].keys()]
        for number in bare:
            record = self.connection.get(f"/api/labels/{number}")
            has = {each["name"] for each in record["attributes"]}
            # CVAT gives the label another colour unless it is sent along (recorded: b_projects 26, 27).
            self.connection.call("PATCH", f"/api/labels/{number}", is_repeatable=True, body={
                "color": record["color"], "attributes": [
                    *record["attributes"], *(spec for spec in shapes.attribute_specs() if spec["name"] not in has)]})
        return self._labels(project) if bare else labels

    def _jobs(self, project: int) -> dict[int, list[dict[str, Any]]]:
        """Task -> its jobs for annotation; ground truth and replicas show the same frames once more."""
        found: dict[int, list[dict[str, Any]]] = {}
        for job in self.connection.pages("/api/jobs", project_id=project):
            is_plain = job.get("type", "annotation") == "annotation" and not job.get("parent_job_id")
            if job.get("project_id") == project and is_plain:
                found.setdefault(job["task_id"], []).append(job)
        if not found and not self._is_there(project):
            raise NotFound(f"Project {project} was deleted in CVAT at {self.connection.url}, with all that was drawn "
                           "in it. Upload the data set again: its published versions are kept.")
        return found

    def _places(self, project: int, dataset: str) -> list[tuple[Any, str]]:
        """Every frame that is there, by name, with its status now."""
        jobs, found = self._jobs(project), []
        for place in self._state.places(dataset):
            job = job_of(jobs, place.task_id, place.number)
            if job is not None:
                found.append((place, status_of(place.status, place.decided_in, job)))
        return found

    def _summary(self, dataset: str, project: int) -> TaskSummary:
        counted = Counter(status for _, status in self._places(project, dataset))
        return TaskSummary(dataset=dataset, labels=tuple(self._labels(project).ids), frames=counted.total(),
                           by_status={status: counted[status] for status in STATUSES},
                           url=f"{self.connection.url}/projects/{project}")

    def _stand(self, dataset: str, project: int, names: Sequence[str], labels: shapes.Labels | None) -> tuple[
            dict[str, Row], dict[str, dict[str, Any]], dict[str, shapes.Drawn]]:
        """(rows, the job of each, what is drawn on each) of the frames that are there; without labels, no drawings."""
        rows, jobs = self._state.rows(dataset, names), self._jobs(project)
        on = {name: job_of(jobs, row.task_id, row.number) for name, row in rows.items()}
        on = {name: job for name, job in on.items() if job is not None}
        rows = {name: rows[name] for name in on}
        if labels is None:
            return rows, on, {}
        needed: dict[int, dict[int, str]] = {}
        for name, job in on.items():
            needed.setdefault(job["id"], {})[rows[name].number] = name
        records: dict[str, list[tuple[str, dict[str, Any]]]] = {name: [] for name in rows}
        for job, numbers in needed.items():
            stored = self.connection.get(f"/api/jobs/{job}/annotations")
            for kind in ("shapes", "tags"):
                for record in stored.get(kind) or ():
                    if record["frame"] in numbers:
                        records[numbers[record["frame"]]].append((kind, record))
        now = {name: shapes.drawn(records[name], row.frame, labels, row.known_ids) for name, row in rows.items()}
        return rows, on, now

    def _recover(self, dataset: str, project: int, names: Sequence[str], labels: shapes.Labels,
                 renew: Callable[[], None]) -> None:
        """Carries through what a writer that died, or was not answered, left pending. The lock must be held."""
        pending = [name for name, row in self._state.rows(dataset, names).items() if row.pending]
        if pending:
            rows, _, now = self._stand(dataset, project, pending, labels)
            self._carry_out(dataset, project, list(rows.values()), now, labels, renew, is_late=True)

    def _carry_out(self, dataset: str, project: int, rows: list[Row], now: dict[str, shapes.Drawn],
                   labels: shapes.Labels, renew: Callable[[], None], is_late: bool = False) -> None:
        def again(names: Sequence[str]) -> dict[str, shapes.Drawn]:
            return self._stand(dataset, project, names, labels)[2]

        try:
            carry_out(self.connection, [row for row in rows if row.pending], now, labels, renew, again, is_late)
        except Gone as error:
            raise NotFound(f"A task of {dataset} was deleted in CVAT while it was written to. Upload its frames again, "
                           "then repeat this: everything else is as it was.") from error
        self._state.settle(dataset, [row.frame.name for row in rows if row.pending])

    def _check_task(self, dataset: str, name: str) -> None:
        row = self._state.rows(dataset, [name]).get(name)
        if row is not None and row.task_id is not None:
            raise NotFound(f"CVAT task {row.task_id}, which held {name!r} of {dataset}, was deleted in CVAT. Upload "
                           "that frame again.")
