"""Checkpoints: states through Orbax, safetensors and pickle, and runs that are killed and resumed.

The packages are the dependency group `interop`; a test whose package is absent is skipped.
"""

import copy
import importlib
import os
import pickle
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit, stepped
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from table import ROWS

import jaxopt_rules as jr

PARAMS = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones(2)}
GRADS = jax.tree.map(lambda p: 0.1 + 0.1 * p, PARAMS)
RULE = jr.chain(jr.clip_grad(1.0), jr.add_noise(0.1, key=3), jr.adamw(jr.Linear(0.1, 9)))


def opened(tree: Any) -> Any:
    """The tree with the data of PRNG keys in their place, which can be compared like any array."""

    def data(x: Any) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else x

    return jax.tree.map(data, tree)


def assert_same(actual: Any, expected: Any) -> None:
    """Bit for bit, in structure, shape, dtype and weak type."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(opened(actual)), jax.tree.leaves(opened(expected)), strict=True):
        assert (x.dtype, x.shape, jax.typeof(x)) == (y.dtype, y.shape, jax.typeof(y))
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@cache
def trained() -> tuple[Any, Any]:
    params, state = PARAMS, RULE.init(PARAMS)
    for _ in range(2):
        params, state = stepped(RULE, params, state, GRADS)
    return params, state


@pytest.fixture
def orbax():
    pytest.importorskip("orbax.checkpoint")
    return pytest.importorskip("jaxopt_rules.interop.orbax")


@pytest.fixture
def files():
    pytest.importorskip("safetensors")
    return pytest.importorskip("jaxopt_rules.interop.safetensors")


@pytest.mark.parametrize(("module", "package"), [("orbax", "orbax.checkpoint"), ("safetensors", "safetensors.numpy")])
def test_a_missing_package_is_one_sentence(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"jaxopt_rules.interop.{module}", raising=False)
    with pytest.raises(ImportError, match=rf'^this needs {package}: pip install "jaxopt_rules\[checkpoints\]"$'):
        importlib.import_module(f"jaxopt_rules.interop.{module}")


# ---------------------------------------------------------------------------------------------------------------------
# Every state
# ---------------------------------------------------------------------------------------------------------------------

OF_ALL_KINDS = {
    "w": jnp.arange(6.0).reshape(3, 2),
    "half": jnp.ones((3, 2), jnp.bfloat16),
    "s": jnp.float32(0.5),
    "empty": jnp.zeros((0, 2)),
    "absent": None,
    "mask": jnp.array([True, False]),
    "tokens": jnp.arange(3, dtype=jnp.int8),
}


@cache
def states() -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of every row at birth, and with other values in all slots."""
    rng = np.random.default_rng(0)

    def filled(x: Any) -> Any:
        inexact = jnp.issubdtype(x.dtype, jnp.floating) and x.ndim
        return jnp.asarray(rng.normal(size=x.shape), x.dtype) if inexact else x

    born = {row.name: row.make().init(OF_ALL_KINDS) for row in ROWS}
    return born, jax.tree.map(filled, born)


def test_every_state_through_orbax(orbax, tmp_path):
    born, later = states()
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params=OF_ALL_KINDS, **later)
        step, restored, _ = checkpoints.restore(params=OF_ALL_KINDS, **born)
    assert step == 1
    assert_same(restored.pop("params"), OF_ALL_KINDS)
    assert_same(restored, later)
    assert not any(x.committed for x in jax.tree.leaves(restored))


def test_every_state_through_safetensors(files, tmp_path):
    born, later = states()
    born, later = born | {"params": OF_ALL_KINDS}, later | {"params": OF_ALL_KINDS}
    files.save(tmp_path / "all.safetensors", later)
    saved = files.load(tmp_path / "all.safetensors")
    assert saved["params.half"].dtype == jnp.bfloat16
    assert_same(jr.load_state_dict(born, saved)[0], later)


def test_every_state_through_pickle_and_deepcopy():
    """JAX has no pickle of typed PRNG keys; `state_dict` holds their numbers."""
    _, later = states()
    assert_same(copy.deepcopy(later), later)
    plain = {name: state for name, state in later.items() if not has_keys(state)}
    assert_same(pickle.loads(pickle.dumps(plain)), plain)


def has_keys(tree: Any) -> bool:
    return any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(tree))


