"""SM3: Adagrad whose memory is one number for each row and each column."""

from functools import reduce
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import abs2, ema, quotient, sqrt
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class Sm3State(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # eps
    mu: Any  # for each axis of θ, float32 or wider, real: the largest ν in each slice, with length 1 elsewhere


class Sm3MomentumState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_momentum, eps
    mu: Any  # as in Sm3State
    m: Any  # like θ, float32 or wider: running mean of g / √ν


def _cover(ndim: int) -> list[tuple[int, ...]]:
    """The sets S of the paper: slices by each axis, given as the other axes; of vectors and scalars, the elements."""
    return [tuple(other for other in range(ndim) if other != axis) for axis in range(ndim)] or [()]


def _accumulators(p: Any) -> tuple[Array, ...]:
    zero = real_zeros(p)
    return tuple(jnp.sum(zero, axes, keepdims=True) for axes in _cover(p.ndim))


def _sm3(g: Array, mu: tuple[Array, ...], *, eps: Array) -> tuple[Array, tuple[tuple[Array, ...]]]:
    # By number: what `nnx.Optimizer` brings back is no tuple, but has its keys.
    nu = reduce(jnp.minimum, [mu[k] for k in range(len(mu))]) + abs2(g)
    mu = tuple(jnp.max(nu, axes, keepdims=True, initial=0) for axes in _cover(g.ndim))
    return quotient(g, sqrt(nu + eps), otherwise=0), (mu,)


def _sm3_momentum(
    g: Array, mu: tuple[Array, ...], m: Array, *, one_minus_momentum: Array, eps: Array
) -> tuple[Array, tuple[tuple[Array, ...], Array]]:
    d, (mu,) = _sm3(g, mu, eps=eps)
    m = ema(m, d, one_minus_momentum)
    return m, (mu, m)


@constructor
def sm3_direction(momentum: float | Schedule | None = 0.9, *, eps: float | Schedule = 0.0) -> Rule:
    """The direction m of `sm3`, before any learning rate, for chains of your own."""
    slots = {"mu": _accumulators}
    if momentum is None:
        return leafwise(_sm3, Sm3State, slots=slots, eps=eps)
    return leafwise(_sm3_momentum, Sm3MomentumState, slots=slots, momentum=momentum, eps=eps)


@constructor
def sm3(
    learning_rate: float | Schedule,
    momentum: float | Schedule | None = 0.9,
    *,
    eps: float | Schedule = 0.0,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """SM3-II, memory-efficient Adagrad (Anil et al. 2019, arXiv:1901.11150, Algorithm SM3-II).

        ν ← min over axes (μ_axis) + |g|²          μ_axis ← max over the other axes (ν)
        m ← m + (1 − β)(g / √(ν + ε) − m)          θ ← θ − α m          0 / 0 = 0

    β is `momentum`; with `None`, m = g / √(ν + ε). For vectors and scalars it is Adagrad. ν never falls below the sum
    of |g|², so that steps shrink for ever: the paper warms the rate up, and does not lower it. As in the authors' code
    the momentum is the running mean of the scaled gradients, not corrected for its start at 0. `weight_decay`, `where`,
    `decay` and `peak` are those of `descend`.

    Memory: for an array of m rows and n columns 4 (m + n) bytes, of more axes 4 bytes for each index of each; with
    momentum 1 slot, 4 bytes per float32 parameter, besides; 1 more with `decay="initial"`. During the update XLA keeps
    ν.

    Differs from Optax, which has ε = 1e-8 and no schedules, scalars or complex numbers; from pytorch_optimizer, which
    has ε = 1e-30 and no momentum by default.
    """
    return descend(sm3_direction(momentum, eps=eps), learning_rate, weight_decay, where, decay=decay, peak=peak)
