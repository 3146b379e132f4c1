"""SCA: the activity, the rule and the fate of dead channels by hand and against plain loops, the
script from its command line."""
import copy
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import channels
import data
import metrics
import modelfile
import models
import neurons
import prune_sca
import training
from harness import runfolder
from helpers import assert_same_run, let_fire, lines, random_net, refused, rng, stop_after
from kernels import FastLIF
from neurons import LIF
from masks import computing_with
from prune_sca import Living, all_live, cut_and_regrow

# ---- the activity --------------------------------------------------------------------------------


def recorded(lif, x_seq, by):
    lif.start_recording("mean", by)
    spikes = lif(x_seq)
    found, rate = lif.stop_recording()
    assert torch.allclose(rate, spikes.transpose(0, 2).flatten(1).mean(1, dtype=torch.float64))
    return spikes, found


@pytest.mark.parametrize("x, pre, post", [
    ([1.2, 1.2, .4, 2.0], .975, .8), ([-1, .5], .46875, .46875), ([-2, 2.4], 1.4625, 1.25)])
def test_activity_by_hand(x, pre, post):
    """h = .9, 1.125, .3, 1.575; -.75, .1875; -1.5, 1.425."""
    x_seq = torch.tensor(x).view(-1, 1, 1)
    for make in (LIF, FastLIF):
        assert recorded(make(), x_seq, "pre")[1].tolist() == pytest.approx([pre], abs=1e-7)
        assert recorded(make(), x_seq, "post")[1].tolist() == pytest.approx([post], abs=1e-7)


@pytest.mark.parametrize("settings", [{}, dict(reset="soft"), dict(v_threshold=0.5, v_reset=-0.2),
                                      dict(tau=2.0, decay_input=False, strict=True)])
@pytest.mark.parametrize("by", ["pre", "post"])
def test_activity_against_a_plain_loop(settings, by):
    T, N, C, side = 3, 2, 4, 3
    x_seq = 2 * torch.randn(T, N, C, side, side, generator=rng()).double()
    lif = LIF(**settings)
    wanted = torch.zeros(C).double()
    for n in range(N):
        for c in range(C):
            for i in range(side * side):
                v = lif.v_reset
                for t in range(T):
                    x = float(x_seq[t, n, c].flatten()[i])
                    leak = v - lif.v_reset
                    h = v + ((x - leak) / lif.tau if lif.decay_input else x - leak / lif.tau)
                    s = h > lif.v_threshold if lif.strict else h >= lif.v_threshold
                    v = h
                    if s:
                        v = lif.v_reset if lif.reset == "hard" else h - lif.v_threshold
                    term = abs(h) if by == "pre" else s * lif.v_threshold + abs(v)
                    wanted[c] += term / (T * N * side * side)
    spikes, found = recorded(lif, x_seq, by)
    assert found.dtype == torch.float64 and torch.allclose(found, wanted, rtol=1e-6)
    fast = FastLIF(**settings)
    assert torch.equal(recorded(fast, x_seq, by)[0], spikes)
    assert torch.equal(fast(x_seq), spikes)  # not recorded


def test_activity_of_other_things_is_refused():
    with pytest.raises(ValueError, match='by is "?.x'):
        neurons.activity(LIF(), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), by="x")


# ---- an update -----------------------------------------------------------------------------------

A = torch.tensor([.9, .1, .4, .05, .8, .3, .02, .6, .2, .15]).double()
G = torch.tensor([.01, .5, .02, .03, .01, .04, .6, .02, .05, .07]).double()


def places(row):
    return row.nonzero().flatten().tolist()


def update(live, ratio, regen, activity=A, growth=G, gamma=None, sizes=(4, 6), may_be_empty=None):
    gamma = torch.ones(len(live)) if gamma is None else gamma
    return cut_and_regrow(live, ratio, regen, activity, growth, gamma, list(sizes), may_be_empty)


def test_an_update_by_hand():
    everything = torch.ones(10, dtype=torch.bool)
    choice, stays = update(everything, .5, .4)
    assert places(stays) == [0, 4, 7] and places(choice.regenerated) == [1, 6]
    assert places(choice.kept) == [0, 1, 4, 6, 7] and not choice.rescued.any()
    choice, stays = update(everything, .5, 0)  # by activity alone
    assert places(choice.kept) == places(stays) == [0, 2, 4, 5, 7]
    assert not choice.regenerated.any()


