"""Spiking networks, each built from a list of widths: VGG-16, ResNet-19, a small VGG,
and those of the other papers.

    net = models.build("vgg16", num_classes=100, in_channels=3, image_size=32,
                       time_steps=5)
    logits = net(images)                       # [N, C, H, W] -> [T, N, num_classes]
    net = models.load("runs/NAME/model.pt")    # a trained, pruned network
    label = net(images).sum(0).argmax(1)       # it predicts by the sum over time
    found = models.predict(net, images)        # the same, checked, with probabilities

VGG-16 and ResNet-19 are those of LTH-SNN (Kim et al., ECCV 2022, arXiv 2207.01382), the
set-up that the criticality paper follows. plans.py has a row for each network,
inputs.py says what one may be given, modelfile.py writes and reads its file.
Convolutions are 3x3 without bias where batch normalisation (BN) follows; max-pooling
keeps spikes binary. A network slimmed by prune_structured.py is the same code with
other widths.

Time: layers without state see [T*N, ...] in one call; only the LIF sees T. Direct
coding: an image is the same at every step, so the first convolution and its BN run once
and not T times. BN has one set of parameters for all steps and takes its statistics
over T*N*H*W together. LTH-SNN's code calls BN once a step instead (statistics over
N*H*W), which is slower; so does the criticality paper's published code for channels:
bn_per_step.

uint8 images are normalised by the network itself: (x / 255 - mean) / std. Its mean and
std, and the names of its classes, are in the state_dict. Images that are floating
point are taken as they are: they are normalised already. predict() takes uint8 and
floats in 0..1. Other encodings of the input:
- "rate": a pixel in 0..1 is the probability of a spike at each step. The network draws
  them, in training from torch's generator, in eval mode from a fixed seed, so that a
  prediction is always the same;
- "events": frames [T, N, 2, H, W] of event counts, taken as they are.
"""
import functools
import json
import warnings
import weakref
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import inputs
import plans
from kernels import FastLIF
from neurons import LIF
from plans import ENCODINGS, default_widths

NAMES = plans.NAMES


def build(name, num_classes, in_channels, image_size, time_steps, widths=None,
          encoding="direct", neuron=None, bn_per_step=False):
    """Return a freshly initialised network; torch's global generator draws its weights.

    name: one of NAMES, the rows of plans.NETWORKS.
    image_size: pixels, of square images.
    widths: the channels of each layer (see default_widths), one number a convolution or
    hidden linear layer. ResNet-19 has 18: the stem, then inner and outer channels of
    each of the 8 blocks, then fc1. The pre-activation one has 26 (see PreResNet19).
    encoding: of the input, "direct" | "rate" | "events".
    neuron: a dict of arguments of LIF; those that it does not name are the network's
    own.
    bn_per_step: whether BN takes its statistics, in training, at each time step by
    itself. An image that is the same at each step is seen once all the same.
    The network has these attributes: config, the arguments, a dict. class_names, a list
    of num_classes strings, and masks, {name of a weight: bool tensor, True = alive}:
    None, until load(), a masks.Masks of the network or keep_zeros() sets them.
    Raises ValueError for names, sizes and widths that do not make a network.
    """
    plans.check_name(name)
    sizes = dict(num_classes=num_classes, in_channels=in_channels,
                 image_size=image_size, time_steps=time_steps)
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is {value!r}, expected a whole number of at least "
                             f"1")
    plan, usual = plans.NETWORKS[name], default_widths(name)
    widths = usual if widths is None else list(widths)
    least = 0 if plan.preactivation else 1  # a block may be left without inner channels
    are_numbers = all(isinstance(width, int) and width >= least for width in widths)
    if len(widths) != len(usual) or not are_numbers:
        raise ValueError(f"{name} got widths {widths}, expected {len(usual)} whole "
                         f"numbers of at least {least}, such as {usual}")
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding is {encoding!r}, expected one of "
                         f"{', '.join(ENCODINGS)}")
    neuron = settings_of(plan, neuron or {})
    network = VGG
    if plan.stages:
        network = PreResNet19 if plan.preactivation else ResNet19
    net = network(plan, num_classes, in_channels, image_size, time_steps, widths,
                  neuron)
    if plan.start == "lth-snn":
        start_as_lth_snn(net)
    for module in net.modules():
        if isinstance(module, (ConvBN, PickBN)):
            module.bn_per_step = bn_per_step
    net.encoding = encoding
    net.config = dict(name=name, **sizes, widths=widths, encoding=encoding,
                      neuron=neuron, bn_per_step=bn_per_step)
    net.class_names = net.masks = None
    return net


