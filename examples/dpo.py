"""DPO without logits: answers that are preferred to others, beside TRL's own numbers.

python examples/dpo.py --beta 0.1
"""

import argparse
import copy

import tiny
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from bgkernels.integrations.dpo import dpo_loss, linear_sequence_log_probs

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--beta", type=float, default=0.1, help="what leaving the reference costs")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

lines = [s for s in tiny.TEXT.splitlines() if len(s) > 60][:96]
data = [{"prompt": s[:20], "chosen": s[20:60], "rejected": s[20:60].title()} for s in lines]
reference = tiny.teacher()
policy = copy.deepcopy(reference).requires_grad_()
config = DPOConfig("preferred", beta=args.beta, bf16=False, use_cpu=True, report_to=[])
trainer = DPOTrainer(
    copy.deepcopy(reference), reference, config,
    train_dataset=Dataset.from_list(data), processing_class=tiny.tokenizer(),
)  # fmt: skip


def log_probs(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """``(2·pairs,)`` of the chosen answers, then of the rejected ones."""
    tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
    hidden = model.model(**tokens).last_hidden_state[:, :-1]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    return linear_sequence_log_probs(hidden, model.lm_head.weight, labels)


def trl_numbers(batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """TRL's loss of the same weights, and its mean log-probability of the chosen answers."""
    trainer.model.load_state_dict(policy.state_dict())
    loss = trainer.compute_loss(trainer.model.train(), batch).item()
    return loss, trainer._metrics["train"]["logps/chosen"][-1]


optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4)
rows = []
for _, batch in zip(range(args.steps), trainer.get_train_dataloader(), strict=False):
    with torch.no_grad():
        before = log_probs(reference, batch)
    answers = log_probs(policy, batch)
    loss = dpo_loss(answers, before, beta=args.beta)
    rows.append((loss.item(), answers.chunk(2)[0].mean().item(), *trl_numbers(batch)))
    print("loss {:.6f}, log p of the chosen {:.4f}; TRL: {:.6f}, {:.4f}".format(*rows[-1]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
