"""The verbs in groups with examples, and a parser that answers wrong words with the nearest right ones.

`tfkd` alone and `tfkd --help` show the groups; every other `--help` ends with the verb's examples.
A new verb needs a line in `GROUPS` and two examples in `EXAMPLES`.
"""

from argparse import (
    Action,
    ArgumentError,
    ArgumentParser,
    Namespace,
    _StoreAction,
    _SubParsersAction,
)
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

from tfkd_ray.settings.errors import did_you_mean, near_to
from tfkd_ray.settings.meant import places_of
from tfkd_ray.settings.passwords import masked, shown

GROUPS: dict[str, tuple[str, dict[str, str]]] = {
    "prepare": (
        "tfkd check digits_tfkd",
        {
            "spaces": "list the search spaces that ship with tfkd",
            "init": "copy one of them to change it, and fit it to your images",
            "check": "show what a file searches and fixes",
            "explain": "show the loss of each objective, and which settings matter",
            "plan": "estimate the trials, epochs, hours and disk of a sweep",
            "doctor": "find problems of this machine or of a cluster",
            "completion": "print the completion script of bash, zsh or fish",
        },
    ),
    "run": (
        "tfkd tune digits_tfkd --name first",
        {
            "tune": "run a sweep",
            "resume": "resume a sweep or comparison, or add trials",
            "stop": "stop a running sweep, or trials of it",
            "train": "train one configuration",
            "teacher": "train, list or show teachers",
            "cluster": "check, start, watch and stop clusters",
        },
    ),
    "look": (
        "tfkd status @last",
        {
            "status": "show the progress of an experiment",
            "trials": "list its trials",
            "best": "print the configuration of the best trial",
            "logs": "print the epochs of a trial, or of an objective's trials",
            "ls": "list experiments",
            "compare": "show sweeps side by side",
            "tensorboard": "compare trials in TensorBoard",
        },
    ),
    "conclude": (
        "tfkd confirm first --seeds 10",
        {
            "confirm": "judge the best trials, or arms, on the test split over seeds",
            "report": "write one HTML page",
            "export": "write a student as a folder: weights, graphs, model card",
        },
    ),
}
"""Of each group an example, and its verbs with a phrase."""

EXAMPLES: dict[str, tuple[str, str]] = {
    "spaces": ("tfkd spaces", "tfkd spaces --about"),
    "init": ("tfkd init digits_tfkd", "tfkd init fashion_tfkd --data pictures"),
    "check": ("tfkd check digits_tfkd", "tfkd check digits_tfkd epochs=9 --all"),
    "explain": ("tfkd explain digits_tfkd", "tfkd explain paper/table_9"),
    "plan": ("tfkd plan digits_tfkd", "tfkd plan digits_tfkd --probe --slots 2"),
    "doctor": ("tfkd doctor", "tfkd doctor --address auto --space digits_tfkd"),
    "completion": (
        'eval "$(tfkd completion bash)"',
        "tfkd completion fish > ~/.config/fish/completions/tfkd.fish",
    ),
    "tune": (
        "tfkd tune digits_tfkd --name first",
        "tfkd tune digits_tfkd --time-budget 600 epochs=9 search.num_samples=8",
    ),
    "resume": ("tfkd resume first", "tfkd resume first --add-trials 8"),
    "stop": ("tfkd stop first", "tfkd stop first t0003"),
    "train": ("tfkd best first > best.yaml && tfkd train best.yaml", "tfkd train best.yaml seed=1"),
    "teacher": ("tfkd teacher train digits_tfkd", "tfkd teacher list"),
    "teacher train": (
        "tfkd teacher train digits_tfkd",
        "tfkd teacher train fashion_tfkd --download",
    ),
    "teacher list": ("tfkd teacher list", "tfkd teacher list --storage /shared/results"),
    "teacher show": (
        "tfkd teacher show cnn-4ce749a93a968ac8",
        "tfkd teacher show cnn-4ce749a93a968ac8 --storage /shared/results",
    ),
    "cluster": ("tfkd cluster check aws-gpu", "tfkd cluster status mine.yaml"),
    "cluster check": ("tfkd cluster check aws-gpu", "tfkd cluster check mine.yaml --space mine"),
    "cluster up": ("tfkd cluster up mine.yaml", "tfkd cluster up mine.yaml --print"),
    "cluster status": ("tfkd cluster status mine.yaml", "tfkd cluster status mine.yaml --print"),
    "cluster submit": (
        "tfkd cluster submit mine.yaml -- tfkd doctor",
        "tfkd cluster submit mine.yaml --detach -- python study.py",
    ),
    "cluster logs": ("tfkd cluster logs mine.yaml", "tfkd cluster logs mine.yaml tfkd-tune-1"),
    "cluster down": ("tfkd cluster down mine.yaml", "tfkd cluster down mine.yaml --print"),
    "status": ("tfkd status", "tfkd status first --follow"),
    "trials": (
        "tfkd trials --sort val_accuracy:desc --limit 5",
        "tfkd trials first --filter objective=kd -o csv",
    ),
    "best": ("tfkd best first > best.yaml", "tfkd best --all"),
    "logs": ("tfkd logs first t0003", "tfkd logs first tfkd_reg"),
    "compare": ("tfkd compare first second", "tfkd compare @last first"),
    "ls": ("tfkd ls", "tfkd ls --storage /shared/results"),
    "tensorboard": ("tfkd tensorboard @last", "tfkd tensorboard first second --port 0"),
    "confirm": (
        "tfkd confirm first --seeds 10",
        "tfkd confirm digits_arms --preset smoke --seeds 2",
    ),
    "report": ("tfkd report first -o first.html", "tfkd report first --follow"),
    "export": ("tfkd export first", "tfkd export first -o student --onnx"),
}
"""Two command lines of each verb, and of each part of `teacher` and `cluster`."""


