"""The command `compare`: the documented optimizers, or rules, on tables and files."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from command_line import cells_of, check_png, check_refused
from sklearn.datasets import load_diabetes, load_wine

from jaxopt_rules.__main__ import main
from jaxopt_rules.experiments import documented
from jaxopt_rules.experiments.data import UserError, digits, read_csv
from jaxopt_rules.experiments.plots import running_mean

PARAMETERS = 64 * 64 + 64 + 64 * 10 + 10  # of the model for digits


def rows(printed):
    """The cells of the table's rows."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]


def write(path, columns):
    pd.DataFrame(columns).to_csv(path, index=False)
    return str(path)


def columns_of(x):
    return {f"x{i}": column for i, column in enumerate(x.T)}


@pytest.fixture
def wine(tmp_path):
    """178 wines of three sorts; the sort as a number and as a text."""
    x, sort = map(np.asarray, load_wine(return_X_y=True))
    text = np.array(["red", "white", "rosé"])[sort]
    return write(tmp_path / "wine.csv", {**columns_of(x), "number": sort, "text": text})


@pytest.fixture
def diabetes(tmp_path):
    x, progression = map(np.asarray, load_diabetes(return_X_y=True))
    return write(tmp_path / "diabetes.csv", {**columns_of(x), "target": progression})


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "jaxopt_rules", "compare", "--steps", "20", "--out", "tmp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "1438 training and 359 test rows, 20 steps" in done.stdout
    shown = rows(done.stdout)
    assert [row[:2] for row in shown] == [
        [name, hooks] for name in ("SGD", "Momentum", "Adam", "AdamW") for hooks in ("no", "yes")
    ]
    for name, hooks, loss, accuracy, ms, state in shown:
        assert 0 < float(loss) < np.log(10)
        assert 0.2 < float(accuracy) < 1
        assert 0 < float(ms) < 100
        slots = {"SGD": 0, "Momentum": 1, "Adam": 2, "AdamW": 2}[name]
        scalars = int(state.replace(",", "")) - 4 * slots * PARAMETERS
        assert 0 < scalars < 100
        assert hooks == "no" or scalars > 20
    check_png(tmp_path / "tmp" / "loss.png")


def test_ctrl_c_ends_it_without_a_traceback(tmp_path):
    # A background job inherits an ignored SIGINT; the command is to meet it as in a terminal.
    script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from jaxopt_rules.__main__ import main
