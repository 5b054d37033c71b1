# SPDX-License-Identifier: MIT
r"""RTS: the model-guided interpreter (§3.4), a network trained to predict attribution maps.

The masking model is an encoder, a class selector and a U-Net decoder. Feature maps of the encoder
are taken from its forward pass at several scales. The selector has a vector e_c for each class, and
multiplies the coarsest features s by a gate, which opens where they agree with the class:

.. math:: s \, \sigma(\langle s, e_c \rangle - \mathrm{confidence})

The decoder upsamples the result step by step, at each scale together with the encoder's features,
and ends in two channels a, b, which give the map :math:`|a| / (|a| + |b|)`. `train_masking_model`
trains selector and decoder (Eq. 8, 22).

If the encoder is the classifier itself, one forward pass gives both map and prediction.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
from captum_adv2.interpreters.features import by_proportions, is_planar
from captum_adv2.interpreters.tap import (
    eagerly,
    find_module,
    graph_enabled,
    tapped,
    warn_of_runs,
)
from captum_adv2.spec import Count, NonNegative, Real, checked, expect_classes, expect_logits

_SCALES = 4
_GUARD = 1e-6  # far below any output of the decoder: it lowers a map of 1 by 1e-6 at most


class _Stage(nn.Module):
    """Upsamples features ``(B, inputs, h, w)`` and joins them with finer ``(B, skip, H, W)``."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, outputs, 1)
        self.join = nn.Conv2d(outputs + skip, outputs, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, outputs)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        up = F.interpolate(self.reduce(coarse), fine.shape[-2:], mode="bilinear")
        return F.relu(self.norm(self.join(torch.cat([up, fine], dim=1))))


class _Decoder(nn.Module):
    """The upsampling half of a U-Net: features, coarse to fine, to maps ``(B, 1, h, w)``."""

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
        x, *skips = features
        for stage, fine in zip(self.stages, skips, strict=True):
            x = stage(x, fine)
        a, b = self.final(x).abs().chunk(2, dim=1)
        maps: Tensor = a / (a + b + _GUARD)
        return maps


class Encoded(NamedTuple):
    """The encoder's feature maps of a batch, coarse to fine, and its output."""

    features: tuple[Tensor, ...]
    output: Any


