"""A trained network for other people's programs, each file checked by running it.

    python export.py runs/NAME                 # all that applies, in runs/NAME/export
    python export.py runs/NAME --to onnx --int8       # and in 8-bit integers
    python export.py runs/NAME --to torch --sparse    # and a file of what is alive
    python export.py assets/dense/model.pt --out deployed
    pip install -r requirements-export.txt            # what onnx and nir need

The formats:

- onnx: model.onnx, run by onnxruntime. --int8: model.int8.onnx too.
- torch: model.pt2, a program of torch.export. torch alone reads it.
- nir: model.nir, a graph for neuromorphic chips and simulators (harness/nir_graph.py).
- report: report.md, .json, .png: what a chip needs for the network (harness/chip.py).
- --sparse: model.sparse.gz, the weights that are alive. sparsefile.load reads it.

onnx and torch take uint8 images [N, C, H, W], or counts of events [N, T, 2, H, W], with
any N, and return the logits [N, K], summed over the T steps. The largest is the class.
Normalisation, encoding and the loop over T are inside.

Each file is read and run on images of the run's data set, beside the network here,
before it stands in the folder: on 256 of the test set, drawn from all of it, the same
each time. onnx and torch take them in batches of 1, 3 and 64. Two numbers tell how far
they agree: the largest difference of a logit, and the share of images with the same
class. Rounding differs between programs; where a potential is at its threshold, that
may move a spike. A file that does something else is not written, and the exit code is
1. Without the data the images are random ones, and a line says so.

Where a run has a compact.pt, it is exported in place of model.pt, if it gives the same
on these images: fewer channels, the same function.
"""
import copy
import gzip
import importlib.util
import io
import json
import logging
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import harness  # first: what is not installed is then one line

import torch
from torch import nn

import data
import inputs
import modelfile
import models
import sparsefile
from harness import chip, files, flags, presets, processes, setup
from harness.files import Disagrees
from harness.output import in_a_line

IMAGES = 256  # of the test set, on which an export is run
BATCHES = (1, 3, 64)  # sizes at which onnx and torch are compared
SAME = 1e-3  # largest difference of logits that rounding explains
LEAST = 0.9  # of the predictions that must be equal
FAR = 0.1  # how far an image's logits may be off, as a share of their deviation
CALIBRATION = 256  # training images from which int8 takes the ranges of values
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "nir": ("nir",)}
INSTALL = "pip install -r requirements-export.txt"


# ---- the network as others see it ----------------------------------------------------


class Exported(nn.Module):
    """A network from stored images to the sum of its logits over time.

    Called with uint8 images [N, C, H, W] or counts of events [N, T, 2, H, W], it
    returns [N, K]. Under torch.export its neurons are those of neurons.py: the fast
    ones are no operations that other programs know.
    """

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False)
        draws = None
        if net.encoding == "rate":
            # the draw of SpikingNet._spikes in eval mode: one, shared by all images
            config = net.config
            shape = (1, config["in_channels"], *[config["image_size"]] * 2)
            generator = torch.Generator().manual_seed(0)
            draws = torch.rand(net.time_steps, *shape, generator=generator)
        self.register_buffer("draws", draws)
        self.eval()

    def forward(self, images):
        if self.draws is not None:
            images = (self.draws < images / 255).to(self.draws.dtype)  # [T, N, ...]
        elif self.net.encoding == "events":
            images = images.transpose(0, 1)
        return self.net(images).sum(0)


@torch.no_grad()
def logits_of(net, images):
    """Return the logits of a network here, summed over time, [N, K]."""
    return net(inputs.as_input(net, images)).sum(0)


# of the input, by dimension: any number of images
SHAPES = ({0: torch.export.Dim("batch", min=1)},)


def traced(net, images):
    """Return the network as a torch.export.ExportedProgram with any number of images.

    images: some to trace it with, at least two.
    """
    program = torch.export.export(Exported(net), (images[:3].contiguous(),),
                                  dynamic_shapes=SHAPES)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


# ---- the comparison ------------------------------------------------------------------


