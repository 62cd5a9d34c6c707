"""transformers' Trainer over whole steps.

A step is a set of rows, drawn as a pure function of (seed, epoch, data digest). Its loss is the sum over the
supervised tokens of all its rows divided by their number, so how the step is cut into micro-batches changes nothing.
Inside Trainer that is one override: the loader yields whole steps, `training_step` cuts them.
"""

from __future__ import annotations

import math
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from tunesmith import model_files, models, reading
from tunesmith.confined import confined
from tunesmith.data.rows import Row
from tunesmith.engine.cpu import memory
from tunesmith.engine.ranks import Ranks
from tunesmith.engine.step import Engine
from tunesmith.errors import OutOfMemory, ProofError
from tunesmith.language import said
from tunesmith.recipe import Recipe, settled
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.training import guards
from tunesmith.training.interrupts import Interrupts
from tunesmith.training.steps import Step, Steps
from tunesmith.types import Rendered

if TYPE_CHECKING:
    from tunesmith.training.planning import Plan


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
    notes: tuple[str, ...] = ()
    """What was noted since the step before; left out of the file where there is nothing."""

    def as_dict(self) -> dict[str, Any]:
        line = asdict(self)
        return line if self.notes else {name: value for name, value in line.items() if name != "notes"}

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> StepMetrics:
        known = {field.name: line[field.name] for field in fields(cls) if field.name in line}
        return cls(**{**known, "notes": tuple(line.get("notes", ()))})


class Watcher:
    """Is told what happens; the command line shows it. Every method may be left out."""

    def planned(self, plan: Plan) -> None: ...
    def began(self, n_steps: int, run: Path) -> None: ...
    def went_on(self, earlier: Sequence[StepMetrics]) -> None: ...
    def stepped(self, metrics: StepMetrics, n_steps: int) -> None: ...
    def measured(self, step: int, held_out_loss: float) -> None: ...
    def noted(self, text: str) -> None: ...

    def enough(self) -> bool:
        """Asked after each step: whether to stop there, with a checkpoint, as Ctrl-C would."""
        return False


# --- Trainer ----------------------------------------------------------------------------------------------------------


