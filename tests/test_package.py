"""Test what is handed on: the sdist, its page, and, on request, a wheel in an empty environment."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from finetuning_page import BLOCKS, shortened

from gptfast.data.embedded import embedded_text

ROOT = Path(__file__).parents[1]
DIST = os.environ.get("GPTFAST_TEST_WHEEL")
WHEELS = sorted(Path(DIST).glob("*.whl")) if DIST else []
for_wheels = pytest.mark.skipif(not DIST, reason="GPTFAST_TEST_WHEEL does not name a directory")
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the files of the sdist of a copy of these sources, by their paths."""
    folder = tmp_path_factory.mktemp("Quellen für sdist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    if listed.returncode:
        pytest.skip("these sources are in no repository")
    for name in listed.stdout.split("\0"):
        if (ROOT / name).is_file() and name.partition("/")[0] not in (".venv", "bench", "docs"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-c", SDIST, str(folder / "dist")]
    process = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    assert process.returncode == 0, process.stderr
    (path,) = (folder / "dist").glob("gptfast_torch-*.tar.gz")
    with tarfile.open(path) as archive:
        return {
            member.name.partition("/")[2]: archive.extractfile(member).read().decode()
            for member in archive
            if member.isfile()
        }


def test_the_sdist_has_what_a_build_needs(sdist: dict[str, str]) -> None:
    wanted = [*ROOT.glob("csrc/*"), *ROOT.glob("kernels/**/*.py"), ROOT / "gptfast/py.typed"]
    wanted += [*(p for p in ROOT.glob("gptfast/**/*.py") if "kernels" not in p.parts)]
    wanted += [ROOT / "gptfast/serve/page.html", ROOT / "setup.py", ROOT / "LICENSE"]
    missing = {str(path.relative_to(ROOT)) for path in wanted} - sdist.keys()
    assert len(wanted) > 200 and not missing
    # Tests would need the rest of the repository.
    assert not [name for name in sdist if name.startswith("tests/") or "built.json" in name]


def test_the_package_page_stands_alone(sdist: dict[str, str]) -> None:
    """It has README's text, and no link or picture that leads to a file beside it."""
    page = sdist["PKG-INFO"].partition("\n\n")[2]
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert links and all(link.startswith(("https://", "#")) for link in links)
    assert "<!--" not in page and "-->" not in page and "![" not in page
    assert "## Three uses" in page
    # Its reader has a package index and no repository.
    assert page.index("pip install gptfast-torch") < page.index("gptfast train")
    assert not re.search(r"git clone|\bmake [a-z`]|pip install \.|^## Map|package page", page, re.M)
    head = sdist["PKG-INFO"].partition("\n\n")[0]
    for line in ("Name: gptfast-torch", "Description-Content-Type: text/markdown"):
        assert line in head.splitlines()
    assert head.count("Classifier: ") > 5


MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TORCHES = re.search(r"^TORCHES \?= (.*)$", MAKEFILE, re.MULTILINE)[1].split()
DEFAULT_TORCH = torch.__version__.partition("+")[0]


def wheel_tag(wheel: Path) -> str:
    """Return the tag of the Python that a wheel is for, as cp311."""
    return wheel.name.split("-")[2]


def python_for(wheel: Path) -> str | None:
    """Return the command of the Python here that a wheel is for, or None where there is none."""
    minor = wheel_tag(wheel).removeprefix("cp3")
    if not wheel.stem.endswith(platform.machine()):
        return None
    if int(minor) == sys.version_info.minor:
        return sys.executable
    command = shutil.which(f"python3.{minor}")
    # pyenv has such a command for Pythons that it does not run.
    works = command and subprocess.run([command, "-c", ""], capture_output=True).returncode == 0
    return command if works else None


def install(programs: Path, packages: list[str]) -> None:
    subprocess.run([programs / "python", "-m", "pip", "install", "-q", *packages], check=True)


@contextmanager
def environment(python: str, packages: list[str], folder: Path) -> Iterator[Path]:
    """Make an environment with some packages, give its programs' folder, and remove it: some GB."""
    try:
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        install(folder / "venv/bin", packages)
        yield folder / "venv/bin"
    finally:
        shutil.rmtree(folder / "venv", ignore_errors=True)


@for_wheels
def test_wheels_are_for_systems_as_old_as_those_of_torch() -> None:
    tags = [re.search(r"-manylinux_2_(\d+)_", path.name) for path in WHEELS]
    assert tags and all(tag and int(tag[1]) <= 28 for tag in tags)


@for_wheels
@pytest.mark.parametrize("version", [TORCHES[0], DEFAULT_TORCH, *TORCHES[1:]])
@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.stem)
def test_a_wheel_in_an_empty_environment(wheel: Path, version: str, tmp_path: Path) -> None:
    """It trains and generates in another directory, with a path that is not plain, without HOME."""
    python = python_for(wheel)
    if python is None:
        pytest.skip("the Python of this wheel is not on PATH, or it is for another machine")
    with environment(python, [f"torch=={version}", "numpy<2.4", str(wheel)], tmp_path) as programs:
        train_and_generate(programs, tmp_path)


def train_and_generate(programs: Path, folder: Path) -> None:
    here = folder / "ein Ordner für Läufe"
    here.mkdir()
    (here / "text.txt").write_text(embedded_text()[:20_000], "utf-8")
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}

    def run(*words: str) -> str:
        command = [programs / "gptfast", *words]
        process = subprocess.run(
            command, cwd=here, env=kept, capture_output=True, encoding="utf-8", timeout=300
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    assert "C++ kernels: level" in run("info")
    small = "--tokenizer byte --n-layer 1 --n-head 2 --n-embd 32 --block-size 32 --max-steps 4"
    assert "kernels: cpp" in run("train", "--data", "text.txt", "--out", "Lauf 1", *small.split())
    assert run("generate", "Lauf 1", "--prompt", "The ", "--max-new-tokens", "8").startswith("The ")


def follow_the_page(programs: Path, here: Path) -> None:
    """Take each step of docs/finetuning.md with the programs of a folder, and less training."""
    env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    for language, content in BLOCKS:
        if language != "text":
            command = ["bash", "-ec", shortened(content)]
            if language != "sh":
                command = [programs / "python", "-c", content]
            process = subprocess.run(
                command, cwd=here, env=env, capture_output=True, encoding="utf-8", timeout=600
            )
            assert process.returncode == 0, f"{content}\n{process.stderr}"


@for_wheels
def test_from_a_wheel_to_what_others_load(tmp_path: Path) -> None:
    """A stranger installs the wheel and copies the page, down to peft, transformers, llama.cpp."""
    wheel = next((path for path in WHEELS if python_for(path) == sys.executable), None)
    if wheel is None:
        pytest.skip("no wheel is for this Python")
    with environment(sys.executable, [f"torch=={DEFAULT_TORCH}", str(wheel)], tmp_path) as programs:
        install(programs, ["gptfast-torch[gguf]", "peft", "llama-cpp-python"])
        follow_the_page(programs, tmp_path)
