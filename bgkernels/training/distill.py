"""The two kinds of run of a demo: one teacher, and a student by each method."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

import bgkernels as bg
from bgkernels.training.checkpoint import CheckpointStore
from bgkernels.training.config import METHODS, DemoConfig
from bgkernels.training.errors import OptionError
from bgkernels.training.files import digest
from bgkernels.training.loop import History, Task, train
from bgkernels.training.materials import Materials
from bgkernels.training.models import CausalLM, small_llama
from bgkernels.training.progress import Display


@dataclass(frozen=True)
class Objective:
    """The loss of one batch, from hidden states and the head's weight: logits never exist whole.

    Args:
        student: the model that learns.
        teacher: whom it imitates; None where only hard labels count.
        loss: the loss module.
    """

    student: CausalLM
    teacher: CausalLM | None
    loss: bg.LinearHybridDistillationLoss

    def __call__(self, tokens: Tensor) -> Tensor:
        """Scalar loss of ``(batch, length + 1)`` tokens."""
        inputs, target = tokens[:, :-1], tokens[:, 1:]
        loss: Tensor = self.loss(
            self.student.hidden(inputs),
            self.student.head.weight,
            self.teacher.as_teacher(inputs) if self.teacher else None,
            target,
            self.student.head.bias,
        )
        return loss


def make_objective(
    config: DemoConfig, method: str, student: CausalLM, teacher: CausalLM | None
) -> Objective:
    """The loss of a method; with hard labels only, the teacher is not run.

    Raises:
        OptionError: an option of the loss is unknown or out of range, by name.
    """
    try:
        loss = bg.LinearHybridDistillationLoss(
            routing=method,
            divergence=config.loss.divergence,
            temperature=config.loss.temperature,
            memory_budget=config.loss.memory_budget,
            logit_scale=student.logit_scale,
            logit_softcap=student.logit_softcap,
        )
    except (TypeError, ValueError) as error:
        raise OptionError(str(error)) from error
    return Objective(student, None if method == "hard" else teacher, loss)


def train_teacher(
    config: DemoConfig, materials: Materials, display: Display
) -> tuple[CausalLM, History]:
    """A small Llama trained on the text by cross-entropy, or the one that was trained before.

    Its folder is named by its configuration: the same one is found again, another one starts anew.
    """
    shape, length = config.teacher_shape, config.data.sequence_length
    teacher = small_llama(shape, len(materials.tokenizer), length, config.seed)
    identity = materials.identity | asdict(config.teacher_training) | asdict(shape)
    name = "teacher-" + digest([repr(sorted(identity.items())).encode()])
    task = Task(
        name="teacher",
        model=teacher.network,
        objective=make_objective(config, "hard", teacher, None),
        batches=materials.batches,
        validate=lambda: materials.exam.curve(teacher, None),
        config=config.teacher_training,
        store=CheckpointStore(config.output / name, identity),
    )
    history = _run(task, display)
    teacher.freeze()
    return teacher, history


def train_student(
    config: DemoConfig, materials: Materials, method: str, teacher: CausalLM, display: Display
) -> tuple[CausalLM, History]:
    """A copy of the initial student, distilled by one method."""
    student = materials.student.clone()
    identity = materials.identity | asdict(config.student_training) | asdict(config.loss)
    identity |= {"method": method, "teacher": teacher.digest, "initial weights": student.digest}
    store = CheckpointStore(config.output / f"student-{method}", identity)
    if config.fresh:
        store.clear()
    task = Task(
        name=METHODS[method],
        model=student.network,
        objective=make_objective(config, method, student, teacher),
        batches=materials.batches,
        validate=lambda: materials.exam.curve(student, teacher),
        config=config.student_training,
        store=store,
    )
    return student, _run(task, display)


def _run(task: Task, display: Display) -> History:
    with display.training(task.name, task.config.steps) as on_step:
        history = train(task, on_step)
    task.model.eval()
    return history
