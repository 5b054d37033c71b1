# SPDX-License-Identifier: MIT
"""Classifiers and interpreters by name: torchvision's, small ones, and functions of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from captum_adv2.interpreters import CAM, MASK, RTS, Interpreter
from captum_adv2.study import Settings
from captum_adv2.study.sources import CorruptImage, Embedded, Sample, Source
from captum_adv2.study.subjects import INTERPRETERS, load_model, subject

NAME = "shufflenet_v2_x0_5"  # the lightest of torchvision's
SETTINGS = Settings(models=("embedded:resnet",), interpreters=("CAM",), adaptive=())

MODULE = """
import torch
from torch import nn
from captum_adv2.interpreters import GradCAM

number = 3

def network():
    head = nn.Linear(8, 10)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).train()

def explained(model):
    return GradCAM(model)

def bare(model):
    return model
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the folder where the command is given."""
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.get_model(NAME, weights=None).eval()
    file = tmp_path_factory.mktemp("weights") / "net.pt"
    torch.save(net.state_dict(), file)
    return net, file


class TestModels:
    def test_torchvisions_has_the_files_weights_and_normalises(
        self, weights: tuple[nn.Module, Path]
    ) -> None:
        net, file = weights
        images = torch.rand(2, 3, 64, 64)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        model = load_model(f"{NAME}={file}")
        assert not model.training
        assert torch.equal(model(images), net((images - mean) / std))

    def test_without_a_net_the_hint_is_a_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*args: object, **kwargs: object) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
        monkeypatch.setattr(Path, "home", lambda: Path("nowhere"))
        monkeypatch.setenv("TORCH_HOME", "nowhere/at/all")
        with pytest.raises(ValueError, match=f"weights of {NAME}, got .*; {NAME}=FILE reads"):
            load_model(NAME)

    def test_a_function_of_ones_own_is_put_into_eval_mode(self, mine: str) -> None:
        assert not load_model(f"{mine}:network").training

    @pytest.mark.parametrize(
        ("spec", "error", "message"),
        [
            ("resnot", ValueError, "expected a classifier of torchvision's, .*got resnot"),
            ("embedded:vgg", ValueError, "embedded:resnet or embedded:densenet, got embedded:vgg"),
            ("no.such:thing", ValueError, "to be package.module:function, got No module"),
            ("MINE:nothing", ValueError, "to be package.module:function, got module"),
            ("MINE:number", ValueError, "to be a function, got int"),
            ("MINE:explained", TypeError, "model"),
        ],
    )
    def test_nothing_of_that_name(
        self, spec: str, error: type[Exception], message: str, mine: str
    ) -> None:
        with pytest.raises(error, match=message):
            load_model(spec.replace("MINE", mine))


class Numbered(Source):
    """One image, and as many classes as one says; the first file is broken."""

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
    @pytest.mark.parametrize("name", INTERPRETERS)
    def test_every_interpreter_explains(self, name: str) -> None:
        settings = replace(SETTINGS, interpreters=(name,))
        one = subject("embedded:resnet", settings, Embedded())
        (interpreter,) = one.interpreters.values()
        assert list(one.interpreters) == [name]
        assert one.classes == 10
        if name != "MASK":  # minutes for all its steps
            maps: Tensor = interpreter(torch.rand(1, 3, 64, 64), torch.tensor([1]))
            assert maps.shape[:2] == (1, 1)

    def test_mask_has_the_settings_of_the_images_size(self) -> None:
        settings = replace(SETTINGS, interpreters=("MASK",))
        masks = [
            subject("embedded:resnet", settings, Numbered(side=side)).interpreters["MASK"]
            for side in (64, 128)
        ]
        model = load_model("embedded:resnet")
        assert [repr(mask) for mask in masks] == [repr(MASK.small(model)), repr(MASK(model))]

    def test_an_interpreter_of_ones_own(self, mine: str) -> None:
        settings = replace(SETTINGS, interpreters=(f"{mine}:explained", "CAM"))
        one = subject("embedded:resnet", settings, Embedded())
        assert list(one.interpreters) == ["explained", "CAM"]
        settings = replace(SETTINGS, interpreters=(f"{mine}:bare",))
        with pytest.raises(TypeError, match=f"{mine}:bare to return an Interpreter, got Seq"):
            subject("embedded:resnet", settings, Embedded())

    def test_masking_models_come_from_a_file(self, tmp_path: Path) -> None:
        settings = replace(SETTINGS, interpreters=("RTS", "RTS-A"))
        own = subject("embedded:resnet", settings, Embedded()).interpreters
        assert all(isinstance(interpreter, RTS) for interpreter in own.values())
        distilled = own["RTS-A"]
        assert isinstance(distilled, RTS)
        file = tmp_path / "masking.pt"
        distilled.masking_model.save(file)
        swapped = subject("embedded:resnet", replace(settings, masking_model=str(file)), Embedded())
        images, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
        maps = [f(images, target) for f in (*own.values(), swapped.interpreters["RTS"])]
        assert torch.equal(maps[1], maps[2])
        assert not torch.equal(maps[0], maps[2])

    def test_what_a_classifier_has_not_is_left_out_and_said(self, mine: str) -> None:
        settings = replace(SETTINGS, interpreters=("RTS", "CAM"))
        one = subject(f"{mine}:network", settings, Embedded())
        assert list(one.interpreters) == ["CAM"]
        assert one.left_out == (
            f"RTS on {mine}:network needs a masking model: --masking-model FILE",
        )
        with pytest.raises(
            ValueError, match="an interpreter for .*, got none; RTS on .*; RTS-A on"
        ):
            subject(f"{mine}:network", replace(settings, interpreters=("RTS", "RTS-A")), Embedded())

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (Numbered(11), "expected images of 10 classes, as embedded:resnet knows, got 11"),
            (Numbered(9), "expected images of 10 classes, as embedded:resnet knows, got 9"),
            (Numbered(readable=False), "expected images that can be read, got none of 2"),
        ],
    )
    def test_images_that_do_not_fit(self, source: Source, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            subject("embedded:resnet", SETTINGS, source)

    def test_an_unknown_interpreter(self) -> None:
        with pytest.raises(ValueError, match="an interpreter from GRAD, CAM, .*, got LIMES"):
            subject("embedded:resnet", replace(SETTINGS, interpreters=("LIMES",)), Embedded())


def test_cam_of_the_embedded_network_is_cam() -> None:
    one = subject("embedded:resnet", SETTINGS, Embedded())
    found: Interpreter = one.interpreters["CAM"]
    images, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
    assert torch.equal(found(images, target), CAM(one.model)(images, target))
