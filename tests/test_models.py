# ruff: noqa: NPY002  (the generator that other people's networks draw from)
"""Networks: shapes, settings, parameters, sentences."""

import copy
import itertools
import math
import os
import random
import re
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import long_after
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tfkd_ray.learn.checkpoint import load_weights, save_weights
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.evaluate import evaluate
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.models import (
    AlexNet,
    AlexNetSmall,
    Cnn,
    Cnn5,
    DenseNet121,
    GoogLeNet,
    Mlp,
    MobileNetV2,
    Model,
    Network,
    OwnNetwork,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNeXt29,
    ResNeXt50,
    ResNeXt101,
    ShuffleNetV2,
    Timm,
    Vgg16,
    Vgg19,
    WideResNet,
    may_lack_gradients,
)
from tfkd_ray.learn.teachers import load_teacher, train_teacher
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated

ALL: list[type[Network]] = [
    n for n in typing.get_args(typing.get_args(Model)[0]) if n not in (Timm, OwnNetwork)
]
VGG = (Vgg16, Vgg19)
LIGHT = [n for n in ALL if n not in (*VGG, ResNeXt101, AlexNet)]


def name_of(network: type[Network]) -> str:
    return str(network.model_fields["name"].default)


def shapes_only(network: Network, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the network on the meta device, which computes only shapes: large ones are cheap."""
    with torch.device("meta"):
        return network.build(shape, num_classes).eval()


def count(network: Network, shape: tuple[int, int, int], num_classes: int) -> int:
    return sum(p.numel() for p in shapes_only(network, shape, num_classes).parameters())


@pytest.mark.parametrize(
    "network", [Mlp(), Mlp(hidden=()), Mlp(hidden=(8, 8), dropout=0.5), Cnn(), Cnn(widths=(4,))]
)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_networks_map_images_to_logits(network: Network, shape: tuple[int, int, int]) -> None:
    assert network.build(shape, 7)(torch.randn(2, *shape)).shape == (2, 7)


SMALL, LARGE = (1, 28, 28), (3, 224, 224)  # a new stem and a new first convolution, and neither
EACH = [
    (n, s) for n in ALL for s in ((1, 32, 32) if n in VGG else SMALL, LARGE)
]  # VGG begins at 32x32


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, shape", EACH, ids=lambda v: name_of(v) if isinstance(v, type) else str(v)
)
def test_every_network_takes_every_shape_of_image(
    network: type[Network], shape: tuple[int, int, int]
) -> None:
    with torch.no_grad():
        assert shapes_only(network(), shape, 7)(torch.empty(2, *shape, device="meta")).shape == (
            2,
            7,
        )


@pytest.mark.parametrize("network", long_after(0, LIGHT), ids=name_of)
@pytest.mark.slow
def test_a_training_step_reaches_every_parameter(network: type[Network]) -> None:
    torch.manual_seed(0)
    module = network().build((1, 8, 8), 7)
    logits = module(torch.randn(3, 1, 8, 8))
    logits.square().sum().backward()
    assert logits.isfinite().all() and logits.std() > 0
    for path, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path


def test_parameters_are_counted_by_hand() -> None:
    assert count(Mlp(hidden=(64,)), (1, 8, 8), 10) == 64 * 64 + 64 + 64 * 10 + 10
    assert (
        count(Cnn(widths=(16, 32)), (1, 8, 8), 10)
        == 16 * 9 + 2 * 16 + 32 * 16 * 9 + 2 * 32 + 32 * 10 + 10
    )
    wide = count(Cnn5(width=2), (1, 8, 8), 10)
    convolutions = 9 * (64 + 64 * 128 + 128 * 256) + 3 * (64 + 128 + 256)
    assert wide == convolutions + (256 + 3) * 256 + 256 * 10 + 10


# (network, parameters of the Tf-KD authors' at K = 100 and 32x32, ours less theirs); the docstrings say why
@pytest.mark.parametrize(
    "network, theirs, more",
    [
        (Cnn5(), 369_124, 0),
        (ResNet18(), 11_220_132, 0),
        (ResNet50(), 23_705_252, 0),
        (ResNet101(), 42_697_380, 0),
        (ResNeXt29(), 34_518_948, 0),
        (DenseNet121(), 7_048_548, 128),
        (ShuffleNetV2(), 1_360_896, -4_792),
        (MobileNetV2(), 2_369_380, -17_408),
        (GoogLeNet(), 6_258_500, -563_776),
        (AlexNetSmall(), 2_495_396, 0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_networks_of_the_paper_have_its_parameters(
    network: Network, theirs: int, more: int
) -> None:
    assert count(network, (3, 32, 32), 100) == theirs + more


# at K = 200, as for Tiny-ImageNet
@pytest.mark.parametrize(
    "network, theirs, more",
    [
        (MobileNetV2(), 2_497_480, -17_408),
        (ShuffleNetV2(), 1_463_396, -4_792),
        (DenseNet121(), 7_151_048, 128),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_more_classes_add_what_they_add_in_the_paper(
    network: Network, theirs: int, more: int
) -> None:
    assert count(network, (3, 64, 64), 200) == theirs + more


def test_vgg19_has_as_many_parameters_as_the_paper_rounds_to() -> None:
    assert [round(count(Vgg19(), (3, 32, 32), k) / 1e6, 2) for k in (10, 100)] == [139.62, 139.99]


@pytest.mark.parametrize(
    "network, num_classes, parameters",
    [
        (Cnn5(), 10, 357_514),
        (AlexNetSmall(), 10, 2_472_266),
        (ResNet18(), 10, 11_173_962),
        (WideResNet(depth=28, width=10), 10, 36_479_194),
        (WideResNet(depth=40, width=2), 100, 2_255_156),
        (WideResNet(depth=16, width=2), 100, 703_284),
    ],
)
def test_parameters_are_those_of_the_literature(
    network: Network, num_classes: int, parameters: int
) -> None:
    assert count(network, (3, 32, 32), num_classes) == parameters


# torchvision's own counts at K = 1000, from its table of weights
@pytest.mark.parametrize(
    "network, parameters",
    [
        (ResNet18, 11_689_512), (ResNet34, 21_797_672), (ResNet50, 25_557_032), (ResNet101, 44_549_160),
        (ResNeXt50, 25_028_904), (ResNeXt101, 88_791_336), (MobileNetV2, 3_504_872), (ShuffleNetV2, 2_278_604),
        (GoogLeNet, 6_624_904), (DenseNet121, 7_978_856), (Vgg16, 138_365_992), (Vgg19, 143_678_248),
        (AlexNet, 61_100_840),
    ],
)  # fmt: skip
def test_large_images_keep_the_network_of_torchvision(
    network: type[Network], parameters: int
) -> None:
    assert count(network(), (3, 224, 224), 1000) == parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, small, large",
    [
        (ResNet50, 32, 8), (ResNeXt29, 32, 8), (MobileNetV2, 32, 16), (ShuffleNetV2, 32, 8), (GoogLeNet, 32, 4),
        (DenseNet121, 32, 8), (WideResNet, 32, 32),
    ],
)  # fmt: skip
def test_small_images_are_not_halved_by_the_stem(
    network: type[Network], small: int, large: int
) -> None:
    """`small` and `large`: input side of the first 3x3 convolution after the stem for 32 pixels."""

    def side(size: int) -> int:
        seen: list[int] = []
        module = shapes_only(network(), (3, size, size), 7)
        convolutions = [
            m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
        ]
        # GoogLeNet's stem has another 3x3
        first = [m for m in convolutions if m.in_channels != 3][1 if network is GoogLeNet else 0]
        first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
        module(torch.empty(2, 3, size, size, device="meta"))
        return seen[0]

    assert side(32) == small
    assert side(96) == 3 * large


def test_a_cnn5_of_the_papers_width_keeps_the_name_that_its_results_had_before_it_had_one() -> None:
    assert Cnn5().content() == {"name": "cnn5"}
    assert Cnn5(width=2).content() == {"name": "cnn5", "width": 2}


def test_too_many_stages_for_a_small_image_are_refused() -> None:
    with pytest.raises(ValueError, match="widths: 5 stages halve a 8x8 image to nothing"):
        Cnn(widths=(1, 1, 1, 1, 1)).build((1, 8, 8), 10)


@pytest.mark.parametrize(
    "network, shape, sentence",
    [
        (Vgg16(), (1, 28, 28), "name: vgg16_bn needs images of 32x32 or more, these are 28x28"),
        (ResNet18(), (3, 32, 7), "name: resnet18 needs images of 8x8 or more, these are 32x7"),
        (Cnn5(), (1, 4, 4), "name: cnn5 needs images of 8x8 or more, these are 4x4"),
    ],
)
def test_images_too_small_for_a_network_are_refused(
    network: Network, shape: tuple[int, int, int], sentence: str
) -> None:
    for refuse in (lambda: network.check(shape), lambda: network.build(shape, 10)):
        with pytest.raises(ValueError, match=sentence):
            refuse()


@pytest.mark.parametrize(
    "student, sentence",
    [
        ("resnet", "student: no such name 'resnet'; did you mean 'resnet50'?"),
        ("vgg16_bn", "student.name: vgg16_bn needs images of 32x32 or more, these are 8x8"),
        (
            {"name": "wide_resnet", "depth": 15},
            "student.wide_resnet.depth: must be 6n + 4 (10, 16, 22, 28, 34, 40, ...), got 15",
        ),
        ({"name": "resnet18", "depth": 15}, "student.resnet18.depth: no such setting; known: name"),
    ],
)
def test_wrong_networks_get_a_sentence(student: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        validated(TrainConfig, {"objective": "ce", "student": student})
    assert error.value.problems == [sentence]


@pytest.mark.parametrize("network", ALL, ids=name_of)
def test_a_name_is_all_that_a_network_needs(network: type[Network]) -> None:
    tree = {"objective": "kd", "teacher": {"model": "mlp"}, "student": name_of(network)}
    if network in VGG:
        network().check((3, 32, 32))
    else:
        assert validated(TrainConfig, tree).student == network()


def test_importing_the_networks_does_not_import_torchvision() -> None:
    code = "import sys, tfkd_ray.learn.models; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- networks from elsewhere


def model(given: object) -> Any:
    return TypeAdapter(Model).validate_python(given)


def refused(student: object) -> str:
    with pytest.raises(ConfigError) as error:
        validated(TrainConfig, {"objective": "ce", "student": student})
    return str(error.value)


@pytest.mark.parametrize(
    "short, network",
    [
        ("mlp", Mlp()),
        ("timm:resnet10t", Timm(model="resnet10t")),
        ("my.nets:small", OwnNetwork(path="my.nets:small")),
        (
            {"name": "timm:resnet10t", "args": {"drop_rate": 0.1}},
            Timm(model="resnet10t", args={"drop_rate": 0.1}),
        ),
        (
            {"name": "my.nets:small", "args": {"width": 3}},
            OwnNetwork(path="my.nets:small", args={"width": 3}),
        ),
    ],
)
def test_a_name_stands_for_settings(short: object, network: Network) -> None:
    assert model(short) == network
    assert model(network.model_dump(mode="json")) == network


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, args, halves",
    [
        ("resnet10t", {}, True),  # its stem has three convolutions
        ("mobilenetv3_small_050", {}, True),
        ("convnext_atto", {}, False),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "depth": 1}, False),
    ],
)
def test_timm_networks_keep_small_images_large(
    name: str, args: dict[str, Any], halves: bool
) -> None:
    images = torch.randn(2, 1, 32, 32)
    for stem in ("small", "timm"):
        network = Timm(model=name, args=args, stem=stem).build(images.shape[1:], 7)
        assert network(images).shape == (2, 7) and network.training
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        assert (first.stride[0] == 1) == (halves and stem == "small")
        if hasattr(network, "maxpool"):
            assert isinstance(network.maxpool, nn.Identity) == (stem == "small")


def test_timm_networks_for_large_images_are_those_of_timm() -> None:
    assert count(Timm(model="resnet18"), (3, 224, 224), 1000) == 11_689_512


@pytest.mark.parametrize(
    "student, sentence",
    [
        ("timm:resnet19", "student.model: timm .* has no model 'resnet19'; did you mean 'resnet"),
        ("timm:", "student.model: timm .* has no model ''; timm.list_models"),
        ("timm:hf-hub:a/b", "has no model 'hf-hub:a/b'"),  # which timm would get from the internet
        (
            {"name": "timm", "model": "resnet18", "args": {"pretrained": True}},
            "student.args.pretrained: not for you to",
        ),
        ("nets", "student: no such name 'nets'; known: .*own, .*timm"),
        ("nowhere.nets:small", "student.path: nowhere.nets:small: there is no module 'nowhere'"),
        (
            "torch.nn:Linaer",
            "student.path: torch.nn:Linaer: torch.nn has no 'Linaer'; did you mean 'Linear'?",
        ),
        ("torch:__version__", "student.path: torch:__version__ is .*, not a function"),
        (
            "torch.nn:Linear",
            "student.args: torch.nn:Linear is called with shape, num_classes and these: ",
        ),
        (
            {"name": "own", "path": f"{__name__}:small", "args": {"widht": 3}},
            "unexpected keyword argument 'widht'",
        ),
    ],
)
def test_wrong_networks_from_elsewhere_are_refused_before_anything_runs(
    student: object, sentence: str
) -> None:
    assert re.search(sentence, refused(student))


def test_a_missing_timm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert (
        refused("timm:resnet18")
        == "student.name: timm is not installed here: pip install 'tfkd_ray[timm]'"
    )


class Logits(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Out:
    out: Tensor


OUTPUTS: dict[str, Any] = {
    "tensor": lambda x: x,
    "dict with logits": lambda x: {"features": x[:0], "logits": x},
    "dict with out": lambda x: {"out": x, "aux": x[:0]},
    "named tuple": lambda x: Logits(x, x[:0]),
    "dataclass": Out,
    "tuple": lambda x: (x, x[:0]),
    "list": lambda x: [x, None],
    "only in training": lambda x: x if not torch.is_grad_enabled() else (x, x),
    "transposed": lambda x: x.T,
    "features": lambda x: x[:, :3],
    "map": lambda x: x[..., None],
    "dict without": lambda x: {"predictions": x},
    "nothing": lambda x: None,
    "not finite": lambda x: x * float("nan"),
}


class Small(nn.Module):
    def __init__(
        self, shape: tuple[int, int, int], num_classes: int, width: int, output: str
    ) -> None:
        super().__init__()
        self.output = output
        self.norm = nn.BatchNorm2d(shape[0])
        self.hidden = nn.Linear(math.prod(shape), width)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(width, num_classes)

    def logits(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(F.relu(self.hidden(self.norm(x).flatten(1)))))

    def forward(self, x: Tensor) -> Any:
        return OUTPUTS[self.output](self.logits(x))


def small(
    shape: tuple[int, int, int], num_classes: int, width: int = 4, output: str = "tensor"
) -> nn.Module:
    return Small(shape, num_classes, width, output)


def broken(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    raise KeyError("width")


def no_module(shape: tuple[int, int, int], num_classes: int) -> str:
    return "a network"


def own(output: str) -> OwnNetwork:
    return OwnNetwork(path=f"{__name__}:small", args={"output": output})


RIGHT = list(OUTPUTS)[:8]


@pytest.mark.parametrize("output", RIGHT)
def test_a_network_of_your_own_gives_its_logits_alone(output: str) -> None:
    module = own(output).build((1, 8, 8), 10)
    assert isinstance(module, Small)
    x = torch.randn(3, 1, 8, 8)
    for network in (module, copy.deepcopy(module)):
        torch.manual_seed(0)
        logits = network(x)
        torch.manual_seed(0)
        assert logits.requires_grad and logits.equal(module.logits(x))
    assert module.state_dict().keys() == small((1, 8, 8), 10).state_dict().keys()


class Odd(nn.Module):
    """Unusual but valid networks; `kind` selects one."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, features = kind, 0, math.prod(shape)
        weight = {"numpy": lambda: np.random.randn(features, num_classes), "random": lambda: [
            [random.gauss(0, 1) for _ in range(num_classes)] for _ in range(features)
        ]}.get(kind, lambda: torch.zeros(features, num_classes))()  # fmt: skip
        self.kept = torch.as_tensor(weight, dtype=torch.float32) / 20  # in no state_dict
        self.last, self.other, self.never = (nn.Linear(features, num_classes) for _ in range(3))
        self.norm = nn.BatchNorm1d(num_classes)
        if kind == "frozen":
            self.requires_grad_(False)
        if kind == "complex":
            self.phases = nn.Parameter(torch.ones(num_classes, dtype=torch.complex64))
        if kind == "sparse":
            self.levels = nn.Embedding(16, num_classes, sparse=True)

    def forward(self, x: Tensor) -> Any:
        x = x.flatten(1)
        self.calls += self.training
        logits = self.last(x) + x @ self.kept
        if self.kind == "later" and self.calls > 3:
            logits = logits + self.other(x)
        if self.kind == "by chance" and self.training and random.random() < 0.5:
            logits = logits + self.other(x)
        if self.kind == "auxiliary" and self.training:
            return logits, self.other(x)
        if self.kind in ("softmax", "log_softmax", "sigmoid"):
            return {"softmax": F.softmax, "log_softmax": F.log_softmax}.get(
                self.kind, lambda z, dim: z.sigmoid()
            )(logits, dim=1)
        if self.kind == "norm":
            logits = self.norm(logits)
        if self.kind == "complex":
            logits = logits + self.phases.real
        if self.kind == "sparse":
            logits = logits + self.levels(x[:, 20].abs().long().clamp(max=15))
        return logits.detach() if self.kind == "detached" else logits


def odd(shape: tuple[int, int, int], num_classes: int, kind: str) -> nn.Module:
    return Odd(shape, num_classes, kind)


def run_of(kind: str, **changes: Any) -> TrainConfig:
    student = {"name": "own", "path": f"{__name__}:odd", "args": {"kind": kind}}
    return validated(TrainConfig, {"objective": "ce", "student": student, "epochs": 2, **changes})


@pytest.mark.parametrize("kind", ["later", "by chance", "auxiliary"])
def test_a_parameter_may_lack_a_gradient_in_some_steps_or_all(kind: str) -> None:
    last = list(train(run_of(kind)))[-1]
    fresh, state = run_of(kind).build_student().state_dict(), last.state()["model"]
    assert last.metrics["val_accuracy"] > 0.8 and state["never.weight"].equal(fresh["never.weight"])
    assert state["other.weight"].equal(fresh["other.weight"]) == (kind == "auxiliary")


def test_a_network_with_complex_parameters_trains_and_is_kept(tmp_path: Path) -> None:
    fresh, last = run_of("complex").build_student().state_dict(), list(train(run_of("complex")))[-1]
    state = last.state()["model"]
    assert last.metrics["val_accuracy"] > 0.8 and not state["phases"].equal(fresh["phases"])
    save_weights(tmp_path / "w.safetensors", state, {})
    assert load_weights(tmp_path / "w.safetensors")["phases"].equal(state["phases"])


def test_an_embedding_with_sparse_gradients_is_refused_with_the_way_out() -> None:
    for act in (run_of("sparse").try_own_code, lambda: next(train(run_of("sparse")))):
        with pytest.raises(ConfigError, match=r"levels has sparse=True, .* leave it out"):
            act()


_calls = 0


class Deciding(nn.Module):
    """A network whose second layer may be unused in a step; `kind` selects the condition."""

    of_all = 0

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.counts, self.iterator, self.plain = {"all": [0]}, itertools.count(), torch.zeros(())
        self.first, self.second, self.drop = nn.Linear(64, 64), nn.Linear(64, 10), nn.Dropout(0.5)
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x.flatten(1))))
        self.calls += self.kind == "a count"
        self.steps += self.kind == "a buffer"  # type: ignore[operator]
        self.counts["all"][0] += self.kind == "a list"
        self.plain += self.kind == "a tensor"
        type(self).of_all += self.kind == "a class"
        globals()["_calls"] += self.kind == "a Python module"
        if self.kind == "an iterator":
            next(self.iterator)
        used = {
            "Python's numbers": lambda: random.random() < 0.999,
            "numpy's numbers": lambda: np.random.rand() < 0.999,
            "torch's numbers": lambda: torch.rand(()).item() < 0.999,
            "values": lambda: x.mean() < 100,
            "a count": lambda: self.calls < 100,
            "training": lambda: not self.training,
        }.get(self.kind, lambda: True)()
        if self.kind == "random noise":
            x = x + torch.randn_like(x)
        if self.kind == "no such shape":
            x = x.view(3, -1)
        return self.head(x) + self.second(x) if used else self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "may"),
    [("nothing", False)]
    + [(f"{whose} numbers", True) for whose in ("Python's", "numpy's", "torch's")]
    + [
        (kind, True)
        for kind in ("values", "a count", "a buffer", "training", "random noise", "no such shape")
    ]
    + [
        (kind, True) for kind in ("a list", "an iterator", "a tensor", "a class", "a Python module")
    ],
)
def test_a_network_that_may_leave_a_parameter_out_in_some_step_is_known(
    kind: str, may: bool
) -> None:
    network, position = Deciding(kind), (random.getstate(), torch.get_rng_state().tolist())
    before = copy.deepcopy(network)
    assert may_lack_gradients(network, (1, 8, 8)) == may
    assert network.calls == 0 and all(p.grad is None for p in network.parameters())
    assert (random.getstate(), torch.get_rng_state().tolist()) == position
    assert all(value.equal(before.state_dict()[key]) for key, value in network.state_dict().items())


