"""MAMBA: the critic's target, what trains the V^k, and that it helps where it should."""

import math
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

OBS_DIM, ACTION_DIM, BATCH = 2, 1, 16


def always(mean: float, log_std: float = -20.0):
    """A source that takes one action everywhere."""
    return lambda obs: (torch.full((len(obs), 1), mean), torch.full((len(obs), 1), log_std))


SOURCES = {"plus": always(2.0), "minus": always(-2.0)}
PLUS = math.tanh(2.0)


def make_agent(sources: dict = SOURCES, agent_class=Mamba, obs_dim=OBS_DIM, **changes) -> cup.Agent:
    torch.manual_seed(0)
    settings = {"hidden_sizes": (16, 16), "num_envs": 1, "buffer_size": 500, "batch_size": BATCH}
    args_class = Args if agent_class is Mamba else cup.Args
    return agent_class(args_class("none", **settings | changes), obs_dim, ACTION_DIM, sources)


def make_batch() -> cup.Batch:
    return random_batch(BATCH, OBS_DIM, ACTION_DIM)


def reward_at(episode: int, step: int) -> float:
    return 1.0 + episode + 0.1 * step


def play(agent: Mamba, episodes: int, length: int, terminates: bool = False) -> list[list[float]]:
    """Let the agent act in episodes of this length; obs is (episode, step). The actions taken.

    Begins one episode more, as only that tells the agent that the last one is over.
    """
    actions = []
    for episode in range(episodes):
        actions.append([])
        for step in range(length):
            obs, next_obs = torch.tensor([[[episode, step]], [[episode, step + 1]]]).float()
            action = agent.act(obs, [step])
            actions[-1].append(action.item())
            end = torch.tensor([float(terminates and step == length - 1)])
            agent.store(obs, action, next_obs, torch.tensor([reward_at(episode, step)]), end)
    agent.act(torch.tensor([[float(episodes), 0.0]]), [0])
    return actions


# ---- lambda: from f to SAC -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("gae_lambda", "rollout_share", "is_sac"),
    [(1.0, 0.0, True), (1.0, 0.5, False), (0.9, 1.0, False)],
)
def test_lambda_1_without_rollouts_is_sac_bit_for_bit(gae_lambda, rollout_share, is_sac):
    settings = {"gae_lambda": gae_lambda, "rollout_share": rollout_share, "value_updates": 5}
    agent = make_agent(num_envs=NUM_ENVS, **settings)
    sac = make_agent({}, cup.Agent, num_envs=NUM_ENVS)
    ours, theirs = (what_is_learnt(x, 50, anywhere, walk, LENGTH) for x in (agent, sac))
    assert all(map(torch.equal, ours, theirs)) == is_sac


def test_the_target_mixes_f_and_sacs():
    """lambda = 0 is r + gamma (1 - d) max_k V^k(s'), without policy, critic or alpha."""
    agent, batch = make_agent(rollout_share=1.0, value_updates=5), make_batch()
    play(agent, episodes=6, length=10)
    targets = {}
    for agent.args.gae_lambda in (0.0, 0.3, 1.0):
        torch.manual_seed(1)
        targets[agent.args.gae_lambda] = agent.td_target(batch, torch.tensor(0.1))
    torch.manual_seed(1)
    assert torch.equal(targets[1.0], cup.Agent.td_target(agent, batch, torch.tensor(0.1)))
    torch.testing.assert_close(targets[0.3], 0.7 * targets[0.0] + 0.3 * targets[1.0])
    for b in range(BATCH):
        f = max(value(batch.next_obs[b]).item() for value in agent.values)
        expected = batch.reward[b] + agent.args.gamma * (1 - batch.terminated[b]) * f
        assert targets[0.0][b].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


def test_without_a_rollout_of_every_source_there_is_no_f():
    batch, alpha = make_batch(), torch.tensor(0.1)
    for episodes, is_sac in (1, True), (2, False):  # the second one is the other source's
        agent = make_agent(rollout_share=1.0, first_rollouts=1)
        play(agent, episodes, length=10)
        torch.manual_seed(1)
        target = agent.td_target(batch, alpha)
        torch.manual_seed(1)
        assert torch.equal(target, cup.Agent.td_target(agent, batch, alpha)) == is_sac


