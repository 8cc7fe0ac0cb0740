"""Writes from the code: docs/api.md, the tables of docs/space.md, the commands of docs/commands.md, and
settings/known.py. Run `python docs/api.py`.
"""

import inspect
import json
import re
import runpy
from pathlib import Path
from typing import Any

import tfkd_ray
from tfkd_ray.learn.augment import RandAugment
from tfkd_ray.learn.config import TeacherConfig, TrainConfig
from tfkd_ray.learn.objectives import FeatureLayers
from tfkd_ray.settings.schema import Settings, members, tag
from tfkd_ray.space.search_config import SearchConfig

DOCS = Path(__file__).parent
FIELDS = TrainConfig.model_fields | SearchConfig.model_fields
FIELDS["input"] = TeacherConfig.model_fields["input"]
PARTS: dict[str, list[type[Settings]]] = {
    "Settings": [
        TrainConfig,
        *(
            m
            for f in (
                "teacher",
                "teachers",
                "input",
                "optim",
                "ema",
                "augment",
                "schedule",
                "init",
                "loop",
            )
            for m in members(FIELDS[f])
        ),
        RandAugment,
    ],
    "Search": [
        SearchConfig,
        *members(FIELDS["sampler"]),
        *members(FIELDS["stopping"]),
        *members(FIELDS["finalists"]),
    ],
    "Objectives": [*members(FIELDS["objective"]), FeatureLayers],
    "Data sets": members(FIELDS["data"]),
    "Networks": members(FIELDS["student"]),
}
CHOSEN = ("model", "objective")
"""Settings below a teacher whose own settings are left out of the list of names."""
COMMANDS = "<!-- the rest is written by python docs/api.py -->\n\n"
HEAD = "| setting | default | may be | what it is |\n|---|---|---|---|\n"
WORDS = {
    "integer": "whole number",
    "string": "text",
    "boolean": "true or false",
    "object": "settings",
}
BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
}


def kind(schema: dict[str, Any]) -> str:
    """What may stand in a field, in words, of its JSON schema."""
    if names := schema.get("discriminator", {}).get("mapping"):
        return "[a network](api.md#networks)" if "resnet18" in names else ", ".join(names)
    if name := schema.get("$ref", "").rpartition("/")[2]:
        return f"[{name}](api.md#{name.lower()})"
    if "const" in schema:
        return str(schema["const"])
    if options := schema.get("anyOf") or schema.get("enum"):
        return " or ".join(kind(o) if isinstance(o, dict) else str(o) for o in options)
    if schema.get("type") == "array":
        return f"list: {kind(schema.get('items') or schema['prefixItems'][0])}"
    word = WORDS.get(schema.get("type", ""), schema.get("type", "text"))
    return " ".join(
        [word, *(f"{word} {schema[key]:g}" for key, word in BOUNDS.items() if key in schema)]
    )


def plain(value: Any) -> str:
    """A default that is no plain value, as it would be written in a file; of settings their name."""
    return str(tag(type(value)) or "its defaults") if isinstance(value, Settings) else str(value)


def title(model: type[Settings]) -> str:
    """The heading of a class: the name by which a file chooses it, if it is one of several."""
    chosen = None if model in members(FIELDS["loop"]) else tag(model)
    return chosen or model.__name__


def is_settings(thing: Any) -> bool:
    """Return whether a public name is a class of settings, which has a table below."""
    return isinstance(thing, type) and issubclass(thing, Settings)


def called(model: type[Settings]) -> str:
    """Return the name of a class in Python, if it is public."""
    return (
        f"In Python: `tfkd_ray.{model.__name__}`.\n\n" if model.__name__ in tfkd_ray.__all__ else ""
    )


def table(model: type[Settings]) -> str:
    """Markdown: every setting of a class, its default, what it may be, and what it is."""
    rows, schema = [], model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        given = (
            "required"
            if field.is_required()
            else json.dumps(field.default, default=plain).strip('"')
        )
        what = " ".join((field.description or "").replace("|", "\\|").split())
        rows += (
            [f"| `{name}` | {given} | {kind(schema[name])} | {what} |"] if name != "name" else []
        )
    return HEAD + "\n".join(rows) if rows else "No settings."


def about(thing: Any) -> str:
    """How it is called, without the modules of its types, and its docstring; arguments as a list."""
    text = re.sub(
        r"\b(?:[a-z_]+\.)+(?=[A-Z])|Posix(?=Path)| -> None$", "", str(inspect.signature(thing))
    )
    text = re.sub(r", (?=\*,|\w+: )", ",\n    ", text)
    doc = re.sub(r"(?m)^    (\w+): ", r"* `\1`: ", inspect.getdoc(thing) or "").replace(
        "Args:\n", ""
    )
    return f"```python\n{thing.__name__}{text}\n```\n\n{doc}\n"


def setting_names() -> list[str]:
    """Return every setting by its path, of objectives with their names; below networks, one level."""
    found = dict.fromkeys(["search", *TrainConfig.model_fields])

    def walk(model: type[Settings], path: tuple[str, ...]) -> None:
        for name, field in model.model_fields.items():
            there = (*path, name)
            if name != "name":
                found[".".join(there)] = None
            for below in members(field) if len(there) < 3 and name not in CHOSEN else ():
                walk(below, there)

    for name, field in [*TrainConfig.model_fields.items(), ("search", None)]:
        for model in members(field) if field else [SearchConfig]:
            of_objective = (name, str(tag(model))) if name == "objective" else (name,)
            walk(model, of_objective)
    return sorted(found)


def names_module() -> str:
    """Return the module of all names of settings."""
    names = "".join(f'    "{name}",\n' for name in setting_names())
    return f'"""The names of all settings, written by `python docs/api.py`."""\n\nKNOWN = (\n{names})\n'


def commands_page() -> str:
    """Return docs/commands.md: its beginning is written by hand, the rest from the parser."""
    by_hand = (DOCS / "commands.md").read_text().partition(COMMANDS)[0]
    listing = runpy.run_path(str(DOCS / "commands.py"))["listing"]()
    return f"{by_hand}{COMMANDS}{listing}\n"


def pages() -> dict[Path, str]:
    """The text that each generated page should have."""
    lines = [
        "# API reference\n\nWritten from the code by `python docs/api.py`. None is `null` in a file.\n"
    ]
    lines += [
        f"## {name}\n\n{about(getattr(tfkd_ray, name))}"
        for name in tfkd_ray.__all__
        if not is_settings(getattr(tfkd_ray, name))
    ]
    for part, models in PARTS.items():
        lines += [f"## {part}\n"]
        lines += [
            f"### {title(m)}\n\n{called(m)}{inspect.getdoc(m)}\n\n{table(m)}\n" for m in models
        ]
    known = {m.__name__: table(m) for models in PARTS.values() for m in models}
    block = r"(?s)(<!-- (\w+) -->\n).*?(?=\n\n)"
    space = re.sub(block, lambda m: m[1] + known[m[2]], (DOCS / "space.md").read_text())
    return {
        DOCS / "api.md": "\n".join(lines),
        DOCS / "space.md": space,
        DOCS / "commands.md": commands_page(),
        DOCS.parent / "tfkd_ray/settings/known.py": names_module(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
