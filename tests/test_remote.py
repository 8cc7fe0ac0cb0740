"""Experiments on object storage: loopback servers of moto for S3, and a fake of Google."""

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest
from conftest import ROOT, long_after
from ray import tune
from test_faults import tuning
from test_kill_points import comparison

from tfkd_ray.cli.main import main
from tfkd_ray.launch import doctor
from tfkd_ray.launch.as_job import _storage_of
from tfkd_ray.launch.check import check
from tfkd_ray.launch.clusterfile import load_cluster
from tfkd_ray.learn import teachers
from tfkd_ray.learn.checkpoint import load_state
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.teachers import teacher_name
from tfkd_ray.run import epochs as epochs_module
from tfkd_ray.run import nodes
from tfkd_ray.run.callbacks import Lock, Uploads
from tfkd_ray.run.confirm import judge_on_test
from tfkd_ray.run.tune import _teacher_task, build_tuner, resume_tuner
from tfkd_ray.settings import own_code
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.store import remote
from tfkd_ray.store.assignment import SECTION, Assignment
from tfkd_ray.store.experiment import read_records, trials_folder
from tfkd_ray.store.storage import (
    Directory,
    Experiment,
    Mirror,
    Storage,
    as_given,
    checked,
    everything,
    experiment_of,
    storage_at,
    to_continue,
)

NODE = os.environ["XDG_CACHE_HOME"]
"""The cache of the session's Ray: where trials run, so another node's disk than a test's own."""
Run = Callable[..., subprocess.CompletedProcess[str]]


class Server:
    """A moto server, which keeps buckets in memory; ended by its process id."""

    storage, variable = "s3://bucket/lab/me", "AWS_ENDPOINT_URL"
    command = ("-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}")

    def __init__(self, **env: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self._env = f"http://127.0.0.1:{self.port}", env
        self.start()

    def start(self) -> None:
        command = [sys.executable, *(word.format(port=self.port) for word in self.command)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env={**os.environ, **self._env}, **quiet)
        for _ in range(300):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), timeout=1),
            ):
                return
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.1)
        raise AssertionError("the server does not listen")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(timeout=20)

    def reset(self) -> None:
        """Leave one empty bucket."""
        urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/moto-api/reset", method="POST"), timeout=10
        )
        self.client().create_bucket(Bucket="bucket")

    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.url)

    def put(self, name: str, content: bytes) -> None:
        self.client().put_object(Bucket="bucket", Key=name, Body=content)

    def remove(self, name: str) -> None:
        self.client().delete_object(Bucket="bucket", Key=name)

    def names(self) -> set[str]:
        """Return the names in the bucket, without pyarrow's empty placeholders of folders."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket="bucket")
        return {
            o["Key"]
            for page in pages
            for o in page.get("Contents", ())
            if not o["Key"].endswith("/")
        }

    def objects(self) -> dict[str, bytes]:
        """Return the objects in the bucket by name."""
        client = self.client()
        return {
            key: client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in self.names()
        }


class Google(Server):
    """A fake of Google's storage with its JSON interface."""

    storage, variable = "gs://bucket/lab/me", "STORAGE_EMULATOR_HOST"
    command = ("-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", "{port}", "--in-memory", "--quiet",
               "--default-bucket", "bucket")  # fmt: skip

    def asked(self, path: str, method: str = "GET", content: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, content, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())

    def reset(self) -> None:
        self.asked("/wipe?keep-buckets=true")

    def put(self, name: str, content: bytes) -> None:
        self.asked(
            f"/upload/storage/v1/b/bucket/o?uploadType=media&name={quote(name, safe='')}",
            "POST",
            content,
        )

    def remove(self, name: str) -> None:
        self.asked(f"/storage/v1/b/bucket/o/{quote(name, safe='')}", "DELETE")

    def names(self) -> set[str]:
        items = json.loads(self.asked("/storage/v1/b/bucket/o")).get("items", ())
        return {item["name"] for item in items if not item["name"].endswith("/")}

    def objects(self) -> dict[str, bytes]:
        return {
            name: self.asked(f"/storage/v1/b/bucket/o/{quote(name, safe='')}?alt=media")
            for name in self.names()
        }


both = pytest.mark.parametrize("server", long_after(1, ["s3", "gs"]), indirect=True)


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Google() if getattr(request, "param", "s3") == "gs" else Server()
    yield server
    server.stop()


