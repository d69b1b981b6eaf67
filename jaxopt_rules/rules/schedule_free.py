"""Schedule-free learning: the parameters stand between a fast sequence and its average. Tree-level: a wrapper."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxopt_rules import trees
from jaxopt_rules.apply import Decay, step
from jaxopt_rules.averages import always_acting
from jaxopt_rules.compose import Wrapper
from jaxopt_rules.descend import descend
from jaxopt_rules.families import families
from jaxopt_rules.hyperparameters import Scheduled, check
from jaxopt_rules.lift import advanced, copied, leafwise, real_zeros
from jaxopt_rules.numerics import abs2, ema, ema_of_squares, is_inexact, one_minus_power, over_root, quotient
from jaxopt_rules.rule import Definition, Rule, constructor, extra_for
from jaxopt_rules.schedules import Schedule, Warmup
from jaxopt_rules.select import Selector


class ScheduleFreeState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b1, weight_lr_power, r; learning_rate where the rule inside does not tell it
    peak: Array  # ()  the largest learning rate so far
    weights: Array  # ()  Σw in units of the last w: 1 / c
    one_minus_b: Array  # ()  1 − β of the update that made θ; 0 at birth, where θ is x
    z: Any  # like θ, float32 or wider: what the rule inside moves
    x: Any  # like θ, float32: the average, of parameters narrower than that; `None` where θ and z tell it
    inner: Any  # of the rule

    def eval_params(self, params: Any) -> Any:
        """The average x."""
        ys, treedef = trees.flatten(params)
        slots = [trees.align(treedef, x, "the state's average", "the parameters") for x in (self.z, self.x)]
        share = quotient(self.one_minus_b, 1 - self.one_minus_b, otherwise=0)

        def average(y: Any, z: Any, x: Any) -> Any:
            if y is None or z is None:
                return y
            # A copy: what is evaluated with stays valid when the state is donated.
            return jnp.array(_beyond(y, z, share) if x is None else x, y.dtype)

        return jax.tree.unflatten(treedef, list(map(average, ys, *slots)))


@jax.jit
def _beyond(y: Array, z: Array, share: Array) -> Array:
    wide = y.astype(z.dtype)
    return wide + share.astype(z.real.dtype) * (wide - z)


class _Mix(NamedTuple):
    """The numbers of one update that all arrays share."""

    c: Array
    one_minus_b: Array
    pull: Array  # of z on y, where x is not kept
    push: Array  # of u on y, besides


@jax.jit
def _from_y(y: Array, z: Array, u: Array, mix: _Mix) -> tuple[Array, Array]:
    """The update of y, and the new z: x = (y − (1 − b) z) / b put into the equations of x and y."""
    pull, push = (factor.astype(z.real.dtype) for factor in (mix.pull, mix.push))
    u = u.astype(z.dtype)
    z = z + u
    return pull * (z - y.astype(z.dtype)) + push * u, z


@jax.jit
def _from_x(y: Array, z: Array, x: Array, u: Array, mix: _Mix) -> tuple[Array, Array, Array]:
    """The update of y, the new z, and the new x."""
    c, one_minus_b = (factor.astype(z.real.dtype) for factor in (mix.c, mix.one_minus_b))
    z = z + u.astype(z.dtype)
    x = ema(x, z, c)
    return ema(x, z, one_minus_b) - y.astype(z.dtype), z, x


@dataclass(frozen=True, eq=False)
class _ScheduleFree(Wrapper):
    def init(self, params: Any) -> Any:
        leaves, treedef = trees.flatten(params)
        inner = self.rule.init(params)
        self._rate({}, inner)
        scalars = {name: jnp.zeros((), jnp.result_type(float)) for name in ("peak", "weights", "one_minus_b")}
        z = [copied(p) if is_inexact(p) else None for p in leaves]
        x = [copied(p) if is_inexact(p) and jnp.finfo(p.dtype).bits < 32 else None for p in leaves]
        return self.State(
            **trees.placed_with(leaves, self.born(**scalars)),
            z=jax.tree.unflatten(treedef, z),
            x=jax.tree.unflatten(treedef, x),
            inner=inner,
        )

    def _rate(self, values: Mapping[str, Any], inner: Any) -> Any:
        """The learning rate that the last update had."""
        if "learning_rate" in self.hyper:
            return values.get("learning_rate")
        rates = [
            family.state.hyper["learning_rate"] for family in families(inner) if "learning_rate" in family.state.hyper
        ]
        if len(rates) != 1:
            raise ValueError(
                f"schedule_free: {self.rule!r} has {len(rates) or 'no'} hyperparameters learning_rate, and the weights "
                "of the average follow one; give it: schedule_free(rule, learning_rate)"
            )
        return rates[0].value if isinstance(rates[0], Scheduled) else rates[0]

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        self.check_state(state)
        if params is None and grads is not None:
            raise TypeError(f"{self.name} needs the parameters: update(grads, state, params)")
        updates, inner = self.rule.update(grads, state.inner, params, **extra_for(self.rule, extra))
        values, hyper = self.values(state)
        count = advanced(state.count)
        mix, scalars = _mixed(state, count.astype(state.weights.dtype), self._rate(values, inner), values)
        us, treedef = trees.flatten(updates)
        ys = trees.align(treedef, params, "the parameters")
        zs, xs = (trees.align(treedef, getattr(state, slot), f"the state's {slot}") for slot in ("z", "x"))
        for k, (u, y) in enumerate(zip(us, ys, strict=True)):
            if not (is_inexact(u) and is_inexact(y)):
                continue
            if zs[k] is None:
                raise ValueError(
                    f"{self.name}: the state has no z for {trees.quoted(trees.paths(updates)[k])}: it was no trainable "
                    "array when init ran; init again with the parameters that are trained now"
                )
            if xs[k] is None:
                us[k], zs[k] = _from_y(y, zs[k], u, mix)
            else:
                us[k], zs[k], xs[k] = _from_x(y, zs[k], xs[k], u, mix)
        z, x = (jax.tree.unflatten(treedef, slot) for slot in (zs, xs))
        return jax.tree.unflatten(treedef, us), self.State(count=count, hyper=hyper, **scalars, z=z, x=x, inner=inner)


def _mixed(state: Any, t: Array, rate: Any, values: Mapping[str, Any]) -> tuple[_Mix, dict[str, Array]]:
    """What the arrays need of c and b, and the new scalars of the state."""
    peak = jnp.maximum(state.peak, jnp.asarray(rate, state.peak.dtype))
    # Σw / w ← 1 + (w before / w) Σw / w, where weights that stay the same make it a whole number, exactly. What is lost
    # by the quotient is written without cancellation; the clock has no w before in its first update.
    older = -jnp.expm1(values["r"] * jnp.log1p(-1 / jnp.maximum(t, 2)))
    grown = quotient(state.peak, peak, otherwise=1) ** values["weight_lr_power"]
    lost = (1 - grown) + grown * older
    counts = (peak > 0) | (values["weight_lr_power"] == 0)
    weights = state.weights + (counts - state.weights * lost)
    c = quotient(1, weights, otherwise=0)
    one_minus_b = values["one_minus_b1"]
    # 1 − (new b) / (b that made y): not 0 where b has changed; x has not.
    turned = quotient(one_minus_b - state.one_minus_b, 1 - state.one_minus_b, otherwise=0)
    mix = _Mix(c, one_minus_b, pull=c + turned * (1 - c), push=(1 - c) * (one_minus_b - turned))
    return mix, {"peak": peak, "weights": weights, "one_minus_b": jnp.array(one_minus_b)}


@constructor
def schedule_free(
    rule: Rule,
    learning_rate: float | Schedule | None = None,
    b1: float | Schedule = 0.9,
    weight_lr_power: float | Schedule = 2.0,
    *,
    r: float | Schedule = 0.0,
) -> Definition:
    """Schedule-free learning (Defazio et al. 2024, arXiv:2405.15682, equations 7 to 9) around any optimizer.

        z ← z + u                     u: the update of the rule, at y, from the gradient at y
        x ← (1 − c) x + c z           c = w / Σw          w = tʳ (max α so far)ᵖ, p = `weight_lr_power`
        y ← (1 − β) z + β x           β = `b1`

    The parameters are y, at which the gradient is taken; `eval_params(state, params)` are x, which are to be evaluated
    and shipped: in place of a schedule that falls, x is an average. The rule should have no momentum of its own, and a
    rate that is constant, perhaps behind a warm-up; its weight decay is that at y, as the authors advise. `b1` may
    change at any time: x stays, and y moves.

        chain(clip_by_global_norm(1.0), schedule_free(adamw(2.5e-3, b1=0.0)))

    Args:
      rule: an optimizer. What stands in it behind the terminal sees y + u.
      learning_rate: α of the weights; by default the one that the rule has used, read from its state.

    Memory: one slot, 4 bytes per float32 parameter, besides those of the rule; x is (y − (1 − β) z) / β. Of
    parameters narrower than float32, x is a slot too (8 bytes in all), and y is rounded from it and z: from a
    rounded y, an average that moves by c = 1/t of the way would not move any more after a few hundred updates.
    So what else changes a narrow parameter between updates is forgotten, where a wide one carries it on in x.

    Raises:
      TypeError: `rule` is no rule.
      ValueError: it gives directions, or may do nothing, as `accumulate` does; put those around schedule_free. Or `b1`
        is 0, where y would tell nothing of x; or, in `init`, the rule has not one learning rate.

    Differs from Optax, whose weights read a schedule one update ahead of the rule, which divides by a β that may not
    change, and which keeps z, c and β in the parameters' precision (there is no `state_dtype` here); from the authors
    in nothing but rounding, as long as p and r stay: where they change, the weights so far keep their sum in units of
    the last one.
    """
    member = always_acting(rule, "schedule_free")
    hyper = {"one_minus_b1": b1, "weight_lr_power": weight_lr_power, "r": r}
    hyper |= {} if learning_rate is None else {"learning_rate": learning_rate}
    for name, value in hyper.items():
        check(name, value)
    if not (callable(b1) or isinstance(b1, Tracer)) and b1 == 0:
        raise ValueError(
            "schedule_free: b1 must be greater than 0, where the parameters are z alone; with their average beside "
            "them that is average(rule, None)"
        )
    return _ScheduleFree(State=ScheduleFreeState, hyper=hyper, rule=member)


def _warmed_up(learning_rate: float | Schedule, steps: int | None, owner: str) -> float | Schedule:
    """α (k + 1) / W in update k of W, counted from 0, and then α."""
    if steps is None or (steps == 0 and not isinstance(steps, bool)):
        return learning_rate
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 0:
        raise ValueError(f"{owner}: warmup_steps must be an integer >= 0, not {steps!r}")
    if callable(learning_rate):
        raise ValueError(
            f"{owner}: warmup_steps is for a learning rate that is a number; {learning_rate!r} has its own"
        )
    check("learning_rate", learning_rate)
    return Warmup(learning_rate, int(steps) - 1, learning_rate / int(steps))


@constructor
def schedule_free_sgd(
    learning_rate: float | Schedule = 1.0,
    warmup_steps: int | None = None,
    b1: float | Schedule = 0.9,
    *,
    weight_lr_power: float | Schedule = 2.0,
    r: float | Schedule = 0.0,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Schedule-free SGD (Defazio et al. 2024, arXiv:2405.15682, equations 7 to 9; `schedulefree.SGDScheduleFree`).

        z ← z − α (g + λ y)          x ← (1 − c) x + c z          y ← (1 − β) z + β x

    c as in `schedule_free`, which this is around `step`. The parameters are y; `eval_params(state, params)` are x.
    `weight_decay`, `where`, `decay` and `peak` are those of `step`.

    Args:
      warmup_steps: W: the first W updates have the rates α/W, 2α/W, ..., α. α is then a schedule, and not live.

    Memory: 1 slot, 4 bytes per float32 parameter; 2 slots where the parameters are narrower; 1 more with
    `decay="initial"`.

    Raises:
      ValueError: as `step` and `schedule_free`; or `warmup_steps` is no whole number, or goes with a schedule.

    Differs from Optax, whose warm-up begins with a rate of 0, and reaches α one update later, and in keywords: there is
    no `state_dtype`; from the authors' class in nothing but rounding (their `momentum` is `b1`).
    """
    rate = _warmed_up(learning_rate, warmup_steps, "schedule_free_sgd")
    peak = _peak(learning_rate, rate, decay, peak)
    inner = step(rate, weight_decay, where, decay=decay, peak=peak)
    return schedule_free(inner, None, b1, weight_lr_power, r=r)


