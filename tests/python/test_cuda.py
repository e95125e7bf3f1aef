# SPDX-License-Identifier: Apache-2.0
"""Layers and routing on a GPU through torch: against the CPU, captured, on streams, in threads."""

from __future__ import annotations

import gc
import json
import threading
import weakref

import numpy as np
import pytest

import hopyard
import layers
from command import write_safetensors

torch = pytest.importorskip("torch")
from devices import why_no_gpu  # noqa: E402

if why_no_gpu():
    pytest.skip(why_no_gpu(), allow_module_level=True)

gpu = pytest.importorskip("gpu_layers")
TOKENS, bits, to_gpu = gpu.TOKENS, gpu.bits, gpu.to_gpu
RULE = hopyard.RoutingRule


@pytest.fixture(scope="module")
def bf16():
    return gpu.twins()


def arrays_of(twins):
    hidden, logits = twins.hidden()
    return to_gpu(hidden), to_gpu(logits)


@pytest.mark.parametrize(("weights", "activations"), gpu.PAIRS)
def test_every_pair_of_formats_gives_the_results_of_the_cpu(weights, activations):
    twins = gpu.twins(weights, activations)
    assert (twins.layer().device, twins.gpu.device) == ("cuda:0", "cuda:0")
    for tokens in (1, TOKENS):
        output = twins.call(tokens=tokens)
        twins.judge(output, tokens)
        np.testing.assert_array_equal(twins.call(tokens=tokens), output)


@pytest.mark.parametrize("weights", ["bf16", "fp8_block128", "mxfp4", "nvfp4"])
def test_weights_copied_to_the_gpu_give_the_same_bits(weights):
    twins = gpu.twins(weights)
    copied = twins.cpu.to("cuda")
    assert (copied.device, twins.cpu.device) == ("cuda:0", "cpu")
    hidden, logits = arrays_of(twins)
    output = hopyard.MoeLayer(twins.spec, copied, TOKENS)(hidden, logits=logits)
    np.testing.assert_array_equal(bits(output), twins.call())


@pytest.mark.parametrize(("weights", "activations"), gpu.PAIRS)
def test_packed_weights_give_the_same_bits_and_let_go_of_the_codes(weights, activations):
    twins = gpu.twins(weights, activations)
    parts = {name: to_gpu(getattr(twins.experts, name)) for name in gpu.INPUT_SCALES}
    parts |= {name: gpu.on_gpu(getattr(twins.experts, name)) for name in ("gemm1", "gemm2")}
    if not hopyard.can_pack(twins.spec):
        with pytest.raises((ValueError, NotImplementedError), match="packed"):
            hopyard.Weights(twins.spec, hopyard.ExpertWeights(**parts), packed=True)
        return
    packed = hopyard.Weights(twins.spec, hopyard.ExpertWeights(**parts), packed=True)
    assert (packed.orders.gemm1, packed.orders.gemm2) == ("packed", "packed")
    codes = weakref.ref(parts["gemm1"].values)
    for name in ("gemm1", "gemm2"):
        parts[name].values.fill_(0xFF)
        parts[name].scales.fill_(0xFF)
    parts.clear()
    gc.collect()
    assert codes() is None
    hidden, logits = arrays_of(twins)
    for made in (packed, twins.cpu.to("cuda", packed=True)):
        output = hopyard.MoeLayer(twins.spec, made, TOKENS)(hidden, logits=logits)
        np.testing.assert_array_equal(bits(output), twins.call())
    assert packed.to("cuda", packed=True) is packed
    with pytest.raises(
        ValueError, match="packed=True, but these weights lie on cuda:0 as they are"
    ):
        twins.gpu.to("cuda", packed=True)


def test_packed_weights_are_updated():
    twins, others = gpu.twins("mxfp4", seed=3), gpu.twins("mxfp4", seed=4)
    packed = twins.cpu.to("cuda", packed=True)
    for expert in range(layers.EXPERTS):
        for part in ("gemm1", "gemm2"):
            matrix = getattr(others.experts, part)
            packed.update(expert, part, matrix.values[expert], scales=matrix.scales[expert])
    hidden, logits = arrays_of(others)
    output = hopyard.MoeLayer(twins.spec, packed, TOKENS)(hidden, logits=logits)
    np.testing.assert_array_equal(bits(output), others.call())


