"""Adamax: Adam by the largest gradient that is not yet forgotten."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import debias, ema, quotient
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class AdamaxState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, eps
    m: Any  # like θ, float32 or wider: running mean of g
    u: Any  # like θ, float32 or wider, real: the largest β₂ⁱ |g| of the gradients i updates ago


def _adamax(
    g: Array, m: Array, u: Array, *, t: Array, one_minus_b1: Array, one_minus_b2: Array, eps: Array
) -> tuple[Array, tuple[Array, Array]]:
    m = ema(m, g, one_minus_b1)
    u = jnp.maximum((1 - one_minus_b2) * u, jnp.abs(g) + eps)
    return quotient(debias(m, one_minus_b1, t), u, otherwise=0), (m, u)


@constructor
def adamax_direction(b1: float | Schedule = 0.9, b2: float | Schedule = 0.999, eps: float | Schedule = 1e-8) -> Rule:
    """The direction d of `adamax`, before any learning rate, for chains of your own."""
    return leafwise(_adamax, AdamaxState, slots={"u": real_zeros}, b1=b1, b2=b2, eps=eps)


@constructor
def adamax(
    learning_rate: float | Schedule = 2e-3,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Adamax (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 2).

        m ← m + (1 − β₁)(g − m)          u ← max(β₂ u, |g| + ε)
        θ ← θ − α (m / (1 − β₁ᵗ) / u + λ θ)

    ε stands where PyTorch and Optax have it. `eps=0` is the paper, and no division by zero: what has had no gradient
    but zeros does not move. `weight_decay`, `where`, `decay` and `peak` are those of `descend`.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`.

    Differs from Keras, which adds ε to u in the quotient; from PyTorch in the default form of decay ("l2" there).
    """
    return descend(adamax_direction(b1, b2, eps), learning_rate, weight_decay, where, decay=decay, peak=peak)


@constructor
def adamaxw(
    learning_rate: float | Schedule = 2e-3,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    weight_decay: float | Schedule | None = 1e-4,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Adamax with decoupled weight decay by default (Loshchilov & Hutter 2019, arXiv:1711.05101), as in Optax.

        θ ← θ − α (d + λ θ)          d as in `adamax`

    This is `adamax(..., weight_decay=1e-4)`. `weight_decay`, `where`, `decay` and `peak` are those of `descend`.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`.

    Differs from Optax in keywords: `mask` is `where`.
    """
    return adamax(learning_rate, b1, b2, eps, weight_decay=weight_decay, where=where, decay=decay, peak=peak)
