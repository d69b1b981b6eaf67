"""Where rules meet other libraries: one module for each, which is imported by name and needs that library.

    from jaxopt_rules.interop.optax import from_optax, to_optax

`import jaxopt_rules` imports none of them.
"""

import importlib
from types import ModuleType


def needed(package: str, extra: str, name: str | None = None) -> ModuleType:
    """A package that an adapter cannot do without.

    Args:
      extra: of this library, which installs it.
      name: what it is called where it is installed; `None`: the same.

    Raises:
      ModuleNotFoundError: it is not installed; says which extra of this library installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{package}.".startswith(f"{error.name}."):
            raise
        sentence = f'this needs {name or package}: pip install "jaxopt_rules[{extra}]"'
        raise ModuleNotFoundError(sentence, name=error.name) from None
