"""Figure 4 of the paper: every candidate's expected advantage along one episode.

    python benchmark/figure4.py runs/pick-place-wall-v2__cup__1

By the critic of the run's last checkpoint, at the states of an episode of the mean action, with one
action a candidate, as in training. Writes results/figure4.csv and figures/figure4.png.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import compiled  # noqa: E402
from plot import CANDIDATES  # noqa: E402

import cup  # noqa: E402


@dataclass
class Args:
    """Play an episode with the policy of a CUP run, and draw the advantages."""
    run_dir: tyro.conf.Positional[Path]  # of a run with sources
    out: Path = HERE  # the csv goes to results/ in here, and the figure to figures/


@torch.no_grad()
def advantages(args: cup.Args, run: dict) -> dict[str, list[float]]:
    """Expected advantages (Eq. 4) of every candidate by name, one for each step of an episode."""
    env = cup.make_env(args.env_id, seed=0)
    sizes = env.observation_space.shape + env.action_space.shape
    # compiled.py's critics have other weights; nothing is compiled before the first update
    agent_class = cup.Agent if "critic.q1.0.weight" in run["agent"] else compiled.Agent
    agent = agent_class(args, *sizes, cup.load_sources(args, *sizes))
    agent.load_state_dict(run["agent"])
    states, info = [torch.tensor(env.reset(seed=0)[0])], {}
    while not info:  # it comes with the episode's end
        action = torch.tanh(agent.actor(states[-1])[0])
        obs, _, _, _, info = env.step(action.numpy())
        states.append(torch.tensor(obs))
    obs = torch.stack(states[:-1])
    mean, log_std = agent.actor(obs)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    action, log_prob = cup.squash(mean, log_std, noise)
    alpha = agent.log_alpha.exp() if args.soft_advantage else 0.0
    source_mean, source_log_std = cup.query_sources(agent.sources, obs, sizes[1])
    _, per_state = cup.guidance_loss(
        critic=agent.critic.min_q, obs=obs, mean=mean, log_std=log_std, source_mean=source_mean,
        source_log_std=source_log_std, noise=noise, q=agent.critic.min_q(obs, action),
        log_prob=log_prob, alpha=alpha, beta1=args.beta1, beta2=args.beta2,
    )
    columns = per_state["advantage"].T.tolist()
    return dict(zip([*agent.source_names, "target"], columns, strict=True))


def main() -> None:
    options = tyro.cli(Args, description=__doc__)
    run_dir, out = options.run_dir, options.out
    args = cup.Args(**json.loads((run_dir / "args.json").read_text())["args"])
    run = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    curves = advantages(args, run)
    with open(out / "results" / "figure4.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["env_id", "seed", "trained", "step", *curves])
        for step, row in enumerate(zip(*curves.values(), strict=True)):
            writer.writerow([args.env_id, args.seed, run["step"], step, *(f"{x:.5g}" for x in row)])
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(curve, color=CANDIDATES.get(name, "0.6"), lw=1.2, label=name)
    axes.set_title(f"{args.env_id}, seed {args.seed}, after {run['step']:,} steps")
    axes.set(xlabel="step of the episode", ylabel="expected advantage")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(out / "figures" / "figure4.png", dpi=110)


if __name__ == "__main__":
    main()
