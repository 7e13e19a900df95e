"""There and back: published models as ours, ours as published ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import colossus
from colossus.architecture import Architecture, parameter_table
from colossus.checkpoints.find import verify
from colossus.checkpoints.save import Saver
from colossus.cli import main
from colossus.data.bpe import train_bpe
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import MachineError, UserError
from colossus.generation import load_model
from colossus.interchange import export_model, import_model
from colossus.models import build
from tests.models.hf import tiny

TEXTS = ["def add(a, b):\n    return a + b\n" * 20]
FAMILIES = ["gpt2", "llama", "qwen3_moe", "gpt_oss", "deepseek_v3"]


def published(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model of transformers with a tokenizer, too small for its vocabulary, and the files around it."""
    tiny.save(tiny.make(name).to(dtype), folder)
    tokenizer = tiny.tokenizer(folder)
    assert tokenizer.vocab_size <= tiny.VOCAB
    (folder / "chat_template.jinja").write_text("{{ messages }}\r\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2],   "temperature": 0.6}')
    return folder


def ours(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """A run of ours, as training leaves it, that begins as every one does: a small Llama with q/k norms."""
    sizes = {"vocab_size": 258, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    sizes |= {"head_dim": 6, "intermediate_size": 24, "max_seq_len": 32, "rope_theta": 1e4, "norm_eps": 1e-5}
    rest = {"tie_embeddings": True, "qk_norm": True, "initializer_range": 0.4}
    arch = Architecture.model_validate(sizes | rest | fields)
    model = build(arch, seed)
    tensors = {(name, "weight"): p.detach() for name, p in model.named_parameters()}
    tensors |= {(name, "buffer"): buffer for name, buffer in model.named_buffers()}
    with Saver(folder) as saver:
        saver.save(7, tensors, {"step": 7, "architecture": arch.model_dump()}, asynchronous=False)
    BytesTokenizer().save(folder / "tokenizer")
    (folder / "job.toml").touch()
    return folder


def test_what_is_written_keeps_its_name_after_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder itself is synced, and last of all the one that has its name by then."""
    folder, synced = published(tmp_path / "published", "llama"), list[tuple[int, bool]]()
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        sync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, out.exists()))

    monkeypatch.setattr(os, "fsync", recorded)
    for name, write in (("run", import_model), ("again", export_model)):
        out = tmp_path / name
        write(folder, out, say=lambda line: None)
        assert synced[-1] == (tmp_path.stat().st_ino, True)
        assert (out.stat().st_ino, False) in synced


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_and_export_give_everything_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = published(tmp_path / "published", name, dtype)
    said: list[str] = []
    run = import_model(folder, tmp_path / "run", said.append)
    verify(run / "checkpoints" / "step-00000000")
    export_model(run, tmp_path / "again", say=said.append)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for label, tensor in before.items():
        assert tensor.dtype == after[label].dtype and torch.equal(tensor, after[label]), label
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for file in kept:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    assert configs[1]["eos_token_id"] == configs[0]["eos_token_id"]
    assert said == [
        f"{path}: the model has {tiny.VOCAB} tokens, 2 more than the tokenizer"
        for path in (folder, run / "tokenizer")
    ]


@pytest.mark.parametrize("imported", [False, True])
def test_what_was_published_beside_a_model_outlives_its_training(tmp_path: Path, imported: bool) -> None:
    """A run begins with a published model; what is exported of it generates as was published."""
    folder = published(tmp_path / "published", "llama")
    (folder / "special_tokens_map.json").write_text('{"pad_token":  "<pad>"}')
    origin = import_model(folder, tmp_path / "imported", lambda line: None) if imported else folder
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(TEXTS[0])
    words = [
        f"data.corpus={tmp_path / 'texts'}",
        f"model.init_from={origin}",
        "run.steps=1",
        "data.seq_len=16",
    ]
    words += ["run.global_batch=1", "layout.compile=false", "precision.type=fp32", "run.threads=1"]
    words += [f"run.folder={tmp_path / 'run'}", f"data.folder={tmp_path / 'shards'}"]
    run = colossus.train(colossus.load_job(None, [*words, "data.validation_fraction=0.3"]))
    export_model(run.folder, tmp_path / "out", say=lambda line: None)
    for name in ("generation_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name
    # Texts were separated by the token that ends one: it stands in front of every text now, for others too.
    before, after = (json.loads((path / "tokenizer.json").read_text()) for path in (folder, tmp_path / "out"))
    assert before.pop("post_processor") is None and after.pop("post_processor") is not None
    assert after["added_tokens"].pop()["content"] == "<pad>"  # with the id that others give it, too
    assert before == after
    front = load_tokenizer(tmp_path / "out")
    assert front.begins == (front.eos_id,) and front.bos_id == front.eos_id


def test_a_published_folder_its_import_and_its_export_are_one_model(tmp_path: Path) -> None:
    folder = published(tmp_path / "published", "deepseek_v3")
    run = import_model(folder, tmp_path / "run", lambda line: None)
    export_model(run, tmp_path / "again", say=lambda line: None)
    tokens = torch.randint(0, tiny.VOCAB, (2, 20))
    found = []
    for path in (folder, run, run / "checkpoints" / "step-00000000", tmp_path / "again"):
        model, tokenizer = load_model(path)
        assert tokenizer.encode("def") and not model.training
        with torch.no_grad():
            found.append(model(tokens))
    assert all(torch.equal(logits, found[0]) for logits in found)
    assert found[0].isfinite().all()


def test_what_ends_a_text_outlives_an_import(tmp_path: Path) -> None:
    """Where config.json alone says it, which does not lie beside the tokenizer of a run."""
    folder = published(tmp_path / "published", "llama")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [3, 4], "pad_token_id": 5}
    (folder / "config.json").write_text(json.dumps(config))
    run = import_model(folder, tmp_path / "run", lambda line: None)
    for path in (folder, run):
        tokenizer = load_model(path)[1]
        assert tokenizer is not None and tokenizer.ends == {3, 4} and tokenizer.begins == ()
        assert tokenizer.account.pad_id == 5  # type: ignore[attr-defined]
    export_model(run, tmp_path / "out", say=lambda line: None)
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "out" / name).read_text())
        assert (ids["eos_token_id"], ids["pad_token_id"]) == ([3, 4], 5)


def test_our_own_model_is_loaded_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, said = ours(tmp_path / "run"), list[str]()
    export_model(run, tmp_path / "out", say=said.append)
    assert said == [f"{run}: exported as qwen3, which has this model's parts; llama has not"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert theirs.dtype == torch.float32
    model, tokenizer = load_model(run)
    text = "def add(a, b): größer"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode(text)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(torch.tensor([ids])).logits, model(torch.tensor([ids])), atol=1e-5, rtol=0
        )
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == tokenizer.eos_id


def test_a_tokenizer_of_ours_is_loaded_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run = ours(tmp_path / "run", vocab_size=300)
    (run / "tokenizer" / "bytes.json").unlink()
    mine = train_bpe(TEXTS, 290)
    mine.save(run / "tokenizer")
    export_model(run, tmp_path / "out", say=lambda line: None)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("return a + b")["input_ids"] == [mine.bos_id, *mine.encode("return a + b")]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (mine.bos_id, mine.eos_id)


def test_the_type_can_be_chosen(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "scores": "sigmoid", "selection_bias": True, "num_shared": 1}
    experts |= {"dense_layers": 1, "intermediate_size": 8}
    run = ours(tmp_path / "run", experts=experts, rotary_dim=4)
    export_model(run, tmp_path / "out", "bf16", lambda line: None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("glm4_moe", "bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    source = load_model(run)[0].get_parameter("layers.0.attention.wq.weight")
    assert torch.equal(tensors["model.layers.0.self_attn.q_proj.weight"], source.bfloat16())
    with pytest.raises(UserError, match=r"type=fp16: one of fp32, bf16; did you mean"):
        export_model(run, tmp_path / "other", "fp16")


def test_what_no_family_has_is_named(tmp_path: Path) -> None:
    run = ours(tmp_path / "run", attention_soft_cap=30.0)
    with pytest.raises(
        UserError, match=r"llama is its own, but: model.attention_soft_cap=30.0 \(llama: none\)"
    ):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    folder = published(tmp_path / "published", "llama")
    train_bpe(TEXTS, 280).save(folder)
    for use in (
        lambda: import_model(folder, tmp_path / "run"),
        lambda: export_model(folder, tmp_path / "run"),
    ):
        with pytest.raises(UserError, match=rf"has 27\d tokens, more than the {tiny.VOCAB} of the model"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    folder, said = tiny.save(tiny.make("llama"), tmp_path / "published"), list[str]()
    run = import_model(folder, tmp_path / "run", said.append)
    assert said == [f"{folder} has no tokenizer.json: what is made of it has no tokenizer"]
    for path in (folder, run):
        model, tokenizer = load_model(path)
        assert tokenizer is None and model(torch.tensor([[1, 2]])).shape == (1, 2, tiny.VOCAB)
        with pytest.raises(UserError, match="tokenizer: the model has none"):
            colossus.generate(model, tokenizer, ["a"])


def test_a_damaged_file_leaves_nothing(tmp_path: Path) -> None:
    folder = published(tmp_path / "published", "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for use in (
        lambda: import_model(folder, tmp_path / "run"),
        lambda: export_model(folder, tmp_path / "run"),
    ):
        with pytest.raises(MachineError, match=r"model.safetensors is cut short: .* ends at byte"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_failure_under_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(tmp_path / "published", "llama")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("colossus.checkpoints.stream.commit", full)
    with pytest.raises(MachineError, match="No space left on device; nothing is left of it"):
        import_model(folder, tmp_path / "run", lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_the_destination_must_be_free(tmp_path: Path) -> None:
    folder = published(tmp_path / "published", "llama")
    run = import_model(folder, tmp_path / "run", lambda line: None)
    for use in (import_model, export_model):
        with pytest.raises(UserError, match="exists and is not"):
            use(folder, run)  # type: ignore[operator]


def test_the_verbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published(tmp_path / "tiny", "llama")
    monkeypatch.chdir(tmp_path)
    assert main(["import", "tiny"]) == 0
    assert "imported to runs/tiny" in capsys.readouterr().out
    assert main(["generate", "runs/tiny", "de", "--max-tokens", "3"]) == 0
    assert main(["generate", "tiny", "de", "--max-tokens", "3"]) == 0
    ours_text, theirs_text = capsys.readouterr().out.split("de")[1:]
    assert ours_text == theirs_text
    assert main(["export", "runs/tiny", "out", "--type", "bf16"]) == 0
    assert "exported to out" in capsys.readouterr().out
    assert main(["import", "nowhere"]) == 2
    assert "no such folder; a Hugging Face folder is expected" in capsys.readouterr().err


WATCHED = """
import sys, threading, time
from pathlib import Path
from colossus import interchange

folder, out = map(Path, sys.argv[1:])
most, on = 0, True

def anonymous():  # KiB of private memory that no file backs
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    global most
    while on:
        most = max(most, anonymous())
        time.sleep(0.002)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
interchange.import_model(folder, out / "run", lambda line: None)
interchange.export_model(out / "run", out / "again", None, lambda line: None)
on = False
thread.join()
print((most - before) / 1024)
"""


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """400 MB of weights, with stacks of experts and permuted rows, there and back."""
    folder = tmp_path / "published"
    tiny.save(tiny.make("deepseek_v3"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 1024, "moe_intermediate_size": 2048, "intermediate_size": 4096}
    config |= {"n_routed_experts": 12, "n_group": 1, "topk_group": 1, "num_hidden_layers": 2}
    config |= {"q_lora_rank": 512, "kv_lora_rank": 512, "vocab_size": 16384}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_zeros(config), folder / "model.safetensors", metadata={"format": "pt"})
    size = (folder / "model.safetensors").stat().st_size
    assert size > 400e6
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 256, done.stdout


def _zeros(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from colossus.models.hf.config import description
    from colossus.models.hf.families import FAMILIES
    from colossus.models.hf.mapping import Blank
    from colossus.models.hf.published import publish

    family = FAMILIES["deepseek_v3"]
    arch = description(family.terms, family.name, config)
    blanks = {p.name: Blank.of(p.name, p.shape) for p in parameter_table(arch)}
    _, tensors = publish(arch, family, blanks)
    return {tensor.name: torch.zeros(tensor.shape) for tensor in tensors}


def test_the_public_functions(tmp_path: Path) -> None:
    folder = published(tmp_path / "published", "gpt2")
    run = colossus.import_model(folder, tmp_path / "run")
    assert load_tokenizer(run / "tokenizer").vocab_size == tiny.VOCAB - 2
    assert colossus.export_model(run, tmp_path / "out", type="fp32") == tmp_path / "out"
