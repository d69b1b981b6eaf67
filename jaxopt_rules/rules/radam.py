"""RAdam: Adam that waits until its second moment has seen enough gradients to be divided by."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import (
    Epsilon,
    abs2,
    check_epsilon,
    debias,
    ema,
    ema_of_squares,
    one_minus_power,
    over_root,
    sqrt,
)
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector

Silent = Literal["sgd", "skip"]


class RadamState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, eps, threshold
    m: Any  # like θ, float32 or wider: running mean of g
    v: Any  # like θ, float32 or wider, real: running mean of |g|²


def sma_length(t: Array, one_minus_b: Array) -> Array:
    """ρ_t = 2 / (1 − β) − 1 − 2 t βᵗ / (1 − βᵗ), in which all digits may cancel: for β near 1 it is about t.

    With y = −½ ln β it is coth y + t − t coth(t y), so t 𝒦(t y) + 1 − 𝒦(y) with 𝒦(z) = 1 + 1 / z − coth z.
    """
    y = -0.5 * jnp.log1p(-one_minus_b)
    return t * _coth_deficit(t * y) + 1 - _coth_deficit(y)


def _coth_deficit(z: Array) -> Array:
    """1 + 1 / z − coth z, which falls from 1 at 0 to 0."""
    # Up to 1 by Lambert's continued fraction coth z − 1 / z = z / (3 + z² / (5 + ...)), cut at 21.
    near, far = jnp.minimum(z, 1), jnp.maximum(z, 1)
    fraction = jnp.full_like(z, 21)
    for odd in (19, 17, 15, 13, 11, 9, 7, 5, 3):
        fraction = odd + near**2 / fraction
    return jnp.where(z < 1, 1 - near / fraction, 1 / far + 2 * jnp.exp(-2 * far) / jnp.expm1(-2 * far))


def rectified(
    m_hat: Array,
    v: Array,
    eps: Array,
    eps_placement: Epsilon,
    silent: Silent,
    *,
    t: Array,
    one_minus_b2: Array,
    threshold: ArrayLike,
) -> Array:
    """r m̂ / √v̂ where ρ_t > `threshold`; before that m̂ or 0."""
    rho, rho_limit = sma_length(t, one_minus_b2), 2 / one_minus_b2 - 1
    tractable = rho > jnp.maximum(threshold, 4)

    def variance(length: Array) -> Array:
        length = jnp.where(tractable, length, 5)  # any number above 4, where nothing reads the result
        return length / ((length - 4) * (length - 2))

    r = sqrt(variance(rho_limit) / variance(rho))
    adaptive = r * over_root(m_hat, v, eps, eps_placement, one_minus_power(one_minus_b2, t))
    return jnp.where(tractable, adaptive, m_hat if silent == "sgd" else 0)


def _radam(
    g: Array,
    m: Array,
    v: Array,
    *,
    t: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    eps: Array,
    threshold: Array,
    eps_placement: Epsilon,
    silent: Silent,
) -> tuple[Array, tuple[Array, Array]]:
    m = ema(m, g, one_minus_b1)
    v = ema_of_squares(v, abs2(g), one_minus_b2)
    m_hat = debias(m, one_minus_b1, t)
    d = rectified(m_hat, v, eps, eps_placement, silent, t=t, one_minus_b2=one_minus_b2, threshold=threshold)
    return d, (m, v)


@constructor
def radam_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    threshold: float | Schedule = 5.0,
    silent: Silent = "sgd",
    eps_placement: Epsilon = "outside",
) -> Rule:
    """The direction d of `radam`, before any learning rate, for chains of your own."""
    if silent not in ("sgd", "skip"):
        raise ValueError(f'radam: silent is "sgd" or "skip", not {silent!r}')
    check_epsilon(eps_placement)
    return leafwise(
        _radam,
        RadamState,
        slots={"v": real_zeros},
        static={"eps_placement": eps_placement, "silent": silent},
        b1=b1,
        b2=b2,
        eps=eps,
        threshold=threshold,
    )


@constructor
def radam(
    learning_rate: float | Schedule = 1e-3,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    threshold: float | Schedule = 5.0,
    silent: Silent = "sgd",
    eps_placement: Epsilon = "outside",
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """RAdam (Liu et al. 2020, arXiv:1908.03265, Algorithm 2).

        m ← m + (1 − β₁)(g − m)          v ← v + (1 − β₂)(|g|² − v)          m̂ = m / (1 − β₁ᵗ)
        ρ_∞ = 2 / (1 − β₂) − 1           ρ_t = ρ_∞ − 2 t β₂ᵗ / (1 − β₂ᵗ)
        r = √((ρ_t − 4)(ρ_t − 2) ρ_∞ / ((ρ_∞ − 4)(ρ_∞ − 2) ρ_t))

        ρ_t > threshold:    d = r m̂ / (√(v / (1 − β₂ᵗ)) + ε)
        otherwise:          d = m̂ with silent="sgd", 0 with "skip"

        θ ← θ − α (d + λ θ)

    ρ_t is about t while t is much less than ρ_∞: with the usual β₂ the first five updates are silent. With β₂ ≤ 0.6
    all are. A threshold below 4, where r is not real, acts as 4.

    `eps_placement` is that of `adam`: "outside" is Optax's and optimi's, "hat" PyTorch's. `silent="sgd"` is all that
    PyTorch, Optax and optimi have; "skip" is `degenerated_to_sgd=False` in pytorch_optimizer. `weight_decay`, `where`,
    `decay` and `peak` are those of `descend`.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`.

    Differs from the paper in the threshold: 4 there (and in schedule-free RAdam), 5 in PyTorch and Optax. Whether ρ_t =
    5 itself is above it (in Optax) or not (in PyTorch) has no effect: no β₂ that is used gives that. From PyTorch in
    the defaults of `eps_placement` ("hat" there) and of the form of decay ("l2" there). From Optax in keywords:
    `eps_root` with `eps=0` is `eps_placement="inside"`, and there is no `nesterov`. And in float32, where ρ_t, a
    difference of numbers near 2 / (1 − β₂), loses its digits there: at t = 6 its step is 1 % off for β₂ = 0.999, and
    twice as long for 0.9999.
    """
    direction = radam_direction(b1, b2, eps, threshold=threshold, silent=silent, eps_placement=eps_placement)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