def test_mn_major_weights_are_transposed_on_the_way(bf16):
    data = bf16.data
    experts = hopyard.ExpertWeights(
        gemm1=hopyard.Matrix(
            hopyard.to_bf16(np.ascontiguousarray(data.gemm1.transpose(0, 2, 1))), major="mn"
        ),
        gemm2=hopyard.to_bf16(data.down),
    )
    weights = hopyard.Weights(bf16.spec, experts).to("cuda")
    hidden, logits = arrays_of(bf16)
    output = hopyard.MoeLayer(bf16.spec, weights, TOKENS)(hidden, logits=logits)
    np.testing.assert_array_equal(bits(output), bf16.call())


def outputs(tokens, like):
    """Every optional output, poisoned."""
    slots = layers.TOP_K
    shapes = {
        "replay_out": ((tokens, slots), np.int16),
        "load_out": ((layers.EXPERTS,), np.int32),
        "routing_weights_out": ((tokens, slots), np.float32),
        "routing_ids_out": ((tokens, slots), np.int32),
        "rows_out": ((tokens * slots, gpu.HIDDEN), np.uint16),
        "slot_to_row_out": ((tokens, slots), np.int32),
        "gemm1_activation_out": ((tokens * slots, gpu.WIDTH), np.uint16),
    }
    made = {name: np.full(shape, 7, dtype) for name, (shape, dtype) in shapes.items()}
    return made if like == "cpu" else {name: to_gpu(array) for name, array in made.items()}


def routings(logits):
    ids, weights = hopyard.route(logits, RULE.renormalize(), layers.TOP_K)
    ids[1, 0], ids[2, 1] = -1, layers.EXPERTS  # skipped slots
    return {
        "logits": {"logits": logits},
        "unpacked": {"ids": ids, "weights": weights},
        "packed": {"packed": (ids << 16) | hopyard.to_bf16(weights).astype(np.int32)},
        "replay": {"ids": ids.astype(np.int16), "logits": logits},
    }


@pytest.mark.parametrize("routing", ["logits", "unpacked", "packed", "replay"])
def test_routing_outputs_have_the_bits_of_the_cpu(routing, bf16):
    hidden, logits = bf16.hidden()
    given = routings(logits)[routing]
    on_cpu, on_gpu = outputs(TOKENS, "cpu"), outputs(TOKENS, "gpu")
    bf16.layer("cpu")(hidden, **given, **on_cpu)
    given = {name: to_gpu(array) for name, array in given.items()}
    output = bf16.layer()(to_gpu(hidden), **given, **on_gpu)
    for name in ("replay_out", "load_out", "routing_ids_out", "slot_to_row_out"):
        np.testing.assert_array_equal(bits(on_gpu[name]), on_cpu[name], err_msg=name)
    exact = on_gpu["routing_weights_out"].cpu().numpy().view(np.uint32)
    np.testing.assert_array_equal(exact, on_cpu["routing_weights_out"].view(np.uint32))
    sums = np.zeros((TOKENS, gpu.HIDDEN), np.float32)
    rows = on_gpu["rows_out"].float().cpu().numpy()
    for slot in range(layers.TOP_K):
        row = on_cpu["slot_to_row_out"][:, slot]
        live = row >= 0
        weights = on_cpu["routing_weights_out"][live, slot, None]
        sums[live] = (sums[live] + weights * rows[row[live]]).astype(np.float32)
    assert layers.worst_row(bits(output)[4:], sums[4:]) < 0.004


@pytest.mark.parametrize("count", [0, 1, 17, TOKENS])
def test_num_tokens_is_an_int_or_a_scalar_on_the_device(count, bf16):
    hidden, logits = arrays_of(bf16)
    layer = bf16.layer(batch_invariant=True)
    whole = layer(hidden, logits=logits)
    scalar = torch.tensor([count], dtype=torch.int32, device="cuda")
    for live in (count, scalar, scalar[0]):
        part = layer(hidden, logits=logits, num_tokens=live)
        assert torch.equal(part[:count], whole[:count])
        assert not part[count:].any()
        kept = torch.full_like(part, 3)
        assert layer(hidden, logits=logits, num_tokens=live, out=kept) is kept
        assert torch.equal(kept[:count], whole[:count])
        assert (kept[count:] == 3).all()


