"""Every error a user can meet, one class per thing that can be wrong.

A message says what was expected and what was given. Classes double as the built-in exception a
caller would guess (``ValueError`` for bad values), so generic handlers keep working.
"""


class GradcodecError(Exception):
    """Root of every error raised on purpose by gradcodec."""


class ConfigError(GradcodecError, ValueError):
    """A setting is unknown, out of range, or does not fit the model or the machine."""


class AgreementError(ConfigError):
    """Ranks differ in something that must be equal; every rank raises the same message."""


class UpdateError(GradcodecError, ValueError):
    """An update's names, shapes or dtypes are not the ones the codec was made for."""


class NonFiniteError(UpdateError):
    """A lossy codec was given NaN or Inf; sending it would poison every participant."""


class TrainingError(GradcodecError, RuntimeError):
    """Fitting or fine-tuning cannot go on, for example when every client of a round failed."""


class EmptyClientError(TrainingError):
    """A client has no examples to train on, so its update would mean nothing."""


class HubError(GradcodecError, OSError):
    """A codec folder or Hub repository is missing, unreachable, incomplete or altered."""


class WireError(GradcodecError, ValueError):
    """Bytes are not a payload this decoder may read. Root of all decoding errors."""


class TruncatedError(WireError):
    """The bytes end before the payload does."""


class BadMagicError(WireError):
    """The bytes do not start with the gradcodec magic: not a payload at all."""


class UnsupportedVersionError(WireError):
    """The payload was written by another wire version."""


class UnknownCodecError(WireError):
    """This version has no codec with the id on the wire."""


class BadFlagsError(WireError):
    """A reserved flag bit is set."""


class ChecksumError(WireError):
    """The checksum does not match: the payload was altered on its way."""


class LimitError(WireError):
    """A length on the wire is over the limit, or not in its shortest form."""


class TrailingBytesError(WireError):
    """Bytes follow the end of the payload."""


class MalformedSpecError(WireError):
    """The inline tensor table is not a valid one (names, dtypes, shapes)."""


class MalformedBodyError(WireError):
    """The body's length or values cannot come from this codec's encoder."""


class CodecMismatchError(WireError):
    """The payload belongs to another codec, other weights, another update or another base."""


class UnexpectedReplyError(CodecMismatchError):
    """A well-formed reply that this round does not expect: not invited, late, or a second one."""
