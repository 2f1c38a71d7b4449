"""MULTIPOLAR: what its policy is made of, what learns in it, and that it helps where it should."""

import signal
import time
from pathlib import Path

import pytest
import torch
from program import PENDULUM, finish, metrics, run_cup, same_result, start_cup, weights
from test_learning import THRUST, first_states, pilot
from torch import Tensor

import cup
from baselines.multipolar import Aggregate, Args, Multipolar

SCRIPT = Path(cup.__file__).parent / "baselines/multipolar.py"
OBS_DIM, ACTION_DIM, BATCH, K = 5, 2, 16, 3


def make_sources(num: int = K) -> dict[str, cup.Actor]:
    """Untrained sources that are far apart."""
    torch.manual_seed(9)
    sources = {f"source-{k}": cup.Actor(OBS_DIM, ACTION_DIM, (16,)) for k in range(num)}
    for k, actor in enumerate(sources.values()):
        actor.net[-1].bias.data[:ACTION_DIM] += k - 1
    return sources


def make_agent(sources: dict) -> Multipolar:
    torch.manual_seed(0)
    args = Args(env_id="none", hidden_sizes=(32, 32), buffer_size=100, batch_size=BATCH)
    return Multipolar(args, OBS_DIM, ACTION_DIM, sources)


def make_actor(sources: dict, theta: Tensor | float = 1.0, residual: bool = False) -> Aggregate:
    """The policy of an agent, with this theta, and F = 0 unless `residual`."""
    actor = make_agent(sources).actor.requires_grad_(False)
    actor.theta.copy_(torch.as_tensor(theta).expand_as(actor.theta))
    if not residual:
        actor.net[-1].weight[:ACTION_DIM] = 0
        actor.net[-1].bias[:ACTION_DIM] = 0
    return actor


def make_batch() -> cup.Batch:
    obs, next_obs = torch.randn(2, BATCH, OBS_DIM)
    none = torch.empty(BATCH, 0, ACTION_DIM)
    action, reward = torch.rand(BATCH, ACTION_DIM), torch.randn(BATCH)
    return cup.Batch(obs, next_obs, action, reward, torch.zeros(BATCH), none, none)


# ------------------------------------------ the policy ------------------------------------------


@pytest.mark.parametrize("k", range(K))
def test_one_hot_theta_without_residual_is_a_source_to_the_last_bit(k: int):
    sources, obs = make_sources(), torch.randn(1000, OBS_DIM)
    theta = torch.zeros(K, ACTION_DIM)
    theta[k] = K
    means = list(sources.values())[k](obs)[0]
    assert means.abs().max() < 2.5  # where clipping changes nothing
    assert torch.equal(make_actor(sources, theta)(obs)[0], means)


def test_source_means_are_clipped_as_in_cup():
    source = cup.Actor(OBS_DIM, ACTION_DIM, (16,))
    source.net[-1].bias.data[:ACTION_DIM] = torch.tensor([100.0, -100.0])
    action = make_actor({"far": source})(torch.randn(BATCH, OBS_DIM))[0]
    assert torch.equal(action, torch.tensor([2.5, -2.5]).expand(BATCH, 2))


def test_theta_starts_as_the_mean_of_the_sources():
    sources, obs = make_sources(), torch.randn(BATCH, OBS_DIM)
    assert torch.equal(make_agent(sources).actor.theta, torch.ones(K, ACTION_DIM))
    means = torch.stack([source(obs)[0] for source in sources.values()])
    torch.testing.assert_close(make_actor(sources)(obs)[0], means.mean(dim=0))