def captured(layer, call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer(**call)
    return graph, result


@pytest.mark.parametrize("weights", ["bf16", "fp8_block128", "mxfp4"])
@pytest.mark.parametrize("warm", [False, True])
def test_a_captured_call_takes_any_number_of_tokens(weights, warm):
    twins = gpu.twins(weights)
    layer = twins.layer()
    hidden, logits = arrays_of(twins)
    live = torch.zeros(1, dtype=torch.int32, device="cuda")
    call = {"hidden": hidden, "logits": logits, "num_tokens": live}
    if warm:
        layer(**call)
    graph, result = captured(layer, call)
    other = gpu.twins(weights, seed=11)
    for count in (TOKENS, 3, 0, 25, TOKENS):
        new_hidden, new_logits = arrays_of(other if count == 25 else twins)
        hidden.copy_(new_hidden)
        logits.copy_(new_logits)
        live.fill_(count)
        result.fill_(float("nan"))
        graph.replay()
        eager = layer(hidden, logits=logits, num_tokens=live)
        assert torch.equal(result, eager), count
        assert torch.isfinite(result).all()


def test_a_captured_graph_sees_updated_weights_and_survives_other_calls():
    twins = gpu.twins()
    layer = twins.layer()
    hidden, logits = arrays_of(twins)
    graph, result = captured(layer, {"hidden": hidden, "logits": logits})
    graph.replay()
    before = result.clone()
    fresh = gpu.twins(seed=21)
    for expert in range(layers.EXPERTS):
        for part, array in (("gemm1", fresh.data.gemm1), ("gemm2", fresh.data.down)):
            new = hopyard.to_bf16(array[expert])
            twins.gpu.update(expert, part, to_gpu(new) if expert % 2 else new)
    torch.full((1 << 20,), float("nan"), device="cuda")  # memory that calls have freed is used
    layer(hidden * 2, logits=logits)
    graph.replay()
    expected = fresh.layer()(hidden, logits=logits)
    assert torch.equal(result, expected)
    assert not torch.equal(result, before)


def test_calls_after_the_first_take_no_memory_of_the_device(bf16):
    hidden, logits = arrays_of(bf16)
    layer = bf16.layer()
    layer(hidden, logits=logits)
    torch.cuda.synchronize()
    segments = torch.cuda.memory_stats()["segment.all.allocated"]
    free = torch.cuda.mem_get_info()[0]
    for _ in range(20):
        layer(hidden, logits=logits)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["segment.all.allocated"] == segments
    assert torch.cuda.mem_get_info()[0] == free


def big_calls(count):
    """Inputs of several calls on one large layer, and the bits each must give."""
    twins = gpu.twins()
    layer = twins.layer(tokens=2048)
    generator = torch.Generator("cuda").manual_seed(5)
    calls = [
        {
            "hidden": torch.randn(2048, gpu.HIDDEN, device="cuda", generator=generator).bfloat16(),
            "logits": torch.randn(2048, layers.EXPERTS, device="cuda", generator=generator),
        }
        for _ in range(count)
    ]
    wanted = [layer(**call) for call in calls]
    torch.cuda.synchronize()
    return layer, calls, wanted


def test_streams_do_not_share_a_workspace():
    layer, calls, wanted = big_calls(4)
    streams = [torch.cuda.Stream() for _ in calls]
    results = [torch.empty_like(want) for want in wanted]
    for repeat in range(25):
        for stream, call, result in zip(streams, calls, results, strict=True):
            if repeat % 2:
                with torch.cuda.stream(stream):
                    layer(**call, out=result)
            else:
                layer(**call, out=result, stream=stream.cuda_stream)
    torch.cuda.synchronize()
    for result, want in zip(results, wanted, strict=True):
        assert torch.equal(result, want)


def test_new_arrays_are_filled_on_the_stream_of_the_call(bf16):
    """The current stream is busy: a fill there would erase what the kernels wrote."""
    hidden, logits = arrays_of(bf16)
    live = torch.tensor([TOKENS], dtype=torch.int32, device="cuda")
    wanted = bf16.layer()(hidden, logits=logits, num_tokens=live)
    wanted_ids, _ = hopyard.route(logits, RULE.renormalize(), 2, num_tokens=live)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda._sleep(200_000_000)  # about 0.1 s of the current stream
    options = {"num_tokens": live, "stream": stream.cuda_stream}
    output = bf16.layer()(hidden, logits=logits, **options)
    ids, _ = hopyard.route(logits, RULE.renormalize(), 2, **options)
    torch.cuda.synchronize()
    assert torch.equal(output, wanted)
    assert torch.equal(ids, wanted_ids)


@pytest.mark.parametrize("own_stream", [False, True])
def test_threads_do_not_share_a_workspace(own_stream):
    layer, calls, wanted = big_calls(4)
    failures = []

    def work(call, want):
        stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            for _ in range(40):
                if not torch.equal(layer(**call), want):
                    failures.append(threading.get_ident())

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


ON_HOST = "is in host memory; wanted memory of cuda:0, the plan's device: copy it there"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("hidden", "hidden_states"),
        ("logits", "logits"),
        ("out", "output"),
        ("num_tokens", "num_tokens"),
        ("load_out", "expert_load"),
    ],
)
def test_arrays_on_the_host_are_refused(name, field, bf16):
    hidden, logits = arrays_of(bf16)
    out = torch.zeros_like(hidden)
    call = {
        "hidden": hidden,
        "logits": logits,
        "out": out,
        "num_tokens": torch.ones(1, dtype=torch.int32, device="cuda"),
        "load_out": torch.zeros(layers.EXPERTS, dtype=torch.int32, device="cuda"),
    }
    call[name] = call[name].cpu()
    with pytest.raises(ValueError, match=f"{field} {ON_HOST}"):
        bf16.layer()(**call)
    assert not out.any()


