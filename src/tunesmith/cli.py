"""The command line: arguments become calls of the modules below; the only place that prints and sets exit codes.

What needs torch is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith import recipe as recipes
from tunesmith import records, rundir
from tunesmith.errors import DataError, MissingExtra, RecipeError, TunesmithError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith import hub
    from tunesmith.chat import Chat
    from tunesmith.checking import Checked
    from tunesmith.training import Run

app = typer.Typer(
    name="tunesmith",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="From a file of examples to a model that answers like them.",
)

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Alias, hub id or folder; `tunesmith models` lists the aliases.", show_default=False
    ),
]
DataOption = Annotated[
    str | None, typer.Option("--data", "-d", help="JSON, JSONL, CSV or Parquet file of examples.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting, for instance lora.r=16; may be repeated. All of them are listed below.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the libraries' own notes and warnings.")]
DetachOption = Annotated[
    bool, typer.Option("--detach", help="Go on in the background; closing the terminal does not stop it.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the run; must be new or empty.", show_default=False)
]


def _settings_help() -> str:
    lines = []
    for section, field in recipes.Recipe.model_fields.items():
        for name, setting in field.annotation.model_fields.items():  # type: ignore[union-attr]
            default = setting.get_default(call_default_factory=True)
            shown = (
                {None: "none", True: "true", False: "false", "": "–"}.get(default, default)
                if not isinstance(default, (dict, list))
                else "none"
            )
            lines.append(f"[cyan]{section}.{name}[/] \\[{shown}]  {setting.description}")
    return "[bold]Settings[/] (recipe.yaml or --set)\n\n" + "\n\n".join(lines)


_SETTINGS = _settings_help()
_CARD_SIZES = (8, 12, 16, 24, 48, 80)
_STATES = {"running": "cyan", "done": "green", "interrupted": "yellow", "failed": "red", "gone": "red"}
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # of click, or of the copy that newer versions of typer carry


@app.command()
def demo(out: OutOption = None, as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """The whole story on a small real model: check, train, before and after, report."""
    console = _start(verbose, as_json)
    from rich.rule import Rule

    from tunesmith import demo as demos
    from tunesmith import display
    from tunesmith.checking import check

    console.print(Rule("[bold]tunesmith demo", align="left"))
    console.print(
        "A small model (SmolLM2, 135 million numbers) learns to be [bold]Hester Quill[/], who keeps a lighthouse.\n"
    )
    settings, _ = demos.recipe()
    checked = check(settings, _fetched(console, settings.model.name, None, weights=True))
    display.show_check(console, checked, 2)
    console.print()
    with display.TrainingDisplay(console) as watcher:
        result = demos.demo(out, watcher, say=lambda text: console.print(f"\n{text}"))
    if not result.run.interrupted:
        pairs = list(zip(result.questions, result.before, result.after, strict=True))
        shown = [pairs[i] for i in demos.SHOWN]
        console.print(display.side_by_side([(q.question, b.reply.text, a.reply.text) for q, b, a in shown]))
        for name, judged in (("before", result.before), ("after", result.after)):
            character, right, stopped = (
                sum(flags)
                for flags in zip(
                    *((j.in_character, j.right, j.reply.stopped_by == "stop") for j in judged), strict=True
                )
            )
            console.print(
                f"{name:7}[bold]{character}[/] of {len(judged)} in character, {right} with the right fact, "
                f"{stopped} stopped by themselves"
            )
        console.print()
    display.show_run(console, result.run)
    if not result.run.interrupted:
        console.print("\n[bold]Next[/]")
        console.print(f"  tunesmith chat {result.run.path}", highlight=False)
        console.print("  tunesmith check --model smollm2 --data YOUR_ROWS.jsonl", highlight=False)
        console.print("  tunesmith train --model smollm2 --data YOUR_ROWS.jsonl --out runs/mine", highlight=False)
    if as_json:
        judgements = {
            name: [
                {
                    "question": q.question,
                    "reply": j.reply.text,
                    "in_character": j.in_character,
                    "right": j.right,
                    "stopped_by": j.reply.stopped_by,
                }
                for q, j in zip(result.questions, judged, strict=False)
            ]
            for name, judged in (("before", result.before), ("after", result.after))
        }
        _print_json({**display.run_json(result.run), **judgements})
    _end_of_run(result.run.interrupted)


@app.command(epilog=_SETTINGS)
def check(
    model: ModelOption = None,
    data: DataOption = None,
    sets: SetOption = None,
    show: Annotated[int, typer.Option(min=0, help="How many rows to show in colour.")] = 3,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Read and render every row; name the faults by line, or show that all is well. Needs no weights."""
    console = _start(verbose, as_json)
    settings, _ = _recipe(None, model, data, sets)  # what is wrong here is said before torch is loaded
    rows = _rows(settings)
    found = _fetched(console, settings.model.name, settings.model.revision, weights=False)
    from tunesmith import display

    checked = _checked(console, settings, found, rows)
    display.show_check(console, checked, show)
    if as_json:
        _print_json(display.check_json(checked, show))
    if not checked.ok:
        raise typer.Exit(2)
    if not checked.faults:
        console.print(
            "\n[green]All is well.[/] Every row's prompt is the prompt of chat, token for token, "
            "and its reply ends in a stop token."
        )


