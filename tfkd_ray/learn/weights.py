"""External weights for a network: a user's file, or weights of torchvision or timm.

Reading a file runs nothing that it holds. The result fits the network, or a ConfigError gives the
reason.
"""

import contextlib
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tfkd_ray.learn.checkpoint import check_torch
from tfkd_ray.learn.dataset import Dataset
from tfkd_ray.learn.models import SMALL_IMAGE, Network, Timm, TorchvisionNetwork
from tfkd_ray.settings.errors import ConfigError, did_you_mean
from tfkd_ray.settings.files import expanded, opened, read_at_most
from tfkd_ray.store.experiment import MOST_JSON_BYTES, parse_json

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
    """Return a teacher's state_dict, which fits `model.build(shape, num_classes)`.

    Args:
        weights: a file (safetensors or a torch state_dict), `torchvision`, or `torchvision:NAME`.
        data: the data set that the teacher is for; a file of ours that was trained on other data
            raises.
    """
    with _said_of(f"teacher.weights: {weights}"):
        if weights.partition(":")[0] == "torchvision":
            source = torchvision_source(weights, model, shape)
            if num_classes != 1000:
                raise ConfigError(
                    f"torchvision's teachers have the 1000 classes of ImageNet and the data has {num_classes}"
                )
            path = source.downloaded()
        else:
            path = expanded(weights)
            _check_same_data(path, data)
        with torch.random.fork_rng(devices=[]):
            wanted: Weights = model.build(shape, num_classes).state_dict()
        found, _ = _fitting(path, wanted, model.name, num_classes, new_head=False)
    return {
        key: found[key].to(value.dtype, copy=True) if key in found else value
        for key, value in wanted.items()
    }


def load_beginning(
    weights: str,
    network: Network,
    student: nn.Module,
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    download: bool = True,
) -> str | None:
    """Load the weights with which a student begins; return a sentence on its head if that is new.

    A head of another number of classes, or one that the file lacks, stays as the student has it.

    Args:
        weights: as for a teacher, or `timm`: those of timm for a network of its own.
        student: the network, built for (C, H, W) and its classes; it gets the weights.
        download: False checks what can be known without a download. What it returns is the same.
    """
    with _said_of(f"init.weights: {weights}"):
        if weights == "timm":
            return _begin_as_timm(network, student, shape, num_classes, download=download)
        wanted: Weights = student.state_dict()
        if weights.partition(":")[0] == "torchvision":
            source = torchvision_source(weights, network, shape)
            if not download and not source.path.exists():
                return None if num_classes == 1000 else _new_head(weights, None, 1000, num_classes)
            path = source.downloaded()
        else:
            path = expanded(weights)
        found, head = _fitting(path, wanted, network.name, num_classes, new_head=True)
    student.load_state_dict(
        {
            key: found[key].to(value.dtype) if key in found and key not in head else value
            for key, value in wanted.items()
        }
    )
    if not head:
        return None
    of_file = found[head[0]].shape[0] if head[0] in found else None
    return _new_head(weights, head[0].rpartition(".")[0], of_file, num_classes)


def _new_head(weights: str, layer: str | None, of_file: int | None, num_classes: int) -> str:
    """Return the sentence on a student whose head its weights do not have.

    Args:
        layer: the head. None: not known yet.
        of_file: number of classes of the weights. None: they have no head.
    """
    named = "" if layer is None else f" ({layer})"
    has = "have no head" if of_file is None else f"are for {of_file} classes"
    return (
        f"init.weights: {weights}: these weights {has}, and the data has {num_classes}; the student gets a new "
        f"head{named}, drawn from its seed"
    )


