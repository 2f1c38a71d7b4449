"""Gymnasium environments that misbehave: `--env-id faulty_envs:Raises-v0`.

Importing this module registers them. All are one walk on a line: the observation is the
position and the steps so far, the action is the stride, an episode takes 40 steps.
"""

import os

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class Walk(gym.Env):
    """A walk that goes well. `after`: the step, in an instance's life, of the fault."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-2, 2, (1,), np.float32)

    def __init__(self, after: int = 30):
        self.after, self.lifetime = after, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.time = float(self.np_random.uniform(-1, 1)), 0
        return self.observe(), {}

    def step(self, action):
        self.position += float(action[0])
        self.time += 1
        self.lifetime += 1
        if self.lifetime == self.after:
            self.fault()
        return self.observe(), self.reward(), self.terminated(), False, {}

    def observe(self):
        return np.array([self.position, self.time], np.float32)

    def reward(self):
        return 1.0

    def terminated(self):
        return False

    def fault(self):
        pass


class Raises(Walk):
    """The environment's own code fails."""

    def fault(self):
        raise RuntimeError("the gripper fell off")


class RaisesAtReset(Walk):
    """The second reset fails: the first is the beginning of the run."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        if self.resets == 2:
            raise RuntimeError("the table is missing")
        return super().reset(seed=seed)


class RaisesAtOnce(Walk):
    """Not even the first reset works."""

    def reset(self, *, seed=None, options=None):
        raise RuntimeError("no licence found")


class CannotBeMade(Walk):
    """The constructor fails."""

    def __init__(self):
        raise RuntimeError("no robot is connected")


class Dies(Walk):
    """The worker process is gone, as after a crash in a physics engine."""

    def fault(self):
        os._exit(3)


class NotANumber(Walk):
    """The observation becomes NaN."""

    def fault(self):
        self.position = np.nan


class Huge(Walk):
    """Rewards whose square overflows a 32-bit float."""

    def reward(self):
        return 1e30


class Large(Walk):
    """Rewards that are too large to learn from, but not too large to compute with."""

    def reward(self):
        return 1e8


class Terminates(Walk):
    """Ends after five steps, for good: nothing comes after them."""

    def terminated(self):
        return self.time == 5


class Grid(Walk):
    """Observations with two axes: no fault, only unusual."""

    observation_space = Box(-np.inf, np.inf, (2, 3), np.float32)

    def observe(self):
        return np.full((2, 3), self.position, np.float32)


class NoBounds(Walk):
    """Actions without bounds."""

    action_space = Box(-np.inf, np.inf, (1,), np.float32)


for walk in (Walk, *Walk.__subclasses__()):
    gym.register(f"{walk.__name__}-v0", walk, max_episode_steps=40)
# fails in the evaluation, an episode of 40 steps, before the training gets there
gym.register("RaisesLate-v0", Raises, max_episode_steps=40, kwargs={"after": 39})
