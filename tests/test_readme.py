"""README.md: the files that it names exist, its table of equations is true, its recipes work."""
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/README.md"]


def without_code(text):
    return re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.M | re.S)


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))


def test_each_page_of_docs_is_linked_from_the_readme():
    linked = {(ROOT / link).resolve() for link in links(ROOT / "README.md")}
    assert set(PAGES[1:]) <= linked
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_the_text_names_exist(page):
    """Names in backquotes that look like files of the repository."""
    named = re.findall(r"`((?:results|docs|harness|tests|assets)/[\w./-]*\w)`|`(\w+\.py)`",
                       page.read_text())
    for path in filter(None, (name for pair in named for name in pair)):
        assert (ROOT / path).exists(), path


def test_the_equations_are_where_the_table_says():
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 11))
    for number, places in rows:
        for file, names in re.findall(r"`(\w+)\.py`((?:, `[\w.]+`)+)", places):
            text = (ROOT / f"{file}.py").read_text()
            if number not in ("3", "7", "8"):  # the tag has a letter, or stands at the formula
                assert re.search(rf"# Eq\. {number}\b|# Eq\. {number}[ab:]", text), (number, file)
            for name in re.findall(r"`([\w.]+)`", names):
                thing = importlib.import_module(file)
                for part in name.split("."):
                    thing = getattr(thing, part)


# ---- the recipes ---------------------------------------------------------------------------------


def snippets():
    """Return the Python blocks of README.md under "Change it": metric, surrogate, network."""
    text = (ROOT / "README.md").read_text().partition("## Change it")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the code, to be changed."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("harness", "assets"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def test_the_recipes_work_as_written(checkout):
    """A metric, a surrogate and a network of one's own, in one run."""
    metric, surrogate, network = snippets()[:3]
    old = 'SCORES = {"criticality": criticality, "gradient": gradient, "random": random}\n'
    edit(checkout / "prune_unstructured.py", old, metric)
    functions, row = re.fullmatch(r"(.*\n)(\".*\n)", surrogate, re.S).groups()
    edit(checkout / "neurons.py", "SURROGATES = {  # name: (function, derivative)\n",
         f"{functions}SURROGATES = {{\n{row}")
    edit(checkout / "plans.py", "NETWORKS = {\n", f"NETWORKS = {{\n{network}")
    done = subprocess.run(
        [sys.executable, "prune_unstructured.py", "--smoke", "--metric", "size-criticality",
         "--surrogate", "sigmoid", "--model", "mine"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "size-criticality" in done.stdout and "model mine" in done.stdout


def test_a_method_of_one_s_own_works_as_written(checkout):
    """A copy of a script under another name, and three rows: it runs, and compare.py starts it."""
    length, defaults, row = snippets()[3].splitlines(keepends=True)
    script = (checkout / "prune_granet.py").read_text()
    (checkout / "prune_mine.py").write_text(script.replace("granet", "mine"))
    edit(checkout / "harness/presets.py", "LENGTH = {", f"LENGTH = {{{length}")
    edit(checkout / "harness/presets.py", "        granet=dict(sparsity=0.9, death_rate=0.5),\n",
         f"        granet=dict(sparsity=0.9, death_rate=0.5),\n{defaults}")
    edit(checkout / "compare.py", "WEIGHTS = {\n", f"WEIGHTS = {{\n{row}")

    def run(*words):
        done = subprocess.run([sys.executable, *words], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("prune_mine.py", "--smoke")
    assert len(list(checkout.glob("runs/*-mine-0.9-*/summary.json"))) == 1
    commands = run("compare.py", "--methods", "gmp", "mine", "--seeds", "1", "--dry-run")
    assert commands.count("\n") == 2 and "prune_mine.py --sparsity 0.9" in commands
