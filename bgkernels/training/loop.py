"""The training loop: one for teacher and students, resumable at any step bit for bit."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

import bgkernels as bg
from bgkernels.training import ranks
from bgkernels.training.checkpoint import WHOLE, CheckpointStore, State
from bgkernels.training.config import TrainConfig
from bgkernels.training.errors import Interrupted, NonFiniteLoss, enough_memory
from bgkernels.training.log import Board, Log, peak_memory
from bgkernels.training.tokens import IGNORED, Batch
from bgkernels.training.writing import Numbered

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Progress:
    """Where a run stands, given to the caller after each step.

    Args:
        step: steps done.
        loss: of the last one.
        tokens_per_second: since the run was started or resumed, validation left out; 0 before its
            first step.
        validation: the newest measures; empty before the first.
        memory: bytes that this process has had at most, of its GPU or resident.
    """

    step: int
    loss: float
    tokens_per_second: float
    validation: dict[str, float]
    memory: int = 0


class Objective(Protocol):
    """What is minimised; see :class:`bgkernels.training.distill.Objective`."""

    def rewrite(self, batches: list[Batch], numbers: Sequence[int], step: int) -> list[Batch]:
        """What is learnt from in place of the batches of a step, often themselves."""

    def ask(self, batches: Numbered, numbers: Iterable[int], step: int) -> None:
        """Begin with what can be known of batches before they are learnt from."""

    def __call__(self, batch: Batch, step: int, items: Tensor) -> Tensor:
        """Scalar loss, a sum over the batch divided by ``items``."""


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how; the loop decides nothing.

    Args:
        name: for messages.
        model: its parameters are trained in place.
        objective: a batch to a scalar loss.
        batches: tokens of each step.
        validate: measures of the model as it is; called without gradients.
        config: steps, rates, intervals.
        store: where the state is kept.
        tensorboard: whether the log is kept for TensorBoard too.
    """

    name: str
    model: nn.Module
    objective: Objective
    batches: Numbered
    validate: Callable[[], dict[str, float]]
    config: TrainConfig
    store: CheckpointStore
    tensorboard: bool = False


@dataclass
class History:
    """What a run leaves behind beside the weights.

    Args:
        losses: one a step.
        curve: validation measures, each with its ``step``.
        seconds: time spent in training steps and validation, over all resumptions.
        writing: processor seconds in which a model wrote text to be learnt from.
    """

    losses: list[float] = field(default_factory=list)
    curve: Curve = field(default_factory=list)
    seconds: float = 0.0
    writing: float = 0.0


def train(task: Task, on_step: Callable[[Progress], None] = lambda progress: None) -> History:
    """Train until the configured step, from the newest good checkpoint if there is one.

    A finished run returns at once. On one process, a run that was stopped and resumed ends with
    the same weights, bit for bit, as one that was not.

    On several processes (:mod:`~bgkernels.training.ranks`) each has its own batches of a step, and
    all have one normaliser and one gradient: that of a single process with so many times more
    batches a step. The first process writes checkpoints and logs, which all of them must see. What
    it writes is what one process would, and can be gone on from by another number of them.

    Args:
        task: what to train.
        on_step: called after each step, and once before them where the run is resumed.

    Raises:
        NonFiniteLoss: the loss or its gradient is not finite; no weight has changed in that step.
        Interrupted: SIGINT or SIGTERM came; the state has been saved.
        CheckpointError: see :class:`~bgkernels.training.checkpoint.CheckpointStore`.
        MissingExtra: TensorBoard is wanted and not installed.
    """
    with closing(_Run(task)) as run, _signals() as caught:
        if run.step:
            on_step(run.progress())
        while run.step < task.config.steps:
            run.advance()
            if ranks.mean(len(caught)):  # any of the processes
                path, by = run.save(), caught[0] if caught else signal.SIGTERM
                raise Interrupted(
                    f"stopped by {by.name} in {task.name} at step {run.step}; saved as {path}. "
                    "Run the same command again to go on",
                    by,
                )
            if run.step == task.config.steps or run.step % task.config.checkpoint_every == 0:
                run.save()
            on_step(run.progress())
    return run.history


