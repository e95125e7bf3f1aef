# SPDX-License-Identifier: Apache-2.0
"""Our layer times beside the best peer's, and whether they meet the targets.

    python3 tools/compare_peers.py FORWARD_JSONL PEERS_CSV [--check]

FORWARD_JSONL: JSON lines of a layer benchmark, of which uniformly routed ones count, the last of
each case. PEERS_CSV: header gpu,model,part,dtype,peer,routing,T,us,...,pct_of_floor; rows with
part=layer, routing=rand count. FP8 is compared at the same scale granularity. A target closes a
part of the peer's distance to the floor: see `share_to_close`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Our names of layers -> the peers'.
PEER_MODELS = {
    "deepseek-v3": "dsv3",
    "deepseek-v3-ep8": "dsv3_ep8",
    "qwen3-235b-a22b": "qwen235",
    "qwen3-30b-a3b": "qwen30",
    "gpt-oss-120b": "gptoss",
    "mixtral-8x7b": "mixtral",
    "llama-4-scout": "scout",
}

# A peer this close to the floor is not asked to be beaten by more than 2 %.
NEAR_FLOOR = 0.85
NEAR_FLOOR_FACTOR = 0.98


@dataclass(frozen=True)
class Case:
    """What is compared like with like."""

    gpu: str  # as the peers' table writes it
    model: str  # likewise
    dtype: str  # likewise
    scales: str  # of FP8: how many values one scale covers; else empty
    tokens: int


@dataclass(frozen=True)
class Peer:
    """A peer's time of a case."""

    name: str
    us: float


@dataclass(frozen=True)
class Comparison:
    """A line of ours beside its best peer."""

    line: dict
    peer: Peer
    target_us: float

    @property
    def us(self) -> float:
        """Our time."""
        return self.line["median_us"]

    @property
    def met(self) -> bool:
        """Whether our time reaches the target."""
        return self.us <= self.target_us


def peer_dtype(weights: str, activations: str) -> str | None:
    """The peers' name for a pair of formats; None where no peer computes it.

    No peer on Hopper multiplies MXFP4 weights with FP8 activations: its users run BF16 activations.
    """
    if weights == "mxfp4" and (activations == "bf16" or is_fp8(activations)):
        return "mx4w-bf16x"
    if is_fp8(weights) and is_fp8(activations):
        return "fp8"
    return "bf16" if weights == activations == "bf16" else None


def fp8_scales(weights: str, activations: str) -> str:
    """How finely FP8 is scaled in our pair of formats; empty where it is not FP8 on both sides."""
    if peer_dtype(weights, activations) != "fp8":
        return ""
    return {"fp8_per_tensor": "tensor", "fp8_per_channel": "row"}.get(weights, "block")


def peer_scales(row: dict[str, str]) -> str:
    """The same of a peer's row, whose name says so where it is not one scale per block."""
    if row["dtype"] != "fp8":
        return ""
    return (
        "tensor" if "per-tensor" in row["peer"] else "row" if "rowwise" in row["peer"] else "block"
    )


def is_fp8(name: str) -> bool:
    """Whether a weight or activation format is an FP8 one."""
    return name.startswith("fp8") or name == "mxfp8"


def share_to_close(tokens: int, weights: str, activations: str) -> float:
    """Part of the peer's distance to the floor that we want to close."""
    if tokens <= 4:
        return 0.5
    if tokens <= 256:
        return 0.35
    if tokens <= 4096:
        return 0.5
    return 0.5 if weights == "mxfp4" and is_fp8(activations) else 0.3


def target_us(line: dict, peer_us: float) -> float:
    """Time that a line of ours has to reach against this peer."""
    floor = line["floor_us"]
    share = share_to_close(line["tokens"], line["weights"], line["activations"])
    target = floor + (1.0 - share) * (peer_us - floor)
    if floor >= NEAR_FLOOR * peer_us:
        target = max(target, NEAR_FLOOR_FACTOR * peer_us)
    return target


