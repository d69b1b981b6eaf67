"""Gates: rules around an optimizer that may decide to do nothing.

A step that is not taken costs nothing through `rule.apply`: the decision stands around parameters and inner state
together, so that XLA leaves both where they are. Through `rule.update` the numbers are the same, and the update of a
step that is not taken is −0, the number whose sum with any parameter is that parameter.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxopt_rules import trees
from jaxopt_rules.compose import Wrapper, either, giving_updates
from jaxopt_rules.families import Family, is_record, map_nodes, nodes, per_parameter
from jaxopt_rules.hyperparameters import check
from jaxopt_rules.lift import advanced, zeros
from jaxopt_rules.numerics import global_norm, is_inexact, widened
from jaxopt_rules.rule import Definition, Place, Rule, as_rule, constructor, definition_of, extra_for
from jaxopt_rules.schedules import Schedule


@dataclass(frozen=True, eq=False)
class Gate(Wrapper):
    """A rule that decides whether the rule inside it acts."""

    @property
    def gate(self) -> bool:
        return True

    @property
    def place(self) -> Place:
        return "end"

    def scalars(self) -> dict[str, Any]:
        """What a newborn state has besides count, hyperparameters, and what is of each parameter."""
        return {}

    def init(self, params: Any) -> Any:
        leaves, _ = trees.flatten(params)
        return self.State(
            **trees.placed_with(leaves, self.born(**self.scalars())), **self.slots(params), inner=self.rule.init(params)
        )

    def slots(self, params: Any) -> dict[str, Any]:
        return {}

    def decide(self, grads: Any, state: Any, extra: Mapping[str, Any]) -> "Decision":
        raise NotImplementedError

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        decision = self._decided(grads, state, params, extra)
        handed = extra_for(self.rule, extra)
        _, treedef = trees.flatten(decision.grads)

        def call(grads: Any) -> tuple[list[Any], Any]:
            updates, inner = self.rule.update(grads, state.inner, params, **handed)
            return treedef.flatten_up_to(updates), inner

        def nothing(updates: list[Any]) -> list[Any]:
            return [u if u is None else jnp.full(u.shape, _minus_zero(u), u.dtype) for u in updates]

        def act() -> tuple[list[Any], Any]:
            return decision.run(call, nothing)

        def rest() -> tuple[list[Any], Any]:
            return nothing(jax.eval_shape(act)[0]), state.inner

        updates, inner = either(decision.go, act, rest)
        return jax.tree.unflatten(treedef, updates), decision.state._replace(inner=inner)

    def apply(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        decision = self._decided(grads, state, params, extra)
        handed = extra_for(self.rule, extra)
        leaves, treedef = trees.flatten(params)

        def arrays(tree: Any) -> list[Any]:
            # What is no array cannot come out of a branch, and does not change.
            return [x if is_inexact(p) else None for x, p in zip(trees.flatten(tree)[0], leaves, strict=True)]

        def call(grads: Any) -> tuple[list[Any], Any]:
            new, inner = self.rule.apply(grads, state.inner, params, **handed)
            return arrays(new), inner

        def act() -> tuple[list[Any], Any]:
            return decision.run(call, lambda new: arrays(params))

        def rest() -> tuple[list[Any], Any]:
            return arrays(self.passed(grads, params)), state.inner

        new, inner = either(decision.go, act, rest)
        new = [p if x is None else x for p, x in zip(leaves, new, strict=True)]
        return jax.tree.unflatten(treedef, new), decision.state._replace(inner=inner)

    def passed(self, grads: Any, params: Any) -> Any:
        """The parameters behind a step that is not taken."""
        return params

    def _decided(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> "Decision":
        self.check_state(state)
        if missing := sorted(self.uses - extra.keys()):
            raise TypeError(f"{self.name} needs {', '.join(missing)}: update(grads, state, params, {missing[0]}=...)")
        if params is not None:
            gs, treedef = trees.flatten(grads)
            ps = trees.align(treedef, params, "the parameters")
            for k, (g, p) in enumerate(zip(gs, ps, strict=True)):
                trees.check_gradient(lambda k=k: trees.paths(grads)[k], g, p)
        return self.decide(grads, state, extra)


@dataclass(frozen=True)
class Decision:
    """What a gate has decided for one call."""

    go: Array  # whether the rule inside acts
    grads: Any  # what it is handed
    state: Any  # of the gate, afterwards, but for `inner`

    def run(
        self, call: Callable[[Any], tuple[list[Any], Any]], nothing: Callable[[list[Any]], list[Any]]
    ) -> tuple[list[Any], Any]:
        """Lets the rule inside act.

        Args:
          call: of gradients: the result leaf by leaf (`None` where there is none), and the rule's new state.
          nothing: of a result: the one of a step that is not taken.
        """
        return call(self.grads)


def _minus_zero(x: Any) -> Any:
    return complex(-0.0, -0.0) if jnp.issubdtype(x.dtype, jnp.complexfloating) else -0.0


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation
# ---------------------------------------------------------------------------------------------------------------------


class AccumulateState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # every
    metrics: dict[str, Array]  # micro_step: micro-batches since the last update; dropped: those ever left out; int32
    kept: Array  # ()  int32, micro-batches that are in the mean
    seen: Any  # () bool for each parameter: whether it had a gradient in one of them
    mean: Any  # like θ, float32 or wider: mean (or sum) of their gradients
    inner: Any  # of the rule


@dataclass(frozen=True)
class _MeanDecision(Decision):
    seen: list[Any]  # for each leaf, whether it had a gradient in this cycle
    absent: list[bool]  # those that have none in this call
    inner: Any  # the rule's state so far
    takes_none: bool  # whether the rule takes a missing gradient, as those of other libraries do not

    def run(self, call: Any, nothing: Any) -> tuple[list[Any], Any]:
        doubtful = [flag for flag, absent in zip(self.seen, self.absent, strict=True) if absent]
        if not doubtful:
            return call(self.grads)
        leaves, treedef = trees.flatten(self.grads)

        def without() -> tuple[list[Any], Any]:
            """None of them had one in this cycle: the rule does not see them, and they are in no norm of its."""
            present = [None if absent else g for g, absent in zip(leaves, self.absent, strict=True)]
            result, inner = call(jax.tree.unflatten(treedef, present))
            idle = nothing(jax.eval_shape(lambda: call(self.grads)[0]))
            return [y if x is None else x for x, y in zip(result, idle, strict=True)], inner

        def together() -> tuple[list[Any], Any]:
            """Those that had none take no part: their step is undone."""
            result, inner = call(self.grads)
            keep = [flag if absent else None for flag, absent in zip(self.seen, self.absent, strict=True)]
            return _selected(keep, result, nothing(result)), _selected_slots(treedef, keep, inner, self.inner)

        if not self.takes_none:
            return together()
        return either(functools.reduce(jnp.logical_or, doubtful), together, without)


@dataclass(frozen=True, eq=False)
class _Accumulate(Gate):
    sums: bool
    drops: bool

    @property
    def defers(self) -> bool:
        return True

    def scalars(self) -> dict[str, Any]:
        zero = jnp.zeros((), jnp.int32)
        return {"metrics": {"micro_step": zero, "dropped": jnp.zeros_like(zero)}, "kept": jnp.zeros_like(zero)}

    def slots(self, params: Any) -> dict[str, Any]:
        leaves, treedef = trees.flatten(params)
        flags = [jnp.zeros((), jnp.bool_) if is_inexact(p) else None for p in leaves]
        means = [zeros(p) if is_inexact(p) else None for p in leaves]
        return {
            "seen": trees.placed_with(leaves, jax.tree.unflatten(treedef, flags)),
            "mean": jax.tree.unflatten(treedef, means),
        }

    def decide(self, grads: Any, state: AccumulateState, extra: Mapping[str, Any]) -> Decision:
        values, hyper = self.values(state)
        means, treedef = trees.flatten(state.mean)
        gs = _spread(grads, state.mean)
        for k, (g, m) in enumerate(zip(gs, means, strict=True)):
            trees.check_gradient(lambda k=k: trees.paths(state.mean)[k], g, m)
            if is_inexact(g) and m is None:
                raise ValueError(
                    f"{self.name}: the state has no mean for {trees.quoted(trees.paths(state.mean)[k])}: it was no "
                    "trainable array when init ran; init again with the parameters that are trained now"
                )
        absent = [m is not None and not is_inexact(g) for m, g in zip(means, gs, strict=True)]
        usable = jnp.isfinite(global_norm(gs)) if self.drops else jnp.ones((), jnp.bool_)
        first, kept = state.kept == 0, state.kept + usable

        def added(m: Array, g: Any) -> Array:
            new = g.astype(m.dtype) if is_inexact(g) else jnp.zeros_like(m)
            change = new if self.sums else (new - m) * (1 / (state.kept + 1).astype(m.real.dtype))
            # Setting the old mean to zero behind an update would be one more pass over it.
            joined = jnp.where(first, new, m + change)
            return jnp.where(usable, joined, m) if self.drops else joined

        mean = [m if m is None else added(m, g) for m, g in zip(means, gs, strict=True)]
        flags, _ = trees.flatten(state.seen)
        seen = [
            f if f is None else jnp.where(usable, (f & ~first) | (not missing), f)
            for f, missing in zip(flags, absent, strict=True)
        ]
        micro_step = state.metrics["micro_step"] + 1
        due = micro_step >= values["every"]
        go = due & (kept > 0)

        new_state = AccumulateState(
            count=jnp.where(go, advanced(state.count), state.count),
            hyper=hyper,
            metrics={
                "micro_step": jnp.where(due, 0, micro_step),
                "dropped": state.metrics["dropped"] + ~usable,
            },
            kept=jnp.where(due, 0, kept),
            seen=jax.tree.unflatten(treedef, seen),
            mean=jax.tree.unflatten(treedef, mean),
            inner=None,
        )
        takes_none = definition_of(self.rule).takes_none
        return _MeanDecision(go, jax.tree.unflatten(treedef, mean), new_state, seen, absent, state.inner, takes_none)


def _spread(grads: Any, like: Any) -> list[Any]:
    """The gradients leaf by leaf of a tree like the parameters, where one `None` may stand for a part of it."""
    gs, treedef = trees.flatten(grads)
    spread: list[Any] = []
    for g, part in zip(gs, trees.align(treedef, like, "the state's mean"), strict=True):
        spread += [g] * len(trees.flatten(part)[0])
    return spread


def _selected(keep: Sequence[Any], new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """For each leaf, the new one where its flag holds and else the old one; without a flag, the new one."""
    return [
        x if flag is None else jax.tree.map(lambda x, y, flag=flag: jnp.where(flag, x, y), x, y)
        for flag, x, y in zip(keep, new, old, strict=True)
    ]


def _selected_slots(treedef: Any, keep: Sequence[Any], new: Any, old: Any) -> Any:
    before = {node.place: node.state for node in nodes(old)}

    def select(node: Family) -> Any:
        if not is_record(node.state):
            return node.state
        slots = {}
        for name in node.slots:
            after = per_parameter(treedef, node, getattr(node.state, name))
            if after is not None:
                previous = treedef.flatten_up_to(getattr(before[node.place], name))
                slots[name] = jax.tree.unflatten(treedef, _selected(keep, after, previous))
        return node.state._replace(**slots)

    return map_nodes(select, new)


@constructor
def accumulate(
    rule: Rule,
    every: int | Schedule,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    nonfinite: Literal["drop", "keep"] = "drop",
) -> Definition:
    """One update from the gradients of k micro-batches: the rule acts in every k-th call.

        ḡ ← ḡ + (g − ḡ)/n          at every k-th call: the rule acts on ḡ, and the next cycle begins

    Between, a call through `apply` costs one pass that adds the gradients, and no temporary. `every` may be a
    schedule of the number of finished updates, or be set in the state. `count` and all clocks inside tell finished
    updates, `metrics(state)["micro_step"]` the micro-batches since the last one (0 behind an update). Clipping inside,
    `accumulate(chain(clip, adamw), k)`, clips the mean; in front, `chain(clip, accumulate(adamw, k))`, each
    micro-batch, and with "drop" XLA keeps what was clipped, for the test and for the sum. Extra arguments are those of
    the k-th call.

    Args:
      rule: an optimizer; where it may do nothing itself (`skip_nonfinite`), it is asked in every k-th call.
      every: k.
      reduce: whether the rule sees the mean of the gradients or their sum.
      nonfinite: "drop" leaves out a micro-batch whose gradients have a norm that is not finite, and counts it in
        `metrics(state)["dropped"]`; the mean is that of the others, and where there are none nothing is updated.
        "keep" adds it like any other: that update is not finite, the next cycle is clean. It saves reading the
        gradients a second time.

    A missing gradient (`None`) counts as zero where the parameter has one in another micro-batch of the cycle; a
    parameter without any in the whole cycle takes no part. (In a cycle in which, of the parameters that have no
    gradient in its last call, some had one before and others had none at all, norms inside see the latter as zeros.)

    Memory: one slot, 4 bytes per float32 parameter, besides those of the rule.

    Raises:
      TypeError: `rule` is no rule.
      ValueError: it gives directions: what stands behind a gate would act in every call; or it accumulates already.
    """
    member = giving_updates(rule, "accumulate")
    if definition_of(member).defers:
        raise ValueError(f"accumulate: {member!r} accumulates already; one cycle of a · b calls does the same")
    check("every", every)
    for name, value, known in (("reduce", reduce, ("mean", "sum")), ("nonfinite", nonfinite, ("drop", "keep"))):
        if value not in known:
            raise ValueError(f"accumulate: {name} must be {known[0]!r} or {known[1]!r}, not {value!r}")
    return _Accumulate(
        State=AccumulateState,
        hyper={"every": every},
        rule=member,
        sums=reduce == "sum",
        drops=nonfinite == "drop",
    )


def microbatch(loss_fn: Callable[..., Any], k: int, *, has_aux: bool = False) -> Callable[..., Any]:
    """`jax.value_and_grad(loss_fn)` computed on k parts of the batch, one after another.

        loss, grads = microbatch(loss_fn, 4)(params, x, y)

    The scan form of accumulation: one call sees the whole batch and needs the memory of a k-th of it. The gradients
    are the mean of those of the parts in float32 or wider, which for a loss that is a mean over the batch is the
    gradient of the whole; they have the dtypes of the parameters.

    Args:
      loss_fn: `loss_fn(params, *batch, **others)`, a scalar, or a pair of it and `aux` with `has_aux`.
      k: the number of parts. Every array of `batch` is split along its first axis; `others` are handed on whole.

    Returns:
      A function of the same arguments that returns (loss, grads), or ((loss, aux), grads), where `aux` is stacked:
      its first axis is that of the parts.

    Raises:
      ValueError: when called: an array of the batch has no first axis that k divides; names it.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"microbatch: k must be an integer >= 1, not {k!r}")

    def value_and_grad(params: Any, *batch: Any, **others: Any) -> Any:
        for path, x in trees.flatten_with_paths(batch)[0]:
            if jnp.ndim(x) == 0 or jnp.shape(x)[0] % k:
                raise ValueError(
                    f"microbatch: the array {trees.quoted(path)} of the batch has shape {jnp.shape(x)}, whose first "
                    f"axis is not divisible by {k}; pass what is no batch by keyword"
                )
        parts = jax.tree.map(lambda x: jnp.reshape(x, (k, jnp.shape(x)[0] // k, *jnp.shape(x)[1:])), batch)
        leaves, treedef = trees.flatten(params)
        trained = [i for i, p in enumerate(leaves) if is_inexact(p)]

        def loss(arrays: list[Array], part: Any) -> Any:
            whole = list(leaves)
            for i, p in zip(trained, arrays, strict=True):
                whole[i] = p
            return loss_fn(jax.tree.unflatten(treedef, whole), *part, **others)

        arrays = [jnp.asarray(leaves[i]) for i in trained]

        def body(carry: Any, part: Any) -> Any:
            total, sums = carry
            value, grads = jax.value_and_grad(loss, has_aux=has_aux)(arrays, part)
            value, aux = value if has_aux else (value, None)
            sums = [s + g.astype(s.dtype) for s, g in zip(sums, grads, strict=True)]
            return (total + value.astype(total.dtype), sums), aux

        shapes = jax.eval_shape(loss, arrays, jax.tree.map(lambda x: x[0], parts))
        value = shapes[0] if has_aux else shapes
        start = jnp.zeros(value.shape, widened(value.dtype)), [zeros(p) for p in arrays]
        (total, sums), aux = lax.scan(body, start, parts)
        grads: list[Any] = [None] * len(leaves)
        for i, p, s in zip(trained, arrays, sums, strict=True):
            grads[i] = (s / k).astype(p.dtype)
        mean = (total / k).astype(value.dtype)
        return ((mean, aux) if has_aux else mean), jax.tree.unflatten(treedef, grads)

    return value_and_grad


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are not taken
# ---------------------------------------------------------------------------------------------------------------------


class SkipState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # nothing
    metrics: dict[str, Array]  # grad_norm; skipped: () int32, steps ever not taken; in_a_row: () int32, the last ones
    inner: Any  # of the rule


def _skip_metrics(**recorded: Array) -> dict[str, Any]:
    return {"metrics": recorded | {"skipped": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)}}


def _counted(state: Any, go: Array, **recorded: Array) -> dict[str, Array]:
    return recorded | {
        "skipped": state.metrics["skipped"] + ~go,
        "in_a_row": jnp.where(go, 0, state.metrics["in_a_row"] + 1),
    }


class _SkipNonfinite(Gate):
    def scalars(self) -> dict[str, Any]:
        return _skip_metrics(grad_norm=jnp.zeros((), jnp.result_type(float)))

    def decide(self, grads: Any, state: SkipState, extra: Mapping[str, Any]) -> Decision:
        norm = global_norm(grads).astype(state.metrics["grad_norm"].dtype)
        go = jnp.isfinite(norm)
        count = jnp.where(go, advanced(state.count), state.count)
        return Decision(go, grads, SkipState(count, {}, _counted(state, go, grad_norm=norm), None))


@constructor
def skip_nonfinite(rule: Rule) -> Definition:
    """Takes no step where the global norm of the gradients is not finite.

        n = √(Σ |g|²)          n finite: the rule acts          else: nothing changes, s ← s + 1

    Parameters, slots, counters and schedules inside stay as they are to the bit, however often that happens; what
    stands in front in a chain has run. Recorded are the norm (`grad_norm`) and the numbers of steps not taken, ever
    (`skipped`) and up to now (`in_a_row`). In float32 the norm is infinite from gradients of 1.8e19 on, too.

    Memory: that of the rule.

    Differs from Optax's `apply_if_finite`, which takes a NaN after a number of them, and under `jax.vmap` evaluates
    the same here and there: both, and selects.

    Raises:
      TypeError: `rule` is no rule.
      ValueError: it gives directions: what stands behind a gate would act all the same.
    """
    return _SkipNonfinite(State=SkipState, hyper={}, rule=giving_updates(rule, "skip_nonfinite"))


class SpikeState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # sigmas
    metrics: dict[str, Array]  # grad_norm or value; skipped: () int32, steps ever not taken; in_a_row: () int32
    seen: Array  # ()  int32, finite values that have come in
    history: Array  # (window,)  the last of them
    inner: Any  # of the rule


@dataclass(frozen=True, eq=False)
class _SkipSpikes(Gate):
    window: int
    of: str

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"value"} if self.of == "value" else ())

    def scalars(self) -> dict[str, Any]:
        zero = jnp.zeros((), jnp.result_type(float))
        history = jnp.zeros(self.window, zero.dtype)
        return _skip_metrics(**{self.of: zero}) | {"seen": jnp.zeros((), jnp.int32), "history": history}

    def decide(self, grads: Any, state: SpikeState, extra: Mapping[str, Any]) -> Decision:
        values, hyper = self.values(state)
        norm = global_norm(grads)
        # A copy: the state shares no buffer with what the caller holds.
        x = jnp.array(extra["value"] if self.of == "value" else norm, state.history.dtype)
        known = jnp.minimum(state.seen, self.window)
        present = jnp.arange(self.window) < known
        mean = jnp.sum(jnp.where(present, state.history, 0)) / jnp.maximum(known, 1)
        variance = jnp.sum(jnp.where(present, (state.history - mean) ** 2, 0)) / jnp.maximum(known - 1, 1)
        spike = (known >= max(2, self.window // 2)) & (x > mean + values["sigmas"] * jnp.sqrt(variance))
        finite = jnp.isfinite(x)
        go = finite & jnp.isfinite(norm) & ~spike
        place = state.seen % self.window
        new_state = SpikeState(
            count=jnp.where(go, advanced(state.count), state.count),
            hyper=hyper,
            metrics=_counted(state, go, **{self.of: x}),
            seen=jnp.where(finite, advanced(state.seen), state.seen),
            history=state.history.at[place].set(jnp.where(finite, x, state.history[place])),
            inner=None,
        )
        return Decision(go, grads, new_state)


@constructor
def skip_spikes(
    rule: Rule,
    window: int = 128,
    sigmas: float | Schedule = 6.0,
    *,
    of: Literal["grad_norm", "value"] = "grad_norm",
) -> Definition:
    """Takes no step where the gradient norm, or the loss, stands out from its last values.

        x > mean + σ · std, over the last `window` finite x:  nothing changes, s ← s + 1          else: the rule acts

    As in OLMo's SkipStepOptimizer (Groeneveld et al. 2024): a spike enters the window like any value, so that a
    lasting change of level is accepted after a while, and nothing is skipped before half of the window is filled. A
    step whose gradients or whose x are not finite is not taken, and does not enter. What stays and what is recorded
    is as in `skip_nonfinite`, with x itself under the name `of`.

    Args:
      rule: an optimizer.
      window: the number of values that x is compared with.
      sigmas: how many standard deviations above their mean are accepted; live.
      of: what x is: "grad_norm", the global norm, or "value", which `update` is given: `value=loss`.

    Memory: that of the rule, and `window` scalars.

    Raises:
      TypeError: `rule` is no rule; in `update`, `value` is missing.
      ValueError: the rule gives directions, or an argument is out of range.
    """
    member = giving_updates(rule, "skip_spikes")
    check("sigmas", sigmas)
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(f"skip_spikes: window must be an integer >= 2, not {window!r}")
    if of not in ("grad_norm", "value"):
        raise ValueError(f'skip_spikes: of must be "grad_norm" or "value", not {of!r}')
    return _SkipSpikes(State=SpikeState, hyper={"sigmas": sigmas}, rule=member, window=window, of=of)


class WhenState(NamedTuple):
    count: Array  # ()  int32, calls
    hyper: dict[str, Any]  # nothing
    inner: Any  # of the rule


@dataclass(frozen=True, eq=False)
class _When(Gate):
    condition: Callable[..., Any]

    @property
    def gate(self) -> bool:
        """Whether it stands for an optimizer; all others let pass what comes in."""
        return self.place in ("end", None)

    @property
    def place(self) -> Any:
        return definition_of(self.rule).place

    @property
    def uses(self) -> frozenset[str]:
        parameters = list(inspect.signature(self.condition).parameters.values())
        return frozenset(p.name for p in parameters[1:] if p.kind is p.KEYWORD_ONLY)

    def decide(self, grads: Any, state: WhenState, extra: Mapping[str, Any]) -> Decision:
        go = jnp.asarray(self.condition(state.count, **{name: extra[name] for name in self.uses}), jnp.bool_)
        return Decision(go, grads, WhenState(advanced(state.count), {}, None))

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        if self.gate:
            return super().update(grads, state, params, extra)
        decision = self._decided(grads, state, params, extra)

        def act() -> tuple[Any, Any]:
            return self.rule.update(grads, state.inner, params, **extra_for(self.rule, extra))

        def rest() -> tuple[Any, Any]:
            results, _ = jax.eval_shape(act)
            shapes, treedef = trees.flatten(results)
            gs = trees.align(treedef, grads, "the gradients", "what the rule gives")
            passed = [x if x is None else g.astype(x.dtype) for x, g in zip(shapes, gs, strict=True)]
            return jax.tree.unflatten(treedef, passed), state.inner

        results, inner = either(decision.go, act, rest)
        return results, decision.state._replace(inner=inner)

    def passed(self, grads: Any, params: Any) -> Any:
        return params if self.gate else trees.apply_updates(params, grads)


@constructor
def when(rule: Rule, condition: Callable[..., Any]) -> Definition:
    """A rule that acts in those calls alone for which a condition holds.

        when(clip_by_global_norm(1.0), lambda count: count < 1000)
        when(adamw(1e-3), lambda count, *, value: value < 10.0)

    In the others an optimizer changes nothing, and what stands in front of one or behind it lets pass what comes in;
    state, counters and schedules of the rule stay as they are to the bit.

    Args:
      rule: any rule.
      condition: from `count`, the number of calls before this one, to a boolean scalar; it may ask for extra arguments
        of `update` by keyword-only arguments of their names. `count` is traced under `jax.jit`.

    Memory: that of the rule.

    Raises:
      TypeError: `rule` is no rule, or `condition` not callable; in `update`, an extra argument is missing.
    """
    if not callable(condition):
        raise TypeError(f"when takes a condition, a function of count, not {condition!r}")
    return _When(State=WhenState, hyper={}, rule=as_rule(rule, "when"), condition=condition)
