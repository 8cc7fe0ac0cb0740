"""The user's own code: import of `package.module:function`, and a mode that skips the import."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from tfkd_ray.learn.images import seeded
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, did_you_mean

# --- your own -------------------------------------------------------------------------------------


_reads_only: ContextVar[bool] = ContextVar("_reads_only", default=False)


@contextlib.contextmanager
def only_reading() -> Iterator[None]:
    """Accept settings that name the user's own code without its import, inside the block.

    Commands that only read an experiment run none of its code.
    """
    before = _reads_only.set(True)
    try:
        yield
    finally:
        _reads_only.reset(before)


def is_only_reading() -> bool:
    """Return whether the caller is inside `only_reading`."""
    return _reads_only.get()


def imported(path: str, what: str) -> Any:
    """Return the object at "package.module:name", from a package or the working directory.

    Args:
        what: subject of the ConfigError's sentence.
    """
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise ConfigError(f"{what}: must be 'package.module:name', got {path!r}")
    top = module_name.partition(".")[0]
    try:
        if top not in sys.modules and importlib.util.find_spec(top) is None:
            sys.path.append(own_code.here()["directory"])
            importlib.invalidate_caches()
        with seeded(0, "import", module_name):
            module = own_code.at_home(lambda: importlib.import_module(module_name))()
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and f"{module_name}.".startswith(f"{error.name}.")
        ):
            looked = f"looked in {own_code.here()['directory']} and wherever Python does"
            raise ConfigError(
                f"{what}: {path}: there is no module {error.name!r} ({looked})"
            ) from None
        problem = f"importing {module_name} ends in {type(error).__name__}: {error}"
        raise ConfigError(f"{what}: {path}: {problem}") from error
    if not hasattr(module, name):
        hint = did_you_mean(name, [n for n in vars(module) if not n.startswith("_")])
        raise ConfigError(f"{what}: {path}: {module_name} has no {name!r}; {hint}")
    return getattr(module, name)
