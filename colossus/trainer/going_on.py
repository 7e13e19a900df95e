"""What a user may change of a run that goes on, and from which step on it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossus.checkpoints.claims import committed
from colossus.checkpoints.copy import copy_checkpoint
from colossus.checkpoints.find import latest, verify
from colossus.checkpoints.format import DamagedCheckpoint
from colossus.checkpoints.pieces import read_manifest
from colossus.data.order import BatchSchedule, skipped_before
from colossus.derive import derive_data
from colossus.derive.dial import longest_sample
from colossus.errors import UserError
from colossus.events import EventLog, read_events
from colossus.job import CHECKED, LENGTHS, PREDICTED, Job, load_run_job
from colossus.layout import AXES
from colossus.section import Section
from colossus.sections import PhaseChange
from colossus.trainer import course
from colossus.trainer.decisions import Decision, Decisions
from colossus.trainer.horizon import Horizon, steps_for
from colossus.trainer.saved import logged_decisions, saved_decisions

# Between the attempts of a run: never what it learns.
MAY_CHANGE = (
    "layout.",
    "checkpoint.",
    "run.threads",
    "run.hooks",
    "run.validate_every",
    "run.prompt",
    "run.recover",
    "fleet.",
)
# What a rank's memory follows, beside what a run keeps.
FITS_BY = ("layout.", "fleet.", "data.seq_len", "data.phases", "run.global_batch", "run.batch_schedule",
           "precision.", "optimizer.")  # fmt: skip
SHARED_BY = (*AXES, "schedule", "pools")  # a batch, over ranks and micro batches
FOLLOWS_LAYOUT = ("layout.micro_batch", "layout.stages_per_rank", "layout.zero")
FROM_NOW_ON = {  # words that mean the steps to come, and the schedule that tells of the others
    "run.global_batch": "run.batch_schedule",
    "data.seq_len": "data.phases",
    "data.weights": "data.phases",
}
ALWAYS_KEPT = (  # in the job.toml of any run
    *("model.hidden_size", "model.max_seq_len", "optimizer.name", "optimizer.lr", "optimizer.schedule"),
    *("optimizer.warmup_steps", "optimizer.decay_fraction", "optimizer.final_lr_fraction"),
    *("data.corpus", "data.seq_len", "data.weights", "data.phases", "data.skip"),
    *("run.seed", "run.global_batch", "run.batch_schedule"),
)


@dataclass(frozen=True)
class Continuation:
    """job: what the run follows from now on. change: what of its course is another from then on, and
    back_to: the checkpoint that it goes back to for that; None where it goes on from the newest."""

    job: Job
    change: Decision | None = None
    back_to: Path | None = None


@dataclass(frozen=True)
class Standing:
    """Where a run stands: the job that it follows, what it has decided, and its newest checkpoint.

    damage: why there is none, where there are some.
    """

    job: Job
    decisions: Decisions
    newest: Path | None
    step: int
    damage: DamagedCheckpoint | None = None

    @classmethod
    def of(cls, folder: Path) -> Standing:
        newest, step, saved, damage = None, 0, list[dict[str, Any]](), None
        try:
            found = latest(folder, say=lambda message: None)
            if found is not None:
                manifest = read_manifest(found)
                newest, step, saved = found, manifest.step, saved_decisions(found, manifest)
        except DamagedCheckpoint as error:
            newest, step, damage = None, 0, error
        decisions = Decisions.merge(saved, logged_decisions(folder))
        kept = load_run_job(folder)
        if lacking := [name for name in ALWAYS_KEPT if kept.get(name) is None]:
            raise UserError(f"job file {folder / 'job.toml'}: no run's: it lacks {', '.join(lacking)}")
        job = course.latest(kept, decisions)
        return cls(job, decisions, newest, step, damage)

    def under(self, asked: Job) -> Standing:
        """This, with what `asked` says again of what was derived: from now on it is the user's, and nothing
        derives it anew."""
        again = [
            name
            for name in asked.origins
            if asked.asked_for(name)
            and not self.job.asked_for(name)
            and asked.get(name) == self.job.get(name)
        ]
        origins = self.job.origins | dict.fromkeys(again, "argument")
        return dataclasses.replace(self, job=dataclasses.replace(self.job, origins=origins))

    @property
    def horizon(self) -> Horizon:
        return Horizon(self.job, BatchSchedule(self.job.run.batch_schedule), self.decisions)

    @property
    def has_fallen(self) -> bool:
        """Whether the rate had begun to fall before the newest checkpoint."""
        falls_at = self.horizon.falls_at(self.step)
        return falls_at is not None and falls_at < self.step


def plan(
    folder: Path, asked: Job, refused: str, say: Callable[[str], None] = lambda message: None
) -> Continuation:
    """How the run in `folder` goes on as `asked`. Nothing is written.

    say: told of each damaged checkpoint that it cannot go back to.

    Raises:
        UserError: in the words of `refused`, what cannot change; or what was asked for cannot be.
    """
    standing = Standing.of(folder).under(asked)
    beside_its_job = bool(asked.made)  # `colossus train FOLDER WORDS`
    begun = None if beside_its_job else course.parts(standing.job, standing.decisions)[0].job
    changed = asked_anew(standing.job, asked, begun)
    check_fixed(changed, (*MAY_CHANGE, *course.COURSE), standing.job, refused, _instead(folder, changed))
    job = spread(standing.job, {n: v for n, v in changed.items() if n.startswith(MAY_CHANGE)})
    wished = {n: v for n, v in changed.items() if n in course.COURSE}
    step, back_to, rewarm = standing.step, None, False
    if is_longer(standing, wished) and standing.has_fallen:
        back_to = _before_the_fall(folder, standing, say)
        rewarm = back_to is None
        step = read_manifest(back_to).step if back_to is not None else step
    changed_job = put_from(step, job, wished, asked)
    decision = decide(step, standing, as_cut(changed_job, asked), rewarm=rewarm)
    if decision is None:
        return Continuation(job)
    if standing.damage is not None:
        raise standing.damage
    seconds = max((event["run_seconds"] for event in read_events(folder)), default=0.0)
    check_end(decision, standing, changed_job, wished, f"run.branch_from={folder}@STEP", seconds)
    return Continuation(changed_job, decision, back_to)


def record(folder: Path, continuation: Continuation) -> None:
    """Makes a planned change the run's: it holds once the log has it. The caller holds the run's lock.

    Raises:
        DamagedCheckpoint: the one to go back to is not whole. OSError: the storage failed.
    """
    if continuation.change is None:
        return
    if continuation.back_to is not None:
        logged = logged_decisions(folder)
        back_to = continuation.back_to
        saved = saved_decisions(back_to, read_manifest(back_to))
        decisions = Decisions.merge(saved, [*logged, dataclasses.asdict(continuation.change)])
        copy_checkpoint(back_to, folder, {"decisions": decisions.to_list()}, shared=True)
    write_decisions(folder, [continuation.change])


def write_decisions(folder: Path, decisions: Iterable[Decision]) -> None:
    """Puts decisions into a run's log, on storage."""
    if decisions := list(decisions):
        log = EventLog(folder)
        for decision in decisions:
            log.write("decision", step=decision.first_step, synced=True, **dataclasses.asdict(decision))
        log.close()


