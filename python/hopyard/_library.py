# SPDX-License-Identifier: Apache-2.0
"""Loads the extension module and registers its exception classes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


class InternalError(RuntimeError):
    """A defect of Hopyard: please report it with its message."""


def _import_tvm_ffi() -> Any:
    """Import tvm_ffi without letting it import torch, run programs or compile anything.

    On import tvm_ffi imports torch and cuda.bindings where they are installed, which takes seconds
    and runs ldconfig, and for some versions of torch it compiles a bridge. Hopyard needs none of
    it: tensors cross through DLPack. What a process has imported already is left as it is.
    """
    if "tvm_ffi" in sys.modules:
        return sys.modules["tvm_ffi"]
    switch = "TVM_FFI_DISABLE_TORCH_C_DLPACK"
    previous = os.environ.get(switch)
    os.environ[switch] = "1"
    hidden = [name for name in ("torch", "cuda.bindings") if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # makes its import fail
    try:
        import tvm_ffi
    finally:
        for name in hidden:
            del sys.modules[name]
        if previous is None:
            del os.environ[switch]
        else:
            os.environ[switch] = previous
    return tvm_ffi


def _library_path() -> Path:
    override = os.environ.get("HOPYARD_LIBRARY")
    path = Path(override) if override else Path(__file__).parent / "libhopyard_ffi.so"
    if not path.is_file():
        where = "HOPYARD_LIBRARY" if override else "the package"
        raise ImportError(
            f"hopyard: {where} has no extension module at {path}; install the package "
            "(pip install .), or build the target hopyard_ffi with -DHOPYARD_FFI=ON and set "
            "HOPYARD_LIBRARY to the libhopyard_ffi.so"
        )
    return path


tvm_ffi = _import_tvm_ffi()
for _name, _cls in (
    ("NotImplementedError", NotImplementedError),
    ("TimeoutError", TimeoutError),
    ("InternalError", InternalError),
):
    tvm_ffi.register_error(_name, _cls)

# Functions of src/ffi/exports.cc. The module stays loaded until the process ends: objects that it
# made hold pointers to its code.
lib: Any = tvm_ffi.load_module(_library_path())
call_layer: Any = lib.layer_function()
for _function in (
    call_layer,
    lib.route,
    lib.fused_topk_deepseek,
    lib.quantize,
    lib.dequantize,
    lib.make_weights,
    lib.copy_weights,
    lib.update_weights,
    lib.new_tensor,
    lib.copy_tensor,
    lib.save_tuning_table,
    lib.tune,
    lib.wait_for_tuning,
):  # what computes, copies, or waits for a GPU or another process
    _function.release_gil = True  # whatever the environment's default is
