"""Test what an installation says of itself: its name, a namesake, kernels that are not there."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from setuptools import Distribution

import gptfast
from gptfast import installed
from gptfast.cli import COMMANDS
from gptfast.ops.backend import EXTENSION
from gptfast.startup import SUMMARIES
from gptfast.torch_private import OLDEST_TORCH

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# A copy of gptfast whose build left a record: read before the package is.
WITH_RECORD = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("gptfast.installed", {installed!r})
sys.modules["gptfast.installed"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.BUILT = pathlib.Path({record!r})
"""
USE = """
import torch, gptfast
assert "gptfast._C" not in sys.modules
gptfast.ops.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2]))
gptfast.ops.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2]))
from gptfast.cli import main
main(["info"])
try:
    gptfast.use_backend("cpp")
except RuntimeError as error:
    print(error)
"""


# As if the sources of an operator had changed since its kernel was compiled.
CHANGED_SOURCES = """
import importlib
load = importlib.import_module
def changed(name):
    module = load(name)
    if name == "gptfast._C":
        {change}
    return module
importlib.import_module = changed
import gptfast
"""
CHANGES = {
    "other arguments": "module.signatures = lambda: dict(sample='Tensor, float -> Tensor')",
    "of an earlier gptfast": "del module.signatures",
}


def python(*args: str, path: str | Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a folder before all others on its path."""
    command = [sys.executable, *args]
    every = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"} | env
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=every)


def built(folder: Path, **record: str) -> Path:
    path = folder / "built.json"
    path.write_text(json.dumps({"missing": ""} | record), "utf-8")
    return path


@pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("change", CHANGES)
def test_kernels_of_other_sources_are_one_line(change: str) -> None:
    done = python("-c", CHANGED_SOURCES.format(change=CHANGES[change]))
    assert done.returncode == 1
    line = r"ImportError: \S+ was compiled from other sources .*; run make, or .*"
    assert re.fullmatch(line, done.stderr.splitlines()[-1])


def test_the_name_is_the_same_everywhere() -> None:
    assert PROJECT["name"] == installed.DISTRIBUTION != "gptfast"
    assert PROJECT["version"] == gptfast.__version__
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("gptfast/**/*.py")]
    for path in texts:
        named = re.findall(r"pip install (?:-\S+ )*['\"]?(gptfast[\w-]*)", path.read_text("utf-8"))
        # Files of wheels are called gptfast_torch-...
        assert {name.replace("_", "-").rstrip("-") for name in named} <= {installed.DISTRIBUTION}, (
            path
        )


@pytest.fixture
def namesake(tmp_path: Path) -> Path:
    """Return a folder in which the other project's distribution is installed."""
    info = tmp_path / "gptfast-0.3.1.dist-info"
    info.mkdir()
    # Python 3.12 and newer names only the files that are there.
    (tmp_path / "GPTFast").mkdir()
    (tmp_path / "GPTFast/__init__.py").touch()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gptfast\nVersion: 0.3.1\n")
    (info / "RECORD").write_text("GPTFast/__init__.py,,\ngptfast-0.3.1.dist-info/METADATA,,\n")
    return tmp_path


@pytest.mark.parametrize("command", ["info", "train --max-steps 1"])
def test_the_command_refuses_to_run_beside_the_namesake(command: str, namesake: Path) -> None:
    result = python("-m", "gptfast", *command.split(), path=namesake)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert "gptfast 0.3.1 is another project" in line
    assert "run pip uninstall gptfast, then install gptfast-torch again" in line
    assert python("-m", "gptfast", "--version", path=namesake).returncode == 0


IMPORTS = {
    "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')": (
        "No module named 'torch'; run pip install torch"
    ),
    "raise ImportError('libc10.so: cannot open\\n\\n  shared object file')": (
        "libc10.so: cannot open shared object file"
    ),
    "raise OSError('libgomp.so.1: cannot open shared object file')": (
        "libgomp.so.1: cannot open shared object file"
    ),
}


@pytest.mark.parametrize("torch", IMPORTS)
def test_the_command_says_on_one_line_that_pytorch_does_not_work(
    torch: str, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text(torch, "utf-8")
    result = python("-m", "gptfast", "info", path=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"gptfast: {IMPORTS[torch]}\n"
    result = python("-c", "import gptfast", path=tmp_path)
    assert result.stderr.startswith("Traceback")


def test_an_early_copy_of_this_project_is_no_namesake(
    namesake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(namesake)
    assert installed.namesake() == "0.3.1"
    (namesake / "gptfast-0.3.1.dist-info/RECORD").write_text("gptfast/__init__.py,,\n")
    assert installed.refusal() == ""


def test_the_reason_of_the_build_is_the_first_line(tmp_path: Path) -> None:
    """Once on stderr where a kernel is wanted, and in `gptfast info`."""
    reason = "they could not be compiled: fatal error: Python.h; mend that"
    record = built(tmp_path, missing=reason)
    code = WITH_RECORD.format(installed=installed.__file__, record=str(record)) + USE
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    line = f"gptfast: no C++ kernels ({reason}); the CPU runs the slower PyTorch reference"
    assert result.stderr.splitlines() == [line]
    assert f"C++ kernels: none ({reason})" in result.stdout
    assert f"backend 'cpp' is missing: {reason}" in result.stdout


def test_kernels_for_one_torch_are_not_loaded(tmp_path: Path) -> None:
    """What an earlier gptfast built might crash the process of another PyTorch."""
    record = built(tmp_path, torch="2.99.1+cpu")
    code = WITH_RECORD.format(installed=installed.__file__, record=str(record)) + USE
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert "built for torch 2.99.1+cpu alone, by an earlier gptfast; run pip install" in line


def test_records_that_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "BUILT", tmp_path / "none.json")
    assert installed.why_not_loaded() == ""
    monkeypatch.setattr(installed, "BUILT", tmp_path / "half.json")
    (tmp_path / "half.json").write_text('{"missing": ')
    assert "half.json cannot be read" in installed.why_not_loaded()
    monkeypatch.setattr(installed, "BUILT", built(tmp_path))
    assert installed.why_not_loaded() == ""


def setup_names() -> dict:
    """Return what setup.py defines, without a build."""
    source = (ROOT / "setup.py").read_text("utf-8")
    names = {"__name__": "setup", "__file__": str(ROOT / "setup.py")}
    exec(compile(source[: source.rindex("\nsetup(")], "setup.py", "exec"), names)
    return names


def build(tmp_path: Path, **env: str) -> tuple[str, dict[str, str]]:
    """Run setup.py's build of the extension; return what it says and the record that it leaves."""
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    process = subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=ROOT, env=os.environ | env
    )
    assert process.returncode == 0, process.stderr
    assert not list(tmp_path.glob("lib/gptfast/_C*"))
    return process.stderr, json.loads((tmp_path / "lib/gptfast/built.json").read_text("utf-8"))


def test_a_build_without_a_compiler_keeps_the_reason(tmp_path: Path) -> None:
    _, record = build(tmp_path, CXX="no-such-compiler -pipe")
    assert record["missing"].startswith(
        "they could not be compiled: there is no compiler no-such-compiler (on Debian, apt "
    )
    assert record["missing"].endswith(
        "pip install --force-reinstall --no-deps . in the sources of gptfast"
    )


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\necho 'a.cpp: In function f:\na.cpp:3:10: fatal error: é.h: No such file\n"
        "compilation terminated.' >&2\nexit 1\n",
        "utf-8",
    )
    compiler.chmod(0o755)
    said, record = build(tmp_path, CXX=str(compiler))
    assert "compiled: a.cpp:3:10: fatal error: é.h: No such file" in record["missing"]
    assert "compilation terminated." in said


@pytest.mark.parametrize("user", ["a user", "root", "root without apt-get", "has all"])
def test_tools_that_root_alone_installs_are_named(user: str, tmp_path: Path) -> None:
    if (make := shutil.which("make")) is None:
        pytest.skip("make is not installed")

    def program(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", "utf-8")
        (tmp_path / name).chmod(0o755)

    (tmp_path / "venv/bin").mkdir(parents=True)
    program("venv/bin/python", 'echo "pip $*"')
    program("id", f"echo {0 if user.startswith('root') else 1000}")
    if user == "root":
        program("apt-get", 'echo "apt-get $*"')
    if user == "has all":
        for tool in ("chromium", "aarch64-linux-gnu-g++", "qemu-aarch64"):
            program(tool, "")
    ready = f"{tmp_path}/venv/ready-test"
    command = [make, "-o", ready, "test-tools", f"VENV={tmp_path}/venv", f"PYTHON={sys.executable}"]
    env = {"PATH": str(tmp_path), "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if "-m pip" not in line]
    assert "--group tools" in done.stdout
    named = "some tests need more: as root, apt-get install chromium "
    if user in ("a user", "root without apt-get"):
        assert shown[-1].startswith(named) and not any(line.startswith("apt-get") for line in shown)
    elif user == "root":
        assert shown[-1].startswith("apt-get install") and "chromium" in shown[-1]
    else:
        assert named not in done.stdout


def test_setup_knows_the_oldest_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup_names()["OLDEST_TORCH"] == OLDEST_TORCH
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]
    assert needs["requires"] == ["setuptools>=77"]
    monkeypatch.setattr("setuptools.__version__", "76.1.0")
    with pytest.raises(SystemExit, match="setuptools 77 or newer, got 76.1.0; run pip install -U"):
        setup_names()


def test_a_build_without_torch_stops_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    names = setup_names()
    monkeypatch.delenv("GPTFAST_TORCH", raising=False)
    for asked, words in {
        "import gptfast_nowhere": ["No module named 'gptfast_nowhere'", "pip install torch, then"],
        "print('2.10.1+cu128'); print('/folder')": ["torch 2.11 or newer, got 2.10.1+cu128"],
    }.items():
        monkeypatch.setitem(names, "ASK_TORCH", asked)
        with pytest.raises(SystemExit) as stopped:
            names["Metadata"](Distribution()).run()  # before pip fetches anything
        assert all(word in str(stopped.value) for word in words)
        assert "\n" not in str(stopped.value)


@given(st.text(max_size=300))
def test_the_reason_is_one_line(said: str) -> None:
    assert len(ERRORS_OF(said).splitlines()) <= 1


ERRORS_OF = setup_names()["errors_of"]


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["--version"]])
def test_the_help_imports_no_torch(words: list[str]) -> None:
    """It stays under a tenth of the modules that PyTorch brings."""
    result = python("-X", "importtime", "-m", "gptfast", *words)
    assert result.returncode == 0
    modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "gptfast.startup" in modules and not {"torch", "numpy", "gptfast.ops"} & modules
    assert len(modules) < 200
    if words != ["--version"]:
        assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_the_import_adds_the_operators_alone() -> None:
    """To PyTorch: all of gptfast's operators, and neither a model nor anybody's library."""
    code = "import sys, torch; old = {*sys.modules}; import gptfast; print(*{*sys.modules} - old)"
    code += "; gptfast.lora.add_adapters, gptfast.model.Attention"
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    added = set(result.stdout.split())
    ours = {name for name in added if name.split(".")[0] == "gptfast"}
    # A few of Python's and PyTorch's own.
    assert {name.split(".")[0] for name in added - ours} <= {"torch", *sys.stdlib_module_names}
    assert len(added - ours) < 10
    rooms = {name.split(".")[1] for name in ours - {"gptfast"}}
    small = {"generate", "installed", "startup", "torch_private"}
    assert rooms - {"_C"} == small | {"kernels", "ops"}
    registers = re.compile(
        r"^(?:\w+ = )?(?:LIBRARY\.)?(?:register|define|define_opaque)\(", re.MULTILINE
    )
    for path in ROOT.glob("gptfast/**/*.py"):
        if registers.search(path.read_text("utf-8")):
            assert ".".join(path.relative_to(ROOT).with_suffix("").parts) in ours


def test_the_summaries_are_those_of_the_commands() -> None:
    first = {name: (COMMANDS[name].__doc__ or "").partition("\n")[0] for name in COMMANDS}
    assert first == SUMMARIES