def test_the_third_party_rule_is_another_one():
    """It keeps what is above the value at place int(.8 C), and 1 of the cut returns: 9 of 10."""
    kept = A > A.sort(descending=True).values[int(.8 * 10)]
    grown = torch.where(kept, 0, G)
    back = grown > grown.sort(descending=True).values[int(.1 * 10)]
    assert places(~kept) == [3, 6] and places(back) == [6] and int((kept | back).sum()) == 9


def test_what_is_long_dead_returns_as_what_was_just_cut_does():
    live = torch.ones(10, dtype=torch.bool)
    live[[6, 1]] = False
    choice, stays = update(live, .5, .4)
    assert places(stays) == [0, 4, 7] and places(choice.regenerated) == [1, 6]
    growth = G.clone()
    growth[5] = 1  # it lives, and is cut
    assert places(update(live, .5, .4, growth=growth)[0].regenerated) == [5, 6]
    # a dead channel does not stay by its activity
    assert places(update(live, .4, 0, activity=A.index_fill(0, torch.tensor([6]), 5.0))[0].kept) \
        == [0, 2, 4, 5, 7, 8]


def test_where_fewer_live_than_could_stay():
    """More return, so that the count is met; a target of MACs can ask for more channels."""
    live = torch.zeros(10, dtype=torch.bool)
    live[[0, 4]] = True
    choice, stays = update(live, .5, .2)
    assert places(stays) == [0, 4] and places(choice.regenerated) == [1, 6, 9]


def test_no_layer_ends_empty():
    live, gamma = torch.ones(10, dtype=torch.bool), torch.arange(10.0)
    activity = torch.arange(10.0).double()
    choice, _ = update(live, .6, 0, activity=activity, gamma=gamma)
    assert places(choice.kept) == [3, 6, 7, 8, 9] and places(choice.rescued) == [3]
    choice, _ = update(live, .6, 0, activity, gamma=gamma, may_be_empty=[True, False])
    assert places(choice.kept) == [6, 7, 8, 9] and not choice.rescued.any()


def by_plain_loops(live, ratio, regen, activity, growth, gamma):
    total = len(live)
    n_final, n_temp = round(ratio * total), round((ratio + regen * (1 - ratio)) * total)
    order = sorted((c for c in range(total) if live[c]),
                   key=lambda c: (-float(activity[c]), -float(gamma[c]), c))
    stays = set(order[:total - n_temp])
    order = sorted((c for c in range(total) if c not in stays),
                   key=lambda c: (-float(growth[c]), -float(gamma[c]), c))
    back = set(order[:total - n_final - len(stays)])
    return stays, back


@pytest.mark.parametrize("seed", range(30))
def test_updates_against_plain_loops(seed):
    """A ramp of updates, with many ties."""
    generator, total, n = rng(seed), 13, 5

    def ties():
        return torch.randint(4, (total,), generator=generator).double()

    live = torch.ones(total, dtype=torch.bool)
    ratio, regen = torch.rand(2, generator=generator).tolist()
    for q in range(1, n + 1):
        share = training.sparsity_at(q, n, ratio)
        activity, growth, gamma = ties(), ties(), ties()
        stays, back = by_plain_loops(live, share, regen, activity, growth, gamma)
        choice, found = update(live, share, regen, activity, growth, gamma, [total], [True])
        assert set(places(found)) == stays and set(places(choice.regenerated)) == back
        assert set(places(choice.kept)) == stays | back
        assert len(stays | back) == total - round(share * total)
        live = choice.kept


# ---- dead channels -------------------------------------------------------------------------------


def a_net(name="small", factor=0.25):
    return random_net(name, factor, dtype=torch.float32).train()


def run_of(net, lr=0.1, optimizer="sgd", weight_decay=0.1):
    args = SimpleNamespace(optimizer=optimizer, lr=lr, momentum=0.9, weight_decay=weight_decay,
                           device="cpu", precision="fp32", loss="ce")
    return SimpleNamespace(
        net=net, forward=net, args=args, weight=1, share=1, iteration=1, total=lambda x: x,
        meter=SimpleNamespace(add=lambda *given: None),
        optimizer=training.optimizer(args, net.parameters()))


