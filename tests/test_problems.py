"""The tables and the text that experiments train on, and the problems made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import jaxopt_rules as jr
from jaxopt_rules.experiments import data
from jaxopt_rules.experiments.data import DATASETS, UserError, source_text
from jaxopt_rules.experiments.problems import (
    digits_mlp,
    init_transformer,
    row_numbers,
    source_transformer,
    table_mlp,
    transformer,
)

SHAPES = {"digits": (1797, 64), "wine": (178, 13), "breast_cancer": (569, 30), "diabetes": (442, 10)}
CLASSES = {"digits": 10, "wine": 3, "breast_cancer": 2, "diabetes": None}

PROBLEMS = {
    "digits": digits_mlp,
    "digits, relu": lambda: digits_mlp((16, 8), jax.nn.relu, batch=32),
    "wine": lambda: table_mlp(DATASETS["wine"](0)),
    "breast_cancer": lambda: table_mlp(DATASETS["breast_cancer"](0), ()),
    "diabetes": lambda: table_mlp(DATASETS["diabetes"](0)),
    "source": lambda: source_transformer(1, 16, 2, context=8, batch=4, characters=20_000),
}
UNTRAINED = {
    "digits": np.log(10),
    "digits, relu": np.log(10),
    "wine": np.log(3),
    "breast_cancer": np.log(2),
    "diabetes": 1.39,  # 1 and the variance of tanh of a standard normal number
    "source": np.log(97),
}


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_a_table_is_standardized_and_whole(name):
    table = DATASETS[name](0)
    rows, features = SHAPES[name]
    assert (table.name, table.classes) == (name, CLASSES[name])
    assert table.x_test.shape == (rows // 5, features)
    assert table.x_train.shape == (rows - rows // 5, features)
    assert table.x_train.dtype == np.float32
    x = table.x_train.astype(float)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(x.std(axis=0)[np.any(x != 0, axis=0)], 1, rtol=1e-5)
    if table.classes is None:
        assert table.t_train.shape == (len(table.x_train), 1)
        np.testing.assert_allclose([table.t_train.mean(), table.t_train.std()], [0, 1], atol=1e-5)
    else:
        assert table.t_train.dtype == np.int32
        assert set(np.unique(table.t_train)) == set(np.unique(table.t_test)) == set(range(table.classes))


@pytest.mark.parametrize("name", DATASETS)
def test_the_seed_chooses_the_split(name):
    one, again, other = (DATASETS[name](seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.x_test, again.x_test)
    np.testing.assert_array_equal(one.t_train, again.t_train)
    assert not np.array_equal(one.t_train, other.t_train)


def test_no_row_is_in_both_parts():
    """Of the tables, digits are known to have no two equal rows."""
    table = DATASETS["digits"](0)
    both = np.vstack([table.x_train, table.x_test])
    assert len(np.unique(both, axis=0)) == len(both) == 1797


def test_text_is_pieces_of_modules_in_two_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(data.os, "__file__", str(tmp_path / "os.py"))
    monkeypatch.setattr(data, "_MODULES", "one two")
    (tmp_path / "one.py").write_text("a" * 18 + "é\n", encoding="utf-8")
    (tmp_path / "two.py").write_text("b" * 30, encoding="utf-8")
    text = source_text(50, seed=0)
    parts = {text.decode(text.train), text.decode(text.test)}
    other = "\N{REPLACEMENT CHARACTER}"
    assert parts in (
        {"a" * 18 + "b" * 27, f"{other}\n" + "b" * 3},
        {"b" * 27 + "a" * 18, "b" * 3 + f"{other}\n"},
    )
    assert len(source_text(10).train) == 9
    with pytest.raises(UserError, match="there are 50 characters of source, and 51 are asked for"):
        source_text(51)
    (tmp_path / "one.py").unlink()
    with pytest.raises(UserError, match=r"cannot read the source .*one\.py"):
        source_text(50)


def test_text_is_python():
    text = source_text(200_000, seed=1)
    assert len(text.alphabet) == len(set(text.alphabet)) == 97
    assert text.train.dtype == np.uint8
    assert max(text.train.max(), text.test.max()) < 97
    assert len(text.train) + len(text.test) == 200_000
    assert abs(len(text.test) - 20_000) < 10
    shown = text.decode(text.train)
    assert shown.count("    def ") > 100
    assert shown.count(text.alphabet[-1]) < 1000
    assert text.decode(text.test) not in shown
    np.testing.assert_array_equal(text.train, source_text(200_000, seed=1).train)
    assert not np.array_equal(text.train[:1000], source_text(200_000, seed=2).train[:1000])


def test_all_modules_are_there():
    assert len(source_text(2_000_000).train) > 1_790_000


# ---------------------------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 5, 23])
def test_each_pass_has_every_row(steps):
    rows = row_numbers(10, 4, seed=0, steps=steps)
    assert rows.shape == (steps, 4)
    assert rows.dtype == np.int32
    whole = rows.ravel()[: rows.size // 10 * 10].reshape(-1, 10)
    np.testing.assert_array_equal(np.sort(whole), np.broadcast_to(np.arange(10), whole.shape))
    assert len(np.unique(whole, axis=0)) == len(whole)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_can_be_trained_side_by_side(name):
    """Two members in one program: losses, gradients and scores are finite, and those of an untrained model."""
    problem = PROBLEMS[name]()
    assert repr(problem).startswith(f"Problem {problem.name}: ")
    batches = problem.batches(0, 3)
    np.testing.assert_array_equal(batches, problem.batches(0, 3))
    assert not np.array_equal(batches, problem.batches(1, 3))
    assert len(problem.batches(0)) == 300
    keys = jax.random.split(jax.random.key(0), 8)
    params = quick_jit(jax.vmap(problem.init))(keys)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    gradient = jax.vmap(jax.value_and_grad(problem.loss_fn), in_axes=(0, None))
    losses, grads = quick_jit(gradient)(params, batches[0])
    assert losses.shape == (8,)
    assert len(np.unique(losses)) == 8
    assert abs(np.median(losses) - UNTRAINED[name]) < 0.5
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(grads))
    scores = quick_jit(jax.vmap(problem.evaluate))(params)
    assert scores.keys() == {"test_loss", "R2" if name == "diabetes" else "accuracy"}
    assert abs(np.median(scores["test_loss"]) - UNTRAINED[name]) < 0.5
    assert all(x.shape == (8,) and np.isfinite(x).all() for x in scores.values())


def test_loss_and_scores_are_what_they_are_called():
    """A linear model of zeros: the loss of all batches' rows, and R² of the mean of the training rows."""
    table = DATASETS["diabetes"](0)
    problem = table_mlp(table, (), batch=1000)
    zeros = {"hidden": [], "output": {"w": jnp.zeros((10, 1)), "b": jnp.zeros(1)}}
    (rows,) = problem.batches(0, 1)
    assert sorted(rows) == list(range(len(table.x_train)))
    np.testing.assert_allclose(quick_jit(problem.loss_fn)(zeros, rows), np.mean(table.t_train**2), rtol=1e-5)
    scores = quick_jit(problem.evaluate)(zeros)
    t = table.t_test
    np.testing.assert_allclose(scores["test_loss"], np.mean(t**2), rtol=1e-5)
    np.testing.assert_allclose(scores["R2"], 1 - np.sum(t**2) / np.sum((t - t.mean()) ** 2), rtol=1e-4)

    table = DATASETS["wine"](0)
    problem = table_mlp(table, ())
    favourite = {"hidden": [], "output": {"w": jnp.zeros((13, 3)), "b": jnp.array([0.0, 1.0, 0.0])}}
    assert quick_jit(problem.evaluate)(favourite)["accuracy"] == np.float32(np.mean(table.t_test == 1))


