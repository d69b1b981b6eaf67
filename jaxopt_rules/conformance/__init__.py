"""Rules against independent implementations, in float64: `python -m jaxopt_rules conformance`.

Which pairs there are stands in a module for each kind of rule; a pair says where the two begin, what gradients both
are given, and how far apart they may end.
"""

from jaxopt_rules.conformance import (
    adam,
    averaging,
    distance,
    factored,
    gradient,
    loss,
    matrices,
    momenta,
    momentum,
    norms,
)
from jaxopt_rules.conformance.pairs import Outcome as Outcome
from jaxopt_rules.conformance.pairs import Pair as Pair
from jaxopt_rules.conformance.pairs import run as run

_KINDS = (momentum, gradient, adam, momenta, norms, factored, matrices, averaging, distance, loss)
PAIRS: tuple[Pair, ...] = tuple(pair for kind in _KINDS for pair in kind.PAIRS)
