"""Training of many members at once: what sweeps, comparisons, range tests and histories run.

A member is a rule at one point of a grid, begun from one seed. A `Program` is compiled once; a `Block` is some members
that it trains side by side, as far as it is told to.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxopt_rules import trees
from jaxopt_rules.averages import eval_params
from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.rule import Rule, as_rule, extra_for

Point = Mapping[str, Any]  # keyword arguments of a function that makes a rule

TAIL = 0.1  # the part of the steps whose mean loss is a run's loss
PART = 0.25  # seconds between two looks at Ctrl-C

# ---------------------------------------------------------------------------------------------------------------------
# What is learnt
# ---------------------------------------------------------------------------------------------------------------------


class Task:
    """What is to be learnt, whatever the rule.

    Args:
      loss_fn: `loss_fn(params, batch) -> loss`, or with `has_aux` `(loss, {name: scalar})`.
      params: the parameters at the start, a pytree, or a function of a PRNG key that makes them. What is no array of
        floating-point numbers is left as it is.
      batches: a pytree of arrays with an axis of batches in front; or a list or another iterable of batches, of which
        `steps` are taken; or a function of a seed that gives one of these.
      steps: how many updates; `None`: as many as there are batches. Where there are fewer, they come again.
      seeds: the seeds that `params` and `batches` are called with: those given, or as many as this, from 0.
      evaluate: a function of the parameters that gives a scalar, or a dict of scalars, at the end. Where the rule keeps
        an average, it is given that.

    Raises:
      TypeError, ValueError: what is given cannot be trained on; says what is wrong with it.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        params: Any,
        batches: Any,
        steps: int | None = None,
        *,
        seeds: int | Iterable[int] = 1,
        has_aux: bool = False,
        evaluate: Callable[[Any], Any] | None = None,
    ) -> None:
        self.loss_fn, self.has_aux, self.evaluate = loss_fn, has_aux, evaluate
        self.seeds = _listed(seeds)
        if steps is not None and not (_is_whole(steps) and steps >= 1):
            raise ValueError(f"steps must be an integer >= 1, not {steps!r}")
        self._set_data(batches, steps)
        self._set_starts(params)
        if len(self.seeds) > 1 and not (self.seeded_data or _is_function(params)):
            raise ValueError(
                f"{len(self.seeds)} seeds would give the same run: let params be a function of a key, or batches one "
                "of a seed"
            )
        self.steps = self.batch_count if steps is None else int(steps)
        self.evaluated_names = self._names_of_evaluated()

    def _set_data(self, batches: Any, steps: int | None) -> None:
        self.seeded_data = _is_function(batches)
        drawn = (
            [_stacked(batches(seed), steps) for seed in self.seeds] if self.seeded_data else [_stacked(batches, steps)]
        )
        counts = sorted(set(map(_count, drawn)))
        if len(counts) > 1:
            raise ValueError(f"batches gave {' and '.join(map(str, counts))} batches for different seeds")
        self.batch_count = counts[0]
        # (batches, ...), or (seeds, batches, ...) where they differ
        self.data = jax.tree.map(jnp.asarray, _joined(drawn) if self.seeded_data else drawn[0])

    def _set_starts(self, params: Any) -> None:
        begun = (
            [params(jax.random.key(seed)) for seed in self.seeds]
            if _is_function(params)
            else [params] * len(self.seeds)
        )
        self._leaves, self._treedef = trees.flatten(begun[0])
        self._trained = [is_inexact(leaf) for leaf in self._leaves]
        if not any(self._trained):
            raise ValueError("params has no array of floating-point numbers to train")
        self.starts = [jnp.asarray(x, x.dtype) for x in _joined([self.arrays(tree) for tree in begun])]  # (seeds, ...)

    def arrays(self, params: Any) -> list[Array]:
        """Those of its leaves that are trained."""
        return [leaf for leaf, trained in zip(trees.flatten(params)[0], self._trained, strict=True) if trained]

    def tree(self, arrays: Sequence[Any], others: bool = True) -> Any:
        """The parameters with these arrays, or, without the others, gradients of them."""
        rest = iter(arrays)
        leaves = [
            next(rest) if trained else leaf if others else None
            for leaf, trained in zip(self._leaves, self._trained, strict=True)
        ]
        return jax.tree.unflatten(self._treedef, leaves)

    def start(self) -> Any:
        """The parameters that the first seed begins with."""
        return self.tree([x[0] for x in self.starts])

    def batch(self, data: Any, i: Any) -> Any:
        """That of step i, with an axis of seeds in front where seeds have batches of their own."""
        axis = int(self.seeded_data)
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i % self.batch_count, axis, keepdims=False), data)

    def loss(self, params: Any, batch: Any) -> tuple[Array, dict[str, Array]]:
        found = self.loss_fn(params, batch)
        loss, aux = found if self.has_aux else (found, {})
        if not _is_scalar(loss):
            hint = "; with has_aux=True it may give (loss, {name: scalar})" if isinstance(found, tuple) else ""
            raise TypeError(f"loss_fn must give a scalar, not {_described(loss)}{hint}")
        if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(f"loss_fn must give a floating-point number, not {jnp.result_type(loss)}")
        _check_scalars(aux, "with has_aux=True, loss_fn must give (loss, {name: scalar})")
        if "loss" in aux:
            raise ValueError("what loss_fn gives beside the loss cannot be called 'loss'")
        return loss, dict(aux)

    def evaluated(self, params: Any) -> dict[str, Array]:
        if self.evaluate is None:
            return {}
        found = self.evaluate(params)
        values = dict(found) if isinstance(found, Mapping) else {"score": found}
        _check_scalars(values, "evaluate must give a scalar or {name: scalar}")
        if "loss" in values:
            raise ValueError("what evaluate gives cannot be called 'loss', as that of the last steps is; test_loss?")
        return values

    def _names_of_evaluated(self) -> tuple[str, ...]:
        """In the order of `evaluate`, which dicts that come out of a compiled function have lost."""
        names: list[str] = []
        jax.eval_shape(lambda arrays: names.extend(self.evaluated(self.tree(arrays))), [x[0] for x in self.starts])
        return tuple(names)


