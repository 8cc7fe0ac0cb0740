"""Experiments in buckets: `s3://BUCKET/PREFIX` and `gs://BUCKET/PREFIX`, behind `storage.Mirror`.

Buckets cannot append to objects. So every node has a mirror on its own disk, below
~/.cache/tfkd_ray/storage/, and all other code works on the mirror's paths. Each object has one
writer:

    the driver          everything but what follows: uploaded as it changes, the study last, by `Upload`
    a trial's process   its run state, weights and error (`OF_TRIALS`), by `send`; fetched by `bring` where it starts
    a teacher's task    its folder below teachers/
    stop/               what `tfkd stop` asks of the driver, which removes it when it is done
    driver.json         which driver holds the experiment, refreshed with every upload; see `Claim`

Credentials come from the environment or from the node's role, as pyarrow's S3 and Google clients find them; an endpoint
other than Amazon's or Google's from AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or STORAGE_EMULATOR_HOST. To add a kind of
storage: its scheme in `_HELP`, its file system in `Store._files`, its errors in `_KNOWN_FILES`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import cache_folder, opened, whole_file, write_text
from tfkd_ray.settings.passwords import shown, without_secrets
from tfkd_ray.settings.yaml import Tree
from tfkd_ray.store.experiment import STOPS, damaged, parse_json, read_text

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


UPLOAD_S = 10.0
"""Seconds between a driver's uploads: the most work lost with its disk."""
STALE_S = 60.0
"""Seconds after which a driver that has not refreshed its claim counts as dead."""
PATIENCE_S = 300.0
"""Seconds that a trial waits for a store that it cannot continue without."""
UPLOAD_END_S = 60.0
"""Seconds that a driver tries to upload the rest at its end."""
AT_ONCE = 16
"""Concurrent requests."""

OF_TRIALS = (
    "last.ckpt",
    "last.ckpt.new",
    "before.ckpt",
    "student.safetensors",
    "error.txt",
    "out_of_memory",
)
"""Files in a trial's folder that the trial's own process writes, on its node."""
DRIVER_FILE = "driver.json"
_INDEX, _SESSION, _MARK = ".objects.json", ".session", ".store.json"

_HELP = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the nodes a role",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or give the nodes a service account",
}
_KNOWN_FILES = (
    (
        r"INVALID_ACCESS_KEY_ID|SIGNATURE|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|EXPIRED|MISSING_AUTH|UNAUTHENTICATED"
        r"|invalid_grant|OAuth",
        "the credentials are not accepted; {help}",
    ),
    (
        r"ACCESS_DENIED|AccessDenied|PERMISSION_DENIED|Forbidden|HTTP status 403",
        "not allowed with these credentials; ask for the right to list, read, write and delete there, or {help}",
    ),
    (
        r"NETWORK_CONNECTION|UNAVAILABLE|DEADLINE|curlCode|resolve|retry policy exhausted",
        "does not answer; check the network and the endpoint{endpoint}",
    ),
    (
        r"NO_SUCH_BUCKET|[Bb]ucket.* (does not exist|not found)|NOT_FOUND.*(CreateResumableUpload|InsertObject)",
        "no such bucket; create it, or correct the URL",
    ),
    (r"HTTP status 301|PermanentRedirect", "the bucket is in another region; set AWS_REGION to it"),
)

_Result = TypeVar("_Result")
Want = Callable[[str], bool]
"""Accepts the names of the objects to fetch."""


class Object(NamedTuple):
    """Size and time of an object, as a listing gives them."""

    size: int
    time: float
    """Time of writing, by the store's clock."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A place for experiments and teachers on object storage: s3://BUCKET/PREFIX.

    Object names are relative to it, with slashes.
    """

    url: str
    endpoint: str = ""

    @property
    def folder(self) -> Path:
        """Its mirror on this node."""
        readable = re.sub(r"[^A-Za-z0-9.-]+", "-", self.url.partition("://")[2])[:40]
        digest = hashlib.sha256(f"{self.url} {self.endpoint}".encode()).hexdigest()[:12]
        return cache_folder() / "storage" / f"{readable}-{digest}"

    def objects(self, below: str = "") -> dict[str, Object]:
        """Return all objects below a name, by name. Raises an OSError, as all methods do."""
        found = self._listed(below, recursive=True)
        root = len(self._path("")) + 1
        files = {i.path[root:]: Object(i.size, i.mtime.timestamp()) for i in found if i.is_file}
        # skip names that would escape the mirror or collide with its own files
        return {
            name: about for name, about in files.items() if not re.search(r"(^|/)(\.|/|$)|\0", name)
        }

    def names(self) -> list[str]:
        """Return the names of experiments and other folders directly below."""
        return sorted(
            i.base_name for i in self._listed("", recursive=False) if i.type.name == "Directory"
        )

    def _listed(self, below: str, *, recursive: bool) -> list[Any]:
        """Return pyarrow's entries below a name; empty if it does not exist."""
        from pyarrow.fs import FileSelector

        absent = self.url.startswith("gs://")  # pyarrow raises no specific error
        try:
            selector = FileSelector(self._path(below), recursive=recursive, allow_not_found=absent)
            return list(self._files.get_file_info(selector))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes | None:
        """Read an object's content; None if it does not exist."""
        try:
            with self._files.open_input_stream(self._path(name)) as file:
                content: bytes = file.read()
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write an object atomically."""
        with self._files.open_output_stream(self._path(name)) as file:
            file.write(content)

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def now(self) -> float:
        """Return the time by the store's clock, and test that the store is writable."""
        self.write(
            ".tfkd", b"Written by tfkd to see whether it may. Experiments are beside this.\n"
        )
        found = self.info(".tfkd")
        return found.time if found else time.time()

    def info(self, name: str) -> Object | None:
        """Return size and time of one object; None if it does not exist."""
        found = self._files.get_file_info(self._path(name))
        return Object(found.size, found.mtime.timestamp()) if found.is_file else None

    def mark(self) -> Path:
        """Make the mirror, so that `store_of` recognises it; return its folder."""
        if not (self.folder / _MARK).exists():
            write_text(
                self.folder / _MARK, json.dumps({"url": self.url, "endpoint": self.endpoint})
            )
        return self.folder

    def trouble(self, error: Exception) -> str:
        """Return a sentence on an error of the store, with a way out."""
        from urllib.request import getproxies

        scheme, text = self.url.partition("://")[0], str(error)
        where = {"endpoint": f" ({self.endpoint})" if self.endpoint else "", "help": _HELP[scheme]}
        for pattern, sentence in _KNOWN_FILES:
            if re.search(pattern, text):
                return sentence.format(**where)
        return (
            without_secrets(text.splitlines()[0], getproxies().values())
            if text
            else type(error).__name__
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url, self.endpoint)  # without connection and credentials

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self.url.partition("://")[2], name) if part)

    @functools.cached_property
    def _files(self) -> "FileSystem":
        from pyarrow import fs

        scheme, _, rest = self.url.partition("://")
        if scheme == "gs":
            by, _, host = self.endpoint.partition("://")
            # an emulator, named by Google's own variable, needs no credentials
            other = {"endpoint_override": host, "scheme": by, "anonymous": True} if host else {}
            return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=8), **other)
        other = dict(zip(("scheme", "endpoint_override"), self.endpoint.split("://"), strict=False))
        if not self.endpoint:
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            other = {"region": region or fs.resolve_s3_region(rest.partition("/")[0])}
        # objects are small, so one request each; give up within 10 s without an answer
        strategy = fs.AwsStandardS3RetryStrategy(max_attempts=2)
        return fs.S3FileSystem(
            connect_timeout=2,
            request_timeout=4,
            retry_strategy=strategy,
            allow_delayed_open=True,
            **other,
        )


# --- names -----------------------------------------------------------------------------------------------------


def store_at(url: str) -> Store:
    """Return the store that a URL names, or raise a ConfigError; needs no network."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(
            f"storage: {error}: a directory, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
        ) from None
    if (
        "@" in parts.netloc or parts.query or parts.fragment
    ):  # not repeated in the message: it may hold a secret
        raise ConfigError(
            f"storage: {parts.scheme}://BUCKET/PREFIX, and nothing more: credentials come from the environment "
            f"({_HELP.get(parts.scheme, 'see docs/storage.md')}), an endpoint from AWS_ENDPOINT_URL, a region from "
            "AWS_REGION"
        )
    words = [word for word in parts.path.split("/") if word]
    if (
        parts.scheme not in _HELP
        or not re.fullmatch(r"[A-Za-z0-9._-]+", parts.netloc)
        or {".", ".."} & set(words)
    ):
        raise ConfigError(
            f"storage: a directory, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, got {shown(url)!r}"
        )
    names = (
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        if parts.scheme == "s3"
        else ("STORAGE_EMULATOR_HOST",)
    )
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), "").rstrip("/")
    if endpoint and not re.fullmatch(r"https?://[^/@?#]+", endpoint):
        raise ConfigError(
            f"{' or '.join(names)}: http://HOST:PORT or https://HOST, without credentials"
        )
    return Store(f"{parts.scheme}://{'/'.join([parts.netloc, *words])}", endpoint)


def experiment_at(url: str) -> tuple[Store, str]:
    """Return (store, name) of an experiment's URL."""
    whole = store_at(url)
    above, _, name = whole.url.rpartition("/")
    if above.endswith("/"):  # the URL has only a bucket
        raise ConfigError(
            f"an experiment's URL is STORAGE/NAME, such as {whole.url}/digits-1, got {url}"
        )
    return Store(above, whole.endpoint), name


def store_of(folder: Path) -> Store | None:
    """Return the store whose mirror a folder is; None for any other folder."""
    mark = folder / _MARK
    if folder.parent != cache_folder() / "storage" or not os.path.lexists(mark):
        return None
    with damaged(mark):
        return Store(**parse_json(read_text(mark)))


