"""AnnotationServer on FiftyOne: one persistent FiftyOne dataset per data set, edited in the FiftyOne app.

Datasets, fields and the app's label schema are made with the FiftyOne library. Frames are read and written in their
MongoDB collection, in the documents FiftyOne 1.22 keeps there, because the library has no update of several fields of
a sample that is atomic and conditional: `Sample.save` sends each changed field unconditionally, so a person's edit
that the app saved in between would be lost. It also spares every reader the library's import (4 to 24 s).
"""

from __future__ import annotations

import atexit
import email.message
import hashlib
import importlib.metadata
import json
import math
import os
import random
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from workbench.annotation import DECIMALS, Annotation
from workbench.boxes import Detections
from workbench.dataset import Frame, LabeledFrame, check_dataset_name
from workbench.errors import Conflict, Invalid, NotFound, Unavailable
from workbench.ports import TaskSummary
from workbench.run import NO_LABEL, STATUSES, RunWrite, WorkingFrame
from workbench.taxonomy import Taxonomy

DATABASE = "fiftyone"  # FiftyOne's default database_name
TIMEOUT_MS = 3000
BATCH = 500
LABEL_FIELDS = ("labels", "polygons", "frame_labels")
_IMPORTING = threading.Lock()
OURS = ("annotation_id", "source", "details")  # of every label; `details` is the attributes as JSON
STRINGS = ("frame_name", "md5", "split", "status", "reviewed_by", "reviewed_at", "frame", "runs", "write_id")
# Ends the id of what a person drew in the app, whose first 24 digits are FiftyOne's own id of it.
DRAWN_IN_APP = "0f1f70e0"
OPEN_LOCK_S = 60
EDGE_PX = 0.5  # how far a box may leave its frame, as workbench.dataset.Manifest allows


