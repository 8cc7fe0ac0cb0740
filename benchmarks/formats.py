"""Which memory format and precision make a network's step fast: forward, backward and optimizer on one batch.

    python benchmarks/formats.py [--students resnet18,mobilenet_v2] [--rounds 5] [--batch 64]

One thread, images of 32x32, 100 classes; the four ways take turns. Told is how long each takes against contiguous
float32 (median over the rounds, and their range), and what `tfkd` chooses on this machine.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from tfkd_ray.config import TrainConfig
from tfkd_ray.schema import validated

STUDENTS = (
    "mlp,cnn,cnn5,alexnet_small,vgg19_bn,resnet18,resnet50,resnext29,wide_resnet,densenet121,googlenet,"
    "mobilenet_v2,shufflenet_v2_x1_0"
)
K = 100
WAYS = [(layout, bf16) for bf16 in (False, True) for layout in (torch.contiguous_format, torch.channels_last)]


def steps(config: TrainConfig, layout: torch.memory_format, bf16: bool, batch: int) -> Iterator[float]:
    """Seconds of a step, each time it is asked."""
    student = config.student.build((3, 32, 32), K).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, K, (batch,))
    while True:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = student(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield time.perf_counter() - start


def name(layout: torch.memory_format, bf16: bool) -> str:
    return f"{'channels-last' if layout == torch.channels_last else 'contiguous'} {'bf16' if bf16 else 'fp32'}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--students", default=STUDENTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| student | " + " | ".join(name(*way) for way in WAYS) + " | chosen |\n" + "|---" * (len(WAYS) + 2) + "|")
    for student in args.students.split(","):
        config = validated(TrainConfig, {"objective": "ce", "student": student, "data": "cifar100"})
        ways = [steps(config, *way, args.batch) for way in WAYS]
        seconds = [[next(way) for way in ways] for _ in range(args.rounds + 1)][1:]
        cells = []
        for k in range(len(WAYS)):
            ratios = [s[k] / s[0] for s in seconds]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        cells[0] = f"{1000 * statistics.median(s[0] for s in seconds):.0f} ms"
        chosen = name(config.student.memory_format, config.precision == "bf16")
        print(f"| `{student}` | " + " | ".join(cells) + f" | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
