# SPDX-License-Identifier: MIT
"""Peak memory of a map and its gradient on the CPU, a process for each interpreter.

    python examples/benchmark/memory.py

ResNet-50 at 224x224, 8 images; what the process takes above the loaded model and images.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable

import captum.attr as ca
import torch
from torch import nn
from torchvision.models import resnet50

from captum_adv2.interpreters import (
    CAM,
    CaptumInterpreter,
    Gradient,
    IntegratedGradients,
    Interpreter,
    SmoothGrad,
)

WINDOW = {"sliding_window_shapes": (3, 112, 112), "strides": (3, 112, 112)}
BUILD: dict[str, Callable[[nn.Module], Interpreter]] = {
    "CAM": CAM,
    "GRAD": Gradient,
    "SmoothGrad": lambda model: SmoothGrad(model, samples=4),
    "integrated gradients": lambda model: IntegratedGradients(model, steps=4),
    "occlusion": lambda model: CaptumInterpreter(ca.Occlusion(model), **WINDOW),
}


def peak() -> float:
    """Return the most memory that the process has taken, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure one interpreter, or start a process for each."""
    if len(sys.argv) == 1:
        for name in BUILD:
            subprocess.run([sys.executable, __file__, name], check=True)
        return
    model = resnet50(weights=None).eval()
    images, target = torch.rand(8, 3, 224, 224), torch.zeros(8, dtype=torch.long)
    interpreter, before = BUILD[sys.argv[1]](model), peak()
    leaf = images.clone().requires_grad_()
    surrogate = interpreter.surrogate
    state = surrogate.init(interpreter, images, target)
    maps = surrogate(interpreter, leaf, state, 0.0).maps
    torch.autograd.grad(maps.square().sum(), leaf)
    print(f"{sys.argv[1]:22s} {peak() - before:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
