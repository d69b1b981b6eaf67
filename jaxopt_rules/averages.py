"""Averages of the parameters, and the parameters to evaluate with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jaxopt_rules import trees
from jaxopt_rules.compose import Wrapper, either, giving_updates
from jaxopt_rules.families import families
from jaxopt_rules.hyperparameters import check
from jaxopt_rules.lift import advanced, copied
from jaxopt_rules.numerics import is_inexact, widened
from jaxopt_rules.rule import Definition, Rule, constructor, definition_of, extra_for
from jaxopt_rules.schedules import Schedule


def eval_params(state: Any, params: Any) -> Any:
    """The parameters to evaluate with: averages where the rule of this state keeps some, else `params` themselves.

    Works for every state, through any nesting: of averages within averages it takes the outermost. Parameters that
    a rule does not know of (another group's, frozen ones) are returned as they are.

    Args:
      state: the state of any rule.
      params: the parameters that are trained, of the tree, shapes and dtypes that are returned.
    """
    for family in reversed(list(families(state))):
        evaluated = getattr(family.state, "eval_params", None)
        params = params if evaluated is None else evaluated(params)
    return params


def _evaluated(params: Any, slot: Any, on_leaf: Callable[[Any, Any], Any]) -> Any:
    """on_leaf(parameter, slot) in the parameter's dtype; a parameter that has no slot is itself."""
    ps, treedef = trees.flatten(params)
    slots = trees.align(treedef, slot, "the state's average", "the parameters")
    pairs = zip(ps, slots, strict=True)
    # Copies: what is evaluated with stays valid when the state is donated.
    return jax.tree.unflatten(
        treedef, [p if p is None or x is None else jnp.array(on_leaf(p, x), p.dtype) for p, x in pairs]
    )


def _where(flag: Array, act: Callable[[], Any], rest: Callable[[], Any]) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(flag, x, y), act(), rest())


class _Plan(NamedTuple):
    """What happens behind one update of the rule inside."""

    scalars: dict[str, Array]  # those of the new state
    due: Array | None  # whether anything happens to the slot; `None`: always
    on_leaf: Callable[[Array, Array], tuple[Array, Array]]  # (new parameter, slot) -> both, where it is due