def a_batch(net, n=6):
    config = net.config
    shape = n, config["in_channels"], config["image_size"], config["image_size"]
    return (torch.randint(256, shape, generator=rng(), dtype=torch.uint8),
            torch.arange(n) % config["num_classes"])


def with_dead(net, share=0.4, seed=0):
    """A Living some of whose channels are dead, and at least one of each layer lives."""
    state = all_live(net)
    state["live"] = torch.rand(len(state["live"]), generator=rng(seed)) > share
    state["live"] |= channels.largest_of_empty_layers(
        state["live"], channels.gammas(net), channels.layers(net)[1])
    return Living(net, state)


def test_parameters_compute_with_other_values_for_a_while():
    w, v = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([5.0], requires_grad=True)
    with computing_with([w, v], [torch.tensor([1.0, 0.0]), torch.tensor([7.0])]):
        assert w.tolist() == [1, 0] and v.tolist() == [7]
        (w.pow(2).sum() + w.sum() * v.sum()).backward()
    assert w.tolist() == [2, 3] and v.tolist() == [5]
    assert w.grad.tolist() == [2 + 7, 0 + 7] and v.grad.tolist() == [1]  # at the other values
    with pytest.raises(KeyError), computing_with([w], [torch.zeros(2)]):
        raise KeyError
    assert w.tolist() == [2, 3]


@pytest.mark.parametrize("name, factor", [("small", 0.25), ("resnet19", 0.12),
                                          ("resnet19-pre", 0.1)])
def test_a_dead_channel_computes_as_if_silenced(name, factor):
    net = a_net(name, factor)
    living = with_dead(net)
    names, sizes = channels.layers(net)
    kept = dict(zip(names, living.live.split(sizes)))
    silenced = channels.silence(net, kept).eval()
    x, _ = a_batch(net)
    before = copy.deepcopy(net.state_dict())
    with living.computing(), torch.inference_mode():
        assert torch.equal(net.eval()(x), silenced(x))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_dead_channels_do_not_move_and_are_silent(optimizer):
    """Bit by bit, under momentum and decay; their gamma has a gradient all the same."""
    net = a_net()
    run, (x, y), fired = run_of(net, optimizer=optimizer), a_batch(net), []
    for _ in range(2):  # all live: their momentum is not 0
        training.step(run, x, y, 0.1)
    living = with_dead(net)
    living.take(channels.Choice(living.live, ~living.live, ~living.live),
                prune_sca.Scores(None, None, None), run.optimizer)
    before = copy.deepcopy(net.state_dict())
    for _ in range(3):
        scores = prune_sca.backward_and_score(run, living, x, y, "post")
        fired.append(scores.fired)
        assert (scores.growth[~living.live] > 0).any()
        training.descend(run.optimizer, 0.1)
        living.put_back(run.optimizer)
    after, groups = net.state_dict(), models.removable(net)
    n_rows = 0
    for group, live in zip(groups.values(), living.live.split(living.sizes)):
        for row in (group.weight, f"{group.bn}.weight", f"{group.bn}.bias"):
            assert torch.equal(after[row][~live], before[row][~live])
            assert not torch.equal(after[row][live], before[row][live])
            for past in training_past(run.optimizer, net.get_parameter(row)):
                assert not past[~live].any() and past[live].any()
            n_rows += int((~live).sum())
    assert n_rows > 0
    for row in fired:
        assert not row[~living.live].any() and row[living.live].any()


def training_past(optimizer, parameter):
    state = optimizer.state[parameter]
    return [state[key] for key in ("momentum_buffer", "exp_avg") if key in state]


def test_without_its_filter_a_dead_channel_would_have_no_gradient():
    net = a_net()
    run, (x, y), living = run_of(net), a_batch(net), with_dead(net)
    dead = ~living.live
    growth = prune_sca.backward_and_score(run, living, x, y, "post").growth
    assert growth[dead].max() > 1e-6
    start = 0
    for group, size in zip(models.removable(net).values(), living.sizes):
        net.get_parameter(group.weight).data[dead[start:start + size]] = 0
        start += size
    growth = prune_sca.backward_and_score(run, living, x, y, "post").growth
    assert not growth[dead].any() and growth[~dead].any()


