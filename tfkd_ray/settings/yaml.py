"""YAML as this package reads and writes it: YAML 1.2 scalars, size limits, errors with a line."""

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tfkd_ray.settings.errors import ConfigError, near_to
from tfkd_ray.settings.files import legible, opened, read_at_most

Tree = dict[str, Any]
"""Settings as a file has them, or a JSON object: values by key."""
Values = Mapping[str, Any]
"""The same where they are only read."""
Numbers = dict[str, float]
"""Numbers by name, such as metrics."""
MOST_YAML_BYTES = 2**20
"""Most bytes of a YAML file, a hundred times our largest. Parsing them takes seconds."""
MAX_NODES = 100_000
"""Most values of a YAML file, aliases expanded."""


# --- YAML ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Loader of safe YAML with the scalars of YAML 1.2 and no duplicate keys.

    So 1e-4 is a number, `on` and `1:30` are text.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    _composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._composed += 1
        if self._composed > MAX_NODES:  # stop before the rest of the file is read
            message = f"more than {MAX_NODES} values"
            place = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, message, place)
        return super().compose_node(parent, index)

    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node is not None:
            _expanded_size(node, {}, set())
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
        ):  # the tag does not fit the value
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"this is no {kind}", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} must be text", key_node.start_mark
                )
            if key in own:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            own.add(key)
        self.flatten_mapping(node)  # `<<` adds keys; the mapping's own override them
        mapping: Tree = {}
        for key_node, value_node in node.value:
            mapping[self.construct_object(key_node, deep=True)] = self.construct_object(
                value_node, deep=True
            )
        return mapping


_SCALARS = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
]
for _kind, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^$"), [""])


def _mapping(loader: _Loader, node: Any) -> dict[Any, Any]:
    return loader.construct_mapping(node)


