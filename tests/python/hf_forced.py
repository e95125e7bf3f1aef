# SPDX-License-Identifier: Apache-2.0
"""Routers of transformers with a selection that is given, weighted by their own code."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch

ROUTERS = ("gate", "router")


def routers_of(model):
    """The routers of the MoE blocks, in the order of the layers."""
    blocks = [
        m for m in model.modules() if isinstance(getattr(m, "experts", None), torch.nn.Module)
    ]
    return [next(getattr(b, name) for name in ROUTERS if hasattr(b, name)) for b in blocks]


@contextlib.contextmanager
def forced_routing(model, ids):
    """Every forward pass sends its tokens to ids [tokens, layers, top_k].

    The top-k over all experts is a router's last; its result is replaced, and the router goes on
    with it.
    """
    routers = routers_of(model)
    with contextlib.ExitStack() as stack:
        for router, given in zip(routers, ids.long().unbind(1), strict=True):
            own = router.forward

            def forward(hidden, own=own, given=given, experts=router.num_experts):
                topk = torch.topk

                def forced(values, *args, **options):
                    if values.dim() != 2 or values.shape[1] != experts:
                        return topk(values, *args, **options)
                    return values.gather(1, given), given

                with mock.patch.object(torch, "topk", forced):
                    return own(hidden)

            stack.enter_context(mock.patch.object(router, "forward", forward))
        yield
