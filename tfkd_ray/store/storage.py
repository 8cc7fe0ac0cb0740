"""The place of experiments: a directory, or a bucket that each node mirrors on its own disk.

`storage_at`, `checked` and `experiment_of` turn a user's text into a `Storage`, once, at the edge:
the command line, `build_tuner`, `resume_tuner`, `confirm`. Everything below receives that value and
never asks a path what it is. A process that Ray starts gets the value itself, or `Storage.wire` in
a trial's configuration, which `received` reads. To add a kind of storage: a subclass of `Storage`,
made in `storage_at`. `remote` says how buckets work.
"""

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import expanded, write_text
from tfkd_ray.store import experiment, remote
from tfkd_ray.store.remote import Claim, Store, Want

FETCH_S = 5.0
"""Seconds between the fetches of `kept_up_to_date`."""


def light(name: str) -> bool:
    """Return whether reading commands need a file: no run states, weights, events or arrays."""
    return not name.endswith((".ckpt", ".safetensors")) and "/tb/" not in name


def with_events(name: str) -> bool:
    """Return whether TensorBoard needs a file: no run states, weights or arrays."""
    return not name.endswith((".ckpt", ".safetensors"))


def to_resume(name: str) -> bool:
    """Return whether a driver needs a file to resume.

    Trials fetch their own run states and weights.
    """
    return light(name) or name.endswith("/test.safetensors")


def all_but_run_states(name: str) -> bool:
    """Return whether a file is no checkpoint of a run."""
    return not name.endswith(".ckpt")


def everything(name: str) -> bool:
    """Return True: all files are wanted."""
    return True


# --- the value -------------------------------------------------------------------------------------------------


class Storage:
    """A place for experiments and teachers. Steps that only a bucket needs do nothing here.

    Paths are on this node and below `folder`. Unless a method says otherwise, a bucket that does
    not answer raises a ConfigError.
    """

    @property
    def folder(self) -> Path:
        """The directory on this node for reading and writing all files."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise a ConfigError if the storage cannot be used."""

    def check_new(self, name: str) -> None:
        """Raise a ConfigError if an experiment of this name exists, or cannot be created."""
        raise NotImplementedError

    def fetch(self, below: str, want: Want = light, *, patiently: bool = False) -> None:
        """Bring the files below a name up to date on this node.

        Args:
            below: name of an experiment, or of a folder of teachers.
            want: accepts the names of the files to fetch.
            patiently: wait for a bucket that does not answer; an OSError after `remote.PATIENCE_S`.
        """

    def fetch_experiments(self) -> None:
        """Bring all experiments and comparisons up to date here, for reading commands."""

    def fetch_comparisons(self) -> None:
        """Bring comparisons and teachers up to date on this node, for reports and model cards."""

    def bring(self, path: Path) -> Path:
        """Bring one file up to date here, or remove it if the storage lacks it; return its path."""
        return path

    def send(self, *paths: Path, patiently: bool = False) -> None:
        """Upload files in order; remove from the storage those that no longer exist here.

        Raises an OSError if the bucket does not answer; with `patiently` only after
        `remote.PATIENCE_S`.
        """

    def begin_trial(self, directory: Path) -> None:
        """Fetch the last run state where a trial starts; waits as `patiently` does."""

    def on_saved(self, directory: Path) -> Callable[[bool], None] | None:
        """Return the function that uploads a run whenever `loop.train_in` saved it.

        None: nothing needs to be uploaded.
        """
        return None

    look_s = 1.0
    """Seconds between a driver's looks for requests."""

    def request(self, name: str, what: str) -> None:
        """Ask an experiment's driver to stop a trial, or everything; asking again changes nothing."""
        folder = self.folder / name / experiment.STOPS
        if folder.is_symlink():
            raise ConfigError(
                f"is a link to {folder.readlink()}; put a folder there, or remove it", folder
            )
        folder.mkdir(exist_ok=True)
        write_text(folder / what, "asked by tfkd stop\n")

    def requests(self, name: str) -> set[str]:
        """Return what is asked of an experiment's driver; an OSError if a bucket does not answer."""
        return experiment.stop_requests(self.folder / name)

    def withdraw(self, name: str, what: str) -> None:
        """Remove a request, if it is there; an OSError if a bucket does not answer."""
        (self.folder / name / experiment.STOPS / what).unlink(missing_ok=True)

    def hold(self, name: str) -> Claim | None:
        """Claim an experiment for this driver; a ConfigError names the driver that holds it.

        None: the driver's lock suffices.
        """
        return None

    @contextmanager
    def up_to_date(self, name: str, *beside: Path) -> Iterator[None]:
        """Work here on an experiment, its weights and teachers; then upload it and `beside`."""
        yield

    def drop_unknown(self, name: str, known: Iterable[str]) -> None:
        """Remove a fetched experiment's trials that its study lacks: `remote.drop_unknown`."""

    def wire(self) -> dict[str, str]:
        """Return the part of a trial's configuration that `received` reads."""
        return {"storage": str(self.folder)}


