"""Gradient descent and its momentum: the velocity without the rate (`sgd`) and with it (`momentum`)."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.apply import Decay, step
from jaxopt_rules.compose import chain, identity
from jaxopt_rules.descend import descend
from jaxopt_rules.hooks import add_noise
from jaxopt_rules.hooks import weight_decay as l2
from jaxopt_rules.lift import leafwise
from jaxopt_rules.numerics import ema
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector

Form = Literal["pytorch", "tensorflow", "ema"]


class VelocityState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # momentum, or one_minus_momentum of the form "ema"; one_minus_dampening where there is one
    v: Any  # like θ, float32 or wider: decaying sum of gradients; of the form "ema", their running mean


def _velocity(g: Array, v: Array, *, momentum: Array, nesterov: bool = False) -> tuple[Array, tuple[Array]]:
    v = momentum * v + g
    return g + momentum * v if nesterov else v, (v,)


def _dampened(
    g: Array, v: Array, *, t: Array, momentum: Array, one_minus_dampening: Array
) -> tuple[Array, tuple[Array]]:
    v = momentum * v + jnp.where(t == 1, 1, one_minus_dampening) * g
    return v, (v,)


def _mean(g: Array, v: Array, *, one_minus_momentum: Array, nesterov: bool) -> tuple[Array, tuple[Array]]:
    v = ema(v, g, one_minus_momentum)
    return ema(v, g, one_minus_momentum) if nesterov else v, (v,)


@constructor
def momentum_direction(
    momentum: float | Schedule = 0.9,
    nesterov: bool = False,
    *,
    form: Literal["pytorch", "ema"] = "pytorch",
    dampening: float | Schedule | None = None,
) -> Rule:
    """The velocity of `sgd`, before any learning rate.

        v ← μ v + g          d = v, or g + μ v with `nesterov`

    `form` and `dampening` are those of `sgd`. Of its forms "tensorflow" is none of a direction: there the velocity
    contains the rate.

    Memory: 1 slot, 4 bytes per float32 parameter.

    Raises:
      ValueError: `form` is unknown, or `dampening` stands beside the form "ema" or `nesterov`.
    """
    if form not in ("pytorch", "ema"):
        raise ValueError(f'momentum_direction: form is "pytorch" or "ema", not {form!r}')
    if dampening is not None:
        if form == "ema" or nesterov:
            raise ValueError('sgd: dampening is for form="pytorch" without nesterov, as in PyTorch')
        return leafwise(_dampened, VelocityState, momentum=momentum, dampening=dampening)
    leaf = _mean if form == "ema" else _velocity
    return leafwise(leaf, VelocityState, static={"nesterov": bool(nesterov)}, momentum=momentum)


trace = momentum_direction


@constructor
def sgd(
    learning_rate: float | Schedule,
    momentum: float | Schedule | None = None,
    nesterov: bool = False,
    *,
    form: Form = "pytorch",
    dampening: float | Schedule | None = None,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Stochastic gradient descent, with momentum (Polyak 1964) and Nesterov's form of it where asked for.

        v ← μ v + g          d = v, or g + μ v with `nesterov`          θ ← θ − α d

    Without `momentum`, d = g. The velocity does not contain the rate: a new α acts on the whole of it at once, as
    in PyTorch and Optax. `form` chooses among what the field calls momentum:

        form=           velocity                    step                     with `nesterov`           shipped as
        "pytorch"       v ← μ v + g                 θ ← θ − α v              θ ← θ − α (g + μ v)       PyTorch, Optax
        "tensorflow"    v ← μ v − α g               θ ← θ + v                θ ← θ + μ v − α g         TensorFlow, Keras
        "ema"           v ← μ v + (1 − μ) g         θ ← θ − α v              θ ← θ − α (μ v + (1 − μ) g)
                                                                             Muon; optimi `dampening=True`

    At constant α and μ, "pytorch" and "tensorflow" are the same; so is, without decay, "ema" with the rate α / (1 − μ).

    `weight_decay`, `where`, `decay` and `peak` are those of `descend`. Under "tensorflow" decay stays outside the
    velocity, θ ← θ + v − α λ θ, as in Keras; it has `decay="decoupled"` and `"l2"` alone.

    Args:
      dampening: τ of PyTorch: v ← μ v + (1 − τ) g, but v ← g in the first update. For "pytorch" without `nesterov`.

    Memory: no slot, or 1 with momentum, 4 bytes per float32 parameter; one more with `decay="initial"`.

    Raises:
      ValueError: what is said of a momentum has none, `form` is unknown, or it has no such `dampening` or `decay`.

    Differs from `momentum`, where the velocity contains the rate; at a constant rate the two are the same. From PyTorch
    with `dampening` for a parameter without a gradient in the first update: the first that it has later is dampened;
    and in the default form of decay ("l2" there). From Optax in keywords: there is no `accumulator_dtype`.
    """
    if form not in ("pytorch", "tensorflow", "ema"):
        raise ValueError(f'sgd: form is "pytorch", "tensorflow" or "ema", not {form!r}')
    if momentum is None:
        given = {"nesterov=True": nesterov, f'form="{form}"': form != "pytorch", "dampening": dampening is not None}
        for name in (name for name, present in given.items() if present):
            raise ValueError(f"sgd: {name} needs a momentum, such as momentum=0.9")
        if decay == "l2":
            return descend(identity(), learning_rate, weight_decay, where, decay=decay, peak=peak)
        return step(learning_rate, weight_decay, where, decay=decay, peak=peak)
    if form == "tensorflow":
        if dampening is not None:
            raise ValueError('sgd: dampening is for form="pytorch" without nesterov, as in PyTorch')
        return descend_inside(identity(), learning_rate, momentum, nesterov, weight_decay, where, decay, peak)
    direction = momentum_direction(momentum, nesterov, form=form, dampening=dampening)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)


