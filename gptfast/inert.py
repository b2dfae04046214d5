"""A pickle read as data: nothing that it names is imported, nothing that it asks for is called.

A pickle is a program for a small stack machine. `read_pickle` runs that machine, but a class or a
function of the file is its name here (`Global`), and what calling it would have made is an `Inert`
with the name, the arguments and the attributes. Only a few calls have a meaning, which the caller
gives: those that describe a tensor, for example.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

import numpy as np

# Each may cost some 60 bytes of memory; a GPT-2 XL with its optimizer has 100,000.
_MAX_OPERATIONS = 5_000_000
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT "
    "BINFLOAT".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# No state dictionary and no configuration needs these: a file that does was made to do harm.
_HARMFUL_MODULES = frozenset(
    "os posix nt sys subprocess commands shutil runpy pty socket importlib ctypes".split()
)
_HARMFUL = ("eval", "exec", "compile", "__import__", "open", "breakpoint", "input")


@dataclass(frozen=True, eq=False)
class Global:
    """A class or a function that a pickle names."""

    name: str
    """Its module and name, for example "argparse.Namespace"."""


@dataclass(eq=False)
class Inert:
    """What a pickle would make by a call: what it called, with which arguments, and the rest."""

    name: str
    args: tuple[Any, ...] = ()
    attributes: dict[Any, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)
    """The items of a list or set; those of a dictionary are in `attributes`."""
    state: tuple[Any, ...] = ()
    """What it was built with if that is no dictionary: a dtype's byte order, for example."""


class Attributed(dict[Any, Any]):
    """A dictionary that has attributes too, as torch's state dictionaries have `_metadata`."""

    def __init__(self, items: Mapping[Any, Any]) -> None:
        super().__init__(items)
        self.attributes: dict[Any, Any] = {}


Call = Callable[..., Any]


class _Machine:
    """The stack machine. A fault of the pickle raises ValueError, LookupError or TypeError."""

    def __init__(self, calls: Mapping[str, Call], persistent: Call) -> None:
        self.calls, self.persistent = calls, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        """Execute one opcode."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(arg)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(arg)])
        elif name in _SIZES:
            n = _SIZES[name]
            if len(stack) < n:
                raise ValueError("a tuple lacks items")
            stack[-n:] = [tuple(stack[-n:])]
        elif name not in ("PROTO", "FRAME"):
            operation = getattr(self, f"on_{name.lower()}", None)
            if operation is None:
                raise ValueError(f"the opcode {name} is none of torch.save's")
            operation() if arg is None else operation(arg)

    def to_mark(self) -> list[Any]:
        """Remove and return what stands above the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def call(self, function: Any, args: Any) -> Any:
        """Return what stands for function(*args)."""
        if not isinstance(args, tuple) or not isinstance(function, Global | Inert):
            raise TypeError(f"it calls a {type(function).__name__}")
        if isinstance(function, Inert):
            return Inert(function.name, args)
        if function.name in self.calls:
            return self.calls[function.name](*args)
        if function.name in ("copyreg._reconstructor", "copy_reg._reconstructor") and args:
            return Inert(getattr(args[0], "name", ""), args[1:])
        return Inert(function.name, args)

    def on_mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def on_pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.to_mark()

    def on_pop_mark(self) -> None:
        self.to_mark()

    def on_dup(self) -> None:
        self.stack.append(self.stack[-1])

    def on_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def on_empty_list(self) -> None:
        self.stack.append([])

    on_empty_set = on_empty_list  # a set's items need not be hashed here

    def on_empty_dict(self) -> None:
        self.stack.append({})

    def on_list(self) -> None:
        items = self.to_mark()
        self.stack.append(items)

    on_frozenset = on_list

    def on_tuple(self) -> None:
        items = self.to_mark()
        self.stack.append(tuple(items))

    def on_dict(self) -> None:
        items = self.to_mark()
        self.stack.append({})
        self.set_items(items)

    def on_append(self) -> None:
        item = self.stack.pop()
        self.extend([item])

    def on_appends(self) -> None:
        self.extend(self.to_mark())

    on_additems = on_appends

    def extend(self, items: list[Any]) -> None:
        """Append items to the list on top of the stack."""
        target = self.stack[-1]
        target = target.items if isinstance(target, Inert) else target
        if type(target) is not list:
            raise TypeError(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def on_setitem(self) -> None:
        pair = self.stack[-2:]
        del self.stack[-2:]
        self.set_items(pair)

    def on_setitems(self) -> None:
        self.set_items(self.to_mark())

    def set_items(self, items: list[Any]) -> None:
        """Set keys and values, in turn, in the dictionary on top of the stack."""
        target = self.stack[-1]
        target = target.attributes if isinstance(target, Inert) else target
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError(f"it sets keys of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def on_global(self, name: str) -> None:
        self.push_global(*name.split(" ", 1))

    def on_stack_global(self) -> None:
        module, name = self.stack[-2:]
        del self.stack[-2:]
        self.push_global(module, name)

    def push_global(self, module: Any, name: Any) -> None:
        """Push a class or function; ValueError for one that has no place in a model's file."""
        builtin = module in ("builtins", "__builtin__")
        if str(module).split(".")[0] in _HARMFUL_MODULES or builtin and name in _HARMFUL:
            raise ValueError(f"it asks for {module}.{name}")
        self.stack.append(Global(f"{module}.{name}"))

    def on_inst(self, name: str) -> None:
        args = tuple(self.to_mark())
        self.on_global(name)
        self.stack.append(self.call(self.stack.pop(), args))

    def on_obj(self) -> None:
        function, *args = self.to_mark()
        self.stack.append(self.call(function, tuple(args)))

    def on_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, args))

    on_newobj = on_reduce

    def on_newobj_ex(self) -> None:
        named, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, args))
        if isinstance(self.stack[-1], Inert) and isinstance(named, dict):
            self.stack[-1].attributes |= named

    def on_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Attributed) and isinstance(state, dict):
            target.attributes |= state
        if isinstance(target, Inert):
            # With slots, a pair: what is in __dict__, and the slots.
            parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
            target.state = state if isinstance(state, tuple) else ()
            for part in parts:
                if isinstance(part, dict):
                    target.attributes |= part

    def on_binpersid(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


def _checked_key(key: Any) -> Any:
    """Return a key of a dictionary. Raises TypeError for one that takes for ever to hash.

    That is a tuple of tuples of the same tuples, or large integers chosen to have one hash.
    """
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, tuple) or isinstance(part, int) and abs(part) >= 2**60:
            raise TypeError("a key is no name and no number")
    return key


