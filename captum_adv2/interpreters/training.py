# SPDX-License-Identifier: MIT
r"""Training a masking model: what a good map is (Eq. 8, 22), and the loop that looks for one.

A map m of the image x for its class c is good if x shows its class where m is kept, and shows it no
more where m is taken away, and m is small and smooth:

.. math:: \lambda_1 r_{tv}(m) + \lambda_2 r_{av}(m) - \log f_c(\phi(x; m))
          + \lambda_3 f_c(\phi(x; 1 - m))^{\lambda_4}

For a class that is *not* in the image the roles of m and 1 - m are exchanged: such a map must leave
the image's own class alone. Some classes of each batch are of this kind, so that the class selector
means something; it learns beside, by logistic regression, to say which.

Everything random is drawn from a seed and the number of the step, so that a run that was killed
goes on from its last checkpoint to the weights it would have reached.

Differs from the original code: selector and decoder are trained together, not one after the other;
the encoder stays in eval mode; the Gaussian blur is centred; both blended images of a step share
their random colours.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_adv2 import storage
from captum_adv2.checks import (
    expect_flag,
    expect_function,
    expect_images,
    expect_integer,
    expect_labels,
    expect_logits,
    expect_model,
    expect_number,
)
from captum_adv2.interpreters.base import eval_mode
from captum_adv2.interpreters.mask import Blur
from captum_adv2.interpreters.rts import MaskingModel, expect_masking_model

__all__ = ["Blend", "MaskingLoss", "Objective", "fit", "train_masking_model"]

_EVERY = 100  # steps from checkpoint to checkpoint


@dataclass(frozen=True)
class Blend:
    """Blends images with others that show nothing: a random colour, or their own blur, and noise.

    Args:
        colour: Largest distance of a random colour from grey, in each channel.
        noise: Standard deviation of the noise on what replaces the image.
        grain: Standard deviation of the noise on the image.
        sigma: Standard deviation of the Gaussian blur; default: a twentieth of the longer side.
        blurred: Share of images that are replaced by their own blur.

    Reference: the defaults are the original code's, which has images in [-1, 1].
    """

    colour: float = 0.165
    noise: float = 0.055
    grain: float = 0.015
    sigma: float | None = None
    blurred: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("colour", "noise", "grain"):
            expect_number(getattr(self, name), name, low=0.0)
        expect_number(self.blurred, "blurred", low=0.0, high=1.0)
        if self.sigma is not None:
            expect_number(self.sigma, "sigma", low=0.0, above=True)

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return images ``(B, C, H, W)`` in [0, 1], and what replaces them where masked."""
        batch, channels = images.shape[:2]

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).to(images)

        def noise(std: float) -> Tensor:
            return std * torch.randn(images.shape, generator=generator).to(images)

        colour = 0.5 + self.colour * (2 * draw(batch, channels, 1, 1) - 1)
        plain = (colour + noise(self.noise)).clamp(0, 1)
        sigma = max(images.shape[-2:]) / 20 if self.sigma is None else self.sigma
        blur = Blur(sigma)((images + noise(self.noise)).clamp(0, 1))
        replaced = torch.where(draw(batch, 1, 1, 1) < self.blurred, blur, plain)
        return (images + noise(self.grain)).clamp(0, 1), replaced


class Objective(Protocol):
    """What one kind of step in training makes small."""

    def __call__(
        self, masking_model: MaskingModel, images: Tensor, labels: Tensor, generator: Any, /
    ) -> dict[str, Tensor]:
        """Return the terms of the loss by name, each ``(B,)`` and weighted; their sum counts.

        Args:
            masking_model: What is trained.
            images: ``(B, C, H, W)`` in [0, 1].
            labels: Classes ``(B,)``.
            generator: Source of all that is random in this step.
        """


