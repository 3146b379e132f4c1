"""harness/nir_graph.py: networks as graphs of NIR, against an executor of the graph alone, and as
SpikingJelly and snnTorch read them."""
import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models
import plans
from helpers import let_fire, real_images
from neurons import LIF

nir = pytest.importorskip("nir", reason="nir is not installed")

from harness import files, nir_graph  # noqa: E402: it needs nir

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "results/runs/start/default/model.pt"
INSTALLED = [name for name, (package, _) in nir_graph.READERS.items()
             if importlib.util.find_spec(package) and importlib.util.find_spec("nirtorch")]
reader = pytest.mark.parametrize("reader", [
    pytest.param(name, marks=() if name in INSTALLED else pytest.mark.skip(
        reason=f"{name} or nirtorch is not installed"))
    for name in nir_graph.READERS])


def firing_net(name, factor=0.1, side=8, encoding="direct", channels=1, T=3, **neuron):
    """A network in float64 whose layers fire, with BN that is not the identity, in eval mode."""
    torch.manual_seed(0)
    net = models.build(name, 3, channels, side, T, models.default_widths(name, factor),
                       encoding=encoding, neuron=neuron)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, 0.1, 0.5)
    let_fire(net)
    for lif in models.lifs(net).values():
        if lif.learn_tau:  # as if it had been trained
            torch.nn.init.uniform_(lif.w, -0.5, 0.5)
    net.set_normalisation([0.3] * channels, [0.4] * channels)
    return net.double().eval()


