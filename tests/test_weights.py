"""External weights: read without running anything; refused with a sentence if unsuitable."""

import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tfkd_ray.learn.config import TeacherRun, TrainConfig
from tfkd_ray.learn.data import Digits, OwnData
from tfkd_ray.learn.models import (
    Cnn,
    Cnn5,
    DenseNet121,
    GoogLeNet,
    Mlp,
    Network,
    ResNet18,
    ResNeXt29,
    ShuffleNetV2,
)
from tfkd_ray.learn.official import Cifar10, Cifar100
from tfkd_ray.learn.teachers import bank_of, describe, find_or_train, teacher_folder, train_teacher
from tfkd_ray.learn.weights import load_outside
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated

CNN, SHAPE, K = Cnn(widths=(4, 8)), (1, 8, 8), 10


@pytest.fixture(scope="module")
def saved() -> dict[str, Tensor]:
    torch.manual_seed(1)
    network = CNN.build(SHAPE, K)
    network(torch.randn(8, *SHAPE))  # batch statistics that are not the default
    return network.state_dict()


def refused(
    weights: Path | str,
    network: Network = CNN,
    shape: Any = SHAPE,
    num_classes: int = K,
    **more: Any,
) -> str:
    with pytest.raises(ConfigError) as error:
        load_outside(str(weights), network, shape, num_classes, **more)
    start = f"teacher.weights: {weights}: "
    assert str(error.value).startswith(start)
    return str(error.value).removeprefix(start)


SAVE: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "w.safetensors": save_file,
    "w.pt": torch.save,
    "old.pth": lambda w, path: torch.save(w, path, _use_new_zipfile_serialization=False),
    "state_dict.pth": lambda w, path: torch.save(
        {"epoch": 3, "state_dict": w, "optim_dict": {}}, path
    ),
    "model.pth": lambda w, path: torch.save({"model": w, "best": 0.5}, path),
    "parallel.pt": lambda w, path: torch.save({f"module.{k}": v for k, v in w.items()}, path),
    "both.pt": lambda w, path: torch.save(
        {"state_dict": {f"module.{k}": v for k, v in w.items()}}, path
    ),
    "without-counts.pt": lambda w, path: torch.save(
        {k: v for k, v in w.items() if "num_batches" not in k}, path
    ),
    "net.pt": lambda w, path: torch.save(
        {"net": w, "acc": 91.2, "epoch": 3, "optimizer": {"state": {}}}, path
    ),
    "model_state_dict.pt": lambda w, path: torch.save(
        {"model_state_dict": w, "loss": torch.ones(())}, path
    ),
    "ema_state_dict.pt": lambda w, path: torch.save({"epoch": 1, "ema_state_dict": w}, path),
    "model_ema.pth": lambda w, path: torch.save({"model_ema": w, "args": {"lr": 0.1}}, path),
    "any-name.pth": lambda w, path: torch.save({"the_net": w, "step": 1}, path),
    "both-nested.pth": lambda w, path: torch.save({"checkpoint": {"model": w}}, path),
    "raw-and-ema.pth": lambda w, path: torch.save(
        {
            "model_ema": {k: v + 1 for k, v in w.items()},
            "model": w,
            "optimizer": {"param_groups": []},
        },
        path,
    ),
    "compiled.pt": lambda w, path: torch.save({f"_orig_mod.{k}": v for k, v in w.items()}, path),
    "compiled-inside.pt": lambda w, path: torch.save(
        {k.replace(".", "._orig_mod.", 1): v for k, v in w.items()}, path
    ),
    "compiled-parallel.pt": lambda w, path: torch.save(
        {f"module._orig_mod.{k}": v for k, v in w.items()}, path
    ),
    "lightning.ckpt": lambda w, path: torch.save(
        {"state_dict": {f"model.{k}": v for k, v in w.items()}}, path
    ),
    "backbone.pth": lambda w, path: torch.save({f"backbone.{k}": v for k, v in w.items()}, path),
    "distilled.pth": lambda w, path: torch.save(
        {
            **{f"module.student.{k}": v for k, v in w.items()},
            "module.teacher.fc.weight": torch.ones(3, 3),
        },
        path,
    ),
    "averaged.pt": lambda w, path: torch.save(
        {"n_averaged": torch.tensor(5), **{f"module.{k}": v for k, v in w.items()}}, path
    ),
    "safetensors.bin": save_file,
    "safetensors-as.pt": save_file,
    "torch-as.safetensors": torch.save,
    "epoch-beside.pt": lambda w, path: torch.save({**w, "epoch": 3, "best": None}, path),
    "parallel-inside.pth": lambda w, path: torch.save(
        {k.replace(".", ".module.", 1): v for k, v in w.items()}, path
    ),
    "parallel-in-part.pth": lambda w, path: torch.save(
        {k if k.startswith("9") else f"module.{k}": v for k, v in w.items()}, path
    ),
    "compiled-parallel-inside.pt": lambda w, path: torch.save(
        {f"_orig_mod.{k.replace('.', '.module.', 1)}": v for k, v in w.items()}, path
    ),
    "ema-beside-a-number.pt": lambda w, path: torch.save(
        {"step": torch.tensor(3), "ema": {"module": w}}, path
    ),
    "params-and-ema.pth": lambda w, path: torch.save(
        {"params_ema": {k: v + 1 for k, v in w.items()}, "params": w}, path
    ),
    "ema-and-params.pth": lambda w, path: torch.save(
        {"ema": {k: v + 1 for k, v in w.items()}, "weights": w}, path
    ),
    "only-ema.pth": lambda w, path: torch.save({"ema": w, "updates": 9}, path),
    "deepspeed.pt": lambda w, path: torch.save({"module": w, "optimizer": None}, path),
    "lightning-whole.ckpt": lambda w, path: torch.save(
        {
            "state_dict": {
                **{f"model.{k}": v for k, v in w.items()},
                "criterion.weight": torch.ones(3),
            },
            "hyper_parameters": {"lr": 0.1},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.ones(())}},
        },
        path,
    ),
    "parallel-twice.pt": lambda w, path: torch.save(
        {f"module.module.{k}": v for k, v in w.items()}, path
    ),
    "nested-twice.pt": lambda w, path: torch.save({"a": {"b": {"model": w}}}, path),
    "tuple.pt": lambda w, path: torch.save((w, 30), path),
    "list.pt": lambda w, path: torch.save([{"model": w}, {"state": {}}, []], path),
    "double.pt": lambda w, path: torch.save(
        {k: v.double() if v.is_floating_point() else v for k, v in w.items()}, path
    ),
}


