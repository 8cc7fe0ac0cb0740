"""Time a training step beside other loops with the same networks and images, on one thread.

    python benchmarks/step.py [--student resnet18] [--teacher resnet50] [--batch 64] [--rounds 7] [--steps 6]
                              [--loops NAME,NAME] [--cpu-time] [--profile] [--gpu]

Every loop trains the same student with batches of images of 32x32 in 100 classes (synthetic files
in CIFAR-100's format), cropped, flipped and rotated, by SGD with momentum. A round is `--steps`
steps of each loop, one loop after another; printed are medians over all rounds but the first:
images a second, and the ratio to this package's loop.

    ours        this package's loop, as trials run it: `precision: auto`; the teacher's logits from a filled bank
    ours fp32   the same in float32, where that is another
    usual       DataLoader, transforms of PIL images, the teacher under no_grad, loss.item(), as most scripts have it
    usual 2     the same with 2 processes in its DataLoader: they have the second core, which nothing else has
    timm        timm's loader and, with a teacher, its LogitDistillationTask, as its train.py drives them
    torchdistill  its TrainingBox and DistillationBox (pip install '.[bench]' has both)
    bare        forward, backward and optimizer of the same net on one batch that stays: what cannot be saved
    ours adamw, bare adamw   both with torch's fused AdamW
    ours ema    with an average of the weights, which validation of no images does not judge

`--loops "ours adamw,bare adamw"` runs these alone, and compares with the first. `--cpu-time` counts the process's CPU
seconds, where other jobs share the core.

`--profile` instead prints, by torch's profiler, the operations in which our step takes longer than
bare.
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from data import write_cifar100

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.loop import train
from tfkd_ray.learn.official import Cifar100
from tfkd_ray.learn.soft_labels import Bank
from tfkd_ray.settings.schema import validated

BATCH = 64
"""Images of a step, set by --batch."""
K, T, ALPHA = 100, 4.0, 0.9
ON_GPU = False
"""True with --gpu: all loops run on the first CUDA device."""
CPU_TIME = False
"""True with --cpu-time: CPU seconds of this process instead of those of the clock."""
Round = Iterator[float]
"""Yields the seconds an image of `steps` steps on each request."""


def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


def now() -> float:
    """Return seconds after the device has finished its work."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.process_time() if CPU_TIME else time.perf_counter()


class Pictures(torch.utils.data.Dataset[Any]):
    """A PIL image of each array, and its label, as torchvision's data sets return them."""

    def __init__(self, data: Cifar100, transform: Any) -> None:
        images = data.load()[0]
        self.arrays = images.images.permute(0, 2, 3, 1).numpy()  # type: ignore[union-attr]
        self.labels = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.arrays[index])
        return (self.transform(image) if self.transform else image), self.labels[index]


def transforms(data: Cifar100) -> Any:
    """Return the transforms of the Tf-KD authors' code."""
    from torchvision import transforms as tv  # type: ignore[import-untyped]

    mean, std = ([value / 255 for value in values] for values in (data.mean, data.std))
    steps = [
        tv.RandomCrop(32, padding=4),
        tv.RandomHorizontalFlip(),
        tv.RandomRotation(15),
        tv.ToTensor(),
    ]
    return tv.Compose([*steps, tv.Normalize(mean, std)])


class Case:
    """One student, with one teacher or none."""

    def __init__(self, data: Cifar100, student: str, teacher: str | None, steps: int) -> None:
        self.data, self.steps = (
            data.model_copy(update={"subset": steps * BATCH, "val_fraction": 0.0}),
            steps,
        )
        objective: dict[str, Any] = (
            {"name": "kd", "alpha": ALPHA, "temperature": T} if teacher else {"name": "ce"}
        )
        self.tree = {
            "data": self.data.model_dump(mode="json"),
            "student": student,
            "objective": objective,
            "teacher": {"model": teacher, "labels": "bank"} if teacher else None,
            "augment": {"crop_padding": 4, "flip": True, "rotation_degrees": 15},
            "optim": {"lr": 0.05, "batch_size": BATCH},
            "epochs": 1000,
        }

        if ON_GPU:
            self.tree |= {"gpus_per_worker": 1}

    def config(self, **changes: Any) -> TrainConfig:
        return validated(TrainConfig, self.tree | changes)

    def student(self) -> nn.Module:
        return self.config().student.build((3, 32, 32), K).to(device())

    def teacher(self) -> nn.Module | None:
        run = self.config().teacher_run()
        return (
            run.student.build((3, 32, 32), K).to(device()).eval().requires_grad_(False)
            if run
            else None
        )


