import pytest
import torch

from colossus.architecture import Architecture
from colossus.data.bpe import train_bpe
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.errors import UserError
from colossus.generation import generate, stream
from colossus.generation.generate import window_begin
from colossus.models import build
from tests.generation.families import seen

WINDOW = 16
PROMPTS = ["def", "hello wörld", "a", "x" * 40, ""]
TOKENIZER = BytesTokenizer()


def untrained(vocab_size):
    """With weights so large that its predictions are decided."""
    torch.set_num_threads(1)
    shape = {"vocab_size": vocab_size, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    shape |= {"num_kv_heads": 2, "head_dim": 8, "intermediate_size": 64, "max_seq_len": WINDOW}
    rest = {"rope_theta": 1e4, "norm_eps": 1e-5, "tie_embeddings": True, "qk_norm": True}
    return build(Architecture(**shape, **rest, initializer_range=0.5), seed=0)


@pytest.fixture(scope="module")
def model():
    return untrained(TOKENIZER.vocab_size)


def without_cache(model, prompt, max_tokens):
    """Greedy, the whole window read again for every token."""
    tokens = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]
    prompt_length = len(tokens)
    while len(tokens) < prompt_length + max_tokens:
        window = torch.tensor([seen(tokens, WINDOW)])
        with torch.no_grad():
            token = int(model(window)[0, -1].argmax())
        if token == TOKENIZER.eos_id:
            break
        tokens.append(token)
    return TOKENIZER.decode(tokens[prompt_length:])


def test_the_window_moves_on_by_half():
    """Worked out by hand for 8 tokens, and for 5, whose half is 2; a window of one token still moves."""
    assert [window_begin(n, 8) for n in range(18)] == [0] * 9 + [4] * 4 + [8] * 4 + [12]
    assert [window_begin(n, 5) for n in range(12)] == [0] * 6 + [2] * 2 + [4] * 2 + [6] * 2
    assert [window_begin(n, 1) for n in range(4)] == [0, 0, 1, 2]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_cache_changes_nothing(model, prompt):
    assert generate(model, TOKENIZER, [prompt], max_tokens=50) == [without_cache(model, prompt, 50)]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}]
)
def test_unequal_prompts_together_give_what_each_gives_alone(model, sampling):
    together = generate(model, TOKENIZER, PROMPTS, max_tokens=30, seed=1, **sampling)
    for index, prompt in enumerate(PROMPTS):
        alone = [""] * index + [prompt]  # a draw depends on the prompt's place in the list
        assert generate(model, TOKENIZER, alone, max_tokens=30, seed=1, **sampling)[index] == together[index]


def test_draws_repeat_and_depend_on_seed_and_place(model):
    def sample(seed):
        return generate(model, TOKENIZER, ["abc", "abc"], max_tokens=20, temperature=1.0, seed=seed)

    assert sample(0) == sample(0)
    first, second = sample(0)
    assert first != second and sample(1)[0] != first


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}])
@pytest.mark.parametrize("stop", [(), ("e", "\n")])
def test_a_stream_is_the_text_in_pieces(model, sampling, stop):
    whole = generate(model, TOKENIZER, ["abc"], max_tokens=60, stop=stop, **sampling)[0]
    assert "".join(stream(model, TOKENIZER, "abc", max_tokens=60, stop=stop, **sampling)) == whole


def test_it_stops_before_a_stop_string(model):
    whole = generate(model, TOKENIZER, ["abc"], max_tokens=60, temperature=1.0)[0]
    stop = whole[7:10]
    cut = generate(model, TOKENIZER, ["abc"], max_tokens=60, temperature=1.0, stop=[stop])[0]
    assert cut == whole[: whole.index(stop)]


def test_nothing_asked_for_gives_nothing(model):
    assert generate(model, TOKENIZER, [], max_tokens=5) == []
    assert generate(model, TOKENIZER, ["abc"], max_tokens=0) == [""]


@pytest.mark.parametrize("padding", [0, 50])
def test_a_space_at_the_end_belongs_to_the_next_word(padding):
    tokenizer = train_bpe(["def name(self, other):\n    return other.name\n"] * 20, 290)
    model = untrained(tokenizer.vocab_size + padding)
    prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("def")]])
    with torch.no_grad():
        logits = model(prompt)[0, -1]
    spaced = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).startswith(" ")]
    best = max(spaced, key=lambda i: logits[i])
    assert len(spaced) > 3
    assert generate(model, tokenizer, ["def "], max_tokens=1) == [tokenizer.decode([best])[1:]]


def test_the_model_is_left_as_it_was(model):
    model.train()
    generate(model, TOKENIZER, ["abc"], max_tokens=2)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"max_tokens": -2}, "max_tokens=-2"),
    ],
)
def test_wrong_numbers_are_named(model, wrong, said):
    with pytest.raises(UserError, match=said):
        generate(model, TOKENIZER, ["abc"], **wrong)


def test_one_string_is_no_list(model):
    with pytest.raises(UserError, match=r"write \[prompt\]"):
        generate(model, TOKENIZER, "abc")


@pytest.mark.parametrize("training", [True, False])
def test_a_model_comes_back_in_the_mode_that_it_was_in(model, training):
    model.train(training)
    generate(model, TOKENIZER, ["a"], max_tokens=2)
    assert model.training is training
    model.eval()


def test_tokens_that_only_pad_a_vocabulary_are_never_chosen():
    """Rows that nobody trained, and that are the likeliest of all: one of them whichever way the hidden
    state points."""
    padded = untrained(TOKENIZER.vocab_size + 64)
    weight = padded.embedding.weight
    with torch.no_grad():
        weight[TOKENIZER.vocab_size :] = 0
        expected = generate(padded, TOKENIZER, PROMPTS, max_tokens=12)
        weight[TOKENIZER.vocab_size : -32] = 1000 * torch.eye(32)
        weight[-32:] = -1000 * torch.eye(32)
    assert generate(padded, TOKENIZER, PROMPTS, max_tokens=12) == expected
