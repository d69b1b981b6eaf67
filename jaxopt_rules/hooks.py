"""Hooks: rules from gradient to gradient, for the places in front of a direction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxopt_rules import numerics
from jaxopt_rules.lift import leafwise, treewise
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class WeightDecayState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # weight_decay


def _weight_decay(g: Array, *, p: Array, weight_decay: Array | None) -> Array:
    return g if weight_decay is None else g + weight_decay * p


@constructor
def weight_decay(rate: float | Schedule, where: Selector | None = None) -> Rule:
    """L2 regularisation: adds the gradient of ½ λ ‖θ‖² to the gradient.

        g ← g + λ θ

    In front of an adaptive direction the decay is divided by the root of v like the rest of the gradient;
    the decay of `step` and `adamw` is decoupled from it. `where` selects the leaves that decay; the
    hyperparameter is called `weight_decay`, and may be negative.

    Memory: none.
    """
    return leafwise(_weight_decay, WeightDecayState, where={"weight_decay": where}, weight_decay=rate)


class ClipState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # max_norm
    metrics: dict[str, Array]  # grad_norm: ()  the norm before clipping


def _clip_by_global_norm(grads: Any, *, max_norm: Array) -> tuple[Any, dict[str, Array]]:
    norm = numerics.global_norm(grads)
    factor = jnp.minimum(1, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: numerics.scale(factor, g), grads), {"grad_norm": norm}


@constructor
def clip_by_global_norm(max_norm: float | Schedule) -> Rule:
    """Scales all gradients by one factor so that their global norm stays below `max_norm`.

        n = √(Σ |g|²)          g ← g · min(1, c / (n + 1e-6))

    The sum runs over all gradients that take part, in float32 or wider. n is recorded as `grad_norm` in
    `metrics(state)`. As documented for `ClipGrad` and as in PyTorch's `clip_grad_norm_`: a norm of exactly c is
    scaled too, by c / (c + 1e-6). A non-finite norm propagates: an infinite gradient becomes NaN and makes the
    others 0, a NaN makes all of them NaN. max_norm = 0 makes every gradient 0, max_norm = ∞ clips nothing. In float32
    the norm is infinite already where the sum of squares is, from gradients of 1.8e19 on.

    Memory: none.

    Differs from Optax, which leaves a norm of exactly c alone and divides every element.
    """
    return treewise(_clip_by_global_norm, ClipState, metrics=("grad_norm",), max_norm=max_norm)


clip_grad = clip_by_global_norm