def test_names_with_all_sorts_of_characters(orbax, files, tmp_path):
    params = {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(2)}, "é <~>%": {"..": jnp.ones(3), "#2": jnp.zeros(1)}}
    files.save(tmp_path / "odd", params)
    assert_same(jr.load_state_dict(params, files.load(tmp_path / "odd"))[0], params)
    with orbax.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(0, params=params)
        assert_same(checkpoints.restore(params=params).trees["params"], params)


def test_numbers_and_numpy_arrays_stay_what_they_are(orbax, tmp_path):
    data = {"position": 2**40, "epoch": 3, "order": np.arange(4), "done": True, "pole": 1 + 2j}
    born = dict.fromkeys(data, 0) | {"order": np.zeros(4, int), "done": False, "pole": 0j}
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, data=data, flag=np.True_)
        restored = checkpoints.restore(data=born)
        assert checkpoints.restore(flag=np.False_).trees["flag"]
    chex.assert_trees_all_equal(restored.trees["data"], data)
    assert {name: type(x) for name, x in restored.trees["data"].items()} == {k: type(x) for k, x in data.items()}


def test_what_is_no_array_is_named(orbax, files, tmp_path):
    tree = {"layer": {"w": jnp.ones(2), "activation": jnp.tanh}}
    with pytest.raises(TypeError, match=r"'layer\.activation' is .*, which cannot be saved"):
        files.save(tmp_path / "x", tree)
    with orbax.Checkpoints(tmp_path / "run") as checkpoints, pytest.raises(TypeError, match=r"'layer\.activation'"):
        checkpoints.save(0, model=tree)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "x", [2**70, np.array(["text"]), np.array([None]), np.zeros(2, "M8[s]"), np.ones(2, jnp.uint2)]
)
def test_what_orbax_cannot_hold_is_named(orbax, tmp_path, x):
    """And before Orbax is asked, which begins to write and then keeps the process from its end for minutes."""
    with orbax.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=r"Orbax cannot save 'b\.x' of data, which is of dtype "):
            checkpoints.save(0, data={"a": jnp.ones(2), "b": {"x": x}})
        assert not list(tmp_path.iterdir())
        assert checkpoints.save(0, data={"a": jnp.ones(2)})


def test_types_that_numpy_does_not_know(orbax, tmp_path):
    tree = {name: jnp.ones(2, name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")}
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, tree=tree)
        assert_same(jr.load_state_dict(tree, checkpoints.load()["tree"])[0], tree)


# ---------------------------------------------------------------------------------------------------------------------
# Orbax: shardings, parts, changed rules
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_restored_onto_another_sharding(orbax, tmp_path, abstract):
    mesh = Mesh(jax.devices(), "x")
    rows = {"w": NamedSharding(mesh, PartitionSpec("x")), "b": NamedSharding(mesh, PartitionSpec())}
    columns = {"w": NamedSharding(mesh, PartitionSpec(None, "x")), "b": NamedSharding(mesh, PartitionSpec("x"))}
    params = {"w": jnp.arange(8.0).reshape(4, 2), "b": jnp.ones(2)}
    there = jax.device_put(params, rows)
    there, state = RULE.apply(there, RULE.init(there), there)
    here = jax.device_put(params, columns)
    like = {"params": here, "state": RULE.init(here)}
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params=there, state=state)
        restored = checkpoints.restore(**(wanted if abstract else like)).trees
    assert_equal_values(restored, {"params": there, "state": state})
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert restored["state"][2][0].m["w"].sharding.spec == PartitionSpec(None, "x")


def assert_equal_values(actual: Any, expected: Any) -> None:
    chex.assert_trees_all_equal(opened(actual), opened(expected))


def test_abstract_states_need_no_memory_beforehand(orbax, tmp_path):
    params, state = trained()
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state=state)
        like = jax.eval_shape(RULE.init, params)
        assert_same(checkpoints.restore(state=like).trees["state"], state)
        more = jax.eval_shape(jr.chain(jr.centralize(), jr.weight_decay(0.1), RULE).init, params)
        with pytest.raises(ValueError, match=r"state: .*weight_decay\.count.* cannot be loaded and is abstract"):
            checkpoints.restore(state=more, strict=False)


