"""Schedule-free learning and SAM beyond their table: what is evaluated with, nesting, narrow parameters, errors."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit, stepped
from golden import Bag

import jaxopt_rules as jr

STEPS = 30
RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2))), "b": jnp.asarray(RNG.normal(size=2))}
GRADS = [{"w": jnp.asarray(RNG.normal(size=(3, 2))), "b": jnp.asarray(RNG.normal(size=2))} for _ in range(STEPS)]
SGD = jr.schedule_free_sgd(0.1)
ADAMW = jr.schedule_free_adamw(0.1, weight_decay=0.1)
close = partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-6)
same = chex.assert_trees_all_equal


def run(rule, grads=GRADS, params=PARAMS, state=None, by_pair=False):
    """(parameters, state) behind each of these gradients."""
    state, passed = rule.init(params) if state is None else state, []
    for g in grads:
        params, state = stepped(rule, params, state, g, by_pair=by_pair)
        passed.append((params, state))
    return passed


def averages(rule, rates, power=2.0, r=0.0):
    """x of schedule-free gradient descent, with z and x kept (Defazio et al. 2024, equations 7 to 9)."""
    z = {key: np.asarray(p, np.float64) for key, p in PARAMS.items()}
    x, total, largest, passed = z, 0.0, 0.0, []
    for t, g in enumerate(GRADS, 1):
        largest = max(largest, rates(t - 1))
        weight = t**r * largest**power
        total += weight
        c = weight / total if total else 0.0
        z = {key: z[key] - rates(t - 1) * np.asarray(g[key], np.float64) for key in z}
        x = {key: (1 - c) * x[key] + c * z[key] for key in x}
        passed.append(x)
    return passed


def falling_b1(count):
    return 0.95 - 0.9 * count / STEPS


@pytest.mark.parametrize("by_pair", [False, True], ids=["apply", "pair"])
@pytest.mark.parametrize(
    ("rule", "rates", "keywords"),
    [
        (jr.schedule_free_sgd(0.1), lambda count: 0.1, {}),
        (jr.schedule_free_sgd(0.1, 7), lambda count: 0.1 * min(count + 1, 7) / 7, {}),
        (jr.schedule_free_sgd(0.1, 1, b1=0.5, r=2.0), lambda count: 0.1, {"r": 2.0}),
        (jr.schedule_free(jr.sgd(jr.Warmup(0.1, 5)), b1=falling_b1), lambda count: 0.1 * min(count, 5) / 5, {}),
        (jr.schedule_free(jr.sgd(jr.Cosine(0.1, STEPS)), weight_lr_power=0.0), jr.Cosine(0.1, STEPS), {"power": 0.0}),
    ],
    ids=["plain", "warm-up", "t squared", "b1 falls", "rate falls"],
)
def test_what_is_evaluated_with_is_the_weighted_mean_of_z(rule, rates, keywords, by_pair):
    """Whatever b1 is, it does not act on z and x where the gradients are given."""
    passed = run(rule, by_pair=by_pair)
    for (params, state), expected in zip(passed, averages(rule, rates, **keywords), strict=True):
        close(jr.eval_params(state, params), expected)


def test_a_new_b1_moves_the_parameters_and_not_the_average():
    params, state = run(SGD, GRADS[:10])[-1]
    before = jr.eval_params(state, params)
    changed = jr.set_hyperparams(state, b1=0.5)
    same(jr.eval_params(changed, params), before)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (new, after), (other, unchanged) = (stepped(SGD, params, s, zeros) for s in (changed, state))
    close(jr.eval_params(after, new), jr.eval_params(unchanged, other))
    close(new, jax.tree.map(lambda x, z: 0.5 * x + 0.5 * z, jr.eval_params(after, new), after.z))


def test_the_weights_are_exact_after_many_updates():
    """In float32, a sum of 200,000 squares of 0.0025 would be off by more than a thousandth."""

    def body(carry, _):
        params, state = carry
        return SGD.apply({"w": jnp.zeros(())}, state, params), None

    start = {"w": jnp.zeros(())}
    (_, state), _ = quick_jit(lambda carry: jax.lax.scan(body, carry, length=200_000))((start, SGD.init(start)))
    assert state.weights == 200_000


def test_updates_of_rate_zero_are_in_no_average():
    rule = jr.schedule_free(jr.sgd(jr.Piecewise(1.0, {3: 0.0}) * -1.0 + 1.0))
    for params, state in run(rule, GRADS[:3]):
        same(params, PARAMS)
        same(jr.eval_params(state, params), PARAMS)
    params, state = run(rule, GRADS[:4])[-1]
    close(jr.eval_params(state, params), state.z)


def test_a_narrow_parameter_is_rounded_from_an_average_that_is_not():
    """1,000 updates whose average moves by less than bfloat16 can tell, against the same in float32."""
    start = {"w": jnp.full(4, 3.0)}
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start)
    rule = jr.schedule_free_sgd(1e-3)

    @quick_jit
    def train(params):
        def body(carry, _):
            params, state = carry
            return rule.apply({"w": jnp.ones(4)}, state, params), None

        return jax.lax.scan(body, (params, rule.init(params)), length=1000)[0]

    (params, state), (wide, wide_state) = train(narrow), train(start)
    assert wide_state.x == {"w": None}
    assert state.x["w"].dtype == state.z["w"].dtype == jnp.float32
    # The mean of z = 3 − t / 1000, but for a thousand roundings of z to float32.
    for x in (state.x, jr.eval_params(wide_state, wide)):
        close(x, {"w": jnp.full(4, 2.4995)}, atol=1e-4)
    same(params, jax.tree.map(lambda p: p.astype(jnp.bfloat16), wide))
    chex.assert_trees_all_equal_shapes_and_dtypes(jr.eval_params(state, params), narrow)


@pytest.mark.parametrize(
    ("rule", "dtype", "slots"),
    [(SGD, jnp.float32, 1), (ADAMW, jnp.float32, 2), (SGD, jnp.bfloat16, 2), (ADAMW, jnp.bfloat16, 3)],
)
def test_memory(rule, dtype, slots):
    state = jax.eval_shape(rule.init, {"w": jax.ShapeDtypeStruct((10, 10), dtype)})
    assert sum(x.size * 4 for x in jax.tree.leaves(state) if x.ndim) == slots * 400


@pytest.mark.parametrize("by_pair", [False, True], ids=["apply", "pair"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("absent", [None, "frozen"])
def test_what_is_absent_stays_to_the_bit(absent, dtype, by_pair):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    rule = jr.schedule_free(jr.freeze(jr.adamw(0.1), "b")) if absent else ADAMW
    start, state = run(rule, GRADS[:4], params, by_pair=by_pair)[-1]
    new, after = run(rule, [GRADS[4] | ({} if absent else {"b": None})], start, state, by_pair=by_pair)[-1]
    same((new["b"], after.z["b"], after.x["b"]), (start["b"], state.z["b"], state.x["b"]))
    assert (new["w"] != start["w"]).any()


def groups(first, second):
    return jr.partition({"matrix": first, "rest": second}, {"matrix": "w"})


def test_in_groups_each_has_its_average():
    rule = groups(SGD, jr.schedule_free_adamw(0.3, 5))
    params, state = run(rule)[-1]
    alone = {key: run(member, [{key: g[key]} for g in GRADS], {key: PARAMS[key]})[-1]
             for key, member in (("w", SGD), ("b", jr.schedule_free_adamw(0.3, 5)))}  # fmt: skip
    expected = {key: jr.eval_params(s, p)[key] for key, (p, s) in alone.items()}
    close(jr.eval_params(state, params), expected)


def test_around_groups_one_rate_is_named():
    inside = groups(jr.sgd(0.1), jr.adamw(0.1))
    with pytest.raises(ValueError, match=r"partition\(.*has 2 hyperparameters learning_rate.*schedule_free\(rule, lea"):
        jr.schedule_free(inside).init(PARAMS)
    params, state = run(jr.schedule_free(inside, 0.1))[-1]
    first = run(SGD)[-1]
    close(jr.eval_params(state, params)["w"], jr.eval_params(first[1], first[0])["w"])


def test_accumulate_makes_one_update_of_several_calls():
    params, state = run(jr.accumulate(ADAMW, 3), [g for g in GRADS[:5] for _ in range(3)])[-1]
    expected = run(ADAMW, GRADS[:5])[-1]
    close(jr.eval_params(state, params), jr.eval_params(expected[1], expected[0]))


def test_a_step_that_is_skipped_changes_nothing():
    rule = jr.skip_nonfinite(ADAMW)
    params, state = run(rule, GRADS[:3])[-1]
    new, after = run(rule, [jax.tree.map(lambda g: g * jnp.nan, GRADS[3])], params, state)[-1]
    same((new, after.inner), (params, state.inner))


def test_around_it_average_is_of_y_and_comes_first():
    passed = run(jr.average(SGD, None))
    mean = jax.tree.map(lambda *p: sum(p) / STEPS, *[params for params, _ in passed])
    params, state = passed[-1]
    close(jr.eval_params(state, params), mean)


def test_clipping_in_front_is_that_inside():
    clip, adamw = jr.clip_by_global_norm(0.5), jr.adamw(0.1)
    front = run(jr.chain(clip, jr.schedule_free(adamw)))[-1]
    inside = run(jr.schedule_free(jr.chain(clip, adamw)))[-1]
    close(jr.eval_params(front[1], front[0]), jr.eval_params(inside[1], inside[0]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_stateful_layer_evaluates_with_x(dtype):
    def model():
        return Bag({name: jr.Parameter(jnp.array(p, dtype)) for name, p in PARAMS.items()})

    def train(opt, one, grads):
        for g in grads:
            for name, parameter in one.params().items():
                parameter.grad = g[name].astype(dtype)
            opt.update(one)

    first, opt = model(), jr.Optimizer(ADAMW, donate=True)
    train(opt, first, GRADS[:5])
    grads = [jax.tree.map(lambda g: g.astype(dtype), g) for g in GRADS]
    params, state = run(ADAMW, grads[:5], {name: p.astype(dtype) for name, p in PARAMS.items()})[-1]
    tolerance = float(2 * jnp.finfo(dtype).eps)
    trained = {name: p.data for name, p in first.params().items()}
    with opt.evaluating(first):
        inside = {name: p.data for name, p in first.params().items()}
    chex.assert_trees_all_close(inside, jr.eval_params(state, params), rtol=tolerance, atol=tolerance)
    same({name: p.data for name, p in first.params().items()}, trained)
    # What is saved and loaded goes on alike.
    second, other = model(), jr.Optimizer(ADAMW)
    for name, parameter in second.params().items():
        parameter.data = jnp.array(first.params()[name].data)
    other.load_state_dict(second, opt.state_dict(first))
    train(opt, first, GRADS[5:8])
    train(other, second, GRADS[5:8])
    with opt.evaluating(first), other.evaluating(second):
        for name, parameter in first.params().items():
            same(parameter.data, second.params()[name].data)


@pytest.mark.parametrize("rule", [SGD, ADAMW], ids=repr)
def test_eval_params_stay_valid_when_state_and_parameters_are_donated(rule):
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), PARAMS)
        params, state = run(rule, GRADS[:2], params)[-1]
        kept = jr.eval_params(state, params)
        jax.jit(lambda params, state: rule.apply(params, state, params), donate_argnums=(0, 1))(params, state)
        assert not any(x.is_deleted() for x in jax.tree.leaves(kept))


def test_a_rate_that_is_set_is_the_one_of_the_weights():
    params, state = run(ADAMW, GRADS[:3])[-1]
    state = jr.set_hyperparams(state, learning_rate=0.2)
    _, state = run(ADAMW, GRADS[3:4], params, state)[-1]
    np.testing.assert_allclose(state.peak, 0.2)
    # Σα² in units of 0.2²: three times a quarter, and one.
    np.testing.assert_allclose(state.weights, 1.75, rtol=1e-6)


# SAM


def loss(params, scale=1.0):
    return scale * sum(jnp.sum(jnp.cosh(p)) for p in jax.tree.leaves(params))


def test_value_fn_and_grad_fn_are_the_same_with_and_without_aux():
    results = [
        jr.sam(SGD_RULE, 0.3, has_aux=aux).apply(GRADS[0], jr.sam(SGD_RULE, 0.3).init(PARAMS), PARAMS, **{name: given})
        for name, given, aux in [
            ("value_fn", loss, False),
            ("value_fn", lambda params: (loss(params), "aux"), True),
            ("grad_fn", jax.grad(loss), False),
            ("grad_fn", lambda params: (jax.grad(loss)(params), "aux"), True),
        ]
    ]
    for result in results[1:]:
        close(result, results[0])


SGD_RULE = jr.sgd(0.1)


def test_the_perturbation_has_length_rho_and_is_recorded():
    seen = []

    def grad_fn(params):
        seen.append(params)
        return params

    rule = jr.sam(SGD_RULE, 0.3)
    _, state = rule.apply(GRADS[0], rule.init(PARAMS), PARAMS, grad_fn=grad_fn)
    moved = jax.tree.map(jnp.subtract, seen[0], PARAMS)
    np.testing.assert_allclose(jr.global_norm(moved), 0.3, rtol=1e-5)
    np.testing.assert_allclose(jr.metrics(state)["perturbed_norm"], jr.global_norm(GRADS[0]), rtol=1e-6)


def test_under_jit_the_function_holds_traced_arrays_and_is_differentiated_there():
    rule = jr.sam(jr.chain(jr.clip_by_global_norm(0.1), jr.adamw(0.1)), 0.3, adaptive=True)

    def step(params, state, scale):
        grads = jax.grad(loss)(params, scale)
        return rule.apply(grads, state, params, value_fn=lambda params: loss(params, scale))

    compiled = quick_jit(step, donate_argnums=(0, 1))
    eager = here = (PARAMS, rule.init(PARAMS))
    here = jax.tree.map(jnp.array, here)
    for scale in (1.0, 0.5):
        eager, here = step(*eager, scale), compiled(*here, scale)
    close(here, eager)


def test_a_hook_in_front_acts_on_the_perturbation_alone_and_one_inside_on_the_step():
    clip = jr.clip_by_global_norm(1e-3)
    results = [
        rule.update(GRADS[0], rule.init(PARAMS), PARAMS, value_fn=loss)[0]
        for rule in (jr.sam(SGD_RULE), jr.chain(clip, jr.sam(SGD_RULE)), jr.sam(jr.chain(clip, SGD_RULE)))
    ]
    close(results[1], results[0])
    np.testing.assert_allclose(jr.global_norm(results[2]), 0.1 * 1e-3, rtol=1e-3)


def test_what_has_no_gradient_is_neither_perturbed_nor_trained():
    seen = []

    def grad_fn(params):
        seen.append(params)
        return params

    rule = jr.sam(SGD_RULE, 0.3)
    grads = GRADS[0] | {"b": None}
    for given in ({"grad_fn": grad_fn}, {"value_fn": loss}):
        params, state = rule.apply(grads, rule.init(PARAMS), PARAMS, **given)
        assert params["b"] is PARAMS["b"]
        np.testing.assert_allclose(jr.metrics(state)["perturbed_norm"], jr.global_norm(grads["w"]), rtol=1e-6)
    assert seen[0]["b"] is PARAMS["b"]


def test_the_rule_inside_is_handed_the_second_gradient_as_grad_and_the_value_as_it_is():
    handed = []

    def update(grads, state, params=None, *, value, grad):
        handed.append((grads, grad, value))
        return grads, state

    rule = jr.sam(jr.Rule(lambda params: (), update))
    rule.update(GRADS[0], rule.init(PARAMS), PARAMS, value=3.0, grad=GRADS[0], grad_fn=lambda params: GRADS[1])
    ((grads, grad, value),) = handed
    same((grads, grad), (GRADS[1], GRADS[1]))
    assert value == 3.0


def test_of_micro_batches_each_has_its_second_gradient():
    rule = jr.sam(jr.accumulate(SGD_RULE, 2), 0.3)
    plain = jr.sam(jr.sgd(0.05), 0.3)
    params, state = PARAMS, rule.init(PARAMS)
    expected = PARAMS
    for g in GRADS[:2]:
        params, state = rule.apply(g, state, params, value_fn=loss)
        moved, _ = plain.apply(g, plain.init(PARAMS), PARAMS, value_fn=loss)
        expected = jax.tree.map(lambda e, m, p: e + m - p, expected, moved, PARAMS)
    close(params, expected)
    with pytest.raises(ValueError, match="stands behind"):
        jr.chain(rule, jr.project(jnp.abs))


def test_the_gradient_of_a_complex_parameter_points_to_where_the_loss_rises():
    params = {"w": jnp.array([1 + 2j, -1j], jnp.complex64)}
    rule = jr.sam(SGD_RULE, 0.0)

    def squares(params):
        return jnp.sum(jnp.abs(params["w"]) ** 2) / 2

    new, _ = rule.apply(params, rule.init(params), params, value_fn=squares)
    close(new, {"w": 0.9 * params["w"]})


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jr.schedule_free(SGD_RULE, b1=0.0), "b1 must be greater than 0, where the parameters are z alone"),
        (lambda: jr.schedule_free(SGD_RULE, b1=1.0), r"b1 must lie in \[0, 1\), not 1.0"),
        (lambda: jr.schedule_free(SGD_RULE, weight_lr_power=-1.0), "weight_lr_power must be at least 0, not -1.0"),
        (lambda: jr.schedule_free(jr.adam_direction()), "schedule_free wraps a whole optimizer"),
        (lambda: jr.schedule_free(jr.accumulate(SGD_RULE, 2)), r"may do nothing.*accumulate\(schedule_free\(rule\)"),
        (lambda: jr.schedule_free_sgd(1.0, -1), "schedule_free_sgd: warmup_steps must be an integer >= 0, not -1"),
        (lambda: jr.schedule_free_adamw(1.0, 0.9), "schedule_free_adamw: warmup_steps must be an integer .* not 0.9"),
        (lambda: jr.schedule_free_adamw(jr.Linear(1.0, 9), 3), r"warmup_steps is for a learning rate that is a number"),
        (lambda: jr.sam(SGD_RULE, -0.1), "rho must be at least 0, not -0.1"),
        (lambda: jr.sam(jr.adam_direction()), "sam wraps a whole optimizer"),
    ],
)  # fmt: skip
def test_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_without_a_rate_is_refused_at_birth():
    foreign = jr.Rule(lambda params: (), lambda grads, state, params=None: (grads, state))
    with pytest.raises(ValueError, match="has no hyperparameters learning_rate, and the weights of the average follow"):
        jr.schedule_free(foreign).init(PARAMS)


def test_what_update_lacks_is_named():
    with pytest.raises(TypeError, match=r"ScheduleFree needs the parameters: update\(grads, state, params\)"):
        SGD.update(GRADS[0], SGD.init(PARAMS))
    with pytest.raises(ValueError, match=r"the state has no z for 'b'.*init again"):
        SGD.update(GRADS[0], SGD.init(PARAMS | {"b": None}), PARAMS)
    rule = jr.sam(SGD_RULE)
    with pytest.raises(TypeError, match=r"Sam needs the parameters: update\(grads, state, params, value_fn"):
        rule.update(GRADS[0], rule.init(PARAMS), value_fn=loss)
    with pytest.raises(TypeError, match="Sam needs value_fn, from parameters to the loss, or grad_fn"):
        rule.update(GRADS[0], rule.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="what grad_fn gives must be a tree like the gradients, but it lacks 'b'"):
        rule.update(GRADS[0], rule.init(PARAMS), PARAMS, grad_fn=lambda params: {"w": params["w"]})


def test_a_decay_relative_to_the_peak_knows_it_behind_a_warm_up():
    rule = jr.schedule_free_sgd(0.1, 5, weight_decay=0.01, decay="independent")
    np.testing.assert_allclose(jr.hyperparams(rule.init(PARAMS))["peak"], 0.1)
