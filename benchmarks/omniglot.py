"""The paper's question at K = 242: sweeps, comparisons, and what they say of each claim of the paper.

    python benchmarks/omniglot.py plan --root DATA                  the CPU time of all of it; trains a few steps
    python benchmarks/omniglot.py run --root DATA [STAGE ...]       runs or resumes it, by the shipped commands
    python benchmarks/omniglot.py claims [--figure FILE.svg] [--curve FILE.svg]     tables, claims and figures of what
                                                                    has ended; --train: how ce does on its train images

`--storage DIR` (default: tfkd_results/omniglot) holds it all; `--one` trains one run at a time, which leaves the other
cores alone. The yardstick, fixed before any comparison was run:

* Data: Omniglot's two small sets at 16 x 16 pixels. Sweeps train on 12 drawers and validate on 4; comparisons train on
  these 16 and test on the other 4 (968 images; one is 0.10 points).
* Students: A, the paper's plain CNN (`cnn5`), with 15 epochs, in which `ce` learns its train images by heart (99.8 % of
  them, in eval mode). B, `wide_resnet` of depth 16 and width 1, with 30 epochs.
* Teachers of `kd`: the student with twice its channels, 20 epochs (larger); WRN-10-1, 20 epochs (smaller: Re-KD); the
  larger one stopped after 1, 2, 3, 5 and 10 of the 20 (De-KD). Each is trained once and shared by all seeds, so what is
  said of kd is conditional on one teacher. A self teacher is trained for each seed.
* Tuning: 6 trials for each of ce, lsr, tfkd_reg, tfkd_self, kd and kd from the smaller teacher (Re-KD), over learning
  rate, weight decay and the objective's own settings, by TPE with halving after 5 of 15 epochs. The best of each on
  validation is its arm.
* Scaled controls: `ce` with the settings of an arm, and the loss times the weight that CE has in that arm.
* Comparisons: `free` (ce, lsr, reg), `own` (self, ce trained twice), `taught` (kd, rekd), `controls` (the scaled ones),
  `curve` (De-KD), `scale` and `patient` (their files), `tuned` (ce and lsr with tuned learning rate and weight decay on
  the recipe of `scale`; lsr takes either of its two alphas), `b` (network B), `transfer` (reg and kd with T, alpha and
  correct_prob of the best run on digits, and on Fashion-MNIST, of benchmarks/curves-*.npz, and of the first published
  setting; all else is as it was tuned for the arm; beside ce, reg and kd as tuned; added on 2026-12-01, before
  it was run).
* Seeds: 1001 to 1010 for every arm, 1001 to 1005 for De-KD, `patient` and `transfer`. Leads are paired by seed, with
  95 % t intervals, also across comparisons, whose seeds are the same. Nothing is corrected over the claims; `tfkd
  confirm` says beside them what holds after Holm.

A claim that an arm is *better* is supported if its interval lies above 0, and not supported if it ends below 0.2
points, the margin of `tfkd confirm`. A claim that two arms are *equally good* is supported if the interval of the first
one's lead lies above -1 point, and not supported if it lies below 0 and reaches below -1. Otherwise it cannot tell. A
comparison that has not ended says nothing. Twins of `scale`, one run but for rounding, *tie* if 0 lies in
their interval; chance alone parts one of the four pairs in a fifth of such comparisons.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import curves
from overfit import train_accuracy
from safetensors.numpy import load_file

from tfkd_ray.learn.checkpoint import WEIGHTS
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.objectives import PUBLISHED
from tfkd_ray.learn.omniglot import Omniglot
from tfkd_ray.settings.columns import in_columns
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import Tree, dump_yaml
from tfkd_ray.show.plan import plan
from tfkd_ray.space.space import load_space
from tfkd_ray.store.experiment import (
    Record,
    ranked_trials,
    read_records,
    selection_metric,
)
from tfkd_ray.verdict.verdict import JudgedArm, Paired, over_seeds, paired

SMALLER = ("teacher.model={name: wide_resnet, depth: 10, width: 1}",)
LEARNING_RATE = (
    "recipe=plain",
    "schedule=step",
    "teacher=null",
    "objective=[ce, {name: lsr, alpha: {choices: [0.0727893979267, 0.159647334948]}}]",
    "optim.lr={low: 0.003, high: 0.3, log: true}",
    "optim.batch_size=128",
    "search.num_samples=12",
)
"""The recipe of omniglot_scale, with searched learning rate and weight decay."""
B = ("student={name: wide_resnet, depth: 16, width: 1}", "epochs=30")
SWEEPS: dict[str, tuple[str, ...]] = {
    "tfkd": ("omniglot_tfkd",),
    "kd": ("omniglot_kd",),
    "rekd": ("omniglot_kd", *SMALLER),
    "patient": ("omniglot_patient",),
    "tuned-scale": ("omniglot_tfkd", *LEARNING_RATE),
    "b-tfkd": ("omniglot_tfkd", *B),
    "b-kd": ("omniglot_kd", *B),
}
"""Sweeps by name: a shipped file, and settings that replace its own."""


TRANSFERRED = ("temperature", "alpha", "correct_prob")


class Stage(NamedTuple):
    """Sweeps, and the comparison of their best."""

    sweeps: tuple[str, ...]
    seeds: int


STAGES = {
    "free": Stage(("tfkd",), 10),
    "own": Stage(("tfkd",), 10),
    "taught": Stage(("tfkd", "kd", "rekd"), 10),
    "controls": Stage(("tfkd", "kd", "rekd"), 10),
    "curve": Stage(("tfkd", "kd", "rekd"), 5),
    "scale": Stage((), 10),
    "tuned": Stage(("tuned-scale",), 10),
    "patient": Stage(("patient",), 5),
    "b": Stage(("b-tfkd", "b-kd"), 10),
    "transfer": Stage(("tfkd", "kd"), 5),
}
"""Stages in the order of their worth."""
STOPS = (1, 2, 3, 5, 10)
"""Epochs of the poor teachers, of 20."""
EQUAL = 1.0
"""Points by which an arm may be behind another and still be as good."""
WORTH = 0.2
"""Points of the smallest lead worth having."""


class Claim(NamedTuple):
    """A claim of the paper, or a question of ours, as a lead of one arm over another."""

    text: str
    arm: str
    over: str
    kind: Literal["better", "equal", "twins"] = "better"


CLAIMS = (
    Claim("a student improves its teacher (Re-KD beats plain training)", "rekd", "ce"),
    Claim("..., and not by the scale of its loss", "rekd", "ce-as-rekd"),
    Claim("..., and by more than label smoothing", "rekd", "lsr"),
    *(
        Claim(f"a poor teacher still helps (De-KD: {stop} of 20 epochs)", f"dekd-{stop}", "ce")
        for stop in STOPS
    ),
    Claim("KD is a learned label smoothing: smoothing is as good as KD", "lsr", "kd", "equal"),
    Claim("normal KD beats plain training", "kd", "ce"),
    Claim("..., and not by the scale of its loss", "kd", "ce-as-kd"),
    Claim("label smoothing beats plain training", "lsr", "ce"),
    Claim("Tf-KD_self beats plain training", "self", "ce"),
    Claim("..., and training twice with ce", "self", "ce-twice"),
    Claim("Tf-KD_self is as good as normal KD", "self", "kd", "equal"),
    Claim("Tf-KD_reg beats plain training", "reg", "ce"),
    Claim("Tf-KD_reg is as good as normal KD", "reg", "kd", "equal"),
    Claim("Tf-KD_reg beats label smoothing", "reg", "lsr"),
)
IN_B = {"ce", "lsr", "kd", "reg", "ce-as-kd"}


def scale_claims(version: str) -> tuple[Claim, ...]:
    """Return the questions of `scale` for one version of the released setting."""
    part = {
        name: f"{version}-{name}"
        for name in ("ce-scaled", "ce-lr", "ce-lr-wd", "lsr", "lsr-scaled", "reg-code")
    }
    reg = part["reg-code"]
    return (
        Claim("twins: s * ce, and ce with (lr * s, wd / s)", part["ce-lr-wd"], part["ce-scaled"], "twins"),
        Claim("twins: s * lsr, and the released loss", reg, part["lsr-scaled"], "twins"),
        Claim("the released setting beats plain training", reg, "ce"),
        Claim("..., by its loss: smoothing beats ce at scale 1", part["lsr"], "ce"),
        Claim("..., at scale s: s * lsr beats s * ce", part["lsr-scaled"], part["ce-scaled"]),
        Claim("..., by its scale: s * ce beats ce", part["ce-scaled"], "ce"),
        Claim("..., by a small learning rate: ce with lr * s beats ce", part["ce-lr"], "ce"),
        Claim("the released setting beats tuned ce", reg, "ce-tuned"),
        Claim("the released setting beats tuned lsr", reg, "lsr-tuned"),
    )  # fmt: skip


TUNED_CLAIMS = (
    Claim("tuning alone: tuned ce beats ce", "ce-tuned", "ce"),
    Claim("tuned lsr beats tuned ce", "lsr-tuned", "ce-tuned"),
)
PATIENT_CLAIMS = (
    Claim("patient KD beats tuned ce on its recipe", "patient-kd", "patient-ce"),
    Claim("patient KD beats tuned lsr on its recipe", "patient-kd", "patient-lsr"),
    Claim("patient KD beats normal KD", "patient-kd", "kd"),
    Claim("patient KD beats plain training", "patient-kd", "ce"),
    Claim("the recipe alone: patient ce beats plain training", "patient-ce", "ce"),
)
OTHERS = ("digits", "fashion", "published")
"""Where the settings of `transfer` come from."""
TRANSFER_CLAIMS = tuple(
    claim
    for name in ("reg", "kd")
    for other in OTHERS
    for claim in (
        Claim(f"{name} with the settings of {other} is as good as tuned", f"{name}-{other}", name, "equal"),
        Claim(f"{name} with the settings of {other} beats plain training", f"{name}-{other}", "ce"),
    )
)  # fmt: skip


class Part(NamedTuple):
    """A table of arms and a table of claims."""

    title: str
    stages: tuple[str, ...]
    claims: tuple[Claim, ...]


NETWORK_A = ("free", "own", "taught", "curve", "controls")
SCALE = ("scale", "tuned")
PARTS = (
    Part("Network A: the paper's claims", NETWORK_A, CLAIMS),
    Part("Scale, the release re-run: s = 0.0539, smoothing 0.0728", SCALE, scale_claims("rerun")),
    Part("Scale, canonical values of K = 100: s = 0.0595, smoothing 0.16", SCALE, scale_claims("canonical")),
    Part("Scale: learning rate and weight decay tuned on the same recipe", SCALE, TUNED_CLAIMS),
    Part("Patient KD, beside network A on its own recipe", ("patient", *NETWORK_A, "transfer"), PATIENT_CLAIMS),
    Part("Network B: the paper's claims", ("b",), tuple(c for c in CLAIMS if {c.arm, c.over} <= IN_B)),
    Part("Network A, with settings from elsewhere", ("transfer", *NETWORK_A), TRANSFER_CLAIMS),
)  # fmt: skip


# --- arms -----------------------------------------------------------------------------------------


def best(storage: Path, sweep: str, objective: str) -> Record:
    """Return the best full-length trial of an objective in a sweep."""
    where = storage / sweep
    found = [r for r in read_records(where) if r.objective == objective]
    return ranked_trials(found, selection_metric(where))[0]


def arm(name: str, record: Record, **changes: Any) -> Tree:
    """Return a trial's configuration as an arm of a file."""
    config = {k: v for k, v in record.config.items() if k != "seed"}
    return {"name": name, **config, **changes}