def _int(loader: _Loader, node: Any) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def _expanded_size(node: yaml.Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Return the number of values below a node, aliases expanded.

    Raises for files that would explode or that contain themselves.
    """
    if id(node) in open_nodes:
        raise yaml.constructor.ConstructorError(
            None, None, "an alias contains itself", node.start_mark
        )
    if id(node) not in sizes:
        open_nodes.add(id(node))
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        sizes[id(node)] = 1 + sum(_expanded_size(part, sizes, open_nodes) for part in below)
        open_nodes.remove(id(node))
        if sizes[id(node)] > MAX_NODES:
            message = f"more than {MAX_NODES} values once its aliases are expanded"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
    return sizes[id(node)]


class _OthersLoader(_Loader):
    """Loader for files that other programs read, too.

    It collects scalars that YAML 1.1 reads differently, and those that only Go's mix of 1.1 and
    1.2 does.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.differing: list[str] = []
        self.differing_in_go: list[str] = []

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        tagged = (
            event.tag is not None
            and event.tag.startswith("tag:yaml.org,2002:")
            and not event.tag.endswith(":str")
        )
        if tagged or (event.style is None and event.tag is None):
            where = f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
            sentence = (
                f"{where}: {node.value}: YAML 1.1 and YAML 1.2 read it as different values; quote it if it is text, "
                "else write true, false or a decimal number (10, 0.5)"
            )
            if _is_ambiguous(node):
                self.differing.append(sentence)
            elif _GO.fullmatch(node.value):
                self.differing_in_go.append(sentence)
        return node


_GO = re.compile(r"[yYnN]|0o[0-7_]+|[-+]?0[xXbBoO][0-9a-fA-F_]+")
"""Scalars that are a boolean or a number for Go's YAML (kubectl), and text for YAML 1.1 or 1.2."""


def _is_ambiguous(node: yaml.ScalarNode) -> bool:
    """Return whether Ray's launcher (YAML 1.1) reads a scalar differently from YAML 1.2."""
    found: list[str] = []
    for kind in (yaml.SafeLoader, _Loader):
        reader = kind("")
        tag = reader.resolve(yaml.ScalarNode, node.value, (True, False))
        if tag == "tag:yaml.org,2002:merge":
            found.append(tag)
            continue
        try:
            found.append(
                repr(reader.construct_object(yaml.ScalarNode(tag, node.value, node.start_mark)))
            )
        except (ValueError, yaml.YAMLError):  # for example 2026-99-99 or `=`
            return True
    return found[0] != found[1]


def parse_documents(text: str, source: str | Path) -> list[Any]:
    """Return the non-empty YAML documents of a file that Ray or Kubernetes will read.

    Scalars that they read differently from YAML 1.2 are listed in one ConfigError. Go's reading
    counts only where a document has an `apiVersion`, which is how Kubernetes' files begin.
    """
    loader = _OthersLoader("")

    def load(text: str) -> list[Any]:
        nonlocal loader
        loader = _OthersLoader(text)
        found = []
        while loader.check_data():  # type: ignore[no-untyped-call]
            found.append(loader.get_data())
        return [value for value in found if value is not None]

    documents: list[Any] = _parsed_yaml(text, source, load)
    differing = loader.differing
    if any(isinstance(document, dict) and "apiVersion" in document for document in documents):
        differing = differing + loader.differing_in_go
    if differing:
        raise ConfigError(differing[:20], source)
    return documents


def parse_yaml(text: str, source: str | Path) -> Any:
    """Return the value of a YAML document; raise a ConfigError with line, column and rule."""
    return _parsed_yaml(text, source, lambda text: yaml.load(text, Loader=_Loader))


def _parsed_yaml(text: str, source: str | Path, load: Callable[[str], Any]) -> Any:
    """Return the result of `load`; any problem with the text raises a ConfigError."""
    if len(text) > MOST_YAML_BYTES:
        raise ConfigError(f"larger than any such file: more than {MOST_YAML_BYTES} bytes", source)
    try:
        return load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        if "\t" in line:
            raise ConfigError(
                f"{where}: a tab, but YAML indents with spaces only; replace it", source
            ) from None
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: not YAML: {reason}", source) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"
        raise ConfigError(f"{where}: not YAML: {str(error).splitlines()[0]}", source) from None
    except RecursionError:
        raise ConfigError("not YAML: nested too deeply", source) from None


def text_of(path: Path, *, follow: bool = True) -> str:
    """Read a YAML file, or the target of a link if `follow`; any problem raises a ConfigError."""
    try:
        return bytes_of(path, follow=follow).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not a text file in UTF-8: byte {error.start} is {error.object[error.start]:#x}", path
        ) from None


def bytes_of(path: Path, *, follow: bool = True) -> bytes:
    """Read a file that is no larger than a YAML file may be; any problem raises a ConfigError."""
    if "\0" in str(path):
        raise ConfigError("a file name cannot contain a zero byte", repr(str(path)))
    if path.is_dir():
        raise ConfigError("is a directory, not a file; name a YAML file in it", path)
    try:
        with opened(path, follow=follow) as file:
            content = read_at_most(file, MOST_YAML_BYTES + 1)
        if len(content) > MOST_YAML_BYTES:
            raise ConfigError(f"larger than any such file: more than {MOST_YAML_BYTES} bytes", path)
        return bytes(content)
    except FileNotFoundError:
        near = _near_file(path, _files_beside(path))
        raise ConfigError(f"no such file (searched from {Path.cwd()}){near}", path) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", path) from None


def read_yaml(path: Path, *, follow: bool = True) -> Tree:
    """Read the mapping in a YAML file, or in a link's target if `follow`; else a ConfigError."""
    tree = parse_yaml(text_of(path, follow=follow), path)
    if tree is None:
        raise ConfigError("is empty; it needs at least an 'objective:'", path)
    if not isinstance(tree, dict):
        raise ConfigError(f"must be settings (key: value), got a {type(tree).__name__}", path)
    return tree


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Return YAML text that `parse_yaml` reads back as the same tree; `name` comes first."""
    return yaml.dump(
        _name_first(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def _name_first(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: _name_first(tree[k]) for k in sorted(tree, key=lambda k: k != "name")}
    return [_name_first(v) for v in tree] if isinstance(tree, list | tuple) else tree


class _Dumper(yaml.SafeDumper):
    """Dumper without aliases. It quotes text that YAML 1.1 or 1.2 would read as another type."""

    yaml_implicit_resolvers = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Write text; quote it if a terminal needs escapes, so that they mean the same."""
        style = None if legible(data) == data else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def in_yaml(value: Any) -> str:
    """Return a value as one line of YAML: null, true, 1; the texts "true" and "1" have quotes."""
    if isinstance(value, str):
        return value if _is_plain(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {in_yaml(below)}" for key, below in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(in_yaml, value)) + "]"
    return json.dumps(value)


@functools.lru_cache(10_000)
def _is_plain(text: str) -> bool:
    """Return whether text is read as text without quotes."""
    if (
        not text
        or text != text.strip()
        or legible(text) != text
        or "\n" in text
        or text[0] in "\"'[{"
    ):
        return False
    resolvers = (
        *_Loader.yaml_implicit_resolvers.get(text[0], ()),
        *_Loader.yaml_implicit_resolvers.get("", ()),
    )
    return not any(pattern.match(text) for _, pattern in resolvers)


def find_file(path: str | Path, folder: str, *, suffix: str = ".yaml") -> Path:
    """Return `path` if it exists, else the file of that name that the package has in `folder`.

    The name may lack its suffix.
    """
    given = Path(path)
    if (
        given.is_absolute()
        or "\0" in str(path)
        or given.exists()
        or given.suffix not in ("", suffix)
    ):
        return given
    inside = given.relative_to(folder) if given.is_relative_to(folder) else given
    package = Path(__file__).parent.parent
    roots = (package, package.parent)
    shipped = [root / folder / inside.with_suffix(suffix) for root in roots]
    return next((p for p in shipped if p.exists() and ".." not in inside.parts), given)


def shipped_files(folder: str) -> dict[str, Path]:
    """Return the files that the package has in a folder, by the names that `find_file` takes."""
    package = Path(__file__).parent.parent
    root = next((r for r in (package, package.parent) if (r / folder).is_dir()), package) / folder
    found = sorted(path for path in root.rglob("*.*") if path.suffix in (".yaml", ".sh"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in found}


def existing_space(path: str | Path) -> Path:
    """Return the search-space or arms file of a path, or of a shipped one's name.

    If there is none, the ConfigError names near ones, and the command that lists those shipped.
    """
    found = find_file(path, "search_spaces")
    if is_missing(found):
        raise missing_file(found, "search_spaces")
    return found


def is_missing(path: Path) -> bool:
    """Return whether there is surely nothing at a path; what cannot be looked at may be there."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def missing_file(path: Path, folder: str, more: Sequence[str] = (), also: str = "") -> ConfigError:
    """Return an error on a file that is not there; it names the nearest of those that might be meant.

    Args:
        folder: of the package, whose files have names.
        more: names of experiments, which would do, too.
        also: another part of the sentence, on why it may be missing.
    """
    near = _near_file(path, [*shipped_files(folder), *_files_beside(path), *more]) or "."
    listed = " `tfkd spaces` lists what ships with tfkd" if folder == "search_spaces" else ""
    if more:
        listed += ", and `tfkd ls` your experiments"
    why = f"no such file (searched from {Path.cwd()}){also}{near}{listed}"
    return ConfigError(why.rstrip("."), path)


def _files_beside(path: Path) -> list[str]:
    """Return the names of the YAML files in the directory of a path."""
    folder = path.parent if path.parent.is_dir() else Path()
    return sorted(p.name for p in folder.glob("*.yaml"))


def _near_file(path: Path, known: Iterable[str]) -> str:
    """Return a hint that ends a sentence: the file that is nearest by its name; empty if none is."""
    names = {stem: name for name in known for stem in (name, name.removesuffix(".yaml"))}
    words = (str(path), str(path).removesuffix(".yaml"), path.name, path.stem)
    near = next(filter(None, (near_to(word, names) for word in words)), None)
    return "" if near is None else f"; did you mean {names[near]!r}?"


def leaves_of(
    tree: Any, whole: Collection[tuple[str, ...]] = (), path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, value) of every leaf; a path of `whole` counts as one."""
    if isinstance(tree, dict) and path not in whole:
        for key, value in tree.items():
            yield from leaves_of(value, whole, (*path, key))
    else:
        yield path, tree


def value_at(tree: Any, path: Iterable[str]) -> Any:
    """Return the value at a path of a tree; None if the path does not exist."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
