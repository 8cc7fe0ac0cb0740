"""Metrics: a table with one row for each, and the one rule for which trial is best.

To add a metric, write a row of `SCORES` and the function that it names. Validation, search, readers,
reports, TensorBoard, comparisons and export take what they need from the row; docs/architecture.md
says in which order. The module needs no torch. The functions import numpy when they are called, as
reading commands need the table alone.

Shapes: N = images, K = classes.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits = NDArray[Any]
    Labels = NDArray[Any]

Thing = TypeVar("Thing")


# --- how each metric is calculated -----------------------------------------------------------------------------


def _log_p(logits: "Logits") -> "NDArray[np.float64]":
    import numpy as np
    from scipy import special

    return np.asarray(
        special.log_softmax(np.asarray(logits, dtype=np.float64), axis=1), dtype=np.float64
    )


def accuracy(logits: "Logits", labels: "Labels") -> float:
    """Return top-1 accuracy in [0, 1]; of equal logits the first class is the answer."""
    return float((logits.argmax(axis=1) == labels).mean())


def top_k(logits: "Logits", labels: "Labels", k: int = 5) -> float:
    """Return the share of labels among the k largest logits; of equal logits the first count."""
    import numpy as np

    first = np.argsort(-np.asarray(logits, dtype=np.float64), axis=1, kind="stable")[:, :k]
    return float((first == labels[:, None]).any(axis=1).mean())


def nll(logits: "Logits", labels: "Labels") -> float:
    """Return the mean negative log-likelihood, in nats an image."""
    import numpy as np

    return float(-_log_p(logits)[np.arange(len(labels)), labels].mean())


def brier(logits: "Logits", labels: "Labels") -> float:
    """Return the squared distance of the probabilities from the one-hot label, in [0, 2].

    Summed over classes; the mean over images.
    """
    import numpy as np

    p = np.exp(_log_p(logits))
    p[np.arange(len(labels)), labels] -= 1
    return float((p**2).sum(axis=1).mean())


def ece(logits: "Logits", labels: "Labels") -> float:
    """Return the calibration error over bins of equal width, a fraction; see `calibration`."""
    from tfkd_ray.verdict.calibration import binned, calibration_error

    return calibration_error(len(labels), *binned(logits, labels)[1:])


def ece_equal_mass(logits: "Logits", labels: "Labels") -> float:
    """Return the calibration error over bins that hold equally many images, a fraction.

    (Nixon et al. 2019, arXiv:1904.01685.) Images of the same confidence stay in one bin, so that the
    order of the images does not matter.
    """
    import numpy as np

    from tfkd_ray.verdict.calibration import BINS, calibration_error, confidence_of

    confidence = confidence_of(logits)
    right = (logits.argmax(axis=1) == labels).astype(np.float64)
    parts = np.array_split(np.sort(confidence), BINS)
    bins = np.searchsorted([part[0] for part in parts[1:] if len(part)], confidence, side="right")
    sure, hits = np.bincount(bins, confidence, BINS), np.bincount(bins, right, BINS)
    return calibration_error(len(labels), sure, hits)


def auroc(logits: "Logits", labels: "Labels") -> float:
    """Return the area under the ROC curve of each class against the rest, macro mean, in [0, 1].

    The area of a class is the probability that one of its images gets a higher probability of the
    class than an image of another class; equal probabilities count half. A class without images has
    no area and is left out of the mean, as is a class that all images belong to. NaN where no class
    is left, or where a logit is NaN.
    """
    import numpy as np

    if np.isnan(logits).any():
        return math.nan
    log_p = logits - logits.max(axis=1, keepdims=True).astype(np.float64)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))  # faster than SciPy's log_softmax
    columns = np.ascontiguousarray(log_p.T)
    areas = []
    for k in np.unique(labels):
        own = labels == k
        inside, outside = columns[k, own], np.sort(columns[k, ~own])
        if not len(outside):
            continue
        below = np.searchsorted(outside, inside, side="left")
        up_to = np.searchsorted(outside, inside, side="right")
        areas.append((below + up_to).mean() / (2 * len(outside)))
    return float(np.mean(areas)) if areas else math.nan


def _by_class(logits: "Logits", labels: "Labels") -> "tuple[NDArray[np.int64], ...]":
    """Count images of each class, [K] each: with it as answer and label, as answer, as label."""
    import numpy as np

    answers, classes = logits.argmax(axis=1), logits.shape[1]
    pairs = labels[answers == labels], answers, labels
    return tuple(np.bincount(some, minlength=classes) for some in pairs)


def macro_f1(logits: "Logits", labels: "Labels") -> float:
    """Return the mean over classes of F1, the harmonic mean of precision and recall, in [0, 1].

    A class that is neither a label nor an answer is left out of the mean.
    """
    right, answered, there = _by_class(logits, labels)
    seen = answered + there > 0
    return float((2 * right[seen] / (answered + there)[seen]).mean())


def balanced_accuracy(logits: "Logits", labels: "Labels") -> float:
    """Return the mean share of right answers over the classes that have images, in [0, 1]."""
    right, _, there = _by_class(logits, labels)
    return float((right[there > 0] / there[there > 0]).mean())


# --- the table -------------------------------------------------------------------------------------------------


def _chance(classes: int) -> float:
    return 1 / classes


@dataclass(frozen=True)
class Score:
    """One metric."""

    key: str
    """Name in metrics.jsonl and settings: on validation `val_` and the name in confirm.json."""
    direction: Literal["max", "min"]
    """Which direction is better."""
    label: str
    """Name in figures and sentences."""
    unit: str
    """Unit in figures: '%', 'nats an image', ..."""
    heading: str | None = None
    """Head of the column in a comparison's table, at most 8 letters. None: no column."""
    tag: str | None = None
    """Tag in TensorBoard."""
    margin: float | None = None
    """The smallest lead worth having, as a number of the metric itself. None: a search cannot
    choose by this metric alone, as no verdict can be about it."""
    guess: Callable[[int], float] = _chance
    """Value of guessing, by the number of classes; a run that diverged gets it."""
    of: Callable[["Logits", "Labels"], float] | None = None
    """Computes the metric from logits [N, K] and labels [N]. None: it is no function of these."""
    usual: bool = False
    """True: validation always records it, from sums over batches (`evaluate.metric_sums`). The
    others need the logits of all images at once: validation computes them where a search asks for
    them."""
    kept_as: str | None = None
    """Of a metric of the averaged weights (`ema`) beside those in training: the key of the same
    metric of the student that is kept. Only a search can choose by it: on test, the averaged weights
    are the student."""

    @property
    def name(self) -> str:
        """Name without `val_`, as in confirm.json and verdicts."""
        return self.key.removeprefix("val_")

    @property
    def title(self) -> str:
        """Label, with the split that trials are judged on."""
        return f"validation {self.label}" if self.key.startswith("val_") else self.label

    @property
    def factor(self) -> float:
        """Factor from the recorded value to `unit`."""
        return {"%": 100.0, "thousands": 0.001}.get(self.unit, 1.0)

    def number(self, value: float) -> str:
        """Return a recorded value in `unit`, without the unit's name."""
        digits = 2 if self.unit == "%" else 4
        return f"{self.factor * value:.{digits}f}"

    def show(self, value: float) -> str:
        """Return a recorded value with its unit."""
        return f"{self.number(value)} {self.unit}"


