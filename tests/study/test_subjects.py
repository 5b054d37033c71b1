# SPDX-License-Identifier: MIT
"""Classifiers and interpreters by name: torchvision's, small ones, and functions of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import models

from captum_adv2.interpreters import CAM, MASK, RTS
from captum_adv2.study import Settings
from captum_adv2.study.data import CorruptImage, Embedded, Sample, Source
from captum_adv2.study.subjects import INTERPRETERS, Subject, _first, load_model, subject

NAME = "shufflenet_v2_x0_5"  # the lightest of torchvision's

MODULE = """
from torch import nn
from captum_adv2.interpreters import GradCAM

number = 3

def network(width="8"):
    head = nn.Linear(int(width), 10)
    layers = nn.Conv2d(3, int(width), 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    return nn.Sequential(*layers).train()

def explained(model, layer=None):
    return GradCAM(model, layer)

def bare(model):
    return model
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of one's own."""
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def made(model: str, *interpreters: str, source: Source | None = None, **settings: str) -> Subject:
    given = Settings(models=(model,), interpreters=interpreters, **settings)  # type: ignore[arg-type]
    return subject(model, given, source or Embedded(), torch.device("cpu"))


class TestModels:
    def test_torchvisions_has_the_files_weights_and_normalises(self, tmp_path: Path) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = models.get_model(NAME, weights=None).eval()
        torch.save(net.state_dict(), tmp_path / "net.pt")
        images = torch.rand(2, 3, 64, 64)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        model = load_model(f"{NAME}={tmp_path / 'net.pt'}")
        assert not model.training
        assert torch.equal(model(images), net((images - mean) / std))

    def test_without_a_net_the_hint_is_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def offline(*args: object, **kwargs: object) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(ValueError, match=f"weights of {NAME}, got .*; {NAME}=FILE reads"):
            load_model(NAME)

    def test_a_function_of_ones_own_has_an_argument_and_is_put_into_eval_mode(
        self, mine: str
    ) -> None:
        assert not load_model(f"{mine}:network").training
        assert load_model(f"{mine}:network=5")[0].out_channels == 5  # type: ignore[index, union-attr]

    @pytest.mark.parametrize(
        ("spec", "error", "message"),
        [
            ("embedded:resnt", ValueError, "expected embedded:resnet, .*, got embedded:resnt"),
            ("resnot", ValueError, "expected a classifier of torchvision's, .*got resnot"),
            ("no.such:thing", ValueError, "to be package.module:function, got No module"),
            ("MINE:number", ValueError, "to be a function, got int"),
            ("builtins:dict", TypeError, r"builtins:dict to be a torch\.nn\.Module, got dict"),
        ],
    )
    def test_nothing_of_that_name(
        self, spec: str, error: type[Exception], message: str, mine: str
    ) -> None:
        with pytest.raises(error, match=message):
            load_model(spec.replace("MINE", mine))


class Numbered:
    """One image, and any number of classes; the first file is broken."""

    def __init__(self, classes: int = 10, *, side: int = 16, readable: bool = True) -> None:
        self.classes = tuple(map(str, range(classes)))
        self.side, self.readable = side, readable

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample:
        if index == 0 or not self.readable:
            raise CorruptImage("expected an image, got nothing")
        return Sample(torch.rand(3, self.side, self.side), 0, "image", torch.zeros(0, 4))


class TestSubject:
    def test_every_interpreter_explains(self) -> None:
        one = made("embedded:resnet", *INTERPRETERS)
        assert list(one.interpreters) == list(INTERPRETERS)
        assert one.classes == 10
        images, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
        for name in set(INTERPRETERS) - {"MASK"}:  # minutes for all its steps
            maps: Tensor = one.interpreters[name](images, target)
            assert maps.shape[:2] == (2, 1)
        cam = CAM(one.model)(images, target)
        assert torch.equal(one.interpreters["CAM"](images, target), cam)

    def test_mask_has_the_settings_of_the_images_size(self) -> None:
        masks = [
            made("embedded:resnet", "MASK", source=Numbered(side=side)).interpreters["MASK"]
            for side in (64, 128)
        ]
        model = load_model("embedded:resnet")
        assert [repr(mask) for mask in masks] == [repr(MASK.small(model)), repr(MASK(model))]

    def test_an_interpreter_of_ones_own(self, mine: str) -> None:
        one = made("embedded:resnet", f"{mine}:explained=1.layer2", "CAM")
        assert list(one.interpreters) == ["explained", "CAM"]
        maps = one.interpreters["explained"](torch.rand(1, 3, 64, 64), torch.tensor([0]))
        assert maps.shape == (1, 1, 16, 16)
        with pytest.raises(TypeError, match=f"{mine}:bare to be an Interpreter, got Sequential"):
            made("embedded:resnet", f"{mine}:bare")
        with pytest.raises(ValueError, match="an interpreter from GRAD, CAM, .*, got LIMES"):
            made("embedded:resnet", "LIMES")

    def test_masking_models_come_from_a_file(self, tmp_path: Path) -> None:
        own = made("embedded:resnet", "RTS", "RTS-A").interpreters
        assert isinstance(own["RTS-A"], RTS)
        file = tmp_path / "masking.pt"
        own["RTS-A"].masking_model.save(file)
        swapped = made("embedded:resnet", "RTS", masking_model=str(file)).interpreters
        images, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
        maps = [f(images, target) for f in (*own.values(), swapped["RTS"])]
        assert torch.equal(maps[1], maps[2])
        assert not torch.equal(maps[0], maps[2])

    @pytest.mark.parametrize("network", ["resnet", "densenet"])
    def test_those_of_the_embedded_networks_come_along(self, network: str) -> None:
        found = made(f"embedded:{network}", "RTS", "RTS-A").interpreters
        images, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
        first, second = (interpreter(images, target) for interpreter in found.values())
        assert 0 < (first - second).abs().mean() < 0.3

    def test_missing_masking_models_leave_an_interpreter_out_and_the_reason_is_given(
        self, mine: str
    ) -> None:
        one = made(f"{mine}:network", "RTS", "CAM")
        assert list(one.interpreters) == ["CAM"]
        reason = f"RTS on {mine}:network needs a masking model: --masking-model FILE"
        assert one.left_out == (reason,)
        assert made("embedded:vit", "CAM", "RTS-A").left_out[0].endswith("--distilled-model FILE")
        with pytest.raises(ValueError, match="interpreter for .*, got none; RTS on .*; RTS-A on"):
            made(f"{mine}:network", "RTS", "RTS-A")

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (Numbered(11), "expected images of 10 classes, as embedded:resnet knows, got 11"),
            (Numbered(9), "expected images of 10 classes, as embedded:resnet knows, got 9"),
            (Numbered(readable=False), "got none of 2; the first: expected an image, got nothing"),
        ],
    )
    def test_images_that_do_not_fit(self, source: Source, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            made("embedded:resnet", "CAM", source=source)

    def test_samples_are_not_bare_images(self) -> None:
        source = [torch.rand(3, 16, 16)]
        with pytest.raises(TypeError, match=r"expected number 0 of the images to be .*Sample"):
            _first(source)  # type: ignore[arg-type]
