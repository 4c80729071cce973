"""What a device computes in."""

import torch


def compute_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return what to compute in with weights of `dtype` on a device: `dtype`, or fp32 where bfloat16 is emulated.

    A CPU without bfloat16 instructions multiplies such matrices many times more slowly than fp32 ones. fp32 holds every
    bfloat16 value, so the weights stay what they are.
    """
    emulated = dtype == torch.bfloat16 and device_type == "cpu" and not _cpu_multiplies_bfloat16()
    return torch.float32 if emulated else dtype


def _cpu_multiplies_bfloat16() -> bool:
    # What torch itself asks before it leaves a bfloat16 product to oneDNN (aten/src/ATen/native/mkldnn/Utils.h).
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported
