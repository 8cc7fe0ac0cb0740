"""Where a student begins: external weights, frozen parts, learning rates by depth; new networks."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]
from conftest import Run, TwoWorkers, long_after, train_as_worker
from safetensors.torch import save_file
from test_loop import numbers, same
from test_weights import hub as hub  # a fixture
from torch import Tensor, nn

from tfkd_ray.learn import loop
from tfkd_ray.learn.config import TeacherRun, TrainConfig
from tfkd_ray.learn.images import seeded
from tfkd_ray.learn.initial import depths, factors_by_depth, freeze_parts, is_frozen, set_training
from tfkd_ray.learn.loop import Epoch, train, train_in
from tfkd_ray.learn.models import (
    Cnn,
    ConvNeXtAtto,
    ConvNeXtFemto,
    ConvNeXtTiny,
    Mlp,
    Network,
    OwnNetwork,
    ResNet18,
    Timm,
    ViTTiny,
    WideResNet,
)
from tfkd_ray.learn.teachers import find_or_train
from tfkd_ray.learn.weights import load_beginning, load_outside
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.space.arms import baseline_space
from tfkd_ray.space.space import Space, build_space, load_space, override, with_digests
from tfkd_ray.store.experiment import write_experiment

BASE: dict[str, Any] = {
    "data": {"name": "digits", "subset": 300},
    "student": {"name": "cnn", "widths": [4, 8]},
    "objective": "ce",
    "epochs": 2,
    "precision": "fp32",
}
STEM = ["0", "1"]  # of the cnn: its first convolution and the BatchNorm after it


def config(**changes: Any) -> TrainConfig:
    return validated(TrainConfig, {**BASE, **changes})


def problem(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        config(**changes)
    return "\n".join(error.value.problems)


def last_of(run: TrainConfig, **more: Any) -> Epoch:
    return list(train(run, **more))[-1]


def saved(network: nn.Module, path: Path) -> str:
    torch.save(network.state_dict(), path)
    return str(path)


def of_timm(name: str, **settings: Any) -> nn.Module:
    """Return a network of timm, whose import takes seconds."""
    import timm

    network: nn.Module = timm.create_model(name, **settings)
    return network


def cnn(num_classes: int = 10, widths: tuple[int, ...] = (4, 8)) -> nn.Module:
    with seeded(7, "file"):
        network = Cnn(widths=widths).build((1, 8, 8), num_classes)
        network(torch.randn(16, 1, 8, 8))  # batch statistics that are not the default
    return network


def drop(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A user's network with a BatchNorm that has no parameters, and dropout."""
    norm = nn.BatchNorm1d(16, affine=False)
    stem = nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], 16), norm, nn.Dropout(0.5))
    return nn.Sequential(stem, nn.ReLU(), nn.Linear(16, num_classes))


# --- external weights


def test_a_student_of_given_weights_is_the_one_that_begins_as_their_network(tmp_path: Path) -> None:
    """`init: trained` with the same network as its teacher gives the same numbers, bit by bit."""
    network = cnn()
    weights = saved(network, tmp_path / "w.pt")
    ours = list(train(config(init={"weights": weights})))
    twice = list(train(config(init="trained"), teacher=copy.deepcopy(network)))
    assert numbers(ours) == numbers(twice)
    assert same(ours[-1].state()["model"], twice[-1].state()["model"])
    assert not same(ours[-1].state()["model"], last_of(config()).state()["model"])


ATTO = [
    torchvision.models.convnext.CNBlockConfig(*stage)
    for stage in ((40, 80, 2), (80, 160, 2), (160, 320, 6), (320, None, 2))
]
FORMATS: dict[str, tuple[Network, tuple[int, int, int], Callable[[int], nn.Module]]] = {
    "resnet of torchvision": (
        ResNet18(),
        (3, 72, 72),
        lambda k: torchvision.models.resnet18(num_classes=k),
    ),
    "convnext of torchvision": (
        ConvNeXtAtto(),
        (3, 72, 72),
        lambda k: torchvision.models.ConvNeXt(ATTO, num_classes=k),
    ),
    "vit of timm": (
        Timm(model="test_vit"),
        (3, 160, 160),
        lambda k: of_timm("test_vit", num_classes=k),
    ),
    "resnet of timm": (
        Timm(model="test_resnet"),
        (3, 160, 160),
        lambda k: of_timm("test_resnet", num_classes=k),
    ),
    "convnext of timm": (
        Timm(model="test_convnext"),
        (3, 160, 160),
        lambda k: of_timm("test_convnext", num_classes=k),
    ),
}
"""Students, and the networks that made the file: names of torchvision and of timm."""


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.slow
def test_files_of_torchvision_and_timm_fit_but_for_a_head_of_other_classes(
    name: str, tmp_path: Path
) -> None:
    network, shape, make = FORMATS[name]
    original = make(5)
    weights = saved(original, tmp_path / "w.pt")
    student = network.build(shape, 7)
    before = copy.deepcopy(student.state_dict())
    note = load_beginning(weights, network, student, shape, 7)
    head = list(before)[-1].rpartition(".")[0]
    assert note == (
        f"init.weights: {weights}: these weights are for 5 classes, and the data has 7; the student gets a "
        f"new head ({head}), drawn from its seed"
    )
    kept = original.state_dict()
    for key, value in student.state_dict().items():
        assert value.equal(before[key] if key.startswith(f"{head}.") else kept[key]), key
    # of the same classes, all of it fits, of a teacher, too
    assert load_beginning(weights, network, network.build(shape, 5), shape, 5) is None
    taught = load_outside(weights, network, shape, 5)
    assert all(value.equal(kept[key]) for key, value in taught.items())


