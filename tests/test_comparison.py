"""Comparisons: the numbers are those of plain loops, budgets are fair, and what goes wrong is said."""

import dataclasses
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import jaxopt_rules as jr
from jaxopt_rules.experiments import comparison, plots, training
from jaxopt_rules.experiments.comparison import Comparison, compare

pytest.importorskip("matplotlib").use("Agg")


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


STEPS, SEEDS = 30, (0, 3)


def init(key):
    return {"w": jax.random.normal(key, (4, 2)), "b": jnp.zeros(2)}


def loss_fn(params, batch):
    x, t = batch
    return jnp.mean((x @ params["w"] + params["b"] - t) ** 2)


def batches(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(STEPS, 8, 4)).astype(np.float32)
    return x, x[..., :2] - x[..., 2:] + 0.1 * rng.normal(size=(STEPS, 8, 2)).astype(np.float32)


def evaluate(params):
    return {"weight": jnp.sum(params["w"] ** 2), "bias": jnp.sum(params["b"] ** 2)}


class PairState(NamedTuple):
    trace: dict


class Pair(NamedTuple):
    """Gradient descent with momentum as an (init, update) pair of another library, without hyperparameters."""

    init: object = staticmethod(lambda params: PairState(jax.tree.map(jnp.zeros_like, params)))

    @staticmethod
    def update(grads, state, params=None):
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, state.trace, grads)
        return jax.tree.map(lambda m: -0.05 * m, trace), PairState(trace)


RULES = {
    "adamw": jr.adamw(jr.Cosine(0.05, STEPS), weight_decay=0.1),
    "averaged": jr.average(jr.sgd(0.1), 0.9),
    "pair": Pair(),
}


def compared(rules, *args, **keywords) -> Comparison:
    arguments = {"seeds": SEEDS, "evaluate": evaluate, "shown": False} | keywords
    return compare(rules, loss_fn, init, batches, *args, **arguments)


@pytest.fixture(scope="module")
def result():
    return compared(RULES)


def plain_loop(rule, seed):
    rule = rule if isinstance(rule, jr.Rule) else jr.Rule(rule.init, rule.update)

    @quick_jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return *rule.apply(grads, state, params), loss

    params, losses = init(jax.random.key(seed)), []
    state = rule.init(params)
    for batch in zip(*batches(seed), strict=True):
        params, state, loss = step(params, state, batch)
        losses.append(loss)
    return np.array(losses), evaluate(jr.eval_params(state, params))


