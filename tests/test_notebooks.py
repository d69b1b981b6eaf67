"""The notebooks run from top to bottom, without a warning, in a kernel of the interpreter that runs the tests."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MOST_CELLS = 40
SECONDS_PER_CELL = 120
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'`(=,])(?:file:|~/|[A-Za-z]:\\|/[\w.-]+/[\w.-])""")

# What a notebook needs besides the extra `notebooks`, for which README's test command is made.
NEEDS = {"06_flax_and_equinox": ["flax", "equinox"]}

# What trains for more than a minute, and runs where `-m thorough` asks for it.
LONG = {"08_which_optimizer"}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_run = pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.thorough][: path.stem in LONG]) for path in NOTEBOOKS],
)


def cells_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def executed(path: Path, directory: Path) -> list[Any]:
    """The code cells with their outputs. A cell that raises, or warns, raises here."""
    # Imported here, not above: the test runs that choose other tests also collect this file, without these packages.
    import matplotlib.font_manager  # noqa: F401  (on its first import it writes a cache, and says so on stderr)
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class Manager(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="Python 3", language="python")

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(
        notebook,
        kernel_manager_class=Manager,
        kernel_name="python3",
        timeout=SECONDS_PER_CELL,
        resources={"metadata": {"path": str(directory)}},
        # Not PYTHONWARNINGS, which would concern the kernel's own imports, too.
        extra_arguments=["--IPKernelApp.exec_lines=import warnings; warnings.simplefilter('error')"],
    )
    client.execute(env=os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """An empty working directory, and no settings of the user's: neither start-up files nor profiles."""
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_there_are_notebooks():
    assert NOTEBOOKS
    assert {path.stem for path in NOTEBOOKS} >= LONG | NEEDS.keys()


@each_run
def test_runs(path, directory):
    if missing := [name for name in NEEDS.get(path.stem, []) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    cells = executed(path, directory)
    outputs = [(cell.id, output) for cell in cells for output in cell.outputs]
    assert [(cell, output.text) for cell, output in outputs if output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for _, output in outputs)
    assert list(directory.iterdir()) == []


@every_notebook
def test_is_short_and_opens_with_its_question(path):
    cells = cells_of(path)
    assert len(cells) <= MOST_CELLS
    assert cells[0]["cell_type"] == "markdown"
    assert re.match(r"# .*\?\n", source_of(cells[0]))


@every_notebook
def test_is_stored_without_results(path):
    for cell in cells_of(path):
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@every_notebook
def test_names_no_path_of_a_machine(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    texts = [json.dumps(notebook["metadata"]), *map(source_of, notebook["cells"])]
    assert [match.group() for text in texts for match in ABSOLUTE_PATH.finditer(text)] == []


@pytest.mark.parametrize("text", ['open("/data/digits.csv")', "in /home/me/x", r"C:\x", "~/x", "/srv/www"])
def test_the_probe_for_paths_finds_them(text):
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize(
    "text", ["a / b / c", "x/1", "https://arxiv.org/abs/1412.6980", "and/or", r"m \,/\, (\sqrt{v}"]
)
def test_the_probe_for_paths_leaves_other_text_alone(text):
    assert not ABSOLUTE_PATH.search(text)
