"""Turn a public checkpoint into diffjax parameters: OUT/params (Orbax) and OUT/model.json.

python -m diffjax convert --family=dit --checkpoint=DiT-XL-2-256x256 --out=params/dit-xl
python -m diffjax convert --family=dit --checkpoint=0050000.pt --out=params/mine --arguments=num_heads=6

--checkpoint is a path, or a name of `fetch`. Of a training checkpoint the averaged weights are taken; --weights names
another entry.
"""

from pathlib import Path
from typing import Any

from absl import flags

from diffjax.commands import arguments, define_arguments, define_path
from diffjax.parallel import hosts
from diffjax.weights import FAMILIES, read, store

INTERRUPTED = "what --out holds is not complete; remove it before the same command"
REQUIRED = ("family", "checkpoint", "out")


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("family", None, f"whose weights: {', '.join(FAMILIES)}", flag_values=values)
    what = "name of `fetch`; .safetensors, .pt, .pth, .ckpt or .bin file; *.index.json of several; folder of diffusers"
    define_path("checkpoint", None, what, values)
    flags.DEFINE_string("weights", "", "entry of a training checkpoint; its average by default", flag_values=values)
    define_path("out", None, "new folder for the parameters", values)
    define_arguments(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start("off")
    convert(values.family, values.checkpoint, values.out, values.weights, **arguments(values.arguments))


def convert(family: str, checkpoint: Path, out: Path, entry: str = "", **config: Any) -> None:
    """Read, map, write; one line per fact.

    Args:
        entry: of a training checkpoint, see `weights.choose`.
        config: the reference's constructor arguments, where needed.
    """
    store.refuse_full(out)
    found = read(family, checkpoint, entry, **config)
    name = found.origin.get("entry")
    print(f"read {found.entries} entries of {checkpoint}{f', its {name!r}' if name else ''}")
    model = store.save(out, found.module, found.params, {**found.origin, "size": found.size})
    print(f"model {model['name']}({', '.join(f'{name}={value}' for name, value in model['kwargs'].items())})")
    print(f"parameters {model['parameters']:,}, sha256 {model['sha256']}")
    print(f"wrote {out}")
