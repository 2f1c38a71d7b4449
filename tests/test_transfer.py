"""benchmark/transfer.py with a stand-in for cup.py: no training, only its files."""

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

from benchmark import transfer
from program import finish, one_sentence, start_cup

SCRIPT = Path(transfer.__file__)
# starts or goes on like cup.py --resume, one row of metrics.csv each 50 ms
STAND_IN = """
import pathlib, signal, sys, time
flag = lambda name: sys.argv[sys.argv.index(name) + 1]
if "--boom" in sys.argv and "sac" in flag("--run-dir"):
    sys.exit("cup.py: boom")
assert "--resume" in sys.argv
run = pathlib.Path(flag("--run-dir"))
saved, metrics = run / "checkpoint.pt", run / "metrics.csv"
step = int(saved.read_text()) if saved.exists() else 0
if not saved.exists():
    metrics.write_text("step,eval/success_rate,eval/return\\n")
stop = []
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9) if stop else stop.append(1))
while step < int(flag("--total-timesteps")) and not stop:
    step += 100
    print(f"{step},0.5,{step / 2}", file=open(metrics, "a"), flush=True)
    time.sleep(0.05)
time.sleep(0.3)
saved.write_text(str(step))
print("said at the end")
"""


@pytest.fixture
def start(tmp_path):
    """Starts benchmark/transfer.py beside a stand-in, with tmp_path as its runs."""
    for folder in ("benchmark", "sources"):
        (tmp_path / folder).mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmark")
    (tmp_path / "cup.py").write_text(STAND_IN)
    for name in ("reach-v2", "push-v2", "pick-place-v2"):
        (tmp_path / "sources" / f"{name}.pt").touch()

    def start(arguments: str, **environment) -> subprocess.Popen:
        options = {"script": "benchmark/transfer.py", "cwd": tmp_path}
        return start_cup(*arguments.split(), environment=environment, **options)

    return start


@pytest.fixture
def call(start):
    """The same, to its end."""
    return lambda *arguments, **environment: finish(start(*arguments, **environment))


# ---- commands ------------------------------------------------------------------------------------
def test_list_prints_every_command_first_seeds_first(call):
    flags = "--tasks a-v2 b-v2 --seeds 1 2 --methods cup sac ptf --total-timesteps 900"
    lines = call(f"{flags} --list -- --beta1 3").stdout.splitlines()
    tasks, methods = ["a-v2"] * 3 + ["b-v2"] * 3, ["cup", "sac", "ptf"]
    about = zip(lines, [1] * 6 + [2] * 6, tasks * 2, methods * 4, strict=True)
    for line, seed, task, method in about:
        script = "baselines/ptf.py" if method == "ptf" else "cup.py"
        assert line == (
            f"python {script} --env-id {task} --seed {seed} --total-timesteps 900 --threads 1"
            f" --run-dir runs/transfer/{task}__{method}__{seed} --resume --beta1 3"
            + " --num-random-sources 0 --sources" * (method == "sac")
        )
    lines = call("--list --tag beta3").stdout.splitlines()
    assert len(lines) == 6 * 2 * 3
    assert "hammer-v2__cup__1__beta3 " in lines[0]
    assert all(" --total-timesteps 500000 " in line for line in lines)


def test_mistakes_are_one_sentence_and_exit_code_2(call, tmp_path):
    (tmp_path / "sources" / "push-v2.pt").unlink()
    mistakes = "--tasks a", "--methods sac ptf -- --sources", "--methods sac --cluster slurm"
    for arguments in mistakes:
        assert one_sentence(call(arguments), "transfer.py"), arguments


