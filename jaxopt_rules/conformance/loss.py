"""Rules that need the loss: Polyak, L-BFGS."""

from jaxopt_rules.conformance.pairs import Pair

PAIRS: tuple[Pair, ...] = ()
