"""Event data: recordings in the real format of each set, binning by hand, the cache, and frames
through every script. What needs tonic is skipped where requirements-events.txt is not installed."""
import errno
import json
import os
import shutil
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
import prune_ndsnn
import prune_pq
import prune_sdsnn
import prune_structured
import prune_unstructured
import sources
from helpers import assert_same_run, one_line, stop_after, write_frames

ROOT = Path(__file__).parent.parent
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SCRIPTS = dict(prune_unstructured=prune_unstructured, prune_structured=prune_structured,
               prune_lottery=prune_lottery, prune_gradr=prune_gradr, prune_sdsnn=prune_sdsnn,
               prune_pq=prune_pq, prune_ndsnn=prune_ndsnn)


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
    """By time: (190 - 100) // 3 = 30 us: 100-129, 130-159, 160-189; 190 is in none."""
    # the middle 32x32: (1, 1) is (0, 0)
    got = events.frames(events.KINDS["n-mnist"], TEN, 3, "time")
    want = np.zeros((3, 2, 32, 32), np.uint8)
    want[0, 0, 0, 0], want[0, 1, 0, 0], want[0, 0, 0, 1] = 1, 1, 1
    want[1, 1, 31, 31], want[1, 0, 0, 0] = 1, 1  # (0, 0) and (33, 5) are outside of the middle
    want[2, 0, 0, 0] = 2
    assert got.dtype == np.uint8 and np.array_equal(got, want)

    # by number: 10 // 3 = 3 each, and the rest, (5, 5), is in the last
    got = events.frames(events.KINDS["n-mnist"], TEN, 3)
    want = np.zeros((3, 2, 32, 32), np.uint8)
    want[0, 0, 0, 0], want[0, 1, 0, 0], want[0, 0, 0, 1] = 1, 1, 1
    want[1, 1, 31, 31], want[1, 0, 0, 0] = 1, 1
    want[2, 0, 0, 0], want[2, 0, 4, 4] = 2, 1  # (33, 5) is outside
    assert np.array_equal(got, want)

    # of cifar10-dvs the rest is in none; coordinates x * 48 // 128
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


def as_spikingjelly(stream, T, side):
    """Frames by number, the formula of SpikingJelly's loaders: frame j has the events from
    j * (N // T) to (j + 1) * (N // T), the last one all that follow."""
    step, counts = len(stream) // T, np.zeros((T, 2, side, side), int)
    for j in range(T):
        for event in stream[j * step:(j + 1) * step if j < T - 1 else None]:
            counts[j, event["p"], event["y"], event["x"]] += 1
    return counts


