"""A recipe becomes an adapter: check, load, train, save, report; and going on where a run was stopped."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import operator
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType

from tunesmith import caller, driver, markup, models, runs
from tunesmith import recipe as recipes
from tunesmith.chat import Chat, Reply
from tunesmith.data.records.found import plain
from tunesmith.data.rows import Row, Rows
from tunesmith.engine import ranks as processes
from tunesmith.engine.cpu import onepass
from tunesmith.engine.hf import liger
from tunesmith.engine.ranks import Ranks
from tunesmith.errors import ProofError, RecipeError, RunError
from tunesmith.language import counted, said
from tunesmith.recipe import Recipe, settled
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.training import adapter_files, notebook, planning, rehearsed
from tunesmith.training.checking import Checked, check, hold_out, ledger, locate
from tunesmith.training.interrupts import Interrupts
from tunesmith.training.report import write_report
from tunesmith.training.steps import Steps
from tunesmith.training.trainer import (
    StepMetrics,
    StepTrainer,
    Watcher,
    earlier_lines,
    has_lost_patience,
    peak_memory_bytes,
)
from tunesmith.types import Message

SAMPLE_TOKENS = rehearsed.ANSWER_TOKENS
"""Of a sample before and after; as many as of what is rehearsed, because both are answered side by side."""
_EXTENDED = "train.epochs"  # what a run may be given more of


@dataclass(frozen=True)
class Sample:
    """One question with the answers before and after training; … ends one that was cut because it had become too
    long."""

    question: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class Run:
    """A finished (or interrupted) training."""

    path: Path
    steps: int
    rows_trained: int
    rows_held_out: int
    rows_set_aside: int
    final_loss: float
    held_out_loss: tuple[float, float] | None
    """Before and after training; None where nothing is held out."""
    seconds: float
    """Of work, over all times that it was gone on with: the base's answers, steps, measures, checkpoints."""
    peak_memory_bytes: int
    tokens: int
    supervised_tokens: int
    samples: tuple[Sample, ...]
    answers: tuple[tuple[Reply, Reply], ...] = ()
    """To `train`'s questions, before and after; none where it was interrupted."""
    interrupted: bool = False
    checkpoint: Path | None = None
    """The newest point to go on from."""
    asked: bool = False
    """Somebody asked to stop, be it at the last step."""

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def __repr__(self) -> str:
        return f"<Run {self._in_a_line}>"

    def _repr_html_(self) -> str:
        rows = said(
            "{trained:,} trained + {held_out:,} held out + {set_aside:,} set aside",
            trained=self.rows_trained,
            held_out=self.rows_held_out,
            set_aside=self.rows_set_aside,
        )
        tokens = said("{total:,}, of them learned {learned:,}", total=self.tokens, learned=self.supervised_tokens)
        facts = [
            (said("rows"), rows),
            (said("tokens"), tokens),
            (said("time"), planning.clock(self.seconds)),
            (said("checkpoint"), self.checkpoint) if self.interrupted else (said("adapter"), self.adapter),
        ]
        head = (said("question"), said("before"), said("after"))
        asked = markup.table(((s.question, s.before, s.after) for s in self.samples), head)
        return markup.block(self._in_a_line, markup.table(facts), *([asked] if self.samples else []))

    @property
    def _in_a_line(self) -> str:
        values = {"run": plain(str(self.path)), "n": self.steps, "loss": self.final_loss}
        text = said("{run}: {n:,} steps, last loss {loss:.3f}", **values)
        if self.interrupted:
            text = said("{run}: stopped after {n:,} steps, last loss {loss:.3f}", **values)
        if self.held_out_loss:
            text += said(", held-out loss {loss}", loss="{:.3f} → {:.3f}".format(*self.held_out_loss))
        return text

    def __fspath__(self) -> str:
        """A run can be named wherever its folder can: `tunesmith.load(run)`."""
        return str(self.path)


