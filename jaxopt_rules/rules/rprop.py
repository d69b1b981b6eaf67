"""Rprop: a step size for each element, which grows while the gradient keeps its sign. For full batches."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.lift import leafwise
from jaxopt_rules.numerics import quotient, widened
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule


class RpropState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # learning_rate, eta_minus, eta_plus, min_step_size, max_step_size
    delta: Any  # like θ, float32 or wider: step size over learning rate, 1 at birth
    sign: Any  # shaped like θ, int8: sign of the last gradient; 0 at birth and where the last sign was turned down


def _ones(p: Any) -> Array:
    return jnp.ones_like(p, dtype=widened(p.dtype))


def _no_sign(p: Any) -> Array:
    return jnp.zeros_like(p, dtype=jnp.int8)


def _rprop(
    g: Array,
    delta: Array,
    sign: Array,
    *,
    learning_rate: Array,
    eta_minus: Array,
    eta_plus: Array,
    min_step_size: Array,
    max_step_size: Array,
) -> tuple[Array, tuple[Array, Array]]:
    new = jnp.sign(g)
    agreement = new * sign
    eta = jnp.where(agreement > 0, eta_plus, jnp.where(agreement < 0, eta_minus, 1))
    # The bounds are for what signs do to the step size, not for what a schedule does; a rate of 0 lets them do nothing.
    low = jnp.minimum(delta, quotient(min_step_size, learning_rate, otherwise=jnp.inf))
    high = jnp.maximum(delta, quotient(max_step_size, learning_rate, otherwise=0))
    delta = jnp.clip(eta * delta, low, high)
    new = jnp.where(agreement < 0, 0, new)
    return -learning_rate * delta * new, (delta, new)


@constructor
def rprop(
    learning_rate: float | Schedule,
    eta_minus: float | Schedule = 0.5,
    eta_plus: float | Schedule = 1.2,
    min_step_size: float | Schedule = 1e-6,
    max_step_size: float | Schedule = 50.0,
) -> Rule:
    """Rprop (Riedmiller & Braun 1993), in the form iRprop⁻ (Igel & Hüsken 2003, Neurocomputing 50, Algorithm 4).

        δ ← δ η⁺ where g has the sign of the last gradient, δ η⁻ where it has the other
        g ← 0 there, so that no step is taken and δ is left alone in the next update
        θ ← θ − α δ sign(g)

    δ begins at 1: the learning rate α is the initial step size, α δ the present one, which the signs keep between
    `min_step_size` and `max_step_size`. α stays live: to change it, or to give it a schedule, scales all step sizes,
    also beyond these bounds; where it has brought a step size outside, signs take it no further, and a rate of 0 leaves
    δ alone.

    For gradients of the full batch: those of mini-batches change their signs by chance. Complex gradients are refused.
    A `weight_decay` in front of it, which is L2, is the decay that fits: Rprop follows signs, not sizes.

    Memory: 1 slot, 4 bytes per float32 parameter, and 1 byte per parameter for the last sign. XLA
    keeps a copy of the signs.

    Differs from PyTorch, where the rate is read when the state is born and has no effect later, an initial step outside
    the bounds is clipped at once, and the last gradient is kept, 4 bytes; and the parts of complex numbers are numbers
    of their own. From Optax 0.2.8, whose updates are those of the call before: its first update is 0.
    """
    return leafwise(
        _rprop,
        RpropState,
        slots={"delta": _ones, "sign": _no_sign},
        place="end",
        ordered=True,
        learning_rate=learning_rate,
        eta_minus=eta_minus,
        eta_plus=eta_plus,
        min_step_size=min_step_size,
        max_step_size=max_step_size,
    )
