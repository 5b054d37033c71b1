# SPDX-License-Identifier: MIT
"""Pictures: made from tensors, of the right size and colours, without pyplot's global state."""

from __future__ import annotations

import io
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from captum_adv2.attacks import Progress
from captum_adv2.evaluation.visualize import curves, grid, overlay

RED, BLUE = (0.5, 0.0, 0.0), (0.0, 0.0, 0.5)  # the ends of jet


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


class TestOverlay:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("size", [(1, 1), (4, 4), (8, 6), (20, 9)])
    def test_shape_and_range(self, channels: int, size: tuple[int, int]) -> None:
        out = overlay(uniform(2, channels, 8, 6), uniform(2, 1, *size))
        assert out.shape == (2, 3, 8, 6)
        assert ((out >= 0) & (out <= 1)).all()

    @pytest.mark.parametrize(("value", "colour"), [(1.0, RED), (0.0, BLUE)])
    def test_red_is_important(self, value: float, colour: tuple[float, ...]) -> None:
        maps = torch.full((1, 1, 2, 2), value)
        out = overlay(uniform(1, 3, 8, 8), maps, alpha=1)
        np.testing.assert_allclose(out[0, :, 3, 5].numpy(), colour, atol=0.01)

    def test_no_heat_is_the_grey_image(self) -> None:
        images = uniform(2, 3, 8, 8)
        out = overlay(images, uniform(2, 1, 4, 4), alpha=0)
        torch.testing.assert_close(out, images.mean(dim=1, keepdim=True).expand(2, 3, 8, 8))

    def test_blend(self) -> None:
        images, maps = uniform(1, 3, 4, 4), uniform(1, 1, 4, 4, seed=1)
        heat, grey = overlay(images, maps, alpha=1), overlay(images, maps, alpha=0)
        torch.testing.assert_close(overlay(images, maps, 0.25), 0.25 * heat + 0.75 * grey)
        torch.testing.assert_close(overlay(images, maps), 0.5 * heat + 0.5 * grey)

    def test_the_map_lies_where_it_belongs(self) -> None:
        maps = torch.zeros(1, 1, 2, 2)
        maps[0, 0, 0, 1] = 1  # upper right
        out = overlay(torch.zeros(1, 1, 8, 8), maps, alpha=1)
        assert out[0, 0, 0, 7] > 0.4
        assert out[0, 0, [0, 7, 7], [0, 0, 7]].max() < 0.1
        np.testing.assert_allclose(out[0, :, 7, 0].numpy(), BLUE, atol=0.01)

    def test_tensors_under_attack_and_of_other_types(self) -> None:
        images = uniform(1, 3, 4, 4).double().requires_grad_()
        out = overlay(images, uniform(1, 1, 2, 2).half())
        assert out.dtype == torch.float32
        assert not out.requires_grad

    @pytest.mark.parametrize(
        ("images", "maps", "error", "message"),
        [
            (
                uniform(2, 3, 4, 4),
                uniform(1, 1, 4, 4),
                ValueError,
                r"expected maps of shape \(2, 1",
            ),
            (
                uniform(2, 3, 4, 4),
                uniform(2, 3, 4, 4),
                ValueError,
                r"expected maps of shape \(2, 1",
            ),
            (
                uniform(2, 3, 4, 4),
                uniform(2, 1, 4, 4) + 1,
                ValueError,
                r"expected maps in \[0, 1\]",
            ),
            (
                uniform(2, 3, 4, 4) - 1,
                uniform(2, 1, 4, 4),
                ValueError,
                r"expected images in \[0, 1",
            ),
            (
                uniform(3, 4, 4),
                uniform(2, 1, 4, 4),
                ValueError,
                "expected images with 4 dimensions",
            ),
            (uniform(2, 3, 4, 4), uniform(2, 4, 4), ValueError, "expected maps with 4 dimensions"),
            (None, uniform(2, 1, 4, 4), TypeError, r"expected images to be a torch\.Tensor"),
            (uniform(2, 3, 4, 4), None, TypeError, r"expected maps to be a torch\.Tensor"),
        ],
        ids=["batch", "channels", "range", "images", "rank", "map rank", "no images", "no maps"],
    )
    def test_bad_input(self, images: Any, maps: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            overlay(images, maps)


class TestGrid:
    def shown(self, batch: int = 2, channels: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
        images = uniform(batch, channels, 8, 8)
        return {
            "CAM": (images, uniform(batch, 1, 4, 4)),
            "GRAD": (images, uniform(batch, 1, 8, 8)),
        }

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_axes(self, batch: int, channels: int) -> None:
        shown = self.shown(batch, channels)
        rows = {"benign": shown, "PGD": shown, "ADV2": shown}
        before = plt.get_fignums()
        figure = grid(rows)
        assert isinstance(figure, Figure)
        assert len(figure.axes) == 3 * batch * 3
        assert png(figure).startswith(b"\x89PNG")
        assert plt.get_fignums() == before == []

    def test_titles_captions_and_names(self) -> None:
        rows = {"benign": self.shown(), "ADV2": self.shown()}
        figure = grid(rows, captions={"ADV2": ["cat", "dog"]})
        first, second = figure.axes[:6], figure.axes[6:]
        assert [axis.get_title() for axis in first] == ["image", "CAM", "GRAD"] * 2
        assert not any(axis.get_title() for axis in second)
        assert [axis.get_xlabel() for axis in second] == ["cat", "", "", "dog", "", ""]
        assert not any(axis.get_xlabel() for axis in first)
        assert first[0].get_ylabel() == "benign"
        assert second[0].get_ylabel() == "ADV2"

    def test_pictures_are_the_images_and_their_overlays(self) -> None:
        shown = self.shown()
        axes = grid({"benign": shown}).axes
        images, maps = shown["GRAD"]
        drawn = [np.asarray(axis.get_images()[0].get_array()) for axis in axes]
        for i in range(2):
            np.testing.assert_allclose(drawn[3 * i], images[i].permute(1, 2, 0), atol=1e-6)
            heat = overlay(images, maps)[i].permute(1, 2, 0)
            np.testing.assert_allclose(drawn[3 * i + 2], heat, atol=1e-6)

    def test_size(self) -> None:
        small, large = (grid({"benign": self.shown()}, size=size) for size in (1.0, 2.0))
        assert large.get_figwidth() == pytest.approx(2 * small.get_figwidth())
        assert large.get_figheight() == pytest.approx(2 * small.get_figheight())

    def test_no_row(self) -> None:
        with pytest.raises(ValueError, match="expected at least one row, got none"):
            grid({})

    def test_bad_maps(self) -> None:
        with pytest.raises(ValueError, match=r"expected maps of shape \(2, 1, 4, 4\)"):
            grid({"benign": {"CAM": (uniform(2, 3, 8, 8), uniform(1, 1, 4, 4))}})


class TestCurves:
    def records(self) -> list[Progress]:
        nan = torch.full((2,), torch.nan)  # the warm start looks at no map
        distances = (nan, torch.tensor([0.5, 0.3]), torch.tensor([0.2, 0.1]))
        return [
            Progress(step, torch.tensor([0.1, 0.3]) * (step + 1), distance, torch.arange(2))
            for step, distance in enumerate(distances)
        ]

    def test_means_and_ranges(self) -> None:
        before = plt.get_fignums()
        figure = curves(self.records())
        assert png(figure).startswith(b"\x89PNG")
        assert plt.get_fignums() == before
        confidence, distance = figure.axes
        assert confidence.get_ylabel() == "confidence"
        assert distance.get_ylabel() == "distance"
        assert confidence.lines[0].get_xdata().tolist() == [0, 1, 2]
        np.testing.assert_allclose(confidence.lines[0].get_ydata(), [0.2, 0.4, 0.6], rtol=1e-5)
        np.testing.assert_allclose(distance.lines[0].get_ydata(), [np.nan, 0.4, 0.15], rtol=1e-5)
        (band,) = confidence.collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(0.1)
        assert heights.max() == pytest.approx(0.9)

    def test_an_image_that_has_left_keeps_its_last_values(self) -> None:
        rows, numbers = ([0, 1, 2], [1, 2], [2]), ([0.2, 0.4, 0.9], [0.5, 0.6], [0.3])
        records = [
            Progress(step, torch.tensor(n), torch.tensor(n) / 2, torch.tensor(r))
            for step, (r, n) in enumerate(zip(rows, numbers, strict=True))
        ]
        for axis, share in zip(curves(records).axes, (1, 2), strict=True):
            expected = np.array([0.2 + 0.4 + 0.9, 0.2 + 0.5 + 0.6, 0.2 + 0.5 + 0.3]) / 3 / share
            np.testing.assert_allclose(axis.lines[0].get_ydata(), expected, rtol=1e-5)
        # Of those that still ran: whoever left before the first record is unknown.
        confidence, _distance = curves(records[1:]).axes
        np.testing.assert_allclose(confidence.lines[0].get_ydata(), [0.55, 0.4], rtol=1e-5)

    def test_size(self) -> None:
        assert curves(self.records(), size=(4, 3)).get_size_inches().tolist() == [4, 3]

    def test_no_record(self) -> None:
        with pytest.raises(
            ValueError, match="at least one record, got none; pass callback=records"
        ):
            curves([])
