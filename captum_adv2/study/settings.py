# SPDX-License-Identifier: MIT
"""What a study does: everything that its results depend on, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from captum_adv2.checks import expect_integer, expect_number

__all__ = ["DETECTORS", "FRAMEWORKS", "PROFILES", "TARGETS", "Settings"]

FRAMEWORKS = ("pgd", "stadv")
TARGETS = ("benign", "patch", "class")
DETECTORS = ("squeezing",)


@dataclass(frozen=True)
class Settings:
    """What a study does.

    Args:
        models: Classifiers of images in [0, 1]: ``embedded:resnet``, ``embedded:densenet``, a name
            of torchvision's (``resnet50``, or with a file of weights ``resnet50=FILE``), or a
            function that returns one, ``package.module:function``.
        images: ``embedded``; a folder with a sub-folder of pictures for each class; a file of
            tensors (``images`` and ``labels``, by torch.save); or ``isic:FOLDER:TABLE.csv``.
        size: Side of the images, in pixels, cut from the middle; of folders only.
        resize: Shorter side that pictures are brought to before; 0: eight sevenths of ``size``.
        classes: File with the folders' names in the order of the classifier's classes, one a line;
            empty: they are sorted by name.
        boxes: Folder of XML files with the objects' boxes, as ImageNet has them; empty for none.
        interpreters: Of GRAD, CAM, MASK, RTS, GradCAM, IG, SmoothGrad, and RTS-A, which is RTS
            trained against ADV2; or a function of a model, ``package.module:function``.
        adaptive: Interpreters whose attacks adapt to the detectors; those among ``interpreters``.
        masking_model: File of RTS's masking model, whose encoder is the classifier; empty for none.
        distilled_model: File of RTS-A's, trained by `distill`; empty for none.
        smoothing: Of GRAD, see `Gradient`.
        frameworks: Of ``pgd`` and ``stadv``: how attacks change images.
        targets: Of ``benign``, ``patch`` and ``class``: what attacks on pixels make maps show.
        detectors: ``squeezing``, or nothing.
        seeds: Seeds of target classes and target maps; each repeats the study.
        count: Images a classifier, of those it gets right.
        held_out: Further images, to set the detectors' thresholds.
        eps: Largest change of a pixel, in [0, 1].
        bound: Largest displacement of a pixel by stAdv along an axis, in pixels.
        steps: Gradient evaluations of attacks on pixels.
        flow_steps: Gradient evaluations of attacks that move pixels.
        stop: Map distance at which an image is finished, see `ADV2`; 0: it takes all steps.
        threshold: What a map must exceed to count for IoU and boxes, in [0, 1].
        chunk: Images attacked together; also what is lost at most if a process dies.
        shown: Images in pictures.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range, or an unknown name.
    """

    models: tuple[str, ...] = ("embedded:resnet", "embedded:densenet")
    images: str = "embedded"
    size: int = 224
    resize: int = 0
    classes: str = ""
    boxes: str = ""
    interpreters: tuple[str, ...] = ("GRAD", "CAM", "MASK", "RTS", "GradCAM", "RTS-A")
    adaptive: tuple[str, ...] = ("RTS", "MASK")
    masking_model: str = ""
    distilled_model: str = ""
    smoothing: float = 1e-2
    frameworks: tuple[str, ...] = FRAMEWORKS
    targets: tuple[str, ...] = TARGETS
    detectors: tuple[str, ...] = DETECTORS
    seeds: tuple[int, ...] = (0,)
    count: int = 100
    held_out: int = 100
    eps: float = 8 / 255
    bound: float = 2.0
    steps: int = 100
    flow_steps: int = 200
    stop: float = 0.0
    threshold: float = 0.5
    chunk: int = 10
    shown: int = 3

    def __post_init__(self) -> None:
        """Check types, names and ranges."""
        for name, value in vars(self).items():
            default = type(self).__dataclass_fields__[name].default
            if isinstance(default, str):
                _expect_text(value, name)
            elif isinstance(default, tuple):
                if not isinstance(value, tuple | list):
                    raise TypeError(f"expected {name} to be a tuple, got {type(value).__name__}")
                for each in value:
                    if name == "seeds":
                        expect_integer(each, name, low=0)
                    else:
                        _expect_text(each, f"each of {name}")
        for name, known in (
            ("frameworks", FRAMEWORKS),
            ("targets", TARGETS),
            ("detectors", DETECTORS),
        ):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(
                    f"expected {name} from {', '.join(known)}, got {', '.join(unknown)}"
                )
        for name in ("models", "interpreters", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"expected at least one of {name}, got none")
        for name in ("count", "size", "steps", "flow_steps", "chunk"):
            expect_integer(getattr(self, name), name, low=1)
        for name in ("resize", "held_out", "shown"):
            expect_integer(getattr(self, name), name, low=0)
        expect_number(self.smoothing, "smoothing", low=0.0, above=True)
        expect_number(self.eps, "eps", low=0.0, high=1.0)
        expect_number(self.stop, "stop", low=0.0, high=1.0)
        expect_number(self.bound, "bound", low=0.0, above=True)
        expect_number(self.threshold, "threshold", low=0.0, high=1.0)

    def record(self) -> dict[str, Any]:
        """Return the settings as what JSON can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def _expect_text(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"expected {name} to be a text, got {type(value).__name__}")


PROFILES: dict[str, dict[str, Any]] = {
    "quick": {
        "count": 12,
        "held_out": 100,
        "steps": 50,
        "flow_steps": 100,
        "chunk": 6,
        "adaptive": ("RTS",),
    },
    "full": {},
    "paper": {"count": 1000, "held_out": 1000, "steps": 1000, "flow_steps": 1000},
}
"""Settings by name: ``quick`` to look around, ``full``, and ``paper`` at the paper's size."""
