"""UPR: worked examples, plain loops, connections counted by hand, exact counts, masks of neurons
in saved networks, and the script end to end."""
import copy
import json
import math
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import compact
import data
import export
import metrics
import modelfile
import models
import plans
import prune_unstructured
import prune_upr
import training
from harness import records, runfolder
from helpers import assert_same_run, lines, random_net, refused, save_half_images, stop_after
from masks import Masks, seeded
from prune_upr import SoftMasks, connections, default_price, fix_masks, prices, slope

SHORT = ["--dataset", "mine.npz", "--epochs-prune", "2", "--epochs-finetune", "1",
         "--width", "0.25", "--time-steps", "2", "--batch-size", "10"]  # 16 steps an epoch
FAST = ["--mask-lr", "0.05", "--price", "1e-6"]  # masks that become 0 or 1 within 32 steps


@pytest.fixture(autouse=True)
def the_script_and_its_images(monkeypatch, in_a_folder_of_its_own):
    monkeypatch.setattr(sys, "argv", ["prune_upr.py"])
    save_half_images()


def run(*given, short=True):
    return prune_upr.main([*(SHORT if short else []), *map(str, given)])


def soft_of(monkeypatch, w, cost=1.0):
    """Soft masks of one layer of weights w, each of this cost."""
    weights = {"0": nn.Parameter(torch.tensor(w, dtype=torch.float32))}
    monkeypatch.setattr(prune_upr, "prices", lambda net: ({"0": cost}, {}))
    return SoftMasks(None, Namespace(weights=weights, sizes=[len(w)], device=torch.device("cpu")))


def small_net(size=8, widths=(3, 4, 5, 4), name="small"):
    torch.manual_seed(0)
    return models.build(name, 3, 1, size, 2, list(widths))


# ---- the rule ------------------------------------------------------------------------------------


def test_the_slope():
    assert [slope(k, 100) for k in (0, 25, 50, 75, 100)] == pytest.approx(
        [5, 18.803015, 70.710678, 265.914795, 1000], rel=1e-7)
    assert slope(0, 7) == 5 and slope(7, 7) == 1000


@pytest.mark.parametrize("alpha, beta, g, by_w, by_alpha", [
    (0, 5, 0.3, 0.15, 0.0875), (0, 5, -0.3, -0.15, -0.0625), (0, 5, -0.05, -0.025, 0),
    (0, 5, -0.02, -0.01, 0.0075), (0.01, 100, -0.3, -0.2193176, -0.9830597),
    (0.01, 1000, -0.3, -0.2999864, -0.0022698)])
def test_worked_gradients(alpha, beta, g, by_w, by_alpha, monkeypatch):
    soft = soft_of(monkeypatch, [0.2])
    soft.alpha.data.fill_(alpha)
    soft.beta = beta
    soft.weights[0].grad = torch.tensor([g])
    soft.gradients(0.01)
    assert soft.weights[0].grad.item() == pytest.approx(by_w, abs=1e-7)
    assert soft.alpha.grad.item() == pytest.approx(by_alpha, abs=5e-6)


@pytest.mark.parametrize("g, ws, alphas", [
    (-0.3, [0.215, 0.2449061, 0.2955529], [0.0100000, 0.0188265, 0.0271190]),
    (-0.02, [0.201, 0.2028063, 0.2048475], [-0.0100000, -0.0189266, -0.0274780])])
def test_worked_steps(g, ws, alphas, monkeypatch):
    """In the order of a search: both gradients, the masks, the weights, then beta."""
    soft = soft_of(monkeypatch, [0.2])
    weight = soft.weights[0]
    sgd, adam = torch.optim.SGD([weight], 0.1, 0.9), torch.optim.Adam([soft.alpha], 1e-2)
    soft.write()
    for k in range(3):
        assert weight.item() == pytest.approx(
            soft.w.item() / (1 + math.exp(-soft.beta * soft.alpha.item())))
        weight.grad = torch.tensor([g])
        soft.gradients(0.01)
        adam.step()
        soft.put_weights()
        sgd.step()
        soft.take_weights()
        soft.beta = slope(k + 1, 4)
        soft.write()
        assert soft.w.item() == pytest.approx(ws[k], abs=1e-7)
        assert soft.alpha.item() == pytest.approx(alphas[k], abs=1e-7)


