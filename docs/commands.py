"""Writes the list of commands in docs/commands.md from the parser; docs/api.py calls it."""

from argparse import SUPPRESS, Action, ArgumentParser, _HelpAction, _SubParsersAction
from collections.abc import Iterator

from tfkd_ray.cli.guide import EXAMPLES, GROUPS, verbs_of
from tfkd_ray.cli.main import _parser


def listing() -> str:
    """Return Markdown: the verbs in their groups, each with its usage, arguments and examples."""
    parsers = verbs_of(_parser())
    lines = []
    for group, (_, verbs) in GROUPS.items():
        lines += [f"## {group.capitalize()}", ""]
        for verb in verbs:
            lines += verb_lines(verb, parsers[verb])
    return "\n".join(lines).rstrip()


def verb_lines(verb: str, parser: ArgumentParser) -> Iterator[str]:
    """Yield the lines of a verb, then those of its parts."""
    yield from (f"### tfkd {verb}", "", parser.description or "", "")
    parts = verbs_of(parser)
    if not parts:
        yield from own_lines(verb, parser)
    for part, below in parts.items():
        yield from verb_lines(f"{verb} {part}", below)


def own_lines(verb: str, parser: ArgumentParser) -> Iterator[str]:
    """Yield the usage, the arguments and the examples of a verb without parts."""
    listed = [action for action in parser._actions if is_listed(action)]
    options = [action for action in listed if action.option_strings]
    arguments = [action for action in listed if not action.option_strings]
    words = [parser.prog, *["[options]"][: len(options)], *(value_of(a, parser) for a in arguments)]
    usage = (parser.usage or " ".join(words)) % {"prog": parser.prog}
    yield from ("```text", usage, "```", "")
    if listed:
        rows = [row(action, parser) for action in [*arguments, *options]]
        yield from ("| argument | meaning |", "|---|---|", *rows, "")
    yield from ("For example:", "", "```text", *EXAMPLES[verb], "```", "")


def is_listed(action: Action) -> bool:
    """Return whether an action has a row: all but --help, parts and hidden options."""
    hidden = isinstance(action, _HelpAction | _SubParsersAction)
    return not hidden and action.help != SUPPRESS


def value_of(action: Action, parser: ArgumentParser) -> str:
    """Return the value that an argument or option takes, as its usage has it."""
    formatter = parser._get_formatter()
    return formatter._format_args(action, action.metavar or action.dest.upper())


def row(action: Action, parser: ArgumentParser) -> str:
    """Return the row of an argument or option."""
    value = value_of(action, parser)
    if action.option_strings:
        names = [f"{name} {value}".strip() for name in action.option_strings]
    else:
        names = [value.split(" ")[0].strip("[]")]  # of EXPERIMENT [EXPERIMENT ...], the first
    shown = ", ".join(f"`{name}`" for name in names)
    meaning = parser._get_formatter()._expand_help(action)
    return f"| {escaped(shown)} | {escaped(meaning)} |"


def escaped(text: str) -> str:
    """Return a text for the cell of a table."""
    return text.replace("|", "\\|")
