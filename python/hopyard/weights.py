# SPDX-License-Identifier: Apache-2.0
"""Where the experts' matrices lie, and in which layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from hopyard._library import lib
from hopyard.arrays import Array, as_tensor, is_read_only, is_torch, require_not_float32
from hopyard.devices import CPU, Device, device_name, parse_device, stream_of
from hopyard.formats import Quantized
from hopyard.spec import MoeSpec, WeightFormat, spec_to_map

RowOrder: TypeAlias = Literal["up_gate", "gate_up", "interleaved_gate_up", "interleaved_up_gate"]
RowMap: TypeAlias = Literal["natural", "shuffled128", "shuffled64"]
MajorOrder: TypeAlias = Literal["k", "mn", "block_k"]
ScaleLayout: TypeAlias = Literal["linear", "swizzled128x4"]
ReadOrder: TypeAlias = Literal["k_major", "mn_major", "mn_major_interleaved", "packed"]
WeightPart: TypeAlias = Literal["gate", "up", "gemm1", "gemm2"]


@dataclass(frozen=True)
class Matrix:
    """One family of matrices, one [rows, K] per expert: stacked arrays, or a list of E arrays.

    Attributes:
        values: [experts, rows, K] codes, or a list of [rows, K]. bfloat16 (uint16 bits in NumPy),
            float8_e4m3fn (uint8), or uint8 with two 4-bit codes a byte [.., K / 2], low nibble
            first. "mn" is [.., K, rows] (bf16 only); "block_k" is [.., K / b, rows, b].
        scales: block scales of the format [experts, rows, ceil(K / block)] (fp8_block128:
            float32 [experts, ceil(rows / 128), ceil(K / 128)]; mxfp8, mxfp4: uint8 e8m0; nvfp4:
            uint8 e4m3; mxint4: bfloat16), or float32 [experts, rows] for fp8_per_channel.
        global_scales: float32 [experts], multipliers of fp8_per_tensor and nvfp4 values.
        bias: float32 or bfloat16 [experts, rows].
        major: order of `values`.
        scale_layout: order of `scales`.
        row_map: where rows are stored.
        row_origin: a shard's first row within its 128-row scale block (fp8_block128).
        col_origin: its first column within its scale block.
    """

    values: Array | Sequence[Array]
    scales: Array | Sequence[Array] | None = None
    global_scales: Array | None = None
    bias: Array | Sequence[Array] | None = None
    major: MajorOrder = "k"
    scale_layout: ScaleLayout = "linear"
    row_map: RowMap = "natural"
    row_origin: int = 0
    col_origin: int = 0

    @staticmethod
    def from_quantized(quantized: Quantized, bias: Array | None = None) -> Matrix:
        """The matrices that `hopyard.quantize` made of a stack [experts, rows, K]."""
        if quantized.codes.ndim != 3:
            raise ValueError(
                f"quantized has codes of {quantized.codes.ndim} dimensions, wanted 3: quantize a "
                "stack [experts, rows, K]"
            )
        scales = quantized.scales
        if scales is not None and quantized.format == "fp8_per_row":
            scales = scales.reshape(scales.shape[0], -1)
        has_global = quantized.format in ("fp8_per_tensor", "nvfp4")
        return Matrix(
            values=quantized.codes,
            scales=scales,
            global_scales=quantized.global_scale if has_global else None,
            bias=bias,
            scale_layout=quantized.scale_layout,
        )


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of a group of experts: `gemm1` fused, or `gate` and `up` apart; then `gemm2`.

    A bare array or list stands for `Matrix(values)`.

    Attributes:
        gemm2: [experts, H, I], the down projection.
        gemm1: [experts, f * I, H], rows in `row_order`.
        gate: [experts, I, H], instead of gemm1 and together with `up`.
        up: [experts, I, H].
        row_order: of gemm1; ignored where the activation is not gated.
        gemm1_input_scale: float32 [1], static scale of quantised hidden states, finite and
            above 0; only for activations "fp8_per_tensor" and "nvfp4".
        gemm2_input_scale: float32 [1] or [experts], the same for the intermediate.
        alpha: float32 [experts], of the activation, read by every call instead of the spec's value.
        beta: float32 [experts], the same.
        limit: float32 [experts], the same.
    """

    gemm2: Matrix | Array | Sequence[Array]
    gemm1: Matrix | Array | Sequence[Array] | None = None
    gate: Matrix | Array | Sequence[Array] | None = None
    up: Matrix | Array | Sequence[Array] | None = None
    row_order: RowOrder = "gate_up"
    gemm1_input_scale: Array | None = None
    gemm2_input_scale: Array | None = None
    alpha: Array | None = None
    beta: Array | None = None
    limit: Array | None = None


