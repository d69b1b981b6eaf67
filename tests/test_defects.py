"""What goes wrong elsewhere and does not here: each test names the defect, and where it is reported.

The defects are those of Optax 0.2.8 and of loops written with it; a number is that of an issue or pull request in its
repository. A zero gradient in float16, aliases, abstract birth and dtypes that drift are the business of the laws.
"""

import pickle
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import jaxopt_rules as jr
from jaxopt_rules.rules.adam import AdamState

PARAMS = {"b": jnp.array([0.5, -0.5]), "w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
ONES = jax.tree.map(jnp.ones_like, PARAMS)
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
NAN = PARAMS | {"b": jnp.array([jnp.nan, 1.0])}


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def run(rule: jr.Rule, gradients: list[Any], params: Any = PARAMS, **extra: Any) -> tuple[Any, Any]:
    """Parameters and state behind these gradients, with donation, in one compiled program."""
    step = quick_jit(lambda params, state, g: rule.apply(g, state, params, **extra), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, params)
    state = rule.init(params)
    for g in gradients:
        params, state = step(params, state, g)
    return params, state


def by_pair(rule: jr.Rule, gradients: list[Any], params: Any = PARAMS) -> tuple[Any, Any]:
    state = rule.init(params)
    for g in gradients:
        updates, state = quick_jit(rule.update)(g, state, params)
        params = jr.apply_updates(params, updates)
    return params, state


def in_a_scan(rule: jr.Rule, params: Any, grads: Any) -> tuple[Any, Any]:
    def body(carry, g):
        params, state = carry
        return rule.apply(g, state, params), None

    return jax.lax.scan(body, (params, rule.init(params)), grads)[0]


def counted(rule: jr.Rule) -> tuple[Any, list[None]]:
    """A compiled step, and a list that grows with every trace of it."""
    traces = []

    def step(grads, state, params):
        traces.append(None)
        return rule.apply(grads, state, params)

    return quick_jit(step), traces


# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_live_hyperparameters_with_narrow_parameters(dtype):
    """`inject_hyperparams` casts b2 = 0.999 to bfloat16, where it is 1: NaN in the first step (#1414)."""
    params = cast(PARAMS, dtype)
    rule = jr.adamw(1e-3, weight_decay=0.0)
    updates, _ = rule.update(cast(ONES, dtype), rule.init(params), params)
    np.testing.assert_allclose(updates["w"], -1e-3, rtol=1e-5)


def test_live_hyperparameters_do_not_widen_slots_in_a_scan():
    """With `hyperparam_dtype=float32`, moments of bfloat16 become float32 after a step, which `scan` refuses."""
    params = cast(PARAMS, jnp.bfloat16)
    rule = jr.adamw(1e-3)
    grads = jax.tree.map(lambda p: jnp.stack([p] * 3), params)
    new, state = in_a_scan(rule, params, grads)
    assert new["w"].dtype == jnp.bfloat16
    assert jr.find(state, AdamState).v["w"].dtype == jnp.float32


@pytest.mark.parametrize("rate", [0.1, np.float64(0.1), np.float32(0.1), jnp.float32(0.1), jnp.bfloat16(0.1)])
def test_the_dtype_of_an_update_does_not_depend_on_that_of_the_rate(rate):
    """Updates are of another dtype for a number, a NumPy scalar and an array (#1405)."""
    params = cast(PARAMS, jnp.bfloat16)
    updates, _ = jr.adam(rate).update(params, jr.adam(rate).init(params), params)
    assert updates["w"].dtype == jnp.float32
    assert run(jr.adam(rate), [params], params)[0]["w"].dtype == jnp.bfloat16


def test_a_live_value_gives_the_bits_of_a_constant():
    """The injected optimizer drifts away from the plain one (#1532)."""
    rule = jr.adamw(1.0)
    state = jr.set_hyperparams(rule.init(PARAMS), learning_rate=0.1)
    expected = quick_jit(jr.adamw(0.1).apply)(ONES, jr.adamw(0.1).init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(quick_jit(rule.apply)(ONES, state, PARAMS), expected)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), jnp.float32(0.5), jnp.bfloat16(0.5), 1])
