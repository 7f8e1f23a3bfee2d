"What the notebook 00_data cannot check of itself: kills, full disks, other processes, the hub."

import errno
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import file_download

from llm_scratch import data
from llm_scratch.data import END, TokenWriter, corpus, documents, load_tokens, story, tales

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_SCRATCH_DATA", str(tmp_path / "data"))


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def python(code, **environment):
    "Runs code in a fresh interpreter."
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---------------------------------------------------------------- tales


def test_same_bytes_in_another_process_whatever_the_hash_seed():
    code = """
        import hashlib
        from llm_scratch.data import tales
        print(hashlib.sha256("".join(tales(300_000, seed=7)).encode()).hexdigest())"""
    here = hashlib.sha256("".join(tales(300_000, seed=7)).encode()).hexdigest()
    for hash_seed in ("0", "12345"):
        assert python(code, PYTHONHASHSEED=hash_seed).stdout.strip() == here


def test_committed_sample_is_what_the_generator_tells():
    sample = (ROOT / "data" / "tales_sample.txt").read_bytes()
    assert sample == "".join(f"{text}\n{END}\n" for text in tales(1_000_000)).encode()


def test_draws_only_what_python_promises_to_keep():
    "Only random() of a seeded generator is stable across versions: nothing else may be called."

    class OnlyRandom:
        def __init__(self, seed):
            self.random = Random(seed).random

    expected = story(3, 4)
    original, data.Random = data.Random, OnlyRandom
    try:
        assert story(3, 4) == expected
    finally:
        data.Random = original


def test_speed():
    "Processor time, so that a busy machine does not matter much; measured 12 to 40 MB/s."
    sum(map(len, tales(100_000)))
    rates = []
    for seed in range(5):
        start = time.process_time()
        size = sum(map(len, tales(1_000_000, seed=seed)))
        rates.append(size / 1e6 / (time.process_time() - start))
    assert max(rates) > 5, rates


def test_sizes(tmp_path):
    for size in (100_000, 3_000_000):
        made = corpus("tales", size=size)
        both = made.train.stat().st_size + made.valid.stat().st_size
        assert size <= both < size + 5000
        assert 0.03 < made.valid.stat().st_size / both < 0.07
    with pytest.raises(ValueError, match="10,000"):
        corpus("tales", size=10)


def test_imports_no_torch():
    assert python("import sys, llm_scratch.data; assert 'torch' not in sys.modules").returncode == 0


# ---------------------------------------------------------------- kill -9 and full disks


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
@pytest.mark.parametrize(
    "code",
    [
        """
        with TokenWriter(folder / "ids.npy", 1000) as writer:
            print("ready", flush=True)
            while True:
                writer.append(range(1000))""",
        """
        with replacing(folder / "ids.npy") as temporary, open(temporary, "wb") as file:
            print("ready", flush=True)
            while file.tell() < 1 << 30:
                file.write(bytes(1000))""",
        """
        print("ready", flush=True)
        corpus("tales", size=1_000_000_000)""",
    ],
    ids=["tokens", "file", "corpus"],
)
def test_kill_leaves_no_half_file(tmp_path, code, delay):
    head = "from pathlib import Path; from llm_scratch.data import *; from llm_scratch.data import TokenWriter, replacing\n"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{head}folder = Path({str(tmp_path)!r})\n" + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout.readline() == b"ready\n"
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    left = files(tmp_path)
    assert all(name.startswith(".") and ".tmp" in name for name in left), left


def test_leftovers_of_a_kill_are_removed_after_a_day(tmp_path):
    old, new = tmp_path / ".ids.01234567.tmp.npy", tmp_path / ".ids.89abcdef.tmp.npy"
    for left in (old, new):
        left.touch()
    os.utime(old, (0, 0))
    with TokenWriter(tmp_path / "ids.npy", 10) as writer:
        writer.append([1])
    assert files(tmp_path) == [new.name, "ids.npy"]  # the new one may belong to a running process


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
def test_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    "A limit on the size of files stands in for a full disk: the write itself fails, in the middle."
    keep = tmp_path / "ids.npy"
    keep.write_bytes(b"old")
    code = """
        import resource, sys, os
        from pathlib import Path
        from llm_scratch.data import TokenWriter, corpus, replacing
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        def tokens():
            with TokenWriter(folder / "ids.npy", 1000) as writer:
                for _ in range(1000):
                    writer.append(range(1000))
        def text():
            corpus("tales", size=1_000_000)
        for write in (tokens, text):
            try:
                write()
            except OSError as error:
                print(error.strerror)"""
    done = python(f"from pathlib import Path\nfolder = Path({str(tmp_path)!r})\n" + textwrap.dedent(code))
    assert done.stdout.splitlines() == ["File too large"] * 2, done.stderr
    assert files(tmp_path) == ["ids.npy"] and keep.read_bytes() == b"old"


