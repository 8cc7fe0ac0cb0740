"""External weights for a network: a user's file, or torchvision's weights for ImageNet.

Reading a file runs nothing that it holds. The result fits the network, or a ConfigError gives the
reason.
"""

import contextlib
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tfkd_ray.learn.checkpoint import check_torch
from tfkd_ray.learn.config import TeacherInput, TeacherRun
from tfkd_ray.learn.dataset import Dataset
from tfkd_ray.learn.models import SMALL_IMAGE, Network, TorchvisionNetwork
from tfkd_ray.settings.errors import ConfigError, did_you_mean
from tfkd_ray.settings.files import expanded, opened, read_at_most
from tfkd_ray.store.experiment import MOST_JSON_BYTES, parse_json, read_teacher

Weights = dict[str, Tensor]
"""A state_dict, on the CPU."""

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "module",
    "params",
    "weights",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "params_ema",
    "ema_params",
    "ema",
)
"""Keys under which training scripts keep the state_dict in a checkpoint; the first that fits is
used."""
WRAPPED = r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)"
"""Prefixes that torch.compile and other wrappers insert into a network's names."""
OLD_DENSENET = r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"
"""Names in torchvision's DenseNet files, with one dot more than in its networks."""


def load_outside(
    weights: str,
    model: Network,
    shape: tuple[int, int, int],
    num_classes: int,
    data: Dataset | None = None,
) -> Weights:
    """Return a state_dict that fits `model.build(shape, num_classes)`.

    Args:
        weights: a file (safetensors or a torch state_dict), `torchvision`, or `torchvision:NAME`.
        data: the data set that the teacher is for; a file of ours that was trained on other data
            raises.
    """
    try:
        if weights.partition(":")[0] == "torchvision":
            path = _torchvision_file(weights.partition(":")[2], model, shape, num_classes)
        else:
            path = expanded(weights)
            _check_same_data(path, data)
        kept = _read_weights(path)
        with torch.random.fork_rng(devices=[]):
            wanted: Weights = model.build(shape, num_classes).state_dict()
        found, begin = _of_network(
            kept,
            wanted,
            lambda tensors: not any(_misfits(tensors, wanted, model.name, num_classes, [])),
        )
        if problems := list(_misfits(found, wanted, model.name, num_classes, begin)):
            raise ConfigError(problems)
        for key, value in found.items():
            # as it is used: a large number of float64 is infinite in float32
            if not value.to(wanted[key].dtype).isfinite().all():
                raise ConfigError(f"{key} holds NaN or infinity; take the file of an earlier epoch")
    except ConfigError as error:
        raise ConfigError(
            f"teacher.weights: {weights}: {problem}" for problem in error.problems
        ) from None
    return {
        key: found[key].to(value.dtype, copy=True) if key in found else value
        for key, value in wanted.items()
    }


# --- files ----------------------------------------------------------------------------------------


def _read_weights(path: Path) -> dict[str, Weights]:
    """Return the state_dicts in a file by their keys, those of `WRAPPERS` first."""
    if path.is_dir():
        inside = sorted(
            p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth")
        )
        raise ConfigError(
            f"is a directory; name a file in it: {', '.join(inside) or 'it holds no weights'}"
        )
    try:
        opened(path).close()
    except FileNotFoundError:
        raise ConfigError(f"no such file (looked from {Path.cwd()})") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    tree = _parsed(path)
    found = dict(_state_dicts(tree))
    if not found:
        keys = (
            f" with {', '.join(str(key) for key in list(tree)[:3])}"
            if isinstance(tree, Mapping) and tree
            else ""
        )
        raise ConfigError(
            f"holds no state_dict (tensors by name), but a {type(tree).__name__}{keys}"
        )
    return found


