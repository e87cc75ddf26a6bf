import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.doubles.graphs import red_finder
from workbench.adapters.git_datasets import GitDatasets
from workbench.adapters.onnxruntime import OnnxRuntime
from workbench.blobs import Blobs
from workbench.errors import Cancelled, Conflict, Invalid, Unavailable
from workbench.inference.alarms import Event, Scene
from workbench.inference.cameras import Camera
from workbench.inference.detector import Detector
from workbench.inference.streams import Streams
from workbench.inference.video import Grabbed
from workbench.inference.zones import Zone
from workbench.ports import Quiet
from workbench.steps import watch as watch_module
from workbench.steps.spool import Spool
from workbench.steps.upload import upload
from workbench.steps.watch import WatchReport, low_thresholds, serve, sure_scores, upload_by, watch

PROJECT = Path(__file__).resolve().parents[3]
open_backend = partial(OnnxRuntime, threads=1)


def event(time_s: float = 1.0, camera: str = "gate", **more: object) -> Event:
    return Event(**{"kind": "object", "camera": camera, "time": time_s, "track": 1, "label": "red",
                    "xyxy": (10.0, 10.0, 30.0, 30.0), "confidence": 0.9, "size": (64, 64), **more})


def image(seed: int) -> np.ndarray:
    """Blocks of 16 px, for a JPEG keeps no colour of single pixels."""
    return np.kron(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8), np.ones((16, 16, 1), np.uint8))


def events_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_frame_is_kept_once_and_each_of_its_events_is_a_line(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        name = spool.keep("gate", [event(), event(kind="intrusion", zone="yard")], image(1), [("red", (10, 10, 30, 30))])
        assert name == "gate_1000.jpg" and spool.waiting() == 1 and spool.kept == 1
        assert spool.keep("gate", [event()], image(1), []) == name and spool.skipped == {"there already": 1}
    assert [(line["kind"], line["frame"]) for line in events_of(tmp_path)] == [
        ("object", name), ("intrusion", name)]
    kept = cv2.cvtColor(cv2.imread(str(tmp_path / "incoming" / name)), cv2.COLOR_BGR2RGB)
    assert np.abs(kept.astype(int) - image(1)).mean() < 5, "quality 95, colours in the right order"


def test_frames_that_look_alike_are_kept_once_but_another_place_or_label_is_another_frame(tmp_path: Path) -> None:
    still = image(2)
    with Spool(tmp_path) as spool:
        def keep(at: float, boxes: list, pixels: np.ndarray = still, camera: str = "gate") -> bool:
            return bool(spool.keep(camera, [event(at, camera)], pixels, boxes))
        here, there = ("red", (10.0, 10.0, 30.0, 30.0)), ("red", (40.0, 40.0, 60.0, 60.0))
        assert keep(1, [here])
        assert not keep(2, [here]) and not keep(3, [("red", (11.0, 10.0, 31.0, 31.0))])
        assert keep(4, [there]) and keep(5, [here, there]) and keep(6, [("blue", here[1])])
        assert keep(7, [here], image(3)) and keep(8, [here], camera="door")
        assert spool.skipped == {"alike": 2}
    assert [bool(line["frame"]) for line in events_of(tmp_path)].count(False) == 2, "the event is told all the same"


def test_a_camera_has_its_share_of_frames_an_hour_also_after_a_restart(tmp_path: Path) -> None:
    for start in (0, 5):
        with Spool(tmp_path, per_hour=3) as spool:
            for number in range(start, start + 5):
                spool.keep("gate", [event(number)], image(number), [])
            assert spool.kept == (3 if start == 0 else 0)
            spool.cut()
    with Spool(tmp_path, per_hour=3) as spool:
        assert spool.keep("gate", [event(3600)], image(9), []) and spool.keep("door", [event(1, "door")], image(9), [])


def test_no_more_frames_wait_than_may(tmp_path: Path) -> None:
    with Spool(tmp_path, most_waiting=2) as spool:
        for number in range(4):
            spool.keep("gate", [event(number)], image(number), [])
            spool.cut() if number == 0 else None
        assert spool.kept == 2 and spool.skipped == {"full": 2}


def test_two_processes_do_not_share_a_spool(tmp_path: Path) -> None:
    with Spool(tmp_path), pytest.raises(Conflict, match="Another"):
        Spool(tmp_path).__enter__()
    with Spool(tmp_path):
        pass


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        spool.keep("gate", [event(1)], image(1), [])
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "object", "cam')
    with Spool(tmp_path) as spool:
        assert spool.keep("gate", [event(1)], image(1), []) and spool.kept == 0
        spool.keep("gate", [event(2)], image(2), [])
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2])["time_ms"] == 2000


