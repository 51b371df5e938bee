"""Language models: token by token as transformers itself, and in OpenAI's wire format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from mobula.errors import ArtifactError, DataError
from mobula.serving.backend import LocalBackend
from mobula.serving.gateway import create_app
from mobula.serving.language import CausalLM, draw_token, save_language_model
from mobula.serving.services import Sampling, load_service

from .conftest import tiny_model


@pytest.fixture(scope="module")
def model(artefacts: dict[str, str]) -> CausalLM:
    service, card = load_service(artefacts["tiny"])
    assert card.kind == "language_model"
    return service  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def client(artefacts: dict[str, str]) -> TestClient:
    return TestClient(create_app(LocalBackend({"tiny": artefacts["tiny"]}), None))


def text_of(model: CausalLM, prompt: str, **settings: Any) -> str:
    return "".join(piece.text for piece in model.generate(prompt, Sampling(**settings)))


# Drawing ----------------------------------------------------------------------------------------------------


def frequencies(logits: torch.Tensor, sampling: Sampling, n: int = 20_000) -> np.ndarray[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    counts = np.bincount([draw_token(logits, sampling, generator) for _ in range(n)], minlength=len(logits))
    return counts / n


def test_tokens_have_the_softmax_law() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    for temperature in (1.0, 0.5):
        wanted = (logits / temperature).softmax(-1).numpy()
        # Four standard deviations of a frequency.
        bound = 4 * np.sqrt(wanted * (1 - wanted) / 20_000)
        assert (np.abs(frequencies(logits, Sampling(temperature=temperature)) - wanted) < bound).all()


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    for top_p, kept in ((0.7, 2), (0.71, 3), (0.4, 1), (0.05, 1), (1.0, 4)):
        found = frequencies(p.log(), Sampling(top_p=top_p), 4000)
        assert (found > 0).sum() == kept, top_p
        wanted = np.where(np.arange(4) < kept, p.numpy(), 0) / p[:kept].sum().item()
        np.testing.assert_allclose(found, wanted, atol=0.04)


def test_temperature_zero_is_transformers_greedy_search(model: CausalLM) -> None:
    prompt = "the quick brown"
    given = torch.tensor([model.tokenizer.encode(prompt)])
    wanted = model.model.generate(given, max_new_tokens=30, do_sample=False)[0, given.shape[1] :]
    expected = model.tokenizer.decode(wanted, skip_special_tokens=True)
    assert text_of(model, prompt, temperature=0.0, max_tokens=30) == expected


def test_log_probabilities_are_those_of_the_whole_text(model: CausalLM) -> None:
    """The cache of keys and values changes nothing: one pass over prompt and continuation gives the same."""
    prompt = "abc"
    pieces = list(model.generate(prompt, Sampling(max_tokens=12, seed=3, top_logprobs=2)))
    tokens = [token for piece in pieces for token in piece.tokens]
    drawn = [
        model.tokenizer.convert_tokens_to_ids(model.tokenizer.tokenize(t.text))[0]
        for t in tokens
        if t.text.isascii()
    ]
    assert len(tokens) == 12 == pieces[-1].completion_tokens
    # Bytes that are no character by themselves cannot be read back from their text.
    given = model.tokenizer.encode(prompt)
    generator, ids = torch.Generator().manual_seed(3), list(given)
    for token in tokens:
        with torch.no_grad():
            logp = model.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        choice = draw_token(model.model(torch.tensor([ids])).logits[0, -1].detach(), Sampling(), generator)
        assert token.logprob == pytest.approx(float(logp[choice]), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(logp.topk(2).values.tolist(), abs=1e-4)
        ids.append(choice)
    assert set(drawn) <= set(ids)


def test_a_seed_repeats_itself(model: CausalLM) -> None:
    first = text_of(model, "x", seed=1, max_tokens=20)
    assert first == text_of(model, "x", seed=1, max_tokens=20) != text_of(model, "x", seed=2, max_tokens=20)


def test_stop_texts_end_the_text_before_them_even_across_pieces(model: CausalLM) -> None:
    whole = text_of(model, "hello", temperature=0.0, max_tokens=40)
    stop = whole[5:8]
    pieces = list(model.generate("hello", Sampling(temperature=0.0, max_tokens=40, stop=(stop, "never"))))
    assert "".join(piece.text for piece in pieces) == whole[: whole.find(stop)]
    assert pieces[-1].finish == "stop"
    assert list(model.generate("hello", Sampling(temperature=0.0, max_tokens=4)))[-1].finish == "length"


def test_prompts_that_do_not_fit(model: CausalLM) -> None:
    with pytest.raises(DataError, match="prompt: 300 tokens; the model's context holds 256"):
        text_of(model, "a" * 300)
    with pytest.raises(DataError, match="max_tokens"):
        text_of(model, "a", max_tokens=257)
    assert (
        model.context == 256
        and list(model.generate("a" * 250, Sampling(max_tokens=50)))[-1].completion_tokens <= 6
    )


def test_the_lock_is_free_after_a_client_has_gone(model: CausalLM) -> None:
    pieces = model.generate("a", Sampling(max_tokens=50))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert not model._turn.locked()


def test_models_of_other_formats_are_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="safetensors"):
        save_language_model(tmp_path / "artefact", folder)


# The wire ---------------------------------------------------------------------------------------------------


def test_a_chat(client: TestClient, model: CausalLM) -> None:
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0,
        "max_tokens": 8,
    }
    found = client.post("/v1/chat/completions", json=asked).json()
    prompt = "user: hi\nassistant: "
    assert found["object"] == "chat.completion" and found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": text_of(model, prompt, temperature=0.0, max_tokens=8),
    }
    assert found["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 8,
        "total_tokens": len(prompt) + 8,
    }
    parts = {**asked, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    assert (
        client.post("/v1/chat/completions", json=parts).json()["choices"][0]["message"] == choice["message"]
    )


def events(client: TestClient, path: str, body: Any) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_streamed_chat_says_the_same(client: TestClient) -> None:
    asked = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "n": 2,
        "seed": 4,
        "max_completion_tokens": 12,
        "logprobs": True,
        "top_logprobs": 1,
    }
    whole = client.post("/v1/chat/completions", json=asked).json()
    chunks = events(client, "/v1/chat/completions", {**asked, "stream_options": {"include_usage": True}})
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]
    for choice in whole["choices"]:
        mine = [
            c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == choice["index"]
        ]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        tokens = [token for c in mine for token in c.get("logprobs", {}).get("content", [])]
        assert tokens == choice["logprobs"]["content"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_plain_completions(client: TestClient, model: CausalLM) -> None:
    asked = {
        "model": "tiny",
        "prompt": ["ab", "cd"],
        "temperature": 0,
        "max_tokens": 6,
        "echo": True,
        "logprobs": 1,
    }
    whole = client.post("/v1/completions", json=asked).json()
    for choice, prompt in zip(whole["choices"], ("ab", "cd"), strict=True):
        assert choice["text"] == prompt + text_of(model, prompt, temperature=0.0, max_tokens=6)
        assert choice["logprobs"]["text_offset"][0] == 2 and len(choice["logprobs"]["tokens"]) == 6
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
    chunks = events(client, "/v1/completions", {**asked, "stream_options": {"include_usage": True}})
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == whole["choices"][index]["text"]
    assert chunks[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0"),
        ("chat/completions", {"messages": [{"role": "developer", "content": "x"}]}, "messages"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "temperature": 3},
            "temperature",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": []}, "tools"),
        ("completions", {"prompt": "a" * 300}, "prompt"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "a", "max_tokens": 300}, "max_tokens"),
        ("completions", {"prompt": "a", "stop": ""}, ""),
        ("completions", {}, "prompt"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, path: str, body: Any, param: str, stream: bool) -> None:
    response = client.post(f"/v1/{path}", json={"model": "tiny", "stream": stream, **body})
    assert response.status_code == 422
    assert (response.json()["error"]["param"] or "") == param


def test_models_that_are_not_there(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"model": "big", "prompt": "a"})
    assert response.status_code == 404 and response.json()["error"]["param"] == "model"


def test_a_model_without_a_template_takes_no_conversations(tmp_path: Path) -> None:
    path = save_language_model(tmp_path / "artefact", tiny_model(tmp_path / "hf", template=False))
    client = TestClient(create_app(LocalBackend({"plain": str(path)}), None))
    body = {"model": "plain", "messages": [{"role": "user", "content": "x"}]}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 422 and "chat template" in response.json()["error"]["message"]
    assert client.post("/v1/completions", json={"model": "plain", "prompt": "x"}).status_code == 200
