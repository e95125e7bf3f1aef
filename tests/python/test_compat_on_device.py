# SPDX-License-Identifier: Apache-2.0
"""Quantisers, routing metadata and packed ids of the FlashInfer part where tensors lie: the bits of
the host's, without a wait for a GPU, and inside of a CUDA graph.

What runs for CUDA tensors is torch code, which runs here on CPU tensors, too.
"""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import compat_layers as cl
import hopyard.compat.flashinfer as fi
from compat_layers import one_torch_thread  # noqa: F401
from hopyard import formats
from hopyard.compat.flashinfer import ops, quantize_torch, routing

DEVICES = pytest.mark.parametrize("device", cl.DEVICES)
V, LAYOUT, MODE = fi.QuantVariant, fi.SfLayout, fi.RoutingInputMode


class NoWait(TorchDispatchMode):
    """Refuses what would wait for a GPU or copy between it and the host."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "_unique",
        "bincount",
        "equal",
        "repeat_interleave",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name.startswith(word) for word in self.WAITS), name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), name
        if name == "copy_":
            assert args[0].device == args[1].device, name
        if name == "_to_copy":
            assert (kwargs or {}).get("device") in (None, args[0].device), name
        return func(*args, **(kwargs or {}))


def _host_copy(*_, **__):
    raise AssertionError("a copy to the host")


@contextlib.contextmanager
def as_on_a_gpu():
    """CPU tensors take the way of CUDA tensors within, and are read by nothing but torch."""
    with pytest.MonkeyPatch.context() as patch, NoWait():
        patch.setattr(ops, "on_host", lambda array: not isinstance(array, torch.Tensor))
        for name in ("cpu", "numpy", "tolist", "__array__"):
            patch.setattr(torch.Tensor, name, _host_copy)
        yield


def sources():
    """Matrices [.., 256] of every kind of number."""
    generator = torch.Generator().manual_seed(0)

    def integers(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    bits = integers(-(2**31), 2**31, (300, 256)).to(torch.int32).view(torch.float32)
    wide = torch.randn(150, 2, 128, generator=generator)
    wide = (wide * torch.exp2(integers(-149, 128, (150, 2, 1)).float())).view(150, 256)
    special = torch.randn(40, 256, generator=generator)
    special[3, 5], special[7, 200], special[9] = torch.nan, -torch.inf, -0.0
    return {
        "normal": torch.randn(50, 256, generator=generator),
        "bits": bits,  # NaN, infinities, subnormals
        "wide": wide,
        "ties": integers(-120, 121, (50, 256)).float() / 16,
        "special": special,
        "scales": torch.exp2(integers(-149, 128, (200, 1)).float()) * 448 * torch.ones(256),
        "empty": torch.zeros(0, 256),
    }


SOURCES = sources()
FACTORS = (1.0, 1 / 64, 3e-6, 1e30, 1e-30, 1e-38)
FORMATS = [
    ("nvfp4", FACTORS),
    ("fp8_per_tensor", FACTORS),
    *((name, (None,)) for name in ("mxfp4", "mxfp8", "fp8_block1x128")),
]


def same_bytes(left, right):
    """Equal shapes, types and bytes."""
    assert left.shape == right.shape
    assert left.dtype == right.dtype
    assert torch.equal(left.cpu().contiguous().view(torch.uint8), right.view(torch.uint8))


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "factors"), FORMATS)
@pytest.mark.parametrize("kind", SOURCES)
def test_torch_gives_the_bits_of_the_library(kind, name, factors, dtype, device):
    source = SOURCES[kind].to(dtype)
    moved = source.to(device)
    for factor in factors:
        wanted = formats.quantize(source, name, global_scale=factor)
        given = None if factor is None else torch.tensor(factor, device=device)
        with NoWait():
            codes, scales = quantize_torch.quantize(moved, name, given)
        same_bytes(codes, wanted.codes)
        if wanted.scales is not None:
            same_bytes(scales, wanted.scales)
        elif scales is not None:
            assert scales.shape == (0, 256 // quantize_torch.BLOCKS[name])


def quantisers(x):
    """Every public way to a quantiser, with results of one kind: a tuple of tensors."""
    g = torch.full((1,), 512.0, device=x.device)
    yield fi.fp4_quantize(x, g)
    yield fi.fp4_quantize(x, g, is_sf_swizzled_layout=False)
    yield fi.fp4_quantize(x, g, is_sf_8x4_layout=True)
    yield fi.fp4_quantize(x, 1 / g, is_global_scale_inversed=True)
    yield fi.fp4_quantize(x, 512.0)
    yield fi.fp4_quantize(x, None, 32, True)
    yield fi.fp4_quantize(x.view(2, -1, x.shape[1]))
    yield fi.nvfp4_quantize(x, g, LAYOUT.layout_linear)
    yield fi.mxfp4_quantize(x)
    yield fi.mxfp8_quantize(x)
    yield fi.mxfp8_quantize(x, False, 512)
    yield fi.prepare_trtllm_fp4_activations(x, variant=V.NVFP4)
    yield fi.prepare_trtllm_fp4_activations(x, variant=V.MXFP4)
    yield fi.prepare_trtllm_fp8_block_activations(x, variant=V.MxFp8)
    yield fi.prepare_trtllm_fp8_block_activations(x, variant=V.DeepSeekFp8)
    yield fi.prepare_trtllm_fp8_per_tensor_activations(x, hidden_states_scale_global=48.0)[:1]


@DEVICES
def test_quantisers_give_the_same_bits_without_a_wait(device):
    x = SOURCES["special"].bfloat16()
    wanted = list(quantisers(x))
    moved = x.to(device)
    with as_on_a_gpu():
        given = list(quantisers(moved))
    for left, right in zip(given, wanted, strict=True):
        for one, other in zip(left, right, strict=True):
            assert one.device.type == device
            same_bytes(one, other)


@DEVICES
@pytest.mark.parametrize("scale", [0.0, -1.0, torch.nan, torch.inf])
def test_a_global_scale_that_nobody_looks_at_makes_nan(scale, device):
    x, given = torch.ones(4, 32, device=device), torch.tensor(scale, device=device)
    with as_on_a_gpu():
        results = [
            fi.fp4_quantize(x, given, is_sf_swizzled_layout=False, is_global_scale_inversed=inverse)
            for inverse in (False, True)
        ]
    for codes, scales in results:
        assert (scales == 0x7F).all()
        assert (codes == 0).all()
    with pytest.raises(ValueError, match="global_scale has 2 elements, wanted one"):
        fi.fp4_quantize(x, torch.ones(2, device=device))
    with pytest.raises(ValueError, match=f"global_scale is {scale}, wanted a finite"):
        fi.fp4_quantize(x, scale)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x[0]),
        lambda x: x.unique(),
        lambda x: x.unique(dim=0),
        lambda x: x.int().bincount(),
        lambda x: x.repeat_interleave(x.int()),
        lambda x: torch.equal(x, x + 1),
        # What only has a shape stands for the other device.
        lambda x: x.to("meta"),
        lambda x: torch.empty_like(x, device="meta").copy_(x),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: np.asarray(x),
    ],
)
def test_what_waits_is_rejected(wait):
    """A test of the tests."""
    with as_on_a_gpu():
        x = torch.arange(4.0) * 2 + 1
        with pytest.raises(AssertionError):
            wait(x)
        assert x.shape == torch.where(x > 3, x, -x).clone().shape
    assert x.tolist() == [1, 3, 5, 7]


# --- permutation, metadata, packed ids


def plain_permutation(ids, offset, local, tile):
    """Rows of slots by loops: expert by expert, each one's rows padded to whole tiles."""
    row, rows, tokens, tiles = 0, {}, {}, []
    for expert in range(offset, offset + local):
        slots = [i for i, e in enumerate(ids.reshape(-1).tolist()) if e == expert]
        for place, slot in enumerate(slots):
            rows[slot], tokens[row + place] = row + place, slot // ids.shape[1]
        end = row + len(slots)
        while row < end:
            row += tile
            tiles.append((expert - offset, min(row, end)))
    return row, rows, tokens, tiles