def random_images(net, n, seed=0):
    shape = [n, len(net.mean), net.image_size, net.image_size]
    if net.encoding == "events":
        shape.insert(1, net.time_steps)
    high = 4 if net.encoding == "events" else 256
    return torch.randint(high, shape, dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def read_back(net, folder):
    nir.write(folder / "model.nir", nir_graph.to_nir(net))
    return nir.read(folder / "model.nir")


# ---- an executor of a graph of NIR, by its definitions alone: time outside, one image, no torch --


def convolved(node, x):
    (down, right), (above, left) = (tuple(map(int, pair)) for pair in (node.stride, node.padding))
    x = np.pad(x, ((0, 0), (above, above), (left, left)))
    weight = node.weight.astype(float)
    _, _, height, width = weight.shape
    rows = (x.shape[1] - height) // down + 1
    columns = (x.shape[2] - width) // right + 1
    out = np.empty((len(weight), rows, columns))
    for i, j in itertools.product(range(rows), range(columns)):
        patch = x[:, i * down:i * down + height, j * right:j * right + width]
        out[:, i, j] = (weight * patch).sum((1, 2, 3)) + node.bias
    return out


def pooled(node, x, how):
    size = int(node.kernel_size[0])
    rows, columns = x.shape[1] // size, x.shape[2] // size
    x = x[:, :rows * size, :columns * size].reshape(len(x), rows, size, columns, size)
    return how(x, axis=(2, 4))


def step(node, x, state):
    """What a node puts out in a step, and its state; forward Euler, dt = 1e-4 s."""
    match type(node).__name__:
        case "Input" | "Output":
            return x, None
        case "Conv2d":
            return convolved(node, x), None
        case "SumPool2d":
            return pooled(node, x, np.sum), None
        case "AvgPool2d":
            return pooled(node, x, np.mean), None
        case "Flatten":
            return x.reshape(-1), None
        case "Affine":
            return node.weight.astype(float) @ x + node.bias, None
        case "Linear":
            return node.weight.astype(float) @ x, None
        case "LIF":
            v = np.zeros_like(x) if state is None else state
            v = v + 1e-4 / node.tau * (node.v_leak - v + node.r * x)
            z = v > node.v_threshold
            return z.astype(float), np.where(z, node.v_reset, v)


def execute(graph, x_seq):
    """{node: [T, ...]} for one image, x_seq [T, C, H, W]."""
    states, seen = {}, {name: [] for name in graph.nodes}
    for x in x_seq:
        values = {}

        def value(name):
            if name not in values:
                sources = [a for a, b in graph.edges if b == name]
                inputs = sum(value(source) for source in sources) if sources else x
                values[name], states[name] = step(graph.nodes[name], inputs, states.get(name))
            return values[name]

        for name in graph.nodes:
            seen[name].append(value(name))
    return {name: np.stack(values) for name, values in seen.items()}


# ---- graphs --------------------------------------------------------------------------------------

SIDES = {"vgg16": 32, "vgg16-avg": 32, "vggsnn": 16}


@pytest.mark.parametrize("name", plans.NAMES)
def test_each_network_does_the_same_as_its_graph(name):
    """All spikes of all layers; the graph has weights of float32."""
    encoding = "events" if name == "vggsnn" else "direct"
    net = firing_net(name, factor=0.05, side=SIDES.get(name, 9), encoding=encoding,
                     channels=2 if encoding == "events" else 1)
    images = random_images(net, 3)
    with torch.no_grad():
        spikes, logits, _ = nir_graph.run_network(net, images)
        found = nir_graph.run(nir_graph.to_nir(net), nir_graph.graph_input(net, images))
    for layer, own in spikes.items():
        assert own.any() and torch.equal(found[layer], own), layer
    assert any(0.02 < own.mean() < 0.9 for own in spikes.values())
    assert torch.allclose(found["output"].sum(0), logits, atol=1e-5)


@pytest.mark.parametrize("name", ["small", "small-avg", "resnet19", "resnet19-pre", "sdsnn-large",
                                  "gradr-conv"])
def test_a_file_does_the_same_by_another_executor(name, tmp_path):
    net = firing_net(name, factor=0.03)
    images = random_images(net, 1)
    graph = read_back(net, tmp_path)
    with torch.no_grad():
        spikes, logits, _ = nir_graph.run_network(net, images)
        found = execute(graph, nir_graph.graph_input(net, images)[:, 0].numpy())
    for layer, own in spikes.items():
        assert np.array_equal(found[layer], own[:, 0].numpy()), layer
    assert any(0 < own.mean() < 1 for own in spikes.values())
    assert np.allclose(found["output"].sum(0), logits[0].numpy(), atol=1e-5)


def test_neurons_have_the_parameters_of_one_step():
    lif = nir_graph.to_nir(firing_net("small")).nodes["lifs.0"]
    assert lif.tau.shape == (2, 8, 8)
    for name, value in dict(tau=4 / 3 * 1e-4, r=1, v_leak=0, v_threshold=1, v_reset=0).items():
        assert np.array_equal(getattr(lif, name), np.full((2, 8, 8), value)), name
    net = firing_net("small", tau=2.0, decay_input=False, v_threshold=0.5, v_reset=-0.25)
    lif = nir_graph.to_nir(net).nodes["lifs.0"]  # potentials are counted from the reset
    for name, value in dict(tau=2e-4, r=2, v_leak=0, v_threshold=0.75, v_reset=0).items():
        assert np.array_equal(getattr(lif, name), np.full((2, 8, 8), value)), name


@pytest.mark.parametrize("neuron", [
    dict(v_reset=-0.5), dict(v_reset=0.25, tau=3.0, v_threshold=0.75), dict(decay_input=False),
    dict(strict=True), dict(decay_input=False, v_reset=-0.3, tau=1.5),
    dict(learn_tau=True, tau=2.5), dict(surrogate="tanh", v_threshold=0.5)])
def test_other_neurons(neuron):
    net = firing_net("small-avg", **neuron)
    images = random_images(net, 4)
    with torch.no_grad():
        spikes, _, _ = nir_graph.run_network(net, images)
        found = nir_graph.run(nir_graph.to_nir(net), nir_graph.graph_input(net, images))
    for layer, own in spikes.items():
        assert 0 < own.mean() < 1 and torch.equal(found[layer], own), layer


def test_a_soft_reset_is_refused_before_anything_is_written(tmp_path):
    net = firing_net("small", reset="soft")
    with pytest.raises(ValueError, match=r"lifs.0 has a soft reset, expected a hard one: .* "
                                         r"Export to another format"):
        nir_graph.export_nir(net, tmp_path, random_images(net, 1))
    assert not [*tmp_path.iterdir()]


def test_max_pooling_of_spikes_is_exact_for_all_sequences():
    """Each pattern of 2x2 spikes after each other one, twice."""
    patterns = torch.tensor([*itertools.product([0.0, 1.0], repeat=4)]).view(16, 2, 2)
    order = torch.tensor([*itertools.product(range(16), repeat=2)]).flatten()
    spikes = patterns[torch.cat([order, order])].view(-1, 1, 1, 2, 2)  # [T, N, C, H, W]
    draft = nir_graph.Draft({"input": nir.Input(np.array([1, 2, 2]))}, [])
    signal = nir_graph.add_max_pool(draft, "pool", nir_graph.Signal(("input",), (1, 2, 2)))
    nir_graph.add(draft, "output", nir.Output(np.array([1, 1, 1])), signal, signal.shape)
    found = nir_graph.run(nir.NIRGraph(*draft), spikes)["output"]
    assert torch.equal(found, F.max_pool2d(spikes.flatten(0, 1), 2).view(found.shape))


def test_dead_weights_stay_zero_and_bn_is_folded_in_float64():
    net = firing_net("small").float()
    masks = {name: torch.rand(net.get_parameter(name).shape) < 0.2
             for name in models.scored_by(net)}
    models.keep_zeros(net, masks).remove()
    graph = nir_graph.to_nir(net)
    for name, mask in masks.items():
        node = graph.nodes[name.removesuffix(".weight").removesuffix(".conv")]
        assert node.weight.dtype == node.bias.dtype == np.float32
        assert np.array_equal(node.weight != 0, mask.numpy()), name
    layer, node = net.convs[1], graph.nodes["convs.1"]
    bn = layer.bn
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + 1e-5)
    weight = (layer.conv.weight.double() * scale.view(-1, 1, 1, 1)).float()
    bias = (bn.bias.double() - bn.running_mean.double() * scale).float()
    assert torch.equal(torch.from_numpy(node.weight), weight)
    assert torch.equal(torch.from_numpy(node.bias), bias)


