"""Source policies for CUP: trained by cup.py until they succeed, or cloned from a controller.

    python train_sources.py                              # reach-v2, push-v2, pick-place-v2
    python train_sources.py --env-ids coffee-button-v2 drawer-close-v2 --workers 2
    python train_sources.py --env-ids push-wall-v2 --sources sources/push-v2.pt   # by CUP
    python train_sources.py --env-ids push-v2 --from-controller --output-dir cloned

Writes <env-id>.pt into the output directory once a policy succeeds on fresh goals, or, when the
steps are over, the best of those that were tested, of which the last is one. What is there is
skipped, and what is unfinished goes on where it stopped: stop it and start it again as you like.
"""

import csv
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    patience: int = 2  # evaluations in a row that must reach the target on average
    test_episodes: int = 50  # fresh goals on which a policy must then reach the target, twice
    sources: tuple[str, ...] = ()  # policy files to learn from by CUP; none: SAC
    from_controller: bool = False  # no training: imitate the controller that Meta-World ships
    output_dir: Path = HERE / "sources"  # where <env-id>.pt goes
    runs_dir: Path = HERE / "runs"  # where the runs are kept

    def __post_init__(self):
        if min(self.workers, self.patience, self.test_episodes) < 1:
            raise ValueError("--workers, --patience and --test-episodes must be positive")
        if not 0 <= self.target_success <= 1:
            raise ValueError("--target-success must be between 0 and 1")


def score(args: Args, env_id: str, actor: cup.Actor, first_episode: int) -> dict:
    """Mean and sampled actions on fresh goals, those from `first_episode` on."""
    with closing(cup.make_env(env_id, cup.derive_seed(args.seed, 2, 0))) as env:
        returns, wins = cup.evaluate(actor, env, args.test_episodes, first_episode)
        sampled_wins = cup.evaluate(actor, env, args.test_episodes, first_episode, sample=True)[1]
    rates = {"success_rate": wins.mean().item(), "sampled_success_rate": sampled_wins.mean().item()}
    return rates | {"return": returns.mean().item(), "eval_episodes": args.test_episodes}


def write_source(args: Args, env_id: str, actor: cup.Actor, about: dict) -> None:
    path = args.output_dir / f"{env_id}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    cup.save(cup.policy_content(actor, **about), path)
    rates = f"{about['success_rate']:.0%}, with sampled actions {about['sampled_success_rate']:.0%}"
    print(f"wrote {path}: success {rates}, on {about['eval_episodes']} fresh goals", flush=True)


def test(args: Args, env_id: str, run_dir: Path) -> bool:
    """Score a run's policy on fresh goals and keep the best so far; whether it will do."""
    actor, best = cup.load_policy(run_dir / "policy.pt"), run_dir / "best.pt"
    goals = actor.about["step"]  # new ones for every test
    about = actor.about | {"sources": [Path(source).stem for source in args.sources]}
    about |= score(args, env_id, actor, goals)
    if about["success_rate"] >= args.target_success:  # by luck? other goals will tell
        about |= score(args, env_id, actor, goals + args.test_episodes)
    rate = about["success_rate"]
    print(f"{env_id}: tested at step {goals:,}, success {rate:.0%}", flush=True)
    passed = rate >= args.target_success
    if passed or not best.exists() or rate > cup.load_policy(best).about["success_rate"]:
        cup.save(cup.policy_content(actor, **about), best)
    return passed


def train(args: Args, env_id: str) -> Iterator[None]:
    """Run cup.py on a task until a policy passes or the steps are over; yields while it runs."""
    run_dir = args.runs_dir / f"source__{env_id}__{args.seed}"
    metrics = run_dir / "metrics.csv"
    command = [sys.executable, HERE / "cup.py", "--env-id", env_id, "--run-dir", run_dir]
    command += ["--resume", "--seed", str(args.seed), *SETTINGS.split()]
    command += ["--total-timesteps", str(args.total_timesteps), "--sources", *args.sources]
    command += [] if args.sources else FROM_SCRATCH.split()
    process = subprocess.Popen(command)
    tested_at = 0
    try:
        while True:
            ended = process.poll() is not None  # asked before its last rows are read
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            rows = [row for row in csv.DictReader(lines) if row.get("eval/return")]
            step = int(rows[-1]["step"]) if rows else 0
            if ended and (process.returncode != 0 or step < args.total_timesteps):
                raise cup.UserError(f"{env_id} stopped at step {step:,}: cup.py says why, above")
            # a task that knows no success has none in its rows
            recent = [float(row.get("eval/success_rate") or 0) for row in rows[-args.patience :]]
            ready = len(recent) == args.patience and np.mean(recent) >= args.target_success
            if ended or (ready and step > tested_at):
                tested_at = step
                if test(args, env_id, run_dir) or ended:
                    best = cup.load_policy(run_dir / "best.pt")
                    write_source(args, env_id, best, best.about)
                    return
            yield
    finally:
        process.terminate()  # it writes a checkpoint first
        process.wait()


