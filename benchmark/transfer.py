"""The transfer study, Figures 2 and 3 of the paper: every task x method x seed.

Each job is one `cup.py` command on one thread. It can be stopped and started again at
any time: finished runs are skipped, others go on from their checkpoint.

    python benchmark/transfer.py --list                   # the commands, one a line
    python benchmark/transfer.py --workers 2              # run them, then collect
    python benchmark/transfer.py --status                 # from another terminal
    python benchmark/transfer.py --cluster slurm --workers 36
    python benchmark/transfer.py --tag beta10 --seeds 100 -- --beta1 10

What follows `--` goes to every `cup.py`. Curves are collected into transfer.csv and
selection.csv, those of tagged runs into tuning.csv; plot.py draws them.
"""

import contextlib
import csv
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
STEPS = {  # 300,000 or until a method's mean has passed 50 % success; a million at most
    "hammer-v2": 1_000_000,
    "peg-insert-side-v2": 500_000,
    "push-wall-v2": 300_000,
    "pick-place-wall-v2": 540_000,
    "push-back-v2": 560_000,
    "shelf-place-v2": 1_000_000,
}
SOURCES = ("reach-v2", "push-v2", "pick-place-v2")
TUNED = ("sources", "beta1", "beta2", "num_guidance_samples", "soft_advantage")
TUNED += ("source_mean_bound", "source_log_std_min", "guidance_starts")
TUNED += ("num_envs", "utd_ratio", "batch_size", "policy_lr", "q_lr")
TUNED += ("alpha_lr", "init_alpha")
GUIDED = {"target_selected": "guidance/selected/target", "entropy": "entropy"}
SELECTION = ("selected", "advantage", "success_rate")
MAX_POINTS = 150  # of each candidate's curve in selection.csv


@dataclass
class Args:
    """Run the transfer study, or look at it. Arguments of cup.py follow a `--`."""

    tasks: tuple[str, ...] = tuple(STEPS)
    """target tasks"""
    methods: tuple[Literal["cup", "sac"], ...] = ("cup", "sac")
    """cup: cup.py's own three sources; sac: none"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds; the first one of every task comes before the second of any"""
    total_timesteps: int | None = None
    """environment steps of every run; by default the study's for the task, 300,000 for
    others; a larger number goes on with finished runs"""
    workers: int = os.cpu_count() or 1
    """jobs at a time, one thread each"""
    cluster: Literal["local", "slurm"] = "local"
    """where to run: processes on this machine, or a Slurm job array"""
    partition: str | None = None
    """Slurm partition"""
    hours: float = 72.0
    """time limit of a job; one that needs longer saves itself and is queued again"""
    runs_dir: Path = Path("runs/transfer")
    """where the run directories are"""
    out: Path = ROOT / "benchmark"
    """where the csv files go; what they know of runs that are not here is kept"""
    tag: str = ""
    """name of a variant of the settings: its own run directories, and tuning.csv"""
    list: bool = False
    """print the command of every job and exit"""
    status: bool = False
    """print what is done, running and left, and exit"""
    collect: bool = False
    """write the csv files and exit"""


class UserError(Exception):
    """Something the user can put right; `main` prints it and exits with code 2."""


