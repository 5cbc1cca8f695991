"""What a CUDA graph cannot hold: operations that bring a number to the host, or data from it, found on the CPU already."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# what is read from a tensor, shapes that depend on its contents, and tensors made of Python's numbers
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
    """Refuses what the host would wait for and no graph may hold: copies from its memory that is not pinned."""

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