def test_parts_of_a_checkpoint(orbax, tmp_path):
    params, state = trained()
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params=params, state=state)
        assert_same(checkpoints.restore(params=PARAMS).trees, {"params": params})
        slots = jr.adam_direction().init(PARAMS)
        _, restored, reports = checkpoints.restore(state=slots, strict=False)
        with pytest.raises(ValueError, match=r"1, state: the saved state does not fit: add_noise\.count is unexpected"):
            checkpoints.restore(state=slots)
    assert_same(restored["state"].m, state[2][0].m)
    assert not reports["state"].missing


def test_a_tree_that_is_not_there_is_named(orbax, tmp_path):
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params=PARAMS, state=())
        with pytest.raises(ValueError, match=r"/1 has no tree 'parms'; the trees in it are: 'params', 'state'$"):
            checkpoints.restore(parms=PARAMS, state=())
        with pytest.raises(ValueError, match=r"has no tree 'parms' and no tree 'ema'; "):
            checkpoints.restore(parms=PARAMS, params=PARAMS, ema=PARAMS)
        _, restored, reports = checkpoints.restore(params=GRADS, ema=GRADS, state=(), strict=False)
    assert_same(restored, {"params": PARAMS, "ema": GRADS, "state": ()})
    assert reports["ema"].missing == ("b", "w")


def test_a_hook_more_and_a_number_in_place_of_a_schedule(orbax, tmp_path):
    params, state = trained()
    rule = jr.chain(jr.weight_decay(0.1), jr.clip_grad(1.0), jr.add_noise(0.1, key=3), jr.adamw(0.5))
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state=state)
        for hyperparams, rate in (("saved", state[2][1].hyper["learning_rate"].value), ("new", np.float32(0.5))):
            _, restored, reports = checkpoints.restore(state=rule.init(params), strict=False, hyperparams=hyperparams)
            assert all(name.startswith("weight_decay") for name in reports["state"].missing)
            assert not reports["state"].unexpected
            assert jr.hyperparams(restored["state"])["learning_rate"] == rate
            assert_same(restored["state"][3][0].m, state[2][0].m)


def test_another_shape_is_an_error_or_stays(orbax, tmp_path):
    other = {"w": jnp.full((2, 2), 7.0), "b": jnp.zeros(2), "new": jnp.zeros((0, 3))}
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params=PARAMS | {"new": jnp.ones(1)})
        with pytest.raises(ValueError, match=r"w has shape \(3, 2\), not \(2, 2\)"):
            checkpoints.restore(params=other)
        restored = checkpoints.restore(params=other, strict=False)
    assert_same(restored.trees["params"], other | {"b": PARAMS["b"]})
    assert {name for name, *_ in restored.reports["params"].reshaped} == {"w", "new"}


def test_values_are_those_at_the_time_of_saving(orbax, tmp_path):
    """Though files are written later, buffers are donated, and NumPy's arrays written to."""
    step = quick_jit(lambda params, state: RULE.apply(params, state, params), donate_argnums=(0, 1))
    params = {"w": jnp.ones((512, 1024)), "b": jnp.ones(2)}
    state, seen = RULE.init(params), np.zeros(2048)
    with orbax.Checkpoints(tmp_path) as checkpoints:
        expected = []
        for k in range(4):
            expected.append(jax.tree.map(np.array, opened((params, state))))
            checkpoints.save(k, params=params, state=state, seen={"x": seen})
            params, state = step(params, state)
            seen += 1
        for k, (before, slots) in enumerate(expected):
            _, restored, _ = checkpoints.restore(k, params=params, state=state, seen={"x": seen})
            assert_equal_values((restored["params"], restored["state"]), (before, slots))
            assert (restored["seen"]["x"] == k).all()


# ---------------------------------------------------------------------------------------------------------------------
# What is damaged, foreign or missing
# ---------------------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def foreign(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + b"of another program" * 20)


DAMAGES = [cut, emptied, foreign, Path.unlink]
# What Orbax keeps besides and does not need to read.
SPARE = {"_CHECKPOINT_METADATA", "commit_success.txt", "process_0"}


def refusal(read: Any) -> str:
    try:
        read()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_an_error_or_harmless(orbax, tmp_path, damage):
    """Each file of the latest checkpoint in turn. Then the one before it is restored."""
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(200, 100)), jnp.float32)}
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params=big)
        checkpoints.save(2, params=big)
    failed = set()
    for file in sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file()):
        content = file.read_bytes()
        damage(file)
        with orbax.Checkpoints(tmp_path) as checkpoints:
            for read in (lambda c=checkpoints: c.restore(params=big).trees["params"], lambda c=checkpoints: c.load()):
                if message := refusal(read):
                    failed.add(file.relative_to(tmp_path / "2" / "default").parts[0])
                    assert f"{tmp_path}/2" in message
                    assert "tensorstore_spec" not in message
            assert_same(checkpoints.restore(1, params=big).trees["params"], big)
            assert checkpoints.steps == [1, 2]
        file.write_bytes(content)
    assert failed >= {"_METADATA", "manifest.ocdbt", "d", "ocdbt.process_0"}
    assert not failed & SPARE