def ours(case: Case, rounds: int, folder: Path, **changes: Any) -> Round:
    """Yield a round of this package's loop, an epoch; the bank is filled first, as in a sweep."""
    config = case.config(**changes)
    bank = Bank(lambda: case.teacher() or nn.Identity(), {"changes": str(changes)}, folder)
    if config.banked:
        fill = config.model_copy(update={"epochs": rounds})
        for _ in train(fill, teacher=bank):
            pass
    images = case.steps * BATCH
    epochs = train(config, teacher=bank)
    while True:
        start = now()
        metrics = next(epochs).metrics
        cpu_seconds = (now() - start) / images  # with all that an epoch does beside its steps
        # on a GPU the epoch's own events take the time
        yield cpu_seconds if CPU_TIME else 1 / metrics["images_per_s"]


def endless(loader: Any) -> Iterator[Any]:
    assert len(loader), "fewer images than a batch: more --steps"
    while True:
        yield from loader


def usual(case: Case, processes: int = 0) -> Round:
    """Yield rounds of the loop of most scripts."""
    student, teacher = case.student().train(), case.teacher()
    pictures = Pictures(case.data, transforms(case.data))
    keep = {"num_workers": processes, "persistent_workers": processes > 0}
    batches = endless(
        torch.utils.data.DataLoader(pictures, BATCH, shuffle=True, drop_last=True, **keep)
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    while True:
        start, count = now(), 0
        for _ in range(case.steps):
            images, labels = (t.to(device(), non_blocking=True) for t in next(batches))
            count += len(images)
            logits = student(images)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    soft = teacher(images)
                kd = F.kl_div(
                    F.log_softmax(logits / T, 1), F.softmax(soft / T, 1), reduction="batchmean"
                )
                loss = (1 - ALPHA) * loss + ALPHA * T * T * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        yield (now() - start) / count


def timms(case: Case) -> Round:
    """Yield rounds of timm's loader, with its task if there is a teacher."""
    import timm.data
    import timm.optim
    from timm.task import LogitDistillationTask

    student, teacher = case.student().train(), case.teacher()
    mean, std = (
        tuple(value / 255 for value in values) for values in (case.data.mean, case.data.std)
    )
    loader = timm.data.create_loader(
        Pictures(case.data, None),  # type: ignore[arg-type]
        (3, 32, 32), BATCH, is_training=True, color_jitter=0.0, train_crop_mode="rkrc", mean=mean, std=std,
        num_workers=0, persistent_workers=False, use_prefetcher=False, device=device(),
    )  # fmt: skip
    loader.dataset.transform = transforms(case.data)  # the same images as the other loops
    batches = endless(loader)
    optimizer = timm.optim.create_optimizer_v2(
        student, "momentum", lr=0.05, weight_decay=5e-4, momentum=0.9
    )
    task: Any = None
    if teacher is not None:
        for network in (student, teacher):
            about = {"pretrained_cfg": {"mean": mean, "std": std}, "num_classes": K, "in_chans": 3}
            network.__dict__.update(about)  # an attribute of timm's own networks
        task = LogitDistillationTask(
            student,
            teacher,
            task_loss_weight=1 - ALPHA,
            distill_loss_weight=ALPHA,
            temperature=T,
            verbose=False,
        ).train()
    while True:
        start, count = now(), 0
        for _ in range(case.steps):
            images, labels = (t.to(device(), non_blocking=True) for t in next(batches))
            count += len(images)
            loss = (
                task(images, labels)["loss"]
                if task is not None
                else F.cross_entropy(student(images), labels)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield (now() - start) / count


def torchdistills(case: Case) -> Round:
    """Yield rounds of torchdistill's boxes, used as in its examples."""
    from torchdistill.core.distillation import get_distillation_box  # type: ignore[import-not-found]
    from torchdistill.core.training import get_training_box  # type: ignore[import-not-found]

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    student, teacher = case.student(), case.teacher()
    sampler = {"class_or_func": torch.utils.data.RandomSampler}
    loader = {"dataset_id": "train", "sampler": sampler, "kwargs": {"batch_size": BATCH}}
    optimizer = {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}}
    common = {
        "num_epochs": 1,
        "train_data_loader": loader,
        "val_data_loader": loader,
        "optimizer": optimizer,
    }
    datasets = {"train": Pictures(case.data, transforms(case.data))}
    network = {"requires_grad": True, "forward_proc": "forward_batch_only"}
    output = {"student_module_path": ".", "student_module_io": "output"}
    if teacher is not None:
        output |= {"teacher_module_path": ".", "teacher_module_io": "output"}
        kd = {**output, "temperature": T, "alpha": 1 - ALPHA, "reduction": "batchmean"}
        term: dict[str, Any] = {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}
        networks = {"teacher": {**network, "requires_grad": False}, "student": network}
    else:
        given = {"is_from_teacher": False, "module_path": ".", "io": "output"}
        wrapper = {
            "key": "SimpleLossWrapper",
            "kwargs": {"input": given, "target": {"uses_label": True}},
        }
        plain = {"key": "CrossEntropyLoss", "kwargs": {}}
        term = {"criterion": plain, "criterion_wrapper": wrapper, "weight": 1.0}
        networks = {"model": network}
    config = {
        **common,
        **networks,
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"loss": term}}},
    }
    if teacher is not None:
        box = get_distillation_box(teacher, student, datasets, config, device(), None, False, 1)
    else:
        box = get_training_box(student, datasets, config, device(), None, False, 1)
    while True:
        start, count = now(), 0
        box.pre_epoch_process(epoch=0)
        for batch in box.train_data_loader:
            images, labels = (t.to(device(), non_blocking=True) for t in batch[:2])
            count += len(images)
            loss = box.forward_process(images, labels, batch[2] if len(batch) > 2 else None)
            box.post_forward_process(loss)
        yield (now() - start) / count


