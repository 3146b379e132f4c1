"""The networks as data: lists of widths, what else differs between them, and their neurons.

    plans.default_widths("vgg16", factor=0.5)   # the list of widths that models.build takes
    plans.VGG_PLANS["sdsnn-small"]              # 15c3-AP2-40c3-AP2-fc300; the output layer follows

vgg16, resnet19 and small are those of LTH-SNN (arXiv 2207.01382) and of this project; the others
are of the papers that are compared with them. models.py builds all of them from these tables.
"""
# A number is the default width of conv + BN + LIF, "P" a 2x2 max-pooling, "A" a 2x2 average
# pooling, "D" a dropout of a half (one mask for all T), "F" flattens: from there on a number is
# linear + LIF. The output layer follows by itself
VGG_PLANS = {
    "vgg16": [64, 64, "P", 128, 128, "P", 256, 256, 256, "P",
              512, 512, 512, "P", 512, 512, 512, "P"],
    "small": [16, "P", 32, "P", 64, 64, "P"],
    # of 48x48 events (arXiv 2502.13572)
    "vggsnn": [64, 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"],
    # SD-SNN (arXiv 2211.12219): on MNIST and events; on CIFAR-10
    "sdsnn-small": [15, "A", 40, "A", "F", 300],
    "sdsnn-large": [128, 128, "P", 256, 256, "P", 512, 512, "F", 512],
    # Grad R (arXiv 2105.04916): on MNIST; on CIFAR-10
    "gradr-linear": ["F", 800],
    "gradr-conv": [256, 256, 256, "P", 256, 256, 256, "P", "D", "F", 2048],
}
# What else differs. spikes: LIFs at the output too, so that "logits" are spikes. votes: outputs for
# each class, whose mean counts. norm: BN after convolutions. bias: of linear layers, and of
# convolutions without BN
USUAL = dict(spikes=False, votes=1, norm=True, bias=True)
TRAITS = {
    "sdsnn-small": dict(spikes=True, norm=False), "sdsnn-large": dict(spikes=True),
    "gradr-linear": dict(spikes=True, bias=False),
    "gradr-conv": dict(spikes=True, bias=False, votes=10),
}
# The neurons: arguments of LIF. SD-SNN's code: h = 0.2 v (1 - s) + W x, and s = h > 0.5.
# INTERPRETATION: its PLIF has an arctan surrogate, and resets as all others do
NEURONS = {
    "sdsnn-small": dict(tau=1.25, v_threshold=0.5, surrogate="rectangular", decay_input=False,
                        strict=True),
    "sdsnn-large": dict(tau=2.0, v_threshold=0.5, learn_tau=True),
    "gradr-linear": dict(tau=2.0), "gradr-conv": dict(tau=2.0),
}
LTH_START = ("vgg16", "small", "vggsnn")  # start as LTH-SNN's; the others as PyTorch's layers do
ENCODINGS = ("direct", "rate", "events")
RESNET_STAGES = [3, 3, 2]  # blocks a stage; the first block of every stage has stride 2
RESNET_WIDTHS = [64] + [128] * 6 + [256] * 6 + [512] * 4 + [256]  # stem; (inner, out) a block; fc1
NAMES = ("vgg16", "resnet19", *list(VGG_PLANS)[1:])
HIDDEN_LINEAR = ("resnet19", *(name for name, plan in VGG_PLANS.items() if "F" in plan))


def default_widths(name, factor=1.0):
    """Return the list of widths of a network, each multiplied by `factor` and at least 1."""
    check_name(name)
    widths = RESNET_WIDTHS if name == "resnet19" else [
        width for width in VGG_PLANS[name] if not isinstance(width, str)]
    return [max(1, round(width * factor)) for width in widths]


def check_name(name):
    if name not in NAMES:
        raise ValueError(f"there is no network {name!r}, expected one of {', '.join(NAMES)}")
