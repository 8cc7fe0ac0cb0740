"""Losses of the user's own: arguments, teacher, digest of the code, names, what is refused."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_readers import make_sweep

from tfkd_ray import find_or_train
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import Diverged, train
from tfkd_ray.learn.objectives import OwnObjective
from tfkd_ray.learn.own import code_of, only_reading
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.settings.yaml import parse_yaml
from tfkd_ray.show.report import report
from tfkd_ray.show.status import read_plan
from tfkd_ray.space.arms import arms_of
from tfkd_ray.space.explain import amounts_to, arm_line, explained, knobs
from tfkd_ray.space.space import Space, build_space, load_space

LOSSES = """
from __future__ import annotations
from typing import Annotated, Literal
import torch
from pydantic import Field
from torch.nn import functional as F
from helper_of_losses import twice
from tfkd_ray.learn.objectives import CrossEntropy, KnowledgeDistillation, softened_kl

def margin_kd(logits, labels, teacher, margin: float = 0.1, gamma=2, temperature: float = 4, steps: int = 3,
              power=1, mode: Literal["hard", "soft"] | dict = "hard", scale: Annotated[float, Field(gt=0)] = 1.0):
    kd = softened_kl(logits, teacher, temperature)
    label = logits.gather(1, labels[:, None])
    return scale * (power / power) * (F.cross_entropy(logits, labels) + gamma * kd + F.relu(margin + logits - label).mean())

def as_kd(logits, labels, teacher, alpha, temperature):
    ce = F.cross_entropy(logits, labels)
    return (1 - alpha) * ce + alpha * temperature**2 * softened_kl(logits, teacher, temperature)

class Parts:
    def __init__(self, alpha: float = 0.9, temperature: float = 4.0):
        self.temperature = temperature
        self.ce_weight, self.kd_weight = 1 - alpha, alpha * temperature**2

    def terms(self, logits, labels, teacher):
        return F.cross_entropy(logits, labels), softened_kl(logits, teacher, self.temperature)

class OtherParts(Parts):
    def terms(self, logits, labels, teacher):
        return logits.square().mean(), softened_kl(logits, teacher, self.temperature)

class Inherited(KnowledgeDistillation):
    pass

class NoTerms:
    pass

class OneTerm:
    def terms(self, logits, labels):
        return F.cross_entropy(logits, labels)

class Learns(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))
    def terms(self, logits, labels):
        return self.w * F.cross_entropy(logits, labels), None

class Holds:
    def __init__(self):
        self.project = torch.nn.Linear(10, 10)
    def terms(self, logits, labels):
        return F.cross_entropy(self.project(logits), labels), None

class Fails:
    def __init__(self, width: int = 3):
        raise ValueError("no such width")
    def terms(self, logits, labels):
        return F.cross_entropy(logits, labels), None

_project = torch.nn.Linear(10, 10)
def projects(logits, labels): return F.cross_entropy(_project(logits), labels)

class Frozen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(10, 10).requires_grad_(False)
    def terms(self, logits, labels):
        return F.cross_entropy(self.project(logits), labels), None

class Buffered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("one", torch.ones(()))
    def terms(self, logits, labels):
        return self.one * F.cross_entropy(logits, labels), None

class Counts:
    def __init__(self):
        self.n = 0
    def terms(self, logits, labels):
        self.n += 1
        return F.cross_entropy(logits, labels), None

def smooth(logits, labels, eps: float, power: float = 1.0, dead: float = 0.0):
    return twice(F.cross_entropy(logits, labels, label_smoothing=eps)) / 2 * power

def mixed(logits, labels, teacher=None):
    assert teacher is None
    return F.cross_entropy(logits, labels)
mixed.soft_labels = True

def hard_only(logits, labels):
    return F.nll_loss(F.log_softmax(logits, 1), labels)
hard_only.soft_labels = True

