"""The widest floating-point numbers of a device."""

import torch


def widest(device: torch.device) -> torch.dtype:
    """float64; on Apple's GPUs, which lack it, float32."""
    return torch.float32 if device.type == "mps" else torch.float64
