"""What test files share: looking at runs, networks with random weights, data sets on disk and
what can be wrong with them. No tests."""
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import events
import modelfile
import models
from harness.meters import Meter

TIMES = {"seconds", "peak_memory_mib", "speedup_batch1", "speedup_batch32"}


def lines(folder, name):
    return [json.loads(line) for line in Path(folder, f"{name}.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    """All that two runs left agrees bit by bit; times, memory and paths apart."""
    one, other = Path(one), Path(other)
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    a, b = (modelfile.read(folder / "model.pt") for folder in (one, other))
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


def refused(capsys, call, *given, code=2):
    """Return the one line on stderr of call(*given), which must end with this exit code."""
    with pytest.raises(SystemExit) as stop:
        call(*given)
    assert stop.value.code == code
    return one_line(capsys)


def stop_after(iteration, monkeypatch, run, *given):
    """Run until an iteration, and get SIGTERM there."""
    add = Meter.add

    def stop(self, loss, logits, labels, at=0):
        add(self, loss, logits, labels, at)
        if at == iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Meter, "add", stop)
    with pytest.raises(SystemExit) as stopped:
        run(*given)
    assert stopped.value.code == 143
    monkeypatch.setattr(Meter, "add", add)


# ---- processes -----------------------------------------------------------------------------------


def fork(function, *arguments):
    """Start function(*arguments) in a process of its own, in which torch is imported already: a
    new one takes seconds to import it. Return the process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch._dynamo", "torchvision", "matplotlib.pyplot", "pytest"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def write_to(path):
    """Let what this process writes to stdout and stderr stand in a file."""
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(out, stream)


def run_as_typed(words, folder, out, prepare=None):
    """What a process of its own does: run the script words[0] as if typed in a folder, after some
    preparation. Its output is appended to the file out."""
    os.chdir(folder)
    write_to(out)
    if prepare:
        prepare()
    sys.argv = list(map(str, words))
    runpy.run_path(sys.argv[0], run_name="__main__")


# ---- networks ------------------------------------------------------------------------------------


NETS = [("vgg16", 0.15), ("resnet19", 0.12), ("small", 0.5)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_net(name, factor, seed=0, dtype=torch.float64):
    """A network with random weights and BN, all of whose layers fire."""
    torch.manual_seed(seed)
    net = models.build(name, 10, 1, 28, 4, models.default_widths(name, factor)).to(dtype)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 2)
            torch.nn.init.uniform_(module.bias, -0.5, 2)
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked += 7
    if name == "resnet19":  # no BN before its hidden layer
        torch.nn.init.normal_(net.fc1.weight, 0, 1)
        torch.nn.init.uniform_(net.fc1.bias, 0, 2)
    net.set_normalisation([0.3], [0.3])
    return net.eval()


@torch.no_grad()
def let_fire(net):
    """Make the weights and the biases of BN larger, so that neurons of all layers fire."""
    for weight in map(net.get_parameter, models.scored_by(net)):
        weight.mul_(3)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.fill_(0.8)


class LinearNet(torch.nn.Module):
    """Linear layers with given weights, {name: rows}, and no network around them: for examples by
    hand."""

    def __init__(self, **layers):
        super().__init__()
        for name, rows in layers.items():
            layer = torch.nn.Linear(len(rows[0]), len(rows), bias=False)
            layer.weight.data = torch.tensor(rows)
            self.add_module(name, layer)

    def scored_by(self):
        return {f"{name}.weight": models.Scored(f"lif_{name}", 0)
                for name, _ in self.named_children()}


def real_images(count=16, offset=0):
    return data.load("fashion-mini").x_test[offset:offset + count]


def save_half_images(path="mine.npz"):
    """Write 160 training and 40 test images of fashion-mini, at half of the resolution."""
    arrays = {}
    with np.load(Path(data.__file__).parent / "assets/fashion_mini.npz") as images:
        for split, size in (("train", 160), ("test", 40)):
            arrays[f"x_{split}"] = images[f"x_{split}"][:size, ::2, ::2]
            arrays[f"y_{split}"] = images[f"y_{split}"][:size]
    np.savez(path, **arrays)


_read = data._read


def read_few(name, *given):
    """data._read with 100 of the 1,000 test images of fashion-mini."""
    found = _read(name, *given)
    if name == "fashion-mini":
        x_train, y_train, x_test, y_test = found.arrays
        found = found._replace(arrays=[x_train, y_train, x_test[:100], y_test[:100]])
    return found


def with_few_test_images():
    """Let this process read few images; a test has the fixture few_test_images."""
    data._read = read_few


# ---- data sets, and what can be wrong with them --------------------------------------------------


NUMPY_RNG = np.random.default_rng(0)


def random_images(n, side=8, channels=3):
    pixels = NUMPY_RNG.integers(0, 256, (n, side, side, channels), dtype=np.uint8)
    pixels.flat[:2] = 0, 255  # the whole range, whatever tests have drawn before
    return pixels


def good_arrays():
    return {"x_train": random_images(6), "y_train": np.array([0, 1, 2, 0, 1, 2]),
            "x_test": random_images(3), "y_test": np.array([2, 1, 0])}


def save_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def everything_in(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def without(key):
    return lambda a: a.pop(key)


def replaced(key, change):
    return lambda a: a.update({key: change(a[key])})


BAD_ARRAYS = {
    "no x_test": (without("x_test"), "x_test"),
    "no y_train": (without("y_train"), "y_train"),
    "float images": (replaced("x_train", lambda x: x / 255), "x_train is float64"),
    "signed images": (replaced("x_test", lambda x: x.astype(np.int8)), "x_test is int8"),
    "object images": (replaced("x_train", lambda x: x.astype(object)), "cannot be read"),
    "object labels": (replaced("y_train", lambda y: y.astype(object)), "cannot be read"),
    "flat images": (replaced("x_train", lambda x: x.reshape(6, -1)), "[6, 192]"),
    "5 dimensions": (replaced("x_train", lambda x: x[None]), "[1, 6, 8, 8, 3]"),
    "a number": (replaced("x_train", lambda x: np.uint8(3)), "x_train is uint8 []"),
    "not square": (replaced("x_test", lambda x: np.repeat(x, 2, 1)), "[3, 16, 8, 3]"),
    "channels first": (replaced("x_train", lambda x: x.transpose(0, 3, 1, 2)), "[6, 3, 8, 8]"),
    "no channels": (replaced("x_train", lambda x: x[..., :0]), "[6, 8, 8, 0]"),
    "too small": (lambda a: a.update(x_train=random_images(6, 7), x_test=random_images(3, 7)),
                  "[6, 7, 7, 3]"),
    "no images": (replaced("x_test", lambda x: x[:0]), "[0, 8, 8, 3]"),
    "other size": (replaced("x_test", lambda x: random_images(3, 9)), "[9, 9, 3] in x_test"),
    "other channels": (replaced("x_test", lambda x: x[..., :1]), "[8, 8, 1] in x_test"),
    "float labels": (replaced("y_train", lambda y: y / 1), "y_train is float64"),
    "boolean labels": (replaced("y_test", lambda y: y > 0), "y_test is bool"),
    "text labels": (replaced("y_test", lambda y: y.astype(str)), "y_test is <U"),
    "label columns": (replaced("y_train", lambda y: y[:, None]), "y_train is int64 [6, 1]"),
    "too few labels": (replaced("y_test", lambda y: y[:2]), "y_test is int64 [2]"),
    "negative label": (replaced("y_train", lambda y: y - 1), "from -1 to 1"),
    "negative test label": (replaced("y_test", lambda y: y - 1), "y_test holds labels from -1"),
    "empty class": (replaced("y_train", lambda y: y * 2), "3 different labels from 0 to 4"),
    "huge label": (replaced("y_train", lambda y: y * 10 ** 15), "to 2000000000000000"),
    "overflowing label": (replaced("y_train", lambda y: y.astype(np.uint64) + 2 ** 63), "labels"),
    "test class unknown to training": (replaced("y_test", lambda y: y + 1), "y_test holds labels"),
}


def flipped(content):  # one bit of a pixel: only the checksum tells
    return content[:700] + bytes([content[700] ^ 1]) + content[701:]


def npy(content):
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


BAD_FILES = {"empty": lambda c: b"", "truncated": lambda c: c[:-100], "a bit": flipped,
             "garbage": lambda c: c[:61] + b"\xff" * 9 + c[70:],  # after the first header
             "text": lambda c: b"not an archive\n" * 9, "npy": npy,
             "pickle": lambda c: pickle.dumps({"x_train": 1})}


def make_folder(root, test="test", side=8):
    """Write classes b, a with 3 RGB PNGs each, and return the pixels by path."""
    pixels = {}
    for split in ("train", test):
        for name in ("b", "a"):
            for i in range(3):
                path = root / split / name / f"{i}.png"
                pixels[path] = random_images(1, side)[0]
                save_image(path, pixels[path])
    return pixels


def empty_class(root):
    for path in (root / "train" / "b").iterdir():
        path.unlink()


def rename(old, new):
    return lambda root: (root / old).rename(root / new)


def write(path, content):
    return lambda root: (root / path).write_bytes(content)


def cut(path):
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:-40])


def deep(root):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(root / "train/b/1.png")


BAD_FOLDERS = {
    "no train": (rename("train", "training"), FileNotFoundError, "train "),
    "no test": (rename("test", "testing"), FileNotFoundError, "test "),
    "train is a file": (lambda r: (rename("train", "x")(r), write("train", b"")(r)), ValueError,
                        "train "),
    "empty class": (empty_class, FileNotFoundError, "train/b holds no images"),
    "class only in test": (rename("test/b", "test/c"), ValueError, "test/c"),
    "text": (write("train/b/1.png", b"hello"), ValueError, "train/b/1.png"),
    "no bytes": (write("train/a/0.png", b""), ValueError, "train/a/0.png"),
    "truncated": (cut("test/b/2.png"), ValueError, "test/b/2.png"),
    "another size": (lambda r: save_image(r / "test/a/1.png", random_images(1, 9)[0]), ValueError,
                     "test/a/1.png cannot be read (9 x 9 pixels)"),
    "not square": (lambda r: save_image(r / "train/a/0.png", random_images(1, 8)[0][:, :5]),
                   ValueError, "train/a/0.png cannot be read (5 x 8 pixels)"),
    "16 bits": (deep, ValueError, "train/b/1.png cannot be read (pixels of kind I;16)"),
}


def make_tiny_imagenet(data_dir, side=64):
    """Write the official layout with two classes, whose order in wnids.txt is not sorted."""
    root = data_dir / "tiny-imagenet-200"
    wnids = ["n02", "n01"]
    for wnid in wnids:
        for i in range(3):
            color = (200, 30, 30) if wnid == "n02" else (30, 30, 200)
            image = np.full((side, side, 3), color, np.uint8)
            save_image(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", image)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
    save_image(root / "train" / "n01" / "images" / "n01_1.JPEG",
               np.full((side, side), 90, np.uint8))  # grey
    for i in range(2):
        image = np.full((side, side, 3), 60, np.uint8)
        save_image(root / "val" / "images" / f"val_{i}.JPEG", image)
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "val" / "val_annotations.txt").write_text(
        "val_1.JPEG\tn01\t0\t0\t63\t63\nval_0.JPEG\tn02\t1\t2\t3\t4\n")
    return root


TINY = "tiny-imagenet-200"
BAD_TINY = {
    "missing": (rename(TINY, "elsewhere"), FileNotFoundError, "CS231n"),
    "no wnids": (rename(f"{TINY}/wnids.txt", "w"), FileNotFoundError, "wnids.txt"),
    "empty wnids": (write(f"{TINY}/wnids.txt", b""), ValueError, "val_annotations.txt"),
    "binary wnids": (write(f"{TINY}/wnids.txt", b"\xff\xfe\xff"), ValueError, "wnids.txt"),
    "class twice": (write(f"{TINY}/wnids.txt", b"n02\nn01\nn01\n"), ValueError, TINY),
    "no annotations": (rename(f"{TINY}/val/val_annotations.txt", "v"), FileNotFoundError,
                       "val_annotations.txt"),
    "empty annotations": (write(f"{TINY}/val/val_annotations.txt", b""), ValueError, "no test"),
    "unknown class": (write(f"{TINY}/val/val_annotations.txt", b"val_0.JPEG\tn03\t0\t0\t1\t1"),
                      ValueError, "n03"),
    "line without class": (write(f"{TINY}/val/val_annotations.txt", b"val_0.JPEG"), ValueError,
                           "'val_0.JPEG'"),
    "no class folder": (rename(f"{TINY}/train/n01", "n"), FileNotFoundError, "train/n01/images"),
    "no val image": (rename(f"{TINY}/val/images/val_0.JPEG", "v"), FileNotFoundError,
                     "val/images/val_0.JPEG"),
    "truncated": (cut(f"{TINY}/val/images/val_1.JPEG"), ValueError, "val/images/val_1.JPEG"),
}


def idx(array, magic):
    return struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.tobytes()


def make_mnist(data_dir, folder="MNIST"):
    """Write the four idx files with 12 + 5 images; return their arrays."""
    raw = data_dir / folder / "raw"
    raw.mkdir(parents=True)
    arrays = []
    for split, n in (("train", 12), ("t10k", 5)):
        x, y = random_images(n, 28, 1)[..., 0], (np.arange(n) % 3).astype(np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(x, 2051))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(y, 2049))
        arrays += [x, y]
    return arrays