def test_a_file_that_is_cut_is_never_read_as_something_else(orbax, tmp_path):
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(200, 100)), jnp.float32)}
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params=big)
    for file in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for size in {0, 1, len(content) // 3, len(content) - 1}:
            file.write_bytes(content[:size])
            with orbax.Checkpoints(tmp_path) as checkpoints:
                try:
                    restored = checkpoints.restore(params=jax.tree.map(jnp.zeros_like, big))
                except ValueError:
                    continue
                assert_same(restored.trees["params"], big)
        file.write_bytes(content)


def test_what_is_not_there_or_not_ours(orbax, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotADirectoryError, match="file is a file, not a directory of checkpoints"):
        orbax.Checkpoints(tmp_path / "file")
    with orbax.Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(FileNotFoundError, match=r"there is no checkpoint in .*run"):
            checkpoints.restore(params=PARAMS)
        checkpoints.save(3, params=PARAMS)
        with pytest.raises(FileNotFoundError, match=r"run has no checkpoint of step 2; it has 3"):
            checkpoints.restore(2, params=PARAMS)
    (tmp_path / "run" / "7").mkdir()
    (tmp_path / "run" / "7" / "notes.txt").write_text("text")
    with ocp.CheckpointManager(tmp_path / "run") as others:
        others.save(8, args=ocp.args.StandardSave(PARAMS))
    with orbax.Checkpoints(tmp_path / "run") as checkpoints:
        for step in (7, 8):
            with pytest.raises(ValueError, match=rf"run/{step} (was not written by Checkpoints|is damaged)"):
                checkpoints.restore(step, params=PARAMS)
        assert_same(checkpoints.restore(3, params=PARAMS).trees["params"], PARAMS)


def test_what_was_left_unfinished_is_not_read(orbax, files, tmp_path):
    run, path = tmp_path / "run", tmp_path / "x.safetensors"
    with orbax.Checkpoints(run) as checkpoints:
        checkpoints.save(1, params=PARAMS)
    shutil.copytree(run / "1", run / "2.orbax-checkpoint-tmp")
    files.save(path, PARAMS)
    path.with_name(".x.safetensors-1.tmp").write_bytes(path.read_bytes()[:20])
    with orbax.Checkpoints(run) as checkpoints:
        assert checkpoints.latest_step == 1
        checkpoints.save(2, params=GRADS)
        assert_same(checkpoints.restore(params=PARAMS).trees["params"], GRADS)
        assert_same(checkpoints.restore(1, params=PARAMS).trees["params"], PARAMS)
    files.save(path, GRADS)
    assert_same(jr.load_state_dict(PARAMS, files.load(path))[0], GRADS)


def test_a_step_that_is_there_is_not_overwritten(orbax, tmp_path):
    with orbax.Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 6):
            assert checkpoints.save(step, params=PARAMS)
        checkpoints.wait()
        assert checkpoints.steps == [5, 6]
        for step in (6, 2):
            with pytest.raises(ValueError, match=rf"has a checkpoint of step 6, so that step {step} cannot be saved"):
                checkpoints.save(step, params=GRADS)
        checkpoints.manager.delete(6)
        checkpoints.save(6, params=GRADS)
        assert_same(checkpoints.restore(params=PARAMS).trees["params"], GRADS)


def test_what_another_manager_saved_is_not_overwritten(orbax, tmp_path):
    """Two of one directory, as of two processes: each has a list of its own of what is there."""
    with orbax.Checkpoints(tmp_path, keep=3) as one, orbax.Checkpoints(tmp_path, keep=3) as other:
        one.save(1, params=PARAMS)
        one.wait()
        assert (other.latest_step, other.restore(params=GRADS).step) == (1, 1)
        one.save(5, params=PARAMS)
        one.wait()
        assert other.steps == [1, 5]
        for step in (5, 3):
            with pytest.raises(ValueError, match=rf"has a checkpoint of step 5, so that step {step} cannot be saved"):
                other.save(step, params=GRADS)
        assert_same(other.restore(params=GRADS).trees["params"], PARAMS)
        for step, checkpoints in ((6, other), (7, one), (8, other)):
            assert checkpoints.save(step, params=GRADS)
            checkpoints.wait()
        assert one.steps == other.steps == [6, 7, 8]
        other.manager.delete(8)
        assert one.save(8, params=PARAMS)
        assert_same(one.restore(params=GRADS).trees["params"], PARAMS)


