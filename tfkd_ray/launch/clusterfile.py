"""Cluster files: reads them, and finds mistakes that Ray, Kubernetes and Slurm would find too late.

There are three kinds: Ray's own (`provider:`), KubeRay's (`apiVersion:`, RayCluster or RayJob) and
a Slurm batch script (`#SBATCH`). Ray's and KubeRay's own schemas are checked first; the rules here
cover what these schemas miss. A rule is a function that yields sentences; `check` runs those of the
file's kind.

A file also names the storage of experiments: `metadata: {tfkd: {storage: ...}}` for Ray,
`metadata: {annotations: {tfkd/storage: ...}}` for KubeRay, `TFKD_RESULTS=...` for Slurm.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tfkd_ray.settings.errors import ConfigError, Sentences, did_you_mean, dotted
from tfkd_ray.settings.files import expanded, kind_of
from tfkd_ray.settings.yaml import (
    Tree,
    Values,
    bytes_of,
    find_file,
    parse_documents,
    text_of,
    value_at,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ClusterFile:
    """The content of a cluster file; only its kind has been checked."""

    path: Path
    kind: Literal["ray", "kuberay", "slurm"]
    tree: Tree
    """KubeRay's RayCluster or RayJob; empty for Slurm."""
    text: str
    others: tuple[Tree, ...] = ()
    """The other documents of KubeRay's file."""

    @property
    def name(self) -> str:
        """Return the cluster's name."""
        if self.kind == "ray":
            return str(self.tree.get("cluster_name"))
        if self.kind == "kuberay":
            return str(self.tree["metadata"]["name"])
        found = re.search(r"^#SBATCH\s+(?:--job-name[=\s]|-J\s*)(\S+)", self.text, re.M)
        return found[1] if found else self.path.name

    @property
    def provider(self) -> str:
        """Return the provider of its machines: local, aws, gcp, azure; kuberay; slurm."""
        return str(self.tree["provider"].get("type")) if self.kind == "ray" else self.kind

    @property
    def here(self) -> bool:
        """Return True if the cluster is this machine alone, which needs no ssh."""
        provider = below(self.tree, "provider")
        return (
            self.provider == "local"
            and provider.get("head_ip") in LOOPBACK
            and not provider.get("worker_ips")
        )

    @property
    def storage(self) -> str | None:
        """Return the storage of experiments on the cluster."""
        if self.kind == "slurm":
            found = re.search(r"^TFKD_RESULTS=[\"']?([^\s\"'#]+)", self.text, re.M)
            return found[1] if found else None
        place = ("tfkd", "storage") if self.kind == "ray" else ("annotations", "tfkd/storage")
        found = value_at(self.tree, ("metadata", *place))
        return None if found is None else str(found)

    @property
    def head(self) -> str:
        """Return the commands that start Ray on the head, as one text."""
        return "\n".join(map(str, self.tree.get("head_start_ray_commands") or []))

    @property
    def workers(self) -> str:
        """Return the commands that start Ray on a worker, as one text."""
        return "\n".join(map(str, self.tree.get("worker_start_ray_commands") or []))

    @property
    def dashboard_port(self) -> int:
        """Return the dashboard's port on the head's loopback."""
        return int(option(self.head, "dashboard-port") or 8265)

    @property
    def port(self) -> int:
        """Return the head's port."""
        return int(option(self.head, "port") or 6379)

    @property
    def cluster(self) -> Tree:
        """Return KubeRay's specification of the cluster itself."""
        spec = self.tree["spec"]
        found: Tree = below(spec, "rayClusterSpec") if self.tree["kind"] == "RayJob" else spec
        return found


def below(tree: Values, key: str) -> Tree:
    """Return the settings below a key; empty if there are none."""
    return tree.get(key) or {}


def option(command: str, name: str) -> str | None:
    """Return the value of a `--name=value` in a shell command."""
    found = re.search(rf"--{name}[=\s]+['\"]?([^\s'\"]+)", command)
    return found[1] if found else None


