# SPDX-License-Identifier: MIT
"""Classifiers by name; classes by number and name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from captum_adv2.study.classifiers import find_class, imagenet, load, read_names
from captum_adv2.study.embedded import CLASSES

NAME = "shufflenet_v2_x0_5"


def _saved(net: nn.Module, path: Path) -> str:
    torch.save(net.state_dict(), path)
    return str(path)


class TestLoad:
    def test_embedded(self) -> None:
        found = load("embedded:resnet")
        assert found.names == CLASSES
        assert (found.size, found.resize) == (64, 64)

    @pytest.mark.parametrize("name", ["embedded:vit", "efficientnet-lite0", "hf:some/net"])
    def test_networks_with_weights_of_their_own_take_no_others(self, name: str) -> None:
        for given in ({"spec": name, "weights": "net.pt"}, {"spec": f"{name}=net.pt"}):
            with pytest.raises(ValueError, match="which has its own"):
                load(**given)

    def test_torchvisions_with_classes_of_ones_own(self, tmp_path: Path) -> None:
        net = models.get_model(NAME, weights=None, num_classes=3).eval()
        file = _saved(net, tmp_path / "net.pt")
        found = load(NAME, weights=file, names=("a", "b", "c"), normalise=((0.5,), (0.5,)))
        images = torch.rand(1, 3, 64, 64)
        assert torch.equal(found.model(images), net((images - 0.5) / 0.5))
        assert found.names == ("a", "b", "c")
        assert (found.size, found.resize) == (224, 256)

    def test_a_checkpoint_with_more_than_weights(self, tmp_path: Path) -> None:
        net = models.get_model(NAME, weights=None).eval()
        torch.save({"epoch": 3, "state_dict": net.state_dict()}, tmp_path / "net.pt")
        found = load(f"{NAME}={tmp_path / 'net.pt'}")
        assert found.names == imagenet()

    def test_timms_normalises_as_it_was_trained(self, tmp_path: Path) -> None:
        timm = pytest.importorskip("timm")
        net = timm.create_model("test_resnet", pretrained=False).eval()
        found = load(f"timm:test_resnet={_saved(net, tmp_path / 'net.pt')}")
        config = timm.data.resolve_model_data_config(net)
        images = torch.rand(1, 3, 96, 96)
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        torch.testing.assert_close(found.model(images), net((images - mean) / std))
        assert found.size == config["input_size"][-1]
        with pytest.raises(ValueError, match="timm's, got resnet5; did you mean"):
            load("timm:resnet5")

    def test_hugging_faces_returns_its_logits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Net(nn.Module):
            config = SimpleNamespace(id2label={1: "dog, domestic", 0: "cat"})

            def forward(self, pixel_values: Any) -> Any:
                return SimpleNamespace(logits=pixel_values.mean(dim=(2, 3))[:, :2])

        given = SimpleNamespace(
            size={"shortest_edge": 96}, image_mean=[0.5] * 3, image_std=[0.25] * 3
        )
        library = ModuleType("transformers")
        library.AutoModelForImageClassification = SimpleNamespace(  # type: ignore[attr-defined]
            from_pretrained=lambda name: Net()
        )
        library.AutoImageProcessor = SimpleNamespace(  # type: ignore[attr-defined]
            from_pretrained=lambda name: given
        )
        monkeypatch.setitem(sys.modules, "transformers", library)
        found = load("hf:some/net")
        images = torch.rand(2, 3, 8, 8)
        torch.testing.assert_close(
            found.model(images), (images.mean(dim=(2, 3))[:, :2] - 0.5) / 0.25
        )
        assert found.names == ("cat", "dog")
        assert found.size == 96


class TestClasses:
    @pytest.mark.parametrize(
        ("wanted", "number"), [("2", 2), ("cat", 0), ("Cat", 0), ("sea dog", 2)]
    )
    def test_numbers_and_names(self, wanted: str, number: int) -> None:
        assert find_class(wanted, ("cat", "dog", "sea dog"), 3) == number

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            ("3", "expected a class from 0 to 2, got 3"),
            ("-1", "expected a class from 0 to 2, got -1"),
            ("cta", r"did you mean cat \(0\)\?"),
            ("sea", r"did you mean sea dog \(2\)\?"),
            ("zebra", r"one is cat \(0\)"),
        ],
    )
    def test_others_are_refused(self, wanted: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_class(wanted, ("cat", "dog", "sea dog"), 3)

    def test_a_name_of_two_classes(self) -> None:
        with pytest.raises(ValueError, match=r"did you mean crane \(0\), crane \(1\)"):
            find_class("crane", ("crane", "crane"), 2)

    def test_files_of_names(self, tmp_path: Path) -> None:
        (tmp_path / "names").write_text(" cat\n\ndog \n", encoding="utf-8-sig")
        assert read_names(str(tmp_path / "names")) == ("cat", "dog")
        assert len(read_names("imagenet")) == 1000
        (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
        with pytest.raises(ValueError, match="expected a text file of names"):
            read_names(str(tmp_path / "picture"))