@pytest.mark.parametrize("name, T", [("n-mnist", 20), ("n-mnist", 7), ("dvs-gesture", 64)])
def test_frames_by_number_are_spikingjellys(name, T, tonic):
    kind = events.KINDS[name]
    rows = stream(3, kind.sensor, 997)  # 997 is prime: some are left over
    rows[:, 2] = np.sort(rows[:, 2] % 300 + 5000 * (np.arange(997) % 3))  # three saccades
    rows[:, :2] = rows[:, :2] % 6 + kind.sensor // 2  # a few pixels, so that counts are above 1
    want = as_spikingjelly(structured(rows), T, kind.sensor)
    edge = (kind.sensor - kind.side) // 2
    want = want[..., edge:edge + kind.side, edge:edge + kind.side]
    got = events.frames(kind, structured(rows), T)
    assert np.array_equal(got, want) and got.sum() == 997 and got.max() > 1
    by_time = events.frames(kind, structured(rows), T, "time")
    assert np.abs(by_time.sum((1, 2, 3), dtype=int) - 997 // T).max() > 100


def test_a_count_beyond_a_byte_is_its_largest(tonic):
    many = structured([(5, 5, 0, 1)] * 300 + [(9, 9, 10, 0)])
    got = events.frames(events.KINDS["dvs-gesture"], many, 1, "time")
    assert got[0, 1, 5, 5] == 255 and got.sum() == 255


@pytest.mark.parametrize("count", [256, 32_767, 32_768, 33_000, 65_536, 65_537])
@pytest.mark.parametrize("bins", ["time", "events"])
def test_counts_do_not_wrap_around(count, bins):
    """int16 would turn 33,000 events at one pixel into -32,536, and so into 0."""
    many = np.zeros(count + 2, events.EVENT)
    many["x"], many["y"], many["p"], many["t"][-2:] = 5, 6, 1, (7, 8)
    got = events.count_events(many, bins, 1, 32)
    assert got.sum() == got[0, 1, 6, 5] == count + (1 if bins == "time" else 2)


@pytest.mark.parametrize("count", [300, 33_000, 70_000])
@pytest.mark.parametrize("name", events.KINDS)
def test_what_is_stored_of_many_events(name, count, tonic):
    kind = events.KINDS[name]
    many = structured([(20, 20, i, 1) for i in range(count)] + [(9, 9, count, 0)])
    got = events.frames(kind, many, 1)
    assert got.max() == 255 and np.count_nonzero(got == 255) == 1


@pytest.mark.parametrize("bins", ["time", "events"])
@pytest.mark.parametrize("time_steps", [1, 3, 7])
def test_bins_are_those_of_tonic(bins, time_steps, tonic):
    from tonic.transforms import ToFrame
    rng, stream = np.random.default_rng(time_steps), np.zeros(500, events.EVENT)
    for axis in "xy":
        stream[axis] = rng.integers(0, 8, 500)
    stream["p"], stream["t"] = rng.integers(0, 2, 500), np.sort(rng.integers(0, 90, 500)) + 1000
    by = {"n_time_bins" if bins == "time" else "n_event_bins": time_steps}
    want = ToFrame(sensor_size=(8, 8, 2), **by)(stream)
    assert np.array_equal(events.count_events(stream, bins, time_steps, 8), want)


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
    assert [path.name for path in Path("data").glob(f"{name}*")] == [f"{name}-T4-number"]


def test_the_two_splits_have_caches_of_their_own(tonic, monkeypatch):
    make_n_mnist(Path("data"))
    by_number = events.load("n-mnist", "data", 4)
    by_time = events.load("n-mnist", "data", 4, "time")
    assert not np.array_equal(by_number[0], by_time[0])
    assert {path.name for path in Path("data").glob("n-mnist*")} == {
        "n-mnist-T4-number", "n-mnist-T4-time"}
    monkeypatch.setattr(events, "read", lambda *_: pytest.fail("read again"))
    for split, frames in (("time", by_time), ("number", by_number), (None, by_number)):
        again = data.load("n-mnist", "data", time_steps=4, event_split=split)
        assert torch.equal(again.x_train, torch.from_numpy(frames[0])), split
    Path("data/n-mnist-T4-time").rename("data/n-mnist-T4")  # of an earlier version
    assert np.array_equal(events.load("n-mnist", "data", 4, "time")[0], by_time[0])


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
    for cache in Path("data").glob("n-mnist-T4-number"):
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
    cut_short(Path("data/n-mnist-T4-number/x_train.npy"), 100)
    assert "data/n-mnist-T4-number is damaged" in message(ValueError)
    np.save("data/n-mnist-T4-number/x_train.npy", np.zeros((20, 3, 2, 32, 32), np.uint8))
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


# ---- frames that know their recordings -----------------------------------------------------------


def more(folder):
    write_bin(folder / "NMNIST/Train/3/00077.bin", stream(77))


def other(folder):
    """Another recording of as many bytes, under the same name."""
    write_bin(folder / "NMNIST/Test/3/00000.bin", stream(77))


def gone_one(folder):
    (folder / "NMNIST/Train/3/00001.bin").unlink()


def moved(folder):
    (folder / "NMNIST/Train/3/00001.bin").rename(folder / "NMNIST/Train/4/00009.bin")


@pytest.mark.parametrize("change", [more, other, gone_one, moved])
def test_frames_of_other_recordings_are_made_anew(change, tonic, capsys):
    make_n_mnist(Path("data"))
    events.load("n-mnist", "data", 4)
    change(Path("data"))
    capsys.readouterr()
    again = events.load("n-mnist", "data", 4)
    assert "data/n-mnist-T4-number was made from other recordings" in capsys.readouterr().out
    again = [np.array(array) for array in again]
    assert [path.name for path in Path("data").glob("n-mnist*")] == ["n-mnist-T4-number"]
    shutil.rmtree("data/n-mnist-T4-number")
    fresh = events.load("n-mnist", "data", 4)
    assert all(np.array_equal(a, b) for a, b in zip(again, fresh, strict=True))


def test_what_else_lies_beside_recordings_changes_nothing(tonic, capsys, monkeypatch):
    make_n_mnist(Path("data"))
    events.load("n-mnist", "data", 4)
    Path("data/NMNIST/train.zip").write_bytes(b"PK")
    Path("data/NMNIST/Train/3/.DS_Store").write_bytes(b"")
    monkeypatch.setattr(events, "read", lambda *_: pytest.fail("read again"))
    events.load("n-mnist", "data", 4)
    shutil.rmtree("data/NMNIST")  # only the frames are left
    events.load("n-mnist", "data", 4)
    assert "other recordings" not in capsys.readouterr().out


def test_older_frames_that_do_not_say_what_they_are_of(tonic, capsys):
    write_frames("n-mnist", 4)
    os.rename("data/n-mnist-T4-number", "data/n-mnist-T4")
    make_n_mnist(Path("data"))  # as many recordings: 20 and 10
    old = events.load("n-mnist", "data", 4, "time")[0][0].copy()
    assert "other recordings" not in capsys.readouterr().out
    assert not Path("data/n-mnist-T4-time").exists()
    more(Path("data"))
    assert not np.array_equal(events.load("n-mnist", "data", 4, "time")[0][0], old)
    assert "was made from other recordings" in capsys.readouterr().out
    events.load("n-mnist", "data", 4, "time")
    assert "other recordings" not in capsys.readouterr().out


@pytest.mark.parametrize("name, was", [("n-mnist", "time"), ("cifar10-dvs", "number")])
def test_frames_of_an_earlier_version_are_of_its_split(name, was):
    write_frames(name, 4)
    os.rename(f"data/{name}-T4-number", f"data/{name}-T4")
    assert len(events.load(name, "data", 4, was)[1]) == 20  # without tonic and recordings
    other = "number" if was == "time" else "time"
    with pytest.raises((ValueError, FileNotFoundError)):
        events.load(name, "data", 4, other)


def test_made_anew_is_said_only_of_what_is_made(monkeypatch, capsys):
    """Stale frames beside read-only recordings, and newer ones in the user's own cache."""
    monkeypatch.setattr(events, "made_from", lambda *_: "30 recordings abc")
    write_frames("n-mnist", 4)
    beside, home = sources.cache_places("data", "n-mnist-T4-number")
    home.parent.mkdir(parents=True)
    shutil.copytree(beside, home)
    (beside / events.MADE_FROM).write_text("29 recordings xyz\n")
    (home / events.MADE_FROM).write_text("30 recordings abc\n")
    assert len(events.load("n-mnist", "data", 4)[1]) == 20
    assert "other recordings" not in capsys.readouterr().out


def test_a_cache_that_fits_into_neither_place_says_why_of_both():
    beside, home = sources.cache_places("data", "few")

    def make(path):
        if path.parent == beside.parent:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OSError) as error:
        sources.write("data", "few", make)
    assert error.value.errno == errno.ENOSPC
    assert sources.reason(error.value) == (
        f"Read-only file system; {home}: No space left on device")


