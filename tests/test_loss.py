"""Rules that need the loss, where the table's unrelated gradients cannot show what they do: on losses of their own."""

import collections
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import core as ref
from reference import loss as papers
from scipy import optimize

import jaxopt_rules as jr


def rosenbrock(params):
    x = params["x"]
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def rosenbrock_and_grad(params):
    x = params["x"]
    up, left = x[1:] - x[:-1] ** 2, 1 - x[:-1]
    grad = np.zeros_like(x)
    grad[1:] += 200 * up
    grad[:-1] -= 400 * x[:-1] * up + 2 * left
    return (100 * up**2 + left**2).sum(), {"x": grad}


INPUTS = np.random.default_rng(0).normal(size=(30, 5))
LABELS = np.sign(np.random.default_rng(1).normal(size=30))


def logistic(params):
    margins = LABELS * (INPUTS @ params["w"] + params["b"])
    return jnp.mean(jnp.log1p(jnp.exp(-margins))) + 0.01 * jnp.sum(params["w"] ** 2)


def logistic_and_grad(params):
    margins = LABELS * (INPUTS @ params["w"] + params["b"])
    slopes = -LABELS / (1 + np.exp(margins)) / len(LABELS)
    value = np.log1p(np.exp(-margins)).mean() + 0.01 * (params["w"] ** 2).sum()
    return value, {"w": INPUTS.T @ slopes + 0.02 * params["w"], "b": slopes.sum()}


VALLEY = {"x": np.tile([-1.2, 1.0], 5)}
PROBLEMS = {
    "rosenbrock_2": (rosenbrock, rosenbrock_and_grad, {"x": np.array([-1.2, 1.0])}),
    "rosenbrock_10": (rosenbrock, rosenbrock_and_grad, VALLEY),
    "logistic": (logistic, logistic_and_grad, {"w": np.zeros(5), "b": np.zeros(())}),
}
SEARCHES = {
    "strong_wolfe": (jr.strong_wolfe, papers.strong_wolfe),
    "strong_wolfe_exact": (partial(jr.strong_wolfe, 0.1, curv_rtol=0.1), partial(papers.strong_wolfe, 0.1, c2=0.1)),
    "backtracking": (jr.backtracking, papers.backtracking),
    "backtracking_far": (
        partial(jr.backtracking, 50, 0.4, 0.5, np.inf, 8.0),
        partial(papers.backtracking, 0.4, 0.5, np.inf, 8.0, 50),
    ),
}


def arrays(tree, dtype=None):
    return {key: jnp.asarray(x, dtype) for key, x in tree.items()}


def trained(rule, loss, params, steps, **kwargs):
    """(params, state) behind so many steps, with value and gradient from the state."""
    value_and_grad = jr.value_and_grad_from_state(loss, **kwargs)

    def body(carry, _):
        params, state = carry
        value, grads = value_and_grad(params, state=state)
        params, state = rule.apply(grads, state, params, value=value, grad=grads, value_fn=loss)
        return (params, state), params | {"metrics": jr.metrics(state), "loss": value}

    return jax.jit(lambda carry: jax.lax.scan(body, carry, None, steps))((params, rule.init(params)))


# ---------------------------------------------------------------------------------------------------------------------
# Against Nocedal & Wright, on losses
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.x64
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("memory_size", [0, 5])
def test_searches_match_the_book_on_losses(problem, search, memory_size):
    """30 steps along gradients (no memory) or L-BFGS directions; the book's begin where ours have led to."""
    loss, exact_loss, start = PROBLEMS[problem]
    ours, theirs = SEARCHES[search]
    # A bracket is never too narrow here: what is measured across it differs between the two.
    rule, reference = ours(tol=0.0) if "wolfe" in search else ours(), ref.pointwise(lambda gs, ps: gs)
    if memory_size:
        rule, reference = jr.chain(jr.lbfgs_direction(memory_size), rule), papers.lbfgs_direction(memory_size)
    book = papers.searched(reference, theirs(), exact_loss)
    next(book)
    _, path = trained(rule, loss, arrays(start), 30)
    compared, before = 0, start
    for k in range(30):
        value, grads = exact_loss(before)
        after = {key: np.asarray(path[key][k]) for key in start}
        # What cubics make of differences of values has the digits that these differences have; and the valley's value
        # is a square of differences.
        if value < 1e-8 or value - exact_loss(after)[0] <= 1e-4 * value:
            break
        updates = book.send((grads, before))
        for key, u in updates.items():
            rounding = np.finfo(np.float64).eps * np.abs(after[key]).max()
            np.testing.assert_allclose(after[key] - before[key], u, rtol=0, atol=1e-9 * np.abs(u).max() + rounding)
        compared, before = k + 1, after
    assert compared >= 5


