"""Environments: the paper's Meta-World protocol, and any other Gymnasium id."""

import random

import numpy as np
import pytest
import torch
from program import SMALL, checkpoint_of, metrics, succeed, weights

import cup

TASKS = "reach peg-insert-side hammer push-wall pick-place-wall push-back shelf-place".split()


def random_actions(env, steps):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


def walk(kind):
    """One of the `faulty_envs`, at the beginning of an episode."""
    env = cup.make_env(f"faulty_envs:{kind}-v0", seed=1)
    env.reset()
    return env


# ---- Meta-World ----------------------------------------------------------------------------------
@pytest.mark.parametrize("task", TASKS)
def test_goal_is_visible_and_redrawn_for_every_episode(task):
    env = cup.make_env(f"{task}-v2", seed=1)
    assert (env.observation_space.shape, env.action_space.shape) == ((39,), (4,))
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
    assert len(seen) == (1 if task == "hammer" else 3)


@pytest.mark.parametrize("env_id", ["reach-v2", "faulty_envs:GlobalDraws-v0"])
def test_seeds_streams_and_environments_share_no_start(env_id):
    """Whatever the generators did that all share, and from which the second task draws."""

    def starts(seed, stream):
        """Of five episodes each; on Meta-World what comes last is the goal."""
        envs = cup.make_envs(env_id, 2, seed, stream)
        return [tuple(obs[-3:]) for _ in range(5) for obs in envs.reset()[0]]

    streams = 0, 1, 2  # training, evaluation during training, --evaluate
    seen = [start for seed in (1, 2) for stream in streams for start in starts(seed, stream)]
    assert len(set(seen)) == 2 * 3 * 2 * 5
    random.seed()  # anew
    np.random.seed()
    assert starts(1, 0) == seen[:10]


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


def test_evaluate_plays_the_mean_action_from_first_episode_on():
    """A policy whose mean is 0, against an environment to which nothing is done."""
    actor, env, idle = cup.Actor(3, 1, []), *(cup.make_env("Pendulum-v1", seed=1) for _ in range(2))
    torch.nn.init.zeros_(actor.net[-1].weight)
    torch.nn.init.zeros_(actor.net[-1].bias)
    returns, successes = cup.evaluate(actor, env, episodes=2, first_episode=1)
    expected = []
    for _ in range(3):
        idle.reset()
        expected.append(sum(idle.step(np.zeros(1, np.float32))[1] for _ in range(200)))
    np.testing.assert_allclose(returns, expected[1:])
    assert np.isnan(successes).all()  # Pendulum has none
    sampled, _ = cup.evaluate(actor, env, episodes=2, first_episode=1, sample=True)
    assert (sampled != returns).all()


@pytest.mark.parametrize("task", ["peg-insert-side-v2", "Pendulum-v1"])
def test_an_episode_is_rebuilt_bit_for_bit_from_its_number_and_actions(task):
    env, rebuilt = cup.make_env(task, seed=7), cup.make_env(task, seed=7)
    actions = random_actions(env, 50)
    for _ in range(3):
        env.reset()
    for action in actions[:40]:
        obs = env.step(action)[0]

    rebuilt.start_at = env.episode, env.actions
    np.testing.assert_array_equal(rebuilt.reset()[0], obs)
    assert rebuilt.episode_return == env.episode_return
    for action in actions[40:]:
        ours, theirs = env.step(action), rebuilt.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
    np.testing.assert_array_equal(env.reset()[0], rebuilt.reset()[0])  # the next one


# ---- other environments --------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["Walk", "Column", "Scalar", "Constant", "Uneven"])
def test_actions_from_minus_one_to_one_span_the_environments_own_space(kind):
    """In its own shape, and never outside its bounds: a Walk refuses what is not in its space."""
    env = walk(kind)
    low, high = env.unwrapped.action_space.low, env.unwrapped.action_space.high
    assert env.action_space.shape == (low.size,)
    for share in (0, 0.25, 0.6, np.nextafter(np.float32(1), 0), 1):
        obs, *_ = env.step(np.full(low.size, 2 * share - 1, np.float32))
        np.testing.assert_allclose(env.unwrapped.action, low + share * (high - low), rtol=1e-5)
        assert obs.shape == (2,)


