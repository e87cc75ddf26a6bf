"""How to connect a CVAT server, and whether the one in the settings answers."""

from __future__ import annotations

from urllib.parse import urlsplit

import requests
import streamlit as st

from app import session
from workbench.errors import Invalid, Unavailable, WorkbenchError

TIMEOUT_S = 5


def about(address: str) -> str:
    """The version a CVAT server says it has. Raises Invalid for no web address, Unavailable when no CVAT answers.

    Private and loopback addresses are fine: that is where a team's CVAT stands. No token is sent and no redirect is
    followed, so the address typed here learns nothing.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Invalid(f"{address!r} is not a web address. Write it like http://cvat.example:8080.")
    where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    try:
        answer = requests.get(
            f"{where}{parts.path.rstrip('/')}/api/server/about",
            timeout=TIMEOUT_S,
            allow_redirects=False,
            headers={"Accept": "application/vnd.cvat+json"},
        )
    except (requests.RequestException, ValueError) as failure:
        raise Unavailable(
            f"Nothing answers at {where} ({type(failure).__name__}). Check that CVAT is started and that this "
            "machine reaches it."
        ) from failure
    try:
        said = answer.json()
        return str(said["version"])[:40]
    except (ValueError, KeyError, TypeError) as failure:
        raise Unavailable(
            f"{where} answers with status {answer.status_code}, but not as CVAT does. Give the address of its "
            "first page, without a path."
        ) from failure


session.header("CVAT", "Connect your team's annotation server.", with_dataset=False)
config = session.workbench().config
left, right = st.columns([3, 2], gap="large")
with left:
    st.subheader("Does it answer?", anchor=False)
    with st.form("cvat_check", border=True):
        address = st.text_input(
            "Address of CVAT", value=config.cvat_url, placeholder="http://cvat.example:8080", max_chars=300
        )
        is_asked = st.form_submit_button("Check the connection", type="primary", icon=":material/cable:")
    if is_asked and not address.strip():
        st.info("Type the address that opens CVAT in your browser.", icon=":material/info:")
    elif is_asked:
        try:
            with st.spinner("Asking CVAT …"):
                version = about(address.strip())
            st.success(f"CVAT {session.literal(version)} answers.", icon=":material/check_circle:")
        except WorkbenchError as failure:
            session.error(failure)
    st.subheader("Keep it in the settings", anchor=False)
    st.write(
        "Write the address and a token into the settings file, then start the workbench again. The token is made in CVAT "
        "under *Profile → Security → Access tokens*, with read and write access."
    )
    st.code(
        f'# {config.home / "settings.toml"}\ncvat_url = "http://cvat.example:8080"\ncvat_token = "…"', language="toml"
    )
    st.caption(
        "The environment variables WORKBENCH_CVAT_URL and WORKBENCH_CVAT_TOKEN do the same. The token never leaves the "
        "settings: no page, log or message shows it."
    )
with right:
    st.subheader("Now", anchor=False)
    with st.container(border=True):
        for name, is_set in (("cvat_url", bool(config.cvat_url)), ("cvat_token", bool(config.cvat_token))):
            with st.container(horizontal=True, vertical_alignment="center"):
                st.badge("set" if is_set else "not set", color="green" if is_set else "gray")
                st.markdown(f"`{name}`")
    st.subheader("What a connection gives", anchor=False)
    st.markdown(
        "- **Today**: this page checks that CVAT can be reached. Frames are reviewed in the workbench itself, on the "
        "Review page.\n- **Later**: data sets become CVAT tasks and come back as versions, and deployed models appear in "
        "CVAT's own *AI tools*. Nothing of this is switched on yet, so there is no button for it here."
    )
    session.link("review", "Review frames here", "fact_check")
