# SPDX-License-Identifier: MIT
r"""Training a masking model: the loss that defines a good map (Eq. 8, 22), and its minimisation.

A map m of the image x for its class c is good if x shows its class where m is kept and no longer
shows it where m is removed, and if m is small and smooth:

.. math:: \lambda_1 r_{tv}(m) + \lambda_2 r_{av}(m) - \log f_c(\phi(x; m))
          + \lambda_3 f_c(\phi(x; 1 - m))^{\lambda_4}

For a class that is *not* in the image the roles of m and 1 - m are exchanged: such a map must not
cover the image's own class. Part of each batch is of this kind. The selector is trained at the same
time, by logistic regression, to predict whether the class is present.

Everything random is drawn from a seed and the number of the step, so a resumed run ends with the
same weights as one that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2 import storage
from captum_adv2.interpreters.base import eval_mode
from captum_adv2.interpreters.mask import Blur
from captum_adv2.interpreters.rts import MaskingModel
from captum_adv2.progress import progress_bar
from captum_adv2.seeds import mixed
from captum_adv2.spec import (
    Classes,
    Count,
    Images,
    Index,
    NonNegative,
    Positive,
    Unit,
    checked,
    expect_classes,
)

Loader: TypeAlias = Iterable[tuple[Tensor, Tensor]]
"""Gives batches ``(images, labels)``, and has a length: a ``DataLoader``, or a list."""

_EVERY = 100  # steps from checkpoint to checkpoint
_RECORD = {
    "run": Mapping[str, Any],
    "done": Index,
    "optimizer": Mapping[str, Any],
    "trained": Mapping[str, Tensor],
}


@checked
@dataclass(frozen=True)
class Blend:
    """Gives images and replacements that show nothing: a random colour or a blur, with noise.

    The defaults are the original code's, whose images are in [-1, 1].

    Args:
        colour: Largest distance of a random colour from grey, in each channel.
        noise: Standard deviation of the noise on the replacement.
        grain: Standard deviation of the noise on the image.
        sigma: Standard deviation of the Gaussian blur; default: a twentieth of the longer side.
        blurred: Share of images that are replaced by their own blur.
    """

    colour: NonNegative = 0.165
    noise: NonNegative = 0.055
    grain: NonNegative = 0.015
    sigma: Positive | None = None
    blurred: Unit = 0.5

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return images ``(B, C, H, W)`` in [0, 1], and their replacements."""
        batch, channels = images.shape[:2]

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).to(images)

        def noise(std: float) -> Tensor:
            return std * torch.randn(images.shape, generator=generator).to(images)

        colour = 0.5 + self.colour * (2 * draw(batch, channels, 1, 1) - 1)
        plain = (colour + noise(self.noise)).clamp(0, 1)
        sigma = max(images.shape[-2:]) / 20 if self.sigma is None else self.sigma
        blur = Blur(sigma)((images + noise(self.noise)).clamp(0, 1)).clamp(0, 1)  # it rounds
        replaced = torch.where(draw(batch, 1, 1, 1) < self.blurred, blur, plain)
        return (images + noise(self.grain)).clamp(0, 1), replaced


Objective: TypeAlias = Callable[[MaskingModel, Tensor, Tensor, torch.Generator], dict[str, Tensor]]
"""A loss of a masking model on images ``(B, C, H, W)`` and labels ``(B,)``.

It returns weighted terms ``(B,)`` by name, whose sum is minimised. Everything random in it is drawn
from the generator, on the CPU.
"""


