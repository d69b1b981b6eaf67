"""Gradient descent and its momentum."""

from functools import partial

from jaxopt_rules.compose import chain
from jaxopt_rules.conformance.pairs import Pair, torch_optimizer
from jaxopt_rules.hooks import weight_decay
from jaxopt_rules.rules.sgd import sgd

_torch = partial(Pair, oracle="torch.optim.SGD")

PAIRS = (
    _torch(
        "sgd", lambda: sgd(0.1), theirs=torch_optimizer(lambda torch, p: torch.optim.SGD(p, 0.1)), convention="plain"
    ),
    _torch(
        "sgd momentum",
        lambda: sgd(0.1, 0.9),
        theirs=torch_optimizer(lambda torch, p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        convention="rate outside the velocity",
    ),
    _torch(
        "sgd nesterov",
        lambda: sgd(0.1, 0.9, True),
        theirs=torch_optimizer(lambda torch, p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
        convention="rate outside the velocity",
    ),
    _torch(
        "sgd decay",
        lambda: chain(weight_decay(0.1), sgd(0.1, 0.9)),
        theirs=torch_optimizer(lambda torch, p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1)),
        convention="L2 decay",
    ),
)