def test_frames_of_recordings_that_are_read_only(tonic, capsys, monkeypatch):
    make_n_mnist(Path("data"))
    really = Path.mkdir

    def mkdir(path, *given, **named):
        if path.parent == Path("data"):
            raise OSError(30, "Read-only file system", str(path))
        really(path, *given, **named)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    for _ in range(2):
        arrays = events.load("n-mnist", "data", 4)
        assert len(arrays[0]) == 20 and isinstance(arrays[0], np.memmap)
        monkeypatch.setattr(events, "read", lambda *_: pytest.fail("read again"))
    out = capsys.readouterr().out
    assert out.count("data cannot be written to (Read-only file system): n-mnist-T4-number is kept as") == 1
    assert not list(Path("data").glob("n-mnist*"))


# ---- frames of one's own -------------------------------------------------------------------------


def own_frames(path="frames.npz", steps=4, **changed):
    rng = np.random.default_rng(0)
    arrays = {"y_train": np.arange(60) % 3, "y_test": np.arange(15) % 3}
    for split, count in (("train", 60), ("test", 15)):
        arrays[f"x_{split}"] = rng.integers(0, 4, (count, steps, 2, 16, 16), dtype=np.uint8)
    arrays |= changed
    np.savez(path, **arrays)
    return arrays


