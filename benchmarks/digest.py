"""Measure the CPU time of data digests: python benchmarks/digest.py [REPEATS]

Each load runs in its own process. The files are synthetic, in the official formats and numbers.
Figures: benchmarks/RESULTS.md.
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
from data import write_cifar100

from tfkd_ray.learn.data import OwnData
from tfkd_ray.learn.dataset import Dataset, load_official
from tfkd_ray.learn.image_files import ImageFolder
from tfkd_ray.learn.images import ImageSet
from tfkd_ray.learn.official import Cifar100, Mnist

KINDS = ("raw", "gz", "cifar", "own", "folder")
FILES = 20_000


def images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Generate 50,000 images of 3x32x32, as a user's function does."""
    pixels = np.random.default_rng(0).integers(0, 256, (50_000, 3, 32, 32), dtype=np.uint8)
    return pixels, np.arange(50_000) % 10


def write_files(root: Path) -> None:
    """Write empty files in 100 classes: images that stay in files are not read."""
    for split, count in (("train", FILES), ("val", 100)):
        for k in range(100):
            (root / split / f"{k:03}").mkdir(parents=True)
        for i in range(count):
            (root / split / f"{i % 100:03}" / f"{i}.png").touch()


def write_mnist(root: Path, *, gz: bool) -> None:
    """Write train images that are black in 7 of 10 pixels, about as MNIST's are."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for split, count in (("train", 60_000), ("t10k", 10_000)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8) * (
            rng.random((count, 28, 28)) < 0.3
        )
        labels = np.arange(count, dtype=np.uint8) % 10
        for stem, array in (("images-idx3", pixels.astype(np.uint8)), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            raw = head + array.tobytes()
            (root / f"{split}-{stem}-ubyte{'.gz' * gz}").write_bytes(
                gzip.compress(raw, 6) if gz else raw
            )


def data_at(kind: str, root: Path) -> Dataset:
    """Return a data set of the written files."""
    if kind == "cifar":
        return Cifar100(root=root, check_md5=False)
    if kind == "own":
        return OwnData(path="digest:images", shape=(3, 32, 32), num_classes=10)
    return ImageFolder(root=root, num_classes=100) if kind == "folder" else Mnist(root=root)


def one(kind: str, root: Path) -> None:
    """Print the CPU seconds of a load, of its digest, and of numpy's plain sum of the same bytes.

    The sum of all words sees no order: it is the least that reading every byte again can take.
    """
    data = data_at(kind, root)
    start = time.process_time()
    data.load()
    loaded = time.process_time()
    whole = load_official(data)
    assert whole.digest
    digested = time.process_time()
    if isinstance(whole.whole, ImageSet):
        whole.whole.stored.numpy().reshape(-1).view("<u8").sum()
    print(loaded - start, digested - loaded, time.process_time() - digested)


def measured(kind: str, root: Path, cache: Path) -> list[float]:
    command = [sys.executable, __file__, "--one", kind, str(root)]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def main(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        roots = {kind: Path(folder) / kind for kind in KINDS}
        write_mnist(roots["gz"], gz=True)
        write_mnist(roots["raw"], gz=False)
        roots["cifar"].mkdir()
        write_cifar100(roots["cifar"])
        write_files(roots["folder"])
        runs: dict[tuple[str, str], list[list[float]]] = {}
        for k in range(repeats):  # in turns, so that load on the machine affects all alike
            for kind, root in roots.items():
                for when in ("first", "later"):
                    found = measured(kind, root, Path(folder) / f"cache-{kind}{k}")
                    runs.setdefault((kind, when), []).append(found)
        for (kind, when), found in runs.items():
            shares = [digest / load for load, digest, _ in found]
            load, digest, plain = (
                1000 * statistics.median(part) for part in zip(*found, strict=True)
            )
            print(
                f"{kind}, {when}: load {load:.1f} ms, digest {digest:.2f} ms, {statistics.median(shares):.2%} "
                f"({min(shares):.2%} to {max(shares):.2%}, n {repeats}), plain sum {plain:.2f} ms"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
