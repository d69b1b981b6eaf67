"""Rules that work on updates, behind the terminal, or on whatever passes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from jaxopt_rules import trees
from jaxopt_rules.lift import Leafwise, leafwise, lift, matched, treewise
from jaxopt_rules.numerics import is_inexact, scale, widened
from jaxopt_rules.rule import Definition, Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector, check_selector, select


class ProjectState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # nothing


@dataclass(frozen=True)
class _Projection:
    fn: Callable[[Array], Array]

    def projected(self, x: Array) -> Array:
        y = self.fn(x)
        if jnp.shape(y) != x.shape:
            raise ValueError(f"the projection gave the shape {jnp.shape(y)} for an array of shape {x.shape}")
        return y

    def __call__(self, u: Array, *, p: Array, chosen: Array | None) -> Array:
        if chosen is None:
            return u
        x = p + u
        y = self.projected(x)
        # What the projection leaves alone is updated as if it were not there, to the bit.
        return jnp.where(y == x, u, y - p)


class _Project(Leafwise):
    def apply(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        _, new_state = self.update(grads, state, params, extra)
        updates, treedef = trees.flatten(grads)
        ps = trees.align(treedef, params, "the parameters", "the updates")
        moved = trees.align(treedef, trees.apply_updates(params, grads), "the parameters")
        chosen = self._per_leaf(matched(grads, params), params)
        projected = cast(_Projection, self.function).projected
        for k, (u, p) in enumerate(zip(updates, ps, strict=True)):
            if is_inexact(u) and is_inexact(p) and chosen(k)["chosen"] is not None:
                wide = jnp.promote_types(widened(p.dtype), widened(u.dtype))
                # Applied last, so that a bound holds to the bit: p + (bound − p) need not be the bound.
                moved[k] = projected(p.astype(wide) + u.astype(wide)).astype(p.dtype)
        return jax.tree.unflatten(treedef, moved), new_state


@constructor
def project(fn: Callable[[Array], Array], where: Selector | None = None) -> Definition:
    """Keeps parameters in a set: the step ends where its projection does.

        θ ← fn(θ + u)

    Behind the terminal: `chain(adam(1e-3), project(jax.nn.relu, "**/rate"))` keeps parameters from becoming negative,
    `project(lambda x: jnp.clip(x, -1, 1))` keeps them in a box, `project(lambda x: x / jnp.linalg.norm(x))` on a
    sphere. `where` selects the leaves.

    Args:
      fn: from an array, in float32 or wider, to one of its shape; called on one leaf at a time.

    Memory: none.

    Through `update`, what is projected is the update fn(θ + u) − θ, whose sum with θ may differ from fn(θ + u) by a
    rounding; `apply` writes fn(θ + u) itself where the projection is the last member of its chain.

    Raises:
      TypeError: `fn` is not callable.
      ValueError: when it is used: `fn` gives an array of another shape.
    """
    if not callable(fn):
        raise TypeError(f"project takes a function of an array, not {fn!r}")
    check_selector(where, "project")

    def chosen(paths: Sequence[str], leaves: Sequence[Any]) -> list[float | None]:
        return [1.0 if hit else None for hit in select(where, paths, leaves)]

    return lift(_Project, _Projection(fn), ProjectState, {}, given={"chosen": chosen}, place="behind")


class PlateauState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # factor, patience, threshold, cooldown, min_scale, every
    scale: Array  # ()  what is multiplied by, from 1 down
    best: Array  # ()  the best mean value so far
    bad: Array  # ()  int32, mean values since then that were no better
    cooling: Array  # ()  int32, mean values still to come that do not count
    total: Array  # ()  sum of the values since the last mean
    seen: Array  # ()  int32, their number
    metrics: dict[str, Array]  # plateau_scale


@dataclass(frozen=True)
class _Plateau:
    sign: int  # 1 where less is better, −1 where more is

    def __call__(
        self,
        grads: Any,
        scale: Array,
        best: Array,
        bad: Array,
        cooling: Array,
        total: Array,
        seen: Array,
        *,
        value: Array,
        factor: Array,
        patience: Array,
        threshold: Array,
        cooldown: Array,
        min_scale: Array,
        every: Array,
    ) -> Any:
        total, seen = total + jnp.asarray(value, total.dtype), seen + 1
        due = seen >= every
        mean = total / seen
        improved = ~jnp.isfinite(best) | (self.sign * (best - mean) > threshold * jnp.abs(best))
        better = jnp.isfinite(mean) & improved
        new_bad = jnp.where(better | (cooling > 0), 0, bad + 1)
        reduced = new_bad > patience
        now = {
            "scale": jnp.where(reduced, jnp.maximum(scale * factor, min_scale), scale),
            "best": jnp.where(better, mean, best),
            "bad": jnp.where(reduced, 0, new_bad),
            "cooling": jnp.where(reduced, jnp.asarray(cooldown, jnp.int32), jnp.maximum(cooling - 1, 0)),
        }
        before = {"scale": scale, "best": best, "bad": bad, "cooling": cooling}
        kept = {name: jnp.where(due, now[name], old) for name, old in before.items()}
        memory = (*kept.values(), jnp.where(due, 0, total), jnp.where(due, 0, seen))
        return _scaled(kept["scale"], grads), memory, {"plateau_scale": kept["scale"]}


def _scaled(factor: Array, grads: Any) -> Any:
    return jax.tree.map(lambda g: scale(factor, g), grads)


@constructor
def reduce_on_plateau(
    factor: float | Schedule = 0.1,
    patience: int = 10,
    *,
    threshold: float = 1e-4,
    cooldown: int = 0,
    min_scale: float = 0.0,
    every: int = 1,
    mode: Literal["min", "max"] = "min",
) -> Rule:
    """Smaller steps when a value has stopped to improve: `update(grads, state, params, value=loss)`.

        s ← max(f s, s_min) when the value was no better `patience` + 1 times in a row          u ← s u

    Better means by more than `threshold` times the best so far. `every` values are averaged into one first; behind a
    reduction, `cooldown` of them do not count. A value that is not finite is never better. Put it behind the terminal,
    or between a direction and `step` where decay is not to shrink too; in front of an adaptive direction it has no
    effect. The scale s is recorded as `plateau_scale`.

    Memory: six scalars.

    Differs from PyTorch's `ReduceLROnPlateau`: it multiplies updates and leaves the learning rate to its schedule, and
    takes effect in the very update that is given the value; and from Optax's in counting bad values as PyTorch does,
    and in a threshold relative to |best|, so that values may be negative.

    Raises:
      TypeError: in `update`, `value` is missing.
    """
    if mode not in ("min", "max"):
        raise ValueError(f'mode must be "min" or "max", not {mode!r}')
    sign = 1 if mode == "min" else -1
    return treewise(
        _Plateau(sign),
        PlateauState,
        shared={"scale": 1.0, "best": sign * jnp.inf, "bad": 0, "cooling": 0, "total": 0.0, "seen": 0},
        metrics=("plateau_scale",),
        extra=("value",),
        place="anywhere",
        factor=factor,
        patience=patience,
        threshold=threshold,
        cooldown=cooldown,
        min_scale=min_scale,
        every=every,
    )


class RecordState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # nothing
    metrics: dict[str, Array]  # the value, under its name


@dataclass(frozen=True)
class _Recorder:
    name: str
    fn: Callable[..., Any]

    @property
    def __signature__(self) -> inspect.Signature:
        first, *others = inspect.signature(self.fn).parameters.values()
        keywords = [p for p in others if p.kind is p.KEYWORD_ONLY]
        return inspect.Signature([first.replace(kind=first.POSITIONAL_OR_KEYWORD), *keywords])

    def __call__(self, tree: Any, **keywords: Any) -> Any:
        value = self.fn(tree, **keywords)
        if jnp.shape(value) != ():
            raise ValueError(f"record({self.name!r}) takes scalars, and its function gave the shape {jnp.shape(value)}")
        return value


def _unchanged(g: Array) -> Array:
    return g


@constructor
def record(name: str, fn: Callable[..., Any]) -> Rule:
    """Records a value of your own, fn(tree), in `metrics(state)` under this name; what passes is unchanged.

        chain(adamw(1e-3), record("update_norm", global_norm))
        record("ratio", lambda u, *, p: global_norm(u) / global_norm(p))

    The tree is what passes here: gradients in front of a direction, updates behind the terminal; `None` holds the
    place of what is absent. `fn` may ask for `p` (the parameters), `t` (the number of this update) and extra
    arguments of `update` by keyword-only arguments of these names.

    Memory: one scalar. It costs what `fn` costs: a norm is one more pass over the tree, which is computed for it a
    second time.

    Raises:
      TypeError: `name` is no identifier, or `fn` no function of a tree.
      ValueError: in `update`, `fn` gives no scalar.
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise TypeError(f"record takes an identifier as a name, not {name!r}")
    if not callable(fn) or not inspect.signature(fn).parameters:
        raise TypeError(f"record takes a function of a tree, not {fn!r}")
    recorder = _Recorder(name, fn)
    asked = [p.name for p in recorder.__signature__.parameters.values() if p.kind is p.KEYWORD_ONLY]
    extra = [name for name in asked if name not in ("p", "t")]
    return leafwise(_unchanged, RecordState, measures={name: recorder}, metrics=(name,), extra=extra, place="anywhere")
