# SPDX-License-Identifier: Apache-2.0
"""Weights, scales and parameters of FlashInfer's operations as `hopyard.ExpertWeights`.

FlashInfer's scalars are products of several scales, and its biases, clamp limits and SwiGLU's beta
act on the raw accumulator. Hopyard keeps one scale for each operand and everything else in natural
units. With a = output1_scale_gate_scalar, g = the multiplier of the intermediate (output1_scale /
a for SwiGLU and GeGLU, output1_scale for the others) and o = output2_scale_scalar:

    weights of GEMM1 are multiplied by a      the intermediate is a code times 1 / g
    weights of GEMM2 are multiplied by o * g  biases are bias1 * a and bias2 * o
    the limit and SwiGLU's beta are multiplied by a
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from hopyard import ExpertWeights, Matrix
from hopyard.arrays import Array
from hopyard.compat.flashinfer import checks, ops
from hopyard.compat.flashinfer.checks import check
from hopyard.compat.flashinfer.common import Problem, call_of, execute, spec_of
from hopyard.compat.flashinfer.engine import Buffers, Experts, Groups
from hopyard.compat.flashinfer.enums import ActivationType
from hopyard.compat.flashinfer.signature import Arguments
from hopyard.compat.flashinfer.views import View, describe

_PARAMETRISED = (ActivationType.Swiglu, ActivationType.Situ)


@dataclass(frozen=True)
class Operands:
    """All arrays of an operation's experts, local ones first, then shared ones.

    Attributes:
        gemm1: codes of GEMM1.
        gemm2: codes of GEMM2.
        gemm1_scale: block scales.
        gemm2_scale: the same.
        bias1: on the raw accumulator of GEMM1.
        bias2: on that of GEMM2.
        alpha: parameter of the activation.
        beta: the same.
        limit: the same.
        scale1: output1_scale_scalar.
        gate1: output1_scale_gate_scalar.
        scale2: output2_scale_scalar.
    """

    gemm1: Array
    gemm2: Array
    gemm1_scale: Array | None = None
    gemm2_scale: Array | None = None
    bias1: Array | None = None
    bias2: Array | None = None
    alpha: Array | None = None
    beta: Array | None = None
    limit: Array | None = None
    scale1: Array | None = None
    gate1: Array | None = None
    scale2: Array | None = None


@dataclass(frozen=True)
class Layout:
    """How the arrays of an operation are to be read.

    Attributes:
        weights: number format of the weights.
        activations: number format of the activations.
        row_order: of GEMM1.
        row_map: of both.
        major: of both.
        scale_layout: of the block scales.
    """

    weights: str
    activations: str
    row_order: str = "interleaved_up_gate"
    row_map: str = "shuffled128"
    major: str = "k"
    scale_layout: str = "swizzled128x4"

    @property
    def static(self) -> bool:
        """Whether activations have static scales."""
        return self.activations in ("fp8_per_tensor", "nvfp4")

    @property
    def scalars(self) -> bool:
        """Whether the three scalars are used."""
        return self.activations in ("fp8_per_tensor", "nvfp4", "nvfp4_per_token")


def check_parameters(o: Operands, p: Problem, hidden: Array, error: type[Exception]) -> None:
    """alpha, beta and limit are float32 [experts], contiguous, beside hidden_states."""
    given = {"gemm1_alpha": o.alpha, "gemm1_beta": o.beta, "gemm1_clamp_limit": o.limit}
    for name, array in given.items():
        if array is None:
            continue
        checks.check_type(array, name, ["float32"], error)
        check(
            ops.shape_of(array) == (p.experts,),
            f"{name} must have shape [{p.experts}], one value for each expert with weights here; "
            f"got {list(ops.shape_of(array))}",
            error,
        )
        checks.check_contiguous(array, name, error)
        checks.check_device(array, name, hidden, error)


class _Builder:
    """Makes the experts of one call."""

    def __init__(self, o: Operands, layout: Layout, p: Problem) -> None:
        self.o = o
        self.layout = layout
        self.p = p
        self.parametrised = p.activation in _PARAMETRISED

    @property
    def _mid_in_scale1(self) -> bool:
        """output1_scale is the intermediate's multiplier alone."""
        return not self.p.gated or self.p.activation is ActivationType.Situ

    def key(self) -> Hashable:
        arrays = tuple(describe(getattr(self.o, f.name)) for f in fields(self.o))
        return arrays, self.layout, self.p.local

    def buffers(self) -> dict[str, tuple[int, ...]]:
        if not self.layout.scalars:
            return {}
        experts = (self.p.experts,)
        shapes = {"one": (1,), "mid": experts, "global2": experts}
        for name in ("bias1", "bias2"):
            if getattr(self.o, name) is not None:
                shapes[name] = ops.shape_of(getattr(self.o, name))
        if self.parametrised and self.o.limit is not None:
            shapes["limit"] = experts
        if self.p.activation is ActivationType.Swiglu and self.o.beta is not None:
            shapes["beta"] = experts
        return shapes

    def derive(self, buffers: Buffers) -> None:
        if not buffers:
            return
        o = self.o
        numerator = buffers["one"] if self._mid_in_scale1 else o.gate1
        ops.divide(numerator, o.scale1, buffers["mid"])
        ops.divide(o.scale2, buffers["mid"], buffers["global2"])
        if "bias1" in buffers:
            ops.multiply(o.bias1, o.gate1[:, None], buffers["bias1"])
        if "bias2" in buffers:
            ops.multiply(o.bias2, o.scale2[:, None], buffers["bias2"])
        if "limit" in buffers:
            ops.multiply(o.limit, o.gate1, buffers["limit"])
        if "beta" in buffers:
            ops.multiply(o.beta, o.gate1, buffers["beta"])

    def checked(self) -> tuple[Array, ...]:
        if self.layout.scalars and self.layout.weights != "mxfp4":
            return ()
        given = (self.o.scale1, self.o.gate1, self.o.scale2)
        return tuple(array for array in given if array is not None)

    def check(self, buffers: Buffers) -> None:
        """What cannot be expressed is refused."""
        o = self.o
        if not self.layout.scalars:
            given = {
                "output1_scale_scalar": o.scale1,
                "output1_scale_gate_scalar": o.gate1,
                "output2_scale_scalar": o.scale2,
            }
            for name, array in given.items():
                check(
                    array is None or bool((ops.to_numpy(array) == 1).all()),
                    f"{name} holds values other than 1; {self.layout.weights} weights with "
                    f"{self.layout.activations} activations have no global scales: pass None",
                    NotImplementedError,
                )
        elif self.layout.weights == "mxfp4":
            gate = ops.to_numpy(o.gate1)
            check(
                bool((gate == gate[0]).all()),
                "output1_scale_gate_scalar differs between experts; MXFP4 weights have no global "
                "scale, so it is the one scale of hidden_states",
                NotImplementedError,
            )
            check(
                bool(np.allclose(ops.to_numpy(buffers["global2"]), 1, rtol=1e-5)),
                "output2_scale_scalar is not 1 / (multiplier of the intermediate); MXFP4 weights "
                "have no global scale",
                NotImplementedError,
            )

    def _matrix(self, which: int, buffers: Buffers, part: slice) -> Matrix:
        o, layout = self.o, self.layout
        values = o.gemm1 if which == 1 else o.gemm2
        scales = o.gemm1_scale if which == 1 else o.gemm2_scale
        bias = buffers.get(f"bias{which}", getattr(o, f"bias{which}"))
        others: dict[str, Any] = {}
        if layout.scalars and layout.weights != "mxfp4":
            others["global_scales"] = _piece(
                o.gate1 if which == 1 else buffers["global2"], part, buffers
            )
        if scales is not None:
            others["scales"] = View(scales[part])
            others["scale_layout"] = layout.scale_layout
        if bias is not None:
            others["bias"] = _piece(bias, part, buffers)
        return Matrix(
            View(values[part]),
            major=layout.major,  # type: ignore[arg-type]
            row_map=layout.row_map,  # type: ignore[arg-type]
            **others,
        )

    def _group(self, buffers: Buffers, part: slice) -> ExpertWeights:
        others: dict[str, Any] = {}
        if self.layout.static:
            mxfp4 = self.layout.weights == "mxfp4"
            others["gemm1_input_scale"] = View(self.o.gate1[:1]) if mxfp4 else buffers["one"]
            others["gemm2_input_scale"] = buffers["mid"][part]
        if self.parametrised:
            for name in ("alpha", "beta", "limit"):
                array = buffers.get(name, getattr(self.o, name))
                if array is not None:
                    others[name] = _piece(array, part, buffers)
        return ExpertWeights(
            gemm1=self._matrix(1, buffers, part),
            gemm2=self._matrix(2, buffers, part),
            row_order=self.layout.row_order,  # type: ignore[arg-type]
            **others,
        )

    def build(self, buffers: Buffers) -> Groups:
        routed = self._group(buffers, slice(0, self.p.local))
        if self.p.shared == 0:
            return routed, None
        return routed, self._group(buffers, slice(self.p.local, self.p.experts))


