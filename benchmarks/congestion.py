"""Ways to a design side by side: SilMD, DolMD, descent along the exact derivative (sensitivity analysis), alternation.

One run, one thread, the same network, starts and steps: seconds as multiples of SilMD's, and the objective that each reaches at an
exact equilibrium.  The network is Sioux Falls where MOBULA_SIOUXFALLS names its folder, else a grid of 36 nodes.
Second: OD pairs of a large network on two learners beside one, seconds of the learners' part of an iteration of SilMD.
Results: benchmarks/results/congestion.{json,md}.  Run by `python -m benchmarks.congestion`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from mobula.algorithms.markets.baselines import heuristics
from mobula.algorithms.markets.baselines.sab import sab
from mobula.algorithms.markets.stackelberg_congestion.method import StackelbergCongestionConfig
from mobula.algorithms.markets.stackelberg_congestion.search import Search, iterate
from mobula.envs.markets.assignment import ShortestPaths, as_paths
from mobula.envs.markets.design import SIOUXFALLS, Problem, evaluate, make_problem
from mobula.envs.markets.dynamics import Paths, PathSet, cut
from mobula.envs.markets.networks import Network
from mobula.files import write_json, write_text
from mobula.versions import machine, versions

RESULTS = Path(__file__).parent / "results"
XI, LIMIT = 1e-2, 100
LARGE = "grid31-z306"
"""As many OD pairs as Chicago-Sketch has (93,513), on some more links."""


def searched(problem: Problem, **knobs: Any) -> Any:
    """DolMD or SilMD from no design, until the design changes by less than XI."""
    config = StackelbergCongestionConfig().training(xi=XI, **knobs)
    demand = torch.from_numpy(problem.network.demand).expand(1, 1, -1)
    search = Search(
        problem, config.settings(problem), demand, torch.zeros(1, problem.size, dtype=torch.float64)
    )
    while not search.converged and search.n < LIMIT:
        iterate(search)
    return search.y[0].numpy(), search.n


def shared(problem: Problem, paths: PathSet, learners: int, T: int) -> dict[str, Any]:
    """Median seconds in which `learners` differentiate through T steps, logits there and back included; what they found."""
    shards = max(learners, 1)
    # The module that acts plays no part in this: that of a small network will do.
    config = StackelbergCongestionConfig().training(network="grid3", od_shards=shards)
    config = config.learners(num_learners=learners)
    config.validate()
    spec = config.get_default_rl_module_spec()
    spec.observation_space, spec.action_space = config.observation_space, config.action_space
    group = config.build_learner_group(rl_module_spec=spec)
    shares = cut(paths, shards)
    sent = ray.put(problem), [ray.put(share) for share in shares]
    demand = torch.from_numpy(problem.network.demand)
    options = {"algorithm": "silmd", "T": T}
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        batches = [
            ray.put(
                {
                    "demand": demand[share.first : share.first + share.paths.pairs].expand(1, 1, -1),
                    "y": torch.zeros(1, 1, problem.size, dtype=torch.float64),
                    "logits": torch.zeros(1, 1, share.paths.size, dtype=torch.float64),
                    "r": torch.full((1, 1), 0.05, dtype=torch.float64),
                }
            )
            for share in shares
        ]

        def update(learner: Any, batches: Any = batches) -> Any:
            batch = ray.get(batches[learner._learner_index])
            learner.learn(batch, problem=sent[0], shares=sent[1], scenarios=1, options=options)
            return {name: value.numpy() for name, value in learner.result.items()}

        found = [answer.get() for answer in group.foreach_learner(update)]
        seconds.append(time.perf_counter() - start)
    group.shutdown()
    return {
        "learners": learners,
        "T": T,
        "seconds": float(np.median(seconds[1:])),
        "F": float(found[0]["F"][0, 0]),
        "gradient": found[0]["gradient"][0].tolist(),
    }


def several_paths(network: Network, count: int) -> PathSet:
    """Shortest paths of all OD pairs at `count` draws of link times."""
    rng, router, paths = np.random.default_rng(0), ShortestPaths(network), Paths(network)
    for _ in range(count):
        costs = network.free_flow_time * rng.uniform(0.5, 1.5, network.num_links)
        for w, path in enumerate(as_paths(router(costs)[1])):
            paths.add(w, path)
    return paths.flat()


def main() -> None:
    torch.set_num_threads(1)
    name = "siouxfalls" if os.environ.get(SIOUXFALLS) else "grid6"
    problem = StackelbergCongestionConfig().training(network=name, objective="cndp").problem()
    steps = {"alpha": 0.5, "beta": 10.0, **problem.steps}
    common = {} if problem.steps else {"alpha": 0.5, "beta": 10.0}

    def descent() -> Any:
        return sab(problem, alpha=steps["alpha"], beta=steps["beta"], xi=XI, iterations=LIMIT, gap=1e-7)

    ways: dict[str, Callable[[], Any]] = {
        "SilMD": lambda: searched(problem, **common),
        "DolMD": lambda: searched(problem, algorithm="dolmd", **common),
        "sensitivity analysis": descent,
        "alternation": lambda: (heuristics.ioa(problem), None),
    }
    rows = []
    for label, way in ways.items():
        spent: list[float] = []
        # The short ones several times: a second of a shared machine is a poor measure.
        while sum(spent) < 10.0:
            start = time.process_time()
            y, count = way()
            spent.append(time.process_time() - start)
        seconds = float(np.median(spent))
        objective = evaluate(problem, y).objective
        rows.append({"way": label, "seconds": seconds, "iterations": count, "objective": objective})
    first = rows[0]["seconds"]
    for row in rows:
        row["ratio"] = row["seconds"] / first
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    large = make_problem(LARGE, "cndp", links=[*range(50)])
    paths = several_paths(large.network, 6)
    scaled = [shared(large, paths, learners, T) for T in (10, 40) for learners in (1, 2)]
    for alone, both in (scaled[:2], scaled[2:]):
        np.testing.assert_allclose(both["F"], alone["F"], rtol=1e-9)
        np.testing.assert_allclose(both["gradient"], alone["gradient"], rtol=1e-6, atol=1e-9)
    nothing = evaluate(problem, np.zeros(problem.size)).objective
    write_json(
        RESULTS / "congestion.json",
        {
            "network": problem.network.name,
            "no_design": nothing,
            "rows": rows,
            "shared": {
                "network": LARGE,
                "links": large.network.num_links,
                "pairs": paths.pairs,
                "paths": paths.size,
                "rows": scaled,
            },
            "machine": machine(),
            "versions": versions(),
        },
    )
    lines = [
        f"Capacities on {problem.size} links of {problem.network.name} ({problem.network.num_links} links,"
        f" {problem.network.num_ods} OD pairs), from no design until a step changes it by less than {XI:g}; CPU seconds of one thread"
        f" ({machine()['architecture']}), torch {torch.__version__}. Objective without a design {nothing:.4f}.",
        "",
        "| | objective at equilibrium | iterations | seconds | times SilMD |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {r['way']} | {r['objective']:.4f} | {r['iterations'] or ''} | {r['seconds']:.1f} | {r['ratio']:.1f} |"
            for r in rows
        ),
        "",
        f"OD pairs shared: {LARGE} ({large.network.num_links} links, {paths.pairs} OD pairs, {paths.size} paths), one thread a learner;"
        " median seconds of the forward and backward pass of an iteration of SilMD, logits there and back included. F is the same to"
        " 1e-9, its gradient to 1e-6.",
        "",
        "| look-ahead | one learner | two learners | ratio |",
        "| ---: | ---: | ---: | ---: |",
        *(
            f"| {a['T']} | {a['seconds']:.2f} | {b['seconds']:.2f} | {a['seconds'] / b['seconds']:.2f} |"
            for a, b in (scaled[:2], scaled[2:])
        ),
    ]
    write_text(RESULTS / "congestion.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