def _is_function(x: Any) -> bool:
    """Whether this is a function, and no tree of arrays that can also be called, as modules can."""
    return callable(x) and jax.tree.leaves(x) == [x]


def _is_scalar(x: Any) -> bool:
    return (hasattr(x, "dtype") and jnp.shape(x) == ()) or isinstance(x, int | float)


def _check_scalars(values: Any, text: str) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"{text}, not {_described(values)}")
    for name, value in values.items():
        if not isinstance(name, str) or not _is_scalar(value):
            raise TypeError(f"{text}, not {{{name!r}: {_described(value)}}}")


def _listed(seeds: Any) -> tuple[int, ...]:
    listed = list(range(seeds)) if _is_whole(seeds) else list(seeds) if isinstance(seeds, Iterable) else []
    if not listed or not all(map(_is_whole, listed)) or len(set(listed)) < len(listed):
        raise ValueError(f"seeds must be a number from 1, or different integers, not {seeds!r}")
    return tuple(map(int, listed))


def _is_whole(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _described(x: Any) -> str:
    return f"an array of shape {jnp.shape(x)}" if hasattr(x, "dtype") else f"{type(x).__name__}"


def _joined(same: Sequence[Any]) -> Any:
    """Trees as one, with a new axis in front."""

    def join(*parts: Any) -> Any:
        # PRNG keys are no numbers to NumPy, which compiles nothing for the others.
        return jnp.stack(parts) if trees.is_key(parts[0]) else np.stack([np.asarray(x) for x in parts])

    return jax.tree.map(join, *same)


def _stacked(batches: Any, steps: int | None) -> Any:
    """Batches as arrays with an axis of batches in front. A list is one of batches, a tuple one of arrays."""
    if hasattr(batches, "shape") or isinstance(batches, tuple | Mapping) or not isinstance(batches, Iterable):
        return batches
    taken = list(batches if steps is None else itertools.islice(batches, steps))
    if not taken:
        raise ValueError("batches is empty")
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(batch)] for batch in taken]
    if unlike := [k for k, shape in enumerate(shapes) if shape != shapes[0]]:
        raise ValueError(
            f"batches must have the same shapes; number 0 has {shapes[0]} and number {unlike[0]} {shapes[unlike[0]]} "
            "(of a DataLoader, drop_last=True leaves out the last, shorter one)"
        )
    return _joined(taken)


