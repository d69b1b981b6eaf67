"""Rules that may decide to do nothing, `microbatch`, and what holds for every rule around rules."""

import pickle
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_shipped, quick_jit, stepped
from reference import core as ref
from table import wrappers as table_of_wrappers
from table.row import ADAM, WARMUP_COSINE, each, warmup_cosine

import jaxopt_rules as jr
from jaxopt_rules.rules.adam import AdamState

NAN = float("nan")


def tree(rng: np.random.Generator, *lead: int) -> dict[str, Any]:
    return {"w": jnp.asarray(rng.normal(size=(*lead, 3, 2))), "b": jnp.asarray(rng.normal(size=(*lead, 2)))}


PARAMS = tree(np.random.default_rng(0))
GRADS = [tree(np.random.default_rng(seed)) for seed in range(1, 13)]
BAD = jax.tree.map(lambda g: g.at[0].set(NAN), GRADS[0])


def run(rule: jr.Rule, grads: list[Any], params: Any = PARAMS, state: Any = None, **extra: Any) -> tuple[Any, Any]:
    """(parameters, state) behind one `apply` for each of these gradients."""
    state = rule.init(params) if state is None else state
    for g in grads:
        params, state = stepped(rule, params, state, g, **extra)
    return params, state


def mean(*grads: Any) -> Any:
    return jax.tree.map(lambda *g: sum(g) / len(g), *grads)


def all_finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


close = partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-6)
same = chex.assert_trees_all_equal


# Every rule around rules


class Way(NamedTuple):
    """How calls of a step are made: (step, params, state, gradients, stacked) -> (params, state)."""

    name: str
    call: Any


def in_python(step, params, state, grads):
    for i in range(len(grads["w"])):
        params, state = step(params, state, jax.tree.map(lambda g, i=i: g[i], grads))
    return params, state


def in_scan(step, params, state, grads):
    return jax.lax.scan(lambda carry, g: (step(*carry, g), None), (params, state), grads)[0]


def donated(step, params, state, grads):
    params, state = jax.tree.map(jnp.array, (params, state))
    return in_python(jax.jit(step, donate_argnums=(0, 1)), params, state, grads)


def donated_between_eager_steps(step, params, state, grads):
    """What an eager step returns shares no buffer, so that the next step can have all of it."""
    compiled = jax.jit(step, donate_argnums=(0, 1))
    for i in range(len(grads["w"])):
        call = compiled if i % 2 else step
        params, state = call(*jax.tree.map(jnp.array, (params, state)) if i == 0 else (params, state), at(grads, i))
    return params, state


def at(grads, i):
    return jax.tree.map(lambda g: g[i], grads)


WAYS = [
    Way("jit", lambda step, *args: in_python(quick_jit(step), *args)),
    Way("scan", lambda *args: quick_jit(partial(in_scan, args[0]))(*args[1:])),
    Way("donated", donated),
    Way("eager_then_donated", donated_between_eager_steps),
]
WRAPPERS = table_of_wrappers.ROWS
wrappers = pytest.mark.parametrize("row", WRAPPERS, ids=lambda row: row.name)


def step_of(row, rule, by_pair=False):
    extra = row.extra

    def step(params, state, g):
        if row.rate is not None and not by_pair:
            return rule.apply(g, state, params, **extra)
        updates, state = rule.update(g, state, params, **extra)
        return jr.apply_updates(params, updates), state

    return step


STACKED = jax.tree.map(lambda *g: jnp.stack(g), *GRADS[:7])


@wrappers
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_way_of_running_gives_what_python_gives(row, way):
    rule = row.make()
    start = PARAMS, rule.init(PARAMS)
    close(way.call(step_of(row, rule), *start, STACKED), in_python(step_of(row, rule), *start, STACKED))


@wrappers
def test_the_pair_gives_what_apply_gives(row):
    rule = row.make()
    start = PARAMS, rule.init(PARAMS)
    pair = quick_jit(step_of(row, rule, by_pair=True))
    close(in_python(pair, *start, STACKED), in_python(quick_jit(step_of(row, rule)), *start, STACKED))


@wrappers
def test_lanes_of_vmap_are_separate_runs(row):
    rule = row.make()
    lanes = [GRADS[:6], GRADS[6:]]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *[jax.tree.map(lambda *g: jnp.stack(g), *lane) for lane in lanes])
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    state = jax.vmap(rule.init)(params)
    ends = quick_jit(jax.vmap(partial(in_scan, step_of(row, rule))))(params, state, stacked)
    for i in range(2):
        alone = in_python(quick_jit(step_of(row, rule)), at(params, i), rule.init(at(params, i)), at(stacked, i))
        close(at(ends, i), alone)


@wrappers
def test_a_misspelt_extra_argument_raises_and_lists_the_accepted(row):
    rule = row.make()
    with pytest.raises(TypeError, match=r"does not take valeu; the extra arguments it accepts are grad, .*value_fn"):
        rule.update(PARAMS, rule.init(PARAMS), PARAMS, valeu=1.0, **row.extra)


class CountState(NamedTuple):
    count: Any
    hyper: Any


def _noisy(g, *, noise):
    return noise * g


NOISY = jr.leafwise(_noisy, CountState, extra=("noise",))
NOISY_SGD = jr.chain(NOISY, jr.sgd(1.0))


def always(count, *, noise):
    return noise > 0


def in_box(x):
    return x.clip(-1, 1)


