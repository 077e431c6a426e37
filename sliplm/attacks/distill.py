"""Learn from the protected model's own answers.

Threat model: the thief queries the served model, sees next-token distributions (more than an API gives), and trains a
student on them: from the edge part, and from scratch. Distillation works on any model with an API; only the gap
between the two is what the edge part is worth. Source: Hinton et al., arXiv 1503.02531; Jagielski et al., arXiv
1909.01838. Oracles: any.
"""

from __future__ import annotations

from typing import Any

import torch

from sliplm.attacks.training import Loss


def answers_of(teacher: Any) -> Loss:
    """Mean cross entropy against the distributions of `teacher`, which has the student's vocabulary."""

    def loss(student: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits.float().softmax(-1)
        answer = student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        return -(target * answer).sum(-1).mean()

    return loss
