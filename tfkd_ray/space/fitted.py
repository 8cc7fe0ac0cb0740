"""A search space, as text with its comments, fitted to a folder of images.

The classes and images in DIR/train/CLASS, or in DIR/CLASS, are counted and some are measured; data,
recipe, epochs and batch size are set accordingly. `size_notes` judges the batch size and the
validation split of any configuration.
"""

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.image_files import (
    TEST_SHARE,
    ImageFolder,
    class_folders,
    form_at,
    images_directly_in,
    layout_problem,
    left_out,
    single_folder,
    split_folders,
)
from tfkd_ray.learn.images import IMAGE_SUFFIXES, image_names
from tfkd_ray.settings.errors import ConfigError, Sentences, some_of
from tfkd_ray.settings.files import opened
from tfkd_ray.settings.yaml import Tree, dump_yaml, in_yaml, parse_yaml
from tfkd_ray.space.arms import build_arms
from tfkd_ray.space.space import build_space

MEASURED = 50
"""Images whose size is looked at."""
MOST_PIXELS, LEAST_PIXELS, PIXEL_UNIT = 224, 8, 8
"""Sizes of images in pixels, and their unit: networks halve them, and cut them into patches."""
SMALL_PIXELS, SMALL_UNIT = 32, 4
"""Size below which the unit is smaller, so that 28 pixels stay 28."""
FITTED_BATCHES = (8, 128)
"""Smallest and largest batch; for less than 32 images, smaller ones down to `LEAST_BATCH`."""
LEAST_BATCH = 2
"""Smallest batch that BatchNorm can learn from."""
STEPS_AN_EPOCH = 20
"""Fewest steps of an epoch that a batch leaves, if it is not the smallest."""
FEW_STEPS = 4
"""Steps of an epoch below which a note is given."""
FEW_TO_VALIDATE = 200
"""Validation images below which a note is given."""
FEW_WEIGHTS = 10_000
"""Weights of a student below which a note is given."""
FITTED_STEPS = 3000
"""Steps of a trial."""
FITTED_EPOCHS = (18, 90)
"""Fewest and most epochs, which come before `FITTED_STEPS`."""


@dataclass(frozen=True)
class SeenImages:
    """Facts of a folder of images."""

    root: Path
    classes: int
    images: int
    """Images of the train folder, or of the single folder."""
    single: Path | None
    """The folder that holds the images of all splits; None if each has its own."""
    side: int
    """Their usual shorter side, in pixels."""
    size: int
    """Side of the squares in which they are read, in pixels."""
    notes: tuple[str, ...]
    """Sentences on what is left out."""

    @property
    def size_text(self) -> str:
        """Return the size in which they are read, with the reason if it is not their own."""
        text = f"{self.size}x{self.size}"
        if self.size == self.side:
            return text
        rule = f"a multiple of {_unit(self.side)}, which every network takes"
        if self.side > MOST_PIXELS:
            rule = f"at most {MOST_PIXELS}"
        elif self.side < LEAST_PIXELS:
            rule = f"at least {LEAST_PIXELS}"
        return f"{text} (their shorter side is {self.side} px; {rule})"


def look_at(root: Path) -> SeenImages:
    """Return the facts of the images in root/train/CLASS or root/CLASS; a ConfigError without."""
    if not root.is_dir():
        what = "is a file, not a directory" if root.exists() else "no such directory"
        raise ConfigError(f"{what}; {form_at(root)}", root)
    problem = layout_problem(root)
    if problem is not None:
        raise ConfigError(problem)
    single = single_folder(root)
    train = single or root / "train"
    splits = split_folders(root)
    found = [list(_images_in(folder)) for folder in class_folders(train)]
    _check_no_class_is_empty(splits)
    images = [path for paths in found for path in paths]
    side = _usual_side(images)
    notes = tuple(left_out(root, splits))
    return SeenImages(
        root.absolute(), len(found), len(images), single, side, _size_for(side), notes
    )


def _check_no_class_is_empty(splits: Iterable[Path]) -> None:
    """Raise a ConfigError that names the class folders without an image."""
    folders = [folder for split in splits for folder in class_folders(split)]
    empty = [str(folder) for folder in folders if next(image_names(folder), None) is None]
    if not empty:
        return
    raise ConfigError(
        f"no image in {len(empty)} of {len(folders)} class folders: {some_of(empty)}; fill or remove "
        f"them (images end in {', '.join(IMAGE_SUFFIXES)})"
    )


def looks_like_images(root: Path) -> bool:
    """Return whether a directory holds folders or image files, or nothing, rather than other files."""
    return bool(class_folders(root) or images_directly_in(root)) or not any(root.iterdir())


def _images_in(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(image_names(folder))]


def _usual_side(images: list[Path]) -> int:
    """Return the usual shorter side of some images, in pixels."""
    from PIL import Image, UnidentifiedImageError

    sides = []
    for path in images[:: max(1, len(images) // MEASURED)]:
        try:
            with opened(path) as file, Image.open(file) as image:
                sides.append(min(image.size))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            continue  # the check of all images names it
    return int(statistics.median(sides)) if sides else MOST_PIXELS


def _size_for(side: int) -> int:
    """Return the side of squares, for images of this shorter side: rounded down to a unit."""
    return max(LEAST_PIXELS, min(MOST_PIXELS, side // _unit(side) * _unit(side)))


def _unit(side: int) -> int:
    return SMALL_UNIT if side < SMALL_PIXELS else PIXEL_UNIT


def batch_for(images: int) -> int:
    """Return the batch size for a number of train images: a power of two, 20 steps an epoch.

    A few images have smaller batches, so that an epoch has `FEW_STEPS`.
    """
    most = max(1, images // STEPS_AN_EPOCH)
    batch = max(FITTED_BATCHES[0], min(FITTED_BATCHES[1], 1 << int(math.log2(most))))
    while batch > LEAST_BATCH and math.ceil(images / batch) < FEW_STEPS:
        batch //= 2
    return batch


def epochs_for(images: int, batch: int) -> int:
    """Return the epochs of a trial for a number of train images."""
    return max(FITTED_EPOCHS[0], min(FITTED_EPOCHS[1], round(FITTED_STEPS / (images / batch))))


def size_notes(config: TrainConfig, *, begun: bool = False) -> Sentences:
    """Yield notes if an epoch has few steps, or validation few images; list or load the images.

    Raises:
        ConfigError: the batch of the recipe, which nobody chose for these images, holds them all,
            and the experiment has not begun.
    """
    train, val = config.data.load()
    yield from _batch_notes(config, len(train), begun=begun)
    if val is not None and len(val) < FEW_TO_VALIDATE:
        yield (
            f"validation has {len(val)} images: one image is {100 / len(val):.2f} points of accuracy, so a lead of a "
            "few images may be chance"
        )


def _batch_notes(config: TrainConfig, images: int, *, begun: bool) -> Sentences:
    batch = config.optim.batch_size
    steps = math.ceil(images / batch)
    if steps >= FEW_STEPS or batch <= batch_for(images):
        return
    count = "one step" if steps == 1 else f"{steps} steps"
    problem = f"optim.batch_size: {batch} of {images} images to train on: an epoch has {count}"
    way_out = f"`optim.batch_size: {batch_for(images)}` gives more"
    usual = {"data": config.data.tree, "recipe": config.recipe, "objective": "ce"}
    of_recipe = TrainConfig.model_validate(usual).optim.batch_size
    if steps == 1 and config.data.streams and batch == of_recipe and not begun:
        raise ConfigError(f"{problem}, but the recipe is for many more; {way_out}")
    yield f"{problem}; {way_out}"


def fitted_space(text: str, seen: SeenImages) -> str:
    """Return the text of a search space or an arms file, fitted to a folder of images."""
    tree: Tree = parse_yaml(text, "the shipped file")
    given = tree.get("data")
    kept = {k: given[k] for k in ("val_fraction",) if isinstance(given, dict) and k in given}
    trained = seen.images if seen.single is None else seen.images * (1 - TEST_SHARE)
    used = int(trained * (1 - kept.get("val_fraction", 0.2)))
    batch = batch_for(used)
    changes: Tree = {
        "data": {
            "name": "image_folder",
            "root": str(seen.root),
            "num_classes": seen.classes,
            "image_size": seen.size,
            **kept,
        },
        "recipe": "modern",
        "epochs": epochs_for(used, batch),
        "augment": None,
        "optim": _with_batch(tree.get("optim"), batch),
    }
    whole = {k: v for k, v in {**tree, **changes}.items() if v is not None}
    teacher = _settings_under(tree, "teacher")
    if _batch_of_teachers(whole) > batch:
        changes["teacher"] = {
            **teacher,
            "optim": _with_batch(teacher.get("optim"), batch),
        }
        whole["teacher"] = changes["teacher"]
    _batch_of_teachers(whole)  # raises for what does not fit these images
    ImageFolder(**changes["data"]).check()
    for key, value in changes.items():
        if value != tree.get(key):
            text = with_setting(text, key, value)
    place = "train" if seen.single is None else "one folder"
    told = f"# {seen.images} images in {place}, as `tfkd init` counted them"
    text = re.sub(r"(?m)^data: .*$", lambda line: f"{told}\n{line[0]}", text, count=1)
    if parse_yaml(text, "the fitted file") != whole:
        text = "".join(_comment_lines(text)) + "\n" + dump_yaml(whole)
    return text


def student_note(text: str) -> str | None:
    """Return a sentence if the student of a file has few weights, else None."""
    tree: Tree = parse_yaml(text, "the fitted file")
    config = (build_arms(tree) if "arms" in tree else build_space(tree)).example
    weights = config.student.weights(config.data.shape, config.data.num_classes)
    if weights is None or weights >= FEW_WEIGHTS:
        return None
    return (
        f"its student, {config.student.name}, has {weights:,} weights, which are few for photographs; `student: "
        "resnet18` is a larger one, and `tfkd plan --probe` estimates the hours"
    )


def _with_batch(optim: Any, batch: int) -> Tree:
    """Return the settings of an optimizer, or of each that is chosen from, with a batch size."""
    optim = {"name": optim} if isinstance(optim, str) else optim or {}
    if "choices" in optim:
        return {"choices": [_with_batch(item, batch) for item in optim["choices"]]}
    return {**optim, "batch_size": batch}


def data_of(text: str) -> str:
    """Return the name of a file's data set."""
    given = parse_yaml(text, "the shipped file").get("data", "digits")
    return str(given["name"] if isinstance(given, dict) else given)


def with_head(text: str, lines: Iterable[str]) -> str:
    """Return a file's text with these comment lines at its head, in place of those there."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return head + re.sub(r"\A(#.*\n)*", "", text)


def rooted(text: str, root: Path) -> str:
    """Return the text of a file whose data set is read from another place; it must be there."""
    tree: Tree = parse_yaml(text, "the shipped file")
    given = tree.get("data")
    data = {**(given if isinstance(given, dict) else {"name": given}), "root": str(root.absolute())}
    whole = {**tree, "data": data}
    built = build_arms(whole) if "arms" in tree else build_space(whole)
    built.example.data.check()
    return with_setting(text, "data", data)


def _settings_under(tree: Mapping[str, Any], key: str) -> Tree:
    given = tree.get(key)
    return dict(given) if isinstance(given, dict) else {}


def _batch_of_teachers(tree: Tree) -> int:
    """Return the largest batch of a teacher that is trained; 0 without teachers."""
    if "arms" in tree:
        runs = [run for arm in build_arms(tree).arms for run in arm.config.teacher_runs()]
    else:
        runs = build_space(tree).teacher_runs()
    return max((run.optim.batch_size for run in runs), default=0)


def _comment_lines(text: str) -> Iterator[str]:
    for line in text.splitlines(keepends=True):
        if not line.startswith("#"):
            return
        yield line


def with_setting(text: str, key: str, value: Any) -> str:
    """Return YAML text with another value of a setting at its top; None: without it.

    Of settings that stand below each other, only the lines of those that differ are written anew.
    """
    lines = text.splitlines()
    start = next((k for k, line in enumerate(lines) if re.match(rf"{key}:(\s|$)", line)), None)
    if start is None:
        if value is None:
            return text
        at = next((k for k, line in enumerate(lines) if re.match(r"\w", line)), len(lines))
        return "\n".join([*lines[:at], f"{key}: {in_yaml(value)}", *lines[at:], ""])
    end = start + 1
    while end < len(lines) and re.match(r"\s+\S", lines[end]):
        end += 1
    block = lines[start:end]
    written = [] if value is None else [f"{key}: {in_yaml(value)}"]
    flat = all(re.match(r"  (\w+:\s*[^\s#]|#)", line) for line in block[1:])
    if isinstance(value, dict) and flat and re.fullmatch(rf"{key}:\s*(#.*)?", block[0]):
        written = [block[0], *_lines_below(block[1:], value)]
    return "\n".join([*lines[:start], *written, *lines[end:], ""])


def _lines_below(block: list[str], value: Tree) -> Iterator[str]:
    """Yield the lines of settings, those that have another value now replaced or added."""
    there: Tree = parse_yaml("\n".join(block), "a part of the file") or {}
    changed = {k: v for k, v in value.items() if there.get(k) != v}
    for line in block:
        key = line.strip().partition(":")[0]
        yield f"  {key}: {in_yaml(changed.pop(key))}" if key in changed else line
    yield from (f"  {key}: {in_yaml(v)}" for key, v in changed.items())