def scaled(name: str, record: Record) -> Tree:
    """Return the scaled control of an arm: its settings, CE alone, at CE's weight in it."""
    weight = validated(TrainConfig, record.config).ce_share
    objective = {"name": "ce", "loss_scale": weight}
    return arm(name, record, objective=objective, teacher=None, role="baseline")


def settings_of(other: str, objective: str) -> dict[str, float]:
    """Return an objective's own settings: the best of a table of curves, or the first published."""
    if other == "published":
        found = next(p.objective for p in PUBLISHED if p.objective.name == objective)
        return {k: v for k, v in found.model_dump().items() if k in TRANSFERRED}
    table = curves.load(other)
    values: dict[tuple[float, ...], list[float]] = {}
    names: tuple[str, ...] = ()
    for of, parameters, curve in zip(table.objective, table.parameters, table.curves, strict=True):
        if of == objective:
            names = tuple(sorted(parameters))
            values.setdefault(tuple(parameters[n] for n in names), []).append(float(curve[-1]))
    best_values = max(values, key=lambda point: np.nan_to_num(np.mean(values[point])))
    found = {name.split(".")[-1]: v for name, v in zip(names, best_values, strict=True)}
    return {k: round(v, 4) for k, v in found.items() if k in TRANSFERRED}


def arms_of(storage: Path, stage: str) -> Tree:
    """Return the arms file of a stage, from the best trials of its sweeps."""
    if stage == "b":
        ce, lsr, reg = (best(storage, "b-tfkd", name) for name in ("ce", "lsr", "tfkd_reg"))
        kd = best(storage, "b-kd", "kd")
        arms = [arm("ce", ce), arm("lsr", lsr), arm("kd", kd), arm("reg", reg)]
        arms.append(scaled("ce-as-kd", kd))
        return {"title": "Omniglot, network B: the best of each", "arms": arms}
    if stage == "tuned":
        arms = []
        for name in ("ce", "lsr"):
            arms.append(arm(f"{name}-tuned", best(storage, "tuned-scale", name), role="reference"))
        return {
            "title": "Omniglot: ce and lsr, tuned on the recipe of omniglot_scale",
            "arms": arms,
        }
    ce, lsr, reg, own = (
        best(storage, "tfkd", name) for name in ("ce", "lsr", "tfkd_reg", "tfkd_self")
    )
    if stage == "free":
        arms = [arm("ce", ce), arm("lsr", lsr), arm("reg", reg)]
        return {"title": "Omniglot: the best of tfkd_reg against ce and lsr", "arms": arms}
    if stage == "own":
        twice = arm("ce-twice", ce, init="trained", teacher=own.config["teacher"])
        arms = [arm("self", own), {**twice, "role": "baseline"}]
        return {"title": "Omniglot: the best of tfkd_self, and training twice", "arms": arms}
    if stage == "transfer":
        kd = best(storage, "kd", "kd")
        arms = [arm("ce", ce), arm("reg", reg, role="reference"), arm("kd", kd, role="reference")]
        for name, record in (("reg", reg), ("kd", kd)):
            for other in OTHERS:
                own_settings = settings_of(other, record.objective)
                objective = {**record.config["objective"], **own_settings}
                if objective == record.config["objective"]:
                    continue  # the tuned arm itself
                arms.append(arm(f"{name}-{other}", record, objective=objective, role="reference"))
        return {"title": "Omniglot: settings of other data", "arms": arms}
    kd, rekd = best(storage, "kd", "kd"), best(storage, "rekd", "kd")
    if stage == "curve":
        arms = []
        for stop in STOPS:
            teacher = {**kd.config["teacher"], "stop_epoch": stop}
            arms.append(arm(f"dekd-{stop}", kd, teacher=teacher, role="reference"))
        return {"title": "Omniglot: KD from poor teachers", "arms": arms}
    if stage == "controls":
        distinct: dict[str, Tree] = {}
        for name, record in (("kd", kd), ("rekd", rekd), ("reg", reg), ("self", own)):
            control = scaled(f"ce-as-{name}", record)
            distinct.setdefault(json.dumps({**control, "name": ""}, sort_keys=True), control)
        return {"title": "Omniglot: scaled controls", "arms": [*distinct.values()]}
    arms = [arm("kd", kd), arm("rekd", rekd)]
    return {"title": "Omniglot: the best of kd and Re-KD", "arms": arms}


