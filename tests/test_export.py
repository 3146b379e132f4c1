"""What leaves this project: export.py's formats, each against the network, what it refuses, the
sparse file, and the networks of assets/."""
import gzip
import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import export
import inputs
import modelfile
import models
import sparsefile
from harness import files
from helpers import everything_in, one_line, random_net, rng

ROOT = Path(__file__).parent.parent
SIDE, STEPS = 8, 2


def network(name="small", encoding="direct", widths=(4, 4, 4, 4), channels=1, classes=3, scale=4,
            **more):
    """A tiny network whose neurons fire, but not always; a fifth of its weights are dead."""
    torch.manual_seed(0)
    net = models.build(name, classes, channels, SIDE, STEPS, list(widths), encoding, **more)
    net.masks = {weight: torch.rand(net.get_parameter(weight).shape, generator=rng()) < 0.8
                 for weight in models.scored_by(net)}
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-0.5, 2)
                module.running_mean.uniform_(-1, 1)
        for weight, mask in net.masks.items():
            net.get_parameter(weight).mul_(scale * mask)
    if encoding != "events":
        net.set_normalisation([0.3] * channels, [0.4] * channels)
    net.class_names = [f"class {k}" for k in range(classes)]
    return net.eval()


def images_of(net, n=7):
    shape = (n, *inputs.shape_of(net))
    brightness = torch.linspace(0.1, 1, n).view(-1, *[1] * (len(shape) - 1))
    most = 4 if net.encoding == "events" else 256
    return (most * brightness * torch.rand(shape, generator=rng(1))).to(torch.uint8)


def logits(net, images):
    """The logits, in the plainest way: an image at a time."""
    with torch.no_grad():
        return torch.cat([net(x.unsqueeze(1) if net.encoding == "events" else x[None]).sum(0)
                          for x in images])


@pytest.fixture
def run():
    """The folder of a run on images that are there: a network and its config.json."""
    y = np.arange(60) % 3
    x = (np.random.default_rng(0).integers(0, 100, (60, SIDE, SIDE))
         + 70 * y[:, None, None]).astype(np.uint8)
    np.savez("tiny.npz", x_train=x, y_train=y, x_test=x[:30], y_test=y[:30])
    Path("r").mkdir()
    torch.save(modelfile.pack(network()), "r/model.pt")
    config = dict(dataset="tiny.npz", data_dir="data", train_limit=None, time_steps=STEPS)
    Path("r/config.json").write_text(json.dumps(config))
    return Path("r")


@pytest.fixture
def torch_written(monkeypatch):
    """Let `torch` write a file at once: tracing takes seconds."""
    def write(job):
        (job.folder / "model.pt2").write_text("x")
        jobs.append(job)
        return ["written", *export.agreement(lambda x: export.logits_of(job.net, x), job.net,
                                             job.images)]

    jobs = []
    monkeypatch.setitem(export.FORMATS, "torch", write)
    return jobs


# ---- the network as others see it ----------------------------------------------------------------


NETWORKS = [
    network(), network("small-avg"), network("small", "rate"),
    network("small", "events", channels=2),
    network("sdsnn-small", widths=(3, 4, 5)), network("gradr-linear", widths=[6], scale=8),
    network("gradr-linear", "rate", [30], scale=40), network("vgg16", "rate", [4] * 13),
    network("resnet19", "rate", [4] * 18, scale=8), network("resnet19", widths=[4] * 18, scale=8),
    network("resnet19-pre", widths=[4] * 26),
    network(neuron=dict(reset="soft", learn_tau=True, tau=2.0))]


@pytest.mark.parametrize("net", NETWORKS, ids=lambda net: f"{net.config['name']}-{net.encoding}")
def test_what_is_exported_gives_the_logits_of_the_network(net):
    images = images_of(net)
    expected = logits(net, images)
    assert len({tuple(row) for row in expected.tolist()}) > 1  # the images matter
    assert torch.allclose(export.logits_of(net, images), expected, atol=1e-4)
    with torch.no_grad():
        found = export.Exported(net)(images)
    assert torch.allclose(found, expected, atol=1e-4)
    exported = export.Exported(net.train())
    assert not any(module.training for module in exported.modules()) and net.training
    net.eval()