def test_the_list_of_events_is_turned_when_it_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.steps.spool.EVENTS_BYTES", 1000)
    with Spool(tmp_path, per_hour=1) as spool:
        for number in range(30):
            spool.keep("gate", [event(number)], image(number), [])
    assert (tmp_path / "events.jsonl").stat().st_size < 2000 and (tmp_path / "events.before.jsonl").stat().st_size < 2000


def walker(t: float) -> np.ndarray:
    """A red block on grey, walking right from 1 s on."""
    pixels = np.full((64, 64, 3), 100, np.uint8)
    x = int(8 + 12 * t)
    pixels[16:24, x:x + 8] = (255, 0, 0)  # one cell of the finder: it draws 16 x 16 px around it
    return pixels


class Clip:
    """A short video whose frames are drawn."""

    is_live, is_lazy = False, True

    def __init__(self, camera: Camera, draw=walker, seconds: float = 3.0) -> None:
        self._draw, self._left = draw, iter(np.arange(0, seconds, 0.1))

    def __enter__(self) -> "Clip":
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def grab(self) -> Grabbed | None:
        t = next(self._left, None)
        return None if t is None else Grabbed(float(t), float(t), lambda: self._draw(t))


def clip(name: str = "gate", **more: object) -> Camera:
    return Camera(name, f"{name}.mp4", rate=10, full_speed=True, **more)


@pytest.fixture
def detector(tmp_path: Path):
    card = red_finder(tmp_path / "model")
    with Detector(card, tmp_path / "model", open_backend, **low_thresholds(card)) as opened:
        yield opened


def run(detector: Detector, folder: Path, deliver, cameras=(clip(),), source=Clip, **more) -> tuple[WatchReport, list[str]]:
    said: list[str] = []
    with Spool(folder) as spool:
        report = watch(cameras, detector, spool, deliver, say=said.append, stop=threading.Event(), source=source, **more)
    return report, said


def test_what_cameras_see_becomes_unlabelled_frames_of_the_data_set_once(tmp_path: Path, detector: Detector) -> None:
    blobs = Blobs(str(tmp_path / "blobs"), cache=tmp_path / "cache")
    store = GitDatasets(tmp_path / "datasets", blobs)

    def deliver(folder: Path, stop: threading.Event) -> None:
        upload("yard", folder, store=store, server=None, blobs=blobs, job=Quiet(), person="ann")

    cameras = (clip("gate", zones=(Zone("right", ((0.3, 0), (1, 0), (1, 1), (0.3, 1)), margin=0.0),)), clip("door"))

    def source(camera: Camera) -> Clip:
        # The same bytes from two cameras would be one frame of the data set.
        return Clip(camera, draw=lambda t: walker(t) if camera.name == "gate" else walker(t)[::-1].copy())

    report, said = run(detector, tmp_path / "spool", deliver, cameras, source)
    assert (report.cameras, report.served, report.waiting, report.failed, report.errors) == (2, 60, 0, 0, {})
    manifest = store.manifest("yard@0.1.0")
    names = [one.frame.name for one in manifest.frames]
    assert len(names) == report.kept >= 2 and {name.partition("_")[0] for name in names} == {"gate", "door"}
    assert all(one.annotations is None and one.split for one in manifest.frames)
    told = {(line["camera"], line["kind"], line["zone"]) for line in events_of(tmp_path / "spool")}
    assert told == {("gate", "object", ""), ("door", "object", ""), ("gate", "intrusion", "right")}
    assert any("frames went into the data set" in line for line in said)

    again, _ = run(detector, tmp_path / "spool", deliver, cameras, source)
    assert again.kept == 0 and again.events == 0 and len(store.versions("yard")) == 1


