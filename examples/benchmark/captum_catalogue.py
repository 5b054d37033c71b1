# SPDX-License-Identifier: MIT
"""Write the table of ``docs/captum.md``: which of Captum's methods can be attacked, at what cost.

    python examples/benchmark/captum_catalogue.py --out docs/captum.md    # replaces its table
    python examples/benchmark/captum_catalogue.py --smoke                 # prints a few rows

The gradient's error is that of the map's derivative along random directions, against central
differences, in float64 on a small network. Costs are counted on the embedded residual network.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import captum.attr as ca
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from figures import f_units, flops
from mask import embedded_case
from real import Case
from torch import Tensor, nn

from captum_adv2 import ADV2
from captum_adv2.checks import SoundnessWarning
from captum_adv2.interpreters import CaptumInterpreter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

__all__ = ["METHODS", "cells", "greys", "interpreter", "rows"]

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

_LAYERS: tuple[str, ...] = (
    "LayerGradCam",
    "LayerActivation",
    "LayerGradientXActivation",
    "LayerConductance",
    "InternalInfluence",
    "LayerIntegratedGradients",
    "LayerLRP",
    "LayerGradientShap",
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "LayerFeatureAblation",
    "LayerFeaturePermutation",
    "GuidedGradCam",
)
# Every attribution of images in captum.attr, with the settings of its row.
METHODS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 8},
    "GradientShap": {"n_samples": 8},
    "DeepLift": {},
    "DeepLiftShap": {},
    "GuidedBackprop": {},
    "Deconvolution": {},
    "GuidedGradCam": {},
    "LayerGradCam": {},
    "LayerActivation": {},
    "LayerGradientXActivation": {},
    "LayerConductance": {"n_steps": 8},
    "InternalInfluence": {"n_steps": 8},
    "LayerIntegratedGradients": {"n_steps": 8},
    "NoiseTunnel": {"nt_samples": 8, "stdevs": 0.1},
    "Occlusion": {},
    "FeatureAblation": {},
    "ShapleyValueSampling": {"n_samples": 3},
    "ShapleyValues": {},
    "KernelShap": {"n_samples": 48},
    "Lime": {"n_samples": 48},
    "LRP": {},
    "LayerLRP": {},
    "LayerGradientShap": {},
    "LayerDeepLift": {},
    "LayerDeepLiftShap": {},
    "LayerFeatureAblation": {},
    "LayerFeaturePermutation": {},
    "FeaturePermutation": {},
}


def cells(side: int, count: int) -> Tensor:
    """Return a feature mask ``(1, 1, side, side)`` of ``count`` times ``count`` cells."""
    places = torch.arange(side) * count // side
    return (places[:, None] * count + places)[None, None]


def greys(images: Tensor) -> Tensor:
    """Return three grey images of the kind of these, to start from."""
    return torch.tensor([0.3, 0.5, 0.7]).to(images).view(3, 1, 1, 1).expand(3, *images.shape[1:])


def interpreter(
    name: str,
    model: nn.Module,
    layer: nn.Module,
    side: int,
    *,
    features: int = 4,
    seed: int = 0,
    smoothing: float = 1e-4,
) -> CaptumInterpreter:
    """Return one of Captum's methods on a model, with the settings of its row.

    Args:
        name: Of the method, a key of `METHODS`.
        model: The classifier.
        layer: Where methods of a layer attribute to.
        side: Of the images, in pixels.
        features: Cells along each side, where features are perturbed.
        seed: Of methods that draw numbers.
        smoothing: See `CaptumInterpreter`.

    Raises:
        TypeError: The method is refused.
    """
    kind, kwargs = getattr(ca, name), dict(METHODS[name])
    if name in _LAYERS:
        attribution = kind(model, layer)
    elif name == "NoiseTunnel":
        attribution = kind(ca.Saliency(model))
    elif name == "Lime":
        attribution = kind(model, interpretable_model=SkLearnLinearRegression())
    else:
        attribution = kind(model)
    if name in ("GradientShap", "DeepLiftShap"):
        kwargs["baselines"] = greys
    if name == "DeepLift":
        kwargs["baselines"] = 0.5
    if name == "Occlusion":
        kwargs |= {"sliding_window_shapes": (3, side // 4, side // 4), "strides": side // 8}
    if name in ("FeatureAblation", "ShapleyValueSampling", "ShapleyValues", "KernelShap", "Lime"):
        kwargs["feature_mask"] = cells(side, 2 if name == "ShapleyValues" else features)
    if name in ("NoiseTunnel", "GradientShap", "ShapleyValueSampling", "KernelShap", "Lime"):
        kwargs["seed"] = seed
    return CaptumInterpreter(attribution, smoothing=smoothing, **kwargs)


def small_net() -> nn.Sequential:
    """Return a network in float64 on which rules of activations and poolings matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Softplus(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 5, 3), nn.Tanh()),
            nn.Flatten(),
            nn.Linear(20, 4),
        )
    for weight in net.parameters():
        weight.data.mul_(3)  # or it is all but linear, and no test of second derivatives
    return net.double().eval()


