"""Resources of trials: requests, requests that no node can meet, and causes of lost processes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from sweep_under_fire import sweep

from tfkd_ray.launch.check import check
from tfkd_ray.launch.clusterfile import load_cluster
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.run.connect import check_room
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated
from tfkd_ray.store.experiment import read_metrics, read_records

TREE: dict[str, Any] = {"student": {"name": "mlp", "hidden": [8]}, "objective": "ce"}


def config(**settings: Any) -> TrainConfig:
    return validated(TrainConfig, {**TREE, **settings})


def test_a_worker_asks_for_cpus_gpus_their_kind_and_custom_resources() -> None:
    asked = config(
        cpus_per_worker=2, gpus_per_worker=1, accelerator_type="H100", resources={"fast_disk": 0.5}
    )
    assert asked.worker_resources == {
        "CPU": 2,
        "GPU": 1,
        "fast_disk": 0.5,
        "accelerator_type:H100": 0.001,
    }
    assert config().worker_resources == {"CPU": 1}
    assert asked.fingerprint() == config(gpus_per_worker=1).fingerprint(), (
        "where it runs makes no numbers"
    )


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            {"accelerator_type": "H100"},
            "accelerator_type: H100 is a kind of GPU; set gpus_per_worker, too",
        ),
        ({"resources": {"GPU": 1}}, "resources.GPU: is reserved by Ray; use custom resources only"),
        ({"resources": {"disk": 0}}, "resources.disk: should be greater than 0"),
        ({"placement": "packed"}, "placement: "),
    ],
)
def test_what_cannot_be_asked_for_is_said(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**settings)
    assert sentence in str(error.value)


def test_a_custom_resource_must_be_in_the_cluster_file_and_a_kind_of_gpu_is_left_to_ray() -> None:
    file = load_cluster(ROOT / "clusters/aws-gpu.yaml")
    check(file, config(gpus_per_worker=1, accelerator_type="A10G"))
    with pytest.raises(
        ConfigError, match="a trial needs 1 x 1 CPU and 1 fast_disk, each on one node"
    ):
        check(file, config(resources={"fast_disk": 1}))


@pytest.mark.ray
def test_what_no_node_has_is_refused_at_once_with_what_there_is(ray_cluster: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError) as error:
        check_room(config(gpus_per_worker=1, accelerator_type="H100", resources={"fast_disk": 1}))
    assert time.monotonic() - started < 5
    said = str(error.value)
    assert "accelerator_type: no node has H100; they have none" in said
    assert "resources.fast_disk: no node has it; they have none (ray start --resources=...)" in said
    assert (
        "a trial needs 1 x 1 CPU and 1 GPU and 1 fast_disk and a GPU of kind H100, each on one node"
        in said
    )
    assert check_room(config()) == 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.cluster
@pytest.mark.timeout(200)
def test_four_trials_share_the_gpu_of_the_kind_they_ask_for_and_no_more_than_four() -> None:
    space = {**TREE, "epochs": 1, "gpus_per_worker": 0.25, "accelerator_type": "A100"}
    space |= {
        "optim": {"lr": {"low": 0.01, "high": 0.1}},
        "search": {"num_samples": 6, "stopping": "none"},
    }
    with tempfile.TemporaryDirectory(
        prefix="tr"
    ) as place:  # a short path: Ray's sockets are below it
        command = [
            sys.executable,
            str(Path(__file__).parent / "sweep_shared.py"),
            f"{place}/s",
            json.dumps(space),
        ]
        done = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": place},
            capture_output=True,
            text=True,
            timeout=180,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stderr[-3000:]
    report = json.loads(lines[0][7:])
    notes = report["notes"]
    assert report["errors"] == 0 and len(notes) == 6
    assert {note["node"] for note in notes} == {"A100"} and all(
        note["gpus"] == ["0"] for note in notes
    ), notes
    at_once = [
        sum(other["from"] <= note["from"] < other["to"] for other in notes) for note in notes
    ]
    assert max(at_once) == 4, notes


# --- whose fault it is

PACED: dict[str, Any] = {
    **TREE,
    "epochs": 6,
    "checkpoint_every_s": 0,
    "optim": {"lr": {"choices": [0.1, 0.05]}},
    "search": {
        "num_samples": 2,
        "stopping": "none",
        "max_concurrent": 1,
        "max_failures": 1,
        "max_failed_trials": 1,
    },
}


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.slow
def test_a_trial_that_gets_further_between_its_losses_may_be_lost_more_often_than_max_failures(
    ray_cluster: str, tmp_path: Path
) -> None:
    report = sweep(str(tmp_path), 2, PACED, [[0, 1, "trial"], [0, 3, "trial"], [0, 4, "trial"]])
    assert report["trials"] == {"0": ["done", None], "1": ["done", None]}
    first, second = read_records(tmp_path / "e")
    assert (first.lost, second.lost) == (3, 0)
    assert [m["epoch"] for m in read_metrics(first.folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.slow
def test_a_trial_that_is_lost_at_the_same_epoch_again_and_again_has_failed_itself(
    ray_cluster: str, tmp_path: Path
) -> None:
    network = {"name": "own", "path": "tests.deadly:network", "args": {"after": 5}}
    tree = {
        **PACED,
        "student": network,
        "search": {"num_samples": 1, "stopping": "none", "max_failures": 2},
    }
    report = sweep(str(tmp_path), 2, tree, [])
    (record,) = read_records(tmp_path / "e")
    assert report["trials"]["0"][0] == "failed" and record.lost == 2
    assert str(record.reason).startswith("its process was lost 3 times in epoch ")
