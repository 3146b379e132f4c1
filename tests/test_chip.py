"""harness/chip.py: synapses, spikes, operations and cores against a network that is unrolled, one
synapse after the other, by plain loops; what the report says, and what it refuses."""
import json
import re
from itertools import product

import pytest
import torch

import data
import inputs
import metrics
import models
import plans
from harness import chip, plots
from helpers import let_fire

SIZE = 6


def network(name, encoding="direct", size=SIZE, factor=0.05, pruned=0.5):
    torch.manual_seed(0)
    inputs = 2 if encoding == "events" else 1
    net = models.build(name, 3, inputs, size, 2, plans.default_widths(name, factor), encoding)
    let_fire(net)
    if name == "resnet19":
        net.fc1.bias.data.fill_(3)
    net.masks = {}
    for name in models.scored_by(net):
        weight = net.get_parameter(name).data
        net.masks[name] = torch.rand(weight.shape) >= pruned
        weight.mul_(net.masks[name])
    return net.eval()


def some_images(net, count=3):
    generator = torch.Generator().manual_seed(1)
    if net.encoding == "events":
        shape = (count, net.time_steps, 2, net.image_size, net.image_size)
        return torch.poisson(torch.full(shape, 0.6), generator).to(torch.uint8)
    shape = (count, 1, net.image_size, net.image_size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@torch.no_grad()
def spikes_of(net, images):
    """{LIF: its spikes [T, N, ...]}, and under "input" what the first layer reads."""
    found = {}
    first = next(iter(metrics.prunable_layers(net)))
    with (metrics.hooks(models.lifs(net), after=lambda n, s: found.update({n: s.clone()})),
          metrics.hooks({"input": net.get_submodule(first)},
                        before=lambda n, x: found.update({n: x.clone()}))):
        net(inputs.as_input(net, images))
    found["input"] = found["input"].unflatten(0, (-1, len(images)))
    return found


def pooling(shape, side):
    """[pooled neurons, neurons]: 1 where a window holds a neuron; shape [C, H, W]."""
    channels, height, _ = shape
    small = height // side
    matrix = torch.zeros(channels * small * small, channels * height * height)
    for c, y, x, dy, dx in product(range(channels), *[range(small)] * 2, *[range(side)] * 2):
        source = (c * height + y * side + dy) * height + x * side + dx
        matrix[(c * small + y) * small + x, source] = 1
    return matrix


def unrolled(module, mask, shape):
    """[neurons, inputs]: 1 where an alive weight connects the two; shape: of the inputs."""
    if mask.dim() == 2:
        return mask.float()
    channels, height, _ = shape
    stride, padding = module.stride[0], module.padding[0]
    side = (height + 2 * padding - mask.shape[2]) // stride + 1
    matrix = torch.zeros(len(mask) * side * side, channels * height * height)
    for o, c, dy, dx in mask.nonzero().tolist():
        for y, x in product(range(side), repeat=2):
            row, column = y * stride + dy - padding, x * stride + dx - padding
            if 0 <= row < height and 0 <= column < height:
                matrix[(o * side + y) * side + x, (c * height + row) * height + column] += 1
    return matrix


def wires(net):
    """(row, what it reads, what it feeds, the side of its windows or 1), by hand."""
    if isinstance(net, models.ResNet19):
        yield "stem.conv", "input", "lif", 1
        before = "lif"
        for i, block in enumerate(net.blocks):
            name = f"blocks.{i}"
            yield f"{name}.conv1.conv", before, f"{name}.lif1", 1
            yield f"{name}.conv2.conv", f"{name}.lif1", f"{name}.lif2", 1
            other = " identity" if block.shortcut is None else ".shortcut.conv"
            yield f"{name}{other}", before, f"{name}.lif2", 1
            before = f"{name}.lif2"
        yield "fc1", before, "lif_fc", "all"
        yield "fc2", "lif_fc", "output", 1
        return
    before, side = "input", 1
    layers = [*(f"convs.{i}.conv" for i in range(len(net.convs))),
              *(f"hidden.{i}" for i in range(len(net.hidden)))]
    for i, name in enumerate(layers):
        yield name, before, f"lifs.{i}", side
        before, side = f"lifs.{i}", 1
        if i < len(net.convs) and net.pooled[i] == "P":
            yield f"pool of {before}", before, f"pool of {before}", 2
            before = f"pool of {before}"
        elif i < len(net.convs) and net.pooled[i] == "A":
            side = 2
    yield "fc", before, "output" if net.lif_out is None else "lif_out", side


@pytest.mark.parametrize("name, encoding, size", [
    ("small", "direct", 12), ("small-avg", "direct", 12), ("small", "rate", 8),
    ("small", "events", 8), ("resnet19", "direct", 6), ("gradr-linear", "direct", 5),
    ("sdsnn-small", "direct", 8)])
def test_a_chip_needs_what_the_unrolled_network_has(name, encoding, size):
    factor = dict(resnet19=0.02).get(name, 0.12)
    net = network(name, encoding, size, factor)
    images = some_images(net)
    found = chip.needs(net, images, core_neurons=40, core_synapses=1500)
    fired, rows = spikes_of(net, images), {row["layer"]: row for row in found["layers"]}
    assert [row["layer"] for row in found["layers"]] == [wire[0] for wire in wires(net)]
    matrices, kernels = {}, {}  # by what they feed
    for layer, source, to, side in wires(net):
        row, spikes = rows[layer], fired[source]  # [T, N, ...]
        shape = spikes.shape[2:]
        matrix = torch.eye(shape.numel())
        if side != 1:
            matrix = pooling(shape, shape[1] if side == "all" else side)
        reads_map = (shape[0], *[shape[1] // (side if side != "all" else shape[1])] * 2) \
            if len(shape) == 3 else shape
        kernel = torch.ones(shape[0], dtype=torch.long)
        if layer.startswith("pool"):
            fired[to] = (spikes.flatten(2) @ matrix.T).clamp(max=1).unflatten(2, reads_map)
        elif not layer.endswith("identity"):
            mask = net.masks[f"{layer}.weight"]
            matrix = unrolled(net.get_submodule(layer), mask, reads_map) @ matrix
            kernel = torch.tensor([int(m.count_nonzero()) for m in mask])
            assert (row["weights"], row["alive"]) == (mask.numel(), int(mask.count_nonzero()))
            assert row["bytes"] == {32: 4 * row["alive"], 8: row["alive"],
                                    4: (row["alive"] + 1) // 2}
        assert row["synapses"] == matrix.count_nonzero() == matrix.sum()
        fan_in, fan_out = matrix.sum(1), matrix.sum(0)
        assert row["fan_in_max"] == fan_in.max() and row["fan_out_max"] == fan_out.max()
        assert row["fan_in_mean"] == pytest.approx(float(fan_in.mean()))
        assert row["fan_out_mean"] == pytest.approx(float(fan_out.mean()))
        if layer == next(iter(rows)) and encoding == "direct":
            assert row["sops"] == 0 and row["macs"] == row["synapses"]
        else:
            arrived = float((spikes.double().flatten(2) @ matrix.T.double()).sum()) / len(images)
            assert row["sops"] == pytest.approx(arrived) and row["macs"] == 0
        if to not in matrices:
            assert row["neurons"] == len(matrix)
            own = fired.get(to)
            assert row["spikes"] == (None if to == "output" else pytest.approx(
                float(own.sum()) / len(images)))
        else:
            assert (row["neurons"], row["spikes"], row["cores"]) == (0, None, None)
        matrices.setdefault(to, []).append(matrix)
        kernels[to] = kernels.get(to, 0) + kernel
    fan_ins = {to: sum(part.sum(1) for part in parts).long().tolist()
               for to, parts in matrices.items()}
    most = max(max(max(fan_ins[to]), int(kernels[to].max())) for to in fan_ins)
    tight = chip.needs(net, images, 1000, most)["layers"]  # synapses decide, not neurons
    for row, again in zip(found["layers"], tight, strict=True):
        if row["neurons"]:
            fan_in, mine = fan_ins[row["feeds"]], kernels[row["feeds"]].tolist()
            channel = [i * len(mine) // len(fan_in) for i in range(len(fan_in))]
            assert row["cores"] == one_by_one(fan_in, 40, 1500)
            assert again["cores"] == one_by_one(fan_in, 1000, most)
            assert row["cores_shared"] == one_by_one_shared(channel, mine, 40, 1500)
            assert again["cores_shared"] == one_by_one_shared(channel, mine, 1000, most)
    total = found["total"]
    assert total["neurons"] == sum(len(parts[0]) for parts in matrices.values())
    assert total["synapses"] == sum(m.count_nonzero() for parts in matrices.values() for m in parts)
    busy = [layer for layer, row in rows.items() if row["sops"] > 0]
    assert len(busy) >= (1 if name == "sdsnn-small" else 0.5 * len(rows))
    assert found["busiest"] == max(rows, key=lambda layer: rows[layer]["sops"])


def one_by_one(fan_in, core_neurons, core_synapses):
    """Put neurons into cores, one after the other."""
    cores = [[]]
    for synapses in fan_in:
        if len(cores[-1]) == core_neurons or sum(cores[-1]) + synapses > core_synapses:
            cores.append([])
        cores[-1].append(synapses)
    return len(cores)


def one_by_one_shared(channel, kernels, core_neurons, core_synapses):
    cores = [[]]
    for mine in channel:
        stored = sum(kernels[c] for c in {*cores[-1], mine})
        if len(cores[-1]) == core_neurons or stored > core_synapses:
            cores.append([])
        cores[-1].append(mine)
    return len(cores)


def test_cores_by_hand():
    fan_in = torch.tensor([3, 3, 3, 9, 1, 0, 0])
    assert chip.cores(fan_in, 10, 9) == 3  # 3 3 3 | 9 | 1 0 0
    assert chip.cores(fan_in, 2, 9) == 5  # 3 3 | 3 | 9 | 1 0 | 0
    assert chip.cores(fan_in, 10, 8) is None
    kernels = torch.tensor([4, 5, 6])  # of 4 neurons each
    assert chip.cores_shared(kernels, 12, 100, 9) == 2  # 4 + 5 | 6
    assert chip.cores_shared(kernels, 12, 3, 9) == 5  # 4 | 4 5 | 5 | 6 | 6: 3 neurons each
    assert chip.cores_shared(kernels, 12, 3, 6) == 6
    assert chip.cores_shared(kernels, 12, 100, 5) is None


@pytest.mark.parametrize("name, size", [
    ("small", 12), ("small-avg", 12), ("small-avg", 9), ("vgg16-avg", 28)])
def test_windows_of_maps_with_an_odd_side(name, size):
    """3 pixels are pooled to 1, or 9 to 4: a window has 4 neurons all the same."""
    net = network(name, size=size, factor=0.04, pruned=0)
    found = chip.needs(net, some_images(net, 1))
    rows = {row["layer"]: row for row in found["layers"]}
    for row in rows.values():
        assert row["synapses"] == row["synapses_dense"]
        assert row["kind"] != "pool" or row["fan_in_max"] == row["fan_in_mean"] == 4
    if name.endswith("avg"):
        assert rows["fc"]["fan_in_max"] == 4 * net.fc.in_features
    assert rows["fc"]["fan_out_max"] == 3


@pytest.mark.parametrize("name", ["small", "small-avg", "resnet19", "resnet19-pre"])
def test_operations_are_those_of_the_summary(name):
    """But for poolings, identities and averages, which summary.json holds none of."""
    net = network(name, size=8, factor=0.03 if name.startswith("resnet") else 0.1)
    images = some_images(net, 70)  # more than run at a time
    counts = metrics.count(net, images.split(64), net.masks)
    rows = {row["layer"]: row for row in chip.needs(net, images)["layers"]}
    assert {layer: rows[layer]["sops"] for layer in counts["layer_sops"]} == pytest.approx(
        counts["layer_sops"])
    spikes = sum(row["spikes"] for row in rows.values()
                 if row["spikes"] is not None and row["kind"] != "pool")
    neurons = sum(row["neurons"] for row in rows.values()
                  if row["kind"] != "pool" and row["feeds"] != "output")
    assert spikes / neurons / net.time_steps == pytest.approx(counts["firing_rate"])
    assert sum(row["alive"] for row in rows.values()) == sum(
        layer["alive"] for layer in counts["layers"])


def test_neurons_behind_a_stream_are_those_that_fire():
    """A first block of a stage that is empty: what it adds to is of another size than what the
    block before adds to, and one LIF reads both; LIFs that read some channels of the stream."""
    torch.manual_seed(0)
    widths = [6, 4, 3, 8, *[5, 2, 8] * 2, 0, 0, 12, *[12, 3, 12] * 2, 7, 4, 10, 9, 4, 10, 6]
    net = models.build("resnet19-pre", 3, 1, 8, 2, widths)
    let_fire(net)
    images = some_images(net.eval())
    found, fired = chip.needs(net, images), spikes_of(net, images)
    del fired["input"]
    first = {}  # {LIF: the first row that feeds it}
    for row in found["layers"]:
        if row["feeds"] in first:
            assert (row["neurons"], row["spikes"]) == (0, None)
        first.setdefault(row["feeds"], row)
    assert first.pop("output")["neurons"] == 3 and first.keys() == fired.keys()
    for name, spikes in fired.items():  # [T, N, C, H, W]
        assert first[name]["neurons"] == spikes[0, 0].numel()
        assert first[name]["spikes"] == pytest.approx(float(spikes.sum()) / len(images))
    assert found["total"]["neurons"] == 3 + sum(s[0, 0].numel() for s in fired.values())
    cores = found["cores"]
    assert cores["without_sharing"] is cores["with_sharing"] is None and not cores["too_large"]


def test_a_report_is_written_and_read(tmp_path):
    net = network("small", size=28, factor=0.5)
    images = data.load("fashion-mini").x_test[:8]
    lines = chip.report(net.train(), images, tmp_path / "new" / "folder")
    assert net.training
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "report.png"}
    found = json.loads((folder / "report.json").read_text())
    text, printed = (folder / "report.md").read_text(), "\n".join(lines)
    assert found["images"] == 8 and found["cores"]["core_neurons"] == 1024
    for row in found["layers"]:
        assert f"| {row['layer']} | {row['reads']} |" in text
        assert re.search(rf"^{re.escape(row['layer'])} +{row['neurons']:,} +{row['synapses']:,} ",
                         printed, re.M)
    for said in (text, printed):
        assert "Loihi" in said and re.search(f"busiest layer:? +{found['busiest']}, ", said)
        assert f"{found['total']['bytes']['4']:,} at 4 bits, without addresses" in said
    assert "Davies et al. 2018" in text and "](report.png)" in text
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, lines[:2])) < 90 and max(map(len, lines[:-1])) < 105


def test_what_fits_no_core_and_what_has_none(tmp_path):
    net = network("small", size=8, factor=0.2, pruned=0)
    lines = chip.report(net, some_images(net), tmp_path, 100, 20)
    found = json.loads((tmp_path / "report.json").read_text())["cores"]
    assert found["without_sharing"] is found["with_sharing"] is None
    assert found["too_large"] == ["lifs.1", "lifs.2", "lifs.3"]  # the outputs read 13 neurons
    (line,) = [line for line in lines if "Give a larger --core-synapses" in line]
    assert "holds a neuron of lifs.1, lifs.2, lifs.3 with all" in line
    assert not any("Loihi" in line for line in lines)
    net = network("resnet19-pre", size=8, factor=0.03)
    lines = chip.report(net, some_images(net), tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())["cores"]
    assert found["without_sharing"] is None and found["too_large"] == []
    assert any(re.match("cores +not counted", line) for line in lines)
    macs = [line for line in lines if line.startswith("real numbers")]
    assert len(macs) == 4  # the pixels, and three shortcuts of the stream


def test_a_network_that_never_fires(tmp_path):
    net = models.build("small", 3, 1, 8, 2, [1, 1, 1, 1]).eval()
    for weight in map(net.get_parameter, models.scored_by(net)):
        weight.data.zero_()  # without masks: what is 0 is no synapse
    lines = chip.report(net, some_images(net), tmp_path)
    assert any(re.match("busiest layer +none, since no spike", line) for line in lines)
    assert json.loads((tmp_path / "report.json").read_text())["total"]["alive"] == 0


@pytest.mark.parametrize("sizes, said", [
    ((0, 5), "core_neurons is 0, expected a whole number of at least 1, such as 1024. Change "
             "--core-neurons"),
    ((5, -1), "core_synapses is -1, expected a whole number of at least 1, such as 1024. Change "
              "--core-synapses"),
    ((5.0, 5), "core_neurons is 5.0")])
def test_wrong_sizes_and_images_are_refused_before_a_file_is_written(sizes, said, tmp_path):
    net = network("small", size=8)
    with pytest.raises(ValueError, match=re.escape(said)):
        chip.report(net, some_images(net), tmp_path / "new", *sizes)
    with pytest.raises(ValueError, match="have shape"):
        chip.report(net, torch.zeros(2, 1, 9, 9, dtype=torch.uint8), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_picture_that_cannot_be_drawn_is_a_note(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(plots, "Figure", fail)
    net = network("small", size=8)
    (tmp_path / "report.png").write_bytes(b"of another network")
    lines = chip.report(net, some_images(net), tmp_path)
    assert "note: report.png could not be drawn (no font at all). report.json has its numbers" in lines
    assert lines[-1].endswith(f" report.json, report.md in {tmp_path}")
    assert not (tmp_path / "report.png").exists()
    assert "report.png" not in (tmp_path / "report.md").read_text()
