"""The user's own code: import of `package.module:function`, and a mode that skips the import.

`code_of` identifies it by a digest of its files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from tfkd_ray.learn.images import seeded
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError, Sentences, did_you_mean

# --- your own -------------------------------------------------------------------------------------


_reads_only: ContextVar[bool] = ContextVar("_reads_only", default=False)


@contextmanager
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
            looked = f"searched in {own_code.here()['directory']} and on Python's path"
            raise ConfigError(
                f"{what}: {path}: there is no module {error.name!r} ({looked})"
            ) from None
        problem = f"importing {module_name} ends in {type(error).__name__}: {error}"
        raise ConfigError(f"{what}: {path}: {problem}") from error
    if not hasattr(module, name):
        hint = did_you_mean(name, [n for n in vars(module) if not n.startswith("_")])
        raise ConfigError(f"{what}: {path}: {module_name} has no {name!r}; {hint}")
    return getattr(module, name)


# --- what its code is -----------------------------------------------------------------------------


class Code(NamedTuple):
    """The files of the user's own code that the import of a module loads."""

    digest: str
    """16 hex digits over the names of the modules and the bytes of their files."""
    files: tuple[str, ...]
    """Names of the files, without their folders."""

    def __str__(self) -> str:
        return ", ".join(self.files)


_codes: dict[str, tuple[Any, Code]] = {}
"""The code of each module as it was imported: a file may change while a process runs."""


def code_of(path: str) -> Code:
    """Return the code behind "package.module:name", which is imported already.

    Its files are that module's, and those of all modules that it imports, directly or not, wherever
    in the source an import stands. Python's own modules and those of installed packages do not
    count.
    """
    name = path.partition(":")[0]
    spec = getattr(sys.modules[name], "__spec__", None)
    if name not in _codes or _codes[name][0] is not spec:
        files = own_code.at_home(_own_files)(name)
        whole = hashlib.sha256()
        for module, (_, source) in sorted(files.items()):
            whole.update(f"{module} {len(source)}\n".encode() + source)
        found = Code(whole.hexdigest()[:16], tuple(sorted({file for file, _ in files.values()})))
        _codes[name] = spec, found
    return _codes[name][1]


def _own_files(first: str) -> dict[str, tuple[str, bytes]]:
    """Return (name of the file, its bytes) of a module and of the own modules that it imports."""
    found: dict[str, tuple[str, bytes]] = {}
    seen: set[str] = set()
    waiting = list(_with_parents(first))
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        file = _file_of(name, anyway=name == first)
        if file is not None:
            source = file.read_bytes()
            found[name] = file.name, source
            package = name if file.stem == "__init__" else name.rpartition(".")[0]
            for imports in _imported_in(source, package):
                waiting += _with_parents(imports)
    return found


def _with_parents(name: str) -> Iterator[str]:
    """Yield a module's name and those of the packages that it is in."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _file_of(name: str, *, anyway: bool) -> Path | None:
    """Return the file of a module of the user's own, without an import of it, else None.

    Args:
        anyway: accept a module of an installed package, too.
    """
    if anyway:
        file = getattr(sys.modules[name], "__file__", None)
        return Path(file) if file and Path(file).is_file() else None
    top, *below = name.split(".")
    if top in _NOT_OWN:
        return None
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # not there, or the program itself
        return None
    for part in below:
        if spec is None or spec.submodule_search_locations is None:
            return None
        inside = spec.submodule_search_locations
        spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{part}", inside)
    origin = Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
    if origin is None or not origin.is_file():
        return None
    library = own_code.is_installed(origin) or _LIBRARIES & {*origin.parts}
    return None if library else origin


_NOT_OWN = {*sys.stdlib_module_names, __name__.partition(".")[0]}
"""Packages that are known by their version, `LOOP_VERSION` or Python's."""
_LIBRARIES = {"site-packages", "dist-packages"}
"""Folders of installed packages, wherever they are."""


def _imported_in(source: bytes, package: str) -> Sentences:
    """Yield the dotted names that a source imports; some may be no modules."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # compiled, or never imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            with suppress(ImportError):  # it leads out of the package
                base = importlib.util.resolve_name(base, package)
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            given = node.args[0]
            text = given.value if isinstance(given, ast.Constant) else None
            if called in ("import_module", "__import__") and isinstance(text, str):
                with suppress(ImportError):
                    yield importlib.util.resolve_name(text, package)
