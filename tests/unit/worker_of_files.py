"""A worker process with three small kinds of jobs that leave a trace in files: `python worker_of_files.py HOME`.

Its settings are in the environment, as a worker's on another machine; HOME is one folder that all of them see.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.config import Config
from workbench.errors import Invalid
from workbench.jobs import Jobs
from workbench.ports import Job
from workbench.records import open_database


def main(home: Path) -> None:
    config = Config.read(home)

    def count(args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Appends 0..n-1 to a file, each once whatever happens: what a repeatable step is."""
        file = home / f"{job.id}.count"
        for number in range(len(file.read_text().split()) if file.exists() else 0, args["n"]):
            job.check()
            with file.open("a") as output:
                output.write(f"{number}\n")
            job.progress(number + 1, args["n"], f"number {number}")
            job.fail_item("an item", "is odd")
            time.sleep(args.get("pause_s", 0.02))
        return {"counted": args["n"], "by": args["person"]}

    def overlap(args: dict[str, Any], job: Job) -> dict[str, Any]:
        """Fails when another process is in the same job at the same time."""
        with (home / f"{job.id}.begun").open("a") as output:
            output.write(f"{os.getpid()}\n")
        inside = home / f"{job.id}.inside"
        inside.touch(exist_ok=False)
        time.sleep(args["s"])
        inside.unlink()
        return {}

    def fail(args: dict[str, Any], job: Job) -> dict[str, Any]:
        with (home / "failed.count").open("a") as output:
            output.write(".")
        if args["how"] == "die":
            os._exit(9)
        if args["how"] == "answer":
            return {"not JSON": {1, 2}}
        raise {"invalid": Invalid("The box leaves the frame. Draw it again."), "unforeseen": KeyError("colour"),
               "exit": SystemExit(3)}[args["how"]]

    jobs = Jobs(config, open_database(config.database))

    def end_here(is_stray: Callable[[str], bool]) -> None:
        with (home / f"{os.getpid()}.ended").open("a") as output:
            output.writelines(f"{file.stem}\n" for file in home.glob("*.count") if is_stray(file.stem))

    jobs.work({"count": count, "overlap": overlap, "fail": fail, "retrain": count}, end_here=end_here)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
