"""README runs: its Python blocks, one after another, and its commands are those that CI calls."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_python_blocks(capsys):
    namespace: dict[str, object] = {"__name__": "readme"}
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, README.name, "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed.startswith("chain(clip_by_global_norm(1.0), adamw(Warmup(")
    assert printed.endswith("tiger(0.0003)\n")


def test_two_commands():
    assert [code.strip() for language, code in BLOCKS if language == "sh"] == [
        'pip install -e ".[experiments]" && python -m jaxopt_rules compare',
        'pip install -e ".[test]" && python -m pytest -n auto',
    ]
