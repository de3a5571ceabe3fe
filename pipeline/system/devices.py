"""What a device can do."""

from __future__ import annotations

import platform

import torch

__all__ = ["has_bfloat16"]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16, instead of emulating it many times as slowly as float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # On x86, the library says yes for AVX-512 alone, where it emulates bfloat16.
    known = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return platform.machine() not in ("x86_64", "AMD64") or any(ask is None or ask() for ask in known)