@DEVICES
@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("tile", [1, 8, 128])
@pytest.mark.parametrize(
    ("tokens", "rank"), [(1, (0, 16)), (0, (0, 16)), (57, (0, 16)), (57, (5, 3)), (57, (15, 1))]
)
def test_permutation_is_that_of_loops(tokens, rank, tile, numpy, device):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, 20, (tokens, 3), generator=generator, dtype=torch.int32)
    padded, rows, of_row, tiles = plain_permutation(ids, *rank, tile)
    given = ids.numpy() if numpy else ids.to(device)
    with NoWait():
        p = routing.permute(given, *rank, (tile, 20))
    p = {name: torch.as_tensor(part).cpu() for name, part in vars(p).items()}
    assert all(part.dtype == torch.int32 for part in p.values())
    assert p["total_padded"].tolist() == [padded]
    assert p["num_tiles"].tolist() == [len(tiles)]
    slots = range(ids.numel())
    assert p["expanded_to_permuted"].reshape(-1).tolist() == [rows.get(i, -1) for i in slots]
    found = p["permuted_to_token"].tolist()
    assert found == [of_row.get(i, -1) for i in range(len(found))]
    assert len(found) >= padded
    more = [-1] * (len(p["tile_expert"]) - len(tiles))
    assert p["tile_expert"].tolist() == [expert for expert, _ in tiles] + more
    assert p["tile_limit"].tolist() == [limit for _, limit in tiles] + more