@app.command(epilog=_SETTINGS)
def plan(
    model: ModelOption = None,
    data: DataOption = None,
    sets: SetOption = None,
    memory: Annotated[str | None, typer.Option(help="As if so much were free, e.g. 24GiB.", show_default=False)] = None,
    card: Annotated[
        str | None, typer.Option(help="As if it were this graphics card, e.g. 'RTX 4090'.", show_default=False)
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="How it fits cards of 8 to 80 GiB.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Memory and time of a training before the start, by what takes them. Needs no weights."""
    console = _start(verbose, as_json)
    settings, _ = _recipe(None, model, data, sets)
    rows = _rows(settings)
    found = _fetched(console, settings.model.name, settings.model.revision, weights=False)
    from tunesmith import display, machines, planning

    size = None if memory is None else machines.parse_bytes(memory)
    machine = machines.this_machine(size) if card is None else machines.card(card, size)
    checked = _checked(console, settings, found, rows)
    checked.require_ok()
    if table:
        plans = planning.fitting(checked, _CARD_SIZES)
        display.show_fitting(console, plans)
        if as_json:
            _print_json({"table": [{"gib": gib, **made.as_dict()} for gib, made in plans]})
        return
    made = planning.plan(checked, machine)
    display.show_plan(console, made)
    if as_json:
        _print_json(made.as_dict())


@app.command(epilog=_SETTINGS)
def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="Settings in a file.", show_default=False)
    ] = None,
    model: ModelOption = None,
    data: DataOption = None,
    out: OutOption = None,
    sets: SetOption = None,
    detach: DetachOption = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Begin even if the plan says that it does not fit.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check, plan, train, save, report."""
    console = _start(verbose, as_json)
    settings, sources = _recipe(recipe, model, data, sets)  # what is wrong here is said before torch is loaded
    if out is not None:
        rundir.check_target(out)
    rows = _rows(settings)
    found = _fetched(console, settings.model.name, settings.model.revision, weights=False)
    from tunesmith import display
    from tunesmith.training import run_name, train

    checked = _checked(console, settings, found, rows)
    checked.require_ok()
    display.show_check(console, checked, 1)
    if detach:
        arguments = [*([str(recipe)] if recipe else []), *(["--anyway"] if anyway else [])]
        for option, values in (("--model", [model]), ("--data", [data]), ("--set", sets or [])):
            arguments += [text for value in values if value is not None for text in (option, value)]
        _go_on_detached(console, "train", arguments, out or rundir.free_name(Path("runs"), run_name(settings)), as_json)
        return
    with display.TrainingDisplay(console) as watcher:
        _fetched(console, settings.model.name, settings.model.revision, weights=True)
        run = train(settings, out, sources=sources, watcher=watcher, checked=checked, anyway=anyway)
    _show_trained(console, run, as_json)


@app.command()
def resume(
    run: RunArgument,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="train.epochs=N", help="Train for longer than was asked.", show_default=False),
    ] = None,
    detach: DetachOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Go on with a run that was stopped or killed, as if it never had been."""
    console = _start(verbose, as_json)
    rundir.check_resumable(run)
    epochs = _epochs(sets or [])
    if detach:
        _go_on_detached(console, "resume", [text for s in sets or [] for text in ("--set", s)], run, as_json)
        return
    from tunesmith import display
    from tunesmith.training import resume

    with display.TrainingDisplay(console) as watcher:
        result = resume(run, epochs=epochs, watcher=watcher)
    _show_trained(console, result, as_json)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = Path("runs"),
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """The runs of a folder: running, done, interrupted, failed, or gone (its process was killed)."""
    console = _start(verbose, as_json)
    from rich.table import Table

    from tunesmith.runs import all_in

    found = all_in(folder)
    if as_json:
        _print_json({"runs": [run.as_dict() for run in found]})
        return
    if not found:
        console.print(f"No runs in {folder}.", highlight=False)
        return
    table = Table(box=None, padding=(0, 2))
    for name in ("run", "state", "step", "loss", "model", "data", "began"):
        table.add_column(name, no_wrap=name == "run")
    for run in found:
        table.add_row(
            run.path.name,
            f"[{_STATES[run.state]}]{run.state}[/]",
            f"{run.step}/{run.n_steps}" if run.n_steps else "",
            "" if run.loss is None else f"{run.loss:.3f}",
            Path(run.model).name,
            Path(run.data).name,
            run.began.replace("T", " ")[:16],
        )
    console.print(table)


