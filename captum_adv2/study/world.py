# SPDX-License-Identifier: MIT
"""The processes that share a study's work, as PyTorch's launcher ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = ["World"]


class World(NamedTuple):
    """The processes that share the work, as PyTorch's launcher started them, or this one alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[World]:
        """Join the others, if any; leave them at the end."""
        if not dist.is_torchelastic_launched():
            yield cls()
            return
        # NCCL wants a GPU for each process, and to know which.
        gpus = torch.cuda.device_count()
        backend = "nccl" if int(os.environ["LOCAL_WORLD_SIZE"]) <= gpus else "gloo"
        if gpus:
            torch.cuda.set_device(cls().device)
        dist.init_process_group(backend, timeout=timedelta(days=30))  # the slowest may take long
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()

    @property
    def device(self) -> torch.device:
        """A GPU of its own for each process of a machine, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local % torch.cuda.device_count())

    def share(self, value: Any) -> Any:
        """Return the first process's value to all; they wait for each other."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
