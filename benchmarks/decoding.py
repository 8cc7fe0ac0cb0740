"""Time the decoding of image files alone: python benchmarks/decoding.py [--images 300] [--rounds 7] [--out FILE]

Random crops of 224 from JPEGs of 500x400. A round reads all images once in each way, one way after
another; the file system has the files in memory, and the cache is filled. Printed are crops per CPU
second, of this process and its readers together, medians with their range, and the ratio to threads
without a cache in the same round. Beside other jobs, CPU seconds tell more than those of the clock,
which are there, too. `one process` is the CPU time of the process that trains, an image.

`--readers-beside N` compares by the clock, in rounds: one reader process, N of them, and N processes
that decode by themselves, which is what the cores can do at most. Nothing else may run meanwhile.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from data import write_jpegs

from tfkd_ray.learn import reader
from tfkd_ray.learn.augment import Augment
from tfkd_ray.learn.image_files import ImageFolder
from tfkd_ray.learn.images import decode_into

WAYS: dict[str, dict[str, Any]] = {
    "threads": {},
    "threads, cache 256": {"cache": 256},
    "threads, cache raw": {"cache": "raw"},
    "processes": {"decode_in": "processes"},
    "processes, cache raw": {"decode_in": "processes", "cache": "raw"},
}


def cpu_of(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of_readers() -> float:
    return sum(cpu_of(one._process.pid) for idle in reader._idle.values() for one in idle)


def once(root: Path, readers: int, epoch: int, **settings: Any) -> dict[str, float]:
    """Read all images as one epoch does; return its images, and seconds."""
    data = ImageFolder(root=root, num_classes=2, val_fraction=0.0, readers=readers, **settings)
    images = data.load()[0]
    view = Augment(resized_crop=True).view(0, epoch, images.official_size)
    batches = list(torch.arange(len(images)).split(50))
    start, cpu, others = time.perf_counter(), time.process_time(), cpu_of_readers()
    for _ in images.read(batches, view.crop[images.positions]):
        pass
    here = time.process_time() - cpu
    return {
        "images": len(images),
        "clock_s": time.perf_counter() - start,
        "here_s": here,
        "cpu_s": here + cpu_of_readers() - others,
    }


def by_themselves(root: Path, count: int) -> float:
    """Return the crops per second of the clock of so many processes that share nothing."""
    command = [sys.executable, __file__, "--decode", str(root)]
    with contextlib.ExitStack() as stack:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        runs = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(count)]
        for run in runs:
            run.stdout.readline()
        start = time.perf_counter()
        for run in runs:
            run.stdin.close()
        done = sum(int(run.stdout.readline()) for run in runs)
        return done / (time.perf_counter() - start)


def decode_when_told(root: Path) -> None:
    """Decode all images of `root` once, then again after the end of the input."""
    data = ImageFolder(root=root, num_classes=2, val_fraction=0.0, cache="raw")
    images = data.load()[0]
    crops = Augment(resized_crop=True).view(0, 0, len(images)).crop.tolist()
    out = np.empty((len(images), *data.shape), np.uint8)
    decode_into(images.place, images.files, crops, out)
    print("ready", flush=True)
    sys.stdin.read()
    decode_into(images.place, images.files, crops, out)
    print(len(images), flush=True)


def readers_beside(root: Path, count: int, rounds: int) -> dict[str, Any]:
    """Return the crops per second of the clock from the raw cache, one reader and `count`."""
    settings: dict[str, Any] = {"decode_in": "processes", "cache": "raw"}
    ways: dict[str, Callable[[int], float]] = {
        "one reader": lambda epoch: by_clock(once(root, 1, epoch, **settings)),
        f"{count} readers": lambda epoch: by_clock(once(root, count, epoch, **settings)),
        "one process by itself": lambda epoch: by_themselves(root, 1),
        f"{count} processes by themselves": lambda epoch: by_themselves(root, count),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, measured in ways.items():
            rate = measured(number)
            if number:
                found[name].append(rate)
    report: dict[str, Any] = {name: spread(rates) for name, rates in found.items()}
    for one, many in (list(ways)[:2], list(ways)[2:]):
        ratios = [b / a for a, b in zip(found[one], found[many], strict=True)]
        report[f"{many} / {one}"] = spread(ratios)
    return report


def by_clock(row: dict[str, float]) -> float:
    return row["images"] / row["clock_s"]


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "from": min(values),
        "to": max(values),
        "n": len(values),
    }


def compared(root: Path, readers: int, rounds: int) -> dict[str, Any]:
    """Return the crops per CPU second of each of `WAYS`, interleaved."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, settings in WAYS.items():
            row = once(root, readers, number, **settings)
            if number:
                found[name].append(row)
    report = {}
    for name, rows in found.items():
        ratios = [
            plain["cpu_s"] / row["cpu_s"] for row, plain in zip(rows, found["threads"], strict=True)
        ]
        here = [1000 * row["here_s"] / row["images"] for row in rows]
        report[name] = {
            "crops per CPU second": spread([row["images"] / row["cpu_s"] for row in rows]),
            "ratio": spread(ratios),
            "one process, ms an image": spread(here),
            "crops per second of the clock": spread([by_clock(row) for row in rows]),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--readers-beside", type=int, metavar="N")
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.decode:
        decode_when_told(args.decode)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        root = Path(folder) / "photos"
        write_jpegs(root, args.images)
        if args.readers_beside:
            report = readers_beside(root, args.readers_beside, args.rounds)
        else:
            report = compared(root, args.readers, args.rounds)
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
