"""Yogi: Adam whose second moment changes by steps that do not depend on how large it is."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.hyperparameters import check
from jaxopt_rules.lift import leafwise
from jaxopt_rules.numerics import abs2, ema, one_minus_power, over_root, real, widened
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class YogiState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, eps
    m: Any  # like θ, float32 or wider: running mean of g
    v: Any  # like θ, float32 or wider, real: follows |g|²


def _filled(p: Any, initial_accumulator_value: float) -> Array:
    return jnp.full_like(p, initial_accumulator_value, widened(p.dtype))


def _filled_real(p: Any, initial_accumulator_value: float) -> Array:
    return jnp.full_like(p, initial_accumulator_value, real(widened(p.dtype)))


def _yogi(
    g: Array,
    m: Array,
    v: Array,
    *,
    t: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    eps: Array,
    debias: bool,
) -> tuple[Array, tuple[Array, Array]]:
    m = ema(m, g, one_minus_b1)
    v = v - one_minus_b2 * jnp.sign(v - abs2(g)) * abs2(g)
    if not debias:
        return over_root(m, v, eps, "outside"), (m, v)
    m_hat, v_hat = m / one_minus_power(one_minus_b1, t), v / one_minus_power(one_minus_b2, t)
    return over_root(m_hat, v_hat, eps, "outside"), (m, v)


@constructor
def yogi_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-3,
    *,
    initial_accumulator_value: float = 1e-6,
    debias: bool = True,
) -> Rule:
    """The direction d of `yogi`, before any learning rate, for chains of your own."""
    if callable(initial_accumulator_value) or isinstance(initial_accumulator_value, Tracer):
        raise TypeError("yogi: initial_accumulator_value is read when init runs, and cannot be a schedule or traced")
    check("initial_accumulator_value", initial_accumulator_value)
    return leafwise(
        _yogi,
        YogiState,
        slots={"m": _filled, "v": _filled_real},
        static={"debias": bool(debias), "initial_accumulator_value": float(initial_accumulator_value)},
        b1=b1,
        b2=b2,
        eps=eps,
    )


@constructor
def yogi(
    learning_rate: float | Schedule = 1e-2,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-3,
    *,
    initial_accumulator_value: float = 1e-6,
    debias: bool = True,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Yogi (Zaheer et al. 2018, "Adaptive Methods for Nonconvex Optimization", Algorithm 2).

        m ← m + (1 − β₁)(g − m)          v ← v − (1 − β₂) sign(v − |g|²) |g|²
        d = m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)
        θ ← θ − α (d + λ θ)

    m and v begin at `initial_accumulator_value`, as in Optax; a state keeps what it began with. `weight_decay`,
    `where`, `decay` and `peak` are those of `descend`.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`.

    Differs from the paper, which corrects no bias (`debias=False` is the paper's d = m / (√v + ε)). The correction is
    Optax's, and makes of the 1e-6 in m a 1e-5 and of that in v a 1e-3 in the first update.
    """
    direction = yogi_direction(b1, b2, eps, initial_accumulator_value=initial_accumulator_value, debias=debias)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
