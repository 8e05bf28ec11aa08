"""``bgkernels demo``, ``compare`` and ``distill``: a teacher, and students by some methods."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from bgkernels.training import comparison, figure, presets, ranks, report
from bgkernels.training.commands import options as o
from bgkernels.training.commands.accuracy import compare_accuracy
from bgkernels.training.commands.shared import ConfigFile, Console, reported, typer
from bgkernels.training.config import DemoConfig
from bgkernels.training.demo import run_demo
from bgkernels.training.files import write_text
from bgkernels.training.machine import one_thread
from bgkernels.training.methods import METHODS, find
from bgkernels.training.page import write_report
from bgkernels.training.progress import terminal
from bgkernels.training.results import DemoResult


class View(NamedTuple):
    """How results are shown: the table of the terminal and ``results.md``, and ``results.png``."""

    table: Callable[[DemoResult], Any]
    draw: Callable[[DemoResult, Path], None]


FEW = View(report.table, figure.draw)
MANY = View(comparison.table, comparison.draw)
COMPARED = ",".join(name for name, method in METHODS.items() if method.teachers == 1)


def demo(
    config_file: ConfigFile = None,
    output: o.Output = None,
    resume: o.Resume = True,
    quick: o.Quick = False,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    corpus: o.Corpus = None,
    task: o.Task = None,
    skip_unusable: o.SkipUnusable = False,
    sequence_length: o.SequenceLength = None,
    batch_size: o.BatchSize = None,
    teacher: o.Teacher = None,
    student: o.Student = None,
    teacher_steps: o.TeacherSteps = None,
    steps: o.Steps = None,
    learning_rate: o.LearningRate = None,
    divergence: o.Divergence = None,
    temperature: o.Temperature = None,
    memory_budget: o.MemoryBudget = None,
) -> None:
    """Train a small teacher, distil it several ways, and see who ends up nearest, or right.

    The students start from the same weights and see the same batches. One learns from the text
    alone (**hard-only**), one from the teacher's distributions alone (**soft-only**), and one from
    a mix that follows each token (**entropy-routed**): more of the hard label at *bridges*, where
    the teacher is sure what comes next, more of the soft one in *gardens*, where much may follow.

    It ends with a table, a picture and a page (`report.html`) of how far each student is from the
    teacher, on held-out files and on text of its own. Nothing is downloaded. It takes about two
    minutes on one core; interrupted, the same command goes on where it stopped.

    With `--task` the text is made, a program checks the answers, and the table begins with the
    share of right ones. The students have first read the task by themselves. One more learns from
    soft labels at temperature 2, and the hybrid is by a **threshold**, with the teacher's favourite
    token as its hard label.

    **Examples**

    - `bgkernels demo`

    - `bgkernels demo --task arithmetic`

    - `bgkernels demo --corpus ~/notes --output runs/notes --steps 2000`

    - `bgkernels demo --teacher runs/demo/models/teacher --output runs/other --divergence jeffreys`
    """
    given = locals()
    base = presets.on_text() if task is None else presets.on_task(task)
    if task is not None:
        given["task"] = base.data.task
    with nullcontext() if task is None else one_thread():
        _run(DemoConfig.quick() if quick else base, FEW, given)


def compare(
    config_file: ConfigFile = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods by name, separated by commas.", show_default="all that have one teacher"
        ),
    ] = COMPARED,
    output: o.Output = None,
    resume: o.Resume = True,
    quick: o.Quick = False,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    corpus: o.Corpus = None,
    task: o.Task = None,
    texts: o.Texts = None,
    skip_unusable: o.SkipUnusable = False,
    sequence_length: o.SequenceLength = None,
    batch_size: o.BatchSize = None,
    teacher: o.Teacher = None,
    student: o.Student = None,
    second_teacher: o.SecondTeacher = None,
    generate_with: o.GenerateWith = None,
    teacher_steps: o.TeacherSteps = None,
    steps: o.Steps = None,
    learning_rate: o.LearningRate = None,
    parallel: o.Parallel = "ddp",
    tensorboard: o.TensorBoard = False,
    divergence: o.Divergence = None,
    temperature: o.Temperature = None,
    second_weight: o.SecondWeight = None,
    memory_budget: o.MemoryBudget = None,
) -> None:
    """Distil one teacher by many methods, and put them into one table.

    All students start from the same weights and see the same batches; they differ in the method
    alone. Divergences have gradients of very different size, so a row is a method at the common
    learning rate, not at its best one.

    **Examples**

    - `bgkernels compare --methods hard,soft,static,confidence,entropy`

    - `bgkernels compare --output runs/all` (interrupted, it goes on where it stopped)

    With `--task` the measure is the share of right answers. Students that have read a little of the
    task are distilled by each method, at the best of four learning rates on a validation split;
    then come five seeds, two sizes, much and little text, and a table of what is claimed of hybrid
    distillation and what was found. An hour on one core; `--quick` takes minutes.

    - `bgkernels compare --task arithmetic --quick`
    """
    given = locals() | {"methods": tuple(methods.split(",")), "validate_every": 250}
    if task is None:
        base = DemoConfig.quick() if quick else DemoConfig(output=Path("runs/compare"))
        _run(base, MANY, given)
    else:
        compare_accuracy(given, None if methods == COMPARED else given["methods"])


def distill(
    config_file: ConfigFile = None,
    method: Annotated[
        str,
        typer.Option(
            help=f"How: {', '.join(METHODS)}; with +argmax after it the hard label is the "
            "teacher's favourite, with +t2 the temperature is 2, with +reverse the weights swap.",
            show_default="entropy",
        ),
    ] = "entropy",
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
    teacher: o.Teacher = None,
    teacher_url: o.TeacherUrl = None,
    student: o.Student = None,
    second_teacher: o.SecondTeacher = None,
    generate_with: o.GenerateWith = None,
    teacher_steps: o.TeacherSteps = None,
    steps: o.Steps = None,
    learning_rate: o.LearningRate = None,
    accumulate: o.Accumulate = None,
    bf16: o.Bf16 = False,
    gradient_checkpointing: o.GradientCheckpointing = False,
    compile: o.Compile = False,
    lora: o.Lora = None,
    parallel: o.Parallel = "ddp",
    tensorboard: o.TensorBoard = False,
    divergence: o.Divergence = None,
    temperature: o.Temperature = None,
    second_weight: o.SecondWeight = None,
    memory_budget: o.MemoryBudget = None,
) -> None:
    """Distil a teacher into a student by one method.

    Any two Hugging Face causal language models will do. Of two tokenizers, the student learns soft
    labels where both have read the same text, on the tokens that both have; what they share is
    said at the start. The trained student is in `models/` of the output folder, under the method's
    name, for `from_pretrained`.

    **Examples**

    - `bgkernels distill --teacher runs/demo/models/teacher --method confidence`

    - `bgkernels distill --method two-teachers --teacher runs/one/model
      --second-teacher runs/two/model`

    - `bgkernels distill --teacher ~/models/large --student ~/models/small --corpus ~/text --bf16
      --batch-size 2 --accumulate 16 --sequence-length 1024`

    - `bgkernels distill --teacher ~/models/large --teacher-url http://gpu7:8000` (a teacher that
      `vllm serve` runs elsewhere)

    - `bgkernels distill --method gkd --teacher ~/models/large --student ~/models/small
      --generate-with http://gpu7:8000` (the student's text comes from a server of it)

    - `torchrun --nproc-per-node 8 -m bgkernels.training distill --parallel fsdp --bf16
      --gradient-checkpointing --teacher ~/models/large --student ~/models/small`
    """
    _run(DemoConfig(output=Path("runs/distill")), FEW, locals() | {"methods": (method,)})


def _run(base: DemoConfig, view: View, given: dict[str, Any]) -> None:
    """Run the demo as configured by the options of a command, and show what it found."""
    console = Console(stderr=True)
    with reported(console), ranks.joined(ranks.device(given["device"])):
        config = o.configured(base, given)
        for method in config.methods:
            find(method)
        result = run_demo(config, terminal(console))
        if not ranks.first():
            return
        table = view.table(result)
        write_text(config.output / "results.md", report.markdown(table))
        view.draw(result, config.output / "results.png")
        page = write_report(config.output)
    Console().print(table)
    console.print(
        f"Written to {config.output}: results.json, .md and .png, models/\n"
        f"To look at in a browser: {page}",
        highlight=False,
        soft_wrap=True,
    )
