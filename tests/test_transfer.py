"""benchmark/transfer.py with a stand-in for cup.py: no training, only its files."""

import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmark.transfer import update_csv

BENCHMARK = Path(__file__).parents[1] / "benchmark"
STAND_IN = """
import fcntl, pathlib, signal, sys, time
flag = lambda name: sys.argv[sys.argv.index(name) + 1]
if "--boom" in sys.argv and "sac" in flag("--run-dir"):
    sys.exit("cup.py: boom")
resume = "--resume" in sys.argv
run = pathlib.Path(flag("--resume") if resume else flag("--run-dir"))
if not resume:
    run.mkdir(parents=True)
metrics = open(run / "metrics.csv", "a")
fcntl.lockf(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
columns = "step,time/seconds,time/steps_per_second,eval/success_rate,eval/return"
if not resume:
    print(columns, file=metrics, flush=True)
saved = run / "checkpoint.pt"
step = int(saved.read_text()) if resume else 0
saved.write_text(str(step))
stop = []
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9) if stop else stop.append(1))
while step < int(flag("--total-timesteps")) and not stop:
    step += 100
    print(f"{step},1,100,0.5,{step / 2}", file=metrics, flush=True)
    time.sleep(0.05)
saved.write_text(str(step))
"""


@pytest.fixture
def transfer(tmp_path):
    """Start benchmark/transfer.py beside a stand-in, with tmp_path as its runs."""
    (tmp_path / "benchmark").mkdir()
    shutil.copy(BENCHMARK / "transfer.py", tmp_path / "benchmark")
    (tmp_path / "cup.py").write_text(STAND_IN)
    (tmp_path / "sources").mkdir()
    for name in ("reach-v2", "push-v2", "pick-place-v2"):
        (tmp_path / "sources" / f"{name}.pt").touch()

    def start(arguments="", wait=True):
        command = [sys.executable, "benchmark/transfer.py", *arguments.split()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=tmp_path, **pipes)
        if wait:
            process.out, process.err = process.communicate(timeout=60)
        return process

    return start


def write_run(folder: Path, rows: list[dict], **settings) -> None:
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": settings}))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for r in rows for k in r)))
        writer.writeheader()
        writer.writerows(rows)


def row(step, **values):
    columns = ["time/seconds", "time/steps_per_second", "train/success_rate"]
    columns += ["eval/success_rate", "eval/return"]
    return {"step": step} | dict.fromkeys(columns, "1") | values


def test_list_prints_every_command_first_seeds_first(transfer):
    arguments = (
        "--tasks a-v2 b-v2 --seeds 1 2 --total-timesteps 900 --list -- --beta1 3"
    )
    lines = transfer(arguments).out.splitlines()
    assert len(lines) == 8
    for line, seed, task, method in zip(
        lines, "11112222", "aabbaabb", ("cup", "sac") * 4, strict=True
    ):
        assert line == (
            f"python cup.py --env-id {task}-v2 --seed {seed} --total-timesteps 900 "
            f"--threads 1 --run-dir runs/transfer/{task}-v2__{method}__{seed} --beta1 3"
            + " --sources"
            * (method == "sac")
        )
    lines = transfer("--list --tag beta3").out.splitlines()
    assert len(lines) == 36
    assert lines[0].endswith("hammer-v2__cup__1__beta3")


def test_the_default_commands_are_those_of_the_committed_study(transfer):
    steps = {}
    with open(BENCHMARK / "transfer.csv", newline="") as file:
        for row in csv.DictReader(file):
            steps[f"{row['env_id']}__{row['method']}__{row['seed']}"] = row["step"]
    printed = {}
    for line in transfer("--list").out.splitlines():
        words = line.split()
        run_dir = Path(words[words.index("--run-dir") + 1])
        printed[run_dir.name] = words[words.index("--total-timesteps") + 1]
    assert printed == steps