# --- running --------------------------------------------------------------------------------------


def tfkd(*words: str) -> None:
    """Run the command line of this environment; raise if it fails."""
    print("$ tfkd", *words, flush=True)
    subprocess.run([sys.executable, "-m", "tfkd_ray", *words], check=True)


def is_over(storage: Path, name: str) -> bool:
    """Return whether all trials of a sweep have ended."""
    if not (storage / name / "experiment.yaml").exists():
        return False
    file, *overrides = SWEEPS[name]
    states = [record.status for record in read_records(storage / name)]
    ended = sum(status in ("done", "stopped", "failed") for status in states)
    return ended >= load_space(file, overrides).search.num_samples


def run(storage: Path, stages: list[str], root: str, one: bool) -> None:
    """Run the sweeps and comparisons of some stages, or resume them."""
    data = f"data.root={root}"
    for stage in stages:
        for name in STAGES[stage].sweeps:
            few = ["search.max_concurrent=1"] if one else []
            if is_over(storage, name):
                continue
            if (storage / name).is_dir():
                tfkd("resume", str(storage / name))
            else:
                where = ["--storage", str(storage), "--name", name]
                tfkd("tune", *SWEEPS[name], *where, data, *few)
        name = f"confirm-{stage}" if stage in SWEEPS else stage
        if (storage / name / "confirm.json").exists():
            continue
        if (storage / name).is_dir():
            tfkd("resume", str(storage / name))
            continue
        # of this resource a machine has 1000, so that there is room for one run
        few = ["resources={tfkd_driver: 600}"] if one else []
        seeds = ["--seeds", str(STAGES[stage].seeds)]
        where = ["--storage", str(storage), "--name", name]
        if stage == "patient":
            best_of = ["--top-k", "1", "--baselines", "ce,lsr"]
            tfkd("confirm", str(storage / stage), *best_of, *seeds, "--name", name)
        elif stage == "scale":
            tfkd("confirm", "omniglot_scale", *seeds, *where, data, *few)
        else:
            file = storage / f"{stage}.yaml"
            file.write_text(dump_yaml(arms_of(storage, stage)))
            tfkd("confirm", str(file), *seeds, *where, data, *few)


