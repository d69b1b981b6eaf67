"""The range test: rates that are known in closed form, and runs that tell nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules.experiments import plots, range_test
from jaxopt_rules.experiments.range_test import learning_rate_range_test

pytest.importorskip("matplotlib").use("Agg")


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


BATCHES = jnp.zeros(7)


def quadratic(w, batch):
    return 0.5 * jnp.sum(w**2)


def ranged(make_rule=jr.sgd, loss_fn=quadratic, params=None, batches=BATCHES, steps=100, **keywords):
    params = jnp.ones(2) if params is None else params
    arguments = {"low": 1e-4, "high": 10.0, "shown": False} | keywords
    return learning_rate_range_test(make_rule, loss_fn, params, batches, steps, **arguments)


@pytest.fixture(scope="module")
def found():
    return ranged(low=1e-2, high=100.0, window=3)


def test_rates_of_a_quadratic(found):
    """Behind K steps per factor e of the rate, ½w² is exp(−2Kα) for small α, which falls most at α = 1/(2K) against
    ln α. It grows from α = 2 on, where |1 − α| is 1."""
    per_e = 99 / np.log(1e4)
    grid = 10 ** (4 / 99)
    assert found.steepest == pytest.approx(1 / (2 * per_e), rel=grid - 1)
    assert found.minimum == pytest.approx(2.0, rel=grid - 1)
    assert found.suggestion == found.steepest
    assert found.note == ""


def test_its_losses_are_those_behind_each_update(found):
    np.testing.assert_allclose(found.rates, np.geomspace(1e-2, 100, 100), rtol=1e-12)
    np.testing.assert_allclose(found.start, 1.0)
    course = np.cumprod((1 - found.rates) ** 2)
    np.testing.assert_allclose(found.losses[0, :40], course[:40], rtol=1e-4)


def test_it_stops_where_it_diverged(found):
    assert found.diverged_at == found.rates[found.stop] > 2
    assert np.isnan(found.smoothed[found.stop :]).all()
    assert np.isfinite(found.smoothed[: found.stop]).all()


def test_smoothing_is_centred_and_keeps_a_line():
    line = ranged(lambda rate: jr.set_to_zero(), lambda w, batch: 5 - batch, batches=jnp.arange(5.0), steps=4, window=3)
    np.testing.assert_allclose(line.losses[0], [4, 3, 2, 1])
    np.testing.assert_allclose(line.smoothed[1:3], [3, 2], rtol=1e-6)


def test_a_wide_window_is_bounded_by_the_steps():
    assert np.isfinite(ranged(steps=10, high=0.1, window=1000).smoothed).all()


def noisy(w, batch):
    return 1.0 + 0.1 * batch + 0.0 * jnp.sum(w)


NOISE = jnp.array(np.random.default_rng(0).normal(size=101), jnp.float32)


@pytest.mark.parametrize(
    ("keywords", "suggested", "note"),
    [
        ({"high": 2e-2}, True, "the loss still falls at the end: high = 0.02 is too low"),
        ({"low": 0.3}, True, "the loss falls most at the beginning: low = 0.3 is too high"),
        ({"loss_fn": lambda w, b: jnp.sum(0 * w) + 1}, False, "does not fall between 0.0001 and 10, by more than"),
        ({"loss_fn": noisy, "batches": NOISE}, False, "does not fall between 0.0001 and 10, by more than its noise"),
        ({"make_rule": lambda rate: jr.chain(jr.scale(-1.0), jr.sgd(rate))}, False, "does not fall"),
        ({"loss_fn": lambda w, b: jnp.nan * jnp.sum(w)}, False, "the loss is not finite before the first update"),
        ({"loss_fn": lambda w, b: 1e6 * jnp.sum(w**2)}, False, "the loss diverges at once: low = 0.0001 is too high"),
        ({"make_rule": lambda rate: jr.sgd(0.1)}, False, "make_rule does not use the learning rate that it is given"),
        ({"make_rule": lambda rate: jr.sgd(rate + 0.1)}, True, "the loss falls most at the beginning: low = 0.0001 is"),
        ({"steps": 10}, False, "10 steps are too few to tell a fall of the loss from its noise"),
    ],
)
def test_what_keeps_it_from_telling_more(keywords, suggested, note):
    result = ranged(**keywords)
    assert note in result.note
    assert note in repr(result)
    assert (result.suggestion is not None) == suggested
    assert (result.steepest is None) == (result.minimum is None) == (not suggested)
    assert "<img" in result._repr_html_()


def regression(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def rows(seed, size, sigma=0.1):
    """Batches of so many rows of y = x · (1, −2, 3) + noise. Where there is one, its loss is χ² distributed."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(101, size, 3))
    return jnp.float32(x), jnp.float32(x @ [1, -2, 3] + sigma * rng.normal(size=(101, size)))


@pytest.mark.parametrize("shuffle", range(4))
def test_noise_does_not_diverge(shuffle):
    """Of batches of one row, the first may have a loss far below the others, or far above. Nothing is learnt here."""
    result = ranged(loss_fn=regression, params=jnp.zeros(3), batches=rows(shuffle, 1), low=1e-7, high=1e-5)
    assert result.diverged_at is None
    assert result.suggestion is None
    assert result.note == "the loss is too noisy to tell whether it falls: give seeds, larger batches or more steps"


