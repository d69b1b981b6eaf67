"""AdEMAMix: Adam with a second, slow mean of the gradient."""

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


class AdemamixState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, one_minus_b3, alpha, eps; warmup where there is one
    m1: Any  # like θ, float32 or wider: fast running mean of g
    m2: Any  # like θ, float32 or wider: slow running mean of g
    v: Any  # like θ, float32 or wider, real: running mean of |g|²


def _ademamix(
    g: Array,
    m1: Array,
    m2: Array,
    v: Array,
    *,
    t: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    one_minus_b3: Array,
    alpha: Array,
    eps: Array,
    warmup: Array | None = None,
) -> tuple[Array, tuple[Array, Array, Array]]:
    if warmup is not None:
        s = jnp.minimum(t / warmup, 1)
        # By logarithms of 1 − β, so that 1 − β₃ keeps its digits.
        inverse_log = (1 - s) / jnp.log1p(-one_minus_b1) + s / jnp.log1p(-one_minus_b3)
        one_minus_b3 = -jnp.expm1(1 / inverse_log)
        alpha = s * alpha
    m1 = ema(m1, g, one_minus_b1)
    m2 = ema(m2, g, one_minus_b3)
    v = ema_of_squares(v, abs2(g), one_minus_b2)
    d = over_root(debias(m1, one_minus_b1, t) + alpha * m2, debias(v, one_minus_b2, t), eps, "outside")
    return d, (m1, m2, v)


@constructor
def ademamix_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    b3: float | Schedule = 0.9999,
    alpha: float | Schedule = 5.0,
    eps: float | Schedule = 1e-8,
    *,
    warmup: int | Schedule | None = None,
) -> Rule:
    """The direction d of `ademamix`, before any learning rate, for chains of your own."""
    return leafwise(
        _ademamix,
        AdemamixState,
        slots={"v": real_zeros},
        b1=b1,
        b2=b2,
        b3=b3,
        alpha=alpha,
        eps=eps,
        warmup=warmup,
    )


@constructor
def ademamix(
    learning_rate: float | Schedule,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    b3: float | Schedule = 0.9999,
    alpha: float | Schedule = 5.0,
    eps: float | Schedule = 1e-8,
    *,
    warmup: int | Schedule | None = None,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137, Algorithm 1).

        m₁ ← m₁ + (1 − β₁)(g − m₁)          m₂ ← m₂ + (1 − β₃)(g − m₂)          v ← v + (1 − β₂)(|g|² − v)

        d = (m₁ / (1 − β₁ᵗ) + a m₂) / (√(v / (1 − β₂ᵗ)) + ε)

        θ ← θ − α (d + λ θ)

    a is `alpha`; α is the learning rate. m₂ begins at 0 and is not corrected for it. With `warmup` of T updates (the
    paper's T_α = T_β₃, usually the length of the training), where s = min(t / T, 1),

        a(t) = s a          1 / ln β₃(t) = (1 − s) / ln β₁ + s / ln β₃

    so that the half-life of m₂ grows linearly from that of m₁. Without it a and β₃ are what they are set to: numbers,
    or schedules of your own, which count from 0. `weight_decay`, `where`, `decay` and `peak` are those of `descend`.

    Memory: 3 slots, 12 bytes per float32 parameter; 4 slots, 16 bytes, with `decay="initial"`.

    Differs from the authors' code in the schedule of β₃, where that adds 1e-8 to β: its last values before T are off by
    1e-4 of 1 − β₃; and in the default a, 2 in the authors' PyTorch code, 5 in their Optax code, in Optax and here. From
    Optax in keywords: `mask` is `where`, and there are no `eps_root` and `mu_dtype`.
    """
    direction = ademamix_direction(b1, b2, b3, alpha, eps, warmup=warmup)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