def test_runs_all_reports_failures_and_skips_the_finished(call, tmp_path):
    arguments = "--tasks a b --seeds 1 --total-timesteps 300 --workers 4"
    process = call(f"{arguments} -- --boom")
    assert process.returncode == 1, process.stderr
    assert process.stdout.count("ended at step 300: said at the end") == 2
    assert process.stdout.count("ended at step 0: cup.py: boom") == 2
    process = call(f"{arguments} --methods cup")
    assert process.returncode == 0
    assert "2 runs, 0 to go" in process.stdout
    lines = (tmp_path / "benchmark" / "transfer.csv").read_text().splitlines()
    runs = ["a,cup,1"] * 3 + ["b,cup,1"] * 3
    assert [line.rsplit(",", 3)[0] for line in lines[1:]] == runs
    status = call(f"{arguments} --status").stdout.split()
    assert status == "a__cup__1 300 a__sac__1 0 b__cup__1 300 b__sac__1 0".split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_runs_with_a_checkpoint_and_they_go_on(start, call, tmp_path, number):
    """Before that, a second start leaves alone what has a process."""
    run = tmp_path / "runs" / "transfer" / "a__cup__1"
    arguments = "--tasks a --methods cup --seeds 1"
    process = start(arguments)
    while not (run / "metrics.csv").exists() or transfer.last_step(run) < 300:
        assert process.poll() is None
        time.sleep(0.05)
    assert "a__cup__1 has a process already" in call(arguments).stdout
    os.kill(process.pid, number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    step = int((run / "checkpoint.pt").read_text())
    last = (run / "metrics.csv").read_text().splitlines()[-1]
    assert last.startswith(f"{step},")  # it wrote its checkpoint, and nothing since
    again = call(f"{arguments} --total-timesteps {step + 200}")
    assert again.returncode == 0
    assert (run / "checkpoint.pt").read_text() == str(step + 200)


def test_slurm_gets_an_array_of_jobs(call, tmp_path):
    """With tools of Slurm that only say so; its part, to start the jobs, is played here."""
    pytest.importorskip("submitit")
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho Submitted batch job 7\n")
        (tmp_path / name).chmod(0o755)
    flags = "--cluster slurm --tasks a b --methods cup --seeds 1 --total-timesteps 300 --workers 2"
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = call(flags, PATH=path)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "runs" / "transfer" / "submitit"
    sheet = (folder / "7_submission.sh").read_text()
    assert "#SBATCH --array=0-1%2" in sheet and "#SBATCH --signal=TERM@120" in sheet
    job = [sys.executable, "-m", "submitit.core._submit", folder]
    names = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7"}
    names |= {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    names |= dict.fromkeys(["SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID"], "0")
    for task in "01":
        environment = os.environ | names | {"SLURM_ARRAY_TASK_ID": task}
        subprocess.run(job, cwd=tmp_path, env=environment, check=True)
    process = call(flags, PATH=path)
    assert (process.returncode, process.stdout) == (0, "2 runs, 0 to go, 2 at a time\n")


# ---- csv files -----------------------------------------------------------------------------------
def write_run(folder: Path, *metrics: str, **settings) -> None:
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": settings}))
    (folder / "metrics.csv").write_text("\n".join(metrics) + "\n")


def test_collect_writes_sorted_csv_and_keeps_other_runs(call, tmp_path):
    runs, out = tmp_path / "runs" / "transfer", tmp_path / "benchmark"
    scores = "step,train/success_rate,eval/success_rate,eval/return"
    candidates = "guidance/selected/a,guidance/selected/target"
    candidates += ",guidance/advantage/a,guidance/advantage/target"
    guided = [f"{1000 * k},1,1,,0.25,0.75,{-k},0" for k in range(1, 300)]
    guided += ["300000,1,1,3000,0.25,0.75,-300,0"]
    write_run(runs / "x-v2__cup__10", f"{scores},{candidates}", *guided)
    write_run(runs / "x-v2__cup__2", scores, "20,1,1,3.14159265")
    write_run(runs / "x-v2__sac__1", scores, "20,1,,1")
    (runs / "x-v2__sac__2").mkdir()  # started, nothing logged yet
    settings = dict.fromkeys(transfer.TUNED, 5) | {"sources": ["/here/a.pt", "there/b.pt"]}
    del settings[transfer.TUNED[-1]]  # as in a run of an older cup.py
    more = f"{scores},guidance/selected/target,entropy"
    write_run(runs / "x-v2__cup__1__b", more, "20,1,1,1,0.75,-3.14159265", **settings)
    write_run(runs / "x-v2__sac__1__b", scores, "20,1,1,1", **settings)
    header, kept = "env_id,method,seed,step,success_rate,return", "w-v2,cup,1,5,0.5,1"
    (out / "transfer.csv").write_text(f"{header}\nx-v2,sac,1,5,0.5,1\n{kept}\n")
    # tuning.csv as it was before another setting came to it
    known = transfer.TUNED[1:-1]
    older = f"tag,env_id,method,seed,sources,{','.join(known)},step,success_rate,return"
    values = "a b," + "5," * len(known)
    (out / "tuning.csv").write_text(f"{older}\nold,x-v2,cup,1,{values}20,1,1\n")
    for _ in range(2):  # the second time changes nothing
        assert call("--collect").returncode == 0
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
        assert lines[1] == f"b,x-v2,cup,1,{values},20,1,1,0.75,-3.1416"
        assert lines[2] == f"b,x-v2,sac,1,{values},20,1,1,,"
        assert lines[3] == f"old,x-v2,cup,1,{values},20,1,1,,"


def test_studies_that_collect_at_the_same_time_lose_nothing(tmp_path):
    """Each reads the file, adds its run and replaces the file; one waits for another."""

    def collect(number: int) -> None:
        row = {"run": number, "step": 1}
        transfer.update_csv(tmp_path / "runs.csv", ["run", "step"], 1, [row])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(collect, range(100)))
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert lines == ["run,step", *(f"{number},1" for number in range(100))]