def agreement(export, net, images):
    """Return lines that tell how far an export agrees with a network, at each size of
    BATCHES.

    export: a function from images to logits, [N, K]. images: [N, ...] as stored, at
    least as many as the largest size.
    Raises Disagrees if a class of ten differs in the largest batch, or if the logits of
    half of the images of a batch are off by more than a tenth of their deviation. (A
    spike that rounding moves changes an image here and there, and that by less.)
    """
    lines, far = [], None
    for size in reversed(BATCHES):
        expected, found = logits_of(net, images[:size]), export(images[:size])
        differences = (expected - found).abs().amax(1)
        same = float((expected.argmax(1) == found.argmax(1)).double().mean())
        lines.insert(0, f"batch {size:>2}: largest difference of a logit "
                        f"{differences.max():.2g}, {100 * same:.4g} % equal "
                        f"predictions")
        if far is None:  # the largest batch
            far = max(SAME, FAR * float(expected.std()))
            is_alike = same >= LEAST
        if not (is_alike and differences.median() <= far):
            raise Disagrees(f"it does not do what the network does ({lines[0]}), "
                            f"expected {100 * LEAST:g} % or more, and logits within "
                            f"{far:.2g}. Nothing is written")
    return lines


def accuracy(export, dataset):
    """Return the share of the test set that is classified rightly. export: as in
    agreement()."""
    right = 0
    for x, y in zip(dataset.x_test.split(64), dataset.y_test.split(64)):
        right += int((export(x).argmax(1) == y).sum())
    return right / len(dataset.y_test)


def latency(export, net, images, seconds=1.0):
    """Return (milliseconds of an export, milliseconds of the network here) at batch 1:
    medians over calls that take turns, after three that only warm up.

    export: as in agreement().
    """
    one, times = images[:1], {"export": [], "here": []}
    end = time.perf_counter() + seconds
    while len(times["here"]) < 8 or time.perf_counter() < end:
        for name, call in (("export", export), ("here", lambda x: logits_of(net, x))):
            started = time.perf_counter()
            call(one)
            times[name].append(1e3 * (time.perf_counter() - started))
    return [statistics.median(calls[3:]) for calls in times.values()]


def size_of(content):
    """Return the size of some bytes in words."""
    return f"{len(content) / 1000:,.1f} kB"


# ---- the formats ---------------------------------------------------------------------


class Job(NamedTuple):
    """What a format is made from."""

    net: nn.Module         # in eval mode, on the CPU
    folder: Path           # where its files go
    images: torch.Tensor   # [256, ...] of the test set as stored, mixed, or random ones
    dataset: data.Dataset  # None where it is not at hand
    args: SimpleNamespace  # the flags


class Failed(Exception):
    """Another project's code could not make or run an export."""


@contextmanager
def by_others(what):
    """Turn any error of another project's code into Failed. what: it does, in words."""
    try:
        yield
    except Disagrees:
        raise
    except Exception as error:  # their errors have no class in common
        reason = f"{type(error).__name__}: {in_a_line(error, 300)}"
        raise Failed(f"{what} has failed ({reason}), expected a network that it knows. "
                     f"Try another release of its package, or another format"
                     ) from error


def to_onnx(job):
    """Write model.onnx, and with --int8 model.int8.onnx. Return lines to print."""
    with by_others("the export to ONNX"):
        model = as_onnx(job.net, job.images)
    content = model.SerializeToString()
    with by_others("ONNX Runtime"):
        export = in_onnxruntime(content)
        lines = agreement(export, job.net, job.images)
    theirs, ours = latency(export, job.net, job.images)
    path = job.folder / "model.onnx"
    files.write_whole(path, lambda file: file.write(content), "wb")
    opset = model.opset_import[0].version
    lines = [f"{path}: {size_of(content)}, opset {opset}, {len(model.graph.node)} "
             f"nodes", *lines,
             f"batch  1: {theirs:.2f} ms in ONNX Runtime; {ours:.2f} ms here, a torch "
             f"call at a time; {torch.get_num_threads()} threads"]
    if job.args.int8:
        lines += to_int8(job, content, export)
    return lines


def as_onnx(net, images):
    """Return a network as an onnx.ModelProto. images: some to trace it with."""
    import onnx

    program = torch.onnx.export(Exported(net), (images[:3].contiguous(),),
                                dynamo=True, dynamic_shapes=SHAPES, verbose=False,
                                input_names=["images"], output_names=["logits"])
    model = program.model_proto
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info,
                 *graph.initializer, graph, model):
        del part.metadata_props[:]  # paths of this machine
    names = dict(time_steps=str(net.time_steps))
    if net.class_names is not None:
        names["class_names"] = json.dumps(net.class_names)
    onnx.helper.set_model_props(model, names)
    onnx.checker.check_model(model, full_check=True)
    return model


