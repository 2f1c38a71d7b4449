"""The transfer study, Figures 2 and 3 of the paper: a command for every task x method x seed.

    python benchmark/transfer.py --list                    # the commands, one a line
    python benchmark/transfer.py --workers 2               # run them here, then collect
    python benchmark/transfer.py --cluster slurm           # hand them to Slurm; later, --collect
    python benchmark/transfer.py --tag beta10 --seeds 100 -- --beta1 10

Each command starts its run or goes on with it, so stop this script and start it again as you like;
on Ctrl-C the runs save themselves. What follows `--` goes to every command. The curves go to
transfer.csv and selection.csv, those of tagged runs to tuning.csv; plot.py draws them.
"""

import csv
import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("hammer-v2", "peg-insert-side-v2", "push-wall-v2")
TASKS += ("pick-place-wall-v2", "push-back-v2", "shelf-place-v2")
STEPS = 500_000  # of every run: where it ends must not depend on its result
SOURCES = ("reach-v2", "push-v2", "pick-place-v2")  # cup.py's own
# the settings in tuning.csv; add others at the end, and older rows will be empty there
TUNED = ["sources", "beta1", "beta2", "num_guidance_samples", "soft_advantage"]
TUNED += ["source_mean_bound", "source_log_std_min", "guidance_starts", "num_envs", "utd_ratio"]
TUNED += ["batch_size", "policy_lr", "q_lr", "alpha_lr", "init_alpha"]
LOGGED = {"target_selected": "guidance/selected/target", "entropy": "entropy"}
SELECTION = ["selected", "advantage", "success_rate"]
MAX_POINTS = 150  # of each candidate's curve in selection.csv


@dataclass
class Args:
    """Run the transfer study, or look at it. Arguments of cup.py follow a `--`."""

    tasks: tuple[str, ...] = TASKS
    # cup and sac are cup.py with and without sources, the others baselines/NAME.py
    methods: tuple[Literal["cup", "sac", "multipolar", "mamba", "ptf", "haar"], ...] = "cup", "sac"
    seeds: tuple[int, ...] = (1, 2, 3)  # the first of every task comes before the second of any
    total_timesteps: int = STEPS  # environment steps of a run
    workers: int = os.cpu_count() or 1  # runs at a time, one thread each
    cluster: Literal["local", "slurm"] = "local"  # this machine, or an array of Slurm jobs
    hours: float = 72.0  # limit of a Slurm job; a run that needs longer is queued again
    runs_dir: Path = Path("runs/transfer")  # where the run directories are
    out: Path = ROOT / "benchmark"  # where the csv files are; runs that are only there stay there
    tag: str = ""  # name of a variant of the settings: own run directories, and tuning.csv
    list: bool = False  # print the commands and exit
    status: bool = False  # print the last step of every run and exit
    collect: bool = False  # bring the csv files up to date and exit

    def __post_init__(self):
        if re.search(r"__|[^\w.-]", self.tag):
            raise ValueError("--tag becomes part of a name: letters, digits, and single . - _")
        if min(self.workers, self.total_timesteps, self.hours) <= 0:
            raise ValueError("--workers, --total-timesteps and --hours must be positive")


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv; none where there is no such file yet."""
    path = run_dir / "metrics.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


@dataclass
class Run:
    """A run of the study. On Slurm, submitit calls it."""

    dir: Path
    command: list[str]  # without the interpreter
    total_timesteps: int

    def step(self) -> int:
        return int((read_metrics(self.dir) or [{"step": 0}])[-1]["step"])

    def start(self) -> subprocess.Popen | None:
        """The process, which writes to log.txt; None if the run already has one."""
        self.dir.mkdir(parents=True, exist_ok=True)
        with open(self.dir / "log.txt", "a") as log:
            try:  # the process inherits the lock, which goes when it goes
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return None
            # to fetch pages for every large tensor takes longer than to fill them: keep them
            env = {"MALLOC_TRIM_THRESHOLD_": str(2**28), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
            # Slurm sends SIGUSR2 to all processes of a job, but only submitit understands it; a
            # session of its own keeps the terminal's Ctrl-C away
            before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            options = {"stdout": log, "stderr": log, "start_new_session": True}
            process = subprocess.Popen(
                [sys.executable, *self.command], env=os.environ | env, **options
            )
            signal.signal(signal.SIGUSR2, before)
        return process

    def outcome(self) -> str:
        """One line on a run whose process has ended."""
        said = (self.dir / "log.txt").read_text().split("\n")
        return f"{self.dir.name} is at step {self.step():,}: {' '.join(said[-2:])}"

    def __call__(self) -> None:
        self.process = self.start()
        if self.process and self.process.wait():
            raise RuntimeError(self.outcome())

    def checkpoint(self):
        """submitit calls this, in the middle of `wait`, when the job's time is nearly up."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(replace(self))  # a copy without the process


