"""How this copy of gptfast was installed: its distribution, a namesake beside it, its C++ kernels.

Imports nothing but Python's own modules, because it is asked before PyTorch is imported. setup.py
writes `built.json` beside this file.
"""

import json
import re
from pathlib import Path

DISTRIBUTION = "gptfast-torch"
"""What pip calls this package. The distribution called gptfast is another project."""
BUILT = Path(__file__).with_name("built.json")
REBUILD = "pip install --force-reinstall --no-deps . in the sources of gptfast"


def has_library(name: str) -> bool:
    """Return whether a library is installed; a folder of that name without one in it is none."""
    from importlib import util  # not at the top: it takes time that the help has not

    spec = util.find_spec(name)
    return spec is not None and spec.origin is not None


def version() -> str:
    """Return the version of this copy."""
    text = Path(__file__).with_name("__init__.py").read_text("utf-8")
    found = re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)
    assert found
    return found[1]


def commit() -> str:
    """Return the Git commit of the sources that this copy runs from, or "" if it has none."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    import subprocess

    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def namesake() -> str:
    """Return the version of the other project's distribution if that is installed, or "".

    It installs a package GPTFast, which is the same folder as ours where names have no case, and
    pins versions below those that PyTorch needs.
    """
    from importlib import metadata  # half of what the help takes

    try:
        other = metadata.distribution("gptfast")
    except metadata.PackageNotFoundError:
        return ""
    # An early copy of this project had that name too.
    theirs = any(path.parts[:1] == ("GPTFast",) for path in other.files or ())
    return other.version if theirs else ""


def refusal() -> str:
    """Return one line for a user who has the namesake installed, or ""."""
    version = namesake()
    if not version:
        return ""
    return (
        f"the distribution gptfast {version} is another project, whose folder and pinned packages "
        f"are in the way of {DISTRIBUTION}; run pip uninstall gptfast, then install "
        f"{DISTRIBUTION} again"
    )


def why_not_loaded() -> str:
    """Return why this copy has no C++ kernels that could run, or "" if nothing says so.

    The answer is one line with its remedy. It comes from the build: what kept it from compiling the
    kernels, or that an earlier gptfast compiled them, whose kernels fit one version of PyTorch.
    """
    try:
        built = json.loads(BUILT.read_text("utf-8"))
    except FileNotFoundError:  # built in place, by other means
        return ""
    except (OSError, ValueError) as error:
        return f"{BUILT} cannot be read: {error}; reinstall {DISTRIBUTION}"
    if not built["missing"] and "torch" in built:  # another torch might crash with them
        alone = f"for torch {built['torch']} alone"
        return f"they were built {alone}, by an earlier gptfast; run {REBUILD}"
    return built["missing"]
