"""README.md and docs/*.md: tables are those of today, links and paths lead somewhere, what is shown is valid."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from merge3.client.cli import app
from merge3.client.study_config import StudyConfig, World, read_study
from merge3.methods import LEARNED, METHODS, VARIANTS, ZIPPED
from merge3.search.config import EvolveConfig, Genome, Task
from merge3.tasks import read_items
from merge3.tasks.kinds import in_files
from merge3_server.cli import app as server_app
from tests.cli.test_readme import blocks

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_LINKS = [*DOCUMENTS, ROOT / "server" / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
SUFFIXES = ("py", "h", "proto", "md", "svg", "yaml", "json")


def named(file):
    return str(file.relative_to(ROOT))


def rows_of(text, beginning="| "):
    """Cells of the table rows that begin so."""
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(beginning)
    ]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("update_docs", ROOT / "benchmarks" / "update_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- generated tables


def test_tables_are_what_the_script_writes(script):
    known = script.tables()
    assert script.documents() == DOCUMENTS
    for file in DOCUMENTS:
        text = file.read_text()
        assert script.updated(text, known, file.name) == text, f"{named(file)}: run python benchmarks/update_docs.py"


def test_every_table_has_its_place(script):
    """Each result once in a page of docs/, and the README's short one."""
    placed = [name for file in DOCUMENTS for name in re.findall(r"^<!-- table (\w+) -->$", file.read_text(), re.M)]
    assert sorted(placed) == sorted(script.tables())


def test_a_mark_without_a_table_is_an_error(script):
    with pytest.raises(KeyError, match=r"page\.md: no table 'swop'"):
        script.updated("<!-- table swop -->\n<!-- /table -->", script.tables(), "page.md")


def test_the_short_table_holds_the_best_baseline_of_every_seed(script):
    _, *short = rows_of(script.tables()["demo_short"])
    _, *whole = rows_of(script.tables()["demo"])
    assert [short[0][0], short[-1][0]] == ["**evolved**", "base"] and len(short) <= 6
    baselines = [row for row in whole[1:] if re.fullmatch(r"0\.\d+", row[1])]
    assert len(baselines) == 10
    for seed in (1, 2, 3):
        assert max(row[seed] for row in baselines) in [row[seed] for row in short[1:]]


def test_the_methods_page_is_the_table_of_methods():
    """Read from the page, not from the script: every method in order, its parameters, their defaults."""
    first, second = (ROOT / "docs" / "methods.md").read_text().split("## Parameters")
    _, *rows = rows_of(first)
    names = [re.match(r"\[?(\w+)", row[0])[1] for row in rows]
    assert names == list(METHODS)
    for name, row in zip(names, rows):
        assert row[1] == METHODS[name].summary, name
        assert re.findall(r"`(\w+)`", row[3]) == list(METHODS[name].parameters), name
        assert re.findall(r"`(\w+)`", row[4]) == list(METHODS[name].searched), name
        assert row[5:] == [METHODS[name].needs, METHODS[name].result], name
    told = {(row[0].strip("`"), name): row for row in rows_of(second, "| `") for name in row[6].split(", ")}
    assert told.keys() == {(parameter, name) for name in METHODS for parameter in METHODS[name].parameters}
    for (parameter, name), row in told.items():
        spec = METHODS[name].parameters[parameter]
        assert row[1] == spec.help and bool(row[5]) == (parameter in METHODS[name].genes)
        assert row[3] in ("required", "none") or yaml.safe_load(row[3]) == pytest.approx(spec.default)


def test_the_methods_page_names_what_is_learned():
    _, text = (ROOT / "docs" / "methods.md").read_text().split("## Learned, for each task, or of strangers")
    _, *rows = rows_of(text)
    told = {re.match(r"\[(.+?)\]", row[0])[1]: row[1:] for row in rows}
    rows = (LEARNED | VARIANTS | ZIPPED).items()
    assert told == {name: [row.summary, row.needs, row.result] for name, row in rows}


# -- links and paths


