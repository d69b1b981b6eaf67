"""Where rules meet other libraries: one module for each, which is imported by name and needs that library.

    from jaxopt_rules.interop.optax import from_optax, to_optax

`import jaxopt_rules` imports none of them.
"""

import importlib
from types import ModuleType


def needed(package: str, extra: str) -> ModuleType:
    """A package that an adapter cannot do without.

    Raises:
      ImportError: it is not installed; says which extra of this library installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{package}.".startswith(f"{error.name}."):
            raise
        raise ImportError(f'this needs {package}: pip install "jaxopt_rules[{extra}]"', name=error.name) from None
