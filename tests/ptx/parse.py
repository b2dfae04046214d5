"""PTX text to instructions with resolved operands.

The manual's chapters "Syntax" (comments, labels, constants), "State Spaces, Types, and Variables"
(.reg, with scopes and parameterised names) and "Kernel and Function Directives" (.entry, .func).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ptx.faults import UnknownInstruction


@dataclass(frozen=True)
class Register:
    """A variable of the state space .reg: its place in the register file and its width."""

    index: int
    bits: int  # 1 for a predicate
    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant, as its bits; a negative integer is sign-extended without end."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A special register, a label, a parameter, a function or a variable, by its name."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset] (the manual's "Addresses as Operands"); no base is the address 0."""

    base: "Register | Symbol | None"
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}, or p|q (two results of one instruction)."""

    items: "tuple[Operand, ...]"


@dataclass(frozen=True)
class Not:
    """!p, the negation of a predicate."""

    register: Register


@dataclass(frozen=True)
class Nowhere:
    """_, a result that is dropped."""


Operand = Register | Immediate | Symbol | Address | Vector | Not | Nowhere


@dataclass(frozen=True)
class Instruction:
    """One instruction; guard is its predicate, as in `@!p bra L`."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | Not | None
    text: str

    @property
    def parts(self) -> list[str]:
        """The opcode without its dots: ["ld", "global", "v4", "b32"]."""
        return self.opcode.split(".")


@dataclass
class Function:
    """An .entry or .func: the place of its first instruction and the names of its parameters."""

    name: str
    start: int
    params: list[str]


@dataclass
class Program:
    """A module: the instructions of its functions, one after the other."""

    entry: str = ""
    n_threads: int = 0
    functions: dict[str, Function] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[Register] = field(default_factory=list)


_HEADER = re.compile(r"\.(entry|func)\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{")
_TOKEN = re.compile(
    r"\s*(?:(?P<brace>[{}])|(?P<label>[\w$]+)\s*:(?!:)"
    r"|(?P<statement>[^;{}]*(?:\{[^}]*\}[^;{}]*)*);)"
)
_BITS = {"pred": 1, "b8": 8, "s8": 8, "u8": 8, "b16": 16, "s16": 16, "u16": 16, "f16": 16}
_BITS |= {"b32": 32, "s32": 32, "u32": 32, "f32": 32, "b64": 64, "s64": 64, "u64": 64, "f64": 64}


def parse(ptx: str) -> Program:
    """Return the program of a PTX module that has one .entry."""
    text = re.sub(r"/\*.*?\*/", " ", re.sub(r"//[^\n]*", "", ptx), flags=re.DOTALL)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    program = Program()
    for header in _HEADER.finditer(text):
        kind, name, params, directives = header.groups()
        if kind == "entry":
            program.entry = name
            threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", directives)
            program.n_threads = int(threads[1]) if threads else 32
        names = [param.split()[-1] for param in params.split(",") if param.strip()]
        program.functions[name] = Function(name, len(program.instructions), names)
        _Body(program).read(_body(text, header.end()))
    return program


def _body(text: str, start: int) -> str:
    """Return the text from start to the brace that closes the one before start."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.start()]
    raise ValueError("a function of the PTX has no end")


class _Body:
    """The reader of one function's body."""

    def __init__(self, program: Program) -> None:
        self.program = program
        # From the function to the innermost block: names, and prefixes of names, of registers.
        self.scopes: list[dict[str, Register]] = [{}]
        self.prefixes: list[dict[str, int]] = [{}]

    def read(self, text: str) -> None:
        place = 0
        text = text.rstrip()
        while place < len(text):
            token = _TOKEN.match(text, place)
            if token is None:
                raise ValueError(f"cannot read the PTX at {text[place : place + 60]!r}")
            place = token.end()
            if token["brace"] == "{":
                self.scopes.append({})
                self.prefixes.append({})
            elif token["brace"]:
                self.scopes.pop()
                self.prefixes.pop()
            elif token["label"]:
                self.program.labels[token["label"]] = len(self.program.instructions)
            elif token["statement"]:
                self._statement(" ".join(token["statement"].split()))

    def _statement(self, text: str) -> None:
        if text.startswith(".reg "):
            _, kind, names = text.split(None, 2)
            for name in names.split(","):
                self._declare(name.strip(), _BITS[kind.removeprefix(".")])
        elif text and not text.startswith("."):  # other directives: .param, .pragma
            self.program.instructions.append(self._instruction(text))

    def _declare(self, name: str, bits: int) -> None:
        if match := re.fullmatch(r"(.+)<\d+>", name):
            self.prefixes[-1][match[1]] = bits
        else:
            self.scopes[-1][name] = self._new(name, bits)

    def _new(self, name: str, bits: int) -> Register:
        register = Register(len(self.program.registers), bits, name)
        self.program.registers.append(register)
        return register

    def _register(self, name: str) -> Register | None:
        stem = name.rstrip("0123456789")
        for scope, prefixes in zip(reversed(self.scopes), reversed(self.prefixes), strict=True):
            if name in scope:
                return scope[name]
            if stem != name and stem in prefixes:
                scope[name] = self._new(name, prefixes[stem])
                return scope[name]
        return None

    def _instruction(self, text: str) -> Instruction:
        guard, rest = None, text
        if text.startswith("@"):
            name, rest = text[1:].split(None, 1)
            guard = self._operand(name)
            assert isinstance(guard, Register | Not), text
        opcode, _, operands = rest.partition(" ")
        split = tuple(self._operand(operand) for operand in _split(operands))
        return Instruction(opcode, split, guard, text)

    def _operand(self, text: str) -> Operand:
        if text == "_":
            return Nowhere()
        if text[0] in "{(":
            return Vector(tuple(self._operand(item) for item in _split(text[1:-1])))
        if text[0] == "[":
            return self._address(text[1:-1].strip())
        if "|" in text:
            return Vector(tuple(self._operand(item.strip()) for item in text.split("|")))
        if text[0] == "!":
            register = self._register(text[1:])
            assert register is not None, text
            return Not(register)
        return self._register(text) or _constant(text) or Symbol(text)

    def _address(self, text: str) -> Address:
        match = re.fullmatch(r"([\w$%.]+)\s*(?:\+\s*(-?\w+))?", text)
        if match is None:
            raise UnknownInstruction(f"the address [{text}]")
        offset = int(match[2], 0) if match[2] else 0
        if (constant := _constant(match[1])) is not None:
            return Address(None, constant.bits + offset)
        return Address(self._register(match[1]) or Symbol(match[1]), offset)


def _constant(text: str) -> Immediate | None:
    """Return an integer (decimal or 0x) or a float by its bits (0f and 0d), or None."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(match[1] or match[2], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return None


def _split(text: str) -> Iterator[str]:
    """Yield the operands of a list: commas inside brackets do not part them."""
    if not set(text) & set("[{("):
        yield from (item.strip() for item in text.split(",") if item)
        return
    for match in re.finditer(r"(?:[^,\[{(]|\[[^\]]*\]|\{[^}]*\}|\([^)]*\))+", text):
        if match[0].strip():
            yield match[0].strip()
