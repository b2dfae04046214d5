"""Check the floors of gptfast/: imports go downward, never in a circle.

The table below is the map in CONTRIBUTING.md. Imports inside functions count like those at the top
of a file; imports for type checkers alone do not count.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gptfast"
# From the top floor to the bottom: its rooms (files and folders of gptfast/) and what it does.
FLOORS = [
    ("__main__ cli", "the command: flags, files of settings and defaults, one file per command"),
    ("search serve", "many runs compared; many clients answered"),
    ("training", "batches to a trained model, step after step"),
    (
        "evaluate drop_in deferred",
        "how well a model predicts; transformers' model on our operations",
    ),
    ("__init__ generate", "the public names; the public way to continue a prompt"),
    ("engine", "packed weights, the KV cache and the scheduler: fast generation"),
    ("generation", "options, stops, beams, and the loop that every decoder runs"),
    ("data", "text to token files to batches"),
    ("model blocks lora kv_cache modules dropout optim dtensor", "GPT and AdamW"),
    ("weights", "models on disk, in every form, as names, shapes and tensors"),
    ("tokenizer config ops", "text to ids; the configurations; the operations"),
    (
        "device checks files gguf_file inert installed startup torch_private",
        "what everything leans on",
    ),
]
FLOOR_OF = {room: i for i, (rooms, _) in enumerate(FLOORS) for room in rooms.split()}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "kernels" not in path.relative_to(PACKAGE).parts
}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every statement that runs, at any depth, except those under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


def imports_of(module: str) -> set[str]:
    """Return the modules of gptfast that a module imports."""
    found = set()
    for node in statements(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; name the whole module"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = {name if name in MODULES else name.rpartition(".")[0] for name in found}
    # `from gptfast import ops` is an import of ops, not of the whole package.
    return {name for name in found if name in MODULES} - {module}


IMPORTS = {module: imports_of(module) for module in MODULES}


def test_the_table_has_every_room() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py"}
    rooms |= {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms - {"kernels"} == set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_upward(module: str) -> None:
    floor = FLOOR_OF[room_of(module)]
    upward = [name for name in IMPORTS[module] if FLOOR_OF[room_of(name)] < floor]
    assert not upward, f"{module} imports {upward}, which stand above it"


def circles() -> list[list[str]]:
    """Return the groups of modules that import one another: strongly connected ones (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(IMPORTS[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for module in MODULES:
        if module not in index:
            visit(module)
    return found


def test_no_circle() -> None:
    assert circles() == []


def test_the_table_is_the_one_in_contributing() -> None:
    """Each floor is a line of the table in CONTRIBUTING.md, in this order."""
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    section = page.partition("## The floors of gptfast/")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table]
    wanted = [(" ".join(f"`{room}`" for room in rooms.split()), text) for rooms, text in FLOORS]
    assert rows[1:] == wanted


def test_kernels_stand_beside_the_floors() -> None:
    """kernels/ is installed as gptfast.kernels; it imports one other file of gptfast."""

    def imported(path: Path) -> set[str]:
        tree = ast.parse(path.read_text("utf-8"))
        return {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}

    ours = {name for path in (ROOT / "kernels").rglob("*.py") for name in imported(path)}
    ours = {name for name in ours if name.split(".")[0] == "gptfast"} - {"gptfast.torch_private"}
    assert ours and all(name.startswith("gptfast.kernels.") for name in ours)
    users = {m for m, path in MODULES.items() if "gptfast.kernels" in str(imported(path))}
    assert {room_of(module) for module in users} == {"ops", "engine"}


@pytest.mark.parametrize(
    ("folder", "suffixes"),
    [
        ("gptfast", {".py"}),
        ("kernels", {".py"}),
        ("csrc", {".cpp", ".h"}),
        ("bench", {".py"}),
        ("tests/ptx", {".py"}),
    ],
)
def test_no_file_is_too_long(folder: str, suffixes: set[str]) -> None:
    paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert paths
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in paths}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


@pytest.mark.parametrize("folder", ["gptfast", "bench", "kernels/reference", "tests/ptx"])
def test_no_function_is_too_long(folder: str) -> None:
    long = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 50:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = length
    assert long == {}


def private_names(path: Path) -> set[str]:
    """Return the names by which a file reaches into PyTorch past its public interface."""
    tree = ast.parse(path.read_text("utf-8"))
    modules, found = {"torch"}, set()  # modules and classes of PyTorch, as this file calls them
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(f"{node.module}.{alias.name}", alias.asname) for alias in node.names]
        else:
            continue
        names = [(name, called) for name, called in names if name.split(".")[0] == "torch"]
        modules |= {called or name.rpartition(".")[2] for name, called in names}
        found |= {name for name, _ in names if "._" in name}
    for node in ast.walk(tree):
        chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if chain.split(".")[0] in modules and re.search(r"\._[a-z]", chain, re.IGNORECASE):
            found.add(chain)
    return found


def private_attributes() -> dict[str, set[str]]:
    """Return the private attributes that are read and that gptfast itself does not define."""
    used: dict[str, set[str]] = {}
    own: set[str] = set()
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-zA-Z]", node.attr):
                if isinstance(node.ctx, ast.Load):
                    used.setdefault(node.attr, set()).add(str(path.relative_to(ROOT)))
                else:
                    own.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    return {name: files for name, files in used.items() if name not in own}


PRIVATE = ROOT / "gptfast" / "torch_private.py"
PRODUCT = [path for folder in ("gptfast", "kernels") for path in (ROOT / folder).rglob("*.py")]
# Of PyTorch's modules: older than torch.compile.
OLD = {"_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"}
# Of ATen's operators, transformers, tiktoken and Python's os.
OTHERS = {"_exit", "_to_copy", "_attn_implementation", "_encode_single_piece"}


def test_one_file_of_the_operations_knows_what_a_device_does() -> None:
    """The dispatcher decides; where autocast is another on the CPU, ops/library.py says so."""
    branch = re.compile(r"""[!=]= ["'](cpu|cuda)["']|\bis_(cpu|cuda)\b""")
    sources = {name: path.read_text("utf-8") for name, path in MODULES.items()}
    found = [m for m in sources if m.startswith("gptfast.ops.") and branch.search(sources[m])]
    assert found == ["gptfast.ops.library"]


def test_one_file_has_the_private_names_of_torch() -> None:
    assert {"torch._C", "torch._ops.OpOverload"} <= private_names(PRIVATE)
    elsewhere = {str(p.relative_to(ROOT)): private_names(p) for p in PRODUCT if p != PRIVATE}
    assert {path: names for path, names in elsewhere.items() if names} == {}
    ours = {str(PRIVATE.relative_to(ROOT))}
    foreign = {name for name, files in private_attributes().items() if files != ours}
    assert foreign == OLD | OTHERS, "put what uses them into gptfast/torch_private.py"