@contextlib.contextmanager
def ignored(*signals: int):
    """Ignore the signals, here and for good in processes started meanwhile."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv; none where there is no such file yet."""
    try:
        with open(run_dir / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


@dataclass
class Job:
    """One run. submitit calls it, wherever the run is to happen."""

    env_id: str
    method: str
    seed: int
    total_timesteps: int
    dir: Path
    extra: list[str] = field(default_factory=list)

    def command(self, python: str = "python", resume: bool = False) -> list[str]:
        """What starts the run, or goes on with it, from the current directory."""
        command = [python, os.path.relpath(ROOT / "cup.py")]
        if resume:
            command += ["--resume", str(self.dir)]
        else:
            command += ["--env-id", self.env_id, "--seed", str(self.seed)]
        command += ["--total-timesteps", str(self.total_timesteps)]
        if not resume:
            command += ["--threads", "1", "--run-dir", str(self.dir)]
        # of several --sources the last one counts
        return command + self.extra + ["--sources"] * (self.method == "sac")

    def row(self) -> dict[str, str]:
        """The last row of the run's metrics.csv so far."""
        return (read_metrics(self.dir) or [{}])[-1]

    def step(self) -> int:
        return int(self.row().get("step", 0))

    def done(self) -> bool:
        return self.step() >= self.total_timesteps

    def locked(self) -> bool:
        """Does a cup.py write to the run directory? Its lock goes when it goes."""
        try:
            with open(self.dir / "metrics.csv") as file:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def __call__(self) -> None:
        """Run cup.py to its end or to SIGTERM, which it answers with a checkpoint."""
        begun = (self.dir / "checkpoint.pt").exists() or read_metrics(self.dir)
        if not begun and not self.locked():  # killed before there was anything to keep
            shutil.rmtree(self.dir, ignore_errors=True)
        command = self.command(sys.executable, resume=self.dir.exists())
        # Slurm signals every process of a job, cup.py among them; elsewhere we pass the
        # signal on, once: a second one would not let cup.py finish its step
        slurm, stop = "SLURM_JOB_ID" in os.environ, []
        if not slurm:
            signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
        with ignored(signal.SIGUSR2):  # submitit's, and not for cup.py
            self.process = subprocess.Popen(command, start_new_session=not slurm)
        while self.process.poll() is None:
            if stop == [True]:
                stop.append(False)
                self.process.terminate()
            time.sleep(0.2)

    def checkpoint(self):
        """submitit calls this when the time is up, or a Slurm job is preempted."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        self.process.wait()
        del self.process
        return DelayedSubmission(self)


def make_jobs(args: Args, extra: list[str]) -> list[Job]:
    """All jobs, in the order in which they are to run."""
    jobs = []
    for seed in dict.fromkeys(args.seeds):
        for env_id in dict.fromkeys(args.tasks):
            for method in dict.fromkeys(args.methods):
                name = "__".join([env_id, method, str(seed), *args.tag.split()])
                steps = args.total_timesteps or STEPS.get(env_id, 300_000)
                about = env_id, method, seed, steps
                jobs.append(Job(*about, args.runs_dir / name, extra))
    return jobs


# -------------------------------------- running ---------------------------------------


def run_jobs(args: Args, jobs: list[Job]) -> int:
    """Run what is not done, --workers at a time. Returns the exit code."""
    try:
        import submitit

        logs = args.runs_dir / "submitit"
        executor = submitit.AutoExecutor(logs, args.cluster, slurm_max_num_timeout=100)
    except ImportError as error:
        hint = "pip install -r benchmark/requirements.txt"
        raise UserError(f"running jobs needs a package ({error}): {hint}") from None
    except RuntimeError as error:
        raise UserError(f"cannot use --cluster {args.cluster}: {error}") from None
    minutes, local = math.ceil(60 * args.hours), args.cluster == "local"
    executor.update_parameters(timeout_min=minutes, cpus_per_task=1, mem_gb=8)
    executor.update_parameters(name="cup", slurm_array_parallelism=args.workers)
    if args.partition:
        executor.update_parameters(slurm_partition=args.partition)

    ours = (signal.SIGINT, signal.SIGHUP)  # the terminal's; jobs are told by us alone
    stop: list[int] = []
    for number in (*ours, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, lambda number, _: stop.append(number))
    waiting = [job for job in jobs if not job.done()]
    active, failed, told = [], [], False
    print(f"{len(jobs)} jobs, {len(waiting)} to run, {args.workers} at a time")
    while active or (waiting and not stop):
        if not stop:
            # others' runs, or those of a transfer.py that was killed, take room too
            elsewhere = [job for job in waiting if job.locked()]
            ready = [j for j in waiting if j not in elsewhere and not j.done()]
            room = args.workers - len(active) - len(elsewhere) if local else len(ready)
            new = ready[: max(room, 0)]
            waiting = [j for j in waiting if j in elsewhere or j in ready[len(new) :]]
            with ignored(*ours), executor.batch() if new else contextlib.nullcontext():
                active += [(job, executor.submit(job)) for job in new]
            for job in new:
                print(f"started {job.dir.name} at step {job.step():,}", flush=True)
        elif not told:
            print("stopping: running jobs write their checkpoints", flush=True)
        for job, submitted in list(active):
            if submitted.done():
                active.remove((job, submitted))
                report(job, submitted, bool(stop))
                failed += [job.dir.name] * (not job.done() and not stop)
            elif stop and local:  # again and again, in case it has only just started
                os.kill(int(submitted.job_id), signal.SIGTERM)
            elif stop and not told:
                submitted.cancel(check=False)
        told = bool(stop)
        time.sleep(0.5)
    collect(args)
    if failed:
        print(
            f"{len(failed)} failed, to be tried at the next start: {' '.join(failed)}"
        )
    return 128 + stop[0] if stop else int(bool(failed))


def report(job: Job, submitted, stopped: bool) -> None:
    """One line on a job that ended."""
    row = job.row()
    line = f"{job.dir.name} at step {job.step():,}"
    if job.done():
        success = float(row.get("eval/success_rate") or math.nan)
        result = f"success {success:.0%}, return {float(row['eval/return']):.1f}"
        print(f"finished {line}: {result}", flush=True)
    elif stopped:
        print(f"stopped {line}", flush=True)
    else:
        errors = ["no message", *(submitted.stderr() or "").strip().splitlines()]
        print(f"FAILED {line}: {errors[-1]} ({submitted.paths.stderr})", flush=True)


def print_status(args: Args, jobs: list[Job]) -> None:
    """A table of all jobs; the time left is from the steps and seconds so far."""
    counts = dict.fromkeys(("done", "running", "stopped", "waiting"), 0)
    steps = seconds = left = 0
    line = "{:8} {:>9} {:>8} {:>9} {:>8} {:>7}  {}"
    print(line.format("", "step", "steps/s", "time left", "success", "return", "run"))
    for job in jobs:
        rows, step, running = read_metrics(job.dir), job.step(), job.locked()
        todo = max(job.total_timesteps - step, 0)
        state = "stopped" if job.dir.exists() else "waiting"
        state = "running" if running else state if todo else "done"
        counts[state] += 1
        rate = time_left = success = score = ""
        if rows:
            rate = float(rows[-1]["time/steps_per_second"])
            time_left = timedelta(seconds=round(todo / rate)) if running else ""
            steps, seconds = steps + step, seconds + float(rows[-1]["time/seconds"])
        for row in [row for row in rows if row["eval/return"]][-1:]:
            success = f"{float(row['eval/success_rate'] or 'nan'):.0%}"
            score = f"{float(row['eval/return']):.0f}"
        cells = state, f"{step:,}", rate, str(time_left), success, score, job.dir.name
        print(line.format(*cells))
        left += todo
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    if left and steps:
        rate = steps / seconds
        time_left = timedelta(seconds=round(left / rate / args.workers))
        summary += f"; {left:,} steps left: {time_left} with {args.workers} at a time, "
        summary += f"each {rate:.0f} steps/s"
    print(summary)


# ------------------------------------- collecting -------------------------------------


def update_csv(path: Path, columns: list[str], num_keys: int, rows: list[dict]) -> None:
    """Write rows, sorted, and keep what `path` has of other runs.

    A run is what has its own values in the first `num_keys` columns. Columns that an
    older `path` lacks are empty in its rows.
    """

    def key(row):
        return tuple(str(row[column]) for column in columns[:num_keys])

    def order(row):
        return [(not v.isdigit(), int(v) if v.isdigit() else 0, v) for v in row]

    new = {key(row) for row in rows}
    with lock(path.parent):  # another study may collect at the same time
        if path.exists():
            with open(path, newline="") as file:
                old = list(csv.DictReader(file))
            rows = rows + [row for row in old if key(row) not in new]
        lines = [[str(row.get(c, "")) for c in columns] for row in rows]
        lines.sort(key=order)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([columns, *lines])
        os.replace(temporary, path)


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Wait until no other process is in here with this directory."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which unlocks


def short(number: str | float) -> str:
    return f"{float(number):.5g}" if number != "" else ""


def selection(about: dict, rows: list[dict[str, str]]) -> list[dict]:
    """Fig. 3: means over equal numbers of logged rows, so that MAX_POINTS remain."""
    shares, thinned = "guidance/selected/", []
    rows = [row for row in rows if row.get(f"{shares}target")]
    size = math.ceil(len(rows) / MAX_POINTS) or 1
    for group in (rows[start : start + size] for start in range(0, len(rows), size)):
        for share in (column for column in group[0] if column.startswith(shares)):
            name = share.removeprefix(shares)
            point = {"step": group[-1]["step"], "candidate": name}
            columns = share, f"guidance/advantage/{name}", "train/success_rate"
            for column, title in zip(columns, SELECTION, strict=True):
                values = [float(row[column]) for row in group if row[column]]
                point[title] = short(sum(values) / len(values)) if values else ""
            thinned.append(about | point)
    return thinned


def collect(args: Args) -> None:
    """Bring the csv files up to date with the runs in --runs-dir."""
    curves, selections, tuning = [], [], []
    for path in sorted(args.runs_dir.glob("*__*__*")):
        env_id, method, seed, *tag = path.name.split("__")
        about = {"env_id": env_id, "method": method, "seed": seed}
        if tag:
            settings = json.loads((path / "args.json").read_text())["args"]
            names = " ".join(Path(source).stem for source in settings["sources"])
            settings["sources"] = names
            about |= {"tag": tag[0]} | {name: settings[name] for name in TUNED}
        rows = read_metrics(path)
        while rows and not rows[-1]["eval/return"]:
            rows.pop()  # stopped on the way: both curves end with an evaluation
        for row in rows:
            if row["eval/return"]:
                score = {"success_rate": short(row["eval/success_rate"])}
                score |= {"return": short(row["eval/return"])}
                score |= {n: short(row.get(name, "")) for n, name in GUIDED.items()}
                (tuning if tag else curves).append(
                    about | {"step": row["step"]} | score
                )
        if not tag:
            selections += selection(about, rows)
    args.out.mkdir(parents=True, exist_ok=True)
    run, result = ["env_id", "method", "seed"], ["step", "success_rate", "return"]
    update_csv(args.out / "transfer.csv", run + result, 3, curves)
    columns = ["env_id", "seed", "step", "candidate", *SELECTION]
    update_csv(args.out / "selection.csv", columns, 2, selections)
    if tuning:
        columns = ["tag", *run, *TUNED, *result, *GUIDED]
        update_csv(args.out / "tuning.csv", columns, 4, tuning)
    print(f"{len(curves) + len(tuning)} evaluations collected into {args.out}")


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = tyro.cli(Args, args=sys.argv[1:split], description=__doc__)
    extra = sys.argv[split + 1 :]
    try:
        if re.search(r"__|[^\w.-]", args.tag):
            allowed = "letters, digits, and single . - _"
            raise UserError(f"--tag is part of a directory's name: {allowed} only")
        for name in ("workers", "hours", "total_timesteps"):
            value = getattr(args, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive")
        jobs = make_jobs(args, extra)
        if not jobs:
            raise UserError("there is nothing to do without tasks, methods and seeds")
        if args.list:
            print("\n".join(shlex.join(job.command()) for job in jobs))
        elif args.status:
            print_status(args, jobs)
        elif args.collect:
            collect(args)
        else:
            sources = [ROOT / "sources" / f"{name}.pt" for name in SOURCES]
            lacking = [path.name for path in sources if not path.exists()]
            if lacking and "cup" in args.methods and "--sources" not in extra:
                raise UserError(f"sources/ lacks {' '.join(lacking)}, cup.py's sources")
            sys.exit(run_jobs(args, jobs))
    except UserError as error:
        print(f"transfer.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
