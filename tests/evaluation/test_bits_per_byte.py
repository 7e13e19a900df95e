import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from colossus.architecture import Architecture
from colossus.errors import UserError
from colossus.evaluation import Validation, evaluate
from colossus.models import build

VOCAB, WINDOW = 20, 8
FIELDS = ("start", "num_bytes", "gzip_bytes", "bz2_bytes", "xz_bytes")


class Corpus:
    """Held-out documents of given lengths, as the shards of a validation split give them."""

    def __init__(self, lengths, seed=0):
        draw = np.random.default_rng(seed)
        self.num_tokens = sum(lengths)
        self.mask = None
        self._tokens = draw.integers(0, VOCAB, self.num_tokens).astype(np.uint16)
        order = draw.permutation(len(lengths))
        self._documents = np.zeros(len(lengths), dtype=[(name, np.int64) for name in FIELDS])
        self._documents["start"] = np.cumsum([0, *lengths])[:-1][order]
        for factor, name in zip((3, 2, 1.5, 1), FIELDS[1:], strict=True):
            self._documents[name] = np.array(lengths)[order] * factor

    def tokens(self, start, stop):
        return self._tokens[start:stop]

    def scored(self, start, stop):
        return None if self.mask is None else self.mask[start:stop]

    def documents(self):
        return self._documents

    def texts(self):
        """The tokens of each document, in the fixed order."""
        starts = self._documents["start"]
        ends = dict(zip(sorted(starts), [*sorted(starts)[1:], self.num_tokens], strict=True))
        return [self._tokens[s : ends[s]].astype(np.int64) for s in starts]


@pytest.fixture(scope="module")
def model():
    """In float64, with weights so large that context matters."""
    torch.set_num_threads(1)
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    shape |= {"head_dim": 8, "intermediate_size": 32, "max_seq_len": WINDOW}
    rest = {"rope_theta": 1e4, "norm_eps": 1e-5, "tie_embeddings": True, "qk_norm": False}
    return build(Architecture(**shape, **rest, initializer_range=0.7), seed=0, dtype=torch.float64)


def token_by_token(model, text, window):
    """Sum of -log p over a document, each token from the window that the definition gives it."""
    nats, stride = 0.0, window // 2
    for position in range(1, len(text)):
        begin = max(0, math.ceil((position - window) / stride) * stride)
        with torch.no_grad():
            logits = model(torch.from_numpy(text[begin:position])[None])[0, -1]
        nats -= float(torch.log_softmax(logits, -1)[text[position]])
    return nats


@pytest.mark.parametrize("lengths", [[5, 40, 17, 2, 33, 8, 9, 10], [2], [9], [100]])
@pytest.mark.parametrize("batch_tokens", [1, 24, 10_000])
def test_it_is_what_a_loop_over_tokens_gives(model, lengths, batch_tokens):
    corpus = Corpus(lengths)
    result = evaluate(model, Validation(corpus, WINDOW), batch_tokens=batch_tokens)
    nats = sum(token_by_token(model, text, WINDOW) for text in corpus.texts())
    assert result.loss * result.num_tokens == pytest.approx(nats, rel=1e-12)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * sum(lengths)), rel=1e-12)
    assert (result.num_documents, result.num_tokens) == (len(lengths), sum(lengths) - len(lengths))


def test_what_is_not_learned_is_read_and_does_not_count(model):
    lengths = [5, 40, 17, 2, 33]
    corpora = [Corpus(lengths, 1), Corpus([9, 12], 2)]
    corpora[0].mask = np.random.default_rng(3).integers(0, 2, sum(lengths)).astype(np.uint8)
    nats, count = 0.0, 0
    for corpus in corpora:
        for start, text in zip(corpus.documents()["start"], corpus.texts(), strict=True):
            for position in range(1, len(text)):
                if corpus.mask is None or corpus.mask[start + position]:
                    nats += token_by_token(model, text[: position + 1], WINDOW)
                    nats -= token_by_token(model, text[:position], WINDOW)
                    count += 1
    validation = Validation(corpora, WINDOW)
    result = evaluate(model, validation, batch_tokens=24)
    assert result.num_tokens == count == validation.num_tokens()
    assert result.loss * count == pytest.approx(nats, rel=1e-10)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * 118), rel=1e-10)
    first = evaluate(model, validation, 3)
    assert 0 < first.num_tokens < count


