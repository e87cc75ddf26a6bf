"""Published versions of data sets: a bare git repository per data set, an annotated signed-off tag per version.

Plain git and stock DVC open them: annotations.jsonl, taxonomy.json, metadata.csv, README.md and samples/ lie in git,
the frames in the blob store, tracked by frames.dvc. A version is there when its tag is: objects are written first and
shown by one ref transaction, the tag in it before the branch. Only the holder of the data set's lock file writes, so
what a killed publisher left (a ref's lock file, a branch that lags behind the tag) is known to be stale, and the next
one mends it.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from workbench.blobs import Blobs
from workbench.dataset import (DATASET_NAME, VERSION, DatasetVersion, LabeledFrame, Manifest, check_dataset_name, diff,
                               next_version, parse_ref)
from workbench.errors import Conflict, Invalid, NotFound, Unavailable
from workbench.formats import dataset_readme, dvc
from workbench.taxonomy import Taxonomy

LOCK_WAIT_S = 60
BUMPS = ("major", "minor", "patch")
# 10,000 frames with 75,000 boxes take 50 MB in memory and 3 s to read; pages and steps ask for the latest one often.
MANIFESTS_KEPT = 2
_LOOKUPS = 16
# A file system's clock may step by as much: a tag that somebody moved so lately may move again and look the same.
REFS_SETTLE_S = 0.1


class GitDatasets:
    """A DatasetStore in `folder`, one repository `<name>.git` each; the frames are in `blobs`."""

    def __init__(self, folder: Path, blobs: Blobs) -> None:
        self._folder, self._blobs = Path(folder).absolute(), blobs
        self._read = lru_cache(maxsize=MANIFESTS_KEPT)(_read_manifest)  # keyed by commit: it never changes
        self._versions: dict[str, tuple[object, list[DatasetVersion]]] = {}  # data set -> its refs' state, versions

    def names(self) -> list[str]:
        names = (path.name.removesuffix(".git") for path in self._folder.glob("*.git") if path.is_dir())
        return sorted(name for name in names if DATASET_NAME.fullmatch(name))

    def versions(self, dataset: str) -> list[DatasetVersion]:
        path = self._existing(dataset)
        refs = _state_of_refs(path)
        kept = self._versions.get(dataset)
        if kept is not None and kept[0] == refs:
            return list(kept[1])
        found = _Repository(path).versions(dataset)[0]
        if time.time() - max(changed for _, changed, _ in refs[1:]) > REFS_SETTLE_S:
            self._versions[dataset] = refs, found
        return list(found)

    def version(self, ref: str) -> DatasetVersion:
        dataset, number = parse_ref(ref)
        versions = self.versions(dataset)
        for version in versions:
            if version.version == number:
                return version
        raise NotFound(f"Data set {dataset} has no version {number}; there are "
                       f"{', '.join(version.version for version in versions) or 'none yet'}.")

    def manifest(self, ref: str) -> Manifest:
        version = self.version(ref)
        return self._read(self._existing(version.dataset), version)

    def checkout_url(self, dataset: str) -> str:
        return str(self._existing(dataset))

    def publish(self, dataset: str, manifest: Manifest, message: str, author: str, bump: str | None = None,
                after: str | None = None) -> DatasetVersion:
        check_dataset_name(dataset)
        if bump is not None and bump not in BUMPS:
            raise Invalid(f"Bump {bump!r} must be one of {', '.join(BUMPS)}.")
        person, annotations = _person(author), _canonical(manifest)
        digest = hashlib.sha256(annotations).hexdigest()
        with self._publishing(dataset) as lock:
            final, fresh = self._folder / f"{dataset}.git", self._folder / f".new-{dataset}.git"
            if not final.is_dir():
                # The first version is made in another folder, so that its data set appears together with it.
                shutil.rmtree(fresh, ignore_errors=True)
                _create(fresh, lock)
            repository = _Repository(final if final.is_dir() else fresh, lock)
            repository.drop_stale_locks()
            versions, main = repository.versions(dataset)
            latest = versions[0] if versions else None
            if latest is not None and latest.digest == digest:
                repository.move_main(latest.commit, main)
                return latest
            if after is not None and after != (latest.version if latest else ""):
                raise Conflict(f"{dataset} is at {latest.version if latest else 'no version'} now, the new version was "
                               f"made from {after or 'none'}. Make it again from the latest one.")
            self._check_pixels(manifest)
            before = self._read(final, latest) if latest else None
            changed = diff(before or Manifest(Taxonomy(())), manifest)
            number = next_version(latest.version if latest else None, bump or changed.bump)
            pictures = dataset_readme.draw_samples(manifest, lambda frame: self._blobs.get(frame.blob))
            frames = tuple(one.frame for one in manifest.frames)
            readme = dataset_readme.readme(
                dataset, number, manifest, message=message, author=person.name, url=str(final), samples=list(pictures),
                previous=latest.version if latest else None, changed=changed)
            self._blobs.put(dvc.listing(frames), suffix=".dir")
            taxonomy = json.dumps({"labels": manifest.taxonomy.labels}, indent=1, ensure_ascii=False) + "\n"
            repository.commit_version(
                {"annotations.jsonl": annotations, "metadata.csv": _metadata(manifest), "README.md": readme.encode(),
                 "taxonomy.json": taxonomy.encode(),
                 **{f"samples/{place}.jpg": data for place, data in enumerate(pictures.values(), start=1)},
                 **dvc.tracking_files(frames, self._blobs.url)},
                number=number, parent=latest.commit if latest else None, main=main, person=person,
                text=_text(message or f"{dataset} {number}", manifest, digest, person))
            if not final.is_dir():
                os.rename(fresh, final)
        return self.version(f"{dataset}@{number}")

    def _existing(self, dataset: str) -> Path:
        path = self._folder / f"{check_dataset_name(dataset)}.git"
        if not path.is_dir():
            raise NotFound(f"Data set {dataset!r} does not exist; upload its first frames. There are "
                           f"{', '.join(self.names()) or 'none yet'}.")
        return path

    def _check_pixels(self, manifest: Manifest) -> None:
        with ThreadPoolExecutor(_LOOKUPS) as pool:
            there = pool.map(self._blobs.exists, [one.frame.blob for one in manifest.frames])
            missing = [one.frame for one, found in zip(manifest.frames, there) if not found]
        if missing:
            raise Invalid(f"{len(missing)} frame(s) have no pixels in the blob store {self._blobs.url}, first of all "
                          f"{missing[0].name!r} (md5 {missing[0].blob}). Upload them again before publishing.")

    @contextmanager
    def _publishing(self, dataset: str) -> Iterator[int]:
        """Holds the data set's lock file and gives its descriptor, for the git processes to hold it too.

        The kernel frees it when the last of them has ended, however it ended. Raises Conflict after LOCK_WAIT_S.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = open(self._folder / f".{dataset}.lock", "ab")
        except OSError as error:
            raise Unavailable(f"Cannot write to the data sets' folder {self._folder}: {error.strerror}. Mend its "
                              "rights or free some space.") from error
        with lock:
            until = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > until:
                        raise Conflict(f"Somebody else has been publishing {dataset} for {LOCK_WAIT_S} s. Try again "
                                       "when they are done.") from error
                    time.sleep(0.05)
            yield lock.fileno()