def test_the_scores_are_those_of_the_batch():
    """Against autograd on a network whose dead gamma and beta are 0, and its LIFs' currents."""
    net = a_net()
    run, (x, y), living = run_of(net), a_batch(net), with_dead(net)
    names, sizes = channels.layers(net)
    other = channels.silence(net, dict(zip(names, living.live.split(sizes))))
    groups = models.removable(other).values()
    found = {}
    for group in groups:
        lif = other.get_submodule(group.lif)

        def keep(_, inputs, spikes, name=group.lif, lif=lif):
            v, total = 0, 0
            for current, s in zip(inputs[0].expand_as(spikes), spikes):
                h = v + (current - v) / lif.tau
                v = torch.where(s > 0, 0.0, h)
                total = total + s + v.abs()
            found[name] = (total / len(spikes)).detach().mean((0, 2, 3))

        lif.register_forward_hook(keep)
    logits = other(x)
    F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits))).backward()
    scores = prune_sca.backward_and_score(run, living, x, y, "post")
    wanted = torch.cat([found[group.lif] for group in groups])
    assert torch.allclose(scores.activity.float(), wanted, rtol=1e-4, atol=1e-6)
    wanted = torch.cat([other.get_submodule(group.bn).weight.grad.abs() for group in groups])
    assert torch.allclose(scores.growth, wanted, rtol=1e-3, atol=1e-7)


def test_what_returns_is_as_it_was_when_it_died():
    net = a_net()
    run, (x, y) = run_of(net), a_batch(net)
    living = Living(net, all_live(net))
    training.step(run, x, y, 0.1)
    none = torch.zeros_like(living.live)
    live, scores = ~none, prune_sca.Scores(None, None, None)
    live[1] = False
    gamma = net.convs[0].bn.weight
    died_with = gamma.detach().clone()
    living.take(channels.Choice(live, none, none), scores, run.optimizer)
    assert run.optimizer.state[gamma]["momentum_buffer"][1] == 0
    with living.computing():
        training.backward(run, x, y)
    training.descend(run.optimizer, 0.1)
    living.put_back(run.optimizer)
    assert gamma[1] == died_with[1] and gamma[0] != died_with[0]
    returns = none.clone()
    returns[1] = True
    living.take(channels.Choice(~none, returns, none), scores, run.optimizer)
    with living.computing():
        assert gamma[1] == died_with[1]
        training.backward(run, x, y)
    training.descend(run.optimizer, 0.1)
    living.put_back(run.optimizer)
    assert gamma[1] != died_with[1] and places(living.state["returned"]) == [1]
    living.take(channels.Choice(live, none, none), scores, run.optimizer)
    assert not living.state["returned"].any()


# ---- the whole stage against a twin --------------------------------------------------------------

TINY = ["--train-limit", "100", "--epochs-prune", "3", "--epochs-finetune", "1",
        "--width", "0.25", "--batch-size", "25"]  # 4 steps an epoch
pytestmark = pytest.mark.usefixtures("few_test_images")


@pytest.fixture(autouse=True)
def the_name_of_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_sca.py"])


def run(*given, short=TINY):
    return prune_sca.main([*short, *map(str, given)])


def record(folder):
    return json.loads(Path(folder, "channels.json").read_text())


