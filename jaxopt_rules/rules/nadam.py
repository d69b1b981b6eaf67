"""Adam with Nesterov's momentum: NAdam with its schedule of momenta, and NAdamW without."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

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
    real,
    widened,
)
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class NadamState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, eps, momentum_decay
    m: Any  # like θ, float32 or wider: running mean of g
    v: Any  # like θ, float32 or wider, real: running mean of |g|²
    product: Any  # ()  per parameter, float32 or wider: μ₁ μ₂ ⋯ μ_t, of the updates that it took part in


def _one(p: Any) -> Array:
    # Summed from something like the parameter, so that on a mesh it is born where the parameter lives.
    return jnp.sum(jnp.zeros_like(p, dtype=real(widened(p.dtype)))) + 1


def _nadam(
    g: Array,
    m: Array,
    v: Array,
    product: Array,
    *,
    t: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    eps: Array,
    momentum_decay: Array,
) -> tuple[Array, tuple[Array, Array, Array]]:
    def lag(i: Array) -> Array:
        """1 − μᵢ / β₁"""
        return 0.5 * 0.96 ** (i * momentum_decay)

    b1 = 1 - one_minus_b1
    m = ema(m, g, one_minus_b1)
    v = ema_of_squares(v, abs2(g), one_minus_b2)
    product = b1 * (1 - lag(t)) * product
    mu_next = b1 * (1 - lag(t + 1))
    m_hat = mu_next / (1 - mu_next * product) * m + (one_minus_b1 + b1 * lag(t)) / (1 - product) * g
    return over_root(m_hat, debias(v, one_minus_b2, t), eps, "outside"), (m, v, product)


@constructor
def nadam_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    momentum_decay: float | Schedule = 4e-3,
) -> Rule:
    """The direction d of `nadam`, before any learning rate, for chains of your own."""
    births = {"v": real_zeros, "product": _one}
    return leafwise(_nadam, NadamState, slots=births, b1=b1, b2=b2, eps=eps, momentum_decay=momentum_decay)


@constructor
def nadam(
    learning_rate: float | Schedule = 2e-3,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    momentum_decay: float | Schedule = 4e-3,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """NAdam (Dozat 2016, "Incorporating Nesterov Momentum into Adam", Algorithm 2), as in PyTorch.

        μ_t = β₁ (1 − ½ · 0.96^(ψ t))
        m ← m + (1 − β₁)(g − m)          v ← v + (1 − β₂)(|g|² − v)          Π ← μ_t Π
        d = (μ_{t+1} m / (1 − μ_{t+1} Π) + (1 − μ_t) g / (1 − Π)) / (√(v / (1 − β₂ᵗ)) + ε)
        θ ← θ − α (d + λ θ)

    `momentum_decay` is ψ, of Dozat's schedule, in which the momentum rises from β₁ / 2 to β₁. Π, the product of all μ,
    begins at 1 and stays in the state, since ψ and β₁ may change. `weight_decay`, `where`, `decay` and `peak` are those
    of `descend`.

    Memory: 2 slots, 8 bytes per float32 parameter, and a number per array; 3 slots, 12 bytes, with `decay="initial"`.

    Differs from Optax's `nadam`, which has no schedule of μ: that is `nadamw(weight_decay=None)` here. From the paper
    in m, whose mean keeps β₁ where the paper has μ_t, and in v / (1 − β₂ᵗ), which the paper multiplies by β₂. From
    PyTorch in the default form of decay ("l2" there).
    """
    direction = nadam_direction(b1, b2, eps, momentum_decay=momentum_decay)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)


Lookahead = Literal["optax", "timm"]


class NadamwState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, eps
    m: Any  # like θ, float32 or wider: running mean of g
    v: Any  # like θ, float32 or wider, real: running mean of |g|²


def _nadamw(
    g: Array,
    m: Array,
    v: Array,
    *,
    t: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    eps: Array,
    form: Lookahead,
    eps_placement: Epsilon,
) -> tuple[Array, tuple[Array, Array]]:
    m = ema(m, g, one_minus_b1)
    v = ema_of_squares(v, abs2(g), one_minus_b2)
    ahead = t + 1 if form == "optax" else t
    m_hat = (1 - one_minus_b1) * debias(m, one_minus_b1, ahead) + one_minus_b1 * debias(g, one_minus_b1, t)
    return over_root(m_hat, v, eps, eps_placement, one_minus_power(one_minus_b2, t)), (m, v)


@constructor
def nadamw_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    form: Lookahead = "optax",
    eps_placement: Epsilon = "outside",
) -> Rule:
    """The direction d of `nadamw`, before any learning rate, for chains of your own."""
    if form not in ("optax", "timm"):
        raise ValueError(f'nadamw: form is "optax" or "timm", not {form!r}')
    check_epsilon(eps_placement)
    return leafwise(
        _nadamw,
        NadamwState,
        slots={"v": real_zeros},
        static={"form": form, "eps_placement": eps_placement},
        b1=b1,
        b2=b2,
        eps=eps,
    )


@constructor
def nadamw(
    learning_rate: float | Schedule = 1e-3,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    form: Lookahead = "optax",
    eps_placement: Epsilon = "outside",
    weight_decay: float | Schedule | None = 1e-4,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """AdamW with Nesterov's momentum and a constant β₁ (Dozat 2016; the baseline of AlgoPerf, arXiv:2306.07179).

        m ← m + (1 − β₁)(g − m)          v ← v + (1 − β₂)(|g|² − v)

        "optax":    m̂ = β₁ m / (1 − β₁ᵗ⁺¹) + (1 − β₁) g / (1 − β₁ᵗ)
        "timm":     m̂ = (β₁ m + (1 − β₁) g) / (1 − β₁ᵗ)

        θ ← θ − α (m̂ / (√(v / (1 − β₂ᵗ)) + ε) + λ θ)

    `form="optax"` corrects m as of the next update, as Dozat does; it is Optax's `nadamw` and, with
    `weight_decay=None`, its `nadam`. `"timm"` is the baseline of AlgoPerf and timm's `NAdamW`: 1 + β₁ times a gradient
    on the first update, where "optax" has 1 + β₁ / (1 + β₁) times; the two meet as β₁ᵗ falls to 0. `eps_placement` is
    that of `adam`, and `weight_decay`, `where`, `decay` and `peak` are those of `descend`.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`.

    Differs from PyTorch's `NAdam`, decoupled or not, which is `nadam` here; from timm in the default λ (0.01 there,
    1e-4 here and in Optax); from Optax in keywords: `mask` is `where`, `eps_root` with `eps=0` is
    `eps_placement="inside"`, `nesterov=False` is `adamw`, and there is no `mu_dtype`.
    """
    direction = nadamw_direction(b1, b2, eps, form=form, eps_placement=eps_placement)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
