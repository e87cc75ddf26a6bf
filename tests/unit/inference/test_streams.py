import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from workbench.errors import Invalid, Unavailable
from workbench.inference import streams as streams_module
from workbench.inference import video
from workbench.inference.cameras import Camera
from workbench.inference.streams import CameraStatus, Streams
from workbench.inference.video import Grabbed, Mjpeg, Video, decode_jpeg, jpeg_size, jpegs, open_source

PICTURE = np.full((48, 64, 3), 90, np.uint8)


def jpeg(value: int = 90, size: tuple[int, int] = (64, 48)) -> bytes:
    return cv2.imencode(".jpg", np.full((size[1], size[0], 3), value, np.uint8))[1].tobytes()


@dataclass
class Steps:
    """A source that gives the frames it is told to, one per call, each after `pause_s`; then raises or ends."""

    count: int = 10
    pause_s: float = 0.0
    is_live: bool = False
    is_lazy: bool = True
    end: Exception | None = None
    fps: float = 10.0
    decode: Callable[[], np.ndarray | None] = lambda: PICTURE
    grabbed: int = 0
    decoded: list[int] = field(default_factory=list)
    closed: int = 0

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closed += 1

    def grab(self) -> Grabbed | None:
        if self.grabbed >= self.count:
            if self.end:
                raise self.end
            return None
        if self.pause_s:
            time.sleep(self.pause_s)
        number = self.grabbed
        self.grabbed += 1

        def decode() -> np.ndarray | None:
            self.decoded.append(number)
            return self.decode()
        at = time.monotonic() if self.is_live else number / self.fps
        return Grabbed(at, at, decode)


def drain(streams: Streams, seconds: float = 20.0, work: Callable[[], None] = lambda: None,
          enough: Callable[[], bool] = lambda: False) -> list[tuple[str, float]]:
    """Serves until all cameras have ended, enough is served or the time is over; (camera, time) of each frame."""
    served, until = [], time.monotonic() + seconds
    while time.monotonic() < until and not streams.is_over and not enough():
        frame = streams.take(0.05)
        if frame is not None:
            served.append((frame.camera.name, frame.time))
            work()
            streams.done(frame)
    return served


def status_of(streams: Streams, name: str) -> CameraStatus:
    return next(one for one in streams.status() if one.name == name)


