"""Data sets of event cameras as frames of counts, through tonic's readers.

    x_train, y_train, x_test, y_test = events.load("n-mnist", "data", time_steps=20)

tonic (requirements-events.txt) finds the recordings in its own layout under DATA_DIR,
or downloads them. Each recording is read once, put in the order of time, and binned
into T frames, by "number" or by "time". The frames are kept in
DATA_DIR/NAME-T20-number/ (or in the user's own cache folder, if DATA_DIR is read-only)
as uint8 arrays [N, T, 2, H, W], which are mapped into memory: they are read once at the
start, for their hash, and the system may take their memory back. A count above 255 is
stored as 255.

The formats, each with one recording a file:
- n-mnist: Train/0/*.bin to Test/9/*.bin, 5 bytes an event: x, y, then 1 bit of polarity
  and 23 bits of time in microseconds;
- dvs-gesture: ibmGestureTrain/user*_*/LABEL.npy and ibmGestureTest, rows (x, y, p, t),
  t in milliseconds, which tonic multiplies by 1000;
- cifar10-dvs: CLASS/*.aedat4, time in microseconds.
"""
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.lib.recfunctions  # noqa: F401  tonic uses it and does not import it
from tqdm import tqdm

import sources
from sources import reason


class Kind(NamedTuple):
    """How a data set is read and binned.

    reader: the name of tonic's class, and of the folder under DATA_DIR.
    sensor, side: side of the sensor and of the frames, in pixels.
    fit: how the one becomes the other: "crop" takes the middle, "scale" divides the
    coordinates.
    rest: whether the last frame has what is left over of a split by number too.
    folders: the parts of the set, under the folder; two are a training and a test set.
    suffix: of a recording's file.
    complete: how many recordings the whole set has in each of them.
    wanted: for messages: which files belong there, and where they come from.
    """

    reader: str
    sensor: int
    side: int
    fit: str
    rest: bool
    folders: tuple
    suffix: str
    complete: tuple
    wanted: str


# Sizes: SD-SNN has T = 20 and the middle 32x32 of N-MNIST's 34x34, and T = 64 and all
# of DVS-Gesture's 128x128; PQ has T = 10 and 48x48 of CIFAR10-DVS. A rest: SD-SNN's
# code reads the first two with SpikingJelly's loaders, which leave it in the last
# frame; TET's code for CIFAR10-DVS, with whose frames VGGSNN is usually trained, drops
# it.
# INTERPRETATION: 48x48 scales the coordinates of events, x * 48 // 128, and
# interpolates no frames, so that counts stay whole. TET's code interpolates, and
# divides by the largest count.
KINDS = {
    "n-mnist": Kind(
        "NMNIST", 34, 32, "crop", True, ("Train", "Test"), ".bin",
        (60_000, 10_000),
        "Train/0/*.bin to Test/9/*.bin of train.zip and test.zip (N-MNIST)"),
    "dvs-gesture": Kind(
        "DVSGesture", 128, 128, "crop", True, ("ibmGestureTrain", "ibmGestureTest"),
        ".npy", (1077, 264),
        "ibmGestureTrain/user*_*/*.npy and ibmGestureTest/user*_*/*.npy (of the "
        "archives that tonic names)"),
    "cifar10-dvs": Kind(
        "CIFAR10DVS", 128, 48, "scale", False, ("",), ".aedat4", (10_000,),
        "airplane/*.aedat4 to truck/*.aedat4 (of the archive that tonic names)"),
}
SPLITS = ("number", "time")  # what the frames of a recording have in common
# of the frames of earlier versions, whose folder does not name it
EARLIER_SPLIT = {"n-mnist": "time", "dvs-gesture": "time", "cifar10-dvs": "number"}
FIX = "Unpack the archive again, or remove the file"
PART = 9  # CIFAR10-DVS has no official split: of each class the first 9 tenths train
EVENT = np.dtype([("x", np.int32), ("y", np.int32), ("t", np.int64), ("p", np.int8)])
FILES = ("x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy")
MADE_FROM = "made_from.txt"  # beside FILES: of which recordings they are


