"""The processes that train one model together, as torchrun starts them; a process alone is one of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

import torch
from torch import distributed

from eamdeploy.errors import ConfigError

_Result = TypeVar("_Result")
_PATIENCE: Final = timedelta(days=1)  # the others wait while the first process works alone


@dataclass(frozen=True)
class Processes:
    """This process among others.

    Attributes:
        rank: its number, from 0.
        count: of all of them.
        device: where it computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Every tensor, of floating point, is the sum of what it is in all processes."""
        if self.count == 1 or not tensors:
            return
        joined = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(joined)
        for tensor, part in zip(tensors, torch.split(joined, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def from_first(self, work: Callable[[], _Result]) -> _Result:
        """What `work` gives in the first process, which alone does it."""
        if self.count == 1:
            return work()
        found = [work() if self.is_first else None]
        distributed.broadcast_object_list(found, device=self.device)
        return found[0]  # type: ignore[return-value]  # the first process put a result there


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """Inside the block, the processes that torchrun started work together; without torchrun there is one.

    Args:
        device: `auto`, `cpu` or `cuda`; `auto` is a GPU where torch finds one.

    Raises:
        ConfigError: torch finds no GPU and `cuda` is asked for, or it finds fewer than there are processes here.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if count == 1:
        yield Processes(0, 1, chosen)
        return
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(rank, count, chosen)
    finally:
        distributed.destroy_process_group()


def _device(name: str, number: int) -> torch.device:
    gpus = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if number >= gpus:
        raise ConfigError(
            "cannot train on a GPU",
            expected=f"{number + 1} that torch can use: one for each process",
            got=gpus,
            hint="Train on the CPU with --device cpu, or start fewer processes.",
        )
    return torch.device("cuda", number)
