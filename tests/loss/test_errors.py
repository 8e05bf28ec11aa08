"""Bad input: each message names the argument, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import bgkernels as bg
from bgkernels.backends import BACKENDS, select
from bgkernels.streaming import planner

N, D, D_T, V = 6, 8, 5, 40


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments that fit each other, with changes."""
    fitting = {
        "input": torch.randn(N, D),
        "linear_weight": torch.randn(V, D),
        "teacher": bg.LinearTeacher(torch.randn(N, D_T), torch.randn(V, D_T)),
        "target": torch.randint(V, (N,)),
    }
    return fitting | changes


def teacher(hidden: Any = None, weight: Any = None, **more: Any) -> bg.LinearTeacher:
    hidden = torch.randn(N, D_T) if hidden is None else hidden
    return bg.LinearTeacher(hidden, torch.randn(V, D_T) if weight is None else weight, **more)


def labels(*values: int) -> torch.Tensor:
    return torch.tensor([*values, *[0] * (N - len(values))])


def weights(hard: Any, soft: Any) -> Any:
    """A policy that looks at one token at a time and returns what it is told."""
    return bg.routing.Policy("told", lambda s: (hard, soft))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input kind": ({"input": [1.0]}, TypeError, "`input` must be a torch.Tensor; got list"),
    "input dtype": (
        {"input": torch.ones(N, D, dtype=torch.int64)},
        TypeError,
        "`input` must be floating point; got torch.int64",
    ),
    "input sparse": (
        {"input": torch.eye(N, D).to_sparse()},
        TypeError,
        "`input` must be a dense tensor",
    ),
    "weight rank": (
        {"linear_weight": torch.ones(D)},
        ValueError,
        "student: .*(vocab, hidden); got (6, 8) and (8,)",
    ),
    "weight width": (
        {"linear_weight": torch.ones(V, D + 1)},
        ValueError,
        "(vocab, hidden) = (40, 8) to fit hidden states (6, 8); got (40, 9)",
    ),
    "bias shape": (
        {"linear_bias": torch.ones(V + 1)},
        ValueError,
        "`student bias` must be (vocab,) = (40,); got (41,)",
    ),
    "mixed dtypes": (
        {"input": torch.randn(N, D).bfloat16()},
        TypeError,
        "must share a dtype; got torch.bfloat16, torch.float32. .*autocast",
    ),
    "weight device": (
        {"linear_weight": torch.ones(V, D, device="meta")},
        ValueError,
        "`linear_weight` must be on the input's device cpu; got meta",
    ),
    "teacher kind": (
        {"teacher": torch.randn(N, V)},
        TypeError,
        "TopKTeacher, MatchedTeacher or MixtureTeacher; got Tensor; wrap logits",
    ),
    "teacher none": (
        {"teacher": None},
        ValueError,
        "`teacher` is None, but the loss or the label reads it",
    ),
    "teacher label none": (
        {"teacher": None, "routing": "hard", "target": "teacher_argmax"},
        ValueError,
        "`teacher` is None",
    ),
    "teacher grad": (
        {"teacher": teacher(torch.randn(N, D_T, requires_grad=True))},
        ValueError,
        "`teacher.hidden` requires grad, .*`hidden.detach()`",
    ),
    "teacher weight grad": (
        {"teacher": teacher(weight=torch.randn(V, D_T, requires_grad=True))},
        ValueError,
        "`teacher.weight` requires grad",
    ),
    "teacher rows": (
        {"teacher": teacher(torch.randn(N + 1, D_T))},
        ValueError,
        "`teacher.hidden` must have the input's leading shape (6,); got (7, 5)",
    ),
    "teacher width": (
        {"teacher": teacher(weight=torch.randn(V, D_T + 1))},
        ValueError,
        "teacher: the weight must be (vocab, hidden) = (40, 5)",
    ),
    "teacher device": (
        {"teacher": teacher(torch.ones(N, D_T, device="meta"))},
        ValueError,
        "`teacher.hidden` must be on the input's device",
    ),
    "teacher cap": (
        {"teacher": teacher(logit_softcap=0.0)},
        ValueError,
        "`teacher.logit_softcap` must be finite and lie in (0, inf]; got 0.0",
    ),
    "target word": (
        {"target": "argmax"},
        ValueError,
        "`target` must be one of 'teacher_argmax', 'teacher_sample'; got 'argmax'",
    ),
    "target dtype": (
        {"target": torch.rand(N)},
        TypeError,
        "`target` must hold integer labels .*; got torch.float32",
    ),
    "target shape": (
        {"target": torch.zeros(N, 2, dtype=torch.int64)},
        ValueError,
        "`target` must be the input's leading shape = (6,); got (6, 2)",
    ),
    "target high": (
        {"target": labels(V)},
        ValueError,
        "`target` labels must lie in [0, 40) or be ignore_index=-100; got 40 (1 of 6 out of range)",
    ),
    "target low": ({"target": labels(-1, -2)}, ValueError, "got -1 (2 of 6 out of range)"),
    "target beyond vocab_size": (
        {"target": labels(30), "vocab_size": 30},
        ValueError,
        "must lie in [0, 30)",
    ),
    "temperature zero": (
        {"temperature": 0.0},
        ValueError,
        "`temperature` must be finite and lie in (0, inf]; got 0.0",
    ),
    "temperature nan": ({"temperature": float("nan")}, ValueError, "`temperature` must be finite"),
    "temperature kind": (
        {"temperature": "warm"},
        TypeError,
        "`temperature` must be a number; got str",
    ),
    "scale": ({"logit_scale": float("inf")}, ValueError, "`logit_scale` must be finite"),
    "softcap": (
        {"logit_softcap": -1.0},
        ValueError,
        "`logit_softcap` must be finite and lie in (0, inf]; got -1.0",
    ),
    "smoothing": (
        {"label_smoothing": 1.5},
        ValueError,
        "`label_smoothing` must be finite and lie in [0, 1]; got 1.5",
    ),
    "z_loss": (
        {"z_loss": -1.0},
        ValueError,
        "`z_loss` must be finite and lie in [0, inf]; got -1.0",
    ),
    "reduction": (
        {"reduction": "avg"},
        ValueError,
        "`reduction` must be one of 'mean', 'sum', 'none'; got 'avg'",
    ),
    "mode": (
        {"mode": "fast"},
        ValueError,
        "`mode` must be one of 'auto', 'fused', 'recompute'; got 'fast'",
    ),
    "fused none": (
        {"mode": "fused", "reduction": "none"},
        ValueError,
        "mode='fused' cannot serve reduction='none'.*mode='recompute'",
    ),
    "fused batchwide": (
        {"mode": "fused", "routing": "top_entropy"},
        ValueError,
        "mode='fused' cannot serve the policy 'top_entropy'",
    ),
    "ignore_index": (
        {"ignore_index": 1.5},
        TypeError,
        "`ignore_index` must be an integer; got float 1.5",
    ),
    "vocab_size": (
        {"vocab_size": V + 1},
        ValueError,
        "`vocab_size` must lie in [1, 40], the columns that all models have; got 41",
    ),
    "vocab_size low": ({"vocab_size": 0}, ValueError, "`vocab_size` must be at least 1; got 0"),
    "budget": ({"memory_budget": 0}, ValueError, "`memory_budget` must be at least 1; got 0"),
    "budget small": (
        {"memory_budget": 100},
        ValueError,
        "`memory_budget` must be at least \\d+ bytes for these shapes; got 100",
    ),
    "backend": (
        {"backend": "cublas"},
        ValueError,
        "`backend` must be 'auto' or one of .*; got 'cublas'",
    ),
    "seed": ({"seed": 0.5}, TypeError, "`seed` must be an integer"),
    "weight shape": (
        {"token_weight": torch.ones(N + 1)},
        ValueError,
        "`token_weight` must be the input's leading shape = (6,); got (7,)",
    ),
    "num_items sum": (
        {"num_items": 3, "reduction": "sum"},
        ValueError,
        "`num_items` is the divisor of reduction='mean'; got reduction='sum'",
    ),
    "num_items zero": (
        {"num_items": 0},
        ValueError,
        "`num_items` must be finite and lie in (0, inf]; got 0",
    ),
    "num_items shape": (
        {"num_items": torch.ones(2)},
        ValueError,
        "`num_items` must be a number or a scalar tensor = (); got (2,)",
    ),
    "divergence": (
        {"divergence": "kl"},
        ValueError,
        "`divergence` must be one of adaptive_kl, .*; got 'kl'",
    ),
    "divergence kind": (
        {"divergence": 3},
        TypeError,
        "`divergence` must be a name or a Divergence; got int",
    ),
    "routing": (
        {"routing": "random"},
        ValueError,
        "`routing` must be one of additive, .*; got 'random'",
    ),
    "routing kind": (
        {"routing": 3},
        TypeError,
        "`routing` must be a name, a Policy or a callable; got int",
    ),
    "policy negative": (
        {"routing": weights(-1.0, 1.0)},
        ValueError,
        "not negative; the hard weight is -1.0",
    ),
    "policy negative rows": (
        {"routing": weights(1.0, torch.full((N,), -0.5))},
        ValueError,
        "not negative; the soft weight falls to -0.5",
    ),
    "policy shape": (
        {"routing": weights(torch.ones(N, 1), 1.0)},
        ValueError,
        "weights of shape (6,); the hard weight is (6, 1)",
    ),
    "policy kind": (
        {"routing": weights("all", 1.0)},
        TypeError,
        "tensors or numbers; the hard weight is a str",
    ),
    "schedule": (
        {"routing": bg.routing.curriculum(lambda step: 2.0)},
        ValueError,
        "`schedule` must give a number in [0, 1]; got 2.0 at step 0",
    ),
}