def test_another_value_compiles_nothing(value):
    """A new rate is a new optimizer and a new program (#197, #577); a number set in the state retraces once."""
    rule = jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(0.1))
    step, traces = counted(rule)
    _, state = step(ONES, rule.init(PARAMS), PARAMS)
    step(ONES, jr.set_hyperparams(state, learning_rate=value, max_norm=value), PARAMS)
    assert len(traces) == 1


def test_a_sweep_of_rates_is_a_vmap():
    """It takes two tools and a filter (#932)."""
    rule = jr.adamw()

    def final(rate):
        return rule.apply(ONES, jr.set_hyperparams(rule.init(PARAMS), learning_rate=rate), PARAMS)[0]["b"][0]

    finals = jax.vmap(final)(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(finals, [0.5 - 0.1 * 1.005, 0.5 - 0.2 * 1.005], rtol=1e-5)


def test_clip_schedule_and_the_rate_in_one_chain():
    """`inject_hyperparams` wraps a factory, not a rule, and the obvious composition has no rate to log (#206, #964)."""
    rule = jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(jr.Linear(0.4, 4)))
    _, state = run(rule, [ONES] * 3)
    np.testing.assert_allclose(jr.metrics(state)["learning_rate"], 0.2, rtol=1e-6)
    np.testing.assert_allclose(jr.metrics(state)["grad_norm"], np.sqrt(6), rtol=1e-6)


def test_a_schedule_sees_zero_first():
    """Counts begin at 1 in `schedule_free` (#1744), and were off by one elsewhere (#415)."""
    seen = []
    rule = jr.sgd(lambda count: seen.append(int(count)) or 0.1)
    state = rule.init(PARAMS)
    seen.clear()
    for _ in range(3):
        _, state = rule.update(ONES, state, PARAMS)
    assert seen == [0, 1, 2]


def test_a_name_that_is_not_there_is_an_error():
    """`tree.get` returns `None` for it."""
    with pytest.raises(KeyError, match=r"the state has no hyperparameter 'lr'; it has .*learning_rate"):
        jr.set_hyperparams(jr.adamw().init(PARAMS), lr=0.1)


def test_what_a_schedule_owns_cannot_be_set():
    """An edited value that a schedule owns is overwritten without a word."""
    with pytest.raises(ValueError, match="learning_rate is owned by a schedule"):
        jr.set_hyperparams(jr.adamw(jr.Linear(0.1, 4)).init(PARAMS), learning_rate=0.2)


def test_a_predicate_is_no_schedule():
    """`inject_hyperparams` takes any callable argument for a schedule, a mask too (#1373)."""
    rule = jr.adamw(0.1, weight_decay=0.5, where=lambda path, p: p.ndim == 2)
    state = jr.set_hyperparams(rule.init(PARAMS), weight_decay=1.0)
    new, _ = rule.apply(ZEROS, state, PARAMS)
    chex.assert_trees_all_close(new, PARAMS | {"w": 0.9 * PARAMS["w"]}, rtol=1e-6)


def test_every_number_of_a_rule_may_be_a_schedule():
    """Weight decay, norms and moments took numbers alone for years (#1426)."""
    halves = jr.Linear(0.5, 4)
    rule = jr.chain(
        jr.clip_by_global_norm(halves), jr.adamw(halves, b1=halves, b2=halves, eps=halves, weight_decay=halves)
    )
    _, state = run(rule, [ONES] * 3)
    assert set(map(float, jr.hyperparams(state).values())) == {0.25}


