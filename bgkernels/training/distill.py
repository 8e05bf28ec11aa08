"""The loss of a training step by a method's name, and the two kinds of run of a demo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

import bgkernels as bg
from bgkernels.teachers import Teacher
from bgkernels.training import lora, ranks, sharding
from bgkernels.training.checkpoint import CheckpointStore
from bgkernels.training.config import DemoConfig, TrainConfig
from bgkernels.training.errors import OptionError
from bgkernels.training.files import digest
from bgkernels.training.generation import generate
from bgkernels.training.loop import History, Task, train
from bgkernels.training.materials import Materials
from bgkernels.training.methods import DATA, Method, Role, advance, find
from bgkernels.training.models import CausalLM, small_llama
from bgkernels.training.progress import Display
from bgkernels.training.sharding import whole
from bgkernels.training.tokens import IGNORED, Batch
from bgkernels.training.tracing import TracedLM
from bgkernels.training.translated import TranslatedLM
from bgkernels.training.writing import Numbered, Writer, WrittenBatches

if TYPE_CHECKING:
    from bgkernels.training.text_server import TextServer  # built on the labels, and they on this


@dataclass(frozen=True)
class Objective:
    """The loss of one batch, from hidden states and the head's weight: logits never exist whole.

    Args:
        student: the model that learns.
        teacher: whom it imitates; None where only the text counts.
        method: what tells this way to distil from others.
        config: what all ways share.
        steps: of the whole run, for schedules.
        second: another teacher; the configuration has its weight.
        server: writes the text of one of the models; None: both write here.
    """

    student: CausalLM
    teacher: CausalLM | None
    method: Method
    config: DemoConfig
    steps: int
    second: CausalLM | None = None
    server: TextServer | None = None
    policy: bg.routing.Policy = field(init=False)
    divergence: bg.divergences.Divergence = field(init=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "policy", self.method.routing())
            divergence = self.method.divergence_or(self.config.loss.divergence)
            object.__setattr__(self, "divergence", divergence)
            bg.LinearHybridDistillationLoss(**self._options(0))
        except (TypeError, ValueError) as error:
            raise OptionError(str(error)) from error

    def rewrite(self, batches: list[Batch], numbers: Sequence[int], step: int) -> list[Batch]:
        """The batches of a step, or where the method says so, the student's continuations of them.

        Args:
            batches: from the text.
            numbers: of the batches; with the run's seed, the seeds of what is sampled.
            step: of the optimiser.
        """
        if not self.method.on_policy(step):
            return batches
        if server := self.server_of("student"):
            server.update(self.student)
        return self.own_writer(batches, numbers)

    @cached_property
    def own_writer(self) -> Writer:
        """How the student continues a text, all the time while it learns."""
        return self.writer(self.student, "student")

    def ask(self, batches: Numbered, numbers: Iterable[int], step: int) -> None:
        """Let a teacher behind a server read batches of a step whose text is known.

        Args:
            batches: of the run.
            numbers: of those of the step.
            step: of the optimiser.
        """
        if self.teacher and not self.teacher.here and not self.method.on_policy(step):
            for number in numbers:
                self.teacher.ask(batches[number].tokens[:, :-1])

    def writer(self, model: CausalLM, role: Role) -> Writer:
        """How one of the models continues a text: here, or where it is served."""
        vocab = min(x.vocab for x in (self.student, self.teacher, model) if x)
        config, server = self.config, self.server_of(role)
        if server is None and not isinstance(model, TranslatedLM):
            model = TracedLM.of(model)
        return Writer(
            model, vocab, config.loss.prompt, config.seed, config.data.stop, server or generate
        )

    def server_of(self, role: Role) -> TextServer | None:
        """The server that writes one of the models' text, if it is that one's."""
        return self.server if self.server and self.server.role == role else None

    def __call__(self, batch: Batch, step: int = 0, items: Tensor | int | None = None) -> Tensor:
        """Scalar loss, computed where the parameters of all models are whole.

        Args:
            batch: sequences and labels.
            step: of the optimiser.
            items: tokens learnt in the whole step, where it has several batches; over how many
                processes the gradient is averaged, so often smaller.
        """
        models = (self.student, self.teacher, self.second)
        return whole(models, lambda: self._loss(batch, step, items))

    def _loss(self, batch: Batch, step: int, items: Tensor | int | None) -> Tensor:
        inputs, head = batch.tokens[:, :-1], self.student.head
        advance(self.policy, step / self.steps)
        hidden = self.student.hidden(inputs)
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        target = self.method.target
        loss = bg.linear_hybrid_distillation(
            hidden,
            head.weight.to(hidden.dtype),  # another one under autocast
            self._source(inputs),
            batch.labels if target == DATA else target,
            linear_bias=bias,
            num_items=items,
            token_weight=None if target == DATA else (batch.labels != IGNORED).to(hidden.dtype),
            **self._options(step),
        )
        assert isinstance(loss, Tensor)
        return loss

    def _source(self, inputs: Tensor) -> Teacher | None:
        """Where the soft labels come from."""
        if self.teacher is None:
            return None
        first, weight = self.teacher.as_teacher(inputs), self.config.loss.second_weight
        if self.second is None:
            return first
        return bg.MixtureTeacher((first, self.second.as_teacher(inputs)), (1 - weight, weight))

    def _options(self, step: int) -> dict[str, Any]:
        loss = self.config.loss
        return {
            "routing": self.policy,
            "divergence": self.divergence,
            "temperature": self.method.temperature_at(step / self.steps, loss.temperature),
            "memory_budget": loss.memory_budget,
            "logit_scale": self.student.logit_scale,
            "logit_softcap": self.student.logit_softcap,
        }


def make_objective(
    config: DemoConfig,
    method: str,
    student: CausalLM,
    teacher: CausalLM | None,
    second: CausalLM | None = None,
    server: TextServer | None = None,
) -> Objective:
    """The loss of a method; where only the text counts, the teacher is not run.

    Args:
        config: of the run.
        method: by name.
        student: the model that learns.
        teacher: whom it imitates, or None.
        second: another one, for methods of two teachers; others leave it alone.
        server: of one of the models, which writes its text.

    Raises:
        OptionError: an option of the loss or the method is unknown or out of range, by name, or
            the method wants a second teacher and there is none.
    """
    found, steps = find(method), config.student_training.steps
    if found.teachers < 2:
        second = None
    elif second is None:
        raise OptionError(f"the method {method!r} needs --second-teacher: the path of a model")
    if isinstance(teacher, TranslatedLM) and found.target != DATA:
        raise OptionError(
            f"the method {method!r} takes its hard labels from the teacher, whose tokens are not "
            "the student's; choose one that takes them from the text, such as 'entropy'"
        )
    objective = Objective(student, teacher, found, config, steps, second, server)
    reads = objective.policy.uses_teacher or found.target != DATA
    return objective if reads else replace(objective, teacher=None)


def train_teacher(
    config: DemoConfig, materials: Materials, display: Display
) -> tuple[CausalLM, History]:
    """A small Llama trained on the text by cross-entropy, or the one that was trained before.

    Its folder is named by its configuration, so another configuration starts from the beginning.
    """
    shape, length = config.teacher_shape, config.data.sequence_length
    teacher = small_llama(shape, len(materials.tokenizer), length, config.seed)
    identity = materials.identity | _described(config.teacher_training) | asdict(shape)
    name = "teacher-" + digest([repr(sorted(identity.items())).encode()])
    task = Task(
        name="teacher",
        model=ready(teacher, config.teacher_training, config),
        objective=make_objective(config, "hard", teacher, None),
        batches=materials.batches,
        validate=lambda: materials.exam.curve(teacher, None),
        config=config.teacher_training,
        store=CheckpointStore(config.output / name, identity),
        tensorboard=config.tensorboard,
    )
    history = _run(task, display)
    teacher.freeze()
    return teacher, history


def train_student(
    config: DemoConfig,
    materials: Materials,
    method: str,
    teacher: CausalLM | None,
    display: Display,
) -> tuple[CausalLM, History]:
    """A copy of the initial student, trained by one method.

    Of a student trained by LoRA the adapter is in ``adapters/`` of ``config.output``, by the
    method's name; the model that is returned has it in its weights.
    """
    student = materials.student.clone()
    identity = materials.identity | _described(config.student_training) | asdict(config.loss)
    identity |= {"method": method, "initial weights": student.digest, "lora": config.lora}
    server = materials.server
    objective = make_objective(config, method, student, teacher, materials.second, server)
    teachers = {"teacher": teacher, "second teacher": objective.second}
    identity |= {name: model.digest if model else None for name, model in teachers.items()}
    if server and find(method).written_by(server.role):
        identity["text"] = "server"
    adapter = lora.adapt(student, config.lora, config.seed) if config.lora else None
    store = CheckpointStore(config.output / f"student-{method}", identity)
    if config.fresh and ranks.first():
        store.clear()
    ranks.meet()
    batches: Numbered = materials.batches
    if teacher is not None and find(method).written_by_teacher:
        writer, among = objective.writer(teacher, "teacher"), ranks.size()
        end = config.student_training.steps * config.student_training.accumulate * among
        ahead = end if objective.server_of("teacher") else 0
        batches = WrittenBatches(batches, writer, among, ahead)
    task = Task(
        name=find(method).title,
        model=ready(student, config.student_training, config),
        objective=objective,
        batches=batches,
        validate=lambda: materials.exam.curve(student, teacher),
        config=config.student_training,
        store=store,
        tensorboard=config.tensorboard,
    )
    history = _run(task, display)
    if adapter is not None:
        lora.merge(adapter, config.output / "adapters" / method)
    return student, history


def _described(training: TrainConfig) -> dict[str, Any]:
    """What tells a run from others, by however many processes: the batches of a step are theirs."""
    values = asdict(training)
    values["batches a step"] = values.pop("accumulate") * ranks.size()
    return values


def ready(model: CausalLM, training: TrainConfig, config: DemoConfig) -> Any:
    """The network, set up as the configuration says, in its place."""
    if training.gradient_checkpointing:
        network = model.network  # the name changed in transformers 5
        name = "activation_checkpointing_enable"
        getattr(network, name, network.gradient_checkpointing_enable)()
    if training.compile:
        if config.parallel == "fsdp":
            raise OptionError("--compile does not work with sharded models; use --parallel ddp")
        model.body.compile()
    return sharding.place(model, config, training.bf16).network


def _run(task: Task, display: Display) -> History:
    with display.training(task.name, task.config.steps) as on_step:
        history = train(task, on_step)
    task.model.eval()
    return history
