"""Parameters that hold their gradient, and `backward`, which fills it."""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.interpreters import partial_eval

from jaxopt_rules.numerics import is_inexact


class Parameter:
    """An array and its gradient. `grad` is `None` where there is none, which is not the same as zero.

    Optimizers remember a parameter as the object, not by its name or value.
    """

    __slots__ = ("__weakref__", "data", "grad")

    data: Array
    grad: Array | None

    def __init__(self, data: Any, grad: Any = None) -> None:
        self.data = _array(data)
        self.grad = None if grad is None else _array(grad)

    def __repr__(self) -> str:
        return f"Parameter({self.data!r}, grad={self.grad!r})"


def _array(x: Any) -> Array:
    x = jnp.asarray(x)
    # A weak type would cost a second trace as soon as an update has made it strong.
    return jnp.array(x, x.dtype) if x.weak_type else x


class Model(Protocol):
    """Anything whose `params()` gives its parameters by name."""

    def params(self) -> Mapping[str, Parameter]: ...


def is_model(x: object) -> TypeGuard[Model]:
    """Whether `x` has a method `params`."""
    return callable(getattr(x, "params", None))


def named_parameters(model: Model) -> dict[Parameter, str]:
    """The parameters of a model and their names; one that is listed under several names comes once."""
    if not is_model(model):
        raise TypeError(
            f"{type(model).__name__} has no params() that gives its parameters by name; for a model that is a pytree, "
            "pass the gradients too: update(model, grads)"
        )
    named: dict[Parameter, str] = {}
    for name, parameter in model.params().items():
        if not isinstance(parameter, Parameter):
            raise TypeError(f"params() must give Parameters, but {name!r} is a {type(parameter).__name__}")
        named.setdefault(parameter, name)
    return named


def cleargrads(model: Model) -> None:
    """Sets every gradient to `None`, not to zero."""
    for parameter in named_parameters(model):
        parameter.grad = None


def backward(loss_fn: Callable[..., Any], model: Model, *args: Any, has_aux: bool = False) -> Any:
    """Computes the loss and adds its gradient to the `.grad` of every parameter that it depends on.

    `loss_fn(model, *args)` returns a scalar, or (scalar, aux) with `has_aux`. It receives this model itself, whose
    `Parameter.data` hold traced arrays while it runs. It is compiled, once for each set of shapes: what it reads beside
    parameters and arguments is fixed then, and what it writes to the model's own attributes is undone. Pass the same
    function every time, and what changes as an argument.

    A gradient is added to the one that is there. A parameter that the loss does not depend on keeps its `.grad`,
    `None` if there was none. That is not a zero gradient: such a parameter is not updated at all. The gradient of a
    complex parameter is the direction in which the loss rises, the conjugate of what `jax.grad` gives.

    Args:
      *args: pytrees of arrays; `None` is allowed.

    Returns:
      The loss, or (loss, aux).

    Raises:
      TypeError: the loss is not a real scalar, `has_aux` does not fit what `loss_fn` returns, or it is called on
        traced arrays.
    """
    named = named_parameters(model)
    compiled = _compiled_backward(loss_fn, model, tuple(named), has_aux)
    loss, aux, grads = compiled([p.data for p in named], args)
    if isinstance(loss, Tracer):
        raise TypeError(
            "backward changes objects, which jax.jit cannot trace; inside a compiled function, use jax.grad"
        )
    added = [(p, g) for p, g in zip(named, grads, strict=True) if g is not None and p.grad is not None]
    for parameter, grad in zip(named, grads, strict=True):
        if grad is not None and parameter.grad is None:
            parameter.grad = grad
    if added:
        sums = _sums([p.grad for p, _ in added], [g for _, g in added])
        for (parameter, _), total in zip(added, sums, strict=True):
            parameter.grad = total
    return (loss, aux) if has_aux else loss


@jax.jit
def _sums(old: list[Any], more: list[Array]) -> list[Array]:
    return [x + y for x, y in zip(old, more, strict=True)]


@contextlib.contextmanager
def holding(model: Any, parameters: Sequence[Parameter], datas: Sequence[Any]) -> Iterator[None]:
    """Within it, the parameters of a model have these data. What is written to its attributes meanwhile is undone."""
    attributes = dict(vars(model)) if hasattr(model, "__dict__") else None
    before = [(p.data, p.grad) for p in parameters]
    try:
        for parameter, data in zip(parameters, datas, strict=True):
            parameter.data = data
        yield
    finally:
        for parameter, (data, grad) in zip(parameters, before, strict=True):
            parameter.data, parameter.grad = data, grad
        if attributes is not None:
            vars(model).clear()
            vars(model).update(attributes)


