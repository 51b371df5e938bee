"""What a study leaves: tables, the best setting held against the default on fresh seeds, a figure."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mobula.files import storage, write_json, write_text
from mobula.settings import dump_config
from mobula.tuning.trials import Study, Trial, score, trial_name
from mobula.tuning.watching import study_tracker
from mobula.versions import commit, machine, versions

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

HELD_OUT_FROM = 1_000_000
"""Seeds on which the best setting is held against the default start here: no trial uses them."""


def report(
    path: Path,
    about: dict[str, Any],
    config: AlgorithmConfig,
    trials: list[Trial],
) -> Study:
    scored = [t for t in trials if t.score is not None and t.status != "failed"]
    pick = max if about["mode"] == "max" else min
    # A trial that was stopped early is not compared with whole ones while there are any.
    whole = [t for t in scored if t.status == "done"] or scored
    best = pick(whole, key=lambda t: t.score) if whole else None  # type: ignore[arg-type, return-value]
    study = Study(path, about["metric"], about["mode"], trials, best)
    write_json(path / "trials.json", [vars(t) for t in trials])
    write_text(path / "trials.csv", trials_csv(trials, about))
    if best is None:
        known = sorted({t.error for t in trials if t.error}) or [f"no trial reported {about['metric']}"]
        study.notes.append(f"no trial has a score: {known[0]}")
    else:
        tuned = config.copy(copy_frozen=False)
        for name, value in best.settings.items():
            _set(tuned, name, value)
        best_yaml = yaml.safe_load(dump_config(tuned)) | {"stop": {k: v for k, v in about["stop"].items()}}
        write_text(path / "best.yaml", yaml.safe_dump(best_yaml, sort_keys=False))
        study.figure = parallel_coordinates(scored, about, path / "parallel_coordinates.png")
        if about["confirm"]:
            study.confirmation = confirm(tuned, config, about, path)
    result = {
        **about,
        "trials": [vars(t) for t in trials],
        "best": vars(best) if best else None,
        "confirmation": study.confirmation,
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
    }
    write_json(path / "study.json", result)
    if about["track"]:
        tracker = study_tracker(path, about)
        study.tracking_uri = tracker.uri
        if best is not None and best.score is not None:
            tracker.log_metrics({f"best/{about['metric']}": best.score}, 0)
        for name in ("study.json", "trials.csv", "best.yaml", "parallel_coordinates.png"):
            if (path / name).is_file():
                tracker.log_artifact(path / name)
        tracker.end()
    return study


def _set(config: Any, name: str, value: Any) -> None:
    if hasattr(config, "hyperparameters") and name in config.hyperparameters():
        config.training(**{name: value})
    else:
        setattr(config, name, value)


def trials_csv(trials: Sequence[Trial], about: Mapping[str, Any]) -> str:
    """A line a trial."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *about["space"], "score", "status", "iterations", "seconds", "error"])
    for t in trials:
        settings = [t.settings.get(name) for name in about["space"]]
        writer.writerow([t.name, *settings, t.score, t.status, t.iterations, round(t.seconds, 2), t.error])
    return text.getvalue()