def paths(params):
    return {jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in jax.tree.leaves_with_path(params)}


def test_names_of_parameters():
    """Patterns and counts of axes select what one means by them."""
    params = jax.eval_shape(source_transformer(1, 16, 2, context=8, characters=2000).init, jax.random.key(0))
    assert paths(params) == {
        "embedding/tokens",
        "embedding/positions",
        "blocks/0/attention/norm/scale",
        "blocks/0/attention/qkv/w",
        "blocks/0/attention/out/w",
        "blocks/0/mlp/norm/scale",
        "blocks/0/mlp/up/w",
        "blocks/0/mlp/down/w",
        "norm/scale",
        "head/w",
    }
    assert paths(jax.eval_shape(digits_mlp().init, jax.random.key(0))) == {
        "hidden/0/w",
        "hidden/0/b",
        "output/w",
        "output/b",
    }
    rule = jr.partition({"muon": jr.muon(0.02), "adamw": jr.adamw(1e-3, where=jr.matrices)}, by={"muon": "blocks/**/w"})
    updates, _ = jax.eval_shape(rule.update, params, jax.eval_shape(rule.init, params), params)
    assert paths(updates) == paths(params)


def test_the_transformer_does_not_see_what_comes():
    """It sees the order of what was, which without positions only tokens between the two would tell."""
    params = quick_jit(lambda key: init_transformer(key, symbols=7, blocks=1, width=8, context=6))(jax.random.key(0))
    forward = quick_jit(lambda tokens: transformer(params, tokens, heads=2))
    tokens = np.array([[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]])
    before = forward(tokens)
    assert before.shape == (2, 6, 7)
    assert np.all(np.any(before[0] != before[1], axis=-1))
    for place in range(6):
        changed = tokens.copy()
        changed[0, place] = 6
        differs = np.any(forward(changed) != before, axis=-1)
        np.testing.assert_array_equal(differs, [np.arange(6) >= place, np.zeros(6, bool)])


