"""The methods by name: each is a small configuration of one loss and of the text it is read on.

A hybrid weighs the hard label (the next token of the text) and the soft one (the teacher's
distribution) token by token; a baseline changes the divergence; an on-policy method changes the
text. Add a method with one entry of :data:`METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import bgkernels as bg
from bgkernels.training.errors import OptionError

Schedule = Callable[[float], float]
"""Progress of the run, in [0, 1], to a value."""

Role = Literal["teacher", "student"]
"""One of the two models of a run."""

DATA, ARGMAX = "data", "teacher_argmax"


@dataclass(frozen=True)
class Method:
    """What tells one way to distil from another.

    Args:
        title: for tables.
        routing: makes the policy; a curriculum's ``step`` is set to the progress, in millionths.
        divergence: makes the divergence of the soft label; None: as configured for all.
        target: hard label: ``"data"``, the text's token, or the library's name of another rule.
        temperature: of the divergence: a number, a schedule, or None: as configured for all.
        written_by_student: share of the steps whose text the student continues after its beginning
            (GKD's λ).
        written_by_teacher: the teacher continues every text (sequence-level distillation).
        teachers: how many are imitated; the second is the one that the run names.
    """

    title: str
    routing: Callable[[], bg.routing.Policy] = bg.routing.soft
    divergence: Callable[[], bg.divergences.Divergence] | None = None
    target: str = DATA
    temperature: float | Schedule | None = None
    written_by_student: float = 0.0
    written_by_teacher: bool = False
    teachers: int = 1

    def divergence_or(self, default: str) -> bg.divergences.Divergence:
        """The method's own divergence, or the one of this name."""
        return self.divergence() if self.divergence else bg.divergences.get(default)

    def temperature_at(self, progress: float, default: float = 1.0) -> float:
        """The temperature of the divergence at some point of the run."""
        if self.temperature is None:
            return default
        return self.temperature(progress) if callable(self.temperature) else self.temperature

    def written_by(self, role: Role) -> bool:
        """Whether one of the models writes text that is learnt from."""
        return self.written_by_teacher if role == "teacher" else self.written_by_student > 0

    def on_policy(self, step: int) -> bool:
        """Whether the student writes the text of a step: its share of them, spread evenly.

        Example:
            >>> [METHODS["gkd"].on_policy(step) for step in range(4)]
            [False, True, False, True]
        """
        return int((step + 1) * self.written_by_student) > int(step * self.written_by_student)


CURRICULUM_SCALE = 1_000_000
"""Steps of a curriculum's schedule, whatever the length of the run."""


def _rising(share: float = 0.2, top: float = 0.5) -> Callable[[int], float]:
    """From 0 to ``top`` over the first ``share`` of the run, then constant."""
    return lambda step: top * min(1.0, step / (share * CURRICULUM_SCALE))


def _hybrid(title: str, routing: Callable[[], bg.routing.Policy]) -> Method:
    return Method(title, routing)


def _divergence(title: str, divergence: Callable[[], bg.divergences.Divergence]) -> Method:
    return Method(title, divergence=divergence)


_r, _d = bg.routing, bg.divergences

METHODS: dict[str, Method] = {
    "hard": Method("hard-only", _r.hard),
    "argmax": Method("hard-only, teacher's argmax", _r.hard, target=ARGMAX),
    "sequence": Method("sequence-level", _r.hard, written_by_teacher=True),
    "soft": Method("soft-only"),
    "soft-t2": Method("soft-only, T = 2", temperature=2.0),
    "cooling": Method("soft-only, T 4 → 1", temperature=lambda progress: 4 - 3 * progress),
    "warming": Method("soft-only, T 1 → 4", temperature=lambda progress: 1 + 3 * progress),
    "static": _hybrid("static mix", _r.static),
    "confidence": _hybrid("confidence-routed", lambda: _r.confidence("max")),
    "entropy": _hybrid("entropy-routed", _r.entropy),
    "shannon": _hybrid("Shannon-routed", lambda: _r.entropy("shannon")),
    "threshold": _hybrid("threshold-routed", lambda: _r.threshold(0.25)),
    "curriculum": _hybrid("curriculum", lambda: _r.curriculum(_rising())),
    "weighted-soft": _hybrid("weighted soft labels", _r.weighted_soft),
    "risk-guided": _hybrid("risk-guided", _r.risk_guided),
    "reverse-entropy": _hybrid("entropy, reversed", lambda: _r.reverse("entropy")),
    "reverse-confidence": _hybrid(
        "confidence, reversed", lambda: _r.reverse(_r.confidence("max"))
    ),
    "reverse-kl": _divergence("reverse KL", _d.reverse_kl),
    "jsd": _divergence("Jensen–Shannon", _d.generalized_jsd),
    "total-variation": _divergence("total variation", _d.total_variation),
    "adaptive-kl": _divergence("adaptive KL", _d.adaptive_kl),
    "skew-kl": _divergence("skew KL", _d.skew_forward_kl),
    "skew-reverse-kl": _divergence("skew reverse KL", _d.skew_reverse_kl),
    "alpha-beta": _divergence("alpha-beta", _d.alpha_beta),
    "on-policy": Method("on-policy soft", written_by_student=1.0),
    "gkd": Method("GKD, λ = ½", divergence=_d.generalized_jsd, written_by_student=0.5),
    "minillm": Method(
        "on-policy reverse KL", divergence=_d.reverse_kl, written_by_student=1.0
    ),
    "two-teachers": Method("soft, two teachers", teachers=2),
}  # fmt: skip
"""By the name that the command line knows."""


VARIANTS: dict[str, Callable[[Method], Method]] = {
    "argmax": lambda m: replace(m, title=f"{m.title}, teacher's favourite", target=ARGMAX),
    "reverse": lambda m: replace(
        m, title=f"{m.title}, reversed", routing=lambda: _r.reverse(m.routing())
    ),
    "t2": lambda m: replace(m, title=f"{m.title}, T = 2", temperature=2.0),
}
"""What a name may add to that of a method: another hard label, the opposite, a temperature."""


def find(name: str) -> Method:
    """The method of a name, or a variant of it: ``method+variant``.

    Raises:
        OptionError: there is none; the message lists those there are.

    Example:
        >>> find("soft").title, find("static+argmax").title
        ('soft-only', "static mix, teacher's favourite")
    """
    base, *variants = name.split("+")
    if base not in METHODS or not set(variants) <= set(VARIANTS):
        raise OptionError(
            f"a method must be one of {', '.join(METHODS)}, and may be followed by "
            f"{', '.join(f'+{variant}' for variant in VARIANTS)}; got {name!r}"
        )
    method = METHODS[base]
    for variant in variants:
        method = VARIANTS[variant](method)
    return method


def advance(policy: bg.routing.Policy, progress: float) -> None:
    """Tell a curriculum how far the run is; other policies do not mind."""
    if isinstance(policy, bg.routing.Curriculum):
        policy.step = round(progress * CURRICULUM_SCALE)
