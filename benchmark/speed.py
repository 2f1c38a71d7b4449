"""How fast is cup.py, where does its time go, and how do others do on the same task?

    pip install -r benchmark/requirements.txt     # the peers: Stable-Baselines3 and SBX
    python benchmark/speed.py                     # everything, about 20 minutes
    python benchmark/speed.py --repeats 1 --steps 500 --contenders cup-0 cup-3   # a look

Every contender runs in a process of its own, interleaved and repeated: push-v2, one
environment, one update per step, networks 256x256, batch 256. Steps/s are counted after
a warm-up, so that nothing is compiled within the measured time. Leave the machine alone
meanwhile. Writes benchmark/speed.csv (every measurement) and benchmark/speed.md.
"""

import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import cup

TASK, OBS_DIM, ACTION_DIM = "push-v2", 39, 4
PARTS = ("sampling", "critic", "actor", "entropy weight and target critic")


@dataclass
class Args:
    """Measure steps per second of cup.py and of its peers."""

    contenders: tuple[str, ...] = ("cup-0", "cup-3", "cup-6", "cup-20", "sb3", "sbx")
    """cup-N is cup.py with N sources; sb3 and sbx are the SAC of those packages"""
    steps: int = 3_000
    """environment steps measured in one run"""
    warm_up: int = 1_000
    """learning steps before that"""
    repeats: int = 5
    """runs of each contender"""
    threads: int = 2
    """CPU threads of every contender"""
    cuda: bool = False
    """measure on the GPU"""
    output: str = str(HERE / "speed")
    """where to write, without the ending"""
    only: str | None = None
    """measure this one in this process and print JSON (what the others are started with)"""


