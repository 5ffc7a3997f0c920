"""The benchmark runs, in processes with the devices that it names."""

import json

import pytest

from benchmarks import modgrok_phase as bench


@pytest.mark.slow
def test_quick(tmp_path, capsys):
    bench.main(["--quick", f"--json={tmp_path}/phase.json"])
    rows = json.loads((tmp_path / "phase.json").read_text())["rows"]
    assert [(row["devices"], row["form"]) for row in rows] == [
        (1, "in turns"),
        (1, "vmap"),
        (2, "in turns"),
    ]
    assert all(row["ratio"] > 0 for row in rows)
    assert "runs one after another / this" in capsys.readouterr().out


def test_batches_fit_every_number_of_tasks():
    for size in bench.SIZES.values():
        assert all(size.batch % n == 0 for n in bench.TASKS)
