# SPDX-License-Identifier: MIT
"""Scripts that print every figure the documentation quotes."""
