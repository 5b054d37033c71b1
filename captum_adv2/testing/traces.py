# SPDX-License-Identifier: MIT
"""What a call may leave behind on a model, on tensors or in the process."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module | None, *tensors: Tensor) -> Iterator[None]:
    """Assert that a block leaves a model, tensors and the process as they were.

    That is: weights, buffers, gradients, hooks, flags and attributes of every module; values,
    gradients and flags of the tensors; the global random generators; gradient mode, default dtype
    and autocast. An exception in the block is passed on.

    >>> with unchanged(nn.Linear(2, 2)):
    ...     torch.get_rng_state()[0].item() >= 0
    True
    """
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    before = _traces(model, tensors, cuda)
    yield
    after = _traces(model, tensors, cuda)
    changed = [key for key in before | after if not _same(before.get(key), after.get(key))]
    if changed:
        names = ", ".join(changed[:3] + ["..."] * (len(changed) > 3))
        raise AssertionError(f"expected everything to be as before, got a change of {names}")


def _traces(model: nn.Module | None, tensors: tuple[Tensor, ...], cuda: bool) -> dict[str, Any]:
    """Describe everything that a call might change, by name."""
    found: dict[str, Any] = {
        "random's generator": random.getstate(),
        "NumPy's generator": pickle.dumps(np.random.get_state()),  # noqa: NPY002  (only compared)
        "torch's generator": torch.get_rng_state(),
        "CUDA's generators": torch.stack(torch.cuda.get_rng_state_all()) if cuda else None,
        "the gradient mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
    }
    named = [(f"tensor {i}", tensor) for i, tensor in enumerate(tensors)]
    if model is not None:
        named += [*model.named_parameters(), *model.named_buffers()]
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                parts = value if isinstance(value, dict) else {key: value}
                ids = {part: id(held) for part, held in parts.items()}
                found[f"{name or 'the model'}.{key}"] = list(ids.items())  # in their order
    for name, tensor in named:
        gradient = tensor.grad if tensor.is_leaf else None
        flags = tensor.requires_grad, tensor._version, bool(tensor._backward_hooks)
        found[f"the values of {name}"] = tensor.detach().clone()
        found[f"the gradient of {name}"] = gradient is None or (id(gradient), gradient._version)
        found[f"the state of {name}"] = flags
    return found


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