class FiftyOneServer:
    """mongo_url: FiftyOne's database; app_url: where a browser finds its app. Nothing connects before first use."""

    write_batch = 16

    def __init__(self, mongo_url: str, app_url: str) -> None:
        self._mongo_url = mongo_url
        self._app_url = app_url.rstrip("/")
        self._client: Any = None

    def open_task(self, dataset: str, taxonomy: Taxonomy) -> None:
        check_dataset_name(dataset)
        with self._translated():
            known = self._database()["datasets"].find_one({"name": dataset, "info.workbench": {"$exists": True}})
            if known is not None and set(taxonomy.labels) <= set(_labels_of(known)):
                return
            with self._locked(f"open:{dataset}"), self._library() as fo:
                _open_dataset(fo, dataset, taxonomy)

    def tasks(self) -> list[TaskSummary]:
        with self._translated():
            found = self._database()["datasets"].find({"info.workbench": {"$exists": True}}).sort("name")
            return [self._summary(document) for document in found]

    def task(self, dataset: str) -> TaskSummary:
        with self._translated():
            return self._summary(self._document(dataset))

    def delete_task(self, dataset: str) -> None:
        with self._translated():
            self._document(dataset)
            with self._library() as fo:
                for name in (dataset, f"{dataset}-evaluation"):
                    if fo.dataset_exists(name):
                        fo.delete_dataset(name)

    def add_frames(self, dataset: str, frames: Iterable[tuple[LabeledFrame, Path]]) -> int:
        with self._translated():
            task = self._document(dataset)
            samples, added, pending = self._samples(task), 0, iter(frames)
            while batch := list(islice(pending, BATCH)):
                names = [labeled.frame.name for labeled, _ in batch]
                there = {row["frame_name"] for row in samples.find({"frame_name": {"$in": names}}, {"frame_name": 1})}
                new = {labeled.frame.name: _new_document(labeled, path, task["_id"])
                       for labeled, path in batch if labeled.frame.name not in there}
                added += _insert(samples, list(new.values()))
            return added

    def frame_names(self, dataset: str, status: str | None = None, order: str = "name") -> list[str]:
        if status is not None and status not in STATUSES:
            raise Invalid(f"Status {status!r} must be one of {', '.join(STATUSES)}.")
        if order not in ("name", "confidence"):
            raise Invalid(f"Order {order!r} must be 'name' or 'confidence'.")
        with self._translated():
            samples = self._samples(self._document(dataset))
            keys = ([("least_confidence", 1)] if order == "confidence" else []) + [("frame_name", 1)]
            rows = samples.find({} if status is None else {"status": status}, {"frame_name": 1, "_id": 0}).sort(keys)
            return [row["frame_name"] for row in rows]

    def read(self, dataset: str, names: Sequence[str]) -> dict[str, WorkingFrame]:
        with self._translated():
            samples, wanted, found = self._samples(self._document(dataset)), list(dict.fromkeys(names)), {}
            fields = dict.fromkeys((*STRINGS, *LABEL_FIELDS, "last_modified_at"), 1)
            for start in range(0, len(wanted), BATCH):
                for row in samples.find({"frame_name": {"$in": wanted[start:start + BATCH]}}, fields):
                    found[row["frame_name"]] = _working_frame(row)
            return {name: found[name] for name in wanted if name in found}

    def write(self, dataset: str, frames: Sequence[WorkingFrame]) -> list[str]:
        import pymongo
        with self._translated():
            samples, stale = self._samples(self._document(dataset)), []
            changes = [(working, _changes(working)) for working in frames]  # all are checked before any is stored
            for start in range(0, len(changes), BATCH):
                write_id, updates = uuid.uuid4().hex, []
                for working, fields in changes[start:start + BATCH]:
                    read_at, read_id = _parse_revision(working)
                    # The app's own save is conditional on last_modified_at (to 1 ms), so it must move on every write.
                    at = max(_utc_ms(), read_at + timedelta(milliseconds=2))
                    updates.append(pymongo.UpdateOne(
                        {"frame_name": working.frame.name, "last_modified_at": read_at, "write_id": read_id},
                        {"$set": {**fields, "last_modified_at": at, "write_id": write_id}}))
                if samples.bulk_write(updates, ordered=False).matched_count < len(updates):
                    names = [working.frame.name for working, _ in changes[start:start + BATCH]]
                    mine = {row["frame_name"] for row in
                            samples.find({"frame_name": {"$in": names}, "write_id": write_id}, {"frame_name": 1})}
                    stale += [name for name in names if name not in mine]
            return stale

    def review_url(self, dataset: str, name: str) -> str:
        with self._translated():
            row = self._samples(self._document(dataset)).find_one({"frame_name": name}, {"_id": 1})
            if row is None:
                raise NotFound(f"Data set {dataset} has no frame {name!r}.")
            return f"{self._app_url}/datasets/{quote(dataset)}?id={row['_id']}"

    def show_evaluation(self, dataset: str, model_source: str, truth: Sequence[LabeledFrame],
                        found: dict[str, Detections], labels: Taxonomy, paths: dict[str, Path]) -> str:
        """Rebuilds the view `<dataset>-evaluation`: `truth` beside what a model found, matched at IoU 0.5; its URL.

        found   frame name -> Detections whose class_id indexes `labels`
        paths   frame name -> file of its pixels

        Every box is tagged true positive, false positive or false negative (fields `eval`). Losing it loses nothing.
        """
        name = f"{check_dataset_name(dataset)}-evaluation"
        with self._translated(), self._locked(f"open:{name}"), self._library() as fo:
            if fo.dataset_exists(name):
                fo.delete_dataset(name)
            view = fo.Dataset(name, persistent=True)
            view.info = {"model": model_source, "dataset": dataset}
            samples = [_evaluated_sample(fo, one, found.get(one.frame.name), labels, paths) for one in truth]
            view.add_samples(samples, progress=False)
            if truth:
                view.evaluate_detections("predictions", gt_field="ground_truth", eval_key="eval", iou=0.5,
                                         progress=False)
            view.save()
        return f"{self._app_url}/datasets/{quote(name)}"

    def _database(self) -> Any:
        import pymongo
        if self._client is None:
            try:
                self._client = pymongo.MongoClient(self._mongo_url, serverSelectionTimeoutMS=TIMEOUT_MS, tz_aware=True,
                                                   appname="workbench")
            except (pymongo.errors.ConfigurationError, ValueError) as error:
                # The address may hold a password, so it is not repeated.
                raise Invalid(f"The address of the annotation database is wrong ({type(error).__name__}). Mend the "
                              "setting 'mongo_url': it reads mongodb://host:port.") from error
        return self._client[DATABASE]

    def _document(self, dataset: str) -> dict[str, Any]:
        document = self._database()["datasets"].find_one({"name": dataset, "info.workbench": {"$exists": True}})
        if document is None:
            raise NotFound(f"There is no data set {dataset!r} to annotate. Upload it first.")
        return document

    def _samples(self, document: dict[str, Any]) -> Any:
        return self._database()[document["sample_collection_name"]]

    def _summary(self, document: dict[str, Any]) -> TaskSummary:
        groups = self._samples(document).aggregate([{"$group": {"_id": "$status", "frames": {"$sum": 1}}}])
        counted = {row["_id"]: row["frames"] for row in groups}
        return TaskSummary(dataset=document["name"], labels=_labels_of(document), frames=sum(counted.values()),
                           by_status={status: counted.get(status, 0) for status in STATUSES},
                           url=f"{self._app_url}/datasets/{quote(document['name'])}")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        from pymongo import errors
        try:
            yield
        except errors.ConnectionFailure as error:  # ServerSelectionTimeoutError and AutoReconnect are among them
            raise Unavailable("The annotation database (mongod) does not answer. Start it with `workbench up`, "
                              "or see `workbench doctor`.") from error
        except errors.PyMongoError as error:
            raise Unavailable(f"The annotation database refused a request: {error}. See `workbench doctor`.") from error

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time; a lock whose holder died is taken over after OPEN_LOCK_S."""
        from pymongo.errors import DuplicateKeyError
        locks, mine = self._database()["workbench.locks"], uuid.uuid4().hex
        while True:
            locks.delete_one({"_id": name, "at": {"$lt": _utc_ms() - timedelta(seconds=OPEN_LOCK_S)}})
            try:
                locks.insert_one({"_id": name, "holder": mine, "at": _utc_ms()})
                break
            except DuplicateKeyError:
                time.sleep(0.1)
        try:
            yield
        finally:
            locks.delete_one({"_id": name, "holder": mine})

    @contextmanager
    def _library(self) -> Iterator[Any]:
        """The fiftyone module, connected to this server's database (a process has one connection for all of it)."""
        self._database().client.admin.command("ping")  # without this a dead server costs the import its 30 s timeout
        # The library waits 30 s for a server that is gone, also when it closes its connection.
        options = "&" if "?" in self._mongo_url else "?" if "/" in self._mongo_url.partition("://")[2] else "/?"
        url = f"{self._mongo_url}{options}serverSelectionTimeoutMS={TIMEOUT_MS}"
        os.environ.update(FIFTYONE_DATABASE_URI=url, FIFTYONE_DO_NOT_TRACK="true", FIFTYONE_DATABASE_VALIDATION="false")
        fo = _import_fiftyone()
        from fiftyone.core.odm import database
        from fiftyone.factory import repo_factory
        if fo.config.database_uri != url:
            # What FiftyOne remembers of the other database: its clients, open datasets and repositories.
            database._disconnect()
            fo.Dataset._instances.clear()
            repo_factory.RepositoryFactory.repos.clear()
            repo_factory._db = None
            fo.config.database_uri = url
            database.establish_db_conn(fo.config)
        # Ours are persistent; asking a database that was stopped before us would hold the process's end up for 30 s.
        atexit.unregister(database._delete_non_persistent_datasets_if_allowed)
        yield fo


