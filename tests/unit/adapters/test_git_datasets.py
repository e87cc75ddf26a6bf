"""What plain git and stock DVC see of a published data set, and what a kill at any moment leaves."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.adapters import git_datasets
from workbench.adapters.git_datasets import GitDatasets
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.dataset import Frame, LabeledFrame, Manifest
from workbench.errors import Conflict, Invalid, NotFound, Unavailable
from workbench.formats import dvc
from workbench.taxonomy import Taxonomy

LABELS = Taxonomy(("red", "white | <b>"))


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(str(tmp_path / "blob store, of ünits"))


@pytest.fixture
def store(tmp_path: Path, blobs: Blobs) -> GitDatasets:
    return GitDatasets(tmp_path / "datasets", blobs)


def photograph(
    blobs: Blobs,
    name: str,
    *boxes: tuple[float, float, float, float],
    looked: bool = True,
    label: str = "red",
    split: str = "train",
) -> LabeledFrame:
    """A grey 200 x 100 picture whose pixels depend on its name."""
    picture = np.full((100, 200, 3), 90 + len(name), np.uint8)
    picture[:8, :8] = list(hashlib.md5(name.encode()).digest()[:3])
    written = io.BytesIO()
    Image.fromarray(picture).save(written, "PNG")
    stored = blobs.put(written.getvalue())
    drawn = tuple(
        Annotation(label, xyxy=xyxy, source="human:ann", id=f"{name}-{place}") for place, xyxy in enumerate(boxes)
    )
    return LabeledFrame(
        Frame(name, 200, 100, stored.md5, stored.sha256, stored.size_bytes), drawn if looked else None, split
    )


@pytest.fixture
def three(blobs: Blobs) -> Manifest:
    return Manifest(
        LABELS,
        (
            photograph(blobs, "cam/a.png", (10, 10, 30, 30), (50, 5, 190, 95)),
            photograph(blobs, "b.png", split="test"),
            photograph(blobs, "ü c.png", looked=False),
        ),
    )


def git(where: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def clone(store: GitDatasets, dataset: str, to: Path) -> Path:
    git(to.parent, "clone", "--quiet", store.checkout_url(dataset), str(to))
    return to


def test_a_clone_has_the_labels_the_table_the_readme_and_the_samples(
    store: GitDatasets, three: Manifest, tmp_path: Path
) -> None:
    store.publish("cells", three, "First", "Ann")

    folder = clone(store, "cells", tmp_path / "clone")

    assert Manifest.from_lines((folder / "annotations.jsonl").read_text().split("\n")) == three
    assert json.loads((folder / "taxonomy.json").read_text()) == {"labels": list(LABELS.labels)}
    rows = list(csv.DictReader((folder / "metadata.csv").open(encoding="utf-8")))
    assert [(row["name"], row["boxes"], row["split"]) for row in rows] == [
        ("b.png", "0", "test"),
        ("cam/a.png", "2", "train"),
        ("ü c.png", "", "train"),
    ]
    for row, one in zip(rows, three.frames):
        assert (row["md5"], row["sha256"], row["size_bytes"], row["width"], row["height"]) == (
            one.frame.blob,
            one.frame.sha256,
            str(one.frame.size_bytes),
            "200",
            "100",
        )
    assert [path.name for path in (folder / "samples").iterdir()] == ["1.jpg"]  # one frame has boxes
    assert (folder / ".gitignore").read_text() == "/frames\n"


def test_the_tag_is_annotated_signed_off_and_carries_the_digest(store: GitDatasets, three: Manifest) -> None:
    made = store.publish("cells", three, "First frames", "Ann Lee <ann@lab.example>")
    repository = Path(store.checkout_url("cells"))

    tag = git(repository, "cat-file", "tag", "v0.1.0")

    assert "tagger Ann Lee <ann@lab.example>" in tag
    assert f"Manifest-Digest: {three.digest}\n" in tag
    assert tag.endswith("\nSigned-off-by: Ann Lee <ann@lab.example>\n")
    assert git(repository, "rev-parse", "main", "v0.1.0^{commit}").split() == [made.commit] * 2
    assert git(
        repository, "log", "-1", "--format=%an <%ae>|%(trailers:key=Manifest-Digest,valueonly)", "main"
    ).strip() == (f"Ann Lee <ann@lab.example>|{three.digest}")
    assert git(repository, "fsck", "--strict") == ""


def test_the_difference_between_two_tags_reads_frame_by_frame(
    store: GitDatasets, blobs: Blobs, three: Manifest
) -> None:
    store.publish("cells", three, "First", "Ann")
    moved = replace(three.frames[1], annotations=(three.frames[1].annotations[0],))
    store.publish("cells", replace(three, frames=(three.frames[0], moved, three.frames[2])), "One box less", "Bob")
    repository = Path(store.checkout_url("cells"))

    lines = git(repository, "diff", "--unified=0", "v0.1.0", "v0.2.0", "--", "annotations.jsonl").splitlines()

    changed = [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert [(line[0], len(json.loads(line[1:])["annotations"])) for line in changed] == [("-", 2), ("+", 1)]
    assert git(repository, "rev-list", "--count", "main").strip() == "2"


def test_the_readme_counts_classes_splits_sizes_and_changes(store: GitDatasets, blobs: Blobs, three: Manifest) -> None:
    store.publish("cells", three, "First", "Ann")
    new = photograph(blobs, "d.png", (0, 0, 40, 40), label="white | <b>", split="val")
    gone = [one for one in three.frames if one.frame.name != "b.png"]
    store.publish("cells", Manifest(LABELS, (*gone, new)), "Second [link](x) | `code`", "Bob", bump="minor")

    text = git(Path(store.checkout_url("cells")), "show", "v0.2.0:README.md")

    assert text.startswith("# cells 0.2.0\n\nSecond \\[link\\](x) \\| \\`code\\`\n\nPublished by Bob.\n")
    assert "| 3 | 2 | 0 | 1 | 3 | 2 |" in text  # frames, labelled, without an object, not labelled, boxes, labels
    assert "## What changed since 0.1.0" in text and "Frames added: d.png." in text and "Frames removed: b.png." in text
    assert "| boxes added | 1 |" in text
    assert "| 0 | red | 2 | 0 | 0 | 2 | 1 |" in text  # class_id, label, train, val, test, boxes, frames with it
    assert "| 1 | white \\| \\<b\\> | 0 | 1 | 0 | 1 | 1 |" in text
    assert "| train | 2 | 1 | 1 | 2 |" in text and "| test | 0 | 0 | 0 | 0 |" in text
    # areas: 20 x 20 is small, 40 x 40 medium, 140 x 90 = 12,600 large (over 96 x 96 = 9,216)
    assert "| 1 | 1 | 1 |" in text
    assert "| width | 22.0 | 30.0 | 40.0 | 90.0 | 130.0 |" in text  # of 20, 40, 140, linear between them
    assert "git clone " in text and "git checkout v0.2.0" in text and "dvc pull" in text


def test_sample_frames_show_their_boxes_and_are_the_same_again(
    store: GitDatasets, blobs: Blobs, tmp_path: Path
) -> None:
    frames = [photograph(blobs, f"{number}.png", (20, 30, 120, 90)) for number in range(8)]
    broken = blobs.put(b"no picture at all")
    frames.append(
        LabeledFrame(Frame("broken.png", 200, 100, broken.md5, broken.sha256, 17), frames[0].annotations, "train")
    )
    first = clone(
        store, store.publish("one", Manifest(LABELS, tuple(frames)), "First", "Ann").dataset, tmp_path / "one"
    )
    second = clone(
        store, store.publish("two", Manifest(LABELS, tuple(frames)), "First", "Ann").dataset, tmp_path / "two"
    )

    names = sorted(path.name for path in (first / "samples").iterdir())

    assert 5 <= len(names) <= 6
    for name in names:
        assert (first / "samples" / name).read_bytes() == (second / "samples" / name).read_bytes()
        picture = np.asarray(Image.open(first / "samples" / name)).astype(int)
        assert picture.shape == (100, 200, 3)
        yellow = (
            (picture[..., 0] > 180) & (picture[..., 1] > 170) & (picture[..., 2] < 160)
        )  # JPEG blurs #F0E442 a little
        assert yellow[60, 20:22].any() and yellow[90, 70] and not yellow[60, 70]  # two sides of the box, not its middle


def test_the_listing_has_the_md5_that_dvc_gives_it(tmp_path: Path) -> None:
    # Recorded: `dvc add frames` of DVC 3.67.1 on files of these names and contents.
    contents = {"a/1.jpg": b"one", "a.jpg": b"two", "b/2.jpg": b"three", "ü x/é.jpg": b"four", "B.jpg": b"five"}
    blobs = Blobs(str(tmp_path))
    frames = tuple(Frame(name, 1, 1, blobs.put(data).md5, "", len(data)) for name, data in contents.items())

    files = dvc.tracking_files(frames, "/store")

    assert files["frames.dvc"].decode() == (
        "outs:\n- md5: 21a50128d64e46978ade033d88d946a2.dir\n  size: 19\n  nfiles: 5\n  hash: md5\n  path: frames\n"
    )
    assert dvc.listing(frames).startswith(b'[{"md5": "30056e1cab7a61d256fc8edd970d14f5", "relpath": "B.jpg"}, ')


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("s3://bucket/pre fix", "s3://bucket/pre fix"),
        ("s3://key:secret@host/bucket", "s3://host/bucket"),
        ("file:///a/b", "/a/b"),
        ("/a, b/#c", '"/a, b/#c"'),
        ('/a"b', "'/a\"b'"),
        ("/a'\"b", "'''/a'\"b'''"),
    ],
)
def test_the_remote_is_written_as_dvc_writes_it_and_without_credentials(url: str, written: str) -> None:
    config = dvc.tracking_files((), url)[".dvc/config"].decode()

    assert config == f"[core]\n    remote = storage\n['remote \"storage\"']\n    url = {written}\n"


@pytest.fixture
def stock_dvc() -> list[str]:
    """The command of an installed DVC."""
    if os.environ.get("WORKBENCH_TEST_DVC"):
        return [os.environ["WORKBENCH_TEST_DVC"]]
    if importlib.util.find_spec("dvc"):
        return [sys.executable, "-m", "dvc"]
    if shutil.which("dvc"):
        return ["dvc"]
    pytest.skip("dvc is not installed here; name one by WORKBENCH_TEST_DVC=/path/to/bin/dvc (pip install dvc)")


def test_stock_dvc_pulls_every_frame_of_every_version(
    store: GitDatasets, blobs: Blobs, three: Manifest, stock_dvc: list[str], tmp_path: Path
) -> None:
    store.publish("cells", three, "First", "Ann")
    more = Manifest(LABELS, (*three.frames[1:], photograph(blobs, "cam/new.png")))
    store.publish("cells", more, "Second", "Ann")
    folder = clone(store, "cells", tmp_path / "clone")
    environment = {
        **os.environ,
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
        "LC_ALL": "C.UTF-8",
    }

    for tag, manifest in (("v0.2.0", more), ("v0.1.0", three)):
        git(folder, "checkout", "--quiet", tag)
        for command in (["pull"], ["status", "--json"]):
            done = subprocess.run([*stock_dvc, *command], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {}
        pulled = {
            path.relative_to(folder / "frames").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (folder / "frames").rglob("*")
            if path.is_file()
        }
        assert pulled == {one.frame.name: one.frame.sha256 for one in manifest.frames}
        assert git(folder, "status", "--porcelain") == ""
    # What was pulled is a copy: changing it must not change the store.
    copy = folder / "frames" / "b.png"
    assert copy.stat().st_ino != blobs.path(three.frames[0].frame.blob).stat().st_ino


def test_a_published_tag_cannot_be_pushed_over(store: GitDatasets, three: Manifest, tmp_path: Path) -> None:
    made = store.publish("cells", three, "First", "Ann")
    folder = clone(store, "cells", tmp_path / "clone")
    git(folder, "-c", "user.name=eve", "-c", "user.email=e@x", "commit", "--quiet", "--allow-empty", "-m", "evil")
    git(folder, "tag", "-f", "v0.1.0")

    for refs in (["+v0.1.0"], ["main"], ["v0.1.0:refs/tags/v0.9.0"], [":refs/tags/v0.1.0"]):
        done = subprocess.run(["git", "-C", str(folder), "push", "origin", *refs], capture_output=True, text=True)
        assert done.returncode != 0 and "hidden ref" in done.stderr

    assert store.versions("cells") == [made]


def test_a_tag_that_somebody_put_in_the_way_is_left_alone(store: GitDatasets, three: Manifest) -> None:
    made = store.publish("cells", three, "First", "Ann")
    repository = Path(store.checkout_url("cells"))
    git(repository, "tag", "v0.1.1", "main")
    more = replace(three, frames=three.frames[:2])

    with pytest.raises(Conflict, match="never replaced"):
        store.publish("cells", more, "Second", "Ann", bump="patch")

    assert store.versions("cells") == [made]  # a tag without our facts is no version
    assert git(repository, "rev-parse", "main", "v0.1.1").split() == [made.commit] * 2
    assert store.publish("cells", more, "Second", "Ann", bump="minor").version == "0.2.0"


def test_versions_are_listed_without_git_until_a_ref_changes(
    store: GitDatasets, blobs: Blobs, three: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.publish("cells", three, "First", "Ann")
    repository = Path(store.checkout_url("cells"))
    asked = []
    whole = git_datasets._Repository.versions
    monkeypatch.setattr(git_datasets._Repository, "versions", lambda *given: asked.append(given) or whole(*given))

    monkeypatch.setattr(git_datasets, "REFS_SETTLE_S", 60.0)
    for _ in range(2):  # a ref that moved just now may move again within the clock's step
        store.versions("cells")
    assert len(asked) == 2

    monkeypatch.setattr(git_datasets, "REFS_SETTLE_S", -1.0)
    listed = store.versions("cells")
    listed.clear()  # what a caller does with the list is theirs
    assert [store.versions("cells") for _ in range(3)] == [[first]] * 3 and len(asked) == 3
    # By another process: a new version, one packed away, one removed.
    second = GitDatasets(repository.parent, blobs).publish("cells", replace(three, frames=three.frames[:2]), "Second", "Ann")
    assert store.versions("cells") == [second, first]
    git(repository, "pack-refs", "--all")
    assert store.versions("cells") == [second, first]
    git(repository, "update-ref", "-d", f"refs/tags/v{second.version}")
    assert store.versions("cells") == [first]


def test_labels_changed_behind_the_tag_are_found(store: GitDatasets, three: Manifest, tmp_path: Path) -> None:
    store.publish("cells", three, "First", "Ann")
    repository = Path(store.checkout_url("cells"))
    folder = clone(store, "cells", tmp_path / "clone")
    (folder / "annotations.jsonl").write_text('{"taxonomy":["red"]}\n')
    git(folder, "-c", "user.name=eve", "-c", "user.email=e@x", "commit", "--quiet", "-am", "evil")
    facts = git(repository, "for-each-ref", "--format=%(contents)", "refs/tags/v0.1.0")
    git(repository, "fetch", "--quiet", str(folder), "main")
    git(
        repository,
        "-c",
        "user.name=eve",
        "-c",
        "user.email=e@x",
        "tag",
        "-f",
        "-a",
        "-m",
        facts,
        "v0.1.0",
        "FETCH_HEAD",
    )

    with pytest.raises(Invalid, match="cells@0.1.0 .* is damaged"):
        store.manifest("cells@0.1.0")


def test_hooks_settings_and_variables_from_outside_take_no_part(
    store: GitDatasets, three: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".gitconfig").write_text(
        "[user]\n\tname = Somebody Else\n[i18n]\n\tcommitEncoding = latin1\n[init]\n"
        f"\ttemplateDir = {tmp_path}/none\n\tdefaultBranch = other\n"
    )
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "GIT_DIR": str(tmp_path / "elsewhere"),
        "GIT_AUTHOR_NAME": "Nobody",
        "GIT_OBJECT_DIRECTORY": str(tmp_path / "objects"),
        "GIT_DEFAULT_HASH": "sha256",
    }.items():
        monkeypatch.setenv(name, value)
    store.publish("cells", three, "Erste", "Ümit")
    hooks = Path(store.checkout_url("cells")) / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "reference-transaction").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (hooks / "reference-transaction").chmod(0o755)

    made = store.publish("cells", replace(three, frames=three.frames[:2]), "Zweite", "Ümit")

    assert (made.author, made.message) == ("Ümit", "Zweite")
    assert (
        not (tmp_path / "ran").exists()
        and not (tmp_path / "objects").exists()
        and not (tmp_path / "elsewhere").exists()
    )


def test_a_machine_without_git_is_told_to_install_it(
    store: GitDatasets, three: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(Unavailable, match="Install the package git"):
        store.publish("cells", three, "First", "Ann")

    assert store.names() == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, blobs: Blobs, three: Manifest) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(Unavailable, match="Cannot write to the data sets' folder"):
        GitDatasets(tmp_path / "file" / "datasets", blobs).publish("cells", three, "First", "Ann")


# --- kills ------------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """Forks a child that leads its own process group, does the work and exits."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def assert_whole(store: GitDatasets, content: dict[str, Manifest]) -> None:
    """Every version that can be seen is complete: number -> manifest."""
    if "cells" not in store.names():
        with pytest.raises(NotFound):
            store.versions("cells")
        return
    for version in store.versions("cells"):
        assert store.manifest(version.ref) == content[version.version]