FORWARDING = [
    jr.chain(rest=NOISY_SGD),
    jr.accumulate(NOISY_SGD, 1),
    jr.skip_nonfinite(NOISY_SGD),
    jr.skip_spikes(NOISY_SGD, 8),
    jr.when(NOISY_SGD, always),
    jr.chain(jr.when(NOISY, always), jr.sgd(1.0)),
    jr.lookahead(NOISY_SGD, 2),
    jr.average(NOISY_SGD),
    jr.average(NOISY_SGD, window=2),
    jr.partition({"a": NOISY_SGD, "b": jr.chain(NOISY_SGD)}, by={"a": "w"}),
    jr.freeze(NOISY_SGD, "b"),
    jr.chain(jr.masked(NOISY, "w"), jr.sgd(1.0)),
    jr.chain(jr.cautious(NOISY), jr.sgd(1.0)),
    jr.chain(NOISY_SGD, jr.project(jnp.asarray)),
    jr.chain(NOISY_SGD, jr.record("norm", jr.global_norm)),
    jr.skip_nonfinite(jr.accumulate(jr.average(jr.lookahead(jr.chain(NOISY_SGD), 2)), 1)),
]
forwarding = pytest.mark.parametrize("rule", FORWARDING, ids=repr)


@forwarding
@pytest.mark.parametrize("call", ["update", "apply"])
def test_extra_arguments_go_through_to_what_asks_for_them(rule, call):
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    result, _ = getattr(rule, call)(ones, rule.init(PARAMS), PARAMS, noise=jnp.array(3.0), loss=1.0)
    start = PARAMS["w"] if call == "apply" else 0
    np.testing.assert_allclose(result["w"], start - 3.0, rtol=1e-6)


@forwarding
def test_what_is_asked_for_inside_is_among_the_accepted(rule):
    with pytest.raises(TypeError, match=r"does not take nois; .* grad, loss, noise, value, value_fn"):
        rule.update(PARAMS, rule.init(PARAMS), PARAMS, nois=1.0)


@forwarding
def test_what_is_asked_for_inside_and_missing_is_named(rule):
    with pytest.raises(TypeError, match=r"needs noise: update\(grads, state, params, noise=...\)"):
        rule.update(PARAMS, rule.init(PARAMS), PARAMS)


DIRECTION = jr.adam_direction()
GATES = [
    jr.accumulate(jr.sgd(0.1), 2),
    jr.skip_nonfinite(jr.sgd(0.1)),
    jr.skip_spikes(jr.sgd(0.1)),
    jr.when(jr.sgd(0.1), always),
]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rule: jr.accumulate(rule, 2),
        jr.skip_nonfinite,
        jr.skip_spikes,
        lambda rule: jr.when(rule, always),
        jr.lookahead,
        jr.average,
        lambda rule: jr.freeze(rule, "w"),
        lambda rule: jr.masked(rule, "w"),
        jr.cautious,
        lambda rule: jr.partition({"all": rule}, by={}),
    ],
)
@pytest.mark.parametrize("no_rule", [0.1, None, jr.adam])
def test_what_is_no_rule_is_refused(wrap, no_rule):
    with pytest.raises(TypeError, match=r"takes rules, pairs of functions \(init, update\), not"):
        wrap(no_rule)


@pytest.mark.parametrize(
    "wrap", [lambda rule: jr.accumulate(rule, 2), jr.skip_nonfinite, jr.skip_spikes, jr.lookahead, jr.average]
)
@pytest.mark.parametrize(
    "direction", [DIRECTION, jr.clip_by_global_norm(1.0), jr.chain(jr.clip_grad(1.0), DIRECTION), jr.identity()]
)
def test_what_gives_a_direction_is_refused(wrap, direction):
    with pytest.raises(ValueError, match=r"wraps a whole optimizer.* is a part of one"):
        wrap(direction)


@pytest.mark.parametrize("gate", GATES, ids=repr)
@pytest.mark.parametrize("wrap", [jr.lookahead, jr.average, partial(jr.average, window=2)])
@pytest.mark.parametrize("nest", [lambda rule: rule, jr.chain, lambda rule: jr.freeze(rule, "w")])
def test_a_gate_inside_an_average_is_refused(gate, wrap, nest):
    with pytest.raises(ValueError, match=r"may do nothing, while .* would count the call all the same"):
        wrap(nest(gate))


@pytest.mark.parametrize("gate", [*GATES, jr.chain(jr.clip_grad(1.0), GATES[0]), jr.freeze(GATES[0], "w")], ids=repr)
@pytest.mark.parametrize(
    "behind", [jr.sgd(0.1), jr.clip_grad(1.0), jr.record("norm", jr.global_norm), jr.project(jnp.abs)], ids=repr
)
def test_nothing_stands_behind_a_gate(gate, behind):
    with pytest.raises(ValueError, match=r"stands behind .* which may do nothing while this would still act"):
        jr.chain(gate, behind)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jr.accumulate(jr.sgd(0.1), 0), ValueError, "every must be a whole number, at least 1, not 0"),
        (lambda: jr.accumulate(jr.sgd(0.1), 1.5), ValueError, "every must be a whole number, at least 1, not 1.5"),
        (lambda: jr.accumulate(jr.sgd(0.1), 2, reduce="max"), ValueError, "reduce must be 'mean' or 'sum', not 'max'"),
        (lambda: jr.accumulate(jr.sgd(0.1), 2, nonfinite="raise"), ValueError, "nonfinite must be 'drop' or 'keep'"),
        (lambda: jr.skip_spikes(jr.sgd(0.1), 1), ValueError, "window must be an integer >= 2, not 1"),
        (lambda: jr.skip_spikes(jr.sgd(0.1), sigmas=-1.0), ValueError, "sigmas must be at least 0, not -1"),
        (lambda: jr.skip_spikes(jr.sgd(0.1), of="loss"), ValueError, 'of must be "grad_norm" or "value", not \'loss\''),
        (lambda: jr.when(jr.sgd(0.1), True), TypeError, "when takes a condition, a function of count, not True"),
        (lambda: jr.microbatch(jnp.sum, 0), ValueError, "k must be an integer >= 1, not 0"),
    ],
)
def test_rejected(make, error, message):
    with pytest.raises(error, match=message):
        make()


