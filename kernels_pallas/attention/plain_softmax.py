"""What two kernels leave out that know softmax over whole rows only."""

from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions
from kernels_pallas.attention.kernels import unsupported_other_keys
from kernels_pallas.attention.normalizers.base import Softmax


def unsupported_beside_softmax(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why such a kernel cannot take a call, or None when nothing of this is in its way."""
    refusal = unsupported_other_keys(inputs, options)
    if refusal is not None:
        return refusal
    if type(options.normalizer) is not Softmax:
        return f"takes softmax, not {type(options.normalizer).__name__}"
    if inputs.alibi_slopes is not None:
        return "takes no alibi_slopes"
    if inputs.sink_logits is not None:
        return "takes no sink_logits"
    if inputs.segment_ids is not None:
        # cuDNN has documents as offsets, a number of them that is known before; or a mask [T, T].
        return "takes no segment_ids"
    return None
