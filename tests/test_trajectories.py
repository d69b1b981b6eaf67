"""Paths over functions of two numbers, and their pictures."""

import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import quick_jit

import jaxopt_rules as jr
from jaxopt_rules.experiments import trajectories
from jaxopt_rules.experiments.trajectories import (
    Trajectories,
    beale,
    himmelblau,
    ravine,
    rosenbrock,
    saddle,
    trajectory,
)

SURFACES = {surface.name: surface for surface in (rosenbrock, beale, ravine, himmelblau, saddle)}

ROTATION = np.array([[np.cos(np.pi / 6), -np.sin(np.pi / 6)], [np.sin(np.pi / 6), np.cos(np.pi / 6)]])
HESSIAN = ROTATION @ np.diag([1.0, 100.0]) @ ROTATION.T

# As they are written where they come from.
FORMULAS = {
    "rosenbrock": lambda x, y: 100 * (y - x * x) ** 2 + (1 - x) ** 2,
    "beale": lambda x, y: sum((c - x * (1 - y**i)) ** 2 for i, c in enumerate((1.5, 2.25, 2.625), 1)),
    "ravine": lambda x, y: 0.5 * np.einsum("i...,ij,j...->...", [x, y], HESSIAN, [x, y]),
    "himmelblau": lambda x, y: (x * x + y - 11) ** 2 + (x + y * y - 7) ** 2,
    "saddle": lambda x, y: (2 * x**2 - 2 * y**2 + y**4) / 4,
}


def bowl(p):
    return jnp.sum(2 * p**2)


