# SPDX-License-Identifier: Apache-2.0
"""One layer called again and again with other arguments: nothing of an earlier call is believed."""

from __future__ import annotations

import itertools
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import hopyard
import layers
from elsewhere import Elsewhere
from hopyard import arrays, calls

T, H, E, K = layers.TOKENS, layers.HIDDEN, layers.EXPERTS, layers.TOP_K


def as_torch(array):
    """Torch's tensor of a NumPy array; uint16 are bfloat16 bits."""
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def as_numpy(array):
    """Bits of a result, whatever its kind."""
    if not arrays.is_torch(array):
        return np.asarray(array)
    torch = sys.modules["torch"]
    return (array.view(torch.uint16) if array.dtype == torch.bfloat16 else array).numpy()


KINDS = {"numpy": np.array, "torch": as_torch}


@pytest.fixture(params=list(KINDS))
def kind(request):
    if request.param == "torch":
        pytest.importorskip("torch")
    return KINDS[request.param]


@pytest.fixture
def no_torch_as_it_is(monkeypatch):
    """As with a torch that has no fast export: every tensor is converted in Python."""
    monkeypatch.setattr("hopyard.layer.crosses_as_it_is", set())


def test_shapes_dtypes_and_kinds_change_from_call_to_call():
    layer, data = layers.make(num_threads=1)
    wanted = layer(data.bits, logits=data.logits)
    bf16 = hopyard.to_bf16(data.logits)
    wanted_bf16 = layer(data.bits, logits=bf16)
    ids, weights = hopyard.route(data.logits, layer.spec.routing, K)
    routings = [
        ({"logits": data.logits}, wanted),
        ({"logits": bf16}, wanted_bf16),
        ({"ids": ids, "weights": weights}, wanted),
        ({"weights": weights, "ids": ids}, wanted),
        ({"ids": ids.astype(np.int16), "logits": data.logits}, wanted),
    ]
    calls_made = 0
    for tokens, (routing, expected), make in itertools.product(
        (T, 1, 0, 7), routings, KINDS.values()
    ):
        given = {name: make(array[:tokens]) for name, array in routing.items()}
        output = layer(make(data.bits[:tokens]), **given)
        assert tuple(output.shape) == (tokens, H)
        np.testing.assert_array_equal(as_numpy(output), expected[:tokens])
        calls_made += 1
    assert calls_made == 40


def test_every_call_writes_its_own_buffers(kind):
    layer, data = layers.make(num_threads=1)
    hidden = kind(data.bits)
    ids = layers.softmax_route(data.logits)[0]
    wanted = layer(data.bits, logits=data.logits)
    old = None
    for turn in range(3):
        logits = kind(np.roll(data.logits, turn, axis=1))
        replay = kind(np.full((T + turn, K), -9, np.int16))
        out = kind(np.zeros((T, H - 8 * turn), np.uint16))
        load = kind(np.zeros(E, np.int64 if turn == 1 else np.int32))
        assert layer(hidden, logits=logits, out=out, replay_out=replay, load_out=load) is out
        expected = (ids + turn) % E
        np.testing.assert_array_equal(as_numpy(replay)[:T], expected)
        assert (as_numpy(replay)[T:] == -9).all()
        counts = np.bincount(expected.ravel(), minlength=E)
        np.testing.assert_array_equal(as_numpy(load), counts)
        if turn == 0:
            np.testing.assert_array_equal(as_numpy(out), wanted)
        else:
            np.testing.assert_array_equal(as_numpy(old[0]), old[1])  # not written again
        old = (replay, as_numpy(replay).copy())


def test_any_order_of_names_is_the_same_call(kind):
    layer, data = layers.make(num_threads=1)
    ids, weights = hopyard.route(data.logits, layer.spec.routing, K)
    wanted = layer(data.bits, ids=ids, weights=weights)
    given = {"ids": kind(ids), "weights": kind(weights), "num_tokens": T - 3, "accumulate": False}
    for names in list(itertools.permutations((*given, "replay_out", "out")))[::29]:
        replay, out = kind(np.zeros((T, K), np.int16)), kind(np.full((T, H), 7, np.uint16))
        call = {**given, "replay_out": replay, "out": out}
        result = layer(kind(data.bits), **{name: call[name] for name in names})
        assert result is out
        np.testing.assert_array_equal(as_numpy(out)[: T - 3], wanted[: T - 3])
        assert (as_numpy(out)[T - 3 :] == 7).all()
        np.testing.assert_array_equal(as_numpy(replay)[: T - 3], ids[: T - 3])


def test_none_is_the_same_as_nothing(kind):
    layer, data = layers.make(num_threads=1)
    hidden, logits = kind(data.bits), kind(data.logits)
    wanted = as_numpy(layer(hidden, logits=logits))
    absent = dict.fromkeys(hopyard.CallOptions.__annotations__)
    np.testing.assert_array_equal(as_numpy(layer(hidden, **{**absent, "logits": logits})), wanted)
    out = kind(np.zeros((T, H), np.uint16))
    assert layer(hidden, **{**absent, "logits": logits, "out": out}) is out
    np.testing.assert_array_equal(as_numpy(out), wanted)
    fresh = layer(hidden, **{**absent, "logits": logits, "accumulate": False})
    np.testing.assert_array_equal(as_numpy(fresh), wanted)
    with pytest.raises(ValueError, match=r"routing arguments are \[\], wanted exactly one of"):
        layer(hidden, **absent)
    with pytest.raises(ValueError, match=r"routing arguments are \['logits', 'packed'\]"):
        layer(hidden, logits=logits, packed=logits)
    np.testing.assert_array_equal(as_numpy(layer(hidden, packed=None, logits=logits)), wanted)


def test_options_may_be_of_any_kind_of_number(kind):
    layer, data = layers.make(num_threads=1)
    hidden, logits = kind(data.bits), kind(data.logits)
    wanted = as_numpy(layer(hidden, logits=logits))
    start = np.zeros((T, H), np.uint16)
    for yes, no in ((True, False), (1, 0), (np.True_, np.False_), (kind([True]), kind([False]))):
        for flag, times in ((no, 1), (yes, 2)):
            out = kind(start)
            layer(hidden, logits=logits, out=out)
            layer(hidden, logits=logits, out=out, accumulate=flag, finalize=yes)
            sums = hopyard.from_bf16(wanted) * times
            np.testing.assert_array_equal(hopyard.from_bf16(as_numpy(out)), sums)
    for count in (5, np.int64(5), kind(np.array([5], np.int32)), kind(np.array(5, np.int32))):
        part = as_numpy(layer(hidden, logits=logits, num_tokens=count))
        np.testing.assert_array_equal(part[:5], wanted[:5])
        assert not part[5:].any()


def strided(array, make):
    """The same values with other strides."""
    wide = make(np.concatenate([array, array], 1))
    return wide[:, : array.shape[1]]