def load_cluster(path: str | Path) -> ClusterFile:
    """Read a cluster file or a shipped one by name; raise ConfigError if it is not one."""
    found = find_file(path, "clusters")
    if not found.exists() and found.suffix in ("", ".sh"):
        found = find_file(path, "clusters", suffix=".sh")
    if found.is_file() and found.suffix == ".sh":
        return _slurm_script(found)
    if found.is_file() and found.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"a cluster file is a .yaml (Ray, KubeRay) or a .sh (Slurm), got {found.suffix!r}",
            found,
        )
    text = text_of(found)
    if not text.strip():
        raise ConfigError("is empty; begin with one from clusters/", found)
    return _cluster_of(found, text, parse_documents(text, found))


def _slurm_script(found: Path) -> ClusterFile:
    text = bytes_of(found).decode("utf-8", errors="replace")
    if not re.search(r"^#SBATCH\s", text, re.M):
        raise ConfigError("not a Slurm script: there is no line that begins with #SBATCH", found)
    return ClusterFile(found, "slurm", {}, text)


def _cluster_of(found: Path, text: str, documents: list[Any]) -> ClusterFile:
    """Return the cluster that YAML documents describe, Ray's own or KubeRay's."""
    if not documents or not all(isinstance(tree, dict) for tree in documents):
        raise ConfigError("every document in it must be settings (key: value)", found)
    if "provider" in documents[0] and len(documents) == 1:
        if not isinstance(documents[0]["provider"], dict):
            raise ConfigError(
                f"provider: needs settings below it (type: aws), got {documents[0]['provider']!r}",
                found,
            )
        return ClusterFile(found, "ray", documents[0], text)
    ours = [d for d in documents if d.get("kind") in ("RayCluster", "RayJob")]
    if len(ours) == 1 and "apiVersion" in ours[0]:
        return ClusterFile(
            found, "kuberay", ours[0], text, tuple(d for d in documents if d is not ours[0])
        )
    if "objective" in documents[0] or "arms" in documents[0]:
        raise ConfigError(
            "is a search space or an arms file, not a cluster file; see the files in clusters/",
            found,
        )
    raise ConfigError(
        "not a cluster file: it has neither 'provider:' (Ray's own) nor one document of kind RayCluster or RayJob "
        "(KubeRay's); begin with one from clusters/",
        found,
    )


# --- shared by all kinds --------------------------------------------------------------------------


def schema_problems(tree: Any, schema: Tree) -> Sentences:
    """Yield the errors of a JSON schema, one sentence each."""
    from jsonschema import Draft7Validator

    for error in sorted(
        Draft7Validator(schema).iter_errors(tree), key=lambda e: list(map(str, e.absolute_path))
    ):
        path = dotted(error.absolute_path)
        value = error.instance
        if error.validator == "additionalProperties" and isinstance(value, dict):
            known = error.schema.get("properties", {})
            for key in sorted(set(value) - set(known)):
                yield f"{dotted([*error.absolute_path, key])}: no such field; {did_you_mean(key, known)}"
        elif error.validator == "required":
            missing = [key for key in error.validator_value if key not in value]
            for key in missing:
                yield f"{dotted([*error.absolute_path, key])}: required, and not given"
        elif error.validator == "enum":
            yield f"{path}: no such value {value!r}; {did_you_mean(str(value), map(str, error.validator_value))}"
        elif error.validator == "type":
            yield f"{path or '(the file)'}: must be of type {error.validator_value}, got {value!r}"
        else:
            yield f"{path or '(the file)'}: {error.message}"


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind: their number, and the resources of each."""

    name: str
    least: int
    most: int
    resources: dict[str, float]
    """By Ray's names, including kinds of GPUs if the file names them."""


_UNITS = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
          **{f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)}}  # fmt: skip
"""Suffixes of a Kubernetes quantity."""