def train(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    sources: dict[str, recipes.Source] | None = None,
    watcher: Watcher | None = None,
    checked: Checked | None = None,
    anyway: bool = False,
    questions: Sequence[str] = (),
) -> Run:
    """Checks the data, trains, saves and reports; returns the finished run.

    `out` must be new or empty (default: runs/<data>-<model>). Ctrl-C, SIGTERM or a closing terminal end it after the
    current step with a checkpoint and `Run.interrupted`; before the first step, or with a second Ctrl-C, at once by
    KeyboardInterrupt. `resume` goes on. Settings that are `auto` are chosen by the plan; a training that will not fit
    into memory raises OutOfMemory, unless it is wanted `anyway`. `questions` are asked before and after
    (`Run.answers`). Raises DataError for faulty rows, RecipeError,
    ModelError, TemplateError and RunError before anything is written, ProofError when a result can not be right.
    """
    told = watcher = watcher or notebook.watcher()
    with (
        processes.joined() as ranks,
        tempfile.TemporaryDirectory() as nowhere,
        Interrupts(lambda text: told.noted(text)) as interrupts,
    ):
        if not ranks.is_main:  # it computes its share; what it writes down nobody needs
            out, watcher = Path(nowhere) / "run", Watcher()
        path = Path(out) if out is not None else rundir.free_name(Path("runs"), run_name(recipe))
        _check_settings(recipe)
        _require_same_recipe(recipe, checked)
        rundir.check_target(path)
        checked = checked or check(recipe)
        checked.require_ok()
        sharded = ranks.size > 1 and processes.wants_sharding()
        made = planning.plan(checked, questions=questions, shares=ranks.size if sharded else 1)
        watcher.planned(made)
        if not (made.fits or anyway):
            raise made.too_large()
        _say_what_is_idle(watcher)
        chosen = ranks.from_main(made.chosen)
        checked = replace(checked, found=locate(recipe, weights=True))
        work = _Work(recipe, chosen, checked, *hold_out(checked), ranks, watcher, interrupts, questions)
        work.require_same_everywhere()
        base = work.load_base()
        run = rundir.create(path, needed_bytes=work.bytes_on_disk())
        with runs.occupied(run, recipe.model.name, recipe.data.path) as tell:
            sources = sources or recipes.sources_of(recipe)
            beside = _beside_auto(checked, [asdict(choice) for choice in made.choices])
            rundir.write_text(run.recipe, recipes.write(recipe, sources, beside))
            rundir.write_lines(run.ledger, ledger(checked, work.training, work.held_out))
            if work.held_out:  # so that the run can be measured when the data is elsewhere
                talks = (row.conversation.messages for row in work.held_out)
                lines = ({"messages": [message.as_dict() for message in talk]} for talk in talks)
                rundir.write_lines(run.held_out_rows, lines)
            # The last of them: where it is, the run can be gone on with.
            rundir.write_json(run.manifest, {**_manifest(work), "sources": sources, "plan": made.as_dict()})
            return work.carry_out(run, base, None, tell)


def _say_what_is_idle(watcher: Watcher) -> None:
    for note in (processes.idle_cores(), driver.unused_card()):
        if note is not None:
            watcher.noted(str(note))


