"""POST /v1/predict over a real detector: what it finds, for whom, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from doubles import graphs
from openapi_spec_validator import validate
from PIL import Image
from starlette.testclient import TestClient

from workbench.boxes import Detections
from workbench.config import Config
from workbench.inference.probe import plan_for
from workbench.service.app import create
from workbench.service.predict import _objects
from workbench.service.schema import Predictions
from workbench.wiring import Workbench

RED, BLUE = (255, 0, 0), (0, 0, 255)
PATH, MODEL = "/v1/predict", {"model": "finder@1"}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The measured plan of the finder, so that not every test waits for the measurement."""
    folder = tmp_path_factory.mktemp("plans")
    card, workbench = graphs.red_finder(folder), Workbench(Config(home=folder, backend="onnxruntime", threads=1))
    plan_for(card, folder, workbench.open_backend, folder / "plans.json", seconds=0.1, cores=1)
    return folder / "plans.json"


@pytest.fixture()
def workbench(plans: Path, tmp_path: Path) -> Workbench:
    shutil.copy(plans, tmp_path)
    workbench = Workbench(Config(home=tmp_path, backend="onnxruntime", threads=1, predict_body_mb=2))
    workbench.models.register(graphs.red_finder(tmp_path / "graph"), tmp_path / "graph")
    return workbench


@pytest.fixture()
def client(workbench: Workbench) -> Iterator[TestClient]:
    with TestClient(create(workbench.config), base_url="http://127.0.0.1") as client:
        yield client


def picture(column: int, row: int = 0, colour: tuple[int, int, int] = RED) -> np.ndarray:
    """64 x 64 with one square of 8 pixels; the finder sees it as a box of 16 around the square's middle."""
    image = np.full((64, 64, 3), 30, np.uint8)
    image[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = colour
    return image


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()


def box(column: int, row: int = 0) -> list[float]:
    x, y = column * 8 + 4, row * 8 + 4
    return [max(0, x - 8), max(0, y - 8), min(64, x + 8), min(64, y + 8)]


def parts(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"{number}.png", image)) for number, image in enumerate(images)]


def boxes(answer: Any) -> list[list[list[float]]]:
    assert answer.status_code == 200, answer.text
    return [[one["xyxy"] for one in image["objects"]] for image in answer.json()["images"]]


def samples(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def test_images_of_a_form_are_answered_in_their_order(client: TestClient) -> None:
    sent = parts(png(picture(2)), png(picture(5, 3, BLUE)), png(picture(0, 7)))
    answer = client.post(PATH, files=sent, data={"model": "finder@1"})
    assert boxes(answer) == [[box(2)], [box(5, 3)], [box(0, 7)]]
    told = Predictions.model_validate(answer.json(), extra="forbid", strict=False)
    assert (told.model, told.task, told.backend, told.precision) == ("finder@1", "boxes", "onnxruntime", "f32")
    assert [(one.name, one.width, one.height) for one in told.images] == [(f"{n}.png", 64, 64) for n in range(3)]
    first = told.images[0].objects[0]
    assert first.label == "red" and first.confidence == pytest.approx(1, abs=0.01) and first.track is None
    assert told.images[1].objects[0].label == "blue" and told.total_ms > 0


def test_one_image_may_be_the_body(client: TestClient) -> None:
    answer = client.post(PATH, params=MODEL, content=png(picture(3)), headers={"Content-Type": "image/png"})
    assert boxes(answer) == [[box(3)]] and answer.json()["images"][0]["name"] is None


def test_images_in_json_are_base64_also_as_a_data_address(client: TestClient) -> None:
    text = base64.encodebytes(png(picture(3))).decode()  # in lines
    sent = {"model": "finder@1", "images": [text, "data:image/png;base64," + text]}
    assert boxes(client.post(PATH, json=sent)) == [[box(3)], [box(3)]]


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".webp", ".tiff", ".gif"])
def test_all_kinds_of_pictures_that_are_uploaded_are_read(client: TestClient, suffix: str) -> None:
    file = io.BytesIO()
    Image.fromarray(picture(3)).save(file, {".jpg": "JPEG"}.get(suffix, suffix[1:].upper()))
    assert boxes(client.post(PATH, params=MODEL, content=file.getvalue(), headers={"Content-Type": "image/any"})) == [
        [box(3)]
    ]