@pytest.mark.parametrize("name", SAVE)
def test_weights_in_a_file_are_the_ones_that_were_saved(
    name: str, tmp_path: Path, saved: dict[str, Tensor]
) -> None:
    SAVE[name](saved, tmp_path / name)
    before = torch.random.get_rng_state()
    found = load_outside(str(tmp_path / name), CNN, SHAPE, K)
    assert before.equal(torch.random.get_rng_state())
    assert found.keys() == saved.keys()
    for key in saved:
        assert found[key].dtype == saved[key].dtype
        assert found[key].equal(saved[key]) or (
            name == "without-counts.pt" and key.endswith("num_batches_tracked")
        )
    CNN.build(SHAPE, K).load_state_dict(found)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_weights_of_fewer_bits_are_taken_as_float32(
    kind: torch.dtype, tmp_path: Path, saved: dict[str, Tensor]
) -> None:
    few = {k: v.to(kind) if v.is_floating_point() else v for k, v in saved.items()}
    torch.save(few, tmp_path / "w.pt")
    found = load_outside(str(tmp_path / "w.pt"), CNN, SHAPE, K)
    for key, value in saved.items():
        assert found[key].dtype == value.dtype and found[key].equal(few[key].to(value.dtype))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_tensors_without_plain_values_are_refused(tmp_path: Path, saved: dict[str, Tensor]) -> None:
    for value in (saved["9.weight"].to_sparse(), saved["9.weight"].to("meta")):
        torch.save({**saved, "9.weight": value}, tmp_path / "w.pt")
        assert refused(tmp_path / "w.pt").startswith("9.weight is sparse, quantized or without")
    large = {**saved, "9.weight": saved["9.weight"].double() * 1e300}
    torch.save(large, tmp_path / "w.pt")
    assert refused(tmp_path / "w.pt").startswith("9.weight holds NaN or infinity")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_program_of_torchscript_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    assert refused(tmp_path / "w.pt").startswith("is a TorchScript archive, which contains code")


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    zipped: bool, tmp_path: Path
) -> None:
    path, mark = tmp_path / "w.pt", tmp_path / "it ran"
    torch.save({"a": torch.ones(1), "b": _Touch(mark)}, path, _use_new_zipfile_serialization=zipped)
    assert refused(path).startswith(
        "asks for posix.mkdir, and loading that could run code; nothing was run. Save the"
    )
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have


