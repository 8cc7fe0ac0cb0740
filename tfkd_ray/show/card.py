"""The model card of an exported student, and the header of its weights."""

import json
import shlex
from pathlib import Path

import torch

from tfkd_ray import __version__
from tfkd_ray.learn.config import TeacherRun, TrainConfig
from tfkd_ray.learn.dataset import Dataset
from tfkd_ray.learn.loop import LOOP_VERSION
from tfkd_ray.learn.teachers import known_of, teacher_name
from tfkd_ray.settings.errors import ConfigError, Sentences
from tfkd_ray.settings.yaml import Tree, dump_yaml
from tfkd_ray.show.chosen import GRAPH, ONNX, OPSET, Chosen, listed
from tfkd_ray.verdict.scores import OF_AVERAGE

# --- the card --------------------------------------------------------------------------------------------------


def weights_header(chosen: Chosen, licence: str | None) -> dict[str, str]:
    """Return the header that the weights file carries."""
    data = chosen.config.data
    mean, std = data.statistics()
    names = _class_names(data)
    return {
        "format": "pt",
        "name": chosen.name,
        "run": chosen.config.fingerprint(LOOP_VERSION),
        "student": json.dumps(chosen.config.student.tree),
        "data": data.name,
        "shape": json.dumps(data.shape),
        "num_classes": str(data.num_classes),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        **({"class_names": json.dumps(names)} if names else {}),
        "license": licence or "none given",
        "tfkd_ray": __version__,
    }


def _class_names(data: Dataset) -> list[str] | None:
    """Return the names of class folders by the numbers of their classes; None if there are none."""
    try:
        names = data.class_names()
    except ConfigError:  # exported on a machine without the data
        return None
    return None if names == [str(k) for k in range(data.num_classes)] else names


def card_text(chosen: Chosen, result: Tree, notes: list[str], licence: str | None) -> Sentences:
    config = chosen.config
    data, objective = config.data, config.objective.called
    given = {"license": licence} if licence else {"license": "other", "license_name": "none-given"}
    about = {
        "pipeline_tag": "image-classification",
        "tags": ["knowledge-distillation", "tfkd_ray", objective],
    }
    yield "---"
    yield dump_yaml({**given, "library_name": "pytorch", **about}).rstrip()
    yield "---"
    yield f"\n# {config.student.name} trained with {objective} on {data.name}"
    yield f"\n`{chosen.name}`, written by tfkd_ray {__version__}."
    yield from _use(config, result)
    yield "\n## How it was chosen\n"
    yield "\n\n".join([*chosen.selection, *notes])
    if measured := _of_exported(chosen):
        yield f"\nOn validation, after epoch {chosen.metrics['epoch']:.0f}:\n\n| metric | value |\n|---|---:|"
        yield from (f"| {key} | {value:.4f} |" for key, value in measured.items())
    elif not data.val_fraction:
        yield "\nThere is no value on validation, because the run also trained on it."
    yield "\n## Does it help? The verdict\n"
    yield from chosen.verdict
    yield "\n## Recipe\n"
    tree = config.tree
    yield "```yaml"
    recipe = (
        "objective",
        "epochs",
        "optim",
        "schedule",
        "ema",
        "augment",
        "init",
        "freeze",
        "seed",
        "loop",
    )
    yield dump_yaml({k: tree[k] for k in recipe if k in tree}).rstrip()
    yield "```"
    if data.unlabelled is not None:
        place = data.unlabelled if "/" not in data.unlabelled else f"`{Path(data.unlabelled).name}`"
        which = f" (digest `{data.unlabelled_digest}`)" if data.unlabelled_digest else ""
        yield (
            f"\nFor each labelled image a step had {data.unlabelled_ratio:g} without labels, of {place}{which}; they "
            "took part in the soft part of the loss alone."
        )
    yield "\n## Teacher\n"
    yield from _teacher_section(chosen)
    yield "\n## Licence\n"
    yield (
        f"{licence}."
        if licence
        else "None given; ask the person who trained it. `tfkd export --licence NAME` names one."
    )
    yield "The data have terms of their own."
    yield from _again_section(chosen)


def _of_exported(chosen: Chosen) -> dict[str, float]:
    """Return the metrics of the exported network on validation: with `ema`, of the averaged weights."""
    of_average = {key for key in OF_AVERAGE if key in chosen.metrics}
    found = of_average or {key for key in chosen.metrics if key.startswith("val_")}
    return {key: value for key, value in chosen.metrics.items() if key in found}


