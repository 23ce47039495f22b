"""How Sphinx builds this site: offline, from Markdown and docstrings. ``scripts/docs.sh`` runs it."""

from __future__ import annotations

from dist_export import __version__

project = "dist_export"
version = release = __version__
copyright = "the authors of dist_export"  # noqa: A001 -- Sphinx's name

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
templates_path: list[str] = []

html_theme = "furo"
html_title = "dist_export"
html_static_path = ["_static"]
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# A type of another library, or of a module that is no part of the documented interface, has no page here.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(np|numpy|torch|os|pathlib|collections|typing|msgspec|ExportedProgram|OnnxProgram|NativeProgram|PathLike).*",
    ),
    ("py:.*", r"(Any|Mapping|Sequence|Literal|Union|Count|Shape|optional|CastDtype|UnsetType)"),
    ("py:.*", r"(ValueError|Exception)"),
    ("py:.*", r"dist_export\.(storage|archive|formats|checkpoint)\..*|Directory"),
]

highlight_language = "none"  # most blocks are shell sessions, listings and trees; those in a language say so
