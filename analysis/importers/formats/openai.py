"""Read responses of OpenAI-compatible servers, such as vLLM.

Responses are chat completions or completions with ``logprobs``. A row is a response, a line of a batch's output file,
or an object with ``request`` and ``response``. Keys beside these, such as ``step``, ``reward``, or ``group``, are read
like those of rows. vLLM adds ``token_ids`` and ``prompt_token_ids`` with ``return_token_ids``. A server reports top-k
logprobs at most, so that entropies are unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from entrace.analysis.importers.formats.base import Format, Row, stateless
from entrace.analysis.importers.row_files import BadRowError, kind_of
from entrace.analysis.trace.vocabulary import show_bytes

# Text of a token with return_tokens_as_token_ids.
ID_MARK = "token_id:"
# OpenAI's logprob of a token that is very unlikely.
VERY_UNLIKELY = -9999.0
ANSWERS = (
    "choices",
    "response",
    "request",
    "body",
    "custom_id",
    "id",
    "object",
    "created",
    "model",
    "usage",
    "messages",
)


def _is_row(row: Mapping[str, Any], path: Path) -> bool:
    del path
    return isinstance(_answer_of(row).get("choices"), list)


def _answer_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the response that a row is or holds."""
    answer = row.get("response", row)
    answer = answer.get("body", answer) if isinstance(answer, Mapping) else row
    return answer if isinstance(answer, Mapping) else {}


def _convert(row: Row, path: Path) -> Iterable[Row]:
    del path
    answer = _answer_of(row)
    choices = answer.get("choices")
    if not isinstance(choices, list):
        raise BadRowError(f'"choices" is {kind_of(choices)}, expected a list')
    request = row.get("request", row)
    request = request.get("body", request) if isinstance(request, Mapping) else {}
    others: Row = {key: value for key, value in row.items() if key not in ANSWERS and key not in answer}
    name = str(row.get("custom_id") or answer.get("id") or row.get("id") or "")
    prompt = request.get("messages") or request.get("prompt")
    prompt = prompt if isinstance(prompt, list | str) else None
    if "temperature" in request:
        others["temperature"] = request["temperature"]
    for place, choice in enumerate(choices):
        index = choice.get("index", place)
        found = {**others, **_tokens_of(choice), "finish_reason": choice.get("finish_reason")}
        found["id"] = f"{name}/{index}" if len(choices) > 1 else name
        prompt_ids = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
        if prompt is None and not prompt_ids and not {"group", "uid"} & found.keys():
            # The choices of one response share its prompt, whatever it is.
            found["group"] = name
        yield {**found, "prompt": prompt, "prompt_ids": prompt_ids}


def _tokens_of(choice: Mapping[str, Any]) -> Row:
    """Return text, tokens, and logprobs of a choice."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        ids = choice.get("token_ids")
        if not ids:
            raise BadRowError('no "logprobs"; ask the server for them with "logprobs": true')
        return {"response": text, "response_ids": ids}
    if isinstance(logprobs.get("content"), list):
        entries = logprobs["content"]
        texts, values = [_text_of(entry) for entry in entries], [entry.get("logprob") for entry in entries]
    else:
        texts, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    if not texts:
        raise BadRowError('"logprobs" holds no tokens; ask the server for the logprobs of sampled tokens')
    found: Row = {"response": text, "sampling_logprob": [None if v == VERY_UNLIKELY else v for v in values]}
    ids = choice.get("token_ids")
    if not ids and all(token.startswith(ID_MARK) and token[len(ID_MARK) :].isdecimal() for token in texts):
        ids, texts = [int(token.removeprefix(ID_MARK)) for token in texts], []
    if ids and texts and len(ids) != len(texts):
        raise BadRowError(f'"token_ids" has {len(ids)} entries, "logprobs" has {len(texts)}')
    if ids:
        found["response_ids"] = ids
    if texts and not any(token.startswith(ID_MARK) for token in texts):
        found["token_texts"] = texts
    return found


def _text_of(entry: Mapping[str, Any]) -> str:
    """Return the text of a token; bytes of an incomplete character are shown as such."""
    data = entry.get("bytes")
    text = str(entry.get("token"))
    return show_bytes(bytes(data)) if isinstance(data, list) and data and not text.startswith(ID_MARK) else text


FORMAT = Format(
    "openai",
    "responses of an OpenAI-compatible server",
    ("*.jsonl",),
    _is_row,
    stateless(_convert),
    needed={"response": "text"},
)