def test_timms_stochastic_depth_leaves_no_parameter_without_a_gradient() -> None:
    network = Timm(model="test_vit2", args={"img_size": 32, "patch_size": 4, "drop_path_rate": 0.5})
    assert not may_lack_gradients(network.build((3, 32, 32), 10), (3, 32, 32))


@pytest.mark.parametrize("kind", ["numpy", "random", "by chance"])
def test_the_same_run_gives_the_same_numbers_whatever_its_network_draws_from(
    kind: str, tmp_path: Path
) -> None:
    found = []
    for other in range(2):
        np.random.seed(other)
        random.seed(other)
        before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        epochs = train(run_of(kind))
        metrics = next(epochs).metrics
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before, (
            "and they are put back"
        )  # type: ignore[index]
        found.append((metrics["train_loss"], next(epochs).metrics["val_nll"]))
    assert found[0] == found[1]
    assert next(train(run_of(kind, seed=1))).metrics["train_loss"] != found[0][0]


def test_a_teacher_that_is_loaded_has_what_its_code_drew_when_it_was_trained(
    tmp_path: Path,
) -> None:
    """The network keeps random numbers outside its state_dict."""
    run = run_of(
        "numpy", objective="tfkd_self", teacher={"epochs": 3, "labels": "bank"}
    ).teacher_run()
    assert run is not None
    accuracy = train_teacher(run, tmp_path)["metrics"]["val_accuracy"]
    np.random.seed(9)
    val_set = run.data.load()[1]
    assert (
        val_set is not None
        and evaluate(load_teacher(run, tmp_path), run.data, val_set)["val_accuracy"] == accuracy
    )


