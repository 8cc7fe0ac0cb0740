"""What a whole sweep costs against the recipes at hand: the same trials, one at a time, in turns.

    python benchmarks/sweep.py [--trials 8] [--epochs 6] [--repeats 3]

    ours     `build_tuner`, as `tfkd tune` runs it, with its files, checkpoints and event files
    nested   the recipe of Ray's documentation: Tune with OptunaSearch, and in each trial a TorchTrainer whose loop has
             a DataLoader and reports every epoch
    plain    the same loop in a function trainable, without a TorchTrainer

All train the same network on the same 2,000 images of Fashion-MNIST with the same learning rates (a grid), cropped
and flipped, and judge it on the same validation images. Printed are seconds of the sweep, Ray being up, and the best
accuracy.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "0")

import optuna
import ray
import torch
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from tfkd_ray import build_tuner
from tfkd_ray.cluster import connect

STUDENT = {"name": "cnn", "widths": [16, 32]}
DATA = {"name": "fashion_mnist", "subset": 2000}


def rates(trials: int) -> list[float]:
    return [round(0.02 * 1.5**k, 4) for k in range(trials)]


def usual_loop(config: dict[str, Any]) -> None:
    """A training loop as most scripts have it; runs in a trial, or in a worker of a TorchTrainer."""
    import torch.nn.functional as F
    from PIL import Image
    from torchvision import transforms as tv

    from tfkd_ray.config import TrainConfig
    from tfkd_ray.schema import validated

    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = validated(TrainConfig, {"objective": "ce", "student": STUDENT, "data": DATA})
    train_set, val_set = run.data.load()
    assert val_set is not None
    mean, std = ([value / 255 for value in values] for values in run.data.statistics())
    to_tensor = tv.Compose([tv.ToTensor(), tv.Normalize(mean, std)])
    varied = tv.Compose([tv.RandomCrop(28, padding=2), tv.RandomHorizontalFlip(), to_tensor])

    class Pictures(torch.utils.data.Dataset[Any]):
        def __init__(self, images: Any, transform: Any) -> None:
            self.images, self.labels = images.images[:, 0].numpy(), images.labels.tolist()
            self.transform = transform

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> Any:
            return self.transform(Image.fromarray(self.images[index])), self.labels[index]

    student: torch.nn.Module = run.student.build(run.data.shape, run.data.num_classes)
    loader = torch.utils.data.DataLoader(Pictures(train_set, varied), 64, shuffle=True)
    judged = torch.utils.data.DataLoader(Pictures(val_set, to_tensor), 256)
    report = tune.report
    if config.get("nested"):
        from ray import train
        from ray.train.torch import prepare_data_loader, prepare_model

        student, loader, report = prepare_model(student), prepare_data_loader(loader), train.report
    optimizer = torch.optim.SGD(student.parameters(), lr=config["lr"], momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"])
    for _ in range(config["epochs"]):
        student.train()
        for images, labels in loader:
            loss = F.cross_entropy(student(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        schedule.step()
        student.eval()
        with torch.no_grad():
            right = sum(int((student(images).argmax(1) == labels).sum()) for images, labels in judged)
        report({"val_accuracy": right / len(val_set)})


def nested(config: dict[str, Any]) -> None:
    """A trial of the documentation's recipe."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        usual_loop,
        train_loop_config={**config, "nested": True},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=f"train-{tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def with_ray(function: Any, cpus: float, trials: int, epochs: int, storage: Path) -> float:
    """The best accuracy that Tune with OptunaSearch finds."""
    search = OptunaSearch(
        {"lr": optuna.distributions.CategoricalDistribution(rates(trials))},
        metric="val_accuracy",
        mode="max",
        sampler=optuna.samplers.GridSampler({"lr": rates(trials)}, seed=0),
    )
    tuner = tune.Tuner(
        tune.with_resources(function, {"CPU": cpus}),
        param_space={"epochs": epochs, "storage": str(storage)},
        tune_config=tune.TuneConfig(
            metric="val_accuracy", mode="max", search_alg=ConcurrencyLimiter(search, 1), num_samples=trials
        ),
        run_config=tune.RunConfig(name=f"e{time.time_ns()}", storage_path=str(storage), verbose=0),
    )
    return float(tuner.fit().get_best_result().metrics["val_accuracy"])


def ours(trials: int, epochs: int, storage: Path) -> Any:
    """A Tuner of ours over the same grid."""
    space = {
        "data": DATA,
        "student": STUDENT,
        "objective": "ce",
        "epochs": epochs,
        "augment": {"crop_padding": 2, "flip": True},
        "optim": {"lr": {"choices": rates(trials)}, "batch_size": 64},
        "schedule": {"name": "cosine", "warmup_epochs": 0},
        "search": {"sampler": "grid", "stopping": "none", "max_concurrent": 1, "warm_start": False},
    }
    return build_tuner(space, name=f"ours-{time.time_ns()}", storage=storage)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    connect(workers=2)  # with the dashboard, which nested trainers need to be cleaned up
    seconds: dict[str, list[float]] = {}
    best: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        storage = Path(name)
        for _ in range(args.repeats):
            for way in ("ours", "plain", "nested"):
                start = time.perf_counter()
                if way == "ours":
                    grid = ours(args.trials, args.epochs, storage).fit()
                    value = float(grid.get_best_result().metrics["val_accuracy"])
                elif way == "plain":
                    value = with_ray(usual_loop, 1, args.trials, args.epochs, storage)
                else:
                    value = with_ray(nested, 0.01, args.trials, args.epochs, storage)
                seconds.setdefault(way, []).append(time.perf_counter() - start)
                best.setdefault(way, []).append(value)
                print(f"{way:7} {seconds[way][-1]:7.1f} s   best {value:.4f}", flush=True)
    print(f"{args.trials} trials of {args.epochs} epochs, ray {ray.__version__}, torch {torch.__version__}")
    for way, found in seconds.items():
        ratios = [s / o for s, o in zip(found, seconds["ours"], strict=True)]
        print(
            f"{way:7} {statistics.median(found):7.1f} s ({min(found):.1f} to {max(found):.1f}), "
            f"{statistics.median(ratios):.1f} times ours ({min(ratios):.1f} to {max(ratios):.1f}), "
            f"best {min(best[way]):.4f} to {max(best[way]):.4f}"
        )


if __name__ == "__main__":
    main()
