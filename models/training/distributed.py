"""Device and processes of a training: one process alone, or several that torchrun started (gloo on CPUs, nccl on GPUs)."""
import argparse
import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# The others wait while the first process validates and writes; the library's own 10 minutes may be too few.
PATIENCE = datetime.timedelta(hours=2)


@contextlib.contextmanager
def joined(options: argparse.Namespace) -> Iterator[None]:
    """Sets threads and the random seed, and joins the other processes as long as it lasts."""
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    torch.manual_seed(options.seed)
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """This process' own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def place() -> tuple[int, int]:
    """(number of this process, number of processes); (0, 1) alone."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_first() -> bool:
    """Whether this process is the one that validates, writes and tracks."""
    return place()[0] == 0


def share(value: Any) -> Any:
    """What the first process gave, in every process; all have to call it."""
    if place()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=device())
    return box[0]


def wrapped(model: nn.Module) -> nn.Module:
    """The network whose gradients are averaged over the processes; the same network where there is one process."""
    if place()[1] == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device().index] if torch.cuda.is_available() else None)


def precision(amp: str) -> torch.dtype | None:
    """The autocast type for the parameter `amp`, None for float32. On a CPU "auto" is float32: bf16 was slower there
    (forward 0.29 s -> 0.17 s, backward 0.54 s -> 0.78 s)."""
    if amp == "auto":
        if not torch.cuda.is_available():
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
