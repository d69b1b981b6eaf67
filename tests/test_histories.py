"""Histories: what is recorded of each step is what a loop in NumPy finds."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import jaxopt_rules as jr
from jaxopt_rules.experiments import histories
from jaxopt_rules.experiments.histories import History, history, observe

pytest.importorskip("matplotlib").use("Agg")


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


STEPS = 12


def start(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {"b": jnp.zeros(2, dtype), "w": jnp.array(rng.normal(size=(4, 2)), dtype)}


def batches():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(STEPS, 8, 4)).astype(np.float32)
    return x, x[..., :2] - 3 * x[..., 2:]


def loss_fn(params, batch):
    x, t = batch
    return jnp.mean((x @ params["w"] + params["b"] - t) ** 2)


def seen(rule, params=None, **keywords) -> History:
    arguments = {"loss_fn": loss_fn, "batches": batches(), "shown": False} | keywords
    return history(rule, params=start() if params is None else params, **arguments)


def by_hand(rule, params, names=("b", "w")):
    """Losses, parameters (before and behind each step), gradients and states, step by step, in NumPy's double."""
    step = quick_jit(lambda p, s, g: rule.apply(g, s, p))
    gradient = quick_jit(jax.value_and_grad(loss_fn))
    state, course = rule.init(params), []
    for batch in zip(*batches(), strict=True):
        loss, grads = gradient(params, batch)
        new, state = step(params, state, grads)
        wide = [{k: np.asarray(tree[k], float) for k in names} for tree in (params, new, grads)]
        course.append((float(loss), *wide, state))
        params = new
    return course


def norm(tree, names):
    return np.sqrt(sum(np.sum(np.square(tree[k])) for k in names))


def assert_follows(found, course, groups, rtol):
    for group, names in groups.items():
        grads = [norm(g, names) for _, _, _, g, _ in course]
        params = [norm(p, names) for _, p, _, _, _ in course]
        changes = [norm({k: new[k] - old[k] for k in names}, names) for _, old, new, _, _ in course]
        ratios = [change / size if size else 0.0 for change, size in zip(changes, params, strict=True)]
        np.testing.assert_allclose(found.series[f"grad_norm.{group}"], grads, rtol=rtol)
        np.testing.assert_allclose(found.series[f"param_norm.{group}"], params, rtol=rtol)
        np.testing.assert_allclose(found.series[f"update_ratio.{group}"], ratios, rtol=10 * rtol)


PARTITIONED = jr.chain(
    jr.clip_by_global_norm(3.0),
    jr.partition(
        {"matrix": jr.adamw(jr.Cosine(0.3, STEPS), weight_decay=0.1), "rest": jr.sgd(0.1)}, by={"matrix": "w"}
    ),
)


def test_a_clip_and_two_groups():
    found, course = seen(PARTITIONED), by_hand(PARTITIONED, start())
    np.testing.assert_allclose(found.series["loss"], [loss for loss, *_ in course], rtol=1e-5)
    assert_follows(found, course, {"matrix": ["w"], "rest": ["b"]}, 1e-5)
    grads = np.array([norm(g, ["b", "w"]) for _, _, _, g, _ in course])
    np.testing.assert_allclose(found.series["grad_norm"], grads, rtol=1e-5)
    np.testing.assert_array_equal(found.series["clipped"], grads > 3)
    np.testing.assert_array_equal(found.series["max_norm"], 3)
    rates = [jr.Cosine(0.3, STEPS)(k) for k in range(STEPS)]
    np.testing.assert_allclose(found.series["matrix.learning_rate"], rates, rtol=1e-6)
    assert found.clip_fraction == {"clipped": pytest.approx(np.mean(grads > 3))}
    assert 0 < found.clip_fraction["clipped"] < 1


def test_it_ends_with_what_one_can_go_on_with():
    found, course = seen(PARTITIONED), by_hand(PARTITIONED, start())
    np.testing.assert_allclose(found.params["w"], course[-1][2]["w"], rtol=1e-5)
    state = course[-1][-1]
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found.state, state)