def asked_anew(kept: Job, asked: Job, begun: Job | None = None) -> dict[str, Any]:
    """What was asked for that is not as kept.

    begun: what the run was begun with: those words again change nothing, as where a scheduler sends its
        command a second time. None: words that are said of this run as it stands, so that one of which a
        schedule has more to say means the steps to come.
    """
    wanted = {n: asked.get(n) for n in asked.origins if asked.asked_for(n) and n != "run.folder"}
    changed = {n: v for n, v in wanted.items() if _is_other(v, kept.get(n))}
    if begun is not None:
        changed = {n: v for n, v in changed.items() if _is_other(v, begun.get(n))}
    for name, schedule in FROM_NOW_ON.items():
        told_apart = asked.origins.get(schedule) == "argument"
        if begun is None and asked.origins.get(name) == "argument" and not told_apart:
            changed[name] = wanted[name]
    if is_same_branch(asked.run.branch_from, kept.run.branch_from):
        changed.pop("run.branch_from", None)
    return changed


def split(said: str) -> tuple[Path, int | None]:
    """Folder and step of `PATH@STEP`; no step of `PATH`."""
    path, at, step = said.rpartition("@")
    return (Path(path), int(step)) if at and step.isdecimal() else (Path(said), None)


def is_same_branch(asked: str | None, kept: str | None) -> bool:
    """Whether `asked` names what `kept` does, which has a step."""
    (path, step), (there, at) = split(asked or ""), split(kept or "")
    return path == there and step in (None, at)


def check_fixed(
    changed: Mapping[str, Any], may: tuple[str, ...], kept: Job, refused: str, instead: str
) -> None:
    """Raises `UserError` where something else than what `may` change is asked for."""
    if fixed := [name for name in changed if not name.startswith(may)]:
        differing = "; ".join(f"{name}: {kept.get(name)!r}, {changed[name]!r}" for name in fixed)
        raise UserError(f"{refused}; differing (there, asked): {differing}{instead}")


