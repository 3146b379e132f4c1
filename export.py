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

Each file is read back and run on images of the run's data set, in batches of 1, 3 and
64, beside the network here. Two numbers tell how far they agree: the largest difference
of a logit, and the share of images with the same class. Rounding differs between
programs; where a potential is at its threshold, that may move a spike. Without the data
the images are random ones, and a line says so.

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
import time
from pathlib import Path
from types import SimpleNamespace

import harness  # first: what is not installed is then one line

import torch
from torch import nn

import models
import sparsefile
from harness import chip, files, flags, processes, setup

BATCHES = (1, 3, 64)  # sizes at which an export is compared
SAME = 1e-3  # largest difference of logits that rounding explains
LEAST = 0.9  # of the predictions that must agree; below that an export is wrong
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
    return net(models.as_input(net, images)).sum(0)


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


class Disagrees(Exception):
    """An export does not do what the network does."""


def compare(run, net, images):
    """Return lines that tell how far an export agrees with a network, at each size of
    BATCHES. Raises Disagrees where it does not.

    run(images): the logits of the export, [N, K]. images: [64, ...], as stored.
    """
    lines = []
    for size in BATCHES:
        expected, found = logits_of(net, images[:size]), run(images[:size])
        difference = float((expected - found).abs().max())
        same = float((expected.argmax(1) == found.argmax(1)).double().mean())
        lines.append(f"batch {size:>2}: largest difference of a logit "
                     f"{difference:.2g}, {100 * same:.4g} % equal predictions")
    if same < LEAST:  # of the largest batch
        raise Disagrees(f"it does not do what the network does ({lines[-1]}), expected "
                        f"{100 * LEAST:g} % or more. Do not use the file")
    return lines


def accuracy(run, dataset):
    """Return the share of the test set that is classified rightly. run: as in compare.
    """
    right = 0
    for x, y in zip(dataset.x_test.split(64), dataset.y_test.split(64)):
        right += int((run(x).argmax(1) == y).sum())
    return right / len(dataset.y_test)


def latency(run, net, images, seconds=1.0):
    """Return (milliseconds of an export, milliseconds of the network here) at batch 1:
    medians over calls that take turns, after three that only warm up.

    run: as in compare.
    """
    one, times = images[:1], {"export": [], "here": []}
    end = time.perf_counter() + seconds
    while len(times["here"]) < 8 or time.perf_counter() < end:
        for name, call in (("export", run), ("here", lambda x: logits_of(net, x))):
            started = time.perf_counter()
            call(one)
            times[name].append(1e3 * (time.perf_counter() - started))
    return [statistics.median(calls[3:]) for calls in times.values()]


def size_of(content):
    """Return the size of some bytes in words."""
    return f"{len(content) / 1000:,.1f} kB"


# ---- the formats ---------------------------------------------------------------------


class Job(SimpleNamespace):
    """What a format is made from.

    net: the network, in eval mode on the CPU. folder: where its files go.
    images: [64, ...] of the test set as it is stored, or random ones.
    dataset: a data.Dataset; None where it is not at hand. args: the flags.
    """


def to_onnx(job):
    """Write model.onnx, and with --int8 model.int8.onnx. Return lines to print."""
    import onnx

    program = torch.onnx.export(Exported(job.net), (job.images[:3].contiguous(),),
                                dynamo=True, dynamic_shapes=SHAPES, verbose=False,
                                input_names=["images"], output_names=["logits"])
    model = program.model_proto
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info,
                 *graph.initializer, graph, model):
        del part.metadata_props[:]  # paths of this machine
    names = dict(time_steps=str(job.net.time_steps))
    if job.net.class_names is not None:
        names["class_names"] = json.dumps(job.net.class_names)
    onnx.helper.set_model_props(model, names)
    onnx.checker.check_model(model, full_check=True)
    path = job.folder / "model.onnx"
    content = model.SerializeToString()
    files.write_whole(path, lambda file: file.write(content), "wb")

    run = in_onnxruntime(path)
    opset = model.opset_import[0].version
    lines = [f"{path}: {size_of(content)}, opset {opset}, {len(graph.node)} nodes",
             *compare(run, job.net, job.images)]
    theirs, ours = latency(run, job.net, job.images)
    lines.append(f"batch  1: {theirs:.2f} ms in onnxruntime, {ours:.2f} ms here, "
                 f"{torch.get_num_threads()} threads")
    if job.args.int8:
        lines += to_int8(job, path, run)
    return lines


