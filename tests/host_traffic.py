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
