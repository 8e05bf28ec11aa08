"""A teacher behind a server is the teacher: losses, gradients, and refusals of whatever is not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra `integrations`: transformers")
pytest.importorskip("accelerate", reason="needs the extra `integrations`: accelerate")
pytest.importorskip("urllib3", reason="needs the extra `served`: urllib3")

import bgkernels as bg
from bgkernels.integrations import heads
from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.heads import HeadError
from bgkernels.integrations.served import ServedTeacher, read_head
from bgkernels.integrations.served.texts import texts_of
from bgkernels.integrations.transformers import HybridDistillationTrainer
from bgkernels.labels.errors import ServerError
from bgkernels.labels.served.client import Client
from tests import models
from tests.integrations.steps import arguments, examples
from tests.models import FAMILIES, VOCAB, tiny
from tests.stand_in import StandIn, checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Any:
    """A teacher that is wider than its student; its checkpoint is in the folder."""
    return checkpoint(folder, hidden_size=24)


@pytest.fixture(scope="module")
def server(teacher: Any, folder: Path) -> Iterator[StandIn]:
    with StandIn(teacher, str(folder), models.tokenizer()) as server:
        yield server


@pytest.fixture(scope="module")
def served(server: StandIn, folder: Path) -> ServedTeacher:
    return ServedTeacher(server.url, folder)


def loss_and_gradient(student: Any, teacher: Any, data: Any, **options: Any) -> tuple[Tensor, Any]:
    attach(student, teacher, **options)
    student.zero_grad()
    loss = student(**data).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()])


def same(student: Any, one: Any, other: Any, data: Any, **options: Any) -> None:
    left, right = (loss_and_gradient(student, x, data, **options) for x in (one, other))
    torch.testing.assert_close(left[0], right[0], rtol=1e-5, atol=1e-6)
    assert (left[1] - right[1]).norm() <= 1e-5 * right[1].norm() + 1e-7


OPTIONS = {
    "curriculum": lambda: bg.routing.curriculum(lambda step: 0.3),
    "reverse": lambda: bg.routing.reverse("entropy"),
}
"""Policies that take arguments."""


@pytest.mark.parametrize("routing", [*bg.routing.registry])
def test_every_policy(routing: str, served: ServedTeacher, teacher: Any) -> None:
    policy = OPTIONS[routing]() if routing in OPTIONS else routing
    for target in ("labels", "teacher_argmax"):
        if bg.routing.get(policy).hard_term is None or target == "labels":
            options = {"routing": policy, "temperature": 2.0, "target": target}
            same(tiny(), served, teacher, models.batch(), **options)


@pytest.mark.parametrize("divergence", [*bg.divergences.registry])
def test_every_divergence(divergence: str, served: ServedTeacher, teacher: Any) -> None:
    same(tiny(), served, teacher, models.batch(), divergence=divergence, routing="confidence")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_travel(
    side: str, served: ServedTeacher, server: StandIn, teacher: Any
) -> None:
    data = models.batch()
    if side == "left":
        data = {k: x.flip(1) for k, x in data.items()}
        data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
        positions = (data["attention_mask"].cumsum(1) - 1).clamp_min(0)
        data["position_ids"] = positions
        data["labels"][positions == 0] = -100
    before = server.texts.copy()
    same(tiny(), served, teacher, data, routing="soft")
    read = server.texts - before
    for text in read:  # nothing after the last label
        assert len(text) < data["input_ids"].shape[1]
    assert len(read) == 3


def test_packed_texts(served: ServedTeacher, teacher: Any) -> None:
    """Three texts in one row are those three texts."""
    lengths, ids = (5, 3, 8), models.batch(1, 16)["input_ids"]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    found = served({"input_ids": ids, "position_ids": positions}, None).hidden
    parts = [teacher.model(x).last_hidden_state for x in ids.split(lengths, 1)]
    torch.testing.assert_close(found, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)
    packed = {"input_ids": ids, "position_ids": positions, "labels": labels}
    student = tiny()
    attach(student, served)
    assert student(**packed).loss.isfinite()


def test_two_teachers(served: ServedTeacher, teacher: Any, tmp_path: Path) -> None:
    other = checkpoint(tmp_path, seed=2)
    with StandIn(other, str(tmp_path)) as second:
        more = ServedTeacher(second.url, tmp_path)

        def both(inputs: Any, rows: Any) -> bg.MixtureTeacher:
            return bg.MixtureTeacher((served(inputs, rows), more(inputs, rows)), (0.3, 0.7))

        loss = loss_and_gradient(tiny(), both, models.batch(), routing="soft")[0]
        single = [
            loss_and_gradient(tiny(), x, models.batch(), routing="soft")[0]
            for x in (teacher, other)
        ]
        torch.testing.assert_close(loss, 0.3 * single[0] + 0.7 * single[1], rtol=1e-4, atol=1e-5)


def test_in_the_trainer(
    served: ServedTeacher, server: StandIn, teacher: Any, tmp_path: Path
) -> None:
    """The same weights; texts of later steps are asked for before they are needed, once."""
    late: list[tuple[int, ...]] = []

    class Watched(ServedTeacher):
        def __call__(self, inputs: Any, rows: Any) -> Any:
            late.extend(x.tokens for x in texts_of(inputs, rows) if x.tokens not in self._asked)
            return super().__call__(inputs, rows)

    before = server.texts.copy()
    weights = []
    for source in (Watched(server.url, served.name), teacher):
        student = tiny()
        trainer = HybridDistillationTrainer(
            student,
            arguments(tmp_path, max_steps=8, gradient_accumulation_steps=2),
            teacher=source,
            train_dataset=examples(),
            eval_dataset=examples(3),
        )
        trainer.train()
        asked = not late
        trainer.evaluate()
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
        assert asked, f"{len(late)} texts were not asked for ahead"
        late.clear()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
    read = server.texts - before
    assert sum(read.values()) == 4 * 6 + 3 + 1  # epochs of texts with labels; evaluation; the check


def test_the_student_does_not_wait(teacher: Any, folder: Path) -> None:
    """While a batch is learnt from, all texts of the next two are at the server."""
    with StandIn(teacher, str(folder), delay=0.05) as slow:
        source = ServedTeacher(slow.url, folder)
        batches = [{"input_ids": torch.full((4, 8), 3 + 4 * i)} for i in range(3)]
        for batch in batches:
            batch["input_ids"] += torch.arange(4)[:, None]
            source.ask(batch, None)
        source(batches[0], None)
        assert slow.most >= 8
        assert len(source._asked) == 8


def test_a_student_slower_than_the_server_never_waits(
    served: ServedTeacher, server: StandIn, tmp_path: Path
) -> None:
    """After the first batch, what is taken has come. Steps here end when nothing is on its way."""
    ready: list[bool] = []

    class Watched(ServedTeacher):
        def __call__(self, inputs: Any, rows: Any) -> Any:
            futures = [self._asked.get(x.tokens) for x in texts_of(inputs, rows)]
            ready.append(all(future is not None and future.done() for future in futures))
            teacher = super().__call__(inputs, rows)
            wait(self._asked.values())
            return teacher

    trainer = HybridDistillationTrainer(
        tiny(),
        arguments(tmp_path, max_steps=12),
        teacher=Watched(server.url, served.name),
        train_dataset=examples(26),
    )
    trainer.train()
    assert len(ready) == 12 and all(ready[1:])


# ---- refusals


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_read_without_bodies(family: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, family)
    known, found = heads.read(model), read_head(tmp_path)
    assert torch.equal(found.head.weight, known.weight)
    assert (found.head.logit_scale, found.head.logit_softcap) == (
        known.logit_scale,
        known.logit_softcap,
    )
    with StandIn(model, str(tmp_path)) as server:
        teacher = ServedTeacher(server.url, tmp_path)
        same(tiny(), teacher, model, models.batch(), routing="soft")


def test_heads_of_several_files(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="2KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(read_head(tmp_path / "many").head.weight, model.lm_head.weight)
    with pytest.raises(HeadError, match=r"nowhere' could not be read.*checkpoint that is served"):
        read_head(tmp_path / "nowhere")


def refused(folder: Path, message: str, model: Any, **options: Any) -> None:
    reference = options.pop("reference", None)
    head = options.pop("head", folder)
    name = options.pop("model", None)
    with StandIn(model, **{"root": str(folder), **options}) as server:
        if reference is None:
            with pytest.raises(ServerError, match=message):
                ServedTeacher(server.url, head, model=name)
            return
        with (
            StandIn(reference, generates=True) as other,
            pytest.raises(ServerError, match=message),
        ):
            ServedTeacher(server.url, head, reference=other.url, model=name)


def test_another_model(teacher: Any, folder: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", hidden_size=24, seed=5)
    refused(folder, r"last norm of .* did not make", other)
    refused(folder, r"nats a token away from the server's own", other, generates="both")
    refused(folder, r"nats a token away", teacher, reference=other)
    narrow = checkpoint(tmp_path / "narrow")
    refused(folder, r"states of 16 numbers, and the head of .* takes 24", narrow)
    refused(folder, r"serves elsewhere/x, and the head is that of", teacher, root="elsewhere/x")
    with StandIn(teacher, "elsewhere/x") as server:
        ServedTeacher(server.url, folder, model="teacher")  # chosen by its name


def test_another_temperature(teacher: Any, folder: Path, tmp_path: Path) -> None:
    hot = checkpoint(tmp_path, hidden_size=24)
    hot.lm_head.weight.data.mul_(0.8)
    refused(folder, "or at another temperature", hot, generates="both")


def test_normalised_embeddings(teacher: Any, folder: Path) -> None:
    refused(folder, r"normalises its embeddings", teacher, fault=lambda n: "normalised")


def test_another_tokenizer(teacher: Any, folder: Path) -> None:
    words = models.tokenizer()
    words.add_tokens(["capital"])
    refused(folder, r"another tokenizer than the student", teacher, tokenizer=words)


def test_a_reference(teacher: Any, folder: Path, server: StandIn) -> None:
    with StandIn(teacher, generates=True) as generating:
        ServedTeacher(server.url, folder, reference=generating.url)
        assert generating.texts


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 4)}, "embeddings of the student"),
        ({"input_ids": torch.ones(1, 3), "pixel_values": torch.zeros(1)}, "`pixel_values`"),
        ({"input_ids": torch.ones(1, 3), "decoder_input_ids": torch.ones(1, 2)}, "is a decoder"),
        ({"input_ids": torch.ones(1, 3), "cu_seq_lens_q": torch.ones(2)}, "`position_ids` that"),
        ({"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)}, "the shape of"),
        ({"input_ids": torch.full((1, 3), VOCAB)}, r"up to number 64.*below number 64"),
        ({"input_ids": torch.ones(1, 65, dtype=torch.int64)}, "at most 64 tokens"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_batches_of_something_else(served: ServedTeacher, batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        served(batch, None)


def test_a_label_on_padding(served: ServedTeacher) -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    with pytest.raises(ValueError, match="position 2 of sequence 1 has a label"):
        served({"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 5]))


def test_what_was_asked_fails_where_it_is_needed(teacher: Any, folder: Path) -> None:
    with StandIn(teacher, str(folder)) as server:
        source = ServedTeacher(Client(server.url, retries=1, backoff=0.01), folder)
    ids = torch.ones(2, 3, dtype=torch.int64)
    source.ask({"input_ids": ids}, None)
    with pytest.raises(ServerError, match="does not answer"):
        source({"input_ids": ids}, None)
    assert "sesame" not in repr(source)
