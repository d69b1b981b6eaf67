"""The path of an optimizer over a function of two numbers, and a picture of it.

trajectory(adam(0.1), rosenbrock)
trajectory({"sgd": sgd(1e-3), "adam": adam(0.1)}, rosenbrock, (-1.2, 1), steps=500).plot()
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxopt_rules import markup
from jaxopt_rules.averages import eval_params
from jaxopt_rules.experiments import plots
from jaxopt_rules.rule import Rule, as_rule, extra_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]
Region = tuple[tuple[float, float], tuple[float, float]]

# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Surface:
    """A function of two numbers, and what is known of it: `rosenbrock(jnp.array([1.0, 1.0]))` is its value there."""

    name: str
    function: Callable[[Array], Array]  # (2,) -> ()
    minima: tuple[Point, ...] = ()
    region: Region | None = None  # to draw, ((x from, to), (y from, to)); None: where the paths are
    start: Point | None = None  # where one begins who says nothing else

    def __call__(self, p: Array) -> Array:
        return self.function(p)

    def __repr__(self) -> str:
        return self.name


def _rosenbrock(p: Array) -> Array:
    x, y = p
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def _beale(p: Array) -> Array:
    x, y = p
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _himmelblau(p: Array) -> Array:
    x, y = p
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def _ravine(p: Array) -> Array:
    x, y = p
    along, across = (math.sqrt(3) * x + y) / 2, (math.sqrt(3) * y - x) / 2
    return (along**2 + 100 * across**2) / 2


def _saddle(p: Array) -> Array:
    x, y = p
    return x**2 / 2 - y**2 / 2 + y**4 / 4


rosenbrock = Surface("rosenbrock", _rosenbrock, ((1, 1),), ((-2, 2), (-1, 3)), (-1.2, 1))
"""(1 − x)² + 100 (y − x²)²: a valley that is bent and almost flat (Rosenbrock 1960). Minimum 0 at (1, 1)."""

beale = Surface("beale", _beale, ((3, 0.5),), ((-4.5, 4.5), (-4.5, 4.5)), (1, 1))
"""Σ (cᵢ − x (1 − yⁱ))² for i = 1, 2, 3 and c = (1.5, 2.25, 2.625): plains and steep walls. Minimum 0 at (3, 0.5)."""

ravine = Surface("ravine", _ravine, ((0, 0),), ((-3, 3), (-3, 3)), (-2.5, -0.5))
"""½ (a² + 100 b²) with the axes of a and b turned by 30°: a quadratic of condition number 100. Minimum 0 at (0, 0)."""

himmelblau = Surface(
    "himmelblau",
    _himmelblau,
    ((3, 2), (-2.805118, 3.131313), (-3.779310, -3.283186), (3.584428, -1.848127)),
    ((-6, 6), (-6, 6)),
    (0, 0),
)
"""(x² + y − 11)² + (x + y² − 7)²: four minima, all 0 (Himmelblau 1972)."""

saddle = Surface("saddle", _saddle, ((0, 1), (0, -1)), ((-2, 2), (-2, 2)), (-1.5, 1e-3))
"""½ x² − ½ y² + ¼ y⁴: flat at (0, 0), where it is no minimum. Minima −¼ at (0, 1) and (0, −1)."""

# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Trajectory:
    """Where an optimizer went. In a notebook it shows itself as a picture."""

    rule: str
    function: Surface
    path: np.ndarray  # (steps + 1, 2)
    values: np.ndarray  # (steps + 1,)  of the function
    eval_path: np.ndarray | None  # (steps + 1, 2)  what `eval_params` gives on the way; None: the path itself
    eval_values: np.ndarray | None  # (steps + 1,)

    @property
    def steps(self) -> int:
        return len(self.values) - 1

    @property
    def distance(self) -> float:
        """From the end, that of `eval_path` where there is one, to the nearest known minimum; NaN: none is known."""
        end = self.path[-1] if self.eval_path is None else self.eval_path[-1]
        return min((float(np.hypot(*(end - minimum))) for minimum in self.function.minima), default=math.nan)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the path over the contours of the function, into new axes if none are given. Returns the axes.

        A path that ends outside of the picture, or at no number, is drawn up to the frame; the legend says when it
        got there.
        """
        return _plotted({self.rule: self}, ax)

    def __repr__(self) -> str:
        end = "" if np.isfinite(self.path[-1]).all() else f", not finite from step {_finite_steps(self.path)} on"
        count = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        lines = [
            f"{self.rule} on {self.function!r}, {count} from {_point(self.path[0])}",
            f"value {_number(self.values[0])} → {_number(self.values[-1])} at {_point(self.path[-1])}{end}",
        ]
        if self.eval_path is not None and self.eval_values is not None:
            lines.append(f"eval_params: value {_number(self.eval_values[-1])} at {_point(self.eval_path[-1])}")
        if math.isfinite(self.distance):
            lines[-1] += f", {_number(self.distance)} from the nearest minimum"
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return _shown({self.rule: self}, repr(self))