@pytest.mark.parametrize("encoding", ["direct", "rate", "events"])
def test_a_traced_network_takes_any_batch(encoding):
    net = network(encoding=encoding, channels=2 if encoding == "events" else 1)
    images = images_of(net, 64)
    program = export.traced(net, images)
    assert {node.target.namespace for node in program.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)} == {"aten"}  # torch's own alone
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)
    for n in export.BATCHES:
        assert torch.allclose(program.module()(images[:n]), logits(net, images[:n]), atol=1e-4)


def test_a_network_itself_can_be_exported_and_stays_fast():
    """A user's own call of torch.export, and of what stands on it."""
    net = network().requires_grad_(False)
    assert all(lif.is_fast for lif in models.lifs(net).values())
    images = images_of(net)
    shapes = ({0: torch.export.Dim("n", min=1)},)
    program = torch.export.export(net, (images[:2],), dynamic_shapes=shapes)
    for n in (1, 5):
        assert torch.allclose(program.module()(images[:n]), net(images[:n]), atol=1e-5)
    assert all(lif.is_fast for lif in models.lifs(net).values())


@pytest.mark.parametrize("net", NETWORKS[:4], ids=lambda net: net.encoding)
def test_random_images_are_such_as_a_network_takes(net):
    images = inputs.random_images(net, 5)
    assert images.shape[1:] == inputs.shape_of(net) and images.dtype == torch.uint8
    assert torch.equal(images, inputs.random_images(net, 5)) and len(images.unique()) > 3
    assert len(models.predict(net, images).classes) == 5


# ---- the formats ---------------------------------------------------------------------------------


def test_torch(run, capsys):
    export.main(["r", "--to", "torch", "--sparse"])
    out = capsys.readouterr().out
    assert "r/model.pt: small, T = 2, compared on 30 test images of tiny.npz" in out
    for n in export.BATCHES:
        assert f"batch {n:>2}: largest difference of a logit " in out
    assert out.count("100 % equal predictions") == 3 and not capsys.readouterr().err
    net, images = models.load("r/model.pt"), data.load("tiny.npz").x_test
    program = torch.export.load("r/export/model.pt2").module()
    assert torch.allclose(program(images), logits(net, images), atol=1e-4)
    assert {path.name for path in Path("r/export").iterdir()} == {"model.pt2", "model.sparse.gz"}
    assert str(ROOT).encode() not in Path("r/export/model.pt2").read_bytes()


def test_onnx_and_int8(run, capsys):
    onnx = pytest.importorskip("onnx", reason="of requirements-export.txt")
    runtime = pytest.importorskip("onnxruntime", reason="of requirements-export.txt")
    pytest.importorskip("onnxscript", reason="of requirements-export.txt")
    export.main(["r", "--to", "onnx", "--int8", "--out", "out"])
    out = capsys.readouterr().out
    net, dataset = models.load("r/model.pt"), data.load("tiny.npz")
    expected = logits(net, dataset.x_test)
    right = 100 * (expected.argmax(1) == dataset.y_test).float().mean()
    assert f"{right:.2f} % in fp32" in out and "ms in ONNX Runtime" in out
    assert "30 test images: " in out and "ranges from 60 training images" in out

    model = onnx.load("out/model.onnx")
    onnx.checker.check_model(model, full_check=True)
    (taken,), (given,) = model.graph.input, model.graph.output
    assert taken.name == "images" and taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    batch, *shape = taken.type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [size.dim_value for size in shape] == [1, SIDE, SIDE]
    assert given.name == "logits" and given.type.tensor_type.shape.dim[1].dim_value == 3
    notes = {item.key: item.value for item in model.metadata_props}
    assert notes == {"time_steps": "2", "class_names": json.dumps(net.class_names)}
    for name in ("model.onnx", "model.int8.onnx"):
        assert str(ROOT).encode() not in Path("out", name).read_bytes()
        session = runtime.InferenceSession(f"out/{name}", providers=["CPUExecutionProvider"])
        for n in (1, 30):
            (found,) = session.run(None, {"images": dataset.x_test[:n].contiguous().numpy()})
            if name == "model.onnx":
                assert torch.allclose(torch.from_numpy(found), expected[:n], atol=1e-4)
            assert found.shape == (n, 3)
    kinds = {node.op_type for node in onnx.load("out/model.int8.onnx").graph.node}
    assert "DequantizeLinear" in kinds
    assert {path.name for path in Path("out").iterdir()} == {"model.onnx", "model.int8.onnx"}