@dataclass(frozen=True, eq=False)
class _Averaging(Wrapper):
    """What keeps a slot beside the parameters that their new values flow into."""

    slot: str = ""  # its name in the state
    moves: bool = False  # whether the parameters change, too

    def plan(self, state: Any, count: Array, values: Mapping[str, Any]) -> _Plan:
        raise NotImplementedError

    def slot_of(self, p: Any) -> Any:
        return copied(p)

    def scalars(self) -> dict[str, Array]:
        return {}

    def init(self, params: Any) -> Any:
        leaves, treedef = trees.flatten(params)
        slot = [self.slot_of(p) if is_inexact(p) else None for p in leaves]
        return self.State(
            **trees.placed_with(leaves, self.born(**self.scalars())),
            **{self.slot: jax.tree.unflatten(treedef, slot)},
            inner=self.rule.init(params),
        )

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        self.check_state(state)
        if params is None and grads is not None:
            raise TypeError(f"{self.name} needs the parameters: update(grads, state, params)")
        updates, inner = self.rule.update(grads, state.inner, params, **extra_for(self.rule, extra))
        moved = trees.apply_updates(params, updates)
        new, new_state = self._followed(moved, updates, state, inner, _where)
        return self._difference(updates, params, new, state) if self.moves else updates, new_state

    def apply(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        self.check_state(state)
        new, inner = self.rule.apply(grads, state.inner, params, **extra_for(self.rule, extra))
        # What the rule inside leaves as it is, because it is frozen or absent, it returns as the same object.
        acted = jax.tree.map(lambda x, p: None if x is p else x, new, params)
        return self._followed(new, acted, state, inner, either)

    def _followed(
        self, params: Any, like: Any, state: Any, inner: Any, choose: Callable[[Array, Any, Any], Any]
    ) -> tuple[Any, Any]:
        """The parameters behind the step and the new state; nothing happens to what is absent in `like`."""
        values, hyper = self.values(state)
        count = advanced(state.count)
        plan = self.plan(state, count, values)
        present, treedef = trees.flatten(like)
        ps = trees.align(treedef, params, "the parameters")
        slots = trees.align(treedef, getattr(state, self.slot), f"the state's {self.slot}")
        at = [k for k, (x, p) in enumerate(zip(present, ps, strict=True)) if is_inexact(x) and is_inexact(p)]
        if lacking := [k for k in at if slots[k] is None]:
            raise ValueError(
                f"{self.name}: the state has no {self.slot} for {trees.quoted(trees.paths(like)[lacking[0]])}: it was "
                "no trainable array when init ran; init again with the parameters that are trained now"
            )

        def act() -> list[tuple[Any, Any]]:
            return [plan.on_leaf(ps[k], slots[k]) for k in at]

        def rest() -> list[tuple[Any, Any]]:
            return [(ps[k], slots[k]) for k in at]

        changed = act() if plan.due is None else choose(plan.due, act, rest)
        for k, (p, slot) in zip(at, changed, strict=True):
            ps[k], slots[k] = p, slot
        own = plan.scalars | {self.slot: jax.tree.unflatten(treedef, slots)}
        return jax.tree.unflatten(treedef, ps), self.State(count=count, hyper=hyper, **own, inner=inner)

    def _difference(self, updates: Any, params: Any, new: Any, state: Any) -> Any:
        """The updates that lead to `new` where the parameters change, too."""
        due = self.plan(state, advanced(state.count), self.values(state)[0]).due
        us, treedef = trees.flatten(updates)
        parts = (treedef.flatten_up_to(tree) for tree in (params, new))
        leaves = [
            jnp.where(True if due is None else due, x.astype(u.dtype) - p.astype(u.dtype), u) if is_inexact(u) else u
            for u, p, x in zip(us, *parts, strict=True)
        ]
        return jax.tree.unflatten(treedef, leaves)


class LookaheadState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # every, alpha
    slow: Any  # like θ, float32 or wider: the slow weights φ
    inner: Any  # of the rule that moves the fast weights

    def eval_params(self, params: Any) -> Any:
        return _evaluated(params, self.slow, lambda p, slow: slow)


class _Lookahead(_Averaging):
    def plan(self, state: Any, count: Array, values: Mapping[str, Any]) -> _Plan:
        def on_leaf(fast: Array, slow: Array) -> tuple[Array, Array]:
            alpha = values["alpha"].astype(slow.real.dtype)
            slow = slow + alpha * (fast.astype(slow.dtype) - slow)
            return jnp.array(slow, fast.dtype), slow

        return _Plan({}, count % jnp.asarray(values["every"], jnp.int32) == 0, on_leaf)


@constructor
def lookahead(rule: Rule, every: int | Schedule = 6, alpha: float | Schedule = 0.5) -> Definition:
    """Lookahead (Zhang et al. 2019, arXiv:1907.08610, Algorithm 1): k steps of a rule forward, one back.

        θ ← θ + u          at every k-th update:  φ ← φ + α (θ − φ),  θ ← φ

    The parameters stay a plain tree, the fast weights θ; `eval_params(state, params)` are the slow weights φ.

    Memory: one slot, 4 bytes per float32 parameter, besides those of the rule.

    Differs from Optax, whose parameters become a pair of both weights.

    Raises:
      TypeError: `rule` is no rule.
      ValueError: it gives directions, or may do nothing, as `accumulate` does; put those around lookahead.
    """
    member = always_acting(rule, "lookahead")
    check("every", every)
    check("alpha", alpha)
    return _Lookahead(
        State=LookaheadState, hyper={"every": every, "alpha": alpha}, rule=member, slot="slow", moves=True
    )


def always_acting(rule: Any, owner: str) -> Rule:
    member = giving_updates(rule, owner)
    if definition_of(member).gate:
        raise ValueError(
            f"{owner}: {member!r} may do nothing, while {owner} would count the call all the same; put it around "
            f"{owner}, as in accumulate({owner}(rule), every)"
        )
    return member


class AverageState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_decay, where there is a decay
    samples: Array  # ()  int32, parameters that are in the average
    weight: Array  # ()  the sum of their weights
    average: Any  # like θ, float32 or wider
    inner: Any  # of the rule

    def eval_params(self, params: Any) -> Any:
        """The average, and as long as nothing is in it the parameters."""
        return _evaluated(params, self.average, lambda p, mean: jnp.where(self.samples > 0, mean, p.astype(mean.dtype)))


@dataclass(frozen=True, eq=False)
class _Sampling(_Averaging):
    start: int = 0
    every: int = 1

    def scalars(self) -> dict[str, Array]:
        return {"samples": jnp.zeros((), jnp.int32)}

    def due(self, count: Array) -> Array | None:
        if self.start == 0 and self.every == 1:
            return None
        return (count > self.start) & ((count - self.start) % self.every == 0)


@dataclass(frozen=True, eq=False)
class _Average(_Sampling):
    debias: bool = True
    warmup: bool = False

    def scalars(self) -> dict[str, Array]:
        return super().scalars() | {"weight": jnp.array(0.0 if self.debias else 1.0, jnp.result_type(float))}

    def plan(self, state: Any, count: Array, values: Mapping[str, Any]) -> _Plan:
        due, n = self.due(count), state.samples
        following = (n + 1).astype(state.weight.dtype)
        if "one_minus_decay" in values:
            share = values["one_minus_decay"]
            share = jnp.maximum(share, 9 / (9 + following)) if self.warmup else share
            weight = state.weight + share * (1 - state.weight)
            share = share / weight
        else:
            weight, share = jnp.ones_like(state.weight), 1 / following

        def on_leaf(p: Array, average: Array) -> tuple[Array, Array]:
            new = p.astype(average.dtype)
            moved = average + jnp.asarray(share, average.real.dtype) * (new - average)
            # The first is taken as it is, without the rounding of a difference.
            return p, jnp.where(n == 0, new, moved)

        scalars = {"samples": n + 1, "weight": weight.astype(state.weight.dtype)}
        before = {"samples": n, "weight": state.weight}
        return _Plan(scalars if due is None else _where(due, lambda: scalars, lambda: before), due, on_leaf)


class WindowState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # nothing
    samples: Array  # ()  int32, parameters that were taken
    recent: Any  # (window, *shape of θ), float32 or wider: the last of them
    inner: Any  # of the rule

    def eval_params(self, params: Any) -> Any:
        """Their mean, and as long as there are none the parameters."""

        def mean(p: Any, recent: Array) -> Array:
            taken = jnp.minimum(self.samples, recent.shape[0])
            of_taken = (jnp.arange(recent.shape[0]) < taken).reshape(-1, *[1] * p.ndim)
            # By differences, so that the mean of equal numbers is that number.
            total = jnp.sum(jnp.where(of_taken, recent - recent[0], 0), 0)
            joined = recent[0] + total / jnp.maximum(taken, 1).astype(recent.real.dtype)
            return jnp.where(taken > 0, joined, p.astype(joined.dtype))

        return _evaluated(params, self.recent, mean)


@dataclass(frozen=True, eq=False)
class _Window(_Sampling):
    size: int = 1

    def slot_of(self, p: Any) -> Any:
        # Copies of the parameter: where it is absent as a sample is taken, what stands there is no zero.
        recent = jnp.array(jnp.broadcast_to(copied(p), (self.size, *p.shape)))
        sharding = getattr(p, "sharding", None)
        if not isinstance(sharding, jax.sharding.NamedSharding) or isinstance(p, Tracer):
            return recent
        spec = jax.sharding.PartitionSpec(None, *sharding.spec)
        return jax.device_put(recent, jax.sharding.NamedSharding(sharding.mesh, spec))

    def plan(self, state: Any, count: Array, values: Mapping[str, Any]) -> _Plan:
        due, n = self.due(count), state.samples

        def on_leaf(p: Array, recent: Array) -> tuple[Array, Array]:
            return p, recent.at[n % self.size].set(p.astype(recent.dtype))

        return _Plan({"samples": n + (1 if due is None else due)}, due, on_leaf)


@constructor
def average(
    rule: Rule,
    decay: float | Schedule | None = 0.999,
    *,
    debias: bool = True,
    warmup: bool = False,
    start: int = 0,
    every: int = 1,
    window: int | None = None,
) -> Definition:
    """Keeps an average of the parameters beside them: `eval_params(state, params)`.

        EMA                       a ← a + (1 − β)/w (θ − a)          w ← w + (1 − β)(1 − w), from 0
        SWA, `decay=None`         a ← a + (θ − a)/n
        LAWA, `window=k`          a = the mean of the last k

    With `debias` the weights of an EMA are in the ratio of their decay from the first sample on; without, w is 1, and
    the first has the weight of all that were before it, as in PyTorch's `AveragedModel`. The initial parameters are in
    neither. `warmup` uses min(β, (1 + n)/(10 + n)) behind n samples, TensorFlow's `num_updates`. SWA is the plain mean
    (Izmailov et al. 2018, arXiv:1803.05407), LAWA that of the latest weights (Kaddour 2022, arXiv:2209.14981).

    Args:
      rule: the optimizer, whose updates are not changed.
      decay: β, live, or a schedule; `None` for the plain mean.
      start: the number of updates at first that are not averaged; until there is an average, `eval_params` gives the
        parameters.
      every: k: of those behind `start`, each k-th is averaged.
      window: the number of latest parameters of which to take the mean.

    Memory: one slot, 4 bytes per float32 parameter, and `window` of them for LAWA, besides those of the rule.

    Differs from Optax, which has no average of parameters.

    Raises:
      TypeError: `rule` is no rule.
      ValueError: it gives directions or may do nothing, as `accumulate` does; put those around average. Or a number is
        out of range.
    """
    member = always_acting(rule, "average")
    least = {"start": (start, 0), "every": (every, 1)} | ({} if window is None else {"window": (window, 1)})
    for name, (value, low) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"average: {name} must be an integer >= {low}, not {value!r}")
    if window is not None:
        return _Window(State=WindowState, hyper={}, rule=member, slot="recent", size=window, start=start, every=every)
    if decay is not None:
        check("one_minus_decay", decay)
    return _Average(
        State=AverageState,
        hyper={} if decay is None else {"one_minus_decay": decay},
        rule=member,
        slot="average",
        start=start,
        every=every,
        debias=debias or decay is None,
        warmup=warmup,
    )