@dataclass(frozen=True, repr=False, eq=False)
class Trajectories(Mapping[str, Trajectory]):
    """Paths by name, over one function, from one start. In a notebook they show themselves as one picture."""

    members: Mapping[str, Trajectory]

    def __getitem__(self, name: str) -> Trajectory:
        return self.members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws all paths into one picture, as `Trajectory.plot` does one."""
        return _plotted(self.members, ax)

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {member!r}".replace("\n", "\n    ") for name, member in self.items())

    def _repr_html_(self) -> str:
        return _shown(self.members, repr(self))


@overload
def trajectory(
    rule: Rule, function: Callable[[Array], Array], start: ArrayLike | None = None, *, steps: int = 200
) -> Trajectory: ...


@overload
def trajectory(
    rule: Mapping[str, Rule], function: Callable[[Array], Array], start: ArrayLike | None = None, *, steps: int = 200
) -> Trajectories: ...


def trajectory(
    rule: Rule | Mapping[str, Rule],
    function: Callable[[Array], Array],
    start: ArrayLike | None = None,
    *,
    steps: int = 200,
) -> Trajectory | Trajectories:
    """The path of an optimizer over a function of two numbers.

        trajectory(chain(clip_by_global_norm(1.0), momentum(0.01)), beale, (1, 1))
        trajectory({"adam": adam(0.1), "L-BFGS": lbfgs()}, himmelblau, steps=50).plot()
        trajectory(adam(0.1), lambda p: jnp.sum(p**4), (1, 2))

    One compiled scan. The parameters are one array of shape (2,), so a rule for matrices refuses them. In each step the
    rule is given the gradient and, for those that use them, `value`, `grad` and `value_fn`: line searches and SAM work.

    Args:
      rule: the optimizer; or several, by the names that the legend shows.
      function: `rosenbrock`, `beale`, `ravine`, `himmelblau`, `saddle`; or any function of an array of shape (2,)
        that gives a scalar, of which the picture then shows the part where the paths go downhill.
      start: two numbers; one of these surfaces has a usual start.
      steps: how many updates.

    Returns:
      A `Trajectory`; for several rules, `Trajectories`.

    Raises:
      TypeError: a rule is no rule; or the function needs a start.
      ValueError: a rule gives no updates, `start` is not two numbers, or `steps` is below 1.
    """
    name = getattr(function, "__name__", type(function).__name__)
    surface = function if isinstance(function, Surface) else Surface(name, function)
    begin = _start(surface, start)
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, not {steps!r}")
    if not isinstance(rule, Mapping):
        return _run(as_rule(rule, "trajectory"), surface, begin, int(steps))
    rules = {str(name): as_rule(member, f"trajectory: {name}") for name, member in rule.items()}
    if not rules:
        raise ValueError("trajectory was given no rules")
    return Trajectories({name: _run(member, surface, begin, int(steps)) for name, member in rules.items()})


def _start(surface: Surface, start: ArrayLike | None) -> Array:
    if start is None and surface.start is None:
        raise TypeError(f"where to begin? {surface!r} has no usual start: trajectory(rule, function, (x, y))")
    begin = jnp.asarray(surface.start if start is None else start, jnp.result_type(float))
    if begin.shape != (2,):
        raise ValueError(f"start must be two numbers, (x, y), not an array of shape {begin.shape}")
    return begin


def _run(rule: Rule, surface: Surface, start: Array, steps: int) -> Trajectory:
    path, values, eval_path, eval_values = map(np.asarray, _trained(rule, surface.function, start, steps))
    averages = not np.array_equal(path, eval_path, equal_nan=True)
    return Trajectory(
        repr(rule), surface, path, values, eval_path if averages else None, eval_values if averages else None
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _trained(
    rule: Rule, function: Callable[[Array], Array], start: Array, steps: int
) -> tuple[Array, Array, Array, Array]:
    """The parameters before each step and at the end, and those to evaluate with; and the function's values there."""

    def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
        params, state = carry
        value, grads = jax.value_and_grad(function)(params)
        extra = extra_for(rule, {"value": value, "grad": grads, "value_fn": function})
        return rule.apply(grads, state, params, **extra), (params, eval_params(state, params))

    (params, state), (path, evaluated) = jax.lax.scan(step, (start, rule.init(start)), length=steps)
    path = jnp.vstack([path, params])
    evaluated = jnp.vstack([evaluated, eval_params(state, params)])
    return path, jax.vmap(function)(path), evaluated, jax.vmap(function)(evaluated)


# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------


def _number(x: Any) -> str:
    return f"{float(x):.3g}"


def _point(p: Sequence[Any] | np.ndarray) -> str:
    return f"({', '.join(map(_number, p))})"


def _finite_steps(path: np.ndarray) -> int:
    """How many points there are in front of the first that is not finite."""
    return int(np.argmin(np.append(np.isfinite(path).all(axis=1), False)))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 8.5, 5.0
_MARKERS = 20  # on a path, about
_LEVELS = 16  # of the contours
_LINE = 36  # characters of the legend


# Where there is room beside the picture, and where it is not known.
_BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0, "frameon": False, "fontsize": "small"}
_INSIDE = {"loc": "best", "framealpha": 0.8, "fontsize": "x-small"}


def _plotted(members: Mapping[str, Trajectory], ax: "Axes | None") -> "Axes":
    if ax is None:
        return _draw(members, plots.new_axes(_WIDTH, _HEIGHT), _BESIDE)
    return _draw(members, ax, _INSIDE)


def _shown(members: Mapping[str, Trajectory], text: str) -> str:
    picture = plots.shown(_WIDTH, _HEIGHT, lambda figure: _draw(members, figure.subplots(), _BESIDE))
    return f"{picture}<br>{markup.code(text)}"


def _draw(members: Mapping[str, Trajectory], ax: "Axes", legend: Mapping[str, Any]) -> "Axes":
    first, *_ = members.values()
    region = _frame(list(members.values()))
    _draw_surface(ax, first.function, region)
    for k, (name, member) in enumerate(members.items()):
        label = plots.label(name, _LINE)
        _draw_path(ax, member.path, region, f"C{k}", label, linewidth=1.5, alpha=0.9)
        if member.eval_path is not None:
            _draw_path(
                ax, member.eval_path, region, f"C{k}", _with(label, "eval_params"), linewidth=1.2, linestyle="--"
            )
    on_top = {"linestyle": "none", "zorder": 6, "markeredgecolor": "black"}
    ax.plot(*first.path[0], marker="o", color="white", markersize=7, label="start", **on_top)
    for k, minimum in enumerate(first.function.minima):
        label = "_" if k else "minimum" if len(first.function.minima) == 1 else "minima"
        ax.plot(*minimum, marker="*", color="gold", markersize=13, label=label, **on_top)
    (left, right), (bottom, top) = region
    ax.set(xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y", title=plots.label(first.function.name, 60))
    if 0.5 <= (right - left) / (top - bottom) <= 2:
        ax.set_aspect("equal")
    ax.legend(**legend)
    return ax


def _draw_surface(ax: "Axes", function: Surface, region: Region) -> None:
    from matplotlib import colormaps

    x, y = (np.linspace(low, high, 201) for low, high in region)
    points = jnp.asarray(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2), jnp.result_type(float))
    z = np.asarray(jax.vmap(function.function)(points), float).reshape(len(y), len(x))
    z = np.ma.masked_invalid(z)
    levels = _levels(z.compressed(), [float(function(jnp.asarray(p, points.dtype))) for p in function.minima])
    if len(levels) < 2:
        return
    grays = colormaps["Greys_r"](np.linspace(0.55, 1, len(levels)))
    ax.contourf(x, y, z, levels, colors=grays, extend="max")
    ax.contour(x, y, z, levels[1:], colors="white", linewidths=0.7, linestyles="solid")


