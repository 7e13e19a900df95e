"""Every published family against `transformers`: logits, gradients, and the way there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from colossus.architecture import parameter_table
from colossus.models import Decoder
from colossus.models.hf.families import FAMILIES
from colossus.models.hf.published import fitting_family, open_published, publish
from colossus.models.hf.tensors import InMemory
from colossus.models.hf.writing import write_checkpoint
from tests.models.hf import tiny
from tests.models.hf.tiny import tokens

SEEDS = (0, 1, 2)
LONG = 37  # beyond every window, and four times what the stretched positions were first made for
OF_NO_EFFECT = {"_name_or_path", "transformers_version", "num_nextn_predict_layers", "num_mtp_layers"} | {
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # the tokenizer's, not the model's
    *("attn_pdrop", "embd_pdrop", "resid_pdrop"),  # of training
}


@pytest.fixture(params=[(name, seed) for name in tiny.MODELS for seed in SEEDS], ids=str, scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Decoder, Path]:
    """A model of transformers, ours loaded from what it saved, and that folder."""
    name, seed = request.param
    torch.set_num_threads(1)
    theirs = tiny.make(name, seed)
    folder = tiny.save(theirs, tmp_path_factory.mktemp("model") / "published")
    return theirs, tiny.load(folder), folder


def test_every_family_is_tried() -> None:
    tried = {tiny.make(name).config.model_type for name in tiny.MODELS}
    assert tried == FAMILIES.keys()


@pytest.mark.parametrize(("batch", "length"), [(3, 1), (1, 6), (2, LONG)])
def test_logits(pair: tuple[Any, Decoder, Path], batch: int, length: int) -> None:
    theirs, ours, _ = pair
    with torch.no_grad():
        expected = theirs(tokens(batch, length)).logits
        found = ours(tokens(batch, length))
    assert expected.std() > 0.3  # the weights matter
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_logits_of_padded_texts(pair: tuple[Any, Decoder, Path]) -> None:
    theirs, ours, _ = pair
    given, lengths = tokens(2, LONG), (LONG, 11)
    visible = torch.tensor([[position < length for position in range(LONG)] for length in lengths])
    with torch.no_grad():
        expected = theirs(given, attention_mask=visible.long()).logits
        found = ours(given)
    torch.testing.assert_close(found[visible], expected[visible], atol=1e-4, rtol=0)


def test_logits_of_packed_documents(pair: tuple[Any, Decoder, Path]) -> None:
    theirs, ours, _ = pair
    given, lengths = tokens(1, LONG), (13, 1, LONG - 14)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    targets = given.roll(-1, 1)
    with torch.no_grad():
        loss, _ = ours(given, targets, documents)
        parts, first = [], 0
        for length in lengths:  # positions count on, which learned ones show
            here = torch.arange(first, first + length)[None]
            parts.append(theirs(given[:, first : first + length], position_ids=here).logits)
            first += length
    expected = F.cross_entropy(torch.cat(parts, 1)[0], targets[0], reduction="sum")
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)


def test_gradients(pair: tuple[Any, Decoder, Path], tmp_path: Path) -> None:
    theirs, ours, _ = pair
    for name, difference in tiny.gradient_differences(theirs, ours, tokens(2, LONG), tmp_path).items():
        assert difference < 1e-4, name


def test_import_and_export_are_the_identity(pair: tuple[Any, Decoder, Path], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs, _, folder = pair
    opened = open_published(folder)
    family = fitting_family(opened.arch)
    config, tensors = publish(opened.arch, family, opened.tensors)
    write_checkpoint(tmp_path / "again", tensors, {"config.json": tiny.as_json(config)})
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    configs = [AutoConfig.from_pretrained(path).to_dict() for path in (folder, tmp_path / "again")]
    old, new = ({k: v for k, v in c.items() if k not in OF_NO_EFFECT} for c in configs)
    assert {key: new.get(key) for key in old} == old
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    with torch.no_grad():
        found = again(tokens(1, LONG)).logits
        torch.testing.assert_close(found, theirs(tokens(1, LONG)).logits, atol=1e-4, rtol=0)


def test_weights_in_memory_are_published_alike(pair: tuple[Any, Decoder, Path], tmp_path: Path) -> None:
    _, ours, folder = pair
    values = dict(ours.state_dict())
    named = {p.name: InMemory.of(p.name, values[p.name]) for p in parameter_table(ours.arch)}
    _, tensors = publish(ours.arch, fitting_family(ours.arch), named)
    before = load_file(folder / "model.safetensors")
    assert {tensor.name for tensor in tensors} == before.keys()
    for tensor in tensors:
        assert torch.equal(tensor.read(), before[tensor.name]), tensor.name
