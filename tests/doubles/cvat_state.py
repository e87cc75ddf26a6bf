"""What the CVAT double remembers and answers: the calls the workbench makes, as CVAT 2.73 answers them.

Numbers in brackets name the recorded exchange an answer was taken from; tests/unit/adapters/test_cvat_double.py holds
them against the recordings and CVAT's OpenAPI file.
"""

from __future__ import annotations

import io
import itertools
import re
import zipfile
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from PIL import Image

from doubles.cvat_hooks import HookState

SOURCES = ("auto", "semi-auto", "manual", "file", "consensus")
SHAPES = ("rectangle", "polygon", "polyline", "points", "ellipse", "cuboid", "mask", "skeleton")
POINTS = {"rectangle": lambda n: n == 4, "polygon": lambda n: n >= 6 and n % 2 == 0, "ellipse": lambda n: n == 4,
          "polyline": lambda n: n >= 4 and n % 2 == 0, "points": lambda n: n >= 2 and n % 2 == 0,
          "mask": lambda n: n >= 6, "cuboid": lambda n: n == 16, "skeleton": lambda n: n == 0}

KEPT = {"tags": {"id", "label_id", "frame", "group", "source", "attributes"}}
KEPT["shapes"] = KEPT["tags"] | {"type", "points", "occluded", "outside", "z_order", "rotation", "score", "elements"}


class Refusal(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}


def missing(kind: str) -> Refusal:
    return Refusal(404, {"detail": f"No {kind} matches the given query."})


