"""Train source policies for CUP: cup.py's SAC, one process a task, until they succeed.

    python train_sources.py                              # reach-v2, push-v2, pick-place-v2
    python train_sources.py --env-ids coffee-button-v2 drawer-close-v2 --workers 2
    python train_sources.py --env-ids push-wall-v2 --sources sources/push-v2.pt   # by CUP

Writes sources/<env-id>.pt once a policy succeeds on fresh goals. Finished tasks are
skipped and unfinished ones go on where they stopped, so stop it and start it as you like.
"""

import csv
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import cup

HERE = Path(__file__).parent
SETTINGS = "--eval-episodes 16 --threads 1 --no-cuda"
# From scratch, what limits learning is how much of the task has been seen, and a step of
# an environment is cheaper than an update: many environments and few, larger updates.
# Guidance acts in the updates: with --sources, cup.py's own settings learn faster.
FROM_SCRATCH = "--num-envs 16 --utd-ratio 0.0625 --batch-size 512 "
FROM_SCRATCH += "--learning-starts 8000 --policy-lr 5e-4 --q-lr 5e-4 "
FROM_SCRATCH += "--eval-interval 50000"


@dataclass
class Args:
    """Train source policies and write them to the output directory."""

    env_ids: tuple[str, ...] = ("reach-v2", "push-v2", "pick-place-v2")
    """tasks to train on"""
    seed: int = 1
    """seed of every run; try another where a task gets stuck"""
    workers: int = 1
    """tasks trained at once, one thread each"""
    total_timesteps: int = 10_000_000
    """environment steps after which a task is given up"""
    target_success: float = 0.95
    """success rate, with the mean action, that ends a task's training"""
    patience: int = 2
    """evaluations in a row, of 16 episodes each, that must reach the target on average"""
    test_episodes: int = 50
    """fresh goals on which a policy must then reach the target, twice, to be finished"""
    sources: tuple[str, ...] = ()
    """policy files to learn from by CUP; none: plain SAC"""
    output_dir: str = str(HERE / "sources")
    """where <env-id>.pt goes"""
    runs_dir: str = str(HERE / "runs")
    """where the runs are kept"""


