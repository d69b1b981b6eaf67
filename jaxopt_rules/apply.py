"""The terminal: where a direction becomes an update. Sign, learning rate and decoupled decay have their home here."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.lift import copied, leafwise
from jaxopt_rules.rule import Definition, Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector

Decay = Literal["decoupled", "independent", "corrected", "cautious", "proximal", "initial"]


class StepState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # learning_rate; weight_decay where there is decay, and peak where that is relative to it


def _step(d: Array, *, learning_rate: Array) -> Array:
    return -learning_rate * d


def _decoupled(d: Array, *, p: Array, learning_rate: Array, weight_decay: Array | None) -> Array:
    if weight_decay is not None:
        d = d + weight_decay * p
    return -learning_rate * d


def _independent(d: Array, *, p: Array, learning_rate: Array, weight_decay: Array | None, peak: Array) -> Array:
    u = -learning_rate * d
    return u if weight_decay is None else u - learning_rate / peak * weight_decay * p


def _corrected(d: Array, *, p: Array, learning_rate: Array, weight_decay: Array | None, peak: Array) -> Array:
    if weight_decay is not None:
        d = d + learning_rate / peak * weight_decay * p
    return -learning_rate * d


def _cautious(d: Array, *, p: Array, learning_rate: Array, weight_decay: Array | None) -> Array:
    u = -learning_rate * d
    if weight_decay is None:
        return u
    # By the sign of u, not of d: XLA recomputes a product for both readers, but would keep Adam's quotient in memory.
    return u - jnp.where((u * p.conj()).real <= 0, learning_rate * weight_decay * p, 0)


def _proximal(d: Array, *, p: Array, learning_rate: Array, weight_decay: Array | None) -> Array:
    if weight_decay is None:
        return -learning_rate * d
    return -learning_rate / (1 + learning_rate * weight_decay) * (d + weight_decay * p)


class InitialStepState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # learning_rate, weight_decay
    start: Any  # like θ, float32 or wider: θ when `init` ran


def _initial(
    d: Array, start: Array, *, p: Array, learning_rate: Array, weight_decay: Array | None
) -> tuple[Array, tuple[Array]]:
    if weight_decay is not None:
        d = d + weight_decay * (p - start)
    return -learning_rate * d, (start,)


_LEAVES = {
    "decoupled": _decoupled,
    "independent": _independent,
    "corrected": _corrected,
    "cautious": _cautious,
    "proximal": _proximal,
    "initial": _initial,
}


@constructor
def step(
    learning_rate: float | Schedule,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    *,
    decay: Decay = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule | Definition:
    """Turns a direction d into an update: the last member of a chain.

        θ ← θ − α (d + λ θ)

    Without `weight_decay` the rule has no λ and does not read the parameters; with `weight_decay=0.0` it has one, which
    can be set later. `where` selects the leaves that decay. What decay does is one of these:

        decay=           update                                  shipped as
        "decoupled"      θ ← θ − α (d + λ θ)                     PyTorch, Optax, timm, Lion, Muon
        "independent"    θ ← θ − α d − (α / α_max) λ θ           arXiv:1711.05101 as written (its η is α / α_max);
                                                                 optimi `decouple_lr`, Composer, FlashOptim
        "corrected"      θ ← θ − α (d + (α / α_max) λ θ)         AdamC, arXiv:2506.02285; timm `adamc`, levanter
        "cautious"       θ ← θ − α (d + λ 1[d θ ≥ 0] θ)          arXiv:2510.12402; nanochat, HeavyBall
        "proximal"       θ ← (θ − α d) / (1 + α λ)               Adan, arXiv:2208.06677
        "initial"        θ ← θ − α (d + λ (θ − θ₀))              L2-SP, arXiv:1802.01483, for fine-tuning; HeavyBall
        in front         chain(weight_decay(λ), direction, step(α)): g ← g + λ θ before the moments see it;
                         PyTorch's `Adam(weight_decay=λ)`

    Under "decoupled" parameters shrink by α λ in each step: a smaller α needs a larger λ. Under "independent" they
    shrink by λ at the peak of the schedule, whatever α_max is: λ is some thousand times smaller. "corrected" is
    "decoupled" at the peak, and keeps the ratio of gradient to parameter norm from growing as α falls. "cautious"
    leaves alone what the direction moves away from 0; of complex numbers the real part of d θ̄ counts. "proximal" is
    the implicit form of "decoupled", which no λ makes overshoot. "initial" pulls towards the parameters that `init` was
    given.

    Args:
      peak: α_max, the hyperparameter `peak` of "independent" and "corrected". By default the learning rate, where that
        is a number; setting that later leaves α_max as it is.

    Memory: none; "initial": 1 slot, 4 bytes per float32 parameter.

    Raises:
      ValueError: `decay` is unknown or "l2", has no `weight_decay`, or lacks `peak` under a schedule, or `peak` belongs
        to no decay that reads it.

    Differs from "decoupled" elsewhere in nothing but rounding: others multiply θ by 1 − α λ first and add −α d then,
    which is the same sum.
    """
    if decay == "l2":
        raise ValueError(
            'step: decay="l2" acts on the gradient, and stands in front of the direction: '
            "chain(weight_decay(rate), direction, step(learning_rate))"
        )
    if decay not in _LEAVES:
        raise ValueError(
            f"step: decay is one of {', '.join(map(repr, _LEAVES))}, not {decay!r}; optimizers also take 'l2', and "
            "lamb, novograd and stable_adamw 'inside'"
        )
    relative: dict[str, Any] = {}
    if decay in ("independent", "corrected"):
        if peak is None and callable(learning_rate):
            raise ValueError(f'step: decay="{decay}" with a schedule needs its largest rate: peak=...')
        relative = {"peak": learning_rate if peak is None else peak}
    elif peak is not None:
        raise ValueError(f'step: peak is for decay="independent" and "corrected", not for {decay!r}, "l2" or "inside"')
    if weight_decay is None:
        if decay != "decoupled":
            raise ValueError(f'step: decay="{decay}" needs weight_decay=..., such as 0.1')
        return leafwise(_step, StepState, place="end", learning_rate=learning_rate)
    return leafwise(
        _LEAVES[decay],
        InitialStepState if decay == "initial" else StepState,
        slots={"start": copied} if decay == "initial" else None,
        place="end",
        where={"weight_decay": where},
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        **relative,
    )
