"""How a run's plots look: colors, and a font for each script that their names are written in."""

import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrelay.errors import NoFontWarning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which color-blind people can tell apart.
COLORS = {"train": "#0072B2", "validation": "#009E73", "test": "#D55E00"}
INK, SOFT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
DPI = 200
_FONT = "DejaVu Sans"  # comes with matplotlib, so a plot looks the same everywhere
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": "#bdbdbd",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a $ in a run's or a class's name is a $
}


@contextmanager
def styled(names: Sequence[str] = ()) -> Iterator[None]:
    """Make figures in this context, whose texts hold names of a run's own; a letter without a font is a box."""
    import matplotlib as mpl

    fonts = [_FONT, *_more_fonts("".join(names))]
    with mpl.rc_context(_STYLE | {"font.family": fonts}), without_glyph_warnings():
        yield


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Draw letters without a font as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    with without_glyph_warnings():
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


# ------------------------------------------------------------------------------------------------ fonts

# In a family's name or its file's, what a text without emphasis is better not written in.
_UNLIKE = ("serif", "mono", "color", "condensed", "light", "thin", "black", "italic", "fallback", "lastresort")


def _more_fonts(text: str) -> list[str]:
    """Return the families of the system that have the letters of a text that our font lacks; warn if none has."""
    from matplotlib.font_manager import findfont, fontManager
    from matplotlib.ft2font import FT2Font

    if text.isascii():
        return []
    lacking = {ord(letter) for letter in text if _is_drawn(letter)} - set(FT2Font(findfont(_FONT)).get_charmap())
    # Of the system, not of matplotlib's own list, which is made once and knows no font that was installed later.
    files = _files_with(lacking) if lacking else []
    families = []
    while lacking and files:
        best = max(files, key=lambda each: len(lacking & each[1]))  # of equal ones the first
        if not lacking & best[1]:
            break
        lacking -= best[1]
        known = {entry.fname for entry in fontManager.ttflist}
        # All files of its family, such as that of bold letters.
        same = [str(path) for path, _, family in files if family == best[2]]
        for path in same:
            if path not in known:
                fontManager.addfont(path)
        families.append(_face([entry.name for entry in fontManager.ttflist if entry.fname in same], text))
    if lacking:
        warnings.warn(_without_font(chr(min(lacking))), NoFontWarning, stacklevel=2)
    return families


def _without_font(letter: str) -> str:
    """Return what to say of a letter that no font has."""
    script, package = unicodedata.name(letter, "unknown").split()[0], "fonts-noto-core"
    if unicodedata.category(letter).startswith("S"):
        script, package = "symbols and emoji", "fonts-symbola"
    elif script in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL"):
        package = "fonts-noto-cjk"
    script = script.capitalize() if script.isupper() and script != "CJK" else script
    return (
        f"the plots show a box in place of {letter}: no font of this system has its script ({script}); "
        f"install one, such as the package {package}"
    )


def _is_drawn(letter: str) -> bool:
    """Return whether a letter has a shape of its own: joiners and variation selectors haven't."""
    kind = unicodedata.category(letter)
    return not (kind.startswith("Z") or kind in ("Cc", "Cf") or 0xFE00 <= ord(letter) <= 0xFE0F)


def _files_with(letters: set[int]) -> list[tuple[Path, set[int], str]]:
    """Return the system's font files with some letters: (path, which of them, family), the plainest first."""
    from matplotlib.font_manager import findSystemFonts
    from matplotlib.ft2font import FT2Font

    found = []
    for path in map(Path, findSystemFonts()):
        try:
            font = FT2Font(str(path))
            own = letters & set(font.get_charmap())
        except (RuntimeError, OSError):  # a format that matplotlib can't draw
            continue
        if own and font.scalable:
            found.append((path, own, font.family_name))
    return sorted(found, key=lambda each: (_unlike(f"{each[2]} {each[0].name}"), each[2], each[0]))


def _unlike(name: str) -> int:
    """Return by how many traits a font differs from ours."""
    return sum(trait in name.casefold() for trait in _UNLIKE)


def _face(families: Sequence[str], text: str) -> str:
    """Return the family that suits a text; a file of Chinese, Japanese and Korean has one for each."""
    scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in text}
    suffix = "KR" if "HANGUL" in scripts else "JP" if scripts & {"HIRAGANA", "KATAKANA"} else "SC"
    return min(families, key=lambda family: (not family.endswith(suffix), _unlike(family)))
