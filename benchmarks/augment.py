"""Time batched augmentation of 128 images of 32x32 on one core, beside torchvision's per-image one.

python benchmarks/augment.py

The first part is the paper's augmentation beside torchvision's transforms. The second part is every
ingredient alone and all of them together, for 128 images of an epoch: all its steps of training from
memory, their reading included, divided by their number. With mixup or cutmix an image is seen twice,
as itself and as a partner. The third part is what mixing costs a streamed folder of JPEGs. All times
are of one thread's CPU, so that other jobs on the machine count less.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from data import write_jpegs
from torchvision import transforms

from tfkd_ray.learn.augment import Augment, RandAugment
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.image_files import ImageFolder
from tfkd_ray.learn.images import ImageSet
from tfkd_ray.learn.loop import _seen
from tfkd_ray.settings.schema import validated

PAPER = Augment(crop_padding=4, flip=True, rotation_degrees=15)
ALL = {
    "crop_padding": 4,
    "flip": True,
    "rotation_degrees": 15,
    "erase": 0.25,
    "mixup": 0.2,
    "cutmix": 1.0,
}
ALONE = {
    "none: to float, and normalised": Augment(),
    "crop and flip": Augment(crop_padding=4, flip=True),
    "crop, flip and rotation": PAPER,
    "trivial": Augment(trivial=True),
    "rand, 2 operations": Augment(rand=RandAugment()),
    "erase": Augment(erase=0.25),
    "mixup": Augment(mixup=0.2),
    "cutmix": Augment(cutmix=1.0),
    "all with trivial": Augment(**ALL, trivial=True),
    "all with rand, 2 operations": Augment(**ALL, rand=RandAugment()),
}
BATCH, COUNT = 128, 1024


def milliseconds(run: Callable[[], object], repeats: int = 30) -> list[float]:
    """Return the times of `repeats` runs, after 3 warm-up runs."""
    times = []
    for _ in range(repeats + 3):
        start = time.process_time()
        run()
        times.append((time.process_time() - start) * 1000)
    return times[3:]


def epoch_of(augment: Augment, images: ImageSet) -> Callable[[], object]:
    """Return the function that makes all batches of an epoch, as training does."""
    tree = {"objective": "ce", "data": "cifar10", "augment": augment.model_dump()}
    config = validated(TrainConfig, tree)
    view = augment.of_epoch(0, 0, images, (32, 32))
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    scale = [torch.full((1, 3, 1, 1), level) for level in (120.0, 60.0)]

    def made() -> None:
        for _ in _seen(images, config, scale, view, list(order.split(BATCH))):
            pass

    return made


def show(name: str, times: list[float]) -> None:
    print(
        f"{name}: median {statistics.median(times):.2f} ms, {min(times):.2f} to {max(times):.2f}, n {len(times)}",
        flush=True,
    )


def beside_torchvision() -> None:
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    view = PAPER.view(0, 0, BATCH)
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
    show("batched, ours", ours_ms)
    show("per image, torchvision on PIL", theirs_ms)
    print(f"ratio of medians: {statistics.median(theirs_ms) / statistics.median(ours_ms):.1f}")


def each_ingredient() -> None:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (COUNT, 3, 32, 32), dtype=torch.uint8, generator=g)
    at = torch.arange(COUNT)
    images = ImageSet(pixels, at % 10, at, COUNT)
    times: dict[str, list[float]] = {name: [] for name in ALONE}
    made = {name: epoch_of(augment, images) for name, augment in ALONE.items()}
    for _ in range(10):
        for name, run in made.items():
            epochs = milliseconds(run, 5)
            times[name] += [epoch * BATCH / COUNT for epoch in epochs]
    for name, found in times.items():
        show(name, found)


def streamed() -> None:
    """Show the images that a second of CPU decodes, alone and with their partners."""
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder))
        data = ImageFolder(root=Path(folder), num_classes=2, readers=1, val_fraction=0.0)
        images, _ = data.load()
        rates: dict[str, list[float]] = {"alone": [], "with partners": []}
        for _ in range(5):
            for name, augment in (("alone", Augment()), ("with partners", Augment(mixup=0.2))):
                _, mix = augment.of_epoch(0, 0, images, data.shape[1:])
                plans = torch.arange(len(images)).split(50)
                read = [p if mix is None else torch.cat([p, mix.partner[p]]) for p in plans]
                start = time.process_time()
                list(images.read(read))
                rates[name].append(len(images) / (time.process_time() - start))
        for name, found in rates.items():
            print(
                f"JPEGs of 500x400, {name}: median {statistics.median(found):.0f} images/s of CPU, {min(found):.0f} to "
                f"{max(found):.0f}, n {len(found)}"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    beside_torchvision()
    each_ingredient()
    streamed()
