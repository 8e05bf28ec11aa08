"""What the theory of bridges and gardens says of the study, each put to the same seeds."""

from __future__ import annotations

from bgkernels.training.claims import Claim

HYBRID = "confidence"
"""The hybrid that the claims are about: the soft label's weight is ``1 - max π_T``."""

CLAIMS = (
    Claim("At bridges, hard errs less than soft", "error_bridge", "hard", "soft"),
    Claim("In gardens, soft errs less than hard", "error_garden", "soft", "hard"),
    Claim("On the teacher's texts, soft is closer than the hybrid", "taught_loss", "soft", HYBRID),
    Claim("On the teacher's texts, the hybrid is closer than hard", "taught_loss", HYBRID, "hard"),
    Claim("The hybrid has less exposure bias than soft", "bias", HYBRID, "soft"),
    Claim("The hybrid has less exposure bias than hard", "bias", HYBRID, "hard"),
    Claim("Free-running, the hybrid is closer than soft", "own_loss", HYBRID, "soft"),
    Claim("Free-running, the hybrid is closer than hard", "own_loss", HYBRID, "hard"),
    Claim("Free-running, the hybrid is closer than a static mix", "own_loss", HYBRID, "static"),
    Claim("Free-running, the hybrid is closer than its reverse", "own_loss", HYBRID, "reverse"),
    Claim("The hybrid breaks fewer texts than soft", "broken", HYBRID, "soft"),
    Claim("Free-running, on-policy is closer than the hybrid", "own_loss", "on-policy", HYBRID),
    Claim("On-policy breaks fewer texts than the hybrid", "broken", "on-policy", HYBRID),
)