def resume(path: str | Path, *, epochs: int | None = None, watcher: Watcher | None = None) -> Run:
    """Goes on with a run that was stopped or killed, as if it never had been; `epochs` lets it go on for longer.

    Begins at the newest checkpoint that is whole, or anew where there was none yet. On a CPU the adapter and all
    numbers are those of the run undisturbed. Returns what `train` does; a finished run is left as it is. Raises
    RunError when another process trains in it or when data, base, template or recipe are not those that it began
    with, ProofError when there are checkpoints and none is whole.
    """
    told = watcher = watcher or notebook.watcher()
    with (
        processes.joined() as ranks,
        tempfile.TemporaryDirectory() as nowhere,
        Interrupts(lambda text: told.noted(text)) as interrupts,
    ):
        run = origin = RunDir(Path(path))
        point, damaged = None, list[Path]()
        if ranks.is_main:
            if note := runs.require_free(origin):
                watcher.noted(note)
            point, damaged = rundir.newest_whole(origin)
            for folder in damaged:
                watcher.noted(said("{folder} is damaged (its digests differ) and is left out.", folder=folder))
            if damaged and point is None:
                raise ProofError(
                    str(damaged[-1]),
                    said("{n} checkpoints and none of them whole", n=len(damaged)),
                    said("one to go on from"),
                    said("Train again with another --out."),
                )
            rundir.mend(origin, point)
        name = ranks.from_main(point and point.name)
        point = name and origin.checkpoints / name
        origin = rundir.open_run(origin.path)
        recipe, sources, manifest = recipe_of(origin, epochs)
        if not ranks.is_main:
            watcher, run = Watcher(), rundir.create(Path(nowhere) / "run")
            for file in (origin.recipe, origin.manifest):
                shutil.copyfile(file, run.path / file.name)
        step = 0 if point is None else rundir.step_of(point)

        def unchanged() -> _Work:
            checked = check(recipe)
            checked.require_ok()
            chosen = _chosen_at_first(recipe, manifest)
            checked = replace(checked, found=locate(recipe, weights=True))
            work = _Work(recipe, chosen, checked, *hold_out(checked), ranks, watcher, interrupts)
            _require_unchanged(origin, manifest, _manifest(work), watcher)
            return work

        ended = origin.report.is_file() and rundir.is_whole(origin.adapter)
        if ranks.from_main(ended) and (work := unchanged()).has_ended(origin, step):
            return work.finished(origin, step)  # nothing is written, not even that somebody was here
        with runs.occupied(run, recipe.model.name, recipe.data.path) as tell:
            for folder in damaged:  # or they would be in the way of those written anew
                shutil.rmtree(folder)
            work = unchanged()
            _say_what_is_idle(watcher)
            if epochs is not None:
                sources[_EXTENDED] = "flag"
                beside = _beside_auto(work.checked, manifest["plan"]["choices"])
                rundir.write_text(run.recipe, recipes.write(recipe, sources, beside))
                rundir.write_json(run.manifest, {**manifest, "recipe": recipe.model_dump(), "sources": sources})
            rundir.require_space(run.path, work.bytes_on_disk())
            work.require_same_everywhere(point)
            base = work.load_base()
            return work.carry_out(run, base, point, tell)