GENERATORS = {
    "numpy": lambda: torch.from_numpy(np.random.default_rng().normal(size=(10, 64))),
    "random": lambda: torch.full((10, 64), random.Random().random()),
    "torch": lambda: torch.randn(10, 64, generator=torch.Generator().manual_seed(os.getpid() + next(CALLS))),
    "system": lambda: torch.full((10, 64), random.SystemRandom().random()),
    "seeded": lambda: torch.from_numpy(np.random.default_rng(0).normal(size=(10, 64))),
    "global": lambda: torch.from_numpy(np.random.normal(size=(10, 64))),
}  # fmt: skip
CALLS = itertools.count()


def own_generator(shape: tuple[int, int, int], num_classes: int, kind: str, kept: str) -> nn.Module:
    head = nn.Linear(64, num_classes)
    drawn = GENERATORS[kind]().float() / 8
    if kept == "weights":
        head.weight.data = drawn
        return nn.Sequential(nn.Flatten(), head)
    head.register_buffer("constants", drawn, persistent=False)
    head.register_forward_hook(
        lambda module, given, found: found + given[0] @ module.constants.T  # type: ignore[union-attr,operator]
    )
    return nn.Sequential(nn.Flatten(), head)


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("kept", ["weights", "constants"])
def test_a_network_that_differs_each_time_it_is_built_is_told(kind: str, kept: str) -> None:
    args = {"kind": kind, "kept": kept}
    student = {"name": "own", "path": f"{__name__}:own_generator", "args": args}
    run = validated(TrainConfig, {"objective": "ce", "student": student})
    if kind in ("seeded", "global"):
        assert run.try_own_code() == []
    elif kept == "constants":
        with pytest.raises(ConfigError, match="with the same weights it gives other logits"):
            run.try_own_code()
    else:
        (note,) = run.try_own_code()
        assert "starts with other weights each time it is built" in note


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("frozen", "no parameter learns \\(all .* have requires_grad False\\)"),
        ("detached", "do not depend on any trainable parameter"),
    ],
)
def test_a_network_in_which_nothing_learns_is_refused(kind: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"model {__name__}:odd: .*{sentence}"):
        list(train(run_of(kind)))
    if kind == "frozen":
        with pytest.raises(ConfigError, match=sentence):
            run_of(kind).try_own_code()