@pytest.fixture(autouse=True)
def _figures():
    yield
    plt.close("all")


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SURFACES)
def test_values_and_gradients(name):
    surface, formula = SURFACES[name], FORMULAS[name]
    points = np.random.default_rng(0).uniform(*np.transpose(surface.region), (20, 2))
    values, grads = quick_jit(jax.vmap(jax.value_and_grad(surface)))(jnp.asarray(points))
    np.testing.assert_allclose(values, formula(*points.T), rtol=1e-4, atol=1e-4)
    x, y, h = *points.T, 1e-5
    differences = [formula(x + h, y) - formula(x - h, y), formula(x, y + h) - formula(x, y - h)]
    np.testing.assert_allclose(grads, np.transpose(differences) / (2 * h), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", SURFACES)
def test_minima(name):
    """Flat there, and lowest of the whole region, within which all of them and the usual start are."""
    surface, formula = SURFACES[name], FORMULAS[name]
    grads = quick_jit(jax.vmap(jax.grad(surface)))(jnp.array(surface.minima, float))
    np.testing.assert_allclose(grads, 0, atol=1e-3)
    lowest = np.array([formula(*minimum) for minimum in surface.minima])
    np.testing.assert_allclose(lowest, -0.25 if name == "saddle" else 0, atol=1e-8)
    (left, right), (bottom, top) = surface.region
    grid = np.meshgrid(np.linspace(left, right, 201), np.linspace(bottom, top, 201))
    assert formula(*grid).min() >= lowest.max() - 1e-8
    for x, y in (*surface.minima, surface.start):
        assert left < x < right
        assert bottom < y < top
    assert repr(surface) == name


# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------

RULES = {
    "momentum": jr.chain(jr.clip_by_global_norm(1.0), jr.momentum(0.01)),
    "schedule": jr.adam(jr.Cosine(0.1, 8)),
    "polyak": jr.polyak_sgd(),
    "search": jr.chain(jr.adam_direction(), jr.backtracking()),
    "sam": jr.sam(jr.sgd(0.01)),
    "average": jr.average(jr.sgd(0.01)),
    "gate": jr.accumulate(jr.sgd(0.01), 2),
}


@pytest.mark.parametrize("name", RULES)
def test_a_path_is_that_of_a_loop(name):
    """But for the last bit: the two are different programs."""
    rule, steps = RULES[name], 4
    found = trajectory(rule, himmelblau, (-1, 2), steps=steps)

    @quick_jit
    def step(params, state):
        value, grads = jax.value_and_grad(himmelblau)(params)
        params, state = rule.apply(grads, state, params, value=value, grad=grads, value_fn=himmelblau)
        return params, state, jr.eval_params(state, params)

    params = evaluated = jnp.array([-1.0, 2.0])
    state = rule.init(params)
    path, eval_path = [params], [evaluated]
    for _ in range(steps):
        params, state, evaluated = step(params, state)
        path.append(params)
        eval_path.append(evaluated)
    np.testing.assert_allclose(found.path, path, rtol=5e-7)
    np.testing.assert_allclose(found.values, FORMULAS["himmelblau"](*np.transpose(path)), rtol=1e-5)
    assert found.values[-1] < found.values[0]
    assert (found.rule, found.function, found.steps) == (repr(rule), himmelblau, steps)
    if name == "average":
        np.testing.assert_allclose(found.eval_path, eval_path, rtol=5e-7)
        np.testing.assert_allclose(found.eval_values, FORMULAS["himmelblau"](*np.transpose(eval_path)), rtol=1e-5)
    else:
        assert found.eval_path is None
        assert found.eval_values is None


def test_a_search_arrives():
    found = trajectory(jr.lbfgs(), rosenbrock, steps=60)
    np.testing.assert_array_equal(found.path[0], np.float32([-1.2, 1]))
    assert found.distance < 1e-3
    np.testing.assert_allclose(found.distance, np.hypot(*(found.path[-1] - 1)), rtol=1e-6)
    assert re.fullmatch(
        r"lbfgs\(\) on rosenbrock, 60 steps from \(-1\.2, 1\)\n"
        r"value 24\.2 → [\d.e-]+ at \(1, 1\), [\d.e-]+ from the nearest minimum",
        repr(found),
    )


def test_equal_rules_share_a_program():
    before = trajectories._trained._cache_size()
    for x in (1.0, 2.0, 3.0):
        trajectory(jr.sgd(0.01, nesterov=False) if x == 2 else jr.sgd(0.01), ravine, (x, 0), steps=2)
    assert trajectories._trained._cache_size() == before + 1


def test_a_pair_from_elsewhere():
    """It has no extra arguments, and is not given any."""
    pair = jr.Rule(lambda params: (), lambda grads, state, params=None: (-0.25 * grads, state))
    np.testing.assert_array_equal(trajectory(pair, bowl, (1, 2), steps=1).path, [[1, 2], [0, 0]])


def test_texts():
    """Of averages, what they are evaluated with; of divergence, when; of unknown minima, nothing."""
    both = trajectory({"average": RULES["average"], "sgd": jr.sgd(1e10)}, himmelblau, (-1, 2), steps=4)
    first, second = repr(both).split("\nsgd: ")
    lines = first.splitlines()
    assert lines[0] == "average: average(sgd(0.01)) on himmelblau, 4 steps from (-1, 2)"
    assert re.fullmatch(r"    value 80 → \S+ at \(.*, .*\)", lines[1])
    assert re.fullmatch(r"    eval_params: value \S+ at \(.*, .*\), \S+ from the nearest minimum", lines[2])
    assert re.search(r"not finite from step [23] on$", second)
    text = repr(trajectory(jr.sgd(0.1), bowl, [1, 2], steps=1))
    assert text == "sgd(0.1) on bowl, 1 step from (1, 2)\nvalue 10 → 3.6 at (0.6, 1.2)"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((jr.sgd, bowl, (1, 2)), TypeError, "trajectory takes rules.* sgd"),
        (({"a": jr.sgd(0.1), "b": 3}, bowl, (1, 2)), TypeError, "trajectory: b takes rules"),
        (({}, bowl, (1, 2)), ValueError, "no rules"),
        ((jr.adam_direction(), bowl, (1, 2)), ValueError, "gives a direction"),
        ((jr.muon(0.1), bowl, (1, 2)), ValueError, "muon"),
        ((jr.sgd(0.1), bowl), TypeError, "bowl has no usual start"),
        ((jr.sgd(0.1), bowl, (1, 2, 3)), ValueError, r"two numbers, \(x, y\), not an array of shape \(3,\)"),
        ((jr.sgd(0.1), lambda p: p, (1, 2)), TypeError, r"scalar"),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        trajectory(*arguments)


@pytest.mark.parametrize("steps", [0, 1.5, True])
def test_steps(steps):
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        trajectory(jr.sgd(0.1), bowl, (1, 2), steps=steps)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def labels(ax):
    return [" ".join(text.get_text().split()) for text in ax.get_legend().get_texts()]


def line(ax, beginning):
    return next(line for line in ax.lines if line.get_label().startswith(beginning))


def test_a_picture_of_several():
    both = trajectory({"average": RULES["average"], "sgd": jr.sgd(0.01)}, himmelblau, steps=60)
    assert isinstance(both, Trajectories)
    assert list(both) == ["average", "sgd"]
    _, ax = plt.subplots()
    assert both.plot(ax) is ax
    ax.figure.canvas.draw()
    assert labels(ax) == ["average", "average, eval_params", "sgd", "start", "minima"]
    assert ax.get_title() == "himmelblau"
    assert (ax.get_xlim(), ax.get_ylim()) == himmelblau.region
    assert ax.get_aspect() == 1
    np.testing.assert_array_equal(line(ax, "sgd").get_xydata(), both["sgd"].path)
    np.testing.assert_array_equal(np.transpose(line(ax, "average, e").get_data()), both["average"].eval_path)
    assert len(ax.collections) == 2  # areas and lines


def test_a_picture_in_a_notebook():
    html = trajectory(jr.sgd(0.001), beale, steps=2)._repr_html_()
    assert html.startswith('<img src="data:image/png;base64,iVBOR')
    assert "sgd(0.001) on beale, 2 steps" in html
    assert not plt.get_fignums()


def test_what_leaves_the_picture_is_cut_at_its_frame():
    """x is multiplied by −1.4 in every step: 1, −1.4, 1.96, ..."""
    found = trajectory(jr.sgd(0.6), trajectories.Surface("bowl", bowl, ((0, 0),), ((-2, 2), (-2, 2))), (1, 0))
    assert not np.isfinite(found.values[-1])
    ax = found.plot()
    assert labels(ax) == ["sgd(0.6), out of the picture from step 3 on", "start", "minimum"]
    np.testing.assert_allclose(line(ax, "sgd").get_xydata(), [[1, 0], [-1.4, 0], [1.96, 0], [-2, 0]], rtol=1e-5)
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("path", "shown", "left"),
    [
        ([[0, 0], [0.5, 0.5]], [[0, 0], [0.5, 0.5]], None),
        ([[0, 0], [4, 2]], [[0, 0], [1, 0.5]], 1),
        ([[0, 0], [-2, -4]], [[0, 0], [-0.5, -1]], 1),
        ([[0, 0], [0, 1e38]], [[0, 0], [0, 1]], 1),
        ([[0, 0], [3, 0], [0.5, 0]], [[0, 0], [3, 0], [0.5, 0]], None),
        ([[0, 0], [0.5, 0], [np.nan, 0]], [[0, 0], [0.5, 0]], 2),
        ([[0, 0], [np.inf, 0], [np.nan, 0]], [[0, 0]], 1),
        ([[1, 1], [2, 2]], [[1, 1], [1, 1]], 1),
    ],
)
def test_cut(path, shown, left):
    found, step = trajectories._cut(np.array(path, float), ((-1, 1), (-1, 1)))
    np.testing.assert_allclose(found, shown, atol=1e-12)
    assert step == left


