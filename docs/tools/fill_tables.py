"""Fill the tables of mutual-vs-one-way.md and reproduced.md from the studies that were run.

    python docs/tools/fill_tables.py runs           # runs/attribution, runs/fd, ...
    python docs/tools/fill_tables.py runs --check   # exit status 1 where a table is another one

A table stands between ``<!-- attribution: STUDY KIND -->`` or ``<!-- reproduced: STUDY -->`` and
``<!-- end -->``. That of a study that has not ended in the folder stays as it is; no figure is
typed.
"""

import re
import sys
from pathlib import Path

import attribution_tables
import reproduced_tables

DOCS = Path(__file__).parents[1]
PAGES = ("mutual-vs-one-way.md", "reproduced.md")
BLOCK = re.compile(
    r"(<!-- (attribution|reproduced): ([a-z-]+) ?(arms|pairs)? -->\n)(.*?)(?=<!-- end -->)",
    re.DOTALL,
)


def filled(text: str, runs: Path) -> str:
    """Return a page with the tables of the studies that are in a folder."""

    def fresh(block: re.Match[str]) -> str:
        start, about, name, kind, before = block.groups()
        study = runs / name
        if not (study / "study.json").exists():
            return start + before
        if about == "reproduced":
            return start + reproduced_tables.table(study)
        return start + attribution_tables.table(study, kind)

    return BLOCK.sub(fresh, text)


def main() -> int:
    """Rewrite the pages, or only check them."""
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    if len(words) != 1:
        sys.stderr.write(f"usage: {Path(__file__).name} RUNS [--check]\n")
        return 2
    stale = False
    for page in (DOCS / name for name in PAGES):
        old = page.read_text(encoding="utf-8")
        new = filled(old, Path(words[0]))
        stale |= new != old
        if "--check" not in sys.argv[1:]:
            page.write_text(new, encoding="utf-8")
    return int(stale and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
