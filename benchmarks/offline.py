"""Gradient steps per second of offline learners beside d3rlpy's IQL, on the same data, networks and batch.

    pip install --target build/peers-offline --no-deps d3rlpy structlog colorama dataclasses-json marshmallow typing-inspect mypy-extensions
    PYTHONPATH=build/peers-offline python -m benchmarks.offline [--quick] [--out benchmarks/results]

IQL on both sides: twin critics with targets, value, Gaussian actor.  One torch thread, CPU.  Measured in turn, round after
round; medians over rounds, and ratios between them.  A row "S = 5" trains five seeds side by side: the rate counts its steps
times five.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mobula.algorithms.offline.baselines.iql import IQLConfig
from mobula.algorithms.offline.ivr import SQLConfig
from mobula.envs import datasets
from mobula.files import write_json, write_text
from mobula.versions import machine, versions

DATA = "pendulum/scripted-mixed-0.5,size=20000"
SIZES = ((64, 128), (256, 256))
"""(width of both hidden layers, batch)."""

Work = Callable[[int], int]
"""Takes that many gradient steps; returns the steps times seeds."""


def ours(config_class: Any, width: int, batch: int, seeds: int) -> Work:
    """Blocks of a learner's steps, drawing of rows and reports included."""
    config = config_class().training(
        data=DATA,
        hidden=[width, width],
        batch=batch,
        num_seeds_batched=seeds,
        steps=10**6,
        evaluate_every=0,
        value_layernorm=False,
    )
    algorithm = config.debugging(seed=0, log_level="ERROR").build_algo()

    def work(steps: int) -> int:
        algorithm.learn({}, steps=steps)
        return steps * seeds

    return work


def d3rlpy_iql(width: int, batch: int) -> Work:
    """d3rlpy's IQL on the same rows: sampling of a batch from its replay buffer, and its update."""
    import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    data = datasets.load(DATA)
    dataset = d3rlpy.dataset.MDPDataset(
        data["obs"], data["action"], data["reward"][:, None], data["terminated"], data["truncated"]
    )
    encoder = d3rlpy.models.VectorEncoderFactory(hidden_units=[width, width])
    names = ("actor_encoder_factory", "critic_encoder_factory", "value_encoder_factory")
    settings: dict[str, Any] = {name: encoder for name in names}
    learner = d3rlpy.algos.IQLConfig(batch_size=batch, **settings).create(device="cpu:0")
    learner.build_with_dataset(dataset)

    def work(steps: int) -> int:
        for _ in range(steps):
            learner.update(dataset.sample_transition_batch(batch))
        return steps

    return work


def measure(works: dict[str, Work], steps: int, rounds: int) -> dict[str, float]:
    """Median rate of each, measured in turn, after one warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            done = work(steps if round_ else max(5, steps // 10))
            if round_:
                rates[name].append(done / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, for a look")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    import ray

    torch.set_num_threads(1)
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    rounds, steps = (2, 60) if options.quick else (5, 250)
    found, ratios = {}, {}
    for width, batch in SIZES:
        torch.set_num_threads(1)
        label = f"2 x {width}, batch {batch}"
        rates = measure(
            {
                "mobula sql": ours(SQLConfig, width, batch, 1),
                "mobula IQL": ours(IQLConfig, width, batch, 1),
                "mobula IQL, S = 5": ours(IQLConfig, width, batch, 5),
                "d3rlpy IQL": d3rlpy_iql(width, batch),
            },
            steps,
            rounds,
        )
        found[label] = rates
        for name in ("mobula sql", "mobula IQL", "mobula IQL, S = 5"):
            ratios[f"{name} / d3rlpy IQL ({label})"] = rates[name] / rates["d3rlpy IQL"]
    from importlib.metadata import version

    made = {**versions(), "d3rlpy": version("d3rlpy")}
    report = {
        "seed_steps_per_s": found,
        "ratios": {name: {"ratio": value, "aim": 2.0} for name, value in ratios.items()},
        "machine": machine(),
        "versions": made,
        "rounds": rounds,
    }
    write_json(options.out / "offline.json", json.loads(json.dumps(report)))
    lines = [
        f"Median of {rounds} rounds on {machine()['cores']} cores, one torch thread; torch {made['torch']}, d3rlpy {made['d3rlpy']}."
        " Pendulum data, 20,000 rows.",
        "",
        "| gradient steps x seeds per second | " + " | ".join(found) + " |",
        "| --- |" + " ---: |" * len(found),
        *(
            f"| {name} | " + " | ".join(f"{rates[name]:,.0f}" for rates in found.values()) + " |"
            for name in next(iter(found.values()))
        ),
        "",
        "| ratio | measured | aim |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {value:.2f} | 2 |" for name, value in ratios.items()),
    ]
    write_text(options.out / "offline.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    ray.shutdown()


if __name__ == "__main__":
    main()