def test_a_step_that_is_still_being_written_is_not_overwritten(orbax, tmp_path):
    with orbax.Checkpoints(tmp_path, save_interval_steps=2) as checkpoints:
        assert [checkpoints.save(step, params=PARAMS) for step in range(4)] == [True, False, True, False]
        with pytest.raises(ValueError, match="has a checkpoint of step 2, so that step 2 cannot be saved"):
            checkpoints.save(2, params=GRADS)
        assert checkpoints.steps == [0, 2]
        assert_same(checkpoints.restore(params=GRADS).trees["params"], PARAMS)


def test_a_directory_that_is_removed_meanwhile(orbax, tmp_path):
    with orbax.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(5, params=PARAMS)
        checkpoints.wait()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
            checkpoints.restore(params=PARAMS)
        assert checkpoints.latest_step is None
        assert checkpoints.save(5, params=PARAMS)
        assert checkpoints.restore(params=GRADS).step == 5


def test_what_is_deleted_while_it_is_listed_is_no_error(orbax, tmp_path, monkeypatch):
    with orbax.Checkpoints(tmp_path) as one, orbax.Checkpoints(tmp_path) as other:
        for step in (1, 2):
            one.save(step, params=PARAMS)
        one.wait()
        reload, seen = other.manager.reload, []

        def reload_while_one_is_deleted():
            seen.append(len(seen))
            if len(seen) == 1:
                shutil.rmtree(tmp_path / "1")
                raise FileNotFoundError(tmp_path / "1")
            reload()

        monkeypatch.setattr(other.manager, "reload", reload_while_one_is_deleted)
        assert other.restore(params=GRADS).step == 2
        assert seen == [0, 1]
        assert other.steps == [2]


def test_names_of_steps(orbax, tmp_path):
    with orbax.Checkpoints(tmp_path, step_prefix="at", step_format_fixed_length=4) as checkpoints:
        checkpoints.save(np.int64(7), params=PARAMS)
        with pytest.raises(ValueError, match=r"/at_0007 has no tree 'ema'"):
            checkpoints.restore(jnp.int32(7), ema=PARAMS)
        assert checkpoints.steps == [7]


@pytest.mark.parametrize(
    ("step", "trees", "error", "match"),
    [
        (1, {}, ValueError, r"save\(1\) is given no tree; name what is to be saved: save\(1, params=params\)"),
        (-1, {"params": PARAMS}, ValueError, "a step is at least 0, not -1"),
        (1.5, {"params": PARAMS}, TypeError, "'float' object cannot be interpreted as an integer"),
    ],
)
def test_what_cannot_be_saved_leaves_no_trace(orbax, tmp_path, step, trees, error, match):
    with orbax.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(error, match=match):
            checkpoints.save(step, **trees)
        assert not list(tmp_path.iterdir())
        assert checkpoints.save(1, params=PARAMS)


def test_what_is_closed_says_so(orbax, tmp_path):
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params=PARAMS)
    checkpoints.close()
    for use in (
        lambda: checkpoints.save(2, params=PARAMS),
        lambda: checkpoints.restore(params=PARAMS),
        checkpoints.load,
    ):
        with pytest.raises(ValueError, match=r"these checkpoints, of .*, are closed: open them again"):
            use()
    assert (checkpoints.latest_step, checkpoints.steps) == (1, [1])
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("damage", [cut, emptied, foreign])
def test_a_damaged_safetensors_file_is_named(files, tmp_path, damage):
    path = tmp_path / "x.safetensors"
    files.save(path, trained()[1])
    damage(path)
    with pytest.raises(ValueError, match=r"x\.safetensors, of \d+ bytes, is not a safetensors file or only a part"):
        files.load(path)


def test_each_length_of_a_safetensors_file(files, tmp_path):
    path = tmp_path / "x.safetensors"
    files.save(path, PARAMS)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"of {size} bytes"):
            files.load(path)