MNIST_IMAGES = "train-images-idx3-ubyte"
BAD_IDX = {
    "truncated images": (MNIST_IMAGES, lambda c: c[:-7]),
    "truncated header": (MNIST_IMAGES, lambda c: c[:9]),
    "no bytes": (MNIST_IMAGES, lambda c: b""),
    "not idx": (MNIST_IMAGES, lambda c: b"<html>" * 99),
    "floats": (MNIST_IMAGES, lambda c: struct.pack(">i", 0x0D03) + c[4:]),
    "labels for images": (MNIST_IMAGES, lambda c: idx(np.zeros(12, np.uint8), 2049)),
    "too few labels": ("t10k-labels-idx1-ubyte", lambda c: idx(np.zeros(4, np.uint8), 2049)),
    "truncated labels": ("train-labels-idx1-ubyte", lambda c: c[:-1]),
}


def make_cifar(monkeypatch, data_dir, name):
    """Write an archive whose md5 are expected; return it, its folder, and train and test pixels."""
    import torchvision

    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    key = "labels" if name == "cifar10" else "fine_labels"
    pixels, files = {}, {}
    for file in [file for file, _ in cls.train_list + cls.test_list]:
        pixels[file] = NUMPY_RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
        files[file] = pickle.dumps({"data": pixels[file], key: [0, 1, 1, 0]})
    files[cls.meta["filename"]] = pickle.dumps({cls.meta["key"]: ["cat", "dog"]})
    md5s = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    archive = data_dir / cls.filename
    data_dir.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{cls.base_folder}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(cls, "train_list", [[file, md5s[file]] for file, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [[file, md5s[file]] for file, _ in cls.test_list])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5s[cls.meta["filename"]]})
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive, data_dir / cls.base_folder, [np.concatenate([pixels[f] for f, _ in part])
                                                 for part in (cls.train_list, cls.test_list)]


def write_frames(name, time_steps, classes=10, each=(2, 1), folder=Path("data")):
    """The cache that events.py makes, as if it had read recordings: no tonic is needed."""
    rng, side = np.random.default_rng(0), events.KINDS[name].side
    cache = folder / f"{name}-T{time_steps}-number"
    cache.mkdir(parents=True)
    for split, count in zip(("train", "test"), each):
        labels = np.arange(count * classes) % classes
        x = rng.poisson(0.1 + 0.1 * labels[:, None, None, None, None],
                        (len(labels), time_steps, 2, side, side)).astype(np.uint8)
        np.save(cache / f"x_{split}.npy", x)
        np.save(cache / f"y_{split}.npy", labels)