def bare(case: Case, precision: str, *, adamw: bool = False) -> Round:
    """Yield rounds of the arithmetic alone."""
    network = case.config().student
    student = case.student().to(memory_format=network.memory_format).train()
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True
    )
    if adamw:
        optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.05, fused=True)  # type: ignore[assignment]
    images, labels = (
        torch.randn(BATCH, 3, 32, 32, device=device()),
        torch.randint(0, K, (BATCH,), device=device()),
    )
    while True:
        start = now()
        for _ in range(case.steps):
            with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
                logits = student(images)
            loss: Tensor = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield (now() - start) / (case.steps * BATCH)


def measure(loops: dict[str, Round], rounds: int) -> dict[str, list[float]]:
    """Return the seconds an image of each round but the first."""
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name, loop in loops.items():
            seconds = next(loop)
            if number:
                found[name].append(seconds)
    return found


def loops_of(
    case: Case, teacher: str | None, rounds: int, folder: Path, only: list[str]
) -> dict[str, Round]:
    """Return the loops that can run here, by name: all, or those of `only`, in its order."""
    precision = case.config().precision
    makers: dict[str, Callable[[], Round]] = {
        "ours": lambda: ours(case, rounds, folder),
        "usual": lambda: usual(case),
        "usual 2": lambda: usual(case, processes=2),
        "timm": lambda: timms(case),
        "torchdistill": lambda: torchdistills(case),
        "bare": lambda: bare(case, precision),
    }
    if precision != "fp32":
        makers["ours fp32"] = lambda: ours(case, rounds, folder, precision="fp32")
        makers["bare fp32"] = lambda: bare(case, "fp32")
    if teacher is None:
        optim = {"name": "adamw", "batch_size": BATCH}
        makers["ours adamw"] = lambda: ours(case, rounds, folder, optim=optim)
        makers["bare adamw"] = lambda: bare(case, precision, adamw=True)
        makers["ours ema"] = lambda: ours(case, rounds, folder, ema={})
        for name, objective in (("tfkd_reg", {"name": "tfkd_reg"}), ("lsr", {"name": "lsr"})):
            makers[f"ours {name}"] = lambda o=objective: ours(case, rounds, folder, objective=o)  # type: ignore[misc]
    else:
        plain = {"objective": {"name": "ce"}, "teacher": None}
        makers["ours ce"] = lambda: ours(case, rounds, folder, **plain)
    found = {}
    for name in only or makers:
        if name not in makers:
            continue
        try:
            loop = makers[name]()
            next(loop)
            found[name] = loop
        except ImportError as error:
            print(f"  {name:14} left out: {error}", flush=True)
    return found


