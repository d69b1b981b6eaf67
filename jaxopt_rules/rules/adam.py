"""Adam and AdamW: a direction from the running means of the gradient and of its square."""

from typing import Any, Literal, NamedTuple

from jax import Array

from jaxopt_rules.apply import Decay, step
from jaxopt_rules.compose import chain
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import (
    Epsilon,
    abs2,
    check_epsilon,
    ema,
    ema_of_squares,
    first_correction,
    one_minus_power,
    over_root,
    second_correction,
    sqrt,
)
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector

BiasCorrection = Literal["moments", "step"]


class AdamState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, eps; where the rule owns its rate, that and weight_decay too
    m: Any  # like θ, float32 or wider: running mean of g
    v: Any  # like θ, float32 or wider, real: running mean of |g|²


def _adam(
    g: Array,
    m: Array,
    v: Array,
    *,
    one_minus_b1: Array,
    one_minus_b2: Array,
    c1: Array,
    c2: Array,
    eps: Array,
    eps_placement: Epsilon = "outside",
) -> tuple[Array, tuple[Array, Array]]:
    m = ema(m, g, one_minus_b1)
    v = ema_of_squares(v, abs2(g), one_minus_b2)
    return over_root(m / c1, v, eps, eps_placement, c2), (m, v)


def _joint_correction(*, t: Array, one_minus_b1: Array, one_minus_b2: Array) -> Array:
    return sqrt(one_minus_power(one_minus_b2, t)) / one_minus_power(one_minus_b1, t)


def _adam_step(
    g: Array,
    m: Array,
    v: Array,
    *,
    one_minus_b1: Array,
    one_minus_b2: Array,
    c: Array,
    eps: Array,
    eps_placement: Epsilon = "outside",
) -> tuple[Array, tuple[Array, Array]]:
    m = ema(m, g, one_minus_b1)
    v = ema_of_squares(v, abs2(g), one_minus_b2)
    return over_root(c * m, v, eps, eps_placement), (m, v)


def _adamw_step(
    g: Array,
    m: Array,
    v: Array,
    *,
    p: Array,
    learning_rate: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    c: Array,
    eps: Array,
    eps_placement: Epsilon,
    weight_decay: Array | None,
) -> tuple[Array, tuple[Array, Array]]:
    d, (m, v) = _adam_step(
        g, m, v, one_minus_b1=one_minus_b1, one_minus_b2=one_minus_b2, c=c, eps=eps, eps_placement=eps_placement
    )
    if weight_decay is not None:
        d = d + c * weight_decay * p
    return -learning_rate * d, (m, v)


_MEASURES = {"moments": {"c1": first_correction, "c2": second_correction}, "step": {"c": _joint_correction}}


def _check_bias_correction(value: str) -> None:
    if value not in _MEASURES:
        raise ValueError(f'adam: bias_correction must be "moments" or "step", not {value!r}')


@constructor
def adam_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    bias_correction: BiasCorrection = "moments",
    eps_placement: Epsilon = "outside",
) -> Rule:
    """The direction d of `adam`, before any learning rate, for chains of your own."""
    _check_bias_correction(bias_correction)
    check_epsilon(eps_placement)
    return leafwise(
        _adam if bias_correction == "moments" else _adam_step,
        AdamState,
        slots={"v": real_zeros},
        static={"eps_placement": eps_placement},
        measures=_MEASURES[bias_correction],
        b1=b1,
        b2=b2,
        eps=eps,
    )


@constructor
def adam(
    learning_rate: float | Schedule = 1e-3,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    bias_correction: BiasCorrection = "moments",
    eps_placement: Epsilon = "outside",
) -> Rule:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

        m ← m + (1 − β₁)(g − m)          v ← v + (1 − β₂)(|g|² − v)

        "moments":  d = m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)
        "step":     d = √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)

        θ ← θ − α d

    `bias_correction="moments"` is Algorithm 1, PyTorch's and Optax's Adam. `"step"` folds both corrections into the
    rate (the last paragraph of section 2, and the class `Adam`): the same but for ε, which is added to the uncorrected
    root and so acts as ε / √(1 − β₂ᵗ), 30 times larger on the first step.

    `eps_placement` moves ε in the quotient by the root r, which is √(v / (1 − β₂ᵗ)) with "moments" and √v with "step":

        "outside"   m / (r + ε)          PyTorch, Optax
        "hat"       ε on √v: with "moments" the numbers of "step", so of Keras and TensorFlow
        "inside"    m / √(r² + ε)        `eps_root` of Optax, MaxText
        "max"       m / max(r, ε)        HeavyBall

    Memory: 2 slots, 8 bytes per float32 parameter.

    Differs from Optax in keywords: `eps_root` with `eps=0` is `eps_placement="inside"`, `nesterov=True` is
    `nadamw(weight_decay=None)`, and there is no `mu_dtype`: slots are float32 for narrower parameters, too. And in
    float32, where 1 − β and 1 − βᵗ keep their digits (Optax's direction is off by up to 1e-5 with the default betas).
    From PyTorch in keywords: its `weight_decay` is `adamw(decay="l2")`, its `amsgrad`
    `amsgrad(maximum_of="uncorrected")`.
    """
    direction = adam_direction(b1, b2, eps, bias_correction=bias_correction, eps_placement=eps_placement)
    return chain(direction, step(learning_rate))


@constructor
def adamw(
    learning_rate: float | Schedule = 1e-3,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    weight_decay: float | Schedule = 0.01,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
    bias_correction: BiasCorrection = "moments",
    eps_placement: Epsilon = "outside",
) -> Rule:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2).

        "moments":  θ ← θ − α (d + λ θ)                    d as in `adam`
        "step":     θ ← θ − α (d + c λ θ)                  c = √(1 − β₂ᵗ) / (1 − β₁ᵗ)

    where λ applies: `where` selects the leaves that decay (`"**/w"`, or `lambda path, p: p.ndim > 1`). `decay` and
    `peak` choose another form of decay, as `step` describes them; besides those there is `decay="l2"`, where
    g ← g + λ θ in front of the moments: PyTorch's `Adam(weight_decay=λ)`.

    `bias_correction="step"` is the class `AdamW`: the corrected rate multiplies the decay too, so that with the usual
    betas it begins at a third of α λ, falls to 0.15 of it near t = 12 and then rises to all of it. It has no other form
    of decay. `eps_placement` is that of `adam`.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`.

    Raises:
      ValueError: `bias_correction` or `eps_placement` is unknown, "step" has another form of decay, or as `descend`.

    Differs from the paper, whose decay is not multiplied by α (`decay="independent"` is the paper's); from Optax in the
    default λ (1e-4 there, 0.01 here and in PyTorch), and in keywords: `mask` is `where`, and the others are as in
    `adam`.
    """
    _check_bias_correction(bias_correction)
    check_epsilon(eps_placement)
    if bias_correction == "moments":
        direction = adam_direction(b1, b2, eps, eps_placement=eps_placement)
        return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
    if decay != "decoupled" or peak is not None:
        raise ValueError('adamw: bias_correction="step" has decoupled decay alone, without peak; others need "moments"')
    return leafwise(
        _adamw_step,
        AdamState,
        slots={"v": real_zeros},
        place="end",
        where={"weight_decay": where},
        static={"eps_placement": eps_placement},
        measures=_MEASURES["step"],
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )
