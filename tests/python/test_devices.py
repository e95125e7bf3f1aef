# SPDX-License-Identifier: Apache-2.0
"""Devices and streams as far as they can be judged without a GPU."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import hopyard
import layers
from elsewhere import Elsewhere, capture_on, has_gpu_backend, torch_elsewhere
from hopyard import arrays, devices
from hopyard._library import lib

NO_BACKEND = "this build has no CUDA backend; plan for the CPU, or configure the build"


def needs_no_backend():
    if has_gpu_backend():
        pytest.skip("this build has a CUDA backend")


@pytest.mark.parametrize(
    ("device", "index"),
    [
        ("cpu", -1),
        ("cpu:0", -1),
        ("cuda", 0),
        ("cuda:0", 0),
        ("cuda:13", 13),
        (SimpleNamespace(type="cpu", index=None), -1),
        (SimpleNamespace(type="cuda", index=2), 2),
        (SimpleNamespace(type="cuda", index=None), 0),
    ],
)
def test_devices_have_numbers(device, index):
    assert devices.parse_device(device) == index
    name = devices.device_name(index)
    assert devices.parse_device(name) == index


def test_torch_devices_have_numbers():
    torch = pytest.importorskip("torch")
    assert devices.parse_device(torch.device("cpu")) == -1
    assert devices.parse_device(torch.device("cuda", 3)) == 3


def test_a_gpu_without_a_number_is_that_of_the_arrays():
    assert devices.parse_device("cuda", 5) == 5
    assert devices.parse_device("cuda", -1) == 0
    assert devices.parse_device("cuda:1", 5) == 1


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cpu:1", "", 0, None, ["cuda"]])
def test_bad_devices(device):
    with pytest.raises(ValueError, match=r"wanted 'cpu', 'cuda', 'cuda:N' or a torch\.device"):
        hopyard.explain(layers.spec(), device=device)


def test_explain_needs_no_gpu():
    answer = hopyard.explain(layers.spec(), device="cuda:7", max_tokens=64)
    if answer.supported:
        assert any("GEMM1" in c.reason for c in answer.candidates if c.chosen)
    else:
        assert NO_BACKEND in answer.reason
    assert hopyard.explain(layers.spec()).supported


def test_layers_know_their_device():
    layer, _ = layers.make()
    assert (layer.device, layer.weights.device) == ("cpu", "cpu")
    assert layer.weights.to("cpu") is layer.weights
    same, _ = layers.make(device="cpu")
    assert same.device == "cpu"


def test_a_layer_for_a_gpu_wants_weights_there():
    data = layers.arrays()
    weights = data.weights(layers.spec())
    if has_gpu_backend():
        with pytest.raises(ValueError, match=r"weights are on cpu, wanted cuda:1, .*Weights.to"):
            hopyard.MoeLayer(layers.spec(), weights, 4, device="cuda:1")
    else:
        with pytest.raises(NotImplementedError, match=NO_BACKEND):
            hopyard.MoeLayer(layers.spec(), weights, 4, device="cuda:1")
        with pytest.raises(NotImplementedError, match=NO_BACKEND):
            weights.to("cuda")


ON_GPU = r"is a CUDA tensor \(cuda:1\); wanted host memory, the plan's device is the CPU: copy it"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("hidden", "hidden_states"),
        ("logits", "logits"),
        ("out", "output"),
        ("replay_out", "replay"),
        ("load_out", "expert_load"),
        ("num_tokens", "num_tokens"),
    ],
)
def test_a_layer_on_the_cpu_refuses_gpu_arrays(name, field):
    layer, data = layers.make()
    call = {
        "hidden": data.bits,
        "logits": data.logits,
        "out": np.zeros((layers.TOKENS, layers.HIDDEN), np.uint16),
        "replay_out": np.zeros((layers.TOKENS, layers.TOP_K), np.int16),
        "load_out": np.zeros(layers.EXPERTS, np.int32),
        "num_tokens": np.array([3], np.int32),
    }
    call[name] = Elsewhere(call[name], index=1)
    with pytest.raises(ValueError, match=f"{field} {ON_GPU}"):
        layer(call.pop("hidden"), **call)
    assert (np.asarray(getattr(call["out"], "_array", call["out"])) == 0).all()


def test_weights_on_two_devices_are_refused():
    data = layers.arrays()
    gemm1 = Elsewhere(hopyard.to_bf16(data.gemm1), index=1)
    with pytest.raises(ValueError, match=rf"weights.routed.gemm1.values {ON_GPU}"):
        data.weights(layers.spec(), gemm1=gemm1)


@pytest.mark.parametrize("kind", [3, 8])
def test_only_host_memory_and_cuda_are_known(kind):
    layer, data = layers.make()
    hidden = Elsewhere(data.bits, kind=kind)  # 3: host memory that CUDA has pinned; 8: Metal
    if kind == 3:
        output = layer(hidden, logits=data.logits)
        np.testing.assert_array_equal(output, layer(data.bits, logits=data.logits))
    else:
        with pytest.raises(ValueError, match="DLPack device type 8, wanted the CPU or a CUDA GPU"):
            layer(hidden, logits=data.logits)


def test_a_cpu_has_no_streams():
    layer, data = layers.make()
    with pytest.raises(ValueError, match="stream is given, but the device is the CPU"):
        layer(data.bits, logits=data.logits, stream=0)
    with pytest.raises(ValueError, match="stream is given"):
        hopyard.route(data.logits, hopyard.RoutingRule.renormalize(), 2, stream=7)
    with pytest.raises(ValueError, match="stream is given"):
        layer.weights.update(0, "gemm2", hopyard.to_bf16(data.down[0]), stream=7)


def test_streams_are_handles():
    assert devices.stream_of(0, np.int64(7), uses_torch=False) == 7
    assert devices.stream_of(0, None, uses_torch=False) == 0
    assert devices.stream_of(0, 1, uses_torch=False) == 0  # CUDA's other name for it
    with pytest.raises(ValueError, match="stream is 2, CUDA's per-thread default stream"):
        devices.stream_of(0, 2, uses_torch=False)
    for stream in (-1, 1.5, SimpleNamespace(cuda_stream=3)):
        with pytest.raises(ValueError, match="wanted the handle of a CUDA stream as an int"):
            devices.stream_of(0, stream, uses_torch=True)


def test_a_capture_is_asked_of_the_device_of_the_tensor(monkeypatch):
    torch = pytest.importorskip("torch")
    capture_on(monkeypatch, 1)
    assert devices.is_capturing(torch_elsewhere("cuda:1", 2))
    for other in (torch_elsewhere("cuda:0", 2), torch.zeros(2), np.zeros(2)):
        assert not devices.is_capturing(other)


def test_arrays_are_asked_for_the_stream_that_uses_them():
    array = Elsewhere(np.zeros(4, np.float32), index=2)
    assert devices.device_of(array) == 2
    tensor = arrays.as_tensor(array, "x", 99)
    arrays.as_tensor(array, "x")
    assert array.streams == [99, 1]  # DLPack's 1 is the legacy default stream
    assert tuple(tensor.__dlpack_device__()) == (2, 2)


class Frameworks:
    """Stands for the streams of torch and CuPy; remembers on which one arrays were made."""

    def __init__(self):
        self.now = 0
        self.made = []

    def current(self, device=None):
        return SimpleNamespace(cuda_stream=self.now, ptr=self.now)

    @contextlib.contextmanager
    def enter(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def watch(self, function):
        def watched(*args, **options):
            self.made.append(self.now)
            return function(*args, **options)

        return watched


@pytest.mark.parametrize("fill", [None, -1])
def test_torch_fills_on_the_stream_that_uses_the_array(fill, monkeypatch):
    torch = pytest.importorskip("torch")
    fake_tensors = pytest.importorskip("torch._subclasses").FakeTensorMode
    seen = Frameworks()
    monkeypatch.setattr(torch.cuda, "current_stream", seen.current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda place: 0)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, place: stream)
    monkeypatch.setattr(torch.cuda, "stream", seen.enter)
    for name in ("empty", "full"):
        monkeypatch.setattr(torch, name, seen.watch(getattr(torch, name)))
    with fake_tensors():
        like = torch.zeros(2, 3, device="cuda")
        for stream, before in ((99, 0), (0, 0), (0, 7), (7, 7), (None, 7)):
            seen.now, seen.made = before, []
            made = arrays.empty_like_kind(like, (4, 2), "int32", fill=fill, stream=stream)
            assert (made.device, made.dtype, seen.now) == (like.device, torch.int32, before)
            assert set(seen.made) == {before if stream is None else stream}


@pytest.mark.parametrize("fill", [None, -1])
def test_cupy_fills_on_the_stream_that_uses_the_array(fill, monkeypatch):
    seen = Frameworks()

    class FakeArray(Elsewhere):
        device = contextlib.nullcontext()

    stream = SimpleNamespace(null=seen.enter(0))
    cuda = SimpleNamespace(
        get_current_stream=seen.current, ExternalStream=seen.enter, Stream=stream
    )
    makers = {name: seen.watch(getattr(np, name)) for name in ("empty", "full")}
    monkeypatch.setitem(
        sys.modules, "cupy", SimpleNamespace(ndarray=FakeArray, cuda=cuda, **makers)
    )
    like = FakeArray(np.zeros((2, 3), np.float32))
    for stream, before in ((99, 0), (0, 7), (7, 7), (None, 7)):
        seen.now = before
        arrays.empty_like_kind(like, (4, 2), "int32", fill=fill, stream=stream)
    assert seen.made == [99, 0, 7, 7]


class Made(Exception):
    """Ends a call where it makes its result."""


def test_results_are_made_for_the_stream_of_the_call(monkeypatch):
    streams = []

    def make(*args, stream=None, **options):
        streams.append(stream)
        raise Made

    for module in ("layer", "routing"):
        monkeypatch.setattr(f"hopyard.{module}.empty_like_kind", make)
    layer, data = layers.make()
    monkeypatch.setattr(layer, "_device", 0)
    hidden, logits = Elsewhere(data.bits), Elsewhere(data.logits)
    with pytest.raises(Made):
        layer(hidden, logits=logits, num_tokens=3, stream=99)
    with pytest.raises(Made):
        hopyard.route(logits, hopyard.RoutingRule.renormalize(), 2, num_tokens=3, stream=98)
    with pytest.raises(Made):
        hopyard.fused_topk_deepseek(logits, logits, 4, 2, 2, 1.0, stream=97)
    assert streams == [99, 98, 97]


def test_quantize_and_dequantize_run_on_the_cpu():
    source = Elsewhere(np.zeros((2, 32), np.float32), index=1)
    remedy = "is on cuda:1, wanted host memory: {} runs on the CPU; pass a copy in host memory"
    with pytest.raises(ValueError, match="source " + remedy.format("quantize")):
        hopyard.quantize(source, "mxfp8")
    with pytest.raises(ValueError, match="values " + remedy.format("to_bf16")):
        hopyard.to_bf16(source)
    with pytest.raises(ValueError, match="bits " + remedy.format("from_bf16")):
        hopyard.from_bf16(source)
    done = hopyard.quantize(np.zeros((2, 32), np.float32), "mxfp8")
    moved = hopyard.Quantized("mxfp8", done.codes, Elsewhere(done.scales, index=1), 1.0, 32)
    with pytest.raises(ValueError, match="quantized.scales " + remedy.format("dequantize")):
        hopyard.dequantize(moved)


def test_route_refuses_a_gpu_without_a_backend():
    needs_no_backend()
    logits = Elsewhere(np.zeros((2, 8), np.float32))
    with pytest.raises(NotImplementedError, match=NO_BACKEND):
        hopyard.route(logits, hopyard.RoutingRule.renormalize(), 2)


def test_nothing_of_torch_is_needed(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert devices.parse_device("cuda") == 0
    assert not arrays.is_torch(np.zeros(1))
    layer, data = layers.make()
    assert layer(data.bits, logits=data.logits).dtype == np.uint16


def test_the_library_gives_memory_of_its_own():
    made = lib.new_tensor([3, 5], "bfloat16", -1)
    assert (made.shape, str(made.dtype)) == ((3, 5), "bfloat16")
    assert made.data_ptr() % 256 == 0
    counts = lib.new_tensor([4], "int32", -1)
    assert not np.from_dlpack(counts).any()
    lib.copy_tensor(arrays.as_tensor(np.full(4, -1, np.int32), "x"), counts)
    np.testing.assert_array_equal(np.from_dlpack(counts), [-1] * 4)
    with pytest.raises(ValueError, match="source is not contiguous or has another size"):
        lib.copy_tensor(arrays.as_tensor(np.zeros(5, np.int32), "x"), counts)


def test_an_int_is_the_same_as_fewer_rows():
    layer, data = layers.make()
    whole = layer(data.bits[:5], logits=data.logits[:5])
    part = layer(data.bits, logits=data.logits, num_tokens=5)
    np.testing.assert_array_equal(part[:5], whole)
    assert not part[5:].any()
    with pytest.raises(ValueError, match="logits has 23 rows; wanted 24, as many as hidden_states"):
        layer(data.bits, logits=data.logits[:23], num_tokens=5)
    with pytest.raises(
        ValueError, match=r"num_tokens=25; wanted 0 \.\. 24, the rows of hidden_states"
    ):
        layer(data.bits, logits=data.logits, num_tokens=25)
    rows = np.zeros((24 * 2 - 1, 64), np.uint16)
    places = np.zeros((24, 2), np.int32)
    with pytest.raises(ValueError, match=r"rows has 47 rows; wanted 48, .* tokens x slots"):
        layer(data.bits, logits=data.logits, num_tokens=5, rows_out=rows, slot_to_row_out=places)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            "mxfp4",
            r"weights.packed=true, but the weights lie on the CPU, .*wanted weights on a GPU",
        ),
        ("bf16", r"weights.packed=true, but bf16 weights have no packed order; wanted mxfp4 or"),
    ],
)
def test_weights_on_the_cpu_are_not_packed(weights, message):
    spec = layers.spec(weights=weights)
    data = layers.arrays()
    matrices = {"gemm1": data.gemm1, "gemm2": data.down}
    if weights == "bf16":
        made = {name: hopyard.Matrix(hopyard.to_bf16(of)) for name, of in matrices.items()}
    else:
        made = {
            name: hopyard.Matrix.from_quantized(hopyard.quantize(of, weights))
            for name, of in matrices.items()
        }
    with pytest.raises(ValueError, match=message):
        hopyard.Weights(spec, hopyard.ExpertWeights(**made), packed=True)
    plain = hopyard.Weights(spec, hopyard.ExpertWeights(**made))
    assert set(vars(plain.orders).values()) == {"k_major"}
    with pytest.raises(ValueError, match=r"lie on cpu as they are; copy them to a GPU"):
        plain.to("cpu", packed=True)


def test_what_can_be_packed():
    def can(weights, activations="bf16", **more):
        return hopyard.can_pack(layers.spec(weights=weights, activations=activations, **more))

    assert can("mxfp4")
    assert can("mxfp4", "fp8_per_token")
    assert can("nvfp4", "nvfp4")
    assert not can("nvfp4", "fp8_per_token")
    assert not can("bf16")
    assert can("bf16", shared=hopyard.SharedExperts(count=1, weights="mxfp4"))
