# SPDX-License-Identifier: Apache-2.0
"""Number formats in torch's own operations, for tensors that lie on a GPU.

The steps are those of docs/formats.md, and so are the bits. Nothing is read back, so that a call
neither waits nor breaks the capture of a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

from hopyard.compat.flashinfer import ops
from hopyard.devices import torch_module

_FLT_MIN, _FLT_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_E4M3_NAN, _E8M0_NAN = 0x7F, 255
# Elements that share a scale.
BLOCKS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32, "fp8_block1x128": 128}
# Magnitudes from which on a code is the next one; where the lower code is odd, a tie goes up, too.
_E2M1_STEPS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def _constant(value: float, like: Any) -> Any:
    """A number as a tensor: torch would divide by a plain one as a product with its inverse."""
    return ops.full(like, (), value)


def _e4m3(values: Any) -> Any:
    """Codes, as uint8: ties to even, saturating, NaN without a sign."""
    torch = torch_module()
    codes = values.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(values.isnan(), _E4M3_NAN, codes)


def _e2m1(values: Any) -> Any:
    """Codes, as uint8: ties to even, saturating; a zero keeps its sign."""
    torch = torch_module()
    size, codes = values.abs(), values.signbit().to(torch.uint8) << 3
    for code, step in enumerate(_E2M1_STEPS):
        codes += (size >= step) if code % 2 else (size > step)
    return codes


def _e8m0(values: Any) -> Any:
    """Exponents of the powers of two that are not below the values, as int32."""
    torch = torch_module()
    bits = values.view(torch.int32)
    return torch.where(bits <= 1 << 22, 0, (bits + ((1 << 23) - 1)) >> 23)


def _mx_scales(amax: Any, finite: Any, largest: float) -> tuple[Any, Any]:
    """Bytes of scales, and what values are multiplied with: 0 in blocks that are not finite."""
    torch = torch_module()
    exponents = _e8m0(torch.where(finite, amax, 0.0) / _constant(largest, amax))
    factors = torch.where(finite, ((254 - exponents) << 23).view(torch.float32), 0.0)
    return torch.where(finite, exponents, _E8M0_NAN).to(torch.uint8), factors


def _nvfp4_scales(amax: Any, finite: Any, global_scale: Any) -> tuple[Any, Any]:
    """As `_mx_scales`, in e4m3; a global scale that is no finite number above 0 makes all NaN."""
    torch = torch_module()
    right = global_scale.isfinite() & (global_scale > 0)
    g = (1.0 / global_scale).clamp(max=_FLT_MAX)
    codes = _e4m3((g * amax) / _constant(_E2M1_MAX, amax))
    codes = torch.where(finite & right, codes, _E4M3_NAN)
    steps = codes.view(torch.float8_e4m3fn).float() / g
    factors = (1.0 / steps).clamp(max=_FLT_MAX)
    factors = torch.where((codes == 0) | (codes == _E4M3_NAN), 0.0, factors)
    return codes.view(torch.float8_e4m3fn), factors


def quantize(source: Any, number_format: str, global_scale: Any = None) -> tuple[Any, Any]:
    """Quantise a torch tensor where it lies.

    Args:
        source: [M, K], K a multiple of the format's block.
        number_format: "nvfp4", "mxfp4", "mxfp8", "fp8_block1x128" or "fp8_per_tensor".
        global_scale: float32 tensor of no dimensions beside the source, of NVFP4 and per tensor:
            the multiplier of every value.

    Returns:
        Codes and scales [M, K / block] in the types of `hopyard.quantize`; no scales per tensor.
    """
    torch = torch_module()
    values = source.float()
    if number_format == "fp8_per_tensor":
        return _e4m3(values / global_scale).view(torch.float8_e4m3fn), None
    rows, cols = values.shape
    block = BLOCKS[number_format]
    blocks = values.view(rows, cols // block, block)
    amax = blocks.abs().amax(-1)
    finite = amax.isfinite()
    if number_format == "fp8_block1x128":
        scales = (amax / _constant(_E4M3_MAX, amax)).clamp(min=_FLT_MIN)
        scales = torch.where(finite, scales, math.nan)
        codes = torch.where(finite[..., None], _e4m3(blocks / scales[..., None]), 0)
        return codes.view(rows, cols).view(torch.float8_e4m3fn), scales
    if number_format == "nvfp4":
        scales, factors = _nvfp4_scales(amax, finite, global_scale)
    else:
        largest = _E4M3_MAX if number_format == "mxfp8" else _E2M1_MAX
        scales, factors = _mx_scales(amax, finite, largest)
    factors = factors[..., None]
    encode = _e4m3 if number_format == "mxfp8" else _e2m1
    codes = torch.where(factors == 0, 0, encode(blocks * factors)).view(rows, cols)
    if number_format == "mxfp8":
        return codes.view(torch.float8_e4m3fn), scales
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales
