"""How the library reads pytrees: which leaves take part, what they are called, and how two trees are matched."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from jaxopt_rules.numerics import is_inexact, widened
from jaxopt_rules.variables import is_variable, nnx

Structure = Any  # jax.tree_util.PyTreeDef, which is no type to a type checker


def _is_none(x: object) -> bool:
    return x is None


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """Leaves and structure, where `None` is a leaf: it holds the place of what is absent."""
    return jax.tree.flatten(tree, is_leaf=_is_none)


def paths(tree: Any) -> list[str]:
    """The path of every leaf of `flatten(tree)`, like `blocks/0/attn/w`."""
    return [_path(keys) for keys, _ in _leaves_with_keys(tree, _is_none)]


def flatten_with_paths(tree: Any, separator: str = "/") -> tuple[list[tuple[str, Any]], Structure]:
    """(path, leaf) for every leaf of `jax.tree.leaves(tree)`, where `None` is no leaf, and the structure."""
    return [(_path(keys, separator), leaf) for keys, leaf in _leaves_with_keys(tree)], jax.tree.structure(tree)


def _leaves_with_keys(tree: Any, is_leaf: Callable[[Any], bool] = lambda x: False) -> list[tuple[Any, Any]]:
    """As JAX gives them, but that a Flax NNX variable, which holds one array, adds no key of its own."""
    if nnx() is None:
        return tree_flatten_with_path(tree, is_leaf)[0]
    found = []
    for keys, x in tree_flatten_with_path(tree, lambda x: is_leaf(x) or is_variable(x))[0]:
        if is_variable(x):
            content, _ = tree_flatten_with_path(x, lambda part, whole=x: part is not whole)
            found += [(keys + more, leaf) for _, part in content for more, leaf in _leaves_with_keys(part, is_leaf)]
        else:
            found.append((keys, x))
    return found


def _path(keys: Any, separator: str = "/") -> str:
    return keystr(keys, simple=True, separator=separator)


def check_distinct(paths: Sequence[str], what: str) -> None:
    """Refuses a tree in which two leaves have one path, as `{"a/b": x, "a": {"b": y}}` has.

    Raises:
      ValueError: names the path.
    """
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two leaves of {what} have the same path, {quoted(twice)}; rename one of them")


def quoted(path: str) -> str:
    """A path as error messages show it."""
    return f"'{path}'" if path else "the tree's only leaf"


def align(treedef: Structure, tree: Any, what: str, reference: str = "the gradients") -> list[Any]:
    """The parts of `tree` that stand where `treedef` has its leaves.

    Raises:
      ValueError: `tree` is built differently; names the first paths in which the two differ.
    """
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        expected = paths(jax.tree.unflatten(treedef, [0] * treedef.num_leaves))
        present = paths(tree)
        parts = []
        for text, some, others in (("lacks", expected, present), ("has besides", present, expected)):
            if difference := sorted(set(some) - set(others)):
                shown = ", ".join(map(quoted, difference[:3]))
                more = f" and {len(difference) - 3} more" if len(difference) > 3 else ""
                parts.append(f"it {text} {shown}{more}")
        detail = "; ".join(parts) or f"same paths, other containers: {error}"
        raise ValueError(f"{what} must be a tree like {reference}, but {detail}") from error


def check_gradient(path: Callable[[], str], g: Any, p: Any, what: str = "gradient") -> None:
    """Refuses a gradient (or an update) that cannot belong to its parameter; `path` is asked for the message alone.

    Raises:
      TypeError: one of the two is a Python number where an array is needed, or `g` is complex and `p` is real.
      ValueError: the shapes differ.
    """
    for name, x in ((what, g), ("parameter", None if g is None else p)):
        if isinstance(x, float | complex) and not isinstance(x, np.generic):
            raise TypeError(f"the {name} at {quoted(path())} is a Python number; make it an array: jnp.array({x!r})")
    if is_inexact(g) and is_inexact(p):
        if g.shape != p.shape:
            raise ValueError(f"the {what} at {quoted(path())} has shape {g.shape}, its parameter has shape {p.shape}")
        if jnp.issubdtype(g.dtype, jnp.complexfloating) and not jnp.issubdtype(p.dtype, jnp.complexfloating):
            raise TypeError(f"the {what} at {quoted(path())} is complex ({g.dtype}), its parameter is real ({p.dtype})")


def apply_updates(params: Any, updates: Any) -> Any:
    """params + updates, rounded once to each parameter's dtype.

    The sum is taken in the precision of the update (float32 or wider). A parameter whose update is `None`, and a
    leaf that is not an inexact array, is returned as it is.

    Raises:
      ValueError: the trees or the shapes of two leaves differ; names the path.
    """
    leaves, treedef = flatten(updates)
    current = align(treedef, params, "the parameters", "the updates")
    for k, (u, p) in enumerate(zip(leaves, current, strict=True)):
        check_gradient(lambda k=k: paths(updates)[k], u, p, "update")
    new = [_add(p, u) if u is not None and is_inexact(p) else p for p, u in zip(current, leaves, strict=True)]
    return jax.tree.unflatten(treedef, new)


def added(p: jax.Array, u: jax.Array) -> jax.Array:
    """p + u in the precision of the wider one, rounded to the dtype of p."""
    wide = jnp.promote_types(widened(p.dtype), widened(u.dtype))
    return (p.astype(wide) + u.astype(wide)).astype(p.dtype)


_add = jax.jit(added)


def scalar_home(leaves: Sequence[Any]) -> jax.sharding.Sharding | None:
    """Where a scalar belongs that accompanies these arrays, if they are bound to a place.

    Everywhere on their mesh, or on the device that they were put on. A scalar elsewhere would come back from the first
    compiled update in another place than it went in, and cost a second compilation.
    """
    for leaf in leaves:
        if isinstance(leaf, Tracer):
            continue
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        if getattr(leaf, "committed", False):
            return sharding
    return None


def placed_with(leaves: Sequence[Any], scalars: Any) -> Any:
    """A tree of scalars where scalars belong that accompany these arrays."""
    home = scalar_home(leaves)
    return scalars if home is None else jax.device_put(scalars, home)


def placed_like(new: jax.Array, old: Any) -> jax.Array:
    """`new` where `old` is, if that is bound to a place; one that is not goes wherever the others are."""
    sharding = binding(old)
    return new if sharding is None else jax.device_put(new, sharding)


def binding(x: Any) -> jax.sharding.Sharding | None:
    """The place that an array, or a struct that stands for one, is bound to."""
    if isinstance(x, Tracer):
        return None
    return x.sharding if getattr(x, "committed", isinstance(x, jax.ShapeDtypeStruct)) else None


def is_key(x: Any) -> TypeGuard[jax.Array]:
    """Whether `x` is an array of typed PRNG keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def own(x: Any) -> jax.Array:
    """A strong-typed copy of an array or of a typed PRNG key."""
    if is_key(x):
        return jax.random.wrap_key_data(jnp.array(jax.random.key_data(x)), impl=jax.random.key_impl(x))
    return jnp.array(x, jnp.result_type(x))


def unshared(tree: Any, others: Any) -> Any:
    """A tree with copies of those leaves that are also elsewhere in it, or in `others`: it can be donated."""
    known = {id(x) for x in jax.tree.leaves(others)}
    leaves, treedef = jax.tree.flatten(tree)
    for k, x in enumerate(leaves):
        leaves[k] = own(x) if id(x) in known else x
        known.add(id(x))
    return jax.tree.unflatten(treedef, leaves)