def test_collect_writes_sorted_csv_and_keeps_other_runs(transfer, tmp_path):
    runs, out = tmp_path / "runs" / "transfer", tmp_path / "benchmark"
    guided = [
        row(
            1000 * k,
            **{"eval/return": 10.0 * k if k == 300 else ""},
            **{"guidance/selected/a": 0.25, "guidance/selected/target": 0.75},
            **{"guidance/advantage/a": -k, "guidance/advantage/target": 0},
        )
        for k in range(1, 302)  # the last one is after the last evaluation
    ]
    write_run(runs / "x-v2__cup__10", guided)
    write_run(runs / "x-v2__cup__2", [row(20, **{"eval/return": "3.14159265"})])
    write_run(runs / "x-v2__sac__1", [row(20, **{"eval/success_rate": ""})])
    tuned = ["beta1", "beta2", "num_guidance_samples", "soft_advantage"]
    tuned += ["source_mean_bound", "source_log_std_min", "guidance_starts"]
    tuned += ["num_envs", "utd_ratio", "batch_size", "policy_lr", "q_lr"]
    tuned += ["alpha_lr", "init_alpha"]
    settings = dict.fromkeys(tuned, 5) | {"sources": ["/here/a.pt", "there/b.pt"]}
    guidance = {"guidance/selected/target": 0.75, "entropy": "-3.14159265"}
    write_run(runs / "x-v2__cup__1__b", [row(20, **guidance)], **settings)
    write_run(runs / "x-v2__sac__1__b", [row(20)], **settings)
    header = "env_id,method,seed,step,success_rate,return"
    kept = "w-v2,cup,1,5,0.5,1"
    stale = "x-v2,sac,1,5,0.5,1"
    (out / "transfer.csv").write_text(f"{header}\n{stale}\n{kept}\n")
    older = f"tag,env_id,method,seed,sources,{','.join(tuned)},step,success_rate,return"
    line = "old,x-v2,cup,1,a b," + "5," * len(tuned) + "20,1,1"
    (out / "tuning.csv").write_text(f"{older}\n{line}\n")
    for _ in range(2):  # the second time changes nothing
        assert transfer("--collect").returncode == 0
        assert (out / "transfer.csv").read_text().splitlines() == [
            header,
            kept,
            "x-v2,cup,2,20,1,3.1416",
            "x-v2,cup,10,300000,1,3000",
            "x-v2,sac,1,20,,1",
        ]
        lines = (out / "selection.csv").read_text().splitlines()
        assert len(lines) == 1 + 2 * 150
        assert lines[1] == "x-v2,10,2000,a,0.25,-1.5,1"
        assert lines[2] == "x-v2,10,2000,target,0.75,0,1"
        lines = (out / "tuning.csv").read_text().splitlines()
        values = "a b," + "5," * len(tuned)
        assert lines[1] == f"b,x-v2,cup,1,{values}20,1,1,0.75,-3.1416"
        assert lines[2] == f"b,x-v2,sac,1,{values}20,1,1,,"
        assert lines[3] == f"old,x-v2,cup,1,{values}20,1,1,,"


def test_studies_that_collect_at_the_same_time_lose_nothing(tmp_path):
    """Each reads the file, adds its run and replaces the file; one waits for another."""

    def collect(number: int) -> None:
        row = {"run": number, "step": 1}
        update_csv(tmp_path / "runs.csv", ["run", "step"], 1, [row])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(collect, range(100)))
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert lines == ["run,step", *(f"{number},1" for number in range(100))]
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_status_tells_done_stopped_running_and_waiting(transfer, tmp_path):
    runs = tmp_path / "runs" / "transfer"
    write_run(runs / "a__sac__1", [row(500)])
    write_run(runs / "b__sac__1", [row(400)])
    write_run(runs / "c__sac__1", [row(300)])
    arguments = "--methods sac --seeds 1 --total-timesteps 500 --workers 1"
    with open(runs / "c__sac__1" / "metrics.csv", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        status = transfer(f"--status --tasks a b c d {arguments}").out.splitlines()
    states = [line.split()[0] for line in status[1:]]
    assert states[:4] == ["done", "stopped", "running", "waiting"]
    assert status[-1].startswith("1 done, 1 running, 1 stopped, 1 waiting; 800 steps")


def test_mistakes_are_one_sentence_and_exit_code_2(transfer, tmp_path):
    (tmp_path / "sources" / "push-v2.pt").unlink()
    for arguments in ("", "--tag a__b", "--workers 0", "--tasks"):
        process = transfer(arguments)
        assert process.returncode == 2, arguments
        assert process.err.startswith("transfer.py: ")
        assert process.err.count("\n") == 1


def test_runs_all_reports_failures_and_skips_the_finished(transfer, tmp_path):
    pytest.importorskip("submitit")
    arguments = "--tasks a b --seeds 1 --total-timesteps 300 --workers 4"
    process = transfer(f"{arguments} -- --boom")
    assert process.returncode == 1, process.err
    assert process.out.count("finished") == 2
    assert process.out.count("FAILED") == 2
    assert process.out.count("cup.py: boom") == 2
    process = transfer(f"{arguments} --methods cup")
    assert process.returncode == 0
    assert "2 jobs, 0 to run" in process.out
    lines = (tmp_path / "benchmark" / "transfer.csv").read_text().splitlines()
    assert [line.rsplit(",", 3)[0] for line in lines[1:]] == 3 * ["a,cup,1"] + 3 * [
        "b,cup,1"
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_jobs_with_a_checkpoint_and_they_go_on(
    transfer, tmp_path, number
):
    pytest.importorskip("submitit")
    run = tmp_path / "runs" / "transfer" / "a__cup__1"
    process = transfer("--tasks a --methods cup --seeds 1", wait=False)
    metrics = run / "metrics.csv"
    while not (metrics.exists() and "\n300," in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "stopped a__cup__1 at step" in out
    step = int((run / "checkpoint.pt").read_text())
    last = metrics.read_text().splitlines()[-1]
    assert last.startswith(f"{step},")  # it wrote its checkpoint, and nothing since
    more = str(step + 200)
    again = transfer(f"--tasks a --methods cup --seeds 1 --total-timesteps {more}")
    assert again.returncode == 0
    assert (run / "checkpoint.pt").read_text() == more
