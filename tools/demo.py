# SPDX-License-Identifier: Apache-2.0
"""From nothing to a page of pictures: `python -m tools.demo all --out demo`.

Runs commands of the README one after the other on generated phantoms: what the demo weights that ship with a bundle
make, their evaluation, short trainings from scratch, then one HTML page about all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tools import command_line
from tools.demo_steps import REPOSITORY, Step, run_steps
from tools.demos import brain_controlnet, cxr_ldm, dmri2noddi, sdseg

BUNDLES = REPOSITORY / "bundles"
DEMOS: dict[str, Callable[..., list[Step]]] = {
    "cxr_ldm": cxr_ldm.steps,
    "brain_controlnet": brain_controlnet.steps,
    "sdseg": sdseg.steps,
    "dmri2noddi": dmri2noddi.steps,
}
ALL = "all"


def demo(bundle: str = ALL, out: str = "demo", n: int | None = None, threads: int = 0) -> None:
    """Make sample data, use and evaluate the shipped weights, train briefly, and write `OUT/report.html`.

    What was finished before is not repeated, unless something that it depends on has changed.

    Args:
        bundle: which bundle, or `all`, one after the other.
        out: folder for everything the demo writes, below it one for each bundle. The page shows all that is there. The
            sentences that cxr_ldm draws are in `OUT/cxr_ldm/prompts.txt`, one a line: edit them and run again.
        n: number of phantoms; by default 200 films, 24 heads, 80 pictures or 6 brains.
        threads: CPU threads, 0 for all cores.
    """
    if bundle != ALL and bundle not in DEMOS:
        raise SystemExit(
            f"{bundle}: expected one of the bundles {', '.join(DEMOS)}, or {ALL}; give one of these names."
        )
    started = time.monotonic()
    root = Path(out).resolve()
    for name in DEMOS if bundle == ALL else [bundle]:
        place = root / name
        place.mkdir(parents=True, exist_ok=True)
        run_steps(DEMOS[name](BUNDLES / name, place, n=n), name=name, root=place, threads=threads)
    page = root / "report.html"
    words = ("tools.report", str(root), f"--out={page}", "--title=Demo on phantoms")
    run_steps([Step("all results on one page", words)], name="report", root=root, threads=threads)
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Open {page}")


if __name__ == "__main__":
    command_line.run(demo, name="demo")