def make_runs(args: Args, extra: list[str]) -> list[Run]:
    """All runs, in the order in which they are to be made."""
    runs = []
    for seed in args.seeds:
        for env_id in args.tasks:
            for method in args.methods:
                run_dir = args.runs_dir / "__".join([env_id, method, str(seed), *args.tag.split()])
                script = "cup.py" if method in ("cup", "sac") else f"baselines/{method}.py"
                command = [os.path.relpath(ROOT / script), "--env-id", env_id, "--seed", str(seed)]
                command += ["--total-timesteps", str(args.total_timesteps), "--threads", "1"]
                command += ["--run-dir", str(run_dir), "--resume", *extra]
                command += ["--sources"] * (method == "sac")  # of several, the last one counts
                runs.append(Run(run_dir, command, args.total_timesteps))
    return runs


def run_here(args: Args, todo: list[Run]) -> int:
    """Make the runs, --workers at a time, then collect. Returns the exit code."""
    stop, told, active, failed = [], False, [], False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    while active or (todo and not stop):
        while todo and len(active) < args.workers and not stop:
            run = todo.pop(0)
            process = run.start()
            active += [(run, process)] if process else []
            print(run.dir.name, "started" if process else "has a process already", flush=True)
        if stop and not told:  # once: a second signal would not let them save
            told = not any(process.terminate() for _, process in active)
        for run, process in [pair for pair in active if pair[1].poll() is not None]:
            active.remove((run, process))
            failed = failed or process.returncode != 0
            print(run.outcome(), flush=True)
        time.sleep(0.2)
    collect(args)
    return 128 + stop[0] if stop else int(failed)


def submit(args: Args, todo: list[Run]) -> None:
    """Hand the runs to Slurm."""
    import submitit

    executor = submitit.AutoExecutor(args.runs_dir / "submitit", "slurm")
    limits = {"timeout_min": math.ceil(60 * args.hours), "cpus_per_task": 1, "mem_gb": 8}
    executor.update_parameters(name="cup", slurm_array_parallelism=args.workers, **limits)
    executor.map_array(Run.__call__, todo)


# ------------------------------------------ collecting ------------------------------------------


