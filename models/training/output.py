"""What a training prints and how it writes files: whole or not at all."""
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

# When this process began, for the times in its log and for its time limit (time.monotonic()).
STARTED = time.monotonic()


def say(text: str) -> None:
    """Prints a line with the seconds since the process began; of several processes only the first one speaks."""
    if os.environ.get("RANK", "0") == "0":  # as torchrun numbers them
        print(f"[{time.monotonic() - STARTED:7.1f} s] {text}", flush=True)


def save(content: dict, file: Path) -> None:
    """torch.save beside the file, then a rename: a kill leaves the old or the new file, never half of one."""
    import torch

    partial = file.with_name(file.name + ".partial")
    torch.save(content, partial)
    partial.replace(file)


def write_text(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)


def write_json(file: Path, record: Any) -> None:
    write_text(file, json.dumps(record, indent=1, ensure_ascii=False))


def read_json(file: Path) -> dict | None:
    return json.loads(file.read_text()) if file.is_file() else None


def file_record(file: Path) -> dict:
    """{"sha256": hex, "size_bytes": int}, as a card notes a file."""
    return {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size_bytes": file.stat().st_size}
