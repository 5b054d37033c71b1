"""Detect it
=========

Can a defender see that an image was attacked? *Feature squeezing* compares the prediction on an
image and on a simplified copy: an attack often does not survive a blur. An *ensemble detector*
compares the maps of several interpreters: an attack on one leaves traces in the others. Both have a
score, and a threshold that is set on benign images.
"""

import torchattacks
from matplotlib.figure import Figure

from captum_adv2 import ADV2
from captum_adv2.attacks import Squeezing
from captum_adv2.defenses import EnsembleDetector, FeatureSqueezing, NonLocalMeans
from captum_adv2.interpreters import CAM, Ensemble, Gradient
from captum_adv2.study.embedded import load_resnet, make_shapes

model = load_resnet()
benign = make_shapes(60, seed=1).images
images, labels, *_ = make_shapes(16, seed=2)
target = (labels + 3) % 10

squeezer = NonLocalMeans(5, 3, 4)
detectors = {
    "squeezing": FeatureSqueezing(model, [squeezer]).fit(benign, rate=0.05),
    "ensemble": EnsembleDetector(Ensemble([CAM(model), Gradient(model)])).fit(benign, rate=0.05),
}

# %%
# Three attackers: one looks at the class alone, one keeps the map of CAM, one also knows the
# squeezer, whose effect is a further term of its loss.

attacks = {
    "PGD": torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=20),
    "ADV2": ADV2(model, CAM(model), steps=20),
    "adaptive": ADV2(model, CAM(model), steps=20, terms=(Squeezing(model, [squeezer]),)),
}
figure = Figure(figsize=(8, 3.8), layout="constrained")
axes = figure.subplots(1, 2, sharey=True)
for name, attack in attacks.items():
    attack.set_mode_targeted_by_label(quiet=True)
    adversarial = attack(images, target)
    for (title, detector), axis in zip(detectors.items(), axes, strict=True):
        curve = detector.roc(images, adversarial)
        flagged = detector.detect(adversarial).float().mean()
        print(f"{name:9s} {title:10s} flagged {flagged:4.0%}, AUC {curve.auc:.2f}")
        axis.plot(curve.fpr, curve.tpr, label=f"{name}, AUC {curve.auc:.2f}")
        axis.set(title=title, xlabel="benign images flagged", ylabel="attacked images flagged")
        axis.legend()
figure

# %%
# An AUC of 0.5 is guessing. Squeezing sees ADV2 better than PGD, whose predictions are so sure that
# a blur does not move them; the ensemble sees PGD, which changes the maps. The attack that knows
# the squeezer is flagged less often, and with 100 steps hardly ever: its scores are below the
# threshold, though above those of most benign images, which the AUC counts. So judge a detector by
# the attacker who knows it, and do not take agreement of maps as proof of a clean image.