def test_wrappers_prefixes_and_safetensors_are_read_as_for_a_teacher(tmp_path: Path) -> None:
    kept = cnn(num_classes=4).state_dict()
    files = {
        "wrapped.pt": lambda p: torch.save({"state_dict": {f"module.{k}": v for k, v in kept.items()}}, p),
        "w.safetensors": lambda p: save_file(kept, p),
        "half.pt": lambda p: torch.save({k: v.half() if v.ndim else v for k, v in kept.items()}, p),
        "backbone.pt": lambda p: torch.save({k: v for k, v in kept.items() if k[0] != "9"}, p),
    }  # fmt: skip
    for name, write in files.items():
        write(tmp_path / name)
        student = Cnn(widths=(4, 8)).build((1, 8, 8), 10)
        head = copy.deepcopy(student.state_dict()["9.weight"])
        network = Cnn(widths=(4, 8))
        note = load_beginning(str(tmp_path / name), network, student, (1, 8, 8), 10)
        found = student.state_dict()
        assert found["9.weight"].equal(head) and found["0.weight"].dtype == torch.float32
        assert torch.allclose(found["5.running_var"], kept["5.running_var"], atol=1e-2), name
        has = "have no head" if name == "backbone.pt" else "are for 4 classes"
        assert note is not None and f"these weights {has}, and the data has 10" in note


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, sentence",
    [
        (
            lambda: cnn(widths=(5, 8)),
            "does not fit cnn for these images: of another shape: 6 tensors (0.weight is [5, 1, 3, 3], not "
            "[4, 1, 3, 3], ",
        ),
        (
            lambda: Mlp().build((1, 8, 8), 10),
            "The file begins with 1.weight, 1.bias, 3.weight, and the network with 0.weight, 1.weight, 1.bias",
        ),
        (
            lambda: of_timm("test_resnet"),
            "The file begins with conv1.0.weight, conv1.1.weight, conv1.1.bias, and the network with 0.weight, 1.weight, 1.bias",
        ),
    ],
    ids=["width", "mlp", "names"],
)
def test_weights_of_another_network_are_refused_with_the_first_names_of_both(
    make: Callable[[], nn.Module], sentence: str, tmp_path: Path
) -> None:
    weights = saved(make(), tmp_path / "w.pt")
    run = config(init={"weights": weights})
    for refuse in (run.try_own_code, lambda: list(train(run))):
        with pytest.raises(ConfigError) as error:
            refuse()
        (said,) = error.value.problems
        assert said.startswith(f"init.weights: {weights}: does not fit cnn") and sentence in said
        assert "The file begins with" in said and "and the network with 0.weight" in said


def test_a_hidden_layer_of_other_width_is_no_head(tmp_path: Path) -> None:
    """As many units as classes: only the last layer may differ."""
    weights = saved(Mlp(hidden=(12,)).build((1, 8, 8), 10), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="does not fit mlp"):
        config(student={"name": "mlp", "hidden": [10]}, init={"weights": weights}).try_own_code()


