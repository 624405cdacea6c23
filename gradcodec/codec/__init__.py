"""Codecs: a transform, a packer behind it, and a digest that every payload carries.

update --transform.to_code--> z --packer.pack--> body --> Payload       (Encoder)
update <-transform.from_code- z <-packer.unpack- body <-- Payload       (Decoder)

codec     the class ``Codec``: its parts, sizes and codes
halves    Encoder and Decoder: an update to a payload, and payloads back
pins      what a payload says about its codec, and the check of it
folder    a codec from the contents of a codec folder, and back
kinds     which class a config's ``kind`` means
"""

from gradcodec.codec.codec import Codec
from gradcodec.codec.halves import Decoder, Encoder, mean_shares
from gradcodec.codec.kinds import codec_class, register

__all__ = ["Codec", "Decoder", "Encoder", "codec_class", "mean_shares", "register"]
