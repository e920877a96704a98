# SPDX-License-Identifier: Apache-2.0
"""`python -m tools.push DIST/TASK --repo ORG/NAME`: publish an exported bundle on the Hugging Face hub.

`monai.bundle.push_to_hf_hub` writes a card without a task, no safetensors copies, checks no manifest and leaves an
existing tag where it was without saying so.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub

from shared.files import sha256_of_file
from tools.command_line import run
from tools.export.archive import files_of
from tools.hub_layout import make_layout, read_manifest


def push(
    folder: str,
    *,
    repo: str,
    dry_run: bool = False,
    out: str = "",
    tag: str = "",
    private: bool = True,
    license: str = "",
    datasets: str = "",
) -> None:
    """Make the hub's layout of an exported bundle and upload it under a tag.

    The token is that of `hf auth login` or of the environment (HF_TOKEN), never an option.

    Args:
        folder: an exported bundle, DIST/TASK.
        repo: ORG/NAME on the hub.
        dry_run: only write the layout to OUT/TASK and print what would be uploaded; no network.
        out: folder for the layout; needed for a dry run, otherwise a temporary one.
        tag: of this version on the hub; the bundle's version by default.
        private: visibility of a repository that is created; an existing one keeps its own.
        license: of code and weights in the hub's words; apache-2.0 for demo weights, must be given for others.
        datasets: ORG/NAME of training sets that lie on the hub, separated by blanks.
    """
    source = Path(str(folder))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(repo)):
        raise ValueError(f"--repo: expected ORG/NAME, got {repo!r}")
    if dry_run and not out:
        raise ValueError("--out: expected a folder for the layout of the dry run, got none")
    manifest = read_manifest(source)
    version = str(tag) or manifest["version"]
    if not license and manifest["build"] != "demo":
        raise ValueError(
            f"--license: expected the licence under which these weights may be passed on, got none; {source} was built "
            "with weights of your own, and terms of training data may bind them (docs/data_license.txt)"
        )
    if not dry_run and not re.fullmatch(r"[0-9a-f]{7,}", manifest["commit"]):
        raise ValueError(
            f"{source / 'manifest.json'}: expected the export of a commit, got {manifest['commit']!r}; commit your "
            "changes and export again, so that what is published can be made again"
        )
    if not dry_run and huggingface_hub.get_token() is None:
        raise ValueError(
            "HF_TOKEN: expected a token of the Hugging Face hub, found none; run `hf auth login` or set it"
        )
    with tempfile.TemporaryDirectory() as temporary:
        layout = make_layout(
            source,
            Path(str(out)) if out else Path(temporary),
            repo=repo,
            tag=version,
            license=license or "apache-2.0",
            datasets=str(datasets).split(),
        )
        print(listing(layout))
        if dry_run:
            print(f"dry run: {layout} written for {repo}, tag {version}; nothing was uploaded")
        else:
            print(upload(layout, repo=repo, tag=version, private=private, api=huggingface_hub.HfApi()))


def listing(layout: Path) -> str:
    """One line per file (size in bytes, SHA-256, path) and one for the sum."""
    names = files_of(layout)
    sizes = {name: (layout / name).stat().st_size for name in names}
    lines = [f"{sizes[name]:>12}  {sha256_of_file(layout / name)}  {name}" for name in names]
    return "\n".join([*lines, f"{sum(sizes.values()):>12}  bytes in {len(names)} files"])


def upload(layout: Path, *, repo: str, tag: str, private: bool, api: Any) -> str:
    """Upload a layout as one commit and tag it.

    Files of an earlier version that are not in the layout go away from the branch; its tag keeps them.

    Args:
        layout: folder of `make_layout`.
        repo: ORG/NAME.
        tag: a version is published once: an existing tag is left alone.
        private: visibility if the repository has to be created.
        api: `huggingface_hub.HfApi` or what behaves like it.

    Returns:
        What was done, in one line.

    Raises:
        ValueError: the tag exists and its files differ; nothing was changed.
    """
    if api.repo_exists(repo) and tag in {ref.name for ref in api.list_repo_refs(repo).tags}:
        differing = differences(layout, api.list_repo_tree(repo, recursive=True, revision=tag))
        if differing:
            raise ValueError(
                f"--tag: expected a tag that is not yet on {repo}, but {tag!r} is there with other content "
                f"({', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''}); nothing was uploaded. Give the "
                "bundle a new version in configs/metadata.json and export it again"
            )
        return f"{repo}: tag {tag} is there with the same content; nothing was uploaded"
    api.create_repo(repo, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo, folder_path=layout, commit_message=f"{layout.name} {tag}", delete_patterns="*"
    )
    # By the commit's name: the branch may have moved on since.
    api.create_tag(repo, tag=tag, revision=commit.oid)
    return f"{repo}: uploaded as commit {commit.oid}, tag {tag}"


def differences(layout: Path, published: Iterable[Any]) -> list[str]:
    """Paths of files that are only on one side or differ, by the hub's own hashes: nothing is downloaded.

    Args:
        layout: local folder.
        published: entries of `HfApi.list_repo_tree`; those without `blob_id` are folders.
    """
    theirs = {entry.path: entry for entry in published if hasattr(entry, "blob_id")}
    ours = files_of(layout)
    changed = [name for name in ours if name in theirs and not _same(layout / name, theirs[name])]
    return sorted(theirs.keys() ^ set(ours)) + changed


def _same(path: Path, entry: Any) -> bool:
    if entry.lfs is not None:
        return entry.lfs.sha256 == sha256_of_file(path)
    content = path.read_bytes()
    # git's name of a blob
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


if __name__ == "__main__":
    run(push, name="tools.push")
