# SPDX-License-Identifier: Apache-2.0
"""The `hopyard` command as a function, and the files that it reads and writes.

Runs build/release/bin/hopyard, or the program named by HOPYARD_BIN.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HOPYARD = Path(os.environ.get("HOPYARD_BIN", ROOT / "build/release/bin/hopyard"))
DTYPES = {"BF16": np.uint16, "F32": np.float32, "I32": np.int32, "I16": np.int16, "U8": np.uint8}


def hopyard(*args: object, code: int = 0) -> subprocess.CompletedProcess:
    command = [str(HOPYARD), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def result(*args: object, code: int = 0) -> dict:
    """Runs with --json: stdout is one JSON value and nothing else."""
    return json.loads(hopyard(*args, "--json", "--progress", "off", code=code).stdout)


def refusal(*args: object) -> str:
    """A refused call: exit code 2, the message on stderr, the same in JSON."""
    done = hopyard(*args, "--json", "--progress", "off", code=2)
    error = json.loads(done.stdout)["error"]
    assert f"error: {error['message']}" in done.stderr
    assert "terminate" not in done.stderr
    return f"{error['kind']}: {error['message']}"


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = raw[8 + size + begin : 8 + size + end]
        dtype = DTYPES.get(entry["dtype"], np.uint8)
        tensors[name] = np.frombuffer(data, dtype=dtype).reshape(entry["shape"])
    return tensors


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    header, blobs, offset = {}, [], 0
    for name, (dtype, array) in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        offsets = [offset, offset + len(blob)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return path


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