def test_a_layer_on_the_cpu_refuses_tensors_of_the_gpu(bf16):
    hidden, logits = arrays_of(bf16)
    with pytest.raises(ValueError, match=r"logits is a CUDA tensor \(cuda:0\); wanted host memory"):
        bf16.layer("cpu")(hidden.cpu(), logits=logits)
    mixed = hopyard.ExpertWeights(
        gemm1=hopyard.to_bf16(bf16.data.gemm1), gemm2=to_gpu(hopyard.to_bf16(bf16.data.down))
    )
    with pytest.raises(ValueError, match=r"gemm1.values is in host memory; .*the weights' device"):
        hopyard.Weights(bf16.spec, mixed)
    with pytest.raises(ValueError, match=r"weights are on cuda:0, wanted cpu"):
        hopyard.MoeLayer(bf16.spec, bf16.gpu, 4, device="cpu")
    with pytest.raises(ValueError, match=r"stream.cuda_stream of torch"):
        bf16.layer()(hidden, logits=logits, stream=torch.cuda.current_stream())
    with pytest.raises(ValueError, match=r"source is on cuda:0, wanted .*pass source\.cpu\(\)"):
        hopyard.quantize(hidden, "mxfp8")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_two_gpus():
    twins = gpu.twins()
    hidden, logits = arrays_of(twins)
    with pytest.raises(ValueError, match=r"hidden_states is a CUDA tensor \(cuda:1\); wanted"):
        twins.layer()(hidden.to("cuda:1"), logits=logits)
    second = hopyard.MoeLayer(twins.spec, twins.cpu.to("cuda:1"), TOKENS)
    assert second.device == "cuda:1"
    output = second(hidden.to("cuda:1"), logits=logits.to("cuda:1"))
    assert (output.device.index, torch.cuda.current_device()) == (1, 0)
    np.testing.assert_array_equal(bits(output), twins.call())


METHODS = {
    "default": RULE.default(),
    "renormalize": RULE.renormalize(),
    "deepseek": RULE.deepseek_v3(4, 2, 2.5),
    "sigmoid_renorm": RULE.sigmoid_renorm(),
    "minimax2": RULE.minimax2(),
    "top_k_sigmoid": RULE.top_k_sigmoid(),
    "sqrt_softplus": RULE.sqrt_softplus(),
}


