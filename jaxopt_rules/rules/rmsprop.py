"""RMSProp: a direction from the running mean of squared gradients, or from their running variance."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jaxopt_rules.apply import Decay
from jaxopt_rules.compose import chain
from jaxopt_rules.descend import descend
from jaxopt_rules.hyperparameters import check
from jaxopt_rules.lift import leafwise
from jaxopt_rules.numerics import Epsilon, abs2, check_epsilon, ema, ema_of_squares, over_root, quotient, real, widened
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.rules.sgd import Form, descend_inside, momentum_direction
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class RmspropState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_rho, eps
    v: Any  # like θ, float32 or wider, real: running mean of |g|²


class CenteredRmspropState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_rho, eps
    m: Any  # like θ, float32 or wider: running mean of g
    s: Any  # like θ, float32 or wider, real: running variance of g


def _filled(p: Any, initial_scale: float) -> Array:
    return jnp.full_like(p, initial_scale, dtype=real(widened(p.dtype)))


def _rmsprop(
    g: Array, v: Array, *, one_minus_rho: Array, eps: Array, eps_placement: Epsilon
) -> tuple[Array, tuple[Array]]:
    v = ema_of_squares(v, abs2(g), one_minus_rho)
    return over_root(g, v, eps, eps_placement), (v,)


def _centered(
    g: Array, m: Array, s: Array, *, one_minus_rho: Array, eps: Array, eps_placement: Epsilon
) -> tuple[Array, tuple[Array, Array]]:
    m = ema(m, g, one_minus_rho)
    # What v − |m|² becomes when both means take in g, without the difference, which rounding can make negative.
    # By the new m, since XLA would copy the old one for a second reader. Of one gradient, ρ = 0, the variance is 0.
    rho = 1 - one_minus_rho
    s = rho * s + quotient(one_minus_rho, rho, otherwise=0) * abs2(g - m)
    return over_root(g, s, eps, eps_placement), (m, s)


@constructor
def rmsprop_direction(
    rho: float | Schedule = 0.9,
    eps: float | Schedule = 1e-8,
    initial_scale: float = 0.0,
    *,
    eps_placement: Epsilon = "inside",
    centered: bool = False,
) -> Rule:
    """The direction d of `rmsprop`, before momentum and any learning rate, for chains of your own."""
    check_epsilon(eps_placement)
    if callable(initial_scale) or isinstance(initial_scale, Tracer):
        raise TypeError("rmsprop: initial_scale is a number, what v is born with; no schedule, and not traced")
    check("initial_scale", initial_scale)
    static = {"eps_placement": eps_placement, "initial_scale": float(initial_scale)}
    if centered:
        return leafwise(_centered, CenteredRmspropState, slots={"s": _filled}, static=static, rho=rho, eps=eps)
    return leafwise(_rmsprop, RmspropState, slots={"v": _filled}, static=static, rho=rho, eps=eps)


@constructor
def rmsprop(
    learning_rate: float | Schedule,
    rho: float | Schedule = 0.9,
    eps: float | Schedule = 1e-8,
    initial_scale: float = 0.0,
    *,
    eps_placement: Epsilon = "inside",
    centered: bool = False,
    momentum: float | Schedule | None = None,
    nesterov: bool = False,
    form: Form = "tensorflow",
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """RMSProp (Hinton 2012, lecture 6e), also centered (Graves 2013, arXiv:1308.0850, equations 38 to 45).

        v ← ρ v + (1 − ρ) |g|²          m ← ρ m + (1 − ρ) g          s = v, or v − |m|² with `centered`
        (v − |m|² is kept as s ← ρ s + (1 − ρ) / ρ |g − m|², which it is, with the new m)

        "inside":   d = g / √(s + ε)             Graves; TensorFlow, Keras, Optax, timm
        "outside":  d = g / (√s + ε)             PyTorch

        θ ← θ − α d, or by way of the velocity of `sgd`, with d in place of g, where there is a `momentum`

    `form` says which velocity, by the names of `sgd`. Libraries differ in all of this; these are their defaults:

        rmsprop(α, 0.9, 1e-8)                                                             # Optax
        rmsprop(α, 0.99, 1e-8, eps_placement="outside", form="pytorch")                   # PyTorch
        rmsprop(α, 0.9, 1e-10, 1.0)                                                       # TensorFlow 1, timm
        rmsprop(α, 0.9, 1e-7)                                                             # Keras
        rmsprop(α, 0.95, 1e-4, centered=True, momentum=0.9)                               # Graves

    `weight_decay`, `where`, `decay` and `peak` are those of `descend`. A momentum of the form "tensorflow" has the
    decay of `sgd(form="tensorflow")`.

    Args:
      initial_scale: what v is born with; it has no effect later, and is no hyperparameter.
      eps_placement: one of those of `over_root`; without a bias correction "hat" is "outside".

    Memory: 1 slot, 4 bytes per float32 parameter; 1 more each with `centered`, `momentum` and `decay="initial"`.

    Raises:
      ValueError: `nesterov` has no momentum, or `eps_placement`, `form` or `decay` is unknown.

    Differs from Optax in names: ρ is `decay` there, and `eps_in_sqrt` tells "inside" from "outside"; its
    `bias_correction=True` is `adam(b1=0, eps_placement="inside")`. From PyTorch in the default form of decay ("l2"
    there). From all others with `centered` in that the slot holds s, not v, and so keeps its digits where s is much
    smaller than v, where the others' difference can be negative and its root NaN.
    """
    if not isinstance(decay, str):
        raise ValueError(f"rmsprop: decay is a form of weight decay, not {decay!r}; the decay rate of v is rho")
    if form not in ("pytorch", "tensorflow", "ema"):
        raise ValueError(f'rmsprop: form is "pytorch", "tensorflow" or "ema", not {form!r}')
    direction = rmsprop_direction(rho, eps, initial_scale, eps_placement=eps_placement, centered=centered)
    if momentum is None:
        if nesterov:
            raise ValueError("rmsprop: nesterov=True needs a momentum, such as momentum=0.9")
        return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
    if form == "tensorflow":
        return descend_inside(direction, learning_rate, momentum, nesterov, weight_decay, where, decay, peak)
    direction = chain(direction, momentum_direction(momentum, nesterov, form=form))
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
