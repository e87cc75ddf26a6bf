"""Review in a real browser: draw and move boxes in FiftyOne's annotation in the page, accept, reject, undo by key."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

PROJECT = Path(__file__).resolve().parent.parent.parent
if str(PROJECT / "tests") not in sys.path:
    sys.path.insert(0, str(PROJECT / "tests"))

from parts_mongo import fiftyone_app, free_port, mongod, running  # noqa: E402
from workbench.annotation import Annotation, machine_annotation_id  # noqa: E402
from workbench.config import Config  # noqa: E402
from workbench.dataset import Frame, LabeledFrame, Manifest  # noqa: E402
from workbench.run import WorkingFrame, propose, touch  # noqa: E402
from workbench.taxonomy import Taxonomy  # noqa: E402
from workbench.wiring import Workbench  # noqa: E402

WIDTH, HEIGHT = 640, 480
NAMES = ("a.png", "b.png", "c.png")
MACHINE = {"disc": (80.0, 80.0, 220.0, 220.0), "bar": (400.0, 100.0, 560.0, 180.0)}
DRAWN = (300.0, 300.0, 420.0, 430.0)
PAGE_S = 120  # the first page imports FiftyOne; the app loads 10 MB of script; the machine may be busy
BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]


@dataclass
class Site:
    url: str
    workbench: Workbench

    def read(self, name: str) -> WorkingFrame:
        return self.workbench.server.read("shapes", [name])[name]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("review")
    home, port = folder / "home", free_port()
    home.mkdir()
    with mongod(folder / "mongo") as mongo, fiftyone_app(mongo, folder) as app:
        (home / "settings.toml").write_text(
            f'mongo_url = "{mongo}"\nperson = "ann"\nfiftyone_port = {app.rsplit(":", 1)[1]}\n')
        workbench = Workbench(Config.read(home, environ={}))
        fill(workbench)
        command = [sys.executable, "-m", "streamlit", "run", str(PROJECT / "app" / "main.py"), "--server.port",
                   str(port), "--server.address", "127.0.0.1", "--server.headless", "true",
                   "--browser.gatherUsageStats", "false"]
        environment = {**os.environ, "WORKBENCH_HOME": str(home)}
        with running(command, folder / "streamlit.log", f"http://127.0.0.1:{port}/_stcore/health", environment):
            yield Site(f"http://127.0.0.1:{port}", workbench)


def fill(workbench: Workbench) -> None:
    """Three frames; a machine drew a disc and a bar on each, both a little wrong."""
    frames = []
    for index, name in enumerate(NAMES):
        image = Image.new("RGB", (WIDTH, HEIGHT), (225, 222 - 8 * index, 210))
        pen = ImageDraw.Draw(image)
        pen.ellipse(MACHINE["disc"], fill=(40, 90, 160))
        pen.rectangle(MACHINE["bar"], fill=(170, 60, 40))
        pen.ellipse(DRAWN, fill=(60, 140, 80))
        file = io.BytesIO()
        image.save(file, "PNG")
        made = workbench.blobs.put(file.getvalue())
        frames.append(LabeledFrame(Frame(name, WIDTH, HEIGHT, made.md5, made.sha256, made.size_bytes), None, "train"))
    taxonomy = Taxonomy(("disc", "bar"))
    workbench.datasets.publish("shapes", Manifest(taxonomy, tuple(frames)), "First upload", "ann")
    workbench.server.open_task("shapes", taxonomy)
    workbench.server.add_frames("shapes", [(one, workbench.blobs.path(one.frame.blob)) for one in frames])
    drawn = [propose(working, "r1", "model:m@1", tuple(
        Annotation(label, xyxy, source="model:m@1", confidence=0.8, id=machine_annotation_id("r1", name, index))
        for index, (label, xyxy) in enumerate(MACHINE.items())))
        for name, working in workbench.server.read("shapes", NAMES).items()]
    assert workbench.server.write("shapes", drawn) == []


def until(claim: Callable[[], bool], what: str, seconds: float = PAGE_S) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.3)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_person_draws_moves_accepts_rejects_and_undoes_in_the_browser(site: Site, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright
    screenshots = Path(os.environ.get("WORKBENCH_SCREENSHOTS") or tmp_path)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=BROWSER)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PAGE_S * 1000)
        page.goto(f"{site.url}/review?dataset=shapes")
        page.get_by_text("0 of 3 frames reviewed").wait_for()
        app = page.frame_locator("iframe").first
        app.get_by_text("Annotate", exact=True).click()
        app.locator("[data-cy=detection-mode]").click()
        canvas = app.locator("[data-cy=lighter-sample-renderer-canvas]")
        page.wait_for_timeout(2000)
        page.screenshot(path=screenshots / "review-1-open.png")

        # The picture lies in the middle of the canvas, as large as fits.
        area = canvas.bounding_box()
        scale = min(area["width"] / WIDTH, area["height"] / HEIGHT)
        left, top = area["x"] + (area["width"] - WIDTH * scale) / 2, area["y"] + (area["height"] - HEIGHT * scale) / 2

        def drag(start: tuple[float, float], end: tuple[float, float]) -> None:
            page.mouse.move(left + start[0] * scale, top + start[1] * scale)
            page.mouse.down()
            page.mouse.move(left + (start[0] + end[0]) / 2 * scale, top + (start[1] + end[1]) / 2 * scale, steps=5)
            page.mouse.move(left + end[0] * scale, top + end[1] * scale, steps=5)
            page.mouse.up()

        drag(DRAWN[:2], DRAWN[2:])
        until(lambda: len(site.read("a.png").annotations) == 3, "saving the drawn box")
        app.get_by_text("disc", exact=True).last.click()  # the radio button in the panel of the box just drawn
        until(lambda: site.read("a.png").annotations[-1].label == "disc", "saving the label")
        page.screenshot(path=screenshots / "review-2-drawn.png")
        app.locator("[data-cy=annotate-edit-back]").click()
        app.locator("[data-cy=select-action]").click()
        page.wait_for_timeout(500)
        drag((480, 140), (500, 200))  # the bar, by its middle, 20 px right and 60 px down
        # Accepted at once: the page waits until the app has saved.
        page.get_by_role("button", name="Accept").click()
        until(lambda: site.read("a.png").status == "accepted", "accepting")
        page.get_by_text("1 of 3 frames reviewed").wait_for()
        page.get_by_text("b.png", exact=True).first.wait_for()
        page.screenshot(path=screenshots / "review-3-next.png")

        first = site.read("a.png")
        by_label = {(a.label, a.source): a for a in first.annotations}
        assert set(by_label) == {("disc", "model:m@1"), ("bar", "model:m@1"), ("disc", "human:ann")}
        drawn, moved, kept = by_label["disc", "human:ann"], by_label["bar", "model:m@1"], by_label["disc", "model:m@1"]
        # A pixel of the screen is about 1 px of the frame here; the app snaps to the pointer.
        assert drawn.xyxy == pytest.approx(DRAWN, abs=6) and drawn.confidence is None
        assert moved.attributes == {"touched_by": "human:ann"} and moved.confidence == 0.8
        assert moved.xyxy == pytest.approx((420, 160, 580, 240), abs=6)
        assert (kept.xyxy, kept.attributes) == (MACHINE["disc"], {})
        assert {a.id for a in touch(first).human} == {drawn.id, moved.id}
        assert (first.reviewed_by, bool(first.reviewed_at)) == ("ann", True)
        entry, = site.workbench.records.entries("reviews", "shapes")
        assert entry.person == "ann" and entry.facts["seconds"] > 0
        assert (entry.facts["decision"], entry.facts["drawn"], entry.facts["touched"]) == ("accepted", 1, 1)

        assert site.workbench.records.leased("shapes") == {"b.png": "ann"}
        page.get_by_text("Look", exact=True).click()
        page.get_by_text("dashed: a machine drew it").wait_for()
        page.screenshot(path=screenshots / "review-4-look.png", full_page=True)
        page.keyboard.press("x")
        until(lambda: site.read("b.png").status == "rejected", "rejecting by key")
        page.get_by_text("2 of 3 frames reviewed").wait_for()
        page.keyboard.press("u")
        until(lambda: site.read("b.png").status == "annotated", "undoing by key")
        page.get_by_text("1 of 3 frames reviewed").wait_for()
        page.get_by_text("b.png", exact=True).first.wait_for()
        page.keyboard.press("a")
        until(lambda: site.read("b.png").status == "accepted", "accepting by key")
        page.get_by_text("2 of 3 frames reviewed").wait_for()
        page.keyboard.press("a")
        page.get_by_text("Every frame is reviewed.").wait_for()
        page.screenshot(path=screenshots / "review-5-done.png", full_page=True)
        assert {a.source for name in ("b.png", "c.png") for a in site.read(name).annotations} == {"model:m@1"}
        browser.close()
