"""Source policies for CUP: trained by cup.py until they succeed, or cloned from a controller.

    python train_sources.py                              # reach-v2, push-v2, pick-place-v2
    python train_sources.py --env-ids coffee-button-v2 drawer-close-v2 --workers 2
    python train_sources.py --env-ids push-wall-v2 --sources sources/push-v2.pt   # by CUP
    python train_sources.py --env-ids push-v2 --from-controller --output-dir cloned

Writes <env-id>.pt into the output directory once a policy succeeds on fresh goals. What is there
is skipped and what is unfinished goes on where it stopped, so that the same command can be stopped
and started as often as you like.
"""

import csv
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import cup

HERE = Path(__file__).parent
SETTINGS = "--eval-episodes 16 --threads 1 --no-cuda"
# From scratch, what limits learning is how much of the task has been seen, and a step of an
# environment is cheaper than an update: many environments and few, larger updates. Guidance acts
# in the updates: with --sources, cup.py's own settings learn faster.
FROM_SCRATCH = "--num-envs 16 --utd-ratio 0.0625 --batch-size 512 --learning-starts 8000"
FROM_SCRATCH += " --policy-lr 5e-4 --q-lr 5e-4 --eval-interval 50000"


@dataclass
class Args:
    """Make source policies and write them to the output directory."""

    env_ids: tuple[str, ...] = ("reach-v2", "push-v2", "pick-place-v2")  # tasks to learn
    seed: int = 1  # seed of every run; try another where a task gets stuck
    workers: int = 1  # tasks trained at once, one thread each
    total_timesteps: int = 10_000_000  # environment steps after which a task is given up
    target_success: float = 0.95  # success rate, with the mean action, that ends a task's training
    # evaluations in a row, of 16 episodes each, that must reach the target on average
    patience: int = 2
    # fresh goals on which a policy must then reach the target, twice, to be finished
    test_episodes: int = 50
    sources: tuple[str, ...] = ()  # policy files to learn from by CUP; none: SAC
    output_dir: Path = HERE / "sources"  # where <env-id>.pt goes
    runs_dir: Path = HERE / "runs"  # where the runs are kept
    # no training: imitate the controller that Meta-World has for the task
    from_controller: bool = False


def score(args: Args, env_id: str, actor: cup.Actor, first_episode: int) -> dict:
    """Mean and sampled actions on fresh goals, those from `first_episode` on."""
    episodes = args.test_episodes
    with closing(cup.make_envs(env_id, 4, args.seed, 2)) as envs:
        returns, wins = cup.evaluate(actor, envs, episodes, first_episode)
        sampled_wins = cup.evaluate(actor, envs, episodes, first_episode, sample=True)[1]
    rates = {"success_rate": wins.mean().item(), "sampled_success_rate": sampled_wins.mean().item()}
    return rates | {"return": returns.mean().item(), "eval_episodes": episodes}


