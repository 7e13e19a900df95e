"""A conversation, turn by turn: what `colossus generate --chat` does without a prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from colossus.errors import UserError

if TYPE_CHECKING:
    from colossus.data.tokenizer import Tokenizer
    from colossus.models import Decoder

ROOM = 4  # the part of the context that an answer finds free, unless it may not be as long


def talk(model: Decoder, tokenizer: Tokenizer, system: list[dict[str, str]], **sampling: Any) -> None:
    """Answers each line of the standard input, with what was said before, until it ends, or Ctrl-C.

    What no longer fits into the model's context is left out from the oldest question on, which is said.

    Raises:
        UserError: a line cannot be asked. On a terminal it is said instead, and the next line is read.
    """
    said: list[dict[str, str]] = []
    try:
        for line in _lines():
            try:
                said = _answered(
                    model, tokenizer, system, [*said, {"role": "user", "content": line}], sampling
                )
            except UserError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:  # the usual way to leave
        print()


def _lines() -> Iterator[str]:
    """Those that are not blank."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # so that a line can be edited, and earlier ones called back

    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else next(sys.stdin).rstrip("\r\n")
        except StopIteration:
            return
        except EOFError:  # Ctrl-D
            print()
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: it is no text in {error.encoding} ({error.reason})") from None
        if line.strip():
            yield line


def _answered(
    model: Decoder,
    tokenizer: Tokenizer,
    system: list[dict[str, str]],
    said: list[dict[str, str]],
    sampling: dict[str, Any],
) -> list[dict[str, str]]:
    """What was said, as far as it fits, and the answer, which is shown as it is written."""
    from colossus.generation import stream

    said = _fitting(model, tokenizer, system, said, sampling["max_tokens"])
    pieces = []
    for piece in stream(model, tokenizer, [*system, *said], **sampling):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print(flush=True)
    return [*said, {"role": "assistant", "content": "".join(pieces)}]


def _fitting(
    model: Decoder,
    tokenizer: Tokenizer,
    system: list[dict[str, str]],
    said: list[dict[str, str]],
    max_tokens: int,
) -> list[dict[str, str]]:
    """The newest part of what was said that leaves room for an answer; it begins with a question."""
    from colossus.data.asked import asked_ids

    context = model.arch.max_seq_len
    most = context - min(max_tokens, context // ROOM)
    for begin in range(0, len(said), 2):
        num_tokens = len(asked_ids([*system, *said[begin:]], tokenizer, "messages"))
        if num_tokens <= most:
            if begin:
                turns = "the oldest turn is" if begin == 2 else f"the {begin // 2} oldest turns are"
                print(f"the context of {context:,} tokens is full: {turns} forgotten", file=sys.stderr)
            return said[begin:]
    raise UserError(
        f"the line and what stands around it are {num_tokens:,} tokens; the model's context of {context:,} "
        f"has room for {most:,} beside an answer"
    )