def test_bfloat16_is_measured_as_it_is_rounded():
    rule = jr.adamw(1e-3)
    found, course = seen(rule, start(jnp.bfloat16)), by_hand(rule, start(jnp.bfloat16))
    assert found.params["w"].dtype == jnp.bfloat16
    assert all(x.dtype == np.float32 for x in found.series.values())
    assert_follows(found, course, {"all": ["b", "w"]}, 2e-2)
    assert found.series["update_ratio.all"][0] != pytest.approx(seen(rule).series["update_ratio.all"][0], rel=1e-3)


def test_a_step_that_is_not_taken():
    rule = jr.skip_nonfinite(jr.adam(0.1))
    x, t = batches()
    x[[3, 4, 8]] = np.nan
    found = seen(rule, batches=(x, t))
    np.testing.assert_array_equal(np.flatnonzero(found.skipped), [3, 4, 8])
    ratios = found.series["update_ratio.all"]
    np.testing.assert_array_equal(np.flatnonzero(ratios == 0), [3, 4, 8])
    assert np.isnan(found.series["grad_norm.all"][3])
    assert "3 skipped" in repr(found)
    assert found.plot_series("loss").get_lines()[-1].get_xdata().tolist() == [4, 5, 9]


def test_groups_of_ones_own():
    found = seen(jr.adam(0.1), groups={"weights": jr.by_ndim(2)})
    assert_follows(found, by_hand(jr.adam(0.1), start()), {"weights": ["w"], "rest": ["b"]}, 1e-5)
    assert "grad_norm.all" not in found.series


def test_what_is_frozen_or_has_no_gradient_is_in_no_group():
    frozen = seen(jr.freeze(jr.adam(0.1), "b"))
    assert_follows(frozen, by_hand(jr.freeze(jr.adam(0.1), "b"), start()), {"all": ["w"]}, 1e-5)
    params = start() | {"n": jnp.arange(3), "name": "linear"}
    grads = {"b": None, "w": jnp.ones((4, 2)), "n": None, "name": None}
    found = observe(params, params, grads, ())
    assert found["grad_norm.all"] == pytest.approx(8**0.5)
    assert found["param_norm.all"] == pytest.approx(float(jnp.linalg.norm(params["w"])))


def test_weights_of_zero_have_the_ratio_zero():
    zero, one = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    with jax.debug_nans(True):
        assert observe(zero, one, one, ())["update_ratio.all"] == 0


def test_several_clips_have_names_of_their_own():
    clipped = [jr.chain(jr.clip_by_global_norm(c), jr.sgd(0.1)) for c in (1e-3, 1e3)]
    found = seen(jr.partition({"low": clipped[0], "high": clipped[1]}, by={"low": "w"}))
    assert found.clip_fraction == {"low.clipped": 1.0, "high.clipped": 0.0}
    assert {"low.max_norm", "high.max_norm"} <= found.series.keys()
    assert len(found.plot_series("clipped").get_lines()) == 2


