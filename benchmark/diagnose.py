"""Is the guidance signal or noise, and how hard does it pull? Looks into checkpoints.

    python benchmark/diagnose.py runs/push-wall-v2__cup__1 ...
    python benchmark/diagnose.py runs/push-wall-v2__cup__1 --figure4

It draws states from a run's replay buffer and takes those at which a source is the guidance
policy. The columns:

- selected: their share of all states
- advantage: of that source over the target policy, as the update estimates it (Eq. 4)
- again: the same with fresh actions, so without the luck that made the source the best
- lasting: that by the target critic, a running average of the critic over some 200 updates: what
  is left without the errors that come and go with every update
- twins_agree: where, as in `again`, both critics put the source ahead; a quarter by chance
- weight, kl: beta_s (Eq. 12) and the KL (Eq. 9), means over those states
- pull: the KL term's gradient with respect to the policy's mean, as a multiple of the gradient of
  SAC's loss; well above 1, imitation overrules the critic

Prints the rows and brings benchmark/diagnosis.csv up to date with them. With --figure4 it plays an
episode instead, and benchmark/figure4.csv has the advantage of every source along it.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import cup
from benchmark.transfer import update_csv

RUN = ["env_id", "seed", "beta1", "beta2", "step"]
FOUND = ["selected", "advantage", "again", "lasting", "twins_agree", "weight", "kl", "pull"]


@dataclass
class Args:
    """Look into the checkpoints of CUP runs."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # run directories of cup.py, with sources
    states: int = 8_192  # states to look at
    fresh_samples: int = 64  # actions of every candidate at each of them, for the second look
    out: Path = HERE  # where the csv files go
    figure4: bool = False  # play an episode of the first run instead


def load_agent(run_dir: Path) -> tuple[cup.Agent, dict]:
    """The agent of a run with sources, and its checkpoint. Raises UserError for another."""
    try:
        path = run_dir / "checkpoint.pt"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if checkpoint["method"] != "cup":
            raise ValueError(f"it is one of {checkpoint['method']}")
        state = checkpoint["agent"]
        buffer = cup.Batch(*state["buffer._extra_state"]["columns"])
        args = cup.Args(**checkpoint["args"] | {"cuda": False, "compile": False})
    except Exception as error:  # no file, another method's, or an older cup.py's
        raise cup.UserError(f"{run_dir} has no checkpoint of a CUP run ({error!r})") from error
    args.buffer_size = len(buffer.obs)  # as much as there is
    sizes = buffer.obs.shape[1], buffer.action.shape[1]
    agent = cup.Agent(args, *sizes, cup.load_sources(args, *sizes))
    agent.load_state_dict(state)
    return agent, checkpoint


def guidance_and_pull(agent: cup.Agent, batch: cup.Batch) -> tuple[dict, Tensor]:
    """What `guidance_loss` says of every state, and the KL term's pull there.

    The pull consists of the two gradients (2, batch, action_dim), SAC's and the KL term's, of the
    actor's loss at the policy's mean before the tanh.
    """
    args, alpha = agent.args, agent.log_alpha.exp().detach()
    mean, log_std = agent.actor(batch.obs)
    noise = torch.randn(args.num_guidance_samples, *mean.shape)
    action, log_prob = cup.squash(mean, log_std, noise)
    q = agent.critic.min_q(batch.obs.expand(len(noise), -1, -1), action)
    kl_loss, states = cup.guidance_loss(
        agent.critic.min_q, batch.obs, mean, log_std, batch.source_mean, batch.source_log_std,
        noise, q, log_prob, alpha if args.soft_advantage else 0.0, args.beta1, args.beta2,
    )
    losses = (alpha * log_prob - q).mean(), kl_loss
    gradients = [torch.autograd.grad(loss, mean, retain_graph=True)[0] for loss in losses]
    return states, torch.stack(gradients)


