"""`tfkd doctor`: find problems that make a sweep slow, unsafe or stuck, here and on every node.

A check yields its findings, one line each, with the way to solve a problem. A task on each node
collects the facts about it (`run/nodes.py`). To add a check, write a function that yields `Found`,
and add a line to `examine`.
"""

import importlib.metadata
import os
import stat
import textwrap
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import ray

from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.gpu import GpuLook
from tfkd_ray.run.auth import token, token_file
from tfkd_ray.run.connect import (
    check_ray,
    check_room,
    dashboard,
    leaked_groups,
    other_clusters,
    ray_temp_dir,
    remove_group,
)
from tfkd_ray.run.nodes import (
    Mark,
    Node,
    gpu_looks,
    shared_memory,
    unshared,
    versions_of_node,
    visit,
)
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.store.storage import Mirror, Storage

SOCKET_BYTES = 107
"""Maximum length of a Unix socket's path."""
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""Suffix that Ray adds to its temporary directory."""
SHM_OF_MEMORY = 0.3
"""Default share of a node's memory for Ray's object store."""


@dataclass(frozen=True)
class Found:
    """A finding of a check."""

    level: Literal["ok", "warning", "problem"]
    what: str
    text: str

    def line(self, width: int = 80) -> str:
        """Format the finding for a terminal."""
        return textwrap.fill(f"{self.level:<8} {self.what}: {self.text}", width, subsequent_indent=" " * 9,
                             break_on_hyphens=False, break_long_words=False)  # fmt: skip


def doctor(
    storage: Storage | None,
    shape: TrainConfig | None,
    *,
    reap: bool = False,
    connected: bool = True,
) -> list[Found]:
    """Return all findings, in the order of the checks.

    Args:
        storage: directory that all nodes should see, or object storage. None: not checked.
        shape: a trial that the cluster should have room for. None: not checked.
        reap: remove leaked placement groups.
        connected: check the cluster to which this process is connected; else, this machine alone.
    """
    return list(examine(storage, shape, reap=reap, connected=connected))


def examine(
    storage: Storage | None, shape: TrainConfig | None, *, reap: bool, connected: bool
) -> Iterator[Found]:
    """Run the checks one after another."""
    yield from check_installed()
    yield from check_token()
    yield from check_others(ray.get_runtime_context().gcs_address if connected else None)
    if not connected:
        yield from check_sockets({"this machine": len(ray_temp_dir()) + len(LONGEST_SOCKET)})
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield from check_shared_memory({"this machine": (shared_memory(), memory * SHM_OF_MEMORY)})
        yield from check_storage_here(storage)
        return
    yield from check_asked()
    nodes = visit(storage)
    yield from check_nodes(nodes)
    there = [node for node in nodes if node.silent is None]
    yield from check_versions(there)
    yield from check_sockets({node.name: node.socket for node in there})
    yield from check_shared_memory({node.name: (node.shm, node.object_store) for node in there})
    yield from check_storage(storage, there)
    looks = gpu_looks()
    yield from check_gpus_of_nodes({name: look.trouble for name, look in looks.items()})
    yield from check_mps(looks, shape)
    yield from check_trials(shape)
    yield from check_groups(reap=reap)


# --- this machine ---------------------------------------------------------------------------------


def check_installed() -> Iterator[Found]:
    """Check that Ray has its `default` extra."""
    try:
        check_ray()
        yield Found(
            "ok", "ray", f"Ray {importlib.metadata.version('ray')} with its 'default' extra"
        )
    except ConfigError as error:
        yield Found("problem", "ray", str(error))


def check_token() -> Iterator[Found]:
    """Check that token mode is on, and that only its owner can read the token."""
    if (mode := os.environ.get("RAY_AUTH_MODE", "token")) != "token":
        yield Found(
            "problem",
            "token",
            f"RAY_AUTH_MODE={mode}: anyone who can reach the cluster can run code on it; unset it",
        )
        return
    path = token_file()
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield Found("ok", "token", "from RAY_AUTH_TOKEN")
    elif token() is None:
        yield Found("warning", "token",
            f"none yet ({path}); tfkd creates one when it starts a cluster; to join another cluster, copy its token to "
            "that path, mode 600")  # fmt: skip
    elif (bits := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        yield Found(
            "problem",
            "token",
            f"{path} can be read by other users (mode {bits:o}); chmod 600 {path}",
        )
    else:
        yield Found("ok", "token", f"{path}, mode {bits:o}")


def check_others(ours: str | None) -> Iterator[Found]:
    """Check that no other Ray cluster runs on this machine."""
    others = other_clusters(ours)
    if not others:
        yield Found("ok", "clusters", "no other Ray cluster runs on this machine")
        return
    listed = ", ".join(sorted(others))
    yield Found("warning", "clusters", f"{'others run' if ours else 'Ray runs'} on this machine: {listed}; name the "
                "one to use (--address HOST:PORT), and give each its own ports and temporary directory")  # fmt: skip


def check_sockets(lengths: dict[str, int]) -> Iterator[Found]:
    """Check that the paths of Ray's sockets are short enough."""
    place, longest = max(lengths.items(), key=lambda item: item[1], default=("", 0))
    if longest > SOCKET_BYTES:
        yield Found("problem", "sockets",
            f"{place}: the longest path of a Ray socket has {longest} bytes, and the limit is {SOCKET_BYTES}; set a "
            "shorter temporary directory: RAY_TMPDIR=/tmp/ray, or ray start --temp-dir=/tmp/ray")  # fmt: skip
    else:
        yield Found("ok", "sockets", f"paths of {longest} bytes, of at most {SOCKET_BYTES}")


