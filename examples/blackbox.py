# SPDX-License-Identifier: MIT
"""How many queries does it take to fool a classifier and its map, without gradients?

    python examples/blackbox.py                        # embedded ResNet; the DenseNet is surrogate
    python examples/blackbox.py --real DIR             # CIFAR-10: ResNet-20; ResNet-56 is surrogate
    python examples/blackbox.py --real DIR --imagenet  # MobileNetV2; SqueezeNet is surrogate
    python examples/blackbox.py --interpreter lrp white map      # a map without gradients

One row an attack, by what the adversary sees: scores and map, scores only, or nothing but models of
their own. Square Attack has the same queries and fools the class alone; PGD on the surrogates is
plain transfer. An image leaves once it has its class and its map is within ``--stop`` of the benign
one. The row ``white`` is ADV2 with gradients, where the map has any, and else PGD: beside it, the
interpreters ``rts``, ``aid`` and ``ensemble`` show whether a defence only hides gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from benchmark.real import (
    DEVICE,
    FOLDER,
    NORMALIZE,
    CifarResNet,
    cifar_resnet,
    load_case,
    squeezenet,
)
from captum.attr import LRP
from captum.attr._utils.lrp_rules import IdentityRule
from common import EPS, embedded_case, mean, share
from torch import Tensor, nn
from torchattacks import PGD, Square

from captum_adv2 import ADV2, QueryADV2, TransferADV2, evaluate
from captum_adv2.attacks.frameworks import quantize
from captum_adv2.attacks.loop import Progress
from captum_adv2.evaluation import visualize
from captum_adv2.interpreters import CAM, RTS, Ensemble, Gradient, Interpreter, Opaque
from captum_adv2.study import embedded


class Setting(NamedTuple):
    """A system under attack, pictures, and the adversary's own models."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    targets: Tensor
    surrogates: list[nn.Module]


class Row(NamedTuple):
    """An attack: whether it has a target class, its budget, and how it is made."""

    name: str
    targeted: bool
    queries: int
    build: Callable[..., Any]  # of a setting, an interpreter and settings of its own


def _query(setting: Setting, interpreter: Interpreter, queries: int, **more: Any) -> QueryADV2:
    return QueryADV2(setting.model, interpreter, EPS, queries, **more)


def _refine(setting: Setting, interpreter: Interpreter, queries: int, **more: Any) -> QueryADV2:
    start = TransferADV2(setting.surrogates, CAM, EPS)
    return _query(setting, interpreter, queries, start=start, **more)


def _scores(setting: Setting, interpreter: Interpreter, queries: int, **more: Any) -> QueryADV2:
    start = TransferADV2(setting.surrogates, CAM, EPS)
    return _query(setting, interpreter, queries, start=start, substitute=start.interpreter, **more)


def _square(setting: Setting, interpreter: Interpreter, queries: int, **more: Any) -> Square:
    return Square(setting.model, eps=EPS, n_queries=queries)


def _transfer(setting: Setting, interpreter: Interpreter, queries: int, **more: Any) -> Any:
    return TransferADV2(setting.surrogates, CAM, EPS)


def _plain(setting: Setting, interpreter: Interpreter, queries: int, **more: Any) -> PGD:
    models = TransferADV2(setting.surrogates, CAM).model
    return PGD(models, eps=EPS, steps=100, random_start=False)


def _white(setting: Setting, interpreter: Interpreter, queries: int, **more: Any) -> Any:
    if isinstance(interpreter, Opaque):
        return PGD(setting.model, eps=EPS, steps=100, random_start=False)
    return ADV2(setting.model, interpreter, EPS)


ROWS = {
    "square": Row("Square", True, 5000, _square),
    "map": Row("scores and map", True, 5000, _query),
    "square-any": Row("Square, untargeted", False, 2000, _square),
    "map-any": Row("scores and map, untargeted", False, 2000, _query),
    "square-short": Row("Square", True, 1000, _square),
    "scores": Row("scores only, after transfer", True, 1000, _scores),
    "refine": Row("scores and map, after transfer", True, 1000, _refine),
    "plain": Row("plain transfer, untargeted", False, 0, _plain),
    "transfer": Row("surrogate only, untargeted", False, 0, _transfer),
    "white": Row("with gradients", True, 0, _white),
}


def lrp(model: nn.Module) -> Opaque:
    """Return Captum's LRP, which has no gradient, of a model behind a normalisation."""

    def attribute(images: Tensor, target: Tensor) -> Tensor:
        model[0].rule = IdentityRule()  # Captum removes it after each call
        found: Tensor = LRP(model).attribute(images, target=target)
        return F.avg_pool2d(found.abs().amax(dim=1, keepdim=True), 4)

    return Opaque(model, attribute)


def _rts(model: nn.Module, name: str = "resnet") -> RTS:
    return RTS(model, embedded.load_rts(model, name))


INTERPRETERS: dict[str, Callable[[nn.Module], Interpreter]] = {
    "cam": CAM,
    "lrp": lrp,
    "rts": _rts,
    "aid": partial(_rts, name="resnet-aid"),
    "ensemble": lambda model: Ensemble([CAM(model), Gradient(model), _rts(model)]),
}


class Records(list[Progress]):
    """What an attack reports after each step, as curves over the queries of an image."""

    def curves(self, count: int, floor: float) -> tuple[list[int], list[float], list[float]]:
        """Return numbers of queries, the share of successes, and the mean distance of these."""
        confidence, distance = torch.zeros(count), torch.full((count,), torch.nan)
        steps, shares, means = [], [], []
        for step, sure, far, rows in self:
            rows = rows.cpu()
            confidence[rows], distance[rows] = sure.float().cpu(), far.float().cpu()
            won = confidence >= floor
            steps.append(step)
            shares.append(won.float().mean().item())
            means.append(distance[won].nanmean().item())
        return steps, shares, means

    def spent(self, count: int) -> float:
        """Return the mean number of queries."""
        queries = torch.zeros(count)
        for step, _, _, rows in self:
            queries[rows.cpu()] = step
        return queries.mean().item()