@pytest.mark.parametrize("name, size", [("small", 8), ("resnet19", 16)])
def test_both_gradients_are_those_of_autograd(name, size):
    """Of J, whose sum over the masks is written out here."""
    torch.manual_seed(0)
    factor = 0.5 if name == "small" else 0.05
    net = models.build(name, 3, 1, size, 2, models.default_widths(name, factor)).double()
    soft = SoftMasks(net, masks := Masks(net), with_neurons=True)
    soft.alpha = nn.Parameter(0.1 * torch.randn(len(soft.alpha), dtype=torch.float64))
    soft.cost, soft.w, soft.beta, price = soft.cost.double(), soft.w.double(), 7.0, 1e-4
    w = {name: weight.detach().clone().requires_grad_() for name, weight in masks.weights.items()}
    alpha = soft.alpha.detach().clone().requires_grad_()
    x, y = torch.rand(6, 1, size, size, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])

    soft.write()
    nn.functional.cross_entropy(net(x).mean(0), y).backward()
    soft.gradients(price)

    sigma = torch.sigmoid(7.0 * alpha)
    parts = sigma.split(soft.lengths)
    inside = {name: w[name] * part.view(w[name].shape) for name, part in zip(w, parts)}
    of_lifs = {f"{name}.mask": part.view(lif.mask.shape) for (name, lif), part in zip(
        soft.neurons.items(), parts[len(w):])}
    loss = nn.functional.cross_entropy(torch.func.functional_call(
        net, inside | of_lifs, (x,)).mean(0), y)
    c, cn = prices(net)
    for cost, part in zip([*c.values(), *(cost for cost, _ in cn.values())], parts, strict=True):
        loss = loss + price * cost * part.sum()
    loss.backward()
    assert torch.allclose(soft.alpha.grad, alpha.grad, rtol=1e-9, atol=1e-12)
    assert all(torch.allclose(masks.weights[name].grad, w[name].grad, rtol=1e-9) for name in w)
    assert (alpha.grad[len(soft.w):] != 0).any()  # neurons have gradients by the loss


# ---- the prices ----------------------------------------------------------------------------------


def of(name, size, **more):
    config = dict(num_classes=10, in_channels=1 if size == 28 else 3, image_size=size) | more
    with torch.device("meta"):
        net = models.build(name, time_steps=2, **config)
    c, cn = prices(net)
    return list(c.values()), [cost for cost, _ in cn.values()], cn, net


def test_prices_of_the_networks():
    c, cn, _, _ = of("small", 28)
    assert c == [784, 196, 49, 49, 1] and cn == [576, 576, 10]
    c, cn, _, _ = of("vgg16", 32)
    assert c == [1024] * 2 + [256] * 2 + [64] * 3 + [16] * 3 + [4] * 3 + [1]
    assert cn == [1152] * 2 + [2304] * 3 + [4608] * 6 + [10]
    _, _, by_lif, net = of("gradr-conv", 32)
    assert sum(math.prod(shape) for _, shape in by_lif.values()) == 720_896
    assert sum(net.get_parameter(name).numel() for name in models.scored_by(net)) == 36_715_264
    assert list(by_lif) == [f"lifs.{i}" for i in range(1, 6)]  # not the first, nor of linear layers


def test_prices_of_networks_with_shortcuts():
    _, _, cn, net = of("resnet19", 32)
    assert cn["blocks.2.lif2"] == ((256 * 9 + 256) / 4, (128, 16, 16))  # conv1, shortcut: 640
    assert cn["blocks.0.lif1"][0] == cn["blocks.0.lif2"][0] == 128 * 9  # the identity is free
    assert cn["blocks.7.lif2"][0] == 256  # by the average, fc1
    assert "lif" not in cn and "lif_fc" not in cn and len(cn) == 16
    c = prices(net)[0]
    assert c["stem.conv.weight"] == 1024 and c["blocks.3.conv1.conv.weight"] == 16 * 16 / 4
    assert c["blocks.3.shortcut.conv.weight"] == 64 and c["fc1.weight"] == 1
    _, _, cn, _ = of("resnet19-pre", 32)
    assert list(cn)[0] == "blocks.0.lif2"  # the first LIF is behind the stem
    assert cn["blocks.3.lif1"][0] == 256 * 9 / 4  # its 1x1 shortcut reads the stream
    assert cn["lif"][0] == 10


