"""Real images of many identities without a download: Unicode characters, rendered in the typefaces of this machine.

An identity is a character, an image is its rendering in one typeface. Matplotlib ships about forty typefaces; with a folder of more fonts,
especially CJK ones, there are tens of thousands of identities.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..cli._progress import tqdm

if TYPE_CHECKING:
    from PIL import ImageFont

Image = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

#: Side of an image, size of its em square, and row of its baseline, in pixels.
SIZE, EM, BASELINE = 32, 24, 24
#: Typefaces whose glyphs do not show their code points: those that draw the number of the code point, and TeX's symbol encodings.
LEFT_OUT = ("lastresort", "cmex", "cmmi", "cmsy")
#: TeX's text fonts, whose encodings agree with Unicode on letters and digits only.
ALPHANUMERIC_ONLY = ("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
#: Unicode categories of characters with a visible glyph: letters, numbers, punctuation, symbols.
CATEGORIES = "LNPS"


@dataclass(frozen=True)
class Glyphs:
    """Renderings, ordered by identity and then by typeface.

    Attributes:
        images: (M, SIZE, SIZE) uint8, ink 255 on 0.
        identities: (M,) int64, indices into ``characters``.
        faces: (M,) int64, indices into ``typefaces``.
        characters: K distinct characters, by code point.
        typefaces: names of font files, with the index inside a collection.
    """

    images: Image
    identities: Indices
    faces: Indices
    characters: list[str]
    typefaces: list[str]

    def subset(self, keep: npt.NDArray[np.bool_]) -> Glyphs:
        """The identities where ``keep`` (K,) is True, renumbered."""
        rows = keep[self.identities]
        renumbered = np.cumsum(keep) - 1
        characters = [c for c, k in zip(self.characters, keep, strict=True) if k]
        return Glyphs(self.images[rows], renumbered[self.identities[rows]], self.faces[rows], characters, self.typefaces)

    def split(self, share: float, seed: int) -> tuple[Glyphs, Glyphs]:
        """Two sets without common identities; the second has ``share`` of the identities, drawn at random."""
        held_out = np.zeros(len(self.characters), dtype=bool)
        held_out[np.random.default_rng(seed).permutation(len(held_out))[: round(share * len(held_out))]] = True
        return self.subset(~held_out), self.subset(held_out)


def font_files(extra: Path | None = None) -> list[Path]:
    """The font files of matplotlib, and those in the folder ``extra`` and its subfolders.

    Raises:
        ValueError: there are none in ``extra``.
    """
    import matplotlib

    folders = [Path(matplotlib.get_data_path()) / "fonts" / "ttf"]
    if extra is not None:
        folders.append(Path(extra))
    files = []
    for folder in folders:
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".otf", ".ttc"))
        if not found:
            raise ValueError(f"fonts: expected a folder with .ttf, .otf or .ttc files, got {folder}")
        files += [p for p in found if not p.name.lower().startswith(LEFT_OUT)]
    return files


def is_identity(character: str) -> bool:
    """Whether a character counts as an identity: it is visible, and not a styled variant of another (such as the mathematical bold A)."""
    return unicodedata.category(character)[0] in CATEGORIES and not unicodedata.decomposition(character).startswith("<font>")


def draw(font: ImageFont.FreeTypeFont, character: str) -> Image | None:
    """(SIZE, SIZE) uint8: the character on the baseline, centered horizontally, shrunk if it is too large; None if it is blank."""
    from PIL import Image as images

    mask, (_, top) = font.getmask2(character, mode="L", anchor="ls")
    width, height = mask.size
    if width == 0 or height == 0:
        return None
    ink = np.frombuffer(bytes(mask), dtype=np.uint8).reshape(height, width)
    if ink.max() < 64:
        return None
    if max(width, height) > SIZE:
        shrink = SIZE / max(width, height)
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        ink = np.asarray(images.fromarray(ink).resize(size, images.Resampling.BOX))
        height, width = ink.shape
    left, top = (SIZE - width) // 2, min(max(BASELINE + top, 0), SIZE - height)
    image = np.zeros((SIZE, SIZE), dtype=np.uint8)
    image[top : top + height, left : left + width] = ink
    return image


@dataclass(frozen=True)
class Typeface:
    """One face of a font file.

    Attributes:
        name: that of the file, with the index inside a collection.
        characters: those that the font has a glyph for and that count as identities, by code point.
    """

    path: Path
    index: int
    name: str
    characters: tuple[str, ...]

    def renderings(self) -> Iterator[tuple[str, Image]]:
        """The characters with their images; those that are blank, or look like a missing glyph, are left out."""
        from PIL import ImageFont

        font = ImageFont.truetype(str(self.path), EM, index=self.index, layout_engine=ImageFont.Layout.BASIC)
        missing = draw(font, "\U0010ffff")  # never assigned: this is the image of a missing glyph
        for character in self.characters:
            image = draw(font, character)
            if image is not None and (missing is None or not np.array_equal(image, missing)):
                yield character, image


def typefaces_of(path: Path) -> list[Typeface]:
    """The typefaces of a font file: several where it is a collection."""
    from fontTools.ttLib import TTFont
    from fontTools.ttLib.ttCollection import TTCollection

    collection = path.suffix.lower() == ".ttc"
    found = []
    for index, table in enumerate(TTCollection(path, lazy=True).fonts if collection else [TTFont(path, lazy=True)]):
        characters = tuple(c for c in map(chr, sorted(table.getBestCmap() or {})) if is_identity(c))
        if path.stem in ALPHANUMERIC_ONLY:
            characters = tuple(c for c in characters if c.isalnum() and c.isascii())
        found.append(Typeface(path, index, f"{path.stem}#{index}" if collection else path.stem, characters))
    return found


def load(extra: Path | None = None, *, min_typefaces: int = 6, max_identities: int | None = None, seed: int = 0) -> Glyphs:
    """Render every character that is in enough typefaces.

    Characters that some typeface draws identically, such as the Latin, Greek and Cyrillic A, count as one identity: only the first by code
    point is used. Of identical images of one identity, only the first is used.

    Args:
        extra: a folder with more fonts.
        min_typefaces: smallest number of distinct images of an identity.
        max_identities: use only this many identities, drawn at random.

    Raises:
        ValueError: naming the argument, where fewer than 2 identities remain.
    """
    images: dict[str, dict[bytes, int]] = {}  # character -> image -> the first typeface with this image
    duplicates: set[str] = set()
    typefaces: list[str] = []
    for path in tqdm(font_files(extra), desc="render", unit="font"):
        try:
            for typeface in typefaces_of(path):
                seen: dict[bytes, str] = {}
                for character, image in typeface.renderings():
                    pixels = image.tobytes()
                    if seen.setdefault(pixels, character) != character:
                        duplicates.add(character)
                    images.setdefault(character, {}).setdefault(pixels, len(typefaces))
                typefaces.append(typeface.name)
        except Exception as error:  # font files may be broken, and their parsers may raise anything
            print(f"skipped {path.name}: {error}")
    characters = sorted(c for c, found in images.items() if c not in duplicates and len(found) >= min_typefaces)
    if max_identities is not None and len(characters) > max_identities:
        characters = sorted(np.random.default_rng(seed).permutation(characters)[:max_identities].tolist())
    if len(characters) < 2:
        raise ValueError(f"min_typefaces: no two characters have {min_typefaces} distinct renderings in {len(typefaces)} typefaces")
    flat = [(pixels, k, face) for k, c in enumerate(characters) for pixels, face in images[c].items()]
    return Glyphs(
        images=np.frombuffer(b"".join(p for p, _, _ in flat), dtype=np.uint8).reshape(-1, SIZE, SIZE),
        identities=np.array([k for _, k, _ in flat]),
        faces=np.array([f for _, _, f in flat]),
        characters=characters,
        typefaces=typefaces,
    )
