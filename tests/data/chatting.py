"""Chat templates of several families, in words of our own, and tokenizers that go with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.chats import Chat, chat_in
from colossus.data.corpus import Document
from colossus.data.documents import Encoded, Encoder
from colossus.data.json_tokenizer import JsonTokenizer

# ChatML: https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHATML_MARKED = """\
{% for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{ message.content + '<|im_end|>\\n' }}{% endgeneration %}
  {%- else %}
    {{- message.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
"""
LLAMA3 = """\
{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now("%Y") %}{% endif %}
{% for message in messages %}
    {% if message.content is not string %}{% continue %}{% endif %}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim }}<|eot_id|>
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
MISTRAL = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate: user, assistant, user, ...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# As Qwen3: of the thoughts only those behind the last question stay, so that no prefix is stable.
_QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        GENERATION
        {%- if loop.index0 > ns.last %}
            {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}{{ '\\n' + call | tojson }}{% endfor %}
        {{- '<|im_end|>' }}
        END
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
QWEN3 = _QWEN3.replace("GENERATION", "{%- generation %}").replace("END", "{%- endgeneration %}")
QWEN3_UNMARKED = _QWEN3.replace("GENERATION", "").replace("END", "")

TEXTS = ["Hello there, who are you?\n\nI am a helpful assistant. user system tool", "Grüße 北京 2 + 2 = 4"]


@dataclass(frozen=True)
class Family:
    """A tokenizer with its template. bos, eos: None where it has none."""

    template: str
    bos: str | None
    eos: str
    tokenizer: tokenizers.Tokenizer

    def reference(self, template: str | None = None) -> Any:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer,
            bos_token=self.bos,
            eos_token=self.eos,
            chat_template=template or self.template,
        )

    def save(self, folder: Path, template: str | None = None) -> Path:
        """As `transformers` saves it."""
        self.reference(template).save_pretrained(folder)
        return folder


def byte_level(special: list[str], plain: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


def metaspace(special: list[str]) -> tokenizers.Tokenizer:
    """As from SentencePiece: blanks are ▁, and what it does not know is spelled in bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *fallback], show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(special)]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def families() -> dict[str, Family]:
    chatml = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], plain=("<think>", "</think>"))
    headers = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    llama = byte_level(headers)
    begin = processors.TemplateProcessing(
        single=f"{headers[0]} $A", special_tokens=[(headers[0], llama.token_to_id(headers[0]))]
    )
    llama.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    llama.enable_truncation(4)  # as some files leave it on
    mistral = metaspace(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    return {
        "chatml": Family(CHATML, None, "<|im_end|>", chatml),
        "chatml-marked": Family(CHATML_MARKED, None, "<|im_end|>", chatml),
        "llama3": Family(LLAMA3, "<|begin_of_text|>", "<|eot_id|>", llama),
        "mistral": Family(MISTRAL, "<s>", "</s>", mistral),
        "qwen3": Family(QWEN3, None, "<|im_end|>", chatml),
    }


def say(*contents: Any, first: str = "user") -> list[dict[str, Any]]:
    """A conversation in turns."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def encode(tokenizer: JsonTokenizer | BytesTokenizer, *documents: Document) -> list[Encoded]:
    return list(Encoder(tokenizer)(documents))


def chat(messages: Any, **rest: Any) -> Chat:
    return chat_in({"messages": messages} | rest, "here")


def write(path: Path, *records: Any) -> Path:
    """Records as JSON lines."""
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path
