"""The study: a command for every task, method and seed, and the collector of their evaluations.

    python benchmark/study.py --workers 2         # run what is missing here
    python benchmark/study.py --slurm             # hand it to Slurm, as an array of jobs
    python benchmark/study.py --collect           # bring results/study.csv up to date
    python benchmark/study.py --seeds 100 --runs-dir runs/beta3 --csv beta3.csv -- --beta1 3

Every command starts its run or goes on with it: stop this script and start it again at any time.
"""

import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cup

ROOT = Path(cup.__file__).parent
TASKS = ("hammer-v2", "peg-insert-side-v2", "push-wall-v2")  # in the paper's order
TASKS += ("pick-place-wall-v2", "push-back-v2", "shelf-place-v2")
# what a method adds to the command; the last of equal arguments counts
ADDED = {"sac": ["--num-random-sources", "0", "--sources"], "haar-frozen": ["--freeze-skills"]}


@dataclass
class Args:
    """Run the study, or collect it. Arguments of cup.py follow a `--`."""
    tasks: tuple[str, ...] = TASKS
    methods: tuple[str, ...] = ("cup", "sac")  # also: multipolar, mamba, ptf, haar, haar-frozen
    seeds: tuple[int, ...] = (1, 2, 3)
    total_timesteps: int = 500_000  # environment steps of a run
    compiled: bool = False  # cup and sac by benchmark/compiled.py
    runs_dir: Path = Path("runs/study")  # where the run directories are
    csv: Path = ROOT / "benchmark" / "results" / "study.csv"  # where --collect writes
    workers: int = 1  # runs at a time, one thread each
    slurm: bool = False  # hand the commands to Slurm
    collect: bool = False  # bring the csv up to date with --runs-dir and exit


class Run(NamedTuple):
    about: dict[str, str]  # the first columns of its rows in the csv
    run_dir: Path
    command: list[str]


def make_run(args: Args, env_id: str, method: str, seed: int, extra: list[str]) -> Run:
    about = {"env_id": env_id, "method": method, "seed": str(seed)}
    run_dir = args.runs_dir / "__".join(about.values()).replace("/", "-").replace(":", "-")
    script = f"baselines/{method.removesuffix('-frozen')}.py"
    if method in ("cup", "sac"):
        script = "benchmark/compiled.py" if args.compiled else "cup.py"
    command = [sys.executable, str(ROOT / script), "--env-id", env_id, "--seed", str(seed)]
    command += ["--total-timesteps", str(args.total_timesteps), "--threads", "1", "--resume"]
    command += ["--run-dir", str(run_dir), *extra, *ADDED.get(method, [])]
    return Run(about, run_dir, command)


def execute(run: Run) -> None:
    """Execute the command; log and commit go beside the run directory."""
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    if not run.run_dir.exists():
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        Path(f"{run.run_dir}.commit").write_text(f"{commit} {Path(run.command[1]).name}")
    print(f"{run.run_dir} starts", flush=True)
    with open(f"{run.run_dir}.log", "a", encoding="utf-8") as log:
        subprocess.run(run.command, stdout=log, stderr=log, check=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def settings(run_dir: Path) -> str:
    """The arguments of a run that differ from cup.py's defaults, as JSON; not names and places."""
    ours = json.loads((run_dir / "args.json").read_text(encoding="utf-8"))["args"]
    defaults = json.loads(json.dumps(asdict(cup.Args("any"))))
    for arguments in (ours, defaults):
        arguments["sources"] = [Path(source).stem for source in arguments["sources"]]
    for name in ("env_id", "seed", "run_dir", "resume", "threads", "total_timesteps"):
        del ours[name]
    differ = {name: x for name, x in ours.items() if x != defaults.get(name, "none")}
    return json.dumps(differ, sort_keys=True)


def evaluations(run: Run) -> list[dict[str, str]]:
    """A row for every evaluation; what is logged more often is a mean since the one before."""
    rows, since = [], []
    about = run.about | {"settings": settings(run.run_dir)}
    about["commit"] = Path(f"{run.run_dir}.commit").read_text()
    for logged in read_csv(run.run_dir / "metrics.csv"):
        since.append(logged)
        if logged["eval/return"]:
            means = {"step": logged["step"]}
            for name in [name for name in logged if not name.startswith(("step", "time/"))]:
                values = [float(x[name]) for x in since if x[name]]
                means[name] = f"{sum(values) / len(values):.5g}" if values else ""
            rows.append(about | means)
            since = []
    return rows


def collect(path: Path, runs: list[Run]) -> int:
    """Bring the csv up to date. Returns 1 if it left a run out."""
    rows, code = read_csv(path) if path.exists() else [], 0
    for run in runs:
        new = evaluations(run) if (run.run_dir / "metrics.csv").exists() else []
        old = [row for row in rows if run.about.items() <= row.items()]
        lengths = [max((int(row["step"]) for row in some), default=0) for some in (old, new)]
        if len({row["settings"] for row in old + new}) > 1 or lengths[0] > lengths[1] > 0:
            print(f"{run.run_dir} left out: {path} has a longer run, or one with other settings")
            code = 1
        elif new:
            print(f"{run.run_dir}: {len(new)} evaluations replace {len(old)}")
            rows = [row for row in rows if row not in old] + new
    rows.sort(key=lambda row: (row["env_id"], row["method"], int(row["seed"]), int(row["step"])))
    with open(path, "w", newline="", encoding="utf-8") as file:
        names = {name: None for row in rows for name in row}
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return code


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, extra = tyro.cli(Args, args=sys.argv[1:split], description=__doc__), sys.argv[split + 1 :]
    cells = product(args.seeds, args.tasks, args.methods)
    runs = [make_run(args, env_id, method, seed, extra) for seed, env_id, method in cells]
    if args.collect:
        sys.exit(collect(args.csv, runs))
    if args.slurm:
        import submitit
        executor = submitit.AutoExecutor(args.runs_dir / "slurm", "slurm")
        limits = {"timeout_min": 1440, "cpus_per_task": 1, "mem_gb": 4}
        executor.update_parameters(name="cup", slurm_array_parallelism=args.workers, **limits)
        executor.map_array(execute, runs)
        sys.exit()
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(execute, run) for run in runs]
        try:
            errors = [str(error) for job in jobs if (error := job.exception())]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # wait for the runs, which Ctrl-C has reached too
            print("stopped: the same command goes on")
            sys.exit(130)
    sys.exit("\n".join(errors) or 0)
