"""Sweeps: the numbers of separate runs, in one program."""

import itertools
import signal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import quick_jit

import jaxopt_rules as jr
from jaxopt_rules.experiments import sweep, sweeps, training

matplotlib.use("agg")

STEPS = 12
RNG = np.random.default_rng(0)
X = RNG.standard_normal((STEPS, 8, 3), np.float32)
BATCHES = X, np.tanh(X @ np.array([[1.0], [-2.0], [0.5]], np.float32))


def init(key):
    hidden, out = jax.random.split(key)
    return {"hidden": {"w": jax.random.normal(hidden, (3, 4))}, "out": {"w": jax.random.normal(out, (4, 1)) / 2}}


def loss_fn(params, batch):
    x, t = batch
    return jnp.mean((jnp.tanh(x @ params["hidden"]["w"]) @ params["out"]["w"] - t) ** 2)


def shuffled(seed):
    order = np.random.default_rng(seed).permutation(STEPS)
    return jax.tree.map(lambda a: a[order], BATCHES)


PARAMS = init(jax.random.key(7))


def alone(rule, params=PARAMS, batches=BATCHES, steps=STEPS):
    """The losses and the parameters of a run of its own."""

    def body(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return rule.apply(grads, state, params, value=loss), loss

    batches = jax.tree.map(lambda a: a[np.arange(steps) % len(a)], batches)
    (params, state), losses = quick_jit(lambda c: jax.lax.scan(body, c, batches))((params, rule.init(params)))
    return np.asarray(losses), jr.eval_params(state, params)


def scheduled(rate, steps=10, clip=1.0):
    return jr.chain(jr.clip_by_global_norm(clip), jr.adamw(jr.Warmup(jr.Cosine(rate, steps), 2), where="out/w"))


GRIDS = {
    "rates and decays": (jr.adamw, {"learning_rate": [1e-3, 0.03, 0.1], "weight_decay": [0.0, 0.3]}, 1),
    "decay rates near 1": (jr.adam, {"learning_rate": [0.05], "b1": [0.0, 0.9], "b2": [0.99, 0.9999, 0.999999]}, 1),
    "a number in a schedule": (scheduled, {"rate": [0.01, 0.1, 0.3]}, 1),
    "a factor of a schedule": (lambda rate: jr.adam(jr.Cosine(1.0, 10) * rate), {"rate": [0.01, 0.1, 0.3]}, 1),
    "beside what is known when built": (scheduled, {"rate": [0.01, 0.1], "steps": [4, 10]}, 2),
    "a flag": (jr.sgd, {"learning_rate": [0.1, 0.2], "momentum": [0.9], "nesterov": [False, True]}, 2),
    "None": (jr.sgd, {"learning_rate": [0.1, 0.2], "momentum": [None, 0.9]}, 2),
    "whole numbers": (jr.sgd, {"learning_rate": [0.1], "weight_decay": [0, 1], "momentum": [0, 0.5]}, 1),
    "seeds of noise": (
        lambda rate, seed: jr.chain(jr.add_noise(0.1, key=jax.random.key(seed)), jr.sgd(rate)),
        {"rate": [0.1, 0.2], "seed": [0, 1]},
        1,
    ),
    "numbers of NumPy": (jr.lion, {"learning_rate": np.geomspace(1e-4, 1e-2, 3).astype(np.float32)}, 1),
    "every": (lambda every: jr.accumulate(jr.sgd(0.1), every), {"every": [1, 2, 3]}, 1),
    "groups": (
        lambda a, b: jr.partition({"h": jr.sgd(a), "o": jr.adamw(b)}, by={"h": "hidden/*"}),
        {"a": [0.1, 0.3], "b": [0.01, 0.02]},
        1,
    ),
    "what needs the loss": (jr.polyak_sgd, {"max_learning_rate": [0.01, 0.1]}, 1),
    "an average": (lambda decay: jr.average(jr.sgd(0.1), decay), {"decay": [0.5, 0.9]}, 1),
}


@pytest.mark.parametrize("name", GRIDS)
def test_same_numbers_as_separate_runs(name):
    make_rule, grid, programs = GRIDS[name]
    found = sweep(make_rule, grid, loss_fn, PARAMS, BATCHES, evaluate=lambda params: jnp.sum(params["out"]["w"]))
    assert found.programs == programs
    assert len(found.points) == np.prod(list(map(len, grid.values())))
    for k, point in enumerate(found.points):
        losses, params = alone(make_rule(**point))
        np.testing.assert_allclose(found.curves["loss"][k, 0], losses, rtol=2e-6)
        np.testing.assert_allclose(found.final["score"][k, 0], jnp.sum(params["out"]["w"]), rtol=1e-5, atol=1e-6)


@pytest.mark.x64
def test_same_numbers_in_64_bits():
    grid = {"learning_rate": [0.05, 0.1], "b1": [0.0, 0.9], "b2": [0.99, 0.9999999], "weight_decay": [0.0, 0.1]}
    found = sweep(jr.adamw, grid, loss_fn, PARAMS, jax.tree.map(np.float64, BATCHES))
    for k, point in enumerate(found.points):
        losses, _ = alone(jr.adamw(**point), batches=jax.tree.map(np.float64, BATCHES))
        np.testing.assert_allclose(found.curves["loss"][k, 0], losses, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_chunks_and_seeds(chunk):
    """Each member is trained from its seed's start on its seed's batches, whatever it shares a block with."""
    rates, seeds = [0.05, 0.1, 0.2], [3, 0]
    found = sweep(jr.sgd, {"learning_rate": rates}, loss_fn, init, shuffled, seeds=seeds, chunk=chunk)
    assert found.seeds == (3, 0)
    for (p, rate), (s, seed) in itertools.product(enumerate(rates), enumerate(seeds)):
        losses, _ = alone(jr.sgd(rate), init(jax.random.key(seed)), shuffled(seed))
        np.testing.assert_allclose(found.curves["loss"][p, s], losses, rtol=2e-6)


@pytest.mark.parametrize("varied", [{"params": init}, {"batches": shuffled}], ids=["starts", "batches"])
def test_seeds_of_one_kind(varied):
    given = {"params": PARAMS, "batches": BATCHES} | varied
    found = sweep(jr.sgd, {"learning_rate": [0.1]}, loss_fn, **given, seeds=2)
    for s in range(2):
        params = init(jax.random.key(s)) if "params" in varied else PARAMS
        losses, _ = alone(jr.sgd(0.1), params, shuffled(s) if "batches" in varied else BATCHES)
        np.testing.assert_allclose(found.curves["loss"][0, s], losses, rtol=2e-6)


def test_points_one_by_one():
    points = [{"learning_rate": 0.1, "momentum": 0.5}, {"momentum": 0.0, "learning_rate": 0.2}]
    found = sweep(jr.sgd, points, loss_fn, PARAMS, BATCHES)
    assert found.points == ({"learning_rate": 0.1, "momentum": 0.5}, {"learning_rate": 0.2, "momentum": 0.0})
    for k, point in enumerate(points):
        np.testing.assert_allclose(found.curves["loss"][k, 0], alone(jr.sgd(**point))[0], rtol=2e-6)
    drawn(found)


def test_batches_come_again_and_may_be_an_iterable():
    few = jax.tree.map(lambda a: a[:5], BATCHES)
    expected, _ = alone(jr.sgd(0.1), batches=few)
    for batches in (
        few,
        list(zip(*few, strict=True)),
        zip(*few, strict=True),
        lambda seed: list(zip(*few, strict=True)),
    ):
        found = sweep(jr.sgd, {"learning_rate": [0.1]}, loss_fn, PARAMS, batches, STEPS)
        np.testing.assert_allclose(found.curves["loss"][0, 0], expected, rtol=2e-6)
    assert sweep(jr.sgd, {"learning_rate": [0.1]}, loss_fn, PARAMS, few).steps == 5


def test_what_is_no_array_of_floats_stays_as_it_is():
    def with_extras(key):
        return init(key) | {"activation": jnp.tanh, "count": jnp.arange(3), "none": None}

    def loss(params, batch):
        x, t = batch
        return jnp.mean((params["activation"](x @ params["hidden"]["w"]) @ params["out"]["w"] - t) ** 2)

    found = sweep(jr.adamw, {"learning_rate": [0.1]}, loss, with_extras, BATCHES, evaluate=lambda p: p["count"].sum())
    np.testing.assert_allclose(found.curves["loss"][0, 0], alone(jr.adamw(0.1), init(jax.random.key(0)))[0], rtol=2e-6)
    assert found.final["score"] == 3


def test_narrow_parameters():
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), PARAMS)
    found = sweep(jr.adamw, {"learning_rate": [0.01, 0.1]}, loss_fn, narrow, BATCHES)
    for k, rate in enumerate([0.01, 0.1]):
        np.testing.assert_allclose(found.curves["loss"][k, 0], alone(jr.adamw(rate), narrow)[0], rtol=0.02)


