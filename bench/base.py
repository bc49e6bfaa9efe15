"""Two commits in one run: the same measurement with the installed package and with one built from another commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(ref: str) -> Path:
    """Installs the package of commit `ref` into a folder of its own under build/, once per commit."""
    sha = subprocess.run(["git", "rev-parse", "--short", f"{ref}^{{commit}}"], cwd=ROOT, capture_output=True, text=True)
    if sha.returncode != 0:
        raise SystemExit(f"bench: no commit {ref!r} in this repository")
    tree = ROOT / "build" / f"base-{sha.stdout.strip()}"
    site = tree.with_suffix(".site")
    if not site.exists():
        if not tree.exists():
            subprocess.run(["git", "worktree", "add", "--detach", str(tree), ref], cwd=ROOT, check=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(tree)]
        subprocess.run(command, check=True)
    return site


def measure(name: str, options: list[str], site: Path | None, out: Path) -> dict[str, dict]:
    """The lines of one run of measurement `name`, by their names; `site` holds the package to measure."""
    environment = dict(os.environ)
    if site:
        environment["PYTHONPATH"] = os.pathsep.join([str(site), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench", name, *options, "--json", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(result.stderr or result.stdout)
    return {line["name"]: line for line in map(json.loads, out.read_text().splitlines())}


def against(ref: str, name: str, options: list[str]) -> int:
    """Prints the milliseconds of each line for `ref` and for the installed package, and their ratio."""
    site = build(ref)
    theirs = measure(name, options, site, site.with_suffix(".jsonl"))
    ours = measure(name, options, None, site.with_suffix(".here.jsonl"))
    print(f"{'':44} {ref:>12} {'installed':>12} {'ratio':>7}")
    for line in ours:
        if line in theirs and "ms" in ours[line]:
            before, after = theirs[line]["ms"], ours[line]["ms"]
            print(f"{line:44} {before:10.3f}ms {after:10.3f}ms {before / after:6.2f}x")
    return 0
