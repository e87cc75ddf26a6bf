"""The whole loop in a real browser, against the real parts."""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests"), str(PROJECT / "tests" / "pages")]

from filled import tiny_detector  # noqa: E402
from parts_mongo import free_port  # noqa: E402
from workbench import quickstart  # noqa: E402
from workbench.config import Config  # noqa: E402
from workbench.supervise import Supervisor  # noqa: E402
from workbench.wiring import Workbench  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SHORT_MS, JOB_MS, TRAINING_MS = 60_000, 120_000, 360_000
DIGITS = tuple("0123456789")


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    """The settings of a workbench of its own that is up."""
    ports = {
        f"WORKBENCH_{name.upper()}_PORT": str(free_port()) for name in ("ui", "service", "mlflow", "fiftyone", "mongo")
    }
    config = Config.read(tmp_path / "home", environ={**ports, "WORKBENCH_THREADS": "2", "WORKBENCH_PERSON": "anna"})
    with Supervisor(
        config, parts=("mongod", "ui", "worker", "mlflow", "fiftyone"), on_line=lambda line: None
    ) as supervisor:
        supervisor.wait_ready(("mongod", "ui", "worker", "mlflow"), timeout_s=180)
        yield config


@pytest.fixture
def browser(config: Config):
    if not Path(CHROMIUM).exists():
        pytest.fail(f"{CHROMIUM} is not there; install the package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Visitor:
    """Somebody in front of the pages, in a session of their own."""

    def __init__(self, browser, config: Config) -> None:
        self.page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        self.page.set_default_timeout(SHORT_MS)
        self._address, self._shots = config.ui, os.environ.get("WORKBENCH_SCREENSHOTS")

    def open(self, path: str) -> None:
        self.page.goto(f"{self._address}/{path}", wait_until="domcontentloaded")
        self.settle()

    def go(self, name: str, title: str | None = None) -> None:
        """By the sidebar, as people do."""
        self.page.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True).click()
        self.page.get_by_role("heading", name=title or name, level=1).wait_for()
        self.settle()

    def settle(self) -> None:
        self.page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()

    def press(self, key: str) -> None:
        # While a page is drawn anew, what it showed before may still stand beside it.
        self.settle()
        self.page.locator(f".st-key-{key} button:not([disabled])").first.click()

    def see(self, text: str | re.Pattern, timeout: int = SHORT_MS) -> None:
        """Waits for a text; fails early, with what the page says, when an error stands there instead."""
        from playwright.sync_api import TimeoutError

        wanted, wrong = (
            self.page.get_by_text(text).first,
            self.page.locator("[data-testid=stException], [data-testid=stAlertContentError]"),
        )
        try:
            wanted.or_(wrong.first).first.wait_for(timeout=timeout)
        except TimeoutError as late:
            pytest.fail(f"{late.message}\nthe page says:\n{self.page.get_by_test_id('stMain').inner_text()}")
        assert wanted.is_visible(), f"expected {text!r}, the page says: {wrong.all_inner_texts()}"

    def shoot(self, name: str) -> None:
        if self._shots:
            self.settle()
            self.page.wait_for_timeout(1500)
            height = self.page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
            self.page.set_viewport_size({"width": 1280, "height": max(900, min(int(height), 3500))})
            self.page.wait_for_timeout(700)
            self.page.screenshot(path=f"{self._shots}/{name}.png")
            self.page.set_viewport_size({"width": 1280, "height": 1000})


def zipped(folder: Path) -> Path:
    """A small quick-start data set as a person would send it."""
    made = quickstart.generate(folder / "digits", train=24, val=6, test=8, unlabeled=8)
    with zipfile.ZipFile(folder / "digits.zip", "w") as archive:
        for file in sorted(made.rglob("*")):
            if file.is_file() and not file.name.startswith(".") and file.name != "truth.json":
                archive.write(file, file.relative_to(made))
    return folder / "digits.zip"


def jobs(workbench: Workbench, kind: str) -> list:
    return workbench.jobs.list(limit=50, kind=kind)