def test_the_stage_is_that_of_a_plain_loop(monkeypatch):
    """Each step and update of a run, done again on another network: the score of the batch before
    the step, what is dead held in the step, then the choice. Swapped steps fail."""
    args = ["--prune-ratio", "0.6", "--regen", "0.3", "--interval", "3"]
    start, seen, batches = {}, [], []
    backward, set_up = training.backward, prune_sca.removal.set_up

    def first(*given, **named):
        found = set_up(*given, **named)
        start["net"] = copy.deepcopy(found[0].net)
        return found

    def batch(the_run, x, y, *rest):
        batches.append((x.clone(), y.clone(), training.lr_at(
            "cosine", the_run.args.lr, *the_run.position)))
        return backward(the_run, x, y, *rest)

    removed = prune_sca.removal.remove

    def last(the_run, *rest):
        start["end"] = copy.deepcopy(the_run.net)
        return removed(the_run, *rest)

    monkeypatch.setattr(prune_sca.removal, "set_up", first)
    monkeypatch.setattr(training, "backward", batch)
    monkeypatch.setattr(prune_sca.removal, "remove", last)
    log = prune_sca.removal.log_update
    monkeypatch.setattr(prune_sca.removal, "log_update", lambda r, t, b, c, choice, **more: (
        seen.append(choice.kept.clone()), log(r, t, b, c, choice, **more)))
    run("--run-dir", "r", *args)

    net, groups = start["net"], list(models.removable(start["net"]).values())
    assert len(batches) == 12 + 4  # those of fine-tuning too
    past, sizes = {}, [len(net.get_submodule(group.bn).weight) for group in groups]
    live, q = torch.ones(sum(sizes), dtype=torch.bool), 0
    for i, (x, y, lr) in enumerate(batches[:12], 1):
        # gamma m and beta m, in a copy
        masked = copy.deepcopy(net)
        for group, m in zip(groups, live.split(sizes)):
            bn = masked.get_submodule(group.bn)
            bn.weight.data[~m], bn.bias.data[~m] = 0, 0
        with models.recording(masked, "mean", "post") as activity:
            logits = masked(x)
        F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits))).backward()
        rows = {}
        for group, m in zip(groups, live.split(sizes)):
            rows |= {row: m for row in (group.weight, f"{group.bn}.weight", f"{group.bn}.bias")}
        for (name, w), other in zip(net.named_parameters(), masked.parameters()):
            m = rows.get(name, torch.ones(len(w), dtype=torch.bool))
            g = other.grad + 5e-4 * w.detach()
            past[name] = g if name not in past else 0.9 * past[name] + g
            past[name][~m] = 0
            w.data[m] -= lr * past[name][m]
        for own, other in zip(net.buffers(), masked.buffers()):
            own.copy_(other)  # of BN
        if i % 3 == 0:
            q += 1
            a = torch.cat([activity[group.lif][0] for group in groups])
            g = torch.cat([masked.get_submodule(group.bn).weight.grad.abs() for group in groups])
            gamma = torch.cat([net.get_submodule(group.bn).weight.detach().abs()
                               for group in groups])
            stays, back = by_plain_loops(live, 0.6 * (1 - (1 - q / 4) ** 3), 0.3, a, g, gamma)
            live = torch.tensor([c in stays | back for c in range(len(live))])
            for part, value in zip(live.split(sizes), gamma.split(sizes)):
                if not part.any():
                    part[value.argmax()] = True
            assert torch.equal(live, seen[q - 1]), q
            for group, m in zip(groups, live.split(sizes)):
                for row in (group.weight, f"{group.bn}.weight", f"{group.bn}.bias"):
                    past[row][~m] = 0
    assert q == len(seen) == 4 and len(lines("r", "updates")) == 4
    assert any((new & ~old).any() for old, new in zip(seen, seen[1:]))  # some came back later
    end = start["end"].state_dict()
    for name, value in net.state_dict().items():
        assert torch.allclose(value.double(), end[name].double(), rtol=1e-3, atol=1e-4), name


# ---- the script ----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [
    ["--precision", "bf16"], ["--potential", "pre", "--regen", "0"], ["--target-macs", "0.6"],
    ["--prune-ratio", "0.9", "--interval", "2", "--optimizer", "adam"]])
