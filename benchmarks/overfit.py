"""Print how many of its own train images each trained run of an experiment gets right.

    python benchmarks/overfit.py tfkd_results/NAME

The images are not augmented, and the network is in evaluation mode. An objective or arm has a row:
mean, standard deviation and range over its runs of full length.
"""

import argparse
import statistics
from pathlib import Path

import torch

from tfkd_ray.learn.checkpoint import WEIGHTS, load_weights
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.evaluate import predictions
from tfkd_ray.settings.schema import validated
from tfkd_ray.store.experiment import read_records


def train_accuracy(config: TrainConfig, weights: Path) -> float:
    """Return the share of the run's train images that its student gets right."""
    student = config.build_student()
    student.load_state_dict(load_weights(weights, network=student))
    student.eval()
    train_set, _ = config.data.load()
    right = 0
    with torch.inference_mode():
        for logits, labels in predictions(student, train_set, config.data):
            right += int((logits.argmax(dim=1) == labels).sum())
    return right / len(train_set)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    directory = parser.parse_args().experiment
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for record in read_records(directory):
        if record.status == "done":
            name = str(record.parameters.get("arm", record.objective))
            config = validated(TrainConfig, record.config)
            found.setdefault(name, []).append(train_accuracy(config, record.folder / WEIGHTS))
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(
            f"{name}: {100 * statistics.mean(values):.2f} ± {100 * spread:.2f} %, "
            f"{100 * min(values):.2f} to {100 * max(values):.2f}, n {len(values)}"
        )


if __name__ == "__main__":
    main()
