"""What is done with a finished run: chat, eval, export, serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith import extras, terminal
from tunesmith import runs as all_runs
from tunesmith.cli import onward
from tunesmith.cli.console import fetched, loading, print_json, start
from tunesmith.cli.onward import go_on
from tunesmith.cli.options import JsonOption, RunArgument, VerboseOption, whole
from tunesmith.errors import RecipeError
from tunesmith.language import said
from tunesmith.runs import rundir

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.chat import Chat
    from tunesmith.evaluation.questions import Question
    from tunesmith.screen import Screen

_AT_ONCE = 32
"""Questions that are answered before the first of them is printed."""


def chat(
    run_or_model: Annotated[
        str, typer.Argument(help="A run's folder or its name in runs/, or a model.", show_default=False)
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Answer this once and end. With --json and without it: answer each line of standard input, which is a "
            'question, {"prompt": "…"} or {"messages": […]}, and a conversation of its own.',
            callback=whole,
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System text.", callback=whole, show_default=False)] = None,
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
    console = start(verbose, answer_on_stdout=True)
    asked = _asked(prompt) if as_json else []  # before a model is loaded
    is_model = all_runs.named_or_model(run_or_model) is None
    with loading(console):
        from tunesmith.chat import load
        from tunesmith.cli.talk import Talk
        from tunesmith.types import Message

    if is_model and not Path(run_or_model).exists():
        fetched(console, run_or_model, None, weights=True)
    with console.status(said("Loading the model …")):
        loaded: Chat = load(run_or_model)
    if as_json:
        _answer_all(console, loaded, asked, system, temperature=temperature, max_tokens=max_tokens, base=base)
        return
    if prompt is None:
        Talk(loaded, console, system=system, base=base, temperature=temperature, max_tokens=max_tokens).run()
        go_on(console, *onward.after_chat(run_or_model))
        return
    messages = [*([Message("system", system)] if system else []), Message("user", prompt)]
    with console.status(said("Reading the question …")) as reading:

        def show(piece: str) -> None:
            reading.stop()
            print(piece, end="", flush=True)

        loaded.reply(
            messages,
            temperature=temperature,
            max_tokens=max_tokens,
            base=base,
            on_text=show,
            cancelled=terminal.nobody_reads,
        )
    print()
    if sys.stdout.isatty():  # else the answer goes to a program, which asks many, and knows how to go on
        go_on(console, *onward.after_chat(run_or_model))


def _asked(prompt: str | None) -> list[Question]:
    """What is to be answered in JSON."""
    from tunesmith.evaluation import questions

    if prompt is not None:
        return [questions.Question("--prompt", [{"role": "user", "content": prompt}])]
    if sys.stdin.isatty():
        fix = said("Add --prompt TEXT, or give questions, one a line: < FILE.")
        raise RecipeError("chat --json", said("no --prompt"), said("something to answer"), fix)
    return questions.read(sys.stdin, said("standard input"))


def _answer_all(console: Screen, chat: Chat, asked: Sequence[Question], system: str | None, **how: Any) -> None:
    """Prints a line for each question, in their order; all are looked at before the first is answered."""
    talks = [question.talk(system) for question in asked]
    for question, talk in zip(asked, talks, strict=True):
        with question.named():
            chat.prompt_ids(talk)
    for first in range(0, len(asked), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        with console.status(said("{n} of {all} questions answered …", n=first, all=len(asked))):
            replies = chat.replies(talks[some], **how)
        for question, reply in zip(asked[some], replies, strict=True):
            print_json(question.answered(reply))
        if terminal.nobody_reads():
            return


def evaluate(
    run: RunArgument,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Other rows than the run's held-out ones.", show_default=False),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible server whose model compares the answers.",
            callback=whole,
            show_default=False,
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(help="Its name at that server; default: the first.", callback=whole, show_default=False),
    ] = None,
    judge_key: Annotated[
        str,
        typer.Option(envvar="TUNESMITH_JUDGE_KEY", help="The key of that server.", callback=whole, show_default=False),
    ] = "none",
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Tasks of lm-evaluation-harness as well, where it is installed.",
            callback=whole,
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Base against tuned on rows that were not trained on: one page, one verdict."""
    console = start(verbose, as_json)
    run = all_runs.named(run)
    opened = rundir.open_run(run)
    extras.require("eval", "tunesmith eval")
    with loading(console):
        from tunesmith.cli import display
        from tunesmith.evaluation import harness, judging
        from tunesmith.evaluation import page as evaluation_page
        from tunesmith.evaluation.evaluate import evaluate

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if names:
        harness.require()
    asked = None if judge is None else judging.judge_at(judge, judge_model, judge_key)
    with console.status(said("Opening the run …")) as status:
        evaluation = evaluate(run, data, asked, names, tell=status.update, announce=console.print)
    page = evaluation_page.write(opened, evaluation)
    display.show_evaluation(console, evaluation, evaluation_page.table(evaluation), page)
    go_on(console, *onward.after_eval(run, good=evaluation.verdict == "better" and not evaluation.reserved))
    if as_json:
        print_json(evaluation.as_dict())


def export(
    run: RunArgument,
    to: Annotated[
        Literal["adapter", "merged", "gguf", "ollama"], typer.Option(help="What to write.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="New folder; default: in the run's own.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16; for llama.cpp also q8_0, and smaller types where its own program "
            "llama-quantize is installed. Default: as the base's files, float16 for llama.cpp.",
            callback=whole,
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Take a run to where models are served: written, opened again, compared with the live adapter."""
    console = start(verbose, as_json)
    run = all_runs.named(run)
    rundir.open_run(run)
    if out is not None:
        rundir.check_target(out)
    with loading(console):
        from tunesmith.cli import display
        from tunesmith.export import export

    with console.status(said("Reading the run …")) as status:
        written = export(run, to, out, dtype, tell=status.update)
    display.show_export(console, written)
    go_on(console, *onward.after_export(run, written))
    if as_json:
        print_json(written.as_dict())


def serve(
    context: typer.Context,
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN…", help="Folders of runs of one base, or one model.", show_default=False)
    ],
    host: Annotated[
        str, typer.Option(help="Address; any but this machine's own needs a key.", callback=whole)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TUNESMITH_API_KEY",
            callback=whole,
            help="The key that clients must send, of at least 16 characters; as a variable nobody sees it in the list "
            "of processes.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """An OpenAI-compatible API and a chat page, for several runs at once, until Ctrl-C."""
    console = start(verbose, as_json)
    extras.require("serve", "tunesmith serve")
    for name in runs:
        all_runs.named_or_model(name)  # or it is said before anything is loaded
    with loading(console):
        from tunesmith.serving.server import Serving

    def tell(text: str) -> None:
        console.print(text, soft_wrap=True)

    source = context.get_parameter_source("api_key")
    if api_key and source is not None and source.name == "COMMANDLINE":
        tell(
            said(
                "--api-key: everybody on this machine sees the key in the list of processes; set TUNESMITH_API_KEY "
                "instead."
            )
        )
    with console.status(said("Loading the models …")):
        serving = Serving(runs, host, port, api_key, tell)
    told = {"url": serving.url, "models": list(serving.service.models)}

    def ready() -> None:
        go_on(console, *onward.after_serving(serving.url, told["models"], key=bool(api_key)))
        if as_json:
            print_json(told)

    serving.run(ready)
