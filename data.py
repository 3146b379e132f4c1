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
decoded once into DATA_DIR/tiny-imagenet.npz. Folders of images are read by folders.py,
sets of event cameras are read and binned by events.py.
"""
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import events
import folders
import sources
from sources import BAD_FILE, error, reason, unreadable

TORCHVISION = {  # our name -> torchvision's class
    "mnist": "MNIST", "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
NAMES = ("fashion-mini", *TORCHVISION, "tiny-imagenet", *events.KINDS)
KEYS = ("x_train", "y_train", "x_test", "y_test")
TINY = "tiny-imagenet.npz"

# of the embedded images, whose file has none
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt",
           "Sneaker", "Bag", "Ankle boot"]


class Dataset(NamedTuple):
    """A training and a test set in memory, ready to be fed to a network.

    name: as given to load.
    x_train, x_test: uint8 [N, C, H, W], H = W, in channels_last memory; of events
    [N, T, 2, H, W].
    y_train, y_test: int64 [N], 0..num_classes - 1.
    mean, std: of each channel over the training images, in 0..1; std is 1 where a
    channel is constant, so that dividing by it is safe.
    class_names: the name of each class, by its label; None where the files have none.
    hashes: {key: text} of KEYS, shape and hash of each: equal only for the same values.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    mean: list[float]
    std: list[float]
    class_names: list[str] | None = None
    hashes: dict[str, str] | None = None

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


def load(name, data_dir="data", train_limit=None, at_most=None, time_steps=None,
         event_split=None, download=True):
    """Load a data set by its name (one of NAMES) or path (FILE.npz or a folder).

    FILE.npz: images x_train, x_test, whole numbers 0 to 255 [N, H, W, C] or [N, H, W],
    or counts of events [N, T, 2, H, W]; labels y_train, y_test, integers [N]; and
    class_names, text [classes], if it is there.
    Folder: train/CLASS/** and test/CLASS/** (or val), images of one size. The label of
    a class is the rank of its name in train.

    data_dir: where named sets lie, or are downloaded to.
    train_limit: keep the first so many training images, balanced over the classes, in
    file order; mean and std are then theirs. Of a folder no other file is decoded.
    at_most: keep no more than so many of both sets, for a trial.
    time_steps: how many frames a recording of events makes; their counts have mean 0
    and std 1. event_split: how, one of events.SPLITS; None: by "number".
    download: whether to fetch a named set that is not in data_dir.
    Raises ValueError or FileNotFoundError, one line each, for whatever is wrong with
    the files.
    """
    data_dir = Path(os.path.expanduser(data_dir))
    found = _read(name, data_dir, time_steps, event_split, download)
    source, (x_train, y_train, x_test, y_test) = found.source, found.arrays
    is_decoded = found.notes is None
    if is_decoded:
        x_train, x_test = _check_images(source, x_train, x_test)
    if name not in events.KINDS:
        y_train, y_test = _check_labels(source, x_train, y_train, x_test, y_test)
    num_classes = int(y_train.max()) + 1
    class_names = _check_names(source, found.class_names, num_classes)
    _note_labels(source, y_train, y_test, class_names or range(num_classes))
    if train_limit is not None and not num_classes <= train_limit <= len(y_train):
        raise error(ValueError, f"--train-limit is {train_limit}",
                    f"{num_classes} (an image for each class of {name}) to "
                    f"{len(y_train)} (all)", "Change it or leave it out")
    limits = [limit for limit in (train_limit, at_most) if limit is not None]
    train = _first_balanced(y_train, min(limits, default=None))
    test = _first_balanced(y_test, at_most)
    x_train, x_test = _take(x_train, train), _take(x_test, test)
    y_train, y_test = y_train[train], y_test[test]
    if not is_decoded:
        x_train, x_test = folders.decode(source, x_train, x_test, found.notes)
        x_train, x_test = _check_images(source, x_train, x_test)
        if found.made_from is not None and not limits:
            _keep_decoded(data_dir, found, x_train, x_test)
    _note_alike(source, training=x_train, test=x_test)
    hashes = {key: sources.digest(array) for key, array
              in zip(KEYS, (x_train, y_train, x_test, y_test))}
    if x_train.ndim == 5:
        mean, std = [0.0, 0.0], [1.0, 1.0]
    else:
        mean, std = _mean_and_std(x_train)
        # channels first in shape, last in memory
        x_train, x_test = x_train.transpose(0, 3, 1, 2), x_test.transpose(0, 3, 1, 2)
    tensors = map(torch.from_numpy, (x_train, y_train, x_test, y_test))
    return Dataset(name, *tensors, num_classes, mean, std, class_names, hashes)


