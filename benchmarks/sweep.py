"""Time whole sweeps beside the usual recipes: the same trials, one at a time, in turns.

    python benchmarks/sweep.py [--trials 24] [--epochs 6] [--repeats 2] [--ways ours,optuna,plain,nested]

    ours     `build_tuner`, as `tfkd tune` runs it, with its files, checkpoints and event files
    compiled  the same with `compile: on`; the first of these sweeps compiles, the others find it on the disk
    optuna   Optuna in one process, without Ray: a study that calls the usual loop
    plain    Tune with OptunaSearch and ASHA, the usual loop in a function trainable
    nested   the recipe of Ray's documentation: as plain, and in each trial a TorchTrainer that runs the loop

Random search over kd and tfkd_reg (alpha and temperature each) determines the trials by the seed
before any run. All train the same network on the same 2,000 images of Fashion-MNIST, cropped and
flipped, with one thread, and the same validation images; the teacher is trained before. The usual
loop has a DataLoader, PIL images, the teacher under no_grad in every step, and loss.item(); its
schedule is this package's, its seed the trial's number. ASHA's first rung is the last epoch, so
that all trials train the same number of epochs; the bank is emptied before each sweep. Printed are
the sweep's wall and CPU seconds (of the whole machine: run nothing else) after Ray's start, and
their parts.
"""

import argparse
import math
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "0")

import optuna
import psutil
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from tfkd_ray import build_tuner
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.run.connect import connect
from tfkd_ray.run.tune import train_teachers
from tfkd_ray.settings.files import cache_folder
from tfkd_ray.settings.schema import validated
from tfkd_ray.store.experiment import read_records
from tfkd_ray.store.storage import Directory

Trees = list[dict[str, Any]]
PARTS = ("images", "teacher", "student", "validation")


def space(trials: int, epochs: int) -> dict[str, Any]:
    alpha = {"low": 0.1, "high": 0.95}
    temperature = {"low": 1.5, "high": 20, "log": True}
    return {
        "data": {"name": "fashion_mnist", "subset": 2000},
        "student": {"name": "cnn", "widths": [16, 32]},
        "teacher": {"model": "cnn5", "epochs": 3},
        "objective": [
            {"name": "kd", "alpha": alpha, "temperature": temperature},
            {"name": "tfkd_reg", "alpha": alpha, "temperature": temperature},
        ],
        "epochs": epochs,
        "augment": {"crop_padding": 2, "flip": True},
        "optim": {"lr": 0.05, "batch_size": 64},
        "schedule": {"name": "cosine", "warmup_epochs": 0},
        "search": {
            "num_samples": trials, "sampler": "random", "stopping": "none", "split": False, "max_concurrent": 1,
            "warm_start": False, "baselines": False,
        },
    }  # fmt: skip


def usual_loop(
    config: dict[str, Any], report: Callable[[dict[str, Any]], Any] = tune.report
) -> None:
    """Train as most scripts do, in a trial, a worker of a TorchTrainer, or this process."""
    import torch.nn.functional as F
    from PIL import Image
    from torchvision import transforms as tv

    from tfkd_ray.learn.teachers import load_teacher

    torch.set_num_threads(1)
    torch.manual_seed(config["point"])
    run = validated(TrainConfig, config["points"][config["point"]])
    objective: Any = run.objective
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
    trained = run.teacher_run()
    teacher = load_teacher(trained, Path(config["storage"])) if trained else None
    loader = torch.utils.data.DataLoader(
        Pictures(train_set, varied), run.optim.batch_size, shuffle=True
    )
    judged = torch.utils.data.DataLoader(Pictures(val_set, to_tensor), 256)
    if config["way"] == "nested":
        from ray import train
        from ray.train.torch import prepare_data_loader, prepare_model

        student, loader, report = prepare_model(student), prepare_data_loader(loader), train.report
    optimizer = torch.optim.SGD(
        student.parameters(), lr=run.optim.lr, momentum=0.9, weight_decay=5e-4
    )
    steps = run.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * (step + 0.5) / steps)) / 2
    )
    spent: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))
    clock = time.perf_counter()

    def passed(part: str) -> None:
        nonlocal clock
        clock, before = time.perf_counter(), clock
        spent[part] += clock - before

    for _ in range(run.epochs):
        student.train()
        for images, labels in loader:
            passed("images")
            with torch.no_grad():
                if teacher is not None:
                    soft = teacher(images)
                else:
                    wrong = (1 - objective.correct_prob) / (run.data.num_classes - 1)
                    virtual = torch.full((len(labels), run.data.num_classes), wrong)
                    soft = virtual.scatter(1, labels.unsqueeze(1), objective.correct_prob).log()
            passed("teacher")
            logits, t = student(images), objective.temperature
            kd = F.kl_div(
                F.log_softmax(logits / t, 1), F.softmax(soft / t, 1), reduction="batchmean"
            )
            loss = (1 - objective.alpha) * F.cross_entropy(
                logits, labels
            ) + objective.alpha * t * t * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            schedule.step()
            passed("student")
        student.eval()
        with torch.no_grad():
            right = sum(
                int((student(images).argmax(1) == labels).sum()) for images, labels in judged
            )
        passed("validation")
        report({"val_accuracy": right / len(val_set), "point": config["point"], **spent})


