"""Frames into CVAT: one CVAT task per upload batch, sent by bytes and count, and never a frame twice.

CVAT cannot say which files of an unfinished task have arrived, and adds a repeated file to the end of the one it has.
So an interrupted upload is not continued: its task is finished with what arrived, its list of frames tells which
those are, and only the others go into the next task. All of this can be read from CVAT, so a kill at any point loses
nothing but the time of one request.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.adapters.cvat.connection import Connection, Gone, NotAnswered, Refused
from workbench.adapters.cvat.state import Row, State
from workbench.errors import Invalid, Unavailable

TASK_FRAMES = 1000
REQUEST_FRAMES = 100
REQUEST_BYTES = 32 << 20  # CVAT's SDK sends up to 100 MiB at once; less keeps the memory of both sides flat
ATTEMPTS = 3
QUALITY = 70  # of what the browser is shown; CVAT's own default, the original is kept beside it
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
MAGIC = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"BM", ".bmp"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"),
         (b"GIF8", ".gif"))


class Uploads:
    def __init__(self, connection: Connection, state: State, job_size: int) -> None:
        self._connection, self._state, self._job_size = connection, state, job_size

    def send(self, dataset: str, project: int, frames: Sequence[tuple[Row, Path]],
             renew: Callable[[], None]) -> dict[str, str]:
        """Uploads frames whose rows are stored and not yet in a task; {name: why} of those CVAT refused.

        A refused picture makes CVAT drop the whole task, so the others are sent again, without it.
        """
        refused: dict[str, str] = {}
        left, interrupted = list(frames), 0
        while left:
            try:
                self._send_task(dataset, project, left[:TASK_FRAMES], renew)
            except _PictureRefused as error:
                refused[error.name] = error.why
                self._state.drop(dataset, [error.name])
            except NotAnswered:
                interrupted += 1
                if interrupted == ATTEMPTS:
                    raise
                self.recover(dataset, project, renew)
            rows = self._state.rows(dataset, [row.frame.name for row, _ in left])
            left = [(row, path) for row, path in left
                    if row.frame.name not in refused and rows[row.frame.name].task_id is None]
        return refused

    def recover(self, dataset: str, project: int, renew: Callable[[], None]) -> None:
        """Ends what a killed or broken upload left: what arrived becomes frames, an empty task goes."""
        bound = {place.task_id for place in self._state.places(dataset)}
        for task in list(self._connection.pages("/api/tasks", project_id=project)):
            is_ours = re.fullmatch(rf"{re.escape(dataset)} \d+ frames [0-9a-f]{{8}}", task["name"])
            if task.get("project_id") != project or task["id"] in bound or not is_ours:
                continue
            if not task.get("size"):
                try:
                    self._end(task["id"], renew)
                except (_PictureRefused, Invalid):
                    self._connection.delete(f"/api/tasks/{task['id']}")
                    continue
            self._bind(dataset, task["id"])

    def _send_task(self, dataset: str, project: int, frames: Sequence[tuple[Row, Path]],
                   renew: Callable[[], None]) -> None:
        files = [row.file for row, _ in frames]
        digest = hashlib.sha256("\0".join(files).encode()).hexdigest()[:8]
        task = self.make(f"{dataset} {len(frames)} frames {digest}", project, frames, self._job_size,
                         {"sorting_method": "predefined", "upload_file_order": files}, renew)
        self._bind(dataset, task)

    def make(self, name: str, project: int, frames: Sequence[tuple[Row, Path]], job_size: int, order: dict[str, Any],
             renew: Callable[[], None]) -> int:
        """A task of these pictures, its number; `order` says how CVAT sorts them. Nothing stays of one that fails."""
        task = self._connection.call("POST", "/api/tasks", {
            "name": name, "project_id": project, "segment_size": job_size})["id"]
        path = f"/api/tasks/{task}/data/"
        self._connection.call("POST", path, headers={"Upload-Start": ""})
        for request in _requests(frames):
            renew()
            pictures = {f"client_files[{index}]": (row.file, data) for index, (row, data) in enumerate(request)}
            self._connection.call("POST", path, files={"image_quality": str(QUALITY), **pictures},
                                  headers={"Upload-Multiple": ""})
        try:
            self._finish(task, order, renew, {row.file: row.frame.name for row, _ in frames})
        except (_PictureRefused, Invalid):
            self._connection.delete(f"/api/tasks/{task}")
            raise
        return task

    def _finish(self, task: int, order: dict[str, Any], renew: Callable[[], None], by_file: dict[str, str]) -> None:
        answer = self._connection.call("POST", f"/api/tasks/{task}/data/", {"image_quality": QUALITY, **order},
                                       headers={"Upload-Finish": ""})
        self._wait(task, answer["rq_id"], renew, by_file)

    def _wait(self, task: int, rq_id: str, renew: Callable[[], None], by_file: dict[str, str]) -> None:
        try:
            done = self._connection.wait(rq_id, renew)
        except Gone:  # CVAT forgets a finished request after minutes
            if self._connection.get(f"/api/tasks/{task}").get("size"):
                return
            raise
        if done["status"] == "finished":
            return
        said = str(done.get("message", "")).strip()
        for file, name in by_file.items():
            if f"'{file}'" in said or f"/{file}'" in said:
                raise _PictureRefused(name, said)
        raise Invalid(f"CVAT could not make task {task} of {len(by_file)} pictures: {said[:300]} Mend what it says, "
                      "then upload again; what is uploaded already stays.")

    def _end(self, task: int, renew: Callable[[], None]) -> None:
        """Finishes a task in whatever state an upload left it. Raises Invalid when nothing can become of it."""
        path = f"/api/tasks/{task}"
        started = [one for one in self._connection.pages("/api/requests", task_id=task)
                   if one["operation"]["type"] == "create:task" and one["operation"].get("task_id") == task]
        if started:
            self._wait(task, started[0]["id"], renew, {})
            return
        try:
            self._finish(task, {"sorting_method": "natural"}, renew, {})
        except Refused:
            if not self._connection.get(path).get("size"):  # else it was finished in between
                raise

    def _bind(self, dataset: str, task: int) -> None:
        """Writes down which frame of the task is which of ours."""
        meta = self._connection.get(f"/api/tasks/{task}/data/meta")
        numbers = {one["name"]: meta.get("start_frame", 0) + index for index, one in enumerate(meta["frames"])}
        names = [place.name for place in self._state.places(dataset) if place.task_id is None and place.file in numbers]
        rows = self._state.rows(dataset, names)
        self._state.put(dataset, [replace(row, task_id=task, number=numbers[row.file]) for row in rows.values()])


class _PictureRefused(Exception):
    def __init__(self, name: str, why: str) -> None:
        super().__init__(name)
        self.name, self.why = name, why


def file_name(name: str, path: Path) -> str:
    """What a frame's pixels are called in CVAT: its name in plain ASCII, with an ending that says what they are.

    CVAT keeps only the last part of a path and tells pictures by their ending. Where anything of the name had to be
    replaced, eight digits of its sha256 keep two frames apart.
    """
    suffix = "." + name.rpartition(".")[2].lower() if "." in name else ""
    stem = name[:-len(suffix)] if suffix in SUFFIXES else name
    if suffix not in SUFFIXES:
        suffix = _suffix(path)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._") or "frame"
    if plain + suffix != name or len(name) > 120:
        plain = f"{plain[-100:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return plain + suffix


def _suffix(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(12)
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in MAGIC if start.startswith(magic)), ".jpg")


def _requests(frames: Sequence[tuple[Row, Path]]) -> Iterator[list[tuple[Row, bytes]]]:
    """Frames with their bytes, as many as one request takes."""
    request: list[tuple[Row, bytes]] = []
    size = 0
    for row, path in frames:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise Unavailable(f"The pixels of {row.frame.name!r} cannot be read ({error.strerror}). Check the blob "
                              "store, then upload again; what is uploaded already stays.") from error
        if request and (len(request) == REQUEST_FRAMES or size + len(data) > REQUEST_BYTES):
            yield request
            request, size = [], 0
        request.append((row, data))
        size += len(data)
    if request:
        yield request