def metaworld_controller(env_id: str) -> Callable[[np.ndarray], np.ndarray]:
    """The controller that Meta-World ships for a task: obs (obs_dim,) -> action (action_dim,)."""
    from metaworld.policies import ENV_POLICY_MAP

    name = re.sub("-v2$", "-v3", env_id)
    if name not in ENV_POLICY_MAP:
        raise cup.UserError(f"Meta-World has no controller for {env_id!r}")
    return ENV_POLICY_MAP[name]().get_action


def clone_controller(
    args: Args, env_id: str, controller: Callable[[np.ndarray], np.ndarray], episodes: int = 100,
    updates: int = 10_000,
) -> None:
    """Write a source that imitates a controller.

    The actions taken are noisy, so that states around the controller's path are seen. Those to
    learn are the controller's own, by their likelihood under the actor's Gaussian before the tanh.
    """
    generator = np.random.default_rng(args.seed)
    observations, actions = [], []
    with closing(cup.make_env(env_id, cup.derive_seed(args.seed, 0))) as env:
        for _ in range(episodes):
            obs, ended = env.reset()[0], False
            while not ended:
                action = controller(obs.astype(np.float64)).clip(-1, 1)
                observations.append(obs)
                actions.append(action)
                noisy = action + 0.3 * generator.standard_normal(len(action))
                noisy = noisy.clip(-1, 1).astype(np.float32)
                obs, _, terminated, truncated, _ = env.step(noisy)
                ended = terminated or truncated
    obs, action = torch.from_numpy(np.stack(observations)), torch.from_numpy(np.stack(actions))
    pre_tanh = action.float().clamp(-0.98, 0.98).atanh()  # infinite at -1 and 1
    # a log-std below -1.5 is taken for -1.5 of a source: see query_sources
    actor = cup.Actor(obs.shape[1], action.shape[1], (256, 256), log_std_min=-1.5)
    actor.standardize.fit(obs)
    actor.standardize.scale[(obs == 0).all(dim=0)] = 0  # a source ignores what it has never seen
    optimizer = torch.optim.Adam(actor.parameters(), lr=5e-4, fused=True)
    for _ in range(updates):
        index = torch.randint(len(obs), (256,))
        mean, log_std = actor(obs[index])
        loss = torch.nn.functional.gaussian_nll_loss(mean, pre_tanh[index], (2 * log_std).exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    about = {"env_id": env_id, "step": len(obs), "sources": []} | score(args, env_id, actor, 0)
    write_source(args, env_id, actor, about)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    waiting, running, failed = [], [], False
    for env_id in args.env_ids:
        path = args.output_dir / f"{env_id}.pt"
        if path.exists():
            rate = cup.load_policy(path).about.get("success_rate", np.nan)
            print(f"finished: {path}, success {rate:.0%}", flush=True)
        elif args.from_controller:
            clone_controller(args, env_id, metaworld_controller(env_id))
        else:
            waiting.append(train(args, env_id))
    try:
        while waiting or running:
            while waiting and len(running) < args.workers:
                running.append(waiting.pop(0))
            for task in list(running):
                try:
                    if next(task, "done") == "done":
                        running.remove(task)
                except cup.UserError as error:  # the other tasks go on
                    print(f"train_sources.py: {error}", file=sys.stderr)
                    running.remove(task)
                    failed = True
            time.sleep(1)
    finally:
        for task in running:
            task.close()
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except cup.UserError as error:
        print(f"train_sources.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: the same command goes on")
        sys.exit(130)