def test_a_new_head_is_said_by_check_and_once_when_runs_begin(
    tmp_path: Path, tfkd_inside: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_told_once", set())
    weights = saved(cnn(num_classes=3), tmp_path / "w.pt")
    (tmp_path / "space.yaml").write_text(
        "data: digits\nobjective: ce\nstudent: {name: cnn, widths: [4, 8]}\n"
        f"init: {{weights: {weights}, lr_decay: {{low: 0.5, high: 1}}}}\n"
    )
    done = tfkd_inside("check", "space.yaml")
    assert done.returncode == 0, done.stderr
    note = "these weights are for 3 classes, and the data has 10; the student gets a new head (9)"
    out = " ".join(done.stdout.split())
    assert out.count(note) == 1 and "init.lr_decay" in out
    assert "was trained on is unknown; if validation images were among them" in " ".join(
        done.stdout.split()
    )
    told: list[str] = []
    for _ in range(2):
        list(train(config(init={"weights": weights}, epochs=1), say=told.append))
    assert len(told) == 1 and note in told[0]


def test_a_file_that_is_missing_is_named_before_anything_runs(tmp_path: Path) -> None:
    run = config(init={"weights": str(tmp_path / "none.pt")})
    with pytest.raises(ConfigError, match=r"init.weights: .*none.pt: no such file"):
        run.try_own_code()


@pytest.mark.slow
def test_torchvisions_weights_are_checked_without_a_download(hub: Path) -> None:
    network, shape = ConvNeXtTiny(), (3, 72, 72)
    student = network.build(shape, 10)
    note = load_beginning("torchvision", network, student, shape, 10, download=False)
    assert note is not None and "these weights are for 1000 classes, and the data has 10" in note
    with pytest.raises(ConfigError) as error:
        load_beginning("torchvision", network, student, shape, 10)
    assert (
        "init.weights: torchvision: cannot be downloaded (<urlopen error no network here>)"
        in str(error.value)
    )
    for weights, small, sentence in (
        (
            "torchvision:V9",
            False,
            "convnext_tiny has no weights 'V9'; known: DEFAULT, IMAGENET1K_V1",
        ),
        ("torchvision", True, "torchvision's are for images of 3 channels above 64 pixels"),
    ):
        there = (3, 32, 32) if small else shape
        with pytest.raises(ConfigError, match=sentence):
            load_beginning(weights, network, student, there, 10, download=False)


@pytest.mark.slow
def test_weights_that_were_trained_on_other_statistics_are_noted() -> None:
    data = {"name": "own", "path": f"{__name__}:striped", "num_classes": 2, "shape": [3, 224, 224]}
    run = {"data": {**data, "mean": [128] * 3, "std": [64] * 3}, "student": "convnext_tiny"}
    (note, *others) = config(**run, init={"weights": "torchvision"}).try_beginning()
    assert note == (
        "init.weights: torchvision: were trained on images with mean [123.7, 116.3, 103.5] and std [58.4, "
        "57.12, 57.38], and the data here has [128, 128, 128] and [64, 64, 64]; if parts are frozen, set "
        "data.mean and data.std to those of the weights, where the data has these settings"
    )
    assert len(others) == 1 and "new head" in others[0]
    alike = {**data, "mean": [124, 116, 104], "std": [58, 57, 57]}
    assert (
        len(config(**{**run, "data": alike}, init={"weights": "torchvision"}).try_beginning()) == 1
    )


def test_timms_own_weights_are_loaded_but_for_its_head(tmp_path: Path) -> None:
    original = of_timm("test_vit", num_classes=5)
    file = saved(original, tmp_path / "of-timm.pth")
    args: dict[str, Any] = {"pretrained_cfg_overlay": {"file": file, "num_classes": 5}}
    network, shape = Timm(model="test_vit", args=args), (3, 160, 160)
    student = network.build(shape, 7)
    head = copy.deepcopy(student.state_dict()["head.weight"])
    note = load_beginning("timm", network, student, shape, 7)
    assert note is not None and "these weights are for 5 classes, and the data has 7" in note
    assert (
        load_beginning("timm", network, network.build(shape, 7), shape, 7, download=False) == note
    )
    found = student.state_dict()
    for key, value in original.state_dict().items():
        assert found[key].equal(head if key == "head.weight" else value) or key == "head.bias", key
    assert load_beginning("timm", network, network.build(shape, 5), shape, 5) is None


@pytest.mark.parametrize(
    "network, shape, sentence",
    [
        (Cnn(), (1, 8, 8), "init.weights: timm: is for networks of timm, and the student is cnn; name a file"),
        (Timm(model="test_vit"), (3, 160, 160), "init.weights: timm: cannot be loaded (OSError: no network here); if this"),
        (Timm(model="resnet18"), (3, 32, 32), "images up to 64 pixels get a smaller first convolution; set student.stem"),
    ],
    ids=["cnn", "offline", "stem"],
)  # fmt: skip
def test_what_timm_has_no_weights_for_is_said(
    network: Network, shape: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    student = network.build(shape, 10)
    create = timm.create_model

    def without_network(name: str, pretrained: bool, **more: Any) -> nn.Module:
        if pretrained and name == "test_vit":
            raise OSError("no network here")
        return create(name, pretrained=False, **more)

    monkeypatch.setattr(timm, "create_model", without_network)
    with pytest.raises(ConfigError) as error:
        load_beginning("timm", network, student, shape, 10)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"init": "pretrained"}, "init: no such name 'pretrained'; it is random, trained, or settings: {weights: FILE}"),
        ({"init": 3}, "init: needs random, trained, or settings: {weights: FILE}, got 3"),
        ({"init": {"lr_decay": 0.5}}, "init.weights: required, and not given"),
        ({"init": {"weights": "w.pt", "lr_decay": 2}}, "init.lr_decay: should be at most 1, got 2"),
        ({"init": {"weights": "w.pt", "lr_decays": 1}}, "init.lr_decays: no such setting; did you mean 'lr_decay'?"),
        ({"init": {"weights": ""}}, "init.weights: needs a file, torchvision, torchvision:NAME or timm, got ''"),
        ({"freeze": 3}, "freeze: should be a list, got 3"),
        ({"freeze": [""]}, "freeze.0: String should have at least 1 character, got ''"),
        (
            {"freeze": "0", "loop": "loops_of_mine:good"},
            "freeze: is for the loop of this package; freeze these parts in your own one",
        ),
        (
            {"init": {"weights": "w.pt"}, "loop": "loops_of_mine:good"},
            "init.weights: is for the loop of this package; load the weights in your own one",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else str(next(iter(value))),
)  # fmt: skip
def test_wrong_settings_of_a_beginning_get_a_sentence(
    changes: dict[str, Any], sentence: str
) -> None:
    assert sentence in problem(**changes)


