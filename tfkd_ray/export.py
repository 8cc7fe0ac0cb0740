"""A chosen student as a folder to give away: weights, configuration, graphs that run without this package, and a card.

    README.md            model card: what it is, how it was chosen, the verdict or its absence, how to make it again
    student.safetensors  weights; what they belong to is in the header
    config.yaml          the resolved configuration: `tfkd train config.yaml` trains it again
    student.pt2          torch.export: uint8 images in, logits out, any batch size; loads with torch alone
    student.onnx         the same for ONNX, where asked for
    SHA256SUMS           of all of these, as sha256sum writes it; see `verify`

To add a form: a function like `_pt2` and its line in `_graphs`. The test split is never opened here.

Shapes: images [B, C, H, W] uint8 in, logits [B, K] out.
"""

import contextlib
import fcntl
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import secrets
import shlex
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tfkd_ray.arms import read_comparison
from tfkd_ray.checkpoint import WEIGHTS, load_weights, save_weights
from tfkd_ray.config import TrainConfig
from tfkd_ray.data import Dataset
from tfkd_ray.evaluate import EVAL_PIXELS
from tfkd_ray.experiment import (
    Record,
    best,
    check_writable,
    damaged,
    parse_json,
    read_experiment,
    read_metrics,
    read_record,
    read_records,
    read_text,
    selection_metric,
    trials_folder,
    write_text,
)
from tfkd_ray.files import PART, kind_of
from tfkd_ray.loop import LOOP_VERSION
from tfkd_ray.schema import ConfigError, did_you_mean, dump_yaml, read_yaml, validated
from tfkd_ray.scores import Score, ranked, score_of
from tfkd_ray.teachers import known_of, teacher_name
from tfkd_ray.verdict import Metric

IMAGES = 256
"""Images that the graphs are compared on, from validation, or from train where validation has fewer."""
TOLERANCE = 1e-3
"""Largest difference of logits that is let pass, as a fraction of the largest logit."""
OPSET = 20
"""Of ONNX: the one that ONNX 1.15 brought, and torch's default."""
GRAPH, ONNX, SUMS = "student.pt2", "student.onnx", "SHA256SUMS"


class ExportFailed(RuntimeError):
    """An exported graph does not compute what the student computes."""


class Difference(NamedTuple):
    """How far an exported graph is from the student."""

    largest: float
    """Absolute difference of logits, over all images and classes."""
    scale: float
    """The largest absolute logit of the student."""


@dataclass(frozen=True)
class Chosen:
    """The student to export, and what its files say about it."""

    name: str
    folder: Path
    """Holds its weights."""
    storage: Path
    """Holds `teachers/`, and comparisons."""
    config: TrainConfig
    metrics: dict[str, float]
    """Of its last epoch."""
    selection: list[str]
    """How it was chosen: paragraphs."""
    verdict: list[str]
    """What a comparison says: the lines of the card's section."""
    made: dict[str, Any] = field(default_factory=dict)
    """Command, versions, git commit, seeds, as they were written down when it was trained; empty where they were not.
    """


