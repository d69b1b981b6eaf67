"""AdaBelief: Adam by the square of what the mean did not foresee of the gradient."""

from typing import Any, Literal, NamedTuple

from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.numerics import abs2, debias, ema, ema_of_squares, over_root
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.rules.radam import rectified
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class AdabeliefState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, one_minus_b2, eps, eps_root
    m: Any  # like θ, float32 or wider: running mean of g
    s: Any  # like θ, float32 or wider, real: running mean of |g − m|², with ε_root added in every update


def _adabelief(
    g: Array,
    m: Array,
    s: Array,
    *,
    t: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    eps: Array,
    eps_root: Array,
    rectify: bool,
) -> tuple[Array, tuple[Array, Array]]:
    m = ema(m, g, one_minus_b1)
    # ε_root within the mean, not behind it: there XLA would copy the old s, to compute the new one twice.
    s = ema_of_squares(s, abs2(g - m) + eps_root / one_minus_b2, one_minus_b2)
    m_hat = debias(m, one_minus_b1, t)
    if rectify:
        d = rectified(m_hat, s, eps, "hat", "sgd", t=t, one_minus_b2=one_minus_b2, threshold=5)
    else:
        d = over_root(m_hat, debias(s, one_minus_b2, t), eps, "outside")
    return d, (m, s)


@constructor
def adabelief_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-16,
    eps_root: float | Schedule = 1e-16,
    *,
    rectify: bool = False,
) -> Rule:
    """The direction d of `adabelief`, before any learning rate, for chains of your own."""
    return leafwise(
        _adabelief,
        AdabeliefState,
        slots={"s": real_zeros},
        static={"rectify": bool(rectify)},
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
    )


@constructor
def adabelief(
    learning_rate: float | Schedule = 1e-3,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-16,
    eps_root: float | Schedule = 1e-16,
    *,
    rectify: bool = False,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """AdaBelief (Zhuang et al. 2020, arXiv:2010.07468, Algorithm 2).

        m ← m + (1 − β₁)(g − m)          s ← s + (1 − β₂)(|g − m|² − s) + ε_root
        d = m / (1 − β₁ᵗ) / (√(s / (1 − β₂ᵗ)) + ε)
        θ ← θ − α (d + λ θ)

    ε_root stays in s, where it sums up to ε_root / (1 − β₂): the ε of the paper's s, as in Optax; the authors' code
    takes one ε in both places. With `rectify` the direction is that of `radam` with s in place of v and ε on the
    uncorrected root: the default of the authors' `adabelief_pytorch`. `weight_decay`, `where`, `decay` and `peak` are
    those of `descend`.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`.

    Differs from the authors' code in `rectify` (on there, off here, in the paper and in Optax); from Optax in keywords:
    there is no `nesterov`.
    """
    direction = adabelief_direction(b1, b2, eps, eps_root, rectify=rectify)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
