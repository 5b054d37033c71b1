# SPDX-License-Identifier: MIT
r"""Feature squeezing: simplifying an image changes the prediction more if it was attacked (§4 Q3).

A *squeezer* :math:`\psi` maps images ``(B, C, H, W)`` in [0, 1] to simpler ones of the same shape,
dtype and device, each image by itself; an adaptive attack can differentiate it. The detector
compares the classifier's softmax vectors p on both:

.. math:: s(x) = \max_\psi \| p(x) - p(\psi(x)) \|_1 \in [0, 2]

Table 4 has four squeezers: ``BitDepth(2)``, ``BitDepth(3)``, ``MedianSmoothing(3)`` and
``NonLocalMeans(11, 3, 4)``.

Reference: Xu et al., Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks,
NDSS 2018, https://arxiv.org/abs/1704.01155
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Self, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_adv2 import storage
from captum_adv2.attacks.adaptive import Squeezer
from captum_adv2.attacks.frameworks import quantize
from captum_adv2.defenses.detection import Detector
from captum_adv2.interpreters.base import eval_mode
from captum_adv2.interpreters.boundary import outputs_checked
from captum_adv2.spec import Array, Bits, Count, Positive, Range, Real, checked

# Squeezers do not look at values: a step of an adaptive attack would have to wait for the GPU.
Window: TypeAlias = Annotated[int, Range(2, 3, integer=True)]
Pixels: TypeAlias = Annotated[Tensor, Array(4, hint="; scale images to [0, 1]")]


def _wide(images: Tensor) -> Tensor:
    """Return images in float32, or in the wider dtype they have."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


@final
@checked
@dataclass(frozen=True)
class BitDepth:
    """Bit depth reduction: ``round(x (2^bits - 1)) / (2^bits - 1)``, ties to even.

    Its gradient is zero, or with ``straight_through`` the identity's.

    >>> BitDepth(1)(torch.tensor([[[[0.2, 0.6]]]])).flatten().tolist()
    [0.0, 1.0]
    """

    bits: Bits
    straight_through: bool = False

    @checked
    def __call__(self, images: Pixels) -> Tensor:
        """Return squeezed images ``(B, C, H, W)``."""
        squeezed = quantize(_wide(images), self.bits).to(images.dtype)
        return squeezed.detach() + (images - images.detach()) if self.straight_through else squeezed


@final
@checked
@dataclass(frozen=True)
class MedianSmoothing:
    """Local smoothing: the median of a window of side 2 or 3 around each pixel, channel by channel.

    Equal to ``scipy.ndimage.median_filter(images, (1, 1, window, window), mode="reflect")``, which
    Xu et al. use: edge pixels are repeated at the border; the window of side 2 reaches one pixel up
    and left, and of its four values takes the third smallest.

    >>> MedianSmoothing(3)(torch.eye(3)[None, None]).flatten().tolist()
    [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    """

    window: Window = 3

    @checked
    def __call__(self, images: Pixels) -> Tensor:
        """Return squeezed images ``(B, C, H, W)``."""
        x = _wide(images)
        if self.window == 2:
            return _upper_median(x).to(images.dtype)
        from kornia.filters import median_blur  # late: it takes long to import

        return median_blur(x, 3, border_type="replicate").to(images.dtype)


def _upper_median(images: Tensor) -> Tensor:
    """Return the third smallest of each pixel, its upper, its left, its upper left neighbour."""
    padded = F.pad(images, (1, 0, 1, 0), mode="replicate")
    upper, lower = padded[..., :-1, :], padded[..., 1:, :]
    a, b, c, d = upper[..., :-1], upper[..., 1:], lower[..., :-1], lower[..., 1:]
    # All but the overall maximum: the two lows, and the smaller of the two highs.
    lows = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    return torch.maximum(lows, torch.minimum(torch.maximum(a, b), torch.maximum(c, d)))