def settings_of(plan, given):
    """Return the arguments of LIF in a network, a dict; under "linear" are those behind
    linear layers, if the plan has others there.

    given: arguments that take the place of the plan's, in all layers; or a dict that
    this function has returned, which stays as it is. Raises ValueError for "linear" in
    a ResNet-19, whose neurons are all alike.
    """
    if "linear" in given and plan.stages:
        raise ValueError(f"neuron has the key linear: {given['linear']!r}, expected "
                         f"arguments of LIF alone in a ResNet-19, whose neurons are "
                         f"all alike. Leave it out")
    everywhere = {key: value for key, value in given.items() if key != "linear"}
    settings = plan.neuron | everywhere
    if plan.linear_neuron or "linear" in given:
        linear = plan.neuron | plan.linear_neuron | everywhere
        settings["linear"] = linear | given.get("linear", {})
    return settings


def start_as_lth_snn(net):
    """Draw the initial weights of LTH-SNN's code: convolutions by Kaiming's rule (fan
    out), the output layer with a standard deviation of 0.01; its bias is 0. BN starts
    at 1 and 0 by itself."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(net.fc.weight, 0, 0.01)
    nn.init.zeros_(net.fc.bias)


# ---- layers --------------------------------------------------------------------------


def fused(layer, x_seq):
    """Apply a layer without state to [T, N, ...] in one call on [T*N, ...]."""
    return layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that takes the pixels of its stride first: the same function.

    torch's own gradient of a strided one, in channels_last memory on a CPU, writes
    beyond its tensors where there are few channels (seen with torch 2.14).
    """

    def forward(self, x):
        rows, columns = self.stride
        return F.conv2d(x[..., ::rows, ::columns], self.weight, self.bias)


def normalised(bn, x_seq, per_step):
    """Apply batch normalisation to [T, N, C, H, W]. per_step: in training, to each time
    step by itself. In eval mode that is the same."""
    if per_step and bn.training:
        return torch.stack([bn(x) for x in x_seq])
    return fused(bn, x_seq)


def conv2d(in_channels, channels, kernel=3, stride=1, bias=False):
    """Return a convolution that keeps the size of a map, divided by its stride."""
    Conv2d = PointwiseConv2d if kernel == 1 else nn.Conv2d
    return Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=bias)


class ConvBN(nn.Module):
    """Convolution without bias, then batch normalisation: [T, N, C, H, W] -> [T, N, C',
    H', W']. Without `norm` it is the convolution alone, with or without a bias."""

    bn_per_step = False  # see build()

    def __init__(self, in_channels, channels, kernel=3, stride=1, norm=True, bias=True):
        super().__init__()
        self.conv = conv2d(in_channels, channels, kernel, stride, bias and not norm)
        if norm:
            self.bn = nn.BatchNorm2d(channels)

    def forward(self, x_seq):
        if not hasattr(self, "bn"):
            return fused(self.conv, x_seq)
        if self.bn_per_step:
            return normalised(self.bn, fused(self.conv, x_seq), self.bn_per_step)
        # in one call, so that BN sees the convolution's own layout in memory: for a
        # single channel two layouts are possible, which round differently
        return fused(lambda x: self.bn(self.conv(x)), x_seq)


class PickBN(nn.Module):
    """Batch normalisation of some channels of a stream: [T, N, C, H, W] -> [T, N,
    channels, H, W].

    The stream keeps its width. picked: [channels] their indices in it, at first all.
    """

    bn_per_step = False  # see build()

    def __init__(self, stream, channels):
        super().__init__()
        self.stream = stream
        self.register_buffer("picked", torch.arange(channels))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x_seq):
        if len(self.picked) < self.stream:
            x_seq = x_seq.index_select(2, self.picked)
        return normalised(self.bn, x_seq, self.bn_per_step)


# ---- what all networks share ---------------------------------------------------------


def warn_of_missing(net, keys):
    """Warn where load_state_dict(state, strict=False) has found no normalisation.
    keys: its result. (With strict=True it raises.)"""
    missing = {"mean", "std"} & set(keys.missing_keys)
    if missing:
        warnings.warn(f"the state_dict has no {' and no '.join(sorted(missing))}: the "
                      f"network keeps mean {net.mean.tolist()} and std "
                      f"{net.std.tolist()}, and without those of its training it "
                      f"predicts something else. Call net.set_normalisation(mean, std)",
                      stacklevel=2)


def _outside_graphs(method):
    """Keep a method out of compiled graphs, by torch.compiler.disable. That imports
    torch's compiler, 1 to 2 s of the start of a script: here only while a network is
    compiled, which then breaks its graph once more than with the decorator."""
    @functools.wraps(method)
    def run(*given):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*given)
        return method(*given)

    return run


