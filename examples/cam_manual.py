# SPDX-License-Identifier: MIT
"""ADV2 on CAM in bare lines, to read beside ``ADV2(model, CAM(model))``: the same idea, no library.

Run it: ``python examples/cam_manual.py``.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adv2.study.embedded import load_resnet, make_shapes

eps, alpha, steps, weight = 8 / 255, 2 / 255, 5 if "--smoke" in sys.argv else 100, 150.0
model = load_resnet()
normalize, net = model[0], model[1]
head = net.fc


def cam(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps scaled to [0, 1] (Eq. 7) and logits (Eq. 6), from one forward pass."""
    x = net.relu(net.bn1(net.conv1(normalize(images))))
    features = net.layer3(net.layer2(net.layer1(x)))  # (B, K, h, w)
    maps = torch.einsum("bkhw,bk->bhw", features, head.weight[target])
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low), head(features.mean((2, 3)))


clean = make_shapes(4, seed=7).images
labels = model(clean).argmax(dim=1)
target = (labels + 1) % 10
goal = cam(clean, labels)[0].detach()  # the map of the clean image, for its own class

images, velocity = clean.clone(), torch.zeros_like(clean)
for i in range(steps):
    images.requires_grad_()
    maps, logits = cam(images, target)
    prediction = F.cross_entropy(logits, target, label_smoothing=0.03, reduction="none")
    interpretation = (maps - goal).square().mean((1, 2))
    loss = (prediction + weight * interpretation).sum()  # Eq. 3, per image
    (gradient,) = torch.autograd.grad(loss, images)
    velocity = 0.9 * velocity + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
    step = alpha * (1 - i / steps)
    images = images.detach() - step * velocity.sign()  # Eq. 4, with momentum and a step that decays
    images = (clean + (images - clean).clamp(-eps, eps)).clamp(0, 1)

with torch.no_grad():
    maps, logits = cam((images * 255).round() / 255, target)
print(f"classified as the target: {(logits.argmax(dim=1) == target).float().mean():.0%}")
print(f"L1 distance of the maps: {(maps - goal).abs().mean():.4f}")
