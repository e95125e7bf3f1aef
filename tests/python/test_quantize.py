# SPDX-License-Identifier: Apache-2.0
"""Number formats from Python, against NumPy definitions of the codes."""

from __future__ import annotations

import numpy as np
import pytest

import hopyard

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
E2M1 = np.concatenate([E2M1, -E2M1])


def e4m3_table():
    codes = np.arange(256)
    sign = np.where(codes & 128, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value[(codes & 127) == 127] = np.nan
    return sign * value


E4M3 = e4m3_table()
FORMATS = [
    "bf16",
    "fp16",
    "fp8_per_tensor",
    "fp8_per_row",
    "fp8_block1x128",
    "fp8_block128",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "mxint4",
]
# Worst |error| of a value relative to the largest of its scale block.
TOLERANCE = {
    "bf16": 2**-8,
    "fp16": 2**-10,
    "fp8_per_tensor": 2**-4,
    "fp8_per_row": 2**-4,
    "fp8_block1x128": 2**-4,
    "fp8_block128": 2**-4,
    "mxfp8": 2**-3,
    "mxfp4": 0.3,
    "nvfp4": 0.2,
    "mxint4": 0.15,
}


def values(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nibbles(codes):
    return np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)


def decode(q, shape):
    """The values of linear-layout codes, in double."""
    codes = np.asarray(q.codes)
    if q.format == "bf16":
        return hopyard.from_bf16(codes).astype(np.float64)
    if q.format == "fp16":
        return codes.astype(np.float64)
    if q.format in ("mxfp4", "nvfp4"):
        value = E2M1[nibbles(codes)]
    elif q.format == "mxint4":
        value = ((nibbles(codes).astype(int) + 8) % 16 - 8).astype(np.float64)
    else:
        value = E4M3[codes]
    if q.format == "fp8_per_tensor":
        return value * q.global_scale
    scales = np.asarray(q.scales)
    if q.format in ("mxfp8", "mxfp4"):
        scale = 2.0 ** (scales.astype(np.float64) - 127)
    elif q.format == "nvfp4":
        scale = E4M3[scales] * q.global_scale
    elif q.format == "mxint4":
        scale = hopyard.from_bf16(scales).astype(np.float64)
    else:
        scale = scales.astype(np.float64)
    block = {"fp8_per_row": shape[1], "nvfp4": 16}.get(
        q.format, 128 if q.format.startswith("fp8") else 32
    )
    scale = np.repeat(scale.reshape(scales.shape[0], -1), block, 1)[:, : shape[1]]
    if q.format == "fp8_block128":
        scale = np.repeat(scale, 128, 0)[: shape[0]]
    return value * scale


@pytest.mark.parametrize("shape", [(1, 32), (5, 64), (130, 288), (3, 256)])
@pytest.mark.parametrize("name", FORMATS)
def test_round_trip(name, shape):
    x = values(shape)
    q = hopyard.quantize(x, name)
    assert q.shape == shape
    got = hopyard.dequantize(q)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, decode(q, shape), rtol=1e-6, atol=0)
    assert np.abs(got - x).max() <= TOLERANCE[name] * np.abs(x).max()
    bits = hopyard.dequantize(q, "bfloat16")
    np.testing.assert_array_equal(bits, hopyard.to_bf16(got))


@pytest.mark.parametrize("name", FORMATS)
def test_quantise_is_idempotent_on_its_own_values(name):
    x = hopyard.dequantize(hopyard.quantize(values((4, 128)), name))
    again = hopyard.dequantize(hopyard.quantize(x, name))
    if name in ("fp8_per_tensor", "fp8_per_row", "fp8_block1x128", "fp8_block128", "nvfp4"):
        np.testing.assert_allclose(again, x, rtol=2e-6)  # the scale is recomputed in FP32
    elif name not in ("mxint4",):
        np.testing.assert_array_equal(again, x)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4", "mxint4", "fp8_block1x128"])
