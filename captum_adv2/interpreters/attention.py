# SPDX-License-Identifier: MIT
r"""Interpreters of vision transformers: attention rollout and class-specific relevance.

Both multiply the attention weights A of all blocks into how much the tokens that the head reads
take from each patch. Rollout joins the heads of a block, adds the identity for the residual
connection, and scales rows to sum 1. Relevance weights each head by the gradient of the logit,

.. math:: R = \prod_l (I + \mathrm{mean}_h (\partial z_c / \partial A_l \odot A_l)^+)

so that it depends on the class.

The model stays as it is: a `TorchFunctionMode` sees each call of attention, however it is written,
and computes fused ones in plain operations, which leave weights and have second derivatives. The
first pass at a size of images finds which tokens are patches (`tokens`), and which the head reads:
those rows of the last block's weights on which the logits depend.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from captum_adv2.interpreters import base
from captum_adv2.interpreters.features import Graph, Pass
from captum_adv2.interpreters.tap import Mode, eagerly, graph_enabled
from captum_adv2.interpreters.tokens import Layout
from captum_adv2.spec import Fraction, checked

_HOOKED = "expected no activation checkpointing, which runs attention again; turn it off"
_OTHER = "windowed, pooled or parallel attention has no such map; use GradCAM or Gradient"


class _Attention(Mode):
    """A context in which attention leaves its weights: as computed, and ``(B, heads, M, N)``."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[Tensor] = []
        self.weights: list[Tensor] = []
        self._stack = ExitStack()

    def __enter__(self) -> Any:
        with ExitStack() as stack:
            stack.enter_context(eagerly())
            stack.enter_context(disable_saved_tensors_hooks(_HOOKED))
            mode = super().__enter__()  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()
        return mode

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()
        if _HOOKED in str(error[1]):
            raise ValueError(_HOOKED) from error[1]

    def drop_all_but(self, used: tuple[int, ...]) -> None:
        """Forget all calls but those of some numbers."""
        self.computed = [self.computed[number] for number in used]
        self.weights = [self.weights[number] for number in used]

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """See `Mode`."""
        if func is F.scaled_dot_product_attention:
            weights, value = _explicit(*args, **kwargs)
            return self._keep(weights, weights) @ value
        if func is F.multi_head_attention_forward:
            return self._of_heads(args, kwargs)
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "softmax":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if result.ndim == 4 and dim in (-1, 3):
                self._keep(result, result)
        return result

    def _of_heads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Run `nn.MultiheadAttention`'s function along the path that returns weights."""
        run: Any = F.multi_head_attention_forward
        output, weights = run(
            *args, **kwargs | {"need_weights": True, "average_attn_weights": False}
        )
        # They are a view, outside the graph to the output, of those that were computed.
        self._keep(weights if weights._base is None else weights._base, weights)
        if not kwargs.get("need_weights", True):
            return output, None
        return output, weights.mean(dim=1) if kwargs.get("average_attn_weights", True) else weights

    def _keep(self, computed: Tensor, weights: Tensor) -> Tensor:
        self.computed.append(computed)
        self.weights.append(weights)
        return computed


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the weights of scaled dot-product attention ``(B, heads, M, N)``, and the values."""
    if dropout_p or is_causal or enable_gqa:
        raise ValueError(
            "expected attention without dropout, a causal mask and grouped heads, got dropout_p="
            f"{dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa}; {_OTHER}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query @ key.transpose(-2, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1), value


class _Tokens(NamedTuple):
    """What is known of the tokens in passes of images of a shape."""

    images: torch.Size
    weights: tuple[torch.Size, ...]  # of all calls of attention, without the batch
    used: tuple[int, ...]  # calls on which the logits depend: the blocks
    layout: Layout
    read: tuple[int, ...]  # queries of the last block on which the logits depend

    def maps(self, steps: list[Tensor], residual: bool = False) -> Tensor:
        """Return the maps ``(B, 1, h, w)`` of a product of blocks, each ``(B, M, N)``.

        With ``residual``, the identity is added to each of them but a pooling.
        """
        *steps, last = steps
        shares = last[:, self.read].mean(dim=1, keepdim=True)  # (B, 1, N)
        own = torch.zeros_like(shares)  # of the identity: next to it, small shares would round to 0
        if residual and last.shape[1] == last.shape[2]:
            own[..., self.read] = 1 / len(self.read)
        for step in reversed(steps):
            through = (own + shares) @ step
            shares = shares + through if residual else through
        own = own - own[..., self.layout.first, None]  # most often the same for all patches
        return base.min_max(self.layout((own + shares).transpose(1, 2)))


class _AttentionMap(base.Interpreter):
    """What rollout and relevance share: attention weights and logits of one forward pass."""

    model: nn.Module
    _known: _Tokens | None = None

    def _seen(self, images: Tensor) -> tuple[_Attention, Tensor, _Tokens]:
        """Return the attention and the logits of a pass, and what is known of its tokens."""
        known = self._known
        if known is None or known.images != images.shape[1:]:
            known = self._found(images)
        seen, logits = self._run(images)
        if known.weights != tuple(each.shape[1:] for each in seen.weights):
            known = self._found(images)  # another preprocessing
        seen.drop_all_but(known.used)
        return seen, logits, known

    def _run(self, images: Tensor) -> tuple[_Attention, Tensor]:
        with _Attention() as seen:
            logits = self.logits(images)
        return seen, logits

    def _found(self, images: Tensor) -> _Tokens:
        """Find the patches' tokens, and those that the head reads, in a pass; remember them."""
        with graph_enabled():
            x = images.detach().clone().requires_grad_()
            seen, logits = self._run(x)
            shapes = tuple(each.shape[1:] for each in seen.weights)
            score = logits.square().sum()
            kept: Any = {"retain_graph": True, "allow_unused": True}
            slopes = torch.autograd.grad(score, seen.computed, **kept) if seen.computed else ()
            used = tuple(number for number, slope in enumerate(slopes) if slope is not None)
            seen.drop_all_but(used)
            layout = self._layout(Graph(Pass(), x, logits), seen, len(images))
        if layout is None:
            name, got = type(self).__name__, [tuple(shape) for shape in dict.fromkeys(shapes)]
            raise ValueError(
                "expected weights (B, heads, N, N) of attention among all N tokens of a grid, "
                f"in one block after the other, for {name}, got {got or 'none'}; {_OTHER}"
            )
        last: Any = slopes[used[-1]]
        read = last.view_as(seen.weights[-1]).abs().amax(dim=(0, 1, 3)) > 0
        if not bool(read.any()):  # the logits of these images do not depend on them
            return _Tokens(images.shape[1:], shapes, used, layout, tuple(range(len(read))))
        rows = tuple(read.nonzero()[:, 0].tolist())
        self._known = _Tokens(images.shape[1:], shapes, used, layout, rows)
        return self._known

    @staticmethod
    def _layout(graph: Graph, seen: _Attention, batch: int) -> Layout | None:
        """Return how tokens lie on a grid, if attention is among them, block after block."""
        if not seen.weights:
            return None
        count = seen.weights[0].shape[-1]
        for number, weights in enumerate(seen.weights):
            own, _, queries, keys = weights.shape if weights.ndim == 4 else (0, 0, 0, 0)
            # The last one may pool the tokens.
            square = queries == keys or number == len(seen.weights) - 1 > 0
            if own != batch or keys != count or not square:
                return None
        for before, after in zip(seen.computed, seen.computed[1:], strict=False):
            kept: Any = {"retain_graph": True, "allow_unused": True}
            if torch.autograd.grad(after.sum(), before, **kept)[0] is None:  # in parallel
                return None
        return graph.grids.layout(count, channels=2) if graph.grids.sequence(count) else None