def incremental_update(new: Any, old: Any, step_size: Any) -> Any:
    """old + step_size · (new − old), in the dtypes of `old`: a target network that follows slowly (Polyak).

    Leaves that are no inexact arrays are taken from `old`.

    Raises:
      ValueError: the trees or the shapes of two leaves differ; names the path.
    """
    return _mixed(new, old, lambda x, y: y + jnp.asarray(step_size, y.real.dtype) * (x - y))


def periodic_update(new: Any, old: Any, count: Any, period: int) -> Any:
    """`new` when `count` is a multiple of `period`, else `old`: a target network that is renewed at times.

    Leaves that are no inexact arrays are taken from `old`.

    Raises:
      ValueError: the trees or the shapes of two leaves differ; names the path.
    """
    renew = jnp.asarray(count) % period == 0
    return _mixed(new, old, lambda x, y: jnp.where(renew, x, y))


def _mixed(new: Any, old: Any, mix: Any) -> Any:
    olds, treedef = trees.flatten(old)
    news = trees.align(treedef, new, "the new tree", "the old one")

    for k, (x, y) in enumerate(zip(news, olds, strict=True)):
        if is_inexact(x) and is_inexact(y) and x.shape != y.shape:
            raise ValueError(f"the new tree has shape {x.shape} at {trees.quoted(trees.paths(old)[k])}, not {y.shape}")

    def leaf(x: Any, y: Any) -> Any:
        if not (is_inexact(x) and is_inexact(y)):
            return y
        wide = widened(y.dtype)
        return mix(x.astype(wide), y.astype(wide)).astype(y.dtype)

    return jax.tree.unflatten(treedef, list(map(leaf, news, olds)))
