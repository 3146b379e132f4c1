"""Event data: recordings in the real format of each set, binning by hand, the cache, and frames
through every script. What needs tonic is skipped where requirements-events.txt is not installed."""
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
import compare
import data
import events
import models
import prune_gradr
import prune_lottery
import prune_pq
import prune_sdsnn
import prune_structured
import prune_unstructured
from helpers import assert_same_run, one_line, stop_after, write_frames

ROOT = Path(__file__).parent.parent
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SCRIPTS = dict(prune_unstructured=prune_unstructured, prune_structured=prune_structured,
               prune_lottery=prune_lottery, prune_gradr=prune_gradr, prune_sdsnn=prune_sdsnn,
               prune_pq=prune_pq)


@pytest.fixture
def tonic():
    pytest.importorskip("tonic")
    pytest.importorskip("aedat")


# ---- writing the real formats --------------------------------------------------------------------


def stream(seed, side=34, count=60, last=3000):
    """Events as rows (x, y, t, p), in the order of time."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, last, count))
    return np.stack([*rng.integers(0, side, (2, count)), t, rng.integers(0, 2, count)], 1)


def write_bin(path, rows):
    """N-MNIST: 5 bytes an event: x, y, the polarity and 23 bits of the time in microseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(struct.pack(">BBBH", x, y, p << 7 | t >> 16, t & 0xFFFF)
                              for x, y, t, p in rows.tolist()))


