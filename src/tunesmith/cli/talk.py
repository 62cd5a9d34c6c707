"""The conversation at the terminal: history, commands, Ctrl-C that stops the answer and not the program."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from tunesmith.chat import Chat
from tunesmith.errors import TunesmithError
from tunesmith.language import marked, said
from tunesmith.runs.rundir import writing
from tunesmith.screen import Screen
from tunesmith.terminal import nobody_reads, what_is_no_text
from tunesmith.types import Message

HELP = marked(
    """\
/reset          forget the conversation
/base  /tuned   switch the adapter off, on
/system TEXT    begin anew with this system text (without TEXT: with none)
/save FILE      add the conversation to FILE as a row of training data
/quit           end (Ctrl-D does too); Ctrl-C stops an answer; Esc Enter starts a new line"""
)


class Talk:
    """A conversation with one model."""

    def __init__(
        self,
        chat: Chat,
        console: Screen,
        *,
        system: str | None,
        base: bool,
        temperature: float | None,
        max_tokens: int | None,
    ) -> None:
        self._chat, self._console, self._system, self._base = chat, console, system, base
        self._temperature, self._max_tokens = temperature, max_tokens
        self._messages: list[Message] = []

    def run(self) -> None:
        """Reads turns until /quit or the end of input."""
        read = _reader(self._label)
        self._console.print(said("/help lists the commands."), style="grey62")
        while True:
            try:
                line = read().strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if line == "/quit" or nobody_reads():
                return
            if found := what_is_no_text(line):
                self._console.print(said("Not sent: {found}. Set the terminal to UTF-8.", found=found), style="yellow")
            elif line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _label(self) -> str:
        return said("base") if self._base and self._chat.tuned else said("you")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self._messages.clear()
            self._console.print(said("Forgotten."), style="grey62")
        elif name in ("/base", "/tuned"):
            if not self._chat.tuned:
                self._console.print(said("This is a base model; there is no adapter to switch."), style="yellow")
                return
            self._base = name == "/base"
            now = said("The base model answers now.") if self._base else said("The tuned model answers now.")
            self._console.print(now, style="grey62")
        elif name == "/system":
            done = said("System text set") if rest else said("No system text")
            if self._messages:  # what was answered was not under this text
                done = said("{done}; a new conversation begins", done=done)
            self._system = rest or None
            self._messages.clear()
            self._console.print(said("{sentence}.", sentence=done), style="grey62")
        elif name == "/save":
            self._save(rest)
        else:
            if name != "/help":
                self._console.print(said("There is no {name}.", name=name), style="yellow")
            self._console.print(said(HELP))

    def _save(self, name: str) -> None:
        if not name or not self._messages:
            self._console.print(said("Usage: /save FILE, after at least one answer."), style="yellow")
            return
        row = {"messages": [message.as_dict() for message in self._with_system()]}
        try:
            with writing(Path(name)), Path(name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            self._console.print(str(error), style="red")
            return
        self._console.print(said("Added to {name}.", name=name), style="grey62")

    def _with_system(self) -> list[Message]:
        return [*([Message("system", self._system)] if self._system else []), *self._messages]

    def _answer(self, question: str) -> None:
        self._messages.append(Message("user", question))
        try:
            with _Stoppable() as stopped, self._console.status(said("Reading …")) as reading:

                def show(piece: str) -> None:
                    reading.stop()
                    print(piece, end="", flush=True)

                reply = self._chat.reply(
                    self._with_system(),
                    temperature=self._temperature,
                    max_tokens=self._max_tokens,
                    base=self._base,
                    on_text=show,
                    cancelled=lambda: stopped() or nobody_reads(),
                )
        except TunesmithError as error:
            self._messages.pop()
            self._console.print(str(error), style="red")
            return
        print()
        if reply.text:
            self._messages.append(Message("assistant", reply.text))
        else:
            self._messages.pop()
        if stopped():
            self._console.print(said("Stopped."), style="grey62")
        elif reply.stopped_by == "length":
            self._console.print(said("Cut at the token limit (--max-tokens)."), style="grey62")


class _Stoppable:
    """While it holds, Ctrl-C sets a flag instead of raising."""

    def __enter__(self) -> Callable[[], bool]:
        self._asked = False
        self._previous = signal.signal(signal.SIGINT, self._ask)
        return lambda: self._asked

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def _reader(label: Callable[[], str]) -> Callable[[], str]:
    """Reads a turn: at a terminal several pasted lines are one turn, elsewhere each line is."""
    if not sys.stdin.isatty():
        return lambda: input()
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import HTML

    session: PromptSession[str] = PromptSession()
    sign = "›" if sys.stdout.encoding.lower().startswith("utf") else ">"
    return lambda: session.prompt(HTML(f"<b>{label()}</b> {sign} "), prompt_continuation="    … ")
