"""Gymnasium environments that misbehave, or are only unusual: `--env-id faulty_envs:Raises-v0`.

Importing this module registers them. All are one walk on a line: the observation is the position
and the steps so far, the action is the stride, an episode takes 40 steps.
"""

import random

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict


class Walk(gym.Env):
    """A walk that goes well. `changes` take the place of what stands here.

    `fault` names where it fails, after `fault_at` steps in all, or says that it observes NaN.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-2, 2, (1,), np.float32)
    reward, length, fault, fault_at = 1.0, np.inf, "", 0
    lifetime = closed = 0  # steps of this one; how many were closed

    def __init__(self, **changes):
        vars(self).update(changes)
        self.fail_in("making")

    def fail_in(self, place):
        if place in self.fault.split() and self.lifetime >= self.fault_at:
            raise RuntimeError(f"it fails in {place}")

    def reset(self, *, seed=None, options=None):
        self.fail_in("reset")
        super().reset(seed=seed)
        self.position, self.time = float(self.np_random.uniform(-1, 1)), 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.action = action
        self.position += float(np.sum(action))
        self.time += 1
        self.lifetime += 1
        self.fail_in("step")
        return self.observe(), self.reward, self.time == self.length, False, self.info()

    def close(self):
        Walk.closed += 1
        self.fail_in("close")

    def observe(self):
        is_wrong = self.fault == "NaN" and self.lifetime >= self.fault_at
        obs = np.array([np.nan if is_wrong else self.position, self.time], np.float32)
        return np.resize(obs, self.observation_space.shape)

    def info(self):
        return {}


class Solved(Walk):
    """Success under the name that Gymnasium-Robotics has for it, in the third step."""

    def info(self):
        return {"is_success": self.time == 3}


class Goals(Walk):
    """Observations in a dictionary, as of goal-based environments."""

    sizes = {"observation": 2, "achieved_goal": 1, "desired_goal": 1}
    observation_space = Dict({k: Box(-np.inf, np.inf, (n,)) for k, n in sizes.items()})

    def observe(self):
        parts = {"observation": [self.position, self.time], "achieved_goal": [self.position]}
        parts["desired_goal"] = [7.0]
        return {name: np.array(part, np.float32) for name, part in parts.items()}


class GlobalDraws(Walk):
    """Starts that come from the generators that all share."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = random.random() + np.random.rand()
        return self.observe(), {}


class Grasp(Walk):
    """A bit that is 0 in the random steps and comes later; and one that never comes."""

    observation_space = Box(-np.inf, np.inf, (4,), np.float32)

    def observe(self):
        return np.array([self.position, self.time, self.time > 30, 0], np.float32)

    def info(self):
        return {"success": self.position < -1}


for kind in (Walk, *Walk.__subclasses__()):
    gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=40)

for name, changes in {
    "CannotBeMade": {"fault": "making"},
    "RaisesAtReset": {"fault": "reset", "fault_at": 1},  # the first is the beginning of the run
    "Raises": {"fault": "step", "fault_at": 30},
    "Dies": {"fault": "step close", "fault_at": 30},
    # in the evaluation, an episode of 40 steps, before the training gets there
    "RaisesLate": {"fault": "step", "fault_at": 39},
    "NotANumber": {"fault": "NaN", "fault_at": 30},
    "NotANumberAtOnce": {"fault": "NaN"},
    "NoReward": {"reward": np.nan},
    "Huge": {"reward": 1e30},  # its square overflows a 32-bit float
    "Grid": {"observation_space": Box(-np.inf, np.inf, (2, 3), np.float32)},
    "Column": {"action_space": Box(-1, 1, (3, 1), np.float32)},
    "Scalar": {"action_space": Box(-1, 1, (), np.float32)},
    "Constant": {"action_space": Box(*np.array([[-1, 0.3], [1, 0.3]], np.float32))},
    "Uneven": {"action_space": Box(-2.3, 1.37, (1,), np.float32)},  # rescaling rounds
    "Integers": {"action_space": Box(-5, 5, (1,), np.int64)},
    "NoBounds": {"action_space": Box(-np.inf, np.inf, (1,), np.float32)},
}.items():
    gym.register(f"{name}-v0", Walk, max_episode_steps=40, kwargs=changes)

gym.register("Unlimited-v0", Walk, kwargs={"length": 5})  # no time limit: ends by itself ...
gym.register("Endless-v0", Walk)  # ... or never
