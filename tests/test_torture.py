"""What a run survives; tests/README.md has the table. The long versions: -m torture."""

import contextlib
import io
import math
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from program import PENDULUM, finish, same_result, start_cup, started_run, steps, succeed

import cup

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="measures on Linux")


def long(*values):
    return pytest.param(*values, marks=pytest.mark.torture)


def peak_memory(reset: bool = False) -> float:
    """The most memory this process has used, in MB, since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# ---- kills ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("chains", "kills", "total"), [(1, 3, 1000), long(5, 10, 4000)])
def test_killed_anywhere_nothing_is_lost(tmp_path, chains, kills, total):
    """Kill a run, give the same command again, kill that, ... and let the last one finish.

    Every second kill falls into the writing of a checkpoint, the others into the 0.3 seconds after
    the run is under way.
    """
    arguments, whole = [*PENDULUM, "--total-timesteps", total, "--resume"], tmp_path / "whole"
    succeed(*arguments, "--run-dir", whole)
    for chain in range(chains):
        rng, run_dir = np.random.default_rng(chain), tmp_path / str(chain)
        temporary, checkpoint = run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt"
        process = started_run(run_dir, *arguments)
        for kill in range(kills):
            if kill % 2:
                while not temporary.exists() and process.poll() is None:
                    time.sleep(0)
            else:
                time.sleep(rng.uniform(0, 0.3))
            process.kill()
            finish(process)
            assert steps(run_dir) == sorted(set(steps(run_dir)))
            before = checkpoint.stat().st_mtime_ns
            process = start_cup(*arguments, "--run-dir", run_dir)
            # it is under way as soon as it writes its next checkpoint, or has ended
            while checkpoint.stat().st_mtime_ns == before and process.poll() is None:
                time.sleep(0)
            assert not process.poll(), finish(process).stderr
        finish(process)
        assert same_result(whole, run_dir)
        assert steps(run_dir) == list(range(20, total + 1, 20))
        assert not list(run_dir.glob("*.tmp"))


# ---- damaged policy files ------------------------------------------------------------------------
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


def damaged(policy: bytes, number: int) -> Iterator[tuple[str, bytes]]:
    """What was done to the bytes of the file, and the result: each of these so many times."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        position = rng.integers(len(policy))
        yield "overwrite", overwritten(policy, rng, rng.choice([1, 2, 20, 100]))
        yield "truncate", policy[:position]
        inserted = rng.bytes(rng.integers(1, 1000))
        yield "insert", policy[:position] + inserted + policy[position:]
        yield "repack", repacked(policy, rng)


def rewritten(policy: bytes) -> Iterator[tuple[str, bytes]]:
    """Without one of its parts, or with something else there, as a stranger's torch.save has it."""

    def content() -> dict:
        return torch.load(io.BytesIO(policy), weights_only=True)

    for part, name in [(part, name) for part in ("actor", "weights") for name in content()[part]]:
        old = content()[part][name]
        values = [None, 0, -1, 3, 1e300, math.nan, -math.inf, "x", [], [0], {}]
        values += [2**24, 2**31, 2**40, [2**40, 2**40]]
        if part == "weights":
            values = [
                None, 1.0, old.half(), old.int(), old.to_sparse(), old.unsqueeze(0), old[:-1],
                old.to("meta"), old.to(torch.complex64), old.flip(0), old * math.nan,
                old * math.inf, torch.empty(0),
                torch.zeros(1).expand(2**28),  # one stored number, repeated to a gigabyte
            ]
        for changes in ({}, *({name: value} for value in values)):
            changed = content()
            del changed[part][name]
            changed[part] |= changes
            file = io.BytesIO()
            torch.save(changed, file)
            yield f"{name}: {changes}", file.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")  # what torch thinks of such files
