"""Every command of `llm_scratch` on small real input, and what it says to bad input."""

import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_scratch import training
from llm_scratch.cli import COMMANDS, EAGER, main, training_lanes
from llm_scratch.data import END, tales

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would only wait for each other
SHELL = [sys.executable, "-c", "import sys; from llm_scratch.cli import main; sys.exit(main())"]
TINY = shlex.split(
    "--model.vocab-size 300 --model.context-length 32 --model.d-model 32 --model.num-layers 1 --model.num-heads 2 "
    "--train.batch-size 8 --train.warmup 2 --train.lr 3e-3 --train.lr-min 3e-5 --train.log-every 5 --train.eval-every 10 "
    "--train.checkpoint-every 10 --train.device cpu"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "A folder with a text of 300 kB, a tokenizer, a token file and a finished run, all made by the commands."
    home = tmp_path_factory.mktemp("cli")
    os.environ["LLM_SCRATCH_DATA"] = str(home / "data")
    (home / "tales.txt").write_text("".join(f"{t}\n{END}\n" for t in tales(300_000)), encoding="utf-8")
    before = os.getcwd()
    os.chdir(home)
    try:
        assert main(shlex.split("train-tokenizer tales.txt --vocab-size 300 --out tokenizer.json")) == 0
        assert main(shlex.split("encode tokenizer.json tales.txt tokens.npy")) == 0
        assert (
            main(
                [
                    "train",
                    "laptop",
                    "--corpus",
                    "tales.txt",
                    *TINY,
                    "--train.steps",
                    "20",
                    "--run-dir",
                    "runs/a",
                ]
            )
            == 0
        )
    finally:
        os.chdir(before)
    yield home
    del os.environ["LLM_SCRATCH_DATA"]


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    "A fresh working folder that sees the shared files."
    for name in ("tales.txt", "tokenizer.json", "tokens.npy"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copytree(folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    return tmp_path


@pytest.fixture
def cli(here, capfd):
    "Run a command in this process; gives (exit code, standard output, standard error)."

    def run(command, *more):
        capfd.readouterr()
        code = main([*shlex.split(command), *more])
        return code, *capfd.readouterr()

    return run


def shell(args, **kwargs):
    "Run a command in a process of its own."
    return subprocess.run(
        [*SHELL, *args], capture_output=True, text=True, encoding="utf-8", timeout=120, **kwargs
    )


def refused(result, *words):
    "One line, exit code 2, and it says these words."
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("llm_scratch: error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, (code, err)
    assert err.rstrip("\n").splitlines()[-1] == lines[0], err
    for word in words:
        assert re.search(word, lines[0]), (word, lines[0])


# The front door


def test_help_is_quick(capsys):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        result = shell(["--help"])
        times.append(time.perf_counter() - start)
        assert result.returncode == 0 and not result.stderr
    median = statistics.median(times)
    with capsys.disabled():
        print(f"\nllm_scratch --help: {median:.3f} s (median of 5)", end=" ")
    assert median < 1.5  # 0.1 s on a quiet machine; the promise is 0.5
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


def test_help_loads_nothing():
    code = "import sys; from llm_scratch.cli import main; main(['--help']); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "tyro", "numpy", "llm_scratch.data"} & set(loaded)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(cli, name):
    code, out, err = cli(f"{name} --help")
    assert code == 0 and not err and "--help" in out
    assert COMMANDS[name].__doc__.split(":")[0].split(",")[0] in " ".join(out.split()) or name == "train"


def test_flags_are_the_fields_of_the_dataclasses(cli):
    from dataclasses import fields

    from llm_scratch.model import ModelConfig
    from llm_scratch.training import TrainConfig

    _, out, _ = cli("train tinystories --help")
    for prefix, config in (("model", ModelConfig), ("train", TrainConfig)):
        for field in fields(config):
            assert f"--{prefix}.{field.name.replace('_', '-')}" in out, field.name
    assert (
        "10000" in out and "peak learning rate" in out
    )  # the preset's values, and the comment beside the field


def test_version_and_unknown_commands(cli):
    assert cli("--version")[1].startswith("llm_scratch 0.")
    refused(cli("trian"), "did you mean train")
    refused(cli("frobnicate"), "there are: demo")
    assert cli("")[0] == 0


def test_console_script():
    script = Path(sys.executable).with_name("llm_scratch")
    if not script.exists():
        pytest.skip("the package's script is not installed beside this Python")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.startswith(
        "llm_scratch"
    )


# Text


def test_download_generates_tales(cli):
    code, out, _ = cli("download tales --size 200000")
    sizes = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", out)]
    assert code == 0 and len(sizes) == 2 and 150_000 < sum(sizes) < 250_000


def test_tokenizer_and_tokens(cli, here):
    code, out, _ = cli("info tokenizer.json")
    assert code == 0 and re.search(r"tokens +300\n", out) and f"{END} = 256" in out
    from llm_scratch.data import load_tokens
    from llm_scratch.tokenizer import Tokenizer

    text = Path("tales.txt").read_text(encoding="utf-8")
    assert Tokenizer.load("tokenizer.json").decode(load_tokens("tokens.npy").tolist()) == text
    assert f"{len(load_tokens('tokens.npy')):,}" in cli("info tokens.npy")[1]
    assert f"{len(text.encode()):,}" in cli("info tales.txt")[1]


def test_more_merges_than_the_text_has(cli, here):
    Path("tiny.txt").write_text("aaaa bbbb " * 20)
    code, out, err = cli("train-tokenizer tiny.txt --vocab-size 5000 --out t.json")
    assert code == 0 and "5000" in (out + err).replace(",", ""), (out, err)  # it stops, and says so
    assert json.loads(Path("t.json").read_text(encoding="utf-8"))


def test_bad_text(cli, here):
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"plain \xe9t\xe9 text\n")
    refused(cli("train-tokenizer missing.txt"), "missing.txt")
    refused(cli("train-tokenizer empty.txt --vocab-size 300"), "empty")
    refused(cli("train-tokenizer latin.txt --vocab-size 300"), "UTF-8", r"offset 6\b")
    refused(cli("encode tokenizer.json latin.txt out.npy"), "UTF-8", r"offset 6\b")
    refused(cli("encode tokenizer.json missing.txt out.npy"), "missing.txt")
    refused(cli("train-tokenizer tales.txt --vocab-size 200"), "257|vocab")
    refused(cli("encode nothing.json tales.txt out.npy"), "train-tokenizer")
    refused(cli("encode tales.txt tales.txt out.npy"), "tales.txt")
    refused(cli("encode tokenizer.json tales.txt out.txt"), r"\.npy")
    refused(cli("download wikipedia"), "wikipedia")
    refused(cli("info nothing"), "nothing")
    assert not Path("out.npy").exists()


def test_offline_corpus_says_where_to_put_the_file(here, tmp_path):
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "LLM_SCRATCH_DATA": str(tmp_path / "none"),
    }
    result = shell(["download", "tinystories"], env=env)
    refused(
        (result.returncode, result.stdout, result.stderr),
        "TinyStoriesV2-GPT4-train.txt",
        str(tmp_path / "none"),
    )


def test_truncated_token_file(cli, here):
    Path("cut.npy").write_bytes(Path("tokens.npy").read_bytes()[:5000])
    refused(cli("info cut.npy"), "cut.npy")
    Path("matrix.npy").unlink(missing_ok=True)
    np.save("matrix.npy", np.zeros((3, 3)))
    refused(cli("info matrix.npy"), "matrix.npy")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_full_disk_leaves_the_old_file(here):
    import resource

    Path("out.npy").write_bytes(b"old")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    result = shell(["encode", "tokenizer.json", "tales.txt", "out.npy"], preexec_fn=limit)
    refused((result.returncode, result.stdout, result.stderr), "large|space")
    assert Path("out.npy").read_bytes() == b"old"
    assert not [p for p in here.iterdir() if "tmp" in p.name]


# Training


def test_run_is_described(cli):
    code, out, _ = cli("info runs/a")
    assert code == 0 and "20 of 20" in out and "tales.txt" in out
    assert int(re.search(r"parameters +([\d,]+)", out)[1].replace(",", "")) > 10_000
    first, last = map(float, re.search(r"training loss +([\d.]+) -> ([\d.]+)", out).groups())
    assert last < first < 7


def test_bench(cli, here):
    code, out, err = cli("bench --help")
    assert code == 0 and "bench WHAT --help" in out and "tokenizer" in out
    code, out, err = cli("bench tokenizer --help")
    assert code == 0 and "llm_scratch bench tokenizer" in out and "--encode-vocab-size" in out
    refused(cli("bench"), "no benchmark given", "tokenizer")
    refused(cli("bench tokenzier"), "tokenzier", "tokenizer")
    refused(cli("bench tokenizer tales.txt --peers nobody"), "nobody", "gigatoken")
    refused(cli("bench tokenizer missing.txt"), "missing.txt")
    refused(cli("bench tokenizer tales.txt --rounds 0"), "round")
    refused(cli("bench tokenizer tales.txt --record runs"), "runs is a folder")


def test_bench_measures(cli, here):
    command = "bench tokenizer tales.txt --vocab-sizes 300 --encode-vocab-size 320 --rounds 1 --threads 1"
    code, out, err = cli(f"{command} --peers tiktoken --record new/speed.json --plot new/speed.png")
    assert code == 0, err
    record = json.loads(Path("new/speed.json").read_text(encoding="utf-8"))
    assert {"what", "device", "python", "versions", "date", "rows"} <= record.keys()
    rows = [row for row in record["rows"] if row["peer"] == "tiktoken"]
    assert {row["task"] for row in rows} == {"encode", "strings"} and all(row["same_ids"] for row in rows)
    assert out.count("| tiktoken") == len(rows) == 3 and Path("new/speed.png").stat().st_size > 5000


def test_bench_training_and_generation(cli, here, monkeypatch):
    refused(cli("bench training micro --record runs"), "runs is a folder")
    refused(cli("bench training micro --rounds 0"), "--rounds must be at least 1")
    refused(cli("bench training micro --batches 2 0"), "--batches must be at least 1")
    refused(cli("bench training macro"), "macro", "micro, demo, tiny")
    refused(cli("bench training micro --fp8 --batches 2"), "--fp8 takes part in the race")
    refused(cli("bench training micro --eager --batches 2"), "--eager takes part in the race")
    refused(cli("bench generation micro --record runs"), "runs is a folder")
    refused(cli("bench generation micro --batches 0"), "--batches must be at least 1")
    refused(cli("bench generation micro --tokens 9"), "47 positions, micro has 32", "--tokens 4")

    quick = "--no-peer --rounds 1 --steps 1"
    if not torch.cuda.is_available():
        code, out, err = cli(f"bench training micro {quick} --fp8")
        assert code and "NVIDIA GPU" in err and "Traceback" not in err and not out, err
    code, out, err = cli(f"bench training micro {quick} --eager")
    assert code == 0 and out.count("tokens/s") == 2 and "ours without torch.compile" in out, err
    alone = training_lanes("micro", False, True)
    assert {*training_lanes("micro", False, True, eager=True)} - {*alone} == {*EAGER}
    code, out, err = cli(f"bench training micro {quick} --batches 4 2 --record new/ladder.json")
    assert code == 0, err
    rows = json.loads(Path("new/ladder.json").read_text(encoding="utf-8"))["rows"]
    assert [row["batch"] for row in rows] == [2, 4] and out.count("tokens/s") == 2
    assert all(abs(row["tokens_per_s"] * row["seconds"] / 32 / row["batch"] - 1) < 1e-6 for row in rows)

    race, measured = training.race, []

    def too_small(lanes, *turns):  # a device that holds the first batch only
        measured.append(lanes)
        if len(measured) == 2:
            raise torch.OutOfMemoryError("no room")
        return race(lanes, *turns)

    monkeypatch.setattr(training, "race", too_small)
    code, out, err = cli(f"bench training micro {quick} --batches 8 1 2 --record new/ladder.json")
    assert code == 0, err
    rows = json.loads(Path("new/ladder.json").read_text(encoding="utf-8"))["rows"]
    assert [row["batch"] for row in rows] == [1, 2] and rows[1]["status"] in out
    assert rows[1]["status"] == "out of memory" and len(measured) == 2  # 8 was not tried

    code, out, err = cli("bench generation micro --batches 2 --tokens 4 --no-compile --record new/gen.json")
    assert code == 0, err
    rows = json.loads(Path("new/gen.json").read_text(encoding="utf-8"))["rows"]
    assert {"plain", "recorded"} <= {row["name"] for row in rows} and all(row["batch"] == 2 for row in rows)


def test_bench_attention(cli, here):
    code, out, _ = cli("bench attention --help")
    assert code == 0 and "llm_scratch bench attention" in out and "--head-sizes" in out
    refused(cli("bench attention rase"), "rase", "race, groups, lengths, all")
    refused(cli("bench attention --record runs"), "runs is a folder")
    small = "bench attention --head-sizes 16 --lengths 32 --tokens 32 --hidden 32 --seconds 0"
    refused(cli(f"{small} --peers nobody"), "nobody", "SDPA cuDNN")
    refused(cli(f"{small} --dtypes int7"), "int7", "bfloat16")
    refused(cli("bench attention --head-sizes 48 --lengths 32 --tokens 32 --hidden 32"), "divide")
    if not torch.cuda.is_available():
        refused(cli("bench attention"), "no GPU", "--lengths 256")
    code, out, err = cli(f"{small} --peers llm_scratch naive --record new/race.json --plot new/race.png")
    assert code == 0, err
    record = json.loads(Path("new/race.json").read_text(encoding="utf-8"))
    assert {"what", "device", "python", "versions", "date", "rows"} <= record.keys()
    assert {row["pass"] for row in record["rows"][1:]} == {"forward", "backward", "both"}
    assert out.count("| naive |") == 2 and Path("new/race.png").stat().st_size > 5000


def test_existing_run_is_refused_resumed_or_overwritten(cli, here):
    again = ["--corpus", "tales.txt", *TINY, "--train.steps", "20", "--run-dir", "runs/a"]
    weights = sorted(Path("runs/a/checkpoints").glob("*/model.safetensors"))[-1].read_bytes()
    refused(cli("train laptop", *again), "runs/a", "resume", "overwrite")
    refused(cli("train laptop", *again, "--model.num-layers", "2", "--resume"), "num_layers")
    assert cli("train laptop", *again, "--resume")[0] == 0  # nothing left to do
    assert sorted(Path("runs/a/checkpoints").glob("*/model.safetensors"))[-1].read_bytes() == weights
    assert cli("train laptop", *again, "--overwrite")[0] == 0
    assert (
        sorted(Path("runs/a/checkpoints").glob("*/model.safetensors"))[-1].read_bytes() == weights
    )  # the same seed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", ["which|no preset", "demo"]),
        ("tinistories", ["tinistories", "demo"]),
        ("--train.steps 5", ["first argument"]),
        ("laptop --model.num-heads 3", ["num_heads|heads"]),
        ("laptop --model.num-layer 3", ["--model.num-layers"]),
        ("laptop --train.lr fast", ["--train.lr", "fast"]),
        ("laptop --train.lr -1", ["lr"]),
        ("laptop --train.steps 0", ["steps"]),
        ("laptop --train.warmup 400", ["warmup"]),
        ("laptop --train.accumulation 3", ["accumulation"]),
        ("laptop --train.schedule zigzag", ["zigzag"]),
        ("laptop --corpus missing.txt", ["missing.txt"]),
        ("laptop --corpus tales.txt --model.vocab-size 100", ["vocab"]),
        ("laptop --resume --overwrite", ["resume|overwrite"]),
    ],
)
def test_impossible_training(cli, here, flags, words):
    refused(
        cli(f"train {flags} --run-dir runs/b" if flags.startswith("laptop") else f"train {flags}"), *words
    )
    assert not list(here.glob("runs/b/checkpoints/*"))