def test_settings_that_are_off_leave_no_trace(tmp_path: Path) -> None:
    plain = config()
    assert config(freeze=[]).fingerprint() == plain.fingerprint()
    tree = plain.model_dump(mode="json")
    assert tree["init"] == "random" and "freeze" not in tree
    one = config(init={"weights": "w.pt"}, freeze="0")
    assert one.freeze == ("0",) and one.initial_weights == str(Path("w.pt").absolute())
    others = [plain, config(freeze=["0"]), one, config(init={"weights": "v.pt"}, freeze="0")]
    others.append(config(init={"weights": "w.pt", "lr_decay": 0.5}, freeze="0"))
    assert len({run.fingerprint() for run in others}) == len(others)
    for run in others:
        assert validated(TrainConfig, run.model_dump(mode="json")) == run
    for name in ("timm", "torchvision", "torchvision:IMAGENET1K_V1", "~/w.pt"):
        assert config(init={"weights": name}).initial_weights == name


# --- resume


@pytest.mark.parametrize("student", [BASE["student"], f"{__name__}:drop"], ids=["cnn", "own"])
def test_a_resumed_run_is_the_same_and_needs_the_file_no_more(student: Any, tmp_path: Path) -> None:
    own = isinstance(student, str)
    network = drop((1, 8, 8), 4) if own else cnn(num_classes=4)
    weights = saved(network, tmp_path / "w.pt")
    init = {"weights": weights, "lr_decay": 0.5}
    run = config(student=student, init=init, freeze="0", epochs=3)
    whole = list(train(run))
    begun = train(run)
    state = next(begun).state()
    begun.close()
    Path(weights).unlink()
    rest = list(train(run, state))
    assert numbers(rest) == numbers(whole[1:])
    assert same(rest[-1].state(), whole[-1].state())


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_every_optimizer_takes_frozen_parts_and_rates_by_depth(name: str, tmp_path: Path) -> None:
    student = {"name": "mlp", "hidden": [16, 16, 16]}
    made = validated(TrainConfig, {**BASE, "student": student}).build_student()
    init = {"weights": saved(made, tmp_path / "w.pt"), "lr_decay": 0.5}
    more = {"optim": {"name": name, "lr": 0.01}, "ema": {"decay": 0.9}}
    run = config(student=student, init=init, freeze="1", epochs=3, **more)
    whole = list(train(run))
    begun = train(run)
    state = next(begun).state()
    begun.close()
    assert same(list(train(run, state))[-1].state(), whole[-1].state())
    first = made.state_dict()
    for key, value in whole[-1].state()["trained"].items():
        assert value.equal(first[key]) == key.startswith("1."), key
    even = config(student=student, init={**init, "lr_decay": 1}, freeze="1", epochs=3, **more)
    assert not same(last_of(even).state()["model"], whole[-1].state()["model"])


# --- frozen parts


def test_names_prefixes_and_patterns_freeze_what_they_name() -> None:
    for name, freeze in [
        ("layer1.0.bn1.weight", ["layer1"]),
        ("layer1.0.bn1.weight", ["layer1.0"]),
        ("layer1.0.bn1.weight", ["*.bn1"]),
        ("layer1.0.bn1.weight", ["fc", "layer?"]),
        ("layer1.0.bn1.weight", ["layer1.0.bn1.weight"]),
    ]:
        assert is_frozen(name, freeze), freeze
    for name, freeze in [("layer10.weight", ["layer1"]), ("layer1.weight", ["ayer1", "1"])]:
        assert not is_frozen(name, freeze), freeze


def test_frozen_parts_and_their_batch_statistics_stay_and_the_rest_is_the_textbook_loop() -> None:
    run = config(freeze=STEM, optim={"lr": 0.05, "batch_size": 64})
    ours = last_of(run).state()["model"]
    student = run.build_student().to(memory_format=torch.channels_last)
    first = copy.deepcopy(student.state_dict())
    learns = [p for name, p in student.named_parameters() if name[0] not in STEM]
    optimizer = torch.optim.SGD(learns, lr=0.05, momentum=0.9, weight_decay=5e-4)
    images, _ = run.data.load()
    (mean,), (std,) = run.data.statistics()
    for epoch in range(2):
        batches = loop.split_batches(loop.epoch_order(images, 0, epoch), 64, 1)
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = 0.05 * run.schedule.factor(
                epoch + (step + 0.5) / len(batches), 2
            )
            student.train()
            student.get_submodule("1").eval()
            x = (next(iter(images.read([batch]))).float() - mean) / std
            optimizer.zero_grad()
            F.cross_entropy(student(x), images.labels[batch]).backward()
            optimizer.step()
    for key, value in student.state_dict().items():
        assert torch.allclose(ours[key].float(), value.float(), atol=1e-5), key
        stays = ours[key].equal(first[key])
        assert stays == (key[0] in STEM), key