def test_a_network_with_one_map_of_neurons_has_no_masks_of_any(monkeypatch):
    monkeypatch.setitem(plans.NETWORKS, "one", plans.Plan([2, "F", 3]))
    assert prices(models.build("one", 2, 1, 8, 2))[1] == {}


# ---- from soft to fixed --------------------------------------------------------------------------


def test_the_largest_alpha_stay_and_ties_go_by_size(monkeypatch):
    net = small_net()
    masks = Masks(net)
    soft = SoftMasks(net, masks)
    torch.manual_seed(1)
    soft.alpha.data.copy_(torch.randn(masks.total))
    soft.alpha.data[100:160] = 0.7  # a tie at the edge
    keep = int((soft.of_weights > 0.7).sum()) + 20
    order = sorted(range(masks.total), key=lambda i: (-soft.of_weights[i].item(),
                                                      -abs(soft.w[i].item())))
    change = fix_masks(keep, masks, soft, seeded(0))
    assert masks.flat.nonzero().flatten().tolist() == sorted(order[:keep])
    assert change.pruned.sum() == masks.total - keep and not change.regenerated.any()


def test_the_published_threshold_is_strict(monkeypatch):
    net = small_net()
    masks = Masks(net)
    soft = SoftMasks(net, masks)
    soft.alpha.data[::3] = 0.1
    soft.alpha.data[1::3] = -0.1  # and a third has not moved from 0
    fix_masks(None, masks, soft, seeded(0))
    assert torch.equal(masks.flat, soft.of_weights > 0)


def test_no_layer_and_no_map_ends_empty():
    net = small_net()
    masks = Masks(net)
    soft = SoftMasks(net, masks, with_neurons=True)
    soft.alpha.data.uniform_(0.1, 1)
    soft.alpha.data[:masks.sizes[0]] -= 2
    start = masks.total + soft.lengths[len(masks.sizes)]
    soft.alpha.data[start:start + soft.lengths[len(masks.sizes) + 1]] -= 2
    change = fix_masks(None, masks, soft, seeded(0))
    assert change.rescued == ["convs.0.conv.weight"]
    first = soft.of_weights[:masks.sizes[0]]
    assert masks.flat[:masks.sizes[0]].nonzero().item() == first.argmax()
    assert soft.fix_neurons() == ["lifs.2"]
    found = models.neuron_masks(net)
    assert found["lifs.2"].sum() == 1 and found["lifs.1"].all() and found["lifs.3"].all()
    assert not any(mask.requires_grad for mask in found.values())


# ---- connections ---------------------------------------------------------------------------------


def everything(net):
    return {name: torch.ones_like(net.get_parameter(name), dtype=torch.bool)
            for name in models.scored_by(net)}


def test_worked_connections(monkeypatch):
    """Maps of 2 x 2, kernels of ones with padding 1; the classifier reads 4 places."""
    monkeypatch.setitem(plans.NETWORKS, "tiny", plans.Plan([1, 1]))
    net = models.build("tiny", 1, 1, 2, 3)
    alive = everything(net)
    assert connections(net, alive) == 16 + 16 + 4
    alive["convs.0.conv.weight"][0, 0, 1, 1] = False
    assert connections(net, alive) == 12 + 16 + 4
    mask = torch.ones(1, 2, 2)
    mask[0, 0, 0] = 0
    models.mask_neurons(net, {"lifs.0": mask})
    assert connections(net, alive) == 9 + 12 + 4


def test_connections_of_the_published_network():
    with torch.no_grad():
        net = models.build("gradr-conv", 10, 3, 32, 8)
        assert connections(net, everything(net)) == 1_614_720_000


def by_hand(net, alive, neurons, side):
    """Connections of a network like `small`, place by place."""
    places, total = np.ones((1, side, side), bool), 0
    for i, (conv, pooled) in enumerate(zip(net.convs, net.pooled)):
        mask = alive[f"convs.{i}.conv.weight"].numpy()
        size = places.shape[1]
        after = np.zeros((len(mask), size, size), bool)
        for c, y, x in np.ndindex(after.shape):
            met = 0
            for d, dy, dx in np.ndindex(mask.shape[1:]):
                row, column = y + dy - 1, x + dx - 1
                if 0 <= row < size and 0 <= column < size:
                    met += int(mask[c, d, dy, dx] and places[d, row, column])
            is_alive = f"lifs.{i}" not in neurons or neurons[f"lifs.{i}"][c, y, x] == 1
            after[c, y, x] = met > 0 and is_alive
            total += met * is_alive
        places = after
        if pooled:
            half = size // 2
            places = after[:, :2 * half, :2 * half].reshape(-1, half, 2, half, 2).any((2, 4))
    return total + int((alive["fc.weight"].numpy() & places.reshape(1, -1)).sum())