def test_an_update_leaves_the_values_alone_and_logs_who_is_largest():
    agent, batch = make_agent(rollout_share=1.0, value_updates=5), make_batch()
    play(agent, episodes=6, length=10)
    before = copies(agent.values)
    info = agent.update(batch)
    assert same(before, agent.values)
    names = {"loss/critic", "loss/actor", "alpha", "entropy", "loss/value"}
    for kind in ("explained_variance", "largest"):
        names |= {f"value/{kind}/{name}" for name in SOURCES}
    assert info.keys() == names  # and no train/learner_return: there was no such episode
    plus, minus = (value(batch.next_obs) for value in agent.values)
    share = (plus > minus).float().mean().item()
    assert info["value/largest/plus"] == pytest.approx(share)
    assert info["value/largest/minus"] == pytest.approx(1 - share)


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

    agent = make_agent(dict.fromkeys("abc"), obs_dim=STATES, gamma=gamma, gae_lambda=lam)
    agent.values = nn.ModuleList(map(Table, values))
    for visits in agent.visits:
        visits.size = 1  # they are known
    n = STATES * ACTIONS * STATES  # all transitions, (s, a, s')
    next_obs = torch.eye(STATES).repeat(STATES * ACTIONS, 1)
    reward = torch.as_tensor(mdp.reward).flatten().repeat_interleave(STATES)
    batch = cup.Batch(next_obs, next_obs, torch.zeros(n, 1), reward, torch.zeros(n), None, None)
    q = np.zeros((STATES, ACTIONS))
    for _ in range(150):
        agent.target_critic = Table((policy * q).sum(axis=1))
        target = agent.td_target(batch, torch.zeros(()))
        q = (mdp.transition * target.numpy().reshape(mdp.transition.shape)).sum(axis=2)
    np.testing.assert_allclose(q - f[:, None], expected, atol=1e-9)


# ---- roll-in and roll-out ------------------------------------------------------------------------
def visits_of(agent: Mamba, k: int) -> Visits:
    """All that have trained V^k."""
    return Visits(*(column[: agent.visits[k].size] for column in agent.visits[k].columns))


def test_from_step_t_e_on_the_source_acts_and_only_those_steps_train_its_value():
    """The first two roll-outs of each source are its own from the beginning on."""
    agent, length = make_agent(rollout_share=1.0, value_updates=1), 12
    begun, begin_episode = [], agent.begin_episode

    def begin_and_note(i):
        begin_episode(i)
        begun.append((agent.source[i], agent.switch[i]))

    agent.begin_episode = begin_and_note
    actions = play(agent, episodes=20, length=length)
    assert begun[:4] == [(0, 0), (1, 0), (0, 0), (1, 0)]
    assert len({t_e for _, t_e in begun[4:20]}) > 4
    for k, its_action in enumerate((PLUS, -PLUS)):
        states = []
        for episode, (source, t_e) in enumerate(begun[:20]):
            if source == k:
                states += [[episode, step] for step in range(t_e, length)]
                assert actions[episode][t_e:] == pytest.approx([its_action] * (length - t_e))
            assert not any(abs(abs(x) - PLUS) < 1e-6 for x in actions[episode][:t_e])
        assert agent.visits[k].obs().tolist() == states
    assert "train/learner_return" not in agent.logged


def test_half_of_the_episodes_roll_out_uniformly_in_source_and_step():
    agent = make_agent()
    agent.last_length, agent.num_rollouts = 10, 4
    drawn = Counter()
    for _ in range(8000):
        agent.begin_episode(0)
        drawn[(agent.source[0], agent.switch[0]) if agent.switch[0] < math.inf else None] += 1
    assert len(drawn) == 1 + 2 * 10
    assert drawn.pop(None) == pytest.approx(4000, abs=200)
    assert all(count == pytest.approx(200, abs=70) for count in drawn.values())