def _count(batches: Any) -> int:
    leaves = jax.tree.leaves(batches)
    if not leaves or any(jnp.ndim(x) == 0 for x in leaves):
        raise ValueError("batches must be arrays with an axis of batches in front, or an iterable of batches")
    lengths = sorted({len(x) for x in leaves})
    if len(lengths) > 1 or lengths[0] == 0:
        raise ValueError(f"the arrays of batches have {' and '.join(map(str, lengths))} batches")
    return lengths[0]


# ---------------------------------------------------------------------------------------------------------------------
# How it is learnt
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What there is to record of one step."""

    loss: Array
    aux: dict[str, Array]
    grads: Any
    before: Any  # parameters
    after: Any
    state: Any  # behind the step


Record = Callable[[Step], dict[str, Array]]


def losses(step: Step) -> dict[str, Array]:
    """The loss, and what the loss function gives beside it."""
    return {"loss": step.loss, **step.aux}


class Program:
    """A training of members, compiled once for all blocks of a shape.

    `make(**point)` is called with the numbers of each point, for the states that members are born with: of a decay rate
    they hold 1 − β, which is right when it is taken in double. And it is called with traced numbers, for the update, so
    that what it makes of them, such as a schedule, is right for each member.

    Args:
      points: all that it is to train, alike but for the arguments named in `live`, which are numbers.
      record: what is kept of each step, a dict of scalars.

    Raises:
      TypeError: states of different points differ in structure (when a block of them begins).
      Exception: whatever `make` raises for traced numbers that it has to know.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        points: Sequence[Point],
        live: Sequence[str],
        task: Task,
        record: Record = losses,
    ) -> None:
        fixed = {name: value for name, value in points[0].items() if name not in live}
        self.task, self._record = task, record
        self._make = lambda values: rule_of(make, fixed | values)
        self.rules = [rule_of(make, point) for point in points]
        self.values = {name: as_numbers([point[name] for point in points]) for name in live}
        # Traced once, for the shapes of what it gives and for the program.
        self._compiled_step = jax.jit(self._step)
        values = {name: jax.ShapeDtypeStruct((), x.dtype) for name, x in self.values.items()}
        arrays = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in task.starts]
        (_, state), self._recorded = jax.eval_shape(self._first_step, values, arrays, task.data)
        self._member = arrays, state
        self.state_bytes = _bytes(state)
        self.member_bytes = self.state_bytes + 2 * _bytes(arrays)
        self.compile_seconds = 0.0
        self.step_seconds: float | None = None  # of the last steps of a block
        self._compiled: dict[Any, Future[Callable[..., Any]]] = {}

    def _first_step(self, values: dict[str, Array], arrays: list[Array], data: Any) -> Any:
        batch = self.task.batch(data, 0)
        if self.task.seeded_data:
            batch = jax.tree.map(lambda x: x[0], batch)
        return self._compiled_step(values, (arrays, self._make(values).init(self.task.tree(arrays))), batch)

    def _step(self, values: dict[str, Array], member: tuple[list[Array], Any], batch: Any) -> tuple[Any, Any]:
        task = self.task
        arrays, state = member

        def loss_of(arrays: list[Array]) -> tuple[Array, dict[str, Array]]:
            return task.loss(task.tree(arrays), batch)

        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(arrays)
        before, grads = task.tree(arrays), task.tree(grads, others=False)
        rule = self._make(values)
        extra = {"value": loss, "grad": grads, "value_fn": lambda params: task.loss(params, batch)[0]}
        after, state = rule.apply(grads, state, before, **extra_for(rule, extra))
        return (task.arrays(after), state), self._record(Step(loss, aux, grads, before, after, state))

    def begin(self, points: np.ndarray, starts: list[Array]) -> Any:
        """What `_advance` begins with: parameters and states, (points, seeds, ...), and curves, (steps, points, seeds).

        States are born one by one, outside of any program, and joined without one: that compiles nothing.
        """
        shape = len(points), len(starts[0])
        states = [self._born(self.rules[k], starts) for k in points]
        arrays = [np.broadcast_to(np.asarray(x), (len(points), *x.shape)) for x in starts]
        curves = {name: np.zeros((self.task.steps, *shape), x.dtype) for name, x in self._recorded.items()}
        return (arrays, _joined(states)), curves

    def _born(self, rule: Rule, starts: list[Array]) -> Any:
        """The states of a rule, (seeds, ...)."""

        def born(arrays: list[Array]) -> Any:
            return rule.init(self.task.tree(arrays))

        # Most have one seed, and batched operations take longer.
        state = jax.vmap(born)(starts) if len(starts[0]) > 1 else _joined([born([x[0] for x in starts])])
        if jax.tree.structure(state) != jax.tree.structure(self._member[1]):
            raise TypeError(f"{rule} has a state of another structure than the other points of the grid")
        return state

    def _advance(self, carry: Any, values: dict[str, Array], data: Any, start: Array, stop: Array) -> Any:
        step = _over(self._compiled_step, points=(0, 0, None), seeds=(None, 0, 0 if self.task.seeded_data else None))

        def body(i: Array, carry: Any) -> Any:
            members, curves = carry
            members, recorded = step(values, members, self.task.batch(data, i))
            return members, {
                name: lax.dynamic_update_index_in_dim(curve, recorded[name], i, 0) for name, curve in curves.items()
            }

        return lax.fori_loop(start, stop, body, carry)

    def _evaluate(self, members: Any) -> dict[str, Array]:
        def member(arrays: list[Array], state: Any) -> dict[str, Array]:
            return self.task.evaluated(eval_params(state, self.task.tree(arrays)))

        return _over(member, points=(0, 0), seeds=(0, 0))(*members)

    def carry_like(self, points: int, seeds: int) -> Any:
        """The shapes and dtypes of what `_advance` carries."""

        def stacked(x: Any) -> Any:
            return jax.ShapeDtypeStruct((points, seeds, *x.shape), x.dtype)

        shape = self.task.steps, points, seeds
        curves = {name: jax.ShapeDtypeStruct(shape, x.dtype) for name, x in self._recorded.items()}
        return jax.tree.map(stacked, self._member), curves

    def compiled(self, function: str, *args: Any, donate: Sequence[int] = ()) -> "Future[Callable[..., Any]]":
        """One of the functions above, being compiled for arguments like these while other things are done."""
        leaves, treedef = jax.tree.flatten(args)
        key = function, treedef, tuple(map(jax.typeof, leaves))
        if key not in self._compiled:
            began = time.perf_counter()
            lowered = jax.jit(getattr(self, function), donate_argnums=donate).lower(*args)

            future: Future[Callable[..., Any]] = Future()

            def compile_it() -> Callable[..., Any]:
                program = lowered.compile()
                self.compile_seconds += time.perf_counter() - began
                return program

            # A daemon, which does not keep a program from ending that was interrupted.
            threading.Thread(target=_fulfil, args=(future, compile_it), daemon=True).start()
            self._compiled[key] = future
        return self._compiled[key]


