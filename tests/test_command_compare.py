"""The command line: what it prints and writes, and how it refuses."""

import os
import re
import signal
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_diabetes, load_wine

from jaxopt_rules import experiments
from jaxopt_rules.__main__ import main
from jaxopt_rules.experiments import documented
from jaxopt_rules.experiments.data import UserError, digits, read_csv
from jaxopt_rules.experiments.plots import running_mean

PARAMETERS = 64 * 64 + 64 + 64 * 10 + 10  # of the model for digits


def rows(printed):
    """The cells of the table's rows."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]


def check_png(path):
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 400
    assert image.shape[1] > 800
    assert len(np.unique(image[::7, ::7].reshape(-1, 4), axis=0)) > 5
    assert sorted(path.parent.iterdir()) == [path]


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
    check_refused(["--data", str(path), "--target", "y", "--out", str(tmp_path / "out")], message, capsys)
    assert not (tmp_path / "out").exists()


def check_refused(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("python -m jaxopt_rules: ")
    assert message in captured.err


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
        (["--step", "5"], "unrecognized arguments: --step 5"),
        (["--steps"], "expected one argument"),
        (["surplus\nof lines"], "unrecognized arguments: surplus of lines"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, message, capsys):
    check_refused(arguments, message, capsys)


@pytest.mark.parametrize("argv", [[], ["train"]])
def test_a_command_is_required(argv, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "COMMAND" in captured.err


@pytest.mark.parametrize("package", ["sklearn", "pandas", "rich", "matplotlib"])
def test_a_missing_package_is_named(package, diabetes, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "jaxopt_rules.experiments.documented")
    monkeypatch.delattr(experiments, "documented")
    for name in [package, *sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    data = [] if package == "sklearn" else ["--data", diabetes, "--target", "target"]
    check_refused(data, f'this needs {package}: pip install "jaxopt_rules[experiments]"', capsys)


def test_help_needs_nothing_and_shows_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    assert ",".join(documented.OPTIMIZERS) in text
    assert "--data houses.csv --target price" in text
    assert re.search(r"class where it is text, or whole numbers of at most 20\s+different values", text)


def test_errors_of_the_functions_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="unknown optimizer 'lion'"):
        documented.run(digits(0), ["lion"], steps=1, seed=0, out=tmp_path)