def check_shared_memory(sizes: dict[str, tuple[int, float]]) -> Iterator[Found]:
    """Check that shared memory holds the object store; otherwise Ray uses slow files."""
    small = {place: size for place, size in sizes.items() if size[0] < size[1]}
    for place, (there, needed) in small.items():
        text = (
            f"{place}: /dev/shm has {_gb(there)}, but Ray's object store needs {_gb(needed)}, so it uses slow files; "
            f"in a container: --shm-size={_gb(needed * 1.1, 'g')}, or a smaller store: --object-store-memory"
        )
        yield Found("warning", "memory", text)
    if not small:
        yield Found(
            "ok",
            "memory",
            f"/dev/shm has {_gb(min((s for s, _ in sizes.values()), default=0))} or more",
        )


def check_storage_here(storage: Storage | None) -> Iterator[Found]:
    """Check that this machine can write to the storage."""
    if storage is not None:
        yield _no_storage(storage) or Found(
            "ok", "storage", f"{storage} can be written to from here"
        )


def _no_storage(storage: Storage) -> Found | None:
    """Return a problem with the storage on this machine, or None."""
    if isinstance(storage, Mirror):
        trouble = storage.trouble()
        return Found("problem", "storage", f"{storage}: {trouble}") if trouble else None
    try:
        Mark(storage.folder).remove()
    except OSError as error:
        return Found("problem", "storage", f"{storage} cannot be written to from here ({error.strerror}); choose "
                     "another place: --storage DIR")  # fmt: skip
    return None


# --- the nodes ------------------------------------------------------------------------------------


def _gb(size: float, unit: str = " GB") -> str:
    return f"{size / 1e9:.0f}{unit}" if size >= 10e9 else f"{size / 1e9:.2g}{unit}"


def check_nodes(nodes: Sequence[Node]) -> Iterator[Found]:
    """Check that all nodes answer."""
    silent = [node for node in nodes if node.silent is not None]
    for node in silent:
        yield Found("problem", "nodes", f"{node.name} {node.silent}")
    if not silent:
        yield Found("ok", "nodes", f"{len(nodes)} of {len(nodes)} ran a task")


def check_versions(nodes: Iterable[Node]) -> Iterator[Found]:
    """Check that all nodes and this machine have the same Ray, Python and torch."""
    kinds = defaultdict[str, list[str]](list)
    for name, versions in [
        ("here", versions_of_node()),
        *((node.name, node.versions) for node in nodes),
    ]:
        kinds[", ".join(f"{what} {version}" for what, version in versions.items())].append(name)
    if len(kinds) == 1:
        yield Found("ok", "versions", f"{next(iter(kinds))} on all")
        return
    listed = "; ".join(f"{text} on {', '.join(places)}" for text, places in kinds.items())
    yield Found(
        "problem",
        "versions",
        f"they differ, so results would differ: {listed}; install the same on all nodes",
    )


