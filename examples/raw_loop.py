"""A plain torch loop: the heads and the loss in one call, and no logits.

python examples/raw_loop.py --routing entropy --divergence forward_kl --temperature 2
"""

import argparse

import tiny
import torch

import bgkernels as bg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--routing", default="entropy", choices=list(bg.routing.registry))
parser.add_argument("--divergence", default="forward_kl", choices=list(bg.divergences.registry))
parser.add_argument("--temperature", type=float, default=1.0)
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

teacher, student = tiny.teacher(), tiny.llama(32)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
loss_fn = bg.LinearHybridDistillationLoss(
    routing=args.routing, divergence=args.divergence, temperature=args.temperature
)

losses = []
for step, tokens in enumerate(tiny.batches(args.steps), start=1):
    inputs, labels = tokens[:, :-1], tokens[:, 1:]  # (batch, length)
    hidden = student.model(inputs).last_hidden_state  # (batch, length, width)
    with torch.no_grad():
        hidden_t = teacher.model(inputs).last_hidden_state
    soft_labels = bg.LinearTeacher(hidden_t, teacher.lm_head.weight)
    loss = loss_fn(hidden, student.lm_head.weight, soft_labels, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 10 == 0:
        print(f"step {step:4}: loss {loss.item():.3f}")
