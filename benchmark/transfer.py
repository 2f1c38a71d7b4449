"""The transfer study, Figures 2 and 3 of the paper: a command for every task x method x seed.

    python benchmark/transfer.py --list                    # the commands, one a line
    python benchmark/transfer.py --workers 2               # run them here, then collect
    python benchmark/transfer.py --cluster slurm           # hand them to Slurm; later, --collect
    python benchmark/transfer.py --tag beta10 --seeds 100 -- --beta1 10

Each command starts its run or goes on with it, so stop and start this script as you like. Curves
go to transfer.csv and selection.csv, those of tagged runs to tuning.csv.
"""

import csv
import fcntl
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("hammer-v2", "peg-insert-side-v2", "push-wall-v2")
TASKS += ("pick-place-wall-v2", "push-back-v2", "shelf-place-v2")
STEPS = 500_000  # of every run: where it ends must not depend on its result
# the settings in tuning.csv, some of which only older rows have
TUNED = ["sources", "beta1", "beta2", "num_guidance_samples", "soft_advantage"]
TUNED += ["source_mean_bound", "source_log_std_min", "guidance_starts", "num_envs", "utd_ratio"]
TUNED += ["batch_size", "policy_lr", "q_lr", "alpha_lr", "init_alpha", "second_look"]
TUNED += ["c", "gae_lambda", "rollout_share", "high_entropy", "freeze_skills"]  # the baselines'
# what tells the methods of cup.py apart; the others are baselines/NAME.py
FLAGS = {"cup": "", "sac": "--num-random-sources 0 --sources"}
# what the csv files call columns of metrics.csv; {} is a candidate
SCORES = {"success_rate": "eval/success_rate", "return": "eval/return"}
TUNING = SCORES | {"target_selected": "guidance/selected/target", "entropy": "entropy"}
SELECTION = {"selected": "guidance/selected/{}", "advantage": "guidance/advantage/{}"}
SELECTION |= {"success_rate": "train/success_rate"}


@dataclass
class Args:
    """Run the transfer study, or look at it. Arguments of cup.py follow a `--`."""

    tasks: tuple[str, ...] = TASKS  # target tasks
    methods: tuple[str, ...] = ("cup", "sac")  # also: multipolar, mamba, ptf, haar
    seeds: tuple[int, ...] = (1, 2, 3)  # the first of every task comes before the second of any
    total_timesteps: int = STEPS  # environment steps of a run
    workers: int = os.cpu_count() or 1  # runs at a time, one thread each
    cluster: Literal["local", "slurm"] = "local"  # this machine, or an array of Slurm jobs
    runs_dir: Path = Path("runs/transfer")  # where the run directories are
    out: Path = ROOT / "benchmark"  # where the csv files are; runs that are only there stay there
    tag: str = ""  # name of a variant of the settings: own run directories, and tuning.csv
    list: bool = False  # print the commands and exit
    status: bool = False  # print the last step of every run and exit
    collect: bool = False  # bring the csv files up to date and exit


def make_commands(args: Args, extra: list[str]) -> dict[Path, list[str]]:
    """The command of every run directory, in the order in which they are to be made."""
    commands = {}
    for seed, env_id, method in itertools.product(args.seeds, args.tasks, args.methods):
        run_dir = args.runs_dir / "__".join(filter(None, (env_id, method, str(seed), args.tag)))
        script = "cup.py" if method in FLAGS else f"baselines/{method}.py"
        command = [os.path.relpath(ROOT / script), "--env-id", env_id, "--seed", str(seed)]
        command += ["--total-timesteps", str(args.total_timesteps), "--threads", "1"]
        command += ["--run-dir", str(run_dir), "--resume", *extra]
        commands[run_dir] = command + FLAGS.get(method, "").split()  # the last one counts
    return commands


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def last_step(run_dir: Path) -> int:
    return int((read_csv(run_dir / "metrics.csv") or [{"step": 0}])[-1]["step"])


