"""Temporary: names whose homes have moved."""

from captum_adv2.attacks.terms import Candidate, Schedule, Term  # noqa
from captum_adv2.attacks.targets import TargetMap  # noqa
from captum_adv2.interpreters.base import Explanation  # noqa
