"""The plot library that a page carries: plotly.js with only its two-dimensional charts, compressed.

plotly's Python package ships all of plotly.js, with maps and 3D: 4.8 MB. This part has 1.5 MB and takes 0.66
MB of a page. A page unpacks it itself, and its policy admits exactly the text that npm publishes as
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
    """The unpacked library's hash, as written in a content security policy."""
    return f"'sha256-{base64.b64encode(bytes.fromhex(SHA256)).decode()}'"