SHELLS = ("bash", "zsh", "fish")
"""Shells whose completion `tfkd completion` writes."""


GIVEN = "given_options"
"""Name of the list of given options, while a command line is parsed."""


class _Once(_StoreAction):
    """Stores the value of an option; refuses to store a second one, which would replace it."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None
    ) -> None:
        given = vars(namespace).setdefault(GIVEN, [])
        if option is not None and self.dest in given:
            raise ArgumentError(self, "given twice; give it once")
        given.append(self.dest)
        super().__call__(parser, namespace, values, option)


class Parser(ArgumentParser):
    """Parser of `tfkd` or of one of its verbs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def add_argument(self, *names: str, **options: Any) -> Action:
        """Add an argument; the help shows one without a dash in capitals, as the docs do."""
        if not names[0].startswith("-") and "choices" not in options:
            options.setdefault("metavar", names[0].upper())
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """Report an error of the command line, with passwords masked."""
        super().error(masked(message))

    def format_help(self) -> str:
        """Return the help of a verb with its examples; of `tfkd` itself, the groups of its verbs."""
        verb = self.prog.partition(" ")[2]
        if not verb:
            return f"{overview(verbs_of(self))}\n"
        examples = EXAMPLES.get(verb, ())
        return "\n".join([f"{super().format_help()}\nexamples:", *(f"  {e}" for e in examples), ""])


def overview(known: Collection[str]) -> str:
    """Return the verbs in their groups, each group with an example."""
    lines = [
        "usage: tfkd VERB ...",
        "",
        "Search the hyperparameters of knowledge distillation and teacher-free KD on Ray.",
    ]
    for group, (example, verbs) in GROUPS.items():
        lines += ["", f"{group}, such as  {example}"]
        lines += [f"  {verb:<13}{phrase}" for verb, phrase in verbs.items() if verb in known]
    lines += [
        "",
        "tfkd VERB --help shows its options and examples; tfkd --version the version.",
        "Exit codes: 0 done, 1 failed, 2 wrong input, 7 not better, 130 interrupted.",
    ]
    return "\n".join(lines)


def verbs_of(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """Return the parsers of a parser's verbs, or of a verb's parts, by name."""
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            return dict(action.choices)
    return {}


def check_verb_words(parser: ArgumentParser, words: Sequence[str]) -> ArgumentParser:
    """Return the parser of the verb in a command line; end with a sentence if there is none."""
    for word in words:
        known = verbs_of(parser)
        if not known or word.startswith("-"):
            break
        if word not in known:
            what = "verb" if parser.prog == "tfkd" else f"part of {parser.prog}"
            parser.error(f"no such {what}: {word[:80]!r}; {did_you_mean(word, known)}")
        parser = known[word]
    return parser


def refuse_rest(
    parser: ArgumentParser, verb: ArgumentParser, rest: Sequence[str], words: Sequence[str]
) -> NoReturn:
    """End with a sentence on the words of a command line that its verb does not take."""
    hints = dict.fromkeys(_hints(verb, rest, words))
    parser.error("; ".join([f"unrecognized arguments: {' '.join(rest)}", *hints]))


def _hints(verb: ArgumentParser, rest: Sequence[str], words: Sequence[str]) -> Iterator[str]:
    """Yield what each unknown option is likely to mean: a setting, or another option."""
    settings = any(action.dest == "overrides" for action in verb._actions)
    options = [name for action in verb._actions for name in action.option_strings]
    for word in rest:
        option, equals, value = word.partition("=")
        places = places_of(option.lstrip("-").replace("-", "_")) if settings else []
        if not option.startswith("--"):
            continue
        if option.replace("_", "-") in options or not places:
            if near := near_to(option, options, 0.75):
                yield f"did you mean {near!r}?"
            continue
        after = words[words.index(word) + 1 :][:1]
        if not equals:
            value = "VALUE" if not after or after[0].startswith("-") else after[0]
        yield f"a setting is written without dashes: {places[0]}={shown(value)}"