def _import_fiftyone() -> Any:
    """The module. It and its dependency eta read keys of their packages' metadata that may be absent and expect None
    for them; once importlib_metadata is imported (by MLflow, for one) such a key raises KeyError instead."""
    with _IMPORTING:
        strict = importlib.metadata.metadata

        def lenient(name: str) -> Any:
            found = strict(name)
            if not name.startswith(("fiftyone", "eta", "voxel51")):
                return found
            plain = email.message.Message()
            for key, value in found.items():
                plain[key] = value
            return plain

        importlib.metadata.metadata = lenient  # type: ignore[assignment]
        try:
            import fiftyone
        finally:
            importlib.metadata.metadata = strict
    return fiftyone


def _open_dataset(fo: Any, dataset: str, taxonomy: Taxonomy) -> None:
    """Creates or completes the FiftyOne dataset; every step may be repeated."""
    if fo.dataset_exists(dataset):
        opened = fo.load_dataset(dataset, reload=True)
        if opened.count() and "workbench" not in opened.info:
            raise Conflict(f"FiftyOne has a dataset {dataset!r} that the workbench did not make. Choose another "
                           "name, or rename the one in FiftyOne.")
    else:
        opened = fo.Dataset(dataset, persistent=True)
    opened.media_type = "image"
    for name in STRINGS:
        opened.add_sample_field(name, fo.StringField, read_only=name not in ("split",))
    opened.add_sample_field("least_confidence", fo.FloatField, read_only=True)
    documents = dict(zip(LABEL_FIELDS, (fo.Detections, fo.Polylines, fo.Classifications)))
    for name, document in documents.items():
        opened.add_sample_field(name, fo.EmbeddedDocumentField, embedded_doc_type=document)
        for ours in OURS:
            opened.add_sample_field(f"{name}.{document._LABEL_LIST_FIELD}.{ours}", fo.StringField)
    opened.add_sample_field("polygons.polylines.box", fo.ListField, subfield=fo.FloatField)
    opened.add_sample_field("polygons.polylines.box_of", fo.StringField)
    opened.create_index("frame_name", unique=True)
    opened.create_index("status")
    known = _labels_of(opened._doc.to_dict())
    labels = list(Taxonomy(known).with_labels(taxonomy.labels).labels)
    for name in LABEL_FIELDS:
        schema = opened.generate_label_schemas(fields=[name], scan_samples=False)[name]
        # The others of our attributes are not shown, and kept: the app saves only what was changed.
        shown = [a for a in schema["attributes"] if a["name"] in ("source", "confidence")]
        schema["attributes"] = [{**attribute, "read_only": True} for attribute in shown]
        if labels:
            schema.update(component="dropdown" if len(labels) > 5 else "radio", classes=labels)
        opened.update_label_schema(name, schema)
    opened.activate_label_schemas(list(LABEL_FIELDS))
    config = opened.app_config
    groups = (
        ("labels", list(LABEL_FIELDS), True),
        ("review", ["frame_name", "status", "split", "reviewed_by", "reviewed_at", "least_confidence"], True),
        ("workbench", ["md5", "frame", "runs", "write_id", "id", "filepath", "tags", "created_at", "last_modified_at"],
         False),
        ("metadata", [], False))
    config.sidebar_groups = [fo.SidebarGroupDocument(name=name, paths=paths, expanded=is_open)
                             for name, paths, is_open in groups]
    opened.app_config = config
    opened.info = {**opened.info, "workbench": {"labels": labels}}
    opened.save()


