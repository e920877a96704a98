# SPDX-License-Identifier: Apache-2.0
"""Manifest, required files, sizes and names of files."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import yaml

from shared.files import sha256_of_file
from tools.bundle_checks.bundle import MANIFEST, Bundle
from tools.bundle_checks.reading import read_json

REQUIRED = (
    *("LICENSE", MANIFEST, "docs/README.md", "docs/data_license.txt", "models/model.pt"),
    *(f"configs/{name}.json" for name in ("metadata", "inference", "train", "evaluate", "multi_gpu_train", "tiny")),
    "configs/logging.conf",
)
MAX_BYTES = 25 * 1000**2
MAX_PICTURE_BYTES = 1024 * 1000
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".bmp", ".tif", ".tiff", ".webp")
TEXTS = (".json", ".py", ".md", ".txt", ".conf", ".yml", ".yaml")
LARGE_FILES = "large_files.yml"
# The Model Zoo's .gitignore swallows them, and with them whole folders of code.
IGNORED_FOLDERS = {
    *("__pycache__", "build", "develop-eggs", "dist", "downloads", "eggs", "env", "ENV", "lib", "lib64", "parts"),
    *("sdist", "target", "temp", "var", "venv", "wheels"),
}
IGNORED_SUFFIXES = (".pyc", ".zip", ".log", ".so", ".egg")
# `~/name` of people: not the mount points that containers have.
_PERSONAL = re.compile(r"(?:/home/|/Users/|/root/|/work/|[A-Za-z]:\\\\?Users\\)[\w.-]+")


def manifest_faults(bundle: Bundle) -> list[str]:
    """Files that `manifest.json` does not list, lists wrongly, or lists although they are absent or lie elsewhere."""
    path = bundle.folder / MANIFEST
    if not path.is_file():
        return [f"{MANIFEST}: missing"]
    try:
        content = read_json(path)
        listed = dict(content["files"])
    except (ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: expected an object with 'files', but {error!r}"]
    faults = [
        f"{MANIFEST}: expected {key!r}, found none"
        for key in ("name", "version", "commit", "build")
        if not content.get(key)
    ]
    if content.get("name") != bundle.name:
        faults.append(f"{MANIFEST}: expected the name of the folder, {bundle.name!r}, got {content.get('name')!r}")
    if content.get("version") != bundle.metadata.get("version"):
        faults.append(
            f"{MANIFEST}: version {content.get('version')!r}, but metadata.json has {bundle.metadata.get('version')!r}"
        )
    for name, digest in listed.items():
        if _is_outside(name):
            faults.append(f"{name}: {MANIFEST} lists a path outside of the bundle")
        elif name not in bundle.files:
            faults.append(f"{name}: listed in {MANIFEST}, but missing")
        elif not (bundle.folder / name).is_symlink() and sha256_of_file(bundle.folder / name) != digest:
            faults.append(f"{name}: another SHA-256 than {MANIFEST} says; export again")
    extra = [name for name in bundle.files if name not in listed and name != MANIFEST]
    return faults + [f"{name}: not listed in {MANIFEST}; remove it or export again" for name in extra]


def link_faults(bundle: Bundle) -> list[str]:
    """Symbolic links: MONAI unpacks them as text files. And what is wrong with the zip."""
    links = [path for path in bundle.folder.rglob("*") if path.is_symlink()]
    return [
        *bundle.archive_faults,
        *(f"{path.relative_to(bundle.folder).as_posix()}: expected a file, got a symbolic link" for path in links),
    ]


def large_files(bundle: Bundle) -> dict[str, dict[str, str]]:
    """Entries of `large_files.yml` by path; empty without the file.

    Raises:
        ValueError: it has another form. The message starts with the file.
    """
    path = bundle.folder / LARGE_FILES
    if not path.is_file():
        return {}
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["large_files"]
        return {str(entry["path"]): {str(key): str(value) for key, value in entry.items()} for entry in entries}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{LARGE_FILES}: expected a list 'large_files' of path, url, hash_val and hash_type ({error!r})"
        ) from error


def large_file_faults(bundle: Bundle) -> list[str]:
    """What is wrong with `large_files.yml`, and files that should be in it."""
    try:
        entries = large_files(bundle)
    except ValueError as error:
        return [str(error)]
    faults = []
    for name, entry in entries.items():
        where = f"{LARGE_FILES}: {name}"
        missing = [key for key in ("url", "hash_val", "hash_type") if not entry.get(key)]
        if missing:
            faults.append(f"{where}: expected {', '.join(missing)}, found none")
        if entry.get("url") and not entry["url"].startswith("https://"):
            faults.append(f"{where}: expected an https url, got {entry['url']}")
        if _is_outside(name):
            faults.append(f"{where}: expected a path inside the bundle")
    for name in bundle.files:
        size = (bundle.folder / name).lstat().st_size
        if name.lower().endswith(PICTURES) and size > MAX_PICTURE_BYTES:
            faults.append(f"{name}: expected a picture of at most 1 MB, got {size / 1e6:.1f} MB; shrink it")
        elif size > MAX_BYTES and name not in entries:
            faults.append(f"{name}: {size / 1e6:.1f} MB, expected at most 25 MB or an entry in {LARGE_FILES}")
    return faults


def required_faults(bundle: Bundle) -> list[str]:
    """Files that every bundle has, and names that the Model Zoo's git ignores."""
    try:
        elsewhere = set(large_files(bundle))
    except ValueError:
        elsewhere = set()  # a fault of the check above
    required = (*REQUIRED, f"{bundle.package}/__init__.py")
    faults = [f"{name}: missing" for name in required if name not in bundle.files and name not in elsewhere]
    for name in bundle.files:
        path = PurePosixPath(name)
        ignored = sorted(set(path.parts[:-1]) & IGNORED_FOLDERS)
        if ignored or path.suffix in IGNORED_SUFFIXES:
            faults.append(
                f"{name}: the Model Zoo's .gitignore leaves out {ignored[0] if ignored else '*' + path.suffix}"
            )
        elif any(part.startswith(".") for part in path.parts):
            faults.append(f"{name}: expected no hidden file; remove it")
    return faults


def text_faults(bundle: Bundle) -> list[str]:
    """Text that the Model Zoo's pre-commit hooks refuse, and paths of somebody's machine."""
    faults = []
    for name in (name for name in bundle.files if name.endswith(TEXTS) or name == "LICENSE"):
        path = bundle.folder / name
        if path.is_symlink():
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            faults.append(f"{name}: expected text in UTF-8 ({error.reason} at byte {error.start})")
            continue
        if text and (not text.endswith("\n") or text.endswith("\n\n")):
            faults.append(f"{name}: expected one newline at the end")
        if "\r" in text:
            faults.append(f"{name}: expected Unix line ends")
        trailing = [number for number, line in enumerate(text.split("\n"), 1) if line != line.rstrip(" \t")]
        if trailing:
            faults.append(f"{name}: line {trailing[0]}: expected no spaces at the end")
        if re.search("BEGIN [A-Z ]*PRIVATE KEY", text):
            faults.append(f"{name}: holds a private key")
        faults += [f"{name}: {found}: a path of somebody's machine" for found in sorted(set(_PERSONAL.findall(text)))]
    return faults


def _is_outside(name: str) -> bool:
    return name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts
