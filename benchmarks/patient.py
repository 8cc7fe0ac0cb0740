"""The comparison of `fashion_patient_arms` for another student, with its own tuned settings.

    tfkd tune fashion_patient_plain student=cnn5 'teacher.model={name: cnn5, width: 2}' --name plain-cnn5
    tfkd tune fashion_patient student=cnn5 'teacher.model={name: cnn5, width: 2}' --name patient-cnn5
    python benchmarks/patient.py tfkd_results/patient-cnn5 tfkd_results/plain-cnn5 > arms.yaml
    tfkd confirm arms.yaml --seeds 5 --train-only

Prints an arms file: the best full-length trial of kd, ce and lsr of each sweep. The yardstick is that
of `fashion_patient_arms`: kd of the first sweep is the only candidate, and is better if it beats kd of
the second, and ce and lsr of the first; ce and lsr of the second are shown.
"""

import sys
from pathlib import Path
from typing import Any

from tfkd_ray.settings.yaml import dump_yaml
from tfkd_ray.store.experiment import best, read_records

SHARED = ("data", "student")
ROLES = {"kd-plain": "baseline", "ce-plain": "reference", "lsr-plain": "reference"}


def arms_of(experiment: Path, suffix: str) -> dict[str, dict[str, Any]]:
    """Return the configuration of the best full-length trial of each objective, by the arm's name."""
    records = read_records(experiment)
    found = {}
    for objective in ("kd", "ce", "lsr"):
        winner = best([r for r in records if r.objective == objective], "val_accuracy")
        if winner is None:
            sys.exit(f"{experiment}: no full-length trial of {objective}")
        found[objective + suffix] = dict(winner.config)
    return found


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    patient, plain = map(Path, sys.argv[1:])
    arms = {**arms_of(patient, ""), **arms_of(plain, "-plain")}
    first = arms["kd"]
    tree: dict[str, Any] = {"title": f"Fashion-MNIST: patient KD of {first['student']['name']}"}
    tree |= {name: first[name] for name in SHARED}
    tree["arms"] = []
    for name, config in arms.items():
        own = {k: v for k, v in config.items() if k not in (*SHARED, "seed")}
        role = {"role": ROLES[name]} if name in ROLES else {}
        against = {} if name == "ce-plain" else {"baseline": "ce-plain"}
        tree["arms"].append({"name": name, **own, **role, **against})
    print(dump_yaml(tree), end="")


if __name__ == "__main__":
    main()