def wrong_calls(make):
    """Changes of a right call, and what its refusal says."""
    data = layers.arrays()
    ids = np.zeros((T, K), np.int32)
    return {
        "hidden_dtype": ({"hidden": make(data.hidden)}, "hidden has dtype float32, wanted bfloat"),
        "hidden_double": (
            {"hidden": make(data.hidden.astype(np.float64))},
            "hidden has dtype float64, wanted bfloat16",
        ),
        "hidden_half": (
            {"hidden": make(data.hidden.astype(np.float16))},
            "hidden has dtype float16, wanted bfloat16",
        ),
        "hidden_width": ({"hidden": make(data.bits[:, :-1].copy())}, "hidden_states has shape"),
        "hidden_tokens": ({"hidden": make(data.bits[:-1])}, r"logits has shape \[24, 8\]; wanted"),
        "hidden_strides": ({"hidden": strided(data.bits, make)}, "hidden_states .*contiguous"),
        "hidden_scalar": (
            {"hidden": make(np.array(1, np.uint16))},
            r"hidden_states has shape \[\]",
        ),
        "hidden_3d": ({"hidden": make(data.bits[None])}, "hidden_states has shape .*flatten"),
        "hidden_list": ({"hidden": data.bits.tolist()}, "hidden is a list, wanted a NumPy array"),
        "hidden_int": ({"hidden": 5}, "hidden is a int, wanted a NumPy array"),
        "too_many": (
            {
                "hidden": make(np.repeat(data.bits, 2, 0)),
                "logits": make(np.repeat(data.logits, 2, 0)),
            },
            "hidden_states has 48 tokens; the plan was made for max_tokens=24",
        ),
        "logits_dtype": ({"logits": make(data.logits.astype(np.float64))}, "logits is f64; wanted"),
        "logits_complex": ({"logits": make(data.logits.astype(np.complex64))}, "logits has dtype"),
        "logits_shape": ({"logits": make(data.logits[:, :-1].copy())}, "logits has shape"),
        "logits_strides": ({"logits": strided(data.logits, make)}, "logits .*contiguous"),
        "logits_int": ({"logits": 3}, "logits is a int, wanted a NumPy array, a torch tensor"),
        "logits_bool": ({"logits": True}, "logits is a bool, wanted a NumPy array"),
        "logits_text": ({"logits": "softmax"}, "logits is a str, wanted a NumPy array"),
        "logits_gpu": ({"logits": Elsewhere(data.logits, index=1)}, r"logits is a CUDA tensor"),
        "two_routings": ({"packed": make(ids)}, r"routing arguments are \['logits', 'packed'\]"),
        "replay_dtype": ({"replay_out": make(np.zeros((T, K), np.int32))}, "replay is i32; wanted"),
        "replay_rows": (
            {"replay_out": make(np.zeros((T - 1, K), np.int16))},
            "replay has 23 rows; wanted at least 24",
        ),
        "replay_strides": (
            {"replay_out": strided(np.zeros((T, K), np.int16), make)},
            "replay .*contiguous",
        ),
        "out_dtype": (
            {"out": make(np.zeros((T, H), np.float32))},
            "out has dtype float32, wanted bfloat16",
        ),
        "out_shape": ({"out": make(np.zeros((T, H + 1), np.uint16))}, "output has 65 columns"),
        "out_rows": ({"out": make(np.zeros((T + 1, H), np.uint16))}, "output has shape"),
        "ids_unread": ({"shared_weights": make(data.logits)}, "shared_weights is given, but"),
        "num_tokens": ({"num_tokens": T + 1}, r"num_tokens=25; wanted 0 \.\. 24"),
        "num_tokens_dtype": ({"num_tokens": make(np.array([3], np.int64))}, "num_tokens is i64"),
        "num_tokens_text": ({"num_tokens": "all"}, "num_tokens is a str, wanted a NumPy array"),
        "accumulate": ({"accumulate": True}, "accumulate is set without out"),
        "finalize": ({"finalize": False}, "finalize is False without rows_out"),
        "stream": ({"stream": 0}, "stream is given, but the device is the CPU"),
    }


@pytest.mark.parametrize("name", list(wrong_calls(np.array)))
def test_a_wrong_argument_after_a_right_one_is_refused_in_the_same_words(name, kind):
    change, message = wrong_calls(kind)[name]
    layer, data = layers.make(num_threads=1)
    right = {"hidden": kind(data.bits), "logits": kind(data.logits)}

    def run(**changes):
        call = {**right, **changes}
        return layer(call.pop("hidden"), **call)

    def refusal():
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            run(**change)
        assert caught.value.__cause__ is None
        return f"{type(caught.value).__name__}: {caught.value}"

    first = refusal()
    assert re.search(message, first), first
    # Right calls with arguments of the same names, as far as there are any.
    buffers = {
        "replay_out": kind(np.zeros((T, K), np.int16)),
        "out": kind(np.zeros((T, H), np.uint16)),
        "num_tokens": T,
    }
    wanted = as_numpy(run())
    for _ in range(3):
        run(**{n: buffers[n] for n in change if n in buffers})
        assert refusal() == first
        np.testing.assert_array_equal(as_numpy(run()), wanted)
    assert len(layer._workspaces._free[0]) == 1  # refused calls have given theirs back


