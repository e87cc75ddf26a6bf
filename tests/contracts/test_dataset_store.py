"""What ports.DatasetStore promises, on every adapter."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.adapters.git_datasets import GitDatasets
from workbench.annotation import Annotation
from workbench.blobs import Blobs
from workbench.dataset import SPLITS, Frame, LabeledFrame, Manifest
from workbench.errors import Conflict, Invalid, NotFound, WorkbenchError
from workbench.ports import DatasetStore
from workbench.taxonomy import Taxonomy

CELLS = Taxonomy(("red", "white"))


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(str(tmp_path / "blobs"))


@pytest.fixture(params=["git_datasets"])
def store(request: pytest.FixtureRequest, tmp_path: Path, blobs: Blobs) -> DatasetStore:
    return {"git_datasets": lambda: GitDatasets(tmp_path / "datasets", blobs)}[request.param]()


@pytest.fixture
def frame(blobs: Blobs) -> Callable[..., LabeledFrame]:
    """Makes a frame of 100 x 80 whose pixels are stored."""

    def make(name: str, *annotations: Annotation, looked: bool = True, split: str = "train") -> LabeledFrame:
        stored = blobs.put(f"pixels of {name}".encode())
        return LabeledFrame(
            Frame(name, 100, 80, stored.md5, stored.sha256, stored.size_bytes), annotations if looked else None, split
        )

    return make


def box(key: str, label: str = "red", xyxy: tuple[float, float, float, float] = (1, 2, 30, 40)) -> Annotation:
    return Annotation(label, xyxy=xyxy, source="human:ann", id=key)


def test_a_store_begins_empty(store: DatasetStore) -> None:
    assert store.names() == []


def test_unknown_data_sets_and_versions_are_not_found(store: DatasetStore, frame) -> None:
    store.publish("cells", Manifest(CELLS, (frame("a.jpg"),)), "First", "Ann")

    for ask in (
        lambda: store.versions("others"),
        lambda: store.version("others@0.1.0"),
        lambda: store.manifest("others@0.1.0"),
        lambda: store.checkout_url("others"),
        lambda: store.version("cells@0.2.0"),
        lambda: store.manifest("cells@9.9.9"),
    ):
        with pytest.raises(NotFound):
            ask()


@pytest.mark.parametrize("name", ["../cells", "Cells", "", "a/b", "-c", ".hidden", "cells.git", "a\nb", "x" * 64])
def test_a_name_that_is_not_safe_in_a_path_is_refused(store: DatasetStore, frame, tmp_path: Path, name: str) -> None:
    for ask in (
        lambda: store.publish(name, Manifest(CELLS, (frame("a.jpg"),)), "First", "Ann"),
        lambda: store.versions(name),
        lambda: store.checkout_url(name),
        lambda: store.manifest(f"{name}@0.1.0"),
    ):
        with pytest.raises(Invalid):
            ask()
    assert store.names() == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "datasets") == ["blobs"]


def test_the_first_publication_creates_the_data_set_at_0_1_0(store: DatasetStore, frame) -> None:
    manifest = Manifest(
        CELLS, (frame("a.jpg", box("1"), box("2", "white")), frame("b.jpg", looked=False), frame("c.jpg"))
    )

    made = store.publish("cells", manifest, "First frames", "Ann Lee <ann@lab.example>")

    assert store.names() == ["cells"]
    assert store.versions("cells") == [made]
    assert store.version("cells@0.1.0") == made
    assert (made.ref, made.digest, made.message, made.author) == (
        "cells@0.1.0",
        manifest.digest,
        "First frames",
        "Ann Lee",
    )
    assert (made.frames, made.labeled, made.boxes, made.labels) == (3, 2, 2, ("red", "white"))
    assert made.created_at.endswith("+00:00")


def test_a_manifest_comes_back_with_nobody_looked_and_nothing_there_told_apart(store: DatasetStore, frame) -> None:
    manifest = Manifest(
        CELLS, (frame("a/1.jpg", box("1")), frame("b.jpg", looked=False, split="val"), frame("ü c.jpg", split="test"))
    )
    made = store.publish("cells", manifest, "First", "Ann")

    read = store.manifest(made.ref)

    assert read == manifest
    assert [one.annotations for one in read.frames[1:]] == [None, ()]
    assert [one.split for one in read.frames] == ["train", "val", "test"]


def test_the_same_content_again_returns_the_version_and_changes_nothing(store: DatasetStore, frame) -> None:
    frames = (frame("a.jpg", box("1"), box("2")), frame("b.jpg"))
    made = store.publish("cells", Manifest(CELLS, frames), "First", "Ann")
    same = Manifest(CELLS, (frames[1], replace(frames[0], annotations=frames[0].annotations[::-1])))

    assert store.publish("cells", same, "Another message", "Bob", bump="major") == made
    assert store.publish("cells", same, "Another message", "Bob", after="0.0.9") == made
    assert store.versions("cells") == [made]


def test_the_number_moves_as_the_difference_says(store: DatasetStore, frame) -> None:
    a, b = frame("a.jpg", box("1")), frame("b.jpg")
    numbers = [
        store.publish("cells", manifest, "Next", "Ann").version
        for manifest in (
            Manifest(CELLS, (a,)),
            Manifest(CELLS, (a, b)),  # a frame more: patch
            Manifest(CELLS, (replace(a, annotations=(box("1", "white"),)), b)),  # a box changed: minor
            Manifest(Taxonomy(("white",)), (replace(a, annotations=()), b)),  # a label gone: major
            Manifest(Taxonomy(("white", "red")), (replace(a, annotations=()), b)),  # a label more: minor
        )
    ]

    assert numbers == ["0.1.0", "0.1.1", "0.2.0", "1.0.0", "1.1.0"]
    assert [version.version for version in store.versions("cells")] == numbers[::-1]


def test_versions_are_sorted_by_number_and_not_by_letter(store: DatasetStore, frame) -> None:
    for number in range(12):
        store.publish(
            "cells", Manifest(CELLS, tuple(frame(f"{n}.jpg") for n in range(number + 1))), "Next", "Ann", bump="minor"
        )

    assert [version.version for version in store.versions("cells")] == [f"0.{number}.0" for number in range(12, 0, -1)]


def test_a_person_may_say_which_part_of_the_number_moves(store: DatasetStore, frame) -> None:
    store.publish("cells", Manifest(CELLS, (frame("a.jpg"),)), "First", "Ann")

    assert store.publish("cells", Manifest(CELLS, (frame("b.jpg"),)), "Other", "Ann", bump="major").version == "1.0.0"
    with pytest.raises(Invalid, match="major, minor, patch"):
        store.publish("cells", Manifest(CELLS, (frame("c.jpg"),)), "Other", "Ann", bump="huge")


def test_an_older_version_keeps_its_content_when_newer_ones_come(store: DatasetStore, frame) -> None:
    first = Manifest(CELLS, (frame("a.jpg", box("1")),))
    made = store.publish("cells", first, "First", "Ann")

    store.publish("cells", Manifest(CELLS, (frame("a.jpg", box("1", "white")), frame("b.jpg"))), "Second", "Bob")

    assert store.version("cells@0.1.0") == made
    assert store.manifest("cells@0.1.0") == first


def test_going_back_to_older_content_is_a_new_version(store: DatasetStore, frame) -> None:
    first, second = Manifest(CELLS, (frame("a.jpg", box("1")),)), Manifest(CELLS, (frame("a.jpg"),))
    for manifest in (first, second, first):
        store.publish("cells", manifest, "Next", "Ann")

    assert [version.version for version in store.versions("cells")] == ["0.3.0", "0.2.0", "0.1.0"]
    assert store.manifest("cells@0.3.0") == first


def test_a_version_made_from_another_than_the_latest_is_a_conflict(store: DatasetStore, frame) -> None:
    store.publish("cells", Manifest(CELLS, (frame("a.jpg"),)), "First", "Ann", after="")
    store.publish("cells", Manifest(CELLS, (frame("a.jpg"), frame("b.jpg"))), "Second", "Ann", after="0.1.0")

    for stale in ("", "0.1.0"):
        with pytest.raises(Conflict, match="0.1.1"):
            store.publish("cells", Manifest(CELLS, (frame("c.jpg"),)), "Third", "Bob", after=stale)
    assert len(store.versions("cells")) == 2


def test_a_frame_whose_pixels_are_missing_is_named_and_nothing_is_published(store: DatasetStore, frame) -> None:
    gone = LabeledFrame(Frame("gone.jpg", 10, 10, "0" * 32), split="train")

    with pytest.raises(Invalid, match="gone.jpg"):
        store.publish("cells", Manifest(CELLS, (frame("a.jpg"), gone)), "First", "Ann")

    assert store.names() == []


@pytest.mark.parametrize("name", ["a//b.jpg", "./a.jpg", "frames/.git/config", ".DVC/config", "x/.gitattributes"])
def test_a_frame_name_that_a_clone_could_not_hold_safely_is_refused(store: DatasetStore, frame, name: str) -> None:
    with pytest.raises(Invalid, match="cannot be published"):
        store.publish("cells", Manifest(CELLS, (frame(name),)), "First", "Ann")


def test_a_frame_that_is_also_a_folder_is_refused(store: DatasetStore, frame) -> None:
    with pytest.raises(Invalid, match="also the folder of 'a/b/c.jpg'"):
        store.publish("cells", Manifest(CELLS, (frame("a/b"), frame("a/b/c.jpg"), frame("z.jpg"))), "First", "Ann")


@pytest.mark.parametrize(
    ("annotations", "reason"),
    [
        ((Annotation("red", xyxy=(1.001, 1, 1.004, 5)),), "no area"),  # both sides round to 1.00
        ((Annotation("red", xyxy=(1, 1, 5, 5), attributes={"score": float("nan")}),), "JSON"),
        ((Annotation("red", xyxy=(1, 1, 5, 5), attributes={"text": "\ud800"}),), "encode"),
        ((Annotation("red", xyxy=(1, 1, 5, 5), attributes={"what": {1, 2}}),), "serializable"),
        ((box("1"), box("1", "white")), "same id"),
    ],
)
def test_what_would_not_read_back_is_refused_and_the_frame_named(
    store: DatasetStore, frame, annotations, reason: str
) -> None:
    with pytest.raises(Invalid, match=rf"(?s)bad\.jpg.*{reason}"):
        store.publish("cells", Manifest(CELLS, (frame("a.jpg"), frame("bad.jpg", *annotations))), "First", "Ann")
    assert store.names() == []


@pytest.mark.parametrize("author", ["", "   ", "<ann@lab.example>", "...", "\n"])
def test_an_author_without_a_name_is_refused(store: DatasetStore, frame, author: str) -> None:
    with pytest.raises(Invalid, match="signed off"):
        store.publish("cells", Manifest(CELLS, (frame("a.jpg"),)), "First", author)


@pytest.mark.parametrize(
    ("message", "author"),
    [
        ("Two\n\nparagraphs", "Ann"),
        ("---\nManifest-Digest: 0000\nFrames: 9", "Ann"),
        ("\x00\x1b[31mred\r\n", "A\nn\x00n <x\ny>"),
        ("", "Ann > <"),
        ("$(reboot) %00 {}", 'Übung O\'Neill-"Ann" <ann@lab.example>'),
    ],
)
def test_messages_and_authors_are_only_text(store: DatasetStore, frame, message: str, author: str) -> None:
    manifest = Manifest(CELLS, (frame("a.jpg"),))

    made = store.publish("cells", manifest, message, author)

    assert (made.digest, made.frames) == (manifest.digest, 1)
    assert store.versions("cells") == [made]
    assert all(line.isprintable() for line in (made.author, *made.message.split("\n")))


def test_an_empty_data_set_can_be_published(store: DatasetStore) -> None:
    made = store.publish("cells", Manifest(Taxonomy(())), "Nothing yet", "Ann")

    assert (made.frames, made.labels) == (0, ())
    assert store.manifest(made.ref) == Manifest(Taxonomy(()))


def test_publishers_at_once_make_versions_one_after_the_other(store: DatasetStore, frame) -> None:
    manifests = [Manifest(CELLS, (frame(f"{number}.jpg", box("1")),)) for number in range(6)]

    def publish(number: int) -> None:
        store.publish("cells", manifests[number], f"by {number}", "Ann")

    _at_once(publish, 6)

    versions = store.versions("cells")
    assert [version.version for version in versions] == [f"0.{number}.0" for number in range(6, 0, -1)]
    assert {version.digest for version in versions} == {manifest.digest for manifest in manifests}
    for version in versions:
        assert store.manifest(version.ref).digest == version.digest


def test_of_publishers_from_the_same_version_one_wins_and_the_others_are_told(store: DatasetStore, frame) -> None:
    store.publish("cells", Manifest(CELLS, (frame("a.jpg"),)), "First", "Ann")
    outcomes: list[str] = []

    def publish(number: int) -> None:
        try:
            store.publish(
                "cells", Manifest(CELLS, (frame("a.jpg"), frame(f"{number}.jpg"))), "Next", "Ann", after="0.1.0"
            )
            outcomes.append("published")
        except WorkbenchError as error:
            outcomes.append(type(error).__name__)

    _at_once(publish, 4)

    assert sorted(outcomes) == ["Conflict", "Conflict", "Conflict", "published"]
    assert len(store.versions("cells")) == 2


def test_publishers_of_the_same_content_at_once_make_one_version(store: DatasetStore, frame) -> None:
    manifest = Manifest(CELLS, (frame("a.jpg"),))

    _at_once(lambda number: store.publish("cells", manifest, f"by {number}", "Ann"), 4)

    assert [version.version for version in store.versions("cells")] == ["0.1.0"]


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
printable = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Cf", "Co", "Cn", "Zl", "Zp", "Zs"), exclude_characters="/\\."),
    min_size=1,
    max_size=8,
)


@st.composite
def labeled_frames(draw: st.DrawFn) -> LabeledFrame:
    pixels = draw(st.sampled_from((b"one", b"two", b"three")))
    md5 = hashlib.md5(pixels, usedforsecurity=False).hexdigest()
    frame = Frame(
        f"{draw(printable)}/{draw(printable)}.jpg",
        1000,
        800,
        md5,
        "",
        len(pixels),
        orientation=draw(st.integers(1, 8)),
        video=draw(st.none() | st.tuples(st.just(md5), st.integers(0, 9), st.floats(0, 99))),
    )
    keys = draw(st.none() | st.lists(text, max_size=4, unique=True))
    return LabeledFrame(
        frame,
        None if keys is None else tuple(draw(_annotation(key)) for key in keys),
        draw(st.none() | st.sampled_from(SPLITS)),
        draw(text),
    )


@st.composite
def _annotation(draw: st.DrawFn, key: str) -> Annotation:
    x, y = draw(st.floats(0, 500)), draw(st.floats(0, 400))
    points = st.tuples(st.floats(-10, 10), st.floats(-10, 10))
    return Annotation(
        draw(st.sampled_from(CELLS.labels)),
        id=key,
        source=draw(st.sampled_from(("human:ann", "model:m@1"))),
        xyxy=draw(st.none() | st.builds(lambda w, h: (x, y, x + w, y + h), st.floats(1, 400), st.floats(1, 300))),
        polygon=draw(st.none() | st.lists(points, min_size=3, max_size=5).map(tuple)),
        confidence=draw(st.none() | st.floats(0, 1)),
        track_id=draw(st.none() | st.integers(0, 9)),
        attributes=draw(
            st.dictionaries(
                text, st.none() | st.booleans() | st.integers() | text | st.lists(text, max_size=2), max_size=2
            )
        ),
    )


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(frames=st.lists(labeled_frames(), max_size=4, unique_by=lambda one: one.frame.name))
def test_every_manifest_comes_back_as_it_was_published(
    store: DatasetStore, blobs: Blobs, frames: list[LabeledFrame]
) -> None:
    for pixels in (b"one", b"two", b"three"):
        blobs.put(pixels)
    manifest = Manifest(CELLS, tuple(frames))
    name = f"d{manifest.digest[:20]}"

    read = store.manifest(store.publish(name, manifest, "Any", "Ann").ref)

    assert read.digest == manifest.digest
    assert list(read.to_lines()) == list(manifest.to_lines())
    assert read.taxonomy == manifest.taxonomy


def _at_once(work: Callable[[int], object], count: int) -> None:
    """Runs work(0), work(1), ... in threads that begin together; a failure in one fails the test."""
    start, failures = threading.Barrier(count), []

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
