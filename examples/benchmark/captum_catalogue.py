# SPDX-License-Identifier: MIT
"""Write the table of ``docs/captum.md``: which of Captum's methods can be attacked, at what cost.

    python examples/benchmark/captum_catalogue.py --out docs/captum.md    # replaces its table
    python examples/benchmark/captum_catalogue.py --smoke                 # prints a few rows

The gradient's error is that of the map's derivative along random directions, against central
differences, in float64 on a small network. Costs are counted on the embedded residual network.
"""

from __future__ import annotations

import argparse
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
from captum_adv2.interpreters import CaptumInterpreter
from captum_adv2.spec import SoundnessWarning

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

# Every attribution of images in captum.attr, with the settings that the table shows.
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
    "FeatureAblation": {"feature_mask": 4},
    "ShapleyValueSampling": {"feature_mask": 4, "n_samples": 3},
    "ShapleyValues": {"feature_mask": 2},
    "KernelShap": {"feature_mask": 4, "n_samples": 48},
    "Lime": {"feature_mask": 4, "n_samples": 48},
    **dict.fromkeys(("LRP", "LayerLRP", "LayerGradientShap", "LayerDeepLift"), {}),
    **dict.fromkeys(("LayerDeepLiftShap", "LayerFeatureAblation"), {}),
    **dict.fromkeys(("LayerFeaturePermutation", "FeaturePermutation"), {}),
}


def _greys(images: Tensor) -> Tensor:
    """Return three grey images of the kind of these, to start from."""
    return torch.tensor([0.3, 0.5, 0.7]).to(images).view(3, 1, 1, 1).expand(3, *images.shape[1:])


def interpreter(
    name: str, model: nn.Module, layer: nn.Module, side: int, **settings: Any
) -> CaptumInterpreter:
    """Return the method of a row, at this layer, for images of so many pixels a side."""
    kind: Any = getattr(ca, name)
    if "Layer" in name or name in ("InternalInfluence", "GuidedGradCam"):
        attribution = kind(model, layer)
    elif name == "NoiseTunnel":
        attribution = kind(ca.Saliency(model))
    elif name == "Lime":
        attribution = kind(model, SkLearnLinearRegression())
    else:
        attribution = kind(model)
    more: dict[str, dict[str, Any]] = {
        "GradientShap": {"baselines": _greys},
        "DeepLiftShap": {"baselines": _greys},
        "DeepLift": {"baselines": 0.5},
        "Occlusion": {"sliding_window_shapes": (3, side // 4, side // 4), "strides": side // 8},
    }
    return CaptumInterpreter(attribution, **METHODS[name], **more.get(name, {}), **settings)


def _small_net() -> nn.Sequential:
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


def _gradient_error(build: Callable[..., CaptumInterpreter], directions: int = 5) -> float:
    """Return the largest error of a derivative along a direction, relative to the largest."""
    net, generator = _small_net(), torch.Generator().manual_seed(0)
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
    net = _small_net()
    try:
        build(net, net[1][2], 16)
    except TypeError as error:
        _, refused, reason = str(error).partition(", got ")
        if not refused:
            raise
        return reason.partition(": ")[2]
    return None


def row(name: str, case: Case) -> str:
    """Return a row of the table: method, error of the gradient, cost of a map and of a step."""
    build = partial(interpreter, name)
    reason = refusal(build)
    if reason is not None:
        return f"| `{name}` | {reason} |||"
    explain = build(case.model, case.model[1].layer2, case.images.shape[-1])
    with torch.no_grad():
        unit = flops(lambda: case.model(case.images))
        cost = flops(lambda: explain(case.images, case.targets)) / unit
    with warnings.catch_warnings():  # the page names the maps whose gradient is zero
        warnings.simplefilter("ignore", SoundnessWarning)
        step = f_units(case, ADV2(case.model, explain))
    settings = "".join(f", `{key}={value}`" for key, value in METHODS[name].items())
    return f"| `{name}`{settings} | {_gradient_error(build):.0e} | {cost:.1f} | {step:.1f} |"


def main() -> None:
    """Count, print, and replace the table of a page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="page whose table is replaced")
    parser.add_argument("--smoke", action="store_true", help="three methods")
    args = parser.parse_args()
    case = embedded_case(2)
    lines = [
        "| method | gradient's error, or why it is refused | map, F | attack step, F |",
        "| --- | --- | --- | --- |",
    ]
    for name in ["Saliency", "KernelShap", "LRP"] if args.smoke else METHODS:
        lines.append(row(name, case))
        print(lines[-1], flush=True)
    if args.out is not None:
        before, _, rest = args.out.read_text(encoding="utf-8").partition(BEGIN)
        after, table = rest.partition(END)[2], "\n".join(lines)
        args.out.write_text(f"{before}{BEGIN}\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