@contextlib.contextmanager
def _said_of(about: str) -> Iterator[None]:
    """Put what a sentence is about in front of the sentences that are raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{about}: {problem}" for problem in error.problems) from None


def _fitting(
    path: Path, wanted: Weights, name: str, num_classes: int, *, new_head: bool
) -> tuple[Weights, list[str]]:
    """Return the tensors of a file that fit a network, and the names of those of another head.

    Args:
        new_head: whether a head of another number of classes, or none, fits.
    """
    kept = _read_weights(path)

    def fits(tensors: Weights) -> bool:
        return not any(_misfits(tensors, wanted, name, num_classes, []))

    def fits_below_head(tensors: Weights) -> bool:
        head = _other_head(tensors, wanted, num_classes)
        return fits({**tensors, **{key: wanted[key] for key in head}})

    found, begin = _of_network(kept, wanted, fits)
    head: list[str] = []
    if new_head and not fits(found):
        found, begin = _of_network(kept, wanted, fits_below_head)
        head = _other_head(found, wanted, num_classes)
    judged = {**found, **{key: wanted[key] for key in head}}
    if problems := list(_misfits(judged, wanted, name, num_classes, begin)):
        raise ConfigError(problems)
    for key, value in judged.items():
        # as it is used: a large number of float64 is infinite in float32
        if not value.to(wanted[key].dtype).isfinite().all():
            raise ConfigError(f"{key} holds NaN or infinity; take the file of an earlier epoch")
    return found, head


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
        raise ConfigError(f"no such file (searched from {Path.cwd()})") from None
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
                "is a TorchScript archive, which contains code; nothing was run. Save the tensors alone: "
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


def _other_head(found: Weights, wanted: Weights, num_classes: int) -> list[str]:
    """Return the network's names of a head of other classes, or of one that is missing; or none."""
    shapes = [key for key in wanted if key in found and found[key].shape != wanted[key].shape]
    missing = [
        key for key in wanted if key not in found and not key.endswith("num_batches_tracked")
    ]
    if missing:
        layer = list(wanted)[-1].rpartition(".")[0]
        last = [key for key in wanted if key.rpartition(".")[0] == layer]
        ours = all(wanted[key].shape[:1] == (num_classes,) for key in last)
        return last if ours and missing == last and not shapes else []
    classes = {found[key].shape[:1] for key in shapes}
    tails_fit = all(found[key].shape[1:] == wanted[key].shape[1:] for key in shapes)
    ours = all(wanted[key].shape[:1] == (num_classes,) for key in shapes)
    return shapes if len(classes) == 1 and tails_fit and ours else []


def _first_few(items: list[str]) -> str:
    """Return the number of tensors, and three of their names."""
    return f"{len(items)} tensor{'s' * (len(items) > 1)} ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"


# --- torchvision ----------------------------------------------------------------------------------


class TorchvisionSource(NamedTuple):
    """One of torchvision's files of weights."""

    url: str
    path: Path
    """Its place in torch's cache."""

    def downloaded(self) -> Path:
        """Return its place, after a download if it is not there."""
        path = self.path
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(
                    self.url, str(path), path.stem.rpartition("-")[2], progress=False
                )
            except (OSError, RuntimeError) as error:  # no network, or not the expected file
                raise ConfigError(
                    f"cannot be downloaded ({error}); put {self.url} at {path}"
                ) from None
        return path


def torchvision_source(
    weights: str, model: Network, shape: tuple[int, int, int]
) -> TorchvisionSource:
    """Return the file that `torchvision` or `torchvision:NAME` means for a network."""
    from torchvision.models import get_model_weights, list_models  # type: ignore[import-untyped]

    name = weights.partition(":")[2]
    if not isinstance(model, TorchvisionNetwork) or model.name not in list_models():
        raise ConfigError(f"torchvision has no {model.name}; name a file")
    if model.name == "googlenet":
        raise ConfigError(
            "googlenet's weights expect images with another mean and deviation than tfkd gives; choose another network"
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
    return TorchvisionSource(
        url, Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    )


# --- timm -----------------------------------------------------------------------------------------


def _begin_as_timm(
    network: Network,
    student: nn.Module,
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    download: bool,
) -> str | None:
    """Load timm's weights into a network of timm, but for a head of other classes."""
    if not isinstance(network, Timm):
        raise ConfigError(
            f"is for networks of timm, and the student is {network.called}; name a file"
        )
    about: dict[str, Any] = getattr(student, "pretrained_cfg", {})
    if not any(about.get(key) for key in ("hf_hub_id", "url", "file", "state_dict")):
        raise ConfigError(f"timm has no weights of {network.model}; name a file")
    new = about["num_classes"] != num_classes
    of_head = about.get("classifier") or ()
    layers = (of_head,) if isinstance(of_head, str) else tuple(of_head)
    note = None
    if new:
        note = _new_head("timm", " and ".join(layers), about["num_classes"], num_classes)
    if not download:
        return note
    try:
        found = network.pretrained(shape, num_classes).state_dict()
    except Exception as error:  # of the network, of the file, or of timm
        raise ConfigError(
            f"cannot be loaded ({_line(error)}); if this machine has no network, name a file"
        ) from None
    wanted = student.state_dict()
    heads = tuple(f"{layer}." for layer in layers)
    below = [key for key in wanted if not (new and key.startswith(heads))]
    other = [key for key in below if key not in found or found[key].shape != wanted[key].shape]
    if other:
        raise ConfigError(
            f"the student's {other[0]} is {list(wanted[other[0]].shape)}, and timm's another one, as images up to "
            f"{SMALL_IMAGE} pixels get a smaller first convolution; set student.stem: timm"
        )
    student.load_state_dict({**wanted, **{key: found[key] for key in below}})
    return note
