"""The state of an optimizer, there and back: which of its slots and hyperparameters are whose."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_rules.compose import FROZEN, Composed, Wrapper
from jaxopt_rules.families import Family, Place, families, map_families, per_parameter
from jaxopt_rules.hyperparameters import COMPLEMENT, Address, Scheduled, scheduled
from jaxopt_rules.interop import needed
from jaxopt_rules.interop.torch.layout import (
    FLAX,
    Layout,
    Matched,
    as_numpy,
    as_tensor,
    fitted,
    listed,
    matched,
)
from jaxopt_rules.interop.torch.models import check_mapping
from jaxopt_rules.interop.torch.optimizers import NamesThere, StateDicts, TorchEntry, read_entries
from jaxopt_rules.lift import Lift
from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.rule import Definition, Rule, as_rule, definition_of
from jaxopt_rules.rules.adafactor import Factors
from jaxopt_rules.select import select
from jaxopt_rules.state import Entry, hyperparameter_entries, hyperparams, replace_hyperparameters, replacement
from jaxopt_rules.trees import quoted

# ---------------------------------------------------------------------------------------------------------------------
# Rules, part by part
# ---------------------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A formula in a rule, and the leaves that it sees."""

    rule: Lift
    leaves: frozenset[int]

    def acting(self, stored_name: str, at: Matched) -> frozenset[int]:
        """The leaves on which a hyperparameter acts."""
        selector = self.rule.where.get(stored_name)
        own = [p if k in self.leaves else None for k, p in enumerate(at.leaves)]
        hits = select(selector, at.paths, own)
        return frozenset(k for k in self.leaves if hits[k])


def _formulas(
    definition: Definition, paths: Sequence[str], leaves: Sequence[Any], place: Place = ()
) -> Iterator[tuple[Place, Lift, frozenset[int]]]:
    """The formulas that a rule is made of, each with the place of its state and the leaves that it sees."""
    if isinstance(definition, Composed):
        for (step, member), seen in zip(definition.members, definition.seen(paths, leaves), strict=True):
            yield from _formulas(member, paths, seen, (*place, *step))
    elif isinstance(definition, Wrapper):
        yield from _formulas(definition_of(definition.rule), paths, leaves, (*place, 0))
    elif isinstance(definition, Lift):
        yield place, definition, frozenset(k for k, p in enumerate(leaves) if is_inexact(p))


class _Meeting:
    """Parameters, the rule that moves them here, and the optimizers that move them in PyTorch."""

    def __init__(self, params: Any, rule: Rule, layout: Layout, saved: Sequence[Any], names: NamesThere | None) -> None:
        self.rule = rule
        self.at = at = matched(params, layout)
        there = read_entries(saved, names)
        definition = definition_of(rule)
        shares = definition.shares(at.paths, at.leaves)
        moved = {
            k for k in at.names if not (shares[k].rate == FROZEN.rate and FROZEN.group in shares[k].group.split("/"))
        }
        self.parts = {
            place: _Part(formula, seen & moved) for place, formula, seen in _formulas(definition, at.paths, at.leaves)
        }
        names_here = set(at.names.values())
        if left := [name for name in there if name not in names_here]:
            raise ValueError(
                f"the optimizer has {listed(left)}, and no parameter here has this name; the names of those here are "
                f"{listed(list(at.names.values()))}"
            )
        for k in sorted(moved):
            if at.names[k] not in there:
                raise ValueError(
                    f"{quoted(at.paths[k])}, {at.names[k]!r}, is in none of PyTorch's param_groups, which is frozen "
                    f"here by freeze(rule, '{at.paths[k]}'); the optimizer has {listed(list(there))}"
                )
            if np.iscomplexobj(at.leaves[k]):
                raise ValueError(f"{quoted(at.paths[k])} is complex, which PyTorch's optimizers take as pairs of reals")
        self.entries = {k: there[at.names[k]] for k in sorted(moved)}

    def describe(self, k: int) -> str:
        return f"{quoted(self.at.paths[k])} ({self.at.names[k]!r} in PyTorch)"

    def formulas(self, state: Any) -> Iterator[tuple[Family, _Part]]:
        """Each formula of the rule, with its part of a state.

        Raises:
          ValueError, TypeError: the state is that of another rule.
        """
        there = {family.place: family for family in families(state)}
        for place, part in self.parts.items():
            if place not in there:
                raise ValueError(f"the state is not one of {self.rule!r}: there is no {part.rule.State.__name__} in it")
            part.rule.check_state(there[place].state)
            yield there[place], part

    def check_forms(self, state: Any) -> None:
        """Refuses a rule whose formula is another than that of the optimizer.

        Raises:
          ValueError: says in what.
        """
        for family, part in self.formulas(state):
            for k in sorted(part.leaves):
                entry = self.entries[k]
                known = family.name in entry.kind.slots or family.name in entry.kind.families
                if known and (other := _difference(part.rule, entry.group)):
                    raise ValueError(
                        f"{entry.kind.name} has {other[0]} for {entry.name!r}, and {self.rule!r} has {other[1]}; its "
                        f"counterpart is {entry.counterpart}"
                    )

    def column(self, family: Family, slot: str) -> list[Any]:
        """What a slot holds of each leaf; nothing where it is not made of such parts."""
        return per_parameter(self.at.treedef, family, getattr(family.state, slot)) or []

    def counterparts(self, family: Family, slot: str, part: _Part) -> Iterator[tuple[int, TorchEntry, str]]:
        """(leaf, entry, slot there) for each leaf of which PyTorch has what is in this slot."""
        for k in sorted(part.leaves):
            slots = self.entries[k].kind.slots.get(family.name, {})
            if slot in slots:
                yield k, self.entries[k], slots[slot]

    def values(self, state: Any) -> Iterator[tuple[Entry, dict[int, TorchEntry]]]:
        """(hyperparameter here, the parameters on which it acts) for all that PyTorch has, too."""
        for entry in hyperparameter_entries(state).values():
            part = self.parts.get(entry.family.place)
            acting = part.acting(entry.key, self.at) if part is not None else ()
            own = {k: there for k, there in self.entries.items() if k in acting and there.kind.owns(entry)}
            if own:
                yield entry, own