def test_corpus_shorter_than_a_context(cli, here):
    Path("short.txt").write_text("One day.\n\nThe end of it.\n")
    refused(
        cli("train laptop --corpus short.txt", *TINY, "--train.steps", "20", "--run-dir", "runs/b"),
        "short|few|context",
    )


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(cli, here):
    flags = [
        *TINY,
        "--train.steps",
        "200",
        "--train.lr",
        "1e18",
        "--train.lr-min",
        "1e18",
        "--train.clip",
        "None",
        "--model.norm",
        "none",
    ]
    refused(cli("train laptop --corpus tales.txt", *flags, "--run-dir", "runs/b"), "step", "lr")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupt_saves_and_can_be_resumed(here):
    often = "--train.steps 300 --train.log-every 20 --train.eval-every 300 --train.checkpoint-every 300"
    flags = ["--corpus", "tales.txt", *TINY, *shlex.split(often)]
    command = [*SHELL, "train", "laptop", *flags, "--run-dir", "runs/c"]
    # a shell starts what runs in the background deaf to Ctrl-C, and children inherit it
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    metrics, limit = Path("runs/c/metrics.jsonl"), time.time() + 60
    while (not metrics.exists() or not metrics.stat().st_size) and run.poll() is None:
        assert time.time() < limit
        time.sleep(0.02)
    time.sleep(0.02)  # in the middle of the steps
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=180)
    assert run.returncode == 130 and "Traceback" not in err, err
    hint = re.search(r"go on with: llm_scratch (.*)", err)[1]
    saved = list(Path("runs/c/checkpoints").glob("step_*"))
    assert saved and int(saved[0].name[5:]) < 300
    result = shell(shlex.split(hint))
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-1] == 300 and steps == sorted(set(steps))


