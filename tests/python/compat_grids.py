# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's grids of fused tests as one table of cases, in full and reduced.

A row is one call of one operation with its sizes. GRID lists groups of rows as products of axes.
`rows()` gives the reduced ones, small enough for a CPU; `rows(full=True)` gives all.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from compat_reference import Rule

DEEPSEEK = ("deepseek", "deepseek_shuffled", "deepseek_blocks")
FP8_BLOCK = (*DEEPSEEK, "mxfp8")
FP4 = ("nvfp4", "mxfp4_mxfp8", "mxfp4_bf16", "mxfp4_e4m3")
PLAIN = ("bf16", *FP8_BLOCK, "per_tensor", *FP4, "mxint4")
MODES = (*PLAIN, "nvfp4_per_token")


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        group: where it comes from.
        mode: formats and layout, a key of compat_layers.WEIGHTS.
        layer: experts, top_k and intermediate size.
        tokens: number of tokens.
        rule: routing.
        hidden: hidden size.
        activation: key of compat_layers.ACTIVATIONS.
        alpha: parameter of the activation, the same for all experts; beta alike.
        zero: all hidden states are zero.
        bias: "gemm1", "gemm2", "both" or "".
        delta: LoRA delta of a routed operation: "random", of thin matrices of gate and of up,
            "two_slices", or with the first one for both, "shared_a"; "" = none.
        given: how the routed operation gets its ids: "packed", "bfloat16", "float32"; "" = not run.
        shared: number of shared experts.
        tail: rows of the replay buffer behind the tokens.
        tactics: every kernel is run, 10 times.
        four_over_six: what has NVFP4 scales such that blocks end at 6 or at 4: "hidden", "weights",
            "both" or "".
    """

    group: str
    mode: str
    layer: tuple[int, int, int]
    tokens: int
    rule: Rule
    hidden: int = 1024
    activation: str = "swiglu"
    alpha: float | None = None
    beta: float | None = None
    zero: bool = False
    bias: str = ""
    delta: str = ""
    given: str = ""
    shared: int = 0
    tail: int = 0
    tactics: bool = False
    four_over_six: str = ""

    def __str__(self):
        experts, top_k, inter = self.layer
        r = self.rule
        words = [self.group, self.mode, f"E{experts}K{top_k}", f"T{self.tokens}"]
        words += [f"H{self.hidden}I{inter}", self.activation, r.method, r.logits, r.bias]
        words += [self.bias, self.delta, self.given, f"alpha{self.alpha}" if self.alpha else ""]
        words += [f"shared{self.shared}" if self.shared else "", "zero" if self.zero else ""]
        words += [f"4over6_{self.four_over_six}" if self.four_over_six else ""]
        return "-".join(word for word in words if word)

    @property
    def key(self):
        """Rows of one key use the same weights."""
        gated = self.activation not in ("relu2", "identity")
        return self.mode, self.hidden, self.layer[2], gated, self.has_four_over_six("weights")

    def has_four_over_six(self, part):
        """Whether "hidden" or "weights" have such scales."""
        return self.four_over_six in (part, "both")


def group(name, **axes):
    """All rows of a product; an axis is a list, everything else one value."""
    lists = [values if isinstance(values, list) else [values] for values in axes.values()]
    return [Row(name, **dict(zip(axes, one, strict=True))) for one in itertools.product(*lists)]


def sizes(experts, top_k, *inter):
    return [(experts, top_k, i) for i in inter]


def deepseek(groups=1, kept=1, scale=2.5, **types):
    return Rule("DeepSeekV3", groups, kept, scale, **{"bias": "bfloat16", **types})


def by_bf16(*methods):
    return [Rule(method, logits="bfloat16") for method in methods]


RENORMALIZE = Rule("Renormalize", logits="bfloat16")
SOFTMAXES = [Rule("Renormalize"), Rule("RenormalizeNaive"), Rule("TopK")]
# Logits and bias of either type; "default" is a bfloat16 bias where the method has one.
DTYPES = [
    replace(rule, logits=logits, bias=bias if rule.bias else "")
    for logits in ("bfloat16", "float32")
    for bias in ("bfloat16", "float32")
    for rule in (
        deepseek(8, 4),
        *(Rule(m) for m in ("Renormalize", "Default", "SigmoidRenorm", "TopKSigmoid")),
        Rule("MiniMax2", scale=2.5, bias="bfloat16"),
    )
]


def of_method(rules, *methods):
    return list(dict.fromkeys(rule for rule in rules if rule.method in methods))


GRID = [
    # Renormalize
    *group(
        "renormalize",
        mode=[*PLAIN],
        layer=[*sizes(128, 8, 384, 768, 1024), (512, 10, 512), (2048, 32, 384)],
        tokens=[8, 3072],
        rule=RENORMALIZE,
    ),
    *group(
        "renormalize_zero",
        mode=[*FP8_BLOCK],
        layer=[*sizes(128, 8, 384, 768, 1024), (512, 10, 512), (2048, 32, 384)],
        tokens=[8, 3072],
        rule=RENORMALIZE,
        zero=True,
    ),
    *group(
        "sigmoid",
        mode=[*PLAIN],
        layer=sizes(128, 8, 384, 768, 1024),
        tokens=[8, 3072],
        rule=by_bf16("Sigmoid", "TopKSigmoid"),
        activation=["swiglu", "geglu"],
    ),
    # DeepSeek-V3
    *group(
        "deepseek_nemotron",
        mode=["bf16", "per_tensor", *FP4],
        layer=(512, 22, 2688),
        tokens=[8, 3072],
        rule=deepseek(),
        activation="relu2",
    ),
    *group(
        "deepseek",
        mode=["bf16", *FP8_BLOCK, *FP4, "mxint4"],
        layer=sizes(256, 8, 512, 1024, 2048),
        tokens=[8, 3072],
        rule=deepseek(8, 4),
        activation=["swiglu", "geglu"],
    ),
    *group(
        "deepseek_shared",
        mode=[*FP8_BLOCK, *FP4],
        layer=(256, 8, 512),
        tokens=[8, 3072],
        rule=deepseek(8, 4),
        shared=[1, 2],
    ),
    *group(
        "experts_1024",
        mode=[*PLAIN],
        layer=(1024, 8, 512),
        tokens=8,
        hidden=512,
        rule=deepseek(scale=1.0),
    ),
    *group(
        "block_per_token",
        mode=["bf16", *FP8_BLOCK, "per_tensor", "nvfp4"],
        layer=[(384, 6, 512), (512, 22, 512)],
        tokens=[8, 32],
        hidden=512,
        rule=deepseek(),
        activation=["swiglu", "relu2"],
    ),
    # other methods and types
    *group(
        "top_k",
        mode=["nvfp4", "mxfp4_mxfp8"],
        layer=sizes(16, 2, 384, 512, 768, 1024),
        tokens=[8, 128],
        rule=[Rule("TopK"), Rule("TopK", logits="bfloat16")],
        activation=["swiglu", "geglu", "situ"],
    ),
    *group(
        "top_k_situ",
        mode=["nvfp4", "mxfp4_mxfp8"],
        layer=sizes(16, 2, 384, 512, 768, 1024),
        tokens=[8, 128],
        rule=[Rule("TopK"), Rule("TopK", logits="bfloat16")],
        activation="situ",
        alpha=4.0,
        beta=25.0,
    ),
    *group(
        "llama4",
        mode=["per_tensor", "nvfp4"],
        layer=sizes(128, 1, 1024, 2048),
        tokens=[8, 768, 3072],
        rule=by_bf16("Llama4"),
    ),
    *group(
        "dynamic_block",
        mode="deepseek",
        layer=(64, 4, 512),
        tokens=[5, 8, 12, 16],
        hidden=512,
        rule=RENORMALIZE,
    ),
    *group(
        "routing_types",
        mode="deepseek",
        layer=(256, 6, 512),
        tokens=8,
        hidden=512,
        rule=of_method(DTYPES, "DeepSeekV3", "MiniMax2"),
    ),
    *group(
        "routing_types",
        mode="deepseek",
        layer=(128, 8, 512),
        tokens=8,
        hidden=512,
        rule=of_method(DTYPES, "Renormalize", "Default", "SigmoidRenorm", "TopKSigmoid"),
    ),
    *group(
        "routing_types",
        mode="deepseek",
        layer=(256, 8, 512),
        tokens=8,
        hidden=512,
        rule=of_method(DTYPES, "TopKSigmoid"),
    ),
    # biases, ReLU2, LoRA
    *group(
        "bias",
        mode=["nvfp4", "mxfp4_mxfp8"],
        layer=sizes(128, 8, 512, 768, 1024, 2048),
        tokens=[32, 768, 3072],
        rule=RENORMALIZE,
        bias=["gemm1", "gemm2", "both"],
    ),
    *group(
        "mxfp8_relu2",
        mode="mxfp8",
        layer=[*sizes(32, 4, 512, 1024), *sizes(64, 8, 512, 1024)],
        tokens=[1, 16, 64, 256, 1000, 4000],
        hidden=[512, 1024],
        rule=RENORMALIZE,
        activation="relu2",
    ),
    *group(
        "mxfp8_relu2",
        mode="mxfp8",
        layer=(512, 22, 1024),
        tokens=[1, 16, 64, 256, 1000, 4000],
        rule=deepseek(),
        activation="relu2",
    ),
    *group(
        "lora",
        mode=["bf16", "mxint4", *FP8_BLOCK[1:], "nvfp4", "mxfp4_mxfp8", "mxfp4_bf16"],
        layer=(128, 8, 1024),
        tokens=[8, 128],
        rule=RENORMALIZE,
        delta=["random", "two_slices", "shared_a"],
        given="float32",
    ),
    # routed operations
    *group(
        "per_token",
        mode="nvfp4_per_token",
        layer=(32, 4, 2048),
        tokens=[1, 1024],
        hidden=[1024, 4096],
        rule=Rule("TopK"),
        given="packed",
        four_over_six=["", "hidden", "weights", "both"],
    ),
    *group(
        "routed_fp4",
        mode=[*FP4],
        layer=[(128, 8, 3072), (256, 8, 3072)],
        tokens=[1, 1024],
        hidden=[1024, 4096],
        rule=Rule("Renormalize"),
        given="packed",
    ),
    *group(
        "routed_fp4_methods",
        mode=[*FP4],
        layer=(128, 8, 3072),
        tokens=8,
        rule=SOFTMAXES,
        given=["packed", "bfloat16", "float32"],
    ),
    *group(
        "routed_fp4_geglu",
        mode=["nvfp4", "mxfp4_mxfp8"],
        layer=[(128, 4, 1024), (256, 4, 1024)],
        tokens=[1, 8, 1024],
        rule=SOFTMAXES,
        activation="geglu",
        given=["packed", "float32"],
    ),
    *group(
        "routed",
        mode=["bf16", *FP8_BLOCK, "per_tensor"],
        layer=[(e, k, i) for e in (8, 16) for k in (2, 4) for i in (1024, 2048)],
        tokens=[8, 64],
        hidden=[1024, 2048],
        rule=SOFTMAXES[:2],
        given=["packed", "float32"],
    ),
    *group(
        "routed_mxint4",
        mode="mxint4",
        layer=[(16, 2, 1024), (16, 4, 1024)],
        tokens=[8, 64],
        rule=Rule("Renormalize"),
        given=["packed", "float32"],
    ),
    *group(
        "routed_mxfp8",
        mode="mxfp8",
        layer=(16, 4, 1024),
        tokens=8,
        rule=Rule("Renormalize"),
        activation=["swiglu", "geglu", "relu2"],
        given=["packed", "float32"],
    ),
    # replay
    *group(
        "replay_deepseek",
        mode=[*MODES],
        layer=[(16, 2, 1024), (16, 2, 2048), (16, 4, 1024), (16, 4, 2048)],
        tokens=[1, 7, 32],
        rule=deepseek(4, 2),
        given="float32",
        tail=5,
    ),
    *itertools.chain.from_iterable(
        group(
            "replay",
            mode=[*MODES],
            layer=[(experts, 2, 1024), (experts, 4, 1024)],
            tokens=tokens,
            rule=SOFTMAXES,
            given="float32",
            tail=5,
        )
        for tokens, experts in ((4, 16), (16, 16), (32, 16), (32, 256), (512, 16))
    ),
    # every tactic
    *group(
        "tactics",
        mode=["nvfp4", "mxfp4_mxfp8", "mxfp4_bf16"],
        layer=[(128, 4, 3072), (128, 6, 3072), (384, 4, 3072), (384, 6, 3072)],
        tokens=[16, 23, 128],
        hidden=[4096, 7168],
        rule=Rule("Renormalize"),
        given="packed",
        tactics=True,
    ),
    *group(
        "tactics",
        mode=["deepseek", "mxfp8"],
        layer=(128, 4, 3072),
        tokens=[16, 23, 128],
        hidden=4096,
        rule=Rule("Renormalize"),
        given="packed",
        tactics=True,
    ),
    *group(
        "tactics",
        mode="nvfp4_per_token",
        layer=(128, 8, 768),
        tokens=4096,
        hidden=2048,
        rule=Rule("Renormalize"),
        given="packed",
        tactics=True,
    ),
]


def runs(row):
    """Whether FlashInfer's grid has the row: the products above are wider than its support."""
    experts, _, inter = row.layer
    if row.mode == "mxint4" and (row.hidden % 256 or inter % 256):
        return False
    if row.mode == "per_tensor" and experts == 2048:
        return False
    if row.activation == "geglu":
        few = row.tokens <= 128 or row.given
        return few and row.mode in ("nvfp4", "mxfp8", "mxfp4_mxfp8")
    if row.activation == "relu2":
        return row.mode in ("nvfp4", "mxfp8", "per_tensor", "bf16") or row.mode in FP4
    return True


def reduced(row):
    """A row of the same kind that takes milliseconds on a CPU."""
    experts, top_k, inter = row.layer
    small = 128 if inter in (384, 512) and row.mode != "mxint4" else 256
    return replace(
        row,
        layer=(min(experts, 16), min(top_k, 6), small),
        tokens=1 if row.tokens == 1 else 9,
        hidden=256,
    )


def rows(full=False):
    """Rows without repetition, those of one key side by side."""
    chosen = filter(runs, GRID) if full else map(reduced, filter(runs, GRID))
    return sorted(dict.fromkeys(chosen), key=lambda row: row.key)