@pytest.mark.parametrize("size", [1, 8])
def test_what_diverges_within_noise_diverges(size):
    result = ranged(loss_fn=regression, params=jnp.zeros(3), batches=rows(0, size), low=1e-7)
    assert 0.05 < result.diverged_at < 5
    assert np.isfinite(result.loss[: result.stop]).all()


def test_what_falls_within_noise_is_found():
    """The rate of steepest descent is that of the loss without noise, to a factor of two."""
    noisy, exact = (
        ranged(loss_fn=regression, params=jnp.zeros(3), batches=rows(0, size), low=1e-5) for size in (8, 500)
    )
    assert noisy.note == exact.note == ""
    assert noisy.losses[0, :20].std() > 0.3 * noisy.losses[0, :20].mean()
    assert 0.5 < noisy.suggestion / exact.suggestion < 2


def test_one_loss_among_others_does_not_diverge():
    peak = ranged(loss_fn=lambda w, b: 1 + b, batches=jnp.zeros(101).at[50].set(8.0), params=jnp.ones(2))
    assert peak.diverged_at is None
    step = ranged(loss_fn=lambda w, b: 1 + b, batches=jnp.zeros(101).at[50:].set(8.0), params=jnp.ones(2))
    assert step.stop == 49  # updates: the first batch is behind none


def test_what_falls_behind_a_rise_is_no_recovery():
    """Steps of a rate far too high end anywhere, with few rows even where the loss is small."""
    course = jnp.ones(101).at[51:70].set(3.0).at[70:].set(0.0) * (1 + 0.01 * NOISE)
    result = ranged(loss_fn=lambda w, b: b, batches=course)
    assert result.suggestion is None


def test_a_picture_needs_matplotlib_alone(found, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    html = found._repr_html_()
    assert "<img" not in html
    assert "(no picture: matplotlib is not installed)" in html
    assert "steepest" in html


def test_results_are_equal_to_themselves_alone(found):
    assert found == found
    assert found != ranged(steps=20)
    assert len({found, found}) == 1


def test_it_ends_where_the_loss_is_not_finite(monkeypatch):
    monkeypatch.setattr(range_test, "PART", 0.0)  # one step at a time
    result = ranged(loss_fn=lambda w, batch: jnp.where(w[0] == 1, w[0], jnp.nan), low=1.0, steps=20)
    assert np.isnan(result.losses[0, 1:]).all()
    assert not result.interrupted


@pytest.mark.parametrize(
    "make_rule",
    [
        jr.adamw,
        lambda rate: jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(rate)),
        lambda rate: jr.partition({"a": jr.adam(rate), "b": jr.sgd(rate)}, by={"a": "a"}),
    ],
)
def test_rules_are_made_of_the_schedule(make_rule):
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}

    def loss_fn(p, batch):
        return jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2), {"a": jnp.sum(p["a"])}

    result = ranged(make_rule, loss_fn, params, has_aux=True, steps=40)
    assert 1e-4 < result.suggestion < result.minimum


def test_seeds_are_averaged():
    def init(key):
        return jax.random.normal(key, 2)

    result = ranged(params=init, seeds=3, steps=40)
    assert result.losses.shape == (3, 40)
    np.testing.assert_allclose(result.start, [0.5 * np.sum(init(jax.random.key(k)) ** 2) for k in range(3)], rtol=1e-6)
    np.testing.assert_allclose(result.loss[:20], result.losses[:, :20].mean(axis=0), rtol=1e-6)


class Interrupted:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def advance(self, amount, text=""):
        return False


def test_an_interrupt_returns_what_there_is(monkeypatch):
    monkeypatch.setattr(range_test, "progress", lambda *_: Interrupted())
    result = ranged()
    assert result.interrupted
    assert result.note == "interrupted"
    assert result.suggestion is None
    assert "<img" in result._repr_html_()


def test_its_table_and_text(found):
    rows = {row.what: row.learning_rate for row in found.table.rows}
    assert list(rows) == ["steepest", "minimum", "diverged"]
    assert rows["steepest"] == pytest.approx(found.steepest, rel=1e-3)
    assert repr(found).startswith("RangeTest: 100 steps, learning rate 0.01 to 100: suggestion 0.04")


def test_its_picture(found):
    ax = found.plot()
    assert ax.get_xscale() == "log"
    labels = ax.get_legend_handles_labels()[1]
    assert labels[:2] == ["loss", "mean of 3 steps"]
    assert labels[-1] == "diverged"


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"make_rule": jr.sgd(0.1)}, TypeError, "make_rule is a function of the schedule"),
        ({"make_rule": lambda rate: rate}, TypeError, "make_rule takes rules"),
        ({"steps": 2}, ValueError, "steps must be an integer >= 3, not 2"),
        ({"low": 1.0, "high": 0.1}, ValueError, "0 < low < high"),
        ({"low": 0.0}, ValueError, "0 < low < high"),
        ({"window": 0}, ValueError, "window must be an integer of at least 1, not 0"),
        ({"window": 1.5}, ValueError, "window must be an integer of at least 1, not 1.5"),
    ],
)
def test_what_cannot_be_ranged(keywords, error, text):
    with pytest.raises(error, match=text):
        ranged(**keywords)
