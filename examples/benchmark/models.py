# SPDX-License-Identifier: MIT
"""Write the tables of ``docs/models.md``: which interpreters and attacks work with which models.

    python examples/benchmark/models.py --out docs/models.md    # replaces its tables
    python examples/benchmark/models.py --only plain compile    # prints rows of such names

Each map is held against one computed without the library (`oracles`), on the plain model in
float64. So is each attack: by the gradient of its loss at the first step.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import captum.attr as ca
import oracles
import torch
from families import FAMILIES
from kinds import SPELLINGS, Kind
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_adv2 import ADV2, SoundnessWarning
from captum_adv2.attacks import MapDistance
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    CaptumInterpreter,
    GradCAM,
    Gradient,
    IntegratedGradients,
    Interpreter,
    MaskingModel,
    SmoothGrad,
)

BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"
RIGHT, REFUSED, WARNED, NONE = "right", "refused", "warned", "none"
MARKS = {RIGHT: "✓", REFUSED: "r", WARNED: "w", NONE: "–"}


@dataclass(frozen=True)
class Row:
    """An interpreter, and its map without the library.

    Attributes:
        name: Its name, for the page.
        build: Makes it, of a kind and a model; ``None`` where there is no such layer.
        oracle: Its map and logits; ``None`` where the kind has none.
        surrogate: What an attack differentiates: "smooth" for the oracle with smooth ReLUs,
            "exact" for the oracle itself, "slopes" for one without a graph, or "" for another map.
    """

    name: str
    build: Callable[[Kind, nn.Module], Interpreter | None]
    oracle: Callable[..., Any]
    surrogate: str
    scaled: bool = True  # whether maps are min-max scaled; RTS's are not, and have a penalty


def _layer_of(kind: Kind, model: nn.Module) -> nn.Module | None:
    """Return the module with the feature maps, where the model has it."""
    named = {f".{name}": module for name, module in model.named_modules()}
    found = [name for name in named if kind.layer and name.endswith(f".{kind.layer}")]
    return named[min(found, key=len)] if found else None


def _layer_grad_cam(kind: Kind, model: nn.Module) -> Interpreter | None:
    other = kind.pooling or kind.last or kind.first is not None
    layer = None if other else _layer_of(kind, model)
    return layer and CaptumInterpreter(ca.LayerGradCam(model, layer))


def _window(kind: Kind) -> dict[str, Any]:
    height, width = kind.shape[2:]
    window = (kind.shape[1], height // 2, width // 2)
    return {"sliding_window_shapes": window, "strides": window}


def _mask(kind: Kind, model: nn.Module) -> Interpreter:
    return MASK(model, 4, 6, jitter=0, perturb=lambda images: torch.full_like(images, 0.5))


def _masking_model(kind: Kind, model: nn.Module) -> MaskingModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return MaskingModel(model, image_shape=kind.shape[1:], width=4)


def _rts_map(kind: Kind, plain: nn.Module, x: Tensor, target: Tensor) -> Any:
    """Return RTS's map of features that hooks read."""
    masking, seen = _masking_model(kind, plain), {}
    for name in masking.layers:
        hook = lambda m, i, out, name=name: (seen.update({name: out}), out.clone())[1]  # noqa: E731
        plain.get_submodule(name).register_forward_hook(hook)
    logits = plain(x)
    first, *finer = (seen[name] for name in masking.layers)
    agreement = (first * masking.selector.weight[target, :, None, None]).sum(1, keepdim=True)
    return masking.decoder([first * agreement.sigmoid(), *finer]), logits


def _quarters(kind: Kind) -> Tensor:
    """Return a mask of four features, the quarters of an image."""
    height, width = kind.shape[2:]
    rows, columns = torch.arange(height) * 2 // height, torch.arange(width) * 2 // width
    return (2 * rows[:, None] + columns)[None, None].repeat(1, kind.shape[1], 1, 1)


def _players(kind: Kind, plain: nn.Module, x: Tensor, target: Tensor, masks: Any) -> Tensor:
    """Return the logits ``(masks, B)`` of images of which quarters are kept."""
    kept = torch.as_tensor(masks).to(x)[:, _quarters(kind)[0]]
    logits = torch.stack([plain(x * each) for each in kept])
    return logits.gather(2, target.expand(len(kept), -1)[:, :, None])[:, :, 0]


def _on_quarters(kind: Kind, values: Tensor) -> Tensor:
    """Return the map of values ``(4, B)``."""
    return oracles.scaled(values.abs().T[:, _quarters(kind)[0, :1]])


def _occlusion(kind: Kind, plain: nn.Module, x: Tensor, target: Tensor) -> Any:
    """Return what the logit loses with each quarter."""
    scores = _players(kind, plain, x, target, 1 - torch.eye(4))
    logits = plain(x)
    return _on_quarters(kind, logits.gather(1, target[:, None])[:, 0] - scores), logits


