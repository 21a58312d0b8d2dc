"""`qk_norm_rope` of two streams of tokens, written as the one sequence that joint attention reads."""

from __future__ import annotations

from torch import Tensor

from srpo_kernels.ops._register import describe
from srpo_kernels.ops.qk_norm_rope import QkNormRope, check_arguments

__all__ = ["joint_qk_norm_rope"]


def joint_qk_norm_rope(
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    image_q_weight: Tensor,
    image_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """The q, k and v of joint attention: text first, q and k as `qk_norm_rope` makes them, v copied.

    Args:
        text_q, text_k, text_v: [B, St, H, D], fp32, fp16 or bf16 (float64 for checking); D even, at most 256. Views
            whose last dimension is contiguous are read in place if the three share their strides.
        image_q, image_k, image_v: [B, Si, H, D], likewise.
        text_q_weight, text_k_weight, image_q_weight, image_k_weight: [D].
        cos, sin: [St + Si, D], no gradient.
        eps: added to the mean square.

    Returns:
        (q, k, v), each [B, St + Si, H, D], contiguous, in the dtypes of the text; computed in fp32. Differentiable in
        all but cos and sin; backward needs only the inputs. For a single image the gradients of text_v and image_v
        are views of v's.

    Raises:
        TypeError: an argument is not floating. ValueError: shapes or devices do not fit, D is odd or too large, or cos
        or sin requires a gradient.
    """
    check_arguments(
        "joint_qk_norm_rope",
        [
            {"text_q": text_q, "text_k": text_k, "text_v": text_v},
            {"image_q": image_q, "image_k": image_k, "image_v": image_v},
        ],
        {
            "text_q_weight": text_q_weight,
            "text_k_weight": text_k_weight,
            "image_q_weight": image_q_weight,
            "image_k_weight": image_k_weight,
        },
        cos,
        sin,
    )
    weights = (weight.contiguous() for weight in (text_q_weight, text_k_weight, image_q_weight, image_k_weight))
    inputs = (text_q, text_k, image_q, image_k)
    return QkNormRope.apply(cos.contiguous(), sin.contiguous(), eps, *inputs, *weights, text_v, image_v)


describe(
    joint_qk_norm_rope,
    formula="qk_norm_rope of text and image, each with its weights, as one sequence; v concatenated",
    shapes="text [B, St, H, D], image [B, Si, H, D], weights [D], cos and sin [St + Si, D] -> [B, St + Si, H, D]",
    saved="none",
    floor="forward: read 1, write 1 (for each of q, k, v); backward: read 2, write 1 (for each of q, k)",
    schemas=("qk_norm_rope_fwd", "qk_norm_rope_bwd"),
)
