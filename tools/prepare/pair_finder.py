# SPDX-License-Identifier: Apache-2.0
"""Which T1w, FLAIR and mask files of a folder belong together: BIDS, the published layout, patterns or a table."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tools.prepare.preparation import Preparation, read_table

NAMES = {"t1w": "T1w", "flair": "FLAIR", "t2w": "T2w", "pdw": "PDw", "mask": "mask"}
_SUFFIXES = (".nii", ".nii.gz")
_HELD_BACK = ("derivatives", "sourcedata")  # BIDS: other versions of the same scans
_CHOOSE = "choose with --t1w and --flair (patterns) or --table"


@dataclass
class Pair:
    """Files of one visit of one subject: item key (t1w, flair, t2w, pdw, mask) -> file; session may be ""."""

    subject: str
    session: str
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the outputs are called after."""
        return f"{self.subject}_{self.session}" if self.session else self.subject


def check_pattern(pattern: object, option: str) -> str:
    """A pattern below the source folder.

    Raises:
        ValueError: it is no text, is absolute, leaves the folder, or has a placeholder other than {subject}, {session}.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{option}: expected a pattern like '{{subject}}/anat/*T1w.nii.gz', but got {pattern!r}")
    unknown = [name for name in re.findall(r"\{(.*?)\}", pattern) if name not in ("subject", "session")]
    if unknown:
        raise ValueError(f"{option}: expected the placeholders {{subject}} and {{session}}, but got {{{unknown[0]}}}")
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise ValueError(f"{option}: expected a pattern relative to --source, but got {pattern!r}")
    return pattern


def _fill(pattern: str, subject: str, session: str) -> str:
    """The pattern as a glob for one subject; brackets in it are letters, not a set."""
    escaped = pattern.replace("[", "[[]")
    return escaped.replace("{subject}", glob.escape(subject)).replace("{session}", glob.escape(session))


def _match(folder: Path, pattern: str) -> Iterator[tuple[Path, str, str]]:
    """Files that fit a pattern, with the subject and the session that its placeholders stand for."""
    expression, seen = "", set()
    words = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
    for token in re.split(r"(\{subject\}|\{session\}|\*\*/|\*|\?)", pattern):
        if token in ("{subject}", "{session}"):
            name = token[1:-1]
            expression += f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+)"
            seen.add(name)
        else:
            expression += words.get(token, re.escape(token))
    wildcard = pattern.replace("[", "[[]").replace("{subject}", "*").replace("{session}", "*")
    for file in sorted(folder.glob(re.sub(r"(?<!\*)\*{2,}(?!/)", "*", wildcard))):
        if found := re.fullmatch(expression, file.relative_to(folder).as_posix()):
            yield file, found["subject"], found["session"] if "session" in seen else ""


def _is_inside(file: Path, folder: Path | None) -> bool:
    return folder is not None and folder.resolve() in file.resolve().parents


def add_by_pattern(pair: Pair, key: str, folder: Path, pattern: str, preparation: Preparation) -> bool:
    """Add the one file of a pair that fits a pattern; where there is none or several, note it and return False."""
    if "{session}" in pattern and not pair.session:
        preparation.drop(f"{NAMES[key]} missing", f"{folder / pattern}: expected a session of {pair.subject}, but its "
                         "files have none; write the pattern without {session}")  # fmt: skip
        return False
    filled = _fill(pattern, pair.subject, pair.session)
    found = sorted(folder.glob(filled))
    for other, file in pair.files.items():
        if found == [file]:
            preparation.drop(f"{NAMES[key]} missing", f"{file}: expected a {NAMES[key]}, but its pattern finds the "
                             f"{NAMES[other]}; correct the pattern {pattern!r}")  # fmt: skip
            return False
    if len(found) == 1:
        pair.files[key] = found[0]
        return True
    if found:
        preparation.drop("ambiguous", f"{found[0]}: expected one {NAMES[key]} of {pair.name}, but got {len(found)}: "
                         f"{', '.join(file.name for file in found)}; narrow the pattern")  # fmt: skip
    else:
        first = next(iter(pair.files.values()), folder)
        preparation.drop(f"{NAMES[key]} missing", f"{first}: expected a {NAMES[key]} at {folder / filled}, but there "
                         "is none; add the file or correct the pattern")  # fmt: skip
    return False


def find_by_patterns(
    folder: Path, t1w: str, flair: str, preparation: Preparation, *, out: Path | None = None
) -> list[Pair]:
    """Pairs whose files fit two patterns.

    Raises:
        ValueError: {subject} is missing in a pattern, or {session} is in the second one only.
    """
    for option, pattern in (("--t1w", t1w), ("--flair", flair)):
        if "{subject}" not in check_pattern(pattern, option):
            raise ValueError(f"{option}: expected {{subject}} in the pattern, but got {pattern!r}")
    if "{session}" in flair and "{session}" not in t1w:
        raise ValueError(f"--flair: expected {{session}} in both patterns, but --t1w is {t1w!r}")
    pairs: dict[tuple[str, str], Pair] = {}
    several: dict[tuple[str, str], list[Path]] = {}
    for file, subject, session in _match(folder, t1w):
        if _is_inside(file, out):
            continue
        if _is_unusable(file.relative_to(folder)):
            preparation.drop("marked unusable", f"{file}: left out because its path holds 'unusable'")
            continue
        several.setdefault((subject, session), []).append(file)
        pairs[subject, session] = Pair(subject, session, {"t1w": file})
    kept = []
    for key, pair in pairs.items():
        if len(several[key]) > 1:
            _drop_ambiguous(several[key], [], preparation)
        elif add_by_pattern(pair, "flair", folder, flair, preparation):
            kept.append(pair)
    return kept


def find_in_table(folder: Path, table: Path, extras: list[str], preparation: Preparation) -> list[Pair]:
    """Pairs of a CSV table: columns subject, t1w, flair, those of `extras`, and if wanted mask and session.

    Paths are relative to `folder` or to the table. A row without a mask gives a pair without mask.

    Raises:
        ValueError: a column is missing, or two rows have the same subject and session.
    """
    kept, names = [], set()
    for row in read_table(table, ["subject", "t1w", "flair", *extras]):
        pair = Pair(row["subject"], row.get("session", ""))
        if not pair.subject:
            raise ValueError(f"{table}: expected a subject in each row, but one with t1w {row['t1w']!r} has none")
        if pair.name in names:
            raise ValueError(f"{table}: expected each subject and session once, but {pair.name} occurs again; add a "
                             "session or remove a row")  # fmt: skip
        names.add(pair.name)
        complete = True
        for key in ("t1w", "flair", *extras, "mask"):
            written = row.get(key, "")
            if not written and key == "mask":
                continue
            places = [folder / written, table.parent / written] if written else []
            file = next((place for place in places if place.is_file()), None)
            if file is not None:
                pair.files[key] = file
                continue
            complete = False
            line = (
                f"{places[0]}: expected this file ({key!r} of {pair.name} in {table.name}), but it does not exist; "
                "correct the path"
                if places
                else f"{table}: expected a path under {key!r} of {pair.name}, but it is empty; fill it in"
            )
            preparation.drop(f"{NAMES[key]} missing", line)
        if complete and len(set(pair.files.values())) < len(pair.files):
            raise ValueError(f"{table}: expected a file of its own for each column, but {pair.name} has one file twice")
        if complete:
            kept.append(pair)
    return kept


def _is_unusable(path: Path) -> bool:
    return "unusable" in path.as_posix().lower()


def _entities(file: Path) -> dict[str, str]:
    """Entities of a BIDS name, `sub-01_acq-3D_FLAIR.nii.gz` -> {"sub": "01", "acq": "3D"}; {} if it is none."""
    parts = file.name.split(".nii")[0].split("_")[:-1]
    if not parts or not all(re.fullmatch(r"[A-Za-z0-9]+-[^_-]+", part) for part in parts):
        return {}
    found = dict(part.split("-", 1) for part in parts)
    return found if "sub" in found else {}


def _visit(file: Path, folder: Path) -> tuple[str, str]:
    """Subject and session: of the BIDS name, else the first two folders (published layout), else the name itself."""
    if entities := _entities(file):
        return f"sub-{entities['sub']}", f"ses-{entities['ses']}" if "ses" in entities else ""
    *folders, name = file.relative_to(folder).parts
    if folders:
        return folders[0], folders[1] if len(folders) > 1 else ""
    return re.sub(r"[_.-]?(T1w|FLAIR)\.nii(\.gz)?$", "", name) or name.split(".")[0], ""


def _partner(t1w: Path, folder: Path) -> Path:
    """The published rule: T1w -> FLAIR in the path below the source folder."""
    return folder / t1w.relative_to(folder).as_posix().replace("T1w", "FLAIR")


def _drop_ambiguous(t1ws: list[Path], flairs: list[Path], preparation: Preparation) -> None:
    several = ", ".join(file.name for file in [*t1ws, *flairs])
    preparation.drop("ambiguous", f"{t1ws[0]}: expected one T1w and one FLAIR, but got {several}; {_CHOOSE}")


def find_by_layout(folder: Path, preparation: Preparation, *, out: Path | None = None) -> list[Pair]:
    """Pairs of a BIDS folder or of the published layout `<subject>/<session>/.../*T1w.nii.gz` beside `*FLAIR.nii.gz`.

    Within a visit the T1w and FLAIR whose BIDS entities (acq, run, space, desc, ...) are equal belong together; a
    single T1w and a single FLAIR do so in any case. What remains open is noted as ambiguous, never guessed.
    Paths that hold "unusable" (published rule) are left out, and folders `derivatives` and `sourcedata` are not
    searched: give one of them as the source if it is meant.
    """
    visits: dict[tuple[str, str], dict[str, list[Path]]] = {}
    for file in sorted(folder.rglob("*.nii*")):
        kind = next((k for k in ("t1w", "flair") if file.name.endswith(tuple(NAMES[k] + s for s in _SUFFIXES))), None)
        relative = file.relative_to(folder)
        if kind is None or _is_inside(file, out) or any(part in _HELD_BACK for part in relative.parts):
            continue
        if _is_unusable(relative):
            preparation.drop("marked unusable", f"{file}: left out because its path holds 'unusable'")
            continue
        visits.setdefault(_visit(file, folder), {"t1w": [], "flair": []})[kind].append(file)
    pairs = []
    for (subject, session), found in sorted(visits.items()):
        t1ws, flairs = found["t1w"], found["flair"]
        if not t1ws or not flairs:
            here, lacking = (t1ws, "FLAIR") if t1ws else (flairs, "T1w")
            preparation.drop(f"{lacking} missing", f"{here[0]}: expected a {lacking} of the same visit, but there is "
                             "none; add it, or name the files with --t1w and --flair")  # fmt: skip
            continue
        equal = [
            (t1w, flair)
            for t1w in t1ws
            for flair in flairs
            if flair == _partner(t1w, folder) or (_entities(t1w) and _entities(t1w) == _entities(flair))
        ]
        if len(equal) != 1 and (len(t1ws), len(flairs)) != (1, 1):
            _drop_ambiguous(t1ws, flairs, preparation)
            continue
        t1w, flair = equal[0] if len(equal) == 1 else (t1ws[0], flairs[0])
        pairs.append(Pair(subject, session, {"t1w": t1w, "flair": flair}))
    return pairs


def parse_extra(extra: object, *, table: bool) -> dict[str, str]:
    """`t2w=PATTERN,pdw=PATTERN`, or with a table `t2w,pdw` -> item key -> pattern ("" means the table's column).

    Raises:
        ValueError: another key, or no pattern where there is no table.
    """
    if extra in (None, ""):
        return {}
    words = [str(word) for word in extra] if isinstance(extra, tuple | list) else str(extra).split(",")
    found: dict[str, str] = {}
    for word in words:
        key, _, pattern = word.strip().partition("=")
        if key not in ("t2w", "pdw") or key in found or (not pattern and not table):
            raise ValueError(
                f"--extra: expected t2w=PATTERN and/or pdw=PATTERN with a comma between (with --table t2w,pdw), "
                f"but got {word!r}"
            )
        found[key] = check_pattern(pattern, "--extra") if pattern else ""
    return found


def find_pairs(
    folder: Path,
    preparation: Preparation,
    *,
    t1w: str | None,
    flair: str | None,
    mask: str | None,
    table: Path | None,
    extra: Mapping[str, str],
    out: Path,
) -> list[Pair]:
    """All pairs of a source folder; what is left out stands in `preparation`. See `tools.prepare.brain_pairs`.

    Raises:
        ValueError: options that contradict each other, or two pairs that would have the same output names.
    """
    if table is not None and (t1w or flair):
        raise ValueError("--table: expected either a table or the patterns --t1w and --flair, but got both")
    if bool(t1w) != bool(flair):
        raise ValueError(f"{'--flair' if t1w else '--t1w'}: expected both patterns or none, but got only one")
    if table is not None:
        pairs = find_in_table(folder, table, [key for key, pattern in extra.items() if not pattern], preparation)
    elif t1w and flair:
        pairs = find_by_patterns(folder, t1w, flair, preparation, out=out)
    else:
        pairs = find_by_layout(folder, preparation, out=out)
    for key, pattern in {**extra, **({"mask": mask} if mask else {})}.items():
        if pattern:
            pairs = [pair for pair in pairs if add_by_pattern(pair, key, folder, pattern, preparation)]
    names: dict[str, Pair] = {}
    for pair in pairs:
        if "/" in pair.name or pair.name.startswith("."):
            raise ValueError(f"{pair.files['t1w']}: expected a subject and session without '/', but got {pair.name!r}")
        if pair.name in names:
            raise ValueError(f"{pair.files['t1w']}: expected a name of its own, but {names[pair.name].files['t1w']} "
                             f"is called {pair.name} too; rename a subject or session")  # fmt: skip
        names[pair.name] = pair
    return pairs