def _shapley(kind: Kind, plain: nn.Module, x: Tensor, target: Tensor) -> Any:
    """Return the Shapley values of the quarters, over all orders in which they come."""
    masks = [[n >> player & 1 for player in range(4)] for n in range(16)]
    worth = _players(kind, plain, x, target, masks)
    total: Any = 0
    for order in itertools.permutations(range(4)):
        here = torch.tensor([0, *(1 << player for player in order)]).cumsum(dim=0)
        total = total + worth[here].diff(dim=0)[torch.tensor(order).argsort()] / 24
    return _on_quarters(kind, total), plain(x)


def _captum(name: str, **settings: Any) -> Callable[[Kind, nn.Module], Interpreter]:
    return lambda kind, model: CaptumInterpreter(getattr(ca, name)(model), **settings)


ROWS = [
    Row("`Gradient`", lambda _, model: Gradient(model, 2), oracles.gradient, "smooth"),
    Row("`SmoothGrad`", lambda _, net: SmoothGrad(net, 3, pool=2), oracles.smooth_grad, "smooth"),
    Row(
        "`IntegratedGradients`",
        lambda _, model: IntegratedGradients(model, 3, pool=2),
        oracles.integrated,
        "smooth",
    ),
    Row("`CAM`", lambda _, model: CAM(model), oracles.cam, "exact"),
    Row("`GradCAM`", lambda _, model: GradCAM(model), oracles.grad_cam, "exact"),
    Row("`MASK`", _mask, oracles.mask, ""),
    Row("`RTS`", lambda kind, net: RTS(net, _masking_model(kind, net)), _rts_map, "exact", False),
    Row("`Saliency`", _captum("Saliency"), oracles.saliency, "smooth"),
    Row(
        "`GuidedBackprop`",
        _captum("GuidedBackprop"),
        partial(oracles.saliency, guided=True),
        "smooth",
    ),
    Row("`DeepLift`", _captum("DeepLift"), oracles.by_captum(ca.DeepLift), "slopes"),
    Row("`LayerGradCam`", _layer_grad_cam, partial(oracles.grad_cam, absolute=True), "smooth"),
    Row(
        "`Occlusion`",
        lambda kind, model: CaptumInterpreter(ca.Occlusion(model), **_window(kind)),
        _occlusion,
        "exact",
    ),
    Row(
        "`ShapleyValues`",
        lambda kind, net: CaptumInterpreter(ca.ShapleyValues(net), feature_mask=_quarters(kind)),
        _shapley,
        "exact",
    ),
]


# Of these, families show little that `Gradient` does not.
_ALIKE = ("`SmoothGrad`", "`IntegratedGradients`", "`MASK`", "`Saliency`", "`ShapleyValues`")
FEW = [row for row in ROWS if row.name not in _ALIKE]
TOLERANCE = {torch.float64: 2e-3, torch.float32: 5e-2, torch.bfloat16: 0.5}


def explained(row: Row, kind: Kind) -> str:
    """Return what becomes of a map: right, refused, warned of, or what is wrong with it."""
    model, plain, images, target = kind.case()

    def call() -> Tensor | None:
        interpreter = row.build(kind, model)
        return interpreter and interpreter(images, target).detach()

    def error(maps: Tensor) -> float:
        oracle = _oracle(row, kind, smooth=False)
        if oracle is None:
            return torch.inf
        theirs = oracle(kind, plain, images.double().requires_grad_(), target)[0].detach()
        return float((maps - theirs).abs().amax()) if theirs.shape == maps.shape else torch.inf

    return _verdict(call, error, kind)


def attacked(row: Row, kind: Kind) -> str:
    """Return what becomes of an attack: right, refused, warned of, or what is wrong with it."""
    model, plain, images, target = kind.case()
    return _verdict(
        lambda: _first_gradient(row, kind, model, images, target),
        lambda found: _gradient_error(row, kind, plain, images.double(), target, found.double()),
        kind,
    )


def _first_gradient(
    row: Row, kind: Kind, model: nn.Module, images: Tensor, target: Tensor
) -> Tensor | None:
    """Run an attack of one step; return the gradient of its loss."""
    seen: list[Tensor] = []

    def record(problem: Any, variable: Tensor, memory: Any) -> Any:
        seen.append(problem.gradient(variable))
        return problem.move(variable, -problem.alpha * seen[-1].sign()), memory

    interpreter = row.build(kind, model)
    if interpreter is None:
        return None
    wanted = _wanted(interpreter(images, target).detach())
    # Far target maps count little below a probability of 0.9: here they count in full.
    distance = MapDistance(shape=0.5 if interpreter.scaled else 0.0)
    settings: dict[str, Any] = {"steps": 1, "warmup": 0, "step": record, "keep": "final"}
    settings["interpretation"] = distance
    attack = ADV2(model, interpreter, eps=0.05, alpha=0.02, **settings)
    attack.set_mode_targeted_by_label(quiet=True)
    adversarial = attack(images, target, target_maps=wanted)
    moved = (images - 0.02 * seen[0].sign()).clamp(0, 1)
    if not torch.allclose(adversarial, moved):
        raise AssertionError("the image is not that of the step")
    return seen[0]