@final
@checked
@dataclass(frozen=True)
class NonLocalMeans:
    r"""Non-local smoothing: a mean of pixels, weighted by how alike the patches around them are.

    .. math:: w(p, q) = \exp(-d(p, q) / h^2), \quad
        d(p, q) = \mathrm{mean}_{t, k} \, (x_k[p + t] - x_k[q + t])^2

    with q in the search window around p, t in the patch, k over channels, and weights below 0.001
    left out. Follows OpenCV's ``fastNlMeansDenoisingColored``, which Xu et al. use: colours go to
    L*a*b* (of linear RGB: no gamma is undone), where lightness, on a scale to 255, and colour are
    smoothed separately; grey images are smoothed as they are. Borders are mirrored without
    repeating the edge.

    Differs from OpenCV, which rounds L*a*b*: nothing is rounded, and all is differentiable. On
    photographs, at 11-3-4, grey values differ by 0.2 / 255 on average and 0.8 / 255 at most,
    coloured ones by 0.74 / 255 and 5.7 / 255. Code that hands RGB to OpenCV, which reads BGR,
    computes ``squeezer(x.flip(1)).flip(1)``, as Xu et al.'s and the official code do.

    Args:
        search: Side of the search window, odd. Memory, with gradients too, is that of one row.
        patch: Side of the patches, odd.
        strength: h, in units of 1/255; larger smooths more.

    >>> NonLocalMeans(search=3)(torch.full((1, 1, 2, 2), 0.5)).flatten().tolist()
    [0.5, 0.5, 0.5, 0.5]

    Reference: Buades, Coll & Morel, A Non-Local Algorithm for Image Denoising, CVPR 2005.
    """

    search: Count = 11
    patch: Count = 3
    strength: Positive = 4.0

    def __post_init__(self) -> None:
        """Refuse windows without a pixel at their centre."""
        if not (self.search % 2 and self.patch % 2):
            raise ValueError(f"expected search and patch to be odd, got {self}")

    @checked
    def __call__(self, images: Pixels) -> Tensor:
        """Return squeezed images ``(B, C, H, W)``."""
        x, channels = _wide(images), images.shape[1]
        if channels not in (1, 3):
            raise ValueError(f"expected grey or RGB images, 1 or 3 channels, got {channels}")
        if channels == 1:
            return (self._smooth(255 * x) / 255).clamp(0, 1).to(images.dtype)
        lab = _to_lab(x)
        lab = torch.cat([self._smooth(lab[:, :1]), self._smooth(lab[:, 1:])], dim=1)
        return _from_lab(lab).clamp(0, 1).to(images.dtype)

    def _smooth(self, x: Tensor) -> Tensor:
        """Return non-local means of images whose channels share the weights."""
        reach = self.search // 2 + self.patch // 2
        rows, columns = (_mirrored(side, reach, x.device) for side in x.shape[-2:])
        padded = x[:, :, rows][..., columns]
        total, weight = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        # Without checkpoints, the graph would keep several images for each offset.
        add_row = partial(
            checkpoint, self._add_row, padded, use_reentrant=False, preserve_rng_state=False
        )
        for dy in range(self.search):
            total, weight = add_row(total, weight, dy)
        return x + total / weight

    def _add_row(
        self, padded: Tensor, total: Tensor, weight: Tensor, dy: int
    ) -> tuple[Tensor, Tensor]:
        """Add a row of the search window to the weighted sum of differences and to the weights."""
        half, margin = self.search // 2, self.patch // 2
        height, width = (side - 2 * half for side in padded.shape[-2:])
        patches = padded[:, :, half : half + height, half : half + width]
        for dx in range(self.search):
            change = padded[:, :, dy : dy + height, dx : dx + width] - patches
            unlike = _windows(change.square().mean(dim=1, keepdim=True), self.patch)
            w = (unlike / -((self.patch * self.strength) ** 2)).exp()
            w = F.threshold(w, 1e-3, 0.0)  # (B, 1, H, W); smaller ones are zero, as in OpenCV
            inner = change[..., margin : height - margin, margin : width - margin]
            total, weight = total + w * inner, weight + w
        return total, weight


def _windows(x: Tensor, side: int) -> Tensor:
    """Return the sum over each window that lies inside an image (far faster than pooling)."""
    height, width = (length - side + 1 for length in x.shape[-2:])
    columns = reduce(torch.add, (x[..., i : i + width] for i in range(side)))
    return reduce(torch.add, (columns[..., i : i + height, :] for i in range(side)))


def _mirrored(side: int, reach: int, device: torch.device) -> Tensor:
    """Return the pixels at -reach ... side + reach - 1 of a side mirrored at both ends."""
    period = max(2 * (side - 1), 1)
    index = torch.arange(-reach, side + reach, device=device) % period
    return torch.minimum(index, period - index)


# Linear RGB to XYZ of the white point D65, over that white: rows X, Y, Z. OpenCV's figures.
_XYZ = torch.tensor(
    [
        [0.412453 / 0.950456, 0.357580 / 0.950456, 0.180423 / 0.950456],
        [0.212671, 0.715160, 0.072169],
        [0.019334 / 1.088754, 0.119193 / 1.088754, 0.950227 / 1.088754],
    ],
    dtype=torch.float64,
)
_RGB = _XYZ.inverse()
_KNEE = (6 / 29) ** 3  # below it a straight line takes the place of the cube root
_SLOPE = (29 / 6) ** 2 / 3


