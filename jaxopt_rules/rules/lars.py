"""LARS: momentum of gradients with a rate for each array, relative to the norm of its parameters."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.lift import leafwise
from jaxopt_rules.numerics import norm, quotient
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector

Denominator = Literal["sum", "joint"]


class LarsState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # weight_decay, trust_coefficient, eps, momentum; learning_rate where the rule owns it
    v: Any  # like θ, float32 or wider: velocity


class _Form(NamedTuple):
    denominator: Denominator
    nesterov: bool
    rate_inside: bool = False
    trust_clip: bool = False


def _decayed(g: Array, p: Array, weight_decay: Array | None) -> Array:
    return g if weight_decay is None else g + weight_decay * p


def _ratio(
    g: Array,
    *,
    p: Array,
    weight_decay: Array | None,
    trust_coefficient: Array | None,
    eps: Array,
    form: _Form,
) -> Array | None:
    """r, which is `None` for an array without a ratio."""
    if trust_coefficient is None:
        return None
    p_norm = norm(p)
    if form.denominator == "joint":
        size = norm(_decayed(g, p, weight_decay))
    else:
        size = norm(g) if weight_decay is None else norm(g) + weight_decay * p_norm
    ratio = quotient(trust_coefficient * p_norm, jnp.where(size == 0, 0, size + eps), otherwise=1)
    return jnp.where(p_norm == 0, 1, ratio)


def _lars_direction(
    g: Array,
    v: Array,
    *,
    p: Array,
    weight_decay: Array | None,
    ratio: Array | None,
    momentum: Array,
    form: _Form,
) -> tuple[Array, tuple[Array]]:
    d = _decayed(g, p, weight_decay)
    d = d if ratio is None else ratio * d
    v = momentum * v + d
    return d + momentum * v if form.nesterov else v, (v,)


def _lars(
    g: Array,
    v: Array,
    *,
    p: Array,
    learning_rate: Array,
    weight_decay: Array | None,
    ratio: Array | None,
    momentum: Array,
    form: _Form,
) -> tuple[Array, tuple[Array]]:
    d = _decayed(g, p, weight_decay)
    if ratio is not None:
        d = (jnp.minimum(quotient(ratio, learning_rate, otherwise=1), 1) if form.trust_clip else ratio) * d
    d = learning_rate * d if form.rate_inside else d
    v = momentum * v + d
    d = d + momentum * v if form.nesterov else v
    return -d if form.rate_inside else -learning_rate * d, (v,)


def _check(denominator: str, rate: str = "inside") -> None:
    if denominator not in ("sum", "joint"):
        raise ValueError(f'lars: denominator is "sum" or "joint", not {denominator!r}')
    if rate not in ("inside", "outside"):
        raise ValueError(f'lars: rate is "inside" or "outside", not {rate!r}')


@constructor
def lars_direction(
    weight_decay: float | Schedule = 0.0,
    where: Selector | None = None,
    trust_coefficient: float | Schedule = 0.001,
    eps: float | Schedule = 0.0,
    trust_where: Selector | None = None,
    momentum: float | Schedule = 0.9,
    nesterov: bool = False,
    *,
    denominator: Denominator = "sum",
) -> Rule:
    """The velocity of `lars(rate="outside")`, before any learning rate, for chains of your own."""
    _check(denominator)
    form = _Form(denominator, nesterov)
    return leafwise(
        _lars_direction,
        LarsState,
        where={"weight_decay": where, "trust_coefficient": trust_where},
        static={"form": form},
        sums={"ratio": _ratio},
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        eps=eps,
        momentum=momentum,
    )


@constructor
def lars(
    learning_rate: float | Schedule,
    weight_decay: float | Schedule = 0.0,
    where: Selector | None = None,
    trust_coefficient: float | Schedule = 0.001,
    eps: float | Schedule = 0.0,
    trust_where: Selector | None = None,
    momentum: float | Schedule = 0.9,
    nesterov: bool = False,
    *,
    denominator: Denominator = "sum",
    rate: Literal["inside", "outside"] = "inside",
    trust_clip: bool = False,
) -> Rule:
    """LARS (You et al. 2017, arXiv:1708.03888, Algorithm 1).

        "sum":      r = τ ‖θ‖ / (‖g‖ + λ ‖θ‖ + ε)          "joint":    r = τ ‖θ‖ / (‖g + λ θ‖ + ε)

                    and 1 where ‖θ‖ or the denominator without ε is 0; norms are over each array

        "inside":   v ← μ v + α r (g + λ θ)                θ ← θ − v
        "outside":  v ← μ v + r (g + λ θ)                  θ ← θ − α v

    Args:
      where: the arrays that decay.
      trust_coefficient: τ.
      eps: ε.
      trust_where: the arrays that have a ratio, by default all; elsewhere r = 1.
      nesterov: the step is d + μ v in place of v, where d is what was added to v.
      denominator: "sum" is the paper's, "joint" Optax's.
      rate: whether the velocity contains the rate; a new α then acts on new gradients alone, as in the paper.
      trust_clip: LARC of NVIDIA apex, where an array's rate α r is at most α: r ← min(r / α, 1).

    Memory: 1 slot, 4 bytes per float32 parameter.

    Differs from Optax, which has `denominator="joint"`; from timm, which has `rate="outside"`, no ratio where λ = 0
    (`trust_where` with the selector of `where`), ε = 1e-8, and r = 1 where g alone is 0. From Optax in keywords, too:
    `weight_decay_mask=True` and `trust_ratio_mask=True` are `where=None` and `trust_where=None`. Decay has no other
    form here: for one, chain(lars_direction(), step(α, λ, decay=...)).
    """
    _check(denominator, rate)
    form = _Form(denominator, nesterov, rate == "inside", trust_clip)
    return leafwise(
        _lars,
        LarsState,
        place="end",
        where={"weight_decay": where, "trust_coefficient": trust_where},
        static={"form": form},
        sums={"ratio": _ratio},
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        eps=eps,
        momentum=momentum,
    )
