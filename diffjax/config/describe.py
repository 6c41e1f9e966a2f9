"""All leaves of a config in words: what `--help-config` prints and docs/config.md holds.

`python -m diffjax.config.describe > docs/config.md` writes the page anew.
"""

import textwrap
from collections.abc import Iterator, Mapping

from diffjax import models
from diffjax.config.schema import Config, Spec, leaves, model_leaves
from diffjax.options import REQUIRED, Value, type_in_words

TITLE = """# Config leaves

Made from `diffjax/config/schema.py` by `python -m diffjax.config.describe > docs/config.md`; a test compares them. Set
a leaf on the command line with `--config.optim.lr=2e-4`. Kinds: *identity* decides what the parameters are (**fixed**:
it cannot change within a run; the others only with `--accept`), *compute* how they are computed (`--accept`), *place*
where files lie, *layout* how the work is spread, *watch* what is logged, saved, evaluated and sampled.
"""


def text(config: Config | None = None) -> str:
    """One leaf a line for a terminal, with the values of a config, or the defaults."""
    lines = []
    values = config.values if config else {}
    for title, specs in sections(leaves(config.model.name if config else "")).items():
        lines.append(f"\n{title}")
        for spec in specs:
            value = values.get(spec.path, spec.option.default)
            lines.append(f"  --config.{spec.path}={shown(value)}")
            lines += textwrap.wrap(meaning(spec), 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines).strip()


def markdown() -> str:
    """The page of all leaves, with those of every family of backbones."""
    parts = [TITLE]
    for title, specs in sections(leaves()).items():
        if title != "model":
            parts.append(table(title, specs))
    for family in models.FAMILIES:
        parts.append(table(f"model ({family})", model_leaves(family)[1:]))
    return "\n".join(parts)


def table(title: str, specs: list[Spec]) -> str:
    rows = [
        f"| `{spec.path}` | {cell(shown(spec.option.default))} | {cell(meaning(spec))} | {kind(spec)} |"
        for spec in specs
    ]
    return "\n".join([f"## {title}\n", "| leaf | default | meaning | kind |", "|---|---|---|---|", *rows, ""])


def sections(specs: Mapping[str, Spec]) -> dict[str, list[Spec]]:
    """The leaves by section, those without one first."""
    found: dict[str, list[Spec]] = {}
    for path, spec in specs.items():
        found.setdefault(path.rpartition(".")[0] or "run", []).append(spec)
    return found


def meaning(spec: Spec) -> str:
    """The documentation of a leaf, its valid values, and when it is read."""
    valid = spec.option.leaf.valid
    return "; ".join(
        [spec.option.leaf.doc, f"valid: {valid.words if valid else type_in_words(spec.option.type)}", *conditions(spec)]
    )


def conditions(spec: Spec) -> Iterator[str]:
    for leaf, names in spec.when:
        yield f"read with {leaf} = {', '.join(names)}"


def kind(spec: Spec) -> str:
    return f"{spec.kind}, fixed" if spec.option.leaf.fixed else spec.kind


def shown(value: Value) -> str:
    if value is REQUIRED:
        return "(required)"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "()"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or "''"


def cell(words: str) -> str:
    return words.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