def _peak(
    learning_rate: float | Schedule, rate: float | Schedule, decay: str, peak: float | Schedule | None
) -> float | Schedule | None:
    """The largest rate, which a warm-up of this file does not hide."""
    relative = decay in ("independent", "corrected") and not callable(learning_rate) and callable(rate)
    return learning_rate if relative and peak is None else peak


class SecondMomentState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_b2, eps
    v: Any  # like θ, float32 or wider, real: running mean of |g|²


def _over_second_moment(g: Array, v: Array, *, t: Array, one_minus_b2: Array, eps: Array) -> tuple[Array, tuple[Array]]:
    v = ema_of_squares(v, abs2(g), one_minus_b2)
    return over_root(g, v, eps, "outside", one_minus_power(one_minus_b2, t)), (v,)


@constructor
def schedule_free_adamw(
    learning_rate: float | Schedule = 0.0025,
    warmup_steps: int | None = None,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float | Schedule = 1e-8,
    *,
    weight_lr_power: float | Schedule = 2.0,
    r: float | Schedule = 0.0,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682, Algorithm 1; `schedulefree.AdamWScheduleFree`).

        v ← v + (1 − β₂)(|g|² − v)          d = g / (√(v / (1 − β₂ᵗ)) + ε)

        z ← z − α (d + λ y)          x ← (1 − c) x + c z          y ← (1 − β₁) z + β₁ x

    c as in `schedule_free`. There is no first moment: the average has its place. The parameters are y;
    `eval_params(state, params)` are x. The authors use β₁ = 0.95 or 0.98 for long runs. `weight_decay`, `where`,
    `decay` and `peak` are those of `descend`.

    Args:
      warmup_steps: W: the first W updates have the rates α/W, 2α/W, ..., α. α is then a schedule, and not live.

    Memory: 2 slots, 8 bytes per float32 parameter; 3 slots where the parameters are narrower; 1 more with
    `decay="initial"`.

    Raises:
      ValueError: as `step` and `schedule_free`; or `warmup_steps` is no whole number, or goes with a schedule.

    Differs from Algorithm 1, as the authors' class does, where that multiplies α by √(1 − β₂ᵗ), which here divides v (ε
    then weighs more at first); from Optax, whose warm-up begins with a rate of 0, and reaches α one update later, and
    in keywords: there is no `state_dtype`.
    """
    rate = _warmed_up(learning_rate, warmup_steps, "schedule_free_adamw")
    peak = _peak(learning_rate, rate, decay, peak)
    direction = leafwise(_over_second_moment, SecondMomentState, slots={"v": real_zeros}, b2=b2, eps=eps)
    inner = descend(direction, rate, weight_decay, where, decay=decay, peak=peak)
    return schedule_free(inner, None, b1, weight_lr_power, r=r)
