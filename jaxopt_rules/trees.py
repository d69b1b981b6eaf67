"""How the library reads pytrees: which leaves take part, what they are called, and how two trees are matched."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from jaxopt_rules.numerics import widened

Structure = Any  # jax.tree_util.PyTreeDef, which is no type to a type checker


def _is_none(x: object) -> bool:
    return x is None


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """Leaves and structure, where `None` is a leaf: it holds the place of what is absent."""
    return jax.tree.flatten(tree, is_leaf=_is_none)


def paths(tree: Any) -> list[str]:
    """The path of every leaf of `flatten(tree)`, like `blocks/0/attn/w`."""
    leaves, _ = tree_flatten_with_path(tree, is_leaf=_is_none)
    return [_path(keys) for keys, _ in leaves]


def flatten_with_paths(tree: Any) -> tuple[list[tuple[str, Any]], Structure]:
    """(path, leaf) for every leaf of `jax.tree.leaves(tree)`, where `None` is no leaf, and the structure."""
    leaves, treedef = tree_flatten_with_path(tree)
    return [(_path(keys), leaf) for keys, leaf in leaves], treedef


def _path(keys: Any) -> str:
    return keystr(keys, simple=True, separator="/")


def is_inexact(x: object) -> TypeGuard[jax.Array]:
    """Whether `x` is an array (or the shape of one) of real or complex floating-point numbers."""
    if isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return jnp.issubdtype(x.dtype, jnp.inexact)
    return False


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


def check_gradient(path: Callable[[], str], g: Any, p: Any) -> None:
    """Refuses a gradient (or update) that cannot belong to its parameter; `path` is asked for the message alone.

    Raises:
      TypeError: one of the two is a Python number where an array is needed.
      ValueError: the shapes differ.
    """
    for what, x in (("gradient", g), ("parameter", None if g is None else p)):
        if isinstance(x, float | complex) and not isinstance(x, np.generic):
            raise TypeError(f"the {what} at {quoted(path())} is a Python number; make it an array: jnp.array({x!r})")
    if is_inexact(g) and is_inexact(p) and g.shape != p.shape:
        raise ValueError(f"the gradient at {quoted(path())} has shape {g.shape}, its parameter has shape {p.shape}")


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
        check_gradient(lambda k=k: paths(updates)[k], u, p)
    new = [_add(p, u) if u is not None and is_inexact(p) else p for p, u in zip(current, leaves, strict=True)]
    return jax.tree.unflatten(treedef, new)


@jax.jit
def _add(p: jax.Array, u: jax.Array) -> jax.Array:
    wide = jnp.promote_types(widened(p.dtype), widened(u.dtype))
    return (p.astype(wide) + u.astype(wide)).astype(p.dtype)


def replicated(leaves: Sequence[Any]) -> jax.sharding.Sharding | None:
    """Where a scalar belongs that accompanies these arrays: everywhere on their mesh, if they live on one."""
    for leaf in leaves:
        if isinstance(leaf, Tracer):
            continue
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return None