def export(
    source: Path,
    out: Path,
    *,
    arm: str | None = None,
    seed: int | None = None,
    onnx: bool = False,
    licence: str | None = None,
) -> dict[str, Any]:
    """Write a student's folder, whole or not at all; what comes back is below.

    Args:
        source: an experiment (its best full-length trial), a trial's folder, what `tfkd train` made, or a comparison.
        arm: of a comparison. None: the candidate that is better than every baseline; of several, or where none is, the
            one with the best mean on the test split.
        seed: of a comparison. None: the first that was trained to the end.
        licence: of the weights, as the Hugging Face Hub writes it (apache-2.0). None: the card says that none is given.

    Returns:
        `name`, `folder`, `files`, `split` and `images` (how many the graphs were compared on), `differences` (by file:
        `largest` of logits, and the student's `scale`), `problems` (by file: why a graph could not be made) and
        `confirmed` (whether a verdict is in the card).
    """
    source, out = source.expanduser().absolute(), out.expanduser().absolute()
    _check(out, onnx, licence)
    chosen = choose(source, arm, seed)
    data = chosen.config.data
    data.check()
    network, notes = _network(chosen)
    split, batches = _images(data)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _whole_folder(out) as part:
        save_weights(part / WEIGHTS, network.state_dict(), _header(chosen, licence))
        write_text(part / "config.yaml", dump_yaml(chosen.config.model_dump(mode="json")))
        found, problems = _graphs(part, network, data, batches, onnx)
        result: dict[str, Any] = {
            "name": chosen.name,
            "folder": str(out),
            "split": split,
            "images": sum(map(len, batches)),
            "differences": {name: difference._asdict() for name, difference in found.items()},
            "problems": problems,
            "confirmed": chosen.verdict[:1] != [NOT_CONFIRMED],
        }
        write_text(part / "README.md", "\n".join(_card(chosen, result, notes, licence)) + "\n")
        names = sorted(path.name for path in part.iterdir())
        write_text(part / SUMS, "".join(f"{_sha256(part / name)}  {name}\n" for name in names))
    return {**result, "files": [*names, SUMS]}


def verify(folder: Path) -> list[str]:
    """Names of an exported folder's files, all of which are as they were written, or a ConfigError.

    Finds damage, and changes by whoever leaves SHA256SUMS alone; it is no signature.
    """
    path = folder / SUMS
    if not path.is_file():
        raise ConfigError(f"not an exported student: there is no {SUMS} in it", folder)
    listed, problems = dict[str, str](), list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\\0]+)", line)
        if match is None:
            problems.append(f"{SUMS}: line {number} is not a checksum and a name: {line[:80]!r}")
        else:
            listed[match[2]] = match[1]
    for name, expected in listed.items():
        if not (folder / name).is_file():
            problems.append(f"{name}: missing; {SUMS} lists it")
        elif _sha256(folder / name) != expected:
            problems.append(f"{name}: changed: its SHA-256 is not the one in {SUMS}; get it again")
    there = {p.name for p in folder.iterdir()} - {SUMS}
    problems += [f"{name}: not in {SUMS}: it was added later" for name in sorted(there - set(listed))]
    problems += [] if listed else [f"{SUMS}: lists no file"]
    if problems:
        raise ConfigError(problems, folder)
    return sorted(listed)


def _check(out: Path, onnx: bool, licence: str | None) -> None:
    """Raise where nothing could be written, before anything is read."""
    kind = kind_of(out, follow=False)
    if out.name in ("", ".."):
        raise ConfigError("is no name of a new directory; choose another: -o DIR", out)
    if os.path.lexists(out) and (kind != "a directory" or any(out.iterdir())):
        what = "is not empty" if kind == "a directory" else f"is {kind or 'a file'}"
        raise ConfigError(f"{what}; choose another directory: -o DIR", out)
    check_writable(out.parent, "-o DIR")
    missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if onnx and importlib.util.find_spec(p) is None]
    if missing:
        raise ConfigError(f"--onnx: {', '.join(missing)} not installed here: pip install 'tfkd_ray[onnx]'")
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise ConfigError(f"--licence: a short name such as apache-2.0, mit or cc-by-4.0, got {licence!r}")


# --- which student ---------------------------------------------------------------------------------------------


