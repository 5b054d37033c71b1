# SPDX-License-Identifier: MIT
"""``python -m captum_adv2``."""

import sys

from captum_adv2.command.cli import main

if __name__ == "__main__":
    sys.exit(main())
