"""Pages from templates: texts are escaped, and nothing in them moves a cursor."""

from pathlib import Path
from typing import Any

from fedkd.names import printable
from sim.reports.html.tables import breakable

TEMPLATES = Path(__file__).parent / "templates"


def template(name: str) -> Any:
    """Return one of the pages in ``templates``, to be rendered."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Autoescape leaves control characters as they are.
        finalize=lambda value: (
            printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    environment.filters["breakable"] = lambda title: Markup(" ").join(
        Markup("<wbr>").join(printable(breakable(word)).split()) for word in title.split()
    )
    environment.tests["markup"] = lambda value: isinstance(value, Markup)
    return environment.get_template(name)
