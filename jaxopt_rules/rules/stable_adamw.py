"""StableAdamW: AdamW whose rate falls for an array that v does not know yet."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import abs2, ema, ema_of_squares, one_minus_power, over_root, sqrt
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class StableAdamwState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, eps; weight_decay where decay is inside
    m: Any  # like θ, float32 or wider: mean of g, corrected
    v: Any  # like θ, float32 or wider, real: mean of |g|², corrected


def _moments(g: Array, m: Array, v: Array, t: Array, one_minus_b1: Array, one_minus_b2: Array) -> tuple[Array, Array]:
    # 1 − β̂ = (1 − β) / (1 − βᵗ) where β̂ = β (1 − βᵗ⁻¹) / (1 − βᵗ).
    m = ema(m, g, one_minus_b1 / one_minus_power(one_minus_b1, t))
    return m, _second_moment(g, v, t, one_minus_b2)


def _second_moment(g: Array, v: Array, t: Array, one_minus_b2: Array) -> Array:
    return ema_of_squares(v, abs2(g), one_minus_b2 / one_minus_power(one_minus_b2, t))


def _clip(g: Array, m: Array, v: Array, *, t: Array, one_minus_b2: Array, eps: Array) -> Array:
    """1 / c"""
    v = _second_moment(g, v, t, one_minus_b2)
    squares = abs2(g) / jnp.maximum(v, jnp.maximum(eps * eps, jnp.finfo(v.dtype).tiny))
    return 1 / jnp.maximum(1, sqrt(jnp.sum(squares) / max(g.size, 1)))


def _stable_adamw(
    g: Array, m: Array, v: Array, *, t: Array, one_minus_b1: Array, one_minus_b2: Array, eps: Array, clip: Array
) -> tuple[Array, tuple[Array, Array]]:
    m, v = _moments(g, m, v, t, one_minus_b1, one_minus_b2)
    return clip * over_root(m, v, eps, "outside"), (m, v)


def _stable_adamw_decayed(
    g: Array,
    m: Array,
    v: Array,
    *,
    p: Array,
    t: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    eps: Array,
    clip: Array,
    weight_decay: Array | None,
) -> tuple[Array, tuple[Array, Array]]:
    m, v = _moments(g, m, v, t, one_minus_b1, one_minus_b2)
    d = over_root(m, v, eps, "outside")
    if weight_decay is not None:
        d = d + weight_decay * p
    return clip * d, (m, v)


@constructor
def stable_adamw_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.99,
    eps: float | Schedule = 1e-6,
    *,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
) -> Rule:
    """The direction d of `stable_adamw`, decay inside, before any learning rate, for chains of your own."""
    slots, sums = {"v": real_zeros}, {"clip": _clip}
    if weight_decay is None:
        return leafwise(_stable_adamw, StableAdamwState, slots=slots, sums=sums, b1=b1, b2=b2, eps=eps)
    return leafwise(
        _stable_adamw_decayed,
        StableAdamwState,
        slots=slots,
        sums=sums,
        where={"weight_decay": where},
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )


@constructor
def stable_adamw(
    learning_rate: float | Schedule,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.99,
    eps: float | Schedule = 1e-6,
    *,
    weight_decay: float | Schedule | None = 0.01,
    where: Selector | None = None,
    decay: Decay | Literal["l2", "inside"] = "inside",
    peak: float | Schedule | None = None,
) -> Rule:
    """StableAdamW, AdamW with AdaFactor's update clipping (Wortsman et al. 2023, arXiv:2304.13013, Algorithm 2).

        β̂ = β (1 − βᵗ⁻¹) / (1 − βᵗ)          m ← m + (1 − β̂₁)(g − m)          v ← v + (1 − β̂₂)(|g|² − v)

        c = max(1, rms(g / max(√v, ε)))       rms(x) = √(mean |x|²), for each array

        d = (m / (√v + ε) + λ θ) / c          θ ← θ − α d

    A gradient that is larger than those that v has seen makes a smaller step, which does the work of clipping
    gradients. `weight_decay`, `where`, `decay` and `peak` are those of `descend`. By default decay is "inside", as
    above: c divides it, too.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`.

    Differs from pytorch_optimizer in the default ε (1e-8 there, 1e-6 here and in optimi).
    """
    if decay != "inside":
        direction = stable_adamw_direction(b1, b2, eps)
        return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
    direction = stable_adamw_direction(b1, b2, eps, weight_decay=weight_decay, where=where)
    return descend(direction, learning_rate, peak=peak)
