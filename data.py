"""Data sets as uint8 tensors, and their augmentation in whole batches.

Everything is read once into memory and moved to the device once. Crop, flip and cutout
are tensor code on a whole batch, so there are no loader processes and no Python work
for each image.

    dataset = data.load("fashion-mini").to("cuda")  # embedded: nothing else is needed
    dataset = data.load("cifar100", "data")         # cifar100.npz or official files
    dataset = data.load("mine.npz")
    dataset = data.load("my_images")                # train/CLASS/*, test/CLASS/*
    for epoch in range(200):
        for images, labels in data.batches(dataset.x_train, dataset.y_train, 128,
                                           seed, epoch):
            ...                                     # uint8 images

The network normalises images with dataset.mean and dataset.std.

A named set is looked for as DATA_DIR/NAME.npz first, then in its official layout. What
is in neither place is downloaded by torchvision, except Tiny-ImageNet, whose images are
decoded once into DATA_DIR/tiny-imagenet.npz. Sets of event cameras are read and binned
by events.py.
"""
import importlib
import math
import os
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import events

TORCHVISION = {  # our name -> torchvision's class
    "mnist": "MNIST", "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
NAMES = ("fashion-mini", *TORCHVISION, "tiny-imagenet", *events.KINDS)
KEYS = ("x_train", "y_train", "x_test", "y_test")

# what numpy, Pillow and torchvision raise on missing, short or damaged files
BAD_FILE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError,
            AssertionError, SyntaxError, RuntimeError, MemoryError, struct.error,
            zlib.error, HTTPException, zipfile.BadZipFile)


