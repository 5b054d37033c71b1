# SPDX-License-Identifier: MIT
"""torchattacks' contract, kept with care: settings are checked, and models are restored."""

from __future__ import annotations

import copy
import difflib
import functools
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from captum_adv2.interpreters.base import eval_mode
from captum_adv2.spec import expect

_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


@contextmanager
def lent(attack: Attack, *, targeted: bool) -> Iterator[None]:
    """Give an attack of any library images in [0, 1] and classes, or labels to move away from.

    Its settings, and those of the attacks that it is made of, are as before at the end.
    """
    if targeted and "targeted" not in attack.supported_mode:
        name = type(attack).__name__
        raise ValueError(f"expected an attack that can be targeted, got {name}")
    every = [attack, *attack._attacks.values()]
    before = [dict(vars(each)) for each in every]
    try:
        for each in every:
            each.attack_mode, each.targeted = "default", False  # its setter would print
            if each._normalization_applied:
                each._normalization_applied = False
        if targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        yield
    finally:
        for each, settings in zip(every, before, strict=True):
            vars(each).clear()
            vars(each).update(settings)


class CarefulAttack(Attack, ABC):  # type: ignore[misc]  # torchattacks is untyped
    """An attack of torchattacks that checks its settings, and restores the model after a call."""

    _closed = False  # whether all attributes have been set once, so that a new one is a mistake

    def __init__(self, name: str, model: nn.Module) -> None:
        """Make an attack; the arguments are those of its class, which describes them."""
        super().__init__(name, model)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; check it where the class has an annotation for it."""
        hints = _hints(type(self))
        if name in hints:
            expect(value, hints[name], name)
        elif self._closed and name[0] != "_" and not hasattr(self, name):
            near = difflib.get_close_matches(name, hints)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(f"expected a setting of {type(self).__name__}, got {name}{hint}")
        if "_attacks" in vars(self):
            super().__setattr__(name, value)
        else:  # torchattacks is not set up yet
            object.__setattr__(self, name, value)

    def _close(self) -> None:
        """Refuse new attributes from now on; a subclass that announces none may have its own."""
        kind = type(self)
        self._closed = "__dataclass_fields__" in vars(kind) or hasattr(kind, "__final__")

    def __repr__(self) -> str:
        """Return the settings in one line, as torchattacks does, the same in every process."""
        shown = copy.copy(self)
        for name in ("generator", "callback"):  # printed as addresses
            shown.__dict__.pop(name, None)
        return str(Attack.__repr__(shown))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return adversarial images; model and attack are left as they were."""
        with self._restored():
            adversarial: Tensor = super().__call__(*args, **kwargs)
        return adversarial

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Attack a data loader and save the result, as in torchattacks; the model is restored."""
        with self._restored():
            return super().save(*args, **kwargs)

    @torch.no_grad()
    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """Return logits in eval mode; each module's mode is restored."""
        with eval_mode(self.model):
            logits: Tensor = self.get_logits(inputs)
        return logits

    def _change_model_mode(self, given_training: bool) -> None:
        """Leave eval mode to `_restored`, and train mode to torchattacks."""
        if self._model_training:
            super()._change_model_mode(given_training)

    def _recover_model_mode(self, given_training: bool) -> None:
        """Leave this to `_restored`."""

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Restore each module's mode, and the state of the normalisation, at the end."""
        applied = self._normalization_applied
        try:
            with eval_mode(self.model, switch=not self._model_training):
                yield
        finally:
            self._set_normalization_applied(applied)
