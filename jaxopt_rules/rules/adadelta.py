"""Adadelta: steps in the units of the parameters, from running means of squared gradients and of squared steps."""

from typing import Any, Literal, NamedTuple

from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import abs2, ema_of_squares, over_root, sqrt
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class AdadeltaState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_rho, eps
    v: Any  # like θ, float32 or wider, real: running mean of |g|²
    u: Any  # like θ, float32 or wider, real: running mean of |d|²


def _adadelta(g: Array, v: Array, u: Array, *, one_minus_rho: Array, eps: Array) -> tuple[Array, tuple[Array, Array]]:
    v = ema_of_squares(v, abs2(g), one_minus_rho)
    d = over_root(sqrt(u + eps) * g, v, eps, "inside")
    # |d|² without its roots, which XLA would keep for both.
    u = ema_of_squares(u, (u + eps) * abs2(g) / (v + eps), one_minus_rho)
    return d, (v, u)


@constructor
def adadelta_direction(rho: float | Schedule = 0.9, eps: float | Schedule = 1e-6) -> Rule:
    """The direction d of `adadelta`, before any learning rate, for chains of your own."""
    return leafwise(_adadelta, AdadeltaState, slots={"v": real_zeros, "u": real_zeros}, rho=rho, eps=eps)


@constructor
def adadelta(
    learning_rate: float | Schedule = 1.0,
    rho: float | Schedule = 0.9,
    eps: float | Schedule = 1e-6,
    *,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Adadelta (Zeiler 2012, arXiv:1212.5701, Algorithm 1).

        v ← ρ v + (1 − ρ) |g|²          d = √(u + ε) / √(v + ε) · g          u ← ρ u + (1 − ρ) |d|²

        θ ← θ − α d

    The paper has no rate, α = 1. ε also decides how large the first steps are: √ε. `weight_decay`, `where`, `decay` and
    `peak` are those of `descend`.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`. XLA keeps a copy of
    u, since d needs it as it was before.

    Differs from TensorFlow in the default rate (0.001 there). From Optax and PyTorch in the default form of decay ("l2"
    there). From Optax in keywords, too: `weight_decay_mask` is `where`, and without a rate it gives d, which climbs
    when it is added. For complex gradients Optax averages their squares, not |g|², and PyTorch treats the parts of
    complex numbers as numbers of their own.
    """
    return descend(adadelta_direction(rho, eps), learning_rate, weight_decay, where, decay=decay, peak=peak)