def test_no_space(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), TokenWriter(tmp_path / "ids.npy", 10) as writer:
        writer.append([1, 2, 3])
    assert files(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_full_tmpfs(tmp_path):
    "A real full disk: an ordinary error, and nothing left behind."
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("no mounting here")
    try:
        with pytest.raises(OSError) as caught, TokenWriter(disk / "ids.npy", 1000) as writer:
            for _ in range(1000):
                writer.append(range(1000))
        assert caught.value.errno == errno.ENOSPC and files(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_writer_without_fallocate(tmp_path, monkeypatch):
    "macOS and Windows have no posix_fallocate: zeros are written instead."
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with TokenWriter(tmp_path / "ids.npy", 100_000) as writer:
        for start in range(0, 50_000, 1000):
            writer.append(np.arange(start, start + 1000))
    assert np.array_equal(load_tokens(tmp_path / "ids.npy"), np.arange(50_000))


def test_refused_ids_add_nothing(tmp_path):
    with TokenWriter(tmp_path / "ids.npy", 10) as writer:
        writer.append([1, 2])
        for bad in ([3, -1], [3, 10], [[1]], ["1"], [1.0]):
            with pytest.raises(ValueError):
                writer.append(bad)
        writer.append(np.array([9], np.uint64))
    assert load_tokens(tmp_path / "ids.npy").tolist() == [1, 2, 9]
    with pytest.raises(ValueError, match="1-D"):
        np.save(tmp_path / "square.npy", np.zeros((2, 2), int))
        load_tokens(tmp_path / "square.npy")
    with pytest.raises(ValueError, match="vocab_size"):
        TokenWriter(tmp_path / "ids.npy", 0)


# ---------------------------------------------------------------- a reader's own text


def parts(made, mark=END):
    return [[text.strip() for _, text in documents(path, mark)] for path in (made.train, made.valid)]


@pytest.mark.parametrize(
    "mark, said", [("\n\n", "empty lines"), ("\r\n\r\n", "empty lines"), ("\n", "lines"), (" ", "words")]
)
def test_text_without_separator(tmp_path, caplog, mark, said):
    path = tmp_path / "plain.txt"
    path.write_bytes(mark.join(f"piece{k:03}" for k in range(200)).encode())
    train, valid = parts(corpus(path), mark)
    assert len(train) == 190 and len(valid) == 10 and not set(train) & set(valid)
    assert f"no {END}" in caplog.text and said in caplog.text


def test_packed_text_and_damaged_pack(tmp_path):
    path = tmp_path / "text.txt.gz"
    whole = gzip.compress("".join(f"text {k:02}{END}" for k in range(100)).encode())
    path.write_bytes(whole)
    assert [len(part) for part in parts(corpus(path))] == [95, 5]
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="damaged"):
        corpus(path)


def test_bad_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        corpus(tmp_path / "nowhere.txt")
    with pytest.raises(IsADirectoryError, match="folder"):
        corpus(tmp_path)
    for content, said in (
        (b"", "empty"),
        (b"ab\xffcd", "byte 2"),
        (b"one", "two different"),
        (b" \n ", "two different"),
    ):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            corpus(tmp_path / "bad.txt")
    assert files(tmp_path) == ["bad.txt"]  # nothing half-written


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "large.txt"
    with open(path, "w") as file:
        for k in range(60_000):
            file.write(f"{k} " + "some words " * 250 + END)
    code = f"""
        import resource
        from pathlib import Path
        from llm_scratch.data import corpus
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        corpus(Path({str(path)!r}))
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    assert path.stat().st_size > 160e6
    assert int(python(code).stdout) < 40  # MB on Linux (less on macOS, which counts in bytes)


# ---------------------------------------------------------------- the hub


class Hub:
    "Stands for huggingface_hub: serves one text and can be cut off in the middle."

    def __init__(self, monkeypatch, content, cut=None):
        self.content, self.cut, self.asked = content, cut, []
        self.facts = SimpleNamespace(
            size=len(content), etag=hashlib.sha256(content).hexdigest(), location="there"
        )
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: self.facts)
        monkeypatch.setattr(file_download, "http_get", self.get)

    def get(self, url, temp_file, resume_size, expected_size, displayed_filename):
        assert url == "there" and expected_size == self.facts.size
        self.asked.append(resume_size)
        temp_file.write(self.content[resume_size : self.cut])
        if self.cut:
            self.cut = None
            raise ConnectionError("the line went dead")


TEXT = END.join(f"\nstory {k}\n" for k in range(1000)).encode()


def test_download_goes_on_and_is_verified(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    hub = Hub(monkeypatch, TEXT, cut=500)
    with pytest.raises(FileNotFoundError, match="the line went dead.*goes on"):
        data.fetch("some/where", "text.txt", folder)
    assert not (folder / "text.txt").exists()
    assert data.fetch("some/where", "text.txt", folder).read_bytes() == TEXT
    assert hub.asked == [0, 500]  # no byte twice
    hub.content = b"other"
    assert data.fetch("some/where", "text.txt", folder).read_bytes() == TEXT and len(hub.asked) == 2  # found


@pytest.mark.parametrize(
    "damage, said", [(TEXT[:-1], f"{len(TEXT) - 1} bytes"), (TEXT[:-1] + b"!", "SHA-256")]
)
def test_damaged_download_is_refused(tmp_path, monkeypatch, damage, said):
    hub = Hub(monkeypatch, TEXT)
    hub.content = damage
    with pytest.raises(ValueError, match=said):
        data.fetch("some/where", "text.txt", tmp_path)
    assert files(tmp_path) == []


def test_packed_download_is_unpacked(tmp_path, monkeypatch):
    Hub(monkeypatch, gzip.compress(TEXT))
    assert data.fetch("some/where", "text.txt.gz", tmp_path).read_bytes() == TEXT
    assert files(tmp_path) == ["text.txt", "text.txt.gz"]


def test_full_disk_is_not_called_offline(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    Hub(monkeypatch, TEXT)
    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(OSError, match="No space left"):
        data.fetch("some/where", "text.txt", tmp_path)


@pytest.mark.parametrize("name", ["tinystories", "openwebtext"])
def test_offline_says_what_to_do(name, monkeypatch):
    def offline(url):
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    with pytest.raises(FileNotFoundError) as caught:
        corpus(name)
    said, (repo, file, _) = str(caught.value), data.HUB[name]
    assert "\n" not in said
    assert file in said and f"https://huggingface.co/datasets/{repo}/resolve/main/{file}" in said
    assert str(data.data_dir() / name / file) in said and "Name or service not known" in said


def test_public_corpus_shares_no_document(monkeypatch):
    folder = data.data_dir() / "openwebtext"
    folder.mkdir(parents=True)
    (folder / "owt_train.txt.gz").write_bytes(gzip.compress(f"one\n{END}\ntwo\n{END}\nthree\n".encode()))
    (folder / "owt_valid.txt.gz").write_bytes(gzip.compress(f"four\n{END}two{END}\nfive".encode()))
    assert parts(corpus("openwebtext")) == [[b"one", b"two", b"three"], [b"four", b"five"]]
    assert corpus("openwebtext") == corpus("openwebtext")


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_killed_download_goes_on(tmp_path):
    "The real huggingface_hub against a small server: killed with -9 in the middle, it asks for the rest only."
    content, asked, stalled = os.urandom(25_000_000), [], threading.Event()
    tag = hashlib.sha256(content).hexdigest()

    class Server(BaseHTTPRequestHandler):
        def respond(self, body):
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if body:
                asked.append(start)
                first = len(asked) == 1
                self.wfile.write(content[start : 15_000_000 if first else None])
                if first:
                    stalled.wait(60)

        def do_HEAD(self):
            self.respond(body=False)

        def do_GET(self):
            if "/resolve/" in self.path:
                self.respond(body=True)
            else:  # the client asks for other things, too
                self.send_error(404)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = dict(
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1"
    )
    code = f"""if True:
        from pathlib import Path
        from llm_scratch.data import fetch
        fetch("some/where", "text.bin", Path({str(tmp_path)!r}))"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **where}, stderr=subprocess.DEVNULL
    )
    got = lambda: sum(path.stat().st_size for path in tmp_path.glob(".*.part"))
    deadline = time.monotonic() + 60
    while got() < 10_000_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.wait()
    stalled.set()
    had = got()
    assert had >= 10_000_000 and not (tmp_path / "text.bin").exists()
    done = python(code, **where)
    server.shutdown()
    assert (tmp_path / "text.bin").read_bytes() == content, done.stderr
    assert asked == [0, had] and files(tmp_path) == ["text.bin"]
