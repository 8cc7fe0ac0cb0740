"""Files that are written whole or not at all: run states and weights.

A run state is a dict of tensors, numbers, text, lists and dicts. Its file is a line with the SHA-256 of what follows,
then torch's own format, read with `weights_only=True`: reading one never runs code. The state before it is kept, for
the case that the newest is damaged. At no moment does a directory lack a whole one, whenever its writer is killed.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import opened, write_whole

State = dict[str, Any]
"""See `loop.train`."""

LAST, BEFORE, WEIGHTS = "last.ckpt", "before.ckpt", "student.safetensors"
FRESH = f"{LAST}.new"
"""A whole state that is about to become the last; it stays only where its writer was killed at that."""


SAFE_TORCH = (2, 10)
"""The first torch of which no file is known that runs code in spite of `weights_only=True` (CVE-2026-24747)."""


def check_torch() -> None:
    """Raise a ConfigError where torch is too old for its files to be read."""
    if Version(torch.__version__).release < SAFE_TORCH:
        raise ConfigError(
            f"torch {torch.__version__}: its files can run code even with weights_only=True (CVE-2026-24747), so none "
            f"is read; install torch >= {'.'.join(map(str, SAFE_TORCH))}"
        )


def save_state(directory: Path, state: State) -> None:
    """Make `state` the last one of `directory`; the one that was last is kept as the one before."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    last, fresh = directory / LAST, directory / FRESH
    write_whole(fresh, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    if last.exists():
        last.replace(
            directory / BEFORE
        )  # damaged or not: until the next line, `fresh` is what there is
    fresh.replace(last)


def load_state(directory: Path, say: Callable[[str], None] | None = None) -> State | None:
    """The newest whole state in `directory`; None where there is none.

    A damaged file is passed over, and `say` called with a sentence; without one it is a warning.
    """
    for name in (
        LAST,
        FRESH,
        BEFORE,
    ):  # the second is newer than the third, and whole, wherever it is
        path = directory / name
        try:
            with opened(path, follow=False) as file:
                digest, _, content = file.read().partition(b"\n")
        except FileNotFoundError:
            continue
        if hashlib.sha256(content).hexdigest().encode() == digest:
            check_torch()
            state: State = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            return state
        damage = f"{path}: damaged (its checksum does not fit); going on without it"
        if say is not None:
            say(damage)
        else:
            warnings.warn(damage, stacklevel=2)
    return None


def save_weights(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Write a module's state_dict as safetensors with `about` in its header; returns the file's SHA-256."""
    # cloned: tied parameters share memory, which the format refuses
    content = safetensors_bytes(
        {k: v.detach().cpu().clone().contiguous() for k, v in weights.items()}, dict(about)
    )
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def load_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The state_dict in a safetensors file; with `sha256`, only if the file is the one that was written."""
    with opened(path) as file:
        content = file.read()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(
            f"{path}: damaged: its SHA-256 is not {sha256}; delete its folder and it is made again"
        )
    weights: dict[str, Tensor] = parse_safetensors(content)
    return weights
