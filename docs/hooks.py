"""What MkDocs is told about links that leave docs/, so that they lead somewhere in the site, too.

Pages link to each other and into the code as files of the repository, which works where they are read as
files. Here the repository's other pages become pages of the site, a linked module becomes a page with its
source, and other files are copied.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parent.parent
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/README.md": "measured-results.md",
    "README.md": "index.md",
}
SOURCES = {".py": "python", ".yaml": "yaml"}
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"code/{path}.md" if Path(path).suffix in SOURCES else f"files/{path}"


def in_repository(uri: str) -> str:
    """Where a page of the site comes from."""
    return {there: path for path, there in PAGES.items() if path != "README.md"}.get(uri, f"docs/{uri}")


def linked(path: str, text: str) -> set[str]:
    """The files of the repository that a page links to."""
    found = set()
    for _, target, _ in LINK.findall(text):
        if "://" not in target:
            found.add(posixpath.normpath(posixpath.join(posixpath.dirname(path), target)))
    return found


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from elsewhere, and what is linked."""
    pages = [path for path in PAGES if path != "README.md"]
    pages += [in_repository(file.src_uri) for file in files.documentation_pages()]
    wanted: set[str] = set()
    for path in pages:
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        wanted |= linked(path, text)
        if path in PAGES:
            files.append(File.generated(config, PAGES[path], content=text))
    for path in sorted(wanted):
        source, uri = REPOSITORY / path, in_site(path)
        if not source.is_file() or files.get_file_from_path(uri):
            continue
        if uri.startswith("code/"):
            text = source.read_text(encoding="utf-8")
            page = f"# {path}\n\n````{SOURCES[source.suffix]}\n{text}````\n"
            files.append(File.generated(config, uri, content=page))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    uri = page.file.src_uri
    if uri.startswith("code/"):
        return markdown
    here = posixpath.dirname(in_repository(uri))

    def rewritten(link: re.Match[str]) -> str:
        target = link[2]
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        there = in_site(posixpath.normpath(posixpath.join(here, target)))
        return f"{link[1]}{posixpath.relpath(there, posixpath.dirname(uri) or '.')}{link[3]}"

    return LINK.sub(rewritten, markdown)