def test_it_is_observed_in_a_scan_of_ones_own():
    def body(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        new, state = PARTITIONED.apply(grads, state, params)
        return (new, state), {"loss": loss, **observe(params, new, grads, state, PARTITIONED)}

    params = start()
    (params, state), series = quick_jit(lambda carry: jax.lax.scan(body, carry, batches()))(
        (params, PARTITIONED.init(params))
    )
    own, found = History.of(series, params, state), seen(PARTITIONED)
    assert own.series.keys() == found.series.keys()
    for name, x in own.series.items():
        assert type(x) is np.ndarray
        np.testing.assert_allclose(x, found.series[name], rtol=1e-4, err_msg=name)
    assert own.params is params


def test_aux_and_evaluate():
    found = seen(
        jr.average(jr.sgd(0.01)),
        loss_fn=lambda p, batch: (loss_fn(p, batch), {"bias": jnp.sum(p["b"])}),
        has_aux=True,
        evaluate=lambda p: jnp.sum(p["w"]),
    )
    assert found.series["bias"].shape == (STEPS,)
    assert found.final == {
        "score": pytest.approx(float(jr.eval_params(found.state, found.params)["w"].sum()), rel=1e-5)
    }
    assert "score" in repr(found)


def test_pairs_from_elsewhere_are_recorded():
    pair = jr.Rule(lambda params: (), lambda grads, state, params=None: (jax.tree.map(jnp.negative, grads), state))
    assert seen(pair).series.keys() == {"loss", "grad_norm.all", "param_norm.all", "update_ratio.all"}


def test_its_table_and_pictures():
    found = seen(PARTITIONED)
    rows = {row.series: row for row in found.table.rows}
    assert rows["loss"].first == pytest.approx(found.series["loss"][0], rel=1e-4)
    assert rows["loss"].least == pytest.approx(found.series["loss"].min(), rel=1e-4)
    assert repr(found).startswith("History: 12 steps, clipped in ")
    titles = [ax.get_title() for ax in found.plot()]
    assert titles == ["loss", "learning rate", "grad norm", "update ratio", "param norm", "clipped"]
    ratio = found.plot_series("update_ratio")
    assert ratio.get_yscale() == "log"
    assert [text.get_text() for text in ratio.get_legend().get_texts()] == ["matrix", "rest"]
    assert "<img" in found._repr_html_()
    with pytest.raises(KeyError, match="no 'accuracy', but loss"):
        found.plot_series("accuracy")


def test_an_interrupt_returns_what_there_is(monkeypatch):
    bar = SimpleNamespace(advance=lambda amount: False)
    monkeypatch.setattr(histories, "progress", lambda *_: contextlib.nullcontext(bar))
    found = seen(jr.adam(0.1))
    assert found.interrupted
    assert found.steps == 1
    assert repr(found).startswith("History: 1 steps; interrupted")
    found.plot()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: seen(jr.adam), TypeError, "was it meant to be called"),
        (lambda: seen(jr.adam(0.1), groups={"a": "nothing/**"}), ValueError, "matches none of 'b', 'w'"),
        (lambda: seen(jr.adam(0.1), groups={"a": "w", "b": "*"}), ValueError, "'w' belongs to two groups"),
        (lambda: seen(jr.adam(0.1), groups={"a": 3}), TypeError, "takes a pattern"),
        (lambda: seen(jr.adam(0.1), groups=["w"]), TypeError, "groups is {label: selector}, a rule, or None"),
        (
            lambda: seen(jr.adam(0.1), loss_fn=lambda p, b: (loss_fn(p, b), {"learning_rate": 1.0}), has_aux=True),
            ValueError,
            "needs another name than learning_rate",
        ),
        (lambda: History.of({}), ValueError, "one number for each step, not of nothing"),
        (lambda: History.of({"loss": np.ones((2, 3))}), ValueError, r"not of loss \(2, 3\)"),
        (lambda: History.of({"a": np.ones(2), "b": np.ones(3)}), ValueError, "the series differ in length"),
    ],
)
def test_what_cannot_be_recorded(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_many_groups_leave_room_for_the_curves():
    groups = [f"block{k}/attention" for k in range(25)]
    found = History.of({"loss": [2.0, 1.0]} | {f"grad_norm.{group}": [1.0, 2.0] for group in groups})
    axes = found.plot()
    for ax in [*axes, found.plot_series("grad_norm")]:
        ax.figure.canvas.draw()
        assert (ax.get_window_extent().size / ax.figure.dpi > 1.5).all()
    assert [ax.get_legend() for ax in axes] == [None, None]
    (legend,) = axes[0].figure.legends
    assert {text.get_text() for text in legend.get_texts()} > set(groups)


def test_no_step_and_one_have_pictures():
    assert History.of({"loss": [], "clipped": []}).plot().shape == (2,)
    assert "<img" in History.of({"loss": []})._repr_html_()
    (line,) = History.of({"loss": [1.0]}).plot_series("loss").get_lines()
    assert line.get_marker() == "o"


def test_histories_are_equal_to_themselves_alone():
    found = History.of({"loss": [1.0, 2.0]})
    assert found == found
    assert found != History.of({"loss": [1.0, 2.0]})
