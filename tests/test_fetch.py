"""benchmark/fetch: three tasks with one observation space, and a controller that pushes."""

import sys
from pathlib import Path

import numpy as np

import cup

sys.path.append(str(Path(__file__).parents[1] / "benchmark" / "fetch"))
import fetch


def observations(env_id: str, steps: int = 20) -> np.ndarray:
    env = cup.make_env(f"fetch:{env_id}", seed=1)
    env.action_space.seed(1)
    seen = [env.reset(seed=1)[0]]
    for _ in range(steps):
        seen.append(env.step(env.action_space.sample())[0])
    return np.array(seen)


def test_the_tasks_have_one_observation_space():
    """At the same place in it lies the same thing; of an object Reach knows nothing."""
    reach, push = observations("Reach-v0"), observations("Push-v0")
    assert reach.shape == push.shape == observations("PickAndPlace-v0").shape == (21, 31)
    assert np.array_equal(push[:, :3], push[:, 9:12])
    np.testing.assert_allclose(push[:, 12:15], push[:, 9:12] - push[:, 6:9], atol=1e-6)
    unseen = (reach == 0).all(axis=0)
    assert [*np.flatnonzero(unseen)] == [0, 1, 2, *range(9, 15), *range(17, 26)]
    inside = np.abs(reach[:, 6:9] - push[0, 6:9]).max(axis=0)  # the hand, in metres
    assert (inside < 0.5).all()


def test_the_controller_pushes():
    env, wins = cup.make_env("fetch:Push-v0", seed=1), []
    for episode in range(10):
        obs, info = env.reset(seed=None if episode else 1)[0], {}
        while not info:  # it comes with the episode's end
            obs, _, _, _, info = env.step(fetch.push(obs))
        wins.append(info["success"])
    assert np.mean(wins) >= 0.7  # 0.8 of 30
