# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's enumerations; the values are its ABI."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any, TypeVar

Member = TypeVar("Member", bound=Enum)


class RoutingMethodType(IntEnum):
    """How experts are chosen and weighted (docs/routing.md has the formulas)."""

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    TopK = 5
    SigmoidRenorm = 6
    MiniMax2 = 7
    Sigmoid = 8
    TopKSigmoid = 9
    Unspecified = 10


class RoutingInputMode(IntEnum):
    """Where the routing of a call comes from."""

    FromLogits = 0
    PackedPrecomputed = 1
    UnpackedPrecomputed = 2


class ActivationType(IntEnum):
    """Activation between the GEMMs."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9
    Situ = 10
    InvalidType = 11


class GatedActType(IntEnum):
    """FlashInfer's older name of the gated activations."""

    SwiGlu = 0
    GeGlu = 1


class WeightLayout(IntEnum):
    """Order of a weight matrix [Mn, K]: as it is, [K, Mn], or [K / block, Mn, block]."""

    MajorK = 0
    MajorMn = 1
    BlockMajorK = 2


class Fp8QuantizationType(IntEnum):
    """Scales of FP8 weights and activations."""

    NoneFp8 = 0
    DeepSeekFp8 = 1
    MxFp8 = 2
    PerTensorFp8 = 3


class SfLayout(Enum):
    """Order of a matrix of block scales."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


class QuantVariant(Enum):
    """Pairs of formats that the `prepare_*` helpers know."""

    BF16 = "bf16"
    DeepSeekFp8 = "deepseek_fp8"
    MxFp8 = "mxfp8"
    PerTensorFp8 = "per_tensor_fp8"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"
    W4A16 = "w4a16"
    MxInt4 = "mxint4"


def member(
    kind: type[Member],
    value: Any,
    name: str,
    error: type[Exception] = ValueError,
    phrase: str = "unknown value:",
) -> Member:
    """The member of our enumeration for a member of anybody's, or for a number.

    Args:
        kind: our enumeration.
        value: what the caller gave; members of FlashInfer's enumerations have the same values.
        name: of the argument, for the message.
        error: class of the refusal.
        phrase: how the message begins.
    """
    if type(value) is kind:
        return value
    raw = getattr(value, "value", value)
    try:
        return kind(raw)
    except ValueError:
        known = ", ".join(f"{one.name} = {one.value!r}" for one in kind)
        message = f"{phrase} {raw!r}; {name} must be a {kind.__name__}, one of {known}"
        raise error(message) from None


def _code(block: int, signed: int, integer: int, bits: int, uid: int) -> int:
    return (block << 24) | (signed << 20) | (integer << 16) | (bits << 8) | uid


class DtypeTrtllmGen(IntEnum):
    """Element types: block_format << 24 | signed << 20 | integer << 16 | bits << 8 | uid."""

    Bfloat16 = _code(0, 1, 0, 16, 0)
    Bool = _code(0, 0, 1, 1, 1)
    E2m1 = _code(1, 1, 0, 4, 2)
    E2m3 = _code(1, 1, 0, 6, 3)
    E3m2 = _code(1, 1, 0, 6, 4)
    E4m3 = _code(0, 1, 0, 8, 5)
    E5m2 = _code(0, 1, 0, 8, 6)
    Fp16 = _code(0, 1, 0, 16, 7)
    Fp32 = _code(0, 1, 0, 32, 8)
    Int8 = _code(0, 1, 1, 8, 9)
    Int32 = _code(0, 1, 1, 32, 10)
    Int64 = _code(0, 1, 1, 64, 11)
    MxE2m1 = _code(1, 1, 0, 4, 12)
    MxE4m3 = _code(1, 1, 0, 8, 13)
    MxInt4 = _code(1, 1, 1, 4, 14)
    UE8m0 = _code(0, 0, 0, 8, 15)
    UInt8 = _code(0, 0, 1, 8, 16)
    UInt16 = _code(0, 0, 1, 16, 17)
    UInt32 = _code(0, 0, 1, 32, 18)
    UInt64 = _code(0, 0, 1, 64, 19)
    UInt128 = _code(0, 0, 1, 128, 20)
    Void = _code(0, 1, 0, 0, 21)


# Activations that split GEMM1 into a gate and an up half.
GATED = frozenset(
    {
        ActivationType.Swiglu,
        ActivationType.Geglu,
        ActivationType.SwigluBias,
        ActivationType.SwigluStep,
        ActivationType.GegluTanh,
        ActivationType.Situ,
    }
)


def is_gated_activation(activation_type: int) -> bool:
    """Whether GEMM1 of this activation has a gate and an up half."""
    return member(ActivationType, activation_type, "activation_type") in GATED


def has_block_scale(dtype: DtypeTrtllmGen) -> bool:
    """Whether elements of this type come with block scales."""
    return member(DtypeTrtllmGen, dtype, "dtype") in (
        DtypeTrtllmGen.E2m1,
        DtypeTrtllmGen.MxE2m1,
        DtypeTrtllmGen.MxE4m3,
        DtypeTrtllmGen.MxInt4,
    )