def pattern(text: str) -> str:
    """A message as a regular expression: literal but for ``.*`` and ``\\d+``."""
    return re.escape(text).replace(re.escape(".*"), ".*").replace(re.escape("\\d+"), r"\d+")


@pytest.mark.parametrize("name", BAD)
def test_message(name: str) -> None:
    changes, error, text = BAD[name]
    with pytest.raises(error, match=pattern(text)):
        bg.linear_hybrid_distillation(**arguments(**changes))


FACTORIES = [
    (lambda: bg.divergences.generalized_jsd(1.5), "`beta` must lie in [0, 1]; got 1.5"),
    (lambda: bg.divergences.skew_forward_kl(1.0), "`lam` must lie in [0, 1); got 1.0"),
    (lambda: bg.divergences.skew_reverse_kl(-0.1), "`lam` must lie in [0, 1); got -0.1"),
    (lambda: bg.divergences.renyi(0.0), "`alpha` must be positive and finite; got 0.0"),
    (lambda: bg.routing.static(1.5), "`w` must lie in [0, 1]; got 1.5"),
    (lambda: bg.routing.additive(hard=-1.0), "`hard` must not be negative; got -1.0"),
    (lambda: bg.routing.confidence("mean"), "`kind` must be 'label' or 'max'; got 'mean'"),
    (lambda: bg.routing.entropy("nats"), "`kind` must be 'power' or 'shannon'; got 'nats'"),
    (lambda: bg.routing.entropy(gamma=1.0), "`gamma` must lie in (0, 1); got 1.0"),
    (lambda: bg.routing.threshold(tau=2.0), "`tau` must lie in [0, 1]; got 2.0"),
    (lambda: bg.routing.top_entropy(-0.1), "`fraction` must lie in [0, 1]; got -0.1"),
    (lambda: bg.routing.weighted_soft(-1.0), "`w` must not be negative; got -1.0"),
    (lambda: bg.routing.risk_guided(gamma=2.0), "`gamma` must lie in [0, 1]; got 2.0"),
]