class SpikingNet(nn.Module):
    """What the networks share: normalisation, padding and the first layer of direct
    coding.

    reads_numbers: names of the layers beyond the first that read averages of spikes or
    other real numbers, a set; empty where they all read spikes.
    """

    def __init__(self, in_channels, image_size, time_steps):
        super().__init__()
        self.image_size, self.time_steps = image_size, time_steps
        self.encoding = "direct"
        self.checks_values = True  # see inputs.check; predict() has its own check
        self.reads_numbers = set()
        # in the state_dict: without them the weights predict something else
        self.register_buffer("mean", torch.zeros(in_channels))
        self.register_buffer("std", torch.ones(in_channels))
        self.register_load_state_dict_post_hook(warn_of_missing)

    def set_normalisation(self, mean, std):
        """Give the mean and standard deviation of each input channel, of pixels in
        0..1. Raise ValueError for others than one finite number a channel, std above 0.
        """
        mean, std = (torch.as_tensor(values, dtype=torch.float32, device="cpu")
                     for values in (mean, std))
        fits = mean.shape == std.shape == (len(self.mean),)
        if not (fits and mean.isfinite().all() and std.isfinite().all()
                and (std > 0).all()):
            raise ValueError(f"the normalisation is mean {mean.tolist()} and std "
                             f"{std.tolist()}, expected {len(self.mean)} finite "
                             f"numbers each, one a channel, with std above 0")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def get_extra_state(self):
        """Return the class names as JSON in UTF-8, a uint8 tensor: the state_dict holds
        them under "_extra_state", whatever tensors are saved by."""
        names = json.dumps({"class_names": self.class_names}, ensure_ascii=False)
        # a name that is no text, of a folder, is kept too: json.loads reads it back
        return torch.tensor([*names.encode(errors="surrogatepass")], dtype=torch.uint8)

    def set_extra_state(self, state):
        """Take the class names of a state_dict. Raise ValueError for what holds none,
        or names of another number of classes."""
        try:
            names = json.loads(bytes(state.tolist()))["class_names"]
        except (AttributeError, TypeError, ValueError, KeyError):
            raise ValueError(f"_extra_state of the state_dict is a "
                             f"{type(state).__name__}, expected the class names as "
                             f"JSON, bytes in a uint8 tensor") from None
        check_class_names(names, self.config["num_classes"], "the state_dict")
        self.class_names = names

    def _input(self, x, pad_to=1):
        """Return the input over time, [1, N, C, H, W] where it is the same at each
        step, else [T, N, C, H, W].

        x: [N, C, H, W], or [T, N, C, H, W] for data with a time axis, of which the
        first time_steps count. Sides are padded with black to a multiple of pad_to.
        """
        inputs.check(self, x)
        has_time = x.dim() == 5
        x_seq = x[:self.time_steps] if has_time else x.unsqueeze(0)
        if self.encoding != "direct":
            x_seq = x_seq.to(self.mean.dtype) if has_time else self._spikes(x)
        missing = -x.shape[-1] % pad_to
        mean, std = self.mean.view(-1, 1, 1), self.std.view(-1, 1, 1)
        if missing:
            before = missing // 2
            sides = (before, missing - before) * 2
            padded = F.pad(x_seq, sides)
            if self.encoding == "direct" and x.is_floating_point():
                # they are normalised already, and then black is not 0
                is_image = F.pad(torch.ones_like(x_seq[:1, :1, :1]), sides) > 0
                padded = torch.where(is_image, padded, (-mean / std).to(padded.dtype))
            x_seq = padded
        if x_seq.dtype == torch.uint8:
            x_seq = (x_seq.to(self.mean.dtype) / 255 - mean) / std
        return x_seq.to(self.mean.dtype)  # of float64, or of half precision

    def _encode(self, first, lif, x, pad_to=1):
        """Return the spikes of the first LIF, [T, N, C, H, W]. first: the layers before
        it, which see an image once. x, pad_to: as in _input."""
        current = first(self._input(x, pad_to))
        return lif(current, None if x.dim() == 5 else self.time_steps)

    @_outside_graphs  # one break, where the seeded generator would make many
    def _spikes(self, x):
        """Return spikes [T, N, C, H, W], drawn with the probabilities of pixels [N, C,
        H, W]. In eval mode all images share one seeded draw, so that a prediction does
        not depend on the other images of a batch."""
        chance = x.to(self.mean.dtype) / 255 if x.dtype == torch.uint8 else x
        if self.training:
            shape, generator = x.shape, None
        else:
            shape = (1, *x.shape[1:])
            generator = torch.Generator(x.device).manual_seed(0)
        drawn = torch.rand(self.time_steps, *shape, generator=generator,
                           device=x.device, dtype=chance.dtype)
        return (drawn < chance).to(chance.dtype)


# ---- which LIF scores a weight, which channels can be removed ------------------------


class Scored(NamedTuple):
    """Which LIF scores a weight.

    lif: its name.
    dim: the dimension of the weight that the LIF's channels run along: 0 if the weight
    feeds the LIF, 1 if it reads it.
    repeat: how many neighbouring indices of that dimension one channel owns: more than
    one where a map was flattened.
    """

    lif: str
    dim: int
    repeat: int = 1


