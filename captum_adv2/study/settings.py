# SPDX-License-Identifier: MIT
"""What a study does: everything that its results depend on, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from captum_adv2.attacks.blackbox import Queries
from captum_adv2.spec import Count, Fraction, Index, NonNegative, Positive, Unit, checked

T = TypeVar("T")


def option(default: T, text: str) -> T:
    """Return a field; the command line prints its text as the help of an option."""
    return field(default=default, metadata={"help": text})


@checked
@dataclass(frozen=True)
class Settings:
    """What a study does; ``python -m captum_adv2 study --help`` explains each field.

    >>> Settings(models=("embedded:resnet",), interpreters=("CAM", "RTS"), count=20).steps
    100
    """

    models: tuple[str, ...] = option(
        ("embedded:resnet", "embedded:densenet"),
        "classifiers of images in [0, 1]: embedded:resnet, embedded:densenet, embedded:vit, a name "
        "of torchvision's (resnet50, or with a file of weights resnet50=FILE), timm:NAME, hf:NAME, "
        "or a function that returns one, package.module:function; what follows a = is its argument",
    )
    images: str = option(
        "embedded",
        "embedded; a folder with a sub-folder of pictures for each class; a file of tensors "
        "(images and labels, by torch.save); or a function of a transform of pictures that "
        "returns them, package.module:function, see captum_adv2.study.data.Source",
    )
    size: Count = option(224, "side of the images in pixels, cut from the middle; of files only")
    resize: Index = option(
        0, "shorter side that pictures are resized to before; 0: eight sevenths of --size"
    )
    classes: str = option(
        "",
        "file with the folders' names in the order of the classifier's classes, one a line; by "
        "default they are sorted by name",
    )
    boxes: str = option("", "folder of XML files with the objects' boxes, as ImageNet has them")
    interpreters: tuple[str, ...] = option(
        ("GRAD", "CAM", "MASK", "RTS", "GradCAM", "RTS-A"),
        "of GRAD, CAM, MASK, RTS, GradCAM, GradCAM-P (of probabilities), IG, SmoothGrad, Ensemble "
        "(of GRAD and GradCAM), and RTS-A, which is RTS trained against ADV2; or a function of a "
        "model, package.module:function",
    )
    adaptive: tuple[str, ...] = option(
        ("RTS", "MASK"),
        "interpreters whose attacks adapt to the detectors; those among --interpreters",
    )
    masking_model: str = option("", "file of RTS's masking model, whose encoder is the classifier")
    distilled_model: str = option("", "file of RTS-A's masking model, trained by distill")
    smoothing: NonNegative = option(
        0.0, "tau of GRAD's smoothed ReLU, h(z); 0: as wide as each layer needs"
    )
    frameworks: tuple[Literal["pgd", "stadv", "query"], ...] = option(
        ("pgd", "stadv"),
        "of pgd, stadv and query: how attacks change images; query is by answers, not by gradients",
    )
    targets: tuple[Literal["benign", "patch", "class"], ...] = option(
        ("benign", "patch", "class"),
        "of benign, patch and class: what attacks on pixels make maps show; without a value: none",
    )
    detectors: tuple[Literal["squeezing"], ...] = option(
        ("squeezing",), "squeezing; without a value: none"
    )
    seeds: tuple[Index, ...] = option(
        (0,), "the study is run once a seed; seeds determine target classes and target maps"
    )
    count: Count = option(100, "images a classifier, of those that it gets right")
    held_out: Index = option(100, "further images, which set the detectors' thresholds")
    tuned: Index = option(
        100, "of these, those that set each interpreter's threshold for boxes (Table 2)"
    )
    curve: bool = option(
        False,
        "also find, by bisection, each image's least eps of 13 from 0.25/255 to 16/255 that fools "
        "class and map, in --steps gradient evaluations at each",
    )
    eps: Unit = option(
        8 / 255, "largest change of a pixel of images in [0, 1]; 8/255 is 8 of their 255 levels"
    )
    bound: Positive = option(2.0, "largest displacement of a pixel by stAdv along an axis, pixels")
    steps: Count = option(100, "gradient evaluations of attacks on pixels")
    flow_steps: Count = option(200, "gradient evaluations of attacks that move pixels")
    queries: Queries = option(1000, "queries of each image by attacks without gradients")
    keep: Index = option(
        0,
        "late iterates that ADV2 and StADV2 also judge by the reported map; 12 helps on MASK, "
        "whose map differs from the one that is attacked",
    )
    stop: Unit = option(
        0.0, "map distance at which ADV2 takes an image out of the batch; 0: it takes all steps"
    )
    threshold: Fraction = option(0.5, "value that a map must exceed to count for IoU and boxes")
    chunk: Count = option(
        10, "images attacked together; also the most that is lost if a process dies"
    )
    shown: Index = option(3, "images in pictures")

    GROW: ClassVar = ("count", "seeds", "curve")
    """What a study may have more of when it is continued."""

    def __post_init__(self) -> None:
        """Expect at least one model, interpreter and seed, and none of them twice."""
        for name in ("models", "interpreters", "seeds"):
            values: tuple[Any, ...] = getattr(self, name)
            short = [label(value) if isinstance(value, str) else value for value in values]
            if not short:
                raise ValueError(f"expected at least one of {name}, got none")
            if len(set(short)) < len(short):  # files and rows go by them
                raise ValueError(f"expected different {name}, got {', '.join(map(str, values))}")


def options(settings: Settings) -> list[str]:
    """Return the options of the command line that make settings.

    >>> options(Settings(models=("resnet50",), count=20, curve=True))
    ['--models', 'resnet50', '--count', '20', '--curve']
    """
    found: list[str] = []
    for each in fields(settings):
        value = getattr(settings, each.name)
        if value != each.default:
            several = value if isinstance(value, tuple) else () if value is True else (value,)
            found += [f"--{each.name.replace('_', '-')}", *map(str, several)]
    return found


def label(spec: str) -> str:
    """Return the short name of a model or interpreter: the part before ``=``, after ``:``.

    >>> label("squeezenet1_0=weights.pt"), label("embedded:resnet"), label("CAM")
    ('squeezenet1_0', 'resnet', 'CAM')
    """
    return spec.partition("=")[0].rpartition(":")[2]


PROFILES: dict[str, dict[str, Any]] = {
    "quick": {
        "count": 12,
        "held_out": 100,
        "tuned": 20,
        "steps": 50,
        "flow_steps": 100,
        "chunk": 6,
        "adaptive": ("RTS",),
    },
    "full": {},
    "paper": {"count": 1000, "held_out": 1000, "steps": 1000, "flow_steps": 1000},
}
"""Settings by name: ``quick`` to look around, ``full``, and ``paper`` at the paper's size."""
