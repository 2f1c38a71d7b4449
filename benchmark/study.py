"""The study: a command for every task x method x seed, and the collector of their evaluations.

    python benchmark/study.py --list                   # the commands, one a line
    python benchmark/study.py --workers 2              # run what is missing here
    python benchmark/study.py --cluster slurm          # hand it to Slurm, as an array of jobs
    python benchmark/study.py --collect                # bring results/study.csv up to date
    python benchmark/study.py --seeds 100 --runs-dir runs/beta3 -- --beta1 3

Every command starts its run or goes on with it: stop this script and start it again at any time.
The csv has, beside every evaluation, the commit and the arguments that differ from the defaults.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cup

TASKS = ("hammer-v2", "peg-insert-side-v2", "push-wall-v2")  # in the paper's order
TASKS += ("pick-place-wall-v2", "push-back-v2", "shelf-place-v2")
# the csv's names for columns of metrics.csv; guidance/selected/<name> becomes selected_<name>
COLUMNS = {"return": "eval/return", "success_rate": "eval/success_rate"}
COLUMNS |= {"train_return": "train/return", "alpha": "alpha", "entropy": "entropy"}
SELECTED = "guidance/selected/"


@dataclass
class Args:
    """Run the study, or collect it. Arguments of cup.py follow a `--`."""

    tasks: tuple[str, ...] = TASKS
    methods: tuple[str, ...] = ("cup", "sac")  # also: multipolar, mamba, ptf, haar
    seeds: tuple[int, ...] = (1, 2, 3)
    total_timesteps: int = 500_000  # environment steps of a run
    compiled: bool = False  # cup and sac by benchmark/compiled.py
    runs_dir: Path = Path("runs/study")  # where the run directories are
    csv: Path = ROOT / "benchmark" / "results" / "study.csv"  # where --collect writes
    workers: int = 1  # runs at a time, one thread each
    cluster: Literal["local", "slurm"] = "local"
    list: bool = False  # print the commands and exit
    collect: bool = False  # bring the csv up to date with --runs-dir and exit


def make_command(args: Args, env_id: str, method: str, seed: int, extra: list[str]) -> list[str]:
    script = f"baselines/{method}.py"
    if method in ("cup", "sac"):
        script = "benchmark/compiled.py" if args.compiled else "cup.py"
    folder = f"{env_id}__{method}__{seed}".replace("/", "-").replace(":", "-")
    command = [sys.executable, os.path.relpath(ROOT / script), "--env-id", env_id]
    command += ["--seed", str(seed), "--total-timesteps", str(args.total_timesteps)]
    command += ["--threads", "1", "--run-dir", str(args.runs_dir / folder), "--resume", *extra]
    # the last of equal arguments counts
    return command + (["--num-random-sources", "0", "--sources"] if method == "sac" else [])


def run(command: list[str]) -> int:
    """Run a command; its output and the commit go beside the run directory. Returns the code."""
    run_dir = Path(command[command.index("--run-dir") + 1])
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    if not run_dir.exists():
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        Path(f"{run_dir}.commit").write_text(commit)
    print(f"{run_dir.name} starts", flush=True)
    with open(f"{run_dir}.log", "a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    print(f"{run_dir.name} ended with code {code}: {run_dir}.log", flush=True)
    return code


def submit(args: Args, commands: list[list[str]]) -> None:
    """Hand the commands to Slurm, as one array of jobs; a run that fails fails its job."""
    import submitit

    executor = submitit.AutoExecutor(args.runs_dir / "slurm", "slurm")
    executor.update_parameters(
        name="cup", slurm_array_parallelism=args.workers, timeout_min=1440, cpus_per_task=1
    )
    executor.map_array(lambda command: subprocess.run(command, check=True), commands)


def settings(run_dir: Path) -> str:
    """The arguments of a run that differ from cup.py's defaults, as JSON; not names and places."""
    arguments = json.loads((run_dir / "args.json").read_text(encoding="utf-8"))["args"]
    defaults = json.loads(json.dumps({x.name: x.default for x in fields(cup.Args)[1:]}))
    for values in (arguments, defaults):
        values["sources"] = [Path(source).stem for source in values["sources"]]
        for name in ("env_id", "seed", "run_dir", "resume", "threads", "total_timesteps"):
            values.pop(name, None)
    differ = {name: x for name, x in arguments.items() if x != defaults.get(name, "none")}
    return json.dumps(differ, sort_keys=True)


def evaluations(run_dir: Path) -> list[dict]:
    """A row for every evaluation; guidance and entropy are means since the one before."""
    rows, since = [], []
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            since.append(row)
            if row["eval/return"]:
                point = {"step": row["step"]}
                selected = {x.replace(SELECTED, "selected_"): x for x in row if SELECTED in x}
                for name, column in (COLUMNS | selected).items():
                    values = [float(x[column]) for x in since if x.get(column)]
                    point[name] = f"{sum(values) / len(values):.5g}" if values else ""
                rows.append(point)
                since = []
    return rows


def collect(args: Args, commands: dict[tuple, list[str]]) -> None:
    """Bring the csv up to date. Rows of a shorter run never replace those of a longer one."""
    runs = {}  # rows by task, method, seed and settings
    if args.csv.exists():
        with open(args.csv, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                key = row["env_id"], row["method"], row["seed"], row["settings"]
                runs.setdefault(key, []).append(row)
    for (env_id, method, seed), command in commands.items():
        run_dir = Path(command[command.index("--run-dir") + 1])
        if (run_dir / "metrics.csv").exists() and (rows := evaluations(run_dir)):
            about = {"env_id": env_id, "method": method, "seed": str(seed)}
            about |= {"settings": settings(run_dir)}
            key, commit = tuple(about.values()), Path(f"{run_dir}.commit").read_text()
            if int(rows[-1]["step"]) >= int(runs.get(key, [{"step": 0}])[-1]["step"]):
                runs[key] = [about | row | {"commit": commit} for row in rows]
                print(f"{run_dir.name}: {len(rows)} evaluations")
    rows = [row for key in sorted(runs) for row in runs[key]]
    names = dict.fromkeys(name for row in rows for name in row)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with open(args.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, extra = tyro.cli(Args, args=sys.argv[1:split], description=__doc__), sys.argv[split + 1 :]
    runs = product(args.seeds, args.tasks, args.methods)
    keys = [(env_id, method, seed) for seed, env_id, method in runs]
    commands = {key: make_command(args, *key, extra) for key in keys}
    if args.list:
        print("\n".join(shlex.join(["python", *command[1:]]) for command in commands.values()))
    elif args.collect:
        collect(args, commands)
    elif args.cluster == "slurm":
        submit(args, list(commands.values()))
    else:
        with ThreadPoolExecutor(args.workers) as pool:
            sys.exit(any(pool.map(run, commands.values())))


if __name__ == "__main__":
    main()