@dataclass(frozen=True)
class MaskingLoss:
    """The loss of a masking model (Eq. 8, 22), and of its class selector.

    Args:
        model: The classifier to explain.
        form: ``"log"``, the paper's, on probabilities; or ``"hinge"``, the original code's, on the
            logit of a class less the largest other one: at least 1 with what is kept, at most -5
            with it taken away.
        smooth: lambda_1, weight of the total variation: the mean of its squares over pixels.
        area: lambda_2, weight of the mean of m.
        destroy: lambda_3, weight of the class being found without what is kept.
        power: lambda_4, its exponent (in the logarithmic form).
        preserve: Weight of the class being found in what is kept.
        absent: Share of images whose map is asked for a class they do not show.
        blend: What replaces what is masked.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range, or an unknown form.

    Reference: Dabkowski & Gal, Real Time Image Saliency for Black Box Classifiers, NeurIPS 2017.
    """

    model: nn.Module
    form: Literal["log", "hinge"] = "log"
    smooth: float = 10.0
    area: float = 4.0
    destroy: float = 5.0
    power: float = 0.3
    preserve: float = 1.0
    absent: float = 0.3
    blend: Blend = Blend()

    def __post_init__(self) -> None:
        """Check the ranges."""
        expect_model(self.model)
        for name in ("smooth", "area", "destroy", "power", "preserve"):
            expect_number(getattr(self, name), name, low=0.0)
        expect_number(self.absent, "absent", low=0.0, high=1.0)
        if self.form not in ("log", "hinge"):
            raise ValueError(f"expected form 'log' or 'hinge', got {self.form!r}")
        expect_function(self.blend, "blend")

    def __call__(
        self, masking_model: MaskingModel, images: Tensor, labels: Tensor, generator: Any
    ) -> dict[str, Tensor]:
        """Return the terms; see `Objective`."""
        classes, batch = masking_model.classes, len(images)
        absent = (torch.rand(batch, generator=generator) < self.absent).to(labels.device)
        asked = torch.where(absent, random_others(labels, classes, generator), labels)
        with torch.no_grad():
            encoded = masking_model.encode(images)
        selected = masking_model.presence(encoded, asked)
        maps = masking_model.decode(encoded, asked)
        size = images.shape[-2:]
        large = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        large = torch.where(absent.view(-1, 1, 1, 1), 1 - large, large)
        whole, replaced = self.blend(images, generator)
        both = torch.cat([torch.lerp(replaced, whole, m) for m in (large, 1 - large)])
        logits = masking_model.expect_own(expect_logits(self.model(both), 2 * batch))
        kept, rest = logits.chunk(2)
        preserve, destroy = self._judge(kept, rest, labels)
        presence = F.binary_cross_entropy_with_logits(
            selected, (~absent).to(selected), reduction="none"
        )
        down, across = (maps.diff(dim=dim).square().mean(dim=(1, 2, 3)) for dim in (2, 3))
        return {
            "preserve": self.preserve * preserve,
            "destroy": self.destroy * destroy,
            "area": self.area * maps.mean(dim=(1, 2, 3)),
            "smooth": self.smooth * (down + across),
            "select": presence,
        }

    def _judge(self, kept: Tensor, rest: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return how badly the class is preserved in one, and destroyed in the other, ``(B,)``."""
        index = labels[:, None]
        if self.form == "log":
            found, left = (z.log_softmax(dim=1).gather(1, index)[:, 0] for z in (kept, rest))
            return -found, (self.power * left).exp()
        found, left = (
            z.gather(1, index)[:, 0] - z.scatter(1, index, -torch.inf).amax(dim=1)
            for z in (kept, rest)
        )
        return (1 - found).relu(), (left + 5).relu()


def train_masking_model(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    masking_model: MaskingModel | None = None,
    *,
    loss: MaskingLoss | None = None,
    epochs: int = 4,
    lr: float = 3e-3,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    verbose: bool = True,
) -> MaskingModel:
    """Train a masking model for a classifier, which stays as it is.

    Args:
        model: Classifier, images in [0, 1] to logits.
        loader: Batches ``(images, labels)``: a ``DataLoader``, or a list; has a length.
        masking_model: What to train, in place; default: a new one with the classifier as encoder.
        loss: What to make small; default: ``MaskingLoss(model)``.
        epochs: Passes over the loader.
        lr: Learning rate of Adam at the start; falls to 0 along a cosine.
        seed: Of all that is random: weights, where new ones are made, order of the data, blending.
        checkpoint: File to write the state of the training to, every hundred steps and at the end.
            Where it exists, training goes on from it.
        verbose: Show a progress bar with each term of the loss.

    Returns:
        The masking model, in eval mode.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range, images outside [0, 1], a checkpoint of another run.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1),
    ...                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    >>> batches = [(torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0]))]
    >>> train_masking_model(model, batches, epochs=2, verbose=False).classes
    3
    """
    expect_model(model)
    if masking_model is None:
        with closing(_batches(loader, 1, seed, 0)) as batches:
            images = expect_images(next(batches)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            masking_model = MaskingModel(model, image_shape=images.shape[1:])
    loss = MaskingLoss(model) if loss is None else loss
    fit(
        masking_model,
        loader,
        [loss],
        frozen=model,
        epochs=epochs,
        lr=lr,
        seed=seed,
        checkpoint=checkpoint,
        verbose=verbose,
        title="RTS",
    )
    return masking_model


def fit(
    masking_model: MaskingModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    objectives: Sequence[Objective],
    *,
    frozen: nn.Module,
    epochs: int,
    lr: float,
    seed: int,
    checkpoint: str | Path | None,
    verbose: bool,
    title: str,
) -> None:
    """Train selector and decoder: a step of Adam for each objective in turn, batch by batch.

    Args:
        masking_model: What to train, in place; in eval mode afterwards.
        loader: Batches ``(images, labels)``; has a length.
        objectives: What to make small.
        frozen: The classifier, which stays in eval mode and is left as it was.
        epochs: See `train_masking_model`; so are ``lr``, ``seed``, ``checkpoint``, ``verbose``.
        lr: Learning rate.
        seed: Of all that is random.
        checkpoint: File to keep the state in.
        verbose: Show a progress bar.
        title: Its title.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range, images outside [0, 1], a checkpoint of another run.
    """
    expect_masking_model(masking_model)
    expect_model(frozen)
    for objective in objectives:
        expect_function(objective, "each of objectives")
    expect_flag(verbose, "verbose")
    length = _length(loader)
    epochs = expect_integer(epochs, "epochs", low=1)
    lr = expect_number(lr, "lr", low=0.0, above=True)
    seed = expect_integer(seed, "seed", low=0)
    run = {"title": title, "seed": seed, "epochs": epochs, "batches": length, "lr": lr}
    total = epochs * length
    parameters = [*masking_model.selector.parameters(), *masking_model.decoder.parameters()]
    optimizer, done = torch.optim.Adam(parameters, lr), 0
    optimizer.zero_grad()
    if checkpoint is not None and Path(checkpoint).exists():
        done = _resume(masking_model, optimizer, run, checkpoint)
    device = parameters[0].device
    masking_model.eval()
    bar = tqdm(total=total, initial=done, desc=title, unit="batch", disable=not verbose)
    source = closing(_batches(loader, epochs, seed, done))  # put generators back at once
    with eval_mode(frozen), bar, torch.enable_grad(), source as batches:
        for step, (images, labels) in enumerate(batches, done):
            images = expect_images(images).to(device)
            labels = expect_labels(labels, len(images), masking_model.classes).to(device)
            generator = torch.Generator().manual_seed(_mixed(seed, step, 1))
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / total)) / 2
            shown: dict[str, Tensor] = {}
            for objective in objectives:
                terms = _terms(objective(masking_model, images, labels, generator))
                loss = torch.stack(list(terms.values())).sum(dim=0).mean()
                torch.autograd.backward(loss, inputs=parameters)  # the classifier keeps its own
                optimizer.step()
                optimizer.zero_grad()
                shown |= terms
            bar.update()
            if verbose:
                bar.set_postfix({name: f"{term.mean().item():.3f}" for name, term in shown.items()})
            if checkpoint is not None and (step % _EVERY == _EVERY - 1 or step + 1 == total):
                state = {"optimizer": optimizer.state_dict(), "trained": masking_model.trained()}
                storage.save({"run": run, "done": step + 1, **state}, checkpoint, "training")


def _terms(value: Any) -> dict[str, Tensor]:
    """Return what an objective returned, if it is terms by name."""
    if not isinstance(value, dict) or not value:
        raise TypeError(
            f"expected an objective to return the terms of a loss by name, got {value!r}; see "
            "Objective"
        )
    return value


def _resume(
    masking_model: MaskingModel,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
    checkpoint: str | Path,
) -> int:
    """Put masking model and optimizer back where a checkpoint has them; return steps done."""
    record = storage.load(checkpoint, "training")
    if record["run"] != run:
        raise ValueError(
            f"expected a checkpoint of this training, {run}, got {record['run']} in {checkpoint}; "
            "delete the file to begin anew"
        )
    masking_model.restore(record["trained"])
    optimizer.load_state_dict(record["optimizer"])
    done: int = record["done"]
    return done


def _length(loader: object) -> int:
    """Return the number of batches of a loader; raise where it has none."""
    if not isinstance(loader, Sized):
        raise TypeError(f"expected a loader with a length, got {type(loader).__name__}")
    return expect_integer(len(loader), "the loader's length", low=1)


def _batches(
    loader: Iterable[tuple[Tensor, Tensor]], epochs: int, seed: int, done: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield the batches of all epochs, but the first so many; the seed decides their order.

    The generators a loader may draw from, torch's own and the loader's, are seeded at each epoch,
    and put back in the end. Batches to leave out are loaded all the same, for what they draw.
    """
    length = _length(loader)
    theirs = getattr(loader, "generator", None)
    generators = [torch.default_generator, *([] if theirs is None else [theirs])]
    states = [generator.get_state() for generator in generators]
    try:
        for epoch in range(done // length, epochs):
            for generator in generators:
                generator.manual_seed(_mixed(seed, epoch, 0))
            skipped = max(0, done - epoch * length)
            yield from islice(loader, skipped, None)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def random_others(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Return for each label ``(B,)`` another class, all equally likely."""
    shift = torch.randint(1, classes, labels.shape, generator=generator)
    return (labels + shift.to(labels.device)) % classes


def _mixed(*numbers: int) -> int:
    """Return one seed of several numbers, the same in every process."""
    return hash(numbers) % 2**63
