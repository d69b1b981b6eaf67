"""The command `range-test`."""

import contextlib

import pytest
from command_line import cells_of, check_png, check_refused

from jaxopt_rules.__main__ import main
from jaxopt_rules.experiments import range_test
from jaxopt_rules.experiments.progress import Bar

COMMAND = ["range-test", "chain(clip_by_global_norm(1.0), sgd(2 * learning_rate))", "--problem", "wine"]


def test_the_suggestion_and_the_picture(tmp_path, capsys):
    assert main([*COMMAND, "--low", "1e-3", "--high", "1e3", "--steps", "60", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Problem wine: ")
    assert "RangeTest: 60 steps, learning rate 0.001 to 1e+03: suggestion 0." in printed
    found = {row["what"]: float(row["learning_rate"]) for row in cells_of(printed, "what")}
    assert 1e-3 < found["steepest"] < found["minimum"] < 1e3
    assert printed.endswith(f"\npicture: {tmp_path}/range_test.png\n")
    check_png(tmp_path / "range_test.png")


def test_an_interrupted_test_prints_what_there_is(tmp_path, capsys, monkeypatch):
    @contextlib.contextmanager
    def interrupted(*args):
        yield Bar(lambda *args: None, lambda: True)

    monkeypatch.setattr(range_test, "progress", interrupted)
    assert main([*COMMAND, "--steps", "60", "--out", str(tmp_path)]) == 130
    assert "interrupted\n" in capsys.readouterr().out
    check_png(tmp_path / "range_test.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adamw(1e-3)"], "learning_rate is not in the rule 'adamw(1e-3)'; write it where its values are to stand"),
        (["adamw(rate)"], "unknown name 'rate'"),
        (["polyak_sgd"], "polyak_sgd: got an unexpected keyword argument 'learning_rate'"),
        (["adam", "--low", "1", "--high", "0.1"], "--low 1 must be below --high 0.1"),
        (["adam", "--low", "0"], "--low: must be a positive number, not '0'"),
        (["adam", "--high", "inf"], "--high: must be a positive number, not 'inf'"),
        (["adam", "--steps", "2"], "--steps: must be an integer from 3 to 10000000, not '2'"),
        (["adam", "--seeds", "0"], "--seeds: must be an integer from 1 to 1000, not '0'"),
    ],
)
def test_bad_tests_are_refused_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refused(["range-test", *arguments], message, capsys)
