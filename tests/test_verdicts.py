"""Differences with their p-values, and the verdicts on the paper's claims."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from harness import differences
from harness import presets
from harness import records
from harness import verdicts
from harness.differences import Difference

NAN = float("nan")


@pytest.mark.parametrize("degrees, t", [  # the 0.975 quantiles of any table
    (1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (11, 2.2010),
    (30, 2.0423)])
def test_students_t_is_that_of_the_tables(degrees, t):
    assert differences.quantile(degrees) == pytest.approx(t, abs=5e-5)
    assert differences.p_value(t, degrees) == pytest.approx(0.05, abs=1e-5)
    assert differences.p_value(-t, degrees) == differences.p_value(t, degrees)
    assert differences.p_value(0, degrees) == 1


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8])
def test_the_closed_form_is_the_integral_of_the_density(degrees):
    size = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    for t in (0.3, 1.0, 2.5, 9.0):
        x = np.linspace(0, t, 20001)
        density = size * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        inside = 2 * np.trapezoid(density, x)
        assert differences.p_value(t, degrees) == pytest.approx(1 - inside, abs=1e-8)


def test_holm_by_hand():
    """0.01 times 4, 0.015 times 3, 0.03 times 2, 0.04 times 1; none is less than the one before."""
    found = differences.holm([0.03, 0.01, NAN, 0.04, 0.015])
    assert found == pytest.approx([0.06, 0.04, NAN, 0.06, 0.045], nan_ok=True)
    assert differences.holm([0.6, 0.9]) == [1.0, 1.0] and differences.holm([]) == []


@pytest.mark.parametrize("ours, theirs, mean", [
    ((0.5, 0.5), (0.25, 0.25), 25), ((0.81, 0.82, 0.83), (0.8, 0.81, 0.82), 1),  # up to rounding
    ((0.1, 0.1), (0.1, 0.1, 0.5), 0)])
def test_pairs_that_differ_alike_have_no_spread_to_rest_on(ours, theirs, mean):
    """Of two seeds with 1,000 images this is chance once in some thirty times: no p of 0."""
    found = differences.against(runs(*ours), runs(*theirs))
    assert found.mean == pytest.approx(mean, abs=1e-9) and np.isnan([found.half, found.p]).all()
    assert differences.words(*found) == f"{mean:+.1f}" and differences.sign(*found[::2]) == 0
    assert differences.holm([found.p, 0.01, 0.02]) == pytest.approx([NAN, 0.02, 0.02], nan_ok=True)


@pytest.mark.parametrize("degrees", [1, 2, 99, 100])
def test_a_large_t_has_a_p_that_is_no_less_than_0(degrees):
    assert all(0 <= differences.p_value(t, degrees) < 0.05 for t in (30, 1e3, 1e15, math.inf))


def runs(*accuracies):
    return {seed: SimpleNamespace(summary=dict(test_accuracy=accuracy))
            for seed, accuracy in enumerate(accuracies)}


def test_a_difference_by_hand():
    """2, 3 and 4 points: mean 3, error 1 / sqrt(3), t = 5.196."""
    found = differences.against(runs(0.82, 0.83, 0.84, 0.1), runs(0.8, 0.8, 0.8))
    assert found == pytest.approx((3, 4.30265 / 3**0.5, differences.p_value(27**0.5, 2)), rel=1e-5)
    assert differences.words(*found) == "+3.0 (+0.5 to +5.5) above"
    assert differences.words(3.0, 2.5, 0.07) == "+3.0 (+0.5 to +5.5)"
    assert differences.words(-3.0, 2.5, 0.04) == "-3.0 (-5.5 to -0.5) below"
    assert differences.words(NAN, NAN, NAN) == "-"
    assert differences.against(runs(0.9), runs(0.8)) is differences.UNKNOWN  # one seed
    ours = runs(0.82, 0.83)
    assert differences.against(ours, ours) is differences.UNKNOWN  # a row and itself


# ---- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("found, above, stable", [
    ([(1.0, 0.4, 0.01)], "holds", "does not hold"),
    ([(1.0, 0.4, 0.01), (0.5, 0.9, 0.3)], "holds", "does not hold"),
    ([(1.0, 0.4, 0.06)], "cannot be told here", "cannot be told here"),
    ([(1.0, 0.4, 0.01), (-0.5, 0.2, 0.01)], "does not hold", "does not hold"),
    ([(-1.0, 0.4, 0.01), (0.5, 0.9, 0.3)], "does not hold", "does not hold")])
def test_verdicts_by_hand(found, above, stable):
    found = {("data", f"r = {i}"): Difference(*one) for i, one in enumerate(found)}
    assert verdicts.above(found)[0] == above and verdicts.stable(found)[0] == stable
    text = verdicts.in_words(found)
    assert text.startswith(f"data: r = 0 {differences.words(*found['data', 'r = 0'])}")
    assert text.count("data") == 1


def run(method, seed=0, accuracy=0.5, regen=0.0, pruned="weights", **config):
    """A run as records.read_run returns it, of flags that verdicts read."""
    base = presets.of("d") | dict(
        dataset="d", model="small", time_steps=4, epochs_prune=8, epochs_finetune=4, sparsity=0.9,
        interval=25, aggregate="max", candidates="all", as_published=[])
    if pruned == "channels":
        base |= dict(epochs_pretrain=8, target_macs=0.7)
    script = "prune_structured" if pruned == "channels" else "prune_unstructured"
    number = f"{method}-{seed}-{regen}-{sorted(config.items())}"
    return SimpleNamespace(
        folder=Path("runs", number), files={}, method=method, seed=seed, regen=regen,
        script=script, pruned=pruned, config=base | config | dict(seed=seed, script=script),
        summary=dict(test_accuracy=accuracy, method=method, epochs=12))


def found_in(runs, drawn=None):
    table = verdicts.table(runs, drawn or {})
    return {claim: (verdict, here) for claim, verdict, here, _ in table.rows} if table else {}


def seeds(method, *accuracies, **more):
    return [run(method, seed, accuracy, **more) for seed, accuracy in enumerate(accuracies)]


STRUCTURED = ["neuron", "pooling", "bn", "count", "decay"]
STABLE = "criticality is stable from r = 0.1 to 0.6 (here: differences to 0.1)"
ALL = ["neuron", "pooling", "score", "classifier", "zero", "momentum", "ties", "cosine", "loss"]
SETTING = "d, small, T = 4, 8 + 4 epochs"


def test_a_gain_is_that_of_its_sparsity_rate_and_reading():
    mine = (seeds("gmp", 0.80, 0.81, 0.82) + seeds("criticality", 0.82, 0.8305, 0.84, regen=0.5)
            + seeds("criticality", 0.1, 0.1, 0.1, regen=0.3)  # not the paper's rate
            + seeds("criticality", 0.1, 0.1, 0.1, regen=0.5, aggregate="mean")
            + seeds("gmp", 0.8, 0.81, 0.82, sparsity=0.98)
            + seeds("criticality", 0.8, 0.8, 0.825, regen=0.1, sparsity=0.98))
    said = found_in(mine)
    verdict, here = said["criticality is above GMP at 90 %, by 0.3 to 1.8 points"]
    assert verdict == "holds" and here == (
        f"{SETTING}, an update every 25 steps: +2.0 (+1.9 to +2.1) above")
    verdict, here = said["criticality is above GMP at 98 %, by up to 0.8 points (once 0.03 below)"]
    assert verdict == "cannot be told here" and here.endswith(": -0.2 (-2.1 to +1.7)")
    assert STABLE not in said  # r = 0.1 by itself
    assert "criticality is above GMP at 95 %, by 0.2 to 1.0 points" not in said
    for items, reading in ((["cosine"], None), (ALL, "as published")):
        beside = (seeds("gmp", 0.9, 0.91, 0.92, as_published=items)
                  + seeds("criticality", 0.8, 0.81, 0.8201, regen=0.5, as_published=items))
        verdict, here = found_in(mine + beside)[
            "criticality is above GMP at 90 %, by 0.3 to 1.8 points"]
        if reading is None:  # an item by itself is no reading of the paper
            assert verdict == "holds" and ";" not in here
        else:
            assert verdict == "does not hold" and "+2.0 (+1.9 to +2.1) above; " in here
            assert here.endswith(f"{reading}: -10.0 (-10.0 to -10.0) below")


def test_the_number_of_differences_counts():
    """p = 0.005 is enough among a few, and is not among thirty."""
    def verdict_beside(others):
        mine = seeds("gmp", 0.8, 0.8, 0.8) + seeds("criticality", 0.822, 0.825, 0.828, regen=0.5)
        for epochs in range(others):
            mine += seeds("gmp", 0.8, 0.8, 0.8, epochs_finetune=50 + epochs)
            mine += seeds("criticality", 0.8, 0.81, 0.79, regen=0.5, epochs_finetune=50 + epochs)
        return found_in(mine)["criticality is above GMP at 90 %, by 0.3 to 1.8 points"][0]

    assert verdict_beside(3) == "holds" and verdict_beside(30) == "cannot be told here"


def test_rankings_rates_lengths_and_tickets():
    mine = (seeds("criticality", 0.83, 0.82001, regen=0.5)
            + seeds("criticality", 0.85, 0.84, regen=0.1)
            + seeds("criticality", 0.2, 0.1, regen=0.7)
            + seeds("random", 0.80, 0.79, regen=0.5) + seeds("random", 0.9, 0.9, regen=0.1)
            + seeds("gmp", 0.8, 0.8)
            + seeds("criticality", 0.9, 0.91, regen=0.5, epochs_prune=2)
            + seeds("gmp", 0.8, 0.8, epochs_prune=2))
    said = found_in(mine)
    verdict, here = said["criticality is above random regeneration at the same r"]
    assert verdict == "holds" and here.endswith(": 90 % sparse +3.0 (+3.0 to +3.0) above")
    verdict, here = said[STABLE]
    assert verdict == "does not hold" and here.endswith(": 90 % sparse, r = 0.5 -2.0 (-2.0 to -2.0)"
                                                        " below")
    verdict, here = said["criticality is above GMP at each length of pruning"]
    assert verdict == "cannot be told here"
    assert here.startswith("d, small, T = 4: 90 % sparse, 2 epochs +10.5 (")
    assert ", 90 % sparse, 8 epochs +2.5 (" in here
    assert not any("LTH-SNN" in claim or "gradient" in claim for claim in said)
    better = seeds("criticality", 0.91, 0.92, 0.93, regen=0.5)  # no less a change than a worse one
    assert found_in(better + seeds("criticality", 0.8, 0.81, 0.8201, regen=0.1))[STABLE][0] == (
        "does not hold")
    tickets = seeds("imp", 0.81, 0.81)
    tickets[1].summary["epochs"] = 14
    said = found_in(mine + tickets)
    verdict, here = said["criticality needs 11.3 and 15.5 times fewer epochs than LTH-SNN"]
    assert verdict == "true by construction"
    assert here.endswith("; here criticality has 12 epochs, IMP 12, 14")
    assert "LTH-SNN (IMP)" in " ".join(said)
    assert verdicts.table(tickets, {}) is None


def test_one_seed_tells_nothing():
    said = found_in([run("gmp"), run("criticality", accuracy=0.9, regen=0.5)])
    assert set(said.values()) == {("cannot be told here", "no two seeds in common")}
    assert verdicts.table([run("gmp")], {}) is None


def update(survived, regenerated=8, pruned=10):
    """A line of updates.jsonl, of an update that can bring back 80 % of what it prunes."""
    return json.dumps(dict(survived=survived, regenerated=regenerated, pruned=pruned)) + "\n"


def test_what_comes_back_counts_by_update(tmp_path):
    mine = seeds("criticality", 0.8, 0.8, regen=0.5)
    for number, (one, shares) in enumerate(zip(mine, ((0.5, 0.9, None), (0.7, 0.05, 0.9)))):
        one.folder = tmp_path / str(number)
        one.folder.mkdir()
        (one.folder / "updates.jsonl").write_text(
            "".join(update(share) for share in shares))
    claim = "more than half of what an update prunes comes back in it, at 90 %"
    verdict, here = found_in(mine)[claim]  # means 60 and 47.5 %; the last one is not known
    assert verdict == "does not hold" and here.endswith(
        ": in 1 of the 2 updates that have room for it, 48 to 60 % of at most 80")
    assert verdicts.table(mine[:1], {}) is None

    def read_again(*logs, of=mine):
        for one, log in zip(of, logs):
            one.files.clear()
            one.folder.joinpath("updates.jsonl").write_text("".join(log))
        return found_in(of).get(claim)

    row, low = update(0.7), update(0.5)
    assert read_again([row], [low])[0] == "holds"
    assert [name for name in found_in(mine) if "comes back" in name] == [claim]  # at 90 %
    other = [run("criticality", seed, 0.8, regen=0.5, interval=50) for seed in (0, 1)]
    for one in other:
        one.files["updates.jsonl"] = [json.loads(low)]
    verdict, here = found_in(mine + other)[claim]
    assert verdict == "does not hold" and here.count(" of the 1 update that") == 2
    assert read_again([low], [low])[0] == "does not hold"  # not more than half
    # a log that is cut off, within a row or between two, or holds no rows, is left out
    for log in ([row], [row, row[:5]], ["5\n", "6\n"], ["{}\n"], []):
        assert read_again([row, row], log) is None
    third = run("criticality", 2, 0.8, regen=0.5)
    third.folder = mine[1].folder.with_name("2")
    third.folder.mkdir()
    verdict, here = read_again([row, row], [low], [low, row], of=[*mine, third])
    assert verdict == "holds" and ": in 2 of the 2 updates that have room for it, 60 to 70 %" in here
    third.regen = mine[0].regen = mine[1].regen = 0.3
    assert ": r = 0.3, in 2 of the 2 updates" in read_again([row, row], [low], [low, row],
                                                            of=[*mine, third])[1]


def test_an_update_without_room_for_a_half_says_nothing():
    """r = 0.1 returns 100 of 1,000 that stay: of 500 that an update prunes, at most a fifth."""
    claim = "more than half of what an update prunes comes back in it, at 90 %"
    mine = seeds("criticality", 0.8, 0.8, regen=0.5)
    for one in mine:
        one.files["updates.jsonl"] = [json.loads(update(0.2, 100, 500)), json.loads(update(0.9))]
    verdict, here = found_in(mine)[claim]
    assert verdict == "holds" and "in 1 of the 1 update that has room for it, 90 %" in here
    for one in mine:
        del one.files["updates.jsonl"][1]
    verdict, here = found_in(mine)[claim]
    assert verdict == "cannot be told here" and here.endswith(": no update has room for it")


# ---- which runs are compared ---------------------------------------------------------------------

GAIN = "criticality is above GMP at 90 %, by 0.3 to 1.8 points"
LENGTHS = "criticality is above GMP at each length of pruning"
CHANNELS = "channels: criticality is above slimming at equal MACs, by 0.2 to 1.7 points"


@pytest.mark.parametrize("flag, usual, other", [
    ("interval", 25, 50), ("schedule", "cosine", "step"), ("crop", 0, 4), ("flip", True, False),
    ("cutout", 0, 16), ("rotate", 0.0, 5.0), ("precision", "fp32", "bf16"),
    ("momentum", 0.9, 0.5), ("weight_decay", 5e-4, 1e-4), ("lr", 0.1, 0.3)])
def test_settings_that_differ_in_a_flag_are_two_and_both_are_told(flag, usual, other):
    mine = []
    for value, gain in ((usual, 0.01), (other, 0.05)):
        mine += seeds("gmp", 0.8, 0.8, 0.8, **{flag: value})
        mine += seeds("criticality", *(0.8 + gain * k for k in (1, 1.1, 0.9)), regen=0.5,
                      **{flag: value})
    words = "every 50 steps" if flag == "interval" else f"{flag.replace('_', ' ')} {other}"
    for some in (mine, mine[::-1]):
        ((verdict, here),) = found_in(some).values()
        assert verdict == "holds" and here.count("above") == 2
        assert "+1.0 (+0.8 to +1.2) above" in here and "+5.0 (+3.8 to +6.2) above" in here
        assert ["+5.0" in text for text in here.split("; ") if words in text] == [True]


@pytest.mark.parametrize("flag, usual, other", [
    ("l1", 0.003, 0.01), ("finetune_l1", False, True), ("regen_base", "all", "pruned")])
def test_channels_too(flag, usual, other):
    mine = []
    for value, gain in ((usual, 0.01), (other, 0.05)):
        more = {"pruned": "channels", flag: value}
        mine += seeds("slimming", 0.8, 0.8, 0.8, **more)
        mine += seeds("criticality", *(0.8 + gain * k for k in (1, 1.1, 0.9)), regen=0.3, **more)
        # at a share of the channels the MACs differ
        more |= dict(target_macs=None, prune_ratio=0.5)
        mine += seeds("slimming", 0.8, 0.81, **more) + seeds("criticality", 0.9, 0.9, regen=0.3,
                                                            **more)
    assert list(found_in(mine)) == [CHANNELS]
    verdict, here = found_in(mine)[CHANNELS]
    assert verdict == "holds" and here.count("-70 % MACs +") == 2 and "channels" not in here
    words = f"{flag.replace('_', ' ')} "
    if flag == "regen_base":  # it means nothing to slimming
        assert words in here
    assert f"{words}{usual}: -70 % MACs +1.0" in here and f"{words}{other}: -70 % MACs +5.0" in here


def test_lengths_of_two_targets_and_intervals_are_all_told():
    mine = []
    for sparsity, rate in ((0.9, 0.5), (0.95, 0.2)):
        for interval in (25, 50):
            for length in (2, 8) if interval == 25 else (8, 2):
                more = dict(sparsity=sparsity, interval=interval, epochs_prune=length)
                mine += seeds("gmp", 0.8, 0.8, 0.8, **more)
                gain = length + 10 * (interval == 50) + 20 * (sparsity == 0.95)
                mine += seeds("criticality", *(0.8 + gain * k / 1000 for k in (1, 1.001, 0.999)),
                              regen=rate, **more)
    verdict, here = found_in(mine)[LENGTHS]
    assert verdict == "holds"
    texts = dict(text.split(": ") for text in here.split("; "))
    assert {name: text.count("above") for name, text in texts.items()} == {
        "d, small, T = 4, interval 25": 4, "d, small, T = 4, interval 50": 4}
    for where in ("90 % sparse, 2 epochs +0.2 ", "95 % sparse, 8 epochs +2.8 "):
        assert where in texts["d, small, T = 4, interval 25"]
    # one length at which it cannot be told, and one length by itself
    low = [one for one in mine if one.config["epochs_prune"] == 2 and one.method == "criticality"]
    low[0].summary["test_accuracy"] = 0.9
    assert found_in(mine)[LENGTHS][0] == "cannot be told here"
    one = seeds("gmp", 0.8, 0.8, 0.8) + seeds("criticality", 0.9, 0.901, 0.899, regen=0.5)
    assert LENGTHS not in found_in(one)
    one += [run("criticality", 0, 0.9, regen=0.5, epochs_prune=2), run("gmp", 0, epochs_prune=2)]
    verdict, here = found_in(one)[LENGTHS]
    assert verdict == "cannot be told here" and here.count("above") == 1
    one += seeds("gmp", 0.9, 0.901, 0.899, epochs_prune=3)
    one += seeds("criticality", 0.8, 0.8, 0.8, regen=0.5, epochs_prune=3)
    assert found_in(one)[LENGTHS][0] == "does not hold"


def test_a_rate_that_is_not_the_paper_s_is_named():
    mine = seeds("gmp", 0.8, 0.8) + seeds("random", 0.7, 0.71, regen=0.3)
    mine += seeds("random", 0.9, 0.91, regen=0.5) + seeds("criticality", 0.8, 0.81, regen=0.3)
    said = found_in(mine)
    assert ": r = 0.3 +0.5 (" in said[GAIN][1]
    here = said["criticality is above random regeneration at the same r"][1]
    assert here.endswith(": 90 % sparse, r = 0.3 +10.0")


def test_other_methods_may_have_a_weight_decay_of_their_own():
    mine = seeds("criticality", 0.8, 0.81, regen=0.5) + seeds("imp", 0.7, 0.7, weight_decay=0.0)
    for one in mine[2:]:
        one.script = "prune_lottery"
    assert "criticality is above LTH-SNN (IMP)" in found_in(mine)
    mine = seeds("criticality", 0.8, 0.81, regen=0.5) + seeds("gmp", 0.7, 0.7, weight_decay=0.0)
    assert verdicts.table(mine, {}) is None


def test_what_figures_say():
    back = [dict(what="alive weights", share=54.14), dict(what="plain cut", share=3.0)]
    end = (". The measure follows from r (Eq. 7), whatever ranks the weights: of channels it is r, of "
           "weights r or a little more; as published r times the share of the alive weights outside "
           "the classifier, or a little more")
    weights = run("criticality", regen=0.5)
    said = found_in([], dict(survival=(None, back, [weights], "")))
    assert list(said.values()) == [
        ("true by construction", f"weights: {SETTING}, 90 % sparse, r = 0.5: 54.1 %{end}")]
    back.append(dict(what="alive channels", share=30.0))
    channels = run("criticality", regen=0.3, pruned="channels", as_published=STRUCTURED)
    ((_, here),) = found_in([], dict(survival=(None, back, [weights, channels], ""))).values()
    assert here.endswith("r = 0.5: 54.1 %; channels: d, small, T = 4, 8 + 4 epochs, -70 % MACs, "
                         f"as published, r = 0.3: 30.0 %{end}")

    def importance(*values, seeds=(0, 1), std=0.04):
        rows = [dict(normalisation="share of the mean", method=method, importance=value, std=std)
                for method, pair in zip(("criticality", "slimming"), values) for value in pair]
        used = [run("criticality", seed, pruned="channels") for seed in seeds]
        ((verdict, here),) = found_in([], dict(importance=(None, rows, used, ""))).values()
        place = "channels: d, small, T = 4, 8 + 4 epochs, -70 % MACs"
        assert here.startswith(f"{place}{', one seed' * (len(seeds) == 1)}: criticality's go from ")
        return verdict

    assert importance((0.5, 0.9), (1.2, 0.8)) == "holds"
    assert importance((0.5, 0.7), (1.2, 0.8)) == "does not hold"  # gains, and does not pass
    assert importance((0.99, 0.9), (1.2, 0.8)) == "does not hold"
    assert importance((0.95, 0.9), (1.2, 0.8), std=0.03) == "cannot be told here"  # by 0.05 of 0.06
    assert importance((0.5, 0.9), (1.2, 0.8), std=0.06) == "cannot be told here"  # by 0.1 of 0.12
    assert importance((0.5, 0.9), (1.2, 0.8), seeds=(0,)) == "cannot be told here"

    def analysed(won, seeds, pruned="weights"):
        used = []
        for seed in seeds:
            for method, lower in ((records.BASELINE[pruned], 0), ("criticality", won)):
                used.append(run(method, seed, pruned=pruned, regen=0.5 * (method == "criticality")))
                used[-1].files["analysis"] = dict(variance=2 - (np.arange(4) < lower),
                                                  similarity=np.ones(4))
        return used

    def variance(won, seeds=(0, 1), beside=()):
        """won: classes of four in which criticality's is lower, at each seed."""
        said = found_in([*analysed(won, seeds), *beside])
        verdict, here = said["features vary less within a class than the baseline's"]
        assert here.partition("; ")[0] == (
            f"{SETTING}, an update every 25 steps: 90 % sparse lower in {25 * won} % of the classes"
            + ", one seed" * (len(seeds) == 1))
        return verdict

    assert [variance(won) for won in (4, 3, 2, 1)] == [
        "holds", "holds", "cannot be told here", "does not hold"]
    assert variance(4, seeds=(0,)) == "cannot be told here"
    # of one seed beside three of channels the channels alone count
    assert variance(0, seeds=(0,), beside=analysed(4, (0, 1, 2), "channels")) == "holds"
    assert variance(4, beside=analysed(0, (0, 1, 2), "channels")) == "does not hold"
    others = analysed(2, (0, 1))
    for one in others:
        one.config["interval"] = 50
    assert variance(4, beside=others) == "cannot be told here"
    del others[0].files["analysis"]  # no figure has looked at it
    assert variance(4, beside=others[:2]) == "holds"


