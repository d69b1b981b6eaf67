"""The small models and losses of the documented examples: `MLP`, `LSTM`, and what they are trained on.

    model = MLP((64, 32, 10), seed=0)
    loss = backward(lambda model, x, t: softmax_cross_entropy(model.forward(x), t), model, x, t)

They show the mutating API at work. Real models come from Flax or Equinox.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxopt_rules.parameters import Parameter, cleargrads


def sigmoid(x: ArrayLike) -> Array:
    """1 / (1 + e⁻ˣ), as ½ + ½ tanh(x / 2)."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * jnp.asarray(x))


def mean_squared_error(y: Array, t: Array) -> Array:
    """The mean over the rows of ‖y − t‖²: the sum of all squares divided by the length of the first axis.

    Raises:
      ValueError: the shapes differ (broadcasting would compare every row with every other), or there is no axis.
    """
    if jnp.shape(y) != jnp.shape(t) or jnp.ndim(y) == 0:
        raise ValueError(f"y and t must be arrays of one shape, (rows, ...), not {jnp.shape(y)} and {jnp.shape(t)}")
    return jnp.sum((y - t) ** 2) / len(y)


def softmax_cross_entropy(y: Array, t: Array) -> Array:
    """The mean over the rows of −log softmax(y)[t], where `t` holds the number of each row's class.

    Raises:
      TypeError: `t` does not hold integers.
      ValueError: the shapes are not (rows, classes) and (rows,).
    """
    if not jnp.issubdtype(jnp.result_type(t), jnp.integer):
        raise TypeError(f"t must hold class numbers, integers from 0, not {jnp.result_type(t)}")
    if jnp.ndim(y) != 2 or jnp.shape(t) != jnp.shape(y)[:1]:
        raise ValueError(f"y must have shape (rows, classes) and t (rows,), not {jnp.shape(y)} and {jnp.shape(t)}")
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(y), jnp.asarray(t)[:, None], axis=1))


class _Linear:
    """x W + b, with W ~ N(0, 1 / inputs) and b = 0, or no b."""

    def __init__(self, inputs: int, outputs: int, key: Array, bias: bool = True) -> None:
        self.w = Parameter(jax.random.normal(key, (inputs, outputs)) / math.sqrt(inputs))
        self.b = Parameter(jnp.zeros((1, outputs))) if bias else None

    def __call__(self, x: Array) -> Array:
        y = x @ self.w.data
        return y if self.b is None else y + self.b.data


def _params(layers: Mapping[str, _Linear]) -> dict[str, Parameter]:
    both = {f"{name}.{kind}": getattr(layer, kind) for name, layer in layers.items() for kind in ("w", "b")}
    return {name: parameter for name, parameter in both.items() if parameter is not None}


def _check_sizes(owner: str, sizes: Sequence[int]) -> None:
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{owner}: sizes must be positive integers, not {tuple(sizes)}")


def _check_input(owner: str, x: Array, inputs: int) -> None:
    if jnp.ndim(x) != 2 or jnp.shape(x)[1] != inputs:
        raise ValueError(f"this {owner} takes x of shape (rows, {inputs}), not {jnp.shape(x)}")


