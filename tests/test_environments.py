"""Environments: the paper's Meta-World protocol, and any other Gymnasium id."""

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from program import SMALL, run_cup

import cup

TARGETS = "peg-insert-side hammer push-wall pick-place-wall push-back shelf-place"
TARGETS = [f"{task}-v2" for task in TARGETS.split()]


def goal(obs):
    return obs[..., -3:]


def goals_of(reset, episodes=4):
    """The goals of the next episodes, one a row."""
    return np.concatenate([goal(np.atleast_2d(reset()[0])) for _ in range(episodes)])


def random_actions(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


# ------------------------------------- Meta-World --------------------------------------


@pytest.mark.parametrize("task", ["reach-v2", *TARGETS])
def test_goal_is_visible_and_redrawn_for_every_episode(task):
    env = cup.make_env(task, seed=1)
    assert env.observation_space.shape == (39,)
    assert env.action_space.shape == (4,)
    goals, layouts = set(), set()
    for _ in range(3):
        obs, _ = env.reset()
        np.testing.assert_allclose(goal(obs), env.unwrapped._target_pos)
        goals.add(tuple(goal(obs)))
        layouts.add(tuple(obs))
        stepped = env.step(np.zeros(4, np.float32))[0]
        np.testing.assert_array_equal(goal(stepped), goal(obs))
    assert len(layouts) == 3
    # Meta-World's hammer task draws the place of the hammer; its nail stays where it is
    assert len(goals) == (1 if task == "hammer-v2" else 3)


def test_same_seed_same_goals_other_seed_other_goals():
    np.random.seed(5)  # the goals depend on no generator but the environment's own
    ours = goals_of(cup.make_env("reach-v2", seed=1).reset)
    np.random.seed(6)
    same = goals_of(cup.make_env("reach-v2", seed=1).reset)
    other = goals_of(cup.make_env("reach-v2", seed=2).reset)
    np.testing.assert_array_equal(ours, same)
    assert not set(map(tuple, ours)) & set(map(tuple, other))


def test_evaluation_goals_are_never_training_goals():
    goals = []
    for stream in (0, 1, 2):  # training, evaluation during training, --evaluate
        envs = cup.VectorEnv("reach-v2", 2, 1, stream)
        reset = functools.partial(envs.call, "reset")
        goals.append({tuple(row) for row in goals_of(reset, episodes=10)})
        envs.close()
        assert len(goals[-1]) == 20  # nor do two environments share a goal
    assert len(set.union(*goals)) == 60


def test_v2_and_v3_are_names_of_the_same_task():
    old, new = (cup.make_env(f"push-wall-v{digit}", seed=3) for digit in "23")
    np.testing.assert_array_equal(old.reset()[0], new.reset()[0])
    for action in random_actions(old, 20):
        (obs, reward, *_), (other_obs, other_reward, *_) = (
            old.step(action),
            new.step(action),
        )
        np.testing.assert_array_equal(obs, other_obs)
        assert reward == other_reward


def test_an_episode_is_500_steps_then_truncated_and_summed_up(monkeypatch):
    env = cup.make_env("reach-v2", seed=1)
    heard, metaworld_step = [], env.env.step

    def spy(action):
        heard.append(metaworld_step(action))
        return heard[-1]

    monkeypatch.setattr(env.env, "step", spy)
    obs, _ = env.reset()
    for step in range(1, 501):
        # to the goal and, in the end, far from it: success comes, and has gone again
        direction = 10 * (goal(obs) - obs[:3]) if step < 450 else np.array([0, -1, 0])
        action = np.append(direction, 0).clip(-1, 1)
        obs, _, terminated, truncated, info = env.step(action)
        assert not terminated
        assert truncated == (step == 500)
        assert bool(info) == truncated
    rewards = [reward for _, reward, *_ in heard]
    successes = [info["success"] for *_, info in heard]
    assert max(successes) == 1
    assert successes[-1] == 0
    assert info == {"return": pytest.approx(sum(rewards)), "success": 1.0}
    assert 0 <= min(rewards) <= max(rewards) <= 10  # as in v2


@pytest.mark.parametrize("task", ["peg-insert-side-v2", "Pendulum-v1"])
def test_an_episode_is_rebuilt_bit_for_bit_from_its_number_and_actions(task):
    env = cup.make_env(task, seed=7)
    actions = random_actions(env, 50)
    for _ in range(3):
        env.reset()
    for action in actions[:40]:
        obs = env.step(action)[0]

    rebuilt = cup.make_env(task, seed=7)
    rebuilt.resume_from = 2, actions[:40]
    np.testing.assert_array_equal(rebuilt.reset()[0], obs)
    assert rebuilt.episode_return == env.episode_return
    for action in actions[40:]:
        ours, theirs = env.step(action), rebuilt.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
    np.testing.assert_array_equal(env.reset()[0], rebuilt.reset()[0])  # the next one


# --------------------------------- other environments ----------------------------------


def test_actions_are_rescaled_from_minus_one_to_one():
    env, raw = cup.make_env("Pendulum-v1", seed=1), gym.make("Pendulum-v1")
    assert env.action_space == gym.spaces.Box(-1, 1, (1,), np.float32)
    assert raw.action_space == gym.spaces.Box(-2, 2, (1,), np.float32)
    raw.reset(seed=cup.derive_seed(1, 0))
    env.reset()
    for action in random_actions(env, 20):
        np.testing.assert_allclose(env.step(action)[0], raw.step(2 * action)[0])


def test_observations_of_any_shape_are_flattened():
    env = cup.make_env("faulty_envs:Grid-v0", seed=1)
    assert env.reset()[0].shape == (6,)


def test_success_is_nan_where_the_task_has_none():
    env = cup.make_env("Pendulum-v1", seed=1)
    env.reset()
    for action in random_actions(env, 200):
        *_, truncated, info = env.step(action)
    assert truncated
    assert np.isnan(info["success"])


def transitions(tmp_path, env_id, obs_dim, action_dim=1):
    """What a real run of 2 x 300 random steps left in its replay buffer, by column."""
    run_dir = tmp_path / "run"
    arguments = ["--env-id", env_id, "--sources", *SMALL, "--run-dir", run_dir]
    length = ["--total-timesteps", "602", "--learning-starts", "600"]
    result = run_cup(*arguments, *length)
    assert result.returncode == 0, result.stderr
    buffer = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]
    assert len(buffer) == 602
    by_environment = buffer.unflatten(0, (-1, 2))  # (step, environment, column)
    return by_environment.split([obs_dim, obs_dim, action_dim, 1, 1], dim=2)


def restarts(obs, next_obs):
    """Where the next transition does not go on from here: a new episode began."""
    return (next_obs[:-1] != obs[1:]).any(dim=2)


def test_terminations_are_honoured(tmp_path):
    obs, next_obs, _, _, terminated = transitions(tmp_path, "InvertedPendulum-v5", 4)
    fallen = (
        next_obs[:, :, 1].abs() > 0.2
    )  # the task's own criterion, on the last state
    assert fallen.sum() > 10
    assert torch.equal(terminated.squeeze(2) == 1, fallen)
    assert torch.equal(restarts(obs, next_obs), fallen[:-1])


def test_time_limits_are_no_terminations(tmp_path):
    obs, next_obs, _, _, terminated = transitions(tmp_path, "Pendulum-v1", 3)
    assert not terminated.any()
    ends = restarts(obs, next_obs).nonzero().tolist()
    assert ends == [[199, 0], [199, 1]]
    # the transition leads to the state the episode stopped in: half a turn at most away
    moved = (next_obs - obs)[199, :, :2].norm(dim=1)
    assert (moved <= 8 * 0.05 + 1e-4).all()  # maximal speed times the time step
