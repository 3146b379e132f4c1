"""The networks as data: one row a network, with all that differs between them.

    plans.default_widths("vgg16", factor=0.5)   # the widths that models.build takes
    plans.NETWORKS["sdsnn-small"].layers        # 15c3-AP2-40c3-AP2-fc300

A new network like VGG is one more row: models.py builds it, and --model offers it.
vgg16, resnet19 and small are the networks of LTH-SNN (arXiv 2207.01382) and of this
project; the others are those of the papers that are compared with them.
"""
from typing import NamedTuple


class Plan(NamedTuple):
    """A network as a row; its linear output layer follows by itself.

    layers: in order,
        a number, the default width of a convolution 3x3 + BN + LIF, or after "F" of a
        linear layer + LIF;
        "P" or "A", a 2x2 max-pooling or average pooling, one at most in a row;
        "D", a dropout of a half, with one mask for all time steps;
        "F": here the map is flattened. Without "F" it is flattened at the end.
    stages: () for a network like VGG; of a ResNet-19 the number of blocks in each
        stage. Its layers are the widths of the stem, of each block (inner, outer) and,
        after "F", of the hidden linear layer.
    preactivation: of a ResNet-19, whether BN and LIF come before a convolution. Its
        layers are the widths of the stem, of each block (the channels of the stream
        that its first convolution reads; inner; outer) and of what the output layer
        reads of the stream.
    neuron: arguments of neurons.LIF that differ from its defaults.
    linear_neuron: of a network like VGG, those behind linear layers that differ from
        `neuron`.
    spiking_output: whether LIFs follow the output layer, so that "logits" are spikes.
    votes: outputs for each class; their mean counts.
    norm: whether BN follows convolutions.
    bias: whether linear layers have one, and convolutions without BN.
    pad_to: sides of an image are padded with zeros (black) to a multiple of this.
    start: the initial weights, "pytorch" (those of its layers) or "lth-snn".
    """

    layers: list
    stages: tuple = ()
    preactivation: bool = False
    neuron: dict = {}
    linear_neuron: dict = {}
    spiking_output: bool = False
    votes: int = 1
    norm: bool = True
    bias: bool = True
    pad_to: int = 1
    start: str = "pytorch"


NETWORKS = {
    "vgg16": Plan([64, 64, "P", 128, 128, "P", 256, 256, 256, "P",
                   512, 512, 512, "P", 512, 512, 512, "P"],
                  pad_to=32, start="lth-snn"),
    "resnet19": Plan([64, *[128] * 6, *[256] * 6, *[512] * 4, "F", 256],
                     stages=(3, 3, 2)),
    "small": Plan([16, "P", 32, "P", 64, 64, "P"], start="lth-snn"),
    # published code of the criticality paper: a pre-activation ResNet-19, and average
    # pooling
    "resnet19-pre": Plan([64, 64, 128, 128, *[128] * 6, 128, 256, 256, *[256] * 6,
                          256, 512, 512, *[512] * 3, 512],
                         stages=(3, 3, 2), preactivation=True),
    "vgg16-avg": Plan([64, 64, "A", 128, 128, "A", 256, 256, 256, "A",
                       512, 512, 512, "A", 512, 512, 512, "A"],
                      pad_to=32, start="lth-snn"),
    "small-avg": Plan([16, "A", 32, "A", 64, 64, "A"], start="lth-snn"),
    # of 48x48 events (arXiv 2502.13572)
    "vggsnn": Plan([64, 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"],
                   start="lth-snn"),
    # SD-SNN (arXiv 2211.12219) on MNIST and events. The neuron of its code:
    # h = 0.2 v (1 - s) + W x, s = h > 0.5, with the gradient through (1 - s)
    "sdsnn-small": Plan([15, "A", 40, "A", "F", 300], spiking_output=True, norm=False,
                        neuron=dict(tau=1.25, v_threshold=0.5, surrogate="rectangular",
                                    decay_input=False, strict=True,
                                    detach_reset=False)),
    # SD-SNN on CIFAR-10, as Brain-Cog builds it: PLIF behind convolutions, and behind
    # linear layers plain LIF with another threshold. (SD-SNN's own repository passes
    # the threshold 0.5 for all.) PLIF has the arctan surrogate, and all resets are
    # detached. INTERPRETATION: arctan behind linear layers too; there Brain-Cog has a
    # triangle, f' = 2 - 4 |u| for |u| < 1/2
    "sdsnn-large": Plan([128, 128, "P", 256, 256, "P", 512, 512, "F", 512],
                        spiking_output=True,
                        neuron=dict(tau=2.0, v_threshold=1.0, learn_tau=True,
                                    strict=True),
                        linear_neuron=dict(v_threshold=0.5, learn_tau=False)),
    # Grad R (arXiv 2105.04916) on MNIST, and on CIFAR-10
    "gradr-linear": Plan(["F", 800], spiking_output=True, bias=False,
                         neuron=dict(tau=2.0)),
    "gradr-conv": Plan([256, 256, 256, "P", 256, 256, 256, "P", "D", "F", 2048],
                       spiking_output=True, votes=10, bias=False, neuron=dict(tau=2.0)),
}
# published code: {item of --as-published: {network: the one in its place}}
AS_PUBLISHED = {"pooling": {"vgg16": "vgg16-avg", "small": "small-avg"},
                "network": {"resnet19": "resnet19-pre"}}
NAMES = tuple(NETWORKS)
HIDDEN_LINEAR = tuple(name for name, plan in NETWORKS.items() if "F" in plan.layers)
ENCODINGS = ("direct", "rate", "events")


def default_widths(name, factor=1.0):
    """Return the list of widths of a network, each multiplied by `factor` and at least
    1."""
    check_name(name)
    widths = [layer for layer in NETWORKS[name].layers if not isinstance(layer, str)]
    return [max(1, round(width * factor)) for width in widths]


def as_published(name, items):
    """Return the network that the items of --as-published put in the place of one."""
    for item in items:
        name = AS_PUBLISHED.get(item, {}).get(name, name)
    return name


def check_name(name):
    """Raise ValueError unless there is a network of this name."""
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}, expected one of "
                         f"{', '.join(NAMES)}")
