"""model.pt: a network, its masks and its class names in a file.

    torch.save(modelfile.pack(net), "model.pt")
    net = models.load("model.pt")              # reads, checks and builds it
    packed = modelfile.read("model.pt")        # its dict, checked
    net = modelfile.unpack(packed)             # the network of the dict

read_tensors() and complete_state() serve checkpoints too.

The file holds plain types and tensors, and is opened with weights_only=True: nothing in
it is ever run. What is read is checked to the last tensor, since a file may be damaged,
from another program, or made by hand.
"""
import inspect
import pickle
import zipfile

import torch
from torch import Tensor

import models
import plans
from neurons import LIF

FORMAT = 1  # raised when old files can no longer be read
# what a state_dict holds of the data of its training; _extra_state: the class names
NO_WEIGHTS = "mean", "std", "_extra_state"


def pack(net, masks=None):
    """Return what model.pt holds: plain types and tensors, on the CPU.

    masks: {name of a weight: bool tensor, True = alive}; None: net.masks, where they
    still hold; without any all weights are alive.
    Raises ValueError for masks that do not fit the weights, and for weights that do not
    fit net.config, by which models.load() builds the network; for class names of
    another number.
    """
    models.check_masks(net, masks or net.masks or {})
    check_config(net)
    models.check_class_names(net.class_names, net.config["num_classes"], "the network")
    state = {name: tensor.detach().cpu().clone()
             for name, tensor in net.state_dict().items()}
    alive = {name: torch.ones(state[name].shape, dtype=torch.bool)
             for name in models.scored_by(net)}
    if masks is None and net.masks is not None:
        # a weight that has moved since is alive
        masks = {name: mask.cpu() | (state[name] != 0)
                 for name, mask in net.masks.items()}
    alive |= {name: mask.detach().cpu().clone() for name, mask in (masks or {}).items()}
    return {"format": FORMAT, **net.config, "state_dict": state, "masks": alive,
            "normalisation": {"mean": net.mean.tolist(), "std": net.std.tolist()},
            "class_names": net.class_names}


def check_config(net):
    """Raise ValueError unless the parameters of a network have the shapes that
    net.config says."""
    with torch.device("meta"):  # no memory, and no draw from torch's generator
        own = dict(models.build(**net.config).named_parameters())
    for name, parameter in net.named_parameters():
        shape = list(own[name].shape) if name in own else "no such parameter"
        if list(parameter.shape) != shape:
            raise ValueError(f"{name} has shape {list(parameter.shape)}, expected "
                             f"{shape} as net.config says, by which the file is read. "
                             f"Change net.config, or take models.build() for another "
                             f"number of classes")


def read_tensors(path):
    """Return what a file of torch.save holds, on the CPU: plain types and tensors.

    Code in it would be refused and not run. Raises whatever zipfile, pickle and the
    system raise.
    """
    with zipfile.ZipFile(path) as archive:  # torch itself compares no checksums
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its part {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def read(path):
    """Read a model.pt, check it, and return its dict (see pack).

    Raises FileNotFoundError, or ValueError if it is no such file. It is opened with
    weights_only=True: nothing in it is ever run.
    """
    try:
        packed = read_tensors(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}, expected the model.pt of a "
                                f"run") from None
    except Exception as error:  # zipfile, pickle and the system have no common class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = ""
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds pickled objects, such as a whole network"
            remedy = ". Save it by torch.save(modelfile.pack(net), path)"
        raise ValueError(f"{path} cannot be read ({reason}), expected a model.pt that "
                         f"a run of this project has written{remedy}") from None
    keys = {"format", "name", "num_classes", "in_channels", "image_size", "time_steps",
            "widths", "state_dict", "masks", "normalisation"}
    if not isinstance(packed, dict) or not keys <= packed.keys():
        raise ValueError(f"{path} is no model.pt of this project: {contents(packed)}, "
                         f"expected a dict with the keys {', '.join(sorted(keys))}. "
                         f"{remedy_for(packed)}")
    if packed["format"] != FORMAT:
        raise ValueError(f"{path} has format {packed['format']}, expected {FORMAT}: it "
                         f"was written by another version of this project")
    return packed