def _piece(array: Array, part: slice, buffers: Buffers) -> Array:
    """Part of an array: buffers live with the view, everything else is the caller's."""
    owned = any(array is buffer for buffer in buffers.values())
    return array[part] if owned else View(array[part])


def experts_of(o: Operands, layout: Layout, p: Problem, hidden: Array) -> Experts:
    """The experts of a call."""
    builder = _Builder(o, layout, p)
    # On a GPU these weights come with a byte per row that was computed from their scales.
    reads_content = layout.weights == "mxfp4" and layout.activations == "fp8_per_tensor"
    return Experts(
        key=builder.key(),
        build=builder.build,
        buffers=builder.buffers(),
        derive=builder.derive,
        check=builder.check,
        checked=builder.checked(),
        cacheable=not (reads_content and ops.place_of(hidden) != "cpu"),
    )


def check_weight(array: Array, name: str, shape: tuple[int, ...], hidden: Array) -> None:
    """Shape, contiguity and device of a stack of matrices."""
    check(
        ops.shape_of(array) == shape,
        f"{name} has incorrect shape: got {list(ops.shape_of(array))}, wanted {list(shape)}",
    )
    checks.check_contiguous(array, name)
    checks.check_device(array, name, hidden)


def run(
    a: Arguments,
    p: Problem,
    operands: Operands,
    layout: Layout,
    more: dict[str, Any] | None = None,
    **options: bool,
) -> list[Array]:
    """Run a call whose arguments have been checked; FlashInfer's list of results.

    Args:
        a: its arguments.
        p: its sizes.
        operands: the arrays of its experts.
        layout: how they lie.
        more: further arguments of `hopyard.MoeLayer`.
        **options: of `call_of`.
    """
    spec = spec_of(a, p, layout.weights, layout.activations)
    call = call_of(a, p, **options) | (more or {})
    return execute(a, p, spec, experts_of(operands, layout, p, a.hidden_states), call)
