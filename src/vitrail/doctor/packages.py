"""The installed packages against what vitrail's own metadata asks for. Nothing is imported."""

import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from vitrail.doctor.finding import Finding

_FOR_DEVELOPERS = ("dev",)


def package_findings() -> Iterator[Finding]:
    """All of this file."""
    asked = asked_for()
    if asked is None:
        text = "vitrail is not installed as a package: versions are not compared"
        yield Finding("packages", "note", text, "pip install vitrail")
    else:
        yield from judge_packages(asked)
    if found := judge_torchvision(build_of("torch"), build_of("torchvision")):
        yield found


def asked_for(root: Path = Path(__file__).parents[3]) -> list[str] | None:
    """What vitrail asks for, as metadata spells it; None if that is not known.

    In a checkout pyproject.toml says it, for what pip noted when it was set up may be out of date.
    """
    file = root / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"] if file.is_file() else {}
    if project.get("name") == "vitrail":
        extras = project.get("optional-dependencies", {})
        return [*project["dependencies"]] + [
            f"{one}; extra == '{extra}'" for extra, ones in extras.items() for one in ones
        ]
    try:
        return requires("vitrail") or []
    except PackageNotFoundError:
        return None


def judge_packages(asked: Iterable[str]) -> Iterator[Finding]:
    """One finding for each package out of range, one for all others, one for the extras.

    `asked` are requirements as metadata spells them: `rich>=13.9`, `onnx>=1.17; extra == 'onnx'`.
    """
    parsed = list(_parsed(asked))
    core = [one for extra, one in parsed if not extra]
    fine = 0
    for one in core:
        if fault := _fault(one):
            text, mend = fault, f"pip install {shlex.quote(str(one).partition(';')[0].strip())}"
            yield Finding("packages", "problem", text, mend)
        else:
            fine += 1
    if fine:
        yield Finding(
            "packages", "ok", f"{fine} of {len(core)} have versions that vitrail works with",
            numbers={one.name: _version(one.name) for one in core},
        )  # fmt: skip
    extras = {extra for extra, _ in parsed if extra and extra not in _FOR_DEVELOPERS}
    lacking = []
    for extra in sorted(extras):
        ones = [one for other, one in parsed if other == extra]
        if any(_version(one.name) is None for one in ones):
            lacking.append(extra)
            continue
        for fault in filter(None, map(_fault, ones)):
            mend = f"pip install 'vitrail[{extra}]'"
            yield Finding("extras", "problem", f"{fault}, for the extra '{extra}'", mend)
    if extras:
        present = ", ".join(sorted(extras - set(lacking))) or "none"
        text = f"{present}; not installed: {', '.join(lacking) or 'none'}"
        example = f" (pip install 'vitrail[{lacking[0]}]')" if lacking else ""
        yield Finding("extras", "ok", text + example, numbers={e: e not in lacking for e in extras})


def _parsed(asked: Iterable[str]) -> Iterator[tuple[str, Requirement]]:
    """Extra ('' for none) and requirement, of those that hold on this system."""
    for text in asked:
        try:
            one = Requirement(text)
        except InvalidRequirement:
            continue
        found = re.search(r"extra *== *['\"]([^'\"]+)", text)
        extra = found[1] if found else ""
        if one.marker is None or one.marker.evaluate({"extra": extra}):
            yield extra, one


def _version(name: str) -> str | None:
    try:
        return version(canonicalize_name(name))
    except PackageNotFoundError:
        return None


def _fault(one: Requirement) -> str:
    """What is wrong with an installed package; empty if nothing is."""
    found = _version(one.name)
    if found is None:
        return f"{one.name} is not installed"
    if not one.specifier.contains(found, prereleases=True):
        return f"{one.name} is {found}, but vitrail needs {one.specifier}"
    return ""


def judge_torchvision(torch: str | None, torchvision: str | None) -> Finding | None:
    """Whether torchvision's compiled part loads: only beside the torch that it was built for.

    Both are builds such as cpu and cu130, None for what is not known or not installed. We do
    without torchvision; timm does not.
    """
    if torch is None or torchvision is None or torch == torchvision:
        return None
    text = (
        f"torch is built for {torch}, torchvision for {torchvision}: timm cannot be imported; "
        f"vitrail does not need it"
    )
    mend = (
        f"pip install --force-reinstall --no-deps torchvision "
        f"--index-url https://download.pytorch.org/whl/{torch}"
    )
    return Finding("torchvision", "note", text, mend)


def build_of(package: str) -> str | None:
    """What a package is built for, by its version.py: cpu, cu130, rocm7.0."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(
        r"^__version__ *= *['\"][^'\"+]*\+(cpu|cu\d+|rocm[0-9.]+)", text, re.MULTILINE
    )
    return found[1] if found else None