def load(name, data_dir, time_steps, split="number", download=True):
    """Return [x_train, y_train, x_test, y_test] of a set of KINDS: x uint8
    [N, T, 2, H, W], mapped from disk, y int64 [N].

    split: into frames with as many events each ("number"), or of one length ("time").
    CIFAR10-DVS is split 9 : 1 in each class, by the order of the numbers in the file
    names. Frames of other recordings than are there now are made anew, and a line says
    so; where the recordings are gone the frames count. So do those of earlier versions
    of this project, in DATA_DIR/NAME-T20. Raises FileNotFoundError or
    ValueError, one line, for whatever is wrong with the recordings.
    """
    kind, data_dir = KINDS[name], Path(data_dir)
    cache_name = f"{name}-T{time_steps}-{split}"
    caches = sources.caches(data_dir, cache_name)
    earlier = data_dir / f"{name}-T{time_steps}"
    if split == EARLIER_SPLIT[name] and earlier.is_dir():
        caches.append(earlier)
    now = made_from(kind, data_dir)
    for cache in caches:
        if is_current(cache, now):
            return read_cache(cache, name, time_steps)
    rows = recordings(kind, data_dir, download)
    for cache in caches:
        print(f"note: {cache} was made from other recordings than {data_dir} has now: "
              f"made anew")
    # after recordings(), which may have downloaded them
    now = made_from(kind, data_dir)

    def make(folder):
        folder.mkdir()
        for part in rows:
            bin_all(kind, rows[part], time_steps, folder / f"x_{part}.npy", split)
            labels = np.array([label for *_, label in rows[part]])
            np.save(folder / f"y_{part}.npy", labels)
        (folder / MADE_FROM).write_text(f"{now}\n")

    try:
        cache = sources.write(data_dir, cache_name, make)
    except OSError as wrong:
        raise ValueError(f"{data_dir / cache_name} could not be written "
                         f"({reason(wrong)}), expected room for frames of all "
                         f"recordings. Make room, or pass another --data-dir"
                         ) from wrong
    return read_cache(cache, name, time_steps)


def made_from(kind, data_dir):
    """Return how many recordings are there, and their signature, in a text; None where
    there are none. What else lies in the folder does not count."""
    files = []
    for part in kind.folders:
        for folder, _, names in os.walk(data_dir / kind.reader / part,
                                        followlinks=True):
            files += [os.path.join(folder, name) for name in names
                      if name.endswith(kind.suffix)]
    files = [file for file in files if os.path.isfile(file)]
    if not files:
        return None
    return f"{len(files)} recordings {sources.signature(data_dir, files)}"


def is_current(cache, now):
    """Return whether a cache was made from recordings whose made_from() is `now`.

    An older cache does not say; it counts if it has as many recordings. None: they are
    gone, and any cache counts.
    """
    if now is None:
        return True
    with suppress(OSError, ValueError, EOFError):
        if (cache / MADE_FROM).exists():
            return (cache / MADE_FROM).read_text().strip() == now
        count = sum(len(np.load(cache / file, mmap_mode="r"))
                    for file in ("y_train.npy", "y_test.npy"))
        return count == int(now.split()[0])
    return True  # damaged: read_cache() says so


def read_cache(cache, name, time_steps):
    """Return the four arrays of a cache, the images mapped. Raises ValueError."""
    kind = KINDS[name]
    try:
        arrays = [np.load(cache / file, mmap_mode="c") for file in FILES]
        frame = time_steps, 2, kind.side, kind.side
        for x, y in (arrays[:2], arrays[2:]):
            fits = x.dtype == np.uint8 and x.shape == (len(y), *frame)
            if not fits or y.dtype != np.int64:
                raise ValueError(f"frames of {x.dtype} {list(x.shape)}")
    except (OSError, ValueError, EOFError) as wrong:
        raise ValueError(f"{cache} is damaged ({reason(wrong)}), expected the frames "
                         f"of {name}. Remove the folder: it is made anew from the "
                         f"recordings") from wrong
    count, whole = len(arrays[1]) + len(arrays[3]), sum(kind.complete)
    if count != whole:
        print(f"note: {cache} holds {count:,} recordings, all of {name} are {whole:,}. "
              f"If there are more now, remove the folder: it is made anew")
    return arrays


