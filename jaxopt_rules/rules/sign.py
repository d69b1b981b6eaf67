"""The sign of the gradient, and of its running mean."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.directions import sign
from jaxopt_rules.lift import leafwise
from jaxopt_rules.numerics import ema
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


@constructor
def sign_sgd(
    learning_rate: float | Schedule,
    *,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """signSGD: every element moves by the rate (Bernstein et al. 2018, arXiv:1802.04434, Algorithm 1).

        θ ← θ − α sign(g)          sign(0) = 0; of complex numbers g / |g|

    `weight_decay`, `where`, `decay` and `peak` are those of `descend`.

    Memory: none; 1 slot, 4 bytes per float32 parameter, with `decay="initial"`.
    """
    return descend(sign(), learning_rate, weight_decay, where, decay=decay, peak=peak)


class SignumState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_beta
    m: Any  # like θ, float32 or wider: running mean of g


def _signum(g: Array, m: Array, *, one_minus_beta: Array) -> tuple[Array, tuple[Array]]:
    m = ema(m, g, one_minus_beta)
    return jnp.sign(m), (m,)


@constructor
def signum_direction(beta: float | Schedule = 0.9) -> Rule:
    """The direction d of `signum`, before any learning rate, for chains of your own."""
    return leafwise(_signum, SignumState, beta=beta)


@constructor
def signum(
    learning_rate: float | Schedule,
    beta: float | Schedule = 0.9,
    *,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Signum: the sign of the running mean (Bernstein et al. 2018, arXiv:1802.04434, Algorithm 2).

        m ← β m + (1 − β) g          θ ← θ − α sign(m)

    sign(0) = 0; of complex numbers m / |m|. `weight_decay`, `where`, `decay` and `peak` are those of `descend`.

    Memory: 1 slot, 4 bytes per float32 parameter; 2 slots, 8 bytes, with `decay="initial"`.

    Differs from Optax in keywords: there is no `accumulator_dtype`.
    """
    return descend(signum_direction(beta), learning_rate, weight_decay, where, decay=decay, peak=peak)