def confirm(
    tuned: AlgorithmConfig, default: AlgorithmConfig, about: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Both settings on seeds that no trial has used; the paired difference of their scores with its 95 % interval."""
    from ray import tune as ray_tune

    from mobula.experiment import statistics

    seeds = [HELD_OUT_FROM + i for i in range(about["confirm"])]
    scores: dict[str, dict[int, float]] = {}
    for name, config in (("tuned", tuned), ("default", default)):
        results = ray_tune.Tuner(
            config.algo_class,
            param_space={**config.to_dict(), "seed": ray_tune.grid_search(seeds)},
            tune_config=ray_tune.TuneConfig(trial_name_creator=trial_name, trial_dirname_creator=trial_name),
            run_config=ray_tune.RunConfig(
                name=f"confirm-{name}-{time.time_ns()}",
                storage_path=str(path.resolve()),
                stop=dict(about["stop"]),
                verbose=0,
            ),
        ).fit()
        found = {r.config["seed"]: score(r.metrics_dataframe, about) for r in results if r.error is None}
        scores[name] = {seed: value for seed, value in found.items() if value is not None}
    both = sorted(set(scores["tuned"]) & set(scores["default"]))
    if not both:
        return {"seeds": [], "verdict": "not run"}
    sign = 1 if about["mode"] == "max" else -1
    a, b = ([scores[name][seed] for seed in both] for name in ("tuned", "default"))
    gap = statistics.paired_difference([sign * x for x in a], [sign * x for x in b])
    verdict = "better" if gap.low > 0 else "worse" if gap.high < 0 else "undecided"
    return {
        "seeds": both,
        "tuned": a,
        "default": b,
        "improvement": gap.value,
        "low": gap.low,
        "high": gap.high,
        "verdict": verdict,
    }


def parallel_coordinates(trials: Sequence[Trial], about: Mapping[str, Any], file: Path) -> Path:
    """One line a trial across its settings to its score, coloured by the score; the best on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [*about["space"], about["metric"]]
    columns: list[list[Any]] = [[t.settings.get(n) for t in trials] for n in about["space"]]
    columns.append([t.score for t in trials])
    figure, axes = plt.subplots(figsize=(max(1.5 * len(names), 5), 4.2), layout="constrained")
    places, scores = [], [float(t.score or 0.0) for t in trials]
    for x, (name, values) in enumerate(zip(names, columns, strict=True)):
        place, ticks = _axis(values, "log" in about["space"].get(name, ""))
        places.append(place)
        axes.axvline(x, color="0.6", linewidth=0.8)
        for height, text in ticks:
            axes.annotate(
                text,
                (x, height),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize=7,
                va="center",
                color="0.25",
            )
    low, high = min(scores), max(scores)
    best_last = sorted(range(len(trials)), key=lambda i: scores[i], reverse=about["mode"] == "min")
    colours = plt.get_cmap("viridis" if about["mode"] == "max" else "viridis_r")
    for rank, i in enumerate(best_last):
        share = 0.5 if high == low else (scores[i] - low) / (high - low)
        last = rank == len(trials) - 1
        axes.plot(
            range(len(names)),
            [place[i] for place in places],
            color="#d55e00" if last else colours(share),
            linewidth=2.6 if last else 1.2,
            alpha=1.0 if last else 0.75,
            label="best trial" if last else None,
        )
    axes.set_xticks(
        range(len(names)), [n.rpartition("/")[2] for n in names], rotation=20, ha="right", fontsize=9
    )
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(names) - 0.55)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.1))
    axes.set_title(f"{about['method']}: {len(trials)} trials", fontsize=10)
    with storage(file):
        figure.savefig(file, dpi=130)
    plt.close(figure)
    return file


def _axis(values: Sequence[Any], logarithmic: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """(height in [0, 1] of every value, ticks) of one axis: numbers by size, anything else by kind."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers:
        kinds = sorted({str(v) for v in values})
        at = {kind: 0.5 if len(kinds) == 1 else i / (len(kinds) - 1) for i, kind in enumerate(kinds)}
        return [at[str(v)] for v in values], [(height, kind) for kind, height in at.items()]
    scale = math.log10 if logarithmic and min(values) > 0 else float
    low, high = scale(min(values)), scale(max(values))
    if high == low:
        return [0.5] * len(values), [(0.5, f"{min(values):.3g}")]
    marks = [low + share * (high - low) for share in (0.0, 0.5, 1.0)]
    back = (lambda v: 10**v) if scale is math.log10 else (lambda v: v)
    return [(scale(v) - low) / (high - low) for v in values], [
        ((m - low) / (high - low), f"{back(m):.3g}") for m in marks
    ]