def test_a_whole_pickled_network_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(CNN.build(SHAPE, K), tmp_path / "w.pt")
    assert "torch.save(network.state_dict(), FILE)" in refused(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "old.pth"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_called_damaged(
    name: str, kept: float, tmp_path: Path, saved: dict[str, Tensor]
) -> None:
    path = tmp_path / name
    SAVE[name](saved, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert refused(path).startswith("damaged, or not ")


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n", b"hello world", b"\x80\x02.", b"<html>", bytes(range(256))]
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_another_file_is_no_weights(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith("damaged, or not ")


def test_files_that_are_not_there_are_said(tmp_path: Path) -> None:
    assert refused(tmp_path / "w.pt") == f"no such file (searched from {Path.cwd()})"
    assert refused(tmp_path) == "is a directory; name a file in it: it holds no weights"
    (tmp_path / "b.pth").touch()
    assert refused(tmp_path) == "is a directory; name a file in it: b.pth"


@pytest.mark.parametrize(
    "content, sentence",
    [
        ([torch.ones(2)], "holds no state_dict (tensors by name), but a list"),
        ({}, "holds no state_dict (tensors by name), but a dict"),
        (
            {"epoch": 3, "optim": {}},
            "holds no state_dict (tensors by name), but a dict with epoch, optim",
        ),
        ({1: torch.ones(2)}, "holds no state_dict (tensors by name), but a dict with 1"),
        (torch.ones(2), "holds no state_dict (tensors by name), but a Tensor"),
    ],
    ids=str,
)
def test_what_is_no_state_dict_is_said(content: object, sentence: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert refused(tmp_path / "w.pt") == sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    value: float, tmp_path: Path, saved: dict[str, Tensor]
) -> None:
    broken = {k: v.clone() for k, v in saved.items()}
    broken["1.running_var"][2] = value
    save_file(broken, tmp_path / "w.safetensors")
    assert refused(tmp_path / "w.safetensors").startswith("1.running_var holds NaN or infinity")


@pytest.mark.parametrize("network", [CNN, Mlp(), Mlp(hidden=()), Cnn5()], ids=lambda n: n.name)
def test_another_number_of_classes_is_said_so(network: Network, tmp_path: Path) -> None:
    module = network.build(SHAPE, 7)
    last = list(module.state_dict())[-2]
    torch.save(module.state_dict(), tmp_path / "w.pt")
    assert refused(tmp_path / "w.pt", network) == (
        f"the file's teacher has 7 classes ({last!r} is {list(module.state_dict()[last].shape)}) and the data has 10; "
        "it takes a teacher of these classes"
    )


def test_weights_of_another_network_are_refused_with_what_differs(
    tmp_path: Path, saved: dict[str, Tensor]
) -> None:
    path = tmp_path / "w.pt"
    torch.save(saved, path)
    assert refused(path, Mlp(hidden=())) == (
        "does not fit mlp for these images: it has 12 tensors (0.weight, 1.running_mean, "
        "1.running_var, ...) that the network has not; of another shape: 2 tensors (1.weight is [4], not [10, 64], "
        "1.bias is [4], not [10]). "
        "The file begins with 0.weight, 1.weight, 1.bias, and the network with 1.weight, 1.bias"
    )
    lacks = {k: v for k, v in saved.items() if not k.startswith("0.")}
    torch.save(lacks, tmp_path / "lacks.pt")
    assert refused(tmp_path / "lacks.pt").startswith(
        "does not fit cnn for these images: it lacks 1 tensor (0.weight). "
    )
    assert "of another shape: 6 tensors (0.weight is [4, 1, 3, 3], not [5, 1, 3, 3], " in refused(
        path, Cnn(widths=(5, 8))
    )
    torch.save({**saved, "1.running_var": saved["1.running_var"].long()}, path)
    assert refused(path) == "1.running_var is torch.int64, not torch.float32"


def test_a_file_with_two_networks_that_fit_is_refused(
    tmp_path: Path, saved: dict[str, Tensor]
) -> None:
    path = tmp_path / "w.pt"
    torch.save(
        {f"{part}.{k}": v for part in ("student", "teacher") for k, v in saved.items()}, path
    )
    assert (
        refused(path)
        == "holds 2 networks that fit ('student....', 'teacher....'); save the one alone"
    )
    torch.save({"a": saved, "b": saved}, path)
    assert refused(path) == "holds 2 networks that fit ('a: ...', 'b: ...'); save the one alone"


def test_a_wrapped_network_that_does_not_fit_is_named_by_its_first_keys(
    tmp_path: Path, saved: dict[str, Tensor]
) -> None:
    path = tmp_path / "w.pt"
    torch.save(
        {"net": {f"encoder.{k}": v for k, v in CNN.build(SHAPE, 7).state_dict().items()}}, path
    )
    assert refused(path).startswith("the file's teacher has 7 classes (")
    in_parts = {f"{'neck' if k < '4' else 'top'}.{k}": v for k, v in saved.items()}
    torch.save(in_parts, path)
    assert "The file begins with neck.0.weight, neck.1.weight, neck.1.bias, and" in refused(path)
    torch.save({f"layer{k}": v for k, v in saved.items()}, path)
    assert refused(path).endswith(
        "The file begins with layer0.weight, layer1.weight, layer1.bias, and the network with 0.weight, 1.weight, 1.bias"
    )


def test_large_image_weights_for_small_images_name_the_first_convolution(tmp_path: Path) -> None:
    torch.save(ResNet18().build((3, 224, 224), 10).state_dict(), tmp_path / "w.pt")
    assert "1 tensor (conv1.weight is [64, 3, 7, 7], not [64, 3, 3, 3])" in refused(
        tmp_path / "w.pt", ResNet18(), (3, 32, 32)
    )


def test_a_teacher_of_ours_is_for_the_data_it_was_trained_on(tmp_path: Path) -> None:
    run = TrainConfig(
        objective="ce", student=CNN, epochs=1, teacher={"model": CNN, "epochs": 1}, init="trained"
    )  # type: ignore[arg-type]
    teacher = run.teacher_run()
    assert teacher is not None
    train_teacher(teacher, tmp_path)
    path = teacher_folder(teacher, tmp_path) / "student.safetensors"
    other_split = Digits(split_seed=7, val_fraction=0)
    assert (
        load_outside(str(path), CNN, SHAPE, K, other_split).keys()
        == CNN.build(SHAPE, K).state_dict().keys()
    )
    assert (
        refused(path, data=Cifar10())
        == "was trained on digits, and the data here is cifar10; train one on it"
    )
    own = OwnData(path="a.b:c", shape=SHAPE, num_classes=K)
    assert "the data here is own (path a.b:c, num_classes 10, args {})" in refused(path, data=own)


@pytest.mark.parametrize(
    "about",
    ["", "[]", '{"config": 1}', '{"config": {"data": "x"}}', '{"name": "theirs"}', "[" * 10**5],
    ids=range(6),
)
def test_somebody_elses_teacher_json_says_nothing(
    about: str, tmp_path: Path, saved: dict[str, Tensor]
) -> None:
    (tmp_path / "teacher.json").write_text(about)
    torch.save(saved, tmp_path / "w.pt")
    load_outside(str(tmp_path / "w.pt"), CNN, SHAPE, K, Cifar100())
    (tmp_path / "teacher.json").write_text(
        json.dumps({"config": {"data": {"name": "mnist", "root": "x"}}})
    )
    assert "was trained on mnist" in refused(tmp_path / "w.pt", data=Cifar100())


# --- torchvision

LARGE = (3, 224, 224)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return torch's cache in an empty folder, without network."""

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    return tmp_path / "hub/checkpoints"


@pytest.mark.parametrize("weights", ["torchvision", "torchvision:IMAGENET1K_V1"])
def test_weights_of_torchvision_are_read_from_the_cache(weights: str, hub: Path) -> None:
    module = ShuffleNetV2().original(1000)
    torch.save(module.state_dict(), hub / "shufflenetv2_x1-5666bf0f80.pth")
    found = load_outside(weights, ShuffleNetV2(), LARGE, 1000)
    assert all(found[key].equal(value) for key, value in module.state_dict().items())


@pytest.mark.slow
def test_old_names_in_the_file_of_densenet_are_understood(hub: Path) -> None:
    module: nn.Module = DenseNet121().original(1000)
    old = {
        key.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.").replace("conv2.", "conv.2.")
        : value for key, value in module.state_dict().items() if "num_batches" not in key
    }  # fmt: skip
    torch.save(old, hub / "densenet121-a639ec97.pth")
    found = load_outside("torchvision", DenseNet121(), LARGE, 1000)
    assert all(found[key].equal(value) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    "weights, network, shape, num_classes, sentence",
    [
        ("torchvision", CNN, LARGE, 1000, "torchvision has no cnn; name a file"),
        ("torchvision", ResNeXt29(), LARGE, 1000, "torchvision has no resnext29; name a file"),
        ("torchvision", GoogLeNet(), LARGE, 1000, "googlenet's weights expect images with another mean and deviation"),
        ("torchvision", ResNet18(), LARGE, 10, "torchvision's teachers have the 1000 classes of ImageNet and the data has 10"),
        ("torchvision", ResNet18(), (3, 64, 64), 1000, "torchvision's are for images of 3 channels above 64 pixels; these"),
        ("torchvision", ResNet18(), (1, 224, 224), 1000, "torchvision's are for images of 3 channels above 64 pixels; these"),
        ("torchvision:IMAGENET1K_V9", ResNet18(), LARGE, 1000, "resnet18 has no weights 'IMAGENET1K_V9'; did you mean 'IMAGENET1K_V1'?"),
    ],
)  # fmt: skip
def test_what_torchvision_has_no_weights_for_is_said(
    weights: str, network: Network, shape: Any, num_classes: int, sentence: str
) -> None:
    assert refused(weights, network, shape, num_classes).startswith(sentence)


def test_without_a_network_the_place_for_the_file_is_said(hub: Path) -> None:
    assert refused("torchvision", ResNet18(), LARGE, 1000) == (
        "cannot be downloaded (<urlopen error no network here>); put "
        f"https://download.pytorch.org/models/resnet18-f37072fd.pth at {hub / 'resnet18-f37072fd.pth'}"
    )
    assert not list(hub.iterdir())


# --- how its images were prepared ------------------------------------------------------------------------------


def taken(
    storage: Path, model: Any, file: Path, data: dict[str, Any], **teacher: Any
) -> tuple[TrainConfig, nn.Module]:
    """Return (a student's configuration, its teacher from a file)."""
    tree = {
        "objective": "kd",
        "teacher": {"model": model, "weights": str(file), **teacher},
        "data": data,
    }
    config = validated(
        TrainConfig, {**tree, "student": {"name": "mlp", "hidden": [4]}, "precision": "fp32"}
    )
    bank = find_or_train(config, storage)
    assert bank is not None
    return config, bank.network()


INPUT = {"mean": [4.0], "std": [8.0], "size": 16}


def test_weights_from_elsewhere_see_images_as_they_were_trained_with(
    tmp_path: Path, saved: dict[str, Tensor]
) -> None:
    save_file(saved, tmp_path / "w.safetensors")
    data = {"name": "digits"}
    config, network = taken(
        tmp_path, CNN.model_dump(), tmp_path / "w.safetensors", data, input=INPUT
    )
    plain = CNN.build(SHAPE, K).eval()
    plain.load_state_dict(saved)
    images = config.data.load()[0].part(torch.arange(9)).images.float()  # type: ignore[union-attr]
    large = nn.functional.interpolate((images - 4) / 8, (16, 16), mode="bilinear", antialias=True)
    mean, std = Digits.mean[0], Digits.std[0]
    assert torch.allclose(network((images - mean) / std), plain(large), atol=1e-4)
    assert not torch.allclose(
        network((images - mean) / std), plain((images - mean) / std), atol=1e-2
    )
    assert network.state_dict().keys() == saved.keys()
    run = config.teacher_run()
    assert run is not None and describe(run, tmp_path)["input"] == INPUT
    _, usual = taken(tmp_path, CNN.model_dump(), tmp_path / "w.safetensors", data)
    assert usual((images - mean) / std).equal(plain((images - mean) / std)), (
        "of another file nothing is known"
    )
    other = config.model_copy(update={"teacher": config.teacher.model_copy(update={"input": None})})  # type: ignore[union-attr]
    banks = bank_of(config, tmp_path), bank_of(other, tmp_path)
    assert banks[0] is not None and banks[1] is not None and banks[0]._of != banks[1]._of


def test_what_torchvision_and_timm_trained_with_is_known() -> None:
    data = {
        "name": "image_folder",
        "root": "/images",
        "num_classes": 1000,
        "mean": [9, 9, 9],
        "std": [9, 9, 9],
    }

    def shown(model: Any, weights: str, **more: Any) -> Any:
        tree = {
            "objective": "kd",
            "teacher": {"model": model, "weights": weights},
            "data": {**data, **more},
        }
        run = validated(TrainConfig, tree).teacher_run()
        assert run is not None
        return run.shown

    usual = ((0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255), 224)
    found = shown("resnet18", "torchvision", image_size=96)
    assert (found.mean, found.std, found.size) == usual
    assert shown("resnet18", "/w.pt") is None
    vit = shown("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", "/w.pt", image_size=96)
    assert vit.mean == (127.5,) * 3 and vit.std == (127.5,) * 3 and vit.size == 224
    assert shown({"name": "timm", "model": "resnet18"}, "/w.pt", image_size=32) is None, (
        "with another stem"
    )


def test_a_file_of_ours_sees_images_as_its_own_data_had_them(tmp_path: Path) -> None:
    module = "import numpy as np\ndef make(split):\n    return np.arange(640, dtype=np.uint16).astype(np.uint8)"
    name = f"ours_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(module + ".reshape(10, 1, 8, 8), np.arange(10) % 2\n")
    data = {"name": "own", "path": f"{name}:make", "shape": [1, 8, 8], "num_classes": 2}
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(tmp_path))
        first = {**data, "mean": [10], "std": [20], "val_fraction": 0.5}
        run = validated(TeacherRun, {"objective": "ce", "student": CNN, "data": first, "epochs": 1})
        train_teacher(run, tmp_path)
        file = teacher_folder(run, tmp_path) / "student.safetensors"
        config, _ = taken(
            tmp_path / "b", CNN.model_dump(), file, {**first, "mean": [30], "std": [40]}
        )
        made = config.teacher_run()
        assert made is not None and describe(made, tmp_path / "b")["input"] == {
            "mean": [10],
            "std": [20],
            "size": None,
        }


@pytest.mark.parametrize(
    "teacher, sentence",
    [
        ({"model": "cnn", "input": INPUT}, "teacher.input: is for teacher.weights"),
        ({"model": "cnn", "weights": "/w", "input": {"mean": [1, 2, 3], "std": [1]}}, "teacher.input.mean: 3 values for 1 channels"),
        ({"model": "cnn", "weights": "/w", "input": {"mean": [0.4], "std": [0.2]}}, "teacher.input.std.0: should be at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_input_gets_a_sentence(teacher: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        validated(TrainConfig, {"objective": "kd", "teacher": teacher})
    assert sentence in str(error.value)
