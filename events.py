"""Data sets of event cameras as frames of counts, through tonic: its readers and its framing.

    x_train, y_train, x_test, y_test = events.load("n-mnist", "data", time_steps=20)

tonic (requirements-events.txt) finds the recordings in its own layout under DATA_DIR, or downloads
them. Each recording is read once, put in the order of time, and binned into T frames; the frames
lie in DATA_DIR/NAME-T20/ as uint8 arrays [N, T, 2, H, W] that are mapped, not read, into memory:
what is resident is what batches have touched. A count above 255 is 255.
"""
import importlib
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.lib.recfunctions  # noqa: F401  tonic's reader of DVS-Gesture takes it for imported
from tqdm import tqdm


class Kind(NamedTuple):
    """A data set: tonic's class; the sensor's side and that of the frames, in pixels; what is done
    to make the one of the other; how a recording is cut into T bins; folders under the class's
    own; how many recordings the whole set has in each; what to put there."""

    reader: str
    sensor: int
    side: int
    fit: str        # "crop" to the middle | "scale" of the coordinates
    bins: str       # "time": of equal length | "events": of equal number
    folders: tuple
    complete: tuple
    wanted: str


# SD-SNN has T = 20 and 32x32 of N-MNIST's 34x34, T = 64 and all of DVS-Gesture's 128x128; PQ has
# T = 10 and 48x48 of CIFAR10-DVS. INTERPRETATION: 32x32 is the middle; bins have equal length, and
# for CIFAR10-DVS of equal number, as is usual with VGGSNN; 48x48 is by scaling the coordinates of
# events, x * 48 // 128, and not by interpolating frames, so that counts stay whole
KINDS = {
    "n-mnist": Kind("NMNIST", 34, 32, "crop", "time", ("Train", "Test"), (60_000, 10_000),
                    "Train/0/*.bin to Test/9/*.bin of train.zip and test.zip (N-MNIST)"),
    "dvs-gesture": Kind("DVSGesture", 128, 128, "crop", "time",
                        ("ibmGestureTrain", "ibmGestureTest"), (1077, 264),
                        "ibmGestureTrain/user*_*/*.npy and ibmGestureTest/user*_*/*.npy (of the "
                        "archives that tonic names)"),
    "cifar10-dvs": Kind("CIFAR10DVS", 128, 48, "scale", "events", ("",), (10_000,),
                        "airplane/*.aedat4 to truck/*.aedat4 (of the archive that tonic names)"),
}
FIX = "Unpack the archive again, or remove the file"
PART = 9  # CIFAR10-DVS has no official split: of each class the first 9 tenths train
EVENT = np.dtype([("x", np.int32), ("y", np.int32), ("t", np.int64), ("p", np.int8)])
FILES = ("x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy")


def load(name, data_dir, time_steps):
    """Return [x_train, y_train, x_test, y_test] of a set of KINDS: x uint8 [N, T, 2, H, W], mapped
    from disk, y int64 [N].

    CIFAR10-DVS is split 9 : 1 in each class, by the order of the numbers in the file names. Raises
    FileNotFoundError or ValueError, one line, for whatever is wrong with the recordings.
    """
    kind, data_dir = KINDS[name], Path(data_dir)
    cache = data_dir / f"{name}-T{time_steps}"
    if not cache.exists():
        splits = recordings(kind, data_dir)
        building = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
        try:
            building.mkdir()
            for split, found in splits.items():
                bin_all(kind, found, time_steps, building / f"x_{split}.npy")
                np.save(building / f"y_{split}.npy", np.array([label for *_, label in found]))
            os.rename(building, cache)  # whole, or not there
        except OSError as error:
            if not cache.exists():  # else another process was faster
                raise ValueError(f"{cache} could not be written ({_reason(error)}), expected room "
                                 f"for frames of all recordings. Make room, or pass another "
                                 f"--data-dir") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    try:
        arrays = [np.load(cache / file, mmap_mode="c") for file in FILES]
        shape = time_steps, 2, kind.side, kind.side
        for x, y in (arrays[:2], arrays[2:]):
            if x.dtype != np.uint8 or x.shape != (len(y), *shape) or y.dtype != np.int64:
                raise ValueError(f"frames of {x.dtype} {list(x.shape)}")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{cache} is damaged ({_reason(error)}), expected the frames of {name}. "
                         f"Remove the folder: it is made anew from the recordings") from error
    count, whole = len(arrays[1]) + len(arrays[3]), sum(kind.complete)
    if count != whole:
        print(f"note: {cache} holds {count:,} recordings, all of {name} are {whole:,}. If there "
              f"are more now, remove the folder: it is made anew")
    return arrays


def recordings(kind, data_dir):
    """Return {"train": rows, "test": rows}; a row is (tonic's data set, index in it, label)."""
    module = _import("tonic.datasets")
    folder = data_dir / kind.reader
    sets = []
    for i, part in enumerate(kind.folders):
        is_there = (folder / part).is_dir()
        # tonic wants the archive beside what was in it; the recordings are all that is needed
        reader = type(kind.reader, (getattr(module, kind.reader),),
                      {"_check_exists": lambda self: is_there})
        given = (i == 0,) if len(kind.folders) > 1 else ()
        try:
            found = reader(str(data_dir), *given)
        except Exception as error:  # what tonic, urllib, zipfile and the folder's names raise
            state = "cannot be read" if is_there else "is not there and could not be downloaded"
            raise _missing(folder / part, f"{state} ({_reason(error)})", kind, data_dir) from error
        if len(found) == 0:
            raise _missing(folder / part, "holds no recordings", kind, data_dir)
        order = sorted(range(len(found)), key=lambda j: [  # 10 comes after 9
            (int(run), "") if run.isdigit() else (0, run)
            for run in re.split(r"(\d+)", found.data[j])])
        sets.append([(found, j, int(found.targets[j])) for j in order])
    if len(sets) == 2:
        return dict(train=sets[0], test=sets[1])
    rows = dict(train=[], test=[])
    for label in sorted({label for *_, label in sets[0]}):
        mine = [row for row in sets[0] if row[2] == label]
        first = len(mine) * PART // 10
        rows["train"] += mine[:first]
        rows["test"] += mine[first:]
    if not rows["train"]:
        raise _missing(folder, "holds one recording of each class, and none is left to train with",
                       kind, data_dir)
    return rows


def bin_all(kind, rows, time_steps, path):
    """Bin recordings into frames and write them, one by one, to a .npy file."""
    out = np.lib.format.open_memmap(path, "w+", np.uint8, (
        len(rows), time_steps, 2, kind.side, kind.side))
    for i, (found, j, _) in enumerate(tqdm(rows, f"binning {path.stem}", disable=None,
                                           leave=False)):
        stream = read(kind, found, j)
        has = int(np.ptp(stream["t"])) if kind.bins == "time" else len(stream)
        if has < time_steps:
            what = "microseconds" if kind.bins == "time" else "events"
            raise ValueError(f"{found.data[j]} has {has} {what}, expected at least one for each "
                             f"of {time_steps} frames. {FIX}")
        out[i] = frames(kind, stream, time_steps)
    out.flush()


def read(kind, found, index):
    """Return the events of one recording in the order of time, with x, y, t and p, checked."""
    path = found.data[index]
    try:
        if path.endswith(".bin") and os.path.getsize(path) % 5:
            raise ValueError("5 bytes an event, and the last one is cut short")
        raw, _ = found[index]
        stream = np.empty(len(raw), EVENT)
        for field in EVENT.names:
            stream[field] = raw[field]
    except Exception as error:  # what numpy, struct and the decoders raise on a file cut short
        raise ValueError(f"{path} cannot be read ({_reason(error)}), expected a whole recording of "
                         f"{kind.reader}. {FIX}") from error
    if len(stream) == 0:
        raise ValueError(f"{path} holds no event, expected a recording of {kind.reader}. {FIX}")
    low = min(int(stream[axis].min()) for axis in "xy")
    high = max(int(stream[axis].max()) for axis in "xy")
    if low < 0 or high >= kind.sensor:
        raise ValueError(f"{path} has an event at {low if low < 0 else high}, expected coordinates "
                         f"from 0 to {kind.sensor - 1}, within the sensor of {kind.reader}. {FIX}")
    if not np.isin(stream["p"], (0, 1)).all():
        raise ValueError(f"{path} has a polarity of {stream['p'].min()} to {stream['p'].max()}, "
                         f"expected 0 and 1. {FIX}")
    if (np.diff(stream["t"]) < 0).any():  # equal times keep the order of the file
        stream = stream[np.argsort(stream["t"], kind="stable")]
    return stream


def frames(kind, stream, time_steps):
    """Bin events into frames of counts, uint8 [T, 2, side, side], with tonic's own framing.

    Bins of time are (last - first) // T long, in whole microseconds, the first at the first event,
    open at their end; bins of events hold events // T each. What is left over at the end, at least
    the last event of bins of time, falls into none, as tonic has it.
    """
    transforms = _import("tonic.transforms")
    side = kind.sensor
    if kind.fit == "scale":
        side = kind.side
        stream = transforms.Downsample(spatial_factor=side / kind.sensor)(stream)
    bins = {f"n_{'time' if kind.bins == 'time' else 'event'}_bins": time_steps}
    counts = transforms.ToFrame(sensor_size=(side, side, 2), **bins)(stream)  # int16 [T, 2, H, W]
    edge = (side - kind.side) // 2
    counts = counts[..., edge:edge + kind.side, edge:edge + kind.side]
    return counts.clip(0, 255).astype(np.uint8)


def _import(module):
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{module} cannot be imported ({_reason(error)}), expected tonic, which "
                         f"reads event data. Install it: pip install -r requirements-events.txt"
                         ) from error


def _missing(folder, state, kind, data_dir):
    return FileNotFoundError(f"{folder} {state}, expected {kind.wanted}. Put them under "
                             f"{data_dir / kind.reader}, or pass --data-dir")


def _reason(error):
    """Return the heart of an error's text, in one line."""
    text = (getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
    return text.splitlines()[-1].split(". ")[0].rstrip(".")