class CvatState(HookState):
    def __init__(self, version: str = "2.73.0") -> None:
        super().__init__()
        self.version, self.url = version, ""
        self._numbers: dict[str, Iterator[int]] = {}
        self.users = {1: "admin", 2: "worker1"}
        self.projects: dict[int, dict[str, Any]] = {}
        self.labels: dict[int, dict[str, Any]] = {}
        self.tasks: dict[int, dict[str, Any]] = {}
        self.jobs: dict[int, dict[str, Any]] = {}
        self.requests: dict[str, dict[str, Any]] = {}
        self.issues: dict[int, dict[str, Any]] = {}
        self.comments: dict[int, dict[str, Any]] = {}
        self.reports: dict[int, dict[str, Any]] = {}
        self.uploads: dict[int, dict[str, bytes]] = {}
        self.pixels: dict[int, list[bytes]] = {}
        self.records: dict[int, dict[str, list[dict[str, Any]]]] = {}  # of a job
        self.received: list[str] = []  # every file that arrived whole, as often as it did
        self.polls_until_done = 1

    def number(self, kind: str) -> int:
        return next(self._numbers.setdefault(kind, itertools.count(1)))

    def user(self, number: int | None) -> dict[str, Any] | None:
        if number is None:
            return None
        if number not in self.users:
            raise Refusal(500, "<h1>Server Error (500)</h1>")  # e_jobs_issues 45
        return {"url": f"{self.url}/api/users/{number}", "id": number, "username": self.users[number], "first_name": "",
                "last_name": ""}

    # projects and labels

    def make_project(self, body: dict[str, Any]) -> dict[str, Any]:
        if "name" not in body:
            raise Refusal(400, {"name": ["This field is required."]})
        if not body["name"]:
            raise Refusal(400, {"name": ["This field may not be blank."]})
        number = self.number("project")
        self.projects[number] = {"id": number, "name": body["name"], "created_date": now(), "updated_date": now()}
        self._add_labels(number, body.get("labels") or [])
        return self.project(number)

    def project(self, number: int) -> dict[str, Any]:
        if number not in self.projects:
            raise missing("Project")
        own = self.projects[number]
        count = sum(task["project_id"] == number for task in self.tasks.values())
        return {"url": f"{self.url}/api/projects/{number}", "id": number, "name": own["name"], "owner": self.user(1),
                "assignee": None, "guide_id": None, "bug_tracker": "", "created_date": own["created_date"],
                "updated_date": own["updated_date"], "status": "annotation", "dimension": "2d" if count else None,
                "organization": None, "organization_id": None, "target_storage": None, "source_storage": None,
                "tasks": {"count": count, "url": f"{self.url}/api/tasks?project_id={number}"},
                "labels": {"url": f"{self.url}/api/labels?project_id={number}"}, "assignee_updated_date": None,
                "task_subsets": []}

    def change_project(self, number: int, body: dict[str, Any]) -> dict[str, Any]:
        self.project(number)
        self._add_labels(number, body.get("labels") or [])
        if "name" in body:
            self.projects[number]["name"] = body["name"]
        self.projects[number]["updated_date"] = now()
        return self.project(number)

    def delete_project(self, number: int) -> None:
        self.project(number)
        for task in [task for task, own in self.tasks.items() if own["project_id"] == number]:
            self.delete_task(task)
        self.labels = {key: label for key, label in self.labels.items() if label["project_id"] != number}
        self.webhooks = {key: hook for key, hook in self.webhooks.items() if hook["project_id"] != number}
        del self.projects[number]

    def _add_labels(self, project: int, specs: list[dict[str, Any]]) -> None:
        names = [label["name"] for label in self.labels.values() if label["project_id"] == project]
        for spec in specs:
            if "id" in spec:
                if self.labels.get(spec["id"], {}).get("project_id") != project:
                    raise Refusal(404, {"detail": f"Not found label with id #{spec['id']} to change"})
                if spec.get("deleted"):
                    self.delete_label(spec["id"])
                else:
                    self.labels[spec["id"]].update({name: spec[name] for name in ("name", "type") if name in spec})
                continue
            names.append(spec["name"])
            if len(set(names)) < len(names):
                raise Refusal(400, ["All label names must be unique"])
        for spec in (spec for spec in specs if "id" not in spec):
            number = self.number("label")
            self.labels[number] = {
                "id": number, "name": spec["name"], "color": spec.get("color") or f"#{number * 4321 % 0xFFFFFF:06x}",
                "attributes": [self._attribute(one) for one in spec.get("attributes") or []],
                "type": spec.get("type", "any"), "sublabels": [], "project_id": project, "parent_id": None,
                "has_parent": False}

    def _attribute(self, spec: dict[str, Any]) -> dict[str, Any]:
        absent = {name: ["This field is required."] for name in ("mutable", "input_type", "values") if name not in spec}
        if absent:
            raise Refusal(400, {"labels": [{"attributes": [absent]}]})
        return {"id": self.number("attribute"), "name": spec["name"], "mutable": spec["mutable"],
                "input_type": spec["input_type"], "default_value": spec.get("default_value", ""),
                "values": spec["values"] or [""]}

    def change_label(self, number: int, body: dict[str, Any]) -> dict[str, Any]:
        if number not in self.labels:
            raise missing("Label")
        label = self.labels[number]
        label["color"] = body.get("color") or f"#{number * 4321 % 0xFFFFFF:06x}"  # reset when left out: b_projects 27
        known = {one["name"] for one in label["attributes"]}
        label["attributes"] += [self._attribute(one) for one in body.get("attributes") or [] if one["name"] not in known]
        return label

    def delete_label(self, number: int) -> None:
        del self.labels[number]
        for stored in self.records.values():
            for kind in stored:
                stored[kind] = [one for one in stored[kind] if one["label_id"] != number]

    # tasks and their data

    def make_task(self, body: dict[str, Any]) -> dict[str, Any]:
        if "name" not in body:
            raise Refusal(400, {"name": ["This field is required."]})
        if body.get("project_id") not in self.projects:
            raise Refusal(400, ["Project matching query does not exist."])  # c_task_data 71
        number = self.number("task")
        self.tasks[number] = {"id": number, "name": body["name"], "project_id": body["project_id"], "size": None,
                              "segment_size": body.get("segment_size", 0), "created_date": now(), "updated_date": now()}
        self.uploads[number] = {}
        return self.task(number)

    def task(self, number: int) -> dict[str, Any]:
        if number not in self.tasks:
            raise missing("Task")
        own = self.tasks[number]
        jobs = [job for job in self.jobs.values() if job["task_id"] == number]
        done = sum((job["stage"], job["state"]) == ("acceptance", "completed") for job in jobs)
        answer = {
            "url": f"{self.url}/api/tasks/{number}", "id": number, "name": own["name"], "project_id": own["project_id"],
            "project_name": self.projects[own["project_id"]]["name"], "owner": self.user(1), "assignee": None,
            "bug_tracker": "", "created_date": own["created_date"], "updated_date": own["updated_date"], "overlap": None,
            "segment_size": own["segment_size"], "status": "annotation", "guide_id": None, "data": None, "dimension": "",
            "mode": "", "media_type": "", "subset": "", "organization_id": None, "organization": None,
            "target_storage": None, "source_storage": None,
            "jobs": {"count": len(jobs), "completed": done, "validation": 0, "url": f"{self.url}/api/jobs?task_id={number}"},
            "labels": {"url": f"{self.url}/api/labels?task_id={number}"}, "assignee_updated_date": None,
            "validation_mode": None, "consensus_enabled": False}
        if own["size"] is not None:  # after Upload-Finish: c_task_data 10, 51
            answer |= {"data_cloud_storage_id": None, "size": own["size"], "data": number}
        if own["size"]:
            answer |= {"overlap": 0, "data_chunk_size": 72, "data_original_chunk_type": "imageset", "image_quality": 70,
                       "data_compressed_chunk_type": "imageset", "dimension": "2d", "mode": "annotation",
                       "media_type": "image"}
        return answer

    def delete_task(self, number: int) -> None:
        self.task(number)
        for job in [key for key, job in self.jobs.items() if job["task_id"] == number]:
            del self.jobs[job]
            self.records.pop(job, None)
        del self.tasks[number]

    def receive(self, task: int, files: dict[str, bytes]) -> None:
        """A file that is there already gets the new bytes at its end, as CVAT's upload folder does."""
        self.task(task)
        if self.tasks[task]["size"]:
            raise Refusal(400, ["Adding more data is not supported"])
        for name, data in files.items():
            name = name.rpartition("/")[2]
            self.received.append(name)
            self.uploads[task][name] = self.uploads[task].get(name, b"") + data

    def finish_upload(self, task: int, body: dict[str, Any]) -> dict[str, Any]:
        self.task(task)
        own, files = self.tasks[task], self.uploads[task]
        if own["size"]:
            raise Refusal(400, ["Adding more data is not supported"])
        rq_id = f"action=create&target=task&target_id={task}"
        own["size"] = 0
        names, message, layout = sorted(files, key=_natural), "", body.get("validation_params")
        if layout and body.get("sorting_method") != "random":  # i_honeypots 35
            message = ("rest_framework.exceptions.ValidationError: [ErrorDetail(string='validation mode \"gt_pool\" can "
                       "only be used with \"random\" sorting', code='invalid')]\n")
        if body.get("sorting_method") == "predefined":
            names = body.get("upload_file_order") or names
            if sorted(names) != sorted(files):
                message = "ValueError: Uploaded files do no match the upload_file_order field contents\n"
        if not names:
            message = "ValueError: No media data found\n"  # c_task_data 90
        frames = []
        for name in names if not message else ():
            try:
                with Image.open(io.BytesIO(files[name])) as picture:
                    frames.append({"width": picture.width, "height": picture.height, "name": name, "related_files": 0,
                                   "has_related_context": False})
            except OSError:
                message = f"utils.dataset_manifest.errors.InvalidImageError: failed to parse image file '{name}'\n"
        if not message:
            own.update(size=len(frames), frames=frames)
            self.pixels[task] = [files[name] for name in names]
            size = own["segment_size"] or len(frames)
            own.update(deleted_frames=[], honeypots={})
        if not message and layout:
            self._make_honeypots(task, frames, files, size, layout)
        elif not message:
            own["segment_size"] = min(size, len(frames)) if not own["segment_size"] else own["segment_size"]
            for start in range(0, len(frames), size):
                self._make_job(task, start, min(start + size, len(frames)) - 1)
        self.requests[rq_id] = self._request(rq_id, "create:task", task, message)
        return {"rq_id": rq_id}

    def _make_honeypots(self, task: int, frames: list[dict[str, Any]], files: dict[str, bytes], size: int,
                        layout: dict[str, Any]) -> None:
        """Jobs of `size` frames and some of the pool, then the pool as the ground truth job: i_honeypots 9 to 15."""
        own, by_name = self.tasks[task], {one["name"]: one for one in frames}
        pool, each = list(layout["frames"]), layout["frames_per_job_count"]
        rest = [one["name"] for one in frames if one["name"] not in pool][::-1]  # any order but the given one
        shown: list[str] = []
        jobs, mixed = [], itertools.cycle(pool)
        for start in range(0, len(rest), size):
            some, first = rest[start:start + size], len(shown)
            for _ in range(each):
                name = next(mixed)
                own["honeypots"][first + len(some) // 2] = name
                some.insert(len(some) // 2, name)
            shown += some
            jobs.append((first, len(shown) - 1))
        own["pool"] = list(range(len(shown), len(shown) + len(pool)))
        shown += pool
        own.update(size=len(shown), frames=[by_name[name] for name in shown])
        self.pixels[task] = [files[name] for name in shown]
        for first, last in jobs:
            self._make_job(task, first, last)
        self._make_job(task, own["pool"][0], own["pool"][-1], type="ground_truth", frames=own["pool"])

    def layout(self, task: int) -> dict[str, Any]:
        self.task(task)
        own = self.tasks[task]
        if not own.get("honeypots"):
            return {"mode": None, "frames_per_job_count": None}
        real = {own["frames"][number]["name"]: number for number in own["pool"]}
        return {"mode": "gt_pool", "frames_per_job_count": 1, "validation_frames": own["pool"], "disabled_frames": [],
                "honeypot_count": len(own["honeypots"]), "honeypot_frames": sorted(own["honeypots"]),
                "honeypot_real_frames": [real[own["honeypots"][number]] for number in sorted(own["honeypots"])]}

    def hide(self, task: int, body: dict[str, Any]) -> dict[str, Any]:
        self.meta(task)
        self.tasks[task]["deleted_frames"] = sorted(body["deleted_frames"])
        return self.meta(task)

    def meta(self, task: int, start: int = 0, stop: int | None = None, included: list[int] | None = None) -> dict[str, Any]:
        self.task(task)
        own = self.tasks[task]
        if not own["size"]:
            raise Refusal(400, ["Data is not uploaded for the task yet"])
        stop = own["size"] - 1 if stop is None else stop
        return {"chapters": None, "chunks_updated_date": own["created_date"], "chunk_size": 72, "size": stop - start + 1,
                "image_quality": 70, "start_frame": start, "stop_frame": stop, "frame_filter": "",
                "frames": own["frames"][start:stop + 1], "deleted_frames": own["deleted_frames"], "included_frames": included,
                "storage": "local", "cloud_storage_id": None}

    def data(self, task: int, query: dict[str, str]) -> tuple[bytes, str]:
        self.meta(task)
        number = int(query.get("number", 0))
        if query.get("type") == "chunk":
            held = io.BytesIO()
            with zipfile.ZipFile(held, "w") as chunk:
                for index, data in enumerate(self.pixels[task][number * 72:(number + 1) * 72]):
                    chunk.writestr(f"{index:06d}.jpg", data)
            return held.getvalue(), "application/zip"
        if query.get("type") != "frame":
            raise Refusal(400, ["Data type not specified or has wrong value"])
        if number >= len(self.pixels[task]):
            raise Refusal(400, f"Invalid frame '{number}'. The frame number should be in the [0, {len(self.pixels[task])}] range")
        return self.pixels[task][number], "image/jpeg"

    def _request(self, rq_id: str, kind: str, task: int, message: str, result_id: int | None = None) -> dict[str, Any]:
        return {"status": "failed" if message else "finished", "message": message, "id": rq_id, "operation": {
                    "type": kind, "target": "task", "project_id": self.tasks[task]["project_id"], "task_id": task,
                    "job_id": None, "org_id": None, "format": None, "lightweight": None},
                "progress": 0.0, "created_date": now(), "started_date": now(), "finished_date": now(), "expiry_date": now(),
                "owner": {"id": 1, "username": "admin"}, "result_url": None, "result_id": result_id,
                "polls": self.polls_until_done}

    def request(self, rq_id: str) -> dict[str, Any]:
        if rq_id not in self.requests:
            raise Refusal(404, "There is no request with specified id")
        own = self.requests[rq_id]
        answer = {name: value for name, value in own.items() if name != "polls"}
        if own["polls"] > 0:
            own["polls"] -= 1
            answer |= {"status": "started", "message": "Media files are being extracted...", "finished_date": None,
                       "expiry_date": None, "result_id": None}
        return answer

    # jobs

    def _make_job(self, task: int, start: int, stop: int, **more: Any) -> int:
        number = self.number("job")
        self.jobs[number] = {"id": number, "task_id": task, "stage": "annotation", "state": "new", "assignee": None,
                             "start_frame": start, "stop_frame": stop, "type": "annotation", "created_date": now(),
                             "updated_date": now(), "frames": list(range(start, stop + 1)), **more}
        self.records[number] = {"shapes": [], "tags": []}
        return number

    def make_ground_truth(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("type") != "ground_truth":
            raise Refusal(400, [f"Unexpected job type '{body.get('type')}'"])
        task = self.tasks.get(body.get("task_id"))
        if task is None or not body.get("frame_selection_method"):
            raise Refusal(500, "<h1>Server Error (500)</h1>")  # i_quality 14
        outside = sorted(set(body["frames"]) - set(range(task["size"])))
        if outside:
            raise Refusal(400, [f"The following frames do not exist in the task: {', '.join(map(str, outside))}"])
        if any(job["type"] == "ground_truth" and job["task_id"] == task["id"] for job in self.jobs.values()):
            raise Refusal(400, ['Task with validation mode "gt" cannot have more than 1 GT job'])
        return self.job(self._make_job(task["id"], 0, task["size"] - 1, type="ground_truth", frames=sorted(body["frames"])))

    def job(self, number: int) -> dict[str, Any]:
        if number not in self.jobs:
            raise missing("Job")
        own = self.jobs[number]
        task = self.tasks[own["task_id"]]
        status = {"annotation": "annotation", "validation": "validation"}.get(own["stage"], "completed")
        return {"url": f"{self.url}/api/jobs/{number}", "id": number, "task_id": task["id"], "task_name": task["name"],
                "project_id": task["project_id"], "project_name": self.projects[task["project_id"]]["name"],
                "assignee": self.user(own["assignee"]), "guide_id": None, "dimension": "2d", "mode": "annotation",
                "media_type": "image", "bug_tracker": "", "status": status, "stage": own["stage"], "state": own["state"],
                "frame_count": len(own["frames"]), "start_frame": own["start_frame"], "stop_frame": own["stop_frame"],
                "data_chunk_size": 72, "data_compressed_chunk_type": "imageset", "data_original_chunk_type": "imageset",
                "created_date": own["created_date"], "updated_date": own["updated_date"],
                "issues": {"url": f"{self.url}/api/issues?job_id={number}",
                           "count": sum(one["job"] == number for one in self.issues.values())},
                "labels": {"url": f"{self.url}/api/labels?job_id={number}"}, "type": own["type"], "organization": None,
                "target_storage": None, "source_storage": None, "assignee_updated_date": None, "parent_job_id": None,
                "replicas_count": 0, "consensus_replicas": 0}

    def change_job(self, number: int, body: dict[str, Any]) -> dict[str, Any]:
        self.job(number)
        own = self.jobs[number]
        for field, choices in (("state", ("new", "in progress", "completed", "rejected")),
                               ("stage", ("annotation", "validation", "acceptance"))):
            if field in body and body[field] not in choices:
                raise Refusal(400, {field: [f'"{body[field]}" is not a valid choice.']})
        self.user(body.get("assignee"))
        before = self.job(number)
        if "stage" in body and body["stage"] != own["stage"]:
            own.update(stage=body["stage"], state="new")  # e_jobs_issues 36, 39
        own.update({name: body[name] for name in ("state", "assignee") if name in body})
        self.job_changed(number, before)
        return self.job(number)

    # annotations

    def annotations(self, jobs: list[int]) -> dict[str, Any]:
        found: dict[str, list[dict[str, Any]]] = {"tags": [], "shapes": []}
        for job in jobs:
            for kind in found:
                found[kind] += [self._whole(kind, one) for one in self.records[job][kind]]
        for records in found.values():
            records.sort(key=lambda one: (one["frame"], one["id"]))
        return {"version": 0, **found, "tracks": [], "intervals": []}

    def write(self, jobs: list[int], body: dict[str, Any], action: str, is_job: bool = False) -> dict[str, Any]:
        """All or nothing, as CVAT's transaction is."""
        if action not in ("create", "update", "delete"):
            raise Refusal(400, ["Please specify a correct 'action' for the request"])
        project, touched = self.tasks[self.jobs[jobs[0]]["task_id"]]["project_id"], set()
        for kind in ("shapes", "tags"):
            for record in body.get(kind) or ():
                self._check(kind, record, action, project)
        answer: dict[str, Any] = {"version": 0, "tags": [], "shapes": [], "tracks": [], "intervals": []}
        for kind in ("shapes", "tags"):
            for record in body.get(kind) or ():
                job = jobs[0] if is_job else next((key for key in jobs if record["frame"] in self.jobs[key]["frames"]), None)
                touched.add(job)
                if job is None:
                    continue  # dropped with 200: d_annotations 43
                number = record.get("id")
                if action != "create" and number is not None:
                    for stored in self.records.values():
                        stored[kind] = [one for one in stored[kind] if one["id"] != number]
                numbers = {name: float(record[name]) for name in ("score", "rotation") if name in record}
                texts = [{**one, "value": str(one["value"])} for one in record.get("attributes") or ()]
                known = {name: value for name, value in record.items() if name in KEPT[kind]}
                done = {**_defaults(kind), **known, **numbers, "attributes": texts, "id": self.number(kind) if number is None else number}
                if action != "delete":
                    self.records[job][kind].append(done)
                elif "elements" not in record:
                    done.pop("elements", None)  # d_annotations 71
                answer[kind].append(done)
        for job in touched - {None}:
            self.job_changed(job, self.job(job))
        return answer

    def replace(self, jobs: list[int], body: dict[str, Any], is_job: bool = False) -> dict[str, Any]:
        before = {job: self.records[job] for job in jobs}
        for job in jobs:
            self.records[job] = {"shapes": [], "tags": []}
        try:
            return self.write(jobs, body, "create", is_job)
        except Refusal:
            self.records |= before
            raise

    def _check(self, kind: str, record: dict[str, Any], action: str, project: int) -> None:
        wrong: dict[str, Any] = {name: ["This field is required."]
                                 for name in (("type",) if kind == "shapes" else ()) + ("label_id", "frame")
                                 if name not in record}
        if action == "create" and record.get("id") is not None:
            wrong["id"] = ["must be absent"]
        if record.get("source", "manual") not in SOURCES:
            wrong["source"] = [f"must be one of {', '.join(map(repr, SOURCES))}, got {record['source']!r}"]
        if kind == "shapes" and "type" in record:
            if record["type"] not in SHAPES:
                wrong["type"] = [f'"{record["type"]}" is not a valid choice.']
            elif not POINTS[record["type"]](len(record.get("points") or ())):
                wrong["points"] = [f"invalid length for shape type '{record['type']}'"]
            elif any(isinstance(value, str) for value in record["points"]):
                said = "[ErrorDetail(string='Value must be a float or an integer', code='invalid')]"
                wrong["points"] = {str(index): said for index in range(len(record["points"]))}
            for name, most in (("score", 1), ("rotation", 360)):
                if record.get(name, 0) is None:
                    wrong[name] = ["This field may not be null."]
                elif not 0 <= float(record.get(name, 0)) <= most:
                    than = f"less than or equal to {most}" if float(record[name]) > most else "greater than or equal to 0"
                    wrong[name] = [f"Ensure this value is {than}."]
        if record.get("frame", 0) < 0:
            wrong["frame"] = ["Ensure this value is greater than or equal to 0."]
        long = [{} if len(str(one["value"])) <= 4096 else
                {"value": ["Ensure this field has no more than 4096 characters."]} for one in record.get("attributes") or ()]
        if any(long):
            wrong["attributes"] = long
        if wrong:
            raise Refusal(400, {kind: [wrong]})
        label = self.labels.get(record["label_id"])
        if label is None or label["project_id"] != project:
            raise Refusal(400, [f"label_id `{record['label_id']}` is invalid"])
        for one in record.get("attributes") or ():
            if one["spec_id"] not in {spec["id"] for spec in label["attributes"]}:
                raise Refusal(400, [f"spec_id `{one['spec_id']}` is invalid"])

    def _whole(self, kind: str, record: dict[str, Any]) -> dict[str, Any]:
        """As it is read: every attribute of the label, a text without the blanks at its ends, points as numbers."""
        given = [{**one, "value": one["value"].strip()} for one in record["attributes"]]
        rest = [{"spec_id": one["id"], "value": one["default_value"]} for one in self.labels[record["label_id"]]["attributes"]
                if one["id"] not in {each["spec_id"] for each in given}]
        whole = {**record, "attributes": given + rest}
        if kind == "shapes":
            whole |= {"points": [float(value) for value in record["points"]], "score": float(record["score"]),
                      "rotation": float(record["rotation"])}
        return whole

    # issues and quality

    def make_issue(self, body: dict[str, Any]) -> dict[str, Any]:
        absent = {name: ["This field is required."] for name in ("job", "frame", "position", "message") if name not in body}
        if absent:
            raise Refusal(400, absent)
        self.job(body["job"])
        number = self.number("issue")
        self.issues[number] = {"id": number, "frame": body["frame"], "position": [float(v) for v in body["position"]],
                               "job": body["job"], "owner": self.user(1), "assignee": self.user(body.get("assignee")),
                               "created_date": now(), "updated_date": now(), "resolved": False}
        comment = self.number("comment")
        self.comments[comment] = {"id": comment, "issue": number, "owner": self.user(1), "message": body["message"],
                                  "created_date": now(), "updated_date": now()}
        return self.issue(number)

    def issue(self, number: int) -> dict[str, Any]:
        if number not in self.issues:
            raise missing("Issue")
        return {**self.issues[number], "comments": {
            "count": sum(one["issue"] == number for one in self.comments.values()),
            "url": f"{self.url}/api/comments?issue_id={number}"}}

    def measure(self, body: dict[str, Any]) -> dict[str, Any]:
        task = body.get("task_id")
        if task is None:
            raise Refusal(400, {"non_field_errors": ['One of the fields "task_id", "project_id" required']})
        if task not in self.tasks:
            raise Refusal(404, {"detail": f"Task {task} does not exist"})
        truth = [job for job in self.jobs.values() if job["task_id"] == task and job["type"] == "ground_truth"
                 and (job["stage"], job["state"]) == ("acceptance", "completed")]
        if not truth:
            raise Refusal(400, ["Quality reports require a Ground Truth job in the task at the acceptance stage and in the "
                                "completed state"])
        number, frames, size = self.number("report"), set(truth[0]["frames"]), self.tasks[task]["size"]
        mine = _seen(self.records[truth[0]["id"]]["shapes"], frames)
        theirs = [one for key, job in self.jobs.items() if job["task_id"] == task and job["type"] == "annotation"
                  for one in _seen(self.records[key]["shapes"], frames)]
        # Counts equal drawings only: enough to tell one report from another.
        valid = sum(one in theirs for one in mine)
        summary = {"total_frames": size, "frame_count": len(frames), "validation_frames": len(frames),
                   "frame_share": len(frames) / size, "validation_frame_share": len(frames) / size,
                   "conflict_count": len(mine) + len(theirs) - 2 * valid, "warning_count": 0,
                   "error_count": len(mine) + len(theirs) - 2 * valid,
                   "conflicts_by_type": {"missing_annotation": len(mine) - valid, "extra_annotation": len(theirs) - valid},
                   "valid_count": valid, "ds_count": len(theirs), "gt_count": len(mine),
                   "total_count": len(mine) + len(theirs) - valid,
                   "accuracy": valid / max(len(mine) + len(theirs) - valid, 1), "precision": valid / max(len(theirs), 1),
                   "recall": valid / max(len(mine), 1),
                   "jobs": {"total": 1, "excluded": 0, "not_checkable": 0, "included": 1}}
        self.reports[number] = {"id": number, "job_id": None, "task_id": task, "project_id": self.tasks[task]["project_id"],
                                "parent_id": None, "target": "task", "summary": summary, "created_date": now(),
                                "target_last_updated": now(), "gt_last_updated": now(), "assignee": None}
        rq_id = f"action=calculate&target=task&target_id={task}&subresource=quality"
        self.requests[rq_id] = self._request(rq_id, "calculate:quality", task, "", number)
        return {"rq_id": rq_id}


def _seen(records: list[dict[str, Any]], frames: set[int]) -> list[tuple[Any, ...]]:
    return [(one["frame"], one["label_id"], one["type"], tuple(map(float, one["points"])))
            for one in records if one["frame"] in frames]


def _defaults(kind: str) -> dict[str, Any]:
    if kind == "tags":
        return {"group": 0, "source": "manual", "attributes": []}
    return {"occluded": False, "outside": False, "z_order": 0, "rotation": 0, "group": 0, "source": "manual", "score": 1,
            "attributes": [], "elements": []}


def _natural(name: str) -> list[Any]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
