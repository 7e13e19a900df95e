"""Training that begins with the weights of another model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from colossus import api
from colossus.data.bpe import train_bpe
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.errors import UserError
from colossus.generation.load import load_model
from colossus.job import Job, load_job
from colossus.monitor import summary
from colossus.perf.flops import model_flops_per_token
from colossus.trainer.hooks import Hook
from colossus.trainer.run import Run
from colossus.trainer.training import Training
from tests.trainer.running import train_in_processes


class Keep(Hook):
    """Keeps what training begins with."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_start(self, training: Training) -> None:
        self.weights = {name: p.detach().clone() for name, p in training.state.model.named_parameters()}


def tuned(corpus: Path, folder: Path, source: Path | str, *more: str) -> Job:
    """A job that says nothing of the model but where it comes from."""
    said = [f"data.corpus={corpus}", f"run.folder={folder}", f"model.init_from={source}", "run.steps=3"]
    rest = ["data.seq_len=32", "run.global_batch=4", "precision.type=fp32", "layout.compile=false"]
    return load_job(None, [*said, *rest, "run.threads=1", "data.validation_fraction=0.2", *more])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of a small model."""
    folder = tmp_path_factory.mktemp("source") / "run"
    sizes = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1"]
    sizes += ["model.head_dim=16", "model.intermediate_size=64", "model.tie_embeddings=false"]
    words = [f"data.corpus={corpus}", "data.tokenizer=bytes", "data.seq_len=64", "run.steps=4"]
    words += ["run.global_batch=4", "precision.type=fp32", "layout.compile=false", "run.threads=1"]
    api.train(load_job(None, [*sizes, *words, "data.validation_fraction=0.2", f"run.folder={folder}"]))
    return folder


@pytest.mark.parametrize("of", ["run", "checkpoint"])
def test_it_begins_with_those_weights_and_a_new_schedule(
    source: Path, corpus: Path, tmp_path: Path, of: str
) -> None:
    path = source if of == "run" else next((source / "checkpoints").iterdir())
    keep, (there, _) = Keep(), load_model(source)
    run = api.train(tuned(corpus, tmp_path / "tuned", path), [keep])
    assert set(keep.weights) == {name for name, _ in there.named_parameters()}
    for name, parameter in there.named_parameters():
        assert torch.equal(keep.weights[name], parameter), name
    assert [event["step"] for event in run.events("step")] == [0, 1, 2]
    after, tokenizer = load_model(run.folder)
    assert isinstance(tokenizer, BytesTokenizer)
    assert after.arch.model_copy(update={"init_from": None, "family": there.arch.family}) == there.arch
    assert any(not torch.equal(p, keep.weights[name]) for name, p in after.named_parameters())


def test_what_it_learned_is_not_lost(source: Path, corpus: Path, tmp_path: Path) -> None:
    first = api.train(tuned(corpus, tmp_path / "tuned", source)).loss[0]
    fresh = Run(source).loss
    assert 0.5 * fresh[max(fresh)] < first < 1.05 * fresh[max(fresh)] < 0.9 * fresh[0]


def test_two_ranks_begin_as_one_does(source: Path, corpus: Path, tmp_path: Path) -> None:
    losses = []
    for ranks in (1, 2):
        job = api.resolve(tuned(corpus, tmp_path / f"of-{ranks}", source, f"layout.dp_shard={ranks}"))
        assert train_in_processes(job) == [0] * ranks
        losses.append(Run(tmp_path / f"of-{ranks}").loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_the_model_reached_before_is_in_the_run(
    source: Path, corpus: Path, tmp_path: Path, ranks: int
) -> None:
    """On the very documents of the final figure, and what `evaluate` says of the model it began with."""
    folder = tmp_path / "tuned"
    job = api.resolve(tuned(corpus, folder, source, f"layout.dp_shard={ranks}"))
    assert train_in_processes(job) == [0] * ranks
    run = Run(folder)
    before, after = run.events("validation")
    assert (before["step"], after["step"]) == (0, 3) and before["whole"] is after["whole"] is True
    assert before["num_documents"] == after["num_documents"]
    order = [event["kind"] for event in run.events() if event["kind"] in ("validation", "step")]
    assert order == ["validation", "step", "step", "step", "validation"]
    model, tokenizer = load_model(source)
    found = api.evaluate(model, tokenizer, held_out_of=folder, seq_len=32).result
    assert before["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-5)
    assert before["num_bytes"] == found.num_bytes
    said = f"{before['bits_per_byte']:.3f}"
    for place in ("log.txt", "report.html"):
        assert said in (folder / place).read_text(), place
    assert re.search(rf"before tuning +{said}", summary(folder))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.hidden_size=48"], r"model.hidden_size=48: model.init_from=.* has 32"),
        (["model.tie_embeddings=true"], "model.tie_embeddings=True: .* has False"),
        (["model.experts.num_experts=4"], "model.experts=.*num_experts': 4.* has None"),
        (["model.max_seq_len=4096"], "model.max_seq_len=4096: .* has 64"),
        (["data.tokenizer=bpe"], "data.tokenizer=bpe: .* has its own"),
        (["data.seq_len=128"], "data.seq_len=128: longer than model.max_seq_len=64"),
    ],
)
def test_a_contradiction_is_an_error(
    source: Path, corpus: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        api.resolve(tuned(corpus, tmp_path / "tuned", source, *words))
    assert not (tmp_path / "tuned").exists()


def test_another_tokenizer_of_the_same_size_is_an_error(source: Path, corpus: Path, tmp_path: Path) -> None:
    other = train_bpe(["no step is lost"] * 9, BytesTokenizer().vocab_size)
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="has its own"):
        api.resolve(tuned(corpus, tmp_path / "tuned", source, f"data.tokenizer={tmp_path / 'other'}"))
    BytesTokenizer().save(tmp_path / "same")
    job = api.resolve(tuned(corpus, tmp_path / "tuned", source, f"data.tokenizer={tmp_path / 'same'}"))
    assert job.data.tokenizer == str(tmp_path / "same")


def test_a_shorter_run_has_no_higher_rate(source: Path, corpus: Path, tmp_path: Path) -> None:
    """A tenth of what the law gives for the compute that suits a model of this size; less beyond it."""

    def rate(*length: str) -> float:
        job = tuned(corpus, tmp_path / "tuned", source).without("run.steps")
        job = api.resolve(job.put({f"run.{length[0]}": length[1]}, "argument"))
        assert job.model.base_width == job.model.hidden_size  # nothing is scaled
        return job.optimizer.lr

    rates = [rate("steps", 1), rate("steps", 4), rate("steps", 40), rate("minutes", 0.01)]
    arch = api.resolve(tuned(corpus, tmp_path / "tuned", source)).model
    flops = model_flops_per_token(arch, 32)
    compute = 1e12
    for _ in range(100):  # which closes in on the one solution
        compute = flops * 2.2 * compute**0.4757
    assert rates == [pytest.approx(0.1 * 0.3118 * compute**-0.125, rel=0.05)] * 4
    assert rate("tokens", 10**13) < 0.7 * rates[0]


def test_what_agrees_may_be_said(source: Path, corpus: Path, tmp_path: Path) -> None:
    said = ["model.hidden_size=32", "data.tokenizer=bytes", "optimizer.lr=0.001", "optimizer.name=muon"]
    job = api.resolve(tuned(corpus, tmp_path / "tuned", source, *said))
    assert (job.model.num_layers, job.optimizer.lr, job.optimizer.name) == (2, 0.001, "muon")


def test_no_model_there_is_an_error(corpus: Path, tmp_path: Path) -> None:
    """Said of the field that named it, and with other names than the one that was given."""
    (tmp_path / "model.gguf").write_text("GGUF")
    (tmp_path / "models").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    for name, said in (
        ("nothing", "no such folder; the folder of a run, of a checkpoint or of a Hugging Face model"),
        ("model.gguf", f"a file, not a folder; .*; did you mean '{tmp_path}/models'"),
        ("models", "neither a run"),
        ("empty", "is no Hugging Face checkpoint: it has neither model.safetensors nor"),
    ):
        with pytest.raises(UserError, match=rf"^model\.init_from={tmp_path}/{name}: {said}") as error:
            api.resolve(tuned(corpus, tmp_path / "tuned", tmp_path / name))
        assert "path=" not in str(error.value) and str(error.value).count(f"{tmp_path}/{name}") == 1
