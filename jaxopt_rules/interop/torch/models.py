"""The parameters of a model, there and back."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxopt_rules.interop.torch.layout import FLAX, Layout, Matched, as_numpy, as_tensor, fitted, listed, matched
from jaxopt_rules.trees import quoted


def load_model_state(state_dict: Mapping[str, Any], params: Any, layout: Layout = FLAX, *, strict: bool = True) -> Any:
    """The parameters of a PyTorch model, as a tree like `params`.

        params = load_model_state(torch.load("model.pt"), params)
        params = load_model_state(module.state_dict(), nnx.state(model, nnx.Param), strict=False)

    Args:
      state_dict: `module.state_dict()`: tensors or NumPy arrays by name.
      params: a tree of parameters, whose values do not matter; structure, shapes, dtypes and placement do. Leaves that
        are no arrays of floating-point numbers are returned as they are.
      layout: what is what; by default that of Flax.
      strict: whether all of `state_dict` must be taken, but for what is no floating-point number there. A model's
        running means and variances are in it as well as its parameters.

    Raises:
      TypeError: `state_dict` is none.
      ValueError: a parameter is missing there, has another shape, or is left over.
    """
    check_mapping(state_dict, "load_model_state takes module.state_dict()")
    at = matched(params, layout)
    _check_present(at, state_dict, "the state_dict")
    taken = set(at.names.values())
    left = [name for name, x in state_dict.items() if name not in taken and as_numpy(x).dtype.kind in "fcV"]
    if strict and left:
        raise ValueError(
            f"nothing here takes {listed(left)} of the state_dict; give the layout their names, or strict=False"
        )
    new = list(at.leaves)
    for k, name in at.names.items():
        p = at.leaves[k]
        new[k] = fitted(at.to_ours(k, state_dict[name], "the parameter", p.shape), p)
    return jax.tree.unflatten(at.treedef, new)


def check_mapping(x: Any, takes: str) -> None:
    if not isinstance(x, Mapping):
        name = type(x).__name__
        article = "an" if name[0] in "AEIOUaeiou" else "a"
        raise TypeError(f"{takes}, not {None if x is None else f'{article} {name}'}")


def _check_present(at: Matched, names: Mapping[str, Any], where: str) -> None:
    if missing := [k for k, name in at.names.items() if name not in names]:
        first = missing[0]
        more = f", and {len(missing) - 1} more are not" if len(missing) > 1 else ""
        raise ValueError(
            f"{quoted(at.paths[first])} is {at.names[first]!r} in PyTorch, which is not in {where}{more}; there are "
            f"{listed(list(names))}; say what it is called: also(names={{'{at.paths[first]}': ...}})"
        )


def model_state_dict(params: Any, layout: Layout = FLAX, *, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parameters as `module.load_state_dict` takes them: what undoes `load_model_state`.

        module.load_state_dict(model_state_dict(params, like=module.state_dict()))

    Args:
      params: a tree of parameters.
      layout: what is what; by default that of Flax.
      like: `module.state_dict()`, from which come dtypes, devices, and whatever is not among `params`. Without it the
        dtypes are those of `params`.

    Raises:
      TypeError: `like` is no state_dict.
      ValueError: a parameter is not in `like`, or has another shape there.
      ImportError: PyTorch is not installed.
    """
    at = matched(params, layout)
    if like is not None:
        check_mapping(like, "model_state_dict takes like=module.state_dict()")
        _check_present(at, like, "`like`")
    new = dict(like or {})
    for k, name in at.names.items():
        x = at.to_theirs(k, at.leaves[k])
        if like is not None and x.shape != tuple(like[name].shape):
            raise ValueError(
                f"{quoted(at.paths[k])} has shape {x.shape} in PyTorch's layout, and {name!r} in `like` has shape "
                f"{tuple(like[name].shape)}; say in the layout how the axes are moved"
            )
        new[name] = as_tensor(x, None if like is None else like[name])
    return new
