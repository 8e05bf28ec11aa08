"""Teacher-forced and free-running loss, exposure bias and risk, by dynamic programming in fp64.

With ``loss(s) = KL(π_T(·|s) ‖ π_θ(·|s))``, and ``d_T``, ``d_θ`` the probabilities of a state in
texts of the teacher and of the student,

    L_T = Σ d_T loss,   L_θ = Σ d_θ loss,   EB = L_θ - L_T.

``Q(s, a)`` is the loss to come if ``a`` is said in ``s`` and the teacher goes on, and
``κ(a|s) = Q(s, a) - Σ_b π_T(b|s) Q(s, b)`` the leave-one-out risk of that token: what a single slip
costs. By the performance difference lemma (Kakade and Langford 2002)

    EB = Σ_s d_θ(s) Σ_a (π_θ - π_T)(a|s) κ(a|s),

a sum over states, which says where the exposure bias comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels.training.study.world import CONDITIONS, World


@dataclass(frozen=True)
class Exact:
    """All that is known of some students, in nats a text where not said otherwise.

    Args:
        world: the language.
        student: ``(students, steps, last, vocab)`` probabilities of the next token.
        loss: ``(students, steps, CONDITIONS, last)`` of each state.
        taught, own: ``(students, steps, CONDITIONS, last)`` probabilities of a state in texts of
            the teacher (the same for each student) and in the student's own.
        risk: ``(students, steps, CONDITIONS, vocab)``, κ of each token; it does not depend on the
            last one.
    """

    world: World
    student: Tensor
    loss: Tensor
    taught: Tensor
    own: Tensor
    risk: Tensor

    @property
    def taught_loss(self) -> Tensor:
        """``(students, steps)`` loss on the teacher's texts; over a text, KL of whole texts."""
        return (self.taught * self.loss).sum((-2, -1))

    @property
    def own_loss(self) -> Tensor:
        """``(students, steps)`` loss on the student's own texts."""
        return (self.own * self.loss).sum((-2, -1))

    @property
    def bias(self) -> Tensor:
        """``(students, steps)`` what a step's choices add to EB, by the identity."""
        wrong = self.own.sum(-1)[..., None] * -self.world.teacher.exp()
        wrong = wrong + torch.einsum("stcl,stla->stca", self.own, self.student)
        return (wrong * self.risk).sum((-2, -1))

    @property
    def broken(self) -> Tensor:
        """``(students,)`` probability that the student's text is broken before its last token."""
        return self.own[:, -1, CONDITIONS // 2 :].sum((-2, -1))

    @property
    def distance(self) -> Tensor:
        """``(students,)`` total variation between states of both kinds of text, mean of steps."""
        return 0.5 * (self.own - self.taught).abs().sum((-2, -1)).mean(-1)

    def weighted_error(self, risk: Tensor) -> Tensor:
        """``(students, steps)`` of ``Σ_s d_T(s) Σ_a |κ(a|s)|·|π_θ - π_T|(a|s)``.

        Args:
            risk: κ of a reference, so that students are weighted alike: shaped like :attr:`risk`.
        """
        steps = []
        for t in range(self.world.steps):
            gap = self.student[:, t, None] - self.world.teacher[t].exp()[:, None]
            weighed = gap.abs() * risk[:, t, :, None].abs()
            steps.append((weighed.sum(-1) * self.taught[:, t]).sum((-2, -1)))
        return torch.stack(steps, dim=-1)


def examine(world: World, logits: Tensor) -> Exact:
    """Evaluate students without sampling.

    Args:
        world: the language.
        logits: ``(students, steps, last, vocab)``.
    """
    log_student = logits.double().log_softmax(-1)
    student, teacher = log_student.exp(), world.teacher.exp()
    own_entropy = (teacher * world.teacher).sum(-1)[..., None]
    loss = own_entropy - torch.einsum("tca,stla->stcl", teacher, log_student)
    heard = teacher[:, :, None].expand(-1, -1, world.vocab, -1)
    return Exact(
        world,
        student,
        loss,
        _states(world, heard[None].expand(len(logits), -1, -1, -1, -1)),
        _states(world, student[:, :, None].expand(-1, -1, CONDITIONS, -1, -1)),
        _risk(world, loss),
    )


def _states(world: World, speaker: Tensor) -> Tensor:
    """Probabilities of every state.

    Args:
        world: the language.
        speaker: ``(students, steps, CONDITIONS, last, vocab)`` probabilities of the next token.
    """
    students = len(speaker)
    now = speaker.new_zeros(students, CONDITIONS, world.vocab)
    now[:, 0, 0] = 1.0
    steps = []
    for t in range(world.steps):
        steps.append(now)
        flow = torch.einsum("scl,scla->sca", now, speaker[:, t]).flatten(1)
        arrival = (world.following[t] * world.vocab + world.kept[t]).flatten()
        now = torch.zeros_like(flow).index_add(1, arrival, flow).view_as(now)
    return torch.stack(steps, dim=1)


def _risk(world: World, loss: Tensor) -> Tensor:
    """κ from the last step to the first."""
    to_come = torch.zeros_like(loss[:, 0])
    steps = []
    for t in reversed(range(world.steps)):
        forced = to_come[:, world.following[t], world.kept[t]]  # Q: (students, CONDITIONS, vocab)
        usual = (world.teacher[t].exp() * forced).sum(-1, keepdim=True)
        steps.append(forced - usual)
        to_come = loss[:, t] + usual
    return torch.stack(steps[::-1], dim=1)
