# SPDX-License-Identifier: Apache-2.0
"""What FlashInfer's operations remember between calls, what they look at again, and captures."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref

import pytest

pytest.importorskip("torch")

import torch

import compat_layers as cl
import hopyard.compat.flashinfer as fi
from compat_layers import one_torch_thread  # noqa: F401
from hopyard.compat.flashinfer import engine, ops

MODES = list(cl.WEIGHTS)
DEVICES = pytest.mark.parametrize("device", cl.DEVICES)
FP4 = ("nvfp4", "nvfp4_per_token", "mxfp4_mxfp8", "mxfp4_bf16", "mxfp4_e4m3")
SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")


@DEVICES
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_remembered_of_what_arrays_hold(mode, device):
    case = cl.make(mode, bias=mode in FP4, device=device)
    other = cl.make(mode, seed=50, bias=mode in FP4, device=device)
    logits = cl.logits_of(case)
    first = cl.call(case, logits=logits)
    before = {
        name: array.clone() for name, array in case.arguments.items() if hasattr(array, "clone")
    }
    wanted = cl.call(other, logits=logits)
    cl.call(case, logits=logits)
    for name, array in before.items():  # calls leave weights alone
        assert (array.view(torch.uint8) == case.arguments[name].view(torch.uint8)).all()
    for name, array in other.arguments.items():  # new content at the same addresses
        if isinstance(array, torch.Tensor):
            case.arguments[name].view(torch.uint8).copy_(array.view(torch.uint8))
    second = cl.call(case, logits=logits)
    cl.same(second, wanted)
    assert (first != second).any()


def test_views_neither_keep_weights_nor_grow_without_bound():
    case = cl.make("nvfp4")
    watch = [weakref.ref(a) for name, a in case.arguments.items() if isinstance(a, torch.Tensor)]
    logits = cl.logits_of(case)
    cl.call(case, logits=logits)
    del case
    gc.collect()
    assert [w for w in watch if w() is not None] == []
    cache = engine._Cache(3)
    made = [cache.get(i, lambda i=i: i) for i in (1, 2, 3, 1, 4)]
    assert made == [1, 2, 3, 1, 4]
    assert list(cache._items) == [3, 1, 4]
    cache.get(9, lambda: 9, pin=True)
    for i in range(20, 30):
        cache.get(i, lambda: 0)
    assert len(cache) == 4
    assert cache.get(9, lambda: None) == 9


ENDING = """
import gc
import compat_layers as cl
import hopyard.compat.flashinfer as fi
from hopyard.compat.flashinfer import engine

