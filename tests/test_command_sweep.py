"""The command `sweep`."""

import contextlib
import csv

import pytest
from command_line import cells_of, check_png, check_refused

from jaxopt_rules.__main__ import main
from jaxopt_rules.experiments import sweeps
from jaxopt_rules.experiments.progress import Bar

WINE = ["--problem", "wine"]


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_the_best_rule_the_picture_and_the_rows(tmp_path, capsys):
    over = ["--over", "rate=lin:0.005:0.02:4", "--over", "decay=0,0.1,true"]
    command = ["sweep", "adamw(rate, weight_decay=1.0 * decay, b1=0.8)", *over, *WINE, "--steps", "15"]
    assert main([*command, "--seeds", "2", "--out", str(tmp_path / "deep" / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "Problem wine: MLP 13-64-3, tanh; batches of 128 of 143 rows\nSweep: 24 members of 15 steps"
    )
    shown = cells_of(printed, "rate")
    losses = [float(row["test_loss"]) for row in shown]
    assert losses == sorted(losses)
    assert len(losses) == 12
    rows = read_csv(tmp_path / "deep" / "out" / "sweep.csv")
    assert [row["rate"] for row in rows] == [row["rate"] for row in shown]
    assert {row["decay"] for row in rows} == {"0", "0.1", "True"}
    assert all(float(row["test_loss_std"]) > 0 for row in rows)
    best = rows[0]
    assert f"\nbest: adamw({best['rate']}, weight_decay=1.0 * {best['decay']}, b1=0.8)\n" in printed
    assert f"\nall points: {tmp_path}/deep/out/sweep.csv\npicture: {tmp_path}/deep/out/sweep.png\n" in printed
    check_png(tmp_path / "deep" / "out" / "sweep.png")


def test_a_long_table_is_cut_and_scores_are_largest_first(tmp_path, capsys):
    command = ["sweep", "sgd", "--over", "learning_rate=1e-3:1e30:24", *WINE, "--steps", "4", "--by", "accuracy"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"\nand 4 more in {tmp_path}/sweep.csv\n" in printed
    assert printed.index("diverged\n") < printed.index("and 4 more")
    rows = read_csv(tmp_path / "sweep.csv")
    assert len(rows) == 24
    good = [float(row["accuracy"]) for row in rows if not row["note"]]
    assert good == sorted(good, reverse=True)
    assert good[0] > 0.8
    assert f"best: sgd(learning_rate={rows[0]['learning_rate']})" in printed


def test_where_all_diverge_there_is_no_best_rule(tmp_path, capsys):
    command = ["sweep", "sgd(1e30, momentum=m)", "--over", "m=0.5,0.9", *WINE, "--steps", "3"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "\nthere is no best point: 2 members of 3 steps, 2 diverged\n" in capsys.readouterr().out
    check_png(tmp_path / "sweep.png")


@pytest.mark.parametrize(
    ("steps", "notes", "best"),
    [
        ("1", ["", "not trained"], "best: adamw(0.01, decay='decoupled')"),
        ("5", ["interrupted at step 1", "not trained"], "there is no best point: 2 members of 5 steps, 2 interrupted"),
    ],
)
def test_an_interrupted_sweep_prints_what_there_is(steps, notes, best, tmp_path, capsys, monkeypatch):
    """Ctrl-C is seen behind the first part of the first of two programs."""

    @contextlib.contextmanager
    def interrupted(*args):
        yield Bar(lambda *args: None, lambda: True)

    monkeypatch.setattr(sweeps, "progress", interrupted)
    command = ["sweep", "adamw(1e-2, decay=d)", "--over", "d=decoupled,l2", *WINE, "--steps", steps]
    assert main([*command, "--out", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [row["note"] for row in read_csv(tmp_path / "sweep.csv")] == notes
    assert f"\n{best}\n" in captured.out
    check_png(tmp_path / "sweep.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adamw(x)", "--over", "x=1:2:y"], "argument --over: cannot read the values of x, '1:2:y'"),
        (["adamw(x)", "--over", "x=1", "--over", "x=2"], "--over gives x twice; give all of its values at once"),
        (["adamw(x)", "--over", "y=1"], "unknown name 'x'; there are the public names of jaxopt_rules and y"),
        (["adamw(1e-3)", "--over", "y=1"], "y is not in the rule 'adamw(1e-3)'"),
        (["adamw", "--over", "rate=1"], "rules: adamw: got an unexpected keyword argument 'rate'"),
        (["adamw(x)", "--over", "x=1,2,-1"], "adamw(x): learning_rate must be at least 0, not -1"),
        (["adam(decay=d)", "--over", "d=l2"], "adam: got an unexpected keyword argument 'decay'"),
        (["x", "--over", "x=adam(1),1"], "x is no rule but of type int"),
        (["adam_direction(b)", "--over", "b=0.5"], "gives a direction, not an update; end it with step"),
        (["adamw(where=w)", "--over", "w=None,'**/v'"], "the pattern '**/v' matches none of 'hidden/0/b'"),
        (["adamw(x)", "--over", "x=1", "--by", "R2"], "unknown metric 'R2'; digits has loss, "),
        (["adamw(x)", "--over", "x=1", "--problem", "mnist"], "unknown problem 'mnist'; choose from digits, wine"),
        (["adamw(x)", "--over", "x=1", "--out", f"{__file__}/out"], "Not a directory; choose another --out"),
    ],
)
def test_bad_sweeps_are_refused_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refused(["sweep", *arguments], message, capsys)


def test_files_are_there_for_a_reader_who_does_not_wait(tmp_path, monkeypatch):
    def gone(*args, **keywords):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(BrokenPipeError):
        main(["sweep", "adamw", "--over", "learning_rate=0.1,0.2", *WINE, "--steps", "3", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv", "sweep.png"]