TEXTS = [
    (lambda: jr.accumulate(jr.adamw(0.1), 4), "accumulate(adamw(0.1), 4)"),
    (
        lambda: jr.accumulate(jr.sgd(0.1), jr.Constant(2), reduce="sum"),
        "accumulate(sgd(0.1), Constant(2), reduce='sum')",
    ),
    (lambda: jr.skip_nonfinite(jr.chain(jr.sgd(0.1))), "skip_nonfinite(chain(sgd(0.1)))"),
    (lambda: jr.skip_spikes(jr.sgd(0.1), 64, of="value"), "skip_spikes(sgd(0.1), 64, of='value')"),
    (lambda: jr.when(jr.sgd(0.1), always), "when(sgd(0.1), always)"),
    (lambda: jr.lookahead(jr.sgd(0.1), alpha=0.8), "lookahead(sgd(0.1), alpha=0.8)"),
    (lambda: jr.average(jr.sgd(0.1), None, start=3), "average(sgd(0.1), None, start=3)"),
    (lambda: jr.average(jr.sgd(0.1), window=3), "average(sgd(0.1), window=3)"),
    (lambda: jr.project(in_box, "w"), "project(in_box, 'w')"),
    (lambda: jr.reduce_on_plateau(0.5, patience=3), "reduce_on_plateau(0.5, patience=3)"),
    (lambda: jr.record("norm", jr.global_norm), "record('norm', global_norm)"),
    (lambda: jr.masked(jr.clip_grad(1.0), ["w"]), "masked(clip_by_global_norm(1.0), ('w',))"),
    (lambda: jr.cautious(jr.adam_direction()), "cautious(adam_direction())"),
    (
        lambda: jr.partition({"a": jr.sgd(0.1), "b": jr.adam()}, by={"a": "w"}),
        "partition({'a': sgd(0.1), 'b': adam()}, by={'a': 'w'})",
    ),
]
texts = pytest.mark.parametrize(("make", "text"), TEXTS, ids=[text for _, text in TEXTS])


@texts
def test_a_rule_prints_as_it_was_written(make, text):
    assert repr(make()) == text


@texts
def test_equal_arguments_make_equal_rules(make, text):
    assert make() == make()
    assert hash(make()) == hash(make())


@texts
def test_a_pickled_rule_is_the_rule(make, text):
    copy = pickle.loads(pickle.dumps(make()))
    assert copy == make()
    assert repr(copy) == text


def test_rules_with_other_arguments_are_others():
    assert jr.accumulate(jr.sgd(0.1), 2) != jr.accumulate(jr.sgd(0.1), 3)
    assert jr.accumulate(jr.sgd(0.1), 2) != jr.accumulate(jr.sgd(0.2), 2)
    assert jr.skip_spikes(jr.sgd(0.1)) == jr.skip_spikes(jr.sgd(0.1), 128, 6.0)


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (lambda every: jr.accumulate(jr.sgd(0.1), every), "every", (3, 2)),
        (lambda rate: jr.accumulate(jr.sgd(rate), 2), "learning_rate", (0.1, 0.2)),
        (lambda sigmas: jr.skip_spikes(jr.sgd(0.1), 4, sigmas), "sigmas", (6.0, 0.0)),
        (lambda every: jr.lookahead(jr.sgd(0.1), every), "every", (3, 2)),
        (lambda alpha: jr.lookahead(jr.sgd(0.1), 2, alpha), "alpha", (0.5, 0.8)),
        (lambda decay: jr.average(jr.sgd(0.1), decay), "decay", (0.9, 0.5)),
        (lambda rate: jr.skip_nonfinite(jr.average(jr.sgd(rate))), "learning_rate", (0.1, 0.2)),
    ],
)
def test_live_hyperparameters(make, name, values):
    """Set in the state, a value acts as if the rule had been made with it, and nothing is traced again."""
    before, after = values
    rule, traces = make(before), []

    @jax.jit
    def apply(params, state, g):
        traces.append(1)
        return rule.apply(g, state, params)

    def end(state):
        params = PARAMS
        for g in GRADS[:11]:
            params, state = apply(params, state, g)
        return jr.eval_params(state, params)

    unset, changed = rule.init(PARAMS), jr.set_hyperparams(rule.init(PARAMS), **{name: after})
    assert jr.hyperparams(changed)[name] == pytest.approx(after)
    other, state = run(make(after), GRADS[:11])
    close(end(changed), jr.eval_params(state, other))
    assert not np.allclose(end(unset)["w"], end(changed)["w"])
    assert len(traces) == 1


# Accumulation


def three_then_two(count):
    return jnp.where(count < 4, 3, 2)


