"""Spiking networks, each built from a list of widths: VGG-16, ResNet-19, a small VGG, and those of
the other papers.

    net = models.build("vgg16", num_classes=100, in_channels=3, image_size=32, time_steps=5)
    logits = net(images)                          # [N, C, H, W] -> [T, N, num_classes]
    net = models.load("runs/NAME/model.pt")       # a trained, pruned network, ready to predict
    label = net(images).sum(0).argmax(1)          # the prediction is the sum over time

The networks are those of LTH-SNN (Kim et al., ECCV 2022, arXiv 2207.01382), the set-up that the
criticality paper follows. Convolutions are 3x3 without bias, since batch normalisation (BN)
follows; max-pooling keeps spikes binary. A network slimmed by prune_structured.py is the same code
with other widths.

Time: layers without state see [T*N, ...] in one call; only the LIF sees T. Direct coding: an image
is the same at every step, so the first convolution and its BN run once and not T times. BN has one
set of parameters for all steps and takes its statistics over T*N*H*W together. This differs from
LTH-SNN's code, which calls BN once a step (statistics over N*H*W): one call is faster.

uint8 images are normalised by the network itself: (x / 255 - mean) / std. Images that are floating
point already are taken as they come. Other encodings of the input: "rate", a pixel in 0..1 is the
probability of a spike at each step (the network draws them: from torch's generator in training, in
eval mode from a seed, so that a prediction is always the same); "events", frames [T, N, 2, H, W]
of event counts, taken as they come.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import plans
from harness.files import read_tensors
from neurons import LIF
from plans import ENCODINGS, RESNET_STAGES, default_widths

NAMES = plans.NAMES
FORMAT = 1  # of model.pt; raised when old files can no longer be read


def build(name, num_classes, in_channels, image_size, time_steps, widths=None, encoding="direct",
          neuron=None):
    """Return a freshly initialised network; it draws its weights from torch's global generator.

    name: one of NAMES. image_size: pixels, of square images. widths: the channels of each layer
    (see default_widths): one a convolution or hidden linear layer; ResNet-19, 18 numbers: the stem,
    then inner and outer channels of each of the 8 blocks, then fc1. encoding: of the input,
    "direct" | "rate" | "events". neuron: a dict of arguments of LIF; those that it does not name
    are the network's own (plans.NEURONS).
    Raises ValueError for names, sizes and widths that do not make a network.
    """
    plans.check_name(name)
    sizes = dict(num_classes=num_classes, in_channels=in_channels, image_size=image_size,
                 time_steps=time_steps)
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is {value!r}, expected a whole number of at least 1")
    widths = default_widths(name) if widths is None else list(widths)
    if len(widths) != len(default_widths(name)) or not all(
            isinstance(w, int) and w >= 1 for w in widths):
        raise ValueError(f"{name} got widths {widths}, expected {len(default_widths(name))} whole "
                         f"numbers of at least 1, such as {default_widths(name)}")
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding is {encoding!r}, expected one of {', '.join(ENCODINGS)}")
    neuron = plans.NEURONS.get(name, {}) | (neuron or {})
    if name == "resnet19":
        net = ResNet19(num_classes, in_channels, image_size, time_steps, widths, neuron)
    else:
        net = VGG(plans.VGG_PLANS[name], num_classes, in_channels, image_size, time_steps, widths,
                  32 if name == "vgg16" else 1, neuron, **plans.USUAL | plans.TRAITS.get(name, {}))
    if name in plans.LTH_START:
        for module in net.modules():  # LTH-SNN's initialisation; BN's is 1 and 0
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(net.fc.weight, 0, 0.01)
        nn.init.zeros_(net.fc.bias)
    net.encoding = encoding
    net.config = dict(name=name, **sizes, widths=widths, encoding=encoding, neuron=neuron)
    return net


def fused(layer, x_seq):
    """Apply a layer without state to [T, N, ...] in one call on [T*N, ...]."""
    return layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


class ConvBN(nn.Sequential):
    """Convolution without bias, then batch normalisation; [N, C, H, W] -> [N, C', H', W']. Without
    `norm` the convolution alone, with or without a bias."""

    def __init__(self, in_channels, channels, kernel=3, stride=1, norm=True, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2,
                              bias=bias and not norm)
        if norm:
            self.bn = nn.BatchNorm2d(channels)


class SpikingNet(nn.Module):
    """What the networks share: normalisation, padding and the first layer of direct coding.

    averaged: {name of a layer: number of spikes that each of its inputs is the average of}; empty
    where all layers but the first read spikes.
    """

    def __init__(self, in_channels, time_steps):
        super().__init__()
        self.time_steps, self.encoding = time_steps, "direct"
        self.averaged = {}
        # not in the state_dict: they belong to the data, and model.pt has a place for them
        self.register_buffer("mean", torch.zeros(in_channels), persistent=False)
        self.register_buffer("std", torch.ones(in_channels), persistent=False)

    def set_normalisation(self, mean, std):
        """Give the mean and standard deviation of each input channel, of pixels in 0..1."""
        self.mean.copy_(torch.as_tensor(mean))
        self.std.copy_(torch.as_tensor(std))

    def _encode(self, first, lif, x, pad_to=1):
        """Return the spikes of the first LIF, [T, N, C, H, W].

        x: [N, C, H, W], which the first conv + BN see once, or [T, N, C, H, W] for data with a time
        axis, of which the first time_steps count. Sides are padded with zeros (black) to a multiple
        of pad_to.
        """
        if x.dim() not in (4, 5) or x.shape[-3] != len(self.mean):
            raise ValueError(f"the network got shape {tuple(x.shape)}, expected [N, C, H, W] or "
                             f"[T, N, C, H, W] with C = {len(self.mean)}")
        if self.encoding == "events" and x.dim() == 4:
            raise ValueError(f"the network got shape {tuple(x.shape)}, expected frames of events "
                             f"[T, N, C, H, W]. Put their time axis first")
        x_seq = x[:self.time_steps] if x.dim() == 5 else x.unsqueeze(0)
        if self.encoding != "direct":
            x_seq = x_seq.to(self.mean.dtype) if x.dim() == 5 else self._spikes(x)
        missing = -x.shape[-1] % pad_to
        if missing:
            before = missing // 2
            x_seq = F.pad(x_seq, (before, missing - before) * 2)
        if x_seq.dtype == torch.uint8:
            mean, std = self.mean.view(-1, 1, 1), self.std.view(-1, 1, 1)
            x_seq = (x_seq.to(self.mean.dtype) / 255 - mean) / std
        return lif(fused(first, x_seq), self.time_steps if x.dim() == 4 else None)

    @torch.compiler.disable  # one break, where the seeded generator would make many
    def _spikes(self, x):
        """Return spikes drawn with the probabilities of pixels [N, C, H, W], [T, N, C, H, W]. In
        eval mode all images share one seeded draw: the prediction of one depends on it alone."""
        chance = x.to(self.mean.dtype) / 255 if x.dtype == torch.uint8 else x
        seeded = None if self.training else torch.Generator(x.device).manual_seed(0)
        shape = x.shape if self.training else (1, *x.shape[1:])
        drawn = torch.rand(self.time_steps, *shape, generator=seeded, device=x.device,
                           dtype=chance.dtype)
        return (drawn < chance).to(chance.dtype)


class VGG(SpikingNet):
    """Conv + BN + LIF in a row, pooling between, one linear layer on the flattened last map; hidden
    linear layers + LIF before it where the plan has some.

    At 32x32 VGG-16 ends in 1x1, at 64x64 in 2x2, which is flattened so that spikes stay binary.
    """

    def __init__(self, plan, num_classes, in_channels, image_size, time_steps, widths, pad_to,
                 neuron, spikes, votes, norm, bias):
        super().__init__(in_channels, time_steps)
        self.pad_to, self.votes, self.drops = pad_to, votes, "D" in plan
        side, size, last = image_size + -image_size % pad_to, in_channels, None
        self.convs, self.lifs, self.pooled = nn.ModuleList(), nn.ModuleList(), []
        maps = [step for step in plan[:(plan + ["F"]).index("F")] if step != "D"]
        for step in maps:
            if last == "A":  # the layer after this pooling
                self.averaged[f"convs.{len(self.convs)}.conv"] = 4
            if step in ("P", "A"):
                self.pooled[-1] = step
                side //= 2
            else:
                self.convs.append(ConvBN(size, widths[len(self.convs)], norm=norm, bias=bias))
                self.lifs.append(LIF(**neuron))
                self.pooled.append(None)
                size = widths[len(self.convs) - 1]
            last = step
        if side < 1:
            n = len(maps) - len(self.convs)
            raise ValueError(f"image_size is {image_size}, too small for {n} poolings; expected at "
                             f"least {2 ** n} pixels")
        size *= side**2
        if "F" in plan:
            self.hidden = nn.ModuleList()
        for width in widths[len(self.convs):]:
            self.hidden.append(nn.Linear(size, width, bias))
            self.lifs.append(LIF(**neuron))
            size = width
        self.fc = nn.Linear(size, num_classes * votes, bias)
        if last == "A":
            self.averaged["hidden.0" if "F" in plan else "fc"] = 4
        self.lif_out = LIF(**neuron) if spikes else None

    def forward(self, x):
        spikes, lifs = None, iter(self.lifs)
        for conv, pooled in zip(self.convs, self.pooled):
            spikes = (self._encode(conv, next(lifs), x, self.pad_to) if spikes is None
                      else next(lifs)(fused(conv, spikes)))
            if pooled:
                pool = F.max_pool2d if pooled == "P" else F.avg_pool2d
                spikes = fused(lambda maps: pool(maps, 2), spikes)
        spikes = spikes if spikes is None else spikes.flatten(2)
        if self.drops and self.training:
            spikes = spikes * F.dropout(torch.ones_like(spikes[0]))  # one mask for all T
        for layer in getattr(self, "hidden", ()):
            spikes = (self._encode(lambda image: layer(image.flatten(1)), next(lifs), x)
                      if spikes is None else next(lifs)(fused(layer, spikes)))
        out = fused(self.fc, spikes)  # [T, N, num_classes * votes]
        out = out if self.lif_out is None else self.lif_out(out)
        return out if self.votes == 1 else out.unflatten(2, (-1, self.votes)).mean(3)

    def _layers(self):
        """Return (layer, LIF, weight that reads it, indices that one channel owns there) of all
        layers but the output."""
        convs = [f"convs.{i}" for i in range(len(self.convs))]
        hidden = [f"hidden.{i}" for i in range(len(self.lifs) - len(convs))]
        readers = [f"{name}.conv.weight" for name in convs] + [
            f"{name}.weight" for name in hidden] + ["fc.weight"]
        rows = []
        for i, name in enumerate(convs + hidden):
            repeat = 1
            if i == len(convs) - 1:  # flattened
                repeat = self.get_parameter(readers[i + 1]).shape[1] // len(
                    self.convs[i].conv.weight)
            rows.append((name, f"lifs.{i}", readers[i], readers[i + 1], repeat))
        return rows

    def scored_by(self):
        rows = self._layers()
        names = {weight: Scored(lif, 0) for _, lif, weight, _, _ in rows}
        _, lif, _, _, repeat = rows[-1]
        return names | {"fc.weight": Scored(lif, 1, repeat) if self.lif_out is None
                        else Scored("lif_out", 0)}

    def removable(self):
        return {name: Removable(i, lif, reader, repeat)
                for i, (name, lif, _, reader, repeat) in enumerate(self._layers())
                if name.startswith("convs")}


class Block(nn.Module):
    """conv-BN-LIF-conv-BN, plus the shortcut, then LIF: the sum is taken before the neuron."""

    def __init__(self, in_channels, inner, channels, stride, **neuron):
        super().__init__()
        self.conv1, self.lif1 = ConvBN(in_channels, inner, stride=stride), LIF(**neuron)
        self.conv2, self.lif2 = ConvBN(inner, channels), LIF(**neuron)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = ConvBN(in_channels, channels, kernel=1, stride=stride)

    def forward(self, spikes):
        shortcut = spikes if self.shortcut is None else fused(self.shortcut, spikes)
        return self.lif2(fused(self.conv2, self.lif1(fused(self.conv1, spikes))) + shortcut)


class ResNet19(SpikingNet):
    """LTH-SNN's ResNet-19: stem 64, stages of 3, 3, 2 blocks with 128, 256, 512 channels, each
    stage starting with stride 2, global average pooling, fc1 + LIF, fc2.

    Another network that goes by this name (tdBN's: stem 128, first stage at full resolution) has
    four times the MACs there: accuracies of the two are not to be compared.
    """

    def __init__(self, num_classes, in_channels, image_size, time_steps, widths, neuron):
        super().__init__(in_channels, time_steps)
        stem, *pairs, hidden = widths
        side = math.ceil(image_size / 2 ** len(RESNET_STAGES))  # stages halve the map, rounding up
        self.averaged = {"fc1": side**2}
        self.stem, self.lif = ConvBN(in_channels, stem), LIF(**neuron)
        self.blocks, channels = nn.ModuleList(), stem
        for stage, count in enumerate(RESNET_STAGES):
            start = sum(RESNET_STAGES[:stage])
            outs = {pairs[2 * (start + i) + 1] for i in range(count)}
            if len(outs) > 1:
                raise ValueError(f"the blocks of stage {stage + 1} have outputs of {sorted(outs)} "
                                 f"channels, expected one number: they are added to each other")
            for i in range(count):
                inner, out = pairs[2 * (start + i):][:2]
                self.blocks.append(Block(channels, inner, out, 2 if i == 0 else 1, **neuron))
                channels = out
        self.fc1, self.lif_fc = nn.Linear(channels, hidden), LIF(**neuron)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x):
        spikes = self._encode(self.stem, self.lif, x)
        for block in self.blocks:
            spikes = block(spikes)
        pooled = spikes.mean((3, 4))  # [T, N, C]; no longer binary
        return fused(self.fc2, self.lif_fc(fused(self.fc1, pooled)))

    def scored_by(self):
        scored = {"stem.conv.weight": Scored("lif", 0)}
        for i, block in enumerate(self.blocks):
            scored[f"blocks.{i}.conv1.conv.weight"] = Scored(f"blocks.{i}.lif1", 0)
            scored[f"blocks.{i}.conv2.conv.weight"] = Scored(f"blocks.{i}.lif2", 0)
            if block.shortcut is not None:
                scored[f"blocks.{i}.shortcut.conv.weight"] = Scored(f"blocks.{i}.lif2", 0)
        return scored | {"fc1.weight": Scored("lif_fc", 0), "fc2.weight": Scored("lif_fc", 1)}

    def removable(self):
        return {f"blocks.{i}.conv1": Removable(1 + 2 * i, f"blocks.{i}.lif1",
                                               f"blocks.{i}.conv2.conv.weight")
                for i in range(len(self.blocks))}


class Scored(NamedTuple):
    """Which LIF scores a weight: its name, the weight's dimension that its channels run along (0:
    the neuron that the weight feeds; 1: the one that it reads), and how many neighbouring indices
    of that dimension one channel owns (more than 1 where a map was flattened)."""

    lif: str
    dim: int
    repeat: int = 1


def scored_by(net):
    """Return {name of a prunable weight: Scored}, in the order of the network.

    INTERPRETATION: a weight inherits the score of the LIF channel that it feeds (post-synaptic, the
    neuron's "synapses"). In a residual block conv2 and the shortcut both feed lif2. The classifier
    feeds no LIF: its weights take the score of the channel that they read.
    """
    return net.scored_by()


class Removable(NamedTuple):
    """Where the output channels of a ConvBN go: the place of their number in the list of widths,
    the LIF that they feed, the weight that reads them along its dimension 1, and how many
    neighbouring indices of it one channel owns (more than 1 where a map was flattened)."""

    width: int
    lif: str
    reader: str
    repeat: int = 1


def removable(net):
    """Return {name of a ConvBN whose channels can be removed: Removable}, in the network's order.

    VGG: every convolution, with BN or without. ResNet-19: the inner channels of each block; block
    outputs are added to each other, so their number is that of the whole stage.
    """
    return net.removable()


def lifs(net):
    """Return {name: LIF} in the order of the network."""
    return {name: module for name, module in net.named_modules() if isinstance(module, LIF)}


def record(net, aggregate):
    """Let each LIF keep the criticality of its next batches ("max" | "mean"), or none (None)."""
    for lif in lifs(net).values():
        lif.record = aggregate


def pack(net, masks=None):
    """Return what model.pt holds: plain types and tensors, on the CPU.

    masks: {name of a weight: bool tensor, True = alive}; none means that all weights are alive.
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in net.state_dict().items()}
    alive = {name: torch.ones(state[name].shape, dtype=torch.bool) for name in scored_by(net)}
    alive |= {name: mask.detach().cpu().clone() for name, mask in (masks or {}).items()}
    return {"format": FORMAT, **net.config, "state_dict": state, "masks": alive,
            "normalisation": {"mean": net.mean.tolist(), "std": net.std.tolist()}}


def read(path):
    """Read a model.pt, check it, and return its dict (see pack); raise ValueError if it is none.

    Files are opened with weights_only=True: nothing in them is ever run.
    """
    try:
        packed = read_tensors(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}, expected the "
                                f"model.pt of a run") from None
    except Exception as error:  # torch.load raises what zipfile, pickle and the system raise
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read ({first_line}), expected a model.pt that a run of "
                         f"this project has written") from None
    keys = {"format", "name", "num_classes", "in_channels", "image_size", "time_steps", "widths",
            "state_dict", "masks", "normalisation"}
    if not isinstance(packed, dict) or not keys <= packed.keys():
        raise ValueError(f"{path} is no model.pt of this project: expected a dict with the keys "
                         f"{', '.join(sorted(keys))}")
    if packed["format"] != FORMAT:
        raise ValueError(f"{path} has format {packed['format']}, expected {FORMAT}: it was written "
                         f"by another version of this project")
    return packed