@pytest.mark.parametrize("name", ["learning_rate", "b1", "b2", "eps", "weight_decay"])
def test_a_rule_is_built_from_a_traced_value(name):
    """Some factories branch on values, and cannot be built inside `jit` (#412)."""

    @jax.jit
    def step(value):
        rule = jr.adamw(**{name: value})
        return rule.apply(ONES, rule.init(PARAMS), PARAMS)[0]

    rule = jr.adamw(**{name: 0.25})
    chex.assert_trees_all_close(step(0.25), rule.apply(ONES, rule.init(PARAMS), PARAMS)[0], rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Rules are values
# ---------------------------------------------------------------------------------------------------------------------

VALUES = [
    lambda: jr.adam(1e-3),
    lambda: jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(jr.Warmup(jr.Cosine(1e-3, 9), 2), where="**/w")),
    lambda: jr.partition({"x": jr.sgd(0.1), "y": jr.adamw()}, {"x": jr.matrices}),
    lambda: jr.accumulate(jr.skip_nonfinite(jr.average(jr.lookahead(jr.freeze(jr.adamw(), "b")))), 4),
]


@pytest.mark.parametrize("make", VALUES)
def test_rules_can_be_compared(make):
    """`adam(1e-3) == adam(1e-3)` is false: two pairs of closures (#1)."""
    assert make() == make()
    assert hash(make()) == hash(make())


@pytest.mark.parametrize("make", VALUES)
def test_rules_can_be_pickled(make):
    """Closures cannot be pickled."""
    assert pickle.loads(pickle.dumps(make())) == make()


@pytest.mark.parametrize("make", VALUES)
def test_rules_print_as_they_were_written(make):
    """A printed optimizer is two addresses of functions."""
    assert " at 0x" not in repr(make())
    assert repr(make()) == repr(make())


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------


def test_a_second_moment_of_bfloat16_parameters_rises_and_decays():
    """In bfloat16 0.999 v is v: it stalls at 0.5 under constant gradients and never decays (#1552)."""
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    rule = jr.adam_direction()

    def steps(state, g, n):
        return jax.lax.fori_loop(0, n, lambda _, state: rule.update({"w": g}, state, params)[1], state)

    risen = quick_jit(steps, static_argnums=2)(rule.init(params), jnp.ones_like(params["w"]), 3000)
    np.testing.assert_allclose(risen.v["w"], 1 - 0.999**3000, rtol=1e-4)
    fallen = quick_jit(steps, static_argnums=2)(risen, jnp.zeros_like(params["w"]), 3000)
    np.testing.assert_allclose(fallen.v["w"], (1 - 0.999**3000) * 0.999**3000, rtol=1e-4)


def test_the_direction_of_constant_gradients_in_bfloat16_is_one():
    """With that second moment it is 1.35."""
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    rule = jr.adam_direction()
    state = jax.lax.fori_loop(0, 2000, lambda _, state: rule.update(params, state)[1], rule.init(params))
    np.testing.assert_allclose(rule.update(params, state)[0]["w"], 1, rtol=1e-4)


def test_one_rounding_at_the_end():
    """The update is rounded to the parameter's dtype before it is added (#1444)."""
    params = {"w": jnp.bfloat16(1 + 2**-6)}
    new, _ = run(jr.sgd(1.0), [{"w": jnp.float32(2**-8 + 2**-16)}], params)
    # The sum lies below the middle of two numbers; a rounded update leads to it, and from there to the upper one.
    assert float(new["w"]) == 1 + 2**-7


