# SPDX-License-Identifier: Apache-2.0
"""NumPy arrays, torch tensors and other DLPack arrays on their way into and out of the library.

NumPy has no bfloat16, so a NumPy ``uint16`` array stands for bfloat16 bits wherever the library
takes bfloat16, and a ``uint8`` array for float8 bytes (e4m3 or e8m0) wherever the number format
says so. ``ml_dtypes`` arrays are taken as well. Torch tensors keep their own dtypes. Arrays on a
GPU are torch's, CuPy's, or any that speak DLPack.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from hopyard._library import lib, tvm_ffi
from hopyard.devices import CPU, device_name, device_of, dlpack_stream

# A NumPy array, a torch tensor, or any other array that speaks DLPack.
Array: TypeAlias = Any

_BYTE_FLOATS = ("float8_e4m3fn", "float8_e8m0fnu")
_TORCH_BYTES = (*_BYTE_FLOATS, "float4_e2m1fn_x2")

# Types whose values the extension's functions take without `as_tensor`: each of an array's dtypes
# crosses, or is refused there by the name of the argument. Torch's are added when the first of its
# tensors is seen. Subclasses are others: what they override is not known.
crosses_as_it_is: set[type] = {tvm_ffi.Tensor, int, bool}


def to_bf16(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """Round float32 values to bfloat16 (nearest, ties to even) and return their bits.

    Args:
        values: array of any shape, converted to float32 first.

    Returns:
        uint16 array of the same shape: the upper half of each float32. NaN stays NaN, overflow
        becomes infinity.
    """
    require_host(values, "values", "to_bf16")
    source = np.ascontiguousarray(values, dtype=np.float32)
    bits = source.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(source), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits (exact).

    Args:
        bits: uint16 array (or ml_dtypes bfloat16) of any shape.

    Raises:
        ValueError: the dtype is another one.
    """
    require_host(bits, "bits", "from_bf16")
    source = np.ascontiguousarray(bits)
    if source.dtype.name == "bfloat16":
        source = source.view(np.uint16)
    if source.dtype != np.uint16:
        raise ValueError(f"bits has dtype {source.dtype}, wanted uint16 (bfloat16 bits)")
    return (source.astype(np.uint32) << 16).view(np.float32)


def is_torch(array: Any) -> bool:
    """Whether `array` is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def without_memory(array: Any) -> str:
    """ "meta" or "fake" for torch tensors that only have a shape, "" for all other arrays."""
    if not is_torch(array):
        return ""
    # A fake tensor exists only where this module of torch was imported.
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake is not None and isinstance(array, fake.FakeTensor):
        return "fake"
    return "meta" if array.is_meta else ""


def require_memory(array: Any, name: str) -> None:
    """Refuse torch's meta and fake tensors, which have no elements to compute with.

    Raises:
        ValueError: naming the tensor.
    """
    kind = without_memory(array)
    if kind:
        raise ValueError(
            f"{name} is a {kind} tensor, which has no memory; wanted one with values. This call "
            "runs at once and cannot be traced: under torch.compile or torch.export use "
            "hopyard.torch_ops"
        )


# A dtype's text takes longer to make than a call of a small layer.
_names: dict[Any, str] = {}


def dtype_name(array: Any) -> str:
    """The dtype in NumPy's spelling: "float32", "bfloat16", "uint16"."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        return type(array).__name__
    name = _names.get(dtype)
    if name is None:
        name = _names[dtype] = str(dtype).removeprefix("torch.")
    return name


def _numpy_tensor(array: npt.NDArray[Any]) -> Any:
    name = dtype_name(array)
    if name == "bfloat16":
        array = array.view(np.uint16)
    elif name in _BYTE_FLOATS:
        array = array.view(np.uint8)
    if array.flags.writeable:
        return tvm_ffi.from_dlpack(array)
    try:
        # DLPack before 1.0 has no way to say read-only, and NumPy then refuses.
        return tvm_ffi.from_dlpack(array.__dlpack__(max_version=(1, 0)))
    except TypeError:  # NumPy before 2.1
        return tvm_ffi.from_dlpack(array.copy())


def _exports_every_dtype(torch: Any) -> bool:
    """Whether torch has DLPack's fast export, which tvm_ffi uses, for all dtypes of numbers."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):  # before torch 2.10
        return False
    if os.environ.get("TVM_FFI_SKIP_DLPACK_C_EXCHANGE_API", "0") == "1":
        return False
    sample = torch.empty(2, dtype=torch.uint8, device="cpu")
    try:
        for name in _TORCH_BYTES:
            if hasattr(torch, name):
                tvm_ffi.from_dlpack(sample.view(getattr(torch, name)))
    except (BufferError, RuntimeError, TypeError):
        return False
    return True


@functools.cache
def _look_at_torch() -> None:
    torch = sys.modules["torch"]
    if _exports_every_dtype(torch):
        crosses_as_it_is.update((torch.Tensor, torch.nn.Parameter))


def _torch_tensor(tensor: Any) -> Any:
    _look_at_torch()
    if dtype_name(tensor) in _TORCH_BYTES:
        tensor = tensor.view(sys.modules["torch"].uint8)
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_cuda and not hasattr(tensor, "__dlpack_c_exchange_api__"):
        # Older torch's __dlpack__ serves the current GPU only.
        return tvm_ffi.from_dlpack(sys.modules["torch"].utils.dlpack.to_dlpack(tensor))
    return tvm_ffi.from_dlpack(tensor)


def as_tensor(array: Any, name: str, stream: int = 0) -> Any:
    """A tvm_ffi tensor that shares the memory of `array` and keeps it alive.

    Args:
        array: of any kind.
        name: for messages.
        stream: handle of the CUDA stream that will use it. Arrays of frameworks other than torch
            make it wait for their own work; torch's current stream is the caller's to choose.

    Raises:
        ValueError: `array` is no array, or has no memory, or a dtype that DLPack does not know.
    """
    try:
        if isinstance(array, np.ndarray):
            return _numpy_tensor(array)
        if is_torch(array):
            if type(array) not in crosses_as_it_is:  # a fake one would pass for one not given
                require_memory(array, name)
            return _torch_tensor(array)
        if isinstance(array, tvm_ffi.Tensor):
            return array
        if hasattr(array, "__dlpack__"):
            if device_of(array) != CPU:
                return tvm_ffi.from_dlpack(array.__dlpack__(stream=dlpack_stream(stream)))
            return tvm_ffi.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        require_memory(array, name)
        raise ValueError(
            f"{name} of dtype {dtype_name(array)} cannot be shared through DLPack: {error}"
        ) from error
    raise ValueError(
        f"{name} is a {type(array).__name__}, wanted a NumPy array, a torch tensor or another "
        "array with __dlpack__"
    )


def as_argument(array: Any, name: str) -> Any:
    """An array that the library has made, as a layer's call takes it."""
    return array if type(array) in crosses_as_it_is else as_tensor(array, name)


def as_output(array: Any, name: str, stream: int = 0) -> Any:
    """`as_tensor` for an array that will be written.

    Raises:
        ValueError: the array is read-only.
    """
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name} is read-only, wanted an array that can be written; pass a copy")
    return as_tensor(array, name, stream)


def is_read_only(array: Any) -> bool:
    """Whether `array` is a NumPy array that must not be written."""
    return isinstance(array, np.ndarray) and not array.flags.writeable


def require_not_float32(array: Any, name: str) -> None:
    """Refuse float32 and float64 where bfloat16 is wanted, naming the conversion.

    Raises:
        ValueError: naming `hopyard.to_bf16` or torch's own conversion.
    """
    if dtype_name(array) not in ("float32", "float64", "float16"):
        return
    remedy = f"{name}.bfloat16()" if is_torch(array) else f"hopyard.to_bf16({name})"
    raise ValueError(
        f"{name} has dtype {dtype_name(array)}, wanted bfloat16"
        f"{'' if is_torch(array) else ' (uint16 bits)'}; convert it with {remedy}"
    )