def test_what_the_loss_gives_beside_it_becomes_curves():
    def both(params, batch):
        loss = loss_fn(params, batch)
        return loss, {"double": 2 * loss, "low": loss < 0.5}

    found = sweep(jr.sgd, {"learning_rate": [0.1, 0.2]}, both, PARAMS, BATCHES, has_aux=True)
    np.testing.assert_allclose(found.curves["double"], 2 * found.curves["loss"])
    np.testing.assert_array_equal(found.curves["low"], found.curves["loss"] < 0.5)
    found.plot_curves(name="double")


def test_a_pair_from_elsewhere():
    def plain_sgd(rate):
        return jr.Rule(
            lambda p: (), lambda grads, state, params=None: (jax.tree.map(lambda g: -rate * g, grads), state)
        )

    found = sweep(plain_sgd, {"rate": [0.1, 0.2]}, loss_fn, PARAMS, BATCHES)
    for k, rate in enumerate([0.1, 0.2]):
        np.testing.assert_allclose(found.curves["loss"][k, 0], alone(jr.sgd(rate))[0], rtol=2e-6)


def test_one_trace_of_the_loss_for_all_members_of_a_program():
    traced = []

    def counted(params, batch):
        traced.append(batch)
        return loss_fn(params, batch)

    sweep(jr.sgd, {"learning_rate": np.geomspace(1e-3, 1, 30)}, counted, PARAMS, BATCHES)
    assert len(traced) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------------------------------