def scored_by(net):
    """Return {name of a prunable weight: Scored}, in the order of the network.

    INTERPRETATION: a weight inherits the score of the LIF channel that it feeds
    (post-synaptic, the neuron's "synapses"). In a residual block conv2 and the shortcut
    both feed lif2; in a pre-activation one they feed the first LIF of the next block. A
    classifier that feeds no LIF takes, for each weight, the score of the channel that
    it reads. Confirmed by the published code, which has the pre-activation ResNet-19
    and does not regenerate the classifier.
    """
    return net.scored_by()


class Removable(NamedTuple):
    """A group of channels that can be removed, and where they are.

    place: of their number in the list of widths.
    lif: the LIF that they feed.
    bn: the batch normalisation whose gamma ranks them; None without one.
    weight: the weight whose rows make them; None where they are picked from a stream.
    rows: names of the tensors with a row for each channel.
    reader: the weight that reads them, along its dimension 1.
    repeat: how many neighbouring indices of that dimension one channel owns: more than
    one where a map was flattened.
    may_be_empty: whether all of them may go.
    feeds: a group that goes with this one: without channels there, none are needed
    here. None where there is no such group.
    """

    place: int
    lif: str
    bn: str | None
    weight: str | None
    rows: tuple
    reader: str
    repeat: int = 1
    may_be_empty: bool = False
    feeds: str | None = None


def of_bn(name):
    """Return the names of the tensors of a batch normalisation with a row for each
    channel."""
    return tuple(f"{name}.{part}"
                 for part in ("weight", "bias", "running_mean", "running_var"))


def of_conv_bn(net, name, place, lif, reader, repeat=1):
    """Return the Removable of the output channels of a ConvBN."""
    bn, weight = f"{name}.bn", f"{name}.conv.weight"
    rows = (weight, f"{name}.conv.bias", *of_bn(bn))
    if not hasattr(net.get_submodule(name), "bn"):
        bn = None
    return Removable(place, lif, bn, weight, rows, reader, repeat)


def removable(net):
    """Return {name of a layer whose channels can be removed: Removable}, in the
    network's order.

    VGG: every convolution, with BN or without. ResNet-19: the inner channels of each
    block; block outputs are added to each other, so their number is that of the whole
    stage. The pre-activation ResNet-19: all channels behind a BN. What a block, or the
    output layer, reads of the stream is picked from it, and the stream keeps its width.
    """
    return net.removable()


# ---- the networks --------------------------------------------------------------------