@pytest.mark.parametrize("terminates", [False, True])
def test_returns_are_monte_carlo_and_go_on_after_a_time_limit(terminates: bool):
    agent, length = make_agent(rollout_share=1.0, value_updates=3), 5
    play(agent, episodes=1, length=length, terminates=terminates)
    returns = agent.returns_of(0, visits_of(agent, 0))
    after = agent.values[0](torch.tensor([0.0, length])).item()  # as it is now, after training
    assert abs(after) > 0.01
    assert agent.visits[0].obs().tolist() == [[0, step] for step in range(length)]
    for t in range(length):
        expected = 0.0 if terminates else agent.args.gamma ** (length - t) * after
        for step in range(t, length):
            expected += agent.args.gamma ** (step - t) * reward_at(0, step)
        assert returns[t].item() == pytest.approx(expected, rel=1e-5)


def test_a_rollout_trains_the_value_of_its_source_alone():
    agent = make_agent(rollout_share=1.0, gamma=0.5, value_updates=600, value_lr=1e-2)
    minus = copies(agent.values[1])
    play(agent, episodes=1, length=8, terminates=True)
    assert same(minus, agent.values[1])
    visits = visits_of(agent, 0)
    returns, forecast = agent.returns_of(0, visits), visits.forecast
    error = (agent.values[0](visits.obs).squeeze(1) - returns).abs().max()
    assert error < 0.2 * (forecast - returns).abs().max()  # it has learnt
    # the explained variance is of what V^k said before
    explained = 1 - np.var((returns - forecast).numpy()) / np.var(returns.numpy())
    assert agent.logged["value/explained_variance/plus"] == pytest.approx(explained, abs=1e-5)


def test_learner_return_is_that_of_episodes_without_a_source():
    agent = make_agent(rollout_share=0.5, value_updates=1)
    actions = play(agent, episodes=30, length=6)
    learners = [e for e, taken in enumerate(actions) if abs(abs(taken[-1]) - PLUS) > 1e-6]
    assert 5 < len(learners) < 25
    returns = [sum(reward_at(episode, step) for step in range(6)) for episode in learners]
    assert agent.logged["train/learner_return"] == pytest.approx(np.mean(returns[-20:]), rel=1e-5)


def test_the_episode_that_began_with_random_actions_counts_for_nobody():
    agent = make_agent(rollout_share=0.0, gae_lambda=1.0)
    for step in (3, 4, 0, 1, 0):  # act is asked from the middle of an episode on
        obs = torch.zeros(1, OBS_DIM)
        agent.store(obs, agent.act(obs, [step]), obs, torch.ones(1), torch.zeros(1))
    assert agent.learner_returns == [2.0]


# ---- it helps ------------------------------------------------------------------------------------
LENGTH = 20


def walk(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A walk on a line, (position, time). The reward is the position at the end, and only there.

    So the critic of SAC must carry it back over twenty steps, while V^k knows it after roll-outs.
    """
    state = state + torch.cat([0.2 * action, torch.full_like(action, 1 / LENGTH)], dim=1)
    end = (state[:, 1] > 0.99).float()
    return state, end * state[:, 0], end


def anywhere(num: int) -> Tensor:
    return torch.cat([2 * torch.rand(num, 1) - 1, torch.zeros(num, 1)], dim=1)


def middle(num: int) -> Tensor:
    return torch.zeros(num, 2)


def test_a_late_reward_is_learnt_from_the_values_of_sources():
    """Better than SAC and than the better source, which goes right at half the speed."""
    sources = {"left": always(-0.5, -1.5), "right": always(0.5, -1.5)}
    settings = {"policy_lr": 1e-3, "q_lr": 1e-3, "init_alpha": 0.01, "hidden_sizes": (32, 32)}
    settings |= {"num_envs": NUM_ENVS, "buffer_size": 10_000, "batch_size": 128}
    best = 0.2  # of a step, at full speed
    for seed in range(2):
        sac = make_agent({}, cup.Agent, **settings, seed=seed)
        ours = make_agent(**settings, sources=sources, seed=seed, gae_lambda=0.5, value_updates=20)
        reached = []
        for agent in (sac, ours):
            torch.manual_seed(seed)
            learn(agent, 200, anywhere, walk, LENGTH)
            reached.append(score(agent.actor, middle, walk, LENGTH))
        alone = score(sources["right"], middle, walk, LENGTH)
        assert reached[1] > 0.9 * best > max(reached[0], alone)
        assert ours.logged["value/largest/right"] > 0.9
