# SPDX-License-Identifier: MIT
"""The L-infinity ball and the flow: what they allow, and the images they make."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from captum_adv2.attacks.frameworks import Flow, LinfBall, flow_loss, quantize

ULP = 2.0**-23  # of float32 at 1: what adding and subtracting the clean image may round away
EPS = st.sampled_from([0.0, 1 / 255, 8 / 255, 1.0]) | st.floats(0.0, 2.0, width=32)
SEEDS = st.integers(0, 2**32 - 1)


def images(seed, shape=(2, 3, 4, 4)):
    """Return images that often lie on the border of [0, 1], where two constraints meet."""
    wide = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 - 0.25
    return wide.clamp(0, 1)


# The ball


@given(eps=EPS, seed=SEEDS, scale=st.sampled_from([0.0, 1e-3, 0.1, 10.0]))
def test_a_move_is_projected_to_the_nearest_legal_image(eps, seed, scale):
    ball, clean, variable = LinfBall(eps), images(seed), 3 * images(seed + 1) - 1
    direction, zero = scale * (2 * images(seed + 2) - 1), torch.zeros_like(clean)
    moved = ball.move(variable.clone().requires_grad_(), direction, clean)
    assert moved.dtype == clean.dtype
    assert not moved.requires_grad
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (moved - clean).abs().max() <= eps + ULP
    low, high = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
    nearest = (variable + direction).clamp(low, high)
    torch.testing.assert_close(moved, nearest, rtol=0, atol=2 * ULP)
    torch.testing.assert_close(ball.move(moved, zero, clean), moved, rtol=0, atol=ULP)


@given(eps=EPS, seed=SEEDS)
def test_a_random_start_is_uniform_in_the_ball(eps, seed):
    clean, state = images(seed), torch.get_rng_state()
    unit = torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed))
    expected = (clean + (2 * unit - 1) * eps).clamp(0, 1)
    ball = LinfBall(eps, True, torch.Generator().manual_seed(seed))
    start = ball.init(clean)
    torch.testing.assert_close(start, expected, rtol=0, atol=2 * ULP)
    assert (start - clean).abs().max() <= eps + ULP
    assert eps < 0.01 or not torch.equal(ball.init(clean), start)  # the generator goes on
    seed_0 = LinfBall(eps, True, torch.Generator().manual_seed(0))
    assert torch.equal(LinfBall(eps, True).init(clean), seed_0.init(clean))
    assert torch.equal(LinfBall(eps).init(clean), clean)
    assert torch.equal(torch.get_rng_state(), state)


# Flow

SIZES = [(1, 1), (1, 5), (2, 2), (5, 7), (6, 4), (17, 9)]  # odd sizes, and sides of one pixel


def flows(seed, shape=(2, 2, 5, 6), scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def grid(height, width):
    """Return each pixel's position along x and y, as a flow has its channels."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows])[None].double()


@pytest.mark.parametrize("size", [*SIZES, (224, 224)])
@pytest.mark.parametrize(
    ("dtype", "atol"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
)
def test_no_flow_is_the_identity(size, dtype, atol):
    clean = images(0, (2, 3, *size)).to(dtype)
    variable = Flow(1.0).init(clean)
    moved = Flow(1.0).image(variable, clean)
    assert variable.shape == (2, 2, *size)
    assert not variable.any()
    assert variable.dtype == moved.dtype == dtype
    exact = all(side - 1 in (0, 1, 2, 4, 8, 16) for side in size)  # no place is rounded there
    torch.testing.assert_close(moved, clean, rtol=0, atol=0 if exact else atol)


@pytest.mark.parametrize("size", [(9, 11), (17, 9), (16, 16)])
@pytest.mark.parametrize(("across", "down"), [(1, 0), (0, 2), (-1, 1), (-2, -3)])
def test_a_flow_of_whole_pixels_is_a_roll_inside_the_border(size, across, down):
    clean = images(1, (2, 3, *size)).double()
    shift = torch.tensor([across, down]).double().view(1, 2, 1, 1).expand(2, 2, *size)
    moved, rolled = Flow(1.0).image(shift, clean), clean.roll((-down, -across), dims=(2, 3))
    inside = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(moved[inside], rolled[inside], rtol=0, atol=1e-12)


@given(seed=SEEDS, scale=st.sampled_from([0.3, 2.0, 50.0]), size=st.sampled_from(SIZES))
def test_images_are_the_bilinear_samples_of_scipy(seed, scale, size):
    clean, flow = images(seed, (2, 2, *size)).double(), flows(seed, (2, 2, *size), scale)
    moved = Flow(1.0).image(flow, clean)
    for image, places, result in zip(clean, (grid(*size) + flow).flip(1), moved, strict=True):
        for channel, ours in zip(image, result, strict=True):
            theirs = map_coordinates(channel.numpy(), places.numpy(), order=1, mode="nearest")
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-10)
    assert moved.min() >= 0
    assert moved.max() <= 1
    if min(size) > 1:  # a side of one pixel has one place: nothing to mistake
        single = Flow(1.0).image(flow.float(), clean.float())
        torch.testing.assert_close(single, moved.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_places_between_pixels(dtype):
    """Of the numbers near 200, bfloat16 has the whole ones only."""
    columns = (torch.arange(224) % 2).expand(1, 1, 224, 224)
    flow = torch.full((1, 2, 224, 224), 0.5)
    for stripes in (columns, columns.mT):
        moved = Flow(1.0).image(flow.to(dtype), stripes.to(dtype))[..., :-1, :-1]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5))


