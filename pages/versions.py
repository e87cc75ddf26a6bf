"""Published versions: what each holds, what changed between two, and the next one."""

from __future__ import annotations

import shlex

import streamlit as st

from app import draw, session, times
from workbench.dataset import DatasetVersion, Diff, diff, parse_ref
from workbench.errors import WorkbenchError
from workbench.formats.dataset_readme import readme
from workbench.steps.version import pending

BUMPS = {"as the changes say": None, "patch": "patch", "minor": "minor", "major": "major"}
CHANGED_SHOWN = 6


def publish(dataset: str) -> None:
    """What is waiting in the working copy, and the button that publishes it."""
    wb = session.workbench()
    job = session.watched("version", dataset)
    with st.container(border=True):
        st.markdown(":material/publish: **Publish the next version**")
        try:
            waiting = pending(dataset, server=wb.server, store=wb.datasets)
        except WorkbenchError as failure:
            session.error(failure)
            return
        number = len(waiting.frames)
        st.markdown(
            f"**{number} accepted frame{'' if number == 1 else 's'}** with labels that no version has yet."
            if number
            else "No newly accepted frame waits. Labels changed on published frames are found by publishing."
        )
        with st.form("publish", border=False, clear_on_submit=True):
            text, bumps, button = st.columns([5, 2, 1], vertical_alignment="bottom")
            message = text.text_input("Message", placeholder="What this version adds, in one sentence", max_chars=300)
            bump = bumps.selectbox(
                "Version number",
                list(BUMPS),
                help="By itself: labels gone moves major, labels or boxes "
                "moved minor, new frames patch. The same content again is no new version.",
            )
            is_asked = button.form_submit_button("Publish", type="primary" if number else "secondary")
        if is_asked and not message.strip():
            st.warning("Say in one sentence what this version adds.", icon=":material/edit:")
        elif is_asked and session.submit(
            "version", {"dataset": dataset, "message": message.strip(), "bump": BUMPS[bump]}
        ):
            # The new version is what the next step works on.
            st.session_state.pop("chosen_version", None)
            st.rerun()
        if job and (not job.is_over or job.state != "done"):
            session.job_panel(job)
        elif job:
            st.success(f"{job.result.get('version', 'The version')} is published.", icon=":material/check_circle:")


def in_words(changes: Diff) -> str:
    """`3 frames added, 14 boxes changed`."""
    said = [
        f"{len(found)} {name}"
        for name, found in (
            ("frames added", changes.frames_added),
            ("frames removed", changes.frames_removed),
            ("frames with other labels", changes.frames_relabeled),
            ("boxes added", changes.boxes_added),
            ("boxes removed", changes.boxes_removed),
            ("boxes changed", changes.boxes_changed),
        )
        if found
    ]
    said += [f"labels added: {', '.join(changes.labels_added)}"] if changes.labels_added else []
    said += [f"labels removed: {', '.join(changes.labels_removed)}"] if changes.labels_removed else []
    return ", ".join(said) or "no difference"


def listing(versions: list[DatasetVersion]) -> None:
    st.dataframe(
        [
            {
                "version": one.version,
                "frames": one.frames,
                "labelled": one.labeled,
                "boxes": one.boxes,
                "message": one.message,
                "author": one.author,
                "published": times.clock(one.created_at),
                "digest": one.digest[:12],
            }
            for one in versions
        ],
        hide_index=True,
        column_config={"message": st.column_config.TextColumn(width="large")},
    )