def _levels(z: np.ndarray, minima: Sequence[float]) -> np.ndarray:
    """Where contours are drawn: closer together near the lowest value if values are of many magnitudes."""
    if z.size == 0 or z.min() == z.max():
        return np.empty(0)
    low, high = min([z.min(), *minima]), z.max()
    above = np.quantile(z[z > low], 0.02) - low
    if high - low < 100 * above:
        return np.linspace(low, high, _LEVELS)
    return np.unique([low, *(low + np.geomspace(above, high - low, _LEVELS))])


def _frame(members: Sequence[Trajectory]) -> Region:
    """What is drawn: the function's region with the start in it; else where the paths are no higher than the start.

    The first step is in it, too: where all others lead astray, it shows how.
    """
    start, region = members[0].path[0], members[0].function.region
    if region is not None:
        points = np.vstack([np.transpose(region), start])
        margin = 0.05 if not _inside(start[None], region)[0] else 0.0
    else:
        near = [m.path[(m.values <= m.values[0]) | (np.arange(m.steps + 1) <= 1)] for m in members]
        points = np.vstack([*near, *members[0].function.minima])
        points, margin = points[np.isfinite(points).all(axis=1)], 0.15
    low, high = points.min(axis=0), points.max(axis=0)
    widest = max(high - low) or 1.0
    # A path along an axis has no height of its own.
    pad = margin * widest + np.maximum(0, 0.3 * widest - (high - low)) / 2
    (left, bottom), (right, top) = (low - pad).tolist(), (high + pad).tolist()
    return (left, right), (bottom, top)


def _inside(points: np.ndarray, region: Region) -> np.ndarray:
    low, high = np.transpose(region)
    return ((low <= points) & (points <= high)).all(axis=1)


def _draw_path(ax: "Axes", path: np.ndarray, region: Region, color: str, label: str, **line: Any) -> None:
    shown, left = _cut(path, region)
    if left is not None:
        label = _with(label, f"out of the picture from step {left} on")
    every = max(1, len(path) // _MARKERS)
    ax.plot(
        *shown.T,
        color=color,
        label=label,
        marker="o",
        markersize=3,
        markevery=every,
        zorder=4,
        **line,
    )
    if left is None:
        ax.plot(*shown[-1], color=color, marker="s", markersize=7, markeredgecolor="black", zorder=5)


def _with(label: str, remark: str) -> str:
    line = label.rpartition("\n")[2]
    return f"{label}, {remark}" if len(line) + len(remark) + 2 <= _LINE else f"{label},\n{remark}"


def _cut(path: np.ndarray, region: Region) -> tuple[np.ndarray, int | None]:
    """The path up to where it leaves the region for good, on its edge; and the step that led out of it."""
    inside = np.flatnonzero(_inside(path, region))
    last = int(inside[-1]) if len(inside) else 0
    if last == len(path) - 1:
        return path, None
    here, there = path[last], path[last + 1]
    if not np.isfinite(there).all():
        return path[: last + 1], last + 1
    low, high = np.transpose(region)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(there > here, (high - here) / (there - here), (low - here) / (there - here))
    share = np.nanmin(np.where(there == here, 1, shares))
    return np.vstack([path[: last + 1], here + share * (there - here)]), last + 1
