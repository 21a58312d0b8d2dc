"""The tiny world's untrained models: a small VAE, CLIP, T5 encoder and FLUX transformer from the stock classes."""

from __future__ import annotations

from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from srpo.tiny.digits import SIZE
from srpo.tiny.words import LENGTH

__all__ = ["CHANNELS", "WIDTH", "clip", "t5", "transformer", "unet", "vae"]

CHANNELS = 4  # of the latents; FLUX packs 2x2 of them into a token of 16
WIDTH = 64  # of the text states, the pooled text and CLIP's shared space


def vae() -> AutoencoderKL:
    """32x32 images to 8x8 latents of 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Two 64-wide towers; the image tower sees 8x8 patches."""
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "projection_dim": WIDTH,
    }
    text = {
        **tower,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A two-layer encoder without dropout."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            num_heads=4,
            d_ff=2 * WIDTH,
            num_layers=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def transformer() -> FluxTransformer2DModel:
    """One double and four single blocks of three 32-wide heads: FLUX.1-dev's layout, with embedded guidance."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def unet() -> UNet2DConditionModel:
    """Two levels, 8x8 and 4x4; the latter, where a digit's shape is, also reads the text. For `srpo.tiny.epsilon`."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 64),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # heads, by diffusers' historical name
        norm_num_groups=8,
    )