def drawn(found):
    found.plot()
    found.line()
    found.plot_curves()
    html = found._repr_html_()
    assert html.count("<img src=") == 1
    matplotlib.pyplot.close("all")
    return html


@pytest.fixture(scope="module")
def found():
    """Of nine points, the largest rate diverges for all decays."""
    grid = {"learning_rate": [0.01, 0.1, 1e4], "weight_decay": [0.0, 0.1, 1e-3]}
    return sweep(
        jr.sgd,
        grid | {"decay": ["decoupled"]},
        loss_fn,
        init,
        BATCHES,
        40,
        seeds=2,
        evaluate=lambda params: {"test_loss": loss_fn(params, jax.tree.map(lambda a: a[0], BATCHES))},
    )


def test_the_best_point_is_first(found):
    assert found.by == "test_loss"
    ranked = found.final["test_loss"].mean(axis=1)[found.order[:6]]
    np.testing.assert_array_equal(ranked, sorted(ranked))
    assert found.best == found.points[found.order[0]]
    assert found.best["learning_rate"] == 0.1
    assert found.best["decay"] == "decoupled"


def test_members_that_diverged_are_marked(found):
    assert [point["learning_rate"] for point, bad in zip(found.points, found.diverged, strict=True) if bad.any()] == [
        1e4
    ] * 3
    assert [row.note for row in found.table.rows] == [""] * 6 + ["diverged"] * 3
    assert "18 members of 40 steps, 6 diverged; one program" in repr(found)


def test_the_loss_is_the_mean_of_the_last_tenth(found):
    good = ~found.diverged
    np.testing.assert_allclose(found.final["loss"][good], found.curves["loss"][good][:, -4:].mean(axis=-1), rtol=1e-6)


def test_the_table_goes_to_pandas(found):
    frame = pd.DataFrame(found.table.rows)
    assert list(frame) == [
        "learning_rate",
        "weight_decay",
        "decay",
        "test_loss",
        "test_loss_std",
        "loss",
        "loss_std",
        "note",
    ]
    first = found.final["test_loss"][found.order[0]]
    np.testing.assert_allclose(frame.test_loss_std[0], abs(first[0] - first[1]) / 2**0.5, rtol=1e-6)


def test_pictures(found):
    html = drawn(found)
    assert html.count("<tr>") == 1 + 9
    ax = found.heat_map("weight_decay", "learning_rate")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "0.001", "0.1"]
    assert [text.get_text() for text in ax.texts].count("×") == 3
    (square,) = ax.patches
    assert (square.get_x() + 0.5, square.get_y() + 0.5) == ([0.0, 1e-3, 0.1].index(found.best["weight_decay"]), 1)
    with pytest.raises(KeyError, match="no hyperparameter 'momentum'; it has learning_rate, weight_decay, decay"):
        found.line("momentum")


