"""Draw the paper's Figures 2 and 3, and print the results table, from benchmark/results.

    python benchmark/plot.py

study.csv is study.py's; sources_unmodified.csv is play.py's, of every source on every task.
Final performance is the mean over the last 100,000 steps of every run.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter, MultipleLocator
from scipy.stats import bootstrap, trim_mean

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from study import TASKS, read_csv  # noqa: E402

FINAL_STEPS = 100_000
# Okabe and Ito's colours, which the colour-blind can tell apart
METHODS = {"cup": ("CUP", "#0072B2"), "sac": ("SAC", "#D55E00"), "haar": ("HAAR", "#56B4E9")}
METHODS |= {"haar-frozen": ("HAAR, skills frozen", "#000000")}
METHODS |= {"ptf": ("PTF", "#E69F00"), "multipolar": ("MULTIPOLAR", "#009E73")}
METHODS |= {"mamba": ("MAMBA", "#CC79A7")}
# runs that chose each method's settings, baselines/README.md
TUNING_RUNS = {"cup": 145, "sac": 8, "haar": 18, "haar-frozen": 18, "ptf": 14, "multipolar": 2}
TUNING_RUNS |= {"mamba": 14}
CANDIDATES = {"reach-v2": "#117733", "push-v2": "#DDCC77", "pick-place-v2": "#882255"}  # Tol's
CANDIDATES |= {"target": "#404040"}

Curves = dict[str, dict[str, np.ndarray]]  # by method and seed: rows of step, return, success


@dataclass
class Args:
    """Draw the figures and print the results table."""
    results: Path = HERE / "results"  # where the csv files are
    figures: Path = HERE / "figures"  # where the figures go
    steps: int = 500_000  # runs are shown up to here


def number(text: str) -> float:
    return float(text) if text else np.nan


def read_curves(rows: list[dict[str, str]], task: str, steps: int) -> Curves:
    """The evaluations of a task up to `steps`."""
    points = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["env_id"] == task and int(row["step"]) <= steps:
            point = [number(row[name]) for name in ("step", "eval/return", "eval/success_rate")]
            points[row["method"]][row["seed"]].append(point)
    return {
        method: {seed: np.array(sorted(run)) for seed, run in sorted(points[method].items())}
        for method in METHODS
        if method in points
    }


def final(run: np.ndarray) -> np.ndarray:
    """Mean return and success over the last 100,000 steps of a run."""
    return run[run[:, 0] > run[-1, 0] - FINAL_STEPS, 1:].mean(axis=0)


# ---- the results table ---------------------------------------------------------------------------
def results_table(curves: dict[str, Curves]) -> str:
    """A row for every task and method, with every seed."""
    titles = ["task", "method", "return, last 100,000 steps", "success, last 100,000 steps, %"]
    lines = [[*titles, "return, mean of the curve"], ["---"] * 5]
    for task, methods in curves.items():
        for method, seeds in methods.items():
            ends = np.array([final(run) for run in seeds.values()])  # (seeds, 2)
            areas = [run[:, 1].mean() for run in seeds.values()]
            columns = (ends[:, 0], 100 * ends[:, 1], areas)
            cells = [", ".join(f"{x:,.0f}" for x in column) for column in columns]
            lines.append([task.removesuffix("-v2"), METHODS[method][0], *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(statistic, runs: list[np.ndarray]) -> str:
    """A statistic of scores by task, and its 95 % interval by resampling the seeds of each task."""
    options = {"n_resamples": 2000, "vectorized": False, "method": "percentile", "rng": 0}
    low, high = bootstrap(runs, statistic, **options).confidence_interval
    return f"{statistic(*runs):.2f} [{low:.2f}, {high:.2f}]"


def middle(*tasks: np.ndarray) -> float:
    """The interquartile mean of all runs."""
    return trim_mean(np.concatenate(tasks), 0.25)


def improvement(*tasks: np.ndarray) -> float:
    """Probability that a run of the first half, CUP's, is better; 1/2 where both are equal."""
    ours, theirs = tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :]
    signs = [np.sign(np.subtract.outer(x, y).round(6)).mean() for x, y in zip(ours, theirs)]
    return np.mean(signs) / 2 + 0.5