def test_the_compressors_are_of_the_same_documents(model):
    validation = Validation(Corpus([30, 7, 12]), WINDOW)
    for count in (1, 2, 3, None):
        result = evaluate(model, validation, count)
        assert result.gzip_bits_per_byte == pytest.approx(8 * 2 / 3, abs=0.2)
        assert result.bz2_bits_per_byte == pytest.approx(8 * 1.5 / 3, abs=0.2)
        assert result.xz_bits_per_byte == pytest.approx(8 / 3, abs=0.01)
        assert result.num_documents == (count or 3)


def test_parts_add_up_to_the_whole_over_several_corpora(model):
    corpora = [Corpus([30, 7, 12, 5], 1), Corpus([9, 50], 2)]
    validation = Validation(corpora, WINDOW)
    assert validation.num_documents == 6
    whole = evaluate(model, validation)
    nats = sum(token_by_token(model, text, WINDOW) for corpus in corpora for text in corpus.texts())
    assert whole.loss * whole.num_tokens == pytest.approx(nats, rel=1e-12)
    assert whole.num_tokens == validation.num_tokens() == 113 - 6
    first = evaluate(model, validation, 3)
    assert first.num_documents == 3 and first.num_tokens < whole.num_tokens


@dataclass
class OneOf:
    """One rank of several; sums nothing, so that a test adds up what each computed."""

    rank: int
    size: int

    def sum(self, values):
        return list(values)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_share_the_work_and_call_the_model_equally_often(model, size):
    validation = Validation(Corpus([5, 40, 17, 2, 33]), WINDOW)
    whole = evaluate(model, validation, batch_tokens=16)
    calls, losses = [], []
    for rank in range(size):
        counter = []
        hook = model.register_forward_hook(lambda *_, counter=counter: counter.append(1))
        losses.append(evaluate(model, validation, world=OneOf(rank, size), batch_tokens=16).loss)
        hook.remove()
        calls.append(len(counter))
    assert sum(losses) == pytest.approx(whole.loss, rel=1e-12) and len(set(calls)) == 1


def test_every_rank_says_the_loss_of_all(model):
    class Doubled(OneOf):
        """Two ranks of equal shares."""

        def sum(self, values):
            return [2 * value for value in values]

    validation = Validation(Corpus([5, 40, 17, 2, 33]), WINDOW)
    alone = evaluate(model, validation, world=OneOf(0, 2), batch_tokens=16).loss
    assert evaluate(model, validation, world=Doubled(0, 2), batch_tokens=16).loss == pytest.approx(2 * alone)


def test_a_part_has_its_share_of_every_corpus():
    """Of 4, 8 and 2 documents the first 7 are 2, 4 and 1."""
    lengths = [[3] * 4, [5] * 8, [9] * 2]
    validation = Validation([Corpus(of_one) for of_one in lengths], WINDOW)
    assert validation.num_positions()[6] == validation.num_positions()[-1] / 2
    own = [Validation(Corpus(of_one), WINDOW).num_positions()[-1] for of_one in lengths]
    assert validation.num_positions()[6] == sum(own) / 2


def test_the_part_for_a_budget_is_the_largest_that_fits():
    validation = Validation(Corpus([30, 7, 12, 5, 50, 3]), WINDOW)
    positions = validation.num_positions()
    assert validation.choose_part(1.0, 0.5) == 1
    assert validation.choose_part(1.0, 10**6) == 6
    for count in range(1, 6):
        assert validation.choose_part(0.1, 0.1 * positions[count - 1] + 1e-9) == count


def test_the_model_is_left_as_it_was_even_when_given_up(model):
    model.train()

    def give_up():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, Validation(Corpus([9]), WINDOW), before_batch=give_up)
    assert model.training
    model.eval()


def test_a_split_without_text_is_the_users_to_mend():
    corpus = Corpus([2])
    corpus._documents["num_bytes"] = 0
    with pytest.raises(UserError, match="validation_fraction"):
        Validation(corpus, WINDOW)


def test_compiled_blocks_are_not_compiled_again(model):
    """Forward passes in eager mode, even where a block would be compiled: no graph is made."""
    import torch._dynamo

    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    result = evaluate(compiled, Validation(Corpus([30, 7]), WINDOW))
    assert not graphs
    assert result.loss == evaluate(model, Validation(Corpus([30, 7]), WINDOW)).loss
