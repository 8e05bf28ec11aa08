"""``bgkernels generate-labels``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch

from bgkernels.labels.documents import read_documents
from bgkernels.labels.errors import LabelError
from bgkernels.labels.generation import CaptureConfig, generate
from bgkernels.labels.served.client import IN_FLIGHT, Client
from bgkernels.labels.sources import LabelSource
from bgkernels.labels.store import Shard
from bgkernels.labels.translated import TranslatedSource
from bgkernels.training import ranks
from bgkernels.training.commands.shared import Console, typer
from bgkernels.training.errors import TrainingError, extra
from bgkernels.training.models import CausalLM, load_pretrained
from bgkernels.training.served import served_source

with extra():
    from rich import progress

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
    student_tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Of a student that has another tokenizer, by path or name: texts and labels are "
            "in its tokens, where both have read the same.",
            show_default="the teacher's",
            rich_help_panel=TEXT,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Servers that run the teacher, separated by commas: http://host:8000. Of "
            "--teacher only head and tokenizer are read. The key is that of VLLM_API_KEY.",
            show_default="the teacher is loaded",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    in_flight: Annotated[
        int, typer.Option(min=1, help="Requests to --server at once.", rich_help_panel=MACHINE)
    ] = IN_FLIGHT,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Part of the work: 2/8 makes the shards 2, 10, 18 and so on, counted from 0.",
            show_default="all, or as torchrun divides it",
            rich_help_panel=MACHINE,
        ),
    ] = None,
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

    With `--server`, vLLM runs the teacher. From one that sends hidden states (`vllm serve MODEL
    --runner pooling ...`, see the page on served teachers) the labels are the same; one that
    generates sends log-probabilities alone, so no token is drawn, and there is neither entropy nor
    power sum.

    With `--student-tokenizer`, teacher and student have two tokenizers. Each token of the student
    at which both have read the same text is labelled, and the match of the vocabularies is kept in
    the folder; the other tokens learn from the text alone.

    **Examples**

    - `bgkernels generate-labels --teacher runs/demo/models/teacher --data texts.jsonl`

    - `bgkernels generate-labels --teacher Qwen/Qwen2.5-72B --server http://gpu7:8000 --data ...`

    - `torchrun --nproc-per-node 8 -m bgkernels.training generate-labels --device cuda ...`
    """
    config = CaptureConfig(
        k, temperature, gamma, seed, vocab_size, batch_size, documents_per_shard,
        memory_budget and memory_budget * 2**20,
    )  # fmt: skip
    try:
        share = _share(shard)
        source: CausalLM | LabelSource
        if server is None:
            source, tokenizer = _load(teacher, max_length, device, dtype)
        else:
            client = Client(server, in_flight=in_flight)
            source, tokenizer = served_source(client, teacher, max_length, k)
        own = tokenizer if student_tokenizer is None else _tokenizer(student_tokenizer)
        documents = read_documents(data, own, max_length=max_length)
        if own is not tokenizer:
            source = TranslatedSource.of(source, documents, own, tokenizer)
        with _Bar(len(documents)) as bar:
            done = generate(
                source,
                documents,
                output,
                config,
                tokenizer=own,
                share=share,
                report=bar.shard,
                on_batch=bar.batch,
            )
    except (TrainingError, ValueError) as problem:
        typer.secho(f"error: {problem}", fg="red", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; the shards that are done are kept: run it again", err=True)
        raise typer.Exit(130) from None
    state = "Written to" if done else "This process is done; others are still writing to"
    typer.echo(f"{state} {output}", err=True)
    if isinstance(source, TranslatedSource) and source.tokens:
        soft = source.soft / source.tokens
        typer.echo(f"{soft:.0%} of the student's tokens have a soft label", err=True)


def _tokenizer(name: str) -> Any:
    with extra():
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LabelError(
            f"--student-tokenizer must be the path or the name of a Hugging Face tokenizer; "
            f"{name!r} could not be loaded: {error}"
        ) from error


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


def _share(shard: str | None) -> tuple[int, int] | None:
    """``(i, n)`` of ``i/n``."""
    if shard is None:
        return None
    number, _, among = shard.partition("/")
    if not (number.isdecimal() and among.isdecimal() and int(number) < int(among)):
        raise LabelError(f"--shard must be such as 0/8, the first of eight parts; got {shard!r}")
    return int(number), int(among)


class _Bar:
    """How far this process has come: documents of all, and tokens a second.

    Args:
        documents: of all shards.
    """

    def __init__(self, documents: int) -> None:
        self._console = Console(stderr=True)
        self._bars = progress.Progress(
            progress.TextColumn("labels"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._console,
        )
        self._task = self._bars.add_task("labels", total=documents, speed="")
        self._started, self._tokens, self._done = time.perf_counter(), 0, 0

    def __enter__(self) -> _Bar:
        self._bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bars.stop()

    def batch(self, documents: int, tokens: int) -> None:
        """Count a batch that was labelled."""
        self._tokens += tokens
        speed = self._tokens / (time.perf_counter() - self._started)
        self._bars.update(self._task, advance=documents, speed=f"{speed:,.0f} tok/s")

    def shard(self, shard: Shard) -> None:
        """Say that a shard is done, now or before."""
        self._done += shard.documents
        self._bars.update(self._task, completed=self._done)
        self._console.print(f"{shard.file}: {shard.tokens:,} tokens", highlight=False)
