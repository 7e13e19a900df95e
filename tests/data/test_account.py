"""What a tokenizer is, by all the files that say it; `transformers` is the reference for each kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from colossus.data.bpe import train_bpe
from colossus.data.build import build, is_built, verify
from colossus.data.chats import chat_in
from colossus.data.documents import Encoder, chats_of, separated_once
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.shards import read_manifest
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import UserError
from tests.data.building import built, in_memory, request_for
from tests.data.chatting import CHATML, families
from tests.data.kinds import BEGINS, KINDS, reference, saved, texts

TEXTS = texts(1000)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("kinds") / request.param)


def opened(folder: Path) -> JsonTokenizer:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer


def write(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(there | values))


def test_ids_and_texts_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = opened(folder), reference(folder)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text


def test_what_begins_a_text_is_what_its_own_encoding_puts_there(folder: Path) -> None:
    ours, theirs = opened(folder), reference(folder)
    assert [ours.name(index) for index in ours.begins] == BEGINS[folder.name]
    for text in TEXTS[3:50]:
        whole = [*ours.begins, *ours.encode(text)]
        assert theirs(text)["input_ids"][: len(whole)] == whole
    assert ours.ends == {theirs.eos_token_id}
    assert ours.begin_id == (ours.begins[0] if ours.begins else theirs.eos_token_id)


def test_pieces_have_the_ids_of_their_place(folder: Path) -> None:
    """A piece behind another begins no text: no blank is put before it, and no word ends at its border."""
    ours, theirs = opened(folder), reference(folder)
    pieces = [("the cat", False), (" sat on a", True), (" mat", False), (" and said hello", True)]
    text = "".join(text for text, _ in pieces)
    (found,) = Encoder(ours)([pieces])
    num_begins = len(ours.begins or (ours.begin_id,))
    ids = found.ids[num_begins:-1]
    assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    learned = found.mask[num_begins:-1]
    shown = [theirs.decode(ids[learned == yes].tolist()).replace(" ", "") for yes in (0, 1)]
    assert shown == ["thecatmat", "satonaandsaidhello"]
    assert found.mask[0] == 0 and found.mask[-1] == 1
    assert found.learned == " sat on a and said hello"


def test_a_folder_of_a_run_and_what_it_gives_out_are_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    """A run learns texts behind a token; what is exported puts it there for others too."""
    taught = opened(folder).taught(True, None)
    taught.save(tmp_path / "run")
    kept = opened(tmp_path / "run")
    assert kept.begins == taught.begins == (kept.begin_id,) and kept.prefix_id == kept.begin_id
    assert kept.fingerprint == taught.fingerprint == opened(folder).fingerprint
    (tmp_path / "out").mkdir()
    for name, text in kept.files().items():
        (tmp_path / "out" / name).write_text(text)
    theirs = reference(tmp_path / "out")
    for text in TEXTS[3:100]:
        whole = [*kept.begins, *kept.encode(text)]
        assert theirs(text)["input_ids"][: len(whole)] == whole
        assert theirs(text, add_special_tokens=False)["input_ids"] == kept.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (kept.begin_id, kept.eos_id)
    before, after = (
        json.loads((path / "tokenizer_config.json").read_text()) for path in (folder, tmp_path / "out")
    )
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed == (set() if BEGINS[folder.name] else {"bos_token"})
    assert opened(tmp_path / "out").begins == kept.begins


def test_documents_are_separated_once(folder: Path, tmp_path: Path) -> None:
    """In a stream a document follows its begin: its own, or the one token that ended the document before."""
    documents = [f"the cat {n} sat on {n * n}" for n in range(60)]
    train, held_out = built(tmp_path / "out", in_memory(documents), tokenizer=str(folder))
    ours = opened(folder)
    begin, end, once = ours.begin_id, ours.eos_id, not ours.begins
    assert separated_once(ours) is once is train.separated_once
    ids = train.tokens(0, train.num_tokens).tolist()
    starts = train.document_starts(0, train.num_tokens).tolist()
    assert ids[0] == begin and ids[-1] == end
    assert ids.count(end) == len(starts) + once  # the very first stands behind one, too
    for number, start in enumerate(starts):
        first = start if number == 0 or not once else start - 1
        assert ids[first] == begin and ids[first + 1] != begin
    ids = held_out.tokens(0, held_out.num_tokens).tolist()
    assert held_out.num_documents > 1
    for start in held_out.document_starts(0, held_out.num_tokens).tolist():  # each is scored by itself
        assert ids[start] == begin and ids[start + 1] != begin


def test_tokens_that_only_the_configuration_names(tmp_path: Path) -> None:
    folder = saved("byte_level", tmp_path / "published")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(state))
    added = {
        "420": {"content": "<|im_start|>", "special": True},
        "421": {"content": "<think>", "special": False},
    }
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    end = {"0": {"content": "<|endoftext|>", "special": True} | flags}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    decoder = end | {index: token | flags for index, token in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    ours, theirs = opened(folder), reference(folder)
    text = "<|im_start|>a<think> b<|endoftext|>"
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert {420, 421, 0} <= {*expected}
    assert ours.encode_rendered([text])[0][0].tolist() == expected
    assert 421 in ours.encode(text) and not {420, 0} & {*ours.encode(text)}  # text spells no special token
    assert ours.vocab_size == len(theirs) == 422


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_tokens_that_only_the_older_files_name(tmp_path: Path, name: str) -> None:
    folder = saved("byte_level", tmp_path / "published")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if name == "special_tokens_map.json":
        write(folder, name, eos_token="the", bos_token={"content": "<|endoftext|>", "lstrip": False})
    else:
        write(folder, name, **{"<|new|>": 420})
        write(folder, "special_tokens_map.json", eos_token="<|endoftext|>", pad_token="<|new|>")
    ours, theirs = opened(folder), reference(folder)
    assert ours.eos_id == theirs.eos_token_id and ours.account.bos_id == theirs.bos_token_id
    for text in ("a the b", "<|new|>a", " <|endoftext|>"):
        assert (
            ours.encode_rendered([text])[0][0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        )


def test_an_unknown_end_is_named(tmp_path: Path) -> None:
    folder = saved("byte_level", tmp_path / "published")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftxt|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"eos_token=<\|endoftxt\|>: .*no such token; .*'<\|endoftext\|>'"):
        load_tokenizer(folder)


def test_all_that_is_said_to_end_a_text_ends_it(tmp_path: Path) -> None:
    """By the model's files, and by the template, whose turns end in a token of their own."""
    family = families()["chatml"]
    folder = family.save(tmp_path / "chat")
    tokens = {name: family.tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")}
    assert opened(folder).ends == {tokens["<|im_end|>"]}
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert opened(folder).ends == {*tokens.values()}
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert opened(folder).ends == {7, tokens["<|im_end|>"]}
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9], "pad_token_id": 3}')
    assert opened(folder).ends == {2, 9, tokens["<|im_end|>"]}
    taught = opened(folder).taught(True, opened(folder).chats)
    taught.save(tmp_path / "run")
    kept = opened(tmp_path / "run")
    assert kept.ends == {2, 9, *tokens.values()} and kept.account.pad_id == 3
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=</s>: expected a token's id"):
        load_tokenizer(folder)


