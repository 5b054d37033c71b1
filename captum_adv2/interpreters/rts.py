# SPDX-License-Identifier: MIT
r"""RTS: the model-guided interpreter (§3.4), a network trained to say what matters in an image.

The masking model is an encoder, a class selector and a U-Net decoder. The encoder's feature maps
are read off its forward pass at several scales, fine to coarse. The selector has a vector e_c for
each class, and lets through the coarsest features s where they agree with it:

.. math:: s \, \sigma(\langle s, e_c \rangle - \mathrm{confidence})

The decoder brings what is left back up, joined at each scale by the encoder's features there, and
ends in two channels a, b, which give the map :math:`|a| / (|a| + |b|)`. `train_masking_model`
trains selector and decoder (Eq. 8, 22).

Where the encoder is the classifier itself, one forward pass gives both map and prediction.

Differs from the original code: any encoder whose modules give feature maps, of any sizes (bilinear
upsampling in place of pixel shuffle); group normalisation in place of batch normalisation, so that
a map never depends on the other images of a batch; the division is guarded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2 import storage
from captum_adv2.interpreters.base import Explanation, Interpreter, Surrogate, eval_mode
from captum_adv2.interpreters.tap import find_module, tapped
from captum_adv2.spec import Count, NonNegative, Real, checked, expect_logits

_SCALES = 4
_GUARD = 1e-6  # far below any output of the decoder: a map of 1 becomes 1 - 1e-6 at the least


class _Stage(nn.Module):
    """Brings features up to the next finer scale and joins them with the encoder's there."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, outputs, 1)
        self.join = nn.Conv2d(outputs + skip, outputs, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, outputs)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Map ``(B, inputs, h, w)`` and ``(B, skip, H, W)`` to ``(B, outputs, H, W)``."""
        size = fine.shape[-2:]
        up = F.interpolate(self.reduce(coarse), size, mode="bilinear", align_corners=False)
        out: Tensor = self.norm(self.join(torch.cat([up, fine], dim=1))).relu()
        return out


class _Decoder(nn.Module):
    """A U-Net's way up, from features, coarse to fine, to a map at the finest scale."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        # As in the original, each coarser stage has twice the channels.
        widths = [width * 2**power for power in reversed(range(len(channels) - 1))]
        inputs = pairwise([channels[0], *widths])
        self.stages = nn.ModuleList(
            _Stage(before, skip, after)
            for (before, after), skip in zip(inputs, channels[1:], strict=True)
        )
        self.final = nn.Conv2d(width, 2, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features, coarse to fine, to ``(B, 1, h, w)`` in [0, 1]."""
        x, *skips = features
        for stage, fine in zip(self.stages, skips, strict=True):
            x = stage(x, fine)
        a, b = self.final(x).abs().chunk(2, dim=1)
        maps: Tensor = a / (a + b + _GUARD)
        return maps


class Encoded(NamedTuple):
    """What the encoder says of images: feature maps, coarse to fine, and its own output."""

    features: tuple[Tensor, ...]
    output: Tensor


@final
class MaskingModel(nn.Module):
    """Encoder, class selector and U-Net decoder: images and classes to maps.

    The encoder is neither trained nor saved; it may be the classifier itself.

    Args:
        encoder: Module whose forward pass has feature maps in it; sees what the classifier sees.
        classes: Number of classes to select from; default: the encoder's number of outputs.
        layers: Modules of the encoder, or their dotted names, whose outputs to use, coarse to fine;
            default: the last module at each of the four coarsest resolutions below the image's.
        width: Channels of the finest stage; each coarser one has twice as many. Default: a quarter
            of the encoder's at that scale, at least 16.
        confidence: How much features must agree with a class to be let through.
        image_shape: Channels, height and width of images the encoder works on.

    Attributes:
        stride: Least height and width of images.

    Shape:
        - images: ``(B, C, H, W)`` in [0, 1]; target: ``(B,)``.
        - output: ``(B, 1, h, w)`` in [0, 1], at the finest of the scales.

    >>> encoder = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1),
    ...                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    >>> masking_model = MaskingModel(encoder, image_shape=(1, 16, 16))
    >>> masking_model(torch.rand(2, 1, 16, 16), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    Reference: Dabkowski & Gal, Real Time Image Saliency for Black Box Classifiers, NeurIPS 2017.
    """

    @checked
    def __init__(
        self,
        encoder: nn.Module,
        classes: Count | None = None,
        *,
        layers: Sequence[nn.Module | str] | None = None,
        width: Count | None = None,
        confidence: Real = 0.0,
        image_shape: Sequence[Count] = (3, 224, 224),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.image_shape = tuple(image_shape)
        if len(self.image_shape) != 3:
            raise ValueError(f"expected image_shape (C, H, W), got {self.image_shape}")
        self.confidence = confidence
        found, outputs = _survey(encoder, self.image_shape, layers)
        self.layers = tuple(found)
        channels = [shape[1] for shape in found.values()]
        coarsest, *_, finest = found.values()
        self.stride = -(-self.image_shape[1] // coarsest[2])
        self.classes = outputs if classes is None else classes
        if self.classes < 2:
            raise ValueError(
                f"expected classes at least 2, got {self.classes}; pass classes= where the encoder "
                "returns something else than logits"
            )
        self.width = max(16, finest[1] // 4) if width is None else width
        self.selector = nn.Embedding(self.classes, channels[0])
        nn.init.normal_(self.selector.weight, std=channels[0] ** -0.5)
        self.decoder = _Decoder(channels, self.width)
        like = _like(encoder)
        self.selector.to(like)
        self.decoder.to(like)

    def extra_repr(self) -> str:
        """Return what tells one masking model from another."""
        return f"classes={self.classes}, layers={self.layers}, width={self.width}"

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Return maps ``(B, 1, h, w)`` in [0, 1]."""
        return self.decode(self.encode(images), target)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of selector and decoder; the encoder's is its owner's."""
        self.training = mode
        for part in (self.selector, self.decoder):
            part.train(mode)
        return self

    def encode(self, images: Tensor) -> Encoded:
        """Run the encoder, in eval mode whatever its own, on images ``(B, C, H, W)``."""
        if min(images.shape[-2:]) < self.stride:
            raise ValueError(
                f"expected images of at least {self.stride} x {self.stride} pixels, the encoder's "
                f"stride, got {tuple(images.shape)}"
            )
        with ExitStack() as stack, eval_mode(self.encoder):
            taps = [
                stack.enter_context(tapped(find_module(self.encoder, name), "output"))
                for name in self.layers
            ]
            output = self.encoder(images)
        features = tuple(tap.features for tap in taps if tap.features is not None)
        return Encoded(features, output)

    def presence(self, encoded: Encoded, target: Tensor) -> Tensor:
        """Return the selector's log-odds ``(B,)`` that a class is in the image."""
        return self._agreement(encoded, target).mean(dim=(1, 2, 3))

    def decode(self, encoded: Encoded, target: Tensor) -> Tensor:
        """Return the maps ``(B, 1, h, w)`` of classes from what the encoder says."""
        gate = torch.sigmoid(self._agreement(encoded, target) - self.confidence)
        coarsest, *finer = encoded.features
        maps: Tensor = self.decoder([coarsest * gate, *finer])
        return maps

    def expect_own(self, logits: Tensor) -> Tensor:
        """Return a classifier's logits ``(B, classes)`` if its classes are those selected from."""
        if logits.shape[1] != self.classes:
            raise ValueError(
                f"expected a masking model for the classifier's {logits.shape[1]} classes, got one "
                f"for {self.classes}"
            )
        return logits

    def trained(self) -> dict[str, Tensor]:
        """Return what training changes and a file keeps: selector and decoder, by name."""
        state = self.state_dict()
        return {name: value for name, value in state.items() if not name.startswith("encoder.")}

    def restore(self, trained: dict[str, Tensor]) -> None:
        """Put back what `trained` gave; all of it or nothing."""
        expected = {name: tuple(value.shape) for name, value in self.trained().items()}
        found = {name: tuple(value.shape) for name, value in trained.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"expected a checkpoint of this architecture, {name} {expected.get(name)}, got "
                    f"{found.get(name)}; build the masking model on the encoder and with the "
                    "layers and width it was trained with"
                )
        for name, value in self.trained().items():
            value.copy_(trained[name])

    def save(self, path: str | Path) -> None:
        """Write selector and decoder, with the settings needed to build them again."""
        settings = {
            "classes": self.classes,
            "layers": list(self.layers),
            "width": self.width,
            "confidence": self.confidence,
            "image_shape": list(self.image_shape),
        }
        storage.save({"settings": settings, "trained": self.trained()}, path, "masking model")

    @classmethod
    def load(cls, path: str | Path, encoder: nn.Module) -> Self:
        """Read a masking model that `save` wrote, on an encoder such as it was trained with."""
        record = storage.load(path, "masking model")
        with torch.random.fork_rng(devices=[]):  # weights are drawn, and not kept
            masking_model = cls(encoder, **record["settings"])
        masking_model.restore(record["trained"])
        return masking_model.eval()

    def _agreement(self, encoded: Encoded, target: Tensor) -> Tensor:
        """Return how much the coarsest features agree with a class, ``(B, 1, h, w)``."""
        wanted: Tensor = self.selector(target)[:, :, None, None]
        return (encoded.features[0] * wanted).sum(dim=1, keepdim=True)


def _like(encoder: nn.Module) -> Tensor:
    """Return a tensor of the encoder's dtype and device."""
    return next(encoder.parameters(), torch.zeros(()))


def _survey(
    encoder: nn.Module, image_shape: Sequence[int], layers: Sequence[nn.Module | str] | None
) -> tuple[dict[str, torch.Size], int]:
    """Run the encoder once; return shapes by name of layer, coarse to fine, and its outputs."""
    seen: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[[Any, Any, Any], None]:
        def look(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                seen.pop(name, None)  # modules that run twice count where they run last
                seen[name] = output.shape

        return look

    like = _like(encoder)
    image = torch.full((1, *image_shape), 0.5, dtype=like.dtype, device=like.device)
    names = {module: name for name, module in encoder.named_modules()}
    wanted = None if layers is None else [names[find_module(encoder, each)] for each in layers]
    with ExitStack() as stack, eval_mode(encoder), torch.no_grad():
        for module, name in names.items():
            stack.enter_context(module.register_forward_hook(note(name)))
        try:
            output = encoder(image)
        except RuntimeError as error:
            raise ValueError(
                f"expected an encoder for images of shape {tuple(image_shape)}, got one that fails "
                f"on them: {error}; pass image_shape="
            ) from error
    if wanted is None:
        last = {
            shape[2:]: name
            for name, shape in seen.items()
            if name and shape[2:].numel() > 1 and shape[2] < image_shape[1]
        }
        wanted = [last[size] for size in sorted(last, key=lambda size: size.numel())[:_SCALES]]
    if len(wanted) < 2 or not set(wanted) <= set(seen):
        raise ValueError(
            f"expected an encoder with feature maps at two scales or more on images of shape "
            f"{tuple(image_shape)}, got {[name for name in wanted if name in seen]}; pass layers=, "
            "coarse to fine, or image_shape="
        )
    outputs = output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else 0
    return {name: seen[name] for name in wanted}, outputs


@final
@checked
@dataclass(frozen=True)
class EncoderGuided(Surrogate):
    """The attack's view of RTS: its map, and the encoder's own loss (§3.4).

    A penalty keeps the encoder, too, at the attacker's class: the cross entropy of its output,
    as in the official code. An encoder whose outputs are not the classes has none.

    Args:
        weight: Weight of that loss (lambda_2 of Table 11, 12); 0 leaves it out.
    """

    weight: NonNegative = 0.1

    def __call__(self, rts: Any, images: Tensor, state: Tensor, progress: float) -> Explanation:
        """Return the map, and the encoder's loss as its penalty."""
        explanation, output = rts.look(images, state)
        wanted = (len(images), rts.masking_model.classes)
        if not self.weight or getattr(output, "shape", None) != wanted:
            return explanation
        penalty = self.weight * F.cross_entropy(output, state, reduction="none")
        return explanation._replace(penalty=penalty)


@final
class RTS(Interpreter):
    """RTS: the map that a masking model gives, in one forward pass (§3.4).

    Convention:
        Map = |a| / (|a| + |b|), raw in [0, 1], at the finest of the masking model's scales.

    Where the masking model's encoder is the classifier itself, they share one forward pass.

    Args:
        model: Classifier returning logits.
        masking_model: What gives the maps; trained by `train_masking_model`.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1),
    ...                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    >>> rts = RTS(model, MaskingModel(model, image_shape=(1, 16, 16)))
    >>> rts(torch.rand(2, 1, 16, 16), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    Reference: Dabkowski & Gal, Real Time Image Saliency for Black Box Classifiers, NeurIPS 2017.
    """

    scaled = False
    surrogate = EncoderGuided()

    @checked
    def __init__(self, model: nn.Module, masking_model: MaskingModel) -> None:
        super().__init__(model)
        self.masking_model = masking_model
        self._shared = masking_model.encoder is model
        self._verified = False  # whether classifier and masking model have as many classes

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """See `Interpreter.explain`."""
        return self.look(images, target)[0]

    def look(self, images: Tensor, target: Tensor) -> tuple[Explanation, Tensor]:
        """Return the explanation, and what the encoder itself puts out, ``(B, classes)``."""
        masking_model = self.masking_model
        if not (self._shared or self._verified):
            with eval_mode(self.model), torch.no_grad():
                masking_model.expect_own(self.logits(images[:1].detach()))
            self._verified = True
        encoded = masking_model.encode(self.prepare(images))
        logits = None
        if self._shared:
            logits = masking_model.expect_own(expect_logits(encoded.output, len(images)))
        return Explanation(masking_model.decode(encoded, target), logits), encoded.output


def expect_masking_model(value):  # temporary
    if not isinstance(value, MaskingModel):
        raise TypeError(f"expected a MaskingModel, got {type(value).__name__}")
    return value