@torch.no_grad()
def fresh_advantage(actor, critic, batch: cup.Batch, source: Tensor, samples: int) -> Tensor:
    """Advantage (3, batch) of each state's `source` over the target policy `actor`.

    By the first critic, by the second, and by the lesser Q, which is what counts; without the
    entropy term of Eq. 4.
    """
    row = torch.arange(len(batch.obs))
    dists = (batch.source_mean[row, source], batch.source_log_std[row, source]), actor(batch.obs)
    total = torch.zeros(3, len(row))
    for _ in range(samples):
        noise = torch.randn_like(batch.action)
        q = [critic(batch.obs, cup.squash(*dist, noise)[0]) for dist in dists]
        theirs, ours = (torch.cat([x, x.amin(dim=0, keepdim=True)]) for x in q)
        total += theirs - ours
    return total / samples


def look(agent: cup.Agent, num_states: int, fresh_samples: int) -> dict[str, float]:
    """The columns, from an agent as it is; the same numbers every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch = agent.buffer.sample(num_states)
        states, gradients = guidance_and_pull(agent, batch)
        chosen = states["guidance"] < len(agent.sources)
        source, batch = states["guidance"][chosen], cup.Batch(*(x[chosen] for x in batch))
        again, lasting = (
            fresh_advantage(agent.actor, critic, batch, source, fresh_samples)
            for critic in (agent.critic, agent.target_critic)
        )
    sac, kl = gradients[:, chosen].norm(dim=2).mean(dim=1)
    found = {
        "selected": chosen.float().mean(),
        "advantage": states["advantage"].amax(dim=1)[chosen].mean(),
        "again": again[2].mean(),
        "lasting": lasting[2].mean(),
        "twins_agree": (again[:2] > 0).all(dim=0).float().mean(),
        "weight": states["weight"][chosen].mean(),
        "kl": states["kl"][chosen].mean(),
        "pull": kl / sac,
    }
    return {name: value.item() for name, value in found.items()}


@torch.no_grad()
def play(run_dir: Path, samples: int, path: Path) -> None:
    """Play an episode by mean actions; write every candidate's advantage (Eq. 4) at its states."""
    agent, checkpoint = load_agent(run_dir)
    args, states, done = agent.args, [], False
    env = cup.make_env(args.env_id, cup.derive_seed(1, 3))
    obs, _ = env.reset()
    while not done:
        states.append(torch.from_numpy(obs))
        action = torch.tanh(agent.actor(states[-1])[0]).numpy()
        obs, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    print(f"{run_dir}: return {info['return']:.1f}, success {info['success']:.0%}")
    obs = torch.stack(states)
    sources = cup.query_sources(agent.sources, obs, agent.actor.action_dim)
    parts = zip(sources, agent.actor(obs))
    mean, log_std = (torch.cat([x, y.unsqueeze(1)], dim=1) for x, y in parts)  # (steps, n + 1, ...)
    torch.manual_seed(1)
    noise = torch.randn(samples, len(obs), 1, agent.actor.action_dim)
    action, log_prob = cup.squash(mean, log_std, noise)
    q = agent.critic.min_q(obs.unsqueeze(1).expand(*action.shape[:3], -1), action)
    alpha = agent.log_alpha.exp() if args.soft_advantage else 0.0
    advantage, value = cup.expected_advantage(q, log_prob, alpha)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["env_id", "seed", "trained", "step", "candidate", "advantage", "value"])
        for step in range(len(obs)):
            for k, name in enumerate([*agent.sources, "target"]):
                about = args.env_id, args.seed, checkpoint["step"], step, name
                writer.writerow([*about, f"{advantage[step, k]:.5g}", f"{value[step]:.5g}"])


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        if not args.run_dirs:
            raise cup.UserError("name a run directory, such as runs/push-wall-v2__cup__1")
        if args.figure4:
            return play(args.run_dirs[0], args.fresh_samples, args.out / "figure4.csv")
        for run_dir in args.run_dirs:
            agent, checkpoint = load_agent(run_dir)
            row = {name: (checkpoint["args"] | checkpoint)[name] for name in RUN}
            found = look(agent, args.states, args.fresh_samples)
            row |= {name: f"{value:.3g}" for name, value in found.items()}
            print(", ".join(f"{name} {value}" for name, value in row.items()))
            update_csv(args.out / "diagnosis.csv", RUN + FOUND, len(RUN), [row])
    except cup.UserError as error:
        print(f"diagnose.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
