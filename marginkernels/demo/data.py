"""Real images of many identities that every machine already has: the characters of Unicode, as the typefaces at hand draw them.

An identity is a character, an image its rendering in one typeface. Matplotlib ships some forty typefaces; a folder with more of them,
CJK ones above all, makes tens of thousands of identities.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..progress import tqdm

#: Side of an image, size of the em square in it, and its baseline, in pixels.
SIZE, EM, BASELINE = 32, 24, 24
#: Typefaces whose characters are not what their code points say: drawings of the code point itself, and TeX's symbol encodings.
LEFT_OUT = ("lastresort", "cmex", "cmmi", "cmsy")
#: TeX's text encodings agree with Unicode on letters and digits only.
ALPHANUMERIC_ONLY = ("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
#: Unicode's categories that have a drawing of their own: letters, numbers, punctuation, symbols.
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

    images: np.ndarray
    identities: np.ndarray
    faces: np.ndarray
    characters: list[str]
    typefaces: list[str]

    def subset(self, keep: np.ndarray) -> Glyphs:
        """Those identities only, renumbered; ``keep``: (K,) bool."""
        rows = keep[self.identities]
        renumbered = np.cumsum(keep) - 1
        characters = [c for c, k in zip(self.characters, keep, strict=True) if k]
        return Glyphs(self.images[rows], renumbered[self.identities[rows]], self.faces[rows], characters, self.typefaces)

    def split(self, share: float, seed: int) -> tuple[Glyphs, Glyphs]:
        """Two sets with no identity in common; the second holds ``share`` of the identities, drawn at random."""
        held_out = np.zeros(len(self.characters), dtype=bool)
        held_out[np.random.default_rng(seed).permutation(len(held_out))[: round(share * len(held_out))]] = True
        return self.subset(~held_out), self.subset(held_out)


def font_files(extra: Path | None = None) -> list[Path]:
    """Matplotlib's typefaces and those anywhere under the folder ``extra``.

    Raises:
        ValueError: there are none under ``extra``.
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
    """Whether a character counts: it has a drawing of its own, and is not another one in a typeface (such as the mathematical bold A)."""
    return unicodedata.category(character)[0] in CATEGORIES and not unicodedata.decomposition(character).startswith("<font>")


def draw(font, character: str) -> np.ndarray | None:
    """(SIZE, SIZE) uint8: the character on the baseline, its ink centred from left to right, shrunk if too large; None if blank."""
    from PIL import Image

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
        ink = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BOX))
        height, width = ink.shape
    left, top = (SIZE - width) // 2, min(max(BASELINE + top, 0), SIZE - height)
    image = np.zeros((SIZE, SIZE), dtype=np.uint8)
    image[top : top + height, left : left + width] = ink
    return image


def renderings(path: Path) -> Iterator[tuple[str, Iterator[tuple[str, np.ndarray]]]]:
    """For each typeface of a file: its name, and the characters that it has with their drawings, by code point."""
    from fontTools.ttLib import TTFont
    from fontTools.ttLib.ttCollection import TTCollection
    from PIL import ImageFont

    collection = path.suffix.lower() == ".ttc"
    tables = TTCollection(path, lazy=True).fonts if collection else [TTFont(path, lazy=True)]
    for index, table in enumerate(tables):
        characters = [c for c in map(chr, sorted(table.getBestCmap() or {})) if is_identity(c)]
        if path.stem in ALPHANUMERIC_ONLY:
            characters = [c for c in characters if c.isalnum() and c.isascii()]
        font = ImageFont.truetype(str(path), EM, index=index, layout_engine=ImageFont.Layout.BASIC)
        missing = draw(font, "\U0010ffff")  # a code point that will never be a character: what the typeface draws for lack of a glyph

        def drawn(font=font, characters=characters, missing=missing):
            for character in characters:
                image = draw(font, character)
                if image is not None and (missing is None or not np.array_equal(image, missing)):
                    yield character, image

        yield f"{path.stem}#{index}" if collection else path.stem, drawn()


def load(extra: Path | None = None, *, min_typefaces: int = 6, max_identities: int | None = None, seed: int = 0) -> Glyphs:
    """Render every character that enough typefaces have.

    Characters that some typeface draws exactly alike, such as the Latin, Greek and Cyrillic A, are one identity under many names: only
    the first by code point stays. So does only the first of equal images of one identity.

    Args:
        extra: a folder of more fonts.
        min_typefaces: least number of distinct images of an identity.
        max_identities: draw this many identities at random.

    Raises:
        ValueError: naming the argument, where fewer than 2 identities remain.
    """
    images: dict[str, dict[bytes, int]] = {}  # character -> image -> the first typeface that draws it so
    twins: set[str] = set()
    typefaces: list[str] = []
    for path in tqdm(font_files(extra), desc="render", unit="font"):
        try:
            for name, drawn in renderings(path):
                seen: dict[bytes, str] = {}
                for character, image in drawn:
                    pixels = image.tobytes()
                    if seen.setdefault(pixels, character) != character:
                        twins.add(character)
                    images.setdefault(character, {}).setdefault(pixels, len(typefaces))
                typefaces.append(name)
        except Exception as error:  # font files are hostile input, and parsers of theirs raise nearly anything
            print(f"skipped {path.name}: {error}")
    characters = sorted(c for c, found in images.items() if c not in twins and len(found) >= min_typefaces)
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