def _labels_of(document: dict[str, Any]) -> tuple[str, ...]:
    """The task's labels: those it was opened with and those a person added to the app's label schema since."""
    ours = (document.get("info") or {}).get("workbench", {}).get("labels", [])
    schema = (document.get("label_schemas") or {}).get("labels") or {}
    return tuple(dict.fromkeys([*ours, *(schema.get("classes") or [])]))


def _new_document(labeled: LabeledFrame, path: Path, dataset_id: Any) -> dict[str, Any]:
    frame, at = labeled.frame, _utc_ms()
    is_labeled = labeled.annotations is not None
    working = WorkingFrame(frame, annotations=labeled.annotations, status="accepted" if is_labeled else "new",
                           split=labeled.split, reviewed_by=labeled.reviewed_by)
    return {
        "_dataset_id": dataset_id, "_media_type": "image", "_rand": random.random(), "tags": [],
        "filepath": str(Path(path).absolute()), "created_at": at, "last_modified_at": at, "write_id": uuid.uuid4().hex,
        "metadata": {"_cls": "ImageMetadata", "size_bytes": frame.size_bytes, "width": frame.width,
                     "height": frame.height},
        "frame_name": frame.name, "md5": frame.blob, "frame": json.dumps(frame.to_json()), **_changes(working),
    }


def _insert(samples: Any, documents: list[dict[str, Any]]) -> int:
    """Inserts what is not there (another process may add the same frames at the same time); returns how many."""
    from pymongo.errors import BulkWriteError
    if not documents:
        return 0
    try:
        return len(samples.insert_many(documents, ordered=False).inserted_ids)
    except BulkWriteError as error:
        if any(each["code"] != 11000 for each in error.details["writeErrors"]):  # 11000: the unique key is there
            raise
        return error.details["nInserted"]


def _changes(working: WorkingFrame) -> dict[str, Any]:
    """The fields a write sets, checked."""
    if working.status not in STATUSES:
        raise Invalid(f"Status {working.status!r} of {working.frame.name!r} must be one of {', '.join(STATUSES)}.")
    drawn: dict[str, list[dict[str, Any]]] | None = None
    if working.annotations is not None:
        drawn = {name: [] for name in LABEL_FIELDS}
        for annotation in working.annotations:
            name, label = _to_label(annotation, working.frame)
            drawn[name].append(label)
    certain = [a.confidence for a in working.annotations or () if a.is_machine and a.confidence is not None]
    lists = zip(LABEL_FIELDS, ("Detections", "Polylines", "Classifications"),
                ("detections", "polylines", "classifications"))
    return {
        **{name: None if drawn is None else {"_cls": kind, inner: drawn[name]} for name, kind, inner in lists},
        "runs": json.dumps([run.to_json() for run in working.runs]), "status": working.status, "split": working.split,
        "reviewed_by": working.reviewed_by, "reviewed_at": working.reviewed_at,
        "least_confidence": min(certain, default=1.0),
    }