def write_gesture(path, rows):
    """DVS-Gesture as tonic has it: an array of rows (x, y, p, t), t in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, rows[:, [0, 1, 3, 2]])


AEDAT4_EVENT = np.dtype(dict(names=["t", "x", "y", "on"], formats=["<i8", "<i2", "<i2", "?"],
                             offsets=[0, 8, 10, 12], itemsize=16))
AEDAT4_INFO = """<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/">
<node name="0" path="/mainloop/Recorder/outInfo/0/">
<attr key="compression" type="string">NONE</attr>
<attr key="typeIdentifier" type="string">EVTS</attr>
<node name="info" path="/mainloop/Recorder/outInfo/0/info/"><attr key="sizeX" type="int">128</attr>
<attr key="sizeY" type="int">128</attr></node></node></node></dv>"""


def flatbuffer(identifier, field, payload, align):
    """A size-prefixed flatbuffer: one table, of which only field number `field` is there, which is
    a vector or a string: its length, then what follows, aligned."""
    vtable = struct.pack("<HH", 4 + 2 * field, 8) + b"\0\0" * (field - 1) + struct.pack("<H", 4)
    vtable += b"\0" * (-len(vtable) % 4)
    table = 8 + len(vtable)
    start = table + 8 + -(table + 16) % align
    head = struct.pack("<I4s", table, identifier) + vtable + struct.pack("<iI", table - 8,
                                                                         start - table - 4)
    out = head.ljust(start, b"\0") + payload
    return struct.pack("<I", len(out)) + out


def write_aedat4(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = np.zeros(len(rows), AEDAT4_EVENT)
    for name, column in zip(("x", "y", "t", "on"), rows.T):
        packed[name] = column
    header = flatbuffer(b"IOHE", 3, struct.pack("<I", len(AEDAT4_INFO)) + AEDAT4_INFO.encode()
                        + b"\0", 4)
    packet = flatbuffer(b"EVTS", 1, struct.pack("<I", len(packed)) + packed.tobytes(), 8)
    path.write_bytes(b"#!AER-DAT4.0\r\n" + header + struct.pack("<II", 0, len(packet)) + packet)


def make_n_mnist(folder, train=2, test=1):
    for part, count in (("Train", train), ("Test", test)):
        for label in range(10):
            for i in range(count):
                write_bin(folder / "NMNIST" / part / str(label) / f"{i:05}.bin",
                          stream(100 * label + i + 1000 * (part == "Test")))


def make_gesture(folder, users=2):
    for part, first in (("ibmGestureTrain", 1), ("ibmGestureTest", 24)):
        for user in range(first, first + users):
            for label in range(11):
                write_gesture(folder / "DVSGesture" / part / f"user{user:02}_led" / f"{label}.npy",
                              stream(100 * user + label, 128))


def make_cifar10_dvs(folder, count=10):
    for label, name in enumerate(CLASSES):
        for i in range(count):
            write_aedat4(folder / "CIFAR10DVS" / name / f"cifar10_{name}_{i}.aedat4",
                         stream(100 * label + i, 128))


MAKE = {"n-mnist": make_n_mnist, "dvs-gesture": make_gesture, "cifar10-dvs": make_cifar10_dvs}


def message(kind, name="n-mnist", time_steps=4):
    with pytest.raises(kind) as error:
        events.load(name, "data", time_steps)
    text = str(error.value)
    assert "\n" not in text and "expected" in text, text
    return text


# ---- reading -------------------------------------------------------------------------------------


def structured(rows):
    out = np.zeros(len(rows), [("x", int), ("y", int), ("t", int), ("p", int)])
    for name, column in zip("xytp", np.array(rows).T):
        out[name] = column
    return out


TEN = structured([(1, 1, 100, 0), (1, 1, 110, 1), (2, 1, 129, 0), (32, 32, 130, 1),
                  (0, 0, 140, 1), (1, 1, 159, 0), (1, 1, 160, 0), (1, 1, 170, 0),
                  (33, 5, 180, 0), (5, 5, 190, 0)])


def test_ten_events_by_hand(tonic):
    """Bins of time: (190 - 100) // 3 = 30 us: 100-129, 130-159, 160-189; 190 is in none."""
    got = events.frames(events.KINDS["n-mnist"], TEN, 3)  # the middle 32x32: (1, 1) is (0, 0)
    want = np.zeros((3, 2, 32, 32), np.uint8)
    want[0, 0, 0, 0], want[0, 1, 0, 0], want[0, 0, 0, 1] = 1, 1, 1
    want[1, 1, 31, 31], want[1, 0, 0, 0] = 1, 1  # (0, 0) and (33, 5) are outside of the middle
    want[2, 0, 0, 0] = 2
    assert got.dtype == np.uint8 and np.array_equal(got, want)

    # bins of events: 10 // 3 = 3 each, the last one is in none; coordinates x * 48 // 128
    kind = events.KINDS["cifar10-dvs"]
    spread = TEN.copy()
    spread["x"] = [0, 2, 3, 127, 0, 0, 5, 6, 8, 64]
    spread["y"] = 0
    got = events.frames(kind, spread, 3)
    want = np.zeros((3, 2, 48, 48), np.uint8)
    want[0, 0, 0, 0], want[0, 1, 0, 0], want[0, 0, 0, 1] = 1, 1, 1
    want[1, 1, 0, 47], want[1, 1, 0, 0], want[1, 0, 0, 0] = 1, 1, 1
    want[2, 0, 0, 1], want[2, 0, 0, 2], want[2, 0, 0, 3] = 1, 1, 1
    assert np.array_equal(got, want)


def test_a_count_beyond_a_byte_is_its_largest(tonic):
    many = structured([(5, 5, 0, 1)] * 300 + [(9, 9, 10, 0)])
    got = events.frames(events.KINDS["dvs-gesture"], many, 1)
    assert got[0, 1, 5, 5] == 255 and got.sum() == 255


@pytest.mark.parametrize("name", events.KINDS)
def test_a_set_in_its_format(name, tonic, capsys, monkeypatch):
    MAKE[name](Path("data"))
    kind = events.KINDS[name]
    x_train, y_train, x_test, y_test = events.load(name, "data", 4)
    assert "holds" in capsys.readouterr().out  # not the whole set, and says so
    classes = 11 if name == "dvs-gesture" else 10
    n_train = {"n-mnist": 20, "dvs-gesture": 22, "cifar10-dvs": 90}[name]
    assert x_train.shape == (n_train, 4, 2, kind.side, kind.side) and x_train.dtype == np.uint8
    assert isinstance(x_train, np.memmap) and isinstance(x_test, np.memmap)  # not in memory
    assert sorted(set(y_train)) == list(range(classes)) == sorted(set(y_test))

    # each recording is where it belongs, with its own events
    if name == "n-mnist":
        rows, index = stream(301), 7  # the second 3 of the training set
        assert y_train[index] == 3
    elif name == "dvs-gesture":
        rows, index = stream(205, 128), 16  # user02, gesture 5; the file has milliseconds
        rows[:, 2] *= 1000
        assert y_train[index] == 5
    else:
        rows, index = stream(308, 128), 3 * 9 + 8  # the cat with number 8; 9 is for testing
        assert np.array_equal(x_test[3], events.frames(kind, structured(stream(309, 128)), 4))
    assert np.array_equal(x_train[index], events.frames(kind, structured(rows), 4))

    # nothing is read twice, and another T is another cache
    monkeypatch.setattr(events, "read", lambda *_: pytest.fail("read again"))
    again = events.load(name, "data", 4)
    assert all(np.array_equal(a, b) for a, b in zip(again, (x_train, y_train, x_test, y_test)))
    assert [path.name for path in Path("data").glob(f"{name}*")] == [f"{name}-T4"]


