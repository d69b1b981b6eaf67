"""Rules on matrices: Muon."""

from jaxopt_rules.conformance.pairs import Pair

PAIRS: tuple[Pair, ...] = ()
