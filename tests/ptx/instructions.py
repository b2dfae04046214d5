"""The decoder: from an instruction to the step that executes it."""

from collections.abc import Callable

from ptx import access, asynchronous, convert, floats, integers, tensor_cores, warp, wgmma
from ptx.faults import UnknownInstruction
from ptx.parse import Instruction
from ptx.values import Step, guarded

Maker = Callable[[Instruction], Step]


def _by_type(of_floats: Maker, of_integers: Maker) -> Maker:
    """Return the decoder that goes by the last type: floats end in f16, f32, bf16, f64 or x2."""

    def make(instruction: Instruction) -> Step:
        return (of_floats if "f" in instruction.parts[-1] else of_integers)(instruction)

    return make


def _nothing(instruction: Instruction) -> Step:
    """fence, membar, wgmma.fence: they order accesses; here no access is ever late."""
    return lambda cta, mask: None


def _cp(instruction: Instruction) -> Step:
    makers: dict[str, Maker] = {
        "commit_group": asynchronous.commit,
        "wait_group": asynchronous.wait,
        "wait_all": asynchronous.wait,
        "ca": asynchronous.copy_async,
        "cg": asynchronous.copy_async,
    }
    kind = instruction.parts[2] if instruction.parts[1] == "async" else ""
    if kind not in makers:
        raise UnknownInstruction(instruction.text)
    return makers[kind](instruction)


def _wgmma(instruction: Instruction) -> Step:
    makers: dict[str, Maker] = {
        "mma_async": wgmma.Product,
        "commit_group": wgmma.commit,
        "wait_group": wgmma.wait,
        "fence": _nothing,
    }
    if instruction.parts[1] not in makers:
        raise UnknownInstruction(instruction.text)
    return makers[instruction.parts[1]](instruction)


def _bar(instruction: Instruction) -> Step:
    if instruction.parts[1] != "warp":
        raise UnknownInstruction(instruction.text)
    return warp.synchronise(instruction)


MAKERS: dict[str, Maker] = {
    "abs": _by_type(floats.sign, integers.absolute),
    "add": _by_type(floats.arithmetic, integers.add_sub),
    "and": integers.logic,
    "atom": access.atomic,
    "bar": _bar,
    "bfe": integers.extract_bits,
    "cp": _cp,
    "cvt": convert.convert,
    "div": _by_type(floats.arithmetic, integers.div_rem),
    "ex2": floats.function,
    "fence": _nothing,
    "fma": floats.arithmetic,
    "ld": access.load,
    "ldmatrix": tensor_cores.load_matrix,
    "lg2": floats.function,
    "mad": integers.mad,
    "max": _by_type(floats.min_max, integers.min_max),
    "membar": _nothing,
    "min": _by_type(floats.min_max, integers.min_max),
    "mma": tensor_cores.mma,
    "mov": convert.move,
    "mul": _by_type(floats.arithmetic, integers.mul),
    "neg": _by_type(floats.sign, integers.negate),
    "not": integers.logic,
    "or": integers.logic,
    "popc": integers.count_bits,
    "prmt": integers.permute_bytes,
    "rcp": floats.function,
    "redux": warp.reduce,
    "rem": integers.div_rem,
    "rsqrt": floats.function,
    "selp": integers.select,
    "setp": integers.set_predicate,
    "shfl": warp.shuffle,
    "shl": integers.shift,
    "shr": integers.shift,
    "sqrt": floats.function,
    "st": access.store,
    "stmatrix": tensor_cores.store_matrix,
    "sub": _by_type(floats.arithmetic, integers.add_sub),
    "tanh": floats.function,
    "vote": warp.vote,
    "wgmma": _wgmma,
    "xor": integers.logic,
}
"""The decoders by the first word of the opcode."""


def decode(instruction: Instruction) -> Step:
    """Return the step of an instruction; raise UnknownInstruction with its text."""
    maker = MAKERS.get(instruction.parts[0])
    if maker is None:
        raise UnknownInstruction(f"unknown PTX instruction: {instruction.text}")
    try:
        return guarded(instruction, maker(instruction))
    except (UnknownInstruction, KeyError, ValueError, IndexError) as error:
        raise UnknownInstruction(
            f"unknown PTX instruction: {instruction.text} ({error})"
        ) from error
