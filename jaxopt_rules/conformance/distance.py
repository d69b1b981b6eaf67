"""Rules that find their learning rate: Prodigy, DoG."""

from jaxopt_rules.conformance.pairs import Pair

PAIRS: tuple[Pair, ...] = ()
