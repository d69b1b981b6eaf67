"""NovoGrad: momentum of gradients that are divided by a running norm of their array."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.compose import chain
from jaxopt_rules.descend import descend
from jaxopt_rules.hooks import weight_decay as added_decay
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import abs2, ema, ema_of_squares, quotient, sqrt
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class NovogradState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b2, eps
    v: Any  # ()  per parameter, float32 or wider, real: running mean of ‖g‖², which begins with the first


def _novograd(g: Array, v: Array, *, one_minus_b2: Array, eps: Array) -> tuple[Array, tuple[Array]]:
    squared = jnp.sum(abs2(g))
    v = jnp.where(v == 0, squared, ema_of_squares(v, squared, one_minus_b2))
    return quotient(1, sqrt(v) + eps, otherwise=0) * g, (v,)


def _scalar(p: Any) -> Array:
    # A sum, and no new array: it lives on the mesh of the parameter.
    return jnp.sum(real_zeros(p))


class NovogradMomentumState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1
    m: Any  # like θ, float32 or wider: decaying sum, or mean, of the normalized gradients


def _sum(g: Array, m: Array, *, one_minus_b1: Array) -> tuple[Array, tuple[Array]]:
    m = (1 - one_minus_b1) * m + g
    return m, (m,)


def _mean(g: Array, m: Array, *, one_minus_b1: Array) -> tuple[Array, tuple[Array]]:
    m = ema(m, g, one_minus_b1)
    return m, (m,)


@constructor
def novograd_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.25,
    eps: float | Schedule = 1e-6,
    *,
    grad_averaging: bool = False,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
) -> Rule:
    """The direction d of `novograd`, decay inside, before any learning rate, for chains of your own."""
    normalized = leafwise(_novograd, NovogradState, slots={"v": _scalar}, b2=b2, eps=eps)
    decayed = [] if weight_decay is None else [added_decay(weight_decay, where)]
    gathered = leafwise(_mean if grad_averaging else _sum, NovogradMomentumState, b1=b1)
    return chain(normalized, *decayed, gathered)


@constructor
def novograd(
    learning_rate: float | Schedule,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.25,
    eps: float | Schedule = 1e-6,
    *,
    grad_averaging: bool = False,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2", "inside"] = "inside",
    peak: float | Schedule | None = None,
) -> Rule:
    """NovoGrad (Ginsburg et al. 2019, arXiv:1905.11286, Algorithm 1).

        v ← ‖g‖² at first, then v + (1 − β₂)(‖g‖² − v)          a number for each array

        m ← β₁ m + c (g / (√v + ε) + λ θ)                        c = 1, or 1 − β₁ with `grad_averaging`

        θ ← θ − α m

    `weight_decay`, `where`, `decay` and `peak` are those of `descend`; by default decay is "inside" the momentum, as
    above.

    Memory: 1 slot, 4 bytes per float32 parameter, and a number per array; 2 slots, 8 bytes, with `decay="initial"`.

    Differs from Optax, and agrees with timm, where the first gradient of an array is 0: v begins with the first that is
    not; from Optax in keywords: there is no `eps_root`; from timm in the defaults, β = (0.95, 0.98) and ε = 1e-8 there.
    """
    if decay != "inside":
        direction = novograd_direction(b1, b2, eps, grad_averaging=grad_averaging)
        return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
    direction = novograd_direction(b1, b2, eps, grad_averaging=grad_averaging, weight_decay=weight_decay, where=where)
    return descend(direction, learning_rate, peak=peak)