def assert_ends_the_same(store: GitDatasets, content: dict[str, Manifest]) -> None:
    """Publishing again gives exactly these versions, a branch at the last of them, and a repository git finds sound."""
    store.publish("cells", list(content.values())[-1], "Next", "Ann", bump="minor")
    assert {version.version: version.digest for version in store.versions("cells")} == {
        number: manifest.digest for number, manifest in content.items()
    }
    repository = Path(store.checkout_url("cells"))
    assert git(repository, "rev-parse", "main").strip() == store.versions("cells")[0].commit
    assert git(repository, "rev-list", "--count", "main").strip() == str(len(content))
    subprocess.run(["git", "-C", str(repository), "fsck", "--strict"], check=True, capture_output=True)
    assert not list(repository.rglob("*.lock"))


@pytest.mark.parametrize("published", [0, 1], ids=["the first version", "a later version"])
def test_killed_between_any_two_git_processes_a_version_is_whole_or_absent(
    tmp_path: Path, blobs: Blobs, three: Manifest, monkeypatch: pytest.MonkeyPatch, published: int
) -> None:
    content = {"0.1.0": replace(three, frames=three.frames[:2])} if published else {}
    content[f"0.{published + 1}.0"] = three
    real, count = shutil.which("git"), tmp_path / "count"
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "git"
    wrapper.write_text(
        f'#!/bin/sh\n{real} "$@"\nstatus=$?\nn=$(($(cat {count}) - 1))\necho $n > {count}\n'
        "[ $n = 0 ] && kill -9 $PPID\nexit $status\n"
    )
    wrapper.chmod(0o755)
    kills = 0
    for calls in range(1, 60):
        store = GitDatasets(tmp_path / f"datasets{calls}", blobs)
        if published:
            store.publish("cells", content["0.1.0"], "First", "Ann")
        count.write_text(str(calls))
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
            _, status = os.waitpid(in_child(lambda: store.publish("cells", three, "Next", "Ann", bump="minor")), 0)
        assert_whole(store, content)
        assert_ends_the_same(store, content)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0  # it came to its end: every moment has been tried
            break
        kills += 1
    assert 15 <= kills < 58


