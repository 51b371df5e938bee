"""A language model of two layers with random weights, to try the service with: python examples/tiny_model.py FOLDER.

It says nothing of sense, token by token, as a large one would be served.  Needs the extra `lm`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from mobula.serving.language import save_language_model


def tiny_model(folder: Path, template: bool = True) -> Path:
    """A Llama of two layers with random weights and one token a byte, as `save_pretrained` writes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
            "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
        )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(save_language_model(sys.argv[1], tiny_model(Path(folder)), description="random weights"))
