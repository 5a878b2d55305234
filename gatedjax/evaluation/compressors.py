"""What general-purpose compressors need for a text: the first bar a language model of bytes has to clear."""

import gzip
import lzma


def bits_per_byte_of_compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9e` on all of `text` in one stream."""
    return {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }
