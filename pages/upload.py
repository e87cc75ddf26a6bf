"""Frames come in: a folder, a zip, or a labelled COCO, YOLO or VOC data set becomes the next version."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import streamlit as st

from app import draw, incoming, session
from workbench.dataset import SPLITS, check_dataset_name, parse_ref
from workbench.errors import Invalid, WorkbenchError
from workbench.jobs import JobStatus

FILES, FOLDER, SERVER = "Files or a zip", "A folder", "A folder on the server"
BY_CONTENT = "by content: 70 % train, 10 % val, 20 % test"
PICTURES = ["zip", "jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff"]
THUMBNAILS = 8


def source_of(choice: str) -> Path | None:
    """Where the chosen frames lie on this machine; None while nothing is chosen. Raises Invalid."""
    if choice == SERVER:
        text = st.session_state.get("upload_path", "").strip()
        if not text:
            return None
        path = Path(text).expanduser()
        if not path.is_absolute() or not path.exists():
            raise Invalid(f"{text} is not on the server. Give the full path of a folder or a zip there.")
        return path
    files = st.session_state.get("upload_files" if choice == FILES else "upload_folder")
    if not files:
        return None
    with st.spinner("Keeping the files …"):
        return incoming.save(files, session.workbench().config.home / "incoming")


def form(names: list[str]) -> None:
    left, right = st.columns([2, 3], gap="large")
    with left:
        remembered = st.session_state.get("chosen_dataset")
        name = st.selectbox(
            "Data set",
            names,
            index=names.index(remembered) if remembered in names else 0 if names else None,
            accept_new_options=True,
            placeholder="Type a name, for example street-signs",
            key="upload_name",
            help="Pick one to add frames to it, or type the name of a new one.",
        )
        splits = st.selectbox(
            "Split",
            [BY_CONTENT, *SPLITS],
            key="upload_split",
            help="A data set that brings its own train, val and test lists keeps them.",
        )
        st.caption("The same picture never changes its split, so test stays untouched.")
    with right:
        choice = st.segmented_control("From", [FILES, FOLDER, SERVER], default=FILES, key="upload_from", required=True)
        if choice == FILES:
            st.file_uploader(
                "Photographs, or one zip",
                type=PICTURES,
                accept_multiple_files=True,
                key="upload_files",
                label_visibility="collapsed",
            )
        elif choice == FOLDER:
            st.file_uploader(
                "A folder of photographs or a labelled data set",
                accept_multiple_files="directory",
                key="upload_folder",
                label_visibility="collapsed",
            )
        else:
            st.text_input(
                "Path on the server",
                key="upload_path",
                placeholder="/data/frames",
                icon=":material/folder:",
                help="A folder or a zip that this machine can read; nothing is copied over the network.",
            )
    if st.button("Start the upload", type="primary", icon=":material/upload:", key="upload_go"):
        try:
            name = check_dataset_name(name or "")
            source = source_of(choice)
            if source is None:
                st.info("Choose files, or give a folder first.", icon=":material/info:")
            elif session.submit(
                "upload", {"dataset": name, "source": str(source), "split": None if splits == BY_CONTENT else splits}
            ):
                st.session_state["chosen_dataset"] = name
                st.rerun()
        except WorkbenchError as failure:
            session.error(failure)


def outcome(job: JobStatus) -> None:
    """What became of the files: the version, counts, what was refused or changed and why, and a look at the frames."""
    result = job.result or {}
    version = str(result.get("version", ""))
    shown = [
        ("version", version.partition("@")[2] or "–"),
        ("new frames", result.get("added", 0)),
        ("boxes", result.get("boxes", 0)),
        ("labels", len(result.get("labels", ()))),
        ("there already", result.get("duplicates_count", 0)),
        ("refused", result.get("refused_count", 0)),
    ]
    for column, (name, value) in zip(st.columns(len(shown)), shown):
        column.metric(name, str(value))
    told = [
        {"file": file, "what": what, "reason": reason if what != "there already" else f"the same picture as {reason}"}
        for what, found in (
            ("refused", result.get("refused")),
            ("labels left out", result.get("conflicts")),
            ("changed", result.get("warnings")),
            ("there already", result.get("duplicates")),
        )
        for file, reason in (found or {}).items()
    ]
    if told:
        refused = result.get("refused_count", 0)
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            st.markdown(
                f":material/warning: **{refused} {'files were' if refused != 1 else 'file was'} refused**, the others "
                "went on."
                if refused
                else ":material/info: **Every picture was taken.** Some need a word:"
            )
            st.download_button(
                "Download as CSV",
                as_csv(told),
                f"{session.dataset_of(job)}-files.csv",
                "text/csv",
                icon=":material/download:",
                on_click="ignore",
            )
        st.dataframe(
            told,
            hide_index=True,
            height="auto" if len(told) <= THUMBNAILS else 250,
            column_config={"reason": st.column_config.TextColumn(width="large")},
        )
    if version:
        thumbnails(version)
    with st.container(horizontal=True):
        session.link("annotate", "Let a model draw boxes", "auto_awesome")
        session.link("review", "Review frames", "fact_check")
        session.link("versions", "See the version", "commit")


def as_csv(told: list[dict[str, str]]) -> str:
    """file, what, reason; a cell that a spreadsheet would take for a formula is quoted, for names come from outside."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["file", "what", "reason"])
    rows.writerows(
        [[f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t") else cell for cell in row.values()] for row in told]
    )
    return text.getvalue()


def thumbnails(ref: str) -> None:
    """Frames that the version before did not have; those with the most boxes first."""
    store = session.workbench().datasets
    manifest = store.manifest(ref)
    versions = [one.ref for one in store.versions(parse_ref(ref)[0])]
    before = versions[versions.index(ref) + 1 :][:1] if ref in versions else []
    known = store.manifest(before[0]).by_name if before else {}
    added = [one for one in manifest.frames if one.frame.name not in known]
    shown = sorted(added, key=lambda one: -len(one.annotations or ()))[:THUMBNAILS]
    if shown:
        st.markdown(f"**{len(shown)} of {len(added)} new frames**")
        draw.gallery([draw.of_labeled(one.frame, one.annotations) for one in shown], manifest.taxonomy.labels)
        draw.legend(manifest.taxonomy.labels)


session.header(
    "Upload",
    "Photographs, or a labelled COCO, YOLO or VOC data set. Broken files are listed; the good ones go on.",
    with_dataset=False,
)
with session.explained():
    form(session.workbench().datasets.names())
    running = session.active_jobs("upload")
    incoming.sweep(session.workbench().config.home / "incoming", [str(job.args.get("source", "")) for job in running])
    job = session.watched("upload")
    if job:
        st.divider()
        session.job_panel(job)
        if job.state == "done":
            outcome(job)
