# SPDX-License-Identifier: MIT
"""Forward passes that are watched, or run in another way, without changing the model."""

from __future__ import annotations

import difflib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_adv2.spec import doubt


class Mode(TorchFunctionMode, ABC):
    """A context in which each function of tensors is run by `run`."""

    @abstractmethod
    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return a function's value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})


class Tap:
    """The input or output of a module when it last ran; ``None`` where it has not run."""

    features: Tensor | None = None
    runs: int = 0  # in a row, of one shape

    def keep(self, value: Any) -> None:
        """Keep a value, and count runs."""
        features = value if isinstance(value, Tensor) else None
        again = getattr(features, "shape", 0) == getattr(self.features, "shape", 1)
        self.runs = 1 + self.runs * again
        self.features = features


@contextmanager
def graph_enabled() -> Iterator[None]:
    """Make operations record a graph, whatever the modes outside are."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def eagerly() -> Any:
    """Return a context in which compiled models run as they are written, with hooks and modes.

    PyTorch before 2.6 has none: there, hooks of a compiled model do not run.
    """
    # Importing Dynamo takes long, and where nothing has, nothing is compiled.
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None or "torch._dynamo" not in sys.modules:
        return nullcontext()
    return stance("force_eager")


@contextmanager
def tapped(module: nn.Module, side: Literal["input", "output"]) -> Iterator[Tap]:
    """Keep the input or output of a module, by a hook that is removed on leaving the context."""
    tap = Tap()

    def keep_input(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        tap.keep(inputs[0])
        return (inputs[0].clone(), *inputs[1:])  # the module may work in place

    def keep_output(module: nn.Module, inputs: Any, output: Any) -> Any:
        tap.keep(output)
        # The next layer may work in place (DenseNet's last ReLU does): it gets a copy.
        return output.clone() if isinstance(output, Tensor) else None

    if side == "input":
        handle = module.register_forward_pre_hook(keep_input)
    else:
        handle = module.register_forward_hook(keep_output)
    with handle, eagerly():
        yield tap


def warn_of_runs(layer: str, runs: int) -> None:
    """Warn where a layer runs more than once in a forward pass."""
    if runs > 1:
        doubt(f"{layer} runs {runs} times in a forward pass: its last output is explained")


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


def module_of(output: Tensor, model: nn.Module, run: Callable[[], object]) -> str | None:
    """Return the shortest name of a module that gives an output when a model runs once more."""
    names: list[str] = []
    with ExitStack() as stack, torch.no_grad(), eagerly():
        for name, module in model.named_modules():

            def note(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                same = isinstance(out, Tensor) and out.shape == output.shape
                if name and same and torch.allclose(out, output):
                    names.append(name)

            stack.enter_context(module.register_forward_hook(note))
        run()
    return min(names, key=len, default=None)
