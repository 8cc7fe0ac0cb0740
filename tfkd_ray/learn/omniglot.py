"""Omniglot: handwritten characters of many alphabets, 20 drawings of each.

Shapes: N = images, S = height and width after resizing.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from tfkd_ray.learn.cache import cached
from tfkd_ray.learn.dataset import (
    MODERN,
    PATIENT,
    SPLITS,
    AbsolutePath,
    Channels,
    CountOrShare,
    FileDataset,
    ImageShape,
    Labelled,
    Split,
    augmented,
)
from tfkd_ray.learn.images import generator
from tfkd_ray.settings.errors import ConfigError, did_you_mean
from tfkd_ray.settings.files import opened, read_at_most

if TYPE_CHECKING:
    from torch import Tensor

DRAWERS = 20
"""Drawings of a character, each by another person; their numbers are 1 to 20."""
TEST_DRAWERS = 4
"""The last of them are the test split."""
TRAIN_DRAWERS = DRAWERS - TEST_DRAWERS
OFFICIAL_SIDE = 105
"""Height and width of an official image."""
MOST_DRAWING_BYTES = 2**16
"""Limit of bytes of a drawing; the largest official one has 413."""
MOST_ENTRIES = 100_000
"""Limit of entries of an archive; the largest official one has 20,275."""

BACKGROUND = {
    "Alphabet_of_the_Magi": 20,
    "Anglo-Saxon_Futhorc": 29,
    "Arcadian": 26,
    "Armenian": 41,
    "Asomtavruli_(Georgian)": 40,
    "Balinese": 24,
    "Bengali": 46,
    "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
    "Braille": 26,
    "Burmese_(Myanmar)": 34,
    "Cyrillic": 33,
    "Early_Aramaic": 22,
    "Futurama": 26,
    "Grantha": 43,
    "Greek": 24,
    "Gujarati": 48,
    "Hebrew": 22,
    "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
    "Japanese_(hiragana)": 52,
    "Japanese_(katakana)": 47,
    "Korean": 40,
    "Latin": 26,
    "Malay_(Jawi_-_Arabic)": 40,
    "Mkhedruli_(Georgian)": 41,
    "N_Ko": 33,
    "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
    "Sanskrit": 42,
    "Syriac_(Estrangelo)": 23,
    "Tagalog": 17,
    "Tifinagh": 55,
}
"""Characters of each alphabet of the official background set: 964."""
EVALUATION = {
    "Angelic": 20,
    "Atemayar_Qelisayer": 26,
    "Atlantean": 26,
    "Aurek-Besh": 26,
    "Avesta": 26,
    "Ge_ez": 26,
    "Glagolitic": 45,
    "Gurmukhi": 45,
    "Kannada": 41,
    "Keble": 26,
    "Malayalam": 47,
    "Manipuri": 40,
    "Mongolian": 30,
    "Old_Church_Slavonic_(Cyrillic)": 45,
    "Oriya": 46,
    "Sylheti": 28,
    "Syriac_(Serto)": 23,
    "Tengwar": 25,
    "Tibetan": 42,
    "ULOG": 26,
}
"""Characters of each alphabet of the official evaluation set: 659."""
CHARACTERS = BACKGROUND | EVALUATION
SETS: dict[str, tuple[str, ...]] = {
    "images_background": tuple(BACKGROUND),
    "images_background_small1": ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"),
    "images_background_small2": ("Greek", "Japanese_(katakana)", "Latin", "Sanskrit", "Tagalog"),
    "images_evaluation": tuple(EVALUATION),
}
"""Alphabets of each official set."""
CHECKSUMS = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_background_small1": "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    "images_background_small2": "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
"""Checksums of the zips: md5 where torchvision publishes it, else SHA-256."""

SetName = Literal[
    "images_background",
    "images_background_small1",
    "images_background_small2",
    "images_evaluation",
]
Drawing = tuple[str, int, int]
"""Alphabet, character (from 1) and drawer (from 1)."""
Read = Callable[[], bytes]


class Omniglot(FileDataset):
    """Handwritten characters of many alphabets, 20 drawings of each. (Lake et al. 2015.)

    Science 350, 1332-1338. `root` holds the official zips, or the folders that they unpack to, also
    below `omniglot-py`, as torchvision has them. Each character was drawn by 20 people, whose number
    is in the file's name; drawer 7 of one alphabet need not be drawer 7 of another. Drawers 17 to 20
    are the test split, and validation is whole drawers of the others. A character that is in several
    sets is one class; its files must be the same in all of them. Images are white on black.
    """

    mean: ClassVar[Channels | None] = None
    std: ClassVar[Channels | None] = None
    url: ClassVar[str] = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
    origin = f"get the zips of data.sets from {url}"
    recipes = {
        "plain": {},
        "modern": MODERN,
        "augmented": {**MODERN, "augment": {"crop_padding": 2, "rotation_degrees": 15.0}},
        "patient": augmented(PATIENT, crop_padding=2, rotation_degrees=15.0),
    }

    name: Literal["omniglot"] = "omniglot"
    root: AbsolutePath = Path("~/datasets/omniglot")
    sets: Annotated[tuple[SetName, ...], Field(min_length=1)] = (
        "images_background_small1",
        "images_background_small2",
    )
    """Official sets to read. The two small ones have 242 classes together."""
    alphabets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Alphabets to use, of those that the sets have. None: all."""
    side: Annotated[int, Field(ge=8, le=OFFICIAL_SIDE)] = 28
    """S: images of 105 x 105 pixels are resized to S x S with a triangle filter."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Fraction of the 16 drawers that are held out for validation, rounded to whole drawers: 4 by
    default. 0: no validation split, for training a final student."""
    subset: CountOrShare | None = None
    """Approximate number of train images to use, or below 1 the fraction of them; whole drawers are
    left out. None: all."""

    @model_validator(mode="after")
    def _alphabets_are_there(self) -> Self:
        known = sorted({name for one in self.sets for name in SETS[one]})
        for name in self.alphabets or ():
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(
                    f"alphabets: {name!r} is in none of {', '.join(self.sets)}; {hint}"
                )
        return self

    @property
    def shape(self) -> ImageShape:
        """Return (1, S, S)."""
        return (1, self.side, self.side)

    @property
    def num_classes(self) -> int:
        """Return the number of characters of the alphabets in use."""
        return sum(CHARACTERS[name] for name in self._alphabets)

    @property
    def _alphabets(self) -> tuple[str, ...]:
        """Return the alphabets in use, sorted."""
        known = {name for one in self.sets for name in SETS[one]}
        return tuple(sorted(known if self.alphabets is None else known & {*self.alphabets}))

    def test_clusters(self) -> Tensor:
        """Return the (alphabet, drawer) of each test image, as numbers, int64 [N]."""
        import torch

        found = []
        for number, alphabet in enumerate(self._alphabets):
            drawers = torch.arange(TEST_DRAWERS).repeat(CHARACTERS[alphabet])
            found.append(drawers + number * TEST_DRAWERS)
        return torch.cat(found)

    def split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return sorted positions (train, validation): whole drawers, chosen by `split_seed`."""
        import torch

        order = torch.randperm(TRAIN_DRAWERS, generator=generator(self.split_seed, "drawers"))
        held = 0
        if self.val_fraction:
            held = min(max(1, round(TRAIN_DRAWERS * self.val_fraction)), TRAIN_DRAWERS - 1)
        kept = TRAIN_DRAWERS - held
        if self.subset is not None:
            drawers = self.subset / self.num_classes if self.subset >= 1 else self.subset * kept
            kept = min(kept, max(1, round(drawers)))
        drawer = torch.arange(len(labels)) % TRAIN_DRAWERS
        parts = (order[held : held + kept], order[:held])
        train, val = (torch.isin(drawer, part).nonzero()[:, 0] for part in parts)
        return train, val

    def _check(self) -> None:
        """Raise a ConfigError that names the sets that are missing."""
        self._places()

    def download(self) -> None:
        root = self._root
        for name in self.sets:
            if self._place(name) is None:
                self._fetch(f"{self.url}/{name}.zip", CHECKSUMS[name], root / f"{name}.zip")

    def _examine(self) -> None:
        wanted = set(self._drawings(SPLITS))
        self._check_all_there(wanted, set(self._files()))

    def _official(self, split: Split) -> Labelled:
        places = [*self._places().values()]
        read = [place for place in places if place.suffix == ".zip"]
        for place in places:
            if place.suffix != ".zip":
                read += sorted(place.glob("*/*/*.png"))
        which = hashlib.sha256("/".join(self._alphabets).encode()).hexdigest()[:8]
        kept = f"{self.name}-{which}-{self.side}-{split}"
        return cached(kept, read, lambda: self._decoded(split))

    def _decoded(self, split: Split) -> Labelled:
        import torch

        files, wanted = self._files(), list(self._drawings([split]))
        self._check_all_there(set(self._drawings(SPLITS)), set(files))
        pixels = np.empty((len(wanted), *self.shape), np.uint8)
        for row, drawing in zip(pixels, wanted, strict=True):
            row[0] = self._pixels(drawing, files[drawing])
        each = len(wanted) // self.num_classes
        labels = torch.arange(self.num_classes).repeat_interleave(each)
        return torch.from_numpy(pixels), labels

    def _drawings(self, splits: Iterable[Split]) -> Iterator[Drawing]:
        """Yield the drawings of official splits, by alphabet, character and drawer."""
        drawers: list[int] = []
        if "train" in splits:
            drawers += range(1, TRAIN_DRAWERS + 1)
        if "test" in splits:
            drawers += range(TRAIN_DRAWERS + 1, DRAWERS + 1)
        for alphabet in self._alphabets:
            for character in range(1, CHARACTERS[alphabet] + 1):
                for drawer in drawers:
                    yield alphabet, character, drawer

    def _pixels(self, drawing: Drawing, source: tuple[Path, Read]) -> np.ndarray[Any, Any]:
        """Return uint8 [S, S] of a drawing, white on black."""
        path, read = source
        try:
            with Image.open(io.BytesIO(read())) as image:
                size = image.size
                if size == (OFFICIAL_SIDE, OFFICIAL_SIDE):
                    grey = image.convert("L")
                    if self.side != OFFICIAL_SIDE:
                        grey = grey.resize((self.side, self.side), Image.Resampling.BILINEAR)
                    return 255 - np.asarray(grey)
        except ConfigError:
            raise
        except Exception as error:  # a damaged image can raise any exception
            problem = f"cannot be read as an image: {error}; {self.origin}"
            raise self._wrong(path, problem) from None
        given = "x".join(map(str, size))
        official = f"{OFFICIAL_SIDE}x{OFFICIAL_SIDE}"
        raise self._wrong(path, f"is {given}, and all drawings are {official}; {self.origin}")

    # --- files ------------------------------------------------------------------------------------

    def _place(self, name: str) -> Path | None:
        """Return the zip or the folder of a set; a zip first, because it proves its content."""
        root = self._root
        for folder in (root, root / "omniglot-py"):
            if (folder / f"{name}.zip").is_file():
                return folder / f"{name}.zip"
            if (folder / name).is_dir():
                return folder / name
        return None

    def _places(self) -> dict[str, Path]:
        found = {name: self._place(name) for name in self.sets}
        missing = [name for name, place in found.items() if place is None]
        if missing:
            root = self._root
            what = f"{' and '.join(missing)}, as zip or folder"
            raise self._missing(what, [root, root / "omniglot-py"])
        return {name: place for name, place in found.items() if place is not None}

    def _files(self) -> dict[Drawing, tuple[Path, Read]]:
        """Return where each drawing of all sets is; raise if two sets differ in one."""
        found: dict[Drawing, tuple[Path, Read]] = {}
        for place in self._places().values():
            entries = self._of_zip(place) if place.suffix == ".zip" else self._of_folder(place)
            for drawing, (path, read) in entries.items():
                other = found.setdefault(drawing, (path, read))
                if other[0] != path and other[1]() != read():
                    alphabet, character, drawer = drawing
                    raise self._wrong(
                        path,
                        f"differs from {other[0]}, and both are drawer {drawer} of {alphabet}/character{character:02};"
                        f" {self.origin}",
                    )
        return found

    def _of_folder(self, folder: Path) -> dict[Drawing, tuple[Path, Read]]:
        names = {}
        for alphabet in self._alphabets:
            for path in (folder / alphabet).glob("character*/*.png"):
                names[path.relative_to(folder).as_posix()] = path
        entries = self._named(folder, names)
        return {drawing: (path, _reader(path)) for drawing, path in entries.items()}

    def _of_zip(self, path: Path) -> dict[Drawing, tuple[Path, Read]]:
        contents = self._contents(path)
        entries = self._named(path, {name: path / name for name in contents})
        found: dict[Drawing, tuple[Path, Read]] = {}
        for drawing, where in entries.items():
            content = contents[where.relative_to(path).as_posix()]
            found[drawing] = (where, functools.partial(bytes, content))
        return found

    def _contents(self, path: Path) -> dict[str, bytes]:
        """Return the drawings of a zip by their path below the set's folder."""
        found = {}
        try:
            with opened(path) as file, zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                if len(infos) > MOST_ENTRIES:
                    raise self._wrong(path, f"has {len(infos)} entries; {self.origin}")
                for info in infos:
                    _, _, name = info.filename.partition("/")
                    if not name.endswith(".png") or name.split("/")[0] not in self._alphabets:
                        continue
                    with archive.open(info) as drawing:
                        found[name] = bytes(read_at_most(drawing, MOST_DRAWING_BYTES))
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise self._wrong(path, f"cannot be read: {error}; {self.origin}") from None
        return found

    def _named(self, place: Path, names: Mapping[str, Path]) -> dict[Drawing, Path]:
        """Return the drawings that these file names stand for."""
        found: dict[Drawing, Path] = {}
        for name, path in names.items():
            parts = re.fullmatch(r"([^/]+)/character(\d\d)/\d{4}_(\d\d)\.png", name)
            if parts is None:
                raise self._wrong(
                    place, f"{name} is no drawing: ALPHABET/characterNN/NNNN_DD.png is expected"
                )
            drawing = (parts[1], int(parts[2]), int(parts[3]))
            if drawing in found:
                raise self._wrong(
                    place,
                    f"{name} and {found[drawing].name} are the same drawer of one character; {self.origin}",
                )
            found[drawing] = path
        return found

    def _check_all_there(self, wanted: set[Drawing], found: set[Drawing]) -> None:
        """Raise a ConfigError that names drawers that are missing, or one that is not official."""
        problems: dict[str, list[int]] = {}
        for alphabet, character, drawer in sorted(wanted - found):
            problems.setdefault(f"{alphabet}/character{character:02}", []).append(drawer)
        sentences = [
            f"{where}: drawers are missing: {', '.join(f'{k:02}' for k in drawers)}"
            for where, drawers in list(problems.items())[:10]
        ]
        if len(problems) > 10:
            sentences.append(f"{len(problems) - 10} more characters")
        for alphabet, character, drawer in sorted(found - wanted)[:3]:
            if alphabet in self._alphabets:
                sentences.append(
                    f"{alphabet}/character{character:02}: {drawer:02} is no official drawer"
                )
        if sentences:
            root = self._root
            raise ConfigError(
                [f"data {self.name}: {root}: {text}; {self.origin}" for text in sentences]
            )


def _reader(path: Path) -> Read:
    def read() -> bytes:
        with opened(path) as file:
            return bytes(read_at_most(file, MOST_DRAWING_BYTES))

    return read
