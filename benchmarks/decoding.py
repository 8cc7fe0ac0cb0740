"""Time the decoding of image files alone: python benchmarks/decoding.py [--images 300] [--rounds 7] [--out FILE]

Random crops of 224 from JPEGs of 500x400. A round reads all images once in each way, one way after
another; the file system has the files in memory, and the cache is filled. Printed are crops per CPU
second, of this process and its readers together, medians with their range, and the ratio to threads
without a cache in the same round. Beside other jobs, CPU seconds tell more than those of the clock,
which are there, too. `one process` is the CPU time of the process that trains, an image.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from data import write_jpegs

from tfkd_ray.learn import reader
from tfkd_ray.learn.augment import Augment
from tfkd_ray.learn.image_files import ImageFolder

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        root = Path(folder) / "photos"
        write_jpegs(root, args.images)
        for number in range(args.rounds + 1):
            for name, settings in WAYS.items():
                row = once(root, args.readers, number, **settings)
                if number:
                    found[name].append(row)
    report = {}
    for name, rows in found.items():
        rates = [row["images"] / row["cpu_s"] for row in rows]
        ratios = [
            plain["cpu_s"] / row["cpu_s"] for row, plain in zip(rows, found["threads"], strict=True)
        ]
        report[name] = {
            "crops per CPU second": statistics.median(rates),
            "from": min(rates),
            "to": max(rates),
            "ratio": statistics.median(ratios),
            "ratio from": min(ratios),
            "ratio to": max(ratios),
            "one process, ms an image": 1000
            * statistics.median(row["here_s"] / row["images"] for row in rows),
            "crops per second of the clock": statistics.median(
                row["images"] / row["clock_s"] for row in rows
            ),
            "n": len(rows),
        }
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
