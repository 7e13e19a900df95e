"""Watches every operation of a program that runs on tensors without numbers: what lives, what is computed,
what is said to other ranks, and in which pass of which micro batch."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch._subclasses import FakeTensor
from torch.distributed import get_process_group_ranks
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colossus.dryrun.work import ONCE, Message, Pass, Product, Work, product_of

Key = TypeVar("Key")
WAIT = torch.ops._c10d_functional.wait_tensor.default
DEVICE = torch.ops.prim.device.default
READ = torch.ops.aten._local_scalar_dense.default
SPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
OF_INPUT = ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_")  # (output, input, ...)


class Use(NamedTuple):
    """What memory is for, and whose it is: a module's path in which layers have no number ("layers.*.mlp");
    "" where no module's pass is under way."""

    what: str
    owner: str = ""


@dataclass
class Moment:
    """The most that lived at once: when, and for what."""

    phase: str = ""
    num_bytes: int = 0
    by_owner: dict[Use, int] = field(default_factory=dict)

    @property
    def by_use(self) -> dict[str, int]:
        """Whosever it is."""
        return by_what(self.by_owner)

    def largest(self) -> list[tuple[Use, int]]:
        """Of every owner, the largest first."""
        return sorted(self.by_owner.items(), key=lambda item: -item[1])


@dataclass
class Span:
    """A part of a section, memory against that at the section's begin: high is the most, and high_by_use what
    it was for. mark: what the program comes to at its end; None at the last's."""

    high: int = 0
    high_by_use: Counter[Use] = field(default_factory=Counter)
    work: list[Work] = field(default_factory=list)
    host_reads: Counter[str] = field(default_factory=Counter)
    mark: Any = None


@dataclass
class Section:
    """What was done from one point of the program to another; after: the memory that was left at its end."""

    spans: list[Span] = field(default_factory=list)
    after: Counter[Use] = field(default_factory=Counter)


@dataclass
class _Open:
    """A section that goes on, and its last span: what was there at the begin of each."""

    section: Section
    now: int
    by_use: Counter[Use]
    num_done: int
    host_reads: Counter[str]


