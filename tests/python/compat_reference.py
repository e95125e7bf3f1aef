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
SIGNED_E2M1 = torch.cat([E2M1, -E2M1])


# --- number formats


def decode_e2m1(packed):
    """Two codes a byte, low nibble first."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()
    return SIGNED_E2M1.to(packed.device)[codes]


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
    middles, sizes = (grid[1:] + grid[:-1]) / 2, values.abs()
    lower = torch.bucketize(sizes, middles, out_int32=True)
    upper = torch.bucketize(sizes, middles, out_int32=True, right=True)  # another one in a tie
    return torch.copysign(grid[torch.where(lower % 2 == 0, lower, upper)], values)


def round_mxfp8(values):
    amax = blocks(values, 32).abs().amax(-1)
    exponent = torch.where(amax > 0, torch.ceil(torch.log2(amax / 448)), amax.new_tensor(-127.0))
    scale = torch.exp2(exponent)
    return with_scales(e4m3(blocks(values, 32) / scale[..., None]).flatten(-2), scale, 32)


def round_1x128(values):
    scale = blocks(values, 128).abs().amax(-1).clamp(min=1e-30) / 448
    return with_scales(e4m3(blocks(values, 128) / scale[..., None]).flatten(-2), scale, 128)


def round_nvfp4(values, multiplier):
    """Blocks of 16 under one multiplier, or one for each row [n, 1]."""
    scale = e4m3(blocks(values, 16).abs().amax(-1) * multiplier / 6)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = e2m1(blocks(values, 16) * (multiplier / safe)[..., None])
    codes = torch.where(scale[..., None] > 0, codes, torch.zeros_like(codes))
    return with_scales(codes.flatten(-2), scale, 16) / multiplier


def round_nvfp4_rows(values):
    """A multiplier for every row, from its largest value."""
    return round_nvfp4(values, 2688 / values.abs().amax(-1, keepdim=True).clamp(min=1e-30))


def encode_e2m1(values):
    """e2m1 values [.., K] as codes, two a byte, low nibble first."""
    code = (values.abs()[..., None] == E2M1.to(values)).int().argmax(-1)
    code = code + 8 * torch.signbit(values)
    return (code[..., ::2] + 16 * code[..., 1::2]).to(torch.uint8)


def quantize_4over6(matrix, multiplier):
    """NVFP4 codes and e4m3 scales (as bytes) whose blocks end at 6 or at 4, whichever is nearer."""
    values = blocks(matrix.double(), 16)
    tried = []
    for top in (6.0, 4.0):
        scale = e4m3(values.abs().amax(-1) * multiplier.double() / top)
        step = torch.where(scale > 0, scale, torch.ones_like(scale))[..., None] / multiplier
        codes = e2m1(values / step)
        tried.append((codes, scale, (codes * step - values).pow(2).sum(-1)))
    (six, scale6, error6), (four, scale4, error4) = tried
    nearer = error4 < error6
    codes = torch.where(nearer[..., None], four, six).flatten(-2)
    scales = torch.where(nearer, scale4, scale6)
    return encode_e2m1(codes), scales.float().to(torch.float8_e4m3fn).view(torch.uint8)


# --- routing


def select(scores, count):
    """Largest first; equal scores by smaller id."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count]


def kept_groups(scores, groups, kept):
    """Scores with those of all but `kept` groups at minus infinity: a group's is its best two."""
    members = scores.unflatten(-1, (groups, -1))
    best = select(members.topk(2, -1).values.sum(-1), kept)
    out = torch.ones_like(members[..., 0], dtype=torch.bool).scatter(1, best, False)
    return members.masked_fill(out[..., None], -math.inf).flatten(-2)


# Methods that rank the logits themselves.
BY_LOGITS = ("Renormalize", "RenormalizeNaive", "TopK", "TopKSigmoid", "Llama4")


@dataclass(frozen=True)
class Rule:
    """A routing method of FlashInfer's with its parameters.

    Attributes:
        method: name of the method.
        groups: n_group; 1 = no groups.
        kept: topk_group.
        scale: routed_scaling_factor; None = 1.
        bias: type of the selection bias, "" = none.
        renormalise: norm_topk_prob, of SigmoidRenorm.
        logits: type of the logits.
    """

    method: str = "Renormalize"
    groups: int = 1
    kept: int = 1
    scale: float | None = None
    bias: str = ""
    renormalise: bool = True
    logits: str = "float32"

    def scores(self, logits, bias=None):
        """What experts are selected by, and the scores that weights are made of."""
        if self.method in BY_LOGITS:
            return logits, logits.double()
        if self.method == "Default":
            scores = torch.softmax(logits.double(), -1)
            return scores.float(), scores
        chosen_by = torch.sigmoid(logits.float())
        if self.method in ("DeepSeekV3", "MiniMax2") and bias is not None:
            chosen_by = chosen_by + bias.float()
        return chosen_by, torch.sigmoid(logits.double())

    def select(self, scores, top_k):
        """Ids [T, K] of the largest scores."""
        if self.groups > 1:
            scores = kept_groups(scores, self.groups, self.kept)
        return select(scores, top_k)

    def weigh(self, scores, ids):
        """Weights [T, K] of ids."""
        chosen = scores.gather(1, ids)
        if self.method in ("Renormalize", "RenormalizeNaive"):
            return torch.softmax(chosen, -1)
        if self.method in ("TopKSigmoid", "Llama4"):
            return torch.sigmoid(chosen)
        if self.method == "SigmoidRenorm" and self.renormalise:
            return chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-20)
        if self.method in ("DeepSeekV3", "MiniMax2"):
            scale = 1.0 if self.scale is None else self.scale
            return chosen * scale / (chosen.sum(-1, keepdim=True) + 1e-20)
        return chosen

    def route(self, logits, top_k, bias=None):
        """Ids and weights [T, K]."""
        chosen_by, scores = self.scores(logits, bias)
        ids = self.select(chosen_by, top_k)
        return ids, self.weigh(scores, ids)

    def confirm(self, ids, logits, bias=None, slack=2e-6):
        """Weights of recorded ids, which must be those of `route`. Where scores are computed, ties
        may differ: scores that are higher by `slack` at the recorded ids lead to these ids."""
        ids = ids.to(logits.device).long()
        chosen_by, scores = self.scores(logits, bias)
        top_k = ids.shape[1]
        differ = (self.select(chosen_by, top_k) != ids).any(1)
        if differ.any():
            assert self.method not in BY_LOGITS, "other experts, although logits are not computed"
            nudge = torch.zeros_like(chosen_by).scatter(1, ids, slack)
            nudge = nudge * chosen_by.abs().clamp(min=0 if bias is None else 1)
            again = self.select((chosen_by + nudge)[differ], top_k)
            wanted = ids[differ]
            assert (again.sort(-1).values == wanted.sort(-1).values).all(), "other experts"
            values = chosen_by[differ].gather(1, wanted)
            assert (values.diff(dim=-1) <= 2 * slack * values.abs().amax().clamp(min=1)).all()
        return self.weigh(scores, ids)


