"""A divergence of your own, known by its name everywhere: the squared Hellinger distance.

python examples/custom_divergence.py

There is no gradient to derive: it is a function of row statistics, and autograd does the rest.
"""

import argparse

import tiny
import torch

import bgkernels as bg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()


@bg.divergences.register
def hellinger() -> bg.divergences.Divergence:
    """``1 - Σ √(p_t·p_s)``: symmetric, and at most 1, so that no single token rules a batch."""
    half = bg.Tilt(0.5, 0.5)  # a statistic that is not computed unless it is asked for
    return bg.divergences.Divergence(
        "hellinger", lambda s: -torch.expm1(s.power_sum(half.a, half.b)), extras=(half,)
    )


# The value and the gradient of the formula on whole logits, where they fit into memory.
x, w, z_t = torch.randn(7, 8), torch.randn(50, 8), torch.randn(7, 50)
x.requires_grad_()
p_s, p_t = (x @ w.T).softmax(-1), z_t.softmax(-1)
dense = (1 - (p_t * p_s).sqrt().sum(-1)).mean()
ours = bg.linear_hybrid_distillation(
    x, w, bg.LogitsTeacher(z_t), "teacher_argmax", divergence="hellinger", routing="soft"
)
torch.testing.assert_close(ours, dense)
torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (ours, dense)))
print(f"by hand {dense.item():.6f}, streamed {ours.item():.6f}")

teacher, student = tiny.teacher(), tiny.llama(32)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
loss_fn = bg.LinearHybridDistillationLoss(divergence="hellinger", routing="entropy")
losses = []
for tokens in tiny.batches(args.steps):
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    hidden, hidden_t = (m.model(inputs).last_hidden_state for m in (student, teacher))
    soft_labels = bg.LinearTeacher(hidden_t, teacher.lm_head.weight)
    loss = loss_fn(hidden, student.lm_head.weight, soft_labels, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