@final
class MaskingModel(nn.Module):
    """Encoder, class selector and U-Net decoder: images and classes to maps.

    Args:
        encoder: Module that computes feature maps from the images the classifier sees, or the
            classifier itself; neither trained nor saved, unless ``own_encoder``.
        classes: Number of classes to select from; default: the encoder's number of outputs.
        layers: Modules of the encoder, or their dotted names, whose outputs to use, coarse to fine;
            default: the last module at each of the four coarsest resolutions below the image's.
        width: Channels of the finest stage, doubled at each coarser one; default: a quarter of the
            encoder's at that scale, at least 16.
        confidence: Agreement of features with a class at which the gate is half open.
        image_shape: Channels, height and width of an image that the encoder accepts.
        own_encoder: Have a copy of the encoder, which is trained and saved with the rest.

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
        own_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_() if own_encoder else encoder
        self.own_encoder = own_encoder
        self.image_shape = tuple(image_shape)
        self.confidence = confidence
        like = next(encoder.parameters(), torch.zeros(()))
        image = like.new_full((1, *image_shape), 0.5)
        if layers is not None:
            names = {module: name for name, module in encoder.named_modules()}
            self.layers = tuple(names[find_module(encoder, layer)] for layer in layers)
        try:
            if layers is None:
                self.layers = _coarsest(encoder, image)
            with graph_enabled():
                features, output = self.encode(_watched(image))
        except RuntimeError as error:
            wanted = f"an encoder of one image of shape {self.image_shape}, and hooks on its layers"
            hint = "pass layers= and image_shape= that it accepts, and no TorchScript"
            raise ValueError(f"expected {wanted}, got: {error}; {hint}") from error
        channels = [feature.shape[1] for feature in features if _channels_first(feature, image)]
        if len(channels) < max(2, len(self.layers)):
            raise ValueError(
                "expected layers with feature maps (B, K, h, w), at two scales or more, on images "
                f"of shape {self.image_shape}, got {self.layers}; pass layers= or image_shape="
            )
        if classes is None:
            if not isinstance(output, Tensor) or output.ndim != 2:
                raise ValueError("expected classes, as the encoder gives no logits; pass classes=")
            classes = output.shape[1]
        self.classes = classes
        self.width = max(16, channels[-1] // 4) if width is None else width
        self.selector = nn.Embedding(self.classes, channels[0])
        nn.init.normal_(self.selector.weight, std=channels[0] ** -0.5)
        self.decoder = _Decoder(channels, self.width)
        self.selector.to(like)  # after the draws, which are the same on every device
        self.decoder.to(like)

    def extra_repr(self) -> str:
        """Return the settings that distinguish masking models."""
        return f"classes={self.classes}, layers={self.layers}, width={self.width}"

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Return maps ``(B, 1, h, w)`` in [0, 1], at the finest scale, of classes ``(B,)``."""
        return self.decode(self.encode(images), target)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of selector and decoder; the encoder keeps its own."""
        self.training = mode
        self.selector.train(mode)
        self.decoder.train(mode)
        return self

    def encode(self, images: Tensor) -> Encoded:
        """Run the encoder, in eval mode, on images ``(B, C, H, W)``."""
        with ExitStack() as stack, eval_mode(self.encoder):
            modules = [self.encoder.get_submodule(name) for name in self.layers]
            taps = [stack.enter_context(tapped(module, "output")) for module in modules]
            output = self.encoder(images)
        warn_of_runs("a layer of the masking model", max((tap.runs for tap in taps), default=0))
        features = tuple(tap.features for tap in taps if tap.features is not None)
        return Encoded(features, output)

    def presence(self, encoded: Encoded, target: Tensor) -> Tensor:
        """Return the selector's log-odds ``(B,)`` that a class is in the image."""
        return self._agreement(encoded, target).mean(dim=(1, 2, 3))

    def decode(self, encoded: Encoded, target: Tensor) -> Tensor:
        """Return the maps ``(B, 1, h, w)`` of classes ``(B,)``."""
        gate = torch.sigmoid(self._agreement(encoded, target) - self.confidence)
        coarsest, *finer = encoded.features
        maps: Tensor = self.decoder([coarsest * gate, *finer])
        return maps

    def expect_logits(self, output: Any, batch: int) -> Tensor:
        """Return a classifier's output if it is logits of the masking model's classes."""
        logits = expect_logits(output, batch)
        if (own := logits.shape[1]) != self.classes:
            wanted = f"a masking model for the classifier's {own} classes"
            raise ValueError(f"expected {wanted}, got one for {self.classes}")
        return logits

    def with_own_encoder(self) -> MaskingModel:
        """Return a copy that shares nothing with this one, with an encoder of its own."""
        found = copy.deepcopy(self)
        found.encoder.requires_grad_()
        found.own_encoder = True
        return found

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters to train: those of selector, decoder and an own encoder."""
        parts = [self.selector, self.decoder, *[self.encoder] * self.own_encoder]
        return [parameter for part in parts for parameter in part.parameters()]

    def trained(self) -> dict[str, Tensor]:
        """Return the weights of selector, decoder and an own encoder by name."""
        kept = ("selector.", "decoder.", *["encoder."] * self.own_encoder)
        return {name: value for name, value in self.state_dict().items() if name.startswith(kept)}

    def restore(self, trained: dict[str, Tensor]) -> None:
        """Set the weights that `trained` returned; a mismatch changes none of them."""
        own = self.trained()
        ours, theirs = ({(name, *value.shape) for name, value in w.items()} for w in (own, trained))
        if ours != theirs:
            got = f"one that differs in {min(ours ^ theirs)}"
            hint = "use the encoder, layers and width of the training"
            raise ValueError(f"expected a checkpoint of this architecture, got {got}; {hint}")
        for name, value in own.items():
            value.copy_(trained[name])

    def save(self, path: str | Path) -> None:
        """Write what is trained, with the settings needed to build it again."""
        names = ("classes", "layers", "width", "confidence", "image_shape", "own_encoder")
        settings = {name: getattr(self, name) for name in names}
        encoder = None if self.own_encoder else storage.digest(self.encoder)
        record = {"settings": settings, "encoder": encoder}
        storage.save(record | {"trained": self.trained()}, path, "masking model")

    @classmethod
    def load(cls, path: str | Path, encoder: nn.Module) -> Self:
        """Read a masking model that `save` wrote; the encoder must be the one it had.

        If the file has an encoder of its own, only the architecture of the one passed counts.
        """
        hints = {"settings": Mapping[str, Any], "trained": Mapping[str, Tensor]}
        record = storage.load(path, "masking model", hints)
        settings, trained = record["settings"], record["trained"]
        wanted = f"expected a masking model for this encoder in {path}"
        # None: a file with an encoder of its own, or an early one.
        if record.get("encoder") not in (None, storage.digest(encoder)):
            raise ValueError(f"{wanted}, got one for other weights; cast the encoder later")
        # A number that does not fit could take all memory.
        for name, weight, dim in ("classes", "selector", 0), ("width", "decoder.final", 1):
            shape = trained.get(f"{weight}.weight", torch.empty(0, 0)).shape
            if len(shape) <= dim or settings.get(name) != shape[dim]:
                raise ValueError(f"{wanted}, got {name} {settings.get(name)}, {weight} {shape}")
        try:
            with torch.random.fork_rng(devices=[]):  # the weights drawn are overwritten
                masking_model = cls(encoder, **settings)
            masking_model.restore(trained)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{wanted}, got: {error}") from error
        return masking_model.eval()

    def _agreement(self, encoded: Encoded, target: Tensor) -> Tensor:
        """Return the product of the coarsest features and a class's vector, ``(B, 1, h, w)``."""
        wanted: Tensor = self.selector(target)[:, :, None, None]
        return (encoded.features[0] * wanted).sum(dim=1, keepdim=True)


