"""Cluster files: the shipped ones are valid and safe, each rule has its sentence."""

import argparse
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from tfkd_ray.cli.main import _parsed_args, _parser, main
from tfkd_ray.launch import jobs
from tfkd_ray.launch.check import check, node_types
from tfkd_ray.launch.clusterfile import load_cluster
from tfkd_ray.launch.jobs import stage
from tfkd_ray.launch.ray_rules import CUDA_DRIVER
from tfkd_ray.launch.verbs import PLACES, SENT, job_words
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.space.space import build_space

SHIPPED = sorted((ROOT / "clusters").iterdir())
TEXTS = {path.name: path.read_text() for path in SHIPPED}


def test_all_that_were_promised_are_there() -> None:
    assert set(TEXTS) == {
        "local.yaml", "onprem.yaml", "aws-gpu.yaml", "gcp-gpu.yaml", "azure-gpu.yaml", "kuberay-cluster.yaml",
        "kuberay-job.yaml", "slurm.sh",
    }  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_file_passes_its_own_check_quickly(path: Path) -> None:
    started = time.monotonic()
    lines = check(load_cluster(path))
    assert time.monotonic() - started < 4
    assert any(line.startswith("experiments go to ") for line in lines)


# --- security: these read the text, independent of the check


@pytest.mark.parametrize("name", TEXTS)
def test_every_shipped_file_has_a_token_and_none_in_it(name: str) -> None:
    text = TEXTS[name]
    starts = len(re.findall(r"^[^#\n]*\bray (start|symmetric-run)\b", text, re.M))
    assert text.count("RAY_AUTH_MODE=token") == starts >= 1 or "authOptions: {mode: token}" in text
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert not re.search(r"RAY_AUTH_TOKEN\b", code)
    assert not re.search(r"(?i)(password|secret[_-]?key|access[_-]?key)\s*[:=]\s*\S", code)
    if "worker_start_ray_commands:\n" in text:
        assert "~/.ray/auth_token: ~/.ray/auth_token" in text


@pytest.mark.parametrize("name", TEXTS)
def test_no_shipped_file_opens_a_port_to_the_world(name: str) -> None:
    text = TEXTS[name]
    assert "0.0.0.0/0" not in text and "::/0" not in text
    assert not re.search(r"NodePort|LoadBalancer|enableIngress|hostNetwork", text)
    hosts = re.findall(r"dashboard-host[:=]\s*([\w.:]+)", text)
    assert hosts, "named in every file"
    if (
        name == "kuberay-job.yaml"
    ):  # its operator reads the dashboard; a NetworkPolicy keeps everyone else out
        assert (
            hosts == ["0.0.0.0"]
            and "kind: NetworkPolicy" in text
            and "policyTypes: [Ingress]" in text
        )
    else:
        assert set(hosts) == {"127.0.0.1"}
    if name == "aws-gpu.yaml":
        assert "SecurityGroupIds: [sg-" in text
    if name == "azure-gpu.yaml":
        assert "use_internal_ips: true" in text
    if name == "gcp-gpu.yaml":
        assert text.count("networkInterfaces:") == 3 and "subnetworks/tfkd" in text


@pytest.mark.parametrize("name", TEXTS)
def test_every_shipped_file_pins_what_was_tested_and_gives_the_head_its_resource(name: str) -> None:
    text = TEXTS[name]
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for package, version in re.findall(
        r"\b(torch|torchvision|optuna|ray)(?:\[[^\]]*\])?==([\w.]+)", text
    ):
        assert version == tested[package], package
    for version in re.findall(r"rayproject/ray:([\d.]+)|rayVersion: ([\d.]+)|-ray([\d.]+)-", text):
        assert "".join(version) == tested["ray"]
    assert ":latest" not in text and "nightly" not in text
    assert re.search(r'tfkd_driver\\?": 1000', text)


INSTALLING = ["aws-gpu.yaml", "gcp-gpu.yaml", "azure-gpu.yaml", "onprem.yaml"]


@pytest.mark.parametrize("name", INSTALLING)
def test_nodes_install_all_that_tfkd_needs_and_a_job_brings_tfkd_itself(name: str) -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    (line,) = re.findall(r"pip install --quiet ('ray.*?)\n\n", TEXTS[name], re.S)
    pins = dict(re.findall(r"'?([\w-]+)(?:\[[\w,]*\])?==([\w.]+)", line))
    assert set(pins) == {re.split(r"[\[>]", one)[0] for one in needed}
    versions = {known.lower(): version for known, version in tested.items()}
    assert pins == {known: versions[known] for known in pins}
    assert "tfkd_ray==" not in TEXTS[name]