@pytest.mark.parametrize("name", ["small", "small-avg"])
def test_connections_equal_a_plain_loop(name):
    torch.manual_seed(3)
    net = models.build(name, 3, 1, 11, 2, [2, 3, 3, 3])
    alive = {name: torch.rand(mask.shape) < 0.15 for name, mask in everything(net).items()}
    neurons = {name: (torch.rand(shape) < 0.7).float()
               for name, (_, shape) in prices(net)[1].items()}
    without = connections(net, alive)
    assert without == by_hand(net, alive, {}, 11)
    models.mask_neurons(net, neurons)
    found = connections(net, alive)
    assert found == by_hand(net, alive, neurons, 11) and 0 < found < without


def test_connections_of_residual_networks():
    """The block's sum enters one neuron: a dead one has no connection from either side."""
    for name in ("resnet19", "resnet19-pre"):
        net = models.build(name, 3, 1, 16, 2, models.default_widths(name, 0.03))
        assert connections(net, everything(net)) > 0
    net = models.build("resnet19", 3, 1, 16, 2, models.default_widths("resnet19", 0.03))
    name, (_, shape) = [*prices(net)[1].items()][-1]  # what fc1 reads
    before = connections(net, everything(net))
    models.mask_neurons(net, {name: torch.zeros(shape)})
    gone = before - connections(net, everything(net))
    into = net.blocks[7].conv2.conv.weight[0, :, 1, 1].numel() * shape[0] * 4  # 2 x 2, 3x3 kernels
    # the two linear layers read only dead places: fc1's neurons have none, and so fc2
    behind = net.fc1.weight.numel() + net.fc2.weight.numel()
    assert shape[1:] == (2, 2) and gone == into * 4 + behind


# ---- masks of neurons in a network ---------------------------------------------------------------


def masked_net():
    net = random_net("small", 0.5)
    torch.manual_seed(1)
    masks = {name: (torch.rand(shape) < 0.6).double()
             for name, (_, shape) in prices(net)[1].items()}
    models.mask_neurons(net, masks)
    return net, masks


def test_a_saved_network_has_its_masks_of_neurons():
    net, masks = masked_net()
    torch.save(modelfile.pack(net.float()), "m.pt")
    loaded, images = models.load("m.pt"), data.load("mine.npz")
    x = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(loaded(x), net(x)) and models.neuron_masks(loaded).keys() == masks.keys()
    for other in (copy.deepcopy(loaded), copy.deepcopy(loaded).double().float()):
        assert torch.equal(other(x), net(x))
    spikes = {}
    with metrics.hooks(models.lifs(loaded), after=spikes.__setitem__):
        loaded(x)
    for name, mask in masks.items():
        assert spikes[name].sum() > 0 and not (spikes[name] * (mask == 0)).any()
    plain = models.build(**net.config).eval()
    state = {k: v for k, v in net.state_dict().items() if not k.endswith(".mask")}
    plain.load_state_dict(state)
    assert not torch.equal(plain(x), net(x))
    counted, dense = (metrics.count(one, [x]) for one in (loaded, plain))
    assert counted["sops"] < dense["sops"] and counted["firing_rate"] < dense["firing_rate"]
    # masks of ones, and masking again, change nothing
    for _ in range(2):
        models.mask_neurons(plain, {name: torch.ones_like(mask) for name, mask in masks.items()})
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(x), net(x)) and len(images.x_test)


@pytest.mark.parametrize("change, words", [
    (lambda s: s["lifs.1.mask"].mul_(0.5), "mask of lifs.1 is not binary"),
    (lambda s: s.update({"convs.0.mask": s["lifs.1.mask"]}), "does not hold the tensors"),
    (lambda s: s.update({"lifs.9.mask": s["lifs.1.mask"]}), "does not hold the tensors")])
def test_damaged_masks_of_neurons_are_refused(change, words):
    packed = modelfile.pack(masked_net()[0].float())
    change(packed["state_dict"])
    torch.save(packed, "m.pt")
    with pytest.raises(ValueError, match=words):
        models.load("m.pt")