def test_targets_are_the_next_characters():
    problem = source_transformer(1, 16, 2, context=8, characters=5000, batch=2)
    params = quick_jit(problem.init)(jax.random.key(0))
    rows = problem.batches(0, 1)[0]
    train = source_text(5000).train.astype(int)
    pieces = train[8 * rows[:, None] + np.arange(9)]
    logits = quick_jit(lambda x: transformer(params, x, heads=2))(pieces[:, :-1])
    expected = -np.mean(np.take_along_axis(np.log(np_softmax(logits)), pieces[:, 1:, None], axis=2))
    np.testing.assert_allclose(quick_jit(problem.loss_fn)(params, rows), expected, rtol=1e-5)


def np_softmax(x):
    e = np.exp(np.asarray(x, float))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("name", "steps", "rate", "drop"), [("source", 60, 1e-2, 0.8), ("digits", 60, 1e-2, 1.5)])
def test_it_learns(name, steps, rate, drop):
    problem, rule = PROBLEMS[name](), jr.adamw(rate)

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(problem.loss_fn)(params, batch)
        return rule.apply(grads, state, params), loss

    params = quick_jit(problem.init)(jax.random.key(0))
    run = quick_jit(lambda params, batches: jax.lax.scan(step, (params, rule.init(params)), batches))
    (trained, _), losses = run(params, problem.batches(0, steps))
    assert losses[-10:].mean() < losses[0] - drop
    assert quick_jit(problem.evaluate)(trained)["test_loss"] < losses[0] - drop


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: digits_mlp((64, 0)), "table_mlp: sizes must be positive integers"),
        (lambda: digits_mlp(batch=0), "table_mlp: sizes must be positive integers"),
        (lambda: source_transformer(width=30), "width 30 must be a multiple of heads, 4"),
        (lambda: source_transformer(characters=100), "no piece of 64"),
    ],
)
def test_what_cannot_be_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
