"""Folders of images: which files count, and what they decode to.

    train, test, classes = folders.list_splits(root, notes)   # pairs (file, label)
    x_train, x_test = folders.decode(root, train_files, test_files, notes)

    ROOT/train/CLASS/**    ROOT/test/CLASS/** (or val, valid, validation)

Classes and files have the order of torchvision's ImageFolder, which looks into nested
folders as well. notes: {what: files}, what is left out or read in an unusual way; it is
printed in one line.
"""
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

import sources
from sources import BAD_FILE, error, unreadable

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib",
            ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic",
            ".tga", ".jp2", ".ico"}
# what systems and archives add to a folder, besides names that start with a dot
SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"}

# value of the EXIF orientation: how Pillow turns what a file holds into what is shown
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
ORIENTATION = 0x0112  # the number of the tag

DEAD = "dead links left out"
HIDDEN = "hidden or system files left out"
OTHER = "files left out that are no images"
LOOSE = "files left out that are in no class folder"
LOOP = "links left out that lead back to a folder above"
TURNED = "images turned as their EXIF orientation says"
ANIMATED = "images of several frames, of which the first is read"
UNUSED = "folders left out, since test is there"
BESIDE = "folders left out beside train and test"
VALIDATION = ("val", "valid", "validation")  # names of what may be the test set


# ---- which files ---------------------------------------------------------------------


def list_splits(root, notes):
    """Return (train, test, classes): two lists of pairs (file, label), and the names of
    the classes in the order of their labels.

    The label of a class is the rank of its name in train. A `test` without a class of
    train, beside a `val` with one, is not labelled: val takes its place, and a line
    says so.
    """
    train_root, test_root = root / "train", root / "test"
    there = [root / name for name in VALIDATION if (root / name).is_dir()]
    val_root = there[0] if there else root / "val"
    classes = list_classes(train_root, notes)
    if test_root.is_symlink() and not test_root.exists():
        notes.setdefault(DEAD, []).append(test_root)
    if not test_root.exists() and there:
        test_root = val_root
        if val_root.name != "val":
            print(f"note: {root} has no test: {val_root} is the test set")
    elif there:
        has_classes, is_labelled = (
            any((folder / name).is_dir() for name in classes)
            for folder in (test_root, val_root))
        if is_labelled and not has_classes:
            print(f"note: {test_root} has no folder of a class of {train_root}: "
                  f"{val_root} is the test set")
            test_root = val_root
        elif is_labelled:
            notes.setdefault(UNUSED, []).append(val_root)
    known = {train_root, root / "test", test_root, *notes.get(UNUSED, ())}
    _note_others(root, notes, known)
    for name in list_classes(test_root, notes):
        if name not in classes:
            raise error(ValueError, f"{test_root / name} is a class without training "
                        f"images", f"only classes of {train_root}",
                        "Rename or remove it")
    pairs = []
    for split in (train_root, test_root):
        here = [name for name in classes if (split / name).is_dir()]
        pairs.append([(file, classes.index(name)) for name in here
                      for file in list_images(split / name, notes)])
    return *pairs, classes


def _note_others(root, notes, known):
    """Add to the notes what lies in root beside the folders that are known."""
    found = [os.lstat(path) for path in known if os.path.lexists(path)]
    for entry in _scan(root, "train and test"):
        # by what it is: on a Mac Train is read as train
        if any(os.path.samestat(os.lstat(entry.path), other) for other in found):
            continue
        if _is_hidden(entry.name):
            what = HIDDEN
        elif entry.is_dir():
            what = BESIDE
        else:
            what = LOOSE if os.path.exists(entry.path) else DEAD
        notes.setdefault(what, []).append(entry.path)


def list_classes(folder, notes):
    """Return the names of the visible folders in a folder, sorted."""
    names = []
    for entry in _scan(folder, "class folders"):
        if _is_hidden(entry.name):
            notes.setdefault(HIDDEN, []).append(entry.path)
        elif entry.is_dir():
            names.append(entry.name)
        else:
            what = LOOSE if os.path.exists(entry.path) else DEAD
            notes.setdefault(what, []).append(entry.path)
    if not names:
        raise _empty(folder, "class folders")
    return sorted(names)


def list_images(folder, notes):
    """Return the image files in a folder and in its nested ones, in the order of
    ImageFolder. Raise FileNotFoundError if there is none."""
    found = {}  # {folder: files}

    def visit(place, above):
        real = os.path.realpath(place)
        if real in above:
            notes.setdefault(LOOP, []).append(place)
            return
        found[str(place)] = files = []
        for entry in _scan(place, "images"):
            if _is_hidden(entry.name):
                notes.setdefault(HIDDEN, []).append(entry.path)
            elif entry.is_dir():
                visit(Path(entry.path), above | {real})
            elif entry.is_file() and _is_image(entry.path):
                files.append(entry.path)
            else:
                what = OTHER if os.path.exists(entry.path) else DEAD
                notes.setdefault(what, []).append(entry.path)

    visit(folder, frozenset())
    files = [Path(file) for name in sorted(found) for file in sorted(found[name])]
    if not files:
        raise _empty(folder, "images", notes)
    return files


