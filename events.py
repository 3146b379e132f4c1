"""Data sets of event cameras as frames of counts, through tonic's readers and framing.

    x_train, y_train, x_test, y_test = events.load("n-mnist", "data", time_steps=20)

tonic (requirements-events.txt) finds the recordings in its own layout under DATA_DIR,
or downloads them. Each recording is read once, put in the order of time, and binned
into T frames. The frames are kept in DATA_DIR/NAME-T20/ as uint8 arrays
[N, T, 2, H, W], which are mapped into memory, not read: only what batches have touched
takes memory. A count above 255 is stored as 255.

The formats, each with one recording a file:
- n-mnist: Train/0/*.bin to Test/9/*.bin, 5 bytes an event: x, y, then 1 bit of polarity
  and 23 bits of time in microseconds;
- dvs-gesture: ibmGestureTrain/user*_*/LABEL.npy and ibmGestureTest, rows (x, y, p, t),
  t in milliseconds, which tonic multiplies by 1000;
- cifar10-dvs: CLASS/*.aedat4, time in microseconds.
"""
import importlib
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.lib.recfunctions  # noqa: F401  tonic uses it and does not import it
from tqdm import tqdm


class Kind(NamedTuple):
    """How a data set is read and binned.

    reader: the name of tonic's class, and of the folder under DATA_DIR.
    sensor, side: side of the sensor and of the frames, in pixels.
    fit: how the one becomes the other: "crop" takes the middle, "scale" divides the
    coordinates.
    bins: what the T bins of a recording share: "time" (equal length) or "events" (equal
    number).
    folders: the parts of the set, under the folder; two are a training and a test set.
    complete: how many recordings the whole set has in each of them.
    wanted: for messages: which files belong there, and where they come from.
    """

    reader: str
    sensor: int
    side: int
    fit: str
    bins: str
    folders: tuple
    complete: tuple
    wanted: str


# Sizes: SD-SNN has T = 20 and 32x32 of N-MNIST's 34x34, and T = 64 and all of
# DVS-Gesture's 128x128; PQ has T = 10 and 48x48 of CIFAR10-DVS. INTERPRETATION: 32x32
# is the middle. Bins have equal length, and for CIFAR10-DVS an equal number of events,
# as is usual with VGGSNN. 48x48 scales the coordinates of events, x * 48 // 128, and
# interpolates no frames, so that counts stay whole.
KINDS = {
    "n-mnist": Kind(
        "NMNIST", 34, 32, "crop", "time", ("Train", "Test"), (60_000, 10_000),
        "Train/0/*.bin to Test/9/*.bin of train.zip and test.zip (N-MNIST)"),
    "dvs-gesture": Kind(
        "DVSGesture", 128, 128, "crop", "time", ("ibmGestureTrain", "ibmGestureTest"),
        (1077, 264),
        "ibmGestureTrain/user*_*/*.npy and ibmGestureTest/user*_*/*.npy (of the "
        "archives that tonic names)"),
    "cifar10-dvs": Kind(
        "CIFAR10DVS", 128, 48, "scale", "events", ("",), (10_000,),
        "airplane/*.aedat4 to truck/*.aedat4 (of the archive that tonic names)"),
}
FIX = "Unpack the archive again, or remove the file"
PART = 9  # CIFAR10-DVS has no official split: of each class the first 9 tenths train
EVENT = np.dtype([("x", np.int32), ("y", np.int32), ("t", np.int64), ("p", np.int8)])
FILES = ("x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy")


def load(name, data_dir, time_steps):
    """Return [x_train, y_train, x_test, y_test] of a set of KINDS: x uint8
    [N, T, 2, H, W], mapped from disk, y int64 [N].

    CIFAR10-DVS is split 9 : 1 in each class, by the order of the numbers in the file
    names. Raises FileNotFoundError or ValueError, one line, for whatever is wrong with
    the recordings.
    """
    kind, data_dir = KINDS[name], Path(data_dir)
    cache = data_dir / f"{name}-T{time_steps}"
    if not cache.exists():
        _build(cache, kind, recordings(kind, data_dir), time_steps)
    try:
        arrays = [np.load(cache / file, mmap_mode="c") for file in FILES]
        frame = time_steps, 2, kind.side, kind.side
        for x, y in (arrays[:2], arrays[2:]):
            fits = x.dtype == np.uint8 and x.shape == (len(y), *frame)
            if not fits or y.dtype != np.int64:
                raise ValueError(f"frames of {x.dtype} {list(x.shape)}")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{cache} is damaged ({_reason(error)}), expected the frames "
                         f"of {name}. Remove the folder: it is made anew from the "
                         f"recordings") from error
    count, whole = len(arrays[1]) + len(arrays[3]), sum(kind.complete)
    if count != whole:
        print(f"note: {cache} holds {count:,} recordings, all of {name} are {whole:,}. "
              f"If there are more now, remove the folder: it is made anew")
    return arrays