USUAL = {"num_experts": 16, "top_k": 4, "local_expert_offset": 4, "num_local_experts": 8}


def routing_helpers(logits, ids, weights):
    """What the helpers make: tensors by name."""
    result = {"packed": fi.pack_topk_ids(ids, weights)}
    for method in ("Renormalize", "DeepSeekV3"):
        groups = {"n_group": 4, "topk_group": 2} if method == "DeepSeekV3" else {}
        made = fi.trtllm_gen_routing(logits, None, fi.RoutingMethodType[method], 4, **groups)
        result |= {f"{method} {name}": part for name, part in made._asdict().items()}
    shared = {"num_fused_shared_experts": 2, "n_group": 4, "topk_group": 2}
    made = fi.trtllm_gen_routing(logits, None, fi.RoutingMethodType.DeepSeekV3, 4, **shared)
    result |= {f"shared {name}": part for name, part in made._asdict().items()}
    for mode, given in (
        (MODE.PackedPrecomputed, (result["packed"],)),
        (MODE.UnpackedPrecomputed, (ids, weights)),
    ):
        metadata = fi.trtllm_moe_allocate_routing_metadata_multi_tile(
            given[0],
            tile_ns=[8, 64],
            routing_input_mode=mode,
            topk_weights=given[1] if len(given) > 1 else None,
            **USUAL,
        )
        fi.populate_trtllm_moe_routing_metadata_(metadata, *given)
        for slot in metadata.slots:
            parts = {n: part for n, part in vars(slot).items() if n != "tile_n"}
            result |= {f"{mode.name} {slot.tile_n} {n}": part for n, part in parts.items()}
    return result


def routed(seed, device):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(37, 16, generator=generator)
    weights, ids = logits.topk(4)
    return [part.to(device) for part in (logits, ids.int(), weights)]


@DEVICES
def test_routing_helpers_give_the_same_without_a_wait(device):
    wanted = routing_helpers(*routed(1, "cpu"))
    given = routed(1, device)
    with as_on_a_gpu():
        made = routing_helpers(*given)
    assert made.keys() == wanted.keys()
    for name, part in made.items():
        assert part.device.type == device
        same_bytes(part, wanted[name])


def test_ids_that_cannot_be_packed_are_no_experts_on_a_gpu():
    ids = torch.tensor([[3, 40000, -32769, -1]], dtype=torch.int32)
    with as_on_a_gpu():
        packed = fi.pack_topk_ids(ids, -torch.ones(1, 4))
    assert (packed >> 16).tolist() == [[3, -1, -1, -1]]
    assert ((packed & 0xFFFF) == 0xBF80).all()


@pytest.mark.skipif(not cl.CUDA, reason="no GPU, or a library without its kernels")
def test_helpers_run_in_a_cuda_graph():
    x = SOURCES["normal"].bfloat16().cuda()
    given = routed(1, "cuda")

    def run():
        return [part for pair in quantisers(x) for part in pair], routing_helpers(*given)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parts, helpers = run()
    for seed in (2, 3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).bfloat16())
        for tensor, new in zip(given, routed(seed, "cuda"), strict=True):
            tensor.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        host = [part for pair in quantisers(x.cpu()) for part in pair]
        for left, right in zip(parts, host, strict=True):
            same_bytes(left, right)
        wanted = routing_helpers(*routed(seed, "cpu"))
        for name, part in helpers.items():
            same_bytes(part, wanted[name])


@pytest.mark.skipif(not cl.CUDA, reason="no GPU, or a library without its kernels")
def test_ids_and_weights_lie_in_one_place():
    weights, ids = torch.ones(3, 2), torch.zeros(3, 2).int()
    with pytest.raises(ValueError, match="weights must be where ids are, cuda:0; got cpu"):
        fi.pack_topk_ids(ids.cuda(), weights)
    metadata = fi.trtllm_moe_allocate_routing_metadata_multi_tile(
        ids.cuda(),
        tile_ns=[8],
        routing_input_mode=MODE.UnpackedPrecomputed,
        topk_weights=weights.cuda(),
        **USUAL | {"top_k": 2},
    )
    with pytest.raises(ValueError, match="topk_ids must be where the metadata is, cuda:0; got cpu"):
        fi.populate_trtllm_moe_routing_metadata_(metadata, ids, weights)