@app.command()
def watch(run: RunArgument, as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Follow a run of another process. Ctrl-C ends the watching alone; the exit code is that of the run."""
    console = _start(verbose, as_json)
    from tunesmith.runs import follow, state_of

    state = state_of(run)
    from tunesmith import display
    from tunesmith.trainer import StepMetrics

    with display.TrainingDisplay(console) as watcher:
        watcher.began(state.n_steps, run)
        for lines, n_steps in follow(run):
            metrics = [StepMetrics.of(line) for line in lines]
            watcher.went_on(metrics[:-1])
            watcher.stepped(metrics[-1], n_steps)
    state = state_of(run)
    console.print(f"{run}: [{_STATES[state.state]}]{state.state}[/] after step {state.step}/{state.n_steps}")
    if state.reason:
        console.print(state.reason, highlight=False)
    if state.state in ("interrupted", "gone", "failed"):
        console.print(f"Go on with: tunesmith resume {run}", highlight=False)
    if as_json:
        _print_json(state.as_dict())
    if state.exit_code:
        raise typer.Exit(state.exit_code)


@app.command()
def chat(
    run_or_model: Annotated[str, typer.Argument(help="A run's folder, or a model.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="Answer this once and end.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option(help="System text.", show_default=False)] = None,
    base: Annotated[bool, typer.Option("--base", help="Switch the adapter off.")] = False,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0 is greedy; default: as the model's generation config says.", show_default=False),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply in tokens.", show_default="512")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Talk with a run or a model."""
    console = _start(verbose, answer_on_stdout=True)
    if as_json and prompt is None:
        raise RecipeError("chat --json", "no --prompt", "one question to answer", "Add --prompt TEXT.")
    from tunesmith.chat import load
    from tunesmith.talk import Talk
    from tunesmith.types import Message

    if not Path(run_or_model).exists():
        _fetched(console, run_or_model, None, weights=True)
    loaded: Chat = load(run_or_model)
    if prompt is None:
        Talk(loaded, console, system=system, base=base, temperature=temperature, max_tokens=max_tokens).run()
        return
    messages = [*([Message("system", system)] if system else []), Message("user", prompt)]
    stream = None if as_json else lambda piece: print(piece, end="", flush=True)
    reply = loaded.reply(messages, temperature=temperature, max_tokens=max_tokens, base=base, on_text=stream)
    if as_json:
        _print_json(
            {
                "reply": reply.text,
                "prompt_ids": reply.prompt_ids,
                "token_ids": reply.token_ids,
                "stopped_by": reply.stopped_by,
            }
        )
    else:
        print()


@app.command(name="eval")
def evaluate(
    run: RunArgument,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Other rows than the run's held-out ones.", show_default=False),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="An OpenAI-compatible server whose model compares the answers.", show_default=False
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Its name at that server; default: the first.", show_default=False)
    ] = None,
    judge_key: Annotated[
        str, typer.Option(envvar="TUNESMITH_JUDGE_KEY", help="The key of that server.", show_default=False)
    ] = "none",
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…", help="Tasks of lm-evaluation-harness as well, where it is installed.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Base against tuned on rows that were not trained on: one page, one verdict."""
    console = _start(verbose, as_json)
    opened = rundir.open_run(run)
    _require_extra("eval", "sacrebleu")
    from tunesmith import display, evaluation_page, harness, judging
    from tunesmith.evaluate import evaluate

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if names:
        harness.require()
    asked = None if judge is None else judging.judge_at(judge, judge_model, judge_key)
    with console.status("") as status:
        evaluation = evaluate(run, data, asked, names, tell=status.update)
    page = evaluation_page.write(opened, evaluation)
    display.show_evaluation(console, evaluation, evaluation_page.table(evaluation), page)
    if as_json:
        _print_json(evaluation.as_dict())


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Literal["adapter", "merged"], typer.Option(help="What to write.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="New folder; default: in the run's own.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default: as the base's files.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Take a run to where models are served: written, opened again, compared with the live adapter."""
    console = _start(verbose, as_json)
    rundir.open_run(run)
    if out is not None:
        rundir.check_target(out)
    from tunesmith import display
    from tunesmith.export import export

    with console.status("") as status:
        written = export(run, to, out, dtype, tell=status.update)
    display.show_export(console, written)
    if as_json:
        _print_json(written.as_dict())


@app.command()
def models(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """The models that have a short name."""
    console = _start(verbose, as_json)
    from rich.table import Table

    from tunesmith import hub

    rows = [
        {"alias": a.name, "source": a.sources[0], "parameters": a.parameters, "licence": a.licence, "note": a.note}
        for a in hub.aliases().values()
    ]
    if as_json:
        _print_json({"models": rows})
        return
    table = Table(box=None, padding=(0, 2))
    for name in ("alias", "size", "source", "licence", "note"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            f"[bold]{row['alias']}[/]",
            f"{row['parameters'] / 1e9:.1f} B" if row["parameters"] > 1e9 else f"{row['parameters'] / 1e6:.0f} M",
            row["source"],
            row["licence"],
            row["note"],
        )
    console.print(table)
    console.print(
        "\nAny model that transformers builds itself and whose tokenizer has a chat template works too: "
        "hf:org/name, ms:org/name or a folder.",
        highlight=False,
    )


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="Alias or hub id.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default=False)] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Bring a model here; afterwards no network is needed."""
    console = _start(verbose, as_json)
    from tunesmith.model import prepared

    found = prepared(_fetched(console, model, revision, weights=True))
    size = sum(path.stat().st_size for path in found.folder.rglob("*") if path.is_file())
    console.print(f"{model} is here: {found.folder} ({size / 2**20:,.0f} MiB)", highlight=False)
    if as_json:
        _print_json(
            {
                "model": model,
                "path": str(found.folder),
                "source": found.source,
                "bytes": size,
                "revision": found.revision,
            }
        )


@app.command()
def doctor(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """What this machine has and lacks, and the line that mends it."""
    console = _start(verbose, as_json)
    from tunesmith.doctor import examine

    findings = examine()
    for finding in findings:
        console.print(
            f"{'[green]✓[/]' if finding.ok else '[red]✗[/]'} [bold]{finding.name:14}[/] {finding.found}"
            + (f"\n  [yellow]→ {finding.fix}[/]" if finding.fix else ""),
            highlight=False,
        )
    ok = all(finding.ok for finding in findings)
    if as_json:
        _print_json({"ok": ok, "findings": [finding.as_dict() for finding in findings]})
    if not ok:
        raise typer.Exit(2)


def main() -> None:
    """Runs the command line and ends the process with the contract's exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name that is not UTF-8 becomes an escape, not a traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    code = 1
    try:
        code = int(app(standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        error.show()
        code = 2
    except TunesmithError as error:
        code = error.exit_code
        _show_error(error)
    except (KeyboardInterrupt, typer.Abort):
        print("\nStopped.", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception:
        traceback.print_exc()
        print("This is a bug of tunesmith; please report it with the lines above.", file=sys.stderr)
    sys.stdout.flush()
    raise SystemExit(code)


def _start(verbose: bool, answer_on_stdout: bool) -> Console:
    """The console for people: standard output, or standard error where that is for the answer alone."""
    from rich.console import Console

    # Before torch is loaded: its threads would wait for each other actively for milliseconds, and on cores that another
    # program uses too a step of 2.7 s took 59 s (2 cores, 2026-11); with this 6.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")

    if verbose:
        os.environ["TUNESMITH_VERBOSE"] = "1"
    else:
        import logging
        import warnings

        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from tunesmith import hub

    if hub.offline():
        hub.forbid_network()
    return Console(stderr=answer_on_stdout, quiet=not _speaks())


def _recipe(
    path: Path | None, model: str | None, data: str | None, sets: list[str] | None
) -> tuple[recipes.Recipe, dict[str, recipes.Source]]:
    flags = {name: value for name, value in (("model.name", model), ("data.path", data)) if value is not None}
    return recipes.resolve(path, {**flags, **dict(recipes.parse_flag(text) for text in sets or [])})


def _rows(settings: recipes.Recipe) -> records.Records:
    return records.open_file(settings.data.path, settings.data.columns, settings.template.system)


def _checked(console: Console, settings: recipes.Recipe, found: hub.LocalModel, rows: records.Records) -> Checked:
    """The check, with a count of the rows while a large file is rendered."""
    from tunesmith.checking import check

    with console.status("Reading and rendering every row …") as status:

        def rendered(count: int) -> None:
            status.update(f"{count:,} rows rendered …")

        return check(settings, found, rows, rendered)


def _fetched(console: Console, name: str, revision: str | None, *, weights: bool) -> Any:
    """The model on this machine, ready for transformers; shows a bar while it is fetched."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from tunesmith import hub

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
    ) as bar:
        tasks: dict[str, Any] = {}

        def moved(file: str, done: int, total: int) -> None:
            task = tasks.setdefault(file, bar.add_task(f"fetching {file}", total=total) if file not in tasks else None)
            bar.update(task, completed=done, total=total)

        found = hub.locate(name, revision, weights=weights, on_progress=moved)
    from tunesmith import model as models

    if os.environ.get("TUNESMITH_VERBOSE") is None:
        models.hush_libraries()
    if found.folder.is_dir() and models.needs_preparing(found):
        with console.status("Converting the weights to safetensors, once …"):
            return models.prepared(found)
    return models.prepared(found)


def _speaks() -> bool:
    """Of several processes that train together the first one speaks; errors are shown by each."""
    return os.environ.get("RANK", "0") == "0"


def _print_json(value: dict[str, Any]) -> None:
    if _speaks():
        print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _require_extra(extra: str, package: str) -> None:
    """Raises MissingExtra where a package of an extra is not installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"tunesmith {sys.argv[1]}", extra)


def _epochs(sets: list[str]) -> int | None:
    """The one setting that a run may be given anew."""
    epochs = None
    for name, value in map(recipes.parse_flag, sets):
        if name != "train.epochs":
            fix = "Leave it out, or train anew with it."
            raise RecipeError(f"--set {name}", "a setting that the run began with", "train.epochs alone", fix)
        settings, _ = recipes.resolve(None, {name: value})
        epochs = settings.train.epochs
    return epochs


def _go_on_detached(console: Console, command: str, arguments: list[str], out: Path, as_json: bool) -> None:
    """Starts a process of its own, waits until it trains, and says where it is; ends as it does where it fails."""
    from tunesmith.runs import Ended, start_detached

    place = ["--out", str(out)] if command == "train" else [str(out)]
    try:
        process = start_detached([command, *arguments, *place], out)
    except Ended as ended:
        print(ended.said, file=sys.stderr)
        raise typer.Exit(ended.code) from None
    console.print(f"Trains in the background as process {process.pid}. What it says is in {out / rundir.OUTPUT}")
    console.print(f"Follow it with: tunesmith watch {out}", highlight=False)
    console.print(f"Stop it, with a point to go on from, with: kill {process.pid}", highlight=False)
    if as_json:
        _print_json({"run": str(out), "pid": process.pid, "output": str(out / rundir.OUTPUT)})


def _show_trained(console: Console, run: Run, as_json: bool) -> None:
    from tunesmith import display

    if run.samples:
        console.print(display.side_by_side([(s.question, s.before, s.after) for s in run.samples]))
    display.show_run(console, run)
    if as_json:
        _print_json(display.run_json(run))
    _end_of_run(run.interrupted)


def _end_of_run(interrupted: bool) -> None:
    if interrupted:
        raise typer.Exit(130)


def _show_error(error: TunesmithError) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    faults: list[dict[str, Any]] = []
    if isinstance(error, DataError) and error.faults:
        from tunesmith.display import fault_json, show_faults

        show_faults(console, error.faults)
        faults = [fault_json(fault) for fault in error.faults]
    # Not wrapped: paths and commands can be copied.
    console.print(Text.assemble(("Error  ", "bold red"), (error.where, "bold")), soft_wrap=True)
    for name, part in (("found", error.found), ("expected", error.expected), ("fix", error.fix)):
        console.print(Text.assemble((f"  {name:9}", "grey62"), part), soft_wrap=True)
    if "--json" in sys.argv:
        parts = {"where": error.where, "found": error.found, "expected": error.expected, "fix": error.fix}
        _print_json({"ok": False, "error": parts, "faults": faults})
