"""Whether torch can use a GPU of this process, and why not."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class GpuLook(NamedTuple):
    """What a process found that looked at its GPU."""

    trouble: str | None
    """What is wrong with it; None: it multiplies."""
    mps: bool
    """Whether NVIDIA MPS runs there: without it, processes that share a GPU take turns on it."""


def look_at_gpu() -> GpuLook:
    """Return what is found of the GPU of this process."""
    place = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return GpuLook(gpu_trouble(), Path(place, "control").exists())


def why_no_gpu() -> str:
    """Return the reason, as the end of a sentence, why torch sees no GPU in this process."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build on this node"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty, so this process got none"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}: {_advice(said)}"
    return "the driver lists no device; run nvidia-smi on that node"


def _advice(said: str) -> str:
    """Return the first sentence of what torch says, with a way out for an old driver."""
    first = said.split(". ")[0].rstrip(".")
    if "too old" in said:
        return f"{first}; update the driver (CUDA 13 needs 580 or later), or install a torch for its CUDA"
    return first


def gpu_trouble() -> str | None:
    """Return what is wrong with the GPU of this process; None if it multiplies correctly.

    It is compared with the architectures of torch's build, and multiplies one matrix.
    """
    if not torch.cuda.is_available():
        return f"torch sees no GPU: {why_no_gpu()}"
    if (trouble := architecture_trouble()) is not None:
        return trouble
    name = torch.cuda.get_device_name()
    try:
        ones = torch.ones(64, 64, device="cuda")
        found = (ones @ ones).sum().item()
    except RuntimeError as error:
        return f"{name} cannot multiply: {str(error).strip().splitlines()[0]}"
    if found != 64.0**3:
        return f"{name} multiplies wrongly: {found:g} in place of {64**3}; it may be broken"
    return None


def architecture_trouble() -> str | None:
    """Return that torch has no code for the GPU of this process; None if it has."""
    capability, built_for = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if has_code_for(capability, built_for):
        return None
    major, minor = capability
    return (
        f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and torch {torch.__version__} has "
        f"code for {', '.join(built_for)}; install another torch, or use another GPU"
    )


def has_code_for(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Return whether a build of torch has code for a compute capability (major, minor).

    `sm_80` runs on 8.0 and later of the same major version, `compute_90` on 9.0 and all later ones.
    An `a` at the end means that exact one.
    """
    for name in built_for:
        kind, _, number = name.partition("_")
        exact = number.endswith("a")
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
        made = int(digits[:-1]), int(digits[-1])
        if made == capability:
            return True
        if exact or made > capability:
            continue
        if kind == "compute" or made[0] == capability[0]:
            return True
    return False