def check_asked() -> Iterator[Found]:
    """Check that the cluster requires its token."""
    address = dashboard()
    if not address:
        yield Found(
            "warning",
            "access",
            "no dashboard, so it is unknown whether the cluster requires a token",
        )
        return
    try:
        request = urllib.request.Request(f"http://{address}/api/version")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=10
        ).close()
    except urllib.error.HTTPError as error:
        refused = error.code in (401, 403)
        yield (
            Found("ok", "access", "refused without the token") if refused else _unclear(str(error))
        )
    except OSError as error:
        yield _unclear(str(getattr(error, "reason", None) or error))
    else:
        yield Found("problem", "access",
            "the cluster accepts anyone without a token; restart it with RAY_AUTH_MODE=token, as `tfkd cluster up` "
            "does")  # fmt: skip


def _unclear(reason: str) -> Found:
    return Found(
        "warning",
        "access",
        f"it is unknown from here whether the cluster requires a token ({reason})",
    )


def check_storage(storage: Storage | None, nodes: Sequence[Node]) -> Iterator[Found]:
    """Check that each node reads what this machine writes to the storage, and the reverse."""
    if storage is None:
        yield Found(
            "warning", "storage", "not checked; name the storage of experiments: --storage DIR"
        )
        return
    if (unwritable := _no_storage(storage)) is not None:
        yield unwritable
        return
    wrong = [node for node in nodes if node.storage is not None]
    yield from (Found("problem", "storage", unshared(node, storage)) for node in wrong)
    if not wrong:
        yield Found("ok", "storage", f"{storage} is one directory for {len(nodes)} nodes")


def check_gpus_of_nodes(looked_at: dict[str, str | None]) -> Iterator[Found]:
    """Check that torch multiplies on a GPU of each kind.

    Args:
        looked_at: what is wrong with the GPUs of nodes, by the nodes' names; None: nothing.
    """
    for name, trouble in looked_at.items():
        if trouble is not None:
            yield Found("problem", "gpu", f"{name}: {trouble}")
    if looked_at and not any(looked_at.values()):
        yield Found("ok", "gpu", f"torch multiplies on {len(looked_at)} of {len(looked_at)} kinds")


def check_mps(looks: dict[str, GpuLook], shape: TrainConfig | None) -> Iterator[Found]:
    """Check that NVIDIA MPS runs where trials share a GPU."""
    if shape is None or not 0 < shape.gpus_per_worker < 1:
        return
    for name, look in looks.items():
        if look.trouble is None and not look.mps:
            text = (
                f"{name}: NVIDIA MPS does not run, and trials of {shape.gpus_per_worker:g} GPU take turns on it; put "
                "before `ray start`: nvidia-cuda-mps-control -d"
            )
            yield Found("warning", "gpu", text)


def check_trials(shape: TrainConfig | None) -> Iterator[Found]:
    """Check that the cluster has room for a trial."""
    if shape is None:
        yield Found("warning", "trials", "room for them is not checked; name a space: --space FILE")
        return
    try:
        yield Found("ok", "trials", f"room for {check_room(shape)} at a time")
    except ConfigError as error:
        yield from (Found("problem", "trials", text) for text in error.problems)


def check_groups(*, reap: bool) -> Iterator[Found]:
    """Check that no placement group of an ended job still holds CPUs and GPUs."""
    groups = leaked_groups()
    if groups is None:
        yield Found("warning", "groups",
            "unknown, because Ray's State API does not respond; start Ray with its dashboard")  # fmt: skip
        return
    if not groups:
        yield Found("ok", "groups", "no placement group of an ended job is left")
        return
    held = defaultdict[str, float](float)
    for bundle in (bundle for group in groups for bundle in group.bundles):
        for kind, amount in bundle.items():
            held[kind] += amount
    listed = (
        " and ".join(f"{amount:g} {kind}" for kind, amount in sorted(held.items())) or "nothing"
    )
    if reap:
        for group in groups:
            remove_group(group.id)
        yield Found(
            "ok",
            "groups",
            f"removed {len(groups)} of ended jobs; {listed} are free again",
        )
    else:
        yield Found("problem", "groups",
            f"{len(groups)} of ended jobs hold {listed}; tfkd doctor --reap removes them")  # fmt: skip