def nested(config: dict[str, Any]) -> None:
    """Run a trial of the documentation's recipe."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        usual_loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=f"train-{tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def with_ray(config: dict[str, Any], storage: Path) -> Trees:
    """Return the last report of each trial of Tune with OptunaSearch."""
    points = list(range(len(config["points"])))
    search = OptunaSearch(
        {"point": optuna.distributions.CategoricalDistribution(points)},
        metric="val_accuracy",
        mode="max",
        sampler=optuna.samplers.GridSampler({"point": points}, seed=0),
    )
    epochs = config["points"][0]["epochs"]
    function, cpus = (nested, 0.01) if config["way"] == "nested" else (usual_loop, 1)
    tuner = tune.Tuner(
        tune.with_resources(function, {"CPU": cpus}),
        param_space=config,
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(search, 1),
            scheduler=ASHAScheduler(
                metric="val_accuracy", mode="max", max_t=epochs, grace_period=epochs
            ),
            num_samples=len(points),
        ),
        run_config=tune.RunConfig(name=f"e{time.time_ns()}", storage_path=str(storage), verbose=0),
    )
    return [dict(result.metrics or {}) for result in tuner.fit()]


def with_optuna(config: dict[str, Any]) -> Trees:
    """Return the last report of each trial of a study in this process."""
    points = list(range(len(config["points"])))
    found: Trees = []

    def objective(trial: optuna.Trial) -> float:
        reports: Trees = []
        usual_loop({**config, "point": trial.suggest_categorical("point", points)}, reports.append)
        found.append(reports[-1])
        return float(reports[-1]["val_accuracy"])

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.GridSampler({"point": points}, seed=0)
    optuna.create_study(direction="maximize", sampler=sampler).optimize(
        objective, n_trials=len(points)
    )
    return found


def with_ours(trials: int, epochs: int, storage: Path, **changes: Any) -> Trees:
    shutil.rmtree(cache_folder(), ignore_errors=True)
    name = f"ours-{time.time_ns()}"
    build_tuner(space(trials, epochs) | changes, name=name, storage=storage).fit()
    records = read_records(storage / name)
    return [{**r.metrics[-1], "epochs": sum(m["seconds"] for m in r.metrics)} for r in records]


def accuracies(found: Trees) -> list[float]:
    """Return accuracies in the order of the points."""
    return [f["val_accuracy"] for f in sorted(found, key=lambda f: f.get("point", 0))]


def busy() -> float:
    """Return CPU seconds of this machine, nice ones included: Ray's workers are nice."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--ways", default="ours,optuna,plain,nested", help="ours among them; compiled, too"
    )
    args = parser.parse_args()
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    last: dict[str, Trees] = {}
    with tempfile.TemporaryDirectory() as name:
        storage = Path(name)
        os.environ |= {
            "XDG_CACHE_HOME": name,
            "TORCHINDUCTOR_CACHE_DIR": f"{name}/compiled",
        }  # also in trials
        connect(workers=2)  # with the dashboard, which cleaning up nested trainers needs
        tuner = build_tuner(
            space(args.trials, 1), name="points", storage=storage
        )  # warm-up, and the points
        tuner.fit()
        points = [{**r.config, "epochs": args.epochs} for r in read_records(storage / "points")]
        for point in points:
            point.pop("trial", None)
        config = {"points": points, "storage": str(storage)}
        if "compiled" in args.ways.split(
            ","
        ):  # with its own teacher: compiled numbers differ in the last digit
            runs = [
                validated(TrainConfig, point | {"compile": "on"}).teacher_run() for point in points
            ]
            train_teachers([run for run in runs if run], Directory(storage))
        for _ in range(args.repeats):
            for way in args.ways.split(","):
                start, before = time.perf_counter(), busy()
                if way == "ours":
                    found = with_ours(args.trials, args.epochs, storage)
                elif way == "compiled":
                    found = with_ours(args.trials, args.epochs, storage, compile="on")
                elif way == "optuna":
                    found = with_optuna({**config, "way": way})
                else:
                    found = with_ray({**config, "way": way}, storage)
                wall.setdefault(way, []).append(time.perf_counter() - start)
                processor.setdefault(way, []).append(busy() - before)
                last[way] = found
                assert len(found) == args.trials, f"{way}: {len(found)} trials"
                best = max(f["val_accuracy"] for f in found)
                print(
                    f"{way:8} {wall[way][-1]:7.1f} s, processors {processor[way][-1]:7.1f} s, best {best:.4f}",
                    flush=True,
                )
    print(
        f"{args.trials} trials of {args.epochs} epochs, ray {ray.__version__}, torch {torch.__version__}"
    )
    for way, seconds in wall.items():
        ratios = [s / o for s, o in zip(seconds, wall["ours"], strict=True)]
        print(
            f"{way:8} {statistics.median(seconds):7.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), "
            f"{statistics.median(ratios):.1f} times ours ({min(ratios):.1f} to {max(ratios):.1f}), "
            f"processors {statistics.median(processor[way]):.1f} s, best {max(accuracies(last[way])):.4f}"
        )
        differences = [
            b - a for a, b in zip(accuracies(last["ours"]), accuracies(last[way]), strict=True)
        ]
        if way != "ours":
            mean = statistics.mean(differences)
            half = 2.07 * statistics.stdev(differences) / len(differences) ** 0.5
            print(
                f"        accuracy over ours, by points: {mean:+.4f} (95 %: {mean - half:+.4f} to {mean + half:+.4f})"
            )
        parts = {
            part: sum(f[part] for f in last[way])
            for part in (["epochs"] if "epochs" in last[way][0] else PARTS)
        }
        parts["beside"] = seconds[-1] - sum(parts.values())
        print("        of the last: " + ", ".join(f"{part} {s:.1f} s" for part, s in parts.items()))


if __name__ == "__main__":
    main()
