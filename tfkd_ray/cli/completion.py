"""Completion scripts for bash, zsh and fish, written from the parser.

Verbs, options, their choices, shipped search spaces and settings stand in the script; the names of
experiments are read from ./tfkd_results when they are asked for.
"""

import shlex
from argparse import Action, ArgumentParser
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tfkd_ray.cli.guide import GROUPS, SHELLS, verbs_of
from tfkd_ray.settings.known import KNOWN
from tfkd_ray.settings.yaml import shipped_files

KINDS = {
    "file": ("spaces", "files"),
    "space": ("spaces", "files"),
    "overrides": ("settings",),
    "experiment": ("experiments", "files"),
    "experiments": ("experiments", "files"),
    "others": ("experiments", "files"),
    "prior": ("experiments", "files"),
    "confirm": ("experiments", "files"),
    "source": ("experiments", "files"),
}
"""Words for an argument, by where its parser stores it. Others that name a place take files."""
PHRASES = {verb: phrase for _, verbs in GROUPS.values() for verb, phrase in verbs.items()}


@dataclass
class Completed:
    """What may follow a verb, or a part of one; of no verb, the verbs."""

    at: str
    words: dict[str, str] = field(default_factory=dict)
    """Words, and what they are for, if that is said."""
    kinds: list[str] = field(default_factory=list)
    """Kinds of other words: spaces, experiments, settings, files."""
    options: dict[tuple[str, ...], tuple[list[str], list[str]]] = field(default_factory=dict)
    """Of each option that takes a value, by its spellings: (choices, kinds)."""


def completion_script(parser: ArgumentParser, shell: str) -> str:
    """Return the script that completes the commands of a parser in a shell."""
    write = dict(zip(SHELLS, (_bash, _zsh, _fish), strict=True))[shell]
    return "\n".join([*write(list(_contexts(parser))), ""])


def _contexts(parser: ArgumentParser, at: str = "") -> Iterator[Completed]:
    """Yield what completes a parser's words, and those of its verbs."""
    found = Completed(at)
    for action in parser._actions:
        for name in action.option_strings:
            found.words[name] = " ".join((action.help or "").split()).partition(";")[0]
        choices, kinds = _values_of_argument(action, at)
        if action.option_strings and action.nargs != 0:
            found.options[tuple(action.option_strings)] = choices, kinds
        elif not action.option_strings:
            found.words |= dict.fromkeys(choices, "")
            found.kinds += [kind for kind in kinds if kind not in found.kinds]
    below = verbs_of(parser)
    found.words |= {name: PHRASES.get(name, "") if not at else "" for name in below}
    yield found
    for name, sub in below.items():
        yield from _contexts(sub, f"{at} {name}".strip())


