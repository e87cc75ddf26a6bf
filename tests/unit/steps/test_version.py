"""Version: what goes from the working copy into the next version, and that nothing new makes no version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from workbench.adapters.git_datasets import GitDatasets
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Cancelled, Conflict, Invalid, NotFound
from workbench.ports import Quiet, TaskSummary
from workbench.run import RunWrite, WorkingFrame
from workbench.steps.version import pending, version
from workbench.taxonomy import Taxonomy


class Working:
    """The part of an AnnotationServer that publishing reads, in memory."""

    def __init__(self, labels: Sequence[str], frames: Sequence[WorkingFrame]) -> None:
        self.labels, self.frames = tuple(labels), {one.frame.name: one for one in frames}

    def task(self, dataset: str) -> TaskSummary:
        if dataset != "cells":
            raise NotFound(f"There is no working copy of {dataset}.")
        return TaskSummary(dataset, self.labels, len(self.frames), {})

    def frame_names(self, dataset: str, status: str | None = None) -> list[str]:
        return sorted(name for name, one in self.frames.items() if status in (None, one.status))

    def read(self, dataset: str, names: Sequence[str]) -> dict[str, WorkingFrame]:
        assert len(names) <= 256
        return {name: self.frames[name] for name in names if name in self.frames}

    def change(self, name: str, **fields: object) -> None:
        self.frames[name] = replace(self.frames[name], **fields)


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(str(tmp_path / "blobs"))


@pytest.fixture
def store(tmp_path: Path, blobs: Blobs) -> GitDatasets:
    return GitDatasets(tmp_path / "datasets", blobs)


@pytest.fixture
def frame(blobs: Blobs):
    def make(name: str) -> Frame:
        stored = blobs.put(name.encode())
        return Frame(name, 100, 80, stored.md5, stored.sha256, stored.size_bytes)

    return make


def box(key: str, source: str = "human:ann", **fields: object) -> Annotation:
    return Annotation("red", xyxy=fields.pop("xyxy", (1, 2, 30, 40)), source=source, id=key, **fields)


def publish(server: Working, store: GitDatasets, person: str = "ann", **options: object):
    return version("cells", server=server, store=store, job=Quiet(), person=person, message="Reviewed", **options)


def test_accepted_frames_go_in_with_their_labels_and_all_others_as_nobody_looked(store, frame) -> None:
    server = Working(
        ("red",),
        [
            WorkingFrame(frame("a.jpg"), (box("1"),), status="accepted", split="train", reviewed_by="ann"),
            WorkingFrame(frame("b.jpg"), (), status="accepted", split="val", reviewed_by="bob"),
            WorkingFrame(frame("c.jpg"), (box("2", "model:m@1", confidence=0.9),), status="annotated", split="train"),
            WorkingFrame(frame("d.jpg"), (box("3"),), status="rejected", split="train", reviewed_by="ann"),
            WorkingFrame(frame("e.jpg"), None, status="new", split="test"),
        ],
    )

    made = publish(server, store)

    assert (made.ref, made.frames, made.labeled, made.boxes) == ("cells@0.1.0", 5, 2, 1)
    assert [(one.annotations is None, one.split, one.reviewed_by) for one in store.manifest(made.ref).frames] == [
        (False, "train", "ann"),
        (False, "val", "bob"),
        (True, "train", ""),
        (True, "train", ""),
        (True, "test", ""),
    ]
    assert made.changed.frames_added == ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")


def test_an_accepted_frame_that_nobody_drew_on_was_looked_at(store, frame) -> None:
    server = Working(("red",), [WorkingFrame(frame("a.jpg"), None, status="accepted", reviewed_by="ann")])

    assert store.manifest(publish(server, store).ref).frames[0].annotations == ()


def test_publishing_again_is_a_no_op_for_everybody(store, frame) -> None:
    server = Working(("red",), [WorkingFrame(frame("a.jpg"), (box("1", "human:unknown"),), status="accepted")])
    made = publish(server, store, person="ann")

    again = publish(server, store, person="bob")

    assert (again.ref, again.digest, again.commit) == (made.ref, made.digest, made.commit)
    assert again.changed.is_empty and not made.changed.is_empty
    assert len(store.versions("cells")) == 1


def test_what_a_person_drew_and_changed_is_signed_by_the_reviewer(store, frame) -> None:
    machine = box("m", "model:m@1", confidence=0.8)
    moved = box("moved", "model:m@1", confidence=0.7, xyxy=(50, 50, 60, 60))
    run = RunWrite("r1", "model:m@1", (machine, moved), (), was_unseen=True)
    server = Working(
        ("red",),
        [
            WorkingFrame(
                frame("a.jpg"),
                (machine, replace(moved, xyxy=(50, 50, 70, 60)), box("new", "human:unknown", xyxy=(5, 5, 9, 9))),
                runs=(run,),
                status="accepted",
                reviewed_by="ann",
            )
        ],
    )

    made = publish(server, store, person="publisher")

    drawn = {one.id: one for one in store.manifest(made.ref).frames[0].annotations}
    assert drawn["m"].source == "model:m@1" and not drawn["m"].attributes
    assert drawn["moved"].attributes == {"touched_by": "human:ann"}
    assert drawn["new"].source == "human:ann"


def test_a_box_of_an_unknown_author_stays_as_it_was_published(store, frame) -> None:
    imported = box("1", "human:unknown", xyxy=(12.345, 2, 30, 40))
    store.publish(
        "cells", Manifest(Taxonomy(("red",)), (LabeledFrame(frame("a.jpg"), (imported,), "train"),)), "Upload", "ann"
    )
    came_back = replace(imported, xyxy=(12.34499, 2.0000001, 30, 40))  # a trip through relative coordinates
    server = Working(("red",), [WorkingFrame(frame("a.jpg"), (came_back,), status="accepted", split="train")])

    assert publish(server, store).ref == "cells@0.1.0"

    server.change("a.jpg", annotations=(replace(came_back, xyxy=(20, 2, 30, 40)),), reviewed_by="ann")
    made = publish(server, store)
    assert made.ref == "cells@0.2.0"
    assert made.changed.boxes_changed == (("a.jpg", "1"),)
    assert store.manifest(made.ref).frames[0].annotations[0].source == "human:ann"


def test_a_published_frame_keeps_its_split_and_record(store, frame) -> None:
    published = LabeledFrame(frame("a.jpg"), None, "test")
    store.publish("cells", Manifest(Taxonomy(("red",)), (published,)), "Upload", "ann")
    poor = replace(published.frame, sha256="", size_bytes=0)
    server = Working(("red",), [WorkingFrame(poor, (box("1"),), status="accepted", split="train", reviewed_by="ann")])

    one = store.manifest(publish(server, store).ref).frames[0]

    assert one.split == "test"
    assert one.frame == published.frame


def test_a_frame_without_a_split_gets_one_and_keeps_it(store, frame) -> None:
    server = Working(("red",), [WorkingFrame(frame(f"{number}.jpg"), (), status="accepted") for number in range(40)])
    first = store.manifest(publish(server, store).ref)
    server.change("3.jpg", annotations=(box("1"),))

    second = store.manifest(publish(server, store).ref)

    assert {one.split for one in first.frames} == {"train", "val", "test"}
    assert [one.split for one in second.frames] == [one.split for one in first.frames]


def test_published_frames_that_the_working_copy_lacks_stay(store, frame) -> None:
    kept = LabeledFrame(frame("kept.jpg"), (box("1"),), "train", "ann")
    store.publish("cells", Manifest(Taxonomy(("red",)), (kept,)), "Upload", "ann")
    server = Working(("red",), [WorkingFrame(frame("new.jpg"), (), status="accepted", split="val")])

    made = publish(server, store)

    assert store.manifest(made.ref).by_name["kept.jpg"] == kept
    assert made.changed.frames_added == ("new.jpg",) and made.changed.frames_removed == ()


def test_a_label_added_while_working_comes_after_those_of_the_latest_version(store, frame) -> None:
    store.publish("cells", Manifest(Taxonomy(("white", "red")), ()), "Upload", "ann")
    server = Working(("red", "blue", "white"), [WorkingFrame(frame("a.jpg"), (box("1"),), status="accepted")])

    made = publish(server, store)

    assert made.labels == ("white", "red", "blue")
    assert made.changed.labels_added == ("blue",)


def test_machine_labels_nobody_reviewed_go_in_only_when_asked_for(store, frame) -> None:
    server = Working(
        ("red",), [WorkingFrame(frame("a.jpg"), (box("1", "model:m@1", confidence=0.5),), status="annotated")]
    )
    assert publish(server, store).labeled == 0

    made = publish(server, store, include="annotated")

    assert made.labeled == 1
    assert store.manifest(made.ref).frames[0].reviewed_by == ""
    with pytest.raises(Invalid, match="accepted, annotated"):
        publish(server, store, include="all")


def test_an_upload_that_publishes_meanwhile_is_not_lost(store, frame) -> None:
    server = Working(("red",), [WorkingFrame(frame("a.jpg"), (box("1"),), status="accepted", split="train")])
    publish(server, store)
    server.change("a.jpg", annotations=())
    uploaded = LabeledFrame(frame("uploaded.jpg"), None, "val")

    class Overtaken(GitDatasets):
        """Somebody uploads between our reading of the latest version and our publication."""

        overtaken = 0

        def publish(self, dataset, manifest, *arguments, **options):
            if not self.overtaken:
                self.overtaken = 1
                latest = store.manifest("cells@0.1.0")
                store.publish("cells", replace(latest, frames=(*latest.frames, uploaded)), "Upload", "bob")
            return super().publish(dataset, manifest, *arguments, **options)

    made = publish(server, Overtaken(store._folder, store._blobs))

    assert [one.version for one in store.versions("cells")] == ["0.2.0", "0.1.1", "0.1.0"]
    assert [(one.frame.name, one.annotations) for one in store.manifest(made.ref).frames] == [
        ("a.jpg", ()),
        ("uploaded.jpg", None),
    ]
    assert made.changed.frames_relabeled == ("a.jpg",) and made.changed.frames_added == ()


def test_being_overtaken_for_ever_is_a_conflict(store, frame) -> None:
    server = Working(("red",), [WorkingFrame(frame("a.jpg"), (), status="accepted")])

    class Always(GitDatasets):
        def publish(self, *arguments, **options):
            raise Conflict("cells is at 0.3.0 now.")

    with pytest.raises(Conflict):
        publish(server, Always(store._folder, store._blobs))


def test_pending_names_the_accepted_frames_that_no_version_has_labels_of(store, frame) -> None:
    server = Working(
        ("red",),
        [
            WorkingFrame(frame("a.jpg"), (), status="accepted", split="train"),
            WorkingFrame(frame("b.jpg"), None, status="new", split="train"),
        ],
    )
    assert pending("cells", server, store).frames == ("a.jpg",)
    publish(server, store)
    assert pending("cells", server, store).frames == ()

    server.change("b.jpg", status="accepted", annotations=(box("1"),))

    assert pending("cells", server, store).frames == ("b.jpg",)


def test_many_frames_are_read_in_batches_with_progress(store, frame) -> None:
    one = frame("x.jpg")
    server = Working(
        ("red",), [WorkingFrame(replace(one, name=f"{number:04}.jpg"), (), status="accepted") for number in range(600)]
    )
    job = Quiet()

    made = version("cells", server=server, store=store, job=job, person="ann", message="Many")

    assert made.labeled == 600
    assert (job.done, job.total) == (600, 600)
    assert job.lines == ["cells@0.1.0: 600 of 600 frames labelled, 0 boxes; 600 frames added, 1 labels added."]


def test_a_cancelled_job_publishes_nothing(store, frame) -> None:
    class Stopped(Quiet):
        def check(self) -> None:
            raise Cancelled("Cancelled by ann.")

    server = Working(("red",), [WorkingFrame(frame("a.jpg"), (), status="accepted")])

    with pytest.raises(Cancelled):
        version("cells", server=server, store=store, job=Stopped(), person="ann", message="Any")
    assert store.names() == []


def test_nothing_to_publish_is_told(store) -> None:
    with pytest.raises(Invalid, match="has no frames"):
        publish(Working(("red",), []), store)
    with pytest.raises(NotFound):
        version("others", server=Working(("red",), []), store=store, job=Quiet(), person="ann", message="Any")