sys.exit(main(["compare", "--steps", "1000000", "--out", {str(tmp_path / "out")!r}]))
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            until = time.monotonic() + 60
            while not (tmp_path / "out").exists():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            printed, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert printed == ""
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_is_exit_code_130(monkeypatch, capsys, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(documented, "train", interrupted)
    assert main(["compare", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == ""


def test_the_seed_determines_all_but_the_times(tmp_path, capsys):
    def shown(seed):
        assert main(["compare", "--optimizers", "sgd", "--steps", "30", "--seed", seed, "--out", str(tmp_path)]) == 0
        return [row[:4] + row[5:] for row in rows(capsys.readouterr().out)]

    first = shown("1")
    assert len(first) == 2
    assert shown("1") == first
    assert shown("2") != first


def test_all_see_the_same_weights_and_batches():
    results = documented.compare(digits(0), ["sgd", "adamw"], steps=3, seed=0)
    assert len({result.losses[0] for result in results}) == 1
    assert len({result.losses[2] for result in results}) == 4


def test_batches():
    drawn = list(documented.batches(100, 7, seed=0))
    assert [len(batch) for batch in drawn] == [32] * 7
    for i in (0, 3):
        assert len(set(np.concatenate(drawn[i : i + 3]))) == 96
    assert not np.array_equal(drawn[0], drawn[3])
    np.testing.assert_array_equal(drawn, list(documented.batches(100, 7, seed=0)))
    assert [sorted(batch) for batch in documented.batches(5, 2, seed=0)] == [list(range(5))] * 2


def test_running_mean():
    np.testing.assert_allclose(running_mean(np.array([4.0, 2.0, 6.0, 8.0]), 2), [4, 3, 4, 7])
    np.testing.assert_allclose(running_mean(np.array([4.0]), 1), [4])


def test_one_step_is_compilation_and_has_no_time(tmp_path, capsys):
    assert main(["compare", "--optimizers", "sgd", "--steps", "1", "--out", str(tmp_path)]) == 0
    assert [row[4] for row in rows(capsys.readouterr().out)] == ["-", "-"]
    check_png(tmp_path / "loss.png")


def test_a_png_that_was_there_is_replaced_whole_or_kept(tmp_path, capsys, monkeypatch):
    (tmp_path / "loss.png").write_bytes(b"old")
    command = ["compare", "--optimizers", "sgd", "--steps", "2", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert main(command) == 2
    assert "loss.png: No space left on device; choose another --out\n" in capsys.readouterr().err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    assert main(command) == 0
    check_png(tmp_path / "loss.png")


@pytest.mark.parametrize(("target", "other"), [("number", "text"), ("text", "number")])
def test_classification_from_a_csv_file(wine, tmp_path, capsys, target, other):
    path = write(wine, pd.read_csv(wine).drop(columns=other))
    out = tmp_path / "deep" / "out"
    command = ["compare", "--data", path, "--target", target, "--out", str(out)]
    assert main([*command, "--optimizers", "Momentum", "--steps", "100"]) == 0
    printed = capsys.readouterr().out
    assert "wine.csv: 143 training and 35 test rows" in printed
    assert "test accuracy" in printed
    assert all(float(row[3]) > 0.9 for row in rows(printed))
    check_png(out / "loss.png")


def test_regression_from_a_csv_file(diabetes, tmp_path, capsys):
    command = ["compare", "--data", diabetes, "--target", "target", "--out", str(tmp_path / "out")]
    assert main([*command, "--optimizers", "sgd,adam,sgd", "--steps", "300"]) == 0
    printed = capsys.readouterr().out
    assert "test R²" in printed
    assert [row[0] for row in rows(printed)] == ["SGD", "SGD", "Adam", "Adam"]
    for row in rows(printed):
        assert float(row[2]) < 0.7
        assert 0.3 < float(row[3]) < 0.8
    check_png(tmp_path / "out" / "loss.png")


def test_names_are_shown_as_they_are(tmp_path, capsys):
    columns = {"self": range(50), "[b]": ["x", "y"] * 25, "$t$": range(50)}
    path = write(tmp_path / "[red]表 $1$ 2$.csv", columns)
    command = ["compare", "--data", path, "--target", "$t$", "--out", str(tmp_path / "[out]")]
    assert main([*command, "--optimizers", "sgd", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "[red]表 $1$ 2$.csv: 40 training" in printed
    assert f"loss curves: {tmp_path}/[out]/loss.png\n" in printed
    check_png(tmp_path / "[out]" / "loss.png")


def test_what_was_left_out_is_printed(wine, tmp_path, capsys):
    frame = pd.read_csv(wine).drop(columns="number")
    frame.loc[[3, 5, 8], "x2"] = np.nan
    frame.loc[5, "x10"] = np.inf
    frame["bottle [no]"] = [f"bottle {i}" for i in range(len(frame))]
    frame["nothing"] = np.nan
    command = ["compare", "--data", write(wine, frame), "--target", "text", "--out", str(tmp_path / "out")]
    assert main([*command, "--optimizers", "sgd", "--steps", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "wine.csv: left out, empty: 'nothing'",
        "wine.csv: left out, text that differs from row to row: 'bottle [no]'",
        "wine.csv: dropped 3 of 178 rows, in which something is missing",
    ]


def test_columns(tmp_path):
    rng = np.random.default_rng(0)
    columns = {
        "large": 1e12 + rng.normal(size=50),
        "constant": [0.1] * 50,
        "flag": [True, False] * 25,
        "color": ["red", "green", "blue", "red", "green"] * 10,
        "y": rng.normal(size=50) * 1000,
    }
    data = read_csv(write(tmp_path / "x.csv", columns), "y", seed=0)
    assert data.classes is None
    assert data.notes == ()
    assert data.x_train.shape == (40, 2 + 2 + 3)
    assert data.x_test.shape == (10, 7)
    assert data.x_train.dtype == data.t_train.dtype == np.float32
    np.testing.assert_allclose(data.x_train[:, 0].mean(), 0, atol=1e-3)
    np.testing.assert_allclose(data.x_train[:, 0].std(), 1, atol=1e-3)
    assert not data.x_train[:, 1].any()
    assert not data.x_test[:, 1].any()
    np.testing.assert_array_equal(data.x_train[:, 2:4].sum(axis=1), 1)
    np.testing.assert_array_equal(data.x_train[:, 4:].sum(axis=1), 1)
    np.testing.assert_allclose([data.t_train.mean(), data.t_train.std()], [0, 1], atol=1e-6)


def test_digits_are_standardized_and_split():
    data = digits(0)
    assert data.x_train.shape == (1438, 64)
    assert data.x_test.shape == (359, 64)
    assert data.classes == 10
    varying = data.x_train.std(axis=0) > 0
    np.testing.assert_allclose(data.x_train[:, varying].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(data.x_train[:, varying].std(axis=0), 1, atol=1e-5)
    assert not data.x_train[:, ~varying].any()
    np.testing.assert_array_equal(data.x_train, digits(0).x_train)
    assert not np.array_equal(data.t_test, digits(1).t_test)


@pytest.mark.parametrize(
    ("target", "classes"),
    [
        ([i % 20 for i in range(400)], 20),
        ([i % 21 for i in range(400)], None),
        ([-1.0, 1.0] * 200, 2),
        ([0.5, 1.0] * 200, None),
        ([True, False] * 200, 2),
        ([f"city {i % 30}" for i in range(400)], 30),
        (["2024-01-01", "2024-01-02"] * 200, 2),
    ],
)
def test_what_is_a_class(tmp_path, target, classes):
    data = read_csv(write(tmp_path / "x.csv", {"x": np.arange(400.0), "y": target}), "y", seed=0)
    assert data.classes == classes
    if classes is None:
        assert data.t_train.shape == (320, 1)
    else:
        assert data.t_train.shape == (320,)
        assert set(data.t_train) == set(range(classes))


COUNT = list(range(50))
UNUSABLE = {
    "empty file": (b"", "no CSV file in UTF-8 with a header: No columns to parse"),
    "header alone": (b"x,y\n", "has 0 whole rows, and at least 10 are needed"),
    "few rows": (b"x,y\n" + b"1,2\n" * 9, "has 9 whole rows, and at least 10 are needed"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\xff", "no CSV file in UTF-8"),
    "ragged": (b"x,y\n1,2\n1,2,3\n", "no CSV file in UTF-8 with a header: Error tokenizing"),
    "short header": (b"x,y\n" + b"1,2,3\n" * 20, "rows with more fields than its header"),
    "semicolons": (b"x;y\n" + b"1;2\n" * 20, "has no column 'y'; choose --target from 'x;y'"),
    "no such column": (b"x,z\n" + b"1,2\n" * 20, "has no column 'y'; choose --target from 'x', 'z'"),
    "target alone": (b"y\n" + b"1\n2\n" * 20, "no column besides 'y' to learn from"),
    "identifiers alone": (
        {"name": [f"name {i}" for i in COUNT], "y": COUNT},
        "no column besides 'y' to learn from; left out, text that differs from row to row: 'name'",
    ),
    "all rows incomplete": (
        {"x": [None, 1.5] * 25, "z": [1.5, None] * 25, "y": COUNT},
        "0 whole rows, and at least 10 are needed; most often 'x' is missing",
    ),
    "target missing": (b"x,y\n" + b"1,\n" * 20, "most often 'y' is missing"),
    "one class": ({"x": COUNT, "y": ["a"] * 50}, "'y' is a in every row"),
    "one value": ({"x": COUNT, "y": [2.5] * 50}, "'y' is 2.5 in every row"),
    "many texts": ({"x": range(200), "y": [f"name {i}" for i in range(200)]}, "200 different texts, over 100"),
    # Row 18 is one of the fifth that the seed 0 tests on.
    "a class in the test rows alone": (
        {"x": COUNT, "y": ["rare" if i == 18 else "ab"[i % 2] for i in COUNT]},
        "the class rare of 'y' occurs in no training row",
    ),
    "one value in training": ({"x": COUNT, "y": [0.5 if i == 18 else 0.25 for i in COUNT]}, "in all training rows"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_data_is_refused_in_one_line(case, tmp_path, capsys):
    content, message = UNUSABLE[case]
    path = tmp_path / "x.csv"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    check_refused(["compare", "--data", str(path), "--target", "y", "--out", str(tmp_path / "out")], message, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be an integer from 1 to 10000000, not '0'; see python -m jaxopt_rules comp"),
        (["--steps", "-5"], "not '-5'"),
        (["--steps", "many"], "not 'many'"),
        (["--seed", "-1"], "--seed: must be an integer from 0 to 2147483647, not '-1'"),
        (["--seed", str(2**31)], "not '2147483648'"),
        (["--optimizers", "sgd,lion"], "unknown optimizer 'lion'; choose from sgd, momentum, adam, adamw"),
        (["--optimizers", ""], "unknown optimizer ''; choose from sgd"),
        (["--data", "x.csv"], "--data and --target go together"),
        (["--target", "y"], "--data and --target go together"),
        (["--data", "/no/such/file.csv", "--target", "y"], "cannot read /no/such/file.csv: No such file or directory"),
        (["--data", "/", "--target", "y"], "cannot read /: Is a directory"),
        (["--out", f"{__file__}/out"], "Not a directory; choose another --out"),
        (["--out", __file__], "File exists; choose another --out"),
        (["--problem", "mnist"], "unknown problem 'mnist'; choose from digits, wine, breast-cancer, diabetes, source"),
        (["--problem", "source"], "the documented optimizers learn tables; name rules to learn source"),
        (["--problem", "wine", "--data", "x.csv", "--target", "y"], "--data takes the place of --problem"),
        (["--seeds", "2"], "--seeds is for rules: name some, such as 'adamw(1e-3)'"),
        (["--step", "5"], "unrecognized arguments: --step"),
        (["--steps"], "expected one argument"),
        (["surplus\nof lines"], "cannot read the rule 'surplus\\nof lines': invalid syntax"),
        (["adamw(1e-3)", "--optimizers", "sgd"], "--optimizers chooses from the documented optimizers"),
        (["a=adamw(1e-3)", "a = sgd(0.1)"], "two rules have the name 'a'; give them names, as in first=sgd(0.1)"),
        (["sgd(1.0)", "--steps", "3", "--seconds", "1"], "--seconds: not allowed with argument --steps"),
        (["sgd(1.0)", "--seconds", "0"], "--seconds: must be a positive number, not '0'"),
        (["sgd(1.0)", "--by", "R2"], "unknown metric 'R2'; digits has loss, "),
        (["sgd(1.0)", "adam_direction()"], "adam_direction() gives a direction, not an update; end it with step"),
        (["sgd(1.0)", "adam(where='**/q')"], "adam: got an unexpected keyword argument 'where'"),
        (["adamw(where='**/q')"], "adamw(where='**/q'): the pattern '**/q' matches none of 'hidden/0/b', 'hidden/0/w'"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, message, capsys):
    check_refused(["compare", *arguments], message, capsys)


def test_errors_of_the_functions_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="unknown optimizer 'lion'"):
        documented.run(digits(0), ["lion"], steps=1, seed=0, out=tmp_path)


def test_rules_are_compared_by_their_names_and_scores(tmp_path, capsys):
    command = ["compare", "adam(1e-6)", "fast = adam(0.03)", "--problem", "wine", "--steps", "20", "--seeds", "2"]
    assert main([*command, "--seed", "5", "--by", "accuracy", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Problem wine: MLP 13-64-3, tanh; batches of 128 of 143 rows\n")
    assert "2 rules, 2 seeds, 20 steps each; ranked by accuracy" in printed
    fast, slow = cells_of(printed, "rule")
    assert (fast["rule"], slow["rule"]) == ("fast", "adam(1e-6)")
    assert float(fast["accuracy"]) > 0.85 > float(slow["accuracy"])
    assert float(fast["test_loss"]) < float(slow["test_loss"])
    assert fast["steps"] == slow["steps"] == "20"
    assert f"picture: {tmp_path}/loss.png\n" in printed
    check_png(tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
