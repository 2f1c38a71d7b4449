"""Environments: the paper's Meta-World protocol, and any other Gymnasium id."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from program import SMALL, checkpoint_of, succeed

import cup

TASKS = "peg-insert-side hammer push-wall pick-place-wall push-back shelf-place".split()


@pytest.mark.parametrize("task", TASKS)
def test_goal_is_visible_and_drawn_anew_for_every_episode(task):
    env, starts = cup.make_env(f"{task}-v2", seed=1), []
    assert (env.observation_space.shape, env.action_space.shape) == ((39,), (4,))
    for _ in range(3):
        starts.append(env.reset()[0])
        np.testing.assert_allclose(starts[-1][-3:], env.unwrapped._target_pos)
        later = env.step(np.zeros(4, np.float32))[0]
        np.testing.assert_array_equal(later[-3:], starts[-1][-3:])
    assert len({tuple(obs) for obs in starts}) == 3
    # Meta-World's hammer task draws the place of the hammer; its nail stays where it is
    assert len({tuple(obs[-3:]) for obs in starts}) == (1 if task == "hammer" else 3)


def test_an_episode_is_500_steps_then_truncated_and_summed_up(monkeypatch):
    env = cup.make_env("reach-v2", seed=1)
    heard, step_of = [], env.unwrapped.step
    monkeypatch.setattr(env.unwrapped, "step", lambda a: heard.append(step_of(a)) or heard[-1])
    obs, _ = env.reset()
    for step in range(1, 501):
        # to the goal and, in the end, far from it: success comes, and has gone again
        direction = 10 * (obs[-3:] - obs[:3]) if step < 450 else np.array([0, -1, 0])
        obs, _, terminated, truncated, info = env.step(np.append(direction, 0).clip(-1, 1))
        assert not terminated and bool(info) == truncated == (step == 500)
    rewards, successes = zip(*((reward, info["success"]) for _, reward, *_, info in heard))
    assert max(successes) == 1 and successes[-1] == 0
    assert info == {"return": pytest.approx(sum(rewards)), "success": 1.0}
    assert 0 <= min(rewards) <= max(rewards) <= 10  # as in v2


@pytest.mark.parametrize("env_id", ["push-wall-v2", "Pendulum-v1", "faulty_envs:Odd-v0"])
def test_a_seed_fixes_the_episodes(env_id):
    """v2 and v3 are names of the same Meta-World task."""
    seen = []
    for name, seed in (env_id, 3), (env_id.replace("-v2", "-v3"), 3), (env_id, 4):
        env = cup.make_env(name, seed)
        action = np.full(env.action_space.shape, 0.3, np.float32)
        seen.append([*env.reset(seed=seed)[0], *env.reset()[0], *env.step(action)[:2]])
    assert str(seen[0]) == str(seen[1]) != str(seen[2])


def test_actions_from_minus_one_to_one_span_the_bounds_and_never_leave_them():
    """A Walk refuses actions outside its space. The second action of every tenth is constant."""
    rng, spaces = np.random.default_rng(0), [Box(-1, 1, (3, 1)), Box(-1, 1, ())]
    for k in range(200):
        low = rng.normal(size=2) * 10 ** rng.uniform(-3, 3)
        width = rng.exponential(size=2) * 10 ** rng.uniform(-3, 3) * [1, k % 10 > 0]
        spaces.append(Box(*np.float32([low, low + width])))
    for space in spaces:
        env = cup.make_env("faulty_envs:Walk-v0", 1, action_space=space)
        env.reset()
        for share in (0, 0.25, np.nextafter(np.float32(1), 0), 1):
            env.step(np.full(space.low.size, 2 * share - 1, np.float32))
            expected = space.low + share * (space.high.astype(float) - space.low)
            atol = 1e-6 * np.abs([space.low, space.high]).max()
            np.testing.assert_allclose(env.unwrapped.action, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind", ["Integers", "NoBounds", "Sequence"])
def test_spaces_that_cannot_be_learnt_in_are_named(kind):
    with pytest.raises(cup.UserError, match=f"{kind}-v0.*(Box|no fixed size)"):
        cup.make_env(f"faulty_envs:{kind}-v0", seed=1)


@pytest.mark.parametrize(("infos", "success"), [
    ([{"success": None}], np.nan), ([{"success": np.array([True])}, {"success": False}], 1),
    ([{"is_success": False}] * 9 + [{"is_success": 3}], 1), ([{"is_success": np.nan}, {}], 0),
])
def test_evaluate_plays_the_mean_action_and_sums_up_episodes(infos, success, monkeypatch):
    """Success is that of any step, and unknown if no step says anything of it."""
    make_env = cup.make_env

    def actor(obs):
        return torch.full((len(obs), 1), 0.3), torch.zeros(len(obs), 1)

    monkeypatch.setattr(cup, "make_env", lambda *of_env: make_env(*of_env, infos=infos))
    scores = cup.evaluate(actor, "faulty_envs:Walk-v0", episodes=2, seed=5)
    env, stride = make_env("faulty_envs:Walk-v0", 5), 2 * np.tanh(0.3)
    for seed, score in zip((5, None), scores, strict=True):
        position = env.reset(seed=seed)[0][0]
        expected = -sum(abs(position + (step + 1) * stride) for step in range(40))
        assert score == pytest.approx((expected, success), nan_ok=True)


def test_what_a_run_stores(tmp_path):
    """Terminations, not time limits; the true last observation; random actions at first.

    Episodes begin anew, and differently in each environment, at the checkpoints."""
    typed = ["--env-id", "faulty_envs:Cliff-v0", "--sources", *SMALL, "--run-dir", tmp_path]
    typed += ["--total-timesteps", 602, "--learning-starts", 600, "--checkpoint-interval", 200]
    succeed(*typed)
    rows = checkpoint_of(tmp_path)["agent"]["_extra_state"]["rows"]
    batch = cup.Batch(*(column.unflatten(0, (301, 2)) for column in rows))  # (step, environment)
    assert torch.equal(batch.next_obs[..., 1], batch.obs[..., 1] + 1)  # the time in the episode
    fallen, late = batch.next_obs[..., 0].abs() > 5, batch.next_obs[..., 1] == 40
    assert fallen.sum() > 10 and (late & ~fallen).sum() > 2
    assert torch.equal(batch.terminated == 1, fallen)
    last = torch.tensor([99, 199, 299])
    assert batch.obs[last + 1][..., 0].unique().numel() == 6
    restarts = (batch.next_obs[:-1] != batch.obs[1:]).any(dim=2)
    assert torch.equal(restarts, (fallen | late)[:-1].index_fill(0, last, True))
    assert batch.action.min() < -0.95 and batch.action.max() > 0.95
    stride, moved = 2 * batch.action.squeeze(2), (batch.next_obs - batch.obs)[..., 0]
    torch.testing.assert_close(moved, stride, check_dtype=False)