class Task:
    """One task's run of cup.py: started, watched through its metrics.csv, tested."""

    def __init__(self, args: Args, env_id: str):
        self.args, self.env_id = args, env_id
        self.run_dir = Path(args.runs_dir) / f"source__{env_id}__{args.seed}"
        self.policy = Path(args.output_dir) / f"{env_id}.pt"
        self.process: subprocess.Popen | None = None
        self.tested_at = 0  # step of the last policy put to the test
        self.line = "waiting"

    def start(self) -> None:
        command = [sys.executable, str(HERE / "cup.py")]
        if (self.run_dir / "checkpoint.pt").exists():
            command += ["--resume", str(self.run_dir)]
        else:
            command += ["--env-id", self.env_id, "--seed", str(self.args.seed)]
            command += ["--run-dir", str(self.run_dir), *SETTINGS.split()]
            command += ["--sources", *self.args.sources]
            command += [] if self.args.sources else FROM_SCRATCH.split()
        command += ["--total-timesteps", str(self.args.total_timesteps)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        # a session of its own: Ctrl-C reaches this script, which then stops its runs
        self.process = subprocess.Popen(command, start_new_session=True, **pipes)

    def stop(self) -> None:
        """End the run; it writes a checkpoint first."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    def evaluations(self) -> list[dict[str, str]]:
        try:
            with open(self.run_dir / "metrics.csv", newline="") as file:
                rows = list(csv.DictReader(file))
        except FileNotFoundError:
            return []
        if rows:
            step, rate = int(rows[-1]["step"]), rows[-1]["time/steps_per_second"]
            train = f"{float(rows[-1]['train/return'] or 'nan'):.0f}"
            self.line = f"step {step:,}, {rate}/s, training return {train}"
        rows = [row for row in rows if row["eval/success_rate"]]
        if rows:
            self.line += f", success {float(rows[-1]['eval/success_rate']):.0%}"
        return rows

    def watch(self) -> bool:
        """Look after the run; True once there is nothing more to do for this task."""
        rows = self.evaluations()
        recent = [float(r["eval/success_rate"]) for r in rows[-self.args.patience :]]
        ready = len(recent) == self.args.patience
        ready = ready and sum(recent) / len(recent) >= self.args.target_success
        ended = self.process.poll() is not None
        if ended and self.process.returncode != 0:
            raise SystemExit(f"{self.env_id}: {self.process.stderr.read().strip()}")
        if ended or (ready and int(rows[-1]["step"]) > self.tested_at):
            self.tested_at = int(rows[-1]["step"])
            if self.test(last=ended):
                self.stop()
                return True
        return ended

    def test(self, last: bool) -> bool:
        """Score the latest policy on fresh goals; ship the best so far if it will do."""
        actor = cup.load_policy(self.run_dir / "policy.pt")
        target, episodes = self.args.target_success, self.args.test_episodes
        goals = actor.about["step"]  # new ones for every test
        about = actor.about | self.score(actor, goals)
        if about["success_rate"] >= target:  # by luck? other goals will tell
            about |= self.score(actor, goals + episodes)
        about["sources"] = [Path(source).stem for source in self.args.sources]
        self.line += f", tested: {about['success_rate']:.0%} of {episodes} fresh goals"
        best = self.run_dir / "best.pt"
        before = cup.load_policy(best).about["success_rate"] if best.exists() else -1
        if about["success_rate"] > before:
            cup.save(cup.policy_file(actor, **about), best)
        finished = about["success_rate"] >= target
        if finished or last:
            self.policy.parent.mkdir(parents=True, exist_ok=True)
            actor = cup.load_policy(best)
            about = actor.about
            cup.save(cup.policy_file(actor, **about), self.policy)
            self.line = f"wrote {self.policy}: success {about['success_rate']:.0%} on "
            self.line += f"{episodes} fresh goals, with sampled actions "
            self.line += f"{about['sampled_success_rate']:.0%}"
        return finished

    def score(self, actor: cup.Actor, goals: int) -> dict[str, float]:
        """Mean and sampled actions on the episodes from number `goals` on."""
        episodes = self.args.test_episodes
        with closing(cup.VectorEnv(self.env_id, 4, self.args.seed, 2)) as envs:
            mean = cup.evaluate(actor, envs, episodes, goals)
            sampled = cup.evaluate(actor, envs, episodes, goals, sample=True)
        result = {"success_rate": mean["success"], "return": mean["return"]}
        result["sampled_success_rate"] = sampled["success"]
        result = {name: values.mean().item() for name, values in result.items()}
        return result | {"eval_episodes": episodes}


def show(tasks: list[Task], again: bool) -> None:
    """One line a task, drawn over the last ones on a terminal."""
    terminal = sys.stdout.isatty()
    if again and terminal:
        print(f"\033[{len(tasks)}F", end="")
    clear = "\033[K" if terminal else ""
    for task in tasks:
        print(f"{clear}{task.env_id:20} {task.line}", flush=True)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    tasks = [Task(args, env_id) for env_id in args.env_ids]
    for task in tasks:
        if task.policy.exists():
            about = cup.load_policy(task.policy).about
            task.line = f"finished: {task.policy}, success {about['success_rate']:.0%}"
    waiting = [task for task in tasks if not task.policy.exists()]
    running: list[Task] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shown = 0.0
    try:
        while waiting or running:
            while waiting and len(running) < args.workers:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(1)
            running = [task for task in running if not task.watch()]
            if time.time() - shown > (1 if sys.stdout.isatty() else 60):
                show(tasks, again=shown > 0)
                shown = time.time()
        show(tasks, again=shown > 0)
    except KeyboardInterrupt:
        print("stopping; the same command goes on")
        sys.exit(130)
    finally:
        for task in running:
            task.stop()


if __name__ == "__main__":
    try:
        main()
    except cup.UserError as error:
        print(f"train_sources.py: {error}", file=sys.stderr)
        sys.exit(2)
