# SPDX-License-Identifier: MIT
"""Reading feature maps off a forward pass, without a change to the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Side", "Tap", "own_hook", "tapped"]

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


class Tap:
    """What went into or came out of a module when it last ran; ``None`` where it did not."""

    features: Tensor | None = None


@contextmanager
def tapped(module: nn.Module, side: Side) -> Iterator[Tap]:
    """Keep what goes into or comes out of a module, by a hook gone when the context is left."""
    tap = Tap()

    def keep_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tap.features = inputs[0]

    def keep_output(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        tap.features = output
        # What follows may work in place (DenseNet's last ReLU does): it gets a copy.
        return output.clone()

    keep = keep_input if side == "input" else keep_output
    # One line: an interrupt finds no hook, or one that is removed.
    with ExitStack() as stack:
        stack.callback(own_hook(module, side, keep).remove)
        yield tap
