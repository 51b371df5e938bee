"""What methods on linear-quadratic games of teams share: which game is played, and how an observation of it is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from ray import tune
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from mobula.algorithms.common.meanfield.spaces import PartlyWhole
from mobula.envs.meanfield import lq_teams
from mobula.envs.meanfield.lq_teams import LQTeams
from mobula.errors import ConfigError, DataError
from mobula.learning.modules import TensorModule
from mobula.method import MethodConfig, hyperparameter

GAMES = {"G1": lq_teams.g1, "G2": lq_teams.g2, "G3": lq_teams.g3}


class LQTeamsConfig(MethodConfig):
    """Methods on linear-quadratic games of teams (base class)."""

    needs_env = False
    headline = ("error", "largest error of a learned gain")

    game = hyperparameter("G1", None, "G1, G2, G3, or the path of a game (.npz or .json)")
    horizon = hyperparameter(None, None, "steps of the game (default: 5, 10 and 20 for G1, G2, G3)", low=1)
    rho = hyperparameter(1.0, None, "spectral radius of A in G1", low=0.0)
    instance = hyperparameter(0, None, "seed of G2", low=0)
    sigma_y = hyperparameter(
        1.0, tune.loguniform(0.1, 10), "scale of the reset covariance of deviations", low=1e-9
    )
    sigma_xbar = hyperparameter(
        1.0, tune.loguniform(0.1, 10), "scale of the reset covariance of means", low=1e-9
    )

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        self._spaces_of(self.teams())

    def _spaces_of(self, teams: LQTeams) -> None:
        n, p = teams.games.A.shape[-1], teams.games.B.shape[-1]
        high = np.array(
            [teams.games.players - 1, teams.games.horizon - 1, *[np.inf] * (2 * n)], dtype=np.float64
        )
        low = np.array([0, 0, *[-np.inf] * (2 * n)], dtype=np.float64)
        self.environment(
            observation_space=spaces.Box(low, high, dtype=np.float64),
            action_space=spaces.Box(-np.inf, np.inf, (p,), np.float64),
        )

    def training(self, **kwargs: Any) -> Any:
        super().training(**kwargs)
        if {"game", "horizon"} & set(kwargs):
            self._spaces_of(self.teams())
        return self

    def teams(self) -> LQTeams:
        """The game that is played."""
        if self.game == "G1":
            made = lq_teams.g1(int(self.horizon or 5), self.rho)
        elif self.game == "G2":
            made = lq_teams.g2(self.instance, int(self.horizon or 10))
        elif self.game == "G3":
            made = lq_teams.g3(int(self.horizon or 20))
        elif self.game.endswith((".npz", ".json")):
            made = lq_teams.load_game(self.game)
        else:
            raise ConfigError(
                f"{type(self).__name__}: game is {self.game!r}; it is one of {', '.join(GAMES)} or a .npz or .json file"
            )
        scale = torch.tensor([self.sigma_y, self.sigma_xbar], dtype=torch.float64)
        return LQTeams(**{**vars(made), "reset": made.reset * scale[:, None, None]})

    def module_class(self) -> type[LQTeamsModule]:
        """The class of the module."""
        raise NotImplementedError

    def model_settings(self) -> dict[str, Any]:
        """What the module's `model_config` holds besides the sizes of the game."""
        return {}

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        games = self.teams().games
        sizes = {
            "players": games.players,
            "horizon": games.horizon,
            "p": games.B.shape[-1],
            "n": games.A.shape[-1],
        }
        return RLModuleSpec(module_class=self.module_class(), model_config={**sizes, **self.model_settings()})

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}


class LQTeamsModule(TensorModule):
    """Policies of every team.  Observation [team, t, x (n), xbar (n)], team from 0; the action is the team's stacked input [p]."""

    observation_space: Any

    def setup(self) -> None:
        """Team and step are whole numbers, in what the space draws too."""
        self.observation_space = PartlyWhole(self.observation_space, [0, 1])

    def read(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(team, t [...], deviation, mean [..., n]) of observations [..., 2 + 2 n]; DataError where team or t is none."""
        c: dict[str, int] = dict(self.model_config)
        n, limits = c["n"], torch.tensor([c["players"], c["horizon"]])
        index = obs[..., :2].long()
        if bool(((index < 0) | (index >= limits) | (index != obs[..., :2])).any()):
            raise DataError(
                f"obs is [team, t, x, xbar] with team and t whole numbers below {limits.tolist()}; got"
                f" {obs[..., :2].tolist()}"
            )
        team, t = index.unbind(-1)
        x, mean = obs[..., 2 : 2 + n].double(), obs[..., 2 + n :].double()
        return team, t, x - mean, mean
