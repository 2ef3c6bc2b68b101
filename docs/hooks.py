"""What `make docs` adds to this folder: the pages of the root, and the recorded benchmarks.

In the repository README.md links `docs/ask.md`; on the site, where it is the home page, `ask.md`.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds what lies outside of this folder."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=text))
    for path in sorted((ROOT / "benchmarks").glob("*.json")):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Makes links lead to where their targets are on the site; one to a folder becomes its text."""
    place = page.file.src_uri
    sources = {target: source for source, target in PAGES.items()}
    folder = posixpath.dirname(sources.get(place, f"docs/{place}"))

    def on_site(link: re.Match[str]) -> str:
        text, path, anchor = link.groups(default="")
        target = posixpath.normpath(posixpath.join(folder, path))
        if (ROOT / target).is_dir():
            return text
        target = PAGES.get(target, target.removeprefix("docs/"))
        return f"[{text}]({posixpath.relpath(target, posixpath.dirname(place) or '.')}{anchor})"

    return LINK.sub(on_site, markdown)
