"""A pytest plugin (`-p tests.kernels.on_gpu`): the kernel tests, which know nothing of devices, on a GPU.

Every operator's tensors travel there by their storages, so that what overlaps still overlaps, and come back after
the call. MERGE3_TEST_TARGET=cpu only copies them: a rehearsal where there is no GPU.
"""

import os

import torch

from merge3 import kernels

TARGET = torch.device(os.environ.get("MERGE3_TEST_TARGET", "cuda"))
_call = kernels.call


def call(op, *arguments):
    name = op._qualified_op_name.split("::")[-1] if hasattr(op, "_qualified_op_name") else ""
    if name in ("prepare_", "merge_prepared_") or not name:
        return _call(op, *arguments)
    travelled: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # storage address -> its bytes here and there

    def there(x: torch.Tensor) -> torch.Tensor:
        if x.device != torch.device("cpu") or x.numel() == 0:
            return x.to(TARGET)
        storage = x.untyped_storage()
        if storage.data_ptr() not in travelled:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            travelled[storage.data_ptr()] = here, here.to(TARGET, copy=True)
        target = travelled[storage.data_ptr()][1].untyped_storage()
        return torch.empty(0, dtype=x.dtype, device=TARGET).set_(target, x.storage_offset(), x.shape, x.stride())

    # Lists are device memory, single tensors host memory.
    moved = [[there(x) for x in value] if isinstance(value, list) else value for value in arguments]
    try:
        return _call(op, *moved)
    finally:
        for here, gone in travelled.values():
            here.copy_(gone)


kernels.call = call