def wait_for(claim: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def test_a_file_at_full_speed_gives_every_due_frame_in_order_and_drops_none() -> None:
    source = Steps(count=50, fps=10)
    with Streams([Camera("a", "a.mp4", rate=5, full_speed=True)], lambda camera: source) as streams:
        served = drain(streams)
    # At 10 frames a second and a rate of 5 every second one is due; the others are not decoded.
    assert [time for _, time in served] == pytest.approx([number / 5 for number in range(25)])
    assert source.decoded == list(range(0, 50, 2)) and source.closed == 1
    found = streams.status()[0]
    assert (found.state, found.served, found.dropped, found.arrived) == ("ended", 25, 0, 25)


@pytest.mark.parametrize(("fps", "rate", "expected"), [(25, 10, 40), (10, 25, 40), (30, 30, 120), (24, 7, 28)])
def test_the_rate_of_a_camera_is_kept_whatever_its_own_is(fps: float, rate: float, expected: int) -> None:
    with Streams([Camera("a", "a.mp4", rate=rate, full_speed=True)], lambda camera: Steps(count=int(fps * 4), fps=fps)) as one:
        assert len(drain(one)) == pytest.approx(expected, abs=1)


def test_a_file_is_read_at_its_own_pace_unless_told_otherwise() -> None:
    began = time.monotonic()
    with Streams([Camera("a", "a.mp4", rate=20)], lambda camera: Steps(count=11, fps=20)) as streams:
        served = drain(streams)
    assert len(served) >= 5 and time.monotonic() - began >= 0.45


def test_the_newest_frame_wins_and_replaced_ones_are_counted() -> None:
    source = Steps(count=30, pause_s=0.005, is_live=True, end=Unavailable("gone"))
    with Streams([Camera("a", "rtsp://h", rate=120)], lambda camera: source) as streams:
        wait_for(lambda: source.grabbed == 30 and status_of(streams, "a").state == "down")
        frame = streams.take(1)
        streams.done(frame)
        found = streams.status()[0]
    assert source.decoded == [29], "only the frame that was used is decoded, and it is the newest"
    assert found.served == 1 and found.dropped == found.arrived - 1 > 0
    assert frame.image is PICTURE


def test_frames_of_one_camera_are_never_under_work_twice_at_once() -> None:
    with Streams([Camera("a", "a.mp4", rate=100, full_speed=True)], lambda camera: Steps(fps=100)) as streams:
        first = streams.take(5)
        assert streams.take(0.1) is None
        streams.done(first)
        second = streams.take(5)
        assert second.time > first.time
        streams.done(second)


def test_in_overload_no_camera_starves() -> None:
    cameras = [Camera(f"c{number}", "rtsp://h", rate=100) for number in range(20)]
    with Streams(cameras, lambda camera: Steps(count=10 ** 9, pause_s=0.01, is_live=True)) as streams:
        served = drain(streams, work=lambda: time.sleep(0.002),
                       enough=lambda: sum(one.served for one in streams.status()) >= 600)
        found = streams.status()
    counts = [one.served for one in found]
    assert len(served) >= 600 and min(counts) / max(counts) >= 0.9, counts
    assert sum(one.dropped for one in found) > 0


def test_in_overload_a_camera_gets_its_share_by_its_rate() -> None:
    cameras = [Camera("slow", "rtsp://h", rate=10), Camera("fast", "rtsp://h", rate=30)]
    with Streams(cameras, lambda camera: Steps(count=10 ** 9, pause_s=0.005, is_live=True)) as streams:
        drain(streams, work=lambda: time.sleep(0.05), enough=lambda: sum(one.served for one in streams.status()) >= 80)
        slow, fast = (one.served for one in streams.status())
    # 20 a second can be served of the 40 wanted: about 5 and 15.
    assert 2 <= fast / slow <= 4


def test_a_camera_that_hangs_or_fails_holds_nobody_up() -> None:
    stuck = threading.Event()

    def source(camera: Camera) -> Steps:
        if camera.name == "hangs":
            stuck.wait(30)
        if camera.name == "dead":
            raise Unavailable("no route")
        if camera.name == "mad":
            raise ZeroDivisionError("secret")
        return Steps(count=40)

    names = ("hangs", "dead", "mad", "fine")
    with Streams([Camera(name, "x.mp4", rate=10, full_speed=True) for name in names], source) as streams:
        drain(streams, enough=lambda: status_of(streams, "fine").served == 40)
        found = {one.name: one for one in streams.status()}
        stuck.set()
    assert found["fine"].served == 40
    assert found["hangs"].state == "opening"
    assert (found["dead"].state, found["dead"].error) == ("down", "no route")
    assert found["mad"].state == "down" and "ZeroDivisionError" in found["mad"].error and "secret" not in found["mad"].error


def test_a_camera_that_comes_back_is_followed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "BACKOFF_S", 0.02)
    opened: list[float] = []

    def source(camera: Camera) -> Steps:
        opened.append(time.monotonic())
        if len(opened) in (1, 2, 3):
            raise Unavailable("away")
        return Steps(count=3, end=Unavailable("cut") if len(opened) == 4 else None)

    with Streams([Camera("a", "a.mp4", rate=10, full_speed=True)], source) as streams:
        served = drain(streams)
    assert len(served) == 6 and len(opened) == 5 and streams.status()[0].state == "ended"
    pauses = np.diff(opened)
    # 0.02, 0.04, 0.08 s, each shortened to half at most.
    assert pauses[1] >= 0.018 and pauses[2] >= 0.038


def test_what_is_wrong_for_good_is_not_tried_again() -> None:
    calls = []

    def source(camera: Camera) -> Steps:
        calls.append(1)
        raise Invalid("no video")

    with Streams([Camera("a", "a.mp4")], source) as streams:
        wait_for(lambda: streams.is_over)
    assert len(calls) == 1 and streams.status()[0] == CameraStatus("a", "failed", "no video")


@pytest.mark.parametrize("is_lazy", [True, False])
def test_a_damaged_frame_is_counted_and_the_camera_goes_on(is_lazy: bool) -> None:
    results: Iterator[np.ndarray | None] = iter([PICTURE, None, PICTURE])
    source = Steps(count=3, decode=lambda: next(results), is_lazy=is_lazy)
    with Streams([Camera("a", "a.mp4", rate=10, full_speed=True)], lambda camera: source) as streams:
        served = drain(streams)
    found = streams.status()[0]
    assert len(served) == 2 and (found.served, found.corrupt, found.state) == (2, 1, "ended")


def test_a_decoder_that_raises_counts_as_a_damaged_frame() -> None:
    def decode() -> None:
        raise RuntimeError
    with Streams([Camera("a", "a.mp4", rate=10, full_speed=True)], lambda camera: Steps(count=2, decode=decode)) as streams:
        assert drain(streams) == [] and streams.status()[0].corrupt == 2


def test_latency_is_from_arrival_to_result() -> None:
    with Streams([Camera("a", "a.mp4", rate=10, full_speed=True)], lambda camera: Steps(count=3)) as streams:
        drain(streams, work=lambda: time.sleep(0.05))
        assert 0.05 <= streams.latency_s() < 5


