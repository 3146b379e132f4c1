"""Flags: the ones that all scripts share, their defaults by data set, and what a wrong one gets.

    parser = flags.make_parser(__doc__)                    # the common flags; a script adds its own
    args = flags.parse(parser, argv, SETTINGS, run_name)   # resolved, each one

A wrong flag or file is one line on stderr that says what is wrong, what was expected and how to fix
it, and exit code 2, before anything is written.
"""
import argparse
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import models
from harness import processes
from harness.machine import is_out_of_memory
from neurons import RESETS, SURROGATES

MAY_DIFFER = {"device", "save_every"}  # flags that a resumed run may change

# Augmentation: LTH-SNN's crop and flip; a short run on centred 28x28 images is better off without
# crops, and digits have no mirror image
SMALL = dict(model="small", time_steps=4, batch_size=64, lr=0.1, crop=0, flip=True)
PAPER = dict(model="vgg16", time_steps=5, batch_size=128, lr=0.3, crop=4, flip=True)  # Table 4
EVENTS = SMALL | dict(encoding="events", crop=4, flip=False)  # frames of counts, T of the data
DATASETS = {"fashion-mini": SMALL, "mnist": SMALL | dict(batch_size=128, crop=2, flip=False),
            "fashion-mnist": SMALL | dict(batch_size=128),
            "cifar10": PAPER, "cifar100": PAPER, "tiny-imagenet": PAPER | dict(crop=8),
            # T, crops and rotations are SD-SNN's, and T and the network PQ's. INTERPRETATION of its
            # augmentation: crops and flips, as with CIFAR
            "n-mnist": EVENTS | dict(time_steps=20, batch_size=100, rotate=10.0),
            "dvs-gesture": EVENTS | dict(time_steps=64, batch_size=16, crop=16, rotate=5.0),
            "cifar10-dvs": EVENTS | dict(model="vggsnn", time_steps=10, flip=True)}
COMMON = dict(dataset="fashion-mini", data_dir="data", train_limit=None, encoding="direct",
              width=1.0, tau=None, threshold=None, surrogate=None, reset=None, loss="ce",
              momentum=0.9, weight_decay=5e-4, cutout=0, rotate=0.0, init=None, device=None,
              precision="fp32", compile=False, sync_bn=False, seed=0, run_dir=None, save_every=10.0,
              resume=False, overwrite=False, smoke=False)
NAMED_SIZES = dict(width="width", train_limit="limit", time_steps="time")  # in the run's name
SMOKE = dict(width=0.25, batch_size=16)  # upper bounds of a trial, as in a script's settings
SMOKE_IMAGES = 256