def test_theta_zero_is_an_actor_bit_for_bit():
    """F and the log-std are SAC's actor, and with the same seed they start with its weights."""
    sources, obs = make_sources(), torch.randn(BATCH, OBS_DIM)
    torch.manual_seed(0)
    args = cup.Args(env_id="none", hidden_sizes=(32, 32), buffer_size=100)
    sac = cup.Agent(args, OBS_DIM, ACTION_DIM, {})
    after_sac = torch.rand(1)
    agent = make_agent(sources)
    assert torch.equal(torch.rand(1), after_sac)  # no draws of its own
    for ours, theirs in zip(agent.critic.parameters(), sac.critic.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(make_actor(sources, 0.0, residual=True)(obs), sac.actor(obs)):
        assert torch.equal(ours, theirs)


def test_the_mean_against_a_loop_over_sources_and_dimensions():
    sources, obs = make_sources(), torch.randn(BATCH, OBS_DIM)
    theta = torch.randn(K, ACTION_DIM)
    residual = make_actor(sources, 0.0, residual=True)(obs)[0]
    ours = make_actor(sources, theta, residual=True)(obs)[0]
    for b in range(BATCH):
        for d in range(ACTION_DIM):
            aggregate = 0.0
            for k, source in enumerate(sources.values()):
                aggregate += theta[k, d].item() * source(obs[b])[0][d].item() / K
            expected = aggregate + residual[b, d].item()
            assert ours[b, d].item() == pytest.approx(expected, abs=1e-5)


def test_copies_of_a_source_count_as_one():
    obs, source = torch.randn(BATCH, OBS_DIM), make_sources(1)["source-0"]
    one = make_actor({"a": source}, residual=True)(obs)[0]
    many = make_actor(dict.fromkeys("abc", source), residual=True)(obs)[0]
    torch.testing.assert_close(many, one)


# ------------------------------------------ what learns ------------------------------------------


def test_sources_get_no_gradient_and_theta_learns_at_the_rate_of_the_policy():
    sources = make_sources()  # their weights would take gradients
    agent = make_agent(sources)
    before = [p.detach().clone() for p in agent.actor.parameters()]
    batch = make_batch()
    info = agent.update(batch)
    for source in sources.values():
        assert all(p.grad is None for p in source.parameters())
    for old, new in zip(before, agent.actor.parameters(), strict=True):
        assert not torch.equal(old, new)
    steps = (agent.actor.theta - 1).abs()  # Adam's first step is its learning rate
    torch.testing.assert_close(steps, torch.full_like(steps, agent.args.policy_lr), rtol=1e-3,
                               atol=0)
    assert set(info) == set(agent.metrics)
    assert info["theta/source-2/1"] == agent.actor.theta[2, 1]


# ---------------------------------------- the command line ----------------------------------------


def test_a_run_that_is_killed_goes_on_to_the_same_numbers(tmp_path: Path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert run_cup(*PENDULUM, "--run-dir", unbroken, script=SCRIPT).returncode == 0
    process, log = start_cup(*PENDULUM, "--run-dir", killed, script=SCRIPT), killed / "metrics.csv"
    while not (log.exists() and "\n500," in log.read_text()):
        assert process.poll() is None, finish(process).stderr
        time.sleep(0.005)
    process.kill()
    assert finish(process).returncode == -signal.SIGKILL
    resumed = run_cup(*PENDULUM, "--run-dir", killed, "--resume", script=SCRIPT)
    assert resumed.returncode == 0, resumed.stderr
    assert same_result(unbroken, killed)
    theta = weights(unbroken)["theta"]  # of two untrained sources in the one action dimension
    logged = [float(metrics(unbroken)[-1][f"theta/random-{k}/0"]) for k in (1, 2)]
    assert theta.flatten().tolist() == pytest.approx(logged)
    assert (theta - 1).abs().min() > 1e-3
    with pytest.raises(cup.UserError):  # it would be taken for F alone
        cup.load_policy(unbroken / "policy.pt")


def test_without_sources_it_is_one_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["multipolar.py", "--env-id", "Pendulum-v1", "--sources"])
    with pytest.raises(SystemExit) as stop:
        cup.main(Args, Multipolar)
    assert stop.value.code == 2
    assert "MULTIPOLAR aggregates source policies" in capsys.readouterr().err


# ------------------------------------------ it helps ------------------------------------------

NUM_ENVS, EPISODE, RANDOM_STEPS, UPDATES = 16, 40, 40, 400
WIND = 0.03  # what the pilot does not know of: it comes to rest beside the origin


def windy_step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """The point of test_learning.py, which a wind pushes along both axes."""
    position, velocity = state.split(2, dim=1)
    velocity = 0.9 * velocity + action @ THRUST.T
    position = (position + velocity + WIND).clamp(-2, 2)
    return torch.cat([position, velocity], dim=1), -position.norm(dim=1)


@torch.no_grad()
def score(policy) -> float:
    """Mean reward per step of the mean action."""
    torch.manual_seed(1000)
    state, total = first_states(200), 0.0
    for _ in range(EPISODE):
        state, reward = windy_step(state, torch.tanh(policy(state)[0]))
        total += reward.mean().item() / EPISODE
    return total


def learn(seed: int, sources: dict) -> float:
    torch.manual_seed(seed)
    settings = {"policy_lr": 1e-3, "q_lr": 1e-3, "gamma": 0.95, "hidden_sizes": (64, 64)}
    args = Args(env_id="none", num_envs=NUM_ENVS, buffer_size=20_000, **settings)
    agent_class = Multipolar if sources else cup.Agent
    agent = agent_class(args, OBS_DIM - 1, 2 * ACTION_DIM, sources)
    for t in range(RANDOM_STEPS + UPDATES):
        if t % EPISODE == 0:
            obs = first_states(NUM_ENVS)
        action = agent.act(obs, [t % EPISODE] * NUM_ENVS)
        if t < RANDOM_STEPS:
            action = 2 * torch.rand_like(action) - 1
        next_obs, reward = windy_step(obs, action)
        agent.store(obs, action, next_obs, reward, torch.zeros(NUM_ENVS))
        obs = next_obs
        if t >= RANDOM_STEPS:
            agent.update(agent.buffer.sample(128))
    return score(agent.actor)


def test_a_source_that_is_nearly_right_helps():
    """Better than SAC for every seed, and better than the source, whose error F mends."""
    sac = [learn(seed, {}) for seed in range(2)]
    ours = [learn(seed, {"pilot": pilot}) for seed in range(2)]
    assert all(a > b for a, b in zip(ours, sac, strict=True))
    assert sum(ours) > 0.8 * sum(sac)  # rewards are negative: nearer by a fifth
    assert min(ours) > 2 / 3 * score(pilot)
