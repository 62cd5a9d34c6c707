"""A recipe becomes an adapter.

A step is a set of rows, drawn as a pure function of (seed, epoch, data digest). Its loss is the sum over the
supervised tokens of all its rows divided by their number, so how the step is cut into micro-batches changes nothing.
Inside transformers' Trainer that is one override: the loader yields whole steps, `training_step` cuts them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import math
import platform
import random
import resource
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType

from tunesmith import adapter_files, rundir
from tunesmith import model as models
from tunesmith import recipe as recipes
from tunesmith.chat import Chat, Reply
from tunesmith.checking import Checked, check, hold_out, ledger, locate
from tunesmith.engine import ranks as processes
from tunesmith.engine.ranks import Ranks
from tunesmith.engine.step import Engine
from tunesmith.errors import ProofError, RecipeError
from tunesmith.recipe import Recipe
from tunesmith.report import write_report
from tunesmith.rows import Row
from tunesmith.rundir import RunDir
from tunesmith.types import Rendered

_SAMPLES = 3
_SAMPLE_TOKENS = 96


@dataclass(frozen=True)
class StepMetrics:
    """A line of metrics.jsonl."""

    step: int
    epoch: float
    loss: float
    """Sum over the step's supervised tokens, divided by their number (nats)."""
    learning_rate: float
    grad_norm: float
    """Before it is clipped."""
    supervised_tokens: int
    tokens: int
    """Tokens of the step's rows, without padding."""
    seconds: float
    peak_memory_bytes: int
    """Of the process so far: resident set on a CPU, allocator on CUDA."""


@dataclass(frozen=True)
class Sample:
    """One question with the answers before and after training."""

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
    peak_memory_bytes: int
    tokens: int
    supervised_tokens: int
    samples: tuple[Sample, ...]
    interrupted: bool = False
    checkpoint: Path | None = None
    """The newest point to go on from."""

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def __fspath__(self) -> str:
        """A run can be named wherever its folder can: `tunesmith.load(run)`."""
        return str(self.path)


class Watcher:
    """Is told what happens; the command line shows it. Every method may be left out."""

    def began(self, checked: Checked, n_steps: int, run: Path) -> None: ...
    def stepped(self, metrics: StepMetrics, n_steps: int) -> None: ...
    def measured(self, step: int, held_out_loss: float) -> None: ...
    def noted(self, text: str) -> None: ...


def train(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    sources: dict[str, recipes.Source] | None = None,
    watcher: Watcher | None = None,
    checked: Checked | None = None,
) -> Run:
    """Checks the data, trains, saves and reports; returns the finished run.

    `out` must be new or empty (default: runs/<data>-<model>). Ctrl-C ends it after the current step with a
    checkpoint and `Run.interrupted`; a second one at once. Raises DataError for faulty rows, RecipeError, ModelError,
    TemplateError and RunError before anything is written, ProofError when a result can not be right.
    """
    with processes.joined() as ranks, tempfile.TemporaryDirectory() as nowhere:
        if not ranks.is_main:  # it computes its share; what it writes down nobody needs
            out, watcher = Path(nowhere) / "run", None
        return _train(recipe, out, sources, watcher or Watcher(), checked, ranks)


