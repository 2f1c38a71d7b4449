"""MAMBA: the critic's target, what trains the V^k, and that it helps where it should."""

import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from program import SMALL, finish, metrics, run_cup, same_result, start_cup
from torch import Tensor, nn

import cup
from baselines.mamba import Args, Mamba

SCRIPT = Path(cup.__file__).parent / "baselines/mamba.py"
OBS_DIM, ACTION_DIM, BATCH = 2, 1, 16


def always(mean: float):
    """A source that takes one action everywhere."""
    return lambda obs: (torch.full((len(obs), ACTION_DIM), mean), torch.full((len(obs), 1), -20.0))


SOURCES = {"plus": always(2.0), "minus": always(-2.0)}
PLUS = math.tanh(2.0)


def make_agent(sources: dict = SOURCES, agent_class=Mamba, obs_dim=OBS_DIM, **changes) -> cup.Agent:
    torch.manual_seed(0)
    settings = {"hidden_sizes": (16, 16), "num_envs": 1, "buffer_size": 500, "batch_size": BATCH}
    args_class = Args if agent_class is Mamba else cup.Args
    args = args_class(env_id="none", **(settings | changes))
    return agent_class(args, obs_dim, ACTION_DIM, sources)


def make_batch(seed: int = 0) -> cup.Batch:
    rng = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, BATCH, OBS_DIM, generator=rng)
    action, reward = torch.randn(2, BATCH, generator=rng)
    terminated = (torch.randn(BATCH, generator=rng) > 1).float()
    none = torch.empty(BATCH, 0, ACTION_DIM)
    return cup.Batch(obs, next_obs, action.tanh().unsqueeze(1), reward, terminated, none, none)


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


def parameters(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in chain.from_iterable(m.parameters() for m in modules)]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ------------------------------------ lambda: from f to SAC ------------------------------------


def learn_a_little(agent: cup.Agent) -> list[Tensor]:
    """All that SAC learns from three episodes, and the next random number."""
    torch.manual_seed(1)
    for t in range(60):
        obs, next_obs = torch.tensor([[[0.0, t]], [[0.0, t + 1]]])
        action = agent.act(obs, [t % 20])
        agent.store(obs, action, next_obs, action[:, 0], torch.zeros(1))
        agent.update(agent.buffer.sample(BATCH))
    networks = agent.actor, agent.critic, agent.target_critic
    return [*parameters(*networks), agent.log_alpha.detach(), torch.rand(1)]


def test_lambda_1_without_rollouts_is_sac_bit_for_bit():
    sac = learn_a_little(make_agent({}, cup.Agent))
    assert equal(learn_a_little(make_agent(gae_lambda=1.0, rollout_share=0.0)), sac)
    # and neither with a smaller lambda nor with roll-outs
    assert not equal(learn_a_little(make_agent(gae_lambda=1.0, value_updates=5)), sac)
    assert not equal(learn_a_little(make_agent(gae_lambda=0.9, value_updates=5)), sac)


def ready_agent(**changes) -> Mamba:
    """An agent both of whose sources have finished roll-outs."""
    agent = make_agent(rollout_share=1.0, value_updates=5, **changes)
    play(agent, episodes=6, length=10)
    return agent


def test_at_lambda_0_the_target_depends_on_neither_policy_nor_critic_nor_alpha():
    agent, batch = ready_agent(gae_lambda=0.0), make_batch()
    target = agent.td_target(batch, torch.tensor(0.1))
    for p in chain(agent.actor.parameters(), agent.target_critic.parameters()):
        p.data += 1.0
    assert torch.equal(agent.td_target(batch, torch.tensor(5.0)), target)
    for b in range(BATCH):  # r + gamma (1 - d) max_k V^k(s')
        f = max(value(batch.next_obs[b]).item() for value in agent.values)
        expected = batch.reward[b] + agent.args.gamma * (1 - batch.terminated[b]) * f
        assert target[b].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


