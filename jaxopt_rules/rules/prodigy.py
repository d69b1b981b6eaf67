"""Prodigy: Adam that finds its learning rate. Tree-level: one estimate for all arrays."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxopt_rules.compose import chain
from jaxopt_rules.hooks import weight_decay as l2
from jaxopt_rules.lift import copied, real_zeros, treewise
from jaxopt_rules.numerics import abs2, one_minus_power, over_root, quotient, read_wide, scale, sqrt
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class ProdigyState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # learning_rate, one_minus_b1, one_minus_b2, eps, d0, d_coef; one_minus_b3, growth_rate,
    # weight_decay where they are given
    m: Any  # like θ, float32 or wider: running mean of d g
    v: Any  # like θ, float32 or wider, real: running mean of d² |g|²
    s: Any  # like θ or each slice_p-th element of it, float32 or wider: decaying sum of weighted gradients
    start: Any  # like s: θ when `init` ran
    numerator: Array  # ()  decaying sum of the weighted ⟨g, θ₀ − θ⟩
    ratio: Array  # ()  d / d₀
    largest: Array  # ()  the largest d̂ / d₀ so far, and at least 1
    taken: Array  # ()  int32, updates that were not skipped
    metrics: dict[str, Array]  # d: ()  the estimate that the last update ended with


def _total(tree: Any) -> Array:
    return sum((jnp.sum(x) for x in jax.tree.leaves(tree)), jnp.float32(0))


@partial(jax.jit, static_argnums=1)
def _sampled(x: Array, every: int) -> Array:
    # Compiled as one, also at birth: on a mesh, the sample is then born where an update leaves it.
    return x if every == 1 else x.reshape(-1)[::every]


def _ema(mean: Array, x: Array, one_minus_b: ArrayLike) -> Array:
    return mean + scale(one_minus_b, x - mean)


def _start(p: Any, slice_p: int) -> Array:
    return _sampled(copied(p), slice_p)


def _no_sum(p: Any, slice_p: int) -> Array:
    return jnp.zeros_like(_start(p, slice_p))


def _prodigy(
    grads: Any,
    m: Any,
    v: Any,
    s: Any,
    start: Any,
    numerator: Array,
    ratio: Array,
    largest: Array,
    taken: Array,
    *,
    p: Any,
    learning_rate: Array,
    one_minus_b1: Array,
    one_minus_b2: Array,
    eps: Array,
    d0: Array,
    d_coef: Array,
    one_minus_b3: Array | None = None,
    growth_rate: Array | None = None,
    weight_decay: Any = None,
    use_bias_correction: bool,
    safeguard_warmup: bool,
    slice_p: int,
) -> Any:
    d = d0 * ratio
    rate = d * learning_rate
    if use_bias_correction:
        k = (taken + 1).astype(rate.dtype)
        rate = rate * sqrt(one_minus_power(one_minus_b2, k)) / one_minus_power(one_minus_b1, k)
    if one_minus_b3 is None:
        one_minus_b3 = one_minus_power(one_minus_b2, jnp.full_like(one_minus_b2, 0.5))

    # A rate of 0 skips the update: with these factors the sums below stay what they are.
    on = learning_rate > 0
    c1, c2, c3 = (jnp.where(on, c, 0) for c in (one_minus_b1, one_minus_b2, one_minus_b3))
    weight = jnp.where(on, ratio * (d if safeguard_warmup else rate), 0)

    g = jax.tree.map(lambda g, m: g.astype(m.dtype), grads, m)
    m = jax.tree.map(lambda m, g: _ema(m, scale(d, g), c1), m, g)
    v = jax.tree.map(lambda v, g: _ema(v, abs2(scale(d, g)), c2), v, g)
    s = jax.tree.map(lambda s, g: scale(1 - c3, s) + scale(weight, _sampled(g, slice_p)), s, g)
    moved = jax.tree.map(lambda x0, p: x0 - _sampled(read_wide(p), slice_p), start, p)
    product = _total(jax.tree.map(lambda g, x: (_sampled(read_wide(g), slice_p).conj() * x).real, grads, moved))
    numerator = (1 - c3) * numerator + ratio * rate * product
    denominator = _total(jax.tree.map(jnp.abs, s))

    taking = on & (denominator > 0)
    estimate = d_coef * quotient(numerator, denominator, otherwise=0) / d0
    new_largest = jnp.maximum(largest, estimate)
    new_ratio = new_largest
    if growth_rate is not None:
        # Not ∞ · ratio, whose derivative would be NaN.
        bounded = jnp.isfinite(growth_rate)
        grown = jnp.where(ratio == 1, jnp.maximum(ratio, estimate), ratio) * jnp.where(bounded, growth_rate, 1)
        new_ratio = jnp.where(bounded, jnp.minimum(new_largest, grown), new_largest)
    ratio = jnp.where(taking, new_ratio, ratio)
    largest = jnp.where(taking, new_largest, largest)
    taken = jnp.where(taking, taken + 1, taken)

    d = d0 * ratio
    rate = jnp.where(taking, rate, 0)

    def update(m: Array, v: Array, p: Array, weight_decay: Array | None) -> Array:
        u = over_root(m, v, jnp.asarray(d * eps, v.dtype), "outside")
        return scale(-rate, u if weight_decay is None else u + scale(weight_decay, p))

    decays = jax.tree.map(lambda _: None, grads) if weight_decay is None else weight_decay
    updates = jax.tree.map(update, m, v, p, decays)
    return updates, (m, v, s, start, numerator, ratio, largest, taken), {"d": d}


@constructor
def prodigy(
    learning_rate: float | Schedule = 1.0,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    b3: float | Schedule | None = None,
    eps: float | Schedule = 1e-8,
    *,
    d0: float | Schedule = 1e-6,
    d_coef: float | Schedule = 1.0,
    growth_rate: float | Schedule | None = None,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    slice_p: int = 1,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Literal["decoupled", "l2"] = "decoupled",
) -> Rule:
    """Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101, Algorithm 4), in the form of the authors' `prodigyopt`.

        η = α d c          c = 1, or √(1 − β₂ᵏ) / (1 − β₁ᵏ) with `use_bias_correction`

        N ← β₃ N + (d / d₀) η ⟨g, θ₀ − θ⟩
        s ← β₃ s + (d / d₀) η g, or (d / d₀) d g with `safeguard_warmup`
        m ← m + (1 − β₁)(d g − m)
        v ← v + (1 − β₂)(d² |g|² − v)

        d̂ = d_coef N / ‖s‖₁
        d_max ← max(d_max, d̂)          from d₀
        d ← d_max; with `growth_rate`, d ← min(d_max, growth_rate · d), and max(d, d̂) for d where that is still d₀

        θ ← θ − η (m / (√v + d ε) + λ θ)

    d, from d₀ on, estimates the distance to the solution, and takes the place of the learning rate: leave α at 1, or
    give it a schedule that begins or ends there. ⟨⟩ and ‖s‖₁ are sums over all arrays that take part, in float32 or
    wider, and all arrays have one d (each group of a `partition` has its own). η has the old d, d ε the new one. d is
    recorded as `d` in `metrics(state)`. An update with α = 0, or where ‖s‖₁ = 0, is skipped: it changes no memory, and
    does not count in k.

    Args:
      b3: β₃; without it √β₂.
      d0: d₀, which the state keeps apart from the growth d / d₀: another d₀ scales the estimate. Parameters in
        bfloat16 may round the whole of so small a step away, and then d never grows: they need 1e-3 or so.
      d_coef: the way to tune the method: 0.5 or 2 rather than another α.
      growth_rate: the factor by which d may grow in an update, once it has left d₀; 1.02 makes a warmup. Without it
        there is no bound, as with ∞.
      safeguard_warmup: leaves α out of s, so that a long warmup does not make d̂ too large.
      slice_p: N and s see each slice_p-th element of an array; the authors suggest 11.
      decay: "decoupled" as above; "l2", g ← g + λ θ in front of all, `decouple=False` there. There is no other form.

    Memory: 4 slots, 16 bytes per float32 parameter; 8 + 8 / slice_p bytes for larger slices.

    Raises:
      ValueError: `decay` is unknown or has no `weight_decay`, or `slice_p` is no whole number, at least 1.

    Differs from the paper, which has the old d in d ε, weights N and s by 1 − β₃ and not by 1 / d₀ (their ratio is the
    same), and knows no bound on the growth; from Optax, which corrects biases always, and where an update with α = 0 or
    zero gradients alone at the start makes the parameters NaN, and in keywords: `betas`, `beta3`, `estim_lr0`,
    `estim_lr_coef` are `b1` and `b2`, `b3`, `d0`, `d_coef`.
    """
    if decay not in ("decoupled", "l2"):
        raise ValueError(f'prodigy: decay is "decoupled" or "l2", not {decay!r}')
    if isinstance(slice_p, bool) or not isinstance(slice_p, int) or slice_p < 1:
        raise ValueError(f"prodigy: slice_p must be a whole number, at least 1, not {slice_p!r}")
    in_front: list[Rule] = []
    if decay == "l2":
        if weight_decay is None:
            raise ValueError('prodigy: decay="l2" needs weight_decay=..., such as 0.1')
        in_front = [l2(weight_decay, where)]
        weight_decay = where = None
    rule = treewise(
        _prodigy,
        ProdigyState,
        slots={"v": real_zeros, "s": _no_sum, "start": _start},
        shared={"numerator": 0.0, "ratio": 1.0, "largest": 1.0, "taken": 0},
        where={"weight_decay": where},
        static={
            "use_bias_correction": bool(use_bias_correction),
            "safeguard_warmup": bool(safeguard_warmup),
            "slice_p": slice_p,
        },
        metrics=("d",),
        place="end",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        d0=d0,
        d_coef=d_coef,
        b3=b3,
        growth_rate=growth_rate,
        weight_decay=weight_decay,
    )
    return chain(*in_front, rule) if in_front else rule