def vector(logits, labels): return F.cross_entropy(logits, labels, reduction="none")
def number(logits, labels): return 0.5
def nan(logits, labels): return F.cross_entropy(logits, labels) * float("nan")
def no_gradient(logits, labels): return F.cross_entropy(logits.detach(), labels)
def apart(logits, labels): return torch.ones((), requires_grad=True) * 1
def rooted(logits, labels): return F.cross_entropy(logits, labels) + (logits - logits).abs().sum().sqrt()
def summed(logits, labels): return F.cross_entropy(logits, labels, reduction="sum")
def raises(logits, labels): return F.cross_entropy(logits, labels[:3])
def of_one(logits): return logits.mean()
def by_other_name(logits, labels, teacher_logits): return logits.mean()
def ce(logits, labels): return F.cross_entropy(logits, labels)
def anything(logits, labels, **more): return F.cross_entropy(logits, labels)
def later_nan(logits, labels): return F.cross_entropy(logits, labels) / (logits.abs().max() < 30)

_cache = {}
def cached(logits, labels):
    eye = _cache.setdefault(logits.shape[1], torch.eye(logits.shape[1]))
    return F.cross_entropy(logits @ eye, labels)

_seen = 0
def counts(logits, labels):
    global _seen
    _seen += 1
    return F.cross_entropy(logits, labels)

_last = []
def momentum(logits, labels):
    mean = 0.9 * _last.pop() + 0.1 * logits.detach() if _last else logits.detach()
    _last.append(mean)
    return F.cross_entropy(logits - mean, labels)

