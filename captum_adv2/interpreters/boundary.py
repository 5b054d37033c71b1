# SPDX-License-Identifier: MIT
"""What a public call holds a model to: logits, of known classes, that depend on the images.

All of it is looked at once a call, around the work or before it; inside, values are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_adv2.spec import expect_logits, warn_of_logits

_GRAPHLESS = (
    "expected logits that depend differentiably on the images, got {}; run the model without "
    "no_grad, detach, rounding and quantised layers"
)
# What others' errors say, and what it means.
_REASONS = {
    "use_reentrant": "expected a model without reentrant activation checkpointing, through which "
    "gradients of the images cannot be taken; checkpoint with use_reentrant=False",
    "is not implemented": "expected a model whose operations have second derivatives; take an "
    "interpreter that needs none, as Gradient, or plain operations (of attention: math, by "
    "torch.nn.attention.sdpa_kernel)",
    "ScriptModules": "expected a layer that takes hooks, got one of TorchScript; pass the model as "
    "it was before torch.jit",
}


def expect_gradients() -> None:
    """Raise in inference mode, where no gradient can be taken."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "expected gradients to be available, got torch.inference_mode(); use torch.no_grad(), "
            "or Lightning's Trainer(inference_mode=False)"
        )


@contextmanager
def outputs_checked(
    model: nn.Module | None,
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    target: Tensor | None = None,
) -> Iterator[None]:
    """Refuse outputs of a model that are not logits, and classes that it does not have.

    This takes a hook: the number of classes is known only once the model has run, and an index out
    of range must not reach a GPU, which the process could not use any more.
    """
    if model is None:
        yield
        return
    low, high = (0, 0) if target is None else torch.stack(target.aminmax()).tolist()
    judged = False

    def check(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal judged
        batch = len(inputs[0] if inputs else output)  # none where called by keyword
        logits = expect_logits(output, batch)
        if inputs and torch.is_grad_enabled() and inputs[0].requires_grad > logits.requires_grad:
            raise ValueError(_GRAPHLESS.format("logits without a graph"))
        classes = logits.shape[1]
        if low < 0 or high >= classes:
            wanted = f"target in [0, {classes - 1}], the model's classes"
            raise ValueError(f"expected {wanted}, got values in [{low}, {high}]")
        if not judged:  # once: a look at values waits for a GPU
            judged = True
            warn_of_logits(logits)

    with model.register_forward_hook(check), failures_explained(model, run, images):
        yield


@contextmanager
def failures_explained(
    model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor
) -> Iterator[None]:
    """Where PyTorch raises, raise what the model or the images are instead of what was expected.

    ``run`` runs the model on images.
    """
    try:
        yield
    except RuntimeError as error:
        _explain_failure(model, run, images, error)
        raise


def _explain_failure(
    model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, error: RuntimeError
) -> None:
    """Raise the reason of an error where it is known."""
    if torch.is_inference_mode_enabled() or isinstance(error, torch.cuda.OutOfMemoryError):
        return
    reasons = [reason for words, reason in _REASONS.items() if words in str(error)]
    if reasons:
        raise ValueError(f"{reasons[0]} ({error})") from error
    try:
        differentiable_logits(run, images)
    except RuntimeError as other:  # the model cannot run on the images at all
        if other is not error and str(other) != str(error):
            _explain_failure(model, run, images, other)
        own = next((p for p in model.parameters() if p.is_floating_point()), images)
        if (own.dtype, own.device) != (images.dtype, images.device):
            wanted = f"images of the model's dtype and device, {own.dtype} on {own.device}"
            got = f"{images.dtype} on {images.device}"
            raise TypeError(f"expected {wanted}, got {got}; use images.to(...)") from error
        return
    try:
        with torch.no_grad():
            run(torch.cat([images, images]))
    except RuntimeError as other:
        raise ValueError(
            "expected a model that takes any number of images, as this runs it on copies of them, "
            f"got one that fails on {2 * len(images)} ({other}); wrap it, to run it in parts"
        ) from error


def differentiable_logits(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the logits of images; raise unless they depend differentiably on the images.

    A gradient of zero may be that of these images alone, so that random ones are tried, too: where
    theirs is zero as well, and yet their logits differ, the model rounds.
    """
    logits, gradient = _with_gradient(run, images)
    if gradient is not None and bool(gradient.any()):
        return logits
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    others, gradient = _with_gradient(run, noise)
    if gradient is None or not (bool(gradient.any()) or torch.equal(others, logits)):
        got = "logits without a graph" if gradient is None else "a gradient of zero"
        raise ValueError(_GRAPHLESS.format(got))
    return logits


def _with_gradient(run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return logits and the gradient of their margins, ``None`` where no graph leads there."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        logits = expect_logits(run(leaf), len(leaf))
        margins = logits.amax(dim=1) - logits.mean(dim=1)
        if not logits.requires_grad:
            return logits, None
        (gradient,) = torch.autograd.grad(margins.sum(), leaf, allow_unused=True)
    return logits.detach(), gradient


def expect_explains(interpreter: Any, model: nn.Module, whose: str, hint: str) -> None:
    """Raise unless an interpreter explains ``model``; one of an unknown model fits any."""
    own = interpreter.model
    if own is None or own is model:
        return
    name = type(own).__name__
    got = f"another {name}"
    if own in model.modules():
        got = f"a part of it, a {name}"
    elif model in own.modules():
        got = f"a {name} around it"
    wanted = f"an interpreter built on {whose} model"
    raise ValueError(f"expected {wanted}, got one built on {got}; {hint}")