def _joined(step: Tensor) -> Tensor:
    """Add the residual connection to a block's share ``(B, M, N)``; a pooling has none."""
    queries, keys = step.shape[-2:]
    return step + torch.eye(keys).to(step) if queries == keys else step


@final
class AttentionRollout(_AttentionMap):
    """Attention rollout: the product of all blocks' attention, heads joined; it has no class.

    Convention:
        Min-max scaled per image, at the patches' resolution (14x14 for ViT-B/16 at 224).

    The map is the same for every class. Works where in each block all tokens attend to all: ViT,
    DeiT, BEiT, EVA, DINOv2 and the like, of torchvision, timm and Hugging Face.

    Args:
        model: Classifier returning logits.
        head_fusion: How the heads of a block are joined.
        discard_ratio: Share of each block's smallest joined weights that are set to 0.

    >>> from captum_adv2.study.embedded import load_vit
    >>> AttentionRollout(load_vit())(torch.rand(2, 3, 64, 64), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    Reference: Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        head_fusion: Literal["mean", "max", "min"] = "mean",
        discard_ratio: Fraction = 0.0,
    ) -> None:
        super().__init__(model)
        self.head_fusion = head_fusion
        self.discard_ratio = discard_ratio

    def explain(self, images: Tensor, target: Tensor) -> base.Explanation:
        """See `Interpreter.explain`."""
        seen, logits, known = self._seen(images)
        fuse = {"mean": "mean", "max": "amax", "min": "amin"}[self.head_fusion]
        joined = (getattr(weights, fuse)(dim=1) for weights in seen.weights)
        steps = [_joined(self._kept(weights)) for weights in joined]
        tiny = torch.finfo(steps[0].dtype).tiny
        scaled = [step / step.sum(dim=-1, keepdim=True).clamp(min=tiny) for step in steps]
        return base.Explanation(known.maps(scaled), logits)

    def _kept(self, weights: Tensor) -> Tensor:
        """Return a block's joined weights ``(B, M, N)`` without the smallest."""
        flat = weights.flatten(1)
        discarded = int(self.discard_ratio * flat.shape[1])
        if not discarded:
            return weights
        smallest = flat.topk(discarded, dim=1, largest=False).indices
        return flat.scatter(1, smallest, 0.0).view_as(weights)


@final
class Relevance(_AttentionMap):
    """Relevance of the patches for a class: rollout of attention weighted by its gradient.

    Convention:
        Min-max scaled per image, at the patches' resolution (14x14 for ViT-B/16 at 224).

    An attack differentiates it by a double backward, about three times the cost of a PGD step.

    Args:
        model: Classifier returning logits; see `AttentionRollout` for which ones.

    >>> from captum_adv2.study.embedded import load_vit
    >>> Relevance(load_vit())(torch.rand(2, 3, 64, 64), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    Reference: Chefer et al., Generic Attention-model Explainability, ICCV 2021, Eq. 5 and 6.
    """

    @checked
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def explain(self, images: Tensor, target: Tensor) -> base.Explanation:
        """See `Interpreter.explain`."""
        with base.differentiable_input(images) as (x, graph):
            seen, logits, known = self._seen(x)
            score = logits.gather(1, target[:, None]).sum()
            slopes = torch.autograd.grad(score, seen.computed, create_graph=graph)
            steps = [
                (slope.view_as(weights) * weights).relu().mean(dim=1)
                for slope, weights in zip(slopes, seen.weights, strict=True)
            ]
            explanation = base.Explanation(known.maps(steps, residual=True), logits)
        return explanation if graph else base.detached(explanation)