def in_onnxruntime(content):
    """Return a function from images to logits, both tensors, that runs the bytes of an
    ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options,
                                           providers=["CPUExecutionProvider"])

    def export(images):
        (logits,) = session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)
    return export


def to_int8(job, content, export):
    """Write model.int8.onnx: weights, inputs and outputs of convolutions and linear
    layers as 8-bit integers, the neurons in floating point. Return lines to print.

    The ranges of the values come from training images. content, export: of the fp32
    model, its bytes and what runs them.
    """
    with by_others("ONNX Runtime's quantisation"):
        images = job.dataset.x_train
        images = mixed(images, min(CALIBRATION, len(images)))
        content = in_int8(content, images)
        export_int8 = in_onnxruntime(content)
    fp32, int8 = (accuracy(one, job.dataset) for one in (export, export_int8))
    theirs, _ = latency(export_int8, job.net, job.images)
    path = job.folder / "model.int8.onnx"
    files.write_whole(path, lambda file: file.write(content), "wb")
    return [f"{path}: {size_of(content)}, ranges from {len(images)} training images",
            f"{len(job.dataset.y_test):,} test images: {100 * int8:.2f} % right in "
            f"int8, {100 * fp32:.2f} % in fp32; {theirs:.2f} ms at batch 1"]


def in_int8(content, images):
    """Return the bytes of an ONNX file in 8-bit integers, from those of the fp32 one.
    images: from which the ranges of the values are taken."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        batches = iter(images.split(64))

        def get_next(self):
            for batch in self.batches:
                return {"images": batch.contiguous().numpy()}
            return None

    logging.disable(logging.WARNING)  # advice to the author of a model
    try:
        with tempfile.TemporaryDirectory() as folder:
            fp32, int8 = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
            fp32.write_bytes(content)
            quantization.quantize_static(
                fp32, int8, Reader(), quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm", "MatMul"], per_channel=True)
            return int8.read_bytes()
    finally:
        logging.disable(logging.NOTSET)


def to_torch(job):
    """Write model.pt2, a program of torch.export. Return lines to print."""
    with by_others("torch.export"):
        content = io.BytesIO()
        torch.export.save(traced(job.net, job.images), content)
        content = content.getvalue()
        export = torch.export.load(io.BytesIO(content)).module()
        lines = agreement(export, job.net, job.images)
    path = job.folder / "model.pt2"
    files.write_whole(path, lambda file: file.write(content), "wb")
    return [f"{path}: {size_of(content)}", *lines]


def to_nir(job):
    """Write model.nir. Return lines to print."""
    from harness import nir_graph
    return nir_graph.export_nir(job.net, job.folder, job.images)


def to_report(job):
    """Write what a neuromorphic chip needs. Return lines to print."""
    return chip.report(job.net, job.images, job.folder, job.args.core_neurons,
                       job.args.core_synapses)


FORMATS = {  # {name in --to: function of a Job that writes files and returns lines}
    "onnx": to_onnx,
    "torch": to_torch,
    "nir": to_nir,
    "report": to_report,
}


def to_sparse(job):
    """Write model.sparse.gz, what is alive. Return lines to print."""
    packed = modelfile.pack(job.net)
    content, dense = sparsefile.content_of(job.net), io.BytesIO()
    torch.save(packed, dense)
    again = sparsefile.load(io.BytesIO(content))
    for name, tensor in packed["state_dict"].items():
        if not torch.equal(tensor, again.state_dict()[name]):
            raise Disagrees(f"{name} has changed in model.sparse.gz, expected the same "
                            f"numbers. Nothing is written")
    path = job.folder / "model.sparse.gz"
    files.write_whole(path, lambda file: file.write(content), "wb")

    dense = dense.getvalue()
    zipped = gzip.compress(dense)
    alive = sum(int(mask.count_nonzero()) for mask in packed["masks"].values())
    return [f"{path}: {size_of(content)}, {alive:,} weights alive; the dense file "
            f"{size_of(dense)}, {size_of(zipped)} by gzip",
            "read back: every tensor and mask equal"]


def check_nir(net):
    """Raise ValueError for a network that NIR has no neurons for."""
    from harness import nir_graph
    nir_graph.to_nir(net)


CHECKS = {"nir": check_nir}  # {format: function that refuses a network by ValueError}


# ---- what is exported ----------------------------------------------------------------


def data_for(net, config, args):
    """Return (data set, why there is none): that of the flags or of the run; None if it
    is not at hand.

    config: the flags of the run. Raises ValueError or OSError for one that --dataset or
    --data-dir names.
    """
    is_named = args.dataset is not None or args.data_dir is not None
    name = args.dataset or config.get("dataset")
    if name is None:
        return None, "no config.json beside it names its data; --dataset does"
    own = presets.of_earlier(config) if name == config.get("dataset") else {}
    wanted = SimpleNamespace(
        dataset=name, data_dir=args.data_dir or config.get("data_dir", "data"),
        train_limit=own.get("train_limit"), event_split=own.get("event_split"),
        time_steps=net.time_steps, smoke=False)
    try:
        dataset = setup.load(wanted, torch.device("cpu"), download=is_named)
        check_fit(net, dataset)
    except (OSError, ValueError) as error:
        if is_named:
            raise
        return None, " ".join(str(error).split())
    except (TypeError, AttributeError):
        if is_named:
            raise
        return None, "its config.json is damaged, --dataset names the data"
    return dataset, None


def check_fit(net, dataset):
    """Raise ValueError unless a network takes the images of a data set."""
    found, wanted = tuple(dataset.x_test.shape[1:]), inputs.shape_of(net)
    if found != wanted or dataset.num_classes != net.config["num_classes"]:
        raise ValueError(f"{dataset.name} has images {list(found)} of "
                         f"{dataset.num_classes} classes, but the network takes "
                         f"{list(wanted)} of {net.config['num_classes']}, expected the "
                         f"data that it was trained with. Name them by --dataset")


def images_for(net, dataset):
    """Return 256 images of the test set, mixed, or all of a smaller one, some of them
    again where these are fewer than a batch; without a data set random ones."""
    if dataset is None:
        return inputs.random_images(net, IMAGES)
    return mixed(dataset.x_test, max(max(BATCHES), min(IMAGES, len(dataset.x_test))))


def mixed(images, size):
    """Return so many of the images in the order of a draw, the same each time, and from
    its start again where these are fewer. A data set may be sorted by class: its first
    images are then of one class."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[torch.arange(size) % len(images)]]


def without_channels(net, path, images):
    """Return (network to export, what is to be said): the one of compact.pt, if it
    gives the same as the one of model.pt."""
    images = images[:max(BATCHES)]
    try:
        small = models.load(path)
        shapes = inputs.shape_of(small), small.config["num_classes"]
        if shapes != (inputs.shape_of(net), net.config["num_classes"]):
            raise ValueError(f"{path} is of other images or classes")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        return net, f"note: {reason}: not used. compact.py makes it anew"
    difference = float((logits_of(net, images) - logits_of(small, images)).abs().max())
    if not difference <= SAME:
        return net, (f"note: {path} differs by {difference:.2g}, as that of another "
                     f"network: not used. compact.py makes it anew")
    return small, (f"{path} is exported in its place: fewer channels, largest "
                   f"difference {difference:.2g}")


def missing_for(name):
    """Return the packages that a format needs and this Python does not have."""
    return [package for package in NEEDS.get(name, ())
            if importlib.util.find_spec(package) is None]


def parse_args(argv):
    parser = flags.Parser(__doc__)
    parser.add_argument("network", type=flags.path, metavar="RUN|MODEL.pt",
                        help="the folder of a run, or a file of modelfile.pack")
    parser.add_argument("--to", nargs="+", choices=list(FORMATS), default=None,
                        metavar="FORMAT",
                        help=f"{', '.join(FORMATS)} (default: all that apply and whose "
                             f"packages are installed)")
    parser.add_argument("--int8", action="store_true", default=False,
                        help="with onnx: a second file whose convolutions and linear "
                             "layers compute with 8-bit integers, and its accuracy on "
                             "the whole test set")
    parser.add_argument("--sparse", action="store_true", default=False,
                        help="a compressed file of the weights that are alive, for "
                             "sparsefile.load")
    parser.add_argument("--core-neurons", type=flags.whole(1), metavar="N",
                        default=chip.CORE_NEURONS,
                        help=f"report: neurons of a core of the chip (default "
                             f"{chip.CORE_NEURONS:,}: Loihi)")
    parser.add_argument("--core-synapses", type=flags.whole(1), metavar="N",
                        default=chip.CORE_SYNAPSES,
                        help=f"report: synapses of a core (default "
                             f"{chip.CORE_SYNAPSES:,}: Loihi at 8 bits)")
    parser.add_argument("--out", type=flags.folder, default=None, metavar="DIR",
                        help="where the files go (default: export beside the network)")
    parser.add_argument("--dataset", type=flags.path, default=None, metavar="NAME|PATH",
                        help="images to compare with, as in training (default: those "
                             "of the run)")
    parser.add_argument("--data-dir", type=flags.path, default=None, metavar="DIR",
                        help="where named data sets lie (default: as in the run)")
    return parser.parse_args(argv)


def chosen(args):
    """Return the formats to write. Print which are left out, and how to have them.
    Raise ValueError for what --to or --int8 ask for and cannot have."""
    names = args.to or list(FORMATS)
    if args.int8 and "onnx" not in names:
        raise ValueError("--int8 is given, but --to has no onnx, which it belongs to. "
                         "Add onnx to --to, or leave --int8 out")
    found = []
    for name in names:
        missing = " and ".join(missing_for(name))
        if not missing:
            found.append(name)
        elif args.to or (args.int8 and name == "onnx"):
            raise ValueError(f"{name} needs {missing}, which {sys.executable} does not "
                             f"have. Install it: {INSTALL}")
        else:
            print(f"{name} needs {missing}: {INSTALL}")
    return found


def applicable(names, net, is_asked):
    """Return the formats that can hold a network, and print why others cannot. Raise
    ValueError for such a one if --to has asked for it."""
    found = []
    for name in names:
        try:
            CHECKS.get(name, lambda net: None)(net)
        except ValueError as error:
            if is_asked:
                raise
            print_part(name, [str(error)])
        else:
            found.append(name)
    return found


def print_part(name, lines, file=None):
    """Print the lines of a format behind its name."""
    for line, start in zip(lines, [name, *[""] * len(lines)]):
        print(f"{start:<8}{line}", flush=True, file=file)


def main(argv=None):
    args = parse_args(argv)
    with flags.exits(2, ValueError, OSError):
        processes.require_one()
        names = chosen(args)
        path = Path(args.network)
        if path.is_dir():
            path = path / "model.pt"
        net = models.load(path)
        if models.neuron_masks(net):
            raise ValueError(f"{path} has neurons that are masked one by one, which no "
                             f"format here keeps, expected a network without. Use it "
                             f"by models.load")
        dataset, why = data_for(net, files.saved_config(path.parent), args)
        if args.int8 and dataset is None:
            raise ValueError(f"--int8 takes the ranges of values from training images, "
                             f"but they are not at hand ({why}). Name them by "
                             f"--dataset or --data-dir")
        images = images_for(net, dataset)
        print(f"{path}: {net.config['name']}, T = {net.time_steps}, compared on "
              + (f"random images: {why}" if dataset is None else
                 f"{min(len(images), len(dataset.x_test))} test images of "
                 f"{dataset.name}"))
        smaller = path.with_name("compact.pt")
        if path.name == "model.pt" and smaller.exists():
            net, text = without_channels(net, smaller, images)
            print(text)
        functions = {name: FORMATS[name]
                     for name in applicable(names, net, args.to is not None)}
        if args.sparse:
            functions["sparse"] = to_sparse
        folder = Path(args.out or path.parent / "export")
        folder.mkdir(parents=True, exist_ok=True)
        old = [file.name for file in sorted(folder.iterdir())]
        if old:
            print(f"{folder} has {', '.join(old[:6])}{', ...' * (len(old) > 6)}: files "
                  f"of the same name are replaced")

    job, has_failed = Job(net, folder, images, dataset, args), False
    with flags.exits(1):
        for name, function in functions.items():
            try:
                print_part(name, function(job))
            except (Disagrees, Failed, OSError) as error:
                print_part(name, [f"error: {' '.join(str(error).split())}"],
                           file=sys.stderr)
                has_failed = True
    if has_failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