def _train(
    recipe: Recipe,
    out: str | Path | None,
    sources: dict[str, recipes.Source] | None,
    watcher: Watcher,
    checked: Checked | None,
    ranks: Ranks,
) -> Run:
    path = Path(out) if out is not None else rundir.free_name(Path("runs"), _run_name(recipe))
    _check_settings(recipe)
    rundir.check_target(path)
    checked = checked or check(recipe)
    checked.require_ok()
    training, held_out = hold_out(checked)
    found = locate(recipe, weights=True)
    adapter_bytes = sum(target.parameters for target in checked.targets) * 4
    ranks.require_same(
        {
            "data": checked.data.digest,
            "recipe": json.dumps(recipe.model_dump(exclude={"data": {"path"}, "model": {"name"}})),
            "template": checked.renderer.template.digest,
            "version of tunesmith": importlib.metadata.version("tunesmith"),
            "version of torch": importlib.metadata.version("torch"),
        }
    )
    base = models.load_base(found, recipe.model)
    run = rundir.create(path, needed_bytes=adapter_bytes * (1 + 3 * (recipe.train.keep_checkpoints + 1)))
    rundir.write_text(run.recipe, recipes.write(recipe, sources or recipes.sources_of(recipe)))
    rundir.write_text(run.manifest, json.dumps(_manifest(checked, found.folder), indent=2, ensure_ascii=False) + "\n")
    rundir.write_lines(run.ledger, ledger(checked, training, held_out))

    chat = Chat(base, checked.renderer, models.generation_config(found.folder, checked.renderer.template))
    asked = list(itertools.islice(filter(_askable, held_out or training), _SAMPLES))
    before = _ask(chat, asked)
    model = models.attach(base, recipe.lora, recipe.train.seed, _base_name(checked))
    sharded = ranks.size > 1 and processes.wants_sharding()
    if sharded:
        processes.shard(model, models.decoder_layers(base))
    pissa_start = _save_pissa_start(model, run) if recipe.lora.variant == "pissa" else None

    steps = Steps(training, recipe.train.examples_per_step, recipe.train.seed, checked.data.digest)
    engine = Engine(model, recipe.engine, watcher.noted, ranks, sharded=sharded)
    with processes.unseen():
        trainer = _StepTrainer(model, engine, ranks, steps, held_out, recipe, run, watcher, pissa_start)
    watcher.began(checked, trainer.n_steps, path)
    began = time.monotonic()
    if held_out:
        trainer.measure()
    with _kind_interrupts(trainer):
        trainer.train()
    seconds = time.monotonic() - began
    if trainer.interrupted:
        trainer.save_point()
    else:
        adapter_files.write(run, model, checked, recipe, pissa_start)
    chat.model = model.eval()
    after = [] if trainer.interrupted else _ask(chat, asked)
    losses = [line["loss"] for line in rundir.read_lines(run.held_out)]
    lines = trainer.lines
    result = Run(
        path,
        len(lines),
        len(training),
        len(held_out),
        checked.n_set_aside,
        final_loss=lines[-1].loss if lines else math.nan,
        held_out_loss=(losses[0], losses[-1]) if len(losses) > 1 else None,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        tokens=sum(line.tokens for line in lines),
        supervised_tokens=sum(line.supervised_tokens for line in lines),
        samples=tuple(
            Sample(_question(row), row.conversation.messages[-1].content, b.text, a.text)
            for row, b, a in zip(asked, before, after, strict=False)
        ),
        interrupted=trainer.interrupted,
        checkpoint=max(run.checkpoints.glob("step-*"), default=None),
    )
    if not trainer.interrupted:
        write_report(run, result, checked)
    return result


# --- the data of a step -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step, as documents."""

    documents: tuple[Rendered, ...]

    @property
    def n_tokens(self) -> int:
        return sum(len(document.token_ids) for document in self.documents)

    @property
    def n_supervised(self) -> int:
        return sum(document.n_supervised for document in self.documents)


class Steps:
    """Yields the steps of an epoch; which rows they hold depends on seed, epoch and data digest alone."""

    def __init__(self, rows: Sequence[Row], examples_per_step: int, seed: int, digest: str) -> None:
        self.dataset, self._size, self._seed, self._digest = rows, examples_per_step, seed, digest
        self._epoch = 0

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self._size)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = int(epoch)

    def order(self, epoch: int) -> list[int]:
        """Indices of the rows in the order of an epoch."""
        order = list(range(len(self.dataset)))
        random.Random(f"{self._seed}:{epoch}:{self._digest}").shuffle(order)
        return order

    def __iter__(self) -> Iterator[Step]:
        order = self.order(self._epoch)
        for start in range(0, len(order), self._size):
            rows = [self.dataset[i] for i in order[start : start + self._size]]
            yield Step(tuple(document for row in rows for document in row.documents))


