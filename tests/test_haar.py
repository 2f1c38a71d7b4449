"""HAAR: the equations of its two levels, its segments, and what learns when."""

import copy

import pytest
import torch
from by_hand import assert_follows, copies, same
from torch.distributions import Normal, kl_divergence

import cup
from baselines import haar

OBS_DIM, ACTION_DIM, BATCH, K, STEPS = 5, 2, 32, 3, 4


def make_agent(sources=None, **changes) -> haar.HAAR:
    torch.manual_seed(0)
    sources = sources or [cup.Actor(OBS_DIM, ACTION_DIM, (16, 8 + i)) for i in range(K)]
    sources = {f"skill-{i}": actor.requires_grad_(False) for i, actor in enumerate(sources)}
    settings = {"k": STEPS, "num_envs": 2, "buffer_size": 5_000} | changes
    args = haar.Args(env_id="none", hidden_sizes=(16, 16), **settings)
    return haar.HAAR(args, OBS_DIM, ACTION_DIM, sources)


def make_segments(num_random: int = 0) -> haar.Segments:
    """Random segments; some terminate, and are shorter. The actions of the first are random."""
    obs = torch.randn(BATCH, STEPS + 1, OBS_DIM, dtype=torch.float64)
    terminated = (torch.rand(BATCH) < 0.3).float()
    length = torch.where(terminated == 1, torch.randint(1, STEPS + 1, (BATCH,)), STEPS)
    z = torch.where(torch.arange(BATCH) < num_random, -1, torch.randint(K, (BATCH,)))
    action, reward = torch.rand(BATCH, STEPS, ACTION_DIM) * 2 - 1, torch.randn(BATCH)
    return haar.Segments(obs[:, 0], obs, action, z, length, reward, terminated)


def update(agent: haar.HAAR, batch: haar.Segments, **options) -> dict[str, torch.Tensor]:
    """An update whose high level has the same batch."""
    agent.sample_recent = lambda: batch
    return agent.update(batch, **options)


def high_level(agent: haar.HAAR, critic, obs: torch.Tensor):
    """Q_h of both networks, pi_h (batch, K) and V_h (batch,), the sum over skills."""
    obs = agent.actor.standardize(obs)
    (q1, q2), prob = (network(obs) for network in critic), agent.actor.net(obs).softmax(dim=1)
    value = sum(prob[:, z] * torch.minimum(q1[:, z], q2[:, z]) for z in range(prob.shape[1]))
    return (q1, q2), prob, value


def test_losses_of_the_high_level():
    """y_h = R / k + gamma_h (1 - d) V_h(s_k), where a skill has acted; SAC's of a categorical."""
    agent, batch = make_agent(gamma_h=0.8), make_segments(num_random=9)
    with torch.no_grad():
        agent.high_target[0][-1].bias -= 5  # another than the critic
        agent.log_high_alpha.fill_(-0.7)
        value = high_level(agent, agent.high_target, batch.obs[:, -1])[2]
    q, prob, _ = high_level(agent, agent.high_critic, batch.first)
    y = batch.mean_reward + 0.8 * (1 - batch.terminated) * value
    critic_loss = sum((q[j][i, batch.z[i]] - y[i]) ** 2 for i in range(9, BATCH) for j in (0, 1))
    actor_loss = (prob * (0.4965853 * prob.log() - torch.minimum(*q).detach())).sum(dim=1).mean()
    learnt = [*agent.high_critic.parameters(), *agent.actor.net.parameters()]
    gradients = torch.autograd.grad(critic_loss / BATCH + actor_loss, learnt)
    slow, info = copies(agent.high_target), update(agent, batch)
    torch.testing.assert_close(info["loss/high_critic"], critic_loss.detach() / BATCH)
    torch.testing.assert_close(info["loss/high_actor"], actor_loss.detach())
    for parameter, gradient in zip(learnt, gradients):  # 0.1 of it is in Adam after one step
        torch.testing.assert_close(agent.high_optimizer.state[parameter]["exp_avg"], 0.1 * gradient)
    torch.testing.assert_close(info["skill/selected/skill-1"], prob[:, 1].mean().detach())
    assert_follows(agent.high_target, slow, agent.high_critic, 0.005)
    assert agent.log_high_alpha < -0.7 and info["high/entropy"] > 0.3 * 1.0986123  # so it falls