def spread(kept: Job, changed: Mapping[str, Any]) -> Job:
    """The job with what may change between attempts, and what follows from a layout derived again."""
    open_again = [*FOLLOWS_LAYOUT] if changed.keys() & {f"layout.{a}" for a in SHARED_BY} else []
    if "layout.recompute_layers" in changed or changed.get(
        "layout.activation_gib", kept.layout.activation_gib
    ):
        open_again += ["layout.recompute", "layout.recompute_layers"]
    if any(name.startswith(FITS_BY) for name in changed):
        kept = dataclasses.replace(kept, made={n: v for n, v in kept.made.items() if n not in CHECKED})
    if any(name.startswith(("layout.", "fleet.")) for name in changed):  # what was predicted was another
        kept = dataclasses.replace(kept, made={n: v for n, v in kept.made.items() if n not in PREDICTED})
        if "auto" in (kept.layout.preset, changed.get("layout.preset")):
            open_again = [*FOLLOWS_LAYOUT]  # what is open is planned again, around what was asked for
    if changed.keys() & {"fleet.device", "fleet.count"}:
        open_again += ["layout.micro_batch", "layout.dp_shard"]
    kept = kept.without(*(name for name in open_again if not kept.asked_for(name)))
    return kept.put(changed, "argument")


def put_from(step: int, kept: Job, wished: Mapping[str, Any], asked: Job) -> Job:
    """The job with what is wished from `step` on, as schedules tell it; before `step` it stays as it is.

    Raises:
        UserError: a schedule is another for steps that were taken.
    """
    if not wished:
        return kept
    values = {n: v for n, v in wished.items() if n not in FROM_NOW_ON}
    schedule = BatchSchedule(kept.run.batch_schedule)
    if length := next((name for name in LENGTHS if name in values), None):
        values |= {name: None for name in LENGTHS if name != length}
    if "optimizer.lr" in values and not kept.asked_for("optimizer.matrix_lr"):  # which was derived from it
        values.setdefault("optimizer.matrix_lr", values["optimizer.lr"])
    if (batch := wished.get("run.global_batch")) is not None and batch != schedule.batch(step):
        earlier = [change for change in kept.run.batch_schedule if change[0] < step]
        values.setdefault("run.batch_schedule", [*earlier, (step, batch)])
    phase = _phase_at(step, kept)
    told = {n: wished[f"data.{n}"] for n in phase if f"data.{n}" in wished}
    if any(phase[name] != value for name, value in told.items()):
        phases = [change for change in kept.data.phases if change.from_step < step]
        values.setdefault("data.phases", [*phases, PhaseChange(from_step=step, **told)])
    _check_past(step, kept, values, schedule)
    if "run.batch_schedule" in values:  # its first batch is the job's
        values["run.global_batch"] = min(values["run.batch_schedule"])[1]
    plain = {name: course.plain(value) for name, value in values.items()}
    job = course.with_values(kept, plain)
    if "optimizer.matrix_lr" in wished:  # even where both are one rate
        job = job.put({"optimizer.matrix_lr": wished["optimizer.matrix_lr"]}, "argument")
    _check_data(derive_data(job))
    longer = longest_sample(job) > longest_sample(kept)
    smaller = min(n for _, n in job.run.batch_schedule) < min(n for _, n in kept.run.batch_schedule)
    if (longer or smaller) and not job.asked_for("layout.micro_batch"):
        job = job.without("layout.micro_batch")
    return job


def decide(step: int, standing: Standing, job: Job, *, rewarm: bool, **told: Any) -> Decision | None:
    """The decision that a run follows `job` from `step` on."""
    if not any(standing.job.get(name) != job.get(name) for name in course.COURSE):
        return None
    before = course.job_at(max(0, step - 1), standing.job, standing.decisions)
    return course.change(step, before, job, rewarm=rewarm, **told)


def as_cut(job: Job, asked: Job) -> Job:
    """The job with what was derived anew for it; open while `asked` is not resolved."""
    return job.derive(**{course.CUT: asked.get(course.CUT)}) if asked.get(course.CUT) is not None else job


def check_end(
    decision: Decision, standing: Standing, job: Job, wished: Mapping[str, Any], branch: str, seconds: float
) -> None:
    """Raises `UserError` where nothing would be left to learn, or a cosine's end would move."""
    step = decision.first_step
    decisions = Decisions.merge(standing.decisions.to_list(), [dataclasses.asdict(decision)])
    horizon = Horizon(job, BatchSchedule(job.run.batch_schedule), decisions)
    minutes = job.run.minutes
    if horizon.done(step) or (minutes is not None and seconds >= minutes * 60):
        length = next((name for name in LENGTHS if name in wished), None)
        if length is None:
            raise UserError(
                f"the run is finished after {standing.step} steps, so nothing is left of which "
                f"{', '.join(wished)} could hold; make it longer, with run.steps above {standing.step}, or "
                f"begin a branch at an earlier checkpoint: {branch}"
            )
        taken = f"{seconds / 60:.3g} minutes" if length == "run.minutes" else f"{step} steps"
        raise UserError(
            f"{length}={wished[length]}: the run has taken {taken} already; more than that, or a branch from "
            f"an earlier checkpoint: {branch}"
        )
    moved = horizon.total_steps(step) != standing.horizon.total_steps(step)
    if job.optimizer.schedule == "cosine" and moved and not decision.value["rewarm"]:
        raise UserError(
            f"{', '.join(wished)}: would move the end of optimizer.schedule=cosine, which knows it from the "
            f"start; make it longer once the rate falls, or begin a branch: {branch}"
        )