def unpack(packed, source="model.pt"):
    """Return the network that pack() was given, in eval mode; `source` is named in errors."""
    arguments = ("name", "num_classes", "in_channels", "image_size", "time_steps", "widths")
    try:
        net = build(**{key: packed[key] for key in arguments},  # older files have neither of these
                    encoding=packed.get("encoding", "direct"), neuron=packed.get("neuron"))
        net.load_state_dict(packed["state_dict"])
        net.set_normalisation(packed["normalisation"]["mean"], packed["normalisation"]["std"])
        masks = {name: (mask.shape, mask.dtype) for name, mask in packed["masks"].items()}
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{source} does not hold the tensors of its own network: "
                         f"{detail}") from None
    for name, tensor in net.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} is not finite (NaN or infinite), expected numbers")
    for name in scored_by(net):
        if masks.pop(name, None) != (net.get_parameter(name).shape, torch.bool):
            raise ValueError(f"{source} holds no mask that fits {name}")
    if masks:
        raise ValueError(f"{source} holds masks of no weight of its network: {', '.join(masks)}")
    for name, mask in packed["masks"].items():
        if net.get_parameter(name)[~mask].count_nonzero():
            raise ValueError(f"{source}: weights of {name} that its mask says are pruned are not 0")
    return net.eval()


def load(path):
    """Return the network of a run's model.pt, in eval mode, on the CPU: it predicts at once.

    Its input is [N, C, H, W]: uint8 pixels, or floating point that is normalised already. Raises
    FileNotFoundError, or ValueError for a file that is not such a network.
    """
    return unpack(read(path), str(path))
