"""Text files of a bundle, from the templates in `serve/`."""

from pathlib import Path

import jinja2


def templates() -> Path:
    """The folder of bundle templates: inside the package when it is installed, `serve/` in a checkout."""
    packaged = Path(__file__).parent / "templates"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "serve"


def render(template: str, **values: object) -> str:
    """One template, filled in; a name that it asks for and nobody gave is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)
