# SPDX-License-Identifier: MIT
"""Cost of a step on a CUDA device: time and memory over PGD's, and how often it waits.

    python examples/benchmark/device.py

ResNet-50 and DenseNet-169 with random weights, at 224x224, in float32 and TF32. Attacks alternate
in one run; a step's time is that of eight steps more. A step waits where PyTorch synchronises with
the device, by ``torch.cuda.set_sync_debug_mode``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torchattacks import PGD
from torchvision import models

from captum_adv2 import ADV2
from captum_adv2.interpreters import CAM, GradCAM, Gradient

BATCHES = {"resnet50": 64, "densenet169": 32}


def seconds(attack: Any, images: Tensor, labels: Tensor, steps: int) -> float:
    """Return how long an attack of some steps takes."""
    attack.steps = steps
    torch.cuda.synchronize()
    start = time.perf_counter()
    attack(images, labels)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(attack: Any, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the seconds of a step, and the peak memory in MiB."""
    torch.cuda.reset_peak_memory_stats()
    step = (seconds(attack, images, labels, 11) - seconds(attack, images, labels, 3)) / 8
    return step, torch.cuda.max_memory_allocated() / 2**20


def waits(attack: Any, images: Tensor, labels: Tensor) -> float:
    """Return how often a step waits for the device."""
    found = []
    for steps in (2, 6):
        attack.steps = steps
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            attack(images, labels)
            torch.cuda.set_sync_debug_mode("default")
        found.append(sum("synchroniz" in str(warning.message) for warning in caught))
    return (found[1] - found[0]) / 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="of all attacks in turn (4)")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    for name, batch in BATCHES.items():
        model = models.get_model(name, weights=None).cuda().eval()
        images = torch.rand(batch, 3, 224, 224).cuda()
        labels = torch.randint(1000, (batch,)).cuda()
        attacks: dict[str, Any] = {"PGD": PGD(model, random_start=False)}
        for title, build in (("CAM", CAM), ("GradCAM", GradCAM), ("GRAD", Gradient)):
            attacks[title] = ADV2(model, build(model), warmup=0)
        for attack in attacks.values():
            attack.set_mode_targeted_by_label(quiet=True)
            seconds(attack, images, labels, 2)
        for tf32 in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.backends.cudnn.allow_tf32 = tf32
            rounds = [
                {title: measured(attack, images, labels) for title, attack in attacks.items()}
                for _ in range(args.rounds)
            ]
            for title in attacks:
                ratio = statistics.median(each[title][0] / each["PGD"][0] for each in rounds)
                memory = rounds[-1][title][1] / rounds[-1]["PGD"][1]
                milliseconds = 1000 * min(each[title][0] for each in rounds)
                print(
                    f"{name:12s} {'TF32' if tf32 else 'float32':8s} {title:8s} "
                    f"{milliseconds:7.2f} ms, {ratio:.2f} x PGD, memory {memory:.2f} x PGD"
                )
        for title, attack in attacks.items():
            print(f"{name:12s} {title:8s} waits {waits(attack, images[:2], labels[:2]):.2f} a step")


if __name__ == "__main__":
    main()
