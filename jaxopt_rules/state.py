"""What a state can be asked, how it is changed, and how it is saved under names that stay.

All of this goes through chains, groups and wrappers, and passes over states of other libraries.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxopt_rules import trees
from jaxopt_rules.families import (
    Family,
    access,
    families,
    is_record,
    map_families,
    map_nodes,
    nodes,
    per_parameter,
)
from jaxopt_rules.hyperparameters import COMPLEMENT, Address, Scheduled, check, complement, encode, public_name
from jaxopt_rules.rule import Rule
from jaxopt_rules.select import Selector, select
from jaxopt_rules.tables import Table

T = TypeVar("T")


class Entry(NamedTuple):
    """One hyperparameter, or one recorded value, in a state."""

    family: Family
    key: str  # the name within the family's state
    value: Any

    @property
    def name(self) -> str:
        return public_name(self.key)

    @property
    def address(self) -> Address:
        return self.family.place, self.key


def _named(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Entries under the shortest names that tell them apart: the bare name, else with labels in front of it."""
    named = {}
    for name in dict.fromkeys(entry.name for entry in entries):
        same = [entry for entry in entries if entry.name == name]
        spellings: tuple[Callable[[Entry], tuple[Any, ...]], ...] = (
            lambda e: (e.name,),
            lambda e: (*e.family.labels, e.name),
            lambda e: (*e.family.labels, e.family.name, e.name),
            lambda e: (*e.family.place, e.family.name, e.name),
        )
        for spelling in spellings:
            keys = [".".join(map(str, spelling(entry))) for entry in same]
            # Of several, none is called by the bare name: it would be taken for all of them.
            if len(set(keys)) == len(keys) and (len(same) == 1 or name not in keys):
                named |= dict(zip(keys, same, strict=True))
                break
    return named


def hyperparameter_entries(state: Any) -> dict[str, Entry]:
    """The hyperparameters of a state with the places where they stand, under the names of `hyperparams`."""
    return _named(
        [Entry(family, key, value) for family in families(state) for key, value in family.state.hyper.items()]
    )


def _value(entry: Entry) -> Array:
    stored = entry.value.value if isinstance(entry.value, Scheduled) else entry.value
    return complement(stored) if entry.key.startswith(COMPLEMENT) else stored


def hyperparams(state: Any) -> dict[str, Array]:
    """The hyperparameters that a state holds, as a flat dict of scalars.

    A name that occurs once in the state stands bare (`learning_rate`); others carry what tells them apart in front:
    names of chain members, or of families (`step.weight_decay`), or positions. Of a decay rate the state stores 1 − β;
    here it is β. For a hyperparameter that a schedule owns it is the value last used, and before the first update that
    for count 0.
    """
    return {name: _value(entry) for name, entry in hyperparameter_entries(state).items()}


def set_hyperparams(state: Any, values: Mapping[str, Any] | None = None, /, **named: Any) -> Any:
    """A state in which hyperparameters have new values, under the names of `hyperparams(state)` or longer ones.

        state = set_hyperparams(state, learning_rate=3e-4)
        state = set_hyperparams(state, {"step.weight_decay": 0.0, "matrix.learning_rate": 0.02})

    In front of a name may stand, in this order, labels of groups and names of chain members that it is in, and the name
    of its family: where a state has one learning rate, in a group `matrix`, it is `learning_rate`,
    `matrix.learning_rate`, `step.learning_rate` and `matrix.step.learning_rate`. Nothing is compiled anew: shapes
    and dtypes stay. Works under `jax.jit` with traced values, too.

    Raises:
      KeyError: the state has no such hyperparameter, or several of this name; names those it has.
      ValueError: the value is not legal or not of the shape of the old one, a schedule owns the name, or one
        hyperparameter is named twice.
      TypeError: the value is not a number.
    """
    entries = hyperparameter_entries(state)
    new: dict[Address, Array] = {}
    for name, value in [*(values or {}).items(), *named.items()]:
        entry = _entry(entries, name)
        if isinstance(entry.value, Scheduled):
            raise ValueError(f"{name} is owned by a schedule, whose values it follows; it cannot be set")
        if callable(value):
            raise TypeError(f"{name} is set to a number; a schedule is given when the rule is made")
        if entry.address in new:
            raise ValueError(f"{name} is given twice, under two of its names")
        new[entry.address] = replacement(entry, value)
    return replace_hyperparameters(state, new)


def _entry(entries: Mapping[str, Entry], name: str) -> Entry:
    if name in entries:
        return entries[name]
    meant = {
        known: entry
        for known, entry in entries.items()
        if _spells(name, (*map(str, entry.family.place), entry.family.name), entry.name)
    }
    if len(meant) == 1:
        return meant.popitem()[1]
    if meant:
        raise KeyError(f"{name!r} may be {' or '.join(meant)}; write one of these")
    raise KeyError(f"the state has no hyperparameter {name!r}; it has {', '.join(entries) or 'none'}")


def _spells(text: str, context: Sequence[str], name: str) -> bool:
    """Whether a text is this name with some of its context in front. Each part may itself contain dots."""
    return text == name or any(
        text.startswith(f"{part}.") and _spells(text[len(part) + 1 :], context[i + 1 :], name)
        for i, part in enumerate(context)
    )


def replacement(entry: Entry, value: Any) -> Array:
    """`value` checked, encoded, and stored as the entry's old value was: its shape, dtype and sharding."""
    old = entry.value
    check(entry.key, value, jnp.shape(old))
    new = jnp.array(encode(entry.key, value), old.dtype)
    return trees.placed_like(new, old)


def replace_hyperparameters(state: Any, new: Mapping[Address, Any]) -> Any:
    """A state with other entries at these addresses, unchecked."""

    def replace(family: Family) -> Any:
        hyper = {key: new.get((family.place, key), value) for key, value in family.state.hyper.items()}
        return family.state._replace(hyper=hyper)

    return map_families(replace, state)


def metrics(state: Any) -> dict[str, Array]:
    """What the last update recorded, as a flat dict of scalars named as in `hyperparams`.

    The learning rates used, and what rules record on the way: `grad_norm` where something clips. Before the first
    update recorded values are 0. The structure never changes, so `jax.lax.scan` can stack the dict.
    """
    rates = {
        name: _value(entry) for name, entry in hyperparameter_entries(state).items() if entry.name == "learning_rate"
    }
    recorded = [
        Entry(family, key, value)
        for family in families(state)
        for key, value in getattr(family.state, "metrics", {}).items()
    ]
    return rates | {name: entry.value for name, entry in _named(recorded).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a state
# ---------------------------------------------------------------------------------------------------------------------


def find(state: Any, State: type[T]) -> T:
    """The one state of this type in a state.

        find(state, AdamState).m

    Looks through any nesting; the type may be that of a wrapper, or of another library.

    Raises:
      KeyError: there is none; names the types there are.
      ValueError: there are several; says where they are.
    """
    found = [node for node in nodes(state) if isinstance(node.state, State)]
    if not found:
        there = dict.fromkeys(type(node.state).__name__ for node in nodes(state) if is_record(node.state))
        raise KeyError(f"there is no {State.__name__} in the state; it has {', '.join(there) or 'none'}")
    if len(found) > 1:
        *others, last = [node.place for node in found]
        unlike = (last[:n] for n in range(len(last) + 1) if all(place[:n] != last[:n] for place in others))
        raise ValueError(
            f"the state has several {State.__name__}: {', '.join(access(state, node.place) for node in found)}; "
            f"look for one in a part of the state: find({access(state, next(unlike))}, {State.__name__})"
        )
    return found[0].state


def reset(rule: Rule, state: Any, params: Any, where: Selector | None = None) -> Any:
    """A state in which the slots of some parameters are as they were at birth, for layers that begin anew.

        state = reset(rule, state, params, "head/**")

    Hyperparameters keep the values that they have now. Counters belong to all parameters: where only some are
    selected, the clock goes on, and Adam's bias correction does not begin anew for them. Late in a training, the first
    step of such a parameter is (1 − b1)/√(1 − b2) times that from a newborn state: 3.2 times with 0.9 and 0.999.

    Args:
      rule: the rule that the state is of.
      params: the parameters, from which the new slots are born.
      where: whose slots, by the paths and arrays of `params`. `None`: everything but the hyperparameters, so counters,
        recorded values and PRNG keys, too.

    Raises:
      ValueError: a pattern matches nothing, or the state is not one of this rule and these parameters.
    """
    fresh = rule.init(params)
    born = {node.place: node.state for node in nodes(fresh) if is_record(node.state)}
    there = {node.place: node.state for node in nodes(state) if is_record(node.state)}
    if {place: type(x) for place, x in there.items()} != {place: type(x) for place, x in born.items()}:
        made, wanted = (", ".join(type(x).__name__ for x in states.values()) for states in (there, born))
        raise ValueError(f"reset: the state is made of {made}, and the rule makes {wanted}; is it another rule's?")
    if where is None:
        return map_families(lambda family: _with_hyperparameters_of(there[family.place], family.state), fresh)
    leaves, treedef = trees.flatten(params)
    hits = select(where, trees.paths(params), leaves)
    # Where the tree is one array, no structure tells what is its own; what is born without it is not.
    single = treedef == jax.tree.structure(0)
    bare = {node.place: node.state for node in nodes(rule.init(None))} if single else {}

    def renewed(node: Family) -> Any:
        if not is_record(node.state):
            return node.state
        slots = {}
        for name in node.slots:
            after = per_parameter(treedef, node, getattr(born[node.place], name))
            if after is not None and not jax.tree.leaves(getattr(bare.get(node.place), name, None)):
                before = trees.align(treedef, getattr(node.state, name), f"the state's {name}", "the parameters")
                chosen = [b if hit else a for hit, a, b in zip(hits, before, after, strict=True)]
                slots[name] = jax.tree.unflatten(treedef, chosen)
        return node.state._replace(**slots)

    return map_nodes(renewed, state)


def _with_hyperparameters_of(live: Any, fresh: Any) -> Any:
    # What a schedule owns follows the clock, which begins anew.
    kept = {key: value for key, value in live.hyper.items() if not isinstance(value, Scheduled)}
    return fresh._replace(hyper=fresh.hyper | kept)


def memory(state: Any) -> Table:
    """How many bytes a state takes, by slot and dtype: a table with `slot`, `dtype`, `arrays`, `bytes`.

        print(memory(jax.eval_shape(adamw(3e-4).init, params)))

    Arrays without axes are counted in one line, `scalars`. States of other libraries are listed by their position.
    Works on arrays and on `jax.ShapeDtypeStruct`s, so before anything is allocated. `memory(state).total` is the last
    row; the bytes are those of whole arrays, however they are sharded.
    """
    scalars = ("scalars", "")
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for name, leaf in zip(_leaf_names(state), jax.tree.leaves(state), strict=True):
        kind = (name.slot, str(_dtype(leaf))) if jnp.ndim(leaf) else scalars
        arrays, size = rows.get(kind, (0, 0))
        rows[kind] = arrays + 1, size + math.prod(jnp.shape(leaf)) * _dtype(leaf).itemsize
    cells = sorted(((*kind, *row) for kind, row in rows.items()), key=lambda cell: cell[:2] == scalars)
    arrays, size = map(sum, zip((0, 0), *rows.values(), strict=True))
    return Table(("slot", "dtype", "arrays", "bytes"), tuple(cells), ("total", "", arrays, size))


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LeafName:
    owner: str  # labels and family; empty for states of other libraries
    field: str  # of the family's state
    path: str  # within the field; of a foreign state, within the whole

    def __str__(self) -> str:
        return ".".join(filter(None, (self.owner, self.field, self.path)))

    @property
    def slot(self) -> str:
        return f"{self.owner}.{self.field}" if self.owner else self.path.partition(".")[0]


def _leaf_names(state: Any) -> list[_LeafName]:
    taken: dict[str, int] = {}

    def name_family(family: Family) -> Any:
        owner = ".".join((*family.labels, family.name))
        taken[owner] = taken.get(owner, 0) + 1
        owner = owner if taken[owner] == 1 else f"{owner}#{taken[owner]}"
        named: dict[str, Any] = {field: _names_in(part, owner, field) for field, part in family.own.items()}
        # The value of a schedule is saved under the name of the hyperparameter, which may be a plain number later.
        named["hyper"] = {
            key: jax.tree.map(lambda _, key=key: _LeafName(owner, "hyper", key), x)
            for key, x in family.state.hyper.items()
        }
        return family.state._replace(**named)

    leaves, _ = trees.flatten_with_paths(map_families(name_family, state), separator=".")
    return [x if isinstance(x, _LeafName) else _LeafName("", "", path) for path, x in leaves]


def _names_in(part: Any, owner: str, field: str) -> list[_LeafName]:
    # A list, and no tree like the field: nodes of other libraries may refuse to hold what is no array.
    return [_LeafName(owner, field, path) for path, _ in trees.flatten_with_paths(part)[0]]


def leaf_names(state: Any) -> list[str]:
    """A name for every leaf of a state, in the order of `jax.tree.leaves`.

    Names are made of labels, family, field and path (`adam.m.blocks/0/w`, `step.hyper.learning_rate`), and not of
    positions, so that putting a hook of another family in front of a chain, or a wrapper around it, renames nothing. Of
    several members of one family under one label, the second is `adam#2`, and so on; states of other libraries are
    named by their positions.
    """
    return list(map(str, _leaf_names(state)))


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(_dtype(x), jax.dtypes.prng_key)


def _key_impl(x: Any) -> Any:
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), x)  # it takes no struct by itself
    return found[0]


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _stored(x: Any) -> Any:
    """What is saved of a leaf: the numbers of a typed PRNG key, any other array itself."""
    if not _is_key(x):
        return x
    return jax.eval_shape(jax.random.key_data, x) if isinstance(x, jax.ShapeDtypeStruct) else jax.random.key_data(x)


