"""Experiments with one damaged file: every reading command succeeds or prints one sentence.

TFKD_FUZZ sets the number of damages to a fifth of its value (50), TFKD_FUZZ_SEED the seed (printed
on failure).
"""

import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import long_after
from hypothesis import given
from hypothesis import strategies as st
from test_data import pickled, write_cifar, write_idx, write_tiny
from test_folder import write_folder
from test_fuzz import TREE, often
from test_report import make_comparison

import tfkd_ray.run.tune
from tfkd_ray.cli.main import main
from tfkd_ray.learn.checkpoint import load_state, save_state, save_weights
from tfkd_ray.learn.image_files import ImageFolder, TinyImagenet
from tfkd_ray.learn.models import Mlp
from tfkd_ray.learn.official import Cifar100, Mnist
from tfkd_ray.learn.weights import load_outside
from tfkd_ray.run.journal import open_journal
from tfkd_ray.run.tune import resume_tuner
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import dump_yaml, parse_yaml
from tfkd_ray.show.chosen import choose
from tfkd_ray.show.status import last_line
from tfkd_ray.show.tensorboard import side_by_side
from tfkd_ray.space import arms
from tfkd_ray.store.experiment import read_metrics

COUNT = int(os.environ.get("TFKD_FUZZ", "50"))
SEED = int(os.environ.get("TFKD_FUZZ_SEED", "0"))
SLOWEST_S = 2.0
RELEASE = Path(__file__).parent / "data" / "experiment-0.1.0"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a real sweep of digits with its teacher, and a judged comparison beside it."""
    storage = tmp_path_factory.mktemp("damage") / "storage"
    shutil.copytree(RELEASE, storage, symlinks=True)
    make_comparison(storage / "arms")
    return storage


def harmed(content: bytes, rng: random.Random, suffix: str) -> bytes:
    """Damage a file as a disk, a crash or a person does."""
    at = rng.randrange(len(content) or 1)
    way = rng.randrange(8)
    if way == 0:
        return content[:at]
    if way == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if way == 2:
        return content[:at] + bytes(rng.randrange(1, 60)) + content[at + 40 :]
    if way == 3:
        return content[:at] + content[at : at + 90] * rng.choice([2, 40]) + content[at + 90 :]
    if way == 4:
        return rng.choice(
            [
                b"",
                b"\n",
                b"null\n",
                b"[]\n",
                b"{}\n",
                b"7\n",
                b'"x"\n',
                b"\xff\xfe\n",
                b"[" * 10**5,
                b"1" * 5000,
            ]
        )
    read: Any = parse_yaml if suffix == ".yaml" else lambda text, source: json.loads(text)
    try:  # changed content, valid syntax
        lines = content.decode().splitlines() if suffix == ".jsonl" else [content.decode()]
        number = rng.randrange(len(lines))
        tree = read(lines[number], "it")
        for _ in range(rng.randrange(1, 4)):
            rng.choice(TREE)(tree, rng)
        lines[number] = (
            dump_yaml(tree)
            if suffix == ".yaml"
            else json.dumps(tree, indent=None if suffix == ".jsonl" else 1)
        )
        return "\n".join([*lines, ""]).encode(errors="surrogatepass")
    except Exception:  # not text, or the rest cannot be written
        return content[at:]


def kind_of(path: Path) -> str:
    """Return the kind of a file; all kinds are damaged equally often."""
    return "events" if path.name.startswith("events.") else path.suffix


class Reached(Exception):
    """Raised when a resume has read everything that it reads before it needs Ray."""


def reads(storage: Path, out: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, function) of everything that reads an experiment."""
    sweep, compared = storage / "sweep", storage / "arms"
    for argv in (
        ["status", sweep], ["status", sweep, "--json"], ["best", sweep], ["best", sweep, "--json"], ["trials", sweep],
        ["trials", sweep, "-o", "csv"], ["trials", sweep, "-o", "json", "--sort", "val_accuracy:desc"], ["logs", sweep, "0"],
        ["ls", "--storage", storage], ["report", sweep, "-o", out], ["status", compared], ["trials", compared],
        ["report", compared, "-o", out], ["teacher", "list", "--storage", storage],
    ):  # fmt: skip
        words = [str(word) for word in argv]
        yield "tfkd " + " ".join(words), lambda words=words: main(words)
    yield "export, choosing", lambda: choose(sweep)
    yield "export, choosing an arm", lambda: choose(compared)
    yield "confirm, its arms", lambda: arms.arms_of(sweep)
    yield (
        "confirm, its baselines",
        lambda: arms.baseline_space(sweep, arms.untuned(sweep) or ["ce"], 1),
    )
    (out.parent / "tb").mkdir(exist_ok=True)
    yield (
        "tensorboard, several",
        lambda: side_by_side(out.parent / "tb", {"a": sweep, "b": compared}),
    )
    yield "resume, before Ray", lambda: resume_tuner(sweep, add_trials=1)