def test_what_cannot_keep_them_says_so(capsys, monkeypatch):
    net = masked_net()[0].float()
    small, _, why = compact.make(net, everything(net))
    assert small is None and "masked one by one" in why
    torch.save(modelfile.pack(net), "m.pt")
    error = refused(capsys, export.main, ["m.pt"])
    assert "m.pt has neurons that are masked one by one" in error
    given = ["--init", "m.pt", "--width", "0.5", "--dataset", "fashion-mini"]
    error = refused(capsys, prune_unstructured.main, given)
    assert "masked one by one" in error and not Path("runs").exists()
    masks = everything(net)
    masks["fc.weight"][0] = False  # pruned too: no other script goes on from it either
    with torch.no_grad():
        net.fc.weight[0] = 0
    torch.save(modelfile.pack(net, masks), "m.pt")
    assert "masked one by one" in refused(capsys, run, *given)


# ---- the script ----------------------------------------------------------------------------------


def test_a_run_and_its_folder(capsys):
    summary = run("--run-dir", "r", "--sparsity", 0.8, *FAST)
    assert {path.name for path in Path("r").iterdir()} >= {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt",
        "summary.json", "curves.png"}
    assert list(summary) == runfolder.SUMMARY_KEYS
    assert (summary["script"], summary["method"]) == ("prune_upr", "upr")
    total = sum(layer["weights"] for layer in summary["layers"])
    keep = total - round(0.8 * total)
    assert sum(layer["alive"] for layer in summary["layers"]) == keep
    rows, (update,) = lines("r", "metrics"), lines("r", "updates")
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("prune", 1), ("prune", 2), ("finetune", 3)]
    assert [row["sparsity"] for row in rows] == [0, 1 - keep / total, 1 - keep / total]
    assert (update["iteration"], update["target"], update["neurons"]) == (32, 0.8, 0)
    assert update["pruned"] == total - keep and update["regenerated"] == 0
    assert summary["training_cost"] == pytest.approx((2 + keep / total) / 3)  # the search is dense
    net, masks = models.load("r/model.pt"), modelfile.read("r/model.pt")["masks"]
    assert all(net.get_parameter(name)[~mask].count_nonzero() == 0 for name, mask in masks.items())
    assert connections(net, masks) == update["connections"] < update["connections_dense"]
    soft = torch.load("r/checkpoint.pt", weights_only=True)["parts"]["soft"]
    found = int((soft["alpha"] > 0).sum())
    out = capsys.readouterr().out
    assert f"{found:,} masks of weights above 0, {keep:,} are asked for" in out
    still = 100 * (soft["alpha"].abs() < 0.005).double().mean()
    assert f"; {still:.1f} % of all are still soft" in out
    assert soft["beta"] == pytest.approx(1000)


def test_a_run_with_masks_of_neurons(capsys):
    summary = run("--run-dir", "r", "--neurons", "--sparsity", 0.7, *FAST)
    assert summary["method"] == "upr-neurons"
    assert summary["sparsity"] == pytest.approx(0.7, abs=1e-3)
    (update,) = lines("r", "updates")
    net = models.load("r/model.pt")
    found = models.neuron_masks(net)
    n_alive = sum(int(mask.sum()) for mask in found.values())
    assert update["neurons"] == sum(mask.numel() for mask in found.values())
    assert 0 < update["neurons_alive"] == n_alive < update["neurons"]
    soft = torch.load("r/checkpoint.pt", weights_only=True)["parts"]["soft"]
    flat = torch.cat([mask.flatten() for mask in found.values()])
    assert torch.equal(flat == 1, soft["alpha"][-len(flat):] > 0)
    assert connections(net, modelfile.read("r/model.pt")["masks"]) == update["connections"]
    images = data.load("mine.npz")
    accuracy = (net(images.x_test).sum(0).argmax(1) == images.y_test).double().mean()
    assert summary["test_accuracy"] == pytest.approx(float(accuracy))
    assert f"{n_alive:,} of {update['neurons']:,} masked neurons alive" in capsys.readouterr().out
    assert not Path("r/compact.pt").exists()