def _to_label(annotation: Annotation, frame: Frame) -> tuple[str, dict[str, Any]]:
    """(field, FiftyOne's document) of one annotation; coordinates become relative to the frame."""
    from bson import ObjectId
    if annotation.mask is not None:
        raise Invalid(f"{frame.name!r} has a mask ({annotation.label!r}); the embedded annotation surface keeps boxes, "
                      "polygons and tags. Convert it to a polygon first.")
    try:
        details = json.dumps(annotation.attributes, allow_nan=False) if annotation.attributes else None
    except (TypeError, ValueError) as error:
        raise Invalid(f"{frame.name!r}: attributes of {annotation.label!r} are not JSON ({error}).") from error
    label = {
        "_id": ObjectId(_object_id(annotation.id)), "tags": [],
        "label": None if annotation.label == NO_LABEL else annotation.label,
        "confidence": annotation.confidence, "annotation_id": annotation.id, "source": annotation.source,
        "details": details,
    }
    box = None
    if annotation.xyxy is not None:
        x1, y1, x2, y2 = annotation.xyxy
        is_inside = min(x1, y1) >= -EDGE_PX and x2 <= frame.width + EDGE_PX and y2 <= frame.height + EDGE_PX
        if not is_inside or not _has_area(annotation.xyxy):
            raise Invalid(f"{frame.name!r}: box {annotation.xyxy} of {annotation.label!r} leaves the frame "
                          f"({frame.width} x {frame.height}) or is too small to be seen. Cut it to the frame first.")
        box = [x1 / frame.width, y1 / frame.height, (x2 - x1) / frame.width, (y2 - y1) / frame.height]
    if annotation.polygon is not None:
        points = [[[x / frame.width, y / frame.height] for x, y in annotation.polygon]]
        return "polygons", {**label, "_cls": "Polyline", "attributes": {}, "points": points, "closed": True,
                            "filled": True, "index": annotation.track_id, "box": box,
                            "box_of": _digest(points) if box else None}
    if box is not None:
        return "labels", {**label, "_cls": "Detection", "attributes": {}, "bounding_box": box,
                          "index": annotation.track_id}
    return "frame_labels", {**label, "_cls": "Classification"}


def _working_frame(row: dict[str, Any]) -> WorkingFrame:
    frame = Frame.from_json(json.loads(row["frame"]))
    is_unseen = all(row.get(name) is None for name in LABEL_FIELDS)
    annotations: list[Annotation] = []
    seen: set[str] = set()
    for label, geometry in _drawn(row, frame):
        annotations.append(_annotation(label, geometry, frame, seen))
        seen.add(annotations[-1].id)
    return WorkingFrame(
        frame=frame, annotations=None if is_unseen else tuple(annotations),
        runs=tuple(RunWrite.from_json(run) for run in json.loads(row.get("runs") or "[]")), status=row["status"],
        split=row.get("split"), reviewed_by=row.get("reviewed_by") or "", reviewed_at=row.get("reviewed_at") or "",
        revision=f"{row['last_modified_at'].isoformat(timespec='milliseconds')}/{row['write_id']}")