def neuron_of(packed):
    """Return the `neuron` of build() for what pack() returned; None: the network's own.

    A file that is older than a setting of the network's neuron has LIF's default there.
    """
    neuron = packed.get("neuron")
    if neuron is None:
        return None
    plans.check_name(packed["name"])
    defaults = inspect.signature(LIF).parameters
    missing = plans.NETWORKS[packed["name"]].neuron.keys() - neuron.keys()
    return {key: defaults[key].default for key in missing} | neuron


def contents(value):
    """Return in words what a file of torch.save holds, for the message of read()."""
    if not isinstance(value, dict):
        return f"it holds a {type(value).__name__}"
    if not value:
        return "it holds an empty dict"
    keys = [str(key) for key in value]
    shown = ", ".join(keys[:5])
    if len(keys) > 5:
        shown += f" and {len(keys) - 5} more"
    return f"it holds a dict with the keys {shown}"


def remedy_for(value):
    """Return in a sentence what to do with such a file instead."""
    if isinstance(value, dict) and "parts" in value:  # a checkpoint
        return "Give the model.pt of a run that is finished"
    if isinstance(value, dict) and value and all(
            isinstance(item, Tensor) for item in value.values()):
        return ("To use a state_dict: models.build(...), load_state_dict(...), "
                "modelfile.pack(net)")
    return "Give the model.pt of a run"


def complete_state(net, state):
    """Return a state_dict with the mean, std and class names of a network, where it is
    an older one that has none."""
    own = net.state_dict()
    return {key: own[key] for key in NO_WEIGHTS} | state


def unpack(packed, source="model.pt"):
    """Return the network that pack() was given, in eval mode; `source` is named in
    errors."""
    arguments = ("name", "num_classes", "in_channels", "image_size", "time_steps",
                 "widths")
    try:
        net = models.build(
            **{key: packed[key] for key in arguments}, neuron=neuron_of(packed),
            encoding=packed.get("encoding", "direct"),  # not in older files
            bn_per_step=packed.get("bn_per_step", False))
        models.mask_neurons(net, {key.removesuffix(".mask"): tensor
                                  for key, tensor in packed["state_dict"].items()
                                  if key.endswith(".mask")})
        net.load_state_dict(complete_state(net, packed["state_dict"]))
        normalisation = packed["normalisation"]
        net.set_normalisation(normalisation["mean"], normalisation["std"])
        masks = {name: (mask.shape, mask.dtype)
                 for name, mask in packed["masks"].items()}
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{source} does not hold the tensors of its own network: "
                         f"{detail}") from None
    for name, tensor in net.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} is not finite (NaN or infinite), "
                             f"expected numbers")
    for name, mask in models.neuron_masks(net).items():
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"{source}: the mask of {name} is not binary, expected 1 "
                             f"for a neuron that is alive and 0 for a dead one")
    for name, module in net.named_modules():
        if isinstance(module, models.PickBN):
            picked = module.picked.tolist()
            if sorted({*picked} & {*range(module.stream)}) != picked:
                raise ValueError(f"{source}: {name} picks other than channels of a "
                                 f"stream of {module.stream}, expected each one once "
                                 f"and in order")
    for name in models.scored_by(net):
        if masks.pop(name, None) != (net.get_parameter(name).shape, torch.bool):
            raise ValueError(f"{source} holds no mask that fits {name}")
    if masks:
        raise ValueError(f"{source} holds masks of no weight of its network: "
                         f"{', '.join(masks)}")
    for name, mask in packed["masks"].items():
        if net.get_parameter(name)[~mask].count_nonzero():
            raise ValueError(f"{source}: weights of {name} that its mask says are "
                             f"pruned are not 0")
    class_names = packed.get("class_names")  # not in older files
    models.check_class_names(class_names, packed["num_classes"], source)
    net.class_names, net.masks = class_names, dict(packed["masks"])
    return net.eval()
