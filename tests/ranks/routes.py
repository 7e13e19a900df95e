"""The experts that tokens visit, taken down on one rank and followed on others.

In bf16 a score that is rounded otherwise sends a token elsewhere, and its loss jumps: what layouts compute
can be compared where all send the tokens the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from colossus.models import Decoder
from colossus.models.router import Router
from colossus.parallel.program import decoders
from colossus.parallel.world import World


class Routes:
    """visited: of each step and layer, the experts of each row's tokens, [rows, T, K]."""

    def __init__(self) -> None:
        self.visited: dict[tuple[int, int], torch.Tensor] = {}

    def take(self, model: nn.Module, world: World, given: Routes | None) -> None:
        """Takes the routes of a rank that computes each step's rows at once, or has them be the given ones.

        A recomputed layer would ask for routes of rows that are not the current ones.
        """
        if world.size > 1 and given is None:
            return
        for part in decoders(model):
            now: dict[str, Any] = {}
            part.register_forward_pre_hook(partial(self._enter, now, world), with_kwargs=True)
            for name, module in part.named_modules():
                if isinstance(module, Router):
                    layer = int(re.search(r"layers\.(\d+)\.", name)[1])  # type: ignore[index]
                    choose = self._follow if given is not None else self._note
                    routes = self if given is None else given
                    module._choose = partial(choose, routes, now, layer, module._choose)  # type: ignore[method-assign]

    def begin(self, step: int, tokens_BT: torch.Tensor) -> None:
        """The rows of the step that follows."""
        self._step = step
        self._rows = {tuple(row): index for index, row in enumerate(tokens_BT.tolist())}

    def _enter(
        self, now: dict[str, Any], world: World, part: Decoder, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        tokens_BT = args[0] if args else kwargs["tokens_BT"]
        rows = [self._rows.get(tuple(row), 0) for row in tokens_BT.tolist()]  # padding: as the first
        places = torch.arange(tokens_BT.shape[1])[None]
        if part.whole is not None:
            places = part.whole.own(places).chunk(max(1, world.layout.tp or 1), dim=1)[world.place.tp]
        now |= {"step": self._step, "rows": torch.tensor(rows)[:, None], "places": places}

    @staticmethod
    def _note(
        routes: Routes,
        now: dict[str, Any],
        layer: int,
        choose: Callable[[torch.Tensor], torch.Tensor],
        scores_BTX: torch.Tensor,
    ) -> torch.Tensor:
        routes.visited[now["step"], layer] = found = choose(scores_BTX)
        return found

    @staticmethod
    def _follow(
        routes: Routes,
        now: dict[str, Any],
        layer: int,
        choose: Callable[[torch.Tensor], torch.Tensor],
        scores_BTX: torch.Tensor,
    ) -> torch.Tensor:
        visited = routes.visited[now["step"], layer][now["rows"], now["places"]]
        assert visited.shape == choose(scores_BTX).shape
        return visited
