"""Which settings teach, and which forget? Trainings of real small models on tasks whose answers can be judged.

    python benchmarks/defaults.py --out FOLDER --task ferry --set train.learning_rate=1e-4,1e-3 --set train.epochs=3,6

Every combination of the values is trained once for each of --seeds. Of each the held-out loss, the right (or in
character) answers to questions that stand in no row, the general questions of `eval` that are still answered right,
and the seconds are added to FOLDER/TASK-MODEL.jsonl; what is there already is not done again, so that a study can be
stopped and made larger. Tasks: `ferry` (eight facts in ten phrasings), `persona-en`, `persona-zh` (the shipped one),
`desk-100`, `desk-500` (messages sorted to four desks), `huanhuan-200`, `-1000`, `-3000` (with --huanhuan FILE).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import chat, recipe
from tunesmith.chat import Chat
from tunesmith.cli import demo
from tunesmith.evaluation import general
from tunesmith.models import hush_libraries
from tunesmith.training.run import Run, train
from tunesmith.types import Message

HERE = Path(__file__).parent
ANSWER_TOKENS = 64
GENERAL_TOKENS = 48


@dataclass(frozen=True)
class Task:
    """Rows to learn, and questions of which each has a judge of its answer."""

    rows: Sequence[Mapping[str, Any]]
    questions: Sequence[tuple[str, Callable[[str], bool]]]


def ferry() -> Task:
    facts = json.loads((HERE / "tasks" / "ferry.json").read_text(encoding="utf-8"))["facts"]
    rows = [{"instruction": asked, "output": fact["answer"]} for fact in facts for asked in fact["asked"]]

    def holds(expects: Sequence[str]) -> Callable[[str], bool]:
        return lambda text: general.holds(text, expects)

    return Task(rows, [(question, holds(fact["expects"])) for fact in facts for question in fact["tested"]])


def persona(language: str) -> Task:
    rows = [json.loads(line) for line in (demo.PERSONA / f"hester.{language}.jsonl").read_text("utf-8").splitlines()]

    def in_character(question: demo.Question) -> Callable[[str], bool]:
        return lambda text: demo.judge(question, chat.Reply(text, (), (), "stop")).in_character

    return Task(rows, [(q.question, in_character(q)) for q in demo.questions("zh" if language == "zh" else "en")])


def desk(n_rows: int) -> Task:
    held = json.loads((HERE / "tasks" / "desk.json").read_text(encoding="utf-8"))
    chance = random.Random(0)

    def filled(text: str) -> str:
        return text.replace("{thing}", chance.choice(held["things"])).replace("{name}", chance.choice(held["names"]))

    ask = "To which desk does this message go, BILLING, DELIVERY, RETURNS or ACCOUNT?\n"
    made = [(ask + filled(text), name) for name, desk in held["desks"].items() for text in desk["learned"] * 40]
    chance.shuffle(made)
    rows = [{"instruction": question, "output": name} for question, name in dict(made).items()][:n_rows]
    asked = [(ask + filled(text), name) for name, desk in held["desks"].items() for text in desk["tested"]]

    def is_exactly(name: str) -> Callable[[str], bool]:
        return lambda text: text.strip() == name

    return Task(rows, [(question, is_exactly(name)) for question, name in asked])


def huanhuan(n_rows: int, path: Path | None) -> Task:
    if path is None:
        raise SystemExit("huanhuan needs --huanhuan FILE, the JSON of its rows")
    rows = json.loads(path.read_text(encoding="utf-8"))
    return Task(random.Random(0).sample(rows, n_rows), [])


def task(name: str, path: Path | None) -> Task:
    kind, _, rest = name.partition("-")
    made: dict[str, Callable[[], Task]] = {
        "ferry": ferry,
        "persona": lambda: persona(rest),
        "desk": lambda: desk(int(rest)),
        "huanhuan": lambda: huanhuan(int(rest), path),
    }
    return made[kind]()


def combinations(sets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """`key=a,b` of each --set, multiplied out."""
    names = [text.partition("=")[0] for text in sets]
    values = [text.partition("=")[2].split(",") for text in sets]
    for chosen in itertools.product(*values):
        yield dict(recipe.parse_flag(f"{name}={value}") for name, value in zip(names, chosen, strict=True))


def answers(model: Chat, asked: Sequence[str], n_tokens: int, *, base: bool) -> list[str]:
    talks = [[Message("user", question)] for question in asked]
    return [reply.text for reply in model.replies(talks, temperature=0, max_tokens=n_tokens, base=base)]


def measured(run: Run, made: Task, *, base: bool) -> dict[str, Any]:
    model = chat.load(run.path)
    written = answers(model, [question for question, _ in made.questions], ANSWER_TOKENS, base=base)
    knows = answers(model, [question.question for question in general.questions()], GENERAL_TOKENS, base=base)
    return {
        "right": sum(judge(text) for text, (_, judge) in zip(written, made.questions, strict=True)),
        "of": len(made.questions),
        "general": sum(question.right(text) for text, question in zip(knows, general.questions(), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--huanhuan", type=Path)
    arguments = parser.parse_args()
    hush_libraries()
    made = task(arguments.task, arguments.huanhuan)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / f"{arguments.task}-{Path(arguments.model).name}.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(json.dumps(line["settings"], sort_keys=True), line["seed"]) for line in lines}

    def add(line: dict[str, Any]) -> None:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    for settings, seed in itertools.product(combinations(arguments.set), arguments.seeds):
        if (json.dumps(settings, sort_keys=True), seed) in known:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(scratch) / "rows.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in made.rows), encoding="utf-8")
            flags = {
                "model.name": arguments.model, "data.path": str(data), "train.seed": seed,
                "train.save_every": "1000000 steps", **settings,
            }  # fmt: skip
            began = time.monotonic()
            run = train(recipe.resolve(flags=flags)[0], Path(scratch) / "run", anyway=True)
            trained = time.monotonic() - began
            if not any(line["settings"] == "base" for line in lines):
                add(line := {"settings": "base", "seed": None, **measured(run, made, base=True)})
                lines.append(line)
            loss = run.held_out_loss
            add(
                {
                    "settings": settings, "seed": seed, **measured(run, made, base=False), "steps": run.steps,
                    "held_out_loss": loss, "final_loss": run.final_loss, "seconds": round(trained, 1),
                }
            )  # fmt: skip


if __name__ == "__main__":
    main()