_draws = torch.Generator().manual_seed(0)
def noisy(logits, labels): return F.cross_entropy(logits + torch.randn(logits.shape, generator=_draws), labels)
"""
BASE: dict[str, Any] = {
    "epochs": 2,
    "student": {"name": "mlp", "hidden": [32]},
    "data": {"name": "digits", "subset": 300},
}
TEACHER: dict[str, Any] = {"teacher": {"model": {"name": "mlp", "hidden": [64]}}}


@pytest.fixture(scope="session")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write LOSSES as the module `losses_of_mine`, once."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "losses_of_mine.py").write_text(LOSSES)
    (folder / "helper_of_losses.py").write_text("def twice(x):\n    return 2 * x\n")
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


def own(name: str, **args: Any) -> dict[str, Any]:
    return {"name": "own", "path": f"losses_of_mine:{name}", "args": args}


def run_of(name: str, *, taught: bool = False, **args: Any) -> TrainConfig:
    return TrainConfig(objective=own(name, **args), **BASE, **(TEACHER if taught else {}))


# --- the same as kd


@pytest.mark.parametrize("name, args", [("as_kd", {"alpha": 0.9, "temperature": 4.0}), ("Parts", {}), ("Inherited", {})])  # fmt: skip
def test_an_own_loss_that_computes_kd_gives_the_weights_of_kd_bitwise(
    losses: Path, tmp_path: Path, name: str, args: dict[str, Any]
) -> None:
    kd = TrainConfig(objective="kd", **BASE, **TEACHER)
    mine = run_of(name, taught=True, **args)
    ends = []
    for run in (kd, mine):
        ends.append(list(train(run, teacher=find_or_train(run, tmp_path)))[-1])
    states = [end.state()["model"] for end in ends]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert ends[0].metrics["train_loss"] == ends[1].metrics["train_loss"]
    parts = {"train_ce", "train_kd", "train_kd_ratio"}
    assert parts & {*ends[1].metrics} == (set() if name == "as_kd" else parts)
    assert len(list((tmp_path / "teachers").iterdir())) == 1, "both learn from the same teacher"


def test_the_bank_serves_an_own_loss(losses: Path, tmp_path: Path) -> None:
    tree = {**TEACHER["teacher"], "labels": "bank"}
    run = TrainConfig(objective=own("as_kd", alpha=1, temperature=2), **BASE, teacher=tree)
    bank = find_or_train(run, tmp_path)
    assert run.banked and bank is not None
    assert next(train(run, teacher=bank)).metrics["val_agreement"] >= 0


# --- what is refused

ARGUMENTS = {
    "margn": (own("margin_kd", margn=1), "objective.margin_kd.args.margn: margin_kd has no such argument; did you mean 'margin'?"),
    "text": (own("margin_kd", margin="a"), "objective.margin_kd.args.margin: should be a number, got 'a' (the signature says margin: 'float' = 0.1)"),
    "default": (own("margin_kd", gamma="b"), "objective.margin_kd.args.gamma: should be a number, got 'b' (the signature says gamma = 2)"),
    "bool": (own("margin_kd", margin=True), "objective.margin_kd.args.margin: should be a number, got True (the signature says margin: 'float' = 0.1)"),
    "whole": (own("margin_kd", steps=1.5), "objective.margin_kd.args.steps: should be a whole number, got 1.5 (the signature says steps: 'int' = 3)"),
    "bound": (own("margin_kd", scale=0), "objective.margin_kd.args.scale: should be greater than 0, got 0"),
    "word": (own("margin_kd", mode="herd"), "objective.margin_kd.args.mode: should be 'hard' or 'soft', got 'herd'"),
    "teacher": (own("margin_kd", teacher=1), "objective.margin_kd.args.teacher: training gives it for each batch; leave it out"),
    "missing": (own("as_kd", alpha=0.5), "objective.as_kd.args.temperature: required by as_kd, and not given"),
    "teacher's name": (own("by_other_name"), "objective.by_other_name.args.teacher_logits: required by by_other_name, and not given; a teacher's logits come as a parameter named teacher"),
    "one": (own("of_one"), "objective.of_one.path: losses_of_mine:of_one: it must take logits and labels first"),
    "no terms": (own("NoTerms"), "objective.NoTerms.path: losses_of_mine:NoTerms is a class without `terms`"),
    "no name": (own("margin_k"), "objective.margin_k.path: losses_of_mine:margin_k: losses_of_mine has no 'margin_k'; did you mean 'margin_kd'?"),
    "no module": ({"name": "own", "path": "losses_of_mone:f"}, "objective.f.path: losses_of_mone:f: there is no module 'losses_of_mone'"),
    "no path": ({"name": "own"}, "objective.own.path: required, and not given"),
    "no function": ({"name": "own", "path": "losses_of_mine:_cache"}, "objective._cache.path: losses_of_mine:_cache is {}, neither a function nor a class"),
    "sibling": ({**own("margin_kd"), "temperature": 4}, "objective.own: temperature: an own objective has no such setting; if it is an argument of its function, write it below args: args: {temperature: ...}"),
    "long name": ({"name": "own", "path": "losses_of_mine:" + "f" * 41}, "objective.own.path: its function's name becomes that of trials and arms, so it has up to 40 letters"),
    "taken": (own("ce"), "objective.own.path: losses_of_mine:ce has the name of the objective ce; rename your function"),
}  # fmt: skip


@pytest.mark.parametrize("objective, sentence", ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments_are_told_from_the_signature(
    losses: Path, objective: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(objective=objective, **BASE, **TEACHER)
    assert any(problem.startswith(sentence) for problem in error.value.problems), str(error.value)


def test_an_own_loss_that_asks_for_a_teacher_needs_its_network(losses: Path) -> None:
    with pytest.raises(ConfigError, match="objective margin_kd needs a teacher's network"):
        run_of("margin_kd")
    assert not run_of("mixed").needs_teacher, "a default says that it can do without"
    assert run_of("Inherited", taught=True).needs_teacher


TRIED = {
    "vector": "it must be a scalar, the mean over the batch, got a tensor float32 [8]; a .mean() may be missing",
    "number": "it must be a scalar, the mean over the batch, got float: '0.5'",
    "nan": "given logits [8, 10], labels [8] of ordinary size, it returns nan",
    "no_gradient": "it has no gradient; look for a detach, a no_grad or an argmax in it",
    "apart": "it does not depend on the logits",
    "rooted": "its gradient by the logits is not finite",
    "raises": "given logits [8, 10], labels [8], it ends in ValueError",
    "OneTerm": "terms must return (ce, soft), got a tensor float32 []",
    "Learns": "it has parameters, and nothing trains them",
    "Holds": "it has parameters, and nothing trains them",
    "projects": "a tensor [10",
    "Fails": "made with (), it ends in ValueError: no such width",
    "Counts": "it keeps state between batches (its n changes from batch to batch)",
    "counts": "it keeps state between batches (the module's _seen changes from batch to batch)",
    "momentum": "it keeps state between batches",
    "noisy": "it keeps state between batches (the same batch gives",
    "hard_only": "given logits [8, 10], labels [8, 10], it ends in",
}


@pytest.mark.parametrize("name, sentence", TRIED.items(), ids=TRIED)
def test_a_loss_that_cannot_be_trained_with_is_told_before_anything_starts(
    losses: Path, name: str, sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        run_of(name).try_own_code()
    assert f"objective {name}: losses_of_mine:{name}: {sentence}" in str(error.value)


@pytest.mark.parametrize("name", ["mixed", "cached", "anything", "Buffered", "Frozen"])
def test_a_loss_that_is_one_is_accepted(losses: Path, name: str) -> None:
    run = run_of(name, **({"x": 1} if name == "anything" else {}))
    assert run.try_own_code() == []
    assert isinstance(run.objective, OwnObjective)
    assert run.objective.soft_labels == (name == "mixed")


def test_a_sum_over_the_images_is_noted(losses: Path) -> None:
    (note,) = run_of("summed").try_own_code()
    assert "It seems to be a sum over the images" in note


def test_a_trial_of_a_loss_leaves_the_random_numbers_alone(losses: Path) -> None:
    before = torch.get_rng_state()
    run_of("as_kd", taught=True, alpha=0.5, temperature=2).try_own_code()
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_becomes_nan_in_training_names_its_function(losses: Path) -> None:
    optim = {"lr": 50.0, "batch_size": 64}
    run = TrainConfig(objective=own("later_nan"), **{**BASE, "epochs": 9}, optim=optim)
    with pytest.raises(Diverged, match=r"or losses_of_mine:later_nan has a log\(0\), 0/0"):
        list(train(run))


# --- the code is part of a run


def written(folder: Path, name: str, helper: str = "1") -> str:
    """Write a loss in a package with a helper and return its path."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "losses.py").write_text(
        "from torch.nn import functional as F\nfrom . import parts\n"
        "def mine(logits, labels):\n    return parts.FACTOR * F.cross_entropy(logits, labels)\n"
    )
    (package / "parts.py").write_text(f"import {name}_far\nFACTOR = {helper}\n")
    (package / "unused.py").write_text("1 / 0")
    (folder / f"{name}_far.py").write_text("")
    return f"{name}.losses:mine"


def forget(name: str) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] in (name, f"{name}_far")]:
        del sys.modules[module]
    importlib.invalidate_caches()


def test_every_own_file_that_the_import_loads_is_part_of_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = written(tmp_path, "pack")
    first = TrainConfig(objective=path, **BASE)
    assert code_of(path).files == ("__init__.py", "losses.py", "pack_far.py", "parts.py")
    seen = {first.fingerprint()}
    for file in ("pack/__init__.py", "pack/losses.py", "pack/parts.py", "pack_far.py"):
        with (tmp_path / file).open("a") as text:
            text.write("# changed\n")
        same = TrainConfig(objective=path, **BASE)
        assert same.fingerprint() in seen, "this process still runs the old code"
        forget("pack")
        seen.add(TrainConfig(objective=path, **BASE).fingerprint())
    assert len(seen) == 5
    (tmp_path / "pack/unused.py").write_text("2 / 0")
    forget("pack")
    assert TrainConfig(objective=path, **BASE).fingerprint() in seen, "not loaded, not counted"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(tmp_path / "pack", moved)
    shutil.move(tmp_path / "pack_far.py", moved)
    monkeypatch.syspath_prepend(str(moved))
    forget("pack")
    assert TrainConfig(objective=path, **BASE).fingerprint() in seen, "the place does not count"


def test_a_run_refuses_other_code_than_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    run = TrainConfig(objective=written(tmp_path, "begun"), **BASE)
    next(train(run))
    (tmp_path / "begun/parts.py").write_text("FACTOR = 2")
    forget("begun")
    for act in (lambda: next(train(run)), run.try_own_code):
        with pytest.raises(ConfigError, match=r"parts.py had digest .* Put the old code back"):
            act()
    assert TrainConfig(objective="begun.losses:mine", **BASE).try_own_code() == []