@dataclass(frozen=True)
class Directory(Storage):
    """A directory that every node sees."""

    path: Path

    @property
    def folder(self) -> Path:
        return self.path

    def __str__(self) -> str:
        return str(self.path)

    def check_new(self, name: str) -> None:
        experiment.check_name(name)
        experiment.check_new(self.path / name)


@dataclass(frozen=True)
class Mirror(Storage):
    """A bucket with this node's mirror of it."""

    store: Store

    @property
    def folder(self) -> Path:
        return self.store.folder

    def __str__(self) -> str:
        return self.store.url

    def trouble(self) -> str | None:
        """Return why this node cannot write to the bucket; None if it can."""
        try:
            self.store.now()
        except OSError as error:
            return self.store.trouble(error)
        return None

    def check(self) -> None:
        with remote.said(self.store):
            self.store.names()
        self.store.mark()

    def check_new(self, name: str) -> None:
        experiment.check_name(name)
        with remote.said(self.store):
            remote.check_new_in(self.store, name)
        shutil.rmtree(self.folder / name, ignore_errors=True)  # a leftover

    def fetch(self, below: str, want: Want = light, *, patiently: bool = False) -> None:
        if patiently:
            remote.patiently(lambda: remote.fetch(self.store, below, want), self.store)
            return
        with remote.said(self.store):
            remote.fetch(self.store, below, want)

    def fetch_experiments(self) -> None:
        self.check()
        here = {path.name for path in self.folder.iterdir() if path.is_dir()}
        with remote.said(self.store):
            for name in {*self.store.names(), *here} - {"teachers"}:
                remote.fetch(self.store, name, light)

    def fetch_comparisons(self) -> None:
        with remote.said(self.store):
            for name in self.store.names():
                if name == "teachers" or self.store.info(f"{name}/confirm.json"):
                    remote.fetch(self.store, name, light)

    def bring(self, path: Path) -> Path:
        with remote.said(self.store):
            remote.bring(self.store, self._name(path))
        return path

    def send(self, *paths: Path, patiently: bool = False) -> None:
        names = [self._name(path) for path in paths]
        if patiently:
            remote.patiently(lambda: remote.send(self.store, *names), self.store)
        else:
            remote.send(self.store, *names)

    def begin_trial(self, directory: Path) -> None:
        self.store.mark()
        state = directory / "last.ckpt"
        for name in remote.OF_TRIALS:  # the local copy may belong to an earlier attempt
            if name != state.name:
                (directory / name).unlink(missing_ok=True)
        remote.patiently(lambda: remote.bring(self.store, self._name(state)), self.store)
        self.send(directory / "error.txt", patiently=True)

    def on_saved(self, directory: Path) -> Callable[[bool], None]:
        state, weights = directory / "last.ckpt", directory / "student.safetensors"

        def upload(last: bool) -> None:
            if last:
                self.send(weights, state, patiently=True)
                return
            with suppress(OSError):  # the next upload follows
                self.send(state)

        return upload

    look_s = 5.0

    def request(self, name: str, what: str) -> None:
        with remote.said(self.store):
            self.store.write(f"{name}/{experiment.STOPS}/{what}", b"asked by tfkd stop\n")

    def requests(self, name: str) -> set[str]:
        found = self.store.objects(f"{name}/{experiment.STOPS}")
        return {below.rpartition("/")[2] for below in found}

    def withdraw(self, name: str, what: str) -> None:
        super().withdraw(name, what)  # a reading command may have fetched it
        self.store.remove(f"{name}/{experiment.STOPS}/{what}")

    def hold(self, name: str) -> Claim:
        claim = Claim(self.store, name)
        claim.take()
        return claim

    @contextmanager
    def up_to_date(self, name: str, *beside: Path) -> Iterator[None]:
        for below in (name, "teachers"):
            self.fetch(below, all_but_run_states)
        for path in beside:
            self.bring(path)
        try:
            yield
        finally:
            with remote.said(self.store):
                remote.Upload(self.store, name).once()
                self.send(*(path for path in beside if path.exists()))

    def drop_unknown(self, name: str, known: Iterable[str]) -> None:
        remote.drop_unknown(self.folder / name, known)

    def wire(self) -> dict[str, str]:
        return {**super().wire(), "store": self.store.url, "endpoint": self.store.endpoint}

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