# ---- batches -------------------------------------------------------------------------


def num_batches(n, batch_size):
    """Return the number of batches in an epoch over n images, the last one included."""
    return -(-n // batch_size)


def batches(images, labels, batch_size, seed, epoch, first=0, pad=0, flip=False,
            cutout=0, rotate=0.0, rank=0, size=1):
    """Yield one epoch as pairs (images, labels) of a batch: uint8 [n, C, H, W] in
    channels_last memory, or frames [T, n, 2, H, W], all T of a recording augmented
    alike; and [n].

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


class Found(NamedTuple):
    """What a reader has found.

    source: the file or folder, for messages.
    arrays: the four of KEYS, unchecked: images, or a list of files still to be decoded;
    labels [N].
    class_names: text, by label; None where the files have none.
    notes: of the files still to be decoded (see folders.py); None: there are none.
    made_from: signature of the files whose images are kept decoded; None: they are not.
    """

    source: Path
    arrays: list
    class_names: list | None = None
    notes: dict | None = None
    made_from: str | None = None


def _read(name, data_dir, time_steps, event_split=None, download=True):
    """Find a set by its name or path, and read it; files in a folder are listed."""
    if name in events.KINDS:
        arrays = events.load(name, data_dir, time_steps, event_split or "number",
                             download)
        return Found(Path(name), arrays)
    if name == "fashion-mini":
        found = _read_npz(Path(__file__).parent / "assets/fashion_mini.npz")
        return found._replace(class_names=FASHION)
    if name == "tiny-imagenet":
        return _read_tiny_imagenet(data_dir)
    path = Path(os.path.expanduser(name))
    if name in NAMES:
        path = data_dir / f"{name}.npz"
    if name in TORCHVISION and not os.path.exists(path):
        return _read_torchvision(name, data_dir, download)
    if path.suffix.lower() == ".npz":
        return _read_npz(path)
    if os.path.isdir(path):
        notes = {}
        *splits, class_names = folders.list_splits(path, notes)
        return Found(path, _files_and_labels(*splits), class_names, notes)
    wrong = "no known name and no existing path"
    if os.path.exists(path):
        wrong = "a file of an unknown kind"
    raise error(FileNotFoundError, f"data set {name} is {wrong}",
                f"{', '.join(NAMES)}, or a path: FILE.npz or a folder with train and "
                "test", "Check the spelling of --dataset")


def _read_npz(path):
    """Read an archive of numpy.savez or savez_compressed with the arrays of KEYS, and
    with class_names if it is there. Arrays of objects are refused: they are pickles,
    which could run code."""
    with _opened(path) as file:
        has = file.files
        size = sum(part.file_size for part in file.zip.infolist()
                   if part.filename.removesuffix(".npy") in KEYS)
    missing = [key for key in KEYS if key not in has]
    if missing:
        raise error(ValueError, f"{path} has no {', '.join(missing)}, it has "
                    f"{', '.join(has) or 'nothing'}", f"the arrays {', '.join(KEYS)}",
                    "Save it with these names: np.savez(path, x_train=..., ...)")
    sources.require_room(path, 1, size, "its arrays", "Save fewer images in it, or "
                         "smaller ones")
    with _opened(path) as file:
        arrays = [np.asarray(file[key]) for key in KEYS]
        class_names = file["class_names"] if "class_names" in has else None
    others = [key for key in has if key not in (*KEYS, "class_names", "made_from")]
    if others:
        print(f"note: {path}: not used: {', '.join(others)}")
    return Found(path, arrays, class_names)


@contextmanager
def _opened(path):
    """Open an .npz file. Whatever is wrong with it is an error of one line."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except BAD_FILE as wrong:
        raise unreadable(path, wrong,
                         f"a whole .npz file with {', '.join(KEYS)}, no objects",
                         "Check the path, or make it anew with numpy.savez") from wrong


def _torchvision():
    return sources.import_module(
        "torchvision.datasets", "a torchvision that was built for this torch",
        'pip install "torch>=2.11" "torchvision>=0.26"')


def _read_torchvision(name, data_dir, download):
    """Read a set in torchvision's layout; download it if it is not there and may be.

    MNIST and Fashion-MNIST are four idx files in MNIST/raw or FashionMNIST/raw, or
    their .gz archives. CIFAR is cifar-10-batches-py or cifar-100-python, or its
    .tar.gz. CIFAR's files are pickles, which could run code: torchvision compares their
    md5 before it opens them.
    """
    reader = getattr(_torchvision(), TORCHVISION[name])
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
    if not is_there and not download:
        raise error(FileNotFoundError, f"{folder} is not complete",
                    f"the files of {name}", "Name their folder by --data-dir")
    try:
        train, test = (reader(data_dir, train=is_train, download=not is_there)
                       for is_train in (True, False))
    except BAD_FILE as wrong:
        if is_there:
            kind, state, fix = ValueError, "is damaged", "Delete it, then put"
        else:
            kind, fix = FileNotFoundError, "Put"
            state = "is not complete and could not be downloaded"
        wanted = ", ".join(f"{archive} (md5 {md5})" for archive, md5 in archives)
        raise error(kind, f"{folder} {state} ({reason(wrong)})",
                    f"the contents of {wanted}",
                    f"{fix} that from any mirror into {place}, or {name}.npz into "
                    f"{data_dir}, or pass --data-dir") from wrong
    arrays = [np.asarray(array) for split in (train, test)
              for array in (split.data, split.targets)]
    return Found(folder, arrays, train.classes)


def _read_tiny_imagenet(data_dir):
    """Read tiny-imagenet.npz, or list the official folder.

    An .npz that was decoded from other files than the folder has now is not used, and a
    line says so. Where the folder is gone the .npz counts.
    """
    listed = None
    caches = sources.caches(data_dir, TINY)
    try:
        listed = _list_tiny_imagenet(data_dir / "tiny-imagenet-200")
    except (OSError, ValueError):
        if not caches:
            raise
    for path in caches:
        made_from = None  # of an .npz that was not decoded here
        with _opened(path) as file:
            if "made_from" in file.files:
                made_from = str(file["made_from"])
        if listed is None or made_from in (None, listed.made_from):
            return _read_npz(path)
        print(f"note: {path} was decoded from other files than {listed.source} has "
              f"now; it is not used")
    return listed


def _list_tiny_imagenet(root):
    """List the official layout: wnids.txt with a class on each line, whose number is
    its label; train/CLASS/images/*; val/images/*, whose classes val/val_annotations.txt
    gives in lines "image, tab, class, tab, bounding box"; words.txt, the classes' names
    in lines "class, tab, names", which may be missing."""
    fix = (f"Unzip tiny-imagenet-200.zip (from CS231n) in {root.parent}, "
           "or pass --data-dir")

    def lines_of(path):
        try:
            return path.read_text().splitlines()
        except (OSError, ValueError) as wrong:
            raise unreadable(path, wrong,
                             "the official folder, or tiny-imagenet.npz beside it",
                             fix) from wrong

    lists = [root / "wnids.txt", root / "val" / "val_annotations.txt"]
    images = root / "val" / "images"
    label_of = {wnid: label for label, wnid in enumerate(lines_of(lists[0]))}
    notes, train, test = {}, [], []  # pairs (file, label)
    for wnid, label in label_of.items():
        files = folders.list_images(root / "train" / wnid / "images", notes)
        train += [(file, label) for file in files]
    for line in lines_of(lists[1]):
        image, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in label_of:
            raise error(ValueError, f"{lists[1]} has the line {line!r}",
                        "an image, a tab and a class of wnids.txt", fix)
        test.append((images / image, label_of[wnid]))
    if not test:
        raise error(ValueError, f"{root} lists no test images",
                    "both training and test images", fix)
    files = [file for file, _ in train + test]
    for file in files[len(train):]:
        if not file.is_file():
            raise error(FileNotFoundError, f"{file} is missing", "all that "
                        f"{lists[1].name} lists", fix)
    words = dict.fromkeys(label_of)
    with suppress(OSError, ValueError):
        for line in (root / "words.txt").read_text().splitlines():
            wnid, _, names = line.partition("\t")
            if wnid in words:
                words[wnid] = names
    class_names = [names or wnid for wnid, names in words.items()]
    made_from = sources.signature(root, lists + files)
    return Found(root, _files_and_labels(train, test), class_names, notes, made_from)


def _files_and_labels(*splits):
    """Turn lists of pairs (file, label) into [files, labels, files, labels]."""
    found = []
    for pairs in splits:
        labels = np.array([label for _, label in pairs], np.int64)
        found += [[file for file, _ in pairs], labels]
    return found


def _keep_decoded(data_dir, found, x_train, x_test):
    """Write the images of Tiny-ImageNet into tiny-imagenet.npz. A disk that is full is
    a note."""
    arrays = x_train, found.arrays[1], x_test, found.arrays[3]

    def make(path):
        with open(path, "wb") as file:
            np.savez(file, **dict(zip(KEYS, arrays)), class_names=found.class_names,
                     made_from=found.made_from)
            file.flush()
            os.fsync(file.fileno())

    try:
        sources.write(data_dir, TINY, make)
    except OSError as wrong:
        print(f"note: {data_dir / TINY} could not be written ({reason(wrong)}); the "
              f"images will be decoded again next time")


# ---- checks and small helpers --------------------------------------------------------


def _check_images(source, *splits):
    """Return the images of both splits, uint8 [N, H, W, C] or [N, T, 2, H, W],
    contiguous. source: for messages. Raises ValueError, one line.

    Whole numbers 0 to 255 of another type are taken as they are, which loses nothing.
    """
    checked = []
    for split, x in zip(("train", "test"), splits):
        found = f"{source}: x_{split} is {x.dtype} {list(x.shape)}"
        is_whole = np.issubdtype(x.dtype, np.integer) and x.size
        if is_whole and x.dtype != np.uint8 and 0 <= x.min() and x.max() <= 255:
            x = x.astype(np.uint8)
        x = x.reshape(*x.shape, 1) if x.ndim == 3 else x
        if x.ndim == 5:
            is_shaped = x.shape[2] == 2 and x.shape[3] == x.shape[4] >= 8
        else:
            is_shaped = x.ndim == 4 and x.shape[1] == x.shape[2] >= 8
        if not (x.dtype == np.uint8 and x.size and is_shaped):
            raise error(ValueError, found, "uint8 [N, H, W, C] or [N, H, W], or events "
                        "[N, T, 2, H, W], with N >= 1, H = W >= 8",
                        f"Convert it: {_conversion(x)}")
        checked.append(np.ascontiguousarray(x))
    x_train, x_test = checked
    tops = [int(x.max()) for x in checked]
    if x_train.ndim < 5 and min(tops) == 1 and max(tops) > 127:
        print(f"note: {source}: the largest pixel is {tops[0]} in x_train, {tops[1]} "
              f"in x_test: is one of them in 0..1 and the other in 0..255?")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise error(ValueError, f"{source}: images are {list(x_train.shape[1:])} in "
                    f"x_train, {list(x_test.shape[1:])} in x_test",
                    "one size and number of channels", "Convert one to the other's")
    return checked


def _conversion(x):
    """Return how to convert images that are no uint8 [N, H, W, C], in words."""
    steps = []
    is_number = x.size and x.dtype.kind in "iuf"
    if is_number and not np.isfinite(x).all():
        steps.append("remove what is not finite")
    elif x.dtype == bool:
        steps.append("x = 255 * x.astype('uint8')")
    elif is_number and x.dtype != np.uint8:
        low, high = x.min().item(), x.max().item()
        if x.ndim == 5:
            steps.append("counts of events: "
                         "x = x.clip(0, 255).round().astype('uint8')")
        elif low < 0:
            steps.append(f"its values are {low:g} to {high:g}, undo what shifted them, "
                         f"to 0 to 255")
        elif high <= 1:
            steps.append("x = (255 * x).round().astype('uint8')")
        elif high <= 255:
            steps.append("x = x.round().astype('uint8')")
        else:
            steps.append(f"its values are {low:g} to {high:g}, divide them by "
                         f"{(high + 1) / 256:.3g}, then .astype('uint8')")
    side = math.isqrt(x.shape[1]) if x.ndim == 2 else 0
    colour_side = math.isqrt(x.shape[1] // 3) if x.ndim == 2 else 0
    if side >= 8 and side ** 2 == x.shape[1]:
        steps.append(f"x = x.reshape(-1, {side}, {side})")
    elif colour_side >= 8 and 3 * colour_side ** 2 == x.shape[1]:
        steps.append(f"x = x.reshape(-1, 3, {colour_side}, {colour_side})"
                     ".transpose(0, 2, 3, 1)")
    elif x.ndim == 4 and x.shape[1] != x.shape[2] == x.shape[3]:
        steps.append("x = x.transpose(0, 2, 3, 1), channels last")
    elif x.ndim == 5 and x.shape[4] == 2:
        steps.append("x = x.transpose(0, 1, 4, 2, 3), polarities before H and W")
    elif x.ndim == 4 and x.shape[1] != x.shape[2]:
        steps.append("crop or pad the images to squares")
    return "; ".join(steps) or "values 0 to 255, channels last, square images"


def _check_labels(source, x_train, y_train, x_test, y_test):
    """Return the labels of both splits, int64 [N]. Raises ValueError, one line."""
    def require(is_right, wrong, expected, fix):
        if not is_right:
            raise error(ValueError, f"{source}: {wrong}", expected, fix)

    for split, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        fix = f"Give each image of x_{split} the number of its class"
        if y.shape == (len(x), 1):
            fix = "y = y[:, 0]"
        elif y.ndim == 2 and len(y) == len(x):
            fix = "One value a class (one-hot)? y = y.argmax(1)"
        elif y.shape == (len(x),) and y.dtype.kind == "f" and (y == np.round(y)).all():
            fix = "y = y.astype(int)"
        elif y.shape == (len(x),) and y.dtype.kind in "USb":
            fix = "class_names, y = np.unique(y, return_inverse=True), of both sets"
        require(np.issubdtype(y.dtype, np.integer) and y.shape == (len(x),),
                f"y_{split} is {y.dtype} {list(y.shape)}", f"integers [{len(x)}]", fix)
    y_train, y_test = y_train.astype(np.int64), y_test.astype(np.int64)
    classes = np.unique(y_train)
    require(np.array_equal(classes, np.arange(len(classes))),
            f"y_train holds {len(classes)} different labels from {classes[0]} to "
            f"{classes[-1]}", "each from 0 to the largest at least once",
            "Number the classes from 0 without a gap")
    require(len(classes) > 1, "all training images are of one class",
            "at least two classes to tell apart", "Check the labels, or the folders")
    require(0 <= y_test.min() and y_test.max() <= classes[-1],
            f"y_test holds labels from {y_test.min()} to {y_test.max()}",
            f"0 to {classes[-1]} as in y_train", "Remove or renumber the others")
    return y_train, y_test


def _check_names(source, names, count):
    """Return the names of the classes as a list of text, or None. Raises ValueError."""
    if names is None:
        return None
    names = np.asarray(names)
    if names.dtype.kind != "U" or names.ndim != 1 or len(names) < count:
        raise error(ValueError, f"{source}: class_names is {names.dtype} "
                    f"{list(names.shape)}", f"text [{count}], a name for each label",
                    "Correct it or leave it out")
    if len(names) > count:
        print(f"note: {source}: class_names has {len(names)} names, of which the first "
              f"{count} are used: the labels are 0 to {count - 1}")
    return names[:count].tolist()


def _note_labels(source, y_train, y_test, classes):
    """Print a line if labels can hardly be meant. classes: names or numbers."""
    there = set(np.unique(y_test).tolist())
    absent = [str(name) for label, name in enumerate(classes) if label not in there]
    if absent:
        more = ", ..." if len(absent) > 5 else ""
        print(f"note: {source}: the test set has no images of {len(absent)} of "
              f"{len(classes)} classes: {', '.join(absent[:5])}{more}")
    if len(classes) == len(y_train) > 2:
        print(f"note: {source}: each class has one training image: is y_train the "
              f"number of the class?")


def _note_alike(source, **splits):
    """Print a line for each split whose images are all alike, if they are more than a
    few: nothing can be learnt from them."""
    for split, x in splits.items():
        parts = (x[i:i + 100] for i in range(0, len(x), 100))
        if len(x) >= 10 and all((part == x[0]).all() for part in parts):
            print(f"note: {source}: all {len(x):,} {split} images are alike")


def _take(x, places):
    """Return the images, or the files of a list, at some places: a slice or [n]."""
    if isinstance(places, slice):
        return x[places]
    return [x[i] for i in places] if isinstance(x, list) else x[places]


def _first_balanced(y, limit):
    """Return the places of the first `limit` labels when the classes take turns, in
    file order; None: of all, as a slice, which copies nothing."""
    if limit is None:
        return slice(None)
    by_class = np.argsort(y, kind="stable")
    grouped = y[by_class]
    turn = np.empty_like(y)  # 0: the first image of its class, 1: the second, ...
    turn[by_class] = np.arange(len(y)) - np.searchsorted(grouped, grouped)
    return np.sort(np.lexsort((y, turn))[:limit])


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