@pytest.mark.parametrize("number", [15, long(250)])
def test_corrupted_policy_files(tmp_path, number):
    """One sentence, or a policy that works; in little time and memory."""
    torch.manual_seed(0)
    path = tmp_path / "policy.pt"
    cup.save(cup.policy_content(cup.Actor(39, 4, [32, 32]), env_id="reach-v2"), path)
    policy = path.read_bytes()
    for kind, data in (*damaged(policy, number), *rewritten(policy)):
        path.write_bytes(data)
        before, start = peak_memory(reset=True), time.perf_counter()
        try:
            mean, log_std = cup.load_policy(path)(torch.randn(64, 39))
            assert mean.shape == log_std.shape == (64, 4), kind
            assert (mean + log_std).isfinite().all(), kind
        except cup.UserError as error:
            assert "\n" not in str(error), kind
        assert time.perf_counter() - start < 20, kind
        assert peak_memory() - before < 1000, kind


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


@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.parametrize(("updates", "samples"), [(100, 3), long(2000, 1)])
def test_impossible_numbers(case, updates, samples):
    """Only a reward whose square overflows is too much; train stops at the next row."""
    reward, scale, kinds = IMPOSSIBLE[case]
    torch.manual_seed(0)
    sources = {}
    for *bounds, sign in kinds:  # every output of its network is a lot
        actor = cup.Actor(6, 2, [8], *bounds).requires_grad_(False)
        actor.net[-1].bias.fill_(sign * 1e4)
        sources[f"source-{sign}"] = actor
    small = {"hidden_sizes": (32, 32), "batch_size": 32, "buffer_size": 1000}
    agent = cup.Agent(cup.Args(env_id="x", num_guidance_samples=samples, **small), 6, 2, sources)
    obs, next_obs = scale * torch.randn(2, 1000, 6)
    action = 2 * torch.rand(1000, 2) - 1
    agent.store(obs, action, next_obs, torch.full((1000,), reward), torch.zeros(1000))
    for _ in range(updates):
        info = agent.update(agent.buffer.sample(32))
    finite = all(number.isfinite().all() for number in [*info.values(), *agent.parameters()])
    assert finite == (case != "reward 1e30")


# ---- memory --------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [200_000, long(1_000_000)])
def test_a_checkpoint_costs_no_second_buffer(tmp_path, rows):
    sources = {str(k): cup.Actor(39, 4, (256, 256)) for k in range(3)}
    agent = cup.Agent(cup.Args(env_id="x", buffer_size=rows), 39, 4, sources)
    for column in agent.buffer.columns:
        column.normal_()
    agent.buffer.size = rows
    before = peak_memory(reset=True)
    cup.save(agent.state_dict(), tmp_path / "checkpoint.pt")
    full = sum(column.nbytes for column in agent.buffer.columns) / 2**20
    assert peak_memory() - before < 0.3 * full


@pytest.mark.parametrize("total", [long(200_000)])
def test_memory_and_files_of_a_long_run(tmp_path, total):
    """The buffer is full after a tenth of the steps; from then on nothing grows."""
    arguments = ["--env-id", "reach-v2", "--sources", "--num-random-sources", 3, "--threads", 1]
    arguments += ["--total-timesteps", total, "--buffer-size", total // 10, "--no-cuda"]
    arguments += ["--eval-interval", total // 10, "--checkpoint-interval", total // 20]
    process = started_run(tmp_path / "run", *arguments, rows=1, stdout=subprocess.DEVNULL)
    place, seen = Path(f"/proc/{process.pid}"), []
    while process.poll() is None:
        with contextlib.suppress(OSError):  # it has just ended
            memory, files = (place / "statm").read_text().split()[1], list((place / "fd").iterdir())
            seen.append((steps(tmp_path / "run")[-1], int(memory), len(files)))
        time.sleep(0.5)
    second = max(memory for step, memory, _ in seen if 0.12 * total < step < 0.2 * total)
    assert max(memory for step, memory, _ in seen if step > 0.9 * total) < 1.05 * second
    assert len({files for step, _, files in seen if 0.12 * total < step < total}) <= 2
