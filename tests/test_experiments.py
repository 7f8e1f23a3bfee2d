"""Studies: several processes side by side, killed and begun again, and what their records hold."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_scratch import experiments
from llm_scratch.data import END, tales
from llm_scratch.experiments import (
    PRESETS,
    STUDIES,
    finish,
    load_record,
    results,
    run,
    run_status,
    sweep,
    vary,
)
from llm_scratch.training import FREE, read_metrics

RESULTS = Path(__file__).parent.parent / "data" / "results"


@pytest.fixture
def mini(tmp_path, monkeypatch):
    "A run of a second on a text of 200 kB."
    (tmp_path / "tales.txt").write_text("".join(f"{t}\n{END}\n" for t in tales(200_000)), encoding="utf-8")
    monkeypatch.setenv("LLM_SCRATCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    shape = dict(vocab_size=300, context_length=32, d_model=32, num_layers=1, num_heads=2)
    steps = dict(
        steps=20, batch_size=8, warmup=2, log_every=5, eval_every=10, checkpoint_every=10, device="cpu"
    )
    return vary(PRESETS["laptop"], "mini", corpus="tales.txt", **shape, **steps)


def curves(row):
    "What two runs of one experiment have in common: all but the time they took."
    return [{k: v for k, v in row[part].items() if k != "seconds"} for part in ("train", "valid")]


def test_side_by_side_is_the_same(mini):
    runs = [mini, vary(mini, "muon", optimizer="muon"), vary(mini, "light", checkpoints=False)]
    one, two = sweep(runs, "one", bars=False), sweep(runs, "two", jobs=2)
    assert [r["name"] for r in two] == ["mini", "muon", "light"] and all(r["status"] == "done" for r in two)
    assert [curves(r) for r in one] == [curves(r) for r in two]
    assert curves(one[0]) == curves(one[2]) != curves(one[1])  # with and without checkpoints: one training
    assert Path("one/mini/checkpoints").exists() and not Path("one/light/checkpoints").exists()


def test_muon_resumes_where_it_was(mini):
    whole = finish(vary(mini, "whole", optimizer="muon"), "runs")
    half = vary(mini, "half", optimizer="muon")
    records = run(half, "runs/half")
    for record in records:
        if record["step"] >= 10:
            break
    records.close()
    assert run_status("runs/half", half) == "interrupted"
    assert curves(finish(half, "runs")) == curves(whole)


def test_a_light_run_begins_again(mini):
    light = vary(mini, "light", checkpoints=False)
    records = run(light, "runs/light")
    next(records)
    records.close()
    assert run_status("runs/light", light) == "interrupted"
    with pytest.raises(FileExistsError, match="holds a run"):
        next(run(light, "runs/light"))
    assert finish(light, "runs")["status"] == "done"
    assert [r["step"] for r in read_metrics("runs/light")] == [5, 10, 15, 20]


def test_failures_are_results_and_errors_are_not(mini, monkeypatch):
    assert (
        finish(vary(mini, "wild", lr=1e30, lr_min=0.0, clip=None, checkpoints=False), "runs")["status"]
        == "diverged"
    )

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")
        yield

    monkeypatch.setattr(experiments, "train", full)
    row = finish(vary(mini, "huge"), "runs")
    assert row["status"] == "out of memory" and row["valid_loss"] is None
    assert finish(vary(mini, "huge"), "runs") == row  # not tried again


def test_one_broken_run_does_not_stop_the_others(mini):
    broken = vary(mini, "broken", train=replace(mini.train, device="cuda:99"))
    done = []
    with pytest.raises(ValueError, match="cuda:99"):
        for row in results([broken, mini, vary(mini, "second", seed=2)], "runs", jobs=2):
            done.append(row["name"])
    assert sorted(done) == ["mini", "second"]


STUDY = """
from llm_scratch import experiments as E
def fill():
    base = E.vary(E.PRESETS["laptop"], "a", corpus="tales.txt", vocab_size=300, context_length=32, d_model=32, num_layers=1,
        num_heads=2, steps=400, batch_size=8, warmup=2, log_every=5, eval_every=100, checkpoint_every=100, device="cpu")
    for i, name in enumerate("abcd"):
        E.PRESETS[name] = E.vary(base, name, seed=i, corpus="book")
    E.STUDIES["four"] = list("abcd")
fill()
if __name__ == "__main__":
    E.run_studies(["four"], "runs", {"four": "four.json"}, 1, {"book": "tales.txt"}, bars=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills by signal")
def test_a_killed_study_keeps_what_it_had(mini, tmp_path):
    (tmp_path / "study.py").write_text(STUDY)
    command = [sys.executable, "study.py"]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as study:
        end = time.time() + 120
        while not Path("four.json").exists() and study.poll() is None and time.time() < end:
            time.sleep(0.05)
        study.send_signal(signal.SIGKILL)
    first = load_record("four.json")["rows"]
    assert 1 <= len(first) < 4 and first[0]["name"] == "a"
    stamp = Path("runs/a/metrics.jsonl").stat().st_mtime_ns
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    record = load_record("four.json")
    assert [r["name"] for r in record["rows"]] == list("abcd") and record["rows"][0] == first[0]
    assert Path("runs/a/metrics.jsonl").stat().st_mtime_ns == stamp
    assert record["rows"][0]["config"]["corpus"] == "tales.txt"  # what it really was trained on


@pytest.mark.parametrize("path", sorted(RESULTS.glob("h200-*.json")), ids=lambda p: p.stem)
def test_records_are_of_the_presets(path):
    "A recorded run has the settings that its preset has today, and says what it saw."
    record = load_record(path)
    assert record["device"] == "NVIDIA H200" and record["versions"]["torch"] and record["date"]
    assert path.stat().st_size < 1 << 20
    names = STUDIES["gpu-" + path.stem.removeprefix("h200-")]
    assert {row["name"] for row in record["rows"]} <= set(names)
    for row in record["rows"]:
        preset = json.loads(json.dumps(experiments.asdict(PRESETS[row["name"]])))
        for part in ("model", "train"):
            there = {k: v for k, v in row["config"][part].items() if k in preset[part] and k not in FREE}
            assert there == {k: preset[part][k] for k in there}, row["name"]
        if row["status"] == "done":
            assert row["tokens"] == PRESETS[row["name"]].tokens
        assert len(row["train"]["tokens"]) <= experiments.CURVE_POINTS
