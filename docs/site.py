"""A hook of mkdocs.yml: files outside of docs/ that pages link to become part of the site.

In the repository a page of docs/ links to `../benchmarks/RESULTS.md`; in the site that file is
`benchmarks/RESULTS.md`, as docs/ is its root. README.md is the one that stays outside: index.md is
in its place.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")


def targets(page: Path) -> Iterator[str]:
    """Yield the files that a page links to, as paths in the repository."""
    folder = page.relative_to(ROOT).parent.as_posix()
    for _, link, _ in LINK.findall(page.read_text()):
        target = normpath(f"{folder}/{link}")
        if (ROOT / target).is_file():
            yield target


def place(target: str) -> str:
    """Return where a file of the repository is in the site."""
    return "index.md" if target == "README.md" else target.removeprefix("docs/")


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside of docs/ that pages link to, and those that these link to."""
    open_pages = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    seen = {page.relative_to(ROOT).as_posix() for page in open_pages}
    while open_pages:
        for target in set(targets(open_pages.pop())) - seen:
            seen.add(target)
            if place(target) == target:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
            if target.endswith(".md") and target != "README.md":
                open_pages.append(ROOT / target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page whose links lead to the places of their targets in the site."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    here = PurePosixPath(source).parent.as_posix()
    there = PurePosixPath(place(source)).parent.as_posix()

    def moved(match: re.Match[str]) -> str:
        target = normpath(f"{here}/{match[2]}")
        if not (ROOT / target).is_file():
            return match[0]
        return match[1] + relpath(place(target), there) + match[3]

    return LINK.sub(moved, markdown)