@pytest.mark.parametrize("size", [1200.0, 60000.0])
def test_a_norm_beyond_float16(size):
    """The norm of float16 gradients is inf from 256 on: the clipped update is 0."""
    g = {"w": jnp.full(4, size / 2, jnp.float16)}
    out, state = jr.clip_by_global_norm(1.0).update(g, jr.clip_by_global_norm(1.0).init(g))
    np.testing.assert_allclose(out["w"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(jr.metrics(state)["grad_norm"], size, rtol=1e-5)


def test_a_norm_below_float16():
    """That of tiny gradients reads 0."""
    g = {"w": jnp.full(4, 1e-4, jnp.float16)}
    _, state = jr.clip_by_global_norm(1.0).update(g, jr.clip_by_global_norm(1.0).init(g))
    np.testing.assert_allclose(jr.metrics(state)["grad_norm"], 2e-4, rtol=1e-2)


@pytest.mark.parametrize("bound", [1.0, np.float32(1.0), jnp.float32(1.0), jr.Constant(1.0)], ids=type)
def test_a_bound_of_another_dtype_than_the_gradients(bound):
    """A float32 max_norm, so any scheduled one, raises for bfloat16 gradients."""
    g = cast(ONES, jnp.bfloat16)
    out, _ = jr.clip_by_global_norm(bound).update(g, jr.clip_by_global_norm(bound).init(g))
    np.testing.assert_allclose(jr.global_norm(out), 1, rtol=1e-5)


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_clipping_a_norm_of_zero(bound):
    """0 / 0 with max_norm = 0 (#1752)."""
    out, _ = jr.clip_by_global_norm(bound).update(ZEROS, jr.clip_by_global_norm(bound).init(ZEROS))
    chex.assert_trees_all_equal(out, ZEROS)


def test_clipping_to_zero():
    """As above, but the norm is not 0."""
    out, _ = jr.clip_by_global_norm(0.0).update(ONES, jr.clip_by_global_norm(0.0).init(ONES))
    chex.assert_trees_all_equal(out, ZEROS)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite
# ---------------------------------------------------------------------------------------------------------------------


def test_clipping_an_infinite_gradient_is_as_documented():
    """One infinity makes the other gradients 0 and itself NaN, without a word; here the docstring has it, and ..."""
    g = PARAMS | {"b": jnp.array([jnp.inf, 1.0])}
    out, _ = jr.clip_by_global_norm(1.0).update(g, jr.clip_by_global_norm(1.0).init(g))
    np.testing.assert_array_equal(out["b"], [np.nan, 0])
    np.testing.assert_array_equal(out["w"], 0)
    assert "an infinite gradient becomes NaN and makes the" in jr.clip_by_global_norm.__doc__


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_and_skipping_protects_from_it(bad):
    """... `skip_nonfinite` takes no such step."""
    g = PARAMS | {"b": jnp.array([bad, 1.0])}
    new, state = run(jr.skip_nonfinite(jr.chain(jr.clip_by_global_norm(1.0), jr.adamw())), [g])
    chex.assert_trees_all_equal(new, PARAMS)
    assert jr.metrics(state)["skipped"] == 1


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_and_so_does_zeroing(bad):
    """... `zero_nonfinite` leaves out the bad elements; `zero_nans` lets infinities pass."""
    g = PARAMS | {"b": jnp.array([bad, 1.0])}
    new, _ = run(jr.chain(jr.zero_nonfinite(), jr.clip_by_global_norm(1.0), jr.sgd(1.0)), [g])
    assert new["b"][0] == PARAMS["b"][0]
    assert all(map(lambda p: jnp.isfinite(p).all(), jax.tree.leaves(new)))


@pytest.mark.parametrize("nonfinite", ["drop", "keep"])
def test_a_bad_micro_batch_does_not_last(nonfinite):
    """0 · NaN: one NaN among the micro-batches, and every later update of `MultiSteps` is NaN."""
    rule = jr.accumulate(jr.sgd(1.0), 2, nonfinite=nonfinite)
    updates, state = rule.update(NAN, rule.init(PARAMS), PARAMS)
    updates, state = rule.update(ONES, state, PARAMS)
    expected = {"drop": [-1, -1], "keep": [np.nan, -1]}[nonfinite]
    np.testing.assert_array_equal(updates["b"], expected)
    for _ in range(2):
        updates, state = rule.update(ONES, state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.negative, ONES))
    assert jr.metrics(state)["dropped"] == (nonfinite == "drop")


def test_zeroing_inside_accumulation():
    """`zero_nans` and `MultiSteps` do not go together (#828)."""
    rule = jr.accumulate(jr.chain(jr.zero_nonfinite(), jr.sgd(1.0)), 2, nonfinite="keep")
    new, _ = run(rule, [NAN, NAN | {"w": ZEROS["w"]}])
    chex.assert_trees_all_close(new, {"b": PARAMS["b"] - jnp.array([0, 1.0]), "w": PARAMS["w"] / 2})


@pytest.mark.parametrize("many", [1, 3, 20])
def test_a_nan_is_never_accepted(many):
    """`apply_if_finite` takes the NaN after max_consecutive_errors of them, and every later one (#1746)."""
    rule = jr.skip_nonfinite(jr.adamw(0.1))
    new, state = run(rule, [NAN] * many + [ONES])
    chex.assert_trees_all_close(new, run(jr.adamw(0.1), [ONES])[0], rtol=1e-6)
    assert jr.metrics(state)["skipped"] == many
    assert jr.metrics(state)["in_a_row"] == 0


def test_skipping_under_vmap():
    """There `cond` becomes a selection; the numbers of each lane are those that it has alone."""
    rule = jr.skip_nonfinite(jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(0.1)))
    grads = jax.tree.map(lambda x, y: jnp.stack([x, y]), NAN, ONES)
    new, state = jax.vmap(lambda g: rule.apply(g, rule.init(PARAMS), PARAMS))(grads)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], new), PARAMS)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], new), run(rule, [ONES])[0], rtol=1e-6)
    np.testing.assert_array_equal(jr.metrics(state)["skipped"], [1, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation
# ---------------------------------------------------------------------------------------------------------------------


def test_parameters_reach_a_rule_inside_accumulation():
    """They did not: weight decay failed (#145)."""
    new, _ = run(jr.accumulate(jr.adamw(0.1, weight_decay=0.5), 2), [ZEROS, ZEROS])
    chex.assert_trees_all_close(new, jax.tree.map(lambda p: 0.95 * p, PARAMS), rtol=1e-6)


@pytest.mark.parametrize("around", [lambda rule: rule, lambda rule: jr.chain(jr.clip_by_value(9.0), rule)])
def test_a_value_reaches_a_rule_inside_accumulation(around):
    """Inside a chain, `MultiSteps` drops extra arguments (#679)."""
    rule = around(jr.accumulate(jr.chain(jr.sgd(1.0), jr.reduce_on_plateau(0.5, 0)), 2))
    new, state = run(rule, [ONES] * 4, value=1.0)
    assert jr.metrics(state)["plateau_scale"] == 0.5
    np.testing.assert_allclose(new["w"], PARAMS["w"] - 1.5)


def test_accumulation_is_a_member_of_chains():
    """`MultiSteps` is a class of its own kind, no transformation."""
    rule = jr.chain(jr.clip_by_value(0.5), jr.accumulate(jr.sgd(1.0), 2))
    np.testing.assert_allclose(run(rule, [ONES, ONES])[0]["w"], PARAMS["w"] - 0.5)


def test_whether_it_has_updated_is_in_the_state():
    """One asks the object, with the state (`has_updated`)."""
    rule = jr.accumulate(jr.sgd(1.0), 2)
    assert [int(jr.metrics(run(rule, [ONES] * n)[1])["micro_step"]) for n in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_accumulation_of_averages_in_a_scan(dtype):
    """`MultiSteps` and `schedule_free` did not agree on dtypes (#1038)."""
    params = cast(PARAMS, dtype)
    rule = jr.accumulate(jr.average(jr.lookahead(jr.adamw())), 2)
    grads = jax.tree.map(lambda p: jnp.stack([p] * 4), cast(PARAMS, jnp.bfloat16))
    _, state = in_a_scan(rule, params, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, rule.init(params))


# ---------------------------------------------------------------------------------------------------------------------
# What is recorded
# ---------------------------------------------------------------------------------------------------------------------

RECORDING = [
    jr.chain(jr.clip_by_global_norm(1.0), jr.sgd(0.1)),
    jr.chain(jr.record("norm", jr.global_norm), jr.sgd(0.1), jr.record("update", jr.global_norm)),
    jr.skip_nonfinite(jr.accumulate(jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(jr.Linear(0.1, 9))), 2)),
]


@pytest.mark.parametrize("rule", RECORDING, ids=repr)
def test_recorded_values_come_out_of_a_scan(rule):
    """`monitor` has another structure after its first update: no scan, and two traces."""

    def body(carry, g):
        new, state = rule.apply(g, carry[1], carry[0])
        return (new, state), jr.metrics(state)

    grads = jax.tree.map(lambda p: jnp.stack([p] * 4), PARAMS)
    (_, state), series = jax.lax.scan(body, (PARAMS, rule.init(PARAMS)), grads)
    assert {name: x.shape for name, x in series.items()} == dict.fromkeys(jr.metrics(state), (4,))
    assert jax.tree.structure(state) == jax.tree.structure(rule.init(PARAMS))


@pytest.mark.parametrize("rule", RECORDING, ids=repr)
def test_recording_costs_no_second_trace(rule):
    step, traces = counted(rule)
    params, state = PARAMS, rule.init(PARAMS)
    for _ in range(3):
        params, state = step(ONES, state, params)
    assert len(traces) == 1


def test_the_norm_that_clipping_computes_is_kept():
    """It is computed and thrown away (#326)."""
    _, state = run(jr.chain(jr.clip_by_global_norm(1.0), jr.sgd(0.1)), [ONES])
    np.testing.assert_allclose(jr.metrics(state)["grad_norm"], np.sqrt(6), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        jr.freeze(jr.adamw(0.1, weight_decay=0.5), "b"),
        jr.chain(jr.freeze(jr.identity(), "b"), jr.adamw(0.1, weight_decay=0.5)),
        jr.chain(jr.weight_decay(0.5), jr.freeze(jr.adamw(0.1, weight_decay=0.5), "b")),
        jr.chain(jr.freeze(jr.clip_by_global_norm(1.0), "b"), jr.weight_decay(0.5), jr.adamw(0.1, weight_decay=0.5)),
        jr.freeze(jr.lookahead(jr.chain(jr.weight_decay(0.5), jr.normalize(), jr.step(0.1, 0.5)), 1), "b"),
        jr.average(jr.freeze(jr.adamw(0.1, weight_decay=0.5, decay="independent"), "b")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("train", [run, by_pair])
def test_a_frozen_parameter_does_not_decay(rule, train):
    """Behind `freeze` it still decays; a rate of 0 does not freeze it under Adam either (#290, #296, flax#1764)."""
    new, _ = train(rule, [PARAMS] * 3)
    np.testing.assert_array_equal(new["b"], PARAMS["b"])
    assert (new["w"] != PARAMS["w"]).all()


def test_a_masked_optimizer_is_refused():
    """`masked` alone adds the raw gradient to what it does not select: it ascends (#159, #175)."""
    with pytest.raises(
        ValueError, match="the gradients that pass through would be added to the parameters as they are"
    ):
        jr.masked(jr.adam(), "w")


def test_masks_inside_masks():
    """Their error is about the nodes of the outer mask (#271)."""
    rule = jr.masked(jr.masked(jr.scale(3.0), "w"), ["b", "w"])
    out, _ = rule.update(ONES, rule.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(out, ONES | {"w": 3 * ONES["w"]})


class CustomState(NamedTuple):
    count: Any
    hyper: Any
    m: Any


def test_a_rule_of_ones_own_in_a_group():
    """Some fail inside `multi_transform` (#1109)."""
    custom = jr.leafwise(lambda g, m: (-(m + g), (m + g,)), CustomState, place="end")
    new, _ = run(jr.partition({"x": custom, "y": jr.adamw()}, {"x": "w"}), [ONES, ONES])
    np.testing.assert_allclose(new["w"], PARAMS["w"] - 3)


def test_one_group_can_be_reset():
    """Doing that to a `PartitionState` corrupts it (#1371)."""
    rule = jr.partition({"x": jr.adam(), "y": jr.adam()}, {"x": "w"})
    params, state = run(rule, [ONES] * 3)
    new = jr.reset(rule, state, params, "w")
    assert not jr.find(new["x"], AdamState).m["w"].any()
    chex.assert_trees_all_equal(new["y"], state["y"])
    rule.apply(ONES, new, params)


@pytest.mark.parametrize("rule", [jr.sgd(0.1, 0.9), jr.adamw(), jr.accumulate(jr.adamw(), 1), jr.lookahead(jr.adam())])
def test_leaves_that_are_integers(rule):
    """A TypeError inside `power`."""
    params = PARAMS | {"n": jnp.arange(3), "steps": 3}
    new, _ = rule.apply(PARAMS | {"n": None, "steps": None}, rule.init(params), params)
    assert new["n"] is params["n"]
    assert new["steps"] == 3


def test_biases_that_do_not_decay():
    """It takes a tree of booleans, or a function that makes one (#25)."""
    new, _ = run(jr.adamw(0.1, weight_decay=0.5, where="w"), [ZEROS])
    chex.assert_trees_all_close(new, PARAMS | {"w": 0.95 * PARAMS["w"]}, rtol=1e-6)


def test_decay_that_does_not_depend_on_the_rate():
    """`adamw` multiplies it by the rate (#292), so that another rate is another decay."""
    rule = jr.adamw(0.1, weight_decay=0.5, decay="independent", peak=0.1)
    new, _ = run(rule, [ZEROS])
    chex.assert_trees_all_close(new, jax.tree.map(lambda p: 0.5 * p, PARAMS), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

PLATEAU = jr.chain(jr.sgd(1.0), jr.reduce_on_plateau(0.5, 0))


@pytest.mark.parametrize(
    "rule",
    [
        jr.adam(),
        PLATEAU,
        jr.partition({"x": PLATEAU, "y": jr.adam()}, {"x": "w"}),
        jr.accumulate(PLATEAU, 2),
        jr.skip_nonfinite(PLATEAU),
        jr.average(PLATEAU),
        jr.lookahead(jr.freeze(PLATEAU, "b")),
    ],
    ids=repr,
)
def test_a_misspelt_extra_argument(rule):
    """It vanishes."""
    with pytest.raises(TypeError, match="does not take valeu; the extra arguments it accepts are grad, loss, value"):
        rule.update(ONES, rule.init(PARAMS), PARAMS, value=1.0, valeu=1.0)


def test_state_and_gradients_in_the_wrong_order():
    """The message is about the number of updates and states."""
    rule = jr.chain(jr.clip_by_global_norm(1.0), jr.sgd(0.1))
    with pytest.raises(TypeError, match="update got a state of type dict where it needs 2 states"):
        rule.update(rule.init(PARAMS), ONES, PARAMS)


def test_a_chain_of_nothing():
    """An error about unpacking."""
    out, _ = jr.chain().update(ONES, jr.chain().init(PARAMS))
    chex.assert_trees_all_equal(out, ONES)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters to evaluate with, and their memory
# ---------------------------------------------------------------------------------------------------------------------


def test_lookahead_takes_plain_parameters():
    """Its parameters are a pair of two trees; plain ones crash in the first update (#1429)."""
    new, state = run(jr.lookahead(jr.sgd(1.0), 2, 0.5), [ONES, ONES])
    chex.assert_trees_all_close(new, jax.tree.map(lambda p: p - 1, PARAMS), rtol=1e-6)
    chex.assert_trees_all_equal(jr.eval_params(state, new), new)


@pytest.mark.parametrize(
    "around",
    [
        lambda rule: rule,
        lambda rule: jr.chain(jr.clip_by_value(9.0), rule),
        lambda rule: jr.chain(jr.clip_by_value(9.0), optimizer=jr.accumulate(jr.skip_nonfinite(rule), 1)),
        lambda rule: jr.partition({"all": rule}, {"all": "**"}),
    ],
)
def test_averages_are_found_through_any_nesting(around):
    """`schedule_free_eval_params` takes the bare state alone: AttributeError for that of a chain (#1744)."""
    rule = around(jr.average(jr.sgd(1.0), decay=None))
    new, state = run(rule, [ONES, ONES])
    expected = jax.tree.map(lambda p: p - 1.5, PARAMS)
    chex.assert_trees_all_close(jr.eval_params(state, new), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        jr.adamw(decay="initial"),
        jr.lookahead(jr.sgd(0.1)),
        jr.average(jr.adamw()),
        jr.average(jr.sgd(0.1), window=2),
        jr.accumulate(jr.average(jr.lookahead(jr.adamw(decay="initial"))), 2),
        jr.partition({"x": jr.average(jr.sgd(0.1)), "y": jr.lookahead(jr.sgd(0.1))}, {"x": "w"}),
        jr.freeze(jr.average(jr.lookahead(jr.sgd(0.1))), "b"),
    ],
    ids=repr,
)
def test_parameters_and_state_can_be_donated(rule):
    """States that keep the parameters they were born from fail: "donate the same buffer twice" (#1059)."""
    new, state = run(rule, [ONES] * 2)
    new, state = quick_jit(lambda params, state: (params, state), donate_argnums=(0, 1))(new, state)
    new, _ = rule.apply(ONES, state, new)
    assert all(jnp.isfinite(p).all() for p in jax.tree.leaves(new))


# ---------------------------------------------------------------------------------------------------------------------
# Saved states
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (jr.adamw(0.1), jr.adamw(jr.Linear(0.1, 4))),
        (jr.adamw(0.1), jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(0.1))),
        (jr.adamw(0.1), jr.chain(jr.clip_by_global_norm(1.0), jr.centralize(), jr.adamw(jr.Linear(0.1, 4)))),
        (jr.adamw(0.1), jr.accumulate(jr.skip_nonfinite(jr.adamw(0.1)), 4)),
        (jr.adamw(0.1), jr.average(jr.chain(jr.adamw(0.1), jr.scale_by_path({"w": 0.5})))),
    ],
)
def test_names_of_saved_slots_stay(before, after):
    """With clipping in front, or a schedule in place of a number, every slot is found under another path."""
    saved = jr.state_dict(run(before, [ONES])[1])
    assert saved.keys() <= jr.state_dict(after.init(PARAMS)).keys()


def test_a_constant_may_become_a_schedule():
    """The state gains a counter, and what was saved no longer fits."""
    saved = jr.state_dict(run(jr.adamw(0.1), [ONES] * 2)[1])
    scheduled = jr.adamw(jr.Linear(0.4, 4))
    state, _ = jr.load_state_dict(scheduled.init(PARAMS), saved)
    _, state = scheduled.apply(ONES, state, PARAMS)
    np.testing.assert_allclose(jr.metrics(state)["learning_rate"], 0.2, rtol=1e-6)


def test_a_schedule_goes_on_where_it_was():
    """Its step has to be restored by hand (#1036), or begins anew."""
    rule = jr.sgd(jr.Linear(1.0, 10))
    saved = jr.state_dict(run(rule, [ONES] * 4)[1])
    state, _ = jr.load_state_dict(rule.init(PARAMS), saved)
    updates, _ = rule.update(ONES, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -0.6, rtol=1e-6)