def _state_dicts(tree: Any, under: tuple[str, ...] = ()) -> Iterator[tuple[str, Weights]]:
    """Yield the state_dicts in a training script's checkpoint, each with its keys."""
    if isinstance(tree, list | tuple):  # of a network and its optimizer, for instance
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping) or len(under) > MOST_WRAPPERS:
        return
    tensors = {
        key: value
        for key, value in tree.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if tensors:  # beside them, a script may keep numbers such as the epoch
        named = {re.sub(WRAPPED, "", key).removeprefix("."): v for key, v in tensors.items()}
        yield (
            ".".join(under),
            {re.sub(OLD_DENSENET, r"\1\2", key): value for key, value in named.items()},
        )
    known = [key for key in WRAPPERS if key in tree]
    for key in (*known, *(key for key in tree if key not in known)):
        yield from _state_dicts(tree[key], (*under, str(key)))


MOST_WRAPPERS = 3
"""Levels of a checkpoint that are searched for state_dicts."""


def _of_network(
    kept: dict[str, Weights], wanted: Weights, fits: Callable[[Weights], bool]
) -> tuple[Weights, list[str]]:
    """Return the tensors of one network among a file's state_dicts, without wrapper prefixes.

    The network is the one that fits; if none fits, it is the one with the most names in common, and
    the error lists its differences. The second part is the names with which its state_dict begins.
    """
    parts = _parts(kept, wanted)
    fitting = [place for place, tensors in parts.items() if fits(tensors)]
    if not fitting:  # DataParallel may wrap parts of a network
        bare = _parts({under: _without_modules(tensors) for under, tensors in kept.items()}, wanted)
        if fitting := [place for place, tensors in bare.items() if fits(tensors)]:
            parts = bare
    if not fitting:
        place = max(parts, key=lambda place: len(parts[place].keys() & wanted.keys()))
        return parts[place], list(kept[place[0]])[:3]
    first = fitting[0]
    known = first[0].rpartition(".")[2] in WRAPPERS
    rivals = [place for place in fitting if place[0] == first[0] or not known]
    if len(rivals) > 1:
        names = ", ".join(
            repr(f"{under}{': ' if under else ''}{prefix}...") for under, prefix in rivals
        )
        raise ConfigError(f"holds {len(rivals)} networks that fit ({names}); save the one alone")
    return parts[first], list(kept[first[0]])[:3]


def _parts(kept: dict[str, Weights], wanted: Weights) -> dict[tuple[str, str], Weights]:
    """Return each state_dict's tensors below each prefix, by its keys and the prefix."""
    return {
        (under, prefix): _without_prefix(prefix, tensors)
        for under, tensors in kept.items()
        for prefix in _prefixes(tensors, wanted)
    }


def _without_modules(tensors: Weights) -> Weights:
    """Return tensors without DataParallel's `module.` in their names, if no two become one."""
    bare = {
        re.sub(r"(^|\.)module(?=\.)", "", key).removeprefix("."): value
        for key, value in tensors.items()
    }
    return bare if len(bare) == len(tensors) else tensors


def _prefixes(tensors: Weights, wanted: Weights) -> list[str]:
    """Return possible prefixes of the network's names in a file, e.g. `module.`, shortest first."""
    found = {""}
    for name in wanted:
        found |= {key.removesuffix(name) for key in tensors if key.endswith(f".{name}")}
        if len(found) > 1:
            break
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _without_prefix(prefix: str, tensors: Weights) -> Weights:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def _parsed(path: Path) -> Any:
    """Return the content of a safetensors or torch file."""
    safe = _is_safetensors(path)
    if not safe:
        check_torch()
    try:
        if safe:
            return load_file(path)
        with path.open("rb") as file:  # torch decides by the suffix of a path
            return torch.load(file, weights_only=True, map_location="cpu")
    except SafetensorError as error:
        raise ConfigError(f"damaged, or not safetensors: {error}") from None
    except pickle.UnpicklingError as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise ConfigError(
                f"asks for {asked[1]}, and loading that could run code; nothing was run. Save the tensors alone: "
                "torch.save(network.state_dict(), FILE)"
            ) from None
        raise ConfigError(f"damaged, or not a file of torch: {_line(error)}") from None
    except Exception as error:  # a damaged pickle can raise anything
        if "TorchScript" in str(error):
            raise ConfigError(
                "is a TorchScript archive, which is a program; nothing was run. Save the tensors alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
            ) from None
        raise ConfigError(f"damaged, or not a file of torch: {_line(error)}") from None


def _is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors, by its first bytes or else by its suffix."""
    with path.open("rb") as file:
        begin = file.read(9)
    if begin.startswith((b"PK", b"\x80")):  # a zip or a pickle
        return False
    return begin[8:] == b"{" or path.suffix == ".safetensors"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _check_same_data(path: Path, data: Dataset | None) -> None:
    """Raise if a teacher of ours (`teacher.json` lies beside it) was trained on other data."""
    about = path.parent / "teacher.json"
    if data is None or not about.is_file():
        return
    try:
        with opened(about) as file:
            found = parse_json(bytes(read_at_most(file, MOST_JSON_BYTES)))
        trained_on = _content_text(found["config"]["data"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # has the name, but is not ours
    here = _content_text(data.model_dump(mode="json"))
    if trained_on != here:
        raise ConfigError(
            f"was trained on {_said(trained_on)}, and the data here is {_said(here)}; train one on it"
        )


def _content_text(data: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that identify a data set's images and classes, without path or split."""
    return {
        key: value
        for key, value in data.items()
        if key in ("name", "variant", "path", "args", "num_classes")
    }


def _said(content: dict[str, Any]) -> str:
    more = ", ".join(f"{key} {value}" for key, value in content.items() if key != "name")
    return f"{content.get('name')} ({more})" if more else f"{content.get('name')}"


# --- how its images were prepared -----------------------------------------------------------------


def untrained(config: TeacherRun) -> nn.Module:
    """Return the teacher's network without its weights; its input is normalised by the data set."""
    module = config.build_student(input_shape(config, input_of(config)))
    if config.weights is not None:
        show(module, config.data, input_of(config))
    return module


def input_of(config: TeacherRun) -> dict[str, Any]:
    """Return the preprocessing that the teacher was trained with: `mean`, `std` and `size`.

    `mean` and `std` are per channel; a `size` of None is the data set's.
    """
    if config.weights is not None and config.input is None:
        beside = expanded(config.weights).parent / "teacher.json"  # a teacher of ours
        if config.weights.partition(":")[0] != "torchvision" and beside.is_file():
            with contextlib.suppress(ConfigError, ValueError):
                about = read_teacher(beside.parent)
                of = about["config"]["data"]
                known = about.get("input") or {"mean": of.get("mean"), "std": of.get("std")}
                if known["mean"] and known["std"]:
                    return TeacherInput.model_validate(known).model_dump(mode="json")
    if config.shown is not None:
        return config.shown.model_dump(mode="json")
    mean, std = config.data.statistics()
    return {"mean": list(mean), "std": list(std), "size": None}


def input_shape(config: TeacherRun, shown: dict[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of the teacher's input images."""
    channels, height, width = config.data.shape
    side = shown["size"]
    return (channels, side or height, side or width)


def show(module: nn.Module, data: Dataset, shown: dict[str, Any]) -> None:
    """Convert images from the data set's preprocessing to the network's own, before its forward.

    Do nothing if they are equal. The state_dict does not change.
    """
    mean, std = data.statistics()
    side = shown["size"]
    fits = side is None or tuple(data.shape[1:]) == (side, side)
    if fits and (list(mean), list(std)) == (shown["mean"], shown["std"]):
        return
    factor = torch.tensor(std) / torch.tensor(shown["std"])
    shift = (torch.tensor(mean) - torch.tensor(shown["mean"])) / torch.tensor(shown["std"])

    def seen(network: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = images
        a, b = (values.to(x.device, torch.float32).view(1, -1, 1, 1) for values in (factor, shift))
        x = x.float() * a + b
        if not fits:
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return (x,)

    module.register_forward_pre_hook(seen)


# --- does it fit ----------------------------------------------------------------------------------


def _misfits(
    found: Weights, wanted: Weights, name: str, num_classes: int, begin: list[str]
) -> Iterator[str]:
    """Yield one sentence for each mismatch between the weights and the network.

    `begin`: the names with which the file's state_dict begins, for the sentence.
    """
    shapes = [key for key in wanted if key in found and found[key].shape != wanted[key].shape]
    # torch fills these in as well: files from before 2018 lack them
    missing = [
        key for key in wanted if key not in found and not key.endswith("num_batches_tracked")
    ]
    more = [key for key in found if key not in wanted]
    if (
        shapes
        and not missing
        and not more
        and _differ_in_classes(found, wanted, shapes, num_classes)
    ):
        key = shapes[0]
        yield (
            f"the file's teacher has {found[key].shape[0]} classes ({key!r} is {list(found[key].shape)}) and the data "
            f"has {num_classes}; it takes a teacher of these classes"
        )
        return
    both = [f"{key} is {list(found[key].shape)}, not {list(wanted[key].shape)}" for key in shapes]
    problems = [f"it lacks {_first_few(missing)}"] if missing else []
    problems += [f"it has {_first_few(more)} that the network has not"] if more else []
    problems += [f"of another shape: {_first_few(both)}"] if both else []
    if problems:
        names = f"The file begins with {', '.join(begin)}, and the network with {', '.join(list(wanted)[:3])}"
        yield f"does not fit {name} for these images: {'; '.join(problems)}. {names}"
    for key in wanted.keys() & found.keys():
        if found[key].layout != torch.strided or found[key].is_meta or found[key].is_quantized:
            yield f"{key} is sparse, quantized or without content; save it as a plain tensor"
        elif found[key].is_floating_point() != wanted[key].is_floating_point():
            yield f"{key} is {found[key].dtype}, not {wanted[key].dtype}"


def _differ_in_classes(
    found: Weights, wanted: Weights, shapes: list[str], num_classes: int
) -> bool:
    """Return whether the tensors of other shapes are one layer that differs in its classes alone."""
    classes = {found[key].shape[:1] for key in shapes}
    layers = {key.rpartition(".")[0] for key in shapes}
    tails_fit = all(found[key].shape[1:] == wanted[key].shape[1:] for key in shapes)
    ours = all(wanted[key].shape[:1] == (num_classes,) for key in shapes)
    return len(classes) == len(layers) == 1 and tails_fit and ours


def _first_few(items: list[str]) -> str:
    """Return the number of tensors, and three of their names."""
    return f"{len(items)} tensor{'s' * (len(items) > 1)} ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"


# --- torchvision ----------------------------------------------------------------------------------


def _torchvision_file(
    name: str, model: Network, shape: tuple[int, int, int], num_classes: int
) -> Path:
    """Return the path of torchvision's weights in torch's cache, downloaded if missing."""
    from torchvision.models import get_model_weights, list_models  # type: ignore[import-untyped]

    if not isinstance(model, TorchvisionNetwork) or model.name not in list_models():
        raise ConfigError(f"torchvision has no {model.name}; name a file")
    if model.name == "googlenet":
        raise ConfigError(
            "googlenet's expect images of another mean and spread than we give; take another network"
        )
    if num_classes != 1000:
        raise ConfigError(
            f"torchvision's teachers have the 1000 classes of ImageNet and the data has {num_classes}"
        )
    if min(shape[1:]) <= SMALL_IMAGE or shape[0] != 3:
        raise ConfigError(
            f"torchvision's are for images of 3 channels above {SMALL_IMAGE} pixels; these are {list(shape)}, and "
            f"{model.name} has another first convolution for them"
        )
    sets = get_model_weights(model.name)
    if name and name not in sets.__members__:
        raise ConfigError(
            f"{model.name} has no weights {name!r}; {did_you_mean(name, sets.__members__)}"
        )
    url: str = (sets[name] if name else sets.DEFAULT).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                url, str(path), path.stem.rpartition("-")[2], progress=False
            )
        except (OSError, RuntimeError) as error:  # no network, or not the expected file
            raise ConfigError(f"cannot be downloaded ({error}); put {url} at {path}") from None
    return path
