"""DPO's loss from the heads alone, three ways: processor time and memory beside dense torch.

``python -m benchmarks.preference`` runs whole log-softmaxes, TRL's fused head, and this package's
statistics in turn, forward and backward, in one process. Policy and reference have no layers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from benchmarks.limits import MIB
from benchmarks.measure import resident, settle
from bgkernels.integrations.dpo import dpo_loss, linear_sequence_log_probs

LogProbs = Callable[[LlamaForCausalLM, Tensor, Tensor], Tensor]


def dense(model: LlamaForCausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Whole log-softmaxes, and the labels picked from them."""
    whole = model(inputs_embeds=hidden).logits[:, :-1].log_softmax(-1)
    return whole.gather(-1, labels[:, 1:, None]).squeeze(-1).sum(-1)


def trl(model: LlamaForCausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """TRL's head, in chunks of positions and columns."""
    return model(inputs_embeds=hidden, labels=labels, fused_lm_head=True).log_probs.sum(-1)


def ours(model: LlamaForCausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Row statistics of the labels."""
    states = model.model(inputs_embeds=hidden).last_hidden_state[:, :-1]
    return linear_sequence_log_probs(states, model.lm_head.weight, labels[:, 1:])


WAYS: dict[str, LogProbs] = {"dense": dense, "trl": trl, "ours": ours}


def model(width: int, vocab: int, seed: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A final norm and a head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=1, num_hidden_layers=0,
        num_attention_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    made = LlamaForCausalLM(config).to(dtype)
    add_fused_lm_head(made)
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preference", description=__doc__)
    add = parser.add_argument
    add("--pairs", type=int, default=2)
    add("--length", type=int, default=257)
    add("--width", type=int, default=896)
    add("--vocab", type=int, default=151_936)
    add("--dtype", default="float32")
    add("--rounds", type=int, default=3)
    o = parser.parse_args()
    dtype = getattr(torch, o.dtype)
    policy, reference = (model(o.width, o.vocab, seed, dtype) for seed in (0, 1))
    hidden = torch.randn(2 * o.pairs, o.length, o.width, dtype=dtype)
    labels = torch.randint(o.vocab, (2 * o.pairs, o.length))

    def step(log_probs: LogProbs) -> tuple[float, float, int]:
        """Loss, seconds of the processor, and bytes above what was resident before."""
        policy.zero_grad()
        base, begin = settle(), time.process_time()
        with torch.no_grad():
            before = log_probs(reference, hidden, labels)
        loss = dpo_loss(log_probs(policy, hidden, labels), before)
        loss.backward()
        seconds = time.process_time() - begin
        return loss.item(), seconds, resident("VmHWM") - base

    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in WAYS}
    for number in range(o.rounds + 1):
        for name, way in WAYS.items():
            taken = step(way)
            if number:  # the first is to warm up
                found[name].append(taken)
    limit = min(seconds for _, seconds, _ in found["dense"])
    for name, taken in found.items():
        loss, seconds, peak = taken[-1][0], min(t[1] for t in taken), max(t[2] for t in taken)
        print(
            f"{name:6} loss {loss:.6f}  {seconds:6.2f} s  {seconds / limit:5.2f} × dense  "
            f"{peak / MIB:7,.0f} MiB"
        )


if __name__ == "__main__":
    main()
