"""How good the student gets in a given time: the recipe on the train and val pictures of a data set, scored on its test list.

Prints the recipe's own log, then one JSON line: map_50_95, map_50, train_minutes (wall), cpu_minutes_of_2_cores (process
time / 2: what a quiet 2-core machine would need), epochs, and the curve where a val split is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from workbench.formats import read_labeled_folder
from workbench.formats.checkout import coco_document

PROJECT = Path(__file__).resolve().parent.parent
RECIPE = PROJECT / "models" / "efficientnet_lite0_fcos"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared" / "data" / "bccd",
                        help="a labelled COCO, YOLO or VOC folder with a test list")
    parser.add_argument("--minutes", type=float, default=30, help="budget of the training on the wall clock; 0: none")
    parser.add_argument("--output", type=Path, help="keep the training here and go on from its checkpoint")
    parser.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the recipe")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data, output = Path(scratch) / "data", options.output or Path(scratch) / "output"
        _lay_out(options.data.resolve(), data)
        params = {"epochs": 400, "holdout": 0, "time_limit_s": round(options.minutes * 60),
                  **dict(one.split("=", 1) for one in options.param)}
        if not options.minutes:
            del params["time_limit_s"]
            params["epochs"] = dict(one.split("=", 1) for one in options.param).get("epochs", 36)
        command = [sys.executable, "train.py", "--data", str(data), "--output", str(output.resolve())]
        for name, value in params.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, cwd=RECIPE, check=True)
        metrics = json.loads((output / "metrics.json").read_text())
        history = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    print(json.dumps({
        "map_50_95": metrics["test"]["map_50_95"], "map_50": metrics["test"]["map_50"], "epochs": metrics["epochs"],
        "train_minutes": round(metrics["train_s"] / 60, 1),
        "cpu_minutes_of_2_cores": round(metrics["train_cpu_s"] / 120, 1), "params": params,
        "curve": [[row["epoch"], row["map_50_95"], row["map_50"]] for row in history if row.get("map_50") is not None]}))


def _lay_out(source: Path, data: Path) -> None:
    """What a recipe gets as `data`: the pictures under frames/, train.json with train and val, test.json."""
    taxonomy, frames = read_labeled_folder(source)
    frames = [one for one in frames if one.annotations is not None]
    files = {path.name: path for path in source.rglob("*") if path.is_file()}
    for one in frames:
        link = data / "frames" / one.frame.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(files[Path(one.frame.name).name])
    for name, splits in (("train", ("train", "val", None)), ("test", ("test",))):
        document = coco_document(taxonomy, [one for one in frames if one.split in splits], first_category=0)
        (data / f"{name}.json").write_text(json.dumps(document))
    (data / "dataset.json").write_text(json.dumps({"ref": source.name, "digest": ""}))


if __name__ == "__main__":
    main()
