"""Compile the decoding kernels for an H100, without a GPU; print their names."""

import inspect

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from entrace.trainer.kernels import decoding_triton
from entrace.trainer.kernels.decoding import tile_size

WHOLE = ("slots", "tiles", "prompts", "prompt_lengths", "lengths", "limits", "stop_ids", "tokens", "ids")
HALF = ("qkv", "prompt_keys", "prompt_values", "own_keys", "own_values", "logits")
SINGLE = ("cos", "sin", "sums", "norms", "uniforms", "stats")
TYPES = {
    **dict.fromkeys(WHOLE, "*i64"),
    **dict.fromkeys(HALF, "*bf16"),
    **dict.fromkeys(SINGLE, "*fp32"),
    **dict.fromkeys(("is_open", "has_stopped"), "*i8"),
    **dict.fromkeys(("scale", "factor"), "fp32"),
}


def compile_kernel(kernel, out, constants):
    """Compile a kernel for arguments by name; all other arguments are numbers."""
    names = list(inspect.signature(kernel.fn).parameters)
    types = {name: "constexpr" if name in constants else {**TYPES, "out": out}.get(name, "i32") for name in names}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()})
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
    print(kernel.fn.__name__)


if __name__ == "__main__":
    sizes = {"HEADS": 2, "GROUP": 7, "WIDTH": 64, "TILE": tile_size(7), "ROWS": 16, "COLUMNS": 64, "KEYS": 64}
    compile_kernel(decoding_triton._attend, "*bf16", {**sizes, "PRECISION": "tf32"})
    compile_kernel(decoding_triton._sums, "*fp32", {"BLOCK": 4096})
    compile_kernel(decoding_triton._draw, "*fp32", {"BLOCK": 4096, "BLOCKS": 64, "STOPS": 2})
