"""The arithmetic of training."""

from __future__ import annotations

import torch


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device computes in it; on a CPU without AVX-512 it would be emulated, ten times slower than float32."""
    native = device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.autocast(device.type, torch.bfloat16, enabled=native)
