"""Problems to train on: a model in plain JAX, its loss on a batch, seeded batches, and how it does on the test rows.

    problem = digits_mlp()
    params = problem.init(jax.random.key(0))
    batches = problem.batches(seed=0, steps=300)
    loss = problem.loss_fn(params, batches[0])
    problem.evaluate(params)  # {"test_loss": ..., "accuracy": ...}

These functions are what `sweep` and `compare` take. A batch is an array of numbers of rows: the rows themselves stand
in `loss_fn`, which gathers them. So the batches of a thousand runs are small, and a scan or a `vmap` over runs carries
no data.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxopt_rules.experiments.data import Dataset, digits, source_text
from jaxopt_rules.models import mean_squared_error, softmax_cross_entropy


@dataclass(frozen=True, repr=False)
class Problem:
    """A model, a loss and data. All functions are pure; `init`, `loss_fn` and `evaluate` can be jitted and vmapped."""

    name: str
    init: Callable[[Array], Any]
    """init(key) -> params: a tree of float32 arrays."""

    loss_fn: Callable[[Any, Any], Array]
    """loss_fn(params, batch) -> (): the mean over the batch."""

    batches: Callable[..., Any]
    """batches(seed, steps=300) -> a tree of arrays with a leading axis of `steps`: one batch for each step."""

    evaluate: Callable[[Any], dict[str, Array]]
    """evaluate(params) -> scalars, of the test rows: `test_loss`, and `accuracy` for classes, `R2` for regression."""

    description: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return f"Problem {self.name}: {self.description}"


def digits_mlp(
    hidden: Sequence[int] = (64,),
    activation: Callable[[Array], Array] = jnp.tanh,
    *,
    batch: int = 128,
    seed: int = 0,
) -> Problem:
    """The ten digits of scikit-learn, 64 pixels each, by an MLP 64-64-10. See `table_mlp`.

    Args:
      hidden: how many units each hidden layer has.
      activation: of the hidden layers.
      batch: how many rows a step sees.
      seed: of the split into training and test rows.
    """
    return table_mlp(digits(seed), hidden, activation, batch=batch)


def table_mlp(
    dataset: Dataset,
    hidden: Sequence[int] = (64,),
    activation: Callable[[Array], Array] = jnp.tanh,
    *,
    batch: int = 128,
) -> Problem:
    """The target of a table by a multilayer perceptron: cross entropy for classes, squared error for regression.

    Parameters are `hidden/0/w` (inputs, outputs), `hidden/0/b` (outputs,), ..., `output/w` and `output/b`. Weights
    begin as LeCun's truncated normal, of variance 1 / inputs, biases at 0: what Flax and Haiku do.

    Args:
      dataset: the table, of `DATASETS` or `read_csv`.
      hidden: how many units each hidden layer has; () is a linear model.
      activation: of the hidden layers.
      batch: how many rows a step sees, of all rows where there are fewer.

    Raises:
      ValueError: a size is below 1.
    """
    _check_sizes("table_mlp", (*hidden, batch))
    sizes = (dataset.x_train.shape[1], *hidden, dataset.classes or 1)

    def init(key: Array) -> Any:
        keys = jax.random.split(key, len(sizes) - 1)
        *layers, output = map(_dense, keys, sizes[:-1], sizes[1:])
        return {"hidden": layers, "output": output}

    def forward(params: Any, x: Array) -> Array:
        for layer in params["hidden"]:
            x = activation(x @ layer["w"] + layer["b"])
        return x @ params["output"]["w"] + params["output"]["b"]

    train, test = (dataset.x_train, dataset.t_train), (dataset.x_test, dataset.t_test)
    name = getattr(activation, "__name__", str(activation))
    about = f"MLP {'-'.join(map(str, sizes))}, {name}"
    return _of_rows(dataset.name, about, init, forward, train, test, dataset.classes is not None, batch)


def _dense(key: Array, inputs: int, outputs: int) -> dict[str, Array]:
    w = jax.nn.initializers.lecun_normal()(key, (inputs, outputs), jnp.float32)
    return {"w": w, "b": jnp.zeros(outputs, jnp.float32)}


def source_transformer(
    blocks: int = 2,
    width: int = 64,
    heads: int = 4,
    context: int = 64,
    *,
    batch: int = 16,
    characters: int = 1_000_000,
    seed: int = 0,
) -> Problem:
    """The next character of Python's own source, by a small transformer: see `transformer` and `data.source_text`.

    A row is a piece of `context` + 1 characters, each piece beginning with the character that the one before ended
    with. It is tested on 128 pieces, spread over the test part.

    Args:
      blocks: how many blocks of attention and perceptron.
      width: of the residual stream; a multiple of `heads`.
      heads: of attention.
      context: how many characters are seen, and predicted, at once.
      batch: how many pieces a step sees.
      characters: of text, of which a tenth is for testing.
      seed: of the order of the modules in the text.

    Raises:
      UserError: there is less text.
      ValueError: a size is below 1, `width` is no multiple of `heads`, or the text has no piece to test on.
    """
    _check_sizes("source_transformer", (blocks, width, heads, context, batch, characters))
    if width % heads:
        raise ValueError(f"source_transformer: width {width} must be a multiple of heads, {heads}")
    text = source_text(characters, seed)
    if len(text.test) <= context:
        raise ValueError(f"source_transformer: of {characters} characters there is no piece of {context} to test on")
    symbols = len(text.alphabet)
    train, test = ((rows[:, :-1], rows[:, 1:]) for rows in (_pieces(text.train, context), _pieces(text.test, context)))
    tested = np.unique(np.linspace(0, len(test[0]) - 1, 128).astype(int))
    about = f"transformer of {blocks} blocks, width {width}, {heads} heads, context {context}"

    def init(key: Array) -> Any:
        return init_transformer(key, symbols, blocks, width, context)

    def forward(params: Any, x: Array) -> Array:
        return transformer(params, x, heads)

    return _of_rows("source", about, init, forward, train, (test[0][tested], test[1][tested]), True, batch)


def _pieces(text: np.ndarray, context: int) -> np.ndarray:
    starts = np.arange(0, len(text) - context, context)
    return text[starts[:, None] + np.arange(context + 1)]


def init_transformer(key: Array, symbols: int, blocks: int, width: int, context: int) -> Any:
    """The parameters of `transformer`, which begin as those of GPT-2.

    Embeddings and weights are normal of standard deviation 0.02, those that write into the residual stream (`out/w`,
    `down/w`) of 0.02 / √(2 blocks); scales are 1. There are no biases.

        embedding/tokens (symbols, width)   embedding/positions (context, width)   norm/scale   head/w (width, symbols)
        blocks/0/attention/norm/scale   blocks/0/attention/qkv/w (width, 3 width)   blocks/0/attention/out/w
        blocks/0/mlp/norm/scale   blocks/0/mlp/up/w (width, 4 width)   blocks/0/mlp/down/w (4 width, width)
    """
    keys = iter(jax.random.split(key, 3 + 4 * blocks))
    norm = {"scale": jnp.ones(width, jnp.float32)}

    def normal(*shape: int, scale: float = 0.02) -> Array:
        return scale * jax.random.normal(next(keys), shape, jnp.float32)

    def written(*shape: int) -> Array:
        return normal(*shape, scale=0.02 / math.sqrt(2 * blocks))

    def block() -> Any:
        attention = {"norm": norm, "qkv": {"w": normal(width, 3 * width)}, "out": {"w": written(width, width)}}
        mlp = {"norm": norm, "up": {"w": normal(width, 4 * width)}, "down": {"w": written(4 * width, width)}}
        return {"attention": attention, "mlp": mlp}

    return {
        "embedding": {"tokens": normal(symbols, width), "positions": normal(context, width)},
        "blocks": [block() for _ in range(blocks)],
        "norm": norm,
        "head": {"w": normal(width, symbols)},
    }


def transformer(params: Any, tokens: Array, heads: int) -> Array:
    """The logits of each next token, (rows, length, symbols), of `tokens` (rows, length).

    Pre-norm blocks (RMSNorm), causal attention with learned positions, a perceptron with squared ReLU (So et al. 2021,
    arXiv:2109.08668), and a head of its own.
    """
    x = params["embedding"]["tokens"][tokens] + params["embedding"]["positions"][: tokens.shape[1]]
    for block in params["blocks"]:
        x = x + _attention(block["attention"], x, heads)
        x = x + _perceptron(block["mlp"], x)
    return _norm(params["norm"], x) @ params["head"]["w"]


def _norm(params: Any, x: Array) -> Array:
    return params["scale"] * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _attention(params: Any, x: Array, heads: int) -> Array:
    qkv = _norm(params["norm"], x) @ params["qkv"]["w"]
    q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return mixed.reshape(x.shape) @ params["out"]["w"]


def _perceptron(params: Any, x: Array) -> Array:
    # Not GELU, whose exponential makes a step twice as long on a CPU.
    return jnp.square(jax.nn.relu(_norm(params["norm"], x) @ params["up"]["w"])) @ params["down"]["w"]


def _of_rows(
    name: str,
    about: str,
    init: Callable[[Array], Any],
    forward: Callable[[Any, Array], Array],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: bool,
    batch: int,
) -> Problem:
    """A problem whose batches are numbers of rows."""
    x_train, t_train, x_test, t_test = map(jnp.asarray, (*train, *test))
    rows, size = len(x_train), min(batch, len(x_train))

    def loss(y: Array, t: Array) -> Array:
        return softmax_cross_entropy(y.reshape(-1, y.shape[-1]), t.ravel()) if classes else mean_squared_error(y, t)

    def loss_fn(params: Any, batch: Array) -> Array:
        return loss(forward(params, x_train[batch]), t_train[batch])

    def evaluate(params: Any) -> dict[str, Array]:
        y = forward(params, x_test)
        if classes:
            return {"test_loss": loss(y, t_test), "accuracy": jnp.mean(y.argmax(axis=-1) == t_test)}
        unexplained = jnp.sum((y - t_test) ** 2) / jnp.sum((t_test - t_test.mean()) ** 2)
        return {"test_loss": loss(y, t_test), "R2": 1 - unexplained}

    def batches(seed: int, steps: int = 300) -> np.ndarray:
        return row_numbers(rows, size, seed, steps)

    return Problem(name, init, loss_fn, batches, evaluate, f"{about}; batches of {size} of {rows} rows")


def row_numbers(rows: int, size: int, seed: int, steps: int) -> np.ndarray:
    """The numbers of each step's rows, (steps, size) int32: pass after pass over all, each in an order of its own.

    A batch may hold the last rows of a pass and the first of the next, so that every row is seen equally often.
    """
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(rows) for _ in range(math.ceil(steps * size / rows))]
    return np.concatenate([np.empty(0, int), *passes])[: steps * size].reshape(steps, size).astype(np.int32)


def _check_sizes(owner: str, sizes: Sequence[int]) -> None:
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{owner}: sizes must be positive integers, not {tuple(sizes)}")
