"""Rules with a norm for each array: LAMB, LARS, NovoGrad, StableAdamW."""

from jaxopt_rules.conformance.pairs import Pair

PAIRS: tuple[Pair, ...] = ()