# Generation


def test_generate(cli, here):
    say = lambda *more: cli("generate runs/a --prompt 'Once upon' --max-new-tokens 20", *more)
    code, one, err = say("--seed", "1")
    assert code == 0 and not err and one.startswith("Once upon") and len(one) > 20
    assert say("--seed", "1")[1] == one != say("--seed", "2")[1]
    assert say("--temperature", "0")[1] == say("--temperature", "0", "--seed", "5")[1]
    assert cli("generate runs/a --seed 1 --max-new-tokens 5")[0] == 0  # no prompt
    last = sorted(Path("runs/a/checkpoints").glob("step_*"))[-1]
    assert say("--seed", "1", "--checkpoint", str(last))[0] == 0


def test_generate_past_the_context_warns_in_one_line(cli):
    code, _, err = cli("generate runs/a --prompt x --max-new-tokens 60 --seed 3")
    assert code == 0 and (not err or err.startswith("llm_scratch: warning: ") and err.count("\n") == 1)


def test_prompt_from_standard_input(here):
    result = shell(shlex.split("generate runs/a --prompt - --max-new-tokens 3 --seed 1"), input="Grüße 🐉\n")
    assert result.returncode == 0 and result.stdout.startswith("Grüße 🐉")


def test_bad_generation(cli, here):
    refused(cli("generate runs/nothing"), "runs/nothing", "train")
    refused(cli("generate tales.txt"), "tales.txt")
    refused(cli("generate runs/a --temperature -1"), "temperature")
    refused(cli("generate runs/a --top-p 0"), "top_p")
    refused(cli("generate runs/a --top-k -3"), "top_k")
    refused(cli("generate runs/a --max-new-tokens -1"), "max_new_tokens")
    refused(cli("generate runs/a --max-new-tokens many"), "--max-new-tokens")
    refused(cli("generate runs/a --checkpoint runs/a/checkpoints/step_99999999"), "step_99999999")


