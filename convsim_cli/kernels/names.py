"""What the name of a tensor in a file says of it. Names are split at dots and slashes, and then into words."""

from __future__ import annotations

import re
from functools import cache

_WEIGHT = re.compile(r"weights?|kernels?|w")  # the last word of a kernel's name, where it has any of these
_NO_KERNEL = re.compile(  # a word in the last part of a name: a statistic, a gain, an embedding or a table
    r"running|moving|mean|var|variance|std|gamma|beta|scales?|bias|biases|ls|tokens?|emb|embeds?|embeddings?|pos|"
    r"positions?|positional|relative|rel|mask|anchors?|grid|freqs?|temperature|codebook|prototypes?|index|indices|table"
)
_FIXED = re.compile(  # a word anywhere in the name of a filter that no training changes
    r"blur|blurpool|antialias|gauss|gaussian|sobel|laplace|laplacian|scharr|prewitt|gabor|sift|toeplitz|haar|i?dwt|"
    r"wavelet|i?dct|i?stft|hann|hamming|srm|ssim|smoothing|binomial|lowpass|highpass|filt|fir"
)
_TRANSPOSED = re.compile(  # anywhere in a name
    r"(?<![a-z])(de|up|t|trans|transposed?)_?conv|deconv|conv\w*_?transposed?|conv_?t(?![a-z])"
)
_UPWARD = re.compile(r"ups?([_\d]\w*)?|up_?sampl\w*|\w+_up")  # the name of the layer itself


def weight_word(name: str) -> str | None:
    """Return the word that ends a name as those of layers' weights do, None for any other name."""
    word = _last_word(name)
    return word if _WEIGHT.fullmatch(word) else None


def says_no_kernel(name: str) -> bool:
    """Return whether a name is that of a statistic, a gain, an embedding or a table: `running_mean`, `pos_embed`."""
    return not weight_word(name) and any(map(_NO_KERNEL.fullmatch, _words(_parts(name)[-1])))


def says_fixed(name: str) -> bool:
    """Return whether a name is that of a filter which no training changes, such as `blur.kernel`."""
    return any(_FIXED.fullmatch(word) for part in _parts(name) for word in _words(part))


def says_transposed(name: str) -> bool:
    """Return whether a name is one that transposed convolutions often have: `deconv1.weight`, `up.0.weight`."""
    layers = [part.lower() for part in _parts(name) if not _WEIGHT.fullmatch(part.lower())]
    own = next((part for part in reversed(layers) if not part.isdecimal()), "")
    return any(_TRANSPOSED.search(part) for part in layers) or _UPWARD.fullmatch(own) is not None


def _last_word(name: str) -> str:
    return (_words(_parts(name)[-1]) or ("",))[-1]


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name)


@cache
def _words(part: str) -> tuple[str, ...]:
    """Return the words of a part, in small letters: `RelativePosition_bias2` has relative, position and bias."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part))
