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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import captum.attr
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
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
INSIDE = (
    *("None", "True", "-1", "0", "1.5", "nan", "huge", "string", "object", "class", "function"),
    *("empty list", "one image", "no images", "255", "classes", "NumPy"),
)
# Of a function nothing is known before it is called, of classes nothing before the model is.
LATE = {"function", "module", "classes"}


def spoiled(value: Any, kinds: Iterable[str] = BAD) -> Iterator[tuple[str, Any]]:
    """Yield bad values for an argument, and what it holds with one of its entries bad."""
    for kind in kinds:
        yield kind, BAD[kind]()
    if type(value) in (list, tuple):
        for index, entry in enumerate(value):
            for kind, bad in spoiled(entry, INSIDE):
                yield f"[{index}] {kind}", type(value)((*value[:index], bad, *value[index + 1 :]))
    if isinstance(value, dict):
        for key, entry in value.items():
            for kind, bad in spoiled(entry, INSIDE):
                yield f"[{key!r}] {kind}", {**value, key: bad}


# All that is public


class Case(NamedTuple):
    """A public call.

    Attributes:
        call: What is called.
        arguments: Arguments it is content with, by name, each time anew.
        then: What to do with the result.
        late: Arguments of which only a run of the model may tell that they are wrong, besides
            functions and classes.
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


def using(thing: Any, method: str, **arguments: Any) -> Any:
    """Return a thing after one of its methods has been called."""
    getattr(thing, method)(**arguments)
    return thing


def captum_interpreter(method: Any, **kwargs: Any) -> Any:
    return CaptumInterpreter(method(MODEL), **kwargs)


def adv2(**kwargs: Any) -> ADV2:
    return ADV2(MODEL, CAM, **{"steps": 2, "warmup": 1} | kwargs)


def training() -> dict[str, Any]:
    return {
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


def smoothed(context: Any) -> None:
    with context:
        torch.relu(X.clone().requires_grad_()).sum().backward()


def masking_model(**arguments: Any) -> MaskingModel:
    """Return a new one; as any module it draws its weights from torch's generator."""
    with torch.random.fork_rng():
        return MaskingModel(**arguments)


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
REPORT = {
    "images": X,
    "target": Y,
    "labels": Y,
    "quantize": True,
}
PAIR = {"images": X, "target": Y}
INTERPRETERS = (
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
REPORTS = transfer.matrix(MODEL, {"CAM": CAM(MODEL)}, X, {"none": NEAR}, Y)

CASES: dict[str, Case] = {
    # Attacks
    "ADV2": Case(
        ADV2,
        lambda: ATTACK | {"eps": 0.1, "alpha": 0.05, "step": SignDescent(), "random_start": False},
        attacked,
        late="surrogate callback",
    ),
    "StADV2": Case(
        StADV2,
        lambda: ATTACK | {"flow_weight": 0.1, "alpha": 0.1, "bound": 1.0, "step": AdamDescent()},
        attacked,
        late="surrogate callback",
    ),
    "BitDepthADV2": Case(
        BitDepthADV2,
        lambda: {"attack": adv2(), "bits": 3, "steps": 2, "weight": 1.0, "slack": 0.0},
        attacked,
    ),
    "CarefulAttack.__call__": Case(
        lambda **a: adv2()(**a),
        lambda: {"inputs": X, "labels": Y, "target_maps": MAPS},
        late="target_maps",
    ),
    "DualAttack.forward": Case(
        lambda **a: adv2().forward(**a),
        lambda: {"images": X, "labels": Y, "target_maps": MAPS},
        late="target_maps",
    ),
    "StADV2.__call__": Case(
        lambda **a: StADV2(MODEL, CAM, steps=2)(**a),
        lambda: {"inputs": X, "labels": Y, "target_maps": MAPS},
        late="target_maps",
    ),
    "BitDepthADV2.forward": Case(
        lambda **a: BitDepthADV2(adv2(), 3, steps=2).forward(**a),
        lambda: {"images": X, "labels": Y, "target_maps": MAPS},
        late="target_maps",
    ),
    "DualAttack.from_preset": Case(
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
    "DualAttack.set_model": Case(lambda model: adv2().set_model(model), lambda: {"model": MODEL}),
    "CarefulAttack.save": Case(
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
    "CarefulAttack.set_mode_targeted_by_function": Case(
        lambda **a: using(adv2(), "set_mode_targeted_by_function", **a),
        lambda: {"target_map_function": lambda images, labels: 1 - labels, "quiet": True},
        attacked,
    ),
    "CarefulAttack.set_mode_targeted_least_likely": Case(
        lambda **a: using(adv2(), "set_mode_targeted_least_likely", **a),
        lambda: {"kth_min": 1, "quiet": True},
        attacked,
    ),
    "presets.Preset": Case(
        presets.Preset,
        lambda: vars(presets.PAPER["CAM"]) | {"steps": 2, "warmup": 1},
        lambda preset: attacked(ADV2.from_preset(MODEL, CAM, preset)),
        late="surrogate",
    ),
    "presets.FlowPreset": Case(
        presets.FlowPreset,
        lambda: vars(presets.PAPER_STADV["CAM"]) | {"steps": 2, "warmup": 1},
        lambda preset: attacked(StADV2.from_preset(MODEL, CAM, preset)),
        late="surrogate",
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
        },
        explained,
    ),
    "CaptumInterpreter(LayerGradCam)": Case(
        lambda **a: CaptumInterpreter(captum.attr.LayerGradCam(MODEL, MODEL.body), **a),
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
        masking_model,
        lambda: {
            "encoder": MODEL,
            "classes": 4,
            "layers": ("body", "stem"),
            "width": 4,
            "confidence": 0.0,
            "image_shape": (3, 8, 8),
        },
        lambda made: made(X, Y),
        late="layers",
    ),
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
    "train_masking_model": Case(train_masking_model, training, late="masking_model", files=True),
    "fit": Case(
        fit,
        lambda: (
            {k: v for k, v in training().items() if k not in ("model", "loss")}
            | {"objectives": [MaskingLoss(MODEL)], "frozen": MODEL, "title": "RTS"}
        ),
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
    **{f"{type(made).__name__}.__call__": Case(made, lambda: PAIR) for made in INTERPRETERS},
    **{
        f"{type(made).__name__}.surrogate": Case(
            made.surrogate, lambda: PAIR, lambda surrogate: surrogate(X)
        )
        for made in INTERPRETERS
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
    "smooth_relu": Case(smooth_relu, lambda: {"derivative": h}, smoothed),
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
    "FeatureSqueezing.save": Case(FITTED.save, lambda: {"path": "detector.pt"}, files=True),
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
    "FeatureSqueezing.scores": Case(FITTED.scores, lambda: {"images": X}),
    **{
        f"Detector.{name}": Case(getattr(FITTED, name), lambda: {"images": X})
        for name in ("score", "detect", "detect_each")
    },
    "Detector.fit": Case(FITTED.fit, lambda: {"images": X, "rate": 0.5, "batch": 1}),
    "Detector.roc": Case(FITTED.roc, lambda: {"benign": X, "adversarial": NEAR, "batch": 1}),
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
        lambda: training() | {"eps": 0.1, "alpha": 0.1, "steps": 2, "weight": 1.0, "anchor": 1.0},
        files=True,
    ),
    # Evaluation
    "evaluate": Case(
        evaluate,
        lambda: REPORT | {"model": MODEL, "interpreter": CAM(MODEL), "adversarial": NEAR},
    ),
    "metrics.l1": Case(metrics.l1, lambda: {"maps": MAPS, "reference": MAPS}),
    "metrics.l2": Case(metrics.l2, lambda: {"maps": MAPS, "reference": MAPS}),
    "metrics.iou": Case(metrics.iou, lambda: {"maps": MAPS, "reference": MAPS, "threshold": 0.5}),
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
        lambda: (
            REPORT
            | {
                "model": MODEL,
                "interpreters": {"CAM": CAM(MODEL)},
                "adversarial": {"none": NEAR},
            }
        ),
        str,
    ),
    "transfer.across": Case(
        transfer.across,
        lambda: (
            REPORT
            | {
                "models": {"net": MODEL},
                "build": CAM,
                "adversarial": {"none": NEAR},
            }
        ),
        str,
    ),
    "Matrix.each": Case(REPORTS.each, lambda: {"measure": "l1"}),
    "Matrix.mean": Case(REPORTS.mean, lambda: {"measure": "l1"}),
    "visualize.overlay": Case(visualize.overlay, lambda: {"images": X, "maps": MAPS, "alpha": 0.5}),
    "visualize.grid": Case(
        visualize.grid,
        lambda: {
            "rows": {"benign": {"CAM": (X[:1], MAPS[:1])}},
            "captions": {"benign": ["cat"]},
            "size": 1.0,
        },
    ),
    "visualize.curves": Case(visualize.curves, lambda: {"records": RECORDS, "size": (3.0, 2.0)}),
    "study.Settings": Case(
        study.Settings,
        lambda: {
            name: field.default for name, field in study.Settings.__dataclass_fields__.items()
        },
        lambda made: made.record(),
    ),
    "Frame.of": Case(study.Frame.of, lambda: {"rows": [(1, 2), (3, 4)], "names": ("a", "b")}),
    "Frame.where": Case(
        study.Frame.of([(1, 2), (3, 4)], ("a", "b")).where, lambda: {"a": 1, "b": (2, 3)}
    ),
    "Frame.values": Case(
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
    "storage.load": Case(storage.load, lambda: {"path": "record.pt", "kind": "x"}, files=True),
    "storage.whole": Case(
        storage.whole, lambda: {"path": "whole.txt"}, lambda made: made.__enter__(), files=True
    ),
    "checks.expect_model": Case(checks.expect_model, lambda: {"model": MODEL}),
    "checks.expect_images": Case(
        lambda images: checks.expect_images(images), lambda: {"images": X}
    ),
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

# What is left out, and why.
SEAM = "called step by step by what has checked its arguments before, and says so"
ABSTRACT = "a contract, with no code of its own"
RESULT = "a tuple of results, which nobody but the package makes"
HOLDS = "raises AssertionError, as a test does"
EXEMPT: dict[str, str] = {
    **dict.fromkeys(
        (
            *("Interpreter.explain", "Interpreter.prepare", "_Perturbation.attribute"),
            *("RTS.explain", "MASK.explain", "Ensemble.explain", "Ensemble.join"),
            *("MASK.begin", "MASK.scene", "MASK.objective", "MASK.descend", "MASK.move"),
            *("Surrogate.__call__", "Surrogate.advance", "Surrogate.take"),
            *("Follower.take", "Follower.put"),
            *("Framework.init", "Framework.image", "Framework.move", "Framework.penalty"),
            *("Problem", "Problem.gradient", "Problem.confidence", "Problem.move"),
            *("SignDescent.__call__", "AdamDescent.__call__", "TwoPhase.__call__"),
            *("CrossEntropy.__call__", "Margin.__call__", "MapDistance.__call__"),
            *("Squeezing.__call__", "Matching.__call__", "Linear.__call__", "Stages.__call__"),
            *("MaskingModel.presence", "MaskingModel.decode", "MaskingModel.expect_own"),
            *("Blend.__call__", "MaskingLoss.__call__", "Distillation.__call__"),
            *("Adam.init", "Adam.update", "Adam.rescale", "Network.forward"),
        ),
        SEAM,
    ),
    **dict.fromkeys(
        (
            *("Framework", "Interpreter", "Surrogate", "Detector", "Detector.scores"),
            *("Loss", "Loss.__call__", "Loss.prediction", "Loss.interpretation", "Loss.reached"),
            *("Step", "Step.__call__", "types.Term", "Term.__call__", "types.TargetMap"),
            *("TargetMap.__call__", "presets.Settings"),
        ),
        ABSTRACT,
    ),
    **dict.fromkeys(
        (
            *("Progress", "Report", "Roc", "Follower", "transfer.Matrix", "optim.AdamState"),
            *("types.Candidate", "types.Explanation", "study.Frame", "study.Pictures"),
            "testing.CheckReport",
        ),
        RESULT,
    ),
    **{f"testing.{name}": HOLDS for name in testing.__all__ if name.startswith("check_")},
    "testing.unchanged": HOLDS,
    **{
        f"testing.{name}": "a strategy, whose arguments hypothesis checks when it draws"
        for name in ("classes", "images", "networks", "target_maps")
    },
    **dict.fromkeys(
        ("checks.expect_classes", "checks.expect_flag", "checks.expect_floats"), "in use above"
    ),
    **dict.fromkeys(
        (
            *("checks.expect_function", "checks.expect_generator", "checks.expect_indices"),
            *("checks.expect_pair", "checks.expect_size", "storage.expect_file"),
        ),
        "in use above",
    ),
    "SoundnessWarning": "a warning",
    "checks.SoundnessWarning": "a warning",
    **dict.fromkeys(
        ("CarefulAttack.get_output_with_eval_nograd", "DualAttack.get_random_target_label"),
        "torchattacks asks it while it looks for a target class",
    ),
    "MaskingModel.train": "as torch has it",
    **dict.fromkeys(
        ("Interpreter.__call__", "Interpreter.surrogate"), "tried on every one of ours"
    ),
    "__main__.main": "a command line: it says what is wrong, and exits",
}


def public() -> Iterator[tuple[str, list[str]]]:
    """Yield all public classes, functions and methods; each with the names it may go by here."""
    for info in pkgutil.walk_packages(captum_adv2.__path__, "captum_adv2."):
        home, _, last = info.name.rpartition(".")
        module, package = (importlib.import_module(name) for name in (info.name, home))
        shown = last in package.__all__ and getattr(package, last) is module
        if not (info.ispkg or home == "captum_adv2" or shown):
            continue
        for name in module.__all__:
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            yield f"{info.name}.{name}", [name, f"{last}.{name}"]
            ours = [each for each in getattr(value, "__mro__", ()) if "captum_adv2" in str(each)]
            for method in {key for each in ours for key in vars(each)}:
                found = inspect.getattr_static(value, method)
                function = getattr(found, "__func__", found)
                named = method == "__call__" or not method.startswith("_")
                if named and inspect.isfunction(function) and takes(function):
                    yield f"{info.name}.{name}.{method}", [f"{c.__name__}.{method}" for c in ours]


def takes(function: Any) -> bool:
    """Say whether a method takes an argument besides the object."""
    return len(inspect.signature(function).parameters) > 1


def test_nothing_public_is_forgotten():
    missing = [name for name, known in public() if not {*known} & (CASES.keys() | EXEMPT.keys())]
    assert missing == []


def test_nothing_exempt_is_gone():
    known = {name for _, names in public() for name in names}
    assert {name for name in EXEMPT if name not in known} == set()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Some of the bad values are file names."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def attempt(case: Case, arguments: Mapping[str, Any]) -> int:
    """Call, and use what comes; return after how many runs of the model it was refused."""
    RUNS.clear()
    allowed = (ValueError, TypeError, RefusedError, *((OSError,) if case.files else ()))
    try:
        case.then(case.call(**arguments))
    except allowed as error:
        return 0 if isinstance(error, RefusedError) else len(RUNS)
    return 0


@pytest.mark.parametrize("name", CASES)
def test_good_values(name):
    """The control: what is spoiled below is fine as it is."""
    case = CASES[name]
    with suppress(FileNotFoundError), unchanged(MODEL, X, NEAR, Y):
        case.then(case.call(**case.arguments()))


@pytest.mark.parametrize(
    ("name", "argument"), [(name, key) for name, case in CASES.items() for key in case.arguments()]
)
def test_one_bad_value(name, argument):
    case, wrong = CASES[name], []
    with unchanged(MODEL, X, NEAR, Y):
        for kind, bad in spoiled(case.arguments()[argument]):
            try:
                runs = attempt(case, case.arguments() | {argument: bad})
            except Exception as error:
                wrong.append(f"{kind}: {type(error).__name__}: {str(error)[:80]}")
                continue
            if runs and not (argument in case.late.split() or kind.split()[-1] in LATE):
                wrong.append(f"{kind}: refused only after {runs} runs of the model")
    assert not wrong, "\n".join([f"{name}({argument}=...)", *wrong])


def two_bad_values(data: st.DataObject) -> None:
    several = [name for name, case in CASES.items() if len(case.arguments()) > 1]
    case = CASES[data.draw(st.sampled_from(several), "call")]
    arguments = case.arguments()
    pair = data.draw(
        st.lists(st.sampled_from(sorted(arguments)), min_size=2, max_size=2, unique=True),
        "arguments",
    )
    kinds = [data.draw(st.sampled_from(sorted(BAD)), "value") for _ in pair]
    bad = {argument: BAD[kind]() for argument, kind in zip(pair, kinds, strict=True)}
    with unchanged(MODEL, X, NEAR, Y):
        attempt(case, arguments | bad)


QUIETLY = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@settings(QUIETLY, max_examples=150)
@given(st.data())
def test_two_bad_values(data):
    two_bad_values(data)


@pytest.mark.slow
@settings(QUIETLY, max_examples=20_000)
@given(st.data())
def test_many_pairs_of_bad_values(data):
    two_bad_values(data)
