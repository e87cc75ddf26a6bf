"""Every page on a workbench with nothing in it, and with its parts down: a sentence and a way on, never a trace."""

from __future__ import annotations

import pytest
from streamlit.testing.v1 import AppTest

from workbench.wiring import Workbench

PAGES = ("overview", "upload", "annotate", "review", "evaluate", "versions", "retrain", "sweeps", "models", "jobs",
         "cvat")


def texts(at: AppTest) -> str:
    """Everything a visitor can read, without Markdown's escapes."""
    elements = [*at.markdown, *at.caption, *at.warning, *at.error, *at.info, *at.success, *at.title, *at.subheader]
    return "\n".join(str(element.value) for element in elements).replace("\\", "")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_on_an_empty_workbench(empty: Workbench, visit, page: str) -> None:
    at = visit(page)
    assert len(at.title) == 1
    assert not at.error


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_while_mongod_and_mlflow_are_down(partless: Workbench, visit, page: str) -> None:
    at = visit(page, dataset="shapes")
    assert len(at.title) == 1


def test_the_first_visit_offers_two_ways_to_begin(empty: Workbench, visit) -> None:
    at = visit("overview")
    assert "Begin with frames" in texts(at)
    assert [button.label for button in at.button] == ["Make the quick-start data set"]


def test_the_quick_start_button_makes_the_data_and_one_upload_job(empty: Workbench, visit, monkeypatch) -> None:
    from workbench import quickstart

    monkeypatch.setattr(quickstart, "generate", lambda folder, **sizes: folder)  # drawing 300 frames is tested with it
    at = visit("overview")
    at.button[0].click().run()
    (job,) = empty.jobs.list()
    assert (job.kind, job.args["dataset"], job.args["source"]) == (
        "upload",
        "digits",
        str(empty.config.home / "quickstart"),
    )
    assert "upload" in texts(at)


def test_the_overview_says_which_part_is_down_and_still_shows_the_next_thing(partless: Workbench, visit) -> None:
    at = visit("overview", dataset="shapes")
    said = " ".join(warning.value.replace("\\", "") for warning in at.warning)
    assert "MLflow" in said and "database" in said
    assert "Next:" in texts(at)


@pytest.mark.parametrize("page", ["annotate", "versions"])
def test_a_page_that_needs_mongod_tells_it_in_a_sentence(partless: Workbench, visit, page: str) -> None:
    at = visit(page, dataset="shapes")
    assert at.warning and not at.error


@pytest.mark.parametrize("page", ["evaluate", "retrain", "models"])
def test_a_page_that_needs_mlflow_shows_the_rest_without_it(partless: Workbench, visit, page: str) -> None:
    at = visit(page, dataset="shapes")
    assert not at.error
    assert "shapes-detector@1" in texts(at) + str([box.options for box in at.selectbox]) + str(
        [str(frame.value) for frame in at.dataframe]
    )


def test_no_page_shows_a_secret(empty: Workbench, visit, monkeypatch) -> None:
    monkeypatch.setenv("WORKBENCH_CVAT_TOKEN", "s3cret-token")
    monkeypatch.setenv("WORKBENCH_CVAT_URL", "http://127.0.0.1:9")
    at = visit("cvat")
    assert "s3cret-token" not in str(at)
    assert texts(at).count(":green-badge[set]") == 2