def _watched(image: Tensor) -> Tensor:
    """Return a copy that a graph is made for: it says which layout features have."""
    return image.clone().requires_grad_() * 1


def _channels_first(features: Tensor, image: Tensor) -> bool:
    # Parametrisations give weights, whose first dimension is no batch.
    return (
        features.ndim == 4
        and len(features) == len(image)
        and (is_planar(features) or by_proportions(features, image.shape) == 1)
    )


def _coarsest(encoder: nn.Module, image: Tensor) -> tuple[str, ...]:
    """Return the name of the last module at each of the coarsest resolutions, coarse to fine."""
    names = {module: name for name, module in encoder.named_modules() if name}
    sizes: dict[str, torch.Size] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and _channels_first(output, image):
            sizes.pop(names[module], None)  # a module that runs twice counts where it runs last
            sizes[names[module]] = output.shape[2:]

    with ExitStack() as stack, eval_mode(encoder), graph_enabled(), eagerly():
        for module in names:
            stack.enter_context(module.register_forward_hook(note))
        encoder(_watched(image))
    last = {size: name for name, size in sizes.items() if 1 < size.numel() < image[0, 0].numel()}
    return tuple(last[size] for size in sorted(last, key=torch.Size.numel)[:_SCALES])


@final
@checked
@dataclass(frozen=True)
class EncoderGuided(Surrogate):
    """The surrogate of RTS: its map, and a loss on the encoder as the penalty (§3.4).

    The loss is the cross entropy of the encoder's own output and the attacker's class. It applies
    if the encoder returns logits of the masking model's classes.

    Args:
        weight: Weight of that loss (lambda_2 of Table 11, 12); 0 omits it.
    """

    needs = "look"

    weight: NonNegative = 0.1

    def __call__(self, rts: RTS, images: Tensor, state: Tensor, progress: float) -> Explanation:
        """See `Surrogate`."""
        explanation, output = rts.look(images, state)
        wanted = (len(images), rts.masking_model.classes)
        if not self.weight or getattr(output, "shape", None) != wanted:
            return explanation
        penalty = self.weight * F.cross_entropy(output, state, reduction="none")
        return explanation._replace(penalty=penalty)


@final
class RTS(Interpreter):
    """RTS: the map of a masking model, in one forward pass (§3.4).

    Convention:
        Map = ``|a| / (|a| + |b|)``, raw in [0, 1], at the finest of the masking model's scales.

    Args:
        model: Classifier returning logits. If it is the masking model's encoder, they share one
            forward pass.
        masking_model: Returns the maps; trained by `train_masking_model`.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1),
    ...                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    >>> rts = RTS(model, MaskingModel(model, image_shape=(1, 16, 16)))
    >>> rts(torch.rand(2, 1, 16, 16), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])
    """

    scaled = False
    surrogate = EncoderGuided()

    @checked
    def __init__(self, model: nn.Module, masking_model: MaskingModel) -> None:
        super().__init__(model)
        self.masking_model = masking_model
        self._shared = masking_model.encoder is model
        self._verified = False  # that the classifier has the masking model's classes

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """See `Interpreter.explain`."""
        if not self._shared:  # nothing else compares the target with the classes
            batch = torch.empty(len(target), self.masking_model.classes, device="meta")
            expect_classes(target, batch, "target")
        return self.look(images, target)[0]

    def look(self, images: Tensor, target: Tensor) -> tuple[Explanation, Any]:
        """Return the explanation and the encoder's own output."""
        masking_model = self.masking_model
        if not (self._shared or self._verified):
            with eval_mode(self.model), torch.no_grad():
                masking_model.expect_logits(self.logits(images[:1].detach()), 1)
            self._verified = True
        encoded = masking_model.encode(self.prepare(images))
        logits = masking_model.expect_logits(encoded.output, len(images)) if self._shared else None
        return Explanation(masking_model.decode(encoded, target), logits), encoded.output
