# SPDX-License-Identifier: MIT
"""The paper's evaluation of a classifier and its interpreters, as one resumable study (§4, §5).

To run one, ``pip install "captum_adv2[study]"``.
"""

from captum_adv2.study.run import run
from captum_adv2.study.settings import PROFILES, Settings

__all__ = ["PROFILES", "Settings", "run"]