@pytest.mark.parametrize(
    "student", [{"name": "own", "path": f"{__name__}:odd", "args": {"kind": "norm"}}, "cnn5"]
)
def test_batches_of_one_image_are_refused_where_batch_norm_cannot_take_them(student: Any) -> None:
    run = validated(
        TrainConfig,
        {"objective": "ce", "student": student, "epochs": 1, "optim": {"batch_size": 1}},
    )
    for act in (run.try_own_code, lambda: next(train(run))):
        with pytest.raises(
            ConfigError,
            match=r"optim.batch_size: leaves a single image a worker .* BatchNorm of model",
        ):
            act()
    two = validated(
        TrainConfig,
        {"objective": "ce", "student": student, "optim": {"batch_size": 3}, "workers": 2},
    )
    with pytest.raises(ConfigError, match="2 times workers"):
        two.try_own_code()


class Lonely(nn.Module):
    """Normalises by its own call of batch_norm, or drops the dimension of a lone image."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.kind == "function" and self.training:
            x = nn.functional.batch_norm(x, None, None, training=True)
        if self.kind == "fails" and len(x) == 1:
            raise KeyError("a lone image")
        logits: Tensor = self.head(x)
        return logits.squeeze() if self.kind == "squeeze" else logits


def lonely(shape: tuple[int, int, int], num_classes: int, kind: str) -> nn.Module:
    return Lonely(kind)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("function", "optim.batch_size: leaves a single image a worker in a step, and BatchNorm"),
        (
            "fails",
            r"optim.batch_size: leaves a single image .* fails on it \(KeyError: 'a lone image'",
        ),
        ("squeeze", r"gives \[10\] for images \[1, 1, 8, 8\]; logits of 10 classes are \[1, 10\]"),
    ],
)
def test_a_network_that_cannot_take_one_image_is_refused_where_a_step_has_one(
    kind: str, sentence: str
) -> None:
    student = {"name": "own", "path": f"{__name__}:lonely", "args": {"kind": kind}}
    tree = {"objective": "ce", "student": student, "epochs": 1}
    alone = validated(TrainConfig, {**tree, "optim": {"batch_size": 1}})
    for act in (alone.try_own_code, lambda: next(train(alone))):
        with pytest.raises(ConfigError, match=sentence):
            act()
    validated(TrainConfig, {**tree, "optim": {"batch_size": 2}}).try_own_code()


@pytest.mark.parametrize("kind", ["softmax", "log_softmax", "sigmoid", "norm"])
def test_a_network_that_ends_in_softmax_is_noted_when_it_is_tried(kind: str) -> None:
    notes = run_of(kind).try_own_code()
    assert len(notes) == (kind in ("softmax", "sigmoid"))
    assert all(f"It seems to end in {kind}" in note for note in notes)
    teacher = {"model": {"name": "own", "path": f"{__name__}:odd", "args": {"kind": kind}}}
    run = validated(TrainConfig, {"objective": "kd", "teacher": teacher})
    assert run.try_own_code() == notes


def test_trying_a_network_changes_neither_it_nor_the_random_numbers() -> None:
    torch.manual_seed(0)
    module = own("tuple").build((1, 8, 8), 10)
    after = torch.rand(1)
    torch.manual_seed(0)
    plain = small((1, 8, 8), 10)
    assert after == torch.rand(1)
    assert all(m.training for m in module.modules())
    assert all(value.equal(plain.state_dict()[key]) for key, value in module.state_dict().items())


def test_the_logits_are_alone_behind_data_parallel_workers_too(tmp_path: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        module = own("named tuple").build((1, 8, 8), 10)
        logits = DistributedDataParallel(module)(torch.randn(3, 1, 8, 8))
        logits.sum().backward()
        assert logits.shape == (3, 10) and all(p.grad is not None for p in module.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "path, args, sentence",
    [
        (
            "small",
            {"output": "transposed"},
            "gives [10, 2] for images [2, 1, 8, 8]; logits of 10 classes are [2, 10]",
        ),
        ("small", {"output": "features"}, "gives [2, 3] for images"),
        ("small", {"output": "map"}, "gives [2, 10, 1] for images"),
        ("small", {"output": "dict without"}, "gives dict without a tensor of them for images"),
        ("small", {"output": "nothing"}, "gives NoneType without a tensor of them for images"),
        (
            "small",
            {"output": "not finite"},
            "gives logits that are not finite numbers for images [2, 1, 8, 8] of zeros",
        ),
        (
            "small",
            {"output": "unheard-of"},
            "KeyError when given images [2, 1, 8, 8]: 'unheard-of'",
        ),
        (
            "small",
            {"width": -1},
            "RuntimeError when being built for images [1, 8, 8] and 10 classes: ",
        ),
        ("broken", {}, "KeyError when being built for images [1, 8, 8] and 10 classes: 'width'"),
        ("no_module", {}, "gives str; a network is a torch.nn.Module"),
    ],
)
def test_a_network_that_does_not_work_is_named_when_it_is_built(
    path: str, args: Any, sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        OwnNetwork(path=f"{__name__}:{path}", args=args).build((1, 8, 8), 10)
    assert str(error.value).startswith(f"model {__name__}:{path}: {sentence}")


def test_a_timm_network_for_other_images_is_refused_when_it_is_built() -> None:
    with pytest.raises(
        ConfigError,
        match=r"model timm:test_vit2: AssertionError when given images \[2, 3, 32, 32\]: ",
    ):
        Timm(model="test_vit2", args={"dynamic_img_size": False}).build((3, 32, 32), 10)


def test_a_network_of_your_own_learns_and_teaches() -> None:
    tree = {
        "objective": "kd", "epochs": 2, "student": f"{__name__}:small", "data": {"name": "digits", "subset": 300},
        "teacher": {"model": {"name": f"{__name__}:small", "args": {"output": "dict with logits"}}},
    }  # fmt: skip
    config = validated(TrainConfig, tree)
    teacher = own("dict with logits").build((1, 8, 8), 10)
    losses = [epoch.metrics["train_loss"] for epoch in train(config, teacher=teacher)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    "order", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"]
)
def test_the_gradient_of_cnn_s_pooling_has_the_order_of_what_is_pooled(
    order: torch.memory_format,
) -> None:
    """Otherwise ReLU's backward pass takes 20 times as long; its numbers are torch's own."""
    x = torch.randn(4, 8, 6, 6).to(memory_format=order).requires_grad_()
    network = Cnn(widths=(8,)).build((3, 6, 6), 10)
    orders, gradients = [], []
    for pool in (
        next(m for m in network if isinstance(m, torch.nn.AdaptiveAvgPool2d)),
        torch.nn.AdaptiveAvgPool2d(1),
    ):
        inner = x * 1
        out = pool(inner)
        inner.register_hook(
            lambda g: orders.append(g.is_contiguous(memory_format=order))
        )  # after the pooling's own
        out.pow(2).sum().backward()
        gradients.append(x.grad)
        x.grad = None
    assert orders[0] and gradients[0].equal(gradients[1])
    assert order == torch.contiguous_format or not orders[1], "torch does it itself now"


@pytest.mark.parametrize(
    "network", [{"name": "own", "path": "a:b"}, {"name": "timm", "model": "x"}]
)
def test_networks_with_arguments_can_be_keys(network: dict[str, Any]) -> None:
    one, same, other = (
        TypeAdapter(Model).validate_python({**network, "args": {"a": [value]}})
        for value in (1, 1, 2)
    )
    assert {one: 1}[same] == 1 and other not in {one: 1}
