"""What is said of GPUs that torch cannot use: no CUDA, an old driver, another architecture, a broken one."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tfkd_ray.launch.doctor import check_gpus_of_nodes as of_doctor
from tfkd_ray.launch.doctor import check_mps
from tfkd_ray.learn import gpu
from tfkd_ray.learn.config import TrainConfig
from tfkd_ray.learn.gpu import GpuLook, gpu_trouble, has_code_for, look_at_gpu, why_no_gpu
from tfkd_ray.learn.loop import train
from tfkd_ray.run import callbacks, connect, group, nodes
from tfkd_ray.run.trial import resources_of
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.schema import validated

BUILT_FOR = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
"""Of torch 2.14.1+cu130."""
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver by "
    "downloading and installing a new version"
)


def raises(error: Exception) -> Callable[..., Any]:
    def called(*given: Any, **more: Any) -> Any:
        raise error

    return called


@pytest.mark.parametrize(
    "version, visible, error, said",
    [
        (None, None, None, "is built without CUDA; install a CUDA build on this node"),
        ("13.0", "", None, "CUDA_VISIBLE_DEVICES is empty, so this process got none"),
        ("13.0", None, RuntimeError(TOO_OLD), "is built for CUDA 13.0: The NVIDIA driver on your system is too old (found version 12080); update the driver (CUDA 13 needs 580 or later), or install a torch for its CUDA"),
        ("13.0", "0", RuntimeError("Found no NVIDIA driver on your system. Please check"), "is built for CUDA 13.0: Found no NVIDIA driver on your system"),
        ("13.0", "7", None, "the driver lists no device; run nvidia-smi on that node"),
    ],
)  # fmt: skip
def test_torch_sees_no_gpu_and_the_reason_is_said(
    version: str | None,
    visible: str | None,
    error: Exception | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "init", raises(error) if error else lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert why_no_gpu().endswith(said)
    run = validated(TrainConfig, {"objective": "ce", "student": "mlp", "gpus_per_worker": 1})
    with pytest.raises(RuntimeError, match="gpus_per_worker is 1, and torch sees no GPU here: "):
        next(train(run))


def test_this_machine_says_why_it_has_none() -> None:
    """By torch's own words, unless it has one."""
    if torch.cuda.is_available():
        assert gpu_trouble() is None
    else:
        assert (gpu_trouble() or "").startswith("torch sees no GPU: ")


@pytest.mark.parametrize(
    "capability, has",
    [((7, 0), False), ((7, 5), True), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 3), True),
     ((12, 1), True), ((13, 0), True), ((6, 1), False)],
)  # fmt: skip
def test_a_build_has_code_for_the_same_major_version_and_for_later_ones_by_its_ptx(
    capability: tuple[int, int], has: bool
) -> None:
    assert has_code_for(capability, BUILT_FOR) is has
    assert not has_code_for((9, 1), ["sm_90a"]) and has_code_for((9, 0), ["sm_90a"])


class Ones:
    """Stands for a matrix on a GPU, whose product with another one has this sum."""

    def __init__(self, total: float) -> None:
        self.total = total

    def __matmul__(self, other: "Ones") -> "Ones":
        return self

    def sum(self) -> "Ones":
        return self

    def item(self) -> float:
        return self.total


@pytest.mark.parametrize(
    "capability, ones, said",
    [
        ((9, 0), lambda *given, **more: Ones(64.0**3), None),
        ((7, 0), None, "Tesla V100 has compute capability 7.0, and torch"),
        ((9, 0), raises(RuntimeError("CUDA error: an illegal memory access\nmore")), "Tesla V100 cannot multiply: CUDA error: an illegal memory access"),
        ((9, 0), lambda *given, **more: Ones(7.0), "Tesla V100 multiplies wrongly: 7 in place of 262144; it may be broken"),
    ],
)  # fmt: skip
def test_a_gpu_is_tried_with_one_product(
    capability: tuple[int, int], ones: Any, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT_FOR)
    monkeypatch.setattr(gpu.torch, "ones", ones)
    found = gpu_trouble()
    assert found is None if said is None else (found or "").startswith(said)
    if capability < (7, 5):  # `tfkd train` looks at no node before
        run = validated(TrainConfig, {"objective": "ce", "student": "mlp", "gpus_per_worker": 1})
        with pytest.raises(RuntimeError, match=rf"gpus_per_worker is 1, and {said}"):
            next(train(run))


