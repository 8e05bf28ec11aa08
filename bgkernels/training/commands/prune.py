"""``bgkernels prune``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from bgkernels.training import models, pruning
from bgkernels.training.commands import options as o
from bgkernels.training.commands.shared import ConfigFile, Console, changed, reported, typer
from bgkernels.training.config import DemoConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.materials import prepare
from bgkernels.training.progress import Terminal
from bgkernels.training.sharding import place


def prune(
    model: Annotated[str, typer.Option(help="Hugging Face model, by path or name.")],
    config_file: ConfigFile = None,
    output: Annotated[Path, typer.Option(help="Folder of the pruned model.")] = Path("runs/pruned"),
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks to keep.")] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Key-value heads to keep in a block, with their query heads."),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Feed-forward neurons to keep in a block.")
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, help="Sequences of text that parts are scored on.")
    ] = 64,
    corpus: o.Corpus = None,
    skip_unusable: o.SkipUnusable = False,
    sequence_length: o.SequenceLength = None,
    device: o.Device = "auto",
) -> None:
    """Make a smaller model of a large one's most useful parts, to distil into.

    Layers, heads and feed-forward neurons are scored by what they do on the text; the best are
    kept. The result is a plain model of the same kind: Llama, Mistral, Qwen, Gemma, or DeepSeek,
    whose experts stay whole, so that `--width` cannot be given. It speaks badly until it is
    trained: the way of Llama 3.2 is to prune, to distil, and to fine-tune.

    **Example**: the three steps

    - `bgkernels prune --model runs/demo/models/teacher --layers 2 --width 256 --output runs/small`

    - `bgkernels distill --teacher runs/demo/models/teacher --student runs/small --method entropy
      --learning-rate 1e-3 --output runs/healed`

    - `bgkernels train --student runs/healed/models/entropy --corpus chats.jsonl`
    """
    console = Console(stderr=True)
    base = DemoConfig()
    data = changed(
        base.data, corpus=corpus, skip_unusable=skip_unusable, sequence_length=sequence_length
    )
    display = Terminal(console)
    with reported(console):
        with display.working("reading model and text"):
            config = replace(base, student=model, data=data, device=device)
            materials = prepare(config, load_corpus(data))
        large, exam = place(materials.student, config), materials.exam
        text = exam.windows[:windows, :-1]
        whole = pruning.Shape.of(large)
        with display.working("scoring its parts"):
            small = pruning.prune(
                large,
                pruning.measure(large, text),
                changed(whole, layers=layers, heads=heads, width=width),
            )
        place(small, config)
        before, after = (exam.curve(x, None)["cross_entropy"] for x in (large, small))
        models.export(small, materials.tokenizer, output)
    console.print(
        f"{large.parameters:,} parameters are now {small.parameters:,}; cross-entropy on held-out "
        f"text was {before:.3f} and is {after:.3f} nats a token. Written to {output}",
        highlight=False,
    )