class _Collector:
    """Turns arrays into tensors.

    Remembers whether one is read-only, whether one is torch's, and the first that requires grad.
    """

    def __init__(self) -> None:
        self.read_only = False
        self.uses_torch = False
        self.trainable: str | None = None

    def one(self, array: Array, name: str) -> Any:
        self.read_only = self.read_only or is_read_only(array)
        if is_torch(array):
            self.uses_torch = True
            if array.requires_grad and self.trainable is None:
                self.trainable = name
        return as_tensor(array, name)

    def one_or_many(self, arrays: Array | Sequence[Array] | None, name: str) -> Any:
        if arrays is None:
            return None
        if isinstance(arrays, (list, tuple)):
            return [self.one(array, f"{name}[{i}]") for i, array in enumerate(arrays)]
        return self.one(arrays, name)

    def matrix(self, given: Any, name: str, weight_format: WeightFormat) -> dict[str, Any]:
        matrix = given if isinstance(given, Matrix) else Matrix(given)
        if weight_format == "bf16":
            values = matrix.values
            first = values[0] if isinstance(values, (list, tuple)) and values else values
            require_not_float32(first, f"{name}.values")
        fields = {
            "values": self.one_or_many(matrix.values, f"{name}.values"),
            "scales": self.one_or_many(matrix.scales, f"{name}.scales"),
            "bias": self.one_or_many(matrix.bias, f"{name}.bias"),
            "major": matrix.major,
            "scale_layout": matrix.scale_layout,
            "row_map": matrix.row_map,
            "row_origin": matrix.row_origin,
            "col_origin": matrix.col_origin,
        }
        if matrix.global_scales is not None:
            fields["global_scales"] = self.one(matrix.global_scales, f"{name}.global_scales")
        return fields

    def group(
        self, experts: ExpertWeights, name: str, weight_format: WeightFormat
    ) -> dict[str, Any]:
        fields: dict[str, Any] = {"row_order": experts.row_order}
        for part in ("gemm1", "gate", "up", "gemm2"):
            given = getattr(experts, part)
            if given is not None:
                fields[part] = self.matrix(given, f"{name}.{part}", weight_format)
        for part in ("gemm1_input_scale", "gemm2_input_scale", "alpha", "beta", "limit"):
            given = getattr(experts, part)
            if given is not None:
                fields[part] = self.one(given, f"{name}.{part}")
        return fields


@dataclass(frozen=True)
class WeightOrders:
    """What of the matrices' layouts has GPU kernels of its own.

    Attributes:
        gemm1: "mn_major_interleaved" with gate and up in alternate columns; "packed" where
            `Weights` packed them; K blocks and shuffled rows are "k_major".
        gemm2: of the local experts, too.
        shared_gemm1: of the shared experts; "k_major" where there are none.
        shared_gemm2: of these, too.
    """

    gemm1: ReadOrder = "k_major"
    gemm2: ReadOrder = "k_major"
    shared_gemm1: ReadOrder = "k_major"
    shared_gemm2: ReadOrder = "k_major"


def can_pack(spec: MoeSpec) -> bool:
    """Whether a GPU has kernels for the layer with `Weights(..., packed=True)`.

    Args:
        spec: the layer.

    Returns:
        True where its local experts, shared ones or both are "mxfp4" or "nvfp4", the latter with
        other activations than "fp8_per_token". Builds with HOPYARD_KERNELS=dev have none all the
        same.
    """
    formats = {spec.weights, *([spec.shared.weights] if spec.shared.count > 0 else [])}
    refused = "nvfp4" in formats and spec.activations == "fp8_per_token"
    return not refused and bool(formats & {"mxfp4", "nvfp4"})