def named_leaves(state: Any) -> dict[str, Any]:
    """What is saved of each leaf, itself and no copy, by its name. Works on `ShapeDtypeStruct`s.

    Raises:
      TypeError: a leaf is neither an array nor a number.
      ValueError: two leaves have the same name.
    """
    names, leaves = leaf_names(state), jax.tree.leaves(state)
    trees.check_distinct(names, "the state")
    for name, x in zip(names, leaves, strict=True):
        if not (hasattr(x, "dtype") or isinstance(x, int | float | complex)):
            raise TypeError(
                f"{trees.quoted(name)} is {x!r}, which cannot be saved; leave it out: eqx.filter(model, eqx.is_array)"
            )
    return dict(zip(names, map(_stored, leaves), strict=True))


def state_dict(state: Any) -> dict[str, np.ndarray]:
    """A state as a flat dict of NumPy arrays under names that stay (see `load_state_dict`).

        numpy.savez("state.npz", **state_dict(state))
        safetensors.numpy.save_file(state_dict(state), "state.safetensors")

    The arrays are copies. Names are like `adam.m.blocks/0/w` and `step.hyper.learning_rate`: made of the labels of
    groups and of named chain members, the family, the field and the path of the parameter. They do not change when
    clipping is put in front, a number becomes a schedule, or `accumulate` is put around. Typed PRNG keys are saved as
    their numbers, states of other libraries under their positions. `numpy.savez` keeps the types that NumPy knows, and
    bfloat16; for others, such as float8, take Orbax.
    """
    return {name: np.array(x, order="C") for name, x in named_leaves(state).items()}


class LoadReport(NamedTuple):
    """What `load_state_dict` could not load."""

    missing: tuple[str, ...]  # names that the state has and the saved one has not
    unexpected: tuple[str, ...]  # names that the saved one has and the state has not
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, saved shape, shape in the state
    retyped: tuple[tuple[str, str, str], ...]  # name, saved dtype, dtype in the state, of another kind

    @property
    def problems(self) -> list[str]:
        return [
            *(f"{name} is missing" for name in self.missing),
            *(f"{name} is unexpected" for name in self.unexpected),
            *(f"{name} has shape {saved}, not {wanted}" for name, saved, wanted in self.reshaped),
            *(f"{name} is of type {saved}, not {wanted}{_lost(name, saved)}" for name, saved, wanted in self.retyped),
        ]

    def __str__(self) -> str:
        return "\n".join(self.problems) or "everything was loaded"


def _lost(name: str, dtype: str) -> str:
    """What to do about an array whose type a file of NumPy did not keep."""
    return _LOST.format(name) if dtype.startswith("|V") else ""


_LOST = (
    " (files of NumPy keep only the bytes of types that it does not know; saved[{!r}].view(dtype) gives the type back, "
    "and Orbax keeps it)"
)