def _scan(folder, what):
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as wrong:
        raise unreadable(folder, wrong, f"a folder of {what}",
                         "Complete it, or check the path") from wrong


def _empty(folder, what, notes=()):
    """Make the error of a folder without classes or images; notes say what is there."""
    there = [name for name in notes if any(str(file).startswith(f"{folder}{os.sep}")
                                           for file in notes[name])]
    found = f" ({', '.join(there)})" if there else ""
    return error(FileNotFoundError, f"{folder} holds no {what}{found}",
                 f"a folder of {what}", "Complete it, or check the path")


def _is_hidden(name):
    return name.startswith(".") or name.lower() in SYSTEM


def _pillow():
    return sources.import_module("PIL.Image", "Pillow, which reads images",
                                 "Install it: pip install Pillow")


def _is_image(path):
    """Return whether a file counts as an image: by its suffix, or else by its head."""
    if os.path.splitext(path)[1].lower() in SUFFIXES:
        return True
    Image = _pillow()
    try:
        with Image.open(path):
            return True
    except (*BAD_FILE, Image.DecompressionBombError):
        return False


# ---- decoding ------------------------------------------------------------------------


def decode(root, train, test, notes):
    """Decode two lists of files to two arrays, uint8 [N, H, W, 1] if all the images are
    grey, else [N, H, W, 3], and print the notes. Raise ValueError if they do not fit
    into memory."""
    Image = _pillow()
    files = [*train, *test]

    @contextmanager
    def opened(file):
        try:
            with Image.open(file) as image:
                yield image
        except (*BAD_FILE, Image.DecompressionBombError) as wrong:
            raise unreadable(file, wrong,
                             f"a whole 8-bit image, square, as wide as {files[0]}",
                             "Convert, resize or remove it") from wrong

    def require_size(image, width):
        if not image.width == image.height == width:
            raise ValueError(f"{image.width} x {image.height} pixels")

    with opened(files[0]) as first:
        width = first.width
        require_size(first, width)
    sources.require_room(root, len(files), 3 * width ** 2,
                         f"{len(files):,} images of {width} x {width} pixels")
    x = np.empty((len(files), width, width, 3), np.uint8)

    def decode_one(i):
        with opened(files[i]) as image:
            require_size(image, width)
            _require_8_bits(image)
            if getattr(image, "n_frames", 1) > 1:
                notes.setdefault(ANIMATED, []).append(files[i])
            is_grey = image.mode in ("1", "L", "LA")
            x[i] = _upright(Image, image, files[i], notes)
            return is_grey

    with warnings.catch_warnings():  # Pillow's, of damaged EXIF data or palettes
        warnings.simplefilter("ignore")
        are_grey = [decode_one(0)]
        with ThreadPoolExecutor() as pool:
            others = pool.map(decode_one, range(1, len(files)))
            are_grey += tqdm(others, "decoding", len(files) - 1, disable=None,
                             leave=False)
    say(root, notes)
    x = x[..., :1] if all(are_grey) else x
    return x[:len(train)], x[len(train):]


def _require_8_bits(image):
    """Raise ValueError for 16 or 32 bits a value, which a conversion would clip; Pillow
    itself cuts 16-bit colours to their upper 8 bits as it reads them."""
    kind = image.mode
    if kind[0] not in "IF":
        tiles = getattr(image, "tile", ())
        has_16 = any(";16" in str(tile.args) for tile in tiles)
        # of PPM files the largest value
        has_16 |= any(tile.codec_name == "ppm" and tile.args[-1] > 255
                      for tile in tiles)
        if not has_16:
            return
        kind += " with 16 bits"
    raise ValueError(f"pixels of kind {kind}")


def _upright(Image, image, file, notes):
    """Return an image in RGB, turned as viewers show it."""
    image.load()  # Pillow itself turns a TIFF here, and drops its tag
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF data, which viewers ignore
        turn = None
    image = image.convert("RGB")
    if turn is None:
        return image
    notes.setdefault(TURNED, []).append(file)
    return image.transpose(Image.Transpose[turn])


def say(root, notes):
    """Print what is to be said of the files, in one line."""
    parts = []
    for what in sorted(notes):
        files = sorted(map(str, notes[what]))
        first = os.path.relpath(files[0], root)
        more = ", ..." if len(files) > 1 else ""
        parts.append(f"{what}: {len(files):,} ({first}{more})")
    if parts:
        print(" ".join(f"note: {root}: {'; '.join(parts)}".splitlines()))