def test_between_them_the_target_is_a_mix():
    alpha, targets = torch.tensor(0.1), {}
    agent, batch = ready_agent(), make_batch()
    for agent.args.gae_lambda in (0.0, 0.3, 1.0):
        torch.manual_seed(1)
        targets[agent.args.gae_lambda] = agent.td_target(batch, alpha)
    torch.manual_seed(1)
    assert torch.equal(targets[1.0], cup.Agent.td_target(agent, batch, alpha))
    torch.testing.assert_close(targets[0.3], 0.7 * targets[0.0] + 0.3 * targets[1.0])


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
    agent, batch = ready_agent(), make_batch()
    before = parameters(agent.values)
    info = agent.update(batch)
    assert equal(parameters(agent.values), before)
    assert set(info) == set(agent.metrics) - {"train/learner_return"}  # there was no such episode
    plus, minus = (value(batch.next_obs) for value in agent.values)
    assert info["value/largest/plus"] == pytest.approx((plus > minus).float().mean().item())
    assert info["value/largest/plus"] + info["value/largest/minus"] == pytest.approx(1)


# ------------------------------- theory, on tabular problems -------------------------------

STATES, ACTIONS, GAMMA = 4, 3, 0.8


class Table(nn.Module):
    """A function of the state alone, which comes as one-hot; `twins` to stand for a critic."""

    def __init__(self, values: np.ndarray, twins: bool = False):
        super().__init__()
        self.values, self.twins = torch.as_tensor(values), twins

    def forward(self, obs: Tensor, *_) -> Tensor:
        values = obs @ self.values
        return torch.stack([values, values]) if self.twins else values.unsqueeze(1)


class MDP:
    """A random Markov decision process and a few policies (states, actions)."""

    def __init__(self, seed: int, num_policies: int):
        rng = np.random.default_rng(seed)
        self.reward = rng.uniform(-1, 1, (STATES, ACTIONS))
        self.transition = rng.dirichlet(np.full(STATES, 0.3), (STATES, ACTIONS))
        self.policies = rng.dirichlet(np.full(ACTIONS, 0.3), (num_policies, STATES))

    def value(self, policy: np.ndarray) -> np.ndarray:
        """V^pi (states,), by a linear system."""
        transition = np.einsum("sa,sat->st", policy, self.transition)
        return np.linalg.solve(np.eye(STATES) - GAMMA * transition, (policy * self.reward).sum(1))

    def backup(self, value: np.ndarray) -> np.ndarray:
        """r + gamma E[value(s')], (states, actions)."""
        return self.reward + GAMMA * self.transition @ value


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def q_lambda(mdp: MDP, values: list[np.ndarray], policy: np.ndarray, lam: float) -> np.ndarray:
    """What the critic of `policy` converges to with the agent's target, (states, actions).

    The V^k are exact, there is no entropy bonus, and instead of one action of the policy the
    critic is asked for the mean over its actions.
    """
    agent = make_agent(dict.fromkeys(range(len(values))), obs_dim=STATES, gamma=GAMMA,
                       gae_lambda=lam)
    agent.values = nn.ModuleList(map(Table, values))
    agent.rollouts = [torch.zeros(1, 1)] * len(values)  # they are known
    n = STATES * ACTIONS * STATES  # all transitions, (s, a, s')
    next_obs = torch.eye(STATES).repeat(STATES * ACTIONS, 1)
    reward = torch.as_tensor(mdp.reward).repeat_interleave(STATES)
    batch = cup.Batch(next_obs, next_obs, torch.zeros(n, 1), reward, torch.zeros(n), None, None)
    q = np.zeros((STATES, ACTIONS))
    for _ in range(150):
        agent.target_critic = Table((policy * q).sum(axis=1), twins=True)
        target = agent.td_target(batch, torch.zeros(()))
        q = (mdp.transition * target.numpy().reshape(STATES, ACTIONS, STATES)).sum(axis=2)
    return q


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_q_minus_f_is_the_generalised_advantage(lam: float, seed: int):
    """A_lambda = sum_j (gamma lambda)^j E[A(s_j, a_j)], by a linear system instead."""
    mdp = MDP(seed, num_policies=4)
    *sources, policy = mdp.policies
    values = [mdp.value(source) for source in sources]
    f = np.max(values, axis=0)
    one_step = mdp.backup(f) - f[:, None]
    transition = np.einsum("sa,sat->st", policy, mdp.transition)
    rest = np.linalg.solve(np.eye(STATES) - GAMMA * lam * transition, (policy * one_step).sum(1))
    expected = one_step + GAMMA * lam * mdp.transition @ rest
    q = q_lambda(mdp, values, policy, lam)
    np.testing.assert_allclose(q - f[:, None], expected, atol=1e-9)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_with_its_own_value_as_f_every_lambda_gives_q_of_the_policy(lam: float):
    mdp = MDP(0, num_policies=1)
    value = mdp.value(mdp.policies[0])
    q = q_lambda(mdp, [value], mdp.policies[0], lam)
    np.testing.assert_allclose(q, mdp.backup(value), atol=1e-9)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("seed", range(10))
