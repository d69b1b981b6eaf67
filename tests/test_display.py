"""What a terminal and Jupyter show of rules, states, schedules, tables and optimizers."""

from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from IPython.lib.pretty import pretty
from table import ROWS

import jaxopt_rules as jr
from jaxopt_rules.display import state_html
from jaxopt_rules.state import hyperparameter_entries
from jaxopt_rules.tables import Table

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
MANY = {f"layers/{i}": {"w": jnp.ones((4, 3)), "b": jnp.zeros(3, jnp.bfloat16)} for i in range(20)}
SLOT = "{'b': f32[3], 'w': f32[4,3]}"
RATE = jr.Warmup(jr.Cosine(0.001, 900), 100)


class TigerState(NamedTuple):
    count: Any
    hyper: Any
    m: Any


def _tiger(g, m, *, one_minus_b1):
    m = m + one_minus_b1 * (g - m)
    return jnp.sign(m), (m,)


@jr.constructor
def tiger(learning_rate=1e-4, b1=0.965):
    return jr.descend(jr.leafwise(_tiger, TigerState, b1=b1), learning_rate)


class ScaleByState(NamedTuple):
    """As other libraries have them."""

    step: Any
    mu: Any


class NothingState(NamedTuple):
    pass


def of_another_library() -> jr.Rule:
    def init(params):
        return ScaleByState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)), NothingState()

    return jr.Rule(init, lambda grads, state, params=None: (grads, state))


