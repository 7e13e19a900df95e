"""The command line: every verb parses, calls one function and shows the result.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from colossus.cli import data, doctor, dryrun, evaluate, generate, interchange, models, plan, train
from colossus.cli.output import nobody_reads_on
from colossus.errors import MachineError, UserError
from colossus.launcher.started import is_first_rank

USER_ERROR, MACHINE_ERROR, INTERRUPTED = 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the verb that `arguments` (by default the process's own) name, and returns the exit code.

    0 done; 2 what the user gave is wrong; 3 the machine or its storage failed, running again goes on;
    130 and 143 stopped by a signal. Anything else that is raised is a bug, and keeps its traceback.
    """
    # PyTorch's threads wait for one another by turning in circles, 300,000 times where nothing is said. While
    # other programs used both cores, products took 80 times as long as with 0 turns, with 3,000 2.5 times;
    # alone, training is as quick with 3,000 as with 300,000, and half as quick with 0.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    code = _run(list(sys.argv[1:] if arguments is None else arguments) or ["--help"])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        nobody_reads_on()
    except OSError as error:
        nobody_reads_on()
        return code or _say(f"the output cannot be written ({error.strerror})", MACHINE_ERROR)
    return code


def _run(words: list[str]) -> int:
    try:
        code = app()(args=words, prog_name="colossus", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (UserError, MachineError) as error:
        code = USER_ERROR if isinstance(error, UserError) else MACHINE_ERROR
        return code if error.told else _say(str(error), code)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return _say("this needs PyTorch, which is not installed: pip install torch", MACHINE_ERROR)
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        return _say("interrupted", INTERRUPTED) if is_first_rank() else INTERRUPTED
    except BrokenPipeError:
        return nobody_reads_on()
    except OSError:
        try:
            print(flush=True)
        except OSError as error:  # it is the output that cannot be written
            return _say(f"the output cannot be written ({error.strerror})", MACHINE_ERROR)
        raise
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer makes exit code 1 of it
            return nobody_reads_on()
        raise
    except Exception as error:
        # What is wrong in the words themselves; the module of this error differs between releases of typer.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        # All ranks were given the same ones.
        return _say(format_message(), USER_ERROR) if is_first_rank() else USER_ERROR


class Interrupted(Exception):
    """Ctrl-C in a verb."""


class Verbs(TyperGroup):
    """Releases of typer differ in what they make of a KeyboardInterrupt; some make an exit code of it, which
    looks as if a verb had returned it."""

    def invoke(self, context: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            raise Interrupted from error


def app() -> typer.Typer:
    """The verbs."""
    verbs = typer.Typer(
        cls=Verbs,
        help="Trains language models from one job description, on the CPU of a laptop as on GPUs.",
        add_completion=False,
        rich_markup_mode=None,  # plain help: rich would double the time until it shows
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    verbs.command("train")(train.train)
    verbs.command("plan", short_help="Find the best layout for a model on a fleet.")(plan.plan)
    verbs.command("dryrun", short_help="Run the training program as any rank of any world.")(dryrun.dryrun)
    verbs.command("generate")(generate.generate)
    verbs.command("eval", short_help="Measure a model: bits per byte, or standard tasks.")(evaluate.evaluate)
    verbs.command("import")(interchange.import_model)
    verbs.command("export")(interchange.export_model)
    verbs.add_typer(data.app(), name="data", short_help="Build token shards, or show what a step sees.")
    verbs.command("doctor")(doctor.doctor)
    verbs.command("models")(models.models)
    verbs.callback(invoke_without_command=True)(_version)
    return verbs


def _version(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        from colossus import __version__

        print(__version__)
        raise typer.Exit


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