def compare(versions: list[DatasetVersion]) -> None:
    """Two versions side by side: counts of what changed, then the changed frames before and after."""
    if len(versions) < 2:
        st.caption("With a second version, this shows what changed from one to the other, frame by frame.")
        return
    by_ref = {one.ref: one for one in versions}
    left, right = st.columns(2)
    newer = right.selectbox("After", list(by_ref), key="diff_after", format_func=lambda ref: parse_ref(ref)[1])
    others = [ref for ref in by_ref if ref != newer]
    older_ones = [one.ref for one in versions[versions.index(by_ref[newer]) + 1 :]]
    older = left.selectbox(
        "Before",
        others,
        key="diff_before",
        format_func=lambda ref: parse_ref(ref)[1],
        index=others.index(older_ones[0]) if older_ones else 0,
    )
    store = session.workbench().datasets
    before, after = store.manifest(older), store.manifest(newer)
    changes = diff(before, after)
    if changes.is_empty:
        st.caption("The two hold the same.")
        return
    for column, (name, found) in zip(
        st.columns(6),
        (
            ("frames added", changes.frames_added),
            ("frames removed", changes.frames_removed),
            ("frames changed", changes.frames_relabeled),
            ("boxes added", changes.boxes_added),
            ("boxes removed", changes.boxes_removed),
            ("boxes changed", changes.boxes_changed),
        ),
    ):
        column.metric(name, len(found))
    if changes.labels_added or changes.labels_removed:
        st.markdown(
            session.literal(in_words(Diff((), (), (), (), (), (), changes.labels_added, changes.labels_removed)))
        )
    labels = after.taxonomy.labels
    names = [*changes.frames_relabeled, *changes.frames_added][:CHANGED_SHOWN]
    for name in names:
        left, right = st.columns(2)
        was, now = before.by_name.get(name), after.by_name[name]
        with left:
            if was:
                draw.gallery([draw.of_labeled(was.frame, was.annotations)], labels, 1, 640)
        with right:
            draw.gallery([draw.of_labeled(now.frame, now.annotations, "" if was else f"{name} · new")], labels, 1, 640)
    rest = len(changes.frames_relabeled) + len(changes.frames_added) - len(names)
    draw.legend(labels)
    if rest > 0:
        st.caption(f"and {rest} more changed or added frames.")
    if changes.frames_removed:
        with st.expander(f"{len(changes.frames_removed)} frames removed"):
            st.dataframe([{"frame": name} for name in changes.frames_removed], hide_index=True)


def about(version: DatasetVersion, versions: list[DatasetVersion]) -> None:
    """The version's README with its frames, and the commands that fetch it."""
    store = session.workbench().datasets
    manifest = store.manifest(version.ref)
    place = versions.index(version) + 1
    previous = versions[place] if place < len(versions) else None
    url = store.checkout_url(version.dataset)
    st.markdown("**Get it**")
    folder = shlex.quote(version.dataset)
    st.code(
        f"git clone {shlex.quote(url)} {folder}\ncd {folder}\ngit checkout v{version.version}\ndvc pull",
        language="bash",
    )
    with st.container(border=True):
        text = readme(
            version.dataset,
            version.version,
            manifest,
            message=version.message,
            author=version.author,
            url=url,
            previous=previous.version if previous else None,
            changed=diff(store.manifest(previous.ref), manifest) if previous else None,
        )
        st.markdown(text)
    drawn = [one for one in manifest.labeled if one.annotations][:8]
    draw.gallery([draw.of_labeled(one.frame, one.annotations) for one in drawn], manifest.taxonomy.labels)


dataset = session.header(
    "Versions", "Published labels never change; each version is a tag in the data set's git repository."
)
if dataset is None:
    session.empty("No data set yet. The first upload publishes version 0.1.0.", "upload", "Upload frames", "upload")
else:
    publish(dataset)
    with session.explained():
        versions = session.workbench().datasets.versions(dataset)
        if not versions:
            session.empty("This data set has no version yet.", "upload", "Upload frames", "upload")
        else:
            listing(versions)
            differences, one = st.tabs(
                [":material/difference: What changed", ":material/description: README and download"]
            )
            with differences:
                compare(versions)
            with one:
                ref = session.version_picker(dataset)
                about(next(version for version in versions if version.ref == ref), versions)
