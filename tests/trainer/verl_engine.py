"""Stand in for the rollout engine of verl: transformers on a CPU.

The engine needs a GPU; this one has verl's interfaces. ``VERL_USE_EXTERNAL_MODULES`` loads it in every process.
Everything else of a run is verl's own: agent loops, load balancer, rewards, TransferQueue, actor workers, and the
transfer of weights to this engine before each step. verl's platform plug-in tells the actor workers to compute on the
CPU.

vLLM and SGLang are not run, here or elsewhere. ``Witness`` keeps the facts that the trace must agree with.
"""

import asyncio
import functools

import ray
import torch
import transfer_queue as tq
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoModelForCausalLM
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers import engine_workers
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from entrace.trainer.live.verl import Traced

NAME = "entrace_cpu"


@ray.remote
class Server:
    """Sample one response at a time with the weights that the actor sent last."""

    def __init__(self, path: str, limit: int) -> None:
        torch.set_num_threads(1)
        self.limit = limit
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.ends = self.model.generation_config.eos_token_id
        self.ends = self.ends if isinstance(self.ends, list) else [self.ends]
        self.global_steps = None
        self.generator = torch.Generator().manual_seed(0)

    def load(self, weights: dict, global_steps: int) -> None:
        self.model.load_state_dict(weights, strict=False)
        self.global_steps = global_steps

    @torch.no_grad()
    def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs) -> TokenOutput:
        temperature = sampling_params.get("temperature", 1.0)
        ids, found, past = list(prompt_ids), [], None
        entries = torch.tensor([ids])
        while len(found) < self.limit:
            output = self.model(entries, past_key_values=past, use_cache=True)
            past = output.past_key_values
            logp = (output.logits[0, -1] / (temperature or 1)).log_softmax(-1)
            drawn = torch.multinomial(logp.exp(), 1, generator=self.generator)
            token = int(drawn if temperature else logp.argmax())
            found.append((token, logp[token].item()))
            if token in self.ends:
                break
            entries = torch.tensor([[token]])
        return TokenOutput(
            token_ids=[token for token, _ in found],
            log_probs=[value for _, value in found] if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    def idle(self, **kwargs) -> None:
        """Free nothing: the CPU holds actor and engine at once."""

    sleep = wake_up = abort_all_requests = resume_generation = clear_kv_cache = release_kv_cache = resume_kv_cache = (
        idle
    )


class Replica(RolloutReplica):
    """Start the server."""

    async def launch_servers(self) -> None:
        name = f"entrace_cpu_{self.replica_rank}"
        server = Server.options(name=name, num_cpus=0).remote(self.model_config.path, self.config.response_length)
        await server.sleep.remote()
        self.servers = [server]
        self._server_handle, self._server_address = server, name


class Adapter(BaseRollout):
    """Send the weights of the actor to the server."""

    async def resume(self, tags) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(self, weights, global_steps=None, **kwargs) -> None:
        tensors = {name: value.detach().cpu().float().clone() for name, value in weights}
        await asyncio.wrap_future(ray.get_actor("entrace_cpu_0").load.remote(tensors, global_steps).future())


RolloutReplicaRegistry.register(NAME, lambda: Replica)
base._ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.Adapter"


class _Memory:
    """Extend ``torch.cpu`` with the functions of ``torch.cuda`` that verl calls.

    A CPU has no use for them.
    """

    def __getattr__(self, name: str):
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return False

    def empty_cache(self) -> None:
        pass

    def max_memory_allocated(self) -> int:
        return 0

    max_memory_reserved = memory_allocated = memory_reserved = max_memory_allocated

    def get_device_name(self) -> str:
        return "CPU"

    def mem_get_info(self) -> tuple[int, int]:
        return 0, 0

    def get_rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


class PlatformCPU(PlatformCUDA):
    """Tell verl's actor workers to compute on the CPU, over gloo."""

    device_name = vendor_name = "cpu"
    device_module = _Memory()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def set_device(self, device_index) -> None:
        pass

    def synchronize(self, device_index=None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def set_allocator_settings(self, settings) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"

    def is_ipc_supported(self) -> bool:
        return False


set_platform(PlatformCPU())
EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(
    transformer_impl.FSDPEngineWithLMHead
)
# verl names the CPU twice, as host and as accelerator.
engine_workers.initialize_global_process_group_ray = functools.partial(
    engine_workers.initialize_global_process_group_ray, backend="gloo"
)
# The reference policy is offloaded to memory that only a driver of an accelerator can pin.
transformer_impl.CPUOffloadPolicy = lambda **_: CPUOffloadPolicy(pin_memory=False)

FIELDS = [
    "prompts",
    "responses",
    "response_mask",
    "rm_scores",
    "rollout_log_probs",
    "old_log_probs",
    "ref_log_prob",
    "log_probs",
    "entropy",
    "advantages",
]


def read_fields(batch) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of every row by key and field."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=FIELDS)
    rows = {name: data[name].unbind(0) for name in FIELDS if name in data}
    return {key: {name: row[i].clone() for name, row in rows.items()} for i, key in enumerate(batch.keys)}


class Keeper(PPOTrainerSync):
    """Save the rows of TransferQueue as verl leaves them, and at the step's end."""

    def _compute_advantage(self, batch, metrics):
        if not hasattr(self, "kept"):
            self.kept = {"verl": {}, "updated": {}, "tags": {}}
        batch = super()._compute_advantage(batch, metrics)
        self.kept["verl"] |= read_fields(batch)
        self.kept["tags"] |= dict(zip(batch.keys, batch.tags, strict=True))
        return batch

    def _update_actor(self, batch, metrics):
        batch = super()._update_actor(batch, metrics)
        self.kept["updated"] |= read_fields(batch)
        return batch

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        torch.save(self.kept | {"end": read_fields(batch), "metrics": dict(metrics)}, f"witness-{global_steps}.pt")
        del self.kept
        return super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)


@register_trainer("entrace_witness")
class Witness(Traced, Keeper):
    """Trace a user's own trainer."""
