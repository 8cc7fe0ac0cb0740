"""A cache of decoded images on this machine, shared by its processes."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor
from tfkd_ray.settings.files import cached_file, state_of, whole_file


def cached(
    name: str, read: Iterable[Path], make: Callable[[], "tuple[Tensor, Tensor]"]
) -> "tuple[Tensor, Tensor]":
    """Return (images, labels) from `make`, or mapped from the cache in ~/.cache/tfkd_ray/.

    Each pair of a name and a first path has one cache file; a changed path, size or modification
    time invalidates it. If the cache cannot be written, the data are decoded again: only time is
    lost.
    """
    from safetensors.torch import save_file

    paths = list(read)
    kept, key = cached_file(name, paths[0]), state_of(paths)
    found = _kept(kept, key)
    if found is None:
        images, labels = found = make()
        try:
            with whole_file(kept) as part:
                save_file({"images": images, "labels": labels}, part, {"key": key})
                with part.open("rb") as written:
                    os.fsync(written)
        except (OSError, SafetensorError):
            return found
        found = _kept(kept, key) or found  # mapped: processes that read it share its memory
    return found


def _kept(path: Path, key: str) -> "tuple[Tensor, Tensor] | None":
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() == {"key": key}:
                return file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, SafetensorError):
        pass
    return None