def test_images_stay_on_their_device_and_in_range():
    clean, flow = (torch.zeros(2, n, 4, 5, device="meta") for n in (3, 2))
    assert Flow(1.0).image(flow, clean).device == clean.device
    rounded = torch.tensor([-1e-6, 0.5, 1 + 1e-6]).view(1, 1, 1, 3).repeat(1, 1, 2, 1)
    assert Flow(1.0).image(torch.zeros(1, 2, 2, 3), rounded)[0, 0, 0].tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("place", [torch.nan, torch.inf, -torch.inf])
def test_a_flow_that_is_not_finite_gives_legal_images_and_no_gradient_there(place):
    clean, flow = torch.rand(1, 3, 6, 5), torch.full((1, 2, 6, 5), 0.25)
    flow[:, :, 2, 3] = place
    flow.requires_grad_()
    moved = Flow(0.1).image(flow, clean)
    assert ((moved >= 0) & (moved <= 1)).all()
    (gradient,) = torch.autograd.grad(moved.square().sum(), flow)
    assert gradient.isfinite().all()
    assert not gradient[:, :, 2, 3].any()
    assert gradient[:, :, 1, 1].any()


def test_the_image_has_the_gradient_of_its_samples():
    # Between pixels and inside the image: where it is differentiable.
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 4, (2, 2, 5, 5), generator=generator)
    share = 0.1 + 0.8 * torch.rand(2, 2, 5, 5, generator=generator, dtype=torch.float64)
    flow = (whole + share - grid(5, 5)).requires_grad_()
    clean = 0.1 + 0.8 * torch.rand(2, 2, 5, 5, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda variable: Flow(1.0).image(variable, clean), (flow,))


def test_the_gradient_at_no_flow_is_finite_and_not_zero():
    clean, framework = images(0).double(), Flow(1.0)
    variable = framework.init(clean).requires_grad_()
    images_, price = framework.image(variable, clean), framework.penalty(variable)
    gradients = [torch.autograd.grad(part.sum(), variable)[0] for part in (images_.square(), price)]
    assert gradients[0].isfinite().all()
    assert gradients[0].any()
    assert not gradients[1].any()


@given(
    seed=SEEDS,
    bound=st.none() | st.floats(1e-3, 10.0),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e6, torch.inf]),
)
def test_a_flow_stays_within_its_bound(seed, bound, scale):
    clean, variable = images(seed).double(), flows(seed, (2, 2, 4, 4))
    direction = torch.nan_to_num(scale * flows(seed + 1, (2, 2, 4, 4)), nan=0.0)
    framework, free = Flow(1.0, bound), variable + direction
    moved = framework.move(variable.clone().requires_grad_(), direction, clean)
    assert not moved.requires_grad
    assert torch.equal(moved, free if bound is None else free.clamp(-bound, bound))
    assert bound is None or framework.image(moved, clean).isfinite().all()


# The flow loss


@given(seed=SEEDS, height=st.integers(1, 5), width=st.integers(1, 5))
def test_the_flow_loss_is_a_sum_over_four_neighbours(seed, height, width):
    flow = flows(seed, (2, 2, height, width))
    expected, r = np.zeros(2), flow.numpy()
    for b, i, j in np.ndindex(2, height, width):
        for k, m in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if 0 <= k < height and 0 <= m < width:
                expected[b] += np.sqrt(((r[b, :, i, j] - r[b, :, k, m]) ** 2).sum())
    np.testing.assert_allclose(flow_loss(flow).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert not flow_loss(flow[:, :, :1, :1].expand_as(flow)).any()  # a constant flow
    assert torch.equal(Flow(0.25).penalty(flow), 0.25 * flow_loss(flow))


def test_the_flow_loss_has_its_gradient_and_dtype():
    assert torch.autograd.gradcheck(flow_loss, (flows(0).requires_grad_(),))
    assert flow_loss(flows(0).float()).dtype == torch.float32


# Bit depth


@given(seed=SEEDS, bits=st.integers(1, 8))
def test_quantized_images_are_the_nearest_of_the_grid(seed, bits):
    x, levels = images(seed), 2**bits - 1
    squeezed = quantize(x, bits)
    assert (squeezed - x).abs().max() <= 0.5 / levels + ULP
    assert torch.equal((squeezed * levels).round() / levels, squeezed)
    assert torch.equal(quantize(squeezed, bits), squeezed)
    assert torch.equal(quantize(x), quantize(x, 8))
