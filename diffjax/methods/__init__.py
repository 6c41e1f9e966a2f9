"""Methods: how a backbone is trained and how it makes samples. A new one is a file here and a row of the table."""

from diffjax.contracts import MethodRecord
from diffjax.methods import diffusion, reconstruction, tokens

METHODS: dict[str, MethodRecord] = {
    "diffusion": diffusion.RECORD,
    "tokens": tokens.RECORD,
    "reconstruction": reconstruction.RECORD,
}
