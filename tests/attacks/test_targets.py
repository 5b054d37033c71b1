# SPDX-License-Identifier: MIT
"""Target maps: patches against geometry, other classes against a pool, and both under attack."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, mixed
from hypothesis import example, given
from hypothesis import strategies as st

from captum_adv2 import ADV2
from captum_adv2.attacks import Benign, RandomClass, RandomPatch
from captum_adv2.interpreters import CAM, MASK, Explanation, Gradient, Interpreter

IMAGES, LABELS = blobs(6, seed=10_000)
TARGET = (LABELS + 1) % 4


class Echo(Interpreter):
    """The image's first channel plus a tenth of the class, at a size; counts explained images."""

    def __init__(self, size=(7, 7)):
        super().__init__(None)
        self.size, self.seen = size, 0

    def explain(self, images, target):
        self.seen += len(images)
        shown = F.interpolate(images[:, :1], self.size) / 2
        return Explanation(shown + 0.1 * target.view(-1, 1, 1, 1), None)


def patches(grid=(7, 7), count=1, **arguments):
    """Return patches on a grid for so many images."""
    return RandomPatch(**arguments)(Echo(grid), IMAGES[:count], LABELS[:count], TARGET[:count])


grids = st.tuples(st.integers(1, 40), st.integers(1, 40))
seeds = st.integers(0, 10_000)
kinds = st.sampled_from(["rectangle", "circle", "any"])


# Patches


@given(
    grid=grids,
    seed=seeds,
    kind=kinds,
    shares=st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)).map(sorted).map(tuple),
    angle=st.floats(0, 180),
)
@example(grid=(2, 2), seed=0, kind="circle", shares=(1e-6, 1e-6), angle=0.0)  # the last pixel
def test_six_numbers_make_a_patch(grid, seed, kind, shares, angle):
    maps = patches(
        grid, shape=kind, size=shares, angle=angle, generator=torch.Generator().manual_seed(seed)
    )
    assert maps.shape == (1, 1, *grid)
    assert ((maps == 0) | (maps == 1)).all()
    found = maps[0, 0].bool()
    numbers = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    which, *sides, turn, row, column = numbers.tolist()
    # Half the sides, or the radius, between the shares; an angle either way.
    half = [min(grid) * (shares[0] + (shares[1] - shares[0]) * draw) / 2 for draw in sides]
    circle = kind == "circle" or (kind == "any" and which < 0.5)
    turned = math.radians(angle) * (2 * turn - 1)
    # Its reach from the centre, by its corners: columns are real, rows imaginary.
    corners = [complex(x * half[1], y * half[0]) for x in (-1, 1) for y in (-1, 1)]
    corners = [complex(math.cos(turned), math.sin(turned)) * corner for corner in corners]
    reach = [max(c.imag for c in corners), max(c.real for c in corners)]
    if circle:
        reach = [half[0], half[0]]
    else:
        fit = min(1, grid[0] / 2 / reach[0], grid[1] / 2 / reach[1])
        half, reach = [fit * side for side in half], [fit * far for far in reach]
    # Anywhere between touching one border and touching the other.
    centre = [
        far + share * (side - 2 * far)
        for far, share, side in zip(reach, (row, column), grid, strict=True)
    ]

    middle = tuple(min(int(at), side - 1) for at, side in zip(centre, grid, strict=True))
    assert found[middle]
    for pixel in set(itertools.product(*map(range, grid))) - {middle}:
        # The offset of the pixel's centre, turned back; how far it is within the shape.
        row, column = (at + 0.5 - far for at, far in zip(pixel, centre, strict=True))
        offset = complex(column, row) * complex(math.cos(turned), -math.sin(turned))
        depth = min(half[0] - abs(offset.imag), half[1] - abs(offset.real))
        if circle:
            depth = half[0] - abs(offset)
        if abs(depth) > 1e-9:
            assert found[pixel] == (depth > 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["rectangle", "circle"])
