"""What is no folder of a model: the error says what to do, and never the very name again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossus.errors import UserError
from colossus.generation import load_model
from colossus.models.hf.published import open_published

OPENERS: list[Callable[[str], Any]] = [open_published, load_model]


def said(opener: Callable[[str], Any], name: str) -> str:
    with pytest.raises(UserError) as error:
        opener(name)
    assert f"did you mean {name!r}" not in str(error.value)
    return str(error.value)


@pytest.fixture(params=OPENERS, ids=["import", "generate"])
def opener(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return request.param


@pytest.mark.parametrize(
    "name",
    [
        "HuggingFaceTB/SmolLM2-135M",
        "hf:HuggingFaceTB/SmolLM2-135M",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
        "huggingface.co/HuggingFaceTB/SmolLM2-135M/",
    ],
)
def test_a_name_on_a_hub(opener: Any, name: str) -> None:
    text = said(opener, name)
    assert "nothing is downloaded" in text
    assert "hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M, then name SmolLM2-135M" in text


def test_a_name_beside_another_is_a_slip(opener: Any, tmp_path: Path) -> None:
    (tmp_path / "runs" / "llama-1").mkdir(parents=True)
    text = said(opener, "runs/llama-2")
    assert text.endswith("did you mean 'runs/llama-1'?")
    assert "hf download" not in text
    assert "hf download runs/other --local-dir other" in said(opener, "runs/other")
    assert "hf download" not in said(opener, "./runs/some/other")


@pytest.mark.parametrize("inside", [False, True], ids=["file", "folder"])
def test_a_file_of_gguf(opener: Any, tmp_path: Path, inside: bool) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smol-Q4_1.gguf").write_bytes(b"GGUF")
    text = said(opener, "models" if inside else "models/smol-Q4_1.gguf")
    assert "smol-Q4_1.gguf is GGUF, of which `transformers` makes a folder" in text
    assert "with quantization_config=GgufConfig(dequantize=True)" in text  # else it is not to be saved
    assert ".from_pretrained('models', gguf_file='smol-Q4_1.gguf').save_pretrained('NEW')" in text


def test_a_file_of_a_folder(opener: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors"):
        (tmp_path / "model" / name).touch()
        assert f"path=model/{name}: a file; " in said(opener, f"model/{name}")
        assert said(opener, f"model/{name}").endswith("is expected: name model, where it lies")
    (tmp_path / "weights.bin").touch()
    assert "it is a pickle, which could run code" in said(opener, "weights.bin")
    (tmp_path / "notes").touch()
    assert said(opener, "notes").endswith("Hugging Face folder is expected")


def test_a_link_that_leads_nowhere(opener: Any, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    assert "path=model: a link that leads nowhere" in said(opener, "model")