def test_cifar10_dvs_is_split_by_number_and_not_by_letter(tonic):
    make_cifar10_dvs(Path("data"), count=11)  # by letters 10 would stand between 1 and 2
    _, y_train, x_test, y_test = events.load("cifar10-dvs", "data", 2)
    assert len(y_train) == 90 and len(y_test) == 20
    kind = events.KINDS["cifar10-dvs"]
    assert np.array_equal(x_test[1], events.frames(kind, structured(stream(10, 128)), 2))


def test_events_are_put_in_the_order_of_time(tonic):
    make_n_mnist(Path("data"))
    path = Path("data/NMNIST/Train/0/00000.bin")
    rows = stream(0)
    ordered = events.load("n-mnist", "data", 4)[0][0].copy()
    for cache in Path("data").glob("n-mnist-T4"):
        cache.rename("elsewhere")
    write_bin(path, rows[np.random.default_rng(1).permutation(len(rows))])
    assert np.array_equal(events.load("n-mnist", "data", 4)[0][0], ordered)


def cut_short(path, count):
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize("name, file, text", [
    ("n-mnist", "NMNIST/Train/4/00001.bin", "cut short"),
    ("dvs-gesture", "DVSGesture/ibmGestureTest/user24_led/3.npy", "cannot be read"),
    ("cifar10-dvs", "CIFAR10DVS/cat/cifar10_cat_3.aedat4", "cannot be read")])
def test_truncated_recordings(name, file, text, tonic):
    MAKE[name](Path("data"))
    for count in (1, 3):  # neither leaves a whole number of events
        cut_short(Path("data", file), count)
        found = message(ValueError, name)
        assert text in found and file in found and "a whole recording" in found
    assert not list(Path("data").glob(f"{name}-T*"))  # no part of a cache is left behind


@pytest.mark.parametrize("name, file, write, side", [
    ("n-mnist", "NMNIST/Train/4/00001.bin", write_bin, 34),
    ("dvs-gesture", "DVSGesture/ibmGestureTrain/user01_led/3.npy", write_gesture, 128),
    ("cifar10-dvs", "CIFAR10DVS/cat/cifar10_cat_3.aedat4", write_aedat4, 128)])
def test_events_outside_of_the_sensor(name, file, write, side, tonic):
    MAKE[name](Path("data"))
    for axis in (0, 1):
        rows = stream(0, side)
        rows[7, axis] = side
        write(Path("data", file), rows)
        assert f"has an event at {side}, expected coordinates from 0 to {side - 1}" in message(
            ValueError, name)
    if name == "dvs-gesture":
        rows[7, 1] = -1
        write(Path("data", file), rows)
        assert "has an event at -1" in message(ValueError, name)
    write(Path("data", file), stream(0, side)[:0])
    assert "no event" in message(ValueError, name) or name == "cifar10-dvs"


@pytest.mark.parametrize("name", events.KINDS)
def test_a_wrong_directory(name, tonic, monkeypatch):
    import tonic as module

    def offline(self):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(module.Dataset, "download", offline)
    found = message(FileNotFoundError, name)
    assert "could not be downloaded (Network is unreachable)" in found
    assert f"Put them under data/{events.KINDS[name].reader}, or pass --data-dir" in found
    folder = Path("data", events.KINDS[name].reader, events.KINDS[name].folders[0])
    folder.mkdir(parents=True)
    assert "holds no recordings" in message(FileNotFoundError, name)
    # recordings in a folder that names no class or user
    file = {"n-mnist": "0.bin", "dvs-gesture": "0.npy", "cifar10-dvs": "0.aedat4"}[name]
    (folder / "nobody").mkdir()
    (folder / "nobody" / file).write_bytes(b"")
    assert "cannot be read" in message(FileNotFoundError, name)


