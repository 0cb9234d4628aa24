"""Which versions go together: one table with sources, and what is installed held against it."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mindformers_ixc.doctor.findings import NOTE, OK, PROBLEM, Finding

PACKAGE = "mindformers_ixc"


@dataclass(frozen=True)
class Pair:
    """Versions that go together.

    Attributes:
        mindspore: of MindSpore.
        mindformers: of MindFormers.
        python: versions of Python that MindSpore has wheels for, on x86_64 and aarch64.
        cann: of CANN, by MindFormers' documentation.
        driver: of Ascend's driver and firmware, by the same.
        tested: whether this package's tests run with the pair.
        source: where the row is from.
    """

    mindspore: str
    mindformers: str
    python: tuple[str, ...]
    cann: str
    driver: str
    tested: bool
    source: str

    @property
    def install(self) -> str:
        """The command that installs the pair."""
        return f'pip install "mindspore=={self.mindspore}" "mindformers=={self.mindformers}"'


_DOCUMENTED = "https://www.mindspore.cn/mindformers/docs/en/r1.9.0/installation.html"

# Newest first: the first row is what is advised.
PAIRS = (
    Pair("2.9.0", "1.9.0", ("3.9", "3.10", "3.11", "3.12"), "9.0.0", "26.0.RC1", True,
         f"scripts/check_matrix.sh; CANN and driver: {_DOCUMENTED}; Python: wheels on PyPI"),
    Pair("2.7.2", "1.8.0", ("3.9", "3.10", "3.11", "3.12"), "8.5.0", "25.5.0", True,
         f"scripts/check_matrix.sh; CANN and driver: {_DOCUMENTED}; Python: wheels on PyPI"),
)


@dataclass(frozen=True)
class Failing:
    """Versions that were tried together and do not run.

    Attributes:
        mindspore: of MindSpore.
        mindformers: of MindFormers.
        why: how far they get.
        source: where the row is from.
    """

    mindspore: str
    mindformers: str
    why: str
    source: str


FAILING = (
    Failing("2.10.0", "2.0.0", "`import mindformers` ends with No module named 'hyper_parallel', a package that PyPI "
            "does not have", "scripts/check_matrix.sh"),
)

# What each extra of the package is for; extras that are not named here are shown by their name alone.
EXTRAS = {
    "torch": "reads pytorch_model-*.bin checkpoints",
    "eval": "scores of evaluation.metrics beside loss and exact match",
    "report": "mindformers report draws with it",
    "mindnlp": "Hugging Face's PyTorch cells on MindSpore, with MindSpore 2.7.2 only",
    "tests": "the test suite",
    "docs": "builds the documentation",
}


def version_key(text: str) -> tuple[int, ...]:
    """Sorts versions as their makers number them: 8.3.RC1 and 26.0.rc1 are older than 8.3.0 and 26.0.0."""
    numbers: list[int] = []
    for word in re.findall(r"\d+|[a-zA-Z]+", text):
        if word.isdigit():
            numbers.append(int(word))
        elif word.lower() in ("rc", "alpha", "beta", "dev", "a", "b"):
            numbers.append(-1)
    return tuple(numbers)


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, `None` without one."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_pair(mindspore: str | None, mindformers: str | None) -> Pair | None:
    """The row of the table with both versions."""
    return next((pair for pair in PAIRS if (pair.mindspore, pair.mindformers) == (mindspore, mindformers)), None)


def python_finding(version: tuple[int, int], name: str, pair: Pair | None) -> Finding:
    """Whether there are wheels of MindSpore for this Python.

    Args:
        version: major and minor.
        name: full version and platform, to be shown.
        pair: what is installed, if it is in the table.
    """
    possible = (pair or PAIRS[0]).python
    if f"{version[0]}.{version[1]}" in possible:
        return Finding("Python", OK, name)
    return Finding("Python", PROBLEM, f"{name}; MindSpore {(pair or PAIRS[0]).mindspore} has wheels for "
                   f"{', '.join(possible)}", f"make an environment with Python {possible[-2]}, such as "
                   f"`uv venv --python {possible[-2]}`")


def pair_finding(mindspore: str | None, mindformers: str | None) -> Finding:
    """Whether MindSpore and MindFormers are there, and known to work together.

    That both are within the limits of this package is asked by `requirement_findings`.
    """
    missing = [name for name, found in (("MindSpore", mindspore), ("MindFormers", mindformers)) if found is None]
    if missing:
        return Finding("MindSpore", PROBLEM, f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
                       "installed", PAIRS[0].install)
    pair, text = find_pair(mindspore, mindformers), f"{mindspore} with MindFormers {mindformers}"
    if pair is not None:
        return Finding("MindSpore", OK, f"{text}, a pair the tests of this package run with")
    failing = next((row for row in FAILING if (row.mindspore, row.mindformers) == (mindspore, mindformers)), None)
    if failing is not None:
        return Finding("MindSpore", PROBLEM, f"{text}: {failing.why}", PAIRS[0].install)
    known = "; ".join(f"{pair.mindspore} with {pair.mindformers}" for pair in PAIRS)
    return Finding("MindSpore", NOTE, f"{text}: nobody has tried this pair. Tested are {known}", PAIRS[0].install)


def requirement_findings(requirements: Iterable[str], versions: Callable[[str], str | None],
                         environment: Mapping[str, str] | None = None) -> list[Finding]:
    """What this package needs, held against what is installed.

    Args:
        requirements: lines of the package's metadata, extras among them.
        versions: the installed version of a distribution.
        environment: values of markers that replace this machine's.

    Returns:
        One finding for the required ones, and those about extras.
    """
    wanted, extras = _read_requirements(requirements, dict(environment or {}))
    wrong = [said for said in (_wrong(entry, versions) for entry in wanted) if said]
    command = " ".join(f'"{entry.name}{entry.specifier}"' for entry in wanted if _wrong(entry, versions))
    findings = [Finding("packages", PROBLEM, "; ".join(wrong), f"pip install {command}") if wrong else
                Finding("packages", OK, f"all {len(wanted)} that are required, in versions that fit")]
    return findings + _extra_findings(extras, versions)


def _extra_findings(extras: Mapping[str, list[Requirement]], versions: Callable[[str], str | None]) -> list[Finding]:
    """Which extras are installed, which are not, and those that are half there or in a version that does not fit."""
    whole, absent, findings = [], [], []
    for name, entries in extras.items():
        wrong = [said for said in (_wrong(entry, versions) for entry in entries) if said]
        if not wrong:
            whole.append(name)
        elif sum(versions(entry.name) is None for entry in entries) * 2 > len(entries):
            # nobody asked for it: what of it is there came with the environment or with another package
            absent.append(f"{name} ({EXTRAS[name]})" if name in EXTRAS else name)
        else:
            findings.append(Finding("extras", NOTE, f"{name} is not complete: {'; '.join(wrong)}",
                                    f'pip install "{PACKAGE}[{name}]"'))
    if whole:
        findings.insert(0, Finding("extras", OK, f"installed: {', '.join(whole)}"))
    if absent:
        findings.append(Finding("extras", OK, f"not installed: {', '.join(absent)}",
                                f'pip install "{PACKAGE}[NAME]" adds one'))
    return findings


def _read_requirements(lines: Iterable[str], environment: dict[str, str]
                       ) -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Requirements that hold on this machine, and those of each extra; the package's own name is left out."""
    wanted: list[Requirement] = []
    extras: dict[str, list[Requirement]] = {}
    for line in lines:
        try:
            entry = Requirement(line)
        except InvalidRequirement:
            continue        # what pip has let pass is not for a doctor to refuse
        named = re.search(r"""extra\s*==\s*['"]([^'"]+)""", line)
        extra = named[1] if named else ""
        if extra:
            extras.setdefault(extra, [])
        own = canonicalize_name(entry.name) == canonicalize_name(PACKAGE)
        if own or (entry.marker is not None and not entry.marker.evaluate({"extra": extra, **environment})):
            continue
        (extras[extra] if extra else wanted).append(entry)
    return wanted, extras


def _wrong(entry: Requirement, versions: Callable[[str], str | None]) -> str:
    """What is wrong with an installed distribution, or an empty text."""
    found = versions(entry.name)
    if found is None:
        return f"{entry.name} is not installed"
    if not entry.specifier.contains(found, prereleases=True):
        return f"{entry.name} {found} is installed, {entry.specifier} is needed"
    return ""


def package_requirements() -> list[str]:
    """Requirements of this package as it is installed; none where it only lies in a folder."""
    try:
        return metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []


def version_findings(python: tuple[int, int], name: str) -> list[Finding]:
    """All findings about versions.

    Args:
        python: major and minor version of the interpreter.
        name: its full version and platform.
    """
    mindspore, mindformers = installed_version("mindspore"), installed_version("mindformers")
    findings = [Finding("this package", OK, f"{PACKAGE} {installed_version(PACKAGE) or 'from a folder'}"),
                python_finding(python, name, find_pair(mindspore, mindformers)),
                pair_finding(mindspore, mindformers)]
    return findings + requirement_findings(package_requirements(), installed_version)
