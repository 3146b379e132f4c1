"""The input of a network of models.py: what it may be, what is wrong with another one,
and how to mend it.

    inputs.check(net, x)                   # of net(x): raises ValueError
    images = inputs.images_for(net, images)    # of models.predict: a checked tensor
    images = inputs.random_images(net, 32)     # such as it takes, to measure with
    logits = net(inputs.as_input(net, images))

A network takes [N, C, H, W], or frames [T, N, C, H, W]: uint8 pixels, or floating point
that is normalised already. predict() takes what a user has: tensors and arrays, uint8
or floats in 0..1.
"""
import warnings

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-4  # how far pixels in 0..1 may be above 1


def hint_of_shape(shape, channels, side):
    """Return in a sentence how images of this shape can be made to fit
    [N, channels, side, side]."""
    last = tuple(shape[-3:])
    if last == (channels, side, side):
        if len(shape) == 3:
            return "Give a single image as x[None]"
        one = ", ".join(map(str, last))
        return f"Make one batch of all leading dimensions: x.reshape(-1, {one})"
    if last == (side, side, channels):
        order = [*range(len(shape))]
        order.insert(-2, order.pop())
        how = ", ".join(map(str, order))
        return (f"Put the channels before the pixels: x.permute({how}), of an array "
                f"x.transpose({how})")
    if last[-2:] == (side, side):
        if channels == 1 and len(shape) < 4:
            return "Give grey images a dimension of one channel: x[..., None, :, :]"
        return f"Give as many channels as it was trained with, {channels}"
    return f"Resize them to the {side} x {side} pixels that it was trained with"


