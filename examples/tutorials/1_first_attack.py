"""Your first dual attack
======================

An attribution map shows which parts of an image a classifier relies on. People use such maps to
check a prediction: if the map points at the object, they trust the class. A *dual attack* changes
the class and keeps the map. This page makes one.

The package brings a small residual network and generated pictures: one low-contrast object on a
cluttered background, whose outline is its class. Any classifier from images in [0, 1] to logits
takes their place.
"""

import torch
import torchattacks

from captum_adv2 import ADV2, evaluate
from captum_adv2.evaluation import visualize
from captum_adv2.interpreters import CAM
from captum_adv2.study.embedded import CLASSES, load_resnet, make_shapes

torch.manual_seed(0)
model = load_resnet()
images, labels, *_ = make_shapes(3, seed=7)
target = (labels + 3) % len(CLASSES)

# %%
# The interpreter here is the class activation map. ``ADV2`` is a torchattacks attack with one more
# argument, the interpreter that it has to fool. No pixel changes by more than 8/255, and PGD gets
# as many gradient evaluations.

interpreter = CAM(model)
attacks = {
    "PGD": torchattacks.PGD(model, eps=8 / 255, alpha=1 / 255, steps=40),
    "ADV2": ADV2(model, interpreter, eps=8 / 255, alpha=2 / 255, steps=40),
}
reports, shown = {}, {}
for name, attack in attacks.items():
    attack.set_mode_targeted_by_label(quiet=True)  # labels in the call are the classes to reach
    adversarial = attack(images, target)
    reports[name] = evaluate(model, interpreter, images, adversarial, target)
    print(f"{name:5s}", reports[name])
    shown[name] = {"CAM": (adversarial, reports[name].adversarial_maps)}

# %%
# Both reach the class for every picture (ASR, the attack's success rate). They differ in the L1
# distance of the map to the clean image's, and the eye agrees: with PGD the red region moves and
# changes its shape, with ADV2 it stays.

shown = {"clean": {"CAM": (images, reports["ADV2"].benign_maps)}, **shown}
notes = {name: {"CAM": [f"L1 {d:.3f}" for d in each.l1]} for name, each in reports.items()}
visualize.grid(shown, notes)

# %%
# In a script, ``visualize.grid(...).savefig("maps.png")`` writes the picture.