@pytest.fixture
def bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of an empty storage without a local mirror; a variable names its server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    server.reset()
    monkeypatch.setenv(server.variable, server.url)
    yield server.storage


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Simulate another machine: another cache, so without this one's mirrors."""

    def move(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    return move


# --- URLs

URLS = [
    ("s3:///prefix", "a directory, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, got 's3:///prefix'"),
    ("http://host/bucket", "got 'http://host/bucket'"),
    ("s3://bucket/../other", "got 's3://bucket/../other'"),
    (
        "s3://AKIAKEY:s3cret@bucket/prefix",
        "credentials come from the environment (set AWS_ACCESS_KEY_ID",
    ),
    ("s3://bucket/p?secret_key=s3cret", "an endpoint from AWS_ENDPOINT_URL"),
    ("s3://[bucket/p", "Invalid IPv6 URL"),
]


@pytest.mark.parametrize("url, sentence", URLS, ids=[url for url, _ in URLS])
def test_a_url_that_names_no_storage_is_refused_without_repeating_a_secret(
    url: str, sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        remote.store_at(url)
    assert sentence in str(error.value) and "s3cret" not in str(error.value)


def test_objects_whose_names_lead_out_of_the_mirror_are_left_alone(
    bucket: str, server: Server, tmp_path: Path
) -> None:
    bad = ("../../evil", "a/../../evil", "./evil", ".session", "trials/.evil/x", "a//b")
    for name in ("experiment.yaml", *bad):
        server.put(f"lab/me/e/{name}", b"x")
    store = remote.store_at(bucket)
    assert set(store.objects("e")) <= {"e/experiment.yaml"}
    with contextlib.suppress(ConfigError):  # some clients refuse to list such names at all
        experiment_of(f"{bucket}/e", everything)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


def test_each_node_must_reach_the_store_and_needs_no_directory_that_others_see(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(nodes.ray, "nodes", lambda: [{"Alive": True}] * 2)
    answers = [nodes.Node("10.0.0.9", storage="does not answer"), nodes.Node("10.0.0.8")]
    monkeypatch.setattr(nodes, "visit", lambda place: asked.append(place) or answers)
    with pytest.raises(ConfigError, match=rf"10.0.0.9: {bucket}: does not answer"):
        nodes.check_shared(checked(bucket))
    assert (
        asked == [storage_at(bucket)] and nodes._look(None, None, "n", asked[0])["storage"] is None
    )
    lost = nodes._look(None, None, "n", storage_at("s3://nothing/x"))["storage"]
    assert lost is not None and "no such bucket" in lost


def test_the_doctor_looks_at_object_storage(bucket: str, tfkd: Run, tmp_path: Path) -> None:
    found = [
        *doctor.check_storage_here(storage_at(bucket)),
        *doctor.check_storage_here(storage_at("s3://no/x")),
    ]
    assert [one.level for one in found] == ["ok", "problem"] and "no such bucket" in found[1].text
    run = tfkd("doctor", "--storage", bucket, RAY_ADDRESS="")
    assert (
        f"{bucket} can be written to from here" in run.stdout and list(tmp_path.glob("s3*")) == []
    )


def test_a_url_is_one_store_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert remote.store_at("s3://b/p/").url == remote.store_at("s3://b//p").url == "s3://b/p"
    assert remote.experiment_at("s3://b/p/e") == (remote.store_at("s3://b/p"), "e")
    assert remote.experiment_at("s3://b/e") == (remote.store_at("s3://b"), "e")
    with pytest.raises(ConfigError, match="an experiment's URL is STORAGE/NAME"):
        remote.experiment_at("s3://b")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:s3cret@host")
    with pytest.raises(
        ConfigError,
        match=r"AWS_ENDPOINT_URL: http://HOST:PORT or https://HOST, without credentials$",
    ):
        remote.store_at("s3://b")


FILES = [
    ("aws-gpu.yaml", "/mnt/tfkd/results "), ("kuberay-cluster.yaml", "/mnt/tfkd/results}"), ("local.yaml", "~/tfkd_results "),
    ("slurm.sh", 'TFKD_RESULTS='),
]  # fmt: skip


@pytest.mark.parametrize("name, place", FILES, ids=[name for name, _ in FILES])
def test_a_cluster_file_may_name_a_bucket(name: str, place: str, tmp_path: Path) -> None:
    text = (ROOT / "clusters" / name).read_text()
    url = "s3://bucket/results"
    changed = (
        re.sub(r"TFKD_RESULTS=\S+", f"TFKD_RESULTS={url}", text)
        if name == "slurm.sh"
        else text.replace(place, url + place[-1])
    )
    assert changed != text
    (tmp_path / name).write_text(changed)
    assert f"experiments go to {url}" in check(load_cluster(tmp_path / name))
    options = argparse.Namespace(storage=Path("tfkd_results"), cluster=str(tmp_path / name))
    assert _storage_of(options) == (None if name == "slurm.sh" else url)


# --- the value that stands for either kind


def about(storage: Storage, experiment: str = "e") -> dict[str, Any]:
    """Return a driver's assignment as another process receives it."""
    directory = trials_folder(storage.folder / experiment) / "t0"
    section = Assignment("t0", 6, storage=storage, directory=directory).section()
    return {SECTION: json.loads(json.dumps(section))}


def test_a_directory_is_the_same_on_every_node_and_nothing_is_fetched_sent_or_claimed(
    tmp_path: Path, elsewhere: Callable[[str], None]
) -> None:
    storage = checked(tmp_path)
    experiment = experiment_of(tmp_path / "e")
    assert (
        storage == Directory(tmp_path) == pickle.loads(pickle.dumps(storage)) == experiment.storage
    )
    assert (str(storage), experiment.folder) == (str(tmp_path), tmp_path / "e")
    storage.check_new("e")
    trial = tmp_path / "e/trials/t0"
    trial.mkdir(parents=True)
    for name in ("last.ckpt", "error.txt"):
        (trial / name).write_text(name)
    with pytest.raises(ConfigError, match="exists already"):
        storage.check_new("e")
    with storage.up_to_date("e", tmp_path / "beside"):
        storage.fetch("e", everything, patiently=True)
        storage.fetch_experiments()
        storage.fetch_comparisons()
        storage.send(trial / "last.ckpt", trial / "gone")
        storage.begin_trial(trial)
        storage.drop_unknown("e", [])
        assert storage.bring(trial / "error.txt").read_text() == "error.txt"
    assert sorted(path.name for path in trial.iterdir()) == ["error.txt", "last.ckpt"]
    assert storage.hold("e") is None and storage.on_saved(trial) is None
    told = about(storage)
    elsewhere("node")
    assert Assignment.of(told).place == (storage, trial)


def test_a_bucket_is_mirrored_on_each_node_by_the_value_that_reaches_it(
    bucket: str, server: Server, elsewhere: Callable[[str], None]
) -> None:
    storage = checked(bucket)
    assert storage == Mirror(remote.store_at(bucket)) and str(storage) == bucket
    sent, told, here = pickle.dumps(storage), about(storage), storage.folder
    assert b"s3cret" not in sent and b"tfkd-key" not in sent and storage.folder.is_dir()
    storage.check_new("e")
    (here / "e/trials/t0").mkdir(parents=True)
    (here / "e/trials/t0/last.ckpt").write_text("3 epochs")
    storage.send(here / "e/trials/t0/last.ckpt")
    with pytest.raises(ConfigError, match=f"'e' exists already.*tfkd resume {bucket}/e"):
        storage.check_new("e")
    elsewhere("node")
    assert pickle.loads(sent) == storage and storage.folder != here
    there, trial = Assignment.of(told).place
    assert (there, trial) == (storage, storage.folder / "e/trials/t0")
    trial.mkdir(parents=True)
    (trial / "error.txt").write_text("of an earlier attempt")
    there.begin_trial(trial)
    assert [(path.name, path.read_text()) for path in trial.iterdir()] == [
        ("last.ckpt", "3 epochs")
    ]
    (trial / "last.ckpt").unlink()
    there.send(trial / "last.ckpt")
    assert "lab/me/e/trials/t0/last.ckpt" not in server.names()


def test_a_user_may_name_a_mirror_by_its_folder_and_messages_name_it_as_it_was_given(
    bucket: str,
) -> None:
    storage = checked(bucket)
    assert storage_at(storage.folder) == storage and checked(str(storage.folder)) == storage
    assert experiment_of(storage.folder / "e") == Experiment(storage, "e")
    inside = storage.folder / "e/trials"
    assert (
        experiment_of(inside) == Experiment(Directory(storage.folder / "e"), "trials")
        and experiment_of(inside).folder == inside
    )
    assert as_given(f"see {storage.folder}/e") == f"see {bucket}/e"


@pytest.mark.parametrize("name", ["../x", "a/b", ".x"])
def test_a_name_that_is_none_is_refused_in_either_kind(
    bucket: str, tmp_path: Path, name: str
) -> None:
    for storage in (checked(bucket), checked(tmp_path)):
        with pytest.raises(ConfigError, match="name"):
            storage.check_new(name)


# --- what is fetched and uploaded


def fetched(bucket: str) -> Path:
    """Return the mirror of experiment `e`, with current files for reading commands."""
    return experiment_of(f"{bucket}/e").folder


@both
def test_only_what_changed_is_uploaded_and_fetched_and_what_is_gone_goes(
    bucket: str, server: Server, elsewhere: Callable[[str], None]
) -> None:
    store = remote.store_at(bucket)
    e = store.mark() / "e"
    trial = e / "trials" / "t0000-ce"
    trial.mkdir(parents=True)
    (e / "study.journal").write_text("1\n")
    (e / "driver.lock").write_text("")
    (e / "trials" / "tuner.pkl").write_bytes(b"Ray's")
    (trial / "trial.json").write_text("{}")
    (trial / "result.json").symlink_to("trial.json")
    (trial / "last.ckpt").write_bytes(b"the trial's own")
    upload = remote.Upload(store, "e")
    assert upload.once() == 2 and upload.once() == 0
    assert set(server.objects()) == {
        "lab/me/e/study.journal",
        "lab/me/e/trials/t0000-ce/trial.json",
    }
    (trial / "metrics.jsonl").write_text("a\n")
    assert upload.once() == 1
    (trial / "metrics.jsonl").write_text("b\n")  # as long as before
    assert upload.once() == 1
    assert remote.Upload(store, "e").once() == 0  # a resuming driver knows these files

    remote.send(store, "e/trials/t0000-ce/last.ckpt")
    elsewhere("other")
    there = fetched(bucket)
    assert there.is_relative_to(Path(os.environ["XDG_CACHE_HOME"])) and there != e
    assert (there / "trials/t0000-ce/metrics.jsonl").read_text() == "b\n"
    assert not (there / "trials/t0000-ce/last.ckpt").exists()
    server.put("lab/me/e/trials/t0000-ce/metrics.jsonl", b"c\n")
    fetched(bucket)  # within the same second as the previous write
    assert (there / "trials/t0000-ce/metrics.jsonl").read_text() == "c\n"
    server.remove("lab/me/e/trials/t0000-ce/metrics.jsonl")
    assert not (fetched(bucket) / "trials/t0000-ce/metrics.jsonl").exists()


@both
def test_a_file_that_goes_while_a_driver_runs_goes_there_and_one_that_a_cleaner_took_stays(
    bucket: str, server: Server
) -> None:
    store = remote.store_at(bucket)
    e = store.mark() / "gone"
    e.mkdir()
    for name in ("a", "b"):
        (e / name).write_text(name)
    upload = remote.Upload(store, "gone")
    upload.once()
    (e / "a").unlink()
    assert upload.once() == 1 and set(server.objects()) == {"lab/me/gone/b"}
    (e / "b").unlink()
    assert remote.Upload(store, "gone").once() == 0 and set(server.objects()) == {"lab/me/gone/b"}


@both
def test_the_study_is_written_last_and_as_it_was_before_the_files_were_looked_at(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = remote.store_at(bucket)
    e = store.mark() / "order"
    e.mkdir()
    (e / "study.journal").write_text("trial 0 ended\n")
    (e / "spent.json").write_text("{}")
    written: list[tuple[str, bytes]] = []

    def write(self: remote.Store, name: str, content: bytes) -> None:
        written.append((name, content))
        (e / "study.journal").write_text(
            "trial 0 ended\ntrial 1 ended\n"
        )  # while it is being uploaded

    monkeypatch.setattr(remote.Store, "write", write)
    upload = remote.Upload(store, "order")
    upload.once()
    assert written == [("order/spent.json", b"{}"), ("order/study.journal", b"trial 0 ended\n")]
    upload.once()
    assert written[2:] == [("order/study.journal", b"trial 0 ended\ntrial 1 ended\n")]


# --- one driver


def begun(bucket: str) -> tuple[Path, remote.Claim]:
    storage = storage_at(bucket)
    (storage.folder / "e").mkdir(parents=True, exist_ok=True)
    claim = storage.hold("e")
    assert claim is not None
    return storage.folder / "e", claim


@both
@pytest.mark.slow
def test_a_second_driver_is_refused_with_the_firsts_host_and_process_until_that_is_silent(
    bucket: str, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = begun(bucket)
    elsewhere("other")
    fetched(bucket)
    with pytest.raises(ConfigError) as error:
        begun(bucket)
    assert f"is being run by process {os.getpid()} on {socket.gethostname()}, last seen" in str(
        error.value
    )
    assert f"{bucket}/e:" in str(error.value) and "try again in" in str(error.value)
    monkeypatch.setattr(remote, "STALE_S", 2.0)
    time.sleep(1.5)
    first.refresh()
    time.sleep(1)
    with pytest.raises(ConfigError, match="is being run by"):
        begun(bucket)
    time.sleep(3)
    begun(bucket)
    with pytest.raises(
        ConfigError, match=r"was taken over by process \d+ on .*uploads nothing more"
    ):
        first.refresh()
    with pytest.raises(ConfigError, match="was taken over"):
        first.release()


@both
def test_a_driver_that_was_taken_over_ends_and_overwrites_nothing(
    bucket: str,
    server: Server,
    elsewhere: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = storage_at(bucket)
    experiment = storage.folder / "e"
    experiment.mkdir(parents=True)
    lock = Lock(storage, "e")
    assert lock.claim is not None
    uploads = Uploads(lock.claim, None)
    monkeypatch.setattr(remote, "STALE_S", 0.0)  # as if suspended for a minute
    monkeypatch.setattr(remote, "UPLOAD_S", 0.1)
    elsewhere("other")
    fetched(bucket)
    begun(bucket)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    (experiment / "spent.json").write_text("{}")
    uploads.on_begin()
    uploads._thread.join(timeout=10)
    with pytest.raises(ConfigError, match="was taken over by process"):
        uploads.on_step()
    assert "lab/me/e/spent.json" not in server.names()


@both
def test_a_driver_that_ended_leaves_the_experiment_free_and_one_that_died_here_is_known_to_have(
    bucket: str, elsewhere: Callable[[str], None]
) -> None:
    begun(bucket)[1].release()
    begun(bucket)  # whose lock on this disk is free: it has died
    begun(bucket)[1].release()
    elsewhere("other")
    with pytest.raises(ConfigError, match="was run by another driver in the meantime; try again"):
        begun(bucket)  # before any fetch
    fetched(bucket)
    begun(bucket)


@both
def test_a_mirror_is_newer_than_the_store_only_where_its_own_driver_was_the_last(
    bucket: str, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.environ["XDG_CACHE_HOME"]
    e, claim = begun(bucket)
    (e / "spent.json").write_text("1")
    remote.Upload(claim.store, "e").once()
    (e / "spent.json").write_text("2")  # and then it is killed
    fetched(bucket)
    assert (e / "spent.json").read_text() == "2"
    claim.release()
    elsewhere("other")
    there = fetched(bucket)
    assert (there / "spent.json").read_text() == "1"
    begun(bucket)[1].release()
    monkeypatch.setenv("XDG_CACHE_HOME", here)
    fetched(bucket)
    assert (e / "spent.json").read_text() == "1"


@both
@pytest.mark.slow
def test_trials_begun_after_the_last_upload_of_the_study_are_dropped_and_no_others(
    bucket: str, server: Server, elsewhere: Callable[[str], None]
) -> None:
    for name in (
        "trials/t0/trial.json",
        "study.journal",
        "trials/t1/trial.json",
        "trials/t2/trial.json",
    ):
        server.put(f"lab/me/e/{name}", b"{}")
        time.sleep(1.1)
    e = fetched(bucket)
    (e / "study.journal").write_text("opened, so newer than all")
    storage_at(bucket).drop_unknown("e", ["t1"])
    assert sorted(p.name for p in (e / "trials").iterdir()) == [
        "t0",
        "t1",
    ]  # t0 is lost from the study: said


# --- what cannot be used


def refused(tfkd: Run, *words: str, **env: str) -> str:
    start = time.monotonic()
    done = tfkd(*words, timeout=60, **env)
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - start < 20 and "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.slow
def test_what_cannot_be_used_is_a_sentence_each_within_ten_seconds(
    bucket: str, tfkd: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sentence(url: str = bucket) -> str:
        start = time.monotonic()
        with pytest.raises(ConfigError) as error:
            checked(url).check_new("e")
        assert time.monotonic() - start < 12, error.value
        return str(error.value)

    checked(bucket).check_new("e")
    assert (
        sentence("s3://none/x") == "s3://none/x:\n  no such bucket; create it, or correct the URL"
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert sentence() == (
        f"{bucket}:\n  does not answer; check the network and the endpoint (http://127.0.0.1:1)"
    )
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "does not answer; check the network" in sentence()


@both
def test_a_storage_that_is_empty_can_be_begun_in_and_a_bucket_that_is_not_there_is_said(
    bucket: str,
) -> None:
    checked(bucket).check_new("e")
    url = bucket.replace("bucket", "nothing")
    with pytest.raises(ConfigError) as error:
        checked(url).check_new("e")
    assert str(error.value) == f"{url}:\n  no such bucket; create it, or correct the URL"
    assert not remote.store_at(bucket).objects("e") and remote.store_at(bucket).names() == []


@both
def test_an_upload_whose_bucket_is_gone_is_an_error(bucket: str) -> None:
    store = remote.store_at(bucket.replace("bucket", "nothing"))
    e = store.mark() / "e"
    e.mkdir()
    (e / "spent.json").write_text("{}")
    with pytest.raises(OSError):
        remote.Upload(store, "e").once()


POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "*"}],
}


@pytest.mark.slow
def test_wrong_credentials_and_missing_rights_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strict = Server(
        INITIAL_NO_AUTH_ACTION_COUNT="4"
    )  # from the fifth request on, requests need permission
    try:
        strict.client().create_bucket(Bucket="bucket")
        iam = boto3.client("iam", endpoint_url=strict.url)
        iam.create_user(UserName="reader")
        iam.put_user_policy(UserName="reader", PolicyName="list", PolicyDocument=json.dumps(POLICY))
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        monkeypatch.setenv("AWS_ENDPOINT_URL", strict.url)
        with pytest.raises(
            ConfigError, match=r"the credentials are not accepted; set AWS_ACCESS_KEY_ID and"
        ):
            checked("s3://bucket/x")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-right-one")
        with pytest.raises(ConfigError, match=r"the credentials are not accepted"):
            checked("s3://bucket/x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        storage = checked("s3://bucket/x")  # it may list
        with pytest.raises(
            ConfigError,
            match=r"not allowed with these credentials; ask for the right to list, read",
        ):
            storage.check_new("e")
    finally:
        strict.stop()


def test_commands_say_it_with_the_url_and_end_with_2(bucket: str, tfkd: Run) -> None:
    space = "digits_tfkd"
    assert "no such bucket" in refused(tfkd, "tune", space, "--storage", "s3://none/x")
    assert "nothing found; tfkd ls" in refused(tfkd, "status", f"{bucket}/nothing")
    assert "does not answer" in refused(
        tfkd, "best", f"{bucket}/e", AWS_ENDPOINT_URL="http://127.0.0.1:1"
    )
    assert "name a directory" in refused(tfkd, "train", space, "--storage", bucket)


# --- sweeps

TREE: dict[str, Any] = {
    "student": {"name": "mlp", "hidden": [8]},
    "epochs": 3,
    "checkpoint_every_s": 0,
    "objective": ["tfkd_self", "ce"],
    "optim": {"lr": {"low": 0.01, "high": 0.5, "log": True}},
    "search": {"num_samples": 6, "stopping": "none"},
}
LONG = {
    **TREE,
    "objective": "ce",
    "epochs": 250,
    "search": {"num_samples": 3, "stopping": "none", "max_concurrent": 1},
}


def outcome(experiment: Path) -> list[tuple[Any, ...]]:
    """Return the results of a sweep's trials, without their times."""
    return [
        (r.number, r.status, r.parameters, [{k: v for k, v in m.items() if k not in ("seconds", "images_per_s")} for m in r.metrics])
        for r in read_records(experiment)
    ]  # fmt: skip


class OtherNode(tune.Callback):  # type: ignore[misc]
    """Empties the cache of run states where trials run, when one pauses: it goes on elsewhere."""

    def __init__(self) -> None:
        self.starts: list[str] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.starts.append(trial.trial_id)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if not any(t.status == "RUNNING" for t in trials):
            for path in Path(NODE).rglob("last.ckpt"):
                path.unlink(missing_ok=True)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.ray
def test_a_paused_trial_goes_on_from_its_checkpoint_in_the_bucket(
    ray_cluster: str, bucket: str, server: Server, tmp_path: Path
) -> None:
    search = {"num_samples": 12, "sampler": "random", "max_concurrent": 1}
    tree = {**TREE, "objective": "ce", "epochs": 9, "checkpoint_every_s": 1000}
    whole = {**tree, "search": {**search, "stopping": "none"}}
    build_tuner(whole, name="whole", storage=tmp_path).fit()
    node, notes = OtherNode(), list[str]()
    pausing = {**tree, "search": {**search, "stopping": "pausing"}}
    build_tuner(pausing, name="e", storage=bucket, callbacks=[node], on_note=notes.append).fit()
    assert len(node.starts) > len(set(node.starts)) == 12 and notes == []
    found = outcome(remote.store_at(bucket).folder / "e")
    for (n, status, parameters, metrics), plain in zip(
        found, outcome(tmp_path / "whole"), strict=True
    ):
        assert (n, parameters, metrics) == (plain[0], plain[2], plain[3][: len(metrics)])
        assert status == ("done" if len(metrics) == 9 else "stopped")
    objects = {key.removeprefix("lab/me/"): content for key, content in server.objects().items()}
    told = [json.loads(c)["status"] for k, c in objects.items() if k.endswith("trial.json")]
    assert len(told) == 12 and set(told) == {"done", "stopped"}


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_is_plain_in_its_bucket_and_is_read_from_another_machine(
    ray_cluster: str, bucket: str, server: Server, elsewhere: Callable[[str], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    notes: list[str] = []

    def run(*words: str) -> str:
        """Return the output of a command that succeeds."""
        code, (out, err) = main(words), capsys.readouterr()
        assert code == 0, err
        assert str(mirror) not in out + err, out + err
        return out

    grid = build_tuner(TREE, name="e", storage=bucket, on_note=notes.append).fit()
    assert len(grid) == 6 and grid.num_errors == 0 and notes == []
    objects = server.objects()
    names = {key.removeprefix("lab/me/") for key in objects}
    trials = [
        "t0000-tfkd_self",
        "t0001-ce",
        "t0002-lsr",
        "t0003-tfkd_self",
        "t0004-ce",
        "t0005-lsr",
    ]
    assert {n for n in names if n.startswith("e/trials/")} == {
        f"e/trials/{trial}/{file}"
        for trial in trials
        for file in ("trial.json", "metrics.jsonl", "student.safetensors", "last.ckpt")
    }
    rest = {n for n in names if not n.startswith(("e/trials/", "e/tb/", "teachers/"))}
    assert rest == {
        ".tfkd",
        *(
            f"e/{n}"
            for n in (
                *("experiment.yaml", "study.journal", "spent.json", "ended.jsonl"),
                *("driver.json", "driver.txt"),
            )
        ),
    }
    assert sorted(n.rpartition("/")[2] for n in names if n.startswith("teachers/")) == [
        "student.safetensors",
        "teacher.json",
    ]
    assert all(any(n.startswith(f"e/tb/{trial}/events") for n in names) for trial in trials)
    assert [
        k for k, content in objects.items() if b"s3cret-of-s3" in content or b"tfkd-key" in content
    ] == []
    assert not list(
        (remote.store_at(bucket).folder / "e").rglob("last.ckpt")
    )  # they were on the other node

    elsewhere("reader")
    mirror = remote.store_at(bucket).folder
    url = f"{bucket}/e"
    capsys.readouterr()
    found = json.loads(run("status", url, "--json"))
    assert found["state"] == "finished" and found["trials"]["done"] == 6 and found["name"] == "e"
    assert not [
        p for p in mirror.rglob("*") if p.suffix in (".ckpt", ".safetensors") or "tb" in p.parts
    ]
    assert json.loads(run("best", url, "--json"))["best"][0]["trial"] == found["best"]["trial"]
    assert len(json.loads(run("trials", url, "-o", "json"))) == 6
    assert run("logs", url, "0").splitlines()[-1] == "done"
    [listed] = json.loads(run("ls", "--storage", bucket, "--json"))
    assert (listed["name"], listed["state"], listed["ended"]) == ("e", "finished", 6)
    assert "mlp-" in run("teacher", "list", "--storage", bucket)
    assert (
        run("report", url) == "report.html\n" and (tmp_path / "report.html").stat().st_size > 10_000
    )
    assert "e/" in run("export", url) and (tmp_path / "e-export" / "student.safetensors").exists()
    with pytest.raises(ConfigError, match=f"experiment 'e' exists already.*tfkd resume {url}"):
        build_tuner(TREE, name="e", storage=bucket)

    assert f"written to {url}" in run("resume", url, "--add-trials", "3")
    elsewhere("reader-2")
    assert [r.status for r in read_records(to_continue(url).folder)] == ["done"] * 9


def test_a_node_without_its_copy_of_the_data_is_named_with_the_way_out(tmp_path: Path) -> None:
    tree = {
        **TREE,
        "objective": "ce",
        "data": {"name": "cifar10", "root": str(tmp_path)},
        "optim": {},
    }
    del tree["search"]
    epochs = epochs_module.epochs_here(
        tree, Assignment("t", 6, directory=tmp_path / "t", storage=Directory(tmp_path))
    )
    with pytest.raises(ConfigError) as error:
        next(epochs)
    assert str(error.value).startswith(f"node {socket.gethostname()}: data cifar10: not found: ")
    assert "setup_commands of the cluster file" in str(error.value)


def run_of(**settings: Any) -> dict[str, Any]:
    tree = {
        "student": {"name": "mlp", "hidden": [8]},
        "epochs": 6,
        "checkpoint_every_s": 0,
        "objective": "ce",
        **settings,
    }
    return TrainConfig.model_validate(tree).model_dump(mode="json")


def alike(metrics: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in m.items() if k not in ("seconds", "images_per_s")} for m in metrics]


def whole_weights(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return (header, tensors) of a file of weights, whose header has a random order."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@both
def test_a_trial_goes_on_on_another_node_bit_by_bit_from_what_it_uploaded(
    bucket: str, server: Server, elsewhere: Callable[[str], None], tmp_path: Path
) -> None:
    run, told = run_of(), Assignment.of(about(storage_at(bucket)))
    alone = Assignment("t0", 6, directory=tmp_path / "t0", storage=Directory(tmp_path))
    whole = alike(epochs_module.epochs_here(run, alone))
    elsewhere("node-1")
    epochs = epochs_module.epochs_here(run, told)
    begun = [next(epochs), next(epochs), next(epochs)]
    epochs.close()  # type: ignore[attr-defined]
    assert not any(key.endswith("student.safetensors") for key in server.names())
    elsewhere("node-2")
    again = list(epochs_module.epochs_here(run, told))
    assert again[:3] == begun and alike(again) == whole  # the first three were not trained again
    here = remote.store_at(bucket).folder / "e/trials/t0"
    weights = server.objects()["lab/me/e/trials/t0/student.safetensors"]
    assert weights == (here / "student.safetensors").read_bytes()
    at_once = (tmp_path / "t0/student.safetensors").read_bytes()
    assert whole_weights(weights) == whole_weights(at_once)
    elsewhere("node-1")  # whose own files are older
    assert list(epochs_module.epochs_here(run, told)) == again
    server.remove("lab/me/e/trials/t0/last.ckpt")
    assert (
        next(epochs_module.epochs_here(run, told)) not in again[:1]
    )  # seconds differ: it starts again


@both
@pytest.mark.slow
def test_a_trial_that_cannot_upload_its_end_waits_and_one_on_its_way_does_not(
    bucket: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, refused = Assignment.of(about(storage_at(bucket))), list[str]()
    write = remote.Store.write

    def at_first_refused(self: remote.Store, name: str, content: bytes) -> None:
        if len(refused) < 4:
            refused.append(name)
            _refused(self, name, content)
        write(self, name, content)

    monkeypatch.setattr(remote.Store, "write", at_first_refused)
    assert len(list(epochs_module.epochs_here(run_of(epochs=2), told))) == 2
    assert {"last.ckpt", "student.safetensors"} == {name.rpartition("/")[2] for name in refused}
    assert "lab/me/e/trials/t0/student.safetensors" in server.objects()
    monkeypatch.setattr(remote, "PATIENCE_S", 0.0)
    monkeypatch.setattr(remote.Store, "write", _refused)
    with pytest.raises(OSError, match=f"{bucket}: does not answer; check the network"):
        list(
            epochs_module.epochs_here(
                run_of(epochs=3), Assignment.of(about(storage_at(bucket), "f"))
            )
        )


@both
def test_a_teacher_is_trained_on_one_node_goes_on_on_another_and_is_used_on_a_third(
    bucket: str, server: Server, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tfkd_ray.run.tune.seal_test_split", lambda: None
    )  # for good, in this process
    config = TrainConfig.model_validate(run_of(objective="tfkd_self", teacher={"epochs": 4}))
    made_by, storage = config.teacher_run(), storage_at(bucket)
    assert made_by is not None
    run = made_by.model_copy(update={"checkpoint_every_s": 0.0})  # which is no part of its name
    told, folder = Assignment.of(about(storage)), f"lab/me/teachers/{teacher_name(run)}"
    elsewhere("node-1")
    trained = [0]

    def killed(path: Path, weights: Any, about: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:  # at its end
        dying.setattr("tfkd_ray.learn.loop.save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            _teacher_task(run, storage, own_code.here())
    elsewhere("reader")
    kept = load_state(
        storage.bring(storage.folder / "teachers" / teacher_name(run) / "last.ckpt").parent
    )
    assert kept is not None and kept["epoch"] in (
        1,
        2,
        3,
    )  # an epoch is not saved while the one before is on its way
    elsewhere("node-2")
    real = teachers.train_in

    def counted(folder: Path, config: Any, **more: Any) -> Any:
        trained[0] = load_state(folder)["epoch"]  # type: ignore[index]
        return real(folder, config, **more)

    monkeypatch.setattr(teachers, "train_in", counted)
    made = _teacher_task(run, storage, own_code.here())
    assert trained == [kept["epoch"]]
    assert {k for k in server.objects() if k.startswith(folder)} == {
        f"{folder}/student.safetensors",
        f"{folder}/teacher.json",
    }
    elsewhere("node-3")
    assert _teacher_task(run, storage, own_code.here()) == made and trained == [kept["epoch"]]
    elsewhere("node-4")
    metrics = list(epochs_module.epochs_here(config.model_dump(mode="json"), told))
    assert len(metrics) == 6 and metrics[-1]["train_kd"] > 0


@pytest.mark.slow
def test_a_comparison_in_a_bucket_is_judged_on_another_machine_and_the_opening_is_noted_once(
    bucket: str, server: Server, elsewhere: Callable[[str], None]
) -> None:
    storage = checked(bucket)
    trials = trials_folder(comparison(storage.folder))
    storage.send(*trials.glob("*/student.safetensors"))
    remote.Upload(remote.store_at(bucket), "c").once()
    elsewhere("judge")
    found = judge_on_test(to_continue(f"{bucket}/c"))
    names = {name.removeprefix("lab/me/") for name in server.names()}
    assert {"c/confirm.json", "test_openings.jsonl", "c/trials/ce-s1/test.safetensors"} <= names
    assert json.loads(server.objects()["lab/me/c/driver.json"])["ended"]
    elsewhere("another")
    again = judge_on_test(to_continue(f"{bucket}/c"))
    assert again == found and len(found["opened"]) == 1


def test_reading_commands_import_neither_torch_nor_ray_for_a_url_and_pyarrow_for_nothing_else(
    bucket: str,
) -> None:
    code = (
        "import sys; from tfkd_ray.cli.main import main\n"
        f"assert main(['ls', '--storage', '{bucket}']) == 0 and main(['status', '{bucket}/e']) == 2\n"
        "assert not {'torch', 'ray', 'optuna'} & set(sys.modules) and 'pyarrow' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import sys; from tfkd_ray.cli.main import main; main(['status', 'x']); assert 'pyarrow' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def forget(*caches: str) -> None:
    """Delete the nodes' mirrors, as if their disks were lost."""
    for cache in caches:
        shutil.rmtree(Path(cache) / "tfkd_ray" / "storage", ignore_errors=True)


def until(there: Callable[[], bool]) -> None:
    for _ in range(600):
        if there():
            return
        time.sleep(0.1)
    raise AssertionError("it does not come")


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_driver_killed_with_9_loses_at_most_ten_seconds_with_its_disk_and_no_number(
    ray_cluster: str, bucket: str, server: Server, elsewhere: Callable[[str], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    build_tuner(LONG, name="whole", storage=tmp_path).fit()
    elsewhere("driver")
    url = f"{bucket}/e"
    with tuning(LONG, tmp_path, "--storage", bucket) as driver:
        until(lambda: "lab/me/e/trials/t0001-ce/last.ckpt" in server.names())
        until(lambda: "lab/me/e/trials/t0001-ce/trial.json" in server.names())
        elsewhere("second")
        assert main(["resume", url]) == 2
        assert (
            f"is being run by process {driver.pid} on {socket.gethostname()}, last seen"
            in capsys.readouterr().err
        )
        assert main(["status", url, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["state"] == "running"
    forget(NODE, str(tmp_path / "driver"))
    monkeypatch.setattr(remote, "STALE_S", 0.0)
    elsewhere("third")
    assert "running" in [r.status for r in read_records(to_continue(url).folder)]
    grid = resume_tuner(url).fit()
    assert grid.num_errors == 0
    elsewhere("reader")
    assert outcome(to_continue(url).folder) == outcome(tmp_path / "whole")


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", ["first", "third"])
def test_further_seeds_go_on_from_the_bucket_after_a_kill_with_9_and_the_loss_of_the_disks(
    ray_cluster: str, bucket: str, server: Server, elsewhere: Callable[[str], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, moment: str,
) -> None:  # fmt: skip
    search = {**LONG["search"], "finalists": {"k": 2, "seeds": 2}, "sampler": "random"}
    tree = {**LONG, "epochs": 60, "search": search}
    build_tuner(tree, name="whole", storage=tmp_path).fit()
    elsewhere("driver")

    def seeds() -> list[str]:
        """Return the runs with further seeds that the bucket knows."""
        return [n for n in server.names() if re.search(r"/trials/[^/]*seed[^/]*/trial.json$", n)]

    with tuning(tree, tmp_path, "--storage", bucket):
        until(lambda: len(seeds()) >= {"first": 1, "third": 3}[moment])
    forget(NODE, str(tmp_path / "driver"))
    monkeypatch.setattr(remote, "STALE_S", 0.0)
    elsewhere("second")
    assert resume_tuner(f"{bucket}/e").fit().num_errors == 0
    elsewhere("reader")
    found, whole = to_continue(f"{bucket}/e").folder, tmp_path / "whole"
    assert outcome(found) == outcome(whole)
    one, other = ([run for r in read_records(e) for run in r.further] for e in (found, whole))
    assert len(one) == 4 and [run.name for run in one] == [run.name for run in other]
    assert [alike(run.metrics) for run in one] == [alike(run.metrics) for run in other]


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_sweep_waits_for_a_server_that_was_stopped_and_says_so_once(
    ray_cluster: str, bucket: str, server: Server, elsewhere: Callable[[str], None], tmp_path: Path
) -> None:
    build_tuner(LONG, name="whole", storage=tmp_path).fit()
    with tuning(LONG, tmp_path, "--storage", bucket) as sweep:
        until(lambda: "lab/me/e/trials/t0001-ce/last.ckpt" in server.names())
        kept = server.objects()
        server.stop()
        time.sleep(65)
        server.start()  # its memory was its disk
        server.client().create_bucket(Bucket="bucket")
        for key, content in kept.items():
            server.put(key, content)
        assert sweep.wait(timeout=90) == 0
    text = (tmp_path / "said").read_text()
    assert (
        text.count("does not answer") == 1
        and "the sweep continues" in text
        and "answers again" in text
    ), text
    elsewhere("reader")
    assert outcome(to_continue(f"{bucket}/e").folder) == outcome(tmp_path / "whole")
    weights = [key for key in server.objects() if key.endswith("student.safetensors")]
    assert len(weights) == 3


@both
@pytest.mark.slow
def test_an_upload_that_does_not_finish_is_said_with_the_command_that_does_it_later(
    bucket: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "UPLOAD_END_S", 1.0)
    storage = storage_at(bucket)
    experiment = storage.folder / "late"
    experiment.mkdir(parents=True)
    lock, notes = Lock(storage, "late"), list[str]()
    assert lock.claim is not None
    uploads = Uploads(lock.claim, notes.append)
    uploads.on_begin()
    until(lambda: "lab/me/late/driver.txt" in server.names())
    monkeypatch.setattr(remote.Store, "write", _refused)
    (experiment / "spent.json").write_text("{}")
    uploads.on_close([])
    assert notes[-1] == (
        f"{bucket}/late: the upload is incomplete: does not answer; check the network and the endpoint ({server.url}); "
        f"the rest is on this machine, in {experiment}; when the store answers, upload it from here: tfkd resume {bucket}/late"
    )


def _refused(self: remote.Store, name: str, content: bytes) -> None:
    raise OSError(
        "AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Could not connect to server"
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.ray
def test_of_a_group_the_first_worker_uploads_and_all_fetch(
    ray_cluster: str, bucket: str, server: Server, elsewhere: Callable[[str], None]
) -> None:
    elsewhere("driver")
    tree = {
        **TREE,
        "objective": "kd",
        "teacher": {"model": {"name": "mlp", "hidden": [8]}, "epochs": 2},
        "workers": 2,
    }
    tree["search"] = {"num_samples": 2, "stopping": "none", "split": False}
    grid = build_tuner(tree, name="e", storage=bucket).fit()
    assert grid.num_errors == 0
    names = {key.removeprefix("lab/me/e/trials/") for key in server.objects() if "/trials/" in key}
    assert all(f"{trial}/{file}" in names for trial in {n.split("/")[0] for n in names}
               for file in ("student.safetensors", "last.ckpt", "metrics.jsonl"))  # fmt: skip
