"""Studies: what is asked for, run by Ray Tune, gone on with after a kill."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mobula import registry
from mobula.errors import ArtifactError, ConfigError, nearest
from mobula.files import write_text
from mobula.joining import start_ray
from mobula.results import STOP_NAMES
from mobula.running import _quiet, default_stop, new_run_folder
from mobula.settings import dump_config
from mobula.tuning.report import report
from mobula.tuning.spaces import default_metric, describe, gridded, parse_space
from mobula.tuning.state import STATE_FILES, kept_state
from mobula.tuning.trials import Study, trial_name, trial_of
from mobula.tuning.watching import Watch

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

SCHEDULERS = ("asha", "pbt", "median", "none")
SEARCHES = ("random", "optuna", "grid")


def tune(
    config: AlgorithmConfig,
    *,
    num_samples: int = 16,
    space: Mapping[str, Any] | None = None,
    only: Sequence[str] | None = None,
    metric: str | None = None,
    mode: str | None = None,
    scheduler: str = "asha",
    search: str = "random",
    stop: Mapping[str, float] | None = None,
    concurrent: int | None = None,
    cpus_per_trial: float | None = None,
    confirm: int = 5,
    out: str | Path = "runs",
    track: bool = True,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    address: str | None = None,
    progress: bool = False,
    verbose: bool = False,
) -> Study:
    """Searches for the best setting of `config`'s method.

    space      {knob: Tune domain} over and above the declared ones; `only`: the knobs to search over (default: all)
    metric     full name of a metric; default: the method's headline, return or reward a step
    scheduler  asha (stops the worst early), pbt (copies the best and perturbs), median, none
    search     random, optuna (TPE), grid (every combination of the listed values; num_samples is then not used)
    stop       where a whole trial ends, as for `train`
    confirm    seeds on which the best setting is then run beside the default one; 0: none

    Raises ConfigError for what does not fit together.
    """
    about = _plan(config, space, only, metric, mode, scheduler, search, stop, num_samples, confirm)
    path = new_run_folder(out, f"tune-{about['method']}", about["env"], config.seed)
    about |= {
        "concurrent": concurrent,
        "cpus_per_trial": cpus_per_trial,
        "track": track,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
        "out": str(Path(out)),
    }
    write_text(path / "study.yaml", yaml.safe_dump(about, sort_keys=False))
    write_text(path / "config.yaml", dump_config(config))
    return _run(path, about, config, address=address, progress=progress, verbose=verbose, restore=False)


def resume(
    path: str | Path, *, address: str | None = None, progress: bool = False, verbose: bool = False
) -> Study:
    """Goes on with the study in the folder `path` where it was: finished trials stay, unfinished ones go on from their last
    checkpoint.  Tune's files are pickles: resume only your own studies.
    """
    from mobula.settings import load_yaml, make_config

    path = Path(path)
    if not (path / "study.yaml").is_file():
        raise ArtifactError(f"{path} is no study: study.yaml is missing")
    about = yaml.safe_load((path / "study.yaml").read_text(encoding="utf-8"))
    given = load_yaml(path / "config.yaml")
    given.pop("stop", None)
    config = make_config(given.pop("method"), given.pop("env", None), **given, verbose=verbose)
    state = kept_state(path)
    if state is not None:
        for pattern in STATE_FILES:
            for file in (path / "tune").glob(pattern):
                file.unlink()
        for file in state.iterdir():
            shutil.copy2(file, path / "tune")
    return _run(
        path, about, config, address=address, progress=progress, verbose=verbose, restore=state is not None
    )


def _plan(
    config: AlgorithmConfig,
    space: Mapping[str, Any] | None,
    only: Sequence[str] | None,
    metric: str | None,
    mode: str | None,
    scheduler: str,
    search: str,
    stop: Mapping[str, float] | None,
    num_samples: int,
    confirm: int,
) -> dict[str, Any]:
    """What study.yaml holds."""
    for value, options, name in ((scheduler, SCHEDULERS, "scheduler"), (search, SEARCHES, "search")):
        if value not in options:
            raise ConfigError(f"--{name} {value}: one of {', '.join(options)}.{nearest(value, options)}")
    if num_samples < 1 or confirm < 0:
        raise ConfigError("a study needs at least one sample, and no negative number of seeds to confirm on")
    declared = config.search_space() if hasattr(config, "search_space") else {}
    domains = {**declared, **(space or {})}
    for name in only or ():
        if name not in domains:
            raise ConfigError(
                f"--only {name}: no space is declared for it.{nearest(name, domains)} Give one with --space"
            )
    if only:
        domains = {name: domains[name] for name in {*only, *(space or {})}}
    known = vars(config)
    for name in domains:
        if name not in known:
            raise ConfigError(
                f"--space {name}: {type(config).__name__} has no setting {name!r}.{nearest(name, known)}"
            )
    if not domains:
        raise ConfigError(
            f"{type(config).__name__} declares no search space: give one with --space knob='loguniform(1e-4, 1e-2)'"
        )
    if search == "grid":
        domains = gridded(domains)
    elif search == "optuna" and any(isinstance(d, dict) for d in domains.values()):
        raise ConfigError(
            "optuna draws from distributions: write choice([...]) where grid([...]) stands, or --search grid"
        )
    if scheduler == "pbt" and search != "random":
        raise ConfigError("population based training draws and perturbs settings itself: leave out --search")
    found_metric, found_mode = (metric, mode or "max") if metric else default_metric(config)
    if found_metric in STOP_NAMES:
        found_metric = STOP_NAMES[found_metric]
    if (mode or found_mode) not in ("max", "min"):
        raise ConfigError(f"--mode {mode}: max or min")
    targets = {STOP_NAMES.get(k, k): float(v) for k, v in (stop or default_stop(config)).items()}
    env = config.env if isinstance(config.env, str) else getattr(config.env, "__name__", None)
    return {
        "method": registry.name_of(config),
        "env": env,
        "metric": found_metric,
        "mode": mode or found_mode,
        "scheduler": scheduler,
        "search": search,
        "num_samples": num_samples,
        "space": {name: describe(domain) for name, domain in domains.items()},
        "stop": targets,
        "confirm": confirm,
        "seed": config.seed,
    }


def _scheduler(about: Mapping[str, Any], space: Mapping[str, Any]) -> Any:
    from ray.tune import schedulers

    # Time is counted in what the run is stopped by, so that early stopping and the end agree.
    counted = [
        n
        for n in about["stop"]
        if n in (STOP_NAMES["env_steps"], STOP_NAMES["iterations"], STOP_NAMES["seconds"])
    ]
    time_attr = counted[0] if counted else STOP_NAMES["iterations"]
    longest = about["stop"].get(time_attr, 100.0)
    rank = {"metric": about["metric"], "mode": about["mode"], "time_attr": time_attr}
    if about["scheduler"] == "asha":
        return schedulers.ASHAScheduler(
            **rank,
            max_t=longest,
            grace_period=max(longest / 9, 1 if time_attr == "training_iteration" else 1e-9),
            reduction_factor=3,
        )
    if about["scheduler"] == "median":
        return schedulers.MedianStoppingRule(**rank, grace_period=longest / 5, min_samples_required=3)
    if about["scheduler"] == "pbt":
        return schedulers.PopulationBasedTraining(
            **rank,
            perturbation_interval=longest / 5,
            hyperparam_mutations={
                k: d["grid_search"] if isinstance(d, dict) else d for k, d in space.items()
            },
            synch=True,
        )
    return schedulers.FIFOScheduler()


def _searcher(about: Mapping[str, Any]) -> Any:
    from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

    if about["search"] != "optuna":
        return BasicVariantGenerator(max_concurrent=about["concurrent"] or 0, random_state=about["seed"])
    try:
        from optuna.samplers import TPESampler
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise ConfigError("--search optuna needs the package optuna: pip install optuna") from error
    logging.getLogger("optuna").setLevel(logging.ERROR)
    found = OptunaSearch(
        metric=about["metric"], mode=about["mode"], sampler=TPESampler(seed=about["seed"], multivariate=False)
    )
    return ConcurrencyLimiter(found, about["concurrent"]) if about["concurrent"] else found


def _run(
    path: Path,
    about: dict[str, Any],
    config: AlgorithmConfig,
    *,
    address: str | None,
    progress: bool,
    verbose: bool,
    restore: bool,
) -> Study:
    from ray import tune as ray_tune

    # Tune's state is written at every event, so that a kill loses no finished trial.
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "0"
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "0")
    start_ray(address, verbose=verbose)
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)
    space = {name: parse_space(text, name) for name, text in about["space"].items()}
    algorithm = config.algo_class
    assert algorithm is not None
    if about["cpus_per_trial"]:
        config.resources(num_cpus_for_main_process=about["cpus_per_trial"])
    watch = Watch(str(path), progress)
    with _quiet(verbose):
        if restore:
            tuner = ray_tune.Tuner.restore(
                str(path / "tune"),
                trainable=algorithm,
                # Tune keeps settings that are no plain data (classes, spaces) as references into this.
                param_space={**config.to_dict(), **space},
                resume_unfinished=True,
                resume_errored=True,
            )
        else:
            grid = about["search"] == "grid"
            tuner = ray_tune.Tuner(
                algorithm,
                param_space={**config.to_dict(), **space},
                tune_config=ray_tune.TuneConfig(
                    num_samples=1 if grid else about["num_samples"],
                    scheduler=_scheduler(about, space),
                    search_alg=_searcher(about),
                    trial_name_creator=trial_name,
                    trial_dirname_creator=trial_name,
                ),
                run_config=ray_tune.RunConfig(
                    name="tune",
                    storage_path=str(path.resolve()),
                    stop=dict(about["stop"]),
                    callbacks=[watch],
                    verbose=1 if verbose else 0,
                    checkpoint_config=ray_tune.CheckpointConfig(
                        # A population's trial goes on from another's checkpoint, which must still be there.
                        num_to_keep=None if about["scheduler"] == "pbt" else 2,
                        checkpoint_frequency=_every(about),
                        checkpoint_at_end=True,
                    ),
                    # A machine that is lost takes no trial with it.
                    failure_config=ray_tune.FailureConfig(max_failures=2),
                ),
            )
        results = tuner.fit()
    trials = [trial_of(result, about) for result in results]
    return report(path, about, config, trials)


def _every(about: Mapping[str, Any]) -> int:
    """Iterations between checkpoints of a trial."""
    return max(int(about["stop"].get(STOP_NAMES["iterations"], 10) // 10), 1)