class Weights:
    """Weights of one layer: views of the caller's arrays, which are kept alive.

    Nothing is copied, so a later write to the arrays is seen by the next call of a layer, unless
    `packed` says otherwise. Safe to share between threads; neither `update` nor such a write may
    run beside a call.

    All arrays lie on one device, the CPU or a GPU, where a layer of these weights then runs. Making
    weights on a GPU waits for it.

    Where torch records gradients, a layer refuses weights that were made of tensors that require
    them: call it under torch.no_grad(), or make the weights of `parameter.detach()`, the same
    memory.

    Args:
        spec: the layer; shapes and dtypes are checked against it.
        routed: matrices of the local experts.
        shared: matrices of `spec.shared.count` shared experts.
        packed: of "mxfp4" and "nvfp4" weights on a GPU (`can_pack`): copy codes and block scales
            into memory of the library's own, in the order in which its kernels are the fastest. The
            arrays of codes and scales are then let go of (unless shared experts of another format
            keep them all), and a later write to them is not seen;
            `update` writes into the copy. Biases, global scales and parameters are read where they
            lie. The layer's results are the same bits, unless its plan has a kernel that divides K
            ("_k4"), whose twin for packed weights does not. The copy takes as many bytes as codes
            and scales with I rounded up to 128, H to 256 and what is summed over to 128: 6 % more
            for 2880 x 2880, a third for I = 192.

    Raises:
        ValueError: naming the array, what it is and what was wanted; `packed` of weights on the
            CPU, or of formats without such an order.
        NotImplementedError: no kernel reads the layout, or the build has none for packed weights.
    """

    def __init__(
        self,
        spec: MoeSpec,
        routed: ExpertWeights,
        shared: ExpertWeights | None = None,
        *,
        packed: bool = False,
    ) -> None:
        collector = _Collector()
        fields = collector.group(routed, "weights.routed", spec.weights)
        if shared is not None:
            fields["shared"] = collector.group(shared, "weights.shared", spec.shared.weights)
        fields["read_only"] = collector.read_only
        fields["packed"] = packed
        self._spec = spec
        self._uses_torch = collector.uses_torch
        self._trainable = collector.trainable
        self._handle = lib.make_weights(spec_to_map(spec), fields)

    @classmethod
    def _from_handle(cls, spec: MoeSpec, handle: Any, *, uses_torch: bool = False) -> Weights:
        weights = cls.__new__(cls)
        weights._spec = spec
        weights._uses_torch = uses_torch
        weights._trainable = None  # memory of the library's own
        weights._handle = handle
        return weights

    @property
    def spec(self) -> MoeSpec:
        """The layer that these weights belong to."""
        return self._spec

    @property
    def _device(self) -> int:
        return int(self._handle.device)

    @property
    def device(self) -> str:
        """Where they lie: "cpu" or "cuda:0"."""
        return device_name(self._device)

    def to(self, device: Device, *, packed: bool = False) -> Weights:
        """These weights on a device: themselves, or a copy in memory of the library's own.

        Args:
            device: "cpu", "cuda", "cuda:1" or a torch.device.
            packed: as of `Weights`, for a copy on a GPU.

        Returns:
            Weights that can be updated, also where these are a mapped checkpoint. MN-major matrices
            become K-major, which is what a GPU reads.

        Raises:
            ValueError: these weights lie on another GPU, or on this one and should be packed.
            NotImplementedError: the build has no CUDA backend, or no kernel reads the layout.
            MemoryError: the device has not enough memory.
        """
        index = parse_device(device, self._device)
        if index == self._device:
            if packed and "packed" not in vars(self.orders).values():
                remedy = (
                    'copy them to a GPU, .to("cuda", packed=True)'
                    if index == CPU
                    else "make them with Weights(..., packed=True), or copy them from the host"
                )
                raise ValueError(
                    f"packed=True, but these weights lie on {self.device} as they are; {remedy}"
                )
            return self
        handle = lib.copy_weights(self._handle, index, packed)
        return Weights._from_handle(self._spec, handle, uses_torch=self._uses_torch)

    @property
    def orders(self) -> WeightOrders:
        """What of their layouts measurements of kernels hold for."""
        found = lib.weight_orders(self._handle)
        return WeightOrders(**{str(name): str(order) for name, order in found.items()})  # type: ignore[arg-type]

    @property
    def bytes_per_expert(self) -> int:
        """Bytes of one expert's codes and scales."""
        return int(self._handle.bytes_per_expert)

    def update(
        self,
        expert: int,
        part: WeightPart,
        values: Array | None = None,
        *,
        row_begin: int = 0,
        col_begin: int = 0,
        scales: Array | None = None,
        stream: int | None = None,
        **others: Array,
    ) -> None:
        """Write part of one matrix in place, whatever layout it is stored in.

        Weights on a GPU are written in the order of a stream; captured graphs of a layer see them.
        The arrays may lie on that GPU or on the host; the call may wait for the GPU.

        Args:
            expert: local slot; shared expert j is num_local_experts + j.
            part: "gemm1" addresses rows in `row_order`; "gate", "up" and "gemm2" natural rows.
            values: [rows, cols], K-major, in the weights' format (4-bit codes packed along cols).
            row_begin: first row. With scales a slice begins and ends on scale blocks or at the
                matrix's edges.
            col_begin: first column; the same.
            scales: linear scales of exactly the blocks of `values`.
            stream: GPU: handle of the CUDA stream; without it torch's current stream if the weights
                or `values` are torch's, else the legacy default stream.
            **others: `bias` [rows] and `global_scale` float32 [1]; a new global scale comes with
                values of the whole matrix, or alone.

        Raises:
            ValueError: shape, dtype or range is wrong, or the weights are read-only.
            NotImplementedError: gate and up share the scale; write "gemm1" instead.
        """
        unknown = sorted(set(others) - {"bias", "global_scale"})
        if unknown:
            raise TypeError(f"update got unexpected arguments {unknown}")
        fields: dict[str, Any] = {
            "expert": expert,
            "part": part,
            "row_begin": row_begin,
            "col_begin": col_begin,
        }
        arrays = {"values": values, "scales": scales, **others}
        uses_torch = self._uses_torch or any(is_torch(array) for array in arrays.values())
        handle = stream_of(self._device, stream, uses_torch=uses_torch)
        for name, array in arrays.items():
            if array is not None:
                fields[name] = as_tensor(array, name, handle)
        lib.update_weights(self._handle, fields, handle)
