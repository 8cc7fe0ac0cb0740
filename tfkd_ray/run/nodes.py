"""The nodes of a cluster as a task on each finds them: versions, shared memory, and whether they see the storage."""

import importlib.metadata
import platform
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import write_text
from tfkd_ray.store.experiment import read_text
from tfkd_ray.store.storage import Directory, Mirror, Storage

NODE_S = 30
"""How long a node may take to answer."""


@dataclass
class Node:
    """A node as a task on it found it."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    shm: int = 0
    """Bytes of its shared memory."""
    object_store: float = 0
    """Bytes that Ray shares objects in there."""
    socket: int = 0
    """Bytes of the longest path of a socket of Ray's there."""
    storage: str | None = None
    """What is wrong with the storage seen from there; None: nothing, or it was not asked for."""
    silent: str | None = None
    """Why it did not answer; None: it did."""


class Mark:
    """A folder in the storage with a word in it, for nodes to read and to answer."""

    def __init__(self, storage: Path) -> None:
        self.word = secrets.token_hex(8)
        self.folder = storage / f".tfkd-doctor-{self.word}"
        self._made = [p for p in (storage, *storage.parents) if not p.exists()]
        self.folder.mkdir(parents=True)
        write_text(self.folder / "driver", self.word)

    def answered(self, node: str) -> bool:
        """Whether a node's answer is seen from here."""
        try:
            return read_text(self.folder / node) == self.word
        except (OSError, ValueError):
            return False

    def remove(self) -> None:
        """Leave the storage as it was."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._made:
            path.rmdir()


def visit(storage: Storage | None) -> list[Node]:
    """Every living node, by a task on each, all at once."""
    mirror = storage if isinstance(storage, Mirror) else None
    try:
        mark = Mark(storage.folder) if isinstance(storage, Directory) else None
    except OSError:  # told where it is used
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
        tasks[task].silent = f"does not answer within {NODE_S} s; is its Ray alive?"
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
        node.storage = "writes what is not seen from here"


def _look(folder: str | None, word: str | None, node: str, mirror: Mirror | None) -> dict[str, Any]:
    """Runs on a node: what is there. Reads what the driver wrote in the storage, and writes an answer."""
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


def versions_of_node() -> dict[str, str]:
    """Of what must be the same on all nodes, for numbers to be."""
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in ("ray", "torch")}
    return {**found, "python": platform.python_version()}


def shared_memory() -> int:
    """Bytes of it here, used or not."""
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0


def unshared(node: Node, storage: Storage) -> str:
    """What is wrong with the storage seen from a node, and the way out."""
    if isinstance(storage, Mirror):
        return f"{node.name}: {storage}: {node.storage}"
    return (
        f"{node.name} {node.storage}: {storage} must be one directory for all nodes (NFS, for example); mount it "
        "there, or choose another place: --storage DIR"
    )


def check_shared(storage: Storage) -> None:
    """Raise where a node of the cluster does not see the storage: a trial there would lose what it writes.

    Each node has its own mirror of a bucket, so there every node must reach the bucket.
    """
    if sum(node["Alive"] for node in ray.nodes()) > 1:
        wrong = [unshared(node, storage) for node in visit(storage) if node.storage is not None]
        if wrong:
            raise ConfigError(wrong, "storage")