# --- the plan -------------------------------------------------------------------------------------


def planned(root: str) -> Iterator[str]:
    """Yield the CPU time of each sweep and comparison, by `tfkd plan --probe`."""
    yield "what\tepochs\tCPU-hours"
    seconds: dict[str, float] = {}
    teacher_s: dict[str, float] = {}
    total = 0.0
    for name, (file, *overrides) in SWEEPS.items():
        found = plan(load_space(file, [f"data.root={root}", *overrides]), probe=True)
        assert found.seconds is not None and found.teacher_s is not None
        yield f"sweep {name}\t{found.epochs + found.teacher_epochs:.0f}\t{found.seconds / 3600:.2f}"
        total += found.seconds
        seconds |= {f"{name}/{part.objective}": part.epoch_s or 0.0 for part in found.parts}
        teacher_s[name] = found.teacher_s
    more = 3872 / 2904  # comparisons train on validation, too
    for stage, epochs, arms, teachers in (
        ("free", 15, ["tfkd/ce", "tfkd/lsr", "tfkd/tfkd_reg"], 0.0),
        ("own", 15, ["tfkd/tfkd_self", "tfkd/ce"], 10 * teacher_s["tfkd"]),
        ("taught", 15, ["kd/kd", "rekd/kd"], teacher_s["kd"] + teacher_s["rekd"]),
        ("curve", 15, ["kd/kd"] * len(STOPS), teacher_s["kd"] * sum(STOPS) / 20),
        ("controls", 15, ["tfkd/ce"] * 4, 0.0),
        ("scale", 15, ["tfkd/ce"] * 13, 0.0),
        ("tuned", 15, ["tuned-scale/ce", "tuned-scale/lsr"], 0.0),
        ("patient", 100, ["patient/kd", "patient/lsr", "patient/ce"], teacher_s["patient"]),
        ("b", 30, ["b-tfkd/ce", "b-tfkd/lsr", "b-kd/kd", "b-tfkd/tfkd_reg", "b-tfkd/ce"], teacher_s["b-kd"]),
        ("transfer", 15, ["tfkd/tfkd_reg"] * 3 + ["kd/kd"] * 3, 0.0),
    ):  # fmt: skip
        n = STAGES[stage].seeds
        cost = more * (teachers + n * epochs * sum(seconds[name] for name in arms))
        yield f"comparison {stage}, {len(arms)} arms, {n} seeds\t{n * epochs * len(arms)}\t{cost / 3600:.2f}"
        total += cost
    yield f"all\t\t{total / 3600:.2f}"


