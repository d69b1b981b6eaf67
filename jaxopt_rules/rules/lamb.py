"""LAMB: Adam with a trust ratio for each array."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.compose import chain, masked
from jaxopt_rules.descend import descend
from jaxopt_rules.hooks import StatelessState
from jaxopt_rules.hooks import weight_decay as added_decay
from jaxopt_rules.lift import leafwise
from jaxopt_rules.numerics import norm, quotient
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.rules.adam import adam_direction
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class BoundedRatioState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # max_ratio


def _ratio(u: Array, *, p: Array) -> Array:
    p_norm = norm(p)
    return jnp.where(p_norm == 0, 1, quotient(p_norm, norm(u), otherwise=1))


def _adapted(u: Array, *, ratio: Array, max_ratio: Array | None = None) -> Array:
    return (ratio if max_ratio is None else jnp.minimum(ratio, max_ratio)) * u


@constructor
def lamb_direction(
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-6,
    *,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    max_ratio: float | Schedule | None = None,
    trust_where: Selector | None = None,
) -> Rule:
    """The direction d of `lamb`, decay inside, before any learning rate, for chains of your own."""
    members = [adam_direction(b1, b2, eps)]
    if weight_decay is not None:
        members.append(added_decay(weight_decay, where))
    # Not `trust_ratio`, which has an ε of its own: here there is one, and the hyperparameter is called `eps`.
    State = StatelessState if max_ratio is None else BoundedRatioState
    ratio = leafwise(_adapted, State, sums={"ratio": _ratio}, max_ratio=max_ratio)
    return chain(*members, ratio if trust_where is None else masked(ratio, trust_where))


@constructor
def lamb(
    learning_rate: float | Schedule,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-6,
    *,
    max_ratio: float | Schedule | None = None,
    trust_where: Selector | None = None,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2", "inside"] = "inside",
    peak: float | Schedule | None = None,
) -> Rule:
    """LAMB (You et al. 2020, arXiv:1904.00962, Algorithm 2).

        m ← m + (1 − β₁)(g − m)          v ← v + (1 − β₂)(|g|² − v)

        u = m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε) + λ θ

        d = ‖θ‖ / ‖u‖ · u, and u where ‖θ‖ or ‖u‖ is 0          θ ← θ − α d

    with norms over each array. `weight_decay`, `where`, `decay` and `peak` are those of `descend`; by default decay is
    "inside" the ratio, as above.

    Args:
      max_ratio: the largest ratio, if there is one; 1 in the variant called LAMBC, timm's `trust_clip`.
      trust_where: the arrays that have a ratio, by default all.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots, 12 bytes, with `decay="initial"`.

    Differs from timm, which leaves out the ratio where there is no decay (`trust_where` with the selector of `where`)
    and clips the norm of all gradients to 1 (`clip_by_global_norm(1.0)` in front). The φ that bounds ‖θ‖ in the paper's
    theory is the identity. From Keras, which has `decay="decoupled"`. From Optax in keywords: `mask` is `where`, and
    there is no `eps_root`.
    """
    if decay != "inside":
        direction = lamb_direction(b1, b2, eps, max_ratio=max_ratio, trust_where=trust_where)
        return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
    direction = lamb_direction(
        b1, b2, eps, weight_decay=weight_decay, where=where, max_ratio=max_ratio, trust_where=trust_where
    )
    return descend(direction, learning_rate, peak=peak)
