"""Trains one small MLP with each documented optimizer, with and without hooks, and shows how they do.

All start from the same weights and see the same batches. Settings and hooks are those of the documented examples.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxopt_rules.experiments.data import Dataset, UserError
from jaxopt_rules.experiments.output import make_directory, save_picture
from jaxopt_rules.experiments.plots import detached, running_mean, style
from jaxopt_rules.experiments.progress import progress
from jaxopt_rules.hooks import clip_grad, weight_decay
from jaxopt_rules.models import MLP, mean_squared_error, softmax_cross_entropy
from jaxopt_rules.parameters import backward
from jaxopt_rules.stateful import SGD, Adam, AdamW, Hook, Momentum, Optimizer

BATCH = 32
HIDDEN = 64

HOOKS = (weight_decay(1e-4), clip_grad(1.0))
OPTIMIZERS: Mapping[str, Callable[[Sequence[Hook]], Optimizer]] = {
    "sgd": lambda hook: SGD(learning_rate=0.01, hook=hook),
    "momentum": lambda hook: Momentum(learning_rate=0.01, momentum=0.9, hook=hook),
    "adam": lambda hook: Adam(alpha=0.001, beta1=0.9, beta2=0.999, hook=hook),
    "adamw": lambda hook: AdamW(Adam(alpha=0.001, beta1=0.9, beta2=0.999, hook=hook), weight_decay=0.01),
}


@dataclass(frozen=True)
class Result:
    """How one optimizer did."""

    optimizer: str
    hooks: bool
    losses: np.ndarray  # (steps,)  of each batch, before its update
    final_loss: float  # over all training rows, after the last update
    score: float  # on the test rows: accuracy, or R² for regression
    ms_per_step: float  # median; NaN where the first step, which compiles, is the only one
    state_bytes: int


def run(dataset: Dataset, names: Sequence[str], steps: int, seed: int, out: Path) -> None:
    """Trains with each of the optimizers `names`, prints the table, and writes `out`/loss.png.

    Raises:
      UserError: a name is unknown, or `out` cannot be written to.
    """
    if unknown := [name for name in names if name not in OPTIMIZERS]:
        raise UserError(f"unknown optimizer {unknown[0]!r}; choose from {', '.join(OPTIMIZERS)}")
    with progress("compare", 2 * len(names) * steps) as bar:

        def advance(name: str) -> None:
            if not bar.advance(1, name):
                raise KeyboardInterrupt

        make_directory(out)
        results = compare(dataset, names, steps, seed, advance)
    Console().print(table(dataset, results, steps, seed))
    figure = detached(10, 4.5, lambda figure: draw(dataset, results, figure))
    save_picture(figure, out / "loss.png")
    print(f"loss curves: {out / 'loss.png'}")


def compare(
    dataset: Dataset, names: Sequence[str], steps: int, seed: int, advance: Callable[[str], object] = lambda name: None
) -> list[Result]:
    """One result for each optimizer without hooks, and one with them. Calls `advance` with its name after each step."""
    model = MLP((dataset.x_train.shape[1], HIDDEN, dataset.classes or 1), jnp.tanh, seed=seed)
    initial = {name: parameter.data for name, parameter in model.params().items()}
    results = []
    for name in names:
        for hooks in ((), HOOKS):
            for key, parameter in model.params().items():
                parameter.data = initial[key]
            optimizer = OPTIMIZERS[name](hooks)
            losses, times = train(model, optimizer, dataset, steps, seed, lambda name=name: advance(name))
            results.append(
                Result(
                    optimizer=type(optimizer).__name__,
                    hooks=bool(hooks),
                    losses=losses,
                    final_loss=float(_loss_of(dataset)(model, dataset.x_train, dataset.t_train)),
                    score=score(model, dataset),
                    ms_per_step=1e3 * float(np.median(times[1:])) if steps > 1 else float("nan"),
                    state_bytes=sum(array.nbytes for array in optimizer.state_dict(model).values()),
                )
            )
    return results


def train(
    model: MLP, optimizer: Optimizer, dataset: Dataset, steps: int, seed: int, advance: Callable[[], object]
) -> tuple[np.ndarray, np.ndarray]:
    """Makes `steps` steps, calling `advance` after each. Returns the loss before each, and the seconds that it took."""
    loss_of = _loss_of(dataset)
    losses, times = np.empty(steps), np.empty(steps)
    for i, rows in enumerate(batches(len(dataset.x_train), steps, seed)):
        x, t = dataset.x_train[rows], dataset.t_train[rows]
        start = time.perf_counter()
        model.cleargrads()
        loss = backward(loss_of, model, x, t)
        optimizer.update(model)
        jax.block_until_ready([parameter.data for parameter in model.params().values()])
        times[i] = time.perf_counter() - start
        losses[i] = loss
        advance()
    return losses, times


def batches(rows: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """The numbers of each step's rows: pass after pass over all of them, each in an order of its own."""
    rng = np.random.default_rng(seed)
    size = min(BATCH, rows)
    order = np.empty(0, int)
    for _ in range(steps):
        if len(order) < size:
            order = rng.permutation(rows)
        yield order[:size]
        order = order[size:]