def test_all_flags(given):
    summary = run("--run-dir", "r", *given)
    found, rows, updates = record("r"), lines("r", "metrics"), lines("r", "updates")
    assert {path.name for path in Path("r").iterdir()} == {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt",
        "summary.json", "curves.png", "channels.json", "gamma.npz"}
    assert list(summary) == runfolder.SUMMARY_KEYS
    assert (summary["script"], summary["method"]) == ("prune_sca", "sca")
    assert summary["regen"] == (0 if "--regen" in given else 0.1)
    assert summary["dense_accuracy"] is None
    assert summary["widths"] == [len(layer["kept"]) for layer in found["layers"]]
    assert models.load("r/model.pt").config["widths"] == summary["widths"]
    assert [row["stage"] for row in rows] == ["prune"] * 3 + ["finetune"]
    assert found["kept"] == sum(layer["alive"] for layer in updates[-1]["layers"])
    assert rows[2]["sparsity"] == rows[3]["sparsity"] == summary["sparsity"]
    assert summary["training_cost"] == pytest.approx(
        (1 + sum(1 - row["sparsity"] for row in rows[:3])) / 4)
    assert found["spikes_that_differ"] == 0
    assert len(updates) == (6 if "--interval" in given else 3)
    if "--regen" in given:
        assert summary["survived_by_regeneration"] == 0
    else:
        assert sum(row["regenerated"] for row in updates) > 0
    if "--target-macs" in given:
        assert found["macs_removed"] == pytest.approx(0.6, abs=0.05)
        assert summary["prune_ratio"] == found["ratio"] == updates[-1]["target"]
        config, gone = models.load("r/model.pt").config, []
        for row in updates:
            widths = [layer["alive"] for layer in row["layers"]]
            gone.append(1 - sum(metrics.macs(config | dict(widths=widths)).values())
                        / summary["macs_dense"])
        ramp = [0.6 * (1 - (1 - q / 3) ** 3) for q in (1, 2, 3)]  # 0.42, 0.58, 0.6
        assert gone == pytest.approx(ramp, abs=0.05)


@pytest.mark.parametrize("ratio, regen", [(0.5, 0.1), (0.8, 0.4)])
def test_the_counts_are_exact(ratio, regen):
    """Of 44 channels, after each update, but for the largest of a layer that would be empty."""
    summary = run("--run-dir", "r", "--prune-ratio", ratio, "--regen", regen)
    for q, row in enumerate(lines("r", "updates"), 1):
        share = ratio * (1 - (1 - q / 3) ** 3)
        n_final, n_temp = round(share * 44), round((share + regen * (1 - share)) * 44)
        alive = sum(layer["alive"] for layer in row["layers"])
        rescued = alive - (44 - n_final)
        assert row["target"] == pytest.approx(share) and 0 <= rescued <= 2
        assert row["sparsity"] == pytest.approx(1 - alive / 44)
        assert sum(layer["regenerated"] for layer in row["layers"]) == row["regenerated"] \
            == n_temp - n_final
    found = record("r")
    assert sum(summary["widths"]) == 44 - round(ratio * 44) + found["rescued"]


def test_an_epoch_is_tested_without_the_dead_channels(monkeypatch):
    """Its row is that of the network whose gamma and beta are 0 there."""
    found, end_epoch = [], prune_sca.removal.end_epoch

    def watch(the_run):
        if "sca" in the_run.notes:
            names, sizes = channels.layers(the_run.net)
            live = the_run.notes["sca"]["live"]
            silenced = channels.silence(the_run.net, dict(zip(names, live.split(sizes))))
            found.append((the_run.evaluate(silenced), the_run.evaluate(copy.deepcopy(the_run.net))))
        else:  # fine-tuning: the network computes with what it stores
            assert the_run.computes is nullcontext
        end_epoch(the_run)

    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16])
    let_fire(net)
    torch.save(modelfile.pack(net), "net.pt")
    monkeypatch.setattr(prune_sca.removal, "end_epoch", watch)
    run("--run-dir", "r", "--init", "net.pt", "--prune-ratio", 0.7)
    for row, (silenced, whole) in zip(lines("r", "metrics"), found):
        assert (row["test_loss"], row["test_accuracy"]) == (silenced["loss"], silenced["accuracy"])
        assert row["test_loss"] != whole["loss"]
    assert len(found) == 3


def test_the_end_of_the_stage_is_the_small_network_before_fine_tuning():
    summary = run("--run-dir", "r")
    assert summary["pruned_accuracy"] == record("r")["accuracy_removed"] == \
        lines("r", "metrics")[2]["test_accuracy"]


def test_smoke():
    summary = prune_sca.main(["--smoke"])
    (folder,) = Path("runs").iterdir()
    assert [row["stage"] for row in lines(folder, "metrics")] == ["prune", "prune", "finetune"]
    assert sum(summary["widths"]) == 22 + record(folder)["rescued"]


