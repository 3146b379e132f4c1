"""From flags to a run: device, processes, seed, data set, network, stages.

    device = setup.start(args, shared=True)
    images = setup.load(args, device)
    net = setup.build(args, images)
    stages = setup.stages(args, images, prune=args.epochs_prune)
    forward = setup.forward_of(args, net)    # compiled, or shared among processes

Flags that cannot work raise a ValueError of one line, before anything is written.
"""
import ctypes
import math
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import torch
from torch import nn

import data
import events
import inputs
import modelfile
import models
import plans
import training
from harness import board, files, processes, published
from harness.flags import PLACES, SMOKE_IMAGES
from harness.machine import set_precision


def start(args, shared=False):
    """Choose the device, join the other processes, set the seed. Return the device.

    shared: whether the script can share its run among the processes that torchrun
    starts. Raises ValueError for flags that fit neither the machine nor torchrun.
    """
    if not shared:
        processes.require_one()
    if getattr(args, "tensorboard", False):
        board.require()
    device = choose_device(args.device)
    args.device = str(device)
    if args.sync_bn and device.type != "cuda":
        raise ValueError(f"--sync-bn is given, but --device is {device}, expected "
                         f"GPUs: torch has it only there. Leave it out")
    if args.sync_bn and processes.size() == 1 and not args.resume:
        raise ValueError("--sync-bn is given, but there is one process, expected "
                         "several: it then changes nothing. Start it by torchrun, or "
                         "leave it out")
    if args.compile and processes.size() > 1:
        raise ValueError(f"--compile is given, but torchrun started "
                         f"{processes.size()} processes, expected one: the two "
                         f"together are not tested. Leave one out")
    if processes.size() > 1 and device.index is not None:
        raise ValueError(f"--device is {device}, but torchrun started "
                         f"{processes.size()} processes, expected a GPU for each. "
                         f"Write --device cuda, or start it by python")
    if processes.size() > 1 and device.type == "mps":
        raise ValueError(f"--device is mps, but torchrun started {processes.size()} "
                         f"processes, expected one: they cannot share an Apple GPU. "
                         f"Start it by python, or write --device cpu")
    number, here = processes.local()
    here = max(here, number + 1)  # another program than torchrun may set one alone
    if args.device == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"torchrun started {here} processes here, but torch sees "
                         f"{torch.cuda.device_count()} GPUs, expected one for each. "
                         f"Lower --nproc-per-node, or write --device cpu")
    if args.device == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    if args.compile:
        require_compiler(device)
    torch.manual_seed(args.seed)
    set_precision()
    if processes.size() > 1 and args.device == "cuda":
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    processes.start(device)
    return device


def choose_device(name):
    """Return the device of --device, by default the GPU if there is one. Raise
    ValueError if torch does not see it."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if n_gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and n_gpus == 0:
        raise ValueError(f"--device is {name}, but torch sees no GPU here. Leave it "
                         f"out, or write --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device is mps, but torch sees no such device here, "
                         "expected a Mac with an Apple GPU. Leave it out, or write "
                         "--device cpu")
    if device.type == "cuda" and device.index is not None:
        if device.index >= n_gpus:
            raise ValueError(f"--device is {name}, but torch sees {n_gpus} GPUs, "
                             f"expected cuda:0 to cuda:{n_gpus - 1}. Change the "
                             f"number, or leave --device out")
        torch.cuda.set_device(device)  # kernels start on the current device
    return device


def require_compiler(device):
    """Raise ValueError if torch.compile does not work here: it needs a C++ compiler on
    a CPU, Triton and a C compiler on a GPU."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # each part of the compiler has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"--compile is given, but torch.compile does not work here "
                         f"({reason}), expected a compiler, such as g++. Install "
                         f"one, or leave --compile out") from None