# --- what it says ---------------------------------------------------------------------------------


def ended(storage: Path, stages: Sequence[str]) -> dict[str, Tree]:
    """Return the arms of the comparisons of some stages that have ended, by name."""
    found: dict[str, Tree] = {}
    for stage in stages:
        folder = storage / (f"confirm-{stage}" if stage in SWEEPS else stage)
        if not (folder / "confirm.json").exists():
            continue
        for one in json.loads((folder / "confirm.json").read_text())["arms"]:
            name = one["name"]
            if stage == "patient":  # its arms have the names of trials
                name = f"patient-{one['objective']['name']}"
            found.setdefault(name, {**one, "folder": folder / "trials"})
    if "ce-as-kd" in found:  # one arm, if both have the same settings
        found.setdefault("ce-as-rekd", found["ce-as-kd"])
    transferred = {f"{name}-{other}": name for name in ("reg", "kd") for other in OTHERS}
    if transferred.keys() & found.keys():  # likewise: what is left out is the tuned arm
        for arm_name, tuned in transferred.items():
            found.setdefault(arm_name, found[tuned])
    return found


def tests_of(one: Tree) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (seed, arrays on the test images) of each run of an arm of confirm.json."""
    for run in one["runs"]:
        path = one["folder"] / f"{one['name']}-s{run['seed']}" / "test.safetensors"
        if path.exists():
            yield run["seed"], load_file(path)


def judged(one: Tree) -> JudgedArm:
    """Return an arm of confirm.json: which test images each of its runs classified correctly."""
    seeds, right = [], []
    for seed, arrays in tests_of(one):
        seeds.append(seed)
        right.append(arrays["logits"].argmax(axis=1) == arrays["labels"])
    images = np.array(right)
    clusters = Omniglot().test_clusters().numpy()
    return JudgedArm(one["name"], tuple(seeds), images.mean(axis=1), images, clusters)


def taught_by(one: Tree) -> float:
    """Return the mean test accuracy of the teachers of an arm's runs, in per cent; NaN without teachers."""
    found = []
    for _, arrays in tests_of(one):
        if "teacher" in arrays:
            found.append(100 * float((arrays["teacher"] == arrays["labels"]).mean()))
    return float(np.mean(found)) if found else math.nan