def operations(loop: Round) -> tuple[Counter[str], float]:
    """Return the milliseconds of a round by torch operation, and in total, under the profiler."""
    next(loop)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = now()
        next(loop)
        seconds = now() - start  # without the profiler's own work at its end
    return Counter(
        {e.key: e.self_cpu_time_total / 1000 for e in profile.key_averages()}
    ), 1000 * seconds


def print_profile(case: Case, folder: Path) -> None:
    """Print the operations in which this package's loop takes longer than bare."""
    (mine, whole), (least, all_of_it) = (
        operations(loop) for loop in (ours(case, 4, folder), bare(case, case.config().precision))
    )
    share = len(case.data.load()[0]) / (
        case.steps * BATCH
    )  # ours takes all images, bare only whole batches
    least, all_of_it = (
        Counter({name: spent * share for name, spent in least.items()}),
        all_of_it * share,
    )  # type: ignore[misc]
    print(
        f"  ours {whole:.1f} ms a round, with validation of nothing; bare {all_of_it:.1f} ms; more in ours:"
    )
    more = Counter({name: spent - least[name] for name, spent in mine.items()})
    for name, spent in more.most_common(8):
        print(f"    {name:45} {spent:7.2f} ms ({spent / all_of_it:.1%} of bare)")
    outside = whole - all_of_it - (sum(mine.values()) - sum(least.values()))
    print(f"    {'outside of operations':45} {outside:7.2f} ms ({outside / all_of_it:.1%} of bare)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--loops", default="", help="names, with commas between them")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--gpu", action="store_true", help="on the first CUDA device")
    args = parser.parse_args()
    global ON_GPU, BATCH, CPU_TIME
    ON_GPU, BATCH, CPU_TIME = args.gpu, args.batch, args.cpu_time
    only = [name for name in args.loops.split(",") if name]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = name
        write_cifar100(folder)
        data = Cifar100(root=folder, check_md5=False)
        for teacher in (None, args.teacher):
            case = Case(data, args.student, teacher, args.steps)
            where = torch.cuda.get_device_name() if ON_GPU else platform.machine()
            print(
                f"{args.student}, teacher {teacher}, precision {case.config().precision}, torch {torch.__version__}, "
                f"{where}; {args.rounds - 1} rounds of {args.steps} steps of {BATCH} images",
                flush=True,
            )
            if args.profile:
                print_profile(case, folder / "bank")
                continue
            loops = loops_of(case, teacher, args.rounds + 2, folder / "bank", only)
            found = measure(loops, args.rounds)
            for loop, seconds in found.items():
                first = next(iter(found))
                ratio = [s / o for s, o in zip(seconds, found[first], strict=True)]
                print(
                    f"  {loop:14} {1 / statistics.median(seconds):8.1f} images/s   takes "
                    f"{statistics.median(ratio):6.3f} of {first} (rounds {min(ratio):.3f} to {max(ratio):.3f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