def test_killed_at_random_moments_a_version_is_whole_or_absent(tmp_path: Path, blobs: Blobs) -> None:
    frames = tuple(photograph(blobs, f"{number}.png", (5, 5, 60, 60), (70, 10, 150, 90)) for number in range(120))
    content = {"0.1.0": Manifest(LABELS, frames[:60]), "0.2.0": Manifest(LABELS, frames)}
    chance = random.Random(7)
    began = time.monotonic()
    GitDatasets(tmp_path / "undisturbed", blobs).publish("cells", content["0.2.0"], "Next", "Ann")
    takes_s = time.monotonic() - began
    for number in range(10):
        store = GitDatasets(tmp_path / f"datasets{number}", blobs)
        store.publish("cells", content["0.1.0"], "First", "Ann")
        child = in_child(lambda: store.publish("cells", content["0.2.0"], "Next", "Ann", bump="minor"))
        time.sleep(chance.uniform(0, 1.2 * takes_s))
        # Half of the kills leave the git process that is running alone, to finish what it was told.
        (os.killpg if number % 2 and os.getpgid(child) == child else os.kill)(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert_whole(store, content)
        assert_ends_the_same(store, content)


@pytest.mark.parametrize("main", ["behind", "ahead"])
def test_a_kill_inside_the_ref_transaction_is_mended_by_the_next_publisher(
    store: GitDatasets, blobs: Blobs, three: Manifest, main: str
) -> None:
    content = {
        "0.1.0": replace(three, frames=three.frames[:1]),
        "0.2.0": replace(three, frames=three.frames[:2]),
        "0.3.0": three,
    }
    first = store.publish("cells", content["0.1.0"], "First", "Ann")
    second = store.publish("cells", content["0.2.0"], "Second", "Ann", bump="minor")
    repository = Path(store.checkout_url("cells"))
    if main == "behind":
        git(repository, "update-ref", "refs/heads/main", first.commit)
        assert store.publish("cells", content["0.2.0"], "Second", "Ann") == second
        assert git(repository, "rev-parse", "main").strip() == second.commit
        git(repository, "update-ref", "refs/heads/main", first.commit)
    else:
        git(repository, "update-ref", "-d", "refs/tags/v0.2.0")
        assert [version.version for version in store.versions("cells")] == ["0.1.0"]
        store.publish("cells", content["0.2.0"], "Second", "Ann", bump="minor")
    for lock in ("refs/heads/main.lock", "refs/tags/v0.3.0.lock", "HEAD.lock"):
        (repository / lock).touch()

    store.publish("cells", three, "Third", "Ann", bump="minor")

    assert_ends_the_same(store, content)


def test_a_thousand_frames_are_published_with_few_git_processes(
    store: GitDatasets, blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = photograph(blobs, "0.png", (1, 1, 20, 20))
    frames = tuple(replace(one, frame=replace(one.frame, name=f"{number:04}.png")) for number in range(1000))
    real, log = shutil.which("git"), tmp_path / "log"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(f'#!/bin/sh\necho >> {log}\nexec {real} "$@"\n')
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    store.publish("cells", Manifest(LABELS, frames), "First", "Ann")
    publishing = len(log.read_text())
    store.versions("cells")

    assert publishing < 40
    assert len(log.read_text()) - publishing == 1  # listing the versions is one process however many there are
