"""From torchattacks
=================

``ADV2`` *is* a ``torchattacks.attack.Attack``. Scripts that use PGD need one more argument, an
interpreter, and keep the rest: modes, normalisation, saving, ``MultiAttack``.
"""

import tempfile
from pathlib import Path

import torch
import torchattacks
from torch.utils.data import DataLoader, TensorDataset

from captum_adv2 import ADV2, evaluate
from captum_adv2.interpreters import CAM
from captum_adv2.study.embedded import load_resnet, make_shapes

model = load_resnet()
images, labels, *_ = make_shapes(4, seed=7)

pgd = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=20)
adv2 = ADV2(model, CAM(model), eps=8 / 255, alpha=2 / 255, steps=20)
print(isinstance(adv2, torchattacks.attack.Attack))

# %%
# **Modes** are the same. Without one, the attack is untargeted: the first class that a few steps of
# PGD reach becomes the target, as a map needs a class to explain.

torch.manual_seed(0)
for attack in (pgd, adv2):
    attack.set_mode_targeted_random(quiet=True)
    adversarial = attack(images, labels)
    reached = model(adversarial).argmax(dim=1)
    print(attack.attack, evaluate(model, CAM(model), images, adversarial, reached))

# %%
# **Normalisation.** A network that expects normalised images is attacked as with PGD: images go in
# and come out normalised. The map explains the network together with the normalisation.

normalize, network = model
attack = ADV2(network, CAM, steps=20)  # a class: the attack builds its interpreter itself
attack.set_normalization_used(mean=[0.5] * 3, std=[0.12] * 3)
print(network(attack(normalize(images), labels)).argmax(dim=1) == labels)

# %%
# **Saving** a whole loader, and reading it back with torchattacks' own functions:

loader = DataLoader(TensorDataset(images, labels), batch_size=2)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "adversarial.pt"
    adv2.save(loader, save_path=str(path), verbose=False)
    kept, _ = next(iter(adv2.load(str(path), batch_size=4)))
print(f"largest change: {(kept - images).abs().max() * 255:.2f} of 255")

# %%
# **MultiAttack** passes on the images on which an attack failed:

both = torchattacks.MultiAttack([adv2, ADV2(model, CAM, steps=60)])
print(model(both(images, labels)).argmax(dim=1) != labels)