def _loss_of(dataset: Dataset) -> Callable[[MLP, np.ndarray, np.ndarray], jax.Array]:
    return _quantity_loss if dataset.classes is None else _class_loss


def _class_loss(model: MLP, x: np.ndarray, t: np.ndarray) -> jax.Array:
    return softmax_cross_entropy(model.forward(jnp.asarray(x)), jnp.asarray(t))


def _quantity_loss(model: MLP, x: np.ndarray, t: np.ndarray) -> jax.Array:
    return mean_squared_error(model.forward(jnp.asarray(x)), jnp.asarray(t))


def score(model: MLP, dataset: Dataset) -> float:
    """On the test rows, the share of right classes; for regression R², NaN where all targets are equal."""
    y, t = np.asarray(model.forward(jnp.asarray(dataset.x_test))), dataset.t_test
    if dataset.classes is not None:
        return float(np.mean(y.argmax(axis=1) == t))
    total = np.sum((t - t.mean()) ** 2)
    return float(1 - np.sum((y - t) ** 2) / total) if total else float("nan")


def table(dataset: Dataset, results: Sequence[Result], steps: int, seed: int) -> Table:
    """The results, a row each."""
    rows = f"{len(dataset.x_train)} training and {len(dataset.x_test)} test rows"
    shown = Table(
        title=f"{escape(dataset.name)}: {rows}, {steps} steps, seed {seed}",
        caption=f"hooks: {', '.join(map(repr, HOOKS))}",
    )
    shown.add_column("optimizer")
    shown.add_column("hooks")
    for heading in ("final loss", f"test {_score_name(dataset)}", "ms per step", "state bytes"):
        shown.add_column(heading, justify="right")
    for result in results:
        shown.add_row(
            result.optimizer,
            "yes" if result.hooks else "no",
            f"{result.final_loss:.4f}",
            f"{result.score:.4f}",
            "-" if np.isnan(result.ms_per_step) else f"{result.ms_per_step:.3f}",
            f"{result.state_bytes:,}",
        )
    return shown


def _score_name(dataset: Dataset) -> str:
    return "R²" if dataset.classes is None else "accuracy"


def draw(dataset: Dataset, results: Sequence[Result], figure: Figure) -> None:
    """Draws the loss curves, those with hooks beside those without."""
    axes = figure.subplots(1, 2, sharey=True)
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(result.optimizer for result in results))}
    width = max(1, len(results[0].losses) // 25)
    for ax, hooks in zip(axes, (False, True), strict=True):
        for result in results:
            if result.hooks == hooks:
                # At the documented decay AdamW lies on Adam: dashes show both.
                line = (0, (3, 3)) if result.optimizer == "AdamW" else "-"
                color = colors[result.optimizer]
                ax.plot(running_mean(result.losses, width), ls=line, color=color, label=result.optimizer)
        ax.set_title("with " + ", ".join(map(repr, HOOKS)) if hooks else "without hooks", fontsize=10)
        style(ax, xlabel="step")
        ax.margins(x=0.01)
    axes[0].set_yscale("log")
    axes[0].set_ylabel(f"training loss, mean of {width} steps")
    axes[1].legend()
    figure.suptitle(dataset.name, parse_math=False)
