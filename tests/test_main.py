"""The command line as a whole: help, examples, refusals and exit codes."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import check_refused

from jaxopt_rules import experiments
from jaxopt_rules.__main__ import EXTRAS, main
from jaxopt_rules.commands import compare, conformance, explain, range_test, sweep
from jaxopt_rules.conformance import PAIRS

COMMANDS = {"compare": compare, "sweep": sweep, "range-test": range_test, "explain": explain}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND; see python -m jaxopt_rules --help"),
        (["train"], "argument COMMAND: invalid choice: 'train'"),
        (["sweep", "adamw"], "the following arguments are required: --over; see python -m jaxopt_rules sweep --help"),
        (["explain", "adam()", "surplus\nof lines"], "unrecognized arguments: surplus of lines"),
    ],
)
def test_bad_commands_are_refused_in_one_line(argv, message, capsys):
    check_refused(argv, message, capsys)


def test_help_needs_no_extra():
    script = f"""
import sys
sys.modules |= dict.fromkeys({sorted(EXTRAS)})
from jaxopt_rules.__main__ import main
for command in ([], ["compare"], ["sweep"], ["range-test"], ["explain"], ["conformance"]):
    try:
        main([*command, "--help"])
    except SystemExit as exit:
        assert exit.code == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    texts = done.stdout.split("usage: ")[1:]
    assert len(texts) == 6
    assert all("\nexamples:\n  python -m jaxopt_rules " in text for text in texts[1:])
    assert re.search(r"class where it is text, or whole\s+numbers of at most 20 different values", texts[1])
    assert re.search(r"\{?compare,sweep,range-test,explain,conformance|compare .*\n.*sweep ", texts[0])


EXAMPLES = [example for module in COMMANDS.values() for example in module.EXAMPLES]
README = Path(__file__).parent.parent / "README.md"
(IN_README,) = re.findall(r"^```text\n(python -m jaxopt_rules .*?)^```", README.read_text("utf-8"), re.M | re.S)
FROM_README = [line.removeprefix("python -m jaxopt_rules ") for line in IN_README.replace("\\\n", "").splitlines()]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Those that the examples name."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pd.DataFrame({"area": rng.normal(size=60), "price": rng.normal(size=60)}).to_csv("houses.csv", index=False)
    np.savez("weights.npz", **{"layer.w": np.zeros((200, 300), np.float32), "layer.b": np.zeros(300)})
    return tmp_path


@pytest.mark.parametrize("example", [*EXAMPLES, *FROM_README])
def test_examples_of_the_help_and_of_readme(example, files, capsys):
    command, *arguments = shlex.split(example)
    # Of an option that is given twice, the last counts.
    few = [] if command == "explain" else ["--steps", "3"]
    assert main([command, *arguments, *few]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert any(mark in printed.out for mark in ("---", "───", "RangeTest: "))


@pytest.mark.parametrize("example", conformance.EXAMPLES)
def test_examples_of_conformance_name_pairs_that_there_are(example, monkeypatch):
    """It enables 64-bit types for its process, and is run by test_conformance.py."""
    asked = []
    monkeypatch.setattr(conformance, "run", lambda args: asked.append(args) or 0)
    assert main(shlex.split(example)) == 0
    rule, oracle = asked[0].rule or "", asked[0].oracle or ""
    assert [pair for pair in PAIRS if pair.name.startswith(rule) and pair.oracle.startswith(oracle)]


def test_a_reader_that_has_enough_ends_it_quietly():
    command = [sys.executable, "-m", "jaxopt_rules", "explain", "adam()", "--problem", "wine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line():
    command = [sys.executable, "-m", "jaxopt_rules", "explain", "adam()", "--problem", "wine"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "python -m jaxopt_rules: [Errno 28] No space left on device\n"


def test_all_examples_are_in_the_help(capsys):
    for command, module in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = re.findall(r"^  python -m jaxopt_rules (.*)", capsys.readouterr().out, re.MULTILINE)
        assert shown == list(module.EXAMPLES)
        assert len(shown) >= 3
        assert {example.split()[0] for example in shown} == {command}


TABLE = ["--data", "houses.csv", "--target", "price"]


@pytest.mark.parametrize(
    ("package", "argv"),
    [
        ("sklearn", ["compare"]),
        ("pandas", ["compare", *TABLE]),
        ("rich", ["compare", *TABLE]),
        ("matplotlib", ["compare", *TABLE]),
        ("matplotlib", ["compare", "adam()"]),
        ("matplotlib", ["sweep", "adam(x)", "--over", "x=1,2"]),
        ("matplotlib", ["range-test", "adam"]),
        ("sklearn", ["range-test", "adam"]),
        ("sklearn", ["explain", "adam()"]),
        ("safetensors", ["explain", "adam()", "--params", "model.safetensors"]),
    ],
)
def test_a_missing_package_is_named(package, argv, files, monkeypatch, capsys):
    importlib.import_module("jaxopt_rules.experiments.documented")
    monkeypatch.delitem(sys.modules, "jaxopt_rules.experiments.documented")
    monkeypatch.delattr(experiments, "documented")
    for name in [package, *sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    name, extra = EXTRAS[package]
    assert name == {"sklearn": "scikit-learn"}.get(package, package)
    check_refused(argv, f'this needs {name}: pip install "jaxopt_rules[{extra}]"', capsys)