def test_a_frozen_batch_norm_is_still_and_frozen_dropout_goes_on() -> None:
    student = drop((1, 8, 8), 4)
    freeze_parts(student, ["0"], "drop")
    wrapped = nn.Sequential(student)
    set_training(wrapped, student, ["0"])
    modes = {name: module.training for name, module in student.named_modules()}
    assert not modes["0.2"] and modes["0.3"] and modes["2"]  # BatchNorm, dropout, head
    set_training(wrapped, student, [])
    assert student.get_submodule("0.2").training
    part = Cnn().build((1, 8, 8), 4)
    freeze_parts(part, ["1.weight"], "cnn")
    set_training(part, part, ["1.weight"])
    assert part.get_submodule("1").training, "its bias learns, and so do its statistics"


@pytest.mark.parametrize(
    "freeze, sentence",
    [
        (["layer5"], "freeze: 'layer5' names no part of resnet18 that has parameters; did you mean 'layer4'?"),
        (["stem", "conv1"], "freeze: 'stem' names no part of resnet18 that has parameters; known: bn1, conv1, fc, layer1,"),
        (["relu"], "freeze: 'relu' names no part of resnet18 that has parameters; known: bn1"),
        (["*"], "freeze: '*' freezes all 62 parameters of resnet18, so there is nothing to train; leave out its last "
                "layer at least, 'fc'"),
        (["conv1", "bn1", "layer?", "fc"], "freeze: 'conv1', 'bn1', 'layer?', 'fc' freezes all 62 parameters of resnet18"),
    ],
    ids=["near", "one of two", "without parameters", "all", "all by name"],
)  # fmt: skip
def test_freezing_nothing_or_everything_gets_a_sentence(freeze: list[str], sentence: str) -> None:
    with torch.device("meta"):
        student = ResNet18().build((3, 32, 32), 10)
    with pytest.raises(ConfigError) as error:
        freeze_parts(student, freeze, "resnet18")
    assert error.value.problems[0].startswith(sentence)


def test_a_wrong_freeze_is_refused_by_check_in_every_choice(
    tmp_path: Path, tfkd_inside: Run
) -> None:
    (tmp_path / "space.yaml").write_text(
        "data: digits\nobjective: ce\nstudent: {name: cnn, widths: [4, 8]}\n"
        "freeze: {choices: [[], ['0'], [stem]]}\n"
    )
    done = tfkd_inside("check", "space.yaml")
    sentence = "freeze: 'stem' names no part of cnn that has parameters; known: 0, 1, 4, 5, 9"
    assert (done.returncode, done.stderr) == (2, f"tfkd check: space.yaml:\n  {sentence}\n")
    space = with_digests(load_space(tmp_path / "space.yaml"), {"digest": "0" * 32})
    for of_python, place in ((space, space.source), (replace(space, source=None), None)):
        with pytest.raises(ConfigError) as error:
            of_python.try_own_code()
        assert (error.value.source, error.value.problems) == (place and str(place), [sentence])
    assert space.source == tmp_path / "space.yaml"


@pytest.mark.long
def test_two_workers_with_frozen_parts_train_as_one(
    tmp_path: Path, as_two_workers: TwoWorkers
) -> None:
    """Frozen parameters are no missing gradients; a frozen BatchNorm is the same for all workers."""
    run = config(student={"name": "cnn", "widths": [6]}, freeze=STEM, optim={"batch_size": 64})
    one = last_of(run).state()
    as_two_workers(train_as_worker, str(tmp_path), run.model_dump(mode="json"), _no_teacher)
    two = torch.load(tmp_path / "state.pt", weights_only=True)
    for key, value in one["model"].items():
        assert (two["model"][key] - value).abs().max() < 1e-5, key


def _no_teacher(run: TrainConfig) -> None:
    return None


# --- learning rates by depth


def by_depth(network: nn.Module) -> list[set[str]]:
    """Return the modules with parameters at each depth."""
    found = depths(network)
    assert found.keys() == {name for name, _ in network.named_parameters()}
    blocks: list[set[str]] = [set() for _ in range(max(found.values()) + 1)]
    for name, depth in found.items():
        blocks[depth].add(name.rpartition(".")[0] or name)
    return blocks


