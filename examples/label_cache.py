"""A teacher that runs once: its labels go to disk, and the student learns without it.

python examples/label_cache.py --k 16 --folder runs/labels

For a large teacher, `bgkernels generate-labels` does the first half, under torchrun if need be.
"""

import argparse
from pathlib import Path

import tiny
import torch
from torch.utils.data import DataLoader

import bgkernels as bg
from bgkernels.labels import CaptureConfig, LabelDataset, generate
from bgkernels.training.models import CausalLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--folder", type=Path, default="runs/labels")
parser.add_argument("--k", type=int, default=16, help="columns to keep of each token")
parser.add_argument("--epochs", type=int, default=4)
args = parser.parse_args()

tokenizer = tiny.tokenizer()
documents = [x.tolist() for batch in tiny.batches(32) for x in batch]
generate(
    CausalLM(tiny.teacher()), documents, args.folder, CaptureConfig(args.k), tokenizer=tokenizer
)  # run again, it finds that all is done

student = tiny.llama(32)
dataset = LabelDataset(args.folder, tokenizer=tokenizer, vocab=student.config.vocab_size)
size = sum(file.stat().st_size for file in args.folder.iterdir())
print(f"{len(dataset)} documents, {size / sum(map(len, documents)):.0f} bytes a token")

loss_fn = bg.LinearHybridDistillationLoss(routing="entropy")
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
losses = []
for epoch in range(args.epochs):
    for batch in DataLoader(dataset, batch_size=16, shuffle=True, collate_fn=dataset.collate):
        hidden = student.model(batch.tokens).last_hidden_state
        loss = loss_fn(hidden, student.lm_head.weight, batch.teacher(), batch.target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