def _use(config: TrainConfig, result: Tree) -> Sentences:
    """Write how to use the files: input, output, examples."""
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
    yield f"  mean {listed(mean)} and std {listed(std)} (pixels 0 to 255)."
    order = "the sorted names of its class folders" if data.streams else "the data set's own order"
    yield f"- Output: logits of {data.num_classes} classes, 0 to {data.num_classes - 1}, in {order}."
    if names := _class_names(data):
        yield f"\n```json\n{json.dumps(names)}\n```"
    if result["differences"]:
        yield f"\nCompared with the student on {result['images']} images of {result['split']}:\n"
        yield "| file | largest difference of logits | of the largest logit |\n|---|---:|---:|"
        for name, found in result["differences"].items():
            share = found["largest"] / found["scale"] if found["scale"] else 0.0
            yield f"| {name} | {found['largest']:.2g} | {share:.1g} of {found['scale']:.3g} |"
    if GRAPH in result["differences"]:
        yield f"\n`{GRAPH}` was written by torch {torch.__version__}; older versions may not be able to read it."
    if ONNX in result["differences"]:
        yield f"`{ONNX}` is of opset {OPSET}, with input `images` and output `logits`."
    for name, reason in result["problems"].items():
        yield f"\n`{name}` is missing, because the export failed: `{reason}`"


def _teacher_section(chosen: Chosen) -> Sentences:
    runs, shares = chosen.config.teacher_runs(), chosen.config.shares
    if not runs:
        yield "No trained teacher: the objective needs none."
    if len(runs) > 1:
        yield f"{len(runs)} teachers; the student learnt from the mean of their softened probabilities."
    for number, run in enumerate(runs):
        if len(runs) > 1:
            yield f"\nTeacher {number + 1}, {shares[number]:.1%} of the mean:\n"
        yield from _about_teacher(chosen, run)


def _about_teacher(chosen: Chosen, run: TeacherRun) -> Sentences:
    try:
        about = known_of(run, chosen.storage)
    except ValueError as error:
        raise ConfigError(
            f"damaged: {error}", chosen.storage / "teachers" / teacher_name(run)
        ) from None
    if about is None:
        yield f"`{teacher_name(run)}` (fingerprint `{run.fingerprint(LOOP_VERSION)}`)."
        yield "Its files are not beside the student's, so nothing more is known about it."
        return
    yield f"`{about['name']}` (fingerprint `{about['name'].rpartition('-')[2]}`)."
    weights = about["config"].get("weights")
    if weights:
        name = weights if weights.startswith("torchvision") else Path(weights).name
        yield f"Its weights are external (`{name}`); it is unknown what they were trained on."
    else:
        epochs = f"{about['metrics']['epoch']:.0f} of {run.epochs} epochs"
        yield f"A {run.student.name} trained with {run.objective.name}, {epochs}, seed {run.seed}."
    yield from (f"- {k}: {v:.4f}" for k, v in about["metrics"].items() if k.startswith("val_"))
    yield f"- SHA-256 of its weights: `{about['sha256']}`; trained with torch {about['torch']}"


def _again_section(chosen: Chosen) -> Sentences:
    """Write how to reproduce the student."""
    made, config = chosen.made, chosen.config
    versions = made.get("versions") or {}
    yield "\n## Train it again\n"
    if versions:
        pins = " ".join(
            f"{name}=={version}" for name, version in versions.items() if name != "python"
        )
        yield f"```sh\n# Python {versions.get('python')}\npip install {pins}\ntfkd train config.yaml\n```\n"
    else:
        yield "```sh\ntfkd train config.yaml\n```\n"
        yield "The versions that trained it were not recorded."
    yield "With the same versions and `cpus_per_worker` on a CPU of the same type the weights are bit-identical."
    yield "`config.yaml` says where the data were on that machine: set `data.root` if they are elsewhere.\n"
    if command := made.get("command"):
        yield f"- First made by: `{shlex.join(['tfkd', *map(str, command[1:])])}`, {made.get('created', 'undated')}"
    yield f"- git commit of the directory where that ran: {made.get('git_commit') or 'none known'} (+: with changes)"
    yield f"- Seeds: training {config.seed}, split {config.data.split_seed}"
    yield f"- Run: `{config.fingerprint(LOOP_VERSION)}`, loop version {LOOP_VERSION}"
