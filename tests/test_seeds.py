# SPDX-License-Identifier: MIT
"""Seeds mixed of several keys."""

import torch

from captum_adv2.seeds import mixed


def test_every_key_counts_and_nothing_else():
    keys = [(), (0,), (1,), (0, 1), (1, 0), (0, "step"), (b"\0",), (-1, 2.5)]
    assert len({mixed(*each) for each in keys}) == len(keys)
    assert mixed(3, 4) == 1924933329402722277  # the same in every process


def test_a_seed_fits_torchs_generators():
    for key in range(100):
        torch.Generator().manual_seed(mixed(key))