def test_at_lambda_0_following_the_best_source_and_being_greedy_both_improve_on_f(seed: int):
    mdp = MDP(seed, num_policies=3)
    values = [mdp.value(source) for source in mdp.policies]
    f, best = np.max(values, axis=0), np.argmax(values, axis=0)
    q = q_lambda(mdp, values, mdp.policies[0], lam=0.0)
    following = mdp.policies[best, np.arange(STATES)]
    assert (((q - f[:, None]) * following).sum(axis=1) >= -1e-9).all()
    assert (mdp.value(np.eye(ACTIONS)[q.argmax(axis=1)]) >= f - 1e-9).all()


# ------------------------------------ roll-in and roll-out ------------------------------------


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
        assert agent.rollouts[k][:, :OBS_DIM].tolist() == states
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
    obs, returns, _ = agent.states_and_returns(0, agent.rollouts[0])
    after = agent.values[0](torch.tensor([0.0, length])).item()  # as it is now, after training
    assert abs(after) > 0.01
    assert obs.tolist() == [[0, step] for step in range(length)]
    for t in range(length):
        expected = 0.0 if terminates else agent.args.gamma ** (length - t) * after
        for step in range(t, length):
            expected += agent.args.gamma ** (step - t) * reward_at(0, step)
        assert returns[t].item() == pytest.approx(expected, rel=1e-5)


def test_a_rollout_trains_the_value_of_its_source_alone():
    agent = make_agent(rollout_share=1.0, gamma=0.5, value_updates=600, value_lr=1e-2)
    plus, minus = (parameters(value) for value in agent.values)
    play(agent, episodes=1, length=8, terminates=True)
    assert not equal(parameters(agent.values[0]), plus)
    assert equal(parameters(agent.values[1]), minus)
    obs, returns, forecast = agent.states_and_returns(0, agent.rollouts[0])
    error = (agent.values[0](obs) - returns).abs().max()
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


# ---------------------------------------- the command line ----------------------------------------

RUN = "--env-id faulty_envs:Walk-v0 --sources --num-random-sources 2 --value-updates 5"
RUN += " --rollout-share 0.9 --total-timesteps 2400 --eval-interval 1200 --checkpoint-interval 940"
RUN = [*RUN.split(), *SMALL]


