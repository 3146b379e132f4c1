"""What a run is started in: signals, outputs, matplotlib, devices, variables of a cluster, paths,
missing packages. Each works, or is one line and exit code 2, and nothing is left behind."""
import importlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import analyze
import benchmark
import compact
import compare
import data
import helpers
import metrics
import models
import neurons
import prune_lottery
import prune_structured
import prune_unstructured
import sources
import training
from harness import (machine, meters, output, plots, processes, records, report,
                     runfolder, setup)

ROOT = Path(__file__).parent.parent
OTHERS = ("analyze", "compare", "benchmark", "compact", "export")
SCRIPTS = sorted([*ROOT.glob("prune_*.py"), *(ROOT / f"{name}.py" for name in OTHERS)])
SHORT = ("--dataset tiny.npz --width 0.25 --batch-size 10 --lr 0.05 --epochs-prune 1 "
         "--epochs-finetune 1 --interval 3 --regen 0.5 --run-dir r").split()
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "TORCHELASTIC_RUN_ID")


pytestmark = pytest.mark.usefixtures("usual_signals")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (rng.integers(0, 100, (60, 8, 8)) + 70 * y[:, None, None]).astype(np.uint8)
    np.savez("tiny.npz", x_train=x, y_train=y, x_test=x[:30], y_test=y[:30])
    monkeypatch.setattr(sys, "argv", ["prune.py"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # what a run replaces is put back
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def run(*given, main=prune_unstructured.main):
    return main([*SHORT, *map(str, given)])


def refused(capsys, main, *given, code=2):
    """Return the line of a command that ends with this code and changes nothing on the disk."""
    before = helpers.everything_in(Path("."))
    with pytest.raises(SystemExit) as stop:
        main([*map(str, given)])
    assert stop.value.code == code, capsys.readouterr()
    assert helpers.everything_in(Path(".")) == before
    return helpers.one_line(capsys)


def is_whole(folder="r"):
    """Whether a run is finished, with a network that can be read."""
    models.load(Path(folder, "model.pt"))
    return json.loads(Path(folder, "summary.json").read_text())["epochs"] == 2


# ---- signals -------------------------------------------------------------------------------------


def at_step_3(act, monkeypatch):
    add = meters.Meter.add

    def watched(self, loss, logits, labels, at=0):
        add(self, loss, logits, labels, at)
        if at == 3:
            act()

    monkeypatch.setattr(meters.Meter, "add", watched)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(number, monkeypatch):
    """As under nohup (SIGHUP), or in the background of a script's shell (SIGINT)."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        at_step_3(lambda: os.kill(os.getpid(), number), monkeypatch)
        run()
        assert is_whole() and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_terminal_that_closes_saves_the_run(monkeypatch, capsys):
    at_step_3(lambda: os.kill(os.getpid(), signal.SIGHUP), monkeypatch)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 129 and "stopped after iteration 3, saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_handler_that_is_not_python_s_is_left_alone(monkeypatch):
    own = runfolder.own_signals()
    assert own == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    assert runfolder.own_signals() == []


def test_a_run_in_a_thread_of_a_program(capsys):
    found, codes = [], []

    def work():
        found.append(run())
        try:
            run("--sparsity", 90)
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert is_whole() and found[0]["sparsity"] > 0.8 and codes == [2]
    assert "--sparsity is 90" in helpers.one_line(capsys)


# ---- outputs -------------------------------------------------------------------------------------


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1)


def closed():
    stream = open("closed.txt", "w")
    stream.close()
    return stream


def full_disk():
    return open("/dev/full", "w", buffering=1)


class Gone(io.StringIO):
    """A terminal that was closed, as SSH leaves it behind."""

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(5, "Input/output error")

    def flush(self):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("make", [broken_pipe, closed, full_disk, Gone, lambda: None],
                         ids=["pipe", "closed", "full", "terminal", "none"])
def test_an_output_that_ends_does_not_end_the_run(make, monkeypatch):
    monkeypatch.setattr(sys, "stdout", make())
    monkeypatch.setattr(sys, "stderr", make())
    run()
    assert is_whole()
    with pytest.raises(SystemExit) as stop:  # and an error keeps its code
        run()
    assert stop.value.code == 2
    assert run("--resume")["epochs"] == 2  # "is finished" is printed


def test_no_descriptor_of_an_output_becomes_one_of_a_file():
    """Started with stdin, stdout and stderr closed, a file would be number 1 or 2."""
    Path("torch.py").write_text("")  # harness imports it
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c",
         f"import sys; sys.path.append({str(ROOT)!r})\n"
         "import harness\nopen('number.txt', 'w').write(str(open('x', 'w').fileno()))"])
    assert done.returncode == 0 and int(Path("number.txt").read_text()) > 2


@pytest.mark.parametrize("encoding, shown", [
    ("cp1252", r"\u6570\u636e caf\udce9 é"), ("ascii", r"\u6570\u636e caf\udce9 \xe9"),
    ("utf-8", r"数据 caf\udce9 é")])
def test_letters_that_an_encoding_lacks(encoding, shown):
    buffer = io.BytesIO()
    out = output.Output(io.TextIOWrapper(buffer, encoding=encoding, errors="strict"))
    print("数据 caf\udce9 é", file=out, flush=True)
    assert buffer.getvalue().decode(encoding) == f"{shown}\n"


@pytest.mark.parametrize("name", ["数据.npz", "caf\udce9.npz", "two words $x$_$.npz", "'\"#.npz"])
def test_data_of_any_name(name, monkeypatch):
    """On an output of Windows, and in a figure and a table."""
    os.rename("tiny.npz", name)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    prune_unstructured.main([name if word == "tiny.npz" else word for word in SHORT])
    assert is_whole() and run("--resume", "--dataset", name)["dataset"] == name
    compare.main(["--runs", "r", "--out", "out"])
    for kind in ("md", "csv", "png", "pdf"):
        assert Path(f"out/compare.{kind}").stat().st_size > 100
    assert Path("out/compare.md").read_text(encoding="utf-8")


# ---- pictures ------------------------------------------------------------------------------------


def test_pictures_are_drawn_whatever_the_backend_which_stays():
    """Each backend in a process that has not imported matplotlib."""
    backends = ["module://matplotlib_inline.backend_inline", "TkAgg"]
    done = subprocess.run(
        [sys.executable, "-c", """if 1:
         import os, sys
         from pathlib import Path
         from harness import files
         assert 'matplotlib' not in sys.modules
         assert 'torch._dynamo' not in sys.modules  # nor torch's compiler, 2 s of a start
         for number, backend in enumerate(sys.argv[2:]):
             process = os.fork()
             if process:
                 assert os.waitpid(process, 0)[1] == 0
                 continue
             os.environ['MPLBACKEND'] = backend
             from harness import plots
             plots.save(Path(sys.argv[1], str(number)), plots.canvas(1)[0], [dict(x=1)], 'numbers')
             assert os.environ['MPLBACKEND'] == backend
             assert 'matplotlib.pyplot' not in sys.modules
             assert sys.excepthook is sys.__excepthook__
             break
         """, os.getcwd(), *backends],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number in range(len(backends)):
        assert Path(f"{number}.png").stat().st_size > 1000
        assert Path(f"{number}.pdf").stat().st_size > 500


@pytest.mark.parametrize("error", [
    RuntimeError("Can not load face (unknown file format; error code 0x2)"), MemoryError(),
    OSError(28, "No space left on device"), ValueError("bad\nsetting"), IndexError("of a font")])
def test_a_picture_that_cannot_be_drawn_is_a_note(error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(plots, "draw_curves", fail)
    run()
    assert is_whole() and not Path("r/curves.png").exists()
    said = capsys.readouterr()
    assert said.out.count("note: curves.png could not be drawn (") == 1 and not said.err
    assert (str(error).split() or ["MemoryError"])[0] in said.out and "done in" in said.out


def test_without_matplotlib_a_run_leaves_its_summary(monkeypatch, capsys):
    import harness

    monkeypatch.delattr(harness, "plots")
    for name in ("matplotlib", "harness.plots"):
        monkeypatch.setitem(sys.modules, name, None)
    run()
    assert is_whole() and "note: curves.png could not be drawn" in capsys.readouterr().out


def test_a_figure_that_cannot_be_drawn_keeps_its_numbers(monkeypatch, capsys):
    figure, ((axis,),) = plots.canvas(1)
    axis.set_title("$_$")  # no formula of matplotlib's
    Path("one.png").write_bytes(b"of an earlier run")
    plots.save(Path("one"), figure, [dict(x=1, y=2)], "numbers")
    assert Path("one.csv").read_text() == "# numbers\nx,y\n1,2\n"
    assert capsys.readouterr().out.count("note: one.p") == 2
    assert not Path("one.png").exists()
    report.page(Path("page.html"), "All", [], None, [report.Section(
        Path("one.png"), "One", ["says"], None, "python x.py")])
    assert "<img" not in Path("page.html").read_text() and "says" in Path("page.html").read_text()


def test_a_comparison_whose_plot_fails_keeps_its_table(monkeypatch):
    run()
    monkeypatch.setattr(compare, "plot_tables", no_memory)
    with pytest.raises(SystemExit):
        compare.main(["--runs", "r", "--out", "out"])
    assert "criticality" in Path("out/compare.md").read_text()


# ---- variables of a cluster ----------------------------------------------------------------------

WHOLE = dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@pytest.mark.parametrize("given, words", [
    (dict(WORLD_SIZE="two"), "WORLD_SIZE is two, expected a whole number"),
    (dict(WORLD_SIZE="2.0"), "WORLD_SIZE is 2.0"), (dict(WORLD_SIZE="-1"), "WORLD_SIZE is -1"),
    (dict(WORLD_SIZE="9" * 5000), "expected a whole number"),
    (dict(WORLD_SIZE="0"), "WORLD_SIZE is 0, expected at least 1"),
    (dict(WORLD_SIZE="1", RANK="3"), "RANK is 3, expected less than WORLD_SIZE, which is 1"),
    (WHOLE | dict(RANK="2"), "RANK is 2, expected less than WORLD_SIZE, which is 2"),
    (WHOLE | dict(RANK="x"), "RANK is x"), (WHOLE | dict(RANK="-1"), "RANK is -1"),
    (WHOLE | dict(RANK=""), "these are not set: RANK;"),
    (dict(WORLD_SIZE="2"), "is 2, but these are not set: RANK, MASTER_ADDR, MASTER_PORT;"),
    (WHOLE | dict(MASTER_ADDR=" "), "these are not set: MASTER_ADDR;"),
    (WHOLE | dict(MASTER_PORT="http"), "MASTER_PORT is http, expected a whole number"),
    (WHOLE | dict(LOCAL_RANK="?"), "LOCAL_RANK is ?"),
    (WHOLE | dict(LOCAL_RANK="2", LOCAL_WORLD_SIZE="2"), "LOCAL_RANK is 2, expected less than"),
])
def test_variables_that_do_not_fit(given, words, monkeypatch, capsys):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    error = refused(capsys, prune_unstructured.main, *SHORT)
    assert words in error and "Start it by torchrun, or" in error


@pytest.mark.parametrize("given", [
    dict(WORLD_SIZE=""), dict(WORLD_SIZE="", RANK=""), dict(WORLD_SIZE=" 1 ", RANK="0"),
    dict(RANK="3"), dict(RANK="node7", LOCAL_RANK="3", MASTER_PORT="x"), dict(LOCAL_WORLD_SIZE="8"),
    dict(WORLD_SIZE="1", RANK="0", MASTER_ADDR="nowhere", MASTER_PORT="1")])
def test_variables_that_make_one_process(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert (processes.size(), processes.rank(), processes.local()) == (1, 0, (0, 1))
    processes.check()
    if given == dict(RANK="3"):  # it divided by 0, or wrote nothing
        run()
        assert is_whole()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(processes, "JOINING", processes.timedelta(seconds=1))


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_others_that_do_not_come(rank, impatient, monkeypatch, capfd):
    for name, value in (WHOLE | dict(RANK=str(rank), MASTER_PORT=str(free_port()))).items():
        monkeypatch.setenv(name, value)
    error = refused(capfd, prune_unstructured.main, *SHORT)
    assert "the other processes did not come within 1 s to 127.0.0.1 port" in error
    assert not torch.distributed.is_initialized()


def test_a_port_of_another_program(impatient, monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for rank in "01":
            port = str(other.getsockname()[1])
            for name, value in (WHOLE | dict(RANK=rank, MASTER_PORT=port)).items():
                monkeypatch.setenv(name, value)
            assert "did not come within 1 s" in refused(capsys, prune_unstructured.main, *SHORT)


@pytest.mark.parametrize("main, given", [
    (analyze.main, []), (compare.main, ["--runs", "r"]), (benchmark.main, ["--quick"]),
    (compact.main, ["model.pt"]), (prune_lottery.main, ["--smoke"])])
def test_scripts_of_one_process_under_torchrun(main, given, monkeypatch, capsys):
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    error = refused(capsys, main, *given)
    assert "WORLD_SIZE is 2, as torchrun sets it, expected one process: this script" in error


# ---- devices -------------------------------------------------------------------------------------


def gpus(monkeypatch, count):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_devices_that_are_there(monkeypatch):
    chosen = gpus(monkeypatch, 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name, wanted in ((None, "cuda"), ("cuda", "cuda"), ("cuda:0", "cuda:0"),
                         ("cuda:1", "cuda:1"), ("mps", "mps"), ("cpu", "cpu")):
        assert str(setup.choose_device(name)) == wanted
    assert chosen == [torch.device("cuda", 0), torch.device("cuda", 1)]  # the current one
    gpus(monkeypatch, 0)
    assert str(setup.choose_device(None)) == "cpu"


@pytest.mark.parametrize("count, name, words", [
    (2, "cuda:7", "--device is cuda:7, but torch sees 2 GPUs, expected cuda:0 to cuda:1"),
    (1, "cuda:1", "torch sees 1 GPUs, expected cuda:0 to cuda:0"),
    (0, "cuda:0", "--device is cuda:0, but torch sees no GPU"), (0, "cuda", "torch sees no GPU"),
    (2, "mps", "--device is mps, but torch sees no such device"),
    (2, "cuda:", "--device is cuda:, expected cpu, cuda, cuda:0"), (2, "gpu", "--device is gpu"),
    (2, "cuda:-1", "is cuda:-1"), (2, "cuda:01", "is cuda:01"), (2, "CUDA", "is CUDA"),
    (2, "mps:1", "is mps:1"), (2, "meta", "is meta")])
def test_devices_that_are_not_there(count, name, words, monkeypatch, capsys):
    gpus(monkeypatch, count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert words in refused(capsys, prune_unstructured.main, *SHORT, "--device", name)
    assert words in refused(capsys, benchmark.main, "--quick", "--device", name)


def test_a_rank_without_a_gpu(monkeypatch, capsys):
    chosen = gpus(monkeypatch, 2)
    for name, value in (WHOLE | dict(LOCAL_RANK="5")).items():
        monkeypatch.setenv(name, value)
    error = refused(capsys, prune_unstructured.main, *SHORT)
    assert "torchrun started 6 processes here, but torch sees 2 GPUs" in error and not chosen
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    error = refused(capsys, prune_unstructured.main, *SHORT, "--device", "mps")
    assert "--device is mps, but torchrun started 2 processes, expected one" in error


def test_one_gpu_under_torchrun(monkeypatch, capsys):
    gpus(monkeypatch, 2)
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    error = refused(capsys, prune_unstructured.main, *SHORT, "--device", "cuda:1")
    assert "--device is cuda:1, but torchrun started 2 processes" in error
    assert "LOCAL_RANK is not set" in refused(capsys, prune_unstructured.main, *SHORT)


def test_mixed_precision_takes_the_kind_of_the_device(monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "autocast", lambda kind, *_, **__: taken.append(kind))
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        training.autocast(SimpleNamespace(device=name, precision="bf16"))
    assert taken == ["cpu", "cuda", "cuda", "mps"]


def test_name_and_memory_are_of_the_own_gpu(monkeypatch):
    asked = []
    for name in ("get_device_name", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: asked.append(device) or 2**20)
    machine.device_name(torch.device("cuda:1"))
    assert machine.peak_memory_mib(torch.device("cuda:1")) == 1
    assert asked == [torch.device("cuda:1")] * 2


@pytest.mark.parametrize("error", [
    NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device.\n"
                        "If you want this op"),
    TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
              "float64. Please use float32 instead.")])
def test_what_mps_lacks_is_one_line(error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(training, "loss_over_time", fail)
    with pytest.raises(SystemExit) as stop:
        run()
    said = helpers.one_line(capsys)
    assert stop.value.code == 1 and "--device is mps, which lacks something" in said
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1, or write --device cpu" in said


@pytest.mark.parametrize("main, given", [
    (prune_unstructured.main, []), (prune_structured.main, ["--metric", "gradient"])])
def test_a_run_needs_no_float64_where_there_is_none(main, given, monkeypatch):
    """As on mps: all tensors of the network's functions are float32."""
    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                codes = [frame.f_code for frame, _ in traceback.walk_stack(None)]
                files = [Path(code.co_filename) for code in codes]
                # these compute on the CPU
                if not {"agrees", "fan_out"} & {code.co_name for code in codes}:
                    found.add(next(path.name for path in files
                                   if path.parent in (ROOT, ROOT / "harness")))
            return result

    found = set()
    for module in (neurons, metrics, training, meters):
        monkeypatch.setattr(module, "widest", lambda device: torch.float32)
    with NoFloat64():
        main(["--smoke", "--run-dir", "r", *given])
    # scores, keys, mean and std, which stay on the CPU
    assert found <= {"channels.py", "prune_structured.py", "models.py"}, found


def test_other_type_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(training, "loss_over_time", lambda *_: len(3))
    with pytest.raises(TypeError, match="has no len"):
        run()


def test_no_compiler_is_said_before_anything_is_written(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler\n\nSet TORCHDYNAMO_VERBOSE")

    monkeypatch.setattr(torch, "compile", lambda *_: fail)
    error = refused(capsys, prune_unstructured.main, *SHORT, "--compile")
    assert "torch.compile does not work here (InvalidCxxCompiler: No working C++ comp" in error


# ---- paths and words -----------------------------------------------------------------------------


def test_a_tilde_is_the_home_in_each_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for path in ROOT.glob("prune_*.py"):
        args = importlib.import_module(path.stem).parse_args(
            "--dataset ~/x.npz --data-dir=~/d --run-dir ~ --init ~/m.pt".split())
        assert (args.dataset, args.data_dir, args.run_dir, args.init) == (
            "/home/me/x.npz", "/home/me/d", "/home/me", "/home/me/m.pt")
    args = compare.parse_args("--dataset ~/x.npz --data-dir ~/d".split())
    assert (args.dataset, args.data_dir) == ("/home/me/x.npz", "/home/me/d")
    args = compare.parse_args("--out ~/o --runs ~/a b".split())
    assert (args.out, args.runs) == (Path("/home/me/o"), [Path("/home/me/a"), Path("b")])
    args = analyze.parse_args("--out ~/o --runs ~/a ./~/b".split())
    assert (args.out, args.runs) == (Path("/home/me/o"), ["/home/me/a", "./~/b"])
    args = benchmark.parse_args("--json ~/j --figures ~/f".split())
    assert (args.json, args.figures) == ("/home/me/j", "/home/me/f")


def test_compact_in_the_home(monkeypatch, capsys):
    monkeypatch.setenv("HOME", os.getcwd())
    run()
    compact.main(["~/r/model.pt", "--out", "~/small.pt"])
    assert "~" not in capsys.readouterr().out.splitlines()[-1]


def test_an_archive_in_capitals():
    os.rename("tiny.npz", "TINY.NPZ")
    assert len(data.load("TINY.NPZ").x_train) == 60


@pytest.mark.parametrize("main, given, near", [
    (prune_unstructured.main, "--sparcity 0.9", "--sparsity"),
    (prune_unstructured.main, "--sparsty=0.9", "--sparsity"),
    (prune_unstructured.main, "--batch_size 4", "--batch-size"),
    (prune_unstructured.main, "-seed 4", "--seed"),
    (prune_unstructured.main, "--resum", "--resume"),
    (prune_structured.main, "--prune-rate 0.5", "--prune-ratio"),
    (compare.main, "--seed 4", "--seeds"), (analyze.main, "--run a", "--runs"),
    (benchmark.main, "--quik", "--quick")])
def test_a_mistyped_flag(main, given, near, capsys):
    error = refused(capsys, main, *given.split())
    flag = given.split()[0].split("=")[0]
    assert f"unrecognized arguments: {flag}, expected" in error and f"Did you mean {near}?" in error


def test_a_flag_that_takes_no_value(capsys):
    error = refused(capsys, prune_unstructured.main, "--compile=1")
    assert "--compile: expected no value, leave out '1'" in error
    assert "Did you mean" not in refused(capsys, prune_unstructured.main, "--")


def test_a_path_that_can_be_none(capsys):
    assert "--dataset is empty" in refused(capsys, prune_unstructured.main, "--dataset", "")
    for main in (analyze.main, compare.main):
        error = refused(capsys, main, "--out", "tiny.npz")
        assert "--out is tiny.npz, a file, expected a folder" in error


def test_a_flag_like_none(capsys):
    assert "--help lists all flags" in refused(capsys, prune_unstructured.main, "--xyzzy")
    assert "--help lists all flags" in refused(capsys, prune_unstructured.main, "word")


def test_foreign_keys_of_a_config_are_named(monkeypatch, capsys):
    Path("r").mkdir()
    for config, named in ((dict(arch="vgg", lr=0.1, workers=4), "arch, workers"),
                          (dict(sparsty=0.5, sparsity=0.9), "sparsty"),
                          (dict(model="resnet50", arch="x", lr="high"), "arch")):
        Path("r/config.json").write_text(json.dumps(config))
        error = refused(capsys, prune_unstructured.main, "--run-dir", "r", "--resume")
        assert f"r/config.json holds {named}, which prune.py does not know" in error
        assert "--overwrite" not in error  # it is somebody else's file
    summary = run("--overwrite")
    config = json.loads(Path("r/config.json").read_text())
    Path("r/config.json").write_text(json.dumps(config | dict(script="prune_unstructured")))
    error = refused(capsys, prune_structured.main, "--run-dir", "r", "--resume")
    assert "interval" in error and "which prune.py does not know" in error
    # a flag of an earlier version of the same script
    Path("r/config.json").write_text(json.dumps(config | dict(script="prune", warmup=3)))
    assert run("--resume") == summary
    note = "r/config.json holds warmup, which prune.py no longer has"
    assert note in capsys.readouterr().out
    monkeypatch.setattr(processes, "rank", lambda: 1)  # one process says it for all
    run("--resume")
    assert note not in capsys.readouterr().out


@pytest.mark.parametrize("config, words", [
    (dict(model="resnet50"), "model is resnet50, expected one of vgg16, "),
    (dict(lr="high"), "lr is high, expected a finite number above 0"),
    (dict(as_published="bn"), "as_published is bn, expected a list"),
    (dict(flip=3), "flip is 3, expected true or false")])
def test_a_wrong_value_in_a_config_names_its_flag(config, words, capsys):
    Path("r").mkdir()
    Path("r/config.json").write_text(json.dumps(config))
    error = refused(capsys, prune_unstructured.main, "--run-dir", "r", "--resume")
    assert f"r/config.json: {words}" in error and "--overwrite" not in error


def test_no_home_of_that_name(monkeypatch, capsys):
    error = refused(capsys, prune_unstructured.main, "--dataset", "~nosuchuser/x.npz")
    assert "~nosuchuser/x.npz cannot be read" in error
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, no user
    assert sources.cache_places("d", "c.npz") == [Path("d/c.npz")]


# ---- nothing is left behind ----------------------------------------------------------------------


def test_an_error_at_the_start_leaves_nothing(monkeypatch, capsys):
    place = ["--run-dir", "new/folder/of/mine"]
    Path("bad.npz").write_bytes(b"PK")
    Path("bad.pt").write_bytes(b"PK")
    for given in ("--dataset bad.npz", "--dataset absent", "--init bad.pt", "--init absent.pt",
                  "--interval 999", "--sparsity 0.99999", "--batch-size 999", "--crop 8"):
        refused(capsys, prune_unstructured.main, *SHORT, *given.split(), *place)
    refused(capsys, prune_structured.main, "--dataset", "tiny.npz", "--batch-size", 10,
            "--prune-ratio", 0.999, *place)
    monkeypatch.setenv("WORLD_SIZE", "x")
    refused(capsys, prune_unstructured.main, *SHORT, *place)


def no_memory(*_, **__):
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("owner, name, act, code", [
    (data, "load", no_memory, 2), (models, "build", no_memory, 2), (setup, "start", full, 2),
    (runfolder.Run, "_config", no_memory, 2), (runfolder, "write_json", full, 2),
    (runfolder, "Watch", no_memory, 2),
    (runfolder.Run, "_say_header", no_memory, 1), (setup, "forward_of", no_memory, 1)])
def test_no_memory_and_no_disk_at_the_start_leave_nothing(
        owner, name, act, code, monkeypatch, capsys):
    monkeypatch.setattr(owner, name, act)
    refused(capsys, prune_unstructured.main, *SHORT, "--run-dir", "new/folder", code=code)
    Path("mine").mkdir()  # a folder that was there stays
    with pytest.raises(SystemExit):
        run("--run-dir", "mine")
    assert Path("mine").is_dir() and not list(Path("mine").iterdir())


def test_a_mistake_before_the_first_step_leaves_nothing(monkeypatch):
    monkeypatch.setattr(runfolder.Run, "_say_header", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--run-dir", "new/folder")
    assert not Path("new").exists()


def test_the_advice_for_too_little_memory_is_one_that_the_script_knows(monkeypatch, capsys):
    monkeypatch.setattr(records, "read_runs", no_memory)
    error = refused(capsys, analyze.main, "--runs", "r", code=2)
    assert "Free some memory, or hide the GPU: CUDA_VISIBLE_DEVICES=" in error
    monkeypatch.setattr(setup, "choose_device", no_memory)
    error = refused(capsys, benchmark.main, code=2)
    assert "Free some memory, or use another machine" in error and "--width" not in error


def test_an_error_of_a_run_that_resumes_or_replaces_another_keeps_its_folder(monkeypatch, capsys):
    run()
    Path("r/summary.json").unlink()
    for flag in ("--resume", "--overwrite"):
        for owner, name in ((runfolder, "Watch"), (setup, "forward_of")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, no_memory)
                with pytest.raises(SystemExit):
                    run(flag)
            assert Path("r/config.json").exists() and not Path("r/.lock").exists()
            assert Path("r/checkpoint.pt").exists() == (flag == "--resume")


# ---- other processes -----------------------------------------------------------------------------


def test_processes_side_by_side_share_what_this_one_may_use(monkeypatch):
    """Two processors of 64 are an allocation of two; what the user has set stays."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = [machine.environment_for(n)["OMP_NUM_THREADS"] for n in (1, 2, 4)]
    assert threads == ["2", "1", "1"]
    monkeypatch.delattr(os, "sched_getaffinity")  # as on a Mac
    assert machine.environment_for(4)["OMP_NUM_THREADS"] == "16"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine.environment_for(1) == dict(os.environ)


def test_the_command_that_goes_on_keeps_the_device_and_the_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune.py"])

    def command(device):
        run = SimpleNamespace(args=SimpleNamespace(run_dir="my r", device=device))
        return runfolder.Run._resume_command(run)

    monkeypatch.setattr(setup, "choose_device", lambda name: torch.device("cpu"))
    assert command("cpu") == "python prune.py --resume --run-dir 'my r'"
    monkeypatch.setattr(setup, "choose_device", lambda name: torch.device("cuda"))
    assert command("cuda") == "python prune.py --resume --run-dir 'my r'"
    assert command("cpu") == "python prune.py --resume --run-dir 'my r' --device cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command("cuda") == "torchrun --nproc-per-node=2 prune.py --resume --run-dir 'my r'"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command("cuda") == ("the same launcher on each node, with prune.py --resume --run-dir "
                               "'my r'")


# ---- before torch is there -----------------------------------------------------------------------


def start_with(script, code, package="torch", **environment):
    """Start a script with a package that runs this code when it is imported."""
    Path("stubs").mkdir(exist_ok=True)
    for path in Path("stubs").iterdir():
        path.unlink()
    Path("stubs/torch.py").write_text("")
    Path(f"stubs/{package}.py").write_text(code)
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120,
        env=os.environ | environment | {"PYTHONPATH": str(Path("stubs").resolve())})


def raising(name, package=None):
    named = f"error.name = {package!r}\n" if package else ""
    return f"error = {name}('libx.so: cannot\\nopen')\n{named}raise error"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_without_torch_each_script_says_what_to_do(script):
    done = start_with(script, raising("ModuleNotFoundError", "torch"))
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{script.name}: error: torch is not installed for ")
    assert "Activate the environment: . .venv/bin/activate" in done.stderr


@pytest.mark.parametrize("code, package, status, words", [
    (raising("OSError"), "torch", 2, "error: torch cannot be loaded (libx.so: cannot open)"),
    (raising("ImportError", "torch._C"), "torch", 2, "error: torch cannot be loaded"),
    (raising("ModuleNotFoundError", "numpy"), "torch", 2, "error: numpy is not installed"),
    (raising("ModuleNotFoundError", "numpy"), "numpy", 2, "error: numpy is not installed"),
    (raising("KeyboardInterrupt"), "torch", 130, "interrupted"),
    (raising("KeyboardInterrupt"), "numpy", 130, "interrupted")])
def test_other_ends_while_packages_are_imported(code, package, status, words):
    done = start_with(ROOT / "analyze.py", code, package)
    assert done.returncode == status and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"analyze.py: {words}")


def test_a_mistake_in_the_code_is_no_missing_package():
    done = start_with(ROOT / "analyze.py", raising("ModuleNotFoundError", "mine"), "numpy")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    code = "import os; print(os.environ['OMP_WAIT_POLICY']); raise KeyboardInterrupt"
    for given, wanted in (({}, "passive"), (dict(OMP_WAIT_POLICY="active"), "active")):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "environ", environment)
            assert start_with(ROOT / "analyze.py", code, **given).stdout == f"{wanted}\n"


def test_each_script_imports_the_guard_before_torch():
    for path in SCRIPTS:
        first = re.search(r"^ *(?:import|from) (?:harness|torch|numpy|tqdm|training|data|models)\b.*",
                          path.read_text(), re.M)[0]
        assert first.strip().startswith("import harness "), path.name
