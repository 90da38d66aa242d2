"""HTML pages: templates filled with text that is redacted, visible and escaped."""

from pathlib import Path
from typing import Any

import jinja2

from rm_recipe.evaluation.format import visible
from rm_recipe.redaction import redact

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: Path, **values: Any) -> str:
    """A page of a template, which may use those of `TEMPLATES`. Markup of our own passes as it is."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    return environment.get_template(template.name).render(**values)


def _finalize(value: Any) -> Any:
    return visible(redact(value)) if type(value) is str else value
