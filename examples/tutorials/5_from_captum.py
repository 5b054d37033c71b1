"""From Captum
===========

``CaptumInterpreter`` takes a method of ``captum.attr`` as you have it, with the arguments of its
``attribute``, and makes an interpreter of it: attributions are reduced over the channels and scaled
to [0, 1], and an attack can differentiate them. Several of Captum's methods return attributions
whose graph is incomplete, so that a naive attack follows a wrong gradient; here 22 of them have the
true one, which is tested against finite differences, and the others are refused with the reason.
"""

from captum.attr import LRP, DeepLift, LayerGradCam, Occlusion, Saliency

from captum_adv2 import ADV2, evaluate
from captum_adv2.evaluation import visualize
from captum_adv2.interpreters import CaptumInterpreter
from captum_adv2.study.embedded import load_resnet, make_shapes

model = load_resnet()
images, labels, *_ = make_shapes(2, seed=7)
target = (labels + 3) % 10

interpreters = {
    "Saliency": CaptumInterpreter(Saliency(model)),
    "DeepLift": CaptumInterpreter(DeepLift(model), baselines=0.5),
    "Grad-CAM": CaptumInterpreter(LayerGradCam(model, model[1].layer3), "sum"),
    "Occlusion": CaptumInterpreter(
        Occlusion(model), sliding_window_shapes=(3, 16, 16), strides=(3, 8, 8), baselines=0.5
    ),
}

# %%
# Each is attacked for itself. The cost of a step depends on the method: occlusion runs the model
# once for each position of its window.

clean, fooled = {}, {}
for name, interpreter in interpreters.items():
    attack = ADV2(model, interpreter, steps=24)
    attack.set_mode_targeted_by_label(quiet=True)
    adversarial = attack(images, target)
    report = evaluate(model, interpreter, images, adversarial, target)
    print(f"{name:9s}", report)
    clean[name] = images[:1], report.benign_maps[:1]
    fooled[name] = adversarial[:1], report.adversarial_maps[:1]

visualize.grid({"clean": clean, "ADV2": fooled})

# %%
# A method that cannot be attacked through its gradient says why, and what to use in its place:

try:
    CaptumInterpreter(LRP(model))
except (TypeError, ValueError) as error:
    print(str(error).partition("got ")[2])
