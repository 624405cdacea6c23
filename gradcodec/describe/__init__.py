"""What ``gradcodec inspect`` says about payloads, codecs, updates and architectures.

    facts        in words, as label -> text
    sources      finds what a name or a file means
    allocation   code values and bytes over the tensors
    spectrum     singular values of an update and of a codec's bases
    fidelity     what is lost of an update, in all and per tensor
    kinds        the same parameter in all layers, as one line
    chart        numbers to be drawn
    bars         a chart as text
    target       which of these a target has

Nothing here prints or needs matplotlib; ``gradcodec.picture`` draws charts as PNG.
"""

from gradcodec.describe.bars import draw
from gradcodec.describe.chart import Chart, Row
from gradcodec.describe.facts import ARCHITECTURES, architecture, codec, payload, versions
from gradcodec.describe.target import Report, report

__all__ = [
    "ARCHITECTURES",
    "Chart",
    "Report",
    "Row",
    "architecture",
    "codec",
    "draw",
    "payload",
    "report",
    "versions",
]
