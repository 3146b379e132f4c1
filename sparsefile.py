"""A network as a small file: of each prunable weight only what is alive.

    sparsefile.save(net, "model.sparse.gz")
    net = sparsefile.load("model.sparse.gz")     # the same network, with its masks

The file is an archive of numpy in gzip, np.load(gzip.open(path)):

- NAME.gaps, NAME.values, for each prunable weight NAME: the alive ones in the order of
  the flattened weight. A gap is the distance from the alive weight before it, the first
  one from place -1. Gaps are small numbers: uint8 where no gap is above 255.
- each other tensor of the state_dict, whole, under its own name.
- settings: JSON, what models.build needs and what else model.pt holds.

Values keep all their bits, and a weight that is alive and 0 stays alive. A network with
few dead weights gains nothing.
"""
import gzip
import io
import json
import os
import secrets
from contextlib import suppress

import numpy as np
import torch

import modelfile


def gaps_of(mask):
    """Return the distance of each alive weight from the one before, the first from
    place -1, in the smallest unsigned type that holds them.

    mask: bool tensor, True = alive.
    """
    places = mask.flatten().nonzero().flatten().numpy()
    gaps = np.diff(places, prepend=-1)
    return gaps.astype(np.min_scalar_type(gaps.max(initial=0)))


def pack(packed):
    """Return the arrays of the file, {name: array}. packed: what modelfile.pack gives.
    """
    settings = {key: value for key, value in packed.items()
                if key not in ("state_dict", "masks")}
    settings["shapes"] = {name: list(mask.shape)
                          for name, mask in packed["masks"].items()}
    arrays = {"settings": np.array(json.dumps(settings))}
    for name, tensor in packed["state_dict"].items():
        if name in packed["masks"]:
            mask = packed["masks"][name]
            arrays[f"{name}.gaps"] = gaps_of(mask)
            arrays[f"{name}.values"] = tensor[mask].numpy()
        else:
            arrays[name] = tensor.numpy()
    return arrays


def unpack(arrays):
    """Return what modelfile.pack returned, from the arrays of pack()."""
    packed = json.loads(str(arrays["settings"]))
    shapes = packed.pop("shapes")
    parts = {f"{name}.{part}" for name in shapes for part in ("gaps", "values")}
    state = {name: torch.from_numpy(array) for name, array in arrays.items()
             if name not in parts | {"settings"}}
    masks = {}
    for name, shape in shapes.items():
        places = torch.from_numpy(arrays[f"{name}.gaps"].astype(np.int64).cumsum() - 1)
        values = torch.from_numpy(arrays[f"{name}.values"])
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[places] = True
        weight = torch.zeros(shape, dtype=values.dtype)
        weight.view(-1)[places] = values
        state[name], masks[name] = weight, mask
    return {**packed, "state_dict": state, "masks": masks}


def content_of(net, masks=None):
    """Return the bytes of the file. masks: see modelfile.pack."""
    content = io.BytesIO()
    np.savez(content, **pack(modelfile.pack(net, masks)))
    return gzip.compress(content.getvalue(), mtime=0)


def save(net, path, masks=None):
    """Write a network and its masks, under a temporary name that is then replaced: what
    the file held before is kept until all is written. masks: see modelfile.pack."""
    content, temporary = content_of(net, masks), f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def load(path):
    """Return the network of such a file, in eval mode, on the CPU, as models.load does.

    path: of it, or a binary file object.
    Raises FileNotFoundError, or ValueError if it is no such file.
    """
    try:
        with gzip.open(path) as file, np.load(file, allow_pickle=False) as archive:
            packed = unpack({name: archive[name] for name in archive.files})
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}, expected one of "
                                f"export.py --sparse") from None
    except Exception as error:  # of zipfile, numpy and json, which have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}), expected a file of "
                         f"export.py --sparse. Write it again") from None
    return modelfile.unpack(packed, str(path))