class Wrapped(nn.Module):
    """A network whose encoder holds a list of blocks beside parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.embed = nn.Linear(4, 4)
        self.encoder = nn.Module()
        self.encoder.position = nn.Parameter(torch.zeros(1, 4))
        self.encoder.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 8) for _ in range(2))
        self.encoder.norm = nn.LayerNorm(4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_the_depth_of_a_parameter_is_the_place_of_its_block() -> None:
    shape = (1, 8, 8)
    assert by_depth(Mlp(hidden=(8, 8)).build(shape, 10)) == [{"1"}, {"3"}, {"5"}]
    assert by_depth(Cnn().build(shape, 10)) == [{"0", "1"}, {"4", "5"}, {"9"}]
    wide = by_depth(WideResNet(depth=10, width=1).build((1, 16, 16), 10))
    assert len(wide) == 5 and wide[-1] == {"4", "8"} and all("2." in name for name in wide[2])
    own = by_depth(Wrapped())
    assert own[0] == {"token", "embed", "encoder"}
    assert own[1] >= {"encoder.blocks.0.linear1"} and own[2] >= {"encoder.blocks.1.norm1"}
    assert own[3:] == [{"encoder.norm", "head.0", "head.2"}]
    assert by_depth(nn.Sequential(Wrapped())) == [
        {name if name == "token" else f"0.{name}" for name in part} if k else
        {"0", "0.embed", "0.encoder"} for k, part in enumerate(own)
    ]  # fmt: skip
    with torch.device("meta"):
        convnext = by_depth(ConvNeXtAtto().build((3, 32, 32), 10))
        vit = by_depth(ViTTiny().build((3, 32, 32), 10))
        resnet = by_depth(ResNet18().build((3, 32, 32), 10))
    assert len(convnext) == 9 and convnext[0] == {"features.0.0", "features.0.1"}
    assert convnext[-1] == {"classifier.0", "classifier.2"}
    assert len(vit) == 14 and vit[0] == {"class_token", "conv_proj", "encoder"}
    assert vit[-1] == {"encoder.ln", "heads.head"}
    assert len(resnet) == 10 and resnet[0] == {"conv1", "bn1"} and resnet[-1] == {"fc"}


def test_the_factors_are_those_of_timm_but_for_the_last_norm_of_a_vit() -> None:
    """As in BEiT's code, the last norm belongs to the head; timm counts it with the last block."""
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        network = of_timm("vit_tiny_patch16_224")
    name_of = {parameter: name for name, parameter in network.named_parameters()}
    ours = factors_by_depth(network, network, 0.7)
    theirs = {
        name_of[parameter]: group["lr_scale"]
        for group in param_groups_layer_decay(network, layer_decay=0.7)
        for parameter in group["params"]
    }
    assert ours.keys() == theirs.keys()
    for name, factor in theirs.items():
        assert ours[name] == pytest.approx(1 if name.startswith("norm.") else factor), name


def test_the_names_of_the_factors_are_those_of_what_is_trained() -> None:
    student = Mlp(hidden=(8,)).build((1, 8, 8), 10)
    around = nn.ModuleDict({"student": student, "owned": nn.Linear(2, 2)})
    assert factors_by_depth(around, student, 1.0) == {}
    assert factors_by_depth(around, student, 0.5) == {
        "student.1.weight": 0.5, "student.1.bias": 0.5, "student.3.weight": 1, "student.3.bias": 1
    }  # fmt: skip


def test_each_block_learns_at_its_own_rate_and_has_the_schedule_of_all(tmp_path: Path) -> None:
    """Compare with torch's SGD and a group for each layer by hand."""
    made = Mlp(hidden=(16, 8)).build((1, 8, 8), 10)
    init = {"weights": saved(made, tmp_path / "w.pt"), "lr_decay": 0.25}
    student = {"name": "mlp", "hidden": [16, 8]}
    run = config(student=student, init=init, optim={"lr": 0.2, "batch_size": 64})
    ours = last_of(run)
    groups = [
        {"params": list(made.get_submodule(name).parameters()), "factor": factor}
        for name, factor in (("1", 0.0625), ("3", 0.25), ("5", 1.0))
    ]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9, weight_decay=5e-4)
    images, _ = run.data.load()
    (mean,), (std,) = run.data.statistics()
    for epoch in range(2):
        batches = loop.split_batches(loop.epoch_order(images, 0, epoch), 64, 1)
        for step, batch in enumerate(batches):
            rate = 0.2 * run.schedule.factor(epoch + (step + 0.5) / len(batches), 2)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            x = (next(iter(images.read([batch]))).float() - mean) / std
            optimizer.zero_grad()
            F.cross_entropy(made(x), images.labels[batch]).backward()
            optimizer.step()
    for key, value in made.state_dict().items():
        assert torch.allclose(ours.state()["model"][key], value, atol=1e-5), key
    assert ours.metrics["lr"] == pytest.approx(rate), "the rate of the head"


# --- a teacher of the same beginning


