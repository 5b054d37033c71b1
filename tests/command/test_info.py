# SPDX-License-Identifier: MIT
"""`info` names versions, device and threads."""

from __future__ import annotations

import pytest
import torch

import captum_adv2
from captum_adv2.command.cli import main


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["captum_adv2"] == captum_adv2.__version__
    assert (
        lines["torch"] == torch.__version__.partition("+")[0] or lines["torch"] in torch.__version__
    )
    assert lines["threads"] == str(torch.get_num_threads())
    assert {"python", "captum", "torchattacks", "device", "cores"} <= set(lines)