def test_a_camera_that_sends_no_whole_frame_is_shown_as_down() -> None:
    now, drips = [0.0], threading.Event()

    class Dripping(Steps):
        def grab(self) -> Grabbed | None:
            if self.grabbed:
                drips.wait(20)
            return super().grab()

    with Streams([Camera("a", "http://cam.lan/x", rate=5)], lambda camera: Dripping(count=1, is_live=True),
                 clock=lambda: now[0]) as streams:
        wait_for(lambda: streams.status()[0].state == "up")
        now[0] = 2 * video.TIMEOUT_S + 1
        found = streams.status()[0]
        drips.set()
    assert found.state == "down" and "cam.lan sends no whole frame" in found.error


def make_video(path: Path, count: int = 30, size: tuple[int, int] = (64, 48), fps: float = 10) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, size)
    for number in range(count):
        writer.write(np.full((size[1], size[0], 3), (0, 0, 8 * number), np.uint8))  # BGR: ever redder
    writer.release()
    return path


def test_a_video_file_gives_rgb_frames_at_their_times(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi")
    frames = []
    with open_source(Camera("a", str(path))) as source:
        while (grabbed := source.grab()) is not None:
            frames.append((grabbed.time, grabbed.decode()))
    assert [at for at, _ in frames] == pytest.approx([number / 10 for number in range(30)], abs=0.01)
    red, green, blue = frames[20][1].reshape(-1, 3).mean(axis=0)
    assert red == pytest.approx(160, abs=8) and green < 10 and blue < 10


@pytest.mark.parametrize("content", [b"", b"no video at all", b"#EXTM3U\nhttp://10.255.255.1/x.ts\n", jpeg()[:100]])
def test_a_file_that_is_no_video_is_invalid(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(Invalid, match="no video"):
        Video(Camera("a", str(path))).grab()


def test_what_is_no_file_is_invalid(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.mp4", Path("/dev/zero")):
        with pytest.raises(Invalid, match="no file"):
            Video(Camera("a", str(path)))


@pytest.mark.parametrize("told", [float("nan"), -5.0, 0.0, 1e9, 0.9])
def test_a_time_stamp_that_cannot_be_true_is_one_step_after_the_last(told: float) -> None:
    assert video._next_time(told, 1.0, 0.04) == pytest.approx(1.04)
    assert video._next_time(1.2, 1.0, 0.04) == 1.2


SECRET = "s3cr3t-pass"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("scheme", ["rtsp", "http", "https"])
def test_an_unreachable_camera_is_told_without_its_secrets(scheme: str, capfd: pytest.CaptureFixture[str]) -> None:
    url = f"{scheme}://admin:{SECRET}@127.0.0.1:{free_port()}/live/{SECRET}?token={SECRET}"
    with pytest.raises(Unavailable, match="Camera gate at .*127.0.0.1") as told:
        open_source(Camera("gate", url))
    written = capfd.readouterr()
    shown = [str(told.value), written.out, written.err]
    chain: BaseException | None = told.value
    while chain is not None:
        shown.append(str(chain))
        chain = None if chain.__suppress_context__ else chain.__context__
    assert not any(SECRET in one for one in shown)


@contextmanager
def camera_server(handle: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                handle(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, bodies: list[bytes], has_length: bool = True,
         kind: str = 'multipart/x-mixed-replace; boundary="--frame"') -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    handler.end_headers()
    for body in bodies:
        length = f"Content-Length: {len(body)}\r\n" if has_length else ""
        handler.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\n" + length.encode() + b"\r\n" + body + b"\r\n")
    if not has_length:
        handler.wfile.write(b"--frame\r\n")


@pytest.mark.parametrize("has_length", [True, False])
def test_an_mjpeg_camera_is_read_and_counts_its_damaged_frames(has_length: bool) -> None:
    bodies = [jpeg(40), jpeg(80)[:-20], jpeg(120, (32, 24))]
    with camera_server(lambda handler: send(handler, bodies, has_length)) as port:
        with Mjpeg(Camera("a", f"http://127.0.0.1:{port}/mjpg")) as source:
            images = [source.grab().decode() for _ in range(3)]
            with pytest.raises(Unavailable, match="stopped sending"):
                source.grab()
    assert images[0].mean() == pytest.approx(40, abs=2) and images[1] is None and images[2].shape == (24, 32, 3)


def test_user_and_password_are_sent_but_not_to_where_the_camera_points() -> None:
    seen: list[str | None] = []

    def handle(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers.get("Authorization"))
        if handler.path == "/moved":
            handler.send_response(302)
            handler.send_header("Location", "/other")
            handler.end_headers()
        elif seen[-1] is None or not seen[-1].startswith(("Basic", "Digest")):
            handler.send_error(401)
        else:
            send(handler, [jpeg()])

    with camera_server(handle) as port:
        with Mjpeg(Camera("a", f"http://user:p%40ss@127.0.0.1:{port}/x")) as source:
            assert source.grab().decode() is not None
        assert seen == ["Basic dXNlcjpwQHNz"]  # base64 of user:p@ss
        with pytest.raises(Unavailable, match="answers 302"):
            Mjpeg(Camera("a", f"http://user:pass@127.0.0.1:{port}/moved"))
        assert len(seen) == 2


def test_a_camera_that_asks_for_a_digest_gets_one() -> None:
    def handle(handler: BaseHTTPRequestHandler) -> None:
        if handler.headers.get("Authorization", "").startswith("Digest username=\"user\""):
            return send(handler, [jpeg()])
        handler.send_response(401)
        handler.send_header("WWW-Authenticate", 'Digest realm="cam", nonce="abc", qop="auth"')
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with camera_server(handle) as port, Mjpeg(Camera("a", f"http://user:pass@127.0.0.1:{port}/x")) as source:
        assert source.grab().decode() is not None


@pytest.mark.parametrize("kind", ["text/html", "multipart/x-mixed-replace", "image/jpeg", ""])
def test_an_answer_that_is_no_stream_is_told_with_its_kind(kind: str) -> None:
    with camera_server(lambda handler: send(handler, [], kind=kind)) as port:
        with pytest.raises(Unavailable, match="answers 200 with"):
            Mjpeg(Camera("a", f"http://127.0.0.1:{port}/"))


def test_a_camera_that_falls_silent_is_given_up_after_its_time() -> None:
    hold = threading.Event()

    def handle(handler: BaseHTTPRequestHandler) -> None:
        send(handler, [jpeg()])
        hold.wait(20)

    with camera_server(handle) as port:
        with Mjpeg(Camera("a", f"http://127.0.0.1:{port}/"), timeout_s=0.3) as source:
            assert source.grab().decode() is not None
            began = time.monotonic()
            with pytest.raises(Unavailable):
                source.grab()
        hold.set()
    assert time.monotonic() - began < 10


def reader(data: bytes, size: int = 7) -> Callable[[], bytes]:
    pieces = iter([data[at:at + size] for at in range(0, len(data), size)])
    return lambda: next(pieces, b"")


def test_parts_are_found_however_the_bytes_arrive() -> None:
    bodies = [b"\xff\xd8one", b"", b"--three\r\n\r\n"]
    data = b"preamble\r\n" + b"".join(
        b"--b\r\ncontent-length: %d\r\n\r\n%s\r\n" % (len(body), body) for body in bodies) + b"--b--\r\n"
    for size in (1, 3, 1000):
        assert list(jpegs(reader(data, size), b"b")) == bodies


@pytest.mark.parametrize("data", [
    b"--b\r\nContent-Length: 99999\r\n\r\n" + b"x" * 99_999,
    b"--b\r\nContent-Type: image/jpeg\r\n\r\n" + b"x" * 99_999,
    b"--b\r\n" + b"X-Long: y\r\n" * 9_999,
])
def test_a_part_beyond_its_limit_ends_the_stream(data: bytes) -> None:
    with pytest.raises(Unavailable):
        list(jpegs(reader(data, 500), b"b", most=5_000))


def test_bytes_without_a_boundary_are_not_hoarded() -> None:
    count = [0]

    def read() -> bytes:
        count[0] += 1
        return b"x" * 65536 if count[0] < 500 else b""
    assert list(jpegs(read, b"b", most=5_000)) == [] and count[0] == 500


def test_a_jpeg_s_size_is_known_before_it_is_decoded() -> None:
    assert jpeg_size(jpeg(size=(320, 200))) == (320, 200)
    huge = bytearray(jpeg())
    at = huge.find(b"\xff\xc0")
    huge[at + 5:at + 9] = b"\xff\xff\xff\xff"  # says it is 65,535 x 65,535 px
    assert jpeg_size(bytes(huge)) == (65535, 65535)
    for data in (bytes(huge), b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", jpeg()[:-4], b"GIF89a" + b"\0" * 50):
        assert decode_jpeg(data) is None


def test_a_camera_that_changes_its_resolution_midway_is_followed() -> None:
    bodies = [jpeg(90, (64, 48)), jpeg(90, (128, 96))]
    shapes = []
    with camera_server(lambda handler: send(handler, [bodies[len(shapes) > 0]] * 3)) as port:
        with Streams([Camera("a", f"http://127.0.0.1:{port}/", rate=120)]) as streams:
            until = time.monotonic() + 20
            while len(set(shapes)) < 2 and time.monotonic() < until:
                if (frame := streams.take(0.2)) is not None:
                    shapes.append(frame.image.shape)
                    streams.done(frame)
    assert set(shapes) == {(48, 64, 3), (96, 128, 3)}
