"""Facts about a cluster's nodes, collected by a task on each: versions, shared memory, storage."""

import importlib.metadata
import platform
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tfkd_ray.learn.config import KIND
from tfkd_ray.learn.gpu import GpuLook, look_at_gpu
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import write_text
from tfkd_ray.store.experiment import read_text
from tfkd_ray.store.storage import Directory, Mirror, Storage

NODE_S = 30
"""Maximum time for a node to answer."""
GPU_SHARE = 0.001
"""Share of a GPU that a look at it takes: it must not wait for one that is free."""


@dataclass
class Node:
    """The facts about a node that a task on it found."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    shm: int = 0
    """Size of its shared memory in bytes."""
    object_store: float = 0
    """Size of Ray's object store there in bytes."""
    socket: int = 0
    """Length of the longest path of Ray's sockets there in bytes."""
    storage: str | None = None
    """Problem with the storage on that node; None: no problem, or not checked."""
    silent: str | None = None
    """Reason why it did not answer; None: it did."""


class Mark:
    """A folder in the storage with a random word, which nodes read and answer."""

    def __init__(self, storage: Path) -> None:
        self.word = secrets.token_hex(8)
        self.folder = storage / f".tfkd-doctor-{self.word}"
        self._made = [p for p in (storage, *storage.parents) if not p.exists()]
        self.folder.mkdir(parents=True)
        write_text(self.folder / "driver", self.word)

    def answered(self, node: str) -> bool:
        """Return True if this machine sees a node's answer."""
        try:
            return read_text(self.folder / node) == self.word
        except (OSError, ValueError):
            return False

    def remove(self) -> None:
        """Remove the folder and its files from the storage."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._made:
            path.rmdir()


def visit(storage: Storage | None) -> list[Node]:
    """Return the facts about every living node, collected by parallel tasks."""
    mirror = storage if isinstance(storage, Mirror) else None
    try:
        mark = Mark(storage.folder) if isinstance(storage, Directory) else None
    except OSError:  # reported by the code that uses the storage
        mark = None
    nodes, tasks = [], {}
    for about in ray.nodes():
        if not about["Alive"]:
            continue
        sockets = (about.get("RayletSocketName", ""), about.get("ObjectStoreSocketName", ""))
        longest = max(len(name.removeprefix("unix:").encode()) for name in sockets)
        memory = float(about["Resources"].get("object_store_memory", 0))
        node = Node(
            f"{about['NodeManagerAddress']} ({about['NodeID'][:8]})",
            object_store=memory,
            socket=longest,
        )
        pinned = NodeAffinitySchedulingStrategy(about["NodeID"], soft=False)
        task = ray.remote(_look).options(num_cpus=0, scheduling_strategy=pinned, max_retries=0)
        nodes.append(node)
        tasks[
            task.remote(mark and str(mark.folder), mark and mark.word, about["NodeID"], mirror)
        ] = node
    done, late = (
        ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_S) if tasks else ([], [])
    )
    for task in late:
        tasks[task].silent = f"does not answer within {NODE_S} s; check that its Ray runs"
        ray.cancel(task, force=True)
    for task in done:
        _fill(tasks[task], task, mark)
    if mark is not None:
        mark.remove()
    return nodes


def _fill(node: Node, task: Any, mark: Mark | None) -> None:
    try:
        found = ray.get(task)
    except ray.exceptions.RayError as error:
        node.silent = (
            f"cannot run a task: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"
        )
        return
    node.versions, node.shm, node.storage = found["versions"], found["shm"], found["storage"]
    if mark is not None and node.storage is None and not mark.answered(found["node"]):
        node.storage = "writes files that this machine does not see"


def _look(folder: str | None, word: str | None, node: str, mirror: Mirror | None) -> dict[str, Any]:
    """Collect the facts on a node: read the driver's word from the storage and write an answer."""
    wrong = None if mirror is None else mirror.trouble()
    if folder is not None and word is not None:
        try:
            if read_text(Path(folder) / "driver") == word:
                write_text(Path(folder) / node, word)
            else:
                wrong = "holds other files there"
        except ValueError:
            wrong = "holds other files there"
        except OSError as error:
            wrong = f"cannot use it ({error.strerror})"
    return {"versions": versions_of_node(), "shm": shared_memory(), "storage": wrong, "node": node}


def gpu_looks() -> dict[str, GpuLook]:
    """Return what is found of the GPUs of the nodes, one of each kind, by the nodes' names.

    Nodes are of one kind if they declare the same GPUs. A node whose GPUs are all in use is left
    out: what uses them has found them good.
    """
    kinds: dict[tuple[Any, ...], Any] = {}
    for about in ray.nodes():
        declared = about["Resources"]
        if about["Alive"] and declared.get("GPU"):
            named = sorted(name for name in declared if name.startswith(KIND))
            kinds.setdefault((declared["GPU"], *named), about)
    tasks = {}
    for about in kinds.values():
        pinned = NodeAffinitySchedulingStrategy(about["NodeID"], soft=False)
        task = ray.remote(look_at_gpu).options(
            num_cpus=0, num_gpus=GPU_SHARE, scheduling_strategy=pinned, max_retries=0
        )
        tasks[task.remote()] = f"{about['NodeManagerAddress']} ({about['NodeID'][:8]})"
    done, late = (
        ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_S) if tasks else ([], [])
    )
    for task in late:
        ray.cancel(task, force=True)
    return {tasks[task]: _answer(task) for task in done}


def _answer(task: Any) -> GpuLook:
    try:
        found: GpuLook = ray.get(task)
    except ray.exceptions.RayError as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return GpuLook(f"cannot run a task: {last}", mps=True)
    return found


def check_gpus() -> None:
    """Raise if the GPUs of a node cannot be used: all trials there would fail, at once."""
    wrong = [f"{name}: {look.trouble}" for name, look in gpu_looks().items() if look.trouble]
    if wrong:
        raise ConfigError(wrong, "GPU")


def versions_of_node() -> dict[str, str]:
    """Return the versions that must be equal on all nodes for results to be equal."""
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in ("ray", "torch")}
    return {**found, "python": platform.python_version()}


def shared_memory() -> int:
    """Return the size of this machine's shared memory in bytes, used or free."""
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0


def unshared(node: Node, storage: Storage) -> str:
    """Describe a node's problem with the storage, and how to solve it."""
    if isinstance(storage, Mirror):
        return f"{node.name}: {storage}: {node.storage}"
    return (
        f"{node.name} {node.storage}: {storage} must be one directory for all nodes (NFS, for example); mount it "
        "there, or choose another place: --storage DIR"
    )


def check_shared(storage: Storage) -> None:
    """Raise if a node of the cluster cannot see the storage: a trial there would lose its files.

    For object storage each node has its own mirror, so every node must reach the bucket.
    """
    if sum(node["Alive"] for node in ray.nodes()) > 1:
        wrong = [unshared(node, storage) for node in visit(storage) if node.storage is not None]
        if wrong:
            raise ConfigError(wrong, "storage")