# --- Trainer ----------------------------------------------------------------------------------------------------------


class _StepTrainer(Trainer):
    """transformers' Trainer over whole steps."""

    def __init__(
        self,
        model: PeftModel,
        engine: Engine,
        ranks: Ranks,
        steps: Steps,
        held_out: Sequence[Row],
        recipe: Recipe,
        run: RunDir,
        watcher: Watcher,
        pissa_start: Path | None,
    ) -> None:
        settings = recipe.train
        self._tuned = model
        self._steps, self._recipe, self._run, self._watcher, self._pissa_start = (
            steps,
            recipe,
            run,
            watcher,
            pissa_start,
        )
        self.engine, self.ranks = engine, ranks
        self._held_out = [document for row in held_out for document in row.documents]
        self.n_steps = len(steps) * settings.epochs
        self.lines: list[StepMetrics] = []
        self.interrupted = False
        self._step_counts = (0, 0)
        arguments = TrainingArguments(
            output_dir=str(run.path),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=1,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.scheduler,
            # The first step of a warm-up has the rate 0, so a run of one step would learn nothing.
            warmup_steps=min(math.ceil(self.n_steps * settings.warmup_ratio), self.n_steps - 1),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            report_to=settings.report_to or "none",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            use_cpu=models.device().type == "cpu",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            run_name=run.path.name,
        )
        _ = arguments.device  # counts the GPUs; Trainer would spread the model over all of them with DataParallel
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(model=model, args=arguments, callbacks=[_Recorder(self)])
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> Any:
        return self._steps

    def get_batch_samples(
        self, epoch_iterator: Iterator[Step], num_batches: int, device: torch.device
    ) -> tuple[list[Step], None]:
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        step = cast("Step", inputs)
        model.train()
        self._step_counts = (step.n_supervised, step.n_tokens)
        return self.engine.gradient(step.documents, step.n_supervised)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # Trainer asks for the norm before it applies the step; a loss that is not finite shows in it too.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise ProofError(
                f"step {self.state.global_step + 1}",
                f"a gradient of norm {float(norm)}",
                "finite numbers",
                "The step was not applied and no adapter was saved; lower train.learning_rate, or check the weights.",
            )
        return norm

    def measure(self) -> float:
        """The held-out loss per supervised token, written down."""
        count = sum(document.n_supervised for document in self._held_out)
        loss = self.engine.loss(self._held_out) / count
        step = self.state.global_step
        self._run.append(
            self._run.held_out,
            {"step": step, "epoch": self.state.epoch or 0.0, "loss": loss, "supervised_tokens": count},
        )
        self._watcher.measured(step, loss)
        if step:
            self.log({"eval_loss": loss})
        return loss

    def save_point(self) -> Path:
        """A checkpoint of the state after the last step, with all that going on from it needs."""
        final = self._run.checkpoint(self.state.global_step)
        if not final.exists():
            with rundir.commit(final) as folder:
                models.save_adapter(self._tuned, folder / "adapter", self._pissa_start)
                self._save_optimizer_and_scheduler(str(folder))
                self._save_rng_state(str(folder))
                self.state.save_to_json(str(folder / "trainer_state.json"))
            rundir.thin_out(self._run, self._recipe.train.keep_checkpoints)
        return final


