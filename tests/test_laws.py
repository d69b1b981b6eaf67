"""The laws of the library, each over every row of the table, on a tree of all dtypes.

    1 one sign        3 absent is None    5 precision    8 no aliases        10 one compiled update
    2 one clock       4 fixed point       6 locality     9 abstract birth

(7, nothing unseen, is checked where a rule is built: test_rule.py.) What has to be compiled is compiled once for a
row: a `Probe` runs one program that holds all of it, and the tests read its results.
"""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from table import ROWS as TABLE
from table import Row

import jaxopt_rules as jr
from jaxopt_rules.numerics import widened

ROWS = [row for row in TABLE if row.laws]


# Rows of one group run in one worker, which then probes each row once.
def over(table: list[Row], both: bool = True) -> pytest.MarkDecorator:
    """Over these rows, in one or in both of the modes of conftest.py."""
    group, thorough = pytest.mark.xdist_group, pytest.mark.thorough
    params = [pytest.param(row, id=row.name, marks=[group(row.name), *[thorough][: row.thorough]]) for row in table]
    wide = [
        pytest.param(row, id=f"{row.name}-x64", marks=[group(row.name), thorough, pytest.mark.x64]) for row in table
    ]
    return pytest.mark.parametrize("row", params + wide if both else params)


rows = over(ROWS)
terminal_rows = over([row for row in ROWS if row.rate is not None])
living_rows = over([row for row in ROWS if row.live is not None])
leafwise_rows = over([row for row in ROWS if row.leafwise])
rows_once = over(ROWS, both=False)
aligned_rows_once = over([row for row in ROWS if row.aligned], both=False)
STEPS = 3
PLAIN, HALF, ABOVE, BELOW, ZERO, CONSTANT = range(6)  # the runs of a probe
H = 1e-3  # of the finite differences, relative


def among_x64() -> bool:
    return bool(jax.config.read("jax_enable_x64"))


def dtypes() -> list[Any]:
    """The widest, then the narrower ones that are of interest beside it."""
    return [jnp.float64, jnp.float32] if among_x64() else [jnp.float32, jnp.bfloat16, jnp.float16]


def parameters(dtype: Any = None) -> dict[str, Any]:
    """Of several shapes in the widest dtype, and of one shape in all others; or all in this dtype."""
    rng = np.random.default_rng(0)
    widest, *others = dtypes()
    shapes = {"w": (3, 2), "u": (3, 2), "s": (), "empty": (0, 2)} | {jnp.dtype(x).name: (3, 2) for x in others}
    of = dict(zip(list(shapes)[4:], others, strict=True))
    return {key: jnp.asarray(rng.normal(size=x), dtype or of.get(key, widest)) for key, x in shapes.items()}


def gradients() -> dict[str, Any]:
    """STEPS of them, stacked, each in the dtype of its parameter."""
    rng = np.random.default_rng(1)
    return {key: jnp.asarray(rng.normal(size=(STEPS, *p.shape)), p.dtype) for key, p in parameters().items()}


def eps(x: Any) -> float:
    return float(jnp.finfo(x.dtype).eps) if jnp.issubdtype(x.dtype, jnp.inexact) else 0.0


def assert_close(actual: Any, expected: Any, roundings: int, like: Any = None) -> None:
    """That the two differ by some roundings at most: each leaf's own, or those of the parameter with its key."""
    chex.assert_trees_all_equal_structs(actual, expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, x), y in pairs:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in (like or {})]
        tolerance = roundings * max(eps(x), eps(like[keys[0]]) if keys else 0.0)
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), tolerance, tolerance, err_msg=str(path)
        )


