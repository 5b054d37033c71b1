# SPDX-License-Identifier: MIT
"""Studies are tested on the CPU, whose results do not depend on the order of additions."""

import pytest
import torch
from matplotlib.figure import Figure

from captum_adv2.study import figures


@pytest.fixture(autouse=True, scope="package")
def _on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def undrawn():
    """Figures stay empty, where their number and not their content is tested; that is faster."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_stacked", "_barred", "_curves"):
            patch.setattr(figures, name, lambda *parts: Figure((1, 1)))
        yield