def same_bits(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        array = bits(one)
        np.testing.assert_array_equal(
            array.view(np.uint8).reshape(-1), np.ascontiguousarray(other).view(np.uint8).reshape(-1)
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", list(METHODS))
def test_route_has_the_bits_of_the_cpu(method, dtype):
    rng = np.random.default_rng(9)
    logits = rng.standard_normal((77, 64)).astype(np.float32)
    logits[5] = logits[5, 0]  # ties
    logits[6, 3] = np.nan
    logits = hopyard.to_bf16(logits) if dtype == "bfloat16" else logits.astype(dtype)
    rule = METHODS[method]
    bias = rng.standard_normal(64).astype(np.float32) if rule.use_bias else None
    options = {"weights_dtype": "bfloat16" if dtype == "bfloat16" else "float32"}
    load, replay = np.full(64, 3, np.int64), np.full((80, 6), 9, np.int16)
    wanted = hopyard.route(logits, rule, 6, bias=bias, load_out=load, replay_out=replay, **options)
    on_gpu = {"load_out": to_gpu(np.full(64, 3, np.int64))}
    on_gpu["replay_out"] = to_gpu(np.full((80, 6), 9, np.int16))
    got = hopyard.route(to_gpu(logits), rule, 6, bias=to_gpu(bias), **on_gpu, **options)
    assert got[0].is_cuda
    same_bits(got, wanted)
    same_bits((on_gpu["load_out"], on_gpu["replay_out"]), (load, replay))
    for count in (0, 30, torch.tensor([30], dtype=torch.int32, device="cuda")):
        live = int(count)
        part = hopyard.route(to_gpu(logits), rule, 6, bias=to_gpu(bias), num_tokens=count)
        whole = hopyard.route(logits, rule, 6, bias=bias, num_tokens=live)
        same_bits(part, whole)


def test_route_with_given_ids_has_the_bits_of_the_cpu():
    rng = np.random.default_rng(10)
    logits = rng.standard_normal((50, 32)).astype(np.float32)
    given = {
        "forced": {"forced_ids": rng.integers(-1, 33, (50, 4)).astype(np.int32)},
        "table": {
            "token_ids": rng.integers(-1, 12, 50),
            "token_to_experts": rng.integers(0, 32, (10, 4)).astype(np.int32),
        },
    }
    for arrays in given.values():
        wanted = hopyard.route(logits, RULE.sqrt_softplus(), 4, **arrays)
        on_gpu = {name: to_gpu(array) for name, array in arrays.items()}
        same_bits(hopyard.route(to_gpu(logits), RULE.sqrt_softplus(), 4, **on_gpu), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fused_topk_deepseek_has_the_bits_of_the_cpu(dtype):
    rng = np.random.default_rng(11)
    scores = rng.standard_normal((64, 128)).astype(np.float32)
    scores = hopyard.to_bf16(scores) if dtype == "bfloat16" else scores.astype(dtype)
    bias = rng.standard_normal(128).astype(np.float32)
    wanted = hopyard.fused_topk_deepseek(scores, bias, 8, 4, 6, 2.5)
    got = hopyard.fused_topk_deepseek(to_gpu(scores), to_gpu(bias), 8, 4, 6, 2.5)
    assert str(got[0].dtype) == f"torch.{dtype}"
    same_bits(got, wanted)


def test_route_refuses_mixed_devices_and_is_captured():
    logits = torch.randn(6, 16, device="cuda")
    rule = RULE.minimax2()
    with pytest.raises(ValueError, match=r"bias is in host memory; .*cuda:0, the logits' device"):
        hopyard.route(logits, rule, 2, bias=torch.zeros(16))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, weights = hopyard.route(logits, rule, 2)
    logits.copy_(torch.randn(6, 16, device="cuda"))
    graph.replay()
    again, same = hopyard.route(logits, rule, 2)
    assert torch.equal(ids, again)
    assert torch.equal(weights, same)


def write_checkpoint(directory, data):
    """A Mixtral of one layer, as `config.json` and one safetensors file."""
    config = {
        "model_type": "mixtral",
        "hidden_size": gpu.HIDDEN,
        "intermediate_size": gpu.WIDTH,
        "num_local_experts": layers.EXPERTS,
        "num_experts_per_tok": layers.TOP_K,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config))
    root = "model.layers.0.block_sparse_moe"
    router = layers.normal((layers.EXPERTS, gpu.HIDDEN), 8, gpu.HIDDEN**-0.5)
    tensors = {f"{root}.gate.weight": router}
    for e in range(layers.EXPERTS):
        for name, part in (("w1", data.gate), ("w3", data.up), ("w2", data.down)):
            tensors[f"{root}.experts.{e}.{name}.weight"] = part[e]
    stored = {name: ("BF16", hopyard.to_bf16(values)) for name, values in tensors.items()}
    write_safetensors(directory / "model.safetensors", stored)


def test_a_layer_of_a_checkpoint(tmp_path, bf16):
    write_checkpoint(tmp_path, bf16.data)
    loaded = hopyard.load_layer(tmp_path, 0, device="cuda")
    assert loaded.weights.device == "cuda:0"
    assert loaded.router_weight.is_cuda
    on_cpu = hopyard.load_layer(tmp_path, 0)
    with pytest.raises(ValueError, match="packed=True, but these weights lie on cpu as they are"):
        hopyard.load_layer(tmp_path, 0, packed=True)
    assert on_cpu.to("cuda:0").weights.device == "cuda:0"
    hidden, _ = arrays_of(bf16)
    logits = loaded.router_logits(hidden)
    np.testing.assert_allclose(
        logits.cpu().numpy(), on_cpu.router_logits(bf16.data.hidden), rtol=1e-4, atol=1e-5
    )
    layer = hopyard.MoeLayer(loaded.spec, loaded.weights, TOKENS)
    output = layer(hidden, logits=logits)
    cpu = hopyard.MoeLayer(on_cpu.spec, on_cpu.weights, TOKENS)
    wanted = cpu(bits(hidden), logits=logits.cpu().numpy())
    assert layers.worst_row(bits(output), hopyard.from_bf16(wanted)) < 0.012
    loaded.weights.update(0, "gemm2", torch.zeros_like(to_gpu(hopyard.to_bf16(bf16.data.down[0]))))
    with pytest.raises(ValueError, match="read-only"):
        on_cpu.weights.update(0, "gemm2", hopyard.to_bf16(bf16.data.down[0]))


def test_arrays_of_no_framework(bf16):
    """What DLPack alone gives: the library's own memory for result and workspace."""
    import tvm_ffi

    hidden, logits = arrays_of(bf16)
    torch.cuda.synchronize()
    plain = tvm_ffi.from_dlpack(hidden), tvm_ffi.from_dlpack(logits)
    for _ in range(3):
        output = bf16.layer()(plain[0], logits=plain[1])
        assert tuple(output.__dlpack_device__()) == (2, 0)
        torch.cuda.synchronize()
        np.testing.assert_array_equal(bits(torch.from_dlpack(output)), bf16.call())
    part = bf16.layer()(plain[0], logits=plain[1], num_tokens=1)
    torch.cuda.synchronize()
    assert not torch.from_dlpack(part)[1:].any()
    ids, weights = hopyard.route(plain[1], RULE.renormalize(), 2, num_tokens=3)
    torch.cuda.synchronize()
    wanted = hopyard.route(logits.cpu().numpy(), RULE.renormalize(), 2, num_tokens=3)
    same_bits((torch.from_dlpack(ids), torch.from_dlpack(weights)), wanted)


def test_cupy(bf16):
    cupy = pytest.importorskip("cupy")
    hidden, logits = (cupy.asarray(array) for array in bf16.hidden())
    cupy.cuda.get_current_stream().synchronize()
    output = bf16.layer()(hidden, logits=logits)
    assert isinstance(output, cupy.ndarray)
    np.testing.assert_array_equal(output.get(), bf16.call())
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        again = bf16.layer()(hidden, logits=logits, stream=stream.ptr)
        np.testing.assert_array_equal(again.get(), bf16.call())
    ids, weights = hopyard.route(logits, RULE.renormalize(), 2)
    wanted = hopyard.route(bf16.hidden()[1], RULE.renormalize(), 2)
    np.testing.assert_array_equal(ids.get(), wanted[0])
    np.testing.assert_array_equal(weights.get(), wanted[1])
