# SPDX-License-Identifier: Apache-2.0
"""Where the examples run their layers."""

from __future__ import annotations

import torch

import hopyard


def pick_device(spec: hopyard.MoeSpec) -> str:
    """The GPU if it is a Hopper and the library was built for it, else the CPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("no Hopper GPU: the layer runs on the CPU")
        return "cpu"
    answer = hopyard.explain(spec, "cuda")
    if not answer.supported:
        print(f"the layer runs on the CPU: {answer.reason}")
        return "cpu"
    return "cuda"
