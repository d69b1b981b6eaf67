"""How states show themselves: numbers by value, memory by shape and dtype, in a terminal and in Jupyter.

    AdamState(count=3, hyper={b1: 0.9, b2: 0.999, eps: 1e-08}, m={'w': f32[64,64]}, v={'w': f32[64,64]})

The states of rules are NamedTuples that the authors of rules write; they become readable when a rule is made of them.
"""

import re
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxopt_rules import markup, trees, variables
from jaxopt_rules.families import Place, access, is_family, is_record, nodes
from jaxopt_rules.hyperparameters import COMPLEMENT, Scheduled, decimal, public_name
from jaxopt_rules.tables import size_text

_LONGEST = 200  # characters of a tree that is written out; of a longer one it is said how large it is
_MOST_LEAVES = 500  # that are listed in HTML
_MOST_VALUES = 6  # of a hyperparameter that has several, in a batch of states
_DEEPEST = 20  # containers within containers

_GENERATED = namedtuple("_GENERATED", ()).__repr__.__code__


def make_readable(State: type) -> None:
    """Gives a class of states the texts of this module, unless its author wrote others."""
    ours = {"__repr__": state_text} if getattr(State.__repr__, "__code__", None) is _GENERATED else {}
    if not hasattr(State, "_repr_html_"):
        ours["_repr_html_"] = state_html
    for name, method in ours.items():
        setattr(State, name, method)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def state_text(state: Any) -> str:
    """The state of a rule in one line."""
    shown = [f"{name}={_field_text(name, field)}" for name, field in state._asdict().items()]
    return f"{type(state).__name__}({', '.join(shown)})"


def _field_text(name: str, field: Any) -> str:
    if _holds_numbers(name, field):
        return "{" + ", ".join(_entries(field)) + "}"
    return _number_text(field) if name == "count" and _is_array(field) else _part_text(field)


def _holds_numbers(name: str, field: Any) -> bool:
    """Whether it is a dict of hyperparameters or of recorded values."""
    return name in ("hyper", "metrics") and isinstance(field, Mapping)


def _entries(numbers: Mapping[str, Any]) -> Iterator[str]:
    """Hyperparameters, under their public names, or recorded values, each with what it is now."""
    # In the order of the public names, since JAX brings a dict in that of its own.
    for name, stored in sorted(numbers.items(), key=lambda entry: public_name(entry[0])):
        value = stored.value if isinstance(stored, Scheduled) else stored
        value = _as_array(value) if isinstance(value, int | float) else value
        text = _number_text(value, name) if _is_array(value) else _leaf_text(value)
        yield f"{public_name(name)}: {text}{' (scheduled)' if isinstance(stored, Scheduled) else ''}"


def _as_array(x: float) -> np.ndarray:
    """A number of Python. One that `tolist` made of a float32 has the digits of that."""
    if isinstance(x, float):
        with np.errstate(over="ignore"):
            narrow = np.float32(x)
        return np.asarray(narrow if float(narrow) == x else x)
    return np.asarray(x)


def _part_text(x: Any) -> str:
    """A part of a state. The states in it are written out, however long that is."""
    if is_family(x):
        return repr(x)
    return _container_text(x, _part_text) if any(is_record(node.state) for node in nodes(x)) else _tree_text(x)


def _tree_text(tree: Any) -> str:
    """A tree of arrays: in full if that is short, or else how large it is."""
    return _short_text(tree) or f"<{_size(tree)}>"


def _short_text(tree: Any) -> str | None:
    """A tree in full, unless that is long."""
    # Values of many scalars would be fetched in vain, one by one.
    text = _written_out(tree) if len(jax.tree.leaves(tree)) < _LONGEST / 3 else None
    return text if text and len(text) <= _LONGEST else None


