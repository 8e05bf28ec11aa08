"""Bridges and gardens of a text: where the teacher is sure, and where many tokens would do.

python examples/bridges.py --text "def f(self, x):" --output bridges.png
python examples/bridges.py --model NAME_OR_PATH --text "The capital of France is Paris."

Draws the teacher's entropy and the weight that a policy gives to the hard label, token by token.
"""

import argparse

import tiny
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

import bgkernels as bg
from bgkernels.integrations.teachers import ModelTeacher

TEXT = 'The "assert" statement is a convenient way to insert debugging assertions.'

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="of transformers; default: one that read a text for a moment")
parser.add_argument("--text", default=TEXT)
parser.add_argument("--routing", default="entropy", choices=list(bg.routing.registry))
parser.add_argument("--steps", type=int, default=200, help="of that model's training")
parser.add_argument("--output", default="bridges.png")
args = parser.parse_args()

model = ModelTeacher(args.model or tiny.teacher(tiny.TEXT[:2000], steps=args.steps))
tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else tiny.tokenizer()
policy = bg.routing.get(args.routing)

tokens = torch.tensor(tokenizer(args.text).input_ids)
rows = torch.arange(len(tokens) - 1)  # each predicts the next token
teacher = model({"input_ids": tokens[None]}, rows)
with torch.no_grad():  # the teacher beside itself
    stats = bg.linear_row_stats(
        teacher.hidden, teacher.weight, teacher, tokens[1:], extras=policy.extras
    )
    found = (torch.as_tensor(x).expand(len(rows)) for x in (stats.entropy_t, *policy(stats)))
entropy, hard, soft = (x.numpy() for x in found)

for i in entropy.argsort()[[0, 1, 2, -3, -2, -1]]:
    kind = "bridge" if hard[i] > soft[i] else "garden"
    before, token = tokenizer.decode(tokens[: i + 1])[-20:], tokenizer.decode(tokens[i + 1])
    print(f"{kind}: {entropy[i]:5.2f} nats, hard {hard[i]:.2f}: ...{before!r} {token!r}")

figure = Figure(figsize=(max(6, 0.16 * len(tokens)), 4), layout="constrained")
top, bottom = figure.subplots(2, sharex=True)
top.bar(rows.numpy(), entropy, color="#0072b2")
top.set_ylabel("teacher's entropy, nats")
bottom.bar(rows.numpy(), hard, color="#d55e00", label="hard")
bottom.bar(rows.numpy(), soft, bottom=hard, color="#009e73", label="soft")
bottom.set_ylabel(f"weights by {policy.name!r}")
bottom.legend(loc="lower right")
bottom.set_xticks(rows.numpy(), [repr(tokenizer.decode(t))[1:-1] for t in tokens[1:]])
figure.savefig(args.output, dpi=150)
