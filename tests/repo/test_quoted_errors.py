"""Every error message that a page quotes is the one that comes.

A quote is a line ``SomeError: message`` in a fenced block, to its end or to an empty line, or in a
code span; ``…`` stands for what differs from call to call.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bgkernels as bg
from tests.models import VOCAB, batch, tiny

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples/README.md"]
QUOTE = re.compile(r"(?:[\w.]*\.)?([A-Z]\w*(?:Error|Labels|Extra)): (.+)", re.S)

Quote = tuple[str, str]
"""The name of an exception, and its message."""


def quotes(page: str) -> Iterator[Quote]:
    """What a page of Markdown quotes."""
    fenced = re.findall(r"^ *```\w*\n(.*?)^ *```", page, re.M | re.S)
    spans = re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", page)
    for text in (*(t for block in fenced for t in block.split("\n\n")), *(t for _, t in spans)):
        for part in re.split(r"\n(?=\S*?[A-Z]\w*(?:Error|Labels|Extra): )", text.strip()):
            if found := QUOTE.fullmatch(part.strip()):
                yield found[1], " ".join(found[2].split())


def says(quote: Quote, error: BaseException) -> bool:
    """Whether the quote is of this error."""
    name, message = quote
    pattern = ".*".join(map(re.escape, message.split("…")))
    said = " ".join(str(error.args[0] if error.args else error).split())
    return type(error).__name__ == name and re.fullmatch(pattern, said) is not None


def loss(**changes: Any) -> Any:
    """A call in which all fits but for the changes."""
    given = {
        "input": torch.randn(4, 8),
        "linear_weight": torch.randn(VOCAB, 8, requires_grad=True),
        "teacher": bg.LogitsTeacher(torch.randn(4, VOCAB)),
        "target": torch.tensor([1, 2, 3, -100]),
    }
    return bg.linear_hybrid_distillation(**given | changes)


def cached(**changes: Any) -> Any:
    kept = torch.randn(4, VOCAB).log_softmax(-1).topk(8)
    return loss(teacher=bg.TopKTeacher(kept.indices, kept.values), **changes)


def attached(spoil: Callable[[Any], Any]) -> Any:
    """The loss attached to a model that has been changed."""
    from bgkernels.integrations.causal_lm import attach

    student = tiny()
    return attach(student, spoil(student) or tiny(seed=1))


def another_loss(model: Any) -> None:
    """A student that adds a loss of its logits."""
    own = model.loss_function
    model.config.z_loss_coef = 0.1
    model.loss_function = lambda logits, labels, **more: (
        own(logits, labels, **more) + 0.1 * logits.square().mean()
    )


def undefined(input_ids: Any = None, labels: Any = None) -> Any:
    raise KeyError("pixel_values")


def gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, **changes))


def taught(teacher: Any, **inputs: Any) -> Any:
    """What a teacher makes of a batch."""
    from bgkernels.integrations.teachers import ModelTeacher

    return ModelTeacher(teacher)({**batch(), **inputs}, None)


def never_asked() -> None:
    """A loop that takes the logits of a model with a loss."""
    student = tiny()
    attached_to(student)
    student(batch()["input_ids"]).logits.mean().backward()


def attached_to(student: Any) -> Any:
    from bgkernels.integrations.causal_lm import attach

    return attach(student, tiny(seed=1))


def labels_of(folder: Path, **checks: Any) -> Any:
    """A dataset of cached labels, read by another student."""
    from bgkernels.labels import CaptureConfig, LabelDataset, generate
    from bgkernels.training.models import CausalLM

    generate(CausalLM(tiny()), [[1, 2, 3]], folder, CaptureConfig(k=4))
    return LabelDataset(folder, **checks)


class Vocabulary:
    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


def without_a_package() -> None:
    from bgkernels.training.errors import extra

    with pytest.MonkeyPatch.context() as patch, extra("labels"):
        patch.setitem(sys.modules, "pyarrow", None)
        import pyarrow  # noqa: F401


def part(shape: tuple[int, ...]) -> torch.nn.Parameter:
    """What ZeRO-3 leaves of a parameter."""
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_shape = 0, torch.Size(shape)
    return weight


def partitioned(model: Any) -> None:
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            setattr(module, name, part(tuple(p.shape)))


def in_parts() -> None:
    """A call of a student that no engine has."""
    student = tiny()
    partitioned(student)
    attached_to(student)
    student(**batch())


def negative(s: bg.RowStats) -> Any:
    return 1.0, torch.full_like(s.entropy_t, -0.1)


AFFINITY = bg.divergences.Divergence("affinity", lambda s: -s.power_sum(0.5, 0.5))
PRODUCERS: dict[str, Callable[[Path], Any]] = {
    "teacher with gradients": lambda _: loss(
        teacher=bg.LinearTeacher(torch.randn(4, 6), torch.randn(VOCAB, 6, requires_grad=True))
    ),
    "teacher as a tensor": lambda _: loss(teacher=torch.randn(4, VOCAB)),
    "no teacher": lambda _: loss(teacher=None),
    "label": lambda _: loss(target=torch.tensor([1, 2, VOCAB, -100])),
    "dtypes": lambda _: loss(input=torch.randn(4, 8).bfloat16()),
    "negative weight": lambda _: loss(routing=bg.routing.Policy("mine", negative)),
    "extra": lambda _: loss(divergence=AFFINITY),
    "fused": lambda _: loss(mode="fused", routing="top_entropy"),
    "budget": lambda _: loss(memory_budget=100),
    "backend": lambda _: loss(backend="triton"),
    "function transforms": lambda _: torch.func.grad(lambda x: loss(input=x))(torch.randn(4, 8)),
    "tail": lambda _: cached(temperature=2.0),
    "infinite": lambda _: loss(
        teacher=bg.TopKTeacher(torch.zeros(4, 1).long(), torch.zeros(4, 1), tail="renormalize"),
        divergence="reverse_kl",
    ),
    "head": lambda _: attached(lambda m: setattr(m, "lm_head", torch.nn.Sequential(m.lm_head))),
    "part": lambda _: loss(linear_weight=part((VOCAB, 8))),
    "parts": lambda _: in_parts(),
    "meta": lambda _: attached(lambda m: m.lm_head.to("meta") and None),
    "logits": lambda _: attached(
        lambda m: m.lm_head.register_forward_hook(lambda *a: a[2].square()) and None
    ),
    "own loss": lambda _: attached(another_loss),
    "does not run": lambda _: attached(lambda m: setattr(m, "forward", undefined)),
    "never asked": lambda _: never_asked(),
    "image": lambda _: taught(tiny(seed=1), pixel_values=torch.rand(3, 3, 4, 4)),
    "positions": lambda _: taught(gpt2(n_positions=8)),
    "tokens": lambda _: taught(tiny(seed=1, vocab_size=40)),
    "itself": lambda _: attached(lambda m: m),
    "tokenizer": lambda folder: labels_of(folder, tokenizer=Vocabulary()),
    "vocabulary": lambda folder: labels_of(folder, vocab=VOCAB - 1),
    "package": lambda _: without_a_package(),
}
"""Ways to each of the errors that the pages quote."""


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseException]:
    """What each producer raises."""
    found: dict[str, BaseException] = {}
    for name, produce in PRODUCERS.items():
        with pytest.raises(Exception) as caught:
            produce(tmp_path_factory.mktemp("labels"))
        found[name] = caught.value
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_quoted_messages_are_what_is_said(page: Path, raised: dict[str, BaseException]) -> None:
    for quote in quotes(page.read_text(encoding="utf-8")):
        assert any(says(quote, error) for error in raised.values()), (
            f"{page.name} quotes an error that no entry of PRODUCERS raises: {': '.join(quote)}"
        )


@pytest.mark.parametrize("name", PRODUCERS)
def test_every_error_here_is_quoted(name: str, raised: dict[str, BaseException]) -> None:
    known = [quote for page in PAGES for quote in quotes(page.read_text(encoding="utf-8"))]
    error = raised[name]
    assert any(says(quote, error) for quote in known), f"{type(error).__name__}: {error}"


PAGE = """\
Prose about a ValueError: not a quote. A span: `KeyError: one … three`.

```text
Traceback (most recent call last):
  File "x.py", line 1

lib.HeadError: a message that
  goes on
TypeError: another
```
"""


def test_quotes_are_found_and_compared() -> None:
    found = list(quotes(PAGE))
    assert sorted(found) == [
        ("HeadError", "a message that goes on"), ("KeyError", "one … three"),
        ("TypeError", "another"),
    ]  # fmt: skip
    assert says(("KeyError", "one … three"), KeyError("one two three"))
    assert not says(("KeyError", "one … three"), KeyError("one two three four"))
    assert not says(("KeyError", "one"), ValueError("one"))