def choose(source: Path, arm: str | None = None, seed: int | None = None) -> Chosen:
    """The student that `source` stands for, see `export`; a ConfigError where there is none."""
    if not source.is_dir():
        what = (
            "is a file; name the folder it is in" if source.exists() else f"no such folder (looked from {Path.cwd()})"
        )
        raise ConfigError(what, source)
    if (source / "confirm.yaml").is_file():
        with damaged(source / "confirm.json"):
            return _of_comparison(source, arm, seed)
    if arm is not None or seed is not None:
        given = "--arm" if arm is not None else "--seed"
        raise ConfigError(
            f"{given}: picks a run of a comparison, and there is no confirm.yaml here; leave it out", source
        )
    if (source / "experiment.yaml").is_file():
        records = read_records(source)
        winner = best(records, selection_metric(source))
        if winner is None:
            raise ConfigError(
                f"no trial of full length yet ({len(records)} trials), so none has weights; go on with: tfkd resume "
                f"{shlex.quote(str(source))}",
                source,
            )
        return _of_trial(winner, source)
    if (source / "trial.json").is_file():
        record, above = read_record(source), source.parent.parent
        if (above / "confirm.yaml").is_file():
            with damaged(above / "confirm.json"):
                return _of_comparison(above, record.parameters.get("arm"), record.parameters.get("seed"))
        return _of_trial(record, above)
    if (source / "config.yaml").is_file():
        return _of_run(source)
    raise ConfigError(
        "holds no student: an experiment has experiment.yaml, a comparison confirm.yaml, a trial trial.json, and what "
        "tfkd train made config.yaml",
        source,
    )


def _of_trial(record: Record, experiment: Path) -> Chosen:
    """A trial of a sweep."""
    path = record.folder / "trial.json"
    if record.status != "done":
        reason = f": {record.reason.splitlines()[0]}" if record.reason else ""
        raise ConfigError(f"{record.status}{reason}; only a trial of full length has weights to export", path)
    config = validated(TrainConfig, record.config, path)
    metric = selection_metric(experiment)
    records = read_records(experiment)
    winner = best(records, metric)
    value = f"{metric} {record.last[metric]:.4f}"
    if winner is not None and winner.name == record.name:
        full = sum(r.status == "done" for r in records)
        text = (
            f"The best of {len(records)} trials of the sweep `{experiment.name}` on validation ({full} of full "
            f"length): {value} after its last epoch. It was selected by this number, which is therefore flattering: of "
            "many trials the luckiest is always ahead of its true value."
        )
    else:
        ahead = f"; its best trial is `{winner.name}` with {winner.last[metric]:.4f}" if winner else ""
        text = (
            f"Trial `{record.name}` of the sweep `{experiment.name}` ({len(records)} trials), picked by hand: {value} "
            f"on validation after its last epoch{ahead}."
        )
    about = read_experiment(experiment)
    return Chosen(
        name=f"{experiment.name}/{record.name}",
        folder=record.folder,
        storage=experiment.parent,
        config=config,
        metrics=record.last,
        selection=[text],
        verdict=_found_verdicts(experiment.parent, config),
        made={key: about[key] for key in MADE if key in about},
    )


def _of_run(folder: Path) -> Chosen:
    """What `tfkd train` made."""
    config = validated(TrainConfig, read_yaml(folder / "config.yaml"), folder / "config.yaml")
    metrics = read_metrics(folder)
    if not (folder / WEIGHTS).is_file():
        done = f"{metrics[-1]['epoch']:.0f}" if metrics else "none"
        raise ConfigError(
            f"not finished: no {WEIGHTS} in it, {done} of {config.epochs} epochs done; the same tfkd train command "
            "goes on",
            folder,
        )
    return Chosen(
        name=folder.name,
        folder=folder,
        storage=folder.parent,
        config=config,
        metrics=metrics[-1] if metrics else {},
        selection=["A single run. What else was tried before it was chosen is not known here."],
        verdict=_found_verdicts(folder.parent, config),
    )