def test_a_table_as_text(tmp_path):
    mine = seeds("gmp", 0.8, 0.8) + seeds("criticality", 0.9, 0.79, regen=0.5)
    for more in (dict(interval=50), dict(interval=50, as_published=ALL)):  # one begins as the other
        mine += seeds("gmp", 0.8, 0.8, **more) + seeds("criticality", 0.9, 0.91, regen=0.5, **more)
    # channels at an equal share of the MACs count in pairs, at one of the channels do not
    mine += seeds("slimming", 0.8, 0.8, pruned="channels")
    mine += seeds("criticality", 0.8, 0.7, regen=0.3, pruned="channels")
    share = dict(pruned="channels", target_macs=None, prune_ratio=0.5)
    mine += seeds("slimming", 0.8, 0.8, **share) + seeds("criticality", 0.1, 0.1, regen=0.3, **share)
    back = [dict(what="alive channels", share=30.0)]
    table = verdicts.table(mine, dict(survival=(None, back, mine[-6:-4], "")))
    verdicts.write(tmp_path / "verdicts.md", table, mine)
    lines = (tmp_path / "verdicts.md").read_text().splitlines()
    assert f"| channels: {SETTING}, -70 % MACs, r = 0.3: 30.0 %. The measure" in lines.pop(3)
    assert lines.pop(3).startswith(f"| {CHANNELS} | cannot be told here | **D**: -70 % MACs -5.0 (")
    assert lines == [
        "| the paper says | verdict | here |", "| --- | --- | --- |",
        f"| {GAIN} | cannot be told here | **A**: +4.5 (-65.4 to +74.4); **B**: +10.5 (+4.1 to +16.9); "
        "**C**: +10.5 (+4.1 to +16.9) |", "",
        f"- **A** weights: {SETTING}, an update every 25 steps",
        f"- **B** weights: {SETTING}, an update every 50 steps",
        f"- **C** weights: {SETTING}, an update every 50 steps, as published",
        f"- **D** channels: {SETTING}", "",
        "Weights: criticality's mean is below GMP's in 0 of 3 cases (a setting and a target), its "
        "accuracy in 1 of 6 pairs of one seed; +8.5 points over all pairs.", "",
        "Channels: criticality's mean is below slimming's in 1 of 1 cases (a setting and a target), its "
        "accuracy in 1 of 2 pairs of one seed; -5.0 points over all pairs."]