def test_where_nothing_is_named(tmp_path: Path) -> None:
    """By the model's files, if they say it; without an end texts have none, and none can be learned."""
    folder = saved("byte_level", tmp_path / "published")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="is known to end a document; name eos_token"):
        load_tokenizer(folder)
    partly = load_tokenizer(folder, partly=True)
    assert partly.ends == frozenset() and partly.begins == () and partly.encode("the cat")
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    assert opened(folder).eos_id == 0 and opened(folder).special_tokens == {"<|endoftext|>": 0}
    documents = [f"the cat {number}" for number in range(30)]
    train, _ = built(tmp_path / "out", in_memory(documents), tokenizer=str(folder))
    verify(tmp_path / "out", 1)
    assert train.manifest["tokenizer"]["fingerprint"] == opened(tmp_path / "out" / "tokenizer").fingerprint


def test_chats_alone_change_nothing_that_was_published(tmp_path: Path) -> None:
    folder = families()["chatml"].save(tmp_path / "chat")
    chats = tmp_path / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(30)
    ]
    chats.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    built(tmp_path / "out", chats, tokenizer=str(folder))
    kept = opened(tmp_path / "out" / "tokenizer")
    assert kept.begins == ()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert kept.files()[name] == (folder / name).read_text()


def earlier(folder: Path, tokenizer: JsonTokenizer) -> None:
    """As an earlier build wrote it: nothing but the ids of two tokens by their names."""
    (folder / "tokenizer").mkdir(parents=True)
    names = {"bos_token": tokenizer.name(tokenizer.bos_id), "eos_token": tokenizer.name(tokenizer.eos_id)}
    (folder / "tokenizer" / "tokenizer.json").write_text(tokenizer._text)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.mark.parametrize("around", ["job.toml", "request.json"])