@pytest.mark.parametrize("name", RULES)
def test_it_is_a_plain_loop_for_each_rule_and_seed(name, result):
    run = result.runs[name]
    for k, seed in enumerate(SEEDS):
        losses, values = plain_loop(RULES[name], seed)
        np.testing.assert_allclose(run.curves["loss"][k], losses, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(run.final["loss"][k], losses[-3:].mean(), rtol=1e-6)
        np.testing.assert_allclose(run.final["weight"][k], values["weight"], rtol=1e-6)
        np.testing.assert_allclose(run.final["bias"][k], values["bias"], rtol=1e-5, atol=1e-7)


def test_it_ranks_by_the_first_value_of_evaluate(result):
    means = {name: run.final["weight"].mean() for name, run in result.runs.items()}
    assert result.by == "weight"
    assert result.order == sorted(means, key=means.get)
    assert compared(RULES, 3, largest=True).order[0] != compared(RULES, 3).order[0]
    assert compared(RULES, 3, by="bias").by == "bias"


def test_its_table_has_means_spreads_and_costs(result):
    rows = {row.rule: row for row in result.table.rows}
    run = result.runs["adamw"]
    assert result.table.columns[:3] == ("rule", "weight", "weight_std")
    assert rows["adamw"].weight == pytest.approx(run.final["weight"].mean(), rel=1e-5)
    assert rows["adamw"].weight_std == pytest.approx(run.final["weight"].std(ddof=1), rel=1e-5)
    assert rows["adamw"].bytes == sum(x.nbytes for x in jax.tree.leaves(RULES["adamw"].init(init(jax.random.key(0)))))
    assert rows["pair"].bytes == 4 * (4 * 2 + 2)
    assert all(row.steps == STEPS and row.note == "" for row in rows.values())


def test_times_grow_and_end_with_the_seconds(result):
    for run in result.runs.values():
        assert len(run.times) == run.steps == STEPS
        assert np.all(np.diff(run.times) >= 0)
        assert run.times[-1] == run.seconds > 0
        assert run.ms_per_step == pytest.approx(1e3 * run.seconds / STEPS)


def test_it_reads_well(result):
    assert repr(result).startswith("Comparison: 3 rules, 2 seeds, 30 steps each; ranked by weight\nrule ")
    html = result._repr_html_()
    assert "<img" in html
    assert html.count("<tr>") == 4


@pytest.fixture
def clock(monkeypatch):
    """Time passes by steps alone: 1/8 s for each of sgd, twice that for each of the other rule."""
    clock = SimpleNamespace(now=0.0, turns=[])
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    compiled = training.Program.compiled

    def timed(program, function, *args, **keywords):
        cost = 0.125 if program.rules[0] == jr.sgd(0.1) else 0.25
        future = compiled(program, function, *args, **keywords)

        def run(carry, values, data, start, stop):
            clock.turns.append((cost, int(stop - start)))
            clock.now += cost * int(stop - start)
            return future.result()(carry, values, data, start, stop)

        return future if function != "_advance" else SimpleNamespace(result=lambda: run)

    monkeypatch.setattr(training.Program, "compiled", timed)
    return clock


def test_rules_take_turns(clock):
    result = compared({"fast": jr.sgd(0.1), "slow": Pair()}, 8)
    made = clock.turns[2:]  # behind one step of each that is not kept
    assert made[:4] == [(0.125, 1), (0.25, 1), (0.125, 2), (0.25, 1)]
    assert [sum(steps for cost, steps in made if cost == of) for of in (0.125, 0.25)] == [8, 8]
    np.testing.assert_allclose(result.runs["slow"].times, 0.25 * np.arange(1, 9))


def test_a_budget_of_seconds_is_the_same_for_all(clock):
    result = compared({"fast": jr.sgd(0.1), "slow": Pair()}, seconds=1.5)
    assert {name: run.steps for name, run in result.runs.items()} == {"fast": 12, "slow": 6}
    assert all(run.curves["loss"].shape == (2, run.steps) and run.finished for run in result.runs.values())
    same = compared({"sgd": jr.sgd(0.1)}, 12).runs["sgd"]
    np.testing.assert_allclose(result.runs["fast"].curves["loss"], same.curves["loss"], rtol=1e-6)


def test_steps_bound_a_budget_of_seconds(clock):
    result = compared({"fast": jr.sgd(0.1), "slow": Pair()}, 8, seconds=1.5)
    assert {row.rule: row.note for row in result.table.rows} == {"fast": "all its steps in 1 s", "slow": ""}


def test_what_diverges_is_marked_and_comes_last():
    result = compared({"huge": jr.sgd(1e3), "good": jr.sgd(0.1)}, evaluate=None)
    assert result.order == ["good", "huge"]
    assert result.runs["huge"].diverged.all()
    assert result.table.rows[1].note == "diverged"
    result.plot()


class Interrupted:
    """A bar that Ctrl-C is pressed in front of after a number of turns."""

    def __init__(self, turns):
        self.turns = turns

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def advance(self, amount, text=""):
        self.turns -= amount > 0
        return self.turns > 0


@pytest.mark.parametrize(("turns", "notes"), [(1, ["interrupted", "not trained"]), (2, ["interrupted"] * 2)])
def test_an_interrupt_returns_what_there_is(turns, notes, monkeypatch):
    monkeypatch.setattr(comparison, "progress", lambda *_: Interrupted(turns))
    result = compared({"first": jr.sgd(0.1), "second": jr.momentum(0.1)})
    assert result.interrupted
    assert [result._note(run) for run in result.runs.values()] == notes
    assert "interrupted" in repr(result)
    assert result.runs["first"].curves["loss"].shape == (2, result.runs["first"].steps)
    assert np.isfinite(result.runs["first"].final["weight"]).all()
    assert "<img" in result._repr_html_()


def test_pictures(result):
    ax = result.plot_curves()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == result.order
    assert [text.get_text() for text in ax.get_legend().get_texts()] == result.order
    assert result.plot_curves("seconds").get_xlabel() == "seconds of training"
    assert [text.get_text() for text in result.plot_final("loss").get_yticklabels()] == result.order
    assert result.plot().shape == (3,)


TEXT = "partition({'muon': muon(0.02), 'rest': adamw(3e-4)}, by={'muon': 'hidden/**/w'})"


def small(names=("a", "b"), loss_fn=loss_fn, **settings):
    return compare(dict.fromkeys(names, jr.sgd(0.1)), loss_fn, init, batches, shown=False, **{"steps": 2, **settings})


def test_rules_as_names_leave_room_for_the_curves():
    result = small([TEXT, TEXT.replace("0.02", "0.05"), "_x", "x$_$y"])
    axes = [*result.plot(), result.plot_curves()]
    for ax in axes:
        ax.figure.canvas.draw()  # warns where a layout collapses
        inches = ax.get_window_extent().size / ax.figure.dpi
        assert (inches > 2).all(), inches
    texts = {text.get_text() for text in axes[-1].get_legend().get_texts()}
    assert {" _x", r"x\$_\$y", plots.label(TEXT)} < texts


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("adam", "adam"),
        ("", ""),
        ("_x", " _x"),
        ("x$_$y", r"x\$_\$y"),
        ("one two three four", "one two\nthree…"),
        ("x" * 30, "x" * 8 + "\n" + "x" * 7 + "…"),
    ],
)
def test_labels(text, label):
    assert plots.label(text, 8) == label


