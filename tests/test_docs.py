"""The documents say what is true: links lead somewhere, commands and settings exist, the reference is fresh."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoConfig

import tunesmith
from conftest import ROOT, SHARED, needs_shared
from tunesmith import hub, models
from tunesmith import recipe as recipes
from tunesmith.cli import app
from tunesmith.data import records
from tunesmith.errors import RecipeError
from tunesmith.types import Conversation, Fault, Message, Origin

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GROUP: Any = typer.main.get_command(app)
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # of click, or of the copy that newer versions of typer carry
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fenced(text: str, language: str | None = None) -> Iterator[str]:
    """The bodies of the fenced blocks, of one language or of all."""
    yield from (body for kind, body in _FENCE.findall(text) if language is None or kind == language)


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of every `tunesmith …` line of the fenced blocks; words before it may set the environment, and
    files that it reads from or writes to may come after it."""
    for block in fenced(text):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:  # not a command line
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words and Path(words[0]).name == "tunesmith":
                yield [word for before, word in pairwise(words) if before not in "<>" and word not in "<>"]


def problem_of_command(arguments: list[str]) -> str | None:
    """What the app would say about its command line; nothing is run."""
    if not arguments or arguments[0] not in GROUP.commands:
        return f"no such command: {arguments}"
    command = GROUP.commands[arguments[0]]
    try:
        context = command.make_context(arguments[0], arguments[1:])
    except _USAGE_ERROR as error:
        return f"{arguments[0]}: {error.format_message()}"
    try:
        recipes.resolve(flags=dict(recipes.parse_flag(text) for text in context.params.get("sets") or []))
    except RecipeError as error:
        return str(error)
    return None


PAGES_WITH_COMMANDS = [page for page in PAGES if list(command_lines(page.read_text(encoding="utf-8")))]


def test_the_documents_are_there() -> None:
    assert {name_of(page) for page in PAGES} >= {
        "README.md", "README.zh.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/design.md", "docs/log.md",
        "docs/models/README.md", "docs/reference/settings.md", "docs/reference/commands.md",
    }  # fmt: skip
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert len(PAGES_WITH_COMMANDS) >= 9


