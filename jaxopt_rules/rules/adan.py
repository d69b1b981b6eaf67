"""Adan: Adam with Nesterov's momentum, estimated from differences of gradients."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import abs2, debias, ema, ema_of_squares, over_root
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class AdanState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, one_minus_b3, eps
    m: Any  # like θ, float32 or wider: running mean of g
    v: Any  # like θ, float32 or wider: running mean of the differences of successive gradients
    n: Any  # like θ, float32 or wider, real: running mean of the square of the extrapolated gradient
    last: Any  # like θ, float32 or wider: the last gradient


def _adan(
    g: Array,
    m: Array,
    v: Array,
    n: Array,
    last: Array,
    *,
    t: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    one_minus_b3: Array,
    eps: Array,
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    b2 = 1 - one_minus_b2
    difference = jnp.where(t == 1, 0, g - last)
    m = ema(m, g, one_minus_b1)
    v = ema(v, difference, one_minus_b2)
    n = ema_of_squares(n, abs2(g + b2 * difference), one_minus_b3)
    d = debias(m, one_minus_b1, t) + b2 * debias(v, one_minus_b2, t)
    return over_root(d, debias(n, one_minus_b3, t), eps, "outside"), (m, v, n, g)


@constructor
def adan_direction(
    b1: float | Schedule = 0.98,
    b2: float | Schedule = 0.92,
    b3: float | Schedule = 0.99,
    eps: float | Schedule = 1e-8,
) -> Rule:
    """The direction d of `adan`, before any learning rate, for chains of your own."""
    return leafwise(_adan, AdanState, slots={"n": real_zeros}, b1=b1, b2=b2, b3=b3, eps=eps)


@constructor
def adan(
    learning_rate: float | Schedule,
    b1: float | Schedule = 0.98,
    b2: float | Schedule = 0.92,
    b3: float | Schedule = 0.99,
    eps: float | Schedule = 1e-8,
    *,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "proximal",
    peak: float | Schedule | None = None,
) -> Rule:
    """Adan (Xie et al. 2022, arXiv:2208.06677, Algorithm 1).

        Δ = g − gₜ₋₁, and 0 in the first update          m ← m + (1 − β₁)(g − m)
                                                         v ← v + (1 − β₂)(Δ − v)
                                                         n ← n + (1 − β₃)(|g + β₂ Δ|² − n)

        d = (m / (1 − β₁ᵗ) + β₂ v / (1 − β₂ᵗ)) / (√(n / (1 − β₃ᵗ)) + ε)

        θ ← (θ − α d) / (1 + α λ)

    Here β is what a mean keeps, as in Adam and in the authors' code; the paper's β is 1 − β. The rate is 5 to 10 times
    that of AdamW. `weight_decay`, `where`, `decay` and `peak` are those of `descend`. By default decay is "proximal",
    as above; "decoupled" is the authors' `no_prox`.

    Memory: 4 slots, 16 bytes per float32 parameter; 5 slots, 20 bytes, with `decay="initial"`. XLA copies the last
    gradient, which two slots read.

    Differs from the paper as the authors' code does: the means begin at 0 and are corrected for it, and nothing is
    restarted. From Optax, which has 1 − β₂ in place of both factors β₂ (its β₂ is 0.92, too; the two agree at 0.5
    alone), a second ε of 1e-8 under the root, `eps_root`, and decoupled decay, whose `mask` is `where`. From the
    authors' code for a parameter without a gradient in the first update: Δ of the first that it has later is g, not 0.
    """
    if weight_decay is None and decay == "proximal":
        decay = "decoupled"  # of nothing
    return descend(adan_direction(b1, b2, b3, eps), learning_rate, weight_decay, where, decay=decay, peak=peak)