def updated(row: Row, rule: jr.Rule, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    return rule.update(grads, state, params, **row.extra)


def applied(row: Row, rule: jr.Rule, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """One step by `apply`; by the pair, of what gives no update and cannot be applied."""
    if row.rate is not None:
        return rule.apply(grads, state, params, **row.extra)
    updates, state = updated(row, rule, grads, state, params)
    return jr.apply_updates(params, updates), state


def opened(tree: Any) -> Any:
    """The tree with the data of its PRNG keys in their place, which can be compared like any array."""

    def data(x: Any) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(data, tree)


class Probe:
    """What one compiled program tells about a row."""

    def __init__(self, row: Row) -> None:
        rule = row.make()
        params, grads = parameters(), gradients()
        in_runs = [key for key in params if key != "u"]  # the second of equal shape and dtype tells nothing there
        state = rule.init(params)
        # Half of it, so that a decay rate near 1 leaves room for a difference above.
        value = jnp.ones(()) if row.live is None else jr.hyperparams(state)[row.live] / 2
        update = partial(updated, row, rule)

        def living(state, value):
            return state if row.live is None else jr.set_hyperparams(state, **{row.live: value})

        def body(carry, g):
            params, state = carry
            updates, state = update(g, state, params)
            return (jr.apply_updates(params, updates), state), updates

        def acted(grads, state, params):
            """The first update in which a rule acts that acts in every k-th call: (updates, state)."""
            for _ in range(row.every):
                updates, state = update(grads, state, params)
            return updates, state

        def applied_until_acted(grads, state, params):
            for _ in range(row.every):
                params, state = applied(row, rule, grads, state, params)
            return params, state

        def program(params, state, born, parts, grads, value):
            first = jax.tree.map(lambda g: g[0], grads)
            start = {key: params[key] for key in in_runs}
            grads = {key: grads[key] for key in in_runs}
            zeros = jax.tree.map(jnp.zeros_like, grads)
            constant = jax.tree.map(lambda g: jnp.broadcast_to(g[:1], g.shape), grads)
            values = value * jnp.array([1, 0.5, 1 + H, 1 - H, 1, 1], value.dtype)
            sequences = [grads, grads, grads, grads, zeros, constant]
            # Finite differences of what is rounded to a narrower dtype tell nothing.
            weights = jnp.array([0, 1, 0, 0, 1, 1], value.dtype)
            cases = values, jax.tree.map(lambda *g: jnp.stack(g), *sequences), weights

            def run(case):
                """STEPS updates in a scan, with the live hyperparameter at a value: (params, state, updates)."""
                value, grads, _ = case
                (end, last), updates = jax.lax.scan(body, (start, living(born, value)), grads)
                return end, opened(last), updates

            def total(value, grads, weight):
                facts = run((value, grads, weight))
                squares = {key: jnp.sum(jnp.square(u)) for key, u in facts[2].items() if u is not None}
                widest = params["w"].dtype
                return sum(x if params[key].dtype == widest else weight * x for key, x in squares.items()), facts

            (totals, runs), slopes = jax.lax.map(lambda case: jax.value_and_grad(total, has_aux=True)(*case), cases)
            return {
                "runs": runs,
                "totals": totals,
                "slopes": slopes,
                "vmapped": jax.vmap(run)(cases),
                "updated": opened(acted(first | {"w": None}, state, params)),
                "applied": opened(applied_until_acted(first | {"w": None}, state, params)),
                "alone": {key: acted({key: first[key]}, parts[key], {key: params[key]})[0][key] for key in first},
                "together": acted(first, state, params)[0],
            }

        self.params, self.grads, self.state, self.value = params, grads, state, value
        born = rule.init({key: params[key] for key in in_runs})
        parts = {key: rule.init({key: p}) for key, p in params.items()}
        facts = quick_jit(program)(params, state, born, parts, grads, value)
        self.runs, self.totals, self.slopes = facts["runs"], facts["totals"], facts["slopes"]
        self.vmapped, self.updated, self.applied = facts["vmapped"], facts["updated"], facts["applied"]
        self.alone, self.together = facts["alone"], facts["together"]

    def run(self, case: int) -> tuple[Any, Any, Any]:
        return jax.tree.map(lambda x: x[case], self.runs)


PROBES: dict[str, Probe] = {}  # by name: rows with a dict do not hash


def probe(row: Row) -> Probe:
    if row.name not in PROBES:
        PROBES[row.name] = Probe(row)
    return PROBES[row.name]


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()


def counts(state: Any) -> list[int]:
    return [int(x) for path, x in jax.tree_util.tree_leaves_with_path(state) if ".count" in jax.tree_util.keystr(path)]


def of_w(state: Any) -> list[Any]:
    """What a state holds for the parameter `w`."""
    return [x for path, x in jax.tree_util.tree_leaves_with_path(state) if jax.tree_util.DictKey("w") in path]


def finite(tree: Any) -> bool:
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


@aligned_rows_once
def test_1_one_sign(row):
    updates = probe(row).run(CONSTANT)[2]
    grads = gradients()
    product = sum(float(jnp.sum(u * grads[key][0])) for key, u in updates.items())
    assert product < 0 if row.rate else product > 0


@rows
def test_2_one_clock(row):
    facts = probe(row)
    assert set(counts(facts.state)) <= {0}
    # Of a rule that acts in every k-th call, some clocks tell calls and others how often it has acted.
    assert set(counts(facts.run(PLAIN)[1])) <= {STEPS, STEPS // row.every}
    assert set(counts(facts.updated[1])) <= {row.every, 1}


@rows
def test_3_a_missing_gradient_changes_nothing(row):
    facts = probe(row)
    updates, state = facts.updated
    # What acts in every k-th call cannot tell in its structure: there, the update is −0.
    assert updates["w"] is None or (row.every > 1 and not np.any(updates["w"]))
    assert all(u is not None for key, u in updates.items() if key != "w")
    np.testing.assert_array_equal(facts.applied[0]["w"], facts.params["w"])
    chex.assert_trees_all_equal(of_w(opened(facts.state)), of_w(state))


@rows_once
def test_3_leaves_that_are_no_inexact_arrays_are_absent(row):
    rule = row.make()
    others = {"n": jnp.arange(3), "f": jnp.tanh, "none": None, "key": jax.random.key(0), "rate": 0.5}
    params = {"w": jnp.ones((2, 2)), **others}
    float0 = np.zeros(3, jax.dtypes.float0)
    grads = {"w": jnp.ones((2, 2)), "n": float0, "f": None, "none": None, "key": None, "rate": None}
    state = rule.init(params)
    updates, after = updated(row, rule, grads, state, params)
    assert {key for key, u in updates.items() if u is not None} == {"w"}
    assert jax.tree.structure(after) == jax.tree.structure(state)
    new, _ = applied(row, rule, grads, state, params)
    assert {key: new[key] for key in others} == others


@rows
def test_4_fixed_point(row):
    rule, params = row.make(), parameters()
    state = rule.init(params)
    for dtype in dtypes():
        grads = parameters(dtype)
        _, after = jax.eval_shape(partial(updated, row, rule), grads, state, params)
        new, also = jax.eval_shape(partial(applied, row, rule), grads, state, params)
        for result in (after, also):
            chex.assert_trees_all_equal_structs(state, result)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, result)
            assert not any(x.weak_type for x in jax.tree.leaves(result))
        chex.assert_trees_all_equal_shapes_and_dtypes(params, new)


@rows_once
def test_4_scalars_live_on_the_mesh_of_the_parameters(row):
    rule = row.make()
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    over_x, everywhere = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    params = {"w": jax.device_put(jnp.ones((4, 2)), over_x), "b": jax.device_put(jnp.ones(3), everywhere)}
    state = rule.init(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        like_w = jax.tree_util.DictKey("w") in path and leaf.shape == params["w"].shape
        placed = leaf.sharding.is_equivalent_to(over_x if like_w else everywhere, leaf.ndim)
        # What is of `w` in another shape, such as the sums of its rows, may be anywhere on the mesh, but stays there.
        of_another_shape = jax.tree_util.DictKey("w") in path and leaf.ndim and not like_w
        assert placed or of_another_shape, path
    born = jax.tree.map(lambda x: x.sharding, state)

    def stays(state: Any) -> bool:
        return jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, born))

    apply = quick_jit(chex.assert_max_traces(lambda p, s: applied(row, rule, p, s, p), n=1))
    params, state = apply(params, state)
    params, state = apply(params, state)
    assert stays(state)
    assert stays(quick_jit(rule.init, out_shardings=born)(params))


@rows
def test_5_slots_are_float32_or_wider(row):
    facts = probe(row)
    for path, leaf in jax.tree_util.tree_leaves_with_path((facts.state, facts.together)):
        of = [facts.params[key.key] for key in path if getattr(key, "key", None) in facts.params]
        wide = widened(of[0].dtype) if of else jnp.float32
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert leaf.dtype == jnp.promote_types(leaf.dtype, wide)


@rows
def test_5_a_zero_gradient_makes_no_nan(row):
    facts = probe(row)
    assert finite(facts.run(ZERO))
    assert finite(facts.slopes)


@living_rows
def test_5_slope_of_a_live_value_is_that_of_finite_differences(row):
    facts = probe(row)
    tolerance = 1e-5 if among_x64() else 2e-2
    difference = (facts.totals[ABOVE] - facts.totals[BELOW]) / (2 * H * facts.value)
    noise = tolerance * facts.totals[PLAIN] / facts.value
    np.testing.assert_allclose(facts.slopes[PLAIN], difference, rtol=tolerance, atol=noise)


@leafwise_rows
def test_6_locality(row):
    facts = probe(row)
    # A few roundings may differ: XLA fuses what several leaves share into other kernels than what one has alone.
    assert_close(facts.alone, facts.together, 8)


@rows_once
def test_8_no_two_leaves_share_a_buffer(row):
    params = parameters()
    leaves = [x for x in jax.tree.leaves(opened((params, row.make().init(params)))) if x.size]
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


@rows
def test_9_abstract_birth(row):
    rule, params = row.make(), parameters()
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    state = rule.init(params)
    abstract = jax.eval_shape(rule.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    assert not any(x.weak_type for x in jax.tree.leaves(abstract))
    zeros = jax.tree.map(jnp.zeros_like, params)
    chex.assert_trees_all_equal(opened(rule.init(zeros)), opened(rule.init(shapes)))


@aligned_rows_once
def test_10_one_compiled_update(row):
    """Values change without a retrace, parameters and state are donated, and a `None` pattern is traced once."""
    rule = row.make()
    facts = probe(row)

    @partial(quick_jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=2)
    def apply(params, state, grads):
        return applied(row, rule, grads, state, params)

    first = jax.tree.map(lambda g: g[0], facts.grads)
    params, state = jax.tree.map(jnp.array, (facts.params, facts.state))
    names = [name for name in jr.hyperparams(state) if name not in scheduled(facts.state)]
    for value in (0.5, 0.25):
        for grads in (first, first | {"w": None}):
            given = (params, state)
            params, state = apply(params, state, grads)
            assert all(x.is_deleted() for x in jax.tree.leaves(given) if x.ndim and x.size)
            state = jr.set_hyperparams(state, **dict.fromkeys(names, value))
            for name in names:
                assert jr.hyperparams(state)[name] == value


def scheduled(state: Any) -> set[str]:
    """The hyperparameters that cannot be set."""
    owned = set()
    for name in jr.hyperparams(state):
        try:
            jr.set_hyperparams(state, **{name: 0.5})
        except ValueError:
            owned.add(name)
    return owned


@terminal_rows
def test_pair_and_apply_give_the_same(row):
    facts = probe(row)
    updates, state = facts.updated
    # XLA contracts the last product of the fused form into the sum with the parameter: one rounding less.
    pair = jr.apply_updates(facts.params, updates), state
    assert_close(facts.applied, pair, 2, like=facts.params)


@living_rows
def test_vmap_over_a_live_value_equals_separate_runs(row):
    facts = probe(row)
    # One rounding may differ: compiled for six values at once, XLA contracts other products into sums.
    assert_close(facts.vmapped, facts.runs, 8, like=facts.params)
    assert row.rate is None or not np.array_equal(facts.run(PLAIN)[2]["w"], facts.run(HALF)[2]["w"])