def in_onnxruntime(path):
    """Return a function from images to logits, both tensors, that runs an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options,
                                           providers=["CPUExecutionProvider"])

    def run(images):
        (logits,) = session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)
    return run


def to_int8(job, path, run):
    """Write model.int8.onnx: weights, inputs and outputs of convolutions and linear
    layers as 8-bit integers, the neurons in floating point. Return lines to print.

    The ranges of the values come from training images. path, run: of the fp32 model.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        batches = iter(job.dataset.x_train[:CALIBRATION].split(64))

        def get_next(self):
            for images in self.batches:
                return {"images": images.contiguous().numpy()}
            return None

    made = path.with_name("model.int8.onnx.tmp")
    logging.disable(logging.WARNING)  # advice to the author of a model
    try:
        quantization.quantize_static(
            path, made, Reader(), quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"], per_channel=True)
        content = made.read_bytes()
    finally:
        logging.disable(logging.NOTSET)
        made.unlink(missing_ok=True)
    path = path.with_name("model.int8.onnx")
    files.write_whole(path, lambda file: file.write(content), "wb")

    run_int8 = in_onnxruntime(path)
    fp32, int8 = (accuracy(one, job.dataset) for one in (run, run_int8))
    theirs, _ = latency(run_int8, job.net, job.images)
    return [f"{path}: {size_of(content)}, ranges from "
            f"{min(CALIBRATION, len(job.dataset.x_train))} training images",
            f"{len(job.dataset.y_test):,} test images: {100 * int8:.2f} % right in "
            f"int8, {100 * fp32:.2f} % in fp32; {theirs:.2f} ms at batch 1"]


def to_torch(job):
    """Write model.pt2, a program of torch.export. Return lines to print."""
    content = io.BytesIO()
    torch.export.save(traced(job.net, job.images), content)
    path, content = job.folder / "model.pt2", content.getvalue()
    files.write_whole(path, lambda file: file.write(content), "wb")
    run = torch.export.load(path).module()
    return [f"{path}: {size_of(content)}", *compare(run, job.net, job.images)]


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
    packed = models.pack(job.net)
    content, dense = sparsefile.content_of(job.net), io.BytesIO()
    torch.save(packed, dense)
    path = job.folder / "model.sparse.gz"
    files.write_whole(path, lambda file: file.write(content), "wb")

    again = sparsefile.load(path)
    for name, tensor in packed["state_dict"].items():
        if not torch.equal(tensor, again.state_dict()[name]):
            raise Disagrees(f"{name} has changed in {path}, expected the same numbers. "
                            f"Do not use the file")
    dense = dense.getvalue()
    zipped = gzip.compress(dense)
    alive = sum(int(mask.count_nonzero()) for mask in packed["masks"].values())
    return [f"{path}: {size_of(content)}, {alive:,} weights alive; the dense file "
            f"{size_of(dense)}, {size_of(zipped)} by gzip",
            "read back: every tensor and mask equal"]


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
    own = config if name == config.get("dataset") else {}
    wanted = SimpleNamespace(
        dataset=name, data_dir=args.data_dir or config.get("data_dir", "data"),
        train_limit=own.get("train_limit"), event_split=own.get("event_split"),
        time_steps=net.time_steps, smoke=False)
    try:
        dataset = setup.load(wanted, torch.device("cpu"))
        check_fit(net, dataset)
    except (OSError, ValueError) as error:
        if is_named:
            raise
        return None, " ".join(str(error).split())
    return dataset, None


def check_fit(net, dataset):
    """Raise ValueError unless a network takes the images of a data set."""
    found = tuple(dataset.x_test.shape[1:])
    if found != shape_of(net) or dataset.num_classes != net.config["num_classes"]:
        raise ValueError(f"{dataset.name} has images {list(found)} of "
                         f"{dataset.num_classes} classes, but the network takes "
                         f"{list(shape_of(net))} of {net.config['num_classes']}, "
                         f"expected the data that it was trained with. Name them by "
                         f"--dataset")


def shape_of(net):
    """Return the shape of an image, or of a recording, as it is stored."""
    side = net.config["image_size"]
    shape = (net.config["in_channels"], side, side)
    return (net.time_steps, *shape) if net.encoding == "events" else shape


def images_for(net, dataset):
    """Return as many images as the largest of BATCHES: the first ones of the test set,
    from the start again where there are too few; without a data set random ones."""
    size = max(BATCHES)
    if dataset is not None:
        return dataset.x_test[torch.arange(size) % len(dataset.x_test)]
    most = 4 if net.encoding == "events" else 256
    generator = torch.Generator().manual_seed(0)
    return torch.randint(most, (size, *shape_of(net)), generator=generator,
                         dtype=torch.uint8)


def without_channels(net, path, images):
    """Return (network to export, what is to be said): the one of compact.pt, if it
    gives the same as the one of model.pt."""
    small = models.load(path)
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
                        help="the folder of a run, or a file of models.pack")
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


def main(argv=None):
    args = parse_args(argv)
    with flags.exits(2, ValueError, OSError):
        processes.require_one()
        names = chosen(args)
        path = Path(args.network)
        if path.is_dir():
            path = path / "model.pt"
        net = models.load(path)
        dataset, why = data_for(net, files.saved_config(path.parent), args)
        if args.int8 and dataset is None:
            raise ValueError(f"--int8 takes the ranges of values from training images, "
                             f"but they are not at hand ({why}). Name them by "
                             f"--dataset or --data-dir")
        images = images_for(net, dataset)
        print(f"{path}: {net.config['name']}, T = {net.time_steps}, compared on "
              + (f"random images: {why}" if dataset is None else
                 f"{len(images)} test images of {dataset.name}"))
        smaller = path.with_name("compact.pt")
        if path.name == "model.pt" and smaller.exists():
            net, text = without_channels(net, smaller, images)
            print(text)
        folder = Path(args.out or path.parent / "export")
        folder.mkdir(parents=True, exist_ok=True)
    job = Job(net=net, folder=folder, images=images, dataset=dataset, args=args)
    functions = {name: FORMATS[name] for name in names}
    if args.sparse:
        functions["sparse"] = to_sparse
    with flags.exits(2, ValueError), flags.exits(1, Disagrees, OSError):
        for name, function in functions.items():
            try:
                lines = function(job)
            except ValueError as error:  # it does not apply to this network
                if args.to:
                    raise
                lines = [str(error)]
            for line, start in zip(lines, [name, *[""] * len(lines)]):
                print(f"{start:<8}{line}", flush=True)


if __name__ == "__main__":
    main()
