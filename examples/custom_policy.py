"""A routing policy of your own: trust a label as far as the teacher finds it plausible.

python examples/custom_policy.py --noise 0.3

Some labels are wrong. Each policy trains a student on them; the table is of clean labels.
"""

import argparse

import tiny
import torch

import bgkernels as bg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--noise", type=float, default=0.3, help="share of labels that are wrong")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()


@bg.routing.register
def plausible(power: float = 1.0) -> bg.routing.Policy:
    """``(c, 1 - c)``, where ``c`` compares the label with the teacher's favourite token."""

    def weights(s: bg.RowStats) -> tuple[torch.Tensor, torch.Tensor]:
        c = (s.logp_t.exp() / s.max_prob_t).clamp(max=1) ** power
        return c, 1 - c

    return bg.routing.Policy("plausible", weights)


teacher = tiny.teacher()
clean = torch.cat([*tiny.batches(8, seed=1)])


def trained(routing: str | bg.routing.Policy) -> float:
    """Cross-entropy with clean labels of a student that saw the noise through a policy."""
    student = tiny.llama(32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    loss_fn = bg.LinearHybridDistillationLoss(routing=routing)
    for tokens in tiny.batches(args.steps):
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        noisy = torch.where(torch.rand(labels.shape) < args.noise, labels.flip(0), labels)
        hidden, hidden_t = (m.model(inputs).last_hidden_state for m in (student, teacher))
        soft_labels = bg.LinearTeacher(hidden_t, teacher.lm_head.weight)
        loss_fn(hidden, student.lm_head.weight, soft_labels, noisy).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return student(input_ids=clean, labels=clean).loss.item()


policies = {"hard": "hard", "plausible": "plausible"}
policies |= {"plausible, power 2": bg.routing.get("plausible", power=2.0)}
table = {name: trained(policy) for name, policy in policies.items()}
for name, loss in table.items():
    print(f"{name:20} cross-entropy {loss:.3f}")