case = cl.make("nvfp4", bias=True)
cl.call(case, logits=cl.logits_of(case))
(view,) = engine._views._items.values()
cycle = [view.weights]
cycle.append(cycle)
del view, cycle
fi.clear_caches()
gc.collect()
print("alive")
"""


def test_weights_may_end_in_a_cycle():
    """The collector ends what describes their arrays before them; freed memory is overwritten."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING],
        env={**os.environ, "PYTHONMALLOC": "debug", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_plans_are_shared_by_layers_of_one_spec():
    fi.clear_caches()
    for seed in range(4):
        case = cl.make("bf16", seed=seed)
        for tokens in (8, 5, 1):
            logits = cl.logits_of(case)[:tokens].contiguous()
            hidden = case.arguments["hidden_states"][:tokens]
            cl.call(case, logits=logits, hidden_states=hidden)
    assert len(engine._plans) == 1
    fi.clear_caches()
    assert len(engine._plans) == len(engine._views) == 0


@DEVICES
@pytest.mark.parametrize("modes", [("inference_mode", "no_grad"), ("no_grad", "inference_mode")])
def test_a_view_serves_in_and_out_of_inference_mode(modes, device):
    fi.clear_caches()
    case = cl.make("nvfp4", device=device)
    logits = cl.logits_of(case)
    outputs = []
    for mode in modes:
        with getattr(torch, mode)():
            outputs.append(cl.call(case, logits=logits))
    assert len(engine._views) == 1
    cl.same(*outputs)


def scalars_of(case, value=1.0):
    """The three scalars of a case, all of one value where it had none."""
    for name in SCALARS:
        if case.arguments[name] is None:
            device = case.arguments["hidden_states"].device
            case.arguments[name] = torch.full((case.sizes.experts,), value, device=device)
    return [case.arguments[name] for name in SCALARS]


@DEVICES
@pytest.mark.parametrize("mode", ["mxfp4_mxfp8", "mxfp4_bf16"])
def test_ones_of_mxfp4_are_looked_at_again(mode, device):
    case = cl.make(mode, device=device)
    logits = cl.logits_of(case)
    scalars = scalars_of(case)
    wanted = cl.call(case, logits=logits)
    for name, scalar in zip(SCALARS, scalars, strict=True):
        scalar.mul_(3)
        with pytest.raises(NotImplementedError, match=f"{name} holds values other than 1"):
            cl.call(case, logits=logits)
        scalar.fill_(1)
        cl.same(cl.call(case, logits=logits), wanted)


@DEVICES
def test_scalars_of_mxfp4_with_fp8_are_looked_at_again(device):
    case = cl.make("mxfp4_e4m3", device=device)
    logits = cl.logits_of(case)
    scale1, gate1, scale2 = scalars_of(case)
    wanted = cl.call(case, logits=logits)
    scale2.mul_(4)
    with pytest.raises(NotImplementedError, match="output2_scale_scalar is not 1 /"):
        cl.call(case, logits=logits)
    scale2.div_(4)
    scale1[1:].mul_(2)
    gate1[1:].mul_(2)
    with pytest.raises(NotImplementedError, match="output1_scale_gate_scalar differs between"):
        cl.call(case, logits=logits)
    scale1[1:].div_(2)
    gate1[1:].div_(2)
    cl.same(cl.call(case, logits=logits), wanted)
    for scalar in (scale1, gate1):  # the scale of hidden_states alone may change
        scalar.mul_(2)
    assert (cl.call(case, logits=logits) != wanted).any()


def test_scalars_on_a_gpu_are_looked_at_when_they_were_written(monkeypatch):
    assert engine._version(torch.ones(2)) is None  # on the CPU every call looks
    monkeypatch.setattr(engine, "_version", lambda array: array._version)
    looks = []
    seen, one, two = engine._Seen(), torch.ones(2), torch.ones(2)

    def number_of_looks(*arrays):
        seen.ensure(arrays, lambda: looks.append(None))
        return len(looks)

    assert number_of_looks(one, two) == number_of_looks(one, two) == 1
    one.mul_(1)
    assert number_of_looks(one, two) == number_of_looks(one, two) == 2
    assert number_of_looks(one, two[:]) == 3  # another object at the same address
    assert number_of_looks(one) == number_of_looks(one) == 4

    def refuse():
        raise ValueError("refused")

    one.mul_(1)
    for _ in range(2):  # what was refused is looked at again
        with pytest.raises(ValueError, match="refused"):
            seen.ensure((one,), refuse)
    assert number_of_looks(one) == 5


def test_scalars_that_must_be_looked_at_cannot_be_captured(monkeypatch):
    case = cl.make("mxfp4_bf16")
    logits = cl.logits_of(case)
    scalars = scalars_of(case)
    monkeypatch.setattr(engine, "_version", lambda array: array._version)
    wanted = cl.call(case, logits=logits)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "is_capturing", lambda hidden: True)
        cl.same(cl.call(case, logits=logits), wanted)
        scalars[0].mul_(1)
        with pytest.raises(RuntimeError, match="scalars of MXFP4 weights must be looked at"):
            cl.call(case, logits=logits)
    engine._views._pinned.clear()
    engine._plans._pinned.clear()


def test_cuda_graph_replays_with_new_content():
    if not cl.CUDA:
        pytest.skip("no GPU, or a library without its kernels")
    case = cl.make("nvfp4", bias=True, device="cuda", alpha=[1.2] * 8, limit=[0.9] * 8)
    logits = cl.logits_of(case).cuda()
    eager = cl.call(case, logits=logits)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cl.call(case, logits=logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = cl.call(case, logits=logits)
    fi.clear_caches()
    graph.replay()
    torch.cuda.synchronize()
    cl.same(output, eager)
    case.arguments["output2_scale_scalar"] *= 2
    graph.replay()
    torch.cuda.synchronize()
    assert (output.float() != eager.float()).any()


def test_new_arrays_within_a_capture_are_refused(monkeypatch):
    monkeypatch.setattr(ops, "is_capturing", lambda hidden: True)
    fi.clear_caches()
    case = cl.make("bf16", seed=77)
    logits = cl.logits_of(case)
    with pytest.raises(RuntimeError, match="make one call with the same arrays before the capture"):
        cl.call(case, logits=logits)
    monkeypatch.setattr(ops, "is_capturing", lambda hidden: False)
    output = cl.call(case, logits=logits)
    monkeypatch.setattr(ops, "is_capturing", lambda hidden: True)
    cl.same(cl.call(case, logits=logits), output)
    fi.clear_caches()
    cl.same(cl.call(case, logits=logits), output)  # what a graph uses is kept
    engine._views._pinned.clear()
    engine._plans._pinned.clear()