def test_refused_calls_write_nothing(kind):
    layer, data = layers.make(num_threads=1)
    for change, _ in wrong_calls(kind).values():
        outputs = {
            "out": kind(np.full((T, H), 7, np.uint16)),
            "replay_out": kind(np.full((T, K), 7, np.int16)),
            "load_out": kind(np.full(E, 7, np.int32)),
        }
        call = {"hidden": kind(data.bits), "logits": kind(data.logits), **outputs, **change}
        if "accumulate" in change:  # with `out` it is right
            del call["out"]
        with pytest.raises((ValueError, NotImplementedError)):
            layer(call.pop("hidden"), **call)
        for array in outputs.values():
            assert (as_numpy(array) == as_numpy(array).ravel()[0]).all()
            assert as_numpy(array).ravel()[0] == 7


def test_tensors_without_memory_are_refused_after_right_calls():
    torch = pytest.importorskip("torch")
    layer, data = layers.make(num_threads=1)
    hidden, logits = as_torch(data.bits), as_torch(data.logits)
    wanted = layer(hidden, logits=logits)
    with pytest.raises(ValueError, match="logits is a meta tensor, which has no memory; wanted"):
        layer(hidden, logits=logits.to("meta"))
    with pytest.raises(ValueError, match="logits of dtype float32 cannot be shared through DLPack"):
        layer(hidden, logits=logits.to_sparse())
    with pytest.raises(ValueError, match="hidden is a meta tensor, which has no memory; wanted"):
        layer(hidden.to("meta"), logits=logits)
    assert torch.equal(layer(hidden, logits=logits), wanted)


@pytest.mark.usefixtures("no_torch_as_it_is")
def test_a_torch_without_the_fast_export_gives_the_same_bits(kind):
    layer, data = layers.make(num_threads=1)
    replay, out = kind(np.zeros((T, K), np.int16)), kind(np.zeros((T, H), np.uint16))
    logits = kind(data.logits)
    result = layer(kind(data.bits), logits=logits, out=out, replay_out=replay, num_tokens=T)
    assert result is out
    np.testing.assert_array_equal(as_numpy(out), layer(data.bits, logits=data.logits))
    np.testing.assert_array_equal(as_numpy(replay), layers.softmax_route(data.logits)[0])


def test_which_tensors_of_torch_cross_as_they_are(monkeypatch):
    torch = pytest.importorskip("torch")
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert arrays._exports_every_dtype(torch)
        arrays.as_tensor(torch.zeros(1), "x")
        assert {torch.Tensor, torch.nn.Parameter} <= arrays.crosses_as_it_is
    monkeypatch.setenv("TVM_FFI_SKIP_DLPACK_C_EXCHANGE_API", "1")
    assert not arrays._exports_every_dtype(torch)
    monkeypatch.delenv("TVM_FFI_SKIP_DLPACK_C_EXCHANGE_API")
    assert not arrays._exports_every_dtype(SimpleNamespace(Tensor=object))

    def refuse(tensor):
        raise BufferError(f"{tensor.dtype} has no DLPack number")

    monkeypatch.setattr(arrays, "tvm_ffi", SimpleNamespace(from_dlpack=refuse))
    assert not arrays._exports_every_dtype(torch)


QUANTISED = {
    "fp8_per_tensor": ("fp8_per_tensor", "fp8_per_tensor", "float8_e4m3fn", None),
    "fp8_block128": ("fp8_block128", "fp8_block1x128", "float8_e4m3fn", None),
    "mxfp8": ("mxfp8", "mxfp8", "float8_e4m3fn", "float8_e8m0fnu"),
    "nvfp4_per_token": ("nvfp4", "nvfp4", "float4_e2m1fn_x2", "float8_e4m3fn"),
}


