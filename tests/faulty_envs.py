"""Unusual environments: `--env-id faulty_envs:Hidden-v0`. Importing this module registers them.

All are one walk on a line: the observation is the position and the steps so far, the action is the
stride, an episode takes 40 steps.
"""

import os
import random

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Sequence

gym.logger.min_level = gym.logger.ERROR  # no remarks on what they do on purpose


class Walk(gym.Env):
    """`changes` take the place of these attributes."""
    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-2, 2, (1,), np.float32)
    cliff, weight = np.inf, 1.0  # the distance that ends an episode; the weight of the reward
    infos = ({},)  # what the steps say, in turn
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, **changes):
        vars(self).update(changes)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.time = float(self.np_random.uniform(-1, 1)), 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.action = action
        self.position += float(np.sum(action))
        self.time += 1
        info, distance = dict(self.infos[self.time % len(self.infos)]), abs(self.position)
        return self.observe(), -self.weight * distance, distance > self.cliff, False, info

    def observe(self):
        return np.array([self.position, self.time], np.float32)

    def render(self):
        return np.full((480, 640, 3), 2 * self.time, np.uint8)


class Hidden(Walk):
    """State that outlives an episode, ends at random, draws from the generators that all share."""
    drift, steps = 0.0, 0

    def step(self, action):
        self.steps += 1
        if str(self.steps) == os.environ.get("DIE_AT"):
            os._exit(9)  # as if the process were killed
        self.drift += 0.01 * np.random.randn()
        self.position += self.drift
        obs, reward, _, *rest = super().step(action)
        return obs, reward, random.random() < 0.03, *rest


class Odd(Walk):
    """One-hot contexts, a Unix time, an array as reward, torch in float64, and a success that is
    there only if there is one."""
    every = Box(-np.inf, np.inf, (3,), np.float64)
    observation_space = Dict({"context": every, "walk": every})

    def __init__(self):
        torch.set_default_dtype(torch.float64)
        self.context = -1

    def reset(self, **options):
        self.context = min(self.context + 1, 1)  # 0 in the first episode only
        return super().reset(**options)

    def step(self, action):
        obs, reward, *rest, _ = super().step(action)
        succeeds = self.time == 20 and self.np_random.random() < 0.5
        return obs, np.array([reward]), *rest, {"success": np.array([3])} if succeeds else {}

    def observe(self):
        walk = np.array([self.position, self.time, 1.7e9 + self.time])
        return {"context": np.eye(3)[self.context], "walk": walk}


# a success at step 21, in pictures
FILM = {"infos": [{}] * 21 + [{"success": True}] + [{}] * 78, "render_mode": None}
for name, kind, changes in (
    ("Walk", Walk, {}), ("faulty/Walk", Walk, {}), ("Hidden", Hidden, {}), ("Odd", Odd, {}),
    ("Cliff", Walk, {"cliff": 5}), ("Film", Walk, FILM),
    ("Huge", Walk, {"weight": 1e30}),  # the square of a reward overflows a 32-bit float
    ("Integers", Walk, {"action_space": Box(-5, 5, (1,), np.int64)}),
    ("NoBounds", Walk, {"action_space": Box(-1e38, 1e38, (1,), np.float32)}),
    ("Sequence", Walk, {"observation_space": Sequence(Box(-1, 1, (2,)))}),
):
    limit = 100 if name == "Film" else 40
    gym.register(f"{name}-v0", kind, max_episode_steps=limit, kwargs=changes)