def test_an_export_that_disagrees_ends_with_1(run, monkeypatch, capsys):
    def wrong(job):
        return export.agreement(lambda x: -export.logits_of(job.net, x), job.net, job.images)

    monkeypatch.setattr(export, "FORMATS", {"wrong": wrong, "report": export.FORMATS["report"]})
    with pytest.raises(SystemExit) as stopped:
        export.main(["r"])
    assert stopped.value.code == 1
    assert "it does not do what the network does (batch 64: largest difference" in one_line(capsys)
    assert Path("r/export/report.md").exists()  # the other formats are made


@pytest.mark.parametrize("change, size", [
    (lambda found: found + 9, 64),  # the classes are the same
    (lambda found: -found if len(found) == 1 else found, 1),
    (lambda found: found[:1].expand(3, -1) if len(found) == 3 else found, 3)])
def test_each_batch_size_counts(change, size):
    net = network()
    images = images_of(net, 64)
    with pytest.raises(files.Disagrees, match=rf"\(batch +{size}: "):
        export.agreement(lambda x: change(export.logits_of(net, x)), net, images)


def test_a_spike_that_rounding_moves_is_no_disagreement():
    net = network()
    images = images_of(net, 64)

    def export_(x):
        found = export.logits_of(net, x).clone()
        found[2::3] += 0.3  # of every third image, its class stays
        return found
    assert len(export.agreement(export_, net, images)) == 3


def test_what_another_project_cannot_do_is_a_line(run, torch_written, monkeypatch, capsys):
    monkeypatch.setattr(torch.export, "save", lambda *_: {}["no\nsuch operator"])
    monkeypatch.setattr(export, "FORMATS", {"torch": export.to_torch})
    with pytest.raises(SystemExit) as stopped:
        export.main(["r"])
    assert stopped.value.code == 1 and not [*Path("r/export").iterdir()]
    assert "torch.export has failed (KeyError: 'no\\nsuch operator'), expected" in one_line(capsys)


def test_what_is_replaced_is_named(run, torch_written, capsys):
    export.main(["r", "--to", "torch", "--out", "out"])
    assert "replaced" not in capsys.readouterr().out
    Path("out/report.json").write_text("mine")
    export.main(["r", "--to", "torch", "--out", "out"])
    assert "out has model.pt2, report.json: files of the same name are replaced" in \
        capsys.readouterr().out


@pytest.mark.parametrize("config", ['{"dataset": 5}', '{"dataset": "tiny.npz", "train_limit": "x"}',
                                    '{"dataset": "tiny.npz", "data_dir": 3}', "[]", "{"])
def test_a_damaged_config(config, run, torch_written, capsys):
    Path("r/config.json").write_text(config)
    export.main(["r", "--to", "torch"])
    assert "compared on random images: " in capsys.readouterr().out


def test_no_data_are_fetched_unasked(run, torch_written, capsys, monkeypatch):
    import torchvision

    def fetch(*_, **more):
        raise AssertionError("a download")
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fetch)
    for name in ("mnist", "cifar10", "n-mnist"):
        Path("r/config.json").write_text(json.dumps(dict(dataset=name, data_dir="data")))
        export.main(["r", "--to", "torch"])
        assert "compared on random images: " in capsys.readouterr().out
    assert not Path("data").exists()


def test_a_sparse_file_is_read_back(run, torch_written, monkeypatch, capsys):
    other = network(scale=2)
    monkeypatch.setattr(sparsefile, "load", lambda path: other)
    with pytest.raises(SystemExit) as stopped:
        export.main(["r", "--to", "torch", "--sparse"])
    assert stopped.value.code == 1
    assert "convs.0.conv.weight has changed in model.sparse.gz" in one_line(capsys)
    assert not Path("r/export/model.sparse.gz").exists()


# ---- the sparse file -----------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETWORKS, ids=lambda net: f"{net.config['name']}-{net.encoding}")
def test_a_sparse_file_holds_the_network(net):
    weight = next(iter(net.masks))
    with torch.no_grad():  # alive and 0
        net.get_parameter(weight).view(-1)[net.masks[weight].flatten().nonzero()[0]] = 0
    sparsefile.save(net, "s.gz")
    again = sparsefile.load("s.gz")
    assert again.config == net.config and again.class_names == net.class_names
    assert not again.training
    assert again.state_dict().keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert again.state_dict()[name].dtype == tensor.dtype
    for name, mask in modelfile.pack(net)["masks"].items():
        assert torch.equal(again.masks[name], mask), name
    content = Path("s.gz").read_bytes()
    sparsefile.save(again, "s.gz")
    assert Path("s.gz").read_bytes() == content


def test_a_write_that_fails_keeps_the_sparse_file_that_was_there(monkeypatch):
    sparsefile.save(network(), "s.gz")
    before = everything_in(Path())
    monkeypatch.setattr(sparsefile, "content_of", lambda *_: "no bytes")
    with pytest.raises(TypeError):
        sparsefile.save(network(), "s.gz")
    assert everything_in(Path()) == before


@pytest.mark.parametrize("alive, gaps, kind", [
    ([], [], np.uint8), ([0], [1], np.uint8), ([3, 4, 9], [4, 1, 5], np.uint8),
    ([254, 510], [255, 256], np.uint16), ([70_000], [70_001], np.uint32)])
def test_gaps_by_hand(alive, gaps, kind):
    mask = torch.zeros(2, 40_000, dtype=torch.bool)
    mask.view(-1)[alive] = True
    found = sparsefile.gaps_of(mask)
    assert found.tolist() == gaps and found.dtype == kind


def test_a_sparse_file_is_small():
    net = random_net("small", 1, dtype=torch.float32)
    masks = {name: torch.rand(net.get_parameter(name).shape, generator=rng()) < 0.1
             for name in models.scored_by(net)}
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_parameter(name).mul_(mask)
    alive = sum(int(mask.count_nonzero()) for mask in masks.values())
    content = sparsefile.content_of(net, masks)
    # 4 bytes a value, under 1 for its place; the rest is BN, biases and names
    assert len(content) < 5 * alive + 4000
    with np.load(gzip.open(write("s.gz", content))) as archive:
        assert archive["fc.weight.values"].nbytes == 4 * int(masks["fc.weight"].count_nonzero())


def write(path, content):
    Path(path).write_bytes(content)
    return path


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b"no archive", mtime=0), None],
                         ids=["empty", "no gzip", "no archive", "cut"])
def test_a_damaged_sparse_file(content):
    if content is None:
        content = sparsefile.content_of(network())[:-40]
    with pytest.raises(ValueError, match="s.gz cannot be read .*export.py --sparse") as raised:
        sparsefile.load(write("s.gz", content))
    assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="there is no file none.gz, expected"):
        sparsefile.load("none.gz")


# ---- what is exported, and what is refused -------------------------------------------------------


def test_compact_is_preferred_where_it_is_the_same_function(run, torch_written, capsys):
    small = models.load("r/model.pt")
    small.class_names = ["a", "b", "c"]  # to recognise it
    torch.save(modelfile.pack(small), "r/compact.pt")
    export.main(["r", "--to", "torch"])
    assert torch_written[-1].net.class_names == small.class_names
    assert "r/compact.pt is exported in its place" in capsys.readouterr().out
    with torch.no_grad():
        small.fc.bias += 0.1
    torch.save(modelfile.pack(small), "r/compact.pt")
    export.main(["r", "--to", "torch"])
    assert torch_written[-1].net.class_names == network().class_names
    assert "note: r/compact.pt differs by 0.2, " in capsys.readouterr().out


@pytest.mark.parametrize("other", [network(channels=3), network(classes=4), None])
def test_a_compact_file_of_another_network_is_not_used(other, run, torch_written, capsys):
    Path("r/compact.pt").write_bytes(b"damaged")
    if other is not None:
        torch.save(modelfile.pack(other), "r/compact.pt")
    export.main(["r", "--to", "torch"])
    assert torch_written[-1].net.config == network().config
    assert "note: r/compact.pt " in capsys.readouterr().out


def test_images_that_are_not_at_hand(run, torch_written, capsys):
    Path("tiny.npz").rename("moved.npz")
    export.main(["r", "--to", "torch"])
    out = capsys.readouterr().out
    assert "compared on random images: " in out and "tiny.npz" in out
    assert torch_written[-1].dataset is None and torch_written[-1].images.shape[0] == 256
    export.main(["r/model.pt", "--to", "torch", "--dataset", "moved.npz"])
    assert "compared on 30 test images of moved.npz" in capsys.readouterr().out
    images, x_test = torch_written[-1].images, data.load("moved.npz").x_test
    assert torch.equal(images[:30], images[30:60])  # all of them, and from the start again
    assert sorted(images[:30].flatten(1).tolist()) == sorted(x_test.flatten(1).tolist())
    Path("r/config.json").unlink()
    export.main(["r/model.pt", "--to", "torch"])
    assert "random images: no config.json beside it" in capsys.readouterr().out


def test_images_of_a_sorted_data_set_are_of_all_classes(monkeypatch):
    """Folders and events are sorted by class: the first 256 images would be of one."""
    def keep(content, images):
        calibrated.append(images)
        raise files.Disagrees("enough")

    calibrated, x = [], torch.arange(3, dtype=torch.uint8).repeat_interleave(300)
    dataset = SimpleNamespace(x_train=x.view(-1, 1, 1, 1).expand(-1, 1, SIDE, SIDE), x_test=x[100:])
    monkeypatch.setattr(export, "in_int8", keep)
    with pytest.raises(files.Disagrees):
        export.to_int8(SimpleNamespace(dataset=dataset), b"", None)
    found = export.images_for(network(), dataset)
    assert found.shape == (256,) and calibrated[0].shape == (256, 1, SIDE, SIDE)
    for images in (found, calibrated[0][:, 0, 0, 0]):
        assert images.bincount().min() > 0.2 * 256 and len(images[:3].unique()) > 1
    few = export.images_for(network(), SimpleNamespace(x_test=x[:40]))
    assert len(few) == 64  # a batch


@pytest.mark.parametrize("given, config, split", [
    ([], dict(dataset="n-mnist"), "time"), ([], dict(dataset="cifar10-dvs"), "number"),
    ([], dict(dataset="n-mnist", event_split="number"), "number"),
    (["--dataset", "n-mnist"], dict(dataset="n-mnist"), "time"),
    (["--dataset", "n-mnist"], dict(dataset="mnist"), None)])
def test_frames_are_those_of_training(given, config, split, run, monkeypatch):
    """A run from before --event-split had frames by time, but of cifar10-dvs."""
    def load(wanted, *_, **more):
        found.append(wanted.event_split)
        raise OSError("no data")

    found = []
    monkeypatch.setattr(export.setup, "load", load)
    with suppress(OSError):  # where --dataset names it
        export.data_for(network(), config, export.parse_args(["r", *given]))
    assert found == [split]


def test_what_is_not_installed(run, torch_written, monkeypatch, capsys):
    monkeypatch.setattr(export, "missing_for", {"onnx": ["onnx", "onnxruntime"], "torch": []}.get)
    monkeypatch.setattr(export, "FORMATS", {name: export.FORMATS[name]
                                            for name in ("onnx", "torch")})
    export.main(["r"])
    out = capsys.readouterr().out
    assert "onnx needs onnx and onnxruntime: pip install -r requirements-export.txt\n" in out
    assert len(torch_written) == 1
    before = everything_in(Path())
    for given in (["--to", "onnx"], ["--int8"]):
        with pytest.raises(SystemExit) as stopped:
            export.main(["r", *given])
        assert stopped.value.code == 2
        assert "onnx needs onnx and onnxruntime, which" in one_line(capsys)
    assert everything_in(Path()) == before


def test_a_format_that_does_not_apply(run, torch_written, monkeypatch, capsys):
    def refuse(net):
        raise ValueError("soft resets are not known there")

    monkeypatch.setattr(export, "FORMATS", {"first": None, "torch": export.FORMATS["torch"]})
    monkeypatch.setitem(export.CHECKS, "first", refuse)
    export.main(["r"])
    assert "first   soft resets are not known there\ntorch   written" in capsys.readouterr().out
    before = everything_in(Path())
    with pytest.raises(SystemExit) as stopped:
        export.main(["r", "--to", "torch", "first", "--out", "new"])
    assert stopped.value.code == 2 and "soft resets" in one_line(capsys)
    assert everything_in(Path()) == before


@pytest.mark.parametrize("given, words", [
    (["none"], "there is no file none, expected the model.pt of a run"),
    (["empty"], "there is no file empty/model.pt"),
    (["r/config.json"], "r/config.json cannot be read"),
    (["r", "--to", "tflite"], "--to"),
    (["r", "--to"], "--to"),
    (["r", "--to", "torch", "--int8"], "--int8 is given, but --to has no onnx"),
    (["r", "--to", "torch", "--out", "tiny.npz"], "--out is tiny.npz, a file, expected a folder"),
    (["r", "--to", "torch", "--out", "tiny.npz/x"], "tiny.npz"),
    (["r", "--to", "torch", "--dataset", "fashion-mini"], "fashion-mini has images [1, 28, 28] of "
     "10 classes, but the network takes [1, 8, 8] of 3, expected"),
    (["r", "--to", "torch", "--dataset", "none.npz"], "none.npz"),
    (["r", "--int-8"], "Did you mean --int8?")])
def test_what_is_refused(given, words, run, torch_written, capsys):
    Path("empty").mkdir()
    before = everything_in(Path())
    with pytest.raises(SystemExit) as stopped:
        export.main(given)
    assert stopped.value.code == 2
    assert words in one_line(capsys)
    assert everything_in(Path()) == before


def test_int8_needs_images(run, monkeypatch, capsys):
    monkeypatch.setattr(export, "missing_for", lambda name: [])
    Path("tiny.npz").unlink()
    before = everything_in(Path())
    with pytest.raises(SystemExit) as stopped:
        export.main(["r", "--to", "onnx", "--int8"])
    assert stopped.value.code == 2
    assert "--int8 takes the ranges of values from training images, but they are not at hand" in \
        one_line(capsys)
    assert everything_in(Path()) == before


# ---- the networks of assets/ ---------------------------------------------------------------------


START = [*sorted(path.parent for path in (ROOT / "assets").glob("*/model.pt")),
         ROOT / "results/runs/start/default"]


@pytest.mark.parametrize("folder", START, ids=lambda path: path.name)
def test_a_network_to_start_from(folder):
    assert (folder / "model.pt").stat().st_size < 1e6
    net, dataset = models.load(folder / "model.pt"), data.load("fashion-mini")
    summary = json.loads((folder / "summary.json").read_text())
    found = models.predict(net, dataset.x_test).classes
    right = float((found == dataset.y_test).double().mean())
    assert abs(right - summary["test_accuracy"]) < 0.005
    assert net.config["widths"] == summary["widths"]
    config = (folder / "config.json").read_text()
    assert '"seed": 0' in config and "/tmp" not in config
    text = (ROOT / "assets/README.md").read_text()
    assert f"`{folder.name}/`" in text or "`../results/runs/start/default/`" in text


def test_the_networks_to_start_from_are_of_all_kinds():
    nets = {path.name: models.load(path / "model.pt") for path in START}
    pruned = {name: not all(mask.all() for mask in net.masks.values())
              for name, net in nets.items()}
    assert pruned == dict(dense=False, channels=False, default=True)
    usual = models.default_widths("small")
    assert nets["dense"].config["widths"] == nets["default"].config["widths"] == usual
    assert sum(nets["channels"].config["widths"]) < sum(usual)


def test_a_run_starts_from_a_network_of_assets():
    import prune_unstructured

    prune_unstructured.main(["--init", str(ROOT / "assets/dense/model.pt"), "--epochs-prune", "1",
                             "--epochs-finetune", "0", "--interval", "2", "--lr", "0.001",
                             "--train-limit", "200", "--sparsity", "0.3", "--run-dir", "i"])
    summary = json.loads(Path("i/summary.json").read_text())
    assert summary["test_accuracy"] > 0.8 and round(summary["sparsity"], 3) == 0.3
