"""How fast is cup.py, beside Stable-Baselines3 and SBX, and beside its own matrix products?

    pip install -r benchmark/requirements.txt     # the peers
    python benchmark/speed.py                     # everything; leave the machine alone meanwhile

- cup-N, sb3, sbx: steps/s of cup.py with N sources and of the peers' SAC, one environment, one
  update of batch 256 a step, networks 256x256; (cup-3 ÷ cup-6 - 1) / 3 is what one more source
  costs, as a share of a step
- multipolar, mamba, ptf, haar: the same of baselines/NAME.py, with three sources
- study-K: steps/s in all of K runs side by side, with cup.py's own settings, one thread each
- update-N, products: ms of an update with N sources, and of the matrix products of one without

With -compiled it is cup.py --compile. Every number is measured in a process of its own, in turn
with the others, and is a row of speed.csv; speed.md has the medians and their ratios.
"""

import dataclasses
import importlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cup
from benchmark.transfer import read_csv, update_csv

ON_LINUX = hasattr(os, "sched_getaffinity")
NUM_CORES = len(os.sched_getaffinity(0)) if ON_LINUX else os.cpu_count()
OURS = ["cup-0", "cup-3", "cup-6", "update-0", "update-3", f"study-{NUM_CORES}"]
OURS += [f"{name}-compiled" for name in OURS]
BASELINES = ("multipolar", "mamba", "ptf", "haar")
RATIOS = [("cup-0", "sb3"), ("cup-3", "sb3"), ("cup-0", "sbx"), ("cup-3", "sbx")]
RATIOS += [("cup-3", "cup-0"), ("cup-3", "cup-6"), ("update-0", "products")]
RATIOS += [(name, "cup-0") for name in BASELINES]
PACKAGES = {"sb3": "stable-baselines3", "sbx": "sbx-rl"}
ABOUT = ["run", "machine", "versions", "threads", "steps"]
COLUMNS = [*ABOUT, "what", "repeat", "load", "value", "unit"]
OBS_DIM, ACTION_DIM, RANDOM_STEPS = 39, 4, 500


@dataclasses.dataclass
class Args:
    """Measure the speed of cup.py and of its peers."""

    what: tuple[str, ...] = (*OURS, *BASELINES, *PACKAGES, "products")  # see above
    steps: int = 2_000  # environment steps of a measurement; as many before it are not counted
    repeats: int = 5  # measurements of each
    threads: int = NUM_CORES  # CPU threads, but for study-K
    env_id: str = "push-v2"  # the task
    out: Path = ROOT / "benchmark"  # where the csv and the table go
    only: str | None = None  # measure this one in this process and print the number


def measure(name: str, args: Args) -> float:
    torch.set_num_threads(args.threads)
    torch.empty(7_500_000)  # 30 MB, freed at once: now glibc keeps memory, as it does in training
    kind, *variant = name.split("-")
    compiled = "compiled" in variant
    flags = ["--compile"] * compiled
    if kind == "study":
        return cup_rate(args, int(variant[0]), "3", ["--threads", "1", *flags])
    if kind in ("cup", *BASELINES):
        flags += ["--num-envs", "1", "--utd-ratio", "1", "--threads", str(args.threads)]
        script = "cup.py" if kind == "cup" else f"baselines/{kind}.py"
        return cup_rate(args, 1, variant[0] if variant else "3", flags, script)
    if kind == "update":
        return update_time(int(variant[0]), compiled=compiled)
    return products_time() if kind == "products" else peer_rate(args, kind)


def cup_rate(
    args: Args, runs: int, num_sources: str, flags: list[str], script: str = "cup.py"
) -> float:
    """Steps/s of all runs of the script at the same time, from their metrics.csv."""
    first, rate, quiet = RANDOM_STEPS + args.steps, 0.0, {"stdout": subprocess.DEVNULL}
    command = [sys.executable, ROOT / script, "--env-id", args.env_id, "--log-interval", "100"]
    command += ["--learning-starts", str(RANDOM_STEPS), "--guidance-starts", str(RANDOM_STEPS)]
    command += ["--total-timesteps", str(first + args.steps + 100), "--no-cuda", *flags]
    command += ["--sources", "--num-random-sources", num_sources, "--eval-episodes", "1"]
    with tempfile.TemporaryDirectory() as folder:
        run_dirs = [Path(folder, str(k)) for k in range(runs)]
        processes = [subprocess.Popen([*command, "--run-dir", x], **quiet) for x in run_dirs]
        if any([process.wait() for process in processes]):
            sys.exit(1)
        for run_dir in run_dirs:
            rows = read_csv(run_dir / "metrics.csv")
            # without the last row, in whose time a run's last evaluation lies
            rows = [row for row in rows[:-1] if int(row["step"]) > first]
            rate += statistics.harmonic_mean([float(row["time/steps_per_second"]) for row in rows])
    return rate


