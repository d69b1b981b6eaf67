"""Rules whose slots are smaller than the parameters: Adafactor, SM3."""

from jaxopt_rules.conformance.pairs import Pair

PAIRS: tuple[Pair, ...] = ()