def _fulfil(future: Future[Any], make: Callable[[], Any]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)


class Block:
    """Members that are trained side by side: some points of a program, and some of its task's seeds."""

    def __init__(self, program: Program, points: np.ndarray | None = None, seeds: np.ndarray | None = None) -> None:
        task = program.task
        picked = np.arange(len(program.rules)) if points is None else points
        self._program, self.done, self.seconds = program, 0, 0.0
        self._values = {name: values[picked] for name, values in program.values.items()}
        of_seeds = (lambda x: x) if seeds is None or len(seeds) == len(task.seeds) else (lambda x: x[seeds])
        self._data = jax.tree.map(of_seeds, task.data) if task.seeded_data else task.data
        starts = list(map(of_seeds, task.starts))
        self._carry = program.carry_like(len(picked), len(starts[0]))
        self._run = program.compiled("_advance", *self._arguments(0), donate=(0,))
        # On the device now: a thread that trains it may have another setting of 64-bit types.
        self._carry, self._values = jax.device_put((program.begin(picked, starts), self._values))

    def wait(self) -> None:
        """Until it is compiled and has made a step, which is not kept: what happens once is in no later time."""
        carry, *others = self._arguments(1)
        jax.block_until_ready(self._run.result()(jax.tree.map(trees.own, carry), *others))

    def is_compiled(self, seconds: float) -> bool:
        """Waits for so long at most. Raises what compilation raised."""
        wait([self._run], seconds)
        return self._run.done() and self._run.result() is not None

    def advance(self, seconds: float = math.inf) -> int:
        """Trains for about as long as this, at most to the task's end, and waits. Returns how many steps it was.

        How long a step takes is not known at first: then it is one step. Compiles nothing, so that several blocks can
        be trained at once, each by a thread.
        """
        program = self._program
        pace = program.step_seconds
        wanted = 1 if pace is None else max(1, min(seconds / pace, program.task.steps))
        steps = min(int(wanted), program.task.steps - self.done)
        run = self._run.result()
        began = time.perf_counter()
        self._carry = jax.block_until_ready(run(*self._arguments(steps)))
        taken = time.perf_counter() - began
        if steps:
            program.step_seconds = taken / steps
        self.seconds += taken
        self.done += steps
        return steps

    def _arguments(self, steps: int) -> tuple[Any, ...]:
        return self._carry, self._values, self._data, np.int32(self.done), np.int32(self.done + steps)

    def curves(self) -> dict[str, np.ndarray]:
        """What was recorded, (points, seeds, steps); NaN, or 0 for integers, where it is not trained yet."""
        found = {}
        for name, curve in self._carry[1].items():
            values = np.array(curve)
            if np.issubdtype(values.dtype, np.inexact):
                values[self.done :] = np.nan
            found[name] = np.moveaxis(values, 0, -1)
        return found

    def evaluate(self) -> dict[str, np.ndarray]:
        """What the task's `evaluate` gives, (points, seeds)."""
        if self._program.task.evaluate is None:
            return {}
        evaluate = self._program.compiled("_evaluate", self._carry[0])
        values = evaluate.result()(self._carry[0])
        return {name: np.asarray(values[name]) for name in self._program.task.evaluated_names}

    def member(self, point: int = 0, seed: int = 0) -> tuple[Any, Any]:
        """The parameters and the state that a member has now, by its places in the block."""
        arrays, state = jax.tree.map(lambda x: x[point, seed], self._carry[0])
        return self._program.task.tree(arrays), state


