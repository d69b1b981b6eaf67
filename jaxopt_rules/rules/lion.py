"""Lion: the sign of a mixture of gradient and momentum."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise
from jaxopt_rules.numerics import ema, quotient
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class LionState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2
    m: Any  # like θ, float32 or wider: running mean of g


def _lion(g: Array, m: Array, *, one_minus_b1: Array, one_minus_b2: Array) -> tuple[Array, tuple[Array]]:
    # From the new m, since XLA copies a slot whose old value makes the update: where m' = β₂ m + (1 − β₂) g,
    # β₁ m + (1 − β₁) g = m' + (β₂ − β₁) / β₂ (g − m'). With β₂ = 0, which is refused, it would be sign(g).
    m = ema(m, g, one_minus_b2)
    share = quotient(one_minus_b1 - one_minus_b2, 1 - one_minus_b2, otherwise=0)
    return jnp.sign(ema(m, g, share)), (m,)


@constructor
def lion_direction(b1: float | Schedule = 0.9, b2: float | Schedule = 0.99) -> Rule:
    """The direction d of `lion`, before any learning rate, for chains of your own.

    Raises:
      ValueError: `b2` is 0.
    """
    if not (callable(b2) or isinstance(b2, Tracer)) and b2 == 0:
        raise ValueError("lion: b2 must be greater than 0 and less than 1, such as 0.99, not 0")
    return leafwise(_lion, LionState, b1=b1, b2=b2)


@constructor
def lion(
    learning_rate: float | Schedule,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.99,
    *,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Lion, evolved sign momentum (Chen et al. 2023, arXiv:2302.06675, Algorithm 2).

        d = sign(m + (1 − β₁)(g − m))          sign(0) = 0; of complex numbers d / |d|
        m ← m + (1 − β₂)(g − m)                after d was taken; β₂ > 0

        θ ← θ − α (d + λ θ)

    Every element moves by α, so that α is 3 to 10 times smaller than AdamW's, and λ 3 to 10 times larger.
    `weight_decay`, `where`, `decay` and `peak` are those of `descend`.

    Memory: 1 slot, 4 bytes per float32 parameter; 2 slots, 8 bytes, with `decay="initial"`.

    Differs from Optax in the default λ: 1e-3 there; none here, in the authors' code and in lion-pytorch; and in
    keywords: `mask` is `where`, and there is no `mu_dtype`.
    """
    return descend(lion_direction(b1, b2), learning_rate, weight_decay, where, decay=decay, peak=peak)
