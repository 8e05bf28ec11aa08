"""Arguments of a trainer that the hybrid loss reads, or refuses."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer


def cuts_no_batches(trainer: Trainer) -> bool:
    """Whether a batch reaches the model as it was collated; accelerate may cut others."""
    config: Any = trainer.args.accelerator_config
    data = (trainer.train_dataset, trainer.eval_dataset)
    return not config.split_batches and not any(isinstance(d, IterableDataset) for d in data)


def check_arguments(trainer: Trainer) -> None:
    """Refuse what a trainer would do with logits, or to another model.

    Raises:
        ValueError: such an argument, by name, with the remedy.
    """
    args: Any = trainer.args
    if args.label_smoothing_factor or trainer.compute_loss_func:
        raise ValueError(
            "`label_smoothing_factor` and `compute_loss_func` need logits, and there are none; "
            "pass options of the loss instead, such as label_smoothing="
        )
    if trainer.compute_metrics or trainer.preprocess_logits_for_metrics:
        raise ValueError(
            "`compute_metrics` and `preprocess_logits_for_metrics` need logits, and there are "
            "none; the parts of the loss are logged at each evaluation. For other metrics, use a "
            "callback that calls the model without labels"
        )
    if trainer.model_init is not None:
        raise ValueError(
            "`model_init` makes another model when training starts, which has no loss attached; "
            "pass `model`"
        )
    config = args.liger_kernel_config or {}
    if args.use_liger_kernel and config.get("fused_linear_cross_entropy", True):
        raise ValueError(
            "`use_liger_kernel` replaces the model's forward by Liger's own loss when training "
            'starts; keep its layers alone: liger_kernel_config={"fused_linear_cross_entropy": '
            "False}"
        )


def the_teacher(teacher: Any, teacher_model: Any) -> Any:
    """The one of two arguments that was given.

    Raises:
        TypeError: neither was, or both.
    """
    if (teacher is None) == (teacher_model is None):
        both = "both were" if teacher is not None else "neither was"
        raise TypeError(f"pass the teacher as `teacher` (or, as in TRL, `teacher_model`); {both}")
    return teacher if teacher_model is None else teacher_model
