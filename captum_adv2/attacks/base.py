# SPDX-License-Identifier: MIT
"""torchattacks' contract, kept with care: settings are checked, and models are restored."""

from __future__ import annotations

import copy
import functools
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torchattacks.attack import Attack

from captum_adv2.interpreters.base import eval_mode
from captum_adv2.spec import expect

_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


class CarefulAttack(Attack, ABC):  # type: ignore[misc]  # torchattacks is untyped
    """An attack of torchattacks that checks its settings, and restores the model after a call."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; check it where the class has an annotation for it."""
        hint = _hints(type(self)).get(name)
        if hint is not None:
            expect(value, hint, name)
        super().__setattr__(name, value)

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

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Restore each module's mode, and the state of the normalisation, at the end."""
        applied = self._normalization_applied
        try:
            with eval_mode(self.model, switch=not self._model_training):
                yield
        finally:
            self._set_normalization_applied(applied)