def _values_of_argument(action: Action, at: str) -> tuple[list[str], list[str]]:
    """Return (the choices of an argument, the kinds of words that it may be)."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices], []
    if at.startswith("cluster") and action.dest == "file":
        return sorted(shipped_files("clusters")), ["files"]
    if at == "init" and action.dest == "name":
        return sorted(shipped_files("search_spaces")), []
    if at == "confirm" and action.dest == "file":
        return [], ["experiments", "spaces", "files"]
    kinds = list(KINDS.get(action.dest, ()))
    is_place = action.metavar in ("DIR", "FILE") or action.type is Path
    return [], kinds or (["files"] if is_place else [])


def _as_one_word(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def _cases(contexts: list[Completed]) -> Iterator[str]:
    """Yield the lines of bash and zsh that find the verb, and set `list` and `kinds` for it."""
    yield '    for word in "${before[@]}"; do'
    yield '        case "$at $word" in'
    for found in contexts[1:]:
        above, _, last = found.at.rpartition(" ")
        yield f"            {shlex.quote(f'{above} {last}')}) at={shlex.quote(found.at)} ;;"
    yield "        esac"
    yield "    done"
    yield '    case "$at" in'
    for found in contexts:
        set_both = f"list={_as_one_word(found.words)} kinds={_as_one_word(found.kinds)}"
        yield f"        {shlex.quote(found.at)}) {set_both} ;;"
    yield "    esac"
    yield '    case "$at $prev" in'
    for found in contexts:
        for names, (choices, kinds) in found.options.items():
            spelled = "|".join(shlex.quote(f"{found.at} {name}") for name in names)
            yield f"        {spelled}) list={_as_one_word(choices)} kinds={_as_one_word(kinds)} ;;"
    yield "    esac"
    yield "    if [[ $cur != -* ]]; then"
    yield f'        [[ $kinds == *spaces* ]] && list+=" "{_as_one_word(shipped_files("search_spaces"))}'
    yield "        if [[ $kinds == *experiments* ]]; then"
    yield '            list+=" @last"'
    yield "            for word in $(ls tfkd_results 2>/dev/null); do"
    yield "                [[ -e tfkd_results/$word/experiment.yaml || -e tfkd_results/$word/confirm.yaml ]] &&"
    yield '                    list+=" $word"'
    yield "            done"
    yield "        fi"
    settings = _as_one_word(f"{name}=" for name in KNOWN)
    yield f'        [[ $kinds == *settings* && -n $cur ]] && list+=" "{settings}'
    yield "    fi"


def _bash(contexts: list[Completed]) -> Iterator[str]:
    yield '# completion of tfkd in bash; in ~/.bashrc: eval "$(tfkd completion bash)"'
    yield "_tfkd() {"
    yield "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}"
    yield '    local at="" word list="" kinds="" before'
    yield '    before=("${COMP_WORDS[@]:1:COMP_CWORD-1}")'
    yield "    COMPREPLY=()"
    yield '    [[ $cur == "=" || $prev == "=" ]] && return'
    yield from _cases(contexts)
    yield '    mapfile -t COMPREPLY < <(compgen -W "$list" -- "$cur")'
    yield "    if [[ $kinds == *files* && $cur != -* ]]; then"
    yield "        compopt -o filenames 2>/dev/null"
    yield '        mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$cur")'
    yield "    fi"
    yield "    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null"
    yield "    return 0"
    yield "}"
    yield "complete -F _tfkd tfkd"


def _zsh(contexts: list[Completed]) -> Iterator[str]:
    yield "#compdef tfkd"
    yield '# completion of tfkd in zsh; in ~/.zshrc, after compinit: eval "$(tfkd completion zsh)"'
    yield "_tfkd() {"
    yield "    setopt localoptions shwordsplit"
    yield "    local cur=${words[CURRENT]} prev=${words[CURRENT-1]}"
    yield '    local at="" word list="" kinds="" found'
    yield "    local -a before found"
    yield "    before=(${words[2,CURRENT-1]})"
    yield from _cases(contexts)
    yield "    found=($list)"
    yield "    compadd -- ${found:#*=}"
    yield "    compadd -S '' -- ${(M)found:#*=}"
    yield "    [[ $kinds == *files* && $cur != -* ]] && _files"
    yield "    return 0"
    yield "}"
    yield "compdef _tfkd tfkd"


def _fish(contexts: list[Completed]) -> Iterator[str]:
    yield "# completion of tfkd in fish: tfkd completion fish > ~/.config/fish/completions/tfkd.fish"
    yield "function __tfkd_at"
    yield '    set -l at ""'
    yield "    for word in (commandline -opc)[2..-1]"
    yield '        switch "$at $word"'
    for found in contexts[1:]:
        above, _, last = found.at.rpartition(" ")
        yield f"            case {_fish_word(f'{above} {last}')}"
        yield f"                set at {_fish_word(found.at)}"
    yield "        end"
    yield "    end"
    yield '    test "$at" = "$argv[1]"'
    yield "end"
    yield "function __tfkd_experiments"
    yield "    echo @last"
    yield "    for file in tfkd_results/*/experiment.yaml tfkd_results/*/confirm.yaml"
    yield "        basename (dirname $file)"
    yield "    end"
    yield "end"
    lists = {
        "spaces": " ".join(shipped_files("search_spaces")),
        "settings": " ".join(f"{name}=" for name in KNOWN),
        "experiments": "(__tfkd_experiments)",
    }
    yield "complete -c tfkd -f"
    for found in contexts:
        at = f"__tfkd_at {_fish_word(found.at)}"
        here = f"complete -c tfkd -n {_fish_word(at)}"
        begun = f"complete -c tfkd -n {_fish_word(f'{at}; and test -n (commandline -ct)')}"
        for kind in found.kinds:
            when = begun if kind == "settings" else here  # there are many of them
            yield f"{when} -F" if kind == "files" else f"{when} -a {_fish_word(lists[kind])}"
        for word, what in found.words.items():
            if not word.startswith("-"):
                yield f"{here} -a {_fish_word(word)} -d {_fish_word(what)}"
        valued = {name: given for names, given in found.options.items() for name in names}
        for word, what in found.words.items():
            if word.startswith("-"):
                kind = "-l" if word.startswith("--") else "-s"
                yield " ".join(
                    [
                        here,
                        kind,
                        word.lstrip("-"),
                        "-d",
                        _fish_word(what),
                        *_fish_value(valued.get(word), lists),
                    ]
                )


def _fish_value(given: tuple[list[str], list[str]] | None, lists: dict[str, str]) -> list[str]:
    """Return how fish is told what the value of an option may be."""
    if given is None:
        return []
    choices, kinds = given
    words = " ".join([*choices, *(lists[kind] for kind in kinds if kind != "files")])
    return [
        "-r",
        "-F" if "files" in kinds else "-f",
        *(["-a", _fish_word(words)] if words else []),
    ]


def _fish_word(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
