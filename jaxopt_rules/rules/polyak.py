"""Polyak's step: as far as the linear model of the loss would reach its minimum. Tree-level: the norm is global."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxopt_rules.lift import treewise
from jaxopt_rules.numerics import global_norm, quotient, scale
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule

Variant = Literal["sps", "sps+"]


class PolyakState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # max_learning_rate, f_min, eps; and scaling where the rule owns its rate
    metrics: dict[str, Array]  # step_size: what the gradient was multiplied by


def _polyak(
    g: Any,
    *,
    value: Array,
    max_learning_rate: Array,
    f_min: Array,
    eps: Array,
    scaling: Array | None = None,
    positive: bool,
) -> tuple[Any, dict[str, Array]]:
    """γ g, or −s γ g where there is an s."""
    gap = jnp.asarray(value, f_min.dtype) - f_min
    if positive:
        gap = jnp.maximum(gap, 0)
    gamma = jnp.minimum(quotient(gap, global_norm(g) ** 2 + eps, otherwise=0), max_learning_rate)
    gamma = gamma if scaling is None else scaling * gamma
    factor = gamma if scaling is None else -gamma
    return jax.tree.map(lambda g: scale(factor, g), g), {"step_size": gamma}


def _positive(variant: str) -> bool:
    if variant not in ("sps", "sps+"):
        raise ValueError(f'polyak_sgd: variant is "sps" or "sps+", not {variant!r}')
    return variant == "sps+"


@constructor
def polyak_direction(
    max_learning_rate: float | Schedule = 1.0,
    f_min: float | Schedule = 0.0,
    eps: float | Schedule = 0.0,
    *,
    variant: Variant = "sps",
) -> Rule:
    """The direction γ g of `polyak_sgd`, for chains of your own: `chain(polyak_direction(), step(1.0, 1e-4))`."""
    return treewise(
        _polyak,
        PolyakState,
        static={"positive": _positive(variant)},
        metrics=("step_size",),
        extra=("value",),
        max_learning_rate=max_learning_rate,
        f_min=f_min,
        eps=eps,
    )


@constructor
def polyak_sgd(
    max_learning_rate: float | Schedule = 1.0,
    scaling: float | Schedule = 1.0,
    f_min: float | Schedule = 0.0,
    eps: float | Schedule = 0.0,
    variant: Variant = "sps",
) -> Rule:
    """Gradient descent with the stochastic Polyak step (Loizou et al. 2021, arXiv:2002.10542, equation 4).

        update(grads, state, params, value=loss)

        "sps":   γ = min((f − f*) / (‖g‖² + ε), γ_max)
        "sps+":  γ = min(max(f − f*, 0) / (‖g‖² + ε), γ_max)          (Garrigos et al. 2023, arXiv:2307.14528)

        θ ← θ − s γ g

    ‖g‖ is the norm of all gradients together. f is `value`, the loss that they are the gradients of; with f* too high,
    "sps" climbs where f < f*, and "sps+" stands still. The paper's c is 1 / `scaling` where the bound γ_max is not
    reached. A zero gradient has the step 0. s γ is recorded as `step_size`.

    Args:
      max_learning_rate: γ_max.
      scaling: s.
      f_min: f*, the least loss or a bound below it: 0 for a model that can fit its data.

    Memory: none.

    Raises:
      ValueError: `variant` is unknown.
      TypeError: in `update`, `value` is missing.

    Differs from Optax, whose code computes ‖s g‖ where its formula, and this one, has ‖g‖ (the same for s = 1), and
    which makes no step where ‖g‖² + ε is below the spacing of floats at 1 (in float32 for ‖g‖ < 3e-4).
    """
    return treewise(
        _polyak,
        PolyakState,
        static={"positive": _positive(variant)},
        metrics=("step_size",),
        extra=("value",),
        place="end",
        max_learning_rate=max_learning_rate,
        scaling=scaling,
        f_min=f_min,
        eps=eps,
    )
