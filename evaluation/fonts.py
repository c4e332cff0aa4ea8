"""Fonts for names with letters that the usual fonts of LaTeX and Matplotlib lack, such as Chinese ones.

Matplotlib is imported where it is used: workers import this file.
"""

from collections.abc import Iterable
from functools import cache

LATIN = range(0x370)  # letters beyond need a font of their own in LaTeX


def letters(texts: Iterable[str], covered: Iterable[int]) -> str:
    """The letters in texts but those in `covered`."""
    return "".join(sorted({letter for text in texts for letter in text if letter.isalpha()} - {*map(chr, covered)}))


@cache
def family_for(needed: str) -> str | None:
    """A font family of this system that has these letters, known to Matplotlib from then on; None if there is none."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    fonts = []
    for path in font_manager.findSystemFonts():  # not Matplotlib's list, which lacks fonts installed since it was made
        try:
            font = FT2Font(path)
        except (OSError, RuntimeError):  # a kind of font that it cannot read
            continue
        if font.style_name in ("Regular", "Book", "Medium") and font.get_charmap().keys() >= {*map(ord, needed)}:
            fonts.append(("Sans" not in font.family_name, font.family_name, path))
    if not fonts:
        return None
    _, family, path = min(fonts)
    font_manager.fontManager.addfont(path)
    return family


def families(texts: Iterable[str]) -> tuple[list[str], str]:
    """The font families in which Matplotlib can draw texts, and the letters that no font of this system has."""
    from matplotlib import font_manager, rcParams
    from matplotlib.ft2font import FT2Font

    usual = list(rcParams["font.family"])
    needed = letters(texts, FT2Font(font_manager.findfont(font_manager.FontProperties(family=usual))).get_charmap())
    if not needed:
        return usual, ""
    family = family_for(needed)
    return ([*usual, family], "") if family else (usual, needed)
