# SPDX-License-Identifier: Apache-2.0
"""The package itself: import, errors, array kinds, lifetime, threads, updates."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import hopyard
import layers

IMPORT_PROBE = """
import sys, time
events = []
forbidden = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")
sys.addaudithook(lambda name, _: events.append(name) if name.startswith(forbidden) else None)
start = time.perf_counter()
import hopyard
seconds = time.perf_counter() - start
print(repr((seconds, "torch" in sys.modules, events)))
"""


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


def test_import_is_quick_and_quiet():
    done = run_python(IMPORT_PROBE)
    assert done.returncode == 0, done.stderr
    seconds, torch_imported, events = eval(done.stdout)
    assert not torch_imported
    assert events == []
    assert seconds < 2


def test_import_works_with_torch_before_or_after():
    pytest.importorskip("torch")
    for order in ("import torch, hopyard", "import hopyard, torch"):
        code = f"{order}\nx = torch.zeros(2, 32)\nprint(hopyard.quantize(x, 'mxfp8').codes.dtype)"
        done = run_python(code)
        assert done.stdout.strip() == "torch.float8_e4m3fn", done.stderr


def test_missing_extension_says_what_to_do(tmp_path):
    done = run_python("import hopyard", HOPYARD_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "HOPYARD_LIBRARY" in done.stderr
    assert "pip install" in done.stderr


def test_public_names_have_docstrings():
    for name in hopyard.__all__:
        if name not in ("Array", "Format"):
            assert getattr(hopyard, name).__doc__, name


def test_spec_properties():
    spec = layers.spec(
        shared=hopyard.SharedExperts(count=1), local=hopyard.ExpertMap("range", 2, 3)
    )
    assert (spec.num_local_experts, spec.slots_per_token, spec.gemm1_rows) == (3, 3, 64)
    plain = layers.spec(activation=hopyard.Activation("relu2"))
    assert plain.gemm1_rows == 32
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.top_k = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"top_k": 9}, "top_k"),
        ({"num_experts": 4096}, "num_experts"),
        ({"weights": "bf17"}, "'bf17' is not known; wanted one of bf16"),
        ({"activations": "fp3"}, "'fp3' is not known; wanted one of bf16"),
        ({"activation": hopyard.Activation("swish")}, "'swish' is not known; wanted one of swiglu"),
        ({"activation": hopyard.Activation(limit=-1.0)}, "limit"),
        ({"activation": hopyard.Activation(alpha=(1.0, 2.0))}, "activation.alpha has 2 values"),
        ({"activation": hopyard.Activation(alpha=())}, "activation.alpha is empty"),
        ({"local": hopyard.ExpertMap("rank")}, "local.kind is 'rank', wanted one of all"),
        ({"local": hopyard.ExpertMap("range", 4, 5)}, "local.offset=4 with local.count=5"),
        ({"routing": hopyard.RoutingRule(weight="w")}, "routing.weight is 'w'"),
    ],
)
def test_bad_specs(changes, message):
    with pytest.raises(ValueError, match=message):
        hopyard.explain(layers.spec(**changes))


def test_wrong_types_are_value_errors():
    with pytest.raises(ValueError, match="top_k has type"):
        hopyard.explain(layers.spec(top_k="two"))
    with pytest.raises(ValueError, match="max_tokens has type"):
        hopyard.explain(layers.spec(), max_tokens="many")


def test_unsupported_specs():
    spec = layers.spec(weights="mxint4", activations="nvfp4")
    answer = hopyard.explain(spec)
    assert not answer.supported
    assert "mxint4" in answer.reason
    assert "nvfp4" in answer.reason
    data = layers.arrays()
    with pytest.raises(NotImplementedError, match="mxint4"):
        hopyard.MoeLayer(spec, data.weights(layers.spec()), max_tokens=4)


def test_explain_names_the_kernel_and_takes_it_back_as_a_tactic():
    layer, data = layers.make()
    answer = layer.explain()
    assert answer.supported
    chosen = [c.kernel for c in answer.candidates if c.chosen]
    assert len(chosen) == 1
    assert chosen[0] in str(answer)
    assert all(c.reason for c in answer.candidates)
    want = layer(data.bits, logits=data.logits)
    forced, _ = layers.make(tactic=chosen[0])
    np.testing.assert_array_equal(forced(data.bits, logits=data.logits), want)
    with pytest.raises((ValueError, NotImplementedError), match="cpu_magic"):
        layers.make(tactic="cpu_magic")


def test_weights_of_another_spec_are_refused():
    data = layers.arrays()
    weights = data.weights(layers.spec())
    with pytest.raises(ValueError, match="top_k=2, wanted top_k=3"):
        hopyard.MoeLayer(layers.spec(top_k=3), weights, max_tokens=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda d: {"gemm1": d.gemm1}, r"hopyard.to_bf16\(weights.routed.gemm1.values\)"),
        (lambda d: {"gemm1": d.bits}, "weights.routed.gemm1.values has shape"),
        (lambda d: {"gemm1": None}, "neither gemm1 nor gate and up"),
        (lambda d: {"gate": hopyard.to_bf16(d.gate)}, "both gemm1 and gate/up"),
        (lambda d: {"gemm1": "weights"}, "is a str, wanted a NumPy array"),
        (lambda d: {"gemm1": list(hopyard.to_bf16(d.gemm1))[:3]}, "3 per-expert tensors; wanted 8"),
        (lambda d: {"row_order": "gate"}, "row_order is 'gate', wanted one of up_gate"),
        (
            lambda d: {"gemm1": hopyard.Matrix(hopyard.to_bf16(d.gemm1), major="n")},
            "major is 'n', wanted one of k, mn, block_k",
        ),
        (
            lambda d: {"gemm1": hopyard.Matrix(hopyard.to_bf16(d.gemm1), scales=d.logits)},
            "bf16 has no such scales",
        ),
        (
            lambda d: {"gemm1": hopyard.Matrix(hopyard.to_bf16(d.gemm1), bias=d.logits)},
            "bias",
        ),
        (lambda d: {"gemm2": hopyard.to_bf16(d.down)[:, :, ::2]}, "gemm2.values"),
        (lambda d: {"gemm1": np.zeros((8, 1, 1, 1, 1), np.uint16)}, "5 dimensions"),
        (lambda d: {"gemm1": np.zeros((8, 64, 64), np.complex64)}, "dtype complex64"),
        (lambda d: {"gemm1": np.zeros((8, 64, 64), object)}, "cannot be shared through DLPack"),
    ],
)
def test_bad_weights(changes, message):
    data = layers.arrays()
    with pytest.raises(ValueError, match=message):
        data.weights(layers.spec(), **changes(data))


def call_with(**changes):
    layer, data = layers.make()
    call = {"logits": data.logits, **changes}
    hidden = call.pop("hidden", data.bits)
    return layer(hidden, **call)


ZERO_IDS = np.zeros((layers.TOKENS, layers.TOP_K), np.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": layers.arrays().hidden}, r"float32.*hopyard.to_bf16\(hidden\)"),
        ({"hidden": np.zeros((layers.TOKENS, 64), np.float16)}, "float16.*wanted bfloat16"),
        ({"hidden": np.zeros((layers.TOKENS, 65), np.uint16)}, "hidden"),
        ({"hidden": np.zeros((layers.TOKENS, 128), np.uint16)[:, ::2]}, "contiguous"),
        ({"hidden": np.zeros((25, 64), np.uint16)}, "max_tokens"),
        ({"logits": None}, r"routing arguments are \[\], wanted exactly one of"),
        ({"ids": ZERO_IDS, "weights": ZERO_IDS}, "wanted exactly one of"),
        ({"logits": np.zeros((3, 8), np.float32)}, "logits has shape"),
        ({"logits": np.zeros((24, 8), np.float64)}, "logits is f64"),
        ({"ids": np.zeros((24, 3), np.int32)}, "ids"),
        ({"ids": np.zeros((24, 2), np.int64)}, "ids"),
        ({"num_tokens": 25}, "num_tokens"),
        ({"num_tokens": -1}, "num_tokens"),
        ({"num_tokens": np.zeros(1, np.int64)}, "num_tokens"),
        ({"replay_out": np.zeros((24, 2), np.int32)}, "replay"),
        ({"replay_out": np.zeros((23, 2), np.int16)}, "replay"),
        ({"load_out": np.zeros(7, np.int32)}, "load"),
        ({"out": np.zeros((24, 65), np.uint16)}, "output"),
        ({"out": np.zeros((24, 64), np.float32)}, r"out has dtype float32, wanted bfloat16"),
        ({"accumulate": True}, "accumulate is set without out"),
        ({"shared_weights": np.zeros((24, 1), np.float32)}, "shared_weights"),
        ({"expert_table": np.zeros(8, np.int32)}, "expert_table"),
        ({"gemm1_delta": np.zeros((24, 2, 3), np.uint16)}, "gemm1_delta"),
        ({"routing_bias": np.zeros(3, np.float32)}, "bias"),
        ({"logits": [[0.0] * 8] * 24}, "logits is a list, wanted a NumPy array"),
    ],
)
def test_bad_calls(changes, message):
    with pytest.raises(ValueError, match=message):
        call_with(**changes)


def test_unknown_arguments():
    with pytest.raises(TypeError, match="logit"):
        call_with(logit=1)
    layer, _ = layers.make()
    with pytest.raises(TypeError, match="scale"):
        layer.weights.update(0, "gate", scale=1)


def test_read_only_outputs_are_refused_and_inputs_are_not():
    layer, data = layers.make()
    hidden, logits = data.bits, data.logits.copy()
    hidden.flags.writeable = logits.flags.writeable = False
    output = layer(hidden, logits=logits)
    frozen = np.zeros_like(output)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        layer(hidden, logits=logits, out=frozen)
    assert (frozen == 0).all()


def test_nothing_is_written_by_a_refused_call():
    layer, data = layers.make()
    out = np.full((layers.TOKENS, layers.HIDDEN), 5, np.uint16)
    replay = np.full((layers.TOKENS, layers.TOP_K), 5, np.int16)
    load = np.full(layers.EXPERTS, 5, np.int16)  # wrong dtype
    with pytest.raises(ValueError, match="load"):
        layer(data.bits, logits=data.logits, out=out, replay_out=replay, load_out=load)
    assert (out == 5).all()
    assert (replay == 5).all()


def test_dlpack_arrays_of_other_libraries():
    """Anything with __dlpack__ is an input; outputs are NumPy then."""

    class Foreign:
        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    layer, data = layers.make()
    output = layer(Foreign(data.bits), logits=Foreign(data.logits))
    np.testing.assert_array_equal(output, layer(data.bits, logits=data.logits))


def test_ml_dtypes_arrays():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layer, data = layers.make()
    output = layer(data.bits.view(ml_dtypes.bfloat16), logits=data.logits)
    assert output.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(output.view(np.uint16), layer(data.bits, logits=data.logits))


def test_torch_tensors_with_gradients_and_views():
    torch = pytest.importorskip("torch")
    layer, data = layers.make()
    hidden = torch.from_numpy(data.hidden).bfloat16().requires_grad_()
    wide = torch.zeros(layers.TOKENS, 2 * layers.EXPERTS)
    wide[:, : layers.EXPERTS] = torch.from_numpy(data.logits)
    want = layer(data.bits, logits=data.logits)
    logits = wide[:, : layers.EXPERTS].contiguous()
    with torch.no_grad():
        output = layer(hidden, logits=logits)
    np.testing.assert_array_equal(output.view(torch.uint16).numpy(), want)
    with pytest.raises(ValueError, match=r"hidden requires grad, but Hopyard has no backward"):
        layer(hidden, logits=logits)
    hidden, trained = hidden.detach(), logits.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"logits requires grad, .* or pass detached tensors"):
        layer(hidden, logits=trained)
    with pytest.raises(ValueError, match=r"logits requires grad"):
        hopyard.route(trained, hopyard.RoutingRule.renormalize(), 2)
    with pytest.raises(ValueError, match=r"bias requires grad"):
        hopyard.fused_topk_deepseek(logits, trained[0], 4, 2, 2, 1.0)
    with pytest.raises(ValueError, match=r"logits .*is not contiguous"):
        layer(hidden, logits=wide[:, : layers.EXPERTS])
    with pytest.raises(ValueError, match=r"convert it with hidden.bfloat16\(\)"):
        layer(hidden.float(), logits=data.logits)
    meta = torch.empty(layers.TOKENS, layers.EXPERTS, device="meta")
    with pytest.raises(ValueError, match="logits"):
        layer(hidden, logits=meta)


def test_weights_keep_their_arrays_alive():
    data = layers.arrays()
    layer, _ = layers.make()
    want = layer(data.bits, logits=data.logits)

    class Owner(np.ndarray):
        pass

    gemm1 = hopyard.to_bf16(data.gemm1).view(Owner)
    gone = weakref.ref(gemm1)
    weights = data.weights(layers.spec(), gemm1=gemm1)
    held = hopyard.MoeLayer(layers.spec(), weights, max_tokens=layers.TOKENS)
    del gemm1, weights
    gc.collect()
    assert gone() is not None
    np.testing.assert_array_equal(held(data.bits, logits=data.logits), want)
    del held
    gc.collect()
    assert gone() is None


def test_update():
    data = layers.arrays()
    other = layers.arrays(50)
    spec = layers.spec()
    first = hopyard.to_bf16(data.gemm1)
    weights = data.weights(spec, gemm1=first, gemm2=hopyard.to_bf16(data.down))
    layer = hopyard.MoeLayer(spec, weights, max_tokens=layers.TOKENS)
    for expert in range(layers.EXPERTS):
        weights.update(expert, "gate", hopyard.to_bf16(other.gate[expert]))
        weights.update(expert, "up", hopyard.to_bf16(other.up[expert][:20]))
        weights.update(expert, "up", hopyard.to_bf16(other.up[expert][20:]), row_begin=20)
        half = hopyard.to_bf16(np.ascontiguousarray(other.down[expert][:, 16:]))
        weights.update(expert, "gemm2", half, col_begin=16)
        half = hopyard.to_bf16(np.ascontiguousarray(other.down[expert][:, :16]))
        weights.update(expert, "gemm2", half)
    np.testing.assert_array_equal(first, hopyard.to_bf16(other.gemm1))  # in place
    want, _ = layers.make(50)
    np.testing.assert_array_equal(
        layer(data.bits, logits=data.logits), want(data.bits, logits=data.logits)
    )
    with pytest.raises(ValueError, match="expert"):
        weights.update(8, "gate", first[0])
    with pytest.raises(ValueError, match="part is 'down'"):
        weights.update(0, "down", first[0])


def test_update_of_read_only_weights_is_refused():
    data = layers.arrays()
    frozen = hopyard.to_bf16(data.gemm1)
    frozen.flags.writeable = False
    weights = data.weights(layers.spec(), gemm1=frozen)
    with pytest.raises(ValueError, match=r"read.only"):
        weights.update(0, "gate", hopyard.to_bf16(data.gate[0]))


def test_update_of_quantised_weights():
    spec = layers.spec(weights="mxfp4")
    data, other = layers.arrays(), layers.arrays(60)
    first, second = hopyard.quantize(data.gemm1, "mxfp4"), hopyard.quantize(data.down, "mxfp4")
    weights = data.weights(
        spec,
        gemm1=hopyard.Matrix.from_quantized(first),
        gemm2=hopyard.Matrix.from_quantized(second),
    )
    new = hopyard.quantize(other.down[3], "mxfp4")
    weights.update(3, "gemm2", new.codes, scales=new.scales)
    np.testing.assert_array_equal(hopyard.dequantize(second)[3], hopyard.dequantize(new))
    assert weights.bytes_per_expert == (64 * 64 + 64 * 32) // 2 + (64 * 64 + 64 * 32) // 32


def test_threads_share_a_layer():
    layer, _ = layers.make(num_threads=1)
    inputs = [layers.arrays(seed) for seed in range(4)]
    want = [layer(d.bits, logits=d.logits) for d in inputs]
    failures = []

    def work(index):
        for _ in range(40):
            output = layer(inputs[index].bits, logits=inputs[index].logits)
            if not np.array_equal(output, want[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_call_releases_the_gil():
    spec = layers.spec(hidden_size=512, intermediate_size=512)
    data = layers.arrays(1, hidden=512, width=512)
    tokens = 2048
    layer = hopyard.MoeLayer(spec, data.weights(spec), max_tokens=tokens, num_threads=1)
    hidden = hopyard.to_bf16(np.ones((tokens, 512)))
    logits = np.random.default_rng(0).standard_normal((tokens, 8), np.float32)
    ticks, inside, done = [], threading.Event(), threading.Event()

    def tick():
        inside.wait()
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    inside.set()
    start = time.perf_counter()
    layer(hidden, logits=logits)
    end = time.perf_counter()
    done.set()
    thread.join()
    middle = [t for t in ticks if start + 0.2 * (end - start) < t < end - 0.2 * (end - start)]
    assert end - start > 0.005
    assert len(middle) >= 2


def test_workspace_is_the_plans():
    layer, _ = layers.make()
    small = hopyard.MoeLayer(layer.spec, layer.weights, max_tokens=1)
    assert 0 < small.workspace_bytes < layer.workspace_bytes
    with pytest.raises(ValueError, match="workspace_cap"):
        layers.make(workspace_cap=1)
    with pytest.raises(ValueError, match="max_tokens"):
        hopyard.MoeLayer(layer.spec, layer.weights, max_tokens=-1)


def test_overlap_of_launches_is_a_switch(monkeypatch):
    with pytest.raises(ValueError, match="overlap_launches"):
        layers.make(overlap_launches="no")
    monkeypatch.setenv("HOPYARD_OVERLAP_LAUNCHES", "no")
    with pytest.raises(ValueError, match="HOPYARD_OVERLAP_LAUNCHES=no; wanted 0 or 1"):
        layers.make()
    monkeypatch.setenv("HOPYARD_OVERLAP_LAUNCHES", "0")
    layers.make()


def write_checkpoint(directory, config, header=b"{}"):
    (directory / "config.json").write_text(json.dumps(config))
    data = len(header).to_bytes(8, "little") + header
    (directory / "model.safetensors").write_bytes(data)


def test_bad_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        hopyard.Checkpoint(tmp_path)
    write_checkpoint(tmp_path, {"model_type": "bert"})
    with pytest.raises(NotImplementedError, match="'bert'; known are mixtral"):
        hopyard.Checkpoint(tmp_path)
    mixtral = {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    write_checkpoint(tmp_path, mixtral)
    checkpoint = hopyard.Checkpoint(tmp_path)
    assert checkpoint.model_type == "mixtral"
    assert checkpoint.moe_layers == [0, 1]
    with pytest.raises(ValueError, match="layer 0 has no router"):
        checkpoint.layer(0)
    with pytest.raises(ValueError, match="2"):
        checkpoint.layer(2)
    write_checkpoint(tmp_path, mixtral, b'{"a": ')
    with pytest.raises(ValueError, match=re.escape("model.safetensors")):
        hopyard.Checkpoint(tmp_path)


def test_error_classes():
    assert issubclass(hopyard.InternalError, RuntimeError)
    from hopyard._library import tvm_ffi

    names = {"NotImplementedError": NotImplementedError, "TimeoutError": TimeoutError}
    for name, cls in {**names, "InternalError": hopyard.InternalError}.items():
        assert tvm_ffi.core.ERROR_NAME_TO_TYPE[name] is cls