@contextlib.contextmanager
def said(store: Store) -> Iterator[None]:
    """Raise a store's errors as ConfigErrors."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # an error of this node's disk
            raise
        raise ConfigError(store.trouble(error), store.url) from None


# --- from the store --------------------------------------------------------------------------------------------


def fetch(store: Store, below: str, want: Want) -> None:
    """Bring the mirror of a folder up to date with the store.

    Only changed objects are read. Files written by the mirror's own driver are newer than the
    store's and are kept, unless another driver has run the experiment since.
    """
    folder = store.mark() / below
    objects = store.objects(below)
    mine = _is_ours(store, below, objects)
    if mine:
        missing = {n for n in objects if not (store.folder / n).exists()} - {
            f"{below}/{DRIVER_FILE}"
        }
        objects = {n: o for n, o in objects.items() if _of_trial(n) or n in missing}
    index = _read_index(folder)
    newest = max((o.time for o in objects.values()), default=0.0)

    def current(name: str, there: Object) -> bool:
        # times are whole seconds: a recent object may be written again within the same second
        path, known = store.folder / name, index.get(name)
        return (
            known is not None
            and known[:2] == list(there)
            and there.time < newest - 2
            and _stat(path) == known[2:]
        )

    def get(name: str) -> None:
        content = store.read(name)
        if content is not None:
            with whole_file(store.folder / name) as part:
                part.write_bytes(content)
                os.utime(part, (objects[name].time, objects[name].time))
            index[name] = [*objects[name], *(_stat(store.folder / name) or ())]

    _all_at_once(get, [n for n, o in objects.items() if want(n) and not current(n, o)])
    if not mine:
        for path in _files_in(folder):
            name = path.relative_to(store.folder).as_posix()
            if want(name) and name not in objects:
                path.unlink(missing_ok=True)
                index.pop(name, None)
    if folder.exists():
        _write_index(folder, index)


def bring(store: Store, name: str) -> None:
    """Bring the mirror of one file up to date; remove it if the store lacks it."""
    path, content = store.folder / name, store.read(name)
    if content is None:
        path.unlink(missing_ok=True)
    else:
        with whole_file(path) as part:
            part.write_bytes(content)


def send(store: Store, *names: str) -> None:
    """Upload files of the mirror in order; remove from the store those that do not exist here."""
    for name in names:
        path = store.folder / name
        if path.exists():
            store.write(name, _content(path))
        else:
            store.remove(name)


def patiently(act: Callable[[], _Result], store: Store) -> _Result:
    """Call `act` until the store answers; return its result.

    After `PATIENCE_S` it raises an OSError that says what is wrong.
    """
    until, wait = time.monotonic() + PATIENCE_S, 1.0
    while True:
        try:
            return act()
        except OSError as error:
            if error.filename is not None:
                raise
            if time.monotonic() + wait > until:
                raise OSError(f"{store.url}: {store.trouble(error)}") from None
            time.sleep(wait)
            wait = min(2 * wait, 10.0)


# --- from the driver -------------------------------------------------------------------------------------------


def check_new_in(store: Store, name: str) -> None:
    """Raise a ConfigError if the store has an experiment of this name.

    An OSError if the store cannot be written to.
    """
    store.now()
    if store.objects(name):
        message = (
            f"experiment {name!r} exists already; choose another name, or resume it: tfkd resume"
        )
        raise ConfigError(f"{message} {store.url}/{name}", store.url)


class Claim:
    """A driver's claim to an experiment in a store: an object that the driver refreshes.

    Best effort, as pyarrow cannot write an object only if it is absent: of two drivers that begin
    within the same second the later one wins, and the other is stopped at its next upload.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name, self.folder, self.url = (
            store,
            name,
            store.folder / name,
            f"{store.url}/{name}",
        )
        self.session = uuid.uuid4().hex

    def take(self) -> None:
        """Claim the experiment; a ConfigError names the driver that holds it, and its host."""
        with said(self.store):
            now = self.store.now()
            written, other = self.store.info(f"{self.name}/{DRIVER_FILE}"), self._read()
            # a driver with this same mirror has ended, as this process holds the mirror's lock
            ours = other and _session(self.folder) == str(other["session"])
            if written and other and not other["ended"] and not ours:
                age = max(0.0, now - written.time)
                if age < STALE_S:
                    raise ConfigError(
                        f"is being run by process {other['process']} on {other['host']}, last seen {age:.0f} s ago; "
                        f"wait for it, or stop it first; if it has died, try again in {STALE_S - age + 1:.0f} s",
                        self.url,
                    )
            if other is not None and other["session"] not in (
                _session(self.folder),
                self._fetched(),
            ):
                raise ConfigError("was run by another driver in the meantime; try again", self.url)
            write_text(self.folder / _SESSION, self.session)
            (self.folder / DRIVER_FILE).unlink(missing_ok=True)
            self._write(ended=False)
            self.check()

    def check(self) -> None:
        """Raise a ConfigError if another driver has taken over the experiment."""
        other = self._read()
        if other is not None and other["session"] != self.session:
            raise ConfigError(
                f"was taken over by process {other['process']} on {other['host']}; this sweep uploads nothing more",
                self.url,
            )

    def refresh(self) -> None:
        """Renew the claim."""
        self.check()
        self._write(ended=False)

    def release(self) -> None:
        """Give up the claim, so that other drivers may run the experiment."""
        self.check()
        self._write(ended=True)

    def _fetched(self) -> str | None:
        """Return the session whose files were fetched."""
        path = self.folder / DRIVER_FILE
        if not os.path.lexists(path):
            return None
        with damaged(path):
            return str(parse_json(read_text(path))["session"])

    def _read(self) -> Tree | None:
        content = self.store.read(f"{self.name}/{DRIVER_FILE}")
        return None if content is None else dict(json.loads(content))

    def _write(self, *, ended: bool) -> None:
        about = {
            "session": self.session,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "ended": ended,
        }
        self.store.write(f"{self.name}/{DRIVER_FILE}", json.dumps(about).encode())