def test_a_run_that_is_killed_goes_on_to_the_same_numbers(tmp_path: Path):
    """The checkpoint is in the middle of an episode, after a source has taken over."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    done = run_cup(*RUN, "--run-dir", unbroken, script=SCRIPT)
    assert done.returncode == 0, done.stderr
    process, log = start_cup(*RUN, "--run-dir", killed, script=SCRIPT), killed / "metrics.csv"
    while not (log.exists() and "\n960," in log.read_text()):
        assert process.poll() is None, finish(process).stderr
        time.sleep(0.005)
    process.kill()
    assert finish(process).returncode == -signal.SIGKILL
    checkpoint = torch.load(killed / "checkpoint.pt", weights_only=True)
    assert any(len(path) for path in checkpoint["agent"]["_extra_state"]["mamba"]["paths"])
    resumed = run_cup(*RUN, "--run-dir", killed, "--resume", script=SCRIPT)
    assert resumed.returncode == 0, resumed.stderr
    assert same_result(unbroken, killed)
    last = metrics(unbroken)[-1]
    assert all(last.values()) or not last["train/success_rate"]  # no column is empty
    shares = [float(last[f"value/largest/random-{k}"]) for k in (1, 2)]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("wrong", [
    {"gae_lambda": -0.1}, {"gae_lambda": 1.1}, {"gae_lambda": math.nan}, {"rollout_share": 2.0},
    {"rollout_share": 0.0}, {"value_updates": 0}, {"first_rollouts": 0}, {"gamma": 2.0},
    {"sources": ()},
])
def test_arguments_out_of_range(wrong: dict):
    with pytest.raises(ValueError):
        Args(env_id="none", **wrong)


def test_the_ends_of_the_ranges_are_fine():
    Args(env_id="none", gae_lambda=0.0, rollout_share=1.0)
    Args(env_id="none", gae_lambda=1.0, rollout_share=0.0)


@pytest.mark.parametrize("wrong", ["--gae-lambda 1.5", "--sources"])
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(wrong: str, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mamba.py", "--env-id", "Pendulum-v1", *wrong.split()])
    with pytest.raises(SystemExit) as stop:
        cup.main(Args, Mamba)
    assert stop.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


# ------------------------------------------ it helps ------------------------------------------

LENGTH, NUM_ENVS, UPDATES = 20, 16, 200


def walk(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A walk on a line, (position, time). The reward is the position at the end, and only there.

    So the critic of SAC must carry it back over twenty steps, while V^k knows it after roll-outs.
    """
    state = state + torch.cat([0.2 * action, torch.full_like(action, 1 / LENGTH)], dim=1)
    end = (state[:, 1] > 0.99).float()
    return state, end * state[:, 0], end


def first_state(num: int) -> Tensor:
    return torch.cat([2 * torch.rand(num, 1) - 1, torch.zeros(num, 1)], dim=1)


@torch.no_grad()
def score(policy) -> float:
    """Where the policy's mean action leads from the middle, on average."""
    state = torch.zeros(1, 2)
    for _ in range(LENGTH):
        state, reward, _ = walk(state, torch.tanh(policy(state)[0]))
    return reward.item()


def learn(seed: int, sources: dict, **changes) -> tuple[float, dict]:
    """The score after UPDATES updates, and what the last one logged."""
    settings = {"policy_lr": 1e-3, "q_lr": 1e-3, "init_alpha": 0.01, "hidden_sizes": (32, 32)}
    settings |= {"num_envs": NUM_ENVS, "buffer_size": 10_000, "seed": seed}
    agent_class = Mamba if sources else cup.Agent
    agent = make_agent(sources, agent_class, **settings, **changes)
    torch.manual_seed(seed)
    for t in range(LENGTH + UPDATES):
        if t % LENGTH == 0:
            obs = first_state(NUM_ENVS)
        if t < LENGTH:
            action = 2 * torch.rand(NUM_ENVS, 1) - 1
        else:
            action = agent.act(obs, [t % LENGTH] * NUM_ENVS)
            info = agent.update(agent.buffer.sample(128))
        next_obs, reward, terminated = walk(obs, action)
        agent.store(obs, action, next_obs, reward, terminated)
        obs = next_obs
    return score(agent.actor), info


def noisily(mean: float):
    return lambda obs: (torch.full((len(obs), 1), mean), torch.full((len(obs), 1), -1.5))


def test_a_late_reward_is_learnt_from_the_values_of_sources():
    """Better than SAC and than the better source, which goes right at half the speed."""
    sources = {"left": noisily(-0.5), "right": noisily(0.5)}
    best = 0.2 * LENGTH  # at full speed
    for seed in range(2):
        sac, _ = learn(seed, {})
        ours, info = learn(seed, sources, gae_lambda=0.5, value_updates=20, batch_size=128)
        assert ours > 0.9 * best > max(sac, score(sources["right"]))
        assert info["value/largest/right"] > 0.9
