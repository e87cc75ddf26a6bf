"""The workbench in a browser: `streamlit run app/main.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

PROJECT = Path(__file__).resolve().parent.parent
if str(PROJECT) not in sys.path:
    # Streamlit puts only the script's own folder on the path; the pages import `app` from beside it.
    sys.path.insert(0, str(PROJECT))

from app import session  # noqa: E402

PAGES = {
    "": [("overview", "Overview", "home")],
    "The loop": [
        ("upload", "Upload", "upload"),
        ("annotate", "Annotate", "auto_awesome"),
        ("review", "Review", "fact_check"),
        ("evaluate", "Evaluate", "monitoring"),
        ("versions", "Versions", "commit"),
        ("retrain", "Retrain and promote", "model_training"),
        ("sweeps", "Sweeps", "tune"),
    ],
    "Behind it": [("models", "Models", "deployed_code"), ("jobs", "Jobs", "list_alt"), ("cvat", "CVAT", "hub")],
}

st.set_page_config(page_title="Workbench", page_icon=":material/cycle:", layout="wide", initial_sidebar_state=232)
st.logo(PROJECT / "app" / "logo.svg", size="large")
page = st.navigation(
    {
        section: [
            st.Page(
                PROJECT / "pages" / f"{name}.py",
                title=title,
                icon=f":material/{icon}:",
                url_path=name,
                default=name == "overview",
            )
            for name, title, icon in pages
        ]
        for section, pages in PAGES.items()
    }
)
session.frame()
page.run()
