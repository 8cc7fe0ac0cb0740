"""How many trials tune a baseline: what the best of n random ones loses, on tables of real curves.

    python benchmarks/baselines.py

Of each baseline in benchmarks/curves-NAME.npz (first seed of every setting), n are drawn without
replacement, DRAWS times. The loss is the validation accuracy of the best of them, after the last
epoch, below the mean of the table's three best, in points. Conditional on a table.
"""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
DRAWS = 4000


def losses(values: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return the losses [DRAWS], in points, of the best of n values [N] in [0, 1]."""
    top = np.sort(values)[-3:].mean()
    best = [rng.choice(values, n, replace=False).max() for _ in range(DRAWS)]
    return 100 * (top - np.array(best))


def main() -> None:
    """Print a table of mean losses, and of the loss that a tenth of draws exceed."""
    rng = np.random.default_rng(0)
    print("| table | baseline | settings | " + " | ".join(map(str, SIZES)) + " |")
    print("|---" * (3 + len(SIZES)) + "|")
    for name in ("digits", "fashion"):
        table = np.load(HERE / f"curves-{name}.npz")
        for objective in ("ce", "lsr"):
            mine = (table["objective"] == objective) & (table["seed"] == 0)
            values = np.nan_to_num(table["curves"][mine, -1], nan=0.1)  # diverged: guessing
            found = [losses(values, n, rng) for n in SIZES]
            cells = [f"{x.mean():.1f} ({np.quantile(x, 0.9):.1f})" for x in found]
            print(f"| {name} | `{objective}` | {mine.sum()} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