def write_source(path: Path, actor: cup.Actor, about: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cup.save(cup.policy_content(actor, **about), path)
    rates = f"{about['success_rate']:.0%}, with sampled actions {about['sampled_success_rate']:.0%}"
    print(f"wrote {path}: success {rates}, on {about['eval_episodes']} fresh goals", flush=True)


class Task:
    """A task's run of cup.py: started, watched through its metrics.csv, tested."""

    def __init__(self, args: Args, env_id: str):
        self.args, self.env_id = args, env_id
        self.run_dir = args.runs_dir / f"source__{env_id}__{args.seed}"
        self.source = args.output_dir / f"{env_id}.pt"
        self.process: subprocess.Popen | None = None
        self.tested_at = 0  # step of the last test

    def start(self) -> None:
        args = self.args
        command = [sys.executable, HERE / "cup.py", "--env-id", self.env_id, "--resume"]
        command += ["--seed", str(args.seed), "--total-timesteps", str(args.total_timesteps)]
        command += ["--run-dir", self.run_dir, *SETTINGS.split(), "--sources", *args.sources]
        command += [] if args.sources else FROM_SCRATCH.split()
        # a session of its own: Ctrl-C reaches this script, which then stops its runs
        self.process = subprocess.Popen(command, start_new_session=True)

    def stop(self) -> None:
        """End the run; it writes a checkpoint first."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    def watch(self) -> bool:
        """Test the policy when that is due; whether the task is done."""
        ended = self.process.poll() is not None  # asked before its last rows are read
        if ended and self.process.returncode != 0:
            raise cup.UserError(f"the training of {self.env_id} failed: its message is above")
        rows = []
        if (self.run_dir / "metrics.csv").exists():
            with open(self.run_dir / "metrics.csv", newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["eval/return"]]
        step = int(rows[-1]["step"]) if rows else 0
        if ended and step < self.args.total_timesteps:
            raise cup.UserError(f"somebody stopped {self.run_dir}: the same command goes on")
        # a task that knows no success has none in its rows
        recent = [float(row["eval/success_rate"] or 0) for row in rows[-self.args.patience :]]
        ready = len(recent) == self.args.patience and np.mean(recent) >= self.args.target_success
        if ended or (ready and step > self.tested_at):
            self.tested_at = step
            finished = self.test()
            if finished or ended:
                self.stop()
                best = cup.load_policy(self.run_dir / "best.pt")
                write_source(self.source, best, best.about)
                return True
        return False

    def test(self) -> bool:
        """Score the latest policy on fresh goals and keep the best; whether it will do."""
        actor = cup.load_policy(self.run_dir / "policy.pt")
        target, goals = self.args.target_success, actor.about["step"]  # new ones for every test
        about = actor.about | score(self.args, self.env_id, actor, goals)
        if about["success_rate"] >= target:  # by luck? other goals will tell
            about |= score(self.args, self.env_id, actor, goals + self.args.test_episodes)
        about["sources"] = [Path(source).stem for source in self.args.sources]
        rate, best = about["success_rate"], self.run_dir / "best.pt"
        print(f"{self.env_id}: tested at step {about['step']:,}, success {rate:.0%}", flush=True)
        if not best.exists() or rate > cup.load_policy(best).about["success_rate"]:
            cup.save(cup.policy_content(actor, **about), best)
        return rate >= target


def clone_controller(args: Args, env_id: str) -> tuple[cup.Actor, dict]:
    """Behaviour cloning of the controller that Meta-World has for a task: its actor, and about it.

    The actions taken are noisy, so that states around the controller's path are seen; those to
    learn are the controller's own, by their likelihood under the actor's Gaussian before the tanh.
    """
    from metaworld.policies import ENV_POLICY_MAP

    controller = ENV_POLICY_MAP.get(re.sub("-v2$", "-v3", env_id))
    if controller is None:
        raise cup.UserError(f"Meta-World has no controller for {env_id!r}")
    controller, generator = controller(), np.random.default_rng(args.seed)
    observations, actions = [], []
    with closing(cup.make_env(env_id, cup.derive_seed(args.seed, 0))) as env:
        for _ in range(100):
            obs, _ = env.reset()
            done = False
            while not done:
                action = controller.get_action(obs.astype(np.float64)).clip(-1, 1)
                observations.append(obs)
                actions.append(action)
                action = (action + 0.3 * generator.standard_normal(len(action))).clip(-1, 1)
                obs, _, _, done, _ = env.step(action.astype(np.float32))
    obs, actions = torch.as_tensor(np.array(observations)), torch.as_tensor(np.array(actions))
    pre_tanh = torch.atanh(actions.clamp(-0.98, 0.98))  # whose tanh is an action
    # cup.py takes no source to be more certain than this lower bound of the log-std
    actor = cup.Actor(obs.shape[1], actions.shape[1], (256, 256), log_std_min=-1.5)
    actor.standardize.fit(obs)
    actor.standardize.scale[(obs == 0).all(dim=0)] = 0  # a source ignores what it has never seen
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters := 10_000)
    for _ in range(total_iters):
        index = torch.randint(len(obs), (256,))
        mean, log_std = actor(obs[index])
        loss = torch.nn.functional.gaussian_nll_loss(mean, pre_tanh[index], (2 * log_std).exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return actor.requires_grad_(False), {"env_id": env_id, "step": len(obs), "sources": []}
