"""What the tests share. They run on one thread: their networks are tiny, and a busy machine then
slows them far less."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; scripts that tests start inherit it

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import models
import training

TIMES = {"seconds", "peak_memory_mib", "speedup_batch1", "speedup_batch32"}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(folder, name):
    return [json.loads(line) for line in Path(folder, f"{name}.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    """All that two runs left agrees bit by bit; times, memory and paths apart."""
    one, other = Path(one), Path(other)
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    a, b = (models.read(folder / "model.pt") for folder in (one, other))
    for part in ("state_dict", "masks"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), name
    for row, same in zip(lines(one, "metrics"), lines(other, "metrics"), strict=True):
        assert {k: row[k] for k in row.keys() - TIMES} == {k: same[k] for k in same.keys() - TIMES}
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (one, other))
    assert {k: a[k] for k in a.keys() - TIMES} == {k: b[k] for k in b.keys() - TIMES}
    for name in ("updates.jsonl", "channels.json"):
        if (one / name).exists():
            assert (one / name).read_text() == (other / name).read_text()
    if (one / "gamma.npz").exists():
        a, b = np.load(one / "gamma.npz"), np.load(other / "gamma.npz")
        assert a.files == b.files and all(np.array_equal(a[name], b[name]) for name in a.files)


def one_line(capsys):
    """Return what stands on stderr: one line, and no traceback."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def stop_after(iteration, monkeypatch, run, *given):
    """Run until an iteration, and get SIGTERM there."""
    add = training.Meter.add

    def stop(self, loss, logits, labels, at=0):
        add(self, loss, logits, labels, at)
        if at == iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.Meter, "add", stop)
    with pytest.raises(SystemExit) as stopped:
        run(*given)
    assert stopped.value.code == 143
    monkeypatch.setattr(training.Meter, "add", add)
