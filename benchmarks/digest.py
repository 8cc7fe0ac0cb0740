"""What the digest of data costs, as CPU time beside a first load and a later one: python benchmarks/digest.py [REPEATS]

Each load is in a process of its own. The files are synthetic, in the official formats and numbers. Figures:
benchmarks/RESULTS.md.
"""

import gzip
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data import write_cifar100, write_jpegs

from tfkd_ray.data import Cifar100, Dataset, ImageFolder, Mnist


def write_mnist(root: Path, *, gz: bool) -> None:
    """Train images that are black in 7 of 10 pixels, about as MNIST's are."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for split, count in (("train", 60_000), ("t10k", 10_000)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8) * (rng.random((count, 28, 28)) < 0.3)
        labels = np.arange(count, dtype=np.uint8) % 10
        for stem, array in (("images-idx3", pixels.astype(np.uint8)), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            raw = head + array.tobytes()
            (root / f"{split}-{stem}-ubyte{'.gz' * gz}").write_bytes(gzip.compress(raw, 6) if gz else raw)


def data_at(kind: str, root: Path) -> Dataset:
    """A data set that was written."""
    if kind == "cifar":
        return Cifar100(root=root, check_md5=False)
    return ImageFolder(root=root, num_classes=2) if kind == "folder" else Mnist(root=root)


def one(kind: str, root: Path) -> None:
    """Print the CPU seconds of a load, and then of its digest."""
    data = data_at(kind, root)
    start = time.process_time()
    data.load()
    loaded = time.process_time()
    data.pinned()
    print(loaded - start, time.process_time() - loaded)


def measured(kind: str, root: Path, cache: Path) -> list[float]:
    command = [sys.executable, __file__, "--one", kind, str(root)]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def main(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        roots = {name: Path(folder) / name for name in ("gz", "raw", "cifar", "folder")}
        write_mnist(roots["gz"], gz=True)
        write_mnist(roots["raw"], gz=False)
        roots["cifar"].mkdir()
        write_cifar100(roots["cifar"])
        write_jpegs(roots["folder"])
        for kind, root in roots.items():
            for when in ("first", "later"):
                runs = []
                for k in range(repeats):
                    runs.append(measured(kind, root, Path(folder) / f"cache-{kind}{k}"))
                shares = [digest / load for load, digest in runs]
                load, digest = (1000 * statistics.median(column) for column in zip(*runs, strict=True))
                print(
                    f"{kind}, {when}: load {load:.1f} ms, digest {digest:.2f} ms, {statistics.median(shares):.2%} "
                    f"({min(shares):.2%} to {max(shares):.2%}, n {repeats})",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