@constructor
def noisy_sgd(
    learning_rate: float | Schedule,
    eta: float | Schedule = 0.01,
    gamma: float | Schedule = 0.55,
    key: int | Array = 0,
    *,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Gradient descent with Gaussian noise that fades (Neelakantan et al. 2015, arXiv:1511.06807).

        θ ← θ − α (g + σ N(0, 1))          σ² = η / (1 + count)^γ

    What `add_noise` says of the noise and of `key` holds here. `weight_decay`, `where`, `decay` and `peak` are those of
    `descend`.

    Memory: one key; 1 slot, 4 bytes per float32 parameter, with `decay="initial"`.

    Differs from Optax in the random numbers alone: the variance has the same law. So no oracle can tell its steps.
    """
    return descend(add_noise(eta, gamma, key), learning_rate, weight_decay, where, decay=decay, peak=peak)


class MomentumState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # learning_rate, momentum; weight_decay where there is decay
    v: Any  # like θ, float32 or wider: decaying sum of −α g, which without Nesterov and decay is the last update


def _momentum(
    g: Array, v: Array, *, learning_rate: Array, momentum: Array, nesterov: bool
) -> tuple[Array, tuple[Array]]:
    v = momentum * v - learning_rate * g
    return momentum * v - learning_rate * g if nesterov else v, (v,)


def _decayed_momentum(
    g: Array,
    v: Array,
    *,
    p: Array,
    learning_rate: Array,
    momentum: Array,
    weight_decay: Array | None,
    nesterov: bool,
) -> tuple[Array, tuple[Array]]:
    u, slots = _momentum(g, v, learning_rate=learning_rate, momentum=momentum, nesterov=nesterov)
    return u if weight_decay is None else u - learning_rate * weight_decay * p, slots


def descend_inside(
    direction: Rule,
    learning_rate: float | Schedule,
    momentum: float | Schedule,
    nesterov: bool,
    weight_decay: float | Schedule | None,
    where: Selector | None,
    decay: str,
    peak: float | Schedule | None,
) -> Rule:
    """`descend` with a velocity that contains the rate: v ← μ v − α d, θ ← θ + v.

    Raises:
      ValueError: the form of decay is another than "decoupled" and "l2", or has no `weight_decay`.
    """
    if decay not in ("decoupled", "l2") or peak is not None:
        raise ValueError(
            'form="tensorflow" has decay="decoupled" and decay="l2" alone, without peak; '
            "other forms of decay need a velocity without the rate"
        )
    if decay == "l2" and weight_decay is None:
        raise ValueError('form="tensorflow" with decay="l2" needs weight_decay=..., such as 0.1')
    static = {"nesterov": bool(nesterov)}
    if decay == "l2" or weight_decay is None:
        in_front = [] if weight_decay is None else [l2(weight_decay, where)]
        end = leafwise(
            _momentum, MomentumState, place="end", static=static, learning_rate=learning_rate, momentum=momentum
        )
        return chain(*in_front, direction, end)
    end = leafwise(
        _decayed_momentum,
        MomentumState,
        place="end",
        static=static,
        where={"weight_decay": where},
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return chain(direction, end)


@constructor
def momentum(learning_rate: float | Schedule, momentum: float | Schedule = 0.9) -> Rule:
    """Gradient descent with momentum (Polyak 1964) whose velocity contains the rate, as in the class `Momentum`.

        v ← μ v − α g          θ ← θ + v

    A new α acts on new gradients alone; what is in v keeps the rate it came in with, as in TensorFlow.

    It needs no oracle of its own: `sgd(learning_rate, momentum, form="tensorflow")` gives the same numbers, and has
    one.

    Memory: 1 slot, 4 bytes per float32 parameter.

    Differs from `sgd(learning_rate, momentum)`, PyTorch and Optax, where a new α acts on the whole velocity.
    """
    return leafwise(
        _momentum,
        MomentumState,
        place="end",
        static={"nesterov": False},
        learning_rate=learning_rate,
        momentum=momentum,
    )
