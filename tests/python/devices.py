# SPDX-License-Identifier: Apache-2.0
"""The devices that tests of torch tensors run on; those on a GPU report SKIPPED without one."""

from __future__ import annotations

import pytest
import torch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU in torch")
    ),
]