def test_residual_additions_are_edges_into_one_node():
    graph = nir_graph.to_nir(firing_net("resnet19", factor=0.05))
    into = {name: sorted(a for a, b in graph.edges if b == name) for name in graph.nodes}
    assert into["blocks.0.lif2"] == ["blocks.0.conv2", "blocks.0.shortcut"]
    assert into["blocks.1.lif2"] == ["blocks.0.lif2", "blocks.1.conv2"]  # the identity
    graph = nir_graph.to_nir(firing_net("resnet19-pre", factor=0.05))
    into = {name: sorted(a for a, b in graph.edges if b == name) for name in graph.nodes}
    assert into["blocks.2.norm1"] == ["blocks.0.conv2", "blocks.0.shortcut", "blocks.1.conv2"]


def test_a_channel_that_was_removed_from_a_stream_is_not_read():
    net = firing_net("resnet19-pre", factor=0.05)
    block = net.blocks[1]
    graph = nir_graph.to_nir(net)
    assert np.array_equal(graph.nodes["blocks.1.norm1"].weight[:, :, 0, 0] != 0,
                          np.eye(block.norm1.stream, dtype=bool))
    block.norm1.picked = torch.tensor([1, 4])
    block.norm1.bn = torch.nn.BatchNorm2d(2).double().eval()
    weight = torch.zeros(2, block.norm1.stream)
    weight[0, 1] = weight[1, 4] = 1 / np.sqrt(1 + 1e-5)
    draft = nir_graph.Draft({}, [])
    nir_graph.add_picked(draft, "norm", nir_graph.Signal((), (block.norm1.stream, 2, 2)),
                         block.norm1)
    assert torch.equal(torch.from_numpy(draft.nodes["norm"].weight[:, :, 0, 0]), weight)


# ---- what stands in a file -----------------------------------------------------------------------


