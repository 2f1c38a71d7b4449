"""MAMBA: the critic's target, what trains the V^k, and who acts."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from by_hand import copies, random_batch, same
from test_theorems import ACTIONS, MDP, STATES, random_mdp
from torch import Tensor, nn

import cup
from baselines.mamba import Args, Mamba, Visits

PLUS = math.tanh(2.0)


def always(mean: float, log_std: float) -> nn.Module:
    """A source that takes one action everywhere, up to its noise."""
    source = nn.Module()
    source.forward = lambda obs: tuple(torch.full((len(obs), 1), x) for x in (mean, log_std))
    return source


SOURCES = {"plus": always(2.0, -20.0), "minus": always(-2.0, -20.0)}  # they act at +-PLUS


def make_agent(sources: dict = SOURCES, obs_dim: int = 2, **changes) -> Mamba:
    """If not changed, all of its episodes are roll-outs."""
    torch.manual_seed(0)
    random.seed(0)
    settings = {"hidden_sizes": (16, 16), "num_envs": 1, "buffer_size": 500, "batch_size": 16}
    settings |= {"first_rollouts": 1, "rollout_share": 1.0, "value_updates": 5}
    return Mamba(Args("none", **settings | changes), obs_dim, 1, sources)


def reward_at(episode: int, step: int) -> float:
    return 1.0 + episode + 0.1 * step


def play(agent: Mamba, episodes: int, length: int = 6, terminates=False) -> list[list[float]]:
    """The actions taken in episodes of this length; obs is (episode, step). One begins where
    another terminates; the first step of one more tells the agent that the last one is over."""
    actions = [[] for _ in range(episodes + 1)]
    for t in range(episodes * length + 1):
        episode, step = divmod(t, length)
        after = divmod(t + 1, length) if terminates else (episode, step + 1)
        obs, next_obs = torch.tensor([[[episode, step]], [after]]).double()
        action = agent.act(obs)
        actions[episode].append(action.item())
        end = torch.tensor([float(terminates and step == length - 1)])
        agent.store(obs, action, next_obs, torch.tensor([reward_at(episode, step)]), end)
    return actions[:episodes]


def target_of(agent: cup.Agent, agent_class: type = Mamba) -> Tensor:
    torch.manual_seed(1)
    return agent_class.td_target(agent, random_batch(16, 2, 1), torch.tensor(0.1))


def test_the_target_mixes_f_and_sacs_after_the_first_rollouts_of_every_source():
    """lambda = 0 is r + gamma (1 - d) max_k V^k(s'), without policy, critic or alpha."""
    for episodes in range(5):
        agent, targets = make_agent(first_rollouts=2), {}
        play(agent, episodes)
        for agent.args.gae_lambda in (0.0, 0.3, 1.0):
            targets[agent.args.gae_lambda] = target_of(agent)
        assert torch.equal(targets[1.0], target_of(agent, cup.Agent))
        assert torch.equal(targets[1.0], targets[0.0]) == (episodes < 4)
    torch.testing.assert_close(targets[0.3], 0.7 * targets[0.0] + 0.3 * targets[1.0])
    batch = random_batch(16, 2, 1)
    f = torch.maximum(*(value(batch.next_obs).squeeze(1) for value in agent.values))
    expected = batch.reward + agent.args.gamma * (1 - batch.terminated) * f
    torch.testing.assert_close(targets[0.0], expected)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
def test_q_minus_f_is_the_generalised_advantage(lam: float):
    """With Q = f + A_lambda in the target critic, V^k exact and no entropy bonus, the target is Q.

    A_lambda = sum_j (gamma lambda)^j E[A(s_j, a_j)] is Q of the MDP in which A is the reward and
    gamma lambda the discount factor. The mean over the policy's actions stands for one of them."""
    rng = np.random.default_rng(0)
    mdp, (*sources, policy) = random_mdp(rng, 0.0), rng.dirichlet(np.ones(ACTIONS), (4, STATES))
    values = np.array([mdp.values(source)[0] for source in sources])
    f = values.max(axis=0)
    advantage = mdp.reward + mdp.gamma * mdp.transition @ f - f[:, None]
    q = f[:, None] + MDP(advantage, mdp.transition, mdp.gamma * lam, 0.0).values(policy)[1]

    agent = make_agent(obs_dim=STATES, gamma=mdp.gamma, gae_lambda=lam)
    agent.progress.finished = [1, 1]
    agent.source_values = lambda obs: obs @ torch.tensor(values.T)  # obs is one-hot
    agent.target_critic.min_q = lambda obs, action: obs @ torch.tensor((policy * q).sum(axis=1))
    n = STATES * ACTIONS * STATES  # all transitions, (s, a, s')
    next_obs = torch.eye(STATES).repeat(STATES * ACTIONS, 1)
    reward = torch.tensor(mdp.reward).flatten().repeat_interleave(STATES)
    batch = cup.Batch(next_obs, next_obs, torch.zeros(n, 1), reward, torch.zeros(n), None, None)
    target = agent.td_target(batch, torch.zeros(())).numpy().reshape(mdp.transition.shape)
    np.testing.assert_allclose((mdp.transition * target).sum(axis=2), q, atol=1e-9)


def test_from_step_t_e_on_the_source_acts_and_only_those_steps_train_its_value():
    """All steps are replayed. The first two roll-outs of each source are its own from the start."""
    agent, states, returns = make_agent(first_rollouts=2, rollout_share=0.7), [[], []], []
    begun, begin_episode = [], agent.begin_episode
    agent.begin_episode = lambda: begun.append(begin_episode()) or begun[-1]
    actions = play(agent, episodes=20, length=12)
    obs, _, replayed, *_ = (column[: 20 * 12] for column in agent.buffer.columns)
    assert obs.tolist() == [[episode, step] for episode in range(20) for step in range(12)]
    assert replayed.flatten().tolist() == sum(actions, [])
    assert [(x.source, x.switch) for x in begun[:4]] == [(0, 0), (1, 0), (0, 0), (1, 0)]
    for episode, taken in enumerate(actions):
        source, t_e = begun[episode].source, min(begun[episode].switch, 12)
        states[source] += [[episode, step] for step in range(t_e, 12)]
        assert taken[t_e:] == pytest.approx([(PLUS, -PLUS)[source]] * (12 - t_e))
        assert not any(abs(abs(action) - PLUS) < 1e-6 for action in taken[:t_e])
        returns += [sum(reward_at(episode, step) for step in range(12))] * (t_e == 12)
    assert [visits.columns[0][: visits.size].tolist() for visits in agent.visits] == states
    assert len(returns) > 2  # of the learner's own episodes
    assert agent.progress.scalars["train/learner_return"] == pytest.approx(np.mean(returns))


def test_a_source_acts_by_samples():
    agent = make_agent({"noisy": always(0.3, -0.5)}, num_envs=4000, first_rollouts=4000)
    noise = (agent.act(torch.zeros(4000, 2)).atanh() - 0.3) / math.exp(-0.5)
    assert [noise.mean().item(), noise.std().item()] == pytest.approx([0, 1], abs=0.06)


def test_half_of_the_episodes_roll_out_uniformly_in_source_and_step():
    agent = make_agent(rollout_share=Args("none").rollout_share)
    agent.progress.last_length, agent.progress.begun = 10, 2
    drawn = Counter((x.source, x.switch) for x in (agent.begin_episode() for _ in range(8000)))
    assert drawn.pop((0, math.inf)) == pytest.approx(4000, abs=200)
    assert len(drawn) == 2 * 10 and all(abs(count - 200) < 70 for count in drawn.values())


@pytest.mark.parametrize("terminates", [False, True])
def test_a_rollout_trains_the_value_of_its_source_on_monte_carlo_returns(terminates: bool):
    agent, length = make_agent(gamma=0.5, value_updates=600, value_lr=1e-2), 8
    agent.progress.begun = 1  # it is the second source's turn
    obs = torch.tensor([[0.0, step] for step in range(length + 1)])
    before, plus = agent.source_values(obs)[:, 1].tolist(), copies(agent.values[0])
    play(agent, 1, length, terminates)
    assert same(plus, agent.values[0])
    *after, last = agent.source_values(obs)[:, 1].tolist()

    def returns(last: float) -> list[float]:
        expected = [0.0 if terminates else last]  # a time limit is not an end
        for step in reversed(range(length)):
            expected.insert(0, reward_at(0, step) + 0.5 * expected[0])
        return expected[:-1]

    visits = Visits(*(column[:length] for column in agent.visits[1].columns))
    now = agent.returns_of(1, visits).numpy()  # which fails where there is a gradient
    assert now.tolist() == pytest.approx(returns(last), rel=1e-5)  # with V^k of the end as it is
    first_error = np.subtract(before[:-1], returns(before[-1]))
    assert abs(after - now).max() < 0.2 * abs(first_error).max()  # it has learnt
    explained = agent.progress.scalars["value/explained_variance/minus"]  # before it learnt
    assert explained == pytest.approx(1 - np.var(first_error) / np.var(returns(before[-1])))


def test_values_see_standardised_observations_and_an_update_leaves_them_alone():
    agent, batch = make_agent(), random_batch(1000, 2, 1)
    obs = 5 + 3 * batch.obs
    agent.actor.standardize.fit(obs)
    expected = agent.values[1][-1](((obs - obs.mean(dim=0)) / obs.std(dim=0)).float())
    torch.testing.assert_close(agent.values[1](obs), expected, atol=1e-3, rtol=0)
    play(agent, episodes=2)
    before, info = copies(agent.values), agent.update(batch)
    assert same(before, agent.values)
    assert info["value/largest/plus"] + info["value/largest/minus"] == 1
