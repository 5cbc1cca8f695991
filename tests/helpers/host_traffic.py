"""Finds operations that a CUDA graph cannot contain, even on a CPU.

Such operations bring a number from the device to the host, or data from the host to the device.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# operations that read a tensor on the host, that return a tensor whose shape depends on the contents of another, or
# that make a tensor from Python numbers
_TRAFFIC = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "lift_fresh"}
_INDEXING = {"index", "index_put_", "index_put"}


class NoHostTraffic(TorchDispatchMode):
    """Raises AssertionError for an operation that on a GPU would wait for the device, or copy to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in _TRAFFIC and not masks, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class NoHostCopies(TorchDispatchMode):
    """Raises AssertionError for a copy from the CPU to the GPU. The host may wait for it; no graph may contain it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            device = given.get("device")
            source, target = args[0].device.type, args[0].device.type if device is None else torch.device(device).type
        elif func is torch.ops.aten.copy_.default:
            source, target = args[1].device.type, args[0].device.type
        else:
            source = target = ""
        assert (source, target) != ("cpu", "cuda"), f"{func} of {tuple(args[-1].shape)} from the host"
        return func(*args, **given)