@pytest.mark.x64
def test_lbfgs_needs_no_more_evaluations_than_scipy():
    _, path = trained(jr.lbfgs(), rosenbrock, arrays(VALLEY), 120)
    reached = int(np.argmax(np.asarray(path["loss"]) < 1e-8))
    evaluations = int(np.sum(path["metrics"]["num_linesearch_steps"][:reached]))
    seen = []

    def counted(x):
        value, grads = rosenbrock_and_grad({"x": x})
        seen.append(value)
        return value, grads["x"]

    optimize.minimize(counted, VALLEY["x"], jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-12})
    assert 0 < evaluations <= 1.1 * np.argmax(np.array(seen) < 1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# What is evaluated, and what is kept
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linesearch", ["strong_wolfe", "backtracking"])
def test_nothing_is_evaluated_twice(linesearch):
    seen = collections.Counter()

    def loss(params):
        jax.debug.callback(lambda x: seen.update([x.tobytes()]), params["x"])
        return rosenbrock(params)

    rule = jr.lbfgs(linesearch=linesearch)
    _, path = trained(rule, loss, arrays(VALLEY), 15)
    jax.effects_barrier()
    assert seen.total() == 1 + int(np.sum(path["metrics"]["num_linesearch_steps"]))
    assert max(seen.values()) == 1


@pytest.mark.parametrize("rule", [jr.lbfgs(), jr.lbfgs(linesearch="backtracking")], ids=repr)
def test_what_is_kept_is_the_value_and_gradient_behind_the_update(rule):
    (params, state), path = trained(rule, rosenbrock, arrays(VALLEY), 8)
    value, grads = jr.value_and_grad_from_state(rosenbrock)(params, state=state)
    expected = jax.value_and_grad(rosenbrock)(params)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grads["x"], expected[1]["x"], rtol=1e-4, atol=1e-3)
    assert np.all(np.diff(path["loss"]) <= 0)


@pytest.mark.parametrize("rule", [jr.lbfgs(), jr.lbfgs(linesearch="backtracking")], ids=repr)
def test_value_and_gradient_may_be_left_out(rule):
    """The search evaluates them itself, and what is in front of it never stands for the gradient of the loss."""
    params, others = arrays(VALLEY), arrays(VALLEY)
    state, other = rule.init(params), rule.init(params)
    for _ in range(3):
        value, grads = jax.value_and_grad(rosenbrock)(params)
        params, state = rule.apply(grads, state, params, value=value, grad=grads, value_fn=rosenbrock)
        others, other = rule.apply(grads, other, others, value_fn=rosenbrock)
        np.testing.assert_allclose(others["x"], params["x"], rtol=1e-5)
    halved = jr.chain(jr.scale(0.5), jr.strong_wolfe())
    updates, state = halved.update(grads, halved.init(params), params, value_fn=rosenbrock)
    value, slopes = jax.value_and_grad(rosenbrock)(jr.apply_updates(params, updates))
    eta = jr.metrics(state)["step_size"]
    _, exact = jax.value_and_grad(rosenbrock)(params)
    before = -0.5 * jnp.sum(exact["x"] * grads["x"])
    assert value <= rosenbrock(params) + 1e-4 * eta * before
    assert abs(-0.5 * jnp.sum(slopes["x"] * grads["x"])) <= -0.9 * before


def test_aux_is_allowed_and_dropped():
    def loss(params):
        return rosenbrock(params), {"size": params["x"].shape}

    rule = jr.lbfgs(has_aux=True)
    plain, _ = trained(jr.lbfgs(), rosenbrock, arrays(VALLEY), 5)
    (params, _), _ = trained(rule, loss, arrays(VALLEY), 5, has_aux=True)
    np.testing.assert_array_equal(params["x"], plain[0]["x"])