def test_a_name_in_a_tree_is_the_functions() -> None:
    assert own_code.shown_name({"name": "own", "path": "a.b:margin_kd"}) == "margin_kd"
    assert own_code.shown_name("a.b:margin_kd") == "margin_kd"
    assert own_code.shown_name({"name": "kd"}) == own_code.shown_name("kd") == "kd"
    assert own_code.shown_name({"choices": []}) is None


# --- search spaces

SPACE = """
student: mlp
data: {name: digits, subset: 300}
teacher: {model: mlp}
epochs: 2
objective:
  - name: own
    path: "losses_of_mine:margin_kd"
    args:
      margin: {low: 0, high: 0.5}
      gamma: {low: 1, high: 3, step: 1}
      power: {low: 1, high: 3}
      steps: {low: 1, high: 4}
      temperature: {low: 1, high: 20, log: true}
      mode: {choices: [soft, {name: hard, sharpness: {low: 1.0, high: 2.0}}]}
  - name: own
    path: "losses_of_mine:smooth"
    args: {eps: {low: 0.02, high: 0.4}, power: {low: 0.5, high: 2.0}, dead: {low: 0.0, high: 1.0}}
  - kd
search: {num_samples: 20, stopping: none}
"""


@pytest.fixture
def space(losses: Path) -> Space:
    return build_space(parse_yaml(SPACE, "space.yaml"))


def test_own_objectives_stand_side_by_side_under_the_names_of_their_functions(space: Space) -> None:
    assert [b.objective for b in space.branches] == ["margin_kd", "smooth", "kd", "ce", "lsr"]
    names = {p.name: p for p in space.parameters}
    assert {n for n in names if n.startswith("objective.margin_kd")} == {
        f"objective.margin_kd.args.{n}" for n in ("gamma", "margin", "mode", "mode.hard.sharpness", "power", "steps", "temperature")
    }  # fmt: skip
    whole = {n.rpartition(".")[2]: getattr(p.domain, "whole", None) for n, p in names.items()}
    assert whole["temperature"] is False and whole["margin"] is False, "the annotation says float"
    assert whole["power"] is False, "without an annotation, numbers are real"
    assert whole["steps"] is True and whole["gamma"] is True, "annotated, and with a step"
    assert names["objective.margin_kd.args.mode.hard.sharpness"].within is not None
    assert [space.branches[k].example.needs_teacher for k in range(3)] == [True, False, True]
    assert space.branches[0].tree["objective"]["digest"] == code_of("losses_of_mine:x").digest


def test_a_space_of_own_objectives_reads_back_without_their_code(space: Space) -> None:
    tree = json.loads(json.dumps(space.tree))
    with only_reading():
        again = build_space(tree)
    assert again.parameters == space.parameters
    assert [b.objective for b in again.branches] == [b.objective for b in space.branches]
    assert [r.fingerprint() for r in again.teacher_runs()] == [
        r.fingerprint() for r in space.teacher_runs()
    ]