@checked
@dataclass(frozen=True)
class MaskingLoss:
    """The loss of a masking model (Eq. 8, 22), and of its class selector.

    Args:
        model: The classifier to explain.
        form: ``"log"``, the paper's, on probabilities; or ``"hinge"``, the original code's, on the
            logit of a class less the largest other one: at least 1 with what is kept, at most -5
            without it.
        smooth: lambda_1, weight of the total variation: the mean of its squares over pixels.
        area: lambda_2, weight of the mean of m.
        destroy: lambda_3, weight of the class's probability without what is kept.
        power: lambda_4, its exponent (in the logarithmic form).
        preserve: Weight of the loss of the class in what is kept.
        absent: Share of images whose map is computed for a class they do not show.
        blend: Gives, for images and a generator, the images to blend and their replacements.

    Reference: Dabkowski & Gal, Real Time Image Saliency for Black Box Classifiers, NeurIPS 2017.
    """

    model: nn.Module
    form: Literal["log", "hinge"] = "log"
    smooth: NonNegative = 10.0
    area: NonNegative = 4.0
    destroy: NonNegative = 5.0
    power: NonNegative = 0.3
    preserve: NonNegative = 1.0
    absent: Unit = 0.3
    blend: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]] = Blend()

    def __call__(
        self,
        masking_model: MaskingModel,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Return the terms; see `Objective`."""
        batch, size = len(images), images.shape[-2:]
        absent = (torch.rand(batch, generator=generator) < self.absent).to(labels.device)
        others = random_others(labels, masking_model.classes, generator)
        asked = torch.where(absent, others, labels)
        with torch.set_grad_enabled(masking_model.own_encoder):
            encoded = masking_model.encode(images)
        maps = masking_model.decode(encoded, asked)
        large = F.interpolate(maps, size, mode="bilinear")
        large = torch.where(absent.view(-1, 1, 1, 1), 1 - large, large)
        whole, replaced = self.blend(images, generator)
        both = torch.cat([torch.lerp(replaced, whole, m) for m in (large, 1 - large)])
        kept, rest = masking_model.expect_logits(self.model(both), 2 * batch).chunk(2)
        preserve, destroy = self._judge(kept, rest, labels)
        log_odds = masking_model.presence(encoded, asked)
        present = (~absent).to(log_odds)
        down, across = (maps.diff(dim=dim).square().mean(dim=(1, 2, 3)) for dim in (2, 3))
        return {
            "preserve": self.preserve * preserve,
            "destroy": self.destroy * destroy,
            "area": self.area * maps.mean(dim=(1, 2, 3)),
            "smooth": self.smooth * (down + across),
            "select": F.binary_cross_entropy_with_logits(log_odds, present, reduction="none"),
        }

    def _judge(self, kept: Tensor, rest: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses ``(B,)`` of the class in the kept part, and in the rest."""
        index, both = labels[:, None], (kept, rest)
        if self.form == "log":
            found, left = (z.log_softmax(dim=1).gather(1, index)[:, 0] for z in both)
            return -found, (self.power * left).exp()
        found, left = (
            z.gather(1, index)[:, 0] - z.scatter(1, index, -torch.inf).amax(dim=1) for z in both
        )
        return (1 - found).relu(), (left + 5).relu()


@checked
def train_masking_model(
    model: nn.Module,
    loader: Loader,
    masking_model: MaskingModel | None = None,
    *,
    loss: Objective | Sequence[Objective] | None = None,
    epochs: Count = 4,
    lr: Positive = 3e-3,
    seed: Index = 0,
    checkpoint: str | Path | None = None,
    verbose: bool = True,
) -> MaskingModel:
    """Train a masking model for a classifier, which runs in eval mode and is left as it was.

    Args:
        model: Classifier, images in [0, 1] to logits.
        loader: Batches ``(images, labels)``: a ``DataLoader``, a list, or the like, with a length.
            What is random in it comes from torch's generators.
        masking_model: Model to train, in place; default: a new one with the classifier as encoder.
        loss: Loss to minimise, or several, each with its own step on each batch; default:
            ``MaskingLoss(model)``.
        epochs: Passes over the loader.
        lr: Initial learning rate of Adam; it falls to 0 along a cosine.
        seed: Seed of everything random: weights of a new model, order of the data, blending.
        checkpoint: File for the state of the training, written every hundred steps and at the end.
            If it exists, training resumes from it; settings, loss, networks and first batch have to
            be the same.
        verbose: Show a progress bar with each term of the loss.

    Returns:
        The masking model, in eval mode.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1),
    ...                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    >>> batches = [(torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0]))]
    >>> train_masking_model(model, batches, epochs=2, verbose=False).classes
    3
    """
    length = len(loader) if isinstance(loader, Sized) else 0
    if not length:
        raise ValueError(f"expected a loader with at least one batch and a length, got {loader!r}")
    losses = loss if isinstance(loss, Sequence) else [loss or MaskingLoss(model)]
    kind, total = " and ".join(type(each).__name__ for each in losses), epochs * length
    run = {"loss": kind, "seed": seed, "epochs": epochs, "batches": length, "lr": lr}
    file = None if checkpoint is None else _Checkpoint(Path(checkpoint), run)
    if masking_model is None or file:
        with _seeded(loader) as reseed:
            reseed(mixed(seed))
            first = next(iter(loader))
            masking_model = masking_model or MaskingModel(model, image_shape=first[0].shape[1:])
        run |= {"networks": storage.digest(model, masking_model.encoder)}
        run |= {"loss's settings": storage.digest(losses), "first batch": storage.digest(first)}
    parameters = masking_model.trainable()
    optimizer = torch.optim.Adam(parameters)
    optimizer.zero_grad()
    masking_model.eval()
    done = file.resume(masking_model, optimizer) if file else 0
    bar = progress_bar(total=total, initial=done, desc=kind, unit="batch", shown=verbose)
    with eval_mode(model), torch.enable_grad(), bar, _seeded(loader) as reseed:
        for epoch in range(done // length, epochs):
            reseed(mixed(seed, epoch))
            numbered = enumerate(loader, epoch * length)
            # Batches that are done are loaded again: the loader's next draws depend on them.
            for step, batch in islice(numbered, max(0, done - epoch * length), None):
                rate = lr * (1 + math.cos(math.pi * step / total)) / 2
                optimizer.param_groups[0]["lr"] = rate
                generator = torch.Generator().manual_seed(mixed(seed, step, "step"))
                terms = _step(masking_model, optimizer, losses, *batch, generator)
                if verbose:
                    means = {name: f"{term.mean().item():.3f}" for name, term in terms.items()}
                    bar.set_postfix(means, refresh=False)
                bar.update()
                if file and ((step + 1) % _EVERY == 0 or step + 1 == total):
                    file.save(masking_model, optimizer, step + 1)
    return masking_model


@checked
def _step(
    masking_model: MaskingModel,
    optimizer: torch.optim.Optimizer,
    losses: Sequence[Objective],
    images: Images,
    labels: Classes,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Take a step on each loss for a batch, which is checked here; return all terms."""
    parameters = optimizer.param_groups[0]["params"]
    device = parameters[0].device
    classes = torch.empty(len(images), masking_model.classes, device="meta")
    expect_classes(labels, classes, "labels")
    found: dict[str, Tensor] = {}
    for loss in losses:
        terms = loss(masking_model, images.to(device), labels.to(device).long(), generator)
        mean = torch.stack(list(terms.values())).sum(dim=0).mean()
        torch.autograd.backward(mean, inputs=parameters)  # no gradients for the classifier
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf)  # which changes nothing
        if not (mean + norm).isfinite():
            optimizer.zero_grad()
            means = ", ".join(f"{name} {term.mean().item():.3g}" for name, term in terms.items())
            raise ValueError(
                f"expected a finite loss and gradient, got {means}, gradient's norm {norm:.3g}; "
                "lower the learning rate, or look at the model's logits"
            )
        optimizer.step()
        optimizer.zero_grad()
        found |= terms
    return found


class _Checkpoint(NamedTuple):
    """The file of a training, and all by which the training differs from others."""

    path: Path
    run: dict[str, Any]

    def save(
        self, masking_model: MaskingModel, optimizer: torch.optim.Optimizer, done: int
    ) -> None:
        """Write the state after some steps."""
        record = {"run": self.run, "done": done, "optimizer": optimizer.state_dict()}
        storage.save(record | {"trained": masking_model.trained()}, self.path, "training")

    def resume(self, masking_model: MaskingModel, optimizer: torch.optim.Optimizer) -> int:
        """Restore the state in the file, if it exists; return the number of steps done."""
        storage.expect_writable(self.path)
        if not self.path.exists():
            return 0
        record = storage.load(self.path, "training", _RECORD)
        before: dict[str, Any] = record["run"]
        for name, ours in self.run.items():
            if before.get(name) != ours:
                got = f"{self.path}, of another: its {name} is {before.get(name)}, not {ours}"
                hint = "delete it to start again"
                raise ValueError(f"expected a checkpoint of this training, got {got}; {hint}")
        masking_model.restore(record["trained"])
        try:
            optimizer.load_state_dict(record["optimizer"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"expected Adam's state in {self.path}, got {error!r}") from error
        done: int = record["done"]
        return done


@contextmanager
def _seeded(loader: Loader) -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds the generators a loader may draw from; restore them at the end.

    These are torch's global generator for the CPU, and the loader's own.
    """
    own = getattr(loader, "generator", None) or torch.default_generator
    state = own.get_state()

    def reseed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        own.manual_seed(seed)

    with torch.random.fork_rng(devices=[]):
        try:
            yield reseed
        finally:
            own.set_state(state)


def random_others(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Return for each label ``(B,)`` another class, all equally likely."""
    shift = torch.randint(1, classes, labels.shape, generator=generator)
    return (labels + shift.to(labels.device)) % classes