def test_a_parameter_that_took_no_part_makes_the_point_unknown():
    params = {"w": jnp.ones(2), "v": jnp.ones(2), "n": jnp.arange(2), "f": jnp.tanh}

    def loss(params):
        return jnp.sum(params["f"](params["w"]) ** 2 + params["v"] ** 2 * params["n"])

    rule = jr.lbfgs()
    value_and_grad = jr.value_and_grad_from_state(loss)
    value, grads = value_and_grad(params, state=rule.init(params))
    assert grads["n"] is None
    assert grads["f"] is None
    new, state = rule.apply(grads | {"v": None}, rule.init(params), params, value_fn=loss)
    np.testing.assert_array_equal(new["v"], params["v"])
    assert loss(new) < value
    assert not jnp.isfinite(state[1].value)
    exact = 2 * params["v"] * params["n"]
    np.testing.assert_allclose(value_and_grad(new, state=state)[1]["v"], exact)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_parameters_come_as_near_as_they_can(dtype):
    target = jnp.array([1.0, -3.0, 0.2])

    def loss(params):
        return jnp.sum(jnp.array([1.0, 30.0, 3.0]) * (params["x"] - target) ** 2)

    (params, state), path = trained(jr.lbfgs(), loss, {"x": jnp.zeros(3, dtype)}, 15)
    assert params["x"].dtype == dtype
    assert path["loss"].dtype == state[1].value.dtype == jnp.result_type(float)
    assert np.all(np.diff(path["loss"]) <= 0)
    np.testing.assert_allclose(params["x"].astype(float), target, rtol=4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("linesearch", ["strong_wolfe", "backtracking"])
def test_complex_parameters_are_pairs_of_real_ones(linesearch):
    target = jnp.array([1 + 2j, -3 + 0.5j])

    def loss(params):
        z = params["z"] - target
        return jnp.sum(z.real**4 + jnp.abs(z) ** 2 + z.imag * z.real)

    def split(params):
        return loss({"z": params["x"] + 1j * params["y"]})

    rule = jr.lbfgs(linesearch=linesearch)
    (whole, _), path = trained(rule, loss, {"z": jnp.zeros(2, complex)}, 20)
    _, parts = trained(rule, split, {"x": jnp.zeros(2), "y": jnp.zeros(2)}, 20)
    np.testing.assert_allclose(path["z"][:5], (parts["x"] + 1j * parts["y"])[:5], atol=2e-5)
    np.testing.assert_allclose(whole["z"], target, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Searches that fail
# ---------------------------------------------------------------------------------------------------------------------


TERMINALS = pytest.mark.parametrize("rule", [jr.strong_wolfe(), jr.backtracking()], ids=repr)


@TERMINALS
def test_a_direction_that_leads_uphill_gives_way_to_the_gradient(rule):
    params, grads = {"x": jnp.array([3.0, 4.0])}, {"x": jnp.array([-3.0, -4.0])}

    def loss(params):
        return 0.5 * jnp.sum(params["x"] ** 2)

    for d in (grads, {"x": jnp.array([jnp.nan, 1.0])}, {"x": jnp.array([-4.0, 3.0])}):
        new, state = rule.apply(d, rule.init(params), params, value_fn=loss)
        eta = jr.metrics(state)["step_size"]
        assert eta >= 1
        np.testing.assert_allclose(new["x"], params["x"] * (1 - eta / 5), rtol=1e-6)
    zero, state = rule.apply(grads, rule.init(params), {"x": jnp.zeros(2)}, value_fn=loss)
    np.testing.assert_array_equal(zero["x"], 0)
    assert jr.metrics(state)["num_linesearch_steps"] == jr.metrics(state)["linesearch_failed"] == 0


@TERMINALS
def test_a_loss_that_is_not_finite_is_too_high(rule):
    def loss(params):
        return jnp.sum(params["x"] - jnp.log(params["x"]))  # NaN below 0, infinite at 0

    params = {"x": jnp.array([0.1, 20.0])}
    grads = {"x": jnp.array([-9.0, 20.0])}
    new, state = rule.apply(grads, rule.init(params), params, value_fn=loss)
    assert loss(new) < loss(params)
    assert not jr.metrics(state)["linesearch_failed"]
    lost = {"x": jnp.array([-1.0, 1.0])}
    for value in ({}, {"value": jnp.nan, "grad": grads}, {"value": 1.0, "grad": {"x": jnp.array([jnp.nan, 1.0])}}):
        new, state = rule.apply(grads, rule.init(lost), lost, value_fn=loss, **value)
        np.testing.assert_array_equal(new["x"], lost["x"])
        assert jr.metrics(state)["linesearch_failed"] == 1


def test_a_search_that_fails_keeps_what_is_lowest():
    # A gradient that lies: the loss rises in its direction, and no length decreases it.
    params = {"x": jnp.array([1.0])}
    lying = {"value": 1.0, "grad": {"x": jnp.array([-2.0])}, "value_fn": lambda params: jnp.sum(params["x"] ** 2)}
    for rule in (jr.strong_wolfe(), jr.backtracking()):
        new, state = rule.apply({"x": jnp.array([-2.0])}, rule.init(params), params, **lying)
        np.testing.assert_array_equal(new["x"], params["x"])
        facts = jr.metrics(state)
        assert facts["linesearch_failed"] == 1
        assert facts["step_size"] == 0
        assert 0 < facts["num_linesearch_steps"] <= 30
        assert state.value == 1
    # The next search of backtracking goes on from the smallest length.
    assert 0 < state.last < 0.01
    # One trial of a search that would need several: what it found is better than nothing.
    once = jr.strong_wolfe(1e-3, 1)
    new, state = once.apply({"x": jnp.array([2.0])}, once.init(params), params, value_fn=lying["value_fn"])
    np.testing.assert_allclose(new["x"], 0.998, rtol=1e-6)
    assert jr.metrics(state)["linesearch_failed"] == 1


def test_a_length_is_a_constant_to_differentiation():
    params, direction = {"x": jnp.array([1.0, 2.0])}, {"x": jnp.array([1.0, 1.0])}
    rule = jr.strong_wolfe()

    def moved(factor):
        d = jax.tree.map(lambda d: factor * d, direction)
        updates, state = rule.update(d, rule.init(params), params, value_fn=lambda p: jnp.sum(p["x"] ** 2))
        return jnp.sum(updates["x"]), jr.metrics(state)["step_size"]

    slope, eta = jax.grad(moved, has_aux=True)(1.0)
    np.testing.assert_allclose(slope, -2 * eta, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# L-BFGS
# ---------------------------------------------------------------------------------------------------------------------


def test_pairs_without_curvature_are_skipped():
    rule = jr.lbfgs(0.1, 2, linesearch=None)
    params = {"x": jnp.array([1.0, 1.0])}
    state = rule.init(params)
    kept = []
    for g in ([1.0, 0.0], [0.5, 0.0], [0.7, 0.0], [0.3, 0.0], [0.3, 0.0]):  # curvature +, −, +, 0
        params, state = rule.apply({"x": jnp.array(g)}, state, params)
        kept.append(int(state[0].pairs))
    assert kept == [0, 1, 1, 2, 2]
    assert state[0].s["x"].shape == (2, 2)


def bowl(params):
    """Convex, so that a rounding stays one: a path through Rosenbrock's valley makes another path of it."""
    x = params["x"]
    return jnp.sum(jnp.cosh(x)) + (x[0] - 2 * x[1]) ** 2


def test_many_losses_at_once():
    starts = {"x": jnp.array([[-1.2, 1.0], [0.5, 2.0], [3.0, -1.0]])}
    together = jax.vmap(lambda params: trained(jr.lbfgs(), bowl, params, 3)[0][0]["x"])(starts)
    for start, end in zip(starts["x"], together, strict=True):
        alone = trained(jr.lbfgs(), bowl, {"x": start}, 3)[0][0]["x"]
        np.testing.assert_allclose(alone, end, rtol=1e-4, atol=1e-5)
        assert np.abs(end - start).max() > 0.1


def test_a_loss_may_change_between_calls_without_a_new_compilation():
    rule = jr.lbfgs()
    traces = []

    @jax.jit
    def step(params, state, shift):
        traces.append(1)
        return rule.apply(params, state, params, value_fn=lambda p: jnp.sum((p["x"] - shift) ** 2))

    params = arrays(VALLEY)
    state = rule.init(params)
    for shift in (1.0, 2.0, 3.0):
        params, state = step(params, state, shift)
    assert len(traces) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jr.polyak_sgd(variant="sps-"), 'variant is "sps" or "sps\\+"'),
        (lambda: jr.polyak_sgd(scaling=-1.0), "scaling must be at least 0"),
        (lambda: jr.lbfgs_direction(0), "memory_size must be an integer >= 1"),
        (lambda: jr.lbfgs(first="l3"), 'first is "l2" or "l1"'),
        (lambda: jr.lbfgs(skip="never"), 'skip is "relative" or "absolute"'),
        (lambda: jr.lbfgs(linesearch="zoom"), 'linesearch is "strong_wolfe"'),
        (lambda: jr.lbfgs(0.5, linesearch=jr.strong_wolfe()), "has a first length and has_aux of its own"),
        (lambda: jr.strong_wolfe(slope_rtol=0.5, curv_rtol=0.5), "slope_rtol must be less than curv_rtol"),
        (lambda: jr.strong_wolfe(curv_rtol=1.0), "curv_rtol must lie between 0 and 1"),
        (lambda: jr.strong_wolfe(max_linesearch_steps=0), "max_linesearch_steps must be an integer >= 1"),
        (lambda: jr.backtracking(2.5), "max_backtracking_steps must be an integer >= 1"),
        (lambda: jr.backtracking(increase_factor=0.9), "increase_factor must be at least 1"),
    ],
)
def test_what_is_refused_when_it_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_refused_in_an_update():
    params = {"x": jnp.ones(2)}
    rule = jr.strong_wolfe()
    state = rule.init(params)
    with pytest.raises(TypeError, match="needs value_fn"):
        rule.update(params, state, params)
    with pytest.raises(TypeError, match="needs the parameters"):
        rule.update(params, state, value_fn=rosenbrock)
    with pytest.raises(TypeError, match="needs value: "):
        jr.polyak_sgd().update(params, jr.polyak_sgd().init(params))
    with pytest.raises(TypeError, match=r"is has_aux=True missing.*gave tuple"):
        rule.update(params, state, params, value_fn=lambda p: (1.0, None))
    with pytest.raises(TypeError, match="as has_aux=True says: it gave"):
        jr.strong_wolfe(has_aux=True).update(params, state, params, value_fn=rosenbrock)
    with pytest.raises(TypeError, match=r"must return a real scalar, not float32\[2\]"):
        rule.update(params, state, params, value_fn=lambda p: p["x"].astype(jnp.float32))
    with pytest.raises(ValueError, match="the extra argument grad has none at 'x'"):
        rule.update(params, state, params, value=1.0, grad={"x": None}, value_fn=rosenbrock)
    with pytest.raises(ValueError, match="the state has 0 line searches"):
        jr.value_and_grad_from_state(rosenbrock)(params, state=jr.sgd(0.1).init(params))