class Dataset(NamedTuple):
    """A training and a test set in memory, ready to be fed to a network.

    name: as given to load.
    x_train, x_test: uint8 [N, C, H, W], H = W, in channels_last memory; of events
    [N, T, 2, H, W].
    y_train, y_test: int64 [N], 0..num_classes - 1.
    mean, std: of each channel over the training images, in 0..1; std is 1 where a
    channel is constant, so that dividing by it is safe.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    mean: list[float]
    std: list[float]

    def to(self, device):
        """Return the same set with its four tensors on a device."""
        return self._replace(**{key: getattr(self, key).to(device) for key in KEYS})

    def inputs(self, split, batch_size):
        """Return an iterator over the "train" or "test" set in its order, as a network
        takes it: images [n, C, H, W] or frames [T, n, 2, H, W], both views."""
        return map(_time_first, getattr(self, f"x_{split}").split(batch_size))

    def pairs(self, split, batch_size):
        """Return an iterator over pairs of inputs() and their labels [n]."""
        labels = getattr(self, f"y_{split}").split(batch_size)
        return zip(self.inputs(split, batch_size), labels)

    def copies(self, n):
        """Return the first test image n times, as a network takes it: a batch to
        measure with."""
        return _time_first(self.x_test[:1].expand(n, *self.x_test.shape[1:]))


def _time_first(x):
    """Return images as they are, frames [n, T, ...] as [T, n, ...]."""
    return x if x.dim() == 4 else x.transpose(0, 1)


def load(name, data_dir="data", train_limit=None, at_most=None, time_steps=None):
    """Load a data set by its name (one of NAMES) or path (FILE.npz or a folder).

    FILE.npz: images x_train, x_test uint8 [N, H, W, C] or [N, H, W]; labels y_train,
    y_test integers [N].
    Folder: train/CLASS/* and test/CLASS/* (or val/CLASS/*), images of one size. The
    label of a class is the rank of its name in train.

    data_dir: where named sets lie, or are downloaded to.
    train_limit: keep the first so many training images, balanced over the classes, in
    file order; mean and std are then theirs.
    at_most: keep no more than so many of both sets, for a trial.
    time_steps: how many frames a recording of events makes; their counts have mean 0
    and std 1.
    Raises ValueError or FileNotFoundError, one line each, for whatever is wrong with
    the files.
    """
    data_dir = Path(os.path.expanduser(data_dir))
    are_events = name in events.KINDS
    if are_events:
        arrays = events.load(name, data_dir, time_steps)
    else:
        arrays = _read(name, data_dir)
    x_train, y_train, x_test, y_test = arrays
    num_classes = int(y_train.max()) + 1
    if train_limit is not None and not num_classes <= train_limit <= len(y_train):
        raise _error(ValueError, f"--train-limit is {train_limit}",
                     f"{num_classes} (an image for each class of {name}) to "
                     f"{len(y_train)} (all)", "Change it or leave it out")
    limits = [limit for limit in (train_limit, at_most) if limit is not None]
    x_train, y_train = _first_balanced(x_train, y_train, min(limits, default=None))
    x_test, y_test = _first_balanced(x_test, y_test, at_most)
    if are_events:
        mean, std = [0.0, 0.0], [1.0, 1.0]
    else:
        mean, std = _mean_and_std(x_train)
        # channels first in shape, last in memory
        x_train, x_test = x_train.transpose(0, 3, 1, 2), x_test.transpose(0, 3, 1, 2)
    tensors = map(torch.from_numpy, (x_train, y_train, x_test, y_test))
    return Dataset(name, *tensors, num_classes, mean, std)


# ---- batches -------------------------------------------------------------------------


def num_batches(n, batch_size):
    """Return the number of batches in an epoch over n images, the last one included."""
    return -(-n // batch_size)


def batches(images, labels, batch_size, seed, epoch, first=0, pad=0, flip=False,
            cutout=0, rotate=0.0, rank=0, size=1):
    """Yield one epoch as pairs (images, labels) of a batch.

    images: uint8 [n, C, H, W] in channels_last memory; frames as [T, n, 2, H, W], all T
    of a recording augmented alike. labels: [n].
    Each image comes once; the last batch may be smaller. Order and augmentation depend
    on seed and epoch (both >= 0) only, and are drawn for the whole epoch at once: a
    batch does not depend on which were taken before it, so first=b resumes an epoch
    exactly at batch b (counted from 0).

    Arguments: images uint8 [N, C, H, W] or [N, T, C, H, W] and labels [N], on the
    device where the batches are wanted.
    pad: pixels of black around an image before a crop of its size is cut at a random
    place (LTH-SNN: 4 at 32 pixels, 8 at 64); 0: no crop.
    flip: whether half of the images are mirrored.
    cutout: side, in pixels, of a black square with a uniformly drawn centre, clipped at
    the borders (LTH-SNN: 16); 0: none.
    rotate: the largest angle, in degrees and either way, by which an image is turned
    before all else; 0: none.
    rank, size: yield only every size-th image of each batch, from the rank-th on, so
    that `size` processes share it. A rank that this leaves without an image gets the
    first of the batch.
    """
    N, *frame, _, H, W = images.shape
    # SeedSequence mixes its words. With seed + epoch instead, epoch 1 of seed 0 would
    # be epoch 0 of seed 1.
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    rng = torch.Generator().manual_seed(mixed)
    draws = [torch.randperm(N, generator=rng),
             torch.randint(0, 2 * pad + 1, (N,), generator=rng),  # top of the crop
             torch.randint(0, 2 * pad + 1, (N,), generator=rng),  # left of the crop
             torch.randint(0, 2, (N,), generator=rng).bool() & flip,
             torch.randint(0, H, (N,), generator=rng),            # centre of the hole
             torch.randint(0, W, (N,), generator=rng),
             (2 * torch.rand(N, generator=rng) - 1) * math.radians(rotate)]
    draws = [draw.to(images.device) for draw in draws]
    pixels = images.flatten(1, -3).permute(0, 2, 3, 1)  # [N, H, W, C], all frames as C
    for start in range(first * batch_size, N, batch_size):
        end = min(start + batch_size, N)
        place = start + rank if start + rank < end else start
        order, *rest, angle = (draw[place:end:size] for draw in draws)
        batch = pixels.index_select(0, order)
        if rotate:
            batch = _turn(batch, angle)
        batch = _augment(batch, *rest, pad, cutout)
        batch = _time_first(batch.permute(0, 3, 1, 2).unflatten(1, (*frame, -1)))
        yield batch, labels.index_select(0, order)


def _turn(images, angle):
    """Turn square images [n, H, W, C] about their middle by angles [n]; each pixel
    takes the nearest one, or black from outside, as torchvision's RandomRotation
    does."""
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turns = torch.stack([cos, -sin, none, sin, cos, none], 1).view(-1, 2, 3)
    maps = images.permute(0, 3, 1, 2).float()
    places = F.affine_grid(turns, maps.shape, align_corners=False)
    turned = F.grid_sample(maps, places, mode="nearest", align_corners=False)
    return turned.permute(0, 2, 3, 1).to(images.dtype)


def _augment(images, top, left, mirror, hole_y, hole_x, pad, cutout):
    """Crop, flip and cut holes into images [n, H, W, C]; the other tensors hold n
    values each."""
    n, H, W, C = images.shape
    y, x = (torch.arange(size, device=images.device) for size in (H, W))
    # source: which pixel of the padded batch each pixel of the result is
    images = F.pad(images, (0, 0, pad, pad, pad, pad))
    rows = top[:, None] + y  # [n, H]
    columns = left[:, None] + torch.where(mirror[:, None], W - 1 - x, x)  # [n, W]
    rows = rows + (H + 2 * pad) * torch.arange(n, device=images.device)[:, None]
    source = rows[:, :, None] * (W + 2 * pad) + columns[:, None, :]  # [n, H, W]
    out = images.reshape(-1, C).index_select(0, source.view(-1)).view(n, H, W, C)
    if cutout:
        y = y - (hole_y[:, None] - cutout // 2)  # [n, H]; 0..cutout - 1: in the hole
        x = x - (hole_x[:, None] - cutout // 2)  # [n, W]
        in_rows = (0 <= y) & (y < cutout)
        in_columns = (0 <= x) & (x < cutout)
        hole = in_rows[:, :, None] & in_columns[:, None, :]
        out *= ~hole[..., None]
    return out


# ---- the formats ---------------------------------------------------------------------
#
# A reader returns the four arrays of KEYS as a list, unchecked: images [N, H, W, C] or
# [N, H, W], labels [N].


def _read(name, data_dir):
    """Find a set by its name or path and return its checked arrays."""
    if name == "fashion-mini":
        path = Path(__file__).parent / "assets/fashion_mini.npz"
    else:
        path = data_dir / f"{name}.npz" if name in NAMES else Path(name)
    if name in TORCHVISION and not os.path.exists(path):
        folder, arrays = _read_torchvision(name, data_dir)
        return _check(folder, arrays)
    if name == "tiny-imagenet" and not os.path.exists(path):
        folder = data_dir / "tiny-imagenet-200"
        arrays = _check(folder, _read_tiny_imagenet(folder))
        _save_npz(path, arrays)
        return arrays
    if path.suffix == ".npz":
        return _check(path, _read_npz(path))
    if os.path.isdir(path):
        return _check(path, _read_folder(path))
    wrong = "no known name and no existing path"
    if os.path.exists(path):
        wrong = "a file of an unknown kind"
    raise _error(FileNotFoundError, f"data set {name} is {wrong}",
                 f"{', '.join(NAMES)}, or a path: FILE.npz or a folder with train and "
                 "test", "Check the spelling of --dataset")


def _read_npz(path):
    """Read an archive of numpy.savez or savez_compressed with the arrays of KEYS.
    Arrays of objects are refused: they are pickles, which could run code."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [np.asarray(file[key]) for key in KEYS]
    except BAD_FILE as error:
        raise _unreadable(path, error,
                          f"a whole .npz file with {', '.join(KEYS)}, no objects",
                          "Check the path, or make it anew with numpy.savez") from error


def _read_torchvision(name, data_dir):
    """Read a set in torchvision's layout, or download it; return (folder, arrays).

    MNIST and Fashion-MNIST are four idx files in MNIST/raw or FashionMNIST/raw, or
    their .gz archives. CIFAR is cifar-10-batches-py or cifar-100-python, or its
    .tar.gz. CIFAR's files are pickles, which could run code: torchvision compares their
    md5 before it opens them.
    """
    reader = getattr(_import("torchvision.datasets"), TORCHVISION[name])
    if "mnist" in name:
        folder = place = data_dir / reader.__name__ / "raw"
        archives = reader.resources
        files = [Path(archive).stem for archive, _ in archives]
        # Old versions left processed/*.pt, which would be preferred to raw/ and has no
        # md5. The subclass keeps the name of its class, which is that of the folder.
        reader = type(reader.__name__, (reader,),
                      {"_check_legacy_exist": lambda self: False})
    else:
        folder, place = data_dir / reader.base_folder, data_dir
        archives = [(reader.filename, reader.tgz_md5)]
        files = [file for file, _ in reader.train_list + reader.test_list]
    is_there = all((folder / file).is_file() for file in files)
    try:
        train, test = (reader(data_dir, train=is_train, download=not is_there)
                       for is_train in (True, False))
    except BAD_FILE as error:
        if is_there:
            kind, state, fix = ValueError, "is damaged", "Delete it, then put"
        else:
            kind, fix = FileNotFoundError, "Put"
            state = "is not complete and could not be downloaded"
        wanted = ", ".join(f"{archive} (md5 {md5})" for archive, md5 in archives)
        raise _error(kind, f"{folder} {state} ({_reason(error)})",
                     f"the contents of {wanted}",
                     f"{fix} that from any mirror into {place}, or {name}.npz into "
                     f"{data_dir}, or pass --data-dir") from error
    return folder, [np.asarray(array) for split in (train, test)
                    for array in (split.data, split.targets)]


def _read_tiny_imagenet(root):
    """Read the official layout: wnids.txt with a class on each line, whose number is
    its label; train/CLASS/images/*; val/images/*, whose classes val/val_annotations.txt
    gives in lines "image, tab, class, tab, bounding box"."""
    fix = (f"Unzip tiny-imagenet-200.zip (from CS231n) in {root.parent}, "
           "or pass --data-dir")

    def lines_of(path):
        try:
            return path.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise _unreadable(path, error,
                              "the official folder, or tiny-imagenet.npz beside it",
                              fix) from error

    label_of = {wnid: label for label, wnid in enumerate(lines_of(root / "wnids.txt"))}
    train, test = [], []  # pairs (file, label)
    for wnid, label in label_of.items():
        files = _list(root / "train" / wnid / "images", "images")
        train += [(file, label) for file in files]
    annotations = root / "val" / "val_annotations.txt"
    for line in lines_of(annotations):
        image, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in label_of:
            raise _error(ValueError, f"{annotations} has the line {line!r}",
                         "an image, a tab and a class of wnids.txt", fix)
        test.append((root / "val" / "images" / image, label_of[wnid]))
    return _decode(root, train, test)


def _read_folder(root):
    """Read train/CLASS/* and test/CLASS/* (or val/CLASS/*), found by torchvision's
    ImageFolder. Each visible file is an image; names that start with a dot are left
    out."""
    ImageFolder = _import("torchvision.datasets").ImageFolder

    class VisibleFolder(ImageFolder):
        def find_classes(self, directory):
            names = [folder.name for folder in _list(Path(directory), "class folders")]
            return names, {name: label for label, name in enumerate(names)}

    def find(folder):
        """Return {class: files} in the order of the classes' names."""
        found = VisibleFolder(folder, is_valid_file=_is_visible, allow_empty=True)
        files = {name: [] for name in found.classes}
        for file, label in found.samples:
            files[found.classes[label]].append(Path(file))
        for name in found.classes:
            if not files[name]:
                raise _error(FileNotFoundError, f"{folder / name} holds no images",
                             "a folder of images", "Complete it, or check the path")
        return files

    train = find(root / "train")
    test_root = root / "test" if (root / "test").exists() else root / "val"
    test = find(test_root)
    label_of = {name: label for label, name in enumerate(train)}
    for name in test:
        if name not in label_of:
            raise _error(ValueError, f"{test_root / name} is a class without training "
                         f"images", f"only classes of {root / 'train'}",
                         "Rename or remove it")
    pairs = [[(file, label_of[name]) for name in split for file in split[name]]
             for split in (train, test)]
    return _decode(root, *pairs)


def _is_visible(path):
    return not Path(path).name.startswith(".")


def _list(folder, what):
    """Return the visible files ("images") or sub-folders ("class folders") of a folder,
    sorted."""
    is_wanted = Path.is_file if what == "images" else Path.is_dir
    expected, fix = f"a folder of {what}", "Complete it, or check the path"
    try:
        found = [path for path in folder.iterdir()
                 if is_wanted(path) and _is_visible(path)]
    except OSError as error:
        raise _unreadable(folder, error, expected, fix) from error
    if not found:
        raise _error(FileNotFoundError, f"{folder} holds no {what}", expected, fix)
    return sorted(found, key=lambda path: path.name)


def _decode(root, train, test):
    """Decode pairs (file, label) to [N, H, W, 1] if all the images are grey, else [N,
    H, W, 3]."""
    if not train or not test:
        missing = "test" if train else "training"
        raise _error(ValueError, f"{root} lists no {missing} images",
                     "both training and test images", "Complete it")
    Image = _import("PIL.Image")
    files = [file for file, _ in train + test]
    x = None

    def decode(i):
        nonlocal x
        try:
            with Image.open(files[i]) as image:
                if image.mode[0] in "IF":  # 16 or 32 bits: convert would clip them
                    raise ValueError(f"pixels of kind {image.mode}")
                if x is None:
                    x = np.empty((len(files), image.width, image.width, 3), np.uint8)
                if not image.width == image.height == x.shape[1]:
                    raise ValueError(f"{image.width} x {image.height} pixels")
                x[i] = image.convert("RGB")
                return image.mode in ("1", "L", "LA")
        except (*BAD_FILE, Image.DecompressionBombError) as error:
            raise _unreadable(files[i], error,
                              f"a whole 8-bit image, square, as wide as {files[0]}",
                              "Convert, resize or remove it") from error

    are_grey = [decode(0)]
    with ThreadPoolExecutor() as pool:
        others = pool.map(decode, range(1, len(files)))
        are_grey += tqdm(others, "decoding", len(files) - 1, disable=None, leave=False)
    x = x[..., :1] if all(are_grey) else x
    y = np.array([label for _, label in train + test])
    return [x[:len(train)], y[:len(train)], x[len(train):], y[len(train):]]


# ---- checks and small helpers --------------------------------------------------------


def _check(source, arrays):
    """Return four checked arrays: images uint8 [N, H, W, C], contiguous, labels int64.

    source: the file or folder that errors name. Raises ValueError, one line.
    """
    def require(is_right, wrong, expected, fix):
        if not is_right:
            raise _error(ValueError, f"{source}: {wrong}", expected, fix)

    checked = []
    for split, x, y in (("train", *arrays[:2]), ("test", *arrays[2:])):
        found = f"x_{split} is {x.dtype} {list(x.shape)}"
        x = x.reshape(*x.shape, 1) if x.ndim == 3 else x
        are_images = x.dtype == np.uint8 and x.ndim == 4 and x.size
        require(are_images and x.shape[1] == x.shape[2] >= 8,
                found, "uint8 [N, H, W, C] or [N, H, W] with N >= 1, H = W >= 8",
                "Convert it: values 0 to 255, channels last, square images")
        require(np.issubdtype(y.dtype, np.integer) and y.shape == x.shape[:1],
                f"y_{split} is {y.dtype} {list(y.shape)}", f"integers [{len(x)}]",
                f"Give each image of x_{split} the number of its class")
        checked += [np.ascontiguousarray(x), y.astype(np.int64)]
    x_train, y_train, x_test, y_test = checked
    classes = np.unique(y_train)
    require(np.array_equal(classes, np.arange(len(classes))),
            f"y_train holds {len(classes)} different labels from {classes[0]} to "
            f"{classes[-1]}", "each from 0 to the largest at least once",
            "Number the classes from 0 without a gap")
    require(0 <= y_test.min() and y_test.max() <= classes[-1],
            f"y_test holds labels from {y_test.min()} to {y_test.max()}",
            f"0 to {classes[-1]} as in y_train", "Remove or renumber the others")
    require(x_train.shape[1:] == x_test.shape[1:],
            f"images are {list(x_train.shape[1:])} in x_train, "
            f"{list(x_test.shape[1:])} in x_test",
            "one size and number of channels", "Convert one to the other's")
    return checked


def _first_balanced(x, y, limit):
    """Return the first `limit` images when the classes take turns, in file order; None:
    all."""
    if limit is None:
        return x, y
    by_class = np.argsort(y, kind="stable")
    grouped = y[by_class]
    turn = np.empty_like(y)  # 0: the first image of its class, 1: the second, ...
    turn[by_class] = np.arange(len(y)) - np.searchsorted(grouped, grouped)
    chosen = np.sort(np.lexsort((y, turn))[:limit])
    return x[chosen], y[chosen]


def _mean_and_std(x):
    """Return the means and deviations of the channels of uint8 [N, H, W, C], in 0..1.

    Exact: the sums are integers, from a histogram of each channel.
    """
    mean, std = [], []
    for channel in range(x.shape[3]):
        parts = (x[i:i + 1000, ..., channel] for i in range(0, len(x), 1000))
        counts = sum(np.bincount(part.ravel(), minlength=256) for part in parts)
        n, total, squares = (int(counts @ np.arange(256) ** power)
                             for power in range(3))
        mean.append(total / (255 * n))
        std.append(math.sqrt(n * squares - total ** 2) / (255 * n) or 1.0)
    return mean, std


def _save_npz(path, arrays):
    """Write an .npz file that is whole or not there; a disk that is full or read-only
    is a note."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **dict(zip(KEYS, arrays)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        print(f"note: {path} could not be written ({_reason(error)}); "
              "the images will be decoded again next time")


def _import(module):
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise _error(ValueError, f"{module} cannot be imported ({_reason(error)})",
                     "a torchvision that was built for this torch",
                     'pip install "torch>=2.11" "torchvision>=0.26"') from error


def _reason(error):
    """Return the last line of an error's text, its first sentence."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    text = text or type(error).__name__
    return text.splitlines()[-1].split(". ")[0].rstrip(".")


def _unreadable(path, error, expected, fix):
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return _error(kind, f"{path} cannot be read ({_reason(error)})", expected, fix)


def _error(kind, wrong, expected, fix):
    """Make an exception whose message is one line, even if a path is not."""
    return kind(" ".join(f"{wrong}, expected {expected}. {fix}".splitlines()))
