"""Train and harden an interpreter
===============================

RTS is an interpreter that is *trained*: a masking model learns to predict, in one forward pass,
which part of an image decides its class. ADV2 fools it as it fools others. *Adversarial
interpretation distillation* trains it further, on images and on what ADV2 makes of them, so that
the maps of the two differ.

A good masking model takes thousands of images and some minutes. Here 64 pictures and one epoch show
the calls; the trained models that come with the package show the effect.
"""

from torch.utils.data import DataLoader, TensorDataset

from captum_adv2 import ADV2, evaluate
from captum_adv2.defenses import distill
from captum_adv2.evaluation import visualize
from captum_adv2.interpreters import RTS, train_masking_model
from captum_adv2.study.embedded import load_resnet, load_rts, make_shapes

model = load_resnet()
pictures = make_shapes(64, seed=11)
loader = DataLoader(TensorDataset(pictures.images, pictures.labels), batch_size=32)

masking_model = train_masking_model(model, loader, epochs=1, verbose=False)
hardened = distill(model, loader, masking_model, steps=2, epochs=1, verbose=False)

# %%
# Both use the classifier as their encoder, which stays as it is. ``checkpoint=`` keeps the state of
# a long training and continues it after a stop.
#
# Now the models that come with the package: RTS^A is the hardened one. Each attack knows the
# interpreter that it faces, and differentiates it.

images, labels, *_ = make_shapes(12, seed=21)
target = (labels + 3) % 10
interpreters = {
    "RTS": RTS(model, load_rts(model)),
    "RTS^A": RTS(model, load_rts(model, "resnet-aid")),
}
clean, fooled = {}, {}
for name, interpreter in interpreters.items():
    attack = ADV2(model, interpreter, steps=40)
    attack.set_mode_targeted_by_label(quiet=True)
    adversarial = attack(images, target)
    report = evaluate(model, interpreter, images, adversarial, target)
    print(f"{name:5s}", report)
    clean[name] = images, report.benign_maps
    fooled[name] = adversarial, report.adversarial_maps

# %%
# The attack still succeeds, but RTS^A's maps move further. It is no protection: a part of the
# images carries the mean, and more steps bring the maps nearer again. These are the two pictures on
# which RTS^A's map, the last one attacked, moves most:

most = report.l1.argsort(descending=True)[:2]
for row in (clean, fooled):
    for name, (pictures, maps) in row.items():
        row[name] = pictures[most], maps[most]
visualize.grid({"clean": clean, "ADV2": fooled})
