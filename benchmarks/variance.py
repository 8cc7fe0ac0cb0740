"""What takes variance off a lead: pairing by seed, a shared teacher, and strata of test images.

    tfkd confirm ARMS.yaml --seeds 20 --name shared
    tfkd confirm ARMS.yaml --seeds 20 --name own-teachers --teacher-per-seed
    python benchmarks/variance.py tfkd_results/shared tfkd_results/own-teachers

Reads judged comparisons; trains nothing. For each arm, its lead over the first arm:

- over seeds: the standard deviation of the paired lead, and what is left of the variance that two
  independent groups of runs would have (95 % interval of 2,000 bootstrap samples of the seeds).
  Below 1, pairing saves that share of the seeds.
- over test images: what is left of the variance of the mean lead if each class keeps its number of
  images (strata), instead of a sample of all images.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tfkd_ray.space.arms import read_comparison
from tfkd_ray.store.experiment import trials_folder

SAMPLES = 2000


def answers(directory: Path) -> tuple[dict[str, dict[int, NDArray[np.bool_]]], NDArray[np.int64]]:
    """Return which test images each run classified correctly, by arm and seed, and the labels."""
    found: dict[str, dict[int, NDArray[np.bool_]]] = {}
    labels = np.zeros(0, dtype=np.int64)
    for run in read_comparison(directory).runs:
        path = trials_folder(directory) / run.name / "test.safetensors"
        if path.exists():
            arrays = load_file(path)
            labels = arrays["labels"]
            right = arrays["logits"].argmax(axis=1) == labels
            found.setdefault(run.arm, {})[run.seed] = right
    return found, labels


def kept_by_pairing(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return Var(a - b) / (Var(a) + Var(b)) over seeds; NaN if neither varies."""
    both = a.var(axis=-1, ddof=1) + b.var(axis=-1, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a - b).var(axis=-1, ddof=1) / both


def kept_by_strata(leads: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the variance of the mean lead with classes as strata over that without.

    Args:
        leads: [N], the mean lead of each test image over the seeds.
        labels: [N].
    """
    within = 0.0
    for label in np.unique(labels):
        part = leads[labels == label]
        within += len(part) * part.var(ddof=1) if len(part) > 1 else 0.0
    return within / (len(leads) * leads.var(ddof=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("comparisons", nargs="+", type=Path)
    rng = np.random.default_rng(0)
    for directory in parser.parse_args().comparisons:
        found, labels = answers(directory)
        base, *arms = found
        print(f"{directory.name}: leads over {base} in points, {len(labels)} test images")
        print(
            "| arm | n | deviation of the lead | unpaired | left by pairing (95 %) | left by strata |"
        )
        print("|---|---:|---:|---:|---:|---:|")
        for arm in arms:
            seeds = sorted(found[base].keys() & found[arm].keys())
            a, b = (100 * np.stack([found[x][seed] for seed in seeds]) for x in (arm, base))
            over_seeds = a.mean(axis=1), b.mean(axis=1)
            picked = rng.integers(len(seeds), size=(SAMPLES, len(seeds)))
            low, high = np.nanquantile(
                kept_by_pairing(*(x[picked] for x in over_seeds)), (0.025, 0.975)
            )
            paired = (over_seeds[0] - over_seeds[1]).std(ddof=1)
            unpaired = np.sqrt(sum(x.var(ddof=1) for x in over_seeds))
            strata = kept_by_strata((a - b).mean(axis=0), labels)
            print(
                f"| {arm} | {len(seeds)} | {paired:.2f} | {unpaired:.2f} | {kept_by_pairing(*over_seeds):.2f} "
                f"({low:.2f} to {high:.2f}) | {strata:.2f} |"
            )


if __name__ == "__main__":
    main()
