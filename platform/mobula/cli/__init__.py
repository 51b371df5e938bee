"""The command line.  Exit codes: 0 done, 1 the run failed, 2 the user's mistake (one line on standard error).

Ray and torch are imported only where they are needed: `--help`, `methods` and `envs` answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import typer

from mobula.cli import about, cluster, experiments, policies, train, tune
from mobula.errors import MobulaError
from mobula.serving.commands import app as serve_app

app = typer.Typer(
    name="mobula",
    help="Published learning methods as RLlib algorithms: train, evaluate and reproduce them, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

EXTRA: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
PASS_THROUGH: dict[str, Any] = {**EXTRA, "help_option_names": []}

app.command()(about.methods)
app.command()(about.envs)
app.command()(about.cite)
app.command(context_settings=PASS_THROUGH)(train.train)
app.command()(train.track)
app.command(context_settings=EXTRA)(tune.tune)
app.command(context_settings=PASS_THROUGH)(experiments.data)
app.command(context_settings=EXTRA)(cluster.submit)
app.command(context_settings=PASS_THROUGH)(cluster.dashboards)
app.command()(policies.evaluate)
app.command()(policies.export)
app.command()(experiments.reproduce)
app.command()(about.doctor)
app.add_typer(serve_app, name="serve")


def main() -> None:
    """Entry point: one line and exit code 2 for what the user can mend."""
    # Ray takes seconds to say things that no user of a run needs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")
    for name in (
        "ray.rllib.algorithms.algorithm_config",
        "ray._common.deprecation",
        "torch.onnx._internal.exporter._registration",
    ):
        # Advice about the libraries' own migrations and about packages that nothing here needs.
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except MobulaError as error:
        print(f"mobula: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mobula: interrupted; the run folder keeps what was done", file=sys.stderr)
        sys.exit(1)
