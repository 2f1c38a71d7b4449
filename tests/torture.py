"""What it takes to lose a run, or to crash cup.py with what it is fed: used by test_torture.py."""

import io
import math
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from program import finish, start_cup, started_run, steps

import cup


# ---- kills ---------------------------------------------------------------------------------------
def kills(run_dir: Path, number: int, arguments: list, span: float, seed: int = 0):
    """Kill a run, give the same command again, kill that, ... and let the last one finish.

    Every second kill falls into the writing of a checkpoint; the others come up to `span` seconds
    after the run is under way. Yields what became of each, in words; anything but "resumed" is a
    failure.
    """
    rng, arguments = np.random.default_rng(seed), [*arguments, "--resume"]
    temporary, checkpoint = run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt"
    process = started_run(run_dir, *arguments)
    for kill in range(number):
        if kill % 2:
            while not temporary.exists() and process.poll() is None:
                time.sleep(0)
        else:
            time.sleep(rng.uniform(0, span))
        process.kill()
        finish(process)
        in_order = steps(run_dir) == sorted(set(steps(run_dir)))
        before = checkpoint.stat().st_mtime_ns
        process = start_cup(*arguments, "--run-dir", run_dir)
        # it is under way as soon as it writes its next checkpoint, or has ended
        while checkpoint.stat().st_mtime_ns == before and process.poll() is None:
            time.sleep(0)
        outcome = "resumed" if in_order else "rows twice or out of order"
        yield finish(process).stderr if process.poll() else outcome
    finish(process)


# ---- damaged policy files ------------------------------------------------------------------------
def peak_memory(reset: bool = False) -> float:
    """The most memory this process has used, in MB, since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def overwritten(data: bytes, rng: np.random.Generator, number: int) -> bytes:
    """The bytes with a number of them replaced."""
    data = bytearray(data)
    for position in rng.integers(len(data), size=number):
        data[position] = rng.integers(256)
    return bytes(data)


def repacked(policy: bytes, rng: np.random.Generator) -> bytes:
    """The file with damage inside, but with checksums that are right."""
    target, old = io.BytesIO(), zipfile.ZipFile(io.BytesIO(policy))
    with zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, overwritten(data, rng, 3) if name.endswith("data.pkl") else data)
    return target.getvalue()


def rewritten(policy: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """The file with something else in it, as a stranger's torch.save would have it."""
    content = torch.load(io.BytesIO(policy), weights_only=True)
    part = content["actor" if kind == "config" else "weights"]
    name, size = str(rng.choice(list(part))), int(rng.choice([2**24, 2**31, 2**40]))
    old = part.pop(name)
    values = [0, -1, 3, 1e300, math.nan, -math.inf, None, "x", [], [0], {}, size, [size, size]]
    if kind == "tensor":
        values = [
            old.half(), old.int(), old.to_sparse(), old.unsqueeze(0), old[:-1], old.to("meta"),
            old.to(torch.complex64), old.flip(0), old * math.nan, old * math.inf, torch.empty(0),
            torch.zeros(1).expand(size),  # a tensor may repeat one stored number
            None, 1.0,
        ]
    if kind != "missing":
        part[name] = values[rng.integers(len(values))]
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def corrupted(policy: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """What was done to the policy file, and the result."""
    position = rng.integers(len(policy))
    kinds = "overwrite truncate insert repack config tensor missing"
    kind = str(rng.choice(kinds.split()))
    if kind == "overwrite":
        return kind, overwritten(policy, rng, rng.choice([1, 2, 20, 100]))
    if kind == "truncate":
        return kind, policy[:position]
    if kind == "insert":
        return kind, policy[:position] + rng.bytes(rng.integers(1, 1000)) + policy[position:]
    return kind, repacked(policy, rng) if kind == "repack" else rewritten(policy, kind, rng)


def corruptions(path: Path, number: int):
    """Load damaged policy files. Yields what was done, and how loading ended, in words.

    The outcome "refused" or "valid" is right; any other is a failure.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    cup.save(cup.policy_content(cup.Actor(39, 4, [32, 32]), env_id="reach-v2"), path)
    policy = path.read_bytes()
    for _ in range(number):
        kind, data = corrupted(policy, rng)
        path.write_bytes(data)
        before, start = peak_memory(reset=True), time.perf_counter()
        try:
            mean, log_std = cup.load_policy(path)(torch.randn(64, 39))
            sound = mean.shape == log_std.shape == (64, 4) and (mean + log_std).isfinite().all()
            outcome = "valid" if sound else "let in, but it is no policy"
        except cup.UserError as error:
            outcome = "refused" if len(str(error).splitlines()) == 1 else str(error)
        except Exception as error:  # that it is none is what we test
            outcome = f"{type(error).__name__}: {error}"
        seconds, memory = time.perf_counter() - start, peak_memory() - before
        frugal = seconds < 20 and memory < 1000
        yield kind, outcome if frugal else f"{seconds:.1f} s, {memory:.0f} MB"


# ---- numerics ------------------------------------------------------------------------------------
# what is wrong: reward, observation scale, sources (mean_bound, log_std_min, log_std_max, sign)
IMPOSSIBLE = {
    "reward 1e8": (1e8, 1, []),
    "reward -1e8": (-1e8, 1, []),
    "reward 0": (0.0, 1, []),
    "reward 1e30": (1e30, 1, []),
    "observations times 1e4": (1.0, 1e4, []),
    "sources saturated": (1.0, 1, [(100, -5, 2, 1), (100, -5, 2, -1)]),
    "sources nearly deterministic": (1.0, 1, [(3, -20, -19, -1)]),
    "sources at the largest log-std": (1.0, 1, [(3, -20, 20, 1)]),
    "everything at once": (-1e8, 1e4, [(100, -20, 20, 1), (100, -20, 20, -1)]),
}


def numerics(updates: int, **settings):
    """Train on such numbers. Yields the case, and whether losses and weights stayed finite."""
    for case, (reward, scale, kinds) in IMPOSSIBLE.items():
        torch.manual_seed(0)
        sources = {}
        for *bounds, sign in kinds:  # every output of its network is a lot
            actor = cup.Actor(6, 2, [8], *bounds).requires_grad_(False)
            actor.net[-1].bias.fill_(sign * 1e4)
            sources[f"source-{sign}"] = actor
        small = {"hidden_sizes": (32, 32), "batch_size": 32, "buffer_size": 1000}
        agent = cup.Agent(cup.Args(env_id=case, **small, **settings), 6, 2, sources)
        obs, next_obs = scale * torch.randn(2, 1000, 6)
        action = 2 * torch.rand(1000, 2) - 1
        agent.store(obs, action, next_obs, torch.full((1000,), reward), torch.zeros(1000))
        for _ in range(updates):
            info = agent.update(agent.buffer.sample(32))
        numbers = [*info.values(), *agent.parameters()]
        yield case, all(number.isfinite().all() for number in numbers)
