"""Codec folders on disk, in the package and on the Hugging Face Hub. Knows nothing about codecs.

    config.json         what the codec is, its tensor table, a SHA-256 per weight, its digest
    model.safetensors   the weights, and nothing else
    README.md           the card

Reading is strict: an unknown key, a missing or extra weight, or one flipped bit is an error that
says what was expected and what came. There is no pickle anywhere, and no fallback to one.

    folder     the contents of a codec folder: config, tensor table, weights, digests
    document   config.json: schema, migrations, checks
    card       README.md
    local      folders on disk and in the package
    remote     repositories on the Hub
    names      finds the folder or repository that a codec's name means
"""

from gradcodec.hub.card import make_card
from gradcodec.hub.document import MAX_CONFIG_BYTES, MIGRATIONS, SCHEMA
from gradcodec.hub.folder import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, Folder
from gradcodec.hub.local import bundled, write
from gradcodec.hub.names import read
from gradcodec.hub.remote import push

__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "MAX_CONFIG_BYTES",
    "MIGRATIONS",
    "SCHEMA",
    "WEIGHTS_NAME",
    "Folder",
    "bundled",
    "make_card",
    "push",
    "read",
    "write",
]