def _to_lab(rgb: Tensor) -> Tensor:
    """Return L* on a scale to 255, a* and b* of linear RGB ``(B, 3, H, W)``."""
    xyz = torch.einsum("ij,bjhw->bihw", _XYZ.to(rgb), rgb)
    root = xyz.clamp(min=_KNEE) ** (1 / 3)
    x, y, z = torch.where(xyz > _KNEE, root, _SLOPE * xyz + 4 / 29).unbind(dim=1)
    return torch.stack([2.55 * (116 * y - 16), 500 * (x - y), 200 * (y - z)], dim=1)


def _from_lab(lab: Tensor) -> Tensor:
    """Return the linear RGB of L*a*b* images: the inverse of `_to_lab`."""
    lightness, a, b = lab.unbind(dim=1)
    y = (lightness / 2.55 + 16) / 116
    roots = torch.stack([y + a / 500, y, y - b / 200], dim=1)
    xyz = torch.where(roots > 6 / 29, roots**3, (roots - 4 / 29) / _SLOPE)
    return torch.einsum("ij,bjhw->bihw", _RGB.to(lab), xyz)


@final
class FeatureSqueezing(Detector):
    """The detector of Xu et al.: how far squeezing an image moves the classifier's softmax vector.

    Original and squeezed images go through the model in one forward pass; softmax is in float32 at
    least. Squeezers are any functions of images.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    >>> detector = FeatureSqueezing(model, [BitDepth(2), MedianSmoothing(2)])
    >>> benign = torch.rand(40, 3, 4, 4)
    >>> int(detector.fit(benign, rate=0.05).detect(benign).sum())
    2
    >>> detector.detect_each(benign).shape
    torch.Size([40, 2])
    """

    _KIND = "feature squeezing detector"

    @checked
    def __init__(self, model: nn.Module, squeezers: Sequence[Squeezer]) -> None:
        super().__init__()
        if not squeezers:
            raise ValueError("expected at least one squeezer, got none")
        self.model = model
        self.squeezers = tuple(squeezers)

    def __repr__(self) -> str:
        return f"FeatureSqueezing({type(self.model).__name__}, {list(self.squeezers)})"

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Return each squeezer's score of images ``(B, C, H, W)``, in [0, 2], ``(B, n)``."""
        views = [images, *(_squeezed(squeezer, images) for squeezer in self.squeezers)]
        with eval_mode(self.model), outputs_checked(self.model, self.model, images):
            logits = self.model(torch.cat(views))
        original, *squeezed = _wide(logits).softmax(dim=1).chunk(len(views))
        scores = [(p - original).abs().sum(dim=1) for p in squeezed]
        return torch.stack(scores, dim=1).clamp(max=2)

    def save(self, path: str | Path) -> None:
        """Write the thresholds to a file, for `load`; the model is not part of it."""
        record = {
            "squeezers": [repr(squeezer) for squeezer in self.squeezers],
            "threshold": self.threshold,
            "thresholds": list(self.thresholds),
            "model": storage.digest(self.model),
        }
        storage.save(record, path, self._KIND)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, squeezers: Sequence[Squeezer]) -> Self:
        """Return a fitted detector with the thresholds in a file that `save` wrote.

        The model is the one that they were fitted on; the squeezers are the same in the same order,
        by their ``repr``.
        """
        detector = cls(model, squeezers)
        hints = {"squeezers": Sequence[str], "threshold": Real, "thresholds": Sequence[Real]}
        record = storage.load(path, cls._KIND, hints)
        ours = [repr(squeezer) for squeezer in detector.squeezers]
        if record["squeezers"] != ours:
            raise ValueError(
                f"expected the thresholds of {', '.join(ours)}, got {path}, with those of "
                f"{', '.join(record['squeezers'])}; pass the same squeezers, or fit again"
            )
        if record.get("model") not in (None, storage.digest(model)):  # None: an early file
            raise ValueError(f"expected the thresholds of this model, got {path}; fit again")
        if len(record["thresholds"]) != len(ours):
            raise ValueError(f"expected a threshold for each squeezer, got {path}; fit again")
        detector._fitted = (record["threshold"], *record["thresholds"])
        return detector


def _squeezed(squeezer: Squeezer, images: Tensor) -> Tensor:
    squeezed = squeezer(images)
    if (squeezed.shape, squeezed.dtype) != (images.shape, images.dtype):
        raise ValueError(
            f"expected {squeezer!r} to return images of shape {tuple(images.shape)}, "
            f"{images.dtype}, got {tuple(squeezed.shape)}, {squeezed.dtype}"
        )
    return squeezed
