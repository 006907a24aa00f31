"""The manual: `make docs` builds it into build/docs, without a network; every warning is an error."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import document
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import liplayers  # noqa: E402
from docs import pages  # noqa: E402

project = "liplayers"
author = "The liplayers authors"
copyright = author
version = release = liplayers.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
]
exclude_patterns = ["__pycache__"]
default_role = "py:obj"  # single backquotes in docstrings name code, and become links where it is ours or torch's
smartquotes_action = "D"  # dashes; quotes stay as they are typed

nb_execution_mode = "off"  # the tests run the notebooks; their stored outputs are shown
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autosummary_generate = False
python_maximum_signature_line_length = 88
napoleon_use_param = False  # several arguments may share a line
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"liplayers {release}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

GENERATED = HERE / "generated"
pages.write(GENERATED)
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable", str(GENERATED / "torch.inv"))}


COPIED = {"benchmarks/results/": "results/", "notebooks/": "notebooks/", "configs)": "recipes.md)"}


def docstring_is_plain_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    described = what != "data" or "\n".join(lines).strip() != inspect.getdoc(type(obj))  # a dict's is about dicts
    lines[:] = pages.escaped(lines) if described else []


def repository_links(app: Sphinx, name: str, source: list[str]) -> None:
    """Links that work in the repository work in the manual, where what is outside docs/ was copied into it."""
    root = "../" * (name.count("/") + 1)
    for outside, inside in COPIED.items():
        source[0] = source[0].replace(f"]({root}{outside}", f"](/generated/{inside}")


def link_names(app: Sphinx, doctree: document, name: str) -> None:
    """Code in a text that is the name of something public is a link to its reference."""
    domain = app.env.domains.python_domain
    for literal in list(doctree.findall(nodes.literal)):
        target = pages.PUBLIC.get(literal.astext())
        inside = isinstance(literal.parent, nodes.reference)
        if target is None or inside or target not in domain.objects:
            continue
        entry = domain.objects[target]
        reference = make_refnode(app.builder, name, entry.docname, entry.node_id, literal.deepcopy(), target)
        literal.replace_self(reference)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", docstring_is_plain_text, priority=400)  # before napoleon
    app.connect("source-read", repository_links)
    app.connect("doctree-resolved", link_names)
