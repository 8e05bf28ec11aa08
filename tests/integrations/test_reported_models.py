"""Models that people have, each a kind of fault that was reported; the right value is their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import REPORTED as SIZE
from tests.models import make, tiny

pytest.importorskip("transformers", reason="needs the extra `training`")

import transformers

from bgkernels.integrations import heads
from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.heads import HeadError
from bgkernels.integrations.probe.loss import OwnLoss
from bgkernels.integrations.teachers import ModelTeacher

BART: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "init_std": 0.3, "dropout": 0.0,
    "pad_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "decoder_start_token_id": 0, "dropout_rate": 0.0, "initializer_factor": 0.3,
}  # fmt: skip
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
DROP = {"activation_dropout": 0.0, "attention_dropout": 0.0}


def data(length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, length), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def own(model: Any, inputs: Any) -> tuple[Tensor, list[Tensor | None]]:
    """A loss and its gradients."""
    torch.manual_seed(3)
    loss = model(**inputs).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, trained, allow_unused=True))


def assert_own_loss(model: Any, teacher: Any, inputs: Any, **later: Any) -> Any:
    """With hard labels the attached loss is the model's own, and so are its gradients."""
    expected, gradients = own(model, inputs | later)
    attachment = attach(model, teacher, routing="hard")
    got, ours = own(model, inputs | later)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    size = max(float(ref.abs().max()) for ref in gradients if ref is not None)
    for x, ref in zip(ours, gradients, strict=True):
        if ref is not None:
            x = torch.zeros_like(ref) if x is None else x
            torch.testing.assert_close(x, ref, rtol=1e-4, atol=1e-6 * size)
    return attachment


def assert_soft_loss(model: Any, teacher: Any, inputs: Any, logits: Any, shift: bool) -> None:
    """With soft labels it is the KL divergence of the models' own logits."""
    attach(model, teacher, routing="soft")
    got = model.eval()(**inputs).loss
    labels = inputs["labels"]
    z_s, z_t = (logits(m.eval()) for m in (model, teacher))
    if shift:
        z_s, z_t, labels = z_s[:, :-1], z_t[:, :-1], labels[:, 1:]
    lp_s, lp_t = (z[labels != -100].double().log_softmax(-1) for z in (z_s, z_t))
    expected = (lp_t.exp() * (lp_t - lp_s)).sum(-1).mean()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("BartForConditionalGeneration", BART | DROP),
        ("MBartForConditionalGeneration", BART | DROP),
        ("BlenderbotForConditionalGeneration", BART | DROP),
        ("M2M100ForConditionalGeneration", BART | DROP | {"encoder_layerdrop": 0}),
        ("T5ForConditionalGeneration", T5),
        ("MT5ForConditionalGeneration", T5),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_encoder_decoders_work_from_their_decoder(name: str, config: dict[str, Any]) -> None:
    config = config | ({"decoder_layerdrop": 0} if "M2M" in name else {})
    model, teacher, inputs = make(name, **config), make(name, seed=1, **config), data()
    inputs["input_ids"] = inputs["input_ids"].flip(0)[:, :7]  # another text than the labels
    assert_own_loss(model, teacher, inputs).remove()

    def logits(m: Any) -> Tensor:
        with torch.no_grad():
            return m(**inputs).logits if m is teacher else plain(**inputs).logits

    plain = copy.deepcopy(model).eval()
    assert_soft_loss(model, teacher, inputs, logits, shift=False)


def test_kinds_are_not_mixed() -> None:
    bart, llama = make("BartForConditionalGeneration", **BART), make("LlamaForCausalLM", **SIZE)
    with pytest.raises(HeadError, match=r"student Bart.* is an encoder–decoder and the teacher"):
        attach(bart, llama)
    with pytest.raises(HeadError, match=r"is a decoder and the teacher .* an encoder–decoder"):
        attach(llama, bart)


@pytest.mark.parametrize("name", ["MBartForCausalLM", "BartForCausalLM", "TrOCRForCausalLM"])
def test_the_models_own_alignment(name: str) -> None:
    config = BART | DROP | {"is_decoder": True, "is_encoder_decoder": False}
    if "TrOCR" in name:
        config |= {"decoder_layerdrop": 0.0, "hidden_size": 32}
    model, teacher = make(name, **config), make(name, seed=1, **config)
    attachment = assert_own_loss(model, teacher, data())
    assert attachment.student.own == OwnLoss(shifted=False)
    rows = torch.arange(3)  # by a collator, which shifts: not of this model
    assert torch.equal(model(**data(), loss_rows=rows).loss, model(**data()).loss)


BAMBA: dict[str, Any] = {
    **SIZE, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4,
    "mamba_n_groups": 1, "attention_dropout": 0.0,
}  # fmt: skip


def test_an_extra_loss_of_the_logits_is_refused() -> None:
    teacher = make("LlamaForCausalLM", **SIZE)
    spoilt = make("BambaForCausalLM", **BAMBA, z_loss_coefficient=0.1)
    with pytest.raises(HeadError, match=r"another loss .*config\.z_loss_coefficient=0\.1"):
        attach(spoilt, teacher)
    assert_own_loss(make("BambaForCausalLM", **BAMBA, z_loss_coefficient=0.0), teacher, data())


