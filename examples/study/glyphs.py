"""The images: characters in the typefaces of this machine, rendered once into a memory-mapped file.

An identity is a character. What is not an identity of its own, or no image of one, is left out:

- characters that Unicode normalizes to another one (NFKC), such as compatibility ideographs and radicals;
- characters that some typeface draws, pixel by pixel, as it draws one with a lower code point;
- images that a typeface has for many characters: it draws a box for what it lacks;
- images that are nearly the same as one of the same character that is already there, as from two typefaces of one design.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import time
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from marginkernels.demo.data import SIZE, Glyphs, Typeface, font_files, typefaces_of

#: Which characters: ideographs alone, or all that the demo takes.
SCRIPTS: dict[str, Callable[[str], bool]] = {
    "han": lambda c: unicodedata.name(c, "").startswith("CJK UNIFIED IDEOGRAPH"),
    "any": lambda c: True,
}
#: From so many characters with one and the same image on, a typeface lacks them all.
PLACEHOLDER = 4
#: From this cosine of two images' pixels on, they are nearly the same.
ALIKE = 0.96
#: Characters that are merged at a time.
CHUNK = 2048


@dataclass(frozen=True)
class Choice:
    """What is rendered.

    Attributes:
        fonts: a folder with fonts, searched with its subfolders; those of matplotlib are there as well.
        script: a key of :data:`SCRIPTS`.
        least, most: images of an identity; characters with fewer are left out, of more so many are drawn at random.
        identities: use at most so many, drawn at random; None: all.
    """

    fonts: Path | None
    script: str = "han"
    least: int = 5
    most: int = 16
    identities: int | None = None
    seed: int = 0


def render(cache: Path, choice: Choice, jobs: int) -> dict[str, Any]:
    """Render into ``cache``, with so many processes, unless that has been done; gives what ``data.json`` says.

    Raises:
        ValueError: the cache has been rendered from another choice, or too few characters have enough images.
    """
    about = cache / "data.json"
    asked = {"script": choice.script, "least": choice.least, "most": choice.most, "identities": choice.identities, "seed": choice.seed}
    if about.exists():
        found: dict[str, Any] = json.loads(about.read_text())
        if found["choice"] != asked:
            raise ValueError(f"cache: {cache} was rendered with {found['choice']}, and {asked} is asked for")
        return found
    start = time.perf_counter()
    folder = cache / "faces"
    folder.mkdir(parents=True, exist_ok=True)
    faces, skipped = _faces(choice)
    work = partial(_render, folder=folder)
    bar = partial(tqdm, total=len(faces), desc="render", unit="typeface")
    if jobs == 1:
        faults = list(bar(map(work, faces)))
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            faults = list(bar(pool.map(work, faces)))
    skipped += [fault for fault in faults if fault]
    faces = [face for face, fault in zip(faces, faults, strict=True) if not fault]
    found = {"choice": asked} | _merge(cache, faces, choice)
    found |= {"skipped": skipped, "packages": _packages({f.path for f in faces}), "unicode": unicodedata.unidata_version}
    found["seconds"] = round(time.perf_counter() - start, 1)
    shutil.rmtree(folder)
    about.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def load(cache: Path) -> tuple[Glyphs, dict[str, Any]]:
    """The rendered images, which stay on disk until they are used, and what ``data.json`` says.

    Raises:
        ValueError: nothing has been rendered.
    """
    if not (cache / "data.json").exists():
        raise ValueError(f"cache: expected a folder with images; render them first: python -m examples.study render --cache {cache}")
    about = json.loads((cache / "data.json").read_text())
    index = np.load(cache / "index.npz")
    images = np.load(cache / "images.npy", mmap_mode="r")
    characters = [chr(c) for c in index["codes"]]
    return Glyphs(images, index["identities"], index["faces"], characters, [f["name"] for f in about["typefaces"]]), about


def _faces(choice: Choice) -> tuple[list[Typeface], list[str]]:
    """The typefaces that have characters of the script, and the files that could not be read."""
    wanted, faces, skipped = SCRIPTS[choice.script], [], []
    files = {path.resolve(): path for path in font_files(choice.fonts)}  # links to one file are one font
    for path in tqdm(files, desc="read", unit="font"):
        try:
            found = typefaces_of(path)
        except Exception as error:  # font files may be broken, and their parsers may raise anything
            skipped.append(f"{path.name}: {error}")
            continue
        for face in found:
            characters = tuple(c for c in face.characters if wanted(c) and unicodedata.normalize("NFKC", c) == c)
            if characters:
                faces.append(Typeface(path, face.index, face.name, characters))
    return faces, skipped


def _files(face: Typeface, folder: Path) -> tuple[Path, Path]:
    """Where the code points and the images of a typeface are kept until all are rendered."""
    name = hashlib.sha256(f"{face.path}#{face.index}".encode()).hexdigest()[:16]
    return folder / f"{name}-codes.npy", folder / f"{name}.npy"


def _render(face: Typeface, folder: Path) -> str:
    """Write the images of a typeface, unless they are there; says why where it cannot be rendered."""
    codes, images = _files(face, folder)
    if codes.exists():  # written last
        return ""
    try:
        found = [(ord(c), image) for c, image in face.renderings()]
    except Exception as error:  # programs of glyphs may be broken, and FreeType may raise anything
        return f"{face.name}: {error}"
    np.save(images, np.array([image for _, image in found], dtype=np.uint8).reshape(-1, SIZE, SIZE))
    np.save(codes, np.array([code for code, _ in found], dtype=np.int32))
    return ""


def own_images(codes: npt.NDArray[np.int32], images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.bool_], set[int]]:
    """Of the images (M, SIZE, SIZE) of one typeface, by code point (M,): which show their characters, (M,), and which code points share an
    image with a lower one."""
    if not len(codes):
        return np.zeros(0, dtype=bool), set()
    pixels = np.ascontiguousarray(images).reshape(len(codes), -1).view(f"V{SIZE * SIZE}")[:, 0]
    _, first, group, counts = np.unique(pixels, return_index=True, return_inverse=True, return_counts=True)
    shows = counts[group] < PLACEHOLDER
    later = shows & (first[group] != np.arange(len(codes)))
    return shows, set(codes[later].tolist())


def distinct(images: npt.NDArray[np.uint8], order: npt.NDArray[np.int64], most: int) -> list[int]:
    """The first ``most`` of ``images`` (M, SIZE, SIZE) in this order of which no two are nearly the same."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    alike = rows @ rows.T >= ALIKE
    kept: list[int] = []
    for i in order.tolist():
        if len(kept) < most and not alike[i, kept].any():
            kept.append(i)
    return sorted(kept)


