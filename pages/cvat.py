"""CVAT: whether it answers, and the models that its people find among their AI tools."""

from __future__ import annotations

import streamlit as st

from app import cvat_tools, cvat_work, session
from workbench.config import Config
from workbench.errors import WorkbenchError


def connect(config: Config) -> None:
    """An address is asked, and where the settings are kept."""
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
                version = session.workbench().cvat_version_at(address.strip())
            st.success(f"CVAT {session.literal(version)} answers.", icon=":material/check_circle:")
        except WorkbenchError as failure:
            session.error(failure)
    st.write(
        "Write the address and a token into the settings file, then start the workbench again. The token is made in "
        "CVAT under *Profile → Security → Access tokens*, with read and write access."
    )
    st.code(
        f'# {config.home / "settings.toml"}\ncvat_url = "http://cvat.example:8080"\ncvat_token = "…"', language="toml"
    )
    st.caption(
        "The environment variables WORKBENCH_CVAT_URL and WORKBENCH_CVAT_TOKEN do the same. The token never leaves the "
        "settings: no page, log or message shows it."
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        for name, is_set in (("cvat_url", bool(config.cvat_url)), ("cvat_token", bool(config.cvat_token))):
            st.badge("set" if is_set else "not set", color="green" if is_set else "gray")
            st.markdown(f"`{name}`")


session.header("CVAT", "Your team's annotation server, and the models in its AI tools.", with_dataset=False)
settings = session.workbench().config
if settings.cvat_url and settings.cvat_token:
    checks = cvat_tools.standing()
    st.subheader("Deploy a model", anchor=False)
    cvat_tools.deploy()
    st.subheader("Deployed to CVAT", anchor=False)
    served = cvat_tools.deployed(checks)
    st.subheader("Try it on one frame", anchor=False)
    cvat_tools.try_one(served)
    cvat_work.section()
    with st.expander("The connection", icon=":material/cable:"):
        connect(settings)
else:
    left, right = st.columns([3, 2], gap="large")
    with left:
        st.subheader("Does it answer?", anchor=False)
        connect(settings)
    with right:
        st.subheader("What a connection gives", anchor=False)
        st.markdown(
            "- Data sets become CVAT tasks and come back as versions.\n- Models that are deployed here appear in "
            "CVAT's own *AI tools* and *Automatic annotation*: no Nuclio, no docker build, no script."
        )
        session.link("review", "Review frames here", "fact_check")
