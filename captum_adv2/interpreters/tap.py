# SPDX-License-Identifier: MIT
"""Feature maps of a forward pass, read without changing the model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn


class Tap:
    """The input or output of a module when it last ran; ``None`` where it has not run."""

    features: Tensor | None = None


@contextmanager
def tapped(module: nn.Module, side: Literal["input", "output"]) -> Iterator[Tap]:
    """Keep the input or output of a module, by a hook that is removed on leaving the context."""
    tap = Tap()

    def keep_input(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        tap.features = inputs[0]
        return (inputs[0].clone(), *inputs[1:])  # the module may work in place

    def keep_output(module: nn.Module, inputs: Any, output: Any) -> Any:
        tap.features = output if isinstance(output, Tensor) else None
        # The next layer may work in place (DenseNet's last ReLU does): it gets a copy.
        return output.clone() if isinstance(output, Tensor) else None

    if side == "input":
        handle = module.register_forward_pre_hook(keep_input)
    else:
        handle = module.register_forward_hook(keep_output)
    with handle:
        yield tap


def find_module(model: nn.Module, layer: nn.Module | str) -> nn.Module:
    """Return a module of ``model``, given as the module or by its dotted name."""
    modules = dict(model.named_modules())
    if isinstance(layer, str) and layer not in modules:
        near = ", ".join(difflib.get_close_matches(layer, modules, n=4, cutoff=0.4))
        hint = f"near names: {near}" if near else "see model.named_modules()"
        raise ValueError(f"expected layer to name a module, got {layer!r}; {hint}")
    found = modules[layer] if isinstance(layer, str) else layer
    if found not in modules.values():
        raise ValueError("expected layer to be a module of the model; pass its dotted name")
    return found
