"""Time data readers and measure peak memory: python benchmarks/data.py [REPEATS]

The files are synthetic, in the official formats and numbers. Figures: benchmarks/RESULTS.md.
"""

import io
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.image_files import ImageFolder
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.models import MobileNetV2
from tfkd_ray.learn.objectives import CrossEntropy
from tfkd_ray.learn.official import Cifar100
from tfkd_ray.learn.optimizers import OptimConfig


def write_cifar100(root: Path) -> None:
    """Write the archive: 50,000 train images and 10,000 test images."""
    rng = np.random.default_rng(0)
    with tarfile.open(root / Cifar100.archive, "w:gz", compresslevel=1) as tar:
        for name, count in (("train", 50_000), ("test", 10_000)):
            pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            raw = pickle.dumps(
                {b"data": pixels, b"fine_labels": [i % 100 for i in range(count)]}, protocol=4
            )
            member = tarfile.TarInfo(f"{Cifar100.folder}/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))


def write_jpegs(root: Path, count: int = 400) -> None:
    """Write smooth pictures of 500x400 in two classes."""
    for i in range(count):
        small = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        for split in ("train", "val")[: 2 if i < 4 else 1]:
            folder = root / split / f"{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize((500, 400), Image.Resampling.BICUBIC).save(
                folder / f"{i}.jpg", quality=92
            )


def load(root: str) -> float:
    """Return the seconds to read CIFAR-100 and its statistics."""
    start = time.perf_counter()
    data = Cifar100(root=Path(root), check_md5=False)
    data.load()
    data.statistics()
    return time.perf_counter() - start


def decode(
    root: str, readers: int, decode_in: Literal["threads", "processes"] = "threads"
) -> float:
    """Return the random crops of 224 decoded in a second."""
    folder = ImageFolder(root=Path(root), num_classes=2, readers=readers, val_fraction=0.0)
    images, _ = folder.model_copy(update={"decode_in": decode_in}).load()
    crops = torch.rand(len(images), 4, generator=torch.Generator().manual_seed(0))
    for _ in images.read([torch.arange(len(images))[: 8 * readers]], crops):
        pass  # starts the processes
    start = time.perf_counter()
    for _ in images.read(list(torch.arange(len(images)).split(50)), crops):
        pass
    return len(images) / (time.perf_counter() - start)


def memory(root: str, batch_size: int) -> float:
    """Return the peak GiB of 10 steps of MobileNetV2 and validation, with all images in memory."""
    data = Cifar100(root=Path(root), check_md5=False, subset=round(12.5 * batch_size))
    whole = data.model_copy(
        update={"subset": None}
    ).load()  # kept alive: a sweep holds the whole set
    config = TrainConfig(
        objective=CrossEntropy(),
        data=data,
        student=MobileNetV2(),
        epochs=1,
        optim=OptimConfig(batch_size=batch_size),
    )
    list(train(config))
    assert len(whole[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measured(what: str, repeats: int, *args: str, cache: Path) -> list[float]:
    """Return the values of so many new processes."""
    command = [sys.executable, __file__, "--one", what, *args]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    runs = (
        subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        for _ in range(repeats)
    )
    return [float(run.stdout) for run in runs]


def main(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, photos = Path(folder) / "cifar", Path(folder) / "photos"
        root.mkdir()
        write_cifar100(root)
        write_jpegs(photos)

        def show(text: str, values: list[float], unit: str) -> None:
            spread = f"{min(values):.3g} to {max(values):.3g}"
            print(
                f"{text}: {statistics.median(values):.3g} {unit} ({spread}, n {len(values)})",
                flush=True,
            )

        first = [
            measured("load", 1, str(root), cache=Path(folder) / f"cache{k}")[0]
            for k in range(repeats)
        ]
        show("CIFAR-100 archive, read for the first time", first, "s")
        show(
            "the same later",
            measured("load", repeats, str(root), cache=Path(folder) / "cache0"),
            "s",
        )
        for readers in ("1", "2"):
            values = measured(
                "decode", repeats, str(photos), readers, cache=Path(folder) / "cache0"
            )
            show(f"crops of 224 with {readers} readers", values, "images/s")
        for batch in ("128", "32"):
            values = measured(
                "memory", min(repeats, 3), str(root), batch, cache=Path(folder) / "cache0"
            )
            show(f"MobileNetV2, batch {batch}: peak memory of the process", values, "GiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        torch.set_num_threads(1)
        what, place, *more = sys.argv[2:]
        numbers = [int(word) for word in more]
        print({"load": load, "decode": decode, "memory": memory}[what](place, *numbers))  # type: ignore[operator]
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
