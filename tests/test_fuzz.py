# SPDX-License-Identifier: MIT
"""Bad values for every argument of every public call: a clear error, and nothing is touched.

Each public constructor and call is in `CASES`, with arguments it is content with, or in `EXEMPT`,
with the reason. Arguments are replaced one at a time by all bad values there are, and by drawn
pairs of them. A call then works, or raises ValueError or TypeError: before the model has been run,
and without a trace on the model, the images or the process. What is made with an odd value is used
too.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import captum.attr
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import captum_adv2
from captum_adv2 import ADV2, BitDepthADV2, StADV2, checks, evaluate, optim, storage, testing
from captum_adv2.attacks import (
    AdamDescent,
    Benign,
    CrossEntropy,
    Flow,
    Linear,
    LinfBall,
    MapDistance,
    Margin,
    Matching,
    Progress,
    RandomClass,
    RandomPatch,
    SignDescent,
    Squeezing,
    Stages,
    TwoPhase,
    flow_loss,
    presets,
    quantize,
)
from captum_adv2.defenses import (
    BitDepth,
    Distillation,
    EnsembleDetector,
    FeatureSqueezing,
    MedianSmoothing,
    NonLocalMeans,
    distill,
    roc,
)
from captum_adv2.evaluation import localization, metrics, study, transfer, visualize
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    Blend,
    Blur,
    CaptumInterpreter,
    Direct,
    EncoderGuided,
    Ensemble,
    FeatureAblation,
    FiniteDifference,
    GradCAM,
    Gradient,
    IntegratedGradients,
    KernelShap,
    Lime,
    MaskingLoss,
    MaskingModel,
    Noise,
    Occlusion,
    ShapleyValueSampling,
    SmoothGrad,
    Unrolled,
    detached,
    differentiable_input,
    fit,
    h,
    log_odds,
    min_max,
    probability,
    sigma,
    smooth_relu,
    step,
    train_masking_model,
)
from captum_adv2.testing import unchanged
from captum_adv2.types import Candidate, Explanation

# What is attacked and explained

RUNS: list[int] = []


class RefusedError(RuntimeError):
    """What a user's own code raises, which passes through as it is."""


class Net(testing.Network):
    """A small classifier that notes its forward passes, and is content with its own images only."""

    def forward(self, x):
        RUNS.append(len(x))
        if x.ndim != 4 or x.shape[1] != 3 or x.dtype != torch.float32:
            raise RefusedError("the user's own model does not know such images")
        return super().forward(x)


MODEL = Net()
X = testing.image_batch((2, 3, 8, 8))
NEAR = testing.image_batch((2, 3, 8, 8), seed=1)
Y = torch.tensor([0, 1])
MAPS = torch.linspace(0, 1, 16).view(1, 1, 4, 4).repeat(2, 1, 1, 1)
LOGITS = torch.tensor([[0.0, 1.0, 2.0, 0.5], [1.0, 0.0, 0.3, 0.2]])
SCORES = torch.linspace(0, 1, 5)
FITTED = FeatureSqueezing(MODEL, [BitDepth(2)]).fit(X)
BOXES = torch.tensor([[0, 0, 4, 4], [2, 2, 6, 5]])
LOADER = [(X, Y)]
with torch.random.fork_rng():
    MASKING = MaskingModel(MODEL, layers=("body", "stem"), image_shape=(3, 8, 8)).eval()
RECORDS = [Progress(0, Y / 2, Y / 2, Y), Progress(1, Y / 3, Y / 3, Y)]
CANDIDATE = Candidate(X, LOGITS, MAPS, Y, MAPS, 0.5)


def nothing(*args, **kwargs):
    return None


# Bad values

