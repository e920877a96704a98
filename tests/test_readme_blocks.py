# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from tests.readme_blocks import blocks, execute

TEXT = """# Title

## One

1. First:

   ```bash
   cd here   # don't stay
   A=1 python -m task 'two words' --unet#channels 8 \\
       --out /tmp/x,"['/tmp/y']" "a # b"  # a comment
   ```

```python
## no heading
```

### Two

```bash
mkdir -p /tmp/deep/folder && cp -r here /tmp/deep && cd /tmp/deep/here
python -m task > log
```
"""
TASK = "import sys, os\nprint(sys.argv[1:], os.getcwd())\nsys.exit(3 if 'bad' in sys.argv else 0)\n"


def written(folder: Path, text: str = TEXT) -> Path:
    path = folder / "README.md"
    path.write_text(text)
    return path


def test_blocks_and_their_commands(tmp_path):
    one, two = blocks(written(tmp_path))
    assert (one.heading, one.number, two.heading, two.number) == ("One", 8, "Two", 20)
    enter, run = one.commands
    assert (enter.words, enter.folder, enter.module) == (("cd", "here"), ".", ())
    words = ("task", "two words", "--unet#channels", "8", "--out", "/tmp/x,['/tmp/y']", "a # b")
    assert (run.module, run.folder) == (words, "here")
    assert run.text.startswith("A=1 python -m task")


def test_what_is_not_understood_is_not_passed_over(tmp_path):
    with pytest.raises(ValueError, match=r"expected only && and ; between commands, got >"):
        _ = blocks(written(tmp_path))[1].commands
    (block,) = blocks(written(tmp_path, "```bash\ncurl example.org\n```\n"))
    with pytest.raises(ValueError, match=r"README.md:2: curl example.org: expected cd, mkdir, cp or python -m"):
        execute(block, tmp_path)


def test_a_block_is_run_in_its_folders_until_a_command_fails(tmp_path):
    root, temporary = tmp_path / "root", tmp_path / "temporary"
    (root / "here").mkdir(parents=True)
    (root / "here/task.py").write_text(TASK)
    text = TEXT.replace(" > log", " /tmp/out a/tmp/b\npython -m task bad\npython -m task")
    one, two = blocks(written(tmp_path, text))
    (done,) = execute(one, temporary, root=root)
    assert done.out == (
        f"['two words', '--unet#channels', '8', '--out', \"{temporary}/x,['{temporary}/y']\", 'a # b'] {root}/here\n"
    )
    good, bad = execute(two, temporary, root=root)
    assert good.out == f"['{temporary}/out', 'a/tmp/b'] {temporary}/deep/here\n"
    assert bad.code == 3