def test_a_batch_that_cannot_be_delivered_waits_for_the_next_watch(tmp_path: Path, detector: Detector) -> None:
    def refuse(folder: Path, stop: threading.Event) -> None:
        raise Unavailable("The store is away.")
    report, said = run(detector, tmp_path / "spool", refuse)
    assert report.waiting == report.kept > 0 and any("The store is away. The frames wait in" in line for line in said)
    delivered: list[str] = []
    report, _ = run(detector, tmp_path / "spool", lambda folder, stop: delivered.extend(os.listdir(folder)))
    assert len(delivered) == 1 and report.waiting == 0


def test_a_batch_that_nobody_takes_is_set_aside(tmp_path: Path, detector: Detector) -> None:
    def refuse(folder: Path, stop: threading.Event) -> None:
        raise Invalid("Not one picture is usable.")
    report, said = run(detector, tmp_path / "spool", refuse)
    assert report.waiting == 0 and len(list((tmp_path / "spool" / "refused").glob("*/*.jpg"))) == report.kept
    assert any("Not one picture is usable. The frames lie in" in line for line in said)


def test_the_status_line_and_a_camera_s_fault_are_told(tmp_path: Path, detector: Detector) -> None:
    def source(camera: Camera) -> Clip:
        if camera.name == "dead":
            raise Invalid("Camera dead: x is no video.")
        return Clip(camera, draw=lambda t: (time.sleep(0.05), walker(t))[1])
    report, said = run(detector, tmp_path / "spool", lambda *_: None, (clip("gate"), clip("dead")), source)
    lines = [line for line in said if "frames/s" in line]
    assert lines and "cameras 1/2 up, 1 failed" in lines[0] and "latency p95" in lines[0] and "dropped 0" in lines[0]
    assert said.count("failed: Camera dead: x is no video.") == 1
    assert report.errors == {"dead": "Camera dead: x is no video."}


def test_a_label_that_the_model_lacks_stops_the_watch_before_it_begins(tmp_path: Path, detector: Detector) -> None:
    with pytest.raises(Invalid, match="green"):
        run(detector, tmp_path / "spool", lambda *_: None, (clip(labels=("green",)),))