def test_points_at_random():
    points = [{"learning_rate": rate, "momentum": momentum} for rate, momentum in RNG.uniform(0.01, 0.5, (20, 2))]
    found = sweep(jr.sgd, [*points, {"learning_rate": 1e9, "momentum": 0.5}], loss_fn, PARAMS, BATCHES)
    axes = found.plot()
    offsets = axes[0].collections[0].get_offsets()
    assert sorted(map(tuple, np.asarray(offsets))) == sorted((p["learning_rate"], p["momentum"]) for p in points)
    drawn(found)


def test_arrays_and_rules_may_be_values():
    scales = [np.array([0.1, 1.0]), np.array([0.2, 1.0])]
    found = sweep(
        lambda scale, rate: jr.sgd(rate * float(scale[0])), {"scale": scales, "rate": [1, 2]}, loss_fn, init, BATCHES
    )
    assert found.programs == 2
    assert found.built_with == ("scale",)
    assert "2 programs, one for each scale" in repr(found)
    for k, point in enumerate(found.points):
        losses, _ = alone(jr.sgd(point["rate"] * point["scale"][0]), init(jax.random.key(0)))
        np.testing.assert_allclose(found.curves["loss"][k, 0], losses, rtol=2e-6)
    drawn(found)
    rules = [jr.sgd(0.1), jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(jr.Cosine(3e-3, 100), weight_decay=0.1))]
    found = sweep(lambda rule: rule, {"rule": rules}, loss_fn, PARAMS, BATCHES)
    assert {row.rule for row in found.table.rows} == set(map(repr, rules))
    drawn(found)


def test_infinite_values_have_pictures():
    clipped = {"c": [1.0, np.inf, 0.1], "rate": [0.1, 0.2]}
    drawn(sweep(lambda c, rate: jr.chain(jr.clip_by_global_norm(c), jr.sgd(rate)), clipped, loss_fn, PARAMS, BATCHES))


def test_under_a_setting_of_64_bits_that_this_thread_alone_has():
    with jax.enable_x64(True):
        found = sweep(jr.sgd, {"learning_rate": [0.1, 0.2]}, loss_fn, jax.tree.map(np.float64, PARAMS), BATCHES)
    assert found.curves["loss"].dtype == np.float64
    np.testing.assert_allclose(found.curves["loss"][0, 0], alone(jr.sgd(0.1))[0], rtol=1e-5)


@pytest.mark.parametrize(
    "grid", [{"learning_rate": [0.1]}, {"learning_rate": [1e9, 1e10]}, {"momentum": [None, 0.9], "nesterov": [False]}]
)
def test_pictures_of_little(grid):
    drawn(sweep(lambda **point: jr.sgd(**{"learning_rate": 0.1} | point), grid, loss_fn, PARAMS, BATCHES))


def test_a_best_point_at_the_edge_is_told():
    found = sweep(jr.sgd, {"learning_rate": [1e-4, 1e-3, 1e-2]}, loss_fn, PARAMS, BATCHES)
    assert found.at_the_edge == ["learning_rate"]
    assert "the best learning_rate is at the edge of the grid" in repr(found)
    assert sweep(jr.sgd, {"learning_rate": [1e-4, 0.1, 1e6]}, loss_fn, PARAMS, BATCHES).at_the_edge == []