def _difference(rule: Lift, group: Mapping[str, Any]) -> tuple[str, str] | None:
    """What an optimizer of PyTorch has, and what a formula here has in its place."""
    static = rule.static
    if "nesterov" in static and bool(group.get("nesterov")) != static["nesterov"]:
        return f"nesterov={bool(group.get('nesterov'))}", f"nesterov={static['nesterov']}"
    if "maximum_of" in static and static["maximum_of"] != "uncorrected":
        return "the largest of the uncorrected second moments", f'maximum_of="{static["maximum_of"]}"'
    if "eps_placement" in static:
        wanted = "max" if "beta2_decay" in group else "inside" if "clip_threshold" in group else "outside"
        if static["eps_placement"] != wanted:
            return f'eps in the place "{wanted}"', f'eps_placement="{static["eps_placement"]}"'
    if rule.State.__name__ == "AdamState" and "c1" not in rule.measures:
        return 'bias_correction "moments"', 'bias_correction="step"'
    if "polar" in static:
        return _muon_difference(static, group)
    if "relative_step" in static:
        if group.get("warmup_init") and not callable(rule.hyper["learning_rate"]):
            return "warmup_init=True", "no warmup"
        relative = group.get("relative_step", True)
        decay = "scaled" if "clip_threshold" in group else "decoupled"
        if static["relative_step"] != relative:
            return f"relative_step={relative}", f"relative_step={static['relative_step']}"
        if group["weight_decay"] and static["decay"] != decay:
            return f'a decay that is "{decay}"', f'decay="{static["decay"]}"'
        if ("min_rms" in rule.hyper) != group.get("scale_parameter", True):
            return (
                f"scale_parameter={group.get('scale_parameter', True)}",
                f"multiply_by_parameter_scale={'min_rms' in rule.hyper}",
            )
    if rule.State.__name__ in ("VelocityState", "MomentumState") and "dampening" in group and group["momentum"]:
        dampening, mean = float(group["dampening"]), COMPLEMENT + "momentum" in rule.hyper
        if mean and dampening != float(group["momentum"]):
            return f"dampening={dampening}", 'form="ema", which has the momentum in its place'
        if not mean and dampening and COMPLEMENT + "dampening" not in rule.hyper:
            return f"dampening={dampening}", "none"
        if "nesterov" not in static and group["nesterov"]:
            return "nesterov=True", "dampening"
    return None


