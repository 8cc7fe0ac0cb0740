"""Two or more teachers: the mean of their softened probabilities, their shares, their artifacts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, TwoWorkers, train_as_worker
from safetensors.torch import load_file
from test_loop import numbers, same
from torch import Tensor, nn

from tfkd_ray import find_or_train
from tfkd_ray.cli.fit import teacher_lines
from tfkd_ray.learn.checkpoint import load_state
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.evaluate import predictions
from tfkd_ray.learn.loop import Epoch, train, train_in
from tfkd_ray.learn.several import banks_in, combined, each_of
from tfkd_ray.learn.soft_labels import Bank
from tfkd_ray.learn.teachers import is_trained, load_teacher, teacher_folder
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.show.export import export
from tfkd_ray.show.plan import plan, resident_bytes
from tfkd_ray.space.arms import build_arms, runs_of
from tfkd_ray.space.space import build_space, override
from tfkd_ray.store.experiment import read_experiment, read_records, read_teachers

SMALL = {"model": {"name": "mlp", "hidden": [16]}, "epochs": 1}
CNN = {"model": {"name": "cnn", "widths": [8]}, "epochs": 1}
BASE: dict[str, Any] = {
    "data": {"name": "digits", "subset": 300},
    "student": {"name": "mlp", "hidden": [16]},
    "objective": {"name": "kd", "alpha": 0.7, "temperature": 3},
    "teacher": [SMALL, {**CNN, "share": 3}],
    "epochs": 2,
}


def config(**changes: Any) -> TrainConfig:
    return validated(TrainConfig, {**BASE, **changes})


def problem(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        config(**changes)
    return "\n".join(error.value.problems)


def networks(run: TrainConfig) -> list[nn.Module]:
    """Return untrained teachers, which need no files."""
    return [made.build_student().eval() for made in run.teacher_runs()]


def last_of(run: TrainConfig, teacher: Any) -> Epoch:
    *_, last = train(run, teacher=teacher)
    return last


# --- what the student learns from


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 30.0])
def test_combined_logits_soften_to_the_mean_of_softened_probabilities(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [s * torch.randn(50, 7, generator=generator, dtype=torch.float64) for s in (1, 5, 20)]
    shares = 0.2, 0.5, 0.3
    found = combined(logits, shares, temperature)
    mean = sum(w * (z / temperature).softmax(1) for w, z in zip(shares, logits, strict=True))
    assert isinstance(mean, Tensor)
    torch.testing.assert_close((found / temperature).softmax(1), mean, rtol=1e-12, atol=1e-14)
    shifted = [z + k for k, z in enumerate(logits)]  # as the bank's, less their means
    torch.testing.assert_close(combined(shifted, shares, temperature), found, rtol=0, atol=1e-11)


def test_combined_logits_stay_finite_where_a_teacher_is_sure() -> None:
    sure = torch.tensor([[1e4, 0.0, -1e4]])
    found = combined([sure, torch.zeros(1, 3)], [0.5, 0.5], 0.1)
    assert found.isfinite().all()
    torch.testing.assert_close(
        (found / 0.1).softmax(1), torch.tensor([[4.0, 1.0, 1.0]]) / 6, rtol=1e-4, atol=0
    )


def test_the_loss_of_a_batch_is_that_of_the_mean_of_softened_probabilities() -> None:
    run = config(epochs=1, optim={"batch_size": 240}, augment={})
    seen: list[Tensor] = []

    class Kept(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.inner(images)
            seen.append(logits)
            return logits

    student = run.build_student()
    images: list[Tensor] = []
    parts = [Kept(network) for network in networks(run)]
    parts[0].register_forward_pre_hook(lambda module, args: images.append(args[0]))
    epoch = last_of(run, parts)
    first, second = seen[:2]
    q = 0.25 * (first / 3).softmax(1) + 0.75 * (second / 3).softmax(1)
    log_p = (student.train()(images[0]) / 3).log_softmax(1)
    kl = (q * (q.log() - log_p)).sum(1).mean()
    assert epoch.metrics["train_kd"] == pytest.approx(kl.item(), rel=1e-5)


def margin(logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float = 7) -> Tensor:
    return (logits - teacher).square().mean()


def without(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    return (logits - teacher).square().mean()


@pytest.mark.parametrize(
    "objective, temperature",
    [
        ({"name": "kd", "temperature": 5}, 5),
        ({"name": "dkd", "temperature": 2}, 2),
        ({"name": "dist", "temperature": 1.5}, 1.5),
        ({"name": "kd_standardised", "temperature": 2}, 1),
        ({"name": "own", "path": "test_several_teachers:margin"}, 7),
        ({"name": "own", "path": "test_several_teachers:margin", "args": {"temperature": 3}}, 3),
        ({"name": "own", "path": "test_several_teachers:without"}, 1),
    ],
)
def test_probabilities_are_averaged_at_the_temperature_of_the_objective_else_at_1(
    objective: dict[str, Any], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = set()

    def kept(logits: list[Tensor], shares: tuple[float, ...], at: float) -> Tensor:
        used.add(at)
        return combined(logits, shares, at)

    monkeypatch.setattr("tfkd_ray.learn.loop.combined", kept)
    run = config(objective=objective, epochs=1)
    last_of(run, networks(run))
    assert used == {temperature}


def test_two_teachers_that_say_the_same_are_one() -> None:
    """Its logits then come back up to a constant of each image, so the gradients are the same."""
    one = config(teacher=SMALL)
    (network,) = networks(one)
    two = config()
    a, b = last_of(one, network), last_of(two, [network, network])
    assert a.metrics["train_kd"] == pytest.approx(b.metrics["train_kd"], rel=1e-4)
    for key, value in a.state()["model"].items():
        assert (value - b.state()["model"][key]).abs().max() < 1e-5, key


def test_validation_is_compared_with_the_combined_teacher() -> None:
    run = config(epochs=1)
    parts = networks(run)
    epoch = last_of(run, parts)
    val_set = run.data.load()[1]
    assert val_set is not None
    student = run.build_student()
    student.load_state_dict(epoch.state()["model"])
    mine, *theirs = (
        torch.cat([logits for logits, _ in predictions(network, val_set, run.data)])
        for network in (student, *parts)
    )
    both = combined(theirs, run.shares, 3).argmax(1)
    assert epoch.metrics["val_agreement"] == pytest.approx(
        float((mine.argmax(1) == both).double().mean())
    )


# --- resume, workers, bank


def test_a_run_of_two_teachers_that_is_stopped_and_resumed_equals_one_never_stopped(
    tmp_path: Path,
) -> None:
    run = config(epochs=3, checkpoint_every_s=0)
    teachers = networks(run)
    whole = list(train(run, teacher=teachers))
    first = train_in(tmp_path, run, teacher=teachers)
    next(first)
    first.close()
    again = list(train_in(tmp_path, run, teacher=teachers))
    assert numbers(again) == numbers(whole)
    state = load_state(tmp_path)
    assert state is not None and same(state, whole[-1].state())


def test_the_state_of_a_run_with_other_shares_is_refused() -> None:
    run = config()
    state = next(train(run, teacher=networks(run))).state()
    other = config(teacher=[SMALL, CNN])
    with pytest.raises(ValueError, match="the state is of another run"):
        next(train(other, state, teacher=networks(other)))


@pytest.mark.long
def test_two_workers_agree_with_one_on_two_teachers(
    tmp_path: Path, as_two_workers: TwoWorkers
) -> None:
    run = config()
    one = last_of(run, networks(run)).state()
    as_two_workers(train_as_worker, str(tmp_path), run.model_dump(mode="json"), networks)
    two = torch.load(tmp_path / "state.pt", weights_only=True)
    for key, value in one["model"].items():
        assert (two["model"][key] - value).abs().max() < 1e-5, key
    for a, b in zip(numbers(one["history"]), numbers(two["history"]), strict=True):
        assert b == pytest.approx(a, abs=1e-5)


@pytest.mark.slow
def test_two_teachers_from_the_bank_are_those_that_run_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of the bank are rounded to half precision, and less their means."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ends = []
    for labels in (("online", "online"), ("bank", "bank"), ("bank", "online")):
        given = [{**one, "labels": how} for one, how in zip(BASE["teacher"], labels, strict=True)]
        run = config(teacher=given, augment={"crop_padding": 1, "flip": True})
        assert run.banks == tuple(how == "bank" for how in labels)
        ends.append(last_of(run, find_or_train(run, tmp_path)))
        files = list((tmp_path / "tfkd_ray/soft_labels").glob("[0-9a-f]*"))
        assert len(files) == (0 if not any(run.banks) else 6)  # of each, two epochs and validation
    online, *others = ends
    for other in others:
        for key in ("train_kd", "val_teacher_kl"):
            assert other.metrics[key] == pytest.approx(online.metrics[key], rel=1e-3), key
        for key, value in online.state()["model"].items():
            assert (other.state()["model"][key] - value).abs().max() < 2e-3, key


# --- artifacts


def test_two_teachers_are_two_artifacts_and_each_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config()
    teachers = find_or_train(run, tmp_path)
    assert isinstance(teachers, tuple) and len(banks_in(teachers)) == 2
    first, second = run.pinned().teacher_runs()
    assert teacher_folder(first, tmp_path) != teacher_folder(second, tmp_path)
    assert all(is_trained(made, tmp_path) for made in (first, second))
    monkeypatch.setattr("tfkd_ray.learn.teachers.train_in", lambda *a, **k: pytest.fail("again"))
    find_or_train(config(teacher=[SMALL, CNN], epochs=3), tmp_path)
    alone = find_or_train(config(teacher=CNN), tmp_path)  # the same as one of two
    assert isinstance(alone, Bank) and len(read_teachers(tmp_path)) == 2


def test_one_teacher_is_what_it_was_before_there_were_several() -> None:
    """Fingerprints and settings of releases before."""
    one = config(data="digits", teacher={"model": "cnn"}, student="mlp", objective="kd", epochs=27)
    assert one.fingerprint(3) == "bde3a304b62916fa"
    (made,) = one.teacher_runs()
    assert made == one.teacher_run() and made.fingerprint(3) == "f99fdd37db7aea98"
    assert "teachers" not in one.model_dump() and "teachers" not in made.model_dump()


def test_a_list_of_teachers_is_short_for_teachers_by_number_and_reads_back() -> None:
    run = config()
    assert [*run.teachers] == ["1", "2"] and run.shares == (0.25, 0.75) and run.teacher is None
    tree = json.loads(run.model_dump_json())
    again = validated(TrainConfig, tree)
    assert again == run and again.fingerprint() == run.fingerprint()
    assert config(teacher=None, teachers={1: SMALL, 2: {**CNN, "share": 3}}) == run
    scaled = config(teacher=[{**SMALL, "share": 2}, {**CNN, "share": 6}])
    assert scaled.fingerprint() == run.fingerprint()
    with pytest.raises(ValueError, match="has 2 teachers"):
        run.teacher_run()


def test_each_of_several_teachers_has_the_recipe() -> None:
    run = config(recipe="modern")
    assert all(made.optim.nesterov for made in run.teacher_runs())


# --- what is refused

TWO_GIVEN: dict[str, tuple[dict[str, Any], str]] = {
    "a list of one": (
        {"teacher": [SMALL]},
        "teacher: a list of one teacher, and several are two or more; write its settings without the list",
    ),
    "the same teacher twice": (
        {"teacher": [SMALL, {**SMALL, "share": 2}]},
        "teachers.2: is the same teacher as teachers.1; leave one out and change the other's share, or give them "
        "different seeds",
    ),
    "no share": (
        {"teacher": [{**SMALL, "share": 0}, {**CNN, "share": 0}]},
        "teachers.1.share: should be greater than 0, got 0",
    ),
    "a wrong name": (
        {"teacher": [SMALL, {**CNN, "shar": 2}]},
        "teachers.2.shar: no such setting; did you mean 'share'?",
    ),
    "a share of one": ({"teacher": {**SMALL, "share": 2}}, "teacher.share: no such setting"),
    "no network": (
        {"teacher": [SMALL, {"epochs": 1}]},
        "teachers.2.model: objective kd needs a teacher's network, and none is given",
    ),
    "a bad network": (
        {"teacher": [SMALL, {"model": {"name": "cnn", "widht": [3]}}]},
        "teachers.2.model.cnn.widht: no such setting; did you mean 'widths'?",
    ),
    "a self teacher": (
        {"objective": "tfkd_self"},
        "teacher: objective tfkd_self learns from one copy of the student, and 2 teachers are given; leave them out",
    ),
    "a trained start": (
        {"init": "trained", "objective": "ce"},
        "init: 'trained' starts from one trained copy of the student, and 2 teachers are given; give one",
    ),
    "a loop": (
        {"loop": "loops_of_mine:good"},
        "loop: a loop of your own gets one teacher, and 2 are given; give one",
    ),
    "names": (
        {"teacher": None, "teachers": {"wide": SMALL, "deep": CNN}},
        "teachers.wide: teachers have numbers, got 'wide'; write a list, teacher: [{...}, {...}]",
    ),
    "one beside": (
        {"teacher": SMALL, "teachers": {"1": SMALL, "2": CNN}},
        "teacher: is one teacher beside the 2 of teachers; put all of them in one list",
    ),
    "a list beside": (
        {"teachers": {"1": SMALL, "2": CNN}},
        "teacher: needs settings below it (key: value), got [",
    ),
    "layers": (
        {"objective": {"name": "own", "path": "test_several_teachers:layered",
                       "features": {"teacher": ["0"]}}},
        "objective.layered.features.teacher: layers are those of one teacher, and 2 are given; give one, or leave "
        "these layers out",
    ),
}  # fmt: skip


def layered(logits: Tensor, labels: Tensor, teacher_features: dict[str, Tensor]) -> Tensor:
    return logits.mean()


@pytest.mark.parametrize("changes, sentence", TWO_GIVEN.values(), ids=TWO_GIVEN)
def test_what_does_not_go_with_several_teachers_is_refused_with_a_sentence(
    changes: dict[str, Any], sentence: str
) -> None:
    assert sentence in problem(**changes)


def test_an_ensemble_of_one_network_differs_by_seed() -> None:
    run = config(teacher=[SMALL, {**SMALL, "seed": 3}])
    first, second = run.teacher_runs()
    assert first.student == second.student and first.fingerprint() != second.fingerprint()


def test_as_many_teachers_are_given_as_are_needed() -> None:
    run = config()
    with pytest.raises(ValueError, match="2 are needed, and 1 given"):
        next(train(run, teacher=networks(run)[:1]))
    with pytest.raises(ValueError, match="needs a teacher"):
        next(train(run))
    assert each_of(None) == []


def hinted(
    logits: Tensor, labels: Tensor, teacher: Tensor, student_features: dict[str, Tensor]
) -> Tensor:
    return (logits - teacher).square().mean() + student_features["2"].square().mean()


def test_a_loss_may_ask_for_layers_of_the_student_beside_several_teachers() -> None:
    features = {"student": ["2"]}
    run = config(
        objective={"name": "own", "path": "test_several_teachers:hinted", "features": features}
    )
    assert run.try_objective() == []
    assert last_of(run, networks(run)).metrics["train_loss"] > 0


# --- spaces and arms

SPACE: dict[str, Any] = {
    **BASE,
    "objective": [{"name": "kd", "temperature": {"low": 1, "high": 8, "log": True}}, "ce", "lsr"],
    "teacher": [
        {**SMALL, "model": {"name": "mlp", "hidden": {"choices": [[16], [24]]}}},
        {**CNN, "share": {"low": 0.1, "high": 10, "log": True}},
    ],
    "epochs": 3,
    "search": {"num_samples": 9},
}


def test_a_share_is_searched_by_a_range_and_makes_no_further_teacher() -> None:
    space = build_space(SPACE)
    names = {p.name for p in space.branches[0].parameters}
    assert names == {"objective.kd.temperature", "teachers.1.model.hidden", "teachers.2.share"}
    assert [p.name for b in space.branches[1:] for p in b.parameters] == []
    assert len(space.teacher_runs()) == 3  # two of the first, and the second once
    again = build_space(space.tree)
    assert [b.parameters for b in again.branches] == [b.parameters for b in space.branches]
    assert again.tree == space.tree
    choices = {**CNN, "share": {"choices": [0.5, 1, 2]}}
    assert len(build_space({**SPACE, "teacher": [SMALL, choices]}).teacher_runs()) == 2


def test_ranges_of_other_settings_of_several_teachers_are_refused() -> None:
    tree = {**SPACE, "teacher": [SMALL, {**CNN, "epochs": {"low": 1, "high": 3}}]}
    with pytest.raises(ConfigError, match=r"teachers\.2.epochs: choices only"):
        build_space(tree)
    with pytest.raises(ConfigError, match=r"teachers\.2.share: is searched, and no objective here"):
        build_space({**SPACE, "objective": "ce"})
    shared = {**CNN, "share": [0.1, 2]}
    with pytest.raises(ConfigError, match=r"teachers\.2.share: a list is no range"):
        build_space({**SPACE, "teacher": [SMALL, shared]})


def test_a_self_teacher_beside_them_in_a_list_of_objectives_is_the_students() -> None:
    space = build_space({**SPACE, "objective": ["kd", "tfkd_self"]})
    kinds = {b.objective: len(b.example.teacher_runs()) for b in space.branches}
    assert kinds == {"kd": 2, "tfkd_self": 1, "ce": 0, "lsr": 0}
    again = build_space(space.tree)
    assert {b.objective: len(b.example.teacher_runs()) for b in again.branches} == kinds


@pytest.mark.parametrize("key", ["teacher.2.share", "teachers.2.share"])
def test_the_command_line_reaches_one_of_several_teachers(key: str) -> None:
    tree = {**BASE, "teacher": [dict(SMALL), dict(CNN)]}
    override(tree, f"{key}=3")
    assert validated(TrainConfig, tree).shares == (0.25, 0.75)


@pytest.mark.slow
def test_a_plan_counts_every_teacher() -> None:
    space = build_space({**SPACE, "teacher": [SMALL, {**CNN, "epochs": 4}]})
    assert plan(space).teacher_epochs == 5
    probed = plan(space, probe=True)
    assert probed.teacher_s is not None and all(part.epoch_s for part in probed.parts)
    both = config(teacher=[{**SMALL, "labels": "bank"}, {**CNN, "labels": "bank"}])
    one = config(teacher={**SMALL, "labels": "bank"})
    none = config(teacher=SMALL)
    labels = resident_bytes(one) - resident_bytes(none)
    assert resident_bytes(both) - resident_bytes(none) == 2 * labels > 0


def test_the_seeds_of_a_comparison_share_teachers_of_other_networks() -> None:
    tree = {**BASE, "arms": [{"name": "two"}], "teacher": [{"model": BASE["student"]}, CNN]}
    arms = build_arms(tree)
    runs = [run.config.teacher_runs() for run in runs_of(arms, [1, 2])]
    (own, other), (own2, other2) = runs
    assert own.seed != own2.seed and other == other2
    runs = [r.config.teacher_runs() for r in runs_of(arms, [1, 2], teacher_per_seed=True)]
    assert len({made.seed for pair in runs for made in pair}) == 4
    small = build_arms(tree, preset="smoke").arms[0].config
    assert len(small.teachers) == 2 and small.epochs == 2


def test_teachers_that_differ_by_more_than_their_seed_are_told_of_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {**SMALL, "model": {"name": "mlp", "hidden": [32]}}
    runs = config(teacher=[SMALL, wide, {**wide, "seed": 3}]).teacher_runs()
    say = teacher_lines(runs, tmp_path)
    for run in runs:
        say(run, None)
    line = "teacher: training mlp with ce for 1 epochs"
    assert capsys.readouterr().err.splitlines() == [line, f"{line} (2 seeds)"]


# --- a sweep and its verdict


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_share_is_tuned_confirmed_and_exported(
    ray_cluster: str, tfkd: Run, tmp_path: Path
) -> None:
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    more = ("epochs=2", "search.num_samples=6", "search.stopping=none")
    found = tfkd("tune", "space.json", "--name", "two", *more, timeout=400)
    assert found.returncode == 0, found.stderr
    storage = tmp_path / "tfkd_results"
    records = read_records(storage / "two")
    assert [r.status for r in records] == ["done"] * 6
    shares = {r.parameters["teachers.2.share"] for r in records if r.objective == "kd"}
    assert len(shares) == 2 and "teachers" in read_experiment(storage / "two")["space"]
    assert len(read_teachers(storage)) == 3
    more = ("--seeds", "2", "--top-k", "1", "--name", "verdict", "--baselines", "scaled")
    found = tfkd("confirm", str(storage / "two"), *more, timeout=400)
    assert found.returncode == 0, found.stderr
    result = json.loads((storage / "verdict/confirm.json").read_text())
    assert result["verdicts"]
    arm = next(a for a in result["arms"] if a["role"] == "candidate")
    assert all(0 < seed["agreement"] <= 1 for seed in arm["runs"])
    _guesses_are_those_of_both(storage, arm["name"])
    taught = next(r for r in records if r.objective == "kd")
    export(taught.folder, tmp_path / "student")
    card = (tmp_path / "student/README.md").read_text()
    assert "2 teachers; the student learnt from the mean" in card and "Teacher 2, " in card


def _guesses_are_those_of_both(storage: Path, arm: str) -> None:
    """Check the classes that the teachers of an arm's first run answer on test."""
    record = next(r for r in read_records(storage / "verdict") if r.name.startswith(arm))
    config = validated(TrainConfig, record.config)
    kept = load_file(record.folder / "test.safetensors")
    test = config.data.load_test()
    logits = []
    for made in config.teacher_runs():
        network = load_teacher(made, storage)
        logits.append(torch.cat([z for z, _ in predictions(network, test, config.data)]))
    both = combined(logits, config.shares, config.objective.teacher_temperature)
    assert kept["teacher"].equal(both.argmax(1))