def test_a_damaged_cache():
    write_frames("n-mnist", 4)
    cut_short(Path("data/n-mnist-T4/x_train.npy"), 100)
    assert "data/n-mnist-T4 is damaged" in message(ValueError)
    np.save("data/n-mnist-T4/x_train.npy", np.zeros((20, 3, 2, 32, 32), np.uint8))
    assert "frames of uint8 [20, 3, 2, 32, 32]" in message(ValueError)


def test_no_room_for_the_cache(tonic, monkeypatch):
    make_n_mnist(Path("data"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    assert "could not be written (No space left on device)" in message(ValueError)
    assert not list(Path("data").glob("n-mnist-*"))


def test_without_tonic(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tonic", None)
    monkeypatch.setitem(sys.modules, "tonic.datasets", None)
    with pytest.raises(SystemExit) as stop:
        prune_unstructured.main(["--dataset", "n-mnist"])
    assert stop.value.code == 2
    assert "pip install -r requirements-events.txt" in one_line(capsys)
    assert not Path("runs").exists()
    write_frames("n-mnist", 4)  # frames that are there already need no tonic
    assert data.load("n-mnist", "data", time_steps=4).x_train.shape == (20, 4, 2, 32, 32)


# ---- frames as batches ---------------------------------------------------------------------------


def test_a_data_set_of_frames():
    write_frames("n-mnist", 4)
    images = data.load("n-mnist", "data", train_limit=10, at_most=5, time_steps=4)
    assert images.x_train.shape == (5, 4, 2, 32, 32) and images.num_classes == 10
    assert (images.mean, images.std) == ([0.0, 0.0], [1.0, 1.0])  # counts stay counts
    batches = list(images.inputs("test", 2))
    assert [x.shape for x in batches] == [(4, 2, 2, 32, 32)] * 2 + [(4, 1, 2, 32, 32)]
    assert torch.equal(batches[1][:, 0], images.x_test[2])
    assert [len(y) for _, y in images.pairs("train", 3)] == [3, 2]


@pytest.mark.parametrize("more", [{}, dict(pad=3, flip=True), dict(cutout=9, rotate=20.0, pad=2)])
def test_all_steps_are_augmented_alike(more):
    """A batch of frames is that of images whose channels are all frames of a recording."""
    frames = torch.randint(0, 256, (7, 3, 2, 12, 12), dtype=torch.uint8)
    labels = torch.arange(7)
    got = list(data.batches(frames, labels, 4, 1, 2, **more))
    want = list(data.batches(frames.flatten(1, 2), labels, 4, 1, 2, **more))
    assert [x.shape for x, _ in got] == [(3, 4, 2, 12, 12), (3, 3, 2, 12, 12)]
    for (x, y), (flat, same) in zip(got, want):
        assert torch.equal(x.transpose(0, 1).flatten(1, 2), flat) and torch.equal(y, same)
    still = torch.randint(0, 256, (7, 1, 2, 12, 12), dtype=torch.uint8).expand(-1, 3, -1, -1, -1)
    for x, _ in data.batches(still.contiguous(), labels, 4, 1, 2, **more):
        assert torch.equal(x, x[:1].expand_as(x))  # what stands still, stands still


def test_turning_by_hand():
    image = torch.arange(9, dtype=torch.uint8).view(1, 3, 3, 1)
    quarter = data._turn(image, torch.tensor([torch.pi / 2]))[0, ..., 0]
    assert torch.equal(quarter, torch.rot90(image[0, ..., 0], 1))
    assert torch.equal(data._turn(image, torch.zeros(1)), image)
    eighth = data._turn(torch.full((1, 9, 9, 1), 7, dtype=torch.uint8),
                        torch.tensor([torch.pi / 4]))[0, ..., 0]
    assert eighth[0, 0] == 0 and eighth[4, 4] == 7 and eighth[0, 4] == 7  # black from outside
    angles = [x for x, _ in data.batches(image.permute(0, 3, 1, 2).expand(64, -1, -1, -1),
                                         torch.zeros(64), 64, 0, 0, rotate=10.0)]
    assert torch.equal(angles[0], image.permute(0, 3, 1, 2).expand(64, -1, -1, -1))  # too small
    wide = [x for x, _ in data.batches(image.permute(0, 3, 1, 2).expand(64, -1, -1, -1),
                                       torch.zeros(64), 64, 0, 0, rotate=90.0)]
    assert len({tuple(x.flatten().tolist()) for x in wide[0]}) > 2


class Recordings:
    """What tonic's data sets have: paths, and (events, label) by index."""

    def __init__(self, rows):
        self.data, self.rows = ["somewhere.npy"], rows

    def __getitem__(self, _):
        return structured(self.rows), 0


@pytest.mark.parametrize("name, rows, says", [
    ("n-mnist", [(1, 1, t, 2) for t in range(50)], "a polarity of 2 to 2, expected 0 and 1"),
    ("n-mnist", [(1, 1, t, -1) for t in range(50)], "a polarity of -1 to -1, expected 0 and 1"),
    ("n-mnist", [(1, 1, t % 4, 1) for t in range(50)], "3 microseconds, expected at least one"),
    ("cifar10-dvs", [(1, 1, 1000 * t, 1) for t in range(3)], "3 events, expected at least one")])
def test_recordings_that_would_make_empty_or_wrong_frames(name, rows, says):
    with pytest.raises(ValueError, match=f"somewhere.npy has {says}"):
        events.bin_all(events.KINDS[name], [(Recordings(rows), 0, 0)], 4, Path("x.npy"))


def test_part_of_a_set_says_so_each_time(capsys):
    write_frames("n-mnist", 2)
    for _ in range(2):
        events.load("n-mnist", "data", 2)
        assert "holds 30 recordings, all of n-mnist are 70,000" in capsys.readouterr().out


def test_compare_loads_frames(monkeypatch):
    write_frames("n-mnist", 20)
    monkeypatch.setattr(compare, "run_all", lambda jobs, at_a_time: None)
    with pytest.raises(SystemExit) as stop:
        compare.main(["--dataset", "n-mnist"])
    assert stop.value.code == 2  # nothing ran, and there is no table


def test_one_frame_is_one_step():
    net = models.build("small", 3, 2, 32, 5, [2, 2, 2, 2], "events").eval()
    for steps in (1, 2, 5, 7):
        assert net(torch.ones(steps, 4, 2, 32, 32)).shape == (min(steps, 5), 4, 3)


# ---- through the scripts -------------------------------------------------------------------------


def smoke(script, *given):
    return SCRIPTS[script].main([*given, "--smoke"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_frames_through_every_script(script, capsys):
    write_frames("n-mnist", 4, each=(8, 2))
    more = ["--method", "et"] if script == "prune_lottery" else []
    summary = smoke(script, "--dataset", "n-mnist", "--time-steps", "4", "--run-dir", "r", *more,
                    *(["--model", "small"] if script == "prune_sdsnn" else []))
    assert summary["time_steps"] == 4 and summary["sops"] > 0
    assert summary["macs_first_once"] == summary["macs_every_step"] == 4 * summary["macs"]
    # the first layer reads events: no multiplications, all energy is of synaptic operations
    assert summary["energy_mj"] == pytest.approx(0.9e-9 * summary["sops"])
    net = models.load("r/model.pt")
    images = data.load("n-mnist", "data", time_steps=4)
    right = torch.cat([net(x).sum(0).argmax(1) == y for x, y in images.pairs("test", 16)])
    assert right.double().mean().item() == pytest.approx(summary["test_accuracy"])
    with pytest.raises(ValueError, match="time axis first"):
        net(images.x_test[:, 0])


@pytest.mark.parametrize("script, name, model", [
    ("prune_sdsnn", "n-mnist", "sdsnn-small"), ("prune_sdsnn", "dvs-gesture", "sdsnn-small"),
    ("prune_pq", "cifar10-dvs", "vggsnn")])
def test_the_presets(script, name, model, tonic):
    """The papers' own, from recordings; narrow, and with fewer of the 64 frames."""
    MAKE[name](Path("data"), *[5] * (name == "cifar10-dvs"))
    more = {"dvs-gesture": ["--time-steps", "3"], "cifar10-dvs": ["--batch-size", "8"]}
    summary = smoke(script, "--dataset", name, "--run-dir", "r", "--width", "0.05",
                    *more.get(name, []))
    assert summary["model"] == model
    assert summary["time_steps"] == {"n-mnist": 20, "dvs-gesture": 3, "cifar10-dvs": 10}[name]
    config = json.loads(Path("r/config.json").read_text())
    assert config["encoding"] == "events"
    assert Path("data", f"{name}-T{summary['time_steps']}").is_dir()


def test_a_preset_from_the_command_line(tonic):
    make_n_mnist(Path("data"))
    done = subprocess.run([sys.executable, ROOT / "prune_sdsnn.py", "--dataset", "n-mnist",
                           "--smoke", "--width", "0.1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model sdsnn-small, T = 20" in done.stdout and "20 train, 10 test" in done.stdout


@pytest.mark.parametrize("script", ["prune_unstructured", "prune_structured"])
@pytest.mark.parametrize("name", ["dvs-gesture", "cifar10-dvs"])
def test_both_algorithms_on_the_other_sets(name, script):
    """At their own size, with few frames and channels; n-mnist goes through all scripts above."""
    write_frames(name, 2, 11 if name == "dvs-gesture" else 10)
    summary = smoke(script, "--dataset", name, "--time-steps", "2", "--width", "0.05",
                    "--batch-size", "5", "--run-dir", "r")
    assert (summary["dataset"], summary["time_steps"]) == (name, 2) and summary["sops"] > 0


def test_channels_of_frames_are_removed(capsys):
    write_frames("cifar10-dvs", 3, each=(2, 1))
    summary = smoke("prune_structured", "--dataset", "cifar10-dvs", "--time-steps", "3",
                    "--run-dir", "r", "--width", "0.05", "--batch-size", "5")
    record = json.loads(Path("r/channels.json").read_text())
    assert record["spikes_that_differ"] == 0 and record["logits_differ_by"] < 1e-4
    assert summary["macs"] < summary["macs_dense"] and summary["model"] == "vggsnn"


def test_a_stopped_run_of_frames_goes_on_bit_by_bit(monkeypatch):
    write_frames("n-mnist", 3, each=(4, 1))
    given = ["--dataset", "n-mnist", "--time-steps", "3", "--width", "0.25", "--batch-size", "8",
             "--epochs-prune", "2", "--epochs-finetune", "1", "--interval", "3"]
    monkeypatch.setattr(sys, "argv", ["prune_unstructured.py"])
    prune_unstructured.main([*given, "--run-dir", "whole"])
    stop_after(7, monkeypatch, prune_unstructured.main, [*given, "--run-dir", "stopped"])
    prune_unstructured.main(["--resume", "--run-dir", "stopped"])
    assert_same_run("whole", "stopped")


def test_figures_of_frames(capsys):
    write_frames("n-mnist", 2, each=(4, 1))
    given = ["--dataset", "n-mnist", "--time-steps", "2", "--width", "0.1", "--batch-size", "8"]
    smoke("prune_unstructured", *given, "--run-dir", "runs/a")
    smoke("prune_unstructured", *given, "--regen", "0", "--run-dir", "runs/b")
    smoke("prune_unstructured", *given, "--sparsity", "0", "--run-dir", "runs/c")
    drawn = analyze.main([])
    assert {"variance", "entropy", "activity", "criticality", "layers"} <= set(drawn)


def test_an_encoding_that_does_not_fit(capsys):
    write_frames("n-mnist", 3)
    for given, text in ((["--dataset", "n-mnist", "--time-steps", "3", "--encoding", "rate"],
                         "n-mnist is made of events"),
                        (["--encoding", "events"], "fashion-mini is made of images")):
        with pytest.raises(SystemExit) as stop:
            prune_unstructured.main(given)
        assert stop.value.code == 2 and text in one_line(capsys)
