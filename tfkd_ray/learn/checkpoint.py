"""Run states and weights, written atomically: a file is complete or absent.

A run state is a dict of tensors, numbers, text, lists and dicts. Its file begins with a line that
holds the SHA-256 of the rest; the rest is torch's own format, read with `weights_only=True`, so
loading never runs code. The previous state is kept as a fallback for a damaged one. A directory
always holds a complete state, whenever its writer is killed.
"""

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from tfkd_ray.settings.errors import ConfigError, Say
from tfkd_ray.settings.files import opened, read_at_most, write_whole

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


def load_state(directory: Path, say: Say | None = None) -> State | None:
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
                content = _undamaged(file)
        except FileNotFoundError:
            continue
        if content is not None:
            check_torch()
            state: State = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            return state
        damage = f"{path}: damaged (its checksum does not match); skipped"
        if say is not None:
            say(damage)
        else:
            warnings.warn(damage, stacklevel=2)
    return None


def reread(state: State) -> State:
    """Return a state as `load_state` would, without a file; raise if it holds more than values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    found: State = torch.load(buffer, weights_only=True, map_location="cpu")
    return found


_DIGEST = re.compile(rb"[0-9a-f]{64}\n")
_ZIP_END = re.compile(rb"PK\x05\x06.{16}\0\0", re.S)
"""Last bytes of torch's format, a zip archive without a comment."""


def _undamaged(file: io.BufferedReader) -> bytes | None:
    """Return the bytes of torch's format in a state's file, or None if it is damaged.

    A file may claim any size. One that does not begin and end like a state is not read further, and
    memory is taken for one whose checksum fits.
    """
    digest = file.read(65)
    if _DIGEST.fullmatch(digest) is None or file.seek(0, os.SEEK_END) < 65 + 22:
        return None
    file.seek(-22, os.SEEK_END)
    if _ZIP_END.fullmatch(file.read()) is None:
        return None
    file.seek(65)
    if hashlib.file_digest(file, "sha256").hexdigest().encode() != digest[:64]:
        return None
    file.seek(65)
    return file.read()


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


def load_weights(
    path: Path, sha256: str | None = None, *, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Return the state_dict in a safetensors file; raise if its SHA-256 is not `sha256`.

    What follows the tensors, or is far more than the `network` has, is refused before it is read.
    """
    damaged = (
        f"{path}: damaged: its SHA-256 is not {sha256}; delete its folder, and it is made again"
    )
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        described = _size_by_header(file)
        if described is not None and described < size:
            more = f"{size} bytes, and its header describes {described}"
            raise SafetensorError(more) if sha256 is None else ValueError(damaged)
        if described is not None and network is not None:
            values = network.state_dict().values()
            own = sum(value.numel() * value.element_size() for value in values)
            if size > 2**24 + 16 * own:
                raise RuntimeError(f"{size} bytes, and its network has {own}")
        file.seek(0)
        # without a header, the first bytes are enough to refuse the file
        content = file.read(8) if described is None else file.read()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(damaged)
    weights: dict[str, Tensor] = parse_safetensors(content)
    return weights


def _size_by_header(file: io.BufferedReader) -> int | None:
    """Return how many bytes a safetensors file has by its header; None if it has no header."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= MOST_HEADER_BYTES:
        return None
    try:
        header = json.loads(read_at_most(file, length))
        ends = [
            about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"
        ]
        return 8 + length + int(max(ends, default=0))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
