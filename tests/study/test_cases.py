# SPDX-License-Identifier: MIT
"""Draws belong to an image; a study chooses images that the classifier gets right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_adv2.attacks.dual import DualAttack
from captum_adv2.study import Settings
from captum_adv2.study.cases import NOISE, Chunk, Plan, draw_target, noisy
from captum_adv2.study.data import CorruptImage, Embedded, Sample
from captum_adv2.study.selection import select
from captum_adv2.study.subjects import Subject, subject


@given(st.integers(0, 99), st.integers(0, 10**6), st.integers(2, 1000), st.data())
def test_a_target_is_another_class(
    seed: int, number: int, classes: int, data: st.DataObject
) -> None:
    own = data.draw(st.integers(0, classes - 1))
    drawn = draw_target(seed, number, own, classes)
    assert drawn != own
    assert 0 <= drawn < classes


def test_targets_are_uniform_over_the_other_classes() -> None:
    drawn = torch.tensor([draw_target(0, number, 3, 5) for number in range(4000)])
    counts = drawn.bincount(minlength=5)
    assert counts[3] == 0
    # Four classes of 1,000 each; five standard deviations are 137.
    assert (counts[[0, 1, 2, 4]] - 1000).abs().max() < 137


class Grey:
    """Grey images whose class is their brightness; the fourth of each ten is broken."""

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

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: Tensor) -> Tensor:
        bright = self.scale * (images[:, 0, 0, 0] - 0.5)
        return torch.stack([-bright, bright], dim=1)


def chunk_of(numbers: Sequence[int], seed: int = 0) -> Chunk:
    return Chunk.of(Grey(), numbers, 2, seed, torch.device("cpu"))


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


def two_classes(model: nn.Module) -> Subject:
    return Subject("two", model, 2, {}, (), "ab12")


def test_selection() -> None:
    settings = Settings(count=20, held_out=9)
    chosen = select(two_classes(Brightness()), Grey(), settings, noise=True)
    right = [n for n in range(60) if n % 10 != 3 and n % 7]
    assert chosen.numbers == right[:20]
    assert chosen.labels == [n % 2 for n in right[:20]]
    assert chosen.names == [f"grey-{n}" for n in right[:20]]
    last = right[19]
    assert chosen.held_out == [n for n in range(60) if n % 10 != 3][-9:]
    assert chosen.misclassified == sum(1 for n in range(last) if n % 10 != 3 and n % 7 == 0)
    assert len(chosen.digests) == len({*chosen.digests}) == 29
    assert chosen.weights == "ab12"
    chosen.expect_same(Grey())
    assert "expected an image, got nothing for 3" in chosen.corrupt
    tried = [number for number in right if number < chosen.held_out[0]]
    assert chosen.tried == len(tried) > 20
    chunk = chunk_of(tried)
    for (kind, share), level in zip(NOISE, chosen.levels, strict=True):
        least, less = (
            (Brightness()(noisy(chunk, kind, amount)).argmax(dim=1) != chunk.labels).float().mean()
            for amount in (level, level - 2 / 4096)
        )
        assert least >= share > less


def test_nothing_right_is_an_error() -> None:
    class Clean(Grey):
        def __getitem__(self, index: int) -> Sample:
            return super().__getitem__((1, 11, 31, 41, 51)[index])

        def __len__(self) -> int:
            return 5

    with pytest.raises(ValueError, match="got none of 5"):
        select(two_classes(Brightness(-10.0)), Clean(), Settings(held_out=0), noise=False)


def test_a_larger_choice_begins_with_a_smaller_one() -> None:
    def chosen(count: int):
        settings = Settings(count=count, held_out=9)
        return select(two_classes(Brightness()), Grey(), settings, noise=True)

    small, large, other = chosen(4), chosen(20), chosen(4)._replace(weights="another")
    assert small.widened(large)
    assert not large.widened(small)
    assert not other.widened(large)
    assert small.levels == large.levels


def test_logits_that_are_not_finite_are_never_right() -> None:
    class Unsure(Brightness):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            logits[::2] = torch.nan  # whose argmax is 0
            return logits

    chosen = select(two_classes(Unsure()), Grey(), Settings(count=100), noise=False)
    assert chosen.misclassified > len(chosen.numbers) > 0


def test_images_out_of_range_are_refused() -> None:
    class Normalised(Grey):
        def __getitem__(self, index: int) -> Sample:
            found = super().__getitem__(index)
            return found._replace(image=2 * found.image - 1)

    with pytest.raises(ValueError, match=r"expected the images grey-0 to grey-\d+ in \[0, 1\]"):
        select(two_classes(Brightness()), Normalised(), Settings(), noise=False)


def test_labels_of_no_class_are_named() -> None:
    class Third(Grey):
        def __getitem__(self, index: int) -> Sample:
            return super().__getitem__(index)._replace(label=2 if index == 5 else 0)

    with pytest.raises(ValueError, match=r"expected labels in \[0, 1\], got 2 of grey-5"):
        select(two_classes(Brightness()), Third(), Settings(), noise=False)


EVERY = Settings(models=("embedded:resnet",), interpreters=("CAM", "RTS", "RTS-A"))
WHOLE = {"benign", "PGD", "ADV2", "patch", "class", "adaptive", "stAdv", "StADV2"}


def plan(settings: Settings, *, pool: bool = True) -> Plan:
    one = subject(settings.models[0], settings, Embedded(), torch.device("cpu"))
    images = torch.rand(2, 3, 64, 64), torch.tensor([0, 1])
    return Plan(one, settings, 0, images if pool else None, {("normal", 0.3): 0.1})


def test_settings_determine_the_cases() -> None:
    for changes, names in (
        ({}, WHOLE),
        ({"frameworks": ("pgd",)}, WHOLE - {"stAdv", "StADV2"}),
        ({"frameworks": ("stadv",)}, {"benign", "stAdv", "StADV2"}),
        ({"frameworks": ("query",)}, {"benign", "Square", "QueryADV2"}),
        ({"targets": ("patch",)}, WHOLE - {"ADV2", "StADV2", "class"}),
        ({"detectors": ()}, WHOLE - {"adaptive"}),
        ({"curve": True}, WHOLE | {"curve"}),
        ({"adaptive": ()}, WHOLE - {"adaptive"}),
    ):
        found = plan(replace(EVERY, **changes)).cases()
        assert {case.attack.partition(":")[0] for case in found} == names | {"noise"}
    assert "class" not in {case.attack for case in plan(EVERY, pool=False).cases()}


@pytest.mark.parametrize(("keep", "wanted"), [(0, "best"), (3, 3)])
def test_attacks_on_maps_judge_as_many_late_iterates_as_asked_for(
    monkeypatch: pytest.MonkeyPatch, keep: int, wanted: object
) -> None:
    found: list[object] = []

    def note(attack: DualAttack, images: Tensor, *_: object, **__: object) -> Tensor:
        found.append(attack.keep)
        return images

    monkeypatch.setattr(DualAttack, "forward", note)
    chosen = replace(EVERY, keep=keep, interpreters=("CAM",), adaptive=("CAM",), detectors=())
    chunk = Chunk.of(Embedded(), (0, 1), 10, 0, torch.device("cpu"))
    aimed = [case for case in plan(chosen).cases() if case.aimed]
    for case in aimed:
        case.craft(chunk)
    assert len(aimed) == len(found) == 4  # ADV2, patch, class, StADV2
    assert {*found} == {wanted}


def test_the_distilled_interpreter_is_attacked_but_not_studied_for_itself() -> None:
    cases = [*plan(EVERY).cases()]
    assert {case.attack for case in cases if case.aimed == "RTS-A"} == {"ADV2"}
    explained = {(case.attack, case.aimed): case.explained for case in cases}
    assert explained["ADV2", "RTS-A"] == ("RTS-A",)
    assert explained["ADV2", "CAM"] == ("CAM", "RTS", "RTS-A")
    assert explained["noise:normal:0.3", ""] == ("RTS", "RTS-A")
