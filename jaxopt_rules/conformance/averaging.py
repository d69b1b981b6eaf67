"""Rules that evaluate elsewhere than they train: schedule-free, SAM."""

from jaxopt_rules.conformance.pairs import Pair

PAIRS: tuple[Pair, ...] = ()
