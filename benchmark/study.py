"""The study: a command for every task x method x seed, and the collector of their evaluations.

    python benchmark/study.py --list              # the commands, one a line
    python benchmark/study.py --workers 2         # run what is missing here
    python benchmark/study.py --slurm             # hand it to Slurm, as an array of jobs
    python benchmark/study.py --collect           # bring results/study.csv up to date
    python benchmark/study.py --seeds 100 --runs-dir runs/beta3 --csv beta3.csv -- --beta1 3

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
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cup

ROOT = Path(cup.__file__).parent
TASKS = ("hammer-v2", "peg-insert-side-v2", "push-wall-v2")  # in the paper's order
TASKS += ("pick-place-wall-v2", "push-back-v2", "shelf-place-v2")
# the csv's names for columns of metrics.csv; guidance/selected/<name> becomes selected_<name>
COLUMNS = {"return": "eval/return", "success_rate": "eval/success_rate"}
COLUMNS |= {"train_return": "train/return", "alpha": "alpha", "entropy": "entropy"}
RUN_DIR = 4  # where a command of `make_command` has the run directory
NO_SETTINGS = ("env_id", "seed", "run_dir", "resume", "threads", "total_timesteps")


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
    slurm: bool = False  # hand the commands to Slurm
    list: bool = False  # print the commands and exit
    collect: bool = False  # bring the csv up to date with --runs-dir and exit


def make_command(args: Args, env_id: str, method: str, seed: int, extra: list[str]) -> list[str]:
    script = f"baselines/{method}.py"
    if method in ("cup", "sac"):
        script = "benchmark/compiled.py" if args.compiled else "cup.py"
    folder = f"{env_id}__{method}__{seed}".replace("/", "-").replace(":", "-")
    command = [sys.executable, os.path.relpath(ROOT / script), "--resume", "--run-dir"]
    command += [str(args.runs_dir / folder), "--env-id", env_id, "--seed", str(seed)]
    command += ["--total-timesteps", str(args.total_timesteps), "--threads", "1", *extra]
    # the last of equal arguments counts
    return command + (["--num-random-sources", "0", "--sources"] if method == "sac" else [])


def run(command: list[str]) -> int:
    """Run a command; log, commit and script go beside the run directory. Returns the exit code."""
    run_dir = Path(command[RUN_DIR])
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    if not run_dir.exists():
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        Path(f"{run_dir}.commit").write_text(f"{commit} {Path(command[1]).name}")
    print(f"{run_dir.name} starts", flush=True)
    with open(f"{run_dir}.log", "a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    print(f"{run_dir.name} ended with code {code}: {run_dir}.log", flush=True)
    return code


def submit(args: Args, commands: list[list[str]]) -> None:
    """Hand the commands to Slurm, as one array of jobs; a run that fails fails its job."""
    import submitit

    def job(command: list[str]) -> None:
        if run(command) != 0:
            raise RuntimeError(f"the run failed: see {command[RUN_DIR]}.log")

    executor = submitit.AutoExecutor(args.runs_dir / "slurm", "slurm")
    limits = {"timeout_min": 1440, "cpus_per_task": 1, "mem_gb": 4}
    executor.update_parameters(name="cup", slurm_array_parallelism=args.workers, **limits)
    executor.map_array(job, commands)


def settings(run_dir: Path) -> str:
    """The arguments of a run that differ from cup.py's defaults, as JSON; not names and places."""
    ours = json.loads((run_dir / "args.json").read_text(encoding="utf-8"))["args"]
    defaults = json.loads(json.dumps(asdict(cup.Args("any"))))
    for arguments in (ours, defaults):
        arguments["sources"] = [Path(source).stem for source in arguments["sources"]]
    differ = {name: x for name, x in ours.items() if x != defaults.get(name, "none")}
    return json.dumps({k: x for k, x in sorted(differ.items()) if k not in NO_SETTINGS})


def evaluations(run_dir: Path) -> list[dict]:
    """A row for every evaluation; guidance and entropy are means since the one before."""
    points, since = [], []
    for row in csv.DictReader((run_dir / "metrics.csv").read_text(encoding="utf-8").splitlines()):
        since.append(row)
        if row["eval/return"]:
            point = {"step": row["step"]}
            selected = [column for column in row if column.startswith("guidance/selected/")]
            names = COLUMNS | {"selected_" + column.split("/", 2)[2]: column for column in selected}
            for name, column in names.items():
                values = [float(x[column]) for x in since if x.get(column)]
                point[name] = f"{sum(values) / len(values):.5g}" if values else ""
            points.append(point)
            since = []
    return points


def collect(path: Path, commands: dict[tuple, list[str]]) -> int:
    """Bring the csv up to date. Returns 1 if a run is left out, because the csv has a longer one
    or one with other settings."""
    runs, code = {}, 0  # rows by task, method and seed
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for row in csv.DictReader(text.splitlines()):
        runs.setdefault((row["env_id"], row["method"], row["seed"]), []).append(row)
    for key, command in commands.items():
        run_dir, old = Path(command[RUN_DIR]), runs.get(key, [])
        if not (run_dir / "metrics.csv").exists() or not (points := evaluations(run_dir)):
            continue
        about = dict(zip(("env_id", "method", "seed"), key)) | {"settings": settings(run_dir)}
        last = old[-1] if old else about | {"step": 0}
        if last["settings"] != about["settings"] or int(last["step"]) > int(points[-1]["step"]):
            print(f"{run_dir.name} left out: the csv has {last['step']} steps, {last['settings']}")
            code = 1
            continue
        print(f"{run_dir.name}: {len(points)} evaluations replace {len(old)}")
        commit = {"commit": Path(f"{run_dir}.commit").read_text()}
        runs[key] = [about | point | commit for point in points]
    rows = [row for run_rows in runs.values() for row in run_rows]
    with open(path.with_suffix(".tmp"), "w", newline="", encoding="utf-8") as file:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)
    return code


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, extra = tyro.cli(Args, args=sys.argv[1:split], description=__doc__), sys.argv[split + 1 :]
    commands = {
        (env_id, method, str(seed)): make_command(args, env_id, method, seed, extra)
        for seed, env_id, method in product(args.seeds, args.tasks, args.methods)
    }
    if args.list:
        print("\n".join(shlex.join(["python", *command[1:]]) for command in commands.values()))
    elif args.collect:
        sys.exit(collect(args.csv, commands))
    elif args.slurm:
        submit(args, list(commands.values()))
    else:
        with ThreadPoolExecutor(args.workers) as pool:
            sys.exit(any(list(pool.map(run, commands.values()))))  # a list: run them all


if __name__ == "__main__":
    main()
