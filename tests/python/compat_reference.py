# SPDX-License-Identifier: Apache-2.0
"""An MoE layer in plain torch, from decoded weights: the definition that compat tests compare with.

Nothing here goes through hopyard: codes are decoded, values rounded and experts chosen by the
definitions of the formats and of the routing methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


# --- number formats


def decode_e2m1(packed):
    """Two codes a byte, low nibble first."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    values = E2M1[codes & 7]
    return torch.where(codes >= 8, -values, values)


def decode_int4(packed):
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).double()
    return torch.where(codes >= 8, codes - 16, codes)


def decode_e8m0(bytes_):
    return torch.exp2(bytes_.double() - 127)


def e4m3(values):
    """Rounded to e4m3, saturating."""
    return values.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype)


def bf16(values):
    return values.float().bfloat16().to(values.dtype)


def blocks(values, size):
    return values.unflatten(-1, (-1, size))


def with_scales(codes, scales, size):
    """Codes times one scale for `size` columns."""
    return (blocks(codes, size) * scales.to(codes.dtype)[..., None]).flatten(-2)


def e2m1(values):
    """Rounded to the nearest e2m1 value, ties to even codes."""
    grid = E2M1.to(values)
    distance = (values.abs()[..., None] - grid).abs()
    best = distance.min(-1, keepdim=True).values
    even = torch.arange(8, device=values.device) % 2 == 0
    rank = torch.where(distance == best, torch.where(even, 0, 1), 2)
    return torch.copysign(grid[rank.argmin(-1)], values)


def round_mxfp8(values):
    amax = blocks(values, 32).abs().amax(-1)
    exponent = torch.where(amax > 0, torch.ceil(torch.log2(amax / 448)), amax.new_tensor(-127.0))
    scale = torch.exp2(exponent)
    return with_scales(e4m3(blocks(values, 32) / scale[..., None]).flatten(-2), scale, 32)


def round_1x128(values):
    scale = blocks(values, 128).abs().amax(-1).clamp(min=1e-30) / 448
    return with_scales(e4m3(blocks(values, 128) / scale[..., None]).flatten(-2), scale, 128)


def round_nvfp4(values, multiplier):
    scale = e4m3(blocks(values, 16).abs().amax(-1) * multiplier / 6)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = e2m1(blocks(values, 16) * (multiplier / safe)[..., None])
    codes = torch.where(scale[..., None] > 0, codes, torch.zeros_like(codes))
    return with_scales(codes.flatten(-2), scale, 16) / multiplier


def round_nvfp4_rows(values):
    """A multiplier for every row, from its largest value."""
    amax = values.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return torch.cat(
        [round_nvfp4(row[None], 2688 / top) for row, top in zip(values, amax, strict=True)]
    )


# --- routing