def gradient_error(build: Callable[..., CaptumInterpreter], directions: int = 5) -> float:
    """Return the largest error of a derivative along a direction, relative to the largest."""
    net, generator = small_net(), torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x = (0.5 + 0.1 * draw(2, 3, 16, 16)).clamp(0, 1).requires_grad_()
    explain, target = build(net, net[1][2], 16).explain, torch.tensor([0, 2])
    weights = draw(explain(x, target).maps.shape)

    def score(x: Tensor) -> Tensor:
        return (explain(x, target).maps * weights).sum()

    (gradient,) = torch.autograd.grad(score(x), x)
    errors, slopes = [], []
    for _ in range(directions):
        step = 1e-6 * draw(x.shape)
        with torch.no_grad():
            difference = (score(x + step) - score(x - step)) / 2e-6
        slopes.append((gradient * step).sum() / 1e-6)
        errors.append(difference - slopes[-1])
    return (torch.stack(errors).abs().amax() / torch.stack(slopes).abs().amax()).item()


def refusal(build: Callable[..., CaptumInterpreter]) -> str | None:
    """Return why a method is refused, or None where it is not."""
    net = small_net()
    try:
        build(net, net[1][2], 16)
    except TypeError as error:
        return str(error).partition(", got ")[2].partition(": ")[2]
    return None


def rows(names: list[str], case: Case) -> list[str]:
    """Return the table's rows: name, error of the gradient, cost of a map and of a step."""
    found = []
    model, images, _, targets = case
    with torch.no_grad():
        unit = flops(lambda: model(images))
    for name in names:
        build = partial(interpreter, name)
        reason = refusal(build)
        if reason is not None:
            found.append(f"| `{name}` | refused | | | {reason} |")
            continue
        error = gradient_error(build)
        explain = build(model, model[1].layer2, images.shape[-1])
        cost = flops(lambda e=explain: e(images, targets)) / unit
        with warnings.catch_warnings():  # the page says of which maps the gradient is zero
            warnings.simplefilter("ignore", SoundnessWarning)
            step = f_units(case, ADV2(model, explain))
        settings = ", ".join(f"`{key}={value}`" for key, value in METHODS[name].items())
        found.append(f"| `{name}` | yes, {error:.0e} | {cost:.1f} F | {step:.1f} F | {settings} |")
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Count, print, and replace the table of a page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="page whose table is replaced")
    parser.add_argument("--smoke", action="store_true", help="three methods")
    args = parser.parse_args()
    names = ["Saliency", "KernelShap", "LRP"] if args.smoke else [*METHODS]
    head = "| method | differentiable, error | map | attack step | settings, or why not |\n"
    table = head + "| --- | --- | --- | --- | --- |\n" + "\n".join(rows(names, embedded_case(2)))
    if args.out is None:
        print(table)
        return
    before, _, rest = args.out.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    args.out.write_text(f"{before}{BEGIN}\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