def test_what_an_earlier_build_made_keeps_its_meaning(tmp_path: Path, around: str) -> None:
    """It put a token in front of every text, the end of a document where there was no other."""
    for name in ("byte_level", "metaspace"):
        tokenizer = opened(saved(name, tmp_path / name))
        earlier(tmp_path / "old" / name, tokenizer)
        assert opened(tmp_path / "old" / name / "tokenizer").begins == tokenizer.begins  # that of an import
        (tmp_path / "old" / name / around).touch()
        old = opened(tmp_path / "old" / name / "tokenizer")
        assert old.begins == (tokenizer.bos_id,) and old.fingerprint == tokenizer.fingerprint
    assert old.begins == (1,) and opened(tmp_path / "old" / "byte_level" / "tokenizer").begins == (0,)


def test_shards_of_an_earlier_build_are_taken_as_they_are(tmp_path: Path) -> None:
    """Whole ones, by their claim; they have two tokens between documents, and say nothing of it."""
    folder = saved("byte_level", tmp_path / "published")
    request = request_for(in_memory([f"{n} and {n}" for n in range(40)]), tokenizer=str(folder))
    build(request, tmp_path / "shards")
    assert request.earlier_key != request.key
    claim = tmp_path / "shards" / "request.json"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"key": request.earlier_key}))
    assert is_built(request, tmp_path / "shards")
    (tmp_path / "shards" / "corpus-0" / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds other data"):
        build(request, tmp_path / "shards")


def test_our_own_keep_their_shards(tmp_path: Path) -> None:
    """Texts behind a BOS are what they were: the same key, and nothing new in the manifest."""
    train_bpe(TEXTS, 300).save(tmp_path / "bpe")
    request = request_for(in_memory([f"{n} and {n}" for n in range(40)]), tokenizer=str(tmp_path / "bpe"))
    assert request.earlier_key is None
    build(request, tmp_path / "out")
    found = read_manifest(tmp_path / "out" / "corpus-0")["tokenizer"]
    assert {*found} == {"fingerprint", "vocab_size", "bos_id", "eos_id"}
    assert request_for(in_memory(["a"])).earlier_key is None


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = saved("byte_level", tmp_path / "published")
    for name, text in (
        ("account.json", '{"begins": 3, "ends": [], "pad": []}'),
        ("special_tokens_map.json", "[]"),
        ("config.json", "{"),
        ("added_tokens.json", '{"a": 1, "b": "c"}'),
        ("added_tokens.json", '{"a": [1]}'),
        ("tokenizer.json", '{"added_tokens": [], "model": {"vocab": [[]]}}'),
        ("tokenizer.json", '{"added_tokens": [], "model": {"vocab": {"a": {}}}}'),
    ):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("added_tokens_decoder", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            load_tokenizer(folder)
        if name == "tokenizer.json":
            saved("byte_level", folder)
        else:
            (folder / name).unlink()


def test_the_table_of_the_documentation_is_so(folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tokenizers.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    table = {row[0].split("`")[1]: row[2:] for row in rows if row[0].split("`")[1] in KINDS}
    assert {*table} == {*KINDS}
    tokenizer = opened(folder)
    front = " ".join(tokenizer.name(index) for index in tokenizer.begins)
    shown = "`[CLS]`" if front == "[CLS]" else "BOS" if front else "nothing"
    back = [(text, tokenizer.decode(tokenizer.encode(text))) for text in TEXTS]
    lossless = all(text == again for text, again in back)
    nearly = all(text in (again, f" {again}") or text.lstrip(" ") == again for text, again in back)
    assert table[folder.name] == [
        shown,
        "each by itself" if tokenizer.is_the_same_in_parts else "in their place",
        "where the file proves it" if tokenizer.quicken() else "no",
        "yes" if lossless else "all but a blank at its begin" if nearly else "no",
    ]


@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"add_prefix_space": False}], ids=str)
@pytest.mark.parametrize("model", ["llama", "mistral", None])
@pytest.mark.parametrize("name", ["prepend", "metaspace"])
def test_the_class_of_llama_splits_in_its_own_way(
    name: str, model: str | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever tokenizer.json says, but for models whose files are read as they are. Behind a special token
    and before a blank it shows. A run and an import keep it."""
    folder = saved(name, tmp_path / "published")
    write(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", **settings)
    if model is not None:
        write(folder, "config.json", model_type=model)
    ours, theirs = opened(folder), reference(folder)
    assert (type(theirs).__name__ == "LlamaTokenizer") is (model != "mistral")
    ours.taught(True, None).save(tmp_path / "run")
    for tokenizer in (ours, opened(tmp_path / "run")):
        for text in [*TEXTS, "<s>the cat</s> sat", "</s>a", "<s> a"]:
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.encode_rendered([text])[0][0].tolist() == ids, text
            assert tokenizer.decode(ids) == theirs.decode(ids) or {1, 2} & {*ids}
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


MARKED = """\
{{ bos_token }}{% for message in messages %}{{ message.role + ': ' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}{{ '\\n' }}{% endfor %}"""


@pytest.mark.parametrize("kind", [None, "LlamaTokenizer"])
@pytest.mark.parametrize("name", KINDS)
def test_chats_are_those_of_transformers(name: str, kind: str | None, tmp_path: Path) -> None:
    """Ids, what is learned of them, and what ends a turn: behind special tokens, and behind text."""
    folder = saved(name, tmp_path / name, chat_template=MARKED)
    if kind is not None and name in ("prepend", "metaspace"):
        write(folder, "tokenizer_config.json", tokenizer_class=kind)
    ours, theirs = opened(folder), reference(folder)
    texts = ["the cat sat", "on a mat, 北京 größer", " and", "hello 😀 to dogs "]
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    expected = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (found,) = Encoder(ours)([chat_in({"messages": messages}, "here")])
    assert found.ids.tolist() == expected["input_ids"]
    assert found.mask.tolist() == expected["assistant_masks"] and found.mask.any()
    assert ours.ends == {theirs.eos_token_id}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("template", [None, CHATML])
def test_the_template_is_kept_with_its_tokens(template: str | None, mixed: bool, tmp_path: Path) -> None:
    """Also ours, for a tokenizer that names no BOS, and where the token that begins texts is another now."""
    folder = saved("byte_level", tmp_path / "published", chat_template=template)
    if template is not None:
        write(folder, "tokenizer_config.json", bos_token="the")
    chats, texts = tmp_path / "chats.jsonl", tmp_path / "texts.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    chats.write_text("".join(json.dumps(row).replace('"a"', f'"a {n}"') + "\n" for n in range(30)))
    texts.write_text("".join(json.dumps({"text": f"the cat {n}"}) + "\n" for n in range(30)))
    built(tmp_path / "out", chats, *([texts] if mixed else []), tokenizer=str(folder))
    verify(tmp_path / "out", 1 + mixed)
    kept = opened(tmp_path / "out" / "tokenizer")
    assert kept.chats is not None and {"bos_token", "eos_token"} <= {*kept.chats.variables}
    assert kept.begins == ((kept.eos_id,) if mixed else ())
    (found,) = Encoder(kept)([chat_in(row, "here")])
    expected = "<|endoftext|>user\na<|endoftext|>" if template is None else "<|im_start|>user\na<|im_end|>"
    begin = kept.encode_rendered([expected])[0][0].tolist()
    assert found.ids[: len(begin)].tolist() == begin


@pytest.mark.parametrize("unnamed", [(), ("bos_token",), ("eos_token",), ("bos_token", "eos_token")])
@pytest.mark.parametrize("texts", [True, False])
def test_what_was_taught_is_the_same_when_it_is_read_again(
    folder: Path, unnamed: tuple[str, ...], texts: bool, tmp_path: Path
) -> None:
    """Twice, whatever the files name, with a template of ours or none; and in what is exported."""
    shutil.copytree(folder, tmp_path / "published")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in unnamed}
    (tmp_path / "published" / "tokenizer_config.json").write_text(json.dumps(kept))
    if folder.name == "word_piece" and "eos_token" in unnamed:
        (tmp_path / "published" / "config.json").write_text('{"eos_token_id": 3}')
    first = opened(tmp_path / "published")
    for chats in (first.chats, chats_of(first)):
        taught = first.taught(texts, chats)
        expected = told(taught)
        for name in ("run", "again"):
            taught.save(tmp_path / name)
            taught = opened(tmp_path / name)
            assert told(taught) == expected
            shutil.rmtree(tmp_path / name)
        out = tmp_path / "out"
        out.mkdir()
        for name, text in taught.files().items():
            (out / name).write_text(text)
        exported = opened(out)
        assert (exported.begins, exported.eos_id) == (taught.begins, taught.eos_id)
        assert exported.prefix_id == taught.prefix_id
        shutil.rmtree(out)


def told(tokenizer: JsonTokenizer) -> list[Any]:
    names = ("fingerprint", "begins", "begin_id", "eos_id", "prefix_id", "ends", "vocab_size", "chats")
    return [getattr(tokenizer, name) for name in names]


@pytest.mark.parametrize("name", KINDS)
def test_texts_make_no_special_token(name: str, tmp_path: Path) -> None:
    """Unigram has them among its pieces, and would choose them. Other texts are as in `transformers`."""
    ours, theirs = opened(saved(name, tmp_path / name)), reference(tmp_path / name)
    special = {index for token, index in ours.special_tokens.items() if token != "[UNK]"}
    for token in ours.special_tokens:
        for text in (token, f"the{token}cat", f"a {token} b"):
            assert not special & {*ours.encode(text)}, text
    for text in texts(50, seed=5):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
