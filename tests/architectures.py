"""Every language model of ``transformers`` that can be built small: as student and as teacher.

``python -m tests.architectures`` tries all of them and writes ``docs/architectures.md``; with names
of classes it tries those and prints what it finds. ``test_architectures.py`` tries a sample.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.shrunken import shrunken

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image and text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "encoder–decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
OUTCOMES = ("works", "refused", "cannot be built", "SILENT", "CRASHED")
LARGEST = 8_000_000
"""Parameters of a model that is small."""


@dataclass(frozen=True)
class Found:
    """What became of a class.

    Args:
        name: of the class.
        kind: a key of ``KINDS``.
        outcome: one of ``OUTCOMES``.
        why: the reason, where it does not work.
    """

    name: str
    kind: str
    outcome: str
    why: str = ""


def classes(kind: str) -> Iterator[tuple[str, str]]:
    """``(model type, class)`` of a kind, each class once."""
    from transformers.models.auto import modeling_auto

    seen = set()
    for model_type, names in getattr(modeling_auto, KINDS[kind]).items():
        for name in [names] if isinstance(names, str) else names:
            if name not in seen:
                seen.add(name)
                yield model_type, name


def build(model_type: str, name: str, kind: str, seed: int) -> Any:
    """A small model of random weights, evaluated."""
    import transformers

    made = getattr(transformers, name)
    config = shrunken(model_type, made, kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in made(config).parameters())
    if size > LARGEST:
        raise ValueError(f"has {size:,} parameters when it is shrunken")
    torch.manual_seed(seed)
    model = made(shrunken(model_type, made, kind)).eval()
    for p in model.parameters():
        if not p.isfinite().all():  # some leave memory as it was
            torch.nn.init.normal_(p, std=0.02)
    return model


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(30, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :3] = -100
    return {"input_ids": tokens, "labels": labels}


def own(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A model's loss and its gradients."""
    torch.manual_seed(2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batch(), use_cache=False).loss
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    zeros = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    ]
    return loss.detach(), zeros


def same(one: Any, other: Any) -> bool:
    """Whether losses and gradients agree."""
    (a, ga), (b, gb) = one, other
    size = max(float(g.abs().max()) for g in ga)
    error = max(float((x - y).abs().max()) for x, y in zip(ga, gb, strict=True))
    return abs(float(a - b)) <= 1e-4 * max(1, abs(float(a))) and error <= 1e-3 * size + 1e-12


def attempt(model_type: str, name: str, kind: str) -> Found:
    """Try a class as student and as teacher of another of its kind."""
    from bgkernels.integrations.causal_lm import attach
    from bgkernels.integrations.teachers import ModelTeacher

    try:
        model, teacher = (build(model_type, name, kind, seed) for seed in (0, 1))
        expected = own(model)
        if not expected[0].isfinite():
            raise ValueError("its own loss is not finite")
    except Exception as error:
        return Found(name, kind, "cannot be built", reason(error))
    try:
        attachment = attach(model, teacher, routing="hard")
        found = own(model)
        attachment.remove()
        if not same(expected, found):
            values = f"{float(found[0]):.4f} for {float(expected[0]):.4f}"
            return Found(name, kind, "SILENT", f"another loss or gradient: {values}")
        inputs = {"input_ids": batch()["input_ids"]}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        with torch.no_grad():
            logits = teacher(**inputs, use_cache=False).logits
            made = ModelTeacher(teacher)(inputs, None)
            z = torch.nn.functional.linear(made.hidden, made.weight, made.bias) * made.logit_scale
            cap = made.logit_softcap
            z = cap * torch.tanh(z / cap) if cap else z
        if not torch.allclose(z, logits, rtol=1e-3, atol=1e-4):
            return Found(name, kind, "SILENT", "as teacher: other logits")
    except ValueError as error:
        return Found(name, kind, "refused", reason(error))
    except Exception as error:
        return Found(name, kind, "CRASHED", f"{type(error).__name__}: {reason(error)}")
    return Found(name, kind, "works")


def reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def page(found: list[Found]) -> str:
    """The table and the lists, as Markdown."""
    import transformers

    lines = [
        "# Architectures", "",
        "Every causal, image-and-text and encoder–decoder class of transformers "
        f"{transformers.__version__} was built small from its",
        'configuration and tested: as a student, whose loss with `routing="hard"` must equal the '
        "model's own, in value and gradient; and as a",
        "teacher, whose logits must equal the model's own. `make architectures` writes this page.",
        "",
        "The table counts classes. *Refused*: `attach` raises an error. *Cannot be built*: the "
        "small model could not be made, so nothing is",
        "known. *Silent*: another loss without an error. *Crashed*: any other error.", "",
        "| outcome | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS),
    ]  # fmt: skip
    for outcome in OUTCOMES:
        counts = [sum(f.kind == kind and f.outcome == outcome for f in found) for kind in KINDS]
        lines.append(f"| {outcome.lower()} | " + " | ".join(map(str, counts)) + " |")
    for outcome in OUTCOMES[1:]:
        chosen = [f for f in found if f.outcome == outcome]
        if chosen:
            lines += ["", f"## {outcome.capitalize()}", "", "| class | why |", "|---|---|"]
            lines += [f"| `{f.name}` | {cell(f.why)} |" for f in chosen]
    lines += ["", "## Works", ""]
    lines.append(", ".join(f"`{f.name}`" for f in found if f.outcome == "works"))
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    for a, b in (("|", "\\|"), ("<", "&lt;"), ("`", "'"), ("*", "\\*"), ("_", "\\_")):
        text = text.replace(a, b)
    return text


def main(names: list[str]) -> int:
    import transformers

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # of models so small; more threads wait for each other
    transformers.logging.set_verbosity_error()
    found: dict[str, Found] = {}
    for kind in KINDS:
        for model_type, name in classes(kind):
            if name in found or (names and name not in names):
                continue
            found[name] = attempt(model_type, name, kind)
            if found[name].outcome != "works" or names:
                print(found[name].outcome, name, found[name].why, flush=True)
    if not names:
        PAGE.write_text(page([*found.values()]), encoding="utf-8")
    for outcome in OUTCOMES:
        print(outcome, sum(f.outcome == outcome for f in found.values()))
    return int(any(f.outcome in OUTCOMES[3:] for f in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