def test_a_setting_that_changes_later_is_seen() -> None:
    """The class reads it at each call, so the probe is made anew."""

    class Sharp(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            output = super().forward(*args, labels=labels, **kwargs)
            if labels is not None:
                output.loss = output.loss + self.config.z_loss * output.logits.square().mean()
            return output

    model = Sharp(transformers.LlamaConfig(**SIZE, z_loss=0.0))
    attach(model, make("LlamaForCausalLM", **SIZE))
    model(**data())
    model.config.z_loss = 0.1
    with pytest.raises(HeadError, match=r"Sharp computes another loss .*config\.z_loss=0\.1"):
        model(**data())


@pytest.mark.parametrize("when", ["config", "call", "later"])
def test_a_routers_loss_is_kept(when: str) -> None:
    """By the factor that was measured: before attach, at the call, or set in between."""
    before = {"output_router_logits": True} if when == "config" else {}
    model = make("MixtralForCausalLM", **SIZE, **MOE, **before)
    teacher = make("LlamaForCausalLM", **SIZE, seed=1)
    flags = {"output_router_logits": True} if when != "config" else {}
    expected = model(**data(), **flags).loss
    attachment = attach(model, teacher, routing="hard")
    if when == "later":
        model.config.output_router_logits, flags = True, {}
    output = model(**data(), **flags)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    assert attachment.student.own.extras == {"aux_loss": 0.5}
    assert output.aux_loss is not None
    if when == "call":
        without = model(**data()).loss
        assert expected - without > 0.1


def test_a_teachers_own_loss_does_not_matter() -> None:
    spoilt = make("MixtralForCausalLM", **SIZE, **MOE, output_router_logits=True)
    model = make("LlamaForCausalLM", **SIZE, seed=1)
    attach(model, spoilt, routing="soft")
    assert model(**data()).loss.isfinite()
    with torch.no_grad():
        expected = spoilt.eval()(data()["input_ids"]).logits
    linear = ModelTeacher(spoilt)({"input_ids": data()["input_ids"]}, None)
    torch.testing.assert_close(linear.hidden @ linear.weight.T, expected)


LLAMA4: dict[str, Any] = {
    **SIZE, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1, "attention_chunk_size": 16, "pad_token_id": 0,
}  # fmt: skip
REMBERT: dict[str, Any] = {
    **SIZE, "input_embedding_size": 16, "output_embedding_size": 40, "is_decoder": True,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
        ("RemBertForCausalLM", "RemBertConfig", REMBERT),
    ],
    ids=["Llama4", "RemBert"],
)
def test_the_body_is_what_feeds_the_head(name: str, config: str, options: Any) -> None:
    model, other = make(name, config, **options), make("LlamaForCausalLM", **SIZE, seed=1)
    assert_own_loss(model, other, data()).remove()
    with torch.no_grad():
        expected = model.eval()(data()["input_ids"]).logits
    teacher = ModelTeacher(model)({"input_ids": data()["input_ids"]}, None)
    got = torch.nn.functional.linear(teacher.hidden, teacher.weight, teacher.bias)
    torch.testing.assert_close(got, expected)
    attach(other, model, routing="soft")
    assert other(**data()).loss.isfinite()


def test_states_are_cast_as_the_model_casts() -> None:
    config = {**SIZE, "state_size": 4, "residual_in_fp32": True}
    config.pop("head_dim")
    mamba = make("MambaForCausalLM", **config).bfloat16()
    llama = make("LlamaForCausalLM", **SIZE, seed=1).bfloat16()
    expected = mamba(**data()).loss
    attachment = attach(mamba, llama, routing="hard")
    torch.testing.assert_close(mamba(**data()).loss, expected, rtol=1e-2, atol=0)
    attachment.remove()
    attach(llama, mamba, routing="soft")
    assert llama(**data()).loss.isfinite()


class Scaled(transformers.LlamaForCausalLM):
    """Does something to its logits, before its loss."""

    change: Any = staticmethod(lambda z: z)

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, vocab_size=97)
        return output


def masked(z: Tensor) -> Tensor:
    z = z.clone()
    z[..., 5:7] = -torch.inf
    return z


def scaled(change: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = Scaled(transformers.LlamaConfig(**SIZE)).to(dtype)
    model.change = change
    return model


GRIFFIN: dict[str, Any] = {
    **SIZE, "lru_width": 32, "attention_window_size": 16, "conv1d_width": 4,
    "block_types": ["recurrent", "attention"], "attention_dropout": 0.0,
}  # fmt: skip


def test_a_cap_by_any_name_is_measured() -> None:
    teacher = make("LlamaForCausalLM", **SIZE, seed=1)
    griffin = make("RecurrentGemmaForCausalLM", **GRIFFIN, logits_soft_cap=3.0)
    assert_own_loss(griffin, teacher, data())
    head = heads.read(griffin)
    assert (head.logit_scale, head.logit_softcap) == (1.0, 3.0)
    unused = make("LlamaForCausalLM", **SIZE, logit_scale=0.25)  # a setting that nothing reads
    assert_own_loss(unused, teacher, data())
    assert heads.read(unused).logit_scale == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_no_setting_names(dtype: torch.dtype) -> None:
    teacher = make("LlamaForCausalLM", **SIZE, seed=1).to(dtype)
    model = scaled(lambda z: z * 1.025, dtype)
    expected = model(**data()).loss
    attach(model, teacher, routing="hard")
    assert heads.read(model).logit_scale == pytest.approx(1.025, rel=1e-7)
    torch.testing.assert_close(model(**data()).loss, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (masked, "it masks 2 of the 97 columns, the first of which is 5"),
        (lambda z: z + 0.5, "it adds something after its head"),
        (lambda z: z.square(), "it is another function of them"),
        (lambda z: z[..., :90], "it returns logits of shape"),
        (lambda z: z * (z > 1), "it is another function of them"),
    ],
    ids=["mask", "bias", "square", "cut", "gate"],
)
def test_what_is_no_scale_is_named(change: Any, said: str) -> None:
    for pair in ((scaled(change), tiny()), (tiny(), scaled(change))):
        with pytest.raises(HeadError, match=rf"Scaled does more to its logits .*\({said}"):
            attach(*pair)
