# SPDX-License-Identifier: MIT
"""Is an interpreter sound, and can it be attacked? `check_interpreter` finds out, with hypothesis.

A whole test file is ``testing.check_interpreter(MyInterpreter)``: networks, images and classes are
drawn, and each of `CHECKS` is run on them. A failing example is shrunk, and printed as code that
makes it again. Needs hypothesis: ``pip install captum_adv2[test]``.
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        "expected hypothesis to be installed, got none; pip install captum_adv2[test]"
    ) from error

from captum_adv2.testing.checks import CHECKS
from captum_adv2.testing.drawn import classes, images, networks
from captum_adv2.testing.runner import check_interpreter
from captum_adv2.testing.traces import unchanged

__all__ = ["CHECKS", "check_interpreter", "classes", "images", "networks", "unchanged"]