def gradients_enabled() -> bool:
    """Whether torch, where it has been imported, records what would be differentiated."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.is_grad_enabled()


def _first_requiring_grad(arrays: Mapping[str, Any]) -> str | None:
    for name, array in arrays.items():
        if is_torch(array) and array.requires_grad:
            return name
    return None


def refuse_gradients(arrays: Mapping[str, Any]) -> None:
    """Refuse tensors whose gradients would be lost; for calls while gradients are enabled.

    Raises:
        ValueError: naming the first tensor that requires grad.
    """
    name = _first_requiring_grad(arrays)
    if name is not None:
        raise_requires_grad(name)


def refuse_backward(function: str, arrays: Mapping[str, Any]) -> None:
    """`refuse_gradients` of functions that stand where torch would differentiate.

    Raises:
        NotImplementedError: naming the function and the first tensor that requires grad.
    """
    name = _first_requiring_grad(arrays)
    if name is not None:
        raise NotImplementedError(
            f"{function} has no backward, but {name} requires grad; call it under "
            "torch.no_grad() or torch.inference_mode(), or pass detached tensors"
        )


def raise_requires_grad(name: str) -> NoReturn:
    """The error of `refuse_gradients`."""
    raise ValueError(
        f"{name} requires grad, but Hopyard has no backward and its gradients would be lost; call "
        "under torch.no_grad() or torch.inference_mode(), or pass detached tensors"
    )


def require_host(array: Any, name: str, function: str) -> None:
    """Refuse arrays on a GPU.

    Raises:
        ValueError: naming the array, where it is, and how to get it to the host.
    """
    device = device_of(array)
    if device == CPU:
        return
    remedy = f"{name}.cpu()" if is_torch(array) else "a copy in host memory"
    raise ValueError(
        f"{name} is on {device_name(device)}, wanted host memory: {function} runs on the CPU; pass "
        f"{remedy}"
    )


def _new_of_library(
    like: Any, shape: tuple[int, ...], dtype: str, fill: int | None, device: int
) -> Array:
    if dtype == "bfloat16" and dtype_name(like) == "uint16":
        dtype = "uint16"
    result = lib.new_tensor(list(shape), dtype, device)  # zeroed
    if fill:
        lib.copy_tensor(tvm_ffi.from_dlpack(np.full(shape, fill, dtype)), result)
    return result


def torch_stream(device: int, stream: int) -> AbstractContextManager[Any]:
    """A context in which torch allocates and fills memory of a GPU in the order of a stream."""
    torch = sys.modules["torch"]
    if stream == torch.cuda.current_stream(device).cuda_stream:
        return nullcontext()
    place = torch.device("cuda", device)
    if stream == 0:
        return torch.cuda.stream(torch.cuda.default_stream(place))
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, place))


def _cupy_stream(cupy: Any, stream: int | None) -> AbstractContextManager[Any]:
    """The same for CuPy, whose current device it is; None is the current stream."""
    if stream is None or stream == cupy.cuda.get_current_stream().ptr:
        return nullcontext()
    return cupy.cuda.ExternalStream(stream) if stream else cupy.cuda.Stream.null


def _new_of_torch(like: Any, shape: tuple[int, ...], dtype: str, fill: int | None) -> Array:
    torch = sys.modules["torch"]
    place = {"dtype": getattr(torch, dtype), "device": like.device}
    # Sizes one by one: a tuple takes torch longer to read than the memory to find.
    return torch.empty(*shape, **place) if fill is None else torch.full(shape, fill, **place)


def empty_like_kind(
    like: Any,
    shape: tuple[int, ...],
    dtype: str,
    *,
    fill: int | None = None,
    stream: int | None = None,
) -> Array:
    """A new array of the kind of `like`, on its device.

    Torch for torch and CuPy for CuPy; on the CPU NumPy otherwise. On a GPU a `tvm_ffi.Tensor`
    otherwise, which every framework takes through its `from_dlpack`; it is memory of the library's
    own, and allocating it waits for the device.

    Args:
        like: decides the kind.
        shape: of the new array.
        dtype: NumPy name; "bfloat16" is uint16 in NumPy and CuPy, unless `like` is an ml_dtypes
            array.
        fill: value of every element; None leaves them undefined.
        stream: GPU: handle of the stream that will use it, where it is allocated and filled; None
            is the framework's current one.
    """
    if is_torch(like):
        if stream is None or not like.is_cuda:
            return _new_of_torch(like, shape, dtype, fill)
        with torch_stream(device_of(like), stream):
            return _new_of_torch(like, shape, dtype, fill)
    device = device_of(like)
    cupy = sys.modules.get("cupy")
    in_cupy = cupy is not None and isinstance(like, cupy.ndarray)
    if device != CPU and not in_cupy:
        return _new_of_library(like, shape, dtype, fill, device)
    numpy_dtype: Any = dtype
    if dtype == "bfloat16":
        numpy_dtype = like.dtype if dtype_name(like) == "bfloat16" else np.uint16
    if in_cupy:
        with like.device, _cupy_stream(cupy, stream):
            return (
                cupy.empty(shape, numpy_dtype)
                if fill is None
                else cupy.full(shape, fill, numpy_dtype)
            )
    return np.empty(shape, numpy_dtype) if fill is None else np.full(shape, fill, numpy_dtype)


def token_count(num_tokens: Any, stream: int = 0) -> Any:
    """`num_tokens` as the extension takes it: an int as it is, arrays as tensors."""
    if isinstance(num_tokens, (int, np.integer)):
        return int(num_tokens)
    return as_tensor(num_tokens, "num_tokens", stream)
