"""Predict in processes of its own, over sockets: what a test client in the same process cannot show."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from doubles import graphs

from workbench.config import Config
from workbench.inference.probe import plan_for
from workbench.service import __main__ as service
from workbench.supervise import parts
from workbench.wiring import Workbench

START_S = 90
PATH = "/v1/predict?model=finder@1"
HEADERS = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("served")
    workbench = Workbench(Config(home=home, backend="onnxruntime", threads=1))
    card = graphs.red_finder(home / "graph")
    workbench.models.register(card, home / "graph")
    plan_for(card, home / "graph", workbench.open_backend, home / "plans.json", seconds=0.1, cores=1)
    return home


def test_connections_send_small_packets_at_once() -> None:
    with service._listen("127.0.0.1", 0, "service_port") as listening, \
            socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@contextmanager
def served(home: Path, **settings: int) -> Iterator[tuple[Config, subprocess.Popen]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = Config(home=home, backend="onnxruntime", threads=1, service_port=port, predict_body_mb=1, **settings)
    part = parts.part("service")
    process = subprocess.Popen(part.argv(config), cwd=home, env=parts.environment(config) | part.env)
    try:
        end = time.monotonic() + START_S
        while True:
            try:
                ask(config, "GET", "/alive")
                break
            except OSError:
                assert time.monotonic() < end and process.poll() is None, "The service did not start."
                time.sleep(0.1)
        yield config, process
    finally:
        process.terminate()
        process.wait(START_S)


def ask(
    config: Config, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", config.service_port, timeout=START_S)
    try:
        connection.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, (bytes, type(None))))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def png() -> bytes:
    image = np.full((64, 64, 3), 30, np.uint8)
    image[:8, :8] = (0, 0, 255)
    return cv2.imencode(".png", image)[1].tobytes()


def figure(config: Config, name: str) -> float:
    lines = ask(config, "GET", "/metrics")[1].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_over_a_socket_bodies_are_cut_off_and_callers_who_go_leave_nothing_behind(home: Path) -> None:
    with served(home, predict_queue=4) as (config, process):
        # A chunked body that would never end is refused while it is read.
        with socket.create_connection(("127.0.0.1", config.service_port), timeout=START_S) as line:
            line.sendall(
                f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
                "Transfer-Encoding: chunked\r\n\r\n".encode()
            )
            answer, sent = b"", 0
            line.settimeout(0.01)
            while not answer and sent < 64:
                try:
                    line.settimeout(START_S)
                    line.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
                    sent += 1
                    line.settimeout(0.01)
                    answer = line.recv(4096)
                except TimeoutError:
                    continue
            assert answer.startswith(b"HTTP/1.1 413") and sent <= 40  # 16 of them are the limit
        # A length that is too large is refused before the body is sent.
        with socket.create_connection(("127.0.0.1", config.service_port), timeout=START_S) as line:
            line.sendall(
                f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
                "Content-Length: 9999999999\r\n\r\n".encode()
            )
            assert line.recv(4096).startswith(b"HTTP/1.1 413")
        # Callers who go, in the middle of a body and while they wait, and one who only ever begins.
        slow = socket.create_connection(("127.0.0.1", config.service_port))
        slow.sendall(
            f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nx".encode()
        )
        for number in range(20):
            with socket.create_connection(("127.0.0.1", config.service_port)) as line:
                length = len(png()) + number % 2
                line.sendall(
                    f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
                    f"Content-Length: {length}\r\n\r\n".encode()
                    + png()
                )
        end = time.monotonic() + START_S
        while figure(config, "workbench_predict_queue_images"):
            assert time.monotonic() < end
            time.sleep(0.05)
        for _ in range(5):
            code, text = ask(config, "POST", PATH, png(), HEADERS)
            assert code == 200 and json.loads(text)["images"][0]["objects"][0]["label"] == "red"
        slow.close()


def test_two_service_processes_tell_the_same_figures(home: Path) -> None:
    (home / "service-metrics").mkdir(exist_ok=True)
    (home / "service-metrics" / "counter_1.db").write_bytes(b"of a run before")
    with served(home, service_workers=2) as (config, _):
        sent, serving = 0, lambda: len(list((config.home / "service-metrics").glob("counter_*.db")))
        with ThreadPoolExecutor(2) as pool:  # whichever process is free accepts: one after the other might stay with one
            while sent < 12 or serving() < 2:
                assert sent < 1000
                assert set(pool.map(lambda _: ask(config, "POST", PATH, png(), HEADERS)[0], range(4))) == {200}
                sent += 4
        told = [figure(config, 'workbench_predict_images_total{model="finder@1",result="ok"}') for _ in range(6)]
        assert told == [sent] * 6
        assert figure(config, "workbench_predict_queue_images") == 0 and figure(config, "workbench_models") == 1
        assert ask(config, "POST", f"{PATH}&stream=door", png(), HEADERS)[0] == 409
        assert serving() == 2


def test_a_service_that_is_told_to_end_answers_what_it_has_taken(home: Path) -> None:
    with served(home) as (config, process):
        line = http.client.HTTPConnection("127.0.0.1", config.service_port, timeout=START_S)
        line.putrequest("POST", PATH)
        line.putheader("Content-Type", "image/png")
        line.putheader("Content-Length", str(len(png())))
        line.endheaders(png()[:-1])
        time.sleep(0.5)  # it reads the body now
        process.terminate()
        time.sleep(0.2)
        line.send(png()[-1:])
        answer = line.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["images"][0]["objects"]
        assert process.wait(START_S) in (0, -15)