def load_state_dict(
    state: T,
    saved: Mapping[str, Any],
    strict: bool = True,
    hyperparams: Literal["saved", "new"] = "saved",
) -> tuple[T, LoadReport]:
    """A state with the values that `state_dict` gave, and what did not fit.

        state, _ = load_state_dict(rule.init(params), numpy.load("state.npz"))
        state, report = load_state_dict(rule.init(params), saved, strict=False)

    Args:
      state: one of the structure wanted, as `rule.init(params)` makes it. Its shapes, dtypes, kinds of PRNG keys and
        placement on devices hold for the result: what is an array of NumPy or a Python number there stays one. Where
        leaves are `ShapeDtypeStruct`s, nothing may be missing.
      saved: arrays by name. A number is cast to the dtype of the state if it is of the same kind: float64 to float32,
        but not float32 to int32.
      strict: whether everything must fit; else what does not stays as it is in `state`.
      hyperparams: "saved" takes them from `saved`, "new" keeps those of `state`.

    Raises:
      ValueError: `strict`, and something does not fit; or a saved hyperparameter is outside its domain.
    """
    copies = {name: jnp.array(x) if isinstance(x, Array) and not _is_key(x) else x for name, x in saved.items()}
    return take_over(state, copies, strict, hyperparams)


def take_over(
    state: T, saved: Mapping[str, Any], strict: bool = True, hyperparams: Literal["saved", "new"] = "saved"
) -> tuple[T, LoadReport]:
    """As `load_state_dict`, but that JAX's arrays in `saved` may become the state's own.

    For what is not loaded because it does not fit, a `ShapeDtypeStruct` may stand in `saved`.
    """
    if hyperparams not in ("saved", "new"):
        raise ValueError(f"hyperparams is 'saved' or 'new', not {hyperparams!r}")
    new = hyperparams == "new"
    leaves, treedef = jax.tree.flatten(state)
    names = _leaf_names(state)
    wanted = {
        str(name): _stored(leaf)
        for name, leaf in zip(names, leaves, strict=True)
        if not (new and name.field == "hyper")
    }
    values = {name: _readable(saved[name], like) for name, like in wanted.items() if name in saved}
    pairs = [(name, value, wanted[name]) for name, value in values.items()]
    report = LoadReport(
        missing=tuple(name for name in wanted if name not in values),
        unexpected=tuple(name for name in saved if name not in wanted and not (new and ".hyper." in name)),
        reshaped=tuple((name, x.shape, jnp.shape(y)) for name, x, y in pairs if x.shape != jnp.shape(y)),
        retyped=tuple(
            (name, str(x.dtype), str(_dtype(y)))
            for name, x, y in pairs
            if not np.can_cast(x.dtype, _dtype(y), "same_kind")
        ),
    )
    if strict and (problems := report.problems):
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the saved state does not fit: {', '.join(problems[:5])}{more}")
    fitting = values.keys() - {name for name, *_ in (*report.reshaped, *report.retyped)}
    restored = [
        _restored(values[str(name)], leaf) if str(name) in fitting else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    if absent := [str(name) for name, x in zip(names, restored, strict=True) if isinstance(x, jax.ShapeDtypeStruct)]:
        raise ValueError(f"{', '.join(absent[:5])} cannot be loaded and is abstract in the state: give it a value")
    loaded = jax.tree.unflatten(treedef, restored)
    for entry in () if new else hyperparameter_entries(loaded).values():
        check(entry.key, _value(entry), jnp.shape(_value(entry)))
    return loaded, report


def _readable(saved: Any, like: Any) -> Any:
    """A saved array; of types that NumPy does not know, such as bfloat16, its files hold the bytes alone.

    Two bytes can only be bfloat16. What one byte was, of the many float8 and int4, cannot be told.
    """
    if isinstance(saved, Array | jax.ShapeDtypeStruct):
        return saved
    x = np.asarray(saved)
    return x.view(jnp.bfloat16) if x.dtype == np.dtype("V2") and _dtype(like) == jnp.bfloat16 else x


def _restored(saved: Any, leaf: Any) -> Any:
    if isinstance(leaf, int | float | complex) and not isinstance(leaf, np.generic):
        return type(leaf)(np.asarray(saved).item())
    if isinstance(leaf, np.ndarray | np.generic):
        return np.array(saved, leaf.dtype)
    dtype = _dtype(_stored(leaf))
    new = saved.astype(dtype) if isinstance(saved, Array) else jnp.array(saved, dtype)
    if _is_key(leaf):
        new = jax.random.wrap_key_data(new, impl=_key_impl(leaf))
    return trees.placed_like(new, leaf)