def test_a_linesearch_of_ones_own_ends_the_chain():
    rule = jr.lbfgs(linesearch=jr.strong_wolfe(0.5))
    (_, state), _ = trained(rule, rosenbrock, arrays(VALLEY), 3)
    assert jr.hyperparams(state)["learning_rate"] == 0.5
    with pytest.raises(TypeError, match="takes rules"):
        jr.lbfgs(linesearch=jr.strong_wolfe)


def test_polyak_steps_to_the_minimum_of_a_line():
    """|x| in one dimension is what the step is made for: it is there at once. A zero gradient stands still."""
    rule = jr.polyak_sgd(10.0)
    params = {"x": jnp.array([3.0])}
    new, state = rule.apply({"x": jnp.array([1.0])}, rule.init(params), params, value=3.0)
    np.testing.assert_allclose(new["x"], 0, atol=1e-6)
    assert jr.metrics(state)["step_size"] == 3
    for value in (0.0, 5.0):
        same, _ = rule.apply({"x": jnp.zeros(1)}, state, params, value=value)
        np.testing.assert_array_equal(same["x"], params["x"])


def test_a_search_stands_behind_a_partition_of_directions():
    params = {"w": jnp.array([3.0, 4.0]), "v": jnp.array([1.0, -1.0])}

    def loss(params):
        return jnp.sum(params["w"] ** 2) + jnp.sum((params["v"] * params["w"] - 1) ** 2)

    groups = {"curved": jr.lbfgs_direction(), "plain": jr.momentum_direction(0.5)}
    rule = jr.chain(jr.partition(groups, lambda path, p: "curved" if path == "w" else "plain"), jr.strong_wolfe())
    _, path = trained(rule, loss, params, 20)
    assert np.all(np.diff(path["loss"]) <= 0)
    assert path["loss"][-1] < 2.1
