"""Exit 0 when this environment satisfies requirements.txt (and extras of pyproject.toml), else say what it lacks.

usage: satisfied.py [EXTRA,EXTRA,...]
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent


def wanted(extras: str) -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in extras.split(",") if extra for line in project["optional-dependencies"][extra]]
    return [line for line in lines if line and line[0] != "#"] + optional


def satisfied(requirement: str) -> bool:
    """True when the package is there in a version within the bounds; extras of packages are not looked into."""
    name, bounds = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(.*)", requirement).groups()
    try:
        have = numbers(version(name))
    except PackageNotFoundError:
        return False
    compare = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b}
    pairs = re.findall(r"(>=|<)\s*([\d.]+)", bounds)
    return all(compare[sign](have, numbers(bound)) for sign, bound in pairs)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


if __name__ == "__main__":
    lacking = [requirement for requirement in wanted("".join(sys.argv[1:2])) if not satisfied(requirement)]
    if lacking:
        print("installing:", ", ".join(lacking))
    sys.exit(bool(lacking))
