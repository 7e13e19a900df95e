"""Grok-1's published files, read without running them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from colossus.errors import MachineError
from colossus.models.hf.grok1 import is_grok1, open_grok1
from tests.models.references import grok1

BIG = {"hidden_size": 256, "expert_size": 512, "vocab_size": 600, "num_layers": 1}  # payloads outside frames


@pytest.mark.parametrize("changed", [{}, BIG], ids=["small", "big"])
def test_every_tensor_is_what_was_written_rounded_to_bf16(tmp_path: Path, changed: dict[str, int]) -> None:
    config = grok1.config(**changed)
    read = grok1.write_checkpoint(config, grok1.random_weights(config, 1), tmp_path)
    assert is_grok1(tmp_path)
    source = open_grok1(tmp_path)
    assert set(source) == set(read)
    for name, expected in read.items():
        found = source[name]
        exact = torch.from_numpy(np.asarray(expected))
        assert found.shape == tuple(exact.shape), name
        assert torch.equal(found.read(), exact.to(found.dtype)), name
    name = "transformer/decoder_layer_0/moe/linear_1/w"
    box = (slice(1, 3), slice(2, 23, 3), slice(5, 17, 2))
    assert torch.equal(source[name].read(box), source[name].read()[box])


def test_matrices_stay_in_the_file_until_they_are_read(tmp_path: Path) -> None:
    config = grok1.config(**BIG)
    grok1.write_checkpoint(config, grok1.random_weights(config, 1), tmp_path)
    source = open_grok1(tmp_path)
    name = "transformer/decoder_layer_0/moe/linear/w"
    before = source[name].read((slice(0, 1),))
    file = tmp_path / "tensor00002_000"
    content = bytearray(file.read_bytes())
    begin = len(content) // 8  # within the first expert
    content[begin : begin + 1000] = bytes(1000)
    file.write_bytes(content)
    assert not torch.equal(before, source[name].read((slice(0, 1),)))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("this code must not run",)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.unlink(), "are expected"),
        (lambda file: file.write_bytes(file.read_bytes()[:-200]), "its array does|exhausted|bytes for"),
        (lambda file: file.write_bytes(pickle.dumps(Evil())), "asks for builtins.print"),
        (lambda file: file.write_bytes(pickle.dumps([1, 2])), "a list"),
        (lambda file: file.write_bytes(pickle.dumps(np.zeros(3, np.int64))), "numbers of type i8"),
        (lambda file: file.write_bytes(b""), "no array"),
    ],
    ids=["missing", "cut", "code", "list", "type", "empty"],
)
@pytest.mark.parametrize("changed", [{}, BIG], ids=["small", "big"])
def test_a_file_that_is_none_is_named(
    tmp_path: Path, spoil: object, said: str, changed: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = grok1.config(**changed)
    grok1.write_checkpoint(config, grok1.random_weights(config, 1), tmp_path)
    spoil(tmp_path / "tensor00003_000")  # type: ignore[operator]
    with pytest.raises(MachineError, match=said) as raised:
        open_grok1(tmp_path)
    assert said == "are expected" or "tensor00003_000, transformer/decoder_layer_0" in str(raised.value)
    assert "must not run" not in capsys.readouterr().out