def test_init():
    torch.manual_seed(0)
    torch.save(modelfile.pack(models.build("small", 10, 1, 28, 4, [4, 8, 16, 16])), "net.pt")
    summary = run("--run-dir", "r", "--init", "net.pt")
    assert summary["dense_accuracy"] < 0.5  # nothing was learnt before


def test_without_fine_tuning_the_result_is_that_of_the_small_network():
    found = run("--run-dir", "r", "--epochs-finetune", 0)
    images = data.load("fashion-mini")
    with torch.inference_mode():
        right = models.load("r/model.pt")(images.x_test).sum(0).argmax(1) == images.y_test
    assert found["test_accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert found["test_accuracy"] == found["pruned_accuracy"]


# ---- stopping and going on -----------------------------------------------------------------------


@pytest.mark.parametrize("given, steps", [
    (["--interval", "3"], (3, 7, 12, 13)), (["--target-macs", "0.6"], (8,))])
def test_resume_from_any_step(given, steps, monkeypatch):
    """At an update and after one, at the end of the stage, and after the removal."""
    given = [*given, "--train-limit", "75", "--epochs-prune", "4", "--epochs-finetune", "1"]
    run("--run-dir", "unbroken", *given, short=TINY[6:])
    for step in steps:
        stop_after(step, monkeypatch, lambda *a: run(*a, short=TINY[6:]), "--run-dir", f"r{step}",
                   *given)
        run("--run-dir", f"r{step}", "--resume", short=[])
        assert_same_run("unbroken", f"r{step}")


# ---- what a wrong command gets -------------------------------------------------------------------


@pytest.mark.parametrize("given, words", [
    ("--epochs-prune 0", "--epochs-prune is 0, expected a whole number of at least 1"),
    ("--prune-ratio 0", "--prune-ratio is 0, expected a number above 0"),
    ("--prune-ratio 50", "--prune-ratio is 50, expected"),
    ("--prune-ratio 0.98", "leaves 1 of 44 channels, expected at least one for each of the 4 "),
    ("--target-macs 0.9999", "--target-macs is 0.9999, expected at most 0.9"),
    ("--target-macs 0.5 --prune-ratio 0.5", "not allowed with argument"),
    ("--regen 1", "--regen is 1, expected a fraction in [0, 1)"),
    ("--potential abs", "invalid choice: 'abs'"),
    ("--interval 13", "no update would ever run: --interval is 13, the pruning stage has 12"),
    ("--epochs-pretrain 1", "unrecognized arguments"), ("--l1 0.1", "unrecognized arguments"),
    ("--init nowhere.pt", "nowhere.pt")])
def test_wrong_commands(given, words, capsys):
    assert words in refused(capsys, run, *given.split())
    assert not list(Path().rglob("*"))  # nothing was written


def test_the_defaults():
    for given, expected in {
            "--dataset cifar100": dict(
                prune_ratio=0.4522, target_macs=None, epochs_prune=160, epochs_finetune=160,
                regen=0.1, potential="post", weight_decay=5e-4, lr=0.3, model="vgg16",
                schedule="cosine"),
            "--dataset cifar100 --model resnet19": dict(prune_ratio=0.512),
            "": dict(prune_ratio=0.5, epochs_prune=8, epochs_finetune=8, interval=None),
            "--target-macs 0.7": dict(prune_ratio=None, target_macs=0.7)}.items():
        args = vars(prune_sca.parse_args(given.split()))
        assert {flag: args[flag] for flag in expected} == expected
        assert not {"l1", "epochs_pretrain", "metric"} & args.keys()


def test_names_of_runs():
    names = {given: prune_sca.parse_args(given.split()).run_dir for given in (
        "", "--potential pre", "--prune-ratio 0.4", "--target-macs 0.7", "--seed 1",
        "--regen 0", "--dataset a/mine.npz", "--model resnet19")}
    assert len(set(names.values())) == len(names)
    assert names[""] == "runs/fashion-mini-small-sca-0.5-r0.1-seed0"
    assert names["--target-macs 0.7"] == "runs/fashion-mini-small-sca-macs0.7-r0.1-seed0"


def test_help(capsys):
    with pytest.raises(SystemExit):
        prune_sca.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "vgg16: 0.4522, resnet19: 0.512; others: 0.5" in shown and "None" not in shown
    assert "those of an epoch" in shown