def test_the_published_threshold(capsys):
    given = ("--mode", "paper", "--neurons", "--epochs-finetune", 0, *FAST)
    run("--run-dir", "a", *given)
    out = capsys.readouterr().out
    # by its default price: the command that is read from its folder gives it
    asked = ["--run-dir", "c", "--mode", "paper", "--sparsity", 0.6, "--epochs-finetune", 0,
             "--mask-lr", 0.05]
    run(*asked)
    for folder, sparsity in (("a", 0.9), ("c", 0.6)):
        words = shlex.split(records.command_of(records.read_run(Path(folder))))
        args = prune_upr.parse_args(words[2:])
        assert args.price is not None and args.sparsity == sparsity
    run(*asked, "--resume")
    assert "Nothing is left to do" in capsys.readouterr().out
    soft = torch.load("a/checkpoint.pt", weights_only=True)["parts"]["soft"]
    masks = modelfile.read("a/model.pt")["masks"]
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    assert torch.equal(flat, soft["alpha"][:len(flat)] > 0)
    (update,) = lines("a", "updates")
    assert update["target"] is None
    found = sum(layer["alive"] for layer in update["layers"])
    assert f"the search ended with {found:,} masks of weights above 0; " in out
    assert "asked for" not in out and "note: the price" not in out  # one is given


def test_a_default_price_on_other_data_is_said_once(monkeypatch, capsys):
    words = "is that of short runs on the embedded data"
    stop_after(9, monkeypatch, run, "--run-dir", "r")
    assert capsys.readouterr().out.count(words) == 1
    run("--run-dir", "r", "--resume", short=False)
    run("--smoke", short=False)  # on the embedded data
    assert words not in capsys.readouterr().out


def test_a_map_that_would_lose_all_neurons_is_said_to(monkeypatch, capsys):
    """Their masks fall, whatever the price: only neurons of the map of lifs.2 cost anything."""
    monkeypatch.setattr(prune_upr, "prices", lambda net, real=prices: (
        real(net)[0], {name: (1e9 * (name == "lifs.2"), shape)
                       for name, (_, shape) in real(net)[1].items()}))
    run("--run-dir", "r", "--neurons", "--epochs-finetune", 0, *FAST)
    out = capsys.readouterr().out
    assert "note: lifs.2 would have lost all neurons; the one with the largest alpha is kept" in out
    assert "lifs.2 would have lost all weights" not in out
    masks = models.neuron_masks(models.load("r/model.pt"))
    assert masks["lifs.2"].sum() == 1 and masks["lifs.1"].sum() > 1