class _Recorder(TrainerCallback):
    """Writes a line per step, measures and saves when it is time."""

    def __init__(self, trainer: _StepTrainer) -> None:
        self._trainer = trainer
        self._began = self._saved = self._measured = time.monotonic()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        trainer = self._trainer
        if logs is None or "grad_norm" not in logs:
            return
        supervised, tokens = trainer._step_counts
        line = StepMetrics(
            state.global_step,
            round(state.epoch or 0.0, 6),
            logs["loss"],
            logs["learning_rate"],
            logs["grad_norm"],
            supervised,
            tokens,
            time.monotonic() - self._began,
            peak_memory_bytes(),
        )
        trainer.lines.append(line)
        trainer._run.append(trainer._run.metrics, asdict(line))
        trainer._watcher.stepped(line, trainer.n_steps)
        last = state.global_step == trainer.n_steps
        if trainer._held_out and (last or self._due(trainer._recipe.eval.every, self._measured)):
            self._measured = time.monotonic()
            trainer.measure()
        if not last and self._due(trainer._recipe.train.save_every, self._saved):
            self._saved = time.monotonic()
            trainer.save_point()
        trainer.interrupted = trainer.ranks.any(trainer.interrupted, args.device)
        if trainer.interrupted:
            control.should_training_stop = True

    def _due(self, every: str, since: float) -> bool:
        number, unit = every.split()
        if unit.startswith("minute"):
            return time.monotonic() - since >= 60 * int(number)
        step = self._trainer.state.global_step
        return step % (int(number) * (len(self._trainer._steps) if unit.startswith("epoch") else 1)) == 0


class _kind_interrupts:
    """While it holds, Ctrl-C and SIGTERM ask the trainer to stop after the step; the second Ctrl-C stops at once."""

    def __init__(self, trainer: _StepTrainer) -> None:
        self._trainer = trainer
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: the caller keeps its own handling
                return

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._trainer.interrupted:
            raise KeyboardInterrupt
        self._trainer.interrupted = True
        self._trainer._watcher.noted("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")


# --- what is written down ---------------------------------------------------------------------------------------------


def peak_memory_bytes() -> int:
    """The most memory so far: the process's resident set on a CPU, the allocator's on CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _manifest(checked: Checked, folder: Path) -> dict[str, Any]:
    template = checked.renderer.template
    packages = ("tunesmith", "torch", "transformers", "peft", "accelerate", "tokenizers")
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": {
            "path": str(Path(checked.data.path).absolute()),
            "sha256": checked.data.digest,
            "rows": checked.n_read,
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
            "config_sha256": rundir.sha256(folder / "config.json"),
        },
        "code": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": models.device().type,
        "threads": torch.get_num_threads(),
        "seed": checked.recipe.train.seed,
    }


def _base_name(checked: Checked) -> str:
    source = checked.found.source
    return source.partition(":")[2] if source.startswith("hf:") else str(checked.found.folder.absolute())


def _run_name(recipe: Recipe) -> str:
    return f"{Path(recipe.data.path).stem or 'run'}-{Path(recipe.model.name).name.removesuffix(':')}"


def _save_pissa_start(model: PeftModel, run: RunDir) -> Path:
    # peft subtracts this from the trained adapter, so that what is saved fits the base as it was (arXiv 2404.02948).
    start = run.path / "pissa_start"  # peft makes a module name of it
    config = cast("LoraConfig", model.peft_config["default"])
    config.init_lora_weights = True
    model.save_pretrained(str(start))
    config.init_lora_weights = "pissa"
    return start


def _check_settings(recipe: Recipe) -> None:
    schedulers = [scheduler.value for scheduler in SchedulerType]
    if recipe.train.scheduler not in schedulers:
        raise RecipeError(
            "train.scheduler",
            repr(recipe.train.scheduler),
            "one of " + ", ".join(schedulers),
            "cosine is a good choice.",
        )
    if absent := [name for name in recipe.train.report_to if name not in get_available_reporting_integrations()]:
        raise RecipeError(
            "train.report_to",
            ", ".join(absent),
            "a tracker that is installed",
            f"Install it with: pip install {' '.join(absent)}",
        )


def _askable(row: Row) -> bool:
    return len(row.documents[-1].prompt_ids) < 1024


def _question(row: Row) -> str:
    return row.conversation.messages[-2].content


def _ask(chat: Chat, rows: Sequence[Row]) -> list[Reply]:
    talks = [row.conversation.messages[:-1] for row in rows]
    return chat.replies(talks, temperature=0, max_tokens=_SAMPLE_TOKENS) if rows else []
