"""Adagrad: a direction from the sum of all squared gradients."""

from typing import Any, Literal, NamedTuple

from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import Epsilon, abs2, check_epsilon, over_root
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class AdagradState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # initial_accumulator_value, eps, lr_decay
    v: Any  # like θ, float32 or wider, real: sum of |g|², without what it is taken to begin with


def _adagrad(
    g: Array,
    v: Array,
    *,
    t: Array,
    initial_accumulator_value: Array,
    eps: Array,
    lr_decay: Array,
    eps_placement: Epsilon,
) -> tuple[Array, tuple[Array]]:
    v = v + abs2(g)
    d = over_root(g, initial_accumulator_value + v, eps, eps_placement)
    return d / (1 + (t - 1) * lr_decay), (v,)


@constructor
def adagrad_direction(
    initial_accumulator_value: float | Schedule = 0.1,
    eps: float | Schedule = 1e-7,
    *,
    eps_placement: Epsilon = "inside",
    lr_decay: float | Schedule = 0.0,
) -> Rule:
    """The direction d of `adagrad`, before any learning rate, for chains of your own."""
    check_epsilon(eps_placement)
    return leafwise(
        _adagrad,
        AdagradState,
        slots={"v": real_zeros},
        static={"eps_placement": eps_placement},
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
        lr_decay=lr_decay,
    )


@constructor
def adagrad(
    learning_rate: float | Schedule,
    initial_accumulator_value: float | Schedule = 0.1,
    eps: float | Schedule = 1e-7,
    *,
    eps_placement: Epsilon = "inside",
    lr_decay: float | Schedule = 0.0,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Adagrad with diagonal matrices (Duchi et al. 2011, Figure 1, JMLR 12).

        v ← v + |g|²

        "inside":   d = g / √(a + v + ε)           Optax, Keras
        "outside":  d = g / (√(a + v) + ε)         the paper, with a = 0 and ε = δ; PyTorch

        θ ← θ − α d / (1 + count γ)

    a is `initial_accumulator_value`, γ `lr_decay`. a is added when the root is taken, not when v is born: it can be
    set at any time, like every hyperparameter. Other `eps_placement`s are those of `over_root`; without a bias
    correction "hat" is "outside". γ does not act on weight decay; `weight_decay`, `where`, `decay` and `peak` are those
    of `descend`.

        adagrad(0.01, 0.0, 1e-10, eps_placement="outside")                      # the defaults of PyTorch

    Memory: 1 slot, 4 bytes per float32 parameter; 2 slots, 8 bytes, with `decay="initial"`.

    Differs from the paper and PyTorch in the defaults, which are Optax's; from PyTorch in the default form of decay
    ("l2" there).
    """
    direction = adagrad_direction(initial_accumulator_value, eps, eps_placement=eps_placement, lr_decay=lr_decay)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