def select(scores, count):
    """Largest first; equal scores by smaller id."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count]


def route(method, logits, top_k, *, bias=None, groups=1, kept=1, scale=1.0, renormalise=True):
    """Ids and weights [T, K] of a FlashInfer method, by name."""
    z = logits.double()
    sigmoid = torch.sigmoid(logits.float()).double()
    if method == "Default":
        scores = torch.softmax(z, -1)
        ids = select(scores.float(), top_k)
        return ids, scores.gather(1, ids)
    if method in ("Renormalize", "RenormalizeNaive"):
        ids = select(logits, top_k)
        return ids, torch.softmax(z.gather(1, ids), -1)
    if method in ("TopK", "TopKSigmoid", "Llama4"):
        ids = select(logits, top_k)
        chosen = z.gather(1, ids)
        return ids, chosen if method == "TopK" else torch.sigmoid(chosen)
    if method in ("Sigmoid", "SigmoidRenorm"):
        ids = select(sigmoid.float(), top_k)
        chosen = sigmoid.gather(1, ids)
        if method == "SigmoidRenorm" and renormalise:
            chosen = chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-20)
        return ids, chosen
    biased = sigmoid.float() + (0 if bias is None else bias.float())
    if groups > 1:
        tokens, experts = biased.shape
        members = biased.view(tokens, groups, experts // groups)
        best = select(members.topk(2, -1).values.sum(-1), kept)
        mask = torch.zeros(tokens, groups, dtype=torch.bool).scatter(1, best, True)
        biased = members.masked_fill(~mask[..., None], -math.inf).view(tokens, experts)
    ids = select(biased, top_k)
    chosen = torch.sigmoid(z).gather(1, ids)
    return ids, chosen * scale / (chosen.sum(-1, keepdim=True) + 1e-20)


# --- layer


@dataclass
class Layer:
    """Decoded weights in natural units; `up` is None where the activation is not gated.

    Attributes:
        gate: [E, I, H], or GEMM1 as a whole.
        up: [E, I, H].
        down: [E, H, I].
        activation: "swiglu", "geglu", "situ", "relu2" or "identity".
        round_mid: rounds rows [n, I] of an expert's activation: (values, expert) -> values.
        bias: (gate, up, down) [E, ..] or None.
        alpha: [E]; beta and limit alike.
    """

    gate: torch.Tensor
    up: torch.Tensor | None
    down: torch.Tensor
    activation: str = "swiglu"
    round_mid: object = None
    bias: tuple | None = None
    alpha: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    limit: torch.Tensor | None = None

    def to(self, dtype, device="cpu"):
        """The same layer in another precision and place."""

        def cast(value):
            if isinstance(value, tuple):
                return tuple(cast(v) for v in value)
            return value.to(device, dtype) if isinstance(value, torch.Tensor) else value

        return replace(self, **{name: cast(value) for name, value in vars(self).items()})


def activate(layer, gate, up, expert):
    kind = layer.activation
    if kind == "relu2":
        return gate.clamp(min=0) ** 2
    if kind == "identity":
        return gate
    if kind == "geglu":
        return up * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))

    def parameter(values, default):
        return default if values is None else values[expert]

    limit = parameter(layer.limit, math.inf)
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    if kind == "situ":
        alpha, beta = parameter(layer.alpha, 1.0), parameter(layer.beta, 1.0)
        bounded = alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate)
        return beta * torch.tanh(up / beta) * bounded
    alpha, beta = parameter(layer.alpha, 1.0), parameter(layer.beta, 0.0)
    return (up + beta) * gate * torch.sigmoid(alpha * gate)


def evaluate(layer, x, ids, weights, *, on_input=False, delta=None, rounding=True):
    """Output [T, H] in the precision of the layer; ids outside its experts are skipped."""
    output = torch.zeros_like(x)
    experts = layer.gate.shape[0]
    for expert in range(experts):
        tokens, slots = torch.nonzero(ids == expert, as_tuple=True)
        if tokens.numel() == 0:
            continue
        rows, w = x[tokens], weights[tokens, slots, None].to(x.dtype)
        gate = rows @ layer.gate[expert].T
        up = None if layer.up is None else rows @ layer.up[expert].T
        if on_input:
            gate, up, w = gate * w, None if up is None else up * w, torch.ones_like(w)
        if layer.bias is not None:
            gate = gate + layer.bias[0][expert]
            up = None if up is None else up + layer.bias[1][expert]
        if delta is not None:
            inter = gate.shape[1]
            added = delta[tokens, slots].to(x.dtype)
            up, gate = up + added[:, :inter], gate + added[:, inter:]
        inner = activate(layer, gate, up, expert)
        if rounding and layer.round_mid is not None:
            inner = layer.round_mid(inner, expert)
        rows = inner @ layer.down[expert].T
        if layer.bias is not None:
            rows = rows + layer.bias[2][expert]
        output.index_add_(0, tokens, w * (bf16(rows) if rounding else rows))
    return bf16(output) if rounding else output


# --- criteria


def percent_close(reference, output, percent):
    """FlashInfer's criterion: atol 0.1, rtol 0.85 on a share of the elements."""
    reference, output = reference.float().cpu(), output.float().cpu()
    assert reference.shape == output.shape
    assert torch.isfinite(reference).all()
    assert torch.isfinite(output).all()
    close = torch.isclose(reference, output, atol=0.1, rtol=0.85).float().mean().item()
    assert close >= percent, f"{close:.4f} of the elements are close, wanted {percent}"


def worst_row(output, wanted):
    error = (output.double() - wanted.double()).norm(dim=-1)
    return (error / wanted.double().norm(dim=-1).clamp(min=1e-30)).max().item()


def judge(layer, x, ids, weights, output, *, percent=0.9, tolerance=0.05, **call):
    """FlashInfer's criterion and Hopyard's: at most twice the error of a plain FP32 implementation
    with the same roundings, and the worst row within the format's tolerance of exact arithmetic
    with them."""
    output, place, width = output.float(), output.device, output.shape[1]
    x, ids, weights = x.to(place), ids.to(place), weights.to(place)
    if call.get("delta") is not None:
        call["delta"] = call["delta"].to(place)
    double = layer.to(torch.float64, place)
    exact = evaluate(double, x.double(), ids, weights, rounding=False, **call)[:, :width]
    rounded = evaluate(double, x.double(), ids, weights, **call)[:, :width]
    single = layer.to(torch.float32, place)
    plain = evaluate(single, x.float(), ids, weights, **call)[:, :width]
    percent_close(rounded, output, percent)
    ours = (output.double() - exact).pow(2).mean().sqrt().item()
    allowed = 2 * (plain.double() - exact).pow(2).mean().sqrt().item()
    assert ours <= allowed, f"error {ours:.3e} is more than twice that of plain FP32, {allowed:.3e}"
    worst = worst_row(output, rounded)
    assert worst <= tolerance, f"worst row {worst:.4f}, wanted at most {tolerance}"
