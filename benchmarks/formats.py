"""Time memory formats and precisions: forward, backward and optimizer of networks on one batch.

    python benchmarks/formats.py [--students resnet18,mobilenet_v2] [--rounds 5] [--batch 64] [--compile]

One thread, images of 32x32, 100 classes; the variants take turns. Printed are the time of each
relative to contiguous float32 (median and range over the rounds) and the variant that `tfkd`
chooses here. With `--compile`: that variant with and without torch.compile, the time of the first
compiled step (torch caches it: set TORCHINDUCTOR_CACHE_DIR to an empty folder, and run twice), and
the number of steps until that time is regained.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.settings.schema import validated

STUDENTS = (
    "mlp,cnn,cnn5,alexnet_small,vgg19_bn,resnet18,resnet50,resnext29,wide_resnet,densenet121,googlenet,"
    "mobilenet_v2,shufflenet_v2_x1_0"
)
K = 100
WAYS = [
    (layout, bf16)
    for bf16 in (False, True)
    for layout in (torch.contiguous_format, torch.channels_last)
]


def steps(
    config: TrainConfig,
    layout: torch.memory_format,
    bf16: bool,
    batch: int,
    *,
    compiled: bool = False,
) -> Iterator[float]:
    """Yield the seconds of a step on each request."""
    student = config.student.build((3, 32, 32), K).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
    )
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, K, (batch,))
    forward = torch.compile(student, dynamic=False) if compiled else student
    while True:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield time.perf_counter() - start


def name(layout: torch.memory_format, bf16: bool) -> str:
    return f"{'channels-last' if layout == torch.channels_last else 'contiguous'} {'bf16' if bf16 else 'fp32'}"


def print_table(students: list[TrainConfig], batch: int, rounds: int) -> None:
    """Print the four variants of each student."""
    print(
        "| student | "
        + " | ".join(name(*way) for way in WAYS)
        + " | chosen |\n"
        + "|---" * (len(WAYS) + 2)
        + "|"
    )
    for config in students:
        _, seconds = turns([steps(config, *way, batch) for way in WAYS], rounds)
        cells = [
            f"{1000 * statistics.median(seconds[0]):.0f} ms",
            *(over(s, seconds[0]) for s in seconds[1:]),
        ]
        print(
            f"| `{config.student.name}` | " + " | ".join(cells) + f" | {name(*chosen(config))} |",
            flush=True,
        )


def print_compiled(students: list[TrainConfig], batch: int, rounds: int) -> None:
    """Print each student's chosen variant, with and without torch.compile."""
    print("| student | chosen | compiled | first step | won back after |\n" + "|---" * 5 + "|")
    for config in students:
        ways = [
            steps(config, *chosen(config), batch, compiled=compiled) for compiled in (False, True)
        ]
        (_, first), seconds = turns(ways, rounds)
        plain, compiled = (statistics.median(s) for s in seconds)
        back = (
            f"{(first - compiled) / (plain - compiled):.0f} steps" if compiled < plain else "never"
        )
        cells = [f"{1000 * plain:.0f} ms", over(seconds[1], seconds[0]), f"{first:.1f} s", back]
        print(f"| `{config.student.name}` | " + " | ".join(cells) + " |", flush=True)


def turns(ways: list[Iterator[float]], rounds: int) -> tuple[list[float], list[list[float]]]:
    """Return the seconds of each variant's first step, and of its steps in the later rounds."""
    found = [[next(way) for way in ways] for _ in range(rounds + 1)]
    return found[0], [list(column) for column in zip(*found[1:], strict=True)]


def over(seconds: list[float], of: list[float]) -> str:
    ratios = [a / b for a, b in zip(seconds, of, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def chosen(config: TrainConfig) -> tuple[torch.memory_format, bool]:
    return config.student.memory_format, config.precision == "bf16"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--students", default=STUDENTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trees = [
        {"objective": "ce", "student": student, "data": "cifar100"}
        for student in args.students.split(",")
    ]
    students = [validated(TrainConfig, tree) for tree in trees]
    (print_compiled if args.compile else print_table)(students, args.batch, args.rounds)


if __name__ == "__main__":
    main()