class StepTrainer(Trainer):
    """Trains whole steps, and writes down what happens."""

    def __init__(
        self,
        model: PeftModel,
        steps: Steps,
        held_out: Sequence[Row],
        recipe: Recipe,
        run: RunDir,
        watcher: Watcher,
        interrupts: Interrupts,
        ranks: Ranks,
        sharded: bool,
        pissa_start: Path | None,
    ) -> None:
        settings = recipe.train
        self._tuned, self._steps, self._recipe, self._run = model, steps, recipe, run
        self._watcher, self._interrupts, self._pissa_start = watcher, interrupts, pissa_start
        self._held_out = [document for row in held_out for document in row.documents]
        epochs = settled(settings.epochs)
        self.n_steps = len(steps) * epochs
        self.lines: list[StepMetrics] = []
        self._measured: dict[int, float] = {}
        """The held-out loss after some steps."""
        self._step = Step(())
        self._notes: list[str] = []
        self._losses = guards.Losses()
        self._ranks = ranks
        self._engine = Engine(model, recipe.engine, self.note, ranks, sharded=sharded)
        arguments = TrainingArguments(
            output_dir=str(run.path),
            num_train_epochs=epochs,
            per_device_train_batch_size=1,
            learning_rate=settled(settings.learning_rate),
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
        on_one_device(arguments, next(model.parameters()).device)
        super().__init__(model=model, args=arguments, callbacks=[_Recorder(self)])
        self.remove_callback(PrinterCallback)

    @property
    def best(self) -> int | None:
        """The step with the lowest held-out loss so far, where its adapter is to be kept."""
        if self._recipe.eval.keep == "last" or not self._measured:
            return None
        return min(self._measured, key=self._measured.__getitem__)

    @property
    def has_lost_patience(self) -> bool:
        """The held-out loss has been measured so often without a new lowest that the recipe says stop."""
        return has_lost_patience(list(self._measured.values()), self._recipe.eval.patience)

    @property
    def interrupted(self) -> bool:
        """Stopped before the last step, because somebody asked for it."""
        return self._interrupts.asked and self.state.global_step < self.n_steps and not self.has_lost_patience

    def note(self, text: str) -> None:
        """Says it, and writes it down with the next step."""
        self._notes.append(text)
        self._watcher.noted(text)

    def get_train_dataloader(self) -> Any:
        return self._steps

    def get_batch_samples(
        self, epoch_iterator: Iterator[Step], num_batches: int, device: torch.device
    ) -> tuple[list[Step], None]:
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._step = step = cast("Step", inputs)
        model.train()
        return self._engine.gradient(step.documents, step.n_supervised)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # Trainer asks for the norm before it applies the step; a loss that is not finite shows in it too.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        number = self.state.global_step + 1
        if norm is not None and not math.isfinite(norm):
            self._stop_not_finite(
                said("step {step}", step=number),
                said("a gradient of norm {norm}", norm=float(norm)),
                self._step.documents,
            )
        if number == 1:
            guards.require_gradients(self._tuned)
        return norm

    def measure(self) -> float:
        """The held-out loss per supervised token, written down. Raises ProofError where it is not finite."""
        count = sum(document.n_supervised for document in self._held_out)
        loss = self._engine.loss(self._held_out) / count
        step = self.state.global_step
        if not math.isfinite(loss):
            self._stop_not_finite(
                said("the held-out rows after step {step}", step=step),
                said("a loss of {loss}", loss=loss),
                self._held_out,
            )
        self._run.append(
            self._run.held_out,
            {"step": step, "epoch": self.state.epoch or 0.0, "loss": loss, "supervised_tokens": count},
        )
        self._watcher.measured(step, loss)
        if step:
            self._measured[step] = loss
            self.log({"eval_loss": loss})
        return loss

    def _stop_not_finite(self, where: str, found: str, documents: Sequence[Rendered]) -> NoReturn:
        self._engine.close()  # plain transformers computes what follows
        guards.stop_not_finite(where, found, self._run, self._tuned, documents)

    # --- points to go on from ----------------------------------------------------------------------------------------

    def save_point(self) -> Path:
        """A checkpoint of the state after the last step, with all that going on from it needs."""
        final = self._run.checkpoint(self.state.global_step)
        if not final.exists():
            for path in (self._run.metrics, self._run.held_out):  # a checkpoint has a name when its lines are on disk
                if path.is_file():
                    rundir.sync(path)
            with rundir.commit(final, readers="owner") as folder:
                models.save_adapter(self._tuned, folder / "adapter", self._pissa_start)
                save_file({name: p.detach().contiguous() for name, p in self._trained()}, folder / _TRAINED)
                self._save_optimizer_and_scheduler(str(folder))
                self._save_rng_state(str(folder))
                rundir.write_json(folder / _ENGINE, self._engine.found)
                self.state.save_to_json(str(folder / "trainer_state.json"))
                for path in (self._run.recipe, self._run.manifest):
                    shutil.copyfile(path, folder / path.name)
            rundir.thin_out(self._run, self._recipe.train.keep_checkpoints, self.best)
        return final

    def take_best(self) -> None:
        """Gives the model the weights of the step with the lowest held-out loss, where that is asked for."""
        if self.best is not None and self.best != self.state.global_step:
            self._load_from_checkpoint(self._ranks.from_main(str(self._run.checkpoint(self.best))))
            self.note(said("The adapter is that of step {step}, with the lowest held-out loss.", step=self.best))

    def go_on_from(self, point: Path | None, earlier: Sequence[StepMetrics]) -> None:
        """Trains to the end, or until somebody asks to stop; from a checkpoint where one is given."""
        self.lines = list(earlier)
        measured = {line["step"]: line["loss"] for line in rundir.read_lines(self._run.held_out) if line["step"]}
        self._measured = {int(step): loss for step, loss in self._ranks.from_main(list(measured.items()))}
        if point is not None and self.has_lost_patience:  # killed between its last step and its end
            self.state.global_step = rundir.step_of(point)
            self._load_from_checkpoint(str(point))
            return
        if point is not None and (point / _ENGINE).exists():  # older ones have none
            with _readable(point / _ENGINE):
                self._engine.go_on_with(reading.json_object(point / _ENGINE, 1 << 10))
        try:
            self.train(resume_from_checkpoint=None if point is None else str(point))
        except memory.RAISED as error:
            if isinstance(error, OutOfMemory) or not memory.ran_out(error):
                raise
            raise OutOfMemory(
                said("step {step}", step=self.state.global_step + 1),
                said("no memory ({reason})", reason=str(error).splitlines()[0]),
                said("enough for the optimizer and the smallest micro-batch"),
                said("See `tunesmith plan`; a lower lora.r or a smaller model.dtype takes less."),
            ) from error

    def close(self) -> None:
        """Gives the model back as it was before; no step may follow."""
        self._engine.close()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        point = Path(resume_from_checkpoint)
        with _readable(point / "trainer_state.json"):
            step = reading.json_object(point / "trainer_state.json", _STATE_BYTES)["global_step"]
            if type(step) is not int or point.name != self._run.checkpoint(step).name:
                raise ValueError(f"step {step!r}")
        with _readable(point / _TRAINED):
            model_files.shapes(point / _TRAINED)
            stored = load_file(point / _TRAINED)
            with torch.no_grad():
                for name, parameter in self._trained():
                    if stored[name].shape != parameter.shape and not hasattr(parameter, "placements"):  # would spread
                        raise ValueError(f"{name} of shape {tuple(stored[name].shape)}")
                    parameter.copy_(stored[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        for name in ("optimizer.pt", "scheduler.pt"):
            _require_bounded(Path(checkpoint) / name)
        with _readable(Path(checkpoint) / "optimizer.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
            for parameter, state in getattr(self.optimizer, "state", {}).items():
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in state and state[name].shape != parameter.shape:
                        raise ValueError(f"{name} of shape {tuple(state[name].shape)} for {tuple(parameter.shape)}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        for path in Path(checkpoint).glob("rng_state*.pth"):
            _require_bounded(path)
        with _readable(Path(checkpoint) / "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self._tuned.named_parameters() if p.requires_grad]


_TRAINED = "trained.safetensors"  # as it is; a pissa adapter is saved in another form than it is trained in


_ENGINE = "engine.json"
_STATE_BYTES = 256 << 20  # with the log of every step


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns whatever a library says of a file of a checkpoint into ProofError; the file has the digest that stands
    beside it, but whoever wrote the one can write the other."""
    try:
        yield
    except Exception as error:
        if memory.ran_out(error):
            raise
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        fix = said("Delete {folder}: the checkpoint before it is used then.", folder=path.parent)
        raise ProofError(
            str(path), said("a damaged file ({error})", error=text), said("the file that training wrote"), fix
        ) from error


def _require_bounded(path: Path) -> None:
    """Raises ProofError for a pickle that holds more than numbers, or builds far more than the file has bytes."""
    size = path.stat().st_size

    def load() -> None:
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True)

    with _readable(path):
        model_files.check_bin(path)
        confined(load, seconds=6 + size // (50 << 20), more_bytes=2 * size + (512 << 20))


class _Recorder(TrainerCallback):
    """Writes a line per step, measures and saves when it is time."""

    def __init__(self, trainer: StepTrainer) -> None:
        self._trainer = trainer
        self._began = self._saved = self._measured = time.monotonic()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.monotonic()
        self._trainer._ranks.step = state.global_step + 1
        if state.global_step == 0:
            self._untrained = guards.signatures(self._trainer._tuned)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 2 and hasattr(self, "_untrained"):
            guards.require_moved(self._trainer._tuned, self._untrained)

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
        if text := trainer._losses.odd(logs["loss"]):
            trainer.note(text)
        line = StepMetrics(
            state.global_step,
            round(state.epoch or 0.0, 6),
            logs["loss"],
            logs["learning_rate"],
            logs["grad_norm"],
            trainer._step.n_supervised,
            trainer._step.n_tokens,
            time.monotonic() - self._began,
            peak_memory_bytes(),
            tuple(trainer._notes),
        )
        trainer._notes.clear()
        trainer.lines.append(line)
        trainer._run.append(trainer._run.metrics, line.as_dict())
        trainer._watcher.stepped(line, trainer.n_steps)
        last = state.global_step == trainer.n_steps
        is_best = enough = False
        if trainer._held_out and (last or self._due(trainer._recipe.eval.every, self._measured)):
            self._measured = time.monotonic()
            trainer.measure()
            is_best, enough = trainer.best == state.global_step, trainer.has_lost_patience
        interrupts = trainer._interrupts
        interrupts.asked = trainer._ranks.any(interrupts.asked or trainer._watcher.enough())
        ends = last or enough or interrupts.asked
        if ends or is_best or self._due(trainer._recipe.train.save_every, self._saved):
            self._saved = time.monotonic()
            trainer.save_point()
        if ends and not last:
            control.should_training_stop = True

    def _due(self, every: str, since: float) -> bool:
        number, unit = every.split()
        if unit.startswith("minute"):  # each process has a clock of its own
            return self._trainer._ranks.from_main(time.monotonic() - since >= 60 * int(number))
        step = self._trainer.state.global_step
        return step % (int(number) * (len(self._trainer._steps) if unit.startswith("epoch") else 1)) == 0


def on_one_device(arguments: TrainingArguments, device: torch.device) -> None:
    """Has Trainer stay on this device: without a launcher's variables, which it is not shown, it takes the first card
    for every process, and spreads the model over all cards with DataParallel where there are several."""
    _ = arguments.device  # chooses a device, makes it the current one and counts the others
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if device.type == "cuda":
        vars(arguments)["_setup_devices"] = device  # what `device` gives from now on
        torch.cuda.set_device(device)


def has_lost_patience(losses: Sequence[float], patience: int) -> bool:
    """Whether so many held-out losses, or more, were measured since the lowest; never where the patience is 0."""
    return bool(losses) and 0 < patience < len(losses) - losses.index(min(losses))


def peak_memory_bytes() -> int:
    """The most memory so far: the process's resident set on a CPU, the allocator's on CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def earlier_lines(run: RunDir, step: int) -> list[StepMetrics]:
    """What a run wrote down up to a step."""
    lines = [line for line in rundir.read_lines(run.metrics) if line["step"] <= step]
    if [line["step"] for line in lines] != list(range(1, step + 1)):
        raise ProofError(
            str(run.metrics),
            said("{n} lines up to step {step}", n=len(lines), step=step),
            said("one for each step"),
            said("Train again with another --out; the checkpoints' adapters can be used as they are."),
        )
    return list(map(StepMetrics.of, lines))
