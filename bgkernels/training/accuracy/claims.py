"""What is claimed of hybrid distillation, each put to the same seeds."""

from __future__ import annotations

from bgkernels.training.claims import Claim

HYBRIDS = {"threshold": "the threshold-routed hybrid", "confidence": "the confidence-routed hybrid"}
"""The policies that the claims are about; their hard label is the teacher's favourite."""

POINTS = 0.02
"""Of a share: what counts as equally good."""
VARIED = 0.05
"""Nats a choice: what counts as equally varied; four equal words have 1.386."""


def claims_of(policy: str) -> tuple[Claim, ...]:
    """The claims about one hybrid."""
    hybrid, title = f"{policy}+argmax", HYBRIDS[policy].capitalize()

    def right(text: str, other: str, margin: float = 0.0) -> Claim:
        return Claim(f"{title} {text}", "right", hybrid, other, larger=True, margin=margin)

    return (
        right("is right more often than hard labels", "hard"),
        right("is right more often than soft labels", "soft"),
        right("is right more often than soft labels at T = 2", "soft-t2"),
        right("is right more often than a static mix", "static+argmax"),
        right("is right more often than its reverse", f"{policy}+reverse+argmax"),
        right("is right more often than with the data's label", policy),
        right("is right as often as on-policy training, within 2 points", "on-policy", POINTS),
        Claim(
            f"{title} is right more often than soft labels when greedy",
            "greedy", hybrid, "soft", larger=True,
        ),
        Claim(
            f"{title} passes as many problems in eight tries as soft labels, within 2 points",
            "passed", hybrid, "soft", larger=True, margin=POINTS,
        ),
        Claim(f"{title} errs less at bridges than soft labels", "wrong_bridge", hybrid, "soft"),
        Claim(f"{title} errs less at bridges than hard labels", "wrong_bridge", hybrid, "hard"),
        Claim(f"{title} errs less in gardens than hard labels", "wrong_garden", hybrid, "hard"),
        Claim(
            f"{title} keeps gardens as varied as soft labels, within {VARIED} nats",
            "wording", hybrid, "soft", larger=True, margin=VARIED,
        ),
        Claim(f"{title} has less exposure bias than soft labels", "bias_all", hybrid, "soft"),
        Claim(f"{title} has less exposure bias than hard labels", "bias_all", hybrid, "hard"),
    )  # fmt: skip


CLAIMS = (
    Claim(
        "Soft labels are right more often than hard labels", "right", "soft", "hard", larger=True
    ),
    Claim("Soft labels are right more often at T = 1 than at 2", "right", "soft", "soft-t2", True),
    Claim("On-policy is right more often than soft labels", "right", "on-policy", "soft", True),
    *(claim for policy in HYBRIDS for claim in claims_of(policy)),
)
"""Those whose methods were not trained in a setting are not judged there."""
