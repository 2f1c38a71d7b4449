"""Gymnasium environments that misbehave, or are only unusual: `--env-id faulty_envs:Raises-v0`.

Importing this module registers them. All are one walk on a line: the observation is the position
and the steps so far, the action is the stride, an episode takes 40 steps.
"""

import os
import random
import time

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict


class Walk(gym.Env):
    """A walk that goes well. `fault` is called once, at step `after` of an instance's life."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-2, 2, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"]}
    after, lifetime, closed = 30, 0, 0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.time = float(self.np_random.uniform(-1, 1)), 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.action = action
        self.position += float(np.sum(action))
        self.time += 1
        self.lifetime += 1
        if self.lifetime == self.after:
            self.fault()
        return self.observe(), self.reward(), self.terminated(), False, self.info()

    def close(self):
        type(self).closed += 1

    def observe(self):
        return np.array([self.position, self.time], np.float32)

    def reward(self):
        return 1.0

    def terminated(self):
        return False

    def info(self):
        return {}

    def fault(self):
        pass


# ---------------------------------------- faults ----------------------------------------


class Raises(Walk):
    """The environment's own code fails."""

    def fault(self):
        raise RuntimeError("the gripper fell off")


class RaisesLate(Raises):
    """The same, in the evaluation, an episode of 40 steps, before the training gets there."""

    after = 39


class RaisesAtReset(Walk):
    """The second reset fails: the first is the beginning of the run."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        if self.resets == 2:
            raise RuntimeError("the table is missing")
        return super().reset(seed=seed)


class CannotBeMade(Walk):
    """The constructor fails."""

    def __init__(self):
        raise RuntimeError("no robot is connected")


class NeedsRobot(Walk):
    """The constructor needs an argument that nobody gives it."""

    def __init__(self, robot):
        pass


class NotANumber(Walk):
    """The observation becomes NaN."""

    def fault(self):
        self.position = np.nan


class NotANumberAtOnce(Walk):
    """The very first observation is NaN."""

    def observe(self):
        return np.full(2, np.nan, np.float32)


class Huge(Walk):
    """Rewards whose square overflows a 32-bit float."""

    def reward(self):
        return 1e30


class Large(Walk):
    """Rewards that are too large to learn from, but not too large to compute with."""

    def reward(self):
        return 1e8


class Blind(Walk):
    """Rendering gives no picture."""

    def render(self):
        return None


class Slow(Walk):
    """Every step takes as long as the environment variable SLOW says, in seconds."""

    def reward(self):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return self.position


# --------------------------------------- unusual ----------------------------------------


class Unlimited(Walk):
    """No time limit; it ends after five steps by itself."""

    def terminated(self):
        return self.time == 5


class Endless(Walk):
    """No time limit, and no end."""


class Solved(Walk):
    """Success under the name that Gymnasium-Robotics has for it, in the third step."""

    def info(self):
        return {"is_success": self.time == 3}


class Grid(Walk):
    """Observations with two axes."""

    observation_space = Box(-np.inf, np.inf, (2, 3), np.float32)

    def observe(self):
        return np.full((2, 3), self.position, np.float32)


class Goals(Walk):
    """Observations in a dictionary, as of goal-based environments."""

    parts = {"observation": 2, "achieved_goal": 1, "desired_goal": 1}
    observation_space = Dict({k: Box(-np.inf, np.inf, (n,)) for k, n in parts.items()})

    def observe(self):
        parts = {"observation": [self.position, self.time], "achieved_goal": [self.position]}
        parts["desired_goal"] = [7.0]
        return {name: np.array(part, np.float32) for name, part in parts.items()}


class Fractions(Walk):
    """Observations that are declared as integers and are not."""

    observation_space = Box(-100, 100, (2,), np.int64)


class GlobalDraws(Walk):
    """Starts that come from the generators that all share."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.time = random.random() + np.random.rand(), 0
        return self.observe(), {}


class Grasp(Walk):
    """A bit that is 0 in the random steps and decides the reward later; and one that stays 0."""

    observation_space = Box(-np.inf, np.inf, (4,), np.float32)

    def observe(self):
        return np.array([self.position, self.time, self.lifetime > 30, 0], np.float32)

    def reward(self):
        return float(self.lifetime > 30)


class Column(Walk):
    """Actions with two axes."""

    action_space = Box(-1, 1, (3, 1), np.float32)


class Scalar(Walk):
    """Actions with none."""

    action_space = Box(-1, 1, (), np.float32)


class Constant(Walk):
    """An action of which one number may not change."""

    action_space = Box(np.array([-1, 0.3], np.float32), np.array([1, 0.3], np.float32))


class Uneven(Walk):
    """Bounds between which rescaling rounds."""

    action_space = Box(-2.3, 1.37, (1,), np.float32)


class Integers(Walk):
    """Actions that are no continuous numbers."""

    action_space = Box(-5, 5, (1,), np.int64)


class NoBounds(Walk):
    """Actions without bounds."""

    action_space = Box(-np.inf, np.inf, (1,), np.float32)


for walk in [kind for kind in globals().values() if isinstance(kind, type)]:
    if issubclass(walk, Walk):
        limit = None if walk in (Unlimited, Endless) else 40
        gym.register(f"{walk.__name__}-v0", walk, max_episode_steps=limit)
