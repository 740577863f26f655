"""The plot library that a page carries: plotly.js with its charts in two dimensions, compressed.

plotly's Python package ships all of plotly.js, with maps and 3D, in 4.8 MB; this part of it has 1.5 MB and, packed into
a page, 0.66 MB. A page unpacks it by itself, and its policy admits exactly the text that npm publishes:
plotly.js-cartesian-dist-min, MIT licence (plotly/LICENSE).
"""

from __future__ import annotations

import base64
from importlib import resources

VERSION = "4.1.1"
SHA256 = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"  # of plotly-cartesian.min.js


def compressed() -> bytes:
    """gzip."""
    return (resources.files("fedloom.report") / "plotly" / "plotly-cartesian.min.js.gz").read_bytes()


def admitted() -> str:
    """The unpacked library, as a content security policy names it."""
    return f"'sha256-{base64.b64encode(bytes.fromhex(SHA256)).decode()}'"
