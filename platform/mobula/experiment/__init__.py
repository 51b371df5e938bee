"""Experiments that can fail: tasks, arms, claims with intervals, figures, the ledger."""

from mobula.experiment.core import (
    Arm,
    Claim,
    Experiment,
    Task,
    above,
    at_least,
    below,
    check,
    fraction_at_least,
    mean_of,
    paired_difference,
    ratio_of_means,
    returns,
    windows_of_reward,
    within,
)
from mobula.experiment.figures import learning_curves
from mobula.experiment.runner import reproduce
from mobula.experiment.statistics import Estimate

__all__ = [
    "Arm",
    "Claim",
    "Estimate",
    "Experiment",
    "Task",
    "above",
    "at_least",
    "below",
    "check",
    "fraction_at_least",
    "learning_curves",
    "mean_of",
    "paired_difference",
    "ratio_of_means",
    "reproduce",
    "returns",
    "windows_of_reward",
    "within",
]