def test_the_image_is_built_on_the_files_ray_and_a_cluster_file_may_name_it(tmp_path: Path) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", dockerfile, re.M)
    (tag,) = re.findall(r"build -t (\S+) ", dockerfile)
    text = TEXTS["aws-gpu.yaml"]
    assert f"  image: {base}\n" in text
    text = re.sub(
        r"setup_commands:\n  - >-\n.*?\n\n", "setup_commands: []\n\n", text, count=1, flags=re.S
    )
    (tmp_path / "mine.yaml").write_text(text.replace(base, tag))
    assert check(load_cluster(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", [*INSTALLING, "slurm.sh"])
def test_the_files_say_how_trials_share_a_gpu_and_which_driver_they_need(name: str) -> None:
    assert "nvidia-cuda-mps-control -d" in TEXTS[name]
    assert re.search(rf"[Dd]river,? {CUDA_DRIVER}", TEXTS[name])


@pytest.mark.parametrize("name", INSTALLING[:3])
def test_a_new_machine_waits_for_its_package_lists_and_for_who_installs_already(name: str) -> None:
    commands = load_cluster(ROOT / "clusters" / name).tree["initialization_commands"]
    (line,) = (line for line in commands if "apt-get" in line)
    assert re.search(
        r"apt-get update .*apt-get -o DPkg::Lock::Timeout=\d+ install .*nfs-common", line
    )
    assert commands.index(line) < next(k for k, c in enumerate(commands) if "mount -t nfs" in c)


def test_machines_of_g2_have_a_disk_that_they_take() -> None:
    types = load_cluster(ROOT / "clusters/gcp-gpu.yaml").tree["available_node_types"]
    on_g2 = [t["node_config"] for t in types.values() if "g2-" in t["node_config"]["machineType"]]
    disks = [disk["initializeParams"]["diskType"] for node in on_g2 for disk in node["disks"]]
    assert len(disks) == 2 and all(disk.endswith("/pd-balanced") for disk in disks)


@pytest.mark.parametrize(
    "driver, code", [("580.126.16", 0), ("570.86.15", 1), (None, 0)], ids=["new", "old", "no GPU"]
)
def test_a_machine_with_an_old_driver_does_not_join(
    tmp_path: Path, driver: str | None, code: int
) -> None:
    """Run the command of the files, with fakes of lspci and nvidia-smi."""
    commands = {
        line
        for name in INSTALLING[:3]
        for line in load_cluster(ROOT / "clusters" / name).tree["initialization_commands"]
        if "nvidia-smi" in line
    }
    (command,) = commands
    fake(tmp_path, "lspci", "echo 3D controller: " + ("NVIDIA" if driver else "none"))
    fake(tmp_path, "nvidia-smi", f"echo {driver}")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    run = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert ("NVIDIA driver 570.86.15, and torch needs 580" in run.stdout) is bool(code)


@pytest.mark.parametrize("name", ["aws-gpu.yaml", "gcp-gpu.yaml", "azure-gpu.yaml"])
def test_rented_workers_are_spot_from_zero_and_end_when_idle_while_the_head_is_not(
    name: str,
) -> None:
    file = load_cluster(ROOT / "clusters" / name)
    types = file.tree["available_node_types"]
    spot = {
        n: bool(re.search(r"'spot'|'Spot'|'preemptible': True", str(t))) for n, t in types.items()
    }
    assert spot == {"head": False, "gpu1": True, "gpu4": True}
    assert file.tree["idle_timeout_minutes"] <= 10
    nodes = node_types(file)
    assert nodes and {n.name: n.least for n in nodes} == {"head": 1, "gpu1": 0, "gpu4": 0}


def test_the_files_come_with_the_package() -> None:
    assert '"clusters" = "tfkd_ray/clusters"' in (ROOT / "pyproject.toml").read_text()


def test_a_shipped_file_is_found_by_its_name_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        load_cluster("aws-gpu").name == "tfkd-aws"
        and load_cluster("clusters/slurm.sh").name == "tfkd"
    )
    assert load_cluster("slurm").kind == "slurm"


# --- rules: one change to a shipped file, one sentence

START = "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"
MUTATIONS = {
    "misspelt field": ("aws-gpu.yaml", "idle_timeout_minutes", "idle_timeout", "idle_timeout: no such field; did you mean 'idle_timeout_minutes'?"),
    "wrong type": ("aws-gpu.yaml", "max_workers: 8\nidle", "max_workers: many\nidle", "max_workers: must be of type integer, got 'many'"),
    "no name": ("aws-gpu.yaml", "cluster_name: tfkd-aws", "", "cluster_name: required, and not given"),
    "half a CPU": ("aws-gpu.yaml", "{CPU: 8, GPU: 1,", "{CPU: 8, GPU: 0.5,", "available_node_types.gpu1.resources.GPU: must be of type integer, got 0.5"),
    "no head type": ("aws-gpu.yaml", "head_node_type: head", "head_node_type: haed", "head_node_type: no such node type 'haed'; did you mean 'head'?"),
    "container name": ("aws-gpu.yaml", "  container_name: tfkd\n", "  container_name: ''\n", "(Ray): "),
    "provider": ("aws-gpu.yaml", "type: aws", "type: awss", "provider.type: no such provider 'awss'; did you mean 'aws'?"),
    "provider key": ("aws-gpu.yaml", "region: us", "regionn: us", "provider.regionn: Ray reads no such setting for aws; did you mean 'region'?"),
    "no worker_ips": ("onprem.yaml", "  worker_ips: [10.0.0.11, 10.0.0.12]\n", "", "provider.worker_ips: required, and not given"),
    "a coordinator": ("onprem.yaml", "head_ip: 10.0.0.10", "coordinator_address: 10.0.0.10:8080", "provider.coordinator_address: tfkd does not support coordinators; name head_ip and worker_ips"),
    "host twice": ("onprem.yaml", "10.0.0.12]", "10.0.0.11]", "provider.worker_ips: an address is given twice"),
    "head as worker": ("onprem.yaml", "10.0.0.12]", "10.0.0.10]", "provider.worker_ips: the head, 10.0.0.10, is already a node; leave it out"),
    "N - 1 workers": ("onprem.yaml", "RAY_enable_autoscaler_v2=0 PATH", "PATH", "head_start_ray_commands: with the autoscaler that is Ray's default, one of worker_ips never starts; set RAY_enable_autoscaler_v2=0"),
    "min above max": ("aws-gpu.yaml", "min_workers: 0\n    max_workers: 2", "min_workers: 3\n    max_workers: 2", "available_node_types.gpu4: min_workers must not be above max_workers, got 3 and 2"),
    "sum of min": ("aws-gpu.yaml", "min_workers: 0\n    max_workers: 8", "min_workers: 9\n    max_workers: 9", "max_workers: must be at least the sum of all min_workers, 9, got 8"),
    "no token on the head": ("aws-gpu.yaml", f"{START}; ulimit -n 65536;\n    (exec", "ulimit -n 65536;\n    (exec", "head_start_ray_commands: no token; put before `ray start`"),
    "no token on workers": ("gcp-gpu.yaml", f"{START}; ulimit -n 65536;\n    ray start --address", "ulimit -n 65536;\n    ray start --address", "worker_start_ray_commands: no token; put before `ray start`"),
    "token not copied": ("aws-gpu.yaml", "file_mounts:\n  ~/.ray/auth_token: ~/.ray/auth_token\n", "file_mounts: {}\n", "file_mounts: the nodes do not get the token; add: ~/.ray/auth_token: ~/.ray/auth_token"),
    "token in the file": ("aws-gpu.yaml", START, f"{START} RAY_AUTH_TOKEN=abc", "RAY_AUTH_TOKEN: a token does not belong in a file"),
    "dashboard": ("aws-gpu.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "head_start_ray_commands: --dashboard-host=0.0.0.0 lets other machines run code on this node; use 127.0.0.1"),
    "no directory of its own": ("local.yaml", "    --temp-dir=/tmp/tfkd-local", "   ", "head_start_ray_commands: --temp-dir: required, and not /tmp/ray"),
    "long directory": ("local.yaml", "--temp-dir=/tmp/tfkd-local", f"--temp-dir=/tmp/{'x' * 40}", "is too long for the names of Ray's sockets; use at most 40 characters"),
    "no start": ("aws-gpu.yaml", "head_start_ray_commands:", "metadata_of_old:", "metadata_of_old: no such field"),
    "Ray's own start": ("onprem.yaml", re.compile(r"head_start_ray_commands:\n.*?\n\n", re.S), "", "head_start_ray_commands: required, with a `ray start`; Ray's default starts without a token"),
    "driver": ("onprem.yaml", " --resources='{\"tfkd_driver\": 1000}'", "", "head_start_ray_commands: the head lacks the resource 'tfkd_driver'"),
    "Ray's own image": ("aws-gpu.yaml", "      ImageId: ami-0123456789abcdef0\n", "", "available_node_types.gpu1.node_config.ImageId: required: Ray's own choice is an image of Ubuntu 18.04"),
    "world: aws": ("aws-gpu.yaml", "      SecurityGroupIds: [sg-0123456789abcdef0]\n", "", "available_node_types.gpu1.node_config.SecurityGroupIds: required: the security group that Ray would make opens port 22 to the world"),
    "world: aws rule": ("aws-gpu.yaml", "  cache_stopped_nodes", "  security_group: {IpPermissions: [{FromPort: 8265, ToPort: 8265, IpProtocol: TCP, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}\n  cache_stopped_nodes", "provider.security_group: opens a port to the whole world"),
    "world: gcp": ("gcp-gpu.yaml", "      networkInterfaces: *net\n      scheduling", "      scheduling", "available_node_types.gpu1.node_config.networkInterfaces: required: the default network opens port 22 to the world"),
    "world: azure": ("azure-gpu.yaml", "  use_internal_ips: true\n", "", "provider.use_internal_ips: must be true"),
    "no storage": ("onprem.yaml", "    storage: /mnt/shared/tfkd_results", "    else: 1", "metadata.tfkd.storage: required, and not given; name a directory that all nodes can reach"),
    "storage in home": ("onprem.yaml", "/mnt/shared/tfkd_results ", "~/tfkd_results ", "metadata.tfkd.storage: ~/tfkd_results is local to each node"),
    "storage in /tmp": ("aws-gpu.yaml", "storage: /mnt/tfkd/results", "storage: /tmp/results", "metadata.tfkd.storage: /tmp/results is local to each node"),
    "storage not mounted": ("aws-gpu.yaml", "storage: /mnt/tfkd/results", "storage: /mnt/other/results", "metadata.tfkd.storage: /mnt/other/results is not on a file system that the commands for all nodes mount (they mount /mnt/tfkd)"),
    "storage not in the container": ("aws-gpu.yaml", "-v /mnt/tfkd:/mnt/tfkd, ", "", "docker.run_options: /mnt/tfkd is not visible in the container; add: -v /mnt/tfkd:/mnt/tfkd"),
    "credentials in the storage": ("aws-gpu.yaml", "storage: /mnt/tfkd/results", "storage: s3://key:secret@bucket/results", "metadata.tfkd.storage: s3://BUCKET/PREFIX, and nothing more: credentials come from"),
    "storage in no bucket": ("aws-gpu.yaml", "storage: /mnt/tfkd/results", "storage: hdfs://host/results", "metadata.tfkd.storage: a directory, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, got 'hdfs://host/results'"),
    "other Ray than here": ("gcp-gpu.yaml", "2.60.0", "2.59.1", "ray: 2.59.1 on the cluster and 2.60.0 here; `ray up` needs one for both"),
    "two Rays": ("gcp-gpu.yaml", "rayproject/ray:2.60.0", "rayproject/ray:2.59.0", "head: more than one version of ray, 2.59.0 and 2.60.0; keep one"),
    "another image for workers": ("gcp-gpu.yaml", "  container_name", "  worker_image: rayproject/ray:2.60.0-py312-gpu\n  container_name", "python: 3.11 on the head and 3.12 on the workers; use the same on all nodes"),
    "another torch for workers": ("gcp-gpu.yaml", "head_setup_commands:", "worker_setup_commands: [pip install torch==2.13.0]\nhead_setup_commands:", "workers: more than one version of torch, 2.13.0 and 2.14.1; keep one"),
    "unpinned": ("onprem.yaml", "'torch==2.14.1'", "torch", "setup_commands: torch without a version; pin it: torch==VERSION"),
    "an old driver": ("gcp-gpu.yaml", "nvidia-580", "nvidia-570", "available_node_types.gpu1.node_config: the image has NVIDIA's driver 570, and torch needs 580 or later"),
    "nothing waits for the driver": ("azure-gpu.yaml", "nvidia-smi", "true", "available_node_types.gpu1: no command waits for NVIDIA's driver"),
    "slurm: one core": ("slurm.sh", '--cpus-per-task="$SLURM_CPUS_PER_TASK"', "", "srun --cpus-per-task: required, and not given; since Slurm 22.05"),
    "latest image": ("gcp-gpu.yaml", "rayproject/ray:2.60.0-py311-gpu", "rayproject/ray:latest-py311-gpu", "docker: the image 'rayproject/ray:latest-py311-gpu' is latest, which changes over time; name a fixed one"),
    "kuberay: misspelt": ("kuberay-cluster.yaml", "maxReplicas", "maxReplica", "spec.workerGroupSpecs.0.maxReplica: no such field; did you mean 'maxReplicas'?"),
    "kuberay: number as text": ("kuberay-cluster.yaml", "maxReplicas: 8", "maxReplicas: '8'", "spec.workerGroupSpecs.0.maxReplicas: must be of type integer, got '8'"),
    "kuberay: version": ("kuberay-cluster.yaml", "apiVersion: ray.io/v1\n", "apiVersion: ray.io/v1alpha1\n", "apiVersion: 'ray.io/v1' was expected"),
    "kuberay: no image": ("kuberay-job.yaml", re.compile(r"            - name: ray-head\n.*?\n"), "            - name: ray-head\n", "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.image: required, and not given"),
    "kuberay: a pod's field": ("kuberay-cluster.yaml", "volumeMounts:", "volumeMount:", "spec.headGroupSpec.template.spec.containers.0.volumeMount: no such field; did you mean 'volumeMounts'?"),
    "kuberay: a pod's value": ("kuberay-cluster.yaml", "mountPath: /mnt/tfkd}", "mountPath: 7}", "volumeMounts.0.mountPath: must be of type string, got 7"),
    "kuberay: no token": ("kuberay-cluster.yaml", "  authOptions: {mode: token}\n", "", "spec.authOptions.mode: must be token, got None"),
    "kuberay: token off": ("kuberay-job.yaml", "mode: token", "mode: disabled", "spec.rayClusterSpec.authOptions.mode: must be token, got 'disabled'"),
    "kuberay: load balancer": ("kuberay-cluster.yaml", "serviceType: ClusterIP\n", "serviceType: LoadBalancer\n", "spec.headGroupSpec.serviceType: LoadBalancer opens Ray's ports outside of Kubernetes; use ClusterIP"),
    "kuberay: ingress": ("kuberay-cluster.yaml", "serviceType: ClusterIP\n", "enableIngress: true\n", "spec.headGroupSpec.enableIngress: opens the dashboard outside of Kubernetes"),
    "kuberay: dashboard, no policy": ("kuberay-job.yaml", "kind: NetworkPolicy", "kind: ConfigMap", "spec.rayClusterSpec.headGroupSpec.rayStartParams.dashboard-host: 0.0.0.0 lets every pod reach the dashboard"),
    "kuberay: driver": ("kuberay-cluster.yaml", "tfkd_driver\\", "tfkd\\", "spec.headGroupSpec.rayStartParams: the head lacks the resource 'tfkd_driver'"),
    "kuberay: min above max": ("kuberay-cluster.yaml", "minReplicas: 0", "minReplicas: 9", "spec.workerGroupSpecs.0: minReplicas must not be above maxReplicas, got 9 and 8"),
    "kuberay: images differ": ("kuberay-cluster.yaml", re.compile(r"(ray-worker\n\s+image: registry.example.com/tfkd_ray:)0.1.0"), r"\g<1>0.2.0", "use the same on all pods"),
    "kuberay: latest": ("kuberay-cluster.yaml", "tfkd_ray:0.1.0-ray2.60.0-py311", "tfkd_ray:latest", "spec.headGroupSpec.template.spec.containers.0.image: 'registry.example.com/tfkd_ray:latest' changes over time; name a release"),
    "kuberay: other Ray in the image": ("kuberay-cluster.yaml", "rayVersion: 2.60.0", "rayVersion: 2.59.0", "Ray 2.60.0, and rayVersion is 2.59.0; make them equal"),
    "kuberay: storage not mounted": ("kuberay-cluster.yaml", "              - {name: results, mountPath: /mnt/tfkd}\n", "", "spec.workerGroupSpecs.0.template.spec: metadata.annotations.tfkd/storage is /mnt/tfkd/results, but no volume is mounted there"),
    "kuberay: storage of one pod": ("kuberay-cluster.yaml", re.compile(r"(volumes: \[\{name: results, )persistentVolumeClaim: \{.*?\}"), r"\g<1>emptyDir: {}", "spec.headGroupSpec.template.spec: metadata.annotations.tfkd/storage is /mnt/tfkd/results, but only emptyDir is mounted there"),
    "kuberay: stays": ("kuberay-job.yaml", "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "spec.shutdownAfterJobFinishes: must be true"),
    **{
        f"read differently: {word}": ("aws-gpu.yaml", "max_workers: 8\nidle", f"max_workers: {word}\nidle", f"line 24, column 14: {word}: YAML 1.1 and YAML 1.2 read it as different values")
        for word in ("020", "yes", "off", "1e1", "1:30", "12:30:00", "2026-01-01", "0x8", "1_000", "0b1", "=")
    },
    **{
        f"kuberay: read differently by Go: {word}": ("kuberay-cluster.yaml", "minReplicas: 0", f"minReplicas: {word}", f": {word}: YAML 1.1 and YAML 1.2 read it as different values")
        for word in ("0o10", "y", "N")
    },
    "a launcher's file: a letter that only Go reads as a boolean": ("aws-gpu.yaml", "max_workers: 8\nidle", "max_workers: y\nidle", "max_workers: must be of type integer, got 'y'"),
    **{
        f"read differently: {word}": ("aws-gpu.yaml", "max_workers: 8\nidle", f"max_workers: {word}\nidle", "YAML 1.1 and YAML 1.2 read it as different values")
        for word in ("!!int 010", "!!int '010'", "!!float 1:30")
    },
    "read differently, as a key": ("aws-gpu.yaml", "max_workers: 8\nidle", "on: 8\nidle", "line 24, column 1: on: YAML 1.1"),
    "kuberay: read differently in another document": ("kuberay-cluster.yaml", "metadata: {name: tfkd}", "metadata: {name: no}", "line 20, column 18: no: YAML 1.1"),
    "a name with a slash": ("aws-gpu.yaml", "cluster_name: tfkd-aws", "cluster_name: a/b", "cluster_name: must be of letters, digits, - and _, at most 63, got 'a/b'"),
    "a name with blanks": ("onprem.yaml", "cluster_name: tfkd-onprem", "cluster_name: my cluster", "cluster_name: must be of letters"),
    "a name that is too long": ("aws-gpu.yaml", "cluster_name: tfkd-aws", f"cluster_name: {'x' * 64}", "cluster_name: must be of letters"),
    "a name that GCP refuses": ("gcp-gpu.yaml", "cluster_name: tfkd-gcp", "cluster_name: Tfkd", "cluster_name: must be of small letters"),
    "kuberay: a name": ("kuberay-cluster.yaml", "metadata:\n  name: tfkd\n", "metadata:\n  name: Tfkd\n", "metadata.name: must be of small letters, digits and -"),
    "a file that is not there": ("aws-gpu.yaml", "file_mounts:\n", "file_mounts:\n  /etc/x: no/such/file\n", "file_mounts./etc/x: no/such/file does not exist (searched from "),
    "a user's file that is not there": ("aws-gpu.yaml", "file_mounts:\n", "file_mounts:\n  /etc/x: ~no-such-user/x\n", "file_mounts./etc/x: ~no-such-user/x: the home directory is unknown for ~no-such-user; name the whole path"),
    "a device to copy": ("aws-gpu.yaml", "file_mounts:\n", "file_mounts:\n  /etc/x: /dev/zero\n", "file_mounts./etc/x: /dev/zero is a device; only files and directories are copied"),
    "nothing to copy": ("aws-gpu.yaml", "file_mounts:\n", "file_mounts:\n  /etc/x: null\n", "file_mounts./etc/x: must be a path on this machine, got None"),
    "blanks to copy": ("aws-gpu.yaml", "file_mounts:\n", "file_mounts:\n  /etc/x: '  '\n", "file_mounts./etc/x: must be a path on this machine, got '  '"),
    "a copy without a place": ("aws-gpu.yaml", "file_mounts:\n", "file_mounts:\n  '': /etc/hosts\n", "file_mounts: /etc/hosts needs a path on the nodes, got ''"),
    "kuberay: CPUs of a shell": ("kuberay-cluster.yaml", 'num-cpus: "0"', 'num-cpus: "$CPUS"', "spec.headGroupSpec.rayStartParams.num-cpus: `ray start` takes a whole number (\"4\"), got '$CPUS'"),
    "kuberay: half a CPU": ("kuberay-cluster.yaml", 'num-cpus: "0"', 'num-cpus: "500m"', "takes a whole number (\"4\"), got '500m'"),
    "kuberay: CPUs without end": ("kuberay-cluster.yaml", 'limits: {cpu: "8"', "limits: {cpu: .inf", "resources.limits.cpu: must be a Kubernetes quantity (2, 500m, 8Gi), got inf"),
    "kuberay: negative CPUs": ("kuberay-cluster.yaml", 'limits: {cpu: "8"', "limits: {cpu: -1", "resources.limits.cpu: must be a Kubernetes quantity"),
    "kuberay: CPUs in words": ("kuberay-cluster.yaml", 'requests: {cpu: "8"', 'requests: {cpu: "$CPUS"', "resources.requests.cpu: must be a Kubernetes quantity"),
    "kuberay: half a GPU": ("kuberay-cluster.yaml", 'limits: {cpu: "8", memory: 32Gi, nvidia.com/gpu: "1"}', "limits: {cpu: 8, memory: 32Gi, nvidia.com/gpu: 500m}", "GPUs are whole, got '500m'"),
    "slurm: no token": ("slurm.sh", "export RAY_AUTH_MODE=token", "export X=1", "RAY_AUTH_MODE: no token; put before Ray starts"),
    "slurm: dashboard": ("slurm.sh", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "--dashboard-host: 0.0.0.0 lets others run code on the node"),
    "slurm: driver": ("slurm.sh", "tfkd_driver", "driver", "--resources: the head lacks 'tfkd_driver'"),
    "slurm: storage": ("slurm.sh", "TFKD_RESULTS=/shared/$USER/tfkd_results", "TFKD_RESULTS=/tmp/tfkd_results", "TFKD_RESULTS: /tmp/tfkd_results is local to each node"),
    "slurm: shared nodes": ("slurm.sh", "#SBATCH --exclusive\n", "", "#SBATCH --exclusive: required, and not given"),
    "slurm: no time": ("slurm.sh", "#SBATCH --time=24:00:00\n", "", "#SBATCH --time: required, and not given"),
    "slurm: no version": ("slurm.sh", "ray==2.60.0", "ray", "ray: name one exact version, and let the script check it, as clusters/slurm.sh does; got none"),
    "slurm: two versions": ("slurm.sh", "ray==2.60.0", "torch==2.13.0", "torch: name one exact version, and let the script check it, as clusters/slurm.sh does; got 2.13.0 and 2.14.1"),
    "slurm: begins too early": ("slurm.sh", "--min-nodes", "--some-nodes", "--min-nodes: required, and not given"),
    "slurm: no Ray": ("slurm.sh", "ray symmetric-run", "true", "ray symmetric-run: not there"),
}  # fmt: skip


def test_a_pipe_below_a_folder_to_copy_is_named_as_ray_would_wait_for_it(tmp_path: Path) -> None:
    (tmp_path / "code/sub").mkdir(parents=True)
    os.mkfifo(tmp_path / "code/sub/pipe")
    text = TEXTS["aws-gpu.yaml"]
    (tmp_path / "mine.yaml").write_text(
        text.replace("file_mounts:\n", f"file_mounts:\n  /x: {tmp_path}/code\n")
    )
    with pytest.raises(ConfigError, match=r"file_mounts./x: .*/sub/pipe is a named pipe; only"):
        check(load_cluster(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "cpu, has",
    [
        ("7500m", 8),
        ('"500m"', 1),
        ("1k", 1000),
        ("8", 8),
        ('"8"', 8),
        ("2.5", 3),
        ('"2e1"', 20),
        ("1000001u", 2),
        ("1Ki", 1024),
    ],
)
def test_a_pod_has_as_many_cpus_as_kuberay_tells_ray(tmp_path: Path, cpu: str, has: int) -> None:
    text = TEXTS["kuberay-cluster.yaml"].replace('cpu: "8"', f"cpu: {cpu}")
    (tmp_path / "mine.yaml").write_text(text)
    file = load_cluster(tmp_path / "mine.yaml")
    check(file)
    nodes = node_types(file)
    assert nodes and nodes[1].resources["CPU"] == has


def test_a_comment_after_the_dashes_begins_no_second_document(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "--- # of ours\n" + TEXTS["aws-gpu.yaml"] + "\n--- # and no more\n"
    )
    assert load_cluster(tmp_path / "mine.yaml").tree == load_cluster("aws-gpu").tree


@pytest.mark.slow
def test_a_file_of_many_documents_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("---\na: 1\n" * 10_000)
    began = time.process_time()
    with pytest.raises(ConfigError, match="not a cluster file"):
        load_cluster(tmp_path / "mine.yaml")
    assert time.process_time() - began < 20


@pytest.mark.parametrize("name, old, new, sentence", MUTATIONS.values(), ids=MUTATIONS)
def test_each_rule_has_its_own_sentence(
    tmp_path: Path, name: str, old: "str | re.Pattern[str]", new: str, sentence: str
) -> None:
    text = TEXTS[name]
    changed = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    assert changed != text
    path = tmp_path / name
    path.write_text(changed)
    with pytest.raises(ConfigError) as error:
        check(load_cluster(path))
    assert sentence in str(error.value) and str(path) in str(error.value)


NO_CLUSTER = {
    "missing": ("x.yaml", None, "no such file"),
    "empty": ("x.yaml", "", "is empty; begin with one from clusters/"),
    "a search space": (
        "x.yaml",
        "objective: ce\n",
        "is a search space or an arms file, not a cluster file",
    ),
    "something else": ("x.yaml", "a: 1\n", "not a cluster file: it has neither 'provider:'"),
    "provider as a word": ("x.yaml", "provider: aws\n", "provider: needs settings below it"),
    "a tab": ("x.yaml", "provider:\n\ttype: aws\n", "a tab, but YAML indents with spaces only"),
    "a script": ("x.sh", "echo\n", "not a Slurm script"),
    "another kind": ("x.json", "{}", "a cluster file is a .yaml (Ray, KubeRay) or a .sh (Slurm)"),
    "the second document": (
        "x.yaml",
        "a: 1\n---\nb: 1\nb: 2\n",
        "line 4, column 1: not YAML: key 'b' is given twice",
    ),
}


@pytest.mark.parametrize("name, text, sentence", NO_CLUSTER.values(), ids=NO_CLUSTER)
def test_what_is_no_cluster_file_is_said_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, sentence: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["cluster", "check", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err


@pytest.mark.parametrize(
    "name, shape, sentence",
    [
        ("aws-gpu.yaml", {"workers": 8, "gpus_per_worker": 1}, None),
        ("aws-gpu.yaml", {"workers": 15, "gpus_per_worker": 1}, "a trial needs 15 x 1 CPU and 1 GPU, each on one node, and with all its nodes the cluster has room for 14"),
        ("aws-gpu.yaml", {"cpus_per_worker": 500, "gpus_per_worker": 1}, "room for 0 of them"),
        ("aws-gpu.yaml", {"gpus_per_worker": 1, "accelerator_type": "A10G"}, None),
        ("aws-gpu.yaml", {"gpus_per_worker": 1, "accelerator_type": "H100"}, "accelerator_type: no node type declares H100 (declared: A10G), and an autoscaler starts only declared kinds; if one has it, add to its resources: 'accelerator_type:H100': 1"),
        ("gcp-gpu.yaml", {"gpus_per_worker": 1, "accelerator_type": "A10G"}, "no node type declares A10G (declared: L4)"),
        ("azure-gpu.yaml", {"workers": 4, "gpus_per_worker": 1, "accelerator_type": "A100"}, None),
        ("kuberay-cluster.yaml", {"gpus_per_worker": 1, "accelerator_type": "L4"}, "add to its rayStartParams.resources: 'accelerator_type:L4': 1"),
        ("slurm.sh", {"gpus_per_worker": 1, "accelerator_type": "H100"}, None),
        ("kuberay-cluster.yaml", {"workers": 9, "gpus_per_worker": 1}, "room for 8 of them"),
        ("slurm.sh", {"workers": 8, "gpus_per_worker": 1}, None),
        ("slurm.sh", {"workers": 9, "gpus_per_worker": 1}, "room for 8 of them"),
    ],
)  # fmt: skip
def test_a_trial_that_can_never_fit_is_refused(
    name: str, shape: dict[str, Any], sentence: str | None
) -> None:
    space = build_space(
        {
            "objective": "ce",
            "student": {"name": "mlp", "hidden": [8]},
            "optim": {"batch_size": 360},
            **shape,
        }
    )
    file = load_cluster(ROOT / "clusters" / name)
    if sentence is None:
        check(file, space.example)
        return
    with pytest.raises(ConfigError) as error:
        check(file, space.example)
    assert "workers: " in str(error.value) or "accelerator_type" in shape
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "resources, kind, fits",
    [
        ("{CPU: 8, GPU: 1}", "A10G", True),  # Ray asks EC2
        ('{CPU: 8, GPU: 1, "accelerator_type:L4": 1}', "A10G", True),  # the other type
        ('{CPU: 8, GPU: 1, "accelerator_type:L4": 1}', "L4", True),
        ('{CPU: 8, GPU: 1, "accelerator_type:L4": 1}', "T4", False),
    ],
)
def test_each_type_of_node_has_its_own_kind_of_gpu(
    tmp_path: Path, resources: str, kind: str, fits: bool
) -> None:
    """Room is counted on the nodes with this kind of GPU only."""
    text = TEXTS["aws-gpu.yaml"].replace('{CPU: 8, GPU: 1, "accelerator_type:A10G": 1}', resources)
    (tmp_path / "mine.yaml").write_text(text)
    file = load_cluster(tmp_path / "mine.yaml")
    trial = {
        "objective": "ce",
        "student": {"name": "mlp", "hidden": [8]},
        "gpus_per_worker": 1,
        "accelerator_type": kind,
    }
    if fits:
        check(file, build_space(trial).example)
    else:
        with pytest.raises(ConfigError, match=f"no node type declares {kind} "):
            check(file, build_space(trial).example)
    if kind == "L4":
        with pytest.raises(ConfigError, match="room for 8 of them"):
            check(file, build_space({**trial, "workers": 9, "optim": {"batch_size": 360}}).example)


def test_a_kind_of_gpu_that_pods_are_said_to_have_is_found(tmp_path: Path) -> None:
    said = 'rayStartParams: {resources: \'"{\\"accelerator_type:L4\\": 1}"\'}'
    (tmp_path / "mine.yaml").write_text(
        TEXTS["kuberay-cluster.yaml"].replace("rayStartParams: {}", said)
    )
    trial = {"objective": "ce", "student": "mlp", "gpus_per_worker": 1, "accelerator_type": "L4"}
    lines = check(load_cluster(tmp_path / "mine.yaml"), build_space(trial).example)
    assert "  gpu: 0 to 8 nodes, each with 8 CPU, 1 GPU, L4" in lines


LEFT = {
    "aws-gpu": "ami-0123456789abcdef0, subnet-0123456789abcdef0, sg-0123456789abcdef0, fs-0123456789abcdef0",
    "gcp-gpu": "my-project",
    "azure-gpu": "00000000-0000-0000-0000-000000000000, mystorage.file",
}


@pytest.mark.parametrize("name", LEFT)
def test_what_must_be_changed_is_named_by_check_and_refused_by_up(
    tools: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    assert main(["cluster", "check", name]) == 0
    assert capsys.readouterr().out.endswith(f"\nto change before `tfkd cluster up`: {LEFT[name]}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("a-token")
    monkeypatch.setattr(
        "tfkd_ray.launch.verbs._ASKED", {name.partition("-")[0]: ({}, ["true"], "")}
    )
    for program in ("az", "true"):
        fake(tools, program, "")
    assert main(["cluster", "up", name]) == 2
    assert f"{LEFT[name]}: placeholders of the shipped file" in capsys.readouterr().err
    text = TEXTS[f"{name}.yaml"]
    for word in LEFT[name].split(", "):
        text = text.replace(
            word,
            word.replace("0123456789abcdef0", "0feed")
            .replace("0000-", "1111-")
            .replace("my", "our"),
        )
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["cluster", "check", str(tmp_path / "mine.yaml")]) == 0
    assert "to change" not in capsys.readouterr().out


@pytest.mark.parametrize("pin, code", [("ray==2.60.0", 0), ("ray==2.59.0", 1)])
def test_slurms_script_looks_for_the_versions_that_it_names(
    tmp_path: Path, pin: str, code: int
) -> None:
    ((_, program, pins),) = re.findall(r"(python -c) '(.*?)' \\\n  (.*)", TEXTS["slurm.sh"], re.S)[
        :1
    ]
    words = [pin, *(word for word in pins.splitlines()[0].split() if "ray==2" not in word)]
    run = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert (run.stderr == "tfkd-env has other versions; pip install ray==2.59.0\n") is bool(code)


# --- verbs


@pytest.mark.parametrize("verb", ["up", "status", "submit", "logs", "down"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_commands_are_printed_without_any_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path, verb: str
) -> None:
    monkeypatch.setenv("PATH", "")
    code = main(
        ["cluster", verb, str(path), "--print", *(["--", "tfkd", "ls"] if verb == "submit" else [])]
    )
    out, err = capsys.readouterr()
    if (verb, path.name) == ("up", "slurm.sh"):
        assert code == 2 and "lives as long as its job" in err
        return
    assert code == 0 and err == ""
    first = {
        ("up", "local"): "bash -c", ("up", "ray"): "ray up --yes", ("up", "kube"): "kubectl apply --filename",
        ("down", "ray"): "ray down --yes", ("down", "kube"): "kubectl delete", ("down", "slurm"): "scancel --me --name tfkd",
        ("submit", "slurm"): "sbatch", ("submit", "ray"): "ray dashboard", ("submit", "local"): "ray job submit",
        ("status", "slurm"): "squeue", ("status", "kube"): "kubectl get pods",
        ("up", "rayjob"): "kubectl apply --filename", ("down", "rayjob"): "kubectl get rayclusters",
        ("status", "rayjob"): "kubectl get rayclusters", ("submit", "rayjob"): "kubectl get rayclusters",
        ("down", "local"): "bash -c",
    }  # fmt: skip
    kind = path.stem.split("-")[0].replace("kuberay", "kube")
    kind = kind if kind in ("local", "kube", "slurm") else "ray"
    kind = "rayjob" if path.stem == "kuberay-job" else kind
    assert out.startswith(first.get((verb, kind), ""))
    if verb == "submit":
        assert "tfkd ls" in out and (kind == "slurm" or "--working-dir FOLDER " in out)


def test_the_lists_of_nodes_are_asked_of_whoever_rents_them_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, program in (
        ("aws-gpu", "aws ec2"),
        ("gcp-gpu", "gcloud compute"),
        ("azure-gpu", "az vm"),
        ("onprem", "ssh "),
    ):
        assert main(["cluster", "down", name, "--print"]) == 0
        assert program in capsys.readouterr().out


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a PATH with fake programs only, which write their calls to `called`."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
    return folder


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/bash\necho {name} "$@" >> {folder}/called\n{script}\n')
    path.chmod(0o755)


def test_a_missing_kubectl_and_missing_credentials_are_said(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "up", "kuberay-cluster"]) == 2
    assert "kubectl is not installed, or not on PATH" in capsys.readouterr().err
    fake(tools, "kubectl", "exit 1")
    assert main(["cluster", "up", "kuberay-cluster"]) == 2
    assert "kubectl knows no Kubernetes cluster (no current context)" in capsys.readouterr().err
    assert main(["cluster", "submit", "slurm", "--", "tfkd", "ls"]) == 2
    assert "sbatch is not installed" in capsys.readouterr().err


def test_a_failing_step_is_shown_and_the_next_is_not_run(
    tools: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake(
        tools,
        "kubectl",
        '[ "$1" != apply ] || { echo "no matches for kind RayCluster" >&2; exit 4; }',
    )
    assert main(["cluster", "up", "kuberay-cluster"]) == 1
    err = capfd.readouterr().err
    assert "no matches for kind RayCluster" in err and "step 1 of 2 failed (exit code 4)" in err
    assert "wait" not in (tools / "called").read_text()


STAYS = (
    "  /mnt/tfkd/results stays: its file system, volume or bucket costs money until you delete it\n"
)


def test_down_is_down_only_when_nothing_is_left(
    tools: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfkd_ray.launch.verbs.LEFT_S", 0)
    fake(tools, "kubectl", '[ "$1" != get ] || echo "tfkd-head-x 1/1 Running"')
    assert main(["cluster", "down", "kuberay-cluster"]) == 1
    assert (
        "these still exist, and may cost money" in (err := capsys.readouterr().err)
        and "tfkd-head-x" in err
    )
    fake(tools, "kubectl", "")
    assert main(["cluster", "down", "kuberay-cluster"]) == 0
    assert main(["cluster", "status", "kuberay-cluster"]) == 0
    assert capsys.readouterr().out == (
        f"tfkd is down: nothing of it runs\n{STAYS}tfkd is down: nothing of it runs, no node costs money\n{STAYS}"
    )


HEAD = """
import http.server, json, sys, ray
class Head(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        jobs = [{"submission_id": "one", "status": "RUNNING", "entrypoint": "tfkd tune x"}]
        status = {"data": {"clusterStatus": "Pending:\\n gpu, 1 launching\\n"}}
        body = {"/api/version": {"ray_version": ray.__version__}, "/api/jobs/": jobs}.get(self.path, status)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1].split(":")[0])), Head).serve_forever()
"""
KUBECTL = f"""
case "$*" in
  "get rayclusters --output name --selector ray.io/originated-from-crd=RayJob,ray.io/originated-from-cr-name=tfkd-sweep")
    echo raycluster.ray.io/tfkd-sweep-a1b2c ;;
  "get pods --output name --selector ray.io/node-type=head,ray.io/cluster=tfkd-sweep-a1b2c --field-selector"*)
    echo pod/tfkd-sweep-a1b2c-head-x ;;
  "get pods --no-headers --ignore-not-found --selector ray.io/cluster=tfkd-sweep-a1b2c")
    [ -e $(dirname "$0")/deleted ] || printf 'tfkd-sweep-a1b2c-head-x 1/1 Running\\ngpu-y 1/1 Running\\n' ;;
  "port-forward --address 127.0.0.1 pod/tfkd-sweep-a1b2c-head-x "*)
    exec {sys.executable} $(dirname "$0")/head.py "${{@: -1}}" ;;
  "delete"*) : > $(dirname "$0")/deleted ;;
  *) echo "error: what?" >&2; exit 1 ;;
esac
"""


@pytest.mark.slow
def test_a_rayjobs_pods_and_jobs_are_found_by_the_clusters_that_it_has_made(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tools / "head.py").write_text(HEAD)
    fake(tools, "kubectl", KUBECTL.replace("dirname", "/usr/bin/dirname"))
    assert main(["cluster", "status", "kuberay-job"]) == 0
    assert capsys.readouterr().out == (
        "tfkd-sweep: 2 nodes; each costs money until `tfkd cluster down`\n  tfkd-sweep-a1b2c-head-x 1/1 Running\n"
        "  gpu-y 1/1 Running\n  job one: running: tfkd tune x\n  starting: gpu, 1 launching\n"
    )


RENTED = {
    "aws": (
        "aws",
        "Name=tag:ray-cluster-name,Values=tfkd-aws",
        "i-0a1 m6i.xlarge running None\\ni-0b2 g5.2xlarge running spot",
    ),
    "gcp": (
        "gcloud",
        "labels.ray-cluster-name=tfkd-gcp",
        "ray-head n2-standard-4 RUNNING\\nray-gpu1 g2 RUNNING True",
    ),
    "azure": (
        "az",
        """[?tags."ray-cluster-name"=='tfkd-azure'].""",
        "head D4s running Regular\\ngpu1 NC4 running Spot",
    ),
}


@pytest.mark.parametrize("provider", RENTED)
@pytest.mark.slow
def test_status_and_down_ask_for_the_machines_with_the_clusters_tag_and_say_which_cost_money(
    tools: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    """Fake programs of the providers list machines only if asked for this cluster's tag."""
    program, tag, machines = RENTED[provider]
    listed = machines.replace("\\n", "\n").splitlines()
    mine = f"for word; do [[ $word != {shlex.quote(tag)}* || -e {tools}/ended ]] || printf '{machines}\\n'; done"
    fake(tools, program, mine)
    fake(tools, "end", f": > {tools}/ended")
    (tools / "head.py").write_text(HEAD)
    head = [sys.executable, str(tools / "head.py")]
    monkeypatch.setattr(
        "tfkd_ray.launch.verbs.tunnel_command", lambda file, port, pod: [*head, f"{port}:8265"]
    )
    monkeypatch.setattr("tfkd_ray.launch.verbs.LEFT_S", 0)
    monkeypatch.setattr("tfkd_ray.launch.verbs.down_commands", lambda file: [[str(tools / "end")]])

    assert main(["cluster", "status", f"{provider}-gpu"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"tfkd-{provider}: 2 nodes; each costs money until `tfkd cluster down`"
    assert lines[:2] == [f"  {machine}" for machine in listed]

    assert main(["cluster", "down", f"{provider}-gpu"]) == 0
    assert main(["cluster", "status", f"{provider}-gpu"]) == 0
    name = f"tfkd-{provider}"
    assert capsys.readouterr().out == (
        f"{name} is down: nothing of it runs\n{STAYS}{name} is down: nothing of it runs, no node costs money\n{STAYS}"
    )

    (tools / "ended").unlink()
    fake(tools, "end", "")  # `ray down` that has stopped nothing
    assert main(["cluster", "down", f"{provider}-gpu"]) == 1
    err = capsys.readouterr().err
    assert "these still exist, and may cost money" in err and all(
        machine in err for machine in listed
    )


def test_what_is_not_rented_is_not_said_to_cost_money(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(tools, "pgrep", "exit 1")
    assert main(["cluster", "status", "local"]) == 0
    assert capsys.readouterr().out == "tfkd-local is down: nothing of it runs\n"


def test_a_list_that_its_provider_refuses_is_no_empty_list(
    tools: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake(tools, "aws", "echo 'An error occurred (ExpiredToken)' >&2; exit 254")
    assert main(["cluster", "status", "aws-gpu"]) == 1
    out, err = capfd.readouterr()
    assert (
        out == "" and "listing its nodes failed (exit code 254)" in err and "(ExpiredToken)" in err
    )


def test_a_list_that_takes_too_long_is_given_up(
    tools: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfkd_ray.launch.verbs.LIST_S", 0.5)
    fake(tools, "aws", "/bin/sleep 60")
    began = time.monotonic()
    assert main(["cluster", "status", "aws-gpu"]) == 1
    assert (
        time.monotonic() - began < 10
        and "listing its nodes did not end within 0.5 s" in capsys.readouterr().err
    )


def test_a_rayjob_without_a_head_is_not_waited_for(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(
        tools, "kubectl", KUBECTL.replace("dirname", "/usr/bin/dirname").replace("echo pod/", ": ")
    )
    assert main(["cluster", "status", "kuberay-job"]) == 1
    out, err = capsys.readouterr()
    assert (
        "gpu-y" in out
        and "tfkd-sweep has no running head" in err
        and "kubectl describe rayjob/tfkd-sweep" in err
    )
    fake(tools, "kubectl", "")
    assert main(["cluster", "status", "kuberay-job"]) == 0
    assert (
        capsys.readouterr().out
        == f"tfkd-sweep is down: nothing of it runs, no node costs money\n{STAYS}"
    )


@pytest.mark.parametrize("name, kind", [("tfkd-sweep", "rayjob"), ("tfkd", "raycluster")])
def test_down_deletes_the_network_policy_when_the_pods_are_gone(
    tools: Path, name: str, kind: str
) -> None:
    fake(
        tools, "kubectl", KUBECTL.replace("dirname", "/usr/bin/dirname") if kind == "rayjob" else ""
    )
    assert (
        main(["cluster", "down", {"rayjob": "kuberay-job", "raycluster": "kuberay-cluster"}[kind]])
        == 0
    )
    *_, pods, last = (tools / "called").read_text().splitlines()
    assert (
        "get pods" in pods
        and last == f"kubectl delete --ignore-not-found --timeout=60s networkpolicy/{name}"
    )


def test_down_leaves_the_network_policy_where_pods_are_left(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tfkd_ray.launch.verbs.LEFT_S", 0)
    fake(tools, "kubectl", '[ "$1" != get ] || echo "tfkd-head-x 1/1 Terminating"')
    assert main(["cluster", "down", "kuberay-cluster"]) == 1
    assert "networkpolicy" not in (tools / "called").read_text()


def test_what_is_printed_is_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*words: str) -> list[str]:
        assert main(["cluster", *words]) == 0
        return capsys.readouterr().out.splitlines()

    _, submit, follow, comment = printed("submit", "aws-gpu", "--print", "--", "tfkd", "ls")
    assert "--working-dir FOLDER " in submit and submit.endswith(" -- tfkd ls") and "JOB" in follow
    assert comment == (
        "# FOLDER: a copy of this folder without data, results, keys and what .rayignore names, and with this tfkd"
    )
    *_, submit, comment, script = printed(
        "submit", "aws-gpu", "--detach", "--print", "--", "sh", "-c", "ls; true"
    )
    assert (
        submit.endswith(" -- bash tfkd_job.sh")
        and script == "#   in it tfkd_job.sh: exec sh -c 'ls; true'"
    )
    clusters, pods = printed("status", "kuberay-job", "--print")
    assert clusters.startswith("kubectl get rayclusters") and pods.endswith(
        " ray.io/cluster=RAYCLUSTER"
    )
    down = printed("down", "kuberay-job", "--print")
    assert [line.split()[1] for line in down] == [
        "get",
        "delete",
        "get",
        "delete",
    ] and "networkpolicy/" in down[-1]
    end, _ = printed("down", "local", "--print")
    assert end.count("pkill") == 2 and end.count("[/]tmp/tfkd-local/session") == 2


@pytest.mark.tools  # pkill
def test_what_down_prints_for_this_machine_ends_the_processes_of_the_cluster_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tempfile.mkdtemp(prefix="tc")
    path = Path(place) / "mine.yaml"
    path.write_text(TEXTS["local.yaml"].replace("/tmp/tfkd-local", f"{place}/t"))
    sleeper = "exec -a {}/session_1/x sleep 60"
    ours = [
        subprocess.Popen(["bash", "-c", trap + sleeper.format(f"{place}/t")])
        for trap in ("", "trap '' TERM; ")
    ]
    other = subprocess.Popen(["bash", "-c", sleeper.format(f"{place}/other")])
    try:
        assert main(["cluster", "down", str(path), "--print"]) == 0
        subprocess.run(capsys.readouterr().out.splitlines()[0], shell=True, timeout=20)
        assert [process.wait(5) for process in ours] == [
            -signal.SIGTERM,
            -signal.SIGKILL,
        ] and other.poll() is None
    finally:
        for process in (*ours, other):
            process.kill()
            process.wait()
        shutil.rmtree(place)


def test_a_key_that_others_may_read_is_refused(
    tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    path = tmp_path / "mine.yaml"
    path.write_text(
        TEXTS["onprem.yaml"]
        .replace("~/.ssh/id_ed25519", str(key))
        .replace("auth_token: ~/.ray/auth_token", f"auth_token: {tmp_path}/token")
    )
    (tmp_path / "token").write_text("a-token")
    assert main(["cluster", "up", str(path)]) == 2
    assert f"auth.ssh_private_key: {key} does not exist" in capsys.readouterr().err
    key.write_text("x")
    key.chmod(0o644)
    assert main(["cluster", "up", str(path)]) == 2
    assert (
        f"can be read by other users (mode 644), and ssh refuses such a key; chmod 600 {key}"
        in capsys.readouterr().err
    )
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    for content in (b"another", b"", b"\xff", bytes(2**20)):
        (tmp_path / "token").write_bytes(content)
        (tmp_path / "token").chmod(0o644)
        assert main(["cluster", "up", str(path)]) == 2
        said = capsys.readouterr().err
        assert "token" in said and "Traceback" not in said
        assert content != b"another" or "token, but differs from the one used here" in said
        mode = stat.S_IMODE((tmp_path / "token").stat().st_mode)
        assert mode == 0o644, "a file that is not our token is left as it is"


SSH = {
    "nothing listens": ("exec /usr/bin/ssh -p 9 \"$@\"", 1, "no answer by ssh within 10 s from 127.77.0.8, 127.77.0.9"),
    "says nothing": ("/bin/sleep 60", 1, "no answer by ssh within 1 s from 127.77.0.8, 127.77.0.9"),
    "one of two": ('[[ "$*" == *77.0.8* ]] || exit 255', 1, "no answer by ssh within 10 s from 127.77.0.9, so nothing was started"),
    "refuses the key": ("echo 'me@x: Permission denied (publickey).' >&2; exit 255", 2, "auth: 127.77.0.8, 127.77.0.9 responds, but rejects this user or key"),
}  # fmt: skip


@pytest.mark.parametrize(
    "script, code, sentence",
    [
        pytest.param(*case, id=name, marks=[pytest.mark.tools] * (name == "nothing listens"))
        for name, case in SSH.items()
    ],
)
@pytest.mark.slow
def test_a_host_that_does_not_answer_is_named_before_anything_starts(
    tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, script: str,
    code: int, sentence: str,
) -> None:  # fmt: skip
    if "sleep" in script:
        monkeypatch.setattr("tfkd_ray.launch.verbs.SSH_S", 1)
    path = tmp_path / "mine.yaml"
    path.write_text(
        TEXTS["onprem.yaml"]
        .replace("10.0.0.10\n", "127.77.0.8\n")
        .replace("[10.0.0.11, 10.0.0.12]", "[127.77.0.9]")
        .replace("~/.ssh/id_ed25519", str(tmp_path / "key"))
        .replace("auth_token: ~/.ray/auth_token", f"auth_token: {tmp_path}/token")
    )
    for name in ("key", "token"):
        (tmp_path / name).write_text("a-token")
        (tmp_path / name).chmod(0o600)
    fake(tools, "ssh", script)
    fake(tools, "rsync", "")
    began = time.monotonic()
    assert main(["cluster", "up", str(path)]) == code
    assert time.monotonic() - began < 10
    err = capfd.readouterr().err
    assert sentence in err and "ray up" not in err and "Traceback" not in err


def test_slurm_runs_the_command_under_symmetric_run(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the script itself, with fakes of Slurm and Ray."""
    (tmp_path / "home/tfkd-env/bin").mkdir(parents=True)
    (tmp_path / "home/tfkd-env/bin/activate").write_text("")
    (tmp_path / "home/.ray").mkdir()
    (tmp_path / "home/.ray/auth_token").write_text("x")
    (tmp_path / "home/.ray/auth_token").chmod(0o644)
    fake(tools, "python", "")
    fake(tools, "scontrol", "printf 'n1\\nn2\\n'")
    fake(tools, "ray", "")
    fake(tools, "srun", 'echo "$RAY_AUTH_MODE" >> ' + f"{tools}/called")
    env = {"HOME": str(tmp_path / "home"), "USER": "me", "PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]",
           "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "4"}  # fmt: skip
    script = ["bash", str(ROOT / "clusters/slurm.sh"), "tfkd", "tune", "mine.yaml"]
    run = subprocess.run(script, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    called = (tools / "called").read_text()
    assert "ray symmetric-run --address n1:20077 --min-nodes 2" in called
    assert "--ntasks-per-node=1 --cpus-per-task=32 --gpus-per-task=4 " in called
    assert "-- tfkd tune mine.yaml --storage /shared/me/tfkd_results\ntoken\n" in called
    for words in ("tune mine.yaml --storage /mnt/mine", "resume /mnt/e"):
        subprocess.run([*script[:2], "tfkd", *words.split()], env=env, check=True)
        assert f"-- tfkd {words}\ntoken\n" in (tools / "called").read_text()
    assert stat.S_IMODE((tmp_path / "home/.ray/auth_token").stat().st_mode) == 0o600


# --- jobs


def test_a_job_gets_code_and_no_data_keys_or_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
    here, there = tmp_path / "here", tmp_path / "there"
    kept = {"mine.yaml", "my_nets.py", "sub/more.py", "setup.sh", ".rayignore"}
    left = {
        ".env", ".env.local", "id_rsa", "my.pem", "server.key", "aws_credentials.json", ".ssh/config", ".aws/config",
        "data/x.bin", "tfkd_results/one/experiment.yaml", "w.safetensors", "w.pt", "archive.tar.gz", ".git/HEAD",
        ".venv/bin/python", "__pycache__/x.pyc", "big.bin", "own/x.py", "renamed", "notes",
    }  # fmt: skip
    for name in kept | left:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    (here / ".rayignore").write_text("# mine\n*.bin\n/own/\n")
    (here / "renamed").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (here / "notes").write_text("a-token\n")
    (here / "link").symlink_to(tmp_path)
    (tmp_path / "elsewhere.yaml").write_text("x")
    there.mkdir()
    assert stage(here, there, here / "sub/more.py") == "sub/more.py"
    found = {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()}
    assert {p for p in found if not p.startswith("tfkd_ray/")} == kept
    assert {"tfkd_ray/cli/main.py", "tfkd_ray/launch/kuberay-schema.json"} <= found and not [
        p for p in found if p.endswith(".pyc")
    ]
    assert (
        stage(here, there, tmp_path / "elsewhere.yaml") == "elsewhere.yaml"
        and (there / "elsewhere.yaml").exists()
    )


def test_a_large_working_directory_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with (tmp_path / "here/film.mp4").open("wb") as file:
        file.truncate(150 * 10**6)
    with pytest.raises(
        ConfigError,
        match=r"150 MB exceed the limit of 100 MB: film.mp4 \(150 MB\); list what is not code in .rayignore",
    ):
        stage(tmp_path / "here", tmp_path / "there")


@pytest.mark.parametrize(
    "content, sentence", [(b"caf\xe9", "not a text file in UTF-8"), (None, "is a directory")]
)
def test_a_list_of_what_is_left_out_that_cannot_be_read_is_a_sentence(
    content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    """Ignoring it would send what its owner has left out."""
    path = tmp_path / "here/.rayignore"
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"rayignore.*\n? *{sentence}"):
        stage(tmp_path / "here", tmp_path / "there")
    assert not (tmp_path / "there").exists()


class Head(http.server.BaseHTTPRequestHandler):
    """A head that requires the token `right` and reports another Ray version."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        code = 200 if given == "Bearer right" else 401 if given is None else 403
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": "2.59.1"}).encode() if code == 200 else b"no")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Head)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "mine.yaml").write_text("objective: ce\nstudent: {name: mlp, hidden: [8]}\n")
    return tmp_path


@pytest.mark.parametrize(
    "token, sentence",
    [
        (
            None,
            "requires a token, and there is none here; copy the head's ~/.ray/auth_token here (mode 600)",
        ),
        ("wrong", "rejects the token that is here: it is another cluster's"),
        ("right", "Ray 2.59.1 runs on the cluster at http://127.0.0.1:"),
    ],
)
def test_a_job_that_the_cluster_would_refuse_is_told_why(
    here: Path, capsys: pytest.CaptureFixture[str], head: str, token: str | None, sentence: str
) -> None:
    if token:
        (here / "token").write_text(token)
    assert main(["tune", "mine.yaml", "--address", head, "--storage", "/mnt/x"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_head_that_does_not_answer_is_given_up_in_time(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jobs.ask.__defaults__ == (10,)
    monkeypatch.setattr(jobs.ask, "__defaults__", (2,))
    with socket.socket() as silent:  # accepts the connection, but never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        assert main(["tune", "mine.yaml", "--address", address, "--storage", "/mnt/x"]) == 1
        assert 1.5 < time.monotonic() - started < 12
    assert f"no Ray head answers at {address} within 2 s" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["", "http://"])
@pytest.mark.parametrize("verb", ["tune", "doctor", "confirm"])
def test_where_nobody_listens_it_is_a_failure_however_the_head_is_named(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    kind: str,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    words = {"tune": ["mine.yaml"], "doctor": [], "confirm": ["digits_arms", "--preset", "smoke"]}[
        verb
    ]
    assert (
        main([verb, *words, "--address", f"{kind}127.0.0.1:9", "--storage", str(here / "s")]) == 1
    )
    err = capsys.readouterr().err
    assert f"no Ray head answers at {kind}127.0.0.1:9 within 10 s" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--cluster", "aws-gpu", "--address", "auto"], "--cluster and --address: one of them says where the sweep runs"),
        (["--detach"], "--detach: needs --cluster FILE or --address http://..."),
        (["--address", "ray://x:10001"], "--address: auto, HOST:PORT or http://HOST:PORT (which submits a job), got 'ray://x:10001'"),
        (["--address", "nonsense"], "--address (or RAY_ADDRESS): auto, HOST:PORT or http://HOST:PORT (a job), got 'nonsense'"),
        (["--address", "http://127.0.0.1:9"], "--storage: required with --address http://..."),
        (["--address", "http://127.0.0.1:9", "--storage", "x"], "--storage: an absolute path that all nodes of the cluster can reach, got x"),
        (["--cluster", "mine.yaml"], "is a search space or an arms file, not a cluster file"),
        (["--cluster", "aws-gpu", "--name", "a/b"], "--name a/b: a plain name without slashes"),
        (["--cluster", "aws-gpu", "--study-storage", "postgresql://me:pw@db/x"], "the dashboard shows a job's command"),
        (["--cluster", "aws-gpu", "cpus_per_worker=500"], "room for 0 of them"),
    ],
)  # fmt: skip
def test_where_a_sweep_runs_is_checked_before_anything_is_sent(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    sentence: str,
) -> None:
    monkeypatch.setattr(
        "ray.is_initialized", lambda: False
    )  # another test in this process may have connected
    assert main(["tune", "mine.yaml", *argv]) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err
    assert {p.name for p in here.iterdir()} == {"mine.yaml"}


def verbs(
    parser: argparse.ArgumentParser, *before: str
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Yield every verb of a parser, including sub-verbs."""
    subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in subs:
        for name, sub in action.choices.items():
            yield from verbs(sub, *before, name)
    if not subs:
        yield before, parser


def given(action: argparse.Action, *, joined: bool = False) -> list[str]:
    """Return words that set an option, or a positional argument, to an unusual value."""
    if action.nargs == 0:
        return [action.option_strings[-1]]
    number = action.type is not None and action.type.__name__ in (
        "_count",
        "_seeds",
        "int",
        "float",
    )  # type: ignore[union-attr]
    value = f"/there/{action.dest}.yaml"
    if action.choices:
        value = list(action.choices)[-1]
    if number:
        value = "7"
    if action.dest == "overrides":
        return ["optim.lr=1", f"student={value}"]
    if not action.option_strings:
        return [value]
    option = action.option_strings[-1]
    return [f"{option}={value}"] if joined else [option, value]


PLACED = {
    words: sub for words, sub in verbs(_parser()) if any(a.dest == "cluster" for a in sub._actions)
}
FILES = {"tune": "file", "resume": "space", "confirm": "file", "train": "file", "doctor": "space"}


@pytest.mark.slow
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("verb", PLACED, ids="-".join)
def test_a_job_gets_every_option_of_its_verb_but_those_that_place_it(
    verb: tuple[str, ...], joined: bool
) -> None:
    actions = [a for a in PLACED[verb]._actions if a.dest != "help"]
    options = [a for a in actions if a.option_strings and a.dest not in PLACES]
    positional = [word for a in actions if not a.option_strings for word in given(a)]
    storage = next((a for a in options if a.dest == "storage"), None)
    for chosen in [options, *([option] for option in options)]:
        words = [*verb, *positional[:1], "--cluster", "/there/file.yaml"]
        words += [word for a in chosen for word in given(a, joined=joined)]
        words += ["--detach"] if verb[0] != "doctor" else ["--address=auto"]
        words += positional[1:]
        args = _parsed_args(words)
        place = "/mnt/x" if storage in chosen and storage is not None else None
        sent = job_words(args, sent=FILES[verb[-1]], storage=place)
        asked, got = vars(args), vars(_parsed_args(sent))
        expected = {k: v for k, v in asked.items() if k not in (*PLACES, "words", "parsed", "run")}
        expected |= {"storage": Path("/mnt/x")} if place else {}
        expected |= {FILES[verb[-1]]: SENT} if asked[FILES[verb[-1]]] is not None else {}
        assert {k: got[k] for k in expected} == expected
        assert not [got[name] for name in PLACES if got.get(name)]


@pytest.mark.parametrize("words", [["tune", "1", "--num-samples", "1"], ["tune", "tune", "--name=tune"],
                                   ["tune", "--name", "x.yaml", "x.yaml"], ["tune", "a=x.yaml", "--detach", "a=x.yaml"],
                                   ["resume", "/x", "--space=/x", "--det"]])  # fmt: skip
def test_the_file_that_is_sent_is_found_among_words_that_are_like_it(words: list[str]) -> None:
    args = _parsed_args(words)
    name = FILES[words[0]]
    found = _parsed_args(job_words(args, sent=name))
    same = [k for k in vars(args) if k not in (name, *PLACES, "words", "parsed", "run")]
    assert getattr(found, name) == SENT and all(getattr(found, k) == getattr(args, k) for k in same)


def test_what_a_resume_is_asked_for_reaches_the_cluster(
    here: Path, tools: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake(tools, "sbatch", "")
    asked = [
        "--space",
        "mine.yaml",
        "--study-storage",
        "sqlite:////x/y.db",
        "--time-budget",
        "1234567.5",
    ]
    assert main(["resume", "/mnt/e", "--cluster", "slurm", *asked, "--retry-failed"]) == 0
    called = (tools / "called").read_text()
    assert (
        "tfkd resume /mnt/e --space" in called
        and "mine.yaml --study-storage sqlite:////x/y.db" in called
    )
    assert "--time-budget 1234567.5 --retry-failed\n" in called
    for verb in (["resume", "/mnt/e", "--study-storage"], ["tune", "mine.yaml", "--study-storage"]):
        assert main([*verb, "postgresql://me:pw@db/x", "--cluster", "slurm"]) == 2
        assert "the dashboard shows a job's command" in capfd.readouterr().err
    assert main(["tune", "mine.yaml", "--prior", "old", "--cluster", "slurm"]) == 2
    assert (
        "--prior: an absolute path that the cluster can reach, or a URL, got old"
        in capfd.readouterr().err.replace("\n  ", " ")
    )


def test_a_job_from_a_machine_with_other_versions_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tfkd_ray.launch.jobs import versions_here

    monkeypatch.setenv("TFKD_SUBMITTED_FROM", json.dumps({**versions_here(), "torch": "2.13.0"}))
    assert main(["tune", "mine.yaml"]) == 2
    err = capsys.readouterr().err
    assert "other versions than the cluster (torch 2.13.0 there and " in err


@pytest.mark.parametrize(
    "token, reason, sentence",
    [
        (
            "x",
            "Can't find a `node_ip_address.json` file",
            "this machine is no node of it: submit a job instead",
        ),
        (
            "x",
            "Version mismatch: the cluster has Ray 2.59",
            "cannot join the Ray cluster at a:1: Version mismatch",
        ),
    ],
)
def test_why_a_cluster_could_not_be_joined(
    here: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, reason: str, sentence: str
) -> None:
    from tfkd_ray.run.connect import _cannot_join

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    if token:
        (here / "token").write_text(token)
    assert sentence in _cannot_join("a:1", reason)