# By model and by function, which both may go: nothing here keeps either of them alive.
_backwards: dict[int, weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, Any]]] = {}


def _compiled_backward(
    loss_fn: Callable[..., Any], model: Model, parameters: tuple[Parameter, ...], has_aux: bool
) -> Callable[..., Any]:
    try:
        model_ref = weakref.ref(model)
    except TypeError as error:
        name = type(model).__name__
        raise TypeError(f"{name} cannot be referred to weakly; add '__weakref__' to its __slots__") from error
    if id(model) not in _backwards:
        weakref.finalize(model, _backwards.pop, id(model))
        _backwards[id(model)] = weakref.WeakKeyDictionary()
    # A bound method is a new object each time it is looked up; what lasts is its function and its owner.
    method = inspect.ismethod(loss_fn)
    function, owner = (loss_fn.__func__, id(loss_fn.__self__)) if method else (loss_fn, None)
    loss_ref = weakref.WeakMethod(loss_fn) if method else weakref.ref(loss_fn)
    cache, key = _backwards[id(model)].setdefault(function, {}), (parameters, has_aux, owner)
    known_ref, compiled = cache.get(key, (lambda: None, None))
    # The id of a method's owner may be that of another one, which is gone.
    if compiled is None or known_ref() != loss_fn:
        compiled = _make_backward(loss_ref, model_ref, parameters, has_aux)
        cache[key] = loss_ref, compiled
    return compiled


def _make_backward(
    loss_ref: Callable[[], Any], model_ref: Callable[[], Any], parameters: tuple[Parameter, ...], has_aux: bool
) -> Callable[..., Any]:
    def loss_of(datas: list[Array], args: tuple[Any, ...]) -> tuple[Array, Any]:
        model = model_ref()
        with holding(model, parameters, datas):
            result = loss_ref()(model, *args)
        return _loss_and_aux(result, has_aux)

    @jax.jit
    def run(datas: list[Array], args: tuple[Any, ...]) -> tuple[Array, Any, list[Array | None]]:
        from jax.extend.core import jaxpr_as_fun  # here, since it brings Pallas, which takes as long as this library

        # One trace of loss_fn serves the value, the gradient, and the question which parameters it depends on.
        program, shapes = jax.make_jaxpr(loss_of, return_shape=True)(datas, args)
        evaluate = jaxpr_as_fun(program)
        treedef = jax.tree.structure(shapes)

        def value(chosen: dict[int, Array]) -> tuple[Array, Any]:
            everything = [chosen.get(k, data) for k, data in enumerate(datas)]
            return jax.tree.unflatten(treedef, evaluate(*everything, *jax.tree.leaves(args)))

        inexact = {k: data for k, data in enumerate(datas) if is_inexact(data)}
        used = _depends_on(lambda chosen: value(chosen)[0], inexact)
        (loss, aux), grads = jax.value_and_grad(value, has_aux=True)(used)
        # Of a complex x, JAX gives the conjugate of the direction in which the loss rises.
        rising = {k: jnp.conj(g) if jnp.iscomplexobj(g) else g for k, g in grads.items()}
        return loss, aux, [rising.get(k) for k in range(len(datas))]

    return run


def _loss_and_aux(result: Any, has_aux: bool) -> tuple[Array, Any]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"with has_aux=True, the loss function returns (loss, aux), not a {type(result).__name__}")
    loss, aux = result if has_aux else (result, None)
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | float | int):
        hint = "; with an auxiliary result, pass has_aux=True" if isinstance(loss, tuple) else ""
        raise TypeError(f"the loss must be a real scalar, not a {type(loss).__name__}{hint}")
    loss = jnp.asarray(loss)
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"the loss must be a real scalar, not {loss.dtype} of shape {loss.shape}; "
            "reduce it, for example with jnp.mean"
        )
    return loss, aux


def _depends_on(function: Callable[[dict[int, Array]], Array], xs: dict[int, Array]) -> dict[int, Array]:
    """Those of `xs` that the derivative of a scalar function depends on, as its program shows."""

    def tangent(dxs: dict[int, Array]) -> Array:
        return jax.jvp(function, (xs,), (dxs,))[1]

    if not xs:
        return {}
    jaxpr = jax.make_jaxpr(tangent)(jax.tree.map(jnp.zeros_like, xs)).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True])
    return {k: xs[k] for k, hit in zip(sorted(xs), used, strict=True) if hit}