def is_on_course(saved: list[dict[str, Any]], step: int, decisions: Decisions) -> bool:
    """Whether a checkpoint of `step`, with the decisions `saved`, has followed what was changed before it."""
    known = Decisions.merge(saved).changes()
    return all(change in known for change in decisions.changes() if change.first_step < step)


def is_longer(standing: Standing, wished: Mapping[str, Any]) -> bool:
    """Whether the run is to go on beyond its end."""
    name = next((name for name in LENGTHS if wished.get(name) is not None), None)
    if name is None:
        return False
    kept, total = standing.job, standing.horizon.total_steps(standing.step)
    if kept.get(name) is not None:
        return bool(wished[name] > kept.get(name))
    if name == "run.minutes" or total is None:
        return True
    schedule = BatchSchedule(kept.run.batch_schedule)
    return (wished[name] if name == "run.steps" else steps_for(wished[name], kept, schedule)) > total


def _before_the_fall(folder: Path, standing: Standing, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint from before the rate began to fall, whose rate was level."""
    falls_at = standing.horizon.falls_at(standing.step)
    if falls_at is None or standing.job.optimizer.schedule == "cosine":
        return None
    origin = standing.horizon.origin(standing.step)
    for path in committed(folder, say=lambda message: None):
        try:
            step = (manifest := read_manifest(path)).step
            saved = saved_decisions(path, manifest)
            if origin < step <= falls_at and is_on_course(saved, step, standing.decisions):
                verify(path)
                return path
        except DamagedCheckpoint as error:
            say(f"cannot go back to {path}: {error}")
    return None


def _phase_at(step: int, job: Job) -> dict[str, Any]:
    """Length and weights of the samples of `step`."""
    found: dict[str, Any] = {"seq_len": job.data.seq_len, "weights": job.data.weights}
    for change in sorted(job.data.phases, key=lambda change: change.from_step):
        if change.from_step <= step:
            found |= {n: getattr(change, n) for n in found if getattr(change, n) is not None}
    return found


def _check_past(step: int, kept: Job, values: Mapping[str, Any], schedule: BatchSchedule) -> None:
    def refuse(name: str, was: Any) -> None:
        raise UserError(
            f"{name}={course.plain(values[name])}: is another for the {step} steps that were taken, with "
            f"{course.plain(was)}; what holds from step {step} on may change"
        )

    def before(changes: Iterable[Any], first: Any) -> list[Any]:
        return sorted((course.plain(c) for c in changes if first(c) < step), key=str)

    def differ(name: str, was: Any, first: Any) -> bool:
        return name in values and before(values[name], first) != before(was, first)

    if differ("run.batch_schedule", kept.run.batch_schedule, lambda c: c[0]):
        refuse("run.batch_schedule", kept.run.batch_schedule)
    if differ("data.phases", kept.data.phases, lambda c: c.from_step):
        refuse("data.phases", kept.data.phases)
    if (skips := values.get("data.skip")) is not None:
        taken = schedule.first_sample(step)
        if skipped_before(skips, taken) != skipped_before(kept.data.skip, taken):
            refuse("data.skip", kept.data.skip)


def _check_data(job: Job) -> None:
    longest, most = longest_sample(job), job.model.max_seq_len
    if longest > most:
        raise UserError(f"data.seq_len={longest}: longer than model.max_seq_len={most}; at most {most}")


def _instead(folder: Path, changed: Mapping[str, Any]) -> str:
    if "run.branch_from" in changed:
        return "; a branch is a run of its own: another run.folder, or none, for it"
    if any(name.startswith(("model.", "optimizer.name", "optimizer.schedule")) for name in changed):
        return "; that takes a new run"
    return f"; that takes a new run, or a branch of this one: run.branch_from={folder}"


def _is_other(asked: Any, kept: Any) -> bool:
    """Of a table, only what was asked for counts: the rest of it is derived, as fields are."""
    if isinstance(asked, Section) and type(asked) is type(kept):
        return any(_is_other(getattr(asked, name), getattr(kept, name)) for name in asked.model_fields_set)
    return bool(asked != kept)
