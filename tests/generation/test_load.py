import pytest
import torch

from colossus.architecture import Architecture
from colossus.checkpoints.save import Saver
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.errors import MachineError, UserError
from colossus.generation import generate, load_model
from colossus.measure.vectors import quickest_vector_product
from colossus.models import build

TOKENIZER = BytesTokenizer()


def architecture():
    shape = {"vocab_size": TOKENIZER.vocab_size, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    shape |= {"num_kv_heads": 1, "head_dim": 8, "intermediate_size": 32, "max_seq_len": 32}
    rest = {"rope_theta": 1e4, "norm_eps": 1e-5, "tie_embeddings": False, "qk_norm": True}
    return Architecture(**shape, **rest, initializer_range=0.5)


def save(run, step, seed):
    """A checkpoint as training leaves it; returns the model and the folder."""
    model = build(architecture(), seed)
    tensors = {(name, "weight"): p.detach() for name, p in model.named_parameters()}
    with Saver(run) as saver:
        saver.save(step, tensors, {"step": step, "architecture": architecture().model_dump()})
        saver.wait()
    (run / "tokenizer").mkdir(exist_ok=True)
    TOKENIZER.save(run / "tokenizer")
    (run / "job.toml").touch()
    return model, run / "checkpoints" / f"step-{step:08}"


def test_a_run_loads_its_newest_checkpoint_and_a_checkpoint_itself(tmp_path):
    older, older_folder = save(tmp_path, 10, seed=1)
    newer, _ = save(tmp_path, 20, seed=2)
    for path, expected in ((tmp_path, newer), (older_folder, older)):
        model, tokenizer = load_model(path, dtype=torch.float32)
        assert not model.training and tokenizer.vocab_size == TOKENIZER.vocab_size
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor, expected.get_parameter(name))
        assert generate(model, tokenizer, ["abc"]) == generate(expected, TOKENIZER, ["abc"])


def test_a_checkpoint_by_its_name_alone(tmp_path, monkeypatch):
    _, folder = save(tmp_path, 10, seed=1)
    monkeypatch.chdir(folder.parent)
    assert load_model(folder.name)[1].vocab_size == TOKENIZER.vocab_size


def test_the_device_can_be_chosen(tmp_path):
    save(tmp_path, 10, seed=1)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    for asked, expected in (("cpu", "cpu"), (None, there), (there, there)):
        model, tokenizer = load_model(tmp_path, torch.float32, asked)
        assert {p.device.type for p in model.parameters()} == {expected}
        assert len(generate(model, tokenizer, ["a"], max_tokens=3)) == 1
    with pytest.raises(UserError, match=r"device=gpu: this machine has cpu"):
        load_model(tmp_path, torch.float32, "gpu")
    with pytest.raises(UserError, match=r"device=cuda:99: this machine has cpu"):
        load_model(tmp_path, torch.float32, "cuda:99")


def test_the_type_of_the_products_can_be_chosen(tmp_path):
    save(tmp_path, 10, seed=1)
    model, tokenizer = load_model(tmp_path, dtype=torch.bfloat16)
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    types = {name.rpartition(".")[0].rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    assert types["wq"] == types["head"] == torch.bfloat16
    assert types["norm"] == types["q_norm"] == types["embedding"] == torch.float32
    assert len(generate(model, tokenizer, ["a"], max_tokens=3)) == 1


def test_the_type_can_be_the_quickest_here(tmp_path):
    save(tmp_path, 10, seed=1)
    model, _ = load_model(tmp_path, dtype=None)
    assert model.compute_dtype == quickest_vector_product().dtype
    assert model.head.weight.dtype == model.compute_dtype


def test_changed_weights_are_never_read_from_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("colossus.generation.ready._packs", lambda owners, dtype: True)
    save(tmp_path, 10, seed=1)
    model, tokenizer = load_model(tmp_path, dtype=torch.float32)
    before = generate(model, tokenizer, ["abc"])
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(tokens).detach(), no_grad(model, tokens))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(1.5)
    assert generate(model, tokenizer, ["abc"]) != before
    torch.testing.assert_close(model(tokens).detach(), no_grad(model, tokens))


def no_grad(model, tokens):
    with torch.no_grad():
        return model(tokens)


def test_what_is_no_model_is_said_in_words(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "llama-1").mkdir()
    with pytest.raises(UserError, match=r"did you mean .*llama-1'"):
        load_model(tmp_path / "runs" / "llama-2")
    for name in (300 * "x", f"{300 * 'x'}/y"):
        with pytest.raises(UserError, match="no such folder"):
            load_model(name)
    with pytest.raises(UserError, match="neither a run"):
        load_model(tmp_path / "runs" / "llama-1")
    (tmp_path / "runs" / "llama-1" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="Hugging Face"):
        load_model(tmp_path / "runs" / "llama-1")
    (tmp_path / "runs" / "llama-1" / "job.toml").touch()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_model(tmp_path / "runs" / "llama-1")
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "runs" / "file.txt")


def test_a_damaged_checkpoint_is_never_loaded(tmp_path):
    _, folder = save(tmp_path, 10, seed=1)
    pieces = next(folder.glob("*.safetensors"))
    data = bytearray(pieces.read_bytes())
    data[-5] ^= 1
    pieces.write_bytes(data)
    with pytest.raises(MachineError, match="damaged"):
        load_model(folder)