def quantity(value: Any) -> float | None:
    """Return a Kubernetes quantity (4, "4", "7500m", "1k", "2e3") as a number, or None."""
    found = re.fullmatch(
        r"([0-9]+\.?[0-9]*|\.[0-9]+)(?:([numkMGTPE]|[KMGTPE]i)?|[eE]([-+]?[0-9]{1,2}))", str(value)
    )
    if found is None or isinstance(value, bool):
        return None
    return float(found[1]) * (10.0 ** int(found[3]) if found[3] else _UNITS[found[2] or ""])


def amount_problems(place: str, group: Tree) -> Sentences:
    """Yield CPUs and GPUs that are not amounts for Kubernetes or `ray start`."""
    container = below(group["template"]["spec"]["containers"][0], "resources")
    for part in ("requests", "limits"):
        for kind, value in (container.get(part) or {}).items():
            field = f"{place}.template.spec.containers.0.resources.{part}.{dotted([kind])}"
            amount = quantity(value)
            if amount is None:
                yield f"{field}: must be a Kubernetes quantity (2, 500m, 8Gi), got {value!r}"
            elif kind.endswith("/gpu") and amount != int(amount):
                yield f"{field}: GPUs are whole, got {value!r}"
    for name in ("num-cpus", "num-gpus"):
        value = below(group, "rayStartParams").get(name, "0")
        if not re.fullmatch(r"[0-9]{1,9}", str(value)):
            yield f'{place}.rayStartParams.{name}: `ray start` takes a whole number ("4"), got {value!r}'


def name_problems(file: ClusterFile) -> Sentences:
    """Yield problems with the name, which becomes part of machines' and files' names."""
    name = file.tree["cluster_name"]
    allowed, said = r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", "letters, digits, - and _"
    if file.provider == "gcp":
        allowed, said = r"[a-z][a-z0-9_-]{0,62}", "small letters, digits, - and _, a letter first"
    if not re.fullmatch(allowed, name):
        yield f"cluster_name: must be of {said}, at most 63, got {name!r}"


def copy_problems(file: ClusterFile) -> Sentences:
    """Yield files to copy that are missing here; the token is created when the cluster starts."""
    for there, here in below(file.tree, "file_mounts").items():
        if not there:
            yield f"file_mounts: {here} needs a path on the nodes, got {there!r}"
        elif not str(there).endswith("auth_token"):
            yield from (f"file_mounts.{there}: {problem}" for problem in _no_copy(here))


def _no_copy(here: str) -> Sentences:
    """Yield why a file or folder cannot be copied. Ray reads all of it, and waits for pipes."""
    try:
        path = expanded(here)
    except ConfigError as error:
        yield from error.problems
        return
    if not path.exists():
        yield f"{here} does not exist (searched from {Path.cwd()})"
        return
    below = (Path(where) / name for where, _, names in os.walk(path) for name in names)
    for inside in (path, *below):
        kind = kind_of(inside)
        if kind not in (None, "a directory"):
            yield f"{inside} is {kind}; only files and directories are copied"
            return


def versions_in(texts: Iterable[str]) -> dict[str, set[str]]:
    """Return exact versions of Ray, torch and Python that images and shell commands name."""
    found: dict[str, set[str]] = {"ray": set(), "torch": set(), "python": set()}
    for text in texts:
        found["ray"] |= set(re.findall(r"\bray(?:\[[^\]]*\])?==([\w.]+)", text))
        found["ray"] |= set(re.findall(r"rayproject/ray(?:-ml)?:(\d[\d.]*\d)", text))
        found["ray"] |= set(re.findall(r":[\w.-]*-ray(\d[\d.]*\d)", text))
        found["torch"] |= set(re.findall(r"\btorch==([\w.+]+)", text))
        found["torch"] |= set(re.findall(r":[\w.-]*-torch(\d[\d.]*\d)", text))
        found["python"] |= set(re.findall(r"\bpython(3\.\d+)\b", text))
        found["python"] |= {f"3.{minor}" for minor in re.findall(r":[\w.-]*-py3(\d+)", text)}
    return found