@pytest.mark.parametrize("with_neurons", [False, True])
def test_a_run_written_separately(with_neurons):
    """A plain version of the search and the fine-tuning, layer by layer, with its own hooks."""
    price, last = 1e-6, 32
    run("--run-dir", "r", "--sparsity", 0.7, *FAST, *(["--neurons"] if with_neurons else []))
    images = data.load("mine.npz")
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 14, 2, [4, 8, 16, 16]).to(memory_format=torch.channels_last)
    net.set_normalisation(images.mean, images.std)
    weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    c = dict(zip(weights, [196, 49, 9, 9, 1]))
    cn = {"lifs.1": 144, "lifs.2": 144, "lifs.3": 10} if with_neurons else {}
    shapes = {"lifs.1": (8, 7, 7), "lifs.2": (16, 3, 3), "lifs.3": (16, 3, 3)}
    m = {name: torch.ones(shapes[name], requires_grad=True) for name in cn}
    for name in cn:
        net.get_submodule(name).register_forward_hook(
            lambda _, __, spikes, name=name: spikes * m[name])
    alpha = {n: torch.zeros(w.shape) for n, w in weights.items()} | {
        n: torch.zeros(shapes[n]) for n in cn}
    w = {n: p.detach().clone() for n, p in weights.items()}
    u, v = ({n: torch.zeros_like(a) for n, a in alpha.items()} for _ in range(2))
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4)
    t = 0
    for epoch in range(3):
        for x, y in data.batches(images.x_train, images.y_train, 10, 0, epoch, flip=True):
            step, steps = (t, last) if epoch < 2 else (t - last, 16)
            fall = (1 + math.cos(math.pi * step / steps)) / 2
            sgd.param_groups[0]["lr"] = 0.1 * fall
            beta = 5 * 200 ** (t / last)
            if epoch < 2:
                sigma = {n: torch.sigmoid(beta * a) for n, a in alpha.items()}
                for n, p in weights.items():
                    p.data.copy_(w[n] * sigma[n])
                for n in cn:
                    m[n].data.copy_(sigma[n])
            loss = nn.functional.cross_entropy(net(x).reshape(-1, 10), torch.cat([y] * 2))
            net.zero_grad()
            loss.backward()
            t += 1
            if epoch < 2:
                for n, a in alpha.items():
                    by_sigma = weights[n].grad * w[n] if n in w else m[n].grad
                    g = (by_sigma + price * torch.tensor(float((c | cn)[n]))
                         ) * beta * sigma[n] * (1 - sigma[n])
                    u[n] = u[n].lerp(g, 1 - 0.9)  # in the roundings of torch's Adam
                    v[n] = (0.999 * v[n]).addcmul(g, g, value=1 - 0.999)
                    root = v[n].sqrt() / math.sqrt(1 - 0.999 ** t) + 1e-8
                    alpha[n] = a.addcdiv(u[n], root, value=-(0.05 * fall) / (1 - 0.9 ** t))
                for n in cn:
                    m[n].grad = None
                for n, p in weights.items():
                    p.grad.mul_(sigma[n])
                    p.data.copy_(w[n])
            sgd.step()
            if epoch < 2:
                w = {n: p.detach().clone() for n, p in weights.items()}
            if t == last:
                flat = torch.cat([alpha[n].flatten() for n in weights])
                edge = flat.sort(descending=True).values[len(flat) - round(0.7 * len(flat)) - 1]
                alive = {n: alpha[n] >= edge for n in weights}
                assert all(mask.any() for mask in alive.values())
                for n in cn:
                    m[n] = (alpha[n] > 0).float()
            if t >= last:
                for n, p in weights.items():
                    p.data.mul_(alive[n])
                    sgd.state[p]["momentum_buffer"].mul_(alive[n])
    packed = modelfile.read("r/model.pt")
    assert all(torch.equal(packed["masks"][name], alive[name]) for name in alive)
    assert all(torch.equal(packed["state_dict"][f"{name}.mask"], m[name]) for name in cn)
    for name, tensor in net.state_dict().items():  # a vector and parts of it round differently
        assert torch.allclose(packed["state_dict"][name], tensor, rtol=1e-3, atol=1e-4), name
    soft = torch.load("r/checkpoint.pt", weights_only=True)["parts"]["soft"]
    for key, parts in (("alpha", alpha), ("w", w)):
        whole = torch.cat([part.flatten() for part in parts.values()])
        assert torch.allclose(soft[key], whole, atol=1e-5)


def test_without_price_and_with_hard_masks_it_is_plain_training(monkeypatch):
    monkeypatch.setattr(SoftMasks, "sigma", property(lambda self: torch.ones_like(self.cost)))
    run("--run-dir", "upr", "--price", 0)
    prune_unstructured.main([*SHORT, "--sparsity", "0", "--run-dir", "plain"])
    for one, other in zip(lines("upr", "metrics")[:2], lines("plain", "metrics")):
        assert (one["train_loss"], one["train_accuracy"]) == (
            other["train_loss"], other["train_accuracy"])
    assert lines("upr", "metrics")[0]["test_loss"] == lines("plain", "metrics")[0]["test_loss"]


@pytest.mark.parametrize("given, step", [  # in the search, at its end, in fine-tuning
    ([], 9), (["--neurons"], 9), (["--neurons"], 32), ([], 40), (["--neurons"], 40)])
def test_a_stopped_run_goes_on_bit_by_bit(given, step, monkeypatch, once):
    given = [*given, *FAST]
    stop_after(step, monkeypatch, run, "--run-dir", "r", *given)
    run("--run-dir", "r", "--resume", short=False)  # all flags come from its config.json
    assert_same_run(once(run, *given), "r")
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["soft"]
                  for folder in (once(run, *given), Path("r")))
    assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_from_a_dense_network_and_by_adam():
    prune_unstructured.main([*SHORT, "--sparsity", "0", "--run-dir", "dense"])
    summary = run("--init", "dense/model.pt", "--optimizer", "adam", "--schedule", "constant",
                  "--precision", "bf16", "--neurons", *FAST)
    dense = json.loads(Path("dense/summary.json").read_text())
    assert summary["dense_accuracy"] == pytest.approx(dense["test_accuracy"], abs=0.051)  # bf16