class VGG(SpikingNet):
    """Convolutions + BN + LIF in a row, with pooling between them; then the map is
    flattened, and linear layers + LIF follow where the plan has some; then the linear
    output layer.

    VGG-16 ends in 1x1 at 32x32, and at 64x64 in 2x2, which is flattened and not
    averaged, so that spikes stay binary.
    """

    def __init__(self, plan, num_classes, in_channels, image_size, time_steps, widths,
                 neuron):
        super().__init__(in_channels, image_size, time_steps)
        self.pad_to, self.votes = plan.pad_to, plan.votes
        self.drops = "D" in plan.layers
        linear = neuron.get("linear", neuron)  # behind linear layers
        neuron = {key: value for key, value in neuron.items() if key != "linear"}
        self.convs, self.lifs = nn.ModuleList(), nn.ModuleList()
        self.hidden = nn.ModuleList()
        self.pooled = []  # after each convolution: "P", "A" or None
        side = image_size + -image_size % plan.pad_to
        size, average, poolings = in_channels, False, 0
        flat = plan.layers.index("F") if "F" in plan.layers else len(plan.layers)
        for layer in plan.layers[:flat]:
            if layer == "D":
                continue
            if average:  # the layer before this one
                self.reads_numbers.add(f"convs.{len(self.convs)}.conv")
            average = layer == "A"
            if layer in ("P", "A"):
                self.pooled[-1] = layer
                side //= 2
                poolings += 1
            else:
                width = widths[len(self.convs)]
                self.convs.append(ConvBN(size, width, norm=plan.norm, bias=plan.bias))
                self.lifs.append(FastLIF(**neuron))
                self.pooled.append(None)
                size = width
        if side < 1:
            raise ValueError(f"image_size is {image_size}, too small for {poolings} "
                             f"poolings; expected at least {2 ** poolings} pixels")
        size *= side**2
        for width in widths[len(self.convs):]:
            self.hidden.append(nn.Linear(size, width, plan.bias))
            self.lifs.append(FastLIF(**linear))
            size = width
        self.fc = nn.Linear(size, num_classes * plan.votes, plan.bias)
        if average:
            self.reads_numbers.add("hidden.0" if self.hidden else "fc")
        self.lif_out = FastLIF(**linear) if plan.spiking_output else None

    def forward(self, x):
        lifs = iter(self.lifs)
        spikes = None
        for conv, pooled in zip(self.convs, self.pooled):
            if spikes is None:
                spikes = self._encode(conv, next(lifs), x, self.pad_to)
            else:
                spikes = next(lifs)(conv(spikes))
            if pooled:
                pool = F.max_pool2d if pooled == "P" else F.avg_pool2d
                spikes = fused(lambda maps: pool(maps, 2), spikes)
        if spikes is not None:
            spikes = spikes.flatten(2)  # [T, N, C * H * W]
        if self.drops and self.training:
            # one mask for all T
            spikes = spikes * F.dropout(torch.ones_like(spikes[0]))
        for layer in self.hidden:
            if spikes is None:  # a network without convolutions
                spikes = self._encode(lambda x_seq: fused(layer, x_seq.flatten(2)),
                                      next(lifs), x)
            else:
                spikes = next(lifs)(fused(layer, spikes))
        out = fused(self.fc, spikes)  # [T, N, num_classes * votes]
        if self.lif_out is not None:
            out = self.lif_out(out)
        return out if self.votes == 1 else out.unflatten(2, (-1, self.votes)).mean(3)

    def _layers(self):
        """Return rows (layer, its LIF, its weight, the weight that reads it,
        neighbouring indices that one of its channels owns there) of all layers but the
        output."""
        convs = [f"convs.{i}" for i in range(len(self.convs))]
        hidden = [f"hidden.{i}" for i in range(len(self.hidden))]
        weights = ([f"{name}.conv.weight" for name in convs]
                   + [f"{name}.weight" for name in hidden] + ["fc.weight"])
        rows = []
        for i, name in enumerate(convs + hidden):
            weight, reader, repeat = weights[i], weights[i + 1], 1
            if i == len(convs) - 1:  # its map is flattened: H * W columns a channel
                columns = self.get_parameter(reader).shape[1]
                repeat = columns // len(self.get_parameter(weight))
            rows.append((name, f"lifs.{i}", weight, reader, repeat))
        return rows

    def scored_by(self):
        rows = self._layers()
        scored = {weight: Scored(lif, 0) for _, lif, weight, _, _ in rows}
        _, lif, _, _, repeat = rows[-1]
        if self.lif_out is None:
            scored["fc.weight"] = Scored(lif, 1, repeat)
        else:
            scored["fc.weight"] = Scored("lif_out", 0)
        return scored

    def removable(self):
        return {name: of_conv_bn(self, name, i, lif, reader, repeat)
                for i, (name, lif, _, reader, repeat) in enumerate(self._layers())
                if name.startswith("convs")}


class Block(nn.Module):
    """conv-BN-LIF-conv-BN, plus the shortcut, then LIF: the sum enters the neuron.
    [T, N, C, H, W] spikes -> [T, N, C', H / stride, W / stride] spikes."""

    def __init__(self, in_channels, inner, channels, stride, **neuron):
        super().__init__()
        self.conv1 = ConvBN(in_channels, inner, stride=stride)
        self.lif1 = FastLIF(**neuron)
        self.conv2 = ConvBN(inner, channels)
        self.lif2 = FastLIF(**neuron)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = ConvBN(in_channels, channels, kernel=1, stride=stride)

    def forward(self, spikes):
        shortcut = spikes if self.shortcut is None else self.shortcut(spikes)
        inner = self.lif1(self.conv1(spikes))
        return self.lif2(self.conv2(inner) + shortcut)


class ResNet19(SpikingNet):
    """LTH-SNN's ResNet-19: stem 64, stages of 3, 3, 2 blocks with 128, 256, 512
    channels, the first block of each with stride 2, global average pooling, fc1 + LIF,
    fc2.

    tdBN's network of the same name (stem 128, first stage at full resolution) has four
    times the MACs there: accuracies of the two are not to be compared.
    """

    def __init__(self, plan, num_classes, in_channels, image_size, time_steps, widths,
                 neuron):
        super().__init__(in_channels, image_size, time_steps)
        stem, *pairs, hidden = widths
        self.reads_numbers = {"fc1"}  # the average of a map
        self.stem, self.lif = ConvBN(in_channels, stem), FastLIF(**neuron)
        self.blocks, channels = nn.ModuleList(), stem
        for stage, count in enumerate(plan.stages):
            start = 2 * sum(plan.stages[:stage])
            inners = pairs[start:start + 2 * count:2]
            outs = pairs[start + 1:start + 2 * count:2]
            if len(set(outs)) > 1:
                raise ValueError(f"the blocks of stage {stage + 1} have outputs of "
                                 f"{sorted(set(outs))} channels, expected one number: "
                                 f"they are added to each other")
            for i, (inner, out) in enumerate(zip(inners, outs)):
                stride = 2 if i == 0 else 1
                self.blocks.append(Block(channels, inner, out, stride, **neuron))
                channels = out
        self.fc1, self.lif_fc = nn.Linear(channels, hidden), FastLIF(**neuron)
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
            name = f"blocks.{i}"
            scored[f"{name}.conv1.conv.weight"] = Scored(f"{name}.lif1", 0)
            scored[f"{name}.conv2.conv.weight"] = Scored(f"{name}.lif2", 0)
            if block.shortcut is not None:
                scored[f"{name}.shortcut.conv.weight"] = Scored(f"{name}.lif2", 0)
        return scored | {"fc1.weight": Scored("lif_fc", 0),
                         "fc2.weight": Scored("lif_fc", 1)}

    def removable(self):
        return {f"blocks.{i}.conv1": of_conv_bn(
                    self, f"blocks.{i}.conv1", 1 + 2 * i, f"blocks.{i}.lif1",
                    f"blocks.{i}.conv2.conv.weight")
                for i in range(len(self.blocks))}