def test_more_settings_than_letters(tmp_path):
    mine = []
    for interval in range(1, 28):
        mine += seeds("gmp", 0.8, interval=interval)
        mine += seeds("criticality", 0.9, regen=0.5, interval=interval)
        for one in mine[-2:]:
            one.files["analysis"] = dict(variance=np.ones(4), similarity=np.ones(4))
    verdicts.write(tmp_path / "verdicts.md", verdicts.table(mine, {}), mine)
    text = (tmp_path / "verdicts.md").read_text()
    assert text.count("**Z**") == text.count("**AA**") == 3 and "- **AA** weights: d" in text


def test_an_analysis_that_is_damaged_or_of_another_network_is_left_out(tmp_path, monkeypatch):
    """None is computed, for which the data would be loaded."""
    monkeypatch.setattr(records, "analyse", None)
    mine = seeds("gmp", 0.8, 0.8) + seeds("criticality", 0.8, 0.81, regen=0.5)
    for number, one in enumerate(mine):
        one.folder = tmp_path / str(number)
        one.folder.mkdir()
        (one.folder / "analysis.npz").write_bytes(b"no archive")
    assert not any("features" in claim for claim in found_in(mine))
    for one in mine:
        one.files.clear()
        (one.folder / "model.pt").write_bytes(b"a network")
        np.savez(one.folder / "analysis.npz", variance=np.ones(4), similarity=np.ones(4),
                 made_from="another")
    assert not any("features" in claim for claim in found_in(mine))
    for one in mine:
        one.files.clear()
        (one.folder / "model.pt").unlink()
    assert sum("features" in claim for claim in found_in(mine)) == 2