def recordings(kind, data_dir, download):
    """Return {"train": rows, "test": rows} of a Kind; a row is (tonic's data set, index
    in it, label). download: whether to fetch what is not there."""
    module = _tonic("tonic.datasets")
    folder = data_dir / kind.reader
    sets = []
    for i, part in enumerate(kind.folders):
        is_there = (folder / part).is_dir()
        if not is_there and not download:
            raise _missing(folder / part, "is not there", kind, data_dir)
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
            raise _missing(folder / part, f"{state} ({reason(error)})", kind,
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


def bin_all(kind, rows, time_steps, path, split="number"):
    """Bin recordings into frames and write them, one by one, to a .npy file."""
    shape = len(rows), time_steps, 2, kind.side, kind.side
    out = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    progress = tqdm(rows, f"binning {path.stem}", disable=None, leave=False)
    for i, (found, j, _) in enumerate(progress):
        stream = read(kind, found, j)
        if split == "time":
            has, what = int(np.ptp(stream["t"])), "microseconds"
        else:
            has, what = len(stream), "events"
        if has < time_steps:
            raise ValueError(f"{found.data[j]} has {has} {what}, expected at least one "
                             f"for each of {time_steps} frames. {FIX}")
        out[i] = frames(kind, stream, time_steps, split)
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
        raise ValueError(f"{path} cannot be read ({reason(error)}), expected a whole "
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


def count_events(stream, split, time_steps, side, rest=False):
    """Return how many events each pixel has in each bin, int64 [T, 2, side, side].

    stream: at least an event, in the order of time. split: "time" or "number". rest:
    whether the last bin by number has what is left over too. tonic's ToFrame has the
    same bins, without a rest; its counts are int16 and turn negative beyond 32,767.
    """
    if split == "time":
        passed = stream["t"] - stream["t"][0]
        index = passed // max(1, passed[-1] // time_steps)
    else:
        index = np.arange(len(stream)) // max(1, len(stream) // time_steps)
        if rest:
            index = index.clip(max=time_steps - 1)
    inside = index < time_steps
    index, stream = index[inside], stream[inside]
    shape = time_steps, 2, side, side
    place = np.ravel_multi_index((index, stream["p"], stream["y"], stream["x"]), shape)
    return np.bincount(place, minlength=math.prod(shape)).reshape(shape)


def frames(kind, stream, time_steps, split="number"):
    """Bin events into frames of counts, uint8 [T, 2, side, side]. tonic's Downsample
    scales the coordinates where kind.fit says so.

    By time a bin is (last - first) // T long, in whole microseconds; the first starts
    at the first event, and each is open at its end. As in tonic, what is left over at
    the end is in no bin: at least the last event. By number a bin holds events // T;
    what is left over, fewer than T events, is in the last bin or, without kind.rest, in
    none.
    """
    side = kind.sensor
    if kind.fit == "scale":
        transforms, side = _tonic("tonic.transforms"), kind.side
        stream = transforms.Downsample(spatial_factor=side / kind.sensor)(stream)
    counts = count_events(stream, split, time_steps, side, kind.rest)
    edge = (side - kind.side) // 2
    counts = counts[..., edge:edge + kind.side, edge:edge + kind.side]
    return counts.clip(0, 255).astype(np.uint8)


def _tonic(module):
    return sources.import_module(module, "tonic, which reads event data",
                                 "Install it: pip install -r requirements-events.txt")


def _missing(folder, state, kind, data_dir):
    return FileNotFoundError(f"{folder} {state}, expected {kind.wanted}. Put them "
                             f"under {data_dir / kind.reader}, or pass --data-dir")
