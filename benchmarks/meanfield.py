"""Exploitability of mean-field games beside MFGLib 0.3.0, on one game that both have, at equal values; and against OpenSpiel 2.

The beach bar (10 places, 3 moves, 10 decisions, W = 1), random policies.  MFGLib scores one policy a call; ours scores one, or all in
one batch.  OpenSpiel's NashConv is compared, not timed, on its crowd modelling game (`against_openspiel`).
Results: benchmarks/results/meanfield.{json,md}.  Run by `make bench`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mobula.algorithms.common.meanfield import solvers
from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.graphon import FiniteMFG
from mobula.files import write_json, write_text
from mobula.versions import machine, versions

RESULTS = Path(__file__).parent / "results"
POLICIES, ROUNDS = 256, 7


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def crowd_modelling(horizon: int, size: int, effort: torch.Tensor) -> FiniteMFG:
    """OpenSpiel's `python_mfg_crowd_modelling` in tables, W = 1: a ring of `size` places, moves -1, 0, 1, then noise -1, 0, 1.

    r = 1 - |x - size // 2| / (size // 2) - effort[h, x, a] - log(mu(x) + 1e-25), from a uniform start.  effort [H, S, A].
    """
    x, move = torch.arange(size), torch.zeros(size, 3, size, dtype=torch.float64)
    for action in range(3):
        for noise in (-1, 0, 1):
            move[x, action, (x + action - 1 + noise) % size] += 1 / 3
    still = 1 - (x - size // 2).abs().double() / (size // 2)

    def model(h: int, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r = (still - (z + 1e-25).log()).unsqueeze(-1) - effort[h]
        return move.expand(*z.shape[:-1], size, 3, size), r

    law = torch.full((1, size), 1 / size, dtype=torch.float64)
    return FiniteMFG("crowd_modelling", size, 3, horizon, law, torch.ones(1, 1, dtype=torch.float64), model)


def as_cached(peer: Any, horizon: int, size: int) -> tuple[torch.Tensor, dict[tuple[int, int], Any]]:
    """(effort [H, S, 3] that OpenSpiel's values charge, {(t, x): its state there}).

    The game charges |move| / size with the reward after the move, but the strings that its values are cached by do not hold the
    move: who reaches (x, t) pays what the first visit of the depth-first search paid, whatever brought him there.
    """
    effort, seen = torch.zeros(horizon, size, 3, dtype=torch.float64), set()
    places: dict[tuple[int, int], Any] = {}

    def visit(state: Any) -> None:
        name = state.observation_string(0)
        if name in seen or state.is_terminal():
            return
        seen.add(name)
        if state.is_chance_node():
            following = [state.child(outcome) for outcome, _ in state.chance_outcomes()]
        elif state.current_player() >= 0:
            # At any distribution: the effort is what is left of the reward without position and crowd.
            x, spread = state.x, state._distribution[state.x]
            places[state.t, x] = state.clone()
            bare = 1 - abs(x - size // 2) / (size // 2) - math.log(spread + 1e-25)
            effort[state.t, x] = bare - state.rewards()[0]
            following = [state.child(action) for action in state.legal_actions()]
        else:
            state = state.clone()
            state.update_distribution([1 / size] * size)
            following = [state]
        for one in following:
            visit(one)

    for root in peer.new_initial_states():
        visit(root)
    return effort, places


def against_openspiel(
    horizon: int = 10, size: int = 10, iterations: int = 4, rate: float = 0.3
) -> dict[str, Any]:
    """NashConv of the uniform policy, of our iterates of mirror descent and of OpenSpiel's, by OpenSpiel and by us.

    {"theirs", "ours": [1 + 2 iterations]; "charged": ours of the uniform policy if every move is charged what it costs}.  Iterates are
    not compared with each other: OpenSpiel's values change its policy while they are being computed.  Raises ImportError
    without OpenSpiel.
    """
    import pyspiel
    from open_spiel.python import policy as policies
    from open_spiel.python.mfg.algorithms import mirror_descent, nash_conv
    from open_spiel.python.mfg.games import crowd_modelling as _registers

    assert _registers
    peer = pyspiel.load_game("python_mfg_crowd_modelling", {"size": size, "horizon": horizon})
    effort, places = as_cached(peer, horizon, size)
    game = crowd_modelling(horizon, size, effort)

    class Table(policies.Policy):  # type: ignore[misc]
        def __init__(self, table: torch.Tensor) -> None:
            super().__init__(peer, [0])
            self.table = table.tolist()

        def action_probabilities(self, state: Any, player_id: int | None = None) -> dict[int, float]:
            return dict(enumerate(self.table[state.t][state.x]))

    step, state = solvers.mirror_descent(rate), solvers.initial(game)
    tables = [state.policy[0]]
    descent = mirror_descent.MirrorDescent(peer, lr=rate)
    for _ in range(iterations):
        state = step(game, state)
        descent.iteration()
        their = state.policy[0].clone()
        for (t, x), place in places.items():
            for action, p in descent.get_policy().action_probabilities(place).items():
                their[t, x, action] = float(p)
        tables += [state.policy[0], their]
    found: dict[str, Any] = {
        "theirs": [float(nash_conv.NashConv(peer, Table(pi)).nash_conv()) for pi in tables],
        "ours": graphon.exploitability(game, torch.stack(tables)[:, None], 0.0).squeeze(-1).tolist(),
    }
    moved = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) / size
    charged = moved.expand(horizon, size, 3).clone()
    # The reward after the last move is never paid.
    charged[-1] = 0.0
    true = crowd_modelling(horizon, size, charged)
    found["charged"] = float(graphon.exploitability(true, graphon.uniform_policy(true), 0.0).squeeze())
    return found


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
    try:
        found = against_openspiel()
    except ImportError as error:
        spiel = f"OpenSpiel was not compared: {error.name} is missing."
        gaps = None
    else:
        about["open_spiel"] = version("open_spiel")
        gaps = max(abs(a - b) for a, b in zip(found["theirs"], found["ours"], strict=True))
        spiel = (
            f"NashConv of {len(found['ours'])} policies on OpenSpiel {about['open_spiel']}'s crowd modelling (W = 1), as its cached values"
            f" charge moves: both agree to {gaps:.0e}."
        )
    write_json(
        RESULTS / "meanfield.json",
        {
            "milliseconds": {name: 1e3 * value for name, value in middle.items()},
            "ratio": ratios,
            "largest_difference": difference,
            "openspiel_largest_difference": gaps,
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
        "",
        spiel,
    ]
    write_text(RESULTS / "meanfield.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
