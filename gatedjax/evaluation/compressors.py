"""What compressors need for a text: the first bar a language model of bytes has to clear.

They get the documents one after another, without marks between them. A model also predicts where
each one ends, and has to pay for that.
"""

import gzip
import lzma


def bits_per_byte_of_compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9e` on all of `text` in one stream."""
    compressed = {
        "gzip -9": gzip.compress(text, 9),
        "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(stream) / len(text) for name, stream in compressed.items()}