@dataclass(frozen=True)
class _Work:
    """What a run is made of."""

    recipe: Recipe
    chosen: Mapping[str, Any]
    """What the plan chose where the recipe leaves it open."""
    checked: Checked
    training: Rows
    held_out: Rows
    ranks: Ranks
    watcher: Watcher
    interrupts: Interrupts
    questions: Sequence[str] = ()

    @property
    def settled(self) -> Recipe:
        """The recipe with nothing left open."""
        return planning.applied(self.recipe, self.chosen)

    @property
    def sharded(self) -> bool:
        """Each process holds a share of the base's weights."""
        return self.ranks.size > 1 and processes.wants_sharding()

    def load_base(self) -> PreTrainedModel:
        """The base on this process's device; where it is sharded, on the CPU, in pages of its files."""
        where = torch.device("cpu") if self.sharded else models.device()
        return models.load_base(self.checked.found, self.settled.model, where)

    @property
    def n_steps(self) -> int:
        settings = self.settled.train
        return math.ceil(len(self.training) / settled(settings.examples_per_step)) * settled(settings.epochs)

    def bytes_on_disk(self) -> int:
        """All that a run will write: the adapter, and for every checkpoint the adapter twice and the optimizer's two
        numbers for each of its own; one more checkpoint stands there while the oldest is not gone."""
        adapter = sum(target.parameters for target in self.checked.targets) * 4
        return adapter * (1 + 4 * (self.recipe.train.keep_checkpoints + 1))

    def require_same_everywhere(self, point: Path | None = None) -> None:
        files = point and point / "files.json"
        whole = files and self.ranks.size > 1 and rundir.is_whole(files.parent)
        self.ranks.require_same(
            {
                "checkpoint": rundir.sha256(files) if files and whole else f"{files} that is not whole",
                "data": self.checked.data.digest,
                "recipe": json.dumps(self.recipe.model_dump(exclude={"data": {"path"}, "model": {"name"}})),
                "template": self.checked.renderer.template.digest,
                "version of tunesmith": importlib.metadata.version("tunesmith"),
                "version of torch": importlib.metadata.version("torch"),
            }
        )

    def carry_out(self, run: RunDir, base: PreTrainedModel, point: Path | None, tell: Callable[..., float]) -> Run:
        """Trains from the checkpoint (None: from the beginning) to the end, or until somebody asks to stop."""
        recipe, checked, watcher, interrupts = self.settled, self.checked, self.watcher, self.interrupts
        step = 0 if point is None else rundir.step_of(point)
        earlier = earlier_lines(run, step) if self.ranks.is_main else []
        for path in (run.metrics, run.held_out):
            rundir.keep_lines(path, lambda line: line["step"] <= step and point is not None)

        generation = models.generation_config(self.checked.found.folder, checked.renderer.template)
        asked = planning.asked(self.training, self.held_out)
        talks = [row.conversation.messages[:-1] for row in asked]
        talks += [(Message("user", question),) for question in self.questions]

        def answered(untuned: PreTrainedModel | PeftModel) -> tuple[list[Reply], Sequence[Row], int]:
            return self._answered(
                run, Chat(untuned, checked.renderer, generation, recipe.template.system), talks, point
            )

        answers = None if self.sharded else answered(base)
        model = models.attach(base, recipe.lora, recipe.train.seed, _base_name(checked))
        if self.sharded:
            processes.shard(model, models.decoder_layers(base), models.device())
        # Where no process has the whole base: a new adapter changes nothing of what it says.
        before, general, per_epoch = answers or answered(model.eval())
        pissa_start = _save_pissa_start(model, run) if recipe.lora.variant == "pissa" else None

        size, seed = settled(recipe.train.examples_per_step), recipe.train.seed
        steps = Steps(self.training, size, seed, checked.data.digest, general, per_epoch)
        with processes.unseen():
            trainer = StepTrainer(
                model, steps, self.held_out, recipe, run, watcher, interrupts, self.ranks, self.sharded, pissa_start
            )
        tell(n_steps=trainer.n_steps)
        watcher.began(trainer.n_steps, run.path)
        if point is not None:
            trainer.note(said("Went on after step {step}.", step=step))
            watcher.went_on(earlier)
        with interrupts.gently():
            if self.held_out and point is None:
                trainer.measure()
            trainer.go_on_from(point, earlier)
        if not trainer.interrupted:
            trainer.take_best()
            adapter_files.write(run, model, checked, recipe, pissa_start)
            trainer.close()
        tuned = Chat(model.eval(), checked.renderer, generation)
        pairs = [] if trainer.interrupted else list(zip(before, _replies(tuned, talks), strict=False))
        samples = tuple(
            Sample(_question(row), row.conversation.messages[-1].content, b.shown, a.shown)
            for row, (b, a) in zip(asked, pairs, strict=False)
        )
        ended: dict[str, Any] = {"state": "interrupted", "exit_code": 130} if trainer.interrupted else {}
        result = self._result(
            run, trainer.lines, tell(work_ended=True, **ended), samples, interrupted=trainer.interrupted
        )
        result = replace(result, answers=tuple(pairs[len(asked) :]))
        if not trainer.interrupted:
            write_report(run, result, checked)
        return result

    def _answered(
        self, run: RunDir, base: Chat, talks: Sequence[Sequence[Message]], point: Path | None
    ) -> tuple[list[Reply], Sequence[Row], int]:
        """What the base replies to some talks; the general prompts with its answers, and how many an epoch has. These
        are put down in the run's folder, and taken from there where the run goes on from a checkpoint.

        Raises ProofError where the file is not the one that the run began with.
        """
        replies, lines, per_epoch = list[Reply](), list[dict[str, Any]](), 0
        settings = self.settled.train
        if settings.rehearse and point is not None and self.ranks.is_main:
            lines, per_epoch = _unchanged_rehearsal(run)
        if not (self.ranks.is_main or self.sharded):  # sharded weights are collected by all processes together
            pass
        elif not settings.rehearse or point is not None:
            replies = _replies(base, talks)
        else:
            per_epoch = rehearsed.per_epoch(settled(settings.rehearse), int(self.training.n_supervised.sum()))
            n_prompts = rehearsed.n_prompts(per_epoch, settled(settings.epochs))
            rows = planning.general_prompts(self.checked, n_prompts)
            note = said("The base answers {n} general prompts, to be trained along with the rows …", n=len(rows))
            self.watcher.noted(note)
            prompts = [row.conversation.messages[0] for row in rows]
            asked = [*talks, *([prompt] for prompt in prompts)]
            replies = base.replies(asked, temperature=0, max_tokens=rehearsed.ANSWER_TOKENS)
            lines = [
                {"prompt": prompt.content, "answer": r.text, "prompt_ids": r.prompt_ids, "answer_ids": r.token_ids}
                for prompt, r in zip(prompts, replies[len(talks) :], strict=True)
            ]
            rundir.write_lines(run.rehearsal, lines)
            made = {"prompts": len(lines), "per_epoch": per_epoch, "sha256": rundir.sha256(run.rehearsal)}
            rundir.write_json(run.manifest, {**rundir.read_manifest(run), "rehearsal": made})
        lines, per_epoch = self.ranks.from_main([lines, per_epoch])
        return replies[: len(talks)], rehearsed.rows_of(lines), per_epoch

    def has_ended(self, run: RunDir, step: int) -> bool:
        """Whether nothing is to be done after a step."""
        losses = [line["loss"] for line in rundir.read_lines(run.held_out) if line["step"]]
        return step == self.n_steps or has_lost_patience(losses, self.recipe.eval.patience)

    def finished(self, run: RunDir, step: int) -> Run:
        """A run that has nothing left to do."""
        how = said("This run is done. It can go on for longer: --set train.epochs=N.")
        if step < self.n_steps:
            patience = self.recipe.eval.patience
            how = said("This run is done. It stopped because of eval.patience={patience}.", patience=patience)
        self.watcher.noted(caller.told(how))
        lines = earlier_lines(run, step)
        return self._result(run, lines, runs.state_of(run.path).seconds, (), interrupted=False)

    def _result(
        self,
        run: RunDir,
        lines: Sequence[StepMetrics],
        seconds: float,
        samples: tuple[Sample, ...],
        *,
        interrupted: bool,
    ) -> Run:
        losses = [line["loss"] for line in rundir.read_lines(run.held_out)]
        kept = min if self.recipe.eval.keep == "best" else operator.itemgetter(-1)
        return Run(
            run.path,
            len(lines),
            len(self.training),
            len(self.held_out),
            self.checked.n_set_aside,
            final_loss=lines[-1].loss if lines else math.nan,
            held_out_loss=(losses[0], kept(losses[1:])) if len(losses) > 1 else None,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
            tokens=sum(line.tokens for line in lines),
            supervised_tokens=sum(line.supervised_tokens for line in lines),
            samples=samples,
            interrupted=interrupted,
            checkpoint=(run.points() or [None])[-1],
            asked=self.interrupts.asked,
        )


