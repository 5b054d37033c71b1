# SPDX-License-Identifier: MIT
"""Reading feature maps off a forward pass, without a change to the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Self, TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["ModuleTap", "Side", "own_hook"]

Side: TypeAlias = Literal["input", "output"]


def own_hook(module: nn.Module, side: Side, function: Callable[..., Any]) -> RemovableHandle:
    """Hook a module's forward pass for the running thread alone: others may use the model too.

    Args:
        module: Where.
        side: Before the module runs, or after it.
        function: What PyTorch calls, as ``register_forward_pre_hook`` or ``register_forward_hook``
            would have it.
    """
    thread = threading.get_ident()

    def own(*args: Any) -> Any:
        return function(*args) if threading.get_ident() == thread else None

    if side == "input":
        return module.register_forward_pre_hook(own)
    return module.register_forward_hook(own)


class ModuleTap(AbstractContextManager["ModuleTap"]):
    """Keeps what goes into or comes out of one module, by a hook gone when the context is left."""

    features: Tensor | None = None

    def __init__(self, module: nn.Module, side: Side) -> None:
        self._module = module
        self._side: Side = side

    def __enter__(self) -> Self:
        keep = self._keep_input if self._side == "input" else self._keep_output
        self._handle = own_hook(self._module, self._side, keep)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handle.remove()

    def _keep_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.features = inputs[0]

    def _keep_output(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        self.features = output
        # What follows may work in place (DenseNet's last ReLU does): it gets a copy.
        return output.clone()
