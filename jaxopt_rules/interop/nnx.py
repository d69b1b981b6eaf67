"""Flax NNX: an optimizer that is a node of the graph, beside the model.

    from jaxopt_rules.interop.nnx import Optimizer

    optimizer = Optimizer(model, chain(clip_by_global_norm(1.0), adamw(3e-4)), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads)
        return loss, optimizer.metrics

Rules work in `flax.nnx.Optimizer` as they are, too. This one has the same arguments. Its hyperparameters can be read
and set, it shows what is recorded, takes frozen parameters, and costs little when it is called outside of `nnx.jit`.
"""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.tree_util import DictKey, tree_flatten_with_path

from jaxopt_rules import averages, state, trees, variables
from jaxopt_rules.interop import needed
from jaxopt_rules.rule import Rule, as_rule, check_extra, definition_of, not_an_update
from jaxopt_rules.state import LoadReport
from jaxopt_rules.stateful import MOST_LOSSES
from jaxopt_rules.variables import Listing, LossOfModule, is_variable, value, write

if TYPE_CHECKING:
    from flax import nnx
else:
    nnx = needed("flax.nnx", "flax")


class OptState(nnx.Variable):
    """One array of an optimizer's state. A slot shaped like its parameter carries that parameter's metadata."""


class Optimizer(nnx.Pytree):
    """Updates an NNX module in place with a rule, inside `nnx.jit` and other transforms or outside of them.

        optimizer = Optimizer(model, adamw(3e-4), wrt=nnx.Param)
        optimizer.update(model, grads)
        optimizer.set_hyperparams(learning_rate=1e-4)  # compiles nothing anew

    The state is a tree of `OptState` variables over `{path: array}`, with paths like `blocks/0/kernel`: `nnx.split`,
    `nnx.state`, sharding rules and checkpoints see it. Slots shaped like their parameter have its metadata, where
    `optimizer_sharding` stands in for `out_sharding`. A variable that the model has in several places is one
    parameter.

    Called outside of a transform, `update` is one compiled call, which takes over the buffers of the state: those of
    the parameters stay valid; an `nnx.clone` of the optimizer, or an `nnx.state` of it, taken before, does with
    `donate=False`.

    Args:
      model: the module, or any other NNX node.
      rule: the optimizer, as a pair of pure functions.
      wrt: which variables are parameters, as a filter of NNX: the one that `nnx.grad` was given.
      donate: whether updates outside of a transform write the state into its own memory.

    Raises:
      ValueError: the rule gives directions, not updates.
    """

    opt_state: Any
    rule: Rule
    wrt: Any
    donate: bool

    def __init__(self, model: Any, rule: Rule, *, wrt: Any = nnx.Param, donate: bool = True) -> None:
        self.rule = as_rule(rule, "Optimizer")
        if not definition_of(self.rule).gives_updates:
            raise ValueError(not_an_update(repr(rule)))
        self.wrt, self.donate = wrt, donate
        parameters = variables.listing(model, wrt).by_path
        arrays = {path: value(v) for path, v in parameters.items()}
        # Rules of this library share nothing with them; those of others may hold the parameters themselves.
        born = trees.unshared(self.rule.init(arrays), arrays)
        self.opt_state = nnx.data(_as_variables(born, parameters))

    def update(self, model: Any, grads: Any, **extra: Any) -> Any:
        """One step: updates the model and this state in place.

        Args:
          model: the module that this optimizer was made for, or one like it.
          grads: what `nnx.grad` gives for the same filter. `None` in it means that a parameter takes no part.
          **extra: extra arguments of the rule, such as `value`. `value_fn` is a function of the model here; outside of
            a transform, pass the same function every time, since it is compiled into the update.

        Returns:
          The model, the same object.

        Raises:
          ValueError: gradients and parameters are not at the same paths, or two shapes differ; names them.
          TypeError: an extra argument is unknown.
        """
        if isinstance(model, nnx.State):
            raise TypeError("update takes the model first, and then the gradients: update(model, grads)")
        listing = variables.listing(model, self.wrt)
        gs = _gradients(grads, self.wrt, listing)
        slots = _slots(self)
        functions, rest = (), []
        if extra:
            accepts = definition_of(self.rule).accepts
            check_extra(repr(self.rule), accepts, extra)
            # What every rule ignores must not count: a new `value_fn` each time would compile each time.
            extra = {name: x for name, x in extra.items() if accepts is None or name in accepts}
        if "value_fn" in extra:
            own = {name: name for name in listing.by_path}
            loss, rest = variables.loss_of_module(extra.pop("value_fn"), model, own)
            functions = (("value_fn", loss),)
        settings = _Settings(
            self.rule,
            slots.structure,
            tuple(listing.by_path),
            tuple(k for k, g in enumerate(gs) if g is not None),
            (*functions, *((name, x) for name, x in extra.items() if callable(x))),
        )
        before, values = [value(v) for v in slots.variables], [value(v) for v in listing.by_path.values()]
        present = [g for g in gs if g is not None]
        arrays = {name: _of_paths(x, self.wrt) for name, x in extra.items() if not callable(x)}
        traced = any(isinstance(x, Tracer) for x in (*before[:1], *values[:1], *present[:1]))
        results: list[Any] = []

        def finish() -> None:
            new_slots, new_values = results[0]
            write(slots.variables, new_slots)
            write(listing.by_path.values(), new_values)

        try:
            # No interrupt can fall between this call and its results being in the list: both happen outside of Python.
            step = functools.partial(_step, settings) if traced else _program(self, settings)
            results.extend(itertools.starmap(step, [(before, values, present, rest, arrays)]))
            finish()
        except BaseException:
            # An interrupt behind the compiled step finds the old state donated: the step is completed.
            if results:
                finish()
            raise
        return model

    @property
    def hyperparams(self) -> dict[str, Array]:
        """The hyperparameters, as in `jaxopt_rules.hyperparams`."""
        return _copies(state.hyperparams(self._arrays))

    def set_hyperparams(self, values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Gives hyperparameters new values, as `jaxopt_rules.set_hyperparams` does, with the errors of that."""
        self._take(state.set_hyperparams(self._arrays, values, **named))

    @property
    def metrics(self) -> dict[str, Array]:
        """What the last update recorded, as in `jaxopt_rules.metrics`."""
        return _copies(state.metrics(self._arrays))

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state as a flat dict of NumPy arrays under names that stay. See `jaxopt_rules.state_dict`."""
        return state.state_dict(self._arrays)

    def load_state_dict(self, saved: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Takes over what `state_dict` gave, and says what did not fit. See `jaxopt_rules.load_state_dict`.

        Raises:
          ValueError: `strict`, and something does not fit; then nothing has changed.
        """
        loaded, report = state.load_state_dict(self._arrays, saved, strict)
        self._take(loaded)
        return report

    @contextlib.contextmanager
    def evaluating(self, model: Any) -> Iterator[Any]:
        """Within it, the model has the parameters to evaluate with; behind it, those that are trained.

            with optimizer.evaluating(model):
                loss = loss_fn(model, x, y)

        They differ where the rule keeps an average, or trains elsewhere than it evaluates (`schedule_free`).
        """
        parameters = variables.listing(model, self.wrt).by_path
        trained = {path: value(v) for path, v in parameters.items()}
        averaged = averages.eval_params(self._arrays, trained)
        try:
            write(parameters.values(), [averaged[path] for path in parameters])
            yield model
        finally:
            write(parameters.values(), list(trained.values()))

    @property
    def _arrays(self) -> Any:
        slots = _slots(self)
        return jax.tree.unflatten(slots.structure, [value(v) for v in slots.variables])

    def _take(self, new: Any) -> None:
        write(_slots(self).variables, jax.tree.leaves(new))


# ---------------------------------------------------------------------------------------------------------------------
# The state
# ---------------------------------------------------------------------------------------------------------------------

# What belongs to the values of a parameter, and not to those of its slots.
_HOOKS = ("on_get_value", "on_set_value", "on_create_value")


def _as_variables(born: Any, parameters: Mapping[str, Any]) -> Any:
    """A state whose arrays are variables. The last dict key on the way to a slot is the path of its parameter."""
    leaves, treedef = tree_flatten_with_path(born)

    def variable(keys: Any, x: Array) -> OptState:
        path = next((key.key for key in reversed(keys) if isinstance(key, DictKey)), "")
        parameter = parameters.get(path)
        metadata: dict[str, Any] = {}
        if parameter is not None and x.shape == value(parameter).shape:
            metadata = {key: entry for key, entry in parameter.get_metadata().items() if key not in _HOOKS}
            if "optimizer_sharding" in metadata:
                metadata["out_sharding"] = metadata.pop("optimizer_sharding")
        return OptState(x, **metadata)

    return jax.tree.unflatten(treedef, [variable(keys, x) for keys, x in leaves])


def _copies(arrays: dict[str, Array]) -> dict[str, Array]:
    """What stays valid when the next update takes over the buffers of the state."""
    return {name: x if isinstance(x, Tracer) else jnp.array(x) for name, x in arrays.items()}


def _of_paths(x: Any, wrt: Any) -> Any:
    """An extra argument that is like the gradients, such as `grad`, as the rule sees these."""
    if not isinstance(x, nnx.State):
        return x
    parts, arrays = variables.gradients(x, wrt)
    return dict(zip(map(variables.path, parts), arrays, strict=True))


class _Slots(NamedTuple):
    """The variables of a state, and the structure of the state whose leaves they are."""

    whole: Any
    variables: list[Any]
    structure: trees.Structure


_slots_of: weakref.WeakKeyDictionary[Any, _Slots] = weakref.WeakKeyDictionary()


def _slots(optimizer: Optimizer) -> _Slots:
    whole = optimizer.opt_state
    slots = _slots_of.get(optimizer)
    if slots is None or slots.whole is not whole:
        variables, structure = jax.tree.flatten(whole, is_leaf=is_variable)
        slots = _slots_of[optimizer] = _Slots(whole, variables, structure)
    return slots


def _gradients(grads: Any, wrt: Any, parameters: Listing) -> list[Any]:
    """For each parameter its gradient, or `None`."""
    parts, gs = variables.gradients(grads, wrt)
    if parts != parameters.parts:
        reference = trees.flatten(dict.fromkeys(parameters.by_path))[1]
        by_path = dict(zip(map(variables.path, parts), gs, strict=True))
        trees.align(reference, by_path, "the gradients", "the parameters that wrt selects")
        gs = [by_path[name] for name in parameters.by_path]
    return gs


# ---------------------------------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """All that is fixed while an update is compiled."""

    rule: Rule
    structure: trees.Structure  # of the state
    paths: tuple[str, ...]
    present: tuple[int, ...]  # the parameters that have a gradient
    functions: tuple[tuple[str, Any], ...]  # extra arguments that are functions


def _step(
    settings: _Settings,
    slots: list[Any],
    values: list[Any],
    grads: list[Any],
    rest: list[Any],
    extra: dict[str, Any],
) -> tuple[list[Any], list[Any]]:
    functions = {
        name: functools.partial(f.at, rest) if isinstance(f, LossOfModule) else f for name, f in settings.functions
    }
    params = dict(zip(settings.paths, values, strict=True))
    gradients: dict[str, Any] = dict.fromkeys(settings.paths)
    gradients |= {settings.paths[k]: g for k, g in zip(settings.present, grads, strict=True)}
    before = jax.tree.unflatten(settings.structure, slots)
    params, after = settings.rule.apply(gradients, before, params, **extra, **functions)
    leaves, structure = jax.tree.flatten(after)
    if structure != settings.structure:
        raise TypeError(f"{settings.rule!r} returned a state of another structure than it was given")
    return leaves, [params[path] for path in settings.paths]


def _new_program(settings: _Settings, donate: bool) -> Callable[..., Any]:
    def optimizer_update(*arguments: Any) -> tuple[list[Any], list[Any]]:
        return _step(settings, *arguments)

    # State leaves come first among arguments and results alike, so that XLA reuses each donated buffer in its place.
    return jax.jit(optimizer_update, donate_argnums=0 if donate else ())


# Equal settings have one program, whichever optimizers they are of. Functions may hold on to data, and are not in it,
# but in those of an optimizer.
_shared_program = functools.lru_cache(maxsize=4096)(_new_program)
_own_programs: weakref.WeakKeyDictionary[Any, dict[_Settings, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def _program(optimizer: Optimizer, settings: _Settings) -> Callable[..., Any]:
    if not settings.functions:
        return _shared_program(settings, optimizer.donate)
    programs = _own_programs.setdefault(optimizer, {})
    if settings not in programs:
        while len(programs) >= MOST_LOSSES:
            del programs[next(iter(programs))]
        programs[settings] = _new_program(settings, optimizer.donate)
    return programs[settings]