def peer_rate(args: Args, name: str) -> float:
    """Steps/s of Stable-Baselines3's or SBX's SAC, with the same settings."""
    if ON_LINUX:  # JAX has as many threads as cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    package = importlib.import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[name])
    settings = {"learning_starts": RANDOM_STEPS, "batch_size": 256, "buffer_size": 100_000}
    settings |= {"policy_kwargs": {"net_arch": [256, 256]}, "train_freq": 1, "gradient_steps": 1}
    settings["device"] = "cpu"  # where cup.py runs as well
    model = package.SAC("MlpPolicy", cup.make_env(args.env_id, 1), **settings)
    model.learn(RANDOM_STEPS + args.steps)
    start = time.perf_counter()
    model.learn(args.steps, reset_num_timesteps=False)
    return args.steps / (time.perf_counter() - start)


def make_agent(num_sources: int, device: str = "cpu", **settings) -> cup.Agent:
    """With random sources and a full replay buffer, for a Meta-World task."""
    settings |= {"sources": (), "num_random_sources": num_sources, "buffer_size": 10_000}
    args = cup.Args("push-v2", cuda=device == "cuda", **settings)
    sources = cup.load_sources(args, OBS_DIM, ACTION_DIM, device)
    agent = cup.Agent(args, OBS_DIM, ACTION_DIM, sources, device)
    for column in agent.buffer.columns:
        column.normal_()
    agent.buffer.size = agent.buffer.capacity
    return agent


def update_time(num_sources: int, compiled: bool) -> float:
    torch.set_flush_denormal(True)  # as in cup.py's train
    agent = make_agent(num_sources, compile=compiled)
    times = timeit.repeat(lambda: agent.update(agent.buffer.sample(256)), number=1, repeat=220)
    return 1e3 * statistics.median(times[20:])  # the first ones warm up


def products_time() -> float:
    def layers(*sizes: int) -> list:  # of each the input, the weight, the output's gradient
        shapes = [((256, i), (i, o), (256, o)) for i, o in pairwise(sizes)]
        return [[torch.randn(shape) for shape in layer] for layer in shapes]

    actor = layers(OBS_DIM, 256, 256, 2 * ACTION_DIM)
    critic = layers(OBS_DIM + ACTION_DIM, 256, 256, 1)

    def sac_update() -> None:
        for x, weight, _ in actor * 2 + critic * 6:  # twins: target, critic's and actor's loss
            x @ weight
        for x, _, gradient in actor + critic * 2:
            x.T @ gradient
        for _, weight, gradient in actor[1:] + critic[1:] * 2 + critic * 2:
            gradient @ weight.T

    return 1e3 * statistics.median(timeit.repeat(sac_update, number=1, repeat=220)[20:])


def table(rows: list[dict[str, str]]) -> str:
    """Medians and their ratios, a column for each run of this script."""
    values, about = defaultdict(list), {row["run"]: row for row in rows}
    for row in rows:
        values[row["what"], row["run"]].append(float(row["value"]))
    median = {key: statistics.median(numbers) for key, numbers in values.items()}
    lines = [[title, *(row[title] for row in about.values())] for title in ABOUT]
    lines.insert(1, ["---"] * len(lines[0]))
    for what, unit in dict.fromkeys((row["what"], row["unit"]) for row in rows):
        numbers = [median.get((what, run)) for run in about]
        lines.append([f"{what}, {unit}", *(f"{x:.4g}" if x else "" for x in numbers)])
    # a peer, without a "-", has no compiled variant
    for a, b in RATIOS + [(f"{a}-compiled", b + "-compiled" * ("-" in b)) for a, b in RATIOS]:
        pairs = [(median.get((a, run)), median.get((b, run))) for run in about]
        if any(all(pair) for pair in pairs):
            lines.append([f"{a} ÷ {b}", *(f"{x / y:.2f}" if x and y else "" for x, y in pairs)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.only:
        return print(measure(args.only, args))
    info = platform.processor()
    if ON_LINUX:
        info = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    about = {"run": time.strftime("%Y-%m-%d %H:%M"), "machine": f"{info}, {NUM_CORES} cores"}
    packages = ["torch", *(package for name, package in PACKAGES.items() if name in args.what)]
    try:
        about["versions"] = ", ".join(f"{package} {version(package)}" for package in packages)
    except PackageNotFoundError as error:
        sys.exit(f"speed.py: {error}: pip install -r benchmark/requirements.txt, or choose --what")
    about |= {"threads": args.threads, "steps": args.steps}
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    for repeat in range(1, args.repeats + 1):
        for what in args.what:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", what]
            row = about | {"what": what, "repeat": repeat, "load": f"{os.getloadavg()[0]:.1f}"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode != 0:
                sys.exit(done.returncode)  # the child has said why
            row["value"] = f"{float(done.stdout.split()[-1]):.4g}"
            row["unit"] = "ms" if what.startswith(("update", "products")) else "steps/s"
            update_csv(args.out / "speed.csv", COLUMNS, len(COLUMNS), [row])
            print(f"{repeat}/{args.repeats} {what}: {row['value']} {row['unit']}", flush=True)
    (args.out / "speed.md").write_text(table(read_csv(args.out / "speed.csv")))


if __name__ == "__main__":
    main()