def _of_comparison(directory: Path, arm: str | None, seed: int | None) -> Chosen:
    """A run of a comparison."""
    compared, result = read_comparison(directory), _outcome(directory)
    if result is None:
        raise ConfigError(
            f"not finished: not judged yet, no confirm.json in it; go on: tfkd resume {shlex.quote(str(directory))}",
            directory,
        )
    arms = {found["name"]: found for found in result["arms"]}
    if arm is not None and arm not in arms:
        raise ConfigError(f"--arm: no arm {arm!r}; {did_you_mean(arm, arms)}", directory)
    metric = score_of(compared.arms.metric)
    name = arm if arm is not None else _best_arm(result, metric)
    runs = {run["seed"]: run for run in arms[name]["runs"]} if name is not None else {}
    done = [s for s, run in runs.items() if run["status"] == "done"]
    if name is None or not done:
        raise ConfigError(
            f"{name or 'no arm'}: no run was trained to the end; see {trials_folder(directory)}", directory
        )
    if seed is not None and seed not in done:
        why = f"{runs[seed]['status']}: {runs[seed].get('reason', '')}" if seed in runs else "no such seed"
        raise ConfigError(f"--seed: {name} with {seed}: {why}; trained to the end: {_listed(done)}", directory)
    wanted = (name, done[0] if seed is None else seed)
    run = next((r for r in compared.runs_on_data if (r.arm, r.seed) == wanted), None)
    if run is None:
        raise ConfigError(
            f"confirm.json has a run of {wanted[0]} with seed {wanted[1]}, confirm.yaml has none", directory
        )
    folder = trials_folder(directory) / run.name
    about = read_yaml(directory / "confirm.yaml")
    return Chosen(
        name=f"{directory.name}/{run.name}",
        folder=folder,
        storage=directory.parent,
        config=run.config,
        metrics=(read_metrics(folder) or [{}])[-1],
        selection=_arm_selection(
            result, metric, directory, name, run.seed, by_hand=(arm is not None, seed is not None)
        ),
        verdict=_verdict(result, directory, name),
        made={key: about[key] for key in MADE if key in about},
    )


def _outcome(directory: Path) -> dict[str, Any] | None:
    """What confirm.json says; None where there is none."""
    with damaged(path := directory / "confirm.json"):
        found: dict[str, Any] | None = parse_json(read_text(path)) if os.path.lexists(path) else None
    return found


def _values(arm: dict[str, Any], metric: Score) -> list[float]:
    """On the test split, by seed, as the comparison measured them."""
    return [run[metric.name] for run in arm["runs"] if metric.name in run]


def _best_arm(result: dict[str, Any], metric: Score) -> str | None:
    """The candidate that is better than every baseline, and of several, or where none is, the one with the best mean.

    'Cannot tell' goes before nothing: an arm with few seeds and a poor mean gets it easily. Without candidates any arm.
    """
    words = {c["name"]: c["verdict"] for found in result["verdicts"] for c in found["candidates"]}
    judged = [arm for arm in result["arms"] if _values(arm, metric)]
    best_first = ranked(judged, metric.key, lambda arm: statistics.fmean(_values(arm, metric))) or judged

    def place(arm: dict[str, Any]) -> tuple[bool, bool]:
        return arm["role"] == "candidate", words.get(arm["name"]) == "better"

    return max(best_first, key=place)["name"] if best_first else None


def _arm_selection(
    result: dict[str, Any], metric: Score, directory: Path, name: str, seed: int, *, by_hand: tuple[bool, bool]
) -> list[str]:
    arms = {arm["name"]: arm for arm in result["arms"]}
    candidates = sum(arm["role"] == "candidate" for arm in result["arms"])
    if by_hand[0]:
        chosen = f"Arm `{name}` of the comparison `{directory.name}`, picked by hand"
    elif not candidates:
        chosen = f"Arm `{name}`: the best mean of the comparison `{directory.name}`, which has no candidates"
    else:
        chosen = (
            f"Arm `{name}`: of the {candidates} candidates of the comparison `{directory.name}` the first by verdict "
            "(better than every baseline, or not), then by mean"
        )
        if candidates > 1:
            chosen += "; that is a choice by the test split, and flatters the mean a little"
    which = "picked by hand" if by_hand[1] else "the first that was trained to the end, not the best"
    values = _values(arms[name], metric)
    own = next(run for run in arms[name]["runs"] if run["seed"] == seed)
    texts = [f"{chosen}. Seed {seed}: {which}. Trained on {result['trained_on']}."]
    if values and metric.name in own:
        spread = ""
        if len(values) > 1:
            spread = f" ± {metric.number(statistics.stdev(values))} (standard deviation)"
        texts.append(
            f"Test {metric.label} of this run: {metric.show(own[metric.name])}. To be expected is the mean over all "
            f"{len(values)} seeds: {metric.show(statistics.fmean(values))}{spread}."
        )
    return texts


