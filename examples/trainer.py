"""The ``Trainer`` of transformers: a teacher, the options of the loss, and all else as always.

python examples/trainer.py --output distilled
accelerate launch --config_file examples/zero3.yaml examples/trainer.py  # or fsdp2.yaml
"""

import argparse

import tiny
import torch
from transformers import LlamaForCausalLM, TrainingArguments

from bgkernels.integrations.transformers import HybridDistillationTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", default="distilled", help="folder of the trained student")
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

PROMPT = 16  # tokens that are read and not learned


def examples(batches: int, seed: int) -> list[dict[str, list[int]]]:
    """Passages of the text; -100 marks what has no label."""
    passages = [x.tolist() for batch in tiny.batches(batches, seed=seed) for x in batch]
    return [{"input_ids": x, "labels": [-100] * PROMPT + x[PROMPT:]} for x in passages]


trainer = HybridDistillationTrainer(
    tiny.llama(32),
    TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,  # one normaliser: the labels of both batches
        learning_rate=1e-2,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        eval_on_start=True,
        use_cpu=not torch.cuda.is_available(),
    ),
    teacher=tiny.teacher(),  # or a path, or a name
    loss={"routing": "entropy", "temperature": 2.0},
    train_dataset=examples(32, seed=1),
    eval_dataset=examples(4, seed=2),
)
trainer.train()  # logs hard_loss, soft_loss, teacher_entropy and bridge_share too
before = next(x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x)
after = trainer.evaluate()["eval_loss"]
trainer.save_model()
trainer.accelerator.wait_for_everyone()  # one process writes it
student = LlamaForCausalLM.from_pretrained(args.output)  # an ordinary model
print(f"held-out loss {before:.3f} -> {after:.3f}; saved to {args.output}")
