"""A run killed with `kill -9`, wherever that happens, and resumed gives the uninterrupted run, bit for bit."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither SIGKILL nor forkserver")

TIMINGS = ("seconds", "tokens_per_s")
WRITES = ("save_file", "os.fsync", "os.replace", "shutil.rmtree", "write_text")  # moments inside a checkpoint


def run(folder, kill_at=None, largest_file=None):
    """Trains a tiny model in `folder`, resuming what is there.

    `kill_at`: the write at which this process dies. `largest_file`: bytes; writing beyond fails as on a full disk.
    """
    import torch

    from llm_scratch import training
    from llm_scratch.model import ModelConfig, TransformerLM

    torch.set_num_threads(1)
    writes = 0

    def dying(name, function):
        def call(*args, **kwargs):
            nonlocal writes
            writes += 1
            if writes == kill_at:
                if name == "save_file":  # half of it reaches the disk
                    function(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    training.save_file = dying("save_file", training.save_file)
    os.fsync, os.replace = dying("os.fsync", os.fsync), dying("os.replace", os.replace)
    shutil.rmtree = dying("shutil.rmtree", shutil.rmtree)
    Path.write_text = dying("write_text", Path.write_text)

    torch.manual_seed(0)
    model = TransformerLM(
        ModelConfig(vocab_size=60, context_length=16, d_model=16, num_layers=1, num_heads=2, tie_weights=True)
    )
    ids = np.random.default_rng(0).integers(60, size=3000)
    config = training.TrainConfig(
        steps=60, batch_size=4, lr=0.01, log_every=4, eval_every=20, checkpoint_every=9, keep_checkpoints=1,
        device="cpu",
    )  # fmt: skip
    if largest_file:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        for _ in training.train(model, ids, config, ids[:400], folder, resume=True, valid_bytes=900):
            pass
    except training.CheckpointError as error:
        sys.exit(28 if "make room" in str(error) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    (Path(folder) / "writes").write_bytes(str(writes).encode())


@pytest.fixture(scope="module")
def start():
    "Starts `run` in a process of its own; cheaply, since torch has been imported there."
    context = multiprocessing.get_context("forkserver")
    modules = ("torch._dynamo", "torch.utils.tensorboard", "llm_scratch.training", "llm_scratch.model")
    context.set_forkserver_preload([*modules])

    def start(*args):
        process = context.Process(target=run, args=args)
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    "The uninterrupted run: its folder and how long it took."
    folder = tmp_path_factory.mktemp("runs") / "whole"
    for _ in range(2):  # the first one pays for the imports
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        process = start(folder)
        process.join(120)
        assert process.exitcode == 0
    return folder, time.perf_counter() - began


def result(folder):
    "Metrics without timings; weights and optimizer of the last checkpoint; what lies in the folder."
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]
    last = folder / "checkpoints" / "step_00000060"
    tensors = [(last / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]
    kept = sorted(p.name for p in folder.rglob("*") if "tensorboard" not in str(p))
    return metrics, tensors, kept


def finish(start, folder):
    process = start(folder)
    process.join(120)
    assert process.exitcode == 0


def test_killed_at_random_moments(start, whole, tmp_path):
    whole, seconds = whole
    seed = random.randrange(1 << 30)
    dice, folder = random.Random(seed), tmp_path / "run"
    killed = 0
    while killed < 3:
        process = start(folder)
        process.join(dice.uniform(0.1, 0.6) * seconds)
        if process.exitcode is None:
            process.kill()
            killed += 1
        else:  # this machine has become faster: begin again
            shutil.rmtree(folder)
            killed, seconds = 0, seconds / 2
        process.join(120)
    finish(start, folder)
    assert result(folder) == result(whole), f"moments of seed {seed}"


def test_killed_in_every_write_of_a_checkpoint(start, whole, tmp_path):
    whole, _ = whole
    writes = int((whole / "writes").read_text())
    folder = tmp_path / "run"
    middle = writes // 2
    for write in range(middle, middle + 14):  # as many as one checkpoint takes, pruning included
        process = start(folder, write)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        finish(start, folder)
        assert result(folder) == result(whole), f"killed at write {write} of {writes}"
        shutil.rmtree(folder)


def test_killed_again_and_again(start, whole, tmp_path):
    "Twelve processes in a row die in one of their first writes or a little later; the thirteenth finishes."
    whole, _ = whole
    seed = random.randrange(1 << 30)
    dice, folder = random.Random(seed), tmp_path / "run"
    for _ in range(12):
        process = start(folder, dice.randrange(1, 60))
        process.join(120)
    finish(start, folder)
    assert result(folder) == result(whole), f"writes of seed {seed}"


def test_full_disk(start, whole, tmp_path):
    "A checkpoint that does not fit: a clear error, nothing half written, and resumed when there is room again."
    whole, _ = whole
    folder = tmp_path / "run"
    for room in (10_000, 30_000):  # too little for the weights; enough for them, too little for the optimizer
        process = start(folder, None, room)
        process.join(120)
        assert process.exitcode == 28
        assert not list((folder / "checkpoints").iterdir())
    finish(start, folder)
    assert result(folder) == result(whole)


def test_ctrl_c_saves(start, whole, tmp_path):
    whole, seconds = whole
    folder = tmp_path / "run"
    process = start(folder)
    metrics = folder / "metrics.jsonl"
    while process.exitcode is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.1) * seconds)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode == 130
    assert list((folder / "checkpoints").glob("step_*")) and not list(folder.rglob(".*"))
    finish(start, folder)
    assert result(folder) == result(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_while_logging(tmp_path):
    from llm_scratch.training import RunFolder, TrainConfig, TrainingError

    folder = RunFolder(tmp_path / "run", {"train": vars(TrainConfig())})
    folder.restore(None, None)
    folder.close()
    with (
        open("/dev/full", "ab", buffering=0) as folder.metrics,
        pytest.raises(TrainingError, match="make room"),
    ):
        folder.log({"step": 1, "loss": 1.0})