def test_own_frames_are_counts_as_they_are():
    arrays = own_frames()
    images = data.load("frames.npz", train_limit=30)
    assert images.x_train.shape == (30, 4, 2, 16, 16) and images.num_classes == 3
    assert np.array_equal(images.x_test, arrays["x_test"])
    assert (images.mean, images.std) == ([0.0, 0.0], [1.0, 1.0])
    own_frames(x_train=arrays["x_train"].astype(np.int64))  # whole numbers, none lost
    assert torch.equal(data.load("frames.npz", train_limit=30).x_train, images.x_train)


@pytest.mark.parametrize("change, text", [
    (lambda x: x.transpose(0, 1, 3, 4, 2), "x = x.transpose(0, 1, 4, 2, 3), polarities before"),
    (lambda x: x[:, :, :1], "[60, 4, 1, 16, 16], expected"),
    (lambda x: x[..., :9], "[60, 4, 2, 16, 9], expected"),
    (lambda x: x.astype(np.float32), "x = x.clip(0, 255).round().astype('uint8')"),
    (lambda x: x.astype(np.int16) + 300, "x = x.clip(0, 255)"),
    (lambda x: x.sum(1)[:, 0], "images are [16, 16, 1] in x_train, [4, 2, 16, 16] in x_test")])
def test_frames_of_another_form(change, text):
    own_frames(x_train=change(own_frames()["x_train"]))
    with pytest.raises(ValueError) as error:
        data.load("frames.npz")
    assert text in str(error.value) and "\n" not in str(error.value)


SHORT = ("--epochs-prune 1 --epochs-finetune 1 --interval 2 --batch-size 16 --model small "
         "--width 0.25 --run-dir r").split()


def test_own_frames_through_a_script(capsys):
    own_frames()
    main = prune_unstructured.main
    for given, text in (
            ([], "--encoding is direct, but frames.npz is made of events, expected events. Write "
             "--encoding events --time-steps 4"),
            (["--encoding", "events", "--time-steps", "6"], "--time-steps is 6, but frames.npz has "
             "4 frames a recording, expected as many. Write --time-steps 4")):
        with pytest.raises(SystemExit) as stop:
            main(["--dataset", "frames.npz", *SHORT, *given])
        assert stop.value.code == 2 and text in one_line(capsys) and not Path("r").exists()
    main(["--dataset", "frames.npz", *SHORT, "--encoding", "events", "--time-steps", "4"])
    net = models.load("r/model.pt")
    assert net.encoding == "events" and json.loads(Path("r/summary.json").read_text())["sops"] > 0


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
        split = "time" if "microseconds" in says else "number"
        events.bin_all(events.KINDS[name], [(Recordings(rows), 0, 0)], 4, Path("x.npy"), split)


def test_part_of_a_set_says_so_each_time(capsys):
    write_frames("n-mnist", 2)
    for _ in range(2):
        events.load("n-mnist", "data", 2)
        assert "holds 30 recordings, all of n-mnist are 70,000" in capsys.readouterr().out


def test_compare_loads_frames(monkeypatch):
    write_frames("n-mnist", 20)
    monkeypatch.setattr(compare.jobs, "run_all", lambda jobs, at_a_time: None)
    with pytest.raises(SystemExit) as stop:
        compare.main(["--dataset", "n-mnist"])
    assert stop.value.code == 2  # nothing ran, and there is no table


def test_compare_takes_own_frames_as_they_are(monkeypatch, capsys):
    own_frames()
    started = []
    monkeypatch.setattr(compare.jobs, "run_all", lambda jobs, at_a_time: started.extend(jobs))
    with pytest.raises(SystemExit):  # nothing ran, and there is no table
        compare.main(["--dataset", "frames.npz"])
    assert len(started) == 75
    for _, words, _ in started:
        assert words[words.index("--encoding") + 1] == "events"
        assert words[words.index("--time-steps") + 1] == "4"
    with pytest.raises(SystemExit) as stop:
        compare.main(["--dataset", "frames.npz", "--time-steps", "8", "--out", "new"])
    assert stop.value.code == 2 and not Path("new").exists()
    assert "--time-steps is 8, but frames.npz has 4 frames" in capsys.readouterr().err


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
    assert (config["encoding"], config["event_split"]) == ("events", "number")
    assert Path("data", f"{name}-T{summary['time_steps']}-number").is_dir()


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