def test_noise_of_batches_and_a_bad_batch_are_no_divergence():
    """A batch of one row may begin far below the mean, and a rule may have skipped a batch that is not finite."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 1, 3), np.float32)
    t = np.tanh(x.sum(axis=-1, keepdims=True)) + rng.standard_normal((60, 1, 1), np.float32)
    t[0] = loss_free = np.asarray(jnp.tanh(x[0] @ PARAMS["hidden"]["w"]) @ PARAMS["out"]["w"])
    assert loss_free.shape == (1, 1)
    t[30] = np.nan
    found = sweep(lambda rate: jr.skip_nonfinite(jr.sgd(rate)), {"rate": [1e-4, 1e-3]}, loss_fn, PARAMS, (x, t))
    assert found.curves["loss"][0, 0, 0] < 1e-10
    assert np.isnan(found.curves["loss"][:, 0, 30]).all()
    assert not found.diverged.any()
    assert found.best["rate"] in (1e-4, 1e-3)


def test_no_best_point_where_all_diverged():
    found = sweep(jr.sgd, {"learning_rate": [1e30, 1e35]}, loss_fn, PARAMS, BATCHES, 40)
    with pytest.raises(ValueError, match="there is no best point: 2 members of 40 steps, 2 diverged"):
        _ = found.best


def test_largest():
    grid = {"learning_rate": [1e-3, 0.1]}
    evaluate = {"evaluate": lambda params: {"size": jnp.sum(params["out"]["w"] ** 2)}}
    up = sweep(jr.sgd, grid, loss_fn, PARAMS, BATCHES, **evaluate, largest=True)
    down = sweep(jr.sgd, grid, loss_fn, PARAMS, BATCHES, **evaluate)
    assert up.order == down.order[::-1]
    assert sweep(jr.sgd, grid, loss_fn, PARAMS, BATCHES, **evaluate, by="loss").by == "loss"


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C
# ---------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_gives_what_is_finished(monkeypatch):
    """The signal itself, in the second of three blocks, each of which is trained in parts of some steps."""
    monkeypatch.setattr(training.Block, "advance", by_fives(training.Block.advance, interrupt_at=4))
    found = sweep(jr.sgd, {"learning_rate": [0.01, 0.1, 0.2]}, loss_fn, PARAMS, BATCHES, chunk=1)
    assert found.done.tolist() == [[12], [5], [0]]
    assert found.finished.tolist() == [[True], [False], [False]]
    np.testing.assert_array_equal(np.isfinite(found.curves["loss"][:, 0]).sum(axis=1), [12, 5, 0])
    for k, rate in enumerate([0.01, 0.1]):
        done = found.done[k, 0]
        np.testing.assert_allclose(found.curves["loss"][k, 0, :done], alone(jr.sgd(rate))[0][:done], rtol=2e-6)
    assert found.best == {"learning_rate": 0.01}
    assert [row.note for row in found.table.rows] == ["", "interrupted at step 5", "not trained"]
    assert "3 members of 12 steps, 2 interrupted" in repr(found)
    interrupted = found.curves["loss"][1, 0, 4]
    np.testing.assert_allclose(found.final["loss"][:2, 0], [found.curves["loss"][0, 0, -1], interrupted])
    drawn(found)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def by_fives(advance, interrupt_at):
    calls = itertools.count(1)

    def advance_by_five(block, seconds):
        block._program.step_seconds = 0.05
        if next(calls) == interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return advance(block, 0.25)

    return advance_by_five


def test_an_interrupt_before_the_first_block_is_done(monkeypatch):
    monkeypatch.setattr(training.Block, "advance", by_fives(training.Block.advance, interrupt_at=1))
    found = sweep(jr.sgd, {"learning_rate": [0.01, 0.1]}, loss_fn, PARAMS, BATCHES, evaluate=lambda params: 0.0)
    assert found.done.tolist() == [[5], [5]]
    with pytest.raises(ValueError, match="there is no best point: 2 members of 12 steps, 2 interrupted"):
        _ = found.best
    drawn(found)


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses
# ---------------------------------------------------------------------------------------------------------------------

RATES = {"learning_rate": [0.1, 0.2]}
REFUSED = {
    "an empty grid": ({"grid": {}}, ValueError, "the grid is empty"),
    "no values": ({"grid": {"learning_rate": []}}, ValueError, "no value for learning_rate"),
    "points of different names": (
        {"grid": [{"learning_rate": 0.1}, {"rate": 0.1}]},
        ValueError,
        "different hyperparameters: learning_rate and rate",
    ),
    "a name that the rule does not know": (
        {"grid": {"rate": [0.1, 0.2]}},
        TypeError,
        "sgd: missing a required argument: 'learning_rate'",
    ),
    "a value that is not legal": ({"grid": {"learning_rate": [0.1, -1.0]}}, ValueError, "learning_rate must be at"),
    "no rule": ({"make_rule": lambda learning_rate: learning_rate}, TypeError, "make_rule"),
    "a rule in place of a function": ({"make_rule": jr.sgd(0.1)}, TypeError, "make_rule is a function of the hyper"),
    "a number in place of values": ({"grid": {"learning_rate": 0.1}}, TypeError, r"is 0.1: write \[0.1\]"),
    "a text in place of values": ({"grid": {"learning_rate": "0.1"}}, TypeError, r"is '0.1': write \['0.1'\]"),
    "points that are numbers": ({"grid": [0.1, 0.2]}, TypeError, "or points such as .* not 0.1"),
    "a last batch that is shorter": ({"batches": [(X[0], X[0]), (X[1, :3], X[1, :3])]}, ValueError, "drop_last=True"),
    "a loss of integers": ({"loss_fn": lambda p, b: jnp.int32(3)}, TypeError, "a floating-point number, not int32"),
    "an evaluation called loss": ({"evaluate": lambda p: {"loss": 0.0}}, ValueError, "cannot be called 'loss'"),
    "half a seed": ({"seeds": [1.5], "params": init}, ValueError, "different integers"),
    "equal runs": ({"seeds": 3}, ValueError, "3 seeds would give the same run"),
    "no seeds": ({"seeds": 0}, ValueError, "seeds must be a number from 1"),
    "a seed twice": ({"seeds": [1, 1], "params": init}, ValueError, "different integers"),
    "no steps": ({"steps": 0}, ValueError, "steps must be an integer >= 1"),
    "a chunk of nothing": ({"chunk": 0}, ValueError, "chunk must be an integer >= 1"),
    "half a chunk": ({"chunk": 2.5}, ValueError, "chunk must be an integer >= 1"),
    "no parameters": ({"params": {"n": 3}}, ValueError, "no array of floating-point numbers"),
    "no batches": ({"batches": iter(())}, ValueError, "batches is empty"),
    "batches of different lengths": ({"batches": (X, X[:3])}, ValueError, "have 3 and 12 batches"),
    "one batch": ({"batches": 3.0}, ValueError, "an axis of batches in front"),
    "a loss for each row": (
        {"loss_fn": lambda p, b: p["out"]["w"][:, 0]},
        TypeError,
        r"a scalar, not an array.*\(4,\)",
    ),
    "aux unasked for": ({"loss_fn": lambda p, b: (loss_fn(p, b), {})}, TypeError, "with has_aux=True it may give"),
    "aux that is no dict": (
        {"loss_fn": lambda p, b: (loss_fn(p, b), 3), "has_aux": True},
        TypeError,
        r"must give \(loss, \{name: scalar\}\), not int",
    ),
    "an evaluation of arrays": (
        {"evaluate": lambda p: {"w": p["out"]["w"]}},
        TypeError,
        r"not \{'w': an array of shape",
    ),
    "by an unknown name": ({"by": "accuracy"}, ValueError, "by must be one of loss, not 'accuracy'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changed, error, text = REFUSED[name]
    given = {"make_rule": jr.sgd, "grid": RATES, "loss_fn": loss_fn, "params": PARAMS, "batches": BATCHES}
    with pytest.raises(error, match=text):
        sweep(**given | changed)


def test_parts_cover_all():
    for count, size in itertools.product(range(1, 12), range(1, 14)):
        parts = sweeps._parts(count, size)
        assert set(np.concatenate(parts)) == set(range(count))
        assert len({len(part) for part in parts}) == 1
        assert len(parts[0]) <= size
        assert len(parts) == -(-count // size)


def test_ctrl_c_while_it_compiles(monkeypatch):
    """Compilation that does not end: what is returned says that nothing is trained."""
    monkeypatch.setattr(training, "_fulfil", lambda future, make: None)
    monkeypatch.setattr(sweeps, "PART", 0.01)
    is_compiled = training.Block.is_compiled

    def interrupted(block, seconds):
        signal.raise_signal(signal.SIGINT)
        return is_compiled(block, seconds)

    monkeypatch.setattr(training.Block, "is_compiled", interrupted)
    found = sweep(jr.sgd, {"learning_rate": [0.01, 0.1]}, loss_fn, PARAMS, BATCHES)
    assert not found.done.any()
    assert [row.note for row in found.table.rows] == ["not trained"] * 2
    with pytest.raises(ValueError, match="there is no best point: 2 members of 12 steps, 2 interrupted"):
        _ = found.best
    drawn(found)


def test_never_more_members_than_a_chunk(monkeypatch):
    """Not even those of the block that is made ready while others are trained."""
    alive, most = [0], [0]

    def counted(program, points=None, seeds=None, *, make=training.Block.__init__, block=None):
        make(block, program, points, seeds)
        alive[0] += len(points) * len(seeds)
        most[0] = max(most[0], alive[0])

    def taken(found, block, cells, *, take=sweeps._Found.take):
        alive[0] -= cells[0].size * cells[1].size
        take(found, block, cells)

    monkeypatch.setattr(training.Block, "__init__", lambda block, *args: counted(*args, block=block))
    monkeypatch.setattr(sweeps._Found, "take", taken)
    for chunk in (1, 2, 5, 6, 20):
        alive[0] = most[0] = 0
        sweep(jr.sgd, {"learning_rate": np.geomspace(1e-3, 0.1, 7)}, loss_fn, init, BATCHES, 2, seeds=3, chunk=chunk)
        assert alive == [0]
        assert 0 < most[0] <= chunk
