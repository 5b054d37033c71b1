# SPDX-License-Identifier: MIT
"""Reading feature maps off a forward pass, without a change to the model."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any, Literal, Self

from torch import Tensor, nn

__all__ = ["ModuleTap"]


class ModuleTap(AbstractContextManager["ModuleTap"]):
    """Keeps what goes into or comes out of one module, by a hook gone when the context is left."""

    features: Tensor | None = None

    def __init__(self, module: nn.Module, side: Literal["input", "output"]) -> None:
        self._module = module
        self._side = side
        self._thread = threading.get_ident()

    def __enter__(self) -> Self:
        if self._side == "input":
            self._handle = self._module.register_forward_pre_hook(self._keep_input)
        else:
            self._handle = self._module.register_forward_hook(self._keep_output)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handle.remove()

    def _keep_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if threading.get_ident() == self._thread:
            self.features = inputs[0]

    def _keep_output(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if threading.get_ident() != self._thread or not isinstance(output, Tensor):
            return None
        self.features = output
        # What follows may work in place (DenseNet's last ReLU does): it gets a copy.
        return output.clone()
