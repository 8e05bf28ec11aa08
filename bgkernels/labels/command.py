"""``bgkernels generate-labels``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch

from bgkernels.labels.documents import Documents, read_documents
from bgkernels.labels.errors import LabelError
from bgkernels.labels.generation import CaptureConfig, generate
from bgkernels.labels.store import Shard
from bgkernels.training import ranks
from bgkernels.training.commands.shared import typer
from bgkernels.training.errors import TrainingError
from bgkernels.training.models import CausalLM, load_pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULTS = CaptureConfig()
TEXT, LABELS, MACHINE = "Text", "Labels", "Machine"


def generate_labels(
    teacher: Annotated[
        str, typer.Option(help="Hugging Face model with its tokenizer, by path or name.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="File or folder: Parquet, Arrow or JSON lines, with a column `input_ids` of token "
            "numbers or `text`.",
            rich_help_panel=TEXT,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the labels.")] = Path("runs/labels"),
    max_length: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of a document; longer ones are cut.", rich_help_panel=TEXT
        ),
    ] = 2048,
    k: Annotated[
        int, typer.Option(min=1, help="Columns to keep of each token.", rich_help_panel=LABELS)
    ] = DEFAULTS.k,
    temperature: Annotated[
        float,
        typer.Option(help="Of log-probabilities, entropy and power sum.", rich_help_panel=LABELS),
    ] = DEFAULTS.temperature,
    gamma: Annotated[
        float, typer.Option(help="Exponent of the power sum.", rich_help_panel=LABELS)
    ] = DEFAULTS.gamma,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the sampled tokens.", rich_help_panel=LABELS)
    ] = DEFAULTS.seed,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Use these leading columns, those of a student with a smaller head.",
            show_default="all",
            rich_help_panel=LABELS,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Documents of a forward pass.", rich_help_panel=MACHINE)
    ] = DEFAULTS.batch_size,
    documents_per_shard: Annotated[
        int, typer.Option(min=1, help="Documents of a file.", rich_help_panel=MACHINE)
    ] = DEFAULTS.documents_per_shard,
    memory_budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="MiB of temporaries of the capture.",
            show_default="the library's",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Such as cpu or cuda, which under torchrun is the process's own; auto: a GPU if "
            "there is one.",
            rich_help_panel=MACHINE,
        ),
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(help=f"Of the teacher: {', '.join(DTYPES)}.", rich_help_panel=MACHINE)
    ] = "float32",
) -> None:
    """Run a teacher over texts once, and keep the soft labels that training needs.

    Of each token: the top `k` log-probabilities, a token drawn from the teacher, and entropy and
    power sum of the whole distribution. Interrupted, the same command goes on where it stopped.
    Under `torchrun`, on one machine or many with a common folder, the shards are divided.

    **Examples**

    - `bgkernels generate-labels --teacher runs/demo/models/teacher --data texts.jsonl`

    - `torchrun --nproc-per-node 8 -m bgkernels.training generate-labels --device cuda ...`
    """
    config = CaptureConfig(
        k, temperature, gamma, seed, vocab_size, batch_size, documents_per_shard,
        memory_budget and memory_budget * 2**20,
    )  # fmt: skip
    try:
        model, tokenizer = _load(teacher, max_length, device, dtype)
        documents = read_documents(data, tokenizer, max_length=max_length)
        done = generate(
            model,
            documents,
            output,
            config,
            tokenizer=tokenizer,
            report=_counter(documents, config),
        )
    except (TrainingError, ValueError) as problem:
        typer.secho(f"error: {problem}", fg="red", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; the shards that are done are kept: run it again", err=True)
        raise typer.Exit(130) from None
    state = "Written to" if done else "This process is done; others are still writing to"
    typer.echo(f"{state} {output}", err=True)


def _load(teacher: str, length: int, device: str, dtype: str) -> tuple[CausalLM, Any]:
    """The teacher where it is to run, and its tokenizer."""
    if dtype not in DTYPES:
        raise LabelError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    place = ranks.device(device) if device in ("auto", "cuda") else device
    model, tokenizer = load_pretrained(teacher, "--teacher", length)
    model.freeze()
    try:
        model.network.to(place, DTYPES[dtype])
    except (RuntimeError, AssertionError) as error:
        raise LabelError(f"--device must be one that torch can use; {device}: {error}") from error
    return model, tokenizer


def _counter(documents: Documents, config: CaptureConfig) -> Any:
    """Says how far this process has come."""
    total = -(-len(documents) // config.documents_per_shard)

    def report(shard: Shard) -> None:
        typer.echo(f"{shard.file} of {total}: {shard.tokens:,} tokens", err=True)

    return report