HUGE = 2**70
BAD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: -float("inf"),
    "huge": lambda: HUGE,
    "past all floats": lambda: 10**400,
    "complex": lambda: 1j,
    "empty string": lambda: "",
    "string": lambda: "nonsense",
    "bytes": lambda: b"\x00",
    "empty list": lambda: [],
    "list": lambda: [None],
    "numbers": lambda: [0.5, -1, 3],
    "tuple": lambda: ("a", 1, None),
    "dictionary": lambda: {"a": 1},
    "empty dictionary": lambda: {},
    "object": object,
    "class": lambda: dict,
    "function": lambda: nothing,
    "range": lambda: range(3),
    "module": nn.ReLU,
    "NumPy": lambda: np.ones((2, 3)),
    "NumPy number": lambda: np.float64(0.5),
    "no dimension": lambda: torch.tensor(0.5),
    "empty tensor": lambda: torch.empty(0),
    "no images": lambda: X[:0],
    "another batch": lambda: X[:1],
    "grey": lambda: X[:, :1],
    "one image": lambda: X[0],
    "bytes of images": lambda: (255 * X).byte(),
    "255": lambda: 255 * X,
    "NaN": lambda: X / 0 - X / 0,
    "maps": lambda: torch.full((2, 1, 5, 5), 0.5),
    "double": lambda: X.double(),
    "complex tensor": lambda: X + 1j,
    "booleans": lambda: X > 0.5,
    "classes": lambda: torch.tensor([7, 0]),
    "negative classes": lambda: torch.tensor([-1, 0]),
    "many classes": lambda: torch.tensor([0, 1, 2]),
    "scores": lambda: torch.tensor([0.1, 0.2]),
}
# Of what is inside of a list or dictionary: fewer.
INSIDE = [*"None True -1 0 1.5 nan huge string object class function".split(), "empty list", "one image", "no images", "255", "classes", "NumPy"]  # fmt: skip
# Numbers that may be as large as one likes, and then take as long, or as much memory.
ENDLESS = set(
    "steps samples iterations size epochs draws search patch patience n_step flow_steps bits "
    "image_shape width classes features max_examples searches searching batch window shape "
    "channels loader factor n_samples count".split()
)


def spoiled(value: Any, name: str, kinds: Any = BAD) -> Iterator[tuple[str, Any]]:
    """Yield bad values for an argument, and what it holds with one of its entries bad."""
    for kind in kinds:
        if kind != "huge" or name not in ENDLESS:
            yield kind, BAD[kind]()
    if type(value) in (list, tuple):
        for index, entry in enumerate(value):
            for kind, bad in spoiled(entry, name, INSIDE):
                yield f"[{index}] {kind}", type(value)((*value[:index], bad, *value[index + 1 :]))
    if isinstance(value, dict):
        for key, entry in value.items():
            for kind, bad in spoiled(entry, name, INSIDE):
                yield f"[{key!r}] {kind}", {**value, key: bad}


# All that is public


class Case(NamedTuple):
    """A public call.

    Attributes:
        call: What is called.
        arguments: Arguments it is content with, by name, each time anew.
        then: What to do with the result.
        late: Arguments of which a run of the model may have to tell that they are wrong.
        files: Whether it may also raise OSError.
    """

    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    then: Callable[[Any], Any] = nothing
    late: str = ""
    files: bool = False


def attacked(attack: Any) -> None:
    attack(X, Y)


def explained(interpreter: Any) -> None:
    interpreter(X, Y)
    interpreter.surrogate(X, Y)(X)


def followed(surrogate: Any) -> None:
    """Use a surrogate, or what makes one of MASK, or of RTS, in an attack."""
    surrogate(MASK(MODEL, size=4, iterations=2, jitter=1), X, Y).advance(X)


def squeezed(squeezer: Any) -> None:
    squeezer(X)


def aimed(target_map: Any) -> None:
    target_map(CAM(MODEL), X, Y, 1 - Y)


def stepped(rule: Any) -> None:
    ADV2(MODEL, CAM, steps=3, warmup=1, step=rule)(X, Y)


def judged(term: Any) -> None:
    term(CANDIDATE)


def detected(detector: Any) -> None:
    detector.fit(X).detect(X)


def trained(loss: Any) -> None:
    loss(MASKING, X, Y, torch.Generator())


def drawn(strategy: Any) -> None:
    """Have an example; hypothesis says what is wrong only then."""


def using(thing: Any, method: str, **arguments: Any) -> Any:
    """Return a thing after one of its methods has been called."""
    getattr(thing, method)(**arguments)
    return thing


def captum_interpreter(method: Any, **kwargs: Any) -> Any:
    return CaptumInterpreter(method(MODEL), **kwargs)


def adv2(**kwargs: Any) -> ADV2:
    return ADV2(MODEL, CAM, **{"steps": 2, "warmup": 1} | kwargs)


ATTACK = {
    "model": MODEL,
    "interpreter": CAM,
    "steps": 2,
    "warmup": 1,
    "target_map": Benign(),
    "prediction": CrossEntropy(),
    "interpretation": MapDistance(),
    "terms": (Margin(),),
    "surrogate": None,
    "keep": "best",
    "confidence": 0.9,
    "stop": 0.1,
    "generator": None,
    "callback": None,
    "verbose": False,
}
PERTURBATION = {
    "model": MODEL,
    "baseline": 0.0,
    "reduce": "sum",
    "perturbations_per_eval": 2,
}
DRAWN = PERTURBATION | {"features": 2, "samples": 3, "seed": 0}
TRAINING = {
    "model": MODEL,
    "loader": LOADER,
    "masking_model": copy.deepcopy(MASKING, {id(MODEL): MODEL}),  # it is trained in place
    "loss": MaskingLoss(MODEL),
    "epochs": 1,
    "lr": 1e-3,
    "seed": 0,
    "checkpoint": None,
    "verbose": False,
}
REPORT = {
    "images": X,
    "target": Y,
    "labels": Y,
    "quantize": True,
}
PAIR = {"images": X, "target": Y}
REPORTS = transfer.matrix(MODEL, {"CAM": CAM(MODEL)}, X, {"none": NEAR}, Y)