@pytest.mark.parametrize("soft", [-1e-7, torch.full((N,), -1e-7)], ids=["number", "rows"])
def test_a_weight_may_round_below_zero(soft: Any) -> None:
    loss = bg.linear_hybrid_distillation(**arguments(routing=weights(1.0, soft)))
    assert isinstance(loss, torch.Tensor) and loss.isfinite()


@pytest.mark.parametrize(("make", "text"), FACTORIES, ids=[t for _, t in FACTORIES])
def test_factories_check_their_parameters(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


def test_a_module_refuses_unknown_options_when_it_is_built() -> None:
    with pytest.raises(TypeError, match="tempreature"):
        bg.LinearHybridDistillationLoss(tempreature=2.0)
    with pytest.raises(ValueError, match="`temperature` must be finite"):
        bg.HybridDistillationLoss(temperature=-1.0)


def test_a_taken_name_is_refused() -> None:
    def forward_kl() -> bg.divergences.Divergence:
        return bg.divergences.get("forward_kl")

    with pytest.raises(ValueError, match="divergence 'forward_kl' is registered already"):
        bg.divergences.register(forward_kl)


def test_an_extra_that_was_not_asked_for_is_named() -> None:
    a = arguments()
    stats = bg.linear_row_stats(a["input"], a["linear_weight"], a["teacher"], a["target"])
    with pytest.raises(KeyError, match="was not computed: name it in `extras`"):
        stats.mixture(0.5)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_named_backend_says_why_it_cannot_serve(name: str) -> None:
    device = torch.device("cpu")
    with pytest.raises(NotImplementedError, match=f"backend '{name}' cannot serve this call: .*"):
        select(name, device, (torch.int64,))


def test_the_least_budget_is_enough() -> None:
    a = arguments(memory_budget=100)
    with pytest.raises(ValueError, match="must be at least") as caught:
        bg.linear_hybrid_distillation(**a)
    found = re.search(r"at least (\d+) bytes", str(caught.value))
    assert found
    bg.linear_hybrid_distillation(**(a | {"memory_budget": int(found.group(1))}))
    assert planner.DEFAULT_BUDGET["cpu"] == 3 * 2**29