@pytest.mark.x64
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize(
    ("every", "changed", "expected_every"),
    [(1, None, 1), (3, None, 3), (three_then_two, None, three_then_two), (3, (12, 2), three_then_two)],
    ids=["1", "3", "schedule", "changed live"],
)
@pytest.mark.parametrize("clip", ["inside", "in front"])
def test_accumulate_equals_the_rule_on_means_and_sums(reduce, every, changed, expected_every, clip):
    """In float64; schedules inside see finished updates."""
    adam = jr.adamw(WARMUP_COSINE, weight_decay=0.1)
    parts = ref.clip(2.0), each(ref.adam_direction, **ADAM)(), each(ref.step, warmup_cosine, 0.1)()
    joined = {"mean": np.mean, "sum": np.sum}[reduce]
    if clip == "inside":
        rule = jr.accumulate(jr.chain(jr.clip_by_global_norm(2.0), adam), every, reduce=reduce)
        reference = ref.accumulate(ref.chain(*parts), expected_every, joined)
    else:
        rule = jr.chain(jr.clip_by_global_norm(2.0), jr.accumulate(adam, every, reduce=reduce))
        reference = ref.chain(parts[0], ref.accumulate(ref.chain(*parts[1:]), expected_every, joined))
    next(reference)
    rng = np.random.default_rng(0)
    exact = {key: np.asarray(p) for key, p in tree(rng).items()}
    params, state = jax.tree.map(jnp.asarray, exact), rule.init(exact)
    apply = jax.jit(lambda params, state, g: rule.apply(g, state, params))
    for call in range(50):
        if changed is not None and call == changed[0]:
            state = jr.set_hyperparams(state, every=changed[1])
        g = {key: np.asarray(g) for key, g in tree(rng).items()}
        exact = {key: exact[key] + u for key, u in reference.send((g, exact)).items()}
        params, state = apply(params, state, jax.tree.map(jnp.asarray, g))
        chex.assert_trees_all_close(params, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("calls", "updates", "micro_step"), [(0, 0, 0), (2, 0, 2), (3, 1, 0), (7, 2, 1)])
def test_accumulate_counts_finished_updates(calls, updates, micro_step):
    _, state = run(jr.accumulate(jr.adam(0.1), 3), GRADS[:calls])
    assert state.count == updates
    assert state.inner[0].count == updates
    assert jr.metrics(state)["micro_step"] == micro_step


@pytest.mark.parametrize("calls", [1, 2, 4, 5])
def test_a_micro_step_changes_nothing_but_the_mean(calls):
    rule = jr.accumulate(jr.adamw(0.1), 3)
    finished = run(rule, GRADS[: calls - calls % 3])
    params, state = run(rule, GRADS[:calls])
    same((params, state.inner), (finished[0], finished[1].inner))


@pytest.mark.parametrize("how", ["update", "jit"])
def test_the_update_of_a_micro_step_is_minus_zero(how):
    rule = jr.accumulate(jr.adamw(0.1), 3)
    update = rule.update if how == "update" else jax.jit(rule.update)
    updates, _ = update(GRADS[0], rule.init(PARAMS), PARAMS)
    assert all((u == 0).all() and jnp.signbit(u).all() for u in jax.tree.leaves(updates))


SGD = jr.sgd(0.1)


def dropped(state):
    return int(jr.metrics(state)["dropped"])


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nonfinite_micro_batch_is_dropped(place, bad):
    grads = list(GRADS[:6])
    grads[place] = jax.tree.map(lambda g: g.at[-1].set(bad), grads[place])
    good = [g for i, g in enumerate(grads[:3]) if i != place]
    params, state = run(jr.accumulate(jr.adam(0.1), 3), grads)
    close(params, run(jr.adam(0.1), [mean(*good), mean(*grads[3:])])[0])
    assert dropped(state) == 1
    assert state.count == 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_sum_leaves_out_a_dropped_micro_batch(place):
    grads = [BAD if i == place else g for i, g in enumerate(GRADS[:3])]
    good = jax.tree.map(lambda *g: sum(g), *[g for g in grads if g is not BAD])
    close(run(jr.accumulate(SGD, 3, reduce="sum"), grads)[0], run(SGD, [good])[0])


def test_a_cycle_of_dropped_micro_batches_updates_nothing():
    rule = jr.accumulate(jr.adamw(jr.Warmup(jr.Constant(0.1), 5)), 2)
    start = run(rule, GRADS[:2])
    params, state = run(rule, [BAD, BAD], *start)
    same((params, state.inner, state.count), (start[0], start[1].inner, start[1].count))
    assert (dropped(state), int(jr.metrics(state)["micro_step"])) == (2, 0)
    after = run(rule, GRADS[2:4], params, state)
    same(after[0], run(rule, GRADS[2:4], *start)[0])


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_kept_nan_spoils_one_update_alone(place, reduce):
    rule = jr.accumulate(SGD, 3, nonfinite="keep", reduce=reduce)
    state, updates = rule.init(PARAMS), []
    for i, g in enumerate(GRADS[:6]):
        u, state = rule.update(BAD if i == place else g, state, PARAMS)
        updates.append(u)
    assert [all_finite(u) for u in updates] == [True, True, False, True, True, True]
    joined = mean(*GRADS[3:6]) if reduce == "mean" else jax.tree.map(lambda *g: sum(g), *GRADS[3:6])
    close(updates[5], jax.tree.map(lambda g: -0.1 * g, joined))
    assert dropped(state) == 0