def _written_out(x: Any) -> str:
    if is_family(x):
        return repr(x)
    if x is None or _is_array(x):
        return _leaf_text(x)
    if isinstance(x, Mapping) or type(x) in (tuple, list) or is_record(x):
        return _container_text(x, _written_out)
    leaves = trees.flatten_with_paths(x)[0]
    if len(leaves) == 1 and leaves[0][1] is x:
        return _leaf_text(x)
    # A node of another library, such as an Equinox module.
    return f"{type(x).__name__}({', '.join(f'{path}={_leaf_text(leaf)}' for path, leaf in leaves)})"


def _container_text(x: Any, write: Callable[[Any], str]) -> str:
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{key!r}: {write(part)}" for key, part in x.items()) + "}"
    if is_record(x):
        return f"{type(x).__name__}({', '.join(f'{name}={write(part)}' for name, part in x._asdict().items())})"
    parts = ", ".join(map(write, x))
    if isinstance(x, list):
        return f"[{parts}]"
    return f"({parts},)" if len(x) == 1 else f"({parts})"


def _leaf_text(x: Any) -> str:
    if _is_array(x):
        return _kind_text(x) if x.shape else _number_text(x)
    text = repr(x)
    return text if len(text) <= _LONGEST else type(x).__name__


def _number_text(x: Any, stored_name: str = "") -> str:
    """A number by value, several by their values or their range, and what cannot be read by its kind alone."""
    numbers = _readable(x)
    if numbers is None or numbers.size == 0:
        return _kind_text(x)
    complement = stored_name.startswith(COMPLEMENT)
    exact = not jnp.issubdtype(numbers.dtype, jnp.floating)
    as_it_is = exact and not (complement and jnp.issubdtype(numbers.dtype, jnp.integer))

    def text(number: Any) -> str:
        return str(number) if as_it_is else repr(decimal(stored_name, number))

    if numbers.ndim == 0:
        return text(numbers[()])
    if numbers.ndim == 1 and numbers.size <= _MOST_VALUES:
        return f"[{', '.join(map(text, numbers))}]"
    ends = [text(numbers.min()), text(numbers.max())]
    if complement:
        ends.reverse()
    return f"{_kind_text(x)} of {ends[0]}" if ends[0] == ends[1] else f"{_kind_text(x)} from {ends[0]} to {ends[1]}"


def _readable(x: Any) -> np.ndarray | None:
    """The numbers of an array that is here, and no abstraction, no PRNG key, not donated, not on other machines."""
    x = _content(x)
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(x)
    if not isinstance(x, jax.Array) or isinstance(x, Tracer) or trees.is_key(x) or x.is_deleted():
        return None
    return np.asarray(x) if x.is_fully_addressable or x.is_fully_replicated else None


def _content(x: Any) -> Any:
    return variables.value(x) if variables.is_variable(x) else x


def _is_array(x: Any) -> bool:
    """Whether it has a shape and a dtype: an array, traced or not, or what stands for one."""
    x = _content(x)
    return isinstance(getattr(x, "shape", None), tuple) and hasattr(x, "dtype")


_SHORT = {"bfloat": "bf", "float": "f", "uint": "u", "int": "i", "complex": "c"}


def _short(dtype: Any) -> str:
    """The name that JAX's programs have for a dtype: `f32`."""
    return re.sub(r"^(bfloat|float|uint|int|complex)(?=\d)", lambda found: _SHORT[found[1]], str(dtype))


def _kind_text(x: Any) -> str:
    x = _content(x)
    return f"{_short(x.dtype)}[{','.join(map(str, x.shape))}]"


def _arrays(tree: Any) -> list[tuple[str, Any]]:
    return [(path, x) for path, x in trees.flatten_with_paths(tree)[0] if _is_array(x)]


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(x.shape, dtype=object)) * x.dtype.itemsize for _, x in _arrays(tree))


def _size(tree: Any) -> str:
    arrays = _arrays(tree)
    dtypes = " and ".join(dict.fromkeys(_short(x.dtype) for _, x in arrays))
    numbers = sum(int(np.prod(x.shape, dtype=object)) for _, x in arrays)
    return f"{len(arrays)} arrays of {dtypes}, {numbers:,} numbers, {size_text(_bytes(tree))}"


