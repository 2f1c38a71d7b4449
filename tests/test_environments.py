"""Environments: the paper's Meta-World protocol, and any other Gymnasium id."""

import random

import gymnasium as gym
import numpy as np
import pytest
import torch
from program import SMALL, call_cup, weights

import cup

TARGETS = "peg-insert-side hammer push-wall pick-place-wall push-back shelf-place"
TARGETS = [f"{task}-v2" for task in TARGETS.split()]


def goals(env, episodes=4):
    """The goals of the next episodes, one a row."""
    return np.concatenate([np.atleast_2d(env.reset()[0])[:, -3:] for _ in range(episodes)])


def random_actions(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


def walk(kind, seed=1):
    """One of the `faulty_envs`, at the beginning of an episode."""
    env = cup.make_env(f"faulty_envs:{kind}-v0", seed)
    env.reset()
    return env


# ---- Meta-World ----------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["reach-v2", *TARGETS])
def test_goal_is_visible_and_redrawn_for_every_episode(task):
    env = cup.make_env(task, seed=1)
    assert env.observation_space.shape == (39,)
    assert env.action_space.shape == (4,)
    seen, layouts = set(), set()
    for _ in range(3):
        obs, _ = env.reset()
        np.testing.assert_allclose(obs[-3:], env.unwrapped._target_pos)
        seen.add(tuple(obs[-3:]))
        layouts.add(tuple(obs))
        stepped = env.step(np.zeros(4, np.float32))[0]
        np.testing.assert_array_equal(stepped[-3:], obs[-3:])
    assert len(layouts) == 3
    # Meta-World's hammer task draws the place of the hammer; its nail stays where it is
    assert len(seen) == (1 if task == "hammer-v2" else 3)


def test_same_seed_same_goals_other_seed_other_goals():
    np.random.seed(5)  # the goals depend on no generator but the environment's own
    ours = goals(cup.make_env("reach-v2", seed=1))
    np.random.seed(6)
    np.testing.assert_array_equal(ours, goals(cup.make_env("reach-v2", seed=1)))
    other = goals(cup.make_env("reach-v2", seed=2))
    assert not set(map(tuple, ours)) & set(map(tuple, other))


def test_evaluation_goals_are_never_training_goals():
    streams = []
    for stream in (0, 1, 2):  # training, evaluation during training, --evaluate
        envs = cup.make_envs("reach-v2", 2, 1, stream)
        streams.append({tuple(goal) for goal in goals(envs, episodes=10)})
        assert len(streams[-1]) == 20  # nor do two environments share a goal
    assert len(set.union(*streams)) == 60


def test_v2_and_v3_are_names_of_the_same_task():
    old, new = (cup.make_env(f"push-wall-v{digit}", seed=3) for digit in "23")
    np.testing.assert_array_equal(old.reset()[0], new.reset()[0])
    for action in random_actions(old, 20):
        (obs, reward, *_), (other_obs, other_reward, *_) = old.step(action), new.step(action)
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
        direction = 10 * (obs[-3:] - obs[:3]) if step < 450 else np.array([0, -1, 0])
        obs, _, terminated, truncated, info = env.step(np.append(direction, 0).clip(-1, 1))
        assert not terminated
        assert bool(info) == truncated == (step == 500)
    rewards, successes = zip(*((reward, info["success"]) for _, reward, *_, info in heard))
    assert max(successes) == 1
    assert successes[-1] == 0
    assert info == {"return": pytest.approx(sum(rewards)), "success": 1.0}
    assert 0 <= min(rewards) <= max(rewards) <= 10  # as in v2


@pytest.mark.parametrize("task", ["peg-insert-side-v2", "Pendulum-v1"])
def test_an_episode_is_rebuilt_bit_for_bit_from_its_number_and_actions(task):
    env, rebuilt = cup.make_env(task, seed=7), cup.make_env(task, seed=7)
    actions = random_actions(env, 50)
    for _ in range(3):
        env.reset()
    for action in actions[:40]:
        obs = env.step(action)[0]

    rebuilt.start_at = env.episode, np.array(env.actions)
    np.testing.assert_array_equal(rebuilt.reset()[0], obs)
    assert rebuilt.episode_return == env.episode_return
    for action in actions[40:]:
        ours, theirs = env.step(action), rebuilt.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
    np.testing.assert_array_equal(env.reset()[0], rebuilt.reset()[0])  # the next one


# ---- other environments --------------------------------------------------------------------------
def test_actions_are_rescaled_from_minus_one_to_one():
    env, raw = cup.make_env("Pendulum-v1", seed=1), gym.make("Pendulum-v1")
    assert env.action_space == gym.spaces.Box(-1, 1, (1,), np.float32)
    assert raw.action_space == gym.spaces.Box(-2, 2, (1,), np.float32)
    raw.reset(seed=cup.derive_seed(1, 0))
    env.reset()
    for action in random_actions(env, 20):
        np.testing.assert_allclose(env.step(action)[0], raw.step(2 * action)[0])


@pytest.mark.parametrize(("kind", "shape"), [("Column", (3, 1)), ("Scalar", ()), ("Walk", (1,))])
def test_actions_have_the_shape_of_the_environments_own_space(kind, shape):
    env = walk(kind)
    size = int(np.prod(shape))
    assert env.action_space.shape == (size,)
    action = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    obs, *_ = env.step(action)  # it refuses what is not in its space
    high = env.unwrapped.action_space.high
    np.testing.assert_allclose(env.unwrapped.action, high * action.reshape(shape))
    assert obs.shape == (2,)


def test_an_action_that_may_not_change_is_that_constant():
    env = walk("Constant")
    for first, second in [(-1, -1), (0.5, 0.2), (1, 1)]:
        env.step(np.array([first, second], np.float32))
        np.testing.assert_array_equal(env.unwrapped.action, np.array([first, 0.3], np.float32))


def test_rounding_never_leaves_the_bounds():
    env = walk("Uneven")
    for action, bound in [(-1, -2.3), (1, 1.37), (np.nextafter(np.float32(1), 0), 1.37)]:
        env.step(np.array([action], np.float32))  # it refuses what is not in its space
        assert env.unwrapped.action.item() == pytest.approx(bound)


def test_observations_of_any_kind_become_one_row_of_numbers():
    assert cup.make_env("faulty_envs:Grid-v0", seed=1).reset()[0].shape == (6,)
    env = walk("Goals")
    obs, *_ = env.step(np.zeros(1, np.float32))
    position = env.unwrapped.position  # in the order of the names
    np.testing.assert_allclose(obs, [position, 7, position, 1], rtol=1e-6)
    env = walk("Fractions")
    envs = cup.make_envs("faulty_envs:Fractions-v0", 2, 1, 0)
    for one in (env.step(np.full(1, 0.3, np.float32))[0], *envs.reset()[0]):
        assert one.dtype == np.float32
        assert one[0] % 1 != 0


def test_success_is_any_step_and_nan_where_the_task_has_none():
    for kind, success in [("Walk", np.nan), ("Solved", 1.0)]:
        env = walk(kind)
        for action in random_actions(env, 40):
            *_, truncated, info = env.step(action)
        assert truncated
        assert info == {"return": 40.0, "success": pytest.approx(success, nan_ok=True)}


def test_generators_that_all_share_are_seeded_too():
    def starts(seed, stream):
        envs = cup.make_envs("faulty_envs:GlobalDraws-v0", 2, seed, stream)
        return np.concatenate([envs.reset()[0][:, 0] for _ in range(3)]).tolist()

    ours, evaluation, other_seed = starts(1, 0), starts(1, 1), starts(2, 0)
    random.seed(5)
    np.random.seed(5)
    assert starts(1, 0) == ours
    assert len({*ours, *evaluation, *other_seed}) == 18


def test_what_the_random_steps_do_not_show_is_seen_later_and_ignored_if_never(tmp_path):
    """A learner sees it all along; a policy is blind for what its own task never showed."""
    typed = ["--env-id", "faulty_envs:Grasp-v0", "--sources", *SMALL, "--eval-interval", 40]
    for total, shown in [(40, 0), (80, 1)]:
        run_dir = tmp_path / str(total)
        assert call_cup(*typed, "--total-timesteps", total, "--run-dir", run_dir).returncode == 0
        scale = weights(run_dir)["standardize.scale"]
        assert scale[2:].tolist() == [shown, 0]
        assert (scale[:2] > 0).all()
        agent = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
        for network in ("actor", "critic", "target_critic"):
            assert agent[f"{network}.standardize.scale"][2:].tolist() == [1, 1]


def transitions(tmp_path, env_id, obs_dim, action_dim=1):
    """What a real run of 2 x 300 random steps left in its replay buffer, by column."""
    typed = ["--env-id", env_id, "--sources", *SMALL, "--run-dir", tmp_path / "run"]
    result = call_cup(*typed, "--total-timesteps", 602, "--learning-starts", 600)
    assert result.returncode == 0, result.stderr
    agent = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    rows = agent["_extra_state"]["buffer"]["rows"]
    assert len(rows) == 602
    by_environment = rows.unflatten(0, (-1, 2))  # (step, environment, column)
    return by_environment.split([obs_dim, obs_dim, action_dim, 1, 1], dim=2)


def restarts(obs, next_obs):
    """Where the next transition does not go on from here: a new episode began."""
    return (next_obs[:-1] != obs[1:]).any(dim=2)


def test_terminations_are_honoured(tmp_path):
    obs, next_obs, _, _, terminated = transitions(tmp_path, "InvertedPendulum-v5", 4)
    fallen = next_obs[:, :, 1].abs() > 0.2  # the task's own criterion, on the last state
    assert fallen.sum() > 10
    assert torch.equal(terminated.squeeze(2) == 1, fallen)
    assert torch.equal(restarts(obs, next_obs), fallen[:-1])


def test_time_limits_are_no_terminations(tmp_path):
    obs, next_obs, _, _, terminated = transitions(tmp_path, "Pendulum-v1", 3)
    assert not terminated.any()
    assert restarts(obs, next_obs).nonzero().tolist() == [[199, 0], [199, 1]]
    # the transition leads to the state the episode stopped in: half a turn at most away
    moved = (next_obs - obs)[199, :, :2].norm(dim=1)
    assert (moved <= 8 * 0.05 + 1e-4).all()  # maximal speed times the time step