class MLP:
    """Linear layers with an activation between them: `linear[0].w` (inputs, n), `linear[0].b` (1, n), ...

    Args:
      sizes: of the input, of every hidden layer, and of the output.
      activation: what follows every layer but the last.
      seed: of the weights, which are drawn from N(0, 1 / inputs of the layer). Biases begin at 0.

    Raises:
      ValueError: fewer than two sizes, or one that is not positive.
    """

    def __init__(self, sizes: Sequence[int], activation: Callable[[Array], Array] = sigmoid, *, seed: int = 0) -> None:
        _check_sizes("MLP", sizes)
        if len(sizes) < 2:
            raise ValueError(f"MLP: sizes begin with the input's and end with the output's, not {tuple(sizes)}")
        keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
        self.sizes = tuple(sizes)
        self.activation = activation
        self.layers = tuple(map(_Linear, sizes[:-1], sizes[1:], keys))

    def params(self) -> dict[str, Parameter]:
        """The parameters by name."""
        return _params({f"linear[{i}]": layer for i, layer in enumerate(self.layers)})

    def cleargrads(self) -> None:
        """Sets every gradient to `None`."""
        cleargrads(self)

    def forward(self, x: Array) -> Array:
        """The output for every row of `x`, of shape (rows, outputs).

        Raises:
          ValueError: `x` is not of shape (rows, inputs).
        """
        _check_input("MLP", x, self.sizes[0])
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class LSTM:
    """One LSTM cell and a linear layer on its hidden state h.

        f, i, o = σ(x W_xk + b_k + h W_hk)          u = tanh(x W_xu + b_u + h W_hu)
        c ← f c + i u          h ← o tanh(c)          y = h W + b

    The parameters are `lstm.x2k.w`, `lstm.x2k.b`, `lstm.h2k.w` for k of f, i, o, u, then `linear.w`, `linear.b`. Where
    h or c is `None`, its term is left out; parameters that occur only there then get no gradient.

    `forward` moves h and c on. Inside `backward` that is undone when the loss has been computed, so a loss function
    takes the state as an argument and returns the new one:

        def loss_fn(model, state, x, t):
            model.state = state
            return mean_squared_error(model.forward(x), t), model.state

        loss, model.state = backward(loss_fn, model, model.state, x, t, has_aux=True)

    Args:
      inputs, hidden, outputs: the sizes of x, h and y.
      seed: of the weights, drawn as in `MLP`.

    Raises:
      ValueError: a size is not positive.
    """

    h: Array | None  # (rows, hidden)
    c: Array | None  # (rows, hidden)

    def __init__(self, inputs: int, hidden: int, outputs: int, *, seed: int = 0) -> None:
        _check_sizes("LSTM", (inputs, hidden, outputs))
        keys = jax.random.split(jax.random.key(seed), (3, 4))
        self.inputs = inputs
        self.x2 = {k: _Linear(inputs, hidden, key) for k, key in zip("fiou", keys[0], strict=True)}
        self.h2 = {k: _Linear(hidden, hidden, key, bias=False) for k, key in zip("fiou", keys[1], strict=True)}
        self.linear = _Linear(hidden, outputs, keys[2, 0])
        self.reset_state()

    def params(self) -> dict[str, Parameter]:
        """The parameters by name."""
        x2 = {f"lstm.x2{k}": layer for k, layer in self.x2.items()}
        h2 = {f"lstm.h2{k}": layer for k, layer in self.h2.items()}
        return _params(x2 | h2 | {"linear": self.linear})

    def cleargrads(self) -> None:
        """Sets every gradient to `None`."""
        cleargrads(self)

    @property
    def state(self) -> tuple[Array | None, Array | None]:
        """(h, c)."""
        return self.h, self.c

    @state.setter
    def state(self, state: tuple[Array | None, Array | None]) -> None:
        self.h, self.c = state

    def reset_state(self) -> None:
        """Forgets: h and c become `None`."""
        self.state = None, None

    def forward(self, x: Array) -> Array:
        """The output for the next `x` of every sequence, of shape (rows, outputs). Replaces h and c.

        Raises:
          ValueError: `x` is not of shape (rows, inputs), or its rows are not as many as those of the state.
        """
        _check_input("LSTM", x, self.inputs)
        for name, part in (("h", self.h), ("c", self.c)):
            if part is not None and len(part) != len(x):
                raise ValueError(f"x has {len(x)} rows, {name} has {len(part)}; reset_state() begins new sequences")
        f, i, o, u = (layer(x) if self.h is None else layer(x) + self.h2[k](self.h) for k, layer in self.x2.items())
        new = sigmoid(i) * jnp.tanh(u)
        self.c = new if self.c is None else sigmoid(f) * self.c + new
        self.h = sigmoid(o) * jnp.tanh(self.c)
        return self.linear(self.h)
