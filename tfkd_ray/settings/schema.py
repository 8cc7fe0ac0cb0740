"""Settings, and sentences for the errors that pydantic finds in them.

Every configuration object of the package is a `Settings`: frozen, without unknown keys, with
default, range and unit beside each field. Every mistake raises a `ConfigError` that names file,
field, rule and value.
"""

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from tfkd_ray.settings.errors import ConfigError, did_you_mean, dotted
from tfkd_ray.settings.meant import no_such_setting
from tfkd_ray.settings.passwords import masked, shown


class Settings(BaseModel):
    """Base of all configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    later: ClassVar[frozenset[str]] = frozenset()
    """Settings that a later release added. A fingerprint omits them at their default, which must be
    neutral, so that older results keep their names."""

    @property
    def tree(self) -> dict[str, Any]:
        """Return the settings as JSON, every default filled in."""
        return self.model_dump(mode="json")

    def content(self) -> dict[str, Any]:
        """Return the settings as JSON for fingerprints, without `later` ones at their default."""
        tree = self.tree
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in self.later and value == field.get_default(call_default_factory=True):
                tree.pop(name, None)
            elif isinstance(value, Settings):
                tree[name] = value.content()
            elif isinstance(value, tuple | list) and any(
                isinstance(item, Settings) for item in value
            ):
                tree[name] = [
                    item.content() if isinstance(item, Settings) else item for item in value
                ]
        return tree

    def __init__(self, /, **settings: Any) -> None:
        """Create settings from keyword arguments; wrong ones raise a ConfigError."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(problems_of(error, type(self))) from None

    # makes pydantic validate nested settings with their parent, so that all problems are reported
    # at once
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def name_alone(value: Any) -> Any:
    """Return `{name: mlp}` for `mlp`, so that `student: mlp` works."""
    return {"name": value} if isinstance(value, str) else value


# --- pydantic's errors as sentences ----------------------------------------------------------------------------


_S = TypeVar("_S", bound="Settings")


def validated(model: type[_S], tree: Any, source: str | Path | None = None) -> _S:
    """Return `tree` as a `model`, or raise a ConfigError with one sentence for each problem."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems_of(error, model), source) from None


def problems_of(error: ValidationError, model: type[Settings]) -> list[str]:
    """Return a sentence for each problem that pydantic found, led by the field's dotted path."""
    return [
        line
        for e in error.errors(include_url=False)
        for line in _sentence(dict(e), model).splitlines()
    ]


def _sentence(e: dict[str, Any], model: type[Settings]) -> str:
    loc = tuple(e["loc"])
    path = dotted(_without_default_tag(loc)) or "(the file)"
    kind, value = e["type"], e["input"]
    got = (shown if loc[-1:] == ("storage",) else masked)(repr(value))
    if kind == "extra_forbidden":
        known = settings_at(model, loc[:-1])
        return no_such_setting([str(part) for part in _without_default_tag(loc)], known)
    if kind == "union_tag_invalid":
        tags = [t.strip(" '") for t in e["ctx"]["expected_tags"].split(",")]
        return f"{path}: no such name {masked(repr(e['ctx']['tag']))}; {did_you_mean(e['ctx']['tag'], tags)}"
    if kind == "literal_error" and isinstance(value, str):
        names = re.findall(r"'([^']*)'", e["ctx"]["expected"])
        return f"{path}: no such name {got}; {did_you_mean(value, names)}"
    if kind == "union_tag_not_found":
        return f"{path}: needs a 'name', got {got}"
    if kind == "missing":
        return f"{path}: required, and not given"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{path}: needs settings below it (key: value), got {got}"
    if kind == "value_error":
        message = str(e["ctx"]["error"])
        return message if not loc else f"{path}: {message}"
    return f"{path}: {in_our_words(e['msg'])}, got {got}"


_OUR_WORDS = {
    "Input should be": "should be",
    "less than or equal to": "at most",
    "greater than or equal to": "at least",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid string": "a text",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
}
"""What stands for pydantic's words."""


def in_our_words(message: str) -> str:
    """Return a message of pydantic as the part of a sentence that follows a setting's name."""
    for theirs, ours in _OUR_WORDS.items():
        message = message.replace(theirs, ours)
    return message


def _without_default_tag(loc: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the parts of a location of pydantic's, without the name of an optimizer that needs none."""
    for part, before in zip(loc, (None, *loc), strict=False):
        if (before, part) != ("optim", "sgd"):
            yield part


def settings_at(model: type[Settings], loc: tuple[Any, ...]) -> set[str]:
    """Return the names of the settings at a location of pydantic's.

    The location names a member of a union by its tag.
    """
    found: list[type[Settings]] = [model]
    keyed = False
    for part in loc:
        if isinstance(part, int):  # an index in a list
            continue
        if keyed:  # a key leads to the item itself
            keyed = False
            continue
        inside = [f for m in found for name, f in m.model_fields.items() if name == part]
        if inside:
            found = [m for f in inside for m in members(f)]
            keyed = any(typing.get_origin(a) is dict for f in inside for a in leaves(f.annotation))
        else:
            found = [m for m in found if tag(m) == part]
    return {name for m in found for name in m.model_fields}


def members(field: FieldInfo) -> list[type[Settings]]:
    """Return the Settings classes of a field or its items: one, a union's members, or none."""
    found = list(leaves(field.annotation))
    found += [
        t
        for a in found
        if typing.get_origin(a) in (tuple, list)
        for t in leaves(typing.get_args(a)[0])
    ]
    found += [
        t for a in found if typing.get_origin(a) is dict for t in leaves(typing.get_args(a)[1])
    ]
    return [t for t in found if isinstance(t, type) and issubclass(t, Settings)]


def tag(model: type[Settings]) -> str | None:
    """Return a Settings class's `name: Literal[...]`, by which a union selects it."""
    field = model.model_fields.get("name")
    args = typing.get_args(field.annotation) if field else ()
    return args[0] if len(args) == 1 else None


def leaves(annotation: Any) -> Iterator[Any]:
    """Return the types of an annotation: the members of its unions."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        args = typing.get_args(annotation)
        for arg in args[:1] if origin is typing.Annotated else args:
            yield from leaves(arg)
    else:
        yield annotation