@pytest.mark.slow
@pytest.mark.parametrize("part", long_after(1, range(5)))
def test_a_damaged_file_is_a_sentence_or_is_borne(
    part: int,
    storage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def reached(*args: Any, **more: Any) -> None:
        raise Reached

    monkeypatch.setattr(tfkd_ray.run.tune, "prepare", reached)
    files = sorted(
        p
        for p in storage.rglob("*")
        if p.is_file() and not p.is_symlink() and ".lock" not in p.name
    )
    refused = 0
    for number in range(COUNT // 25):
        seed = f"{SEED}/{part}/{number}"
        rng = random.Random(seed)
        kind = rng.choice(sorted({kind_of(p) for p in files}))
        path = rng.choice([p for p in files if kind_of(p) == kind])
        whole = path.read_bytes()
        path.write_bytes(harmed(whole, rng, path.suffix))
        name = ""
        try:
            for name, read in reads(storage, tmp_path / "report.html"):  # noqa: B007
                start, cpu = time.monotonic(), time.process_time()
                try:
                    code = read()
                except ConfigError as error:
                    code = 2
                    assert error.source or str(storage) in str(error) or ":" in str(error), str(
                        error
                    )
                except Reached:
                    code = 0
                out, err = capsys.readouterr()
                assert "Traceback" not in out + err
                assert not isinstance(code, int) or code in (0, 2) or (code == 1 and err)
                assert (
                    time.process_time() - cpu < SLOWEST_S
                    and time.monotonic() - start < 10 * SLOWEST_S
                )
                refused += code == 2
        except BaseException as error:
            error.add_note(
                f"TFKD_FUZZ_SEED={SEED}, {seed}: {name}; {path.relative_to(storage)}:\n{path.read_bytes()[:3000]!r}"
            )
            raise
        finally:
            path.write_bytes(whole)
            (storage / "sweep/driver.txt").unlink(missing_ok=True)
    assert refused > 0 or COUNT < 2500  # few damages may all affect files that only a resume reads


# --- memory: what a file claims is not what it gets ----------------------------------------------------------------

HUGE = """
import os, resource, sys
from pathlib import Path
from safetensors import SafetensorError
from tfkd_ray.launch.clusterfile import load_cluster
from tfkd_ray.learn.checkpoint import load_state, load_weights
from tfkd_ray.learn.image_files import TinyImagenet
from tfkd_ray.learn.models import Mlp
from tfkd_ray.learn.official import Cifar100, Mnist
from tfkd_ray.learn.weights import load_outside
from tfkd_ray.run.auth import token_in
from tfkd_ray.run.journal import open_journal
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.yaml import read_yaml
from tfkd_ray.show.status import status
from tfkd_ray.store.experiment import gone_trials, read_metrics, read_record, read_spent

def outside(path):
    return load_outside(str(path), Mlp(hidden=(8,)), (1, 8, 8), 10)

def state(folder):
    sys.exit(load_state(folder, print) is None and 2)

def said(folder):
    network = Mlp(hidden=(8,)).build((1, 8, 8), 10)
    try:
        load_weights(folder / "student.safetensors", network=network)
    except (SafetensorError, RuntimeError) as error:
        raise ConfigError(f"damaged: {error}")

READS = {
    "metrics": read_metrics, "last": lambda f: status(f.parent.parent), "trial": read_record,
    "spent": read_spent, "yaml": lambda f: read_yaml(f / "experiment.yaml"),
    "idx": lambda f: Mnist(root=f).load(),
    "cifar": lambda f: Cifar100(root=f, check_md5=False).load_test(),
    "weights": lambda f: outside(f / "w.safetensors"), "pt": lambda f: outside(f / "w.pt"),
    "tiny": lambda f: TinyImagenet(root=f).load(), "state": state, "holes": state,
    "tail": said, "hollow": said, "slurm": lambda f: load_cluster(f / "job.sh"),
    "token": lambda f: token_in(f / "auth_token"),
    "gone": lambda f: print(len(gone_trials(f)), "trials are gone"),
    "journal": lambda f: open_journal(f / "study.journal"),
}

def read(what, folder):
    sys.stdout = sys.stderr = Path("said.txt").open("w", buffering=1)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 900 * 2**20, now + 900 * 2**20))
    try:
        READS[what](folder)
    except ConfigError as error:
        print(error)
        sys.exit(2)

for line in sys.stdin:
    what, folder = line.rstrip().split(" ", 1)
    child = os.fork()
    if not child:
        os.chdir(folder)
        read(what, Path(folder))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Each line, a kind of file and its folder, is read in a fork with 900 MiB more than it begins with;
what that says is in said.txt there."""


@pytest.fixture(scope="module")
def reader() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HUGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as found:
        yield found


def sparse(path: Path, size: int, begin: bytes = b"") -> None:
    """Write a sparse file of so many bytes: a beginning, then zeros."""
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(size)


def claims(folder: Path, what: str) -> None:
    """Write a file that is, or claims to be, a terabyte or so."""
    if what == "tiny":
        (folder / "train").mkdir()
        (folder / "val/images").mkdir(parents=True)
        (folder / "val/val_annotations.txt").touch()
        sparse(folder / "wnids.txt", 2**40)
    elif what in ("slurm", "token"):
        name = {"slurm": "job.sh", "token": "auth_token"}[what]
        sparse(folder / name, 2**40, b"#SBATCH -N 1\n")
    elif what in ("journal", "gone"):  # a study, then a terabyte without a line
        sparse(folder / "study.journal", 2**40, (RELEASE / "sweep/study.journal").read_bytes())
    elif what in ("metrics", "last", "trial", "spent", "yaml"):
        name = {
            "metrics": "metrics.jsonl",
            "last": "metrics.jsonl",
            "trial": "trial.json",
            "spent": "spent.json",
            "yaml": "experiment.yaml",
        }[what]
        sparse(folder / name, 2**40)
    elif what in ("state", "holes"):
        head = hashlib.sha256(b"").hexdigest().encode() + b"\n" if what == "holes" else b""
        sparse(folder / "last.ckpt", 2**40, head + b"PK" * len(head))
    elif what in ("tail", "hollow"):
        size = 400 if what == "tail" else 4 * 10**11
        head = json.dumps(
            {"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
        ).encode()
        begin = struct.pack("<Q", len(head)) + head
        whole = 2**40 if what == "tail" else size + len(begin)
        sparse(folder / "student.safetensors", whole, begin)
    elif what == "idx":
        for stem, magic, shape in (("images-idx3", 0x803, (28, 28)), ("labels-idx1", 0x801, ())):
            head = struct.pack(f">{2 + len(shape)}I", magic, 60000, *shape)
            for split in ("train", "t10k"):
                with gzip.open(
                    folder / f"{split}-{stem}-ubyte.gz", "wb", 1
                ) as file:  # 300 MB that take 1 MB here
                    file.write(head)
                    for _ in range(300):
                        file.write(bytes(2**20))
    elif what == "cifar":
        (folder / "cifar-100-python").mkdir()
        for name in ("train", "test"):  # a list and a string of 2^31 bytes that are missing
            (folder / "cifar-100-python" / name).write_bytes(
                b"\x80\x02}(U\x04dataT" + struct.pack("<i", 2**31 - 1) + b"xx"
            )
    elif what == "weights":
        head = json.dumps(
            {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
        ).encode()
        (folder / "w.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(40))
    else:
        (folder / "w.pt").write_bytes(b"PK\x03\x04" + bytes(100))


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    long_after(
        5,
        [
            "metrics",
            "last",
            "trial",
            "spent",
            "yaml",
            "journal",
            "gone",
            "slurm",
            "token",
            "idx",
            "cifar",
            "tiny",
            "weights",
            "pt",
            "state",
            "holes",
            "tail",
            "hollow",
        ],
    ),
)
def test_memory_follows_what_is_there_and_not_what_is_claimed(
    what: str, reader: subprocess.Popen[str], tmp_path: Path
) -> None:
    folder = tmp_path
    if what in ("last", "trial"):
        shutil.copytree(RELEASE, tmp_path / "storage", symlinks=True)
        folder = tmp_path / "storage/sweep/trials/t0002-ce"
    claims(folder, what)
    assert reader.stdin is not None and reader.stdout is not None
    start = time.monotonic()
    print(what, folder, file=reader.stdin, flush=True)
    code = reader.stdout.readline()
    said = (folder / "said.txt").read_text()
    said_no = 0 if what == "gone" else 2  # readers go on where a journal ends
    assert code == f"{said_no}\n", said[-2000:]
    assert what != "gone" or said == "8 trials are gone\n"
    assert len(said) > 10 and "MemoryError" not in said and time.monotonic() - start < 60


# --- readers of data and run states, with any byte changed ---------------------------------------------------------


def changed(whole: bytes, data: st.DataObject) -> bytes:
    """Replace, remove or insert a few bytes of a file."""
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.sampled_from([0, 1, 4, 500]))] = data.draw(
            st.binary(max_size=12)
        )
    return bytes(content)


@pytest.mark.slow
@often
@given(data=st.data())
@pytest.mark.parametrize("gz", [False, True], ids=["raw", "gz"])
def test_any_bytes_in_an_idx_file_are_images_or_a_sentence(
    gz: bool, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder, gz=gz)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    path.write_bytes(changed(path.read_bytes(), data))
    try:
        images, labels = Mnist(root=folder)._official("train")
        assert (
            images.shape[1:] == (1, 28, 28)
            and len(images) == len(labels)
            and int(labels.max()) < 10
        )
    except ConfigError as error:
        assert path.name in str(error), str(error)


@pytest.mark.slow
@often
@given(data=st.data())
def test_any_bytes_in_a_batch_of_cifar_are_images_or_a_sentence(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cifar")
    batch = pickled(Cifar100)["test"]
    head, tail = batch[:700], batch[-900:]  # what is not pixels
    part = (
        changed(head, data) + batch[700:-900] + tail
        if data.draw(st.booleans())
        else batch[:-900] + changed(tail, data)
    )
    try:
        images, _ = write_cifar(folder, Cifar100, {"test": part}, archive=False)._official("test")
        assert images.shape[1:] == (3, 32, 32)
    except ConfigError as error:
        assert str(error).startswith("data cifar100: ") and "/test: " in str(error), str(error)


@pytest.mark.slow
@often
@given(data=st.data())
@pytest.mark.parametrize("kind", ["last.ckpt", "w.safetensors", "w.pt"])
def test_any_bytes_in_a_run_state_or_in_weights_are_noticed(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("state")
    network = Mlp(hidden=(8,)).build((1, 8, 8), 10)
    if kind == "last.ckpt":
        save_state(folder, {"model": network.state_dict(), "epoch": 3})
    elif kind == "w.pt":
        torch.save(network.state_dict(), folder / kind)
    else:
        save_weights(folder / kind, network.state_dict(), {})
    whole = (folder / kind).read_bytes()
    (folder / kind).write_bytes(found := changed(whole, data))
    if kind == "last.ckpt":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert (load_state(folder) is None) == (found != whole)
        assert found == whole or "damaged" in str(said[0].message)
        return
    try:
        weights = load_outside(str(folder / kind), Mlp(hidden=(8,)), (1, 8, 8), 10)
        assert {k: v.shape for k, v in weights.items()} == {
            k: v.shape for k, v in network.state_dict().items()
        }
    except ConfigError as error:
        assert kind in str(error), str(error)


LINES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.builds(lambda tree: json.dumps(tree).encode(), st.dictionaries(st.sampled_from(["epoch", "val_accuracy", "x"]), st.floats() | st.integers() | st.none())),
        st.sampled_from([b"{}", b"[]", b"null", b"NaN", b"[" * 10_000, b"1" * 5000, b'{"epoch": 1}\r{"epoch": 2}', '{"epoch": 1, "\u2028": 2}'.encode()]),
    ),
    max_size=4,
).map(lambda lines: b"\n".join(lines) + b"\n")  # fmt: skip


@pytest.mark.slow
@often
@given(content=st.binary(max_size=300) | LINES, cut=st.integers(0, 20))
def test_any_bytes_in_metrics_are_metrics_or_a_sentence(
    content: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both readers of metrics.jsonl accept or refuse the same lines with the same words."""
    folder = tmp_path_factory.mktemp("trial")
    path = folder / "metrics.jsonl"
    path.write_bytes(content[: len(content) - cut])
    try:
        every = read_metrics(folder)
    except ConfigError as error:
        assert str(path) in str(error) and "was changed by hand or truncated: " in str(error)
        with contextlib.suppress(ValueError):  # `readers` reports it with the sentence above
            assert isinstance(last_line(path), dict)
        return
    assert json.dumps(last_line(path)) == json.dumps(every[-1] if every else {})


JOURNAL = (RELEASE / "sweep/study.journal").read_bytes()


@pytest.mark.slow
@often
@given(data=st.data())
def test_any_bytes_in_a_journal_are_a_study_or_a_sentence_and_nothing_is_lost(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("study") / "study.journal"
    path.write_bytes(
        found := data.draw(
            st.one_of(st.binary(max_size=200), st.just(changed(JOURNAL, data)), LINES)
        )
    )
    try:
        studies = open_journal(path).get_all_studies()
        assert all(study.study_name for study in studies)
        left = path.read_bytes()
        assert found.startswith(left) and b"\n" not in found[len(left) :], (
            "more was cut off than a half-written line"
        )
    except ConfigError as error:
        assert str(path) in str(error) and "this is no line of Optuna's journal" in str(error)
        assert path.read_bytes() == found, "what is refused is left as it is"


# --- image files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), train=2, test=1, side=16)


def damaged(path: Path, data: st.DataObject) -> Iterator[None]:
    """Change bytes of a file, replace it by a folder or remove it; restore it afterwards."""
    whole = path.read_bytes()
    way = data.draw(st.sampled_from(["changed", "changed", "changed", "changed", "folder", "gone"]))
    content = changed(whole, data)
    path.unlink()
    try:
        if way == "changed":
            path.write_bytes(content)
        elif way == "folder":
            path.mkdir()
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)


in_place = contextlib.contextmanager(damaged)
TINY = [
    "wnids.txt",
    "val/val_annotations.txt",
    "val/images/val_3.JPEG",
    "train/n00000005/images/n00000005_0.JPEG",
]


@pytest.mark.slow
@often
@given(data=st.data())
@pytest.mark.parametrize("name", TINY, ids=["classes", "annotations", "test image", "train image"])
def test_any_bytes_in_tiny_imagenet_are_images_or_a_sentence(
    name: str, data: st.DataObject, tiny: Path
) -> None:
    split = "train" if name.startswith("train") else "test"
    with pytest.MonkeyPatch.context() as patch, in_place(tiny / name, data):
        patch.setenv("XDG_CACHE_HOME", str(tiny / "wnids.txt"))  # nothing is kept
        try:
            images, labels = TinyImagenet(root=tiny)._official(split)
            assert (
                images.shape[1:] == (3, 64, 64)
                and len(images) == len(labels)
                and int(labels.max()) < 200
            )
        except ConfigError as error:
            assert str(error).startswith("data tiny_imagenet: ") and str(tiny) in str(error), str(
                error
            )


@pytest.mark.slow
@often
@given(data=st.data())
def test_any_bytes_in_an_image_of_a_folder_are_an_image_or_a_sentence(
    data: st.DataObject, folders: Path
) -> None:
    path = data.draw(st.sampled_from(sorted(folders.glob("*/*/*.*"))))
    with in_place(path, data):
        try:
            images = ImageFolder(root=folders, num_classes=2, image_size=16)
            found = images._whole("train" if "train" in path.parts else "test")
            for batch in found.read([torch.arange(len(found))]):
                assert batch.shape[1:] == (3, 16, 16)
        except ConfigError as error:
            assert str(error).startswith("data image_folder: ") and str(path.parent) in str(
                error
            ), str(error)