def _gradient_error(
    row: Row, kind: Kind, plain: nn.Module, x: Tensor, target: Tensor, gradient: Tensor
) -> float:
    """Return the error of the gradient of the attack's loss, relative to its length."""
    explain = _oracle(row, kind, smooth=True)
    if explain is None:
        return torch.inf
    maps, _ = explain(kind, plain, x.clone().requires_grad_(), target)
    settings = (kind, plain, x, target, _wanted(maps.detach()))
    if row.surrogate == "smooth":
        with oracles.smooth():
            theirs = oracles.loss_gradient(explain, *settings)
    elif row.surrogate == "exact":
        theirs = oracles.loss_gradient(explain, *settings, row.scaled)
    elif row.surrogate == "slopes":
        return _slope_error(explain, settings, gradient)
    else:
        theirs = _first_gradient(row, kind, plain, x, target)
    return float((gradient - theirs).norm() / theirs.norm())


def _slope_error(explain: Any, settings: tuple[Any, ...], gradient: Tensor) -> float:
    """Return the error of a gradient along itself and along a random direction."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    errors = []
    for direction, gain in ((gradient, 1.0), (noise, gradient.numel() ** 0.5)):
        along = direction / direction.norm()
        slope = oracles.slope_along(along, explain, *settings)
        errors.append(gain * abs(slope - float((gradient * along).sum())))
    return max(errors) / float(gradient.norm())


def _wanted(maps: Tensor) -> Tensor:
    """Return target maps of the size of maps, the same for the same size."""
    generator = torch.Generator().manual_seed(4)
    return torch.rand(maps.shape, generator=generator, dtype=torch.float64).to(maps)


def _oracle(row: Row, kind: Kind, smooth: bool) -> Any:
    """Return the oracle of a row, if the kind has what it needs."""
    needs = {"`CAM`": kind.layer and kind.head, "`GradCAM`": kind.layer}
    if not needs.get(row.name, True):
        return None
    if row.name == "`GuidedBackprop`" and not smooth:
        return oracles.by_captum(ca.GuidedBackprop)
    return row.oracle


def _verdict(
    call: Callable[[], Tensor | None], error: Callable[[Tensor], float], kind: Kind
) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except Exception as problem:
            text = f"{type(problem).__name__}: {problem}"
            is_ours = isinstance(problem, TypeError | ValueError) and "expected" in text
            return REFUSED if is_ours and ";" in text else f"raised {text}"
    if result is None:
        return NONE
    if any(issubclass(each.category, SoundnessWarning) for each in caught):
        return WARNED
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # it has second derivatives
        warnings.simplefilter("ignore")
        found = error(result)
    return RIGHT if found <= TOLERANCE[kind.dtype] else f"wrong by {found:.2g}"


def cell(row: Row, kind: Kind) -> str:
    """Return the marks of a map and of an attack; one where they are the same."""
    verdicts = [explained(row, kind), attacked(row, kind)]
    wrong = [verdict for verdict in verdicts if verdict not in MARKS]
    if wrong:
        raise AssertionError(f"{kind.name}, {row.name}: {verdicts}")
    marks = [MARKS[verdict] for verdict in verdicts]
    return marks[0] if len(set(marks)) == 1 else "".join(marks)


def line(kind: Kind) -> str:
    """Return a row of a table."""
    rows = FEW if kind in FAMILIES else ROWS
    return "|".join(["", kind.name, *(cell(row, kind) for row in rows), ""])


def main() -> None:
    """Judge, print, and replace the tables of a page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="page whose tables are replaced")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of kinds")
    args = parser.parse_args()
    tables = []
    for kinds, name in (SPELLINGS, "model"), (FAMILIES, "family"):
        rows = FEW if kinds is FAMILIES else ROWS
        lines = ["|".join(["", name, *(row.name for row in rows), ""])]
        lines.append("|".join(["", *["---"] * (len(rows) + 1), ""]))
        for kind in kinds:
            if any(part in kind.name for part in args.only):
                lines.append(line(kind))
                print(lines[-1], flush=True)
        tables.append("\n".join(lines))
    if args.out is not None:
        before, _, rest = args.out.read_text(encoding="utf-8").partition(BEGIN)
        after, both = rest.partition(END)[2], "\n\n".join(tables)
        args.out.write_text(f"{before}{BEGIN}\n{both}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
