"""The text: every command is understood, every link resolves, every number is that of a log."""
import ast
import importlib
import json
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import modelfile
import models
from harness import flags, runfolder
from helpers import write_frames

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXTS = [path for path in (README, *sorted((ROOT / "docs").glob("*.md")),
                           ROOT / "results/README.md") if path.exists()]
START = ROOT / "results/runs/start/default"  # the run of the first command of README.md


def of_the_root(path):
    return str(path.relative_to(ROOT))


# ---- what a page is made of ----------------------------------------------------------------------


def code_blocks(text):
    """Return (language, lines) of each block: fenced, or indented by four spaces after an empty
    line."""
    blocks, fence, indented, before = [], None, None, ""
    for line in text.splitlines():
        if fence is not None:
            if line.strip() == fence:
                fence = None
            else:
                blocks[-1][1].append(line)
        elif line.lstrip().startswith("```"):
            fence, indented = "```", None
            blocks.append((line.strip()[3:], []))
        elif line.startswith("    ") and (indented is not None or not before.strip()):
            if indented is None:
                indented = []
                blocks.append(("", indented))
            indented.append(line[4:])
        elif line.strip():
            indented = None
        before = line
    return blocks


def prose(text):
    """Return a page without its blocks of code and its code in a line."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    text = re.sub(r"(?:^\n)(?:^    .*\n)+", "\n", text, flags=re.M)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text):
    """Return the anchors that GitHub gives the headings of a page."""
    found, fenced = [], re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    for heading in re.findall(r"^#{1,6} +(.*?) *$", fenced, re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found + re.findall(r'<a (?:id|name)="([^"]+)"', text)


def links(text):
    """Return the targets of the links and images of a page that stay in this project."""
    text = prose(text)
    found = re.findall(r"\]\(<?([^)\s>]+)>?(?: +\"[^\"]*\")?\)", text)
    found += re.findall(r"^ *\[[^\]]+\]: +(\S+)", text, re.M)
    found += re.findall(r"<(?:img|a|source)[^>]* (?:src|href|srcset)=\"([^\"]+)\"", text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def expand(command, values):
    """Return the commands that a shell makes of one, for each value of its variables."""
    name = re.search(r"\$(\w+)", command)
    if name is None:
        return [command]
    return [whole for value in values[name[1]] for whole in expand(
        command[:name.start()] + value + command[name.end():], values)]


def commands(text, each_value=True):
    """Return the commands of a page that start Python or torchrun, as lists of words; for each
    value of a variable of the shell, or for the first one alone."""
    found = []
    for language, lines in code_blocks(text):
        if language not in ("", "sh", "bash", "shell", "console", "text"):
            continue
        block, values = re.sub(r"\\\n *", " ", "\n".join(lines)), {}  # lines that go on
        for line in block.splitlines():
            if loop := re.match(r" *for (\w+) in (.*?); *do\b", line):
                values[loop[1]] = loop[2].split()[:None if each_value else 1]
            elif assignment := re.match(r" *(\w+)=\"([^\"]*)\"", line):
                values[assignment[1]] = [assignment[2]]
            for command in re.split(r"&&|;", line.removeprefix("$ ")):
                command = re.sub(r"^ *(?:do +)?(?:[A-Z_]+=\S+ +)*", "", command)
                if re.match(r"(?:\.venv/bin/)?(?:python3?|torchrun) ", command):
                    command = re.sub(r" +[#>].*", "", command.removeprefix(".venv/bin/"))
                    found += [shlex.split(whole) for whole in expand(command, values)]
    return found


def script_and_arguments(words):
    """Return (script.py, its arguments) of a command; None for what is no script of this
    project: python -m, python -c."""
    rest = words[1:]
    if words[0] == "torchrun":
        while rest and rest[0].startswith("-"):
            assert "=" in rest[0] or rest[0] == "--standalone", rest[0]
            rest = rest[1:]
    return None if not rest or rest[0].startswith("-") else (rest[0], rest[1:])


def all_commands(*paths, each_value=True):
    """Return the different (script, arguments in a line) of pages, sorted."""
    found = [script_and_arguments(words) for path in paths
             for words in commands(path.read_text(), each_value)]
    return sorted({(script, shlex.join(arguments)) for script, arguments in filter(None, found)})


def commands_in_the_scripts():
    """Return (script, arguments in a line) of the commands that docstrings of prune_*.py show."""
    found = set()
    for path in ROOT.glob("prune_*.py"):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        for words in commands(doc):
            script, arguments = script_and_arguments(words)
            found.add((script, shlex.join(arguments)))
    return sorted(found)


# ---- commands ------------------------------------------------------------------------------------


class Parsed(Exception):
    """The flags were right: nothing is run."""


def understand(script, arguments):
    """Parse the arguments of a script, and stop there; a wrong flag exits."""
    module = importlib.import_module(script.removesuffix(".py"))
    parse = flags.Parser.parse_args

    def stop(self, *given):
        parse(self, *given)
        raise Parsed

    if hasattr(module, "parse_args") and "--minutes" not in arguments:  # which starts a trial
        module.parse_args(arguments)
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(flags.Parser, "parse_args", stop)
            module.main(arguments)


def test_the_commands_in_the_scripts_are_understood():
    found = commands_in_the_scripts()
    assert len(found) > 20 and {script for script, _ in found} == {
        path.name for path in ROOT.glob("prune_*.py")}
    for script, arguments in found:
        if arguments != "--help":
            understand(script, shlex.split(arguments))


@pytest.mark.parametrize("script, arguments", all_commands(*TEXTS))
def test_the_commands_in_the_text_are_understood(script, arguments):
    if "/" in script:
        assert (ROOT / script).is_file()
        known = (ROOT / script).read_text()
        assert all(f'"{word}"' in known for word in arguments.split() if word.startswith("-"))
    elif arguments == "--help":
        assert (ROOT / script).is_file()
    else:
        understand(script, shlex.split(arguments))


def test_other_commands_name_files_that_are_there():
    for path in TEXTS:
        for words in commands(path.read_text()):
            if script_and_arguments(words) is None and words[1:3] == ["-m", "pytest"]:
                for word in words[3:]:
                    assert not word.endswith(".py") or (ROOT / word).is_file(), word
        for name in re.findall(r"pip install .*?-r (\S+)", path.read_text()):
            assert (ROOT / name.rstrip("`;.,)")).is_file(), name


def commands_to_run():
    """Return what is run: of commands with the same flags the first. A seed, a device and --resume
    of what is not there make no other command. Not what needs a model.pt, bf16, which takes minutes
    on a processor that has none, nor the larger experiments of results/."""
    found = {}
    for script, arguments in all_commands(README, *TEXTS, each_value=False):
        if script.startswith("prune_") and not re.search(
                "--help|--init|bf16|fashion-mnist|--width|--train-limit|--minutes", arguments):
            flags = set(re.findall(r"--[\w-]+", arguments)) - {"--seed", "--device", "--resume"}
            found.setdefault((script, *sorted(flags)), (script, arguments))
    return list(found.values())


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.parametrize("script, arguments", commands_to_run())
def test_each_pruning_command_in_the_text_runs(script, arguments):
    n = 300
    x = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    Path("data").mkdir()
    for path, images, classes in (("data/cifar100.npz", x, 100), ("data/cifar10.npz", x, 10),
                                  ("mine.npz", x, 10),
                                  ("data/mnist.npz", x[:, 2:30, 2:30, 0], 10)):
        y = np.arange(n) % classes
        np.savez(path, x_train=images, y_train=y, x_test=images[:100], y_test=y[:100])
    for name in ("dvs-gesture", "cifar10-dvs"):
        if name in arguments:  # few frames: this is about the command
            write_frames(name, 2, 11 if name == "dvs-gesture" else 10, each=(3, 1))
            arguments += " --time-steps 2 --batch-size 6"
    if re.search(r"--dataset (cifar10+|mnist)\b(?!-)", arguments):
        arguments += " --time-steps 2"  # of up to 20 in a large network
    module = importlib.import_module(script.removesuffix(".py"))
    summary = module.main([*shlex.split(arguments), "--smoke"])
    assert 0 <= summary["test_accuracy"] <= 1 and list(summary) == runfolder.SUMMARY_KEYS


def test_ci_runs_the_test_command_of_the_readme():
    last_line = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert last_line in [line.strip() for line in README.read_text().splitlines()]


# ---- code ----------------------------------------------------------------------------------------


PYTHON = [(of_the_root(path), number, "\n".join(lines)) for path in TEXTS
          for number, (language, lines) in enumerate(code_blocks(path.read_text()))
          if language in ("python", "py")]


def parts_of(code):
    """Return the syntax trees of a piece of Python: statements, and rows of a dict."""
    try:
        return [ast.parse(code)]
    except SyntaxError:
        parts = []
        for part in re.split(r"\n(?=\S| *\"[\w-]+\": )", textwrap.dedent(code)):
            is_row = re.match(r" *\"[\w-]+\": ", part)
            parts.append(ast.parse(f"{{{part}\n}}" if is_row else part))
        return parts


@pytest.mark.parametrize("path, number, code", PYTHON)
def test_python_in_the_text_uses_what_there_is(path, number, code):
    """It compiles, and each name that it takes from a module of this project is there."""
    nodes, known = [node for tree in parts_of(code) for node in ast.walk(tree)], {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:  # a name, or a module of a package
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (ROOT / f"{alias.name}.py").is_file():
                    known[alias.asname or alias.name] = importlib.import_module(alias.name)
    for node in nodes:
        if (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                and node.value.id in known):
            assert hasattr(known[node.value.id], node.attr), ast.unparse(node)


# ---- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEXTS, ids=of_the_root)
def test_each_link_and_image_resolves(path):
    for target in links(path.read_text()):
        name, _, anchor = target.partition("#")
        file = path if name == "" else path.parent / name
        assert file.exists(), f"{target} of {of_the_root(path)}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), f"{target} of {of_the_root(path)}"
        elif anchor:
            last = int(re.fullmatch(r"(?:L\d+-)?L(\d+)", anchor)[1])
            assert last <= len(file.read_text().splitlines()), target


def test_the_parser_of_pages_finds_what_is_there():
    """The tests above would pass on pages in which they see nothing."""
    page = ("# A title: [of](x.md) `two`\n\n## Part\n## Part\n\n"
            "    python prune_pq.py --seed 1  # x\n    torchrun --nproc-per-node=2 prune_pq.py\n\ntext [a](b.md#c) ![i](d/e.png \"f\") "
            "<img src=\"g.png\" width=9> [out](https://h.org) `[no](link)`\n\n"
            "```sh\nA=1 .venv/bin/python -m venv x && python analyze.py \\\n  --demo\n"
            "# python prune_no.py\n```\n\n[r]: k.md\n\n    text\n\n```\nfor s in 0 1; do\n"
            "  a=\"-b $s\"  # c\n  python prune_greg.py $a -d\ndone\n```\n")
    assert anchors(page) == ["a-title-of-two", "part", "part-1"]
    assert links(page) == ["x.md", "b.md#c", "d/e.png", "k.md", "g.png"]
    assert commands(page) == [
        ["python", "prune_pq.py", "--seed", "1"],
        ["torchrun", "--nproc-per-node=2", "prune_pq.py"],
        ["python", "-m", "venv", "x"], ["python", "analyze.py", "--demo"],
        ["python", "prune_greg.py", "-b", "0", "-d"], ["python", "prune_greg.py", "-b", "1", "-d"]]
    assert commands(page, each_value=False) == commands(page)[:-1]
    assert script_and_arguments(["torchrun", "--nproc-per-node=2", "a.py", "-b"]) == (
        "a.py", ["-b"])
    assert [language for language, _ in code_blocks(page)] == ["", "sh", "", ""]


def test_the_pages_are_there_and_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 250
    for name in ("docs/speed.md", "docs/data.md", "docs/runs.md", "results/README.md"):
        assert ROOT / name in TEXTS
        assert name in links(README.read_text()), f"README.md does not link to {name}"
    assert len(commands_to_run()) > 20 and len(PYTHON) > 1


# ---- numbers -------------------------------------------------------------------------------------


def test_the_network_in_results_is_that_of_its_log_and_of_the_readme():
    """It loads without training; kernels of other processors may turn an image or two."""
    net = models.load(START / "model.pt")
    summary = json.loads((START / "summary.json").read_text())
    images = data.load("fashion-mini")
    with torch.inference_mode():
        right = (net(images.x_test).sum(0).argmax(1) == images.y_test).double().mean().item()
    assert right == pytest.approx(summary["test_accuracy"], abs=0.005)
    alive = sum(int(mask.sum()) for mask in modelfile.read(START / "model.pt")["masks"].values())
    assert alive == sum(layer["alive"] for layer in summary["layers"])
    assert f"{100 * summary['test_accuracy']:.1f} %" in README.read_text()


def test_the_sample_log_is_that_of_the_run():
    """Wherever the text shows the end of a run, it is that of the first command of README.md."""
    summary = json.loads((START / "summary.json").read_text())
    shown = [line.strip() for path in TEXTS for line in path.read_text().splitlines()
             if re.match(r" *done in .*test accuracy at", line)]
    assert shown
    for line in shown:
        assert (f"{100 * summary['test_accuracy']:.2f} % test accuracy at "
                f"{100 * summary['sparsity']:.1f} % sparsity -> ") in line
