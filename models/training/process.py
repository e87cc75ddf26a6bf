"""How a recipe's train.py starts: its parameters, one process a GPU through torchrun, one readable line for an error."""
import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from training.errors import TrainingError
from training.output import say

# Idle OpenMP threads sleep instead of spinning: beside another busy process a step is several times faster.
# It has to be set before torch is imported, so a recipe imports this module first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def whole(text: str) -> int:
    """MLflow passes numbers as text, 20 may arrive as "20.0"."""
    return int(float(text))


def parser(description: str) -> argparse.ArgumentParser:
    """The parameters every recipe has; a recipe adds its own and changes defaults with `set_defaults`."""
    made = argparse.ArgumentParser(description=description.split("\n")[0])
    add = made.add_argument
    add("--data", type=Path, required=True, help="folder with frames/, train.json, val.json, test.json, dataset.json")
    add("--output", type=Path, required=True, help="folder for checkpoint, model.onnx, card.json, metrics.json, plots")
    add("--epochs", type=whole, default=20,
        help="passes over the training frames; the most there are under a time limit")
    add("--batch_size", type=whole, default=8, help="frames of a step, over all processes")
    add("--lr", type=float, default=1.5e-3, help="peak learning rate of what is not the backbone (AdamW)")
    add("--lr_backbone", type=float, default=4e-4, help="peak learning rate of the backbone")
    add("--seed", type=whole, default=0)
    add("--freeze", type=whole, default=0, help="stages of the backbone, counted from the image, that do not learn")
    add("--base_weights", default="none",
        help="checkpoint.pt or weights.pt of this recipe to start from; class heads are matched by label name")
    add("--time_limit_s", type=float, default=0, help="soft budget in seconds that shortens the schedule; 0: none")
    add("--patience", type=whole, default=0,
        help="stop after so many epochs without a better validation figure; 0: never")
    add("--holdout", type=float, default=0.15, help="share of train kept for validation when val.json is absent; 0: none")
    add("--plain_tail", type=float, default=0.25, help="last share of the training with gentle augmentation only")
    add("--threads", type=whole, default=0, help="CPU threads; 0: one per core this process may use")
    add("--processes", type=whole, default=0, help="processes under torchrun; 0: one a GPU, one without GPUs")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
        help="number format of the forward pass; auto: bf16 or fp16 on a GPU, float32 on a CPU")
    add("--name", default="none", help="the model's name in card.json; none: the data set's name")
    return made


def main(arguments: list[str] | None, options_of: argparse.ArgumentParser, train: Callable[[argparse.Namespace], dict],
         script: str) -> int:
    """Parses the command line and trains; 0 when done, 1 with one readable line on stderr when it cannot.

    script  the recipe's train.py (`__file__`): it is started again under torchrun for several processes, which then
            replaces this process
    """
    given = sys.argv[1:] if arguments is None else arguments
    options = options_of.parse_args(given)
    try:
        _launch(options, given, script)
        _keep_freed_memory()
        from training import distributed

        with distributed.joined(options):
            train(options)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _launch(options: argparse.Namespace, arguments: list[str], script: str) -> None:
    if "WORLD_SIZE" in os.environ:  # torchrun started this one
        _end_with(os.getppid())
        return
    import torch

    count = options.processes or (torch.cuda.device_count() if torch.cuda.is_available() else 1)
    if count <= 1:
        return
    if options.batch_size < count:
        raise TrainingError(f"batch_size {options.batch_size} gives some of the {count} processes no frame; raise it or "
                            f"set processes to at most {options.batch_size}.")
    say(f"{count} processes through torchrun")
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              f"--nproc-per-node={count}", str(Path(script).resolve()), *arguments])


def _end_with(parent: int) -> None:
    """The kernel ends this process when torchrun is killed, so that no half of a training goes on (Linux, prctl(2))."""
    try:
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        sys.exit(1)


def _keep_freed_memory() -> None:
    """Tells glibc to reuse big buffers instead of giving them back after each operation: their page faults cost
    nearly a third of a training step (measured 1.05 -> 0.74 CPU seconds / 2). Elsewhere than on glibc it does nothing."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
    except (OSError, AttributeError):
        return