# --- is it the same run? ----------------------------------------------------------------------------------------------


def recipe_of(run: RunDir, epochs: int | None = None) -> tuple[Recipe, dict[str, recipes.Source], dict[str, Any]]:
    """A run's recipe as it began, with where its values came from, and its manifest.

    Raises RunError when recipe.yaml is no longer what the run began with, or the manifest can not be read.
    """
    recipe, _ = recipes.resolve(run.recipe, as_written=True)
    manifest = rundir.read_manifest(run)
    began_with = manifest["recipe"]
    given = recipe.model_dump()
    changed = [
        said(
            "{name} was {before!r} and is {now!r}",
            name=name,
            before=began_with[section].get(field),
            now=given[section][field],
        )
        for name in recipes.setting_names()
        for section, _, field in [name.partition(".")]
        if given[section][field] != began_with[section].get(field)
    ]
    if changed:
        raise RunError(
            str(run.recipe),
            "; ".join(changed),
            said("the settings that the run began with"),
            said("Undo it, or train anew."),
        )
    if epochs is not None:
        began = settled(planning.applied(recipe, _chosen_at_first(recipe, manifest)).train.epochs)
        if epochs < began:
            found, expected = f"{epochs}", said("at least {n}, as the run began", n=began)
            raise RecipeError(_EXTENDED, found, expected, said("A run can be made longer, not shorter."))
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": epochs})})
    # Relative names were given where the run was started.
    if not Path(recipe.data.path).exists():
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": manifest["data"]["path"]})})
    if manifest["base"]["source"] == "folder" and not Path(recipe.model.name).exists():
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": manifest["base"]["path"]})})
    return recipe, manifest["sources"], manifest


