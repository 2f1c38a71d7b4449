"""MAMBA: the critic's target, what trains the V^k, and that it helps where it should."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import copies, random_batch, same
from small_tasks import NUM_ENVS, learn, score, what_is_learnt
from test_theorems import ACTIONS, MDP, STATES, random_mdp
from torch import Tensor, nn

import cup
from baselines.mamba import Args, Mamba, Visits

OBS_DIM, ACTION_DIM, BATCH, LENGTH, PLUS = 2, 1, 16, 20, math.tanh(2.0)
ALPHA = torch.tensor(0.1)


class Always(nn.Module):
    """A source that takes one action everywhere, up to its noise."""
    def __init__(self, mean: float, log_std: float = -20.0):
        super().__init__()
        self.mean, self.log_std = mean, log_std

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(obs), 1), self.mean), torch.full((len(obs), 1), self.log_std)


def make_agent(sources: dict | None = None, agent_class=Mamba, obs_dim=OBS_DIM, **changes):
    """By default sources that act at +-PLUS, and every episode is a roll-out."""
    torch.manual_seed(0)
    random.seed(0)
    settings = {"hidden_sizes": (16, 16), "num_envs": 1, "buffer_size": 500, "batch_size": BATCH}
    if agent_class is Mamba:
        settings |= {"first_rollouts": 1, "rollout_share": 1.0, "value_updates": 5}
    args_class = Args if agent_class is Mamba else cup.Args
    sources = {"plus": Always(2.0), "minus": Always(-2.0)} if sources is None else sources
    return agent_class(args_class("none", **settings | changes), obs_dim, ACTION_DIM, sources)


def reward_at(episode: int, step: int) -> float:
    return 1.0 + episode + 0.1 * step


def play(agent: Mamba, episodes: int, length: int, terminates: bool = False) -> list[list[float]]:
    """Let the agent act in episodes of this length; obs is (episode, step). The actions taken.

    It takes the first step of one more: only that tells the agent that the last one is over."""
    actions = [[] for _ in range(episodes + 1)]
    steps = [(episode, step) for episode in range(episodes) for step in range(length)]
    for episode, step in [*steps, (episodes, 0)]:
        obs, next_obs = torch.tensor([[[episode, step]], [[episode, step + 1]]]).double()
        action = agent.act(obs)
        actions[episode].append(action.item())
        end = torch.tensor([float(terminates and step == length - 1)])
        agent.store(obs, action, next_obs, torch.tensor([reward_at(episode, step)]), end)
    return actions


def visits_of(agent: Mamba, k: int) -> Visits:
    """All that have trained V^k."""
    return Visits(*(column[: agent.visits[k].size] for column in agent.visits[k].columns))


# ---- lambda: from f to SAC -----------------------------------------------------------------------
def sac_target(agent: Mamba, batch: cup.Batch) -> Tensor:
    torch.manual_seed(1)
    return cup.Agent.td_target(agent, batch, ALPHA)


def target(agent: Mamba, batch: cup.Batch) -> Tensor:
    torch.manual_seed(1)
    return agent.td_target(batch, ALPHA)


@pytest.mark.parametrize(("first_rollouts", "rollout_share"), [(0, 0.0), (1, 0.0), (0, 0.5)])
def test_lambda_1_without_rollouts_is_sac_bit_for_bit(first_rollouts: int, rollout_share: float):
    settings = {"first_rollouts": first_rollouts, "rollout_share": rollout_share}
    agent = make_agent(num_envs=NUM_ENVS, gae_lambda=1.0, **settings)
    sac = make_agent({}, cup.Agent, num_envs=NUM_ENVS)
    ours, theirs = (what_is_learnt(x, 25, anywhere, walk, LENGTH) for x in (agent, sac))
    assert all(map(torch.equal, ours, theirs)) == (first_rollouts == rollout_share == 0)


def test_the_target_mixes_f_and_sacs():
    """lambda = 0 is r + gamma (1 - d) max_k V^k(s'), without policy, critic or alpha."""
    agent, batch, targets = make_agent(), random_batch(BATCH, OBS_DIM, ACTION_DIM), {}
    play(agent, episodes=6, length=10)
    for agent.args.gae_lambda in (0.0, 0.3, 1.0):
        targets[agent.args.gae_lambda] = target(agent, batch)
    assert torch.equal(targets[1.0], sac_target(agent, batch))
    torch.testing.assert_close(targets[0.3], 0.7 * targets[0.0] + 0.3 * targets[1.0])
    for b in range(BATCH):
        f = max(value(batch.next_obs[b]).item() for value in agent.values)
        expected = batch.reward[b] + agent.args.gamma * (1 - batch.terminated[b]) * f
        assert targets[0.0][b].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


def test_f_is_used_when_every_source_has_had_its_first_rollouts():
    for episodes in range(6):
        agent, batch = make_agent(first_rollouts=2), random_batch(BATCH, OBS_DIM, ACTION_DIM)
        play(agent, episodes, length=10)
        assert torch.equal(target(agent, batch), sac_target(agent, batch)) == (episodes < 4)


def test_an_update_leaves_the_values_alone_and_all_it_logs_is_there_from_the_first_on():
    agent, batch = make_agent(value_updates=0), random_batch(BATCH, OBS_DIM, ACTION_DIM)
    names = {f"value/{x}/{k}" for x in ("explained_variance", "largest") for k in ("plus", "minus")}
    info, ours = agent.update(batch), names | {"train/learner_return", "loss/value"}
    assert info.keys() == {"loss/critic", "loss/actor", "alpha", "entropy"} | ours
    assert all(math.isnan(info[name]) for name in ours)
    agent.values[1][-1][-1].bias.data += 100
    play(agent, episodes=2, length=10)
    before = copies(agent.values)
    assert info.keys() == (info := agent.update(batch)).keys()
    assert same(before, agent.values)
    assert (info["value/largest/plus"], info["value/largest/minus"]) == (0, 1)


# ---- theory, on tabular problems -----------------------------------------------------------------
class Table(nn.Module):
    """A function of the state alone, which comes as one-hot, to stand for a V^k or a critic."""
    def __init__(self, values: np.ndarray):
        super().__init__()
        self.values = torch.as_tensor(values)

    def forward(self, obs: Tensor) -> Tensor:
        return (obs @ self.values).unsqueeze(1)

    def min_q(self, obs: Tensor, *_) -> Tensor:
        return obs @ self.values


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_q_minus_f_is_the_generalised_advantage(lam: float, seed: int):
    """What the critic converges to with the agent's target, V^k exact and no entropy bonus.

    A_lambda = sum_j (gamma lambda)^j E[A(s_j, a_j)] is Q of the MDP in which A is the reward and
    gamma lambda the discount factor. For one action of the policy the mean over its actions stands.
    """
    rng, gamma = np.random.default_rng(seed), 0.8
    mdp = replace(random_mdp(rng, alpha=0.0), gamma=gamma)
    *sources, policy = rng.dirichlet(np.full(ACTIONS, 0.3), (4, STATES))
    values = [mdp.values(source)[0] for source in sources]
    f = np.max(values, axis=0)
    advantage = mdp.reward + gamma * mdp.transition @ f - f[:, None]
    _, expected = MDP(advantage, mdp.transition, gamma * lam, alpha=0.0).values(policy)

    agent = make_agent({k: Always(0.0) for k in "abc"}, obs_dim=STATES, gamma=gamma, gae_lambda=lam)
    agent.values = nn.ModuleList(map(Table, values))
    agent.progress.finished = [1, 1, 1]  # they are known
    n = STATES * ACTIONS * STATES  # all transitions, (s, a, s')
    next_obs = torch.eye(STATES).repeat(STATES * ACTIONS, 1)
    reward = torch.as_tensor(mdp.reward).flatten().repeat_interleave(STATES)
    batch = cup.Batch(next_obs, next_obs, torch.zeros(n, 1), reward, torch.zeros(n), None, None)
    q = np.zeros((STATES, ACTIONS))
    for _ in range(150):
        agent.target_critic = Table((policy * q).sum(axis=1))
        y = agent.td_target(batch, torch.zeros(())).numpy().reshape(mdp.transition.shape)
        q = (mdp.transition * y).sum(axis=2)
    np.testing.assert_allclose(q - f[:, None], expected, atol=1e-9)


# ---- roll-in and roll-out ------------------------------------------------------------------------
def test_from_step_t_e_on_the_source_acts_and_only_those_steps_train_its_value():
    """All steps are replayed. The first two roll-outs of each source are its own from the start."""
    agent, length = make_agent(first_rollouts=2), 12
    begun, begin_episode = [], agent.begin_episode
    agent.begin_episode = lambda: begun.append(begin_episode()) or begun[-1]
    actions = play(agent, episodes=20, length=length)[:20]
    replayed = agent.buffer.columns[0][:240].tolist(), agent.buffer.columns[2][:240, 0].tolist()
    assert replayed[0] == [[episode, step] for episode in range(20) for step in range(length)]
    assert replayed[1] == [action for episode in actions for action in episode]
    assert [(x.source, x.switch) for x in begun[:4]] == [(0, 0), (1, 0), (0, 0), (1, 0)]
    assert len({x.switch for x in begun[4:20]}) > 4
    for k, its_action in enumerate((PLUS, -PLUS)):
        states = []
        for episode in (e for e in range(20) if begun[e].source == k):
            t_e = begun[episode].switch
            states += [[episode, step] for step in range(t_e, length)]
            assert actions[episode][t_e:] == pytest.approx([its_action] * (length - t_e))
            assert not any(abs(abs(x) - PLUS) < 1e-6 for x in actions[episode][:t_e])
        assert visits_of(agent, k).obs.tolist() == states
    assert math.isnan(agent.progress.scalars["train/learner_return"])


def test_a_source_acts_by_samples():
    agent, obs = make_agent({"noisy": Always(0.3, -0.5)}, num_envs=4000), torch.zeros(4000, OBS_DIM)
    agent.args.first_rollouts = 4000
    pre_tanh = agent.act(obs).atanh()
    assert pre_tanh.mean().item() == pytest.approx(0.3, abs=0.04)
    assert pre_tanh.std().item() == pytest.approx(math.exp(-0.5), rel=0.05)


def test_half_of_the_episodes_roll_out_uniformly_in_source_and_step():
    agent = make_agent(rollout_share=Args("none").rollout_share)
    agent.progress.last_length, agent.progress.begun = 10, 2
    episodes = [agent.begin_episode() for _ in range(8000)]
    drawn = Counter((x.source, x.switch) for x in episodes)
    assert drawn.pop((0, math.inf)) == pytest.approx(4000, abs=200)
    assert len(drawn) == 2 * 10 and all(abs(count - 200) < 70 for count in drawn.values())


@pytest.mark.parametrize("terminates", [False, True])
def test_returns_are_monte_carlo_and_go_on_after_a_time_limit(terminates: bool):
    agent, length = make_agent(value_updates=3), 5
    play(agent, episodes=1, length=length, terminates=terminates)
    returns = agent.returns_of(0, visits_of(agent, 0))
    after = agent.values[0](torch.tensor([0.0, length])).item()  # as it is now, after training
    assert abs(after) > 0.01
    for t in range(length):
        expected = 0.0 if terminates else agent.args.gamma ** (length - t) * after
        for step in range(t, length):
            expected += agent.args.gamma ** (step - t) * reward_at(0, step)
        assert returns[t].item() == pytest.approx(expected, rel=1e-5)


def test_a_rollout_trains_the_value_of_its_source_alone():
    agent = make_agent(gamma=0.5, value_updates=600, value_lr=1e-2)
    minus = copies(agent.values[1])
    play(agent, episodes=1, length=8, terminates=True)
    assert same(minus, agent.values[1])
    visits = visits_of(agent, 0)
    returns, forecast = agent.returns_of(0, visits), visits.forecast
    error = (agent.values[0](visits.obs).squeeze(1) - returns).abs().max()
    assert error < 0.2 * (forecast - returns).abs().max()  # it has learnt
    # the explained variance is of what V^k said before
    explained = 1 - np.var((returns - forecast).numpy()) / np.var(returns.numpy())
    logged = agent.progress.scalars["value/explained_variance/plus"]
    assert logged == pytest.approx(explained, abs=1e-5)


def test_values_see_standardised_observations():
    agent, obs = make_agent(), 5 + 3 * torch.randn(1000, OBS_DIM, dtype=torch.float64)
    agent.actor.standardize.fit(obs)
    standardised = ((obs - obs.mean(dim=0)) / obs.std(dim=0)).float()
    torch.testing.assert_close(agent.values[1](obs), agent.values[1][-1](standardised), atol=1e-3, rtol=0)


def test_learner_return_is_that_of_episodes_without_a_source_that_act_began():
    agent = make_agent(rollout_share=0.5)
    first = torch.tensor([[-1.0, 0.0]])  # a random step: the rest of its episode counts for nobody
    agent.store(first, torch.zeros(1, 1), torch.zeros(1, 2), torch.ones(1), torch.zeros(1))
    actions = play(agent, episodes=31, length=6)[:31]
    learners = [e for e, taken in enumerate(actions) if e and abs(abs(taken[-1]) - PLUS) > 1e-6]
    assert 5 < len(learners) < 25
    returns = [sum(reward_at(episode, step) for step in range(6)) for episode in learners]
    expected = pytest.approx(np.mean(returns[-20:]), rel=1e-5)
    assert agent.progress.scalars["train/learner_return"] == expected


# ---- it helps ------------------------------------------------------------------------------------
def walk(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A walk on a line, (position, time). The reward is the position at the end, and only there.

    So the critic of SAC must carry it back over twenty steps, while V^k knows it after roll-outs.
    """
    state = state + torch.cat([0.2 * action, torch.full_like(action, 1 / LENGTH)], dim=1)
    end = (state[:, 1] > 0.99).float()
    return state, end * state[:, 0], end


def anywhere(num: int) -> Tensor:
    return torch.cat([2 * torch.rand(num, 1) - 1, torch.zeros(num, 1)], dim=1)


def test_a_late_reward_is_learnt_from_the_values_of_sources():
    """Better than SAC and than the better source, which goes right at half the speed."""
    sources = {"left": Always(-0.5, -1.5), "right": Always(0.5, -1.5)}
    settings = {"policy_lr": 1e-3, "q_lr": 1e-3, "init_alpha": 0.01, "hidden_sizes": (32, 32)}
    settings |= {"num_envs": NUM_ENVS, "buffer_size": 10_000, "batch_size": 128}
    agents = make_agent({}, cup.Agent, **settings), make_agent(
        sources, **settings, gae_lambda=0.5, rollout_share=0.5, value_updates=20)
    reached = []
    for agent in agents:
        torch.manual_seed(0)
        learn(agent, 200, anywhere, walk, LENGTH)
        reached.append(score(agent.actor, lambda num: torch.zeros(num, 2), walk, LENGTH))
    alone = score(sources["right"], lambda num: torch.zeros(num, 2), walk, LENGTH)
    assert reached[1] > 0.9 * 0.2 > max(reached[0], alone)  # 0.2 per step is full speed
    assert agents[1].progress.scalars["value/largest/right"] > 0.9
