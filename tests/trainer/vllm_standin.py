"""Stand in for the part of vLLM's API that the trainer uses.

Names, defaults, and results are vLLM's. It follows ``vllm.LLM``, ``vllm.SamplingParams``, and ``vllm.outputs`` of vLLM
0.11 to 0.26, and samples with transformers on a CPU. Like vLLM, it rejects unknown arguments.
"""

import copy
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LLMS = []


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


class _Model(torch.nn.Module):
    """Load weights as a vLLM model does, in any number of calls.

    Weights have the names of the checkpoint.
    """

    def __init__(self, config):
        super().__init__()
        self.inner = AutoModelForCausalLM.from_config(config)

    def load_weights(self, weights):
        own = dict(self.inner.named_parameters())
        loaded = set()
        for name, weight in weights:
            own[name].data.copy_(weight)
            loaded.add(name)
        return loaded


class LLM:
    def __init__(
        self,
        model: str,
        *,
        load_format: str = "auto",
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        logprobs_mode: str = "raw_logprobs",
    ):
        assert (load_format, logprobs_mode) == ("dummy", "processed_logprobs")
        assert 0 < gpu_memory_utilization < 1
        torch.manual_seed(0)
        self.model = _Model(AutoConfig.from_pretrained(model)).to(getattr(torch, dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.calls = []
        LLMS.append(self)

    def apply_model(self, func):
        self.calls.append("apply_model")
        return [func(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return True

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        self.calls.append("generate")
        assert len(prompts) == len(sampling_params)
        found = []
        for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            ids = prompt["prompt_token_ids"]
            outputs = [self._complete(ids, params, index) for index in range(params.n)]
            found.append(RequestOutput(str(i), None, ids, outputs))
        return found

    def _complete(self, prompt, params, index):
        # Responses to one prompt have consecutive seeds.
        generator = torch.Generator().manual_seed(params.seed + index)
        ids, logprobs, finish_reason, stop_reason = [], [], "length", None
        text = ""
        ends = {*(params.stop_token_ids or [])} | ({self.tokenizer.eos_token_id} - ({None} | {-1}))
        if params.ignore_eos:
            ends = {*(params.stop_token_ids or [])}
        while len(ids) < params.max_tokens:
            logits = self.model.inner(torch.tensor([prompt + ids])).logits[0, -1].float() / params.temperature
            if params.top_k > 0:
                logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
            if params.top_p < 1:
                ordered, order = logits.sort()
                logits[order[ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p][:-1]] = -torch.inf
            logp = logits.log_softmax(-1)
            token = int(torch.multinomial(logp.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append({token: Logprob(float(logp[token]), 1, self.tokenizer.decode([token]))})
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if token in ends:
                finish_reason = "stop"
                break
            if matched := next((s for s in params.stop or [] if s in text), None):
                finish_reason, stop_reason = "stop", matched
                text = text[: text.index(matched)]
                break
        total = sum(entry[token].logprob for entry, token in zip(logprobs, ids, strict=True))
        reported = copy.deepcopy(logprobs) if params.logprobs is not None else None
        return CompletionOutput(index, text, ids, total, reported, finish_reason, stop_reason)
