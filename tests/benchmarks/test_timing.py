"""The shared timer."""

import json
import time

import pytest

from benchmarks import timing


def test_candidates_take_turns_and_each_leads_a_round():
    calls = []
    timing.interleave(
        {name: lambda name=name: calls.append(name) for name in "abc"}, repetitions=3, pause=0.0
    )
    assert "".join(calls) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"


def test_times_are_seconds_and_the_first_call_of_a_turn_does_not_count():
    waits = iter([0.2, 0.1, 0.02, 0.1, 0.02, 0.1, 0.02])
    timer = timing.interleave({"sleep": lambda: time.sleep(next(waits))}, repetitions=3)["sleep"]
    assert len(timer.repetitions) == 3
    assert timer.first >= 0.2 > 0.1 > timer.median >= 0.02


def test_median_and_spread():
    timer = timing.Timing(9.0, (1.0, 2.0, 6.0))
    assert (timer.median, timer.spread) == (2.0, 2.5)


def test_no_repetitions_is_refused():
    with pytest.raises(ValueError, match="repetitions=0 must be at least 1"):
        timing.interleave({"a": lambda: None}, repetitions=0)


def test_table_is_markdown_of_the_chosen_columns():
    rows = [{"name": "long name", "rate": 1234.567, "other": 1}, {"name": "b"}]
    assert timing.table(rows, {"name": "n", "rate": "steps/s"}) == (
        "| n         | steps/s |\n"
        "| --------- | ------- |\n"
        "| long name | 1235    |\n"
        "| b         | -       |"
    )


def test_machine_goes_through_json(tmp_path):
    record = {"machine": timing.machine("jax"), "rows": [{"seconds": (1.0, 2.0)}]}
    timing.write_json(tmp_path / "r.json", record)
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["machine"] == record["machine"]
    assert read["machine"]["cores"] >= 1
    assert read["rows"] == [{"seconds": [1.0, 2.0]}]
