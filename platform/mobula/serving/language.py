"""Causal language models of Hugging Face's format, from safetensors and without any code of theirs.

Needs the extra `lm` (transformers).  One request at a time and replica: for many users of a large model, Ray Serve LLM with vLLM
speaks the same wire format.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mobula.errors import ArtifactError, ConfigError, DataError
from mobula.serving.schemas import Finish, Message
from mobula.serving.services import Kind, Piece, Sampling, Token, save_service

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
"""What a folder of Hugging Face's is read from, beside *.safetensors: nothing that can be run or unpickled."""


def save_language_model(
    path: str | Path, model_folder: str | Path, *, dtype: str = "auto", description: str = ""
) -> Path:
    """The artefact of the model in `model_folder` (as `save_pretrained` wrote it).  Raises ArtifactError where files are missing."""
    source = Path(model_folder)
    files: dict[str, bytes | Path] = {name: source / name for name in FILES if (source / name).is_file()}
    weights = sorted(source.glob("*.safetensors"))
    for needed, there in (
        ("config.json", "config.json" in files),
        ("tokenizer.json", "tokenizer.json" in files),
        ("*.safetensors", bool(weights)),
    ):
        if not there:
            raise ArtifactError(
                f"{source} has no {needed}: save the model with `save_pretrained` of transformers, its tokenizer too"
            )
    files |= {file.name: file for file in weights}
    return save_service(path, "causal_lm", {"dtype": dtype}, files, description)


class CausalLM:
    """A causal language model: draws token by token, keeping keys and values."""

    kind: ClassVar[Kind] = "language_model"

    def __init__(self, model: Any, tokenizer: Any, device: str) -> None:
        self.model, self.tokenizer, self.device = model.to(device).eval(), tokenizer, device
        self.context = int(getattr(model.config, "max_position_embeddings", 0)) or 2048
        ends = model.generation_config.eos_token_id
        if ends is None:
            ends = tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        # A model's cache of one request is no business of another's.
        self._turn = threading.Lock()

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any], device: str) -> CausalLM:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ConfigError(
                f"language models need the extra: pip install 'mobula[lm]' ({error.name} is missing)"
            ) from None
        dtype = settings.get("dtype", "auto")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ArtifactError(
                f"{folder}: dtype is {dtype!r}; auto, float32, bfloat16 or float16 is expected"
            )
        safe = {"local_files_only": True, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=dtype, **safe)
        return cls(model, AutoTokenizer.from_pretrained(folder, **safe), device)

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                "messages: this model has no form for conversations (no chat template); ask /v1/completions"
            )
        plain = [{"role": message.role, "content": message.text} for message in messages]
        try:
            prompt: str = self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            # A template refuses what it has no form for by an error of its own.
            raise DataError(f"messages: the model's chat template refuses them: {error}") from None
        return prompt

    def generate(self, prompt: str, sampling: Sampling) -> Iterator[Piece]:
        tokens = self.tokenizer.encode(prompt) or [self._begin()]
        room = self.context - len(tokens)
        if room < 1:
            raise DataError(f"prompt: {len(tokens)} tokens; the model's context holds {self.context}")
        wanted = room if sampling.max_tokens is None else sampling.max_tokens
        if wanted > room:
            if sampling.max_tokens is not None and sampling.max_tokens > self.context:
                raise DataError(
                    f"max_tokens: {wanted} more than {len(tokens)} do not fit the model's context of {self.context}"
                )
            wanted = room
        with self._turn:
            yield from self._generate(tokens, wanted, sampling)

    def _begin(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise DataError("prompt: it is empty, and this model has no token to begin with")

    @torch.no_grad()
    def _generate(self, prompt: list[int], most: int, sampling: Sampling) -> Iterator[Piece]:
        generator = torch.Generator()
        if sampling.seed is not None:
            generator.manual_seed(sampling.seed % 2**63)
        else:
            generator.seed()
        past: Any = None
        given = torch.tensor([prompt], device=self.device)
        drawn: list[int] = []
        sent, waiting = 0, []
        held = max((len(stop) for stop in sampling.stop), default=1) - 1
        while True:
            out = self.model(input_ids=given, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits = out.logits[0, -1].float().cpu()
            choice = draw_token(logits, sampling, generator)
            ended = choice in self.ends
            if not ended:
                drawn.append(choice)
                waiting.append(self._token(choice, logits, sampling))
            text = self.tokenizer.decode(drawn, skip_special_tokens=True)
            cut = min((at for stop in sampling.stop if (at := text.find(stop)) >= 0), default=-1)
            finish: Finish | None = "stop" if ended or cut >= 0 else "length" if len(drawn) >= most else None
            if cut >= 0:
                text = text[:cut]
            # Half a character, or what may become a stop text, waits for the next token.
            ready = len(text) if finish else len(text.rstrip("\N{REPLACEMENT CHARACTER}")) - held
            if finish is not None:
                yield Piece(
                    text[sent:],
                    tuple(waiting),
                    finish,
                    len(prompt),
                    len(drawn),
                )
                return
            if ready > sent:
                yield Piece(text[sent:ready], tuple(waiting))
                sent, waiting = ready, []
            given = torch.tensor([[choice]], device=self.device)

    def _token(self, choice: int, logits: Tensor, sampling: Sampling) -> Token:
        if sampling.top_logprobs is None:
            return Token(self.tokenizer.decode([choice]), 0.0)
        logp = logits.log_softmax(-1)
        best = logp.topk(min(sampling.top_logprobs, logp.numel()))
        return Token(
            self.tokenizer.decode([choice]),
            float(logp[choice]),
            tuple(
                (self.tokenizer.decode([int(index)]), float(value))
                for value, index in zip(best.values, best.indices, strict=True)
            ),
        )


def draw_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token of logits [V]: the most likely one at temperature 0, else drawn from the nucleus of mass `top_p` (Holtzman et al. 2020)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, index = p.sort(descending=True)
        # The smallest set whose mass reaches top_p: a token stays if what comes before it does not.
        kept = ordered.cumsum(-1) - ordered < sampling.top_p
        p = torch.zeros_like(p).scatter(0, index, ordered * kept)
    return int(torch.multinomial(p, 1, generator=generator))
