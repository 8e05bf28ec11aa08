"""One process of two: steps under DeepSpeed ZeRO-3, in a plain loop and in the ``Trainer``.

Run by ``integrations/test_zero3.py``, which compares what is saved with one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bgkernels as bg
from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.transformers import HybridDistillationTrainer
from tests.integrations.steps import SHANNON, arguments, examples
from tests.integrations.two_tokenizers import Pair
from tests.integrations.zero3 import RATE, steps, student, teacher
from tests.models import REPORTED, batch, dense, tiny

OPTIONS = {"routing": SHANNON, "temperature": 2.0}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
OF_THE_TRAINER = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}


def engine(model: Any, **more: Any) -> Any:
    """A model under ZeRO-3."""
    return deepspeed.initialize(model=model, config=CONFIG, **more)[0]


def whole(model: Any) -> dict[str, Tensor]:
    """All parameters, each of which must be in parts."""
    parameters = dict(model.named_parameters())
    assert all(hasattr(p, "ds_id") and not p.numel() for p in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().clone() for name, p in parameters.items()}


def trainable(model: Any) -> Any:
    """A model under ZeRO-3, with SGD."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return engine(model, optimizer=torch.optim.SGD(weights, RATE))


def plain(case: str, trained: Any, call: Callable[..., Any]) -> dict[str, Tensor]:
    """Parameters after the steps of a plain loop over ``call(engine, **batch)``."""
    for data in steps(case):
        items = (data["labels"][:, 1:] != -100).sum() / dist.get_world_size()
        mine = {name: x[dist.get_rank() :: 2] for name, x in data.items()}
        trained.backward(call(trained, **mine, num_items=items))
        trained.step()
    return whole(trained.module)


def attached(case: str, other: Any, late: bool = False, **options: Any) -> dict[str, Tensor]:
    """The steps of a student with an attached loss, be it attached to the engine."""
    model = trainable(student(case)) if late else student(case)
    attachment = attach(model, other, **OPTIONS, **options)
    assert attachment.student.examined is not late

    def call(trained: Any, num_items: Tensor, **data: Tensor) -> Any:
        return trained(**data, num_items_in_batch=num_items).loss

    found = plain(case, model if late else trainable(model), call)
    assert attachment.student.examined
    return found


def two_tokenizers(folder: Path) -> dict[str, Tensor]:
    """A step of a student whose teacher has another tokenizer, both in parts."""
    pair = Pair.load(folder)
    model, other = pair.models()
    attach(model, engine(other), routing="static", **pair.both)
    trained, whole_batch = trainable(model), pair.batch(rows=4)
    items = (whole_batch["labels"][:, 1:] != -100).sum() / dist.get_world_size()
    mine = {name: x[dist.get_rank() :: 2] for name, x in whole_batch.items()}
    trained.backward(trained(**mine, num_items_in_batch=items).loss)
    trained.step()
    return whole(trained.module)


class Own(nn.Module):
    """A module that calls the loss itself."""

    def __init__(self, model: Any, other: Any) -> None:
        super().__init__()
        self.model, self.other = model, [other]  # a list: it is not trained
        deepspeed.zero.register_external_parameter(self, model.lm_head.weight)

    def forward(self, labels: Tensor, num_items: Tensor, **data: Tensor) -> Any:
        """The loss of a batch."""
        (other,) = self.other
        hidden = self.model.model(**data).last_hidden_state
        with torch.no_grad():
            theirs = other.model(**data).last_hidden_state
        target = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        soft = bg.LinearTeacher(theirs, other.lm_head.weight.detach())
        weight = self.model.lm_head.weight
        return bg.linear_hybrid_distillation(
            hidden, weight, soft, target, **OPTIONS, num_items=num_items
        )


def own() -> dict[str, Tensor]:
    """The steps of a module that has registered the head."""
    module = trainable(Own(student("own"), teacher()))
    found = plain("own", module, lambda trained, **data: trained(**data))
    return {name.removeprefix("model."): p for name, p in found.items()}


def another_loss() -> None:
    """A step of a student that comes in parts, with a loss of its own."""
    model = student("untied")
    own, model.loss_function = model.loss_function, lambda *a, **k: 2 * own(*a, **k)
    parts = trainable(model)
    attach(parts, teacher())
    parts(**batch())


def refused() -> str:
    """What is said where parameters are in parts."""
    parts = engine(teacher()).module
    hidden, weight = torch.randn(3, REPORTED["hidden_size"]), parts.lm_head.weight
    label, here = torch.zeros(3, dtype=torch.int64), torch.randn(REPORTED["vocab_size"], 32)
    deepspeed.zero.Init(module=(alone := teacher()), config_dict_or_path=CONFIG)
    calls: list[Callable[[], Any]] = [
        lambda: bg.linear_hybrid_distillation(hidden, weight, None, label, routing="hard"),
        lambda: bg.linear_hybrid_distillation(
            hidden, here, bg.LinearTeacher(hidden, weight.detach()), label
        ),
        lambda: attach(student("untied"), alone).teacher(batch(), None),
        another_loss,
    ]
    said = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return "\n".join(said)


def trainer(case: str, folder: Path, other: Any) -> HybridDistillationTrainer:
    """A step of the ``Trainer`` on two examples a process, twice accumulated."""
    config = {**CONFIG, **OF_THE_TRAINER}
    model = student(case)
    args = arguments(folder, deepspeed=config, gradient_accumulation_steps=2)
    made = HybridDistillationTrainer(
        model, args, teacher=other or folder / "teacher", loss=OPTIONS,
        train_dataset=examples(), eval_dataset=examples(4),
    )  # fmt: skip
    made.train()
    return made


def logged(trained: HybridDistillationTrainer, folder: Path) -> dict[str, float]:
    """Parts of the loss, and that of an evaluation beside the one that must be."""
    step = next(entry for entry in trained.state.log_history if "soft_loss" in entry)
    model = tiny(**REPORTED)
    model.load_state_dict(whole(trained.model))
    data = batch(rows=4, length=10)
    items = (data["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        expected = dense(model, teacher(), data, 2.0) / items
    return step | trained.evaluate() | {"expected": expected.item()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {
        "untied": attached("untied", teacher()),
        "tied": attached("tied", engine(teacher()), mode="recompute"),
        "biased": attached("biased", engine(teacher()), late=True),
        "frozen": attached("frozen", teacher()),
        "own": own(),
        "two tokenizers": two_tokenizers(folder),
    }
    trained = trainer("trainer", folder, None)  # loads the teacher in parts
    found["trainer"] = whole(trained.model)
    found["logged"] = logged(trained, folder)
    found["trainer tied"] = whole(trainer("trainer tied", folder, teacher()).model)
    found["refused"] = refused()  # last: a failed forward leaves an engine in the middle of it
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()
