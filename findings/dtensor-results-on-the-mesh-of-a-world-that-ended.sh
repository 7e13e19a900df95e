#!/usr/bin/env bash
# PyTorch 2.13.0: after destroy_process_group() and another init_process_group() in the same process, an operation on
# a DTensor gives a DTensor that lies on the *earlier* world's mesh. Meshes of equal ranks and names are equal, and
# what DTensor remembers of an operation (its output's placement) holds the mesh that was there the first time. Where
# the groups of both worlds happen to have the same names nothing is seen; else the first use of a group of its mesh
# fails, since the group's name is known no more (a gradient norm asked for one). It concerns notebooks, tests,
# elastic restarts in place, and whoever plays several ranks of a world one after the other.
#
# Seen: the product of the first world lies on its own mesh; that of the second does not, and its mesh's get_group()
# raises "Could not resolve the process group registered under the name ...". With debug._clear_sharding_prop_cache()
# between the worlds both lie on their own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/main.py" <<'PYTHON'
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, debug, distribute_tensor

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
warnings.filterwarnings("ignore")


def product_in_a_world(other_groups: int) -> tuple[bool, str]:
    """Whether 2 x a sharded tensor lies on the mesh of that tensor, and what its mesh gives as a group."""
    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    for _ in range(other_groups):
        dist.new_group([0], use_local_synchronization=True)
    groups = [dist.new_group([0], use_local_synchronization=True) for _ in range(2)]
    ranks = torch.zeros(1, 1, dtype=torch.int)
    mesh = DeviceMesh.from_group(groups, "cpu", mesh=ranks, mesh_dim_names=("a", "b"))
    doubled = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]) * 2
    try:
        said = f"a group of {doubled.device_mesh.get_group('a').size()}"
    except RuntimeError as error:
        said = str(error).strip()
    on_its_own = doubled.device_mesh is mesh
    dist.destroy_process_group()
    return on_its_own, said


found = [product_in_a_world(2), product_in_a_world(0)]
debug._clear_sharding_prop_cache()
found.append(product_in_a_world(1))
for number, (on_its_own, said) in enumerate(found, start=1):
    print(f"world {number}: on its own mesh {on_its_own}; {said}")
assert found[0] == (True, "a group of 1"), found
assert not found[1][0] and found[1][1].startswith("Could not resolve the process group"), found
assert found[2] == (True, "a group of 1"), found
sys.exit(0)
PYTHON
"$folder/env/bin/python" "$folder/main.py"
