"""A distillation step of whole models, with the library and with dense logits.

Qwen2 models of random weights through ``transformers``: small ones with a real vocabulary on a CPU,
those of Qwen2.5 0.5B ← 1.5B on a GPU. Each entry runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import bgkernels as bg
from benchmarks.dense import GAMMA, mean, power_entropy
from benchmarks.limits import MIB
from benchmarks.measure import resident, settle, spread

LENGTH, RUNS = 128, 3
ROOM = 768 * MIB
"""Above the models, for activations, logits and gradients, where the largest batch is sought."""
TINY = {
    "student": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    "teacher": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
}
REAL = {
    "student": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    "teacher": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
}
VOCAB = {"cpu": 32_768, "cuda": 151_936}
Loss = Callable[[nn.Module, nn.Module, Tensor], Tensor]


def build(sizes: dict[str, int], device: torch.device) -> nn.Module:
    """A causal language model with tied heads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = sizes["hidden_size"] // 64
    config = Qwen2Config(
        vocab_size=VOCAB[device.type], num_attention_heads=heads, num_key_value_heads=heads,
        tie_word_embeddings=True, **sizes,
    )  # fmt: skip
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model: nn.Module = Qwen2ForCausalLM(config).to(device, dtype)
    return model


def library(student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    """Hidden states and heads go to the library."""
    with torch.no_grad():
        seen = teacher.model(tokens).last_hidden_state[:, :-1]
    hidden = student.model(tokens).last_hidden_state[:, :-1]
    soft_labels = bg.LinearTeacher(seen, teacher.lm_head.weight)
    made = bg.linear_hybrid_distillation(
        hidden, student.lm_head.weight, soft_labels, tokens[:, 1:],
        routing=bg.routing.entropy(gamma=GAMMA), memory_budget=64 * MIB,
    )  # fmt: skip
    assert isinstance(made, Tensor)
    return made


def dense(student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    """The same loss over the logits of both models."""
    with torch.no_grad():
        lp_t = teacher(tokens).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
    lp_s = student(tokens).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
    target = tokens[:, 1:].flatten()
    soft = power_entropy((GAMMA * lp_t).exp(), lp_t.shape[-1])
    nll = -lp_s.gather(1, target[:, None])[:, 0]
    divergence = (lp_t.exp() * (lp_t - lp_s)).sum(-1)
    return mean((1 - soft) * nll + soft * divergence, target)


LOSSES: dict[str, Loss] = {"bgkernels, 64 MiB": library, "dense logits": dense}


def study(threads: int) -> list[dict[str, Any]]:
    """Time and memory of a step of 4 sequences, and the largest batch, for each loss."""
    rows = []
    for who in LOSSES:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, who, threads), daemon=True)
        process.start()
        theirs.close()
        try:
            rows.append({"who": who} | ours.recv())
        except EOFError:
            rows.append({"who": who, "error": "its process ended"})
        process.join()
    losses = {round(r["loss"], 3) for r in rows if "loss" in r}
    assert len(losses) == 1, f"the losses differ: {rows}"
    return [r for r in rows if "error" not in r]


def _serve(pipe: Any, who: str, threads: int) -> None:
    torch.set_num_threads(threads)
    pipe.send(figures(LOSSES[who]))


def figures(loss: Loss, room: int = ROOM) -> dict[str, Any]:
    """What one entry finds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    sizes = TINY if device.type == "cpu" else REAL
    student, teacher = (build(sizes[name], device) for name in ("student", "teacher"))
    teacher.requires_grad_(False)
    step = _stepper(student, teacher, loss, device)
    first = step(4)
    samples = [step(4) for _ in range(RUNS)]
    largest = 0
    for batch, peak in _peaks(step):
        if peak > room:
            break
        largest = batch
    return {
        "seconds": spread([s["seconds"] for s in samples]), "loss": first["loss"],
        "peak": max(s["peak"] for s in samples), "largest": largest, "length": LENGTH,
        "room": room,
    }  # fmt: skip


def _peaks(step: Callable[[int], dict[str, Any]]) -> Iterator[tuple[int, int]]:
    batch = 1
    while batch <= 64:
        yield batch, step(batch)["peak"]
        batch *= 2


def _stepper(
    student: nn.Module, teacher: nn.Module, loss: Loss, device: torch.device
) -> Callable[[int], dict[str, Any]]:
    vocab = VOCAB[device.type]

    def step(batch: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab, (batch, LENGTH), generator=random).to(device)
        student.zero_grad(set_to_none=True)
        before = _start(device)
        begin = time.perf_counter()
        value = loss(student, teacher, tokens)
        value.backward()
        peak = _peak(device) - before
        return {"seconds": time.perf_counter() - begin, "peak": peak, "loss": value.item()}

    return step


def _start(device: torch.device) -> int:
    if device.type == "cpu":
        return settle()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: torch.device) -> int:
    if device.type == "cpu":
        return resident("VmHWM")
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
