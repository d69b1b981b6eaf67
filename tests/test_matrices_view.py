"""MatrixView: every line of its table there and back, its parts, and its errors."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules.matrices import MatrixView, viewed

# Of each line of the table: the view, a shape, the shapes of the stacks, and the rows of the first matrix by hand.
TABLE = {
    "Flax kernel": (MatrixView(), (2, 3), [(1, 2, 3)], lambda x: x),
    "PyTorch weight": (MatrixView(rows=-1, columns=-2), (3, 2), [(1, 2, 3)], lambda x: x.T),
    "HWIO": (MatrixView(rows=(-4, -3, -2)), (2, 3, 4, 5), [(1, 24, 5)], lambda x: x.reshape(24, 5)),
    "OIHW": (
        MatrixView(rows=(-3, -2, -1), columns=-4),
        (5, 4, 2, 3),
        [(1, 24, 5)],
        lambda x: x.reshape(5, 24).T,
    ),
    "scanned": (MatrixView(), (6, 2, 3), [(6, 2, 3)], lambda x: x[0]),
    "all heads": (MatrixView(rows=-3, columns=(-2, -1)), (5, 2, 3), [(1, 5, 6)], lambda x: x.reshape(5, 6)),
    "each head": (MatrixView(rows=-3, columns=-1), (5, 2, 3), [(2, 5, 3)], lambda x: x[:, 0]),
    "out of heads": (MatrixView(rows=(-3, -2), columns=-1), (2, 3, 5), [(1, 6, 5)], lambda x: x.reshape(6, 5)),
    "fused": (MatrixView(parts=3), (2, 12), [(3, 2, 4)], lambda x: x[:, :4]),
    "fewer keys": (
        MatrixView(parts=(4, 1, 1)),
        (2, 6),
        [(1, 2, 4), (1, 2, 1), (1, 2, 1)],
        lambda x: x[:, :4],
    ),
    "scanned PyTorch": (MatrixView(rows=-1, columns=-2), (6, 3, 2), [(6, 2, 3)], lambda x: x[0].T),
    "scanned, fused": (MatrixView(parts=2), (6, 2, 4), [(12, 2, 2)], lambda x: x[0][:, :2]),
    "scanned convolution": (
        MatrixView(rows=(-4, -3, -2)),
        (6, 2, 1, 4, 5),
        [(6, 8, 5)],
        lambda x: x[0].reshape(8, 5),
    ),
    "empty": (MatrixView(), (0, 4), [(1, 0, 4)], lambda x: x),
}


@pytest.mark.parametrize(("view", "shape", "stacks", "first"), TABLE.values(), ids=TABLE.keys())
def test_there_and_back(view, shape, stacks, first):
    x = jnp.arange(np.prod(shape)).reshape(shape)
    there = view.stacked(x)
    assert [stack.shape for stack in there] == stacks
    np.testing.assert_array_equal(there[0][0], first(x))
    np.testing.assert_array_equal(view.joined(there, shape), x)
    np.testing.assert_array_equal(view.map(lambda stack: 2 * stack, x), 2 * x)


def test_every_line_of_the_table_is_here():
    written = re.findall(r"\) +(MatrixView\(.*\))$", MatrixView.__doc__, re.MULTILINE)
    sizes = {"parts=(512, 128, 128)": "parts=(4, 1, 1)"}
    for call in written:
        for long, short in sizes.items():
            call = call.replace(long, short)
        assert eval(call) in [view for view, *_ in TABLE.values()], call
    assert len(written) == 10


def test_parts_are_matrices_of_their_own():
    x = jnp.arange(24.0).reshape(2, 12)
    (q, k, v) = MatrixView(parts=3).stacked(x)[0]
    np.testing.assert_array_equal(jnp.concatenate([q, k, v], axis=1), x)
    # Columns that several axes join are parted as they are joined: by heads here.
    heads = x.reshape(2, 4, 3)
    np.testing.assert_array_equal(MatrixView(rows=-3, columns=(-2, -1), parts=2).stacked(heads)[0][1], x[:, 6:])


def test_a_view_is_hashable_however_it_was_written():
    assert MatrixView(rows=[-3, -2], parts=[2, 1]) == MatrixView(rows=(-3, -2), parts=(2, 1))
    assert len({MatrixView(rows=[-3, -2]), MatrixView(rows=(-3, -2))}) == 1


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"rows": 0}, ValueError, "count from the end"),
        ({"rows": (-3, -2), "columns": -2}, ValueError, "at most once"),
        ({"parts": 0}, ValueError, "at least one column"),
        ({"parts": (2, 0)}, ValueError, "at least one column"),
        ({"rows": ()}, TypeError, "rows is an integer or several"),
        ({"columns": "-1"}, TypeError, "columns is an integer or several"),
        ({"parts": 1.5}, TypeError, "parts is an integer or several"),
        ({"parts": True}, TypeError, "parts is an integer or several"),
    ],
)
def test_what_is_no_view_is_refused(keywords, error, text):
    with pytest.raises(error, match=text):
        MatrixView(**keywords)


@pytest.mark.parametrize(
    ("view", "shape", "text"),
    [
        (MatrixView(), (3,), "needs 2 axes, not shape (3,)"),
        (MatrixView(rows=-4), (2, 3), "needs 4 axes"),
        (MatrixView(parts=2), (3, 5), "5 columns of shape (3, 5) do not make these parts"),
        (MatrixView(parts=(2, 2)), (3, 5), "5 columns of shape (3, 5) do not make these parts"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(view, shape, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        view.stacked(jnp.zeros(shape))
    with pytest.raises(ValueError, match=re.escape(text)):
        view.joined([], shape)


LEAVES = {"w": jnp.zeros((2, 3)), "conv": jnp.zeros((2, 2, 3, 4)), "b": jnp.zeros(3), "n": jnp.arange(3)}


def views_of(views, names, **keywords):
    return viewed(views, "muon", **keywords)(names, [LEAVES[name] for name in names])


def test_views_of_leaves():
    conv = MatrixView(rows=(-4, -3, -2))
    assert views_of(None, ["w", "n"]) == [MatrixView(), None]
    assert views_of({"conv": conv}, ["w", "conv"]) == [MatrixView(), conv]
    assert views_of([(lambda path, p: p.ndim == 4, conv)], ["conv"]) == [conv]
    assert views_of(MatrixView(parts=3), ["w"]) == [MatrixView(parts=3)]
    # To some rules a leaf need not be a matrix.
    assert views_of({"conv": conv}, ["w", "conv", "b", "n"], partial=True) == [None, conv, None, None]
    assert views_of(MatrixView(), ["w", "b"], partial=True) == [MatrixView(), None]


@pytest.mark.parametrize(
    ("views", "names", "text"),
    [
        (None, ["b"], "muon is for matrices, and 'b' has shape (3,)"),
        (None, ["conv"], "which axes of 'conv', of shape (2, 2, 3, 4), are rows"),
        ({"conv": MatrixView(), "c*": MatrixView()}, ["conv"], "two views"),
        ({"w": MatrixView(parts=2)}, ["w"], "muon: 'w': MatrixView(rows=-2, columns=-1, parts=2): 3 columns"),
        ({"x": MatrixView()}, ["w"], "'x'"),
    ],
)
def test_leaves_without_a_view_of_theirs_are_refused(views, names, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        views_of(views, names)


@pytest.mark.parametrize("views", ["w", 3, [MatrixView()], {"w": 3}], ids=repr)
def test_what_says_no_views_is_refused(views):
    with pytest.raises(TypeError, match="views are a MatrixView, or one for each selector"):
        viewed(views, "muon")


def test_a_view_is_static_to_a_leaf_function():
    """What the docstring of `viewed` says: a formula that is given views."""

    class State(NamedTuple):
        count: jax.Array
        hyper: dict

    def total(g, *, view):
        return g * len(view.stacked(g))

    rule = jr.leafwise(total, State, given={"view": viewed({"w": MatrixView(parts=(2, 1))}, "total")})
    params = {"w": jnp.ones((2, 3)), "v": jnp.ones((2, 3))}
    d, _ = jax.jit(rule.update)(params, rule.init(params), params)
    assert float(d["w"][0, 0]) == 2
    assert float(d["v"][0, 0]) == 1