def _scalar(dtype: Any, content: Any = b"", *_: Any) -> Any:
    """Return a number or a text of NumPy's as Python's; an Inert for another kind of value."""
    kind = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    big_endian = isinstance(dtype, Inert) and dtype.state[1:2] == (">",)
    if isinstance(kind, str) and isinstance(content, bytes) and not big_endian:
        if kind in _NUMBERS and len(content) == np.dtype(kind).itemsize:
            return np.frombuffer(content, f"<{kind}")[0].item()
        if kind == f"U{len(content) // 4}" and content:
            return content.decode("utf-32-le")
    return Inert("numpy.scalar")


def _encoded(text: Any, *_: Any) -> bytes:
    return cast(str, text).encode("latin-1")  # protocol 2 keeps bytes as text


def _mapping(pairs: Any = ()) -> dict[Any, Any]:
    """Return a dictionary of a class of its own; Python 2 gave one its pairs at once."""
    items = pairs.items() if isinstance(pairs, dict) else pairs
    return Attributed({_checked_key(key): value for key, value in items})


_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
PLAIN_CALLS: dict[str, Call] = {
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": lambda *_: {},
    "_codecs.encode": _encoded,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
"""The calls that plain data needs: dictionaries of a class of their own, and NumPy's scalars."""


def read_pickle(file: IO[bytes], calls: Mapping[str, Call], persistent: Call) -> Any:
    """Return the content of the pickle at the file's position, with `Inert` for its objects.

    calls: what to do for the calls that have a meaning, by the name of the function.
    persistent: returns what an identifier of something outside the pickle stands for. Raises
    ValueError, LookupError or TypeError for a damaged pickle and for one that asks for a module
    such as os.
    """
    machine = _Machine(calls, persistent)
    for n, (opcode, arg, _) in enumerate(pickletools.genops(file)):
        if opcode.name == "STOP":
            break
        if n == _MAX_OPERATIONS:
            raise ValueError(f"it has more than {_MAX_OPERATIONS:,} operations")
        machine.step(opcode.name, arg)
    return machine.stack[-1]


def kind_of(value: Any) -> str:
    """Return what a value of a pickle is, in words for a message."""
    if isinstance(value, Inert | Global):
        return f"an object, {value.name:.80}"
    kinds = {dict: "a dictionary", str: "a text", bytes: "bytes", int: "a number"}
    return next((kinds[k] for k in kinds if isinstance(value, k)), f"a {type(value).__name__}")


def mapping_of(value: Any) -> dict[Any, Any] | None:
    """Return a dictionary, or the attributes of an object as one; None for anything else."""
    if isinstance(value, Inert):
        return value.attributes
    return value if isinstance(value, dict) else None
