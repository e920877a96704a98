# SPDX-License-Identifier: Apache-2.0
"""The model card: sections in the Model Zoo's order, the statement of use, commands that exist; and the licence."""

from __future__ import annotations

import re

from monai.bundle import ConfigParser

from shared.overrides import is_defined
from tools.bundle_checks.bundle import Bundle
from tools.bundle_checks.commands import README, parse, written
from tools.bundle_checks.metadata import NOT_DIAGNOSIS, RESEARCH_ONLY
from tools.bundle_checks.reading import merged

SECTIONS = (
    *("# Model Overview", "## Data", "## Training configuration", "### Input", "### Output", "## Performance"),
    *("## MONAI Bundle Commands", "## Limitations", "# References", "# License"),
)
# Options of `monai.bundle run` and of torchrun that are no ids.
RUNNER = {
    *("config_file", "meta_file", "logging_file", "args_file", "run_id", "init_id", "final_id", "tracking"),
    *("standalone", "nnodes", "nproc_per_node", "node_rank", "rdzv_id", "rdzv_backend", "rdzv_endpoint"),
    *("master_addr", "master_port", "filepath", "net_id", "workflow_type", "url", "source", "bundle_dir", "name"),
}
LICENCE_PARTS = ("Apache License", "Version 2.0, January 2004", "END OF TERMS AND CONDITIONS")


def section_faults(bundle: Bundle) -> list[str]:
    """Sections that are missing or out of order, and statements that readers need."""
    path = bundle.folder / README
    if not path.is_file():
        return [f"{README}: missing"]
    text = path.read_text(encoding="utf-8", errors="replace")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,3} .*$", prose, re.MULTILINE)
    faults = [f"{README}: section {section!r} is missing" for section in SECTIONS if section not in headings]
    present = [heading for heading in headings if heading in SECTIONS]
    expected = [section for section in SECTIONS if section in headings]
    if not faults and present != expected:
        wrong = next(heading for heading, section in zip(present, [*expected, ""], strict=False) if heading != section)
        faults.append(f"{README}: section {wrong!r} is out of order; expected {', '.join(expected)}")
    plain = re.sub(r"[*_]", "", prose)
    if not (RESEARCH_ONLY.search(plain) and NOT_DIAGNOSIS.search(plain)):
        faults.append(f"{README}: expected the statement 'Research only. Not for diagnosis or any clinical use.'")
    return faults


def command_faults(bundle: Bundle) -> list[str]:
    """Commands that name files or ids that do not exist, and options in the text that no configuration has."""
    faults, verbs = [], []
    for where, text in written(bundle):
        try:
            command = parse(text)
        except ValueError as error:
            faults.append(f"{where}: {text}: {error}")
            continue
        if command is None:
            continue
        if where == README:
            verbs.append((command.verb, command.run_id, *command.files))
        missing = [file for file in command.files if file not in bundle.files]
        if missing:
            faults.append(f"{where}: {text}: {missing[0]} does not exist")
        elif command.verb == "run" and not command.files and "args_file" not in command.options:
            faults.append(f"{where}: {text}: expected --config_file")
        elif command.verb == "run" and not bundle.unreadable and command.files:
            config = merged([bundle.folder / file for file in command.files])
            parser = ConfigParser(config)
            if command.run_id not in parser:
                faults.append(f"{where}: {text}: {command.run_id} is not defined in {', '.join(command.files)}")
            faults += [
                f"{where}: {text}: --{option} is not defined in {', '.join(command.files)}"
                for option in command.options
                if option not in RUNNER and not is_defined(option, parser, command.options)
            ]
    for kind, found in (
        ("training", any(verb[:2] == ("run", "training") for verb in verbs)),
        ("evaluation", any("evaluate" in file for verb in verbs for file in verb[2:])),
        ("inference", any("inference" in file for verb in verbs for file in verb[2:])),
        ("multi-GPU training", any("multi_gpu" in file for verb in verbs for file in verb[2:])),
    ):
        if not found:
            faults.append(f"{README}: expected a command of {kind}, found none")
    return faults + _option_faults(bundle)


def _option_faults(bundle: Bundle) -> list[str]:
    """Options in the text beside the commands: `--name` between backticks."""
    path = bundle.folder / README
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    # Elsewhere options may be those of other programs.
    text = re.split(r"^## (?!#)", text.partition("\n## MONAI Bundle Commands\n")[2], flags=re.MULTILINE)[0]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    parsers = [ConfigParser(dict(config)) for config in bundle.workflows.values()]
    faults = []
    for code in re.findall(r"`([^`\n]+)`", prose):
        if "tools." in code or not code.lstrip().startswith("--"):
            continue
        for option in re.findall(r"--([A-Za-z_]\w*(?:(?:#|::)\w+)*)", code):
            if option not in RUNNER and not any(is_defined(option, parser) for parser in parsers):
                faults.append(f"{README}: `{code}`: --{option} is not defined in any configuration")
    return faults


def licence_faults(bundle: Bundle) -> list[str]:
    """`LICENSE` holds the whole text; the Model Zoo recognises Apache-2.0 and MIT by it."""
    path = bundle.folder / "LICENSE"
    if not path.is_file():
        return []  # among the missing files
    text = path.read_text(encoding="utf-8", errors="replace")
    missing = [part for part in LICENCE_PARTS if part not in text]
    return [f"LICENSE: expected the whole text of Apache-2.0, found no {missing[0]!r}"] if missing else []