def last_losses(curves: np.ndarray, done: int) -> np.ndarray:
    """The mean loss of the last tenth of the steps, of curves (..., steps) of which `done` are made; NaN for none."""
    tail = max(1, round(TAIL * done))
    with np.errstate(invalid="ignore", over="ignore"):
        return (
            curves[..., done - tail : done].mean(axis=-1, dtype=float) if done else np.full(curves.shape[:-1], np.nan)
        )


def diverged(curves: np.ndarray, last: np.ndarray, done: Any) -> np.ndarray:
    """Which runs end at what is not finite, or higher than they began: above twice the first loss, and above it by
    three times what the losses of the last tenth differ by from one step to the next, which is noise of batches.

    Args:
      curves: (..., steps)  losses.
      last: (...)  those that they end with, of `last_losses`.
      done: (...)  how many steps were made.
    """
    counts = np.broadcast_to(done, last.shape)
    found = np.zeros(last.shape, bool)
    for k in np.ndindex(last.shape):
        losses = curves[k][: counts[k]].astype(float)
        if not len(losses):
            continue
        tail = losses[-max(2, round(TAIL * len(losses))) :]
        with np.errstate(invalid="ignore", over="ignore"):
            noise = np.std(np.diff(tail)) / math.sqrt(2) if len(tail) > 2 else 0.0
            found[k] = not last[k] <= losses[0] + abs(losses[0]) + 3 * noise
    return found


def _over(
    member: Callable[..., Any], *, points: tuple[int | None, ...], seeds: tuple[int | None, ...]
) -> Callable[..., Any]:
    """A function of one member for all points and, within each, all seeds: the two axes in front of its results."""
    return jax.vmap(jax.vmap(member, in_axes=seeds), in_axes=points)


def as_numbers(values: Sequence[Any]) -> np.ndarray:
    """Whole numbers, such as seeds, as integers, all others in the widest float."""
    whole = all(isinstance(value, int | np.integer) for value in values)
    return np.array(values, jnp.result_type(int if whole else float))


def rule_of(make: Callable[..., Any], point: Point) -> Rule:
    return as_rule(make(**point), "make_rule")


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