def test_a_turned_photograph_is_seen_upright(client: TestClient) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    Image.fromarray(np.pad(picture(0), ((0, 0), (0, 64), (0, 0)))).save(file, "PNG", exif=exif)
    answer = client.post(PATH, params=MODEL, content=file.getvalue(), headers={"Content-Type": "image/png"})
    (image,) = answer.json()["images"]
    assert (image["width"], image["height"]) == (64, 128)
    assert image["objects"][0]["xyxy"][2] == 64  # from the top left corner to the top right one


def test_the_deployed_model_looks_when_only_the_data_set_is_named(client: TestClient, workbench: Workbench) -> None:
    sent = {"content": png(picture(3)), "headers": {"Content-Type": "image/png"}}
    refused = client.post(PATH, params={"dataset": "cells"}, **sent)
    assert (
        refused.status_code == 404
        and "no deployed model" in refused.json()["error"]
        and "finder@1" in refused.json()["error"]
    )
    workbench.records.add("deployments", "cells", "finder@1", "ada")
    assert boxes(client.post(PATH, params={"dataset": "cells"}, **sent)) == [[box(3)]]
    nameless = client.post(PATH, **sent)
    assert nameless.status_code == 422 and "Registered are: finder@1" in nameless.json()["error"]


def test_confidence_and_max_detections_choose_what_is_told(client: TestClient) -> None:
    dim = picture(1)
    dim[40:48, 40:48] = (70, 35, 35)  # (70 - 35) / 8 - 4 = 0.375: a confidence of sqrt(0.59) = 0.77
    sent = {"content": png(dim), "headers": {"Content-Type": "image/png"}}
    (both,) = boxes(client.post(PATH, params=MODEL, **sent))
    assert both == [box(1), box(5, 5)]
    assert boxes(client.post(PATH, params={**MODEL, "confidence": 0.9}, **sent)) == [[box(1)]]
    assert boxes(client.post(PATH, params={**MODEL, "max_detections": 1}, **sent)) == [[box(1)]]
    assert len(boxes(client.post(PATH, params={**MODEL, "confidence": 0.01}, **sent))[0]) > 2


def test_a_stream_s_objects_keep_their_track_from_request_to_request(client: TestClient) -> None:
    def ids(stream: str, *columns: int) -> list[list[int | None]]:
        answer = client.post(
            PATH, files=parts(*(png(picture(column)) for column in columns)), data={**MODEL, "stream": stream}
        )
        return [[one["track"] for one in image["objects"]] for image in answer.json()["images"]]

    door = ids("door", 1) + ids("door", 1, 2) + ids("door", 2)
    assert door == [door[0]] * 4 and door[0][0] >= 1
    assert ids("yard", 6) == [[1]] and ids("door", 2) == [door[0]]


def test_one_unreadable_image_of_several_is_its_own_error(client: TestClient) -> None:
    good = png(picture(4))
    answer = client.post(PATH, files=parts(good, b"no image", good[:-40], good), data=MODEL)
    assert boxes(answer) == [[box(4)], [], [], [box(4)]]
    errors = [image["error"] for image in answer.json()["images"]]
    assert (
        errors[0] is errors[3] is None and "Image 1 (1.png) is no image" in errors[1] and "Image 2 (2.png)" in errors[2]
    )


def header_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(64)))
        + chunk(b"IEND", b"")
    )


