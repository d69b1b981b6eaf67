"""Rules that differ in their momenta: Lion, Adan, ADOPT, AdEMAMix."""

from jaxopt_rules.conformance.pairs import Pair

PAIRS: tuple[Pair, ...] = ()
