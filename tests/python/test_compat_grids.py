# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's grids of fused tests through the compat names, by its criteria and by ours.

The table is compat_grids.py. Without more words its reduced rows run, on the CPU and on a GPU. All
of it, on a Hopper GPU only (pytest-xdist is optional):

    HOPYARD_TEST_SCALE=full pytest -n 8 tests/python/test_compat_grids.py
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("torch")

import torch

import compat_grids as grids
import compat_layers as cl
import compat_reference as ref
import hopyard.compat.flashinfer as fi
from compat_layers import one_torch_thread  # noqa: F401
from hopyard.compat.flashinfer import engine

FULL = os.environ.get("HOPYARD_TEST_SCALE") == "full"
ROWS = grids.rows(FULL)
CPU, CUDA = cl.DEVICES
D, F8 = fi.DtypeTrtllmGen, fi.Fp8QuantizationType
# Activations, weights and kind of FP8 of the modes whose kernels are all run.
TYPES = {
    "nvfp4": (D.E2m1, D.E2m1, F8.NoneFp8),
    "nvfp4_per_token": (D.E2m1, D.E2m1, F8.NoneFp8),
    "mxfp4_mxfp8": (D.MxE4m3, D.MxE2m1, F8.NoneFp8),
    "mxfp4_bf16": (D.Bfloat16, D.MxE2m1, F8.NoneFp8),
    "deepseek": (D.E4m3, D.E4m3, F8.DeepSeekFp8),
    "mxfp8": (D.MxE4m3, D.MxE4m3, F8.MxFp8),
}
# Experts of one case have at most this many different weights, or three, whatever their size is.
POOL_ELEMENTS = 40_000_000
PRIMES = (31, 23, 17, 13, 11, 7, 5, 3)
# Two cases whose weights are larger do not run at once, however many processes there are.
LARGE_BYTES = 2 << 30
KEPT_BYTES = 1 << 30


def parameters():
    """(row, device): the reduced rows everywhere, or all of them on a GPU."""
    if FULL:
        return [pytest.param(r, *CUDA.values, marks=CUDA.marks, id=f"{r}-cuda") for r in ROWS]
    here = [pytest.param(r, CPU, id=f"{r}-cpu") for r in ROWS if not (r.tactics and cl.CUDA)]
    return here + [pytest.param(r, *CUDA.values, marks=CUDA.marks, id=f"{r}-cuda") for r in ROWS]


def quantize_4over6(matrix, multiplier, *_, is_sf_swizzled_layout):
    return ref.quantize_4over6(matrix, multiplier)


def quantiser(four_over_six):
    """The tests' NVFP4 quantiser within: the compat package's, or one with 4-over-6 scales."""
    usual = fi.quantize.fp4_quantize
    return mock.patch.object(fi, "fp4_quantize", quantize_4over6 if four_over_six else usual)


@functools.lru_cache(maxsize=1)
def pool(device, four_over_six, *what):
    """Weights that rows of one key share."""
    with quantiser(four_over_six):
        arrays, first, second, multipliers = cl.stored(*what)
    arrays = {name: cl.move(array, device) for name, array in arrays.items()}
    return arrays, first.to(device), second.to(device), multipliers


def case_of(row, device):
    """The case of a row; experts beyond the size of the pool repeat its weights."""
    experts, top_k, inter = row.layer
    total = experts + row.shared
    elements = 3 * row.hidden * inter
    distinct = total
    if total * elements > POOL_ELEMENTS:
        distinct = next(p for p in PRIMES if p * elements <= POOL_ELEMENTS or p == PRIMES[-1])
    options = {
        name: [value] * distinct for name in ("alpha", "beta") if (value := getattr(row, name))
    }
    with quantiser(row.has_four_over_six("hidden")):
        case = cl.make(
            row.mode,
            cl.Sizes(row.hidden, inter, distinct, top_k, row.tokens),
            row.activation,
            device=device,
            weights=functools.partial(pool, device, row.has_four_over_six("weights")),
            zero=row.zero,
            bias=bool(row.bias),
            **options,
        )
    case = cl.spread(case, torch.arange(total) % distinct)
    return replace(case, sizes=replace(case.sizes, experts=experts))