# --- what a comparison says ------------------------------------------------------------------------------------

NOT_CONFIRMED = (
    "**Not confirmed.** No comparison of this configuration with its baselines over several seeds was found, so "
    "nothing is known about whether distillation helped; `tfkd confirm` makes one."
)
MADE = ("created", "command", "versions", "git_commit", "seeds")


def _found_verdicts(storage: Path, config: TrainConfig) -> list[str]:
    """What the comparisons beside an experiment say about a configuration."""
    lines, unread, wanted = list[str](), list[str](), _recipe_print(config)
    for path in sorted(storage.glob("*/confirm.json")):
        directory = path.parent
        try:
            compared, result = read_comparison(directory), _outcome(directory)
        except ConfigError as error:
            unread += ["", f"The comparison `{directory.name}` could not be read: {error.problems[0]}"]
            continue
        for arm in compared.arms.arms:
            if result is not None and _recipe_print(arm.config) == wanted:
                lines += ["", *_verdict(result, directory, arm.name)]
                lines += [
                    "",
                    "That is about the configuration, trained anew with other seeds. These weights are not among those "
                    "that were judged, and have not seen the test split.",
                ]
    return [*(lines[1:] or [NOT_CONFIRMED]), *unread]


def _recipe_print(config: TrainConfig) -> str:
    """Fingerprint of a configuration whatever its seeds, and whether validation is held out."""
    teacher = config.teacher and config.teacher.model_copy(update={"seed": 0})
    data = config.data.model_copy(update={"val_fraction": 0.0})
    return config.model_copy(update={"seed": 0, "data": data, "teacher": teacher}).fingerprint()


