"""The shape of the code: who imports whom, what an import costs, and what a public docstring holds."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from table import ROWS

import jaxopt_rules as jr
from jaxopt_rules.rule import Written

PACKAGE = Path(jr.__file__).parent

# A module may import those in front of it. Modules on one line do not import each other.
ORDER = [
    ["markup"],
    ["numerics", "schedules", "hyperparameters", "tables", "variables"],
    ["trees"],
    ["select", "parameters", "families"],
    ["rule", "display"],
    ["lift"],
    ["apply", "hooks", "updates", "compose"],
    ["descend", "matrices", "directions", "gates", "averages"],
    ["rules"],
    ["state", "explain"],
    ["stateful"],
    ["models"],
    ["interop"],
    ["conformance"],
    ["experiments"],
    ["commands"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """What a file imports, dotted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    for name in imports(path):
        if name.startswith("jaxopt_rules."):
            other = name.split(".")[1]
            same_folder = other == part(path) and (PACKAGE / other).is_dir()
            assert RANK[other] < RANK[part(path)] or same_folder, name


def is_tree_level(path: Path) -> bool:
    """Whether a file says that its rules look across arrays."""
    return "tree-level" in (ast.get_docstring(ast.parse(path.read_text())) or "").lower()


LEAF_LEVEL = [path for path in sorted((PACKAGE / "rules").glob("*.py")) if not is_tree_level(path)]


@pytest.mark.parametrize("path", LEAF_LEVEL, ids=lambda path: path.name)
def test_rules_know_nothing_of_trees(path):
    assert not [name for name in imports(path) if name.startswith(("jax.tree", "jaxopt_rules.trees"))]
    assert "jax.tree" not in path.read_text()


def test_importing_it_imports_jax_and_nothing_else():
    """Modules by their distribution's top name: those that `import jax` brings, and ours."""
    script = "import sys, jax; before = set(sys.modules); import jaxopt_rules; print(set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    new = {name.split(".")[0] for name in ast.literal_eval(run.stdout)}
    assert new - set(sys.stdlib_module_names) - {"jax", "jaxlib"} == {"jaxopt_rules"}


def is_rule_constructor(x: object) -> bool:
    return inspect.isfunction(x) and x.__module__.startswith("jaxopt_rules") and hasattr(x, "__wrapped__")


CONSTRUCTORS = {name: x for name, x in vars(jr).items() if is_rule_constructor(x)}
LIFTS = {"leafwise", "treewise", "chain", "identity"}
# What hands on, or hands out, what others compute.
WITHOUT_EQUATION = {"freeze", "masked", "partition", "record", "stateless", "when"}


@pytest.mark.parametrize("name", sorted(CONSTRUCTORS.keys() - LIFTS))
def test_a_constructor_is_documented_and_in_the_table(name):
    """One line, the equations or where they stand, and memory; every constructor occurs in a row."""
    doc = inspect.getdoc(CONSTRUCTORS[name])
    assert doc
    assert doc.splitlines()[0].endswith((".", ":", ")."))
    if not name.endswith("_direction"):
        assert "←" in doc or name in WITHOUT_EQUATION
        assert "Memory:" in doc
    assert CONSTRUCTORS[name].__name__ in used_in_the_table()


def used_in_the_table() -> set[str]:
    def constructors(written: Written) -> set[str]:
        given = (*written.args, *written.kwargs.values())
        members = [x for argument in given for x in (argument.values() if isinstance(argument, dict) else [argument])]
        inner = [constructors(m.update.written) for m in members if isinstance(m, jr.Rule)]
        return {written.constructor.__name__}.union(*inner)

    return set().union(*(constructors(row.make().update.written) for row in ROWS))


def test_every_public_name_is_documented():
    for name, x in vars(jr).items():
        if not name.startswith("_") and (inspect.isfunction(x) or inspect.isclass(x)):
            assert inspect.getdoc(x), name


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("nnx", "flax", "flax"),
        ("optax", "optax", "optax"),
        ("orbax", "orbax", "checkpoints"),
        ("safetensors", "safetensors", "checkpoints"),
    ],
)
def test_a_missing_package_is_one_sentence(module, package, extra, monkeypatch):
    for name in [name for name in sys.modules if f"{name}.".startswith((f"{package}.", "jaxopt_rules.interop."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(f"jaxopt_rules.interop.{module}")
    sentence = rf'this needs {package}[.\w]*: pip install "jaxopt_rules\[{extra}\]"'
    assert re.fullmatch(sentence, str(raised.value))
    extras = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith(package) for requirement in extras[extra])