def test_a_self_teacher_begins_where_its_student_does_and_has_its_frozen_parts() -> None:
    init = {"weights": "/w.pt", "lr_decay": 0.5}
    run = config(objective="tfkd_self", init=init, freeze=["0"]).teacher_run()
    assert isinstance(run, TeacherRun)
    assert (run.initial_weights, run.lr_decay, run.freeze) == ("/w.pt", 1.0, ("0",))
    other = config(
        objective="tfkd_self", init={**init, "lr_decay": 0.9}, freeze=["0"]
    ).teacher_run()
    assert other == run, "its learning rates are its own"
    poor = config(objective="tfkd_self", init=init, teacher={"stop_epoch": 1}).teacher_run()
    assert poor is not None and poor.initial_weights == "/w.pt"
    plain = config(objective="tfkd_self").teacher_run()
    assert plain is not None and plain.fingerprint() != run.fingerprint()
    for objective in ("ce", "tfkd_self"):
        copied = config(objective=objective, init="trained", freeze=["0"]).teacher_run()
        assert copied is not None and (copied.init, copied.freeze) == ("random", ())
    kd = config(objective="kd", teacher={"model": "mlp"}, init=init, freeze=["0"]).teacher_run()
    assert kd is not None and (kd.init, kd.freeze) == ("random", ())


def test_the_bank_of_such_a_self_teacher_has_the_logits_that_it_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    init = {"weights": saved(cnn(num_classes=4), tmp_path / "w.pt")}
    ends = []
    for labels in ("online", "bank"):
        teacher = {"labels": labels, "epochs": 1}
        run = config(objective="tfkd_self", init=init, freeze=STEM, teacher=teacher)
        given = find_or_train(run, tmp_path)
        ends.append(last_of(run, teacher=given))
        network = loop._network_of(given)  # type: ignore[arg-type]
        assert network.state_dict()["0.weight"].equal(cnn().state_dict()["0.weight"])
    online, bank = ends
    assert bank.metrics["train_kd"] == pytest.approx(online.metrics["train_kd"], rel=1e-3)
    for key, value in online.state()["model"].items():
        assert (bank.state()["model"][key] - value).abs().max() < 2e-3, key


# --- in a space


def space(**changes: Any) -> Space:
    return build_space({**BASE, "search": {"num_samples": 4}, **changes})


def test_a_beginning_and_its_frozen_parts_are_searched(tmp_path: Path) -> None:
    weights = saved(cnn(num_classes=4), tmp_path / "w.pt")
    init = {"choices": ["random", {"weights": weights, "lr_decay": {"low": 0.5, "high": 1}}]}
    found = space(init=init, freeze={"choices": [[], ["0"]]})
    (branch,) = found.branches
    assert [p.name for p in branch.parameters] == ["freeze", "init", "init.2.lr_decay"]
    given = branch.parameters[1].domain.probes[1]
    run = branch.config({"freeze": ["0"], "init": given, "init.2.lr_decay": 0.75})
    assert (run.initial_weights, run.lr_decay, run.freeze) == (weights, 0.75, ("0",))
    notes = found.try_own_code()
    assert len([note for note in notes if "gets a new head (9)" in note]) == 1
    assert build_space(found.tree).tree == found.tree


def test_a_self_teacher_is_trained_for_each_beginning_and_not_for_each_learning_rate() -> None:
    init = {"weights": "/w.pt", "lr_decay": {"low": 0.5, "high": 1}}
    found = space(objective="tfkd_self", init=init, freeze={"choices": [[], ["0"]]})
    assert {p.name for p in found.branches[0].makes_teachers} == {"freeze"}
    assert {run.freeze for run in found.teacher_runs()} == {(), ("0",)}


def test_a_choice_of_a_trained_beginning_has_its_teacher() -> None:
    found = space(init={"choices": ["random", "trained"]})
    (run,) = found.teacher_runs()
    assert run == found.branches[0].config({"init": "trained"}).teacher_run()
    assert found.branches[0].config({"init": "random"}).teacher_run() is None
    assert build_space(found.tree).tree == found.tree


def test_a_word_can_be_overridden_by_weights() -> None:
    tree: dict[str, Any] = {"objective": "ce", "init": "random"}
    override(tree, "init.weights=/w.pt")
    override(tree, "init.lr_decay=0.5")
    run = build_space(tree).single()
    assert (run.initial_weights, run.lr_decay) == ("/w.pt", 0.5)
    assert "init.name: no such setting" in problem(init={"name": "trained", "weights": "/w.pt"})


@pytest.mark.parametrize(
    "init, kept", [("trained", "random"), ("random", "random"), ({"weights": "/w.pt"}, "/w.pt")]
)
@pytest.mark.slow
def test_baselines_that_are_tuned_later_begin_with_the_same_weights(
    init: Any, kept: str, tmp_path: Path
) -> None:
    made = space(objective="tfkd_reg", init=init)
    write_experiment(tmp_path / "e", made.tree, ["tfkd"])
    found = baseline_space(tmp_path / "e", ["ce", "lsr"], 2)
    run = found.branches[0].example
    assert (run.initial_weights or run.init) == kept


# --- networks for it