def test_the_low_level_is_sac_with_skills(monkeypatch):
    """What the critics are asked, the reward A_h / k, the TD target; a KL to a copy that follows.

    The critic is zero, the target critic c_z, and pi_h picks the largest of the state's first K."""
    agent = make_agent(gamma_h=0.8, gamma=0.9, anchor=7.0, anchor_tau=0.1)
    batch, asked, losses = make_segments(num_random=9), [], {}
    for parameter in agent.slow_actor.skills.parameters():
        parameter += 0.01
    slow, c = copy.deepcopy(agent.slow_actor), torch.tensor([1.0, 20.0, 300.0])
    agent.log_alpha.data.fill_(-50)
    agent.actor.net = torch.nn.Linear(OBS_DIM, K)
    agent.actor.net.weight.data = 9999.0 * torch.eye(K, OBS_DIM)

    class Critic(torch.nn.Module):
        def forward(self, obs, action):
            asked.append((obs, action))
            return torch.zeros(2, BATCH)

        def min_q(self, obs, action):
            return self(obs, action)[0] + action[:, :K] @ c

    agent.critic = agent.target_critic = Critic()
    monkeypatch.setattr(agent, "minimize", lambda loss, optimizer: losses.update({optimizer: loss}))
    info = update(agent, batch)
    (next_obs, next_action), (obs, action), (same_obs, own_action) = asked
    first, last = (high_level(agent, agent.high_critic, batch.obs[:, t])[2] for t in (0, -1))
    rewards = batch.mean_reward + 0.8 * (1 - batch.terminated) * last - first
    t = (batch.obs == obs.unsqueeze(1)).all(dim=2).int().argmax(dim=1)  # which step it is
    z, row, is_last = action[:, :K].argmax(dim=1), torch.arange(BATCH), t + 1 == batch.length
    next_z = torch.where(is_last, batch.obs[:, -1, :K].argmax(dim=1), z)
    assert set(t.tolist()) == set(range(STEPS))
    assert torch.equal(obs, batch.obs[row, t]) and torch.equal(next_obs, batch.obs[row, t + 1])
    assert torch.equal(action, torch.cat([torch.eye(K)[z], batch.action[row, t]], dim=1))
    assert torch.equal(next_action[:, :K], torch.eye(K)[next_z])
    assert torch.equal(z[9:], batch.z[9:]) and len(set(z[:9].tolist())) > 1  # theirs is random
    follows = 0.9 * (1 - batch.terminated * is_last) * c[next_z]
    loss = 2 * (rewards + follows).square().mean()
    torch.testing.assert_close(info["low/reward"], rewards.mean())
    torch.testing.assert_close(losses[agent.critic_optimizer], loss)
    torch.testing.assert_close(info["loss/actor"], -(own_action[:, :K] @ c).mean())
    assert torch.equal(obs, same_obs) and torch.equal(action[:, :K], own_action[:, :K])
    dists = (actor(obs, action[:, :K].argmax(dim=1)) for actor in (agent.actor, slow))
    kl = kl_divergence(*(Normal(mean, log_std.exp()) for mean, log_std in dists)).sum(dim=1).mean()
    torch.testing.assert_close(losses[agent.skill_optimizer], info["loss/actor"] + 7 * kl)
    assert_follows(agent.slow_actor.skills, copies(slow.skills), agent.actor.skills, 0.1)


def test_skills_begin_as_the_sources():
    """Also in what they see: what a source ignored (scale 0) they may learn to use."""
    sources = [cup.Actor(OBS_DIM, ACTION_DIM, (16, 16)) for _ in range(K)]
    for source in sources:
        source.standardize.scale[2:4], source.standardize.shift[0] = 0, 0.5
    agent, before, obs = make_agent(sources), copies(*sources), torch.randn(50, OBS_DIM)
    best = agent.actor.high_log_prob(obs).argmax(dim=1)
    for z, source in enumerate(sources):
        dist = source(obs)
        torch.testing.assert_close(agent.actor(obs, torch.full((50,), z)), dist)
        torch.testing.assert_close(agent.actor(obs)[0][best == z], dist[0][best == z])
    update(agent, make_segments())
    assert (agent.actor.skills[0].net[0].weight[:, 2:4] != 0).any() and same(before, *sources)


def test_skills_wait_for_their_critic():
    """Until then, or frozen, they and alpha have no step."""
    for freeze_skills, guide in ((False, False), (True, True), (False, True)):
        agent, learns = make_agent(freeze_skills=freeze_skills), guide and not freeze_skills
        skills, critic = copies(agent.actor.skills), copies(agent.critic)
        info = update(agent, make_segments(), guide=guide)
        assert same(skills, agent.actor.skills) != learns and not same(critic, agent.critic)
        assert info["entropy"] > agent.target_entropy == -ACTION_DIM  # so alpha falls
        assert (agent.log_alpha.exp() < info["alpha"]) == learns


def test_segments_of_two_environments():
    """k = 3, five random steps. A time limit cuts the first after 10 steps, whose last two are in
    no segment, nor are the last two random ones; the second terminates after 7."""
    agent = make_agent(k=3)
    states = torch.arange(24.0).double().reshape(12, 2, 1).repeat(1, 1, OBS_DIM)
    for t in range(11):
        obs = states[t] - torch.tensor([[50.0 * (t == 10)], [0.0]])
        if t >= 5:
            agent.actor.net[-1].bias.data[:] = 99.0 * torch.eye(3)[t % 3]  # pi_h picks t mod 3
            agent.act(obs)
        reward, terminated = torch.full((2,), float(t)), torch.tensor([0.0, t == 6])
        agent.store(obs, torch.full((2, ACTION_DIM), t / 10), states[t + 1], reward, terminated)
    rows = haar.Segments(*(column[: agent.buffer.size] for column in agent.buffer.columns))
    expected = [(0, [0, 1, 2]), (1, [0, 1, 2]), (1, [5, 6]), (0, [5, 6, 7]), (1, [7, 8, 9])]
    assert len(rows.z) == len(expected) and agent.length.tolist() == [1, 1]
    for i, (env, steps) in enumerate(expected):
        assert rows.length[i] == len(steps) and rows.terminated[i] == (steps == [5, 6])
        assert torch.equal(rows.first[i], states[steps[0], env])
        assert torch.equal(rows.obs[i, : len(steps) + 1], states[steps[0] : steps[-1] + 2, env])
        assert rows.action[i, : len(steps), 0].tolist() == pytest.approx([t / 10 for t in steps])
        assert rows.mean_reward[i] == sum(steps) / 3  # of two steps as well
        assert rows.z[i] == (steps[0] % 3 if steps[0] >= 5 else -1)

    agent = make_agent(recent_steps=STEPS * BATCH)  # which the high level learns from
    for number in range(50):
        agent.buffer.add(make_segments()._replace(mean_reward=torch.full((BATCH,), number)))
    assert set(agent.sample_recent().mean_reward.tolist()) == {49}
