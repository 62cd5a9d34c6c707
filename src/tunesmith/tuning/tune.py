"""A study: trainings that differ in the few settings that matter, and which of them is best.

* The first trial is the recipe as it stands. The settings of the others are drawn by a tree-structured Parzen estimator
  (Bergstra et al. 2011, as Optuna has it) from what is known by then, within the bounds that are listed below.
* All trials hold out the same rows. The *best* is the one with the lowest loss on them among those that forgot nothing:
  of a hundred general questions the tuned model may answer as many fewer rightly than its base as `tunesmith eval`
  allows before it says that a model forgot. One that forgot more is never the best.
* The held-out loss is measured after each quarter of a trial's own steps. A trial is *pruned* after the second or the
  third quarter when its lowest loss so far is above the median that the others had after as many quarters: those that
  came to their end and forgot nothing, from five of them on (median stopping rule: Golovin et al. 2017, Google Vizier,
  section 3.2.2). Quarters, because trials have different numbers of epochs, and a loss is only comparable at the same
  place of the schedule. It is also pruned when the time is up, when it does not fit into memory, and when its numbers
  are not finite; the first trial is not, because then nothing else would make sense either.
* A trial that is stopped or killed is gone on with, from its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from tunesmith import chat as chats
from tunesmith import reading, runs
from tunesmith import recipe as recipes
from tunesmith.deadline import Alarm, TimeIsUp
from tunesmith.errors import OutOfMemory, ProofError, RecipeError, RunError
from tunesmith.evaluation import general, verdict
from tunesmith.language import marked, said
from tunesmith.recipe import Recipe
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.training import interrupts, planning
from tunesmith.training.checking import Checked, check, hold_out, locate
from tunesmith.training.interrupts import Interrupts
from tunesmith.training.run import Run, resume, run_name, train
from tunesmith.training.trainer import StepMetrics, Watcher
from tunesmith.tuning.page import write_page
from tunesmith.types import Message


@dataclass(frozen=True)
class Searched:
    """A setting that is searched, and between which bounds."""

    name: str
    low: float
    high: float
    log: bool = False
    """Drawn evenly by the logarithm."""

    def around(self, value: float) -> Searched:
        """With bounds that hold a value."""
        return dataclasses.replace(self, low=min(self.low, value), high=max(self.high, value))

    def draw(self, trial: optuna.Trial) -> float:
        """The trial's value; the one that it has already, where it has one."""
        if isinstance(self.low, int):
            return trial.suggest_int(self.name, self.low, int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


SPACE = (
    Searched("train.learning_rate", 2e-5, 5e-3, log=True),
    Searched("train.epochs", 1, 10),
    # alpha stays: the update is scaled by alpha / r, and with that the best rate hardly depends on the rank (Schulman
    # et al. 2025, LoRA Without Regret).
    Searched("lora.r", 4, 64, log=True),
    Searched("train.rehearse", 0.0, 0.5),
)
"""Bounds are widened to hold the recipe's own value."""

State = Literal["done", "pruned", "running", "waiting"]
TRIALS = 20
_QUARTERS = 4
_PRUNER = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
_TIME = marked("the time is up")
# A twentieth of the time where that is less.
_STOP_SECONDS = 10  # for a checkpoint and the end of a step
_END_SECONDS = 30  # for what follows the last trial


@dataclass(frozen=True)
class Trial:
    """One training of a study."""

    number: int
    run: Path
    settings: dict[str, float]
    """What is searched, with its values."""
    state: State
    """`waiting`: it was begun and nobody is at work on it; the study goes on with it first."""
    held_out_loss: float | None
    """The one measured last; after the last step where it is done."""
    general: int | None
    """General questions answered rightly; None where they were not asked."""
    forgot: bool
    seconds: float | None
    """Of training."""
    why: str
    """Why it was pruned."""

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "run": str(self.run)}


