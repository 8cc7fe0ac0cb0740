"""A CUDA device of which everything is there but the numbers: torch's fake tensors.

A fake tensor knows its shape, type and device. Whatever asks it for a value raises an error, and so
does an operation on tensors of two devices.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)


class _Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, *, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        pass

    def elapsed_time(self, other: "_Event") -> float:
        return 1000.0


class _OnCuda(TorchDispatchMode):
    """Makes fake what is on CUDA, and nothing else; records copies to the host, which wait.

    A copy to the host is a real tensor of ones. Pinned memory is ordinary memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.done: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        settings = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        device = settings.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        given = [x for x in tree_leaves((args, settings)) if isinstance(x, Tensor)]
        if not to_cuda and not any(isinstance(x, FakeTensor) for x in given):
            return func(*args, **settings)
        if device is not None and not to_cuda and func.overloadpacket is torch.ops.aten._to_copy:
            self.done.append("copy to the host")
            return torch.ones(args[0].shape, dtype=settings.get("dtype") or args[0].dtype)
        args, settings = tree_map(self._faked, (args, settings))
        with self.fake:
            return func(*args, **settings)

    def _faked(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value, static_shapes=True) if real else value


@contextlib.contextmanager
def fake_cuda() -> Iterator[list[str]]:
    """Let torch see a GPU whose tensors are fake; yield the list of what was done so far.

    That is "backward" and "copy to the host". `backward` does nothing else, as autograd's threads
    need a real device, so no parameter changes.
    """
    mode, real_tensor = _OnCuda(), torch.tensor

    def tensor(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
        made: Tensor = real_tensor(data, **settings)
        return made if device is None else made.to(device)

    torch._C._ensureCUDADeviceGuardSet()  # a device guard that asks no driver
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda *device: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr("tfkd_ray.learn.loop.architecture_trouble", lambda: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *given, **more: True)
        patch.setattr(torch.cuda, "default_generators", [torch.Generator()])
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(
            "torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available",
            lambda: False,
        )
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(Tensor, "backward", lambda loss: mode.done.append("backward"))
        patch.setattr(nn.Module, "to", _moved)
        with mode:
            yield mode.done


def _moved(
    network: nn.Module, device: torch.device | None = None, *, memory_format: Any = None
) -> nn.Module:
    """Move a network as `Module.to` does, which cannot exchange real tensors for fake ones."""

    def moved(value: Tensor) -> Tensor:
        if memory_format is not None and value.dim() != 4:
            return value
        return value.detach().to(
            device=device or value.device, memory_format=memory_format or torch.preserve_format
        )

    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(moved(value), value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
    return network