def _drawn(row: dict[str, Any], frame: Frame) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(label document, geometry in pixels) of all that is drawn.

    What a person dragged over the edge is cut to the frame; what has no area left there is left out, because nobody
    can see it, let alone delete it.
    """
    for label in (row.get("labels") or {}).get("detections") or ():
        box = _box_in_pixels(label["bounding_box"], frame)
        if _has_area(box):
            yield label, {"xyxy": box}
    for label in (row.get("polygons") or {}).get("polylines") or ():
        for points in label["points"]:
            pixels = [_in_frame((x * frame.width, y * frame.height), frame)
                      for x, y in (_finite(point, frame) for point in points)]
            if len(pixels) < 3:
                continue
            box = None
            if label.get("box") and label.get("box_of") == _digest([points]):
                box = _box_in_pixels(label["box"], frame)
            elif label.get("box"):  # the polygon was changed in the app, which knows nothing of the box beside it
                xs, ys = zip(*pixels)
                box = (min(xs), min(ys), max(xs), max(ys))
            yield label, {"polygon": tuple(pixels), "xyxy": box}
    for label in (row.get("frame_labels") or {}).get("classifications") or ():
        yield label, {}


def _annotation(label: dict[str, Any], geometry: dict[str, Any], frame: Frame, seen: set[str]) -> Annotation:
    """A label without our id, or with one that stands on the frame already (a copy), was drawn by a person just now."""
    own = label.get("annotation_id")
    is_ours = bool(own) and own not in seen
    drawn_id = f"{label['_id']}{DRAWN_IN_APP}"
    if drawn_id in seen:
        drawn_id = _digest([drawn_id, len(seen)])
    try:
        return Annotation(
            label=label.get("label") or NO_LABEL, **geometry, track_id=label.get("index"),
            attributes=json.loads(label["details"]) if is_ours and label.get("details") else {},
            source=(label.get("source") if is_ours else None) or "human:unknown",
            confidence=label.get("confidence") if is_ours else None, id=own if is_ours else drawn_id)
    except Invalid as error:
        raise Invalid(f"{frame.name!r}: {error} Mend or delete it in the annotation app.") from error


def _box_in_pixels(relative: Sequence[float], frame: Frame) -> tuple[float, ...]:
    """Relative x, y, width, height -> x1, y1, x2, y2."""
    x, y, width, height = _finite(relative, frame)
    return _in_frame((x * frame.width, y * frame.height, (x + width) * frame.width, (y + height) * frame.height), frame)


def _finite(values: Sequence[float], frame: Frame) -> Sequence[float]:
    if values is None or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise Invalid(f"{frame.name!r} holds a drawing with coordinates {values!r}. Delete it in the annotation app.")
    return values


def _in_frame(values: tuple[float, ...], frame: Frame) -> tuple[float, ...]:
    """Pixels x, y, x, y ..., cut to the frame when one leaves it by more than a published box may."""
    sides = [(frame.width, frame.height)[index % 2] for index in range(len(values))]
    if any(not -EDGE_PX <= value <= side + EDGE_PX for value, side in zip(values, sides)):
        values = tuple(min(max(value, 0.0), side) for value, side in zip(values, sides))
    return tuple(round(value, 6) for value in values)  # takes back the noise of the trip through relative numbers


def _has_area(box: tuple[float, ...]) -> bool:
    x1, y1, x2, y2 = (round(value, DECIMALS) for value in box)
    return x2 > x1 and y2 > y1


def _object_id(annotation_id: str) -> str:
    """FiftyOne's id of an annotation: the one the app gave it, else the same for the same annotation on every write."""
    if annotation_id.endswith(DRAWN_IN_APP) and len(annotation_id) == 32:
        return annotation_id[:24]
    return hashlib.sha256(annotation_id.encode()).hexdigest()[:24]


def _evaluated_sample(fo: Any, labeled: LabeledFrame, found: Detections | None, labels: Taxonomy,
                      paths: dict[str, Path]) -> Any:
    frame = labeled.frame
    found = Detections.empty() if found is None else found

    def detection(label: str, xyxy: Sequence[float], **fields: Any) -> Any:
        x1, y1, x2, y2 = map(float, xyxy)
        return fo.Detection(label=label, bounding_box=[x1 / frame.width, y1 / frame.height, (x2 - x1) / frame.width,
                                                       (y2 - y1) / frame.height], **fields)

    drawn = [a for a in labeled.annotations or () if a.xyxy is not None]
    return fo.Sample(
        filepath=str(paths[frame.name]), media_type="image", frame_name=frame.name, split=labeled.split,
        ground_truth=fo.Detections(detections=[detection(a.label, a.xyxy) for a in drawn]),
        predictions=fo.Detections(detections=[
            detection(labels.labels[class_id], xyxy, confidence=float(confidence))
            for xyxy, class_id, confidence in zip(found.xyxy, found.class_id, found.confidence)]))


def _parse_revision(working: WorkingFrame) -> tuple[datetime, str]:
    at, _, write_id = working.revision.partition("/")
    try:
        return datetime.fromisoformat(at), write_id
    except ValueError as error:
        raise Invalid(f"{working.frame.name!r} has no revision of this server; read it before writing it.") from error


def _utc_ms() -> datetime:
    """Now, at the millisecond that MongoDB keeps."""
    at = datetime.now(timezone.utc)
    return at.replace(microsecond=at.microsecond // 1000 * 1000)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
