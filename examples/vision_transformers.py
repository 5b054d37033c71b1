# SPDX-License-Identifier: MIT
"""Can the explanations of vision transformers be attacked, and do they betray an attack?

    python examples/vision_transformers.py                           # the embedded ViT: minutes
    python examples/vision_transformers.py --dinov2 ../shared/real  # DINOv2, dermoscopy: hours

PGD and ADV2 on rollout, token Grad-CAM, relevance and GRAD: the share of pictures that reach the
target class, and the distance of their maps from the clean ones. The cost is the CPU time of a step
over that of PGD's. "Betrayed" is the area under the curve by which the distance of maps tells PGD's
pictures, and ADV2's, from ones with random signs of the same size; on embedded pictures CAM on the
residual network is beside it. Then each attack is tried on every interpreter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark.real import DEVICE, NORMALIZE, Case
from common import EPS, Rows, attacked, first, parsed
from lesions import CLASSES, Lesions
from torch import Tensor, nn
from torchattacks import PGD
from torchvision.transforms import v2

from captum_adv2 import ADV2
from captum_adv2.evaluation import Report, evaluate, transfer, visualize
from captum_adv2.interpreters import (
    CAM,
    AttentionRollout,
    GradCAM,
    Gradient,
    Interpreter,
    Relevance,
)
from captum_adv2.study import embedded

INTERPRETERS: dict[str, Callable[[nn.Module], Interpreter]] = {
    "Rollout": AttentionRollout,
    "GradCAM": GradCAM,
    "Relevance": Relevance,
    "GRAD": Gradient,
}
DISEASES = ("AKIEC", "BCC", "BKL", "DF", "MEL", "NV", "VASC")  # as the head has them
CROP = v2.Compose([v2.Resize(224), v2.CenterCrop(224)])


def dinov2(folder: Path) -> nn.Module:
    """Return DINOv2 ViT-S/14 with a head for seven skin diseases, in eval mode."""
    import timm

    held = torch.load(folder / "dinov2_vits14.pt", weights_only=True)
    held = {name: value.float() for name, value in held.items()}
    net = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0)
    net.load_state_dict({k: v for k, v in held.items() if not k.startswith("dinov2_")})
    head = nn.Linear(384, len(DISEASES))
    head.load_state_dict({name: held[f"dinov2_7.{name}"] for name in ("weight", "bias")})
    return nn.Sequential(NORMALIZE, net, head).eval().requires_grad_(False)


def dermoscopy(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return pictures of HAM10000 ``(N, 3, 224, 224)``, of each disease in turn, and the labels."""
    source = Lesions(folder / "ham10000.zip", CROP)
    own = torch.tensor([DISEASES.index(CLASSES[label]) for label in source.labels])
    each = [(own == label).nonzero()[:, 0].tolist() for label in range(len(DISEASES))]
    chosen = [numbers[row] for row in range(-(-count // len(each))) for numbers in each][:count]
    return torch.stack([source[number].image for number in chosen]), own[chosen]


def case_of(count: int, images: Tensor, labels: Tensor, *models: nn.Module) -> Case:
    """Return the first pictures that all models get right, with random targets."""
    with torch.no_grad():
        right = torch.ones_like(labels, dtype=torch.bool)
        for model in models:
            parts = images.to(next(model.parameters()).device).split(16)
            logits = torch.cat([model(part).cpu() for part in parts])
            right &= logits.argmax(dim=1) == labels
    chosen = right.nonzero()[:count, 0]
    generator = torch.Generator().manual_seed(0)
    shift = torch.randint(1, logits.shape[1], chosen.shape, generator=generator)
    targets = (labels[chosen] + shift) % logits.shape[1]
    return Case(models[0], images[chosen], labels[chosen], targets).to(DEVICE)


def auc(attacks: Tensor, others: Tensor) -> float:
    """Return how often a distance of an attack is larger than another one."""
    return (attacks[:, None] > others).float().mean().item()


def compared(
    name: str,
    case: Case,
    interpreter: Interpreter,
    pgd: Tensor,
    cost: float,
    args: argparse.Namespace,
) -> Tensor:
    """Attack an interpreter, print a row of the table; return the adversarial pictures."""
    start = time.process_time()
    attack = ADV2(case.model, interpreter, eps=EPS, steps=args.steps, verbose=args.verbose)
    adversarial = attacked(attack, case, args.batch)
    cost = (time.process_time() - start) / cost
    signs = torch.randint(2, case.images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noisy = (case.images + EPS * signs.to(case.images)).clamp(0, 1)

    def report(images: Tensor, target: Tensor) -> Report:
        return evaluate(case.model, interpreter, case.images, images, target, case.labels)

    regular, ours = report(pgd, case.targets), report(adversarial, case.targets)
    noise = report(noisy, case.labels).l1
    a, b = regular.summary(), ours.summary()
    print(
        f"{name:14} {a['asr']:5.0%} {b['asr']:5.0%}   {a['l1']:.3f} {b['l1']:.3f} "
        f"{b['l1'] / a['l1']:5.0%}   {a['iou']:.2f} {b['iou']:.2f}   "
        f"{auc(regular.l1, noise):.2f} {auc(ours.l1, noise):.2f}   {cost:.1f}",
        flush=True,
    )
    return adversarial


def table(
    case: Case, interpreters: dict[str, Interpreter], args: argparse.Namespace
) -> dict[str, Tensor]:
    """Print the table of a model; return the adversarial pictures by attack."""
    start = time.process_time()
    attack = PGD(case.model, eps=EPS, alpha=2 / 255, steps=args.steps, random_start=False)
    found = {"PGD": attacked(attack, case, args.batch)}
    cost = time.process_time() - start
    for name, interpreter in interpreters.items():
        found[name] = compared(name, case, interpreter, found["PGD"], cost, args)
    return found


def parse() -> argparse.Namespace:
    """Read the command line."""
    title, _, text = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dinov2", type=Path, metavar="FOLDER", help="with dinov2_vits14.pt and ham10000.zip")
    add("--interpreters", nargs="+", choices=INTERPRETERS, default=[*INTERPRETERS], help="rows")
    add("--images", type=int, default=32, help="pictures (default: 32)")
    add("--batch", type=int, default=8, help="pictures at a time (default: 8)")
    add("--steps", type=int, default=100, help="gradient evaluations (default: 100)")
    return parsed(parser)


def main() -> None:
    """Attack, print, draw."""
    args = parse()
    cnn = embedded.load_resnet().to(DEVICE)
    if args.dinov2:
        model = dinov2(args.dinov2)
        case = case_of(args.images, *dermoscopy(args.dinov2, 3 * args.images), model)
    else:
        model, shapes = embedded.load_vit(), embedded.make_shapes(2 * args.images, seed=99)
        case = case_of(args.images, shapes.images, shapes.labels, model, cnn)
    interpreters = {name: INTERPRETERS[name](model) for name in args.interpreters}
    print(f"{len(case.images)} pictures, {args.steps} gradient evaluations, at most 8/255")
    print(f"{'':14} ASR: PGD, ADV2   L1: PGD, ADV2, ratio   IoU   betrayed: PGD, ADV2   cost")
    adversarial = table(case, interpreters, args)
    if not args.dinov2:
        table(case._replace(model=cnn), {"CAM, ResNet": CAM(cnn)}, args)
    found = transfer.matrix(
        model, interpreters, case.images, adversarial, case.targets, case.labels
    )
    print(found)
    few, rows = first(case, 2), Rows(dict)
    for source, reports in zip(found.sources, found.reports, strict=True):
        title = source if source == "PGD" else f"ADV2: {source}"
        for name, report in zip(found.targets, reports, strict=True):
            rows["benign"][name] = few.images, report.benign_maps[:2]
            rows[title][name] = adversarial[source][:2], report.adversarial_maps[:2]
    visualize.grid(rows).savefig(args.out / "transformers.png", dpi=50)


if __name__ == "__main__":
    main()
