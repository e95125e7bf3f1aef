# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning: a rollout's routing replayed when its log-probabilities are computed.

A trainer that lets its routers choose again sends some tokens to other experts than the rollout
did: batches have another shape and weights have moved. The ratio of the probabilities then measures
routing as much as policy. Replaying the recorded ids removes that.
Run it with torch and transformers installed: python examples/python/rl_replay.py
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads must not spin

import torch
import transformers

import hopyard
import hopyard.integrations.transformers  # registers "hopyard"

PROMPT, STEPS = 6, 26


def make_policy() -> transformers.PreTrainedModel:
    """A random model in BF16, its experts run by Hopyard."""
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=4,
        initializer_range=0.1,
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_experts_implementation("hopyard")
    return model


def log_probabilities(model: transformers.PreTrainedModel, sequence: torch.Tensor) -> torch.Tensor:
    """Of each generated token, in one forward pass over the sequence."""
    logits = model(sequence[:, :-1]).logits[0].float()
    chosen = logits.log_softmax(-1).gather(1, sequence[0, 1:, None])
    return chosen[PROMPT - 1 :, 0]


@torch.no_grad()
def main() -> None:
    """Rollout, replay, an update of the weights in place, replay again."""
    transformers.utils.logging.set_verbosity_error()
    policy = make_policy()
    prompt = torch.randint(0, 64, (1, PROMPT))
    with hopyard.record_routing(policy) as rollout:
        sequence = policy.generate(prompt, max_new_tokens=STEPS, do_sample=True, eos_token_id=None)
    ids = rollout.ids  # [tokens, layers, top_k]: as many tokens as went through the model
    print(f"rollout of {STEPS} tokens, routing {list(ids.shape)}")

    with hopyard.replay_routing(policy, ids), hopyard.record_routing(policy) as trainer:
        first = log_probabilities(policy, sequence)
    with hopyard.replay_routing(policy, trainer.ids):
        again = log_probabilities(policy, sequence)
    if not (torch.equal(trainer.ids, ids) and torch.equal(first, again)):
        raise SystemExit("the round trip is not bit-identical")
    print("replay out -> replay in: the same ids and the same bits")

    for parameter in policy.parameters():  # as an optimiser would: in place, the layers see it
        parameter.add_(torch.randn_like(parameter) * 0.001)
    with hopyard.record_routing(policy) as free:
        chosen_again = log_probabilities(policy, sequence)
    with hopyard.replay_routing(policy, ids):
        replayed = log_probabilities(policy, sequence)
    moved = (free.ids.sort(-1)[0] != ids.sort(-1)[0]).any(-1).any(-1).float().mean()
    print(f"after an update {100 * float(moved):.0f} % of the tokens would be routed differently")
    for name, values in (("free", chosen_again), ("replayed", replayed)):
        change = float((values - first).abs().mean())
        print(f"{name:8} routing: mean change of a log-probability {change:.4f}")


if __name__ == "__main__":
    main()