@contextlib.contextmanager
def little_memory_kept():
    """What torch keeps of a GPU's memory after a case is missing in other processes."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_BYTES:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def alone(row):
    """Large cases run one by one."""
    elements = 3 * row.hidden * row.layer[2] * row.layer[0]
    size = elements * (2 if row.mode == "bf16" else 0.5 if "4" in row.mode else 1)
    if size < LARGE_BYTES:
        yield
        return
    with (Path(tempfile.gettempdir()) / "hopyard_large_case").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def captured(case, call):
    """The output of a replayed CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cl.call(case, **call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = cl.call(case, **call)
    graph.replay()
    torch.cuda.synchronize()
    output = output.clone()
    del graph
    engine._views._pinned.clear()
    engine._plans._pinned.clear()
    return output


def run(case, **call):
    """The output; on a GPU, where a capture is possible, the same from a graph."""
    output = cl.call(case, **call)
    if output.device.type == "cuda" and case.mode != "mxfp4_e4m3":
        cl.same(captured(case, call), output)
    return output


def by_logits(row, case, device):
    """Run and judge the operation that routes; its recorded ids, their weights and the output."""
    rule = row.rule
    call = {n: cl.move(v, device) for n, v in cl.routing_by(rule, case).items()}
    on_input = rule.method == "Llama4" and row.mode == "per_tensor"
    if on_input:
        call["use_routing_scales_on_input"] = True
    if row.shared:
        call["num_fused_shared_experts"] = row.shared
    tokens, top_k = row.tokens, row.layer[1]
    replay = torch.full((tokens + row.tail, top_k), -1, dtype=torch.int16, device=device)
    output = run(case, **call, routing_replay_out=replay)
    cl.same(output, cl.call(case, **call))
    assert (replay[tokens:] == -1).all()
    ids = replay[:tokens].long()
    assert ((ids >= 0) & (ids < row.layer[0])).all()
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    weights = rule.confirm(ids, call["logits"], call["bias"])
    used, factors = ids, weights
    if row.shared:
        more = torch.arange(row.layer[0], row.layer[0] + row.shared, device=device)
        used = torch.cat([ids, more.expand(tokens, -1)], 1)
        factors = torch.cat([weights, torch.ones(tokens, row.shared, device=device)], 1)
    cl.judge(case, output, used, factors, on_input=on_input)
    if row.zero:
        assert (output == 0).all()
    return call, ids, weights, output


def given_ids(row, ids, weights):
    """Ids and weights as a routed operation takes them, and the weights that it sees."""
    weights = weights.to(torch.float32 if row.given == "float32" else torch.bfloat16)
    pair = (ids.int().contiguous(), weights.contiguous())
    return (fi.pack_topk_ids(*pair) if row.given == "packed" else pair), weights


def by_ids(row, case, call, result):
    """Run and judge the routed operation. With the same weights both operations agree, by
    FlashInfer's criterion for FP4, which is its strictest. The logits' own weights are FP32 here:
    BF16 ones are compared with the same ones given as FP32."""
    ids, weights, output = result
    given, weights = given_ids(row, ids, weights)
    method = cl.method_of(call)
    again = run(case, routed=given, **method)
    cl.judge(case, again, ids, weights)
    if row.given == "float32":
        ref.parity(again, output, 1e-3, 0.06)
    else:
        cl.same(again, cl.call(case, routed=(ids.int(), weights.float()), **method))


def delta_of(row, case, ids):
    """A LoRA delta [T, K, 2 * I]: random, or two thin matrices of each expert times the token, the
    first of which gate and up share or have one each. The first token has no adapter."""
    shape = (*ids.shape, 2 * row.layer[2])
    if row.delta == "random":
        return cl.normal(shape, 20, 0.5).to(ids.device)
    slices = {"two_slices": 2, "shared_a": 1}[row.delta]
    rank, distinct = 16, int(case.places.max()) + 1
    down = cl.normal((slices, distinct, rank, row.hidden), 21, row.hidden**-0.5)
    up = cl.normal((slices, distinct, shape[-1] // slices, rank), 22, 0.2)
    down, up, x = (part.to(ids.device).float() for part in (down, up, case.x))
    place = case.places.to(ids.device)[ids]
    inner = torch.einsum("th,stkrh->stkr", x, down[:, place])
    delta = torch.einsum("stkr,stkir->tksi", inner, up[:, place]).reshape(shape)
    delta[0] = 0
    return delta.bfloat16()


def with_delta(row, case, ids, weights):
    """Run and judge the routed operation with a LoRA delta."""
    given, weights = given_ids(row, ids, weights)
    delta = delta_of(row, case, ids)
    output, place, inner = cl.call(case, routed=given, gemm1_lora_delta=delta)
    cl.judge(case, output, ids, weights, delta=delta)
    assert (place.sort().values == torch.arange(ids.numel(), device=ids.device)).all()
    assert inner.shape == (ids.numel(), row.layer[2])
    assert (output != cl.call(case, routed=given)).any()


def every_tactic(row, case, ids, weights):
    """Run and judge every kernel, 10 times with the same bits."""
    per_token = row.mode == "nvfp4_per_token"
    shuffled, layout = row.mode != "deepseek", fi.WeightLayout.MajorK
    experts, top_k, inter = row.layer
    problem = (*TYPES[row.mode], top_k, row.hidden, inter, experts, fi.ActivationType.Swiglu)
    problem = (*problem, shuffled, layout, per_token, row.tokens)
    given, weights = given_ids(row, ids, weights)
    configs = fi.trtllm_get_valid_moe_configs(*problem)
    assert configs
    for config in configs:
        with fi.forced_tactic(fi.trtllm_moe_tactic_name(config, *problem)):
            output = cl.call(case, routed=given)
            for _ in range(9):
                cl.same(cl.call(case, routed=given), output)
        wanted = cl.judge(case, output, ids, weights).float()
        bound = 0.5 * max(wanted.abs().max().item(), 1)
        assert (output.float() - wanted).abs().max().item() <= bound


def without_biases(row, case):
    """The case with the one bias of a row, or both."""
    for name in ("gemm1", "gemm2"):
        if row.bias not in (name, "both"):
            case.arguments[f"{name}_bias"] = None
            zeros = [0 * part for part in case.layer.bias]
            keep = case.layer.bias
            case.layer.bias = (*zeros[:2], keep[2]) if name == "gemm1" else (*keep[:2], zeros[2])


def judge_row(row, device):
    """Run and judge everything that a row asks for."""
    case = case_of(row, device)
    if row.bias:
        without_biases(row, case)
    call, ids, weights, output = by_logits(row, case, device)
    if row.bias:
        bare = cl.call(case, **call, gemm1_bias=None, gemm2_bias=None)
        assert (bare.float() - output.float()).abs().max() > 1e-3
    if row.delta:
        with_delta(row, case, ids, weights)
    elif row.tactics:
        every_tactic(row, case, ids, weights)
    elif row.given:
        by_ids(row, case, call, (ids, weights, output))


@pytest.mark.parametrize(("row", "device"), parameters())
def test_grid(row, device):
    with alone(row), little_memory_kept():
        judge_row(row, device)  # whose arrays end here, before other processes may begin


# --- tests of the tests


def fresh(mode="bf16", **changes):
    row = grids.Row("own", mode, (16, 4, 128), 9, ref.Rule("Sigmoid"), 256, **changes)
    case = case_of(row, "cpu")
    return row, case, by_logits(row, case, "cpu")


def swapped(output):
    return output[torch.tensor([1, 0, *range(2, len(output))])]


FAULTS = {
    "one token twice": lambda output: output[torch.tensor([0, 0, *range(2, len(output))])],
    "tokens swapped": swapped,
    "a row of zeros": lambda output: output * (torch.arange(len(output)) > 0)[:, None],
    "one block off by a tenth": lambda output: output * (1 + 0.1 * (torch.arange(256) < 64)),
    "negated": lambda output: -output,
    "nan": lambda output: torch.where(torch.arange(256) == 7, torch.nan, output),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", ["bf16", "mxfp8", "mxint4"])
def test_planted_faults_are_rejected(mode, fault):
    _, case, (_, ids, weights, output) = fresh(mode)
    with pytest.raises(AssertionError):
        cl.judge(case, FAULTS[fault](output).bfloat16(), ids, weights)


def test_other_experts_are_rejected():
    row, case, (call, ids, weights, output) = fresh()
    assert torch.equal(row.rule.confirm(ids, call["logits"]), weights)
    best = torch.sigmoid(call["logits"]).sort(descending=True).indices
    for wrong in (best[:, 1:5], best[:, [1, 0, 2, 3]], best[:, [0, 1, 2, 4]]):
        with pytest.raises(AssertionError):
            row.rule.confirm(wrong, call["logits"])
    ties = torch.zeros(2, 8)
    assert row.rule.confirm(torch.tensor([[5, 1], [0, 7]]), ties).eq(0.5).all()
    with pytest.raises(AssertionError, match="although logits are not computed"):
        ref.Rule("TopK").confirm(torch.tensor([[5, 1], [0, 7]]), ties)
    with pytest.raises(AssertionError):
        cl.judge(replace(case, places=case.places.roll(1)), output, ids, weights)


def test_four_over_six_scales():
    x = cl.normal((64, 128), 1)
    multiplier = torch.tensor([512.0])
    usual = fi.fp4_quantize(x, multiplier, is_sf_swizzled_layout=False)
    other = ref.quantize_4over6(x, multiplier)
    errors, tops = [], []
    for codes, scales in (usual, other):
        values = ref.decode_e2m1(codes)
        scales = scales.view(torch.float8_e4m3fn).double() / 512
        errors.append((ref.with_scales(values, scales, 16) - x.double()).pow(2).sum().item())
        tops.append(ref.blocks(values.abs(), 16).amax(-1))
    assert errors[1] < 0.9 * errors[0]
    assert (tops[1] == 4).float().mean() > 0.2 > (tops[0] == 4).float().mean()


def test_the_whole_table_can_be_named():
    for full in (False, True):
        rows = grids.rows(full)
        assert len({str(row) for row in rows}) == len(rows)
        assert {row.mode for row in rows} == set(cl.WEIGHTS) == set(grids.MODES)
        assert {row.group for row in rows} == {row.group for row in grids.GRID}