def update_csv(path: Path, columns: list[str], num_keys: int, rows: list[dict]) -> None:
    """Write rows, sorted, and keep what `path` has of other runs.

    A run is what has its own values in the first `num_keys` columns. Columns that an older `path`
    lacks are empty in its rows.
    """

    def key(row):
        return tuple(str(row[column]) for column in columns[:num_keys])

    def numbers_by_size(line):
        return [(not cell.isdigit(), int(cell) if cell.isdigit() else 0, cell) for cell in line]

    with open(path.parent / "lock.tmp", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another study may collect at the same time
        if path.exists():
            new, old = {key(row) for row in rows}, csv.DictReader(path.read_text().splitlines())
            rows = rows + [row for row in old if key(row) not in new]
        lines = [[str(row.get(column, "")) for column in columns] for row in rows]
        with open(path.with_suffix(".tmp"), "w", newline="") as file:
            lines.sort(key=numbers_by_size)
            csv.writer(file, lineterminator="\n").writerows([columns, *lines])
        os.replace(path.with_suffix(".tmp"), path)


def short(numbers: list[str]) -> str:
    """The mean of those that are there, to five digits."""
    there = [float(number) for number in numbers if number]
    return f"{sum(there) / len(there):.5g}" if there else ""


def selection(about: dict, rows: list[dict[str, str]]) -> list[dict]:
    """Figure 3: means over equal numbers of logged rows, so that MAX_POINTS remain."""
    prefix, points = "guidance/selected/", []
    rows = [row for row in rows if row.get(f"{prefix}target")]
    size = math.ceil(len(rows) / MAX_POINTS) or 1
    for group in (rows[start : start + size] for start in range(0, len(rows), size)):
        for name in (name.removeprefix(prefix) for name in group[0] if name.startswith(prefix)):
            logged = f"{prefix}{name}", f"guidance/advantage/{name}", "train/success_rate"
            means = [short([row[column] for row in group]) for column in logged]
            point = {"step": group[-1]["step"], "candidate": name}
            points.append(about | point | dict(zip(SELECTION, means, strict=True)))
    return points


def collect(args: Args) -> None:
    """Bring the csv files up to date with the runs in --runs-dir."""
    curves, selections, tuning = [], [], []
    for path in sorted(args.runs_dir.glob("*__*__*")):
        env_id, method, seed, *tag = path.name.split("__")
        about, rows = {"env_id": env_id, "method": method, "seed": seed}, read_metrics(path)
        while rows and not rows[-1]["eval/return"]:
            rows.pop()  # stopped on the way: all curves end with an evaluation
        if tag and rows:
            settings = json.loads((path / "args.json").read_text())["args"]
            settings["sources"] = " ".join(Path(source).stem for source in settings["sources"])
            about |= {"tag": tag[0]} | {name: settings.get(name, "") for name in TUNED}
        for row in (row for row in rows if row["eval/return"]):
            logged = {"success_rate": "eval/success_rate", "return": "eval/return"} | LOGGED
            scores = {name: short([row.get(column)]) for name, column in logged.items()}
            (tuning if tag else curves).append(about | {"step": row["step"]} | scores)
        selections += selection(about, rows) if method == "cup" and not tag else []
    run, result = ["env_id", "method", "seed"], ["step", "success_rate", "return"]
    shares = ["env_id", "seed", "step", "candidate", *SELECTION]
    args.out.mkdir(parents=True, exist_ok=True)
    update_csv(args.out / "transfer.csv", run + result, 3, curves)
    update_csv(args.out / "selection.csv", shares, 2, selections)
    if tuning:
        update_csv(args.out / "tuning.csv", ["tag", *run, *TUNED, *result, *LOGGED], 4, tuning)
    print(f"{len(curves) + len(tuning)} evaluations collected into {args.out}")


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, extra = tyro.cli(Args, args=sys.argv[1:split], description=__doc__), sys.argv[split + 1 :]
    runs = make_runs(args, extra)
    if args.list:
        print("\n".join(shlex.join(["python", *run.command]) for run in runs))
    elif args.status:
        print("\n".join(f"{run.dir.name:40} {run.step():>9,}" for run in runs))
    elif args.collect:
        collect(args)
    else:
        needed = {Path(run.command[0]) for run in runs}
        if set(args.methods) != {"sac"} and "--sources" not in extra:
            needed |= {ROOT / f"sources/{name}.pt" for name in SOURCES}
        if lacking := [str(path) for path in sorted(needed) if not path.exists()]:
            print(f"transfer.py: there is no {' and no '.join(lacking)}", file=sys.stderr)
            sys.exit(2)
        todo = [run for run in runs if run.step() < args.total_timesteps]
        print(f"{len(runs)} runs, {len(todo)} to make, {args.workers} at a time", flush=True)
        sys.exit(submit(args, todo) if args.cluster == "slurm" else run_here(args, todo))


if __name__ == "__main__":
    main()
