"""The tiny world: a FLUX pipeline and a CLIP reward small enough for any machine, trained on real digits."""

__all__ = ["ATTRIBUTES"]

#: What is measured on an image: attribute -> the word for a high value, the word for a low one.
ATTRIBUTES = {
    "stroke": ("bold", "thin"),
    "slant": ("slanted", "upright"),
    "aspect": ("wide", "narrow"),
    "colour": ("red", "blue"),
}
