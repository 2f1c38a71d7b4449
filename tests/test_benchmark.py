"""benchmark/: what speed.py, plot.py and diagnose.py say, against plain calculations.

transfer.py has its own file.
"""

import random
import re
import shutil
import sys
from pathlib import Path
from statistics import mean, median

import pytest
import torch
from by_hand import random_batch
from program import PENDULUM, succeed

import cup
from benchmark import diagnose, gpu, plot, speed
from benchmark.transfer import read_csv

FOLDER = Path(speed.__file__).parent


@pytest.fixture
def call(monkeypatch):
    """Calls a script's main as the command line does."""

    def call(script, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        script.main()

    return call


# ---- speed.py ------------------------------------------------------------------------------------
def test_the_committed_speed_table_has_medians_and_ratios_within_a_run():
    rows, text = read_csv(FOLDER / "speed.csv"), (FOLDER / "speed.md").read_text()
    assert text == speed.table(rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    found = {title: dict(zip(lines[0][1:], cells, strict=True)) for title, *cells in lines}
    values = {}
    for row in rows:
        values.setdefault((row["what"], row["run"]), []).append(float(row["value"]))
    pairs = ("cup-3", "sb3"), ("cup-3", "cup-0"), ("cup-3-compiled", "cup-0-compiled")
    for a, b in (*pairs, ("cup-0-compiled", "sb3")):
        for run in found["run"]:
            ours, theirs = values.get((a, run)), values.get((b, run))
            assert found[f"{a}, steps/s"][run] == (f"{median(ours):.4g}" if ours else "")
            ratio = f"{median(ours) / median(theirs):.2f}" if ours and theirs else ""
            assert found[f"{a} ÷ {b}"][run] == ratio


def test_every_measurement_is_a_row(tmp_path, monkeypatch, call):
    flags = "--env-id Pendulum-v1 --steps 100 --repeats 1 --threads 1 --what study-1 products ptf"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    call(speed, *flags.split(), "--out", tmp_path)
    rows = read_csv(tmp_path / "speed.csv")
    assert [(row["what"], row["unit"]) for row in rows] == [
        ("products", "ms"), ("ptf", "steps/s"), ("study-1", "steps/s")
    ]
    assert all(float(row["value"]) > 0 and row["machine"].endswith("cores") for row in rows)
    assert "| products, ms |" in (tmp_path / "speed.md").read_text()


# ---- plot.py -------------------------------------------------------------------------------------
RUNS = {"cup": "CUP", "sac": "SAC", "ptf": "PTF", "ratio": "CUP / SAC"}


def run_of(method, seed, *evaluations) -> list[dict]:
    """evaluations: (success rate, return) at 100, 200, ... steps."""
    rows, about = [], {"env_id": "hammer-v2", "method": method, "seed": str(seed)}
    for number, (success, score) in enumerate(evaluations, start=1):
        row = {"step": str(100 * number), "success_rate": str(success), "return": str(score)}
        rows.append(about | row)
    return rows


def hammer(rows: list[dict], method: str) -> list[str]:
    """The line of the table on hammer and this method.

    Seeds, steps, areas under success and return, final and best success, steps to half of it.
    """
    table = plot.table({task: plot.read_curves(rows, task) for task in plot.TASKS})
    assert "| shelf-place-v2 | not run yet |" in table
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    (line,) = [line for line in lines if line[:2] == ["hammer-v2", RUNS[method]]]
    return line[2:]


def test_table_of_one_seed():
    cup = [(0.0, 10), (0.6, 40), (0.9, 100), (0.7, 90)]
    sac = [(0.0, 20), (0.0, 30), (0.5, 25), (0.2, 20)]
    rows = run_of("cup", 1, *cup) + run_of("sac", 1, *sac)
    success, returns = (mean([e[k] for e in cup]) for k in (0, 1))
    expected = ["1", "400", f"{100 * success:.1f}", f"{returns:.0f}", "70", "90", "200"]
    assert hammer(rows, "cup") == expected
    ratios = [f"{success / mean([e[0] for e in sac]):.2f}"]
    ratios += [f"{returns / mean([e[1] for e in sac]):.2f}, CUP ahead at 1 of 1 seeds"]
    assert hammer(rows, "ratio")[2:] == [*ratios, "3.50", "1.80", "0.67"]


def test_a_ratio_to_almost_nothing_is_not_spelt_out():
    rows = run_of("cup", 1, (0.0, 50), (0.0, 50)) + run_of("sac", 1, (0.0, 0.001), (0.0, 0.001))
    assert hammer(rows, "ratio")[2:4] == ["–", "over 100, CUP ahead at 1 of 1 seeds"]


def test_cup_and_sac_are_compared_at_equal_steps():
    """SAC went on to 400 steps, CUP to 200: what SAC did after 200 does not count.

    A method beside them is cut there as well, and one that is shorter is no reason to cut them.
    """
    rows = run_of("cup", 1, (0.0, 10), (0.2, 30))
    rows += run_of("sac", 1, (0.0, 10), (0.1, 20), (0.8, 900), (1, 999))
    sac = hammer(rows, "sac")
    assert sac[1:] == ["200", "5.0", "15", "10", "10", "never"]
    longer = rows + run_of("ptf", 1, (0.0, 10), (0.1, 30), (0.8, 900))
    assert hammer(longer, "ptf")[1:4] == ["200", "5.0", "20"]
    shorter = rows + run_of("ptf", 1, (0.0, 10))
    assert hammer(shorter, "ptf")[1:4] == ["100", "0.0", "10"]
    assert hammer(shorter, "sac") == sac


def test_three_seeds_and_the_interval_of_their_mean():
    """Against a bootstrap by hand; both are random, hence the tolerance.

    As many are on their way and left out; one of the three went further, and one once ended at
    150 steps and has an evaluation there, which does not count.
    """
    areas, rows = {1: 100.0, 2: 160.0, 3: 400.0}, []
    for seed in (4, 5, 6):
        rows += run_of("cup", seed, (1.0, 1000))
    for seed, height in areas.items():
        further = [(1.0, 1000)] * (seed == 3)
        rows += run_of("cup", seed, (0, height), (0, height), *further)
        sac = height - 20 if seed < 3 else height + 20
        rows += run_of("sac", seed, (0, sac), (0, sac), *further)
    rows += [row | {"step": "150"} for row in run_of("cup", 1, (0.5, 9999))]
    seeds, steps, _, returns, *_ = hammer(rows, "cup")
    middle, low, high = re.findall(r"[\d.]+", returns)
    rng = random.Random(0)
    means = sorted(mean(rng.choices(list(areas.values()), k=3)) for _ in range(20_000))
    assert (seeds, steps, middle) == ("3", "200", "220")
    assert float(low) == pytest.approx(means[500], rel=0.05)
    assert float(high) == pytest.approx(means[-500], rel=0.05)
    assert hammer(rows, "ratio")[3].endswith("CUP ahead at 2 of 3 seeds")


def test_tuning_table():
    about = {"tag": "x", "env_id": "hammer-v2", "method": "cup", "seed": "100", "beta1": "1"}
    points = ("50000", "10", "0"), ("100000", "30", "0.4"), ("150000", "700", "0.2")
    names = "step", "return", "success_rate"
    rows = [about | {"beta2": "0.03"} | dict(zip(names, point)) for point in points]
    line = "| hammer-v2 | x | cup | 100 | 1 | 0.03 | 150,000 | 20 | 700 | 40 |"
    assert plot.tuning_table(rows).splitlines()[2:] == [line]


@pytest.mark.filterwarnings("error")
def test_every_figure_is_drawn_and_the_committed_tables_are_of_the_committed_rows(tmp_path, call):
    """Also with a run on its way, of a method and with a source that the figures do not know."""
    for path in FOLDER.glob("*.csv"):
        shutil.copy(path, tmp_path)
    shutil.copytree(FOLDER / "sources", tmp_path / "sources")
    with open(tmp_path / "transfer.csv", "a") as file:
        file.write("push-wall-v2,another,9,1000,0,10\n")
    with open(tmp_path / "selection.csv", "a") as file:  # no episode has ended yet
        file.write("push-wall-v2,9,1000,target,0.5,0,\npush-wall-v2,1,1000,my-own,0.5,0,\n")
    call(plot, "--dir", tmp_path)
    assert (tmp_path / "tuning.md").read_text() == (FOLDER / "tuning.md").read_text()
    tables = [(folder / "transfer.md").read_text().splitlines() for folder in (tmp_path, FOLDER)]
    assert [line for line in tables[0] if "| another |" not in line] == tables[1]
    for name in "figure2_success figure2_return figure3 figure3_all figure4 sources".split():
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# ---- diagnose.py ---------------------------------------------------------------------------------
def test_the_two_gradients_at_the_mean():
    """d/d mean of beta KL(N(mean, .) || N(m, s^2)) is beta (mean - m) / s^2; SAC's by hand."""
    torch.manual_seed(0)
    agent = speed.make_agent(num_sources := 3, hidden_sizes=(16,), beta1=2.0, beta2=0.5)
    batch = random_batch(64, speed.OBS_DIM, speed.ACTION_DIM, num_sources)
    torch.manual_seed(3)
    states, (sac, kl) = diagnose.guidance_and_pull(agent, batch)
    assert 0 < (states["guidance"] < num_sources).sum() < 64
    torch.manual_seed(3)
    noise = torch.randn_like(batch.action)
    mean, log_std = (x.detach() for x in agent.actor(batch.obs))
    for k, guide in enumerate(states["guidance"].tolist()):
        expected = torch.zeros(speed.ACTION_DIM)
        if guide < num_sources:
            distance = mean[k] - batch.source_mean[k, guide]
            variance = batch.source_log_std[k, guide].exp() ** 2
            expected = states["weight"][k] * distance / variance / 64
        assert torch.allclose(kl[k], expected, atol=1e-6)
        own_mean = mean[k].clone().requires_grad_()
        action, log_prob = cup.squash(own_mean, log_std[k], noise[k])
        loss = agent.log_alpha.exp() * log_prob - agent.critic(batch.obs[k], action).min()
        (expected,) = torch.autograd.grad(loss / 64, own_mean)
        assert torch.allclose(sac[k], expected, atol=1e-6)


def test_gpu_steps_past_the_end_of_an_episode():
    """Which is for it to begin anew, after 500 steps."""
    envs = cup.make_envs("reach-v2", 1, 1)
    assert gpu.run(speed.make_agent(0, "cpu", compile=False), envs, updates=0, steps=502) > 0
    assert [(env.episode, len(env.actions)) for env in envs.envs] == [(1, 2)]


def test_diagnosis_of_a_run(tmp_path, call, capsys):
    """With many actions there is no luck: the update's own estimate is the expectation."""
    run_dir = tmp_path / "run"
    flags = "--num-guidance-samples", "64", "--checkpoint-interval", "1000"
    succeed(*PENDULUM, *flags, "--run-dir", run_dir)
    call(diagnose, run_dir, "--states", 500, "--out", tmp_path)
    (row,) = read_csv(tmp_path / "diagnosis.csv")
    assert (row["env_id"], row["seed"], row["step"]) == ("Pendulum-v1", "1", "1000")
    assert 0 < float(row["selected"]) < 1
    assert 0 <= float(row["twins_agree"]) <= 1
    assert float(row["pull"]) > 0
    assert float(row["again"]) == pytest.approx(float(row["advantage"]), rel=0.1)
    assert f"pull {row['pull']}" in capsys.readouterr().out
    call(diagnose, run_dir, "--figure4", "--fresh-samples", 16, "--out", tmp_path)
    rows = read_csv(tmp_path / "figure4.csv")
    assert len(rows) == 3 * 200
    assert [row["candidate"] for row in rows[:3]] == ["random-1", "random-2", "target"]
    assert {row["advantage"] for row in rows[2::3]} == {"0"}


def test_what_diagnose_cannot_look_into_is_a_sentence(tmp_path, call, capsys):
    torch.save({"args": {}, "agent": {}, "method": "sac"}, tmp_path / "checkpoint.pt")
    for run_dir in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as stop:
            call(diagnose, run_dir)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no checkpoint of a CUP run" in line
    with pytest.raises(SystemExit):
        call(diagnose, "--figure4")
    assert "name a run directory" in capsys.readouterr().err