class PreBlock(nn.Module):
    """BN-LIF-conv-BN-LIF-conv, plus the shortcut of the stream, which is real-valued.
    [T, N, C, H, W] -> [T, N, C', H / stride, W / stride]; T may be 1 before the first
    LIF. Without inner channels it is its shortcut."""

    def __init__(self, stream, picked, inner, channels, stride, **neuron):
        super().__init__()
        self.is_empty = inner == 0
        self.shortcut = None
        if not self.is_empty:
            self.norm1, self.lif1 = PickBN(stream, picked), FastLIF(**neuron)
            self.conv1 = ConvBN(picked, inner, stride=stride)  # its BN is the second
            self.lif2, self.conv2 = FastLIF(**neuron), conv2d(inner, channels)
        if stride != 1 or stream != channels:
            self.shortcut = conv2d(stream, channels, kernel=1, stride=stride)

    def forward(self, stream, time_steps):
        shortcut = stream
        if self.shortcut is not None:
            shortcut = fused(self.shortcut, stream)
        if self.is_empty:
            return shortcut
        spikes = self.lif1(self.norm1(stream), time_steps)
        spikes = self.lif2(self.conv1(spikes))
        return fused(self.conv2, spikes) + shortcut


class PreResNet19(SpikingNet):
    """published code: the pre-activation ResNet-19 of the criticality paper's code.

    Stem convolution, stages of 3, 3, 2 blocks as in ResNet19, then BN and LIF, global
    average pooling and the output layer. The stream between the blocks is real-valued;
    the shortcuts are 1x1 convolutions without BN, or the identity.

    Its widths are 26: the stem; of each block the channels of the stream that its first
    convolution reads, its inner and its outer channels; the channels of the stream that
    the output layer reads. A block with 0 inner channels reads 0, and is its shortcut
    alone.
    """

    def __init__(self, plan, num_classes, in_channels, image_size, time_steps, widths,
                 neuron):
        super().__init__(in_channels, image_size, time_steps)
        stream, *rows, last = widths
        self.stem, self.blocks = conv2d(in_channels, stream), nn.ModuleList()
        firsts = {sum(plan.stages[:stage]) for stage in range(len(plan.stages))}
        for i in range(sum(plan.stages)):
            picked, inner, out = rows[3 * i:3 * i + 3]
            stride = 2 if i in firsts else 1
            streams_fit = min(stream, out) > 0 and (out == stream or stride == 2)
            reads_some = 1 <= picked <= stream and inner > 0
            if not streams_fit or not (reads_some or picked == inner == 0):
                raise ValueError(f"block {i} got widths {picked}, {inner}, {out}, on a "
                                 f"stream of {stream} channels: expected it to read "
                                 f"some of them, or 0 with 0 inner ones, and equal "
                                 f"outputs in a stage")
            self.blocks.append(PreBlock(stream, picked, inner, out, stride, **neuron))
            stream = out
        if not 1 <= last <= stream:
            raise ValueError(f"the output layer reads {last} channels of a stream of "
                             f"{stream}, expected 1 to {stream}")
        self.norm = PickBN(stream, last)
        if neuron.get("surrogate", "arctan") == "arctan":
            # published code, channels: the reset of the last LIF alone is detached
            neuron = neuron | dict(detach_reset=True)
        self.lif = FastLIF(**neuron)
        self.fc = nn.Linear(last, num_classes)
        self.reads_numbers = {"fc"} | {f"blocks.{i}.shortcut"
                                       for i, block in enumerate(self.blocks)
                                       if block.shortcut is not None}

    def forward(self, x):
        stream = fused(self.stem, self._input(x))
        time_steps = len(stream) if x.dim() == 5 else self.time_steps
        for block in self.blocks:
            stream = block(stream, time_steps)
        spikes = self.lif(self.norm(stream), time_steps)
        return fused(self.fc, spikes.mean((3, 4)))

    def scored_by(self):
        # published code: the LIF that the stream enters next scores what is added to
        # it. Its channels are those of the stream as long as none has been removed
        blocks = {i: f"blocks.{i}" for i, block in enumerate(self.blocks)
                  if not block.is_empty}

        def enters(i):
            after = [name for j, name in blocks.items() if j >= i]
            return f"{after[0]}.lif1" if after else "lif"

        scored = {"stem.weight": Scored(enters(0), 0)}
        for i, block in enumerate(self.blocks):
            name = f"blocks.{i}"
            if not block.is_empty:
                scored[f"{name}.conv1.conv.weight"] = Scored(f"{name}.lif2", 0)
                scored[f"{name}.conv2.weight"] = Scored(enters(i + 1), 0)
            if block.shortcut is not None:
                scored[f"{name}.shortcut.weight"] = Scored(enters(i + 1), 0)
        return scored | {"fc.weight": Scored("lif", 1)}

    def removable(self):
        # published code: all channels behind a BN
        groups = {}
        for i, block in enumerate(self.blocks):
            name = f"blocks.{i}"
            if block.is_empty:
                continue
            groups[f"{name}.norm1"] = Removable(
                1 + 3 * i, f"{name}.lif1", f"{name}.norm1.bn", None,
                (f"{name}.norm1.picked", *of_bn(f"{name}.norm1.bn")),
                f"{name}.conv1.conv.weight", feeds=f"{name}.conv1")
            groups[f"{name}.conv1"] = of_conv_bn(
                self, f"{name}.conv1", 2 + 3 * i, f"{name}.lif2",
                f"{name}.conv2.weight")._replace(may_be_empty=True)
        groups["norm"] = Removable(
            len(self.config["widths"]) - 1, "lif", "norm.bn", None,
            ("norm.picked", *of_bn("norm.bn")), "fc.weight")
        return groups