def word(claim: Claim, lead: Paired) -> str:
    """Return the verdict on a claim; see the top of this file."""
    low, high = 100 * lead.low, 100 * lead.high
    if claim.kind == "twins":
        return "tie" if low <= 0 <= high else "do not tie"
    if claim.kind == "equal":
        supported, refuted = low > -EQUAL, high < 0 and low <= -EQUAL
    else:
        supported, refuted = low > 0, high < WORTH
    if supported:
        return "supported"
    return "not supported" if refuted else "cannot tell"


def tables(storage: Path) -> Iterator[str]:
    """Yield the table of arms and that of the claims, for each part whose first comparison has ended."""
    for part in PARTS:
        found = ended(storage, part.stages)
        of_claims = {name for claim in part.claims for name in (claim.arm, claim.over)}
        arms = {name: one for name, one in found.items() if name in of_claims}
        if ended(storage, part.stages[:1]):
            yield f"## {part.title}"
            yield ""
            yield from table_of_arms(arms)
            yield ""
            yield from table_of_claims(part.claims, arms)
            yield ""


def table_of_arms(arms: dict[str, Tree]) -> Iterator[str]:
    """Yield a row for each arm."""
    rows = ["arm\taccuracy, %\tn\tNLL\tECE\tits teachers, %"]
    for name, one in arms.items():
        s = over_seeds(one)
        nll, ece = (
            np.mean([run[key] for run in one["runs"] if key in run]) for key in ("nll", "ece")
        )
        teacher = taught_by(one)
        shown = "" if math.isnan(teacher) else f"{teacher:.2f}"
        rows.append(f"{name}\t{s.mean:.2f} ± {s.sd:.2f}\t{s.n}\t{nll:.3f}\t{ece:.3f}\t{shown}")
    yield from in_columns(rows, 100)


def table_of_claims(claims: Sequence[Claim], arms: dict[str, Tree]) -> Iterator[str]:
    """Yield a row for each claim, with the verdict if both of its arms have ended."""
    rows = ["claim\tlead, points\t95 % over seeds\tover images\tn\tverdict"]
    for claim in claims:
        if not {claim.arm, claim.over} <= arms.keys():
            rows.append(f"{claim.text}\t\t\t\t\tnot run yet")
            continue
        lead = paired(judged(arms[claim.arm]), judged(arms[claim.over]))
        assert lead.images is not None
        spans = [(lead.low, lead.high), lead.images]
        low_to_high = [f"{100 * low:.2f} to {100 * high:.2f}" for low, high in spans]
        cells = [claim.text, f"{100 * lead.lead:+.2f}", *low_to_high, str(len(lead.seeds))]
        rows.append("\t".join([*cells, word(claim, lead)]))
    yield from in_columns(rows, 160)


