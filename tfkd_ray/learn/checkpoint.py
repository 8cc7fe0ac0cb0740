"""Run states and weights, written atomically: a file is complete or absent.

A run state is a dict of tensors, numbers, text, lists and dicts. Its file begins with a line that
holds the SHA-256 of the rest; the rest is torch's own format, read with `weights_only=True`, so
loading never runs code. The previous state is kept as a fallback for a damaged one. A directory
always holds a complete state, whenever its writer is killed.
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
"""The run state of `loop.train`."""

LAST, BEFORE, WEIGHTS = "last.ckpt", "before.ckpt", "student.safetensors"
FRESH = f"{LAST}.new"
"""A complete state that is about to replace the last one; it remains only if the writer was killed
there."""


SAFE_TORCH = (2, 10)
"""The first torch version with no known way around `weights_only=True` (CVE-2026-24747)."""


def check_torch() -> None:
    """Raise a ConfigError if this torch version cannot load its files safely."""
    if Version(torch.__version__).release < SAFE_TORCH:
        raise ConfigError(
            f"torch {torch.__version__}: its files can run code even with weights_only=True (CVE-2026-24747), so none "
            f"is read; install torch >= {'.'.join(map(str, SAFE_TORCH))}"
        )


def save_state(directory: Path, state: State) -> None:
    """Write `state` as the last one of `directory`; keep the previous one as a fallback."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    last, fresh = directory / LAST, directory / FRESH
    write_whole(fresh, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    if last.exists():
        # damaged or not: until the next line, only `fresh` exists
        last.replace(directory / BEFORE)
    fresh.replace(last)


def load_state(directory: Path, say: Callable[[str], None] | None = None) -> State | None:
    """Return the newest undamaged state in `directory`, or None if there is none.

    A damaged file is skipped and reported through `say`, by default as a warning.
    """
    # wherever it is, the second is complete and newer than the third
    for name in (
        LAST,
        FRESH,
        BEFORE,
    ):
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
    """Write a state_dict as safetensors with `about` in its header; return the file's SHA-256."""
    # cloned, because the format refuses tied parameters, which share memory
    content = safetensors_bytes(
        {k: v.detach().cpu().clone().contiguous() for k, v in weights.items()}, dict(about)
    )
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


MOST_HEADER_BYTES = 10**8
"""Most bytes of a safetensors header, as its own reader has it."""


def load_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Return the state_dict in a safetensors file; raise if its SHA-256 is not `sha256`."""
    with opened(path) as file:
        begin = file.read(8)
        if 0 < int.from_bytes(begin, "little") <= MOST_HEADER_BYTES:
            begin += file.read()
        content = begin  # without a header, the first bytes are enough to refuse the file
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(
            f"{path}: damaged: its SHA-256 is not {sha256}; delete its folder and it is made again"
        )
    weights: dict[str, Tensor] = parse_safetensors(content)
    return weights