@pytest.mark.filterwarnings("error:Glyph")
def test_letters_that_the_font_lacks_are_no_warning():
    assert "<img" in small(["日本"], seeds=1)._repr_html_()


def test_a_curve_of_one_step_is_a_dot():
    (line,) = small(["a"], steps=1, seeds=1).plot_curves().get_lines()
    assert line.get_marker() == "o"


def test_pictures_say_that_nothing_is_finite():
    result = small(loss_fn=lambda params, batch: jnp.nan * loss_fn(params, batch))
    assert [[text.get_text() for text in ax.texts] for ax in result.plot()] == [["no finite values"]] * 2 + [[]]


def test_without_matplotlib_there_are_numbers_and_a_remark(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = result._repr_html_()
    assert "matplotlib is not installed" in html
    assert "<table" in html
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install \"jaxopt_rules\[experiments\]\""):
        result.plot()


def test_results_are_equal_to_themselves_alone(result):
    assert result == result
    assert result != dataclasses.replace(result)
    assert {result, *result.runs.values()}


def test_seconds_of_numpy():
    assert small(seconds=np.float32(0.01), seeds=1).seconds == pytest.approx(0.01)


@pytest.mark.parametrize(("name", "seeds"), [("note", 1), ("steps", 1), ("rule", 2), ("loss_std", 2)])
def test_metrics_have_names_of_their_own(name, seeds):
    with pytest.raises(ValueError, match=f"needs another name than {name}"):
        small(seeds=seeds, evaluate=lambda params: {name: jnp.sum(params["b"])})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: compared({}), ValueError, "no rules to compare"),
        (lambda: compared([jr.adam(0.1)]), TypeError, "rules is a dict of rules by name"),
        (lambda: compared({1: jr.adam(0.1)}), TypeError, "the name of a rule is a text, not 1"),
        (lambda: compared({"a": jr.adam}), TypeError, "was it meant to be called"),
        (lambda: compared({"a": jr.adam_direction()}), ValueError, "gives a direction"),
        (lambda: compared(RULES, seconds=0), ValueError, "seconds must be a finite number above 0, not 0"),
        (lambda: compared(RULES, 2, by="R2"), ValueError, "by must be one of loss, weight, bias, not 'R2'"),
    ],
)
def test_what_cannot_be_compared(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_an_error_names_the_rule():
    with pytest.raises(ValueError, match="muon is for matrices") as raised:
        compared({"sgd": jr.sgd(0.1), "matrices": jr.muon(0.1)})
    assert raised.value.__notes__[-1:] == ["in compare, the rule 'matrices'"]


def test_no_such_picture(result):
    with pytest.raises(ValueError, match="against is"):
        result.plot_curves("hours")
    with pytest.raises(KeyError, match="no curves 'x'"):
        result.plot_curves(name="x")
    with pytest.raises(KeyError, match="no final values 'x'"):
        result.plot_final("x")