class Reader(HTMLParser):
    """The rows of tables, cell by cell, and the text beside them; refuses tags that do not balance."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        assert tag in ("path", "polyline")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("div", "summary", "svg"):
            self.handle_data("\n")

    def handle_data(self, data):
        if "text" in self.open:  # of a drawing
            return
        self.text += data
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def cells(self) -> list[list[str]]:
        return [[cell.strip("\n").replace("\n\n", "\n") for cell in row] for row in self.rows]


# ---------------------------------------------------------------------------------------------------------------------
# Everything
# ---------------------------------------------------------------------------------------------------------------------


def hyperparameters_of(rule: jr.Rule) -> set[str]:
    definition = rule.update.definition if hasattr(rule.update, "definition") else None
    own = set() if definition is None else set(definition.hyperparameters)
    return own.union(*(hyperparameters_of(part) for _, part in definition.parts)) if definition else own


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_rule_shows_itself(row):
    rule = row.make()
    shown = Reader(rule._repr_html_())
    head, first, *_ = shown.cells
    assert head == ["rule", "place", "hyperparameters"]
    assert first[0] == repr(rule)
    assert all(f"{name} = " in shown.text for name in hyperparameters_of(rule))
    assert len(rule._repr_html_()) < 10_000


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_state_shows_itself(row):
    rule = row.make()
    state = jax.eval_shape(rule.init, PARAMS)
    shown = Reader(state_html(state))
    for text in (repr(state), shown.text):
        assert "ShapeDtypeStruct" not in text
        assert all(f"{name.split('.')[-1]}: f32[]" in text for name in hyperparameter_entries(state))
    size = jr.memory(state).total
    assert shown.cells[-1] == ["total", f"{size[2]} arrays", Reader(jr.memory(state)._repr_html_()).cells[-1][-1]]
    assert len(repr(state)) < 1200
    assert len(state_html(state)) < 12_000


# ---------------------------------------------------------------------------------------------------------------------
# States
# ---------------------------------------------------------------------------------------------------------------------

ADAM = f"AdamState(count=0, hyper={{b1: 0.9, b2: 0.999, eps: 1e-08}}, m={SLOT}, v={SLOT})"
STATES = {
    "adamw": (
        jr.adamw(0.001, weight_decay=0.1),
        f"({ADAM}, StepState(count=0, hyper={{learning_rate: 0.001, weight_decay: 0.1}}))",
    ),
    "chain": (
        jr.chain(clip=jr.clip_by_global_norm(1.0), rest=jr.sgd(RATE)),
        "{'clip': ClipState(count=0, hyper={max_norm: 1.0}, metrics={grad_norm: 0.0}), "
        "'rest': StepState(count=0, hyper={learning_rate: 0.0 (scheduled)})}",
    ),
    "partition": (
        jr.partition({"a": jr.muon(0.02), "b": jr.step(0.1)}, by={"a": "w"}),
        "{'a': (MuonState(count=0, hyper={beta: 0.95}, m={'b': None, 'w': f32[4,3]}), "
        "StepState(count=0, hyper={learning_rate: 0.02})), 'b': StepState(count=0, hyper={learning_rate: 0.1})}",
    ),
    "wrapped": (
        jr.accumulate(jr.skip_nonfinite(jr.average(jr.step(0.1))), 4),
        "AccumulateState(count=0, hyper={every: 4.0}, metrics={dropped: 0, micro_step: 0}, kept=0, "
        f"seen={{'b': False, 'w': False}}, mean={SLOT}, inner=SkipState(count=0, hyper={{}}, "
        "metrics={grad_norm: 0.0, in_a_row: 0, skipped: 0}, inner=AverageState(count=0, hyper={decay: 0.999}, "
        f"samples=0, weight=0.0, average={SLOT}, inner=StepState(count=0, hyper={{learning_rate: 0.1}}))))",
    ),
    "noise": (jr.add_noise(0.1, key=0), "AddNoiseState(count=0, hyper={eta: 0.1, gamma: 0.55}, key=key<fry>[])"),
    "of a user": (
        tiger(3e-4),
        f"(TigerState(count=0, hyper={{b1: 0.965}}, m={SLOT}), StepState(count=0, hyper={{learning_rate: 0.0003}}))",
    ),
    "of another library, wrapped": (
        jr.when(of_another_library(), lambda grads: True),
        f"WhenState(count=0, hyper={{}}, inner=(ScaleByState(step=0, mu={SLOT}), NothingState()))",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_the_text_of_a_state(name):
    rule, text = STATES[name]
    state = rule.init(PARAMS)
    assert repr(state) == text
    assert pretty(state, max_width=10_000) == text
    back = [line for row in Reader(state_html(state)).cells[1:-1] for line in row[1:2]]
    assert all(line in text for line in back)


def test_values_are_those_of_now():
    rule = jr.chain(jr.clip_by_global_norm(1.0), jr.sgd(jr.Piecewise(0.5, {1: 0.5})))
    state = rule.init(PARAMS)
    for _ in range(2):
        _, state = rule.update({"w": 2 * jnp.ones((4, 3)), "b": None}, state, PARAMS)
    assert repr(state[0]) == "ClipState(count=2, hyper={max_norm: 1.0}, metrics={grad_norm: 6.928203})"
    assert repr(state[1]) == "StepState(count=2, hyper={learning_rate: 0.25 (scheduled)})"
    state = jr.set_hyperparams(state, max_norm=float("inf"))
    assert "{max_norm: inf}" in repr(state)


def born(rate: Any) -> Any:
    return jr.adam_direction(b2=rate).init(PARAMS)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (jax.eval_shape(born, 0.5), f"count=i32[], hyper={{b1: f32[], b2: f32[], eps: f32[]}}, m={SLOT}"),
        (jax.vmap(born)(jnp.array([0.5, 0.75])), "count=[0, 0], hyper={b1: [0.9, 0.9], b2: [0.5, 0.75], eps: ["),
        (
            jax.vmap(born)(jnp.linspace(0.5, 0.75, 7)),
            "count=i32[7] of 0, hyper={b1: f32[7] of 0.9, b2: f32[7] from 0.5 to",
        ),
        (jax.vmap(jax.vmap(born))(jnp.array([[0.5], [0.75]])), "b2: f32[2,1] from 0.5 to 0.75, "),
        (jax.vmap(born)(jnp.zeros(0)), "b2: f32[0]"),
        (jax.tree.map(lambda x: 0, born(0.5)), "count=0, hyper={b1: 1.0, b2: 1.0, eps: 0}, m={'b': 0, 'w': 0}, "),
        (jax.tree.map(lambda x: True, born(0.5)), "hyper={b1: True, b2: True, eps: True}, m="),
        (jax.tree.map(lambda x: x.tolist(), born(0.5)), "count=0, hyper={b1: 0.9, b2: 0.5, eps: 1e-08}, m={'b': [0.0"),
        (born(0.5)._replace(hyper={"one_minus_b1": 0.25, "eps": 1e300}), "hyper={b1: 0.75, eps: 1e+300}, m="),
        (born(0.5)._replace(hyper={"one_minus_b1": np.int32(0), "eps": 1}), "hyper={b1: 1.0, eps: 1}, m="),
        (born(0.5)._replace(hyper=None), "count=0, hyper=None, m="),
        (born(0.5)._replace(m=None), "m=None, v={"),
        (born(0.5)._replace(m=[jnp.zeros(2, jnp.bfloat16), np.zeros(2, np.uint8), 1.5]), "m=[bf16[2], u8[2], 1.5], "),
        (born(0.5)._replace(m=(jnp.zeros((), jnp.complex64),)), "m=(0j,), "),
        (born(0.5)._replace(m=jnp.bfloat16(0.5)), "m=0.5, "),
        (born(0.5)._replace(m=jnp.zeros(2, jnp.float8_e4m3fn)), "m=f8_e4m3fn[2], "),
        (born(0.5)._replace(m=jnp.ones(3) > 0), "m=bool[3], "),
        (born(0.5)._replace(m=MANY), "m=<40 arrays of bf16 and f32, 300 numbers, 1.1 KiB>, "),
    ],
)
def test_what_stands_for_numbers(state, text):
    assert text in repr(state)
    assert Reader(state_html(state)).cells[0] == ["field", "value", "bytes"]


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donated_buffers_cannot_be_read():
    state = jax.device_put(born(0.5))
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert repr(state) == repr(jax.eval_shape(born, 0.5))
    assert Reader(state_html(state)).rows


def test_shards_are_one_array():
    mesh = jax.make_mesh((2,), ("x",))
    everywhere, split = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("x")))
    state = born(0.5)
    placed = jax.tree.map(lambda x: jax.device_put(x, split if x.shape == (4, 3) else everywhere), state)
    assert repr(placed) == repr(state)
    assert state_html(placed) == state_html(state)


@pytest.mark.parametrize("show", [repr, state_html])
def test_to_show_a_traced_state_computes_nothing(show):
    texts = []

    def looked_at(state):
        texts.append(show(state))
        return state

    assert not jax.make_jaxpr(looked_at)(born(0.5)).eqns
    assert texts == [show(jax.eval_shape(born, 0.5))]


def test_a_class_of_states_may_show_itself():
    class OwnState(NamedTuple):
        count: Any
        hyper: Any

        def __repr__(self):
            return "mine"

        def _repr_html_(self):
            return "<b>mine</b>"

    state = jr.leafwise(lambda g, *, rate: rate * g, OwnState, rate=0.5).init(PARAMS)
    assert repr(state) == "mine"
    assert state._repr_html_() == "<b>mine</b>"


def test_a_state_that_is_no_named_tuple_has_a_row():
    pair = jr.Rule(lambda params: {"mean": params}, lambda grads, state, params=None: (grads, state))
    state = jr.accumulate(jr.chain(pair, jr.step(0.5)), 2).init(PARAMS)
    assert [".inner[0]", "{'mean': {'w': f32[4,3], 'b': f32[3]}}", "60\xa0B"] in Reader(state_html(state)).cells
    assert Reader(state_html(())).cells[1:] == [["total", "0 arrays", "0\xa0B"]]


@jax.tree_util.register_pytree_with_keys_class
class Layer:
    """A node as other libraries have them."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ("w", "b")], None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)


