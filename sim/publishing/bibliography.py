"""`cite`: what the algorithms, the data and the tools of a study are from, as BibTeX.

An algorithm names its source in its docstring, by a link. The entries of ``references.bib`` are
found by that link, so that nothing has to be kept twice.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedkd.names import nearest
from sim.settings import SettingsError
from strategies import STRATEGIES
from strategies.contract.card import description_of

REFERENCES_FILE = Path(__file__).with_name("references.bib")

_ENTRY = re.compile(r"^@(\w+)\{([\w-]+),\n(.*?)^\}$", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^  (\w+) = \{(.*)\},$", re.MULTILINE)
_LINK = re.compile(r"https?://[^\s)]+")


@dataclass(frozen=True, slots=True)
class Reference:
    """An entry of ``references.bib``.

    Attributes:
        key: by which it is cited.
        kind: of BibTeX: ``article``, ``inproceedings``, ...
        fields: by name, as BibTeX has them.
        text: the entry as it stands in the file.
    """

    key: str
    kind: str
    fields: Mapping[str, str]
    text: str

    @property
    def plain(self) -> str:
        """The entry as a line of text."""
        authors = self.fields["author"].replace(" and others", " et al.").replace(" and ", "; ")
        where = next(
            (
                self.fields[name]
                for name in ("journal", "booktitle", "institution", "publisher", "howpublished")
                if name in self.fields
            ),
            "",
        )
        parts = [f"{authors}, {self.fields['year']}", self.fields["title"], where]
        line = ". ".join(part for part in parts if part) + "."
        return " ".join([_without_tex(line), *filter(None, [self.fields.get("url")])])


def _without_tex(text: str) -> str:
    accents = {r"\"u": "ü", r"\'\i": "í", r"\'e": "é"}
    for written, letter in accents.items():
        text = text.replace(f"{{{written}}}", letter).replace(written, letter)
    return text.replace("{", "").replace("}", "").replace("--", "-")


@cache
def references() -> Mapping[str, Reference]:
    """Return all entries by their keys, in the order of the file."""
    text = REFERENCES_FILE.read_text(encoding="utf-8")
    return {
        key: Reference(key, kind, dict(_FIELD.findall(body)), f"@{kind}{{{key},\n{body}}}\n")
        for kind, key, body in _ENTRY.findall(text)
    }


def links_of(algorithm: str) -> list[str]:
    """Return the links by which the docstring of an algorithm names what it is from.

    That is its ``Source:``; where it has none, every link of its docstring.

    Raises:
        SettingsError: for a name that is no algorithm of ours, with the nearest that is.
    """
    if algorithm not in STRATEGIES:
        raise SettingsError(
            f"unknown algorithm {algorithm!r}{nearest(algorithm, STRATEGIES)}; known: "
            f"{', '.join(STRATEGIES)}"
        )
    strategy = STRATEGIES[algorithm]
    text = description_of(strategy).source or sys.modules[strategy.__module__].__doc__ or ""
    return [link.rstrip(".,;") for link in _LINK.findall(text)]


def keys_of(algorithm: str) -> list[str]:
    """Return the keys of what an algorithm is from; none where it is nobody else's."""
    by_link = {
        entry.fields["url"]: key for key, entry in references().items() if "url" in entry.fields
    }
    return [by_link[link] for link in dict.fromkeys(links_of(algorithm)) if link in by_link]


def bibtex(keys: Iterable[str]) -> str:
    """Return entries as BibTeX, each once, in the order of the file."""
    wanted = set(keys)
    return "\n".join(entry.text for key, entry in references().items() if key in wanted)


def plain_text(keys: Iterable[str]) -> str:
    """Return entries as lines of text, each once, in the order of the file."""
    wanted = set(keys)
    return "".join(
        f"[{key}] {entry.plain}\n" for key, entry in references().items() if key in wanted
    )
