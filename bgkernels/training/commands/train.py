"""``bgkernels train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bgkernels.training import ranks
from bgkernels.training.alone import run_training
from bgkernels.training.commands import options as o
from bgkernels.training.commands.shared import ConfigFile, Console, reported
from bgkernels.training.config import DemoConfig
from bgkernels.training.page import write_report
from bgkernels.training.progress import terminal


def train(
    config_file: ConfigFile = None,
    output: o.Output = None,
    resume: o.Resume = True,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    corpus: o.Corpus = None,
    task: o.Task = None,
    texts: o.Texts = None,
    skip_unusable: o.SkipUnusable = False,
    sequence_length: o.SequenceLength = None,
    batch_size: o.BatchSize = None,
    student: o.Student = None,
    steps: o.Steps = None,
    learning_rate: o.LearningRate = None,
    accumulate: o.Accumulate = None,
    bf16: o.Bf16 = False,
    gradient_checkpointing: o.GradientCheckpointing = False,
    compile: o.Compile = False,
    lora: o.Lora = None,
    parallel: o.Parallel = "ddp",
    tensorboard: o.TensorBoard = False,
    memory_budget: o.MemoryBudget = None,
) -> None:
    """Train a model on text alone, by cross-entropy: a teacher to be, or the last step of a recipe.

    The model is `--student`, or a small Llama with random weights. It is saved as `model/` in the
    output folder, for `from_pretrained`.

    **Examples**

    - `bgkernels train --corpus ~/notes --steps 2000 --output runs/notes`

    - `bgkernels train --task arithmetic --batch-size 64 --steps 1500`

    - `bgkernels train --student runs/distill/models/entropy --learning-rate 1e-5` (fine-tune it)
    """
    console = Console(stderr=True)
    base = replace(DemoConfig(), output=Path("runs/train"))
    given = locals()
    with reported(console), ranks.joined(ranks.device(device)):
        config = o.configured(base, given)
        history = run_training(config, terminal(console))
        if not ranks.first():
            return
        write_report(config.output)
    last = history.curve[-1]["cross_entropy"]
    console.print(
        f"Cross-entropy on held-out text: {last:.3f} nats a token. Written to {config.output}: "
        "model/, report.html, student-hard/log.jsonl",
        highlight=False,
    )