def test_the_loop_turns_once_in_a_browser(config: Config, browser, tmp_path: Path) -> None:
    workbench, anna = Workbench(config), Visitor(browser, config)
    page = anna.page

    anna.open("")
    anna.see("Begin with frames")
    anna.shoot("01-overview-empty")

    anna.go("Upload")
    name = page.locator(".st-key-upload_name input")
    name.fill("digits")
    name.press("Enter")
    page.locator(".st-key-upload_files input[type=file]").set_input_files(zipped(tmp_path))
    anna.see("digits.zip")
    anna.press("upload_go")
    anna.see("new frames", JOB_MS)
    anna.shoot("02-upload-done")
    version = workbench.datasets.versions("digits")[0]
    assert (version.version, version.frames, version.labeled) == ("0.1.0", 38, 30)

    anna.go("Models")
    page.locator(".st-key-register_files input[type=file]").set_input_files(
        tiny_detector(tmp_path / "onnx", labels=len(DIGITS))
    )
    page.get_by_label("Name", exact=True).fill("tiny-yolox")
    labels = page.locator(".st-key-register_labels textarea")
    labels.fill("\n".join(DIGITS))
    labels.press("Tab")
    anna.settle()
    anna.press("register_go")
    anna.see(re.compile("tiny-yolox@1 is registered"))
    anna.shoot("03-models")

    anna.go("Annotate")
    anna.see("10 match by name:")
    anna.press("annotate_preview")
    anna.see(re.compile(r"\.jpg · \d+ boxes"), JOB_MS)
    anna.shoot("04-annotate-preview")
    page.locator(".st-key-annotate_go button:not([disabled])").dblclick()
    anna.see("Review what it drew", JOB_MS)
    anna.shoot("05-annotate-done")
    (annotated,) = jobs(workbench, "annotate")
    assert annotated.result["frames"] == 8 and annotated.result["boxes"] > 0, "a double click is one job"

    anna.go("Review")
    anna.see("30 of 38 frames reviewed")
    anna.shoot("06-review")
    page.get_by_role("button", name=re.compile("^Accept")).click()
    anna.see("31 of 38 frames reviewed")

    anna.go("Versions")
    anna.see("1 accepted frame")
    anna.settle()
    page.get_by_label("Message").fill("One frame reviewed")
    page.get_by_role("button", name="Publish", exact=True).click()
    anna.see("digits@0.2.0 is published.", JOB_MS)
    anna.shoot("07-versions")
    assert workbench.datasets.versions("digits")[0].labeled == 31

    anna.go("Evaluate")
    anna.press("evaluate_go")
    anna.see("tiny-yolox@1 on digits@0.2.0, test", JOB_MS)
    anna.see("frames are without a mistake")
    anna.shoot("08-evaluate")

    anna.go("Retrain and promote")
    for label, value in (("epochs", "1"), ("long_side", "128"), ("threads", "2")):
        field = page.get_by_label(label, exact=True)
        field.fill(value)
        field.press("Enter")
        anna.settle()
    anna.press("retrain_go")
    anna.see("Cancel")
    # A second visitor, with nothing but the address, sees the same training; the first one may leave.
    ben = Visitor(browser, config)
    ben.open("retrain?dataset=digits")
    ben.see("Cancel", JOB_MS)
    page.close()
    ben.see("digits-detector@1 is registered", TRAINING_MS)
    ben.shoot("09-retrained")
    (trained,) = jobs(workbench, "retrain")
    assert trained.args["params"] == {"epochs": 1, "long_side": 128, "threads": 2}

    ben.press("promote_go")
    ben.see("challenger mAP@[.5:.95]", JOB_MS)
    ben.shoot("10-promoted")
    (decision,) = workbench.records.entries("promotions", "digits")
    assert decision.subject == "digits-detector@1" and decision.person == "anna"

    # After one epoch a student may find nothing and stay out; a person can still make it the annotator.
    ben.open("models?dataset=digits&model=digits-detector@1")
    ben.see("Deploy for digits")
    ben.press("deploy_model")
    ben.page.locator(".st-key-deploy_model").wait_for(state="detached", timeout=JOB_MS)
    assert workbench.records.deployed("digits") == "digits-detector@1"

    ben.go("Overview")
    station = ben.page.locator(".loop a.station", has_text="deploy").last
    station.get_by_text("digits-detector@1").wait_for()
    ben.shoot("11-overview")
    station.click()
    ben.page.get_by_role("heading", name="Models", level=1).wait_for()
    ben.go("Jobs")
    ben.see(re.compile("7 of 7 jobs"))
    ben.shoot("12-jobs")
    assert {job.state for job in workbench.jobs.list()} == {"done"}