class Tracer(TorchDispatchMode):
    """flops_of: by operator, what PyTorch's counter has (see `measure.counter`).

    at: the pass that is under way, which the program says; is_again: in it, what the forward pass did is done
    once more. done: what was done in which pass, in its order. lived: of each pass, the most that lived in it
    and what lived at its end.
    """

    def __init__(self, flops_of: dict[Any, Callable[..., int]]) -> None:
        super().__init__()
        self.outside, self.what, self.owner = "build", "", ""
        self.now, self.by_use, self.peak = 0, Counter[Use](), Moment()
        self.done, self.host_reads = list[tuple[Pass, Work]](), Counter[str]()
        self.lived: dict[Pass, tuple[int, int]] = {}
        self.num_operators = 0
        self.at = ONCE
        self.is_again = False
        self._flops_of = flops_of
        self._live: dict[int, tuple[int, Use]] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._paused, self._looks = 0, True
        self._open: _Open | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func is WAIT:  # under fake tensors it would be a second tensor
            return args[0]
        if func is DEVICE and isinstance(args[0], FakeTensor):  # most of all calls, and no work
            return args[0].fake_device
        if func is READ:
            self.host_reads[self.phase] += 1
            return _some_number(args[0].dtype)
        out = func(*args, **kwargs)
        self.num_operators += 1
        if func.namespace in SPACES:
            self._say(func, args, out)
        else:
            formula = self._flops_of.get(func._overloadpacket)
            if formula is not None:
                flops = formula(*args, **kwargs, out_val=out)
                self._did(product_of(func._overloadpacket, args, flops, self.part))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._see(tensor.untyped_storage())
        return out

    @property
    def phase(self) -> str:
        """Of a step: forward, backward, clip, update."""
        return self.outside if torch._C._current_graph_task_id() == -1 else "backward"

    @property
    def use(self) -> Use:
        """Of what is allocated now."""
        return Use(self.what or self.phase, self.owner)

    @property
    def part(self) -> str:
        """The phase; of a backward pass, apart, what of the forward pass is made again in it."""
        phase = self.phase
        return "recompute" if phase == "backward" and self.is_again else phase

    @property
    def flops(self) -> Counter[str]:
        """Executed products, by part."""
        found = Counter[str]()
        for _, work in self.done:
            if isinstance(work, Product):
                found[work.phase] += work.flops
        return found

    @property
    def messages(self) -> list[Message]:
        """In their order."""
        return [work for _, work in self.done if isinstance(work, Message)]

    def within(self, at: Pass) -> AbstractContextManager[None]:
        """What is done within is of this pass."""
        return self._while("at", at)

    def during(self, phase: str) -> AbstractContextManager[None]:
        """What is done within is of this phase, but for backward passes."""
        return self._while("outside", phase)

    def of(self, what: str) -> AbstractContextManager[None]:
        """What is allocated within is for this."""
        return self._while("what", what)

    def owned(self, owner: str) -> AbstractContextManager[None]:
        """What is allocated within is this module's."""
        return self._while("owner", owner)

    @contextmanager
    def _while(self, name: str, value: Any) -> Iterator[None]:
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is computed within is no part of the program."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def call(self, tensors: Iterable[torch.Tensor | None], use: Use) -> None:
        """From now on these are for this."""
        for tensor in tensors:
            if tensor is None:
                continue
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            key = storage._cdata
            if key not in self._live:
                self._see(storage, use)
                continue
            num_bytes, before = self._live[key]
            self._live[key] = num_bytes, use
            self.by_use[before] -= num_bytes
            self.by_use[use] += num_bytes

    @contextmanager
    def section(self) -> Iterator[Section]:
        """What is done within."""
        assert self._open is None, "sections lie beside each other"
        section, by_use = Section([Span()]), Counter(self.by_use)
        self._open = _Open(section, self.now, by_use, len(self.done), Counter(self.host_reads))
        try:
            yield section
        finally:
            self._end_span(None)
            self._open = None
        section.after = _minus(self.by_use, by_use)

    def mark(self, what: Any) -> None:
        """Within a section: the program comes to this."""
        section = self._end_span(what)
        section.spans.append(Span())

    def _end_span(self, mark: Any) -> Section:
        begun = self._open
        assert begun is not None, "no section goes on"
        span = begun.section.spans[-1]
        span.host_reads = _minus(self.host_reads, begun.host_reads)
        span.work = [work for _, work in self.done[begun.num_done :]]
        span.mark = mark
        begun.num_done, begun.host_reads = len(self.done), Counter(self.host_reads)
        return begun.section

    def again(self, section: Section, at: Callable[[Any], None]) -> None:
        """The same is done once more, and `at` what it comes to; what it leaves is made by who calls this,
        within `unseen`."""
        for span in section.spans:
            self._reach(self.now + span.high, span.high_by_use)
            self.host_reads.update(span.host_reads)
            for work in span.work:
                self._did(work)
            if span.mark is not None:
                at(span.mark)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What lives within, of which some is let go of at its end, is not looked at for the most."""
        self._looks = False
        try:
            yield
        finally:
            self._looks = True

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done within is no part of the program; it must leave nothing."""
        peak, reads, lived = self.peak, Counter(self.host_reads), dict(self.lived)
        done, operators = len(self.done), self.num_operators
        try:
            yield
        finally:
            self.peak, self.host_reads, self.lived = peak, reads, lived
            self.num_operators = operators
            del self.done[done:]

    @staticmethod
    def key(tensor: torch.Tensor) -> int:
        """Of the memory of a tensor, as long as that lives."""
        return tensor.untyped_storage()._cdata

    def lives(self, key: int) -> bool:
        return key in self._live

    def use_of(self, tensor: torch.Tensor) -> dict[Use, int]:
        """What the memory of a tensor is for, and its bytes."""
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        num_bytes, use = self._live[self.key(here)]
        return {use: num_bytes}

    def forget(self) -> None:
        """What was done so far; what lives stays. From now on the most is looked for anew."""
        self.outside = "step"
        self.peak = Moment(self.phase, self.now, dict(self.by_use))
        self.done, self.lived, self.host_reads, self.num_operators = [], {}, Counter(), 0
        self.at = ONCE

    def __enter__(self) -> Tracer:
        self._resize = torch.UntypedStorage.resize_  # what FSDP lets go of gathered weights by
        tracer, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            tracer._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _see(self, storage: torch.UntypedStorage, use: Use | None = None) -> None:
        key = storage._cdata
        if key in self._live:
            return
        use = use or self.use

        def gone(_: Any) -> None:
            num_bytes, now_for = self._live.pop(key)
            del self._references[key]
            self._add(-num_bytes, now_for)

        self._live[key] = storage.nbytes(), use
        self._references[key] = weakref.ref(storage, gone)
        self._add(storage.nbytes(), use)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            if storage.nbytes():
                self._see(storage)
            return
        before, use = self._live[key]
        self._live[key] = storage.nbytes(), use
        self._add(storage.nbytes() - before, use)

    def _add(self, num_bytes: int, use: Use) -> None:
        self.now += num_bytes
        self.by_use[use] += num_bytes
        self._reach(self.now, None)

    def _reach(self, now: int, more: Counter[Use] | None) -> None:
        """So much lives, or will for a moment: `more` than what is known of."""
        if self._open is not None:
            span = self._open.section.spans[-1]
            if now - self._open.now > span.high:
                assert more is None
                span.high, span.high_by_use = now - self._open.now, _minus(self.by_use, self._open.by_use)
        if self._looks:
            at = self.at.in_phase(self.phase)
            most = self.lived.get(at, (0, 0))[0]
            # What lives between two passes of a pipeline, messages with it, is no part of the step's end.
            if at != ONCE or self.outside in ("clip", "update"):
                most = max(now, most)
            self.lived[at] = most, self.now
        if now > self.peak.num_bytes and self._looks:
            by_use_then = dict(self.by_use)
            for use, num_bytes in (more or {}).items():
                by_use_then[use] = by_use_then.get(use, 0) + num_bytes
            self.peak = Moment(self.phase, now, by_use_then)

    def _say(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        if func not in collective_ops:
            return
        group = CollectiveOp.get_process_group(func, args)
        name = func._opname
        ins = [t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        outs = [t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        functional = func.namespace != "c10d"
        num_bytes = (
            max(sum(ins), sum(outs)) if functional else max(ins, default=0) if name in OF_INPUT else sum(ins)
        )
        peer = args[2] if name in ("send", "recv_") else None
        ranks = get_process_group_ranks(group)
        stride = abs(ranks[-1] - ranks[0]) // max(1, len(ranks) - 1)
        self._did(
            Message(self.part, name, group.group_desc, len(ranks), num_bytes, peer, stride, not functional)
        )

    def _did(self, work: Work) -> None:
        self.done.append((self.at.in_phase(work.phase), work))


def by_what(by_use: Mapping[Use, int]) -> dict[str, int]:
    """Whosever it is; without what is nothing."""
    found = Counter[str]()
    for use, num_bytes in by_use.items():
        found[use.what] += num_bytes
    return dict(+found)


def settled(by_use: Mapping[Use, int]) -> dict[Use, int]:
    """What is above nothing. What one owner has below it, its largest neighbour of the same use gives."""
    totals, found = by_what(by_use), dict[Use, int]()
    for use, num_bytes in sorted(by_use.items(), key=lambda item: item[1]):
        size = min(num_bytes, totals.get(use.what, 0))
        if size > 0:
            found[use] = size
            totals[use.what] -= size
    return found


def _minus(left: Counter[Key], right: Counter[Key]) -> Counter[Key]:
    """The difference, of which parts may be below zero."""
    found = Counter(left)
    found.subtract(right)
    return found


def _some_number(dtype: torch.dtype) -> float | int | bool:
    return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
