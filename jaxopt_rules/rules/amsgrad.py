"""AMSGrad: Adam whose second moment never falls."""

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

MaximumOf = Literal["corrected", "uncorrected"]


class AmsgradState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, eps
    m: Any  # like θ, float32 or wider: running mean of g
    v: Any  # like θ, float32 or wider, real: running mean of |g|²
    v_max: Any  # like θ, float32 or wider, real: the largest v so far, corrected or not


def _amsgrad(
    g: Array,
    m: Array,
    v: Array,
    v_max: Array,
    *,
    t: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    eps: Array,
    maximum_of: MaximumOf,
) -> tuple[Array, tuple[Array, Array, Array]]:
    m = ema(m, g, one_minus_b1)
    v = ema_of_squares(v, abs2(g), one_minus_b2)
    if maximum_of == "corrected":
        v_hat = v_max = jnp.maximum(v_max, debias(v, one_minus_b2, t))
    else:
        v_max = jnp.maximum(v_max, v)
        v_hat = debias(v_max, one_minus_b2, t)
    return over_root(debias(m, one_minus_b1, t), v_hat, eps, "outside"), (m, v, v_max)


@constructor
def amsgrad_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    maximum_of: MaximumOf = "corrected",
) -> Rule:
    """The direction d of `amsgrad`, before any learning rate, for chains of your own."""
    if maximum_of not in ("corrected", "uncorrected"):
        raise ValueError(f'amsgrad: maximum_of is "corrected" or "uncorrected", not {maximum_of!r}')
    return leafwise(
        _amsgrad,
        AmsgradState,
        slots={"v": real_zeros, "v_max": real_zeros},
        static={"maximum_of": maximum_of},
        b1=b1,
        b2=b2,
        eps=eps,
    )


@constructor
def amsgrad(
    learning_rate: float | Schedule = 1e-3,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    maximum_of: MaximumOf = "corrected",
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """AMSGrad (Reddi, Kale & Kumar 2018, arXiv:1904.09237, Algorithm 2, with Adam's bias corrections).

        m ← m + (1 − β₁)(g − m)          v ← v + (1 − β₂)(|g|² − v)

        "corrected":      v̂ ← max(v̂, v / (1 − β₂ᵗ))
        "uncorrected":    u ← max(u, v)          v̂ = u / (1 − β₂ᵗ)

        d = m / (1 − β₁ᵗ) / (√v̂ + ε)             θ ← θ − α (d + λ θ)

    `maximum_of="corrected"` is Optax's AMSGrad. `"uncorrected"` is PyTorch's `Adam(amsgrad=True)`, where one large
    gradient at the start, which the correction blows up, is not remembered at that size for ever. `weight_decay`,
    `where`, `decay` and `peak` are those of `descend`.

    Memory: 3 slots, 12 bytes per float32 parameter; 4 slots, 16 bytes, with `decay="initial"`.

    Differs from the paper, which corrects no bias at all; from PyTorch in the defaults of `maximum_of` and of the form
    of decay ("l2" there); from Optax in keywords: there are no `eps_root`, `mu_dtype`, `bias_correction_mu` and
    `bias_correction_nu`.
    """
    direction = amsgrad_direction(b1, b2, eps, maximum_of=maximum_of)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
