"""Students of which only an adapter is trained."""

from __future__ import annotations

import sys
from dataclasses import replace
from signal import SIGTERM

import pytest
import torch

from bgkernels.training import distill, lora, models
from bgkernels.training.config import DataConfig, DemoConfig, ModelShape, TrainConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.errors import Interrupted, MissingExtra
from bgkernels.training.materials import prepare
from bgkernels.training.progress import Silent
from tests.training.notes import write_notes
from tests.training.signals import Signals

TOKENS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    (folder / "corpus").mkdir()
    corpus = write_notes(folder / "corpus")
    data = DataConfig(corpus, vocab=300, sequence_length=16, batch_size=2, held_out=0.1)
    training = TrainConfig(6, 1e-2, validate_every=3, checkpoint_every=4)
    return replace(
        DemoConfig.quick(), data=data, student_training=training, output=folder, lora=3
    )  # fmt: skip


@pytest.fixture(scope="module")
def materials(config):
    return prepare(config, load_corpus(config.data))


@pytest.fixture(scope="module")
def trained(config, materials):
    """``trained(folder, **changes)``: a student and its history."""
    pytest.importorskip("peft", reason="needs the extra `lora`: peft")
    teacher = models.small_llama(ModelShape(16, 1, 1), len(materials.tokenizer), 16, 2)

    def run(folder, display=None, **changes):
        changed = replace(config, output=config.output / folder, **changes)
        return distill.train_student(changed, materials, "static", teacher, display or Silent())

    return run


def test_adapter_and_merged_model_are_one(config, materials, trained):
    student, history = trained("one")
    assert history.losses[-1] < history.losses[0]
    assert student.network.state_dict().keys() == materials.student.network.state_dict().keys()
    assert torch.equal(student.head.weight, materials.student.head.weight)
    folder = config.output / "one" / "adapters" / "static"
    import peft

    loaded = peft.PeftModel.from_pretrained(materials.student.clone().network, folder)
    with torch.no_grad():
        merged, separate, before = (
            x(TOKENS).logits for x in (student.network, loaded, materials.student.network)
        )
    torch.testing.assert_close(merged, separate, rtol=1e-4, atol=1e-5)
    assert (merged - before).abs().max() > 100 * (merged - separate).abs().max()
    models.export(student, materials.tokenizer, config.output / "plain model")
    found, _ = models.load_pretrained(str(config.output / "plain model"), "--student", 16)
    assert found.digest == student.digest


def test_only_the_adapter_is_trained(materials):
    pytest.importorskip("peft", reason="needs the extra `lora`: peft")
    student = materials.student.clone()
    before = torch.random.get_rng_state()
    lora.adapt(student, 3, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    names = [n for n, p in student.network.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 and all("lora_" in n for n in names)  # 4 of attention, 3 of the MLP
    assert type(student.head) is torch.nn.Linear


def test_interrupted_and_resumed_is_bit_identical(trained):
    straight, history = trained("straight")
    with pytest.raises(Interrupted):
        trained("stopped", display=Signals(2, SIGTERM))
    resumed, again = trained("stopped")
    assert again.losses == history.losses and resumed.digest == straight.digest


def test_gradient_checkpointing_changes_nothing(config, trained):
    saving = replace(config.student_training, gradient_checkpointing=True)
    _, history = trained("plain")
    _, again = trained("saving", student_training=saving)
    assert again.losses == pytest.approx(history.losses, rel=1e-5)


def test_peft_is_asked_for(materials, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"'peft'.*pip install 'bgkernels\[lora\]'"):
        lora.adapt(materials.student.clone(), 3, seed=0)