def _chosen_at_first(recipe: Recipe, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the plan chose of that which the recipe leaves open."""
    given = recipe.model_dump()
    chosen = {choice["setting"]: choice["value"] for choice in manifest["plan"]["choices"]}
    return {name: value for name, value in chosen.items() for s, _, f in [name.partition(".")] if given[s][f] == "auto"}


def _require_unchanged(run: RunDir, before: dict[str, Any], now: dict[str, Any], watcher: Watcher) -> None:
    """Raises RunError naming what is not as it was when the run began; other versions of libraries are noted."""
    digests = {
        "the data": ("data", "sha256"),
        "the chat template": ("template", "sha256"),
        "the base's config": ("base", "config_sha256"),
        "the base's weights": ("base", "weights"),
        "the tokenizer's stop ids": ("template", "stop_ids"),
    }
    changed = [name for name, (section, key) in digests.items() if before[section].get(key) != now[section].get(key)]
    if changed:
        raise RunError(
            str(run.path),
            said(
                "another state of {parts} ({data}, {base})",
                parts=said(" and of ").join(changed),
                data=now["data"]["path"],
                base=now["base"]["folder"],
            ),
            said("what the run began with"),
            said("Put it back, or train anew with another --out."),
        )
    code, code_before = now["code"], before["code"]
    if other := [
        f"{name} {code.get(name, said('missing'))}"
        for name in sorted({*code, *code_before})
        if code.get(name) != code_before.get(name)
    ]:
        versions = ", ".join(other)
        watcher.noted(
            said("Not the versions that the run began with: {versions}. The last digits may differ.", versions=versions)
        )


def _unchanged_rehearsal(run: RunDir) -> tuple[list[dict[str, Any]], int]:
    before = rundir.read_manifest(run)["rehearsal"]
    if not run.rehearsal.is_file() or rundir.sha256(run.rehearsal) != before["sha256"]:
        found = said("other answers than the base gave") if run.rehearsal.is_file() else said("no file")
        raise ProofError(
            str(run.rehearsal), found, said("the file that training wrote"), said("Put it back, or train anew.")
        )
    return rundir.read_lines(run.rehearsal), before["per_epoch"]


# --- what is written down ---------------------------------------------------------------------------------------------


def _kernels() -> dict[str, str | None]:
    return {"numba": onepass.version(), "liger-kernel": liger.version(models.device())}


def _manifest(work: _Work) -> dict[str, Any]:
    checked, folder = work.checked, work.checked.found.folder
    template = checked.renderer.template
    packages = ("tunesmith", "torch", "transformers", "peft", "accelerate", "tokenizers")
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": {
            "path": str(Path(checked.data.path).absolute()),
            "sha256": checked.data.digest,
            "rows": checked.n_read,
            **({"rehearse": str(Path(prompts).absolute())} if (prompts := checked.recipe.data.rehearse) else {}),
        },
        "template": {
            "source": template.source,
            "sha256": template.digest,
            "stop_ids": list(template.stop_ids),
            "folds_system": template.folds_system,
        },
        "base": {
            "name": checked.recipe.model.name,
            "source": checked.found.source,
            "revision": checked.found.revision,
            "folder": str(folder.absolute()),
            "path": str(Path(checked.recipe.model.name).absolute()),
            "config_sha256": rundir.sha256(folder / "config.json"),
            "weights": rundir.weights_of(folder),
        },
        "code": {name: importlib.metadata.version(name) for name in packages}
        | {name: kernels for name, kernels in _kernels().items() if kernels},
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": models.device().type,
        "threads": torch.get_num_threads(),
        "seed": checked.recipe.train.seed,
        "recipe": checked.recipe.model_dump(),
    }


def _beside_auto(checked: Checked, choices: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What `auto` came to here, by setting, and why."""
    return {
        "data.max_length": said("{n}, all that the model can read", n=models.context_length(checked.config)),
        "template.name": checked.renderer.template.described,
        "engine.attention": "flex" if models.device().type == "cuda" else "gather",
        "eval.hold_out": counted("{n:,} row", "{n:,} rows", checked.n_held_out),
        **{each["setting"]: f"{each['value']}, {each['why']}" for each in choices},
    }


def _base_name(checked: Checked) -> str:
    source = checked.found.source
    return source.partition(":")[2] if source.startswith("hf:") else str(checked.found.folder.absolute())


def run_name(recipe: Recipe) -> str:
    """What a run's folder is called where nobody says it."""
    return f"{Path(recipe.data.path).stem or 'run'}-{Path(recipe.model.name).name.removesuffix(':')}"


def _save_pissa_start(model: PeftModel, run: RunDir) -> Path:
    # peft subtracts this from the trained adapter, so that what is saved fits the base as it was (arXiv 2404.02948).
    start = run.path / "pissa_start"  # peft makes a module name of it
    start.mkdir(0o700, exist_ok=True)
    config = cast("LoraConfig", model.peft_config["default"])
    config.init_lora_weights = True
    model.save_pretrained(str(start))
    config.init_lora_weights = "pissa"
    return start


def _check_settings(recipe: Recipe) -> None:
    if recipe.model.quantize == "nf4" and processes.wants_sharding():
        raise RecipeError(
            "model.quantize",
            said("nf4 with weights that are spread over several processes"),
            said("one of the two"),
            said("Leave --use_fsdp out: each process then holds the base in 4 bits."),
        )
    schedulers = [scheduler.value for scheduler in SchedulerType]
    if recipe.train.scheduler not in schedulers:
        raise RecipeError(
            "train.scheduler",
            repr(recipe.train.scheduler),
            said("one of {names}", names=", ".join(schedulers)),
            said("cosine is a good choice."),
        )
    if absent := [name for name in recipe.train.report_to if name not in get_available_reporting_integrations()]:
        raise RecipeError(
            "train.report_to",
            ", ".join(absent),
            said("a tracker that is installed"),
            said("Install it with: {command}", command=f"pip install {' '.join(absent)}"),
        )


def _require_same_recipe(recipe: Recipe, checked: Checked | None) -> None:
    was, given = (checked.recipe if checked else recipe).model_dump(), recipe.model_dump()
    others = [name for name in recipes.setting_names() for s, _, f in [name.partition(".")] if was[s][f] != given[s][f]]
    if others:
        fix = said("Give check(recipe) of the recipe that is trained, or leave `checked` out.")
        raise RecipeError(
            "checked",
            said("a check with another {names}", names=", ".join(others)),
            said("a check of the same recipe"),
            fix,
        )


def _question(row: Row) -> str:
    return row.conversation.messages[-2].content


def _replies(chat: Chat, talks: Sequence[Sequence[Message]]) -> list[Reply]:
    return chat.replies(talks, temperature=0, max_tokens=SAMPLE_TOKENS) if talks else []