def test_swizzled_scales_hold_the_same_values(name):
    x = values((130, 256), 1)
    linear = hopyard.quantize(x, name)
    swizzled = hopyard.quantize(x, name, scale_layout="swizzled128x4")
    np.testing.assert_array_equal(linear.codes, swizzled.codes)
    np.testing.assert_array_equal(hopyard.dequantize(linear), hopyard.dequantize(swizzled))
    rows, cols = linear.scales.shape
    flat = np.asarray(swizzled.scales).ravel()
    m, k = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    tiles = (cols + 3) // 4
    offset = (m // 128 * tiles + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
    np.testing.assert_array_equal(flat[offset], linear.scales)


@pytest.mark.parametrize("name", FORMATS)
def test_stack_equals_its_matrices(name):
    x = values((3, 4, 64), 2)
    x[1] *= 7
    stack = hopyard.quantize(x, name)
    decoded = hopyard.dequantize(stack)
    assert stack.shape == (3, 4, 64)
    for i in range(3):
        one = hopyard.quantize(x[i], name)
        np.testing.assert_array_equal(stack.codes[i], one.codes)
        np.testing.assert_array_equal(decoded[i], hopyard.dequantize(one))


def test_global_scales():
    x = values((4, 64), 3)
    q = hopyard.quantize(x, "fp8_per_tensor")
    assert q.global_scale == pytest.approx(np.abs(x).max() / 448, rel=1e-6)
    fixed = hopyard.quantize(x, "fp8_per_tensor", global_scale=0.25)
    assert fixed.global_scale == 0.25
    assert np.abs(hopyard.dequantize(fixed) - x).max() <= 2**-4 * np.abs(x).max()
    nv = hopyard.quantize(x, "nvfp4")
    assert nv.global_scale == pytest.approx(np.abs(x).max() / (448 * 6), rel=1e-6)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_16_bit_sources(kind):
    x = values((4, 64), 4)
    source = hopyard.to_bf16(x) if kind == "bfloat16" else x.astype(np.float16)
    exact = hopyard.from_bf16(source) if kind == "bfloat16" else source.astype(np.float32)
    np.testing.assert_array_equal(
        hopyard.quantize(source, "mxfp4").codes, hopyard.quantize(exact, "mxfp4").codes
    )


def test_strided_rows_and_read_only_sources():
    wide = values((8, 128), 5)
    view = wide[::2, :64]
    want = hopyard.quantize(view.copy(), "mxfp8")
    np.testing.assert_array_equal(hopyard.quantize(view, "mxfp8").codes, want.codes)
    wide.flags.writeable = False
    np.testing.assert_array_equal(hopyard.quantize(wide[::2, :64], "mxfp8").codes, want.codes)


def test_torch_tensors_keep_their_kind():
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(0))
    q = hopyard.quantize(x.bfloat16(), "fp8_block1x128")
    assert q.codes.dtype == torch.float8_e4m3fn
    assert q.scales.dtype == torch.float32
    got = hopyard.dequantize(q, "bfloat16")
    assert got.dtype == torch.bfloat16
    wanted = q.codes.float() * q.scales.repeat_interleave(128, -1)
    torch.testing.assert_close(hopyard.dequantize(q), wanted, rtol=1e-6, atol=0)
    assert isinstance(hopyard.quantize(x, "nvfp4").global_scale, torch.Tensor)


def test_bf16_helpers():
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, np.inf, 3.4e38, 1e-40], np.float32)
    bits = hopyard.to_bf16(x)
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal(
        hopyard.from_bf16(bits)[:6], [1, 1, 1 + 4 * 2**-8, 0, np.inf, np.inf]
    )
    assert np.signbit(hopyard.from_bf16(bits)[3])
    for payload in (0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFF8000):
        nan = np.array([payload], np.uint32).view(np.float32)
        assert np.isnan(hopyard.from_bf16(hopyard.to_bf16(nan)))
    every = np.arange(65536, dtype=np.uint16)
    finite = every[np.isfinite(hopyard.from_bf16(every))]
    np.testing.assert_array_equal(hopyard.to_bf16(hopyard.from_bf16(finite)), finite)
    with pytest.raises(ValueError, match="wanted uint16"):
        hopyard.from_bf16(x)


def test_bf16_helper_equals_the_library():
    x = np.random.default_rng(6).integers(0, 2**32, (16, 1024), np.uint32).view(np.float32)
    x = np.where(np.isnan(x), 1, x)
    np.testing.assert_array_equal(hopyard.to_bf16(x), hopyard.quantize(x, "bf16").codes)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (np.zeros((2, 33), np.float32), "mxfp4", "33"),
        (np.zeros((2, 32), np.float64), "mxfp8", "f64"),
        (np.zeros((2, 32), np.float32), "fp7", "format is 'fp7', wanted one of bf16"),
        (np.zeros(32, np.float32), "mxfp8", "1 dimensions"),
        (np.zeros((64, 32), np.float32).T[:, ::2], "bf16", "contiguous"),
    ],
)
def test_bad_sources(source, name, message):
    with pytest.raises(ValueError, match=message):
        hopyard.quantize(source, name)


def test_bad_scales_are_refused():
    q = hopyard.quantize(values((4, 64)), "mxfp8")
    broken = hopyard.Quantized("mxfp8", q.codes, q.scales[:, :1], 1.0, 64)
    with pytest.raises(ValueError, match="scales"):
        hopyard.dequantize(broken)
    with pytest.raises(ValueError, match="wanted 'float32' or 'bfloat16'"):
        hopyard.dequantize(q, "float64")
