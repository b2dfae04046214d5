"""The operators of the C++ engine, which `gptfast.engine` calls; there is no reference for them."""

from gptfast.ops.library import define

define("engine_new(int bytes) -> Tensor")
define("engine_bytes(int[] shape) -> int")
define("engine_pack(Tensor(a!) packed, int[] shape, str name, Tensor weight) -> ()")
define(
    "engine_step(Tensor packed, int[] shape, Tensor(a!) cache, Tensor slots, int[] rows, "
    "int[] starts, int[] counts, int[] ids, int[] wanted, Tensor[] sampling, int[] positions) "
    "-> (Tensor, Tensor)"
)