def test_a_model_that_fails_on_every_frame_ends_the_watch_with_its_error(tmp_path: Path, detector: Detector,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(images: object) -> None:
        raise Invalid("model.onnx holds a NaN.")
    monkeypatch.setattr(detector, "detect", fail)
    with pytest.raises(Invalid, match="NaN"):
        run(detector, tmp_path / "spool", lambda *_: None)


def test_a_frame_that_the_model_fails_on_is_counted(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    detect, calls = detector.detect, []

    def sometimes(images: object) -> object:
        calls.append(1)
        if len(calls) % 3 == 0:
            raise Invalid("no")
        return detect(images)
    monkeypatch.setattr(detector, "detect", sometimes)
    handled: list[float] = []
    with Streams([clip()], Clip) as streams:
        failed = serve(streams, detector, [Scene(clip(), detector.card.labels, sure_scores(detector.card))],
                       lambda frame, events: handled.append(frame.time), stop=threading.Event())
    assert failed == 10 and len(handled) == 20 and handled == sorted(handled)


def test_what_goes_wrong_in_a_worker_is_raised(detector: Detector) -> None:
    def handle(frame: object, events: object) -> None:
        raise ZeroDivisionError
    with Streams([clip()], Clip) as streams, pytest.raises(ZeroDivisionError):
        serve(streams, detector, [Scene(clip(), detector.card.labels, 0.5)], handle, stop=threading.Event())


def test_thresholds_let_low_scores_through_for_the_tracker(detector: Detector) -> None:
    assert sure_scores(detector.card).tolist() == [0.5, 0.5]
    assert low_thresholds(detector.card) == {"confidence": pytest.approx(0.2),
                                             "confidence_by_label": {"red": pytest.approx(0.2), "blue": pytest.approx(0.2)}}


class Jobs:
    """What upload_by needs of workbench.jobs.Jobs; a job ends as `ends` says, in order."""

    def __init__(self, *ends: str, has_worker: bool = True) -> None:
        self.ends, self.has_worker, self.submitted = list(ends), has_worker, {}

    def submit(self, kind: str, args: dict, *, person: str, key: str) -> str:
        if key not in self.submitted:
            self.submitted[key] = (kind, args, self.ends.pop(0))
        return key

    def get(self, job_id: str) -> object:
        state = self.submitted[job_id][2]
        return type("Status", (), {"state": state, "error": "why", "is_over": state in ("done", "failed", "cancelled")})

    def workers(self) -> list[str]:
        return ["one"] if self.has_worker else []


def test_a_batch_is_uploaded_by_one_job_whatever_is_repeated(tmp_path: Path) -> None:
    jobs, stop = Jobs("done"), threading.Event()
    for _ in range(2):
        upload_by(jobs, "yard", "ann")(tmp_path / "batch-1", stop)
    assert jobs.submitted == {"watch:batch-1:0": ("upload", {"dataset": "yard", "source": str(tmp_path / "batch-1")}, "done")}


def test_a_failed_upload_is_tried_by_another_job_and_given_up_in_the_end(tmp_path: Path) -> None:
    jobs = Jobs(*["failed"] * 5)
    deliver = upload_by(jobs, "yard", "ann")
    for _ in range(4):
        with pytest.raises(Unavailable, match="failed. why"):
            deliver(tmp_path / "batch-1", threading.Event())
    with pytest.raises(Invalid):
        deliver(tmp_path / "batch-1", threading.Event())
    assert len(jobs.submitted) == 5


def test_an_upload_that_waits_says_for_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="workbench up"):
        upload_by(Jobs("queued", has_worker=False), "yard", "ann")(tmp_path / "b", threading.Event())
    monkeypatch.setattr(watch_module, "POLL_S", 0.01)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        upload_by(Jobs("running"), "yard", "ann")(tmp_path / "b", stop)


KILLED = """
import sys, numpy as np
from pathlib import Path
from workbench.inference.alarms import Event
from workbench.steps.spool import Spool
with Spool(Path(sys.argv[1]), per_hour=10 ** 6) as spool:
    print("ready", flush=True)
    for number in range(10 ** 6):
        pixels = np.random.default_rng(number).integers(0, 255, (240, 320, 3), np.uint8)
        event = Event("object", "gate", float(number), 1, "red", (1.0, 1.0, 9.0, 9.0), 0.9, (320, 240))
        spool.keep("gate", [event], pixels, [])
        if number % 7 == 6:
            spool.cut()
"""


def test_a_kill_at_any_moment_leaves_whole_frames_and_nothing_twice(tmp_path: Path) -> None:
    for round_ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                                   cwd=PROJECT)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.15 + 0.09 * round_)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with Spool(tmp_path, per_hour=10 ** 6) as spool:
        spool.cut()
        files = [path for batch in spool.batches() for path in batch.iterdir()]
    names, events = [path.name for path in files], events_of(tmp_path)
    assert len(names) == len(set(names)) > 4
    assert all(cv2.imread(str(path)).shape == (240, 320, 3) for path in files)
    told = [line["time_ms"] for line in events]
    assert len(told) == len(set(told)), "each round begins at the same moments again"
    assert {line["frame"] for line in events if line["frame"]} <= set(names)
    assert not list((tmp_path / "writing").iterdir())


def test_the_command_watches_a_video_and_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    home, model, video = tmp_path / "home", tmp_path / "model", tmp_path / "clip.avi"
    card = red_finder(model)
    (model / "card.json").write_text(json.dumps(card.to_json()))
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for number in range(600):
        writer.write(walker(min(number / 10, 4))[:, :, ::-1])
    writer.release()
    cameras = tmp_path / "cameras.toml"
    cameras.write_text('[[camera]]\nname = "gate"\nurl = "clip.avi"\nrate = 10\n')
    command = [sys.executable, "-m", "workbench.cli", "--home", str(home)]
    environ = {**os.environ, "WORKBENCH_BACKEND": "onnxruntime"}
    subprocess.run([*command, "models", "add", str(model)], check=True, cwd=PROJECT, env=environ, capture_output=True)
    process = subprocess.Popen([*command, "watch", str(cameras), "--dataset", "yard", "--model", "finder@1"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT, env=environ,
                               # What a shell started in the background ignores it, and so would its children.
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    lines = []
    while "events 1" not in (line := process.stdout.readline()) and line:
        lines.append(line)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["events"] == report["kept"] == report["waiting"] == 1 and report["errors"] == {}
    assert len(list((home / "watch" / "yard").rglob("gate_*.jpg"))) == 1