def test_a_stopped_run_older_than_the_flag_goes_on(monkeypatch):
    """Neither its config.json nor its checkpoint names the split that it had."""
    write_frames("n-mnist", 3, each=(4, 1))
    os.rename("data/n-mnist-T3-number", "data/n-mnist-T3")
    given = ["--dataset", "n-mnist", "--time-steps", "3", "--width", "0.1", "--batch-size", "8",
             "--epochs-prune", "1", "--epochs-finetune", "1", "--interval", "3", "--run-dir", "r"]
    monkeypatch.setattr(sys, "argv", ["prune_unstructured.py"])
    stop_after(2, monkeypatch, prune_unstructured.main, [*given, "--event-split", "time"])
    config = json.loads(Path("r/config.json").read_text())
    del config["event_split"]
    Path("r/config.json").write_text(json.dumps(config))
    state = torch.load("r/checkpoint.pt", weights_only=True)
    del state["flags"]["event_split"]
    torch.save(state, "r/checkpoint.pt")
    assert prune_unstructured.main(["--resume", "--run-dir", "r"])["epochs"] == 2


def test_figures_of_frames(capsys):
    write_frames("n-mnist", 2, each=(4, 1))
    given = ["--dataset", "n-mnist", "--time-steps", "2", "--width", "0.1", "--batch-size", "8"]
    smoke("prune_unstructured", *given, "--run-dir", "runs/a")
    smoke("prune_unstructured", *given, "--regen", "0", "--run-dir", "runs/b")
    smoke("prune_unstructured", *given, "--sparsity", "0", "--run-dir", "runs/c")
    drawn = analyze.main([])
    assert {"variance", "entropy", "activity", "criticality", "layers"} <= set(drawn)


def test_a_run_by_time_and_one_by_number(tonic):
    """Through a script: the frames are the ones that were asked for, and a resumed run keeps
    them."""
    make_n_mnist(Path("data"))
    given = ["--dataset", "n-mnist", "--time-steps", "4", "--interval", "1"]
    smoke("prune_unstructured", *given, "--event-split", "time", "--run-dir", "a")
    assert Path("data/n-mnist-T4-time").is_dir() and not Path("data/n-mnist-T4-number").exists()
    smoke("prune_unstructured", *given, "--run-dir", "b")
    assert Path("data/n-mnist-T4-number").is_dir()
    first = [json.loads(Path(r, "metrics.jsonl").read_text().splitlines()[0]) for r in "ab"]
    assert first[0]["train_loss"] != first[1]["train_loss"]
    args = prune_unstructured.parse_args(["--resume", "--run-dir", "a"])
    assert args.event_split == "time"


@pytest.mark.parametrize("dataset, was", [
    ("n-mnist", "time"), ("dvs-gesture", "time"), ("cifar10-dvs", "number"),
    ("fashion-mini", None)])
def test_a_run_older_than_the_flag_keeps_its_frames(dataset, was):
    config = vars(prune_unstructured.parse_args(["--dataset", dataset]))
    assert config["event_split"] == ("number" if was else None)  # today's default
    del config["event_split"], config["resume"], config["overwrite"]
    Path("old").mkdir()
    Path("old/config.json").write_text(json.dumps(config))
    args = prune_unstructured.parse_args(["--resume", "--run-dir", "old"])
    assert args.event_split == was


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("given", [[], ["--dataset", "cifar10"], ["--dataset", "mine.npz"],
                                   ["--encoding", "rate"], ["--smoke", "--resume"]])
def test_a_split_of_images_is_refused(script, given, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main([*given, "--event-split", "time"])
    error = one_line(capsys)
    assert stop.value.code == 2 and "--event-split is time, which" in error
    assert "does not use, expected recordings of an event camera (n-mnist, " in error
    assert not Path("runs").exists()


def test_an_encoding_that_does_not_fit(capsys):
    write_frames("n-mnist", 3)
    for given, text in ((["--dataset", "n-mnist", "--time-steps", "3", "--encoding", "rate"],
                         "n-mnist is made of events"),
                        (["--encoding", "events"], "fashion-mini is made of images")):
        with pytest.raises(SystemExit) as stop:
            prune_unstructured.main(given)
        assert stop.value.code == 2 and text in one_line(capsys)