# ---- the neurons of a network --------------------------------------------------------


def lifs(net):
    """Return {name: LIF} in the order of the network."""
    return {name: module for name, module in net.named_modules()
            if isinstance(module, LIF)}


@contextmanager
def recording(net, aggregate, by="derivative"):
    """Record the criticality of a forward pass (Eq. 6). Yields a dict that is filled
    when the block ends, {name of a LIF: [C] in float64}.

        with models.recording(net, "max") as scores:
            logits = net(images)
        scores["lifs.0"]                              # [C]

    aggregate: "max" | "mean", how the neurons of a channel make one score; None:
    nothing is recorded, and the dict stays empty. by: see neurons.criticality; "post"
    and "pre" record neurons.activity, [2, C]. Of several passes the last counts.
    """
    scores = {}
    neurons = lifs(net) if aggregate is not None else {}
    for lif in neurons.values():
        lif.start_recording(aggregate, by)
    try:
        yield scores
    finally:
        found = {name: lif.stop_recording() for name, lif in neurons.items()}
    scores |= {name: score for name, score in found.items() if score is not None}


@contextmanager
def evaluating(net):
    """Keep a network in eval mode inside the block. After it, also after an error, each
    of its modules is in its own mode again: some may have been in eval mode before,
    such as BN that a user has frozen."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def mask_neurons(net, masks):
    """Multiply the spikes of some LIFs by masks, from now on. Raise KeyError for a name
    of no LIF.

    masks: {name of a LIF: [C, H, W], 1 = alive, 0 = dead}.

    A mask becomes the buffer `mask` of its LIF. So it is in the state_dict, and in a
    model.pt, from which load() brings it back; it moves with the network, and is copied
    with it. A network that build() makes anew has none.
    """
    neurons = lifs(net)
    for name, mask in masks.items():
        lif = neurons[name]
        if not hasattr(lif, "mask"):
            lif.register_forward_hook(_masked)
        lif.register_buffer("mask", mask.detach().to(net.mean, copy=True))


def _masked(lif, _, spikes):
    return spikes * lif.mask.to(spikes.dtype)


def neuron_masks(net):
    """Return {name of a LIF: its mask}, of the LIFs that have one."""
    return {name: lif.mask for name, lif in lifs(net).items() if hasattr(lif, "mask")}


# ---- the use of a trained network ----------------------------------------------------


def load(path):
    """Return the network of a run's model.pt, in eval mode, on the CPU: it predicts at
    once.

    Its input is [N, C, H, W]: uint8 pixels, or floating point that is normalised
    already (predict() takes floats in 0..1). It has the masks of the file, and its
    class_names, None in older files.
    Raises FileNotFoundError, or ValueError for a file that is no such network.
    """
    import modelfile  # not at the top: it imports this module
    return modelfile.unpack(modelfile.read(path), str(path))


class Prediction(NamedTuple):
    """What predict() returns."""

    classes: Tensor        # [N] int64
    probabilities: Tensor  # [N, K] float32, of all K classes
    names: list | None     # of the N classes; None where the network has no class_names


@torch.no_grad()
def predict(net, images, batch_size=128):
    """Return what a network says about images, a Prediction. It is in eval mode for it,
    and then in the mode in which it was.

    images: a tensor or a numpy array, uint8 or floats in 0..1, not normalised:
    [N, C, H, W], or one image [C, H, W], which is N = 1. To a network of events:
    counts, 0 or more, [N, T, 2, H, W], as a data set stores them, or one recording
    [T, 2, H, W]; T is the network's own.
    batch_size: how many are computed at a time, at least 1; it bounds the memory.

    The class is the largest sum over T of the logits. The probabilities are the softmax
    of their mean over T, and so rank the classes alike. (A mean of the softmax of each
    step could rank another class first.) They are not calibrated.
    Raises ValueError for images of another kind, shape or range.
    """
    if not hasattr(net, "checks_values"):  # SpikingNet's, also after torch.compile
        raise ValueError(f"predict got a {type(net).__name__}, expected a network of "
                         f"models.load(path) or models.build(...). Of a wrapper such "
                         f"as DataParallel give net.module")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}, expected a whole number of at "
                         f"least 1. Change it")
    x_all = inputs.images_for(net, images)
    checks_values, totals = net.checks_values, []
    net.checks_values = False  # images_for() has looked at them
    try:
        with evaluating(net):
            for x in x_all.split(batch_size):
                logits = net(inputs.as_input(net, x))  # [T, n, K]
                totals.append(logits.sum(0, dtype=torch.float32))
    finally:
        net.checks_values = checks_values
    total = torch.cat(totals)
    if not total.isfinite().all():
        raise ValueError("the network's output is not finite (NaN or infinite), "
                         "expected numbers. Look for such weights in net.state_dict()")
    classes, names = total.argmax(1), None
    if net.class_names is not None:
        check_class_names(net.class_names, total.shape[1], "the network")
        names = [net.class_names[k] for k in classes.tolist()]
    return Prediction(classes, (total / len(logits)).softmax(1), names)


def keep_zeros(net, masks=None):
    """Keep the pruned weights of a network at 0 through any training: set them to 0
    after each step of any torch optimizer. Return a handle.

        net = models.load("runs/NAME/model.pt").train()
        handle = models.keep_zeros(net)
        ...                             # a training loop, with any optimizer
        handle.remove()                 # they may move again

    masks: {name of a weight: bool tensor, True = alive}, which net.masks then has too;
    a weight that is not named may move. None: net.masks; where they prune nothing, the
    weights that are 0 now stay so.

    To mask the gradients would not do: momentum, and the moments of Adam, of before
    would still move dead weights. A change of the weights that is no optimizer's step
    is not seen, and neither is one of a copy of the network: call it for the copy too.
    Raises ValueError for masks that do not fit the network.
    """
    if masks is None:
        masks = net.masks
        if masks is None or all(mask.all() for mask in masks.values()):
            masks = {name: net.get_parameter(name) != 0 for name in scored_by(net)}
    check_masks(net, masks)
    # a layer that was exchanged has no mask any more
    kept = {name: mask for name, mask in (net.masks or {}).items()
            if mask.shape == net.get_parameter(name).shape}
    net.masks = kept | masks
    # what is deleted is let go
    pairs = [(weakref.ref(net.get_parameter(name)), mask)
             for name, mask in masks.items()]

    @torch.no_grad()
    def apply(*_):
        for i, (of, mask) in enumerate(pairs):
            weight = of()
            if weight is not None:
                mask = mask.to(weight.device)  # the network may have moved
                pairs[i] = of, mask
                weight.mul_(mask)

    apply()
    return register_optimizer_step_post_hook(apply)


def check_masks(net, masks):
    """Raise ValueError unless masks, {name of a weight: bool tensor}, fit the weights
    of a network."""
    names = scored_by(net)
    for name, mask in masks.items():
        if name not in names:
            raise ValueError(f"there is a mask of {name}, expected names of prunable "
                             f"weights, such as {next(iter(names))}. Leave it out of "
                             f"the masks")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"the mask of {name} is {found}, expected a bool tensor, "
                             f"True for a weight that is alive. Give mask != 0")
        shape = net.get_parameter(name).shape
        if mask.shape != shape:
            raise ValueError(f"the mask of {name} has shape {list(mask.shape)}, "
                             f"expected {list(shape)} as the weight. Leave it out of "
                             f"the masks; net.masks are the network's own")


def check_class_names(names, count, source):
    """Raise ValueError unless the names of `count` classes are a list of as many
    strings, or None. source: what has them, in words."""
    if names is None:
        return
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not are_names or len(names) != count:
        raise ValueError(f"{source} has the class names {names!r}, expected a list of "
                         f"{count} strings, or None")
