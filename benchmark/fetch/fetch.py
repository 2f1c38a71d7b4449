"""Gymnasium-Robotics' Fetch tasks, with one observation space for all, and a push controller.

    python benchmark/fetch/fetch.py     # writes runs/fetch/Push-v0.pt, a clone of the controller
    export PYTHONPATH=benchmark/fetch   # so that cup.py finds this module
    python cup.py --env-id fetch:PickAndPlace-v0 --sources runs/fetch/Push-v0.pt

An observation has 31 numbers: where the object is (3), the goal (3), the hand (3), the object
again (3), from the hand to the object (3), the fingers (2), the object's rotation and velocities
(9), the hand's and the fingers' velocities (5). Reach has no object: its numbers are zero there,
and a policy file ignores what its own task has never shown.
"""

import sys
from pathlib import Path

import gymnasium as gym
import gymnasium_robotics
import numpy as np
import torch

gym.register_envs(gymnasium_robotics)


class Reach(gym.ObservationWrapper):
    """FetchReachDense, seen through the numbers of the tasks with an object."""

    def __init__(self, **options):
        super().__init__(gym.make("FetchReachDense-v4", **options))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (31,), np.float64)

    def observation(self, observation: dict) -> np.ndarray:
        hand, fingers, velocities = np.split(observation["observation"], [3, 5])
        seen = np.zeros(31)
        seen[3:6], seen[6:9] = observation["desired_goal"], hand
        seen[15:17], seen[26:31] = fingers, velocities
        return seen


def with_object(env_id: str):
    """A task with an object: its Dict of observations in one vector, the achieved goal first."""
    return lambda **options: gym.wrappers.FlattenObservation(gym.make(env_id, **options))


gym.register("Reach-v0", Reach)
gym.register("Push-v0", with_object("FetchPushDense-v4"))
gym.register("PickAndPlace-v0", with_object("FetchPickAndPlaceDense-v4"))


def push(obs: np.ndarray) -> np.ndarray:
    """A controller: go over the object to the side that the goal is not on, down, and push."""
    goal, hand, thing = obs[3:6], obs[6:9], obs[9:12]
    way = (goal - thing) * [1, 1, 0]
    distance = np.linalg.norm(way)
    direction = way / max(distance, 1e-6)
    along = (hand - thing) @ direction  # negative: the hand is behind the object
    aside = np.linalg.norm((hand - thing) * [1, 1, 0] - along * direction)
    low = abs(hand[2] - thing[2]) < 0.03
    behind = thing - 0.09 * direction
    if distance < 0.02:
        aim = hand
    elif low and aside < 0.02 and along < 0:
        aim = thing + min(distance, 0.1) * direction
    elif np.linalg.norm((hand - behind)[:2]) < 0.02 or (low and along < -0.06):
        aim = behind
    else:
        aim = behind + [0, 0, 0.1 if hand[2] > thing[2] + 0.07 else 0.15]
    return np.append(np.clip((aim - hand) / 0.05, -1, 1), -1).astype(np.float32)


if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[2]
    sys.path.insert(0, str(ROOT))
    import train_sources

    torch.manual_seed(1)
    torch.set_num_threads(1)
    args = train_sources.Args(output_dir=ROOT / "runs" / "fetch")
    # not fetch:Push-v0, which would import this file a second time
    train_sources.clone_controller(args, "Push-v0", push, episodes=400)