def test_other_errors_of_safetensors(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none"):
        files.load(tmp_path / "none")
    with pytest.raises(ValueError, match="is a directory"):
        files.load(tmp_path)
    for dtype in (np.complex128, jnp.int4, "O"):
        with pytest.raises(TypeError, match=r"x: safetensors cannot hold 'a', of dtype"):
            files.save(tmp_path / "x", {"a": np.zeros(2, dtype)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", ["chmod", "fsync", "replace"])
def test_saving_that_fails_leaves_the_file_as_it_was(files, tmp_path, monkeypatch, function):
    path = tmp_path / "x.safetensors"
    files.save(path, PARAMS)
    path.chmod(0o640)
    files.save(path, PARAMS)
    assert path.stat().st_mode & 0o777 == 0o640

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, function, fails)
    with pytest.raises(OSError, match="no space left"):
        files.save(path, GRADS)
    assert_same(jr.load_state_dict(GRADS, files.load(path))[0], PARAMS)
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# Other holders of states
# ---------------------------------------------------------------------------------------------------------------------


def through_orbax(orbax, files, path, saved):
    with orbax.Checkpoints(path) as checkpoints:
        checkpoints.save(0, optimizer=saved)
        return checkpoints.load()["optimizer"]


def through_safetensors(orbax, files, path, saved):
    files.save(path, saved)
    return files.load(path)


@pytest.mark.parametrize("through", [through_orbax, through_safetensors])
def test_the_mutating_layer(orbax, files, tmp_path, through):
    tree = {"block": {"w": jnp.ones((2, 2))}, "b": jnp.ones(2)}
    grads = jax.tree.map(lambda p: 0.1 * p, tree)
    first = jr.Adam(hook=[jr.clip_grad(0.1)])
    model = first.update(first.update(tree, grads), grads)
    saved = first.state_dict(model)
    loaded = through(orbax, files, tmp_path / "saved", saved)
    assert loaded.keys() == saved.keys()
    second = jr.Adam(hook=[jr.clip_grad(0.1)])
    second.load_state_dict(model, loaded)
    assert_same(second.update(model, grads), first.update(model, grads))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:flax")
def test_flax_train_state_and_nnx_optimizer(orbax, tmp_path):
    train_state = pytest.importorskip("flax.training.train_state")
    nnx = pytest.importorskip("flax.nnx")
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=RULE)
    later = state.apply_gradients(grads=GRADS)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, RULE, wrt=nnx.Param)
    born = nnx.state(optimizer)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    with orbax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, linen=later, nnx=nnx.state(optimizer), model=nnx.state(model))
        restored = checkpoints.restore(linen=state, nnx=born, model=nnx.state(model)).trees
    assert restored["linen"].step == 1
    assert_equal_values(restored["linen"].opt_state, later.opt_state)
    assert_equal_values(restored["nnx"], nnx.state(optimizer))
    nnx.update(optimizer, restored["nnx"])


def test_orbax_as_it_is(orbax, tmp_path):
    """Whoever needs no names that stay gives a state to Orbax itself, even its typed keys."""
    ocp = pytest.importorskip("orbax.checkpoint")
    _, state = trained()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        assert_equal_values(manager.restore(1, args=ocp.args.StandardRestore(state)), state)


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are resumed
# ---------------------------------------------------------------------------------------------------------------------

RESUMED = [row for row in ROWS if row.rate is not None and row.laws and not row.thorough][::6]


@pytest.mark.parametrize("row", RESUMED, ids=lambda row: row.name)
def test_a_run_that_is_resumed_at_every_step(files, tmp_path, row):
    rule = row.make()
    straight = resumed = PARAMS, rule.init(PARAMS)
    for _ in range(5):
        straight = stepped(rule, *straight, GRADS, **row.extra)
        resumed = stepped(rule, *resumed, GRADS, **row.extra)
        files.save(tmp_path / "run", dict(zip(("params", "state"), resumed, strict=True)))
        like = {"params": PARAMS, "state": rule.init(PARAMS)}
        resumed = tuple(jr.load_state_dict(like, files.load(tmp_path / "run"))[0].values())
    assert_same(resumed, straight)


