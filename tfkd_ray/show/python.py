"""What a script asks of a finished experiment: its best configuration, its student, its report.

The commands `tfkd export` and `tfkd report` make the same calls. A place is a directory, a URL, or
the name of an experiment in ./tfkd_results.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tfkd_ray.store.storage import (
    absolute,
    all_but_run_states,
    experiment_of,
    is_url,
    named,
    storage_at,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tfkd_ray.learn.config import TrainConfig
    from tfkd_ray.show.follow import Followed


def best_config(experiment: Path | str) -> "TrainConfig":
    """Return the configuration of a sweep's best full-length trial, on validation.

    Args:
        experiment: directory or URL of a sweep.

    Raises:
        ConfigError: if it is no sweep, or no trial has ended at full length.
    """
    from tfkd_ray.learn.config import TrainConfig
    from tfkd_ray.settings.schema import validated
    from tfkd_ray.show.status import best_of

    winner, _ = best_of(experiment_of(experiment).folder)
    return validated(TrainConfig, winner.config, winner.folder / "trial.json")


def load_student(
    source: Path | str, *, arm: str | None = None, seed: int | None = None
) -> "nn.Module":
    """Return a trained student with its weights, on the CPU, in eval mode.

    It takes images [B, C, H, W], normalised with the data set's mean and deviation, as
    `read_images` returns them, and returns logits [B, K]. Never opens the test split.

    Args:
        source: directory or URL of a sweep (its best trial), a trial, a run of `tfkd train`, or a
            comparison (its best arm).
        arm: of a comparison, the arm.
        seed: of a comparison, the seed of the run.

    Raises:
        ConfigError: if there is no such student, or its weights are damaged.
    """
    from tfkd_ray.show.chosen import choose
    from tfkd_ray.show.export import network_of

    network, _ = network_of(choose(place_of_student(source), arm, seed))
    return network.requires_grad_(True)


def read_images(config: "TrainConfig", paths: Sequence[Path | str]) -> "Tensor":
    """Return image files as the input of a student: read as validation images are, and normalised.

    Of an image folder, they become RGB and upright; the shorter side is resized to 8/7 of
    `image_size`, and the centre is cut out.

    Args:
        config: of the student, such as `best_config` returns.
        paths: one or more image files.

    Returns:
        float32 [B, C, H, W].

    Raises:
        ConfigError: if a file is no image, or the data set has no image files.
    """
    import torch

    images = config.data.read_files([Path(path) for path in paths])
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in config.data.statistics())
    return (images - mean) / std


def class_names(config: "TrainConfig") -> list[str]:
    """Return the name of each class of a configuration's data, in the order of a student's logits.

    Of an image folder, they are the sorted names of the class folders, which must be there; of a
    data set without folders, the numbers 0 to K - 1.
    """
    return config.data.class_names()


def write_report(
    experiment: Path | str,
    out: Path | str = "report.html",
    *,
    figures: Path | str | None = None,
    comparisons: Sequence[Path | str] | None = None,
    others: Sequence[Path | str] = (),
) -> list[Path]:
    """Write the report on a sweep or a comparison; return its files, the page first.

    Args:
        experiment: its directory or URL.
        out: the HTML file.
        figures: a directory for the same figures as SVG and PDF, and for heat maps also as CSV and
            LaTeX.
        comparisons: comparisons that confirm the sweep, whose verdicts come first. None: those
            beside it that do.
        others: other sweeps, which the page shows side by side with it, without verdicts.

    Raises:
        ConfigError: if there is no experiment, or a file cannot be written.
    """
    from tfkd_ray.show.report import report

    folder, compared, beside = _places(experiment, comparisons, others)
    return report(
        folder,
        Path(out),
        figures=None if figures is None else Path(figures),
        comparisons=compared(),
        others=beside,
    )


def followed_report(
    experiment: Path | str,
    *,
    comparisons: Sequence[Path | str] | None = None,
    others: Sequence[Path | str] = (),
) -> "Followed":
    """Return the report on an experiment that `follow.server_of` serves; see `write_report`."""
    from tfkd_ray.show.follow import Followed
    from tfkd_ray.show.report import report_page

    folder, compared, beside = _places(experiment, comparisons, others)
    return Followed(
        folder, lambda: report_page(folder, comparisons=compared(), others=beside), beside
    )


def _places(
    experiment: Path | str,
    comparisons: Sequence[Path | str] | None,
    others: Sequence[Path | str],
) -> tuple[Path, Callable[[], list[Path]], list[Path]]:
    """Return the folders of a report: its experiment, the comparisons there are now, and others."""
    from tfkd_ray.space.arms import comparisons_of

    found = experiment_of(experiment)
    found.storage.fetch_comparisons()
    folder = absolute(found.folder)
    chosen = [experiment_of(place).folder for place in comparisons or ()]
    beside = [absolute(experiment_of(place).folder) for place in others]

    def compared() -> list[Path]:
        return chosen or ([] if beside else comparisons_of(folder))

    return folder, compared, beside


def place_of_student(source: Path | str) -> Path:
    """Return the directory of a student on this machine, fetched if the place is a URL.

    Of a sweep's URL that is the best trial's weights, else everything below the URL.
    """
    from tfkd_ray.learn.checkpoint import WEIGHTS
    from tfkd_ray.show.status import best_of

    if not is_url(source):
        return named(source)
    url, _, trial = str(storage_at(source)).partition("/trials/")
    found = experiment_of(url)
    found.storage.fetch_comparisons()
    if trial:
        place = folder = found.folder / "trials" / trial
    elif (found.folder / "confirm.yaml").is_file():
        return experiment_of(url, all_but_run_states).folder
    else:
        place, folder = found.folder, best_of(found.folder)[0].folder
    found.storage.bring(folder / WEIGHTS)
    return place
