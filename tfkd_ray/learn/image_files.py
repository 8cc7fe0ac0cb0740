"""Data sets of image files: Tiny ImageNet, ImageNet and folders of the user's own images.

Shapes: S = height and width after decoding.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tfkd_ray.learn.cache import cached
from tfkd_ray.learn.dataset import (
    DEIT,
    IMAGENET,
    MODERN,
    PAPER_RECIPE,
    PATIENT,
    SPLITS,
    AbsolutePath,
    Channels,
    FileDataset,
    ImageShape,
    Labelled,
    Level,
    Split,
    Spread,
    augmented,
    stratified,
)
from tfkd_ray.learn.images import (
    IMAGE_SUFFIXES,
    Files,
    FolderSet,
    Images,
    all_decoded,
    check_headers,
    file_names,
    image_names,
    is_image_name,
)
from tfkd_ray.learn.shrunk import Kind, kept_as, kept_bytes, small_images
from tfkd_ray.settings.errors import ConfigError, Sentences, some_of
from tfkd_ray.settings.files import cached_file, expanded, free_bytes, opened, read_at_most
from tfkd_ray.settings.yaml import Tree

if TYPE_CHECKING:
    from torch import Tensor

TEST_SHARE, TEST_SEED = 0.2, 1998
"""Share of each class that is the test split of a single folder, and the seed that chooses it."""
SPLIT_WORDS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
"""Names of folders, in lower case, that hold a split rather than a class."""
MOST_LIST = 2**24
"""Largest list file that is read; those of Tiny ImageNet have less than a megabyte."""


# --- data sets of image files ---------------------------------------------------------------------


class TinyImagenet(FileDataset):
    """Tiny ImageNet: 110,000 photographs of 64x64 in 200 classes, in memory.

    Source: Stanford's CS231n, 2015. It expects the official layout in `root` or
    root/tiny-imagenet-200. The official `val` is the test split here, because the labels of the
    official `test` were never published. Classes are sorted by WordNet id.
    """

    num_classes: ClassVar[int] = 200
    shape: ClassVar[ImageShape] = (3, 64, 64)
    mean: ClassVar[Channels] = (0.4802 * 255, 0.4481 * 255, 0.3975 * 255)
    std: ClassVar[Channels] = (0.2302 * 255, 0.2265 * 255, 0.2262 * 255)
    url: ClassVar[str] = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    md5: ClassVar[str] = "90528d7ca1a48142e341f4ef8d21d0de"
    origin = f"get and unpack {url}"
    recipes = {
        "paper": {
            **PAPER_RECIPE,
            "schedule": {**PAPER_RECIPE["schedule"], "gamma": 0.1},
            "augment": {"flip": True, "rotation_degrees": 20.0},
        },
        "modern": {"epochs": 200, **MODERN, "augment": {"crop_padding": 8, "flip": True}},
        "patient": augmented(PATIENT, crop_padding=8, flip=True),
        "deit": augmented(DEIT, crop_padding=8, flip=True),
    }

    name: Literal["tiny_imagenet"] = "tiny_imagenet"
    root: AbsolutePath = Path("~/datasets/tiny_imagenet")

    def _check(self) -> None:
        """Raise a ConfigError if its lists or folders are missing."""
        self._folder()

    def download(self) -> None:
        try:
            self._folder()
        except ConfigError:
            self._fetch_folder(self.url, self.md5, "tiny-imagenet-200")

    def _folder(self) -> Path:
        root = self._root
        folders = [root, root / "tiny-imagenet-200"]
        needs = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")
        for folder in folders:
            if all((folder / name).exists() for name in needs):
                return folder
        raise self._missing(f"{', '.join(needs)}, all in one folder", folders)

    def _wnids(self, folder: Path) -> list[str]:
        classes = sorted(self._text(folder / "wnids.txt").split())
        if len(set(classes)) != self.num_classes:
            raise self._wrong(
                folder / "wnids.txt", f"names {len(set(classes))} classes, not {self.num_classes}"
            )
        if odd := [wnid for wnid in classes if not re.fullmatch(r"[\w.-]{1,100}", wnid)]:
            raise self._wrong(folder / "wnids.txt", f"{odd[0][:100]!r} is no name of a class")
        return classes

    def read_files(self, paths: Sequence[Path]) -> Tensor:
        return all_decoded(self.name, paths, self.shape)

    def class_names(self) -> list[str]:
        return self._wnids(self._folder())

    def _official(self, split: Split) -> Labelled:
        import torch

        folder = self._folder()
        classes = self._wnids(folder)
        files = (
            self._train_files(folder, classes)
            if split == "train"
            else self._val_files(folder, classes)
        )
        lists = [
            folder / "wnids.txt",
            *([folder / "val/val_annotations.txt"] if split == "test" else []),
        ]
        return cached(
            f"{self.name}-{split}",
            [*(path for path, _ in files), *lists],
            lambda: (
                all_decoded(self.name, [path for path, _ in files], self.shape),
                torch.tensor([k for _, k in files]),
            ),
        )

    def _sources(self, split: Split) -> list[Path]:
        """Return the file of decoded images, which is replaced if one of 100,000 images changes."""
        folder = self._folder()
        wnid = min(self._text(folder / "wnids.txt").split(), default="")
        first = min((folder / split / wnid / "images").glob("*.JPEG"), default=None)
        return [cached_file(f"{self.name}-{split}", first)] if first else []

    def _examine(self) -> None:
        folder = self._folder()
        classes = self._wnids(folder)
        files = [*self._train_files(folder, classes), *self._val_files(folder, classes)]
        check_headers(self.name, [path for path, _ in files], self.shape[1:])

    def _train_files(self, folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
        found = []
        for k, wnid in enumerate(classes):
            place = folder / "train" / wnid / "images"
            if not (names := sorted(place.glob("*.JPEG"))):
                raise self._wrong(place, f"there is no image (*.JPEG) of this class; {self.origin}")
            found += [(name, k) for name in names]
        return found

    def _val_files(self, folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
        path, number = (
            folder / "val/val_annotations.txt",
            {wnid: k for k, wnid in enumerate(classes)},
        )
        try:
            there = {entry.name for entry in os.scandir(folder / "val/images")}
        except OSError as error:
            raise self._wrong(folder / "val/images", f"cannot be read: {error.strerror}") from None
        found = []
        for n, line in enumerate(self._text(path).splitlines(), start=1):
            name, _, rest = line.partition("\t")
            wnid = rest.partition("\t")[0]
            if wnid not in number:
                raise self._wrong(
                    path, f"line {n}: needs an image and a class of wnids.txt, got {line[:200]!r}"
                )
            if name not in there:
                raise self._wrong(
                    path, f"line {n}: {name[:200]} is not in val/images; {self.origin}"
                )
            found.append((folder / "val/images" / name, number[wnid]))
        if not found:
            raise self._wrong(path, f"is empty; {self.origin}")
        return sorted(found)

    def _text(self, path: Path) -> str:
        """Return the text of one of its lists."""
        try:
            with opened(path) as file:
                raw = read_at_most(file, MOST_LIST)
            if len(raw) == MOST_LIST:
                raise self._wrong(path, f"larger than any such list: {MOST_LIST} bytes or more")
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._wrong(
                path, f"not text in UTF-8: byte {error.start} is {error.object[error.start]:#x}"
            ) from None
        except OSError as error:
            raise self._wrong(path, f"cannot be read: {error.strerror}") from None


class FolderDataset(FileDataset):
    """Image files of any size, one folder per class, as for torchvision's ImageFolder.

    They are read while training: root/train/CLASS/*, and root/val/CLASS/* as the test split
    (root/test/CLASS/* if there is no `val`). Classes and images are sorted by name. Names that
    begin with a dot, or do not end as image files do, are skipped.
    """

    streams = True
    places = FileDataset.places | {"decode_in"}
    later = FileDataset.later | {"decode_in", "cache"}
    recipes = {
        "paper": IMAGENET,
        "modern": {
            **IMAGENET,
            "optim": {**IMAGENET["optim"], **MODERN["optim"]},
            "schedule": {**MODERN["schedule"], "warmup_epochs": 5.0},
        },
        "patient": augmented(PATIENT, resized_crop=True, flip=True),
        "deit": augmented(DEIT, resized_crop=True, flip=True),
    }

    image_size: Annotated[int, Field(ge=8, le=1024)] = 224
    """S: height and width in pixels of the decoded images."""
    mean: tuple[Level, Level, Level] = (0.485 * 255, 0.456 * 255, 0.406 * 255)
    """Mean of red, green and blue, in pixel units of 0 to 255; default: ImageNet's."""
    std: tuple[Spread, Spread, Spread] = (0.229 * 255, 0.224 * 255, 0.225 * 255)
    """Standard deviation in the same units."""
    readers: Annotated[int, Field(ge=1, le=256)] = 4
    """Threads or processes per worker that decode ahead of training. They do not affect results."""
    decode_in: Literal["threads", "processes"] = "threads"
    """threads: share Python's lock with training, which limits a worker to some 2,000 images a
    second, whatever `readers` is. processes: do not share it, but need as many `cpus_per_worker`.
    It does not affect results."""
    cache: Kind = "none"
    """raw, 256: keeps each image of more than 256 pixels (for an `image_size` of 224; else 8/7 of
    it) resized to this short side, as pixels or as a JPEG, when it is first read. Crops are then
    cut from the smaller image, which gives other numbers, and is blurred where a crop is small: raw
    is 3 times as fast, 256 1.4 times. The folder is ~/.cache/tfkd_ray/images on each node."""

    @property
    def shape(self) -> ImageShape:
        """Return (3, S, S)."""
        return 3, self.image_size, self.image_size

    def _check(self) -> None:
        """Raise a ConfigError if a split or a declared class is missing; looks at folders only."""
        self._classes("test")

    def _folder(self, split: Split) -> Path:
        root = self._root
        names = ("train",) if split == "train" else ("val", "test")
        for name in names:
            if (root / name).is_dir():
                return root / name
        single = self._single_folder()
        if single is not None:
            return single
        raise self._missing(f"the folder {' or '.join(names)}", [root])

    def _single_folder(self) -> Path | None:
        """Return the folder that holds the images of both splits; None if each has its own."""
        return None

    def _classes(self, split: Split) -> list[str]:
        """Return the names of the class folders, sorted."""
        folder = self._folder(split)
        with self._named(folder):
            classes = [p.name for p in class_folders(folder)]
        if split == "train":
            if len(classes) != self.num_classes:
                raise self._wrong(
                    folder, f"{len(classes)} class folders, and num_classes is {self.num_classes}"
                )
            return classes
        if differing := sorted(set(classes) ^ set(train := self._classes("train"))):
            where = (
                "here, but not in train" if differing[0] in classes else "in train, but not here"
            )
            count = f"{len(classes)} class folders here, {len(train)} in train"
            raise self._wrong(
                folder,
                f"its class folders must be those of train: {differing[0]} is {where} ({count})",
            )
        return classes

    @contextlib.contextmanager
    def _named(self, folder: Path) -> Iterator[None]:
        """Raise a ConfigError that names the folder, at or below `folder`, that cannot be listed."""
        try:
            yield
        except OSError as error:
            place = Path(os.fsdecode(error.filename)) if error.filename else folder
            raise self._wrong(place, f"cannot be read: {error.strerror}") from None

    def _examine(self) -> None:
        for split in SPLITS:
            images = self._whole(split)
            assert isinstance(images, FolderSet), f"{images=}"
            check_headers(self.name, [images.folder / file for file in images.files])

    def _whole(self, split: Split) -> Images:
        import torch

        folder, files, labels = self._folder(split), list[str](), list[int]()
        for k, name in enumerate(self._classes(split)):
            with self._named(folder / name):
                found = sorted(image_names(folder / name))
            if not found:
                raise self._wrong(folder / name, f"no image in it ({', '.join(IMAGE_SUFFIXES)})")
            place = (folder / name).relative_to(self._root)
            files += [f"{place}/{file}" for file in found]
            labels += [k] * len(found)
        if folder == self._single_folder():
            files, labels = _part_of(split, files, labels)
        images = self.in_files(self._root, tuple(files))
        return replace(images, labels=torch.tensor(labels))

    def read_files(self, paths: Sequence[Path]) -> Tensor:
        """Return image files, uint8 [B, 3, S, S]: the short side resized, the centre cut out, RGB."""
        import torch

        images = self.in_files(Path("/"), tuple(str(path.absolute()) for path in paths))
        return torch.cat([*images.read([torch.arange(len(paths))])])

    def class_names(self) -> list[str]:
        """Return the names of the class folders, sorted as they are numbered."""
        return self._classes("train")

    def in_files(self, folder: Path, files: tuple[str, ...]) -> FolderSet:
        import torch

        count = len(files)
        none, positions = torch.zeros(count, dtype=torch.int64), torch.arange(count)
        place = Files(self.name, folder, self.image_size, self.cache)
        return FolderSet(place, files, none, positions, count, self.readers, self.decode_in)

    def identity(self) -> Tree:
        tree = super().identity()
        if self.cache != "none":
            short = Files(self.name, self._root, self.image_size, self.cache).short
            tree["cache"] = kept_as(self.cache, short)
        return tree

    def notes(self) -> Sentences:
        if self.cache == "none":
            return
        files = Files(self.name, self._root, self.image_size, self.cache)
        count = sum(len(self._whole(split)) for split in SPLITS)
        needed, free = count * kept_bytes(self.cache, files.short), free_bytes(small_images())
        if needed > free:
            yield (
                f"data.cache: {self.cache} may need {needed / 1e9:.2g} GB in {small_images()}, and {free / 1e9:.2g} "
                "are free; images that do not fit are resized each time they are read"
            )


def _part_of(split: Split, files: list[str], labels: list[int]) -> tuple[list[str], list[int]]:
    """Return the files and labels of one split of a single folder."""
    import torch

    parts = stratified(torch.tensor(labels), TEST_SHARE, seed=TEST_SEED)
    chosen = parts[0 if split == "train" else 1].tolist()
    return [files[i] for i in chosen], [labels[i] for i in chosen]


def class_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted; names that begin with a dot are skipped."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def single_folder(root: Path) -> Path | None:
    """Return the folder of classes in `root`, or `root` itself, that holds the images of all splits.

    None if there are folders for the splits, or no two classes.
    """
    if not root.is_dir() or (root / "val").is_dir() or (root / "test").is_dir():
        return None
    folders = class_folders(root)
    if [p.name for p in folders] == ["train"]:
        return root / "train"
    if (root / "train").is_dir() or len(folders) < 2:
        return None
    return root


def layout_problem(root: Path) -> str | None:
    """Return the sentence on a directory that is there and is no folder of image files, else None.

    It looks at folders alone, not at the images in those of the classes.
    """
    single = single_folder(root)
    train = single or root / "train"
    if single is None and not train.is_dir():
        splits = [name for name in ("val", "test") if (root / name).is_dir()]
        if splits:
            return f"not found: the folder train beside {root / splits[0]}; {form_at(root)}"
        train = root
    classes = [p.name for p in class_folders(train)]
    if len(classes) > 1:
        if single == root and {name.lower() for name in classes} <= SPLIT_WORDS:
            return (
                f"the folders in {root} have the names of splits, not of classes: {', '.join(classes)}; "
                "rename them to `train` and `val`"
            )
        return None
    loose = len(images_directly_in(train))
    if loose and not classes:
        return (
            f"{loose} images lie directly in {train}: make a folder for each class; {form_at(root)}"
        )
    if classes:
        beside = f", and {loose} images lie directly in {train}" if loose else ""
        return f"{train} has only one class folder, {classes[0]!r}{beside}; two or more are needed; {form_at(root)}"
    return f"{train} has no class folders and no images; {form_at(root)}"


def form_at(root: Path) -> str:
    """Return where images are expected, as the end of a sentence."""
    return f"put images at {root}/CLASS/ (they are split), or at {root}/train/CLASS/ and {root}/val/CLASS/"


def split_folders(root: Path) -> list[Path]:
    """Return the folders that hold class folders: of train and of test, or the one of all splits."""
    single = single_folder(root)
    if single is not None:
        return [single]
    test = [root / name for name in ("val", "test") if (root / name).is_dir()]
    return [root / "train", *test[:1]] if (root / "train").is_dir() else []


def left_out(root: Path, splits: Sequence[Path]) -> Sentences:
    """Yield sentences on files and folders of the user's that are not read.

    Args:
        splits: the folders of class folders that are read.
    """
    if splits and root not in splits:
        known = {*splits, *(split.parent for split in splits)}
        others = [p.name for p in class_folders(root) if p not in known]
        if others:
            yield f"{root}: these folders are not read: {some_of(others)}; validation is cut from train"
    found = []
    for split in splits:
        found += [p.name for p in split.iterdir() if p.is_file() and not p.name.startswith(".")]
        for folder in class_folders(split):
            found += [name for name in file_names(folder) if not is_image_name(Path(name).name)]
    if found:
        what = "1 file is" if len(found) == 1 else f"{len(found)} files are"
        yield (
            f"{root}: {what} no image in a class folder and left out: {some_of(sorted(found))} "
            f"(images end in {', '.join(IMAGE_SUFFIXES)})"
        )


def images_directly_in(folder: Path) -> list[str]:
    """Return the names of the image files in a folder, not in the folders below it."""
    return [p.name for p in folder.iterdir() if is_image_name(p.name) and p.is_file()]


class ImageFolder(FolderDataset):
    """Your own image files.

    They may also be in a single folder, root/CLASS/* or root/train/CLASS/* without `val` and
    `test`: then a fifth of each class is the test split, the same images each time.
    """

    # the folder identifies the data set
    places = {"readers", "decode_in"}
    known_by_digest = {"root"}
    origin = "put images at root/train/CLASS/ and root/val/CLASS/, or all at root/CLASS/"

    name: Literal["image_folder"] = "image_folder"
    num_classes: Annotated[int, Field(ge=2)]
    """Number of classes: the folders in root/train. They are counted if it is not given."""

    @model_validator(mode="before")
    @classmethod
    def _counted(cls, tree: Any) -> Any:
        """Return the settings with the number of class folders, if they are on this machine."""
        if not isinstance(tree, dict) or "num_classes" in tree:
            return tree
        if not isinstance(tree.get("root"), str | Path):
            return tree
        root = expanded(tree["root"])
        if not root.is_dir():
            return tree
        problem = layout_problem(root)
        if problem is not None:
            raise ValueError(problem)
        return {**tree, "num_classes": len(class_folders(single_folder(root) or root / "train"))}

    def _single_folder(self) -> Path | None:
        return single_folder(self._root)

    def _check(self) -> None:
        """Raise a ConfigError if folders of splits or classes are missing; looks at folders only."""
        problem = layout_problem(self._root) if self._root.is_dir() else None
        if problem is not None:
            raise ConfigError(f"data {self.name}: {problem}")
        super()._check()

    def notes(self) -> Sentences:
        yield from super().notes()
        folder = self._single_folder()
        if folder is not None:
            count = len(self._whole("test"))
            yield (
                f"{folder} has no split of its own: {count} images, a fifth of each class, are the test split, the "
                f"same ones each time; validation is cut from the others"
            )
        yield from left_out(self._root, split_folders(self._root))


class Imagenet(FolderDataset):
    """ImageNet 2012: 1.28 million photographs in 1000 classes.

    (Russakovsky et al. 2015, arXiv:1409.0575.) Its 50,000 validation images are the test split
    here.
    """

    num_classes: ClassVar[int] = 1000
    origin = "register at https://image-net.org for ILSVRC2012, and unpack it to root/train/CLASS/ and root/val/CLASS/"

    name: Literal["imagenet"] = "imagenet"
    root: AbsolutePath = Path("~/datasets/imagenet")