NEW: list[Network] = [ViTTiny(), ConvNeXtAtto(), ConvNeXtFemto(), ConvNeXtTiny()]


SIDES = [
    pytest.param(network, side, marks=[] if side == 32 and network in NEW[:2] else [pytest.mark.long],
                 id=f"{network.name}-{side}")
    for network in NEW for side in (32, 64, 224)
]  # fmt: skip


@pytest.mark.parametrize("network, side", SIDES)
@pytest.mark.slow
def test_new_networks_train_a_step_at_each_size(network: Network, side: int) -> None:
    with seeded(0, "network"):
        student = network.build((3, side, side), 7)
        images = torch.randn(2, 3, side, side)
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loss = F.cross_entropy(student(images), torch.tensor([1, 2]))
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and all(p.grad is not None for p in student.parameters())
    assert sum(not before[key].equal(value) for key, value in student.state_dict().items()) > 20


@pytest.mark.slow
@pytest.mark.parametrize("side, patch", [(32, 4), (64, 8), (224, 16)])
@pytest.mark.parametrize("name", long_after(1, ["vit_tiny_patch16_224", "convnext_atto"]))
def test_those_of_timm_train_a_step_at_each_size(name: str, side: int, patch: int) -> None:
    args: dict[str, Any] = {"img_size": side, "patch_size": patch} if name[:3] == "vit" else {}
    student = Timm(model=name, args=args).build((3, side, side), 7)
    student(torch.randn(2, 3, side, side)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def striped(split: str, count: int = 12) -> tuple[Tensor, Tensor]:
    """A user's data: few images of 32x32, one class brighter than the other."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return (noise + 100 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


@pytest.mark.slow
@pytest.mark.parametrize("name", long_after(0, ["convnext_atto", "vit_tiny"]))
def test_new_networks_resume_bit_by_bit_and_are_exported(name: str, tmp_path: Path) -> None:
    from test_export import run_of

    from tfkd_ray.show.export import export

    data = {"name": "own", "path": f"{__name__}:striped", "shape": [3, 32, 32], "num_classes": 2}
    tree = {"data": data, "student": name, "optim": {"batch_size": 8}, "epochs": 2}
    run = validated(TrainConfig, {"objective": "ce", "precision": "fp32", **tree})
    whole = list(train(run))
    begun = train(run)
    state = next(begun).state()
    begun.close()
    assert same(list(train(run, state))[-1].state(), whole[-1].state())
    run_of(tmp_path / "run", {**tree, "epochs": 1})
    result = export(tmp_path / "run", tmp_path / "out")
    assert not result["problems"]
    assert all(d["largest"] < 1e-4 * d["scale"] for d in result["differences"].values())


@pytest.mark.parametrize("network, name", [
    (ViTTiny(), "vit_tiny_patch16_224"), (ConvNeXtAtto(), "convnext_atto"),
    (ConvNeXtFemto(), "convnext_femto"), (ConvNeXtTiny(), "convnext_tiny"),
], ids=lambda value: getattr(value, "name", ""))  # fmt: skip
def test_new_networks_are_as_large_as_timms(network: Network, name: str) -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert count(network.build((3, 224, 224), 1000)) == count(of_timm(name))


@pytest.mark.slow
def test_new_networks_fit_their_patches_to_the_images() -> None:
    sides = (8, 16, 28, 32, 64, 96, 224)
    assert [ViTTiny().side_of_patch((3, s, s)) for s in sides] == [1, 2, 4, 4, 8, 8, 16]
    assert [ConvNeXtAtto().side_of_patch((3, s, s)) for s in sides] == [1, 2, 2, 2, 2, 4, 4]
    assert ViTTiny(patch=2).side_of_patch((3, 32, 32)) == 2
    large = torchvision.models.convnext_tiny(num_classes=7).state_dict()
    with torch.device("meta"):
        ours = ConvNeXtTiny().build((3, 224, 224), 7).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in large.items()}
    for network, shape, sentence in [
        (ViTTiny(), (3, 32, 40), "name: vit_tiny needs square images, these are 32x40"),
        (ViTTiny(patch=5), (3, 32, 32), "patch: must divide the 32 pixels of the images, got 5"),
        (ConvNeXtAtto(patch=4), (3, 28, 28), "patch: 4 leaves 7 of 28 pixels, which are halved three times; lower it"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            network.check(shape)


def test_a_run_in_a_directory_begins_with_weights_and_is_kept(tmp_path: Path) -> None:
    weights = saved(cnn(num_classes=4), tmp_path / "w.pt")
    run = config(init={"weights": weights}, freeze=STEM, epochs=1)
    list(train_in(tmp_path / "run", run))
    assert (tmp_path / "run/student.safetensors").is_file()
    again = config(init={"weights": str(tmp_path / "run/student.safetensors")})
    assert again.try_own_code() == [], "a student of ours is a file like any other"
    assert OwnNetwork(path=f"{__name__}:drop").called == f"{__name__}:drop"