@dataclass(frozen=True)
class Study:
    """A study as it stands."""

    path: Path
    name: str
    wanted: int
    trials: tuple[Trial, ...]
    general: int | None
    """General questions that the base answers rightly; None where it was not asked yet."""
    recipe: str
    """The best trial's, as YAML; empty where there is none."""
    interrupted: bool = False
    ended: str = ""
    """Why no further trial was begun."""

    @property
    def best(self) -> Trial | None:
        done = [trial for trial in self.trials if trial.state == "done" and not trial.forgot]
        return min(done, key=lambda trial: (trial.held_out_loss, trial.number), default=None)

    @property
    def best_recipe(self) -> Path:
        return self.path / "best.yaml"

    @property
    def page(self) -> Path:
        return self.path / "tune.html"

    def as_dict(self) -> dict[str, Any]:
        best = self.best
        return {
            "study": str(self.path),
            "trials": [trial.as_dict() for trial in self.trials],
            "base": {"general": self.general},
            "best": best and best.as_dict(),
            "recipe": str(self.best_recipe) if best else None,
            "page": str(self.page),
            "ended": self.ended,
            "interrupted": self.interrupted,
        }


Shown = Callable[[int, Mapping[str, float]], AbstractContextManager[Watcher]]


def tune(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    trials: int = TRIALS,
    hours: float | None = None,
    join: bool = False,
    sources: Mapping[str, recipes.Source] | None = None,
    checked: Checked | None = None,
    anyway: bool = False,
    shown: Shown = lambda number, settings: nullcontext(Watcher()),
    told: Callable[[Study, Trial], None] = lambda study, trial: None,
) -> Study:
    """Tries settings until there are so many trials, or the time is up; goes on with the study that is in `out`.

    `out` must be new, empty, or the folder of a study with this recipe, data and base (default: tunes/<data>-<model>).
    After `hours` it has returned; a trial that would take longer, by those before it, is not begun. With `join` others
    may be at work in the study: each trial is one process's, on any host that sees the folder. `shown` gives the
    watcher of a trial's training; `told` hears of each trial that has ended. Ctrl-C as for `train`: `Study.interrupted`
    or KeyboardInterrupt, and the trial is gone on with next time. Raises what `train` does, RunError for a folder that
    is something else or where another process is at work, RecipeError when nothing is held out.
    """
    ends = math.inf
    if hours is not None:
        ends = time.monotonic() + hours * 3600 - min(_END_SECONDS, hours * 3600 / 20)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        found = said("{n} processes of one training", n=size)
        fix = said("Start each by itself, with --join (a Slurm array, for one).")
        raise RecipeError("tune", found, said("a process for each trial"), fix)
    path = Path(out) if out is not None else Path("tunes") / run_name(recipe)
    checked = checked or check(recipe)
    checked.require_ok()
    if not hold_out(checked)[1]:
        found, fix = said("no held-out row"), said("Raise eval.hold_out, or bring more rows.")
        raise RecipeError("eval.hold_out", found, said("rows to compare trials on"), fix)
    _require_place(path)
    sources = sources or recipes.sources_of(recipe)
    with Interrupts(), _Work(path, checked, sources, trials, ends, anyway, shown, told).joined(join) as work:
        return work.go_on()