def test_the_patch_is_the_same_at_every_resolution(kind, seed):
    coarse = patches((14, 14), 6, shape=kind, seed=seed)
    pooled = F.avg_pool2d(patches((224, 224), 6, shape=kind, seed=seed), 16)
    # A pixel that the fine patch covers, or leaves out, wholly is that of the coarse one.
    for value in (0, 1):
        assert (coarse[pooled == value] == value).all()


def test_soft_values_are_the_official_codes():
    hard = patches((56, 56), 3, seed=3)
    soft = patches((56, 56), 3, seed=3, soft=True)
    inside, outside = soft[hard == 1], soft[hard == 0]
    assert 0.9 <= inside.min() < 0.901 < 0.999 < inside.max() <= 1
    assert 0 <= outside.min() < 0.001 < 0.099 < outside.max() <= 0.1
    assert inside.mean() == pytest.approx(0.95, abs=0.005)
    assert outside.mean() == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("build", [CAM, Gradient, lambda model: MASK(model, size=5, iterations=40)])
def test_the_resolution_is_the_interpreters(model, build):
    images, target, passes = torch.rand(2, 3, 15, 13), torch.tensor([0, 1]), []
    interpreter = build(model)
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    maps = RandomPatch()(interpreter, images, target, target)
    handle.remove()
    assert len(passes) <= 2  # MASK's own map takes many
    assert maps.shape == interpreter(images, target).shape


# What a draw depends on


POOL = blobs(20, seed=3)
AIMS = {
    "patch": lambda **source: RandomPatch(soft=True, **source),
    "class": lambda **source: RandomClass(*POOL, **source),
}


@pytest.fixture(params=AIMS)
def aim(request):
    return AIMS[request.param]


def aimed(target_map, index=slice(None), images=IMAGES):
    return target_map(Echo(), images[index], LABELS[index], TARGET[index])


@given(
    name=st.sampled_from(list(AIMS)),
    order=st.permutations(range(6)),
    count=st.integers(1, 6),
    seed=seeds,
)
def test_an_image_gets_its_map_in_any_part_of_a_batch(name, order, count, seed):
    target_map, index = AIMS[name](seed=seed), torch.tensor(order[:count])
    assert torch.equal(aimed(target_map, index), aimed(target_map)[index])
    twin = torch.cat([index, index])
    assert torch.equal(aimed(target_map, twin), aimed(target_map)[twin])


def test_seeds_and_images_make_the_difference(aim):
    first = aimed(aim(seed=1))
    assert torch.equal(aimed(aim(seed=1)), first)
    assert not torch.equal(aimed(aim(seed=2)), first)
    assert len(first.flatten(1).unique(dim=0)) > 3
    changed = IMAGES.clone()
    changed[:, 0, 0, 0] = 1 - changed[:, 0, 0, 0]
    assert not torch.equal(aimed(aim(seed=1), images=changed), first)