@pytest.mark.parametrize("activations", list(QUANTISED))
@pytest.mark.parametrize("fast", [True, False])
def test_names_of_bytes_do_not_matter(activations, fast, monkeypatch):
    """Codes and scales as torch's own types, as bytes, and as NumPy's bytes."""
    torch = pytest.importorskip("torch")
    if not fast:
        monkeypatch.setattr("hopyard.layer.crosses_as_it_is", set())
    weights, form, code_type, scale_type = QUANTISED[activations]
    if not hasattr(torch, code_type):
        pytest.skip(f"torch has no {code_type}")
    data = layers.arrays(3, hidden=256, width=128)
    spec = layers.spec(
        hidden_size=256, intermediate_size=128, weights=weights, activations=activations
    )
    matrices = [
        hopyard.Matrix.from_quantized(hopyard.quantize(values, weights))
        for values in (data.gemm1, data.down)
    ]
    experts = {"gemm1": matrices[0], "gemm2": matrices[1]}
    if activations == "fp8_per_tensor":
        scale = np.full(1, 0.02, np.float32)
        experts |= {"gemm1_input_scale": scale, "gemm2_input_scale": scale}
    layer = hopyard.MoeLayer(
        spec, hopyard.Weights(spec, hopyard.ExpertWeights(**experts)), T, num_threads=1
    )
    codes = hopyard.quantize(data.hidden, form)
    call = {"logits": data.logits}
    if activations != "fp8_per_tensor":
        call["hidden_scales"] = np.asarray(codes.scales)
    if activations == "nvfp4_per_token":
        call["token_scales"] = np.full(T, codes.global_scale, np.float32)
    out = {"out": np.zeros((T, 256), np.uint16)} if activations == "nvfp4_per_token" else {}
    wanted = np.array(layer(np.asarray(codes.codes), **call, **out))
    assert wanted.any()

    def typed(array, name):
        tensor = torch.from_numpy(np.array(array))
        return tensor if name is None else tensor.view(getattr(torch, name))

    # The last pair names other numbers of a byte than the format's: bytes are what it says.
    other = "float8_e8m0fnu" if scale_type == "float8_e4m3fn" else scale_type
    for names in ((None, None), (code_type, scale_type), ("float8_e4m3fn", other)):
        given = {name: torch.from_numpy(array) for name, array in call.items()}
        if "hidden_scales" in call:
            given["hidden_scales"] = typed(call["hidden_scales"], names[1])
        if out:
            given["out"] = torch.zeros(T, 256, dtype=torch.bfloat16)
        result = layer(typed(codes.codes, names[0]), **given)
        np.testing.assert_array_equal(as_numpy(result), wanted)


def test_forms_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(calls, "_MOST_FORMS", 5)
    monkeypatch.setattr(calls, "_forms", {})
    layer, data = layers.make(num_threads=1)
    wanted = layer(data.bits, logits=data.logits)
    names = ("logits", "replay_out", "load_out", "num_tokens")
    for order in itertools.permutations(names):
        call = {
            "logits": data.logits,
            "replay_out": np.zeros((T, K), np.int16),
            "load_out": np.zeros(E, np.int32),
            "num_tokens": T,
        }
        np.testing.assert_array_equal(layer(data.bits, **{n: call[n] for n in order}), wanted)
        assert 0 < len(calls._forms) <= 5


def test_every_option_has_a_field():
    assert calls._FIELDS.keys() == hopyard.CallOptions.__annotations__.keys()
    with pytest.raises(ValueError, match="a layer's call has no field 'logit'"):
        calls.lib.layer_form(["logit"], "logits")
    form = calls.form_of(("logits",))
    layer, data = layers.make(num_threads=1)
    workspace = layer._workspaces.take(0, uses_torch=False)
    state = (layer._plan, layer.weights._handle, form.handle, workspace, 0)
    tensors = [arrays.as_tensor(a, "x") for a in (data.bits, np.zeros((T, H), np.uint16))]
    with pytest.raises(ValueError, match="a call has 2 arguments, its form 3"):
        sys.modules["hopyard.layer"].call_layer(*state, *tensors)


def count_calls(run):
    """Function calls, of Python and of C, that a call makes."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    run()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("name", "most"), [("torch", 60), ("numpy", 100)])
def test_a_call_is_a_few_calls(name, most):
    """What bench_overhead.py times, counted: 42 and 81; with maps for arguments 93 and 157. Tensors
    of torch before 2.10, which has no fast export, take 99."""
    make = KINDS[name]
    if name == "torch" and not arrays._exports_every_dtype(pytest.importorskip("torch")):
        most = 110
    layer, data = layers.make(num_threads=1)
    ids, weights = hopyard.route(data.logits, layer.spec.routing, K)
    hidden, given = make(data.bits), {"ids": make(ids), "weights": make(weights)}
    assert count_calls(lambda: layer(hidden, **given)) <= most
