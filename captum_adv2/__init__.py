# SPDX-License-Identifier: MIT
"""ADV2: attacks that fool an image classifier and its interpreter together.

>>> from captum_adv2 import ADV2, evaluate
>>> from captum_adv2.interpreters import CAM
"""

from captum_adv2.attacks.adaptive import BitDepthADV2
from captum_adv2.attacks.adv2 import ADV2, StADV2
from captum_adv2.attacks.blackbox import QueryADV2
from captum_adv2.attacks.surrogates import TransferADV2
from captum_adv2.evaluation.evaluate import Report, evaluate
from captum_adv2.spec import SoundnessWarning

__all__ = [
    "ADV2", "BitDepthADV2", "QueryADV2", "Report", "SoundnessWarning", "StADV2", "TransferADV2",
    "evaluate",
]  # fmt: skip
__version__ = "0.1.0"