JPEG = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "has 0 bytes"),
        (b"These are words.", "is no image"),
        (JPEG[: len(JPEG) // 2], "cannot be decoded"),
        (header_of(100_000, 100_000), "far more than the 50 megapixels"),
        (header_of(10_000, 6_000), "60 megapixels, more than"),
        (header_of(0, 64), "Image 0"),
        (b"\x89PNG\r\n\x1a\n", "Image 0"),
        (b"BM" + bytes(60), "Image 0"),
        (b"RIFF\x04\0\0\0WEBPVP8 ", "Image 0"),
        (b"II*\0\x08\0\0\0\xff\xff", "Image 0"),
        (b"GIF89a", "Image 0"),
    ],
)
def test_a_single_image_that_cannot_be_read_is_refused_with_the_reason(
    client: TestClient, data: bytes, says: str
) -> None:
    answer = client.post(PATH, params=MODEL, content=data, headers={"Content-Type": "image/png"})
    assert answer.status_code == 422 and says in answer.json()["error"]


@pytest.mark.parametrize(
    "text, says",
    [
        ("%%%", "is not base64"),
        ("", "0 bytes"),
        ("äöü", "is not base64"),
        ("http://127.0.0.1:8600/alive", "fetches nothing"),
        ("file:///etc/passwd", "fetches nothing"),
    ],
)
def test_a_text_that_is_no_base64_of_an_image_is_refused(client: TestClient, text: str, says: str) -> None:
    answer = client.post(PATH, json={**MODEL, "images": [text]})
    assert answer.status_code == 422 and says in answer.json()["error"]


@pytest.mark.parametrize(
    "body, kind, code, says",
    [
        (b"", None, 415, "Content-Type none"),
        (b"hello", "text/plain", 415, "multipart/form-data"),
        (b"hello", "application/x-www-form-urlencoded", 415, "is not read"),
        (b"", "multipart/form-data", 422, "boundary"),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 422, "holds no image"),
        (b"--b\r\nnonsense", "multipart/form-data; boundary=b", 422, "form"),
        (b"x", "multipart/form-data; boundary=b", 422, "form"),
        (
            b'--b\r\nContent-Disposition: form-data; name="i"; filename="a"\r\n\r\nabc',
            "multipart/form-data; boundary=b",
            422,
            "ends before",
        ),
        (b"", "application/json", 422, "no JSON ("),
        (b"[" * 100_000, "application/json", 422, "no JSON ("),
        (b"{}", "application/json", 422, "images: Field required"),
        (b'{"images": []}', "application/json", 422, "images: "),
        (b'{"images": [1]}', "application/json", 422, "images.0: "),
        (b'{"images": ["a"], "url": "x"}', "application/json", 422, "url: Extra"),
        (b'{"images": ["a"], "confidence": NaN}', "application/json", 422, "confidence: "),
        (b'{"images": ["a"], "model": "\\ud800"}', "application/json", 422, "no JSON ("),
        (b"[" + b"0," * 500_000 + b"0]", "application/json", 413, "128 images at most"),
    ],
)
def test_a_body_that_is_not_as_it_should_be_is_one_sentence(
    client: TestClient, body: bytes, kind: str | None, code: int, says: str
) -> None:
    answer = client.post(PATH, content=body, headers={"Content-Type": kind} if kind else {})
    assert answer.status_code == code and says in answer.text and list(answer.json()) == ["error"]


@pytest.mark.parametrize(
    "settings, code, says",
    [
        ({"confidence": "nan"}, 422, "confidence: "),
        ({"confidence": 2}, 422, "confidence: "),
        ({"confidence": -1}, 422, "confidence: "),
        ({"confidence": "inf"}, 422, "confidence: "),
        ({"max_detections": 0}, 422, "max_detections: "),
        ({"url": "http://a"}, 422, "url: Extra"),
        ({"stream": "a\r\nSet-Cookie: b"}, 422, "stream: "),
        ({"model": "absent@1"}, 404, "absent@1 is not registered"),
        ({"model": "../../etc@1"}, 422, "must read name@version"),
        ({"model": "a\r\nX: y@1"}, 422, "must read name@version"),
        ({"dataset": "a\r\nX: y"}, 404, "no deployed model"),
    ],
)
def test_a_wrong_setting_is_named_in_the_query_and_in_a_form(
    client: TestClient, settings: dict[str, Any], code: int, says: str
) -> None:
    queried = client.post(PATH, params=settings, content=png(picture(1)), headers={"Content-Type": "image/png"})
    in_form = client.post(
        PATH, data={name: str(value) for name, value in settings.items()}, files=parts(png(picture(1)))
    )
    for answer in (queried, in_form):
        assert answer.status_code == code and says in answer.json()["error"]
        assert "set-cookie" not in answer.headers and "x" not in answer.headers


