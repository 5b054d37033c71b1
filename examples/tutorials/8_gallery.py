"""Gallery: each interpreter under each attack
===========================================

Two pictures, and one interpreter's maps of them: clean, and after each attack. Below a picture is
whether it is now of the target class, below a map its L1 distance to the clean map, or, for the
patch, to the patch.

- **PGD** looks at the class alone.
- **ADV2** keeps the map; with a **patch** as target map it shows what the attacker wants.
- **StADV2** moves pixels, by 2 at most, and aims to keep the map.
- **QueryADV2** aims at the same without gradients: it asks the model for scores and maps.

All stay within 8/255 (StADV2 apart). They take 24 gradient evaluations, or 120 queries, which keeps
this page quick; with so few, StADV2 and QueryADV2 reach the class but often lose the map.
"""

import torchattacks
from captum.attr import DeepLift
from matplotlib.figure import Figure

from captum_adv2 import ADV2, QueryADV2, StADV2, evaluate
from captum_adv2.attacks import RandomPatch
from captum_adv2.evaluation import metrics, visualize
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    AttentionRollout,
    CaptumInterpreter,
    GradCAM,
    Gradient,
    IntegratedGradients,
    Interpreter,
    Relevance,
    SmoothGrad,
)  # fmt: skip
from captum_adv2.study.embedded import CLASSES, load_resnet, load_rts, load_vit, make_shapes

images, labels, *_ = make_shapes(2, seed=7)
target = (labels + 3) % len(CLASSES)


def gallery(interpreter: Interpreter, steps: int = 24, queries: int = 120) -> Figure:
    """Attack two pictures in every way; return the picture of their maps."""
    model, patch = interpreter.model, RandomPatch()
    attacks = {
        "PGD": torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=steps),
        "ADV2": ADV2(model, interpreter, steps=steps),
        "patch": ADV2(model, interpreter, steps=steps, target_map=patch),
        "StADV2": StADV2(model, interpreter, steps=steps, bound=2.0),
        "QueryADV2": QueryADV2(model, interpreter, queries=queries),
    }
    benign = interpreter(images, labels).detach()
    wanted = {"patch": patch(interpreter, images, labels, target)}
    rows, notes = {"clean": {"map": (images, benign)}}, {}
    for name, attack in attacks.items():
        attack.set_mode_targeted_by_label(quiet=True)
        adversarial = attack(images, target)
        report = evaluate(model, interpreter, images, adversarial, target)
        rows[name] = {"map": (adversarial, report.adversarial_maps)}
        l1 = metrics.l1(report.adversarial_maps, wanted.get(name, benign))
        notes[name] = {
            "image": ["target class" if won else "another class" for won in report.success],
            "map": [f"L1 {distance:.3f}" for distance in l1],
        }
    return visualize.grid(rows, notes)


model, transformer = load_resnet(), load_vit()

# %%
# CAM
# ---
gallery(CAM(model))

# %%
# Grad-CAM
# --------
gallery(GradCAM(model))

# %%
# GRAD
# ----
gallery(Gradient(model))

# %%
# SmoothGrad
# ----------
gallery(SmoothGrad(model, samples=4))

# %%
# Integrated gradients
# --------------------
gallery(IntegratedGradients(model, steps=4))

# %%
# DeepLift
# --------
gallery(CaptumInterpreter(DeepLift(model), baselines=0.5))

# %%
# RTS
# ---
gallery(RTS(model, load_rts(model)))

# %%
# MASK
# ----
# Its map is the end of an optimisation, so steps are few here, and queries fewer.
gallery(MASK.small(model, iterations=30), steps=12, queries=20)

# %%
# Attention rollout
# -----------------
gallery(AttentionRollout(transformer))

# %%
# Relevance
# ---------
gallery(Relevance(transformer))