@pytest.mark.parametrize(
    "dtype",
    [jnp.float16, jnp.bfloat16, pytest.param(jnp.float64, marks=pytest.mark.x64)],
    ids=["f16", "bf16", "f64"],
)
def test_gradients_of_another_dtype_are_averaged_in_the_precision_of_the_slots(dtype):
    params = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
    grads = [jax.tree.map(lambda g: g.astype(dtype), g) for g in GRADS[:6]]
    wide = [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in grads]
    rule = jr.accumulate(jr.adam(0.1), 3)
    narrow_run, wide_run = run(rule, grads, params), run(rule, wide, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(narrow_run, wide_run)
    close(narrow_run, wide_run)


def test_a_mean_of_float16_gradients_does_not_overflow():
    grads = [jax.tree.map(lambda p: jnp.full(p.shape, 40000, jnp.float16), PARAMS)] * 3
    rule = jr.accumulate(jr.sgd(1e-4), 3, reduce="sum")
    np.testing.assert_allclose(run(rule, grads)[0]["b"], PARAMS["b"] - 12, rtol=1e-5)


@pytest.mark.parametrize("nonfinite", ["drop", "keep"])
@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_a_missing_gradient_adds_nothing_to_the_mean(missing, nonfinite):
    grads = [g | {"b": None} if i in missing else g for i, g in enumerate(GRADS[:3])]
    zeros = [g | {"b": jnp.zeros(2)} if i in missing else g for i, g in enumerate(GRADS[:3])]
    rule = jr.accumulate(jr.adamw(0.1), 3, nonfinite=nonfinite)
    close(run(rule, grads), run(rule, zeros))


def of_b(state):
    return [x for path, x in jax.tree_util.tree_leaves_with_path(state) if jax.tree_util.DictKey("b") in path]


@pytest.mark.parametrize("nonfinite", ["drop", "keep"])
@pytest.mark.parametrize(
    "inner",
    [
        jr.adamw(0.1),
        jr.chain(jr.clip_grad(0.1), jr.adamw(0.1)),
        jr.average(jr.lookahead(jr.adamw(0.1), 2)),
        jr.partition({"one": jr.adamw(0.1), "two": jr.sgd(0.1, 0.9)}, by={"one": "w"}),
    ],
    ids=repr,
)
def test_a_parameter_without_a_gradient_in_the_whole_cycle_stays(inner, nonfinite):
    rule = jr.accumulate(inner, 3, nonfinite=nonfinite)
    start = run(rule, GRADS[:3])
    params, state = run(rule, [g | {"b": None} for g in GRADS[3:6]], *start)
    same(params["b"], start[0]["b"])
    same(of_b(state.inner), of_b(start[1].inner))
    assert (params["w"] != start[0]["w"]).all()
    without = run(rule, [{"w": g["w"], "b": jnp.zeros(2)} for g in GRADS[3:6]], *start)
    close(params["w"], without[0]["w"])


def test_a_parameter_that_was_in_a_dropped_micro_batch_alone_stays():
    rule = jr.accumulate(jr.adamw(0.1), 3)
    start = run(rule, GRADS[:3])
    params, _ = run(rule, [GRADS[3] | {"b": None}, BAD, GRADS[4] | {"b": None}], *start)
    same(params["b"], start[0]["b"])


def test_the_next_cycle_does_not_remember_who_had_a_gradient():
    rule = jr.accumulate(jr.adamw(0.1), 2)
    start = run(rule, [GRADS[0], GRADS[1], GRADS[2] | {"b": None}])
    params, _ = run(rule, [GRADS[3] | {"b": None}], *start)
    same(params["b"], start[0]["b"])


@pytest.mark.parametrize("call", ["update", "apply"])
def test_a_none_stands_for_a_part_of_the_tree(call):
    params = {"layer": dict(PARAMS), "out": jnp.ones(3)}
    full = {"layer": GRADS[0], "out": jnp.ones(3)}
    partly = {"layer": None, "out": jnp.ones(3)}
    rule = jr.accumulate(jr.adamw(0.1), 2)
    step = step_of(WRAPPERS[0], rule, by_pair=call == "update")

    def end(*grads):
        state, end = rule.init(params), params
        for g in grads:
            end, state = step(end, state, g)
        return end

    same(end(partly, partly)["layer"], params["layer"])
    close(end(full, partly), end(full, jax.tree.map(jnp.zeros_like, full) | {"out": jnp.ones(3)}))


def test_leaves_that_are_no_arrays_of_floats_pass():
    others = {"n": jnp.arange(3), "f": jnp.tanh, "none": None, "rate": 0.5}
    float0 = np.zeros(3, jax.dtypes.float0)
    rule = jr.accumulate(jr.adamw(0.1), 2)

    @jax.jit
    def step(arrays, state, g):
        grads = {"w": g, "n": float0, "f": None, "none": None, "rate": None}
        new, state = rule.apply(grads, state, others | {"w": arrays})
        assert {key: new[key] for key in others} == others
        return new["w"], state

    w, state = jnp.ones(3), rule.init(others | {"w": jnp.ones(3)})
    for _ in range(2):
        w, state = step(w, state, jnp.ones(3))
    np.testing.assert_allclose(w, 0.9 - 0.001, rtol=1e-5)


@pytest.mark.parametrize("call", ["update", "apply"])
def test_weakly_typed_parameters(call):
    rule, p = jr.accumulate(jr.sgd(0.1), 2), jnp.array(0.5)
    step = jax.jit(step_of(WRAPPERS[0], rule, by_pair=call == "update"))
    state = rule.init(p)
    for _ in range(4):
        p, state = step(p, state, jnp.float32(1.0))
    np.testing.assert_allclose(p, 0.3, rtol=1e-6)


@pytest.mark.parametrize("given", [PARAMS, None], ids=["with parameters", "without"])
def test_a_gradient_of_another_shape_is_refused(given):
    rule = jr.accumulate(SGD, 2)
    with pytest.raises(ValueError, match=r"the gradient at 'b' has shape \(1,\), its parameter has shape \(2,\)"):
        rule.update(GRADS[0] | {"b": jnp.ones(1)}, rule.init(PARAMS), given)


def test_a_gradient_whose_parameter_had_no_slot_is_refused():
    rule = jr.accumulate(SGD, 2)
    with pytest.raises(ValueError, match=r"Accumulate: the state has no mean for 'b'.*init again"):
        rule.update(PARAMS, rule.init(PARAMS | {"b": None}), PARAMS)


NEST = jr.adamw(0.1)


@pytest.mark.parametrize("nonfinite", ["drop", "keep"])
def test_accumulate_around_skip(nonfinite):
    """Skipping inside sees the mean: a NaN that is kept costs the update, one that is dropped does not."""
    rule = jr.accumulate(jr.skip_nonfinite(NEST), 2, nonfinite=nonfinite)
    params, state = run(rule, [GRADS[0], BAD, GRADS[1], GRADS[2]])
    clean = [mean(GRADS[1], GRADS[2])]
    close(params, run(NEST, clean if nonfinite == "keep" else [GRADS[0], *clean])[0])
    assert jr.metrics(state)["skipped"] == (nonfinite == "keep")


def test_skip_around_accumulate():
    """A skipped micro-batch is none: the cycle waits for the next."""
    params, state = run(jr.skip_nonfinite(jr.accumulate(NEST, 2)), [GRADS[0], BAD, BAD, GRADS[1], GRADS[2]])
    close(params, run(NEST, [mean(GRADS[0], GRADS[1])])[0])
    assert jr.metrics(state)["skipped"] == 2
    assert jr.metrics(state)["micro_step"] == 1


def test_accumulate_around_average():
    rule = jr.accumulate(jr.average(NEST, None), 2)
    params, state = run(rule, GRADS[:5])
    plain = jr.average(NEST, None)
    expected, plain_state = run(plain, [mean(*GRADS[:2]), mean(*GRADS[2:4])])
    close(params, expected)
    close(jr.eval_params(state, params), jr.eval_params(plain_state, expected))


def test_accumulate_in_one_group():
    rule = jr.partition({"slow": jr.accumulate(NEST, 2), "fast": SGD}, by={"slow": "w"})
    params, _ = run(rule, GRADS[:4])
    close(params["w"], run(NEST, [mean(*GRADS[:2]), mean(*GRADS[2:4])])[0]["w"])
    close(params["b"], run(SGD, GRADS[:4])[0]["b"])


# Steps that are not taken

SCHEDULED = jr.adamw(jr.Warmup(jr.Cosine(0.1, 9), 3))


@pytest.mark.parametrize(
    "rule",
    [
        jr.skip_nonfinite(SCHEDULED),
        jr.skip_spikes(SCHEDULED, 4),
        jr.skip_nonfinite(jr.average(SCHEDULED, window=2)),
        jr.skip_nonfinite(jr.lookahead(SCHEDULED, 2)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("times", [1, 7])
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_a_step_with_nonfinite_gradients_leaves_no_trace(rule, times, bad):
    start = run(rule, GRADS[:3])
    spoilt = jax.tree.map(lambda g: g.at[-1].set(bad), GRADS[3])
    params, state = run(rule, [spoilt] * times, *start)
    same((params, state.inner, state.count), (start[0], start[1].inner, start[1].count))
    same(run(rule, GRADS[3:6], params, state)[0], run(rule, GRADS[3:6], *start)[0])


@pytest.mark.parametrize("rule", [jr.skip_nonfinite(SGD), jr.skip_spikes(SGD)], ids=repr)
def test_what_skipping_records(rule):
    params, state = run(rule, [GRADS[0], BAD, GRADS[1], BAD, BAD])
    assert {key: int(x) for key, x in jr.metrics(state).items() if key in ("skipped", "in_a_row")} == {
        "skipped": 3,
        "in_a_row": 2,
    }
    assert jnp.isnan(jr.metrics(state)["grad_norm"])
    _, state = run(rule, [GRADS[2]], params, state)
    assert jr.metrics(state)["in_a_row"] == 0
    np.testing.assert_allclose(jr.metrics(state)["grad_norm"], jr.global_norm(GRADS[2]), rtol=1e-6)


def test_the_update_of_a_skipped_step_keeps_minus_zero():
    rule, params = jr.skip_nonfinite(SGD), {"w": jnp.array([-0.0, 1.0])}
    bad = {"w": jnp.array([NAN, 1.0])}
    updates, _ = rule.update(bad, rule.init(params), params)
    assert jnp.signbit(jr.apply_updates(params, updates)["w"]).tolist() == [True, False]


@pytest.mark.parametrize("call", ["update", "apply"])
@pytest.mark.parametrize("make", [jr.skip_nonfinite, lambda rule: jr.skip_spikes(rule, 4)])
def test_lanes_with_and_without_nan(make, call):
    rule = make(jr.adamw(0.1))
    step = step_of(WRAPPERS[0], rule, by_pair=call == "update")
    grads = jax.tree.map(lambda *g: jnp.stack(g), GRADS[0], BAD, GRADS[1])
    params = jax.tree.map(lambda p: jnp.stack([p] * 3), PARAMS)
    state = jax.vmap(rule.init)(params)
    new, after = jax.jit(jax.vmap(step))(params, state, grads)
    same((at(new, 1), at(after.inner, 1)), (PARAMS, rule.init(PARAMS).inner))
    for lane, g in ((0, GRADS[0]), (2, GRADS[1])):
        close(at(new, lane), run(jr.adamw(0.1), [g])[0])
    assert after.metrics["skipped"].tolist() == [0, 1, 0]


def spiky(steps: int = 120) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    sizes = np.where(rng.random(steps) < 0.1, 10 ** rng.uniform(0.5, 2, steps), 1)
    sizes[60:] *= 5  # a lasting change of level
    sizes[[20, 90]] = [NAN, np.inf]
    return [{"w": size * rng.normal(size=(3, 2)), "b": size * rng.normal(size=2)} for size in sizes]


@pytest.mark.parametrize("of", ["grad_norm", "value"])
@pytest.mark.parametrize(("window", "sigmas"), [(2, 1.0), (8, 2.0), (128, 6.0), (15, 0.0)])
def test_spikes_against_the_reference(of, window, sigmas):
    grads, rng = spiky(), np.random.default_rng(4)
    values = rng.normal(size=len(grads)) ** 5
    values[30] = NAN
    rule = jr.skip_spikes(jr.sgd(0.01, 0.9), window, sigmas, of=of)
    inner = ref.chain(each(ref.velocity, 0.9)(), each(ref.step, 0.01)())
    reference = ref.skip_spikes(inner, window, sigmas, iter(values) if of == "value" else None)
    next(reference)
    apply = jax.jit(rule.update)
    state, skipped, expected = rule.init(PARAMS), [], []
    for g, value in zip(grads, values, strict=True):
        updates, state = apply(jax.tree.map(jnp.asarray, g), state, PARAMS, value=value)
        out = reference.send((g, PARAMS))
        close(updates, jax.tree.map(jnp.asarray, out))
        skipped.append(not any((u != 0).any() for u in updates.values()))
        expected.append(not any((u != 0).any() for u in out.values()))
    assert skipped == expected
    assert jr.metrics(state)["skipped"] == sum(expected)
    assert sum(expected) > 2


def test_spikes_of_a_missing_value():
    rule = jr.skip_spikes(SGD, of="value")
    with pytest.raises(TypeError, match=r"Spike needs value: update\(grads, state, params, value=...\)"):
        rule.update(PARAMS, rule.init(PARAMS), PARAMS)


# Rules that act at times


def every_other(count):
    return count % 2 == 1


def below_two(count, *, value):
    return value < 2


def test_a_hook_that_does_not_act_passes_the_gradient():
    rule = jr.when(jr.clip_by_global_norm(0.1), every_other)
    passed, state = rule.update(GRADS[0], rule.init(PARAMS), PARAMS)
    same(passed, GRADS[0])
    clipped, _ = rule.update(GRADS[0], state, PARAMS)
    np.testing.assert_allclose(jr.global_norm(clipped), 0.1, rtol=1e-4)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_hook_at_times_passes_over_what_is_absent(wrap):
    rule = jr.when(jr.clip_by_global_norm(0.1), every_other)
    float0 = np.zeros(3, jax.dtypes.float0)
    params = {"w": jnp.ones(3), "n": jnp.arange(3), "b": jnp.ones(2)}

    def passed(w):
        return rule.update({"w": w, "n": float0, "b": None}, rule.init(params), params)[0]

    same(wrap(passed)(jnp.ones(3)), {"w": jnp.ones(3), "n": None, "b": None})


@pytest.mark.parametrize("call", ["update", "apply"])
def test_an_optimizer_that_does_not_act_changes_nothing(call):
    rule = jr.when(SCHEDULED, every_other)
    step = jax.jit(step_of(WRAPPERS[0], rule, by_pair=call == "update"))
    params, state = step(PARAMS, rule.init(PARAMS), GRADS[0])
    same((params, state.inner), (PARAMS, rule.init(PARAMS).inner))
    params, state = step(params, state, GRADS[1])
    close(params, run(SCHEDULED, [GRADS[1]])[0])


@pytest.mark.parametrize("call", ["update", "apply"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_what_stands_behind_the_terminal_passes_the_update_when_it_does_not_act(call, wrap):
    rule = jr.chain(SGD, jr.when(jr.project(jnp.zeros_like), every_other))
    step = wrap(step_of(WRAPPERS[0], rule, by_pair=call == "update"))
    params, state = step(PARAMS, rule.init(PARAMS), GRADS[0])
    close(params, run(SGD, GRADS[:1])[0])
    params, _ = step(params, state, GRADS[1])
    close(params, jax.tree.map(jnp.zeros_like, PARAMS))


def test_a_condition_may_ask_for_extra_arguments():
    rule = jr.when(SGD, below_two)
    same(run(rule, GRADS[:1], value=2.5)[0], PARAMS)
    close(run(rule, GRADS[:1], value=1.5)[0], run(SGD, GRADS[:1])[0])


def test_a_condition_whose_argument_is_missing():
    rule = jr.when(SGD, below_two)
    with pytest.raises(TypeError, match="When needs value"):
        rule.update(PARAMS, rule.init(PARAMS), PARAMS)


# The batch in parts


def loss_fn(params, x, y=0.0, *, scale=1.0):
    return scale * jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)


X, Y = jax.random.normal(jax.random.key(0), (12, 3)), jax.random.normal(jax.random.key(1), (12, 2))


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_microbatch_equals_the_whole_batch(k, wrap):
    close(wrap(jr.microbatch(loss_fn, k))(PARAMS, X, Y), jax.value_and_grad(loss_fn)(PARAMS, X, Y))


def test_microbatch_takes_a_batch_of_trees():
    def loss(params, batch):
        return loss_fn(params, batch["x"], batch["y"])

    batch = {"x": X, "y": Y, "none": None}
    close(jr.microbatch(loss, 4)(PARAMS, batch), jax.value_and_grad(loss)(PARAMS, batch))


def test_microbatch_hands_on_keywords_whole():
    actual = jr.microbatch(loss_fn, 4)(PARAMS, X, scale=jnp.array([3.0, 5.0])[0])
    close(actual, jax.value_and_grad(loss_fn)(PARAMS, X, scale=3.0))


def test_microbatch_stacks_aux():
    def loss(params, x, y):
        return loss_fn(params, x, y), {"x": x, "size": len(x)}

    (value, aux), grads = jr.microbatch(loss, 4, has_aux=True)(PARAMS, X, Y)
    close((value, grads), jax.value_and_grad(loss_fn)(PARAMS, X, Y))
    same(aux["x"].reshape(12, 3), X)
    assert aux["size"].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, Y[:10]), r"the array '1' of the batch has shape \(10, 2\), whose first axis is not divisible by 4"),
        ((X, 0.5), r"the array '1' of the batch has shape \(\), .*; pass what is no batch by keyword"),
    ],
)
def test_microbatch_names_what_cannot_be_split(batch, message):
    with pytest.raises(ValueError, match=message):
        jr.microbatch(loss_fn, 4)(PARAMS, *batch)


def test_microbatch_leaves_alone_what_is_no_array_of_floats():
    def loss(model, x, y):
        return jnp.mean((model["f"](x @ model["w"]) * model["n"] + model["rate"] - y) ** 2)

    model = {"w": PARAMS["w"], "f": jnp.tanh, "n": jnp.arange(2), "rate": 0.5, "none": None}
    _, grads = jr.microbatch(loss, 3)(model, X, Y)
    expected = jax.grad(lambda w: loss(model | {"w": w}, X, Y))(model["w"])
    close(grads, {"w": expected, "f": None, "n": None, "rate": None, "none": None})


def test_microbatch_sums_bfloat16_gradients_in_float32():
    """In bfloat16 a sum of 1024 equal numbers stops growing."""
    params = {"w": jnp.ones((), jnp.bfloat16)}
    value, grads = jr.microbatch(lambda params, x: jnp.mean(x * params["w"]), 1024)(params, jnp.full(1024, 0.75))
    assert (value, grads["w"], grads["w"].dtype) == (0.75, 0.75, jnp.bfloat16)


def test_microbatch_needs_less_memory():
    def loss(w, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2)

    def temporaries(function):
        program = as_shipped(function).lower(jnp.ones((64, 64)), jnp.ones((4096, 64))).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(jr.microbatch(loss, 8)) < temporaries(jax.value_and_grad(loss)) / 4


# Parameters that have no gradient


DECAYED = jr.chain(jr.weight_decay(1.0), jr.clip_by_global_norm(1.0), jr.sgd(1.0))


@pytest.mark.parametrize("params", [{"a": jnp.ones(2), "b": jnp.full(2, 10.0)}], ids=["two"])
def test_what_is_absent_in_a_whole_cycle_is_in_no_norm_inside(params):
    """Decay in front of a norm would bring it in, if the rule were handed a zero for it."""
    missing = {"a": jnp.ones(2), "b": None}
    plain, state = stepped(DECAYED, params, DECAYED.init(params), missing)
    gated = jr.accumulate(DECAYED, 1)
    accumulated, gate = stepped(gated, params, gated.init(params), missing)
    same(accumulated, plain)
    assert jr.metrics(gate)["grad_norm"] == jr.metrics(state)["grad_norm"]


def test_what_is_absent_beside_one_that_had_a_gradient_stays():
    """Two that have no gradient in the last call; one of them had one before, the other has none in the cycle."""
    rule = jr.accumulate(jr.adamw(0.1), 2)
    params = {key: jnp.ones(2) for key in "abc"}
    _, state = first = stepped(rule, params, rule.init(params), {"a": jnp.ones(2), "b": jnp.ones(2), "c": None})
    new, after = stepped(rule, *first, {"a": jnp.ones(2), "b": None, "c": None})
    same(new["c"], params["c"])
    adam, before = jr.find(after, AdamState), jr.find(state, AdamState)
    same((adam.m["c"], adam.v["c"]), (before.m["c"], before.v["c"]))
    assert jnp.all(new["b"] < params["b"])
    np.testing.assert_allclose(adam.m["b"], 0.05, rtol=1e-6)


def test_accumulation_does_not_nest():
    with pytest.raises(ValueError, match=r"accumulate: skip_nonfinite\(accumulate\(.*accumulates already"):
        jr.accumulate(jr.skip_nonfinite(jr.accumulate(jr.sgd(0.1), 2)), 2)


@pytest.mark.parametrize("tree", [lambda x: x, lambda x: {"w": x}], ids=["array", "dict"])
def test_memory_of_the_whole_rule_goes_on_where_no_parameter_has_a_gradient(tree):
    rule = jr.accumulate(jr.chain(jr.sgd(0.1), jr.reduce_on_plateau(0.5, patience=0)), 1)
    params = tree(jnp.ones(2))
    state = rule.init(params)
    for value in (1.0, 2.0, 3.0):
        params, state = rule.apply(tree(None), state, params, value=value)
    assert jr.metrics(state)["plateau_scale"] == 0.25


def test_what_an_eager_step_records_is_a_copy():
    loss = jnp.float32(3.0)
    rule = jr.skip_spikes(jr.sgd(0.1), 4, of="value")
    _, state = rule.apply(PARAMS, rule.init(PARAMS), PARAMS, value=loss)
    jax.jit(lambda state: state, donate_argnums=0)(state)
    assert not loss.is_deleted()