class _Work:
    """One process's part in a study."""

    def __init__(
        self,
        path: Path,
        checked: Checked,
        sources: Mapping[str, recipes.Source],
        wanted: int,
        ends: float,
        anyway: bool,
        shown: Shown,
        told: Callable[[Study, Trial], None],
    ) -> None:
        self._path, self._checked, self._recipe, self._sources = path.absolute(), checked, checked.recipe, sources
        self._named = path  # as it was given, for what is said
        self._wanted, self._ends, self._anyway, self._shown, self._told = wanted, ends, anyway, shown, told
        made = planning.plan(checked)
        settled = planning.applied(self._recipe, made.chosen).model_dump()
        self._own = {searched.name: _value(settled, searched.name) for searched in SPACE}
        self._space = [searched.around(self._own[searched.name]) for searched in SPACE]
        self._epochs: int = _value(settled, "train.epochs")
        self._steps_per_epoch = made.steps // self._epochs
        self._planned_seconds_per_step = made.times.steps / made.steps
        self._name = secrets.token_hex(4)  # of this process, in this study
        self._alarm = Alarm(ends)

    # --- the folder ---------------------------------------------------------------------------------------------------

    @contextmanager
    def joined(self, join: bool) -> Iterator[_Work]:
        """Makes the study where there is none, and takes part in it."""
        worker, given = self._path / _WORKERS / self._name, self._given()
        with ExitStack() as stack:
            rundir.open_to_owner(self._path)
            for file in (_JOURNAL, _TURN):
                with rundir.writing(self._path):
                    os.close(rundir.private(str(self._path / file), os.O_CREAT | os.O_WRONLY))
            with self._turn():
                for other in (self._path / _WORKERS).glob("*"):
                    if not self._at_work(other.name):
                        shutil.rmtree(other, ignore_errors=True)
                    elif not join:
                        expected, fix = said("one, or several with --join"), said("Wait for it, or take part: --join")
                        raise RunError(str(self._named), said("another process at work in it"), expected, fix)
                self._begin_or_compare(given)
                self._open_journal()
                rundir.open_to_owner(worker)
                stack.callback(shutil.rmtree, worker, ignore_errors=True)
                stack.enter_context(runs.occupied(RunDir(worker), self._recipe.model.name, self._recipe.data.path))
            yield self

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process at a time, of all hosts; who was killed in it holds the others up for half a minute."""
        lock = JournalFileOpenLock(str(self._path / _TURN))
        with rundir.writing(self._named), self._alarm.held():
            lock.acquire()
            try:
                yield
            finally:
                lock.release()

    def _at_work(self, worker: str | None) -> bool:
        """Whether a process, by its name in the study, still is there."""
        if not worker or not (folder := self._path / _WORKERS / worker).is_dir():
            return False
        try:
            runs.require_free(RunDir(folder))
        except RunError:
            return True
        return bool(rundir.is_locked(folder))

    def _given(self) -> dict[str, Any]:
        """What a study stands on."""
        data, template, settings = self._checked.data, self._checked.renderer.template, self._recipe
        paths = {
            name: str(Path(path).absolute())
            for name, path in (("data", data.path), ("base", settings.model.name), ("template", settings.template.path))
            if path
        }
        return {
            "recipe": settings.model_dump(),
            "sources": dict(self._sources),
            "data": {"path": paths["data"], "sha256": data.digest},
            "template": {"path": paths.get("template"), "sha256": template.digest},
            "base": {"path": paths["base"], "weights": rundir.weights_of(locate(settings, weights=True).folder)},
        }

    def _begin_or_compare(self, given: dict[str, Any]) -> None:
        """Writes the manifest, or compares what is given with it; raises RunError naming what differs."""
        if not (file := self._path / _MANIFEST).is_file():
            created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            rundir.write_json(file, {"created": created, "searched": [s.name for s in self._space], **given})
            return
        before = _manifest(self._named)
        files = ("data.path", "model.name", "template.path")  # compared by what is in them
        names = [name for name in recipes.setting_names() if name not in files]
        changed = [name for name in names if _value(before["recipe"], name) != _value(given["recipe"], name)]
        for what, section, key in (
            (said("the data"), "data", "sha256"),
            (said("the chat template"), "template", "sha256"),
            (said("the base's weights"), "base", "weights"),
        ):
            changed += [what] if before[section].get(key) != given[section][key] else []
        if changed:
            fix = said("Give it those again, or begin another study: --out DIR")
            raise RunError(
                str(self._named),
                said("another state of {names}", names=", ".join(changed)),
                said("what the study began with"),
                fix,
            )

    def _open_journal(self) -> None:
        file = self._path / _JOURNAL
        lock = JournalFileOpenLock(str(file))
        lock.acquire()
        try:
            written = file.read_bytes()
            whole = written.rfind(b"\n") + 1
            if whole < len(written):  # a crash left half a line, and the next one would go on in it
                os.truncate(file, whole)
        finally:
            lock.release()
        try:
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(file), lock))
            self._study = optuna.create_study(storage=storage, study_name=_STUDY, load_if_exists=True)
        except (ValueError, KeyError) as error:
            found = said("a damaged line ({error})", error=str(error).splitlines()[0][:200])
            fix = said("Put a copy of it back, or begin another study: --out DIR")
            raise RunError(str(self._named / _JOURNAL), found, said("what `tunesmith tune` wrote"), fix) from error

    # --- trial by trial -----------------------------------------------------------------------------------------------

    def go_on(self) -> Study:
        """Trial after trial, until there is nothing left to begin."""
        before = interrupts.times()
        while True:
            trial = self._next()
            if trial is None:
                return self._now(ended=said("{n} trials were asked for", n=self._wanted))
            if time.monotonic() + self._needed(trial) > self._ends:
                trial.set_user_attr("worker", "")
                return self._now(ended=said("the next one would take longer than the time that is left"))
            if stopped := self._carry_out(trial):
                trial.set_user_attr("worker", "")
            if stopped or interrupts.times() != before:
                return self._now(ended=said("it was interrupted"), interrupted=True)

    def _next(self) -> optuna.Trial | None:
        """A trial that is this process's from now on: one that was left, or a new one; None where all are begun."""
        with self._turn():
            known = self._study.get_trials(deepcopy=False)
            left = [t for t in known if t.state == TrialState.RUNNING and not self._at_work(t.user_attrs.get("worker"))]
            # Chance is of the trial's number alone, so that it does not matter how often a study was stopped.
            seed = _seed(self._recipe.train.seed, left[0].number if left else len(known))
            # Trials that others are at work on count as bad ones, so nobody draws what is being tried already.
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            if not known:
                self._study.enqueue_trial(self._own)
            if left:
                trial = optuna.Trial(self._study, left[0]._trial_id)
            elif len(known) < self._wanted or any(t.state == TrialState.WAITING for t in known):
                trial = self._study.ask()
            else:
                return None
            trial.set_user_attr("worker", self._name)
            for searched in self._space:
                searched.draw(trial)
            return trial

    def _needed(self, trial: optuna.Trial) -> float:
        """Seconds that a trial will take, by the last one of this process that came to its end, or else by the study's;
        the plan's, before there was one."""
        done = max(map(rundir.step_of, RunDir(self._run(trial.number)).points()), default=0)
        told = [t.user_attrs for t in self._study.get_trials(deepcopy=False) if _PER_STEP in t.user_attrs]
        told = [each for each in told if each.get("worker") == self._name] or told
        per_step = told[-1][_PER_STEP] if told else self._planned_seconds_per_step
        besides = max((each.get(_BESIDES, 0.0) for each in told), default=0.0)
        return max(self._n_steps(trial) - done, 0) * per_step + besides

    def _n_steps(self, trial: optuna.Trial) -> int:
        return self._steps_per_epoch * trial.params.get("train.epochs", self._epochs)

    def _carry_out(self, trial: optuna.Trial) -> bool:
        """Trains and judges a trial; whether somebody asked to stop."""
        path, began, facts = self._run(trial.number), time.monotonic(), dict[str, Any]()
        pace, run, fresh = _Pace(self._hopeless, trial, self._ends, self._alarm), None, not path.exists()
        try:
            with self._alarm:
                with self._shown(trial.number, trial.params) as watcher:
                    pace.watcher = watcher
                    run = self._train(trial, path, pace)
                if run.asked and not pace.why:
                    return True
                if not run.interrupted:
                    facts = self._judge(run)
        except TimeIsUp:
            if run is not None and not run.interrupted:  # trained; it can be judged another time
                trial.set_user_attr("worker", "")
                return False
            pace.why = said(_TIME)
        except (ProofError, OutOfMemory) as error:
            if trial.number == 0:
                raise
            pace.why = str(error)
        finally:
            _free_memory()
        if run is not None and facts:
            at_steps = sum(line["seconds"] for line in rundir.read_lines(RunDir(run.path).metrics))
            facts[_PER_STEP] = at_steps / run.steps
            if fresh:
                facts[_BESIDES] = time.monotonic() - began - at_steps
        loss = run.held_out_loss[1] if run is not None and run.held_out_loss and facts else None
        seconds = {} if run is None else {"seconds": run.seconds}
        self._tell(trial, loss, {**seconds, **(facts or {"why": pace.why})})
        return False

    def _train(self, trial: optuna.Trial, path: Path, pace: _Pace) -> Run:
        run = RunDir(path)
        if run.manifest.is_file() and run.recipe.is_file():
            return resume(path, watcher=pace)
        if path.exists():  # killed before it could train
            shutil.rmtree(path)
        every = math.ceil(self._n_steps(trial) / _QUARTERS)
        recipe = planning.applied(self._recipe, {**trial.params, "eval.every": f"{every} steps"})
        sources: dict[str, recipes.Source] = {**self._sources, **dict.fromkeys([*trial.params, "eval.every"], "flag")}
        return train(recipe, path, sources=sources, watcher=pace, anyway=self._anyway)

    def _judge(self, run: Run) -> dict[str, Any]:
        """How many general questions the tuned model answers rightly, and whether it forgot."""
        chat = chats.load(run.path)
        base, tuned = self._base(chat), _right(chat, base=False)
        lost = sum(b and not t for b, t in zip(base, tuned, strict=True))
        gained = sum(t and not b for b, t in zip(base, tuned, strict=True))
        forgot = verdict.has_forgotten(general.kept(base, tuned))
        return {"general": sum(tuned), "lost": lost, "gained": gained, "forgot": forgot}

    def _base(self, chat: chats.Chat) -> list[bool]:
        """Which questions the base answers rightly: asked once in a study, and kept."""
        file = self._path / _GENERAL
        while not file.is_file():
            with self._turn():
                asks = self._study.user_attrs.get("asks the base")
                if mine := asks == self._name or not self._at_work(asks):
                    self._study.set_user_attr("asks the base", self._name)
            if mine:
                rundir.write_json(file, {"right": _right(chat, base=True)})
            else:
                time.sleep(0.5)
        return reading.json_object(file, 1 << 20)["right"]

    def _hopeless(self, trial: optuna.Trial) -> bool:
        """By the rule above."""
        known = self._study.get_trials(deepcopy=False)
        among = optuna.create_study()
        among.add_trials([t for t in known if t.state == TrialState.COMPLETE and not t.user_attrs["forgot"]])
        return _PRUNER.prune(among, known[trial.number])

    def _tell(self, trial: optuna.Trial, loss: float | None, facts: Mapping[str, Any]) -> None:
        """Writes down what came out of a trial, and the study as it stands."""
        with self._turn():
            if self._study.get_trials(deepcopy=False)[trial.number].user_attrs.get("worker") != self._name:
                return  # this process was silent for so long that another one has taken it over
            for name, value in facts.items():
                trial.set_user_attr(name, value)
            if loss is None:
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                if not trial.constraints:
                    trial.set_constraint("forgotten", facts["lost"] - facts["gained"] if facts["forgot"] else 0)
                self._study.tell(trial, loss)
        study = self._now()
        self._told(study, study.trials[trial.number])

    # --- as it stands -------------------------------------------------------------------------------------------------

    def _now(self, *, ended: str = "", interrupted: bool = False) -> Study:
        """The study as it stands, which is written down as well: the best recipe, and the page. Checkpoints that nobody
        needs any more are deleted."""
        with self._turn():
            found = self._study.get_trials(deepcopy=False)
            base = None
            with suppress(OSError, ValueError, KeyError):
                base = sum(reading.json_object(self._path / _GENERAL, 1 << 20)["right"])
            study = Study(
                self._named,
                run_name(self._recipe),
                self._wanted,
                tuple(self._trial(t) for t in found),
                base,
                "",
                interrupted,
                ended,
            )
            if best := study.best:
                sources: dict[str, recipes.Source] = {**self._sources, **dict.fromkeys(best.settings, "flag")}
                text = recipes.write(planning.applied(self._recipe, best.settings), sources)
                study = dataclasses.replace(study, recipe=text)
                rundir.write_text(self._path / study.best_recipe.name, text)
            write_page(study)
            for trial in study.trials:
                if trial.state == "done":
                    shutil.rmtree(RunDir(trial.run).checkpoints, ignore_errors=True)
                elif trial.state == "pruned":
                    rundir.thin_out(RunDir(trial.run), 1)
        return study

    def _trial(self, trial: optuna.trial.FrozenTrial) -> Trial:
        states: dict[TrialState, State] = {TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned"}
        working: State = "running" if self._at_work(trial.user_attrs.get("worker")) else "waiting"
        told, last = trial.user_attrs, trial.last_step
        return Trial(
            trial.number,
            self._named / _TRIALS / f"{trial.number:04}",
            dict(trial.params),
            states.get(trial.state, working),
            trial.value
            if trial.state == TrialState.COMPLETE
            else None
            if last is None
            else trial.intermediate_values[last],
            told.get("general"),
            told.get("forgot", False),
            told.get("seconds"),
            told.get("why", ""),
        )

    def _run(self, number: int) -> Path:
        return self._named / _TRIALS / f"{number:04}"


_STUDY = "tune"
_MANIFEST, _JOURNAL, _TURN, _GENERAL = "manifest.json", "journal.jsonl", "turn", "general.json"
_WORKERS, _TRIALS = "workers", "trials"
_PER_STEP, _BESIDES = "seconds per step", "seconds beside the steps"


class _Pace(Watcher):
    """Hands on what happens, tells the study each held-out loss, and says when a trial should stop."""

    def __init__(
        self, hopeless: Callable[[optuna.Trial], bool], trial: optuna.Trial, ends: float, alarm: Alarm
    ) -> None:
        self.watcher = Watcher()
        self.why = ""
        """Why it should; empty while it should not."""
        self._hopeless, self._trial, self._ends, self._alarm = hopeless, trial, ends, alarm
        self._path = Path()
        self._stop_seconds = min(_STOP_SECONDS, (ends - time.monotonic()) / 20)
        self._told = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        self._n_steps, self._stepped, self._longest = 0, time.monotonic(), 0.0

    def planned(self, plan: planning.Plan) -> None:
        self.watcher.planned(plan)

    def began(self, n_steps: int, run: Path) -> None:
        self._n_steps, self._stepped, self._path = n_steps, time.monotonic(), run
        self.watcher.began(n_steps, run)

    def went_on(self, earlier: Any) -> None:
        self.watcher.went_on(earlier)

    def stepped(self, metrics: StepMetrics, n_steps: int) -> None:
        now = time.monotonic()
        self._longest, self._stepped = max(self._longest, now - self._stepped), now
        self.watcher.stepped(metrics, n_steps)

    def measured(self, step: int, held_out_loss: float) -> None:
        self.watcher.measured(step, held_out_loss)
        quarter = round(_QUARTERS * step / self._n_steps)
        if not quarter or quarter in self._told:
            return
        self._told.add(quarter)
        with rundir.writing(self._path), self._alarm.held():
            self._trial.report(held_out_loss, quarter)
            if quarter < _QUARTERS and self._hopeless(self._trial):
                self.why = said("after {n} of {all} quarters its loss was above the median", n=quarter, all=_QUARTERS)

    def noted(self, text: str) -> None:
        self.watcher.noted(text)

    def enough(self) -> bool:
        if not self.why and time.monotonic() + 2 * self._longest + self._stop_seconds > self._ends:
            self.why = said(_TIME)
        return bool(self.why)


def _right(chat: chats.Chat, *, base: bool) -> list[bool]:
    """Which of the general questions are answered rightly; asked as `evaluate` does."""
    talks = [[Message("user", question.question)] for question in general.questions()]
    replies = chat.replies(talks, temperature=0, max_tokens=general.TOKENS, base=base)
    return [question.right(reply.text) for question, reply in zip(general.questions(), replies, strict=True)]


def _value(settings: Mapping[str, Any], name: str) -> Any:
    section, _, field = name.partition(".")
    return settings.get(section, {}).get(field)


def _seed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**32


def _require_place(path: Path) -> None:
    """Raises RunError where there is something else than a study."""
    ours = {_JOURNAL, _TURN, f"{_TURN}.lock", _WORKERS}  # others may be beginning it right now
    with rundir.writing(path, marked("Choose another --out.")):
        if (path / _MANIFEST).is_file():
            _manifest(path)
        elif not (path.is_dir() and {file.name for file in path.iterdir()} <= ours):
            rundir.check_target(path)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = reading.json_object(path / _MANIFEST, 64 << 20)
        parts = [manifest[name] for name in ("recipe", "data", "template", "base")]
        if "searched" in manifest and all(isinstance(part, dict) for part in [*parts, *manifest["recipe"].values()]):
            return manifest
        found = said("a folder of something else")
    except (OSError, ValueError, KeyError) as error:
        found = said("no manifest of a study ({error})", error=error)
    raise RunError(str(path), found, said("a new or empty folder, or that of a study"), said("Choose another --out."))


def _free_memory() -> None:
    """What a training leaves behind holds on to itself in circles, and the next trial's plan counts what is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
