"""ADOPT: Adam whose gradient is divided by the root of the past alone, and then averaged."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import abs2, ema, ema_of_squares, over_root
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class AdoptState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, eps; clip_exponent where gradients are clipped
    m: Any  # like θ, float32 or wider: running mean of the normalized gradient
    v: Any  # like θ, float32 or wider, real: running mean of |g|², which begins with the first


def _adopt(
    g: Array,
    m: Array,
    v: Array,
    *,
    t: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    eps: Array,
    clip_exponent: Array | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    first = t == 1
    n = over_root(g, v, eps, "max")
    if clip_exponent is not None:
        bound = jnp.maximum(t - 1, 1) ** clip_exponent
        n = jnp.clip(n, -bound, bound)
    m = jnp.where(first, m, ema(m, n, one_minus_b1))
    v = jnp.where(first, abs2(g), ema_of_squares(v, abs2(g), one_minus_b2))
    return m, (m, v)


@constructor
def adopt_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.9999,
    eps: float | Schedule = 1e-6,
    *,
    clip_exponent: float | Schedule | None = 0.25,
) -> Rule:
    """The direction d of `adopt`, before any learning rate, for chains of your own."""
    return leafwise(
        _adopt,
        AdoptState,
        slots={"v": real_zeros},
        ordered=clip_exponent is not None,
        b1=b1,
        b2=b2,
        eps=eps,
        clip_exponent=clip_exponent,
    )


@constructor
def adopt(
    learning_rate: float | Schedule,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.9999,
    eps: float | Schedule = 1e-6,
    *,
    clip_exponent: float | Schedule | None = 0.25,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """ADOPT (Taniguchi et al. 2024, arXiv:2411.02853, Algorithm 2).

        t = 1:     d = 0          v ← |g|²

        t > 1:     n = g / max(√v, ε), clipped to ±(t − 1)^κ
                   m ← m + (1 − β₁)(n − m)          d = m
                   v ← v + (1 − β₂)(|g|² − v)       after n was taken

        θ ← θ − α (d + λ θ)

    κ is `clip_exponent`; with `None` nothing is clipped, and elements whose first gradient was near 0 make large steps
    until v knows better; so do parameters without a gradient in the first update, which measures v alone.
    `weight_decay`, `where`, `decay` and `peak` are those of `descend`.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`. XLA copies v, whose old
    value makes the update.

    Differs from torch-adopt and timm in that decoupled decay acts in the first update, too, and from timm in the
    default κ (0.333 there). From Optax in keywords: `use_clipping=False` is `clip_exponent=None`, the bounds of
    `clip_value_fn` are powers alone, and there are no `nesterov` and `mu_dtype`.
    """
    direction = adopt_direction(b1, b2, eps, clip_exponent=clip_exponent)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
