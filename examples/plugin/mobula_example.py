"""A new environment and a new method, in a distribution of their own."""

import torch
from gymnasium import spaces
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from mobula.learning.learners import TensorLearner
from mobula.learning.modules import ActorCritic
from mobula.method import Method, MethodConfig, hyperparameter
from mobula.sampling.rollout import concatenate
from mobula.sampling.tensor_env import TensorEnv

class Corridor(TensorEnv):
    """Walk right: reward 1 at the end of a corridor of ten cells."""
    max_episode_steps, reward_range = 50, (0.0, 1.0)
    def __init__(self, num_envs=1, **kwargs):
        super().__init__(num_envs, observation_space=spaces.Discrete(10), action_space=spaces.Discrete(2), **kwargs)
    def initial(self, n):
        return {"cell": torch.zeros(n, dtype=torch.int64)}
    def transition(self, state, action):
        cell = (state["cell"] + 2 * action - 1).clamp(0, 9)
        return {"cell": cell}, (cell == 9).float(), cell == 9
    def observe(self, state):
        return state["cell"]

class CrossingConfig(MethodConfig):
    """Cross-entropy method on policies: imitate the best steps of every batch."""
    elite = hyperparameter(0.3, None, "share of rows that is imitated", low=0.01, high=1.0)
    lr = hyperparameter(0.01, None, "step size of Adam", low=0.0)
    def get_default_learner_class(self):
        return CrossingLearner
    def get_default_rl_module_spec(self):
        model = {"hidden": [], "activation": "tanh", "normalize_observations": False, "initial_log_std": 0.0}
        return RLModuleSpec(module_class=ActorCritic, model_config=model)

class CrossingLearner(TensorLearner):
    def prepare(self, batch):
        to_go = batch["rewards"].flip(0).cumsum(0).flip(0).flatten()
        best = to_go.argsort(descending=True)[: int(self.config.elite * len(to_go))]
        return {name: batch[name].flatten(0, 1)[best] for name in ("obs", "actions")}
    def compute_loss_for_module(self, *, module_id, config, batch, fwd_out):
        return torch.nn.functional.cross_entropy(fwd_out["action_dist_inputs"], batch["actions"])

class Crossing(Method, config=CrossingConfig):
    def training_step(self):
        self.learn(concatenate(self.sample(num_timesteps=1600)), num_epochs=5)