def _verdict(result: dict[str, Any], directory: Path, arm: str) -> list[str]:
    """The verdict on an arm: a sentence, its comparisons with intervals, notes."""
    opened = result["opened"][0]["when"][:10] if result["opened"] else "an unknown day"
    where = f"Comparison `{directory.name}`, test split of {result['test']}, trained on {result['trained_on']}"
    lines = [f"{where}; first opened on {opened}."]
    if result["preset"]:
        lines.append(f"Preset {result['preset']}: scaled down to see it run; its numbers say nothing about full runs.")
    judged = [(found, c) for found in result["verdicts"] for c in found["candidates"] if c["name"] == arm]
    if not judged:
        role = next(a["role"] for a in result["arms"] if a["name"] == arm)
        lines += ["", f"No verdict on `{arm}`: it is a {role} there, or had too few seeds to be judged."]
        lines += [f"Of the others: {found['sentence']}." for found in result["verdicts"]]
    for found, candidate in judged:
        metric = Metric(**found["metric"])
        lines += ["", f"**{candidate['sentence']}.**", ""]
        lines += [f"| lead in {metric.name} over | lead | 95 % over seeds | 95 % over test images | n | p |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        for c in candidate["comparisons"]:
            images = "-" if c["images"] is None else _interval(metric, *c["images"])
            lines.append(
                f"| {c['over']} | {metric.show(c['lead'])}{metric.unit} | {_interval(metric, c['low'], c['high'])} | "
                f"{images} | {len(c['seeds'])} | {'< 0.001' if c['p'] < 0.001 else format(c['p'], '.3f')} |"
            )
        if found["searched"]:
            lines += ["", f"The candidates are the best of {found['searched']:,} configurations, on validation."]
        lines += [line for note in found["notes"] for line in ("", f"Note: {note}.")]
    others = tuple(f"{a['name']}: " for a in result["arms"] if a["name"] != arm)
    return lines + [line for note in result["notes"] if not note.startswith(others) for line in ("", f"Note: {note}.")]


def _interval(metric: Metric, low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else metric.interval(low, high)


# --- weights and graphs ----------------------------------------------------------------------------------------


def _network(chosen: Chosen) -> tuple[nn.Module, list[str]]:
    """(the student in eval mode, on the CPU; what is odd about its file)."""
    config, path = chosen.config, chosen.folder / WEIGHTS
    if not path.is_file():
        raise ConfigError(f"its weights are gone: no {WEIGHTS} in it", chosen.folder)
    try:
        with torch.random.fork_rng(devices=[]):
            network = config.build_student()
        network.load_state_dict(load_weights(path))
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(f"damaged: {error}; train it again", path) from None
    except RuntimeError as error:  # what load_state_dict says
        problem = " ".join(str(error).split())
        raise ConfigError(f"its weights do not fit its configuration: {problem[:300]}", path) from None
    run = config.fingerprint(LOOP_VERSION)
    notes = []
    if header.get("run") != run:
        notes.append(
            f"The weights say that run {header.get('run')} made them, and this release calls the configuration {run}: "
            "another release trained them, or a file was changed by hand."
        )
    return network.eval().requires_grad_(False), notes


def _images(data: Dataset) -> tuple[str, list[Tensor]]:
    """(split, uint8 images in batches of 1, 7 and more), spread evenly over the split."""
    train, val = data.load()
    split, images = "train", train
    if val is not None and len(val) >= min(IMAGES, len(train)):
        split, images = "validation", val
    index = torch.linspace(0, len(images) - 1, min(IMAGES, len(images)), dtype=torch.float64).round().long()
    batch = max(1, EVAL_PIXELS // math.prod(data.shape[1:]))
    shares = [share for share in (index[:1], index[1:8], *index[8:].split(batch)) if len(share)]
    return split, list(images.read(shares))


class _Graph(nn.Module):
    """The student behind its normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, data: Dataset) -> None:
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in data.statistics())
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images.float() - self.mean) / self.std)
        return logits


def _graphs(
    folder: Path, network: nn.Module, data: Dataset, batches: Sequence[Tensor], onnx: bool
) -> tuple[dict[str, Difference], dict[str, str]]:
    """Write the graphs; (by file how far each is from the student, by file why it could not be made)."""
    graph = _Graph(network, data).eval()
    with torch.no_grad():
        expected = torch.cat([graph(images) for images in batches])
    found, problems = dict[str, Difference](), dict[str, str]()
    forms: dict[str, Callable[[Path, ExportedProgram, Sequence[Tensor]], list[Tensor]]] = {GRAPH: _pt2}
    forms |= {ONNX: _onnx} if onnx else {}
    try:
        program = _program(graph, data.shape)
    except Exception as error:  # whatever its author's code does when it is traced
        return {}, dict.fromkeys(forms, f"torch.export: {_reason(error)}")
    for name, write in forms.items():
        try:
            logits = torch.cat(write(folder / name, program, batches))
        except Exception as error:  # an operation without a form in this format can end in any exception
            (folder / name).unlink(missing_ok=True)
            problems[name] = _reason(error)
            continue
        found[name] = difference = Difference(
            float((logits.double() - expected.double()).abs().max()), float(expected.double().abs().max())
        )
        if not difference.largest <= TOLERANCE * difference.scale:  # also where either is not a number
            raise ExportFailed(
                f"{name}: its logits differ from the student's by up to {difference.largest:.2g} on {len(expected)} "
                f"images, where {TOLERANCE:g} of their scale ({difference.scale:.3g}) is allowed; nothing was written"
            )
    return found, problems


def _program(graph: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
    """The graph for any batch size, without the places on this machine that it was traced at."""
    example = (torch.zeros(2, *shape, dtype=torch.uint8),)
    sizes = {"images": {0: Dim("batch", min=1)}}
    try:
        program = torch.export.export(graph, example, dynamic_shapes=sizes, strict=False)
    except Exception as error:  # each way follows code that the other cannot, such as len(images)
        try:
            program = torch.export.export(graph, example, dynamic_shapes=sizes, strict=True)
        except Exception:
            raise error from None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _pt2(path: Path, program: ExportedProgram, batches: Sequence[Tensor]) -> list[Tensor]:
    """Write the graph for torch; its logits, from the file."""
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    with torch.no_grad():
        return [module(images) for images in batches]


def _onnx(path: Path, program: ExportedProgram, batches: Sequence[Tensor]) -> list[Tensor]:
    """Write the graph for ONNX; its logits, from the file, by onnxruntime."""
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(
        program, (), path, dynamo=True, opset_version=OPSET, external_data=False, verbose=False, **names
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) for images in batches]


def _reason(error: Exception) -> str:
    """An exception in a line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


# --- the card --------------------------------------------------------------------------------------------------


def _header(chosen: Chosen, licence: str | None) -> dict[str, str]:
    """What the weights say about themselves."""
    data = chosen.config.data
    mean, std = data.statistics()
    return {
        "format": "pt",
        "name": chosen.name,
        "run": chosen.config.fingerprint(LOOP_VERSION),
        "student": json.dumps(chosen.config.student.model_dump(mode="json")),
        "data": data.name,
        "shape": json.dumps(data.shape),
        "num_classes": str(data.num_classes),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "license": licence or "none given",
        "tfkd_ray": importlib.metadata.version("tfkd_ray"),
    }


def _card(chosen: Chosen, result: dict[str, Any], notes: list[str], licence: str | None) -> Iterator[str]:
    config = chosen.config
    data, objective = config.data, config.objective.name
    given = {"license": licence} if licence else {"license": "other", "license_name": "none-given"}
    about = {"pipeline_tag": "image-classification", "tags": ["knowledge-distillation", "tfkd_ray", objective]}
    yield "---"
    yield dump_yaml({**given, "library_name": "pytorch", **about}).rstrip()
    yield "---"
    yield f"\n# {config.student.name} trained with {objective} on {data.name}"
    yield f"\n`{chosen.name}`, written by tfkd_ray {importlib.metadata.version('tfkd_ray')}."
    yield from _use(config, result)
    yield "\n## How it was chosen\n"
    yield "\n\n".join([*chosen.selection, *notes])
    if measured := {k: v for k, v in chosen.metrics.items() if k.startswith("val_")}:
        yield f"\nOn validation, after epoch {chosen.metrics['epoch']:.0f}:\n\n| metric | value |\n|---|---:|"
        yield from (f"| {key} | {value:.4f} |" for key, value in measured.items())
    elif not data.val_fraction:
        yield "\nThere is no value on validation: it was trained on, too."
    yield "\n## Does it help? The verdict\n"
    yield from chosen.verdict
    yield "\n## Recipe\n"
    tree = config.model_dump(mode="json")
    yield "```yaml"
    yield dump_yaml(
        {k: tree[k] for k in ("objective", "epochs", "optim", "schedule", "augment", "init", "seed")}
    ).rstrip()
    yield "```"
    yield "\n## Teacher\n"
    yield from _teacher(chosen)
    yield "\n## Licence\n"
    yield f"{licence}." if licence else "None given: ask whoever trained it. `tfkd export --licence NAME` names one."
    yield "The data have terms of their own."
    yield from _again(chosen)


def _use(config: TrainConfig, result: dict[str, Any]) -> Iterator[str]:
    """Input, output, files."""
    data = config.data
    channels, height, width = data.shape
    mean, std = data.statistics()
    yield "\n## Use\n"
    if GRAPH in result["differences"]:
        yield "```python\nimport torch"
        yield f'student = torch.export.load("{GRAPH}").module()'
        yield f"logits = student(images)  # uint8 [B, {channels}, {height}, {width}], any B\n```\n"
    yield f"- Input: uint8 images [B, {channels}, {height}, {width}], with the values that {data.name} has."
    if data.streams:
        yield f"  The shorter side is resized to {round(height * 256 / 224)} and the centre cut out; RGB."
    yield "- Normalisation is inside the graphs. The bare weights want (image - mean) / std of each channel, with"
    yield f"  mean {_listed(mean)} and std {_listed(std)} (pixels 0 to 255)."
    order = "the sorted names of its class folders" if data.streams else "the data set's own order"
    yield f"- Output: logits of {data.num_classes} classes, 0 to {data.num_classes - 1}, in {order}."
    if result["differences"]:
        yield f"\nCompared with the student on {result['images']} images of {result['split']}:\n"
        yield "| file | largest difference of logits | of the largest logit |\n|---|---:|---:|"
        for name, found in result["differences"].items():
            share = found["largest"] / found["scale"] if found["scale"] else 0.0
            yield f"| {name} | {found['largest']:.2g} | {share:.1g} of {found['scale']:.3g} |"
    if GRAPH in result["differences"]:
        yield f"\n`{GRAPH}` was written by torch {torch.__version__}, and older ones may not read it."
    if ONNX in result["differences"]:
        yield f"`{ONNX}` is of opset {OPSET}, with input `images` and output `logits`."
    for name, reason in result["problems"].items():
        yield f"\n`{name}` is not here, as the network could not be exported to it: `{reason}`"


def _teacher(chosen: Chosen) -> Iterator[str]:
    run = chosen.config.teacher_run()
    if run is None:
        yield "No trained teacher: the objective needs none."
        return
    try:
        about = known_of(run, chosen.storage)
    except ValueError as error:
        raise ConfigError(f"damaged: {error}", chosen.storage / "teachers" / teacher_name(run)) from None
    if about is None:
        yield f"`{teacher_name(run)}` (fingerprint `{run.fingerprint(LOOP_VERSION)}`)."
        yield "Its files are not beside this student's, so no more is known of it here."
        return
    yield f"`{about['name']}` (fingerprint `{about['name'].rpartition('-')[2]}`)."
    weights = about["config"].get("weights")
    if weights:
        name = weights if weights.startswith("torchvision") else Path(weights).name
        yield f"Its weights are from elsewhere (`{name}`); what they were trained on is not known."
    else:
        epochs = f"{about['metrics']['epoch']:.0f} of {run.epochs} epochs"
        yield f"A {run.student.name} trained with {run.objective.name}, {epochs}, seed {run.seed}."
    yield from (f"- {k}: {v:.4f}" for k, v in about["metrics"].items() if k.startswith("val_"))
    yield f"- SHA-256 of its weights: `{about['sha256']}`; trained with torch {about['torch']}"


def _again(chosen: Chosen) -> Iterator[str]:
    """How to reproduce it."""
    made, config = chosen.made, chosen.config
    versions = made.get("versions") or {}
    yield "\n## Train it again\n"
    if versions:
        pins = " ".join(f"{name}=={version}" for name, version in versions.items() if name != "python")
        yield f"```sh\n# Python {versions.get('python')}\npip install {pins}\ntfkd train config.yaml\n```\n"
    else:
        yield "```sh\ntfkd train config.yaml\n```\n"
        yield "Which versions trained it was not written down."
    yield "With the same versions and `cpus_per_worker` on a CPU of the same type the weights are the same to the bit."
    yield "`config.yaml` says where the data were on that machine: set `data.root` if they are elsewhere.\n"
    if command := made.get("command"):
        yield f"- First made by: `{shlex.join(['tfkd', *map(str, command[1:])])}`, {made.get('created', 'undated')}"
    yield f"- git commit where that was called: {made.get('git_commit') or 'none known'} (+: with changes)"
    yield f"- Seeds: training {config.seed}, split {config.data.split_seed}"
    yield f"- Run: `{config.fingerprint(LOOP_VERSION)}`, loop version {LOOP_VERSION}"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values)


# --- files -----------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write to: it becomes `out` if all goes well, and nothing if not.

    What an export to the same place left that was killed is removed: its folder is locked by nobody.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 8}{PART}"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left)
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}{PART}")
    part.mkdir()
    try:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # a file system without locks
                held.enter_context(_locked(part))
            yield part
            for path in part.iterdir():
                with path.open("rb") as file:
                    os.fsync(file)
            part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; an OSError if another process does, or if it is no folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