def keep_freed_memory():
    """Let glibc keep freed memory for the process.

    By default it returns each large tensor to the system, which then hands out the
    memory of the next one page by page. Keeping it makes a training step 14 to 19 %
    faster, at the same peak.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def load(args, device, download=True):
    """Return the data set that the flags name, on the device. download: whether to
    fetch one that is not there.

    Raises ValueError if a run that is resumed was made with other data.
    """
    if args.event_split is not None and args.dataset not in events.KINDS:
        raise ValueError(f"--event-split is {args.event_split}, which {args.dataset} "
                         f"does not use, expected recordings of an event camera "
                         f"({', '.join(events.KINDS)}). Leave it out")
    is_resumed = getattr(args, "resume", False)
    try:
        images = processes.rank_0_first(lambda: read(args, download))
    except FileNotFoundError as error:
        if not is_resumed or not Path(args.run_dir, "config.json").exists():
            raise
        found = str(error).partition(", expected ")[0]
        raise FileNotFoundError(
            f"{found}, looked for from {Path.cwd()}, expected the data of "
            f"{args.run_dir}, which was started with --dataset {args.dataset} and "
            f"--data-dir {args.data_dir}. Go on from the folder of then, or name the "
            f"same data by --dataset or --data-dir") from None
    if is_resumed:
        # config.json is soon read; the checkpoint is compared when it is restored
        config = files.saved_config(args.run_dir)
        files.require_same_data(args.run_dir, config.get("data"), files.data_of(images),
                                args.dataset)
        # the run keeps the names that it was started with, and the presets of these
        for flag in PLACES & config.keys():
            setattr(args, flag, config[flag])
    return images.to(device)


def read(args, download=True):
    """Return the data set that the flags name, in memory. The first process prints what
    is to be said of it."""
    limit = SMOKE_IMAGES if args.smoke else None
    with nullcontext() if processes.rank() == 0 else redirect_stdout(None):
        return data.load(args.dataset, args.data_dir, args.train_limit, limit,
                         args.time_steps, args.event_split, download)


def build(args, images, widths=None, takes_masks=False):
    """Return the network that the flags describe, on the device of the images.

    It has the weights of --init, unless a checkpoint will replace them. Its attribute
    start_note says what of --init is not simply taken (see start_from), None for
    nothing; starts_dense says whether --init has given it all weights of a dense
    network, whose accuracy is then the dense one.
    widths: of a network that has lost channels, from its checkpoint; None: the flags'.
    takes_masks: whether --init may be a pruned network, whose masks the method goes on
    from.
    Raises ValueError if the flags do not fit the data set or --init.
    """
    *_, channels, side = images.x_train.shape[:-1]
    check_images(args, images, side)
    items = vars(args).get("as_published", [])  # not all scripts have the flag
    name = plans.as_published(args.model, items)
    if widths is None:
        widths = models.default_widths(name, args.width)
    neuron = dict(tau=args.tau, v_threshold=args.threshold, alpha=args.alpha,
                  surrogate=args.surrogate, reset=args.reset,
                  detach_reset=args.detach_reset, decay_input=args.decay_input,
                  strict=args.strict)
    neuron = {key: value for key, value in neuron.items() if value is not None}
    net = models.build(name, images.num_classes, channels, side, args.time_steps,
                       widths, args.encoding, neuron, bn_per_step="bn" in items)
    check_last_batch(args, images, net.config)
    net.set_normalisation(images.mean, images.std)
    if "normalisation" in items:
        net.set_normalisation(*published.CIFAR10)
    net.class_names = images.class_names
    if net.class_names is not None:
        net.class_names = list(net.class_names)
    net.start_note, net.starts_dense = None, False
    is_resumed = args.resume and Path(args.run_dir, "checkpoint.pt").exists()
    if args.init is not None and not is_resumed:
        # channels are chosen after the pretraining
        may_be_new = vars(args).get("epochs_pretrain") != 0
        net.start_note = start_from(net, args.init, takes_masks, may_be_new)
        net.starts_dense = net.start_note is None
    return net.to(images.x_train.device, memory_format=torch.channels_last)


def check_images(args, images, side):
    """Raise ValueError if the flags do not fit the data set. side: of an image, in
    pixels."""
    kind = "events" if images.x_train.dim() == 5 else "images"
    if (args.encoding == "events") != (kind == "events"):
        wanted, fix = "direct or rate", "Leave it out"
        if kind == "events":
            wanted, frames = "events", images.x_train.shape[1]
            if args.dataset not in data.NAMES:
                fix = f"Write --encoding events --time-steps {frames}"
        raise ValueError(f"--encoding is {args.encoding}, but {args.dataset} is made "
                         f"of {kind}, expected {wanted}. {fix}")
    if kind == "events" and images.x_train.shape[1] != args.time_steps:
        frames = images.x_train.shape[1]
        raise ValueError(f"--time-steps is {args.time_steps}, but {args.dataset} has "
                         f"{frames} frames a recording, expected as many. Write "
                         f"--time-steps {frames}")
    for flag in ("crop", "cutout"):
        if getattr(args, flag) >= side:
            raise ValueError(f"--{flag} is {getattr(args, flag)}, expected less than "
                             f"the {side} pixels of an image of {args.dataset}. Lower "
                             f"it")
    if args.batch_size > len(images.x_train):
        raise ValueError(f"--batch-size is {args.batch_size}, but {args.dataset} has "
                         f"{len(images.x_train)} training images here, expected at "
                         f"most as many. Lower it")
    if args.batch_size < processes.size():
        raise ValueError(f"--batch-size is {args.batch_size}, but torchrun started "
                         f"{processes.size()} processes, expected at least an image "
                         f"for each. Raise it or lower --nproc-per-node")


def check_last_batch(args, images, config):
    """Raise ValueError if the last batch leaves batch normalisation only one value a
    channel: of one image, at one pixel, at one time step or normalised step by step.
    """
    last = len(images.x_train) % args.batch_size or args.batch_size
    if last // processes.size() > 1:
        return
    with torch.device("meta"):  # no memory, no work, no draw from torch's generator
        net, image = models.build(**config), images.copies(1).to("meta")
    try:
        net(image)
    except ValueError:
        text = (f"--batch-size is {args.batch_size}, which leaves a batch of one image "
                f"of {image.shape[-1]} pixels")
        remedy = "Change --batch-size"
        if config["bn_per_step"]:
            text += ", and --as-published bn normalises each time step by itself"
            remedy += " or leave out bn"
        else:
            text += f", and --time-steps {args.time_steps}"
            remedy += " or --time-steps"
        raise ValueError(f"{text}: one value a channel in {args.model}, expected more "
                         f"for batch normalisation. {remedy}") from None


def start_from(net, path, takes_masks=False, may_be_new=True):
    """Copy the weights of a model.pt into a network, and its masks to net.masks where
    it is pruned. Return in words what is not simply taken: the masks, or a classifier
    of other classes, in whose place the new one stays as it was drawn; None for
    nothing.

    takes_masks: whether the file may hold a pruned network. may_be_new: whether the
    classifier may be a new one. The normalisation stays that of the data set. Raises
    ValueError if the file holds a network of another form.
    """
    packed = modelfile.read(path)
    source = modelfile.unpack(packed, path)
    if models.neuron_masks(source):
        raise ValueError(f"{path} has neurons that are masked one by one, which no "
                         f"method goes on from, expected a network without. Give "
                         f"another file")
    is_pruned = not all(mask.all() for mask in source.masks.values())
    if is_pruned and not takes_masks:
        raise ValueError(f"{path} is a pruned network, expected a dense one: this "
                         f"method makes its own masks. Train one by "
                         f"prune_unstructured.py --sparsity 0, or go on from it by "
                         f"prune_unstructured.py or prune_granet.py")
    for key in ("name", "in_channels", "image_size", "widths", "encoding", "neuron"):
        if source.config[key] != net.config[key]:
            remedy = "Give the flags that it was made with, or another file"
            if key == "widths":
                remedy += ": a network that has lost channels is no start"
            raise ValueError(f"{path} has {key} {source.config[key]}, expected "
                             f"{net.config[key]} as the flags ask for. {remedy}")

    state, notes = source.state_dict(), []
    own, masks = net.state_dict(), source.masks
    state |= {key: own[key] for key in modelfile.NO_WEIGHTS}  # of the data of this run
    classes = other_classes(source, net)
    if classes and not may_be_new:
        raise ValueError(f"{path} has other classes ({classes}), expected the same "
                         f"ones: a new classifier would not be trained before channels "
                         f"are chosen. Add --epochs-pretrain 1 or more")
    if classes:
        weight = [*models.scored_by(net)][-1]  # of the output layer
        layer = weight.removesuffix(".weight")
        state |= {name: own[name] for name in own if name.startswith(f"{layer}.")}
        masks = masks | {weight: torch.ones_like(own[weight], dtype=torch.bool)}
        notes.append(f"{classes}: the classifier is drawn anew")
    net.load_state_dict(state)
    if is_pruned:
        empty = [name for name, mask in masks.items() if not mask.any()]
        if empty:
            raise ValueError(f"{path} has no weight alive in {', '.join(empty)}, "
                             f"expected at least one in each layer. Give another file")
        net.masks = masks
        alive = sum(int(mask.count_nonzero()) for mask in masks.values())
        weights = sum(mask.numel() for mask in masks.values())
        notes.insert(0, f"{100 * (1 - alive / weights):.2f} % sparse, its masks are "
                        f"taken over")
    return "; ".join(notes) or None


def other_classes(source, net):
    """Return in words how the classes of two networks differ; "" if they do not, as far
    as it is known: older files have no names."""
    there, here = source.config["num_classes"], net.config["num_classes"]
    if there != here:
        return f"{there} classes there, {here} here"
    if None not in (source.class_names, net.class_names):
        for old, new in zip(source.class_names, net.class_names):
            if old != new:
                return f"other classes, such as {old!r} there, {new!r} here"
    return ""


def check_start(args, masks):
    """Raise ValueError if --sparsity asks for more weights than --init has left."""
    if masks.n_alive < masks.keep_at(args.sparsity):
        least = math.ceil(1e4 * masks.sparsity) / 1e4  # what is named can be asked for
        raise ValueError(f"--sparsity is {args.sparsity:g}, but {args.init} is "
                         f"{100 * masks.sparsity:.2f} % sparse, expected at least "
                         f"{least:.4f}: the sparsity only rises. Raise "
                         f"--sparsity, or give another --init")


def stages(args, images, **epochs):
    """Return the training.Stages of a run. epochs: {stage: its length in epochs}."""
    steps = data.num_batches(len(images.x_train), args.batch_size)
    return training.Stages(steps, **epochs)


def num_updates(args, stages):
    """Return how many mask updates the stage `prune` has. Raise ValueError for 0."""
    steps = stages.steps("prune")
    if args.interval > steps:
        raise ValueError(f"no update would ever run: --interval is {args.interval}, "
                         f"the pruning stage has {steps} iterations, expected an "
                         f"interval of at most as many. Lower --interval or raise "
                         f"--epochs-prune")
    return steps // args.interval


MOST_NUMBERS = 2**28  # 1 GiB of float32


def evaluation_batch(args, images):
    """Return how many images a batch of an evaluation has. Without a backward pass
    there is memory for more than in training.

    On a GPU it is up to as many as fill MOST_NUMBERS in a layer of 64 channels at the
    size of the image, such as the first of VGG-16: few large batches keep it busy. It
    is at most 16 times --batch-size, so that a smaller one needs less memory. A CPU is
    slower by large batches, since they leave its cache.
    """
    batch = 4 * args.batch_size
    if torch.device(args.device).type == "cuda":
        *_, height, width = images.x_test.shape
        most = MOST_NUMBERS // (args.time_steps * 64 * height * width)
        most = min(most, 16 * args.batch_size)
        share = math.ceil(len(images.x_test) / processes.size())
        batch = max(batch, min(most, share))
    return min(batch, len(images.x_test))


def forward_of(args, net):
    """Return the form of the network that a training step calls.

    --compile compiles it. With several processes it averages the gradients over them.
    """
    if args.sync_bn and processes.size() > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place; parameters stay
    image = torch.zeros(1, *inputs.shape_of(net), dtype=torch.uint8)
    forward = torch.compile(net) if args.compile else net
    return processes.average_gradients(forward, inputs.as_input(net, image))