def test_a_sweep_does_not_begin_on_gpus_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at = {"10.0.0.1 (aa)": None, "10.0.0.2 (bb)": "torch sees no GPU: no driver"}
    looks = {name: GpuLook(trouble, mps=True) for name, trouble in looked_at.items()}
    monkeypatch.setattr(nodes, "gpu_looks", lambda: looks)
    with pytest.raises(ConfigError, match=r"10\.0\.0\.2 \(bb\): torch sees no GPU: no driver"):
        nodes.check_gpus()
    (problem,) = of_doctor(looked_at)
    assert (problem.level, problem.what) == ("problem", "gpu")
    (fine,) = of_doctor({"10.0.0.1 (aa)": None})
    assert fine.level == "ok" and not [*of_doctor({})]


def test_one_node_of_each_kind_is_looked_at_and_a_busy_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def node(name: str, **declared: float) -> dict[str, Any]:
        return {
            "NodeID": name * 28,
            "NodeManagerAddress": name,
            "Alive": True,
            "Resources": declared,
        }

    kind = {"accelerator_type:L4": 1.0}
    there = [node("1d", CPU=4), node("aa", GPU=4), node("bb", GPU=4), node("cc", GPU=4, **kind)]
    asked: list[dict[str, Any]] = []

    class Task:
        def options(self, **settings: Any) -> "Task":
            asked.append(settings)
            return self

        def remote(self) -> str:
            return str(asked[-1]["scheduling_strategy"].node_id[:2])

    monkeypatch.setattr(nodes.ray, "nodes", lambda: there)
    monkeypatch.setattr(nodes.ray, "remote", lambda function: Task())
    monkeypatch.setattr(nodes.ray, "wait", lambda tasks, **more: (["aa"], ["cc"]))
    monkeypatch.setattr(nodes.ray, "get", lambda task: GpuLook(f"{task} is wrong", mps=True))
    cancelled: list[Any] = []
    monkeypatch.setattr(nodes.ray, "cancel", lambda task, **more: cancelled.append(task))
    assert nodes.gpu_looks() == {"aa (aaaaaaaa)": GpuLook("aa is wrong", mps=True)}
    assert cancelled == ["cc"] and {s["num_gpus"] for s in asked} == {nodes.GPU_SHARE}
    assert [s["scheduling_strategy"].node_id[:2] for s in asked] == ["aa", "cc"]


@pytest.mark.parametrize("share, mps, warned", [(0.25, False, 1), (0.25, True, 0), (1, False, 0)])
def test_doctor_looks_for_mps_where_trials_share_a_gpu(
    share: float, mps: bool, warned: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(gpu, "gpu_trouble", lambda: None)
    if mps:
        (tmp_path / "control").touch()
    run = validated(TrainConfig, {"objective": "ce", "student": "mlp", "gpus_per_worker": share})
    found = [*check_mps({"10.0.0.1 (aa)": look_at_gpu()}, run)]
    assert len(found) == warned and not [*check_mps({"a": GpuLook(None, mps=False)}, None)]
    assert all("nvidia-cuda-mps-control -d" in warning.text for warning in found)


def test_shared_soft_labels_lie_on_the_drivers_node_in_a_third_of_its_store(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class Shelf:
        def options(self, **settings: Any) -> "Shelf":
            seen.update(settings)
            return self

        def remote(self, limit: int) -> "Shelf":
            seen["limit"] = limit
            return self

    monkeypatch.setattr(callbacks, "started_here", lambda: False)
    monkeypatch.setattr(callbacks, "object_store_here", lambda: 900)
    monkeypatch.setattr(callbacks, "on_this_node", lambda: "beside the driver")
    monkeypatch.setattr(callbacks.ray, "remote", lambda kind: Shelf())
    callbacks.SoftLabels(tmp_path).on_begin()
    assert seen["limit"] == 300 and seen["scheduling_strategy"] == "beside the driver"


def test_shelf_and_desks_are_placed_beside_the_process_that_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = "aa" * 28, "bb" * 28
    stores = {there: 100.0, here: 900.0}
    known = [{"NodeID": n, "Resources": {"object_store_memory": s}} for n, s in stores.items()]
    context = SimpleNamespace(get_node_id=lambda: here, gcs_address="192.0.2.1:6379")
    monkeypatch.setattr(connect.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(connect.ray, "nodes", lambda: known)
    assert connect.object_store_here() == 900
    assert connect.on_this_node().node_id == here
    asked: dict[str, Any] = {}
    actor = SimpleNamespace(remote=lambda *given: None)
    desk = SimpleNamespace(options=lambda **settings: asked.update(settings) or actor)
    monkeypatch.setattr(group.ray, "remote", lambda kind: desk)
    run = validated(TrainConfig, {"objective": "ce", "student": "mlp", "workers": 2})
    group.WorkerGroup(run, tmp_path)._start([])
    assert asked["scheduling_strategy"].node_id == here
    (bundle,) = resources_of(run).bundles  # of the process that asks: a trial on the head
    assert set(bundle) == {connect.DRIVER}
