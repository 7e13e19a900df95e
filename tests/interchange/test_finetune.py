"""A published model, tuned on chats, published again: what a user does with all of it, end to end."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

import colossus

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = {"sky": "blue", "grass": "green", "snow": "white", "night": "black"}


def published(folder: Path) -> None:
    """A small Llama as its publisher would have saved it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["user assistant what colour is the sky grass snow night"] * 9, trainer)
    fast = Fast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=304, num_key_value_heads=2, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def chats(path: Path) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(400):
            thing = draw.choice(sorted(ANSWERS))
            said = [("user", f"what colour is the {thing}?"), ("assistant", ANSWERS[thing])]
            messages = [{"role": role, "content": content} for role, content in said]
            file.write(json.dumps({"messages": messages}) + "\n")


def test_a_published_model_is_tuned_on_chats_and_published_again(tmp_path: Path) -> None:
    published(tmp_path / "hub")
    chats(tmp_path / "chats.jsonl")
    imported = colossus.import_model(tmp_path / "hub", tmp_path / "imported")
    words = ["run.steps=60", "run.global_batch=8", "data.seq_len=64", "optimizer.lr=0.003"]
    words += [f"data.corpus={tmp_path / 'chats.jsonl'}", f"data.folder={tmp_path / 'data'}"]
    words += [f"model.init_from={imported}", f"run.folder={tmp_path / 'tuned'}"]
    words += ["precision.type=fp32", "layout.compile=false", "run.threads=1", "run.validate_every=0"]
    run = colossus.train(colossus.load_job(None, words))
    assert run.loss[0] > 5 > 0.2 > run.loss[59]

    out = colossus.export_model(tmp_path / "tuned", tmp_path / "out")
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert theirs.config.architectures == ["LlamaForCausalLM"]
    question = [{"role": "user", "content": "what colour is the snow?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"] if not isinstance(ids, torch.Tensor) else ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=end)
    assert tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip() == "white"

    ours, our_tokenizer = colossus.load_model(tmp_path / "tuned")
    with torch.no_grad():
        assert (ours(ids) - theirs.float()(ids).logits).abs().max() < 1e-4
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert our_tokenizer.encode_rendered([prompt])[0][0].tolist() == ids[0].tolist()
