"""What mkdocs is told beside mkdocs.yml: generated pages, and links that only the site has.

The pages in docs/ can be read as they are. Here the long ones are cut where the site has a page for
each part, and files outside docs/ that pages link to are taken along.
"""

import posixpath
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# What our libraries will change one day is nothing that this build can tell.
with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    import algorithm_pages

    from strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)\s:#]*)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages where mkdocs.yml names their sections."""
    undocumented = reference.problems()
    if undocumented:
        raise PluginError("\n".join(undocumented))
    families = algorithm_pages.by_family()
    filled: dict[str, list[Any]] = {
        "Algorithms": [
            {title: [f"algorithms/{name}.md" for name in names]}
            for title, names in families.items()
        ],
        "Reference": [
            {group: [f"reference/{name}.md" for name in rooms]}
            for group, rooms in reference.ROOMS.items()
        ],
    }
    for section in config.nav or []:
        for title, pages in section.items():
            if title in filled:
                section[title] = [*pages, *filled.pop(title)]
    if filled:
        raise PluginError(f"mkdocs.yml's nav lacks {', '.join(filled)}")
    return config


def _sections(folder: str, groups: Mapping[str, Iterable[str]]) -> list[dict[str, list[str]]]:
    return [{title: [f"{folder}/{name}.md" for name in names]} for title, names in groups.items()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and files outside docs/ that a page links to."""
    for name, text in algorithm_pages.pages():
        files.append(File.generated(config, f"algorithms/{name}.md", content=text))
    for _, name, text in reference.pages():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    for page in files.documentation_pages():
        for target, _ in LINK.findall(page.content_string):
            outside = _outside(page.src_uri, target)
            if outside and files.get_file_from_path(f"files/{outside}") is None:
                path = ROOT / outside
                if not path.is_file():
                    raise PluginError(f"{page.src_uri}: {target}: no such file")
                files.append(File.generated(config, f"files/{outside}", abs_src_path=str(path)))
    return files


def _outside(page: str, target: str) -> str:
    """Return a link's path from the repository's root, where it leads out of docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return "" if not target or path.startswith("docs/") else path


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Cut what has pages of its own, and lead links to where things stand on the site."""
    here = page.file.src_uri
    if here == "algorithms.md":
        markdown = _replaced(markdown, "<!-- generated: algorithm cards -->", "<!-- end -->")
    if here == "strategies.md":
        for entry in algorithm_pages.entries():
            markdown = re.sub(
                rf"^## {entry}\n.*?(?=^## )", "", markdown, flags=re.MULTILINE | re.DOTALL
            )
    # An algorithm's page is made of pieces of pages in docs/ itself.
    origin = "strategies.md" if re.fullmatch(r"algorithms/\w+\.md", here) else here

    def led(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        outside = _outside(origin, target)
        if outside:
            return f"]({_relative(f'files/{outside}', here)}{anchor})"
        base = posixpath.dirname(origin)
        path = posixpath.normpath(posixpath.join(base, target)) if target else origin
        if path in ("strategies.md", "algorithms.md") and anchor[1:] in STRATEGIES:
            path, anchor = f"algorithms/{anchor[1:]}.md", ""
        elif origin == here and not target:
            return link[0]
        return f"]({_relative(path, here)}{anchor})"

    return LINK.sub(led, markdown)


def _replaced(markdown: str, start: str, end: str) -> str:
    before, rest = markdown.split(start, 1)
    return before + algorithm_pages.overview() + rest.split(end, 1)[1]


def _relative(path: str, here: str) -> str:
    return posixpath.relpath(path, posixpath.dirname(here) or ".")