@dataclass(frozen=True)
class _Person:
    name: str
    mail: str

    def __str__(self) -> str:
        return f"{self.name} <{self.mail}>"


@dataclass(frozen=True)
class _Repository:
    """git on one bare repository. No setting, hook or variable from outside takes part."""

    path: Path
    lock: int | None = None

    def __call__(self, *arguments: str, data: bytes = b"") -> bytes:
        """What git printed. Raises Unavailable with what git said when it fails."""
        command = ["git", "--git-dir", str(self.path), "-c", "core.hooksPath=/dev/null", "-c", "core.fsync=all",
                   *arguments]
        environment = {"PATH": os.pathsep.join(os.get_exec_path()), "LC_ALL": "C", "HOME": os.devnull,
                       "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}
        try:
            done = subprocess.run(command, input=data, capture_output=True, env=environment, check=False,
                                  pass_fds=() if self.lock is None else (self.lock,))
        except FileNotFoundError as error:
            raise Unavailable("git is not installed; it keeps the data sets' versions. Install the package git.") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise Unavailable(f"git {arguments[0]} failed in {self.path}: {said}")
        return done.stdout

    def versions(self, dataset: str) -> tuple[list[DatasetVersion], str]:
        """The versions, newest first, and the commit of the branch main ("" when there is none): one git process."""
        fields = ("refname", "objectname", "*objectname", "taggername", "taggerdate:unix", "contents")
        pattern = "%00".join(f"%({field})" for field in fields) + "%00%00"
        out = self("for-each-ref", f"--format={pattern}", "refs/tags/v*", "refs/heads/main").decode(errors="replace")
        versions, main = [], ""
        for row in out.split("\0\0\n"):
            if not row:
                continue
            name, object_name, commit, author, at, text = row.split("\0")
            if name == "refs/heads/main":
                main = object_name
                continue
            message, _, rest = text.rstrip("\n").rpartition("\n\n")
            facts = dict(line.split(": ", 1) for line in rest.splitlines() if ": " in line)
            number = name.removeprefix("refs/tags/v")
            if not commit or not VERSION.fullmatch(number) or "Manifest-Digest" not in facts:
                continue  # somebody's own tag, not a version
            versions.append(DatasetVersion(
                dataset=dataset, version=number, digest=facts["Manifest-Digest"], commit=commit, message=message,
                author=author, created_at=datetime.fromtimestamp(int(at), timezone.utc).isoformat(),
                frames=int(facts["Frames"]), labeled=int(facts["Labeled"]), boxes=int(facts["Boxes"]),
                labels=tuple(json.loads(facts["Labels"]))))
        return sorted(versions, key=lambda one: tuple(map(int, one.version.split("."))), reverse=True), main

    def commit_version(self, files: dict[str, bytes], *, number: str, parent: str | None, main: str, person: _Person,
                       text: str) -> None:
        """Writes the objects, then shows them: tag and branch in one transaction, each only from its known state."""
        when = f"{person} {int(time.time())} +0000"
        lines = [f"tree {self._tree(files)}", *([f"parent {parent}"] if parent else []),
                 f"author {when}", f"committer {when}", "", text]
        commit = self._write("commit", "\n".join(lines).encode())
        tag = "\n".join([f"object {commit}", "type commit", f"tag v{number}", f"tagger {when}", "", text])
        tag = self("mktag", data=tag.encode()).decode().strip()
        try:
            self("update-ref", "--stdin", data=f"start\ncreate refs/tags/v{number} {tag}\n"
                 f"update refs/heads/main {commit} {main or '0' * 40}\nprepare\ncommit\n".encode())
        except Unavailable as error:
            raise Conflict(f"Version {number} could not be made, {self.path.name} changed meanwhile; a published "
                           f"version is never replaced. Publish again. ({error})") from error

    def move_main(self, commit: str, main: str) -> None:
        """Ends a publication that was killed between the tag and the branch."""
        if main != commit:
            self("update-ref", "refs/heads/main", commit, main or "0" * 40)

    def drop_stale_locks(self) -> None:
        """Removes ref locks whose process was killed: nobody else may hold one while we hold the data set's lock."""
        for path in (*self.path.glob("refs/tags/v*.lock"), self.path / "refs/heads/main.lock", self.path / "HEAD.lock"):
            path.unlink(missing_ok=True)

    def _tree(self, files: dict[str, bytes]) -> str:
        """The tree of files at most one folder deep."""
        entries: dict[str, list[str]] = {"": []}
        for path, data in files.items():
            folder, _, name = path.rpartition("/")
            entries.setdefault(folder, []).append(f"100644 blob {self._write('blob', data)}\t{name}")
        for folder in sorted(set(entries) - {""}):
            entries[""].append(f"040000 tree {self._mktree(entries[folder])}\t{folder}")
        return self._mktree(entries[""])

    def _mktree(self, entries: list[str]) -> str:
        return self("mktree", data="".join(f"{entry}\n" for entry in entries).encode()).decode().strip()

    def _write(self, kind: str, data: bytes) -> str:
        return self("hash-object", "-t", kind, "-w", "--stdin", "--no-filters", data=data).decode().strip()


def _create(path: Path, lock: int) -> None:
    repository = _Repository(path, lock)
    repository("init", "--quiet", "--bare", "--template=", "--initial-branch=main")
    # Hidden from receive-pack, a ref cannot be pushed to: versions come from `publish` alone and never move.
    repository("config", "receive.hideRefs", "refs")


def _state_of_refs(repository: Path) -> tuple[Any, ...]:
    """The names of the tags in files of their own, then inode, time of change in seconds and size of all that git touches
    when it makes, moves or removes a ref: it renames each new file into its folder."""
    tags = repository / "refs" / "tags"
    found: list[Any] = [tuple(sorted(os.listdir(tags))) if tags.is_dir() else ()]
    for name in ("packed-refs", "refs", "refs/tags", "refs/heads"):
        try:
            stat = os.stat(repository / name)
        except FileNotFoundError:
            found.append((0, 0.0, 0))
            continue
        found.append((stat.st_ino, max(stat.st_mtime, stat.st_ctime), stat.st_size))
    return tuple(found)


def _read_manifest(repository: Path, version: DatasetVersion) -> Manifest:
    data = _Repository(repository)("cat-file", "blob", f"{version.commit}:annotations.jsonl")
    if hashlib.sha256(data).hexdigest() != version.digest:
        raise Invalid(f"{version.ref} in {repository} is damaged: annotations.jsonl is not what its tag was made for. "
                      "Restore the repository from its backup.")
    try:
        # Not splitlines: a text attribute may hold U+2028 and the like, which JSON leaves as they are.
        return Manifest.from_lines(data.decode().split("\n"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Invalid(f"{version.ref} in {repository} is not a manifest: {error}") from error


def _canonical(manifest: Manifest) -> bytes:
    """The manifest's lines. Raises Invalid, naming the frame, when one would not read back as it was written."""
    dvc.check_frames(one.frame for one in manifest.frames)
    lines = iter(manifest.to_lines())
    written = [next(lines).encode()]
    for one in manifest.frames:
        try:
            line = next(lines).encode()
            record = json.loads(line)
            if LabeledFrame.from_json(record).to_json() != record:
                raise Invalid("it would read back as something else.")
            if len({annotation.id for annotation in one.annotations or ()}) != len(one.annotations or ()):
                raise Invalid("two of its annotations have the same id.")
        except (ValueError, TypeError) as error:
            raise Invalid(f"Frame {one.frame.name!r} cannot be published: {error}") from error
        written.append(line)
    return b"".join(line + b"\n" for line in written)


def _metadata(manifest: Manifest) -> bytes:
    """metadata.csv; `boxes` is empty where nobody looked and 0 where somebody looked and saw nothing."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("name", "md5", "sha256", "size_bytes", "width", "height", "split", "boxes", "reviewed_by"))
    for one in manifest.frames:
        frame = one.frame
        boxes = "" if one.annotations is None else len(one.annotations)
        rows.writerow((frame.name, frame.blob, frame.sha256, frame.size_bytes, frame.width, frame.height,
                       one.split or "", boxes, one.reviewed_by))
    return table.getvalue().encode()


def _text(message: str, manifest: Manifest, digest: str, person: _Person) -> str:
    """A person's message and our trailers, always the last paragraph; counts there make `versions` one git process."""
    told = "".join(character for character in message if character.isprintable() or character == "\n").strip()
    return (f"{told}\n\nManifest-Digest: {digest}\nFrames: {len(manifest.frames)}\nLabeled: {len(manifest.labeled)}\n"
            f"Boxes: {manifest.box_count}\nLabels: {json.dumps(manifest.taxonomy.labels)}\nSigned-off-by: {person}\n")


def _person(author: str) -> _Person:
    """`Ann` or `Ann <ann@lab.example>`; without an address one under .invalid, which is nobody's (RFC 2606)."""
    name, _, mail = author.partition("<")
    name = " ".join("".join(" " if one == ">" or not one.isprintable() else one for one in name).split())
    if not re.search(r"\w", name):
        raise Invalid(f"Author {author!r} needs a name: a version is signed off by who publishes it.")
    mail = mail.rstrip().removesuffix(">")
    if not re.fullmatch(r"[^\s<>@]+@[^\s<>@]+", mail) or not mail.isprintable():
        mail = f"{re.sub(r'[^a-z0-9]+', '.', name.lower()).strip('.') or 'somebody'}@workbench.invalid"
    return _Person(name, mail)
