"""Work outside of trials that uses a GPU: Ray lends it one, so that no trial has it too."""

from collections.abc import Callable
from typing import Any, TypeVar

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tfkd_ray.learn.dataset import seal_test_split
from tfkd_ray.run.connect import connect
from tfkd_ray.settings import own_code

Answer = TypeVar("Answer")


def gpus_of_this_node() -> float:
    """Return the number of GPUs that Ray has on this node."""
    here = ray.get_runtime_context().get_node_id()
    (about,) = (node for node in ray.nodes() if node["NodeID"] == here)
    return float(about["Resources"].get("GPU", 0))


def share_of_this_node(gpus: float) -> dict[str, Any]:
    """Return Ray's options for a process on this node with a share of one of its GPUs."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": here}


def with_a_gpu(gpus: float, work: Callable[[], Answer]) -> Answer:
    """Return the result of work, done in a process of this node to which Ray lends a share of a GPU.

    It waits until that share is free. Where this machine has no such GPU, the work is done in this
    process. What the work raises is raised.
    """
    if not (ray.is_initialized() or torch.cuda.is_available()):
        return work()
    connect()
    if gpus > gpus_of_this_node():
        return work()
    task = ray.remote(max_retries=0)(_there).options(**share_of_this_node(gpus))
    try:
        found: Answer = ray.get(task.remote(work, own_code.here()))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return found


def _there(work: Callable[[], Answer], home: own_code.Place) -> Answer:
    seal_test_split()
    own_code.enter(home)
    return work()
