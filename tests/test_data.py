"""Tests of data.py: formats, mistakes, augmentation. No network; each test writes its own files.

    python -m pytest -q tests/test_data.py
"""
import gzip
import hashlib
import http.client
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from helpers import (BAD_ARRAYS, BAD_FILES, BAD_FOLDERS, BAD_IDX, BAD_TINY, NUMPY_RNG, TINY,
                     everything_in, good_arrays, make_cifar, make_folder, make_mnist,
                     make_tiny_imagenet, random_images, save_image)


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def message_of(kind, *args, **kwargs):
    """Return the message of load's error, after checking its kind and form."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        data.load(*args, **kwargs)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message
    wrong, expected, rest = message.partition(", expected ")
    assert wrong and expected and ". " in rest, message
    return message


# ---- npz files ----------------------------------------------------------------------------------


def test_embedded_set():
    dataset = data.load("fashion-mini")
    assert dataset.x_train.shape == (6000, 1, 28, 28) and dataset.x_test.shape == (1000, 1, 28, 28)
    assert dataset.y_train.bincount().tolist() == [600] * 10
    assert dataset.y_test.bincount().tolist() == [100] * 10
    assert (dataset.name, dataset.num_classes) == ("fashion-mini", 10)
    assert (Path(data.__file__).parent / "assets/fashion_mini.LICENSE.txt").exists()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2,)])
def test_npz(tmp_path, shape):
    arrays = good_arrays()
    for key in ("x_train", "x_test"):
        arrays[key] = NUMPY_RNG.integers(0, 256, (len(arrays[key]), 9, 9, *shape), dtype=np.uint8)
    arrays["y_train"] = arrays["y_train"].astype(np.uint8)
    dataset = data.load(save(tmp_path / "mine.npz", **arrays))
    for key in ("x_train", "x_test"):
        x = getattr(dataset, key)
        assert x.dtype == torch.uint8 and x.shape[1] == (shape or (1,))[0]
        assert x.is_contiguous(memory_format=torch.channels_last) and 0 not in x.stride()
        assert np.array_equal(x.permute(0, 2, 3, 1).numpy().reshape(arrays[key].shape), arrays[key])
    for key in ("y_train", "y_test"):
        assert getattr(dataset, key).dtype == torch.int64
        assert np.array_equal(getattr(dataset, key), arrays[key])
    assert dataset.num_classes == 3 and dataset.name.endswith("mine.npz")


def test_to_device_moves_the_four_tensors(tmp_path):
    dataset = data.load(save(tmp_path / "mine.npz", **good_arrays())).to("meta")
    assert all(getattr(dataset, key).device.type == "meta" for key in data.KEYS)
    assert dataset.x_train.is_contiguous(memory_format=torch.channels_last)


def test_mean_and_std_are_those_of_the_training_images(tmp_path):
    arrays = good_arrays()
    arrays["x_train"] = random_images(2500)  # more than one part of the histogram
    arrays["y_train"] = np.arange(2500) % 3
    arrays["x_train"][..., 1] = 77
    dataset = data.load(save(tmp_path / "mine.npz", **arrays))
    x = arrays["x_train"] / 255
    np.testing.assert_allclose(dataset.mean, x.mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(dataset.std[::2], x.std((0, 1, 2))[::2], rtol=1e-10)
    assert dataset.std[1] == 1  # constant: 0 would divide by 0
    assert all(type(value) is float for value in dataset.mean + dataset.std)


@pytest.mark.parametrize("damage, text", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays(tmp_path, damage, text):
    arrays = good_arrays()
    damage(arrays)
    path = save(tmp_path / "bad.npz", **arrays)
    before = everything_in(tmp_path)
    message = message_of(ValueError, path)
    assert path in message and text in message
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("damage", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["mine", "cifar100", "tiny-imagenet"])
def test_damaged_npz(tmp_path, name, write, damage):
    path = tmp_path / f"{name}.npz"
    write(path, **good_arrays())
    path.write_bytes(damage(path.read_bytes()))
    before = everything_in(tmp_path)
    message = message_of(ValueError, str(path) if name == "mine" else name, tmp_path)
    assert str(path) in message and "cannot be read" in message
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("name, text", [
    ("cifar-10", "fashion-mini, mnist, fashion-mnist, cifar10, cifar100, tiny-imagenet, n-mnist, "
     "dvs-gesture, cifar10-dvs, or a path"),
    ("nowhere/at/all", "nowhere/at/all"), ("nowhere.npz", "nowhere.npz"),
    ("x" * 5000, "xxx"), ("two\nlines", "two lines"), ("images.zip", "a file of an unknown kind"),
])
def test_wrong_names(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    Path("images.zip").write_bytes(b"PK")
    assert text in message_of(FileNotFoundError, name)
    assert os.listdir() == ["images.zip"]


def test_folder_named_like_an_npz_file(tmp_path):
    (tmp_path / "a.npz").mkdir()
    assert "a.npz" in message_of(ValueError, str(tmp_path / "a.npz"))


# ---- limits -------------------------------------------------------------------------------------


def test_limits_are_balanced_and_in_file_order(tmp_path):
    y = np.array([2, 2, 2, 0, 2, 0, 1, 0, 0, 1, 2])
    x = np.zeros((11, 8, 8), np.uint8) + np.arange(11, dtype=np.uint8)[:, None, None]
    path = save(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)

    def kept(train_limit, at_most=None):
        dataset = data.load(path, train_limit=train_limit, at_most=at_most)
        assert np.array_equal(dataset.y_train, y[dataset.x_train[:, 0, 0, 0].numpy()])
        assert dataset.num_classes == 3
        return dataset

    turns = [3, 6, 0, 5, 9, 1, 7, 2, 8, 4, 10]  # classes 0, 1, 2, 0, 1, 2, 0, 2 (1 has ended), ...
    for limit in range(3, 12):
        dataset = kept(limit)
        assert dataset.x_train[:, 0, 0, 0].tolist() == sorted(turns[:limit])
        assert dataset.mean == pytest.approx([np.mean(turns[:limit]) / 255], rel=1e-12)
        assert len(dataset.x_test) == 11
    for limit in (1, 4, 11, 50):
        for train_limit in (7, None):
            dataset = kept(train_limit, limit)
            first = turns[:min(limit, train_limit or 11)]
            assert dataset.x_train[:, 0, 0, 0].tolist() == sorted(first)
            assert dataset.x_test[:, 0, 0, 0].tolist() == sorted(turns[:limit])
    for limit in (12, 2, 0, -1):
        assert f"--train-limit is {limit}" in message_of(ValueError, path, train_limit=limit)


# ---- image folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder(tmp_path, test):
    pixels = make_folder(tmp_path, test)
    (tmp_path / "train" / "a" / ".hidden").write_bytes(b"no image")
    (tmp_path / "train" / "readme.txt").write_text("not a class")
    dataset = data.load(str(tmp_path))
    for split, x, y in (("train", dataset.x_train, dataset.y_train),
                        (test, dataset.x_test, dataset.y_test)):
        expected = [pixels[tmp_path / split / name / f"{i}.png"] for name in "ab" for i in range(3)]
        assert np.array_equal(x.permute(0, 2, 3, 1), expected)
        assert y.tolist() == [0, 0, 0, 1, 1, 1]
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_folder_is_grey_only_if_all_its_images_are(tmp_path):
    pixels = make_folder(tmp_path)
    for path, image in pixels.items():
        save_image(path, image[..., 0])
    dataset = data.load(str(tmp_path))
    assert dataset.x_train.shape == (6, 1, 8, 8)
    assert np.array_equal(dataset.x_train[3, 0], pixels[tmp_path / "train" / "b" / "0.png"][..., 0])
    assert 0 not in dataset.x_train.stride()
    last = tmp_path / "test" / "b" / "2.png"
    save_image(last, pixels[last])
    dataset = data.load(str(tmp_path))
    assert dataset.x_train.shape == (6, 3, 8, 8)
    assert (dataset.x_train[:, :1] == dataset.x_train).all()


def test_png_with_a_palette_and_transparency(tmp_path):
    make_folder(tmp_path)
    path = tmp_path / "train" / "a" / "0.png"
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(path)
    assert data.load(str(tmp_path)).x_train[0, :, 0, 0].tolist() == [10, 20, 30]
    Image.new("RGBA", (8, 8), (1, 2, 3, 40)).save(path)
    assert data.load(str(tmp_path)).x_train[0, :, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("damage, kind, text", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(tmp_path, damage, kind, text):
    make_folder(tmp_path)
    damage(tmp_path)
    before = everything_in(tmp_path)
    assert f"{tmp_path}/{text}" in message_of(kind, str(tmp_path))
    assert everything_in(tmp_path) == before


def test_tiny_images_in_a_folder(tmp_path):
    make_folder(tmp_path, side=7)
    assert str(tmp_path) in message_of(ValueError, str(tmp_path))


def test_a_damaged_image_stops_the_decoding(tmp_path, monkeypatch):
    make_folder(tmp_path)
    for i in range(2000):
        os.link(tmp_path / "train" / "a" / "0.png", tmp_path / "train" / "b" / f"x{i}.png")
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"")
    opened = []
    really_open = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or really_open(file))
    message_of(ValueError, str(tmp_path))
    assert len(opened) < 1500


# ---- Tiny-ImageNet ------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in data.KEYS)


def test_tiny_imagenet_is_decoded_once(tmp_path, capfd):
    root = make_tiny_imagenet(tmp_path)
    dataset = data.load("tiny-imagenet", tmp_path)
    assert dataset.x_train.shape == (6, 3, 64, 64) and dataset.x_test.shape == (2, 3, 64, 64)
    assert dataset.y_train.tolist() == [0, 0, 0, 1, 1, 1]  # the order of wnids.txt
    assert dataset.y_test.tolist() == [1, 0]
    assert (dataset.x_train[0, 0] > 150).all() and (dataset.x_train[3, 2] > 150).all()
    assert (dataset.x_train[4] - 90.0).abs().max() < 3
    assert sorted(os.listdir(tmp_path)) == ["tiny-imagenet-200", "tiny-imagenet.npz"]
    for path in root.rglob("*.JPEG"):
        path.unlink()
    again = data.load("tiny-imagenet", tmp_path)
    assert same(again, dataset) and again.name == "tiny-imagenet"
    assert (again.mean, again.std) == (dataset.mean, dataset.std)
    assert capfd.readouterr() == ("", "")  # a bar on a terminal only


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_tiny_imagenet_on_a_full_disk(tmp_path, monkeypatch, capsys, call):
    make_tiny_imagenet(tmp_path)

    def full(*args):
        assert not (tmp_path / "tiny-imagenet.npz").exists()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        dataset = data.load("tiny-imagenet", tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("note: ") and "No space left" in out and out.count("\n") == 1
    assert os.listdir(tmp_path) == ["tiny-imagenet-200"]
    assert same(data.load("tiny-imagenet", tmp_path), dataset)


def test_tiny_imagenet_interrupted_while_saving(tmp_path, monkeypatch):
    make_tiny_imagenet(tmp_path)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load("tiny-imagenet", tmp_path)
    assert os.listdir(tmp_path) == ["tiny-imagenet-200"]


@pytest.mark.parametrize("damage, kind, text", BAD_TINY.values(), ids=BAD_TINY)
def test_bad_tiny_imagenet(tmp_path, damage, kind, text):
    make_tiny_imagenet(tmp_path)
    damage(tmp_path)
    before = everything_in(tmp_path)
    message = message_of(kind, "tiny-imagenet", tmp_path)
    assert text in message and f"{tmp_path}/{TINY}" in message
    assert everything_in(tmp_path) == before


# ---- the sets that torchvision reads ------------------------------------------------------------


def zip_files(monkeypatch, raw, name):
    """Turn raw's files into .gz archives whose md5 are expected."""
    import torchvision

    resources = []
    for path in sorted(raw.iterdir()):
        archive = raw / f"{path.name}.gz"
        archive.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        resources.append((archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setattr(getattr(torchvision.datasets, name), "resources", resources)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("is_zipped", [False, True])
def test_mnist(tmp_path, monkeypatch, offline, name, folder, is_zipped):
    x_train, y_train, x_test, y_test = make_mnist(tmp_path, folder)
    if is_zipped:
        zip_files(monkeypatch, tmp_path / folder / "raw", folder)
    dataset = data.load(name, tmp_path)
    assert np.array_equal(dataset.x_train[:, 0], x_train)
    assert np.array_equal(dataset.x_test[:, 0], x_test)
    assert np.array_equal(dataset.y_train, y_train) and np.array_equal(dataset.y_test, y_test)
    assert dataset.name == name and offline == []


class Payload:
    """A pickle that creates a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_mnist_of_old_versions_is_not_read(tmp_path, offline):
    x_train, *_ = make_mnist(tmp_path)
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(4, 28, 28, dtype=torch.uint8), torch.arange(4)), processed / name)
    assert np.array_equal(data.load("mnist", tmp_path).x_train[:, 0], x_train)
    (processed / "training.pt").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    data.load("mnist", tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("file, damage", BAD_IDX.values(), ids=BAD_IDX)
def test_bad_idx_files(tmp_path, offline, file, damage):
    make_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(damage(path.read_bytes()))
    before = everything_in(tmp_path)
    assert str(path.parent) in message_of(ValueError, "mnist", tmp_path)
    assert everything_in(tmp_path) == before and offline == []


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_its_archive(tmp_path, monkeypatch, offline, name):
    archive, folder, (train, test) = make_cifar(monkeypatch, tmp_path / "data", name)
    dataset = data.load(name, tmp_path / "data")
    assert np.array_equal(dataset.x_train, train.reshape(-1, 3, 32, 32))
    assert np.array_equal(dataset.x_test, test.reshape(-1, 3, 32, 32))
    assert dataset.x_train.is_contiguous(memory_format=torch.channels_last)
    assert dataset.y_test.tolist() == [0, 1, 1, 0]
    archive.unlink()  # unpacked by now, and neither fetched nor unpacked again
    before = everything_in(tmp_path)
    assert same(data.load(name, tmp_path / "data"), dataset)
    assert everything_in(tmp_path) == before and offline == []


@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_cifar_with_a_wrong_md5_is_not_unpickled(tmp_path, monkeypatch, offline, file):
    archive, folder, _ = make_cifar(monkeypatch, tmp_path / "data", "cifar100")
    data.load("cifar100", tmp_path / "data")
    (folder / file).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    before = everything_in(tmp_path)
    message = message_of(ValueError, "cifar100", tmp_path / "data")
    assert f"{folder} is damaged" in message and hashlib.md5(
        archive.read_bytes()).hexdigest() in message
    assert everything_in(tmp_path) == before and offline == []
    pickle.loads((folder / file).read_bytes()).close()
    assert (tmp_path / "owned").exists()  # the payload would have worked


def test_cifar_half_unpacked_is_completed_from_its_archive(tmp_path, monkeypatch, offline):
    archive, folder, (train, _) = make_cifar(monkeypatch, tmp_path / "data", "cifar100")
    folder.mkdir()
    (folder / "train").write_bytes(b"half")
    assert np.array_equal(data.load("cifar100", tmp_path / "data").x_train.flatten(1), train)
    assert offline == []


def test_cifar_without_its_meta_file(tmp_path, monkeypatch, offline):
    archive, folder, _ = make_cifar(monkeypatch, tmp_path / "data", "cifar100")
    data.load("cifar100", tmp_path / "data")
    (folder / "meta").unlink()  # torchvision does not unpack again for this
    assert "Delete it, then put" in message_of(ValueError, "cifar100", tmp_path / "data")


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: b""])
def test_damaged_cifar_archive(tmp_path, monkeypatch, offline, damage):
    archive, folder, _ = make_cifar(monkeypatch, tmp_path / "data", "cifar100")
    archive.write_bytes(damage(archive.read_bytes()))
    message = message_of(FileNotFoundError, "cifar100", tmp_path / "data")
    assert archive.name in message and "no network in tests" in message
    assert not folder.exists()


@pytest.mark.parametrize("name, file, place", [
    ("mnist", "t10k-labels-idx1-ubyte.gz (md5 ec29112d", "MNIST/raw"),
    ("fashion-mnist", "train-images-idx3-ubyte.gz (md5 8d4fb7e6", "FashionMNIST/raw"),
    ("cifar10", "cifar-10-python.tar.gz (md5 c58f3010", ""),
    ("cifar100", "cifar-100-python.tar.gz (md5 eb9058c3", ""),
])
def test_failed_download(tmp_path, offline, name, file, place):
    data_dir = tmp_path / "data"
    message = message_of(FileNotFoundError, name, data_dir)
    assert "could not be downloaded" in message
    assert message.count("no network in tests") == 1  # not once for each mirror
    assert file in message and f"mirror into {data_dir / place}," in message
    assert f"{name}.npz into {data_dir}, or pass --data-dir" in message
    assert offline and not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("error", [TimeoutError("timed out"), http.client.IncompleteRead(b"", 9),
                                   ConnectionResetError(104, "Connection reset by peer")])
def test_other_network_errors(tmp_path, monkeypatch, error):
    import torchvision

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", fail)
    assert "cifar-10" in message_of(FileNotFoundError, "cifar10", tmp_path)


def test_data_dir_is_a_file(tmp_path, offline):
    (tmp_path / "data").write_text("")
    for name in ("mnist", "cifar10", "tiny-imagenet"):
        with pytest.raises((ValueError, FileNotFoundError), match="expected"):
            data.load(name, tmp_path / "data")


@pytest.mark.parametrize("name", [*data.TORCHVISION, "tiny-imagenet"])
def test_npz_comes_first_and_keeps_the_name(tmp_path, offline, name):
    arrays = good_arrays()
    save(tmp_path / f"{name}.npz", **arrays)
    if name == "mnist":
        make_mnist(tmp_path)
    dataset = data.load(name, str(tmp_path))
    assert np.array_equal(dataset.x_test.permute(0, 2, 3, 1), arrays["x_test"])
    assert (dataset.name, offline) == (name, [])


@pytest.mark.parametrize("error", [
    ModuleNotFoundError("No module named 'torchvision'"),
    RuntimeError("operator torchvision::nms does not exist"),
    AttributeError("partially initialized module 'torchvision' has no attribute 'extension'")])
def test_torchvision_that_does_not_fit(tmp_path, monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(data.importlib, "import_module", fail)
    for name in ("cifar10", str(tmp_path)):
        make_folder(tmp_path)
        message = message_of(ValueError, name, tmp_path)
        assert 'pip install "torch>=2.11" "torchvision>=0.26"' in message and str(error) in message
    data.load("fashion-mini")  # needs neither torchvision nor Pillow


# ---- batches ------------------------------------------------------------------------------------


def numbered(n, side=8, channels=2):
    """n random images and the labels 0..n-1, so that a label tells the image."""
    x = torch.from_numpy(random_images(n, side, channels)).permute(0, 3, 1, 2)
    return x, torch.arange(n)


def shifted(image, dy, dx):
    """Move the window over an image [C, H, W] by (dy, dx), black outside; one pixel at a time."""
    out = torch.zeros_like(image)
    _, H, W = image.shape
    for y in range(H):
        for x in range(W):
            if 0 <= y + dy < H and 0 <= x + dx < W:
                out[:, y, x] = image[:, y + dy, x + dx]
    return out


def hole_mask(side, y, x, cutout):
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[max(0, y - cutout // 2):max(0, y - cutout // 2 + cutout),
         max(0, x - cutout // 2):max(0, x - cutout // 2 + cutout)] = True
    return mask


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad, flip, cutout", [(2, True, 0), (0, True, 0), (3, False, 0),
                                               (0, False, 4), (1, True, 5), (2, True, 99)])
def test_augmentation_is_that_of_a_plain_loop(channels, pad, flip, cutout):
    side, n = 8, 24
    x, y = numbered(n, side, channels)
    rng = torch.Generator().manual_seed(3)
    top, left = (torch.randint(0, 2 * pad + 1, (n,), generator=rng) for _ in range(2))
    mirror = torch.randint(0, 2, (n,), generator=rng).bool() & flip
    hole_y, hole_x = (torch.randint(0, side, (n,), generator=rng) for _ in range(2))
    out = data._augment(x.permute(0, 2, 3, 1), top, left, mirror, hole_y, hole_x, pad, cutout)
    for i in range(n):
        expected = shifted(x[i], int(top[i]) - pad, int(left[i]) - pad)
        if mirror[i]:
            expected = torch.stack([expected[:, :, side - 1 - column] for column in range(side)], 2)
        if cutout:
            expected[:, hole_mask(side, int(hole_y[i]), int(hole_x[i]), cutout)] = 0
        assert torch.equal(out[i].permute(2, 0, 1), expected)


@pytest.mark.parametrize("side, pad", [(16, 4), (63, 2), (64, 8), (128, 16)])
def test_crops_are_uniform(side, pad):
    """A white dot tells how far an image was moved."""
    n, dot = 2000 if side < 128 else 400, side // 2
    x = torch.zeros(n, 1, side, side, dtype=torch.uint8)
    x[:, :, dot, dot] = 255
    moves = []
    for batch, _ in data.batches(x, torch.arange(n), 100, 0, 0, pad=pad):
        moves.append(batch[:, 0].nonzero()[:, 1:] - dot)
    moves = torch.cat(moves) + pad
    assert len(moves) == n and moves.min() == 0 and moves.max() == 2 * pad
    for counts in (moves[:, 0].bincount(), moves[:, 1].bincount(),
                   (moves.sum(1) % (2 * pad + 1)).bincount()):  # the last: they are independent
        assert len(counts) == 2 * pad + 1
        if side < 128:
            share = counts * (2 * pad + 1) / n
            assert 0.7 < share.min() and share.max() < 1.4


def test_half_of_the_images_are_mirrored():
    x = torch.zeros(4000, 1, 8, 8, dtype=torch.uint8)
    x[..., 0] = 9
    out = torch.cat([b for b, _ in data.batches(x, torch.arange(4000), 999, 0, 0, flip=True)])
    assert 1850 < out[:, 0, 0, 7].count_nonzero() < 2150
    assert torch.equal(out[:, 0, 0, 0] + out[:, 0, 0, 7], torch.full((4000,), 9, dtype=torch.uint8))
    out = torch.cat([b for b, _ in data.batches(x, torch.arange(4000), 999, 0, 0)])
    assert torch.equal(out, x)


def test_holes_have_uniform_centres():
    x = torch.full((6400, 1, 8, 8), 1, dtype=torch.uint8)
    out = torch.cat([b for b, _ in data.batches(x, torch.arange(6400), 999, 0, 0, pad=0, cutout=1)])
    assert ((out == 0).flatten(1).sum(1) == 1).all()
    counts = (out == 0).sum((0, 1))
    assert 50 < counts.min() and counts.max() < 150  # 100 each


@pytest.mark.parametrize("n, batch_size", [(20, 6), (20, 5), (3, 10), (1, 1)])
def test_an_epoch_has_every_image_once(n, batch_size):
    x, y = numbered(n)
    before = x.clone()
    parts = list(data.batches(x, y + 100, batch_size, 0, 0, pad=0, flip=False))
    assert len(parts) == data.num_batches(n, batch_size) == -(-n // batch_size)
    assert [len(labels) for _, labels in parts][:-1] == [batch_size] * (len(parts) - 1)
    labels = torch.cat([labels for _, labels in parts]) - 100
    assert labels.sort().values.tolist() == list(range(n))
    assert torch.equal(torch.cat([batch for batch, _ in parts]), x[labels])
    for batch, labels in parts:
        assert batch.dtype == torch.uint8 and labels.dtype == torch.int64
        assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)


FORTY = numbered(40)


def epoch_of(seed, epoch, first=0, **kwargs):
    x, y = FORTY
    return list(data.batches(x, y, 7, seed, epoch, first,
                             **dict(pad=4, flip=True, cutout=3) | kwargs))


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for x, y in zip(a, b) for p, q in zip(x, y))


def test_an_epoch_depends_on_seed_and_epoch_only():
    torch.manual_seed(1)
    first = epoch_of(5, 3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert equal(first, epoch_of(5, 3))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    orders = {tuple(torch.cat([labels for _, labels in epoch_of(seed, epoch)]).tolist())
              for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36  # seed + epoch, seed * epoch, ... would repeat some
    # Order does not hang on how images are augmented, so that such runs can be compared.
    plain = [labels for _, labels in epoch_of(5, 3, pad=0, flip=False)]
    assert all(torch.equal(a, b) for a, (_, b) in zip(plain, first))


@pytest.mark.parametrize("first", range(8))
def test_resuming_inside_an_epoch(first):
    assert equal(epoch_of(0, 1, first), epoch_of(0, 1)[first:])
