"""Turn a public checkpoint into diffjax parameters: OUT/params (Orbax) and OUT/model.json.

python -m diffjax convert --family=dit --checkpoint=DiT-XL-2-256x256 --out=params/dit-xl
python -m diffjax convert --family=dit --checkpoint=0050000.pt --out=params/mine --arguments=num_heads=6

--checkpoint is a path, or a name of `fetch`. Of a training checkpoint the averaged weights are taken; --weights names
another entry.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from diffjax.commands import define_path
from diffjax.errors import UserError
from diffjax.parallel import hosts
from diffjax.weights import FAMILIES, checkpoints, choose, from_reference, part_of, store

INTERRUPTED = "what --out holds is not complete; remove it before the same command"
REQUIRED = ("family", "checkpoint", "out")


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("family", None, f"whose weights: {', '.join(FAMILIES)}", flag_values=values)
    what = "name of `fetch`; .safetensors, .pt, .pth, .ckpt or .bin file; *.index.json of several; folder of diffusers"
    define_path("checkpoint", None, what, values)
    flags.DEFINE_string("weights", "", "entry of a training checkpoint; its average by default", flag_values=values)
    define_path("out", None, "new folder for the parameters", values)
    flags.DEFINE_list(
        "arguments",
        [],
        "the reference's constructor arguments that shapes do not tell, each as name=value: num_heads=6",
        flag_values=values,
    )


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start("off")
    convert(values.family, values.checkpoint, values.out, values.weights, **_arguments(values.arguments))


def convert(family: str, checkpoint: Path, out: Path, entry: str = "", **config: Any) -> None:
    """Read, map, write; one line per fact.

    Args:
        entry: of a training checkpoint, see `weights.choose`.
        config: the reference's constructor arguments, where needed.
    """
    store.refuse_full(out)
    found = checkpoints.read(checkpoint)
    name, weights = choose(found.content, entry, part_of(family))
    print(f"read {len(weights)} entries of {checkpoint}{f', its {name!r}' if name else ''}")
    module, params = from_reference(family, weights, **{**found.config, **config})
    source = {"family": family, "checkpoint": checkpoint.name, "checkpoint_sha256": found.sha256()}
    model = store.save(out, module, params, source)
    print(f"model {model['name']}({', '.join(f'{name}={value}' for name, value in model['kwargs'].items())})")
    print(f"parameters {model['parameters']:,}, sha256 {model['sha256']}")
    print(f"wrote {out}")


def _arguments(texts: list[str]) -> dict[str, Any]:
    arguments = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            arguments[name] = json.loads(value.lower())
        except ValueError:
            raise UserError(f"--arguments: {text!r} is not name=value with a number, true or false") from None
    return arguments
