"""`explain`: the table of who gets what, before anything is allocated."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import ROWS

import jaxopt_rules as jr
from jaxopt_rules.tables import Table

PARAMS = {
    "blocks": [{"bias": jnp.zeros(3), "w": jnp.ones((3, 3))}, {"bias": jnp.zeros(3), "w": jnp.ones((3, 3))}],
    "embed": {"w": jnp.ones((5, 3))},
    "head": jnp.ones(3),
}
ALL = ["blocks/0/bias", "blocks/0/w", "blocks/1/bias", "blocks/1/w", "embed/w", "head"]


def column(table: Table, name: str) -> dict[str, Any]:
    return {row.leaf: getattr(row, name) for row in table.rows}


def of(rule: jr.Rule, name: str, params: Any = PARAMS) -> list[Any]:
    return list(column(jr.explain(rule, params), name).values())


RULE = jr.chain(
    jr.clip_by_global_norm(1.0),
    jr.partition(
        {"matrix": jr.sgd(0.02, momentum=0.95), "rest": jr.adamw(3e-4, where=jr.excluding("**/bias"))},
        by={"matrix": "blocks/*/w"},
    ),
    jr.scale_by_path({"embed/**": 0.1}),
)
TEXT = """\
leaf           shape   dtype    group   decay        rate  slots           bytes
-------------  ------  -------  ------  -----------  ----  --------------  -----
blocks/0/bias  (3,)    float32  rest                    1  adam.m, adam.v   24 B
blocks/0/w     (3, 3)  float32  matrix                  1  velocity.v       36 B
blocks/1/bias  (3,)    float32  rest                    1  adam.m, adam.v   24 B
blocks/1/w     (3, 3)  float32  matrix                  1  velocity.v       36 B
embed/w        (5, 3)  float32  rest    0.01 (Step)   0.1  adam.m, adam.v  120 B
head           (3,)    float32  rest    0.01 (Step)     1  adam.m, adam.v   24 B"""


def test_text():
    assert str(jr.explain(RULE, PARAMS)) == TEXT


def test_html():
    html = jr.explain(RULE, PARAMS)._repr_html_()
    assert html.count("<tr>") == 1 + len(ALL)
    assert ">embed/w</td>" in html
    assert "120&nbsp;B" in html


def test_rows_are_plain_values():
    row = jr.explain(RULE, PARAMS).rows[4]
    assert row._asdict() == {
        "leaf": "embed/w",
        "shape": "(5, 3)",
        "dtype": "float32",
        "group": "rest",
        "decay": "0.01 (Step)",
        "rate": 0.1,
        "slots": "adam.m, adam.v",
        "bytes": 120,
    }
    assert {type(value) for value in row} == {str, float, int}


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(jr.explain(RULE, PARAMS).rows).set_index("leaf")
    assert list(frame.index) == ALL
    assert frame.bytes.sum() == 264
    assert set(frame.group) == {"matrix", "rest"}
    assert (frame.rate.dtype, frame.bytes.dtype) == (float, int)


def test_shapes_alone_give_the_same():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert str(jr.explain(RULE, shapes)) == TEXT


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        jr.accumulate(jr.skip_nonfinite(jr.average(jr.lookahead(RULE))), 4),
        jr.freeze(jr.adamw(decay="initial"), "head"),
        jr.average(jr.adamw(), window=8),
    ],
    ids=repr,
)
def test_nothing_is_allocated(rule):
    """These parameters would take terabytes."""
    huge = jax.tree.map(lambda p: jax.ShapeDtypeStruct((10**6, 10**6, *p.shape), p.dtype), PARAMS)
    table = jr.explain(rule, huge)
    small = jr.explain(rule, PARAMS)
    # A flag for each parameter stays one byte.
    assert [row.bytes // 10**12 for row in table.rows] == [4 * (row.bytes // 4) for row in small.rows]


@pytest.mark.parametrize("params", [PARAMS, jax.eval_shape(lambda: PARAMS)], ids=["arrays", "shapes"])
def test_no_array_stays_behind(params):
    before = {id(x) for x in jax.live_arrays()}
    table = jr.explain(RULE, params)
    assert [x for x in jax.live_arrays() if id(x) not in before and x.ndim] == []
    assert len(table.rows) == len(ALL)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_bytes_are_those_of_the_state(row):
    """All that a state keeps under the keys of the parameters is a slot of one of them."""
    params = {"b": jnp.ones(3, jnp.bfloat16), "w": jnp.ones((2, 3)), "x": {"y": jnp.ones((4, 4))}}
    rule = row.make()
    keys = {jax.tree_util.DictKey(key) for key in params}
    leaves = jax.tree_util.tree_leaves_with_path(rule.init(params))
    assert sum(of(rule, "bytes", params)) == sum(x.nbytes for path, x in leaves if keys & set(path))


@pytest.mark.parametrize(
    ("rule", "slots"),
    [
        (jr.sgd(0.1), ""),
        (jr.adamw(decay="initial"), "adam.m, adam.v, initial_step.start"),
        (jr.accumulate(jr.sgd(0.1), 2), "accumulate.seen, accumulate.mean"),
        (jr.average(jr.sgd(0.1, 0.9)), "average.average, velocity.v"),
        (jr.average(jr.sgd(0.1), window=4), "window.recent"),
        (jr.lookahead(jr.sgd(0.1)), "lookahead.slow"),
        (jr.skip_nonfinite(jr.adam()), "adam.m, adam.v"),
        (jr.skip_spikes(jr.adam()), "adam.m, adam.v"),
        (jr.when(jr.adam(), lambda count: count > 3), "adam.m, adam.v"),
        (jr.chain(jr.cautious(jr.momentum_direction()), jr.step(0.1)), "velocity.v"),
        (jr.chain(jr.masked(jr.ema(0.9), "**"), jr.adam()), "ema.m, adam.m, adam.v"),
        (jr.chain(jr.add_noise(0.1), jr.sgd(0.1), jr.reduce_on_plateau()), ""),
    ],
    ids=repr,
)
@pytest.mark.parametrize("params", [{"w": jnp.ones((2, 3))}, jnp.ones((2, 3))], ids=["dict", "array"])
def test_slots(rule, slots, params):
    assert of(rule, "slots", params) == [slots]


@pytest.mark.parametrize(
    ("rule", "decay"),
    [
        (jr.adamw(weight_decay=0.5), ["0.5 (Step)"] * 6),
        (jr.adamw(weight_decay=0.5, bias_correction="step"), ["0.5 (Adam)"] * 6),
        (jr.adam(), [""] * 6),
        (jr.adamw(weight_decay=0.5, decay="l2"), ["0.5 (WeightDecay)"] * 6),
        (jr.adamw(weight_decay=0.5, where=jr.matrices), ["", "0.5 (Step)", "", "0.5 (Step)", "0.5 (Step)", ""]),
        (
            jr.chain(jr.weight_decay(0.25), jr.adamw(weight_decay=0.5, where="embed/*")),
            [*["0.25 (WeightDecay)"] * 4, "0.25 (WeightDecay), 0.5 (Step)", "0.25 (WeightDecay)"],
        ),
        (jr.accumulate(jr.average(jr.adamw(weight_decay=0.5, where="head")), 2), ["", "", "", "", "", "0.5 (Step)"]),
        (jr.chain(jr.masked(jr.weight_decay(0.5), "head"), jr.sgd(0.1)), ["", "", "", "", "", "0.5 (WeightDecay)"]),
        (jr.freeze(jr.adamw(weight_decay=0.5), "blocks/**"), ["", "", "", "", "0.5 (Step)", "0.5 (Step)"]),
        (
            jr.chain(jr.weight_decay(0.25), jr.freeze(jr.adamw(weight_decay=0.5), ["blocks/**", "embed/*"])),
            ["", "", "", "", "", "0.25 (WeightDecay), 0.5 (Step)"],
        ),
        (
            jr.chain(jr.freeze(jr.clip_grad(1.0), ["blocks/**", "embed/*"]), jr.adamw(weight_decay=0.5)),
            ["", "", "", "", "", "0.5 (Step)"],
        ),
        (
            jr.partition({"x": jr.adamw(weight_decay=0.5), "y": jr.adamw(weight_decay=0.25)}, {"x": "**/w"}),
            ["0.25 (Step)", "0.5 (Step)", "0.25 (Step)", "0.5 (Step)", "0.5 (Step)", "0.25 (Step)"],
        ),
    ],
    ids=repr,
)
def test_decay(rule, decay):
    assert of(rule, "decay") == decay


def two(by: Any) -> jr.Rule:
    return jr.partition({"x": jr.sgd(0.1), "y": jr.sgd(0.1)}, by)


@pytest.mark.parametrize(
    ("rule", "groups"),
    [
        (jr.adamw(), [""] * 6),
        (two({"x": "**/w"}), ["y", "x", "y", "x", "x", "y"]),
        (two(lambda path, p: "x" if path == "head" else "y"), ["y"] * 5 + ["x"]),
        (
            jr.partition({"blocks": two({"x": jr.matrices}), "rest": jr.sgd(0.1)}, {"blocks": "blocks/**"}),
            ["blocks/y", "blocks/x", "blocks/y", "blocks/x", "rest", "rest"],
        ),
        (jr.freeze(jr.adamw(), "blocks/**"), ["frozen"] * 4 + ["", ""]),
        (
            jr.partition({"blocks": jr.freeze(jr.adamw(), "**/w"), "rest": jr.sgd(0.1)}, {"blocks": "blocks/**"}),
            ["blocks", "blocks/frozen", "blocks", "blocks/frozen", "rest", "rest"],
        ),
        (jr.accumulate(jr.freeze(two({"x": "embed/*"}), "blocks/**"), 2), ["frozen"] * 4 + ["x", "y"]),
        (jr.chain(jr.masked(jr.clip_grad(1.0), "head"), jr.sgd(0.1)), [""] * 6),
    ],
    ids=repr,
)
def test_groups(rule, groups):
    assert of(rule, "group") == groups


def halved(count):
    return 0.5 / (count + 1)


@pytest.mark.parametrize(
    ("rule", "rates"),
    [
        (jr.sgd(0.1), [1, 1, 1, 1, 1, 1]),
        (jr.chain(jr.sgd(0.1), jr.scale_by_path({"blocks/0/*": 0.5, "head": 2.0})), [0.5, 0.5, 1, 1, 1, 2]),
        (jr.chain(jr.sgd(0.1), jr.scale_by_path({"head": halved})), [1, 1, 1, 1, 1, 0.5]),
        (
            jr.chain(jr.sgd(0.1), jr.layerwise_decay(0.5, ["embed/*", "blocks/0/*", "blocks/1/*", "head"])),
            [0.25, 0.25, 0.5, 0.5, 0.125, 1],
        ),
        (
            jr.chain(jr.sgd(0.1), jr.scale_by_path({"head": 3.0}), jr.scale_by_path({"**": 0.5})),
            [0.5, 0.5, 0.5, 0.5, 0.5, 1.5],
        ),
        (
            jr.partition(
                {"x": jr.chain(jr.sgd(0.1), jr.scale_by_path({"blocks/0/w": 4.0})), "y": jr.sgd(0.1)}, {"x": "**/w"}
            ),
            [1, 4, 1, 1, 1, 1],
        ),
        (jr.freeze(jr.chain(jr.sgd(0.1), jr.scale_by_path({"head": 2.0})), "embed/*"), [1, 1, 1, 1, 0, 2]),
    ],
    ids=repr,
)
def test_rates(rule, rates):
    found = of(rule, "rate")
    np.testing.assert_allclose(found, rates)
    assert all(type(rate) is float for rate in found)


def test_leaves_that_take_no_part():
    others = {"f": jnp.tanh, "key": jax.random.key(0), "n": jnp.arange(3), "none": None, "rate": 0.5}
    table = jr.explain(jr.adamw(), others | {"w": jnp.ones(2)})
    assert column(table, "group") == {"f": "absent", "key": "absent", "n": "absent", "rate": "absent", "w": ""}
    assert column(table, "dtype") == {
        "f": type(jnp.tanh).__name__,
        "key": "key<fry>",
        "n": "int32",
        "rate": "float",
        "w": "float32",
    }
    assert column(table, "shape") == {"f": "", "key": "()", "n": "(3,)", "rate": "", "w": "(2,)"}
    assert column(table, "rate") == {"f": "", "key": "", "n": "", "rate": "", "w": 1.0}
    assert column(table, "bytes") == {"f": 0, "key": 0, "n": 0, "rate": 0, "w": 16}


def test_precision_shows_in_the_bytes():
    params = {str(jnp.dtype(d)): jnp.ones(4, d) for d in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64)}
    found = column(jr.explain(jr.adam(), params), "bytes")
    assert found == {"bfloat16": 32, "float16": 32, "float32": 32, "complex64": 48}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "bias"], meta_fields=[])
@dataclass
class Linear:
    w: Any
    bias: Any


@pytest.mark.parametrize(
    "params", [[Linear(jnp.ones((2, 2)), jnp.ones(2))], {"0": {"w": jnp.ones((2, 2)), "bias": 0.0}}]
)
def test_models_of_all_kinds(params):
    assert column(jr.explain(jr.adamw(where="*/w"), params), "decay") == {"0/w": "0.01 (Step)", "0/bias": ""}


def test_an_empty_model():
    table = jr.explain(jr.adamw(), {})
    assert table.rows == []
    assert str(table).split() == [
        "leaf",
        "shape",
        "dtype",
        "group",
        "decay",
        "rate",
        "slots",
        "bytes",
        *map("-".__mul__, (4, 5, 5, 5, 5, 4, 5, 5)),
    ]


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (jr.adamw(where="**/kernel"), ValueError, r"the pattern '\*\*/kernel' matches none of 'blocks/0/bias'"),
        (two({"x": "**/w", "y": ["**/bias"]}), ValueError, "'head' belongs to none of the groups 'x', 'y'"),
        (two({"x": "**/w", "y": jr.excluding("head")}), ValueError, "'blocks/0/w' belongs to two groups"),
        (jr.freeze(jr.adamw(), "**/kernel"), ValueError, "matches none of"),
        (jr.chain(jr.sgd(0.1), jr.scale_by_path({"**/kernel": 0.5})), ValueError, "matches none of"),
        pytest.param(jr.adamw, TypeError, "explain takes rules, .*was it meant to be called", id="not_called"),
        ("adamw", TypeError, "explain takes rules, .* not 'adamw'"),
    ],
)
def test_refused(rule, error, message):
    with pytest.raises(error, match=message):
        jr.explain(rule, PARAMS)


def test_pairs_from_elsewhere_are_passed_over():
    pair = jr.Rule(lambda params: {"m": params}, lambda grads, state, params=None: (grads, state))
    table = jr.explain(jr.chain(pair, jr.adamw(weight_decay=0.5)), PARAMS)
    assert set(column(table, "slots").values()) == {"adam.m, adam.v"}