def test_the_metadata_say_how_to_feed_a_file_and_how_to_read_it(tmp_path):
    net = firing_net("vgg16", factor=0.05, side=28)
    net.class_names = ["hat", "shoe, left", "überzug"]
    images = random_images(net, 5)
    graph = read_back(net, tmp_path)
    about = graph.metadata
    assert about["network"] == "vgg16" and about["time_steps"] == 3 and about["dt"] == 1e-4
    assert json.loads(about["class_names"]) == net.class_names
    # as a reader would do it, from the metadata alone
    left, right, above, below = about["pad"]
    assert (left, right, above, below) == (2, 2, 2, 2)
    pixels = np.pad(images.numpy(), ((0, 0), (0, 0), (above, below), (left, right)))
    mean, std = (about[key].reshape(-1, 1, 1) for key in ("mean", "std"))
    image = torch.from_numpy((pixels / 255 - mean) / std)
    assert tuple(graph.nodes["input"].input_type["input"]) == tuple(image.shape[1:])
    out = nir_graph.run(graph, image.expand(about["time_steps"], *image.shape))["output"]
    assert torch.allclose(out.sum(0), net(images).sum(0), atol=1e-4)


def test_events_and_rate_coding(tmp_path):
    net = firing_net("small", encoding="rate").float()
    images = random_images(net, 4)
    lines = nir_graph.export_nir(net, tmp_path, images)
    assert "rate coding: the file takes spikes" in lines[1]
    x_seq = nir_graph.graph_input(net, images)
    assert x_seq.shape == (3, 4, 1, 8, 8) and set(x_seq.unique().tolist()) == {0, 1}
    assert nir.read(tmp_path / "model.nir").metadata["encoding"] == "rate"
    net = firing_net("small-avg", encoding="events", channels=2)
    images = random_images(net, 4)
    x_seq = nir_graph.graph_input(net, images)
    assert torch.equal(x_seq, images.transpose(0, 1).double())


def test_an_export_is_the_same_each_time_and_says_what_it_did(tmp_path, monkeypatch):
    monkeypatch.setattr(nir_graph, "READERS", {})
    net = models.load(SHIPPED)
    alive = sum(int(net.get_parameter(name).count_nonzero()) for name in models.scored_by(net))
    first, *rest = nir_graph.export_nir(net, tmp_path, real_images(40))
    content = (tmp_path / "model.nir").read_bytes()
    assert first == (f"{tmp_path / 'model.nir'}: {len(content):,} bytes, 18 nodes, {alive:,} of "
                     f"65,808 weights are not 0; T = 4, dt = 0.0001 s")
    spikes = 40 * 4 * (16 * 28 * 28 + 32 * 14 * 14 + 2 * 64 * 7 * 7)
    assert len(rest) == 2 and rest[0].startswith("run by NIR's equations: ")
    assert rest[0].endswith("40 of 40 predictions are equal")
    assert rest[1] == (f"0 of {spikes:,} spikes depend on whether a neuron fires at h = "
                       f"v_threshold exactly: it does here and in SpikingJelly, not in NIR "
                       f"and snnTorch")
    nir_graph.export_nir(net, tmp_path, real_images(1))
    assert (tmp_path / "model.nir").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["model.nir"]


def at_threshold(strict):
    """One neuron whose potential is the threshold exactly: tau = 2, input 2."""
    net = models.build("gradr-linear", 2, 1, 8, 2, [1], neuron=dict(strict=strict)).eval()
    with torch.no_grad():
        for layer in (net.hidden[0], net.fc):
            layer.weight.zero_()
        net.hidden[0].weight[0, 0] = 2.0
    images = torch.zeros(400, 1, 8, 8, dtype=torch.uint8)
    images[:2, 0, 0, 0] = 255  # in two images
    return net, images


def test_spikes_at_the_threshold_exactly_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(nir_graph, "READERS", {})
    monkeypatch.setattr(nir_graph, "BATCH", 300)
    net, images = at_threshold(strict=False)
    spikes, _, tied = nir_graph.run_network(net, images)
    assert spikes["lifs.0"][:, :3, 0].tolist() == [[1, 1, 0], [1, 1, 0]]
    # if it fires above the threshold alone: h = 1, then 1.5: a spike in the second step
    assert tied == 2
    lines = nir_graph.export_nir(net, tmp_path, images)
    assert lines[-2] == ("run by NIR's equations: 2 of 2,400 spikes differ (lifs.0 2; in 2 of 400 "
                         "images), logits by 0 at most; 400 of 400 predictions are equal")
    assert lines[-1].startswith("2 of 2,400 spikes depend on whether a neuron fires at h = ")
    net, images = at_threshold(strict=True)  # as NIR's
    lines = nir_graph.export_nir(net, tmp_path, images.flip(0))
    assert "0 of 2,400 spikes differ, " in lines[-2]
    assert lines[-1] == ("2 of 2,400 spikes depend on whether a neuron fires at h = v_threshold "
                         "exactly: it does in SpikingJelly, not here, in NIR and snnTorch")


def test_what_differs_is_counted_in_all_batches(monkeypatch):
    """Against runs that turn over two spikes of an image and one logit, in one batch."""
    net = firing_net("small")
    images = random_images(net, 5)
    monkeypatch.setattr(nir_graph, "BATCH", 2)
    spikes = 5 * 3 * sum(values[0, 0].numel() for values in
                         nir_graph.run_network(net, images)[0].values())
    calls = []

    def wrong_in(batch):
        def run(x_seq):
            found = nir_graph.run(nir_graph.to_nir(net), x_seq)
            calls.append(batch)
            if calls.count(batch) == batch:
                found["lifs.1"][0, 0, 0, 0, :2] = 1 - found["lifs.1"][0, 0, 0, 0, :2]
                found["output"][0, 0, 0] += 1000
            return found
        return run

    labels = net(images).sum(0).argmax(1)
    runs = {1: wrong_in(1), 3: wrong_in(3), "bad": lambda x_seq: 1 / 0}
    tallies, _ = nir_graph.compare(net, images, runs)
    for batch, image in ((1, 0), (3, 4)):
        tally = tallies[batch]
        assert tally["differ"] == {"lifs.0": 0, "lifs.1": 2, "lifs.2": 0, "lifs.3": 0}
        assert (tally["spikes"], tally["wrong"], tally["images"]) == (spikes, 1, 5)
        assert tally["equal"] == (5 if labels[image] == 0 else 4)
        assert abs(tally["logits"] - 1000) < 1e-3
        assert nir_graph.in_words(tally).startswith(f"2 of {spikes:,} spikes differ (lifs.1 2; in "
                                                    f"1 of 5 images), logits by 1e+03 at most; ")
    assert nir_graph.in_words(tallies["bad"]) == "an error, division by zero"


@pytest.mark.parametrize("differ, equal, failed, alike", [
    (10, 90, None, True), (11, 90, None, False), (10, 89, None, False), (0, 100, "x", False)])
def test_what_rounding_explains(differ, equal, failed, alike):
    tally = dict(differ={"a": differ - 1, "b": 1}, spikes=10000, equal=equal, images=100,
                 failed=failed)
    assert nir_graph.is_alike(tally) is alike


def test_a_neuron_that_nir_does_not_know_is_an_error(tmp_path, monkeypatch):
    """As if neurons.py had been changed: a network with another neuron."""
    monkeypatch.setattr(nir_graph, "READERS", {})
    net = firing_net("small").float()

    def leaky(self, x_seq, time_steps=None):
        return (self.over_time(x_seq, time_steps) > 0.2).to(x_seq.dtype)

    monkeypatch.setattr(LIF, "forward", leaky)
    for lif in models.lifs(net).values():
        monkeypatch.setattr(lif, "path", None)
    with pytest.raises(files.Disagrees, match="model.nir would not do what the network does and is "
                                              "not written: .* spikes differ .* Was the neuron"):
        nir_graph.export_nir(net, tmp_path, random_images(net, 4))
    assert not [*tmp_path.iterdir()]


def test_spikes_at_the_threshold_are_the_cause_where_they_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(nir_graph, "READERS", {})
    net, images = at_threshold(strict=False)
    with pytest.raises(files.Disagrees, match="2 of 12 spikes differ .* 2 of 12 spikes depend on "
                                              "whether a neuron fires at h = v_threshold exactly"):
        nir_graph.export_nir(net, tmp_path, images[:2])
    assert not [*tmp_path.iterdir()]


def test_a_framework_that_is_not_there_or_refuses_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(nir_graph, "READERS", {
        "Nobody": ("nobody", "nobody.nir"), "Half": ("torch", "nobody"),
        "Torch": ("torch", "torch.nn"), "Old": ("torch", "torch.nir")})
    net = firing_net("small").float()
    lines = nir_graph.export_nir(net, tmp_path, random_images(net, 2))
    assert lines[1] == "not read by Nobody: nobody is not installed (pip install nobody)"
    assert lines[2] == "not read by Half: nobody is not installed (pip install nobody)"
    assert lines[3].startswith("not read by Torch: ") and "import_from_nir" in lines[3]
    assert lines[4] == "not read by Old: No module named 'torch.nir'"
    assert lines[5].startswith("run by NIR's equations: 0 of ")


def test_a_framework_that_does_something_else_is_named(tmp_path, monkeypatch):
    def through(module, path):
        return lambda x_seq: {name: 1 - values for name, values in
                              nir_graph.run(nir.read(path), x_seq).items()}

    monkeypatch.setattr(nir_graph, "READERS", {"Torch": ("torch", "torch")})
    monkeypatch.setattr(nir_graph, "through", through)
    net = firing_net("small").float()
    lines = nir_graph.export_nir(net, tmp_path, random_images(net, 2))
    assert lines[1].startswith("run by NIR's equations: 0 of ")
    assert lines[2].startswith("run by Torch ") and ", which does something else: " in lines[2]


# ---- as frameworks read a file -------------------------------------------------------------------


def read_by(reader, path):
    package, module = nir_graph.READERS[reader]
    return nir_graph.through(module, path)


@pytest.mark.skipif(not INSTALLED, reason="neither SpikingJelly nor snnTorch is installed")
def test_frameworks_run_the_shipped_network_on_256_images(tmp_path, capsys):
    net = models.load(SHIPPED)
    lines = nir_graph.export_nir(net, tmp_path, real_images(256))
    lines = [line for line in lines if line.startswith("run by")]
    assert len(lines) == 1 + len(INSTALLED)
    for line in lines:
        assert line.endswith("256 of 256 predictions are equal")
        # a potential that rounding moves over the threshold changes later spikes of its image
        words = line.partition(": ")[2].split()
        differ, of = (int(words[i].replace(",", "")) for i in (0, 2))
        assert differ <= 200 and of == 256 * 4 * (16 * 28 * 28 + 32 * 14 * 14 + 2 * 64 * 7 * 7)
    assert not capsys.readouterr().out


@reader
@pytest.mark.parametrize("name", ["small-avg", "resnet19", "resnet19-pre", "sdsnn-large",
                                  "gradr-conv"])
def test_a_framework_runs_other_networks(reader, name, tmp_path):
    """Two batches of different sizes: no potential is left of the first one."""
    net = firing_net(name, factor=0.05, v_reset=-0.25)
    graph = read_back(net, tmp_path)
    run = read_by(reader, tmp_path / "model.nir")
    for count in (6, 2):
        images = random_images(net, count, seed=count)
        x_seq = nir_graph.graph_input(net, images).float()
        with torch.no_grad():
            found, own = run(x_seq), nir_graph.run(graph, x_seq)
        assert set(models.lifs(net)) < set(found)
        for layer in models.lifs(net):
            share = (found[layer] != own[layer]).double().mean()
            assert share < 1e-3 and 0 < own[layer].mean() < 1, layer
        assert torch.equal(found["output"].sum(0).argmax(1), own["output"].sum(0).argmax(1))


@reader
def test_a_framework_fires_at_the_threshold_or_above_it(reader, tmp_path):
    net, images = at_threshold(strict=False)
    nir_graph.export_nir(net, tmp_path, images)
    found = read_by(reader, tmp_path / "model.nir")(nir_graph.graph_input(net, images))
    first_step = found["lifs.0"][0, :3, 0].tolist()
    assert first_step == {"SpikingJelly": [1, 1, 0], "snnTorch": [0, 0, 0]}[reader]