def route(method, logits, top_k, *, bias=None, **options):
    """Ids and weights [T, K] of a FlashInfer method, by name."""
    return Rule(method, **options).route(logits, top_k, bias)


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


def first_gemm(layer, rows, expert, delta):
    """Gate and up of an expert's rows; `delta` is added."""
    gate = rows @ layer.gate[expert].T
    up = None if layer.up is None else rows @ layer.up[expert].T
    if layer.bias is not None:
        gate = gate + layer.bias[0][expert]
        up = None if up is None else up + layer.bias[1][expert]
    if delta is not None:
        inter = gate.shape[1]
        up, gate = up + delta[:, :inter], gate + delta[:, inter:]
    return gate, up


def evaluate(layer, x, ids, weights, *, on_input=False, delta=None):
    """Outputs [T, H] in the precision of the layer, with the roundings of the formats and without
    any; ids outside its experts are skipped."""
    outputs = torch.zeros_like(x), torch.zeros_like(x)
    for expert in range(layer.gate.shape[0]):
        tokens, slots = torch.nonzero(ids == expert, as_tuple=True)
        if tokens.numel() == 0:
            continue
        rows, w = x[tokens], weights[tokens, slots, None].to(x.dtype)
        if on_input:
            rows, w = rows * w, torch.ones_like(w)
        added = None if delta is None else delta[tokens, slots].to(x.dtype)
        inner = activate(layer, *first_gemm(layer, rows, expert, added), expert)
        for output, rounding in zip(outputs, (True, False), strict=True):
            middle = inner
            if rounding and layer.round_mid is not None:
                middle = layer.round_mid(inner, expert)
            rows = middle @ layer.down[expert].T
            if layer.bias is not None:
                rows = rows + layer.bias[2][expert]
            output.index_add_(0, tokens, w * (bf16(rows) if rounding else rows))
    return bf16(outputs[0]), outputs[1]


# --- criteria


def percent_close(reference, output, percent):
    """FlashInfer's criterion: atol 0.1, rtol 0.85 on a share of the elements."""
    reference, output = reference.float().cpu(), output.float().cpu()
    assert reference.shape == output.shape
    assert torch.isfinite(reference).all()
    assert torch.isfinite(output).all()
    close = torch.isclose(reference, output, atol=0.1, rtol=0.85).float().mean().item()
    assert close >= percent, f"{close:.4f} of the elements are close, wanted {percent}"


def parity(left, right, tolerance, share):
    """FlashInfer's criterion for two ways to one result: at most a share of the elements differ."""
    left, right = left.float(), right.float()
    differ = 1 - torch.isclose(left, right, atol=tolerance, rtol=tolerance).float().mean().item()
    assert differ < share, f"{differ:.4f} of the elements differ, wanted less than {share}"


def worst_row(output, wanted):
    error = (output.double() - wanted.double()).norm(dim=-1)
    return (error / wanted.double().norm(dim=-1).clamp(min=1e-30)).max().item()


def judge(layer, x, ids, weights, output, *, percent=0.9, tolerance=0.05, **call):
    """FlashInfer's criterion and Hopyard's: at most twice the error of a plain FP32 implementation
    with the same roundings, and the worst row within the format's tolerance of exact arithmetic
    with them. Returns the latter's result."""
    output, place, width = output.float(), output.device, output.shape[1]
    x, ids, weights = x.to(place), ids.to(place), weights.to(place)
    if call.get("delta") is not None:
        call["delta"] = call["delta"].to(place)
    double = layer.to(torch.float64, place)
    rounded, exact = (out[:, :width] for out in evaluate(double, x.double(), ids, weights, **call))
    single = layer.to(torch.float32, place)
    plain = evaluate(single, x.float(), ids, weights, **call)[0][:, :width]
    percent_close(rounded, output, percent)
    ours = (output.double() - exact).pow(2).mean().sqrt().item()
    allowed = 2 * (plain.double() - exact).pow(2).mean().sqrt().item()
    assert ours <= allowed, f"error {ours:.3e} is more than twice that of plain FP32, {allowed:.3e}"
    worst = worst_row(output, rounded)
    assert worst <= tolerance, f"worst row {worst:.4f}, wanted at most {tolerance}"
    return rounded
