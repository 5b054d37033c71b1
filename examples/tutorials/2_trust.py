"""Is my saliency map trustworthy?
===============================

A map can be trusted as far as it is hard to fake. ``robustness`` measures that: for each image, the
least change of the pixels (eps) at which an attack reaches another class *and* a map that still
looks like the clean one (IoU above one half). The share of images that are fooled up to each eps is
the *curve of trust*. The area above it is one number by which interpreters are ranked: 0 if every
image is fooled at once, 1 if none ever is.
"""

from matplotlib.figure import Figure

from captum_adv2.evaluation import robustness
from captum_adv2.interpreters import CAM, RTS, Gradient
from captum_adv2.study.embedded import load_resnet, load_rts, make_shapes

model = load_resnet()
images, labels, *_ = make_shapes(12, seed=3)
interpreters = {
    "CAM": CAM(model),
    "GRAD": Gradient(model),
    "RTS": RTS(model, load_rts(model)),
}

# %%
# Levels of eps are in units of the images' range; steps count gradient evaluations. Few of both
# keep this page quick, and few images make wide intervals (in brackets).

levels = [level / 255 for level in (0.5, 1, 2, 3, 4, 6, 8)]
found = {}
for name, interpreter in interpreters.items():
    found[name] = robustness(model, interpreter, images, labels=labels, levels=levels, steps=30)
    print(f"{name:5s}", found[name])

# %%
# The further right a curve rises, the more an attacker has to change.

figure = Figure(figsize=(6, 3.4), layout="constrained")
axis = figure.subplots()
for name, each in found.items():
    axis.step([255 * level for level in levels], each.shares(), where="post", label=name)
axis.set(xlabel="eps, in 1/255", ylabel="share fooled", ylim=(-0.03, 1.03))
axis.legend()
figure

# %%
# An area near 1 means that *this attack* failed, not that the map is safe: more steps, or an attack
# that suits the interpreter (``attack=``), may do better. So compare interpreters under the same
# attack, and read the number as an upper bound. On your own pictures: a batch in [0, 1], its
# labels, and any interpreter built on your model.
