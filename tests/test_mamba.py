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


class Always(nn.Module):
    """A source that takes one action everywhere, up to its noise."""
    def __init__(self, mean: float, log_std: float = -20.0):
        super().__init__()
        self.mean_and_log_std = mean, log_std

    def forward(self, obs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.full((len(obs), 1), value) for value in self.mean_and_log_std)


SOURCES = {"plus": Always(2.0), "minus": Always(-2.0)}  # they act at +-PLUS


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
    """Let the agent act in episodes of this length; obs is (episode, step). The actions taken.

    It takes the first step of one more: only that tells the agent that the last one is over."""
    actions = [[] for _ in range(episodes + 1)]
    for t in range(episodes * length + 1):
        episode, step = divmod(t, length)
        obs, next_obs = torch.tensor([[[episode, step]], [[episode, step + 1]]]).double()
        action = agent.act(obs)
        actions[episode].append(action.item())
        end = torch.tensor([float(terminates and step == length - 1)])
        agent.store(obs, action, next_obs, torch.tensor([reward_at(episode, step)]), end)
    return actions[:episodes]


# ---- the target ----------------------------------------------------------------------------------
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
    for b, next_obs in enumerate(batch.next_obs):
        f = max(value(next_obs).item() for value in agent.values)
        expected = batch.reward[b] + agent.args.gamma * (1 - batch.terminated[b]) * f
        torch.testing.assert_close(targets[0.0][b], expected)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
def test_q_minus_f_is_the_generalised_advantage(lam: float):
    """With Q = f + A_lambda in the target critic, V^k exact and no entropy bonus, the target is Q.

    A_lambda = sum_j (gamma lambda)^j E[A(s_j, a_j)] is Q of the MDP in which A is the reward and
    gamma lambda the discount factor. For one action of the policy the mean over its actions stands.
    """
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


# ---- roll-in and roll-out ------------------------------------------------------------------------
def test_from_step_t_e_on_the_source_acts_and_only_those_steps_train_its_value():
    """All steps are replayed. The first two roll-outs of each source are its own from the start."""
    agent, states = make_agent(first_rollouts=2), [[], []]
    begun, begin_episode = [], agent.begin_episode
    agent.begin_episode = lambda: begun.append(begin_episode()) or begun[-1]
    actions = play(agent, episodes=20, length=12)
    obs, _, replayed, *_ = (column[: 20 * 12] for column in agent.buffer.columns)
    assert obs.tolist() == [[episode, step] for episode in range(20) for step in range(12)]
    assert replayed.flatten().tolist() == sum(actions, [])
    assert [(x.source, x.switch) for x in begun[:4]] == [(0, 0), (1, 0), (0, 0), (1, 0)]
    assert len({x.switch for x in begun[4:20]}) > 4
    for episode, taken in enumerate(actions):
        source, t_e = begun[episode].source, begun[episode].switch
        states[source] += [[episode, step] for step in range(t_e, 12)]
        assert taken[t_e:] == pytest.approx([(PLUS, -PLUS)[source]] * (12 - t_e))
        assert not any(abs(abs(action) - PLUS) < 1e-6 for action in taken[:t_e])
    assert [visits.columns[0][: visits.size].tolist() for visits in agent.visits] == states


def test_a_source_acts_by_samples():
    agent = make_agent({"noisy": Always(0.3, -0.5)}, num_envs=4000, first_rollouts=4000)
    pre_tanh = agent.act(torch.zeros(4000, 2)).atanh()
    assert pre_tanh.mean().item() == pytest.approx(0.3, abs=0.04)
    assert pre_tanh.std().item() == pytest.approx(math.exp(-0.5), rel=0.05)


def test_half_of_the_episodes_roll_out_uniformly_in_source_and_step():
    agent = make_agent(rollout_share=Args("none").rollout_share)
    agent.progress.last_length, agent.progress.begun = 10, 2
    drawn = Counter((x.source, x.switch) for x in (agent.begin_episode() for _ in range(8000)))
    assert drawn.pop((0, math.inf)) == pytest.approx(4000, abs=200)
    assert len(drawn) == 2 * 10 and all(abs(count - 200) < 70 for count in drawn.values())


def test_learner_return_is_that_of_episodes_that_act_began_without_a_source():
    agent, start = make_agent(rollout_share=0.5), torch.zeros(1, 2).double()
    # a random step comes first: episode 0 counts for nobody
    agent.store(start - 1, torch.zeros(1, 1), start, torch.zeros(1), torch.zeros(1))
    actions = play(agent, episodes=40)
    learners = [e for e in range(1, 40) if abs(abs(actions[e][-1]) - PLUS) > 1e-6]
    expected = np.mean([sum(reward_at(e, step) for step in range(6)) for e in learners[-20:]])
    assert agent.progress.scalars["train/learner_return"] == pytest.approx(expected)


# ---- values of the sources -----------------------------------------------------------------------
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
    error = np.subtract(after, now), np.subtract(before[:-1], returns(before[-1]))
    assert abs(error[0]).max() < 0.2 * abs(error[1]).max()  # it has learnt
    scalars, name = agent.progress.scalars, "value/explained_variance/minus"
    explained = 1 - np.var(error[1]) / np.var(returns(before[-1]))  # by V^k before it learnt
    assert scalars[name] == pytest.approx(explained, abs=1e-5)
    agent.visits[1].columns[4][:length] = torch.tensor(now)  # had it said that
    agent.train_value(1)
    assert scalars[name] == pytest.approx(1)


def test_values_see_standardised_observations_and_an_update_leaves_them_alone():
    agent, batch = make_agent(value_updates=0), random_batch(1000, 2, 1)
    obs = 5 + 3 * batch.obs
    agent.actor.standardize.fit(obs)
    expected = agent.values[1][-1](((obs - obs.mean(dim=0)) / obs.std(dim=0)).float())
    torch.testing.assert_close(agent.values[1](obs), expected, atol=1e-3, rtol=0)
    agent.values[1][-1][-1].bias.data += 100
    before, first = copies(agent.values), agent.update(batch)
    play(agent, episodes=2)
    info = agent.update(batch)
    assert same(before, agent.values) and info.keys() == first.keys()
    assert (info["value/largest/plus"], info["value/largest/minus"]) == (0, 1)
