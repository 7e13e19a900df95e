"""A new run that goes on from a checkpoint of another, with its optimizer state. The other is only read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from colossus.checkpoints.claims import committed
from colossus.checkpoints.find import latest, latest_verified, verify
from colossus.checkpoints.format import (
    DamagedCheckpoint,
    Manifest,
    checkpoints_folder,
    is_committed,
    step_of,
)
from colossus.checkpoints.pieces import read_manifest
from colossus.derive import derive_data
from colossus.errors import UserError
from colossus.job import Job
from colossus.models.hf.elsewhere import folders_beside
from colossus.trainer import course
from colossus.trainer.decisions import BRANCH, Decision, Decisions
from colossus.trainer.folder import check_code, is_run, make
from colossus.trainer.going_on import (
    Standing,
    as_cut,
    asked_anew,
    check_end,
    check_fixed,
    decide,
    is_longer,
    put_from,
    split,
    spread,
)
from colossus.trainer.saved import saved_decisions

FIXED = ("model.", "optimizer.name", "optimizer.schedule", "data.tokenizer")  # that the state depends on
CORPORA = ("data.corpus", "data.text_field", "data.validation_fraction", "data.folder")


@dataclass(frozen=True)
class Branch:
    """job: of the new run. decisions: its first ones. checkpoint, tokenizer: folders of the other run."""

    job: Job
    decisions: list[Decision]
    checkpoint: Path
    tokenizer: Path


def branch(asked: Job, *, trust_code: bool = True, verified: bool = False) -> Branch:
    """The branch that `asked.run.branch_from` names. Nothing is written.

    It follows the other run's job as that was at the checkpoint; what is asked for besides holds from there.

    trust_code: whether code may run that the other run's job names and `asked` does not.
    verified: every byte of the checkpoint is read; else its lengths alone are looked at.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or what was asked for cannot be.
    """
    source, checkpoint = find(asked.run.branch_from or "", verify if verified else read_manifest)
    if not trust_code:
        check_code(source, asked)
    manifest = read_manifest(checkpoint)
    saved = Decisions.merge(saved_decisions(checkpoint, manifest))
    now = Standing.of(source)
    standing = Standing(_job_then(now, saved), saved, checkpoint, manifest.step).under(asked)
    changed = asked_anew(standing.job, asked)
    changed.pop("run.branch_from", None)
    may = tuple(n for n in changed if not n.startswith(FIXED))
    refused = f"run.branch_from={source}@{manifest.step}: has another model, optimizer or tokenizer"
    check_fixed(changed, may, standing.job, refused, "; that takes a new run")
    wished = {n: v for n, v in changed.items() if n in course.COURSE}
    job = spread(standing.job, {n: v for n, v in changed.items() if n not in wished})
    decisions = list(saved)
    if any(name in changed for name in CORPORA):
        job = _with_other_data(job, changed)
        decisions = [d for d in decisions if d.name != "phases"]
        wished = {n: v for n, v in wished.items() if n != "data.weights"}
    changed_job = put_from(manifest.step, job, wished, asked)
    rewarm = is_longer(standing, wished) and standing.has_fallen
    if (change := decide(manifest.step, standing, as_cut(changed_job, asked), rewarm=rewarm)) is not None:
        check_end(change, standing, changed_job, wished, f"run.branch_from={source}@STEP", 0.0)
        decisions = list(Decisions.merge(Decisions(decisions).to_list(), Decisions([change]).to_list()))
    elif standing.horizon.done(manifest.step):
        raise UserError(
            f"run.branch_from={source}@{manifest.step}: nothing is left to learn there; give the branch "
            f"run.steps above {manifest.step}, or an earlier step: {_steps_in_words(source)}"
        )
    where = {"path": str(source), "step": manifest.step, "checkpoint": checkpoint.name}
    decisions.append(Decision(BRANCH, where, manifest.step))
    place = asked.run.folder
    job = changed_job.without("run.folder").put({"run.branch_from": f"{source}@{manifest.step}"}, "argument")
    job = job.put({"run.folder": place}, "argument") if place else job
    return Branch(job, decisions, checkpoint, source / "tokenizer")


def make_branch(
    folder: Path, job: Job, follow: Path | None = None, followed: Iterable[Decision] = ()
) -> None:
    """Makes the folder of a branch, which from then on needs the other run no more.

    job: as resolved. follow: another branch that this run replays; followed: the first decisions for that.

    Raises: as `branch` and `folder.make`.
    """
    if follow is None:
        found = branch(job)
        decisions, checkpoint, tokenizer = found.decisions, found.checkpoint, found.tokenizer
    else:
        checkpoint = check_beginning(follow, job.run.branch_from or "")
        decisions, tokenizer = list(followed), follow / "tokenizer"
    make(folder, job, tokenizer, decisions, checkpoint)


def find(said: str, check: Callable[[Path], Manifest] = read_manifest) -> tuple[Path, Path]:
    """(run, checkpoint) of `PATH@STEP`, or of `PATH`: its newest.

    check: raises DamagedCheckpoint where a checkpoint is none to begin from.

    Raises:
        UserError: there is no such run, none of that step, or it is damaged; the nearest there is is named.
        DamagedCheckpoint: it has checkpoints, and none is whole.
    """
    path, step = split(said)
    if not is_run(path):
        raise _no_run(said, path)
    claims = _claims(path)
    if not claims:
        raise UserError(f"run.branch_from={said}: this run has saved no checkpoint yet")
    wanted = claims[0][0] if step is None else step
    damage: DamagedCheckpoint | None = None
    for there in (place for at, place in claims if at == wanted):
        try:
            check(there)
            return path, there
        except DamagedCheckpoint as error:
            if not is_committed(there):  # deleted meanwhile
                return find(said, check)
            damage = damage or error
    latest(path, say=lambda message: None)  # raises where none is whole
    if damage is not None:
        which = "its newest checkpoint" if step is None else "the checkpoint"
        raise UserError(
            f"run.branch_from={said}: {which}, of step {wanted}, is damaged ({damage}); "
            f"{_nearest_whole(path, step)}"
        )
    closest = min((s for s, _ in _checkpoints(path)), key=lambda s: abs(s - wanted))
    raise UserError(
        f"run.branch_from={said}: there is no checkpoint of step {step}; {_steps_in_words(path)}; did you "
        f"mean {f'{path}@{closest}'!r}?"
    )


def _nearest_whole(run: Path, step: int | None) -> str:
    """In words the whole checkpoint that is nearest to a step, or the newest one.

    Raises:
        DamagedCheckpoint: none is whole.
    """
    there = [] if step is None else sorted(_checkpoints(run), key=lambda found: abs(found[0] - step))
    for at, path in there:
        try:
            verify(path)
        except DamagedCheckpoint:
            continue
        return f"the nearest whole one: run.branch_from={run}@{at}"
    newest = latest_verified(run, say=lambda message: None)  # raises where none is whole
    assert newest is not None
    return f"the newest whole one: run.branch_from={run}@{step_of(newest.name)}"


def _no_run(said: str, path: Path) -> UserError:
    """`said` names no run: perhaps a step of one that is no number, one of its checkpoints, or one beside."""
    run, at, step = said.rpartition("@")
    allowed, tail = "the folder of a run, or FOLDER@STEP; there is none", ""
    if at and is_run(Path(run)):
        return UserError(
            f"run.branch_from={said}: {step!r} is no step of {run}; {_steps_in_words(Path(run))}"
        )
    if (number := step_of(path.name)) is not None and is_run(path.parent.parent):
        meant = f"{path.parent.parent}@{number}"
        return UserError(f"run.branch_from={said}: a checkpoint; FOLDER@STEP; did you mean {meant!r}?")
    if str(path) != said:
        tail = said.removeprefix(run)
    beside = [f"{other}{tail}" for other in folders_beside(path) if is_run(Path(other))]
    return UserError.field("run.branch_from", said, allowed, beside)


def check_beginning(follow: Path, said: str) -> Path:
    """The checkpoint that a branch began from: its own copy, or where it kept none, of the run it came from.

    Raises:
        UserError: neither has it any more, or not whole.
    """
    source, step = split(said)
    damage: DamagedCheckpoint | None = None
    for run in (follow, source):
        for path in (path for at, path in _claims(run) if at == step):
            try:
                verify(path)
                return path
            except DamagedCheckpoint as error:
                damage = damage or error
    has = "neither has its checkpoint" if damage is None else "neither has a whole checkpoint"
    why = "" if damage is None else f" ({damage})"
    raise UserError(f"--exact: {follow} began from {said}, and {has} of step {step} any more{why}")


def _claims(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all that claim to be checkpoints, damaged ones too, the newest first."""
    found = committed(run, say=lambda message: None)
    folder = checkpoints_folder(run)
    there = [p for p in folder.iterdir() if not p.is_symlink() and is_committed(p)] if folder.is_dir() else []
    steps = {path: step for path in [*found, *there] if (step := step_of(path.name)) is not None}
    newest = steps[found[0]] if found else -1
    unmarked = [path for path in steps if path not in found]  # when they were saved, nothing tells any more
    first = [path for path in unmarked if steps[path] > newest]
    return [(steps[path], path) for path in dict.fromkeys([*first, *found, *unmarked])]


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder), the newest first."""
    found = []
    for path in committed(run, say=lambda message: None):
        try:
            found.append((read_manifest(path).step, path))
        except DamagedCheckpoint:
            continue
    return found


def _steps_in_words(run: Path) -> str:
    return f"there are {', '.join(map(str, sorted({step for step, _ in _checkpoints(run)})))}"


def _job_then(now: Standing, saved: Decisions) -> Job:
    """The job that the run followed when a checkpoint with these decisions was saved."""
    job, then = now.job, saved.changes()
    for change in reversed(now.decisions.changes()):
        if change not in then:
            job = course.undone(job, change)
    for change in then:
        if change not in now.decisions.changes():
            job = course.with_values(job, change.value["after"])
    return job


def _with_other_data(job: Job, changed: dict[str, object]) -> Job:
    """Other corpora have shards and proportions of their own, as if the run had always had them."""
    opened = {"data.folder", "data.weights", "data.phases"} - changed.keys()
    if "data.corpus" not in changed:
        opened -= {"data.weights", "data.phases"}
    asked = {n: changed[n] for n in ("data.weights",) if n in changed}
    return derive_data(job.without(*opened).put(asked, "argument"))