def _build(cache, kind, splits, time_steps):
    """Bin recordings into the files of a new folder, which is whole or not there."""
    building = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        building.mkdir()
        for split, rows in splits.items():
            bin_all(kind, rows, time_steps, building / f"x_{split}.npy")
            labels = np.array([label for *_, label in rows])
            np.save(building / f"y_{split}.npy", labels)
        os.rename(building, cache)
    except OSError as error:
        if not cache.exists():  # else another process was faster
            raise ValueError(f"{cache} could not be written ({_reason(error)}), "
                             f"expected room for frames of all recordings. Make room, "
                             f"or pass another --data-dir") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def recordings(kind, data_dir):
    """Return {"train": rows, "test": rows} of a Kind; a row is (tonic's data set, index
    in it, label)."""
    module = _import("tonic.datasets")
    folder = data_dir / kind.reader
    sets = []
    for i, part in enumerate(kind.folders):
        is_there = (folder / part).is_dir()
        # tonic asks for the archive beside its contents, of which only these are needed
        reader = type(kind.reader, (getattr(module, kind.reader),),
                      {"_check_exists": lambda self: is_there})
        is_train = (i == 0,) if len(kind.folders) > 1 else ()
        try:
            found = reader(str(data_dir), *is_train)
        except Exception as error:  # of tonic, urllib, zipfile, or by a folder's name
            state = "is not there and could not be downloaded"
            if is_there:
                state = "cannot be read"
            raise _missing(folder / part, f"{state} ({_reason(error)})", kind,
                           data_dir) from error
        if len(found) == 0:
            raise _missing(folder / part, "holds no recordings", kind, data_dir)
        order = sorted(range(len(found)), key=lambda j: _by_number(found.data[j]))
        sets.append([(found, j, int(found.targets[j])) for j in order])
    if len(sets) == 2:
        return dict(train=sets[0], test=sets[1])
    rows = dict(train=[], test=[])
    for label in sorted({label for *_, label in sets[0]}):
        of_class = [row for row in sets[0] if row[2] == label]
        first = len(of_class) * PART // 10
        rows["train"] += of_class[:first]
        rows["test"] += of_class[first:]
    if not rows["train"]:
        raise _missing(folder, "holds one recording of each class, and none is left to "
                       "train with", kind, data_dir)
    return rows


def _by_number(path):
    """Return a key that sorts paths by the numbers in them: 10 comes after 9."""
    return [(int(run), "") if run.isdigit() else (0, run)
            for run in re.split(r"(\d+)", path)]


def bin_all(kind, rows, time_steps, path):
    """Bin recordings into frames and write them, one by one, to a .npy file."""
    shape = len(rows), time_steps, 2, kind.side, kind.side
    out = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    progress = tqdm(rows, f"binning {path.stem}", disable=None, leave=False)
    for i, (found, j, _) in enumerate(progress):
        stream = read(kind, found, j)
        if kind.bins == "time":
            has, what = int(np.ptp(stream["t"])), "microseconds"
        else:
            has, what = len(stream), "events"
        if has < time_steps:
            raise ValueError(f"{found.data[j]} has {has} {what}, expected at least one "
                             f"for each of {time_steps} frames. {FIX}")
        out[i] = frames(kind, stream, time_steps)
    out.flush()


def read(kind, found, index):
    """Return the events of one recording, checked, in the order of time: an array of
    EVENT."""
    path = found.data[index]
    try:
        if path.endswith(".bin") and os.path.getsize(path) % 5:
            raise ValueError("5 bytes an event, and the last one is cut short")
        raw, _ = found[index]
        stream = np.empty(len(raw), EVENT)
        for field in EVENT.names:
            stream[field] = raw[field]
    except Exception as error:  # numpy, struct and decoders raise many kinds
        raise ValueError(f"{path} cannot be read ({_reason(error)}), expected a whole "
                         f"recording of {kind.reader}. {FIX}") from error
    if len(stream) == 0:
        raise ValueError(f"{path} holds no event, expected a recording of "
                         f"{kind.reader}. {FIX}")
    low = min(int(stream[axis].min()) for axis in "xy")
    high = max(int(stream[axis].max()) for axis in "xy")
    if low < 0 or high >= kind.sensor:
        raise ValueError(f"{path} has an event at {low if low < 0 else high}, expected "
                         f"coordinates from 0 to {kind.sensor - 1}, within the sensor "
                         f"of {kind.reader}. {FIX}")
    polarity = stream["p"]
    if not np.isin(polarity, (0, 1)).all():
        raise ValueError(f"{path} has a polarity of {polarity.min()} to "
                         f"{polarity.max()}, expected 0 and 1. {FIX}")
    if (np.diff(stream["t"]) < 0).any():  # equal times keep the order of the file
        stream = stream[np.argsort(stream["t"], kind="stable")]
    return stream


def frames(kind, stream, time_steps):
    """Bin events into frames of counts, uint8 [T, 2, side, side], with tonic's framing.

    Bins of time are (last - first) // T long, in whole microseconds; the first starts
    at the first event, and each is open at its end. Bins of events hold events // T
    each. As in tonic, what is left over at the end is in no bin; with bins of time that
    is at least the last event.
    """
    transforms = _import("tonic.transforms")
    side = kind.sensor
    if kind.fit == "scale":
        side = kind.side
        stream = transforms.Downsample(spatial_factor=side / kind.sensor)(stream)
    bins = "n_time_bins" if kind.bins == "time" else "n_event_bins"
    to_frame = transforms.ToFrame(sensor_size=(side, side, 2), **{bins: time_steps})
    counts = to_frame(stream)  # int16 [T, 2, H, W]
    edge = (side - kind.side) // 2
    counts = counts[..., edge:edge + kind.side, edge:edge + kind.side]
    return counts.clip(0, 255).astype(np.uint8)


def _import(module):
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{module} cannot be imported ({_reason(error)}), expected "
                         f"tonic, which reads event data. Install it: pip install -r "
                         f"requirements-events.txt") from error


def _missing(folder, state, kind, data_dir):
    return FileNotFoundError(f"{folder} {state}, expected {kind.wanted}. Put them "
                             f"under {data_dir / kind.reader}, or pass --data-dir")


def _reason(error):
    """Return the last line of an error's text, its first sentence."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    text = text or type(error).__name__
    return text.splitlines()[-1].split(". ")[0].rstrip(".")