ROUNDED = {
    "normalised and back": lambda x: (((x - 0.485) / 0.229) * 0.229 + 0.485 + 1e-6).clamp(0, 1),
    "half a level": lambda x: (x + 0.4 / 255).clamp(0, 1),
    "out of range by rounding": lambda x: (x - 1e-5).clamp(max=1 - 1e-5),
    "double": torch.Tensor.double,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_errors_do_not_change_the_draw(aim, name):
    images, target_map = ROUNDED[name](IMAGES), aim(seed=1)
    maps = aimed(target_map, images=images)
    assert maps.dtype == images.dtype
    torch.testing.assert_close(maps, aimed(target_map).to(images), rtol=0, atol=2e-3)


def test_global_random_state_is_neither_used_nor_changed(aim):
    torch.manual_seed(1)
    first, state = aimed(aim()), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(aimed(aim()), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_draws_image_by_image_and_anew(aim):
    whole, piecewise = (aim(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    first, second = aimed(whole), aimed(whole)
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([aimed(piecewise, slice(i, i + 1)) for i in range(6)]), first)
    assert torch.equal(aimed(copy.deepcopy(whole)), aimed(whole))


def test_the_models_mode_is_left_as_it_was(trained, aim):
    net = mixed(trained)
    modes = [module.training for module in net.modules()]
    expected = aim()(CAM(trained), IMAGES, LABELS, TARGET)
    assert torch.equal(aim()(CAM(net), IMAGES, LABELS, TARGET), expected)
    assert [module.training for module in net.modules()] == modes


# Another class


@given(seed=seeds)
def test_a_map_is_that_of_a_pool_image_of_another_class_than_the_target(seed):
    pool, labels = blobs(12, seed)
    interpreter = Echo((16, 16))
    maps = RandomClass(pool, labels, seed=seed)(interpreter, IMAGES, LABELS, TARGET)
    own = interpreter(pool, labels)
    for shown, wanted in zip(maps, TARGET, strict=True):
        found = (own == shown).flatten(1).all(dim=1).nonzero()[:, 0]
        assert len(found) == 1
        assert labels[found] != wanted
    assert maps.shape == (6, 1, 16, 16)
    short = RandomClass(pool, labels.to(torch.uint8), seed=seed)
    assert torch.equal(short(interpreter, IMAGES, LABELS, TARGET.int()), maps)


def test_every_image_of_another_class_is_drawn_about_as_often():
    images = torch.rand(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    pool, labels = torch.linspace(0, 1, 8).view(8, 1, 1, 1).expand(8, 1, 4, 4), torch.arange(8) // 2
    target = torch.full((1000,), 1)
    maps = RandomClass(pool, labels)(Echo((1, 1)), images, target, target)
    counts = (maps.view(-1, 1) == Echo((1, 1))(pool, labels).view(1, -1)).sum(dim=0)
    assert counts[2:4].tolist() == [0, 0]
    assert counts.sum() == 1000
    assert (counts[[0, 1, 4, 5, 6, 7]] - 1000 / 6).abs().max() < 60  # five standard deviations


def test_the_images_own_class_may_be_drawn():
    one = torch.zeros(1, dtype=torch.long)
    maps = RandomClass(IMAGES[1:2], one)(Echo(), IMAGES[:1], one, one + 1)
    assert torch.equal(maps, Echo()(IMAGES[1:2], one))


def test_a_pool_image_is_explained_once():
    interpreter, target = Echo(), torch.full((50,), 5)
    RandomClass(*blobs(3, seed=1))(interpreter, torch.rand(50, 3, 16, 16), target, target)
    assert interpreter.seen == 3


@pytest.mark.parametrize(
    ("pool", "labels", "message"),
    [
        (IMAGES, LABELS[:5], r"labels of shape \(6,\), got \(5,\)"),
        (IMAGES[..., 4:], LABELS, r"\(3, 16, 12\), the pool's, got \(3, 16, 16\); resize"),
        (IMAGES[:2], torch.tensor([2, 2]), r"than the target 2, got 2 images of class 2; add"),
    ],
)
def test_pools_that_do_not_fit(pool, labels, message):
    interpreter = Echo()
    with pytest.raises(ValueError, match=message):
        RandomClass(pool, labels)(interpreter, IMAGES, LABELS, torch.tensor([0, 1, 2, 3, 0, 1]))
    assert interpreter.seen == 0


# Under attack


@pytest.mark.parametrize("name", AIMS)
def test_adv2_comes_nearer_to_the_target_map(trained_smooth, name):
    images, labels = blobs(8, seed=42)
    images, target, cam = images.double(), (labels + 1) % 4, CAM(trained_smooth)
    target_map = AIMS[name](seed=1)
    wanted, benign = (each(cam, images, labels, target) for each in (target_map, Benign()))
    attack = ADV2(trained_smooth, cam, eps=0.3, alpha=0.03, steps=40, target_map=target_map)
    attack.set_mode_targeted_by_label(quiet=True)
    adversarial = attack(images, target)
    shown = cam(adversarial, target).detach()
    assert (shown - wanted).abs().mean() < (benign - wanted).abs().mean()
