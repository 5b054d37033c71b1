# SPDX-License-Identifier: MIT
"""The command line: ``python -m captum_adv2``."""