def start(run_dir: Path, command: list[str]) -> subprocess.Popen | None:
    """The process, which writes to log.txt; None if the run already has one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "log.txt", "a") as log:
        try:  # the process inherits the lock, which goes when it goes
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        # a session of its own keeps the terminal's Ctrl-C away
        options = {"stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen([sys.executable, *command], **options)


def run_here(args: Args, todo: list[tuple[Path, list[str]]]) -> int:
    """Run the commands, --workers at a time, then collect. Returns the exit code."""
    stop, active, failed = [], {}, False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    while (todo or active) and not stop:
        while todo and len(active) < max(1, args.workers):
            run_dir, command = todo.pop(0)
            if process := start(run_dir, command):
                active[run_dir] = process
            print(run_dir.name, "started" if process else "has a process already", flush=True)
        time.sleep(0.2)
        for run_dir in [name for name, process in active.items() if process.poll() is not None]:
            step = last_step(run_dir)
            failed |= active.pop(run_dir).returncode != 0 or step < args.total_timesteps
            said = (run_dir / "log.txt").read_text().strip().split("\n")[-1]
            print(f"{run_dir}/log.txt ended at step {step:,}: {said}", flush=True)
    for process in active.values():  # once: a second signal would not let them save
        process.terminate()
    for process in active.values():
        process.wait()
    collect(args)
    return 128 + stop[0] if stop else int(failed)


def submit(args: Args, todo: list[tuple[Path, list[str]]]) -> None:
    """Hand the commands to Slurm. What is not done in time saves itself: submit it again."""
    try:
        import submitit

        executor = submitit.AutoExecutor(args.runs_dir / "submitit", "slurm")
    except (ImportError, RuntimeError) as error:
        print(f"transfer.py: cannot use Slurm here: {error}", file=sys.stderr)
        sys.exit(2)
    limits = {"timeout_min": 3 * 24 * 60, "cpus_per_task": 1, "mem_gb": 8}
    limits["slurm_additional_parameters"] = {"signal": "TERM@120"}  # two minutes before the end
    executor.update_parameters(name="cup", slurm_array_parallelism=args.workers, **limits)
    executor.map_array(lambda run: (process := start(*run)) and process.wait(), todo)


def update_csv(path: Path, columns: list[str], num_keys: int, rows: list[dict]) -> None:
    """Write rows, sorted, and keep those of `path` that differ in the first `num_keys` columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock.tmp", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another study may collect at the same time
        new = [[str(row.get(column, "")) for column in columns] for row in rows]
        old = [[row.get(column, "") for column in columns] for row in read_csv(path)]
        runs = {tuple(line[:num_keys]) for line in new}
        lines = new + [line for line in old if tuple(line[:num_keys]) not in runs]
        lines.sort(key=lambda line: [x.zfill(12) if x.isdigit() else x for x in line])  # by size
        with open(path.with_suffix(".tmp"), "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *lines])
        os.replace(path.with_suffix(".tmp"), path)


def short(numbers: list[str | None]) -> str:
    """The mean of those that are there, to five digits."""
    there = [float(number) for number in numbers if number]
    return f"{sum(there) / len(there):.5g}" if there else ""


def selection(about: dict, rows: list[dict[str, str]]) -> list[dict]:
    """Figure 3: means over equal numbers of logged rows, so that at most 150 points remain."""
    prefix, points = "guidance/selected/", []
    rows = [row for row in rows if row.get(f"{prefix}target")]
    size = math.ceil(len(rows) / 150) or 1
    for group in (rows[first : first + size] for first in range(0, len(rows), size)):
        for name in (name.removeprefix(prefix) for name in group[0] if name.startswith(prefix)):
            point = about | {"step": group[-1]["step"], "candidate": name}
            for title, column in SELECTION.items():
                point[title] = short([row.get(column.format(name)) for row in group])
            points.append(point)
    return points


def collect(args: Args) -> None:
    """Bring the csv files up to date with the runs in --runs-dir."""
    curves, selections, tuning = [], [], []
    for path in sorted(args.runs_dir.glob("*__*__*")):
        env_id, method, seed, *tag = path.name.split("__", 3)
        about = {"env_id": env_id, "method": method, "seed": seed}
        rows = read_csv(path / "metrics.csv")
        if tag and rows:
            settings = json.loads((path / "args.json").read_text())["args"]
            settings["sources"] = " ".join(Path(source).stem for source in settings["sources"])
            about |= {"tag": tag[0]} | {name: settings.get(name, "") for name in TUNED}
        for row in (row for row in rows if row.get("eval/return")):
            scores = {title: short([row.get(column)]) for title, column in TUNING.items()}
            (tuning if tag else curves).append(about | {"step": row["step"]} | scores)
        selections += selection(about, rows) if method == "cup" and not tag else []
    run, shares = ["env_id", "method", "seed"], ["env_id", "seed", "step", "candidate", *SELECTION]
    update_csv(args.out / "transfer.csv", [*run, "step", *SCORES], 3, curves)
    update_csv(args.out / "selection.csv", shares, 2, selections)
    update_csv(args.out / "tuning.csv", ["tag", *run, *TUNED, "step", *TUNING], 4, tuning)
    print(f"{len(curves) + len(tuning)} evaluations collected into {args.out}")


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, extra = tyro.cli(Args, args=sys.argv[1:split], description=__doc__), sys.argv[split + 1 :]
    commands = make_commands(args, extra)
    needed = [Path(command[0]) for command in commands.values()]
    if set(args.methods) != {"sac"} and "--sources" not in extra:
        needed += [ROOT / f"sources/{name}-v2.pt" for name in ("reach", "push", "pick-place")]
    lacking = sorted({str(path) for path in needed if not path.exists()})
    todo = [run for run in commands.items() if last_step(run[0]) < args.total_timesteps]
    if args.list:
        print("\n".join(shlex.join(["python", *command]) for command in commands.values()))
    elif args.status:
        print("\n".join(f"{run_dir.name:40} {last_step(run_dir):>9,}" for run_dir in commands))
    elif args.collect:
        collect(args)
    elif lacking:
        print(f"transfer.py: there is no {' and no '.join(lacking)}", file=sys.stderr)
        sys.exit(2)
    else:
        print(f"{len(commands)} runs, {len(todo)} to go, {args.workers} at a time", flush=True)
        sys.exit(submit(args, todo) if args.cluster == "slurm" else run_here(args, todo))


if __name__ == "__main__":
    main()
