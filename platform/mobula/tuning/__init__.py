"""Searches over a method's declared space with Ray Tune: schedulers, searchers, a table, figures, resume.

A study is a folder: study.yaml (what was asked for), tune/ (Tune's own: trials, checkpoints), state/ (whole states of scheduler,
searcher and trials, from which a killed study goes on), trials.json and trials.csv, parallel_coordinates.png, best.yaml (which
`mobula train --config` takes) and study.json.
"""

from mobula.tuning.spaces import default_metric, describe, gridded, parse_space
from mobula.tuning.study import resume, tune
from mobula.tuning.trials import Study, Trial
from mobula.tuning.watching import trials_table

__all__ = [
    "Study",
    "Trial",
    "default_metric",
    "describe",
    "gridded",
    "parse_space",
    "resume",
    "trials_table",
    "tune",
]
