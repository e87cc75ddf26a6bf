"""An AnnotationServer that keeps everything in memory: the smallest one that keeps the port's promises."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from workbench.annotation import Annotation
from workbench.dataset import LabeledFrame
from workbench.errors import NotFound
from workbench.ports import TaskSummary
from workbench.run import STATUSES, RunWrite, WorkingFrame
from workbench.taxonomy import Taxonomy


class MemoryServer:
    """Frames go through JSON on their way in, as on a real server: a caller never shares an object with the store."""

    write_batch = 16

    def __init__(self) -> None:
        self._taxonomies: dict[str, Taxonomy] = {}
        self._frames: dict[str, dict[str, WorkingFrame]] = {}
        self._paths: dict[tuple[str, str], Path] = {}

    def open_task(self, dataset: str, taxonomy: Taxonomy) -> None:
        known = self._taxonomies.get(dataset)
        self._taxonomies[dataset] = known.with_labels(taxonomy.labels) if known else taxonomy
        self._frames.setdefault(dataset, {})

    def tasks(self) -> list[TaskSummary]:
        return [self.task(dataset) for dataset in sorted(self._frames)]

    def task(self, dataset: str) -> TaskSummary:
        frames = self._of(dataset)
        counts = Counter(frame.status for frame in frames.values())
        return TaskSummary(dataset, self._taxonomies[dataset].labels, len(frames),
                           {status: counts.get(status, 0) for status in STATUSES}, url=f"memory://{dataset}")

    def delete_task(self, dataset: str) -> None:
        self._of(dataset)
        del self._frames[dataset], self._taxonomies[dataset]

    def add_frames(self, dataset: str, frames: Iterable[tuple[LabeledFrame, Path]]) -> int:
        stored, added = self._of(dataset), 0
        for labeled, path in frames:
            name = labeled.frame.name
            if name in stored:
                continue
            status = "new" if labeled.annotations is None else "accepted"
            stored[name] = _through_json(
                WorkingFrame(
                    labeled.frame,
                    labeled.annotations,
                    status=status,
                    split=labeled.split,
                    reviewed_by=labeled.reviewed_by,
                    revision="1",
                )
            )
            self._paths[dataset, name] = Path(path)
            added += 1
        return added

    def frame_names(self, dataset: str, status: str | None = None, order: str = "name") -> list[str]:
        frames = {name: frame for name, frame in sorted(self._of(dataset).items()) if status in (None, frame.status)}
        return list(frames) if order == "name" else sorted(frames, key=lambda name: _least_confidence(frames[name]))

    def read(self, dataset: str, names: Sequence[str]) -> dict[str, WorkingFrame]:
        stored = self._of(dataset)
        return {name: stored[name] for name in names if name in stored}

    def write(self, dataset: str, frames: Sequence[WorkingFrame]) -> list[str]:
        stored, refused = self._of(dataset), []
        for frame in frames:
            now = stored.get(frame.frame.name)
            if now is None or now.revision != frame.revision:
                refused.append(frame.frame.name)
                continue
            stored[frame.frame.name] = _through_json(
                replace(frame, frame=now.frame, revision=str(int(now.revision) + 1))
            )
        return refused

    def review_url(self, dataset: str, name: str) -> str:
        if name not in self._of(dataset):
            raise NotFound(f"Frame {name!r} is not in {dataset!r}; upload it first.")
        return f"memory://{dataset}/{name}"

    def _of(self, dataset: str) -> dict[str, WorkingFrame]:
        if dataset not in self._frames:
            raise NotFound(f"There is no task {dataset!r}; upload frames first.")
        return self._frames[dataset]


def _least_confidence(frame: WorkingFrame) -> float:
    """Of the machine's boxes; 2, so last, without one."""
    return min(
        (a.confidence for a in frame.annotations or () if a.is_machine and a.confidence is not None), default=2.0
    )


def _through_json(frame: WorkingFrame) -> WorkingFrame:
    def again(record: object) -> object:
        return json.loads(json.dumps(record))

    annotations = frame.annotations
    if annotations is not None:
        annotations = tuple(Annotation.from_json(again(a.to_json())) for a in annotations)
    return replace(
        frame, annotations=annotations, runs=tuple(RunWrite.from_json(again(r.to_json())) for r in frame.runs)
    )