def test_observations_of_any_kind_become_one_row_of_numbers():
    assert cup.make_env("faulty_envs:Grid-v0", seed=1).reset()[0].shape == (6,)
    env = walk("Goals")
    obs, *_ = env.step(np.zeros(1, np.float32))
    position = env.unwrapped.position  # in the order of the names
    np.testing.assert_allclose(obs, [position, 7, position, 1], rtol=1e-6)
    assert obs.dtype == np.float32


@pytest.mark.parametrize(("kind", "success"), [("Walk", np.nan), ("Solved", 1.0)])
def test_success_is_any_step_and_nan_where_the_task_has_none(kind, success):
    env = walk(kind)
    for action in random_actions(env, 40):
        *_, truncated, info = env.step(action)
    assert truncated
    assert info == {"return": 40.0, "success": pytest.approx(success, nan_ok=True)}
    env.reset()
    assert np.isnan(env.success)  # of this episode nothing is known


def test_what_the_random_steps_do_not_show_is_seen_later_and_ignored_if_never(tmp_path):
    """A learner sees it all along; a policy is blind for what its own task never showed."""
    typed = ["--env-id", "faulty_envs:Grasp-v0", "--sources", *SMALL, "--eval-interval", 40]
    for total, shown in [(40, 0), (80, 1)]:
        run_dir = tmp_path / str(total)
        succeed(*typed, "--total-timesteps", total, "--run-dir", run_dir)
        scale = weights(run_dir)["standardize.scale"]
        assert scale[2:].tolist() == [shown, 0]
        assert (scale[:2] > 0).all()
        agent = checkpoint_of(run_dir)["agent"]
        for network in ("actor", "critic", "target_critic"):
            assert agent[f"{network}.standardize.scale"][2:].tolist() == [1, 1]
            assert (agent[f"{network}.standardize.scale"][:2] < 1).all()  # they vary by more


def transitions(tmp_path, env_id):
    """The transitions (step, environment, ...) of 2 x 300 random steps in a run, and where the next
    one does not go on from there, as a new episode began.
    """
    typed = ["--env-id", env_id, "--sources", *SMALL, "--run-dir", tmp_path / "run"]
    succeed(*typed, "--total-timesteps", 602, "--learning-starts", 600)
    columns = checkpoint_of(tmp_path / "run")["agent"]["buffer._extra_state"]["columns"]
    batch = cup.Batch(*(column.unflatten(0, (301, 2)) for column in columns))
    return batch, (batch.next_obs[:-1] != batch.obs[1:]).any(dim=2)


def test_terminations_are_honoured(tmp_path):
    batch, restarts = transitions(tmp_path, "InvertedPendulum-v5")
    fallen = batch.next_obs[:, :, 1].abs() > 0.2  # the task's own criterion, on the last state
    assert fallen.sum() > 20
    assert ((batch.terminated == 1) == fallen).all()
    assert (restarts == fallen[:-1]).all()
    returns, total = [], torch.zeros(2)
    for reward, ends in zip(batch.reward, fallen, strict=True):
        total += reward
        returns += total[ends].tolist()
        total[ends] = 0
    logged = float(metrics(tmp_path / "run")[-1]["train/return"])
    assert logged == pytest.approx(np.mean(returns[-20:]))


def test_time_limits_are_no_terminations(tmp_path):
    batch, restarts = transitions(tmp_path, "Pendulum-v1")
    assert not batch.terminated.any()
    assert restarts.nonzero().tolist() == [[199, 0], [199, 1]]
    # the transition leads to the state the episode stopped in: half a turn at most away
    moved = (batch.next_obs - batch.obs)[199, :, :2].norm(dim=1)
    assert (moved <= 8 * 0.05 + 1e-4).all()  # maximal speed times the time step
    assert batch.action.min() < -0.9 and batch.action.max() > 0.9  # random: of the whole range