class _Step(nn.Module):
    """The loss as a module of its own, whose parameters and calls DDP can see."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.network, self.objective = task.model, task.objective

    def forward(self, batch: Batch, step: int, items: Tensor) -> Tensor:
        """The objective."""
        return self.objective(batch, step, items)


class _Run:
    """A task and its state: weights, optimiser, generator, and position."""

    def __init__(self, task: Task) -> None:
        self.task, self.step, self.history = task, 0, History()
        self.device = next(task.model.parameters()).device
        self.optimizer = make_optimizer(task.model, task.config)
        self.tokens, self.seconds = 0, 0.0
        self.loss = ranks.averaging(_Step(task))
        state = task.store.load()
        if state is not None:
            self._restore(state)
        self.log = Log(task.store.folder / "log.jsonl")
        if ranks.first():
            self.log.rewind(self.step)
        folder, wanted = task.store.folder / "tensorboard", task.tensorboard and ranks.first()
        self.board = Board(folder, self.step) if wanted else None

    def advance(self) -> None:
        """One step of the optimiser, then validation where it is due."""
        started = time.perf_counter()
        with enough_memory(self.task.name, self.step + 1):
            loss = self._optimise(self._batches())
        self.step += 1
        self.seconds += time.perf_counter() - started
        config, curve = self.task.config, self.history.curve
        if self.step % config.validate_every == 0 or self.step == config.steps:
            self.task.model.eval()
            with torch.no_grad(), enough_memory(self.task.name, self.step):
                curve.append({"step": self.step, **self.task.validate()})
        self.history.losses.append(loss)
        self.history.seconds += time.perf_counter() - started
        if ranks.first():
            self._note()

    def progress(self) -> Progress:
        """Where the run stands."""
        losses, curve = self.history.losses, self.history.curve
        speed = self.tokens / self.seconds if self.tokens else 0.0
        validation = curve[-1] if curve else {}
        return Progress(self.step, losses[-1], speed, validation, peak_memory(self.device))

    def _note(self) -> None:
        """A line in the log, and a point in TensorBoard's curves."""
        now = self.progress()
        fresh = now.validation if now.validation.get("step") == now.step else {}
        record = {
            "step": now.step,
            "loss": now.loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "tokens_per_second": now.tokens_per_second,
            "seconds": self.history.seconds,
            "peak_memory": now.memory,
            **fresh,
        }
        self.log.write(record)
        if self.board:
            self.board.write(record)

    def close(self) -> None:
        """Close what is open."""
        if self.board:
            self.board.close()

    def save(self) -> Path:
        """Write everything that the rest of the run depends on."""
        model, optimizer = get_state_dict(self.task.model, self.optimizer, options=WHOLE)
        if not ranks.first():
            return self.task.store.path(self.step)
        state: State = {
            "model": model,
            "optimizer": optimizer,
            "generators": {"cpu": torch.get_rng_state()},
            "step": self.step,  # also the position in the data
            "history": asdict(self.history),
        }
        if self.device.type == "cuda":
            state["generators"]["cuda"] = torch.cuda.get_rng_state(self.device)
        return self.task.store.save(self.step, state)

    def _restore(self, state: State) -> None:
        set_state_dict(
            self.task.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=replace(WHOLE, cpu_offload=False),
        )
        torch.set_rng_state(state["generators"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)
        self.step = state["step"]
        self.history = History(**state["history"])

    def _batches(self) -> list[Batch]:
        """The batches of this step, written by a model where the method wants it."""
        task, among = self.task, ranks.size()
        task.model.eval()
        count = task.config.accumulate * among
        numbers = range(self.step * count + ranks.rank(), (self.step + 1) * count, among)
        task.objective.ask(task.batches, numbers, self.step)
        if self.step + 1 < task.config.steps:
            task.objective.ask(task.batches, [n + count for n in numbers], self.step + 1)
        given = [task.batches[n].to(self.device) for n in numbers]
        started = time.process_time()
        batches = task.objective.rewrite(given, numbers, self.step)
        self.history.writing += time.process_time() - started
        self.tokens += among * sum(batch.labels.numel() for batch in batches)
        return batches

    def _optimise(self, batches: list[Batch]) -> float:
        """Gradient, clipping and update; nothing is updated where one of them is not finite."""
        config, value = self.task.config, 0.0
        labels = torch.cat([batch.labels.flatten() for batch in batches])
        items = bg.distributed.global_num_items(labels, ignore_index=IGNORED, averaged=True)
        self.task.model.train()
        for batch in batches:
            alone = ranks.apart(self.loss) if batch is not batches[-1] else nullcontext()
            with alone:
                with torch.autocast(labels.device.type, torch.bfloat16, enabled=config.bf16):
                    loss = self.loss(batch, self.step, items)
                loss.backward()
            value += loss.item()
        value = ranks.mean(value)
        norm = nn.utils.clip_grad_norm_(self.task.model.parameters(), config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not math.isfinite(value) or not torch.isfinite(norm):
            raise NonFiniteLoss(self._not_finite(value, float(norm)))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def _not_finite(self, loss: float, norm: float) -> str:
        newest = self.task.store.newest()
        good = f"the last good checkpoint is {newest}" if newest else "no checkpoint was due before"
        return (
            f"{self.task.name}: the loss is {loss} and its gradient's norm {norm} at step "
            f"{self.step + 1}; {good}. Lower --learning-rate, or look at the data of that step"
        )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to ``final_rate`` of the peak.

    Example:
        >>> config = TrainConfig(steps=100, learning_rate=1.0, warmup=0.1, final_rate=0.0)
        >>> learning_rate(config, 0), learning_rate(config, 9), round(learning_rate(config, 55), 3)
        (0.1, 1.0, 0.5)
    """
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT and SIGTERM inside the block; a second one acts as it would have before.

    Python lets only the main thread do this; elsewhere the list stays empty.
    """
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(signum: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(signum))
        restore()

    def restore() -> None:
        for known, handler in before.items():
            signal.signal(known, handler)

    for known in before:
        signal.signal(known, note)
    try:
        yield caught
    finally:
        restore()
