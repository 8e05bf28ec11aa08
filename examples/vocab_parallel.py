"""Heads shared out among processes by vocabulary, and the loss and gradients of whole ones.

torchrun --nproc-per-node 2 examples/vocab_parallel.py
"""

import argparse

import tiny
import torch
import torch.distributed as dist
from torch.nn import Parameter

import bgkernels as bg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

dist.init_process_group("gloo")  # nccl on GPUs
rank, ranks = dist.get_rank(), dist.get_world_size()
teacher, student = tiny.teacher(), tiny.llama(32)
for parameter in teacher.parameters():
    dist.broadcast(parameter, src=0)  # the same bits everywhere

# This rank's columns. Student and teacher are cut at the same ones.
head = Parameter(student.lm_head.weight.detach().chunk(ranks)[rank].clone())
head_t = teacher.lm_head.weight.chunk(ranks)[rank]
optimizer = torch.optim.AdamW([*student.model.parameters(), head], lr=1e-2)

losses = []
for step, tokens in enumerate(tiny.batches(args.steps), start=1):  # the same on every rank
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    hidden = student.model(inputs).last_hidden_state
    with torch.no_grad():
        hidden_t = teacher.model(inputs).last_hidden_state
    loss = bg.linear_hybrid_distillation(
        hidden, head, bg.LinearTeacher(hidden_t, head_t), labels, vocab_group=dist.group.WORLD
    )
    loss.backward()  # the gradient of `hidden` is summed over the ranks
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if rank == 0 and step % 10 == 0:
        print(f"step {step:4}: loss {loss.item():.3f}")

print(f"rank {rank}: {len(head)} of {teacher.config.vocab_size} columns, loss {losses[-1]:.6f}")
dist.destroy_process_group()