def test_rules_and_states_are_pickled_across_processes(tmp_path):
    params, state = trained()
    saved = params, jr.state_dict(state), RULE
    (tmp_path / "run").write_bytes(pickle.dumps(saved))
    script = (
        "import pickle, sys, jax, jaxopt_rules as jr\n"
        "params, saved, rule = pickle.load(open(sys.argv[1], 'rb'))\n"
        "state, _ = jr.load_state_dict(rule.init(params), saved)\n"
        "pickle.dump((rule, jr.state_dict(state)), open(sys.argv[1], 'wb'))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=True, timeout=120)
    rule, saved = pickle.loads((tmp_path / "run").read_bytes())
    assert rule == RULE
    assert_same(jr.load_state_dict(RULE.init(params), saved)[0], state)


def test_a_lambda_cannot_be_pickled_and_is_named():
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(jr.adamw(lambda count: 0.1 / (1 + count)))


# A training run of its own process. It dies at a moment behind the beginning of the saving of a given step; one that
# is not killed compares itself with a run from the beginning to the end.
RUN = """
import os, signal, sys, threading
import jax, jax.numpy as jnp, numpy as np
import jaxopt_rules as jr

through, path, fatal, delay = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
STEPS = 14
rule = jr.accumulate(
    jr.average(
        jr.chain(
            jr.clip_by_global_norm(1.0),
            jr.add_noise(0.1, key=7),
            jr.adamw(jr.Cosine(0.1, 9)),
            jr.reduce_on_plateau(0.5, patience=1),
        ),
        decay=0.9,
    ),
    every=2,
)


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"]) - params["b"]) ** 2)


@jax.jit
def train_step(run, step):
    x = jax.random.normal(jax.random.key(step), (4, 64))
    loss, grads = jax.value_and_grad(loss_fn)(run["params"], x)
    params, state = rule.apply(grads, run["state"], run["params"], value=loss)
    return {"params": params, "state": state}


def born():
    params = {"w": jnp.ones((64, 512)), "b": jnp.zeros(512)}
    return {"params": params, "state": rule.init(params)}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


run, done = born(), 0
if through == "orbax":
    from jaxopt_rules.interop.orbax import Checkpoints

    checkpoints = Checkpoints(path, keep=2)
    if checkpoints.latest_step is not None:
        done, run, _ = checkpoints.restore(**run)

    def save(step):
        checkpoints.save(step, **run)
else:
    from jaxopt_rules.interop import safetensors

    if os.path.exists(path):
        run, _ = jr.load_state_dict(run | {"done": 0}, safetensors.load(path))
        done = run.pop("done")

    def save(step):
        safetensors.save(path, run | {"done": step})

print("resumed at", done, flush=True)
for step in range(done + 1, STEPS + 1):
    run = train_step(run, step)
    if step == fatal:
        threading.Timer(delay, die).start() if delay else die()
    save(step)
if through == "orbax":
    checkpoints.close()
straight = born()
for step in range(1, STEPS + 1):
    straight = train_step(straight, step)
one, other = jr.state_dict(run), jr.state_dict(straight)
assert one.keys() == other.keys()
assert not [name for name in one if one[name].tobytes() != other[name].tobytes()]
print("equal")
"""


def killed_and_resumed(through: str, path: Path, kills: list[tuple[int, float]]) -> None:
    resumed = []
    for fatal, delay in [*kills, (0, 0.0)]:
        arguments = [sys.executable, "-c", RUN, through, str(path), str(fatal), str(delay)]
        run = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        assert run.stdout.startswith("resumed at"), run.stderr
        resumed.append(int(run.stdout.split()[2]))
        assert run.returncode == -9 or "equal" in run.stdout, run.stderr
    assert "equal" in run.stdout
    assert resumed == sorted(resumed)
    # The last kill may fall behind the end of the run; the first cannot.
    assert 0 < resumed[1] < 14


# Steps, and seconds behind the beginning of their saving: 0 is in front of it, and it takes some thousandths.
@pytest.mark.parametrize("through", ["orbax", "safetensors"])
def test_a_run_that_is_killed_is_resumed_bit_for_bit(orbax, files, tmp_path, through):
    killed_and_resumed(through, tmp_path / "run", [(4, 0.0), (8, 0.003)])


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("through", ["orbax", "safetensors"])
def test_and_at_more_moments(orbax, files, tmp_path, through, seed):
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.choice(np.arange(4, 13), 3, replace=False))
    killed_and_resumed(through, tmp_path / "run", [(int(k), float(rng.uniform(0, 0.03))) for k in steps])
