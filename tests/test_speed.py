"""benchmark/speed.py: its table, by numbers that can be checked by hand, and one small run."""

import sys

from benchmark import speed
from benchmark.transfer import read_csv


def rows_of(run: str, **values: list[float]) -> list[dict[str, str]]:
    about = dict.fromkeys(speed.ABOUT, "x") | {"run": run, "unit": "steps/s"}
    return [
        about | {"what": what.replace("_", "-"), "value": str(value)}
        for what, numbers in values.items()
        for value in numbers
    ]


def test_the_table_has_medians_and_ratios_within_a_run():
    rows = rows_of("first", cup_0=[90, 100, 300], cup_3=[80], sb3=[50, 40, 60])
    rows += rows_of("second", cup_0=[10], cup_0_compiled=[30], cup_3_compiled=[20], sb3=[20])
    lines = [line.strip("|\n").split("|") for line in speed.table(rows).splitlines()]
    found = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert found["run"] == ["first", "second"]
    assert found["cup-0, steps/s"] == ["100", "10"]
    assert found["cup-0 ÷ sb3"] == ["2.00", "0.50"]
    assert found["cup-3 ÷ sb3"] == ["1.60", ""]
    assert found["cup-3 ÷ cup-0"] == ["0.80", ""]
    assert found["cup-0-compiled ÷ sb3"] == ["", "1.50"]
    assert found["cup-3-compiled ÷ cup-0-compiled"] == ["", "0.67"]
    assert not any("sbx" in name or "products" in name for name in found)


def test_the_committed_table_is_that_of_the_committed_rows():
    rows = read_csv(speed.ROOT / "benchmark" / "speed.csv")
    assert set(rows[0]) == set(speed.COLUMNS)
    assert (speed.ROOT / "benchmark" / "speed.md").read_text() == speed.table(rows)


def test_every_measurement_is_a_row(tmp_path, monkeypatch):
    flags = "--env-id Pendulum-v1 --steps 100 --repeats 1 --threads 1 --what study-1 products ptf"
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags.split(), "--out", str(tmp_path)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    speed.main()
    rows = read_csv(tmp_path / "speed.csv")
    assert [(row["what"], row["unit"]) for row in rows] == [
        ("products", "ms"), ("ptf", "steps/s"), ("study-1", "steps/s")
    ]
    assert all(float(row["value"]) > 0 and row["machine"].endswith("cores") for row in rows)
    assert "| products, ms |" in (tmp_path / "speed.md").read_text()
