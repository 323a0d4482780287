"""The frame of a page: one HTML file without scripts and without anything fetched."""

from quantkit.pages import figures


def render(package: str, template: str, **values: object) -> str:
    """A template that lies in a package and extends `frame.html.j2`, filled in; a name that nobody gave is an error."""
    from jinja2 import Environment, PackageLoader, PrefixLoader, StrictUndefined

    environment = Environment(
        loader=PrefixLoader({"pages": PackageLoader("quantkit.pages", "."), "own": PackageLoader(package, ".")}),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(f"own/{template}")
    return page.render(dashes=figures.DASHES, colors=figures.SERIES_COLORS, **values)