def test_a_node_of_another_library_has_its_paths():
    state = jr.momentum_direction(0.5).init({"one": Layer(**PARAMS)})
    assert repr(state) == "VelocityState(count=0, hyper={momentum: 0.5}, v={'one': Layer(w=f32[4,3], b=f32[3])})"


def test_a_large_tree_is_listed_in_html_alone():
    state = jr.momentum_direction(0.5).init(MANY)
    text = "40 arrays of f32, 300 numbers, 1.2 KiB"
    assert repr(state) == f"VelocityState(count=0, hyper={{momentum: 0.5}}, v=<{text}>)"
    (row,) = [row for row in Reader(state_html(state)).cells if row[0] == "v"]
    summary, *lines = row[1].splitlines()
    assert summary == text
    assert lines[:2] == ["layers/0/b: f32[3]", "layers/0/w: f32[4,3]"]
    assert len(lines) == 40
    most = jr.momentum_direction(0.5).init([jnp.zeros(())] * 501)
    assert Reader(state_html(most)).cells[-2][1].endswith("499: 0.0\nand 1 more")


def test_html_says_where_a_state_stands():
    rule = jr.accumulate(jr.chain(jr.clip_by_value(1.0), rest=jr.chain(of_another_library(), jr.step(0.5))), 2)
    headings = [row[0] for row in Reader(state_html(rule.init(PARAMS))).cells if len(row) == 1]
    assert headings == [
        "AccumulateState ",
        "ClipByValueState .inner['0']",
        "ScaleByState .inner['rest'][0][0]",
        "NothingState .inner['rest'][0][1]",
        "StepState .inner['rest'][1]",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Rules and schedules
# ---------------------------------------------------------------------------------------------------------------------

COURSE = "learning_rate = Warmup(Cosine(0.001, 900), 100)\n0 → 0.001 at 100 → 0 at 1000"
RULES = {
    "one formula": (jr.clip_by_value(1.0), [["clip_by_value(1.0)", "front", "max_value = 1.0"]]),
    "optimizer": (
        jr.adamw(RATE, weight_decay=0.1),
        [
            ["adamw(Warmup(Cosine(0.001, 900), 100), weight_decay=0.1)", "end", ""],
            ["adam_direction()", "front", "b1 = 0.9\nb2 = 0.999\neps = 1e-08"],
            ["step(Warmup(Cosine(0.001, 900), 100), 0.1)", "end", COURSE + "\nweight_decay = 0.1"],
        ],
    ),
    "wrapped": (
        jr.accumulate(jr.skip_nonfinite(jr.average(jr.step(0.1), 0.99)), 4),
        [
            ["accumulate(skip_nonfinite(average(step(0.1), 0.99)), 4)", "end, gate", "every = 4"],
            ["skip_nonfinite(…)", "end, gate", ""],
            ["average(…, 0.99)", "end", "decay = 0.99"],
            ["step(0.1)", "end", "learning_rate = 0.1"],
        ],
    ),
    "groups": (
        jr.partition({"a": jr.chain(jr.sign(), jr.step(0.1)), "b": jr.step(0.2)}, by={"a": "<w>"}),
        [
            ["partition({'a': chain(sign(), step(0.1)), 'b': step(0.2)}, by={'a': '<w>'})", "end", ""],
            ["a: chain(…, …)", "end", ""],
            ["sign()", "front", ""],
            ["step(0.1)", "end", "learning_rate = 0.1"],
            ["b: step(0.2)", "end", "learning_rate = 0.2"],
        ],
    ),
    "of a user": (
        tiger(b1=0.9),
        [
            ["tiger(b1=0.9)", "end", ""],
            ["leafwise(_tiger, TigerState, b1=0.9)", "front", "b1 = 0.9"],
            ["step(0.0001)", "end", "learning_rate = 0.0001"],
        ],
    ),
    "of another library": (
        jr.chain(theirs=jr.Rule(dict.copy, dict.update), end=jr.step(abs)),
        [
            [
                "chain(theirs=Rule(init=<method 'copy' of 'dict' objects>, update=<method 'update' of 'dict' objects>)"
                ", end=step(abs))",
                "end",
                "",
            ],
            ["theirs: (dict.copy, dict.update)", "", ""],
            ["end: step(abs)", "end", "learning_rate = abs"],
        ],
    ),
    "pair": (jr.Rule(dict.copy, dict.update), [["(dict.copy, dict.update)", "", ""]]),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rows_of_a_rule(name):
    rule, rows = RULES[name]
    assert Reader(rule._repr_html_()).cells[1:] == rows


def test_traced_hyperparameters_are_told_as_such():
    shown = []

    def trace(rate):
        shown.append(Reader(jr.step(rate, jr.Warmup(jr.Linear(rate, 5), 2))._repr_html_()).text)
        return rate

    assert not jax.make_jaxpr(trace)(0.5).eqns
    assert "learning_rate = " in shown[0]
    assert "Tracer" in shown[0]


COURSES = [
    (jr.Cosine(0.1, 100), "0.1 → 0 at 100"),
    (jr.Linear(0.1, 100, 0.1), "0.1"),
    (jr.Polynomial(0.5, 7, power=2.0), "0.5 → 0 at 7"),
    (jr.Exponential(0.1, 10, 0.5), "0.1 → 0.001031 at 66"),
    (jr.Exponential(0.1, 30, 0.1, staircase=True), "0.1 → 1e-06 at 150"),
    (jr.Exponential(0.001, 100, 1.05), "0.001 → 0.09996 at 9438"),
    (jr.Piecewise(0.1, {30: 0.1, 60: 0.1}), "0.1 → 0.001 at 60"),
    (jr.Piecewise(0.1, {30: 2.0, 60: 0.1}), "0.1 → 0.2 at 30 → 0.02 at 90"),
    (jr.InverseSqrt(0.003, 4001), "0 → 0.003 at 4001 → 0.001 at 36009"),
    (jr.InverseSqrt(0.003, 0), "0.003 → 0.001 at 80000"),
    (jr.CosineRestarts(0.1, 100, mult=2, decay=0.5, end=0.01), "0.1 → 0.01 at 699"),
    (jr.Cyclic(0.01, 0.1, 200, 100), "0.01 → 0.1 at 200 → 0.01 at 900"),
    (jr.OneCycle(0.1, 999), "0.004 → 0.1 at 300 → 4e-07 at 999"),
    (jr.OneCycle(0.1, 1000).momentum(), "0.95 → 0.85 at 300 → 0.95 at 1000"),
    (jr.WarmupStableDecay(3e-4, 10000, 503, 2000), "0 → 0.0003 at 503 → 0 at 10000"),
    (jr.Warmup(0.1, 100), "0 → 0.1 at 100"),
    (jr.Join((jr.Constant(0.1), jr.Linear(0.2, 50)), (100,)), "0.1 → 0.2 at 100 → 0 at 150"),
    (jr.Join((jr.Cosine(0.1, 80), lambda count: 0.3), (100,)), "0.1 → 0.3 at 100"),
    ((jr.Rex(1.0, 200) * jr.Cyclic(0.5, 1.0, 10)).clip(0.2), "0.5 → 0.9744 at 10 → 0.2 at 200"),
    (jr.InverseSqrt(0.003, 2**29), "0 → 0.003 at 536870912 → 0.0015 at 2147483647"),
]


@pytest.mark.parametrize(("schedule", "course"), COURSES, ids=[course for _, course in COURSES])
def test_the_course_of_a_schedule(schedule, course):
    html = schedule._repr_html_()
    assert Reader(html).text == f"{schedule!r}\n{course}"
    points = [tuple(map(float, point.split(","))) for point in html.split('points="')[1].split('"')[0].split()]
    assert len(points) >= 2
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert all(54 < x <= 234 and 3 <= y <= 53 for x, y in points)


def fails(count):
    raise ZeroDivisionError


def gives_a_matrix(count):
    return jnp.ones((2, 3))


def asks_the_count(count):
    return 0.1 if count < 5 else 0.2


@pytest.mark.parametrize(
    "schedule",
    [
        jr.Constant(0.1),
        jr.Constant(0.1) + jr.Constant(0.2),
        jr.Piecewise(0.1, {}),
        jr.Exponential(0.1, 5, 1.0),
        jr.Cosine(float("nan"), 10),
        jr.Linear(float("inf"), 10),
        jr.Warmup(fails, 10),
        jr.Warmup(gives_a_matrix, 10),
        jr.Warmup(asks_the_count, 10),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_a_schedule_without_a_picture(schedule):
    assert Reader(schedule._repr_html_()).text == repr(schedule)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and optimizers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_long_table_is_complete():
    params = {
        f"a_long_name_of_a_block/{i}<b>": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)} for i in range(400)
    }
    table = jr.explain(jr.adamw(), params)
    html = table._repr_html_()
    assert [row[0] for row in Reader(html).cells[1:]] == [row.leaf for row in table.rows]
    assert "max-height" in html
    assert "96&nbsp;B" in html
    assert len(str(table).splitlines()) == 402
    assert Reader(jr.explain(jr.adamw(), {})._repr_html_()).cells == [list(table.columns)]


def test_an_optimizer_shows_what_holds_now():
    opt = jr.Adam(jr.Linear(0.1, 4), hook=[jr.clip_by_value(1.0)])
    for _ in range(3):
        opt.update(dict(PARAMS), dict(PARAMS))
    assert dict(Reader(opt._repr_html_()).cells) == {
        "Adam": "",
        "rule": "adam(bias_correction='step')",
        "hook": "[clip_by_value(1.0)]",
        "alpha": "Linear(0.1, 4)\n0.1 → 0 at 4, now 0.05",
        "beta1": "0.9",
        "beta2": "0.999",
        "eps": "1e-08",
        "updates": "3",
        "state": "152 B",
    }
    opt.alpha = 0.25
    assert ["alpha", "0.25"] in Reader(opt._repr_html_()).cells
    assert Reader(jr.Optimizer(jr.Rule(dict.copy, tuple))._repr_html_()).cells[1:] == [
        ["rule", "(dict.copy, tuple)"],
        ["state", "0 B"],
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Jupyter
# ---------------------------------------------------------------------------------------------------------------------


def shell() -> Any:
    return SimpleNamespace(display_formatter=DisplayFormatter())


def html_in(ipython: Any, x: Any) -> str | None:
    return ipython.display_formatter.format(x)[0].get("text/html")


class WithHtml(dict):
    def _repr_html_(self):
        return "<i>its own</i>"


def test_tuples_and_dicts_of_states_in_jupyter():
    ipython = shell()
    chained, named, grouped = (STATES[name][0].init(PARAMS) for name in ("adamw", "chain", "partition"))
    assert html_in(ipython, chained) is None
    assert html_in(ipython, chained[0]) == state_html(chained[0])
    jr.load_ipython_extension(ipython)
    for state in (chained, named, grouped, chained[0], (of_another_library().init(PARAMS), chained)):
        assert html_in(ipython, state) == state_html(state)
    circle: dict[str, Any] = {}
    circle["self"] = circle
    for other in ((), {}, (1, "a"), PARAMS, (PARAMS, chained), {"state": chained, "name": "run"}, circle, (None,)):
        assert html_in(ipython, other) is None
    assert html_in(ipython, of_another_library().init(PARAMS)) is None
    assert html_in(ipython, WithHtml(a=chained)) == "<i>its own</i>"
    rule = jr.adamw()
    assert html_in(ipython, rule) == rule._repr_html_()
    jr.unload_ipython_extension(ipython)
    jr.unload_ipython_extension(ipython)
    assert html_in(ipython, chained) is None


def test_another_formatter_stays():
    ipython = shell()
    jr.load_ipython_extension(ipython)
    ipython.display_formatter.formatters["text/html"].for_type(dict, lambda x: "<i>theirs</i>")
    jr.unload_ipython_extension(ipython)
    assert html_in(ipython, {}) == "<i>theirs</i>"


def test_rows_of_columns_that_python_has_no_names_for():
    table = Table(("top-1", "lambda", "5 %", "loss"), ((0.5, 1, 2, 3),))
    (row,) = table.rows
    assert row._fields == ("top_1", "xlambda", "x5__", "loss")
    assert tuple(row) == (0.5, 1, 2, 3)
    assert repr(table).startswith("top-1  lambda  5 %  loss")


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        (("loss", "loss", "loss"), ("loss", "loss_2", "loss_3")),
        (("top-1", "top_1"), ("top_1", "top_1_2")),
        (("a", "a", "a_2"), ("a", "a_3", "a_2")),
        ((0, None, 0), ("x0", "xNone", "x0_2")),
        (("",), ("x",)),
    ],
)
def test_every_column_has_a_name_of_its_own_in_rows(columns, fields):
    table = Table(columns, (tuple(range(len(columns))),))
    assert table.rows[0]._asdict() == dict(zip(fields, range(len(columns)), strict=True))
    assert repr(table).splitlines()[0].split() == [str(column) for column in columns if column != ""]
    assert Reader(table._repr_html_()).cells[0] == list(map(str, columns))


def test_html_has_the_first_thousand_rows():
    cells = tuple((f"row {k}", k) for k in range(12_345))
    table = Table(("name", "bytes"), cells, ("total", 12_345))
    shown = Reader(table._repr_html_()).cells
    assert len(shown) == 1 + 1000 + 2
    assert shown[-3:] == [["row 999", "999\xa0B"], ["and 11,345 more rows: .rows has all"], ["total", "12.1\xa0KiB"]]
    assert len(table.rows) == len(str(table).splitlines()) - 4 == 12_345
    assert "more rows" not in Table(("name", "bytes"), cells[:1000])._repr_html_()
