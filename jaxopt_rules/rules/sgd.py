"""Gradient descent and its momentum: the velocity without the rate (`sgd`) and with it (`momentum`)."""

from typing import Any, NamedTuple

from jax import Array

from jaxopt_rules.apply import step
from jaxopt_rules.compose import chain
from jaxopt_rules.lift import leafwise
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule


class VelocityState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # momentum
    v: Any  # like θ, float32 or wider: decaying sum of gradients


def _velocity(g: Array, v: Array, *, momentum: Array) -> tuple[Array, tuple[Array]]:
    v = momentum * v + g
    return v, (v,)


def _nesterov(g: Array, v: Array, *, momentum: Array) -> tuple[Array, tuple[Array]]:
    v = momentum * v + g
    return g + momentum * v, (v,)


@constructor
def momentum_direction(momentum: float | Schedule = 0.9, nesterov: bool = False) -> Rule:
    """The velocity of `sgd`, before any learning rate.

        v ← μ v + g          d = v, or g + μ v with `nesterov`

    Memory: 1 slot, 4 bytes per float32 parameter.
    """
    return leafwise(_nesterov if nesterov else _velocity, VelocityState, momentum=momentum)


trace = momentum_direction


@constructor
def sgd(learning_rate: float | Schedule, momentum: float | Schedule | None = None, nesterov: bool = False) -> Rule:
    """Stochastic gradient descent, with momentum (Polyak 1964) and Nesterov's form of it where asked for.

        v ← μ v + g          d = v, or g + μ v with `nesterov`          θ ← θ − α d

    Without `momentum`, d = g. The velocity does not contain the rate: a new α acts on the whole of it at once, as
    in PyTorch and Optax.

    Memory: no slot, or 1 with momentum, 4 bytes per float32 parameter.

    Differs from `momentum`, where the velocity contains the rate; at a constant rate the two are the same.
    """
    if momentum is None:
        if nesterov:
            raise ValueError("sgd: nesterov=True needs a momentum, such as momentum=0.9")
        return step(learning_rate)
    return chain(momentum_direction(momentum, nesterov), step(learning_rate))


class MomentumState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # learning_rate, momentum
    v: Any  # like θ, float32 or wider: the last update


def _momentum(g: Array, v: Array, *, learning_rate: Array, momentum: Array) -> tuple[Array, tuple[Array]]:
    v = momentum * v - learning_rate * g
    return v, (v,)


@constructor
def momentum(learning_rate: float | Schedule, momentum: float | Schedule = 0.9) -> Rule:
    """Gradient descent with momentum in the documented form, where the velocity contains the rate.

        v ← μ v − α g          θ ← θ + v

    A new α acts on new gradients alone; what is in v keeps the rate it came in with, as in TensorFlow.

    Memory: 1 slot, 4 bytes per float32 parameter.

    Differs from `sgd(learning_rate, momentum)`, PyTorch and Optax, where a new α acts on the whole velocity.
    """
    return leafwise(_momentum, MomentumState, place="end", learning_rate=learning_rate, momentum=momentum)