class Upload:
    """Uploads a driver's changes in an experiment's folder; it remembers what the store has."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self._experiment = store, name, store.folder / name
        self._seen: set[str] = set()

    def once(self) -> int:
        """Bring the store up to date; return how many objects were written or removed.

        The study is read first and written last, so that the files of every trial that it calls
        ended are uploaded before it. It may lack trials that began meanwhile: see `drop_unknown`.
        """
        index = _read_index(self._experiment)
        study = f"{self._name}/study.journal"
        before = _stat(self._store.folder / study)
        journal = _content(self._store.folder / study) if before else b""
        found = {
            p.relative_to(self._store.folder).as_posix(): p
            for p in _files_in(self._experiment)
            if self._ours(p)
        }
        stats = {name: _stat(path) for name, path in found.items()} | {study: before}
        changed = {name for name, stat in stats.items() if stat and stat != index.get(name, [])[2:]}
        gone = self._seen - set(found)

        def put(name: str) -> None:
            try:
                content = journal if name == study else _content(found[name])
            except FileNotFoundError:  # removed meanwhile
                return
            self._store.write(name, content)
            index[name] = [
                None,
                None,
                *(stats[name] or ()),
            ]  # later changes are uploaded the next time

        def remove(name: str) -> None:
            self._store.remove(name)
            index.pop(name, None)

        try:
            _all_at_once(put, sorted(changed - {study}))
            _all_at_once(remove, sorted(gone))
            _all_at_once(put, sorted(changed & {study}))
            self._seen = set(found)
        finally:
            if changed or gone:
                _write_index(self._experiment, index)
        return len(changed) + len(gone)

    def _ours(self, path: Path) -> bool:
        inside = path.relative_to(self._experiment).parts
        if inside[0] in ("groups", STOPS) or path.name in (
            "driver.lock",
            "study.journal.lock",
            DRIVER_FILE,
        ):
            return False
        if inside[0] == "trials" and len(inside) == 2:  # Ray Tune's own files, which nothing reads
            return False
        return not _of_trial(path.relative_to(self._store.folder).as_posix())


def drop_unknown(experiment: Path, known: Iterable[str]) -> None:
    """Remove the trials of a fetched mirror that its study lacks and that were uploaded after it.

    They began after the study's last upload, by a driver that was lost with its disk. The search
    proposes them again.
    """
    index, names, name = _read_index(experiment), set(known), experiment.name
    written = {n: about[1] for n, about in index.items() if about[1] is not None}
    for folder in (experiment / "trials").glob("*"):
        when = written.get(f"{name}/trials/{folder.name}/trial.json")
        if (
            folder.name not in names
            and when is not None
            and when >= written.get(f"{name}/study.journal", math.inf)
        ):
            shutil.rmtree(folder)


# --- bits ------------------------------------------------------------------------------------------------------


def _of_trial(name: str) -> bool:
    """Return whether the trial's own process writes this object."""
    parts = name.split("/")
    return len(parts) == 4 and parts[1] == "trials" and parts[3] in OF_TRIALS


def _is_ours(store: Store, below: str, objects: dict[str, Object]) -> bool:
    """Return whether this mirror's own driver was the last to run an experiment."""
    session = _session(store.folder / below)
    if session is None or f"{below}/{DRIVER_FILE}" not in objects:
        return False
    content = store.read(f"{below}/{DRIVER_FILE}")
    return content is not None and json.loads(content)["session"] == session


def _session(experiment: Path) -> str | None:
    path = experiment / _SESSION
    if not os.path.lexists(path):
        return None
    with damaged(path):
        return read_text(path)


def _content(path: Path) -> bytes:
    with opened(path, follow=False) as file:
        return file.read()


def _files_in(folder: Path) -> list[Path]:
    """Return the files below a folder without links, pipes, devices, hidden and partial files."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(where) / n for n in names if not n.startswith(".") and not n.endswith(".part")
        ]
    return [path for path in sorted(found) if path.is_file() and not path.is_symlink()]


def _stat(path: Path) -> list[int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return [facts.st_size, facts.st_mtime_ns]


def _read_index(folder: Path) -> Tree:
    """Read, by name, size and time of the object and of its file; null if unknown."""
    try:
        found: Tree = parse_json(read_text(folder / _INDEX))
    except (OSError, ValueError):
        return {}
    return found


def _write_index(folder: Path, index: Tree) -> None:
    with whole_file(folder / _INDEX) as part:
        part.write_text(json.dumps(index))


def _all_at_once(act: Callable[[str], None], names: list[str]) -> None:
    """Call `act` for each name, `AT_ONCE` at a time; the first error stops the rest."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(act, name) for name in names]
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