def test_damaged_checkpoints(cli, here):
    for path in Path("runs/a/checkpoints").glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    refused(cli("generate runs/a"), "damaged|truncated")
    for path in Path("runs/a/checkpoints").glob("*/state.json"):
        path.write_text("{")
    refused(cli("generate runs/a"), "checkpoint")
    shutil.rmtree("runs/a/checkpoints")
    refused(cli("generate runs/a"), "checkpoint")
    Path("runs/a/config.json").write_text("[]")
    refused(cli("generate runs/a"), "config.json")
    refused(cli("info runs/a"), "config.json")


def test_tokenizer_of_another_model(cli, here):
    from llm_scratch.tokenizer import Tokenizer, train_bpe

    Tokenizer(*train_bpe("tales.txt", 600), [END]).save("runs/a/tokenizer.json")
    refused(
        cli("generate runs/a --prompt", "Once upon a time there was a little girl and a dog"), "tokenizer"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_reader_of_the_pipe_leaves(here):
    command = shlex.split("generate runs/a --prompt Once --max-new-tokens 2000 --seed 1")
    run = subprocess.Popen([*SHELL, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.read(4)
    run.stdout.close()
    err = run.stderr.read().decode()
    assert run.wait(timeout=60) == 141 and "Traceback" not in err and "Error" not in err, err


# Studies, demo, info


def tiny_experiment(name):
    from llm_scratch.experiments import PRESETS, vary

    changes = dict(
        vocab_size=300, context_length=32, d_model=32, num_layers=1, num_heads=2, d_ff=None, batch_size=8
    )
    steps = dict(steps=20, warmup=2, lr_min=None, log_every=5, eval_every=10, checkpoint_every=10)
    return vary(PRESETS["laptop"], name, corpus="tales.txt", **changes, **steps)


def test_experiment(cli, here, monkeypatch):
    from llm_scratch import experiments

    code, out, _ = cli("experiment --list")
    assert code == 0 and all(study in out for study in experiments.STUDIES)
    assert cli("experiment")[1] == out
    refused(cli("experiment learning-rat"), "learning-rat", "there are")
    for name in ("one", "two"):
        monkeypatch.setitem(experiments.PRESETS, name, tiny_experiment(name))
    monkeypatch.setitem(experiments.STUDIES, "pair", ["one", "two"])
    code, out, _ = cli("experiment pair")
    assert code == 0 and re.search(r"\| one .*done", out) and re.search(r"\| two .*done", out)
    stamp = Path("runs/one/metrics.jsonl").stat().st_mtime_ns
    table = lambda text: [line for line in text.splitlines() if line.startswith("|")]
    assert table(cli("experiment pair")[1]) == table(out)
    assert Path("runs/one/metrics.jsonl").stat().st_mtime_ns == stamp
    assert cli("experiment pair --record results/pair.json")[0] == 0
    assert [row["name"] for row in experiments.load_record("results/pair.json")["rows"]] == ["one", "two"]
    # several studies share a run; a corpus is replaced by a file
    book = experiments.vary(
        tiny_experiment("three"), "three", corpus="openwebtext", checkpoints=False, prompt="Once"
    )
    monkeypatch.setitem(experiments.PRESETS, "three", book)
    monkeypatch.setitem(experiments.STUDIES, "other", ["one", "three"])
    code, out, _ = cli("experiment pair other --texts openwebtext=tales.txt --record both")
    assert code == 0 and len(table(out)) == 8
    last = experiments.load_record("both/other.json")["rows"][1]
    assert (
        last["name"] == "three"
        and last["config"]["corpus"] == "tales.txt"
        and last["sample"].startswith("Once")
    )
    assert [row["name"] for row in experiments.load_record("both/pair.json")["rows"]] == ["one", "two"]
    refused(cli("experiment pair --texts tales.txt"), "CORPUS=FILE", "tales.txt")


def test_demo(cli, here, monkeypatch):
    from llm_scratch import experiments

    monkeypatch.setattr(experiments, "DEMO", tiny_experiment("demo"))
    code, out, err = cli("demo --text tales.txt")
    assert code == 0, err
    assert "loss" in out and len(list(Path("runs/demo").glob("*.png"))) == 1
    refused(cli("demo --text missing.txt"), "missing.txt")


def test_info_of_the_installation(cli):
    code, out, _ = cli("info")
    assert code == 0 and all(word in out for word in ("python", "torch", "gpu", "data"))


def test_debug_shows_the_traceback(here, monkeypatch):
    monkeypatch.setenv("LLM_SCRATCH_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["train-tokenizer", "missing.txt"])


def test_a_bug_is_called_a_bug(cli, monkeypatch):
    monkeypatch.setattr(COMMANDS["info"], "run", lambda self: {}["key"])
    code, _, err = cli("info")
    assert code == 1 and "bug" in err and "LLM_SCRATCH_DEBUG" in err and "Traceback" not in err


# What is not installed


def without(package, *args):
    "Run a command where `import package` fails."
    code = f"""
import sys
class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from llm_scratch.cli import main
sys.exit(main())"""
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)


def test_package_without_triton(here):
    result = without("triton", "generate", "runs/a", "--max-new-tokens", "3")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "command",
    [
        "train-tokenizer tales.txt --vocab-size 280 --out t.json",
        "encode tokenizer.json tales.txt t.npy",
        "info tokenizer.json",
        "info tokens.npy",
        "download tales --size 100000",
    ],
)
def test_text_commands_without_torch(here, command):
    result = without("torch", *shlex.split(command))
    assert result.returncode == 0, result.stderr
