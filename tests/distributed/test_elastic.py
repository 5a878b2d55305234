"""Saved on 2 processes x 4 devices, resumed on others or begun from: the same batches, the same
losses.
"""

import pytest
from processes import MESH, losses, run

from gatedjax.training.checkpoint import Checkpointer

# Of the loss: sums of float32 in another order, over eight steps. Processes add up in another
# order than the devices of one, so the same mesh in one process is no exception.
TOLERANCE = 2e-5


def resumed(place, workdir, *flags, **how) -> dict[int, float]:
    for process in run(place, workdir, *flags, **how):
        assert process.popen.returncode == 0, process.log()
    return losses(place, workdir)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (4, 1), (1, 1)])
def test_other_meshes_are_equal_within_rounding(
    place, undisturbed, from_step_4, processes, devices
):
    mesh = f"--config.mesh.fsdp={processes * devices}"
    after = resumed(place, from_step_4, mesh, processes=processes, devices=devices)
    before = losses(place, undisturbed)
    assert after.keys() == before.keys()
    for step, loss in before.items():
        assert after[step] == (loss if step <= 4 else pytest.approx(loss, rel=TOLERANCE)), step


def digests(folder) -> dict[str, str]:
    """Of the parameters of a run's newest checkpoint, by name."""
    with Checkpointer(folder, read_only=True) as checkpointer:
        leaves = checkpointer.manifest()["leaves"]
    return {name: leaf["digest"] for name, leaf in leaves.items() if name.startswith("params.")}


@pytest.mark.slow
def test_given_weights_and_a_frozen_rest_on_two_processes_are_those_of_one(place, undisturbed):
    flags = [
        MESH,
        f"--config.train.init_from={place / undisturbed}",
        "--config.optim.trainable=('*.ffn.*',)",
        "--config.train.steps=4",
    ]
    resumed(place, "given_2", *flags, processes=2, devices=4)
    resumed(place, "given_1", *flags, processes=1, devices=8)
    two, one = losses(place, "given_2"), losses(place, "given_1")
    assert two == pytest.approx(one, rel=TOLERANCE) and len(two) == 4
    base, after = digests(place / undisturbed), digests(place / "given_2")
    changed = {name for name, digest in after.items() if base[name] != digest}
    assert changed and changed == {name for name in after if ".ffn." in name}


@pytest.mark.slow
def test_evaluation_on_two_processes_is_that_of_one(place, undisturbed):
    flags = [
        f"--checkpoint={place / undisturbed}",
        "--batches=2",
        "--prompt_tokens=4",
        "--decode_tokens=2",
    ]
    lines = []
    for processes, devices in ((2, 4), (1, 1)):
        first = run(place, "", *flags, script="eval.py", processes=processes, devices=devices)[0]
        assert first.popen.returncode == 0, first.log()
        lines.append([line for line in first.out if line.startswith(("loss", "bits"))])
    assert lines[0] == lines[1] and len(lines[0]) == 2
