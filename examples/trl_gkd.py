"""TRL's GKD: some completions are the student's own, and the loss is the hybrid one.

python examples/trl_gkd.py --lmbda 0.5 --beta 0.5
"""

import argparse

import tiny
from datasets import Dataset
from trl.experimental.gkd import GKDConfig

from bgkernels.integrations.trl import HybridGKDTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--lmbda", type=float, default=0.5, help="share of generated completions")
parser.add_argument("--beta", type=float, default=0.5, help="0: forward KL, 1: reverse KL")
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()

tokenizer = tiny.tokenizer()
tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"


def chat(line: str) -> dict[str, list[dict[str, str]]]:
    """The beginning of a line is the question, and the rest the answer."""
    said = {"user": line[:20], "assistant": line[20:]}
    return {"messages": [{"role": role, "content": text} for role, text in said.items()]}


trainer = HybridGKDTrainer(
    tiny.llama(32),
    tiny.teacher(),
    GKDConfig(
        "distilled",
        lmbda=args.lmbda,
        beta=args.beta,
        max_steps=args.steps,
        max_new_tokens=16,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=Dataset.from_list([chat(s) for s in tiny.TEXT.splitlines() if len(s) > 40]),
    processing_class=tokenizer,
    loss={"routing": "entropy"},  # the hard label of what was generated is the teacher's argmax
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