_ROWS = (
    # A margin of 0.2 points of accuracy: published gains are 0.3 to 1; at a seed spread of 0.25 points
    # it takes 25 seeds or more to show a gain of 0.2; and 10,000 test images leave a standard error of
    # about that size. The others follow it.
    Score("val_accuracy", "max", "accuracy", "%",
          tag="val/acc", margin=0.002, of=accuracy, usual=True),
    Score("val_top5", "max", "top-5", "%", heading="top-5", tag="val/top5", of=top_k, usual=True),
    Score("val_nll", "min", "NLL", "nats an image",
          heading="NLL", tag="val/loss", margin=0.005, of=nll, usual=True,
          guess=lambda classes: -math.log(1 / classes)),
    Score("val_ece", "min", "calibration error", "%",
          heading="ECE", tag="val/ece", margin=0.002, of=ece, usual=True,
          guess=lambda classes: 1.0),
    Score("val_ece_equal_mass", "min", "calibration error, equal mass", "%",
          heading="ECE mass", of=ece_equal_mass),
    Score("val_brier", "min", "Brier score", "0 to 2", heading="Brier", of=brier),
    Score("val_agreement", "max", "agreement with the teacher", "%",
          heading="agrees", tag="kd/agreement", usual=True),
    Score("val_auroc", "max", "AUROC", "%",
          heading="AUROC", tag="val/auroc", margin=0.002, of=auroc,
          guess=lambda classes: 0.5),
    Score("val_macro_f1", "max", "macro F1", "%",
          heading="macro F1", tag="val/macro_f1", margin=0.002, of=macro_f1),
    Score("val_balanced_accuracy", "max", "balanced accuracy", "%",
          heading="balanced", tag="val/balanced_acc", margin=0.002, of=balanced_accuracy),
    Score("val_ema_accuracy", "max", "accuracy of the averaged weights", "%",
          tag="val/ema_acc", margin=0.002, kept_as="val_accuracy"),
    Score("val_ema_nll", "min", "NLL of the averaged weights", "nats an image",
          tag="val/ema_loss", margin=0.005, kept_as="val_nll",
          guess=lambda classes: -math.log(1 / classes)),
    Score("val_ema_ece", "min", "calibration error of the averaged weights", "%",
          tag="val/ema_ece", margin=0.002, kept_as="val_ece",
          guess=lambda classes: 1.0),
    Score("train_loss", "min", "training loss", "nats an image", tag="train/loss"),
    Score("parameters", "min", "parameters of the student", "thousands", tag="model/parameters"),
)  # fmt: skip

