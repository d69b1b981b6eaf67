"""The terminal: where a direction becomes an update. Sign, learning rate and decoupled decay have their home here."""

from typing import Any, NamedTuple

from jax import Array

from jaxopt_rules.lift import leafwise
from jaxopt_rules.rule import Definition, Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class StepState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # learning_rate, and weight_decay where there is decay


def _step(d: Array, *, learning_rate: Array) -> Array:
    return -learning_rate * d


def _decaying_step(d: Array, *, p: Array, learning_rate: Array, weight_decay: Array | None) -> Array:
    if weight_decay is not None:
        d = d + weight_decay * p
    return -learning_rate * d


@constructor
def step(
    learning_rate: float | Schedule,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
) -> Rule | Definition:
    """Turns a direction d into an update: the last member of a chain.

        θ ← θ − α (d + λ θ)

    Decay is decoupled (Loshchilov & Hutter 2019, arXiv:1711.05101) and multiplied by the learning rate α, as in
    PyTorch and Optax. Without `weight_decay` the rule has no λ and does not read the parameters; with
    `weight_decay=0.0` it has one, which can be set later. `where` selects the leaves that decay.

    Memory: none.

    Differs from the paper, whose decay is not multiplied by α.
    """
    if weight_decay is None:
        return leafwise(_step, StepState, terminal=True, learning_rate=learning_rate)
    return leafwise(
        _decaying_step,
        StepState,
        terminal=True,
        where={"weight_decay": where},
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )
