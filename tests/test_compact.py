"""Channels that need not be computed: which they are, that nothing changes without them,
compact.pt after a run, compact.py on a file."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import channels
import compact
import data
import metrics
import modelfile
import models
import prune_unstructured
import training
from helpers import NETS, assert_same_run, one_line, random_net, real_images, rng, stop_after
from masks import Masks

SHORT = ["--dataset", "mine.npz", "--epochs-prune", "2", "--epochs-finetune", "2",
         "--interval", "6", "--width", "0.25", "--batch-size", "25", "--sparsity", "0.96"]


@pytest.fixture(autouse=True)
def the_name_of_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_unstructured.py"])


def run(*given):
    """Run the script on a part of fashion-mini: 12 steps an epoch, few test images."""
    images = data.load("fashion-mini")
    np.savez("mine.npz", x_train=images.x_train[:300, 0], y_train=images.y_train[:300],
             x_test=images.x_test[:100, 0], y_test=images.y_test[:100])
    return prune_unstructured.main([*SHORT, *map(str, given)])


def masked_net(name, factor, seed=0, lost=0.3):
    """A random network that fires in all layers, and its masks: a share `lost` of the channels of
    each layer has no alive outgoing weight, another no alive incoming one; of the other weights
    half are alive. Of the constant currents some fire."""
    net, draw = random_net(name, factor, seed), rng(seed)
    masks = Masks(net)
    for mask in masks.alive.values():
        mask.copy_(torch.rand(mask.shape, generator=draw) < 0.5)
    for layer, group in models.removable(net).items():
        size = net.config["widths"][group.place]
        unread, unfed = (torch.rand(size, generator=draw) < lost for _ in range(2))
        unread[0] = unfed[0] = False
        masks.alive[f"{layer}.conv.weight"][unfed] = False
        readers = masks.alive[group.reader].unflatten(1, (size, -1))
        readers[:, unread] = False
    with torch.no_grad():
        for weight, mask in zip(masks.weights.values(), masks.alive.values()):
            weight.mul_(mask)
        norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for bn in norms:
            bn.momentum = 1.0
        net.train()(real_images(8, offset=100))  # BN's statistics: those of currents that vary
        for bn in norms:
            bn.momentum = 0.1
            constants = bn.running_var == 0  # BN's beta while training; below it in evaluation
            bn.running_mean[constants] = 0.5
            bn.running_var[constants] = 1
    return net.eval(), masks


def reached(net, alive):
    """Brute force, {layer: [C] numpy bool}: channels with a path of alive weights to a logit."""
    groups = models.removable(net)
    found = {}
    for layer in reversed(groups):
        group, owner = groups[layer], groups[layer].reader.removesuffix(".conv.weight")
        mask = alive[group.reader].numpy()
        found[layer] = np.zeros(net.config["widths"][group.place], dtype=bool)
        for out, column in zip(*np.nonzero(mask.reshape(*mask.shape[:2], -1).any(2))):
            if owner not in groups or found[owner][out]:
                found[layer][column // group.repeat] = True
    return found


def unfed(net, alive, layer):
    return ~alive[f"{layer}.conv.weight"].flatten(1).any(1)


def total(kept):
    return sum(int(keep.count_nonzero()) for keep in kept.values())


# ---- which channels ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name, factor", NETS)
def test_unread_channels_are_those_without_a_path_to_a_logit(name, factor, seed):
    net, masks = masked_net(name, factor, seed)
    kept = compact.drop_unread(net, masks.alive)
    brute = reached(net, masks.alive)
    assert list(kept) == list(models.removable(net))
    for layer, keep in kept.items():
        assert np.array_equal(keep.numpy(), brute[layer]), layer
    assert 0.4 < total(kept) / sum(len(keep) for keep in kept.values()) < 0.9


@pytest.mark.parametrize("name, factor", NETS)
def test_nothing_changes_without_the_unread(name, factor):
    """Forward in both modes, and each gradient of what is left."""
    net, masks = masked_net(name, factor)
    kept = compact.drop_unread(net, masks.alive)
    small, alive = compact.without(net, masks.alive, kept)
    images = real_images(8)
    with metrics.firing(small) as counts, torch.inference_mode():
        small(images)
    assert all(rate > 0 for rate in metrics.rates(counts)[1].values())  # silence agrees with all
    for mode in (False, True):
        found = channels.differences(net.train(mode), small.train(mode), kept, images)
        assert found["logits_differ_by"] <= 1e-10 and found["spikes_that_differ"] == 0
    for one in (net, small):
        training.loss_over_time(one(images), torch.arange(len(images)) % 10).backward()
    places = channels.kept_indices(net, kept)
    for weight, parameter in small.named_parameters():
        full = net.get_parameter(weight).grad
        assert (full[places[weight]] - parameter.grad).abs().max() <= 1e-10
        if weight not in alive:  # BN's and biases: no gradient at all in what is left out
            full[places[weight]] = 0
            assert full.abs().max() == 0
    for weight, mask in alive.items():
        assert torch.equal(mask, masks.alive[weight][places[weight]])


@pytest.mark.parametrize("name, factor", NETS)
def test_nothing_changes_without_the_silent_in_eval_mode(name, factor):
    net, masks = masked_net(name, factor)
    read, kept = compact.drop_unread(net, masks.alive), compact.needed(net, masks.alive)
    assert total(kept) < total(read) and all((kept[name] <= read[name]).all() for name in kept)
    small, alive = compact.without(net, masks.alive, kept)
    found = channels.differences(net, small, kept, real_images())
    assert found["logits_differ_by"] <= 1e-10 and found["spikes_that_differ"] == 0
    with metrics.firing(small) as counts, torch.inference_mode():
        small(real_images(8))
    assert all(rate > 0 for rate in metrics.rates(counts)[1].values())
    for layer in kept:  # some constants fire, and those channels are here
        current = compact.constant_current(net, layer)
        fires = unfed(net, masks.alive, layer) & (current >= 1) & read[layer]
        assert not (fires & ~compact.drop_silent(net, masks.alive, read)[layer]).any()
    assert any((unfed(net, masks.alive, layer) & kept[layer]).any() for layer in kept)
    assert all(keep.all() for keep in compact.needed(small, alive).values())  # no more to be found


@pytest.mark.parametrize("name, factor", NETS)
def test_a_channel_that_is_read_is_needed(name, factor):
    """Negative controls: without one more channel the function is another; and a channel whose
    constant is lifted above the threshold, or that is silent in eval mode only, is needed."""
    net, masks = masked_net(name, factor)
    kept, layer = compact.needed(net, masks.alive), list(models.removable(net))[2]

    def differ(kept, mode):
        small = channels.remove(net.train(mode), kept)
        found = channels.differences(net, small, kept, real_images(6))
        return found["logits_differ_by"] > 1e-3 or found["spikes_that_differ"] > 0

    assert not differ(kept, False)
    seen = []
    for channel in (kept[layer] & ~unfed(net, masks.alive, layer)).nonzero().flatten():
        fewer = kept | {layer: kept[layer].clone()}
        fewer[layer][channel] = False
        seen.append(differ(fewer, False))
    assert np.mean(seen) > 0.5  # some never fire on these images

    read = compact.drop_unread(net, masks.alive)
    assert not differ(read, True) and differ(kept, True)  # in training BN makes beta of 0
    gone = read[layer] & ~kept[layer]
    assert gone.any()
    net.eval().get_submodule(layer).bn.bias.data[gone] += 3
    assert differ(kept, False) and compact.needed(net, masks.alive)[layer][gone].all()


def small_net(*widths):
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4, list(widths)).eval()
    masks = Masks(net)
    for mask in masks.alive.values():
        mask.zero_()
    return net, masks.alive


def test_a_worked_chain():
    """Two paths through four layers: 0 -> 0 -> 0 -> 0 -> a logit, and 1 -> 1 -> 1 -> 1, which ends.
    A third, 2 -> 2 -> 2 -> 2 -> a logit, begins in a channel without input."""
    net, alive = small_net(3, 3, 3, 3)
    alive["convs.0.conv.weight"][:2, 0, 1, 1] = True
    for i in (1, 2, 3):
        alive[f"convs.{i}.conv.weight"][range(3), range(3), 1, 1] = True
    alive["fc.weight"][0, 0] = alive["fc.weight"][5, -1] = True
    first = [True, False, False]
    first_and_third = [True, False, True]

    def left(kept):
        return [keep.tolist() for keep in kept.values()]

    assert left(compact.drop_unread(net, alive)) == [first_and_third] * 4
    bn = net.convs[0].bn
    bn.bias.data[2] = 0.999  # the constant, where the running mean is 0: below the threshold
    assert left(compact.needed(net, alive)) == [first] * 4
    bn.bias.data[2] = 1.0  # on the threshold, which is reached
    assert left(compact.needed(net, alive)) == [first_and_third] * 4
    bn.bias.data[2], bn.running_mean[2], bn.running_var[2] = 1.5, 1.2, 4 - bn.eps
    assert torch.allclose(compact.constant_current(net, "convs.0"),
                          torch.tensor([0, 0, 1.5 - 1.2 / 2]))
    assert left(compact.needed(net, alive)) == [first] * 4

    bn.bias.data[2] = 9  # fires, but nothing reads it any more; what begins in layer 1 is silent
    alive["convs.1.conv.weight"][2, 2] = False
    assert left(compact.needed(net, alive)) == [first] * 4
    net.convs[1].bn.bias.data[2] = 1.2
    assert left(compact.needed(net, alive)) == [first] + [first_and_third] * 3
    # a neuron that is silent takes those with it that only it reads
    net.convs[1].bn.bias.data[2] = 0
    alive["convs.1.conv.weight"][0, 1] = alive["convs.2.conv.weight"][0, 2] = True
    assert left(compact.needed(net, alive)) == [[True, True, False]] + [first] * 3


def test_a_layer_keeps_a_channel():
    net, alive = small_net(2, 3, 4, 5)
    alive["convs.1.conv.weight"][:2] = True  # channel 2 needs nothing
    alive["convs.2.conv.weight"][[0, 1, 3]] = True
    alive["fc.weight"][3, -1] = True  # reads the last channel of convs.3, which nothing feeds
    for kept in (compact.drop_unread(net, alive), compact.needed(net, alive)):
        assert [keep.nonzero().flatten().tolist() for keep in kept.values()] == [[0], [2], [2], [4]]
        small, _ = compact.without(net, alive, kept)
        assert small.config["widths"] == [1, 1, 1, 1]
    net = random_net("small", 0.5)
    assert total(compact.needed(net, Masks(net).alive)) == sum(net.config["widths"])


# ---- after a run ---------------------------------------------------------------------------------


def test_a_run_leaves_the_smaller_network(capsys):
    summary = run("--run-dir", "r")
    text = capsys.readouterr().out
    assert {path.name for path in Path("r").iterdir()} == {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt", "compact.pt",
        "summary.json", "curves.png"}
    assert summary["speedup_batch1"] > 0 and summary["speedup_batch32"] > 0
    packed = modelfile.read("r/model.pt")
    net, small = models.load("r/model.pt"), models.load("r/compact.pt")
    assert net.config["widths"] == summary["widths"]
    kept = compact.needed(net, packed["masks"])
    assert small.config["widths"] == channels.kept_widths(net, kept)
    images = real_images(64)
    found = channels.differences(net.double(), small.double(), kept, images)
    assert found["logits_differ_by"] <= 1e-10 and found["spikes_that_differ"] == 0
    counts = metrics.count(small, [images], modelfile.read("r/compact.pt")["masks"])
    before = metrics.count(net, [images], packed["masks"])
    assert f"MACs a step {before['macs']:,} -> {counts['macs']:,} " in text
    assert text.count(f"compact.pt: channels 44 -> {total(kept)}, ") == 1
    assert counts["sops"] < before["sops"] and counts["macs"] < before["macs"]


def test_a_run_that_was_stopped_leaves_the_same(monkeypatch):
    run("--run-dir", "whole")
    stop_after(30, monkeypatch, run, "--run-dir", "r")
    run("--resume", "--run-dir", "r")
    assert_same_run("whole", "r")
    a, b = (modelfile.read(Path(folder, "compact.pt"))["state_dict"] for folder in ("whole", "r"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_nothing_to_leave_out(capsys):
    for sparsity in (0, 0.1):
        summary = run("--sparsity", sparsity, "--run-dir", "r", "--overwrite")
        assert summary["speedup_batch1"] is summary["speedup_batch32"] is None
        assert not Path("r/compact.pt").exists()
    assert "no channel can be left out" in capsys.readouterr().out


def test_a_compact_file_of_an_older_run_goes():
    run("--run-dir", "r")
    assert Path("r/compact.pt").exists()
    run("--sparsity", 0.1, "--run-dir", "r", "--overwrite")
    assert not Path("r/compact.pt").exists()


# ---- compact.py ----------------------------------------------------------------------------------


@pytest.fixture
def as_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compact.py"])


def write_masked(path, name="small", factor=0.5):
    net, masks = masked_net(name, factor)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(modelfile.pack(net.float(), masks.alive), path)
    return net, masks


@pytest.mark.parametrize("given, written", [
    (["runs/a/model.pt"], "runs/a/compact.pt"), (["runs/a/model.pt", "--out", "b.pt"], "b.pt")])
@pytest.mark.parametrize("name, factor", NETS)
def test_the_script_writes_the_same_function(name, factor, given, written, as_typed, capsys):
    net, masks = write_masked("runs/a/model.pt", name, factor)
    compact.main(given)
    assert {path for path in Path().rglob("*.pt")} == {Path("runs/a/model.pt"), Path(written)}
    small, kept = models.load(written), compact.needed(net, masks.alive)
    widths = channels.kept_widths(net, kept)
    assert small.config["widths"] == widths
    assert total(kept) < total(compact.drop_unread(net, masks.alive))  # the silent are gone too
    found = channels.differences(net.double(), small.double(), kept, real_images())
    assert found["logits_differ_by"] <= 1e-10 and found["spikes_that_differ"] == 0
    alive = modelfile.read(written)["masks"]
    assert all((small.get_parameter(weight)[~mask] == 0).all() for weight, mask in alive.items())
    assert sum(int(mask.sum()) for mask in alive.values()) < masks.n_alive
    text = capsys.readouterr().out
    everybody = sum(len(keep) for keep in kept.values())
    assert f"{written}: channels {everybody} -> {total(kept)}, MACs a step " in text
    assert "times as fast at batch 1, " in text and "at batch 32\n" in text


def test_the_script_has_nothing_to_leave_out(as_typed, capsys):
    torch.save(modelfile.pack(random_net("small", 0.5, dtype=torch.float32)), "model.pt")
    compact.main(["model.pt"])  # no SystemExit: exit code 0
    assert capsys.readouterr().out == (
        "model.pt: no channel can be left out: alive weights read each one, and each may fire. "
        "Nothing is written\n")
    assert [path.name for path in Path().iterdir()] == ["model.pt"]


@pytest.mark.parametrize("given, words", [
    (["absent.pt"], "there is no file absent.pt, expected the model.pt of a run"),
    (["damaged.pt"], "damaged.pt cannot be read"), (["text.pt"], "text.pt cannot be read"),
    (["model.pt", "--out", "no/such/folder.pt"], "no/such/folder.pt cannot be written"),
    (["model.pt", "--out", "model.pt"], "model.pt is the file that is read, expected another"),
    ([], "the following arguments are required: MODEL.pt")])
def test_the_script_refuses_in_one_line(given, words, as_typed, capsys):
    write_masked("model.pt")
    content = Path("model.pt").read_bytes()
    Path("damaged.pt").write_bytes(content[:-500])
    Path("text.pt").write_text("no network")
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        compact.main(given)
    assert stop.value.code == 2 and words in one_line(capsys)
    assert sorted(Path().rglob("*")) == before and Path("model.pt").read_bytes() == content