def test_the_reference_is_fresh() -> None:
    pinned = dict(re.findall(r"^(typer|rich|pydantic)==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M))
    here = {name: importlib.metadata.version(name) for name in pinned}
    if here != pinned:
        pytest.skip(f"the pages are laid out as the pinned versions do it ({pinned}), and here are {here}")
    script = ROOT / "scripts" / "write_reference.py"
    result = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_stale_reference_is_seen(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "write_reference.py"
    script.write_bytes((ROOT / "scripts" / "write_reference.py").read_bytes())
    stale = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert (stale.returncode, stale.stderr) == (1, "")
    assert "settings.md" in stale.stdout and not (tmp_path / "docs").exists()


@pytest.mark.parametrize(("marker", "command"), [("run", "make demo"), ("test", "make test")])
def test_the_readme_has_its_two_marked_commands(marker: str, command: str) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines.count(f"<!-- {marker} -->") == 1
    after = lines[lines.index(f"<!-- {marker} -->") + 1 :]
    assert after[:3] == ["```", command, "```"]
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = [link for link in _LINK.findall(text) if "://" not in link]
    paths = {link: (page.parent / link.partition("#")[0]).resolve() if link[0] != "#" else page for link in targets}
    pictures = ROOT / "docs" / "images"
    missing = [link for link, path in paths.items() if not path.exists()]
    assert [link for link in missing if pictures not in paths[link].parents] == []
    for link, path in paths.items():
        if "#" in link and path.suffix == ".md":
            assert link.partition("#")[2] in anchors(path), f"{link}: no such heading"
    if missing:
        pytest.skip(f"pictures that are still to be drawn: {', '.join(missing)}")


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=name_of)
def test_commands_and_their_settings_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lines = list(command_lines(text))
    if page.name == "commands.md":  # written from the commands themselves
        lines = []
    assert [problem for line in lines if (problem := problem_of_command(line))] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_settings_in_running_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"`tunesmith ([a-z]+)\b", text):
        assert command in GROUP.commands
    known = recipes.setting_names()
    named = re.findall(r"--set[ =]([a-z]+\.[\w.]+)=", text)
    named += re.findall(rf"`((?:{'|'.join(recipes.Recipe.model_fields)})\.[a-z][\w.]+)(?:=[^`]*)?`", text)
    for name in named:
        base = "data.columns" if name.startswith("data.columns.") else name
        assert base in known or Path(name).suffix in (".py", ".yaml", ".html", ".json"), name


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("tunesmith teach --model smollm2", "no such command"),
        ("tunesmith train --modle smollm2", "--modle"),
        ("tunesmith chat", "run_or_model"),
        ("tunesmith check --show -1", "--show"),
        ("TUNESMITH_HUB=ms tunesmith train --set lora.rnak=8", "lora.rnak"),
        ("$ .venv/bin/tunesmith train \\\n  --set lora.r=0", "lora.r"),
    ],
)
def test_a_command_that_does_not_exist_is_seen(line: str, says: str) -> None:
    (arguments,) = command_lines(f"```\n{line}\n```\n")
    assert says in (problem_of_command(arguments) or "")


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_rows_recipes_and_python_of_the_readmes_are_right(page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    (rows,) = fenced(text, "json")
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    rows = list(records.open_file(tmp_path / "rows.jsonl").rows())
    assert len(rows) == 3 and not any(isinstance(row, Fault) for row in rows)
    (recipe,) = fenced(text, "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert recipes.resolve(tmp_path / "recipe.yaml")[0].train.learning_rate == 2e-4
    (code,) = fenced(text, "python")
    ast.parse(code)
    assert set(re.findall(r"\btunesmith\.(\w+)", code)) <= set(tunesmith.__all__)
    assert [name for name in tunesmith.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("name", list(hub.aliases()))
def test_every_alias_has_its_page_and_its_line(name: str) -> None:
    alias = hub.aliases()[name]
    (link,) = re.findall(rf"\[(?:[^]]*, )?{re.escape(name)}(?:, [^]]*)?\]\((.*)\)", text_of("docs/models/README.md"))
    page = text_of(f"docs/models/{link}")
    assert f"{alias.parameters:,}" in page
    for source in (alias.hf, alias.ms):
        assert source is None or source in page
    assert [stop for stop in alias.stop_ids if str(stop) not in page] == []
    for readme in ("README.md", "README.zh.md"):
        assert f"| [`{name}`](docs/models/{link}) |" in text_of(readme)


PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_models_size_layers_and_reach_are_those_of_its_published_config(name: str) -> None:
    settings = dict(PUBLISHED[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    skeleton = models.skeleton(config)
    assert sum(parameter.numel() for parameter in skeleton.parameters()) == hub.aliases()[name].parameters
    (link,) = re.findall(rf"\[(?:[^]]*, )?{re.escape(name)}(?:, [^]]*)?\]\((.*)\)", text_of("docs/models/README.md"))
    page = text_of(f"docs/models/{link}")
    assert f"{models.context_length(config):,} tokens" in page or f"{name} {models.context_length(config):,}" in page
    head, shapes, trained = layers_of(page, name)
    assert head == config.get_text_config().num_hidden_layers
    layers = [module for path, module in skeleton.named_modules() if path.endswith("layers.0") and "vision" not in path]
    (layer,) = layers
    linear = {
        path.rpartition(".")[2]: m.weight.shape for path, m in layer.named_modules() if hasattr(m, "out_features")
    }
    assert shapes == {name: "×".join(map(str, shape)) for name, shape in linear.items()}
    targets = models.targets(skeleton, recipes.LoraSettings(r=8))
    assert trained is None or trained == sum(target.parameters for target in targets)


def layers_of(page: str, name: str) -> tuple[int, dict[str, str], int | None]:
    """How many layers a page says a model has, the shapes of their linear parts by name, and how much is trained."""
    head = re.search(r"^\| linear layers \| of each \| (.*) \| trained at r=8 \|$", page, re.M)
    if head is None:  # one model alone
        count = re.search(r"linear layers, (\d+) of each", page)
        assert count is not None
        pairs = [part.split() for part in cell(page, "linear layers").split(" · ")]
        (trained,) = numbers(cell(page, "trained at r=8"))
        return int(count[1]), dict(pairs), trained
    cells = re.search(rf"^\| `{re.escape(name)}` \| (\d+) \| (.*) \| ([\d,]+|–) \|$", page, re.M)
    assert cells is not None
    pairs = zip(head[1].split(" | "), cells[2].split(" | "), strict=True)
    shapes = {f"{part}_proj": shape for parts, shape in pairs for part in parts.split(", ")}
    return int(cells[1]), shapes, None if cells[3] == "–" else int(cells[3].replace(",", ""))


def cell(page: str, name: str) -> str:
    """What stands beside a name in a page's table."""
    (found,) = re.findall(rf"^\| {name}[^|]* \| (.*) \|$", page, re.M)
    return found


def numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"(?<![\w×])\d[\d,]*(?![\w×])", text)]


def page_and_folder(alias: str) -> tuple[str, Path]:
    page = (ROOT / "docs" / "models" / f"{alias}.md").read_text(encoding="utf-8")
    return page, SHARED / "models" / {"atom-7b": "atom-7b-standin"}.get(alias, alias)


@needs_shared
@pytest.mark.parametrize("alias", ["phi-3-mini", "gemma-2b", "atom-7b", "phi-4", "deepseek-7b"])
@pytest.mark.filterwarnings("ignore")  # transformers has notes on some of these tokenizers
def test_a_models_page_shows_the_ids_and_layers_it_has(alias: str) -> None:
    page, folder = page_and_folder(alias)
    renderer = models.open_renderer(hub.locate(str(folder), weights=False), recipes.TemplateSettings())
    talk = (Message("user", "Who are you?"), Message("assistant", "A keeper."))
    (document,) = renderer.render(Conversation(talk, Origin("page", 1)))
    shown = cell(page, "as ids")
    assert numbers(shown.replace("*", "")) == list(document.token_ids)
    ((start, stop),) = document.replies
    assert numbers(shown.split("**")[1]) == list(document.token_ids[start:stop])
    assert numbers(cell(page, "stop ids"))[: len(renderer.template.stop_ids)] == list(renderer.template.stop_ids)
    config = models.load_config(folder)
    targets = models.targets(models.skeleton(config), recipes.LoraSettings(r=8))
    assert numbers(cell(page, "trained at r=8")) == [sum(target.parameters for target in targets)]
    layers = cell(page, "linear layers") + re.search(r"linear layers, (\d+) of each", page)[0]  # type: ignore[index]
    assert f"linear layers, {config.num_hidden_layers} of each" in layers
    assert all(re.search(rf"\b{target.name.removesuffix('_proj')}(_proj)?\b", layers) for target in targets)
    assert numbers(cell(page, "reads")) == [models.context_length(config)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_have_as_many_cells_in_every_line(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
