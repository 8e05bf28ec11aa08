"""Two teachers, one of prose and one of code: who is surer of a token says more.

python examples/two_teachers.py
"""

import argparse
import inspect

import tiny
import torch
from torch import Tensor

import bgkernels as bg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

TEXTS = {"prose": tiny.TEXT, "code": inspect.getsource(argparse)}
teachers = {name: tiny.teacher(text) for name, text in TEXTS.items()}
student = tiny.llama(32)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)


def surer(stats: list[bg.RowStats]) -> Tensor:
    """``(tokens, teachers)`` weights of sum 1, from what each teacher knows of a token."""
    return torch.softmax(torch.stack([-s.entropy_t for s in stats], dim=-1), dim=-1)


def loss_of(tokens: Tensor) -> Tensor:
    """One cross-entropy, and a KL from each teacher."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        states = [t.model(inputs).last_hidden_state for t in teachers.values()]
    heads = [t.lm_head.weight for t in teachers.values()]
    both = bg.MixtureTeacher([*map(bg.LinearTeacher, states, heads)], weights=surer)
    hidden = student.model(inputs).last_hidden_state
    return bg.linear_hybrid_distillation(hidden, student.lm_head.weight, both, labels)


@torch.no_grad()
def held_out() -> dict[str, float]:
    """The student's cross-entropy with each text."""
    batch = {name: next(tiny.batches(1, text, seed=1)) for name, text in TEXTS.items()}
    return {name: student(input_ids=x, labels=x).loss.item() for name, x in batch.items()}


before = held_out()
for prose, code in zip(*(tiny.batches(args.steps, text) for text in TEXTS.values()), strict=True):
    loss_of(torch.cat([prose, code])).backward()
    optimizer.step()
    optimizer.zero_grad()
after = held_out()
for name in TEXTS:
    print(f"{name}: cross-entropy {before[name]:.3f} -> {after[name]:.3f}")
