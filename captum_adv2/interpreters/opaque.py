# SPDX-License-Identifier: MIT
"""An interpreter that is known by its maps alone: any function, for attacks without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from captum_adv2.interpreters.base import Explanation, Interpreter, min_max
from captum_adv2.interpreters.captum import REDUCTIONS, Reduction
from captum_adv2.spec import Maps, checked, doubt, expect


@final
class Opaque(Interpreter):
    """Any function of images and classes as an interpreter whose maps have no gradient.

    It serves what `CaptumInterpreter` refuses and attacks without gradients do not need: methods
    that cut the graph, draw anew at each call, or run outside PyTorch. `ADV2` refuses it.

    Convention:
        Reduced over channels and min-max scaled per image; with ``reduce=None`` the function's own
        maps, in [0, 1].

    Args:
        model: The classifier explained.
        function: ``function(images, target=classes)``, such as a Captum method's ``attribute``;
            returns attributions ``(B, C, h, w)``.
        reduce: See `CaptumInterpreter`.
        **kwargs: Further arguments of the function.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> dark = Opaque(model, lambda images, target: 1 - images)
    >>> dark(torch.rand(2, 1, 4, 4), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 4, 4])
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Tensor],
        reduce: Reduction | None = "abs-max",
        **kwargs: Any,
    ) -> None:
        super().__init__(model)
        self.function, self.reduce, self._kwargs = function, reduce, kwargs
        self.scaled = reduce is not None  # type: ignore[misc]  # of this object

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """See `Interpreter`; the maps carry no graph."""
        with torch.enable_grad():  # the function's own
            copies = images.detach().clone()  # the function may work in place
            inputs = self.prepare(copies.requires_grad_())
            attributions = self.function(inputs, target=target, **self._kwargs)
        tensor = isinstance(attributions, Tensor)
        if not tensor or attributions.ndim != 4 or len(attributions) != len(images):
            got = tuple(attributions.shape) if tensor else type(attributions).__name__
            wanted = f"attributions, a tensor ({len(images)}, C, h, w)"
            raise ValueError(f"expected the function to return {wanted}, got {got}")
        attributions = attributions.detach()
        if broken := int((~attributions.isfinite()).flatten(1).any(dim=1).sum()):
            doubt(f"the function's attributions of {broken} of {len(images)} images are not finite")
        if self.reduce is None:
            expect(attributions, Maps, "the function's maps")
            return Explanation(attributions, None)
        reduce = REDUCTIONS[self.reduce] if isinstance(self.reduce, str) else self.reduce
        return Explanation(min_max(reduce(attributions)), None)