def attacked(row: Row, attack: Any, setting: Setting, batch: int) -> tuple[Tensor, float]:
    """Return the adversarial images, rounded to 8 bits, and the queries of Square Attack."""
    targeted, sizes = row.targeted, []
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    aim = setting.targets if targeted else setting.labels
    hook = setting.model.register_forward_hook(lambda *call: sizes.append(len(call[1][0])))
    with hook:
        parts = zip(setting.images.split(batch), aim.split(batch), strict=True)
        adversarial = torch.cat([attack(*part) for part in parts])
    return quantize(adversarial), sum(sizes) / len(aim)


def measured(
    row: Row, setting: Setting, interpreter: Interpreter, args: argparse.Namespace
) -> tuple[Records, Tensor, Tensor, Tensor]:
    """Attack, print a row; return its records, some images and their maps, benign and attacked."""
    records, queries = Records(), min(row.queries, args.queries or row.queries)
    attack = row.build(setting, interpreter, queries, stop=args.stop, callback=records.append)
    adversarial, asked = attacked(row, attack, setting, args.batch)
    target = setting.targets
    if not row.targeted:
        with torch.no_grad():
            logits = torch.cat([setting.model(part) for part in adversarial.split(100)])
        target = logits.scatter(1, setting.labels[:, None], -torch.inf).argmax(dim=1)
    report = evaluate(
        setting.model, interpreter, setting.images, adversarial, target, setting.labels
    )
    spent = records.spent(len(adversarial)) if records else asked * bool(queries)
    print(
        f"{row.name:32s}{queries:6d}{spent:7.0f}  {share(report.success):18s}"
        f"{mean(report.l1[report.success])}  {report.iou[report.success].mean():.3f}",
        flush=True,
    )
    return records, adversarial[:4], report.benign_maps[:4], report.adversarial_maps[:4]


def draw(found: dict[str, Any], setting: Setting, out: Path) -> None:
    """Draw successes and map distance over queries, and some pictures with their maps."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    shown: dict[str, Any] = {"benign": {}}
    for name, (records, images, benign, maps) in found.items():
        shown["benign"]["map"] = setting.images[:4], benign
        shown[name] = {"map": (images, maps)}
        if records:
            steps, shares, means = records.curves(len(setting.images), 0.5)
            axes[0].plot(steps, shares, label=ROWS[name].name)
            axes[1].plot(steps, means)
    titles = ("share of successes", "L1 of their maps to the benign")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="queries", ylabel=title, xscale="log", ylim=0)
    if axes[0].lines:
        axes[0].legend(fontsize="small")
        figure.savefig(out / "blackbox.png", dpi=80)
    visualize.grid(shown).savefig(out / "blackbox-maps.png", dpi=80)


def load(args: argparse.Namespace) -> Setting:
    """Return the system and the adversary's models."""
    if args.real is None:
        return Setting(*embedded_case(args.images), [embedded.load_densenet().to(DEVICE)])
    if args.imagenet:
        return Setting(
            *load_case("mobilenet", args.images, args.real), [squeezenet(args.real).to(DEVICE)]
        )
    surrogates = [cifar_resnet(56, args.real).to(DEVICE)]
    if args.second is not None:
        second = CifarResNet(7)
        second.load_state_dict(torch.load(args.second, weights_only=True))
        surrogates.append(nn.Sequential(NORMALIZE, second).eval().to(DEVICE))
    return Setting(*load_case("resnet20", args.images, args.real), surrogates)


def main() -> None:
    """Attack, print, draw."""
    title, _, text = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("rows", nargs="*", default=[*ROWS][:-1], metavar="row", help=f"attacks: {', '.join(ROWS)}")
    add("--interpreter", choices=INTERPRETERS, default="cam", help="the map; rts: embedded ResNet")
    add("--real", type=Path, nargs="?", const=FOLDER, help="folder of models and pictures")
    add("--imagenet", action="store_true", help="with --real: ImageNet, not CIFAR-10")
    add("--second", type=Path, help="weights of a ResNet-44, by benchmark/train_surrogate.py")
    add("--images", type=int, default=16, help="pictures (default: 16)")
    add("--queries", type=int, help="budget (default: each row's own)")
    add("--stop", type=float, default=0.05, help="map distance that is near enough (0.05)")
    add("--batch", type=int, default=100, help="pictures a batch (default: 100)")
    add("--out", type=Path, default=Path(), metavar="FOLDER", help="for the pictures")
    add("--smoke", action="store_true", help="two pictures, ten queries: seconds")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"expected rows from {', '.join(ROWS)}, got {', '.join(unknown)}")
    if args.smoke:
        args.images, args.queries = 2, 10
    args.out.mkdir(parents=True, exist_ok=True)
    setting = load(args)
    interpreter = INTERPRETERS[args.interpreter](setting.model)
    print(f"{len(setting.images)} images, changes of at most 8/255, finished at L1 {args.stop}")
    print(f"{'attack':32s}budget  spent  {'successes':18s}{'L1 of their maps':25s}IoU")
    found = {name: measured(ROWS[name], setting, interpreter, args) for name in args.rows}
    draw(found, setting, args.out)


if __name__ == "__main__":
    main()
