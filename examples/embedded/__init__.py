# SPDX-License-Identifier: MIT
"""A generated data set and two small trained networks, so that every example runs offline."""
