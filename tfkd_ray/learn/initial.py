"""Where a student begins: external weights, frozen parts, and learning rates by depth.

`TrainConfig.init` names the weights, which `weights.load_beginning` reads; `TrainConfig.freeze`
names parts that do not learn. Depth is the place of a parameter's block in the network, from 0 at
the images to the head.
"""

import difflib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from tfkd_ray.learn.models import Network
from tfkd_ray.learn.weights import load_beginning
from tfkd_ray.settings.errors import ConfigError, did_you_mean


def begin(
    student: nn.Module,
    network: Network,
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    weights: str | None,
    freeze: Sequence[str],
    download: bool = True,
) -> list[str]:
    """Load a new student's weights and freeze its parts; return sentences on what is new in it.

    Args:
        network: the settings that built the student for (C, H, W) and its classes.
        weights: those of `init`. None: it keeps its own.
        download: False checks what can be known of the weights without a download.
    """
    notes: list[str] = []
    if weights is not None:
        with torch.random.fork_rng(devices=[]):
            note = load_beginning(weights, network, student, shape, num_classes, download=download)
        notes += [] if note is None else [note]
    if freeze:
        freeze_parts(student, freeze, network.called)
    return notes


# --- frozen parts ---------------------------------------------------------------------------------


def freeze_parts(student: nn.Module, freeze: Sequence[str], called: str) -> None:
    """Take the gradients from the parameters of these parts.

    Args:
        freeze: names of parts or parameters, or patterns with `*` and `?`. A part stands for all
            that is in it.

    Raises:
        ConfigError: if a name is of no part with parameters, or nothing is left to learn.
    """
    names = [name for name, _ in student.named_parameters()]
    problems = [
        f"freeze: {pattern!r} names no part of {called} that has parameters; {_near_names(pattern, names)}"
        for pattern in freeze
        if not any(is_frozen(name, [pattern]) for name in names)
    ]
    if problems:
        raise ConfigError(problems)
    for name, parameter in student.named_parameters():
        if is_frozen(name, freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        head = names[-1].rpartition(".")[0] or names[-1]
        raise ConfigError(
            f"freeze: {', '.join(map(repr, freeze))} freezes all {len(names)} parameters of {called}, so there is "
            f"nothing to train; leave out its last layer at least, {head!r}"
        )


def is_frozen(name: str, freeze: Sequence[str]) -> bool:
    """Return whether a part or parameter of this name, or a part around it, is among `freeze`."""
    parts = name.split(".")
    around = [".".join(parts[: k + 1]) for k in range(len(parts))]
    return any(fnmatchcase(part, pattern) for part in around for pattern in freeze)


def _near_names(pattern: str, parameters: Sequence[str]) -> str:
    """Return the parts near to a name; without any, the outermost ones."""
    parts: dict[str, None] = {}
    for name in parameters:
        below = name.split(".")
        parts |= {".".join(below[: k + 1]): None for k in range(len(below))}
    near = difflib.get_close_matches(pattern, list(parts), n=1, cutoff=0.6)
    outermost = dict.fromkeys(name.partition(".")[0] for name in parameters)
    return did_you_mean(pattern, near or outermost)


def set_training(model: nn.Module, student: nn.Module, freeze: Sequence[str]) -> None:
    """Set a model to training; what is frozen in the student keeps its batch statistics.

    Normalisation with running statistics is in eval mode where all of its parameters are frozen.
    Dropout is not: it varies what the rest learns from.

    Args:
        model: the student, or a module around it.
    """
    model.train()
    if freeze:
        for norm in _frozen_norms(student, freeze):
            norm.eval()


def _frozen_norms(student: nn.Module, freeze: Sequence[str]) -> Iterator[nn.Module]:
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            own = list(module.parameters())
            all_frozen = bool(own) and not any(p.requires_grad for p in own)
            if all_frozen or is_frozen(name, freeze):
                yield module


# --- learning rates by depth ----------------------------------------------------------------------


def factors_by_depth(trained: nn.Module, student: nn.Module, decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter of the student, by its name.

    It is `decay` to the power of the parameter's distance from the head, in blocks; 1 in the head.

    Args:
        trained: the student, or a module that holds it, whose names are used.
    """
    if decay == 1:
        return {}
    found = depths(student)
    last = max(found.values(), default=0)
    of_student = {parameter: name for name, parameter in student.named_parameters()}
    return {
        name: decay ** (last - found[of_student[parameter]])
        for name, parameter in trained.named_parameters()
        if parameter in of_student
    }


def depths(network: nn.Module) -> dict[str, int]:
    """Return the depth of the block of each parameter, by its name; 0 is next to the images.

    Blocks are the parts of the network in the order in which it holds them. Of a Sequential or
    ModuleList each item is a block, but the last part, the head, is one block. A part that holds a
    list of blocks of one kind, as an encoder does, is taken apart like the network. Parameters
    beside such parts (a ViT's positions) belong to the block before them, or to the first. What
    only normalises belongs to the layer right before it; after a whole block, to what follows.
    """
    blocks: list[list[str]] = []
    waiting: list[str] = []
    after_layer = False
    for part in _blocks_in(network):
        if part.joins and blocks and (after_layer or part.module is None):
            blocks[-1] += part.names
        elif part.joins:
            waiting += part.names
        else:
            blocks.append([*waiting, *part.names])
            waiting = []
            after_layer = part.module is not None and not any(part.module.children())
    if not blocks:
        return dict.fromkeys(waiting, 0)
    blocks[-1] += waiting
    return {name: depth for depth, names in enumerate(blocks) for name in names}


class _Block:
    """Parameters that have one depth.

    Args:
        path: the module's place in the network.
        module: None for parameters beside modules.
    """

    def __init__(self, path: str, module: nn.Module | None, owner: nn.Module) -> None:
        before = f"{path}." if path else ""
        own = owner.named_parameters(recurse=module is not None)
        shapes = {f"{before}{name}": parameter.ndim for name, parameter in own}
        self.module, self.names = module, list(shapes)
        self.joins = module is None or all(ndim <= 1 for ndim in shapes.values())
        """True if it belongs to a block before or after it."""


def _blocks_in(network: nn.Module, path: str = "", *, outermost: bool = True) -> Iterator[_Block]:
    """Yield the parts of a network with parameters, in order."""
    beside = _Block(path, None, network)
    if beside.names:
        yield beside
    before = f"{path}." if path else ""
    inside = [
        (f"{before}{name}", part)
        for name, part in network.named_children()
        if any(True for _ in part.parameters())
    ]
    alone = len(inside) == 1
    for number, (name, part) in enumerate(inside, start=1):
        is_head = outermost and number == len(inside)
        listed = isinstance(part, nn.Sequential | nn.ModuleList)
        if alone and any(part.children()):
            yield from _blocks_in(part, name, outermost=outermost)
        elif is_head and not _holds_blocks(part):
            yield _Block(name, part, part)
        elif listed:
            yield from _items_of(part, name)
        elif _holds_blocks(part):
            yield from _blocks_in(part, name, outermost=False)
        else:
            yield _Block(name, part, part)


def _items_of(listed: nn.Module, path: str) -> Iterator[_Block]:
    for name, item in listed.named_children():
        if any(True for _ in item.parameters()):
            yield _Block(f"{path}.{name}", item, item)


def _holds_blocks(module: nn.Module) -> bool:
    """Return whether there is a list of two or more parts of one kind in a part."""
    for part in module.children():
        if isinstance(part, nn.Sequential | nn.ModuleList):
            kinds = [type(item) for item in part.children()]
            if len(kinds) > 1 and kinds[0] is kinds[1] and any(next(part.children()).children()):
                return True
        elif _holds_blocks(part):
            return True
    return False
