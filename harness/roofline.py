"""What a training step has to compute and to move, counted from a network's shapes, and
the time that a device needs at least for it.

    parts = roofline.count("vgg16", 100, 3, 32, time_steps=5, batch=128, itemsize=2)
    least = roofline.seconds(parts, flops_a_second, bytes_a_second)

A step is a list of parts: each layer forward and backward, and the optimizer. A part
takes as long as its FLOPs at the device's rate of a large matrix product, or as its
bytes at the rate of a large copy, whichever is longer (the roofline model: Williams,
Waterman, Patterson 2009). The sum over the parts is an ESTIMATE of the least time of a
step whose layers run one after the other. Two layers in one kernel could be faster.

Counted, for X numbers that a layer reads, Y that it writes, W weights, each of
`itemsize` bytes:

    part                                   FLOPs                bytes
    convolution, linear: forward           2 Y W / channels     X + W + Y
      backward, for the weights            the same             X + W + Y
      backward, for the input              the same             X + W + Y
    batch normalisation: forward           -                    2 X + Y
      backward                             -                    4 X + Y
    neuron: forward                        -                    X + Y
      backward                             -                    2 X + Y
    pooling: forward, backward             -                    X + Y each
    optimizer, P parameters in float32     -                    5 P, and 3 P for copies

`channels` are those that a layer writes, so that W / channels are the products of one
output. The image needs no gradient. Batch normalisation reads its input twice: for the
statistics and for the result. A neuron that sees one input at all T steps reads it
once; backward it reads the gradient Y as well. SGD reads the weight, its gradient and
its momentum, and writes weight and momentum; under autocast weights are copied to
bfloat16 and their gradients back. Not counted: additions, the loss, launches.
"""
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import models
from neurons import LIF

POOLINGS = {"max_pool2d", "avg_pool2d"}  # names of torch's functions


class Part(NamedTuple):
    """A part of a step. what: such as "convs.0.conv, forward"."""

    what: str
    flops: float
    bytes: float


def of_layer(name, layer, x, y, itemsize, needs_input_gradient=True):
    """Return the Parts of a layer, [] for a module that is no layer.

    x, y: how many numbers it reads and writes, over all time steps and images.
    """
    forward, backward = f"{name}, forward", f"{name}, backward"
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        weights = layer.weight.numel()
        work = 2 * y * weights / len(layer.weight), itemsize * (x + weights + y)
        parts = [Part(forward, *work), Part(f"{backward} for the weights", *work)]
        if needs_input_gradient:
            parts.append(Part(f"{backward} for the input", *work))
        return parts
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return [Part(forward, 0, itemsize * (2 * x + y)),
                Part(backward, 0, itemsize * (4 * x + y))]
    if isinstance(layer, LIF):
        return [Part(forward, 0, itemsize * (x + y)),
                Part(backward, 0, itemsize * (2 * x + y))]
    return []


def of_pooling(x, y, itemsize):
    """Return the Parts of a pooling of x numbers to y."""
    return [Part(f"pooling, {way}", 0, itemsize * (x + y))
            for way in ("forward", "backward")]


def of_optimizer(parameters, itemsize):
    """Return the Parts of SGD with momentum on so many parameters in float32."""
    moved = 5 * 4 * parameters
    if itemsize < 4:  # weights to half precision, gradients back
        moved += 2 * (4 + itemsize) * parameters
    return [Part("optimizer", 0, moved)]


class _Poolings(TorchFunctionMode):
    """While inside, count the poolings into `parts`."""

    def __init__(self, parts, itemsize):
        self.parts, self.itemsize = parts, itemsize

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", None) in POOLINGS:
            self.parts += of_pooling(args[0].numel(), result.numel(), self.itemsize)
        return result


def count(name, classes, channels, side, time_steps, batch, itemsize, widths=None):
    """Return the Parts of a training step of the network models.build(name, ...).

    batch: of images [channels, side, side]. itemsize: bytes of a number between two
    layers, 4 in fp32 and 2 in bf16. Nothing is computed: the network is built and run
    on torch's meta device.
    """
    parts = []

    def after(name):
        def add(layer, inputs, output):
            parts.extend(of_layer(name, layer, inputs[0].numel(), output.numel(),
                                  itemsize, inputs[0].requires_grad))
        return add

    with torch.device("meta"), torch.enable_grad(), _Poolings(parts, itemsize):
        net = models.build(name, classes, channels, side, time_steps, widths)
        for name, layer in net.named_modules():
            layer.register_forward_hook(after(name))
        net(torch.empty(batch, channels, side, side))
    return parts + of_optimizer(sum(p.numel() for p in net.parameters()), itemsize)


def seconds(parts, flops_a_second, bytes_a_second):
    """Return the least time of the parts, one after the other: an estimate."""
    return sum(max(part.flops / flops_a_second, part.bytes / bytes_a_second)
               for part in parts)


# ---- what a device reaches -----------------------------------------------------------


def copy_rate(timed, device, numbers):
    """Return the bytes a second that a copy of so many float32 numbers moves: each is
    read and written. timed(action): the seconds of an action."""
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / least(timed, lambda: target.copy_(source))


def matmul_rate(timed, device, side, dtype):
    """Return the FLOPs a second of a product of two square matrices."""
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / least(timed, lambda: one @ other)


def least(timed, action, rounds=5):
    """Return the seconds of an action: the least of some rounds, after one to warm
    up."""
    return min([timed(action) for _ in range(rounds + 1)][1:])
