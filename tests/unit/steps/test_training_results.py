"""What a stranger's training leaves behind: read without being led astray, refused with one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from workbench.adapters.mlflow import MlflowTracker
from workbench.errors import Invalid
from workbench.steps.trained import log_epochs, results
from workbench.steps.training import Training

GOOD = {"model.onnx": b"onnx", "card.json": b"{}", "metrics.json": b'{"map_50": 0.5}', "history.jsonl": b'{"epoch": 1, "loss": 0.5}\n'}


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """One that ended well and left all it should."""
    training = Training(tmp_path / "trainings" / "job")
    training.output.mkdir(parents=True)
    for name, data in GOOD.items():
        (training.output / name).write_bytes(data)
    (training.folder / "exit").write_text("0")
    training.log.write_text("the last words\n")
    return training


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda output: (output / name).write_bytes(data) and None


def link(name: str, to: str) -> Callable[[Path], None]:
    def make(output: Path) -> None:
        (output / name).unlink()
        (output / name).symlink_to(to)
    return make


def sparse(name: str, size: int) -> Callable[[Path], None]:
    return lambda output: os.truncate(output / name, size)


def pipe(output: Path) -> None:
    (output / "metrics.json").unlink()
    os.mkfifo(output / "metrics.json")


def elsewhere(output: Path) -> None:
    output.rename(output.parent / "really")
    output.symlink_to(output.parent / "really")


def a_file(output: Path) -> None:
    output.rename(output.parent / "really")
    output.write_text("")


def test_what_a_good_training_leaves_is_taken(training: Training) -> None:
    assert results(training) == {"map_50": 0.5}


@pytest.mark.parametrize(("spoil", "told"), [
    (put("metrics.json", b'{"map_50": NaN}'), "metrics.json map_50 is nan: it did not learn"),
    (put("metrics.json", b'{"val": {"per_label": [{"ap": 1}, {"ap": -Infinity}]}}'), "metrics.json val per_label 1 ap is -inf"),
    (put("metrics.json", b'{"map_50": 1e999}'), "map_50 is inf"),
    (put("metrics.json", b'{"map_50": ' + b"9" * 400 + b"}"), "map_50 is 9999"),
    (put("metrics.json", b'{"map_50": ' + b"9" * 5000 + b"}"), "is not JSON"),
    (put("metrics.json", b"[1, 2]"), "is no JSON object"),
    (put("metrics.json", b'"text"'), "is no JSON object"),
    (put("metrics.json", b""), "is not JSON"),
    (put("metrics.json", b"\xff\xfe{}"), "is not JSON"),
    (put("metrics.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "is not JSON"),
    (sparse("metrics.json", 17 * 2**20), "metrics.json has 17 MiB, at most 16 are taken"),
    (link("metrics.json", "/etc/passwd"), "metrics.json is a link or no plain file"),
    (link("metrics.json", "card.json"), "metrics.json is a link or no plain file"),
    (link("metrics.json", "/dev/zero"), "metrics.json is a link or no plain file"),
    (pipe, "metrics.json is no plain file"),
    (put("history.jsonl", b'{"epoch": 1, "loss": NaN}\n{"epoch": 2, "loss": 0.1}\n'), "history.jsonl 0 loss is nan"),
    (put("history.jsonl", b'{"epoch": 1, "loss": 0.3}\n{"epoch": 2, "loss": Infinity}\n'), "history.jsonl 1 loss is inf"),
    (link("model.onnx", "/etc/shadow"), "model.onnx is a link or no plain file"),
    (link("model.onnx", "nowhere"), "model.onnx is a link or no plain file"),
    (sparse("model.onnx", 2049 * 2**20), "model.onnx has 2049 MiB, at most 2048 are taken"),
    (elsewhere, "is a link or no plain file"),
    (a_file, "left no model.onnx, card.json, metrics.json"),
    (lambda output: (output / "model.onnx").unlink(), "ended without an error but left no model.onnx in"),
])
def test_what_is_no_result_is_refused_with_the_file_and_the_reason(
        training: Training, spoil: Callable[[Path], None], told: str) -> None:
    spoil(training.output)
    with pytest.raises(Invalid) as refused:
        results(training)
    assert told in str(refused.value) and len(str(refused.value)) < 3000


def test_a_pipe_or_an_endless_device_instead_of_the_history_holds_nobody_up(training: Training) -> None:
    (training.output / "history.jsonl").unlink()
    (training.output / "history.jsonl").symlink_to("/dev/zero")
    assert training.history() == [] and results(training) == {"map_50": 0.5}


def test_a_training_that_was_killed_or_forged_its_end_has_failed(training: Training) -> None:
    for text, told in (("137", "was killed from outside"), ("3", "ended with exit code 3"), ("139", r"code 139 \(SIGSEGV\)"), ("well done", "ended with exit code 1")):
        (training.folder / "exit").write_text(text)
        with pytest.raises(Invalid, match=f"{told}(?s:.*)the last words"):
            results(training)


def test_the_limit_that_ended_a_training_is_what_it_failed_by(training: Training) -> None:
    training.write("limit.json", {"limit": "memory_mb", "value": 100, "used": 123.4, "processes": 2})
    with pytest.raises(Invalid, match=r"held 123 MiB of memory in 2 processes, its limit is 100 .*smaller batches(?s:.*)the last words"):
        results(training)


@pytest.mark.parametrize("text", ["[1]", "1", "", "{", '"x"', '{"limit": "nope"}', '{"limit": "wall_s"}', '{"limit": []}',
                                  '{"limit": "wall_s", "value": 1, "used": "x"}', "[" * 100_000, "\udce9"])
def test_a_limit_that_the_training_wrote_itself_is_told_in_one_sentence(training: Training, text: str) -> None:
    (training.folder / "limit.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Invalid, match="limit.json was written by something else than the workbench"):
        results(training)


def test_a_training_that_failed_without_a_word_is_said_to_have_printed_nothing(training: Training) -> None:
    training.log.write_text("\n \n")
    (training.folder / "exit").write_text("3")
    with pytest.raises(Invalid, match=r"exit code 3. The end of .*log.txt:\n\(it printed nothing\)"):
        results(training)


def test_metrics_of_any_name_reach_the_tracker_under_one_that_it_takes(training: Training, mlflow_url: str) -> None:
    row = {"epoch": 1, "mAP@0.5": 0.5, "loss(train)": 1, "a:b": 2, "../x": 3, "": 4, "ü": 5, "x" * 300: 6, "a\nb": 7, "/abs": 8,
           "c//d": 9, ".": 10, "e/../f": 11, "val/loss": 12, "lr %": 13, " g ": 14}
    (training.output / "history.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"epoch": 2, "mAP@0.5": 0.6}) + "\n")
    tracker = MlflowTracker(mlflow_url)
    run_id = tracker.start_run(training.folder.parent.parent.name, "named oddly", {})
    for _ in range(2):  # again adds nothing
        log_epochs(training, tracker, run_id)
    assert tracker.run(run_id)["metrics"] == {
        "mAP_0.5": 0.6, "loss_train_": 1, "a:b": 2, "x": 3, "ü": 5, "x" * 250: 6, "a_b": 7, "abs": 8, "c/d": 9, "e/f": 11,
        "val/loss": 12, "lr _": 13, "g": 14}
    assert tracker.history(run_id, "mAP_0.5") == [(1, 0.5), (2, 0.6)]


def test_of_a_failed_training_small_files_stay_and_links_lead_nowhere(training: Training, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("mine")
    (training.output / "checkpoint.pt").write_bytes(b"x" * 9 * 2**20)
    (training.output / "away").symlink_to(tmp_path / "precious")
    (training.folder / "data").symlink_to(tmp_path / "precious")
    training.clear(("data", "code"), keep_output=False)
    assert sorted(one.name for one in training.output.iterdir()) == ["away", "card.json", "history.jsonl", "metrics.json", "model.onnx"]
    assert (tmp_path / "precious/file").read_text() == "mine" and not (training.folder / "data").is_symlink()
    elsewhere(training.output)
    training.clear((), keep_output=False)
    assert not training.output.exists() and json.loads((training.folder / "really/metrics.json").read_text()) == {"map_50": 0.5}