@pytest.mark.parametrize(
    ("function", "start", "rate", "inside"),
    [
        (bowl, (1, 2), 0.1, [(1, 2), (0.01, 0.01)]),  # it arrives
        (bowl, (1, 0), 0.6, [(1, 0), (-1.4, 0)]),  # it diverges
        (bowl, (0, 0), 0.1, [(0, 0)]),  # it stays
        (bowl, (1e4, 1e4), 1e38, [(1e4, 1e4)]),  # at once
        (lambda p: p[0] * 0 + 3, (5, 5), 0.1, [(5, 5)]),  # flat: no contours
        (lambda p: jnp.log(p[0]) + p[1] ** 2, (1, 1), 0.01, [(1, 1)]),  # not a number in a part of the picture
        (rosenbrock, (-4, 7), 1e-6, [(-4, 7), (1, 1)]),  # a start outside of the region
    ],
)
def test_the_frame(function, start, rate, inside):
    ax = trajectory(jr.sgd(rate), function, start, steps=30).plot()
    ax.figure.canvas.draw()
    region = ax.get_xlim(), ax.get_ylim()
    for (left, right), coordinates in zip(region, np.transpose(inside), strict=True):
        assert np.isfinite([left, right]).all()
        assert left < min(coordinates)
        assert max(coordinates) < right
        assert right - left < 4 * max(1, *np.abs(start))


def test_a_ratio_that_no_page_has():
    """A valley a hundred times as long as wide is not drawn to scale."""
    stretched = trajectories.Surface("stretched", bowl, ((0, 0),), ((-100, 100), (-1, 1)), (50, 0.5))
    assert trajectory(jr.sgd(0.01), stretched, steps=2).plot().get_aspect() == "auto"