def test_mistakes_in_a_space_of_own_objectives_are_told(losses: Path) -> None:
    for objective, sentence in (
        ([own("as_kd", alpha=0.5, temperature=1), own("as_kd", alpha=1, temperature=2)], "objective: as_kd is listed twice; widen one range instead, or give one function another name"),
        (own("margin_kd", margn={"low": 0, "high": 1}), "objective.margin_kd.args.margn: margin_kd has no such argument"),
        (own("margin_kd", scale={"low": -1, "high": 1}), "objective.margin_kd.args.scale: should be greater than 0, got -1"),
        ({**own("margin_kd"), "temperature": {"low": 1, "high": 20}}, "objective.own: temperature: an own objective has no such setting"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            build_space({"objective": objective, "teacher": {"model": "mlp"}})
        assert str(error.value).startswith(sentence)


def test_an_override_names_the_function(losses: Path, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    space = load_space(tmp_path / "space.yaml", ["objective.margin_kd.args.gamma=3"])
    assert space.branches[0].example.objective.model_dump()["args"]["gamma"] == 3


@pytest.mark.long
@pytest.mark.slow
def test_an_own_loss_is_explained_by_its_gradient(space: Space) -> None:
    by_name = {knob.name.rpartition(".")[2]: knob for knob in knobs(space.branches[1], 10)}
    assert {name: knob.verdict for name, knob in by_name.items()} == {
        "eps": "live", "power": "redundant", "dead": "dead",
    }  # fmt: skip
    mode = {"choices": ["soft", {"name": "hard", "sharpness": {"low": 1.0, "high": 2.0}}]}
    args = {"steps": {"low": 1, "high": 4}, "margin": {"low": 0, "high": 2}, "mode": mode}
    conditional = build_space({"objective": own("margin_kd", **args), **TEACHER})
    found = knobs(conditional.branches[0], 10)
    dead = {"steps": "dead", "mode": "dead", "mode.hard.sharpness": "dead"}
    assert {k.name.rpartition("args.")[2]: k.verdict for k in found} == {**dead, "margin": "live"}
    smooth = amounts_to(run_of("smooth", eps=0.2, power=3.0).objective, 10)
    assert smooth.lsr.alpha == pytest.approx(0.2, abs=1e-3) and smooth.residual < 1e-3
    assert smooth.lsr.loss_scale == pytest.approx(3, abs=1e-3)
    kd = amounts_to(TrainConfig(objective="kd", **BASE, **TEACHER).objective, 10)
    for mine in (
        run_of("as_kd", taught=True, alpha=0.9, temperature=4.0),
        run_of("Parts", taught=True),
    ):
        amount = amounts_to(mine.objective, 10)
        assert amount.lsr.alpha == pytest.approx(kd.lsr.alpha, abs=1e-3)
        assert amount.residuals == pytest.approx(kd.residuals, abs=1e-3)
    other = "\n".join(arm_line("mine", run_of("OtherParts", taught=True)))
    assert "weight of CE unknown: the first part of OtherParts is not CE" in other
    text = "\n".join(explained(conditional))
    assert "objective.margin_kd, synthetic teacher" in text
    assert "weight of CE unknown: margin_kd gives the whole loss" in text


@pytest.mark.parametrize(
    "name, share", [("as_kd", None), ("Parts", 0.1), ("OtherParts", None), ("Inherited", 0.1)]
)
def test_the_weight_of_ce_is_known_of_a_class_whose_first_term_is_ce(
    losses: Path, name: str, share: float | None
) -> None:
    args = {"alpha": 0.9, "temperature": 4.0} if name == "as_kd" else {}
    found = run_of(name, taught=True, **args).objective.ce_share
    assert found == (share if share is None else pytest.approx(share))


# --- the example


@pytest.mark.slow
def test_the_losses_of_the_example_train_and_search_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    space = load_space(ROOT / "examples/own_loss.yaml", ["epochs=1", "data.subset=300"])
    assert space.try_own_code() == []
    assert [b.objective for b in space.branches][:3] == ["focal", "logit_matching", "ReverseKD"]
    assert all(knob.verdict == "live" for b in space.branches for knob in knobs(b, 10))
    for branch in space.branches[:3]:
        teacher = find_or_train(branch.example, tmp_path)
        (epoch,) = train(branch.example, teacher=teacher)
        assert epoch.metrics["train_loss"] < 10
    focal = branch_losses(space.branches[0].example, gamma=0.0)
    assert focal == pytest.approx(branch_losses(TrainConfig(objective="ce", **BASE)), rel=1e-6)


def branch_losses(run: TrainConfig, **args: Any) -> float:
    """Return the loss of a fixed batch."""
    g = torch.Generator().manual_seed(0)
    objective = run.objective
    if isinstance(objective, OwnObjective):
        objective = objective.model_copy(update={"args": {**objective.args, **args}})
    return objective(torch.randn(7, 10, generator=g), torch.arange(7)).item()


# --- from tune to confirm


OF_A_SWEEP = {
    "a function": own("as_kd", alpha={"low": 0.1, "high": 0.9}, temperature={"low": 1.0, "high": 9.0}),
    "a class": own("Parts", alpha={"low": 0.1, "high": 0.9}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("objective", OF_A_SWEEP.values(), ids=OF_A_SWEEP)
def test_what_is_read_and_confirmed_of_a_sweep_has_the_name_of_the_function(
    losses: Path, tmp_path: Path, objective: dict[str, Any]
) -> None:
    experiment = tmp_path / "e"
    make_sweep(experiment, 24, 9, objective=[objective, "ce", "lsr"])
    name = own_code.shown_name(objective)
    assert list(read_plan(experiment).rows) == [name, "ce", "lsr"]
    compared = arms_of(experiment, top_k=1)
    assert compared.arms[0].name.endswith(f"-{name}")
    assert compared.arms[0].config.objective.called == name
    controls = [arm for arm in compared.arms if arm.name == "ce-scaled"]
    if name == "as_kd":
        assert not controls and "its weight of CE is unknown" in compared.note
    else:
        alpha = compared.arms[0].config.objective.model_dump()["args"]["alpha"]
        (control,) = controls
        assert control.config.objective.loss_scale == pytest.approx(1 - alpha)
        assert compared.note == ""
    (page,) = report(experiment, tmp_path / "page.html")
    assert f"losses_of_mine:{name}, your own code, which a report does not run" in page.read_text()


@pytest.mark.slow
def test_code_that_has_changed_since_the_sweep_is_told_by_confirm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = written(tmp_path, "swept")
    make_sweep(tmp_path / "e", 24, 9, objective=[path, "ce", "lsr"])
    before = arms_of(tmp_path / "e", top_k=1)
    assert "changed" not in before.note and "not what it was" not in before.note
    (tmp_path / "swept/parts.py").write_text("FACTOR = 2")
    forget("swept")
    after = arms_of(tmp_path / "e", top_k=1)
    assert "Since the sweep the code of mine is not what it was: " in after.note
    assert "parts.py" in after.note and "settings were tuned for the old code" in after.note
    assert after.arms[0].config.fingerprint() != before.arms[0].config.fingerprint()
    assert after.arms[0].config.try_own_code() == []


READING = """
import torch
from pathlib import Path

class Weighed:
    def terms(self, logits, labels):
        return weighed(logits, labels), None

def weighed(logits, labels):
    weight = float(Path("weight.txt").read_text())
    return weight * torch.nn.functional.cross_entropy(logits, labels)
"""


@pytest.mark.parametrize("name", ["weighed", "Weighed"])
def test_a_loss_that_opens_a_relative_path_is_tried_where_its_experiment_was_begun(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, module = tmp_path / "home", f"reading_{tmp_path.name}"
    home.mkdir()
    (home / f"{module}.py").write_text(READING)
    (home / "weight.txt").write_text("2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(home))
    tree = {"objective": {"name": "own", "path": f"{module}:{name}"}, "epochs": 1}
    config = validated(TrainConfig, tree)
    with pytest.raises(ConfigError, match=r"weight\.txt"):
        config.try_own_code()
    monkeypatch.setattr("tfkd_ray.settings.own_code._home", home)
    config.try_own_code()


READING_NETWORK = """
from pathlib import Path
from torch import nn

class Scaled(nn.Module):
    def __init__(self, shape, num_classes):
        super().__init__()
        self.layer = nn.Linear(shape[1] * shape[2], num_classes)

    def forward(self, images):
        return float(Path("weight.txt").read_text()) * self.layer(images.flatten(1))
"""


def test_a_network_that_opens_a_relative_path_is_tried_where_its_experiment_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, module = tmp_path / "home", f"network_{tmp_path.name}"
    home.mkdir()
    (home / f"{module}.py").write_text(READING_NETWORK)
    (home / "weight.txt").write_text("2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(home))
    config = validated(TrainConfig, {"objective": "ce", "student": f"{module}:Scaled"})
    with pytest.raises((ConfigError, FileNotFoundError), match=r"weight\.txt"):
        config.try_own_code()
    monkeypatch.setattr("tfkd_ray.settings.own_code._home", home)
    config.try_own_code()
