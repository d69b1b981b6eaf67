"""README runs: its Python blocks, one after another, and its commands are those that CI calls."""

import re
from pathlib import Path

import pytest

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


PACKAGES = {
    "flax": ["flax.nnx"],
    "equinox": ["equinox"],
    "optax": ["optax"],
    "orbax": ["orbax.checkpoint", "safetensors"],
}
OTHERS = dict(re.findall(r"^```python (\w+)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("library", PACKAGES)
def test_python_blocks_with_other_libraries(library, tmp_path, monkeypatch):
    """Each stands by itself. CI runs them in an environment that has the libraries."""
    for package in PACKAGES[library]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        exec(compile(OTHERS[library], README.name, "exec"), {"__name__": "readme"})


def test_every_block_is_run():
    assert OTHERS.keys() == PACKAGES.keys()


def test_two_commands():
    assert [code.strip() for language, code in BLOCKS if language == "sh"] == [
        'pip install -e ".[experiments]" && python -m jaxopt_rules compare',
        'pip install -e ".[test]" && python -m pytest -n auto',
    ]
