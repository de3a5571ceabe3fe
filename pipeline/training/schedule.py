"""The learning rate of each step."""

from __future__ import annotations

import math

from pipeline.settings import TrainingSettings

__all__ = ["learning_rate"]


def learning_rate(settings: TrainingSettings, step: int, steps_per_epoch: int, progress: float | None = None) -> float:
    r"""The learning rate of a step.

    `steps` halves it at each milestone, counted in epochs; `cosine` rises linearly over the first share :math:`w` of all steps
    and then follows :math:`\frac{1}{2} (1 + \cos(\pi (p - w) / (1 - w)))` with :math:`p` the share of all steps done.

    Arguments:
        settings: Schedule and highest learning rate.
        step: Steps done before.
        steps_per_epoch: Steps in an epoch.
        progress: Share of the training done, if time and not epochs sets its end.

    Example:
        >>> settings = TrainingSettings(epochs=10, learning_rate=0.4, schedule="steps", milestones=(2, 5))
        >>> [learning_rate(settings, step, 1) for step in (0, 2, 5)]
        [0.4, 0.2, 0.1]
    """
    if settings.schedule == "steps":
        return float(settings.learning_rate * 0.5 ** sum(step >= m * steps_per_epoch for m in settings.milestones))
    if settings.schedule == "cosine":
        total = settings.epochs * steps_per_epoch
        done = max(step / total, progress or 0.0)
        if done < settings.warm_up:
            # Not from zero, and never above the highest rate, even with fewer than 1 / w steps.
            return min(settings.learning_rate * max(done, 1 / total) / settings.warm_up, settings.learning_rate)
        return (
            settings.learning_rate
            * 0.5
            * (1 + math.cos(math.pi * min((done - settings.warm_up) / (1 - settings.warm_up), 1.0)))
        )
    return settings.learning_rate
