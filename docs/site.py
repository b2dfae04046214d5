"""Collect every public page in one folder, from which `make docs` builds the site.

python docs/site.py build/pages

README.md becomes the front page. The pages link to each other and to files of the repository, as
GitHub shows them; here each link is rewritten to where its target stands on the site, and a linked
file that is no page is copied beside the pages. A link to a file that does not exist is an error.
"""

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = {
    ROOT / "README.md": "index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "bench/results/compile_audit.md": "compile_audit.md",
    ROOT / "bench/results/predicted_step.md": "predicted_step.md",
    **{page: page.name for page in (ROOT / "docs").glob("*.md")},
}
# A fenced block or inline code, which is left alone, or a link's target.
LINK = re.compile(r"^```.*?^```|`[^`\n]+`|\]\(([^()\s#]*)(#[^()\s]*)?\)", re.DOTALL | re.MULTILINE)


def site_path(target: Path) -> str:
    """Return where a file of the repository stands on the site."""
    if target in PLACES:
        return PLACES[target]
    if target.parent == ROOT / "docs":
        return target.name
    return f"files/{target.relative_to(ROOT)}"


def collect(page: Path, folder: Path) -> None:
    """Write a page to the folder with its links rewritten, and the files that it links to."""
    missing = []

    def rewritten(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        if not link or ":" in link:  # code, an anchor of this page, or another site's address
            return match[0]
        target = (page.parent / link).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            missing.append(link)
            return match[0]
        path = site_path(target)
        if target not in PLACES:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, folder / path)
        return f"]({path}{anchor})"

    text = LINK.sub(rewritten, page.read_text("utf-8"))
    if missing:
        sys.exit(f"{page.relative_to(ROOT)} links to {missing[0]}, which is not a file; correct it")
    (folder / PLACES[page]).write_text(text, "utf-8")


def main() -> None:
    """Empty the folder that the command line names and fill it."""
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for page in PLACES:
        collect(page, folder)


if __name__ == "__main__":
    main()
