# SPDX-License-Identifier: MIT
"""What is drawn belongs to the image; what is chosen is what the classifier gets right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_adv2.study import Settings
from captum_adv2.study.cases import NOISE, Chunk, Plan, noisy, target
from captum_adv2.study.selection import select
from captum_adv2.study.sources import CorruptImage, Sample, Source
from captum_adv2.study.subjects import subject


@given(st.integers(0, 99), st.integers(0, 10**6), st.integers(2, 1000), st.data())
def test_a_target_is_another_class(
    seed: int, number: int, classes: int, data: st.DataObject
) -> None:
    own = data.draw(st.integers(0, classes - 1))
    drawn = target(seed, number, own, classes)
    assert drawn != own
    assert 0 <= drawn < classes


def test_targets_are_uniform_over_the_other_classes() -> None:
    drawn = torch.tensor([target(0, number, 3, 5) for number in range(4000)])
    counts = drawn.bincount(minlength=5)
    assert counts[3] == 0
    # Four classes of 1,000 each; five standard deviations are 137.
    assert (counts[[0, 1, 2, 4]] - 1000).abs().max() < 137


class Grey(Source):
    """Grey images whose class is how bright they are; the fourth of each ten is broken."""

    classes = ("dark", "bright")

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Sample:
        if index % 10 == 3:
            raise CorruptImage(f"expected an image, got nothing for {index}")
        level = 0.45 + 0.1 * (index % 2)
        image = torch.full((3, 16, 16), level)
        label = index % 2 if index % 7 else 1 - index % 2  # every seventh is labelled wrong
        return Sample(image, label, f"grey-{index}", torch.zeros(0, 4))


class Brightness(nn.Module):
    """Says whether an image is bright, by its first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> Tensor:
        bright = self.scale * (images[:, 0, 0, 0] - 0.5)
        return torch.stack([-bright, bright], dim=1)


def chunk_of(numbers: tuple[int, ...], seed: int = 0) -> Chunk:
    return Chunk.of(numbers, [Grey()[number] for number in numbers], 2, seed, "cpu")


def test_noise_is_the_images_own_and_as_strong_as_it_says() -> None:
    whole, part = chunk_of((0, 1, 2, 4)), chunk_of((2,))
    for kind in ("normal", "uniform"):
        drawn = noisy(whole, kind, 0.05)
        torch.testing.assert_close(drawn[2:3], noisy(part, kind, 0.05), rtol=0, atol=0)
        change = (drawn - whole.images).flatten()
        assert change.std() == pytest.approx(0.05, rel=0.05)
        assert change.mean() == pytest.approx(0.0, abs=0.005)
    most = (noisy(whole, "uniform", 0.05) - whole.images).abs().max()
    assert most <= 0.05 * 3**0.5 + 1e-6
    assert not noisy(whole, "normal", 0.05).equal(noisy(chunk_of((0, 1, 2, 4), 1), "normal", 0.05))


def test_selection() -> None:
    settings = Settings(count=20, held_out=9)
    chosen = select(Brightness(), Grey(), settings, 2, noise=True)
    right = [n for n in range(60) if n % 10 != 3 and n % 7]
    assert chosen.numbers == right[:20]
    assert chosen.labels == [n % 2 for n in right[:20]]
    last = right[19]
    assert chosen.held_out == [n for n in range(last + 1, 60) if n % 10 != 3][:9]
    assert chosen.misclassified == sum(1 for n in range(last) if n % 10 != 3 and n % 7 == 0)
    assert all("got nothing" in reason for reason in chosen.corrupt)
    assert chosen.corrupt[0].endswith("3")
    for (kind, share), level in zip(NOISE, chosen.levels, strict=True):
        chunk = chunk_of(tuple(chosen.numbers))

        def errors(amount: float, kind: str = kind, chunk: Chunk = chunk) -> float:
            said = Brightness()(noisy(chunk, kind, amount)).argmax(dim=1)
            return float((said != chunk.labels).float().mean())

        assert errors(level) >= share
        assert errors(level - 2 / 4096) < share or share == 0


def test_nothing_right_is_an_error() -> None:
    model = nn.Sequential(Brightness(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))  # says the opposite

    class Clean(Grey):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(10 * index + 1 if index % 7 else 1)
            return sample._replace(label=int(sample.image[0, 0, 0] > 0.5))

        def __len__(self) -> int:
            return 5

    with pytest.raises(ValueError, match="got none of 5"):
        select(model, Clean(), Settings(), 2, noise=False)


def plan(settings: Settings) -> Plan:
    from captum_adv2.study.sources import Embedded

    one = subject(settings.models[0], settings, Embedded())
    return Plan(one, settings, 0, (torch.rand(2, 3, 64, 64), torch.tensor([0, 1])), {})


def names(settings: Settings) -> set[str]:
    return {case.attack.partition(":")[0] for case in plan(settings).cases()}


def test_settings_say_what_is_done() -> None:
    every = Settings(models=("embedded:resnet",), interpreters=("CAM", "RTS", "RTS-A"))
    whole = {"benign", "PGD", "ADV2", "patch", "class", "adaptive", "stAdv", "StADV2"}
    assert names(every) == whole
    assert names(replace(every, frameworks=("pgd",))) == whole - {"stAdv", "StADV2"}
    assert names(replace(every, frameworks=("stadv",))) == {"benign", "stAdv", "StADV2"}
    assert names(replace(every, targets=("patch",))) == whole - {"ADV2", "StADV2", "class"}
    assert names(replace(every, detectors=())) == whole - {"adaptive"}
    assert names(replace(every, adaptive=())) == whole - {"adaptive"}


def test_the_distilled_interpreter_is_attacked_but_not_studied_for_itself() -> None:
    settings = Settings(models=("embedded:resnet",), interpreters=("CAM", "RTS", "RTS-A"))
    aimed = {(case.attack, case.aimed) for case in plan(settings).cases()}
    assert ("ADV2", "RTS-A") in aimed
    assert {attack for attack, name in aimed if name == "RTS-A"} == {"ADV2"}