def run_cup(args: Args, num_sources: int) -> float:
    """Steps/s of the real program, read from its metrics.csv."""
    start, total = 500, 500 + args.warm_up + args.steps
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "env-id": TASK,
            "num-envs": 1,
            "utd-ratio": 1,
            "batch-size": 256,
            "num-random-sources": num_sources,
            "learning-starts": start,
            "guidance-starts": start,
            "total-timesteps": total,
            "log-interval": 500,
            "eval-interval": 10 * total,
            "eval-episodes": 1,
            "threads": args.threads,
            "run-dir": f"{folder}/run",
        }
        command = [sys.executable, str(HERE.parent / "cup.py"), "--sources"]
        command += [str(word) for name in flags for word in (f"--{name}", flags[name])]
        command += ["--cuda" if args.cuda else "--no-cuda"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(f"{folder}/run/metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < total]
    rates = [float(row["time/steps_per_second"]) for row in rows]
    first = (start + args.warm_up) // 500
    return statistics.harmonic_mean(rates[first:])


def run_peer(args: Args, name: str) -> float:
    """Steps/s of Stable-Baselines3's or SBX's SAC, with the same settings."""
    from stable_baselines3.common.callbacks import BaseCallback

    if name == "sb3":
        from stable_baselines3 import SAC
    else:
        from sbx import SAC

    marks = {}

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            marks[self.num_timesteps] = time.perf_counter()
            return True

    total = 500 + args.warm_up + args.steps
    settings = {"learning_starts": 500, "batch_size": 256, "buffer_size": 100_000}
    settings |= {"policy_kwargs": {"net_arch": [256, 256]}, "train_freq": 1}
    if name == "sb3":
        settings["device"] = "cuda" if args.cuda else "cpu"
    model = SAC("MlpPolicy", cup.make_env(TASK, 1), gradient_steps=1, **settings)
    model.learn(total, callback=Clock())
    return args.steps / (marks[total] - marks[total - args.steps])


def timed(function, repeats: int = 200) -> float:
    """Median milliseconds of a call."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(20):
        function()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def gemms(device: str) -> float:
    """Milliseconds of the matrix products of one SAC update, and of nothing else."""

    def layers(*sizes):
        pairs = pairwise(sizes)
        new = {"device": device}
        return [
            (
                torch.randn(256, i, **new),
                torch.randn(i, o, **new),
                torch.randn(256, o, **new),
            )
            for i, o in pairs
        ]

    actor, critic = layers(OBS_DIM, 256, 256, 8), layers(OBS_DIM + 4, 256, 256, 1)

    def forward(net):
        for x, w, _ in net:
            x @ w

    def backward_weights(net):
        for x, _, g in net:
            x.T @ g

    def backward_inputs(net):
        for _, w, g in net:
            g @ w.T

    def update():
        for net in (actor, critic, critic):  # target: next action, target critics
            forward(net)
        for net in (critic, critic):  # critic loss
            forward(net), backward_weights(net), backward_inputs(net[1:])
        forward(actor)  # actor loss
        for net in (critic, critic):
            forward(net), backward_inputs(net)
        backward_weights(actor), backward_inputs(actor[1:])

    return timed(update)


def breakdown(args: Args) -> dict[str, float]:
    """Milliseconds of each part of a step, measured one by one in this process."""
    device = "cuda" if args.cuda else "cpu"
    torch.set_num_threads(args.threads)
    result = {}
    env = cup.make_env(TASK, 1)
    obs, _ = env.reset()
    action = env.action_space.sample()
    result["environment"] = timed(lambda: env.step(action), repeats=400)
    for n in (0, 3, 6):
        settings = cup.Args(env_id=TASK, sources=(), num_random_sources=n)
        agent = cup.Agent(settings, OBS_DIM, ACTION_DIM, device)
        sources = cup.load_sources(settings, OBS_DIM, ACTION_DIM).values()
        sources = [source.to(device) for source in sources]
        buffer = cup.ReplayBuffer(100_000, OBS_DIM, ACTION_DIM, n, device)
        buffer.rows.normal_()
        buffer.size = len(buffer.rows)
        now = torch.as_tensor(obs, dtype=torch.float32, device=device).unsqueeze(0)

        def act(agent=agent, now=now):
            with torch.no_grad():
                mean, log_std = agent.actor(now)
                cup.squash(mean, log_std, torch.randn_like(mean))

        def query(sources=sources, now=now, settings=settings):
            with torch.no_grad():
                cup.query_sources(sources, now, settings)

        def learn(agent=agent, buffer=buffer):
            agent.update(buffer.sample(256))

        result[f"update, {n} sources"] = timed(learn)
        result[f"source query, {n} sources"] = timed(query)
        if n == 0:
            result["acting"] = timed(act)
            result |= parts_of_update(agent, buffer)
    result["guidance, 3 sources"] = (
        result["update, 3 sources"] - result["update, 0 sources"]
    )
    result["pure GEMM of the SAC update"] = gemms(device)
    return result


def parts_of_update(agent: cup.Agent, buffer: cup.ReplayBuffer) -> dict[str, float]:
    """Where an update's time goes, from the moments at which its optimisers step."""
    marks: list[float] = []

    def mark_after(function):
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            marks.append(time.perf_counter())
            return result

        return wrapped

    for optimizer in (agent.critic_optimizer, agent.actor_optimizer):
        optimizer.step = mark_after(optimizer.step)
    samples = {part: [] for part in PARTS}
    for _ in range(200):
        marks[:] = [time.perf_counter()]
        batch = buffer.sample(256)
        marks.append(time.perf_counter())
        agent.update(batch)
        marks.append(time.perf_counter())
        for part, (before, after) in zip(PARTS, pairwise(marks), strict=True):
            samples[part].append(1e3 * (after - before))
    return {part: statistics.median(times) for part, times in samples.items()}


def peak_memory(args: Args) -> float:
    """GiB at most, with a full buffer of a million transitions and 3 sources."""
    torch.set_num_threads(args.threads)
    settings = cup.Args(env_id=TASK, sources=(), num_random_sources=3)
    agent = cup.Agent(settings, OBS_DIM, ACTION_DIM)
    buffer = cup.ReplayBuffer(settings.buffer_size, OBS_DIM, ACTION_DIM, 3)
    env = cup.make_env(TASK, 1)
    env.reset()
    for rows in buffer.rows.split(10_000):
        rows.normal_()
    buffer.size = len(buffer.rows)
    for _ in range(50):
        agent.update(buffer.sample(256))
    with tempfile.TemporaryDirectory() as folder:
        content = {"buffer": buffer.rows, "agent": agent.state_dict()}
        cup.save(content, Path(folder) / "checkpoint.pt")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(args: Args) -> dict | float:
    if args.only in ("breakdown", "memory"):
        cup.spare_the_processor()  # as cup.py's train does
        return breakdown(args) if args.only == "breakdown" else peak_memory(args)
    torch.set_num_threads(args.threads)
    if args.only.startswith("cup-"):
        return run_cup(args, int(args.only.removeprefix("cup-")))
    return run_peer(args, args.only)


def child(args: Args, name: str):
    """Measure `name` in a fresh process."""
    command = [sys.executable, __file__, "--only", name, "--steps", str(args.steps)]
    command += ["--warm-up", str(args.warm_up), "--threads", str(args.threads)]
    command += ["--cuda"] if args.cuda else []
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    if name == "sbx":  # JAX takes its number of threads from the cores it may use
        cores = ",".join(str(core) for core in range(args.threads))
        command = ["taskset", "-c", cores, *command]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"speed.py: {name} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def report(
    args: Args, rates: dict[str, list[float]], parts: dict, memory: float
) -> str:
    """The table, in Markdown, from the measurements."""
    median = {name: statistics.median(values) for name, values in rates.items()}
    lines = ["| | steps/s, median | least to most |", "| --- | --- | --- |"]
    for name, values in rates.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        lines.append(f"| {name} | {median[name]:.1f} | {spread} |")
    goals = [("cup-0", "sb3", 1.7), ("cup-3", "sb3", 1.3), ("cup-0", "sbx", 1.2)]
    goals += [("cup-3", "sbx", 0.95), ("cup-3", "cup-0", 0.8)]
    lines += ["", "| ratio | measured | goal |", "| --- | --- | --- |"]
    for a, b, goal in goals:
        if a in median and b in median:
            lines.append(f"| {a} ÷ {b} | {median[a] / median[b]:.2f} | ≥ {goal} |")
    for more in (6, 20):
        if f"cup-{more}" in median and "cup-3" in median:
            cost = (median["cup-3"] / median[f"cup-{more}"] - 1) / (more - 3)
            name = f"one more source, from 3 to {more}"
            lines.append(f"| {name} | {cost:.1%} of a step | ≤ 4 % |")
    gemm = parts["update, 0 sources"] / parts["pure GEMM of the SAC update"]
    lines.append(f"| SAC update ÷ its matrix products | {gemm:.2f} | ≤ 1.7 |")
    lines.append(
        f"| peak memory, 1 M transitions, 3 sources | {memory:.2f} GiB | ≤ 1.2 |"
    )
    lines += ["", "| part of a step | ms |", "| --- | --- |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in parts.items()]
    device = (
        torch.cuda.get_device_name() if args.cuda else f"{os.cpu_count()} CPU cores"
    )
    lines += ["", f"{device}, {args.threads} threads, torch {torch.__version__}, "]
    lines[-1] += f"Python {platform.python_version()}; {args.repeats} interleaved runs "
    lines[-1] += f"of {args.steps:,} steps each."
    return "\n".join(lines) + "\n"


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.only:
        print(json.dumps(measure(args)))
        return
    rates: dict[str, list[float]] = {name: [] for name in args.contenders}
    for repeat in range(args.repeats):
        for name in args.contenders:
            rates[name].append(child(args, name))
            print(f"{repeat + 1}/{args.repeats} {name}: {rates[name][-1]:.1f} steps/s")
    parts, memory = child(args, "breakdown"), child(args, "memory")
    with open(f"{args.output}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "repeat", "value", "unit"])
        for name, values in rates.items():
            writer.writerows([name, k + 1, v, "steps/s"] for k, v in enumerate(values))
        writer.writerows([name, 1, value, "ms"] for name, value in parts.items())
        writer.writerow(["peak memory", 1, memory, "GiB"])
    text = report(args, rates, parts, memory)
    Path(f"{args.output}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
