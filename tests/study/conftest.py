# SPDX-License-Identifier: MIT
"""Studies are tested on the CPU, whose results do not depend on the order of additions."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