def _merge(cache: Path, faces: Sequence[Typeface], choice: Choice) -> dict[str, Any]:
    """Write ``images.npy`` and ``index.npz`` from the typefaces' own files."""
    folder = cache / "faces"
    loaded, duplicates = [], set()
    for face in tqdm(faces, desc="compare", unit="typeface"):
        codes, images = _files(face, folder)
        at, pixels = np.load(codes), np.load(images, mmap_mode="r")
        shows, shared = own_images(at, pixels)
        duplicates |= shared
        loaded.append((at, pixels, shows))
    seen = np.concatenate([at[shows] for at, _, shows in loaded] or [np.zeros(0, dtype=np.int32)])
    every, counts = np.unique(seen, return_counts=True)
    every = every[(counts >= choice.least) & ~np.isin(every, np.array(sorted(duplicates), dtype=np.int32))]
    if choice.identities is not None:
        every = np.sort(np.random.default_rng(choice.seed).permutation(every)[: choice.identities])
    identities, face_of, kept_codes, drawn = [], [], [], 0
    with open(cache / "pixels.tmp", "wb") as out:
        for start in tqdm(range(0, len(every), CHUNK), desc="merge", unit="chunk"):
            part = every[start : start + CHUNK]
            codes_of, faces_of, found = [], [], []
            for k, (at, pixels, shows) in enumerate(loaded):
                low, high = np.searchsorted(at, [part[0], part[-1] + 1])
                mine = shows[low:high] & np.isin(at[low:high], part)
                codes_of.append(at[low:high][mine])
                faces_of.append(np.full(len(codes_of[-1]), k, dtype=np.int16))
                found.append(pixels[low:high][mine])
            codes, of, pixels = np.concatenate(codes_of), np.concatenate(faces_of), np.concatenate(found)
            drawn += len(codes)
            by_code = np.argsort(codes, kind="stable")
            for code, rows in zip(part.tolist(), np.split(by_code, np.searchsorted(codes[by_code], part[1:])), strict=True):
                order = np.random.default_rng([choice.seed, code]).permutation(len(rows))
                mine = rows[distinct(pixels[rows], order, choice.most)]
                if len(mine) >= choice.least:
                    out.write(pixels[mine].tobytes())
                    identities += [len(kept_codes)] * len(mine)
                    face_of += of[mine].tolist()
                    kept_codes.append(code)
    if len(kept_codes) < 10:
        raise ValueError(f"fonts: {len(kept_codes)} characters have {choice.least} different images in {len(faces)} typefaces, too few")
    total = len(identities)
    memory = np.lib.format.open_memmap(cache / "images.npy", mode="w+", dtype=np.uint8, shape=(total, SIZE, SIZE))
    memory.reshape(-1)[:] = np.memmap(cache / "pixels.tmp", dtype=np.uint8, mode="r")
    memory.flush()
    (cache / "pixels.tmp").unlink()
    arrays = {"identities": np.array(identities, dtype=np.int64), "faces": np.array(face_of, dtype=np.int64)}
    np.savez(cache / "index.npz", **arrays, codes=np.array(kept_codes, dtype=np.int64))
    used = np.bincount(arrays["faces"], minlength=len(faces))
    return {
        "images": total,
        "identities": len(kept_codes),
        "rendered": int(sum(len(at) for at, _, _ in loaded)),
        "candidates": drawn,
        "same_as_another": len(duplicates),
        "placeholders": int(sum((~shows).sum() for _, _, shows in loaded)),
        "typefaces": [{"name": f.name, "file": f.path.name, "images": int(n)} for f, n in zip(faces, used, strict=True)],
    }


def _packages(files: set[Path]) -> dict[str, str]:
    """The Debian packages that the font files come from, and their versions; nothing on another system."""
    tool = shutil.which("dpkg-query")
    if tool is None:
        return {}
    owners = subprocess.run([tool, "-S", *map(str, sorted(files))], capture_output=True, text=True).stdout
    names = sorted({line.partition(":")[0] for line in owners.splitlines() if line})
    if not names:
        return {}
    shown = subprocess.run([tool, "-W", "-f", "${Package} ${Version}\n", *names], capture_output=True, text=True).stdout
    return dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)