SCORES = {row.key: row for row in _ROWS}
"""Every metric, by its key."""
SELECTABLE = tuple(row.key for row in _ROWS if row.margin is not None and row.kept_as is None)
"""Metrics that a search can choose by, and a verdict be about."""
OF_AVERAGE = tuple(row.key for row in _ROWS if row.kept_as is not None)
"""Metrics of the averaged weights, which only a search with `ema` can choose by."""

if TYPE_CHECKING:
    Selectable = str
    Searchable = str
    SearchableBeside = str
else:
    Selectable = Literal[SELECTABLE]
    Searchable = Literal[(*SELECTABLE, *OF_AVERAGE)]
    SearchableBeside = Literal[(*SELECTABLE, *OF_AVERAGE, "parameters")]


def score_of(key: str) -> Score:
    """Return the row of a metric; raise a ValueError that lists all if there is none."""
    if key not in SCORES:
        raise ValueError(f"no such metric {key!r}; known: {', '.join(SCORES)}")
    return SCORES[key]


def of_student(key: str) -> str:
    """Return the metric of the student that is kept: the averaged weights are the student."""
    return score_of(key).kept_as or key


def scores(logits: "Logits", labels: "Labels") -> dict[str, float]:
    """Return all metrics of logits [N, K] and labels [N], by name."""
    return {row.name: row.of(logits, labels) for row in _ROWS if row.of is not None}


# --- which is better -------------------------------------------------------------------------------------------


def sign(metric: str) -> int:
    """Return 1 if larger values of a metric are better, else -1."""
    return {"max": 1, "min": -1}[score_of(metric).direction]


def ranked(things: Iterable[Thing], metric: str, value: Callable[[Thing], float]) -> list[Thing]:
    """Return the items with a finite value, best first; of equals the first one first."""
    better = sign(metric)
    valued = [(-better * value(thing), thing) for thing in things]
    kept = [pair for pair in valued if math.isfinite(pair[0])]
    return [thing for _, thing in sorted(kept, key=lambda pair: pair[0])]