class Experiment(NamedTuple):
    """A sweep or a comparison in its storage."""

    storage: Storage
    name: str

    @property
    def folder(self) -> Path:
        """Its directory on this node."""
        return self.storage.folder / self.name


# --- at the edge -----------------------------------------------------------------------------------------------

_urls: dict[str, str] = {}
"""URLs that this process was given, by their mirrors' folders."""


def is_url(place: object) -> bool:
    """Return whether a place is written as a URL."""
    return "://" in str(place)


def storage_at(place: Path | str) -> Storage:
    """Return the storage at a place that a user named, without network access.

    Raises a ConfigError if the URL names none.
    """
    if is_url(place):
        return _mirror(remote.store_at(str(place)))
    store = remote.store_of(Path(place))  # a user may name the mirror itself
    return Directory(Path(place)) if store is None else Mirror(store)


def checked(place: Storage | Path | str) -> Storage:
    """Return the storage at a place, absolute and usable; a Storage is returned unchanged.

    Raises a ConfigError if it cannot be used.
    """
    if isinstance(place, Storage):
        return place
    storage = storage_at(place if is_url(place) else absolute(place))
    storage.check()
    return storage


DEFAULT = Path("tfkd_results")
"""Where experiments lie unless a storage is named."""


def named(place: Path | str) -> Path:
    """Return a directory; of a name that is none, the experiment's in `DEFAULT`, if it is there."""
    path = Path(place)
    if len(path.parts) == 1 and not path.exists() and (DEFAULT / path).exists():
        return DEFAULT / path
    return path


def experiment_of(place: Experiment | Path | str, want: Want = light) -> Experiment:
    """Return the experiment at a place or of a name, fetched to this node if it is a URL.

    An Experiment is returned unchanged. Raises a ConfigError if the URL holds no experiment, or its
    bucket does not answer.
    """
    if isinstance(place, Experiment):
        return place
    if not is_url(place):
        path = named(place)
        return Experiment(storage_at(path.parent), path.name)
    store, name = remote.experiment_at(str(place))
    found = Experiment(_mirror(store), name)
    found.storage.fetch(name, want)
    if not found.folder.exists():
        message = "nothing found; tfkd ls --storage URL lists the experiments of a storage"
        raise ConfigError(message, str(place))
    return found


def to_continue(place: Experiment | Path | str) -> Experiment:
    """Return the experiment with all that a driver needs to resume it, its path made absolute."""
    if isinstance(place, Experiment) or is_url(place):
        return experiment_of(place, to_resume)
    return experiment_of(absolute(named(place)))


def absolute(path: Path | str) -> Path:
    """Return the absolute path, with ~ expanded."""
    return expanded(path).absolute()


def as_given(text: str) -> str:
    """Return the text with the user's URL in place of its mirror's folder."""
    for folder, url in _urls.items():
        text = text.replace(folder, url)
    return text


@contextmanager
def kept_up_to_date(places: Sequence[Path | str], want: Want = light) -> Iterator[None]:
    """Fetch the experiments of URLs every `FETCH_S`, for commands that show changes live."""
    over, urls = threading.Event(), [place for place in places if is_url(place)]

    def fetch() -> None:
        while not over.wait(FETCH_S):
            for url in urls:
                with suppress(ConfigError):  # retried next time
                    experiment_of(url, want)

    thread = threading.Thread(target=fetch, daemon=True)
    if urls:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if urls:
            thread.join()


def _mirror(store: Store) -> Mirror:
    _urls[str(store.folder)] = store.url
    return Mirror(store)


# --- on a trial's node -----------------------------------------------------------------------------------------


def received(told: Mapping[str, Any]) -> Storage | None:
    """Return the storage of a trial's configuration as this node has it; None if it names none.

    See `Storage.wire`.
    """
    if "store" in told:
        return Mirror(Store(told["store"], told["endpoint"]))
    return Directory(Path(told["storage"])) if "storage" in told else None
