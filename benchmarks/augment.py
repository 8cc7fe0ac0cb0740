"""Time batched augmentation of 128 images of 32x32 on one core, beside torchvision's per-image one.

python benchmarks/augment.py
"""

import statistics
import time
from collections.abc import Callable

import torch
from torchvision import transforms

from tfkd_ray.learn.augment import Augment

PAPER = Augment(crop_padding=4, flip=True, rotation_degrees=15)


def milliseconds(run: Callable[[], object], repeats: int = 30) -> list[float]:
    """Return the times of `repeats` runs, after 3 warm-up runs."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1000)
    return times[3:]


def main() -> None:
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)
    view = PAPER.view(0, 0, 128)
    pil = [transforms.functional.to_pil_image(image) for image in images]
    theirs = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(15),
            transforms.PILToTensor(),
        ]
    )
    ours_ms, theirs_ms = [], []
    for _ in range(5):  # interleaved: the machine's speed drifts
        ours_ms += milliseconds(lambda: PAPER(images, view))
        theirs_ms += milliseconds(lambda: torch.stack([theirs(image) for image in pil]), 5)
    for name, times in (("batched, ours", ours_ms), ("per image, torchvision on PIL", theirs_ms)):
        print(
            f"{name}: median {statistics.median(times):.2f} ms, {min(times):.2f} to {max(times):.2f}, n {len(times)}"
        )
    print(f"ratio of medians: {statistics.median(theirs_ms) / statistics.median(ours_ms):.1f}")


if __name__ == "__main__":
    main()