def test_dead_weights_stay_dead_while_fine_tuning():
    run("--run-dir", "r", "--epochs-finetune", 2, *FAST)
    (update,) = lines("r", "updates")
    masks = modelfile.read("r/model.pt")["masks"]
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        layer["name"]: layer["alive"] for layer in update["layers"]}
    state = torch.load("r/checkpoint.pt", weights_only=True)["parts"]["optimizer"]["state"]
    momenta = [row["momentum_buffer"] for row in state.values()
               if row["momentum_buffer"].dim() > 1]
    assert len(momenta) == len(masks)
    for momentum, mask in zip(momenta, masks.values()):
        assert not momentum[~mask].any() and momentum.any()


def test_smoke():
    assert run("--smoke", "--neurons", short=False)["method"] == "upr-neurons"
    assert Path("runs/smoke-fashion-mini-small-upr-neurons-0.9-seed0/summary.json").exists()


def test_defaults_and_names(capsys):
    parse = prune_upr.parse_args
    args = parse(["--dataset", "cifar100"])
    assert (args.epochs_prune, args.epochs_finetune, args.lr, args.optimizer) == (
        200, 300, 0.3, "sgd")
    names = {parse(given.split()).run_dir for given in (
        "", "--neurons", "--mode paper", "--sparsity 0.95", "--price 1e-7", "--mask-lr 0.2",
        "--seed 1", "--optimizer adam")}
    assert len(names) == 8 and "runs/fashion-mini-small-upr-0.9-seed0" in names
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0 and "None" not in capsys.readouterr().out


def test_the_default_rate_of_the_masks_reaches_as_far_as_published():
    for schedule, steps in (("cosine", 752), ("step", 752), ("constant", 100), ("cosine", 78_200)):
        lr = prune_upr.default_mask_lr(Namespace(schedule=schedule), steps)
        total = sum(training.lr_at(schedule, lr, step, steps) for step in range(steps))
        assert total == pytest.approx(16.8, rel=0.01)
    assert prune_upr.default_mask_lr(Namespace(schedule="cosine"), 240 * 140) == pytest.approx(1e-3)


def test_the_default_price():
    for density, price in prune_upr.PRICE.items():
        assert default_price(Namespace(sparsity=1 - density)) == pytest.approx(price)
    found = [default_price(Namespace(sparsity=s)) for s in (0.9, 0.95, 0.98)]
    assert found == sorted(set(found))


@pytest.mark.parametrize("given, words", [
    ("--sparsity 0", "expected a number above 0"), ("--sparsity 90", "For 90 % write 0.9"),
    ("--sparsity 0.9999", "expected at least one for each of the 5 layers"),
    ("--price -1", "--price is -1"), ("--price nan", "--price is nan"),
    ("--mask-lr 0", "--mask-lr is 0, expected a finite number above 0"),
    ("--mode official", "invalid choice"), ("--epochs-prune 0", "--epochs-prune is 0"),
    ("--model sdsnn-small", "which has no batch normalisation"),
    ("--model gradr-linear --neurons", "which has no batch normalisation"),
    ("--interval 3", "--interval"), ("--run-dir full", "holds no run")])
def test_wrong_commands(given, words, capsys):
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("text")
    before = sorted(Path().rglob("*"))
    assert words in refused(capsys, run, *given.split())
    assert sorted(Path().rglob("*")) == before


def test_a_price_that_leaves_fewer_masks_than_layers(capsys):
    given = ["--mode", "paper", "--price", 1, "--mask-lr", 0.05]
    assert "Start again with a lower --price" in refused(capsys, run, *given, code=1)


def test_as_published(capsys):
    args = prune_upr.parse_args(["--as-published"])
    assert (args.mode, args.optimizer, args.lr, args.weight_decay, args.schedule, args.loss) == (
        "paper", "adam", 1e-4, 0.0, "constant", "mse")
    assert "-paper" in args.run_dir and "-published" in args.run_dir
    assert args.as_published == ["cut", "optimizer", "loss"] and args.mask_lr == 1e-4
    args = prune_upr.parse_args(["--as-published", "loss"])
    assert (args.mode, args.loss, args.optimizer) == ("matched", "mse", "sgd")
    assert "published-loss" in args.run_dir
    assert prune_upr.parse_args([]).as_published == []
    error = refused(capsys, run, "--as-published", "loss", "--loss", "ce")
    assert "--loss is ce, but --as-published loss sets it to mse" in error
