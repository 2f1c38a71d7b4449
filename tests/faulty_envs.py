"""Gymnasium environments that are unusual: `--env-id faulty_envs:Hidden-v0`.

Importing this module registers them. All are one walk on a line: the observation is the position
and the steps so far, the action is the stride, an episode takes 40 steps.
"""

import random

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Graph, Sequence


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

    drift = 0.0

    def step(self, action):
        self.drift += 0.01 * np.random.randn()
        self.position += self.drift
        obs, reward, _, *rest = super().step(action)
        return obs, reward, random.random() < 0.03, *rest


class Odd(Walk):
    """A generator of its own, one-hot contexts, a Unix time, an array as reward, torch in float64,
    one dictionary for all infos, and a success that is there only if there is one."""

    every = Box(-np.inf, np.inf, (3,), np.float64)
    observation_space = Dict({"context": every, "walk": every})
    np_random = property(lambda self: self.generator)  # without a setter

    def __init__(self):
        torch.set_default_dtype(torch.float64)
        self.generator, self.episode, self.info = np.random.RandomState(0), 0, {}

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.generator.seed(seed)
        self.episode += 1  # the first episode has a context of its own
        self.context = 0 if self.episode == 1 else self.generator.randint(1, 3)
        self.position, self.time = self.generator.uniform(-1, 1), 0
        return self.observe(), self.info

    def step(self, action):
        obs, reward, *rest, _ = super().step(action)
        self.info.pop("success", None)
        if self.context == 2 and self.time == 20:
            self.info["success"] = np.array([3])
        return obs, np.array([reward]), *rest, self.info

    def observe(self):
        walk = np.array([self.position, self.time, 1.7e9 + self.time])
        return {"context": np.eye(3)[self.context], "walk": walk}


def actions(largest: float, dtype: type) -> dict:
    return {"action_space": Box(-largest, largest, (1,), dtype)}


for name, kind, changes in (
    ("Walk", Walk, {}), ("faulty/Walk", Walk, {}), ("Hidden", Hidden, {}), ("Odd", Odd, {}),
    ("Cliff", Walk, {"cliff": 5}),
    ("Huge", Walk, {"weight": 1e30}),  # the square of a reward overflows a 32-bit float
    ("Integers", Walk, actions(5, np.int64)), ("NoBounds", Walk, actions(np.inf, np.float32)),
    ("LargeBounds", Walk, actions(np.finfo(np.float32).max, np.float32)),
    ("Sequence", Walk, {"observation_space": Sequence(Box(-1, 1, (2,)))}),
    ("Graph", Walk, {"observation_space": Graph(Box(-1, 1, (2,)), None)}),
):
    gym.register(f"{name}-v0", kind, max_episode_steps=40, kwargs=changes)
# a success at step 21, in pictures
FILM = {"infos": [{}] * 21 + [{"success": True}] + [{}] * 78, "render_mode": None}
gym.register("Film-v0", Walk, max_episode_steps=100, kwargs=FILM)