CASES: dict[str, Case] = {
    # Attacks
    "ADV2": Case(
        ADV2,
        lambda: ATTACK | {"eps": 0.1, "alpha": 0.05, "step": SignDescent(), "random_start": False},
        attacked,
    ),
    "StADV2": Case(
        StADV2,
        lambda: ATTACK | {"flow_weight": 0.1, "alpha": 0.1, "bound": 1.0, "step": AdamDescent()},
        attacked,
    ),
    "BitDepthADV2": Case(
        BitDepthADV2,
        lambda: {"attack": adv2(), "bits": 3, "steps": 2, "weight": 1.0, "slack": 0.0},
        attacked,
    ),
    "ADV2.__call__": Case(
        lambda **a: adv2()(**a), lambda: {"inputs": X, "labels": Y, "target_maps": MAPS}
    ),
    "ADV2.forward": Case(
        lambda **a: adv2().forward(**a), lambda: {"images": X, "labels": Y, "target_maps": MAPS}
    ),
    "StADV2.__call__": Case(
        lambda **a: StADV2(MODEL, CAM, steps=2)(**a),
        lambda: {"inputs": X, "labels": Y, "target_maps": MAPS},
    ),
    "BitDepthADV2.__call__": Case(
        lambda **a: BitDepthADV2(adv2(), 3, steps=2)(**a),
        lambda: {"inputs": X, "labels": Y, "target_maps": MAPS},
    ),
    "ADV2.from_preset": Case(
        ADV2.from_preset,
        lambda: {
            "model": MODEL,
            "interpreter": CAM,
            "preset": presets.PAPER["CAM"],
            "steps": 2,
            "warmup": 1,
        },
        attacked,
    ),
    "ADV2.set_model": Case(lambda model: adv2().set_model(model), lambda: {"model": MODEL}),
    "ADV2.save": Case(
        lambda **a: adv2().save(**a),
        lambda: {
            "data_loader": LOADER,
            "save_path": None,
            "verbose": False,
            "return_verbose": False,
            "save_predictions": False,
            "save_clean_inputs": False,
            "save_type": "float",
        },
        files=True,
    ),
    "Linear": Case(Linear, lambda: {"first": 1.0, "last": 0.0}, lambda made: made(0.5)),
    "Stages": Case(
        Stages, lambda: {"values": (0.1, 0.2), "lengths": (1, 2)}, lambda made: made(0.5)
    ),
    "CrossEntropy": Case(CrossEntropy, lambda: {"rho": 0.1, "seed": 0}, judged),
    "Margin": Case(Margin, dict, judged),
    "MapDistance": Case(
        MapDistance,
        lambda: {
            "weight": 1.0,
            "reduction": "mean",
            "l1": 0.1,
            "shape": 0.5,
            "map_size": (4, 4),
        },
        judged,
    ),
    "Squeezing": Case(
        Squeezing,
        lambda: {
            "model": MODEL,
            "squeezers": (BitDepth(2),),
            "weight": 1.0,
            "thresholds": (0.1,),
            "share": 0.5,
        },
        judged,
    ),
    "Matching": Case(
        Matching, lambda: {"probabilities": LOGITS.softmax(1), "weight": 1.0, "slack": 0.1}, judged
    ),
    "Benign": Case(Benign, dict, aimed),
    "RandomPatch": Case(
        RandomPatch,
        lambda: {
            "shape": "any",
            "size": (0.2, 0.5),
            "angle": 10.0,
            "soft": True,
            "seed": 0,
            "generator": None,
        },
        aimed,
    ),
    "RandomPatch.__call__": Case(
        RandomPatch(), lambda: PAIR | {"interpreter": CAM(MODEL), "labels": Y}
    ),
    "RandomClass": Case(
        RandomClass, lambda: {"pool": NEAR, "labels": Y, "seed": 0, "generator": None}, aimed
    ),
    "RandomClass.__call__": Case(
        RandomClass(NEAR, Y), lambda: PAIR | {"interpreter": CAM(MODEL), "labels": Y}
    ),
    "Benign.__call__": Case(Benign(), lambda: PAIR | {"interpreter": CAM(MODEL), "labels": Y}),
    "SignDescent": Case(SignDescent, lambda: {"momentum": 0.5, "final": 0.1}, stepped),
    "AdamDescent": Case(AdamDescent, lambda: {"betas": (0.9, 0.9), "final": 0.1}, stepped),
    "TwoPhase": Case(
        TwoPhase, lambda: {"kappa": 0.5, "stride": 0.1, "longest": 0.1, "searches": 2}, stepped
    ),
    "LinfBall": Case(
        LinfBall,
        lambda: {"eps": 0.1, "random_start": True, "generator": None},
        lambda made: made.move(made.init(X), X, X),
    ),
    "Flow": Case(
        Flow, lambda: {"weight": 0.1, "bound": 1.0}, lambda made: made.penalty(made.init(X))
    ),
    "flow_loss": Case(flow_loss, lambda: {"flow": X[:, :2]}),
    "quantize": Case(quantize, lambda: {"images": X, "bits": 3}),
    "ADV2.set_mode_targeted_by_function": Case(
        lambda **a: using(adv2(), "set_mode_targeted_by_function", **a),
        lambda: {"target_map_function": lambda images, labels: 1 - labels, "quiet": True},
        attacked,
    ),
    "ADV2.set_mode_targeted_least_likely": Case(
        lambda **a: using(adv2(), "set_mode_targeted_least_likely", **a),
        lambda: {"kth_min": 1, "quiet": True},
        attacked,
    ),
    "presets.Preset": Case(
        presets.Preset,
        lambda: vars(presets.PAPER["CAM"]) | {"steps": 2, "warmup": 1},
        lambda preset: attacked(ADV2.from_preset(MODEL, CAM, preset)),
    ),
    "presets.FlowPreset": Case(
        presets.FlowPreset,
        lambda: vars(presets.PAPER_STADV["CAM"]) | {"steps": 2, "warmup": 1},
        lambda preset: attacked(StADV2.from_preset(MODEL, CAM, preset)),
    ),
    # Interpreters
    "CAM": Case(CAM, lambda: {"model": MODEL, "layer": "body"}, explained),
    "GradCAM": Case(GradCAM, lambda: {"model": MODEL, "layer": "body"}, explained),
    "Gradient": Case(Gradient, lambda: {"model": MODEL, "pool": 2, "smoothing": 1e-4}, explained),
    "SmoothGrad": Case(
        SmoothGrad,
        lambda: {
            "model": MODEL,
            "samples": 2,
            "std": 0.1,
            "seed": 0,
            "pool": 1,
            "smoothing": None,
        },
        explained,
    ),
    "IntegratedGradients": Case(
        IntegratedGradients,
        lambda: {"model": MODEL, "steps": 2, "baseline": 0.0, "pool": 1, "smoothing": None},
        explained,
    ),
    "Occlusion": Case(
        Occlusion, lambda: PERTURBATION | {"window": (4, 4), "stride": (4, 4)}, explained
    ),
    "FeatureAblation": Case(FeatureAblation, lambda: PERTURBATION | {"features": 2}, explained),
    "ShapleyValueSampling": Case(ShapleyValueSampling, lambda: DRAWN, explained),
    "KernelShap": Case(KernelShap, lambda: DRAWN | {"endpoint": 1e3}, explained),
    "Lime": Case(
        Lime, lambda: DRAWN | {"width": 1.0, "distance": "cosine", "ridge": 0.1}, explained
    ),
    "CaptumInterpreter": Case(
        CaptumInterpreter,
        lambda: {
            "attribution": captum.attr.Saliency(MODEL),
            "reduce": "sum",
            "smoothing": 1e-4,
            "abs": True,
        },
        explained,
    ),
    "CaptumInterpreter(IntegratedGradients)": Case(
        lambda **a: CaptumInterpreter(captum.attr.IntegratedGradients(MODEL), **a),
        lambda: {
            "baselines": 0.0,
            "n_steps": 2,
            "method": "gausslegendre",
            "additional_forward_args": None,
            "return_convergence_delta": False,
            "internal_batch_size": None,
        },
        explained,
    ),
    "CaptumInterpreter(GradientShap)": Case(
        captum_interpreter,
        lambda: {
            "method": captum.attr.GradientShap,
            "baselines": NEAR,
            "n_samples": 2,
            "stdevs": 0.1,
            "seed": 0,
        },
        explained,
    ),
    "CaptumInterpreter(NoiseTunnel)": Case(
        lambda **a: CaptumInterpreter(
            captum.attr.NoiseTunnel(captum.attr.InputXGradient(MODEL)), **a
        ),
        lambda: {
            "nt_type": "vargrad",
            "nt_samples": 2,
            "nt_samples_batch_size": 1,
            "stdevs": 0.1,
            "seed": 0,
        },
        explained,
    ),
    "CaptumInterpreter(DeepLift)": Case(
        captum_interpreter,
        lambda: {
            "method": captum.attr.DeepLift,
            "baselines": NEAR,
            "custom_attribution_func": None,
        },
        explained,
    ),
    "CaptumInterpreter(LayerGradCam)": Case(
        lambda layer="body", **a: CaptumInterpreter(
            captum.attr.LayerGradCam(MODEL, MODEL.body), **a
        ),
        lambda: {"attribute_to_layer_input": False, "relu_attributions": False},
        explained,
    ),
    "CaptumInterpreter(GuidedGradCam)": Case(
        lambda **a: CaptumInterpreter(captum.attr.GuidedGradCam(MODEL, MODEL.body), **a),
        lambda: {"interpolate_mode": "nearest", "attribute_to_layer_input": False},
        explained,
    ),
    "CaptumInterpreter(Occlusion)": Case(
        captum_interpreter,
        lambda: {
            "method": captum.attr.Occlusion,
            "sliding_window_shapes": (3, 4, 4),
            "strides": (3, 4, 4),
            "baselines": 0,
            "perturbations_per_eval": 1,
        },
        explained,
    ),
    "CaptumInterpreter(KernelShap)": Case(
        captum_interpreter,
        lambda: {
            "method": captum.attr.KernelShap,
            "baselines": 0,
            "feature_mask": torch.arange(4).view(1, 1, 2, 2).repeat(1, 1, 4, 4),
            "n_samples": 3,
            "perturbations_per_eval": 1,
        },
        explained,
    ),
    "MASK": Case(
        MASK,
        lambda: {
            "model": MODEL,
            "size": 4,
            "iterations": 2,
            "perturb": Blur(1.0),
            "tv": 0.1,
            "sparsity": 0.1,
            "beta": 3.0,
            "jitter": 1,
            "lr": 0.1,
            "start": 0.5,
            "patience": 2,
            "seed": 0,
            "verbose": False,
        },
        explained,
    ),
    "MASK.small": Case(
        MASK.small, lambda: {"model": MODEL, "size": 4, "iterations": 2, "lr": 0.1}, explained
    ),
    "MASK.solve": Case(
        lambda **a: MASK(MODEL, size=4, iterations=2).solve(**a),
        lambda: PAIR | {"follower": None, "iterations": 2},
    ),
    "Blur": Case(Blur, lambda: {"sigma": 1.0}, squeezed),
    "Blur.__call__": Case(Blur(1.0), lambda: {"images": X}),
    "Noise": Case(Noise, lambda: {"std": 1.0, "seed": 0}, squeezed),
    "Noise.__call__": Case(Noise(), lambda: {"images": X}),
    "FiniteDifference": Case(
        FiniteDifference,
        lambda: {
            "n_step": 1,
            "cycle": 2,
            "pace": 1.0,
            "reach": 1.0,
            "damping": 1e-6,
            "gain": 0.1,
        },
        followed,
    ),
    "FiniteDifference.__call__": Case(
        FiniteDifference(1), lambda: PAIR | {"interpreter": MASK(MODEL, size=4, iterations=2)}
    ),
    "Unrolled": Case(
        Unrolled,
        lambda: {"n_step": 1, "n_reset": 2, "solved": True, "shrink": 0.5, "count": 1},
        followed,
    ),
    "Unrolled.__call__": Case(
        Unrolled(1), lambda: PAIR | {"interpreter": MASK(MODEL, size=4, iterations=2)}
    ),
    "EncoderGuided": Case(
        EncoderGuided, lambda: {"weight": 0.1}, lambda made: made(RTS(MODEL, MASKING), X, Y)(X)
    ),
    "EncoderGuided.__call__": Case(
        EncoderGuided(),
        lambda: PAIR | {"interpreter": RTS(MODEL, MASKING)},
        lambda made: made(X),
    ),
    "Direct": Case(
        Direct, lambda: {"explain": CAM(MODEL).explain, "target": Y}, lambda made: made(X)
    ),
    "RTS": Case(RTS, lambda: {"model": MODEL, "masking_model": MASKING}, explained),
    "RTS.look": Case(lambda **a: RTS(MODEL, MASKING).look(**a), lambda: PAIR),
    "MaskingModel": Case(
        MaskingModel,
        lambda: {
            "encoder": MODEL,
            "classes": 4,
            "layers": ("body", "stem"),
            "width": 4,
            "confidence": 0.0,
            "image_shape": (3, 8, 8),
        },
        lambda made: made(X, Y),
    ),
    "MaskingModel.__call__": Case(MASKING, lambda: PAIR),
    "MaskingModel.forward": Case(MASKING.forward, lambda: PAIR),
    "MaskingModel.encode": Case(MASKING.encode, lambda: {"images": X}),
    "MaskingModel.restore": Case(MASKING.restore, lambda: {"trained": MASKING.trained()}),
    "MaskingModel.save": Case(MASKING.save, lambda: {"path": "masking.pt"}, files=True),
    "MaskingModel.load": Case(
        MaskingModel.load, lambda: {"path": "masking.pt", "encoder": MODEL}, files=True
    ),
    "Blend": Case(
        Blend,
        lambda: {"colour": 0.1, "noise": 0.1, "grain": 0.1, "sigma": 1.0, "blurred": 0.5},
        lambda made: made(X, torch.Generator()),
    ),
    "MaskingLoss": Case(
        MaskingLoss,
        lambda: {
            "model": MODEL,
            "form": "log",
            "smooth": 1.0,
            "area": 1.0,
            "destroy": 1.0,
            "power": 0.3,
            "preserve": 1.0,
            "absent": 0.3,
            "blend": Blend(),
        },
        trained,
    ),
    "train_masking_model": Case(train_masking_model, lambda: TRAINING, files=True),
    "fit": Case(
        fit,
        lambda: {k: v for k, v in TRAINING.items() if k not in ("model", "loss")}
        | {"objectives": [MaskingLoss(MODEL)], "frozen": MODEL, "title": "RTS"},
        files=True,
    ),
    "Ensemble": Case(
        Ensemble,
        lambda: {
            "interpreters": [CAM(MODEL), Gradient(MODEL)],
            "weights": (0.5, 0.5),
            "size": (4, 4),
        },
        explained,
    ),
    "Ensemble.maps": Case(Ensemble([CAM(MODEL), Gradient(MODEL)]).maps, lambda: PAIR),
    "Ensemble.disagreement": Case(
        Ensemble([CAM(MODEL), Gradient(MODEL)]).disagreement, lambda: PAIR
    ),
    **{
        f"{type(made).__name__}.__call__": Case(made, lambda: PAIR)
        for made in (
            CAM(MODEL),
            GradCAM(MODEL),
            Gradient(MODEL),
            SmoothGrad(MODEL, 2),
            IntegratedGradients(MODEL, 2),
            CaptumInterpreter(captum.attr.Saliency(MODEL)),
            Occlusion(MODEL, 4),
            FeatureAblation(MODEL, 2),
            ShapleyValueSampling(MODEL, 2, 2),
            KernelShap(MODEL, 2, 2),
            Lime(MODEL, 2, 2),
            MASK(MODEL, 4, 2),
            RTS(MODEL, MASKING),
            Ensemble([CAM(MODEL), Gradient(MODEL)]),
        )
    },
    **{
        f"{type(made).__name__}.surrogate": Case(made.surrogate, lambda: PAIR, lambda made: made(X))
        for made in (
            CAM(MODEL),
            GradCAM(MODEL),
            Gradient(MODEL),
            SmoothGrad(MODEL, 2),
            IntegratedGradients(MODEL, 2),
            CaptumInterpreter(captum.attr.Saliency(MODEL)),
            Occlusion(MODEL, 4),
            FeatureAblation(MODEL, 2),
            ShapleyValueSampling(MODEL, 2, 2),
            KernelShap(MODEL, 2, 2),
            Lime(MODEL, 2, 2),
            MASK(MODEL, 4, 2),
            RTS(MODEL, MASKING),
            Ensemble([CAM(MODEL), Gradient(MODEL)]),
        )
    },
    "Interpreter.after": Case(
        CAM(MODEL).after, lambda: {"preprocess": nn.Identity()}, lambda made: made(X, Y)
    ),
    "Interpreter.logits": Case(CAM(MODEL).logits, lambda: PAIR),
    "detached": Case(detached, lambda: {"explanation": Explanation(MAPS, LOGITS)}),
    "differentiable_input": Case(
        differentiable_input, lambda: {"images": X}, lambda made: made.__enter__()
    ),
    "min_max": Case(min_max, lambda: {"maps": MAPS}),
    "log_odds": Case(log_odds, lambda: {"logits": LOGITS, "target": Y}),
    "probability": Case(probability, lambda: {"logits": LOGITS, "target": Y}),
    "h": Case(h, lambda: {"z": X, "tau": 1e-4}),
    "sigma": Case(sigma, lambda: {"z": X}),
    "step": Case(step, lambda: {"z": X}),
    "smooth_relu": Case(
        smooth_relu, lambda: {"derivative": h}, lambda made: explained_in(made)
    ),
    # Defences
    "BitDepth": Case(BitDepth, lambda: {"bits": 3, "straight_through": True}, squeezed),
    "BitDepth.__call__": Case(BitDepth(3), lambda: {"images": X}),
    "MedianSmoothing": Case(MedianSmoothing, lambda: {"window": 3}, squeezed),
    "MedianSmoothing.__call__": Case(MedianSmoothing(3), lambda: {"images": X}),
    "NonLocalMeans": Case(
        NonLocalMeans, lambda: {"search": 3, "patch": 1, "strength": 4.0}, squeezed
    ),
    "NonLocalMeans.__call__": Case(NonLocalMeans(3, 1), lambda: {"images": X}),
    "FeatureSqueezing": Case(
        FeatureSqueezing, lambda: {"model": MODEL, "squeezers": [BitDepth(2)]}, detected
    ),
    "FeatureSqueezing.save": Case(
        lambda path: FITTED.save(path), lambda: {"path": "detector.pt"}, files=True
    ),
    "FeatureSqueezing.load": Case(
        FeatureSqueezing.load,
        lambda: {"path": "detector.pt", "model": MODEL, "squeezers": [BitDepth(2)]},
        files=True,
    ),
    "EnsembleDetector": Case(
        EnsembleDetector, lambda: {"ensemble": Ensemble([CAM(MODEL), Gradient(MODEL)])}, detected
    ),
    "EnsembleDetector.scores": Case(
        EnsembleDetector(Ensemble([CAM(MODEL), Gradient(MODEL)])).scores, lambda: {"images": X}
    ),
    **{
        f"FeatureSqueezing.{name}": Case(
            lambda name=name, **a: getattr(FITTED, name)(**a), lambda: {"images": X}
        )
        for name in ("scores", "score", "detect", "detect_each")
    },
    "Detector.fit": Case(
        lambda **a: FITTED.fit(**a), lambda: {"images": X, "rate": 0.5, "batch": 1}
    ),
    "Detector.roc": Case(
        lambda **a: FITTED.roc(**a), lambda: {"benign": X, "adversarial": NEAR, "batch": 1}
    ),
    "roc": Case(roc, lambda: {"benign": SCORES, "adversarial": SCORES}),
    "Distillation": Case(
        Distillation,
        lambda: {
            "attack": adv2(),
            "teacher": MASKING,
            "weight": 1.0,
            "anchor": 1.0,
        },
        trained,
    ),
    "distill": Case(
        distill,
        lambda: TRAINING
        | {"eps": 0.1, "alpha": 0.1, "steps": 2, "weight": 1.0, "anchor": 1.0},
        files=True,
    ),
    # Evaluation
    "evaluate": Case(
        evaluate,
        lambda: REPORT | {"model": MODEL, "interpreter": CAM(MODEL), "adversarial": NEAR},
    ),
    "metrics.l1": Case(metrics.l1, lambda: {"maps": MAPS, "reference": MAPS}),
    "metrics.l2": Case(metrics.l2, lambda: {"maps": MAPS, "reference": MAPS}),
    "metrics.iou": Case(
        metrics.iou, lambda: {"maps": MAPS, "reference": MAPS, "threshold": 0.5}
    ),
    "metrics.success": Case(metrics.success, lambda: {"logits": LOGITS, "target": Y}),
    "metrics.confidence": Case(metrics.confidence, lambda: {"logits": LOGITS, "target": Y}),
    "metrics.interval": Case(
        metrics.interval, lambda: {"values": SCORES, "level": 0.9, "draws": 5}
    ),
    "localization.boxes": Case(
        localization.boxes, lambda: {"maps": MAPS, "size": (8, 8), "threshold": 0.5}
    ),
    "localization.wrong": Case(
        localization.wrong, lambda: {"found": BOXES, "truth": [BOXES, BOXES], "iou": 0.5}
    ),
    "transfer.matrix": Case(
        transfer.matrix,
        lambda: REPORT
        | {
            "model": MODEL,
            "interpreters": {"CAM": CAM(MODEL)},
            "adversarial": {"none": NEAR},
        },
        str,
    ),
    "transfer.across": Case(
        transfer.across,
        lambda: REPORT
        | {
            "models": {"net": MODEL},
            "build": CAM,
            "adversarial": {"none": NEAR},
        },
        str,
    ),
    "transfer.Matrix.each": Case(REPORTS.each, lambda: {"measure": "l1"}),
    "transfer.Matrix.mean": Case(REPORTS.mean, lambda: {"measure": "l1"}),
    "visualize.overlay": Case(
        visualize.overlay, lambda: {"images": X, "maps": MAPS, "alpha": 0.5}
    ),
    "visualize.grid": Case(
        visualize.grid,
        lambda: {
            "rows": {"benign": {"CAM": (X[:1], MAPS[:1])}},
            "captions": {"benign": ["cat"]},
            "size": 1.0,
        },
    ),
    "visualize.curves": Case(
        visualize.curves, lambda: {"records": RECORDS, "size": (3.0, 2.0)}
    ),
    "study.Settings": Case(
        study.Settings,
        lambda: {
            name: field.default for name, field in study.Settings.__dataclass_fields__.items()
        },
        lambda made: made.record(),
    ),
    "study.Frame.of": Case(study.Frame.of, lambda: {"rows": [(1, 2), (3, 4)], "names": ("a", "b")}),
    "study.Frame.where": Case(
        study.Frame.of([(1, 2), (3, 4)], ("a", "b")).where, lambda: {"a": 1, "b": (2, 3)}
    ),
    "study.Frame.values": Case(
        study.Frame.of([(1, 2), (3, 4)], ("a", "b")).values, lambda: {"name": "a"}
    ),
    "study.run": Case(
        study.run,
        lambda: {
            "settings": study.Settings(images="nowhere"),
            "folder": "study",
            "resume": False,
            "verbose": False,
            "command": "",
        },
        files=True,
    ),
    # The parts below, and testing
    "optim.Adam": Case(
        optim.Adam,
        lambda: {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8},
        lambda made: made.update(X, made.init(X)),
    ),
    "optim.safe_sqrt": Case(optim.safe_sqrt, lambda: {"values": X}),
    "storage.save": Case(
        storage.save, lambda: {"record": {"a": X}, "path": "record.pt", "kind": "x"}, files=True
    ),
    "storage.load": Case(
        storage.load, lambda: {"path": "record.pt", "kind": "x"}, files=True
    ),
    "storage.whole": Case(
        storage.whole, lambda: {"path": "whole.txt"}, lambda made: made.__enter__(), files=True
    ),
    "checks.expect_model": Case(checks.expect_model, lambda: {"model": MODEL}),
    "checks.expect_images": Case(lambda images: checks.expect_images(images), lambda: {"images": X}),
    "checks.expect_labels": Case(
        lambda labels: checks.expect_labels(labels, 2, 4), lambda: {"labels": Y}
    ),
    "checks.expect_logits": Case(
        lambda output: checks.expect_logits(output, 2), lambda: {"output": LOGITS}
    ),
    "checks.expect_maps": Case(
        lambda maps: checks.expect_maps(maps, (2, 1, 4, 4), "CAM", "maps"), lambda: {"maps": MAPS}
    ),
    "checks.expect_integer": Case(
        lambda value: checks.expect_integer(value, "value", low=0), lambda: {"value": 1}
    ),
    "checks.expect_number": Case(
        lambda value: checks.expect_number(value, "value", low=0), lambda: {"value": 1}
    ),
    "checks.find_module": Case(checks.find_module, lambda: {"model": MODEL, "layer": "body"}),
    "testing.Network": Case(
        testing.Network,
        lambda: {
            "body": "dense",
            "activation": "ReLU",
            "norm": True,
            "seed": 0,
            "channels": 3,
            "classes": 3,
        },
        lambda made: made(X),
    ),
    "testing.image_batch": Case(
        testing.image_batch, lambda: {"shape": (1, 3, 8, 8), "seed": 0, "dtype": torch.float32}
    ),
    "testing.variant": Case(testing.variant, lambda: {"images": X, "kind": "black"}),
    "testing.check_interpreter": Case(
        testing.check_interpreter,
        lambda: {
            "interpreter": CAM(MODEL),
            "images": X,
            "max_examples": 1,
            "skip": [name for name in testing.CHECKS if name != "shape"],
            "seed": 0,
            "attributions": None,
        },
    ),
}


def explained_in(context: Any) -> None:
    with context:
        nn.Sequential(nn.ReLU())(X.clone().requires_grad_()).sum().backward()


def attempt(case: Case, arguments: Mapping[str, Any]) -> str | None:
    """Call, and use the result; say what is wrong with how it ends."""
    RUNS.clear()
    allowed = (ValueError, TypeError, *((OSError,) if case.files else ()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.then(case.call(**arguments))
    except RefusedError:
        return None
    except allowed as error:
        return f"{type(error).__name__} after {len(RUNS)} runs of the model" if RUNS else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:150]
    return None