@contextmanager
def exits(code, *errors, no_memory="Try a smaller --width or --train-limit"):
    """Turn errors into one line on stderr and an exit code; no_memory: what to do about that."""
    try:
        yield
    except (processes.Mismatch, *errors, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if processes.is_loss(error):
            text = ("another rank is gone, expected all of them to the end. The last checkpoint is "
                    "kept: go on with --resume")
        elif is_out_of_memory(error):
            text = f"the memory does not suffice ({text[:200]}), expected more of it. {no_memory}"
        elif not isinstance(error, (processes.Mismatch, *errors)):
            raise
        leave(code, f"error: {text}")
    except KeyboardInterrupt:
        leave(130, "interrupted, nothing more is saved")


def leave(code, line, name=None):
    """Exit with a line on stderr, which one rank writes for all."""
    if processes.speaks(code):
        print(f"{name or Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    raise SystemExit(code)


def whole(low, high=2**31):
    """Return an argparse type: a whole number in [low, high)."""
    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"is {text}, expected a whole number of at least {low}"
                                             + (f", below {high}" if value >= high else ""))
        return value
    return convert


def number(low, high=math.inf, above=False):
    """Return an argparse type: a finite number in [low, high), or in (low, high) if `above`."""
    def convert(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value < high) or (above and value == low):
            if high == math.inf:
                wanted = f"a finite number {'above' if above else 'of at least'} {low:g}"
            elif above:
                wanted = f"a number above {low:g} and below {high:g}"
            else:
                wanted = f"a fraction in [{low:g}, {high:g})"
            hint = f". For {value:g} % write {value / 100:g}" if high == 1 < value < 100 else ""
            raise argparse.ArgumentTypeError(f"is {text}, expected {wanted}{hint}")
        return value
    return convert


class Parser(argparse.ArgumentParser):
    """argparse without its usage lines: a wrong flag is one line and exit code 2.

    Flags that are not given are absent from the result: parse() fills in their defaults.
    """

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        leave(2, f"error: {' '.join(message.split())}", self.prog)


def make_parser(doc):
    """Return a parser with the flags that all scripts have in common."""
    parser = Parser(doc)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", metavar="NAME|FILE.npz|FOLDER",
        help=f"{', '.join(DATASETS)}, or a path: an .npz file with x_train, y_train, x_test, "
             f"y_test, or a folder with train/CLASS/* and test/CLASS/* (a path has the defaults "
             f"of fashion-mini)")
    add("--data-dir", metavar="DIR", help="where named sets lie, as NAME.npz or in their official "
        "layout, and where they are downloaded to if they are not there")
    add("--train-limit", type=whole(1), metavar="N",
        help="use only the first N training images, balanced over the classes")
    add("--crop", type=whole(0), metavar="PIXELS", help="training images are padded by as much and "
        "cropped back at random; 0: not at all")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror training images at random")
    add("--cutout", type=whole(0), metavar="PIXELS",
        help="side of a square hole in each training image (LTH-SNN's code has 16 on CIFAR)")
    add("--rotate", type=number(0, 180), metavar="DEGREES",
        help="training images are turned at random by as much, either way; 0: not at all")
    add("--encoding", choices=models.ENCODINGS, help="of the input: the image at each step; spikes "
        "drawn at each step with the pixels as probabilities; the frames of an event camera")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=models.NAMES, help="the network")
    add("--width", type=number(0, 100, above=True), metavar="FACTOR",
        help="a factor on all its widths")
    add("--time-steps", type=whole(1, 10_000), metavar="T", help="time steps of the simulation")
    add("--tau", type=number(1, above=True), metavar="STEPS", help="membrane time constant of the "
        "neurons (default: the network's own, as of the next three: 1.25 of sdsnn-small, 2 of "
        "sdsnn-large, where it is learnt, and of gradr-*, 4/3 of the others)")
    add("--threshold", type=number(0, above=True), metavar="V", help="where they fire (0.5 of "
        "sdsnn-*, 1 of the others)")
    add("--surrogate", choices=SURROGATES, help="of the gradient of a spike (rectangular of "
        "sdsnn-small)")
    add("--reset", choices=RESETS, help="a potential that fired goes to 0, or down by the "
        "threshold")
    add("--init", metavar="MODEL.pt", help="start from this network, a trained dense one, say")
    add = parser.add_argument_group("training").add_argument
    add("--batch-size", type=whole(1), metavar="N", help="images a step, over all processes")
    add("--lr", type=number(0, above=True), help="learning rate at the start of a stage")
    add("--loss", choices=("ce", "mse"), help="cross-entropy of each step, or the squared distance "
        "of the output's firing rate to the label")
    add("--momentum", type=number(0, 1), help="momentum of SGD, a fraction in [0, 1)")
    add("--weight-decay", type=number(0), help="L2 decay of all parameters")
    add = parser.add_argument_group("run").add_argument
    add("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    add("--precision", choices=("fp32", "bf16"), help="bf16: mixed precision by autocast")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--sync-bn", action="store_true", help="under torchrun, on GPUs: batch normalisation over "
        "the whole batch, and not over the share of each process")
    add("--seed", type=whole(0), help="seed of weights, order of the images and ties")
    add("--run-dir", metavar="DIR",
        help="the run's folder (default: runs/ and a name made of the flags)")
    add("--save-every", type=number(0), metavar="MINUTES", help="save a checkpoint inside an epoch "
        "too, at the first step after so many minutes: what a kill can cost")
    add("--resume", action="store_true", help="go on where this run was stopped, or begin it")
    add("--overwrite", action="store_true", help="replace the run that is in the folder")
    add("--smoke", action="store_true", help="the same path, end to end, in seconds: a quarter of "
        "the width, a few batches, one epoch a stage, in a folder of its own")
    return parser


def parse(parser, argv, settings, complete, run_name):
    """Return the resolved flags of a script; exit with code 2 if they are wrong.

    settings: {data set: {flag: default}}, the script's own, beside DATASETS and COMMON; "all" holds
    for all data sets, "smoke" for --smoke, and a path has those of fashion-mini. Each source
    overrides the one before: COMMON, the data set, --smoke, the config.json of a run that is
    resumed, what is given. complete(args, explicit) fills in what depends on other flags; explicit:
    those that the command line or that config.json gives. run_name(args) names the run's folder.
    """
    tables = {name: DATASETS[name] | settings[name] for name in DATASETS}
    shared = COMMON | settings["all"]
    explain_defaults(parser, tables, shared)
    given = vars(parser.parse_args(argv))
    for one, other in (("init", "resume"), ("resume", "overwrite")):
        if given.get(one) and given.get(other):
            parser.error(f"--{one} and --{other} exclude each other, expected one of them. "
                         f"Leave one out")

    def resolve(config):
        name = given.get("dataset", config.get("dataset", shared["dataset"]))
        smoke = SMOKE | settings["smoke"] if given.get("smoke", config.get("smoke")) else {}
        table = tables.get(name, tables["fashion-mini"])
        args = argparse.Namespace(**{**shared, **table, **config, **given})
        for flag, bound in smoke.items():
            setattr(args, flag, min(getattr(args, flag), bound))
        with exits(2, ValueError):
            complete(args, config | given)
        return args

    args = resolve({})
    usual = shared | tables.get(args.dataset, tables["fashion-mini"])
    usual |= SMOKE if args.smoke else {}
    name = ("smoke-" if args.smoke else "") + with_sizes(run_name(args), args, usual)
    folder = Path(args.run_dir or Path("runs", name))
    if args.resume and (folder / "config.json").is_file():
        with exits(2, ValueError, OSError):
            config = read_config(folder, parser)
        for flag, value in given.items():
            if flag in config and config[flag] != value and flag not in MAY_DIFFER | {"run_dir"}:
                parser.error(f"{folder} was made with --{flag.replace('_', '-')} {config[flag]}, "
                             f"this command says {value}. Leave the flag out, or name another "
                             f"--run-dir")
        args = resolve({flag: config[flag] for flag in vars(args).keys() & config.keys()
                        if flag not in ("resume", "overwrite", "device", "run_dir")})
    args.run_dir = str(folder)
    args.overwrite |= args.smoke and "run_dir" not in given and not args.resume
    return args


def with_sizes(name, args, usual):
    """Return a run's name with the sizes that are not the usual ones, before its seed: else two
    runs of different sizes would share a folder."""
    sizes = "".join(f"-{word}{value:g}" for flag, word in NAMED_SIZES.items()
                    if (value := getattr(args, flag)) != usual[flag])
    stem, seed = name.rsplit("-seed", 1)
    return f"{stem}{sizes}-seed{seed}"


def explain_defaults(parser, tables, shared):
    """Add to each flag's help what its default is: of fashion-mini and all that are not named, then
    of those that are."""
    for action in parser._actions:
        by_value = {}
        for name, table in tables.items():
            by_value.setdefault(table.get(action.dest, shared.get(action.dest)), []).append(name)
        usual, *others = by_value  # fashion-mini comes first
        shown = "; ".join([str(usual), *(f"{value}: {', '.join(by_value[value])}"
                                         for value in others)])
        if others or usual not in (None, False):
            action.help += f" (default {shown})"
        action.help = action.help.replace("%", "%%")


def read_config(folder, parser):
    """Return the config.json of a run; its flags are checked like those of the command line."""
    try:
        config = json.loads((folder / "config.json").read_text())
        for action in parser._actions:
            value = config.get(action.dest)
            if value is not None and action.type is not None:
                action.type(str(value))
            if value is not None and action.choices and value not in action.choices:
                raise ValueError
    except (ValueError, AttributeError, argparse.ArgumentTypeError):
        config = None
    if config is None:
        raise ValueError(f"{folder / 'config.json'} is damaged, expected a JSON object. Start "
                         f"again with --overwrite")
    return config