def aggregates(curves: dict[str, Curves]) -> str:
    """Final success over all tasks, as Agarwal et al. (NeurIPS 2021) recommend: interquartile mean,
    and CUP's probability of improvement. Of methods that have run on all tasks."""
    scores, lines = {}, []
    for method, (name, _) in METHODS.items():
        if all(method in methods for methods in curves.values()):
            runs = [methods[method].values() for methods in curves.values()]
            scores[method] = [np.array([final(run)[1] for run in task]) for task in runs]
            line = f"{name}: interquartile mean of success {interval(middle, scores[method])}"
            if method != "cup":
                better = interval(improvement, scores["cup"] + scores[method])
                line += f", probability that CUP is better {better}"
            lines.append(line)
    return "\n".join(lines)


# ---- figures -------------------------------------------------------------------------------------
def sheet(title: str, ylabel: str, steps: int):
    """A figure with a panel for each task."""
    figure, panels = plt.subplots(2, 3, figsize=(10.5, 6), layout="constrained", sharex=True)
    figure.suptitle(title)
    for task, axes in zip(TASKS, panels.flat, strict=True):
        axes.set_title(task.removesuffix("-v2"), fontsize=11)
        axes.set_xlim(0, steps)
        axes.xaxis.set_major_locator(MultipleLocator(100_000))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    plt.setp(panels[-1], xlabel="environment steps")
    plt.setp(panels[:, 0], ylabel=ylabel)
    return figure, dict(zip(TASKS, panels.flat, strict=True))


def write(figure, lines: dict, path: Path) -> None:
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def draw(axes, steps: list[np.ndarray], values: list[np.ndarray], colour: str):
    """A thin line for each seed, and their mean over the steps that all seeds have."""
    for seed in zip(steps, values, strict=True):
        axes.plot(*seed, color=colour, lw=0.7, alpha=0.5)
    shortest = min(steps, key=len)
    mean = np.mean([seed[: len(shortest)] for seed in values], axis=0)
    return axes.plot(shortest, mean, color=colour, lw=2)[0]


def figure2(curves: dict[str, Curves], column: int, best_source: dict, args: Args) -> None:
    """Return (column 1) or success (2) of the evaluations."""
    name, scale = ("return", 1) if column == 1 else ("success", 100)
    title = f"Evaluation {name} (thin: seeds; thick: their mean)"
    figure, panels = sheet(title, "return" if column == 1 else "success rate, %", args.steps)
    lines = {}
    for task, axes in panels.items():
        for method, seeds in curves[task].items():
            method_name, colour = METHODS[method]
            label = f"{method_name} ({TUNING_RUNS[method]} tuning runs)"
            steps = [run[:, 0] for run in seeds.values()]
            values = [scale * run[:, column] for run in seeds.values()]
            lines[label] = draw(axes, steps, values, colour)
        if task in best_source:
            level = scale * best_source[task][column - 1]
            label = "source with the highest return, unmodified"
            lines[label] = axes.axhline(level, ls=":", color="0.3", lw=1.2)
        axes.set_ylim((0, None) if column == 1 else (-3, 103))
    write(figure, lines, args.figures / f"figure2_{name}.png")


def figure3(rows: list[dict[str, str]], args: Args) -> None:
    """Share of states at which each candidate is the guidance policy, since the last evaluation."""
    figure, panels = sheet("Candidate selected as guidance policy", "states, %", args.steps)
    lines = {}
    for candidate, colour in CANDIDATES.items():
        column = f"guidance/selected/{candidate}"
        runs = defaultdict(list)  # by task and seed: step, share
        for row in rows:
            if row["method"] == "cup" and row[column] and int(row["step"]) <= args.steps:
                point = [int(row["step"]), 100 * float(row[column])]
                runs[row["env_id"], row["seed"]].append(point)
        for task, axes in panels.items():
            seeds = [np.array(run).T for (env_id, _), run in runs.items() if env_id == task]
            if seeds:
                lines[candidate] = draw(axes, *zip(*seeds, strict=True), colour)
            axes.set_ylim(0, 100)
    write(figure, lines, args.figures / "figure3.png")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    args.figures.mkdir(parents=True, exist_ok=True)
    rows = read_csv(args.results / "study.csv")
    curves = {task: read_curves(rows, task, args.steps) for task in TASKS}
    best_source = {}
    for row in read_csv(args.results / "sources_unmodified.csv"):
        score = (float(row["return"]), float(row["success_rate"]))
        best_source[row["env_id"]] = max(best_source.get(row["env_id"], score), score)
    for column in (1, 2):
        figure2(curves, column, best_source, args)
    figure3(rows, args)
    print(results_table(curves))
    print(aggregates(curves))


if __name__ == "__main__":
    main()
