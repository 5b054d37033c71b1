# SPDX-License-Identifier: MIT
"""Seeds mixed of several keys."""

from captum_adv2.seeds import mixed


def test_every_key_counts_and_the_seed_is_the_same_in_every_process():
    keys = [(), (0,), (1,), (0, 1), (1, 0), (0, "step"), (b"\0",), (-1, 2.5)]
    assert len({mixed(*each) for each in keys}) == len(keys)
    assert mixed(3, 4) == 1924933329402722277