def on_train(storage: Path) -> Iterator[str]:
    """Yield how many of their train images the runs of `ce` classify correctly, in eval mode."""
    for stage, network in (("free", "A"), ("b", "B")):
        if not (storage / stage / "confirm.json").exists():
            continue
        shares = []
        for record in read_records(storage / stage):
            if record.parameters.get("arm") == "ce":
                config = validated(TrainConfig, record.config)
                shares.append(100 * train_accuracy(config, record.folder / WEIGHTS))
        yield (
            f"network {network}: ce classifies {np.mean(shares):.2f} % of its train images correctly "
            f"({min(shares):.2f} to {max(shares):.2f}, n {len(shares)})"
        )


# --- figures --------------------------------------------------------------------------------------

BLUE, GREY = "#0072B2", "#555555"


def draw(storage: Path, path: Path) -> None:
    """Draw the lead of each tuned arm over `ce`, with its interval."""
    from matplotlib.figure import Figure

    found = ended(storage, ("free", "own", "taught"))
    names = [name for name in found if name != "ce"]
    leads = [paired(judged(found[name]), judged(found["ce"])) for name in names]
    figure = Figure((6.5, 0.4 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    middle, ends = with_ends(leads)
    axes.errorbar(middle, places, xerr=ends, fmt="o", color=BLUE, capsize=3)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(places, names)
    axes.margins(y=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("lead over tuned plain training on test, points; 95 % over paired seeds")
    save(figure, path)


def draw_curve(storage: Path, path: Path) -> None:
    """Draw the lead of KD over `ce` against the test accuracy of its teacher: the curve of De-KD."""
    from matplotlib.figure import Figure

    found = ended(storage, NETWORK_A)
    arms = {f"{stop} of 20 epochs": found[f"dekd-{stop}"] for stop in STOPS} | {"kd": found["kd"]}
    leads = [paired(judged(one), judged(found["ce"])) for one in arms.values()]
    teachers = [taught_by(one) for one in arms.values()]
    middle, ends = with_ends(leads)
    figure = Figure((6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(teachers, middle, yerr=ends, fmt="o-", color=BLUE, capsize=3)
    for name, x, y in zip(arms, teachers, middle, strict=True):
        axes.annotate(name, (x, y), xytext=(6, -11), textcoords="offset points", fontsize=8)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.margins(x=0.2, y=0.12)
    axes.set_xlabel("test accuracy of the teacher, %")
    axes.set_ylabel("lead over plain training, points")
    save(figure, path)


def with_ends(leads: Sequence[Paired]) -> tuple[list[float], list[list[float]]]:
    """Return the leads in points, and how far their intervals reach below and above."""
    below = [100 * (lead.lead - lead.low) for lead in leads]
    above = [100 * (lead.high - lead.lead) for lead in leads]
    return [100 * lead.lead for lead in leads], [below, above]


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure without date and random names: the same results give the same file."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "omniglot"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Read the command line and do what it asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=["plan", "run", "claims"])
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--root", default="~/datasets/omniglot", help="folder of Omniglot's zips")
    parser.add_argument("--storage", type=Path, default=Path("tfkd_results/omniglot"))
    parser.add_argument("--one", action="store_true", help="train one run at a time")
    parser.add_argument("--figure", type=Path, help="draw the leads over ce")
    parser.add_argument("--curve", type=Path, help="draw the curve of De-KD")
    parser.add_argument("--train", action="store_true", help="judge ce on its train images, too")
    args = parser.parse_args()
    if unknown := {*args.stages} - STAGES.keys():
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    if args.verb == "plan":
        print("\n".join(in_columns(list(planned(args.root)), 100)))
    elif args.verb == "run":
        run(args.storage, args.stages or list(STAGES), args.root, args.one)
    else:
        print("\n".join(tables(args.storage)))
        if args.train:
            print("\n".join(on_train(args.storage)))
        if args.figure:
            draw(args.storage, args.figure)
        if args.curve:
            draw_curve(args.storage, args.curve)


if __name__ == "__main__":
    main()