# ---------------------------------------------------------------------------------------------------------------------
# HTML
# ---------------------------------------------------------------------------------------------------------------------


def state_html(state: Any) -> str:
    """A state, or a tuple or dict of states, as a table: what each state in it holds, and the bytes of that."""
    total = ["total", escape(f"{len(_arrays(state))} arrays"), _size_html(state)]
    return markup.table(("field", "value", "bytes"), list(_rows(state, state, ())), total, (False, False, True))


def _rows(whole: Any, part: Any, place: Place) -> Iterator[list[str]]:
    """The rows for a part of a state: those of the states in it, each under its type and where it stands."""
    where = access(whole, place, "")
    if hasattr(type(part), "_fields"):
        yield [f"<b>{escape(type(part).__name__)}</b> {markup.faint(where)}"]
        for name, field in part._asdict().items():
            if name == "inner" and is_family(part):
                yield from _rows(whole, field, (*place, 0))
            elif name == "count" and is_family(part):
                yield [name, markup.code(_field_text(name, field)), ""]
            elif _holds_numbers(name, field) and is_family(part):
                yield from [[name, markup.code(", ".join(_entries(field))), ""]] if field else []
            else:
                yield [escape(name), _tree_html(field), _size_html(field)]
    elif any(hasattr(type(node.state), "_fields") for node in nodes(part)):
        for step, inner in part.items() if isinstance(part, Mapping) else enumerate(part):
            yield from _rows(whole, inner, (*place, step))
    elif _arrays(part):
        # The state of a rule from elsewhere, which is no NamedTuple.
        yield [markup.faint(where), _tree_html(part), _size_html(part)]


def _size_html(tree: Any) -> str:
    return size_text(_bytes(tree)).replace(" ", "&nbsp;")


def _tree_html(tree: Any) -> str:
    if text := _short_text(tree):
        return markup.code(text)
    arrays = _arrays(tree)
    lines = [f"{path}: {_leaf_text(x)}" for path, x in arrays[:_MOST_LEAVES]]
    lines += [f"and {len(arrays) - _MOST_LEAVES} more"] if len(arrays) > _MOST_LEAVES else []
    return f"<details><summary>{escape(_size(tree))}</summary>{markup.code(chr(10).join(lines))}</details>"


# ---------------------------------------------------------------------------------------------------------------------
# Tuples and dicts of states in Jupyter
# ---------------------------------------------------------------------------------------------------------------------


def load_ipython_extension(ipython: Any) -> None:
    """Shows tuples and dicts of states, as chains and groups have them, as tables: `%load_ext jaxopt_rules`.

    Everything else of this library shows itself without that.
    """
    formatter = ipython.display_formatter.formatters["text/html"]
    for container in (tuple, dict):
        formatter.for_type(container, _container_html)


def unload_ipython_extension(ipython: Any) -> None:
    """Undoes `load_ipython_extension`: `%unload_ext jaxopt_rules`."""
    formatter = ipython.display_formatter.formatters["text/html"]
    for container in (tuple, dict):
        if formatter.type_printers.get(container) is _container_html:
            formatter.pop(container)


def _container_html(x: Any) -> str | None:
    # The formatter is asked for subclasses, too, and in front of what these have of their own.
    if type(x) not in (tuple, dict):
        show = getattr(x, "_repr_html_", None)
        return None if show is None else show()
    return state_html(x) if _holds_states(x) and any(is_family(node.state) for node in nodes(x)) else None


def _holds_states(x: Any, depth: int = 0) -> bool:
    """Whether something is a state or is made of states, and of nothing else."""
    if hasattr(type(x), "_fields"):
        return True
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else [None]
    return depth < _DEEPEST and all(part is not None and _holds_states(part, depth + 1) for part in parts)