def _muon_difference(static: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[str, str] | None:
    if static["momentum"] == "debiased":
        return "a momentum that is not corrected", 'momentum="debiased"'
    name = group["adjust_lr_fn"] or "original"
    expected: dict[str, Callable[[int, int], float]] = {
        "original": lambda rows, columns: math.sqrt(max(1, columns / rows)),
        "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    }
    scale, wanted = static["scale"] or (lambda rows, columns: 1.0), expected.get(name, lambda rows, columns: 1.0)
    sides = ((2, 3), (3, 2), (5, 5))
    if any(not math.isclose(scale(*side), wanted(*side)) for side in sides):
        return f'adjust_lr_fn="{name}"', "another scale"
    return None


def _scaling(part: _Part, group: Mapping[str, Any]) -> float:
    """What a slot of PyTorch is multiplied by to be ours."""
    if part.rule.State.__name__ == "MomentumState":
        return -float(group["lr"])
    if part.rule.static.get("polar") and part.rule.static["momentum"] == "sum":
        return 1 / (1 - float(group["momentum"]))
    return 1.0


# Of a matrix, PyTorch and transformers keep the means over its last axis, and those over the last but one.
_FACTORS = {"variance": ("row_var", "col_var"), "exp_avg_sq": ("exp_avg_sq_row", "exp_avg_sq_col")}


def load_optimizer_state(
    state_dict: StateDicts,
    params: Any,
    rule: Rule,
    layout: Layout = FLAX,
    *,
    names: NamesThere | None = None,
    hyperparams: Literal["saved", "new"] = "saved",
    count: int | None = None,
) -> Any:
    """The state of a rule that goes on where a PyTorch optimizer is.

        state = load_optimizer_state(optimizer.state_dict(), params, adamw(3e-4))
        state = load_optimizer_state([muon.state_dict(), adamw.state_dict()], params, partition(...), count=1000)

    Slots are moved into the layout of the parameters. Hyperparameters become those of the saved run; what a schedule
    owns here follows that, from the saved count on. A parameter without a state there, since it never had a gradient,
    is newborn here. So is what the rule has besides (averages, hooks with memory), but its count goes on, too.

    PyTorch counts the updates of each parameter, and here each formula has a count: parameters that did not begin
    together, since they were frozen at first, are groups of a `partition`. What goes by the run and not by its
    parameters, such as a schedule of the learning rate, goes on at the largest of the counts; but a schedule in a
    formula that itself goes by the count, which are Adafactor's step and the betas of Adam, at that of its group.

    Args:
      state_dict: `optimizer.state_dict()`, also one that was saved; or several, of optimizers that share the
        parameters.
      params: the parameters here; of their values nothing but what `rule.init` reads.
      rule: the optimizer here, see the table at the head of this module. Param_groups with other hyperparameters are
        groups of a `partition`; with other decays alone, also `where`.
      layout: what is what; by default that of Flax.
      names: PyTorch's names of the optimizer's parameters, in the order of its param_groups, where it was not made from
        `named_parameters()`; of several optimizers a list for each.
      hyperparams: "saved" are those of the param_groups, "new" those of `rule`.
      count: finished updates, where the optimizer does not save them: SGD, Lion and Muon do not.

    Raises:
      TypeError: `state_dict` is none.
      ValueError: the rule is not the counterpart of the optimizer; names, shapes or numbers of updates do not fit;
        hyperparameters differ within a group here; or the optimizer maximizes.
    """
    if hyperparams not in ("saved", "new"):
        raise ValueError(f"hyperparams is 'saved' or 'new', not {hyperparams!r}")
    saved = list(state_dict) if isinstance(state_dict, list | tuple) else [state_dict]
    for x in saved:
        check_mapping(x, "load_optimizer_state takes optimizer.state_dict()")
    rule = as_rule(rule, "load_optimizer_state")
    meeting = _Meeting(params, rule, layout, saved, names)
    born = rule.init(params)
    meeting.check_forms(born)
    state = _with_slots(meeting, born, _clock(meeting, count))
    return state if hyperparams == "new" else _with_hyperparameters(meeting, state)


def _clock(meeting: _Meeting, count: int | None) -> int:
    """How many updates the run has finished."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ValueError(f"count is a number of finished updates, not {count!r}")
    saved = max((entry.step for entry in meeting.entries.values() if entry.step is not None), default=None)
    silent = [entry.kind.name for entry in meeting.entries.values() if not entry.kind.counts]
    if saved is None and count is None and silent:
        raise ValueError(f"{silent[0]} does not save how many updates were finished; say it: count=...")
    # Optimizers need not have begun together.
    if saved is not None and count is not None and (count < saved or (count > saved and not silent)):
        raise ValueError(f"count is {count}, and the state_dict has finished {saved} updates")
    # An optimizer that would say it, and has nothing to say, has not begun.
    return count if count is not None else saved or 0


def _clock_of(meeting: _Meeting, family: Family, clock: int) -> int:
    """How many updates a formula has finished."""
    part = meeting.parts.get(family.place)
    leaves = sorted(part.leaves) if part is not None else ()
    own = {k: entry for k, entry in meeting.entries.items() if k in leaves and entry.kind.counts_for(family)}
    if not own:
        return clock
    steps: dict[int, list[str]] = {}
    for entry in own.values():
        if entry.step is not None:
            steps.setdefault(entry.step, []).append(entry.name)
    if len(steps) > 1:
        most = max(steps, key=lambda step: len(steps[step]))
        others = ", ".join(f"{listed(found)} had {step}" for step, found in steps.items() if step != most)
        raise ValueError(
            f"{meeting.rule!r} has one count for parameters that had different numbers of updates in PyTorch: "
            f"{others}, the others {most}; make them groups, which have one each: partition({{...}}, by=...); or, "
            "where bias correction no longer matters, give all of them the same `step` in the state_dict"
        )
    # As in PyTorch, what never had a gradient begins with the first.
    return next(iter(steps), 0)


def _with_slots(meeting: _Meeting, born: Any, clock: int) -> Any:
    """A newborn state with the memory of PyTorch's, in a run at that count."""
    at, taken = meeting.at, {k: set[str]() for k in meeting.entries}

    def filled(family: Family) -> Any:
        part = meeting.parts.get(family.place)
        new: dict[str, Any] = {"count": fitted(np.asarray(_clock_of(meeting, family, clock)), family.state.count)}
        if part is None:
            return family.state._replace(**new)
        for slot in family.slots:
            column = meeting.column(family, slot)
            for k, entry, there in meeting.counterparts(family, slot, part):
                if entry.memory:
                    column[k] = _moved(meeting, k, there, column[k], _scaling(part, entry.group), taken[k])
            if column:
                new[slot] = jax.tree.unflatten(at.treedef, column)
        return family.state._replace(**new)

    state = map_families(filled, born)
    for k, entry in meeting.entries.items():
        if left := [key for key in entry.memory if key not in taken[k]]:
            raise ValueError(
                f"PyTorch's state of {entry.name!r} has {', '.join(entry.memory)}, and {meeting.rule!r} has no place "
                f"for {', '.join(left)}; the counterpart of {entry.kind.name} is {entry.counterpart}"
            )
    return state


def _moved(meeting: _Meeting, k: int, there: str, old: Any, scaling: float, taken: set[str]) -> Any:
    """What goes into a slot."""
    at, memory = meeting.at, meeting.entries[k].memory
    factors = _FACTORS.get(there)
    if factors is not None and factors[0] in memory:
        taken.update(factors)
        return _factored(meeting, k, [memory[name] for name in factors], factors, old)
    if there not in memory or isinstance(old, Factors):
        entry = meeting.entries[k]
        if there in memory:
            raise ValueError(
                f"{meeting.rule!r} has means of rows and columns of {quoted(at.paths[k])}, and PyTorch's state of "
                f"{entry.name!r} has {there}, not factored; leave it out of its views: views=[(excluding("
                f"'{at.paths[k]}'), ...)]"
            )
        raise ValueError(
            f"{meeting.rule!r} wants {there} of {entry.name!r}, and PyTorch's state has {', '.join(memory)}; the "
            f"counterpart of {entry.kind.name} is {entry.counterpart}"
        )
    taken.add(there)
    moved = at.to_ours(k, memory[there], f"{there}", old.shape)
    return fitted(moved if scaling == 1 else scaling * moved.astype(old.dtype), old)


def _with_means_apart(x: Any, axis: int, ndim: int) -> np.ndarray:
    """Means over an axis that is still there, with length 1."""
    x = as_numpy(x)
    return x if x.ndim == ndim else np.expand_dims(x, axis)


def _factored(meeting: _Meeting, k: int, means: list[Any], names: Sequence[str], old: Any) -> Any:
    at, axes = meeting.at, meeting.at.axes[k]
    ndim = at.leaves[k].ndim
    moved = [_with_means_apart(x, axis, ndim) for x, axis in zip(means, (-1, -2), strict=True)]
    if axes is not None and not axes.split:
        moved = [axes.to_ours(x, ()) for x in moved]
    shapes = [x.shape for x in old] if isinstance(old, Factors) else [old.shape]
    for pair in (moved, moved[::-1]):
        # Rows and columns have the same part in the formula.
        if [x.shape for x in pair] == shapes and not (axes and axes.split):
            return Factors(*(fitted(x, like) for x, like in zip(pair, old, strict=True)))
    shown = ", ".join(f"{name} of shape {as_numpy(x).shape}" for name, x in zip(names, means, strict=True))
    raise ValueError(
        f"PyTorch's state of {at.names[k]!r} has {shown}, the means over its last two axes there; {meeting.rule!r} has "
        f"means of shape {' and '.join(map(str, shapes))} of {quoted(at.paths[k])}, whose shape is "
        f"{at.leaves[k].shape}; say which axes are its rows and columns: views={{'{at.paths[k]}': "
        "MatrixView(rows=..., columns=...)}"
    )


def _with_hyperparameters(meeting: _Meeting, state: Any) -> Any:
    """A state with the hyperparameters of the param_groups."""
    at, found, new = meeting.at, {k: set[str]() for k in meeting.entries}, dict[Address, Any]()
    schedules = definition_of(meeting.rule).schedules
    for entry, own in meeting.values(state):
        values: dict[float, int] = {}
        for k, there in own.items():
            value = there.hyper(entry.name)
            if entry.name == "weight_decay":
                _check_decay(meeting, k, entry.family.name, value)
            if value and entry.name in found[k]:
                raise ValueError(
                    f"{meeting.rule!r} has {entry.name} twice for {meeting.describe(k)}, and PyTorch has one: "
                    f"{entry.name}={value}"
                )
            found[k].add(entry.name)
            if value is not None:
                values.setdefault(value, k)
        if len(values) > 1:
            (a, first), (b, second), *_ = values.items()
            masked = " or, of a decay, where=..." if entry.name == "weight_decay" else ""
            raise ValueError(
                f"{entry.name} is {a} of {meeting.describe(first)} and {b} of {meeting.describe(second)}, and one "
                f"value of both in {meeting.rule!r}; make them groups: partition({{...}}, by=...){masked}"
            )
        if isinstance(entry.value, Scheduled):
            last = scheduled(entry.key, schedules[entry.address], jnp.maximum(entry.family.state.count - 1, 0))
            new[entry.address] = Scheduled(fitted(np.asarray(last), entry.value.value))
        elif values:
            new[entry.address] = replacement(entry, next(iter(values)))
    for k, entry in meeting.entries.items():
        for name, source in entry.kind.hyper.items():
            value = entry.hyper(name)
            neutral = value is None or value in source.neutral or (name == "weight_decay" and value == 0)
            # With the form "ema", which `check_forms` has seen, it is the momentum.
            neutral = neutral or (name == "dampening" and "momentum" in found[k])
            if name not in found[k] and not neutral:
                raise ValueError(
                    f"{entry.kind.name} has {source.key}={entry.group[source.key]} for {entry.name!r}, and "
                    f"{meeting.rule!r} has no {name} that acts on {quoted(at.paths[k])}; its counterpart is "
                    f"{entry.counterpart}, or take those of the rule: hyperparams='new'"
                )
    return replace_hyperparameters(state, new)


def _check_decay(meeting: _Meeting, k: int, family: str, value: float | None) -> None:
    entry = meeting.entries[k]
    form, here = entry.kind.decay_of(entry.group), "l2" if family == "weight_decay" else "decoupled"
    if value and form not in (here, "either"):
        raise ValueError(
            f'the weight_decay={value} of {entry.kind.name} is "{form}" for {entry.name!r}, and that of '
            f'{meeting.rule!r} is "{here}"; its counterpart is {entry.counterpart}'
        )


# ---------------------------------------------------------------------------------------------------------------------
# The way back
# ---------------------------------------------------------------------------------------------------------------------


def optimizer_state_dict(
    state: Any,
    params: Any,
    rule: Rule,
    layout: Layout = FLAX,
    *,
    like: Any,
    names: NamesThere | None = None,
    hyperparams: Literal["saved", "new"] = "saved",
) -> Any:
    """A state as `optimizer.load_state_dict` of a PyTorch optimizer takes it: what undoes `load_optimizer_state`.

        optimizer.load_state_dict(optimizer_state_dict(state, params, rule, like=optimizer))

    Args:
      state: the state of `rule` for `params`.
      params: the parameters here.
      rule: the optimizer here, the counterpart of the optimizer there.
      layout: what is what; by default that of Flax.
      like: the optimizer, or its state_dict, from which come the param_groups, and dtypes and devices where it has a
        state; or several, as for `load_optimizer_state`.
      names: as for `load_optimizer_state`.
      hyperparams: "saved" puts those of `state` into the param_groups (of a schedule, the value for the next update),
        "new" leaves those of `like`.

    Returns:
      A dict like `like.state_dict()`, or a list of them where `like` is several.

    Raises:
      ValueError: as `load_optimizer_state`; or the hyperparameters here differ within a param_group.
      ImportError: PyTorch is not installed.
    """
    if hyperparams not in ("saved", "new"):
        raise ValueError(f"hyperparams is 'saved' or 'new', not {hyperparams!r}")
    several = isinstance(like, list | tuple)
    given = [x.state_dict() if hasattr(x, "state_dict") else x for x in (like if several else [like])]
    for x in given:
        check_mapping(x, "optimizer_state_dict takes like=optimizer, or its state_dict()")
    meeting = _Meeting(params, as_rule(rule, "optimizer_state_dict"), layout, given, names)
    meeting.check_forms(state)
    groups = [[dict(group) for group in saved["param_groups"]] for saved in given]
    if hyperparams == "saved":
        _write_hyperparameters(meeting, state, given, groups)
    memories = _memories(meeting, state, groups, given)
    new = [
        {**saved, "state": memory, "param_groups": own}
        for saved, memory, own in zip(given, memories, groups, strict=True)
    ]
    return new if several else new[0]


def _group_of(entry: TorchEntry, given: Sequence[Any], groups: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """The new param_group of a parameter."""
    place = next(j for j, old in enumerate(given[entry.optimizer]["param_groups"]) if old is entry.group)
    return groups[entry.optimizer][place]


def _write_hyperparameters(
    meeting: _Meeting, state: Any, given: Sequence[Any], groups: Sequence[list[dict[str, Any]]]
) -> None:
    values = hyperparams(state)
    schedules = definition_of(meeting.rule).schedules
    written: dict[tuple[int, str], tuple[float, int]] = {}
    of_leaf: dict[int, dict[str, float]] = {k: {} for k in meeting.entries}
    decays = dict.fromkeys(meeting.entries, 0.0)
    names = {entry.address: name for name, entry in hyperparameter_entries(state).items()}
    for entry, own in meeting.values(state):
        if isinstance(entry.value, Scheduled):
            stored = float(scheduled(entry.key, schedules[entry.address], entry.family.state.count))
            value = 1 - stored if entry.key.startswith(COMPLEMENT) else stored
        else:
            value = _double(entry, values[names[entry.address]])
        for k, there in own.items():
            of_leaf[k][entry.name] = value
            if entry.name == "weight_decay":
                _check_decay(meeting, k, entry.family.name, value)
                decays[k] += value
            if entry.name == "momentum" and entry.key.startswith(COMPLEMENT) and "dampening" in there.kind.hyper:
                of_leaf[k]["dampening"] = value
    for k, there in meeting.entries.items():
        group = _group_of(there, given, groups)
        # What the rule has not is off.
        absent = {name: 0.0 for name, x in there.kind.hyper.items() if x.neutral}
        own = absent | of_leaf[k] | {"weight_decay": decays[k]}
        if missing := [name for name in there.kind.hyper if name not in own and there.hyper(name) is not None]:
            raise ValueError(
                f"{there.kind.name} wants {', '.join(missing)} for {there.name!r}, which {meeting.rule!r} does not "
                f"have; its counterpart is {there.counterpart}, or leave those of `like`: hyperparams='new'"
            )
        for name, value in own.items():
            if there.kind.hyper[name].read(there.group) is None and (
                name != "eps" or math.isclose(value, jnp.finfo(meeting.at.leaves[k].dtype).eps, rel_tol=1e-6)
            ):
                continue  # what it takes by default
            old = written.setdefault((id(group), name), (value, k))
            if old[0] != value:
                raise ValueError(
                    f"{name} is {old[0]} of {meeting.describe(old[1])} and {value} of {meeting.describe(k)}, which are "
                    "in one param_group of PyTorch; give it one for each"
                )
            there.kind.hyper[name].write(group, value)


def _double(entry: Entry, value: Any) -> float:
    """A hyperparameter as the number that was written: the shortest that its precision does not tell from it."""
    if entry.key.startswith(COMPLEMENT):
        return float(1 - np.float64(str(np.asarray(entry.value))))
    return float(str(np.asarray(value)))


def _memories(
    meeting: _Meeting, state: Any, groups: Sequence[list[dict[str, Any]]], given: Sequence[Any]
) -> list[dict[Any, dict[str, Any]]]:
    """The `state` of each optimizer."""
    # What does not take part here stays as it is.
    own = {(entry.optimizer, entry.id) for entry in meeting.entries.values()}
    memories = [
        {id_: memory for id_, memory in saved["state"].items() if (i, id_) not in own} for i, saved in enumerate(given)
    ]
    kept: set[int] = set()
    for family, part in meeting.formulas(state):
        count = int(family.state.count)
        for slot in family.slots:
            column = meeting.column(family, slot)
            for k, entry, there in meeting.counterparts(family, slot, part):
                kept.add(k)
                if count == 0:
                    continue  # newborn, it has no memory in PyTorch
                memory = memories[entry.optimizer].setdefault(entry.id, {})
                scaling = _scaling(part, _group_of(entry, given, groups))
                memory |= _written(meeting.at, k, there, column[k], scaling, entry)
                memory |= {"step": _step_of(count, entry)} if entry.kind.counts else {}
                memory |= {"RMS": 0} if "scale_parameter" in entry.group else {}  # computed anew before it is read
    begun = any(int(family.state.count) > 0 for family, _ in meeting.formulas(state))
    for k, entry in meeting.entries.items() if begun else ():
        plain = entry.kind.here == "sgd" and not _group_of(entry, given, groups)["momentum"]
        if k not in kept and not plain:
            raise ValueError(
                f"{meeting.rule!r} has nothing of what {entry.kind.name} keeps for {entry.name!r}; its counterpart is "
                f"{entry.counterpart}"
            )
    return memories


def _written(at: Matched, k: int, there: str, x: Any, scaling: float, entry: TorchEntry) -> dict[str, Any]:
    if not isinstance(x, Factors):
        if there == "momentum_buffer" and scaling == 0:
            raise ValueError(
                f"the velocity of {quoted(at.paths[k])} contains the learning rate, which is 0 now; PyTorch's does "
                "not, and cannot be told from it"
            )
        array = at.to_theirs(k, x)
        return {there: as_tensor(array if scaling == 1 else array / scaling, entry.state.get(there))}
    axes, names = at.axes[k], _FACTORS[there]
    pair = [np.asarray(factor) if axes is None else axes.to_theirs(np.asarray(factor)) for factor in x]
    shape = at.to_theirs(k, at.leaves[k]).shape
    wanted = [(*shape[:-1], 1), (*shape[:-2], 1, shape[-1])]
    for means in (pair, pair[::-1]):
        if [mean.shape for mean in means] == wanted:
            if names[0] == "exp_avg_sq_row":
                means = [np.squeeze(mean, axis) for mean, axis in zip(means, (-1, -2), strict=True)]
            return {name: as_tensor(mean, entry.state.get(name)) for name, mean in zip(names, means, strict=True)}
    raise ValueError(
        f"{quoted(at.paths[k])} has means of shape {' and '.join(str(mean.shape) for mean in pair)} in the layout of "
        f"PyTorch, which keeps those of the last two axes of {entry.name!r}: {' and '.join(map(str, wanted))}"
    )


def _step_of(count: int, entry: TorchEntry) -> Any:
    """The clock, as PyTorch keeps it: a tensor of float32, and in transformers a number."""
    torch: Any = needed("torch", "torch")
    if "scale_parameter" in entry.group:
        return count
    old = entry.state.get("step")
    if hasattr(old, "detach"):
        return torch.full_like(old, count)
    wide = torch.get_default_dtype() == torch.float64
    return torch.tensor(float(count), dtype=torch.float64 if wide else torch.float32)