def check(net, x):
    """Raise ValueError for an input of another shape or type. That reads no value,
    so that no step waits for a GPU.

    On a CPU the values of floating-point inputs are checked too: against NaN, and
    against pixels in 0..255 that nobody has normalised.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"the network got a {type(x).__name__}, expected a "
                         f"tensor. Give it to models.predict(net, images), or "
                         f"convert it by torch.as_tensor")
    side, channels = net.image_size, len(net.mean)
    are_events = net.encoding == "events"
    fits = tuple(x.shape[-3:]) == (channels, side, side) and x.dim() in (4, 5)
    if not fits or (are_events and x.dim() == 4):
        wanted = f"[N, {channels}, {side}, {side}]"
        if are_events:
            wanted = f"frames of events [T, N, {channels}, {side}, {side}]"
        hint = hint_of_shape(x.shape, channels, side)
        if fits:
            hint = "Put their time axis first"
        raise ValueError(f"the network got shape {tuple(x.shape)}, expected "
                         f"{wanted}. {hint}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"the network got {x.dtype}, expected torch.uint8 in "
                         f"0..255 or floating point. Give them to "
                         f"models.predict(net, images), which says how")
    # a graph that is compiled, traced or exported has no values to look at
    is_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_graph or not net.checks_values:
        return
    if x.is_floating_point() and x.device.type == "cpu" and x.numel() > 0:
        check_values(net, x)


def check_values(net, x):
    """Raise ValueError for floats that cannot be the network's input. Warn where
    they look as if they were not normalised."""
    try:
        low, high = (float(value) for value in x.detach().aminmax())
    except RuntimeError:  # a fake tensor, and one in torch.func.vmap, has no values
        return
    found = f"the network got values from {low:.4g} to {high:.4g}"
    remedy = "Give uint8 images, or call models.predict(net, images)"
    if not (abs(low) < torch.inf and abs(high) < torch.inf):
        raise ValueError(f"{found}, expected finite numbers. Look for NaN and "
                         f"infinite ones in the images")
    if net.encoding == "events":
        if low < 0:
            raise ValueError(f"{found}, expected counts of events, which are not "
                             f"below 0. Do not normalise them")
    elif net.encoding == "rate":
        is_chance = 0 <= low and high <= 1
        if x.dim() == 4 and not is_chance:  # with a time axis they are spikes
            raise ValueError(f"{found}, expected floats in 0..1, the chances of a "
                             f"spike. {remedy}")
    else:
        black, white = -net.mean / net.std, (1 - net.mean) / net.std
        largest = float(torch.maximum(black.abs(), white.abs()).max())
        # without a mean and std nobody has said what the values are
        is_known = (net.mean != 0).any() or (net.std != 1).any()
        if is_known and max(abs(low), abs(high)) > 10 * largest:
            raise ValueError(f"{found}, expected floats that are normalised, about "
                             f"{float(black.min()):.2g} to {float(white.max()):.2g}"
                             f". {remedy}")
        # a pixel that is normalised is hardly ever exactly 0, a black one is
        if low == 0 < high <= 1 and (black < 0).any():
            warnings.warn(f"{found}, which look like pixels in 0..1; expected "
                          f"floats that are normalised, from "
                          f"{float(black.min()):.2g} on. {remedy}")


def images_for(net, images):
    """Return images, as predict() takes them, as a tensor with the batch first.

    Raises ValueError if they are of another kind, shape or range.
    """
    are_events = net.encoding == "events"
    what, values = "images", "floats in 0..1"
    if are_events:
        what, values = "frames", "floats of at least 0"
    as_uint8, as_float = "to(torch.uint8)", "float()"
    if isinstance(images, np.ndarray):
        as_uint8, as_float = "astype(np.uint8)", "astype(np.float32)"
        try:
            images = torch.from_numpy(np.array(images, order="C"))  # may be read-only
        except (TypeError, ValueError):  # strings, longdouble; another byte order
            raise ValueError(f"the {what} are an array of {images.dtype}, expected "
                             f"uint8, or {values}. Convert it by "
                             f"images.astype(np.float32)") from None
    if not isinstance(images, Tensor):
        raise ValueError(f"the {what} are a {type(images).__name__}, expected a tensor "
                         f"or a numpy array. Convert them, for instance by "
                         f"np.stack")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        remedy = f"If they are 0..255: images.{as_uint8}"
        if are_events or images.dtype == torch.bool:
            remedy = f"Convert them by images.{as_float}"
        elif images.dtype == torch.uint16:
            remedy = f"Convert them by images.{as_float} / 65535"
        raise ValueError(f"the {what} are {images.dtype}, expected torch.uint8, or "
                         f"{values}. {remedy}")

    side, channels = net.image_size, len(net.mean)
    one = (channels, side, side)
    if are_events:
        one = (net.time_steps, *one)
    if images.shape == one:
        images = images.unsqueeze(0)
    if images.shape[1:] != one or len(images) == 0:
        hint = hint_of_shape(images.shape, channels, side)
        if images.shape[1:] == one:
            hint = "Give at least one"
        elif are_events:
            hint = (f"Put the recordings before the time, each of T = {net.time_steps} "
                    f"frames")
        raise ValueError(f"the {what} have shape {tuple(images.shape)}, expected "
                         f"[N, {', '.join(map(str, one))}] with N of at least 1, or "
                         f"[{', '.join(map(str, one))}]. {hint}")

    if images.is_floating_point():
        low, high = (float(value) for value in images.detach().aminmax())
        found = f"the {what} have values from {low:.4g} to {high:.4g}"
        if not (abs(low) < torch.inf and abs(high) < torch.inf):
            raise ValueError(f"{found}, expected finite numbers. Look for NaN and "
                             f"infinite ones in them")
        if low < 0 or (high > 1 + ROUNDING and not are_events):
            remedy = "Do not normalise them: the network does"
            if low >= 0:
                remedy = "Divide pixels by 255, or give them as uint8"
            raise ValueError(f"{found}, expected uint8, or {values}. {remedy}")
        if not are_events:
            images = images.clamp(max=1)
    return images


def shape_of(net):
    """Return the shape of an image, or of a recording, as it is stored."""
    shape = (net.config["in_channels"], *[net.config["image_size"]] * 2)
    return (net.time_steps, *shape) if net.encoding == "events" else shape


def random_images(net, n):
    """Return n random images, or recordings with few events in a pixel, uint8 [n, ...]
    as they are stored. Each call gives the same ones."""
    most = 4 if net.encoding == "events" else 256
    return torch.randint(most, (n, *shape_of(net)), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))


def as_input(net, x):
    """Return a batch of images_for() as the network itself takes it."""
    if x.is_floating_point():
        x = x.to(net.mean.device, net.mean.dtype)
        if net.encoding == "direct":
            x = (x - net.mean.view(-1, 1, 1)) / net.std.view(-1, 1, 1)
    else:
        x = x.to(net.mean.device)
    if net.encoding == "events":
        x = x.transpose(0, 1)  # [T, n, 2, H, W]
    return x