def best_peers(rows: Iterable[dict[str, str]]) -> dict[Case, Peer]:
    """The fastest peer of every case in the peers' table."""
    best: dict[Case, Peer] = {}
    for row in rows:
        if row["part"] != "layer" or row["routing"] != "rand":
            continue
        case = Case(row["gpu"], row["model"], row["dtype"], peer_scales(row), int(row["T"]))
        peer = Peer(row["peer"], float(row["us"]))
        if case not in best or peer.us < best[case].us:
            best[case] = peer
    return best


def case_of(line: dict, gpus: Iterable[str]) -> Case | None:
    """The peers' case that a line of ours belongs to, if there can be one."""
    gpu = next((name for name in gpus if name in line["gpu"].split()), None)
    model = PEER_MODELS.get(line["model"])
    dtype = peer_dtype(line["weights"], line["activations"])
    if gpu is None or model is None or dtype is None or line["routing"] != "uniform":
        return None
    scales = fp8_scales(line["weights"], line["activations"])
    return Case(gpu, model, dtype, scales, line["tokens"])


def compare(lines: Iterable[dict], peers: dict[Case, Peer]) -> list[Comparison]:
    """Our lines that have a peer, the last one of each case, pair of formats and packing."""
    gpus = sorted({case.gpu for case in peers})
    found: dict[tuple[Case, str, str, bool], Comparison] = {}
    for line in lines:
        case = case_of(line, gpus)
        if case in peers:
            peer = peers[case]
            packed = line.get("packed", False)
            key = (case, line["weights"], line["activations"], packed)
            found[key] = Comparison(line, peer, target_us(line, peer.us))
    return list(found.values())


def count_targets(comparisons: Iterable[Comparison]) -> tuple[int, int]:
    """Targets that are met, and all of them.

    A layer whose weights may be packed has two lines and one target, which either may meet.
    """
    met: dict[tuple[str, str, str, int], bool] = {}
    for c in comparisons:
        key = (c.line["model"], c.line["weights"], c.line["activations"], c.line["tokens"])
        met[key] = met.get(key, False) or c.met
    return sum(met.values()), len(met)


def format_table(comparisons: Iterable[Comparison]) -> str:
    """One line per comparison; ratio is our time over the peer's."""
    lines = [
        f"{'model':16} {'weights x activations':28} {'T':>6} {'ours us':>9} {'peer us':>9} "
        f"{'ratio':>6} {'of floor':>8} {'target us':>9}  met  peer; our tactic"
    ]
    for c in comparisons:
        line = c.line
        packed = " packed" if line.get("packed", False) else ""
        formats = f"{line['weights']}{packed} x {line['activations']}"
        lines.append(
            f"{line['model']:16} {formats:28} {line['tokens']:6} {c.us:9.1f} {c.peer.us:9.1f} "
            f"{c.us / c.peer.us:6.2f} {line['floor_us'] / c.us:8.0%} {c.target_us:9.1f}  "
            f"{'yes' if c.met else 'NO ':3}  {c.peer.name}; {line['tactic']}"
        )
    return "\n".join(lines)


def read_lines(path: Path) -> list[dict]:
    """The JSON lines of a file; empty lines are passed over."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; with --check, 1 where a target is missed or nothing could be compared."""
    parser = argparse.ArgumentParser(description="Our layer times beside the best peer's.")
    parser.add_argument("forward", type=Path, help="JSON lines of a layer benchmark")
    parser.add_argument("peers", type=Path, help="CSV of the peers' times")
    parser.add_argument("--check", action="store_true", help="fail where a target is missed")
    options = parser.parse_args(arguments)
    with options.peers.open(encoding="utf-8", newline="") as peers_file:
        peers = best_peers(csv.DictReader(peers_file))
    comparisons = compare(read_lines(options.forward), peers)
    print(format_table(comparisons))
    met, targets = count_targets(comparisons)
    print(f"{met} of {targets} targets met")
    return 1 if options.check and (met < targets or not comparisons) else 0


if __name__ == "__main__":
    sys.exit(main())