def anchors(file):
    """Headings as links name them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", WITH_LINKS, ids=named)
def test_links_lead_to_files_and_headings(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", file.read_text())):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), f"{named(file)}: {target}"
        assert not anchor or anchor in anchors(there), f"{named(file)}: no heading {target}"


def exists(name, *folders):
    return any((folder / name).exists() for folder in folders)


def test_paths_of_the_path_table_exist():
    table = re.search(r"^\| step \|.*?\n\n", (ROOT / "README.md").read_text(), re.M | re.S)[0]
    paths = [path for row in rows_of(table) for path in re.findall(r"`([^`]+)`", row[2])]
    assert len(paths) > 15
    assert [path for path in paths if not exists(path, ROOT / "merge3", ROOT)] == []


def tree():
    """(folder, name) of every path in the README's file tree: left of two spaces what a line is about, right of them
    what is inside."""
    text = re.search(r"^```\n(csrc/.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    for line in text.splitlines():
        parent = ROOT / "merge3" if line.startswith("  ") else ROOT
        left, _, right = line.strip().partition("  ")
        for name in left.split():
            yield parent, name
        inside = [parent / name for name in left.split() if name.endswith("/")] or [parent]
        for name in re.findall(rf"[\w/]+(?:/|\.(?:{'|'.join(SUFFIXES)}))(?![\w.])", right):
            yield next((folder for folder in inside if (folder / name).exists()), inside[0]), name


def test_paths_of_the_file_tree_exist():
    paths = list(tree())
    assert len(paths) > 40
    assert [str((folder / name).relative_to(ROOT)) for folder, name in paths if not (folder / name).exists()] == []


def test_the_file_tree_names_every_module():
    told = {name.strip("/") for folder, name in tree() if folder == ROOT / "merge3"}
    found = {p.name for p in (ROOT / "merge3").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__.py"} - told == set()


@pytest.mark.parametrize("file", DOCUMENTS, ids=named)
def test_paths_in_the_text_exist(file):
    """Scripts, tests and sources that a sentence names, from the repository's root on."""
    text = FENCE.sub("", file.read_text())
    folders = "benchmarks|tests|csrc|merge3|server|examples"
    for path in re.findall(rf"(?<![\w/])((?:{folders})/[\w/]+\.(?:{'|'.join(SUFFIXES)}))\b", text):
        assert (ROOT / path).exists(), f"{named(file)}: {path}"


# -- what is shown


@pytest.mark.parametrize("file", WITH_LINKS, ids=named)
def test_make_has_the_targets(file):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", file.read_text(), re.M)) <= targets


def shown_commands():
    for file in WITH_LINKS:
        for block in blocks(file):
            if block.language == "bash":
                for line in block.text.splitlines():
                    command = line.partition(" #")[0].strip()
                    if command.startswith("merge3-"):
                        yield pytest.param(command, id=f"{block.where}: {command}")


@pytest.mark.parametrize("command", shown_commands())
def test_shown_commands_and_their_options_exist(command):
    """Also of those that test_readme.py cannot run."""
    program, *words = shlex.split(command)
    group = typer.main.get_command({"merge3-client": app, "merge3-server": server_app}[program])
    known = []
    for parameter in group.commands[words[0]].params:
        known += [*parameter.opts, *parameter.secondary_opts]
    assert {word for word in words if word.startswith("--")} <= set(known)


def test_shown_items_are_items(tmp_path):
    shown = [block for block in blocks(ROOT / "docs" / "items.md") if block.language == "json"]
    (tmp_path / "items.jsonl").write_text("".join(block.text for block in shown))
    assert {item.kind for item in read_items(tmp_path / "items.jsonl")} == set(in_files())


def test_shown_configurations_are_valid():
    """The page's whole one, the parts with a start and with a fit, that of a path, those with stages, rounds, several
    objectives and workers, and calibration's part in it."""
    pages = [ROOT / "docs" / "evolve.md", ROOT / "docs" / "calibration.md"]
    shown = [yaml.safe_load(block.text) for file in pages for block in blocks(file) if block.language == "yaml"]
    whole, started, fitted, path, stages, rounds, several, workers, part = shown
    assert EvolveConfig.model_validate(whole | several).names == ("math", "length")
    assert EvolveConfig.model_validate(whole | workers).optimizer.asking == "steady"
    assert EvolveConfig.model_validate(whole | part).genome.models == ("./math", "./italian", "./code")
    assert EvolveConfig.model_validate(whole | started).genome.start == "./best-by-hand.yaml"
    assert EvolveConfig.model_validate(whole | fitted).fit == fitted["fit"]
    assert started["genome"].items() > whole["genome"].items()
    assert EvolveConfig.model_validate(path).genome.definition().kind == "path"
    assert [stage.space for stage in EvolveConfig.model_validate(whole | stages).stages] == ["parameters", "path"]
    assert EvolveConfig.model_validate(whole | rounds).optimizer.rounds == 2
    assert part.keys() == {"extract", "estimate", "optimizer", "race"}


def test_the_shown_study_is_valid_and_every_key_is_explained(tmp_path):
    page = ROOT / "docs" / "study.md"
    (shown,) = [block for block in blocks(page) if block.language == "yaml"]
    (tmp_path / "study.yaml").write_text(shown.text)
    config = read_study(tmp_path / "study.yaml")
    assert [method.label for method in config.methods] == ["linear", "task_arithmetic", "ties at 0.2"]
    explained = set(re.findall(r"`(\w+)`", page.read_text()))
    assert {*StudyConfig.model_fields, *World.model_fields} <= explained


def test_every_key_of_a_configuration_is_explained():
    text = (ROOT / "docs" / "evolve.md").read_text()
    for title, section in (("genome", Genome), ("tasks", Task)):
        table = re.search(rf"^\| `{title}` \|.*?\n\n", text, re.M | re.S)[0]
        assert set(section.model_fields) <= set(re.findall(r"`(\w+)`", table)), title
    explained = set(re.findall(r"`([\w.]+)`", text))
    for name, field in EvolveConfig.model_fields.items():
        if name not in ("genome", "tasks"):
            keys = getattr(field.annotation, "model_fields", None)
            expected = {f"{name}.{key}" for key in keys} if keys else {name}
            assert expected <= explained, expected - explained