def test_a_caller_s_name_of_an_image_stays_text(client: TestClient) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="i"; filename="a\x1b[2J\tb%0d%0aX: y.png"\r\n\r\nno image\r\n'
        b'--b\r\nContent-Disposition: form-data; name="i"; filename="\xff\xfe"\r\n\r\nno image\r\n--b--\r\n'
    )
    answer = client.post(PATH, params=MODEL, content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 200 and "x" not in answer.headers
    assert "a?[2J?b" in answer.json()["images"][0]["error"] and "\x1b" not in answer.json()["images"][0]["error"]


def test_ten_thousand_images_in_one_request_are_too_many(client: TestClient) -> None:
    tiny = png(np.zeros((1, 1, 3), np.uint8))
    form = client.post(PATH, params=MODEL, files=parts(*[tiny] * 10_000))
    in_json = client.post(PATH, json={**MODEL, "images": [base64.b64encode(tiny).decode()] * 10_000})
    for answer in (form, in_json):
        assert answer.status_code == 413 and "128 images at most" in answer.json()["error"]


def test_a_body_beyond_the_limit_is_refused_with_and_without_a_length(client: TestClient) -> None:
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        for _ in range(64):
            read += 1 << 20
            yield bytes(1 << 20)

    said = client.post(PATH, params=MODEL, content=bytes(3 << 20), headers={"Content-Type": "image/png"})
    unsaid = client.post(PATH, params=MODEL, content=endless(), headers={"Content-Type": "image/png"})
    for answer in (said, unsaid):
        assert answer.status_code == 413 and "larger than the 2 MiB" in answer.json()["error"]
    assert boxes(client.post(PATH, params=MODEL, files=parts(png(picture(1))))) == [[box(1)]]


def test_fifty_callers_of_a_small_queue_get_their_own_answer_or_are_told_when_to_come_back(
    workbench: Workbench,
) -> None:
    with TestClient(create(replace(workbench.config, predict_queue=4)), base_url="http://127.0.0.1") as client:

        def call(number: int) -> tuple[int, int]:
            column, row, refused = number % 8, number // 8, 0
            while True:
                answer = client.post(PATH, params=MODEL, files=parts(png(picture(column, row))))
                if answer.status_code != 429:
                    assert boxes(answer) == [[box(column, row)]]
                    return number, refused
                refused += 1
                assert 1 <= int(answer.headers["Retry-After"]) <= 120 and "Ask again in" in answer.json()["error"]

        with ThreadPoolExecutor(50) as pool:
            done = list(pool.map(call, range(50)))
        assert [number for number, _ in done] == list(range(50))
        told = samples(client)
        assert told['workbench_predict_requests_total{code="200",model="finder@1"}'] == 50
        refused = sum(refusals for _, refusals in done)
        assert told.get('workbench_predict_rejected_total{full="queue"}', 0) == refused
        assert told['workbench_predict_images_total{model="finder@1",result="ok"}'] == 50
        assert told["workbench_predict_queue_images"] == 0


def test_metrics_count_images_batches_and_times_but_no_names_that_callers_make_up(client: TestClient) -> None:
    client.post(PATH, files=parts(png(picture(1)), b"no image"), data=MODEL)
    for number in range(3):
        client.post(PATH, params={"model": f"made-up@{number}"}, files=parts(png(picture(1))))
    client.post(PATH, params={"confidence": 7})
    told = samples(client)
    assert told['workbench_predict_images_total{model="finder@1",result="failed"}'] == 1
    assert told['workbench_predict_requests_total{code="404",model=""}'] == 3
    assert told['workbench_predict_requests_total{code="422",model=""}'] == 1
    assert told['workbench_predict_batch_images_bucket{le="1.0",model="finder@1"}'] == 1
    for stage in ("decode", "wait", "infer"):
        assert told[f'workbench_predict_seconds_count{{model="finder@1",stage="{stage}"}}'] == 2
    assert not [name for name in told if "made-up" in name]


def test_predict_asks_for_the_token_before_it_reads(workbench: Workbench) -> None:
    with TestClient(create(replace(workbench.config, service_token="secret")), base_url="http://127.0.0.1") as client:
        sent = {"params": MODEL, "files": parts(png(picture(1)))}
        refused = client.post(PATH, **sent)
        assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        assert boxes(client.post(PATH, **sent, headers={"Authorization": "Bearer secret"})) == [[box(1)]]


def test_an_int8_model_without_a_certificate_is_refused_with_the_next_step(
    client: TestClient, workbench: Workbench
) -> None:
    card = workbench.models.card("finder@1")
    workbench.models.register(
        replace(card, version="1-int8", quantization={"from": "finder@1"}), workbench.models.folder("finder@1")
    )
    answer = client.post(PATH, params={"model": "finder@1-int8"}, files=parts(png(picture(1))))
    assert answer.status_code == 422 and "certif" in answer.json()["error"]
    assert boxes(client.post(PATH, params=MODEL, files=parts(png(picture(1))))) == [[box(1)]]


def test_tags_have_no_box_and_polygons_their_outline(workbench: Workbench) -> None:
    card = SimpleNamespace(task="tags", labels=workbench.models.card("finder@1").labels)
    found = Detections([[0, 0, 9, 9], [1, 1, 5, 5]], [0, 1], [0.5, 0.75])
    assert _objects(card, found, None, None) == [
        {"label": "blue", "xyxy": None, "confidence": 0.75, "track": None, "polygon": None},
        {"label": "red", "xyxy": None, "confidence": 0.5, "track": None, "polygon": None},
    ]
    card.task = "polygons"
    outlined = replace(found, polygons=(np.array([[0, 0], [9, 0], [9, 9]]), np.array([[1, 1], [5, 1], [5, 5.126]])))
    (first,) = _objects(card, outlined, np.array([0, 3]), 1)
    assert first == {
        "label": "blue",
        "xyxy": [1, 1, 5, 5],
        "confidence": 0.75,
        "track": 3,
        "polygon": [[1, 1], [5, 1], [5, 5.13]],
    }


def test_tracks_are_refused_where_several_processes_would_mix_them_up(workbench: Workbench) -> None:
    with TestClient(create(replace(workbench.config, service_workers=2)), base_url="http://127.0.0.1") as client:
        answer = client.post(PATH, params={**MODEL, "stream": "door"}, files=parts(png(picture(1))))
        assert answer.status_code == 409 and "service_workers to 1" in answer.json()["error"]


def test_the_service_describes_itself_as_openapi(client: TestClient) -> None:
    told = client.get("/openapi.json").json()
    validate(told)
    predict = told["paths"][PATH]["post"]
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "image/*", "application/json"}
    assert {"200", "401", "404", "413", "415", "422", "429", "503"} <= set(predict["responses"])
    assert "Retry-After" in predict["responses"]["429"]["headers"] and predict["security"] == [{"HTTPBearer": []}]
    assert {one["name"] for one in predict["parameters"]} == {
        "model",
        "dataset",
        "confidence",
        "max_detections",
        "stream",
    }
    example = told["components"]["schemas"]["Predictions"]["examples"][0]
    Predictions.model_validate(json.loads(json.dumps(example)))
