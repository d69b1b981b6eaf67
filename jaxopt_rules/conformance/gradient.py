"""Rules without a direction of their own, and those that scale by sums and means of squares."""

from jaxopt_rules.conformance.pairs import Pair

PAIRS: tuple[Pair, ...] = ()
