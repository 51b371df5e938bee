"""Exploitability of mean-field games beside MFGLib 0.3.0, on one game that both have, at equal values.

The beach bar (10 places, 3 moves, 10 decisions, W = 1), random policies.  MFGLib scores one policy a call; ours scores one, or all in
one batch.  Results: benchmarks/results/meanfield.{json,md}.  Run by `make bench`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mobula.envs.meanfield import graphon
from mobula.files import write_json, write_text
from mobula.versions import machine, versions

RESULTS = Path(__file__).parent / "results"
POLICIES, ROUNDS = 256, 7


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    try:
        import mfglib.alg  # noqa: F401
        from mfglib.env import Environment
        from mfglib.scoring import exploitability_score
    except ImportError as error:
        sys.exit(f"MFGLib is missing ({error.name}): run `make bench`, which installs it beside")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    game = graphon.beach_bar(torch.ones(1, 1))
    place = torch.full((1, 10), 0.1)
    move, _ = game.model(0, place)

    def reward(env: Any, t: int, flow: torch.Tensor) -> torch.Tensor:
        return game.model(t, flow.sum(-1)[None])[1][0]

    peer = Environment(
        T=game.horizon - 1,
        S=(10,),
        A=(3,),
        mu0=game.mu0[0].clone(),
        r_max=5.0,
        reward_fn=reward,
        transition_fn=lambda env, t, flow: move[0].permute(2, 0, 1),
    )
    g = torch.Generator().manual_seed(0)
    policies = torch.rand(POLICIES, 1, game.horizon, 10, 3, generator=g) ** 2
    policies /= policies.sum(-1, keepdim=True)
    ours = graphon.exploitability(game, policies, 0.0).squeeze(-1)
    theirs = torch.tensor([exploitability_score(peer, pi[0]) for pi in policies])
    difference = float((ours - theirs).abs().max())
    if difference > 1e-6:
        sys.exit(f"the two disagree by {difference:.1e}: there is nothing to time")
    times: dict[str, list[float]] = {"MFGLib, one": [], "mobula, one": [], "mobula, 256 in a batch": []}
    for _ in range(ROUNDS):
        some = policies[:32]
        times["MFGLib, one"].append(
            seconds(lambda some=some: [exploitability_score(peer, pi[0]) for pi in some]) / 32
        )
        times["mobula, one"].append(
            seconds(lambda some=some: [graphon.exploitability(game, pi, 0.0) for pi in some]) / 32
        )
        times["mobula, 256 in a batch"].append(
            seconds(lambda: graphon.exploitability(game, policies, 0.0)) / POLICIES
        )
    middle = {name: median(values) for name, values in times.items()}
    ratios = {name: middle["MFGLib, one"] / value for name, value in middle.items()}
    about = {**versions(), "mfglib": version("mfglib")}
    write_json(
        RESULTS / "meanfield.json",
        {
            "milliseconds": {name: 1e3 * value for name, value in middle.items()},
            "ratio": ratios,
            "largest_difference": difference,
            "machine": machine(),
            "versions": about,
        },
    )
    lines = [
        f"Exploitability of random policies on the beach bar, median of {ROUNDS} rounds, one thread, {machine()['cores']} cores"
        f" ({machine()['architecture']}); MFGLib {about['mfglib']}, torch {torch.__version__}."
        f" Values agree to {difference:.0e}.",
        "",
        "| | ms an evaluation | times MFGLib's speed |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {1e3 * middle[name]:.3f} | {ratios[name]:.1f} |" for name in middle),
        "",
        "Aim: 10 times.",
    ]
    write_text(RESULTS / "meanfield.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
