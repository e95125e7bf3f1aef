# SPDX-License-Identifier: Apache-2.0
"""The devices that tests of torch tensors run on; those on a GPU report SKIPPED without one."""

from __future__ import annotations

import pytest

from elsewhere import has_gpu_backend

try:
    import torch
except ImportError:
    torch = None


def why_no_gpu() -> str:
    """Why nothing can run on a GPU: torch's answer, then the library's; empty if it can."""
    if torch is None:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return "the GPU is not of compute capability 9.0"
    if not has_gpu_backend():
        return "the extension was built without HOPYARD_CUDA=ON"
    return ""


_WHY = why_no_gpu()
needs_gpu = pytest.mark.skipif(bool(_WHY), reason=_WHY)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
