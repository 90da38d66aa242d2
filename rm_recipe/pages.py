"""HTML pages: templates of this package filled with text that is redacted, visible and escaped."""

from pathlib import Path
from typing import Any

import jinja2

from rm_recipe.redaction import redact
from rm_recipe.report_text import visible


def render_page(template: str, **values: Any) -> str:
    """A page of one of the package's templates. Markup of our own passes as it is."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    return environment.get_template(template).render(**values)


def _finalize(value: Any) -> Any:
    return visible(redact(value)) if type(value) is str else value
